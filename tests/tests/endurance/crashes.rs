//! Agents and the controller killed at random moments under load.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use weft_tests::checks::figure;
use weft_tests::cluster::Node;
use weft_tests::manifests::{authorization, server};
use weft_tests::scenario::{Watch, eventually, expect_echo, expect_refusal};
use weft_tests::testapp::{self, LOAD_TEXT, Load, Server};
use weft_tests::{Checks, Cluster, Pod, PodSpec, run};

use crate::extent;
use crate::random::Random;

#[test]
fn crashes() {
    let cluster = Cluster::start().expect("a cluster");
    let mut checks = Checks::new("crashes");
    checks.check("agents and controller are killed at random moments", || {
        killed(&cluster)
    });
    checks.finish();
    let name = cluster.name().to_owned();
    drop(cluster);
    assert_eq!(
        run::remains(&name),
        Vec::<String>::new(),
        "nothing may be left"
    );
}

fn killed(cluster: &Cluster) -> Result<()> {
    let add = |spec| cluster.add_pod(spec);
    let client = add(PodSpec::new("client").on(0))?;
    let denied = add(PodSpec::new("denied").on(0))?;
    let near = add(PodSpec::new("near").on(0))?;
    let far = add(PodSpec::new("far").on(1))?;
    let plain = add(PodSpec::new("plain").on(0).unmeshed())?;
    let targets = [far.sockets(7600)[0], near.sockets(7600)[0]];
    for pod in [&far, &near] {
        cluster.apply(&server("default", pod.name(), pod.name(), 7600))?;
        let rule = authorization("default", pod.name(), pod.name(), &["client"]);
        cluster.apply(&rule)?;
    }
    let _apps = [&far, &near].map(|pod| Server::start(pod, 7600, "echo", &["--quiet"]));
    for target in targets {
        eventually("the policy to be in effect", || {
            expect_echo(&client, target, "x")?;
            expect_refusal(&denied, target, "x")?;
            expect_refusal(&plain, target, "x").map(drop)
        })?;
    }
    let before = state(cluster)?;
    let watch = Watch::start(cluster, &[&client, &denied, &near, &far])?;
    let args = ["--timeout-ms", "1000"];
    let start = |pod, target| Load::start(pod, target, &args);
    let allowed = [start(&client, targets[0])?, start(&client, targets[1])?];
    let forbidden = [
        start(&denied, targets[0])?,
        start(&denied, targets[1])?,
        // On its own node only: what it says to the other is on the wire in the clear.
        start(&plain, targets[1])?,
    ];
    let mut random = Random::new("crashes");
    let mut recoveries = Vec::new();
    let mut controllers = 0;
    for _ in 0..extent(20, 200) {
        random.pause(Duration::from_millis(300));
        let victim = random.below(5);
        if victim == 4 {
            cluster.controller()?.kill()?;
            cluster.controller()?.start()?;
            controllers += 1;
            continue;
        }
        let node = cluster.node(victim as usize % 2);
        node.kill_agent()?;
        if random.below(3) == 0 {
            // In the middle of its start.
            node.spawn_agent()?;
            random.pause(Duration::from_millis(150));
            node.kill_agent()?;
        }
        recoveries.push(recovery(|| node.spawn_agent(), &client, targets)?);
    }
    figure("controllers killed", controllers);
    for load in allowed {
        let counts = load.stop()?;
        ensure!(counts.of("ok") > 50, "{counts:?}");
    }
    for load in forbidden {
        let counts = load.stop()?;
        ensure!(counts.total() > 20 && counts.of("ok") == 0, "{counts:?}");
        figure(
            "connections that policy forbids, none let in",
            counts.total(),
        );
    }
    watch.finish_encrypted(&[LOAD_TEXT])?;
    report(&mut recoveries)?;
    eventually("the state to be what it was before", || {
        let after = state(cluster)?;
        ensure!(after == before, "{after:?} instead of {before:?}");
        Ok(())
    })
}

/// How long it takes from an agent's start until flows work.
fn recovery(
    start: impl FnOnce() -> Result<()>,
    client: &Pod,
    targets: [std::net::SocketAddr; 2],
) -> Result<Duration> {
    let began = Instant::now();
    start()?;
    let args = ["--send", "x", "--half-close", "--timeout-ms", "400"];
    let deadline = began + Duration::from_secs(15);
    for target in targets {
        while testapp::connect(client, target, &args)?.outcome != "ok" {
            ensure!(Instant::now() < deadline, "{target} is not reached again");
        }
    }
    Ok(began.elapsed())
}

fn report(recoveries: &mut [Duration]) -> Result<()> {
    recoveries.sort_unstable();
    let count = recoveries.len();
    let median = recoveries.get(count / 2).context("none")?;
    let p99 = recoveries
        .get((count * 99 / 100).min(count - 1))
        .context("none")?;
    let longest = recoveries.last().context("none")?;
    figure("agents killed, with a recovery each", count);
    figure(
        "from an agent's start to flows (median, p99, longest; goal: below 1 s)",
        format!("{median:.2?}, {p99:.2?}, {longest:.2?}"),
    );
    // The goal is a second; a machine that is busy with other things gets more.
    ensure!(*median < Duration::from_secs(3), "it takes {median:?}");
    Ok(())
}

/// Descriptors of an agent that are not sockets, of which traffic has more or fewer.
fn descriptors(node: &Node) -> Result<f64> {
    let pid = node.agent_pid().context("no agent")?;
    let links = std::fs::read_dir(format!("/proc/{pid}/fd"))?
        .filter_map(|it| std::fs::read_link(it.ok()?.path()).ok());
    let others = links.filter(|it| !it.to_string_lossy().starts_with("socket:"));
    Ok(others.count() as f64)
}

/// Entries that stay as they are: pods, their addresses, listeners, pinned links.
fn state(cluster: &Cluster) -> Result<Vec<f64>> {
    let mut state = Vec::new();
    for node in cluster.nodes() {
        let metrics = node.metrics()?;
        for map in ["PODS", "OWN_ADDRESSES", "LISTENERS", "PROBES"] {
            state.push(metrics.sum("weft_map_entries", &[("map", map)]));
        }
        state.push(metrics.sum("weft_pods_enrolled", &[]));
        // Maps, links, and the folder of the one agent that lives.
        state.push(node.pins()?.len() as f64);
        state.push(descriptors(node)?);
    }
    Ok(state)
}
