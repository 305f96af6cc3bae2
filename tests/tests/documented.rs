//! The examples of docs/policy.md, docs/http.md and the pages for beginners, applied as they are written there: the controller
//! has nothing to say against any, and those of the main features do what their page says.

#[path = "documented/network.rs"]
mod network;

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use weft_tests::apps::{Shown, curl_shop};
use weft_tests::manifests::{ServiceSpec, namespace};
use weft_tests::metrics::wait_for_metric;
use weft_tests::scenario::eventually;
use weft_tests::webapp::{GrpcServer, HttpServer, grpc_call, http_load, raw};
use weft_tests::{Checks, Cluster, Pod, PodSpec, http, wait_for};

const PAGES: [(&str, &str); 4] = [
    ("docs/policy.md", include_str!("../../docs/policy.md")),
    ("docs/http.md", include_str!("../../docs/http.md")),
    (
        "docs/getting-started.md",
        include_str!("../../docs/getting-started.md"),
    ),
    ("docs/tasks.md", include_str!("../../docs/tasks.md")),
];

/// An example, and the heading that it stands below.
struct Example {
    page: &'static str,
    heading: String,
    yaml: String,
}

struct Scene {
    examples: Vec<Example>,
    order: Pod,
    reports: Pod,
    other: Pod,
    monitor: Pod,
    payment: Pod,
    _versions: [Pod; 2],
    ledgers: [Pod; 2],
    /// Of payment; the port for metrics.
    servers: [HttpServer; 2],
    of_versions: [HttpServer; 2],
    of_ledgers: [HttpServer; 2],
    _of_quotes: (GrpcServer, Pod),
    /// The Service payment.
    service: SocketAddr,
    /// The Service quotes.
    quotes: SocketAddr,
    cluster: Cluster,
}

#[test]
fn documented() {
    let scene = Scene::build().expect("a cluster");
    let mut checks = Checks::new("documented");
    for example in &scene.examples {
        let name = format!("{}: {} is accepted", example.page, example.heading);
        checks.check(&name, || accepted(&scene, example));
    }
    let mut check = |name: &str, run: fn(&Scene) -> Result<()>| {
        checks.check(name, || run(&scene));
    };
    check("one caller, one server", one_caller);
    check("routes of a Server", routes_of_a_server);
    check("calls at a Server", calls_at_a_server);
    check("rate limit", rate_limit);
    check("NetworkPolicy", network::network_policy);
    check("What leaves a pod", network::what_leaves_a_pod);
    check("split", split);
    check("timeout", timeout);
    check("retry", retry);
    check("circuit breaking", circuit_breaking);
    check("circuit breaking by share", breaking_by_share);
    check("timeouts of a Service", timeouts_of_a_service);
    check("retries of a rule", retries_of_a_rule);
    check("retries of calls", retries_of_calls);
    check("ServiceProfile", service_profile);
    checks.finish();
}

impl Scene {
    fn build() -> Result<Scene> {
        let mut all = vec![];
        for (page, text) in PAGES {
            all.extend(examples(page, text)?);
        }
        // For kustomize.
        all.retain(|it| !it.yaml.contains("kind: Kustomization"));
        let cluster = Cluster::start()?;
        let add = |name: &str, spec: fn(PodSpec) -> PodSpec| {
            cluster.add_pod(spec(PodSpec::new(name).namespace("production")))
        };
        let order = add("order", |it| it.service_account("order-service"))?;
        let reports = add("reports", |it| it)?;
        let other = add("other", |it| it)?;
        let payment = add("payment", |it| it.on(1).port("metrics", METRICS))?;
        let versions = [
            add("payment-v1", |it| it.on(1))?,
            add("payment-v2", |it| it.on(1))?,
        ];
        let ledgers = [
            add("ledger-0", |it| it.on(1).label("app", "ledger"))?,
            add("ledger-1", |it| it.on(1).label("app", "ledger"))?,
        ];
        let team = namespace("monitoring", &json!({"team": "monitoring"}));
        cluster.apply(&team)?;
        let monitor = cluster.add_pod(PodSpec::new("monitor").namespace("monitoring"))?;
        let start = |pod, port| HttpServer::start(pod, port, &[]);
        let servers = [start(&payment, HTTP)?, start(&payment, METRICS)?];
        let of_versions = [start(&versions[0], HTTP)?, start(&versions[1], HTTP)?];
        let of_ledgers = [start(&ledgers[0], HTTP)?, start(&ledgers[1], HTTP)?];
        let service = |name: &str| {
            let spec = ServiceSpec::new(name).namespace("production");
            cluster.add_service(&spec.select("app", name).port(80, HTTP))
        };
        let [address, _] = service("payment")?;
        service("payment-v1")?;
        service("payment-v2")?;
        let pod = add("quotes", |it| it.on(1))?;
        let of_quotes = (GrpcServer::start(&pod, CALLS)?, pod);
        let spec = ServiceSpec::new("quotes").namespace("production");
        let [quotes, _] = cluster.add_service(&spec.select("app", "quotes").port(CALLS, CALLS))?;
        let scene = Scene {
            examples: all,
            order,
            reports,
            other,
            monitor,
            payment,
            _versions: versions,
            ledgers,
            servers,
            of_versions,
            of_ledgers,
            _of_quotes: of_quotes,
            service: SocketAddr::new(address, 80),
            quotes: SocketAddr::new(quotes, CALLS),
            cluster,
        };
        eventually("the Service to answer", || {
            expect(&scene.order, scene.service, "/", 200).map(drop)
        })?;
        Ok(scene)
    }

    /// Applies the examples below these headings, and takes them away afterwards.
    fn with(&self, headings: &[&str], run: impl FnOnce() -> Result<()>) -> Result<()> {
        let manifests = self.cluster.manifests();
        for heading in headings {
            let mut found = self.examples.iter();
            let found = found.find(|it| it.heading == *heading);
            let example = found.with_context(|| format!("no example below {heading:?}"))?;
            manifests.apply(&example.file(), &example.yaml)?;
        }
        let outcome = run();
        for heading in headings {
            let mut found = self.examples.iter();
            if let Some(example) = found.find(|it| it.heading == *heading) {
                manifests.remove(&example.file())?;
            }
        }
        outcome
    }

    fn at_payment(&self, port: u16) -> SocketAddr {
        self.payment.sockets(port)[0]
    }

    fn ledgers_answer(&self, status: u16) -> Result<()> {
        let mut both = self.of_ledgers.iter().zip(&self.ledgers);
        both.try_for_each(|(server, pod)| server.configure(pod, 0, status))
    }

    fn problems(&self) -> Result<String> {
        let controller = self.cluster.controller()?;
        let reply = http::get(controller.netns(), controller.admin_address(), "/problems")?;
        reply.ok()
    }
}

impl Example {
    fn file(&self) -> String {
        let words = |it: char| if it.is_ascii_alphanumeric() { it } else { '-' };
        let name = format!("{}-{}", self.page, self.heading);
        name.to_lowercase().chars().map(words).collect()
    }
}

/// Fenced YAML, each with the heading before it.
fn examples(page: &'static str, text: &str) -> Result<Vec<Example>> {
    let mut found: Vec<Example> = vec![];
    let mut heading = String::new();
    let mut is_inside = false;
    for line in text.lines() {
        if is_inside {
            is_inside = line != "```";
            let last = found.last_mut().filter(|_| is_inside);
            if let Some(example) = last {
                example.yaml += line;
                example.yaml.push('\n');
            }
        } else if line.starts_with("```yaml") {
            is_inside = true;
            found.push(Example {
                page,
                heading: heading.clone(),
                yaml: String::new(),
            });
        } else if line.starts_with('#') {
            heading = line.trim_start_matches('#').trim().to_owned();
        }
    }
    ensure!(!found.is_empty(), "{page} has no examples");
    // Of a Service a cluster says the address when it is made.
    let services = found.iter_mut();
    for example in services.filter(|it| it.yaml.contains("kind: Service\n")) {
        let with = format!("\nspec:\n  clusterIPs: [{LEDGER}]\n");
        example.yaml = example.yaml.replace("\nspec:\n", &with);
    }
    Ok(found)
}

/// Nothing is reported of the example, nor because of it: what is known to be wrong and applied after it is there.
fn accepted(scene: &Scene, example: &Example) -> Result<()> {
    // Others are about the first one's Server.
    let of_page = scene.examples.iter().filter(|it| it.page == example.page);
    let first = of_page.take(usize::from(example.page == "docs/policy.md"));
    let manifests = scene.cluster.manifests();
    for example in first.clone().chain([example]) {
        manifests.apply(&example.file(), &example.yaml)?;
    }
    let wrong = "{apiVersion: policy.weft.dev/v1alpha1, kind: Server,
        metadata: {name: wrong, namespace: nowhere}, spec: {podSelector: {}, prot: 1}}";
    manifests.apply("zz-wrong", wrong)?;
    eventually(
        "the example to be read, and nothing else to be reported",
        || {
            let problems: Value = serde_json::from_str(&scene.problems()?)?;
            let list = problems.pointer("/problems").and_then(Value::as_array);
            let list = list.with_context(|| format!("{problems}"))?;
            let is_wrong = |it: &Value| it.to_string().contains("zz-wrong");
            ensure!(list.iter().any(is_wrong), "it was not read yet");
            let others: Vec<_> = list.iter().filter(|it| !is_wrong(it)).collect();
            ensure!(others.is_empty(), "{others:?}");
            Ok(())
        },
    )?;
    manifests.remove("zz-wrong")?;
    let first = first.filter(|it| it.heading != example.heading);
    for example in first.chain([example]) {
        manifests.remove(&example.file())?;
    }
    eventually("all to be gone", || {
        let problems = scene.problems()?;
        ensure!(!problems.contains("zz-wrong"), "{problems}");
        Ok(())
    })
}

fn one_caller(scene: &Scene) -> Result<()> {
    scene.with(&["One caller, one server"], || {
        let target = scene.at_payment(HTTP);
        eventually("the policy to be in effect", || {
            expect(&scene.other, target, "/", 403).map(drop)
        })?;
        expect(&scene.order, target, "/", 200)?;
        expect(&scene.reports, target, "/", 403)?;
        expect(&scene.other, scene.at_payment(METRICS), "/", 200).map(drop)
    })
}

fn routes_of_a_server(scene: &Scene) -> Result<()> {
    scene.with(&["One caller, one server", "Routes of a Server"], || {
        let target = scene.at_payment(HTTP);
        eventually("the policy to be in effect", || {
            expect(&scene.reports, target, "/invoices/7", 200)?;
            expect(&scene.reports, target, "/", 404).map(drop)
        })?;
        let posted = curl_shop(&scene.reports, target, "/invoices/7", &["-X", "POST"])?;
        ensure!(posted.code() == 404, "{posted:?}");
        expect(&scene.order, target, "/invoices/7", 200)?;
        expect(&scene.other, target, "/invoices/7", 403).map(drop)
    })
}

/// Any server of HTTP/2 will do: whose call it is is in the head.
fn calls_at_a_server(scene: &Scene) -> Result<()> {
    scene.with(&["One caller, one server", "Calls of gRPC"], || {
        let target = scene.at_payment(HTTP);
        let is_answered = |pod: &Pod, method: &str, status: Option<&str>| {
            let kind = ["-H", "content-type: application/grpc", "--data", "x"];
            let args = [&["--http2-prior-knowledge"], &kind[..]].concat();
            let shown = curl_shop(pod, target, method, &args)?;
            let is_so = shown.code() == 200 && shown.header("grpc-status") == status;
            ensure!(is_so, "{} got {shown:?} for {method}", pod.name());
            Ok(shown)
        };
        let (get, delete) = ("/payments.v1.Invoices/Get", "/payments.v1.Invoices/Delete");
        eventually("the policy to be in effect", || {
            is_answered(&scene.reports, get, None)?;
            let denied = is_answered(&scene.reports, delete, Some("7"))?;
            ensure!(denied.header("weft-error") == Some("denied"), "{denied:?}");
            Ok(())
        })?;
        is_answered(&scene.reports, "/payments.v1.Refunds/Get", Some("12"))?;
        is_answered(&scene.order, get, None)?;
        is_answered(&scene.order, delete, None)?;
        is_answered(&scene.other, get, Some("7")).map(drop)
    })
}

/// A second's worth at once, and no more: of each client, and more of one.
fn rate_limit(scene: &Scene) -> Result<()> {
    // Without the authorization nobody would be let in to be counted.
    scene.with(
        &["One caller, one server", "HTTPLocalRateLimitPolicy"],
        || {
            let target = scene.at_payment(HTTP);
            let burst = "GET / HTTP/1.1\\r\\nHost: shop\\r\\n\\r\\n".repeat(400);
            wait_for("the limit to be in effect", Duration::from_secs(40), || {
                // What bursts before this one have taken is there again after a second.
                std::thread::sleep(Duration::from_millis(1100));
                let raw = raw(&scene.order, target, &[&burst], &["--half-close"])?;
                let count = |code: u16| raw.statuses.iter().filter(|it| **it == code).count();
                ensure!(count(200) + count(429) == 400, "{:?}", raw.statuses);
                // It is the override, not the 20 of each identity nor the 100 of all.
                let most = 50.0 * (1.0 + raw.elapsed_ms / 1000.0) + 1.0;
                let passed = count(200) as f64;
                ensure!((50.0..=most).contains(&passed), "{passed} of {most}");
                ensure!(raw.received.contains("weft-error: rate_limited"));
                Ok(Some(()))
            })?;
            let identity = scene.order.identity();
            let labels = [
                ("client_id", identity.as_str()),
                ("ratelimit_name", "payment-limit"),
                ("ratelimit_scope", "override"),
            ];
            let metric = "inbound_http_local_ratelimit_total";
            wait_for_metric(scene.cluster.node(1), metric, &labels, 1.0).map(drop)
        },
    )
}

fn split(scene: &Scene) -> Result<()> {
    scene.with(&["Routes"], || {
        let requests =
            |number: usize| Ok::<_, anyhow::Error>(scene.of_versions[number].requests()?.len());
        let canary = ["-H", "x-canary: yes"];
        eventually("the route to be in effect", || {
            let before = requests(1)?;
            let shown = curl_shop(&scene.order, scene.service, "/", &canary)?;
            ensure!(
                shown.code() == 200 && requests(1)? == before + 1,
                "{shown:?}"
            );
            Ok(())
        })?;
        let before = [requests(0)?, requests(1)?];
        http_load(&scene.order, scene.service, 400, &[])?.expect_all("200")?;
        let shares = [requests(0)? - before[0], requests(1)? - before[1]];
        // 40 are expected of 400; fewer than 10 or more than 90 come once in a million times.
        ensure!(shares[0] + shares[1] == 400, "{shares:?}");
        ensure!((10..90).contains(&shares[1]), "{shares:?}");
        Ok(())
    })
}

fn timeout(scene: &Scene) -> Result<()> {
    scene.with(&["Timeouts"], || {
        scene.servers[0].configure(&scene.payment, 4000, 200)?;
        eventually("the timeout to be in effect", || {
            let late = expect(&scene.order, scene.service, "/reports/x", 504)?;
            ensure!(
                late.header("weft-error") == Some("request_timeout"),
                "{late:?}"
            );
            Ok(())
        })?;
        scene.servers[0].configure(&scene.payment, 0, 200)?;
        expect(&scene.order, scene.service, "/reports/x", 200).map(drop)
    })
}

fn retry(scene: &Scene) -> Result<()> {
    scene.with(&["Retries"], || {
        eventually("retries to be in effect", || {
            scene.servers[0].configure_some(&scene.payment, 0, 503, 2)?;
            let shown = curl_shop(&scene.order, scene.service, "/", &[])?;
            scene.servers[0].configure(&scene.payment, 0, 200)?;
            ensure!(shown.code() == 200, "{shown:?}");
            Ok(())
        })?;
        scene.servers[0].configure_some(&scene.payment, 0, 503, 2)?;
        let posted = curl_shop(&scene.order, scene.service, "/", &["-X", "POST"])?;
        scene.servers[0].configure(&scene.payment, 0, 200)?;
        // No rule is for it.
        ensure!(posted.code() == 404, "{posted:?}");
        Ok(())
    })
}

fn circuit_breaking(scene: &Scene) -> Result<()> {
    scene.with(&["Failing ones"], || {
        let target: SocketAddr = format!("{LEDGER}:80").parse()?;
        eventually("the Service to answer", || {
            expect(&scene.order, target, "/", 200).map(drop)
        })?;
        let [failing, _] = &scene.of_ledgers;
        failing.configure(&scene.ledgers[0], 0, 500)?;
        eventually("the endpoint that fails to be left out", || {
            for _ in 0..20 {
                expect(&scene.order, target, "/", 200)?;
            }
            Ok(())
        })?;
        failing.configure(&scene.ledgers[0], 0, 200)
    })
}

fn breaking_by_share(scene: &Scene) -> Result<()> {
    no_ledger(scene)?;
    scene.with(&["By the share of successes"], || {
        let target: SocketAddr = format!("{LEDGER}:80").parse()?;
        eventually("the Service to answer", || {
            expect(&scene.order, target, "/", 200).map(drop)
        })?;
        scene.of_ledgers[0].configure(&scene.ledgers[0], 0, 500)?;
        wait_for("who fails to be left out", Duration::from_secs(30), || {
            http_load(&scene.order, target, 50, &[])?.expect_all("200")?;
            let metrics = scene.cluster.node(0).metrics()?;
            let labels = [("backend_name", "ledger")];
            let mut states = metrics.find("weft_balancer_ejected", &labels);
            Ok(states.any(|it| it.value > 0.0).then_some(()))
        })?;
        scene.of_ledgers[0].configure(&scene.ledgers[0], 0, 200)
    })
}

fn timeouts_of_a_service(scene: &Scene) -> Result<()> {
    no_ledger(scene)?;
    scene.with(&["Of a whole Service"], || {
        let target: SocketAddr = format!("{LEDGER}:80").parse()?;
        let late = |path: &str, args: &[&str], why: &str| {
            let shown = curl_shop(&scene.order, target, path, args)?;
            let is_late = shown.code() == 504 && shown.header("weft-error") == Some(why);
            ensure!(is_late, "{shown:?}");
            Ok(())
        };
        eventually("the Service to answer in time", || {
            late("/delay/3000", &[], "stream_idle")
        })?;
        let asked = ["-H", "weft-timeout: 300ms"];
        late("/delay/20000", &asked, "request_timeout")?;
        // Something moves all the time, and it ends within the time nevertheless.
        let shown = curl_shop(&scene.order, target, "/stream?chunks=200&interval=100", &[])?;
        ensure!(shown.code() == 200 && shown.exit == 18, "{shown:?}");
        scene.ledgers_answer(503)?;
        let path = "/asked-for-again";
        let shown = curl_shop(&scene.order, target, path, &["-H", "weft-retry-http: 5xx"]);
        scene.ledgers_answer(200)?;
        let [one, other] = &scene.of_ledgers;
        let seen = asked_for(one, path)? + asked_for(other, path)?;
        let shown = shown?;
        ensure!(shown.code() == 503 && seen == 2, "{seen}: {shown:?}");
        Ok(())
    })
}

fn retries_of_a_rule(scene: &Scene) -> Result<()> {
    scene.with(&["Of a rule"], || {
        let [server, _] = &scene.servers;
        let ask = |path: &str, delay_ms: u64, status: u16, times: u64| {
            server.configure_some(&scene.payment, delay_ms, status, times)?;
            let shown = curl_shop(&scene.order, scene.service, path, &[]);
            server.configure(&scene.payment, 0, 200)?;
            Ok::<_, anyhow::Error>((shown?, asked_for(server, path)?))
        };
        eventually("the rule to be in effect", || {
            let (shown, _) = ask("/invoices/first", 0, 503, 2)?;
            ensure!(shown.code() == 200, "{shown:?}");
            Ok(())
        })?;
        for (path, delay_ms, status, times, code, tries) in [
            ("/invoices/1", 0, 502, 2, 200, 3),
            ("/invoices/2", 0, 503, 3, 503, 3),
            ("/invoices/3", 0, 500, 1, 500, 1),
            ("/invoices/4", 30_000, 200, 1, 200, 2),
            ("/invoices/5", 30_000, 200, 3, 504, 3),
        ] {
            let (shown, seen) = ask(path, delay_ms, status, times)?;
            let is_so = shown.code() == code && seen == tries;
            ensure!(is_so, "{path} was seen {seen} times: {shown:?}");
        }
        Ok(())
    })
}

fn retries_of_calls(scene: &Scene) -> Result<()> {
    scene.with(&["Of calls"], || {
        let mut count = 0;
        let mut call = |code: &str, times: u32| {
            count += 1;
            let text = format!("first {times}: {count}");
            let args = ["--code", code, "--text", &text];
            Ok::<_, anyhow::Error>(grpc_call(&scene.order, scene.quotes, &args)?.code)
        };
        eventually("the route to be in effect", || {
            let code = call("14", 2)?;
            ensure!(code == 0, "{code}");
            Ok(())
        })?;
        for (code, times, is) in [("8", 2, 0), ("14", 3, 14), ("13", 1, 13)] {
            let got = call(code, times)?;
            ensure!(got == is, "{got} for {code}, {times} times");
        }
        Ok(())
    })
}

fn service_profile(scene: &Scene) -> Result<()> {
    scene.with(&["ServiceProfile"], || {
        let [server, _] = &scene.servers;
        server.configure(&scene.payment, 20_000, 200)?;
        let late = eventually("the ServiceProfile to be in effect", || {
            let args = ["--max-time", "3"];
            let shown = curl_shop(&scene.order, scene.service, "/reports/x", &args)?;
            ensure!(
                shown.code() == 504 && shown.header("weft-error") == Some("request_timeout"),
                "{shown:?}"
            );
            Ok(())
        });
        server.configure(&scene.payment, 0, 200)?;
        late?;
        for (args, path, status, code, tries) in [
            (&[][..], "/invoices/429", 429, 200, 2),
            (&[], "/invoices/500", 500, 200, 2),
            (&[], "/invoices/404", 404, 404, 1),
            (&["-X", "POST"], "/invoices/503", 503, 503, 1),
            (&[], "/refunds/503", 503, 503, 1),
        ] {
            server.configure_some(&scene.payment, 0, status, 1)?;
            let shown = curl_shop(&scene.order, scene.service, path, args);
            server.configure(&scene.payment, 0, 200)?;
            let (shown, seen) = (shown?, asked_for(server, path)?);
            let is_so = shown.code() == code && seen == tries;
            ensure!(is_so, "{path} was seen {seen} times: {shown:?}");
        }
        Ok(())
    })
}

/// Waits until the version of the Service that was applied before is forgotten.
fn no_ledger(scene: &Scene) -> Result<()> {
    let target: SocketAddr = format!("{LEDGER}:80").parse()?;
    eventually("the Service to be gone", || {
        let shown = curl_shop(&scene.order, target, "/", &["--max-time", "2"])?;
        ensure!(shown.code() == 0, "{shown:?}");
        Ok(())
    })
}

/// How often a server was asked for a path.
fn asked_for(server: &HttpServer, path: &str) -> Result<usize> {
    let requests = server.requests()?;
    Ok(requests.iter().filter(|it| it.path == path).count())
}

fn expect(pod: &Pod, target: SocketAddr, path: &str, code: u16) -> Result<Shown> {
    let shown = curl_shop(pod, target, path, &[])?;
    let name = pod.name();
    ensure!(
        shown.code() == code,
        "{name} got {shown:?} for {path}, not {code}"
    );
    Ok(shown)
}

const HTTP: u16 = 8080;
const METRICS: u16 = 9090;
const CALLS: u16 = 9090;
/// The address of the documented Service, of which there are several versions.
const LEDGER: &str = "10.96.0.251";
