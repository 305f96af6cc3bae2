//! `weft routes`: the routes of Services and EgressNetworks, whether they are in force, and what goes by them, of all clients
//! together.

use std::collections::BTreeMap;
use std::io::Write;

use clap::Args;
use serde::{Deserialize, Serialize};

use super::rate_cell;
use super::traffic::{self, Backend, Numbers, Port, Route, Routed, WANTED, branch};
use crate::controller::{self, Reach, ReachError};
use crate::outcome::Outcome;
use crate::output::{self, Cell, Format, Table, Tone, shown};
use crate::view::{Change, Seen, View, Window};

/// What `weft routes` is asked.
#[derive(Args, Debug)]
pub struct Routes {
    /// Only those of this Service: `web`, or `svc/web`.
    #[arg(value_name = "SERVICE", value_parser = service)]
    pub service: Option<String>,
    /// The namespace of the Services. If it is not given: in a cluster that of the kubeconfig's context, or else `default`.
    #[arg(short, long)]
    pub namespace: Option<String>,
    /// All namespaces.
    #[arg(short = 'A', long, conflicts_with = "namespace")]
    pub all_namespaces: bool,
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

/// A route of a parent.
#[derive(Debug, Serialize)]
struct Row {
    parent: Port,
    route: Route,
    /// Why it is not in force as it is written; empty: it is, or it is no object.
    problems: Vec<String>,
    /// As clients see it.
    #[serde(flatten)]
    numbers: Numbers,
    retries_per_second: f64,
    backends: Vec<Backend>,
}

/// `/routes` of a controller.
#[derive(Debug, Default, Deserialize)]
struct List {
    routes: Vec<Told>,
}

#[derive(Debug, Deserialize)]
struct Told {
    /// As `HTTPRoute.gateway.networking.k8s.io shop/split`.
    route: String,
    parents: Vec<Parent>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Parent {
    parent_ref: ParentRef,
    conditions: Vec<Condition>,
}

#[derive(Debug, Deserialize)]
struct ParentRef {
    kind: Option<String>,
    namespace: Option<String>,
    name: String,
    port: Option<u16>,
}

#[derive(Debug, Deserialize)]
struct Condition {
    #[serde(rename = "type")]
    kind: String,
    status: String,
    reason: String,
    message: String,
}

/// Finds out and shows.
///
/// # Errors
/// Nobody can be asked, and why.
pub async fn run(routes: &Routes) -> Result<Outcome, crate::Error> {
    let report = report(routes).await?;
    output::show(
        routes.output,
        &report,
        &report.seen.notes(),
        |out, colours| report.write(out, colours),
    )?;
    Ok(Outcome::Good)
}

async fn report(routes: &Routes) -> Result<Report, ReachError> {
    let (view, change) = View::watch(&routes.reach, &[], &WANTED, &routes.window).await?;
    let mut told = List::default();
    // All controllers know the same.
    if let Some(place) = routes.reach.places().await?.first() {
        told = controller::json(place, "/routes").await?;
    }
    let namespace = match (&routes.namespace, routes.all_namespaces) {
        (_, true) => None,
        (Some(namespace), false) => Some(namespace.clone()),
        (None, false) => Some(routes.reach.namespace().await),
    };
    let asked = Asked {
        namespace,
        service: routes.service.clone(),
    };
    Ok(Report::new(&view, &change, told, &asked))
}

/// Whose routes.
#[derive(Debug)]
struct Asked {
    /// None: all.
    namespace: Option<String>,
    service: Option<String>,
}

impl Asked {
    fn has(&self, parent: &Port) -> bool {
        let is =
            |wanted: &Option<String>, found: &str| wanted.as_deref().is_none_or(|it| it == found);
        is(&self.namespace, &parent.namespace) && is(&self.service, &parent.name)
    }
}

impl Report {
    fn new(view: &View, change: &Change, told: List, asked: &Asked) -> Self {
        let counted = traffic::count(change, |_, parent, route| {
            asked.has(&parent).then_some((parent, route))
        });
        let mut all: BTreeMap<(Port, Route), (Routed, Vec<String>)> = BTreeMap::new();
        for (key, routed) in counted {
            all.insert(key, (routed, vec![]));
        }
        for told in told.routes {
            told.among(&mut all, asked);
        }
        let rows = all
            .into_iter()
            .map(|((parent, route), (routed, problems))| Row {
                numbers: routed.whole.numbers(change),
                retries_per_second: change.per_second(routed.retries),
                backends: routed.backends(change),
                parent,
                route,
                problems,
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
                "no route, and no request, was seen: -A shows those of all namespaces"
            );
        }
        let mut table = Table::new([
            "NAMESPACE",
            "SERVICE",
            "ROUTE → BACKEND",
            "STATE",
            "SUCCESS",
            "RPS",
            "P50",
            "P95",
            "P99",
            "TIMEOUTS/S",
            "RETRIES/S",
        ]);
        for row in &self.rows {
            let namespace = &row.parent.namespace;
            let state = match (row.problems.first(), row.route.is_object()) {
                (Some(problem), _) => Cell::new(shown(problem)).tone(Tone::Bad),
                (None, true) => Cell::new("in force").tone(Tone::Good),
                (None, false) => "-".into(),
            };
            let mut cells = vec![
                shown(namespace).into(),
                shown(&row.parent.shown_in(namespace)).into(),
                shown(&row.route.to_string()).into(),
                state,
            ];
            cells.extend(row.numbers.cells());
            cells.push(rate_cell(row.retries_per_second));
            table.row(cells);
            for (index, it) in row.backends.iter().enumerate() {
                let backend = it.backend.shown_in(namespace);
                let text = shown(&branch(index, row.backends.len(), &backend));
                let mut cells: Vec<Cell> = vec!["".into(), "".into(), text.into(), "".into()];
                cells.extend(it.numbers.cells());
                cells.push(Cell::new("").right());
                table.row(cells);
            }
        }
        table.write(to, colours)
    }
}

impl Told {
    /// Puts what is said of a route beside what goes by it; a route that nothing goes by has a row as well.
    fn among(self, all: &mut BTreeMap<(Port, Route), (Routed, Vec<String>)>, asked: &Asked) {
        let Some(route) = self.route() else {
            return;
        };
        for Parent {
            parent_ref,
            conditions,
        } in self.parents
        {
            let parent = Port {
                kind: parent_ref.kind.unwrap_or_else(|| "Service".to_owned()),
                namespace: parent_ref
                    .namespace
                    .unwrap_or_else(|| route.namespace.clone()),
                name: parent_ref.name,
                // Without one, the route is for all ports.
                port: parent_ref
                    .port
                    .map_or_else(|| "*".to_owned(), |it| it.to_string()),
            };
            if !asked.has(&parent) || !["Service", "EgressNetwork"].contains(&parent.kind.as_str())
            {
                continue;
            }
            let bad = conditions
                .iter()
                .filter(|it| (it.status == "True") == it.is_bad());
            let bad = bad.map(|it| format!("{}: {}", it.reason, it.message));
            let bad: Vec<String> = bad.collect();
            let mut is_seen = false;
            for ((port, its_route), (_, problems)) in &mut *all {
                let is_port = parent.port == "*" || parent.port == port.port;
                let same = (&port.kind, &port.namespace, &port.name)
                    == (&parent.kind, &parent.namespace, &parent.name);
                if is_port && same && *its_route == route {
                    problems.extend(bad.iter().cloned());
                    is_seen = true;
                }
            }
            if !is_seen {
                all.insert((parent, route.clone()), (Routed::default(), bad));
            }
        }
    }

    fn route(&self) -> Option<Route> {
        let (kind, name) = self.route.split_once(' ')?;
        let (kind, group) = kind.split_once('.')?;
        let (namespace, name) = name.split_once('/')?;
        Some(Route {
            group: group.to_owned(),
            kind: kind.to_owned(),
            namespace: namespace.to_owned(),
            name: name.to_owned(),
        })
    }
}

impl Condition {
    /// Whether it is one of what is wrong, rather than of what is as it should be.
    fn is_bad(&self) -> bool {
        self.kind == "PartiallyInvalid"
    }
}

/// The name of a Service.
fn service(text: &str) -> Result<String, String> {
    let name = match text.split_once('/') {
        None => text,
        Some(("svc" | "service" | "services", name)) => name,
        Some(_) => "",
    };
    match name.is_empty() {
        false => Ok(name.to_owned()),
        true => Err("a Service's name is needed, as web or svc/web".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROUTES: &str = r#"{"routes": [
{"route": "HTTPRoute.gateway.networking.k8s.io shop/split", "parents": [
  {"parentRef": {"kind": "Service", "name": "web", "port": 80}, "controllerName": "weft", "conditions": [
    {"type": "Accepted", "status": "True", "reason": "Accepted", "message": ""},
    {"type": "ResolvedRefs", "status": "False", "reason": "BackendNotFound", "message": "no Service shop/web-v3"},
    {"type": "PartiallyInvalid", "status": "False", "reason": "AllRules", "message": ""}]}]},
{"route": "GRPCRoute.gateway.networking.k8s.io shop/idle", "parents": [
  {"parentRef": {"kind": "Service", "name": "ledger"}, "controllerName": "weft", "conditions": []},
  {"parentRef": {"kind": "Server", "name": "of-the-other-side"}, "controllerName": "weft", "conditions": []},
  {"parentRef": {"kind": "Service", "namespace": "bank", "name": "ledger"}, "controllerName": "weft", "conditions": []}]}]}"#;

    const METRICS: &str = r#"
outbound_http_route_request_statuses_total{namespace="shop",pod="a",PARENT,http_status="200"} 10
outbound_http_route_request_statuses_total{namespace="bank",pod="b",PARENT,http_status="200"} 10
outbound_http_route_backend_response_statuses_total{namespace="bank",pod="b",PARENT,backend_kind="Service",backend_namespace="bank",backend_name="web",backend_port="80",http_status="200"} 10
"#;
    const PARENT: &str = r#"parent_kind="Service",parent_namespace="shop",parent_name="web",parent_port="80",route_group="gateway.networking.k8s.io",route_kind="HTTPRoute",route_namespace="shop",route_name="split""#;

    fn table(service: Option<&str>) -> String {
        let change = Change::grown(&METRICS.replace("PARENT", PARENT), 10.0);
        let told = serde_json::from_str(ROUTES).expect("routes");
        let asked = Asked {
            namespace: Some("shop".to_owned()),
            service: service.map(str::to_owned),
        };
        let mut text = vec![];
        let report = Report::new(&View::default(), &change, told, &asked);
        report.write(&mut text, false).expect("a vector");
        String::from_utf8(text).expect("text")
    }

    #[test]
    fn routes_are_shown_with_what_goes_by_them() {
        assert_eq!(
            table(None),
            "\
NAMESPACE   SERVICE    ROUTE → BACKEND   STATE                                     SUCCESS   RPS   P50   P95   P99   TIMEOUTS/S   RETRIES/S
shop        ledger:*   GRPCRoute/idle    in force                                        -   0.0     -     -     -          0.0         0.0
shop        web:80     HTTPRoute/split   BackendNotFound: no Service shop/web-v3   100.00%   2.0     -     -     -          0.0         0.0
                       └─► bank/web:80                                             100.00%   1.0     -     -     -          0.0
"
        );
        assert!(table(Some("nothing")).contains("no route"));
        assert!(!table(Some("ledger")).contains("split"));
        for bad in ["", "deploy/web", "svc/"] {
            assert!(service(bad).is_err(), "{bad:?} was accepted");
        }
    }
}
