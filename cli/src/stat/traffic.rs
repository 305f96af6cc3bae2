//! Requests by route and backend, as clients' agents count them.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

use super::buckets::Buckets;
use super::{Latencies, latency_cell, rate_cell, success_cell, unwanted_cell};
use crate::metrics::Series;
use crate::output::Cell;
use crate::view::Change;

/// A port of what requests are sent to: of a Service, or of an EgressNetwork.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Port {
    /// `Service` or `EgressNetwork`.
    pub kind: String,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// The port.
    pub port: String,
}

/// A route; of a parent without any, `default` and a name that tells what is spoken.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Route {
    /// Its API group; empty: it is no object.
    pub group: String,
    /// `HTTPRoute`, `GRPCRoute`, …
    pub kind: String,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

/// What a route's requests are, as clients see them, and by its backends.
#[derive(Debug, Default)]
pub struct Routed {
    /// As clients see them: with all of their tries one.
    pub whole: Traffic,
    /// How often something was sent again.
    pub retries: f64,
    /// Tries, by backend.
    pub backends: BTreeMap<Port, Traffic>,
}

/// What was counted of requests.
#[derive(Debug, Default)]
pub struct Traffic {
    responses: f64,
    successes: f64,
    timeouts: f64,
    /// In seconds.
    buckets: Buckets,
}

/// The same as it is shown.
#[derive(Debug, Default, PartialEq, Serialize)]
pub struct Numbers {
    /// None: there was no response.
    pub success_rate: Option<f64>,
    /// Of those that ended.
    pub requests_per_second: f64,
    /// From the request to the end of the response.
    pub latency_ms: Latencies,
    /// Those that were ended because they took too long.
    pub timeouts_per_second: f64,
}

/// A backend with its numbers.
#[derive(Debug, PartialEq, Serialize)]
pub struct Backend {
    /// Which.
    pub backend: Port,
    /// Tries.
    #[serde(flatten)]
    pub numbers: Numbers,
}

/// Those of these that are not about backends.
pub const WHOLE: [&str; 4] = [
    "outbound_http_route_request_statuses_total",
    "outbound_grpc_route_request_statuses_total",
    "outbound_http_route_retry_requests_total",
    "outbound_grpc_route_retry_requests_total",
];
/// All metrics that this looks at.
pub const WANTED: [&str; 10] = [
    "outbound_http_route_request_statuses_total",
    "outbound_grpc_route_request_statuses_total",
    "outbound_http_route_request_duration_seconds_bucket",
    "outbound_grpc_route_request_duration_seconds_bucket",
    "outbound_http_route_backend_response_statuses_total",
    "outbound_grpc_route_backend_response_statuses_total",
    "outbound_http_route_backend_response_duration_seconds_bucket",
    "outbound_grpc_route_backend_response_duration_seconds_bucket",
    "outbound_http_route_retry_requests_total",
    "outbound_grpc_route_retry_requests_total",
];

const TIMEOUTS: [&str; 4] = [
    "REQUEST_TIMEOUT",
    "RESPONSE_HEADERS_TIMEOUT",
    "RESPONSE_STREAM_TIMEOUT",
    "IDLE_TIMEOUT",
];
/// Statuses of gRPC that are failures, as agents classify them.
const GRPC_FAILURES: [&str; 6] = [
    "UNKNOWN",
    "DEADLINE_EXCEEDED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "other",
];

/// Whether a status of gRPC, by its name, is a failure of the server.
pub(crate) fn is_grpc_failure(status: &str) -> bool {
    GRPC_FAILURES.contains(&status)
}

/// Counts what grew, by what `key` makes of a series; none: it is not asked about.
pub fn count<K: Ord>(
    change: &Change,
    key: impl Fn(&Series, Port, Route) -> Option<K>,
) -> BTreeMap<K, Routed> {
    let mut all: BTreeMap<K, Routed> = BTreeMap::new();
    for grown in &change.counters {
        let series = &grown.series;
        let Some(name) = series
            .name
            .strip_prefix("outbound_http_route_")
            .or_else(|| series.name.strip_prefix("outbound_grpc_route_"))
        else {
            continue;
        };
        let Some(parent) = Port::of(series, "parent") else {
            continue;
        };
        let Some(key) = key(series, parent, Route::of(series)) else {
            continue;
        };
        let routed = all.entry(key).or_default();
        if name == "retry_requests_total" {
            routed.retries += grown.by;
            continue;
        }
        let traffic = match name.starts_with("backend_") {
            false => &mut routed.whole,
            true => match Port::of(series, "backend") {
                Some(backend) => routed.backends.entry(backend).or_default(),
                None => continue,
            },
        };
        if name.ends_with("_statuses_total") {
            traffic.status(series, grown.by);
        } else if name.ends_with("_duration_seconds_bucket") {
            traffic.buckets.add(series, grown.by);
        }
    }
    all
}

impl Port {
    fn of(series: &Series, which: &str) -> Option<Self> {
        let label = |name: &str| series.label(&format!("{which}_{name}")).map(str::to_owned);
        Some(Self {
            kind: label("kind")?,
            namespace: label("namespace")?,
            name: label("name")?,
            port: label("port").unwrap_or_default(),
        })
    }

    /// As it is shown to somebody in a namespace.
    pub fn shown_in(&self, namespace: &str) -> String {
        let Self {
            kind,
            namespace: own,
            name,
            port,
        } = self;
        let kind = match kind.as_str() {
            "Service" => String::new(),
            kind => format!("{kind}/"),
        };
        match own == namespace {
            true => format!("{kind}{name}:{port}"),
            false => format!("{kind}{own}/{name}:{port}"),
        }
    }
}

impl Route {
    fn of(series: &Series) -> Self {
        let label = |name: &str| series.label(name).unwrap_or_default().to_owned();
        Self {
            group: label("route_group"),
            kind: label("route_kind"),
            namespace: label("route_namespace"),
            name: label("route_name"),
        }
    }

    /// Whether it is an object.
    pub fn is_object(&self) -> bool {
        !self.group.is_empty()
    }
}

impl fmt::Display for Route {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.is_object() {
            true => write!(formatter, "{}/{}", self.kind, self.name),
            false => formatter.write_str("(no route)"),
        }
    }
}

impl Traffic {
    fn status(&mut self, series: &Series, by: f64) {
        self.responses += by;
        let error = series.label("error").filter(|it| !it.is_empty());
        if error.is_some_and(|it| TIMEOUTS.contains(&it)) {
            self.timeouts += by;
        }
        let is_failure = match (error, series.label("grpc_status")) {
            (Some(_), _) => true,
            (None, Some(grpc)) => is_grpc_failure(grpc),
            (None, None) => {
                let http = series.label("http_status");
                http.is_some_and(|it| it.starts_with('5') || it == "other")
            }
        };
        if !is_failure {
            self.successes += by;
        }
    }

    /// As it is shown.
    pub fn numbers(&self, change: &Change) -> Numbers {
        Numbers {
            success_rate: (self.responses > 0.0).then(|| self.successes / self.responses),
            requests_per_second: change.per_second(self.responses),
            latency_ms: self.buckets.latencies(1000.0),
            timeouts_per_second: change.per_second(self.timeouts),
        }
    }
}

impl Routed {
    /// Its backends as they are shown.
    pub fn backends(&self, change: &Change) -> Vec<Backend> {
        let backends = self.backends.iter();
        let backends = backends.map(|(backend, traffic)| Backend {
            backend: backend.clone(),
            numbers: traffic.numbers(change),
        });
        backends.collect()
    }
}

impl Numbers {
    /// Success rate, requests, latencies, timeouts.
    pub fn cells(&self) -> [Cell; 6] {
        [
            success_cell(self.success_rate),
            rate_cell(self.requests_per_second),
            latency_cell(self.latency_ms.p50),
            latency_cell(self.latency_ms.p95),
            latency_cell(self.latency_ms.p99),
            unwanted_cell(self.timeouts_per_second),
        ]
    }
}

/// The branch that leads to one of several, the last of which ends the tree.
pub fn branch(index: usize, count: usize, text: &str) -> String {
    match index + 1 == count {
        true => format!("└─► {text}"),
        false => format!("├─► {text}"),
    }
}
