//! What a person types, by the `kubectl` of this machine, against the API server of the tests: the manifests are applied, applied
//! again, over those of an earlier version, and removed as the docs say. Fields are checked as API servers do it by default:
//! one that its kind does not have is an error.
//!
//! It takes a kubectl of 1.29 or later: earlier ones look for what servers can do where this one says nothing (OpenAPI 2), and what
//! Debian 12 has (1.20) does not build folders of folders either. Where there is none, nothing is tried, and the test says so.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::runtime::Runtime;
use weft_apiserver::{Kind, Options, Server, Store};
use weft_tests::Checks;
use weft_tests::checks::report;

/// A cluster of objects, and somebody who has kubectl.
struct Cluster {
    store: Arc<Store>,
    kubectl: Kubectl,
    dir: TempDir,
    _server: Server,
    _runtime: Runtime,
}

/// The program.
#[derive(Clone, Debug)]
struct Kubectl(PathBuf);

#[test]
fn kubectl() {
    let kubectl = match Kubectl::found() {
        Ok(kubectl) => kubectl,
        Err(error) => return report(&format!("kubectl: NOTHING IS TRIED: {error:#}")),
    };
    let shown = kubectl.0.display();
    report(&format!("kubectl: {shown}"));
    let mut checks = Checks::new("kubectl");
    let mut check = |name: &str, run: fn(&Kubectl) -> Result<()>| {
        checks.check(name, || run(&kubectl));
    };
    check("applied, applied again, and as one file", applied);
    check("an earlier version is brought up to date", upgraded);
    check("agents before controllers", agents_first);
    check("all components, and what they need", components);
    check("mistakes are refused before anything is stored", mistakes);
    check("what is tried is not done", tried);
    check("removed as the docs say, nothing is left", removed);
    check("deleted as a folder, nothing is left", deleted);
    checks.finish();
}

fn applied(kubectl: &Kubectl) -> Result<()> {
    let cluster = Cluster::new(kubectl)?;
    let objects = manifests("daemonset/weft.yaml")?;
    let said = cluster.apply(&["-k", "daemonset"])?;
    expect_all(&said, objects.len(), "created")?;
    for object in &objects {
        cluster.expect_as_written(object)?;
    }
    for from in [["-k", "daemonset"], ["-f", "daemonset/weft.yaml"]] {
        cluster.expect_unchanged_by(from, objects.len())?;
    }
    // It would say what is different, and fail.
    cluster.run(&["diff", "-k", "daemonset"])?;
    let definition = "customresourcedefinition/servers.policy.weft.dev";
    let condition = "--for=condition=Established";
    cluster.run(&["wait", condition, definition, "--timeout=10s"])?;
    Ok(())
}

/// Whatever the earlier version said otherwise, what is there then is what a new cluster has.
fn upgraded(kubectl: &Kubectl) -> Result<()> {
    let [fresh, cluster] = [Cluster::new(kubectl)?, Cluster::new(kubectl)?];
    fresh.apply(&["-k", "daemonset"])?;
    let earlier = earlier(manifests("daemonset/weft.yaml")?);
    let file = cluster.file("earlier.yaml", &earlier)?;
    let said = cluster.apply(&["-f", &file])?;
    expect_all(&said, earlier.len(), "created")?;
    let said = cluster.apply(&["-k", "daemonset"])?;
    let count = |what: &str| said.lines().filter(|it| it.ends_with(what)).count();
    // The budget, which the earlier version lacks.
    ensure!(count(" created") == 1, "{said}");
    ensure!(count(" configured") >= 6, "{said}");
    let (expected, found) = (fresh.objects(), cluster.objects());
    for (id, expected) in &expected {
        let found = found.get(id).with_context(|| format!("{id} is missing"))?;
        ensure!(expected == found, "{id}: {found}\nis to be {expected}");
    }
    ensure!(
        expected.len() == found.len(),
        "there is more than there was"
    );
    cluster.expect_unchanged_by(["-k", "daemonset"], expected.len())
}

/// As docs/upgrade.md says.
fn agents_first(kubectl: &Kubectl) -> Result<()> {
    let cluster = Cluster::new(kubectl)?;
    let earlier = earlier(manifests("daemonset/weft.yaml")?);
    let file = cluster.file("earlier.yaml", &earlier)?;
    cluster.apply(&["-f", &file])?;
    let selector = "app.kubernetes.io/name=weft-agent";
    let said = cluster.apply(&["-k", "daemonset", "-l", selector])?;
    ensure!(
        said.trim() == "daemonset.apps/weft-agent configured",
        "{said}"
    );
    Ok(())
}

/// One overlay with all that go together; others alone. Definitions of others are there, without what they say.
fn components(kubectl: &Kubectl) -> Result<()> {
    let together = [
        "cert-manager",
        "cni",
        "crds-linkerd",
        "gke",
        "grafana",
        "ha",
        "prometheus",
        "trust-manager",
        "webhook",
    ];
    let overlays = [&together[..], &["before-1.30"], &["ipv6", "ipv6-webhook"]];
    for folder in fs::read_dir(root().join("daemonset/components"))? {
        let name = folder?.file_name().to_string_lossy().into_owned();
        let is_tried = overlays.iter().any(|it| it.contains(&name.as_str()));
        ensure!(is_tried, "{name} is in no overlay here");
    }
    for names in overlays {
        let cluster = Cluster::new(kubectl)?;
        for (group, kind) in [
            ("cert-manager.io", "Certificate"),
            ("cert-manager.io", "Issuer"),
            ("monitoring.coreos.com", "PodMonitor"),
            ("monitoring.coreos.com", "PrometheusRule"),
        ] {
            cluster.store.install(Kind::custom(group, &["v1"], kind));
        }
        cluster.store.install(Kind {
            namespaced: false,
            ..Kind::custom("trust.cert-manager.io", &["v1alpha1"], "Bundle")
        });
        // As cert-manager makes it for its own.
        let namespace =
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "cert-manager"}});
        cluster.store.apply(&namespace)?;
        let overlay = cluster.overlay("daemonset", names)?;
        let said = cluster.apply(&["-k", &overlay])?;
        let count = said.lines().count();
        expect_all(&said, count, "created").with_context(|| format!("{names:?}"))?;
        let unchanged = cluster.expect_unchanged_by(["-k", &overlay], count);
        unchanged.with_context(|| format!("{names:?}"))?;
        // And back.
        cluster.apply(&["-k", "daemonset"])?;
    }
    Ok(())
}

fn mistakes(kubectl: &Kubectl) -> Result<()> {
    let cluster = Cluster::new(kubectl)?;
    cluster.apply(&["-k", "daemonset"])?;
    let objects = manifests("daemonset/weft.yaml")?;
    let daemon_set = objects.iter().find(|it| it["kind"] == "DaemonSet");
    let daemon_set = daemon_set.context("no DaemonSet")?;
    let server = |spec: Value| json!({"apiVersion": "policy.weft.dev/v1alpha1", "kind": "Server", "metadata": {"name": "web", "namespace": "weft-system"}, "spec": spec});
    let changed = |pointer: &str, field: &str, value: Value| {
        let mut object = daemon_set.clone();
        object.pointer_mut(pointer).context("no such field")?[field] = value;
        anyhow::Ok(object)
    };
    let container = "/spec/template/spec/containers/0";
    for (object, said) in [
        (
            changed(container, "imagePolicy", json!("Never"))?,
            r#"unknown field "spec.template.spec.containers[0].imagePolicy""#,
        ),
        (
            changed(container, "command", json!("run"))?,
            "cannot be handled as a DaemonSet",
        ),
        (
            changed("/spec/template", "spec", json!({"hostPID": true}))?,
            "containers: Required value",
        ),
        (server(json!({"podSelector": {}, "port": 0})), "spec.port"),
        (
            server(json!({"podSelector": {}, "port": 80, "portt": 1})),
            r#"unknown field "spec.portt""#,
        ),
        (
            server(
                json!({"podSelector": {"matchExpressions": [{"key": "a", "operator": "In"}]}, "port": 80}),
            ),
            "In and NotIn need values",
        ),
    ] {
        let file = cluster.file("mistake.yaml", &[object])?;
        let error = match cluster.apply(&["-f", &file]) {
            Ok(said) => bail!("it was taken: {said}"),
            Err(error) => format!("{error:#}"),
        };
        ensure!(error.contains(said), "{error}\nlacks {said}");
    }
    cluster.expect_as_written(daemon_set)?;
    ensure!(
        cluster
            .store
            .object("Server", "weft-system", "web")
            .is_none()
    );
    let good = server(json!({"podSelector": {}, "port": 80}));
    let file = cluster.file("server.yaml", &[good])?;
    let said = cluster.apply(&["-f", &file])?;
    expect_all(&said, 1, "created")?;
    // By the short name that its definition gives it.
    let said = cluster.run(&["-n", "weft-system", "get", "wsrv", "web", "-o", "name"])?;
    ensure!(said.trim() == "server.policy.weft.dev/web", "{said}");
    Ok(())
}

/// As docs/uninstall.md does it before the agents are gone.
fn tried(kubectl: &Kubectl) -> Result<()> {
    let cluster = Cluster::new(kubectl)?;
    cluster.apply(&["-k", "daemonset"])?;
    let before = cluster.store.revision();
    let said = cluster.apply(&["-k", "daemonset/uninstall", "--dry-run=server"])?;
    ensure!(
        said.trim() == "daemonset.apps/weft-uninstall created (server dry run)",
        "{said}"
    );
    let cluster_is_same = cluster.store.revision() == before;
    ensure!(cluster_is_same, "something was done");
    cluster.apply(&["-k", "daemonset/uninstall"])?;
    let objects = manifests("daemonset/uninstall/uninstall.yaml")?;
    cluster.expect_as_written(&objects[0])
}

/// The commands of docs/uninstall.md, after the agents and what they left in kernels, for which it takes nodes.
fn removed(kubectl: &Kubectl) -> Result<()> {
    let cluster = Cluster::new(kubectl)?;
    cluster.apply(&["-k", "daemonset"])?;
    for object in [
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop", "labels": {"weft.dev/mesh": "enabled"}}}),
        json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "web", "namespace": "shop",
            "annotations": {"linkerd.io/inject": "enabled"}}, "spec": {"containers": [{"name": "web"}]}}),
    ] {
        cluster.store.apply(&object)?;
    }
    let text = fs::read_to_string(root().join("docs/uninstall.md"))?;
    let of_step = |number: &str| {
        let step = text.split(&format!("**{number}. ")).nth(1)?;
        step.split("```console\n").nth(1)?.split("```").next()
    };
    for number in ["1", "3"] {
        let commands = of_step(number).with_context(|| format!("no commands of step {number}"))?;
        for line in commands.lines() {
            let command = line.strip_prefix("$ kubectl ");
            let command = command.with_context(|| format!("what is {line}?"))?;
            let words: Vec<&str> = command.split_whitespace().collect();
            cluster.run(&words).with_context(|| line.to_owned())?;
        }
    }
    let pod = cluster
        .store
        .object("Pod", "shop", "web")
        .context("no pod")?;
    let mark = pod.pointer("/metadata/annotations/linkerd.io~1inject");
    ensure!(mark.is_none(), "it still opts in: {pod}");
    cluster.expect_nothing_left()
}

fn deleted(kubectl: &Kubectl) -> Result<()> {
    let cluster = Cluster::new(kubectl)?;
    cluster.apply(&["-k", "daemonset"])?;
    cluster.run(&["delete", "--ignore-not-found", "-k", "daemonset"])?;
    cluster.expect_nothing_left()
}

impl Kubectl {
    /// That of this machine, or the one that `WEFT_KUBECTL` names.
    fn found() -> Result<Kubectl> {
        let named = std::env::var_os("WEFT_KUBECTL").unwrap_or_else(|| "kubectl".into());
        let program = PathBuf::from(named);
        let mut command = Command::new(&program);
        let output = command.args(["version", "--client", "-o", "json"]).output();
        let output = output.with_context(|| format!("running {}", program.display()))?;
        let said: Value = serde_json::from_slice(&output.stdout).context("its version")?;
        // Some builds say `32+`.
        let minor = said["clientVersion"]["minor"].as_str().unwrap_or_default();
        let minor: u32 = minor.trim_end_matches('+').parse().unwrap_or(0);
        let shown = program.display();
        ensure!(
            minor >= LEAST,
            "{shown} is of 1.{minor}, and 1.{LEAST} is needed"
        );
        Ok(Kubectl(program))
    }
}

impl Cluster {
    /// One that nothing was installed in.
    fn new(kubectl: &Kubectl) -> Result<Cluster> {
        let store = Store::new(Kind::all_built_in());
        let runtime = Runtime::new()?;
        let address = "127.0.0.1:0".parse()?;
        let server = Server::start(store.clone(), address, Options::default());
        let server = runtime.block_on(server)?;
        // Overlays name folders by relative paths.
        let dir = tempfile::tempdir_in(root().join("target"))?;
        fs::write(dir.path().join("kubeconfig"), server.kubeconfig())?;
        Ok(Cluster {
            store,
            kubectl: kubectl.clone(),
            dir,
            _server: server,
            _runtime: runtime,
        })
    }

    /// What it prints; an error if it fails, or says anything else.
    fn run(&self, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new(&self.kubectl.0);
        command.args(arguments).current_dir(root());
        command.env("KUBECONFIG", self.dir.path().join("kubeconfig"));
        command.env("HOME", self.dir.path());
        let output = command.output()?;
        let [printed, said] =
            [&output.stdout, &output.stderr].map(|it| String::from_utf8_lossy(it));
        ensure!(
            output.status.success(),
            "{}: {said}{printed}",
            output.status
        );
        let warnings = said.lines().any(|it| it.starts_with("Warning"));
        ensure!(!warnings, "{said}");
        Ok(printed.into_owned())
    }

    fn apply(&self, arguments: &[&str]) -> Result<String> {
        self.run(&[&["apply"], arguments].concat())
    }

    /// A file for it.
    fn file(&self, name: &str, objects: &[Value]) -> Result<String> {
        let path = self.dir.path().join(name);
        let documents: Vec<String> = objects.iter().map(Value::to_string).collect();
        // What begins as JSON is taken for nothing else.
        fs::write(&path, format!("---\n{}", documents.join("\n---\n")))?;
        Ok(path.display().to_string())
    }

    /// A folder that adds components to another one.
    fn overlay(&self, base: &str, components: &[&str]) -> Result<String> {
        let folder = self.dir.path().join("overlay");
        fs::create_dir_all(&folder)?;
        let components = components.iter();
        let components: Vec<String> = components
            .map(|it| format!("../../../daemonset/components/{it}"))
            .collect();
        let text = json!({"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization",
            "resources": [format!("../../../{base}")], "components": components});
        fs::write(folder.join("kustomization.yaml"), text.to_string())?;
        Ok(folder.display().to_string())
    }

    /// All of it, without what servers and kubectl note on objects.
    fn objects(&self) -> BTreeMap<String, Value> {
        let objects = self.store.objects().into_iter();
        let objects = objects.map(|it| {
            let id = format!("{} {}", it["kind"], it["metadata"]["name"]);
            (id, said_by_people(&it))
        });
        objects.collect()
    }

    /// Nothing that is written got lost.
    fn expect_as_written(&self, object: &Value) -> Result<()> {
        let metadata = &object["metadata"];
        let [kind, namespace, name] = [&object["kind"], &metadata["namespace"], &metadata["name"]]
            .map(|it| it.as_str().unwrap_or_default());
        let found = self.store.object(kind, namespace, name);
        let found = found.with_context(|| format!("there is no {kind} {name}"))?;
        let (found, written) = (said_by_people(&found), said_by_people(object));
        ensure!(found == written, "{kind} {name}: {found}\nwas {written}");
        Ok(())
    }

    /// Nothing is written by applying what is there. Of budgets kubectl says otherwise whenever it applies one: their selector is
    /// replaced as a whole.
    fn expect_unchanged_by(&self, arguments: [&str; 2], count: usize) -> Result<()> {
        let before = self.store.revision();
        let said = self.apply(&arguments)?;
        let of_budgets = |it: &&str| it.starts_with("poddisruptionbudget.");
        let others = said.lines().filter(|it| !of_budgets(it));
        let others: Vec<&str> = others.collect();
        let budgets = said.lines().filter(of_budgets).count();
        expect_all(&others.join("\n"), count - budgets, "unchanged")?;
        ensure!(self.store.revision() == before, "something was written");
        Ok(())
    }

    fn expect_nothing_left(&self) -> Result<()> {
        let left = self.objects().into_keys();
        let mut left: Vec<_> = left.filter(|it| it.contains("weft")).collect();
        let kinds = self.store.kinds().into_iter();
        left.extend(
            kinds
                .filter(|it| it.group.contains("weft"))
                .map(|it| it.kind),
        );
        ensure!(left.is_empty(), "left: {left:?}");
        Ok(())
    }
}

/// The oldest minor version that is tried.
const LEAST: u32 = 29;

fn root() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    root.canonicalize().unwrap_or(root)
}

fn manifests(file: &str) -> Result<Vec<Value>> {
    let text = fs::read_to_string(root().join(file)).context(file.to_owned())?;
    Ok(serde_saphyr::from_multiple(&text)?)
}

/// Every line tells of one object, and that it was done to it.
fn expect_all(said: &str, count: usize, done: &str) -> Result<()> {
    let done = format!(" {done}");
    ensure!(said.lines().all(|it| it.ends_with(&done)), "{said}");
    ensure!(said.lines().count() == count, "not {count}:\n{said}");
    Ok(())
}

/// An object without what servers and kubectl note on it.
fn said_by_people(object: &Value) -> Value {
    let mut object = object.clone();
    whole_numbers(&mut object);
    if let Some(fields) = object.as_object_mut() {
        fields.remove("status");
    }
    if let Some(metadata) = object["metadata"].as_object_mut() {
        for noted in ["uid", "resourceVersion", "creationTimestamp", "generation"] {
            metadata.remove(noted);
        }
        if let Some(annotations) = metadata
            .get_mut("annotations")
            .and_then(Value::as_object_mut)
        {
            annotations.remove("kubectl.kubernetes.io/last-applied-configuration");
            if annotations.is_empty() {
                metadata.remove("annotations");
            }
        }
    }
    object
}

/// Schemas have bounds such as `1.0`, which kubectl writes as `1`.
fn whole_numbers(value: &mut Value) {
    match value {
        Value::Array(items) => items.iter_mut().for_each(whole_numbers),
        Value::Object(fields) => fields.values_mut().for_each(whole_numbers),
        Value::Number(number) => {
            if let Some(whole) = number.as_f64().filter(|it| it.fract() == 0.0) {
                *value = Value::from(whole as i64);
            }
        }
        _ => {}
    }
}

/// Objects as an earlier version could have had them: with less, with more, and otherwise.
fn earlier(mut objects: Vec<Value>) -> Vec<Value> {
    objects.retain(|it| it["kind"] != "PodDisruptionBudget");
    for object in &mut objects {
        let kind = object["kind"].as_str().unwrap_or_default().to_owned();
        match kind.as_str() {
            "DaemonSet" => {
                object["metadata"]["labels"]["earlier"] = json!("yes");
                object["spec"]["updateStrategy"] = json!({"type": "OnDelete"});
                let pod = &mut object["spec"]["template"]["spec"];
                pod["initContainers"] =
                    json!([{"name": "mount", "image": "earlier", "command": ["/mount"]}]);
                pod["hostIPC"] = json!(true);
                pod["tolerations"] = json!([{"key": "a", "operator": "Exists"}]);
                push(
                    &mut pod["volumes"],
                    json!({"name": "earlier", "emptyDir": {}}),
                );
                let container = &mut pod["containers"][0];
                container["image"] = json!("earlier");
                container["args"] = json!(["--earlier"]);
                container["env"] = json!([{"name": "WEFT_EARLIER", "value": "1"}, {"name": "WEFT_BPFFS", "value": "/bpf"}]);
                let mount = json!({"name": "earlier", "mountPath": "/earlier"});
                push(&mut container["volumeMounts"], mount);
            }
            "Deployment" => {
                object["spec"]["strategy"] = json!({"type": "Recreate"});
                let pod = &mut object["spec"]["template"]["spec"];
                pod["containers"][0]["ports"] = json!([{"name": "grpc", "containerPort": 15012}, {"name": "old", "containerPort": 1}]);
                let sidecar = json!({"name": "earlier", "image": "earlier"});
                push(&mut pod["containers"], sidecar);
            }
            "Service" => {
                object["spec"]["ports"] = json!([{"name": "grpc", "port": 15012, "targetPort": 1}, {"name": "old", "port": 1}]);
            }
            "ClusterRole" => push(
                &mut object["rules"],
                json!({"apiGroups": ["apps"], "resources": ["deployments"], "verbs": ["get"]}),
            ),
            "NetworkPolicy" => {
                object["spec"]["ingress"] = json!([{"ports": [{"port": 1}, {"port": 15012}]}])
            }
            "CustomResourceDefinition" => {
                let version = &mut object["spec"]["versions"][0];
                version["additionalPrinterColumns"] =
                    json!([{"name": "Old", "type": "string", "jsonPath": ".spec.old"}]);
            }
            "Namespace" => object["metadata"]["annotations"] = json!({"earlier": "yes"}),
            _ => {}
        }
    }
    objects
}

fn push(list: &mut Value, item: Value) {
    if let Some(list) = list.as_array_mut() {
        list.push(item);
    }
}
