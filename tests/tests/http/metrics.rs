//! What is counted of requests: on both nodes, under Linkerd's names, and as a canary's controller
//! asks for it.

use anyhow::{Context, Result, ensure};
use serde_json::json;
use weft_tests::apps::{Prometheus, curl_shop};
use weft_tests::manifests::{ServiceSpec, server};
use weft_tests::metrics::{Metrics, wait_for_metric};
use weft_tests::scenario::eventually;
use weft_tests::webapp::{GrpcServer, HttpLoad, HttpServer, grpc_call, http_load};
use weft_tests::{Checks, DEADLINE, wait_for};

use crate::stage::{Stage, expect_code, serving};

#[test]
fn http_metrics() {
    let stage = Stage::build().expect("a cluster");
    let start = |pod| HttpServer::start(pod, HTTP, &["--quiet"]).expect("a server");
    let _servers = [&stage.far, &stage.near].map(start);
    let _grpc = GrpcServer::start(&stage.far, GRPC).expect("a server");
    let mut checks = Checks::new("http metrics");
    let mut check = |name: &str, run: fn(&Stage) -> Result<()>| {
        checks.check(name, || run(&stage));
    };
    check("requests are counted on both nodes", requests);
    check("failures are told from successes", classification);
    check("calls are counted by their status", calls);
    check("latency is in Linkerd's buckets", latency);
    check("on one node, both sides are counted", one_node);
    check("a Service's name is on what was asked of it", service);
    check("policy's decisions are counted by request", decisions);
    check("hosts that are known are authorities", authorities);
    check("what clients make up makes no series", bounded);
    check("every metric is in the documentation", documented);
    checks.finish();
}

/// The labels of requests of the client to `far`, as its own node has them.
fn outbound<'a>(stage: &'a Stage, identity: &'a str) -> Vec<(&'static str, &'a str)> {
    vec![
        ("direction", "outbound"),
        ("namespace", "default"),
        ("deployment", "shop"),
        ("pod", stage.client.name()),
        ("dst_namespace", "default"),
        ("dst_pod", stage.far.name()),
        ("tls", "true"),
        ("server_id", identity),
    ]
}

/// The same as the server's node has them.
fn inbound<'a>(stage: &'a Stage, identity: &'a str) -> Vec<(&'static str, &'a str)> {
    vec![
        ("direction", "inbound"),
        ("namespace", "default"),
        ("deployment", "api"),
        ("pod", stage.far.name()),
        ("tls", "true"),
        ("client_id", identity),
    ]
}

/// Waits until both nodes have counted exactly so many more with these further labels than before.
fn expect_more(
    stage: &Stage,
    before: &[Metrics; 2],
    name: &str,
    further: &[(&str, &str)],
    more: f64,
) -> Result<()> {
    let (client_id, server_id) = (stage.client.identity(), stage.far.identity());
    let sides = [outbound(stage, &server_id), inbound(stage, &client_id)];
    for (node, labels) in sides.into_iter().enumerate() {
        let labels = [labels.as_slice(), further].concat();
        let wanted = before[node].sum(name, &labels) + more;
        let value = wait_for_metric(stage.cluster.node(node), name, &labels, wanted)?;
        ensure!(
            (value - wanted).abs() < 0.5,
            "{name}{labels:?} is {value}, not {wanted}"
        );
    }
    Ok(())
}

fn scrape(stage: &Stage) -> Result<[Metrics; 2]> {
    Ok([
        stage.cluster.node(0).metrics()?,
        stage.cluster.node(1).metrics()?,
    ])
}

fn requests(stage: &Stage) -> Result<()> {
    for args in [
        [].as_slice(),
        &["--http2", "--streams", "4"],
        &["--connections", "5"],
    ] {
        let before = scrape(stage)?;
        let target = stage.far.sockets(HTTP)[0];
        http_load(&stage.client, target, 40, args)?.expect_all("200")?;
        expect_more(stage, &before, "request_total", &[], 40.0)?;
        let success = [("classification", "success"), ("status_code", "200")];
        expect_more(stage, &before, "response_total", &success, 40.0)?;
        expect_more(stage, &before, "response_latency_ms_count", &[], 40.0)?;
    }
    Ok(())
}

fn classification(stage: &Stage) -> Result<()> {
    let before = scrape(stage)?;
    let cases = [
        (201, "success"),
        (302, "success"),
        (404, "success"),
        (500, "failure"),
        (503, "failure"),
    ];
    for (code, _) in cases {
        let path = format!("/status/{code}");
        expect_code(
            &curl_shop(&stage.client, stage.far.sockets(HTTP)[0], &path, &[])?,
            code,
        )?;
    }
    for (code, classification) in cases {
        let code = code.to_string();
        let labels = [
            ("classification", classification),
            ("status_code", code.as_str()),
        ];
        expect_more(stage, &before, "response_total", &labels, 1.0)?;
    }
    // A server that breaks off has failed, whatever it had said before.
    let broken = curl_shop(&stage.client, stage.far.sockets(HTTP)[0], "/reset", &[])?;
    ensure!(broken.exit != 0 || broken.code() >= 500, "{broken:?}");
    let failure = [
        ("classification", "failure"),
        ("direction", "outbound"),
        ("pod", "client"),
    ];
    let failed = before[0].sum("response_total", &failure) + 3.0;
    wait_for_metric(stage.cluster.node(0), "response_total", &failure, failed).map(drop)
}

fn calls(stage: &Stage) -> Result<()> {
    let before = scrape(stage)?;
    let cases = [
        ("0", "success"),
        ("5", "success"),
        ("13", "failure"),
        ("14", "failure"),
        ("4", "failure"),
    ];
    for (code, _) in cases {
        let args = ["--code", code];
        let called = grpc_call(&stage.client, stage.far.sockets(GRPC)[0], &args)?;
        ensure!(called.code.to_string() == code, "{called:?}");
    }
    for (code, classification) in cases {
        let labels = [
            ("classification", classification),
            ("grpc_status", code),
            ("status_code", "200"),
        ];
        expect_more(stage, &before, "response_total", &labels, 1.0)?;
    }
    Ok(())
}

/// A request of 200 ms is in the buckets above that, and in none below 100.
fn latency(stage: &Stage) -> Result<()> {
    let before = scrape(stage)?;
    let target = stage.far.sockets(HTTP)[0];
    expect_code(&curl_shop(&stage.client, target, "/delay/200", &[])?, 200)?;
    expect_more(stage, &before, "response_latency_ms_count", &[], 1.0)?;
    for (bucket, more) in [("100.0", 0.0), ("5000.0", 1.0), ("+Inf", 1.0)] {
        expect_more(
            stage,
            &before,
            "response_latency_ms_bucket",
            &[("le", bucket)],
            more,
        )?;
    }
    let metrics = stage.cluster.node(1).metrics()?;
    let identity = stage.client.identity();
    let labels = inbound(stage, &identity);
    let found: std::collections::BTreeSet<&str> = metrics
        .find("response_latency_ms_bucket", &labels)
        .filter_map(|sample| sample.labels.get("le").map(String::as_str))
        .collect();
    for bucket in LINKERD_BUCKETS {
        let written = found
            .iter()
            .any(|it| it.parse::<f64>().is_ok_and(|it| it == bucket));
        ensure!(written, "no bucket {bucket} in {found:?}");
    }
    Ok(())
}

fn one_node(stage: &Stage) -> Result<()> {
    http_load(&stage.client, stage.near.sockets(HTTP)[0], 10, &[])?.expect_all("200")?;
    let client_id = stage.client.identity();
    for labels in [
        [
            ("direction", "outbound"),
            ("pod", "client"),
            ("dst_pod", "near"),
        ],
        [
            ("direction", "inbound"),
            ("pod", "near"),
            ("client_id", client_id.as_str()),
        ],
    ] {
        wait_for_metric(stage.cluster.node(0), "request_total", &labels, 10.0)?;
        wait_for_metric(stage.cluster.node(0), "response_total", &labels, 10.0)?;
    }
    Ok(())
}

fn service(stage: &Stage) -> Result<()> {
    let spec = ServiceSpec::new("api").select("app", "far").port(80, HTTP);
    let target = serving(&stage.cluster, &stage.client, &spec, 80)?;
    http_load(
        &stage.client,
        target,
        10,
        &["--host", "api.default.svc.cluster.local"],
    )?;
    let labels = [
        ("direction", "outbound"),
        ("dst_service", "api"),
        ("dst_namespace", "default"),
        ("dst_pod", "far"),
        ("authority", "api.default.svc.cluster.local:80"),
    ];
    wait_for_metric(stage.cluster.node(0), "request_total", &labels, 10.0).map(drop)?;
    let labels = [
        ("direction", "inbound"),
        ("pod", "far"),
        ("authority", "api.default.svc.cluster.local:80"),
    ];
    wait_for_metric(stage.cluster.node(1), "request_total", &labels, 10.0).map(drop)
}

/// Only what the mesh knows becomes the authority of what comes in, on both ways.
fn authorities(stage: &Stage) -> Result<()> {
    let spec = ServiceSpec::new("named").select("app", "far");
    let target = serving(&stage.cluster, &stage.client, &spec.port(80, HTTP), 80)?;
    for (node, server) in [(1, &stage.far), (0, &stage.near)] {
        let own = server.sockets(HTTP)[0];
        let node = stage.cluster.node(node);
        let by_pod = format!("{}.named", server.name());
        for (host, authority) in [
            ("named", "named.default.svc.cluster.local:80"),
            ("Named.default.svc:80", "named.default.svc.cluster.local:80"),
            (&by_pod, &format!("{by_pod}.default.svc.cluster.local:80")),
            (&own.to_string(), &own.to_string()),
            ("nobody", "other"),
            ("named:81", "other"),
            ("shop.example.com", "other"),
            ("10.244.77.77:8080", "other"),
        ] {
            let labels = [
                ("direction", "inbound"),
                ("pod", server.name()),
                ("authority", authority),
            ];
            let wanted = node.metrics()?.sum("request_total", &labels) + 3.0;
            http_load(&stage.client, own, 3, &["--host", host])?.expect_all("200")?;
            let counted = wait_for_metric(node, "request_total", &labels, wanted)?;
            ensure!(
                (counted - wanted).abs() < 0.5,
                "{host}: {counted}, not {wanted}"
            );
        }
    }
    ensure!(target.port() == 80, "{target}");
    Ok(())
}

/// Requests that were allowed on both ways, and on one node those that were not.
fn decisions(stage: &Stage) -> Result<()> {
    let client_id = stage.client.identity();
    let client_id = ("client_id", client_id.as_str());
    for (node, server, same_node) in [(1, &stage.far, false), (0, &stage.near, true)] {
        let mut labels = vec![client_id, ("pod", server.name()), ("tls", "true")];
        if same_node {
            labels.push(("no_tls_reason", "same_node"));
        }
        let allowed = ("authz_name", "default:all-unauthenticated");
        let labels = [labels, vec![allowed, ("route_name", "default")]].concat();
        let node = stage.cluster.node(node);
        let before = node
            .metrics()?
            .sum("inbound_http_authz_allow_total", &labels);
        http_load(&stage.client, server.sockets(HTTP)[0], 20, &[])?.expect_all("200")?;
        let wanted = before + 20.0;
        let counted = wait_for_metric(node, "inbound_http_authz_allow_total", &labels, wanted)?;
        ensure!((counted - wanted).abs() < 0.5, "{counted} of {wanted}");
    }
    let _closed = HttpServer::start(&stage.near, CLOSED, &["--quiet"])?;
    let mut guard = server("default", "closed", stage.near.name(), CLOSED);
    guard["spec"]["proxyProtocol"] = json!("HTTP/1");
    stage.cluster.apply(&guard)?;
    let target = stage.near.sockets(CLOSED)[0];
    // Who has said nothing when that is known is reset, and has asked for nothing.
    let ask = || {
        eventually("a request to be denied", || {
            expect_code(&curl_shop(&stage.client, target, "/", &[])?, 403)
        })
    };
    ask()?;
    let labels = [
        client_id,
        ("pod", stage.near.name()),
        ("srv_group", "policy.weft.dev"),
        ("srv_kind", "server"),
        ("srv_name", "closed"),
        ("srv_port", "8086"),
        ("authz_kind", "default"),
    ];
    let node = stage.cluster.node(0);
    let before = node
        .metrics()?
        .sum("inbound_http_authz_deny_total", &labels);
    (0..7).try_for_each(|_| ask())?;
    let denied = wait_for_metric(node, "inbound_http_authz_deny_total", &labels, before + 7.0)?;
    ensure!(denied - before < 7.5, "{denied} after {before}");
    stage.cluster.remove(&guard)
}

/// Ten thousand hosts, methods and paths, and seven hundred statuses later there are hardly more series than
/// before.
fn bounded(stage: &Stage) -> Result<()> {
    let before = scrape(stage)?;
    let target = stage.far.sockets(HTTP)[0];
    let script = format!(
        "import http.client
connection = http.client.HTTPConnection('{}', {})
for number in range(10000):
    path = f'/status/{{200 + number % 700}}?made-up-{{number}}'
    host = f'host-{{number}}.made-up.example'
    connection.request(f'MADEUP{{number}}' if number else 'GET', path, headers={{'Host': host}})
    connection.getresponse().read()
print('all')
",
        target.ip(),
        target.port()
    );
    let python = stage.client.command("python3")?.args(["-c", &script]);
    let said = python
        .output(std::time::Duration::from_secs(120))?
        .success()?;
    ensure!(said.trim() == "all", "{said}");
    expect_more(stage, &before, "request_total", &[], 10_000.0)?;
    let after = scrape(stage)?;
    for (node, (before, after)) in before.iter().zip(&after).enumerate() {
        // Of the hosts: those that are not known, and those that are too many. Of statuses 16, and the others.
        for (name, most) in [("request_total", 2), ("response_total", 2 * 17)] {
            let count = |metrics: &Metrics| metrics.find(name, &[]).count();
            let (before, after) = (count(before), count(after));
            println!("{name} of n{node}: {before} series, then {after}");
            ensure!(after <= before + most, "{before} {name} became {after}");
        }
        let mut values = after
            .samples()
            .iter()
            .flat_map(|sample| sample.labels.values());
        let leaked = values.find(|value| value.contains("made-up") || value.contains("MADEUP"));
        ensure!(leaked.is_none(), "a client made the label value {leaked:?}");
    }
    let overflow = [("pod", stage.far.name())];
    let counted = after[1].sum("weft_metrics_overflow_total", &overflow);
    ensure!(counted > 9000.0, "{counted} went to a common series");
    Ok(())
}

/// What the agents tell after all of the above is in the table of docs/operations.md.
fn documented(stage: &Stage) -> Result<()> {
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/operations.md");
    let page = std::fs::read_to_string(page)?;
    for metrics in scrape(stage)? {
        for sample in metrics.samples() {
            let name = &sample.name;
            let of_histogram = ["_bucket", "_sum", "_count"]
                .into_iter()
                .find_map(|it| name.strip_suffix(it));
            let is_there = [Some(name.as_str()), of_histogram]
                .into_iter()
                .flatten()
                .any(|it| page.contains(&format!("`{it}`")));
            ensure!(is_there, "{name} is not in docs/operations.md");
        }
    }
    Ok(())
}

#[test]
fn http_prometheus() {
    let stage = Stage::build().expect("a cluster");
    let mut checks = Checks::new("http prometheus");
    checks.check("Prometheus answers a canary's questions", || canary(&stage));
    checks.finish();
}

/// The two queries of Flagger's provider for Linkerd, over a minute in which a tenth fails.
fn canary(stage: &Stage) -> Result<()> {
    let server = HttpServer::start(&stage.far, HTTP, &["--quiet"])?;
    let nodes: Vec<_> = stage.cluster.nodes().iter().collect();
    let prometheus = Prometheus::start(&nodes)?;
    prometheus.wait_scraped(nodes.len())?;
    let target = stage.far.sockets(HTTP)[0];
    server.configure(&stage.far, 5, 200)?;
    let good = HttpLoad::start(&stage.client, target, &["--pause-ms", "5"])?;
    let series = r#"namespace="default",deployment=~"api""#;
    let success = format!(
        r#"sum(rate(response_total{{{series},classification!="failure",direction="inbound"}}[1m])) / sum(rate(response_total{{{series},direction="inbound"}}[1m])) * 100"#
    );
    let latency = format!(
        r#"histogram_quantile(0.99, sum(rate(response_latency_ms_bucket{{{series},direction="inbound"}}[1m])) by (le))"#
    );
    let all = prometheus.wait_query(&success)?;
    ensure!((all - 100.0).abs() < 0.01, "{all} % succeed, but all did");
    let p99 = prometheus.wait_query(&latency)?;
    // The server waits for 5 ms, and the machine may be busy.
    ensure!(
        (4.0..400.0).contains(&p99),
        "the 99th percentile is {p99} ms"
    );
    good.stop()?.expect_all("200")?;
    let bad = HttpLoad::start(
        &stage.client,
        target,
        &["--pause-ms", "5", "--path", "/status/500"],
    )?;
    wait_for("failures to show in the rate", DEADLINE, || {
        let rate = prometheus.query(&success)?.context("no value")?;
        Ok((rate < 95.0).then_some(()))
    })?;
    bad.stop()?.expect_all("500")?;
    eventually("both nodes to be told apart", || {
        let by_direction = |direction: &str| {
            let query = format!(r#"sum(request_total{{direction="{direction}"}})"#);
            prometheus.query(&query)
        };
        let (out, inside) = (by_direction("outbound")?, by_direction("inbound")?);
        ensure!(
            out == inside && out.is_some(),
            "{out:?} went out, {inside:?} came in"
        );
        Ok(())
    })
}

/// The upper bounds of linkerd2-proxy's latency histograms, in ms.
const LINKERD_BUCKETS: [f64; 26] = [
    1.0,
    2.0,
    3.0,
    4.0,
    5.0,
    10.0,
    20.0,
    30.0,
    40.0,
    50.0,
    100.0,
    200.0,
    300.0,
    400.0,
    500.0,
    1e3,
    2e3,
    3e3,
    4e3,
    5e3,
    1e4,
    2e4,
    3e4,
    4e4,
    5e4,
    f64::INFINITY,
];
const HTTP: u16 = 8080;
const CLOSED: u16 = 8086;
const GRPC: u16 = 9090;
