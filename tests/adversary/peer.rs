//! Somebody holds the valid certificate of a workload, and speaks to the target's agent with software of its
//! own: `weft/1`, `weft-h2/1` and HBONE, right and wrong. It connects from a pod that is not meshed, so
//! that nothing of Weft is on its side.

use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use anyhow::{Result, bail, ensure};
use weft_tests::hbone::{Answer, Attempt};
use weft_tests::pki::{Authority, Identity};
use weft_tests::scenario::{eventually, expect_echo};
use weft_tests::weft1::{END, Tunnel, data, open};

use crate::stage::{GUARDED, OPEN, Stage};

/// Says in headers that it is the friend, in every way that proxies have said so, and asks for the guarded
/// port. What counts is the certificate.
pub(crate) fn headers(stage: &Stage) -> Result<()> {
    let friend = stage.friend.identity();
    let by = format!("By={friend};Hash=00;URI={friend}");
    let address = stage.friend.v4().to_string();
    let claims: [(&'static str, &str); 9] = [
        ("x-forwarded-client-cert", &by),
        (
            "l5d-client-id",
            "friend.default.serviceaccount.identity.linkerd.cluster.local",
        ),
        ("x-forwarded-for", &address),
        ("forwarded", "for=10.244.0.10"),
        (
            "baggage",
            "k8s.namespace.name=default,k8s.serviceaccount.name=friend",
        ),
        ("weft-client-id", &friend),
        ("weft-identity", &friend),
        ("weft-source-port", "443"),
        ("authorization", "Bearer friend"),
    ];
    for protocol in ["h2", "weft-h2/1"] {
        for target in [0, 1] {
            let mut to_guarded = attempt(stage, stage.guarded()[target])?.alpn(&[protocol]);
            let mut to_open = attempt(stage, stage.open()[target])?
                .alpn(&[protocol])
                .sending(b"as myself");
            for (name, value) in claims {
                to_guarded = to_guarded.header(name, value)?;
                to_open = to_open.header(name, value)?;
            }
            let answer = ask(stage, to_guarded)?;
            ensure!(
                answer.status == 401 && answer.received.is_empty(),
                "{protocol}: {answer:?}"
            );
            // The control, and who it was.
            let answer = ask(stage, to_open)?;
            ensure!(
                answer.status == 200 && answer.received == b"as myself",
                "{protocol}: {answer:?}"
            );
        }
    }
    let own = stage.near.identity();
    let labels = [("pod", "target"), ("client_id", own.as_str())];
    weft_tests::metrics::wait_for_metric(
        stage.cluster.node(1),
        "inbound_tcp_authz_allow_total",
        &labels,
        4.0,
    )?;
    for seen in stage.seen_at_open()? {
        ensure!(seen.accepted.ip() != stage.friend.v4(), "{seen:?}");
    }
    Ok(())
}

/// Asks for the address of another pod, of the node, of the loopback, of a name. The connection was to the
/// target, and nothing else can be reached by it.
pub(crate) fn authorities(stage: &Stage) -> Result<()> {
    let others = [
        format!("{}:{OPEN}", stage.near.v4()),
        format!("{}:{OPEN}", stage.friend.v4()),
        format!("{}:22", stage.cluster.node(1).v4()),
        format!("127.0.0.1:{OPEN}"),
        format!("[::1]:{OPEN}"),
        format!("[::ffff:127.0.0.1]:{OPEN}"),
        format!("0.0.0.0:{OPEN}"),
        format!("target:{OPEN}"),
        format!("{}:15008", stage.target.v4()),
        format!("{}:0{OPEN}", stage.target.v4()),
        format!("user@{}:{OPEN}", stage.target.v4()),
    ];
    for protocol in ["h2", "weft-h2/1"] {
        for authority in &others {
            let attempt = attempt(stage, stage.open()[0])?
                .alpn(&[protocol])
                .authority(authority);
            match ask(stage, attempt) {
                Ok(answer) => ensure!(
                    answer.status != 200 && answer.received.is_empty(),
                    "{authority} by {protocol}: {answer:?}"
                ),
                // The library, or HTTP/2 at the other side, refuses some.
                Err(error) => ensure!(
                    !format!("{error:#}").contains("no answer"),
                    "{authority}: {error:#}"
                ),
            }
        }
    }
    Ok(())
}

/// Shows certificates that are not valid, or not this mesh's, that name the friend: none is believed.
pub(crate) fn certificates(stage: &Stage) -> Result<()> {
    let friend = stage.friend.identity();
    let (authority, now) = (authority(stage)?, SystemTime::now());
    let hour = Duration::from_secs(3600);
    let two = [
        friend.as_str(),
        "spiffe://cluster.local/ns/default/sa/mallory",
    ];
    let forged = [
        ("of another authority", Authority::foreign()?.sign(&friend)?),
        ("expired", authority.sign_expired(&friend)?),
        ("of tomorrow", authority.sign_not_yet_valid(&friend)?),
        (
            "with two identities",
            authority.sign_for(&two, now - hour, now + hour)?,
        ),
        (
            "of another trust domain",
            authority.sign("spiffe://evil/ns/default/sa/friend")?,
        ),
        (
            "with dots",
            authority.sign("spiffe://cluster.local/ns/default/sa/x/../friend")?,
        ),
        ("signed by a workload", signed_by_workload(stage, &friend)?),
    ];
    for (name, identity) in forged {
        for protocol in ["h2", "weft-h2/1"] {
            let mut attempt = attempt(stage, stage.guarded()[0])?
                .alpn(&[protocol])
                .sending(b"as the friend");
            attempt.identity = Some(identity.duplicate());
            if let Ok(answer) = ask(stage, attempt) {
                bail!("a certificate {name} was believed: {answer:?}");
            }
        }
        let tunnel = Tunnel::connect(stage.outside.netns(), stage.guarded()[0], &identity);
        if let Ok(mut tunnel) = tunnel {
            // TLS 1.3 tells a client of its refusal after the handshake.
            let _ = tunnel.open(GUARDED, 0, b"as the friend");
            ensure!(
                tunnel.frame().is_err(),
                "a certificate {name} was believed by weft/1"
            );
        }
    }
    Ok(())
}

/// Sends the frames of `weft/1` in every wrong order, among them flows behind refusals and data that is not
/// asked for. Each ends the connection, and none reaches an application.
pub(crate) fn frames(stage: &Stage) -> Result<()> {
    let (to_guarded, to_open) = (open(GUARDED, 0), open(OPEN, 0));
    let refused_twice = [
        &to_guarded[..],
        &data(b"x"),
        &END,
        &to_guarded,
        &data(b"y"),
        &END,
    ]
    .concat();
    let before = stage.seen_at_open()?.len();
    for (name, bytes) in out_of_order(&to_guarded, &to_open) {
        let mut tunnel = tunnel(stage)?;
        tunnel.send(&bytes)?;
        let ended = tunnel.ended();
        ensure!(ended.is_ok(), "{name}: {ended:?}");
    }
    // Flows that are refused in order are refused one after the other, on one connection.
    let mut tunnel = tunnel(stage)?;
    tunnel.send(&refused_twice)?;
    for _ in 0..2 {
        ensure!(tunnel.refused()?.0 == 401);
    }
    // The control: the same connection can do what it may.
    tunnel.send(&[&to_open[..], &data(b"allowed"), &END].concat())?;
    tunnel.accepted()?;
    ensure!(tunnel.receive_all()? == b"allowed");
    ensure!(
        stage.seen_at_open()?.len() == before + 1,
        "an application was reached"
    );
    Ok(())
}

/// What no client of `weft/1` says.
fn out_of_order(to_guarded: &[u8], to_open: &[u8]) -> Vec<(&'static str, Vec<u8>)> {
    vec![
        ("data before anything", data(b"GET / HTTP/1.1")),
        ("an end before anything", END.to_vec()),
        ("an answer from the client", vec![2, 0, 0, 0]),
        (
            "a second open inside of a refused flow",
            [to_guarded, to_open].concat(),
        ),
        (
            "an answer inside of a refused flow",
            [to_guarded, &[2, 0, 0, 0]].concat(),
        ),
        (
            "more than a refused flow may send",
            [to_guarded, &data(&vec![7; 80_000])].concat(),
        ),
        ("kind 0", vec![0, 0, 0, 0]),
        ("kind 255", vec![255, 255, 255, 255]),
        (
            "an open of four kilobytes",
            [&[1, 0, 0x10, 0][..], &vec![0; 4096]].concat(),
        ),
        (
            "a metadata field longer than its frame",
            vec![1, 0, 0, 8, 0x1b, 0x59, 0, 0, 0, 1, 0xff, 0xff],
        ),
    ]
}

/// Sends a flow in records of one byte, thousands of them, and then key updates in a row. The flow is carried;
/// the updates end the connection.
pub(crate) fn tiny_records(stage: &Stage) -> Result<()> {
    let mut tunnel = tunnel(stage)?;
    let text = vec![b'a'; 3000];
    let bytes = [&open(OPEN, 0)[..], &data(&text), &END].concat();
    for byte in &bytes {
        tunnel.send(&[*byte])?;
    }
    tunnel.accepted()?;
    ensure!(tunnel.receive_all()? == text);
    let mut tunnel = self::tunnel(stage)?;
    for _ in 0..40 {
        // Writing fails once the other side has had enough.
        if tunnel
            .change_keys()
            .and_then(|()| tunnel.send(&[]))
            .is_err()
        {
            break;
        }
    }
    ensure!(tunnel.ended().is_ok(), "it bore key updates without end");
    Ok(())
}

/// Sends frames of every length there is at the edges, and many megabytes at a time: what is carried is what
/// was sent.
pub(crate) fn huge(stage: &Stage) -> Result<()> {
    let mut tunnel = tunnel(stage)?;
    for length in [1, 2, 255, 256, 1024, 16_379, 16_380] {
        let text = vec![b'z'; length];
        tunnel.open(OPEN, 0, &text)?;
        tunnel.send(&END)?;
        tunnel.accepted()?;
        ensure!(tunnel.receive_all()? == text, "{length} bytes");
    }
    for length in [16_381_u16, 40_000, 65_535] {
        let mut tunnel = self::tunnel(stage)?;
        tunnel.send(&open(OPEN, 0))?;
        let [high, low] = length.to_be_bytes();
        let frame = [&[4, 0, high, low][..], &vec![b'z'; usize::from(length)]].concat();
        // The other side may have hung up in the middle.
        let _ = tunnel.send(&frame);
        ensure!(
            tunnel.ended().is_ok(),
            "a frame of {length} bytes was borne"
        );
    }
    Ok(())
}

/// Sends megabytes to an echo through many flows and reads nothing of what comes back. The agent keeps what
/// fits into its buffers and stops reading: its memory stays bounded, and others are served.
pub(crate) fn never_reading(stage: &Stage) -> Result<()> {
    let node = stage.cluster.node(1);
    let before = node.agent_resident_bytes()?;
    let mut tunnels = Vec::new();
    let chunk = data(&vec![b'q'; 64 * 1024]);
    for number in 0..6 {
        let mut tunnel = tunnel(stage)?;
        tunnel.open(OPEN, 0, b"")?;
        tunnel.accepted()?;
        tunnel.impatient(Duration::from_millis(100))?;
        // Until nothing more is taken; what the kernels' buffers hold is their own.
        let taken = (0..1000).take_while(|_| tunnel.send(&chunk).is_ok());
        let taken = taken.count();
        ensure!(
            (1..1000).contains(&taken),
            "flow {number} was not stopped after {taken} times 64 KiB"
        );
        tunnels.push(tunnel);
    }
    let open = [("pod", "target"), ("direction", "inbound"), ("peer", "src")];
    let open = node.metrics()?.sum("tcp_open_connections", &open);
    ensure!(open >= 6.0, "{open} flows are open");
    let grown = node.agent_resident_bytes()?.saturating_sub(before);
    ensure!(
        grown < 8 * 1024 * 1024,
        "6 flows that nobody reads cost {grown} bytes"
    );
    stage.visit()?;
    // The control: what was taken is there for who reads it.
    for tunnel in &mut tunnels {
        ensure!(tunnel.receive(64 * 1024)?.iter().all(|it| *it == b'q'));
    }
    Ok(())
}

/// Connects and leaves: in the middle of the handshake's records, of a frame, of a flow, by FIN and by reset.
/// Nothing is left of them.
pub(crate) fn half_open(stage: &Stage) -> Result<()> {
    let node = stage.cluster.node(1);
    let flows = || -> Result<f64> {
        let metrics = node.metrics()?;
        Ok(metrics.sum(
            "tcp_open_connections",
            &[("pod", "target"), ("direction", "inbound")],
        ))
    };
    stage.visit()?;
    let before = flows()?;
    for round in 0..20 {
        let mut tunnel = tunnel(stage)?;
        let bytes = [&open(OPEN, 0)[..], &data(b"half a")].concat();
        tunnel.send(&bytes[..bytes.len() - round % 10])?;
        tunnel.cut()?;
    }
    eventually("the flows to be over", || {
        let now = flows()?;
        ensure!(now <= before, "{now} flows are open, {before} were");
        Ok(())
    })
}

/// Opens tunnel after tunnel with a good certificate and keeps them. It gets more than any agent needs and fewer
/// than there are: others' tunnels still come about.
pub(crate) fn tunnels(stage: &Stage) -> Result<()> {
    let identity = identity(stage)?;
    let mut held = Vec::new();
    while held.len() < 2000 {
        match Tunnel::connect(stage.outside.netns(), stage.open()[0], &identity) {
            Ok(tunnel) => held.push(tunnel),
            Err(_) => break,
        }
    }
    ensure!(
        (500..1500).contains(&held.len()),
        "{} tunnels were borne",
        held.len()
    );
    // By another family, and so by a new tunnel; and by a pod that has none yet.
    stage.visit()?;
    expect_echo(&stage.far, stage.open()[0], "beside a thousand tunnels").map(drop)
}

/// Speaks HTTP/2 as it must not: requests other than CONNECT, bytes that are no HTTP/2, and another protocol
/// than was agreed on.
pub(crate) fn http2(stage: &Stage) -> Result<()> {
    for protocol in ["h2", "weft-h2/1"] {
        for method in [http::Method::GET, http::Method::POST, http::Method::OPTIONS] {
            let mut attempt = attempt(stage, stage.open()[0])?.alpn(&[protocol]);
            attempt.method = method;
            if let Ok(answer) = ask(stage, attempt) {
                ensure!(answer.status == 405, "{answer:?}");
            }
        }
    }
    for protocol in ["http/1.1", "h3", "weft/2", "weft/1 "] {
        let attempt = attempt(stage, stage.open()[0])?.alpn(&[protocol]);
        ensure!(ask(stage, attempt).is_err(), "{protocol:?} was spoken");
    }
    // Frames of HTTP/2 on a connection of weft/1: its preface is no frame.
    let mut tunnel = tunnel(stage)?;
    tunnel.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0")?;
    ensure!(tunnel.ended().is_ok());
    Ok(())
}

fn authority(stage: &Stage) -> Result<Authority> {
    Authority::of_cluster(stage.cluster.controller()?.ca_dir())
}

/// The attackers' own, as it could be taken out of an agent's memory.
pub(crate) fn identity(stage: &Stage) -> Result<Identity> {
    authority(stage)?.sign(&stage.near.identity())
}

/// A leaf whose issuer is another leaf.
fn signed_by_workload(stage: &Stage, id: &str) -> Result<Identity> {
    authority(stage)?.sign_through_leaf(&stage.near.identity(), id)
}

fn attempt(stage: &Stage, target: SocketAddr) -> Result<Attempt> {
    Ok(Attempt::hbone(target, identity(stage)?))
}

fn ask(stage: &Stage, attempt: Attempt) -> Result<Answer> {
    attempt.run(stage.outside.netns())
}

pub(crate) fn tunnel(stage: &Stage) -> Result<Tunnel> {
    Tunnel::connect(stage.outside.netns(), stage.open()[0], &identity(stage)?)
}
