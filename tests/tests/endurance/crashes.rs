//! Agents and the controller killed at random moments under load.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use weft_tests::checks::figure;
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
    quiet();
    let before = State::of(cluster)?;
    let alone = undisturbed(cluster, &client, targets)?;
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
    let mut crashes = crash(cluster, &client, targets)?;
    for (load, rate) in allowed.into_iter().zip(alone.rates) {
        let counts = load.stop()?;
        let expected = rate * crashes.whole.as_secs_f64();
        let share = counts.of("ok") as f64 / expected;
        figure(
            "flows that policy allows, and their share of those undisturbed for the time between crashes",
            format!("{}, {:.0} %", counts.of("ok"), 100.0 * share),
        );
        ensure!(share > LEAST_SHARE, "{counts:?} instead of {expected}");
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
    report(&mut crashes.recoveries, alone.recovery)?;
    as_before(cluster, &before)
}

/// What killing agents and the controller at random moments did.
struct Crashes {
    recoveries: Vec<Duration>,
    /// How long nobody was being killed or started.
    whole: Duration,
}

fn crash(cluster: &Cluster, client: &Pod, targets: [SocketAddr; 2]) -> Result<Crashes> {
    let mut random = Random::new("crashes");
    let mut recoveries = Vec::new();
    let mut controllers = 0;
    let mut whole = Duration::ZERO;
    for _ in 0..extent(20, 200) {
        let since = Instant::now();
        random.pause(Duration::from_millis(300));
        whole += since.elapsed();
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
        recoveries.push(recovery(|| node.spawn_agent(), client, targets)?);
    }
    figure("controllers killed", controllers);
    Ok(Crashes { recoveries, whole })
}

/// Fails unless the cluster soon has what it had.
fn as_before(cluster: &Cluster, before: &State) -> Result<()> {
    quiet();
    let mut after = None;
    eventually("the state to be what it was before", || {
        let now = State::of(cluster)?;
        now.is_as(before)?;
        after = Some(now);
        Ok(())
    })?;
    let after = after.context("no state")?;
    figure(
        "sockets and tasks before and after (n0, n1, controller)",
        format!("{:?}, {:?}", before.traffic, after.traffic),
    );
    Ok(())
}

/// What this machine does without load: flows a second to each target, and the median of three
/// recoveries.
struct Alone {
    rates: Vec<f64>,
    recovery: Duration,
}

fn undisturbed(cluster: &Cluster, client: &Pod, targets: [SocketAddr; 2]) -> Result<Alone> {
    let mut rates = Vec::new();
    for target in targets {
        let start = Instant::now();
        let load = Load::start(client, target, &["--timeout-ms", "1000"])?;
        std::thread::sleep(Duration::from_secs(2));
        let took = start.elapsed().as_secs_f64();
        rates.push(load.stop()?.of("ok") as f64 / took);
    }
    let mut recoveries = Vec::new();
    for _ in 0..3 {
        let node = cluster.node(0);
        node.kill_agent()?;
        recoveries.push(recovery(|| node.spawn_agent(), client, targets)?);
    }
    recoveries.sort_unstable();
    let recovery = recoveries[1];
    Ok(Alone { rates, recovery })
}

/// In the long form waits until the tunnels that are kept for the next flow have closed.
fn quiet() {
    std::thread::sleep(extent(Duration::ZERO, Duration::from_secs(100)));
}

/// How long it takes from an agent's start until flows work.
fn recovery(
    start: impl FnOnce() -> Result<()>,
    client: &Pod,
    targets: [SocketAddr; 2],
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

fn report(recoveries: &mut [Duration], alone: Duration) -> Result<()> {
    recoveries.sort_unstable();
    let count = recoveries.len();
    let median = recoveries.get(count / 2).context("none")?;
    let p99 = recoveries
        .get((count * 99 / 100).min(count - 1))
        .context("none")?;
    let longest = recoveries.last().context("none")?;
    figure("agents killed, with a recovery each", count);
    figure(
        "from an agent's start to flows without load",
        format!("{alone:.2?}"),
    );
    figure(
        "from an agent's start to flows (median, p99, longest; goal: below 1 s)",
        format!("{median:.2?}, {p99:.2?}, {longest:.2?}"),
    );
    // The goal is a second; a machine that is slow without load too gets more.
    let limit = (4 * alone).clamp(Duration::from_secs(1), Duration::from_secs(3));
    ensure!(
        *median < limit,
        "it takes {median:?}, {alone:?} without load"
    );
    ensure!(*p99 < 5 * limit, "it takes up to {p99:?}");
    Ok(())
}

/// What the cluster has.
#[derive(Debug)]
struct State {
    /// What stays as it is: pods, their addresses, listeners, pinned links, descriptors that are not
    /// sockets.
    fixed: Vec<f64>,
    /// What traffic has more or fewer of: sockets and tasks of each process. Not memory: these
    /// processes started a moment ago.
    traffic: Vec<(usize, f64)>,
}

impl State {
    fn of(cluster: &Cluster) -> Result<State> {
        let (mut fixed, mut traffic) = (Vec::new(), Vec::new());
        for node in cluster.nodes() {
            let metrics = node.metrics()?;
            for map in ["PODS", "OWN_ADDRESSES", "LISTENERS", "PROBES"] {
                fixed.push(metrics.sum("weft_map_entries", &[("map", map)]));
            }
            fixed.push(metrics.sum("weft_pods_enrolled", &[]));
            // Maps, links, and the folder of the one agent that lives.
            fixed.push(node.pins()?.len() as f64);
            let (sockets, others) = descriptors(node.agent_pid().context("no agent")?)?;
            fixed.push(others as f64);
            traffic.push((sockets, metrics.sum("weft_tasks", &[])));
        }
        let controller = cluster.controller()?;
        let (sockets, others) = descriptors(controller.pid().context("no controller")?)?;
        fixed.push(others as f64);
        let tasks = controller.metrics()?.sum("weft_controller_tasks", &[]);
        traffic.push((sockets, tasks));
        Ok(State { fixed, traffic })
    }

    /// Fails if it is not what it was before. What traffic has may be less, and in the short form,
    /// where tunnels are still open that are kept for the next flow, a little more.
    fn is_as(&self, before: &State) -> Result<()> {
        ensure!(self.fixed == before.fixed, "{self:?} instead of {before:?}");
        let slack = extent(KEPT, 0);
        for ((sockets, tasks), then) in self.traffic.iter().zip(&before.traffic) {
            ensure!(
                *sockets <= then.0 + slack && *tasks <= then.1 + slack as f64,
                "{self:?} instead of {before:?}"
            );
        }
        Ok(())
    }
}

/// How many sockets a process has, and how many descriptors that are none.
fn descriptors(pid: u32) -> Result<(usize, usize)> {
    let links = std::fs::read_dir(format!("/proc/{pid}/fd"))?
        .filter_map(|it| std::fs::read_link(it.ok()?.path()).ok());
    let (sockets, others): (Vec<_>, Vec<_>) =
        links.partition(|it| it.to_string_lossy().starts_with("socket:"));
    Ok((sockets.len(), others.len()))
}

/// Sockets and tasks for tunnels that are kept for the next flow: some for each that was open at once.
/// Of thousands of flows, far fewer than one each.
const KEPT: usize = 64;
/// What of the flows that are allowed must still come about, as a share of those that this machine makes
/// in the time between crashes. It can be above one: some come about before a recovery is seen.
const LEAST_SHARE: f64 = 0.2;
