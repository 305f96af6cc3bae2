//! What begins as HTTP and goes on as something else: WebSocket, CONNECT.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use weft_tests::Checks;
use weft_tests::command::Process;
use weft_tests::webapp::{HttpServer, raw, websocket_echo, websocket_server};

use crate::stage::{Pair, Stage, UPGRADE};

#[test]
fn http_upgrades() {
    let stage = Stage::build().expect("a cluster");
    let start = |pod| websocket_server(pod, WEBSOCKET).expect("a server");
    let _servers = [&stage.far, &stage.near, &stage.plain_server].map(start);
    let mut checks = Checks::new("http upgrades");
    checks.check("WebSocket without a mesh", || {
        websocket(&stage, stage.plain())
    });
    stage.check_meshed(&mut checks, "WebSocket", websocket);
    stage.check_meshed(&mut checks, "messages in the packet of the upgrade", early);
    stage.check_meshed(&mut checks, "an upgrade that the server declines", declined);
    stage.check_meshed(&mut checks, "CONNECT", connect);
    checks.finish();
}

fn websocket(_: &Stage, pair: Pair<'_>) -> Result<()> {
    let args = ["--messages", "20", "--step", "10000"];
    let echoed = websocket_echo(pair.client, pair.at(WEBSOCKET), &args)?;
    ensure!(echoed.outcome == "ok" && echoed.echoed == 20, "{echoed:?}");
    Ok(())
}

/// The client goes on in the new protocol without waiting for the answer to its upgrade.
fn early(_: &Stage, pair: Pair<'_>) -> Result<()> {
    let answer = "HTTP/1.1 101 Switching Protocols\\r\\nConnection: Upgrade\\r\\nUpgrade: websocket\\r\\n\\r\\n";
    let _server = switching(pair, EARLY, answer)?;
    let request = format!("{UPGRADE}\\x81\\x02 not HTTP");
    let raw = raw(pair.client, pair.at(EARLY), &[&request], &["--half-close"])?;
    ensure!(raw.statuses == [101] && raw.outcome == "eof", "{raw:?}");
    ensure!(
        raw.received.ends_with("\\r\\n\\x81\\x02 not HTTP"),
        "{raw:?}"
    );
    Ok(())
}

/// A server that knows no upgrades answers as if none had been asked for, and the connection goes on.
fn declined(_: &Stage, pair: Pair<'_>) -> Result<()> {
    let server = HttpServer::start(pair.server, HTTP, &[])?;
    let again = "GET /again HTTP/1.1\\r\\nHost: shop\\r\\nConnection: close\\r\\n\\r\\n";
    let raw = raw(
        pair.client,
        pair.at(HTTP),
        &[UPGRADE, again],
        &["--pause-ms", "200"],
    )?;
    ensure!(
        raw.statuses == [200, 200] && raw.outcome == "eof",
        "{raw:?}"
    );
    ensure!(server.requests()?.len() == 2, "{:?}", server.requests()?);
    Ok(())
}

/// A server that is a proxy takes CONNECT: what follows is a flow of bytes, until both sides end.
fn connect(_: &Stage, pair: Pair<'_>) -> Result<()> {
    let _server = switching(pair, PROXY, "HTTP/1.1 200 OK\\r\\n\\r\\n")?;
    let request = "CONNECT shop:443 HTTP/1.1\\r\\nHost: shop:443\\r\\n\\r\\n";
    let segments = [request, "\\x16\\x03 not HTTP", " at all\\n"];
    let further = ["--pause-ms", "300", "--half-close"];
    let start = Instant::now();
    let raw = raw(pair.client, pair.at(PROXY), &segments, &further)?;
    ensure!(raw.statuses == [200] && raw.outcome == "eof", "{raw:?}");
    ensure!(
        raw.received.ends_with("\\x16\\x03 not HTTP at all\\n"),
        "{raw:?}"
    );
    let took = start.elapsed();
    ensure!(took < Duration::from_secs(5), "it took {took:?}");
    Ok(())
}

/// A server that gives an (escaped) answer to a request's head, and sends back all that follows it.
fn switching(pair: Pair<'_>, port: u16, answer: &str) -> Result<Process> {
    let script = format!(
        "import socket
listener = socket.create_server(('0.0.0.0', {port}))
while True:
    stream, _ = listener.accept()
    data = b''
    while b'\\r\\n\\r\\n' not in data:
        data += stream.recv(4096)
    stream.sendall(b'{answer}' + data.split(b'\\r\\n\\r\\n', 1)[1])
    while data := stream.recv(4096):
        stream.sendall(data)
    stream.close()
"
    );
    let python = pair.server.command("python3")?;
    let mut process = python.args(["-c", &script]).spawn()?;
    process.wait_listening(port)?;
    Ok(process)
}

const WEBSOCKET: u16 = 8091;
const HTTP: u16 = 8092;
const PROXY: u16 = 8090;
const EARLY: u16 = 8093;
