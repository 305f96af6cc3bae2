//! Weighted backends of a route: parts within what chance allows, changed while requests go on.

use std::net::SocketAddr;

use anyhow::{Result, ensure};
use serde_json::json;
use weft_tests::manifests::{ServiceSpec, backend, grpc_route, http_route};
use weft_tests::scenario::eventually;
use weft_tests::webapp::{GrpcServer, HttpLoad, HttpServer, Report, grpc_load, http_load};
use weft_tests::{Checks, Cluster, Pod, PodSpec};

use crate::stage::serving;

#[test]
fn http_splits() {
    let scene = Scene::build().expect("a cluster");
    let mut checks = Checks::new("http splits");
    let mut check = |name: &str, run: fn(&Scene) -> Result<()>| {
        checks.check(name, || run(&scene));
    };
    check("nine of ten requests", |scene| {
        scene.split_http([9, 1], &[])
    });
    check("nine of ten requests by HTTP/2", |scene| {
        scene.split_http([9, 1], &["--http2", "--streams", "4"])
    });
    check("weights that are no percentages", |scene| {
        scene.split_http([3, 4], &[])
    });
    check("a weight of zero", |scene| scene.split_http([1, 0], &[]));
    check("nine of ten gRPC calls", |scene| scene.split_grpc([9, 1]));
    check("a change of weights while requests go on", live_change);
    check("without the route, the Service's own endpoints", without);
    checks.finish();
}

/// Two Services of a pod each, and one for both that routes are for.
struct Scene {
    _servers: Vec<(HttpServer, GrpcServer, Pod)>,
    target: SocketAddr,
    grpc_target: SocketAddr,
    client: Pod,
    cluster: Cluster,
}

impl Scene {
    fn build() -> Result<Scene> {
        let cluster = Cluster::start()?;
        let client = cluster.add_pod(PodSpec::new("client").on(0))?;
        let mut servers = Vec::new();
        for (name, node) in [("v1", 0), ("v2", 1)] {
            let pod = cluster.add_pod(PodSpec::new(name).label("tier", "shop").on(node))?;
            let http = HttpServer::start(&pod, HTTP, &["--quiet"])?;
            servers.push((http, GrpcServer::start(&pod, GRPC)?, pod));
            let spec = ServiceSpec::new(name).select("app", name);
            cluster.add_service(&spec.port(80, HTTP).port(90, GRPC))?;
        }
        let spec = ServiceSpec::new("shop")
            .select("tier", "shop")
            .port(80, HTTP);
        let target = serving(&cluster, &client, &spec.port(90, GRPC), 80)?;
        Ok(Scene {
            _servers: servers,
            target,
            grpc_target: SocketAddr::new(target.ip(), 90),
            client,
            cluster,
        })
    }

    fn apply(&self, port: u16, weights: [u32; 2]) -> Result<()> {
        let backends = [
            backend("v1", port, weights[0]),
            backend("v2", port, weights[1]),
        ];
        let rules = json!([{"backendRefs": backends}]);
        self.cluster.apply(&match port {
            80 => http_route("default", "split", "shop", port, &rules),
            _ => grpc_route("default", "split", "shop", port, &rules),
        })
    }

    fn split_http(&self, weights: [u32; 2], args: &[&str]) -> Result<()> {
        self.apply(80, weights)?;
        let load = || http_load(&self.client, self.target, COUNT, args);
        expect_split(weights, "200", load)
    }

    fn split_grpc(&self, weights: [u32; 2]) -> Result<()> {
        self.apply(90, weights)?;
        let load = || grpc_load(&self.client, self.grpc_target, COUNT, &[]);
        expect_split(weights, "0", load)
    }
}

/// Tried until the weights are in effect, and then once more: what is tried often enough succeeds by
/// chance too.
fn expect_split(weights: [u32; 2], status: &str, load: impl Fn() -> Result<Report>) -> Result<()> {
    let attempt = || {
        let report = load()?;
        report.expect_all(status)?;
        within_chance(&report, weights)
    };
    eventually("the weights to be in effect", attempt)?;
    attempt()
}

/// Fails unless the first backend's part is what its weight says, within four standard deviations: by
/// chance that fails once in 16,000 times.
fn within_chance(report: &Report, weights: [u32; 2]) -> Result<()> {
    let part = f64::from(weights[0]) / f64::from(weights[0] + weights[1]);
    let deviation = (part * (1.0 - part) / report.answers as f64).sqrt();
    let share = report.share("v1");
    ensure!(
        (share - part).abs() <= 4.0 * deviation,
        "{share} instead of {part} ± {deviation}: {report:?}"
    );
    Ok(())
}

/// Requests that are open when the weights change end where they began; those after it go by the new
/// ones. Nothing fails.
fn live_change(scene: &Scene) -> Result<()> {
    scene.split_http([1, 0], &[])?;
    let open = HttpLoad::start(
        &scene.client,
        scene.target,
        &["--path", "/delay/1000", "--connections", "4"],
    )?;
    let load = HttpLoad::start(
        &scene.client,
        scene.target,
        &["--connections", "4", "--pause-ms", "1"],
    )?;
    scene.split_http([0, 1], &[])?;
    scene.split_http([1, 1], &[])?;
    for load in [open, load] {
        let report = load.stop()?;
        report.expect_all("200")?;
        ensure!(
            report.share("v1") > 0.0 && report.share("v2") > 0.0,
            "{report:?}"
        );
        ensure!(
            report.reconnects == 0,
            "the client's connections did not live on: {report:?}"
        );
    }
    Ok(())
}

fn without(scene: &Scene) -> Result<()> {
    scene.split_http([1, 0], &[])?;
    scene
        .cluster
        .remove(&http_route("default", "split", "shop", 80, &json!([])))?;
    eventually("both endpoints to answer", || {
        let report = http_load(&scene.client, scene.target, 200, &["--connections", "8"])?;
        report.expect_all("200")?;
        ensure!(report.share("v2") > 0.0, "{report:?}");
        Ok(())
    })
}

const HTTP: u16 = 8080;
const GRPC: u16 = 9090;
const COUNT: u64 = 1000;
