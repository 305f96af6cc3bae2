//! Whatever fails in the agent, a meshed pod is refused and never left open: no plaintext out, no
//! unauthorised client in.

use std::time::Duration;

use anyhow::{Result, ensure};
use weft_tests::scenario::{Watch, expect_echo, expect_refusal};
use weft_tests::testapp::{self, Server};
use weft_tests::{Cluster, PodSpec, wait_for};

/// The agent has no descriptor left: its pods stay in the mesh. They did not once: a namespace that
/// could not be opened was taken for one that is gone.
#[test]
fn without_descriptors() -> Result<()> {
    let cluster = Cluster::start()?;
    let client = cluster.add_pod(PodSpec::new("client").on(0))?;
    let deny = "config.linkerd.io/default-inbound-policy";
    let server = cluster.add_pod(PodSpec::new("server").on(1))?;
    let closed = cluster.add_pod(PodSpec::new("closed").on(1).annotation(deny, "deny"))?;
    let stranger = cluster.add_pod(PodSpec::new("stranger").on(0).unmeshed())?;
    let _echo = Server::start(&client, 7000, "echo", &[])?;
    let guarded = Server::start(&closed, 7000, "echo", &[])?;
    let target = client.sockets(7000)[0];
    expect_echo(&server, target, "before")?;
    expect_refusal(&stranger, closed.sockets(7000)[0], "before")?;

    let watch = Watch::start(&cluster, &[&client, &server])?;
    take_descriptors(&cluster, 1)?;
    // Longer than the agent's check of its pods' namespaces takes to come round twice.
    let start = std::time::Instant::now();
    while start.elapsed() < Duration::from_millis(2500) {
        let say = |text| ["--send", text, "--half-close", "--timeout-ms", "500"];
        testapp::connect(&server, target, &say("top-secret"))?;
        testapp::connect(&stranger, closed.sockets(7000)[0], &say("let me in"))?;
    }
    watch.finish(&["top-secret"])?;
    ensure!(guarded.accepted()?.is_empty(), "a stranger got in");
    ensure!(
        !cluster.node(1).agent_log().contains("pod leaves the mesh"),
        "a pod was let go"
    );
    Ok(())
}

/// The successor of a killed agent cannot enroll a pod that is wanted: the pod stays closed. It did
/// not once: it was taken for a pod that nobody wants.
#[test]
fn after_a_takeover_that_fails() -> Result<()> {
    let cluster = Cluster::start()?;
    let stranger = cluster.add_pod(PodSpec::new("stranger").on(0).unmeshed())?;
    let deny = "config.linkerd.io/default-inbound-policy";
    let server = cluster.add_pod(PodSpec::new("server").on(1).annotation(deny, "deny"))?;
    let app = Server::start(&server, 7000, "echo", &[])?;
    let target = server.sockets(7000)[0];
    expect_refusal(&stranger, target, "before")?;
    cluster.node(1).kill_agent()?;
    // A file that is there and is no namespace, as when opening fails for a moment.
    let broken = cluster.dir().join("no-namespace");
    std::fs::write(&broken, "")?;
    let mut manifest = server.manifest();
    manifest["metadata"]["annotations"]["weft.dev/netns"] = broken.display().to_string().into();
    cluster.apply(&manifest)?;
    cluster.node(1).spawn_agent()?;
    wait_for(
        "the agent to say that a pod waits",
        Duration::from_secs(15),
        || {
            let (status, body) = cluster.node(1).ready()?;
            ensure!(status == 503, "ready: {body}");
            Ok(body.contains("default/server").then_some(()))
        },
    )?;
    for _ in 0..5 {
        expect_refusal(&stranger, target, "while it waits")?;
    }
    ensure!(app.accepted()?.is_empty(), "a stranger got in");
    cluster.apply(&server.manifest())?;
    cluster.node(1).wait_ready()?;
    expect_refusal(&stranger, target, "enrolled again")?;
    Ok(())
}

/// Leaves the agent of a node no more descriptors than it has open.
fn take_descriptors(cluster: &Cluster, node: usize) -> Result<()> {
    let pid = cluster.node(node).agent_pid().unwrap_or_default();
    let done = std::process::Command::new("prlimit")
        .args(["--pid", &pid.to_string(), "--nofile=8:"])
        .status()?;
    ensure!(done.success(), "prlimit: {done}");
    Ok(())
}
