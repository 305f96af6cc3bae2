//! More requests at once than a pod may have: who refuses them, how they are told, and that others are served.

use std::net::SocketAddr;

use anyhow::{Result, ensure};
use weft_tests::apps::{Shown, curl_shop};
use weft_tests::command::Process;
use weft_tests::metrics::wait_for_metric;
use weft_tests::scenario::eventually;
use weft_tests::webapp::{GrpcServer, HttpServer, grpc_call};
use weft_tests::{Checks, Pod};

use crate::stage::{Stage, expect_code, held};

#[test]
fn http_excess() {
    let stage = Stage::build_with(&["--max-exchanges-per-pod", "4"]).expect("a cluster");
    let scene = Scene {
        far: Server::start(&stage.far).expect("servers"),
        near: Server::start(&stage.near).expect("servers"),
        stage,
    };
    let mut checks = Checks::new("http excess");
    checks.check("of the client", || of_client(&scene));
    checks.check("of one client, at the server", || of_server(&scene));
    checks.finish();
}

struct Scene {
    far: Server,
    near: Server,
    stage: Stage,
}

struct Server {
    http: HttpServer,
    _grpc: GrpcServer,
}

impl Server {
    fn start(pod: &Pod) -> Result<Server> {
        Ok(Server {
            http: HttpServer::start(pod, HTTP, &[])?,
            _grpc: GrpcServer::start(pod, GRPC)?,
        })
    }
}

impl Scene {
    fn held(&self, pod: &Pod, server: &Server, count: usize) -> Result<Vec<Process>> {
        held(&self.stage.client, at(pod, HTTP), &server.http, count)
    }

    fn ask(&self, pod: &Pod) -> Result<Shown> {
        curl_shop(&self.stage.client, at(pod, HTTP), "/", &[])
    }

    /// Fails unless the client is told that there are too many, in HTTP and gRPC.
    fn expect_refused(&self, pod: &Pod) -> Result<()> {
        for version in ["--http1.1", "--http2-prior-knowledge"] {
            let shown = curl_shop(&self.stage.client, at(pod, HTTP), "/refused", &[version])?;
            expect_code(&shown, 503)?;
            let why = shown.header("weft-error");
            ensure!(why == Some("too_many_exchanges"), "{shown:?}");
        }
        let called = grpc_call(&self.stage.client, at(pod, GRPC), &[])?;
        let told = ("weft-error".to_owned(), "too_many_exchanges".to_owned());
        ensure!(
            called.code == 14 && called.details.contains(&told),
            "{called:?}"
        );
        for server in [&self.far, &self.near] {
            let seen = server.http.requests()?;
            let is_seen = seen.iter().any(|it| it.path == "/refused");
            ensure!(!is_seen, "the application was asked");
        }
        Ok(())
    }

    /// Ends what was held, and waits until there is room again.
    fn let_go(&self, held: Vec<Process>) -> Result<()> {
        drop(held);
        for pod in [&self.stage.far, &self.stage.near] {
            eventually("the client to be served again", || {
                expect_code(&self.ask(pod)?, 200)
            })?;
        }
        Ok(())
    }

    fn refused(&self, node: usize, pod: &Pod, least: f64) -> Result<()> {
        let labels = [("reason", "too_many_exchanges"), ("pod", pod.name())];
        let node = self.stage.cluster.node(node);
        wait_for_metric(node, "weft_refused_total", &labels, least).map(drop)
    }
}

/// Its own agent refuses what is above, wherever it would go; another client of its node is served.
fn of_client(scene: &Scene) -> Result<()> {
    let (far, near) = (&scene.stage.far, &scene.stage.near);
    let mut held = scene.held(far, &scene.far, 2)?;
    held.extend(scene.held(near, &scene.near, 2)?);
    for pod in [far, near] {
        scene.expect_refused(pod)?;
    }
    scene.refused(0, &scene.stage.client, 6.0)?;
    let labels = [("pod", "client"), ("error", "LOAD_SHED")];
    let node = scene.stage.cluster.node(0);
    wait_for_metric(node, "response_total", &labels, 6.0)?;
    let shown = curl_shop(near, at(far, HTTP), "/", &[])?;
    expect_code(&shown, 200)?;
    scene.let_go(held)
}

/// One identity may have as many as it leaves to all others: the server's agent refuses the third of four.
fn of_server(scene: &Scene) -> Result<()> {
    let (far, near) = (&scene.stage.far, &scene.stage.near);
    let held = scene.held(far, &scene.far, 2)?;
    scene.expect_refused(far)?;
    scene.refused(1, far, 3.0)?;
    expect_code(&scene.ask(near)?, 200)?;
    let shown = curl_shop(near, at(far, HTTP), "/", &[])?;
    expect_code(&shown, 200)?;
    scene.let_go(held)
}

fn at(pod: &Pod, port: u16) -> SocketAddr {
    pod.sockets(port)[0]
}

const HTTP: u16 = 8080;
const GRPC: u16 = 9090;
