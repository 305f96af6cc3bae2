//! The `weft` command as an operator uses it, against a mesh that runs.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use weft_tests::apps::curl_shop;
use weft_tests::cluster::binary;
use weft_tests::command::{Finished, Program};
use weft_tests::manifests::ServiceSpec;
use weft_tests::scenario::eventually;
use weft_tests::webapp::{HttpLoad, HttpServer};
use weft_tests::{Checks, Cluster, Pod, PodSpec};

#[path = "cli/explain.rs"]
mod explain;
#[path = "cli/routes.rs"]
mod routes;
#[path = "cli/tap.rs"]
mod tap;

struct Scene {
    cluster: Cluster,
    order: Pod,
    neighbour: Pod,
    outsider: Pod,
    web: Pod,
    server: HttpServer,
}

const PORT: u16 = 8080;

#[test]
fn cli() {
    let scene = Scene::new().expect("a mesh with pods");
    let mut checks = Checks::new("the command-line tool");
    checks.check("the controller's socket is for root", || {
        private_socket(&scene)
    });
    checks.check("check says that all is well", || all_is_well(&scene));
    checks.check(
        "stat says what is asked of a workload, and how it goes",
        || stat(&scene),
    );
    checks.check("stat remembers, and says what it does not", || {
        history(&scene)
    });
    checks.check(
        "edges have both identities, and say what is not secured",
        || edges(&scene),
    );
    checks.check(
        "stat-outbound is a tree of routes and backends, with retries",
        || routes::outbound(&scene),
    );
    checks.check("stat-inbound is a tree of Servers and their routes", || {
        routes::inbound(&scene)
    });
    checks.check(
        "routes have what goes by them, and what is wrong with them",
        || routes::routes(&scene),
    );
    checks.check("extensions on PATH are run, and listed", || {
        extensions(&scene)
    });
    checks.check("endpoints and diagnostics have what agents say", || {
        endpoints(&scene)
    });
    checks.check(
        "explain says who lets a connection through, and on which way",
        || explain::allowed(&scene),
    );
    checks.check("explain says what is not in the mesh", || {
        explain::outside_of_the_mesh(&scene)
    });
    checks.check("explain says what it does not know", || {
        explain::unknown(&scene)
    });
    checks.check("explain says what policy keeps out, and which", || {
        explain::denied(&scene)
    });
    checks.check(
        "explain says what is opaque, and where weights lead",
        || explain::opaque_ports_and_weights(&scene),
    );
    checks.check(
        "explain says which rule a request is, and why no other",
        || explain::requests(&scene),
    );
    checks.check(
        "explain says what the server's routes make of a request",
        || explain::requests_at_the_server(&scene),
    );
    checks.check(
        "explain says where the name that TLS asks for leads",
        || explain::server_names(&scene),
    );
    checks.check("tap shows exchanges at both ends, and no secrets", || {
        tap::exchanges(&scene)
    });
    checks.check("tap shows calls, connections and an archive", || {
        tap::protocols(&scene)
    });
    checks.check("top adds up what tap shows", || tap::top(&scene));
    checks.check(
        "top listens to keys, and leaves the terminal as it was",
        || tap::keys(&scene),
    );
    checks.check("tap shows pods and agents that come later", || {
        tap::what_comes_later(&scene)
    });
    checks.check("tap shows no more than it may, and ends everywhere", || {
        tap::limits(&scene)
    });
    checks.check("tap waits for a controller that comes back", || {
        tap::without_a_controller(&scene)
    });
    checks.check("policy test says what the mesh does", || {
        policy_test(&scene)
    });
    checks.check(
        "check names what is wrong, and waits until it is not",
        || what_is_wrong(&scene),
    );
    checks.check("without a controller it says so, and where to look", || {
        nobody_there(&scene)
    });
    checks.finish();
}

impl Scene {
    fn new() -> Result<Self> {
        let cluster = Cluster::start()?;
        let order = cluster.add_pod(PodSpec::new("order").on(0))?;
        let neighbour = cluster.add_pod(PodSpec::new("neighbour").on(1))?;
        let outsider = cluster.add_pod(PodSpec::new("outsider").on(0).unmeshed())?;
        let web = cluster.add_pod(PodSpec::new("web").on(1).label("app", "web"))?;
        let server = HttpServer::start(&web, PORT, &[])?;
        Ok(Self {
            cluster,
            order,
            neighbour,
            outsider,
            web,
            server,
        })
    }

    /// Runs the tool against the mesh.
    fn weft(&self, arguments: &[&str]) -> Result<Finished> {
        let socket = self.cluster.controller()?.admin_socket();
        let program = Program::new(binary("weft")?, None, None, self.cluster.dir())?;
        let program = program.args(arguments);
        let program = program.env("WEFT_CONTROLLER_SOCKET", socket.display().to_string());
        program.output(Duration::from_secs(60))
    }

    /// Runs it where a folder comes first on PATH.
    fn weft_beside(&self, folder: &Path, arguments: &[&str]) -> Result<Finished> {
        let path = std::env::var("PATH").unwrap_or_default();
        let socket = self.cluster.controller()?.admin_socket();
        let program = Program::new(binary("weft")?, None, None, self.cluster.dir())?;
        let program = program.args(arguments);
        let program = program.env("WEFT_CONTROLLER_SOCKET", socket.display().to_string());
        let program = program.env("PATH", format!("{}:{path}", folder.display()));
        program.output(Duration::from_secs(60))
    }

    fn json(&self, arguments: &[&str]) -> Result<Value> {
        let text = self
            .weft(&[arguments, &["-o", "json"]].concat())?
            .success()?;
        serde_json::from_str(&text).with_context(|| format!("not JSON: {text}"))
    }
}

fn private_socket(scene: &Scene) -> Result<()> {
    let socket = scene.cluster.controller()?.admin_socket();
    let mode = std::fs::metadata(socket)?.permissions().mode() & 0o777;
    ensure!(mode == 0o600, "mode {mode:o}");
    Ok(())
}

fn all_is_well(scene: &Scene) -> Result<()> {
    let all = scene.json(&["check", "--wait", "30s"])?;
    let checks = all["checks"].as_array().context("checks")?;
    ensure!(checks.len() == 18 && all["ok"] == true, "{all}");
    for check in checks {
        ensure!(check["state"] == "ok", "{check}");
    }
    let table = scene.weft(&["check"])?.success()?;
    for line in [
        "√ 2 nodes have an agent that is connected",
        "√ on every node each kernel program is attached exactly once",
        "all is well",
    ] {
        ensure!(table.contains(line), "no {line:?} in {table}");
    }
    let short = scene.weft(&["check", "-o", "short"])?.success()?;
    ensure!(short == "all is well\n", "{short}");
    // The harness's issuer lives for some years, and not for a century.
    let expiry = scene.weft(&["check", "--fail-on-expiry", "36500d", "-o", "short"])?;
    ensure!(
        expiry.code() == 1 && expiry.stdout.contains("#issuer"),
        "{expiry:?}"
    );
    Ok(())
}

/// The states of checks that are not well.
fn wrong(scene: &Scene, arguments: &[&str]) -> Result<(i32, Vec<(String, Value)>)> {
    let said = scene.weft(&[&["check", "-o", "json"], arguments].concat())?;
    let code = said.code();
    let all: Value = serde_json::from_str(&said.stdout)
        .with_context(|| format!("{}{}", said.stdout, said.stderr))?;
    let checks = all["checks"].as_array().context("checks")?;
    let wrong = checks.iter().filter(|it| it["state"] != "ok");
    let named = wrong.map(|it| {
        (
            it["check"].as_str().unwrap_or_default().to_owned(),
            it.clone(),
        )
    });
    Ok((code, named.collect()))
}

fn what_is_wrong(scene: &Scene) -> Result<()> {
    let manifests = scene.cluster.manifests();
    let finds = |what: &str, check: &str, state: &str, detail: &str| {
        eventually(what, || {
            let (code, wrong) = wrong(scene, &[])?;
            let found = wrong.iter().find(|(name, _)| name == check);
            let (_, found) = found.with_context(|| format!("no {check}: {wrong:?}"))?;
            ensure!(found["state"] == state, "{found}");
            ensure!(found["details"].to_string().contains(detail), "{found}");
            ensure!(code == i32::from(state == "error"), "{code}: {wrong:?}");
            Ok(())
        })
    };
    let idle = "apiVersion: policy.weft.dev/v1alpha1\nkind: AuthorizationPolicy\n\
        metadata: {name: idle, namespace: default}\n\
        spec: {targetRef: {kind: Server, name: nobody}, requiredAuthenticationRefs: []}\n";
    manifests.apply("idle", idle)?;
    finds(
        "the policy of no Server",
        "configuration-problems",
        "warning",
        "idle",
    )?;
    manifests.remove("idle")?;
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "lost", "namespace": "default", "uid": "lost", "labels": {"weft.dev/mesh": "enabled"},
            "annotations": {"weft.dev/netns": "/nowhere"}},
        "spec": {"nodeName": scene.cluster.node(1).name(), "serviceAccountName": "lost", "containers": [{"name": "c"}]},
        "status": {"podIPs": [{"ip": "10.244.1.250"}]},
    });
    manifests.apply_object(&pod)?;
    finds(
        "a pod that is nowhere",
        "pods-enrolled",
        "error",
        "default/lost",
    )?;
    let (code, others) = wrong(scene, &["--node", scene.cluster.node(0).name()])?;
    ensure!(code == 0, "the other node is well: {others:?}");
    // It is put right while somebody waits.
    let removed = std::thread::scope(|scope| {
        let waiting = scope.spawn(|| wrong(scene, &["--wait", "40s"]));
        manifests.remove_object(&pod)?;
        waiting.join().expect("no panic")
    })?;
    ensure!(removed.0 == 0, "{removed:?}");
    let node = scene.cluster.node(0);
    node.kill_agent()?;
    finds(
        "the agent that is gone",
        "agents-connected",
        "error",
        node.name(),
    )?;
    node.start_agent()?;
    let (code, wrong) = wrong(scene, &["--wait", "60s"])?;
    ensure!(code == 0, "{wrong:?}");
    Ok(())
}

fn stat(scene: &Scene) -> Result<()> {
    let row = |arguments: &[&str]| -> Result<Value> {
        let all = scene.json(&[&["stat", "pod", "--window", "2s"], arguments].concat())?;
        ensure!(all["missing"] == json!([]), "{all}");
        let rows = all["rows"].as_array().context("rows")?;
        let row = rows.iter().find(|it| it["name"] == "web");
        row.cloned().with_context(|| format!("no web in {all}"))
    };
    let idle = row(&[])?;
    ensure!(idle["success_rate"].is_null(), "{idle}");
    ensure!(idle["requests_per_second"] == 0.0, "{idle}");
    ensure!(idle["pods_meshed"] == 1 && idle["pods"] == 1, "{idle}");
    let target = scene.web.sockets(PORT)[0];
    let load = HttpLoad::start(&scene.order, target, &["--connections", "2"])?;
    let busy = row(&[])?;
    ensure!(busy["success_rate"] == 1.0, "{busy}");
    ensure!(busy["requests_per_second"].as_f64() > Some(10.0), "{busy}");
    for quantile in ["p50", "p95", "p99"] {
        ensure!(busy["latency_ms"][quantile].as_f64() > Some(0.0), "{busy}");
    }
    ensure!(busy["tcp_connections"].as_f64() >= Some(1.0), "{busy}");
    ensure!(
        busy["tcp_read_bytes_per_second"].as_f64() > Some(100.0),
        "{busy}"
    );
    scene.server.configure(&scene.web, 0, 500)?;
    eventually("what succeeded before to be out of the window", || {
        let failing = row(&[])?;
        ensure!(failing["success_rate"].as_f64() < Some(0.5), "{failing}");
        Ok(())
    })?;
    scene.server.configure(&scene.web, 0, 200)?;
    load.stop()?;
    let outbound = scene.json(&[
        "stat",
        "pod/order",
        "--direction",
        "outbound",
        "--window",
        "1s",
    ])?;
    ensure!(outbound["rows"][0]["name"] == "order", "{outbound}");
    let table = scene.weft(&["stat", "--window", "1s"])?.success()?;
    ensure!(
        table.contains("NAMESPACE") && table.contains("pod/web"),
        "{table}"
    );
    ensure!(
        !table.contains('\u{1b}'),
        "colours where nobody looks: {table:?}"
    );
    Ok(())
}

/// What went by is shown at once and without traffic now; what is longer ago than agents know is said.
fn history(scene: &Scene) -> Result<()> {
    let target = scene.web.sockets(PORT)[0];
    let code = curl_shop(&scene.order, target, "/", &[])?.code();
    ensure!(code == 200, "{code}");
    let begun = Instant::now();
    let all = scene.json(&["stat", "pod/web", "-t", "10m"])?;
    let took = begun.elapsed();
    ensure!(took < Duration::from_secs(5), "it was waited for: {took:?}");
    let row = &all["rows"][0];
    ensure!(row["requests_per_second"].as_f64() > Some(0.0), "{all}");
    ensure!(row["latency_ms"]["p50"].as_f64() > Some(0.0), "{all}");
    // The mesh has not been there for that long.
    let partial = all["partial"].as_array().context("partial")?;
    ensure!(partial.len() == 2, "{all}");
    let covered = all["window_seconds"].as_f64().context("seconds")?;
    ensure!(covered > 0.0 && covered < 600.0, "{all}");

    let node = scene.cluster.node(1);
    node.kill_agent()?;
    node.start_agent()?;
    eventually("an agent that has only just begun", || {
        let all = scene.json(&["stat", "pod/web", "--window", "10m"])?;
        let partial = all["partial"].as_array().context("partial")?;
        let young = partial.iter().find(|it| it["node"] == node.name());
        let young = young.and_then(|it| it["covered_seconds"].as_f64());
        ensure!(young.is_some_and(|it| it < covered), "{all}");
        Ok(())
    })?;
    let told = scene.weft(&["stat", "--window", "10m"])?;
    let note = format!("{} knows the last ", node.name());
    ensure!(told.stderr.contains(&note), "{told:?}");

    let longer = scene.weft(&["stat", "--window", "11m"])?;
    let is_told = longer.stderr.contains("--prometheus-url");
    ensure!(longer.code() == 2 && is_told, "{longer:?}");
    Ok(())
}

fn edges(scene: &Scene) -> Result<()> {
    let target = scene.web.sockets(PORT)[0];
    for client in [&scene.order, &scene.neighbour, &scene.outsider] {
        let code = curl_shop(client, target, "/", &[])?.code();
        ensure!(code == 200, "{}: {code}", client.name());
    }
    let expected = [
        ("order", "mutual_tls", json!(scene.order.identity())),
        ("neighbour", "same_node", json!(scene.neighbour.identity())),
        ("", "no", Value::Null),
    ];
    eventually("an edge for each client", || {
        let all = scene.json(&["edges", "pod/web"])?;
        let edges = all["edges"].as_array().context("edges")?;
        for (client, secured, identity) in &expected {
            let is_it = |it: &&Value| match client.is_empty() {
                true => it["client"].is_null(),
                false => it["client"]["name"] == *client,
            };
            let edge = edges.iter().find(is_it);
            let edge = edge.with_context(|| format!("no edge of {client:?}: {all}"))?;
            ensure!(edge["secured"] == *secured, "{edge}");
            ensure!(edge["client_identity"] == *identity, "{edge}");
            ensure!(
                edge["server_identity"] == scene.web.identity().as_str(),
                "{edge}"
            );
            ensure!(edge["server"]["name"] == "web", "{edge}");
        }
        Ok(())
    })?;
    let identities = scene.json(&["identity", "pod/web"])?;
    let row = &identities["rows"][0];
    ensure!(
        row["identity"] == scene.web.identity().as_str(),
        "{identities}"
    );
    ensure!(row["not_after_ms"].as_f64() > Some(0.0), "{identities}");
    ensure!(row["node"] == scene.cluster.node(1).name(), "{identities}");
    let table = scene.weft(&["edges"])?.success()?;
    for part in ["default/pod/order", "mTLS", "same node", "(outside)"] {
        ensure!(table.contains(part), "no {part} in {table}");
    }
    Ok(())
}

fn endpoints(scene: &Scene) -> Result<()> {
    let service = ServiceSpec::new("shop").select("app", "web").port(80, PORT);
    scene.cluster.add_service(&service)?;
    eventually("the Service with its pod, on both nodes", || {
        let all = scene.json(&["endpoints", "svc/shop"])?;
        let rows = all["rows"].as_array().context("rows")?;
        ensure!(rows.len() == 2 && all["missing"] == json!([]), "{all}");
        for row in rows {
            let endpoints = row["endpoints"].as_array().context("endpoints")?;
            let own = endpoints
                .iter()
                .any(|it| it["address"] == scene.web.v4().to_string());
            ensure!(own && row["port"] == 80, "{row}");
        }
        Ok(())
    })?;
    let table = scene.weft(&["endpoints", "shop"])?.success()?;
    ensure!(
        table.contains("shop:80") && table.contains("ready"),
        "{table}"
    );
    let dir = scene.cluster.dir().join("diagnostics");
    let shown = dir.display().to_string();
    scene.weft(&["diagnostics", "--dir", &shown])?.success()?;
    let mode = std::fs::metadata(&dir)?.permissions().mode() & 0o777;
    ensure!(mode == 0o700, "mode {mode:o}");
    let mut dumps = 0;
    for entry in std::fs::read_dir(&dir)? {
        let folder = entry?.path();
        for file in std::fs::read_dir(&folder)? {
            let file = file?.path();
            let text = std::fs::read_to_string(&file)?;
            ensure!(!text.is_empty(), "{} is empty", file.display());
            ensure!(
                !text.contains("PRIVATE KEY"),
                "{} has a key",
                file.display()
            );
            dumps += usize::from(file.ends_with("config_dump.json"));
        }
    }
    ensure!(dumps == 2, "{dumps} dumps of agents");
    let again = scene.weft(&["diagnostics", "--dir", &shown])?;
    ensure!(again.code() == 2, "an old folder was written to");
    Ok(())
}

fn extensions(scene: &Scene) -> Result<()> {
    let folder = scene.cluster.dir().join("extensions");
    std::fs::create_dir_all(&folder)?;
    let program = folder.join("weft-greet");
    std::fs::write(&program, "#!/bin/sh\necho \"hello $*\"\nexit 7\n")?;
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755))?;
    let said = scene.weft_beside(&folder, &["greet", "you", "--all"])?;
    ensure!(
        said.stdout == "hello you --all\n" && said.code() == 7,
        "{said:?}"
    );
    let check = scene.weft_beside(&folder, &["check"])?.success()?;
    ensure!(check.contains("√ extensions are on PATH: greet"), "{check}");
    let none = scene.weft(&["greet"])?;
    let is_told = none.stderr.contains("no program weft-greet on PATH");
    ensure!(none.code() == 2 && is_told, "{none:?}");
    // Of one namespace, and of agents only.
    let proxy = scene.json(&["check", "--proxy", "-n", "default"])?;
    let checks = proxy["checks"].as_array().context("checks")?;
    let of_agents = checks
        .iter()
        .all(|it| it["category"] == "agents" && it["state"] == "ok");
    ensure!(checks.len() == 9 && of_agents, "{proxy}");
    Ok(())
}

const POLICY: &str = "
apiVersion: policy.weft.dev/v1alpha1
kind: Server
metadata: {name: web, namespace: default}
spec:
  podSelector: {matchLabels: {app: web}}
  port: 8080
  proxyProtocol: HTTP/1
---
apiVersion: policy.weft.dev/v1alpha1
kind: AuthorizationPolicy
metadata: {name: web, namespace: default}
spec:
  targetRef: {kind: Server, name: web}
  requiredAuthenticationRefs:
  - {kind: ServiceAccount, name: SERVICE-ACCOUNT, namespace: default}
";

fn policy_test(scene: &Scene) -> Result<()> {
    let manifests = scene.cluster.manifests();
    let policy = POLICY.replace("SERVICE-ACCOUNT", scene.order.service_account());
    manifests.apply("policy-of-web", &policy)?;
    let target = scene.web.sockets(PORT)[0];
    eventually("the policy to be in force", || {
        let code = curl_shop(&scene.neighbour, target, "/", &[])?.code();
        ensure!(code == 403, "{code}");
        Ok(())
    })?;
    let folder = manifests.dir().display().to_string();
    for client in [&scene.order, &scene.neighbour, &scene.outsider] {
        let really = curl_shop(client, target, "/", &[])?.code() == 200;
        let from = format!("pod/{}", client.name());
        let question = [
            "policy", "test", "-f", &folder, "--from", &from, "--to", "pod/web",
        ];
        let request = ["--port", "8080", "--method", "GET"];
        let said = scene.weft(&[&question[..], &request].concat())?;
        ensure!(
            said.code() == i32::from(!really),
            "{from} gets through: {really}, and the tool says {} ({}{})",
            said.code(),
            said.stdout,
            said.stderr
        );
    }
    eventually("what policy said to be counted", || {
        let all = scene.json(&["authz", "pod/web", "--window", "1s"])?;
        let rows = all["rows"].as_array().context("rows")?;
        let count = |by: &str, allowed: bool| {
            let meant = rows
                .iter()
                .filter(|it| it["server"] == "web" && it["by"] == by && it["allowed"] == allowed);
            meant.filter_map(|it| it["total"].as_f64()).sum::<f64>()
        };
        ensure!(count("web", true) >= 1.0, "{all}");
        ensure!(count("default:deny", false) >= 2.0, "{all}");
        Ok(())
    })?;
    manifests.remove("policy-of-web")
}

fn nobody_there(scene: &Scene) -> Result<()> {
    let socket = scene.cluster.dir().join("nothing.sock");
    let socket = socket.display().to_string();
    let said = scene.weft(&["edges", "--controller-socket", &socket])?;
    ensure!(said.code() == 2, "{}", said.code());
    ensure!(said.stderr.contains("--admin-socket"), "{}", said.stderr);
    Ok(())
}
