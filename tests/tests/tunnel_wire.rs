//! The tunnel listener against an independent client that does as `docs/wire.md` says, or not.

use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use anyhow::{Result, bail, ensure};
use http::Method;
use weft_tests::capture::Capture;
use weft_tests::hbone::{Answer, Attempt};
use weft_tests::manifests::{authorization, server};
use weft_tests::metrics::wait_for_metric;
use weft_tests::pki::Authority;
use weft_tests::scenario::{eventually, expect_echo};
use weft_tests::testapp::{self, Server};
use weft_tests::{Checks, Cluster, ClusterOptions, Pod, PodSpec};

#[test]
fn forced_tunnels() {
    let cluster = Cluster::with(ClusterOptions {
        nodes: 1,
        controller_args: vec!["--force-tunnels".into()],
        ..ClusterOptions::default()
    })
    .expect("a cluster");
    let client = cluster.add_pod(PodSpec::new("client")).expect("a pod");
    let server = cluster.add_pod(PodSpec::new("server")).expect("a pod");
    let mut checks = Checks::new("forced_tunnels");
    checks.check(
        "pods of one node use tunnels where that is asked for",
        || one_node(&cluster, &client, &server),
    );
    checks.finish();
}

fn one_node(cluster: &Cluster, client: &Pod, server: &Pod) -> Result<()> {
    let _app = Server::start(server, 7310, "echo", &[])?;
    let capture = Capture::start(server.netns(), "eth0", cluster.dir())?;
    for target in server.sockets(7310) {
        expect_echo(client, target, "forced-into-a-tunnel")?;
    }
    let captured = capture.finish()?;
    captured.ensure_without("forced-into-a-tunnel")?;
    captured.ensure_only_tunnels(&[client.addresses(), server.addresses()].concat())?;
    ensure!(
        captured.tls(15008).application_data > 0,
        "{:?}",
        captured.tls(15008)
    );
    let metrics = cluster.node(0).metrics()?;
    let same_node = [("dst_pod", "server"), ("no_tls_reason", "same_node")];
    ensure!(
        metrics.sum("tcp_open_total", &same_node) == 0.0,
        "handed over all the same"
    );
    let tunnels = [("dst_pod", "server"), ("tls", "true")];
    wait_for_metric(cluster.node(0), "tcp_open_total", &tunnels, 2.0).map(drop)
}

/// What all checks share.
struct Wire {
    cluster: Cluster,
    /// Not meshed: nothing of Weft is on the way from here to the listener.
    outside: Pod,
    server: Pod,
    other: Pod,
    authority: Authority,
}

#[test]
fn tunnel_wire() {
    let cluster = Cluster::start().expect("a cluster");
    let add = |spec| cluster.add_pod(spec).expect("a pod");
    let wire = Wire {
        outside: add(PodSpec::new("outside").on(0).unmeshed()),
        server: add(PodSpec::new("server").on(1)),
        other: add(PodSpec::new("other").on(1)),
        authority: Authority::of_cluster(cluster.controller().expect("a controller").ca_dir())
            .expect("the authority"),
        cluster,
    };
    let _app = Server::start(&wire.server, 7300, "echo", &[]).expect("a server");
    let mut checks = Checks::new("tunnel_wire");
    let mut check = |name: &str, run: fn(&Wire) -> Result<()>| checks.check(name, || run(&wire));
    check("HBONE carries a flow", hbone);
    check("weft-h2/1 carries a flow", weft_h2);
    check(
        "TLS 1.3, AES-GCM, hybrid key exchange, the pod's own certificate",
        tls_parameters,
    );
    check("the identity of the certificate decides", denied);
    check("an authority with another pod's address", other_address);
    check("authorities that are none", bad_authorities);
    check("a port where nothing listens", nothing_listens);
    check(
        "the mesh's own ports cannot be reached by a tunnel",
        own_ports,
    );
    check("other methods than CONNECT", other_methods);
    check("certificates that must not pass", bad_certificates);
    check("protocols that are not offered", bad_protocols);
    check("TLS 1.2", tls12);
    check("bytes that are not TLS", not_tls);
    check("agents among themselves go on after all that", still_works);
    checks.finish();
}

fn target(wire: &Wire) -> SocketAddr {
    wire.server.sockets(7300)[0]
}

fn good(wire: &Wire, target: SocketAddr) -> Result<Attempt> {
    Ok(Attempt::hbone(target, wire.authority.sign(GOOD_ID)?))
}

fn run(wire: &Wire, attempt: Attempt) -> Result<Answer> {
    attempt.run(wire.outside.netns())
}

fn hbone(wire: &Wire) -> Result<()> {
    for target in wire.server.sockets(7300) {
        let answer = run(wire, good(wire, target)?.sending(b"through the tunnel"))?;
        ensure!(answer.status == 200 && answer.ended, "{answer:?}");
        ensure!(answer.alpn.as_deref() == Some("h2"), "{answer:?}");
        ensure!(answer.received == b"through the tunnel", "{answer:?}");
    }
    let labels = [
        ("direction", "inbound"),
        ("pod", "server"),
        ("tls", "true"),
        ("client_id", GOOD_ID),
    ];
    wait_for_metric(wire.cluster.node(1), "tcp_open_total", &labels, 2.0).map(drop)
}

fn weft_h2(wire: &Wire) -> Result<()> {
    for target in wire.server.sockets(7300) {
        let attempt = good(wire, target)?
            .alpn(&["weft-h2/1", "h2"])
            .sending(b"between agents");
        let answer = run(wire, attempt)?;
        ensure!(answer.alpn.as_deref() == Some("weft-h2/1"), "{answer:?}");
        ensure!(
            answer.status == 200 && answer.received == b"between agents",
            "{answer:?}"
        );
    }
    Ok(())
}

fn tls_parameters(wire: &Wire) -> Result<()> {
    let answer = run(wire, good(wire, target(wire))?)?;
    ensure!(answer.tls_version == "TLSv1_3", "{answer:?}");
    ensure!(
        answer.cipher_suite.contains("AES") && answer.cipher_suite.contains("GCM"),
        "{answer:?}"
    );
    ensure!(answer.key_exchange == "X25519MLKEM768", "{answer:?}");
    ensure!(answer.server_id == wire.server.identity(), "{answer:?}");
    let answer = run(wire, good(wire, wire.other.sockets(1)[1])?)?;
    ensure!(
        answer.server_id == wire.other.identity(),
        "chosen by destination: {answer:?}"
    );
    Ok(())
}

fn denied(wire: &Wire) -> Result<()> {
    let app = Server::start(&wire.server, 7301, "echo", &[])?;
    let target = wire.server.sockets(7301)[0];
    let guard = server("default", "wire", "server", 7301);
    let rule = authorization("default", "wire", "wire", &["friend"]);
    // The rule first: the Server alone would deny the friend too.
    wire.cluster.apply(&rule)?;
    wire.cluster.apply(&guard)?;
    eventually("the policy to be in effect", || {
        let answer = run(wire, good(wire, target)?.sending(b"no friend"))?;
        ensure!(answer.status == 401, "{answer:?}");
        ensure!(answer.received.is_empty(), "{answer:?}");
        Ok(())
    })?;
    let accepted = app.accepted()?.len();
    for protocol in ["h2", "weft-h2/1"] {
        let answer = run(wire, good(wire, target)?.alpn(&[protocol]))?;
        ensure!(answer.status == 401, "{protocol}: {answer:?}");
        let friend = wire
            .authority
            .sign("spiffe://cluster.local/ns/default/sa/friend")?;
        let answer = run(
            wire,
            Attempt::hbone(target, friend)
                .alpn(&[protocol])
                .sending(b"friend"),
        )?;
        ensure!(
            answer.status == 200 && answer.received == b"friend",
            "{protocol}: {answer:?}"
        );
    }
    ensure!(
        app.accepted()?.len() == accepted + 2,
        "a denied client reached the application"
    );
    wire.cluster.remove(&guard)?;
    wire.cluster.remove(&rule)
}

fn other_address(wire: &Wire) -> Result<()> {
    let app = Server::start(&wire.other, 7302, "echo", &[])?;
    let authorities = [
        wire.other.sockets(7302)[0].to_string(),
        wire.server.sockets(7302)[1].to_string(),
        "127.0.0.1:7302".to_owned(),
        format!("{}:7302", wire.cluster.node(1).v4()),
    ];
    for authority in authorities {
        let answer = run(
            wire,
            good(wire, target(wire))?
                .authority(&authority)
                .sending(b"x"),
        )?;
        ensure!(answer.status == 400, "{authority}: {answer:?}");
    }
    ensure!(app.accepted()?.is_empty());
    let labels = [("reason", "bad_request"), ("pod", "server")];
    wait_for_metric(wire.cluster.node(1), "weft_refused_total", &labels, 4.0).map(drop)
}

fn bad_authorities(wire: &Wire) -> Result<()> {
    let address = wire.server.v4();
    for authority in [
        "server.default.svc.cluster.local:7300".to_owned(),
        address.to_string(),
        format!("{address}:0"),
        format!("{address}:70000"),
        format!("user@{address}:7300"),
    ] {
        match run(wire, good(wire, target(wire))?.authority(&authority)) {
            Ok(answer) => ensure!(answer.status == 400, "{authority}: {answer:?}"),
            // What is no authority at all ends the stream, or is not even sent.
            Err(error) => ensure!(
                !format!("{error:#}").contains("no answer"),
                "{authority}: {error:#}"
            ),
        }
    }
    Ok(())
}

fn nothing_listens(wire: &Wire) -> Result<()> {
    for target in wire.server.sockets(7999) {
        let answer = run(wire, good(wire, target)?)?;
        ensure!(answer.status == 503, "{answer:?}");
    }
    Ok(())
}

fn own_ports(wire: &Wire) -> Result<()> {
    for target in wire.server.sockets(15008) {
        let answer = run(wire, good(wire, target)?)?;
        ensure!((400..600).contains(&answer.status), "{answer:?}");
    }
    Ok(())
}

fn other_methods(wire: &Wire) -> Result<()> {
    for method in [Method::GET, Method::POST, Method::OPTIONS] {
        let mut attempt = good(wire, target(wire))?;
        attempt.method = method.clone();
        match run(wire, attempt) {
            Ok(answer) => ensure!((400..600).contains(&answer.status), "{method}: {answer:?}"),
            Err(error) => ensure!(
                format!("{error:#}").contains("response"),
                "{method}: {error:#}"
            ),
        }
    }
    Ok(())
}

fn bad_certificates(wire: &Wire) -> Result<()> {
    let now = SystemTime::now();
    let hour = Duration::from_secs(3600);
    let good_id = GOOD_ID;
    let app = Server::start(&wire.server, 7303, "echo", &[])?;
    let target = wire.server.sockets(7303)[0];
    let sign = |ids: &[&str]| wire.authority.sign_for(ids, now - hour, now + hour);
    let cases = [
        ("none", None),
        ("foreign", Some(Authority::foreign()?.sign(good_id)?)),
        ("expired", Some(wire.authority.sign_expired(good_id)?)),
        (
            "of tomorrow",
            Some(wire.authority.sign_not_yet_valid(good_id)?),
        ),
        (
            "two identities",
            Some(sign(&[
                good_id,
                "spiffe://cluster.local/ns/default/sa/two",
            ])?),
        ),
        ("no identity", Some(sign(&[])?)),
        (
            "another trust domain",
            Some(sign(&["spiffe://other/ns/default/sa/good"])?),
        ),
        (
            "no SPIFFE ID",
            Some(sign(&["https://cluster.local/ns/default/sa/good"])?),
        ),
    ];
    for (name, identity) in cases {
        for protocol in ["h2", "weft-h2/1"] {
            let mut attempt = good(wire, target)?.alpn(&[protocol]).sending(b"let me in");
            attempt.identity = identity.as_ref().map(weft_tests::pki::Identity::duplicate);
            match run(wire, attempt) {
                Ok(answer) => bail!("{name}: an answer: {answer:?}"),
                Err(error) => {
                    ensure!(
                        !format!("{error:#}").contains("no answer"),
                        "{name}: {error:#}"
                    );
                }
            }
        }
    }
    ensure!(
        app.accepted()?.is_empty(),
        "somebody reached the application"
    );
    let labels = [("reason", "handshake_failed"), ("pod", "server")];
    wait_for_metric(wire.cluster.node(1), "weft_refused_total", &labels, 10.0).map(drop)
}

fn bad_protocols(wire: &Wire) -> Result<()> {
    for protocols in [&["http/1.1"][..], &["weft/9"], &[]] {
        let answer = run(wire, good(wire, target(wire))?.alpn(protocols));
        ensure!(answer.is_err(), "{protocols:?}: {answer:?}");
    }
    Ok(())
}

fn tls12(wire: &Wire) -> Result<()> {
    let [chain, key] = wire.authority.sign(GOOD_ID)?.write(wire.outside.dir())?;
    let connect = format!("{}:15008", wire.server.v4());
    let attempt = |version: &str| {
        wire.outside
            .command("openssl")?
            .args([
                "s_client", "-connect", &connect, "-alpn", "h2", version, "-brief",
            ])
            .arg("-cert")
            .arg(&chain)
            .arg("-cert_chain")
            .arg(&chain)
            .arg("-key")
            .arg(&key)
            .output(Duration::from_secs(10))
    };
    let new = attempt("-tls1_3")?;
    ensure!(
        new.stderr.contains("CONNECTION ESTABLISHED"),
        "TLS 1.3 must work: {new:?}"
    );
    let old = attempt("-tls1_2")?;
    ensure!(
        !old.stderr.contains("CONNECTION ESTABLISHED"),
        "TLS 1.2 was accepted: {old:?}"
    );
    Ok(())
}

fn not_tls(wire: &Wire) -> Result<()> {
    for target in wire.server.sockets(15008) {
        let said = testapp::say(
            &wire.outside,
            target,
            "CONNECT 10.0.0.1:80 HTTP/1.1\r\n\r\n",
        )?;
        ensure!(!said.text.contains("HTTP"), "{said:?}");
        ensure!(
            said.eof || said.outcome == "reset",
            "it stays open: {said:?}"
        );
    }
    Ok(())
}

fn still_works(wire: &Wire) -> Result<()> {
    for target in wire.server.sockets(7300) {
        expect_echo(&wire.other, target, "neighbours")?;
    }
    Ok(())
}

const GOOD_ID: &str = "spiffe://cluster.local/ns/default/sa/good";
