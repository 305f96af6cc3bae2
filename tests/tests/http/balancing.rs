//! Which endpoint of a Service a request goes to: each request by itself, by how fast endpoints are.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, ensure};
use weft_tests::apps::curl_shop;
use weft_tests::manifests::ServiceSpec;
use weft_tests::scenario::{eventually, expect_echo};
use weft_tests::testapp::{Hold, Server};
use weft_tests::webapp::{GrpcServer, HttpServer, Report, grpc_call, grpc_load, http_load};
use weft_tests::{Checks, Cluster, DEADLINE, Pod, PodSpec, wait_for};

use crate::stage::{expect_code, serving};

/// A client, and three endpoints of one Service: one on the client's node, two on the other.
struct Scene {
    endpoints: Vec<Endpoint>,
    target: SocketAddr,
    grpc_target: SocketAddr,
    client: Pod,
    cluster: Cluster,
}

struct Endpoint {
    http: HttpServer,
    _grpc: GrpcServer,
    pod: Pod,
}

#[test]
fn http_balancing() {
    let scene = Scene::build().expect("a cluster");
    let mut checks = Checks::new("http balancing");
    let mut check = |name: &str, run: fn(&Scene) -> Result<()>| {
        checks.check(name, || run(&scene));
    };
    check("each request of an HTTP/1 connection chooses", |scene| {
        scene.spread(&http_load(&scene.client, scene.target, 300, &[])?, "200", 2)
    });
    check("each request of an HTTP/2 connection chooses", |scene| {
        let args = ["--http2"];
        scene.spread(
            &http_load(&scene.client, scene.target, 300, &args)?,
            "200",
            2,
        )
    });
    check("each call of a gRPC channel chooses", |scene| {
        let report = grpc_load(&scene.client, scene.grpc_target, 300, &[])?;
        scene.spread(&report, "0", 2)
    });
    check("requests at once are for all endpoints", |scene| {
        for args in [
            ["--connections", "8"].as_slice(),
            &["--http2", "--streams", "8"],
        ] {
            let report = http_load(&scene.client, scene.target, 600, args)?;
            scene.spread(&report, "200", 3)?;
        }
        let args = ["--connections", "8"];
        let report = grpc_load(&scene.client, scene.grpc_target, 600, &args)?;
        scene.spread(&report, "0", 3)
    });
    check("a slow endpoint loses its share, and regains it", slow);
    check("an endpoint that refuses is gone around", refusing);
    check("clients of both versions share a Service", both_versions);
    check("a strong endpoint takes as much as it is said to", weighted);
    check("a Service without endpoints says so soon", nobody);
    check("connections that are not HTTP are for all endpoints", flows);
    checks.finish();
}

impl Scene {
    fn build() -> Result<Scene> {
        let cluster = Cluster::start()?;
        let client = cluster.add_pod(PodSpec::new("client").on(0))?;
        let mut endpoints = Vec::new();
        for (name, node) in [("one", 0), ("two", 1), ("three", 1)] {
            let pod = cluster.add_pod(PodSpec::new(name).label("app", "api").on(node))?;
            endpoints.push(Endpoint {
                http: HttpServer::start(&pod, HTTP, &["--quiet"])?,
                _grpc: GrpcServer::start(&pod, GRPC)?,
                pod,
            });
        }
        let spec = ServiceSpec::new("api").select("app", "api").port(80, HTTP);
        let target = serving(&cluster, &client, &spec.port(90, GRPC), 80)?;
        Ok(Scene {
            endpoints,
            target,
            grpc_target: SocketAddr::new(target.ip(), 90),
            client,
            cluster,
        })
    }

    /// Fails unless all were answered, and at least so many endpoints had a part of them. Of requests
    /// one after the other the slowest of three may have none: it loses every comparison.
    fn spread(&self, report: &Report, status: &str, least: usize) -> Result<()> {
        report.expect_all(status)?;
        let endpoints = self.endpoints.iter();
        let used = endpoints.filter(|it| report.share(it.pod.name()) > 0.03);
        ensure!(
            used.count() >= least,
            "fewer than {least} endpoints: {report:?}"
        );
        Ok(())
    }
}

fn slow(scene: &Scene) -> Result<()> {
    let [_, slow, _] = scene.endpoints.as_slice() else {
        anyhow::bail!("three endpoints");
    };
    // By many connections: one of them alone could be lucky.
    let share = || -> Result<f64> {
        let mut shares = Vec::new();
        for _ in 0..10 {
            let report = http_load(&scene.client, scene.target, 60, &[])?;
            report.expect_all("200")?;
            shares.push(report.share(slow.pod.name()));
        }
        Ok(shares.iter().sum::<f64>() / shares.len() as f64)
    };
    slow.http.configure(&slow.pod, 200, 200)?;
    eventually("the slow endpoint to lose its share", || {
        let share = share()?;
        ensure!(share < 0.1, "it has {share}");
        Ok(())
    })?;
    slow.http.configure(&slow.pod, 0, 200)?;
    // What is remembered of latency decays in ten seconds.
    wait_for(
        "the endpoint to regain its share",
        Duration::from_secs(60),
        || {
            let share = share()?;
            ensure!(share > 0.15, "it has {share}");
            Ok(Some(()))
        },
    )
}

/// An application that is gone while its pod is still an endpoint costs no request.
fn refusing(scene: &Scene) -> Result<()> {
    let spec = PodSpec::new("empty").label("app", "partly").on(1);
    let _empty = scene.cluster.add_pod(spec)?;
    let spec = PodSpec::new("serving").label("app", "partly").on(1);
    let pod = scene.cluster.add_pod(spec)?;
    let _server = HttpServer::start(&pod, HTTP, &["--quiet"])?;
    let spec = ServiceSpec::new("partly")
        .select("app", "partly")
        .port(80, HTTP);
    let target = serving(&scene.cluster, &scene.client, &spec, 80)?;
    for args in [[].as_slice(), &["--http2"]] {
        http_load(&scene.client, target, 100, args)?.expect_all("200")?;
    }
    Ok(())
}

fn both_versions(scene: &Scene) -> Result<()> {
    let loads = [
        ["--connections", "1"].as_slice(),
        &["--http2"],
        &["--connections", "4"],
        &["--http2", "--streams", "8"],
    ];
    std::thread::scope(|scope| {
        let start = |args| scope.spawn(move || http_load(&scene.client, scene.target, 300, args));
        for load in loads.map(start) {
            let report = load.join().map_err(|_| anyhow::anyhow!("panicked"))??;
            scene.spread(&report, "200", 2)?;
        }
        Ok(())
    })
}

fn nobody(scene: &Scene) -> Result<()> {
    let spec = ServiceSpec::new("nobody")
        .select("app", "nobody")
        .port(80, HTTP);
    let [address, _] = scene.cluster.add_service(&spec.speaks("http"))?;
    let target = SocketAddr::new(address, 80);
    eventually("an answer of the mesh", || {
        let shown = curl_shop(&scene.client, target, "/", &["--max-time", "6"])?;
        expect_code(&shown, 503)
    })?;
    let called = grpc_call(&scene.client, target, &[])?;
    ensure!(
        called.code == 14 && called.elapsed_ms < 6000.0,
        "{called:?}"
    );
    Ok(())
}

/// Each connection chooses, and of many that are open at once every endpoint has some.
fn flows(scene: &Scene) -> Result<()> {
    let start = |it: &Endpoint| Server::start(&it.pod, OPAQUE, "echo", &[]);
    let servers: Vec<Server> = scene.endpoints.iter().map(start).collect::<Result<_>>()?;
    let spec = ServiceSpec::new("flows").select("app", "api");
    let spec = spec.port(81, OPAQUE).speaks("linkerd.io/opaque");
    let [address, _] = scene.cluster.add_service(&spec)?;
    let target = SocketAddr::new(address, 81);
    eventually("all endpoints to be known", || {
        expect_echo(&scene.client, target, "one of three")?;
        let metrics = scene.cluster.node(0).metrics()?;
        let labels = [("backend_name", "flows"), ("endpoint_state", "ready")];
        let ready = metrics.sum("outbound_tcp_balancer_endpoints", &labels);
        // Of both families.
        ensure!(ready == 6.0, "{ready} endpoints");
        Ok(())
    })?;
    let open = || -> Result<Vec<usize>> {
        let accepted = servers.iter().map(Server::accepted);
        Ok(accepted
            .collect::<Result<Vec<_>>>()?
            .iter()
            .map(Vec::len)
            .collect())
    };
    let before = open()?;
    let held = Hold::start(&scene.client, target, 100, &[])?;
    let after = wait_for("the servers to have them", DEADLINE, || {
        let now = open()?;
        let new: Vec<usize> = now.iter().zip(&before).map(|(now, it)| now - it).collect();
        Ok((new.iter().sum::<usize>() >= 100).then_some(new))
    })?;
    held.release()?;
    println!("balancing: of 100 connections the endpoints have {after:?}");
    ensure!(after.iter().all(|it| *it > 0), "{after:?}");
    Ok(())
}

/// Three times as much as the other one, as long as both have something to do.
fn weighted(scene: &Scene) -> Result<()> {
    let cluster = &scene.cluster;
    let spec = |name: &str| PodSpec::new(name).label("app", "weighted").on(1);
    let strong = spec("strong").annotation("weft.dev/weight", "300");
    let pods = [cluster.add_pod(strong)?, cluster.add_pod(spec("ordinary"))?];
    // Long enough that what the machine does beside it does not tell one from the other.
    let args = ["--quiet", "--delay-ms", "50"];
    let _servers = [
        HttpServer::start(&pods[0], HTTP, &args)?,
        HttpServer::start(&pods[1], HTTP, &args)?,
    ];
    let service = ServiceSpec::new("weighted").select("app", "weighted");
    let target = serving(cluster, &scene.client, &service.port(80, HTTP), 80)?;
    for args in [
        ["--connections", "16"].as_slice(),
        &["--http2", "--streams", "16"],
    ] {
        // One that was slow for a moment has less for some seconds.
        wait_for("three quarters", Duration::from_secs(60), || {
            let report = http_load(&scene.client, target, 800, args)?;
            report.expect_all("200")?;
            let share = report.share("strong");
            println!("balancing: the strong endpoint has {share:.2} of {args:?}");
            Ok((0.65..0.85).contains(&share).then_some(()))
        })?;
    }
    Ok(())
}

const HTTP: u16 = 8080;
const GRPC: u16 = 9090;
const OPAQUE: u16 = 8081;
