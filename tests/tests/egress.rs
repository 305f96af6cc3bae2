//! What may leave the cluster: EgressNetworks, and their routes. The outside is a host that is no pod: the
//! other node.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use weft_tests::apps::{Shown, curl_shop};
use weft_tests::command::Process;
use weft_tests::manifests::ServiceSpec;
use weft_tests::metrics::wait_for_metric;
use weft_tests::scenario::{eventually, expect_echo, expect_refusal};
use weft_tests::testapp::{self, Pulse, Server};
use weft_tests::webapp::{HttpServer, grpc_call, raw, websocket_echo};
use weft_tests::{Checks, Cluster, Pod, PodSpec};

/// Clients, and what is outside.
struct Scene {
    /// In the namespace `shop`.
    client: Pod,
    /// In another one.
    other: Pod,
    /// A server inside, behind the Service `shop/proxy`.
    proxy: Pod,
    echo: Server,
    _web: Vec<Process>,
    cluster: Cluster,
}

impl Scene {
    fn build() -> Result<Scene> {
        let cluster = Cluster::start()?;
        let add = |name: &str, namespace: &str, node| {
            cluster.add_pod(PodSpec::new(name).namespace(namespace).on(node))
        };
        let (client, other) = (add("client", "shop", 0)?, add("other", "staging", 0)?);
        let proxy = add("proxy", "shop", 0)?;
        let host = || -> Result<_> {
            let program = testapp::path()?.display().to_string();
            cluster.node(1).host_command(&program)
        };
        let listen = |port: u16| [format!("0.0.0.0:{port}"), format!("[::]:{port}")];
        let echo = Server::spawn(host()?, &listen(ECHO), "echo", &[])?;
        let mut web = vec![];
        for port in [WEB, WEB_TOO] {
            let mut process = host()?
                .named("outside")
                .args(["http", "serve", "--name", "outside"])
                .args(["--listen", &listen(port)[0], "--listen", &listen(port)[1]])
                .spawn()?;
            process.wait_listening(port)?;
            web.push(process);
        }
        for (kind, port, args) in [
            ("websocket", SOCKETS, &[][..]),
            ("grpc", CALLS, &["--name", "outside"]),
        ] {
            let mut process = host()?
                .named(kind)
                .args([kind, "serve", "--listen", &listen(port)[0]])
                .args(args.iter().copied())
                .spawn()?;
            process.wait_listening(port)?;
            web.push(process);
        }
        web.push(tls_server(&cluster)?);
        Ok(Scene {
            client,
            other,
            proxy,
            echo,
            _web: web,
            cluster,
        })
    }

    fn at(&self, port: u16) -> SocketAddr {
        (IpAddr::V4(self.cluster.node(1).v4()), port).into()
    }

    fn get(&self, pod: &Pod, port: u16, path: &str, args: &[&str]) -> Result<Shown> {
        curl_shop(pod, self.at(port), path, args)
    }

    /// Applies manifests, and runs a check until it succeeds; they are taken back afterwards.
    fn under(&self, manifests: &[Value], check: impl FnOnce() -> Result<()>) -> Result<()> {
        for manifest in manifests {
            self.cluster.apply(manifest)?;
        }
        let checked = check();
        for manifest in manifests {
            self.cluster.remove(manifest)?;
        }
        checked.and(self.freed())
    }

    /// Waits until no network is in force.
    fn freed(&self) -> Result<()> {
        eventually("the networks to be gone", || {
            for pod in [&self.client, &self.other] {
                expect_echo(pod, self.at(ECHO), "free")?;
            }
            Ok(())
        })
    }
}

/// A server of TLS of another make.
fn tls_server(cluster: &Cluster) -> Result<Process> {
    let dir = cluster.node(1).dir();
    let file = |name: &str| dir.join(name).display().to_string();
    let openssl = || cluster.node(1).host_command("openssl");
    let (key, certificate) = (file("outside-key.pem"), file("outside.pem"));
    openssl()?
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt"])
        .args(["ec_paramgen_curve:P-256", "-nodes", "-days", "1"])
        .args([
            "-subj",
            "/CN=outside",
            "-keyout",
            &key,
            "-out",
            &certificate,
        ])
        .run()?;
    let port = TLS.to_string();
    let mut server = openssl()?
        .args(["s_server", "-accept", &port, "-www"])
        .args(["-cert", &certificate, "-key", &key])
        .spawn()?;
    server.wait_listening(TLS)?;
    Ok(server)
}

#[test]
fn egress() {
    let scene = Scene::build().expect("a cluster");
    let mut checks = Checks::new("egress");
    let mut check = |name: &str, run: fn(&Scene) -> Result<()>| {
        checks.check(name, || run(&scene));
    };
    check("without networks everything leaves", free);
    check("what is denied does not leave", denied);
    check("networks are chosen as Linkerd does", chosen);
    check("the example of docs/policy.md holds as written", documented);
    check("routes open what is denied", routes);
    check("a route leads to a Service", to_a_service);
    check("flows of TCP by a TCPRoute", tcp_route);
    check("a change ends what it no longer allows", live_change);
    check("what cannot be read closes", unreadable);
    check("the networks are in the dump", dump);
    checks.finish();
}

fn network(namespace: &str, name: &str, spec: Value) -> Value {
    json!({
        "apiVersion": "policy.weft.dev/v1alpha1",
        "kind": "EgressNetwork",
        "metadata": {"name": name, "namespace": namespace},
        "spec": spec,
    })
}

fn deny() -> Value {
    network("shop", "out", json!({"trafficPolicy": "Deny"}))
}

/// A route of the network `shop/out` for a port.
fn route(kind: &str, name: &str, port: u16, spec: Value) -> Value {
    let version = match kind {
        "TCPRoute" | "TLSRoute" => "v1alpha2",
        _ => "v1",
    };
    let mut route = json!({
        "apiVersion": format!("gateway.networking.k8s.io/{version}"),
        "kind": kind,
        "metadata": {"name": name, "namespace": "shop"},
        "spec": spec,
    });
    route["spec"]["parentRefs"] = json!([
        {"group": "policy.weft.dev", "kind": "EgressNetwork", "name": "out", "port": port}
    ]);
    route
}

fn expect_denied(shown: &Shown) -> Result<()> {
    let reason = shown.header("weft-error");
    ensure!(
        shown.code() == 403 && reason == Some("egress_denied"),
        "not denied: {shown:?}"
    );
    Ok(())
}

fn expect_from_outside(shown: &Shown) -> Result<()> {
    ensure!(
        shown.code() == 200 && shown.body.contains("outside"),
        "not let out: {shown:?}"
    );
    Ok(())
}

fn free(scene: &Scene) -> Result<()> {
    for pod in [&scene.client, &scene.other] {
        expect_echo(pod, scene.at(ECHO), "free")?;
        expect_from_outside(&scene.get(pod, WEB, "/", &[])?)?;
    }
    Ok(())
}

fn denied(scene: &Scene) -> Result<()> {
    let before = scene.echo.accepted()?.len();
    scene.under(&[deny()], || {
        eventually("requests to be denied", || {
            expect_denied(&scene.get(&scene.client, WEB, "/", &[])?)
        })?;
        let free = scene.echo.accepted()?.len();
        expect_refusal(&scene.client, scene.at(ECHO), "hello")?;
        // Also one that does not say a word.
        let silent = testapp::connect(&scene.client, scene.at(ECHO), &["--receive-bytes", "1"])?;
        silent.expect(&["reset"])?;
        let http2 = ["--http2-prior-knowledge"];
        expect_denied(&scene.get(&scene.client, WEB, "/", &http2)?)?;
        let called = grpc_call(&scene.client, scene.at(CALLS), &[])?;
        ensure!(called.code == 7, "not PERMISSION_DENIED: {called:?}");
        ensure!(
            scene.echo.accepted()?.len() == free,
            "a connection got out all the same"
        );
        // Others are not the network's to rule.
        expect_echo(&scene.other, scene.at(ECHO), "free")?;
        expect_from_outside(&scene.get(&scene.other, WEB, "/", &[])?)?;
        // Nor are those inside.
        let _app = Server::start(&scene.proxy, ECHO, "echo", &[])?;
        expect_echo(&scene.client, scene.proxy.sockets(ECHO)[0], "inside")?;
        let node = scene.cluster.node(0);
        let labels = [
            ("pod", "client"),
            ("parent_group", "policy.weft.dev"),
            ("parent_kind", "EgressNetwork"),
            ("parent_namespace", "shop"),
            ("parent_name", "out"),
        ];
        wait_for_metric(node, "weft_egress_denied_total", &labels, 5.0)?;
        once_each(scene, &labels)?;
        broken_off(scene, &labels)?;
        let labels = [("pod", "client"), ("reason", "egress_denied")];
        wait_for_metric(node, "weft_refused_total", &labels, 5.0)?;
        let labels = [
            ("pod", "client"),
            ("parent_kind", "EgressNetwork"),
            ("parent_name", "out"),
            ("route_name", "http-egress-deny"),
            ("http_status", "403"),
        ];
        let name = "outbound_http_route_request_statuses_total";
        wait_for_metric(node, name, &labels, 2.0).map(drop)
    })?;
    ensure!(scene.echo.accepted()?.len() > before, "nothing got out");
    Ok(())
}

/// A request is denied once, also where its client is slow to say what it is: the connection was denied meanwhile.
fn once_each(scene: &Scene, labels: &[(&str, &str)]) -> Result<()> {
    let node = scene.cluster.node(0);
    let denied = || Ok::<_, anyhow::Error>(node.metrics()?.sum("weft_egress_denied_total", labels));
    let before = denied()?;
    let later = [
        "",
        "GET / HTTP/1.1\\r\\nHost: outside\\r\\nConnection: close\\r\\n\\r\\n",
    ];
    for pause in ["0", "200"] {
        let raw = raw(&scene.client, scene.at(WEB), &later, &["--pause-ms", pause])?;
        ensure!(raw.statuses == [403], "{raw:?}");
    }
    let now = denied()?;
    ensure!(
        now == before + 2.0,
        "two requests were counted as {}",
        now - before
    );
    Ok(())
}

/// A client that leaves before it hears that it was denied was denied all the same.
fn broken_off(scene: &Scene, labels: &[(&str, &str)]) -> Result<()> {
    let node = scene.cluster.node(0);
    let refused = [("pod", "client"), ("reason", "egress_denied")];
    let counted = || -> Result<_> {
        let metrics = node.metrics()?;
        let denied = metrics.sum("weft_egress_denied_total", labels);
        Ok((denied, metrics.sum("weft_refused_total", &refused)))
    };
    let before = counted()?;
    // Within the time that a client has to say that it speaks HTTP.
    let leave = ["--receive-bytes", "0", "--read-delay-ms", "300", "--reset"];
    for more in [&[][..], &["--send", "GE"]] {
        let args = [&leave[..], more].concat();
        testapp::connect(&scene.client, scene.at(ECHO), &args)?.expect(&["ok"])?;
    }
    eventually("both to be counted", || {
        let now = counted()?;
        let expected = (before.0 + 2.0, before.1 + 2.0);
        ensure!(now == expected, "{before:?} before, now {now:?}");
        Ok(())
    })
}

fn chosen(scene: &Scene) -> Result<()> {
    let host = scene.at(0).ip();
    let global = network("linkerd-egress", "all", json!({"trafficPolicy": "Deny"}));
    let mut of_linkerd = network(
        "shop",
        "this",
        json!({"trafficPolicy": "Allow", "networks": [{"cidr": format!("{host}/32")}]}),
    );
    of_linkerd["apiVersion"] = json!("policy.linkerd.io/v1alpha1");
    scene.under(&[of_linkerd, deny(), global], || {
        eventually("the global network to hold", || {
            expect_denied(&scene.get(&scene.other, WEB, "/", &[])?)
        })?;
        // A smaller one of its own comes before.
        eventually("the smaller network to hold", || {
            expect_from_outside(&scene.get(&scene.client, WEB, "/", &[])?)
        })?;
        let labels = [
            ("pod", "client"),
            ("parent_group", "policy.linkerd.io"),
            ("parent_name", "this"),
            ("route_name", "http-egress-allow"),
        ];
        let name = "outbound_http_route_request_statuses_total";
        wait_for_metric(scene.cluster.node(0), name, &labels, 1.0).map(drop)
    })
}

/// The YAML below the heading.
fn example() -> Result<&'static str> {
    let page = include_str!("../../docs/policy.md");
    let section = page.split("\n## EgressNetwork\n").nth(1);
    let yaml = section.and_then(|it| it.split("```yaml\n").nth(1));
    let yaml = yaml.and_then(|it| it.split("```").next());
    yaml.context("docs/policy.md has no example")
}

fn documented(scene: &Scene) -> Result<()> {
    scene.cluster.manifests().apply("documented", example()?)?;
    let host = |it: &str| format!("host: {it}");
    let ask = |path: &str, args: &[&str]| scene.get(&scene.client, WEB, path, args);
    let good = host("status.example.com");
    let result = (|| -> Result<()> {
        eventually("the example to be in force", || {
            expect_denied(&ask("/", &["-H", &good])?)?;
            expect_from_outside(&ask("/health", &["-H", &good])?)
        })?;
        expect_from_outside(&ask("/health/db?full", &["-H", &good])?)?;
        expect_denied(&ask("/health", &["-H", &good, "-X", "POST"])?)?;
        expect_denied(&ask("/health", &["-H", &host("example.com")])?)?;
        expect_denied(&ask("/health", &[])?)?;
        // Nothing else goes to that port.
        expect_refusal(&scene.client, scene.at(WEB), "hello\n\n")?;
        let tls = |name: &str| {
            let curl = scene.client.command("curl")?;
            curl.args(["-sSk", "--max-time", "20", "--resolve"])
                .arg(format!("{name}:{TLS}:{}", scene.at(TLS).ip()))
                .arg(format!("https://{name}:{TLS}/"))
                .run()
        };
        let page = tls("api.example.com")?;
        ensure!(page.contains("s_server"), "{page}");
        ensure!(
            tls("other.example.com").is_err(),
            "another name was let out"
        );
        // What is no TLS, and what it says without a name.
        expect_refusal(&scene.client, scene.at(TLS), "hello\n\n")?;
        expect_denied(&scene.get(&scene.client, TLS, "/health", &["-H", &good])?)?;
        expect_refusal(&scene.client, scene.at(ECHO), "hello").map(drop)
    })();
    scene.cluster.manifests().remove("documented")?;
    result.and(scene.freed())
}

fn routes(scene: &Scene) -> Result<()> {
    let out = json!({"group": "policy.weft.dev", "kind": "EgressNetwork", "name": "out"});
    let rules = json!([
        {"matches": [{"path": {"value": "/moved"}}],
         "filters": [{"type": "RequestRedirect", "requestRedirect": {"path": {"type": "ReplaceFullPath", "replaceFullPath": "/new"}}}]},
        {"matches": [{"path": {"value": "/tagged"}}],
         "filters": [{"type": "RequestHeaderModifier", "requestHeaderModifier": {"set": [{"name": "x-egress", "value": "yes"}]}}],
         "backendRefs": [out]},
        {"matches": [{"path": {"value": "/delay"}}], "timeouts": {"request": "300ms"}},
        {"matches": [{"path": {"value": "/status"}}], "retry": {"codes": [503], "attempts": 2}},
    ]);
    let http = route("HTTPRoute", "web", WEB_TOO, json!({"rules": rules}));
    let rules = json!([{"matches": [{"method": {"method": "Nothing"}}]}]);
    let grpc = route("GRPCRoute", "calls", CALLS, json!({"rules": rules}));
    let get = |path: &str| scene.get(&scene.client, WEB_TOO, path, &[]);
    scene.under(&[deny(), http, grpc], || {
        eventually("the routes to be in force", || {
            expect_from_outside(&get("/tagged")?)?;
            expect_denied(&get("/")?)
        })?;
        let tagged = get("/tagged")?;
        ensure!(tagged.body.contains("x-egress"), "{tagged:?}");
        let moved = get("/moved")?;
        ensure!(moved.code() == 302, "{moved:?}");
        let slow = get("/delay/20000")?;
        ensure!(slow.code() == 504, "{slow:?}");
        let failing = get("/status/503")?;
        ensure!(failing.code() == 503, "{failing:?}");
        let labels = [("parent_kind", "EgressNetwork"), ("route_name", "web")];
        let retried = "outbound_http_route_retry_requests_total";
        wait_for_metric(scene.cluster.node(0), retried, &labels, 2.0)?;
        // Nobody would see what follows.
        let asked = "CONNECT elsewhere:443 HTTP/1.1\\r\\nHost: elsewhere:443\\r\\n\\r\\n";
        let connect = raw(
            &scene.client,
            scene.at(WEB_TOO),
            &[asked],
            &["--half-close"],
        )?;
        ensure!(connect.statuses == [405], "{connect:?}");
        let called = grpc_call(&scene.client, scene.at(CALLS), &[])?;
        ensure!(called.code == 7, "not PERMISSION_DENIED: {called:?}");
        // A client that only waits is not let out by routes of requests.
        let silent = testapp::say(&scene.client, scene.at(WEB_TOO), "no http\n\n")?;
        silent.expect(&["reset", "refused"])?;
        let labels = [
            ("pod", "client"),
            ("parent_kind", "EgressNetwork"),
            ("parent_name", "out"),
            ("route_name", "web"),
            ("backend_kind", "EgressNetwork"),
        ];
        let name = "outbound_http_route_backend_requests_total";
        wait_for_metric(scene.cluster.node(0), name, &labels, 2.0).map(drop)
    })
}

fn to_a_service(scene: &Scene) -> Result<()> {
    let _web = HttpServer::start(&scene.proxy, 3128, &[])?;
    let spec = ServiceSpec::new("proxy").namespace("shop");
    let spec = spec.select("app", "proxy").port(3128, 3128);
    scene.cluster.add_service(&spec)?;
    let rules = json!([{"backendRefs": [{"name": "proxy", "port": 3128}]}]);
    let to_proxy = route("HTTPRoute", "to-proxy", WEB, json!({"rules": rules}));
    scene.under(&[deny(), to_proxy], || {
        eventually("the proxy to answer", || {
            let shown = scene.get(&scene.client, WEB, "/", &[])?;
            ensure!(
                shown.code() == 200 && shown.body.contains("\"proxy\""),
                "{shown:?}"
            );
            Ok(())
        })
    })
}

fn tcp_route(scene: &Scene) -> Result<()> {
    let open = route("TCPRoute", "echo", ECHO, json!({"rules": [{}]}));
    scene.under(&[deny(), open], || {
        eventually("the other port to be closed", || {
            expect_denied(&scene.get(&scene.client, WEB, "/", &[])?)
        })?;
        eventually("the port to be open", || {
            expect_echo(&scene.client, scene.at(ECHO), "by a route").map(drop)
        })
    })
}

fn live_change(scene: &Scene) -> Result<()> {
    // What began when there were no networks, and when there was one that allows.
    let mut before = Pulse::start(&scene.client, scene.at(ECHO))?;
    let mut kept = Pulse::start(&scene.other, scene.at(ECHO))?;
    let allow = network("shop", "out", json!({"trafficPolicy": "Allow"}));
    scene.under(&[allow], || {
        let labels = [("parent_name", "out"), ("route_name", "http-egress-allow")];
        let name = "outbound_http_route_request_statuses_total";
        eventually("the network to be known", || {
            expect_from_outside(&scene.get(&scene.client, WEB, "/", &[])?)?;
            wait_for_metric(scene.cluster.node(0), name, &labels, 1.0).map(drop)
        })?;
        let mut after = Pulse::start(&scene.client, scene.at(ECHO))?;
        let socket = std::thread::scope(|scope| {
            let socket = scope.spawn(|| {
                let args = [
                    "--messages",
                    "1000000",
                    "--step",
                    "0",
                    "--timeout-ms",
                    "50000",
                ];
                websocket_echo(&scene.client, scene.at(SOCKETS), &args)
            });
            let switched = [("parent_name", "out"), ("http_status", "101")];
            wait_for_metric(scene.cluster.node(0), name, &switched, 1.0)?;
            ensure!(
                before.is_beating() && after.is_beating(),
                "ended by a network that allows"
            );
            scene.cluster.apply(&deny())?;
            for flow in [&mut before, &mut after] {
                let end = flow.wait_broken(Duration::from_secs(8))?;
                ensure!(end.outcome == "reset", "{end:?}");
            }
            let socket = socket.join();
            socket.map_err(|_| anyhow::anyhow!("the WebSocket's client panicked"))?
        });
        let socket = socket?;
        let late = socket.error.as_deref().unwrap_or("").contains("timed out");
        ensure!(
            socket.outcome != "ok" && !late,
            "the WebSocket went on: {socket:?}"
        );
        ensure!(kept.is_beating(), "another namespace's flow has ended");
        let labels = [("pod", "client"), ("reason", "policy_changed")];
        wait_for_metric(scene.cluster.node(0), "weft_refused_total", &labels, 2.0).map(drop)
    })?;
    kept.stop().map(drop)
}

fn unreadable(scene: &Scene) -> Result<()> {
    let misspelt = network("shop", "out", json!({"trafficPolicy": "allow"}));
    scene.under(&[misspelt], || {
        eventually("the network to close", || {
            expect_denied(&scene.get(&scene.client, WEB, "/", &[])?)
        })
    })
}

fn dump(scene: &Scene) -> Result<()> {
    scene.under(&[deny()], || {
        eventually("the network to be in the dump", || {
            let dump = scene.cluster.node(0).config_dump()?;
            let networks = dump.pointer("/policies/egress_networks");
            let first = networks.and_then(|it| it.get(0)).context("none")?;
            ensure!(
                first["name"] == "out" && first["traffic_policy"] == "Deny",
                "{first}"
            );
            Ok(())
        })
    })
}

const ECHO: u16 = 7020;
const WEB: u16 = 80;
const WEB_TOO: u16 = 8080;
const TLS: u16 = 443;
const CALLS: u16 = 7021;
const SOCKETS: u16 = 7022;
