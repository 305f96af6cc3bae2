//! `weft stat-outbound`: what workloads ask of others, route by route, and which backends that leads to.

use std::io::Write;

use clap::Args;
use serde::Serialize;

use super::rate_cell;
use super::traffic::{self, Backend, Numbers, Port, Route, WANTED, branch};
use crate::controller::{Reach, ReachError};
use crate::outcome::Outcome;
use crate::output::{self, Cell, Format, Table, shown};
use crate::view::{Change, ScopeArgs, Seen, View, Window};

/// What `weft stat-outbound` is asked.
#[derive(Args, Debug)]
pub struct StatOutbound {
    /// Of whose requests.
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

/// The requests of a workload that went by a route.
#[derive(Debug, Serialize)]
struct Row {
    namespace: String,
    kind: &'static str,
    name: String,
    /// What was asked for.
    parent: Port,
    route: Route,
    /// As the workload sees it.
    #[serde(flatten)]
    numbers: Numbers,
    retries_per_second: f64,
    backends: Vec<Backend>,
}

/// Finds out and shows.
///
/// # Errors
/// Nobody can be asked, and why.
pub async fn run(stat: &StatOutbound) -> Result<Outcome, crate::Error> {
    let report = report(stat).await?;
    output::show(
        stat.output,
        &report,
        &report.seen.notes(),
        |out, colours| report.write(out, colours),
    )?;
    Ok(Outcome::Good)
}

async fn report(stat: &StatOutbound) -> Result<Report, ReachError> {
    let (view, change) = View::watch(&stat.reach, &[], &WANTED, &stat.window).await?;
    let scope = stat.scope.settled(&stat.reach).await;
    Ok(Report::new(&view, &change, &scope))
}

impl Report {
    fn new(view: &View, change: &Change, scope: &ScopeArgs) -> Self {
        let counted = traffic::count(change, |series, parent, route| {
            Some((scope.of_series(series)?, parent, route))
        });
        let rows = counted
            .into_iter()
            .map(|((workload, parent, route), it)| Row {
                namespace: workload.namespace,
                kind: workload.kind,
                name: workload.name,
                parent,
                route,
                numbers: it.whole.numbers(change),
                retries_per_second: change.per_second(it.retries),
                backends: it.backends(change),
            });
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
            "SERVICE",
            "ROUTE → BACKEND",
            "SUCCESS",
            "RPS",
            "P50",
            "P95",
            "P99",
            "TIMEOUTS/S",
            "RETRIES/S",
        ]);
        for row in &self.rows {
            let text = |it: String| Cell::from(shown(&it));
            let mut cells = vec![
                text(row.namespace.clone()),
                text(format!("{}/{}", row.kind, row.name)),
                text(row.parent.shown_in(&row.namespace)),
                text(row.route.to_string()),
            ];
            cells.extend(row.numbers.cells());
            cells.push(rate_cell(row.retries_per_second));
            table.row(cells);
            for (index, it) in row.backends.iter().enumerate() {
                let backend = it.backend.shown_in(&row.namespace);
                let mut cells = vec!["".into(), "".into(), "".into()];
                cells.push(text(branch(index, row.backends.len(), &backend)));
                cells.extend(it.numbers.cells());
                cells.push(Cell::new("").right());
                table.row(cells);
            }
        }
        table.write(to, colours)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const METRICS: &str = r#"
outbound_http_route_request_statuses_total{POD,PARENT,ROUTE,http_status="200",error=""} 90
outbound_http_route_request_statuses_total{POD,PARENT,ROUTE,http_status="503",error=""} 5
outbound_http_route_request_statuses_total{POD,PARENT,ROUTE,error="REQUEST_TIMEOUT"} 5
outbound_http_route_request_duration_seconds_bucket{POD,PARENT,ROUTE,le="0.05"} 50
outbound_http_route_request_duration_seconds_bucket{POD,PARENT,ROUTE,le="+Inf"} 50
outbound_http_route_retry_requests_total{POD,PARENT,ROUTE} 20
outbound_http_route_backend_response_statuses_total{POD,PARENT,ROUTE,BACKEND="web-v1",backend_port="80",http_status="200"} 100
outbound_http_route_backend_response_statuses_total{POD,PARENT,ROUTE,BACKEND="web-v2",backend_port="80",http_status="500"} 10
outbound_grpc_route_request_statuses_total{POD,OTHER,grpc_status="UNAVAILABLE"} 10
outbound_grpc_route_request_statuses_total{POD,OTHER,grpc_status="NOT_FOUND"} 10
"#;

    fn report() -> Report {
        let text = [
            (
                "POD",
                r#"namespace="shop",deployment="order",pod="order-1""#,
            ),
            (
                "PARENT",
                r#"parent_kind="Service",parent_namespace="shop",parent_name="web",parent_port="80""#,
            ),
            (
                "ROUTE",
                r#"route_group="gateway.networking.k8s.io",route_kind="HTTPRoute",route_namespace="shop",route_name="split""#,
            ),
            (
                "BACKEND",
                r#"backend_kind="Service",backend_namespace="shop",backend_name"#,
            ),
            (
                "OTHER",
                r#"parent_kind="Service",parent_namespace="bank",parent_name="ledger",parent_port="90",route_group="",route_kind="default",route_namespace="",route_name="grpc""#,
            ),
        ];
        let text = text
            .iter()
            .fold(METRICS.to_owned(), |text, (word, labels)| {
                text.replace(word, labels)
            });
        let change = Change::grown(&text, 10.0);
        Report::new(&View::default(), &change, &ScopeArgs::everything())
    }

    #[test]
    fn a_route_is_a_tree_of_its_backends() {
        let report = report();
        let mut text = vec![];
        report.write(&mut text, false).expect("a vector");
        assert_eq!(
            String::from_utf8(text).expect("text"),
            "\
NAMESPACE   NAME               SERVICE          ROUTE → BACKEND   SUCCESS    RPS      P50      P95      P99   TIMEOUTS/S   RETRIES/S
shop        deployment/order   bank/ledger:90   (no route)         50.00%    2.0        -        -        -          0.0         0.0
shop        deployment/order   web:80           HTTPRoute/split    90.00%   10.0   25.0ms   47.5ms   49.5ms          0.5         2.0
                                                ├─► web-v1:80     100.00%   10.0        -        -        -          0.0
                                                └─► web-v2:80       0.00%    1.0        -        -        -          0.0
"
        );
        let json = serde_json::to_value(&report).expect("JSON");
        assert_eq!(json["rows"][1]["backends"][1]["backend"]["name"], "web-v2");
        assert_eq!(json["rows"][1]["success_rate"], 0.9);
        assert_eq!(json["rows"][1]["retries_per_second"], 2.0);
    }
}
