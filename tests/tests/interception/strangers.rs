//! What is not a flow between two meshed pods: plaintext, the unknown, the outside, UDP, forged packets.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Result, ensure};
use weft_tests::capture::Capture;
use weft_tests::metrics::wait_for_metric;
use weft_tests::scenario::{Watch, expect_echo, expect_refusal};
use weft_tests::testapp::{self, Server};
use weft_tests::{Cluster, PodSpec};

use crate::Pods;

pub(crate) fn plaintext(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let meshed = Server::start(&pods.client, 7015, "echo", &[])?;
    let plain = Server::start(&pods.plain, 7015, "echo", &[])?;
    for family in 0..2 {
        expect_echo(
            &pods.plain,
            pods.client.sockets(7015)[family],
            "in-the-clear",
        )?;
        let accepted = meshed.wait_accepted(family + 1)?.remove(family);
        ensure!(
            accepted.accepted.ip() == pods.plain.addresses()[family],
            "{accepted:?}"
        );
        let target = pods.plain.sockets(7015)[family];
        let said = expect_echo(&pods.client, target, "to-the-plain")?;
        ensure!(said.peer == Some(target), "{said:?}");
        let accepted = plain.wait_accepted(family + 1)?.remove(family);
        ensure!(
            accepted.accepted.ip() == pods.client.addresses()[family],
            "{accepted:?}"
        );
    }
    let labels = [
        ("direction", "inbound"),
        ("pod", "client"),
        ("tls", "no_identity"),
    ];
    wait_for_metric(cluster.node(0), "tcp_open_total", &labels, 2.0)?;
    wait_for_metric(
        cluster.node(0),
        "inbound_tcp_authz_allow_total",
        &labels,
        2.0,
    )
    .map(drop)
}

pub(crate) fn unknown_address(cluster: &Cluster, pods: &Pods) -> Result<()> {
    // A pod that runs and that nobody described: nothing may reach it in the clear.
    let unknown = cluster.build_pod(PodSpec::new("unknown").on(1))?;
    let server = Server::start(&unknown, 7016, "echo", &[])?;
    let watch = Watch::start(cluster, &[&pods.client, &unknown])?;
    for target in unknown.sockets(7016) {
        let said = expect_refusal(&pods.client, target, "who-are-you")?;
        ensure!(said.elapsed_ms < 3000.0, "it took {} ms", said.elapsed_ms);
    }
    let captured = watch.finish(&["who-are-you"])?;
    ensure!(
        captured.to_or_from_port(7016).count() == 0,
        "a packet went to the unknown pod"
    );
    ensure!(server.accepted()?.is_empty());
    let labels = [("reason", "unknown_address"), ("pod", "client")];
    wait_for_metric(cluster.node(0), "weft_refused_total", &labels, 2.0).map(drop)
}

pub(crate) fn outside(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let node = cluster.node(1);
    let program = node.host_command(&testapp::path()?.display().to_string())?;
    let listen = ["0.0.0.0:7017".to_owned(), "[::]:7017".to_owned()];
    let server = Server::spawn(program, &listen, "echo", &[])?;
    let targets = [
        (IpAddr::V4(node.v4()), 7017).into(),
        (IpAddr::V6(node.v6()), 7017).into(),
    ];
    for (family, target) in targets.into_iter().enumerate() {
        expect_echo(&pods.client, target, "to-the-world")?;
        let accepted = server.wait_accepted(family + 1)?.remove(family);
        ensure!(
            accepted.accepted.ip() == pods.client.addresses()[family],
            "{accepted:?}"
        );
    }
    Ok(())
}

pub(crate) fn udp(_: &Cluster, pods: &Pods) -> Result<()> {
    for target in pods.server.sockets(7018) {
        let mut echo = testapp::command(&pods.server)?
            .args(["udp-echo", "--listen", &target.to_string()])
            .spawn()?;
        echo.wait_for_line("listening", Duration::from_secs(5))?;
        let reply = testapp::command(&pods.client)?
            .args(["udp-ping", &target.to_string(), "datagram"])
            .run()?;
        ensure!(
            reply.contains("\"ok\"") && reply.contains("datagram"),
            "{reply}"
        );
    }
    Ok(())
}

pub(crate) fn unmeshed(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let other = cluster.add_pod(PodSpec::new("other-plain").on(0).unmeshed())?;
    let server = Server::start(&pods.plain, 7019, "echo", &[])?;
    let capture = Capture::start(cluster.node(0).netns(), "eth0", cluster.dir())?;
    for (family, target) in pods.plain.sockets(7019).into_iter().enumerate() {
        let said = expect_echo(&other, target, "untouched")?;
        let accepted = server.wait_accepted(family + 1)?.remove(family);
        ensure!(
            Some(accepted.accepted) == said.local,
            "{accepted:?} {said:?}"
        );
    }
    ensure!(
        capture.finish()?.contains(b"untouched"),
        "it was not on the wire"
    );
    cluster.remove_pod(other)
}

pub(crate) fn source_is_destination(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let server = Server::start(&pods.server, 7020, "echo", &[])?;
    for target in pods.server.sockets(7020) {
        for source_port in [7020, 31001] {
            let source = SocketAddr::new(target.ip(), source_port);
            testapp::command(&pods.plain)?
                .args([
                    "syn",
                    "--source",
                    &source.to_string(),
                    "--destination",
                    &target.to_string(),
                ])
                .run()?;
        }
    }
    // Nothing came of it, and the server works on. One accepted connection is the real one's.
    expect_echo(&pods.client, pods.server.sockets(7020)[1], "still there")?;
    let accepted = server.accepted()?;
    ensure!(accepted.len() == 1, "{accepted:?}");
    ensure!(cluster.node(1).agent_is_running());
    Ok(())
}
