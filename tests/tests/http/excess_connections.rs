//! More connections at once than a pod may have: who speaks HTTP is told so, and all others are reset.

use std::net::SocketAddr;

use anyhow::{Result, ensure};
use weft_tests::apps::curl_shop;
use weft_tests::command::Process;
use weft_tests::metrics::wait_for_metric;
use weft_tests::scenario::eventually;
use weft_tests::testapp::Hold;
use weft_tests::webapp::{GrpcServer, HttpServer, grpc_call, raw};
use weft_tests::{Checks, Pod};

use crate::stage::{Stage, expect_code, held, hold};

#[test]
fn http_excess_connections() {
    let args = ["--max-flows-per-pod", &MOST.to_string()];
    let stage = Stage::build_with(&args).expect("a cluster");
    let start = |pod| Server::start(pod).expect("servers");
    let scene = Scene {
        far: start(&stage.far),
        near: start(&stage.near),
        stage,
    };
    let mut checks = Checks::new("http excess connections");
    checks.check("from a pod", || from_pod(&scene));
    checks.check("from a pod that floods", || flood(&scene));
    checks.check("to a pod, from outside of the mesh", || outside(&scene));
    checks.check("to a pod, of all together", || together(&scene));
    checks.finish();
}

struct Scene {
    far: Server,
    near: Server,
    stage: Stage,
}

/// The node and the pod whose agent counts what is turned away, and in which direction.
type Counted<'a> = (usize, &'a Pod, &'a str);

struct Server {
    http: HttpServer,
    _opaque: HttpServer,
    _grpc: GrpcServer,
}

impl Server {
    fn start(pod: &Pod) -> Result<Server> {
        Ok(Server {
            http: HttpServer::start(pod, HTTP, &[])?,
            _opaque: HttpServer::start(pod, OPAQUE, &[])?,
            _grpc: GrpcServer::start(pod, GRPC)?,
        })
    }
}

impl Scene {
    /// Opens connections that stay. They end with their clients, but share one connection to the server.
    fn held(
        &self,
        from: &Pod,
        (to, server): (&Pod, &Server),
        count: usize,
    ) -> Result<Vec<Process>> {
        held(from, at(to, HTTP), &server.http, count)
    }

    /// Fails unless one more that speaks HTTP is told why, in its own words, and others are reset, and all are counted
    /// by this pod's agent.
    fn expect_turned_away(&self, from: &Pod, to: &Pod, counted: Counted<'_>) -> Result<()> {
        let (node, pod, direction) = counted;
        let node = self.stage.cluster.node(node);
        let labels = [("reason", "too_many_flows"), ("pod", pod.name())];
        let errors = format!("{direction}_http_errors_total");
        let before = node.metrics()?;
        let before = |name: &str| before.sum(name, &labels);

        // On a busy machine a client may be slower than is waited for.
        let mut asked = 0;
        let body = "x".repeat(30_000);
        for args in [
            &["--http1.1"][..],
            &[HTTP2],
            &["--http1.1", "--data-binary", &body],
        ] {
            eventually("the client to be told why", || {
                asked += 1;
                let shown = curl_shop(from, at(to, HTTP), "/refused", args)?;
                expect_code(&shown, 503)?;
                let why = shown.header("weft-error");
                ensure!(why == Some("too_many_flows"), "{shown:?}");
                Ok(())
            })?;
        }
        eventually("the caller to be told why", || {
            asked += 1;
            let called = grpc_call(from, at(to, GRPC), &[])?;
            let told = ("weft-error".to_owned(), "too_many_flows".to_owned());
            let is_told = called.code == 14 && called.details.contains(&told);
            ensure!(is_told, "{called:?}");
            Ok(())
        })?;
        // What is no HTTP, what says nothing, and what nobody looks into.
        let request = r"GET / HTTP/1.1\r\nHost: shop\r\n\r\n";
        let others = [(HTTP, &["hello\\n"][..]), (HTTP, &[]), (OPAQUE, &[request])];
        for (port, said) in others {
            let answer = raw(from, at(to, port), said, &["--quiet-ms", "5000"])?;
            let is_reset = answer.outcome == "reset" && answer.received.is_empty();
            ensure!(is_reset, "{port} {said:?}: {answer:?}");
        }
        for server in [&self.far, &self.near] {
            let seen = server.http.requests()?;
            let is_seen = seen.iter().any(|it| it.path == "/refused");
            ensure!(!is_seen, "the application was asked");
        }

        let all = f64::from(asked) + others.len() as f64;
        let most = before(REFUSED) + all;
        let refused = wait_for_metric(node, REFUSED, &labels, most)?;
        ensure!(refused == most, "{refused} refused, not {most}");
        let answered = wait_for_metric(node, &errors, &labels, before(&errors) + 4.0)?;
        let most = before(&errors) + f64::from(asked);
        ensure!(answered <= most, "{answered} answered, of {most}");
        Ok(())
    }

    /// Ends what was held, and waits until there is room again.
    fn let_go(&self, held: Vec<Process>, from: &Pod, to: &Pod) -> Result<()> {
        drop(held);
        eventually("the client to be served again", || {
            expect_code(&curl_shop(from, at(to, HTTP), "/", &[])?, 200)
        })
    }
}

/// Another client of its node is served meanwhile.
fn from_pod(scene: &Scene) -> Result<()> {
    let Stage {
        client, far, near, ..
    } = &scene.stage;
    let mut held = scene.held(client, (far, &scene.far), MOST / 2)?;
    held.extend(scene.held(client, (near, &scene.near), MOST / 2)?);
    for to in [far, near] {
        scene.expect_turned_away(client, to, (0, client, "outbound"))?;
    }
    expect_code(&curl_shop(near, at(far, HTTP), "/", &[])?, 200)?;
    scene.let_go(held, client, far)
}

/// More connections than are looked at, which say nothing: nobody else waits for them, and when they are gone the
/// pod hears the truth again.
fn flood(scene: &Scene) -> Result<()> {
    let Stage {
        client, far, near, ..
    } = &scene.stage;
    let held = scene.held(client, (far, &scene.far), MOST)?;
    let node = scene.stage.cluster.node(0);
    let labels = [("reason", "too_many_flows"), ("pod", client.name())];
    let before = node.metrics()?.sum(REFUSED, &labels);
    let silent = Hold::start(client, at(far, HTTP), FLOOD, &[])?;
    expect_code(&curl_shop(near, at(far, HTTP), "/", &[])?, 200)?;
    let all = before + FLOOD as f64;
    wait_for_metric(node, REFUSED, &labels, all)?;
    eventually("the client to be told", || {
        expect_code(&curl_shop(client, at(far, HTTP), "/", &[])?, 503)
    })?;
    silent.release()?;
    scene.let_go(held, client, far)
}

/// They have half of the places.
fn outside(scene: &Scene) -> Result<()> {
    let Stage {
        client,
        plain_client,
        far,
        ..
    } = &scene.stage;
    let held = scene.held(plain_client, (far, &scene.far), MOST / 2)?;
    scene.expect_turned_away(plain_client, far, (1, far, "inbound"))?;
    expect_code(&curl_shop(client, at(far, HTTP), "/", &[])?, 200)?;
    scene.let_go(held, plain_client, far)
}

/// Others have all of them.
fn together(scene: &Scene) -> Result<()> {
    let Stage {
        client,
        plain_client,
        far,
        ..
    } = &scene.stage;
    // With what is kept open from before.
    let more = |count| hold(client, at(far, HTTP), "--http1.1", count);
    let seen = || -> Result<usize> { Ok(scene.far.http.requests()?.len()) };
    let mut before = seen()?;
    let mut held = more(MOST)?;
    eventually("all places to be taken", || {
        // Those for whom there is no room end.
        held.retain_mut(Process::is_running);
        let now = seen()?;
        let most = before + held.len();
        ensure!(now == most, "{now} of {most} are there");
        let shown = curl_shop(plain_client, at(far, HTTP), "/", &[])?;
        if shown.status.starts_with("200") {
            before += 1;
            held.extend(more(1)?);
        }
        expect_code(&shown, 503)
    })?;
    scene.expect_turned_away(plain_client, far, (1, far, "inbound"))
}

fn at(pod: &Pod, port: u16) -> SocketAddr {
    pod.sockets(port)[0]
}

const REFUSED: &str = "weft_refused_total";
const FLOOD: u64 = 100;
/// Of a pod, in each direction.
const MOST: usize = 6;
const HTTP2: &str = "--http2-prior-knowledge";
const HTTP: u16 = 8080;
/// By default.
const OPAQUE: u16 = 3306;
const GRPC: u16 = 9090;
