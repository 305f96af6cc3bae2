//! The golden metrics: requests, responses and latencies of HTTP exchanges.
//!
//! An [`ExchangeSeries`] is looked up once for a connection, route and backend, and kept by whoever
//! has these; of one exchange only atomics are touched. What comes from a network is bounded: names in
//! labels are of what the mesh knows, statuses are numbers of which a series has few, and a pod has so
//! many series; what is above is counted together and told by `weft_metrics_overflow_total`.

mod authority;
mod authz;
mod chain;
mod counters;
mod errors;
mod labels;
mod outcome;
mod timer;

#[cfg(test)]
mod tests;

pub use authority::{AuthorityLabel, HostScope};
pub use authz::{HttpAuthz, Stopped};
pub use counters::RetryEvent;
pub use errors::HttpErrors;
pub use labels::{
    BackendLabels, DestinationLabels, ExchangeLabels, PortRef, RouteLabels, RouteRef,
};
pub use outcome::{ExchangeError, GrpcStatus, is_success};
pub use timer::{ExchangeTimer, RequestEnd};

pub(crate) use labels::balancer_labels;

use std::collections::{HashMap, HashSet};
use std::hash::Hash;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use weft_core::WorkloadId;

use super::labels::{AuthzLabels, Direction, PodLabels, Rendered, TlsLabel};
use super::samples::{Kind, Samples, Source};
use authz::{DecisionKey, Decisions};
use counters::{BACKEND, ExchangeCounters, ROUTE, RouteCounters};
use errors::ErrorCounters;
use outcome::{Outcome, Status};

/// What exchanges of one kind are counted in.
#[derive(Debug)]
pub struct ExchangeSeries {
    pod: Arc<PodSeries>,
    exchange: Option<Arc<Idle<ExchangeCounters>>>,
    route: Option<Arc<Idle<RouteCounters>>>,
    backend: Option<Arc<Idle<RouteCounters>>>,
}

/// The series of all pods.
#[derive(Debug, Default)]
pub(super) struct Exchanges {
    pods: RwLock<HashMap<WorkloadId, Arc<PodSeries>>>,
}

/// The series of one pod.
#[derive(Debug)]
struct PodSeries {
    labels: PodLabels,
    maps: RwLock<Maps>,
    /// Those that its clients ask it for.
    authorities: Mutex<HashSet<AuthorityLabel>>,
    /// By direction.
    errors: [ErrorCounters; 2],
    overflowed: AtomicU64,
}

#[derive(Debug, Default)]
struct Maps {
    exchanges: HashMap<ExchangeKey, Arc<Idle<ExchangeCounters>>>,
    routes: HashMap<RouteKey, Arc<Idle<RouteCounters>>>,
    backends: HashMap<BackendKey, Arc<Idle<RouteCounters>>>,
    decisions: HashMap<DecisionKey, Arc<Idle<Decisions>>>,
}

#[derive(Debug, PartialEq, Eq, Hash)]
enum ExchangeKey {
    Of(Box<ExchangeLabels>),
    Overflow(Direction, TlsLabel),
}

#[derive(Debug, PartialEq, Eq, Hash)]
enum RouteKey {
    Of(Box<RouteLabels>),
    Overflow,
}

#[derive(Debug, PartialEq, Eq, Hash)]
enum BackendKey {
    Of(Box<BackendLabels>),
    Overflow,
}

/// Counters, and since when nothing was counted in them.
#[derive(Debug)]
struct Idle<T> {
    counters: T,
    seen: Mutex<(u64, Instant)>,
}

impl ExchangeSeries {
    /// Begins an exchange: it counts as requested.
    pub fn begin(self: &Arc<Self>) -> ExchangeTimer {
        ExchangeTimer::begin_at(Arc::clone(self), Instant::now())
    }

    /// Something is counted here because there is no room for a series of its own.
    pub fn overflowed(&self) {
        self.pod.overflowed.fetch_add(1, Ordering::Relaxed);
    }

    fn begin_counting(&self) {
        if let Some(exchange) = &self.exchange {
            exchange.counters.begin();
        }
        for route in [&self.route, &self.backend].into_iter().flatten() {
            route.counters.begin();
        }
    }

    fn latency(&self, status: Status, latency: Duration) {
        if let Some(exchange) = &self.exchange {
            let overflow = &self.pod.overflowed;
            exchange.counters.latency(status, latency, overflow);
        }
    }

    fn retry(&self, event: RetryEvent) {
        if let Some(route) = &self.route {
            route.counters.retry(event);
        }
    }

    fn end_exchange(&self, outcome: Outcome) {
        if let Some(exchange) = &self.exchange {
            exchange.counters.end(outcome, &self.pod.overflowed);
        }
    }

    fn end_route(&self, outcome: Outcome, whole: Duration, since_request: Duration) {
        let overflow = &self.pod.overflowed;
        if let Some(route) = &self.route {
            route.counters.end(outcome, whole, overflow);
        }
        if let Some(backend) = &self.backend {
            backend.counters.end(outcome, since_request, overflow);
        }
    }
}

impl Exchanges {
    pub(super) fn exchanges(&self, mut labels: ExchangeLabels) -> Arc<ExchangeSeries> {
        let pod = self.pod(&labels.pod);
        // It has series of its own, which several endpoints share.
        let backend = labels.backend.take();
        let backend = backend.map(|labels| pod.backend(BackendKey::Of(Box::new(labels))));
        if labels.direction == Direction::Inbound
            && let Some(authority) = &mut labels.authority
        {
            pod.bound_authorities(authority);
        }
        let exchange = pod.exchange(ExchangeKey::Of(Box::new(labels)));
        Arc::new(ExchangeSeries {
            exchange: Some(exchange),
            route: None,
            backend,
            pod,
        })
    }

    pub(super) fn route(&self, labels: RouteLabels) -> Arc<ExchangeSeries> {
        let pod = self.pod(&labels.pod);
        let route = pod.route(RouteKey::Of(Box::new(labels)));
        Arc::new(ExchangeSeries {
            exchange: None,
            route: Some(route),
            backend: None,
            pod,
        })
    }

    pub(super) fn stopped(&self, labels: AuthzLabels, why: Stopped) -> HttpAuthz {
        HttpAuthz::stopped(self.pod(&labels.pod), labels, why)
    }

    pub(super) fn authz(&self, labels: AuthzLabels, route: RouteRef) -> HttpAuthz {
        HttpAuthz::new(self.pod(&labels.pod), labels, route)
    }

    pub(super) fn errors(&self, direction: Direction, pod: &PodLabels) -> HttpErrors {
        HttpErrors::new(self.pod(pod), direction)
    }

    pub(super) fn forget_pod(&self, pod: &WorkloadId) {
        let mut pods = self.pods.write().unwrap_or_else(PoisonError::into_inner);
        pods.remove(pod);
    }

    /// Forgets what nobody holds and what is about a workload that is gone, or did not move for long:
    /// services and routes come and go too.
    pub(super) fn forget_unused(&self, exists: impl Fn(&WorkloadId) -> bool, now: Instant) {
        let pods = self.pods.read().unwrap_or_else(PoisonError::into_inner);
        for pod in pods.values() {
            let mut maps = pod.maps.write().unwrap_or_else(PoisonError::into_inner);
            maps.exchanges.retain(|key, series| {
                let gone = match key {
                    ExchangeKey::Of(labels) => {
                        let destination = labels.destination.as_ref();
                        destination.is_some_and(|it| !exists(&it.id))
                    }
                    ExchangeKey::Overflow(..) => false,
                };
                let idle = series.is_idle(series.counters.moved(), now);
                is_held(series) || !(gone || idle)
            });
            let keep = |series: &Arc<Idle<RouteCounters>>| {
                let idle = series.is_idle(series.counters.moved(), now);
                is_held(series) || !idle
            };
            maps.routes.retain(|_, series| keep(series));
            maps.backends.retain(|_, series| keep(series));
            maps.decisions.retain(|_, series| {
                is_held(series) || !series.is_idle(series.counters.moved(), now)
            });
            pod.forget_authorities(&maps);
        }
    }

    fn pod(&self, labels: &PodLabels) -> Arc<PodSeries> {
        let pods = self.pods.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(pod) = pods.get(&labels.id) {
            return Arc::clone(pod);
        }
        drop(pods);
        let mut pods = self.pods.write().unwrap_or_else(PoisonError::into_inner);
        let pod = pods.entry(labels.id.clone()).or_insert_with(|| {
            Arc::new(PodSeries {
                labels: labels.clone(),
                maps: RwLock::default(),
                authorities: Mutex::default(),
                errors: Default::default(),
                overflowed: AtomicU64::new(0),
            })
        });
        Arc::clone(pod)
    }
}

impl PodSeries {
    /// A pod is asked for by few names, but a client of it may know those of all services.
    fn bound_authorities(&self, authority: &mut AuthorityLabel) {
        if !authority.is_counted() {
            return;
        }
        let known = self.authorities.lock();
        let mut known = known.unwrap_or_else(PoisonError::into_inner);
        if known.contains(authority) {
            return;
        }
        if known.len() < MOST_AUTHORITIES_PER_POD {
            known.insert(authority.clone());
        } else {
            self.overflowed.fetch_add(1, Ordering::Relaxed);
            *authority = AuthorityLabel::Overflow;
        }
    }

    /// Makes room for others where there are no series any more.
    fn forget_authorities(&self, maps: &Maps) {
        let known = self.authorities.lock();
        let mut known = known.unwrap_or_else(PoisonError::into_inner);
        known.retain(|authority| {
            maps.exchanges.keys().any(|key| match key {
                ExchangeKey::Of(labels) => labels.authority.as_ref() == Some(authority),
                ExchangeKey::Overflow(..) => false,
            })
        });
    }

    fn exchange(&self, key: ExchangeKey) -> Arc<Idle<ExchangeCounters>> {
        let overflow = |key: &ExchangeKey| match key {
            ExchangeKey::Of(labels) => ExchangeKey::Overflow(labels.direction, labels.tls),
            ExchangeKey::Overflow(direction, tls) => ExchangeKey::Overflow(*direction, *tls),
        };
        let make = ExchangeCounters::default;
        self.find(
            |maps| &mut maps.exchanges,
            |maps| &maps.exchanges,
            key,
            overflow,
            make,
        )
    }

    fn route(&self, key: RouteKey) -> Arc<Idle<RouteCounters>> {
        let overflow = |_: &RouteKey| RouteKey::Overflow;
        let make = RouteCounters::of_route;
        self.find(
            |maps| &mut maps.routes,
            |maps| &maps.routes,
            key,
            overflow,
            make,
        )
    }

    fn backend(&self, key: BackendKey) -> Arc<Idle<RouteCounters>> {
        let overflow = |_: &BackendKey| BackendKey::Overflow;
        let make = RouteCounters::of_backend;
        self.find(
            |maps| &mut maps.backends,
            |maps| &maps.backends,
            key,
            overflow,
            make,
        )
    }

    fn decisions(&self, key: DecisionKey) -> Arc<Idle<Decisions>> {
        self.find(
            |maps| &mut maps.decisions,
            |maps| &maps.decisions,
            key,
            DecisionKey::overflow,
            Decisions::default,
        )
    }

    /// Finds or makes a series; if there is no room for one more, that of what there is no room for.
    fn find<K: Eq + Hash, V>(
        &self,
        map_mut: impl Fn(&mut Maps) -> &mut HashMap<K, Arc<Idle<V>>>,
        map: impl Fn(&Maps) -> &HashMap<K, Arc<Idle<V>>>,
        key: K,
        overflow: impl Fn(&K) -> K,
        make: impl Fn() -> V,
    ) -> Arc<Idle<V>> {
        let maps = self.maps.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = map(&maps).get(&key) {
            return Arc::clone(found);
        }
        drop(maps);
        let mut maps = self.maps.write().unwrap_or_else(PoisonError::into_inner);
        let has_room = maps.len() < MOST_SERIES_PER_POD;
        let map = map_mut(&mut maps);
        let key = if has_room || map.contains_key(&key) {
            key
        } else {
            self.overflowed.fetch_add(1, Ordering::Relaxed);
            overflow(&key)
        };
        let series = map.entry(key).or_insert_with(|| {
            let counters = make();
            let seen = Mutex::new((0, Instant::now()));
            Arc::new(Idle { counters, seen })
        });
        Arc::clone(series)
    }
}

impl Maps {
    fn len(&self) -> usize {
        self.exchanges.len() + self.routes.len() + self.backends.len() + self.decisions.len()
    }
}

impl<T> Idle<T> {
    /// Whether nothing has moved for long; looks at it, so that the next look can tell.
    fn is_idle(&self, moved: u64, now: Instant) -> bool {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if seen.0 != moved {
            *seen = (moved, now);
        }
        now.saturating_duration_since(seen.1) >= KEEP_IDLE
    }
}

/// Whether a caller has it: under the lock of its map nobody else can come to have it.
fn is_held<T>(series: &Arc<T>) -> bool {
    Arc::strong_count(series) > 1
}

impl Source for Exchanges {
    fn collect(&self, samples: &mut Samples) {
        let pods = self.pods.read().unwrap_or_else(PoisonError::into_inner);
        for pod in pods.values() {
            pod.collect(samples);
        }
    }
}

impl PodSeries {
    fn collect(&self, samples: &mut Samples) {
        let maps = self.maps.read().unwrap_or_else(PoisonError::into_inner);
        for (key, series) in &maps.exchanges {
            let labels = key.render(&self.labels);
            series.counters.collect(&labels, samples);
        }
        for (key, series) in &maps.routes {
            let (labels, is_grpc) = key.render(&self.labels);
            series.counters.collect(&ROUTE, is_grpc, &labels, samples);
        }
        for (key, series) in &maps.backends {
            let (labels, is_grpc) = key.render(&self.labels);
            series.counters.collect(&BACKEND, is_grpc, &labels, samples);
        }
        for (key, series) in &maps.decisions {
            series.counters.collect(key, &self.labels, samples);
        }
        for direction in [Direction::Outbound, Direction::Inbound] {
            self.errors[direction as usize].collect(direction, &self.labels, samples);
        }
        let overflowed = self.overflowed.load(Ordering::Relaxed);
        if overflowed > 0 {
            let mut labels = Vec::new();
            self.labels.render(&mut labels);
            let help = "What was counted in a common series because a pod had too many of its own";
            let name = "weft_metrics_overflow";
            samples.add(Kind::Counter, name, help, labels, overflowed as f64);
        }
    }
}

impl ExchangeKey {
    fn render(&self, pod: &PodLabels) -> Rendered {
        match self {
            Self::Of(labels) => labels.render(),
            Self::Overflow(direction, tls) => {
                let mut labels = vec![
                    ("direction", direction.as_str().to_owned()),
                    ("authority", OVERFLOW.to_owned()),
                ];
                pod.render(&mut labels);
                tls.render(&mut labels);
                labels
            }
        }
    }
}

impl RouteKey {
    fn render(&self, pod: &PodLabels) -> (Rendered, bool) {
        match self {
            Self::Of(labels) => (labels.render(), labels.route.is_grpc()),
            Self::Overflow => (render_overflow(pod), false),
        }
    }
}

impl BackendKey {
    fn render(&self, pod: &PodLabels) -> (Rendered, bool) {
        match self {
            Self::Of(labels) => (labels.render(pod), labels.route.is_grpc()),
            Self::Overflow => (render_overflow(pod), false),
        }
    }
}

fn render_overflow(pod: &PodLabels) -> Rendered {
    let mut labels = Vec::new();
    pod.render(&mut labels);
    labels.push(("route_name", OVERFLOW.to_owned()));
    labels
}

/// The label value of what there is no room for.
const OVERFLOW: &str = "overflow";
/// A pod that talks to 200 endpoints of 50 routes has about half.
const MOST_SERIES_PER_POD: usize = 1000;
/// Names that a pod's clients ask it for.
const MOST_AUTHORITIES_PER_POD: usize = 64;
/// As Linkerd does.
const KEEP_IDLE: Duration = Duration::from_secs(600);
