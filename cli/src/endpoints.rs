//! `weft endpoints`: who is behind a Service, as each node's agent sees it.
//!
//! Each agent balances for the clients of its node, and finds out for itself how fast endpoints are and which of them
//! fail: so there is a row for each node, and what one sees another may not.

use std::io::Write;

use clap::Args;
use serde::{Deserialize, Serialize};

use crate::controller::{Reach, ReachError, each};
use crate::outcome::Outcome;
use crate::output::{self, Cell, Format, Table, Tone, shown};
use crate::view::Missing;

/// What `weft endpoints` is asked.
#[derive(Args, Debug)]
pub struct Endpoints {
    /// The Service, as `web` or `svc/web`; all of them, unless said.
    #[arg(value_name = "SERVICE", value_parser = service)]
    pub service: Option<String>,
    /// Its namespace. If it is not given: in a cluster that of the kubeconfig's context, or else `default`.
    #[arg(short, long)]
    pub namespace: Option<String>,
    /// All namespaces.
    #[arg(short = 'A', long, conflicts_with = "namespace")]
    pub all_namespaces: bool,
    /// Only as the agents of this node see it; may be given several times.
    #[arg(long = "node", value_name = "NODE")]
    pub nodes: Vec<String>,
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

/// A port of a Service with its endpoints, as a node sees it.
#[derive(Debug, Serialize)]
struct Row {
    node: String,
    namespace: String,
    service: String,
    #[serde(flatten)]
    port: Port,
}

/// A port as agents show it.
#[derive(Debug, Deserialize, Serialize)]
struct Port {
    port: u16,
    protocol: String,
    /// Exchanges and connections that wait for an endpoint.
    waiting: usize,
    /// Whether those that find none fail at once.
    fail_fast: bool,
    endpoints: Vec<Endpoint>,
}

#[derive(Debug, Deserialize, Serialize)]
struct Endpoint {
    address: String,
    port: u16,
    latency_ms: f64,
    outstanding: u64,
    weight: u64,
    /// None: nothing that fails is left out of this Service.
    #[serde(default)]
    standing: Option<String>,
}

/// The part of `config_dump` that is read.
#[derive(Debug, Deserialize)]
struct Dump {
    services: Vec<Service>,
}

#[derive(Debug, Deserialize)]
struct Service {
    namespace: String,
    name: String,
    ports: Vec<Port>,
}

/// Finds out and shows.
///
/// # Errors
/// Nobody can be asked, and why.
pub async fn run(endpoints: &Endpoints) -> Result<Outcome, crate::Error> {
    let report = report(endpoints).await?;
    let notes: Vec<String> = report.missing.iter().map(Missing::note).collect();
    output::show(endpoints.output, &report, &notes, |out, colours| {
        report.write(out, colours)
    })?;
    Ok(Outcome::Good)
}

async fn report(endpoints: &Endpoints) -> Result<Report, ReachError> {
    let mut agents = endpoints.reach.agents().await?;
    let nodes = &endpoints.nodes;
    agents.retain(|it| nodes.is_empty() || nodes.contains(&it.status.node));
    let asked = each(&agents, |agent| async move {
        let dump = agent.json::<Dump>("config_dump").await;
        (agent.status.node, dump.map_err(|it| it.to_string()))
    });
    let mut report = Report {
        rows: vec![],
        missing: vec![],
    };
    let namespace = match (&endpoints.namespace, endpoints.all_namespaces) {
        (_, true) => None,
        (Some(namespace), false) => Some(namespace.clone()),
        (None, false) => Some(endpoints.reach.namespace().await),
    };
    let asked_for = (namespace.as_deref(), endpoints.service.as_deref());
    for (node, dump) in asked.await {
        match dump {
            Ok(dump) => report.take(&node, dump, asked_for),
            Err(reason) => report.missing.push(Missing { node, reason }),
        }
    }
    Ok(report)
}

impl Report {
    /// Takes in what an agent says of a Service in a namespace; none: of all.
    fn take(&mut self, node: &str, dump: Dump, (namespace, name): (Option<&str>, Option<&str>)) {
        for service in dump.services {
            let is_named = name.is_none_or(|it| it == service.name);
            let is_there = namespace.is_none_or(|it| it == service.namespace);
            if !(is_named && is_there) {
                continue;
            }
            let rows = service.ports.into_iter().map(|port| Row {
                node: node.to_owned(),
                namespace: service.namespace.clone(),
                service: service.name.clone(),
                port,
            });
            self.rows.extend(rows);
        }
        let key = |it: &Row| {
            let of = (it.namespace.clone(), it.service.clone());
            (of, it.port.port, it.node.clone())
        };
        self.rows.sort_by_key(key);
    }

    fn write(&self, to: &mut impl Write, colours: bool) -> std::io::Result<()> {
        if self.rows.is_empty() {
            return writeln!(
                to,
                "no such Service is known: -A shows those of all namespaces"
            );
        }
        let mut table = Table::new([
            "NAMESPACE",
            "SERVICE",
            "PROTOCOL",
            "NODE",
            "ENDPOINT",
            "STATE",
            "LATENCY",
            "OUTSTANDING",
            "WEIGHT",
        ]);
        for row in &self.rows {
            let begin = || -> Vec<Cell> {
                vec![
                    shown(&row.namespace).into(),
                    shown(&format!("{}:{}", row.service, row.port.port)).into(),
                    shown(&row.port.protocol).into(),
                    shown(&row.node).into(),
                ]
            };
            if row.port.endpoints.is_empty() {
                let mut cells = begin();
                cells.push(Cell::new("none is ready").tone(Tone::Bad));
                table.row(cells);
            }
            for endpoint in &row.port.endpoints {
                let mut cells = begin();
                cells.extend(endpoint.cells());
                table.row(cells);
            }
        }
        table.write(to, colours)
    }
}

impl Endpoint {
    fn cells(&self) -> [Cell; 5] {
        let state = self.standing.as_deref().unwrap_or("ready");
        let tone = match state {
            "ready" => Tone::Good,
            "ejected" => Tone::Bad,
            _ => Tone::Warn,
        };
        let address = match self.address.contains(':') {
            true => format!("[{}]:{}", self.address, self.port),
            false => format!("{}:{}", self.address, self.port),
        };
        [
            shown(&address).into(),
            Cell::new(shown(state)).tone(tone),
            Cell::new(format!("{:.1}ms", self.latency_ms)).right(),
            Cell::new(self.outstanding.to_string()).right(),
            Cell::new(self.weight.to_string()).right(),
        ]
    }
}

fn service(text: &str) -> Result<String, String> {
    match text.split_once('/') {
        None if !text.is_empty() => Ok(text.to_owned()),
        Some(("svc" | "service" | "services", name)) if !name.is_empty() => Ok(name.to_owned()),
        _ => Err("the name of a Service is needed, as web or svc/web".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::command::{Cli, Command};

    const DUMP: &str = r#"{"complete": true, "services": [
{"namespace": "shop", "name": "web", "addresses": ["10.2.0.1"], "ports": [
  {"port": 80, "protocol": "http1", "waiting": 0, "fail_fast": false, "endpoints": [
    {"address": "10.1.0.1", "port": 8080, "latency_ms": 3.25, "outstanding": 2, "weight": 100, "standing": "ready"},
    {"address": "fd00::1", "port": 8080, "latency_ms": 0, "outstanding": 0, "weight": 100, "standing": "ejected"}]},
  {"port": 81, "protocol": "detect", "waiting": 3, "fail_fast": true, "endpoints": []}]},
{"namespace": "old", "name": "web", "addresses": [], "ports": []}]}"#;

    fn table(arguments: &[&str]) -> String {
        let all = ["weft", "endpoints"].iter().chain(arguments);
        let Command::Endpoints(asked) = Cli::try_parse_from(all).expect("a command line").command
        else {
            panic!("another command");
        };
        let mut report = Report {
            rows: vec![],
            missing: vec![],
        };
        let dump = serde_json::from_str(DUMP).expect("a dump");
        let namespace = asked.namespace.filter(|_| !asked.all_namespaces);
        report.take(
            "one",
            dump,
            (namespace.as_deref(), asked.service.as_deref()),
        );
        let mut text = vec![];
        report.write(&mut text, false).expect("a vector");
        String::from_utf8(text).expect("text")
    }

    #[test]
    fn endpoints_are_shown_as_a_node_sees_them() {
        assert_eq!(
            table(&["svc/web", "-n", "shop"]),
            "\
NAMESPACE   SERVICE   PROTOCOL   NODE   ENDPOINT         STATE     LATENCY   OUTSTANDING   WEIGHT
shop        web:80    http1      one    10.1.0.1:8080    ready       3.2ms             2      100
shop        web:80    http1      one    [fd00::1]:8080   ejected     0.0ms             0      100
shop        web:81    detect     one    none is ready
"
        );
        assert!(table(&["nothing", "-A"]).contains("no such Service"));
        for bad in ["", "deploy/web", "svc/"] {
            assert!(service(bad).is_err(), "{bad:?} was accepted");
        }
    }
}
