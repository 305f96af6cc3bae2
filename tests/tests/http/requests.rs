//! Who may make which requests: policy for routes of a Server, on every way in.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use weft_tests::apps::{Shown, curl_shop};
use weft_tests::command::Process;
use weft_tests::hbone::Attempt;
use weft_tests::manifests::{authorization, server};
use weft_tests::metrics::wait_for_metric;
use weft_tests::pki::Authority;
use weft_tests::scenario::{eventually, expect_refusal};
use weft_tests::webapp::{
    GrpcServer, HttpServer, Raw, grpc_call, raw, websocket_echo, websocket_server,
};
use weft_tests::{Checks, Cluster, ClusterOptions, Pod, PodSpec};

use crate::stage::{UPGRADE, switched};

/// Callers on both nodes and one outside of the mesh, and whom they call.
struct Scene {
    /// Has the Server's own policy, on the other node.
    friend: Pod,
    /// Has a route's, on the other node.
    reader: Pod,
    /// The same on the server's node.
    near: Pod,
    /// Has nothing.
    other: Pod,
    plain: Pod,
    api: Pod,
    http: HttpServer,
    _grpc: GrpcServer,
    _websocket: Process,
    cluster: Cluster,
}

#[test]
fn requests_by_route() {
    run("requests by route", &[]);
}

/// The same between agents that speak HTTP/2 only.
#[test]
fn requests_by_route_http2() {
    run("requests by route, weft-h2", &["--tunnel", "weft-h2"]);
}

fn run(title: &str, agent_args: &[&str]) {
    let scene = Scene::build(agent_args).expect("a cluster");
    let mut checks = Checks::new(title);
    let mut check = |name: &str, run: fn(&Scene) -> Result<()>| {
        checks.check(name, || run(&scene));
    };
    check("a request is decided by its route", by_route);
    check("clients outside of the mesh", plain);
    check("HBONE", hbone);
    check("what a server may read in another way", odd_paths);
    check("calls", calls);
    check("what is no request", bytes);
    check("filters", filters);
    check("what is counted", counted);
    check("limits", limits);
    check("a change ends streams and upgrades", live_change);
    check("a change holds for the next request", next_request);
    check(
        "changes end what began while there were no routes",
        unrouted,
    );
    checks.finish();
}

impl Scene {
    fn build(agent_args: &[&str]) -> Result<Scene> {
        let cluster = Cluster::with(ClusterOptions {
            agent_args: agent_args.iter().map(|it| (*it).to_owned()).collect(),
            ..ClusterOptions::default()
        })?;
        let add = |spec| cluster.add_pod(spec);
        let friend = add(PodSpec::new("friend").on(0))?;
        let reader = add(PodSpec::new("reader").on(0))?;
        let near = add(PodSpec::new("near").on(1))?;
        let other = add(PodSpec::new("other").on(0))?;
        let plain = add(PodSpec::new("plain").on(0).unmeshed())?;
        let api = add(PodSpec::new("api").on(1))?;
        let http = HttpServer::start(&api, HTTP, &[])?;
        let grpc = GrpcServer::start(&api, GRPC)?;
        let websocket = websocket_server(&api, WEBSOCKET)?;
        for (name, port) in [("http", HTTP), ("grpc", GRPC), ("websocket", WEBSOCKET)] {
            let mut looked_into = server("default", name, "api", port);
            looked_into["spec"]["proxyProtocol"] = json!("unknown");
            cluster.apply(&looked_into)?;
            cluster.apply(&authorization("default", name, name, &["friend"]))?;
        }
        cluster.apply(&prefix_route("public", "http", "/stream", &json!([])))?;
        let moved = json!([{"type": "RequestRedirect",
            "requestRedirect": {"hostname": "elsewhere", "port": 81, "statusCode": 301}}]);
        cluster.apply(&prefix_route("moved", "http", "/moved", &moved))?;
        let marked = json!([
            {"type": "RequestHeaderModifier", "requestHeaderModifier":
                {"set": [{"name": "x-marked", "value": "yes"}]}},
            {"type": "ResponseHeaderModifier", "responseHeaderModifier":
                {"set": [{"name": "x-answered", "value": "yes"}]}},
        ]);
        cluster.apply(&prefix_route("marked", "http", "/marked", &marked))?;
        cluster.apply(&prefix_route("admin", "http", "/admin", &json!([])))?;
        cluster.apply(&prefix_route("chat", "websocket", "/chat", &json!([])))?;
        cluster.apply(&grpc_route("echo", "grpc"))?;
        cluster.apply(&readers())?;
        for route in ["public", "moved", "marked", "chat"] {
            cluster.apply(&open("HTTPRoute", route, "readers"))?;
        }
        cluster.apply(&open("GRPCRoute", "echo", "readers"))?;
        let scene = Scene {
            friend,
            reader,
            near,
            other,
            plain,
            api,
            http,
            _grpc: grpc,
            _websocket: websocket,
            cluster,
        };
        for pod in [&scene.friend, &scene.reader, &scene.near] {
            eventually("the policy to be in effect", || {
                scene.expect(pod, "/stream", 200)?;
                scene.expect(pod, "/elsewhere", 404).map(drop)
            })?;
        }
        Ok(scene)
    }

    fn ask(&self, pod: &Pod, path: &str) -> Result<Shown> {
        curl_shop(pod, self.api.sockets(HTTP)[0], path, &["--path-as-is"])
    }

    fn expect(&self, pod: &Pod, path: &str, code: u16) -> Result<Shown> {
        let shown = self.ask(pod, path)?;
        let name = pod.name();
        ensure!(
            shown.code() == code,
            "{name} got {shown:?} for {path}, not {code}"
        );
        Ok(shown)
    }

    /// It may not even connect: a 403 by its own agent, or no connection.
    fn expect_shut_out(&self, pod: &Pod, path: &str) -> Result<()> {
        let shown = self.ask(pod, path)?;
        let is_shut_out = shown.code() == 403 || (shown.code() == 0 && shown.exit != 28);
        ensure!(is_shut_out, "{} got {shown:?}", pod.name());
        Ok(())
    }

    /// How many requests for a path the application has seen.
    fn seen(&self, path: &str) -> Result<usize> {
        let requests = self.http.requests()?;
        Ok(requests.iter().filter(|it| it.path == path).count())
    }

    /// How many upgrades clients have got.
    fn readers(&self) -> [&Pod; 2] {
        [&self.reader, &self.near]
    }
}

fn by_route(scene: &Scene) -> Result<()> {
    for _ in 0..2 {
        for pod in scene.readers() {
            scene.expect(pod, "/stream?chunks=1", 200)?;
            let denied = scene.expect(pod, "/admin/x", 403)?;
            ensure!(denied.header("weft-error") == Some("denied"), "{denied:?}");
            let none = scene.expect(pod, "/streams", 404)?;
            ensure!(none.header("weft-error") == Some("no_rule"), "{none:?}");
        }
        for path in ["/stream?chunks=1", "/admin/x"] {
            scene.expect(&scene.friend, path, 200)?;
        }
        scene.expect(&scene.friend, "/streams", 404)?;
        scene.expect_shut_out(&scene.other, "/stream")?;
    }
    let seen = scene.http.requests()?;
    let stray = seen
        .iter()
        .find(|it| it.path == "/streams" || it.path == "/denied");
    ensure!(stray.is_none(), "the application was asked: {stray:?}");
    let admin = seen.iter().filter(|it| it.path == "/admin/x").count();
    ensure!(
        admin == 2,
        "the application was asked {admin} times by the friend"
    );
    Ok(())
}

/// Open to everybody from the cluster: a network is all that is known of who has no identity.
fn plain(scene: &Scene) -> Result<()> {
    let network = json!({"apiVersion": "policy.weft.dev/v1alpha1", "kind": "NetworkAuthentication",
        "metadata": {"name": "anywhere", "namespace": "default"},
        "spec": {"networks": [{"cidr": "0.0.0.0/0"}]}});
    scene.cluster.apply(&network)?;
    let mut policy = open("HTTPRoute", "public", "nobody");
    policy["metadata"]["name"] = json!("strangers");
    policy["spec"]["requiredAuthenticationRefs"] =
        json!([{"kind": "NetworkAuthentication", "name": "anywhere"}]);
    scene.cluster.apply(&policy)?;
    eventually("strangers to be let in", || {
        scene
            .expect(&scene.plain, "/stream?chunks=1", 200)
            .map(drop)
    })?;
    scene.expect(&scene.plain, "/admin/x", 403)?;
    scene.expect(&scene.plain, "/elsewhere", 404)?;
    scene.expect(&scene.other, "/stream?chunks=1", 200)?;
    scene.cluster.remove(&policy)?;
    eventually("strangers to be shut out", || {
        let shown = scene.ask(&scene.plain, "/stream?chunks=1")?;
        ensure!(shown.code() != 200, "{shown:?}");
        Ok(())
    })
}

fn hbone(scene: &Scene) -> Result<()> {
    let target = scene.api.sockets(HTTP)[0];
    let authority = Authority::of_cluster(scene.cluster.controller()?.ca_dir())?;
    for (path, status) in [
        ("/stream?chunks=1", "200"),
        ("/admin/x", "403"),
        ("/x", "404"),
    ] {
        let request = format!("GET {path} HTTP/1.1\r\nHost: shop\r\nConnection: close\r\n\r\n");
        let identity = authority.sign(&scene.reader.identity())?;
        let attempt = Attempt::hbone(target, identity).sending(request.as_bytes());
        let answer = attempt.run(scene.cluster.node(0).netns())?;
        let text = String::from_utf8_lossy(&answer.received).into_owned();
        let expected = format!("HTTP/1.1 {status} ");
        ensure!(text.starts_with(&expected), "{path}: {text}");
    }
    Ok(())
}

fn odd_paths(scene: &Scene) -> Result<()> {
    for pod in scene.readers() {
        for path in [
            "/stream/../admin/x",
            "/stream/%2e%2e/admin/x",
            "/stream/..%2fadmin/x",
            "/stream/..;/admin/x",
            "/stream/../admin/..;/stream/x",
            "/stream/..%2felsewhere",
        ] {
            scene.expect(pod, path, 404)?;
        }
        for path in ["//admin/x", "/%61dmin/x", "/admin;y/x", "/%5cadmin/x"] {
            scene.expect(pod, path, 403)?;
        }
    }
    Ok(())
}

fn calls(scene: &Scene) -> Result<()> {
    let target = scene.api.sockets(GRPC)[0];
    for pod in [&scene.reader, &scene.near, &scene.friend] {
        let called = grpc_call(pod, target, &[])?;
        ensure!(called.code == 0, "{} got {called:?}", pod.name());
    }
    let denied = grpc_call(&scene.other, target, &[])?;
    ensure!(denied.code != 0, "{denied:?}");
    closed_method(scene)?;
    // No call, and so no GRPCRoute's.
    for pod in scene.readers() {
        let shown = curl_shop(
            pod,
            target,
            "/weft.test.Echo/Unary",
            &["--http2-prior-knowledge"],
        )?;
        ensure!(shown.code() == 404, "{shown:?}");
    }
    Ok(())
}

/// A method with a route of its own, which only the Server's policy opens.
fn closed_method(scene: &Scene) -> Result<()> {
    let target = scene.api.sockets(GRPC)[0];
    let mut route = grpc_route("closed", "grpc");
    route["spec"]["rules"] = json!([{"matches": [
        {"method": {"service": "weft.test.v1.Echo", "method": "Expand"}}]}]);
    scene.cluster.apply(&route)?;
    for pod in scene.readers() {
        let denied = || {
            let denied = grpc_call(pod, target, &["--kind", "expand"])?;
            ensure!(denied.code == 7, "{} got {denied:?}", pod.name());
            let told = ("weft-error".to_owned(), "denied".to_owned());
            ensure!(denied.details.contains(&told), "{denied:?}");
            Ok(())
        };
        eventually("the method to be closed", denied)?;
        // The first may have been let in, and ended by the change, which is no denial that counts.
        denied()?;
        let called = grpc_call(pod, target, &[])?;
        ensure!(called.code == 0, "{} got {called:?}", pod.name());
        let identity = pod.identity();
        let labels = [
            ("client_id", identity.as_str()),
            ("srv_name", "grpc"),
            ("route_kind", "GRPCRoute"),
            ("route_name", "closed"),
        ];
        let node = scene.cluster.node(1);
        wait_for_metric(node, "inbound_http_authz_deny_total", &labels, 1.0)?;
    }
    let called = grpc_call(&scene.friend, target, &["--kind", "expand"])?;
    ensure!(called.code == 0, "the friend got {called:?}");
    Ok(())
}

/// Routes let in requests; whoever says something else needs the Server's own policy.
fn bytes(scene: &Scene) -> Result<()> {
    for port in [HTTP, WEBSOCKET] {
        for pod in scene.readers() {
            let target = scene.api.sockets(port)[0];
            let raw: Raw = raw(pod, target, &["\\x00\\x01 no request\\r\\n"], &[])?;
            ensure!(raw.received.is_empty(), "{} got {raw:?}", pod.name());
            ensure!(raw.outcome != "quiet", "{} was let in: {raw:?}", pod.name());
        }
    }
    expect_refusal(&scene.other, scene.api.sockets(HTTP)[0], "no request").map(drop)
}

fn filters(scene: &Scene) -> Result<()> {
    for pod in scene.readers() {
        let moved = scene.expect(pod, "/moved/x", 301)?;
        let location = moved.header("location");
        ensure!(location == Some("http://elsewhere:81/moved/x"), "{moved:?}");
        let marked = scene.expect(pod, "/marked", 200)?;
        ensure!(marked.header("x-answered") == Some("yes"), "{marked:?}");
        ensure!(marked.body.contains("x-marked"), "{marked:?}");
    }
    scene.expect_shut_out(&scene.other, "/moved/x")?;
    let seen = scene.http.requests()?;
    ensure!(
        seen.iter().all(|it| !it.path.starts_with("/moved")),
        "asked about what has moved"
    );
    Ok(())
}

fn counted(scene: &Scene) -> Result<()> {
    let node = scene.cluster.node(1);
    for pod in scene.readers() {
        let identity = pod.identity();
        let labels = |route: &'static str| {
            [
                ("client_id", identity.as_str()),
                ("srv_name", "http"),
                ("route_name", route),
            ]
        };
        let [client, server, route] = labels("public");
        let allowed = [client, server, route, ("authz_name", "public")];
        wait_for_metric(node, "inbound_http_authz_allow_total", &allowed, 2.0)?;
        wait_for_metric(node, "inbound_http_authz_deny_total", &labels("admin"), 2.0)?;
        wait_for_metric(
            node,
            "inbound_http_route_not_found_total",
            &[client, server],
            2.0,
        )?;
    }
    Ok(())
}

/// Each client has its own rate, whatever way it comes; and what is above hears when to come again.
fn limits(scene: &Scene) -> Result<()> {
    let policy = json!({"apiVersion": "policy.linkerd.io/v1alpha1",
        "kind": "HTTPLocalRateLimitPolicy",
        "metadata": {"name": "slowly", "namespace": "default"},
        "spec": {"targetRef": {"group": "policy.weft.dev", "kind": "Server", "name": "http"},
            "identity": {"requestsPerSecond": 2}}});
    scene.cluster.apply(&policy)?;
    for pod in scene.readers() {
        let target = scene.api.sockets(HTTP)[0];
        let get = "GET /stream?chunks=1&interval=1 HTTP/1.1\\r\\nHost: shop\\r\\n\\r\\n";
        let burst = get.repeat(12);
        eventually("the limit to be in effect", || {
            let raw = raw(pod, target, &[&burst], &["--half-close"])?;
            let count = |code: u16| raw.statuses.iter().filter(|it| **it == code).count();
            let name = pod.name();
            ensure!(raw.statuses.len() == 12, "{name}: {raw:?}");
            // Bursts before this one may have left nothing.
            ensure!(
                count(429) >= 6 && count(200) + count(429) == 12,
                "{name}: {raw:?}"
            );
            ensure!(raw.received.contains("retry-after: 1"), "{name}: {raw:?}");
            ensure!(
                raw.received.contains("weft-error: rate_limited"),
                "{name}: {raw:?}"
            );
            Ok(())
        })?;
        let identity = pod.identity();
        let labels = [
            ("client_id", identity.as_str()),
            ("ratelimit_name", "slowly"),
            ("ratelimit_scope", "identity"),
        ];
        let node = scene.cluster.node(1);
        wait_for_metric(node, "inbound_http_local_ratelimit_total", &labels, 6.0)?;
    }
    scene.cluster.remove(&policy)?;
    eventually("the limit to be gone", || {
        for _ in 0..6 {
            scene.expect(&scene.reader, "/stream?chunks=1", 200)?;
        }
        Ok(())
    })
}

/// Streams and upgrades that a route allowed end when it no longer does; others go on.
fn live_change(scene: &Scene) -> Result<()> {
    for pod in scene.readers() {
        let echoed = websocket_echo(pod, scene.api.sockets(WEBSOCKET)[0], &["--messages", "2"])?;
        ensure!(echoed.outcome == "ok", "{} got {echoed:?}", pod.name());
        let (stream, upgraded, unharmed) = std::thread::scope(|scope| {
            let long = "/stream?chunks=400&interval=50&bytes=10";
            let before = (scene.seen(long)?, switched(&scene.cluster)?);
            let stream = scope.spawn(|| scene.ask(pod, long));
            let unharmed =
                scope.spawn(|| scene.ask(&scene.friend, "/stream?chunks=60&interval=50"));
            let upgraded = scope.spawn(|| {
                let target = scene.api.sockets(WEBSOCKET)[0];
                raw(pod, target, &[UPGRADE], &["--quiet-ms", "20000"])
            });
            eventually("the stream and the upgrade to have begun", || {
                let now = (scene.seen(long)?, switched(&scene.cluster)?);
                ensure!(now.0 > before.0 && now.1 > before.1, "not yet: {now:?}");
                Ok(())
            })?;
            scene
                .cluster
                .apply(&open("HTTPRoute", "public", "nobody"))?;
            scene.cluster.apply(&open("HTTPRoute", "chat", "nobody"))?;
            let joined = || anyhow::anyhow!("a thread failed");
            let stream = stream.join().map_err(|_| joined())??;
            let upgraded = upgraded.join().map_err(|_| joined())??;
            let unharmed = unharmed.join().map_err(|_| joined())??;
            Ok::<_, anyhow::Error>((stream, upgraded, unharmed))
        })?;
        let name = pod.name();
        ensure!(
            stream.code() == 200 && stream.exit != 0,
            "{name}: {stream:?}"
        );
        ensure!(upgraded.statuses == [101], "{name}: {upgraded:?}");
        ensure!(upgraded.outcome != "quiet", "{name}: {upgraded:?}");
        ensure!(unharmed.code() == 200 && unharmed.exit == 0, "{unharmed:?}");
        for route in ["public", "chat"] {
            let policy = open("HTTPRoute", route, "readers");
            scene.cluster.apply(&policy)?;
        }
        eventually("the reader to be let in again", || {
            scene.expect(pod, "/stream?chunks=1", 200).map(drop)
        })?;
    }
    Ok(())
}

/// The connection was let in for requests, stays when there are no routes, and when there are some again: what has
/// begun meanwhile must not stay with it.
fn unrouted(scene: &Scene) -> Result<()> {
    let cluster = &scene.cluster;
    let none = json!([]);
    let routes = [
        ("public", "/stream"),
        ("moved", "/moved"),
        ("marked", "/marked"),
    ];
    let routes = routes.map(|(name, prefix)| prefix_route(name, "http", prefix, &none));
    let admin = prefix_route("admin", "http", "/admin", &none);
    let mut everything = authorization("default", "everything", "http", &[]);
    everything["spec"]["requiredAuthenticationRefs"] =
        json!([{"kind": "MeshTLSAuthentication", "name": "readers"}]);
    for pod in scene.readers() {
        scene.expect(pod, "/stream?chunks=1", 200)?;
        cluster.apply(&everything)?;
        for route in routes.iter().chain([&admin]) {
            cluster.remove(route)?;
        }
        eventually("all to be let in", || {
            scene.expect(pod, "/anything", 200).map(drop)
        })?;
        let long = "/stream?chunks=400&interval=50&bytes=11";
        let before = scene.seen(long)?;
        let stream = std::thread::scope(|scope| {
            let stream = scope.spawn(|| scene.ask(pod, long));
            eventually("the stream to have begun", || {
                ensure!(scene.seen(long)? > before, "not yet");
                Ok(())
            })?;
            cluster.apply(&open("HTTPRoute", "public", "nobody"))?;
            for route in routes.iter().chain([&admin]) {
                cluster.apply(route)?;
            }
            eventually("routes to be in effect", || {
                scene.expect(pod, "/anything", 404).map(drop)
            })?;
            cluster.remove(&everything)?;
            stream
                .join()
                .map_err(|_| anyhow::anyhow!("a thread failed"))?
        })?;
        let name = pod.name();
        // Its head was overwritten by that of those who asked meanwhile.
        let has_begun = stream.body.starts_with("chunk 0");
        ensure!(has_begun && stream.exit != 0, "{name}: {stream:?}");
        cluster.apply(&open("HTTPRoute", "public", "readers"))?;
        eventually("the reader to be let in again", || {
            scene.expect(pod, "/stream?chunks=1", 200).map(drop)
        })?;
    }
    Ok(())
}

/// On a connection that stays.
fn next_request(scene: &Scene) -> Result<()> {
    for pod in scene.readers() {
        let get = "GET /stream?chunks=1 HTTP/1.1\\r\\nHost: shop\\r\\n\\r\\n";
        let asked = [get; 40];
        let before = scene.seen("/stream?chunks=1")?;
        let raw = std::thread::scope(|scope| {
            let asking = scope.spawn(|| {
                let target = scene.api.sockets(HTTP)[0];
                raw(pod, target, &asked, &["--pause-ms", "100", "--half-close"])
            });
            eventually("some to be answered", || {
                let now = scene.seen("/stream?chunks=1")?;
                ensure!(now > before + 5, "{now} after {before}");
                Ok(())
            })?;
            scene
                .cluster
                .apply(&open("HTTPRoute", "public", "nobody"))?;
            asking
                .join()
                .map_err(|_| anyhow::anyhow!("a thread failed"))?
        })?;
        let first = raw.statuses.first().context("no answer")?;
        let last = raw.statuses.last().context("no answer")?;
        ensure!(*first == 200 && *last == 403, "{}: {raw:?}", pod.name());
        ensure!(raw.statuses.len() == asked.len(), "{}: {raw:?}", pod.name());
        scene
            .cluster
            .apply(&open("HTTPRoute", "public", "readers"))?;
        eventually("the reader to be let in again", || {
            scene.expect(pod, "/stream?chunks=1", 200).map(drop)
        })?;
    }
    Ok(())
}

fn prefix_route(name: &str, server: &str, prefix: &str, filters: &Value) -> Value {
    json!({"apiVersion": "policy.linkerd.io/v1beta3", "kind": "HTTPRoute",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"parentRefs": [parent(server)],
            "rules": [{"matches": [{"path": {"value": prefix}}], "filters": filters}]}})
}

fn grpc_route(name: &str, server: &str) -> Value {
    json!({"apiVersion": "gateway.networking.k8s.io/v1", "kind": "GRPCRoute",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"parentRefs": [parent(server)], "rules": [{}]}})
}

fn parent(server: &str) -> Value {
    json!({"group": "policy.weft.dev", "kind": "Server", "name": server})
}

/// An AuthorizationPolicy of the route's name, for a MeshTLSAuthentication.
fn open(kind: &str, route: &str, who: &str) -> Value {
    json!({"apiVersion": "policy.weft.dev/v1alpha1", "kind": "AuthorizationPolicy",
        "metadata": {"name": route, "namespace": "default"},
        "spec": {"targetRef": {"kind": kind, "name": route},
            "requiredAuthenticationRefs": [{"kind": "MeshTLSAuthentication", "name": who}]}})
}

fn readers() -> Value {
    let accounts = ["reader", "near"].map(|it| json!({"kind": "ServiceAccount", "name": it}));
    json!({"apiVersion": "policy.weft.dev/v1alpha1", "kind": "MeshTLSAuthentication",
        "metadata": {"name": "readers", "namespace": "default"},
        "spec": {"identityRefs": accounts}})
}

const HTTP: u16 = 8080;
const GRPC: u16 = 9090;
const WEBSOCKET: u16 = 8091;
