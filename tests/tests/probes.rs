//! The kubelet's probes: they reach the application whatever policy says, and nobody else does.

use std::net::SocketAddr;

use anyhow::{Result, ensure};
use serde_json::json;
use weft_tests::apps::{Nginx, curl_with};
use weft_tests::scenario::{REFUSED, eventually};
use weft_tests::testapp::{self, Connected, Server};
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
