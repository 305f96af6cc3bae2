//! `weft identity`: who pods are, and until when their certificates say so.

use std::collections::BTreeMap;
use std::io::Write;

use clap::Args;
use serde::Serialize;

use crate::controller::{Reach, ReachError};
use crate::outcome::Outcome;
use crate::output::{self, Cell, Format, Table, Tone, shown};
use crate::time::{now_ms, when};
use crate::view::{Missing, ScopeArgs, View};

/// What `weft identity` is asked.
#[derive(Args, Debug)]
pub struct Identity {
    /// Of what.
    #[command(flatten)]
    pub scope: ScopeArgs,
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
    rows: Vec<Row>,
    /// Agents that do not answer: their part is missing.
    missing: Vec<Missing>,
}

/// A pod.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
struct Row {
    namespace: String,
    pod: String,
    node: String,
    /// None: the pod is not enrolled yet.
    identity: Option<String>,
    /// When its certificate ends, in milliseconds since 1970; none: it has none.
    not_after_ms: Option<u64>,
}

const ENDS: &str = "identity_cert_expiration_timestamp_seconds";

/// Finds out and shows.
///
/// # Errors
/// Nobody can be asked, and why.
pub async fn run(identity: &Identity) -> Result<Outcome, crate::Error> {
    let report = report(identity).await?;
    let notes: Vec<String> = report.missing.iter().map(Missing::note).collect();
    output::show(identity.output, &report, &notes, |out, colours| {
        report.write(out, colours)
    })?;
    Ok(Outcome::Good)
}

async fn report(identity: &Identity) -> Result<Report, ReachError> {
    let view = View::take(&identity.reach, &[ENDS]).await?;
    let scope = identity.scope.settled(&identity.reach).await;
    Ok(Report::new(&view, &scope))
}

impl Report {
    fn new(view: &View, scope: &ScopeArgs) -> Self {
        // During an upgrade two agents have a pod: the one that has it enrolled knows more.
        let mut rows: BTreeMap<(String, String), Row> = BTreeMap::new();
        for said in &view.said {
            let ends = said.scrape.of(ENDS);
            let ends = ends.filter_map(|(series, ends)| Some((series.label("identity")?, ends)));
            let ends: BTreeMap<&str, f64> = ends.collect();
            for pod in said.pods.iter().filter(|it| scope.of_pod(it).is_some()) {
                let ends = pod.identity.as_deref().and_then(|it| ends.get(it));
                let row = Row {
                    namespace: pod.namespace.clone(),
                    pod: pod.name.clone(),
                    node: said.node.clone(),
                    identity: pod.identity.clone(),
                    // Far from where milliseconds are not exact any more.
                    not_after_ms: ends.map(|it| (it * 1000.0) as u64),
                };
                let key = (row.namespace.clone(), row.pod.clone());
                let known = rows
                    .get(&key)
                    .is_some_and(|it| it.not_after_ms >= row.not_after_ms);
                if !known {
                    rows.insert(key, row);
                }
            }
        }
        Self {
            rows: rows.into_values().collect(),
            missing: view.missing.clone(),
        }
    }

    fn write(&self, to: &mut impl Write, colours: bool) -> std::io::Result<()> {
        if self.rows.is_empty() {
            return writeln!(
                to,
                "no meshed pod is there: -A shows those of all namespaces"
            );
        }
        let mut table = Table::new(["NAMESPACE", "POD", "NODE", "IDENTITY", "CERTIFICATE ENDS"]);
        for row in &self.rows {
            let (ends, tone) = match row.not_after_ms {
                None => ("no certificate".to_owned(), Tone::Bad),
                Some(ends) if ends <= now_ms() => (when(ends), Tone::Bad),
                Some(ends) => (when(ends), Tone::Plain),
            };
            let identity = row.identity.as_deref().unwrap_or("(not enrolled)");
            table.row([
                shown(&row.namespace).into(),
                shown(&row.pod).into(),
                shown(&row.node).into(),
                shown(identity).into(),
                Cell::new(ends).tone(tone),
            ]);
        }
        table.write(to, colours)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::Scrape;
    use crate::view::{Recent, Said};

    #[test]
    fn each_pod_is_shown_with_its_certificate() {
        let ends = now_ms() / 1000 + 3 * 3600 + 60;
        let metrics = format!("{ENDS}{{identity=\"spiffe://td/ns/shop/sa/web\"}} {ends}\n");
        let pods = r#"[
{"namespace": "shop", "name": "web-1", "state": "enrolled", "identity": "spiffe://td/ns/shop/sa/web"},
{"namespace": "shop", "name": "web-2", "state": "waiting", "identity": null},
{"namespace": "old", "name": "db", "state": "enrolled", "identity": "spiffe://td/ns/old/sa/db"}
]"#;
        let said = |node: &str, metrics: &str| Said {
            node: node.to_owned(),
            scrape: Scrape::read(metrics, |_| true),
            recent: Recent::default(),
            pods: serde_json::from_str(pods).expect("pods"),
        };
        let view = View {
            // One that has taken over nothing yet.
            said: vec![said("one", ""), said("one", &metrics)],
            missing: vec![],
        };
        let mut text = vec![];
        let report = Report::new(&view, &ScopeArgs::everything());
        report.write(&mut text, false).expect("a vector");
        assert_eq!(
            String::from_utf8(text).expect("text"),
            "\
NAMESPACE   POD     NODE   IDENTITY                     CERTIFICATE ENDS
old         db      one    spiffe://td/ns/old/sa/db     no certificate
shop        web-1   one    spiffe://td/ns/shop/sa/web   in 3 hours
shop        web-2   one    (not enrolled)               no certificate
"
        );
    }
}
