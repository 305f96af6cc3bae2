//! The rows of the table: their names, what they are measured in, and the load each comes from.

use anyhow::{Result, ensure};
use clap::ValueEnum;

/// Where the two applications are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Route {
    /// On two nodes: through a tunnel.
    Across,
    /// On one node.
    SameNode,
}

/// What the applications do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Load {
    /// So many connections send as much as they can.
    Bulk(u8),
    /// So many connections, each with a request after the other.
    Requests(u8),
    /// 500 requests a second.
    Latency,
    /// 32 clients open connections, each with one request.
    Connections,
    /// Agents without flows, right after their start.
    Idle,
    /// Many idle flows.
    Flows,
    /// 100 pods on a node.
    Pods,
    /// First flows between pairs of pods.
    Handshakes,
    /// 500 requests a second beside a pod that floods the node's agent.
    Fairness,
}

/// A row.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Row {
    pub(crate) name: &'static str,
    pub(crate) unit: &'static str,
    pub(crate) load: Load,
}

/// The rows that are asked for, and on which routes.
pub(crate) struct Selection {
    rows: Vec<Row>,
    route: Option<Route>,
}

impl Selection {
    /// Whether a row is asked for.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.rows.iter().any(|row| row.name == name)
    }

    /// The routes that are asked for.
    pub(crate) fn routes(&self) -> Vec<Route> {
        let wanted = |route: &Route| self.route.is_none_or(|only| only == *route);
        Route::ALL.into_iter().filter(wanted).collect()
    }

    /// Whether a row is asked for that comes from this load.
    pub(crate) fn needs(&self, load: Load) -> bool {
        self.rows.iter().any(|row| row.load == load)
    }
}

impl Route {
    /// Both, in the order of the table.
    pub(crate) const ALL: [Route; 2] = [Route::Across, Route::SameNode];

    /// Its name in the table.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Route::Across => "across",
            Route::SameNode => "same-node",
        }
    }
}

/// The rows that these words ask for: names, or what names begin with; all without any.
pub(crate) fn choose(words: &[String], route: Option<Route>) -> Result<Selection> {
    for word in words {
        let known: Vec<&str> = ROWS.iter().map(|row| row.name).collect();
        ensure!(
            ROWS.iter().any(|row| asks_for(word, row.name)),
            "no row is named {word:?}; there are {}",
            known.join(", ")
        );
    }
    let chosen = ROWS
        .into_iter()
        .filter(|row| words.is_empty() || words.iter().any(|word| asks_for(word, row.name)));
    Ok(Selection {
        rows: chosen.collect(),
        route,
    })
}

/// `bulk` asks for `bulk-1`, but `bulk-1` not for a `bulk-16`.
fn asks_for(word: &str, name: &str) -> bool {
    name.strip_prefix(word)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
}

const fn row(name: &'static str, unit: &'static str, load: Load) -> Row {
    Row { name, unit, load }
}

/// All rows, in the order of the table.
pub(crate) const ROWS: [Row; 20] = [
    row("bulk-1", "Gbit/s", Load::Bulk(1)),
    row("bulk-4", "Gbit/s", Load::Bulk(4)),
    row("bulk-8", "Gbit/s", Load::Bulk(8)),
    row("requests-1", "requests/s", Load::Requests(1)),
    row("requests-32", "requests/s", Load::Requests(32)),
    row("latency-500-p50", "µs", Load::Latency),
    row("latency-500-p99", "µs", Load::Latency),
    row("latency-500-added", "µs", Load::Latency),
    row("connections-32", "connections/s", Load::Connections),
    row("handshakes", "tunnels/s", Load::Handshakes),
    row("cpu-per-gb", "CPU s", Load::Bulk(1)),
    row("cpu-per-10k-requests", "CPU s", Load::Requests(32)),
    row("cpu-per-10k-connections", "CPU s", Load::Connections),
    row("memory-idle", "MiB", Load::Idle),
    row("memory-bulk", "MiB", Load::Bulk(8)),
    row("memory-8k-flows", "MiB", Load::Flows),
    row("memory-100-pods", "MiB", Load::Pods),
    row("fairness-connections", "µs", Load::Fairness),
    row("fairness-stalled", "µs", Load::Fairness),
    row("fairness-bulk", "µs", Load::Fairness),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_choose_rows() {
        let choice = |words: &[&str]| {
            let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
            choose(&words, None)
                .map(|selection| selection.rows.iter().map(|row| row.name).collect())
        };
        let names: Vec<&str> = choice(&["bulk", "memory-idle"]).expect("known");
        assert_eq!(names, ["bulk-1", "bulk-4", "bulk-8", "memory-idle"]);
        let names: Vec<&str> = choice(&["requests-1"]).expect("known");
        assert_eq!(names, ["requests-1"]);
        assert!(choice(&["bul"]).is_err());
        assert_eq!(choice(&[]).expect("all").len(), ROWS.len());
    }
}
