//! Two controllers: agents are served by either, and go to the other when theirs is gone.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use weft_tests::checks::figure;
use weft_tests::cluster::{Node, Replica};
use weft_tests::scenario::{eventually, expect_echo, expect_refusal};
use weft_tests::testapp::{Pulse, Server};
use weft_tests::{Checks, Cluster, ClusterOptions, Pod, PodSpec, wait_for};

/// A cluster whose agents know both controllers, of which the other is yet to be started.
fn cluster() -> Cluster {
    let other = format!("https://{}", Replica::address());
    let options = ClusterOptions {
        agent_args: vec!["--controller".into(), other],
        ..ClusterOptions::default()
    };
    Cluster::with(options).expect("a cluster")
}

/// A client on one node, a server on the other.
struct Pods {
    client: Pod,
    server: Pod,
}

impl Pods {
    fn target(&self) -> SocketAddr {
        self.server.sockets(7000)[0]
    }
}

#[test]
fn failover() {
    let cluster = cluster();
    let began = Instant::now();
    let add = |spec: PodSpec| cluster.add_pod(spec).expect("a pod");
    let pods = Pods {
        client: add(PodSpec::new("client").on(0)),
        server: add(PodSpec::new("server").on(1)),
    };
    let _echo = Server::start(&pods.server, 7000, "echo", &[]).expect("an echo server");
    let other = cluster.controller().expect("a mesh").another();
    let mut checks = Checks::new("failover");
    checks.check("agents go to the other controller at once", || {
        killed(&cluster, &other, &pods, began)
    });
    checks.check("the other controller tells and signs", || {
        serves(&cluster, &pods)
    });
    checks.check("and back, with what changed meanwhile", || {
        back(&cluster, &other, &pods)
    });
    checks.finish();
}

/// SIGKILL: nobody says goodbye.
fn killed(cluster: &Cluster, other: &Replica<'_>, pods: &Pods, began: Instant) -> Result<()> {
    other.start()?;
    expect_echo(&pods.client, pods.target(), "before")?;
    // A stream that broke sooner would count as a try that failed.
    std::thread::sleep(STEADY.saturating_sub(began.elapsed()));
    let mut pulse = Pulse::start(&pods.client, pods.target())?;
    let killed = Instant::now();
    cluster.controller()?.kill()?;
    expect_echo(&pods.client, pods.target(), "meanwhile")?;
    for node in cluster.nodes() {
        let stream = wait_stream(node, Replica::address())?;
        let took = killed.elapsed().as_millis();
        figure(
            &format!("{} had the other controller after ms", node.name()),
            took,
        );
        ensure!(stream["retry_delay_seconds"] == 0.0, "it waited: {stream}");
        ensure!(stream["connects"] == 2, "not at once: {stream}");
    }
    expect_echo(&pods.client, pods.target(), "after")?;
    ensure!(pulse.is_beating(), "a connection broke");
    ensure!(pulse.stop()?.outcome == "ok", "a connection broke");
    Ok(())
}

/// A pod with a service account of its own needs a certificate, and is to be known everywhere.
fn serves(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let late = cluster.add_pod(PodSpec::new("late").on(0))?;
    eventually("a new pod to be served", || {
        expect_echo(&late, pods.target(), "from-a-new-pod").map(drop)
    })?;
    cluster.remove_pod(late)
}

/// What is gone by the one must not come back by the other, and what is closed must not open.
fn back(cluster: &Cluster, other: &Replica<'_>, pods: &Pods) -> Result<()> {
    let closed = weft_tests::manifests::server("default", "closed", "server", 7000);
    cluster.apply(&closed)?;
    eventually("the Server to close", || {
        expect_refusal(&pods.client, pods.target(), "closed").map(drop)
    })?;
    let first = cluster.controller()?;
    first.start()?;
    other.kill()?;
    for node in cluster.nodes() {
        wait_stream(node, first.address())?;
        let dump = node.config_dump()?;
        let workloads = dump["workloads"].to_string();
        ensure!(!workloads.contains("late"), "it came back: {workloads}");
        expect_refusal(&pods.client, pods.target(), "still-closed")?;
    }
    cluster.remove(&closed)?;
    eventually("it to be open again", || {
        expect_echo(&pods.client, pods.target(), "open-again").map(drop)
    })
}

/// Waits until an agent has everything from this controller; gives how its stream is.
fn wait_stream(node: &Node, controller: SocketAddr) -> Result<Value> {
    let what = format!("{} to have its stream from {controller}", node.name());
    wait_for(&what, Duration::from_secs(20), || {
        let dump = node.config_dump()?;
        let stream = dump.get("control_stream").context("no control_stream")?;
        let at = stream["controller"] == controller.to_string();
        ensure!(at && stream["current"] == true, "{stream}");
        Ok(Some(stream.clone()))
    })
}

/// How long a stream has to last not to be one of a row of failures, and a bit more.
const STEADY: Duration = Duration::from_secs(6);
