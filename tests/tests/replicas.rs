//! Two controllers: agents are served by either, and go to the other when theirs is gone; one of them leads, and writes
//! statuses.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use weft_tests::checks::figure;
use weft_tests::cluster::{Node, Replica};
use weft_tests::manifests::ServiceSpec;
use weft_tests::scenario::{eventually, expect_echo, expect_refusal};
use weft_tests::testapp::{Pulse, Server};
use weft_tests::{Checks, Cluster, ClusterOptions, Pod, PodSpec, wait_for};

/// A cluster whose agents know both controllers, of which the other is yet to be started.
fn cluster(kubernetes: bool) -> Cluster {
    let other = format!("https://{}", Replica::address());
    let options = ClusterOptions {
        kubernetes,
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
    let cluster = cluster(false);
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

#[test]
fn replicas() {
    let cluster = cluster(true);
    let add = |spec: PodSpec| cluster.add_pod(spec).expect("a pod");
    let pods = Pods {
        client: add(PodSpec::new("client").on(0)),
        server: add(PodSpec::new("server").on(1)),
    };
    let service = ServiceSpec::new("web")
        .select("app", "server")
        .port(80, 7000);
    cluster.add_service(&service).expect("a service");
    let _echo = Server::start(&pods.server, 7000, "echo", &[]).expect("an echo server");
    let other = cluster.controller().expect("a mesh").another();
    let mut checks = Checks::new("replicas");
    checks.check(
        "the first one leads, and says what it makes of a route",
        || leads(&cluster, &other),
    );
    checks.check("when it is killed, the other one signs and leads", || {
        succeeded(&cluster, &other, &pods)
    });
    checks.check("all of it comes back in every order", || {
        every_order(&cluster, &other, &pods)
    });
    checks.finish();
}

fn leads(cluster: &Cluster, other: &Replica<'_>) -> Result<()> {
    other.start()?;
    cluster.apply(&route("web"))?;
    wait_accepted(cluster, "True", 1)?;
    let first = cluster.controller()?.metrics()?;
    ensure!(first.sum(LEADER, &[]) == 1.0, "the first one does not lead");
    ensure!(
        other.metrics()?.sum(LEADER, &[]) == 0.0,
        "the other one leads, too"
    );
    Ok(())
}

fn succeeded(cluster: &Cluster, other: &Replica<'_>, pods: &Pods) -> Result<()> {
    let first = cluster.controller()?;
    ensure!(
        first.metrics()?.sum(SIGNED.0, SIGNED.1) >= 2.0,
        "not signed"
    );
    first.kill()?;
    for node in cluster.nodes() {
        wait_stream(node, Replica::address())?;
    }
    let late = cluster.add_pod(PodSpec::new("late").on(0))?;
    expect_echo(&late, pods.target(), "from-a-new-pod")?;
    ensure!(
        other.metrics()?.sum(SIGNED.0, SIGNED.1) >= 1.0,
        "not signed"
    );
    cluster.remove_pod(late)?;
    // Nobody let the Lease go.
    cluster.apply(&route("nobody"))?;
    wait_accepted(cluster, "False", 2)?;
    ensure!(
        other.metrics()?.sum(LEADER, &[]) == 1.0,
        "the other one does not lead"
    );
    first.start()
}

/// API server, first and other controller, agents: all killed, and started in these orders.
fn every_order(cluster: &Cluster, other: &Replica<'_>, pods: &Pods) -> Result<()> {
    let first = cluster.controller()?;
    for order in ["a12n", "n21a", "2na1"] {
        for node in cluster.nodes() {
            node.kill_agent()?;
        }
        other.kill()?;
        first.kill()?;
        first.kill_api_server()?;
        expect_refusal(&pods.client, pods.target(), "without-agents")?;
        for part in order.chars() {
            match part {
                'a' => first.start_api_server()?,
                '1' => first.spawn()?,
                '2' => other.spawn()?,
                _ => cluster.nodes().iter().try_for_each(Node::spawn_agent)?,
            }
        }
        first.wait_ready()?;
        other.wait_ready()?;
        cluster.nodes().iter().try_for_each(Node::wait_ready)?;
        eventually(&format!("traffic after {order}"), || {
            expect_echo(&pods.client, pods.target(), "again").map(drop)
        })?;
    }
    cluster.apply(&route("web"))?;
    wait_accepted(cluster, "True", 1)?;
    let leaders = first.metrics()?.sum(LEADER, &[]) + other.metrics()?.sum(LEADER, &[]);
    ensure!(leaders == 1.0, "{leaders} lead");
    Ok(())
}

/// A route of one Service, there or not.
fn route(service: &str) -> Value {
    json!({"apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute",
        "metadata": {"name": "web", "namespace": "default"},
        "spec": {"parentRefs": [{"group": "", "kind": "Service", "name": service}]}})
}

/// Waits until it is said on the route whether it is accepted, of its newest version. The Lease of one who was killed is
/// waited for.
fn wait_accepted(cluster: &Cluster, accepted: &str, least: i64) -> Result<()> {
    let path = "/apis/gateway.networking.k8s.io/v1/namespaces/default/httproutes/web";
    wait_for("the route's status", Duration::from_secs(90), || {
        let route = cluster.controller()?.ask_api_server(path)?;
        let generation = &route["metadata"]["generation"];
        let parent = &route["status"]["parents"][0];
        let condition = &parent["conditions"][0];
        ensure!(
            parent["controllerName"] == "weft.dev/controller"
                && condition["type"] == "Accepted"
                && condition["status"] == accepted
                && condition["observedGeneration"] == *generation
                && generation.as_i64() >= Some(least),
            "{route}"
        );
        Ok(Some(()))
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
const LEADER: &str = "weft_controller_leader";
const SIGNED: (&str, &[(&str, &str)]) = ("weft_controller_signs_total", &[("result", "signed")]);
