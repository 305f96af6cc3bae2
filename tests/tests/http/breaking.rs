//! Endpoints that fail are left out, and come back.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, ensure};
use weft_tests::apps::curl_shop;
use weft_tests::manifests::ServiceSpec;
use weft_tests::scenario::eventually;
use weft_tests::webapp::{GrpcServer, HttpServer, Report, grpc_call, http_load, raw};
use weft_tests::{Checks, Cluster, Pod, PodSpec, wait_for};

use crate::stage::serving;

/// A client, and two endpoints of three Services: one breaks by failures in a row, one by the share of
/// successes, and one never.
struct Scene {
    in_a_row: SocketAddr,
    by_share: SocketAddr,
    never: SocketAddr,
    servers: [HttpServer; 2],
    pods: [Pod; 2],
    client: Pod,
    cluster: Cluster,
}

#[test]
fn http_breaking() {
    let scene = Scene::build().expect("a cluster");
    let mut checks = Checks::new("http breaking");
    let mut check = |name: &str, run: fn(&Scene) -> Result<()>| {
        checks.check(name, || run(&scene));
    };
    check("without being asked for, nobody is left out", |scene| {
        scene.fail(0, true)?;
        // One that was slow for a moment may have few for some seconds.
        let mut failed = 0;
        let many = wait_for("many failures", Duration::from_secs(30), || {
            failed += scene.failures(&scene.load(scene.never)?);
            Ok((failed > 40).then_some(()))
        });
        scene.fail(0, false)?;
        many
    });
    check("who fails in a row is left out, and comes back", in_a_row);
    check("who fails too often is left out", by_share);
    check("how often is too often", shares);
    check(
        "if all fail, the mesh says so, until one is well again",
        all_fail,
    );
    check("calls are judged by their status", calls);
    check("who asks for a pause has one", paused);
    check(
        "who cannot be connected to is left out, and comes back",
        unreachable,
    );
    check("who claims to be the mesh is judged all the same", claimed);
    check("no client keeps an endpoint from others", held_up);
    checks.finish();
}

impl Scene {
    fn build() -> Result<Scene> {
        let cluster = Cluster::start()?;
        let client = cluster.add_pod(PodSpec::new("client").on(0))?;
        let pod = |name| cluster.add_pod(PodSpec::new(name).label("app", "api").on(1));
        let pods = [pod("one")?, pod("two")?];
        let start = |pod| HttpServer::start(pod, HTTP, &["--quiet"]);
        let servers = [start(&pods[0])?, start(&pods[1])?];
        let service = |name: &str, annotations: &[(&str, &str)]| {
            let spec = ServiceSpec::new(name).select("app", "api").port(80, HTTP);
            let annotated = annotations
                .iter()
                .fold(spec, |spec, (name, value)| spec.annotation(name, value));
            serving(&cluster, &client, &annotated, 80)
        };
        Ok(Scene {
            in_a_row: service("in-a-row", &IN_A_ROW)?,
            by_share: service(
                "by-share",
                &[
                    ("weft.dev/failure-accrual", "success-rate"),
                    ("weft.dev/failure-accrual-consecutive-min-penalty", "20s"),
                ],
            )?,
            never: service("never", &[])?,
            servers,
            pods,
            client,
            cluster,
        })
    }

    /// Lets an endpoint fail, or not any more. It answers as fast as before, so that nothing but that tells it
    /// from the other.
    fn fail(&self, number: usize, fails: bool) -> Result<()> {
        let status = if fails { 500 } else { 200 };
        self.servers[number].configure(&self.pods[number], 5, status)
    }

    fn load(&self, target: SocketAddr) -> Result<Report> {
        http_load(&self.client, target, 200, &["--connections", "2"])
    }

    fn failures(&self, report: &Report) -> u64 {
        report.statuses.get("500").copied().unwrap_or(0)
    }

    fn metric(&self, name: &str, service: &str, state: Option<&str>) -> Result<f64> {
        let mut labels = vec![("backend_name", service)];
        labels.extend(state.map(|it| ("endpoint_state", it)));
        Ok(self.cluster.node(0).metrics()?.sum(name, &labels))
    }

    /// How many endpoints are used, and how many are left out.
    fn left_out(&self, service: &str) -> Result<(usize, usize)> {
        let metrics = self.cluster.node(0).metrics()?;
        let labels = [("backend_name", service)];
        let states = metrics.find("weft_balancer_ejected", &labels);
        let (used, left_out): (Vec<_>, Vec<_>) = states.partition(|it| it.value == 0.0);
        Ok((used.len(), left_out.len()))
    }

    /// Asks until an endpoint is left out, and says how many requests failed meanwhile. One that was slow for a
    /// moment may have none for some seconds.
    fn load_until_ejected(&self, target: SocketAddr, service: &str) -> Result<u64> {
        let mut failed = 0;
        wait_for("an ejection", Duration::from_secs(30), || {
            failed += self.failures(&self.load(target)?);
            let ejections = self.metric("weft_balancer_ejections_total", service, None)?;
            Ok((ejections >= 1.0).then_some(()))
        })?;
        Ok(failed)
    }

    /// Waits until both serve, and nothing else happens.
    fn both_serve(&self, target: SocketAddr) -> Result<()> {
        self.both_of(target, ["one", "two"])
    }

    /// The same of endpoints with these names.
    fn both_of(&self, target: SocketAddr, names: [&str; 2]) -> Result<()> {
        wait_for("both endpoints to serve", Duration::from_secs(30), || {
            let report = self.load(target)?;
            report.expect_all("200")?;
            let shares = names.map(|name| report.share(name));
            ensure!(shares.iter().all(|it| *it > 0.1), "{shares:?}");
            Ok(Some(()))
        })
    }
}

fn in_a_row(scene: &Scene) -> Result<()> {
    const SERVICE: &str = "in-a-row";
    scene.both_serve(scene.in_a_row)?;
    scene.fail(0, true)?;
    let failed = scene.load_until_ejected(scene.in_a_row, SERVICE)?;
    // Three, one that was on its way, and a try now and then.
    ensure!((3..10).contains(&failed), "{failed} failures");
    let report = scene.load(scene.in_a_row)?;
    let failed = scene.failures(&report);
    ensure!(failed < 5, "{failed} failures: {report:?}");
    let pending = scene.metric("outbound_http_balancer_endpoints", SERVICE, Some("pending"))?;
    let (used, ejected) = scene.left_out(SERVICE)?;
    ensure!(
        pending == 1.0 && ejected == 1 && used > 0,
        "{pending} pending, {ejected} ejected, {used} not"
    );
    let dump = scene.cluster.node(0).config_dump()?.to_string();
    ensure!(dump.contains("\"standing\":\"ejected\"") || dump.contains("\"standing\":\"due\""));
    scene.fail(0, false)?;
    scene.both_serve(scene.in_a_row)?;
    let (used, ejected) = scene.left_out(SERVICE)?;
    ensure!(ejected == 0 && used > 1, "{ejected} ejected, {used} not");
    Ok(())
}

fn by_share(scene: &Scene) -> Result<()> {
    scene.both_serve(scene.by_share)?;
    scene.fail(0, true)?;
    scene.load_until_ejected(scene.by_share, "by-share")?;
    // It is left out for longer than this takes.
    let failed = scene.failures(&scene.load(scene.by_share)?);
    scene.fail(0, false)?;
    ensure!(failed == 0, "{failed} failures");
    let ejections = scene.metric("weft_balancer_ejections_total", "by-share", None)?;
    ensure!(ejections == 1.0, "{ejections} ejections");
    Ok(())
}

/// Requests one after the other, of which some fail, never two in a row: whether that is too many is a share's to say.
fn shares(scene: &Scene) -> Result<()> {
    let pod = scene.cluster.add_pod(PodSpec::new("shared").on(1))?;
    let _server = HttpServer::start(&pod, HTTP, &["--quiet"])?;
    for (mode, failing, is_ejected) in [
        ("consecutive", 3, false),
        ("unified", 1, false),
        ("unified", 3, true),
        ("success-rate", 1, false),
        ("success-rate", 3, true),
    ] {
        let name = format!("share-{mode}-{failing}");
        let mut spec = ServiceSpec::new(&name).select("app", "shared");
        for (setting, value) in [
            ("", mode),
            ("-success-rate-threshold", "0.8"),
            // However long it takes, and whatever was asked until there was an answer.
            ("-success-rate-window", "1h"),
            ("-success-rate-min-requests", "40"),
            ("-consecutive-min-penalty", "1h"),
            ("-consecutive-max-penalty", "1h"),
        ] {
            spec = spec.annotation(&format!("weft.dev/failure-accrual{setting}"), value);
        }
        let target = serving(&scene.cluster, &scene.client, &spec.port(80, HTTP), 80)?;
        let status = |number: u64| match number % 10 {
            2 | 5 | 8 if number % 10 < 3 * failing => 500,
            _ => 200,
        };
        let asked: Vec<u16> = (0..80).map(status).collect();
        let get = |status: &u16| format!("GET /status/{status} HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n");
        let requests: String = asked.iter().map(get).collect();
        let raw = raw(
            &scene.client,
            target,
            &[&requests],
            &["--half-close", "--quiet-ms", "20000"],
        )?;
        let ejections = scene.metric("weft_balancer_ejections_total", &name, None)?;
        if is_ejected {
            let served = raw.statuses.iter().take_while(|it| **it != 503).count();
            ensure!(
                ejections == 1.0 && (30..50).contains(&served),
                "{name}: {ejections} ejections, {raw:?}"
            );
            ensure!(raw.received.contains("weft-error: no_endpoint"), "{raw:?}");
        } else {
            ensure!(
                ejections == 0.0 && raw.statuses == asked,
                "{name}: {ejections} ejections, {raw:?}"
            );
        }
    }
    Ok(())
}

fn all_fail(scene: &Scene) -> Result<()> {
    scene.both_serve(scene.in_a_row)?;
    scene.fail(0, true)?;
    scene.fail(1, true)?;
    let report = scene.load(scene.in_a_row)?;
    let own = report.statuses.get("503").copied().unwrap_or(0);
    ensure!(own > 100, "{report:?}");
    let shown = curl_shop(&scene.client, scene.in_a_row, "/", &[])?;
    let by_mesh = shown.headers.iter().any(|(name, _)| name == "weft-error");
    ensure!(shown.code() == 500 || by_mesh, "{shown:?}");
    scene.fail(0, false)?;
    scene.fail(1, false)?;
    scene.both_serve(scene.in_a_row)
}

/// A call that fails is an answer with 200: its status is in the trailers.
fn calls(scene: &Scene) -> Result<()> {
    const SERVICE: &str = "calls";
    let spec = PodSpec::new("three").label("app", SERVICE).on(1);
    let pod = scene.cluster.add_pod(spec)?;
    let _server = GrpcServer::start(&pod, GRPC)?;
    let spec = ServiceSpec::new(SERVICE)
        .select("app", SERVICE)
        .port(90, GRPC);
    let spec = IN_A_ROW
        .iter()
        .fold(spec, |spec, (name, value)| spec.annotation(name, value));
    let [address, _] = scene.cluster.add_service(&spec)?;
    let target = SocketAddr::new(address, 90);
    let call = |code: &str| grpc_call(&scene.client, target, &["--code", code]);
    eventually("a call to succeed", || {
        let called = call("0")?;
        ensure!(called.code == 0, "{called:?}");
        Ok(())
    })?;
    let ejections = || scene.metric("weft_balancer_ejections_total", SERVICE, None);
    // NOT_FOUND, PERMISSION_DENIED.
    for code in ["5", "7"] {
        for _ in 0..4 {
            call(code)?;
        }
    }
    ensure!(ejections()? == 0.0, "answers that are no failures eject");
    for _ in 0..3 {
        let called = call("14")?;
        ensure!(called.code == 14, "{called:?}");
    }
    ensure!(ejections()? == 1.0, "three failures do not eject");
    // It waits until the endpoint may be tried again, and is the one that tries.
    let called = call("0")?;
    ensure!(called.code == 0 && called.elapsed_ms > 500.0, "{called:?}");
    Ok(())
}

/// As long as there is somebody else; then it is asked all the same.
fn paused(scene: &Scene) -> Result<()> {
    let cluster = &scene.cluster;
    let pod = |name| cluster.add_pod(PodSpec::new(name).label("app", "pausing").on(1));
    let (tired, fresh) = (pod("tired")?, pod("fresh")?);
    let args = ["--quiet", "--header", "retry-after: 60"];
    let tired_server = HttpServer::start(&tired, HTTP, &args)?;
    let fresh_server = HttpServer::start(&fresh, HTTP, &["--quiet"])?;
    let spec = ServiceSpec::new("pausing").select("app", "pausing");
    let spec = spec
        .annotation("weft.dev/failure-accrual", "consecutive")
        // Nothing but the pause keeps it away: it is for as long as the largest penalty, at most.
        .annotation("weft.dev/failure-accrual-consecutive-max-failures", "0")
        .annotation("weft.dev/failure-accrual-consecutive-max-penalty", "10s")
        .port(80, HTTP);
    let target = serving(cluster, &scene.client, &spec, 80)?;
    for status in [429, 503] {
        scene.both_of(target, ["tired", "fresh"])?;
        tired_server.configure(&tired, 0, status)?;
        let word = status.to_string();
        let mut asked = 0;
        wait_for("it to ask for a pause", Duration::from_secs(30), || {
            let report = scene.load(target)?;
            asked = report.statuses.get(&word).copied().unwrap_or(0);
            Ok((asked > 0).then_some(()))
        })?;
        // One on each of both connections, and one that was on its way.
        ensure!(asked < 5, "it was asked {asked} times with {status}");
        let report = scene.load(target)?;
        ensure!(report.share("fresh") > 0.999, "{status}: {report:?}");
        tired_server.configure(&tired, 0, 200)?;
    }
    tired_server.configure(&tired, 0, 429)?;
    wait_for("it to ask for a pause", Duration::from_secs(30), || {
        let report = scene.load(target)?;
        Ok(report.statuses.contains_key("429").then_some(()))
    })?;
    fresh_server.stop()?;
    cluster.remove_pod(fresh)?;
    eventually("the one that is left to be asked", || {
        let shown = curl_shop(&scene.client, target, "/", &[])?;
        ensure!(shown.code() == 429, "{shown:?}");
        Ok(())
    })
}

fn unreachable(scene: &Scene) -> Result<()> {
    const SERVICE: &str = "unreachable";
    let cluster = &scene.cluster;
    let pod = |name| cluster.add_pod(PodSpec::new(name).label("app", SERVICE).on(1));
    let (gone, there) = (pod("gone")?, pod("there")?);
    let start = |pod| HttpServer::start(pod, HTTP, &["--quiet"]);
    let (gone_server, _there_server) = (start(&gone)?, start(&there)?);
    let spec = ServiceSpec::new(SERVICE).select("app", SERVICE);
    let spec = IN_A_ROW
        .iter()
        .fold(spec, |spec, (name, value)| spec.annotation(name, value));
    let target = serving(cluster, &scene.client, &spec.port(80, HTTP), 80)?;
    scene.both_of(target, ["gone", "there"])?;
    gone_server.stop()?;
    // Nothing of a request has left when nobody takes its connection: no client notices.
    wait_for("an ejection", Duration::from_secs(60), || {
        scene.load(target)?.expect_all("200")?;
        Ok((scene.left_out(SERVICE)?.1 == 1).then_some(()))
    })?;
    let _gone_server = start(&gone)?;
    scene.both_of(target, ["gone", "there"])?;
    let (used, ejected) = scene.left_out(SERVICE)?;
    ensure!(ejected == 0 && used > 1, "{ejected} ejected, {used} not");
    Ok(())
}

/// Whose request is the one that tries an endpoint again is chance: who does not let it end, or breaks it off, must
/// not keep it from others.
fn held_up(scene: &Scene) -> Result<()> {
    const SERVICE: &str = "held-up";
    let cluster = &scene.cluster;
    let pod = cluster.add_pod(PodSpec::new(SERVICE).on(1))?;
    let other = cluster.add_pod(PodSpec::new("other").on(0))?;
    let server = HttpServer::start(&pod, HTTP, &[])?;
    let spec = ServiceSpec::new(SERVICE).select("app", SERVICE);
    let spec = IN_A_ROW
        .iter()
        .fold(spec, |spec, (name, value)| spec.annotation(name, value));
    let target = serving(cluster, &scene.client, &spec.port(80, HTTP), 80)?;
    for args in [["--max-time", "60"], ["--max-time", "0.2"]] {
        for _ in 0..3 {
            curl_shop(&scene.client, target, "/status/500", &[])?;
        }
        let before = server.requests()?.len();
        let url = format!("http://{target}/delay/60000");
        let mut holding = other.command("curl")?.args(["-sS"]).args(args);
        holding = holding.args(["--retry", "100", "--retry-delay", "1", "--retry-all-errors"]);
        let _holding = holding.arg(url).spawn()?;
        wait_for("it to be tried", Duration::from_secs(30), || {
            Ok((server.requests()?.len() > before).then_some(()))
        })?;
        // Far less than what such a request may take.
        wait_for("others to be served", Duration::from_secs(20), || {
            let shown = curl_shop(&scene.client, target, "/", &[])?;
            Ok((shown.code() == 200).then_some(()))
        })?;
    }
    Ok(())
}

/// An answer of the mesh that is about the client would not be held against the endpoint.
fn claimed(scene: &Scene) -> Result<()> {
    for (name, node, speaks) in [
        ("liar-far", 1, "both"),
        ("liar-near", 0, "both"),
        ("liar-translated-far", 1, "http1"),
        ("liar-translated-near", 0, "http1"),
    ] {
        let spec = PodSpec::new(name).label("app", name).on(node);
        let pod = scene.cluster.add_pod(spec)?;
        let claim = "weft-error: too_many_exchanges";
        let args = ["--speaks", speaks, "--header", claim];
        let _server = HttpServer::start(&pod, HTTP, &args)?;
        let spec = ServiceSpec::new(name).select("app", name).port(80, HTTP);
        let spec = IN_A_ROW
            .iter()
            .fold(spec, |spec, (name, value)| spec.annotation(name, value));
        let target = serving(&scene.cluster, &scene.client, &spec, 80)?;
        for version in ["--http1.1", "--http2-prior-knowledge"] {
            let shown = curl_shop(&scene.client, target, "/", &[version])?;
            ensure!(shown.header("weft-error").is_none(), "{shown:?}");
        }
        for _ in 0..3 {
            let version = ["--http2-prior-knowledge"];
            let shown = curl_shop(&scene.client, target, "/status/503", &version)?;
            ensure!(shown.code() == 503, "{shown:?}");
            ensure!(shown.header("weft-error").is_none(), "{shown:?}");
        }
        let ejections = scene.metric("weft_balancer_ejections_total", name, None)?;
        ensure!(ejections == 1.0, "{name}: {ejections} ejections");
    }
    Ok(())
}

/// Three failures, for 2 s.
const IN_A_ROW: [(&str, &str); 5] = [
    ("balancer.linkerd.io/failure-accrual", "consecutive"),
    (
        "balancer.linkerd.io/failure-accrual-consecutive-max-failures",
        "3",
    ),
    (
        "balancer.linkerd.io/failure-accrual-consecutive-min-penalty",
        "2s",
    ),
    (
        "balancer.linkerd.io/failure-accrual-consecutive-max-penalty",
        "4s",
    ),
    (
        "balancer.linkerd.io/failure-accrual-consecutive-jitter-ratio",
        "0",
    ),
];
const GRPC: u16 = 9090;
const HTTP: u16 = 8080;
