//! Services of which some endpoints speak HTTP/1 and others HTTP/2: clients of both versions are answered by all of
//! them, and see nothing of it.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, ensure};
use weft_tests::apps::{Nginx, curl_shop, python_http_server, url};
use weft_tests::manifests::ServiceSpec;
use weft_tests::scenario::eventually;
use weft_tests::webapp::{
    GrpcServer, HttpServer, Seen, grpc_call, http_load, raw, websocket_echo, websocket_server,
};
use weft_tests::{Checks, Cluster, DEADLINE, Pod, PodSpec, wait_for};

use crate::stage::{CLIENT_ID, Pair, Stage, expect_code, seen, serving};

#[test]
fn http_versions() {
    let scene = Scene::build().expect("a cluster");
    let mut checks = Checks::new("http versions");
    let services = [
        ("in the mesh", scene.meshed),
        ("outside of it", scene.plain),
    ];
    for (place, target) in services {
        for (version, args) in CLIENTS {
            for (kind, further) in KINDS {
                let name = format!("{kind} by {version}, endpoints {place}");
                let args = [args, further].concat();
                checks.check(&name, || scene.all_answer(target, &args));
            }
        }
        checks.check(&format!("h2load, endpoints {place}"), || {
            scene.h2load(target)
        });
    }
    checks.finish();
}

/// Two endpoints of each version, of which one is on the client's node; and the same outside of the mesh.
struct Scene {
    _servers: Vec<(HttpServer, Pod)>,
    meshed: SocketAddr,
    plain: SocketAddr,
    client: Pod,
    _cluster: Cluster,
}

impl Scene {
    fn build() -> Result<Scene> {
        let cluster = Cluster::start()?;
        let client = cluster.add_pod(PodSpec::new("client").on(0))?;
        let mut servers = Vec::new();
        for tier in ["meshed", "plain"] {
            for (name, node, speaks) in ENDPOINTS {
                let spec = PodSpec::new(&format!("{tier}-{name}")).on(node);
                let spec = spec.label("tier", tier);
                let pod = cluster.add_pod(match tier {
                    "meshed" => spec,
                    _ => spec.unmeshed(),
                })?;
                let args = ["--quiet", "--speaks", speaks];
                servers.push((HttpServer::start(&pod, HTTP, &args)?, pod));
            }
        }
        let service = |tier| {
            let spec = ServiceSpec::new(tier).select("tier", tier).port(80, HTTP);
            serving(&cluster, &client, &spec, 80)
        };
        Ok(Scene {
            meshed: service("meshed")?,
            plain: service("plain")?,
            _servers: servers,
            client,
            _cluster: cluster,
        })
    }

    /// Every request is answered, and every endpoint has its part.
    fn all_answer(&self, target: SocketAddr, args: &[&str]) -> Result<()> {
        let report = http_load(&self.client, target, 400, args)?;
        report.expect_all("200")?;
        ensure!(
            report.served_by.len() == ENDPOINTS.len(),
            "not all have answered: {report:?}"
        );
        Ok(())
    }

    /// Another client, by both versions.
    fn h2load(&self, target: SocketAddr) -> Result<()> {
        for version in [&["--h1"][..], &[]] {
            let h2load = self.client.command("h2load")?.args(version);
            let h2load = h2load.args(["-n", "400", "-c", "4", &url(target, "")]);
            let said = h2load.output(Duration::from_secs(60))?.success()?;
            ensure!(
                said.contains("400 succeeded, 0 failed, 0 errored, 0 timeout")
                    && said.contains("400 2xx, 0 3xx, 0 4xx, 0 5xx"),
                "{said}"
            );
        }
        Ok(())
    }
}

/// What has no form in the version that one endpoint speaks is for the other one, from the first request on.
#[test]
fn http_other_versions() {
    let cluster = Cluster::start().expect("a cluster");
    let client = cluster
        .add_pod(PodSpec::new("client").on(0))
        .expect("a pod");
    let mut checks = Checks::new("http other versions");
    for (place, node) in [("across nodes", 1), ("on one node", 0)] {
        for (kind, speaks) in [("calls", "http1"), ("upgrades", "http2")] {
            checks.check(&format!("{kind}, {place}"), || {
                let app = format!("{kind}-{node}");
                let pod = |name: &str| {
                    let spec = PodSpec::new(&format!("{app}-{name}")).on(node);
                    cluster.add_pod(spec.label("mixed", &app))
                };
                let (other, right) = (pod("other")?, pod("right")?);
                let _other = HttpServer::start(&other, HTTP, &["--speaks", speaks])?;
                let calls = (kind == "calls").then(|| GrpcServer::start(&right, HTTP));
                let upgrades = (kind != "calls").then(|| websocket_server(&right, HTTP));
                let _right = (calls.transpose()?, upgrades.transpose()?);
                let spec = ServiceSpec::new(&app).select("mixed", &app).port(80, HTTP);
                let [address, _] = cluster.add_service(&spec)?;
                let target = SocketAddr::new(address, 80);
                let ask = || match kind {
                    "calls" => {
                        let called = grpc_call(&client, target, &[])?;
                        ensure!(called.code == 0, "{called:?}");
                        Ok(())
                    }
                    _ => {
                        let echoed = websocket_echo(&client, target, &["--messages", "2"])?;
                        ensure!(echoed.outcome == "ok", "{echoed:?}");
                        Ok(())
                    }
                };
                eventually("both endpoints to be known", || {
                    ask()?;
                    let metrics = cluster.node(0).metrics()?;
                    let labels = [("backend_name", app.as_str()), ("endpoint_state", "ready")];
                    let ready = metrics.sum("outbound_http_balancer_endpoints", &labels);
                    // Of both families.
                    ensure!(ready == 4.0, "{ready} endpoints");
                    Ok(())
                })?;
                (0..30).try_for_each(|_| ask())
            });
        }
    }
    checks.finish();
}

#[test]
fn http_translated() {
    let stage = Stage::build().expect("a cluster");
    let mut checks = Checks::new("http translated");
    stage.check_meshed(&mut checks, "the first request of all", first);
    let start = |pod: &Pod, port, speaks| {
        HttpServer::start(pod, port, &["--speaks", speaks]).expect("a server")
    };
    let _servers = [&stage.far, &stage.near].map(|pod| {
        let others = (start(pod, HTTP1, "http1"), start(pod, HTTP2, "http2"));
        let python = python_http_server(pod, PYTHON).expect("python");
        let nginx = Nginx::start_with_http2(pod, NGINX, NGINX_HTTP2).expect("nginx");
        (others, python, nginx)
    });
    stage.check_meshed(&mut checks, "what the application sees", sees);
    stage.check_meshed(&mut checks, "as many headers as there may be", many_headers);
    stage.check_meshed(&mut checks, "bodies, both ways", bodies);
    stage.check_meshed(&mut checks, "answers without a body", without_body);
    stage.check_meshed(&mut checks, "a client that expects 100 Continue", expects);
    stage.check_meshed(&mut checks, "HTTP/1.0", http10);
    stage.check_meshed(&mut checks, "answers that break off", breaks_off);
    stage.check_meshed(&mut checks, "other servers", other_servers);
    stage.check_meshed(
        &mut checks,
        "what has no form in the other version",
        no_form,
    );
    stage.check_meshed(&mut checks, "an application that changes", changes);
    checks.finish();
}

/// Nothing of a request is lost that finds out what the application speaks, however long it is.
fn first(stage: &Stage, pair: Pair<'_>) -> Result<()> {
    let mut port = FIRST;
    for (speaks, version) in [("http1", BY_HTTP2), ("http2", BY_HTTP1)] {
        for size in [0, 10, 60_000, 3_000_000] {
            port += 1;
            let server = HttpServer::start(pair.server, port, &["--speaks", speaks])?;
            let body = file_of(pair, size)?;
            let args = [
                version,
                "-X",
                "POST",
                "--data-binary",
                &body,
                "-H",
                "Expect:",
            ];
            let shown = curl_shop(&stage.client, pair.at(port), "/first", &args)?;
            expect_code(&shown, 200)?;
            let seen = seen(&shown)?;
            ensure!(seen.body_bytes == size, "{size}: {seen:?}");
            let requests = server.requests()?;
            ensure!(requests.len() == 1, "sent more than once: {requests:?}");
        }
    }
    Ok(())
}

/// All but the version is as the client wrote it, and the mesh says who that is.
fn sees(stage: &Stage, pair: Pair<'_>) -> Result<()> {
    for (port, by, version) in [(HTTP1, BY_HTTP2, "HTTP/1.1"), (HTTP2, BY_HTTP1, "HTTP/2.0")] {
        let forged = format!("{}: admin", CLIENT_ID[0]);
        let args = [by, "-H", "cookie: a=1", "-H", "x-own: 1", "-H", &forged];
        let shown = curl_shop(&stage.client, pair.at(port), "/a%20b?c=d&c", &args)?;
        expect_code(&shown, 200)?;
        let seen: Seen = seen(&shown)?;
        let path = seen.path.trim_start_matches(&format!("http://shop:{port}"));
        ensure!(
            (&*seen.method, path, &*seen.version) == ("GET", "/a%20b?c=d&c", version),
            "{seen:?}"
        );
        ensure!(
            seen.header("cookie") == ["a=1"] && seen.header("x-own") == ["1"],
            "{seen:?}"
        );
        let host = format!("shop:{port}");
        let hosts = seen.header("host");
        // Of HTTP/2 it is in the target.
        ensure!(
            hosts == [&*host] || version == "HTTP/2.0" && hosts.is_empty() && seen.path != path,
            "{seen:?}"
        );
        for name in CLIENT_ID {
            ensure!(
                seen.header(name) == [&*stage.client.identity()],
                "{name}: {seen:?}"
            );
        }
        for name in ["connection", "transfer-encoding", "te", "upgrade"] {
            ensure!(seen.header(name).is_empty(), "{name}: {seen:?}");
        }
        ensure!(
            seen.peer.ip() == std::net::IpAddr::from(stage.client.v4()),
            "{seen:?}"
        );
    }
    Ok(())
}

/// What the agents add on the way counts for nobody.
fn many_headers(stage: &Stage, pair: Pair<'_>) -> Result<()> {
    // Host, User-Agent and Accept are curl's own.
    for (own, code) in [(93, 200), (94, 431)] {
        let own: Vec<String> = (0..own).map(|it| format!("x-many-{it}: x")).collect();
        let mut args = vec![BY_HTTP1];
        args.extend(own.iter().flat_map(|it| ["-H", it]));
        let shown = curl_shop(&stage.client, pair.at(HTTP2), "/many", &args)?;
        expect_code(&shown, code)?;
    }
    Ok(())
}

fn bodies(stage: &Stage, pair: Pair<'_>) -> Result<()> {
    for (port, by) in [(HTTP1, BY_HTTP2), (HTTP2, BY_HTTP1)] {
        let path = format!("/bytes/{LARGE}");
        let file = pair.client.dir().join("translated");
        let file = file.display().to_string();
        let shown = curl_shop(&stage.client, pair.at(port), &path, &[by, "-o", &file])?;
        expect_code(&shown, 200)?;
        ensure!(
            shown.header("content-length") == Some(&*LARGE.to_string()),
            "{shown:?}"
        );
        let body = format!("@{file}");
        for coding in ["Content-Type: x", "Transfer-Encoding: chunked"] {
            let args = [by, "--data-binary", &body, "-H", "Expect:", "-H", coding];
            let seen = seen(&curl_shop(&stage.client, pair.at(port), "/", &args)?)?;
            ensure!(seen.body_bytes == LARGE && seen.body_is_pattern, "{seen:?}");
        }
        // The echo is sent while the body is still being sent.
        let echoed = pair.client.dir().join("echoed");
        let out = echoed.display().to_string();
        let args = [by, "-T", &file, "-o", &out, "-H", "Expect:"];
        expect_code(
            &curl_shop(&stage.client, pair.at(port), "/echo", &args)?,
            200,
        )?;
        ensure!(
            std::fs::read(&echoed)? == std::fs::read(&file)?,
            "the echo is another one"
        );
    }
    Ok(())
}

fn without_body(stage: &Stage, pair: Pair<'_>) -> Result<()> {
    for (port, by) in [(HTTP1, BY_HTTP2), (HTTP2, BY_HTTP1)] {
        for _ in 0..3 {
            let head = curl_shop(&stage.client, pair.at(port), "/", &[by, "-I"])?;
            expect_code(&head, 200)?;
            // curl fails if there is a body.
            let length = head.header("content-length");
            ensure!(length.is_some() && head.exit == 0, "{head:?}");
            for code in [204, 304, 404, 503] {
                let path = format!("/status/{code}");
                let shown = curl_shop(&stage.client, pair.at(port), &path, &[by])?;
                ensure!(shown.exit == 0, "{shown:?}");
                expect_code(&shown, code)?;
            }
        }
    }
    Ok(())
}

fn expects(stage: &Stage, pair: Pair<'_>) -> Result<()> {
    let body = file_of(pair, 300_000)?;
    for (port, by) in [(HTTP1, BY_HTTP2), (HTTP2, BY_HTTP1)] {
        let args = [by, "--data-binary", &body, "-H", "Expect: 100-continue"];
        let seen = seen(&curl_shop(&stage.client, pair.at(port), "/", &args)?)?;
        ensure!(seen.body_bytes == 300_000, "{seen:?}");
    }
    Ok(())
}

fn http10(stage: &Stage, pair: Pair<'_>) -> Result<()> {
    let request = "GET /old HTTP/1.0\\r\\n\\r\\n";
    let raw = raw(&stage.client, pair.at(HTTP2), &[request], &[])?;
    ensure!(raw.statuses == [200] && raw.outcome == "eof", "{raw:?}");
    ensure!(!raw.received.contains("chunked"), "{raw:?}");
    ensure!(raw.received.contains("HTTP/2.0"), "{raw:?}");
    Ok(())
}

/// What is not complete never looks so.
fn breaks_off(stage: &Stage, pair: Pair<'_>) -> Result<()> {
    for (port, by) in [(HTTP1, BY_HTTP2), (HTTP2, BY_HTTP1)] {
        let shown = curl_shop(&stage.client, pair.at(port), "/reset", &[by])?;
        ensure!(shown.exit != 0 || shown.code() == 502, "{shown:?}");
        // Others are served.
        expect_code(&curl_shop(&stage.client, pair.at(port), "/", &[by])?, 200)?;
    }
    let half = "POST / HTTP/1.1\\r\\nHost: shop\\r\\nContent-Length: 1000\\r\\n\\r\\nabc";
    let cut = raw(&stage.client, pair.at(HTTP2), &[half], &["--half-close"])?;
    ensure!(!cut.statuses.contains(&200), "{cut:?}");
    Ok(())
}

/// Python answers to HTTP/2 without a head; nginx closes or answers, as its version wants it.
fn other_servers(stage: &Stage, pair: Pair<'_>) -> Result<()> {
    for (port, by) in [
        (PYTHON, BY_HTTP2),
        (PYTHON, BY_HTTP1),
        (NGINX, BY_HTTP2),
        (NGINX_HTTP2, BY_HTTP1),
        (NGINX_HTTP2, BY_HTTP2),
    ] {
        for _ in 0..3 {
            let shown = curl_shop(&stage.client, pair.at(port), "/", &[by])?;
            expect_code(&shown, 200)?;
            ensure!(
                shown.body.trim() == format!("hello from {}", pair.server.name()),
                "{port} {by}: {shown:?}"
            );
        }
    }
    Ok(())
}

fn no_form(stage: &Stage, pair: Pair<'_>) -> Result<()> {
    // An application that resets the connection at the preface is not told from one that fails, the first time.
    wait_for("the reason to be told", DEADLINE, || {
        let called = grpc_call(&stage.client, pair.at(HTTP1), &[])?;
        ensure!(called.code == 14, "{called:?}");
        Ok(called.message.contains("only_http1").then_some(()))
    })?;
    let upgrade = "GET / HTTP/1.1\\r\\nHost: shop\\r\\nConnection: Upgrade\\r\\nUpgrade: websocket\\r\\n\\r\\n";
    let args = ["--quiet-ms", "1000"];
    let raw = raw(&stage.client, pair.at(HTTP2), &[upgrade], &args)?;
    ensure!(
        raw.statuses == [502] && raw.received.contains("weft-error: only_http2"),
        "{raw:?}"
    );
    Ok(())
}

/// A program that speaks another version at the same place is found out.
fn changes(stage: &Stage, pair: Pair<'_>) -> Result<()> {
    let before = HttpServer::start(pair.server, CHANGES, &["--speaks", "http1"])?;
    let ask = |by| curl_shop(&stage.client, pair.at(CHANGES), "/", &[by]);
    for by in [BY_HTTP1, BY_HTTP2] {
        expect_code(&ask(by)?, 200)?;
    }
    before.stop()?;
    let _after = HttpServer::start(pair.server, CHANGES, &["--speaks", "http2"])?;
    for by in [BY_HTTP2, BY_HTTP1] {
        weft_tests::wait_for("the change to be noticed", Duration::from_secs(15), || {
            let shown = ask(by)?;
            Ok((shown.code() == 200).then_some(()))
        })?;
        expect_code(&ask(by)?, 200)?;
    }
    eventually("both to go on", || {
        expect_code(&ask(BY_HTTP1)?, 200)?;
        expect_code(&ask(BY_HTTP2)?, 200)
    })
}

/// A file of so many bytes, as curl's `--data-binary` has it.
fn file_of(pair: Pair<'_>, bytes: u64) -> Result<String> {
    let path = pair.client.dir().join(format!("body-{bytes}"));
    std::fs::write(&path, vec![b'x'; usize::try_from(bytes)?])?;
    Ok(format!("@{}", path.display()))
}

/// Name, node, and what it speaks.
const ENDPOINTS: [(&str, usize, &str); 4] = [
    ("old-near", 0, "http1"),
    ("old-far", 1, "http1"),
    ("new-near", 0, "http2"),
    ("new-far", 1, "http2"),
];
const CLIENTS: [(&str, &[&str]); 2] = [
    ("HTTP/1", &["--connections", "8"]),
    (
        "HTTP/2",
        &["--http2", "--connections", "2", "--streams", "4"],
    ),
];
const KINDS: [(&str, &[&str]); 3] = [
    ("requests", &[]),
    ("bodies", &["--method", "POST", "--body-bytes", "5000"]),
    (
        "large bodies",
        &["--method", "POST", "--body-bytes", "300000"],
    ),
];
const BY_HTTP1: &str = "--http1.1";
const BY_HTTP2: &str = "--http2-prior-knowledge";
const LARGE: u64 = 5_000_000;
const HTTP: u16 = 8080;
const HTTP1: u16 = 8081;
const HTTP2: u16 = 8082;
const PYTHON: u16 = 8083;
const NGINX: u16 = 8084;
const NGINX_HTTP2: u16 = 8085;
const CHANGES: u16 = 8086;
const FIRST: u16 = 8100;
