//! What exchanges are counted in. Series are looked up when something about them is new, and kept with the
//! connection that they belong to: an exchange like the one before costs no look-up.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use http::{HeaderMap, StatusCode};
use hyper::Request;
use weft_core::route::{Matched, ResponseClasses, RouteTable};
use weft_core::{EgressName, EgressNetwork, Identity, Verdict, WorkloadId};

use super::answer::{self, GRPC_STATUS};
use super::connection::Route;
use super::deadlines::Late;
use super::host::ByHost;
use super::tap;
use crate::discovery::ServicePortEntry;
use crate::node::LocalPod;
use crate::proxy::Context;
use crate::proxy::record::PathLabel;
use crate::telemetry::exchange::{
    AuthorityLabel, BackendLabels, DestinationLabels, ExchangeError, ExchangeLabels,
    ExchangeSeries, ExchangeTimer, GrpcStatus, HttpAuthz, PortRef, RequestEnd, RetryEvent,
    RouteLabels, RouteRef,
};
use crate::telemetry::{AuthzLabels, Direction, TlsLabel};

/// What an outbound exchange is counted by, beside its pod and its endpoint.
pub(super) struct Kind<'a> {
    /// The port of a service that was asked for.
    pub(super) parent: Option<&'a Arc<ServicePortEntry>>,
    /// The EgressNetwork that the request leaves the cluster by.
    pub(super) egress: Option<Egress<'a>>,
    /// The routes of either.
    pub(super) table: Option<&'a Arc<RouteTable>>,
    /// The rule of them.
    pub(super) matched: Option<Matched<'a>>,
    /// Where that led.
    pub(super) backend: Option<&'a Arc<ServicePortEntry>>,
    /// A call of gRPC.
    pub(super) is_grpc: bool,
    /// The client.
    pub(super) client: SocketAddr,
    /// What a ServiceProfile says of its response.
    pub(super) classes: Option<Arc<ResponseClasses>>,
    /// Its tries.
    pub(super) tries: &'a Tries,
}

/// An EgressNetwork, and the port that was asked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Egress<'a> {
    pub(super) network: &'a Arc<EgressNetwork>,
    pub(super) port: u16,
}

/// What is known of an exchange's tries: more than who makes them, who may be stopped in one.
#[derive(Debug, Default)]
pub(super) struct Tries {
    /// One was counted, or all that there is to count.
    is_counted: AtomicBool,
    running: Mutex<Timers>,
}

/// Series that were looked up for a connection.
#[derive(Debug, Default)]
pub(super) struct Known {
    /// Of its exchanges by kind, the last one first.
    kinds: Vec<KnownKind>,
    /// Of the pod at its end, if that is on this node.
    local: Option<Local>,
}

/// A series, and what for.
#[derive(Debug)]
struct KnownKind {
    parent: Option<Arc<ServicePortEntry>>,
    egress: Option<Arc<EgressNetwork>>,
    table: Option<Arc<RouteTable>>,
    ordinal: Option<usize>,
    backend: Option<Arc<ServicePortEntry>>,
    is_grpc: bool,
    series: Arc<ExchangeSeries>,
}

/// What exchanges with a pod of this node are counted in as its own.
#[derive(Debug)]
struct Local {
    series: ByHost,
}

/// An exchange that is being measured, wherever it counts.
#[derive(Debug, Default)]
pub(super) struct Timers {
    /// With an endpoint; of one on one node, for both of its pods.
    tries: [Option<ExchangeTimer>; 2],
    /// On its route.
    route: Option<ExchangeTimer>,
}

impl Kind<'_> {
    /// The series of the rule, as the client sees it.
    pub(super) fn of_rule(&self, context: &Context, pod: &LocalPod, known: &mut Known) -> Timers {
        let Some(parent) = self.parent_ref() else {
            return Timers::default();
        };
        let series = known.find(self, || {
            context.telemetry.route(RouteLabels {
                pod: pod.labels.clone(),
                parent,
                route: self.route(),
            })
        });
        Timers {
            tries: [None, None],
            route: Some(series.begin()),
        }
    }

    /// The series of an exchange on a connection.
    pub(super) fn of_connection<B>(
        &self,
        context: &Context,
        pod: &LocalPod,
        to: &Route,
        known: &mut Known,
        request: &Request<B>,
    ) -> Timers {
        let outbound = known.find(self, || {
            let labels = self.labels(context, pod, to);
            context.telemetry.exchanges(labels)
        });
        let outbound = outbound.begin().under(self.classes.clone());
        let inbound = to.local.as_ref().map(|server| {
            let look_up = || Local::new(pod, server, to);
            let local = known.local.get_or_insert_with(look_up);
            local.series.begin(context, server, request)
        });
        Timers {
            tries: [Some(outbound), inbound],
            route: None,
        }
    }

    /// The same, for those who watch its pods.
    pub(super) fn watched<B>(
        &self,
        context: &Context,
        pod: &LocalPod,
        to: &Route,
        timers: Timers,
        request: &Request<B>,
    ) -> Timers {
        let Timers { tries, route } = timers;
        let [outbound, inbound] = tries;
        let outbound = outbound.map(|it| it.tapped(tap::sent(context, pod, self, to, request)));
        let inbound = inbound.map(|it| {
            let ends = (self.client, to.endpoint);
            let client = (Some(&pod.identity), TlsLabel::SameNode);
            let server = to.local.as_ref();
            it.tapped(server.and_then(|it| tap::received(context, it, ends, client, request)))
        });
        Timers {
            tries: [outbound, inbound],
            route,
        }
    }

    fn labels(&self, context: &Context, pod: &LocalPod, to: &Route) -> ExchangeLabels {
        ExchangeLabels {
            authority: self.parent.map(|it| authority(it)),
            service: self.parent.map(|it| it.service.clone()),
            destination: to.destination.clone().map(|id| destination(context, id)),
            tls: tls(to.path),
            server: to.identity.clone(),
            backend: self
                .parent_ref()
                .zip(self.backend_ref())
                .map(|(parent, backend)| BackendLabels {
                    parent,
                    route: self.route(),
                    backend,
                }),
            ..ExchangeLabels::new(Direction::Outbound, &pod.labels)
        }
    }

    fn parent_ref(&self) -> Option<PortRef> {
        let egress = || self.egress.map(Egress::port_ref);
        self.parent.map(|it| port_ref(it)).or_else(egress)
    }

    fn backend_ref(&self) -> Option<PortRef> {
        let egress = || self.egress.map(Egress::port_ref);
        self.backend.map(|it| port_ref(it)).or_else(egress)
    }

    pub(super) fn route(&self) -> RouteRef {
        match self.matched {
            Some(matched) => RouteRef::Resource {
                group: matched.route.group(),
                kind: matched.route.kind.as_str(),
                name: matched.route.name.clone(),
            },
            None if self.egress.is_some() => {
                let allows = self.egress.is_some_and(|it| it.network.allows_unrouted());
                // As Linkerd calls them.
                RouteRef::Default(match (self.is_grpc, allows) {
                    (true, true) => "grpc-egress-allow",
                    (true, false) => "grpc-egress-deny",
                    (false, true) => "http-egress-allow",
                    (false, false) => "http-egress-deny",
                })
            }
            None if self.is_grpc => RouteRef::Default("grpc"),
            None => RouteRef::Default("http"),
        }
    }
}

impl Egress<'_> {
    fn port_ref(self) -> PortRef {
        let EgressName { name, group } = self.network.name().clone();
        // A port that no route names is whatever a client tried: one series for all of them.
        let is_named = |port: &u16| {
            let mut routes = self.network.routes().iter();
            routes.any(|it| it.ports.contains(port))
        };
        PortRef {
            group: group.as_str(),
            kind: "EgressNetwork",
            name,
            port: Some(self.port).filter(is_named).unwrap_or_default(),
        }
    }
}

impl Tries {
    /// One has begun.
    pub(super) fn begin(&self, timers: Timers) {
        self.is_counted.store(true, Ordering::Relaxed);
        *self.running() = timers;
    }

    /// What the one that is running is counted in, if one is: its end is now for the caller to say.
    pub(super) fn take(&self) -> Timers {
        std::mem::take(&mut *self.running())
    }

    /// Whether there was none yet; from now on there was.
    pub(super) fn count(&self) -> bool {
        !self.is_counted.swap(true, Ordering::Relaxed)
    }

    fn running(&self) -> MutexGuard<'_, Timers> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known {
    /// The series of a kind of exchanges; looked up if it is none of the last ones.
    fn find(
        &mut self,
        kind: &Kind<'_>,
        look_up: impl FnOnce() -> Arc<ExchangeSeries>,
    ) -> &Arc<ExchangeSeries> {
        match self.kinds.iter().position(|it| it.is_of(kind)) {
            Some(at) => self.kinds[..=at].rotate_right(1),
            None => {
                self.kinds.truncate(MOST_KINDS - 1);
                let new = KnownKind {
                    parent: kind.parent.cloned(),
                    egress: kind.egress.map(|it| Arc::clone(it.network)),
                    table: kind.table.cloned(),
                    ordinal: kind.matched.map(|it| it.ordinal),
                    backend: kind.backend.cloned(),
                    is_grpc: kind.is_grpc,
                    series: look_up(),
                };
                self.kinds.insert(0, new);
            }
        }
        &self.kinds[0].series
    }
}

impl KnownKind {
    fn is_of(&self, kind: &Kind<'_>) -> bool {
        is_same(self.parent.as_ref(), kind.parent)
            && is_same(self.egress.as_ref(), kind.egress.map(|it| it.network))
            && is_same(self.table.as_ref(), kind.table)
            && is_same(self.backend.as_ref(), kind.backend)
            && self.ordinal == kind.matched.map(|it| it.ordinal)
            && self.is_grpc == kind.is_grpc
    }
}

impl Local {
    fn new(client: &LocalPod, server: &LocalPod, to: &Route) -> Self {
        let labels = ExchangeLabels {
            target_port: Some(to.endpoint.port()),
            tls: TlsLabel::SameNode,
            client: Some(client.identity.clone()),
            verdict: to.verdict.clone(),
            ..ExchangeLabels::new(Direction::Inbound, &server.labels)
        };
        Self {
            series: ByHost::new(labels),
        }
    }
}

impl Timers {
    /// Of an exchange that counts in one place.
    pub(super) fn one(timer: ExchangeTimer) -> Self {
        Self {
            tries: [Some(timer), None],
            route: None,
        }
    }

    /// What a ServiceProfile says of the response, as the client's side sees it.
    pub(super) fn classes(&self) -> Option<&ResponseClasses> {
        self.tries[0].as_ref()?.classes()
    }

    /// Those of a try, with that of its route.
    pub(super) fn and(mut self, route: Self) -> Self {
        self.route = route.route;
        self
    }

    /// Where bytes of the request's body are to be counted; none: nobody wants to know.
    pub(super) fn request_bytes(&mut self) -> Option<Arc<AtomicU64>> {
        let mut all = self.all().filter_map(ExchangeTimer::tapped_mut);
        let bytes = Arc::clone(all.next()?.request_bytes());
        all.for_each(|it| it.count_request_in(&bytes));
        Some(bytes)
    }

    /// When the request has been sent to its end.
    pub(super) fn request_ended(&mut self, end: &RequestEnd) {
        for timer in self.all() {
            timer.request_ended(end.clone());
        }
    }

    /// The response's head has come.
    pub(super) fn respond(&mut self, status: StatusCode, headers: &HeaderMap) {
        let grpc = grpc_status(headers);
        for timer in self.all() {
            timer.respond(status, grpc);
        }
    }

    /// A part of its body has come, with so many bytes.
    pub(super) fn part(&mut self, bytes: usize) {
        for timer in self.all() {
            timer.first_byte();
            if let Some(tapped) = timer.tapped_mut() {
                tapped.responds(bytes);
            }
        }
    }

    /// It has ended.
    pub(super) fn end(self, in_trailers: Option<GrpcStatus>) {
        for timer in self.into_all() {
            timer.end(Ok(in_trailers));
        }
    }

    /// It has failed.
    pub(super) fn fail(self, error: ExchangeError) {
        for timer in self.into_all() {
            timer.end(Err(error));
        }
    }

    /// It took too long, and the client was told so by trailers.
    pub(super) fn late(self, late: Late, trailers: &HeaderMap) {
        let grpc = grpc_status(trailers);
        for timer in self.into_all() {
            timer.end_early(grpc, late.label());
        }
    }

    /// Something about sending its request again has happened.
    pub(super) fn retry(&self, event: RetryEvent) {
        if let Some(timer) = &self.route {
            timer.retry(event);
        }
    }

    /// It was answered here.
    pub(super) fn answer(self, error: &answer::ExchangeError, is_grpc: bool) {
        let why = error.label();
        if why == ExchangeError::Cancel {
            // Whether the client still hears of it is chance.
            return self.fail(why);
        }
        let answer = error.answer(is_grpc);
        let grpc = grpc_status(answer.headers());
        for timer in self.into_all() {
            timer.answer(answer.status(), grpc, why);
        }
    }

    fn all(&mut self) -> impl Iterator<Item = &mut ExchangeTimer> {
        self.tries.iter_mut().chain([&mut self.route]).flatten()
    }

    fn into_all(self) -> impl Iterator<Item = ExchangeTimer> {
        self.tries.into_iter().chain([self.route]).flatten()
    }
}

/// The series of exchanges of a client's connection that no endpoint is found for, or that need none.
pub(super) fn without_endpoint(
    context: &Context,
    pod: &LocalPod,
    parent: Option<&Arc<ServicePortEntry>>,
    original: SocketAddr,
) -> Arc<ExchangeSeries> {
    let id = match parent {
        Some(_) => None,
        None => context.store.workload_at(original.ip()),
    };
    context.telemetry.exchanges(ExchangeLabels {
        authority: parent.map(|it| authority(it)),
        service: parent.map(|it| it.service.clone()),
        destination: id.map(|it| destination(context, it.id.clone())),
        tls: TlsLabel::Unconnected,
        ..ExchangeLabels::new(Direction::Outbound, &pod.labels)
    })
}

/// Where it is counted what policy said about requests of a client to a port of a pod.
pub(super) fn authz(
    context: &Context,
    pod: &LocalPod,
    (port, tls): (u16, TlsLabel),
    client: Option<&Identity>,
    verdict: &Verdict,
) -> HttpAuthz {
    let labels = AuthzLabels::new(pod.labels.clone(), port, tls, client.cloned(), verdict);
    context
        .telemetry
        .http_authz(labels, RouteRef::Default("default"))
}

/// The status of a call of gRPC, in headers or trailers.
pub(super) fn grpc_status(headers: &HeaderMap) -> Option<GrpcStatus> {
    GrpcStatus::parse(headers.get(GRPC_STATUS)?.as_bytes())
}

/// The same as a number, as rules for retries have it.
pub(super) fn grpc_code(headers: &HeaderMap) -> Option<u32> {
    headers.get(GRPC_STATUS)?.to_str().ok()?.parse().ok()
}

fn is_same<T>(one: Option<&Arc<T>>, other: Option<&Arc<T>>) -> bool {
    match (one, other) {
        (Some(one), Some(other)) => Arc::ptr_eq(one, other),
        (None, None) => true,
        _ => false,
    }
}

fn authority(port: &ServicePortEntry) -> AuthorityLabel {
    AuthorityLabel::Service {
        service: port.service.clone(),
        port: port.port,
    }
}

fn destination(context: &Context, id: WorkloadId) -> DestinationLabels {
    DestinationLabels {
        owner: context.store.workload(&id).and_then(|it| it.owner.clone()),
        id,
    }
}

fn port_ref(port: &ServicePortEntry) -> PortRef {
    PortRef::service(port.service.clone(), port.port)
}

fn tls(path: PathLabel) -> TlsLabel {
    match path {
        PathLabel::Tunnel => TlsLabel::Mutual,
        PathLabel::SameNode => TlsLabel::SameNode,
        PathLabel::Itself => TlsLabel::Loopback,
        PathLabel::Plaintext | PathLabel::Unknown => TlsLabel::None,
    }
}

/// Kinds of exchanges that a connection remembers the series of: a client that alternates between more of them
/// looks them up again.
const MOST_KINDS: usize = 8;
