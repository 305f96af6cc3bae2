//! NetworkPolicies of Kubernetes, at what pods connect to: whichever way leads there, and wherever a CNI sees only the
//! tunnel's port or nothing.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use weft_tests::apps::curl_shop;
use weft_tests::command::Process;
use weft_tests::manifests::{ServiceSpec, backend, http_route};
use weft_tests::metrics::wait_for_metric;
use weft_tests::scenario::{eventually, expect_echo, expect_refusal};
use weft_tests::testapp::{self, Pulse, Server};
use weft_tests::webapp::{HttpServer, http_load};
use weft_tests::{Checks, Cluster, ClusterOptions, Pod, PodSpec};

/// A client that policies select and one that they do not, and servers: on both nodes and outside of the mesh, some of
/// the tier that may be connected to; and outside of the cluster.
struct Scene {
    client: Pod,
    free: Pod,
    /// On the client's node, on the other one, and there without the mesh.
    api: [App; 3],
    /// The same of another tier.
    other: [App; 3],
    own: Server,
    outside: [Process; 2],
    cluster: Cluster,
}

struct App {
    pod: Pod,
    http: HttpServer,
    _echo: [Server; 2],
}

#[test]
fn network_policies_of_egress() {
    run("network policies of egress", &[]);
}

/// The same between agents that speak HTTP/2 only.
#[test]
fn network_policies_of_egress_http2() {
    run(
        "network policies of egress, weft-h2",
        &["--tunnel", "weft-h2"],
    );
}

/// The same where flows of one node go by tunnels too.
#[test]
fn network_policies_of_egress_by_tunnels() {
    let scene = Scene::build(&[], &["--force-tunnels"]).expect("a cluster");
    let mut checks = Checks::new("network policies of egress, by tunnels");
    checks.check("where and to whom is let out", || rules(&scene));
    checks.finish();
}

fn run(title: &str, agent_args: &[&str]) {
    let scene = Scene::build(agent_args, &[]).expect("a cluster");
    let mut checks = Checks::new(title);
    let mut check = |name: &str, run: fn(&Scene) -> Result<()>| {
        checks.check(name, || run(&scene));
    };
    check("where and to whom is let out", rules);
    check("what is outside of the cluster", outside);
    check("endpoints that are forbidden are not chosen", endpoints);
    check("requests that are sent again", retries);
    check("mirrors", mirrors);
    check("nowhere, but to itself", nowhere);
    check("a change ends what it no longer allows", live_change);
    check("a change ends what a pod has left behind", left_behind);
    check("a change holds for the next request", next_request);
    checks.finish();
}

impl App {
    fn start(cluster: &Cluster, spec: PodSpec) -> Result<App> {
        let pod = cluster.add_pod(spec.label("shop", "all").port("main", OPEN))?;
        let echo = [
            Server::start(&pod, OPEN, "echo", &[])?,
            Server::start(&pod, SHUT, "echo", &[])?,
        ];
        let http = HttpServer::start(&pod, HTTP, &[])?;
        Ok(App {
            pod,
            http,
            _echo: echo,
        })
    }

    fn at(&self, port: u16) -> SocketAddr {
        self.pod.sockets(port)[0]
    }

    /// How many requests for a path it has seen.
    fn seen(&self, path: &str) -> Result<usize> {
        let requests = self.http.requests()?;
        Ok(requests.iter().filter(|it| it.path == path).count())
    }
}

impl Scene {
    fn build(agent_args: &[&str], controller_args: &[&str]) -> Result<Scene> {
        let owned = |args: &[&str]| args.iter().map(|it| (*it).to_owned()).collect();
        // A pod that has left is not done before a check is.
        let agent_args = [agent_args, &["--drain-deadline", "60s"]].concat();
        let cluster = Cluster::with(ClusterOptions {
            agent_args: owned(&agent_args),
            controller_args: owned(controller_args),
            ..ClusterOptions::default()
        })?;
        let client = cluster.add_pod(PodSpec::new("client").on(0))?;
        let free = cluster.add_pod(PodSpec::new("free").on(0))?;
        let tier = |tier: &str| -> Result<[App; 3]> {
            let spec = |name: &str, node| {
                PodSpec::new(&format!("{tier}-{name}"))
                    .on(node)
                    .label("tier", tier)
            };
            Ok([
                App::start(&cluster, spec("near", 0))?,
                App::start(&cluster, spec("far", 1))?,
                App::start(&cluster, spec("plain", 1).unmeshed())?,
            ])
        };
        let (api, other) = (tier("api")?, tier("other")?);
        let own = Server::start(&client, OPEN, "echo", &[])?;
        let host = || -> Result<_> {
            let program = testapp::path()?.display().to_string();
            cluster.node(1).host_command(&program)
        };
        let listen = |port: u16| format!("0.0.0.0:{port}");
        let mut web = host()?
            .named("outside")
            .args([
                "http",
                "serve",
                "--name",
                "outside",
                "--listen",
                &listen(HTTP),
            ])
            .spawn()?;
        web.wait_listening(HTTP)?;
        let mut echo = host()?
            .named("outside-echo")
            .args(["serve", "--mode", "echo", "--listen", &listen(OPEN)])
            .spawn()?;
        echo.wait_listening(OPEN)?;
        let scene = Scene {
            client,
            free,
            api,
            other,
            own,
            outside: [web, echo],
            cluster,
        };
        for app in scene.api.iter().chain(&scene.other) {
            expect_echo(&scene.client, app.at(OPEN), "before")?;
        }
        expect_echo(&scene.client, scene.outside(OPEN), "before")?;
        Ok(scene)
    }

    fn outside(&self, port: u16) -> SocketAddr {
        (IpAddr::V4(self.cluster.node(1).v4()), port).into()
    }

    /// Puts a policy for the client into force. It is told from those before by a port that nobody has.
    fn apply(&self, egress: &Value) -> Result<()> {
        static MARK: AtomicU16 = AtomicU16::new(20_001);
        let mark = MARK.fetch_add(1, Ordering::Relaxed);
        let mut marked = policy(egress);
        if let Some(rules) = marked["spec"]["egress"].as_array_mut() {
            rules.push(json!({"ports": [{"port": mark}]}));
        }
        self.cluster.apply(&marked)?;
        eventually("the policy to be in effect", || {
            let dump = self.cluster.node(0).config_dump()?.to_string();
            ensure!(dump.contains(&mark.to_string()), "{dump}");
            Ok(())
        })
    }

    /// Only the tier `api`, at two ports.
    fn only_api(&self) -> Result<()> {
        self.apply(&to_api())
    }

    /// A Service with all of the servers.
    fn service(&self, name: &str, select: [&str; 2], annotation: Option<&str>) -> Result<IpAddr> {
        let mut spec = ServiceSpec::new(name).select(select[0], select[1]);
        if let Some(retry) = annotation {
            spec = spec.annotation("weft.dev/retry-http", retry);
            spec = spec.annotation("weft.dev/retry-limit", "5");
        }
        let [address, _] = self
            .cluster
            .add_service(&spec.port(80, HTTP).port(90, OPEN))?;
        eventually("the Service to answer", || {
            let shown = curl_shop(&self.free, (address, 80).into(), "/", &[])?;
            ensure!(shown.code() == 200, "{shown:?}");
            Ok(())
        })?;
        Ok(address)
    }

    fn expect_code(&self, target: SocketAddr, path: &str, code: u16) -> Result<()> {
        let shown = curl_shop(&self.client, target, path, &[])?;
        ensure!(
            shown.code() == code,
            "{target} answers {shown:?}, not {code}"
        );
        let reason = shown.header("weft-error");
        let is_ours = reason == Some("network_policy_egress");
        ensure!(is_ours == (code == 403), "{target} answers {shown:?}");
        Ok(())
    }
}

/// By the name of a port of the servers and by number, by the labels of pods: IPv4 and IPv6, bytes and requests.
fn rules(scene: &Scene) -> Result<()> {
    scene.only_api()?;
    for family in [0, 1] {
        for app in &scene.api {
            expect_echo(&scene.client, app.pod.sockets(OPEN)[family], "let out")?;
            expect_refusal(&scene.client, app.pod.sockets(SHUT)[family], "kept in")?;
            scene.expect_code(app.pod.sockets(HTTP)[family], "/let-out", 200)?;
        }
        for app in &scene.other {
            expect_refusal(&scene.client, app.pod.sockets(OPEN)[family], "kept in")?;
            scene.expect_code(app.pod.sockets(HTTP)[family], "/kept-in", 403)?;
        }
    }
    for app in &scene.other {
        ensure!(app.seen("/kept-in")? == 0, "a request got out");
        expect_echo(&scene.free, app.at(OPEN), "not selected")?;
    }
    let node = scene.cluster.node(0);
    let labels = [
        ("pod", "client"),
        ("authz_name", "networkpolicy:default/client-out"),
    ];
    wait_for_metric(
        node,
        "weft_network_policy_egress_denied_total",
        &labels,
        12.0,
    )?;
    let labels = [("pod", "client"), ("reason", "network_policy_egress")];
    wait_for_metric(node, "weft_refused_total", &labels, 12.0)?;
    let dump = node.config_dump()?.to_string();
    ensure!(dump.contains("network_egress"), "{dump}");
    Ok(())
}

/// By networks only; and EgressNetworks count besides.
fn outside(scene: &Scene) -> Result<()> {
    scene.only_api()?;
    expect_refusal(&scene.client, scene.outside(OPEN), "kept in")?;
    scene.expect_code(scene.outside(HTTP), "/", 403)?;
    let block = format!("{}/32", scene.cluster.node(1).v4());
    scene.apply(&json!([{"to": [{"ipBlock": {"cidr": block}}]}]))?;
    expect_echo(&scene.client, scene.outside(OPEN), "let out")?;
    scene.expect_code(scene.outside(HTTP), "/", 200)?;
    scene.expect_code(scene.api[1].at(HTTP), "/", 403)?;
    let network = json!({"apiVersion": "policy.weft.dev/v1alpha1", "kind": "EgressNetwork",
        "metadata": {"name": "outside", "namespace": "default"}, "spec": {"trafficPolicy": "Deny"}});
    scene.cluster.apply(&network)?;
    eventually("the EgressNetwork to count besides", || {
        let shown = curl_shop(&scene.client, scene.outside(HTTP), "/", &[])?;
        let reason = shown.header("weft-error");
        ensure!(reason == Some("egress_denied"), "{shown:?}");
        Ok(())
    })?;
    scene.cluster.remove(&network)?;
    let except = json!({"cidr": "0.0.0.0/0", "except": [block]});
    scene.apply(
        &json!([{"to": [{"ipBlock": except}], "ports": [{"port": OPEN}, {"port": HTTP}]}]),
    )?;
    expect_refusal(&scene.client, scene.outside(OPEN), "kept in")?;
    expect_echo(&scene.client, scene.other[1].at(OPEN), "let out").map(drop)
}

/// Of the endpoints of a Service only those are drawn to which the pod may connect: six, of which two or one are.
fn endpoints(scene: &Scene) -> Result<()> {
    let service = scene.service("mixed", ["shop", "all"], None)?;
    scene.only_api()?;
    let report = http_load(
        &scene.client,
        (service, 80).into(),
        200,
        &["--connections", "4"],
    )?;
    report.expect_all("200")?;
    let share: f64 = scene.api.iter().map(|it| report.share(it.pod.name())).sum();
    ensure!(share == 1.0, "{report:?}");
    let only = &scene.api[1];
    scene.apply(&json!([{"to": [{"podSelector": {"matchLabels": {"app": only.pod.name()}}}]}]))?;
    // More often than a flow draws endpoints that it may not connect to.
    for _ in 0..20 {
        expect_echo(&scene.client, (service, 90).into(), "the only one")?;
        scene.expect_code((service, 80).into(), "/the-only-one", 200)?;
    }
    ensure!(only.seen("/the-only-one")? == 20);
    let nobody = json!({"podSelector": {"matchLabels": {"app": "nobody"}}});
    scene.apply(&json!([{"to": [nobody]}]))?;
    expect_refusal(&scene.client, (service, 90).into(), "kept in")?;
    scene.expect_code((service, 80).into(), "/kept-in-too", 403)?;
    for app in scene.api.iter().chain(&scene.other) {
        ensure!(app.seen("/kept-in-too")? == 0, "a request got out");
    }
    Ok(())
}

/// A second try goes no further than the first.
fn retries(scene: &Scene) -> Result<()> {
    let service = scene.service("again", ["shop", "all"], Some("5xx"))?;
    let [near, ..] = &scene.api;
    scene.apply(&json!([{"to": [{"podSelector": {"matchLabels": {"app": near.pod.name()}}}]}]))?;
    near.http.configure_some(&near.pod, 0, 500, 1)?;
    scene.expect_code((service, 80).into(), "/again", 200)?;
    ensure!(near.seen("/again")? == 2, "it was sent elsewhere");
    for app in scene.api[1..].iter().chain(&scene.other) {
        ensure!(
            app.seen("/again")? == 0,
            "it was sent to {}",
            app.pod.name()
        );
    }
    // More tries than there are endpoints that it may be sent to: each is asked again, and nobody else is asked.
    scene.only_api()?;
    for app in &scene.api {
        app.http.configure(&app.pod, 0, 503)?;
    }
    for number in 0..3 {
        let path = format!("/again-{number}");
        scene.expect_code((service, 80).into(), &path, 503)?;
        let seen =
            |apps: &[App]| -> Result<Vec<usize>> { apps.iter().map(|it| it.seen(&path)).collect() };
        let (api, other) = (seen(&scene.api)?, seen(&scene.other)?);
        ensure!(other == [0; 3], "{path} got out: {other:?}, {api:?}");
        let all = api.iter().all(|it| *it > 0);
        ensure!(all && api.iter().sum::<usize>() == 6, "{path}: {api:?}");
        // The budget has ten in each second.
        std::thread::sleep(Duration::from_secs(1));
    }
    for app in &scene.api {
        app.http.configure(&app.pod, 0, 200)?;
    }
    Ok(())
}

fn mirrors(scene: &Scene) -> Result<()> {
    let [_, api, _] = &scene.api;
    let [_, other, _] = &scene.other;
    let service = scene.service("mirrored", ["app", api.pod.name()], None)?;
    scene.service("copies", ["app", other.pod.name()], None)?;
    let rules = json!([{
        "filters": [{"type": "RequestMirror",
            "requestMirror": {"backendRef": {"name": "copies", "port": 80}}}],
        "backendRefs": [backend("mirrored", 80, 1)],
    }]);
    scene
        .cluster
        .apply(&http_route("default", "mirrored", "mirrored", 80, &rules))?;
    scene.apply(&json!([{}]))?;
    eventually("a copy", || {
        scene.expect_code((service, 80).into(), "/copied", 200)?;
        ensure!(other.seen("/copied")? > 0, "none yet");
        Ok(())
    })?;
    scene.only_api()?;
    let node = scene.cluster.node(0);
    let labels = [("pod", "client"), ("reason", "network_policy_egress")];
    let before = node.metrics()?.sum("weft_refused_total", &labels);
    for _ in 0..5 {
        scene.expect_code((service, 80).into(), "/not-copied", 200)?;
    }
    wait_for_metric(node, "weft_refused_total", &labels, before + 5.0)?;
    ensure!(other.seen("/not-copied")? == 0, "a copy got out");
    Ok(())
}

/// Nobody asks about what stays in the pod: by its own address, or its own Service.
fn nowhere(scene: &Scene) -> Result<()> {
    let service = ServiceSpec::new("own")
        .select("app", "client")
        .port(90, OPEN);
    let [own, _] = scene.cluster.add_service(&service)?;
    scene.apply(&json!([]))?;
    for app in &scene.api {
        expect_refusal(&scene.client, app.at(OPEN), "kept in")?;
    }
    let before = scene.own.accepted()?.len();
    for target in [scene.client.sockets(OPEN)[0], (own, 90).into()] {
        eventually("the pod to reach itself", || {
            expect_echo(&scene.client, target, "myself").map(drop)
        })?;
    }
    ensure!(scene.own.accepted()?.len() >= before + 2);
    Ok(())
}

fn live_change(scene: &Scene) -> Result<()> {
    scene.apply(&json!([{}]))?;
    let others = scene.other.iter().map(|it| it.at(OPEN));
    let shut: Vec<_> = others.chain([scene.outside(OPEN)]).collect();
    let pulses = |pod: &Pod, targets: &[SocketAddr]| -> Result<Vec<(SocketAddr, Pulse)>> {
        let targets = targets.iter();
        targets
            .map(|it| Ok((*it, Pulse::start(pod, *it)?)))
            .collect()
    };
    let mut ended = pulses(&scene.client, &shut)?;
    let open: Vec<_> = scene.api.iter().map(|it| it.at(OPEN)).collect();
    let mut kept = pulses(&scene.client, &open)?;
    kept.extend(pulses(&scene.client, &[scene.client.sockets(OPEN)[0]])?);
    kept.extend(pulses(&scene.free, &shut)?);
    scene.cluster.apply(&policy(&to_api()))?;
    for (target, pulse) in &mut ended {
        let end = pulse.wait_broken(Duration::from_secs(20))?;
        ensure!(end.outcome == "reset", "{target}: {end:?}");
    }
    for (target, pulse) in kept {
        let end = pulse.stop()?;
        ensure!(end.outcome == "ok" && end.pulses > 1, "{target}: {end:?}");
    }
    let labels = [("reason", "policy_changed"), ("pod", "client")];
    wait_for_metric(scene.cluster.node(0), "weft_refused_total", &labels, 4.0).map(drop)
}

/// What a pod has open goes on for a while when another takes its place, and is its policy's as before.
fn left_behind(scene: &Scene) -> Result<()> {
    scene.apply(&json!([{}]))?;
    let node = scene.cluster.node(0);
    let labels = [("reason", "policy_changed"), ("pod", "client")];
    let before = node.metrics()?.sum("weft_refused_total", &labels);
    let targets = [
        scene.other[0].at(OPEN),
        scene.other[1].at(OPEN),
        scene.outside(OPEN),
    ];
    let pulses = targets.iter().map(|it| Pulse::start(&scene.client, *it));
    let pulses: Vec<Pulse> = pulses.collect::<Result<_>>()?;
    let mut another = scene.client.manifest();
    let uid = "00000000-0000-4000-8000-0000000000ff";
    another["metadata"]["uid"] = uid.into();
    scene.cluster.apply(&another)?;
    eventually("the other pod to be enrolled", || {
        let dump = node.config_dump()?;
        let pods = dump["pods"].as_array().map_or(&[][..], Vec::as_slice);
        let is_there = |it: &Value| it["uid"] == uid && it["state"] == "enrolled";
        ensure!(pods.iter().any(is_there), "{pods:?}");
        Ok(())
    })?;
    scene.cluster.apply(&policy(&to_api()))?;
    for (mut pulse, target) in pulses.into_iter().zip(targets) {
        let end = pulse.wait_broken(Duration::from_secs(20))?;
        ensure!(end.outcome == "reset", "{target}: {end:?}");
    }
    wait_for_metric(node, "weft_refused_total", &labels, before + 3.0)?;
    expect_echo(&scene.client, scene.api[0].at(OPEN), "the other pod").map(drop)
}

/// On a connection that was kept, and of an answer that has begun.
fn next_request(scene: &Scene) -> Result<()> {
    let outside = scene.outside(HTTP);
    let others = scene.other.iter().map(|it| (it.at(HTTP), Some(it)));
    for (target, app) in others.chain([(outside, None)]) {
        scene.apply(&json!([{}]))?;
        scene.expect_code(target, "/x", 200)?;
        let long = "/stream?chunks=400&interval=50&bytes=10";
        let seen = || match app {
            Some(app) => app.seen(long),
            None => Ok(scene.outside[0].stdout().matches(long).count()),
        };
        let before = seen()?;
        let stream = std::thread::scope(|scope| {
            let stream = scope.spawn(|| curl_shop(&scene.client, target, long, &[]));
            eventually("the answer to have begun", || {
                ensure!(seen()? > before, "not yet");
                Ok(())
            })?;
            scene.cluster.apply(&policy(&to_api()))?;
            let stream = stream.join();
            stream.map_err(|_| anyhow::anyhow!("a thread failed"))?
        })?;
        ensure!(
            stream.code() == 200 && stream.exit != 0,
            "{target}: {stream:?}"
        );
        scene.expect_code(target, "/x", 403)?;
    }
    Ok(())
}

fn to_api() -> Value {
    json!([{
        "to": [{"podSelector": {"matchLabels": {"tier": "api"}}}],
        "ports": [{"port": "main"}, {"port": HTTP}],
    }])
}

fn policy(egress: &Value) -> Value {
    json!({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": "client-out", "namespace": "default"},
        "spec": {"podSelector": {"matchLabels": {"app": "client"}},
            "policyTypes": ["Egress"], "egress": egress}})
}

const OPEN: u16 = 7200;
const SHUT: u16 = 7201;
const HTTP: u16 = 7202;
