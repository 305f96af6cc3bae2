//! Who is refused before anybody knows what he speaks is told why if he speaks HTTP, and reset soon if not.

use anyhow::{Result, ensure};
use serde_json::json;
use weft_tests::apps::{Shown, curl_shop};
use weft_tests::hbone::Attempt;
use weft_tests::manifests::{ServiceSpec, http_route, server};
use weft_tests::metrics::wait_for_metric;
use weft_tests::pki::Authority;
use weft_tests::scenario::eventually;
use weft_tests::webapp::{GrpcServer, HttpServer, Raw, grpc_call, raw};
use weft_tests::{Checks, Pod};

use crate::stage::{Pair, Stage, expect_code, serving};

#[test]
fn http_refused() {
    let stage = Stage::build().expect("a cluster");
    let mut checks = Checks::new("http refused");
    let start = |pod| HttpServer::start(pod, DENIED, &[]).expect("a server");
    let servers = [&stage.far, &stage.near].map(start);
    let start = |pod| GrpcServer::start(pod, CALLS).expect("a server");
    let _grpc_servers = [&stage.far, &stage.near].map(start);
    checks.check("policy is in force", || deny(&stage));
    stage.check_meshed(&mut checks, "a denied client that speaks late", late);
    stage.check_meshed(&mut checks, "a denied client that says nothing", silent);
    stage.check_meshed(&mut checks, "a denied client outside of the mesh", outside);
    stage.check_meshed(&mut checks, "nobody listens", nobody);
    checks.check("a denied client that comes by HBONE", || hbone(&stage));
    checks.check("a filter that cannot be done", || filter(&stage));
    checks.check("no application was asked", || {
        for server in &servers {
            ensure!(server.requests()?.is_empty(), "{:?}", server.requests()?);
        }
        Ok(())
    });
    checks.finish();
}

fn deny(stage: &Stage) -> Result<()> {
    for pod in [&stage.far, &stage.near] {
        for (port, protocol) in [(DENIED, "unknown"), (CALLS, "gRPC"), (DECLARED, "HTTP/1")] {
            let name = format!("{}-{port}", pod.name());
            let mut denied = server("default", &name, pod.name(), port);
            denied["spec"]["proxyProtocol"] = json!(protocol);
            stage.cluster.apply(&denied)?;
        }
    }
    for (_, pair) in stage.meshed() {
        for client in [pair.client, &stage.plain_client] {
            eventually("the client to be denied", || {
                expect_denied(&curl_shop(client, pair.at(CALLS), "/", &[H2])?)
            })?;
        }
    }
    Ok(())
}

fn expect_denied(shown: &Shown) -> Result<()> {
    expect_code(shown, 403)?;
    let reasons = shown
        .headers
        .iter()
        .filter(|(name, _)| name == "weft-error");
    let reasons: Vec<&str> = reasons.map(|(_, value)| value.as_str()).collect();
    ensure!(reasons == ["denied"], "{shown:?}");
    Ok(())
}

/// The refusal is there before it says a word.
fn late(_: &Stage, pair: Pair<'_>) -> Result<()> {
    let got = raw(pair.client, pair.at(DENIED), &["", REQUEST], &PAUSE)?;
    expect_told(&got, 403, "denied")?;
    // Its first line comes in two.
    let got = raw(
        pair.client,
        pair.at(DENIED),
        &["GET", &REQUEST[3..]],
        &PAUSE,
    )?;
    expect_told(&got, 403, "denied")
}

fn expect_told(got: &Raw, status: u16, reason: &str) -> Result<()> {
    let told = format!("weft-error: {reason}\\r\\n");
    ensure!(
        got.statuses == [status] && got.received.contains(&told) && got.outcome == "eof",
        "not told {reason}: {got:?}"
    );
    Ok(())
}

/// Nobody can answer to it, and it hears so soon.
fn silent(stage: &Stage, pair: Pair<'_>) -> Result<()> {
    for client in [pair.client, &stage.plain_client] {
        let got = raw(client, pair.at(DENIED), &[], &[])?;
        expect_reset(&got, 4000.0)?;
        let got = raw(client, pair.at(DENIED), &["hello\\n"], &[])?;
        expect_reset(&got, 900.0)?;
    }
    Ok(())
}

fn expect_reset(got: &Raw, limit_ms: f64) -> Result<()> {
    ensure!(
        got.outcome == "reset" && got.received.is_empty() && got.elapsed_ms < limit_ms,
        "{got:?}"
    );
    Ok(())
}

/// It has no agent of its own that could answer it.
fn outside(stage: &Stage, pair: Pair<'_>) -> Result<()> {
    let client: &Pod = &stage.plain_client;
    for version in ["--http1.1", H2] {
        expect_denied(&curl_shop(client, pair.at(DENIED), "/", &[version])?)?;
    }
    let body = "x".repeat(50_000);
    let args = ["-X", "POST", "-d", &body];
    expect_denied(&curl_shop(client, pair.at(DENIED), "/", &args)?)?;
    let got = raw(client, pair.at(DENIED), &["", REQUEST], &PAUSE)?;
    expect_told(&got, 403, "denied")?;
    let called = grpc_call(client, pair.at(CALLS), &[])?;
    ensure!(called.code == 7, "{called:?}");
    let node = match pair.server.name() {
        "near" => 0,
        _ => 1,
    };
    let labels = [("pod", pair.server.name())];
    let node = stage.cluster.node(node);
    wait_for_metric(node, "inbound_http_authz_deny_total", &labels, 5.0).map(drop)
}

fn nobody(stage: &Stage, pair: Pair<'_>) -> Result<()> {
    // Another one each: where nobody listened is remembered.
    let got = raw(pair.client, pair.at(8491), &["", REQUEST], &PAUSE)?;
    expect_told(&got, 502, "connect_refused")?;
    expect_reset(&raw(pair.client, pair.at(8492), &[], &[])?, 4000.0)?;
    let again = raw(pair.client, pair.at(8492), &[], &[])?;
    ensure!(again.outcome == "refused", "{again:?}");
    let got = raw(&stage.plain_client, pair.at(8493), &["", REQUEST], &PAUSE)?;
    expect_told(&got, 502, "connect_refused")?;
    expect_code(
        &curl_shop(&stage.plain_client, pair.at(8494), "/", &[])?,
        502,
    )
}

/// Where it is known that the application speaks HTTP. Elsewhere the tunnel's own refusal says it.
fn hbone(stage: &Stage) -> Result<()> {
    let authority = Authority::of_cluster(stage.cluster.controller()?.ca_dir())?;
    let ask = |port| {
        let identity = authority.sign(&stage.client.identity())?;
        let attempt = Attempt::hbone(stage.far.sockets(port)[0], identity);
        let request = "GET / HTTP/1.1\r\nhost: shop\r\n\r\n";
        attempt
            .sending(request.as_bytes())
            .run(stage.client.netns())
    };
    let told = ask(DECLARED)?;
    let text = String::from_utf8_lossy(&told.received).to_lowercase();
    ensure!(
        told.status == 200
            && text.starts_with("http/1.1 403")
            && text.contains("weft-error: denied"),
        "{told:?}"
    );
    let refused = ask(DENIED)?;
    ensure!(refused.status == 401, "{refused:?}");
    Ok(())
}

fn filter(stage: &Stage) -> Result<()> {
    let _server = HttpServer::start(&stage.far, 8495, &[])?;
    let spec = ServiceSpec::new("filtered")
        .select("app", "far")
        .port(80, 8495);
    let target = serving(&stage.cluster, &stage.client, &spec, 80)?;
    let filters = json!([{"type": "ExtensionRef",
        "extensionRef": {"group": "example.org", "kind": "Wish", "name": "w"}}]);
    let rules = json!([{"filters": filters, "backendRefs": [{"name": "filtered", "port": 80}]}]);
    stage
        .cluster
        .apply(&http_route("default", "filtered", "filtered", 80, &rules))?;
    eventually("the route to be in force", || {
        let shown = curl_shop(&stage.client, target, "/", &[])?;
        expect_code(&shown, 500)?;
        let is_told = shown
            .headers
            .iter()
            .any(|(name, value)| name == "weft-error" && value == "bad_filter");
        ensure!(is_told, "{shown:?}");
        Ok(())
    })?;
    let called = grpc_call(&stage.client, target, &[])?;
    ensure!(called.code == 14, "{called:?}");
    Ok(())
}

const DENIED: u16 = 8480;
const CALLS: u16 = 8481;
const DECLARED: u16 = 8482;
const H2: &str = "--http2-prior-knowledge";
const REQUEST: &str = "GET / HTTP/1.1\\r\\nHost: shop\\r\\nConnection: close\\r\\n\\r\\n";
const PAUSE: [&str; 2] = ["--pause-ms", "500"];
