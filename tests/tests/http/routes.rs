//! HTTPRoute and GRPCRoute: which rule a request is for, and what a rule does to it.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use weft_tests::apps::{Shown, curl_shop};
use weft_tests::manifests::{ServiceSpec, backend, grpc_route, http_route, namespace};
use weft_tests::scenario::eventually;
use weft_tests::webapp::{GrpcServer, HttpServer, Seen, grpc_call};
use weft_tests::{Checks, Cluster, DEADLINE, Pod, PodSpec, wait_for};

use crate::stage::{expect_code, seen, serving};

#[test]
fn http_routes() {
    let scene = Scene::build().expect("a cluster");
    let mut checks = Checks::new("http routes");
    let mut check = |name: &str, run: fn(&Scene) -> Result<()>| {
        checks.check(name, || run(&scene));
    };
    check("the most specific rule is the one", precedence);
    check("nothing matches", no_match);
    check("headers of requests are changed", request_headers);
    check("headers of answers are changed", response_headers);
    check("redirects", redirects);
    check("rewrites of host and path", rewrites);
    check("a mirror gets a copy", mirror);
    check("filters of a backend", backend_filters);
    check("backends that do not exist answer 500", invalid_backends);
    check("a backend of another namespace needs a grant", grants);
    check("gRPC services and methods", grpc);
    check("a namespace's own routes are for its clients", consumers);
    check("Linkerd's HTTPRoute without backends", linkerd);
    check("a route is gone when it is removed", removed);
    checks.finish();
}

/// A Service `shop` with the pods `v1` and `v2`, each of which has a Service too.
struct Scene {
    servers: Vec<(HttpServer, GrpcServer, Pod)>,
    target: SocketAddr,
    client: Pod,
    cluster: Cluster,
}

impl Scene {
    fn build() -> Result<Scene> {
        let cluster = Cluster::start()?;
        let client = cluster.add_pod(PodSpec::new("client").on(0))?;
        let mut servers = Vec::new();
        for (name, node) in [("v1", 1), ("v2", 0)] {
            let pod = cluster.add_pod(PodSpec::new(name).label("tier", "shop").on(node))?;
            let http = HttpServer::start(&pod, HTTP, &[])?;
            servers.push((http, GrpcServer::start(&pod, GRPC)?, pod));
            let spec = ServiceSpec::new(name).select("app", name);
            cluster.add_service(&spec.port(80, HTTP).port(90, GRPC))?;
        }
        let spec = ServiceSpec::new("shop")
            .select("tier", "shop")
            .port(80, HTTP);
        let target = serving(&cluster, &client, &spec.port(90, GRPC), 80)?;
        Ok(Scene {
            servers,
            target,
            client,
            cluster,
        })
    }

    /// Applies the only route there is, and waits until it is in effect: each has a rule of its own
    /// for that, which says which of them it is.
    fn route(&self, rules: &Value) -> Result<()> {
        static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let count = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let path = format!("/in-effect-{count}");
        let mut all = rules.as_array().context("rules")?.clone();
        all.push(json!({
            "matches": [{"path": {"type": "Exact", "value": path}}],
            "filters": [{"type": "RequestHeaderModifier",
                "requestHeaderModifier": {"set": [{"name": "x-route", "value": path}]}}],
            "backendRefs": [backend("v1", 80, 1)],
        }));
        self.cluster
            .apply(&http_route("default", "shop", "shop", 80, &all.into()))?;
        eventually("the route to be in effect", || {
            let seen = seen(&self.ask(&path, &[])?)?;
            ensure!(seen.header("x-route") == [path.as_str()], "{seen:?}");
            Ok(())
        })
    }

    fn wait_unrouted(&self) -> Result<()> {
        eventually("the route to be gone", || {
            let seen = self.seen("/", &[])?;
            ensure!(seen.header("x-rule").is_empty(), "{seen:?}");
            Ok(())
        })
    }

    fn ask(&self, path: &str, args: &[&str]) -> Result<Shown> {
        let args = [&["--path-as-is"], args].concat();
        curl_shop(&self.client, self.target, path, &args)
    }

    fn seen(&self, path: &str, args: &[&str]) -> Result<Seen> {
        let shown = self.ask(path, args)?;
        expect_code(&shown, 200)?;
        seen(&shown)
    }
}

/// A rule that says by a header of the request that it was the one.
fn marked(name: &str, matches: Value) -> Value {
    json!({
        "matches": matches,
        "filters": [{"type": "RequestHeaderModifier",
            "requestHeaderModifier": {"set": [{"name": "x-rule", "value": name}]}}],
        "backendRefs": [backend("v1", 80, 1)],
    })
}

fn path(kind: &str, value: &str) -> Value {
    json!({"type": kind, "value": value})
}

fn header(name: &str, value: &str) -> Value {
    json!({"type": "Exact", "name": name, "value": value})
}

/// Gateway API, `HTTPRouteRule.matches`: an exact path, then the longest prefix, then a method, then
/// the most headers, then the most query parameters, then the first.
fn precedence(scene: &Scene) -> Result<()> {
    let version = header("x-version", "2");
    let user = header("x-user", "blue");
    let query = json!({"type": "Exact", "name": "q", "value": "1"});
    let more = json!({"type": "Exact", "name": "r", "value": "2"});
    scene.route(&json!([
        marked("root", json!([{"path": path("PathPrefix", "/")}])),
        marked("a", json!([{"path": path("PathPrefix", "/a")}])),
        marked("a/b", json!([{"path": path("PathPrefix", "/a/b")}])),
        marked("exact", json!([{"path": path("Exact", "/a/b/c")}])),
        marked(
            "post",
            json!([{"path": path("PathPrefix", "/a"), "method": "POST"}])
        ),
        marked(
            "header",
            json!([{"path": path("PathPrefix", "/a"), "headers": [version]}])
        ),
        marked(
            "headers",
            json!([{"path": path("PathPrefix", "/a"), "headers": [version, user]}])
        ),
        marked(
            "query",
            json!([{"path": path("PathPrefix", "/a"), "queryParams": [query]}])
        ),
        marked(
            "queries",
            json!([{"path": path("PathPrefix", "/a"), "queryParams": [query, more]}])
        ),
        marked("first", json!([{"path": path("PathPrefix", "/same")}])),
        marked("second", json!([{"path": path("PathPrefix", "/same")}])),
        marked(
            "either",
            json!([{"path": path("Exact", "/one")}, {"path": path("Exact", "/other")}])
        ),
        marked(
            "pattern",
            json!([{"path": path("RegularExpression", "/item/[0-9]+")}])
        ),
        marked(
            "like",
            json!([{"path": path("PathPrefix", "/like"),
            "headers": [{"type": "RegularExpression", "name": "x-like", "value": "b.*e"}]}])
        ),
    ]))?;
    let two = ["-H", "X-Version: 2"];
    let both = ["-H", "x-version: 2", "-H", "x-user: blue"];
    let cases: [(&str, &[&str], &str); 24] = [
        ("/", &[], "root"),
        ("/other-path", &[], "root"),
        ("/a", &[], "a"),
        ("/a/", &[], "a"),
        ("/ab", &[], "root"),
        ("/a/b", &[], "a/b"),
        ("/a/bc", &[], "a"),
        ("/a/b/c", &[], "exact"),
        ("/a/b/c/", &[], "a/b"),
        ("/a/b/c?q=1", &[], "exact"),
        ("/a", &["-X", "POST"], "post"),
        (
            "/a",
            &["-X", "POST", "-H", "x-version: 2", "-H", "x-user: blue"],
            "post",
        ),
        ("/a/b", &["-X", "POST"], "a/b"),
        ("/a", &two, "header"),
        ("/a", &["-H", "x-version: 20"], "a"),
        ("/a", &both, "headers"),
        ("/a?q=1", &[], "query"),
        ("/a?q=1&r=2", &two, "header"),
        ("/a?r=2&q=1", &[], "queries"),
        ("/same", &[], "first"),
        ("/other", &[], "either"),
        ("/item/42", &[], "pattern"),
        ("/item/x", &[], "root"),
        ("/like/this", &["-H", "x-like: blue"], "like"),
    ];
    for version in [[].as_slice(), &["--http2-prior-knowledge"]] {
        for (path, args, rule) in cases {
            let seen = scene.seen(path, &[args, version].concat())?;
            let found = seen.header("x-rule");
            ensure!(
                found == [rule],
                "{path} {args:?}: {found:?} instead of {rule}"
            );
        }
    }
    Ok(())
}

fn no_match(scene: &Scene) -> Result<()> {
    scene.route(&json!([marked(
        "only",
        json!([{"path": path("PathPrefix", "/only")}])
    )]))?;
    let requests = |scene: &Scene| -> Result<usize> {
        let seen = scene.servers.iter().map(|(http, _, _)| http.requests());
        Ok(seen.collect::<Result<Vec<_>>>()?.concat().len())
    };
    let before = requests(scene)?;
    expect_code(&scene.ask("/nothing", &[])?, 404)?;
    expect_code(&scene.ask("/nothing", &["--http2-prior-knowledge"])?, 404)?;
    ensure!(requests(scene)? == before, "a server was asked");
    scene.seen("/only/this", &[]).map(drop)
}

fn request_headers(scene: &Scene) -> Result<()> {
    scene.route(&json!([{
        "filters": [{"type": "RequestHeaderModifier", "requestHeaderModifier": {
            "set": [{"name": "x-set", "value": "new"}],
            "add": [{"name": "X-Add", "value": "second"}],
            "remove": ["x-remove"],
        }}],
        "backendRefs": [backend("v1", 80, 1)],
    }]))?;
    let sent = [
        "-H",
        "x-set: old",
        "-H",
        "x-add: first",
        "-H",
        "X-Remove: 1",
    ];
    let seen = scene.seen("/", &sent)?;
    ensure!(seen.header("x-set") == ["new"], "{seen:?}");
    let added = seen.header("x-add").join(",").replace(' ', "");
    ensure!(added == "first,second", "{seen:?}");
    ensure!(seen.header("x-remove").is_empty(), "{seen:?}");
    Ok(())
}

fn response_headers(scene: &Scene) -> Result<()> {
    scene.route(&json!([{
        "filters": [{"type": "ResponseHeaderModifier", "responseHeaderModifier": {
            "set": [{"name": "content-type", "value": "text/special"}],
            "add": [{"name": "x-add", "value": "added"}],
            "remove": ["x-served-by"],
        }}],
        "backendRefs": [backend("v1", 80, 1)],
    }]))?;
    let shown = scene.ask("/", &[])?;
    expect_code(&shown, 200)?;
    ensure!(
        shown.header("content-type") == Some("text/special"),
        "{shown:?}"
    );
    ensure!(shown.header("x-add") == Some("added"), "{shown:?}");
    ensure!(shown.header("x-served-by").is_none(), "{shown:?}");
    Ok(())
}

fn redirects(scene: &Scene) -> Result<()> {
    let rule = |prefix: &str, redirect: Value| {
        json!({"matches": [{"path": path("PathPrefix", prefix)}],
            "filters": [{"type": "RequestRedirect", "requestRedirect": redirect}]})
    };
    scene.route(&json!([
        rule(
            "/moved",
            json!({"hostname": "example.org", "statusCode": 301})
        ),
        rule("/secure", json!({"scheme": "https", "port": 8443})),
        rule(
            "/full",
            json!({"path": {"type": "ReplaceFullPath", "replaceFullPath": "/new"}})
        ),
        rule(
            "/old",
            json!({"path": {"type": "ReplacePrefixMatch", "replacePrefixMatch": "/new"}})
        ),
    ]))?;
    for (asked, code, location) in [
        ("/moved/a?b=c", 301, "http://example.org/moved/a?b=c"),
        ("/secure", 302, "https://shop:8443/secure"),
        ("/full/path", 302, "http://shop/new"),
        ("/old/path", 302, "http://shop/new/path"),
    ] {
        let shown = scene.ask(asked, &[])?;
        expect_code(&shown, code)?;
        // The listener's port may be said or, being the scheme's own, not.
        let found = shown
            .header("location")
            .unwrap_or_default()
            .replace(":80/", "/");
        ensure!(found == location, "{asked}: {found} instead of {location}");
    }
    Ok(())
}

fn rewrites(scene: &Scene) -> Result<()> {
    let rule = |prefix: &str, rewrite: Value| {
        json!({"matches": [{"path": path("PathPrefix", prefix)}],
            "filters": [{"type": "URLRewrite", "urlRewrite": rewrite}],
            "backendRefs": [backend("v1", 80, 1)]})
    };
    scene.route(&json!([
        rule("/host", json!({"hostname": "internal.example"})),
        rule(
            "/full",
            json!({"path": {"type": "ReplaceFullPath", "replaceFullPath": "/new"}})
        ),
        rule(
            "/old",
            json!({"path": {"type": "ReplacePrefixMatch", "replacePrefixMatch": "/new"}})
        ),
        rule(
            "/gone",
            json!({"path": {"type": "ReplacePrefixMatch", "replacePrefixMatch": "/"}})
        ),
    ]))?;
    ensure!(scene.seen("/host", &[])?.header("host") == ["internal.example"]);
    for (asked, found) in [
        ("/full/path?q=1", "/new?q=1"),
        ("/old", "/new"),
        ("/old/path?q=1", "/new/path?q=1"),
        ("/old/a%2Fb", "/new/a%2Fb"),
        ("/gone/path", "/path"),
        ("/gone", "/"),
    ] {
        let seen = scene.seen(asked, &[])?;
        ensure!(
            seen.path == found,
            "{asked} became {}, not {found}",
            seen.path
        );
    }
    Ok(())
}

fn mirror(scene: &Scene) -> Result<()> {
    scene.route(&json!([{
        "filters": [{"type": "RequestMirror", "requestMirror": {"backendRef": {"name": "v2", "port": 80}}}],
        "backendRefs": [backend("v1", 80, 1)],
    }]))?;
    let seen = scene.seen("/mirrored?q=1", &["-d", "some=body"])?;
    ensure!(seen.name == "v1" && seen.body_bytes == 9, "{seen:?}");
    let (mirror, _, _) = scene.servers.get(1).context("v2")?;
    wait_for("the copy to arrive", DEADLINE, || {
        let requests = mirror.requests()?;
        let mut copies = requests.iter().filter(|it| it.path == "/mirrored?q=1");
        Ok(copies.next().filter(|copy| copy.method == "POST").map(drop))
    })?;
    // Its answers count for nothing.
    let (mirror, _, pod) = scene.servers.get(1).context("v2")?;
    mirror.configure(pod, 3000, 500)?;
    let shown = scene.ask("/mirrored", &["--max-time", "2"]);
    mirror.configure(pod, 0, 200)?;
    expect_code(&shown?, 200)
}

fn backend_filters(scene: &Scene) -> Result<()> {
    let filtered = |name: &str| {
        let mut backend = backend(name, 80, 1);
        backend["filters"] = json!([{"type": "RequestHeaderModifier",
            "requestHeaderModifier": {"set": [{"name": "x-backend", "value": name}]}}]);
        backend
    };
    scene.route(&json!([{"backendRefs": [filtered("v1"), filtered("v2")]}]))?;
    for _ in 0..20 {
        let seen = scene.seen("/", &[])?;
        ensure!(seen.header("x-backend") == [seen.name.as_str()], "{seen:?}");
    }
    Ok(())
}

fn invalid_backends(scene: &Scene) -> Result<()> {
    let rule = |prefix: &str, backends: Value| json!({"matches": [{"path": path("PathPrefix", prefix)}], "backendRefs": backends});
    let mut kind = backend("v1", 80, 1);
    kind["kind"] = json!("Bucket");
    kind["group"] = json!("example.org");
    scene.route(&json!([
        rule("/service", json!([backend("no-such-service", 80, 1)])),
        rule("/port", json!([backend("v1", 81, 1)])),
        rule("/kind", json!([kind])),
        rule("/none", json!([])),
        rule("/zero", json!([backend("v1", 80, 0)])),
        rule(
            "/half",
            json!([backend("v1", 80, 1), backend("no-such-service", 80, 1)])
        ),
    ]))?;
    for asked in ["/service", "/port", "/kind", "/none", "/zero"] {
        let shown = scene.ask(asked, &[])?;
        ensure!(shown.code() == 500, "{asked}: {shown:?}");
    }
    let mut codes = std::collections::BTreeMap::<u16, u32>::new();
    for _ in 0..60 {
        *codes.entry(scene.ask("/half", &[])?.code()).or_default() += 1;
    }
    // Half of 60, within four standard deviations.
    let failed = codes.get(&500).copied().unwrap_or(0);
    ensure!(
        codes.keys().all(|code| [200, 500].contains(code)),
        "{codes:?}"
    );
    ensure!((14..=46).contains(&failed), "{codes:?}");
    Ok(())
}

fn grants(scene: &Scene) -> Result<()> {
    scene.cluster.apply(&namespace("elsewhere", &json!({})))?;
    let spec = PodSpec::new("v3").namespace("elsewhere").on(1);
    let pod = scene.cluster.add_pod(spec)?;
    let _server = HttpServer::start(&pod, HTTP, &[])?;
    let spec = ServiceSpec::new("v3")
        .namespace("elsewhere")
        .select("app", "v3");
    scene.cluster.add_service(&spec.port(80, HTTP))?;
    let mut backend = backend("v3", 80, 1);
    backend["namespace"] = json!("elsewhere");
    scene.route(&json!([{"backendRefs": [backend]}]))?;
    expect_code(&scene.ask("/", &[])?, 500)?;
    let grant = json!({
        "apiVersion": "gateway.networking.k8s.io/v1beta1",
        "kind": "ReferenceGrant",
        "metadata": {"name": "from-default", "namespace": "elsewhere"},
        "spec": {
            "from": [{"group": "gateway.networking.k8s.io", "kind": "HTTPRoute", "namespace": "default"}],
            "to": [{"group": "", "kind": "Service"}],
        },
    });
    scene.cluster.apply(&grant)?;
    eventually("the grant to be in effect", || {
        let seen = scene.seen("/", &[])?;
        ensure!(seen.name == "v3", "{seen:?}");
        Ok(())
    })?;
    scene.cluster.remove(&grant)?;
    eventually("the grant to be gone", || {
        expect_code(&scene.ask("/", &[])?, 500)
    })
}

fn grpc(scene: &Scene) -> Result<()> {
    let target = SocketAddr::new(scene.target.ip(), 90);
    let rule = |method: Value, headers: Value, name: &str| json!({"matches": [{"method": method, "headers": headers}], "backendRefs": [backend(name, 90, 1)]});
    let service = "weft.test.v1.Echo";
    let rules = json!([
        rule(json!({"service": service}), json!([]), "v1"),
        rule(
            json!({"service": service, "method": "Unary"}),
            json!([]),
            "v2"
        ),
        rule(
            json!({"service": service, "method": "Unary"}),
            json!([header("x-tenant", "blue")]),
            "v1"
        ),
        rule(json!({"service": "no.such.Service"}), json!([]), "v2"),
    ]);
    let route = grpc_route("default", "calls", "shop", 90, &rules);
    scene.cluster.apply(&route)?;
    let answered_by = |args: &[&str], name: &str| -> Result<()> {
        for _ in 0..10 {
            let called = grpc_call(&scene.client, target, args)?;
            let by = called.answers.iter().all(|answer| answer.name == name);
            ensure!(
                called.code == 0 && by,
                "{args:?} instead of {name}: {called:?}"
            );
        }
        Ok(())
    };
    // Two that the balancer alone would not answer so.
    eventually("the route to be in effect", || {
        answered_by(&[], "v2")?;
        answered_by(&["--metadata", "x-tenant: blue"], "v1")
    })?;
    answered_by(&["--kind", "collect"], "v1")?;
    answered_by(&["--kind", "chat"], "v1")?;
    answered_by(&["--metadata", "x-tenant: blue"], "v1")?;
    // Without a rule for it: UNIMPLEMENTED, as the Gateway API has it for gRPC.
    let only = json!([rule(
        json!({"service": service, "method": "Expand"}),
        json!([]),
        "v1"
    )]);
    scene
        .cluster
        .apply(&grpc_route("default", "calls", "shop", 90, &only))?;
    eventually("no rule to match", || {
        let called = grpc_call(&scene.client, target, &[])?;
        ensure!(called.code == 12, "{called:?}");
        Ok(())
    })?;
    scene.cluster.remove(&route)
}

/// Clients of a namespace that has routes to the Service go by these alone, all others by the Service's own.
fn consumers(scene: &Scene) -> Result<()> {
    let any = json!([{"path": path("PathPrefix", "/")}]);
    let only = json!([{"path": path("PathPrefix", "/consumed")}]);
    let client = |name: &str| -> Result<Pod> {
        scene.cluster.apply(&namespace(name, &json!({})))?;
        let spec = PodSpec::new(name).namespace(name).on(0);
        scene.cluster.add_pod(spec)
    };
    let (consumer, bystander) = (&client("consumer")?, &client("bystander")?);
    scene.route(&json!([marked("producer", any)]))?;
    let mut own = marked("consumer", only);
    own["backendRefs"][0] = json!({"name": "shop", "namespace": "default", "port": 80});
    let mut route = http_route("consumer", "own", "shop", 80, &json!([own]));
    route["spec"]["parentRefs"][0]["namespace"] = json!("default");
    let by_rule = |client: &Pod, rule: &str| -> Result<()> {
        for version in [&[][..], &["--http2-prior-knowledge"]] {
            let shown = curl_shop(client, scene.target, "/consumed", version)?;
            expect_code(&shown, 200)?;
            let seen = seen(&shown)?;
            ensure!(seen.header("x-rule") == [rule], "{rule}: {seen:?}");
        }
        Ok(())
    };
    let producers = || by_rule(consumer, "producer");
    eventually("the Service's route to hold for all", producers)?;
    scene.cluster.apply(&route)?;
    eventually("the namespace's route to be in effect", || {
        by_rule(consumer, "consumer")
    })?;
    by_rule(bystander, "producer")?;
    by_rule(&scene.client, "producer")?;
    // The Service's are not asked beside it.
    expect_code(&curl_shop(consumer, scene.target, "/", &[])?, 404)?;
    expect_code(&curl_shop(bystander, scene.target, "/", &[])?, 200)?;
    scene.cluster.remove(&route)?;
    eventually("the Service's route to hold again", producers)
}

/// Without `backendRefs` it leads to the Service itself; one of the Gateway API leads nowhere.
fn linkerd(scene: &Scene) -> Result<()> {
    let mut rule = marked("linkerd", json!([{"path": path("PathPrefix", "/")}]));
    rule.as_object_mut()
        .context("a rule")?
        .remove("backendRefs");
    scene.route(&json!([rule]))?;
    expect_code(&scene.ask("/", &[])?, 500)?;
    let gateway = http_route("default", "shop", "shop", 80, &json!([rule]));
    let mut linkerd = gateway.clone();
    linkerd["apiVersion"] = json!("policy.linkerd.io/v1beta3");
    scene.cluster.remove(&gateway)?;
    scene.cluster.apply(&linkerd)?;
    let mut names = std::collections::BTreeSet::new();
    eventually("both endpoints of the Service to answer", || {
        let seen = scene.seen("/", &[])?;
        ensure!(seen.header("x-rule") == ["linkerd"], "{seen:?}");
        names.insert(seen.name);
        ensure!(names.len() == 2, "only {names:?}");
        Ok(())
    })?;
    scene.cluster.remove(&linkerd)?;
    scene.wait_unrouted()
}

fn removed(scene: &Scene) -> Result<()> {
    scene.route(&json!([marked(
        "only",
        json!([{"path": path("PathPrefix", "/only")}])
    )]))?;
    expect_code(&scene.ask("/", &[])?, 404)?;
    scene
        .cluster
        .remove(&http_route("default", "shop", "shop", 80, &json!([])))?;
    scene.wait_unrouted()
}

const HTTP: u16 = 8080;
const GRPC: u16 = 9090;
