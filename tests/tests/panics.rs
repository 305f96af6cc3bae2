//! A panic in the agent ends the connection that it happens in, and nothing else. The shipped agent does not panic
//! on demand, so it is replaced by the one that upgrades are tested with, which does: see `weft_agent::faults`.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, ensure};
use weft_tests::cluster::{Node, binary};
use weft_tests::scenario::{eventually, expect_echo};
use weft_tests::testapp::{self, Pulse, Server};
use weft_tests::webapp::{HttpLoad, HttpServer};
use weft_tests::{Checks, Cluster, ClusterOptions, Pod, PodSpec, wait_for};

#[test]
fn panics() {
    let cluster = Cluster::with(ClusterOptions {
        alternate_layouts: true,
        ..ClusterOptions::default()
    })
    .expect("a cluster");
    let add = |spec| cluster.add_pod(spec).expect("a pod");
    let scene = Scene {
        client: add(PodSpec::new("client").on(0)),
        stranger: add(PodSpec::new("stranger").on(0).unmeshed()),
        near: add(PodSpec::new("near").on(0)),
        far: add(PodSpec::new("far").on(1)),
        cluster,
    };
    let (cluster, client) = (&scene.cluster, &scene.client);
    let serve = |pod| Server::start(pod, PORT, "echo", &["--quiet"]).expect("a server");
    let _echo = [serve(&scene.near), serve(&scene.far)];
    let greet = ["--quiet", "--greeting", TEXT];
    let serve = |pod| Server::start(pod, GREET, "greet", &greet).expect("a server");
    let _greet = [serve(&scene.near), serve(&scene.far)];
    let serve = |pod| HttpServer::start(pod, HTTP, &["--quiet"]).expect("a server");
    let _http = [serve(&scene.near), serve(&scene.far)];
    let mut checks = Checks::new("panics");
    checks.check("the shipped agent knows nothing of it", || {
        shipped(cluster, client, [&scene.near, &scene.far])
    });
    checks.check("the agent that does takes over", || {
        for node in cluster.nodes() {
            node.take_over(false)?;
            node.wait_left()?;
        }
        Ok(())
    });
    let mut before = vec![];
    checks.check("nothing is open", || {
        before = held(cluster)?;
        let flows: f64 = before.iter().map(|it| it.flows).sum();
        ensure!(flows == 0.0, "{flows} flows");
        Ok(())
    });
    for (server, what) in [(&scene.near, "on one node"), (&scene.far, "across nodes")] {
        checks.check(&format!("a flow, by its client, {what}"), || {
            flow(cluster, client, at(server, PORT), 0)
        });
        let node = usize::from(server.name() == "far");
        checks.check(&format!("a flow, by its server, {what}"), || {
            flow(cluster, client, at(server, GREET), node)
        });
        for (version, name) in [("--http1.1", "1"), ("--http2-prior-knowledge", "2")] {
            checks.check(&format!("a request of HTTP/{name}, {what}"), || {
                request(&scene, server, 0, || broken_off(client, server, version))
            });
            checks.check(
                &format!("the same, of a client outside of the mesh, {what}"),
                || {
                    let stranger = &scene.stranger;
                    request(&scene, server, node, || {
                        broken_off(stranger, server, version)
                    })
                },
            );
        }
    }
    checks.check("nothing is left", || nothing_left(cluster, &before));
    checks.finish();
}

struct Scene {
    client: Pod,
    /// It has no agent.
    stranger: Pod,
    near: Pod,
    far: Pod,
    cluster: Cluster,
}

/// What is asked for a panic passes as anything else does, and is not in the program.
fn shipped(cluster: &Cluster, client: &Pod, servers: [&Pod; 2]) -> Result<()> {
    for server in servers {
        expect_echo(client, at(server, PORT), TEXT)?;
        let greeted = testapp::say(client, at(server, GREET), "")?.expect(&["ok"])?;
        ensure!(greeted.text == TEXT, "{greeted:?}");
        for version in ["--http1.1", "--http2-prior-knowledge"] {
            let url = format!("http://{}/", at(server, HTTP));
            let (code, status) = curl(client, &[version, "-H", HEADER, &url])?;
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

/// A flow that panics on a node is reset, and one between the same pods goes on.
fn flow(cluster: &Cluster, client: &Pod, target: SocketAddr, node: usize) -> Result<()> {
    let flows = || -> Result<f64> { Ok(held(cluster)?.iter().map(|it| it.flows).sum()) };
    let before = flows()?;
    let echo = SocketAddr::new(target.ip(), PORT);
    alone(cluster, node, || {
        let mut beside = Pulse::start(client, echo)?;
        let said = match target == echo {
            true => testapp::say(client, target, TEXT)?,
            false => testapp::connect(client, target, &[])?,
        };
        ensure!(said.outcome == "reset" && said.received == 0, "{said:?}");
        ensure!(beside.is_beating(), "the flow beside it has ended");
        let end = beside.stop()?;
        ensure!(end.outcome == "ok", "the flow beside it: {end:?}");
        expect_echo(client, echo, "and another").map(drop)
    })?;
    eventually("the flows to be gone", || {
        let now = flows()?;
        ensure!(now <= before, "{before} flows, now {now}");
        Ok(())
    })
}

/// Requests on other connections have their answers while one panics on a node.
fn request(
    scene: &Scene,
    server: &Pod,
    node: usize,
    panic: impl FnOnce() -> Result<()>,
) -> Result<()> {
    alone(&scene.cluster, node, || {
        let target = at(server, HTTP);
        let start = |more: &[&str]| {
            let args = [&["--pause-ms", "5", "--timeout-ms", "8000"], more].concat();
            HttpLoad::start(&scene.client, target, &args)
        };
        let beside = [start(&[])?, start(&["--http2"])?];
        panic()?;
        for load in beside {
            load.stop()?.expect_all("200")?;
        }
        Ok(())
    })
}

/// A client whose request panics at the first agent that it comes to has no answer.
fn broken_off(client: &Pod, server: &Pod, version: &str) -> Result<()> {
    let url = format!("http://{}/", at(server, HTTP));
    let (code, status) = curl(client, &[version, "-H", HEADER, &url])?;
    ensure!(code != 0 && status == "000", "curl: {code}, {status}");
    Ok(())
}

/// While it panics once on one node, both agents stay the processes that they are; it is counted and told, and
/// the places of what was under way are given back.
fn alone(cluster: &Cluster, node: usize, panic: impl FnOnce() -> Result<()>) -> Result<()> {
    let (node, other) = (cluster.node(node), cluster.node(1 - node));
    let pids = || -> Vec<_> { cluster.nodes().iter().map(Node::agent_pid).collect() };
    let (before, counted, told) = (pids(), panicked(node)?, told(node));
    let elsewhere = panicked(other)?;
    panic()?;
    let now = panicked(node)?;
    ensure!(now == counted + 1.0, "{counted} panics, now {now}");
    let now = panicked(other)?;
    ensure!(now == elsewhere, "the other node: {elsewhere}, now {now}");
    ensure!(self::told(node) == told + 1, "told {}", self::told(node));
    ensure!(pids() == before, "an agent was replaced");
    eventually("places to be given back", || {
        for (node, held) in cluster.nodes().iter().zip(held(cluster)?) {
            let Held {
                exchanges, bytes, ..
            } = held;
            let left = format!("{exchanges} exchanges, {bytes} bytes");
            ensure!(exchanges == 0.0 && bytes == 0.0, "{}: {left}", node.name());
        }
        Ok(())
    })
}

/// What an agent holds for its pods.
#[derive(Clone, Debug)]
struct Held {
    flows: f64,
    exchanges: f64,
    bytes: f64,
    tasks: f64,
}

/// Of each node.
fn held(cluster: &Cluster) -> Result<Vec<Held>> {
    let nodes = cluster.nodes().iter();
    nodes
        .map(|node| {
            let metrics = node.metrics()?;
            let sum = |name| metrics.sum(name, &[]);
            Ok(Held {
                flows: sum("tcp_open_connections"),
                exchanges: sum("weft_pod_open_exchanges"),
                bytes: sum("weft_pod_buffered_bytes"),
                tasks: sum("weft_tasks"),
            })
        })
        .collect()
}

/// When what is kept for the next request, and then the tunnels, have been idle for long enough, all is as it was
/// before the first of them. The servers are there still: what waits for one of them does not end with it.
fn nothing_left(cluster: &Cluster, before: &[Held]) -> Result<()> {
    let nothing = || {
        for ((node, now), before) in cluster.nodes().iter().zip(held(cluster)?).zip(before) {
            let nothing = now.flows == 0.0 && now.exchanges == 0.0 && now.bytes == 0.0;
            let name = node.name();
            ensure!(
                nothing && now.tasks <= before.tasks,
                "{name}: {before:?}, now {now:?}"
            );
        }
        Ok(())
    };
    wait_for("nothing to be left", SETTLED, || nothing().map(Some))
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
fn curl(client: &Pod, args: &[&str]) -> Result<(i32, String)> {
    let done = client
        .command("curl")?
        .args(["-s", "-o", "/dev/null", "-w", "%{http_code}"])
        .args(args)
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
const GREET: u16 = 7612;
/// Tunnels are kept for 90 seconds.
const SETTLED: Duration = Duration::from_secs(150);
