//! The kubelet's probes: they reach the application whatever policy says, and nobody else does.

use std::net::SocketAddr;

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use weft_tests::apps::{Nginx, Shown, curl_shop, curl_with};
use weft_tests::manifests::server;
use weft_tests::scenario::{REFUSED, eventually};
use weft_tests::testapp::{self, Connected, Server};
use weft_tests::webapp::HttpServer;
use weft_tests::{Checks, Cluster, Pod, PodSpec};

#[test]
fn probes() {
    let cluster = Cluster::start().expect("a cluster");
    let spec = PodSpec::new("guarded")
        .annotation("config.linkerd.io/default-inbound-policy", "deny")
        .port("health", 8081)
        .probe(
            "livenessProbe",
            json!({"httpGet": {"path": "/", "port": 8080}}),
        )
        .probe("readinessProbe", json!({"tcpSocket": {"port": "health"}}));
    let pod = cluster.add_pod(spec).expect("a pod");
    let mut checks = Checks::new("probes");
    checks.check(
        "HTTP probes pass, other processes of the host do not",
        || http(&cluster, &pod),
    );
    checks.check("TCP probes pass, by the port's name", || {
        tcp(&cluster, &pod)
    });
    checks.check("a dead application fails its TCP probe", || {
        dead(&cluster, &pod)
    });
    checks.check("ports without a probe are closed to the kubelet", || {
        no_probe(&cluster, &pod)
    });
    checks.check("the kubelet of another node is nobody", || {
        other_node(&cluster, &pod)
    });
    checks.check("after the agent was killed and came back", || {
        after_restart(&cluster, &pod)
    });
    checks.finish();
}

/// A port with all that policy knows: routes, of which one is open to one account, a limit, and a NetworkPolicy. The
/// kubelet's probe is asked by none of it, and the same request of anybody else by all.
#[test]
fn probes_under_routes() {
    let cluster = Cluster::start().expect("a cluster");
    let add = |spec: PodSpec| cluster.add_pod(spec).expect("a pod");
    let spec = PodSpec::new("api").annotation("weft.dev/default-inbound-policy", "deny");
    let api = add(spec.probe(
        "readinessProbe",
        json!({"httpGet": {"port": GUARDED, "path": "/health"}}),
    ));
    let others = [
        add(PodSpec::new("near")),
        add(PodSpec::new("far").on(1)),
        add(PodSpec::new("plain").unmeshed()),
    ];
    let app = HttpServer::start(&api, GUARDED, &[]).expect("a server");
    let mut checks = Checks::new("probes under routes");
    let mut check =
        |name: &str, objects: &[Value], (path, begins): (&str, fn(&Shown) -> bool), codes| {
            checks.check(name, || {
                for object in objects {
                    cluster.apply(object)?;
                }
                eventually("the policy to be in effect", || {
                    let shown = curl_shop(&others[1], api.sockets(GUARDED)[0], path, &[])?;
                    ensure!(begins(&shown), "{shown:?}");
                    Ok(())
                })?;
                only_the_kubelet(&cluster, (&api, &app), &others, codes)
            });
        };
    check(
        "by default",
        &[],
        ("/health", |it| it.header("weft-error") == Some("denied")),
        &[403],
    );
    check(
        "its route, one that is open to somebody, and a limit",
        &[
            route("public", "/public"),
            route("health", "/health"),
            open_to("public", "far"),
            open_to("health", "nobody"),
            limit(),
            guard(),
        ],
        ("/public", |it| [200, 429].contains(&it.code())),
        &[403],
    );
    check(
        "no route for it",
        &[route("health", "/other")],
        ("/health", |it| it.code() == 404),
        &[404, 403],
    );
    check(
        "a NetworkPolicy",
        &[let_nobody_in()],
        ("/health", |it| {
            it.header("weft-error") == Some("network_policy")
        }),
        &[403],
    );
    checks.finish();
}

/// The kubelet of its node is answered by the application, as often as it likes; whoever else asks for the same is
/// answered with one of these codes, and the application hears nothing of it.
fn only_the_kubelet(
    cluster: &Cluster,
    (api, app): (&Pod, &HttpServer),
    others: &[Pod],
    codes: &[u16],
) -> Result<()> {
    let seen = || -> Result<usize> { Ok(app.requests()?.len()) };
    for target in api.sockets(GUARDED) {
        for _ in 0..4 {
            let before = seen()?;
            let kubelet = cluster.node(0).kubelet_command("curl")?;
            let reply = curl_with(kubelet, target, "health")?;
            ensure!(reply.status == 200, "the kubelet got {reply:?}");
            ensure!(seen()? == before + 1, "it was not the application's");
        }
        let before = seen()?;
        for (who, program) in [
            (
                "another process of the host",
                cluster.node(0).host_command("curl")?,
            ),
            (
                "the other node's kubelet",
                cluster.node(1).kubelet_command("curl")?,
            ),
            (
                "a process of the other node",
                cluster.node(1).host_command("curl")?,
            ),
        ] {
            let reply = curl_with(program, target, "health")?;
            ensure!(codes.contains(&reply.status), "{who} got {reply:?}");
        }
        for pod in others {
            let shown = curl_shop(pod, target, "/health", &[])?;
            ensure!(
                codes.contains(&shown.code()),
                "{} got {shown:?}",
                pod.name()
            );
        }
        ensure!(seen()? == before, "somebody else reached the application");
    }
    Ok(())
}

fn guard() -> Value {
    let mut guard = server("default", "api", "api", GUARDED);
    guard["spec"]["proxyProtocol"] = json!("unknown");
    guard
}

fn route(name: &str, path: &str) -> Value {
    json!({"apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"parentRefs": [{"group": "policy.weft.dev", "kind": "Server", "name": "api"}],
            "rules": [{"matches": [{"path": {"value": path}}]}]}})
}

/// An AuthorizationPolicy of the route's name, for a service account.
fn open_to(route: &str, account: &str) -> Value {
    json!({"apiVersion": "policy.weft.dev/v1alpha1", "kind": "AuthorizationPolicy",
        "metadata": {"name": route, "namespace": "default"},
        "spec": {"targetRef": {"group": "gateway.networking.k8s.io", "kind": "HTTPRoute", "name": route},
            "requiredAuthenticationRefs": [{"kind": "ServiceAccount", "name": account}]}})
}

fn limit() -> Value {
    json!({"apiVersion": "policy.weft.dev/v1alpha1", "kind": "HTTPLocalRateLimitPolicy",
        "metadata": {"name": "slowly", "namespace": "default"},
        "spec": {"targetRef": {"kind": "Server", "name": "api"}, "total": {"requestsPerSecond": 1}}})
}

fn let_nobody_in() -> Value {
    json!({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": "nobody", "namespace": "default"},
        "spec": {"podSelector": {}, "policyTypes": ["Ingress"]}})
}

const GUARDED: u16 = 8083;

fn http(cluster: &Cluster, pod: &Pod) -> Result<()> {
    let nginx = Nginx::start(pod, 8080)?;
    let node = cluster.node(0);
    for (family, target) in pod.sockets(8080).into_iter().enumerate() {
        eventually("the probe to pass", || {
            let reply = curl_with(
                node.kubelet_command("curl")?,
                target,
                &format!("probe-{family}"),
            )?;
            ensure!(reply.status == 404, "the kubelet got {reply:?}");
            Ok(())
        })?;
        let line = nginx.wait_for_request(&format!("probe-{family}"))?;
        ensure!(line.server == target, "{line:?}");
        let reply = curl_with(node.host_command("curl")?, target, "intruder")?;
        ensure!(
            reply.status == 403,
            "another process of the host got {reply:?}"
        );
    }
    let log = nginx.access_log()?;
    ensure!(log.iter().all(|line| line.path != "/intruder"), "{log:?}");
    nginx.stop()
}

fn tcp(cluster: &Cluster, pod: &Pod) -> Result<()> {
    let _server = Server::start(pod, 8081, "echo", &[])?;
    for target in pod.sockets(8081) {
        let got = probe(cluster, target)?;
        ensure!(got.outcome == "ok" && got.text == "probe", "{got:?}");
    }
    Ok(())
}

fn dead(cluster: &Cluster, pod: &Pod) -> Result<()> {
    for port in [8080, 8081] {
        for target in pod.sockets(port) {
            let got = probe(cluster, target)?.expect(&["refused"])?;
            ensure!(
                got.stage == "connect",
                "the probe of a dead application connected: {got:?}"
            );
        }
    }
    Ok(())
}

fn no_probe(cluster: &Cluster, pod: &Pod) -> Result<()> {
    let server = Server::start(pod, 8082, "echo", &[])?;
    for target in pod.sockets(8082) {
        probe(cluster, target)?.expect(&REFUSED)?;
    }
    ensure!(server.accepted()?.is_empty());
    Ok(())
}

fn other_node(cluster: &Cluster, pod: &Pod) -> Result<()> {
    let server = Server::start(pod, 8081, "echo", &[])?;
    let program = cluster
        .node(1)
        .kubelet_command(&testapp::path()?.display().to_string())?;
    testapp::connect_with(
        program,
        pod.sockets(8081)[0],
        &["--send", "probe", "--half-close"],
    )?
    .expect(&REFUSED)?;
    ensure!(server.accepted()?.is_empty());
    Ok(())
}

fn after_restart(cluster: &Cluster, pod: &Pod) -> Result<()> {
    let _server = Server::start(pod, 8081, "echo", &[])?;
    cluster.node(0).kill_agent()?;
    // Its programs stay: a probe passes while there is no agent, so that nothing is restarted.
    let got = probe(cluster, pod.sockets(8081)[0])?;
    ensure!(got.outcome == "ok", "without an agent: {got:?}");
    cluster.node(0).start_agent()?;
    let got = probe(cluster, pod.sockets(8081)[1])?;
    ensure!(got.outcome == "ok", "with the next agent: {got:?}");
    Ok(())
}

/// A connection as the kubelet of node 0 makes it.
fn probe(cluster: &Cluster, target: SocketAddr) -> Result<Connected> {
    let program = cluster
        .node(0)
        .kubelet_command(&testapp::path()?.display().to_string())?;
    testapp::connect_with(
        program,
        target,
        &["--send", "probe", "--half-close", "--timeout-ms", "4000"],
    )
}
