//! Frames of HTTP/2 as no library sends them, after a handshake with a valid certificate. The frames are made
//! here, by hand (RFC 9113). And the same from pods, to a port that speaks HTTP.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use weft_tests::apps::curl_shop;
use weft_tests::hostile::{PREFACE, request};
use weft_tests::webapp::{HttpServer, raw};
use weft_tests::weft1::Tunnel;
use weft_tests::{DEADLINE, wait_for};

use crate::peer;
use crate::stage::{OPEN, Stage};

/// Sends frames that cost the sender little by the ten thousand, and reads no answer: streams that are opened and
/// reset, headers that never end, pings, settings, empty data. The connection ends or is borne; the agent's memory
/// stays what it was, and others are served meanwhile.
pub(crate) fn floods(stage: &Stage) -> Result<()> {
    let node = stage.cluster.node(1);
    let before = node.agent_resident_bytes()?;
    let opening = frame(HEADERS, END_HEADERS, 1, &connect_request(stage));
    let endless = frame(HEADERS, 0, 1, &connect_request(stage));
    let resets = (0..10_000).flat_map(|number: u32| {
        let stream = 2 * number + 1;
        let mut both = frame(HEADERS, END_HEADERS, stream, &connect_request(stage));
        both.extend(frame(RST_STREAM, 0, stream, &8_u32.to_be_bytes()));
        both
    });
    let more = frame(CONTINUATION, 0, 1, &[0_u8; 16_000].map(|_| 0x40));
    let floods: [(&str, Vec<u8>); 6] = [
        ("streams opened and reset", resets.collect()),
        ("headers without end", [endless, more.repeat(1000)].concat()),
        ("pings", frame(PING, 0, 0, &[7; 8]).repeat(50_000)),
        (
            "settings",
            frame(SETTINGS, 0, 0, &[0, 3, 0, 0, 0, 100]).repeat(50_000),
        ),
        (
            "empty data",
            [opening.clone(), frame(DATA, 0, 1, &[]).repeat(50_000)].concat(),
        ),
        (
            "credit for a byte",
            [
                opening,
                frame(WINDOW_UPDATE, 0, 1, &1_u32.to_be_bytes()).repeat(50_000),
            ]
            .concat(),
        ),
    ];
    for (what, bytes) in floods {
        for protocol in ["h2", "weft-h2/1"] {
            let mut tunnel = started(stage, protocol)?;
            tunnel.impatient(Duration::from_millis(300))?;
            // Whoever has had enough does not take the rest.
            let _ = tunnel.send(&bytes);
            stage.visit().with_context(|| format!("during {what}"))?;
        }
        let grown = node.agent_resident_bytes()?.saturating_sub(before);
        ensure!(grown < 64 << 20, "{what} cost {grown} bytes");
    }
    // The control: a client that does as it should is served on such a connection.
    let mut tunnel = started(stage, "h2")?;
    tunnel.send(&frame(HEADERS, END_HEADERS, 1, &connect_request(stage)))?;
    tunnel.send(&frame(DATA, END_STREAM, 1, b"by hand"))?;
    let mut seen = Vec::new();
    while !seen.windows(7).any(|it| it == b"by hand") {
        seen.extend(tunnel.some()?);
    }
    Ok(())
}

/// Sends frames that break HTTP/2's rules: each ends the connection, or the stream, and none reaches an
/// application.
pub(crate) fn broken(stage: &Stage) -> Result<()> {
    let before = stage.seen_at_open()?.len();
    for (what, bytes) in malformed(&connect_request(stage)) {
        for protocol in ["h2", "weft-h2/1"] {
            let mut tunnel = started(stage, protocol)?;
            tunnel.send(&bytes)?;
            let ended = tunnel.ended();
            ensure!(ended.is_ok(), "{what} was borne: {ended:?}");
        }
    }
    ensure!(
        stage.seen_at_open()?.len() == before,
        "an application was reached"
    );
    Ok(())
}

/// The same, by pods of both nodes, to a port that speaks HTTP.
pub(crate) fn broken_requests(stage: &Stage) -> Result<()> {
    let server = HttpServer::start(&stage.target, REQUESTS, &[])?;
    let target = stage.target.sockets(REQUESTS)[0];
    let request = request("GET", "/broken");
    let hex = |bytes: &[u8]| -> String { bytes.iter().map(|it| format!("\\x{it:02x}")).collect() };
    let begun = hex(&[PREFACE, &frame(SETTINGS, 0, 0, &[])].concat());
    for pod in stage.attackers() {
        for (what, bytes) in malformed(&request) {
            let got = raw(pod, target, &[&begun, &hex(&bytes)], &[])?;
            ensure!(
                ["eof", "reset"].contains(&got.outcome.as_str()),
                "{what} was borne: {got:?}"
            );
        }
        // The control: a client that does as it should reaches the server, and that is written down.
        let path = format!("/control-{}", pod.name());
        let shown = curl_shop(pod, target, &path, &["--http2-prior-knowledge"])?;
        ensure!(shown.code() == 200, "{shown:?}");
        let seen = || -> Result<Vec<String>> {
            let requests = server.requests()?;
            Ok(requests.into_iter().map(|it| it.path).collect())
        };
        wait_for("the control to be written down", DEADLINE, || {
            let mut seen = seen()?.into_iter();
            Ok(seen.any(|it| it.ends_with(&path)).then_some(()))
        })?;
        let seen = seen()?;
        ensure!(
            !seen.iter().any(|it| it.ends_with("/broken")),
            "an application was reached: {seen:?}"
        );
    }
    Ok(())
}

/// Frames that break HTTP/2's rules, some with this request in them.
fn malformed(request: &[u8]) -> [(&'static str, Vec<u8>); 12] {
    [
        (
            "data on a stream that was never opened",
            frame(DATA, 0, 1, b"x"),
        ),
        ("data on stream 0", frame(DATA, 0, 0, b"x")),
        (
            "headers on stream 0",
            frame(HEADERS, END_HEADERS, 0, request),
        ),
        (
            "headers on a server's stream",
            frame(HEADERS, END_HEADERS, 2, request),
        ),
        (
            "a continuation of nothing",
            frame(CONTINUATION, END_HEADERS, 1, request),
        ),
        (
            "headers that are no HPACK",
            frame(HEADERS, END_HEADERS, 1, &[0xff; 40]),
        ),
        (
            "a push by the client",
            frame(
                5,
                END_HEADERS,
                1,
                &[&2_u32.to_be_bytes()[..], request].concat(),
            ),
        ),
        (
            "credit beyond the window",
            frame(WINDOW_UPDATE, 0, 0, &0x7fff_ffff_u32.to_be_bytes()).repeat(2),
        ),
        ("no credit", frame(WINDOW_UPDATE, 0, 0, &[0; 4])),
        (
            "padding longer than the frame",
            frame(DATA, 8, 1, &[200, 1]),
        ),
        ("a ping of nine bytes", frame(PING, 0, 0, &[0; 9])),
        (
            "a length of sixteen megabytes",
            [0xff, 0xff, 0xff, DATA, 0, 0, 0, 0, 1].to_vec(),
        ),
    ]
}

/// A connection whose HTTP/2 has begun as it should.
fn started(stage: &Stage, protocol: &str) -> Result<Tunnel> {
    let identity = peer::identity(stage)?;
    let from = stage.outside.netns();
    let mut tunnel = Tunnel::connect_by(from, stage.open()[0], &identity, protocol)?;
    tunnel.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")?;
    tunnel.send(&frame(SETTINGS, 0, 0, &[]))?;
    Ok(tunnel)
}

/// `CONNECT` to the target's open port, its two fields as literals that are not indexed (RFC 7541, 6.2.2).
fn connect_request(stage: &Stage) -> Vec<u8> {
    let authority = format!("{}:{OPEN}", stage.target.v4());
    let mut fields = vec![0x02, 7];
    fields.extend(b"CONNECT");
    fields.extend([0x01, authority.len() as u8]);
    fields.extend(authority.bytes());
    fields
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let [_, high, middle, low] = (payload.len() as u32).to_be_bytes();
    let mut frame = vec![high, middle, low, kind, flags];
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// The target's port that speaks HTTP, for these.
const REQUESTS: u16 = 7081;
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
