//! The `weft` command against a mesh in a cluster: with a kubeconfig, by port-forwards through the API server, and with what
//! roles let its user do.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use weft_tests::cluster::binary;
use weft_tests::command::{Finished, Program};
use weft_tests::manifests::{ServiceSpec, namespace};
use weft_tests::scenario::{eventually, expect_echo};
use weft_tests::testapp::Server;
use weft_tests::{Checks, Cluster, ClusterOptions, Pod, PodSpec};

struct Scene {
    cluster: Cluster,
    order: Pod,
    web: Pod,
    _server: Server,
}

const PORT: u16 = 8080;
const CONTROLLER_POD: &str = "weft-controller-6d9f";

#[test]
fn cli_kubernetes() {
    let scene = Scene::new().expect("a mesh with pods");
    let mut checks = Checks::new("the command-line tool in a cluster");
    let mut check = |name: &str, run: fn(&Scene) -> Result<()>| checks.check(name, || run(&scene));
    check(
        "before it is installed, check says what is in the way",
        before,
    );
    check("check says that all is well", all_is_well);
    check("commands have what agents say", commands);
    check("enroll and unenroll label what runs", enroll);
    check("diagnostics collects all, and no token", diagnostics);
    check("a kubeconfig and a context can be named", named);
    check("a right to forward ports is not enough", rights);
    check("a token of another account is not enough", another_account);
    check("requests are logged and counted, without tokens", audited);
    check("pods are watched by who may", watched);
    check("what is not there is said", not_there);
    checks.finish();
}

impl Scene {
    fn new() -> Result<Self> {
        let cluster = Cluster::with(ClusterOptions {
            kubernetes: true,
            controller_args: ["--inspect", "127.0.0.1:15016"].map(str::to_owned).into(),
            ..ClusterOptions::default()
        })?;
        let roles = concat!(env!("CARGO_MANIFEST_DIR"), "/../daemonset/base/rbac.yaml");
        cluster
            .manifests()
            .apply("roles", &std::fs::read_to_string(roles)?)?;
        cluster.apply(&bound("viewer", "weft-viewer"))?;
        cluster.apply(&forwarding())?;
        cluster.apply(&bound("forwarder", "forwarder"))?;
        cluster.apply(&controller_pod(CONTROLLER_POD, "Running"))?;
        // Those that do not run are not asked.
        cluster.apply(&controller_pod("weft-controller-old", "Failed"))?;
        let order = cluster.add_pod(PodSpec::new("order").on(0))?;
        let web = cluster.add_pod(PodSpec::new("web").on(1).label("app", "web"))?;
        let server = Server::start(&web, PORT, "echo", &[])?;
        Ok(Self {
            cluster,
            order,
            web,
            _server: server,
        })
    }

    fn kubeconfig(&self, user: &str) -> Result<&Path> {
        self.cluster.controller()?.kubeconfig_of(user)
    }

    /// Runs the tool as a user, where the API server is.
    fn weft_as(&self, user: &str, arguments: &[&str]) -> Result<Finished> {
        let kubeconfig = self.kubeconfig(user)?.display().to_string();
        self.weft_with(&kubeconfig, arguments)
    }

    fn weft_with(&self, kubeconfig: &str, arguments: &[&str]) -> Result<Finished> {
        let netns = self.cluster.controller()?.netns();
        let program = Program::new(binary("weft")?, Some(netns), None, self.cluster.dir())?;
        let program = program.args(arguments);
        let program = program.env("KUBECONFIG", kubeconfig);
        program.output(Duration::from_secs(60))
    }

    fn json(&self, arguments: &[&str]) -> Result<Value> {
        let all = [arguments, &["-o", "json"]].concat();
        let text = self.weft_as("viewer", &all)?.success()?;
        serde_json::from_str(&text).with_context(|| format!("not JSON: {text}"))
    }
}

/// A user to whom a role in Weft's namespace is bound.
fn bound(user: &str, role: &str) -> Value {
    json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding",
        "metadata": {"name": format!("{user}-{role}"), "namespace": "weft-system"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": role},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": user}]})
}

/// Somebody may forward ports, and have tokens of an account that may nothing.
fn forwarding() -> Value {
    json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role",
    "metadata": {"name": "forwarder", "namespace": "weft-system"},
    "rules": [
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]},
        {"apiGroups": [""], "resources": ["pods/portforward"], "verbs": ["get", "create"]},
        {"apiGroups": [""], "resources": ["serviceaccounts/token"], "verbs": ["create"],
            "resourceNames": ["weft-agent"]},
    ]})
}

fn controller_pod(name: &str, phase: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": "weft-system", "uid": name,
            "labels": {"app.kubernetes.io/name": "weft-controller"}},
        "spec": {"nodeName": "elsewhere", "serviceAccountName": "weft-controller",
            "containers": [{"name": "controller"}]},
        "status": {"phase": phase}})
}

fn all_is_well(scene: &Scene) -> Result<()> {
    let all = scene.json(&["check", "--wait", "30s"])?;
    let checks = all["checks"].as_array().context("checks")?;
    ensure!(checks.len() == 18 && all["ok"] == true, "{all}");
    let table = scene.weft_as("viewer", &["check"])?.success()?;
    let answers = format!("the controller answers at pod weft-system/{CONTROLLER_POD}");
    for line in [answers.as_str(), "2 nodes have an agent", "all is well"] {
        ensure!(table.contains(line), "no {line:?} in {table}");
    }
    Ok(())
}

/// Of somebody who may look and not install; then of one who may, in a cluster that another mesh and an old node are in.
fn before(scene: &Scene) -> Result<()> {
    let findings = || -> Result<Value> {
        let said = scene.weft_as("installer", &["check", "--pre", "-o", "json"])?;
        let text = &said.stdout;
        let report: Value = serde_json::from_str(text).with_context(|| format!("{said:?}"))?;
        let code = if report["ok"] == true { 0 } else { 1 };
        ensure!(said.code() == code, "{said:?}");
        Ok(report)
    };
    let expect = |report: &Value, check: &str, state: &str, part: &str| -> Result<()> {
        let mut all = report["checks"].as_array().into_iter().flatten();
        let found = all.find(|it| it["check"] == check);
        let found = found.with_context(|| format!("no {check} in {report}"))?;
        let is_so = found["state"] == state && found.to_string().contains(part);
        ensure!(is_so, "{check} is not {state} with {part:?}: {found}");
        Ok(())
    };
    let nothing = findings()?;
    expect(&nothing, "kubernetes-version", "ok", "v1.33.0")?;
    for kind in [
        "namespaces",
        "clusterroles.rbac.authorization.k8s.io",
        "daemonsets.apps",
    ] {
        let part = format!("you may not get, create, patch {kind}");
        expect(&nothing, "rights-to-install", "error", &part)?;
    }
    expect(&nothing, "node-kernels", "warning", "403")?;
    for object in installing() {
        scene.cluster.apply(&object)?;
    }
    eventually("the rights to install to be there", || {
        let report = findings()?;
        ensure!(report["ok"] == true, "{report}");
        expect(&report, "rights-to-install", "ok", "")?;
        expect(&report, "node-kernels", "ok", "2 nodes")?;
        expect(&report, "another-mesh", "ok", "")?;
        expect(&report, "weft-installed", "ok", "weft-system")
    })?;
    let (apps, cilium) = (
        "apps/v1",
        json!({"cni-exclusive": "true", "kube-proxy-replacement": "true"}),
    );
    let objects = [
        json!({"apiVersion": apps, "kind": "Deployment", "metadata": {"name": "istiod", "namespace": "istio-system",
            "labels": {"app": "istiod"}}, "spec": {"selector": {}, "template": {}}}),
        json!({"apiVersion": apps, "kind": "DaemonSet", "metadata": {"name": "cilium", "namespace": "kube-system"},
            "spec": {"selector": {}, "template": {}}}),
        json!({"apiVersion": "v1", "kind": "ConfigMap",
            "metadata": {"name": "cilium-config", "namespace": "kube-system"}, "data": cilium}),
        json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "old"},
            "status": {"nodeInfo": {"kernelVersion": "4.18.0-553.el8", "operatingSystem": "linux",
                "architecture": "s390x"}}}),
        json!({"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
            "metadata": {"name": "servers.policy.weft.dev"},
            "spec": {"group": "policy.weft.dev", "scope": "Namespaced", "names": {"kind": "Server", "plural": "servers"},
                "versions": [{"name": "v0", "served": true, "storage": true}]}}),
    ];
    for object in &objects {
        scene.cluster.apply(object)?;
    }
    eventually("what is in the way to be found", || {
        let report = findings()?;
        ensure!(report["ok"] == false, "{report}");
        expect(
            &report,
            "another-mesh",
            "warning",
            "Istio: Deployment istio-system/istiod",
        )?;
        expect(&report, "cni", "warning", "the CNI is Cilium")?;
        expect(&report, "cni", "warning", "kube-proxy-replacement")?;
        expect(&report, "definitions", "warning", "v0 is served")?;
        expect(
            &report,
            "address-ranges",
            "warning",
            "1 of 3 nodes have no podCIDRs",
        )?;
        expect(
            &report,
            "node-kernels",
            "error",
            "old: Linux 4.18.0-553.el8",
        )?;
        expect(
            &report,
            "node-platforms",
            "error",
            "there is no image for s390x",
        )
    })?;
    for object in &objects {
        scene.cluster.remove(object)?;
    }
    let nowhere = scene
        .cluster
        .dir()
        .join("no-kubeconfig")
        .display()
        .to_string();
    let said = scene.weft_with(&nowhere, &["check", "--pre"])?;
    let is_said = said.stdout.contains("× the Kubernetes API does not answer");
    ensure!(said.code() == 1 && is_said, "{said:?}");
    Ok(())
}

/// Somebody may apply the manifests, and look at what is there before.
fn installing() -> [Value; 2] {
    let group = "rbac.authorization.k8s.io";
    let applied = |groups: &str, resources: &[&str]| json!({"apiGroups": [groups], "resources": resources, "verbs": ["get", "list", "create", "patch"]});
    [
        json!({"apiVersion": format!("{group}/v1"), "kind": "ClusterRole", "metadata": {"name": "installer"},
        "rules": [
            applied("", &["namespaces", "nodes", "serviceaccounts", "services", "configmaps"]),
            applied("apps", &["daemonsets", "deployments"]),
            applied("policy", &["poddisruptionbudgets"]),
            applied("apiextensions.k8s.io", &["customresourcedefinitions"]),
            applied("networking.k8s.io", &["networkpolicies", "servicecidrs"]),
            {"apiGroups": [group], "resources": ["roles", "clusterroles", "rolebindings", "clusterrolebindings"],
                "verbs": ["get", "create", "patch", "escalate", "bind"]},
        ]}),
        json!({"apiVersion": format!("{group}/v1"), "kind": "ClusterRoleBinding", "metadata": {"name": "installer"},
            "roleRef": {"apiGroup": group, "kind": "ClusterRole", "name": "installer"},
            "subjects": [{"apiGroup": group, "kind": "User", "name": "installer"}]}),
    ]
}

fn commands(scene: &Scene) -> Result<()> {
    let service = ServiceSpec::new("shop").select("app", "web").port(80, PORT);
    scene.cluster.add_service(&service)?;
    let target = scene.web.sockets(PORT)[0];
    eventually("an edge", || {
        expect_echo(&scene.order, target, "seen")?;
        let all = scene.json(&["edges", "pod/web"])?;
        let edges = all["edges"].as_array().context("edges")?;
        let edge = edges.iter().find(|it| it["client"]["name"] == "order");
        let edge = edge.with_context(|| format!("no edge: {all}"))?;
        ensure!(edge["secured"] == "mutual_tls", "{edge}");
        Ok(())
    })?;
    let stat = scene.json(&["stat", "pod/web", "--window", "1s"])?;
    ensure!(stat["rows"][0]["pods_meshed"] == 1, "{stat}");
    let identity = scene.json(&["identity", "pod/web"])?;
    let row = &identity["rows"][0];
    ensure!(
        row["identity"] == scene.web.identity().as_str(),
        "{identity}"
    );
    let authz = scene.json(&["authz", "pod/web", "--window", "1s"])?;
    ensure!(
        authz["rows"].as_array().is_some_and(|it| !it.is_empty()),
        "{authz}"
    );
    eventually("the Service with its pod, on both nodes", || {
        let all = scene.json(&["endpoints", "svc/shop"])?;
        let rows = all["rows"].as_array().context("rows")?;
        ensure!(rows.len() == 2 && all["missing"] == json!([]), "{all}");
        Ok(())
    })?;
    let explained = scene.json(&["explain", "order", "shop:80"])?;
    ensure!(explained["outcome"] == "reaches", "{explained}");
    let ends = explained["ends"].as_array().context("ends")?;
    let sides: Vec<_> = ends.iter().map(|it| &it["side"]).collect();
    ensure!(sides == ["outbound", "inbound"], "{explained}");
    Ok(())
}

/// A namespace, then a pod of it: in and out again, while they run.
fn enroll(scene: &Scene) -> Result<()> {
    scene.cluster.apply(&namespace("late", &json!({})))?;
    let pod = PodSpec::new("late").namespace("late").unmeshed();
    let _late = scene.cluster.add_pod(pod)?;
    for object in labelling() {
        scene.cluster.apply(&object)?;
    }
    let enroll = |arguments: &[&str]| -> Result<Value> {
        let all = [arguments, &["-o", "json"]].concat();
        let text = scene.weft_as("labeller", &all)?.success()?;
        serde_json::from_str(&text).with_context(|| format!("not JSON: {text}"))
    };
    let is_in = |expected: bool| {
        let awaited = match expected {
            true => "the pod to be in the mesh",
            false => "the pod to be out of the mesh",
        };
        eventually(awaited, || {
            let all = scene.json(&["identity", "-n", "late"])?;
            let rows = all["rows"].as_array().context("rows")?;
            let has_certificate = rows.iter().any(|it| it["not_after_ms"].is_number());
            ensure!(
                has_certificate == expected && (expected || rows.is_empty()),
                "{all}"
            );
            Ok(())
        })
    };
    eventually("the rights to be there", || {
        let would = enroll(&["enroll", "ns/late", "--dry-run"])?;
        let pods = json!([{"name": "late", "before": false, "after": true, "reason": null}]);
        ensure!(would["pods"] == pods && would["dry_run"] == true, "{would}");
        Ok(())
    })?;
    is_in(false)?;
    let changed = enroll(&["enroll", "ns/late"])?;
    ensure!(changed["changes"][0]["after"] == "enabled", "{changed}");
    is_in(true)?;
    let again = enroll(&["enroll", "ns/late"])?;
    ensure!(again["changes"] == json!([]), "{again}");
    // Its namespace stays in.
    let changed = enroll(&["unenroll", "pod/late", "-n", "late"])?;
    ensure!(changed["changes"][0]["after"] == "disabled", "{changed}");
    is_in(false)?;
    let kept = scene.weft_as("labeller", &["enroll", "ns/late"])?;
    ensure!(kept.code() == 1, "{kept:?}");
    let reason = "late   it says itself that it does not take part";
    ensure!(kept.stdout.contains(reason), "{kept:?}");
    enroll(&["enroll", "pod/late", "-n", "late"])?;
    is_in(true)?;
    enroll(&["unenroll", "pod/late", "-n", "late"])?;
    let changed = enroll(&["unenroll", "ns/late"])?;
    ensure!(changed["changes"][0]["after"].is_null(), "{changed}");
    is_in(false)?;
    let refused = scene.weft_as("viewer", &["enroll", "ns/late"])?;
    let reason = "cannot read the namespace late";
    ensure!(
        refused.code() == 2 && refused.stderr.contains(reason),
        "{refused:?}"
    );
    Ok(())
}

/// Somebody may label namespaces and pods.
fn labelling() -> [Value; 2] {
    let group = "rbac.authorization.k8s.io";
    [
        json!({"apiVersion": format!("{group}/v1"), "kind": "ClusterRole", "metadata": {"name": "labeller"},
        "rules": [
            {"apiGroups": [""], "resources": ["namespaces"], "verbs": ["get", "patch"]},
            {"apiGroups": [""], "resources": ["pods"], "verbs": ["list", "patch"]},
        ]}),
        json!({"apiVersion": format!("{group}/v1"), "kind": "ClusterRoleBinding", "metadata": {"name": "labeller"},
            "roleRef": {"apiGroup": group, "kind": "ClusterRole", "name": "labeller"},
            "subjects": [{"apiGroup": group, "kind": "User", "name": "labeller"}]}),
    ]
}

fn diagnostics(scene: &Scene) -> Result<()> {
    let dir = scene.cluster.dir().join("diagnostics");
    let shown = dir.display().to_string();
    scene
        .weft_as("viewer", &["diagnostics", "--dir", &shown])?
        .success()?;
    let mut files = 0;
    for folder in std::fs::read_dir(&dir)? {
        for file in std::fs::read_dir(folder?.path())? {
            let file = file?.path();
            let text = std::fs::read_to_string(&file)?;
            ensure!(!text.is_empty(), "{} is empty", file.display());
            ensure!(!has_token(&text), "{} has a token", file.display());
            files += 1;
        }
    }
    ensure!(files == 5 + 2 * 4, "{files} files");
    Ok(())
}

fn named(scene: &Scene) -> Result<()> {
    let nowhere = scene.cluster.dir().join("no-kubeconfig");
    let nowhere = nowhere.display().to_string();
    let kubeconfig = scene.kubeconfig("viewer")?.display().to_string();
    let by_flag = scene.weft_with(&nowhere, &["check", "--kubeconfig", &kubeconfig])?;
    by_flag.success()?;
    let check = ["check", "--context", "tests"];
    scene.weft_as("viewer", &check)?.success()?;
    let other = scene.weft_as("viewer", &["edges", "--context", "another"])?;
    ensure!(
        other.code() == 2 && other.stderr.contains("another"),
        "{other:?}"
    );
    // The namespace is that of the context unless it is said.
    let text = std::fs::read_to_string(&kubeconfig)?;
    let mut changed: Value = serde_json::from_str(&text)?;
    changed["contexts"][0]["context"]["namespace"] = json!("elsewhere");
    let file = scene.cluster.dir().join("elsewhere.kubeconfig");
    std::fs::write(&file, changed.to_string())?;
    let file = file.display().to_string();
    let there = scene.weft_with(&file, &["identity", "-o", "json"])?;
    let there: Value = serde_json::from_str(&there.success()?)?;
    ensure!(there["rows"] == json!([]), "{there}");
    let here = scene.weft_with(&file, &["identity", "-n", "default", "-o", "json"])?;
    let here: Value = serde_json::from_str(&here.success()?)?;
    ensure!(here["rows"] != json!([]), "{here}");
    Ok(())
}

fn rights(scene: &Scene) -> Result<()> {
    let said = scene.weft_as("forwarder", &["edges"])?;
    ensure!(said.code() == 2, "{said:?}");
    for part in [
        "ask for a token of the service account weft-system/weft-viewer",
        "cannot create resource \"serviceaccounts/token\"",
        "the Role weft-viewer",
    ] {
        ensure!(said.stderr.contains(part), "no {part:?} in {}", said.stderr);
    }
    // Without even that, it is said from the beginning.
    let binding = bound("viewer", "weft-viewer");
    scene.cluster.remove(&binding)?;
    eventually("a user without rights to be refused", || {
        let said = scene.weft_as("viewer", &["edges"])?;
        let refused = said.stderr.contains("cannot list resource \"pods\"");
        ensure!(said.code() == 2 && refused, "{said:?}");
        Ok(())
    })?;
    scene.cluster.apply(&binding)?;
    eventually("the rights to be back", || {
        scene.weft_as("viewer", &["edges"])?.success().map(drop)
    })
}

/// Whoever can forward ports, and has a token for the audience, of an account that may not look.
fn another_account(scene: &Scene) -> Result<()> {
    let said = scene.weft_as("forwarder", &["edges", "--viewer", "weft-agent"])?;
    ensure!(said.code() == 2, "{said:?}");
    let name = "system:serviceaccount:weft-system:weft-agent may not look into the mesh";
    ensure!(said.stderr.contains(name), "{}", said.stderr);
    // The right is what it lacks, and nothing else.
    let binding = json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding",
        "metadata": {"name": "agents-look"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "weft-viewer"},
        "subjects": [{"kind": "ServiceAccount", "namespace": "weft-system", "name": "weft-agent"}]});
    scene.cluster.apply(&binding)?;
    eventually("the account to be let in", || {
        let said = scene.weft_as("forwarder", &["edges", "--viewer", "weft-agent"])?;
        said.success().map(drop)
    })?;
    scene.cluster.remove(&binding)
}

fn audited(scene: &Scene) -> Result<()> {
    let controller = scene.cluster.controller()?;
    let log = controller.log();
    for part in [
        "somebody looks into the mesh",
        "system:serviceaccount:weft-system:weft-viewer",
        "JTI=",
        "/agents",
        "somebody may not look into the mesh",
    ] {
        ensure!(log.contains(part), "no {part:?} in the log");
    }
    ensure!(!has_token(&log), "a token is in the log");
    let metrics = controller.metrics()?;
    for result in ["accepted", "forbidden"] {
        let name = "weft_controller_inspections_total";
        ensure!(metrics.sum(name, &[("result", result)]) >= 1.0, "{result}");
    }
    Ok(())
}

/// By an account of the namespace that is watched, and of no other; by that of the whole mesh; and not without.
fn watched(scene: &Scene) -> Result<()> {
    let tap = |user: &str, more: &[&str]| {
        let all = [&["tap", "pod/web", "-o", "json", "--for", "3s"], more].concat();
        scene.weft_as(user, &all)
    };
    let refused = tap("forwarder", &[])?;
    ensure!(refused.code() == 2, "{refused:?}");
    ensure!(
        refused.stderr.contains("the Role weft-tap"),
        "{}",
        refused.stderr
    );
    // An account is there that may watch nothing.
    let account = json!({"apiVersion": "v1", "kind": "ServiceAccount",
        "metadata": {"name": "weft-tap", "namespace": "default"}});
    scene.cluster.apply(&account)?;
    scene.cluster.apply(
        &json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role",
        "metadata": {"name": "ask-to-tap", "namespace": "default"},
        "rules": [{"apiGroups": [""], "resources": ["serviceaccounts/token"], "verbs": ["create"],
            "resourceNames": ["weft-tap"]}]}),
    )?;
    let bind = |name: &str, kind: &str, role: &str, subject: Value| {
        json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding",
            "metadata": {"name": name, "namespace": "default"},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": role},
            "subjects": [subject]})
    };
    let user =
        json!({"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "forwarder"});
    scene
        .cluster
        .apply(&bind("ask-to-tap", "Role", "ask-to-tap", user))?;
    eventually("the account to be refused", || {
        let refused = tap("forwarder", &[])?;
        ensure!(refused.code() == 2, "{refused:?}");
        let why = "system:serviceaccount:default:weft-tap may not watch pods/web in the namespace default";
        ensure!(refused.stderr.contains(why), "{}", refused.stderr);
        Ok(())
    })?;
    let account = json!({"kind": "ServiceAccount", "namespace": "default", "name": "weft-tap"});
    let may = bind("weft-tap", "ClusterRole", "weft-tap", account);
    scene.cluster.apply(&may)?;
    let target = scene.web.sockets(PORT)[0];
    eventually("a connection to be shown", || {
        let shown = std::thread::scope(|scope| {
            let tapping = scope.spawn(|| tap("forwarder", &[]));
            while !tapping.is_finished() {
                expect_echo(&scene.order, target, "watched")?;
            }
            let shown = tapping.join();
            shown.map_err(|_| anyhow::anyhow!("the tap panicked"))?
        })?;
        let shown = shown.success()?;
        let order = scene.order.identity();
        let is_of_order = |it: &&str| it.contains("\"begin\"") && it.contains(&*order);
        let line = shown.lines().find(is_of_order);
        let event: Value = serde_json::from_str(line.context("no connection")?)?;
        let begin = &event["begin"];
        ensure!(begin["destination"]["pod"] == "web", "{event}");
        ensure!(begin["direction"] == "inbound", "{event}");
        Ok(())
    })?;
    // Not what is in another namespace, and not all.
    for others in [&["-n", "weft-system"][..], &["--tapper", "weft-agent"]] {
        let refused = tap("forwarder", others)?;
        ensure!(refused.code() == 2, "{refused:?}");
    }
    let all = scene.weft_as("forwarder", &["tap", "-A", "--for", "1s"])?;
    ensure!(all.code() == 2, "{all:?}");
    scene.cluster.apply(&bound("viewer", "weft-tap"))?;
    eventually("the account of the whole mesh to watch", || {
        let all = scene.weft_as("viewer", &["tap", "-A", "--for", "1s"])?;
        ensure!(all.stderr.contains("watching"), "{all:?}");
        all.success().map(drop)
    })?;
    let controller = scene.cluster.controller()?;
    let log = controller.log();
    for part in [
        "somebody begins to watch",
        "somebody has watched",
        "somebody may not watch",
        "system:serviceaccount:default:weft-tap",
        "namespace=default&kind=pod&name=web",
    ] {
        ensure!(log.contains(part), "no {part:?} in the log");
    }
    ensure!(!has_token(&log), "a token is in the log");
    let metrics = controller.metrics()?;
    for result in ["accepted", "forbidden"] {
        let name = "weft_controller_taps_total";
        ensure!(metrics.sum(name, &[("result", result)]) >= 1.0, "{result}");
    }
    Ok(())
}

fn not_there(scene: &Scene) -> Result<()> {
    let elsewhere = ["edges", "--weft-namespace", "default"];
    let said = scene.weft_as("viewer", &elsewhere)?;
    ensure!(
        said.code() == 2 && said.stderr.contains("in the namespace \"default\""),
        "{said:?}"
    );
    scene
        .cluster
        .remove(&controller_pod(CONTROLLER_POD, "Running"))?;
    eventually("the controller's pod to be missed", || {
        let said = scene.weft_as("viewer", &["check"])?;
        let missed = "no controller runs in the namespace weft-system";
        ensure!(said.code() == 1 && said.stdout.contains(missed), "{said:?}");
        Ok(())
    })?;
    scene
        .cluster
        .apply(&controller_pod(CONTROLLER_POD, "Running"))?;
    let controller = scene.cluster.controller()?;
    controller.stop()?;
    let said = scene.weft_as("viewer", &["edges"])?;
    // Whether the kubelet's own words come before the end of the stream is a matter of chance.
    let refused = said
        .stderr
        .contains("serves on port 15016, by WEFT_INSPECT?");
    ensure!(said.code() == 2 && refused, "{said:?}");
    controller.start()
}

/// Tokens of accounts begin with an object in base64, with quotes.
fn has_token(text: &str) -> bool {
    text.contains("eyJ")
}
