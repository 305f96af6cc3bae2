//! As much of everything as a pod can have: what is shared must not fill up, and others must not notice.

use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Result, ensure};
use serde_json::Value;
use weft_tests::metrics::Metrics;
use weft_tests::scenario::{eventually, expect_echo};
use weft_tests::testapp::{self, Counts, Hold, Load, Server};
use weft_tests::{DEADLINE, Pod};

use crate::namespaces::loopback_to;
use crate::stage::Stage;

/// What the agents are told: flows of a pod in each direction,
pub(crate) const FLOWS: u64 = 1000;
/// and connections of a pod that are being opened, in each direction.
pub(crate) const QUOTA: u64 = 1024;

/// Connects to tens of thousands of ports where nobody listens, on its own node and on the other, so that as
/// many refusals would have to be remembered. Neighbours go on, and every map stays within its bounds.
pub(crate) fn refusals(stage: &Stage) -> Result<()> {
    beside_neighbours(stage, stage.attackers(), maps_are_bounded, |attacker| {
        let targets = [
            stage.target.v4().to_string(),
            stage.outside.v4().to_string(),
        ];
        let counts = scatter(attacker, &targets, 20_000, &[])?;
        ensure!(
            counts.total() >= 1000,
            "hardly anything was tried: {counts:?}"
        );
        // The agent accepts before it knows; that nobody is there is said by a reset.
        Ok(())
    })
}

/// Sends what is for the stand-ins to where nobody answers, and starts connects without end: each stays in the
/// middle of opening. The pod gets its quota of what is pending, counted in the map itself, and no more.
pub(crate) fn half_open(stage: &Stage) -> Result<()> {
    let spoilers = [
        stage.another("spoiler-0", 0)?,
        stage.another("spoiler-1", 1)?,
    ];
    for pod in &spoilers {
        let [a, b, c, _] = pod.v4().octets();
        loopback_to(pod, Some(&format!("{a}.{b}.{c}.1")))?;
    }
    let most = AtomicUsize::new(0);
    let watch = |metrics: &Metrics| {
        let pending = metrics.sum("weft_map_entries", &[("map", "PENDING")]) as usize;
        most.fetch_max(pending, Ordering::Relaxed);
        // The spoiler's own, and what others are just opening.
        ensure!(pending <= 2 * QUOTA as usize, "{pending} are pending");
        Ok(())
    };
    beside_neighbours(stage, [&spoilers[0], &spoilers[1]], watch, |attacker| {
        let targets: Vec<String> = (100..130).map(|host| format!("198.18.0.{host}")).collect();
        let counts = scatter(attacker, &targets, 4_000_000, &["--keep", "8000"])?;
        ensure!(
            counts.of("ok") >= QUOTA && counts.of("denied") > 0,
            "its quota was not reached: {counts:?}"
        );
        Ok(())
    })?;
    let most = most.into_inner();
    ensure!(
        most as u64 >= QUOTA * 9 / 10,
        "no more than {most} were pending at once"
    );
    for (node, spoiler) in stage.cluster.nodes().iter().zip(spoilers) {
        let labels = [("pod", spoiler.name())];
        let refused = node.metrics()?.sum("weft_pod_quota_refused_total", &labels);
        ensure!(refused > 0.0, "nothing was refused on {}", node.name());
        stage.cluster.remove_pod(spoiler)?;
    }
    Ok(())
}

/// Opens and holds more connections than a pod may have, to the other attacker. It gets what it may have, the
/// rest is refused, and both nodes' other pods go on.
pub(crate) fn held(stage: &Stage) -> Result<()> {
    let port = 7050;
    let quiet = ["--quiet"];
    let servers = stage
        .attackers()
        .map(|attacker| Server::start(attacker, port, "silent", &quiet));
    let watch = |metrics: &Metrics| maps_are_bounded(metrics);
    beside_neighbours(stage, stage.attackers(), watch, |attacker| {
        let to = match attacker.name() == stage.near.name() {
            true => &stage.far,
            false => &stage.near,
        };
        let args = ["--timeout-ms", "1000"];
        let hold = Hold::start(attacker, to.sockets(port)[0], 2 * FLOWS, &args)?;
        let node = stage.cluster.node(attacker.node_index());
        eventually("its limit to be reached", || {
            let metrics = node.metrics()?;
            let pod = ("pod", attacker.name());
            let refused = [pod, ("reason", "too_many_flows")];
            let refused = metrics.sum("weft_refused_total", &refused);
            ensure!(refused > 0.0, "nothing was refused: {:?}", hold.counts);
            let open = [pod, ("direction", "outbound"), ("peer", "src")];
            let open = metrics.sum("tcp_open_connections", &open);
            ensure!(
                (FLOWS as f64 * 0.9..=FLOWS as f64).contains(&open),
                "{open} flows are open"
            );
            Ok(())
        })?;
        stage.visit()?;
        hold.release()
    })?;
    for server in servers {
        drop(server?);
    }
    Ok(())
}

/// Sends SYNs with forged sources to the target, to the guarded port and to 15008, thousands of them. They
/// fill accept queues and handshakes at most for a moment: the target's clients get through.
pub(crate) fn syns(stage: &Stage) -> Result<()> {
    let target = &stage.target;
    for round in 0..3 {
        let source = format!("198.51.100.{}:1", round + 1);
        for port in [crate::stage::GUARDED, 15008] {
            testapp::command(&stage.near)?
                .args(["syn", "--source", &source, "--count", "3000"])
                .args(["--destination", &target.sockets(port)[0].to_string()])
                .run()?;
        }
        stage.visit()?;
    }
    // The control: one who means it, from the same pod, is answered.
    expect_echo(&stage.near, stage.open()[0], "after the flood").map(drop)
}

/// Has an attacker on each node do something while friends' connections go on in a row, and looks at what
/// the agents say meanwhile.
fn beside_neighbours(
    stage: &Stage,
    attackers: [&Pod; 2],
    watch: impl Fn(&Metrics) -> Result<()>,
    attack: impl Fn(&Pod) -> Result<()> + Sync,
) -> Result<()> {
    // New connections to the open port, by somebody who has nothing to do with it.
    let steady = Load::start(
        &stage.friend,
        stage.open()[0],
        &["--parallel", "1", "--pause-ms", "20"],
    )?;
    std::thread::scope(|scope| {
        let attack = &attack;
        let attacks = attackers.map(|attacker| scope.spawn(move || attack(attacker)));
        while attacks.iter().any(|it| !it.is_finished()) {
            for node in stage.cluster.nodes() {
                watch(&node.metrics()?)?;
            }
            std::thread::sleep(std::time::Duration::from_millis(200));
        }
        attacks
            .into_iter()
            .try_for_each(|it| it.join().unwrap_or_else(|_| anyhow::bail!("panicked")))
    })?;
    let counts = steady.stop()?;
    ensure!(
        counts.of("ok") == counts.total() && counts.total() > 2,
        "a neighbour's connections failed: {counts:?}"
    );
    // What was pending is gone with who wanted it.
    eventually("nothing to be pending any more", || {
        for node in stage.cluster.nodes() {
            let pending = node
                .metrics()?
                .sum("weft_map_entries", &[("map", "PENDING")]);
            ensure!(pending < 200.0, "{pending} connections are pending");
        }
        Ok(())
    })
}

/// No map has more entries than it was made for, and the one that everybody shares is far from full.
fn maps_are_bounded(metrics: &Metrics) -> Result<()> {
    for entries in metrics.find("weft_map_entries", &[]) {
        let map = entries.labels.get("map").cloned().unwrap_or_default();
        let capacity = metrics.sum("weft_map_capacity", &[("map", &map)]);
        ensure!(
            entries.value <= capacity,
            "{map}: {} of {capacity}",
            entries.value
        );
        if map == "PENDING" {
            ensure!(
                entries.value < capacity / 2.0,
                "{map}: {} of {capacity}",
                entries.value
            );
        }
    }
    Ok(())
}

fn scatter(attacker: &Pod, targets: &[String], count: u32, more: &[&str]) -> Result<Counts> {
    let out = testapp::command(attacker)?
        .args([
            "attack",
            "scatter",
            "--count",
            &count.to_string(),
            "--most-ms",
            "6000",
        ])
        .args(more)
        .args(targets)
        .output(DEADLINE * 3)?
        .success()?;
    let end: Value = serde_json::from_str(out.trim())?;
    Ok(serde_json::from_value(end)?)
}
