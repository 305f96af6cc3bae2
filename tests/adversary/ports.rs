//! The agent's ports inside of pods.

use std::net::SocketAddr;

use anyhow::{Result, ensure};
use weft_tests::command::listening;
use weft_tests::scenario::{expect_echo, expect_refusal};
use weft_tests::testapp::{self, Server};
use weft_tests::{Pod, PodSpec};

use crate::stage::Stage;

/// Listens at 15008, at the ports of stand-ins, and on the loopback addresses that the agent delivers from,
/// before its pod joins the mesh. What is said to the pod must go through the agent all the same, and
/// nothing that is meant for the agent may arrive there.
pub(crate) fn taken_before(stage: &Stage) -> Result<()> {
    for node in 0..2 {
        let pod = stage
            .cluster
            .build_pod(PodSpec::new("squatter").on(node).service_account("mallory"))?;
        let squatters = squat(&pod, &[])?;
        stage.cluster.announce(&pod)?;
        stage.cluster.wait_enrolled(&pod)?;
        squatted(stage, &pod, &squatters)?;
        stage.cluster.remove_pod(pod)?;
    }
    Ok(())
}

/// The same after it has joined, also with `SO_REUSEPORT`, by which a process could join a group of
/// listeners: the agent's are in none.
pub(crate) fn taken_after(stage: &Stage) -> Result<()> {
    for node in 0..2 {
        let pod = stage.another("late-squatter", node)?;
        let squatters = squat(&pod, &["--reuse-port"])?;
        squatted(stage, &pod, &squatters)?;
        // The ports that the agent has: nobody else gets them while it has.
        for listener in agents_listeners(&pod)? {
            let mut other = testapp::command(&pod)?
                .args(["serve", "--reuse-port", "--listen"])
                .arg(format!("0.0.0.0:{}", listener.port()))
                .spawn()?;
            let ended = other.wait(weft_tests::DEADLINE)?;
            ensure!(!ended.success(), "{listener} could be had, too");
        }
        stage.cluster.remove_pod(pod)?;
    }
    Ok(())
}

/// Connects to the agent's listeners in the target's namespace: from neighbours by the target's address, and
/// from inside by the loopback. Nobody gets an answer, and nobody gets through to an application.
pub(crate) fn agents_own(stage: &Stage) -> Result<()> {
    let before = stage.seen_at_open()?.len();
    for listener in agents_listeners(&stage.target)? {
        let port = listener.port();
        for target in stage.target.sockets(port) {
            for from in [&stage.near, &stage.far, &stage.outside, &stage.target] {
                expect_refusal(from, target, "a way in?")?;
            }
        }
        for inside in [
            format!("127.0.0.1:{port}"),
            format!("[::1]:{port}"),
            format!("127.1.2.3:{port}"),
        ] {
            expect_refusal(&stage.target, inside.parse()?, "a way out?")?;
        }
    }
    // Where redirected connections go to.
    for stand_in in ["127.1.2.3:4", "127.254.0.1:4", "[::1]:64512", "[::1]:65000"] {
        expect_refusal(&stage.target, stand_in.parse()?, "a stand-in?")?;
    }
    ensure!(
        stage.seen_at_open()?.len() == before,
        "it got through to an application"
    );
    // The control: the same program gets an answer where somebody listens.
    expect_echo(
        &stage.target,
        format!("127.0.0.1:{}", crate::stage::OPEN).parse()?,
        "inside",
    )
    .map(drop)
}

/// Servers wherever the agent's traffic might come by.
fn squat(pod: &Pod, more: &[&str]) -> Result<Vec<(&'static str, Server)>> {
    let mut servers = Vec::new();
    for address in [
        "0.0.0.0:15008",
        "[::]:15008",
        "0.0.0.0:4",
        "[::]:64512",
        "[::]:65534",
    ] {
        servers.push((
            address,
            Server::start_on(pod, &[address.to_owned()], "echo", more)?,
        ));
    }
    servers.push((
        "0.0.0.0:7030",
        Server::start_on(pod, &["0.0.0.0:7030".to_owned()], "echo", more)?,
    ));
    servers.push((
        "[::]:7030",
        Server::start_on(pod, &["[::]:7030".to_owned()], "echo", more)?,
    ));
    Ok(servers)
}

/// Its own application is reached through the agent, its clients' connections go out through the agent,
/// and no squatter has seen any of it.
fn squatted(stage: &Stage, pod: &Pod, squatters: &[(&str, Server)]) -> Result<()> {
    stage.watched(|| {
        for (family, target) in pod.sockets(7030).into_iter().enumerate() {
            expect_echo(&stage.friend, target, crate::stage::SECRET)?;
            expect_echo(&stage.near, target, "from next door")?;
            expect_echo(pod, stage.open()[family], "out of the squatters' pod")?;
            expect_refusal(pod, stage.guarded()[family], "out of the squatters' pod")?;
        }
        Ok(())
    })?;
    for (address, squatter) in squatters {
        let seen = squatter.accepted()?;
        if address.ends_with(":7030") {
            // The control: its application has seen its clients.
            ensure!(seen.len() == 2, "at {address}: {seen:?}");
        } else {
            ensure!(seen.is_empty(), "at {address}: {seen:?}");
        }
    }
    // What is said to 15008 by somebody who is no agent is not answered by a squatter.
    let said = testapp::say(
        &stage.outside,
        pod.sockets(15008)[0],
        "GET / HTTP/1.1\r\n\r\n",
    )?;
    ensure!(!said.text.contains("GET"), "{said:?}");
    Ok(())
}

/// Where the agent listens inside a pod, as a process of it can see.
fn agents_listeners(pod: &Pod) -> Result<Vec<SocketAddr>> {
    let sleeper = pod.command("sleep")?.arg("60").spawn()?;
    let known = [
        crate::stage::GUARDED,
        crate::stage::OPEN,
        7030,
        15008,
        4,
        64512,
        65534,
    ];
    let mut found = listening(sleeper.pid());
    found.retain(|it| !known.contains(&it.port()));
    ensure!(
        found.len() >= 3,
        "the agent has no listeners in the pod: {found:?}"
    );
    Ok(found)
}
