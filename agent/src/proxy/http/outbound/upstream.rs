//! Connections to servers, for one exchange after the other: one that is kept, or a new one.

use std::net::SocketAddr;
use std::sync::{Arc, PoisonError};

use hyper::Request;

use super::send::Endpoint;
use super::{Facts, home};
use crate::node::LocalPod;
use crate::proxy::error::FlowError;
use crate::proxy::http::answer::ExchangeError;
use crate::proxy::http::application::Origin;
use crate::proxy::http::body::Used;
use crate::proxy::http::connection::{Hold, Http1, Http2, Life, OpenStream, Route};
use crate::proxy::http::gate::Gate;
use crate::proxy::http::measure::{self, Kind, Timers};
use crate::proxy::http::stream::{Returned, Stream};
use crate::proxy::http::{Version, is_taken};
use crate::proxy::outbound::{self, Caller, Connected};
use crate::proxy::record::{PathLabel, Record};
use crate::proxy::tunnel::weft1::stream::ChannelIo;
use crate::proxy::usage::{From, Party};
use crate::proxy::{egress, let_out};
use crate::telemetry::TlsLabel;

/// A connection to a server, ready for an exchange.
pub(super) enum Upstream {
    Http1(Box<Http1>),
    Http2 {
        connection: Http2,
        stream: OpenStream,
        is_reused: bool,
    },
}

/// A connection to the endpoint: one that is there, or a new one.
pub(super) async fn upstream(
    client: &Arc<Facts>,
    (endpoint, of, _): Endpoint<'_>,
) -> Result<Upstream, ExchangeError> {
    let Facts {
        context,
        pod,
        version,
        ..
    } = &**client;
    let way = outbound::decide(context, pod, endpoint).await;
    let way = way.inspect_err(|error| refused(client, error))?;
    let route = outbound::route(context, &way, endpoint);
    if let Some(local) = &route.local
        && !is_taken(
            context.store.inbound_protocol(&local.id, endpoint.port()),
            *version,
        )
    {
        // Its application is not bothered.
        refused(client, &FlowError::NotHttp);
        return Err(FlowError::NotHttp.into());
    }
    match version {
        Version::Http1 => {
            if let Some(connection) = pod.exchanges.take_http1(&route) {
                return Ok(Upstream::Http1(connection));
            }
        }
        Version::Http2 => {
            if let Some(connection) = pod.exchanges.take_http2(&route) {
                let stream = connection.open();
                return Ok(Upstream::Http2 {
                    connection,
                    stream,
                    is_reused: true,
                });
            }
        }
    }
    let mut record = Box::new(outbound::new_record(pod));
    record.has_exchanges = true;
    record.client = Some(client.address);
    record.original = Some(client.original);
    record.service = of.map(|(port, _)| port.service.clone());
    let from = Caller {
        address: client.address,
        said: None,
        is_left_alone: false,
        service: None,
    };
    let connecting = Box::pin(outbound::connect(context, pod, from, endpoint, &mut record));
    let connected = match connecting.await {
        Ok(connected) => connected,
        Err(error) => {
            // Of a service only if there is no other endpoint: that may be listening.
            if error.nothing_listens() && of.is_none_or(|(_, is_only)| is_only) {
                outbound::remember_refused(context, pod, client.original);
            }
            if let (FlowError::Denied(verdict), Some(server)) = (&error, &route.local) {
                let at = (endpoint.port(), TlsLabel::SameNode);
                measure::authz(context, server, at, Some(&pod.identity), verdict).count();
            }
            let_out::count(context, pod, &error);
            let result = Err(error);
            record.finish(&context.telemetry, &context.store, &result);
            return Err(result.err().unwrap_or(FlowError::PodGone).into());
        }
    };
    let started = start(client, connected, record, route.generation).await;
    if let Err(ExchangeError::Flow(error)) = &started {
        refused(client, error);
    }
    started
}

/// Counts what never became a flow.
pub(super) fn refused(client: &Facts, error: &FlowError) {
    egress::count(&client.context, &client.pod, error);
    let_out::count(&client.context, &client.pod, error);
    if let Some(refusal) = error.refusal() {
        client.context.telemetry.refusal(&client.pod.id, refusal);
    }
}

/// Speaks HTTP on a flow that was accepted.
pub(super) async fn start(
    client: &Arc<Facts>,
    connected: Connected,
    mut record: Box<Record>,
    generation: u64,
) -> Result<Upstream, ExchangeError> {
    let Facts { context, pod, .. } = &**client;
    let mut route = route_of(pod, &record, &connected, generation);
    outbound::count(context, pod, &mut record);
    let mut moved = std::mem::take(&mut record.moved);
    let (stream, hold) = match connected {
        Connected::Socket(server) => {
            let own = record.path == PathLabel::Itself;
            let origin = origin(client, &route, pod, own.then_some(client.address));
            let stream = Stream::application(server, origin, client.version);
            (stream, Hold::Nothing)
        }
        Connected::SameNode(admitted, _) if !is_taken(admitted.declared, client.version) => {
            record.moved = moved;
            let result = Err(FlowError::NotHttp);
            record.finish(&context.telemetry, &context.store, &result);
            return Err(FlowError::NotHttp.into());
        }
        Connected::SameNode(admitted, tracked) => {
            let (server, inbound_meter, verdict, admission) = admitted.part();
            record.verdict = Some(verdict);
            moved.meter_too(inbound_meter);
            admission.is_http();
            let hold = Hold::SameNode {
                admission,
                _counted: tracked,
            };
            let other = route.local.as_ref().unwrap_or(pod);
            let origin = origin(client, &route, other, Some(client.address));
            let stream = Stream::application(server, origin, client.version);
            (stream, hold)
        }
        Connected::Channel(asked) => {
            let (channel, watch, give_back) = asked.part();
            let returned = Returned::default();
            let hold = Hold::Channel {
                returned: returned.clone(),
                watch: Box::new(watch),
                give_back: Some(give_back),
            };
            let io = ChannelIo::new(channel);
            (Stream::channel(io, returned), hold)
        }
        Connected::Tunnel(opened) => {
            let hold = Hold::Tunnel { _slot: opened.slot };
            (Stream::opened(opened.halves, opened.is_of_weft), hold)
        }
    };
    route.verdict.clone_from(&record.verdict);
    route.gate = route.local.as_ref().map(|local| {
        let from = (client.address.ip(), TlsLabel::SameNode);
        let (port, identity) = (route.endpoint.port(), pod.identity.clone());
        let verdict = route.verdict.as_ref();
        Gate::new(Arc::clone(local), port, from, Some(identity), verdict)
    });
    let route = Arc::new(route);
    let life = Life::new(context, pod, record, moved, hold);
    match client.version {
        Version::Http1 => {
            let started = Http1::start(stream, life, route).await;
            let connection = started.map_err(ExchangeError::Server)?;
            Ok(Upstream::Http1(Box::new(connection)))
        }
        Version::Http2 => {
            let started = Http2::start(stream, life, route, &client.party).await;
            let connection = started.map_err(ExchangeError::Server)?;
            let connection = pod.exchanges.share(connection, &pod.stop_accepting);
            let stream = connection.open();
            Ok(Upstream::Http2 {
                connection,
                stream,
                is_reused: false,
            })
        }
    }
}

/// How to connect to the application once more; `seen_as` if it is in a pod of this node.
fn origin(
    client: &Facts,
    route: &Route,
    pod: &Arc<LocalPod>,
    seen_as: Option<SocketAddr>,
) -> Origin {
    Origin {
        proxy: Arc::clone(&client.context),
        pod: Arc::clone(pod),
        to: route.endpoint,
        client: seen_as,
    }
}

/// Where a connection that was just made leads.
fn route_of(pod: &LocalPod, record: &Record, connected: &Connected, generation: u64) -> Route {
    let own = record.destination.as_ref() == Some(&pod.id);
    Route {
        endpoint: record
            .endpoint
            .unwrap_or(SocketAddr::from(([0, 0, 0, 0], 0))),
        path: record.path,
        destination: record.destination.clone().filter(|_| !own),
        identity: record.destination_identity.clone(),
        local: match connected {
            Connected::SameNode(admitted, _) => Some(Arc::clone(admitted.pod())),
            _ => None,
        },
        party: match connected {
            Connected::SameNode(admitted, _) => {
                let from = From::Workload(pod.identity.clone());
                Some(Party::at_pod(&admitted.pod().usage, from))
            }
            _ => None,
        },
        verdict: None,
        gate: None,
        // From before it was made: a change in its middle makes it one that is not used again.
        generation,
    }
}

impl Upstream {
    pub(super) fn route(&self) -> &Route {
        match self {
            Self::Http1(connection) => &connection.route,
            Self::Http2 { connection, .. } => &connection.route,
        }
    }

    /// The exchange's place in a connection that is shared.
    pub(super) fn stream(&self) -> Option<&OpenStream> {
        match self {
            Self::Http1(_) => None,
            Self::Http2 { stream, .. } => Some(stream),
        }
    }

    /// Begins to measure an exchange.
    pub(super) fn measure<B>(
        &mut self,
        client: &Facts,
        kind: &Kind<'_>,
        request: &Request<B>,
    ) -> Timers {
        let (context, pod) = (&client.context, &client.pod);
        let (route, timers) = match self {
            Self::Http1(connection) => {
                let connection = &mut **connection;
                let (route, known) = (&connection.route, &mut connection.known);
                let timers = kind.of_connection(context, pod, route, known, request);
                (route, timers)
            }
            Self::Http2 { connection, .. } => {
                let known = connection.known.lock();
                let mut known = known.unwrap_or_else(PoisonError::into_inner);
                let route = &connection.route;
                let timers = kind.of_connection(context, pod, route, &mut known, request);
                (route, timers)
            }
        };
        kind.watched(context, pod, route, timers, request)
    }

    /// It was not used after all.
    pub(super) fn let_go(self, client: &Facts) {
        if let Self::Http1(connection) = self {
            let used = Used {
                home: home(client),
                connection,
            };
            used.give_back();
        }
    }

    pub(super) fn is_reused(&self) -> bool {
        match self {
            Self::Http1(connection) => connection.is_reused,
            Self::Http2 { is_reused, .. } => *is_reused,
        }
    }
}
