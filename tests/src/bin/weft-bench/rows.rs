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
    /// The same as [`Load::Requests`], where the mesh understands what passes.
    Exchanges(Protocol, u8),
    /// The same as [`Load::Latency`], where the mesh understands what passes.
    ExchangeLatency(Protocol),
    /// 500 requests of HTTP/1 a second through the mesh, without anybody who watches and with somebody who watches all pods.
    Tapped,
    /// 32 clients open connections, each with one request.
    Connections,
    /// The same, where the mesh understands what passes.
    ExchangeConnections(Protocol),
    /// Agents without flows, right after their start.
    Idle,
    /// Many idle flows.
    Flows,
    /// Many connections of HTTP/1 that are kept after a request each.
    KeepAlive,
    /// 100 pods on a node.
    Pods,
    /// First flows between pairs of pods.
    Handshakes,
    /// 500 requests a second beside a pod that floods the node's agent, or that is busy.
    Fairness,
}

/// What applications speak where the mesh takes part in it; everything else is opaque to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Protocol {
    /// HTTP/1.1.
    Http1,
    /// HTTP/2 with prior knowledge.
    Http2,
    /// gRPC.
    Grpc,
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
pub(crate) const ROWS: [Row; 53] = [
    row("bulk-1", "Gbit/s", Load::Bulk(1)),
    row("bulk-4", "Gbit/s", Load::Bulk(4)),
    row("bulk-8", "Gbit/s", Load::Bulk(8)),
    row("requests-1", "requests/s", Load::Requests(1)),
    row("requests-32", "requests/s", Load::Requests(32)),
    row("latency-500-p50", "µs", Load::Latency),
    row("latency-500-p99", "µs", Load::Latency),
    row("latency-500-added", "µs", Load::Latency),
    row("http1-requests-1", "requests/s", HTTP1_REQUESTS),
    row("http1-requests-32", "requests/s", HTTP1_MANY),
    row("http1-latency-500-p50", "µs", HTTP1_LATENCY),
    row("http1-latency-500-p99", "µs", HTTP1_LATENCY),
    row("http1-latency-500-added", "µs", HTTP1_LATENCY),
    row("http2-requests-1", "requests/s", HTTP2_REQUESTS),
    row("http2-requests-32", "requests/s", HTTP2_MANY),
    row("http2-latency-500-p50", "µs", HTTP2_LATENCY),
    row("http2-latency-500-p99", "µs", HTTP2_LATENCY),
    row("http2-latency-500-added", "µs", HTTP2_LATENCY),
    row("grpc-requests-1", "calls/s", GRPC_REQUESTS),
    row("grpc-requests-32", "calls/s", GRPC_MANY),
    row("grpc-latency-500-p50", "µs", GRPC_LATENCY),
    row("grpc-latency-500-p99", "µs", GRPC_LATENCY),
    row("grpc-latency-500-added", "µs", GRPC_LATENCY),
    row("http1-tapped-500-p50", "µs", Load::Tapped),
    row("http1-tapped-500-p99", "µs", Load::Tapped),
    row("connections-32", "connections/s", Load::Connections),
    row("http1-connections-32", "connections/s", HTTP1_CONNECTIONS),
    row("http2-connections-32", "connections/s", HTTP2_CONNECTIONS),
    row("grpc-connections-32", "connections/s", GRPC_CONNECTIONS),
    row("handshakes", "tunnels/s", Load::Handshakes),
    row("cpu-per-gb", "CPU s", Load::Bulk(1)),
    row("cpu-per-10k-requests", "CPU s", Load::Requests(32)),
    row("http1-cpu-per-10k-requests", "CPU s", HTTP1_MANY),
    row("http2-cpu-per-10k-requests", "CPU s", HTTP2_MANY),
    row("grpc-cpu-per-10k-requests", "CPU s", GRPC_MANY),
    row("cpu-per-10k-connections", "CPU s", Load::Connections),
    row("http1-cpu-per-10k-connections", "CPU s", HTTP1_CONNECTIONS),
    row("http2-cpu-per-10k-connections", "CPU s", HTTP2_CONNECTIONS),
    row("grpc-cpu-per-10k-connections", "CPU s", GRPC_CONNECTIONS),
    row("memory-idle", "MiB", Load::Idle),
    row("memory-bulk", "MiB", Load::Bulk(8)),
    row("memory-8k-flows", "MiB", Load::Flows),
    row("memory-8k-keepalive", "MiB", Load::KeepAlive),
    row("memory-100-pods", "MiB", Load::Pods),
    row("fairness-connections", "µs", Load::Fairness),
    row("fairness-stalled", "µs", Load::Fairness),
    row("fairness-bulk", "µs", Load::Fairness),
    row("fairness-bodies", "µs", Load::Fairness),
    row("fairness-streams", "µs", Load::Fairness),
    row("fairness-heads", "µs", Load::Fairness),
    row("fairness-continuations", "µs", Load::Fairness),
    row("busy-requests-32", "requests/s", Load::Fairness),
    row("busy-bulk-8", "Gbit/s", Load::Fairness),
];

const HTTP1_REQUESTS: Load = Load::Exchanges(Protocol::Http1, 1);
const HTTP1_MANY: Load = Load::Exchanges(Protocol::Http1, 32);
const HTTP1_LATENCY: Load = Load::ExchangeLatency(Protocol::Http1);
const HTTP2_REQUESTS: Load = Load::Exchanges(Protocol::Http2, 1);
const HTTP2_MANY: Load = Load::Exchanges(Protocol::Http2, 32);
const HTTP2_LATENCY: Load = Load::ExchangeLatency(Protocol::Http2);
const GRPC_REQUESTS: Load = Load::Exchanges(Protocol::Grpc, 1);
const GRPC_MANY: Load = Load::Exchanges(Protocol::Grpc, 32);
const GRPC_LATENCY: Load = Load::ExchangeLatency(Protocol::Grpc);
const HTTP1_CONNECTIONS: Load = Load::ExchangeConnections(Protocol::Http1);
const HTTP2_CONNECTIONS: Load = Load::ExchangeConnections(Protocol::Http2);
const GRPC_CONNECTIONS: Load = Load::ExchangeConnections(Protocol::Grpc);

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
