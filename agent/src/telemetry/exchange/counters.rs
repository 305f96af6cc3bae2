//! What is counted of exchanges with the same labels, by how they ended.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::super::histogram::{BACKEND_SECONDS, Histogram, LATENCY_MS, ROUTE_SECONDS};
use super::super::labels::Rendered;
use super::super::samples::{Kind, Samples};
use super::chain::Chain;
use super::outcome::{Class, Outcome, Status};

/// Of exchanges with one endpoint, or of one kind of client.
#[derive(Debug, Default)]
pub(super) struct ExchangeCounters {
    requests: AtomicU64,
    by_status: Chain<Option<Status>, StatusCounters>,
    other: OnceLock<Box<StatusCounters>>,
}

#[derive(Debug)]
struct StatusCounters {
    latency: Histogram,
    classes: Chain<Class, AtomicU64>,
}

/// Of exchanges on a route, or with a route's backend.
#[derive(Debug)]
pub(super) struct RouteCounters {
    requests: AtomicU64,
    duration: Histogram,
    statuses: Chain<Outcome, AtomicU64>,
    other: AtomicU64,
    /// Few routes have any.
    retries: OnceLock<Box<[AtomicU64; 4]>>,
}

/// What may happen when a request's answer is none yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RetryEvent {
    /// It is sent again.
    Request,
    /// What was sent again has an answer.
    Success,
    /// It was sent again as often as it may be.
    LimitExceeded,
    /// The budget is used up.
    Overflow,
}

/// The metrics of a kind of [`RouteCounters`].
pub(super) struct RouteNames {
    requests: Option<[&'static str; 2]>,
    statuses: [&'static str; 2],
    duration: [&'static str; 2],
    duration_help: &'static str,
}

/// Told that there was no room for a status.
pub(super) type Overflow<'a> = &'a AtomicU64;

impl ExchangeCounters {
    pub(super) fn begin(&self) {
        self.requests.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn latency(&self, status: Status, latency: Duration, overflow: Overflow<'_>) {
        let counters = self.of_status(Some(status), overflow);
        counters.latency.record(latency);
    }

    pub(super) fn end(&self, outcome: Outcome, overflow: Overflow<'_>) {
        let classes = &self.of_status(outcome.status, overflow).classes;
        // All that one status can come with fits.
        if let Some(count) = classes.find(outcome.class, MOST_OUTCOMES, AtomicU64::default) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// How much was counted: it changes whenever something is.
    pub(super) fn moved(&self) -> u64 {
        let statuses = self.by_status.iter().map(|(_, it)| it);
        let statuses = statuses.chain(self.other.get().map(AsRef::as_ref));
        let classes = statuses.flat_map(|it| it.classes.iter());
        let ended: u64 = classes
            .map(|(_, count)| count.load(Ordering::Relaxed))
            .sum();
        self.requests.load(Ordering::Relaxed) + ended
    }

    pub(super) fn collect(&self, labels: &Rendered, samples: &mut Samples) {
        let requests = self.requests.load(Ordering::Relaxed) as f64;
        let help = "Total count of HTTP requests";
        samples.add(Kind::Counter, "request", help, labels.clone(), requests);
        for (status, counters) in self.by_status.iter() {
            counters.collect(status, labels, samples);
        }
        if let Some(counters) = self.other.get() {
            counters.collect(Some(Status::Other), labels, samples);
        }
    }

    fn of_status(&self, status: Option<Status>, overflow: Overflow<'_>) -> &StatusCounters {
        if status == Some(Status::Other) {
            return self.other.get_or_init(Box::default);
        }
        let found = self
            .by_status
            .find(status, MOST_STATUSES, StatusCounters::default);
        found.unwrap_or_else(|| {
            overflow.fetch_add(1, Ordering::Relaxed);
            self.other.get_or_init(Box::default)
        })
    }
}

impl StatusCounters {
    fn collect(&self, status: Option<Status>, labels: &Rendered, samples: &mut Samples) {
        let mut labels = labels.clone();
        if let Some(status) = status {
            status.render("status_code", &mut labels);
        }
        if !self.latency.is_empty() {
            samples.histogram(
                "response_latency_ms",
                "Elapsed times between a request's headers being received and the first byte of its \
                 response's body, or the end of the response where there is none",
                labels.clone(),
                self.latency.sample(),
            );
        }
        for (class, count) in self.classes.iter() {
            let mut labels = labels.clone();
            class.render(&mut labels);
            let count = count.load(Ordering::Relaxed) as f64;
            let help = "Total count of HTTP responses";
            samples.add(Kind::Counter, "response", help, labels, count);
        }
    }
}

impl Default for StatusCounters {
    fn default() -> Self {
        Self {
            latency: Histogram::new(&LATENCY_MS),
            classes: Chain::default(),
        }
    }
}

impl RouteCounters {
    pub(super) fn of_route() -> Self {
        Self::new(Histogram::new(&ROUTE_SECONDS))
    }

    pub(super) fn of_backend() -> Self {
        Self::new(Histogram::new(&BACKEND_SECONDS))
    }

    fn new(duration: Histogram) -> Self {
        Self {
            requests: AtomicU64::new(0),
            duration,
            statuses: Chain::default(),
            other: AtomicU64::new(0),
            retries: OnceLock::new(),
        }
    }

    pub(super) fn retry(&self, event: RetryEvent) {
        let counts = self.retries.get_or_init(Box::default);
        counts[event as usize].fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn begin(&self) {
        self.requests.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn end(&self, outcome: Outcome, duration: Duration, overflow: Overflow<'_>) {
        let found = self
            .statuses
            .find(outcome, MOST_OUTCOMES, AtomicU64::default);
        let count = found.unwrap_or_else(|| {
            overflow.fetch_add(1, Ordering::Relaxed);
            &self.other
        });
        count.fetch_add(1, Ordering::Relaxed);
        self.duration.record(duration);
    }

    pub(super) fn moved(&self) -> u64 {
        let statuses = self.statuses.iter().map(|(_, it)| it).chain([&self.other]);
        let ended: u64 = statuses.map(|it| it.load(Ordering::Relaxed)).sum();
        self.requests.load(Ordering::Relaxed) + ended
    }

    pub(super) fn collect(
        &self,
        names: &RouteNames,
        is_grpc: bool,
        labels: &Rendered,
        samples: &mut Samples,
    ) {
        if let Some(names) = names.requests {
            let help = "The total number of requests dispatched";
            let name = names[usize::from(is_grpc)];
            let requests = self.requests.load(Ordering::Relaxed) as f64;
            samples.add(Kind::Counter, name, help, labels.clone(), requests);
        }
        let statuses = names.statuses[usize::from(is_grpc)];
        let help = "Completed request-response streams";
        for (status, count) in self.statuses(is_grpc) {
            let mut labels = labels.clone();
            labels.extend(status);
            let count = count as f64;
            samples.add(Kind::Counter, statuses, help, labels, count);
        }
        if let Some(counts) = self.retries.get() {
            for ((name, help), count) in RETRIES[usize::from(is_grpc)].into_iter().zip(&**counts) {
                let count = count.load(Ordering::Relaxed) as f64;
                samples.add(Kind::Counter, name, help, labels.clone(), count);
            }
        }
        if !self.duration.is_empty() {
            samples.histogram(
                names.duration[usize::from(is_grpc)],
                names.duration_help,
                labels.clone(),
                self.duration.sample(),
            );
        }
    }

    /// Label values with their counts; outcomes that differ in what is not shown are one.
    fn statuses(&self, is_grpc: bool) -> Vec<(Rendered, u64)> {
        let known = self.statuses.iter().map(|(outcome, count)| {
            let mut labels = Vec::new();
            outcome.render_of_route(is_grpc, &mut labels);
            (labels, count)
        });
        let other = (Outcome::render_other(is_grpc), &self.other);
        let mut statuses: Vec<(Rendered, u64)> = Vec::new();
        for (labels, count) in known.chain([other]) {
            let count = count.load(Ordering::Relaxed);
            let same = statuses.iter_mut().find(|(it, _)| *it == labels);
            match same {
                Some((_, sum)) => *sum += count,
                None if count > 0 => statuses.push((labels, count)),
                None => {}
            }
        }
        statuses
    }
}

pub(super) const ROUTE: RouteNames = RouteNames {
    requests: None,
    statuses: [
        "outbound_http_route_request_statuses",
        "outbound_grpc_route_request_statuses",
    ],
    duration: [
        "outbound_http_route_request_duration_seconds",
        "outbound_grpc_route_request_duration_seconds",
    ],
    duration_help: "The time between request initialization and response completion",
};

/// In the order of [`RetryEvent`], of routes for HTTP and for gRPC.
const RETRIES: [[(&str, &str); 4]; 2] = [
    [
        ("outbound_http_route_retry_requests", RETRY_HELP[0]),
        ("outbound_http_route_retry_successes", RETRY_HELP[1]),
        ("outbound_http_route_retry_limit_exceeded", RETRY_HELP[2]),
        ("outbound_http_route_retry_overflow", RETRY_HELP[3]),
    ],
    [
        ("outbound_grpc_route_retry_requests", RETRY_HELP[0]),
        ("outbound_grpc_route_retry_successes", RETRY_HELP[1]),
        ("outbound_grpc_route_retry_limit_exceeded", RETRY_HELP[2]),
        ("outbound_grpc_route_retry_overflow", RETRY_HELP[3]),
    ],
];

const RETRY_HELP: [&str; 4] = [
    "Requests that were sent again",
    "Requests that were sent again and then had an answer",
    "Requests that failed after they were sent again as often as they may be",
    "Requests that were not sent again as the budget was used up",
];

pub(super) const BACKEND: RouteNames = RouteNames {
    requests: Some([
        "outbound_http_route_backend_requests",
        "outbound_grpc_route_backend_requests",
    ]),
    statuses: [
        "outbound_http_route_backend_response_statuses",
        "outbound_grpc_route_backend_response_statuses",
    ],
    duration: [
        "outbound_http_route_backend_response_duration_seconds",
        "outbound_grpc_route_backend_response_duration_seconds",
    ],
    duration_help: "The time between request completion and response completion",
};

/// How many different status codes a series has: what a server makes up has no end.
const MOST_STATUSES: usize = 16;
/// Above the number of gRPC statuses and errors together.
const MOST_OUTCOMES: usize = 48;
