//! An agent that has no more of something refuses, and goes on when it has again.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use weft_tests::scenario::{eventually, expect_echo};
use weft_tests::testapp::{self, Hold, Server};

use crate::stage::Stage;

/// Two fifths are a pod's flows, with two descriptors each on one node; the last
/// 512 are nobody's, and those between 7200 and them are shared out.
const FEW: u64 = 8000;

/// Leaves the agent hardly any descriptors and then has a pod take what is left. It refuses, does not end, lets
/// nobody past policy and nothing out in plaintext; with descriptors, all is as before.
pub(crate) fn descriptors(stage: &Stage) -> Result<()> {
    let node = stage.cluster.node(1);
    let pid = node.agent_pid().unwrap_or_default();
    let open = std::fs::read_dir(format!("/proc/{pid}/fd"))?.count();
    stage.watched(|| {
        let before = limit(pid, open + 40)?;
        let _restored = Restored { pid, before };
        let refused = || -> Result<f64> {
            let labels = [("reason", "no_descriptors")];
            Ok(node.metrics()?.sum("weft_refused_total", &labels))
        };
        let so_far = refused()?;
        // They are accepted by the kernel; the agent has no descriptor for most.
        let hold = Hold::start(&stage.near, stage.open()[0], 200, &["--timeout-ms", "500"])?;
        let args = [
            "--send",
            crate::stage::SECRET,
            "--half-close",
            "--timeout-ms",
            "500",
        ];
        for target in stage.guarded() {
            stage.expect_visits(1);
            let said = testapp::connect(&stage.friend, target, &args)?;
            ensure!(
                said.outcome != "ok" || said.text == crate::stage::SECRET,
                "{said:?}"
            );
            let said = testapp::say(&stage.outside, target, "who looks away?")?;
            ensure!(said.outcome != "ok" && said.received == 0, "{said:?}");
        }
        ensure!(node.agent_is_running(), "it ended");
        hold.release()?;
        limit(pid, before)?;
        eventually("the refusals to be counted", || {
            ensure!(refused()? > so_far, "nothing was refused");
            Ok(())
        })?;
        eventually("it to serve again", || {
            expect_echo(&stage.near, stage.open()[0], "again").map(drop)
        })
    })
}

/// Two pods together take all descriptors they are given. The shares of the last ones hold: their neighbour's
/// flows go on in both directions, and a pod that comes is enrolled and served.
pub(crate) fn shares(stage: &Stage) -> Result<()> {
    let node = stage.cluster.node(1);
    node.kill_agent()?;
    node.limit_descriptors(Some(FEW));
    node.start_agent()?;
    node.limit_descriptors(None);
    stage.agents_changed();
    for pod in [&stage.target, &stage.near] {
        node.wait_enrolled(pod.namespace(), pod.name())?;
    }
    let neighbour = stage.another("neighbour", 1)?;
    // One for each: a server's pod has a limit of flows too.
    let stores = [stage.another("store-0", 1)?, stage.another("store-1", 1)?];
    let silent = [0, 1].map(|it| Server::start(&stores[it], 7061, "silent", &["--quiet"]));
    let silent = silent.into_iter().collect::<Result<Vec<_>>>()?;
    // The control: without the greedy all is well.
    expect_echo(&neighbour, stage.open()[0], "alone")?;
    let accomplice = stage.another("accomplice", 1)?;
    let greedy = [(&stage.near, &stores[0]), (&accomplice, &stores[1])].map(|(pod, store)| {
        let args = ["--timeout-ms", "500"];
        Hold::start(pod, store.sockets(7061)[0], FEW / 2, &args)
    });
    let refused = |reason| -> Result<f64> {
        let labels = [("reason", reason), ("pod", "accomplice")];
        Ok(node.metrics()?.sum("weft_refused_total", &labels))
    };
    eventually(
        "the greedy one to be refused for want of descriptors",
        || {
            let (descriptors, flows) = (refused("no_descriptors")?, refused("too_many_flows")?);
            ensure!(descriptors > 0.0, "{flows} by its limit of flows only");
            Ok(())
        },
    )?;
    let open = std::fs::read_dir(format!("/proc/{}/fd", node.agent_pid().unwrap_or_default()))?;
    let open = open.count() as u64;
    ensure!(open > FEW * 4 / 5, "{open} of {FEW} descriptors are in use");
    for _ in 0..20 {
        expect_echo(&neighbour, stage.open()[0], "beside the greedy, out")?;
        expect_echo(&stage.far, stage.open()[0], "beside the greedy, in")?;
    }
    let newcomer = stage.another("late", 1)?;
    expect_echo(&newcomer, stage.open()[0], "come late")?;
    for hold in greedy {
        hold?.release()?;
    }
    drop(silent);
    let [one, other] = stores;
    for pod in [newcomer, neighbour, one, other, accomplice] {
        stage.cluster.remove_pod(pod)?;
    }
    node.kill_agent()?;
    node.start_agent()?;
    stage.agents_changed();
    Ok(())
}

/// Fetches very much through many connections and reads none of it. What the agent keeps of it is bounded.
pub(crate) fn memory(stage: &Stage) -> Result<()> {
    let node = stage.cluster.node(1);
    let port = 7060;
    let bytes = (64 << 20).to_string();
    let source = Server::start(
        &stage.target,
        port,
        "source",
        &["--bytes", &bytes, "--quiet"],
    )?;
    let before: Vec<u64> = resident(stage)?;
    let held: Vec<Hold> = stage
        .attackers()
        .into_iter()
        .map(|attacker| Hold::start(attacker, stage.target.sockets(port)[0], 100, &[]))
        .collect::<Result<_>>()?;
    // As long as it still grows.
    let mut last = resident(stage)?;
    eventually("the agents' memory to stand still", || {
        std::thread::sleep(Duration::from_millis(500));
        let now = resident(stage)?;
        let grows = now
            .iter()
            .zip(&last)
            .any(|(now, last)| *now > last + (1 << 20));
        last = now;
        ensure!(!grows, "it grows: {last:?}");
        Ok(())
    })?;
    for (now, before) in last.iter().zip(&before) {
        let grown = now.saturating_sub(*before);
        ensure!(
            grown < 100 << 20,
            "200 connections that nobody reads cost {grown} bytes"
        );
    }
    stage.visit()?;
    ensure!(node.agent_is_running());
    held.into_iter().try_for_each(Hold::release)?;
    drop(source);
    Ok(())
}

fn resident(stage: &Stage) -> Result<Vec<u64>> {
    stage
        .cluster
        .nodes()
        .iter()
        .map(|it| it.agent_resident_bytes())
        .collect()
}

/// Gives the descriptors back, also when a check fails.
struct Restored {
    pid: u32,
    before: usize,
}

impl Drop for Restored {
    fn drop(&mut self) {
        // The check that follows would show it.
        let _ = limit(self.pid, self.before);
    }
}

/// Sets how many descriptors a process may have, and says how many it could before.
fn limit(pid: u32, most: usize) -> Result<usize> {
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits"))?;
    let line = limits
        .lines()
        .find_map(|it| it.strip_prefix("Max open files"));
    let before = line.and_then(|it| it.split_whitespace().next());
    let before = before.context("no limit of files")?.parse()?;
    let done = std::process::Command::new("prlimit")
        .args(["--pid", &pid.to_string(), &format!("--nofile={most}:")])
        .status()?;
    ensure!(done.success(), "prlimit: {done}");
    Ok(before)
}
