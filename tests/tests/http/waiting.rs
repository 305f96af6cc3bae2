//! A Service without an endpoint that is ready: requests and connections wait for one, for a while, and then hear
//! at once that there is none.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use weft_tests::apps::{Shown, curl_shop};
use weft_tests::manifests::ServiceSpec;
use weft_tests::scenario::eventually;
use weft_tests::testapp::{self, Server};
use weft_tests::webapp::{GrpcServer, HttpServer, grpc_call, raw};
use weft_tests::{Checks, Cluster, ClusterOptions, Pod, PodSpec, wait_for};

use crate::stage::expect_code;

struct Scene {
    client: Pod,
    cluster: Cluster,
}

#[test]
fn http_waiting() {
    let scene = Scene::build().expect("a cluster");
    let mut checks = Checks::new("http waiting");
    let mut check = |name: &str, run: fn(&Scene) -> Result<()>| {
        checks.check(name, || run(&scene));
    };
    check("a request waits until an endpoint is there", appears);
    check("a connection waits until an endpoint is there", flow);
    check("a request waits until somebody listens", listens);
    check("who waited in vain hears so, and others at once", fails);
    check(
        "a connection that nobody serves ends, and is refused then",
        refused,
    );
    check("no more wait than may", full);
    check("who only knocks hears the truth the second time", knocks);
    checks.finish();
}

impl Scene {
    fn build() -> Result<Scene> {
        let args = ["--fail-fast-after", "10s", "--max-waiting-per-pod", "4"];
        let cluster = Cluster::with(ClusterOptions {
            agent_args: args.map(str::to_owned).into(),
            ..ClusterOptions::default()
        })?;
        let client = cluster.add_pod(PodSpec::new("client").on(0))?;
        Ok(Scene { client, cluster })
    }

    /// A Service of which no pod is there yet.
    fn service(&self, app: &str, speaks: Option<&str>) -> Result<SocketAddr> {
        let spec = ServiceSpec::new(app).select("app", app).port(80, PORT);
        let spec = match speaks {
            Some(protocol) => spec.speaks(protocol),
            None => spec,
        };
        let [address, _] = self.cluster.add_service(&spec)?;
        let node = self.cluster.node(0);
        wait_for("the agent to know the Service", PATIENCE, || {
            Ok(node.known_service(app)?.map(drop))
        })?;
        Ok(SocketAddr::new(address, 80))
    }

    /// A pod that nobody was told of.
    fn hidden(&self, app: &str) -> Result<Pod> {
        self.cluster
            .build_pod(PodSpec::new(app).label("app", app).on(1))
    }

    /// Does something while a request waits; fails unless it was waiting.
    fn meanwhile(&self, target: SocketAddr, act: impl FnOnce() -> Result<()>) -> Result<Shown> {
        std::thread::scope(|scope| {
            let asked = scope.spawn(|| curl_shop(&self.client, target, "/", &[]));
            self.wait_waiting()?;
            act()?;
            asked.join().map_err(|_| anyhow::anyhow!("panicked"))?
        })
    }

    /// What the dump of the client's agent says of a Service's port.
    fn expect_shown(&self, app: &str, waiting: usize, fail_fast: bool) -> Result<()> {
        let known = self.cluster.node(0).known_service(app)?;
        let port = known.context("a Service that is known")?["ports"][0].take();
        ensure!(
            port["waiting"] == waiting && port["fail_fast"] == fail_fast,
            "{waiting} waiting, fail fast {fail_fast}: {port}"
        );
        Ok(())
    }

    fn wait_waiting(&self) -> Result<()> {
        wait_for("somebody to wait", PATIENCE, || {
            let waiting = self.cluster.node(0).metrics()?;
            Ok((waiting.sum("weft_balancer_waiting", &[]) >= 1.0).then_some(()))
        })
    }
}

fn appears(scene: &Scene) -> Result<()> {
    for speaks in [None, Some("http")] {
        let app = speaks.unwrap_or("late");
        let target = scene.service(app, speaks)?;
        let pod = scene.hidden(app)?;
        let _server = HttpServer::start(&pod, PORT, &["--quiet"])?;
        let shown = scene.meanwhile(target, || scene.cluster.announce(&pod))?;
        expect_code(&shown, 200)?;
    }
    Ok(())
}

fn flow(scene: &Scene) -> Result<()> {
    let target = scene.service("flow", Some("linkerd.io/opaque"))?;
    let pod = scene.hidden("flow")?;
    let _server = Server::start(&pod, PORT, "echo", &["--quiet"])?;
    let said = std::thread::scope(|scope| {
        let said = scope.spawn(|| testapp::say(&scene.client, target, "patience"));
        scene.wait_waiting()?;
        scene.cluster.announce(&pod)?;
        said.join().map_err(|_| anyhow::anyhow!("panicked"))?
    })?;
    ensure!(said.text == "patience" && said.eof, "{said:?}");
    Ok(())
}

/// The pod is an endpoint before its application listens.
fn listens(scene: &Scene) -> Result<()> {
    let target = scene.service("starting", None)?;
    let spec = PodSpec::new("starting").label("app", "starting").on(1);
    let pod = scene.cluster.add_pod(spec)?;
    let mut server = None;
    let shown = scene.meanwhile(target, || {
        server = Some(HttpServer::start(&pod, PORT, &["--quiet"])?);
        Ok(())
    })?;
    expect_code(&shown, 200)
}

fn fails(scene: &Scene) -> Result<()> {
    let target = scene.service("nobody", None)?;
    let start = Instant::now();
    no_endpoint(&curl_shop(&scene.client, target, "/", &[])?)?;
    let waited = start.elapsed();
    ensure!(waited > Duration::from_secs(5), "{waited:?}");
    scene.expect_shown("nobody", 0, true)?;
    // From now on at once, for calls of gRPC too.
    let start = Instant::now();
    no_endpoint(&curl_shop(&scene.client, target, "/", &[])?)?;
    // Also who is slow to ask, and whoever comes meanwhile.
    let ask = r"GET / HTTP/1.1\r\nHost: nobody\r\nConnection: close\r\n\r\n";
    let slow = raw(&scene.client, target, &["", ask], &["--pause-ms", "200"])?;
    ensure!(slow.statuses == [503], "{slow:?}");
    let called = grpc_call(&scene.client, target, &[])?;
    ensure!(
        called.code == 14 && called.message == "no_endpoint",
        "{called:?}"
    );
    let waited = start.elapsed();
    ensure!(waited < Duration::from_secs(4), "{waited:?}");
    let labels = [("backend_name", "nobody")];
    let metrics = scene.cluster.node(0).metrics()?;
    for (name, least) in [
        ("weft_balancer_fail_fast", 1.0),
        ("weft_balancer_fail_fasts_total", 1.0),
        ("weft_balancer_unserved_total", 4.0),
    ] {
        let sum = metrics.sum(name, &labels);
        ensure!(sum >= least, "{name} is {sum}");
    }
    // Until somebody is there.
    let pod = scene.hidden("nobody")?;
    let _server = HttpServer::start(&pod, PORT, &["--quiet"])?;
    scene.cluster.announce(&pod)?;
    eventually("the Service to answer", || {
        expect_code(&curl_shop(&scene.client, target, "/", &[])?, 200)
    })?;
    let metrics = scene.cluster.node(0).metrics()?;
    let shut = metrics.sum("weft_balancer_fail_fast", &labels);
    ensure!(shut == 0.0, "it still fails fast");
    Ok(())
}

fn no_endpoint(shown: &Shown) -> Result<()> {
    expect_code(shown, 503)?;
    let reason = shown.headers.iter().find(|(name, _)| name == "weft-error");
    ensure!(
        reason.is_some_and(|(_, value)| value == "no_endpoint"),
        "{shown:?}"
    );
    Ok(())
}

/// Of one pod as many as it may; the next one hears that at once, and the others are answered.
fn full(scene: &Scene) -> Result<()> {
    let target = scene.service("crowded", Some("http"))?;
    let pod = scene.hidden("crowded")?;
    let _server = HttpServer::start(&pod, PORT, &["--quiet"])?;
    scene.expect_shown("crowded", 0, false)?;
    std::thread::scope(|scope| {
        let bytes = r"GET / HTTP/1.1\r\nHost: crowded\r\nConnection: close\r\n\r\n";
        let ask = || raw(&scene.client, target, &[bytes], &["--quiet-ms", "60000"]);
        let waiting = [(); MOST_WAITING].map(|()| scope.spawn(ask));
        let labels = [("backend_name", "crowded")];
        wait_for("as many to wait as may", PATIENCE, || {
            let metrics = scene.cluster.node(0).metrics()?;
            let now = metrics.sum("weft_balancer_waiting", &labels);
            Ok((now == MOST_WAITING as f64).then_some(()))
        })?;
        scene.expect_shown("crowded", MOST_WAITING, false)?;
        let shown = curl_shop(&scene.client, target, "/", &[])?;
        expect_code(&shown, 503)?;
        let told = shown.header("weft-error");
        ensure!(told == Some("too_many_waiting"), "{shown:?}");
        scene.cluster.announce(&pod)?;
        for waiting in waiting {
            let answer = waiting.join().map_err(|_| anyhow::anyhow!("panicked"))??;
            ensure!(answer.statuses == [200], "{answer:?}");
        }
        scene.expect_shown("crowded", 0, false)
    })
}

fn refused(scene: &Scene) -> Result<()> {
    let target = scene.service("silent", Some("linkerd.io/opaque"))?;
    let connect = || testapp::connect(&scene.client, target, &["--timeout-ms", "20000"]);
    let first = connect()?;
    ensure!(
        first.outcome == "reset" && first.elapsed_ms > 5000.0,
        "{first:?}"
    );
    let then = connect()?;
    ensure!(
        then.outcome == "refused" && then.stage == "connect" && then.elapsed_ms < 1000.0,
        "{then:?}"
    );
    // Also when that is forgotten, and it is asked anew.
    std::thread::sleep(Duration::from_secs(4));
    let then = connect()?;
    ensure!(
        matches!(then.outcome.as_str(), "reset" | "refused") && then.elapsed_ms < 2000.0,
        "{then:?}"
    );
    Ok(())
}

fn knocks(scene: &Scene) -> Result<()> {
    let target = scene.service("knocked", None)?;
    let knock = || testapp::connect(&scene.client, target, &["--receive-bytes", "0"]);
    knock()?;
    wait_for("a refusal", Duration::from_secs(4), || {
        let knocked = knock()?;
        ensure!(knocked.outcome == "refused", "{knocked:?}");
        Ok(Some(()))
    })?;
    // HTTP servers are waited for all the same once that is forgotten.
    let pod = scene.hidden("knocked")?;
    let _server = GrpcServer::start(&pod, PORT)?;
    scene.cluster.announce(&pod)?;
    eventually("the Service to answer", || {
        let called = grpc_call(&scene.client, target, &[])?;
        ensure!(called.code == 0, "{called:?}");
        Ok(())
    })
}

const PORT: u16 = 8080;
/// Of one pod.
const MOST_WAITING: usize = 4;
const PATIENCE: Duration = Duration::from_secs(5);
