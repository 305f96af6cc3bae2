//! A client and a server of HTTP/1 see what they would see without the mesh, header case apart.

use anyhow::{Context, Result, ensure};
use weft_tests::Checks;
use weft_tests::apps::{Nginx, Shown, curl_shop, python_http_server};
use weft_tests::scenario::Watch;
use weft_tests::webapp::{HttpServer, Raw, Seen, raw};

use crate::stage::{CLIENT_ID, Pair, Stage, expect_code, seen};

#[test]
fn http_as_without_a_mesh() {
    let stage = Stage::build().expect("a cluster");
    let start = |pod| HttpServer::start(pod, HTTP, &[]).expect("a server");
    let _servers = [&stage.far, &stage.near, &stage.plain_server].map(start);
    let mut checks = Checks::new("http transparency");
    for (name, path, args) in CURLS {
        for (place, pair) in stage.meshed() {
            checks.check(&format!("{name}, {place}"), || {
                same_curl(&stage, pair, path, args)
            });
        }
    }
    for (name, send, further) in RAWS {
        for (place, pair) in stage.meshed() {
            checks.check(&format!("{name}, {place}"), || {
                same_raw(&stage, pair, send, further)
            });
        }
    }
    stage.check_meshed(&mut checks, "one connection, many requests", keep_alive);
    stage.check_meshed(&mut checks, "python's http.server", python);
    stage.check_meshed(&mut checks, "nginx", nginx);
    stage.check_meshed(&mut checks, "h2load and nghttp", h2load);
    stage.check_meshed(
        &mut checks,
        "a chunk is passed on when it comes",
        chunks_in_time,
    );
    stage.check_meshed(&mut checks, "a broken answer looks broken", broken);
    stage.check_meshed(&mut checks, "tracing headers pass", tracing);
    stage.check_meshed(&mut checks, "trailers asked for in a list", trailers);
    checks.check("nothing readable is on the wire", || {
        let watch = Watch::start(&stage.cluster, &[&stage.client, &stage.far])?;
        let path = "/a-secret-path";
        let shown = curl_shop(
            &stage.client,
            stage.far.sockets(HTTP)[0],
            path,
            &["-d", "a-secret-body"],
        )?;
        expect_code(&shown, 200)?;
        watch
            .finish_encrypted(&["a-secret-path", "a-secret-body"])
            .map(drop)
    });
    checks.finish();
}

/// Name, path and curl's arguments.
const CURLS: [(&str, &str, &[&str]); 22] = [
    ("GET", "/", &[]),
    ("a query", "/find?q=a%20b&q=c", &[]),
    (
        "a path that is not normal",
        "/a/../b//c/./d;x=1",
        &["--path-as-is"],
    ),
    ("POST", "/", &["-d", "one=1"]),
    ("PUT", "/", &["-X", "PUT", "-d", "one=1"]),
    ("DELETE", "/", &["-X", "DELETE"]),
    ("OPTIONS", "/", &["-X", "OPTIONS"]),
    ("a method of its own", "/", &["-X", "PURGE"]),
    ("HEAD", "/", &["--head", "-o", "/dev/null"]),
    (
        "HEAD of what has a length",
        "/bytes/1000",
        &["--head", "-o", "/dev/null"],
    ),
    (
        "a chunked request",
        "/",
        &["-H", "Transfer-Encoding: chunked", "-d", "one=1"],
    ),
    ("a chunked answer", "/stream?chunks=3&interval=5", &[]),
    (
        "a chunked echo",
        "/echo",
        &["-H", "Transfer-Encoding: chunked", "-d", "round trip"],
    ),
    (
        "Expect: 100-continue",
        "/",
        &["-H", "Expect: 100-continue", "-d", "one=1"],
    ),
    (
        "trailers",
        "/trailers",
        &["-H", "TE: trailers", "-d", "one=1"],
    ),
    ("404", "/status/404", &[]),
    ("503", "/status/503", &[]),
    ("204", "/status/204", &[]),
    ("a status that has no name", "/status/599", &[]),
    ("HTTP/1.0", "/", &["--http1.0"]),
    (
        "HTTP/2 with prior knowledge",
        "/",
        &["--http2-prior-knowledge"],
    ),
    (
        "a body by HTTP/2",
        "/",
        &["--http2-prior-knowledge", "-d", "one=1"],
    ),
];

/// Name, segments and further arguments of `weft-testapp http raw`.
const RAWS: [(&str, &[&str], &[&str]); 8] = [
    (
        "pipelining",
        &[
            "GET /1 HTTP/1.1\\r\\nHost: shop\\r\\n\\r\\nPOST /2 HTTP/1.1\\r\\nHost: shop\\r\\nContent-Length: 3\\r\\n\\r\\nabcGET /3 HTTP/1.1\\r\\nHost: shop\\r\\nConnection: close\\r\\n\\r\\n",
        ],
        &[],
    ),
    ("HTTP/1.0", &["GET /old HTTP/1.0\\r\\n\\r\\n"], &[]),
    (
        "HTTP/1.0 with keep-alive",
        &[
            "GET /1 HTTP/1.0\\r\\nHost: shop\\r\\nConnection: keep-alive\\r\\n\\r\\n",
            "GET /2 HTTP/1.0\\r\\nHost: shop\\r\\n\\r\\n",
        ],
        &["--pause-ms", "200"],
    ),
    (
        "absolute-form",
        &[
            "GET http://shop/absolute?a=b HTTP/1.1\\r\\nHost: shop\\r\\nConnection: close\\r\\n\\r\\n",
        ],
        &[],
    ),
    (
        "the asterisk",
        &["OPTIONS * HTTP/1.1\\r\\nHost: shop\\r\\nConnection: close\\r\\n\\r\\n"],
        &[],
    ),
    (
        "split between CR and LF",
        &[
            "POST / HTTP/1.1\\r\\nHo",
            "st: shop\\r",
            "\\nConnection: close\\r\\nContent-Length: 6\\r\\n\\r",
            "\\nabc",
            "def",
        ],
        &[],
    ),
    (
        "a byte at a time",
        &["GET /slowly HTTP/1.1\\r\\nHost: shop\\r\\nConnection: close\\r\\n\\r\\n"],
        &["--bytewise", "--pause-ms", "2"],
    ),
    (
        "half-closed after the request",
        &["GET /delay/300 HTTP/1.1\\r\\nHost: shop\\r\\nConnection: close\\r\\n\\r\\n"],
        &["--half-close"],
    ),
];

/// The same of `curl`, by what it shows and by what the server saw.
fn same_curl(stage: &Stage, pair: Pair<'_>, path: &str, args: &[&str]) -> Result<()> {
    let ask = |pair: Pair<'_>| curl_shop(pair.client, pair.at(HTTP), path, args);
    let (plain, meshed) = (ask(stage.plain())?, ask(pair)?);
    ensure!(plain.exit == 0, "curl alone fails: {plain:?}");
    let (plain, meshed) = (comparable(plain)?, comparable(meshed)?);
    ensure!(
        meshed == plain,
        "without the mesh {plain:?}\n   through it {meshed:?}"
    );
    Ok(())
}

/// Without what differs between any two answers: times, names and addresses.
fn comparable(mut shown: Shown) -> Result<(Shown, Option<Seen>)> {
    shown
        .headers
        .retain(|(name, _)| name != "date" && name != "x-served-by");
    let json = shown.header("content-type") == Some("application/json");
    let mut seen = None;
    if json && !shown.body.is_empty() {
        seen = Some(anonymous(seen_in(&shown.body)?));
        // Longer by a longer address.
        shown.headers.retain(|(name, _)| name != "content-length");
        shown.body.clear();
    } else if json {
        shown.headers.retain(|(name, _)| name != "content-length");
    }
    Ok((shown, seen))
}

fn seen_in(body: &str) -> Result<Seen> {
    serde_json::from_str(body).with_context(|| format!("reading {body}"))
}

fn anonymous(mut seen: Seen) -> Seen {
    seen.name.clear();
    seen.peer = ([0, 0, 0, 0], 0).into();
    seen.connection = 0;
    // In whichever form the client sent it: a proxy may pass on any.
    if let Some(rest) = seen.path.strip_prefix("http://shop") {
        let path = rest.find('/').map_or("/", |at| &rest[at..]);
        seen.path = path.to_owned();
    }
    // A matter between neighbours, of which the mesh is one.
    seen.headers.retain(|(name, _)| name != "connection");
    seen.headers
        .retain(|(name, _)| !CLIENT_ID.contains(&name.as_str()));
    seen.headers.sort();
    seen
}

/// The same of bytes, by the answers' heads and by what the server saw.
fn same_raw(stage: &Stage, pair: Pair<'_>, send: &[&str], further: &[&str]) -> Result<()> {
    let ask = |pair: Pair<'_>| raw(pair.client, pair.at(HTTP), send, further);
    let (plain, meshed) = (ask(stage.plain())?, ask(pair)?);
    ensure!(
        plain.outcome == "eof" && !plain.statuses.is_empty(),
        "alone: {plain:?}"
    );
    let (plain, meshed) = (comparable_raw(&plain)?, comparable_raw(&meshed)?);
    ensure!(
        meshed == plain,
        "without the mesh {plain:?}\n   through it {meshed:?}"
    );
    Ok(())
}

/// How it ended, the answers' status lines and what the server saw.
fn comparable_raw(raw: &Raw) -> Result<(String, Vec<u16>, Vec<Seen>)> {
    let text = raw.received.replace("\\\"", "\"");
    let mut seen = Vec::new();
    for (at, _) in text.match_indices("{\"") {
        let end = text[at..].find("\\n").context("the end of an answer")?;
        seen.push(anonymous(seen_in(&text[at..at + end])?));
    }
    Ok((raw.outcome.clone(), raw.statuses.clone(), seen))
}

fn keep_alive(stage: &Stage, pair: Pair<'_>) -> Result<()> {
    let connections = |pair: Pair<'_>| -> Result<usize> {
        let ask = |path| seen(&curl_shop(pair.client, pair.at(HTTP), path, &[])?);
        let before = ask("/before")?.connection;
        let url = format!("http://{}/again", pair.at(HTTP));
        let many = pair.client.command("curl")?;
        let many = many
            .args(["-sS", "-w", "%{num_connects}\n", "-o", "/dev/null"])
            .args([url.as_str(); 3]);
        // Each `-o` is for one URL.
        let printed = many.args(["-o", "/dev/null", "-o", "/dev/null"]).run()?;
        ensure!(
            printed == "1\n0\n0\n",
            "curl opened connections: {printed:?}"
        );
        let after = ask("/after")?.connection;
        Ok(usize::try_from(after - before)?)
    };
    ensure!(
        connections(stage.plain())? == 2,
        "alone, it is two connections"
    );
    // Through the mesh it may be less: connections to servers are kept and shared.
    ensure!(
        connections(pair)? <= 2,
        "the server saw more connections than the client made"
    );
    Ok(())
}

fn python(_: &Stage, pair: Pair<'_>) -> Result<()> {
    let _server = python_http_server(pair.server, PYTHON)?;
    let ask = |path, args: &[&str]| curl_shop(pair.client, pair.at(PYTHON), path, args);
    let page = ask("/", &[])?;
    ensure!(
        page.body == format!("hello from {}\n", pair.server.name()),
        "{page:?}"
    );
    ensure!(
        page.header("server")
            .is_some_and(|it| it.contains("SimpleHTTP")),
        "{page:?}"
    );
    expect_code(&ask("/nothing", &[])?, 404)?;
    expect_code(&ask("/", &["-X", "POST"])?, 501)?;
    expect_code(&ask("/", &["--head"])?, 200)
}

fn nginx(_: &Stage, pair: Pair<'_>) -> Result<()> {
    let nginx = Nginx::start_with_http2(pair.server, NGINX, NGINX_H2)?;
    let large = "0123456789abcdef".repeat(100_000);
    nginx.add_file("large", &large)?;
    for (port, args) in [
        (NGINX, [].as_slice()),
        (NGINX_H2, &["--http2-prior-knowledge"]),
    ] {
        let page = curl_shop(pair.client, pair.at(port), "/large", args)?;
        ensure!(
            page.code() == 200 && page.body == large,
            "{} with {} bytes",
            page.status,
            page.body.len()
        );
        let part = [args, &["-H", "Range: bytes=16-19"]].concat();
        let part = curl_shop(pair.client, pair.at(port), "/large", &part)?;
        ensure!(part.code() == 206 && part.body == "0123", "{part:?}");
        let tag = part.header("etag").context("no ETag")?.to_owned();
        let unless = format!("If-None-Match: {tag}");
        let unchanged = [args, &["-H", &unless]].concat();
        expect_code(
            &curl_shop(pair.client, pair.at(port), "/large", &unchanged)?,
            304,
        )?;
    }
    let line = nginx.wait_for_request("large")?;
    ensure!(
        line.client.ip() == pair.client.addresses()[0],
        "nginx saw {line:?}"
    );
    nginx.stop()
}

fn h2load(_: &Stage, pair: Pair<'_>) -> Result<()> {
    let url = format!("http://{}/bytes/1000", pair.at(HTTP));
    for args in [["-c4", "-m1", "--h1"].as_slice(), &["-c4", "-m20"]] {
        let h2load = pair.client.command("h2load")?;
        let printed = h2load.args(["-n", "400"]).args(args).arg(&url).run()?;
        let all = "400 succeeded, 0 failed, 0 errored, 0 timeout";
        ensure!(printed.contains(all), "h2load {args:?} says {printed}");
    }
    let nghttp = pair.client.command("nghttp")?;
    let printed = nghttp
        .args(["--null-out", "--stat", "--multiply=10", &url])
        .run()?;
    let answered = printed
        .lines()
        .filter(|line| line.contains(" 200 "))
        .count();
    ensure!(answered == 10, "nghttp got {answered} answers: {printed}");
    Ok(())
}

fn chunks_in_time(_: &Stage, pair: Pair<'_>) -> Result<()> {
    let request = "GET /stream?chunks=2&interval=3000 HTTP/1.1\\r\\nHost: shop\\r\\n\\r\\n";
    let first = raw(
        pair.client,
        pair.at(HTTP),
        &[request],
        &["--until", "chunk 0"],
    )?;
    ensure!(first.outcome == "found", "{first:?}");
    ensure!(
        first.elapsed_ms < 2000.0,
        "the first chunk waited for the second: {first:?}"
    );
    Ok(())
}

fn broken(stage: &Stage, pair: Pair<'_>) -> Result<()> {
    let ask = |pair: Pair<'_>| curl_shop(pair.client, pair.at(HTTP), "/reset", &[]);
    let (plain, meshed) = (ask(stage.plain())?, ask(pair)?);
    ensure!(plain.exit != 0, "a reset looks fine: {plain:?}");
    // A proxy may say so in an answer of its own, but not in one that looks like the server's.
    ensure!(meshed.exit != 0 || meshed.code() == 502, "{meshed:?}");
    Ok(())
}

fn tracing(_: &Stage, pair: Pair<'_>) -> Result<()> {
    let sent = [
        "traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "tracestate: vendor=value",
        "b3: 80f198ee56343ba864fe8b2a57d3eff7-e457b5a2e4d86bd1-1",
        "x-b3-traceid: 80f198ee56343ba864fe8b2a57d3eff7",
        "x-request-id: 4711",
        "x-forwarded-for: 203.0.113.7",
        "x-forwarded-proto: https",
        "x-forwarded-host: shop.example",
        "forwarded: for=203.0.113.7;proto=https",
        "x-b3-spanid: e457b5a2e4d86bd1",
        "x-b3-sampled: 1",
        "baggage: a=b",
    ];
    for version in ["--http1.1", "--http2-prior-knowledge"] {
        let mut args: Vec<&str> = sent.iter().flat_map(|header| ["-H", header]).collect();
        args.push(version);
        let written = seen(&curl_shop(pair.client, pair.at(HTTP), "/", &args)?)?;
        for header in sent {
            let (name, value) = header.split_once(": ").context("a header")?;
            let found = written.header(name);
            ensure!(found == [value], "{name}: {found:?}");
        }
        ensure!(
            written.peer.ip() == pair.client.addresses()[0],
            "the server saw {}",
            written.peer
        );
        // Nobody adds any.
        let plain = seen(&curl_shop(pair.client, pair.at(HTTP), "/", &[version])?)?;
        for header in sent {
            let (name, _) = header.split_once(": ").context("a header")?;
            ensure!(plain.header(name).is_empty(), "{name} was added");
        }
    }
    Ok(())
}

/// `TE` is for one hop (RFC 9110, section 10.1.4), and what it says of trailers for all of them.
fn trailers(stage: &Stage, pair: Pair<'_>) -> Result<()> {
    let request = "POST /trailers HTTP/1.1\\r\\nHost: shop\\r\\nTE: gzip, trailers\\r\\nConnection: TE, close\\r\\nContent-Length: 3\\r\\n\\r\\nabc";
    for pair in [stage.plain(), pair] {
        let got = raw(pair.client, pair.at(HTTP), &[request], &[])?;
        let (_, last) = got
            .received
            .rsplit_once("\\r\\n0\\r\\n")
            .context("chunks")?;
        ensure!(last.contains(": "), "no trailers: {got:?}");
    }
    Ok(())
}

const HTTP: u16 = 8080;
const PYTHON: u16 = 8081;
const NGINX: u16 = 8082;
const NGINX_H2: u16 = 8083;
