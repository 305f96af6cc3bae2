//! A panic in the agent ends the connection that it happens in, and nothing else. The shipped agent does not panic
//! on demand, so it is replaced by the one that upgrades are tested with, which does: see `weft_agent::faults`.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, ensure};
use weft_tests::cluster::{Node, binary};
use weft_tests::scenario::{eventually, expect_echo};
use weft_tests::testapp::{self, Pulse, Server};
use weft_tests::webapp::{HttpLoad, HttpServer};
use weft_tests::{Checks, Cluster, ClusterOptions, Pod, PodSpec};

#[test]
fn panics() {
    let cluster = Cluster::with(ClusterOptions {
        alternate_layouts: true,
        ..ClusterOptions::default()
    })
    .expect("a cluster");
    let add = |spec| cluster.add_pod(spec).expect("a pod");
    let client = add(PodSpec::new("client").on(0));
    let near = add(PodSpec::new("near").on(0));
    let far = add(PodSpec::new("far").on(1));
    let serve = |pod| Server::start(pod, PORT, "echo", &["--quiet"]).expect("a server");
    let _echo = [serve(&near), serve(&far)];
    let serve = |pod| HttpServer::start(pod, HTTP, &["--quiet"]).expect("a server");
    let _http = [serve(&near), serve(&far)];
    let mut checks = Checks::new("panics");
    checks.check("the shipped agent knows nothing of it", || {
        shipped(&cluster, &client, [&near, &far])
    });
    checks.check("the agent that does takes over", || {
        for node in cluster.nodes() {
            node.take_over(false)?;
            node.wait_left()?;
        }
        Ok(())
    });
    for (server, what) in [(&near, "on one node"), (&far, "across nodes")] {
        checks.check(&format!("a flow, {what}"), || {
            flow(&cluster, &client, server)
        });
        for (version, name) in [("--http1.1", "1"), ("--http2-prior-knowledge", "2")] {
            checks.check(&format!("a request of HTTP/{name}, {what}"), || {
                request(&cluster, &client, server, version)
            });
        }
    }
    checks.finish();
}

/// What is asked for a panic passes as anything else does, and is not in the program.
fn shipped(cluster: &Cluster, client: &Pod, servers: [&Pod; 2]) -> Result<()> {
    for server in servers {
        expect_echo(client, at(server, PORT), TEXT)?;
        for version in ["--http1.1", "--http2-prior-knowledge"] {
            let (code, status) = curl(client, at(server, HTTP), version)?;
            ensure!(code == 0 && status == "200", "curl: {code}, {status}");
        }
    }
    for node in cluster.nodes() {
        ensure!(panicked(node)? == 0.0, "{} has panicked", node.name());
    }
    for (name, has) in [("weft-agent", false), ("weft-agent-next-layout", true)] {
        let program = std::fs::read(binary(name)?)?;
        let mut windows = program.windows(TEXT.len());
        let found = windows.any(|it| it == TEXT.as_bytes());
        ensure!(found == has, "{name} has the faults: {found}");
    }
    Ok(())
}

/// A flow that panics is reset, and one between the same pods goes on.
fn flow(cluster: &Cluster, client: &Pod, server: &Pod) -> Result<()> {
    alone(cluster, 0.0, || {
        let mut beside = Pulse::start(client, at(server, PORT))?;
        let said = testapp::say(client, at(server, PORT), TEXT)?;
        ensure!(said.outcome == "reset" && said.received == 0, "{said:?}");
        ensure!(beside.is_beating(), "the flow beside it has ended");
        let end = beside.stop()?;
        ensure!(end.outcome == "ok", "the flow beside it: {end:?}");
        expect_echo(client, at(server, PORT), "and another").map(drop)
    })
}

/// A client whose request panics has no answer; requests on other connections have theirs.
fn request(cluster: &Cluster, client: &Pod, server: &Pod, version: &str) -> Result<()> {
    // Connections to servers are kept for the next request: at most one for each worker of each load, which counts
    // for both of its pods and towards both of its ends.
    alone(cluster, 64.0, || {
        let target = at(server, HTTP);
        let start = |more: &[&str]| {
            let args = [&["--pause-ms", "5", "--timeout-ms", "8000"], more].concat();
            HttpLoad::start(client, target, &args)
        };
        let beside = [start(&[])?, start(&["--http2"])?];
        let (code, status) = curl(client, target, version)?;
        ensure!(code != 0 && status == "000", "curl: {code}, {status}");
        for load in beside {
            load.stop()?.expect_all("200")?;
        }
        Ok(())
    })
}

/// While it panics once on the first node, both agents stay the processes that they are; it is counted and told,
/// and all that was held is given back, but for so many flows.
fn alone(cluster: &Cluster, kept: f64, panic: impl FnOnce() -> Result<()>) -> Result<()> {
    let node = cluster.node(0);
    let open_flows = || -> Result<f64> { Ok(node.metrics()?.sum("tcp_open_connections", &[])) };
    let flows = open_flows()?;
    let pids = || -> Vec<_> { cluster.nodes().iter().map(Node::agent_pid).collect() };
    let (before, counted, told) = (pids(), panicked(node)?, told(node));
    panic()?;
    let now = panicked(node)?;
    ensure!(now == counted + 1.0, "{counted} panics, now {now}");
    ensure!(panicked(cluster.node(1))? == 0.0, "the other node panicked");
    ensure!(self::told(node) == told + 1, "told {}", self::told(node));
    ensure!(pids() == before, "an agent was replaced");
    eventually("places to be given back", || {
        for node in cluster.nodes() {
            let metrics = node.metrics()?;
            for name in ["weft_pod_open_exchanges", "weft_pod_buffered_bytes"] {
                let left = metrics.sum(name, &[]);
                ensure!(left == 0.0, "{}: {left} of {name}", node.name());
            }
        }
        let open = open_flows()?;
        ensure!(open <= flows + kept, "{flows} flows, now {open}");
        Ok(())
    })
}

fn panicked(node: &Node) -> Result<f64> {
    Ok(node.metrics()?.sum("weft_panics_total", &[]))
}

fn told(node: &Node) -> usize {
    let log = node.agent_log();
    let lines = log.lines();
    lines
        .filter(|it| it.contains("a panic: what it happened in has ended"))
        .count()
}

/// The program's exit code, and the status that it saw.
fn curl(client: &Pod, target: SocketAddr, version: &str) -> Result<(i32, String)> {
    let done = client
        .command("curl")?
        .args(["-s", "-o", "/dev/null", "-w", "%{http_code}", version])
        .args(["-H", HEADER, &format!("http://{target}/")])
        .output(Duration::from_secs(30))?;
    Ok((done.code(), done.stdout))
}

fn at(pod: &Pod, port: u16) -> SocketAddr {
    SocketAddr::new(pod.v4().into(), port)
}

/// What `weft_agent::faults` waits for.
const TEXT: &str = "weft-fault: panic while this is copied";
const HEADER: &str = "x-weft-fault: panic";
const PORT: u16 = 7610;
const HTTP: u16 = 7611;
