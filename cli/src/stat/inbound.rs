//! `weft stat-inbound`: what is asked of workloads, by the Server that governs a port, and what its routes let in.

use std::collections::BTreeMap;
use std::io::Write;

use clap::Args;
use serde::Serialize;

use super::buckets::Buckets;
use super::traffic::branch;
use super::{Latencies, latency_cell, rate_cell, success_cell, unwanted_cell};
use crate::controller::{Reach, ReachError};
use crate::metrics::Series;
use crate::outcome::Outcome;
use crate::output::{self, Cell, Format, Table, shown};
use crate::view::{Change, ScopeArgs, Seen, View, Window, Workload};

/// What `weft stat-inbound` is asked.
#[derive(Args, Debug)]
pub struct StatInbound {
    /// Of what is asked.
    #[command(flatten)]
    pub scope: ScopeArgs,
    /// Over which time.
    #[command(flatten)]
    pub window: Window,
    /// How the answer is written.
    #[arg(short, long, default_value = "table")]
    pub output: Format,
    /// Whom to ask.
    #[command(flatten)]
    pub reach: Reach,
}

/// The answer.
#[derive(Debug, Serialize)]
pub struct Report {
    #[serde(flatten)]
    seen: Seen,
    rows: Vec<Row>,
}

/// The requests to a workload's ports that a Server governs.
#[derive(Debug, Serialize)]
struct Row {
    namespace: String,
    kind: &'static str,
    name: String,
    /// None: no Server governs the port.
    server: Option<String>,
    /// None: there was no response.
    success_rate: Option<f64>,
    requests_per_second: f64,
    latency_ms: Latencies,
    /// Requests that policy did not let in.
    denied_per_second: f64,
    /// Requests above a limit.
    limited_per_second: f64,
    routes: Vec<OfRoute>,
}

/// Decisions about requests, by the route that was asked.
#[derive(Debug, PartialEq, Serialize)]
struct OfRoute {
    /// None: none of the Server's routes is for them.
    route: Option<String>,
    allowed_per_second: f64,
    denied_per_second: f64,
}

#[derive(Default)]
struct Counted {
    responses: f64,
    successes: f64,
    buckets: Buckets,
    limited: f64,
    unrouted: f64,
    /// Allowed and denied.
    routes: BTreeMap<Option<String>, [f64; 2]>,
}

const RESPONSES: &str = "response_total";
const LATENCIES: &str = "response_latency_ms_bucket";
const ALLOWED: &str = "inbound_http_authz_allow_total";
const DENIED: &str = "inbound_http_authz_deny_total";
const LIMITED: &str = "inbound_http_local_ratelimit_total";
const UNROUTED: &str = "inbound_http_route_not_found_total";

/// Finds out and shows.
///
/// # Errors
/// Nobody can be asked, and why.
pub async fn run(stat: &StatInbound) -> Result<Outcome, crate::Error> {
    let report = report(stat).await?;
    output::show(
        stat.output,
        &report,
        &report.seen.notes(),
        |out, colours| report.write(out, colours),
    )?;
    Ok(Outcome::Good)
}

async fn report(stat: &StatInbound) -> Result<Report, ReachError> {
    let wanted = [RESPONSES, LATENCIES, ALLOWED, DENIED, LIMITED, UNROUTED];
    let (view, change) = View::watch(&stat.reach, &[], &wanted, &stat.window).await?;
    let scope = stat.scope.settled(&stat.reach).await;
    Ok(Report::new(&view, &change, &scope))
}

impl Report {
    fn new(view: &View, change: &Change, scope: &ScopeArgs) -> Self {
        let mut all: BTreeMap<(Workload, Option<String>), Counted> = BTreeMap::new();
        for grown in &change.counters {
            let series = &grown.series;
            if !series.is("direction", "inbound") {
                continue;
            }
            if let Some(workload) = scope.of_series(series) {
                let counted = all.entry((workload, server(series))).or_default();
                counted.add(series, grown.by);
            }
        }
        let rows = all
            .into_iter()
            .map(|((workload, server), it)| it.row(workload, server, change));
        Self {
            seen: Seen::of(view, change),
            rows: rows.collect(),
        }
    }

    fn write(&self, to: &mut impl Write, colours: bool) -> std::io::Result<()> {
        if self.rows.is_empty() {
            return writeln!(to, "no request was seen: -A shows those of all namespaces");
        }
        let mut table = Table::new([
            "NAMESPACE",
            "NAME",
            "SERVER → ROUTE",
            "SUCCESS",
            "RPS",
            "P50",
            "P95",
            "P99",
            "DENIED/S",
            "LIMITED/S",
        ]);
        for row in &self.rows {
            table.row([
                shown(&row.namespace).into(),
                shown(&format!("{}/{}", row.kind, row.name)).into(),
                shown(row.server.as_deref().unwrap_or("(no Server)")).into(),
                success_cell(row.success_rate),
                rate_cell(row.requests_per_second),
                latency_cell(row.latency_ms.p50),
                latency_cell(row.latency_ms.p95),
                latency_cell(row.latency_ms.p99),
                unwanted_cell(row.denied_per_second),
                unwanted_cell(row.limited_per_second),
            ]);
            for (index, it) in row.routes.iter().enumerate() {
                let route = shown(it.route.as_deref().unwrap_or("(no route)"));
                let nothing = || Cell::new("").right();
                table.row([
                    "".into(),
                    "".into(),
                    branch(index, row.routes.len(), &route).into(),
                    nothing(),
                    rate_cell(it.allowed_per_second),
                    nothing(),
                    nothing(),
                    nothing(),
                    unwanted_cell(it.denied_per_second),
                    nothing(),
                ]);
            }
        }
        table.write(to, colours)
    }
}

/// The Server that governs a port.
fn server(series: &Series) -> Option<String> {
    let name = series.label("srv_name");
    let name = name.filter(|_| series.is("srv_kind", "server"));
    name.map(str::to_owned)
}

impl Counted {
    fn add(&mut self, series: &Series, by: f64) {
        match series.name.as_str() {
            RESPONSES => {
                self.responses += by;
                if !series.is("classification", "failure") {
                    self.successes += by;
                }
            }
            LATENCIES => self.buckets.add(series, by),
            ALLOWED => self.routes.entry(route(series)).or_default()[0] += by,
            DENIED => self.routes.entry(route(series)).or_default()[1] += by,
            LIMITED => self.limited += by,
            UNROUTED => self.unrouted += by,
            _ => {}
        }
    }

    fn row(self, workload: Workload, server: Option<String>, change: &Change) -> Row {
        let denied: f64 = self.routes.values().map(|[_, denied]| denied).sum();
        let has_routes = self.unrouted > 0.0 || self.routes.keys().any(Option::is_some);
        let routes = self
            .routes
            .into_iter()
            .map(|(route, [allowed, denied])| OfRoute {
                route,
                allowed_per_second: change.per_second(allowed),
                denied_per_second: change.per_second(denied),
            });
        Row {
            namespace: workload.namespace,
            kind: workload.kind,
            name: workload.name,
            server,
            success_rate: (self.responses > 0.0).then(|| self.successes / self.responses),
            requests_per_second: change.per_second(self.responses),
            latency_ms: self.buckets.latencies(1.0),
            denied_per_second: change.per_second(denied + self.unrouted),
            limited_per_second: change.per_second(self.limited),
            routes: routes.filter(|_| has_routes).collect(),
        }
    }
}

fn route(series: &Series) -> Option<String> {
    let kind = series.label("route_kind").filter(|it| *it != "default")?;
    Some(format!("{kind}/{}", series.label("route_name")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const METRICS: &str = r#"
response_total{POD,SERVER,classification="success"} 90
response_total{POD,SERVER,classification="failure"} 10
response_latency_ms_bucket{POD,SERVER,le="10.0"} 100
response_latency_ms_bucket{POD,SERVER,le="+Inf"} 100
inbound_http_authz_allow_total{POD,SERVER,route_kind="HTTPRoute",route_name="read"} 100
inbound_http_authz_deny_total{POD,SERVER,route_kind="HTTPRoute",route_name="write"} 5
inbound_http_local_ratelimit_total{POD,SERVER} 20
inbound_http_route_not_found_total{POD,SERVER} 10
response_total{POD,classification="success"} 10
inbound_http_authz_allow_total{POD,srv_kind="default",srv_name="all-unauthenticated",route_kind="default",route_name="default"} 10
response_total{direction="outbound",namespace="shop",pod="web-1",classification="failure"} 10
"#;

    fn report() -> Report {
        let pod = r#"direction="inbound",namespace="shop",deployment="web",pod="web-1""#;
        let text = METRICS.replace("POD", pod);
        let text = text.replace("SERVER", r#"srv_kind="server",srv_name="web-api""#);
        let change = Change::grown(&text, 10.0);
        Report::new(&View::default(), &change, &ScopeArgs::everything())
    }

    #[test]
    fn a_server_is_a_tree_of_its_routes() {
        let report = report();
        let mut text = vec![];
        report.write(&mut text, false).expect("a vector");
        assert_eq!(
            String::from_utf8(text).expect("text"),
            "\
NAMESPACE   NAME             SERVER → ROUTE        SUCCESS    RPS     P50     P95     P99   DENIED/S   LIMITED/S
shop        deployment/web   (no Server)           100.00%    1.0       -       -       -        0.0         0.0
shop        deployment/web   web-api                90.00%   10.0   5.0ms   9.5ms   9.9ms        1.5         2.0
                             ├─► HTTPRoute/read              10.0                                0.0
                             └─► HTTPRoute/write              0.0                                0.5
"
        );
        let json = serde_json::to_value(&report).expect("JSON");
        assert_eq!(json["rows"][1]["routes"][1]["denied_per_second"], 0.5);
        assert_eq!(json["rows"][0]["server"], serde_json::Value::Null);
    }
}
