//! Redirection: what a pod connects to, from where, and what both sides see of each other.

mod clients;
mod servers;
mod strangers;

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use weft_tests::capture::Capture;
use weft_tests::manifests::ServiceSpec;
use weft_tests::metrics::wait_for_metric;
use weft_tests::scenario::{Watch, eventually, expect_echo, expect_refusal};
use weft_tests::testapp::Server;
use weft_tests::{Checks, Cluster, Pod, PodSpec};

/// The pods that all checks share.
struct Pods {
    client: Pod,
    server: Pod,
    neighbour: Pod,
    plain: Pod,
}

#[test]
fn interception() {
    let cluster = Cluster::start().expect("a cluster");
    let add = |spec| cluster.add_pod(spec).expect("a pod");
    let pods = Pods {
        client: add(PodSpec::new("client").on(0).deployment("shop")),
        server: add(PodSpec::new("server").on(1)),
        neighbour: add(PodSpec::new("neighbour").on(0)),
        plain: add(PodSpec::new("plain").on(1).unmeshed()),
    };
    let mut checks = Checks::new("interception");
    let mut check = |name: &str, run: fn(&Cluster, &Pods) -> Result<()>| {
        checks.check(name, || run(&cluster, &pods));
    };
    check("both sides see each other's real addresses", addresses);
    check("a Service is reached, on both families", service);
    check("pods of a node do not use the network", same_node);
    check("IPv4 through an IPv6 socket", clients::mapped);
    check(
        "explicit source ports and addresses, used again",
        clients::source_ports,
    );
    check("non-blocking connects", clients::nonblocking);
    check("bound to a device", clients::device);
    check("MPTCP sockets", clients::mptcp);
    check("Fast Open sockets", clients::fast_open);
    check(
        "a pod reaches its own address and Service",
        clients::hairpin,
    );
    check("loopback is left alone", clients::loopback);
    check(
        "an application bound to its address only",
        servers::bound_to_address,
    );
    check(
        "an application bound to loopback stays private",
        servers::bound_to_loopback,
    );
    check("a dual-stack socket takes both", servers::dual_stack);
    check(
        "a port where nothing listens looks so",
        servers::nothing_listens,
    );
    check(
        "the agent's ports cannot be connected to",
        servers::agent_ports,
    );
    check(
        "unmeshed pods reach meshed ones and are reached",
        strangers::plaintext,
    );
    check(
        "an unknown address inside the ranges is refused",
        strangers::unknown_address,
    );
    check("addresses outside are reached", strangers::outside);
    check("UDP is untouched", strangers::udp);
    check("unmeshed pods are untouched", strangers::unmeshed);
    check(
        "a SYN with source = destination goes nowhere",
        strangers::source_is_destination,
    );
    check("metrics name both sides and count bytes", metrics);
    checks.finish();
}

fn addresses(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let server = Server::start(&pods.server, 7000, "echo", &[])?;
    let watch = Watch::start(cluster, &[&pods.client, &pods.server])?;
    for (family, target) in pods.server.sockets(7000).into_iter().enumerate() {
        let said = expect_echo(&pods.client, target, "who-is-there")?;
        ensure!(
            said.peer == Some(target),
            "getpeername of the client: {said:?}"
        );
        let local = said.local.context("no getsockname")?;
        ensure!(
            local.ip() == pods.client.addresses()[family],
            "getsockname of the client: {said:?}"
        );
        let accepted = server.wait_accepted(family + 1)?.remove(family);
        ensure!(
            accepted.accepted == local,
            "accept, port included: {accepted:?} of {said:?}"
        );
        ensure!(
            accepted.peer == Some(accepted.accepted),
            "getpeername of the server: {accepted:?}"
        );
        ensure!(
            accepted.local == Some(target),
            "getsockname of the server: {accepted:?}"
        );
    }
    watch.finish_encrypted(&["who-is-there"]).map(drop)
}

fn service(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let _server = Server::start(&pods.server, 7001, "echo", &[])?;
    let spec = ServiceSpec::new("echo")
        .select("app", "server")
        .port(80, 7001);
    let addresses = cluster.add_service(&spec)?;
    let watch = Watch::start(cluster, &[&pods.client, &pods.server])?;
    for address in addresses {
        let target = SocketAddr::new(address, 80);
        eventually("the Service to be there", || {
            expect_echo(&pods.client, target, "by-service").map(drop)
        })?;
        let said = expect_echo(&pods.client, target, "by-service")?;
        ensure!(
            said.peer == Some(target),
            "the client must see the Service's address: {said:?}"
        );
        expect_refusal(&pods.client, SocketAddr::new(address, 81), "no such port")?;
    }
    watch.finish_encrypted(&["by-service"])?;
    let labels = [
        ("dst_service", "echo"),
        ("pod", "client"),
        ("peer", "src"),
        ("tls", "true"),
    ];
    wait_for_metric(cluster.node(0), "tcp_open_total", &labels, 2.0).map(drop)
}

fn same_node(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let server = Server::start(&pods.neighbour, 7002, "echo", &[])?;
    let captures = [
        Capture::start(cluster.node(0).netns(), "eth0", cluster.dir())?,
        Capture::start(pods.client.netns(), "eth0", cluster.dir())?,
        Capture::start(pods.neighbour.netns(), "eth0", cluster.dir())?,
    ];
    for (family, target) in pods.neighbour.sockets(7002).into_iter().enumerate() {
        expect_echo(&pods.client, target, "next-door")?;
        let accepted = server.wait_accepted(family + 1)?.remove(family);
        ensure!(
            accepted.accepted.ip() == pods.client.addresses()[family],
            "{accepted:?}"
        );
    }
    for capture in captures {
        let captured = capture.finish()?;
        let tcp: Vec<_> = captured
            .tcp_packets()
            .filter(|packet| {
                pods.neighbour
                    .addresses()
                    .contains(&packet.destination.ip())
            })
            .filter(|packet| pods.client.addresses().contains(&packet.source.ip()))
            .collect();
        ensure!(
            tcp.is_empty(),
            "{} packets of a same-node flow are on an interface",
            tcp.len()
        );
    }
    let labels = [
        ("pod", "client"),
        ("dst_pod", "neighbour"),
        ("no_tls_reason", "same_node"),
    ];
    wait_for_metric(cluster.node(0), "tcp_open_total", &labels, 2.0).map(drop)
}

fn metrics(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let _server = Server::start(&pods.server, 7021, "echo", &[])?;
    let client_id = pods.client.identity();
    let server_id = pods.server.identity();
    let outbound = [
        ("direction", "outbound"),
        ("peer", "src"),
        ("namespace", "default"),
        ("deployment", "shop"),
        ("pod", "client"),
        ("dst_namespace", "default"),
        ("dst_pod", "server"),
        ("tls", "true"),
        ("server_id", &server_id),
    ];
    let inbound = [
        ("direction", "inbound"),
        ("peer", "src"),
        ("pod", "server"),
        ("tls", "true"),
        ("client_id", &client_id),
    ];
    let before = (cluster.node(0).metrics()?, cluster.node(1).metrics()?);
    let text = "x".repeat(1000);
    expect_echo(&pods.client, pods.server.sockets(7021)[0], &text)?;
    for (node, metrics, labels) in [
        (0, &before.0, outbound.as_slice()),
        (1, &before.1, inbound.as_slice()),
    ] {
        let node = cluster.node(node);
        for (name, more) in [
            ("tcp_open_total", 1.0),
            ("tcp_close_total", 1.0),
            ("tcp_read_bytes_total", 1000.0),
            ("tcp_write_bytes_total", 1000.0),
        ] {
            let least = metrics.sum(name, labels) + more;
            let value = wait_for_metric(node, name, labels, least)?;
            ensure!(
                (value - least).abs() < 0.5,
                "{name} is {value}, not {least}"
            );
        }
    }
    let allow = [
        ("pod", "server"),
        ("client_id", client_id.as_str()),
        ("tls", "true"),
    ];
    wait_for_metric(
        cluster.node(1),
        "inbound_tcp_authz_allow_total",
        &allow,
        1.0,
    )
    .map(drop)
}
