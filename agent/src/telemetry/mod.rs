//! What the agent measures: one [`Telemetry`] for the process, encoded as OpenMetrics text.
//!
//! Names and labels follow Linkerd's, so that dashboards keep working; since one agent speaks for
//! many pods, it emits the pod's own labels itself. A flow's series are looked up once, when it
//! opens; while bytes flow only atomics are touched. Series of a pod that is gone disappear.
//!
//! What other parts hold anyway (certificates, the control stream, the kernel's maps) is not
//! counted twice: they are [`Source`]s, asked at each scrape.

mod detection;
#[cfg(test)]
mod documented;
pub mod exchange;
mod flow;
mod histogram;
mod history;
mod labels;
mod process;
mod refusal;
mod samples;
pub mod tap;

pub use detection::{DetectedBy, ProtocolLabel};
pub use flow::{FlowHandle, PeerCounters};
pub use history::{LONGEST, SAMPLE_EACH};
pub use labels::{AuthzLabels, Direction, EgressLabels, FlowLabels, Peer, PodLabels, TlsLabel};
pub use refusal::Refusal;
pub use samples::{HistogramSample, Kind, Samples, Source};

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use prometheus_client::encoding::text;
use prometheus_client::registry::Registry;
use weft_core::{DenyReason, Verdict, WorkloadId};

use detection::Detections;
use exchange::{
    ExchangeLabels, ExchangeSeries, Exchanges, HttpAuthz, HttpErrors, RouteLabels, RouteRef,
    Stopped,
};
use flow::FlowCounters;
use history::History;
use labels::NotLetOutLabels;
use process::Process;
use tap::Taps;

/// The process's metrics.
#[derive(Debug)]
pub struct Telemetry {
    counts: Arc<Counts>,
    exchanges: Arc<Exchanges>,
    history: Arc<History>,
    taps: Arc<Taps>,
    registry: Mutex<Registry>,
}

/// Everything counted here, by labels.
#[derive(Debug, Default)]
struct Counts {
    flows: RwLock<HashMap<FlowLabels, Arc<FlowCounters>>>,
    authz: RwLock<HashMap<(bool, AuthzLabels), Arc<AtomicU64>>>,
    refusals: RwLock<HashMap<(WorkloadId, Refusal), Arc<Refused>>>,
    egress: RwLock<HashMap<EgressLabels, Arc<AtomicU64>>>,
    not_let_out: RwLock<HashMap<NotLetOutLabels, Arc<AtomicU64>>>,
    detections: Detections,
    /// By direction.
    idle_closed: [AtomicU64; 2],
}

/// How often a pod was refused something for one reason.
#[derive(Debug, Default)]
struct Refused {
    count: AtomicU64,
    /// When, and at which count, the log last said so.
    told: Mutex<Option<(Instant, u64)>>,
}

impl Refused {
    /// How many there were since the log last said so, if it is time to say so again.
    fn to_be_told(&self, count: u64) -> Option<u64> {
        // Whoever is not the first now need not wait for it.
        let mut told = self.told.try_lock().ok()?;
        let before = match *told {
            Some((when, _)) if when.elapsed() < TELL_AGAIN => return None,
            Some((_, before)) => before,
            None => 0,
        };
        *told = Some((Instant::now(), count));
        Some(count.saturating_sub(before))
    }
}

impl Telemetry {
    /// Makes empty metrics with those of the process itself.
    pub fn new() -> Arc<Self> {
        let counts = Arc::new(Counts::default());
        let exchanges = Arc::new(Exchanges::default());
        let telemetry = Self {
            counts: Arc::clone(&counts),
            exchanges: Arc::clone(&exchanges),
            history: Arc::new(History::new(Instant::now())),
            taps: Arc::default(),
            registry: Mutex::new(Registry::default()),
        };
        telemetry.add_source(counts);
        telemetry.add_source(exchanges);
        telemetry.add_source(Arc::clone(&telemetry.history) as Arc<dyn Source>);
        telemetry.add_source(Arc::clone(&telemetry.taps) as Arc<dyn Source>);
        telemetry.add_source(Arc::new(Process::new()));
        Arc::new(telemetry)
    }

    /// Adds a part whose numbers are asked at each scrape.
    pub fn add_source(&self, source: Arc<dyn Source>) {
        let collector = Box::new(samples::SourceCollector(source));
        let mut registry = self.registry.lock().unwrap_or_else(PoisonError::into_inner);
        registry.register_collector(collector);
    }

    /// Those who watch exchanges and flows.
    pub fn taps(&self) -> &Arc<Taps> {
        &self.taps
    }

    /// Counts a flow as open; it closes when the handle is dropped.
    pub fn flow(&self, labels: FlowLabels) -> FlowHandle {
        FlowHandle::open(entry(&self.counts.flows, labels))
    }

    /// The series of HTTP exchanges with these labels, and of their backend: to be looked up once,
    /// for a connection and an endpoint, and kept.
    pub fn exchanges(&self, labels: ExchangeLabels) -> Arc<ExchangeSeries> {
        self.exchanges.exchanges(labels)
    }

    /// The series of HTTP exchanges on a route, as clients see them: of an exchange that is tried at
    /// several endpoints, or at none, this counts one.
    pub fn route(&self, labels: RouteLabels) -> Arc<ExchangeSeries> {
        self.exchanges.route(labels)
    }

    /// Where a decision of inbound policy about requests is counted: to be looked up once, for a
    /// connection, the verdict and the route that it is about, and kept. `RouteRef::Default("default")`
    /// where no route was asked about.
    pub fn http_authz(&self, labels: AuthzLabels, route: RouteRef) -> HttpAuthz {
        self.exchanges.authz(labels, route)
    }

    /// Where requests are counted that no authorization decides about, and that are stopped all the same.
    pub fn http_stopped(&self, labels: AuthzLabels, why: Stopped) -> HttpAuthz {
        self.exchanges.stopped(labels, why)
    }

    /// Where it is counted what is answered to a pod's requests in a server's place: to be looked up once for
    /// a connection, and kept.
    pub fn http_errors(&self, direction: Direction, pod: &PodLabels) -> HttpErrors {
        self.exchanges.errors(direction, pod)
    }

    /// Counts a connection whose protocol is known now.
    pub fn detection(&self, protocol: ProtocolLabel, how: DetectedBy) {
        self.counts.detections.count(protocol, how);
    }

    /// Counts a client's connection of HTTP that is ended as nothing has been asked on it for long.
    pub fn idle_closed(&self, direction: Direction) {
        self.counts.idle_closed[direction as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a decision of inbound policy.
    pub fn authz(&self, labels: AuthzLabels, verdict: &Verdict) {
        let key = (verdict.admits_requests(), labels);
        entry(&self.counts.authz, key).fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a refusal.
    pub fn refusal(&self, pod: &WorkloadId, reason: Refusal) {
        let key = (pod.clone(), reason);
        let refused = entry(&self.counts.refusals, key);
        let count = refused.count.fetch_add(1, Ordering::Relaxed) + 1;
        if reason.is_limit()
            && let Some(times) = refused.to_be_told(count)
        {
            let reason = reason.as_str();
            tracing::warn!(%pod, reason, times, "connections are refused: a limit is reached");
        }
    }

    /// Counts what an EgressNetwork keeps from leaving the cluster.
    pub fn egress_denied(&self, labels: EgressLabels) {
        entry(&self.counts.egress, labels).fetch_add(1, Ordering::Relaxed);
    }

    /// Counts what NetworkPolicies do not let a pod connect to.
    pub fn not_let_out(&self, pod: &PodLabels, reason: &DenyReason) {
        let labels = NotLetOutLabels {
            pod: pod.clone(),
            reason: reason.clone(),
        };
        entry(&self.counts.not_let_out, labels).fetch_add(1, Ordering::Relaxed);
    }

    /// How often something was refused or ended for that reason, over all pods there are.
    pub fn refusals(&self, reason: Refusal) -> u64 {
        let counts = &self.counts.refusals;
        let counts = counts.read().unwrap_or_else(PoisonError::into_inner);
        let counted = counts.iter().filter(|((_, why), _)| *why == reason);
        counted
            .map(|(_, it)| it.count.load(Ordering::Relaxed))
            .sum()
    }

    /// Forgets the series of a pod that is gone.
    pub fn forget_pod(&self, pod: &WorkloadId) {
        retain(&self.counts.flows, |labels| labels.pod.id != *pod);
        retain(&self.counts.authz, |(_, labels)| labels.pod.id != *pod);
        retain(&self.counts.refusals, |(id, _)| id != pod);
        retain(&self.counts.egress, |labels| labels.pod.id != *pod);
        retain(&self.counts.not_let_out, |labels| labels.pod.id != *pod);
        self.exchanges.forget_pod(pod);
    }

    /// Forgets the series to workloads that are gone and that no flow or exchange uses any more, and
    /// those of exchanges that have not moved for long.
    pub fn forget_destinations(&self, exists: impl Fn(&WorkloadId) -> bool) {
        let mut flows = self
            .counts
            .flows
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        flows.retain(|labels, counters| {
            // Every open flow holds its counters, and none can be looked up under this lock.
            let in_use = Arc::strong_count(counters) > 1;
            in_use || labels.destination.as_ref().is_none_or(&exists)
        });
        drop(flows);
        self.exchanges.forget_unused(exists, Instant::now());
    }

    /// Takes a sample for [`recent`](Self::recent), each [`SAMPLE_EACH`]. It takes as long as a scrape.
    pub fn remember(&self) {
        self.history.sample(self.remembered(), Instant::now());
    }

    /// By how much what `weft` shows over a time grew in one up to now, of [`LONGEST`] at most: the same series, as OpenMetrics
    /// text, with how much time it really is and how many series are not in it.
    pub fn recent(&self, window: Duration) -> String {
        let mut samples = self.remembered();
        let recent = self.history.recent(&mut samples, window, Instant::now());
        let mut all = samples.all();
        let covered = recent.covered.as_secs_f64();
        let help = "How much time the numbers are of";
        let name = "weft_history_covered_seconds";
        all.add(Kind::Gauge, name, help, vec![], covered);
        let help = "Series that have no history as there are too many";
        let name = "weft_history_left_out_series";
        all.add(Kind::Gauge, name, help, vec![], recent.left_out as f64);
        all.encode()
    }

    fn remembered(&self) -> Samples {
        let mut samples = Samples::only(&REMEMBERED);
        self.counts.collect(&mut samples);
        self.exchanges.collect(&mut samples);
        samples
    }

    /// The metrics as OpenMetrics text (version 1.0.0).
    pub fn encode(&self) -> String {
        let registry = self.registry.lock().unwrap_or_else(PoisonError::into_inner);
        let mut buffer = String::new();
        // Writing to a String cannot fail.
        let _ = text::encode(&mut buffer, &registry);
        buffer
    }
}

impl Source for Counts {
    fn collect(&self, samples: &mut Samples) {
        let flows = self.flows.read().unwrap_or_else(PoisonError::into_inner);
        for (labels, counters) in flows.iter() {
            counters.collect(labels, samples);
        }
        let authz = self.authz.read().unwrap_or_else(PoisonError::into_inner);
        for ((allowed, labels), count) in authz.iter() {
            let (name, help) = if *allowed {
                ("inbound_tcp_authz_allow", "Connections that policy allowed")
            } else {
                ("inbound_tcp_authz_deny", "Connections that policy denied")
            };
            let count = count.load(Ordering::Relaxed) as f64;
            samples.add(Kind::Counter, name, help, labels.render(), count);
        }
        let refusals = self.refusals.read().unwrap_or_else(PoisonError::into_inner);
        for ((pod, reason), count) in refusals.iter() {
            let labels = vec![
                ("namespace", pod.0.namespace.to_string()),
                ("pod", pod.0.name.to_string()),
                ("reason", reason.as_str().to_owned()),
            ];
            let help = "Connections that the proxy refused or ended, by reason";
            let count = count.count.load(Ordering::Relaxed) as f64;
            samples.add(Kind::Counter, "weft_refused", help, labels, count);
        }
        let egress = self.egress.read().unwrap_or_else(PoisonError::into_inner);
        for (labels, count) in egress.iter() {
            let help = "Connections and requests that an EgressNetwork refused";
            let count = count.load(Ordering::Relaxed) as f64;
            samples.add(
                Kind::Counter,
                "weft_egress_denied",
                help,
                labels.render(),
                count,
            );
        }
        let kept = &self.not_let_out;
        let kept = kept.read().unwrap_or_else(PoisonError::into_inner);
        for (labels, count) in kept.iter() {
            let help = "Connections and requests to where NetworkPolicies do not let a pod connect";
            let count = count.load(Ordering::Relaxed) as f64;
            let (name, labels) = ("weft_network_policy_egress_denied", labels.render());
            samples.add(Kind::Counter, name, help, labels, count);
        }
        self.detections.collect(samples);
        for direction in [Direction::Outbound, Direction::Inbound] {
            let labels = vec![("direction", direction.as_str().to_owned())];
            let help =
                "Connections of HTTP that were closed as nothing had been asked on them for long";
            let count = self.idle_closed[direction as usize].load(Ordering::Relaxed) as f64;
            samples.add(Kind::Counter, "weft_http_idle_closed", help, labels, count);
        }
    }
}

/// What has a history: what commands show over a time.
const REMEMBERED: [&str; 20] = [
    "response",
    "response_latency_ms",
    "tcp_read_bytes",
    "tcp_write_bytes",
    "inbound_tcp_authz_allow",
    "inbound_tcp_authz_deny",
    "inbound_http_authz_allow",
    "inbound_http_authz_deny",
    "inbound_http_local_ratelimit",
    "inbound_http_route_not_found",
    "outbound_http_route_request_statuses",
    "outbound_grpc_route_request_statuses",
    "outbound_http_route_request_duration_seconds",
    "outbound_grpc_route_request_duration_seconds",
    "outbound_http_route_backend_response_statuses",
    "outbound_grpc_route_backend_response_statuses",
    "outbound_http_route_backend_response_duration_seconds",
    "outbound_grpc_route_backend_response_duration_seconds",
    "outbound_http_route_retry_requests",
    "outbound_grpc_route_retry_requests",
];
/// How often the log says of a pod that it reached a limit.
const TELL_AGAIN: Duration = Duration::from_secs(10);

/// Finds or makes the value of a key; existing ones are found under the shared lock.
fn entry<K, V>(map: &RwLock<HashMap<K, Arc<V>>>, key: K) -> Arc<V>
where
    K: Eq + std::hash::Hash,
    V: Default,
{
    if let Some(found) = map.read().unwrap_or_else(PoisonError::into_inner).get(&key) {
        return Arc::clone(found);
    }
    let mut map = map.write().unwrap_or_else(PoisonError::into_inner);
    Arc::clone(map.entry(key).or_default())
}

fn retain<K, V>(map: &RwLock<HashMap<K, V>>, keep: impl Fn(&K) -> bool)
where
    K: Eq + std::hash::Hash,
{
    let mut map = map.write().unwrap_or_else(PoisonError::into_inner);
    map.retain(|key, _| keep(key));
}

#[cfg(test)]
mod tests {
    use weft_core::{AccessPolicy, DenyReason};

    use super::*;

    fn labels(pod: &str) -> FlowLabels {
        FlowLabels {
            direction: Direction::Outbound,
            pod: PodLabels {
                id: pod.parse().expect("valid"),
                owner: None,
            },
            destination: None,
            service: Some("shop/web".parse().expect("valid")),
            tls: TlsLabel::Mutual,
            client: None,
            server: None,
            verdict: None,
        }
    }

    #[test]
    fn flows_are_counted_and_closed() {
        let telemetry = Telemetry::new();
        let handle = telemetry.flow(labels("shop/curl"));
        handle.peer(Peer::Source).read(7);
        let open = telemetry.encode();
        assert!(open.contains("tcp_open_connections{direction=\"outbound\",peer=\"src\",namespace=\"shop\",pod=\"curl\",dst_namespace=\"shop\",dst_service=\"web\",tls=\"true\"} 1"), "{open}");
        assert!(open.contains("tcp_read_bytes_total{direction=\"outbound\",peer=\"src\",namespace=\"shop\",pod=\"curl\",dst_namespace=\"shop\",dst_service=\"web\",tls=\"true\"} 7"), "{open}");
        drop(handle);
        let closed = telemetry.encode();
        assert!(
            closed.contains("tcp_close_total{direction=\"outbound\",peer=\"src\""),
            "{closed}"
        );
        assert!(closed.ends_with("# EOF\n"));
    }

    #[test]
    fn series_of_a_pod_that_is_gone_disappear() {
        let telemetry = Telemetry::new();
        let kept = "shop/kept".parse().expect("valid");
        let gone = "shop/gone".parse().expect("valid");
        drop(telemetry.flow(labels("shop/gone")));
        telemetry.refusal(&gone, Refusal::UnknownAddress);
        telemetry.refusal(&kept, Refusal::UnknownAddress);
        telemetry.forget_pod(&gone);
        let text = telemetry.encode();
        assert!(!text.contains("gone"), "{text}");
        assert!(
            text.contains(
                "weft_refused_total{namespace=\"shop\",pod=\"kept\",reason=\"unknown_address\"} 1"
            ),
            "{text}"
        );
    }

    #[test]
    fn series_to_workloads_that_are_gone_disappear_when_unused() {
        let telemetry = Telemetry::new();
        let to = |pod: &str| FlowLabels {
            destination: Some(pod.parse().expect("valid")),
            ..labels("shop/curl")
        };
        drop(telemetry.flow(to("shop/there")));
        drop(telemetry.flow(to("shop/gone")));
        let open = telemetry.flow(to("shop/leaving"));
        let sweep = || telemetry.forget_destinations(|it| it.0.name.as_str() == "there");
        sweep();
        let text = telemetry.encode();
        assert!(text.contains("dst_pod=\"there\""), "{text}");
        assert!(!text.contains("dst_pod=\"gone\""), "{text}");
        assert!(text.contains("dst_pod=\"leaving\""), "{text}");
        drop(open);
        sweep();
        assert!(!telemetry.encode().contains("leaving"));
    }

    #[test]
    fn detections_are_counted_by_protocol_and_how() {
        let telemetry = Telemetry::new();
        telemetry.detection(ProtocolLabel::Http2, DetectedBy::Declared);
        telemetry.detection(ProtocolLabel::Opaque, DetectedBy::ServerFirst);
        telemetry.detection(ProtocolLabel::Opaque, DetectedBy::ServerFirst);
        let text = telemetry.encode();
        let lines = text.lines();
        let counted = lines.filter(|it| it.starts_with("weft_protocol_detections_total"));
        let counted: Vec<&str> = counted.collect();
        assert!(
            counted
                .contains(&"weft_protocol_detections_total{protocol=\"http1\",how=\"detected\"} 0")
        );
        let counted: Vec<&str> = counted
            .into_iter()
            .filter(|it| !it.ends_with(" 0"))
            .collect();
        assert_eq!(
            counted,
            [
                "weft_protocol_detections_total{protocol=\"http2\",how=\"declared\"} 1",
                "weft_protocol_detections_total{protocol=\"opaque\",how=\"server_first\"} 2",
            ]
        );
    }

    #[test]
    fn a_flood_is_told_once_in_a_while() {
        let refused = Refused::default();
        assert_eq!(refused.to_be_told(1), Some(1));
        assert_eq!(refused.to_be_told(2), None);
        let long_ago = Instant::now().checked_sub(TELL_AGAIN);
        *refused.told.lock().expect("whole") = long_ago.map(|when| (when, 2));
        assert_eq!(refused.to_be_told(500), Some(498));
        assert_eq!(refused.to_be_told(501), None);
    }

    #[test]
    fn denials_name_the_policy() {
        let telemetry = Telemetry::new();
        let verdict = Verdict::Deny {
            server: Some(weft_core::ServerName {
                group: weft_core::PolicyGroup::Linkerd,
                name: "shop/web".parse().expect("valid"),
            }),
            reason: DenyReason::Policy(AccessPolicy::Deny),
        };
        let pod = PodLabels {
            id: "shop/web-0".parse().expect("valid"),
            owner: None,
        };
        let labels = AuthzLabels::new(pod, 8080, TlsLabel::None, None, &verdict);
        telemetry.authz(labels, &verdict);
        let text = telemetry.encode();
        assert!(text.contains("inbound_tcp_authz_deny_total{direction=\"inbound\",namespace=\"shop\",pod=\"web-0\",target_port=\"8080\",tls=\"no_identity\",no_tls_reason=\"plaintext\",srv_group=\"policy.linkerd.io\",srv_kind=\"server\",srv_name=\"web\",authz_name=\"default:deny\"} 1"), "{text}");
    }
}
