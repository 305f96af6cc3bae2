//! Hostile clients of HTTP: what `weft_tests::hostile` has, from pods of the mesh on both nodes, from outside of
//! it, and by a tunnel with another workload's valid certificate.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use weft_tests::command::Process;
use weft_tests::hostile::{Script, scripts};
use weft_tests::metrics::Metrics;
use weft_tests::scenario::eventually;
use weft_tests::testapp;
use weft_tests::webapp::{HttpLoad, HttpServer};
use weft_tests::weft1::{Tunnel, data};
use weft_tests::{Checks, Pod};

use crate::peer;
use crate::stage::Stage;

/// What the agents are told, so that the limits are reached by few.
pub(crate) const LIMITS: [&str; 6] = [
    "--max-flows-per-pod",
    "400",
    "--max-buffered-mib-per-pod",
    "16",
    "--max-exchanges-per-pod",
    "400",
];

/// Every script from everywhere. While it goes on, the target's other client and its own neighbours are answered,
/// by HTTP/1 and HTTP/2; no agent's memory grows beyond a bound; and afterwards nothing is left of it.
pub(crate) fn all(stage: &Stage, checks: &mut Checks) {
    let _server = HttpServer::start(&stage.target, HTTP, &["--quiet"]).expect("a server");
    stage.visit().expect("the friend's visit");
    let (mut before, mut began) = (None, [0; 2]);
    checks.check("requests before anything else", || {
        neighbours(stage)?.into_iter().try_for_each(served)?;
        before = Some(Footprint::of(stage)?);
        began = memory(stage)?;
        Ok(())
    });
    for script in scripts() {
        checks.check(script.name, || {
            let most = beside_neighbours(stage, || {
                let attacks = attackers(stage).map(|from| start(stage, from, &script));
                for attack in attacks {
                    let ended = finish(attack?)?;
                    eprintln!("  {ended:?}");
                    ensure!(ended.open > 0, "nothing was tried: {ended:?}");
                }
                Ok(())
            })?;
            is_bounded(began, most)?;
            nothing_is_open(stage)?;
            stage.unharmed()
        });
        checks.check(&format!("{}, by a tunnel", script.name), || {
            let most = beside_neighbours(stage, || by_tunnel(stage, &script))?;
            is_bounded(began, most)?;
            nothing_is_open(stage)?;
            stage.unharmed()
        });
    }
    checks.check("nothing is left", || {
        let before = before.take().context("it was not seen before")?;
        nothing_is_left(stage, &before)
    });
}

/// Those who attack: the target's neighbour, the friend's, and one outside of the mesh.
fn attackers(stage: &Stage) -> [&Pod; 3] {
    [&stage.near, &stage.far, &stage.outside]
}

fn start(stage: &Stage, from: &Pod, script: &Script) -> Result<Process> {
    let target = stage.target.sockets(HTTP)[0].to_string();
    testapp::command(from)?
        .named("hostile-http")
        .args(["attack", "http", &target, script.name])
        .spawn()
}

fn finish(mut attack: Process) -> Result<Ended> {
    attack.wait(Duration::from_secs(60))?;
    let out = attack.stdout();
    let line = out.lines().last().context("it said nothing")?;
    Ok(serde_json::from_str(line)?)
}

/// What became of an attack's connections.
#[derive(Debug, Deserialize)]
#[expect(dead_code, reason = "for who reads it")]
struct Ended {
    open: u64,
    refused: u64,
    ended: u64,
    sent: u64,
    received: u64,
    statuses: std::collections::BTreeMap<String, u64>,
}

/// The same in flows of `weft/1`, one after the other.
fn by_tunnel(stage: &Stage, script: &Script) -> Result<()> {
    let mut held = Vec::new();
    for _ in 0..script.connections.min(4) {
        let identity = peer::identity(stage)?;
        let from = stage.outside.netns();
        let target = stage.target.sockets(HTTP)[0];
        let mut tunnel = Tunnel::connect(from, target, &identity)?;
        tunnel.open(HTTP, 0, b"")?;
        tunnel.accepted()?;
        tunnel.impatient(Duration::from_millis(300))?;
        let start = Instant::now();
        let then = data(&script.then);
        // Whoever has had enough does not take the rest. Nothing of what comes back is read.
        let _ = tunnel.send(&data(&script.start)).is_ok()
            && (0..script.times)
                .take_while(|_| start.elapsed() < Duration::from_secs(5))
                .all(|_| tunnel.send(&then).is_ok());
        held.push(tunnel);
    }
    std::thread::sleep(Duration::from_millis(500));
    Ok(())
}

/// Has somebody do something while others' requests go on, and gives the most that each agent's memory was
/// meanwhile.
pub(crate) fn beside_neighbours(
    stage: &Stage,
    attack: impl FnOnce() -> Result<()> + Send,
) -> Result<[u64; 2]> {
    let before = memory(stage)?;
    let most = Mutex::new(before);
    let loads = neighbours(stage)?;
    std::thread::scope(|scope| {
        let attack = scope.spawn(attack);
        while !attack.is_finished() {
            let now = memory(stage)?;
            if let Ok(mut most) = most.lock() {
                *most = [most[0].max(now[0]), most[1].max(now[1])];
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        attack.join().unwrap_or_else(|_| anyhow::bail!("panicked"))
    })?;
    loads.into_iter().try_for_each(served)?;
    Ok(most.into_inner().unwrap_or(before))
}

/// Others' requests: those of the friend, on the other node.
fn neighbours(stage: &Stage) -> Result<[HttpLoad; 2]> {
    let target = stage.target.sockets(HTTP)[0];
    let start = |further: &[&str]| {
        let args = [&["--pause-ms", "20", "--timeout-ms", "8000"], further].concat();
        HttpLoad::start(&stage.friend, target, &args)
    };
    Ok([start(&[])?, start(&["--http2"])?])
}

fn served(load: HttpLoad) -> Result<()> {
    load.stop()?.expect_all("200")
}

/// What the agents hold now, in bytes.
pub(crate) fn memory(stage: &Stage) -> Result<[u64; 2]> {
    let of = |node| stage.cluster.node(node).agent_resident_bytes();
    Ok([of(0)?, of(1)?])
}

/// No agent grew by more than it may, from the beginning on.
pub(crate) fn is_bounded(began: [u64; 2], most: [u64; 2]) -> Result<()> {
    let grown = |node: usize| most[node].saturating_sub(began[node]) >> 20;
    let (one, other) = (grown(0), grown(1));
    eprintln!("  the agents grew by {one} and {other} MiB of {MOST_MIB}");
    ensure!(
        one <= MOST_MIB && other <= MOST_MIB,
        "they grew by {one} and {other} MiB"
    );
    Ok(())
}

/// No exchange is open, and nothing is kept.
pub(crate) fn nothing_is_open(stage: &Stage) -> Result<()> {
    eventually("no exchange to be open", || {
        for node in stage.cluster.nodes() {
            let metrics = node.metrics()?;
            for name in ["weft_pod_open_exchanges", "weft_pod_buffered_bytes"] {
                let left: Vec<_> = metrics
                    .find(name, &[])
                    .filter(|it| it.value > 0.0)
                    .collect();
                ensure!(left.is_empty(), "{}: {left:?}", node.name());
            }
        }
        Ok(())
    })
}

/// What an agent has.
pub(crate) struct Footprint([Counts; 2]);

#[derive(Debug)]
struct Counts {
    descriptors: f64,
    tasks: f64,
    series: usize,
}

impl Footprint {
    pub(crate) fn of(stage: &Stage) -> Result<Footprint> {
        let of = |node| stage.cluster.node(node).metrics().map(|it| Counts::of(&it));
        Ok(Footprint([of(0)?, of(1)?]))
    }
}

impl Counts {
    fn of(metrics: &Metrics) -> Counts {
        Counts {
            descriptors: metrics.sum("process_open_fds", &[]),
            tasks: metrics.sum("weft_tasks", &[]),
            series: metrics.count(),
        }
    }
}

/// Descriptors and tasks are what they were, once kept connections have been let go; series are of who
/// spoke to whom and how it was answered, not of what was said.
pub(crate) fn nothing_is_left(stage: &Stage, before: &Footprint) -> Result<()> {
    let start = Instant::now();
    loop {
        let now = Footprint::of(stage)?;
        let same = before.0.iter().zip(&now.0).all(|(before, now)| {
            now.descriptors <= before.descriptors + 20.0
                && now.tasks <= before.tasks + 20.0
                && now.series <= before.series + MORE_SERIES
        });
        if same {
            eprintln!("  before {:?}, after {:?}", before.0, now.0);
            return Ok(());
        }
        ensure!(
            start.elapsed() < Duration::from_secs(120),
            "before {:?}, after {:?}",
            before.0,
            now.0
        );
        std::thread::sleep(Duration::from_secs(2));
    }
}

/// The target's port that speaks HTTP, for all.
pub(crate) const HTTP: u16 = 7080;
/// By how much an agent may grow: the budgets of the two pods on a node that have to do with it, and what is
/// bounded beside them. Heads that nobody has looked at yet take most: up to 173 MiB were seen.
const MOST_MIB: u64 = 224;
/// Three attackers, by two versions, with a dozen ways to be answered: a few hundred.
const MORE_SERIES: usize = 1500;
