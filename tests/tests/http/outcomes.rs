//! What is counted of exchanges that no server answers, or not to their end: answers of the mesh, clients that
//! go away, streams that break, connections that become something else.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use weft_tests::apps::curl_shop;
use weft_tests::manifests::{ServiceSpec, backend, http_route, server};
use weft_tests::metrics::{Metrics, wait_for_metric};
use weft_tests::scenario::eventually;
use weft_tests::webapp::{
    GrpcServer, HttpServer, grpc_call, raw, websocket_echo, websocket_server,
};
use weft_tests::{Checks, Pod};

use crate::stage::{Pair, Stage, expect_code, serving};

#[test]
fn http_outcomes() {
    let stage = Stage::build().expect("a cluster");
    let start = |pod| HttpServer::start(pod, HTTP, &["--quiet"]).expect("a server");
    let _servers = [&stage.far, &stage.near].map(start);
    let _grpc = GrpcServer::start(&stage.far, GRPC).expect("a server");
    let _websocket =
        [&stage.far, &stage.near].map(|pod| websocket_server(pod, WEBSOCKET).expect("a server"));
    let mut checks = Checks::new("http outcomes");
    let mut check = |name: &str, run: fn(&Stage) -> Result<()>| {
        checks.check(name, || run(&stage));
    };
    check("who is denied", denied);
    check("nobody is there", nobody);
    check("nothing listens", refused);
    check("no rule is for it, or the rule answers", no_rule);
    check("a request that is none", bad_request);
    check("a request that takes too long", late);
    stage.check_meshed(&mut checks, "a ServiceProfile classifies", classified);
    stage.check_meshed(&mut checks, "a server breaks off", broken_server);
    stage.check_meshed(
        &mut checks,
        "a client leaves before the answer",
        leaves_early,
    );
    stage.check_meshed(&mut checks, "a client leaves in its middle", leaves_late);
    stage.check_meshed(&mut checks, "a connection is upgraded", upgraded);
    checks.check("an upgraded connection is the balancer's too", || {
        outstanding(&stage)
    });
    checks.check("ordinary exchanges are no such thing", || ordinary(&stage));
    checks.finish();
}

/// What one pod counts of its exchanges of a direction.
struct Side<'a> {
    stage: &'a Stage,
    node: usize,
    labels: Vec<(&'a str, &'a str)>,
    before: Metrics,
}

impl<'a> Side<'a> {
    fn outbound(stage: &'a Stage) -> Result<Self> {
        Self::new(stage, 0, "outbound", &stage.client)
    }

    /// Both sides of a pair.
    fn both(stage: &'a Stage, pair: Pair<'a>) -> Result<[Self; 2]> {
        let node = usize::from(pair.server.name() == stage.far.name());
        let inbound = Self::new(stage, node, "inbound", pair.server)?;
        Ok([Self::outbound(stage)?, inbound])
    }

    fn new(stage: &'a Stage, node: usize, direction: &'a str, pod: &'a Pod) -> Result<Self> {
        Ok(Self {
            stage,
            node,
            labels: vec![("direction", direction), ("pod", pod.name())],
            before: stage.cluster.node(node).metrics()?,
        })
    }

    /// Waits until exactly so many exchanges more have begun, and as many have ended so.
    fn expect(&self, more: f64, ended: &[(&str, &str)]) -> Result<()> {
        let ended = [self.labels.as_slice(), ended].concat();
        self.grew("response_total", &ended, more)?;
        self.grew("response_total", &self.labels, more)?;
        self.grew("request_total", &self.labels, more)
    }

    /// Waits until exactly so many errors more were counted.
    fn errors(&self, error: &str, reason: &str, more: f64) -> Result<()> {
        let name = match self.labels[0].1 {
            "outbound" => "outbound_http_errors_total",
            _ => "inbound_http_errors_total",
        };
        let labels = [self.labels[1], ("error", error), ("reason", reason)];
        self.grew(name, &labels, more)
    }

    fn grew(&self, name: &str, labels: &[(&str, &str)], more: f64) -> Result<()> {
        let wanted = self.before.sum(name, labels) + more;
        let node = self.stage.cluster.node(self.node);
        let sum = wait_for_metric(node, name, labels, wanted)?;
        ensure!(
            (sum - wanted).abs() < 0.5,
            "{name}{labels:?} is {sum}, not {wanted}; there are\n{}",
            node.metrics()?.show(name)
        );
        Ok(())
    }
}

fn denied(stage: &Stage) -> Result<()> {
    let _closed = HttpServer::start(&stage.far, CLOSED, &["--quiet"])?;
    let mut guard = server("default", "closed", stage.far.name(), CLOSED);
    guard["spec"]["proxyProtocol"] = json!("HTTP/1");
    stage.cluster.apply(&guard)?;
    let target = stage.far.sockets(CLOSED)[0];
    // Who has said nothing when that is known is reset, and has asked for nothing.
    let ask = || {
        eventually("a request to be denied", || {
            expect_code(&curl_shop(&stage.client, target, "/", &[])?, 403)
        })
    };
    ask()?;
    let side = Side::outbound(stage)?;
    (0..5).try_for_each(|_| ask())?;
    // A status below 500, whoever says it, is a success of the server's: as with Linkerd.
    let ended = [
        ("status_code", "403"),
        ("classification", "success"),
        ("error", "UNKNOWN"),
        ("dst_pod", stage.far.name()),
    ];
    side.expect(5.0, &ended)?;
    side.errors("unexpected", "denied", 5.0)
}

fn nobody(stage: &Stage) -> Result<()> {
    let spec = ServiceSpec::new("empty").select("app", "nobody");
    let [address, _] = stage.cluster.add_service(&spec.port(80, HTTP))?;
    let target = SocketAddr::new(address, 80);
    let ask = || {
        eventually("a request to be answered", || {
            expect_code(&curl_shop(&stage.client, target, "/", &[])?, 503)
        })
    };
    ask()?;
    let side = Side::outbound(stage)?;
    (0..3).try_for_each(|_| ask())?;
    let service = [
        ("dst_service", "empty"),
        ("authority", "empty.default.svc.cluster.local:80"),
        ("classification", "failure"),
        ("error", "FAIL_FAST"),
    ];
    let status = ("status_code", "503");
    side.expect(3.0, &[service.as_slice(), &[status]].concat())?;
    side.errors("failfast", "no_endpoint", 3.0)?;
    let side = Side::outbound(stage)?;
    eventually("a call to be answered", || {
        let called = grpc_call(&stage.client, target, &[])?;
        ensure!(called.message == "no_endpoint", "{called:?}");
        Ok(())
    })?;
    let status = [("status_code", "200"), ("grpc_status", "14")];
    side.expect(1.0, &[service.as_slice(), &status].concat())
}

fn refused(stage: &Stage) -> Result<()> {
    let side = Side::outbound(stage)?;
    let target = stage.far.sockets(NOTHING)[0];
    eventually("a request to be answered", || {
        expect_code(&curl_shop(&stage.client, target, "/", &[])?, 502)
    })?;
    let ended = [
        ("status_code", "502"),
        ("classification", "failure"),
        ("error", "IO"),
    ];
    side.expect(1.0, &ended)?;
    side.errors("i/o", "connect_refused", 1.0)
}

/// Of a Service's clients; and at its server, of whom asks for it by its name.
fn classified(stage: &Stage, pair: Pair<'_>) -> Result<()> {
    let name = format!("classed-{}", pair.server.name());
    let spec = ServiceSpec::new(&name).select("app", pair.server.name());
    let target = serving(&stage.cluster, pair.client, &spec.port(80, HTTP), 80)?;
    stage.cluster.apply(&json!({
        "apiVersion": "linkerd.io/v1alpha2",
        "kind": "ServiceProfile",
        "metadata": {"name": format!("{name}.default.svc.cluster.local"), "namespace": "default"},
        "spec": {"routes": [{
            "name": "codes",
            "condition": {"pathRegex": "/status/.*"},
            "responseClasses": [
                {"condition": {"status": {"min": 500, "max": 501}}, "isFailure": false},
                {"condition": {"any": [{"status": {"max": 299}}, {"status": {"min": 404, "max": 404}}]},
                    "isFailure": true},
            ],
        }]},
    }))?;
    let host = format!("Host: {name}");
    let ask = |path: &str, host: &[&str]| curl_shop(pair.client, target, path, host);
    let named = ["--header", host.as_str()];
    let (status, is_failure) = (("status_code", "404"), ("classification", "failure"));
    for side in Side::both(stage, pair)? {
        let node = stage.cluster.node(side.node);
        let labels = [side.labels.as_slice(), &[status, is_failure]].concat();
        let before = side.before.sum("response_total", &labels);
        eventually("the ServiceProfile to be in effect", || {
            ask("/status/404", &named)?;
            let now = node.metrics()?.sum("response_total", &labels);
            ensure!(now > before, "{}", node.metrics()?.show("response_total"));
            Ok(())
        })?;
    }
    // (path, headers) -> (status, what it counts as at the client and at the server)
    for (path, host, status, classes) in [
        ("/status/404", &named[..], "404", ["failure", "failure"]),
        ("/status/200", &named, "200", ["failure", "failure"]),
        ("/status/500", &named, "500", ["success", "success"]),
        ("/status/503", &named, "503", ["failure", "failure"]),
        ("/status/403", &named, "403", ["success", "success"]),
        // No route of it is for this one.
        ("/", &named, "200", ["success", "success"]),
        // The server cannot know by which Service it is asked.
        ("/status/404", &[], "404", ["failure", "success"]),
    ] {
        let sides = Side::both(stage, pair)?;
        ask(path, host)?;
        for (side, class) in sides.iter().zip(classes) {
            let ended = [("status_code", status), ("classification", class)];
            side.expect(1.0, &ended)
                .with_context(|| format!("{path} {host:?}"))?;
        }
    }
    Ok(())
}

fn no_rule(stage: &Stage) -> Result<()> {
    let spec = ServiceSpec::new("ruled").select("app", "far");
    let target = serving(&stage.cluster, &stage.client, &spec.port(80, HTTP), 80)?;
    let rules = json!([
        {"matches": [{"path": {"type": "Exact", "value": "/here"}}],
         "backendRefs": [backend("ruled", 80, 1)]},
        {"matches": [{"path": {"type": "Exact", "value": "/moved"}}],
         "filters": [{"type": "RequestRedirect",
            "requestRedirect": {"hostname": "elsewhere", "statusCode": 301}}]},
    ]);
    let route = http_route("default", "ruled", "ruled", 80, &rules);
    stage.cluster.apply(&route)?;
    eventually("the route to be in effect", || {
        expect_code(&curl_shop(&stage.client, target, "/nowhere", &[])?, 404)
    })?;
    let side = Side::outbound(stage)?;
    expect_code(&curl_shop(&stage.client, target, "/nowhere", &[])?, 404)?;
    let ended = [("status_code", "404"), ("error", "UNKNOWN")];
    side.expect(
        1.0,
        &[ended.as_slice(), &[("dst_service", "ruled")]].concat(),
    )?;
    side.errors("unexpected", "no_rule", 1.0)?;
    let side = Side::outbound(stage)?;
    expect_code(&curl_shop(&stage.client, target, "/moved", &[])?, 301)?;
    side.expect(
        1.0,
        &[("status_code", "301"), ("classification", "success")],
    )?;
    stage.cluster.remove(&route)
}

fn late(stage: &Stage) -> Result<()> {
    let spec = ServiceSpec::new("slow").select("app", "far");
    let target = serving(&stage.cluster, &stage.client, &spec.port(80, HTTP), 80)?;
    let rules = json!([
        {"timeouts": {"request": "300ms"}, "backendRefs": [backend("slow", 80, 1)]},
    ]);
    let route = http_route("default", "slow", "slow", 80, &rules);
    stage.cluster.apply(&route)?;
    eventually("the route to be in effect", || {
        let shown = curl_shop(&stage.client, target, "/delay/1000", &[])?;
        expect_code(&shown, 504)
    })?;
    let side = Side::outbound(stage)?;
    let shown = curl_shop(&stage.client, target, "/delay/20000", &[])?;
    expect_code(&shown, 504)?;
    let ended = [
        ("status_code", "504"),
        ("classification", "failure"),
        ("error", "REQUEST_TIMEOUT"),
        ("dst_pod", stage.far.name()),
    ];
    side.expect(1.0, &ended)?;
    side.errors("response timeout", "request_timeout", 1.0)?;
    stage.cluster.remove(&route)
}

fn bad_request(stage: &Stage) -> Result<()> {
    let side = Side::outbound(stage)?;
    let request = "GET / HTTP/1.1\\r\\nHost: a\\r\\nHost: b\\r\\n\\r\\n";
    let raw = raw(&stage.client, stage.far.sockets(HTTP)[0], &[request], &[])?;
    ensure!(raw.statuses == [400], "{raw:?}");
    side.expect(1.0, &[("status_code", "400"), ("error", "UNKNOWN")])?;
    side.errors("unexpected", "bad_request", 1.0)
}

fn broken_server(stage: &Stage, pair: Pair<'_>) -> Result<()> {
    for version in VERSIONS {
        let sides = Side::both(stage, pair)?;
        expect_code(
            &curl_shop(pair.client, pair.at(HTTP), "/reset", &[version])?,
            502,
        )?;
        for side in &sides {
            let ended = [("status_code", "502"), ("classification", "failure")];
            side.expect(1.0, &ended)?;
        }
        // Where it was answered: between nodes that is the server's.
        let here = usize::from(pair.server.name() == stage.far.name());
        sides[here].errors("i/o", "server_failed", 1.0)?;
    }
    Ok(())
}

/// A server that hangs makes its clients leave: that is no success.
fn leaves_early(stage: &Stage, pair: Pair<'_>) -> Result<()> {
    let target = pair.at(HTTP);
    // One of HTTP/1 that closes in order may still wait for its answer.
    let script = format!(
        "import socket, struct, time
stream = socket.create_connection(('{}', {}))
stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
stream.sendall(b'GET /delay/20000 HTTP/1.1\\r\\nHost: shop\\r\\n\\r\\n')
time.sleep(0.3)
stream.close()
",
        target.ip(),
        target.port()
    );
    for version in VERSIONS {
        let sides = Side::both(stage, pair)?;
        if version == "--http1.1" {
            let python = pair.client.command("python3")?;
            python.args(["-c", &script]).run()?;
        } else {
            let args = [version, "--max-time", "0.3"];
            let left = curl_shop(pair.client, target, "/delay/20000", &args)?;
            ensure!(left.exit == 28, "{left:?}");
        }
        for side in &sides {
            let ended = [("classification", "failure"), ("error", "CANCEL")];
            side.expect(1.0, &ended)
                .with_context(|| format!("{version}, {:?}", side.labels))?;
        }
    }
    Ok(())
}

/// A client that has heard enough is the server's success, as its status was: as with Linkerd.
fn leaves_late(stage: &Stage, pair: Pair<'_>) -> Result<()> {
    for version in VERSIONS {
        let sides = Side::both(stage, pair)?;
        let args = [version, "--max-time", "0.5"];
        let path = "/stream?chunks=100&interval=200&bytes=100";
        let left = curl_shop(pair.client, pair.at(HTTP), path, &args)?;
        ensure!(left.exit == 28 && left.code() == 200, "{left:?}");
        for side in &sides {
            let ended = [
                ("status_code", "200"),
                ("classification", "success"),
                ("error", "CANCEL"),
            ];
            side.expect(1.0, &ended)
                .with_context(|| format!("{version}, {:?}", side.labels))?;
        }
    }
    Ok(())
}

fn upgraded(stage: &Stage, pair: Pair<'_>) -> Result<()> {
    let sides = Side::both(stage, pair)?;
    let echoed = websocket_echo(pair.client, pair.at(WEBSOCKET), &["--messages", "3"])?;
    ensure!(echoed.outcome == "ok", "{echoed:?}");
    let ended = [("status_code", "101"), ("classification", "success")];
    sides.iter().try_for_each(|side| side.expect(1.0, &ended))
}

/// An endpoint that holds many WebSockets is seen to.
fn outstanding(stage: &Stage) -> Result<()> {
    let spec = ServiceSpec::new("chat").select("app", "far");
    let [address, _] = stage.cluster.add_service(&spec.port(80, WEBSOCKET))?;
    let target = SocketAddr::new(address, 80);
    eventually("the Service to answer", || {
        let echoed = websocket_echo(&stage.client, target, &["--messages", "1"])?;
        ensure!(echoed.outcome == "ok", "{echoed:?}");
        Ok(())
    })?;
    let now = || -> Result<u64> {
        let chat = stage.cluster.node(0).known_service("chat")?;
        let chat = chat.context("chat")?;
        sum_of(&chat, "outstanding").with_context(|| format!("outstanding in {chat}"))
    };
    let expect = |wanted: u64| {
        eventually(&format!("{wanted} to be outstanding"), || {
            let outstanding = now()?;
            ensure!(outstanding == wanted, "{outstanding} are");
            Ok(())
        })
    };
    expect(0)?;
    let script = format!(
        "import socket, time
streams = [socket.create_connection(('{address}', 80)) for _ in range(3)]
for stream in streams:
    stream.sendall(b'{UPGRADE}')
    assert b' 101 ' in stream.recv(4096)
time.sleep(600)
"
    );
    let python = stage.client.command("python3")?;
    let chatting = python.args(["-c", &script]).spawn()?;
    expect(3)?;
    drop(chatting);
    expect(0)
}

/// The sum of all numbers of a name within a value.
fn sum_of(value: &Value, name: &str) -> Option<u64> {
    let parts: Vec<u64> = match value {
        Value::Object(fields) => fields
            .iter()
            .filter_map(|(key, it)| match it.as_u64() {
                Some(number) if key == name => Some(number),
                _ => sum_of(it, name),
            })
            .collect(),
        Value::Array(items) => items.iter().filter_map(|it| sum_of(it, name)).collect(),
        _ => return None,
    };
    (!parts.is_empty()).then(|| parts.iter().sum())
}

/// What ends as it should is not taken for given up, however it is framed.
fn ordinary(stage: &Stage) -> Result<()> {
    for pair in stage.meshed().map(|(_, pair)| pair) {
        for version in VERSIONS {
            for (path, args) in [
                ("/", [].as_slice()),
                ("/", &["--head"]),
                ("/bytes/0", &[]),
                ("/bytes/300000", &[]),
                ("/stream?chunks=3&interval=10&bytes=10", &[]),
                ("/echo", &["--data", "some"]),
            ] {
                // The server of this test gives such an answer a body, which is none of HTTP/2.
                if args == ["--head"] && version != "--http1.1" {
                    continue;
                }
                let args = [args, &[version]].concat();
                ends_well(stage, pair, path, &args)
                    .with_context(|| format!("{path} {args:?} of {}", pair.server.name()))?;
            }
        }
    }
    Ok(())
}

fn ends_well(stage: &Stage, pair: Pair<'_>, path: &str, args: &[&str]) -> Result<()> {
    let sides = Side::both(stage, pair)?;
    let shown = curl_shop(pair.client, pair.at(HTTP), path, args)?;
    ensure!(shown.exit == 0, "{shown:?}");
    for side in &sides {
        side.expect(1.0, &[("classification", "success")])?;
        let given_up = [side.labels.as_slice(), &[("error", "CANCEL")]].concat();
        side.grew("response_total", &given_up, 0.0)?;
    }
    Ok(())
}

const VERSIONS: [&str; 2] = ["--http1.1", "--http2-prior-knowledge"];
const UPGRADE: &str = "GET /chat HTTP/1.1\\r\\nHost: shop\\r\\nConnection: Upgrade\\r\\nUpgrade: websocket\\r\\nSec-WebSocket-Version: 13\\r\\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\\r\\n\\r\\n";
const HTTP: u16 = 8080;
const GRPC: u16 = 9090;
const WEBSOCKET: u16 = 8091;
const CLOSED: u16 = 8087;
/// Nothing listens there.
const NOTHING: u16 = 8999;
