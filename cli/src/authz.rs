//! `weft authz`: what policy lets in and what it does not, by Server and authorization, over the last while.

use std::collections::BTreeMap;
use std::io::Write;

use clap::Args;
use serde::Serialize;

use crate::controller::{Reach, ReachError};
use crate::metrics::Series;
use crate::outcome::Outcome;
use crate::output::{self, Cell, Format, Table, Tone, shown};
use crate::view::{Change, ScopeArgs, Seen, View, Window};

/// What `weft authz` is asked.
#[derive(Args, Debug)]
pub struct Authz {
    /// Of whose ports.
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

/// A decision that was made again and again.
#[derive(Debug, Serialize)]
struct Row {
    #[serde(flatten)]
    decision: Decision,
    /// In a second of the window,
    per_second: f64,
    /// and since the agents began.
    total: f64,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
struct Decision {
    namespace: String,
    kind: &'static str,
    name: String,
    /// The Server that governs the port; none: none does.
    server: Option<String>,
    /// What decided: an authorization, `default:…`, a NetworkPolicy.
    by: String,
    /// The route, of requests at a Server that has some.
    route: Option<String>,
    /// `connections` or `requests`.
    of: &'static str,
    allowed: bool,
}

const COUNTERS: [(&str, &str, bool); 4] = [
    ("inbound_tcp_authz_allow_total", "connections", true),
    ("inbound_tcp_authz_deny_total", "connections", false),
    ("inbound_http_authz_allow_total", "requests", true),
    ("inbound_http_authz_deny_total", "requests", false),
];

/// Finds out and shows.
///
/// # Errors
/// Nobody can be asked, and why.
pub async fn run(authz: &Authz) -> Result<Outcome, crate::Error> {
    let report = report(authz).await?;
    output::show(
        authz.output,
        &report,
        &report.seen.notes(),
        |out, colours| report.write(out, colours),
    )?;
    Ok(Outcome::Good)
}

async fn report(authz: &Authz) -> Result<Report, ReachError> {
    let wanted = COUNTERS.map(|(name, ..)| name);
    let (view, change) = View::watch(&authz.reach, &wanted, &wanted, &authz.window).await?;
    let scope = authz.scope.settled(&authz.reach).await;
    Ok(Report::new(&view, &change, &scope))
}

impl Report {
    fn new(view: &View, change: &Change, scope: &ScopeArgs) -> Self {
        let mut rows: BTreeMap<Decision, (f64, f64)> = BTreeMap::new();
        for (name, of, allowed) in COUNTERS {
            for (series, total) in view.of(name) {
                if let Some(decision) = decision(series, scope, of, allowed) {
                    rows.entry(decision).or_default().1 += total;
                }
            }
            for grown in change.of(name) {
                if let Some(decision) = decision(&grown.series, scope, of, allowed) {
                    rows.entry(decision).or_default().0 += grown.by;
                }
            }
        }
        let rows = rows.into_iter().map(|(decision, (grown, total))| Row {
            decision,
            per_second: change.per_second(grown),
            total,
        });
        Self {
            seen: Seen::of(view, change),
            rows: rows.collect(),
        }
    }

    fn write(&self, to: &mut impl Write, colours: bool) -> std::io::Result<()> {
        if self.rows.is_empty() {
            return writeln!(
                to,
                "policy was not asked about anything: -A shows all namespaces"
            );
        }
        let mut table = Table::new([
            "NAMESPACE",
            "NAME",
            "SERVER",
            "DECIDED BY",
            "ROUTE",
            "OF",
            "ANSWER",
            "PER SECOND",
            "TOTAL",
        ]);
        for row in &self.rows {
            let decision = &row.decision;
            let (answer, tone) = match decision.allowed {
                true => ("allow", Tone::Good),
                false => ("deny", Tone::Bad),
            };
            let or_none = |it: &Option<String>| shown(it.as_deref().unwrap_or("-"));
            table.row([
                shown(&decision.namespace).into(),
                shown(&format!("{}/{}", decision.kind, decision.name)).into(),
                or_none(&decision.server).into(),
                shown(&decision.by).into(),
                or_none(&decision.route).into(),
                decision.of.into(),
                Cell::new(answer).tone(tone),
                Cell::new(format!("{:.1}", row.per_second)).right(),
                Cell::new(format!("{:.0}", row.total)).right(),
            ]);
        }
        table.write(to, colours)
    }
}

fn decision(
    series: &Series,
    scope: &ScopeArgs,
    of: &'static str,
    allowed: bool,
) -> Option<Decision> {
    let workload = scope.of_series(series)?;
    let server = series
        .label("srv_name")
        .filter(|_| series.is("srv_kind", "server"));
    let route = series.label("route_name");
    let route = route.filter(|_| !series.is("route_kind", "default"));
    Some(Decision {
        namespace: workload.namespace,
        kind: workload.kind,
        name: workload.name,
        server: server.map(str::to_owned),
        by: series.label("authz_name").unwrap_or("-").to_owned(),
        route: route.map(str::to_owned),
        of,
        allowed,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::Scrape;
    use crate::view::{Recent, Said};

    fn metrics(allowed: u32, denied: u32) -> String {
        let pod = "namespace=\"shop\",deployment=\"web\"";
        let server = "srv_kind=\"server\",srv_name=\"web-api\"";
        format!(
            "inbound_http_authz_allow_total{{{pod},pod=\"web-1\",{server},authz_name=\"readers\",route_kind=\"HTTPRoute\",route_name=\"read\"}} {allowed}\n\
             inbound_http_authz_allow_total{{{pod},pod=\"web-2\",{server},authz_name=\"readers\",route_kind=\"HTTPRoute\",route_name=\"read\"}} {allowed}\n\
             inbound_tcp_authz_deny_total{{{pod},pod=\"web-1\",authz_name=\"default:deny\"}} {denied}\n"
        )
    }

    #[test]
    fn decisions_are_counted_by_what_decided() {
        let now = View {
            said: vec![Said {
                node: "one".to_owned(),
                scrape: Scrape::read(&metrics(20, 5), |_| true),
                recent: Recent::default(),
                pods: vec![],
            }],
            missing: vec![],
        };
        let change = Change::grown(&metrics(10, 2), 10.0);
        let report = Report::new(&now, &change, &ScopeArgs::everything());
        let mut text = vec![];
        report.write(&mut text, false).expect("a vector");
        assert_eq!(
            String::from_utf8(text).expect("text"),
            "\
NAMESPACE   NAME             SERVER    DECIDED BY     ROUTE   OF            ANSWER   PER SECOND   TOTAL
shop        deployment/web   -         default:deny   -       connections   deny            0.2       5
shop        deployment/web   web-api   readers        read    requests      allow           2.0      40
"
        );
    }
}
