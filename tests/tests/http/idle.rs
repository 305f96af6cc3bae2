//! Connections of clients on which nothing is asked for long are closed in order.

use anyhow::{Result, ensure};
use weft_tests::Checks;
use weft_tests::hostile::{PREFACE, frame, request};
use weft_tests::webapp::{HttpServer, raw};

use crate::stage::{Pair, Stage};

#[test]
fn http_idle() {
    let limit = format!("{LIMIT_MS}ms");
    let stage = Stage::build_with(&["--http-idle-timeout", &limit]).expect("a cluster");
    let mut checks = Checks::new("http idle");
    stage.check_meshed(&mut checks, "of HTTP/1", of_http1);
    stage.check_meshed(&mut checks, "of HTTP/2", of_http2);
    stage.check_meshed(&mut checks, "not while an answer is waited for", busy);
    checks.finish();
}

const GET: &str = "GET / HTTP/1.1\\r\\nHost: shop\\r\\n\\r\\n";

fn closed(stage: &Stage) -> Result<f64> {
    let metrics = stage.cluster.node(0).metrics()?;
    let labels = [("direction", "outbound")];
    Ok(metrics.sum("weft_http_idle_closed_total", &labels))
}

fn of_http1(stage: &Stage, pair: Pair<'_>) -> Result<()> {
    let _server = HttpServer::start(pair.server, HTTP, &[])?;
    let before = closed(stage)?;
    // The second request comes in time, and begins the time anew.
    let pause = (LIMIT_MS / 2).to_string();
    let args = ["--pause-ms", &pause, "--quiet-ms", "20000"];
    let got = raw(pair.client, pair.at(HTTP), &[GET, GET], &args)?;
    ensure!(
        got.outcome == "eof" && got.statuses == [200, 200],
        "{got:?}"
    );
    let (least, most) = (LIMIT_MS as f64 * 1.5, LIMIT_MS as f64 * 2.5);
    ensure!((least..most).contains(&got.elapsed_ms), "{got:?}");
    let counted = closed(stage)? - before;
    ensure!(counted > 0.5, "{counted} were counted");
    Ok(())
}

/// It is told by GOAWAY first (RFC 9113, section 6.8).
fn of_http2(stage: &Stage, pair: Pair<'_>) -> Result<()> {
    let _server = HttpServer::start(pair.server, HTTP + 1, &[])?;
    let before = closed(stage)?;
    let request = request("GET", "/");
    let bytes = [
        PREFACE,
        &frame(4, 0, 0, &[]),
        // The only one, and its end.
        &frame(1, 5, 1, &request),
    ]
    .concat();
    let file = pair.client.dir().join("idle-http2");
    std::fs::write(&file, bytes)?;
    let file = file.display().to_string();
    // Of no stream, with the last one that there can be, and without an error.
    let goaway =
        "\\x00\\x00\\x08\\x07\\x00\\x00\\x00\\x00\\x00\\x7f\\xff\\xff\\xff\\x00\\x00\\x00\\x00";
    let args = ["--file", &file, "--until", goaway, "--quiet-ms", "20000"];
    let got = raw(pair.client, pair.at(HTTP + 1), &[], &args)?;
    ensure!(got.outcome == "found", "{got:?}");
    ensure!(got.elapsed_ms >= LIMIT_MS as f64, "{got:?}");
    let counted = closed(stage)? - before;
    ensure!(counted > 0.5, "{counted} were counted");
    Ok(())
}

fn busy(_: &Stage, pair: Pair<'_>) -> Result<()> {
    let _server = HttpServer::start(pair.server, HTTP + 2, &[])?;
    let slow = format!("/delay/{}", LIMIT_MS * 3);
    let request = GET.replacen('/', &slow, 1);
    let args = ["--until", "\\r\\n\\r\\n", "--quiet-ms", "20000"];
    let got = raw(pair.client, pair.at(HTTP + 2), &[&request], &args)?;
    ensure!(got.statuses == [200], "{got:?}");
    Ok(())
}

const LIMIT_MS: u64 = 2000;
const HTTP: u16 = 8600;
