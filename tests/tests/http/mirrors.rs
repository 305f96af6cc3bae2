//! Mirrors under load: nobody waits for them, whatever becomes of them, and there are never many.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use weft_tests::apps::curl_shop;
use weft_tests::manifests::{ServiceSpec, backend, http_route};
use weft_tests::scenario::eventually;
use weft_tests::webapp::{HttpLoad, HttpServer, Report, http_load};
use weft_tests::{Checks, Cluster, DEADLINE, Pod, PodSpec, wait_for};

use crate::stage::{expect_code, serving};

#[test]
fn http_mirrors() {
    let mut scene = Scene::build().expect("a cluster");
    let mut checks = Checks::new("http mirrors");
    for (version, args) in CLIENTS {
        checks.check(&format!("a copy of each request, by {version}"), || {
            copies(&scene, args)
        });
    }
    for (version, args) in CLIENTS {
        checks.check(
            &format!("a slow mirror slows nothing, by {version}"),
            || slow(&scene, args),
        );
    }
    checks.check("a tenth of the requests", || tenth(&scene));
    checks.check("a mirror that dies", || dies(&mut scene));
    checks.finish();
}

/// The Service `shop`, whose requests are mirrored.
struct Scene {
    mirror: Option<HttpServer>,
    mirror_pod: Pod,
    _server: HttpServer,
    _pod: Pod,
    target: SocketAddr,
    client: Pod,
    cluster: Cluster,
}

impl Scene {
    fn build() -> Result<Scene> {
        let cluster = Cluster::start()?;
        let client = cluster.add_pod(PodSpec::new("client").on(0))?;
        let pod = cluster.add_pod(PodSpec::new("shop").on(1))?;
        let mirror_pod = cluster.add_pod(PodSpec::new("mirror").on(1))?;
        let server = HttpServer::start(&pod, HTTP, &["--quiet"])?;
        let mirror = HttpServer::start(&mirror_pod, HTTP, &[])?;
        let service = |name| ServiceSpec::new(name).select("app", name).port(80, HTTP);
        let target = serving(&cluster, &client, &service("shop"), 80)?;
        serving(&cluster, &client, &service("mirror"), 80)?;
        cluster.apply(&mirrored(&json!({}), "/all"))?;
        let scene = Scene {
            mirror: Some(mirror),
            mirror_pod,
            _server: server,
            _pod: pod,
            target,
            client,
            cluster,
        };
        wait_for("requests to be mirrored", DEADLINE, || {
            scene.load(1, "/begun", &[])?;
            Ok((scene.mirrored("/begun")? > 0).then_some(()))
        })?;
        Ok(scene)
    }

    fn load(&self, count: u64, path: &str, args: &[&str]) -> Result<Report> {
        let args = [args, &["--path", path]].concat();
        let report = http_load(&self.client, self.target, count, &args)?;
        report.expect_all("200")?;
        ensure!(
            report.share("shop") == 1.0,
            "a mirror's answer was passed on: {report:?}"
        );
        Ok(report)
    }

    /// How many requests for the path the mirror got.
    fn mirrored(&self, path: &str) -> Result<usize> {
        let requests = self.mirror.as_ref().context("it is there")?.requests()?;
        Ok(requests.iter().filter(|it| it.path.ends_with(path)).count())
    }
}

/// The route: of what part of the requests copies go to the mirror, and a path by which it is known.
fn mirrored(part: &Value, name: &str) -> Value {
    let mut mirror = part.clone();
    mirror["backendRef"] = json!({"name": "mirror", "port": 80});
    let rules = json!([
        {
            "filters": [{"type": "RequestMirror", "requestMirror": mirror}],
            "backendRefs": [backend("shop", 80, 1)],
        },
        {
            "matches": [{"path": {"type": "Exact", "value": name}}],
            "filters": [{"type": "RequestRedirect", "requestRedirect": {"statusCode": 302}}],
        },
    ]);
    http_route("default", "mirrored", "shop", 80, &rules)
}

/// What `percent` says, within four standard deviations: by chance that fails once in 16,000 times.
fn tenth(scene: &Scene) -> Result<()> {
    let begin = |part: &Value, name: &str| -> Result<()> {
        scene.cluster.apply(&mirrored(part, name))?;
        eventually("the share to be in effect", || {
            expect_code(&curl_shop(&scene.client, scene.target, name, &[])?, 302)
        })
    };
    begin(&json!({"percent": 10}), "/one-of-ten")?;
    scene.load(2000, "/tenth", &["--connections", "4"])?;
    let expected = 200.0 - 4.0 * 13.4..200.0 + 4.0 * 13.4;
    wait_for("the copies to arrive", DEADLINE, || {
        Ok((scene.mirrored("/tenth")? as f64 >= expected.start).then_some(()))
    })?;
    let copies = scene.mirrored("/tenth")?;
    println!("mirrors: {copies} copies of 2000 at ten percent");
    ensure!(expected.contains(&(copies as f64)), "{copies} copies");
    begin(&json!({}), "/all-again")
}

fn copies(scene: &Scene, args: &[&str]) -> Result<()> {
    let mut attempts = 0;
    let mut most = 0;
    // On a machine that is busy the places for copies may be taken, so that there are fewer.
    eventually("a copy of nearly each request", || {
        attempts += 1;
        let path = format!("/copied-{}-{attempts}", args.len());
        scene.load(200, &path, &[args, &["--pause-ms", "2"]].concat())?;
        wait_for("the copies to arrive", Duration::from_secs(5), || {
            Ok((scene.mirrored(&path)? >= 150).then_some(()))
        })?;
        most = most.max(scene.mirrored(&path)?);
        Ok(())
    })?;
    ensure!(most <= 200, "more than one of each: {most}");
    Ok(())
}

/// One that takes 3 s for each answer: the others are as fast as ever, and it has as many at once as it may.
fn slow(scene: &Scene, args: &[&str]) -> Result<()> {
    let mirror = scene.mirror.as_ref().context("it is there")?;
    let path = format!("/slow-{}", args.len());
    mirror.configure(&scene.mirror_pod, SLOW_MS, 200)?;
    let report = scene.load(3000, &path, args);
    mirror.configure(&scene.mirror_pod, 0, 200)?;
    let report = report?;
    let p99 = report.p99_us.context("a percentile")?;
    ensure!(
        p99 < 1000.0 * SLOW_MS as f64 / 3.0,
        "requests waited for the mirror: {report:?}"
    );
    let mirrored = scene.mirrored(&path)?;
    let turns = (report.seconds * 1000.0 / SLOW_MS as f64).floor() as usize + 1;
    ensure!(
        (1..=turns * MOST_MIRRORED).contains(&mirrored),
        "{mirrored} copies in {} s",
        report.seconds
    );
    // Those that are on their way still take places of the next ones.
    wait_for("a place for a copy", DEADLINE, || {
        let next = format!("{path}-next");
        scene.load(1, &next, &[])?;
        Ok((scene.mirrored(&next)? > 0).then_some(()))
    })
}

fn dies(scene: &mut Scene) -> Result<()> {
    let args = ["--connections", "4", "--pause-ms", "2", "--method", "POST"];
    let args = [&args[..], &["--body-bytes", "20000"]].concat();
    let load = HttpLoad::start(&scene.client, scene.target, &args)?;
    let mut mirror = scene.mirror.take().context("it is there")?;
    wait_for("copies to arrive", DEADLINE, || {
        let requests = mirror.requests()?;
        let copies = requests.iter().filter(|it| it.method == "POST");
        Ok((copies.count() > 50).then_some(()))
    })?;
    mirror.process().kill()?;
    // It goes on without it for a while.
    scene.load(500, "/without", &["--connections", "4"])?;
    let report = load.stop()?;
    report.expect_all("200")?;
    ensure!(report.reconnects == 0, "{report:?}");
    Ok(())
}

const HTTP: u16 = 8080;
const SLOW_MS: u64 = 3000;
/// Mirrored requests of one pod at once.
const MOST_MIRRORED: usize = 64;
const CLIENTS: [(&str, &[&str]); 2] = [
    ("HTTP/1", &["--connections", "8"]),
    (
        "HTTP/2",
        &["--http2", "--connections", "2", "--streams", "4"],
    ),
];
