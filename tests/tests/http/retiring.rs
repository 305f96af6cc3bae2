//! What is taken away while it is used: Services, and ports of them. What is on its way finishes, what is new is
//! refused. And clients of other kinds than those that all other tests use.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::json;
use weft_tests::apps::{Nginx, curl_shop, url};
use weft_tests::command::Process;
use weft_tests::manifests::ServiceSpec;
use weft_tests::scenario::eventually;
use weft_tests::webapp::{HttpLoad, HttpServer, Transcript};
use weft_tests::{Checks, DEADLINE};

use crate::stage::{Pair, Stage, expect_code, serving};

#[test]
fn http_retiring() {
    let stage = Stage::build().expect("a cluster");
    let start = |pod| HttpServer::start(pod, HTTP, &["--quiet"]).expect("a server");
    let _servers = [&stage.far, &stage.near].map(start);
    let mut checks = Checks::new("http retiring");
    stage.check_meshed(&mut checks, "a Service is removed", service_removed);
    stage.check_meshed(&mut checks, "a port of a Service is removed", port_removed);
    stage.check_meshed(&mut checks, "an endpoint that is not ready", not_ready);
    stage.check_meshed(&mut checks, "many connections that are kept", many_kept);
    stage.check_meshed(&mut checks, "a client of HTTP/1.0", http10);
    stage.check_meshed(&mut checks, "h2load and nginx", h2load);
    checks.check("a server that says how long it waits", || {
        said_to_wait(&stage)
    });
    checks.finish();
}

fn service_removed(stage: &Stage, pair: Pair<'_>) -> Result<()> {
    let name = format!("removed-{}", pair.server.name());
    let spec = ServiceSpec::new(&name).select("app", pair.server.name());
    let target = serving(&stage.cluster, pair.client, &spec.port(80, HTTP), 80)?;
    finishes(pair, target, || {
        stage
            .cluster
            .manifests()
            .remove(&format!("service-default-{name}"))
    })
}

fn port_removed(stage: &Stage, pair: Pair<'_>) -> Result<()> {
    let name = format!("changed-{}", pair.server.name());
    let spec = || ServiceSpec::new(&name).select("app", pair.server.name());
    let both = spec().port(80, HTTP).port(81, HTTP);
    let target = serving(&stage.cluster, pair.client, &both, 80)?;
    let other = SocketAddr::new(target.ip(), 81);
    finishes(pair, target, || {
        let mut manifest = both.manifest(&[target.ip().to_string()]);
        let ports = manifest["spec"]["ports"].as_array_mut();
        ports.map(|it| it.remove(0));
        stage.cluster.apply(&manifest)
    })?;
    expect_code(&curl_shop(pair.client, other, "/", &[])?, 200)
}

/// Nothing new is sent there, until it is ready again.
fn not_ready(stage: &Stage, pair: Pair<'_>) -> Result<()> {
    let name = format!("unready-{}", pair.server.name());
    let spec = ServiceSpec::new(&name).select("app", pair.server.name());
    let target = serving(&stage.cluster, pair.client, &spec.port(80, HTTP), 80)?;
    let open = begin(pair, target)?;
    let mut manifest = pair.server.manifest();
    manifest["status"]["conditions"] = json!([{"type": "Ready", "status": "False"}]);
    stage.cluster.apply(&manifest)?;
    weft_tests::wait_for("the endpoint to be gone", DEADLINE, || {
        let known = stage.cluster.node(0).known_service(&name)?;
        let endpoints = known.map(|it| it["ports"][0]["endpoints"].clone());
        Ok((endpoints == Some(json!([]))).then_some(()))
    })?;
    all_finish(open)?;
    let shown = curl_shop(pair.client, target, "/", &[])?;
    expect_code(&shown, 503)?;
    ensure!(
        shown.header("weft-error") == Some("no_endpoint"),
        "{shown:?}"
    );
    stage.cluster.apply(&pair.server.manifest())?;
    eventually("the Service to answer", || {
        expect_code(&curl_shop(pair.client, target, "/", &[])?, 200)
    })
}

/// Requests that are open when something is taken away are answered; afterwards connections are refused.
fn finishes(pair: Pair<'_>, target: SocketAddr, take_away: impl Fn() -> Result<()>) -> Result<()> {
    let open = begin(pair, target)?;
    take_away()?;
    eventually("connections to be refused", || {
        let shown = curl_shop(pair.client, target, "/", &["--max-time", "5"])?;
        ensure!(shown.code() == 0 && shown.exit != 28, "{shown:?}");
        Ok(())
    })?;
    all_finish(open)
}

/// Requests by both versions, before and after the head of the answer.
fn begin(pair: Pair<'_>, target: SocketAddr) -> Result<Vec<Process>> {
    let begun = |path: &str, version| {
        let curl = pair.client.command("curl")?.named("open-request");
        let curl = curl.args(["-sSN", "--max-time", "30", version, "-w", " %{http_code}"]);
        curl.arg(url(target, path)).spawn()
    };
    let mut open = vec![];
    for version in ["--http1.1", "--http2-prior-knowledge"] {
        open.push(begun("delay/10000", version)?);
        open.push(begun("stream?chunks=20&interval=500", version)?);
    }
    for streaming in [1, 3] {
        weft_tests::wait_for("the answer to begin", DEADLINE, || {
            Ok((!open[streaming].stdout().is_empty()).then_some(()))
        })?;
    }
    Ok(open)
}

/// They are on their way still, and are answered.
fn all_finish(mut open: Vec<Process>) -> Result<()> {
    for open in &mut open {
        ensure!(
            open.is_running(),
            "it was over before: {}",
            open.stdout().escape_debug()
        );
    }
    for mut open in open {
        open.wait(Duration::from_secs(30))?;
        let said = open.stdout();
        ensure!(said.ends_with(" 200"), "{said} {}", open.stderr());
    }
    Ok(())
}

/// It would wait for ever, and is left long before the agent tires of it.
fn said_to_wait(stage: &Stage) -> Result<()> {
    let server = Transcript::start(&stage.near, WAITS, &["--keep-alive", "1"])?;
    let target = stage.near.sockets(WAITS)[0];
    expect_code(&curl_shop(&stage.client, target, "/", &[])?, 200)?;
    server.wait_closed(1)
}

/// So many connections at once, each with a request now and then, and none has to be opened anew.
fn many_kept(stage: &Stage, pair: Pair<'_>) -> Result<()> {
    let connections = (MANY / STEPS).to_string();
    let args = ["--connections", &connections, "--pause-ms", "3000"];
    let args = [&args[..], &["--timeout-ms", "60000"]].concat();
    // Step by step: how many are opened at once is another question.
    let mut loads = vec![];
    for _ in 0..STEPS {
        loads.push(HttpLoad::start(&stage.client, pair.at(HTTP), &args)?);
        std::thread::sleep(Duration::from_secs(1));
    }
    for load in loads {
        let report = load.stop()?;
        report.expect_all("200")?;
        ensure!(
            report.answers >= MANY / STEPS && report.reconnects == 0,
            "{report:?}"
        );
    }
    Ok(())
}

fn http10(_: &Stage, pair: Pair<'_>) -> Result<()> {
    for (path, args) in [
        ("/", &[][..]),
        ("/", &["-d", "some=body"]),
        ("/", &["-H", "Connection: keep-alive"]),
        ("/bytes/100000", &["-o", "/dev/null"]),
        ("/stream?chunks=3&interval=10", &[]),
        ("/status/404", &[]),
    ] {
        let args = [&["-0"], args].concat();
        let shown = curl_shop(pair.client, pair.at(HTTP), path, &args)?;
        ensure!(shown.exit == 0, "{path} {args:?}: {shown:?}");
        expect_code(&shown, if path == "/status/404" { 404 } else { 200 })?;
        // It does not know of chunks.
        let coding = shown.header("transfer-encoding");
        ensure!(coding.is_none(), "{path} {args:?}: {shown:?}");
    }
    Ok(())
}

fn h2load(_: &Stage, pair: Pair<'_>) -> Result<()> {
    let nginx = Nginx::start_with_http2(pair.server, NGINX, NGINX_HTTP2)?;
    for (port, args) in [
        (NGINX_HTTP2, &["-c", "4", "-m", "32"][..]),
        (NGINX, &["--h1", "-c", "16"]),
    ] {
        let h2load = pair.client.command("h2load")?.args(["-n", "4000"]);
        let h2load = h2load.args(args).arg(url(pair.at(port), ""));
        let said = h2load.output(Duration::from_secs(60))?.success()?;
        ensure!(
            said.contains("4000 succeeded, 0 failed, 0 errored, 0 timeout")
                && said.contains("4000 2xx, 0 3xx, 0 4xx, 0 5xx"),
            "{port}: {}",
            said.escape_debug()
        );
    }
    nginx.stop()
}

const WAITS: u16 = 8100;
const HTTP: u16 = 8080;
const NGINX: u16 = 8081;
const NGINX_HTTP2: u16 = 8082;
const MANY: u64 = 2000;
const STEPS: u64 = 8;
