//! Requests that are sent again: which, how often, where to, and that a failing server gets no multiple of them.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::json;
use weft_tests::apps::{Shown, curl_shop};
use weft_tests::manifests::{ServiceSpec, backend, http_route};
use weft_tests::metrics::wait_for_metric;
use weft_tests::scenario::eventually;
use weft_tests::webapp::{GrpcServer, HttpLoad, HttpServer, grpc_call, http_load};
use weft_tests::{Checks, Cluster, Pod, PodSpec, wait_for};

use crate::stage::{VERSIONS, expect_code, seen, serving};

#[test]
fn http_retries() {
    let mut scene = Scene::build().expect("a cluster");
    let mut checks = Checks::new("http retries");
    let mut check = |name: &str, run: fn(&mut Scene) -> Result<()>| {
        checks.check(name, || run(&mut scene));
    };
    check("what fails at first is sent again", failing_first);
    check("as often as it may be", limited);
    check("with its body, if that is small", bodies);
    check("a route says what is sent again", by_route);
    check("what takes long is sent again", slow);
    check("each try has its time", by_try);
    check("calls by their status", calls);
    check("an outage of calls is not amplified", call_outage);
    check("upgrades and expectations are not sent again", never);
    check("what a server has reset is not sent again", reset);
    check(
        "an answer that breaks off is not sent for again",
        broken_off,
    );
    check("what cannot be in time is not sent again", too_late);
    check("clients say what is sent again, where they may", headers);
    check("to another endpoint", elsewhere);
    check("an outage is not amplified", outage);
    checks.finish();
}

/// Two servers, on the other node and on the client's.
struct Scene {
    far: Server,
    near: Server,
    client: Pod,
    cluster: Cluster,
}

struct Server {
    http: HttpServer,
    _grpc: GrpcServer,
    pod: Pod,
}

impl Server {
    /// How many requests for a path it has seen.
    fn count(&self, path: &str) -> Result<usize> {
        let requests = self.http.requests()?;
        Ok(requests.iter().filter(|it| it.path.ends_with(path)).count())
    }

    /// Answers the next requests with this status after so long.
    fn fail(&self, times: u64, delay_ms: u64, status: u16) -> Result<()> {
        self.http.configure_some(&self.pod, delay_ms, status, times)
    }
}

impl Scene {
    fn build() -> Result<Scene> {
        let cluster = Cluster::start()?;
        let client = cluster.add_pod(PodSpec::new("client").on(0))?;
        let server = |name, node| -> Result<Server> {
            let pod = cluster.add_pod(PodSpec::new(name).label("tier", "shop").on(node))?;
            Ok(Server {
                http: HttpServer::start(&pod, HTTP, &[])?,
                _grpc: GrpcServer::start(&pod, GRPC)?,
                pod,
            })
        };
        let (far, near) = (server("far", 1)?, server("near", 0)?);
        Ok(Scene {
            far,
            near,
            client,
            cluster,
        })
    }

    fn service(
        &self,
        name: &str,
        select: [&str; 2],
        annotations: &[(&str, &str)],
    ) -> Result<SocketAddr> {
        let mut spec = ServiceSpec::new(name).select(select[0], select[1]);
        for (key, value) in annotations {
            spec = spec.annotation(key, value);
        }
        let spec = spec.port(80, HTTP).port(90, GRPC);
        serving(&self.cluster, &self.client, &spec, 80)
    }

    fn ask(&self, target: SocketAddr, path: &str, args: &[&str]) -> Result<Shown> {
        curl_shop(&self.client, target, path, args)
    }

    /// Both servers, with the labels that select them.
    fn both(&self) -> [(&Server, &'static str); 2] {
        [(&self.far, "far"), (&self.near, "near")]
    }
}

fn failing_first(scene: &mut Scene) -> Result<()> {
    for (server, app) in scene.both() {
        let name = format!("first-{app}");
        let annotations = [
            ("retry.linkerd.io/http", "5xx"),
            ("retry.linkerd.io/limit", "3"),
        ];
        let target = scene.service(&name, ["app", app], &annotations)?;
        for (number, version) in VERSIONS.into_iter().enumerate() {
            server.fail(2, 0, 503)?;
            let path = format!("/{name}-{number}");
            expect_code(&scene.ask(target, &path, version)?, 200)?;
            let count = server.count(&path)?;
            ensure!(count == 3, "the server saw it {count} times");
        }
        for (event, least) in [("requests", 4.0), ("successes", 2.0)] {
            let metric = format!("outbound_http_route_retry_{event}_total");
            let labels = [("parent_name", name.as_str())];
            wait_for_metric(scene.cluster.node(0), &metric, &labels, least)?;
        }
    }
    Ok(())
}

/// On connections that have served before and stay open, too: only closing ones say that nobody has begun.
fn reset(scene: &mut Scene) -> Result<()> {
    for (server, app) in scene.both() {
        let target = scene.service(&format!("reset-{app}"), ["app", app], &[])?;
        let version = ["--http2-prior-knowledge"];
        for number in 0..3 {
            expect_code(&scene.ask(target, "/before", &version)?, 200)?;
            let path = format!("/reset/{app}-{number}");
            expect_code(&scene.ask(target, &path, &version)?, 502)?;
            let count = server.count(&path)?;
            ensure!(count == 1, "the server saw it {count} times");
        }
    }
    Ok(())
}

/// The client has its head already. Where the connection had broken before it, the other server would be asked.
fn broken_off(scene: &mut Scene) -> Result<()> {
    let pods = ["frail-0", "frail-1"].map(|name| {
        let spec = PodSpec::new(name).label("app", "frail").on(1);
        scene.cluster.add_pod(spec)
    });
    let [first, second] = pods;
    let pods = [first?, second?];
    for (number, version) in VERSIONS.into_iter().enumerate() {
        let start = |pod: &Pod| HttpServer::start(pod, HTTP, &[]);
        let mut servers = [start(&pods[0])?, start(&pods[1])?];
        let name = format!("frail-{number}");
        let target = scene.service(&name, ["app", "frail"], &[])?;
        let rules = json!([{
            "retry": {"codes": [500, 502, 503, 504], "attempts": 3},
            "backendRefs": [backend(&name, 80, 1)],
        }]);
        let route = http_route("default", &name, &name, 80, &rules);
        scene.cluster.apply(&route)?;
        let count = |server: &HttpServer, path: &str| -> Result<usize> {
            let requests = server.requests()?;
            Ok(requests.iter().filter(|it| it.path.ends_with(path)).count())
        };
        // What breaks before a head is sent for again, three times.
        eventually("the route to be in effect", || {
            let path = format!("/reset/{}", rand_word());
            scene.ask(target, &path, version)?;
            let asked = count(&servers[0], &path)? + count(&servers[1], &path)?;
            ensure!(asked >= 4, "asked {asked} times");
            Ok(())
        })?;
        let path = "/stream?chunks=10000&interval=50";
        let url = format!("http://{target}{path}");
        let mut asking = scene.client.command("curl")?.args(["-sSN"]).args(version);
        asking = asking.args(["--max-time", "60", &url]);
        let mut asking = asking.spawn()?;
        asking.wait_for_line("chunk 1", Duration::from_secs(30))?;
        let asked = usize::from(count(&servers[1], path)? > 0);
        servers[asked].process().kill()?;
        let status = asking.wait(Duration::from_secs(30))?;
        // Partial file, or a connection or stream that was reset.
        let is_told = [Some(18), Some(56), Some(92)].contains(&status.code());
        ensure!(is_told, "it ended with {status}");
        let counts = [count(&servers[0], path)?, count(&servers[1], path)?];
        ensure!(counts[0] + counts[1] == 1, "they were asked {counts:?}");
    }
    Ok(())
}

fn limited(scene: &mut Scene) -> Result<()> {
    let annotations = [
        ("weft.dev/retry-http", "500-502,429"),
        ("weft.dev/retry-limit", "2"),
    ];
    let target = scene.service("limited", ["app", "far"], &annotations)?;
    let server = &scene.far;
    for (status, expected) in [(500, 3), (429, 3), (503, 1), (404, 1)] {
        server.fail(100, 0, status)?;
        let path = format!("/limited-{status}");
        let shown = scene.ask(target, &path, &[])?;
        server.fail(0, 0, 200)?;
        expect_code(&shown, status)?;
        ensure!(shown.header("weft-error").is_none(), "{shown:?}");
        let count = server.count(&path)?;
        ensure!(
            count == expected,
            "{status}: the server saw it {count} times"
        );
    }
    let metric = "outbound_http_route_retry_limit_exceeded_total";
    let labels = [("parent_name", "limited")];
    wait_for_metric(scene.cluster.node(0), metric, &labels, 2.0).map(drop)
}

fn bodies(scene: &mut Scene) -> Result<()> {
    let target = scene.service(
        "bodies",
        ["app", "far"],
        &[("retry.linkerd.io/http", "503")],
    )?;
    let server = &scene.far;
    for version in VERSIONS {
        for (length, code) in [(1, 200), (1000, 200), (60_000, 200), (100_000, 503)] {
            server.fail(1, 0, 503)?;
            let body = "x".repeat(length);
            let args = [version, &["--data-binary", &body]].concat();
            let shown = scene.ask(target, "/bodies", &args)?;
            server.fail(0, 0, 200)?;
            expect_code(&shown, code)?;
            let seen = seen(&shown)?;
            ensure!(
                seen.method == "POST" && seen.body_bytes == length as u64,
                "{seen:?}"
            );
        }
        // Of a length that nobody knows before.
        server.fail(1, 0, 503)?;
        let args = [
            version,
            &[
                "-H",
                "transfer-encoding: chunked",
                "--data-binary",
                "of chunks",
            ],
        ]
        .concat();
        let args = if version == VERSIONS[1] {
            [version, &["--data-binary", "of chunks"]].concat()
        } else {
            args
        };
        let shown = scene.ask(target, "/bodies", &args)?;
        expect_code(&shown, 200)?;
        ensure!(seen(&shown)?.body_bytes == 9, "{shown:?}");
    }
    Ok(())
}

fn by_route(scene: &mut Scene) -> Result<()> {
    let target = scene.service(
        "routed",
        ["app", "far"],
        &[("retry.linkerd.io/http", "5xx")],
    )?;
    let rules = json!([{
        "retry": {"codes": [503], "attempts": 2, "backoff": "10ms"},
        "backendRefs": [backend("routed", 80, 1)],
    }]);
    scene
        .cluster
        .apply(&http_route("default", "routed", "routed", 80, &rules))?;
    let server = &scene.far;
    // The Service's own would send it again for 500.
    eventually("the route to be in effect", || {
        let path = format!("/routed-{}", rand_word());
        server.fail(1, 0, 500)?;
        let shown = scene.ask(target, &path, &[])?;
        server.fail(0, 0, 200)?;
        expect_code(&shown, 500)
    })?;
    server.fail(2, 0, 503)?;
    expect_code(&scene.ask(target, "/routed", &[])?, 200)?;
    // A connection that breaks is tried again too.
    let shown = scene.ask(target, "/reset", &[])?;
    expect_code(&shown, 502)?;
    let count = server.count("/reset")?;
    // The agent of the server's node may find its connection stale, and make another one.
    ensure!((3..=4).contains(&count), "the server saw it {count} times");
    Ok(())
}

fn rand_word() -> u128 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |it| it.as_nanos())
}

fn slow(scene: &mut Scene) -> Result<()> {
    let annotations = [
        ("retry.linkerd.io/http", "5xx"),
        ("retry.linkerd.io/timeout", "300ms"),
        ("timeout.linkerd.io/request", "10s"),
    ];
    for (server, app) in scene.both() {
        let target = scene.service(&format!("slow-{app}"), ["app", app], &annotations)?;
        for (number, version) in VERSIONS.into_iter().enumerate() {
            server.fail(1, 8000, 200)?;
            let path = format!("/slow-{number}");
            let began = Instant::now();
            expect_code(&scene.ask(target, &path, version)?, 200)?;
            let took = began.elapsed();
            ensure!(took < Duration::from_secs(4), "it took {took:?}");
            // The last try gets all the time that it needs.
            server.fail(2, 900, 200)?;
            expect_code(&scene.ask(target, &path, version)?, 200)?;
        }
    }
    Ok(())
}

/// A try that is too late is no answer yet, and the next one has as much time.
fn by_try(scene: &mut Scene) -> Result<()> {
    for (server, app) in scene.both() {
        let name = format!("by-try-{app}");
        let target = scene.service(&name, ["app", app], &[])?;
        let rules = json!([{
            "timeouts": {"backendRequest": "1s"},
            "retry": {"attempts": 1},
            "backendRefs": [backend(&name, 80, 1)],
        }]);
        let route = http_route("default", &name, &name, 80, &rules);
        scene.cluster.apply(&route)?;
        eventually("the route to be in effect", || {
            expect_code(&scene.ask(target, "/delay/3000", &[])?, 504)
        })?;
        for (number, version) in VERSIONS.into_iter().enumerate() {
            for (slow_ones, code) in [(1, 200), (2, 504)] {
                let path = format!("/{name}-{number}-{code}");
                server.fail(slow_ones, 30_000, 200)?;
                let shown = scene.ask(target, &path, version)?;
                server.fail(0, 0, 200)?;
                expect_code(&shown, code)?;
                let why = shown.header("weft-error");
                ensure!(
                    why == (code == 504).then_some("backend_timeout"),
                    "{shown:?}"
                );
                let count = server.count(&path)?;
                ensure!(count == 2, "the server saw it {count} times");
            }
        }
    }
    Ok(())
}

/// The next try could only begin when the time is up: the client gets the answer that there is.
fn too_late(scene: &mut Scene) -> Result<()> {
    for (server, app) in scene.both() {
        let name = format!("too-late-{app}");
        let target = scene.service(&name, ["app", app], &[])?;
        let rules = json!([{
            "timeouts": {"request": "2s"},
            "retry": {"codes": [503], "attempts": 2, "backoff": "1m"},
            "backendRefs": [backend(&name, 80, 1)],
        }]);
        let route = http_route("default", &name, &name, 80, &rules);
        scene.cluster.apply(&route)?;
        eventually("the route to be in effect", || {
            expect_code(&scene.ask(target, "/delay/3000", &[])?, 504)
        })?;
        for (number, version) in VERSIONS.into_iter().enumerate() {
            let path = format!("/{name}-{number}");
            server.fail(1, 0, 503)?;
            let shown = scene.ask(target, &path, version)?;
            server.fail(0, 0, 200)?;
            expect_code(&shown, 503)?;
            ensure!(seen(&shown)?.path.ends_with(&path), "{shown:?}");
            ensure!(server.count(&path)? == 1, "it was sent again");
            // A connection that broke is no answer of a server, and better than none.
            let shown = scene.ask(target, "/reset", version)?;
            expect_code(&shown, 502)?;
        }
    }
    Ok(())
}

fn headers(scene: &mut Scene) -> Result<()> {
    let allowed = [("weft.dev/request-headers", "enabled")];
    let allowed = scene.service("heeds", ["app", "far"], &allowed)?;
    let ignored = scene.service("ignores", ["app", "far"], &[])?;
    let server = &scene.far;
    for (number, prefix) in ["l5d", "weft"].into_iter().enumerate() {
        let said = [
            format!("{prefix}-retry-http: 5xx"),
            format!("{prefix}-retry-limit: 2"),
        ];
        let args = ["-H", &said[0], "-H", &said[1]];
        for (target, code, count) in [(allowed, 200, 3), (ignored, 503, 1)] {
            server.fail(2, 0, 503)?;
            let path = format!("/said-{number}-{code}");
            let shown = scene.ask(target, &path, &args)?;
            server.fail(0, 0, 200)?;
            expect_code(&shown, code)?;
            ensure!(server.count(&path)? == count, "{prefix}: {shown:?}");
            let seen = seen(&shown)?;
            let mut names = seen.headers.iter().map(|(name, _)| name);
            let is_there = names.any(|it| it.contains("-retry-"));
            // Only the mesh may say what begins with its name, wherever it goes.
            let stays = target == ignored && prefix == "l5d";
            ensure!(is_there == stays, "{prefix}: {seen:?}");
        }
    }
    Ok(())
}

fn calls(scene: &mut Scene) -> Result<()> {
    let annotations = [
        ("retry.linkerd.io/grpc", "unavailable,internal"),
        ("retry.linkerd.io/limit", "3"),
    ];
    let target = scene.service("calls", ["app", "far"], &annotations)?;
    let target = SocketAddr::new(target.ip(), 90);
    eventually("calls to be answered", || {
        let called = grpc_call(&scene.client, target, &[])?;
        ensure!(called.code == 0, "{called:?}");
        Ok(())
    })?;
    for (number, (kind, code, count, is)) in [
        // In the head, and in trailers without anything before.
        ("unary", "14", "1", 0),
        ("unary", "13", "1", 0),
        ("expand", "14", "0", 0),
        ("unary", "5", "1", 5),
        // A message has come.
        ("expand", "14", "2", 14),
    ]
    .into_iter()
    .enumerate()
    {
        let text = format!("first 2: {number}");
        let args = [
            "--kind", kind, "--code", code, "--count", count, "--text", &text,
        ];
        let called = grpc_call(&scene.client, target, &args)?;
        ensure!(called.code == is, "{args:?}: {called:?}");
    }
    // Three tries more, and no answer yet.
    let args = ["--code", "14", "--text", "first 9: unanswered"];
    let called = grpc_call(&scene.client, target, &args)?;
    ensure!(called.code == 14, "{called:?}");
    let node = scene.cluster.node(0);
    for (event, count) in [
        ("requests", 9.0),
        ("successes", 3.0),
        ("limit_exceeded", 1.0),
    ] {
        let metric = format!("outbound_grpc_route_retry_{event}_total");
        wait_for_metric(node, &metric, &[("parent_name", "calls")], count)?;
    }
    Ok(())
}

/// More of them at once than the budget has tries for.
fn call_outage(scene: &mut Scene) -> Result<()> {
    let annotations = [
        ("weft.dev/retry-grpc", "unavailable"),
        ("weft.dev/retry-limit", "20"),
    ];
    let target = scene.service("call-outage", ["app", "far"], &annotations)?;
    let target = SocketAddr::new(target.ip(), 90);
    let metric = "outbound_grpc_route_retry_overflow_total";
    let labels = [("parent_name", "call-outage")];
    let call = || grpc_call(&scene.client, target, &["--code", "14"]);
    wait_for("the budget to be used up", OUTAGE * 8, || {
        std::thread::scope(|scope| {
            let calls: Vec<_> = (0..12).map(|_| scope.spawn(call)).collect();
            for called in calls {
                let called = called
                    .join()
                    .map_err(|_| anyhow::anyhow!("a thread failed"))??;
                ensure!(called.code == 14, "{called:?}");
            }
            Ok(())
        })?;
        let over = scene.cluster.node(0).metrics()?.sum(metric, &labels);
        Ok((over >= 1.0).then_some(()))
    })
}

fn never(scene: &mut Scene) -> Result<()> {
    let target = scene.service("never", ["app", "far"], &[("retry.linkerd.io/http", "503")])?;
    for (number, args) in [
        ["-H", "expect: 100-continue", "--data", "x"],
        ["-H", "connection: upgrade", "-H", "upgrade: websocket"],
    ]
    .into_iter()
    .enumerate()
    {
        let path = format!("/never-{number}");
        scene.far.fail(1, 0, 503)?;
        let shown = scene.ask(target, &path, &args)?;
        scene.far.fail(0, 0, 200)?;
        expect_code(&shown, 503)?;
        ensure!(scene.far.count(&path)? == 1, "it was sent again");
    }
    Ok(())
}

fn elsewhere(scene: &mut Scene) -> Result<()> {
    let annotations = [("retry.linkerd.io/http", "5xx")];
    let target = scene.service("elsewhere", ["tier", "shop"], &annotations)?;
    scene.near.fail(u64::MAX, 0, 500)?;
    let report = http_load(&scene.client, target, 20, &["--pause-ms", "100"])?;
    scene.near.fail(0, 0, 200)?;
    report.expect_all("200")?;
    ensure!(report.share("far") > 0.999, "{report:?}");
    Ok(())
}

/// All servers fail: what they see is a fifth more than was asked, and ten in a second.
fn outage(scene: &mut Scene) -> Result<()> {
    let annotations = [
        ("retry.linkerd.io/http", "5xx"),
        ("retry.linkerd.io/limit", "5"),
    ];
    let target = scene.service("outage", ["tier", "shop"], &annotations)?;
    for (server, _) in scene.both() {
        server.fail(u64::MAX, 0, 500)?;
    }
    let began = Instant::now();
    let args = ["--connections", "4", "--pause-ms", "5", "--path", "/outage"];
    let load = HttpLoad::start(&scene.client, target, &args)?;
    std::thread::sleep(OUTAGE);
    let report = load.stop()?;
    let seconds = began.elapsed().as_secs_f64();
    let seen = scene.far.count("/outage")? + scene.near.count("/outage")?;
    for (server, _) in scene.both() {
        server.fail(0, 0, 200)?;
    }
    ensure!(report.statuses.keys().eq(["500"]), "{report:?}");
    let (asked, seen) = (report.answers as f64, seen as f64);
    // What the budget had saved for its first second comes on top, and what was asked before.
    let most = 1.2 * asked + 10.0 * (seconds + 1.0) + 1.0;
    ensure!(
        seen <= most,
        "of {asked} requests in {seconds} s, servers saw {seen}"
    );
    ensure!(
        seen >= 1.1 * asked,
        "of {asked} requests, servers saw {seen}"
    );
    let labels = [("parent_name", "outage")];
    let metric = "outbound_http_route_retry_overflow_total";
    wait_for_metric(scene.cluster.node(0), metric, &labels, 1.0)?;
    println!(
        "outage: {asked} requests in {seconds:.1} s, {seen} at the servers, at most {most:.0}"
    );
    Ok(())
}

const OUTAGE: Duration = Duration::from_secs(8);
const HTTP: u16 = 8080;
const GRPC: u16 = 9090;
