//! Which way leads to a destination: what it is, which endpoint of it, and who must answer there.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use tokio::net::TcpStream;
use tokio::sync::Notify;
use weft_core::route::{SelectedFlow, Target, pick};
use weft_core::{Identity, Mesh, TUNNEL_PORT, Tunnel, WorkloadId};

use super::find::Reached;
use super::tunnel::open_tunnel;
use super::wait::Waiter;
use super::{Caller, Classified, Connected, Way};
use crate::balance::{self, Tries};
use crate::config::TunnelProtocol;
use crate::discovery::{Balanced, Destination, ServicePortEntry};
use crate::identity::Alpn;
use crate::node::LocalPod;
use crate::proxy::egress::{self, Led};
use crate::proxy::error::FlowError;
use crate::proxy::http::connection::Route;
use crate::proxy::inbound::{self, Arrival};
use crate::proxy::record::{PathLabel, Record};
use crate::proxy::tcp::FlowSocket;
use crate::proxy::{Context, let_out, socket};
use crate::telemetry::{Refusal, TlsLabel};

/// Decides and connects, at one endpoint after the other. An endpoint has to do with the flow for as long
/// as the guard is held.
pub(super) async fn reach(
    context: &Arc<Context>,
    pod: &Arc<LocalPod>,
    classified: &Classified,
    to: (Caller<'_>, SocketAddr, Option<&str>),
    client: &Patient<'_>,
    record: &mut Record,
) -> Result<Reached, FlowError> {
    let (from, original, name) = to;
    match classified {
        Classified::Address => match egress::lead(context, pod, original, name)? {
            Led::Original => {
                let connected = connect(context, pod, from, original, record).await?;
                egress::enter_flow(context, pod, original, name, record)?;
                Ok((connected, None))
            }
            Led::Service(port) => {
                reach_port(context, pod, &port, (from, original), client, record).await
            }
        },
        Classified::Service(port) => {
            record.service = Some(port.service.clone());
            let led = lead(context, pod, port, name)?;
            let port = led.as_ref().unwrap_or(port);
            reach_port(context, pod, port, (from, original), client, record).await
        }
    }
}

/// Any endpoint of a service's port, and whoever is there first if there is none now.
async fn reach_port(
    context: &Arc<Context>,
    pod: &Arc<LocalPod>,
    port: &Arc<ServicePortEntry>,
    (from, original): (Caller<'_>, SocketAddr),
    client: &Patient<'_>,
    record: &mut Record,
) -> Result<Reached, FlowError> {
    let from = Caller {
        service: Some(port),
        ..from
    };
    let mut waiter = Waiter::new(context, pod, port, original.ip());
    loop {
        waiter.looks();
        let tries = port.tries(Balanced::Connections, original.ip());
        let mut tries = tries.without(let_out::forbidden(context, pod));
        let reached = try_each(context, pod, from, &mut tries, record).await;
        record.more_endpoints = tries.has_more();
        if let Some(reached) = reached? {
            waiter.served();
            return Ok(reached);
        }
        client.waits.notify_one();
        let are_any = tries.candidates() > 0;
        waiter
            .flow_found_nobody(are_any, client.socket, original)
            .await?;
    }
}

/// A client that waits for its server.
pub(super) struct Patient<'a> {
    /// Its socket.
    pub(super) socket: &'a TcpStream,
    /// Is told when there is no endpoint now.
    pub(super) waits: Notify,
}

/// None: there is none that may be chosen, or none whose agent is there. An application that does not listen is
/// an answer: who asks whether somebody does is not to wait for it.
async fn try_each(
    context: &Arc<Context>,
    pod: &Arc<LocalPod>,
    from: Caller<'_>,
    tries: &mut Tries,
    record: &mut Record,
) -> Result<Option<Reached>, FlowError> {
    let mut last = None;
    while let Some(mut in_flight) = tries.begin(Instant::now(), balance::random_below) {
        let to = in_flight.endpoint().to();
        let error = match connect(context, pod, from, to, record).await {
            Ok(connected) => {
                in_flight.first_byte();
                return Ok(Some((connected, Some(in_flight))));
            }
            Err(error) => error,
        };
        if is_of_endpoint(&error) {
            in_flight.failed();
        } else {
            in_flight.forget();
        }
        if !error.may_try_another() {
            return Err(error);
        }
        last = Some(error);
    }
    match last {
        Some(error) if !error.agent_is_away() => Err(error),
        Some(_) => Ok(None),
        None => why_none(context, pod, tries).await.map_or(Ok(None), Err),
    }
}

/// Why none of the endpoints may be chosen, if the pod may connect to none of them.
pub(in crate::proxy) async fn why_none(
    context: &Context,
    pod: &LocalPod,
    tries: &Tries,
) -> Option<FlowError> {
    decide(context, pod, tries.all_forbidden()?).await.err()
}

/// Whether a flow failed because of its endpoint, and others would too: what only its own pod is
/// refused must not keep those of other pods away.
pub(in crate::proxy) fn is_of_endpoint(error: &FlowError) -> bool {
    matches!(
        error.refusal(),
        Some(
            Refusal::ConnectRefused
                | Refusal::ConnectTimeout
                | Refusal::ConnectFailed
                | Refusal::HandshakeFailed
                | Refusal::HandshakeTimeout
                | Refusal::IdentityMismatch
                | Refusal::UnknownAddress
                | Refusal::PodGone
        )
    )
}

pub(in crate::proxy) async fn classify(
    context: &Context,
    pod: &LocalPod,
    original: SocketAddr,
) -> Result<Classified, FlowError> {
    match known(context, pod, original).await? {
        Destination::Service(port) => Ok(Classified::Service(port)),
        Destination::ServiceWithoutPort(name) => {
            Err(FlowError::UnknownServicePort(name, original.port()))
        }
        Destination::Workload(_) | Destination::Outside | Destination::Unknown => {
            Ok(Classified::Address)
        }
    }
}

/// What an address is, asked for if need be; never [`Destination::Unknown`].
async fn known(
    context: &Context,
    pod: &LocalPod,
    address: SocketAddr,
) -> Result<Destination, FlowError> {
    let mut destination = context.store.classify(address);
    if matches!(destination, Destination::Unknown)
        && context.discovery.ask(&pod.id, address.ip()).await
    {
        destination = context.store.classify(address);
    }
    match destination {
        Destination::Unknown => Err(FlowError::UnknownAddress(address.ip())),
        known => Ok(known),
    }
}

/// Connects to one endpoint.
pub(in crate::proxy) async fn connect(
    context: &Arc<Context>,
    pod: &Arc<LocalPod>,
    from: Caller<'_>,
    to: SocketAddr,
    record: &mut Record,
) -> Result<Connected, FlowError> {
    record.endpoint = Some(to);
    let way = decide(context, pod, to).await?;
    note(record, pod, &way);
    match way {
        Way::Itself => {
            let server = socket::deliver(context, pod, to, from.address).await?;
            Ok(Connected::Socket(server))
        }
        Way::Plaintext(_) => {
            let server = socket::connect(context, pod, to).await?;
            let server = FlowSocket::new(server);
            let server = server.map_err(|source| FlowError::Connect { to, source })?;
            Ok(Connected::Socket(server))
        }
        Way::SameNode(other) => {
            let arrival = Arrival {
                client: from.address,
                identity: Some(&pod.identity),
                to,
                tls: TlsLabel::SameNode,
                opaque_by: from.opaque_by(),
            };
            let admitted = inbound::admit(context, &other, arrival).await?;
            Ok(Connected::SameNode(Box::new(admitted), other.flows.token()))
        }
        Way::Tunnel { identity, alpn, .. } => {
            open_tunnel(context, pod, from, to, identity, alpn).await
        }
    }
}

/// Which way leads to an endpoint.
pub(in crate::proxy) async fn decide(
    context: &Context,
    pod: &LocalPod,
    to: SocketAddr,
) -> Result<Way, FlowError> {
    if pod.has_address(to.ip()) {
        return Ok(Way::Itself);
    }
    let workload = match known(context, pod, to).await? {
        Destination::Workload(workload) => workload,
        Destination::Outside => {
            let_out::ask(context, pod, to, None)?;
            return Ok(Way::Plaintext(None));
        }
        // An endpoint that is a service's address: nothing that could be proven to be anybody.
        Destination::Service(_) | Destination::ServiceWithoutPort(_) | Destination::Unknown => {
            return Err(FlowError::UnknownAddress(to.ip()));
        }
    };
    let_out::ask(context, pod, to, Some(&workload.id))?;
    let (identity, tunnel) = match &workload.mesh {
        Mesh::Unmeshed => return Ok(Way::Plaintext(Some(workload))),
        Mesh::Meshed { identity, tunnel } => (identity.clone(), *tunnel),
    };
    if to.port() == TUNNEL_PORT {
        return Err(FlowError::ReservedPort(to.port()));
    }
    let force_tunnels = context.store.cluster().is_none_or(|it| it.force_tunnels);
    if !(force_tunnels || pod.is_by_tunnels_only())
        && let Some(local) = context.pods.at(to.ip())
        && !local.is_by_tunnels_only()
        && local.id == workload.id
        && local.identity == identity
    {
        return Ok(Way::SameNode(local));
    }
    let alpn = match tunnel {
        Tunnel::WeftH2 => match context.config.tunnel {
            TunnelProtocol::Weft => Alpn::Weft,
            TunnelProtocol::WeftH2 => Alpn::WeftH2,
        },
        Tunnel::Hbone => Alpn::Hbone,
    };
    Ok(Way::Tunnel {
        workload,
        identity,
        alpn,
    })
}

/// Where a connection of HTTP that goes this way would lead.
pub(in crate::proxy) fn route(context: &Context, way: &Way, endpoint: SocketAddr) -> Route {
    let (path, destination, identity) = facts(None, way);
    Route {
        endpoint,
        path,
        destination: destination.cloned(),
        identity: identity.cloned(),
        local: match way {
            Way::SameNode(other) => Some(Arc::clone(other)),
            _ => None,
        },
        party: None,
        verdict: None,
        gate: None,
        generation: context.identities.generation(),
    }
}

fn note(record: &mut Record, pod: &LocalPod, way: &Way) {
    let (path, destination, identity) = facts(Some(pod), way);
    record.path = path;
    record.destination = destination.cloned();
    record.destination_identity = identity.cloned();
}

fn facts<'a>(
    pod: Option<&'a LocalPod>,
    way: &'a Way,
) -> (PathLabel, Option<&'a WorkloadId>, Option<&'a Identity>) {
    match way {
        Way::Itself => (PathLabel::Itself, pod.map(|it| &it.id), None),
        Way::SameNode(other) => (PathLabel::SameNode, Some(&other.id), Some(&other.identity)),
        Way::Tunnel {
            workload, identity, ..
        } => (PathLabel::Tunnel, Some(&workload.id), Some(identity)),
        Way::Plaintext(workload) => {
            let id = workload.as_ref().map(|it| &it.id);
            (PathLabel::Plaintext, id, None)
        }
    }
}

/// Where routes lead a flow to a port of a service; none: to that port itself.
fn lead(
    context: &Context,
    pod: &LocalPod,
    port: &ServicePortEntry,
    server_name: Option<&str>,
) -> Result<Option<Arc<ServicePortEntry>>, FlowError> {
    let Some(table) = port.routes.load_full() else {
        return Ok(None);
    };
    let nowhere = || FlowError::NoRoute(port.service.clone(), port.port);
    match table.select_flow(&pod.id.0.namespace, server_name) {
        SelectedFlow::Service => Ok(None),
        SelectedFlow::NotFound => Err(nowhere()),
        SelectedFlow::Rule { rule, .. } => {
            match pick(&rule.backends, rand::random()).map(|it| &it.target) {
                Some(Target::Service { name, port }) => {
                    let found = context.store.service_port(name, *port);
                    found.map(Some).ok_or_else(nowhere)
                }
                Some(Target::Egress(_) | Target::Invalid(_)) | None => Err(nowhere()),
            }
        }
    }
}
