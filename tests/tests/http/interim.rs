//! What servers of HTTP/1 say before they answer reaches clients of HTTP/1.

use anyhow::{Result, ensure};
use weft_tests::Checks;
use weft_tests::testapp::Server;
use weft_tests::webapp::raw;

use crate::stage::{Pair, Stage};

#[test]
fn http_interim() {
    let stage = Stage::build().expect("a cluster");
    let mut checks = Checks::new("http interim");
    stage.check_meshed(&mut checks, "early hints come early", early);
    stage.check_meshed(&mut checks, "and before their answer", in_order);
    stage.check_meshed(&mut checks, "no more than a client has use for", bounded);
    checks.finish();
}

const HINTS: &str = "HTTP/1.1 103 Early Hints\\r\\nLink: </a.css>; rel=preload\\r\\nConnection: x-private\\r\\nX-Private: 1\\r\\n\\r\\n";
const PROCESSING: &str = "HTTP/1.1 102 Processing\\r\\n\\r\\n";
const ANSWER: &str = "HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\n\\r\\nok";
const GET: &str = "GET / HTTP/1.1\\r\\nHost: shop\\r\\n\\r\\n";

fn early(_: &Stage, pair: Pair<'_>) -> Result<()> {
    let args = [
        "--reply",
        HINTS,
        "--reply",
        ANSWER,
        "--reply-pause-ms",
        "3000",
    ];
    let _server = Server::start(pair.server, PORT, "reply", &args)?;
    let hints = "link: </a.css>; rel=preload\\r\\n\\r\\n";
    let got = raw(pair.client, pair.at(PORT), &[GET], &["--until", hints])?;
    ensure!(
        got.outcome == "found" && got.statuses == [103] && got.elapsed_ms < 2500.0,
        "{got:?}"
    );
    Ok(())
}

/// On one connection, whether they come alone or with the answer; but not to who has never heard of them.
fn in_order(_: &Stage, pair: Pair<'_>) -> Result<()> {
    let all = [PROCESSING, HINTS, ANSWER].concat();
    let _server = Server::start(pair.server, PORT + 1, "reply", &["--reply", &all])?;
    let target = pair.at(PORT + 1);
    let both = [102, 103, 200, 102, 103, 200];
    let twice = GET.repeat(2);
    for segments in [&[GET, GET][..], &[twice.as_str()]] {
        let args = ["--until", "ok", "--times", "2", "--pause-ms", "300"];
        let got = raw(pair.client, target, segments, &args)?;
        ensure!(got.outcome == "found" && got.statuses == both, "{got:?}");
    }
    let old = GET.replace("HTTP/1.1", "HTTP/1.0");
    let got = raw(pair.client, target, &[&old], &["--until", "ok"])?;
    ensure!(got.statuses == [200], "{got:?}");
    Ok(())
}

fn bounded(_: &Stage, pair: Pair<'_>) -> Result<()> {
    let all = [&PROCESSING.repeat(100), ANSWER].concat();
    let _server = Server::start(pair.server, PORT + 2, "reply", &["--reply", &all])?;
    let got = raw(pair.client, pair.at(PORT + 2), &[GET], &["--until", "ok"])?;
    let expected = [&[102; 16][..], &[200]].concat();
    ensure!(got.statuses == expected, "{got:?}");
    Ok(())
}

const PORT: u16 = 8620;
