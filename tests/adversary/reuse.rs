//! What the dead have left: addresses, process ids.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use weft_tests::PodSpec;
use weft_tests::checks::report;
use weft_tests::scenario::{eventually, expect_echo, expect_refusal};
use weft_tests::testapp::{self, Pulse, Server};

use crate::stage::Stage;

/// A pod dies and another one, of another identity, gets its address. Nothing of the first may be the
/// second's: not its policy, its tunnels, its identity, nor that its ports were refused.
pub(crate) fn dead_pods_address(stage: &Stage) -> Result<()> {
    let host = 7;
    let port = 7040;
    let first = stage.cluster.add_pod(
        PodSpec::new("first")
            .service_account("friend")
            .on(0)
            .host(host),
    )?;
    let server = Server::start(&first, port, "echo", &[])?;
    let address = first.sockets(port)[0];
    // All that could be remembered: a tunnel in either direction, and a refused port.
    stage.expect_visits_of(&first, 1);
    expect_echo(&first, stage.guarded()[0], "while it lived")?;
    expect_echo(&stage.target, address, "while it lived")?;
    expect_refusal(&stage.target, first.sockets(port + 1)[0], "nobody there")?;
    stage.expect_visits_of(&first, 1);
    let mut flow = Pulse::start(&first, stage.guarded()[0])?;
    ensure!(flow.is_beating());
    drop((flow, server));
    stage.cluster.remove_pod(first)?;
    let second = stage.cluster.add_pod(
        PodSpec::new("second")
            .service_account("mallory")
            .on(0)
            .host(host),
    )?;
    let started = Server::start(&second, port, "echo", &[])?;
    let other = Server::start(&second, port + 1, "echo", &[])?;
    ensure!(second.sockets(port)[0] == address, "another address");
    for _ in 0..3 {
        expect_refusal(&second, stage.guarded()[0], "in a dead friend's place")?;
    }
    // Reached as who it is: the first connection must not go to the dead one's tunnel.
    eventually("the new pod to be known", || {
        expect_echo(&stage.target, address, "who are you?").map(drop)
    })?;
    // A refused port is refused for a moment more, whoever has the address by then.
    eventually("the port that was refused to be reached", || {
        let target = second.sockets(port + 1)[0];
        expect_echo(&stage.target, target, "the port that was refused").map(drop)
    })?;
    expect_echo(&second, stage.open()[0], "as itself")?;
    let log = stage.cluster.node(1).agent_log();
    let line = log
        .lines()
        .rfind(|line| line.contains("src=default/second"));
    if let Some(line) = line {
        ensure!(line.contains("sa/mallory"), "{line}");
    }
    ensure!(
        started
            .accepted()?
            .iter()
            .all(|it| it.accepted.ip() == stage.target.v4())
    );
    ensure!(!other.accepted()?.is_empty());
    drop((started, other));
    stage.cluster.remove_pod(second)
}

/// The agent is killed, and a process of the attacker gets its process id. It must count for nothing: pods
/// stay closed meanwhile, the attacker's connects stay an attacker's, and the next agent takes over.
pub(crate) fn dead_agents_pid(stage: &Stage) -> Result<()> {
    let node = stage.cluster.node(1);
    let pid = node.agent_pid().unwrap_or_default();
    node.kill_agent()?;
    let heir = inherit(stage, pid)?;
    for target in stage.guarded() {
        for from in [&stage.near, &stage.friend] {
            let said = testapp::say(from, target, "while no agent is there")?;
            ensure!(said.outcome != "ok" && said.received == 0, "{said:?}");
        }
    }
    node.start_agent()?;
    stage.agents_changed();
    for pod in [&stage.target, &stage.near] {
        node.wait_enrolled(pod.namespace(), pod.name())?;
    }
    expect_refusal(
        &stage.near,
        stage.guarded()[0],
        "with a dead agent's number",
    )?;
    expect_echo(&stage.near, stage.open()[0], "as before")?;
    drop(heir);
    Ok(())
}

/// A process of the attacker with this process id, if it can be had: ids go round, and the kernel lets root
/// say which was the last one.
fn inherit(stage: &Stage, pid: u32) -> Result<Option<weft_tests::command::Process>> {
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(5) {
        if std::fs::write("/proc/sys/kernel/ns_last_pid", (pid - 1).to_string()).is_err() {
            break;
        }
        let process = stage.near.command("sleep")?.arg("60").spawn()?;
        if process.pid() == pid {
            return Ok(Some(process));
        }
    }
    report("hostile_pod: the agent's process id could not be had again on this machine");
    Ok(None)
}
