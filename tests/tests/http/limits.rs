//! Requests per second: of all clients, of each and of some, each told apart by how many pass at once.
//!
//! How many may pass is said by the time that it took, so that nothing depends on how fast the machine is: a second's
//! worth at once, and after that as many as the rate has room for.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use weft_tests::manifests::server;
use weft_tests::metrics::wait_for_metric;
use weft_tests::webapp::{GrpcServer, HttpServer, grpc_call, raw};
use weft_tests::{Checks, Cluster, Pod, PodSpec, wait_for};

#[test]
fn http_limits() {
    let scene = Scene::build().expect("a cluster");
    let mut checks = Checks::new("http limits");
    let mut check = |name: &str, run: fn(&Scene) -> Result<()>| {
        checks.check(name, || run(&scene));
    };
    check("of each client, and of some in its place", of_clients);
    check("of all clients together", of_all);
    check("calls hear it as calls", calls);
    checks.finish();
}

struct Scene {
    /// One for whom there is nothing special, on the other node,
    ordinary: Pod,
    /// and on the server's.
    near: Pod,
    /// These two have a rate together.
    special: [Pod; 2],
    api: Pod,
    _http: HttpServer,
    _grpc: GrpcServer,
    cluster: Cluster,
}

impl Scene {
    fn build() -> Result<Scene> {
        let cluster = Cluster::start()?;
        let add = |name, node| cluster.add_pod(PodSpec::new(name).on(node));
        let ordinary = add("ordinary", 0)?;
        let near = add("near", 1)?;
        let special = [add("special-far", 0)?, add("special-near", 1)?];
        let api = add("api", 1)?;
        let http = HttpServer::start(&api, HTTP, &["--quiet"])?;
        let grpc = GrpcServer::start(&api, GRPC)?;
        for (name, port, speaks) in [("http", HTTP, "HTTP/1"), ("grpc", GRPC, "gRPC")] {
            let mut open = server("default", name, "api", port);
            open["spec"]["proxyProtocol"] = json!(speaks);
            open["spec"]["accessPolicy"] = json!("all-unauthenticated");
            cluster.apply(&open)?;
        }
        Ok(Scene {
            ordinary,
            near,
            special,
            api,
            _http: http,
            _grpc: grpc,
            cluster,
        })
    }

    fn target(&self, port: u16) -> SocketAddr {
        self.api.sockets(port)[0]
    }

    /// Waits until of a burst as many pass as this rate lets pass, no fewer and no more, and the others are counted in
    /// this scope of this policy.
    fn expect_rate(&self, pod: &Pod, rate: u32, policy: &str, scope: &str) -> Result<()> {
        let what = format!("{} to have {rate} per second", pod.name());
        wait_for(&what, Duration::from_secs(40), || {
            // What bursts before this one have taken is there again after a second.
            std::thread::sleep(Duration::from_millis(1100));
            let get = "GET / HTTP/1.1\\r\\nHost: shop\\r\\n\\r\\n".repeat(BURST);
            let raw = raw(pod, self.target(HTTP), &[&get], &["--half-close"])?;
            let count = |code: u16| raw.statuses.iter().filter(|it| **it == code).count();
            let (passed, limited) = (count(200), count(429));
            ensure!(passed + limited == BURST, "{:?}", raw.statuses);
            let rate = f64::from(rate);
            let most = rate * (1.0 + raw.elapsed_ms / 1000.0) + 1.0;
            ensure!(
                (rate..=most).contains(&(passed as f64)),
                "{passed} passed, not {rate} to {most}"
            );
            ensure!(limited > 0, "nothing was limited");
            ensure!(raw.received.contains("weft-error: rate_limited"));
            Ok(Some(()))
        })?;
        let identity = pod.identity();
        let labels = [
            ("client_id", identity.as_str()),
            ("ratelimit_kind", "httplocalratelimitpolicy"),
            ("ratelimit_name", policy),
            ("ratelimit_scope", scope),
        ];
        let node = self.cluster.node(1);
        wait_for_metric(node, "inbound_http_local_ratelimit_total", &labels, 1.0).map(drop)
    }
}

fn of_clients(scene: &Scene) -> Result<()> {
    let accounts = scene
        .special
        .each_ref()
        .map(|pod| json!({"kind": "ServiceAccount", "name": pod.name(), "namespace": "default"}));
    let policy = policy(
        "clients",
        "http",
        &json!({
            "total": {"requestsPerSecond": 100},
            "identity": {"requestsPerSecond": 4},
            "overrides": [{"requestsPerSecond": 20, "clientRefs": accounts}],
        }),
    );
    scene.cluster.apply(&policy)?;
    for pod in [&scene.ordinary, &scene.near] {
        scene.expect_rate(pod, 4, "clients", "identity")?;
    }
    for pod in &scene.special {
        scene.expect_rate(pod, 20, "clients", "override")?;
    }
    scene.cluster.remove(&policy)
}

/// Whoever they are: what each may have for itself is more.
fn of_all(scene: &Scene) -> Result<()> {
    let policy = policy(
        "all",
        "http",
        &json!({
            "total": {"requestsPerSecond": 8},
            "identity": {"requestsPerSecond": 50},
        }),
    );
    scene.cluster.apply(&policy)?;
    for pod in [&scene.ordinary, &scene.near, &scene.special[0]] {
        scene.expect_rate(pod, 8, "all", "total")?;
    }
    scene.cluster.remove(&policy)
}

fn calls(scene: &Scene) -> Result<()> {
    let policy = policy(
        "calls",
        "grpc",
        &json!({"identity": {"requestsPerSecond": 1}}),
    );
    scene.cluster.apply(&policy)?;
    let call = || grpc_call(&scene.ordinary, scene.target(GRPC), &[]);
    wait_for("a call to be too much", Duration::from_secs(40), || {
        let called = std::thread::scope(|scope| {
            let calls: Vec<_> = (0..6).map(|_| scope.spawn(call)).collect();
            let joined = calls.into_iter().map(|it| {
                let joined = it.join();
                joined.map_err(|_| anyhow::anyhow!("a thread failed"))?
            });
            joined.collect::<Result<Vec<_>>>()
        })?;
        let told = ("weft-error".to_owned(), "rate_limited".to_owned());
        for it in &called {
            ensure!([0, 8].contains(&it.code), "{it:?}");
            ensure!(it.code == 0 || it.details.contains(&told), "{it:?}");
        }
        Ok(called.iter().any(|it| it.code == 8).then_some(()))
    })?;
    let labels = [
        ("srv_name", "grpc"),
        ("ratelimit_name", "calls"),
        ("ratelimit_scope", "identity"),
    ];
    let node = scene.cluster.node(1);
    wait_for_metric(node, "inbound_http_local_ratelimit_total", &labels, 1.0)?;
    scene.cluster.remove(&policy)
}

fn policy(name: &str, server: &str, rates: &Value) -> Value {
    let mut policy = json!({"apiVersion": "policy.weft.dev/v1alpha1",
        "kind": "HTTPLocalRateLimitPolicy",
        "metadata": {"name": name, "namespace": "default"},
        "spec": rates});
    policy["spec"]["targetRef"] = json!({"kind": "Server", "name": server});
    policy
}

/// Far more than any of the rates.
const BURST: usize = 300;
const HTTP: u16 = 8080;
const GRPC: u16 = 9090;
