//! How long requests may take: what is answered when they take longer, and what becomes of the exchange.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::json;
use weft_tests::apps::{Shown, curl_shop};
use weft_tests::manifests::{ServiceSpec, backend, http_route};
use weft_tests::metrics::wait_for_metric;
use weft_tests::scenario::eventually;
use weft_tests::webapp::{HttpServer, raw};
use weft_tests::{Checks, Cluster, Pod, PodSpec};

use crate::stage::{VERSIONS, expect_code, seen, serving};

#[test]
fn http_timeouts() {
    let scene = Scene::build().expect("a cluster");
    let mut checks = Checks::new("http timeouts");
    let mut check = |name: &str, run: fn(&Scene) -> Result<()>| {
        checks.check(name, || run(&scene));
    };
    check("a route bounds requests", request);
    check("a route bounds what a server takes", backend_request);
    check("an answer that has begun is cut off", cut_off);
    check("a Service bounds responses", response);
    check("what stands still is given up", idle);
    check("clients say how long they wait, where they may", headers);
    check(
        "a connection that was given up is not used again",
        not_reused,
    );
    check("calls end when their client's time is up", deadlines);
    check("timeouts are counted", counted);
    check("a ServiceProfile says both", profile);
    checks.finish();
}

/// A server on each node, of one Service each.
struct Scene {
    servers: Vec<(HttpServer, Pod)>,
    client: Pod,
    cluster: Cluster,
}

impl Scene {
    fn build() -> Result<Scene> {
        let cluster = Cluster::start()?;
        let client = cluster.add_pod(PodSpec::new("client").on(0))?;
        let mut servers = Vec::new();
        for (name, node) in [("far", 1), ("near", 0)] {
            let pod = cluster.add_pod(PodSpec::new(name).on(node))?;
            let http = HttpServer::start(&pod, HTTP, &[])?;
            servers.push((http, pod));
        }
        Ok(Scene {
            servers,
            client,
            cluster,
        })
    }

    /// A Service of the pod of this name with these annotations.
    fn service(&self, name: &str, pod: &str, annotations: &[(&str, &str)]) -> Result<SocketAddr> {
        let mut spec = ServiceSpec::new(name).select("app", pod);
        for (key, value) in annotations {
            spec = spec.annotation(key, value);
        }
        let spec = spec.port(80, HTTP);
        serving(&self.cluster, &self.client, &spec, 80)
    }

    fn ask(&self, target: SocketAddr, path: &str, args: &[&str]) -> Result<(Shown, Duration)> {
        let began = Instant::now();
        let shown = curl_shop(&self.client, target, path, args)?;
        Ok((shown, began.elapsed()))
    }

    /// Fails unless this is answered as too late, soon.
    fn expect_late(&self, target: SocketAddr, path: &str, args: &[&str], why: &str) -> Result<()> {
        let (shown, took) = self.ask(target, path, args)?;
        expect_code(&shown, 504)?;
        ensure!(shown.header("weft-error") == Some(why), "{shown:?}");
        ensure!(took < SOON, "it took {took:?}");
        Ok(())
    }
}

fn request(scene: &Scene) -> Result<()> {
    for pod in ["far", "near"] {
        let name = format!("request-{pod}");
        let target = scene.service(&name, pod, &[])?;
        let rules = json!([{
            "timeouts": {"request": "400ms"},
            "backendRefs": [backend(&name, 80, 1)],
        }]);
        let route = http_route("default", &name, &name, 80, &rules);
        scene.cluster.apply(&route)?;
        eventually("the route to be in effect", || {
            expect_code(&scene.ask(target, "/delay/3000", &[])?.0, 504)
        })?;
        for version in VERSIONS {
            scene.expect_late(target, "/delay/10000", version, "request_timeout")?;
            expect_code(&scene.ask(target, "/delay/50", version)?.0, 200)?;
        }
    }
    Ok(())
}

fn backend_request(scene: &Scene) -> Result<()> {
    let target = scene.service("backend-request", "far", &[])?;
    let rules = json!([{
        "timeouts": {"request": "20s", "backendRequest": "300ms"},
        "backendRefs": [backend("backend-request", 80, 1)],
    }]);
    let route = http_route("default", "backend-request", "backend-request", 80, &rules);
    scene.cluster.apply(&route)?;
    eventually("the route to be in effect", || {
        expect_code(&scene.ask(target, "/delay/3000", &[])?.0, 504)
    })?;
    for version in VERSIONS {
        scene.expect_late(target, "/delay/10000", version, "backend_timeout")?;
    }
    Ok(())
}

fn cut_off(scene: &Scene) -> Result<()> {
    for pod in ["far", "near"] {
        let annotations = [("timeout.linkerd.io/request", "500ms")];
        let target = scene.service(&format!("cut-{pod}"), pod, &annotations)?;
        for version in VERSIONS {
            let (shown, took) = scene.ask(target, "/stream?chunks=200&interval=100", version)?;
            expect_code(&shown, 200)?;
            // Partial file, or a stream that was reset.
            ensure!([18, 92].contains(&shown.exit), "{shown:?}");
            ensure!(shown.body.starts_with("chunk 0\nchunk 1\n"), "{shown:?}");
            ensure!(took < SOON, "it took {took:?}");
            let (shown, _) = scene.ask(target, "/stream?chunks=3&interval=50", version)?;
            ensure!(shown.exit == 0, "{shown:?}");
        }
    }
    Ok(())
}

fn response(scene: &Scene) -> Result<()> {
    let annotations = [("weft.dev/timeout-response", "400ms")];
    let target = scene.service("response", "far", &annotations)?;
    for version in VERSIONS {
        scene.expect_late(target, "/delay/10000", version, "response_timeout")?;
    }
    // From the end of the request on: one that is sent slowly may be.
    let head = "POST /echo HTTP/1.1\\r\\nhost: shop\\r\\ncontent-length: 4\\r\\n\\r\\n";
    let slowly = ["--pause-ms", "300", "--until", "abcd"];
    let answer = raw(&scene.client, target, &[head, "a", "b", "c", "d"], &slowly)?;
    ensure!(
        answer.statuses == [200] && answer.elapsed_ms > 800.0,
        "{answer:?}"
    );
    Ok(())
}

fn idle(scene: &Scene) -> Result<()> {
    let annotations = [("timeout.linkerd.io/idle", "500ms")];
    let target = scene.service("idle", "near", &annotations)?;
    for version in VERSIONS {
        scene.expect_late(target, "/delay/10000", version, "stream_idle")?;
        let (shown, _) = scene.ask(target, "/stream?chunks=12&interval=100", version)?;
        ensure!(
            shown.exit == 0 && shown.body.ends_with("chunk 11\n"),
            "{shown:?}"
        );
        let (shown, took) = scene.ask(target, "/stream?chunks=2&interval=10000", version)?;
        ensure!([18, 92].contains(&shown.exit), "{shown:?}");
        ensure!(took < SOON, "it took {took:?}");
    }
    Ok(())
}

fn headers(scene: &Scene) -> Result<()> {
    let allowed = [("weft.dev/request-headers", "enabled")];
    let allowed = scene.service("heeds", "far", &allowed)?;
    let ignored = scene.service("ignores", "far", &[("timeout.linkerd.io/request", "20s")])?;
    for prefix in ["l5d", "weft"] {
        for (name, why) in [
            ("timeout", "request_timeout"),
            ("response-timeout", "response_timeout"),
        ] {
            let header = format!("{prefix}-{name}: 300ms");
            scene.expect_late(allowed, "/delay/10000", &["-H", &header], why)?;
            let header = format!("{prefix}-{name}: 20s");
            let (shown, _) = scene.ask(allowed, "/", &["-H", &header])?;
            let name = format!("{prefix}-{name}");
            ensure!(seen(&shown)?.header(&name).is_empty(), "{shown:?}");
            let header = format!("{name}: 300ms");
            let (shown, _) = scene.ask(ignored, "/delay/600", &["-H", &header])?;
            expect_code(&shown, 200)?;
        }
    }
    // Weft's name comes first.
    let both = ["-H", "l5d-timeout: 20s", "-H", "weft-timeout: 300ms"];
    scene.expect_late(allowed, "/delay/10000", &both, "request_timeout")
}

fn not_reused(scene: &Scene) -> Result<()> {
    for pod in ["far", "near"] {
        let annotations = [("timeout.linkerd.io/request", "400ms")];
        let target = scene.service(&format!("reuse-{pod}"), pod, &annotations)?;
        let connection =
            || -> Result<u64> { Ok(seen(&scene.ask(target, "/", &[])?.0)?.connection) };
        let first = connection()?;
        ensure!(connection()? == first, "the connection is not kept");
        scene.expect_late(target, "/delay/2000", &[], "request_timeout")?;
        let then = connection()?;
        ensure!(then != first, "connection {then} was used again");
    }
    Ok(())
}

/// By a client that knows of no deadline itself, so that it is the mesh that ends the call.
fn deadlines(scene: &Scene) -> Result<()> {
    let target = scene.service("calls", "far", &[])?;
    let call = [
        "--http2-prior-knowledge",
        "-H",
        "content-type: application/grpc",
        "-H",
        "grpc-timeout: 400m",
        "--data",
        "x",
    ];
    let (shown, took) = scene.ask(target, "/delay/10000", &call)?;
    expect_code(&shown, 200)?;
    ensure!(shown.header("grpc-status") == Some("4"), "{shown:?}");
    ensure!(
        shown.header("weft-error") == Some("request_timeout"),
        "{shown:?}"
    );
    ensure!(took < SOON, "it took {took:?}");
    let (shown, _) = scene.ask(target, "/delay/50", &call)?;
    ensure!(
        seen(&shown)?.header("grpc-timeout") == ["400m"],
        "{shown:?}"
    );
    let (shown, took) = scene.ask(target, "/stream?chunks=200&interval=100", &call)?;
    ensure!(shown.exit == 92 && took < SOON, "{shown:?} in {took:?}");
    // A shorter time than the client's is told to the server.
    let annotations = [("timeout.linkerd.io/request", "300ms")];
    let shorter = scene.service("shorter", "far", &annotations)?;
    let (shown, _) = scene.ask(shorter, "/", &call)?;
    let told = seen(&shown)?.header("grpc-timeout").concat();
    ensure!(told != "400m" && !told.is_empty(), "{shown:?}");
    // What nobody can read is none.
    let unread = [
        "-H",
        "content-type: application/grpc",
        "-H",
        "grpc-timeout: soon",
    ];
    expect_code(&scene.ask(target, "/delay/600", &unread)?.0, 200)
}

fn counted(scene: &Scene) -> Result<()> {
    let node = scene.cluster.node(0);
    let status = |family: &str| format!("outbound_{family}_route_request_statuses_total");
    for (time, why, error) in [
        ("request", "request_timeout", "REQUEST_TIMEOUT"),
        ("response", "response_timeout", "RESPONSE_STREAM_TIMEOUT"),
        ("idle", "stream_idle", "IDLE_TIMEOUT"),
    ] {
        let name = format!("counted-{time}");
        let annotation = format!("timeout.linkerd.io/{time}");
        let target = scene.service(&name, "far", &[(&annotation, "200ms")])?;
        scene.expect_late(target, "/delay/10000", &[], why)?;
        let labels = [
            ("parent_name", name.as_str()),
            ("http_status", "504"),
            ("error", error),
        ];
        wait_for_metric(node, &status("http"), &labels, 1.0)?;
        let call = [
            "--http2-prior-knowledge",
            "-H",
            "content-type: application/grpc",
            "--data",
            "x",
        ];
        let (shown, _) = scene.ask(target, "/delay/10000", &call)?;
        ensure!(shown.header("grpc-status") == Some("4"), "{shown:?}");
        let labels = [
            ("parent_name", name.as_str()),
            ("grpc_status", "DEADLINE_EXCEEDED"),
            ("error", error),
        ];
        wait_for_metric(node, &status("grpc"), &labels, 1.0)?;
    }
    Ok(())
}

/// Of Linkerd: how long, and what is sent again.
fn profile(scene: &Scene) -> Result<()> {
    // It takes the place of what the Service says, but for whether clients may say something.
    let of_service = [
        ("timeout.linkerd.io/response", "5s"),
        ("retry.linkerd.io/http", "5xx"),
        ("weft.dev/request-headers", "enabled"),
    ];
    let target = scene.service("profiled", "far", &of_service)?;
    let mut profile = json!({
        "apiVersion": "linkerd.io/v1alpha2",
        "kind": "ServiceProfile",
        "metadata": {"name": "profiled.default.svc.cluster.local", "namespace": "default"},
        "spec": {"routes": [
            {"name": "slow", "condition": {"pathRegex": "/delay/.*"}, "timeout": "300ms"},
            {"name": "flaky", "isRetryable": true,
                "condition": {"all": [{"method": "GET"}, {"not": {"pathRegex": "/other"}}]}},
        ]},
    });
    scene.cluster.apply(&profile)?;
    eventually("the ServiceProfile to be in effect", || {
        expect_code(&scene.ask(target, "/delay/3000", &[])?.0, 504)
    })?;
    scene.expect_late(target, "/delay/10000", &[], "request_timeout")?;
    let (server, pod) = &scene.servers[0];
    let longer = ["-H", "weft-timeout: 8s"];
    expect_code(&scene.ask(target, "/delay/900", &longer)?.0, 200)?;
    for (args, path, code) in [
        (&["--request", "GET"][..], "/flaky", 200),
        (&["--data", "x"], "/flaky", 503),
        (&["--request", "GET"], "/other", 503),
        (&["-H", "weft-retry-http: 5xx"], "/other", 200),
    ] {
        server.configure_some(pod, 0, 503, 1)?;
        let (shown, _) = scene.ask(target, path, args)?;
        server.configure(pod, 0, 200)?;
        expect_code(&shown, code)?;
    }
    // A budget without any: whoever asks for a retry, a route or the client.
    profile["spec"]["retryBudget"] =
        json!({"retryRatio": 0, "minRetriesPerSecond": 0, "ttl": "10s"});
    scene.cluster.apply(&profile)?;
    for (args, path) in [
        (&["--request", "GET"][..], "/flaky"),
        (&["-H", "weft-retry-http: 5xx"], "/other"),
    ] {
        eventually("nothing to be sent again", || {
            server.configure_some(pod, 0, 503, 1)?;
            let (shown, _) = scene.ask(target, path, args)?;
            server.configure(pod, 0, 200)?;
            expect_code(&shown, 503)
        })?;
    }
    Ok(())
}

/// Far below what servers are asked to take, and far above what is to pass.
const SOON: Duration = Duration::from_secs(4);
const HTTP: u16 = 8080;
