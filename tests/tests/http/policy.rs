//! Who may ask: refusals of HTTP are answers, are counted, and reach no application.

use anyhow::{Result, ensure};
use serde_json::json;
use weft_tests::apps::{Shown, curl_shop};
use weft_tests::manifests::{authorization, server};
use weft_tests::metrics::wait_for_metric;
use weft_tests::scenario::eventually;
use weft_tests::webapp::{
    GrpcServer, HttpLoad, HttpServer, grpc_call, raw, websocket_echo, websocket_server,
};
use weft_tests::{Checks, Cluster, Pod, PodSpec};

use crate::stage::{UPGRADE, switched};

/// A caller that may, one that may not, on both nodes, one outside of the mesh, and whom they call.
struct Scene {
    friend: Pod,
    /// Of the same account, on the server's node.
    near_friend: Pod,
    other: Pod,
    neighbour: Pod,
    plain: Pod,
    api: Pod,
    http: HttpServer,
    _grpc: GrpcServer,
    cluster: Cluster,
}

#[test]
fn http_policy() {
    let scene = Scene::build().expect("a cluster");
    let mut checks = Checks::new("http policy");
    let mut check = |name: &str, run: fn(&Scene) -> Result<()>| {
        checks.check(name, || run(&scene));
    };
    check("who may not is told so, and reaches nobody", requests);
    check("calls", calls);
    check("a change ends what it no longer allows", live_change);
    check("a WebSocket does not outlive its permission", upgraded);
    checks.finish();
}

impl Scene {
    fn build() -> Result<Scene> {
        let cluster = Cluster::start()?;
        let add = |spec| cluster.add_pod(spec);
        let friend = add(PodSpec::new("friend").on(0))?;
        let near_friend = PodSpec::new("near-friend").on(1).service_account("friend");
        let near_friend = add(near_friend)?;
        let other = add(PodSpec::new("other").on(0))?;
        let neighbour = add(PodSpec::new("neighbour").on(1))?;
        let plain = add(PodSpec::new("plain").on(0).unmeshed())?;
        let api = add(PodSpec::new("api").on(1))?;
        let (http, grpc) = (
            HttpServer::start(&api, HTTP, &[])?,
            GrpcServer::start(&api, GRPC)?,
        );
        for (name, port, protocol) in [
            ("http", HTTP, "HTTP/1"),
            ("grpc", GRPC, "gRPC"),
            ("websocket", WEBSOCKET, "HTTP/1"),
        ] {
            let mut declared = server("default", name, "api", port);
            declared["spec"]["proxyProtocol"] = json!(protocol);
            cluster.apply(&declared)?;
            cluster.apply(&authorization("default", name, name, &["friend"]))?;
        }
        let scene = Scene {
            friend,
            near_friend,
            other,
            neighbour,
            plain,
            api,
            http,
            _grpc: grpc,
            cluster,
        };
        eventually("the policy to be in effect", || {
            scene.expect_denied_at(&scene.other, "/early")
        })?;
        Ok(scene)
    }

    fn ask(&self, pod: &Pod, path: &str) -> Result<Shown> {
        curl_shop(pod, self.api.sockets(HTTP)[0], path, &[])
    }

    fn expect_denied(&self, pod: &Pod) -> Result<()> {
        self.expect_denied_at(pod, "/denied")
    }

    fn expect_denied_at(&self, pod: &Pod, path: &str) -> Result<()> {
        let shown = self.ask(pod, path)?;
        ensure!(is_denied(&shown), "{} got {shown:?}", pod.name());
        Ok(())
    }
}

/// A 403 by HTTP, or no connection: refused (7), no answer (52), reset (56).
fn is_denied(shown: &Shown) -> bool {
    shown.code() == 403 || (shown.code() == 0 && [7, 52, 56].contains(&shown.exit))
}

fn requests(scene: &Scene) -> Result<()> {
    for path in ["/allowed", "/allowed?again"] {
        let shown = scene.ask(&scene.friend, path)?;
        ensure!(shown.code() == 200, "{shown:?}");
    }
    for pod in [&scene.other, &scene.neighbour, &scene.plain] {
        for _ in 0..3 {
            scene.expect_denied(pod)?;
        }
    }
    let seen = scene.http.requests()?;
    ensure!(
        seen.iter().all(|it| it.path != "/denied"),
        "a denied request reached the application"
    );
    let identity = scene.other.identity();
    let labels = [("client_id", identity.as_str()), ("direction", "inbound")];
    eventually("the refusals to be counted", || {
        let metrics = scene.cluster.node(1).metrics()?;
        let denied = metrics.sum("inbound_tcp_authz_deny_total", &labels);
        ensure!(
            denied >= 3.0,
            "{denied} were counted:\n{}",
            metrics.show("authz")
        );
        Ok(())
    })?;
    let identity = scene.friend.identity();
    let labels = [
        ("client_id", identity.as_str()),
        ("authz_name", "http"),
        ("srv_name", "http"),
    ];
    wait_for_metric(
        scene.cluster.node(1),
        "inbound_tcp_authz_allow_total",
        &labels,
        1.0,
    )
    .map(drop)
}

fn calls(scene: &Scene) -> Result<()> {
    let target = scene.api.sockets(GRPC)[0];
    let called = grpc_call(&scene.friend, target, &[])?;
    ensure!(called.code == 0, "{called:?}");
    for pod in [&scene.other, &scene.neighbour, &scene.plain] {
        let called = grpc_call(pod, target, &[])?;
        // PERMISSION_DENIED; or no connection, for which tonic has two statuses of its own.
        let no_connection = called.code == 14 || called.message == "transport error";
        ensure!(
            called.code == 7 || no_connection,
            "{} got {called:?}",
            pod.name()
        );
    }
    Ok(())
}

/// Requests that go on are refused from then on, also on a connection that was there before.
fn live_change(scene: &Scene) -> Result<()> {
    let target = scene.api.sockets(HTTP)[0];
    let load = HttpLoad::start(&scene.friend, target, &["--pause-ms", "10"])?;
    scene.cluster.apply(&authorization(
        "default",
        "http",
        "http",
        &["somebody-else"],
    ))?;
    eventually("the friend to be refused", || {
        scene.expect_denied(&scene.friend)
    })?;
    let before = scene.http.requests()?.len();
    scene.expect_denied(&scene.friend)?;
    let report = load.stop()?;
    ensure!(
        scene.http.requests()?.len() == before,
        "the application was still asked"
    );
    ensure!(
        report.statuses.contains_key("403") || !report.failures.is_empty(),
        "{report:?}"
    );
    scene
        .cluster
        .apply(&authorization("default", "http", "http", &["friend"]))?;
    eventually("the friend to be allowed again", || {
        let shown = scene.ask(&scene.friend, "/again")?;
        ensure!(shown.code() == 200, "{shown:?}");
        Ok(())
    })
}

/// What the connection was let in for is long over when the permission ends; what it became ends with it, on both
/// sides, and another client's goes on.
fn upgraded(scene: &Scene) -> Result<()> {
    let server = websocket_server(&scene.api, WEBSOCKET)?;
    let target = scene.api.sockets(WEBSOCKET)[0];
    let allow = |account| authorization("default", "websocket", "websocket", &[account]);
    for friend in [&scene.friend, &scene.near_friend] {
        let account = friend.name();
        eventually("the friend to be let in", || {
            let echoed = websocket_echo(friend, target, &["--messages", "2"])?;
            ensure!(echoed.outcome == "ok", "{account}: {echoed:?}");
            Ok(())
        })?;
        let closed = || server.stdout().matches("closed").count();
        let before = (closed(), switched(&scene.cluster)?);
        let raw = std::thread::scope(|scope| {
            let upgraded =
                scope.spawn(|| raw(friend, target, &[UPGRADE], &["--quiet-ms", "20000"]));
            eventually("the upgrade to have begun", || {
                let now = switched(&scene.cluster)?;
                ensure!(now > before.1, "{now} upgrades");
                Ok(())
            })?;
            scene.cluster.apply(&allow("somebody-else"))?;
            upgraded
                .join()
                .map_err(|_| anyhow::anyhow!("a thread failed"))?
        })?;
        ensure!(raw.statuses == [101], "{account}: {raw:?}");
        ensure!(raw.outcome != "quiet", "{account}'s goes on: {raw:?}");
        eventually("the server's side to end", || {
            ensure!(closed() > before.0, "{account}: it goes on");
            Ok(())
        })?;
        scene.cluster.apply(&allow("friend"))?;
    }
    Ok(())
}

const HTTP: u16 = 8080;
const GRPC: u16 = 9090;
const WEBSOCKET: u16 = 8091;
