//! What the dead have left: addresses, process ids.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use weft_tests::checks::report;
use weft_tests::command::Process;
use weft_tests::scenario::{eventually, expect_echo, expect_refusal};
use weft_tests::testapp::{self, Connected, Pulse, Server};
use weft_tests::{DEADLINE, PodSpec, wait_for};

use crate::namespaces::let_in;
use crate::stage::{Stage, connected, expect_all, expect_nothing};

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

/// The agent is killed, and a process of the attacker gets its process id. It must count for nothing: what that
/// process itself connects is refused while no agent is there, and an attacker's as soon as the next one is.
pub(crate) fn dead_agents_pid(stage: &Stage) -> Result<()> {
    let node = stage.cluster.node(1);
    let pid = node.agent_pid().unwrap_or_default();
    node.kill_agent()?;
    let mut heir = Heir::of(stage, pid)?;
    for target in stage.guarded().into_iter().chain(stage.open()) {
        expect_nothing("while no agent is there", &heir.connect(target)?)?;
        let said = testapp::say(&stage.friend, target, "while no agent is there")?;
        expect_nothing("the friend, while no agent is there", &said)?;
    }
    node.start_agent()?;
    stage.agents_changed();
    for pod in [&stage.target, &stage.near] {
        node.wait_enrolled(pod.namespace(), pod.name())?;
    }
    for family in 0..2 {
        let said = heir.connect(stage.guarded()[family])?;
        expect_nothing("with a dead agent's number", &said)?;
        // As what it is: let in with the attacker's identity where everybody may.
        let before = let_in(stage)?;
        expect_all(
            "as itself",
            &heir.connect(stage.open()[family])?,
            "inherited",
        )?;
        eventually("its connection to be counted as the attacker's", || {
            ensure!(let_in(stage)? > before, "it is not");
            Ok(())
        })?;
    }
    Ok(())
}

/// A process of the attacker that connects when it is told to.
struct Heir(Process);

impl Heir {
    /// With this process id, if it can be had: ids go round, and the kernel lets root say which was the
    /// last one.
    fn of(stage: &Stage, pid: u32) -> Result<Heir> {
        let start = Instant::now();
        loop {
            let said = std::fs::write("/proc/sys/kernel/ns_last_pid", (pid - 1).to_string());
            let heir = testapp::command(&stage.near)?
                .args(["attack", "heir"])
                .with_stdin()
                .spawn()?;
            if heir.pid() == pid {
                return Ok(Heir(heir));
            }
            if said.is_err() || start.elapsed() > Duration::from_secs(5) {
                report("hostile_pod: the agent's process id could not be had again: not tried");
                return Ok(Heir(heir));
            }
        }
    }

    fn connect(&mut self, target: SocketAddr) -> Result<Connected> {
        let before = self.0.stdout().lines().count();
        self.0.write_stdin(&format!("{target}\n"))?;
        let line = wait_for("the heir to say how it went", DEADLINE, || {
            Ok(self.0.stdout().lines().nth(before).map(str::to_owned))
        })?;
        connected(&line)
    }
}
