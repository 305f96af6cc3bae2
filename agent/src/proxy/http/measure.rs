//! What exchanges are counted in. Series are looked up when something about them is new, and kept with the
//! connection that they belong to: an exchange like the one before costs no look-up.

use std::sync::Arc;

use http::{HeaderMap, StatusCode};
use weft_core::route::{Matched, RouteTable};
use weft_core::{Identity, Verdict};

use super::answer::{self, GRPC_STATUS};
use super::connection::Route;
use crate::discovery::ServicePortEntry;
use crate::node::LocalPod;
use crate::proxy::Context;
use crate::proxy::record::PathLabel;
use crate::telemetry::exchange::{
    AuthorityLabel, BackendLabels, DestinationLabels, ExchangeError, ExchangeLabels,
    ExchangeSeries, ExchangeTimer, GrpcStatus, HttpAuthz, PortRef, RouteLabels, RouteRef,
};
use crate::telemetry::{AuthzLabels, Direction, TlsLabel};

/// What an outbound exchange is counted by, beside its pod and its endpoint.
pub(super) struct Kind<'a> {
    /// The port of a service that was asked for.
    pub(super) parent: Option<&'a Arc<ServicePortEntry>>,
    /// Its routes.
    pub(super) table: Option<&'a Arc<RouteTable>>,
    /// The rule of them.
    pub(super) matched: Option<Matched<'a>>,
    /// Where that led.
    pub(super) backend: Option<&'a Arc<ServicePortEntry>>,
    /// A call of gRPC.
    pub(super) is_grpc: bool,
}

/// Series that were looked up, and what for.
#[derive(Debug)]
pub(super) struct Known {
    parent: Option<Arc<ServicePortEntry>>,
    table: Option<Arc<RouteTable>>,
    ordinal: Option<usize>,
    backend: Option<Arc<ServicePortEntry>>,
    is_grpc: bool,
    series: Series,
}

/// Where an exchange counts.
#[derive(Debug, Default)]
struct Series {
    /// Of one on one node, for both of its pods.
    exchanges: [Option<Arc<ExchangeSeries>>; 2],
    /// What the policy of the server's pod said, of one on one node.
    authz: Option<HttpAuthz>,
}

/// An exchange that is being measured, wherever it counts.
#[derive(Debug, Default)]
pub(super) struct Timers([Option<ExchangeTimer>; 3]);

impl Kind<'_> {
    /// The series of the rule, as the client sees it.
    pub(super) fn of_rule(
        &self,
        context: &Context,
        pod: &LocalPod,
        known: &mut Option<Known>,
    ) -> Timers {
        let Some(parent) = self.parent else {
            return Timers::default();
        };
        let look_up = || {
            let labels = RouteLabels {
                pod: pod.labels.clone(),
                parent: port_ref(parent),
                route: self.route(),
            };
            Series {
                exchanges: [Some(context.telemetry.route(labels)), None],
                authz: None,
            }
        };
        Timers::begin(self.known(known, look_up))
    }

    /// The series of an exchange on a connection.
    pub(super) fn of_connection(
        &self,
        context: &Context,
        pod: &LocalPod,
        to: &Route,
        known: &mut Option<Known>,
    ) -> Timers {
        let look_up = || {
            let outbound = ExchangeLabels {
                direction: Direction::Outbound,
                pod: pod.labels.clone(),
                authority: self.parent.map(|it| AuthorityLabel {
                    service: it.service.clone(),
                    port: it.port,
                }),
                service: self.parent.map(|it| it.service.clone()),
                destination: to.destination.clone().map(|id| DestinationLabels {
                    owner: context.store.workload(&id).and_then(|it| it.owner.clone()),
                    id,
                }),
                target_port: None,
                tls: tls(to.path),
                client: None,
                server: to.identity.clone(),
                verdict: None,
                backend: self
                    .parent
                    .zip(self.backend)
                    .map(|(parent, backend)| BackendLabels {
                        parent: port_ref(parent),
                        route: self.route(),
                        backend: port_ref(backend),
                    }),
            };
            let inbound = to.local.as_ref().map(|local| ExchangeLabels {
                direction: Direction::Inbound,
                pod: local.labels.clone(),
                authority: None,
                service: None,
                destination: None,
                target_port: Some(to.endpoint.port()),
                tls: TlsLabel::SameNode,
                client: Some(pod.identity.clone()),
                server: None,
                verdict: to.verdict.clone(),
                backend: None,
            });
            let authz = to.local.as_ref().zip(to.verdict.as_ref());
            let authz = authz.map(|(local, verdict)| {
                let at = (to.endpoint.port(), TlsLabel::SameNode);
                self::authz(context, local, at, Some(&pod.identity), verdict)
            });
            let telemetry = &context.telemetry;
            Series {
                exchanges: [
                    Some(telemetry.exchanges(outbound)),
                    inbound.map(|it| telemetry.exchanges(it)),
                ],
                authz,
            }
        };
        Timers::begin(self.known(known, look_up))
    }

    fn known<'k>(
        &self,
        known: &'k mut Option<Known>,
        look_up: impl FnOnce() -> Series,
    ) -> &'k Series {
        let again = known.take().filter(|it| it.is_of(self));
        let known = known.insert(again.unwrap_or_else(|| Known {
            parent: self.parent.cloned(),
            table: self.table.cloned(),
            ordinal: self.matched.map(|it| it.ordinal),
            backend: self.backend.cloned(),
            is_grpc: self.is_grpc,
            series: look_up(),
        }));
        &known.series
    }

    fn route(&self) -> RouteRef {
        match self.matched {
            Some(matched) => RouteRef::Resource {
                group: matched.route.group(),
                kind: matched.route.kind.as_str(),
                name: matched.route.name.clone(),
            },
            None if self.is_grpc => RouteRef::Default("grpc"),
            None => RouteRef::Default("http"),
        }
    }
}

impl Known {
    fn is_of(&self, kind: &Kind<'_>) -> bool {
        is_same(self.parent.as_ref(), kind.parent)
            && is_same(self.table.as_ref(), kind.table)
            && is_same(self.backend.as_ref(), kind.backend)
            && self.ordinal == kind.matched.map(|it| it.ordinal)
            && self.is_grpc == kind.is_grpc
    }
}

impl Timers {
    fn begin(series: &Series) -> Self {
        let [one, other] = &series.exchanges;
        if let Some(authz) = &series.authz {
            authz.count();
        }
        Self([
            one.as_ref().map(ExchangeSeries::begin),
            other.as_ref().map(ExchangeSeries::begin),
            None,
        ])
    }

    /// Of an exchange that counts in one place.
    pub(super) fn one(series: &Arc<ExchangeSeries>) -> Self {
        Self([Some(series.begin()), None, None])
    }

    /// Those of a try, with that of its route.
    pub(super) fn and(mut self, mut route: Self) -> Self {
        let [_, _, last] = &mut self.0;
        *last = route.0[0].take();
        self
    }

    /// The response's head has come.
    pub(super) fn respond(&mut self, status: StatusCode, headers: &HeaderMap) {
        let grpc = grpc_status(headers);
        for timer in self.0.iter_mut().flatten() {
            timer.respond(status, grpc);
        }
    }

    /// The first part of its body has come.
    pub(super) fn first_byte(&mut self) {
        for timer in self.0.iter_mut().flatten() {
            timer.first_byte();
        }
    }

    /// It has ended.
    pub(super) fn end(self, in_trailers: Option<GrpcStatus>) {
        for timer in self.0.into_iter().flatten() {
            timer.end(Ok(in_trailers));
        }
    }

    /// It has failed.
    pub(super) fn fail(self, error: ExchangeError) {
        for timer in self.0.into_iter().flatten() {
            timer.end(Err(error));
        }
    }

    /// It was answered here.
    pub(super) fn answer(mut self, error: &answer::ExchangeError, is_grpc: bool) {
        let answer = error.answer(is_grpc);
        self.respond(answer.status(), answer.headers());
        self.fail(error.label());
    }
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

fn is_same<T>(one: Option<&Arc<T>>, other: Option<&Arc<T>>) -> bool {
    match (one, other) {
        (Some(one), Some(other)) => Arc::ptr_eq(one, other),
        (None, None) => true,
        _ => false,
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
