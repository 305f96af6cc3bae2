//! What is no HTTP, or is not to be looked at: servers that speak first, TLS, opaque ports.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;
use weft_tests::apps::{MariaDb, Redis, curl_shop, curl_with};
use weft_tests::manifests::{ServiceSpec, server};
use weft_tests::metrics::wait_for_metric;
use weft_tests::scenario::{eventually, expect_echo};
use weft_tests::testapp::{self, Server};
use weft_tests::webapp::{HttpServer, raw};
use weft_tests::{Checks, Pod, PodSpec};

use crate::stage::{Pair, Stage, expect_code};

#[test]
fn http_left_alone() {
    let stage = Stage::build().expect("a cluster");
    let mut checks = Checks::new("left alone");
    stage.check_meshed(&mut checks, "a banner is not waited for", banner);
    stage.check_meshed(&mut checks, "redis on a port of its own", redis);
    stage.check_meshed(&mut checks, "mariadb on a port of its own", mariadb);
    stage.check_meshed(&mut checks, "TLS passes as it is", tls);
    stage.check_meshed(&mut checks, "a client that says nothing", silence);
    stage.check_meshed(&mut checks, "what only begins like HTTP", nearly_http);
    stage.check_meshed(
        &mut checks,
        "a client that ends its side at once",
        half_close,
    );
    checks.check("a server of HTTP/2 that speaks first", || {
        settings_first(&stage)
    });
    checks.check("an opaque port by annotation of the pod", || {
        opaque_by_pod(&stage)
    });
    checks.check("an opaque port by annotation of the Service", || {
        opaque_by_service(&stage)
    });
    checks.check("an opaque port by appProtocol", || {
        opaque_by_protocol(&stage)
    });
    checks.check("a Service's port that is declared to be HTTP's", || {
        declared_http(&stage)
    });
    checks.finish();
}

/// What is no HTTP is cut off where it comes from; who only looks whether somebody listens is not.
fn declared_http(stage: &Stage) -> Result<()> {
    let _servers = (
        HttpServer::start(&stage.far, 8098, &[])?,
        Server::start(&stage.far, 8099, "greet", &[])?,
    );
    let spec = ServiceSpec::new("declared").select("app", "far");
    let spec = spec.port(8098, 8098).speaks("http");
    let spec = spec.port(8099, 8099).speaks("grpc");
    let [address, _] = stage.cluster.add_service(&spec)?;
    let [http, greeting] = [8098, 8099].map(|port| SocketAddr::new(address, port));
    let counted = |name: &str, labels: &[(&str, &str)]| -> Result<f64> {
        Ok(stage.cluster.node(0).metrics()?.sum(name, labels))
    };
    eventually("the Service to answer", || {
        let shown = curl_shop(&stage.client, http, "/", &[])?;
        expect_code(&shown, 200)
    })?;
    for (version, args) in [("http1", &[][..]), ("http2", &["--http2-prior-knowledge"])] {
        let labels = [("protocol", version), ("how", "declared")];
        let before = counted("weft_protocol_detections_total", &labels)?;
        expect_code(&curl_shop(&stage.client, http, "/", args)?, 200)?;
        let after = counted("weft_protocol_detections_total", &labels)?;
        ensure!(after > before, "{version}: {after} after {before}");
    }
    let labels = [("pod", "client"), ("reason", "not_http")];
    for (target, bytes) in [
        (http, "SSH-2.0-client\\r\\n"),
        (http, "\\x16\\x00\\x00\\x00\\x00\\x00"),
        // The server is the first to speak.
        (greeting, ""),
    ] {
        let before = counted("weft_refused_total", &labels)?;
        let got = raw(&stage.client, target, &[bytes], &["--quiet-ms", "5000"])?;
        ensure!(got.outcome == "reset" && got.received.is_empty(), "{got:?}");
        let after = counted("weft_refused_total", &labels)?;
        ensure!(after > before, "{bytes:?}: {after} after {before}");
    }
    let before = counted("weft_refused_total", &labels)?;
    let got = raw(&stage.client, http, &[], &["--half-close"])?;
    ensure!(got.outcome == "eof", "{got:?}");
    ensure!((counted("weft_refused_total", &labels)? - before).abs() < 0.5);
    Ok(())
}

/// An SMTP-like server on a port that nobody declared: its first line comes at once, each time.
fn banner(_: &Stage, pair: Pair<'_>) -> Result<()> {
    let _server = Server::start(
        pair.server,
        2525,
        "greet",
        &["--greeting", "220 shop ESMTP\r\n"],
    )?;
    let greeted = |limit_ms: f64| -> Result<()> {
        let args = ["--until", "220 shop ESMTP\\r\\n"];
        let raw = raw(pair.client, pair.at(2525), &[], &args)?;
        let first = raw.first_byte_ms.with_context(|| format!("{raw:?}"))?;
        ensure!(raw.outcome == "found" && first < limit_ms, "{raw:?}");
        Ok(())
    };
    // The first makes the tunnel, too.
    greeted(2000.0)?;
    for _ in 0..5 {
        greeted(500.0)?;
    }
    let said = testapp::connect(
        pair.client,
        pair.at(2525),
        &["--receive-bytes", "20", "--send", "EHLO", "--half-close"],
    )?;
    said.expect(&["ok"]).map(drop)
}

fn redis(_: &Stage, pair: Pair<'_>) -> Result<()> {
    let _redis = Redis::start(pair.server, 7379)?;
    let address = pair.at(7379).ip();
    let start = Instant::now();
    let pong = Redis::command(pair.client, address, 7379, &["ping"])?.success()?;
    ensure!(pong.trim() == "PONG", "redis says {pong}");
    ensure!(
        start.elapsed() < Duration::from_secs(2),
        "it took {:?}",
        start.elapsed()
    );
    Ok(())
}

fn mariadb(_: &Stage, pair: Pair<'_>) -> Result<()> {
    let _database = MariaDb::start(pair.server, 7306)?;
    let address = pair.at(7306).ip();
    let query = || MariaDb::query(pair.client, address, 7306, "select 'first'")?.success();
    query()?;
    let start = Instant::now();
    ensure!(query()?.trim() == "first", "another answer");
    ensure!(
        start.elapsed() < Duration::from_secs(2),
        "it took {:?}",
        start.elapsed()
    );
    Ok(())
}

/// The client sees the server's own certificate.
fn tls(stage: &Stage, pair: Pair<'_>) -> Result<()> {
    let dir = pair.server.dir();
    let file = |name: &str| dir.join(name).display().to_string();
    let openssl = || pair.server.command("openssl");
    let days = ["-nodes", "-days", "1", "-subj", "/CN=shop"];
    openssl()?
        .args([
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
        ])
        .args(days)
        .args([
            "-addext",
            "subjectAltName=DNS:shop",
            "-keyout",
            &file("key.pem"),
            "-out",
            &file("cert.pem"),
        ])
        .run()?;
    let mut server = openssl()?
        .args(["s_server", "-accept", "8443", "-www"])
        .args(["-cert", &file("cert.pem"), "-key", &file("key.pem")])
        .spawn()?;
    server.wait_listening(8443)?;
    let curl = pair.client.command("curl")?;
    let page = curl
        .args(["-sS", "--max-time", "10", "--cacert", &file("cert.pem")])
        .arg("--resolve")
        .arg(format!("shop:8443:{}", pair.at(8443).ip()))
        .arg("https://shop:8443/")
        .run()?;
    ensure!(page.contains("s_server"), "{page}");
    names_are_logged(stage, pair)?;
    let labels = [
        ("direction", "outbound"),
        ("pod", "client"),
        ("peer", "src"),
    ];
    wait_for_metric(stage.cluster.node(0), "tcp_open_total", &labels, 1.0).map(drop)
}

/// The name that was asked for is in the access log, on both sides.
fn names_are_logged(stage: &Stage, pair: Pair<'_>) -> Result<()> {
    let original = format!("original={} ", pair.at(8443));
    let is_there = |node: usize, direction: &str| {
        let log = stage.cluster.node(node).agent_log();
        let direction = format!("direction=\"{direction}\"");
        let parts = [&original, &direction, " sni=shop "];
        log.lines()
            .any(|line| parts.iter().all(|it| line.contains(*it)))
    };
    eventually("the lines of the flow", || {
        ensure!(is_there(0, "outbound"), "no line of the client's side");
        let is_far = std::ptr::eq(pair.server, &stage.far);
        ensure!(!is_far || is_there(1, "inbound"), "no line of the server's");
        Ok(())
    })
}

/// A client that waits for its server for long, and then speaks HTTP after all, is served.
fn silence(_: &Stage, pair: Pair<'_>) -> Result<()> {
    let _server = HttpServer::start(pair.server, 8094, &[])?;
    let request = "GET / HTTP/1.1\\r\\nHost: shop\\r\\nConnection: close\\r\\n\\r\\n";
    let raw = raw(
        pair.client,
        pair.at(8094),
        &["", request],
        &["--pause-ms", "3000"],
    )?;
    ensure!(raw.statuses == [200] && raw.outcome == "eof", "{raw:?}");
    Ok(())
}

/// Bytes that are no HTTP go to the server as they are.
fn nearly_http(_: &Stage, pair: Pair<'_>) -> Result<()> {
    let _server = Server::start(pair.server, 8095, "echo", &[])?;
    for bytes in [
        "GET",
        "GE",
        "GET / FTP/1.0\\r\\n\\r\\n",
        "POSTED by mail\\n",
        "\\x16\\x03",
        "\\x00\\x01\\x02",
        "SSH-2.0-client\\r\\n",
    ] {
        let raw = raw(pair.client, pair.at(8095), &[bytes], &["--half-close"])?;
        ensure!(
            raw.outcome == "eof" && raw.received == bytes,
            "{bytes:?} came back as {raw:?}"
        );
    }
    Ok(())
}

/// Who only listens is sent what the server has to say.
fn half_close(_: &Stage, pair: Pair<'_>) -> Result<()> {
    let _server = Server::start(pair.server, 8096, "source", &["--bytes", "100000"])?;
    let args = ["--half-close", "--expect-pattern"];
    let got = testapp::connect(pair.client, pair.at(8096), &args)?.expect(&["ok"])?;
    ensure!(got.received == 100_000 && got.intact && got.eof, "{got:?}");
    Ok(())
}

/// An opaque port's bytes are not looked at: not even what is forbidden in HTTP is refused.
fn expect_opaque(client: &Pod, target: std::net::SocketAddr, stage: &Stage) -> Result<()> {
    let request = "GET / HTTP/1.1\\nHost: one\\nHost: two\\n\\n";
    let raw = raw(client, target, &[request], &["--half-close"])?;
    ensure!(
        raw.outcome == "eof" && raw.received.contains("Host: two"),
        "{raw:?}"
    );
    let metrics = stage.cluster.node(0).metrics()?;
    let port = target.port().to_string();
    let requests = metrics.sum(
        "request_total",
        &[("direction", "outbound"), ("target_port", &port)],
    );
    ensure!(
        requests < 0.5,
        "{requests} requests were counted on an opaque port"
    );
    expect_echo(client, target, "opaque").map(drop)
}

/// Its settings tell a client nothing that it would not say itself. Where its own side leaves them alone, as only a
/// Server tells it to, they come to the client's side before the client has spoken.
fn settings_first(stage: &Stage) -> Result<()> {
    let pod = stage.cluster.add_pod(PodSpec::new("settings").on(1))?;
    let mut opaque = server("default", "settings", "settings", 8097);
    opaque["spec"]["proxyProtocol"] = json!("opaque");
    opaque["spec"]["accessPolicy"] = json!("all-unauthenticated");
    stage.cluster.apply(&opaque)?;
    let _server = HttpServer::start(&pod, 8097, &["--speaks", "http2"])?;
    let detected = |how: &str| -> Result<f64> {
        let metrics = stage.cluster.node(0).metrics()?;
        let labels = [("protocol", "http2"), ("how", how)];
        Ok(metrics.sum("weft_protocol_detections_total", &labels))
    };
    let preface =
        "PRI * HTTP/2.0\\r\\n\\r\\nSM\\r\\n\\r\\n\\x00\\x00\\x00\\x04\\x00\\x00\\x00\\x00\\x00";
    let args = ["--pause-ms", "1000", "--quiet-ms", "1000"];
    eventually("the Server to be in force", || {
        let before = detected("detected")?;
        let got = raw(&stage.client, pod.sockets(8097)[0], &["", preface], &args)?;
        ensure!(
            got.outcome == "quiet" && !got.received.is_empty(),
            "{got:?}"
        );
        let after = detected("detected")?;
        ensure!(after > before, "{after} were detected, {before} before");
        Ok(())
    })
}

fn opaque_by_pod(stage: &Stage) -> Result<()> {
    for (name, node, annotation) in [
        ("opaque-one", 0, "weft.dev/opaque-ports"),
        ("opaque-two", 0, "config.linkerd.io/opaque-ports"),
        ("opaque-far", 1, "weft.dev/opaque-ports"),
    ] {
        let spec = PodSpec::new(name)
            .on(node)
            .annotation(annotation, "9000,9100-9101");
        let pod = stage.cluster.add_pod(spec)?;
        let _server = Server::start(&pod, 9101, "echo", &[])?;
        expect_opaque(&stage.client, pod.sockets(9101)[0], stage)?;
        let curled = curl_with(stage.client.command("curl")?, pod.sockets(9102)[0], "")?;
        ensure!(curled.status != 200, "nothing listens there: {curled:?}");
    }
    Ok(())
}

fn opaque_by_service(stage: &Stage) -> Result<()> {
    let _server = Server::start(&stage.near, 9200, "echo", &[])?;
    let spec = ServiceSpec::new("opaque-service")
        .select("app", "near")
        .port(9200, 9200)
        .annotation("weft.dev/opaque-ports", "9200");
    opaque_service(stage, &spec, 9200)
}

fn opaque_by_protocol(stage: &Stage) -> Result<()> {
    let _server = Server::start(&stage.far, 9300, "echo", &[])?;
    let spec = ServiceSpec::new("opaque-protocol")
        .select("app", "far")
        .port(9301, 9300)
        .speaks("linkerd.io/opaque");
    opaque_service(stage, &spec, 9301)
}

fn opaque_service(stage: &Stage, spec: &ServiceSpec, port: u16) -> Result<()> {
    let [address, _] = stage.cluster.add_service(spec)?;
    let target = (address, port).into();
    eventually("the Service to be there", || {
        expect_echo(&stage.client, target, "hello").map(drop)
    })?;
    expect_opaque(&stage.client, target, stage)
}
