//! `weft edges`: what talks to what, as whom, and whether it is secured.
//!
//! Seen from the side of clients that are in the mesh, whose agents know both ends; clients outside of it are seen at
//! the servers. What is shown is what agents remember: since they began, of pods that are still there.

use std::collections::BTreeMap;
use std::io::Write;

use clap::Args;
use serde::Serialize;

use crate::controller::{Reach, ReachError};
use crate::metrics::Series;
use crate::outcome::Outcome;
use crate::output::{self, Cell, Format, Table, Tone, shown};
use crate::view::{Missing, Pod, ScopeArgs, View};

/// What `weft edges` is asked.
#[derive(Args, Debug)]
pub struct Edges {
    /// Of what: edges that lead from or to it.
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
    edges: Vec<Edge>,
    /// Agents that do not answer: their part is missing.
    missing: Vec<Missing>,
}

/// Who talks to whom.
#[derive(Debug, Serialize)]
struct Edge {
    #[serde(flatten)]
    ends: Ends,
    /// Connections that were opened since the agents began,
    opened: f64,
    /// and those that are open.
    open: f64,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
struct Ends {
    /// None: outside of the mesh.
    client: Option<End>,
    /// None: no pod and no Service, so outside of the cluster.
    server: Option<End>,
    secured: Secured,
    client_identity: Option<String>,
    server_identity: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
struct End {
    namespace: String,
    kind: &'static str,
    name: String,
}

/// How a connection is secured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
enum Secured {
    /// By mutual TLS between nodes.
    MutualTls,
    /// On one node, where the kernel attests both ends and nothing leaves it.
    SameNode,
    /// A pod with itself.
    Loopback,
    /// Not at all.
    No,
}

const OPENED: &str = "tcp_open_total";
const OPEN: &str = "tcp_open_connections";

/// Finds out and shows.
///
/// # Errors
/// Nobody can be asked, and why.
pub async fn run(edges: &Edges) -> Result<Outcome, crate::Error> {
    let report = report(edges).await?;
    let notes: Vec<String> = report.missing.iter().map(Missing::note).collect();
    output::show(edges.output, &report, &notes, |out, colours| {
        report.write(out, colours)
    })?;
    Ok(Outcome::Good)
}

async fn report(edges: &Edges) -> Result<Report, ReachError> {
    let view = View::take(&edges.reach, &[OPENED, OPEN]).await?;
    let scope = edges.scope.settled(&edges.reach).await;
    Ok(Report::new(&view, &scope))
}

type Pods = BTreeMap<(String, String), Pod>;

impl Report {
    fn new(view: &View, scope: &ScopeArgs) -> Self {
        let pods = view.pods();
        let mut edges: BTreeMap<Ends, (f64, f64)> = BTreeMap::new();
        for (name, is_open) in [(OPENED, false), (OPEN, true)] {
            for (series, value) in view.of(name) {
                if let Some(ends) = ends(series, &pods, scope) {
                    let (opened, open) = edges.entry(ends).or_default();
                    *(if is_open { open } else { opened }) += value;
                }
            }
        }
        let edges = edges.into_iter();
        let edges = edges.map(|(ends, (opened, open))| Edge { ends, opened, open });
        Self {
            edges: edges.filter(|it| it.opened > 0.0).collect(),
            missing: view.missing.clone(),
        }
    }

    fn write(&self, to: &mut impl Write, colours: bool) -> std::io::Result<()> {
        if self.edges.is_empty() {
            return writeln!(
                to,
                "no connection was seen: -A shows those of all namespaces"
            );
        }
        let mut table = Table::new([
            "CLIENT",
            "SERVER",
            "SECURED",
            "CLIENT IDENTITY",
            "SERVER IDENTITY",
            "OPEN",
            "OPENED",
        ]);
        for Edge { ends, opened, open } in &self.edges {
            let tone = match ends.secured {
                Secured::No => Tone::Warn,
                _ => Tone::Good,
            };
            let end =
                |end: &Option<End>| end.as_ref().map_or("(outside)".to_owned(), End::to_string);
            let identity = |it: &Option<String>| shown(it.as_deref().unwrap_or("-"));
            table.row([
                shown(&end(&ends.client)).into(),
                shown(&end(&ends.server)).into(),
                Cell::new(ends.secured.as_str()).tone(tone),
                identity(&ends.client_identity).into(),
                identity(&ends.server_identity).into(),
                Cell::new(format!("{open:.0}")).right(),
                Cell::new(format!("{opened:.0}")).right(),
            ]);
        }
        table.write(to, colours)
    }
}

/// What a series says who talks to whom; none: nothing that is asked about, or another one says it.
fn ends(series: &Series, pods: &Pods, scope: &ScopeArgs) -> Option<Ends> {
    let secured = match (series.label("tls"), series.label("no_tls_reason")) {
        (Some("true"), Some("same_node")) => Secured::SameNode,
        (Some("true"), _) => Secured::MutualTls,
        (Some("loopback"), _) => Secured::Loopback,
        (Some(_), _) => Secured::No,
        // There was no connection.
        (None, _) => return None,
    };
    let everything = ScopeArgs::everything();
    let own = everything.of_series(series).map(End::from);
    let own_pod = (series.label("namespace")?, series.label("pod")?);
    let own_pod = pods.get(&(own_pod.0.to_owned(), own_pod.1.to_owned()));
    let own_identity = own_pod.and_then(|it| it.identity.clone());
    let is_asked_for = |pod: Option<&Pod>| pod.is_some_and(|it| scope.of_pod(it).is_some());
    let asked = scope.of_series(series).is_some();
    let identity = |label: &str| series.label(label).map(str::to_owned);
    let ends = match series.label("direction")? {
        "outbound" if series.is("peer", "dst") => {
            let other = other_pod(series, pods);
            if !asked && !is_asked_for(other) {
                return None;
            }
            Ends {
                client: own,
                server: other_end(series, other),
                secured,
                client_identity: own_identity,
                server_identity: identity("server_id"),
            }
        }
        // Those of the mesh are seen at their own side.
        "inbound" if series.is("peer", "src") && secured == Secured::No && asked => Ends {
            client: None,
            server: own,
            secured,
            client_identity: None,
            server_identity: own_identity,
        },
        _ => return None,
    };
    Some(ends)
}

fn other_pod<'a>(series: &Series, pods: &'a Pods) -> Option<&'a Pod> {
    let key = (series.label("dst_namespace")?, series.label("dst_pod")?);
    pods.get(&(key.0.to_owned(), key.1.to_owned()))
}

fn other_end(series: &Series, pod: Option<&Pod>) -> Option<End> {
    if let Some(workload) = pod.and_then(|it| ScopeArgs::everything().of_pod(it)) {
        return Some(workload.into());
    }
    let namespace = series.label("dst_namespace")?.to_owned();
    let named = |kind, label: &str| Some((kind, series.label(label)?.to_owned()));
    let (kind, name) = named("pod", "dst_pod").or_else(|| named("service", "dst_service"))?;
    Some(End {
        namespace,
        kind,
        name,
    })
}

impl From<crate::view::Workload> for End {
    fn from(workload: crate::view::Workload) -> Self {
        Self {
            namespace: workload.namespace,
            kind: workload.kind,
            name: workload.name,
        }
    }
}

impl std::fmt::Display for End {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            namespace,
            kind,
            name,
        } = self;
        write!(formatter, "{namespace}/{kind}/{name}")
    }
}

impl Secured {
    fn as_str(self) -> &'static str {
        match self {
            Self::MutualTls => "mTLS",
            Self::SameNode => "same node",
            Self::Loopback => "loopback",
            Self::No => "no",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::Scrape;
    use crate::view::{Recent, Said};

    const METRICS: &str = r#"
tcp_open_total{direction="outbound",peer="dst",namespace="shop",deployment="order",pod="order-1",dst_namespace="shop",dst_service="web",dst_pod="web-1",tls="true",server_id="spiffe://td/ns/shop/sa/web"} 7
tcp_open_total{direction="outbound",peer="src",namespace="shop",deployment="order",pod="order-1",dst_namespace="shop",dst_service="web",dst_pod="web-1",tls="true",server_id="spiffe://td/ns/shop/sa/web"} 7
tcp_open_total{direction="inbound",peer="src",namespace="shop",pod="web-1",tls="true",client_id="spiffe://td/ns/shop/sa/order"} 7
tcp_open_total{direction="inbound",peer="src",namespace="shop",pod="web-1",tls="no_identity",no_tls_reason="plaintext"} 2
tcp_open_total{direction="outbound",peer="dst",namespace="shop",pod="web-1",tls="no_identity"} 1
tcp_open_total{direction="outbound",peer="dst",namespace="shop",pod="web-1",dst_namespace="old",dst_pod="db-0",tls="no_identity"} 1
tcp_open_total{direction="outbound",peer="dst",namespace="shop",pod="web-1"} 1
tcp_open_connections{direction="outbound",peer="dst",namespace="shop",deployment="order",pod="order-1",dst_namespace="shop",dst_service="web",dst_pod="web-1",tls="true",server_id="spiffe://td/ns/shop/sa/web"} 3
"#;
    const PODS: &str = r#"[
{"namespace": "shop", "name": "web-1", "state": "enrolled", "identity": "spiffe://td/ns/shop/sa/web", "owner": null},
{"namespace": "shop", "name": "order-1", "state": "enrolled", "identity": "spiffe://td/ns/shop/sa/order", "owner": {"kind": "deployment", "name": "order"}}
]"#;

    fn lines(namespace: &str) -> String {
        let view = View {
            said: vec![Said {
                node: "one".to_owned(),
                scrape: Scrape::read(METRICS, |_| true),
                recent: Recent::default(),
                pods: serde_json::from_str(PODS).expect("pods"),
            }],
            missing: vec![],
        };
        let scope = ScopeArgs {
            resource: None,
            namespace: Some(namespace.to_owned()),
            all_namespaces: false,
        };
        let mut text = vec![];
        Report::new(&view, &scope)
            .write(&mut text, false)
            .expect("a vector");
        String::from_utf8(text).expect("text")
    }

    #[test]
    fn each_connection_is_seen_once_with_both_identities() {
        assert_eq!(
            lines("shop"),
            "\
CLIENT                  SERVER           SECURED   CLIENT IDENTITY                SERVER IDENTITY              OPEN   OPENED
(outside)               shop/pod/web-1   no        -                              spiffe://td/ns/shop/sa/web      0        2
shop/deployment/order   shop/pod/web-1   mTLS      spiffe://td/ns/shop/sa/order   spiffe://td/ns/shop/sa/web      3        7
shop/pod/web-1          (outside)        no        spiffe://td/ns/shop/sa/web     -                               0        1
shop/pod/web-1          old/pod/db-0     no        spiffe://td/ns/shop/sa/web     -                               0        1
"
        );
        assert!(lines("old").contains("no connection was seen"));
    }
}
