//! `weft/1` against an independent client that does as `docs/wire.md` says, or not; and between agents.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, ensure};
use weft_tests::manifests::{authorization, server};
use weft_tests::metrics::wait_for_metric;
use weft_tests::pki::{Authority, Identity};
use weft_tests::scenario::{Watch, eventually, expect_echo};
use weft_tests::testapp::Server;
use weft_tests::weft1::{END, Tunnel, data, open};
use weft_tests::{Checks, Cluster, ClusterOptions, Pod, PodSpec};

/// What all checks share.
struct Wire {
    cluster: Cluster,
    /// Not meshed: nothing of Weft is on the way from here to the listener.
    outside: Pod,
    client: Pod,
    server: Pod,
    authority: Authority,
}

#[test]
fn weft1() {
    let cluster = Cluster::start().expect("a cluster");
    let add = |spec| cluster.add_pod(spec).expect("a pod");
    let wire = Wire {
        outside: add(PodSpec::new("outside").on(0).unmeshed()),
        client: add(PodSpec::new("client").on(0)),
        server: add(PodSpec::new("server").on(1)),
        authority: Authority::of_cluster(cluster.controller().expect("a controller").ca_dir())
            .expect("the authority"),
        cluster,
    };
    let _echo = Server::start(&wire.server, 7400, "echo", &[]).expect("a server");
    let mut checks = Checks::new("weft1");
    let mut check = |name: &str, run: fn(&Wire) -> Result<()>| checks.check(name, || run(&wire));
    check("agents carry flows by it, encrypted", between_agents);
    check(
        "a flow with early bytes, and another on the same connection",
        two_flows,
    );
    check("the client's port is told", source_port);
    check("half-close both ways", half_close);
    check(
        "nothing listens: refused, and the connection stays good",
        nothing_listens,
    );
    check("policy denies: refused, no byte passes", denied);
    check("the mesh's own port", own_port);
    check("an abort resets the application", abort);
    check(
        "an application's reset ends the connection",
        reset_by_application,
    );
    check("frames out of order", out_of_order);
    check("frames cut anywhere", cut_anywhere);
    check("an idle connection stays", idle);
    check("new keys", new_keys);
    check("a change of policy ends a flow", policy_change);
    check("an agent that leaves says so", leaving);
    checks.finish();
}

/// Agents of which only one speaks `weft/1`, as in an upgrade, or where it was turned off.
#[test]
fn mixed() {
    let cluster = Cluster::with(ClusterOptions {
        node_args: vec![(1, vec!["--tunnel".into(), "weft-h2".into()])],
        ..ClusterOptions::default()
    })
    .expect("a cluster");
    let add = |spec| cluster.add_pod(spec).expect("a pod");
    let outside = add(PodSpec::new("outside").on(0).unmeshed());
    let speaks = add(PodSpec::new("speaks").on(0));
    let does_not = add(PodSpec::new("does-not").on(1));
    let _first = Server::start(&speaks, 7400, "echo", &[]).expect("a server");
    let _second = Server::start(&does_not, 7400, "echo", &[]).expect("a server");
    let mut checks = Checks::new("mixed");
    for (name, from, to) in [
        ("to an agent that does not speak it", &speaks, &does_not),
        ("from an agent that does not speak it", &does_not, &speaks),
    ] {
        checks.check(name, || {
            let watch = Watch::start(&cluster, &[from, to])?;
            for target in to.sockets(7400) {
                for _ in 0..10 {
                    expect_echo(from, target, "whatever-it-speaks")?;
                }
            }
            let captured = watch.finish_encrypted(&["whatever-it-speaks"])?;
            let handshakes = captured.tls(15008).client_hellos;
            // For each address one that finds out, and one that is used.
            ensure!(handshakes <= 4, "{handshakes} handshakes for 20 flows");
            let labels = [
                ("direction", "inbound"),
                ("pod", to.name()),
                ("tls", "true"),
            ];
            let node = cluster.node(to.node_index());
            wait_for_metric(node, "tcp_open_total", &labels, 20.0).map(drop)
        });
    }
    checks.check("what is turned off is not accepted", || {
        let ca = cluster.controller()?.ca_dir();
        let identity = Authority::of_cluster(ca)?.sign(GOOD_ID)?;
        let connect = |to: &Pod| Tunnel::connect(outside.netns(), to.sockets(7400)[0], &identity);
        connect(&speaks)?;
        ensure!(connect(&does_not).is_err(), "it was accepted");
        Ok(())
    });
    checks.finish();
}

fn identity(wire: &Wire) -> Result<Identity> {
    wire.authority.sign(GOOD_ID)
}

fn target(wire: &Wire, port: u16) -> SocketAddr {
    wire.server.sockets(port)[0]
}

fn connect(wire: &Wire) -> Result<Tunnel> {
    connect_to(wire, target(wire, 7400))
}

fn connect_to(wire: &Wire, target: SocketAddr) -> Result<Tunnel> {
    Tunnel::connect(wire.outside.netns(), target, &identity(wire)?)
}

fn between_agents(wire: &Wire) -> Result<()> {
    let watch = Watch::start(&wire.cluster, &[&wire.client, &wire.server])?;
    for target in wire.server.sockets(7400) {
        for _ in 0..20 {
            expect_echo(&wire.client, target, "one-after-the-other")?;
        }
    }
    let captured = watch.finish_encrypted(&["one-after-the-other"])?;
    let handshakes = captured.tls(15008).client_hellos;
    ensure!(handshakes <= 6, "{handshakes} handshakes for 40 flows");
    let labels = [("direction", "inbound"), ("pod", "server"), ("tls", "true")];
    wait_for_metric(wire.cluster.node(1), "tcp_open_total", &labels, 40.0).map(drop)
}

fn two_flows(wire: &Wire) -> Result<()> {
    for target in wire.server.sockets(7400) {
        let mut tunnel = connect_to(wire, target)?;
        for text in [&b"first"[..], b"second", &[7; 60_000]] {
            tunnel.open(7400, 0, text)?;
            tunnel.accepted()?;
            ensure!(tunnel.receive(text.len())? == text);
            tunnel.send(&[&data(b"more")[..], &END].concat())?;
            ensure!(tunnel.receive_all()? == b"more");
        }
    }
    Ok(())
}

fn source_port(wire: &Wire) -> Result<()> {
    let app = Server::start(&wire.server, 7401, "echo", &[])?;
    let mut tunnel = connect(wire)?;
    tunnel.open(7401, 43210, b"")?;
    tunnel.accepted()?;
    let client = SocketAddr::new(wire.outside.v4().into(), 43210);
    let peer = app.wait_accepted(1)?[0].peer;
    ensure!(peer == Some(client), "{peer:?}");
    Ok(())
}

fn half_close(wire: &Wire) -> Result<()> {
    let _app = Server::start(&wire.server, 7402, "greet", &[])?;
    let mut tunnel = connect(wire)?;
    // The client first, then the server.
    tunnel.open(7400, 0, b"")?;
    tunnel.accepted()?;
    tunnel.send(&[&data(&[3; 100_000])[..], &END].concat())?;
    ensure!(tunnel.receive_all()?.len() == 100_000);
    // The server speaks first.
    tunnel.open(7402, 0, b"")?;
    tunnel.accepted()?;
    let greeting = tunnel.frame()?;
    ensure!(
        greeting.kind == 4 && !greeting.payload.is_empty(),
        "{greeting:?}"
    );
    tunnel.send(&END)?;
    Ok(())
}

fn nothing_listens(wire: &Wire) -> Result<()> {
    let mut tunnel = connect(wire)?;
    for early in [&b""[..], &[1; 60_000]] {
        tunnel.open(7999, 0, early)?;
        let refused = tunnel.refused()?;
        ensure!(
            refused == (503, "connect_refused".to_owned()),
            "{refused:?}"
        );
        tunnel.send(&END)?;
    }
    tunnel.open(7400, 0, b"still good")?;
    tunnel.accepted()?;
    ensure!(tunnel.receive(10)? == b"still good");
    // Too much for a flow that was refused.
    let mut tunnel = connect(wire)?;
    tunnel.open(7999, 0, b"")?;
    let _ = tunnel.send(&data(&[0; 200_000]));
    tunnel.ended().map(drop)
}

fn denied(wire: &Wire) -> Result<()> {
    let app = Server::start(&wire.server, 7403, "echo", &[])?;
    let guard = server("default", "weft1", "server", 7403);
    let rule = authorization("default", "weft1", "weft1", &["friend"]);
    // The rule first: the Server alone would deny the friend too.
    wire.cluster.apply(&rule)?;
    wire.cluster.apply(&guard)?;
    let mut tunnel = connect(wire)?;
    eventually("the policy to be in effect", || {
        tunnel = connect(wire)?;
        tunnel.open(7403, 0, b"")?;
        let refused = tunnel.refused()?;
        ensure!(refused == (401, "denied".to_owned()), "{refused:?}");
        Ok(())
    })?;
    tunnel.send(&END)?;
    let accepted = app.accepted()?.len();
    tunnel.open(7403, 0, b"let me in")?;
    let refused = tunnel.refused()?;
    ensure!(refused.0 == 401, "{refused:?}");
    let friend = wire
        .authority
        .sign("spiffe://cluster.local/ns/default/sa/friend")?;
    let mut tunnel = Tunnel::connect(wire.outside.netns(), target(wire, 7403), &friend)?;
    tunnel.open(7403, 0, b"friend")?;
    tunnel.accepted()?;
    ensure!(tunnel.receive(6)? == b"friend");
    ensure!(
        app.accepted()?.len() == accepted + 1,
        "a denied client reached the application"
    );
    let labels = [
        ("direction", "inbound"),
        ("pod", "server"),
        ("target_port", "7403"),
    ];
    wait_for_metric(
        wire.cluster.node(1),
        "inbound_tcp_authz_deny_total",
        &labels,
        2.0,
    )?;
    wire.cluster.remove(&guard)?;
    wire.cluster.remove(&rule)
}

fn own_port(wire: &Wire) -> Result<()> {
    let mut tunnel = connect(wire)?;
    tunnel.open(15008, 0, b"x")?;
    let refused = tunnel.refused()?;
    ensure!(refused.0 == 400, "{refused:?}");
    tunnel.send(&END)?;
    tunnel.open(7400, 0, b"x")?;
    tunnel.accepted()
}

fn abort(wire: &Wire) -> Result<()> {
    let app = Server::start(&wire.server, 7404, "echo", &[])?;
    let mut tunnel = connect(wire)?;
    tunnel.open(7404, 0, b"x")?;
    tunnel.accepted()?;
    tunnel.receive(1)?;
    tunnel.cut()?;
    let outcome = app.wait_closed(1)?[0].outcome.clone();
    ensure!(outcome == "reset", "a cut looked like {outcome}");
    Ok(())
}

fn reset_by_application(wire: &Wire) -> Result<()> {
    let _app = Server::start(&wire.server, 7405, "reset", &[])?;
    let mut tunnel = connect(wire)?;
    tunnel.open(7405, 0, b"x")?;
    tunnel.accepted()?;
    // No frame ends the direction.
    while let Ok(frame) = tunnel.frame() {
        ensure!(frame.flags == 0, "{frame:?}");
    }
    Ok(())
}

fn out_of_order(wire: &Wire) -> Result<()> {
    let reserved = [("reason", "bad_request"), ("pod", "server")];
    let node = wire.cluster.node(1);
    let before = node.metrics()?.sum("weft_refused_total", &reserved);
    let good = open(7400, 0);
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("data before open", data(b"x")),
        ("end before open", END.to_vec()),
        ("an answer", vec![2, 0, 0, 0]),
        ("a refusal", vec![3, 0, 0, 3, 1, 0xf7, 0]),
        ("leaving", vec![5, 0, 0, 0]),
        ("unknown", vec![200, 0, 0, 0]),
        ("a second open", [&good[..], &good].concat()),
        (
            "data after the end",
            [&good[..], &END, &data(b"x")].concat(),
        ),
        ("empty data", [&good[..], &[4, 0, 0, 0]].concat()),
        ("too long", [&good[..], &[4, 0, 0xff, 0xff]].concat()),
        ("unknown flags", [&good[..], &[4, 8, 0, 1, 0]].concat()),
        ("port 0", open(0, 0)),
        ("a long open", [&[1, 0, 4, 1][..], &[0; 1025]].concat()),
    ];
    for (name, bytes) in &cases {
        let mut tunnel = connect(wire)?;
        tunnel.send(bytes)?;
        let ended = tunnel.ended();
        ensure!(ended.is_ok(), "{name}: {ended:?}");
    }
    let counted = before + cases.len() as f64 - 1.0;
    wait_for_metric(node, "weft_refused_total", &reserved, counted).map(drop)
}

fn cut_anywhere(wire: &Wire) -> Result<()> {
    let mut tunnel = connect(wire)?;
    // An open with metadata that nobody knows, and data; each byte a record.
    let mut bytes = vec![1, 0, 0, 10, 0x1c, 0xe8, 0, 0, 0xff, 0xff, 0, 2, 1, 2];
    bytes.extend(data(b"byte by byte"));
    bytes.extend(END);
    for byte in bytes {
        tunnel.send(&[byte])?;
    }
    tunnel.accepted()?;
    ensure!(tunnel.receive_all()? == b"byte by byte");
    // And many frames in one record.
    let mut bytes = open(7400, 0);
    for _ in 0..500 {
        bytes.extend(data(b"tiny"));
    }
    bytes.extend(END);
    tunnel.send(&bytes)?;
    tunnel.accepted()?;
    ensure!(tunnel.receive_all()?.len() == 2000);
    Ok(())
}

fn idle(wire: &Wire) -> Result<()> {
    let mut tunnel = connect(wire)?;
    tunnel.stays_silent(Duration::from_secs(3))?;
    tunnel.open(7400, 0, b"awake")?;
    tunnel.accepted()?;
    ensure!(tunnel.receive(5)? == b"awake");
    tunnel.stays_silent(Duration::from_secs(2))?;
    tunnel.send(&END)?;
    ensure!(tunnel.receive_all()?.is_empty());
    tunnel.stays_silent(Duration::from_secs(2))
}

fn new_keys(wire: &Wire) -> Result<()> {
    let mut tunnel = connect(wire)?;
    tunnel.open(7400, 0, b"")?;
    tunnel.accepted()?;
    for _ in 0..10 {
        tunnel.change_keys()?;
        tunnel.send(&data(b"under new keys"))?;
        ensure!(tunnel.receive(14)? == b"under new keys");
    }
    for _ in 0..20 {
        tunnel.change_keys()?;
    }
    let _ = tunnel.send(&[]);
    tunnel.ended().map(drop)
}

fn policy_change(wire: &Wire) -> Result<()> {
    let _app = Server::start(&wire.server, 7406, "echo", &[])?;
    let mut tunnel = connect(wire)?;
    tunnel.open(7406, 0, b"x")?;
    tunnel.accepted()?;
    tunnel.receive(1)?;
    let guard = server("default", "weft1-late", "server", 7406);
    wire.cluster.apply(&guard)?;
    let ended = tunnel.ended();
    wire.cluster.remove(&guard)?;
    ended.map(drop)
}

fn leaving(wire: &Wire) -> Result<()> {
    let mut idle = connect(wire)?;
    idle.open(7400, 0, b"x")?;
    idle.accepted()?;
    ensure!(idle.receive(1)? == b"x");
    idle.send(&END)?;
    ensure!(idle.receive_all()?.is_empty());
    let mut busy = connect(wire)?;
    busy.open(7400, 0, b"x")?;
    busy.accepted()?;
    busy.receive(1)?;
    wire.cluster.node(1).stop_agent()?;
    let frame = idle.frame()?;
    ensure!(frame.kind == 5, "{frame:?}");
    busy.ended()?;
    wire.cluster.node(1).start_agent()?;
    wire.cluster.node(1).wait_ready()?;
    for target in wire.server.sockets(7400) {
        expect_echo(&wire.client, target, "after-the-restart")?;
    }
    Ok(())
}

const GOOD_ID: &str = "spiffe://cluster.local/ns/default/sa/good";
