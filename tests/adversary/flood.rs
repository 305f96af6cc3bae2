//! As much of everything as a pod can have: what is shared must not fill up, and others must not notice.

use anyhow::{Result, ensure};
use serde_json::Value;
use weft_tests::metrics::Metrics;
use weft_tests::scenario::{eventually, expect_echo};
use weft_tests::testapp::{self, Counts, Hold, Load};
use weft_tests::{DEADLINE, Pod};

use crate::stage::Stage;

/// Connects to tens of thousands of ports where nobody listens, on its own node and on the other, so that as
/// many refusals would have to be remembered. Neighbours go on, and every map stays within its bounds.
pub(crate) fn refusals(stage: &Stage) -> Result<()> {
    beside_neighbours(stage, |attacker| {
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

/// Starts tens of thousands of connects to where no answer comes from, and leaves them: each is on its way
/// to the agent for a moment, and then waits. The pod gets no more than its share of what is pending.
pub(crate) fn half_open(stage: &Stage) -> Result<()> {
    beside_neighbours(stage, |attacker| {
        // Addresses that nobody has, in the cluster's ranges and outside of them.
        let targets: Vec<String> = (100..130)
            .flat_map(|host| [format!("10.244.1.{host}"), format!("198.18.0.{host}")])
            .collect();
        let counts = scatter(attacker, &targets, 20_000, &["--keep", "8000"])?;
        ensure!(
            counts.total() >= 1000,
            "hardly anything was tried: {counts:?}"
        );
        Ok(())
    })
}

/// Opens and holds as many connections as it is given, more than a pod may have.
pub(crate) fn held(stage: &Stage) -> Result<()> {
    beside_neighbours(stage, |attacker| {
        let hold = Hold::start(attacker, stage.open()[0], 3_000, &["--timeout-ms", "1000"])?;
        ensure!(hold.counts.of("ok") > 100, "{:?}", hold.counts);
        stage.visit()?;
        hold.release()
    })
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

/// Has an attacker on each node do something while friends' connections go on in a row, and looks at the
/// maps meanwhile.
fn beside_neighbours(stage: &Stage, attack: impl Fn(&Pod) -> Result<()> + Sync) -> Result<()> {
    // New connections to the open port, by somebody who has nothing to do with it.
    let steady = Load::start(
        &stage.friend,
        stage.open()[0],
        &["--parallel", "1", "--pause-ms", "20"],
    )?;
    std::thread::scope(|scope| {
        let attacks: Vec<_> = stage
            .attackers()
            .into_iter()
            .map(|attacker| scope.spawn(|| attack(attacker)))
            .collect();
        while attacks.iter().any(|it| !it.is_finished()) {
            for node in stage.cluster.nodes() {
                maps_are_bounded(&node.metrics()?)?;
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
                .sum("weft_map_entries", &[("map", "pending")]);
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
        if map == "pending" {
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
