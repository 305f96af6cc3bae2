//! Ways to listen, also not to, and ports that are nobody's to connect to.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, ensure};
use weft_tests::Cluster;
use weft_tests::command::listening;
use weft_tests::scenario::{Watch, eventually, expect_echo, expect_refusal};
use weft_tests::testapp::{self, Server};

use crate::Pods;

pub(crate) fn bound_to_address(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let listen = pods.server.sockets(7012).map(|address| address.to_string());
    let server = Server::start_on(&pods.server, &listen, "echo", &[])?;
    let watch = Watch::start(cluster, &[&pods.client, &pods.server])?;
    for (family, target) in pods.server.sockets(7012).into_iter().enumerate() {
        expect_echo(&pods.client, target, "to-one-address")?;
        let accepted = server.wait_accepted(family + 1)?.remove(family);
        ensure!(
            accepted.accepted.ip() == pods.client.addresses()[family],
            "{accepted:?}"
        );
    }
    watch.finish_encrypted(&["to-one-address"]).map(drop)
}

pub(crate) fn bound_to_loopback(_: &Cluster, pods: &Pods) -> Result<()> {
    let listen = ["127.0.0.1:7013".to_owned(), "[::1]:7013".to_owned()];
    let server = Server::start_on(&pods.server, &listen, "echo", &[])?;
    for from in [&pods.client, &pods.neighbour, &pods.plain] {
        for target in pods.server.sockets(7013) {
            expect_refusal(from, target, "private")?;
        }
    }
    expect_echo(&pods.server, listen[0].parse()?, "inside")?;
    ensure!(server.accepted()?.len() == 1, "{:?}", server.accepted()?);
    Ok(())
}

pub(crate) fn dual_stack(_: &Cluster, pods: &Pods) -> Result<()> {
    let server = Server::start_on(&pods.server, &["[::]:7014".to_owned()], "echo", &["--dual"])?;
    for (family, target) in pods.server.sockets(7014).into_iter().enumerate() {
        expect_echo(&pods.client, target, "both")?;
        let accepted = server.wait_accepted(family + 1)?.remove(family);
        ensure!(
            accepted.accepted.ip().to_canonical() == pods.client.addresses()[family],
            "{accepted:?}"
        );
        ensure!(
            accepted.local.map(|local| local.ip().to_canonical()) == Some(target.ip()),
            "{accepted:?}"
        );
    }
    Ok(())
}

pub(crate) fn nothing_listens(_: &Cluster, pods: &Pods) -> Result<()> {
    for to in [&pods.server, &pods.neighbour] {
        for target in to.sockets(7998) {
            expect_refusal(&pods.client, target, "anybody?")?;
            // What was refused is remembered: a loop of `nc -z` ends with the truth.
            eventually("nc -z to fail", || {
                let nc = pods.client.command("nc")?;
                let host = target.ip().to_string();
                let finished = nc
                    .args(["-z", "-w", "3", &host, "7998"])
                    .output(Duration::from_secs(10))?;
                ensure!(!finished.status.success(), "nc says the port is open");
                Ok(())
            })?;
        }
    }
    // And when something listens, the memory passes.
    let _server = Server::start(&pods.server, 7998, "echo", &[])?;
    eventually("the port to open", || {
        expect_echo(&pods.client, pods.server.sockets(7998)[0], "now").map(drop)
    })
}

pub(crate) fn agent_ports(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let sleeper = pods.server.command("sleep")?.arg("60").spawn()?;
    let ports: Vec<SocketAddr> = listening(sleeper.pid());
    ensure!(!ports.is_empty(), "the agent has no listeners in the pod");
    let before = cluster.node(1).metrics()?.sum("weft_refused_total", &[]);
    for listener in &ports {
        let port = listener.port();
        for target in pods.server.sockets(port) {
            for from in [&pods.plain, &pods.client, &pods.server] {
                expect_refusal(from, target, "a way in?")?;
            }
        }
        let ip = if listener.ip().is_unspecified() && listener.is_ipv6() {
            "::1".parse()?
        } else if listener.ip().is_unspecified() {
            "127.0.0.1".parse()?
        } else {
            listener.ip()
        };
        expect_refusal(&pods.server, SocketAddr::new(ip, port), "a way out?")?;
    }
    // And the tunnel port without a tunnel.
    for target in pods.server.sockets(15008) {
        let said = testapp::say(&pods.plain, target, "GET / HTTP/1.1\r\n\r\n")?;
        ensure!(!said.text.contains("HTTP/"), "{said:?}");
    }
    let after = cluster.node(1).metrics()?.sum("weft_refused_total", &[]);
    ensure!(after > before, "the refusals were not counted");
    Ok(())
}
