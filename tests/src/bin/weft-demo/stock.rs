//! The claims about single requests: a retry that hides a failure, an endpoint that is left out while it fails, and
//! a caller who may read and not delete.

use std::net::SocketAddr;

use anyhow::{Result, ensure};
use weft_tests::apps::Nginx;
use weft_tests::manifests::ServiceSpec;
use weft_tests::metrics::wait_for_metric;
use weft_tests::{Cluster, DEADLINE, Pod, PodSpec, wait_for};

use crate::acts::Tell;
use crate::stage::{Stage, wait_for_service};

/// The same broken pod, behind a Service that says nothing of retries and behind one that does.
pub(crate) fn retried(stage: &mut Stage, tell: Tell<'_>) -> Result<()> {
    // It stays, as the pods of the stage do.
    let started = Stock::start(stage)?;
    let stock = &*stage.stock.insert(started);
    stock.break_down(true)?;
    tell(
        "nginx serves in stock-a (node 1) and stock-b (node 0); that of stock-b answers 503 to everything",
    );
    let plain = stock.service(&stage.cluster, "stock", &[])?;
    let answers = statuses(&stage.order, plain, REQUESTS)?;
    tell(&format!(
        "order$ curl, {REQUESTS} requests to the Service stock:          {}",
        Counts(&answers)
    ));
    ensure!(failures(&answers) > 0, "none met the broken one");
    let retry = [
        ("retry.linkerd.io/http", "5xx"),
        ("retry.linkerd.io/limit", "2"),
    ];
    let retried = stock.service(&stage.cluster, "stock-retried", &retry)?;
    // Slowly: those that are sent again have a budget, of some ten in a second.
    let answers = statuses_at(&stage.order, retried, REQUESTS / 2, "10/s")?;
    tell(&format!(
        "{}, ten a second, to one annotated {}: \"{}\":  {}",
        REQUESTS / 2,
        retry[0].0,
        retry[0].1,
        Counts(&answers)
    ));
    ensure!(failures(&answers) == 0, "some failed");
    let again = wait_for_metric(
        stage.cluster.node(0),
        "outbound_http_route_retry_requests_total",
        &[("parent_name", "stock-retried")],
        1.0,
    )?;
    tell(&format!(
        "the agent of node 0 sent {again} of these again, each time to the other pod"
    ));
    Ok(())
}

/// Failures in a row: none of the requests of others goes there any more, until it is well.
pub(crate) fn left_out(stage: &mut Stage, tell: Tell<'_>) -> Result<()> {
    let stock = stage.stock()?;
    let guard = [
        ("balancer.linkerd.io/failure-accrual", "consecutive"),
        (
            "balancer.linkerd.io/failure-accrual-consecutive-max-failures",
            "5",
        ),
        (
            "balancer.linkerd.io/failure-accrual-consecutive-min-penalty",
            "5s",
        ),
        (
            "balancer.linkerd.io/failure-accrual-consecutive-max-penalty",
            "5s",
        ),
    ];
    let guarded = stock.service(&stage.cluster, "stock-guarded", &guard)?;
    let node = stage.cluster.node(0);
    let labels = [("backend_name", "stock-guarded")];
    let mut failed = 0;
    wait_for("the broken pod to be left out", DEADLINE, || {
        failed += failures(&statuses(&stage.order, guarded, 10)?);
        let ejections = node
            .metrics()?
            .sum("weft_balancer_ejections_total", &labels);
        Ok((ejections >= 1.0).then_some(()))
    })?;
    tell(&format!(
        "Service stock-guarded, annotated {}: \"{}\"",
        guard[0].0, guard[0].1
    ));
    tell(&format!(
        "{failed} requests failed until stock-b was left out"
    ));
    let answers = statuses(&stage.order, guarded, REQUESTS)?;
    tell(&format!(
        "then, {REQUESTS} requests:   {}",
        Counts(&answers)
    ));
    ensure!(failures(&answers) <= 1, "more than a probe failed");
    stock.break_down(false)?;
    wait_for("both pods to serve again", DEADLINE, || {
        let seen = stock.broken().access_log()?.len();
        statuses(&stage.order, guarded, 10)?;
        let more = stock.broken().access_log()?.len() - seen;
        Ok((more > 1).then_some(()))
    })?;
    let answers = statuses(&stage.order, guarded, REQUESTS)?;
    tell(&format!(
        "stock-b mended and taken back: {}",
        Counts(&answers)
    ));
    ensure!(failures(&answers) == 0, "some failed");
    Ok(())
}

/// Both may connect; what they may do there is a matter of routes.
pub(crate) fn requests(stage: &mut Stage, tell: Tell<'_>) -> Result<()> {
    let stock = stage.stock()?;
    let service = stock.service(&stage.cluster, "stock-policed", &[])?;
    let (order, intruder) = (&stage.order, &stage.intruder);
    stage
        .cluster
        .manifests()
        .apply("stock-policy", STOCK_POLICY)?;
    tell(
        "applied a Server with two HTTPRoutes: both accounts may GET, order-service alone may DELETE",
    );
    wait_for("the policy to be in force", DEADLINE, || {
        Ok((status(intruder, "DELETE", service)? == 403).then_some(()))
    })?;
    for (pod, method, expected) in [
        (intruder, "GET", 200),
        (intruder, "DELETE", 403),
        (order, "GET", 200),
        // nginx itself says so: it was asked.
        (order, "DELETE", 405),
    ] {
        let got = status(pod, method, service)?;
        let by = if got == 405 { ", says nginx" } else { "" };
        tell(&format!(
            "{:<8}$ curl -X {method:<6}  ->  {got}{by}",
            pod.name()
        ));
        ensure!(got == expected, "expected {expected}");
    }
    let intruder = intruder.identity();
    let denied = [("route_name", "stock-write"), ("client_id", &*intruder)];
    let of = |node| -> Result<f64> {
        let metrics = stage.cluster.node(node).metrics()?;
        Ok(metrics.sum("inbound_http_authz_deny_total", &denied))
    };
    let count = of(0)? + of(1)?;
    ensure!(count >= 1.0, "no denial was counted");
    tell(&format!(
        "the agents counted {count} denials of {intruder} by the route stock-write"
    ));
    Ok(())
}

/// Two pods of which one can be broken.
pub(crate) struct Stock {
    // The programs end before their pods.
    servers: [(Nginx, Pod); 2],
}

impl Stock {
    fn start(stage: &Stage) -> Result<Stock> {
        let start = |name: &str, node| -> Result<(Nginx, Pod)> {
            let spec = PodSpec::new(name).namespace("production");
            let spec = spec.label("tier", "stock").deployment(name);
            let pod = stage.cluster.add_pod(spec.on(node))?;
            Ok((Nginx::start_breakable(&pod, 8080)?, pod))
        };
        Ok(Stock {
            servers: [start("stock-a", 1)?, start("stock-b", 0)?],
        })
    }

    fn broken(&self) -> &Nginx {
        &self.servers[1].0
    }

    fn break_down(&self, is_broken: bool) -> Result<()> {
        self.broken().break_down(is_broken)
    }

    /// A Service of both pods; it answers when this returns.
    fn service(
        &self,
        cluster: &Cluster,
        name: &str,
        annotations: &[(&str, &str)],
    ) -> Result<SocketAddr> {
        let spec = ServiceSpec::new(name).namespace("production");
        let spec = spec.select("tier", "stock").port(80, 8080);
        let spec = annotations
            .iter()
            .fold(spec, |spec, (name, value)| spec.annotation(name, value));
        let [address, _] = cluster.add_service(&spec)?;
        wait_for_service(cluster, name, 2)?;
        Ok((address, 80).into())
    }
}

/// What one curl gets for so many requests.
fn statuses(client: &Pod, service: SocketAddr, count: usize) -> Result<Vec<u16>> {
    statuses_at(client, service, count, "1000/s")
}

/// The same at a rate.
fn statuses_at(client: &Pod, service: SocketAddr, count: usize, rate: &str) -> Result<Vec<u16>> {
    let url = format!("http://{service}/?request=[1-{count}]");
    let curl = client.command("curl")?.args([
        "-sS",
        "--rate",
        rate,
        "-o",
        "/dev/null",
        "-w",
        "%{http_code}\n",
        &url,
    ]);
    let printed = curl.output(DEADLINE)?.stdout;
    let statuses: Vec<u16> = printed.lines().filter_map(|it| it.parse().ok()).collect();
    ensure!(statuses.len() == count, "curl printed {printed:?}");
    Ok(statuses)
}

fn status(client: &Pod, method: &str, service: SocketAddr) -> Result<u16> {
    let url = format!("http://{service}/");
    let curl = client
        .command("curl")?
        .args(["-sS", "-o", "/dev/null", "-X", method]);
    let printed = curl
        .args(["-w", "%{http_code}", &url])
        .output(DEADLINE)?
        .stdout;
    Ok(printed.trim().parse()?)
}

fn failures(statuses: &[u16]) -> usize {
    statuses.iter().filter(|it| **it != 200).count()
}

/// How it went.
struct Counts<'a>(&'a [u16]);

impl std::fmt::Display for Counts<'_> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let failed = failures(self.0);
        write!(
            formatter,
            "{} times 200, {failed} failed",
            self.0.len() - failed
        )
    }
}

const REQUESTS: usize = 40;

const STOCK_POLICY: &str = "\
apiVersion: policy.weft.dev/v1alpha1
kind: Server
metadata: {name: stock, namespace: production}
spec:
  podSelector: {matchLabels: {tier: stock}}
  port: 8080
  proxyProtocol: HTTP/1
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: stock-read, namespace: production}
spec:
  parentRefs:
  - {group: policy.weft.dev, kind: Server, name: stock}
  rules:
  - matches:
    - {method: GET}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: stock-write, namespace: production}
spec:
  parentRefs:
  - {group: policy.weft.dev, kind: Server, name: stock}
  rules:
  - matches:
    - {method: DELETE}
---
apiVersion: policy.weft.dev/v1alpha1
kind: AuthorizationPolicy
metadata: {name: stock-read, namespace: production}
spec:
  targetRef: {group: gateway.networking.k8s.io, kind: HTTPRoute, name: stock-read}
  requiredAuthenticationRefs:
  - {kind: ServiceAccount, name: order-service, namespace: production}
---
apiVersion: policy.weft.dev/v1alpha1
kind: AuthorizationPolicy
metadata: {name: stock-read-others, namespace: production}
spec:
  targetRef: {group: gateway.networking.k8s.io, kind: HTTPRoute, name: stock-read}
  requiredAuthenticationRefs:
  - {kind: ServiceAccount, name: intruder, namespace: production}
---
apiVersion: policy.weft.dev/v1alpha1
kind: AuthorizationPolicy
metadata: {name: stock-write, namespace: production}
spec:
  targetRef: {group: gateway.networking.k8s.io, kind: HTTPRoute, name: stock-write}
  requiredAuthenticationRefs:
  - {kind: ServiceAccount, name: order-service, namespace: production}
";
