//! Redirection: what a pod connects to, from where, and what both sides see of each other.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use weft_tests::capture::Capture;
use weft_tests::command::listening;
use weft_tests::manifests::ServiceSpec;
use weft_tests::metrics::wait_for_metric;
use weft_tests::scenario::{REFUSED, Watch, eventually, expect_echo, expect_refusal};
use weft_tests::testapp::{self, Server};
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
    check("IPv4 through an IPv6 socket", mapped);
    check(
        "explicit source ports and addresses, used again",
        source_ports,
    );
    check("non-blocking connects", nonblocking);
    check("bound to a device", device);
    check("MPTCP sockets", mptcp);
    check("Fast Open sockets", fast_open);
    check("a pod reaches its own address and Service", hairpin);
    check("loopback is left alone", loopback);
    check("an application bound to its address only", bound_to_address);
    check(
        "an application bound to loopback stays private",
        bound_to_loopback,
    );
    check("a dual-stack socket takes both", dual_stack);
    check("a port where nothing listens looks so", nothing_listens);
    check("the agent's ports cannot be connected to", agent_ports);
    check("unmeshed pods reach meshed ones and are reached", plaintext);
    check(
        "an unknown address inside the ranges is refused",
        unknown_address,
    );
    check("addresses outside are reached", outside);
    check("UDP is untouched", udp);
    check("unmeshed pods are untouched", unmeshed);
    check(
        "a SYN with source = destination goes nowhere",
        source_is_destination,
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
            accepted.accepted.ip() == pods.client.addresses()[family],
            "accept: {accepted:?}"
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

fn mapped(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let server = Server::start(&pods.server, 7003, "echo", &[])?;
    let watch = Watch::start(cluster, &[&pods.client, &pods.server])?;
    let target = SocketAddr::new(IpAddr::V6(pods.server.v4().to_ipv6_mapped()), 7003);
    let said = expect_echo(&pods.client, target, "mapped-address")?;
    ensure!(said.peer == Some(target), "{said:?}");
    let local = said.local.context("no getsockname")?;
    ensure!(
        local.ip().to_canonical() == pods.client.addresses()[0],
        "{said:?}"
    );
    let accepted = server.wait_accepted(1)?.remove(0);
    ensure!(
        accepted.accepted.ip() == pods.client.addresses()[0],
        "{accepted:?}"
    );
    watch.finish_encrypted(&["mapped-address"]).map(drop)
}

fn source_ports(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let _a = Server::start(&pods.server, 7004, "echo", &[])?;
    let _b = Server::start(&pods.server, 7005, "echo", &[])?;
    let watch = Watch::start(cluster, &[&pods.client, &pods.server])?;
    for family in 0..2 {
        let own = pods.client.addresses()[family].to_string();
        for round in 0..4 {
            for port in [7004, 7005] {
                let target = pods.server.sockets(port)[family];
                let mut args = vec![
                    "--source-port",
                    "31000",
                    "--send",
                    "same-port",
                    "--half-close",
                ];
                // Half of the rounds bind the address as well.
                if round % 2 == 1 {
                    args.extend(["--bind", &own]);
                }
                let got = testapp::connect(&pods.client, target, &args)?;
                ensure!(
                    got.outcome == "ok" && got.text == "same-port",
                    "round {round} to {target}: {got:?}"
                );
            }
        }
    }
    watch.finish_encrypted(&["same-port"]).map(drop)
}

fn nonblocking(_: &Cluster, pods: &Pods) -> Result<()> {
    let _server = Server::start(&pods.server, 7006, "echo", &[])?;
    for target in pods.server.sockets(7006) {
        let args = ["--nonblocking", "--send", "later", "--half-close"];
        let got = testapp::connect(&pods.client, target, &args)?.expect(&["ok"])?;
        ensure!(got.text == "later" && got.peer == Some(target), "{got:?}");
    }
    Ok(())
}

fn device(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let _server = Server::start(&pods.server, 7007, "echo", &[])?;
    let watch = Watch::start(cluster, &[&pods.client, &pods.server])?;
    for target in pods.server.sockets(7007) {
        let args = [
            "--device",
            "eth0",
            "--send",
            "bound-to-device",
            "--half-close",
            "--timeout-ms",
            "3000",
        ];
        let got = testapp::connect(&pods.client, target, &args)?;
        let worked = got.outcome == "ok" && got.text == "bound-to-device";
        ensure!(worked || REFUSED.contains(&got.outcome.as_str()), "{got:?}");
    }
    watch.finish(&["bound-to-device"]).map(drop)
}

fn mptcp(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let _server = Server::start(&pods.server, 7008, "echo", &[])?;
    let watch = Watch::start(cluster, &[&pods.client, &pods.server])?;
    for target in pods.server.sockets(7008) {
        let got = testapp::connect(
            &pods.client,
            target,
            &["--mptcp", "--send", "many-paths", "--half-close"],
        )?;
        ensure!(got.stage != "socket", "this kernel has no MPTCP: {got:?}");
        ensure!(got.outcome == "ok" && got.text == "many-paths", "{got:?}");
    }
    watch.finish_encrypted(&["many-paths"]).map(drop)
}

fn fast_open(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let _server = Server::start(&pods.server, 7009, "echo", &[])?;
    let watch = Watch::start(cluster, &[&pods.client, &pods.server])?;
    for target in pods.server.sockets(7009) {
        for option in ["connect", "sendto"] {
            let out = pods
                .client
                .command("python3")?
                .args([
                    "-c",
                    FAST_OPEN,
                    &target.ip().to_string(),
                    &target.port().to_string(),
                    option,
                ])
                .run()?;
            ensure!(
                out.trim() == "fast-open-data",
                "{option} to {target}: {out}"
            );
        }
    }
    watch.finish_encrypted(&["fast-open-data"]).map(drop)
}

/// Both ways: `TCP_FASTOPEN_CONNECT` (30) before connecting, and `MSG_FASTOPEN` (0x20000000).
const FAST_OPEN: &str = r#"
import socket, sys
host, port, option = sys.argv[1], int(sys.argv[2]), sys.argv[3]
s = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
s.settimeout(5)
if option == "connect":
    s.setsockopt(socket.IPPROTO_TCP, 30, 1)
    s.connect((host, port))
    s.sendall(b"fast-open-data")
else:
    s.sendto(b"fast-open-data", 0x20000000, (host, port))
s.shutdown(socket.SHUT_WR)
data = b""
while True:
    part = s.recv(100)
    if not part:
        break
    data += part
print(data.decode())
"#;

fn hairpin(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let server = Server::start(&pods.client, 7010, "echo", &[])?;
    for (family, target) in pods.client.sockets(7010).into_iter().enumerate() {
        let said = expect_echo(&pods.client, target, "myself")?;
        ensure!(said.peer == Some(target), "{said:?}");
        let accepted = server.wait_accepted(family + 1)?.remove(family);
        ensure!(accepted.accepted.ip() == target.ip(), "{accepted:?}");
    }
    let spec = ServiceSpec::new("myself")
        .select("app", "client")
        .port(80, 7010);
    for address in cluster.add_service(&spec)? {
        let target = SocketAddr::new(address, 80);
        eventually("the pod's own Service", || {
            expect_echo(&pods.client, target, "by-service").map(drop)
        })?;
    }
    Ok(())
}

fn loopback(_: &Cluster, pods: &Pods) -> Result<()> {
    let server = Server::start(&pods.client, 7011, "echo", &[])?;
    for (count, address) in ["127.0.0.1:7011", "127.9.8.7:7011", "[::1]:7011"]
        .iter()
        .enumerate()
    {
        let target: SocketAddr = address.parse()?;
        let said = expect_echo(&pods.client, target, "home")?;
        ensure!(said.peer == Some(target), "{said:?}");
        let accepted = server.wait_accepted(count + 1)?.remove(count);
        ensure!(
            Some(accepted.accepted) == said.local,
            "{accepted:?} {said:?}"
        );
    }
    testapp::connect(&pods.client, "127.0.0.1:7999".parse()?, &[])?
        .expect(&["refused"])
        .map(drop)
}

fn bound_to_address(cluster: &Cluster, pods: &Pods) -> Result<()> {
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

fn bound_to_loopback(_: &Cluster, pods: &Pods) -> Result<()> {
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

fn dual_stack(_: &Cluster, pods: &Pods) -> Result<()> {
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

fn nothing_listens(_: &Cluster, pods: &Pods) -> Result<()> {
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

fn agent_ports(cluster: &Cluster, pods: &Pods) -> Result<()> {
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

fn plaintext(cluster: &Cluster, pods: &Pods) -> Result<()> {
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

fn unknown_address(cluster: &Cluster, pods: &Pods) -> Result<()> {
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

fn outside(cluster: &Cluster, pods: &Pods) -> Result<()> {
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

fn udp(_: &Cluster, pods: &Pods) -> Result<()> {
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

fn unmeshed(cluster: &Cluster, pods: &Pods) -> Result<()> {
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

fn source_is_destination(cluster: &Cluster, pods: &Pods) -> Result<()> {
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
