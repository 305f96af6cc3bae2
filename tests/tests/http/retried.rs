//! Where requests that are sent again go, and when.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use weft_tests::apps::curl_shop;
use weft_tests::manifests::ServiceSpec;
use weft_tests::webapp::HttpServer;
use weft_tests::{Checks, Cluster, Pod, PodSpec};

use crate::stage::{VERSIONS, expect_code, serving};

#[test]
fn http_retried() {
    let scene = Scene::build().expect("a cluster");
    let mut checks = Checks::new("http retried");
    let mut check = |name: &str, run: fn(&Scene) -> Result<()>| {
        checks.check(name, || run(&scene));
    };
    check("each endpoint once before one is asked again", each_once);
    check("who asks for a pause has one, alone", alone);
    check("who asks for a pause has one, beside another", beside);
    check("what would be too late is answered as it is", too_late);
    checks.finish();
}

struct Scene {
    client: Pod,
    cluster: Cluster,
}

struct Server {
    http: HttpServer,
    pod: Pod,
}

impl Server {
    /// How many requests for a path it has seen.
    fn count(&self, path: &str) -> Result<usize> {
        let requests = self.http.requests()?;
        Ok(requests.iter().filter(|it| it.path.ends_with(path)).count())
    }
}

impl Scene {
    fn build() -> Result<Scene> {
        let cluster = Cluster::start()?;
        let client = cluster.add_pod(PodSpec::new("client").on(0))?;
        Ok(Scene { client, cluster })
    }

    /// A server in a pod of this name, which a Service of the app selects.
    fn server(&self, app: &str, name: &str, node: usize, args: &[&str]) -> Result<Server> {
        let spec = PodSpec::new(name).label("app", app).on(node);
        let pod = self.cluster.add_pod(spec)?;
        let http = HttpServer::start(&pod, HTTP, args)?;
        Ok(Server { http, pod })
    }

    fn service(&self, app: &str, annotations: &[(&str, &str)]) -> Result<SocketAddr> {
        let spec = ServiceSpec::new(app).select("app", app);
        let annotated = annotations
            .iter()
            .fold(spec, |spec, (name, value)| spec.annotation(name, value));
        serving(&self.cluster, &self.client, &annotated.port(80, HTTP), 80)
    }
}

/// As often as there are endpoints, all of which fail.
fn each_once(scene: &Scene) -> Result<()> {
    const ENDPOINTS: usize = 6;
    let mut servers = Vec::new();
    for number in 0..ENDPOINTS {
        let name = format!("many-{number}");
        servers.push(scene.server("many", &name, number % 2, &[])?);
    }
    let annotations = [
        ("weft.dev/retry-http", "5xx"),
        ("weft.dev/retry-limit", "5"),
    ];
    let target = scene.service("many", &annotations)?;
    for server in &servers {
        server.http.configure(&server.pod, 0, 503)?;
    }
    for (number, version) in VERSIONS.into_iter().cycle().take(8).enumerate() {
        let path = format!("/many-{number}");
        expect_code(&curl_shop(&scene.client, target, &path, version)?, 503)?;
        let counts: Result<Vec<usize>> = servers.iter().map(|it| it.count(&path)).collect();
        let counts = counts?;
        ensure!(counts == [1; ENDPOINTS], "{path}: asked {counts:?} times");
        // The budget has ten in each second.
        std::thread::sleep(Duration::from_secs(1));
    }
    Ok(())
}

/// Nobody else is there: the request waits.
fn alone(scene: &Scene) -> Result<()> {
    for (name, node) in [("alone-far", 1), ("alone-near", 0)] {
        let server = scene.server(name, name, node, &["--header", "retry-after: 2"])?;
        let annotations = [("weft.dev/retry-http", "429,503")];
        let target = scene.service(name, &annotations)?;
        for (number, version) in VERSIONS.into_iter().enumerate() {
            for status in [429, 503] {
                let path = format!("/{name}-{number}-{status}");
                server.http.configure_some(&server.pod, 0, status, 1)?;
                let began = Instant::now();
                expect_code(&curl_shop(&scene.client, target, &path, version)?, 200)?;
                let took = began.elapsed();
                ensure!(took >= Duration::from_secs(2), "{path} took {took:?}");
                let count = server.count(&path)?;
                ensure!(count == 2, "the server saw it {count} times");
            }
        }
    }
    Ok(())
}

/// Another one is asked at once, and with more tries than there are endpoints it alone, as it asked for nothing.
fn beside(scene: &Scene) -> Result<()> {
    let tired = scene.server("beside", "tired", 1, &["--header", "retry-after: 600"])?;
    let other = scene.server("beside", "other", 0, &[])?;
    let annotations = [
        ("weft.dev/retry-http", "5xx"),
        ("weft.dev/retry-limit", "3"),
    ];
    let target = scene.service("beside", &annotations)?;
    tired.http.configure(&tired.pod, 0, 503)?;
    let mut met = 0;
    for number in 0..10 {
        other.http.configure_some(&other.pod, 0, 500, 2)?;
        let path = format!("/beside-{number}");
        let began = Instant::now();
        let shown = curl_shop(&scene.client, target, &path, &[])?;
        expect_code(&shown, 200)?;
        ensure!(began.elapsed() < SOON, "it took {:?}", began.elapsed());
        let count = tired.count(&path)?;
        ensure!(count < 2, "who asked for a pause was asked {count} times");
        met += count;
        std::thread::sleep(Duration::from_millis(300));
    }
    ensure!(met > 0, "nobody asked for a pause");
    Ok(())
}

/// Than the request may take, or than anybody is waited for.
fn too_late(scene: &Scene) -> Result<()> {
    for (name, pause, time) in [
        ("late-for-it", "retry-after: 9", "8s"),
        ("late-for-all", "retry-after: 60", "5m"),
    ] {
        let server = scene.server(name, name, 1, &["--header", pause])?;
        let annotations = [
            ("weft.dev/retry-http", "5xx"),
            ("weft.dev/retry-limit", "3"),
            ("weft.dev/timeout-request", time),
        ];
        let target = scene.service(name, &annotations)?;
        for (number, version) in VERSIONS.into_iter().enumerate() {
            let path = format!("/{name}-{number}");
            server.http.configure_some(&server.pod, 0, 503, 1)?;
            let began = Instant::now();
            let shown = curl_shop(&scene.client, target, &path, version)?;
            expect_code(&shown, 503)?;
            ensure!(began.elapsed() < SOON, "it took {:?}", began.elapsed());
            let said = format!("retry-after: {}", shown.header("retry-after").unwrap_or(""));
            ensure!(said == pause, "{shown:?}");
            ensure!(shown.header("weft-error").is_none(), "{shown:?}");
            ensure!(server.count(&path)? == 1, "it was sent again");
        }
    }
    Ok(())
}

/// Far below what anybody asked to be left alone for.
const SOON: Duration = Duration::from_secs(7);
const HTTP: u16 = 8080;
