//! The half of a flow that belongs to its client: what did it want to reach, which way leads there,
//! and who must answer.
//!
//! Nothing is taken from the client before a server has accepted, so a flow can be tried at another
//! endpoint without losing a byte. What is HTTP goes on in `http::outbound`. Whatever is not known is refused: plaintext leaves only for what
//! a record says is not meshed, or for what lies outside of the cluster.

mod weft1;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ::http::StatusCode;
use futures::future::BoxFuture;
use rustls::ClientConfig;
use rustls_pki_types::{CertificateDer, ServerName};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_util::task::task_tracker::TaskTrackerToken;
use weft_core::route::{RouteType, SelectedFlow, Target, pick};
use weft_core::{Identity, Mesh, TUNNEL_PORT, Tunnel, Workload, WorkloadId};

use super::ends::unless;
use super::error::{FlowError, TunnelError};
use super::http::connection::Route;
use super::http::detect::{self, Detected};
use super::http::sniff::Sniffed;
use super::inbound::{self, Admitted, Arrival, accept_each, refuse};
use super::record::{PathLabel, Record};
use super::tcp::{Broken, FlowSocket, Moved, Side, join_sockets, join_tunnel, prepare};
use super::tunnel::client::{Dialed, Key, Opened};
use super::tunnel::wire;
use super::usage::Dial;
use super::{Context, http, socket};
use crate::balance::{self, InFlight};
use crate::config::TunnelProtocol;
use crate::discovery::{Balanced, Destination, ServicePortEntry};
use crate::identity::{Alpn, peer_identity};
use crate::node::LocalPod;
use crate::telemetry::{Direction, FlowLabels, Refusal, TlsLabel};

/// Stage one: a connection of a pod's application.
#[derive(Debug)]
pub struct Accepted {
    /// The application's side.
    pub socket: FlowSocket,
    /// The application's address, as others see it.
    pub client: SocketAddr,
    /// Where it wanted to go.
    pub original: SocketAddr,
}

/// Who connects to a server.
#[derive(Clone, Copy, Debug)]
pub(super) struct Caller<'a> {
    /// The application's address, as others see it.
    pub(super) address: SocketAddr,
    /// Its socket, if what it has said already may be sent before the server has accepted.
    pub(super) said: Option<&'a TcpStream>,
}

/// Stage two: what the destination is.
#[derive(Clone, Debug)]
pub enum Classified {
    /// A port of a service: any of its endpoints will do.
    Service(Arc<ServicePortEntry>),
    /// That address and port.
    Address,
}

/// Stage three: the way to one endpoint.
#[derive(Debug)]
pub enum Way {
    /// To the client's own pod, as if there were no mesh.
    Itself,
    /// To a meshed pod of this node.
    SameNode(Arc<LocalPod>),
    /// To a meshed workload elsewhere, which must prove to be who its record says.
    Tunnel {
        /// The record.
        workload: Arc<Workload>,
        /// Who must answer.
        identity: Identity,
        /// What is spoken there.
        alpn: Alpn,
    },
    /// To what is not part of the mesh.
    Plaintext(Option<Arc<Workload>>),
}

/// Stage four: a server has accepted.
#[derive(Debug)]
pub enum Connected {
    /// On a socket.
    Socket(FlowSocket),
    /// On this node, with the inbound half's consent. The flow's task is the client pod's; by the
    /// token it counts among the server pod's flows too, and its removal waits for it.
    SameNode(Box<Admitted>, TaskTrackerToken),
    /// Through a tunnel.
    Tunnel(Box<Opened>),
    /// Through a tunnel of its own.
    Channel(Box<weft1::Asked>),
}

/// Serves the connections of the pod's applications, until its listeners close.
pub async fn serve(context: Arc<Context>, pod: Arc<LocalPod>, listener: TcpListener) {
    let room = Arc::new(Semaphore::new(context.config.limits.flows_per_pod));
    accept_each(&context, &pod, listener, |stream, peer| {
        let Ok(place) = Arc::clone(&room).try_acquire_owned() else {
            refuse(&context, &pod, stream, &FlowError::TooManyFlows);
            return;
        };
        let parts = (Arc::clone(&context), Arc::clone(&pod));
        // Made inside: what is taken into a block and awaited there has its room twice.
        pod.spawn_flow(async move {
            flow(parts.0, parts.1, (stream, peer)).await;
            drop(place);
        });
    })
    .await;
}

async fn flow(context: Arc<Context>, pod: Arc<LocalPod>, stream: (TcpStream, SocketAddr)) {
    let mut record = new_record(&pod);
    let result = run(&context, &pod, stream, &mut record).await;
    record.finish(&context.telemetry, &result);
}

async fn run(
    context: &Arc<Context>,
    pod: &Arc<LocalPod>,
    stream: (TcpStream, SocketAddr),
    record: &mut Record,
) -> Result<(), FlowError> {
    let accepted = accept(context, pod, stream)?;
    record.client = Some(accepted.client);
    record.original = Some(accepted.original);
    // Boxed: nothing of it is needed while bytes are copied.
    let finding = Box::pin(find(context, pod, &accepted, record));
    let found = tokio::select! {
        found = finding => found,
        () = accepted.socket.failed() => return Err(Broken::Reset(Side::Client).into()),
        () = pod.end_flows.cancelled() => return Err(FlowError::Drained),
    };
    let found = found.inspect_err(|error| {
        // Of a service only if every endpoint was asked: others may be listening.
        if error.nothing_listens() && !record.more_endpoints {
            remember_refused(context, pod, accepted.original);
        }
    })?;
    match found {
        Found::Opaque(reached) => {
            let (connected, _in_flight) = *reached;
            carry(context, pod, accepted.socket, connected, record).await
        }
        Found::Http(client, connected) => {
            if let Some(connected) = connected {
                keep(&client, pod, *connected, record).await;
            }
            record.is_told_elsewhere = true;
            Box::pin(client.serve(accepted.socket)).await
        }
    }
}

/// Has a connection that was made meanwhile kept for the client's exchanges; it is told of with the record
/// so far.
fn keep<'a>(
    client: &'a http::outbound::Client,
    pod: &LocalPod,
    connected: Connected,
    record: &mut Record,
) -> BoxFuture<'a, ()> {
    let own = Box::new(std::mem::replace(record, new_record(pod)));
    Box::pin(client.keep(connected, own))
}

/// What a flow turned out to be.
enum Found {
    /// Bytes, for a server that has accepted.
    Opaque(Box<Reached>),
    /// HTTP, and what was connected meanwhile.
    Http(http::outbound::Client, Option<Box<Connected>>),
}

/// A server that has accepted, and what the balancer counts as long as it is there.
type Reached = (Connected, Option<InFlight>);

/// Finds out what the client speaks, and connects to a server, unless its exchanges will.
async fn find(
    context: &Arc<Context>,
    pod: &Arc<LocalPod>,
    accepted: &Accepted,
    record: &mut Record,
) -> Result<Found, FlowError> {
    let generation = context.identities.generation();
    let classified = classify(context, pod, accepted.original).await?;
    let socket = accepted.socket.socket();
    let opaque = Caller {
        address: accepted.client,
        said: Some(socket),
    };
    let http = |version, connected| {
        let target = match &classified {
            Classified::Service(port) => http::outbound::Target::Service(Arc::clone(port)),
            Classified::Address => http::outbound::Target::Address,
        };
        let addresses = (accepted.client, accepted.original);
        let client =
            http::outbound::Client::new(context, pod, addresses, version, target, generation);
        Found::Http(client, connected)
    };
    if !is_looked_at(context, pod, accepted, &classified) {
        let to = (opaque, accepted.original, None);
        let reached = reach(context, pod, &classified, to, record).await?;
        return Ok(Found::Opaque(Box::new(reached)));
    }
    let client_failed = |error| Broken::socket(Side::Client, error);
    let mut seen = detect::at_once(socket).map_err(client_failed)?;
    if seen.is_none() && has_names(pod, &classified) {
        // Where it goes depends on the name that it asks for, if it speaks TLS.
        let found = detect::from_client(socket).await;
        seen = Some(found.map_err(client_failed)?);
    }
    if let Some(seen) = &seen {
        seen.count(&context.telemetry);
    }
    match seen.map(|it| it.protocol) {
        Some(Sniffed::Http(version)) => return Ok(http(version, None)),
        Some(other) => {
            let name = match &other {
                Sniffed::Tls { server_name } => server_name.as_deref(),
                _ => None,
            };
            let to = (opaque, accepted.original, name);
            let reached = reach(context, pod, &classified, to, record).await?;
            return Ok(Found::Opaque(Box::new(reached)));
        }
        None => {}
    }
    // Nothing that it says may leave before it is known what that is.
    let from = Caller {
        said: None,
        ..opaque
    };
    let mut detecting = pin!(detect::from_client(socket));
    let mut detected = None;
    if is_connected(pod, &classified, accepted.original) {
        // HTTP was spoken there before; if it is, no other connection is needed.
        detected = Some(detecting.as_mut().await.map_err(client_failed)?);
        if let Some(seen) = &detected
            && let Sniffed::Http(version) = &seen.protocol
        {
            seen.count(&context.telemetry);
            return Ok(http(*version, None));
        }
    }
    let connected = {
        let to = (from, accepted.original, None);
        let mut reaching = pin!(reach(context, pod, &classified, to, record));
        tokio::select! {
            biased;
            found = &mut detecting, if detected.is_none() => {
                detected = Some(found.map_err(client_failed)?);
                reaching.await
            }
            connected = &mut reaching => connected,
        }
    };
    if let (Err(_), Some(Sniffed::Http(version))) =
        (&connected, detected.as_ref().map(|it| &it.protocol))
    {
        // Its exchanges will hear so themselves.
        return Ok(http(*version, None));
    }
    let (mut connected, in_flight) = connected?;
    count(context, pod, record);
    if detected.is_none() {
        detected = tokio::select! {
            biased;
            found = detecting => Some(found.map_err(client_failed)?),
            spoken = connected.speaks() => {
                spoken.map_err(|error| Broken::socket(Side::Server, error))?;
                None
            }
        };
    }
    let detected = detected.unwrap_or(Detected::SERVER_FIRST);
    detected.count(&context.telemetry);
    match detected.protocol {
        Sniffed::Http(version) => Ok(http(version, Some(Box::new(connected)))),
        _ => Ok(Found::Opaque(Box::new((connected, in_flight)))),
    }
}

/// Whether the service's routes for flows of the pod look at the name that a TLS client asks for.
fn has_names(pod: &LocalPod, classified: &Classified) -> bool {
    let Classified::Service(port) = classified else {
        return false;
    };
    let routes = port.routes.load();
    let namespace = &pod.id.0.namespace;
    routes
        .as_ref()
        .is_some_and(|it| it.route_type(namespace) == Some(RouteType::Tls))
}

/// Whether the pod's exchanges keep a connection to an endpoint that this one could be led to.
fn is_connected(pod: &LocalPod, classified: &Classified, original: SocketAddr) -> bool {
    match classified {
        Classified::Address => pod.exchanges.has_any(std::iter::once(original)),
        Classified::Service(port) => {
            let endpoints = port.endpoints.load();
            let endpoints = endpoints.iter();
            pod.exchanges.has_any(endpoints.map(|it| it.to()))
        }
    }
}

/// Whether it is worth a look: it may be HTTP, or TLS that is routed.
fn is_looked_at(
    context: &Context,
    pod: &LocalPod,
    accepted: &Accepted,
    classified: &Classified,
) -> bool {
    // What stays in the pod is none of the mesh's business.
    if pod.has_address(accepted.original.ip()) {
        return false;
    }
    http::may_be(context.declared(pod, classified, accepted.original)) || has_names(pod, classified)
}

fn accept(
    context: &Context,
    pod: &LocalPod,
    (stream, peer): (TcpStream, SocketAddr),
) -> Result<Accepted, FlowError> {
    socket::bound_buffers(pod, &stream);
    let socket = FlowSocket::accepted(stream);
    let original = socket::original_destination(context, socket.socket())?;
    Ok(Accepted {
        client: client_address(pod, peer, original.ip())?,
        original,
        socket,
    })
}

/// A redirected connection comes from a loopback address; others know the client by its pod's. A pod
/// without an address of the destination's family has no business there, and must not appear as
/// the loopback, which applications trust.
fn client_address(pod: &LocalPod, peer: SocketAddr, to: IpAddr) -> Result<SocketAddr, FlowError> {
    if pod.has_address(peer.ip()) {
        return Ok(peer);
    }
    let record = pod.record.load();
    let mut own = record.addresses.iter();
    let own = own.find(|it| it.is_ipv4() == to.is_ipv4());
    let own = own.ok_or(FlowError::NoSourceAddress(to))?;
    Ok(SocketAddr::new(*own, peer.port()))
}

/// Decides and connects, at one endpoint after the other. An endpoint has to do with the flow for as long
/// as the guard is held.
async fn reach(
    context: &Arc<Context>,
    pod: &Arc<LocalPod>,
    classified: &Classified,
    (from, original, name): (Caller<'_>, SocketAddr, Option<&str>),
    record: &mut Record,
) -> Result<Reached, FlowError> {
    match classified {
        Classified::Address => {
            let connected = connect(context, pod, from, original, record).await?;
            Ok((connected, None))
        }
        Classified::Service(port) => {
            record.service = Some(port.service.clone());
            let led = lead(context, pod, port, name)?;
            let port = led.as_ref().unwrap_or(port);
            let mut tries = port.tries(Balanced::Connections, original.ip());
            record.more_endpoints = tries.candidates() > balance::MOST_TRIES;
            let mut last = FlowError::NoEndpoint(port.service.clone(), port.port);
            while let Some(endpoint) = tries.next(Instant::now(), balance::random_below) {
                let mut in_flight = endpoint.begin();
                let connecting = connect(context, pod, from, endpoint.to(), record);
                match connecting.await {
                    Ok(connected) => {
                        in_flight.first_byte();
                        return Ok((connected, Some(in_flight)));
                    }
                    Err(error) => {
                        if is_of_endpoint(&error) {
                            in_flight.failed();
                        } else {
                            in_flight.forget();
                        }
                        if !error.may_try_another() {
                            return Err(error);
                        }
                        last = error;
                    }
                }
            }
            Err(last)
        }
    }
}

/// Whether a flow failed because of its endpoint, and others would too: what only its own pod is
/// refused must not keep those of other pods away.
pub(super) fn is_of_endpoint(error: &FlowError) -> bool {
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

async fn classify(
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
pub(super) async fn connect(
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
pub(super) async fn decide(
    context: &Context,
    pod: &LocalPod,
    to: SocketAddr,
) -> Result<Way, FlowError> {
    if pod.has_address(to.ip()) {
        return Ok(Way::Itself);
    }
    let workload = match known(context, pod, to).await? {
        Destination::Workload(workload) => workload,
        Destination::Outside => return Ok(Way::Plaintext(None)),
        // An endpoint that is a service's address: nothing that could be proven to be anybody.
        Destination::Service(_) | Destination::ServiceWithoutPort(_) | Destination::Unknown => {
            return Err(FlowError::UnknownAddress(to.ip()));
        }
    };
    let (identity, tunnel) = match &workload.mesh {
        Mesh::Unmeshed => return Ok(Way::Plaintext(Some(workload))),
        Mesh::Meshed { identity, tunnel } => (identity.clone(), *tunnel),
    };
    if to.port() == TUNNEL_PORT {
        return Err(FlowError::ReservedPort(to.port()));
    }
    let force_tunnels = context.store.cluster().is_none_or(|it| it.force_tunnels);
    if !force_tunnels
        && let Some(local) = context.pods.at(to.ip())
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

impl Connected {
    /// Ends when the server has said something.
    async fn speaks(&mut self) -> io::Result<()> {
        let server = match self {
            Self::Socket(server) => server,
            Self::SameNode(admitted, _) => &admitted.server,
            Self::Channel(asked) => {
                asked.speaks().await;
                return Ok(());
            }
            Self::Tunnel(opened) => {
                let halves = &mut opened.halves;
                if halves.first.is_empty()
                    && let Some(Ok(first)) = halves.receive.data().await
                {
                    halves.first = first;
                }
                return Ok(());
            }
        };
        detect::server_speaks(server).await
    }
}

/// Where a connection of HTTP that goes this way would lead.
pub(super) fn route(context: &Context, way: &Way, endpoint: SocketAddr) -> Route {
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
        verdict: None,
        generation: context.identities.generation(),
    }
}

/// A record of a flow of the pod.
pub(super) fn new_record(pod: &LocalPod) -> Record {
    let mut record = Record::new(Direction::Outbound, &pod.id);
    record.source = Some(pod.id.clone());
    record.source_identity = Some(pod.identity.clone());
    record
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

/// Asks the endpoint's agent for the flow, on a tunnel that is there or is made.
async fn open_tunnel(
    context: &Arc<Context>,
    pod: &Arc<LocalPod>,
    from: Caller<'_>,
    to: SocketAddr,
    identity: Identity,
    alpn: Alpn,
) -> Result<Connected, FlowError> {
    let mut key = Key {
        source: pod.id.clone(),
        source_uid: pod.uid.as_str().into(),
        destination: to.ip(),
        identity,
        alpn,
    };
    if alpn == Alpn::Weft {
        match Box::pin(weft1::ask(context, pod, from, to, &key)).await? {
            Some(asked) => return Ok(Connected::Channel(Box::new(asked))),
            None => key.alpn = Alpn::WeftH2,
        }
    }
    let alpn = key.alpn;
    let dial = || {
        let (context, pod) = (Arc::clone(context), Arc::clone(pod));
        let (address, identity) = (key.destination, key.identity.clone());
        async move { Box::pin(dial(&context, &pod, address, &identity, alpn)).await }
    };
    let source_port = matches!(alpn, Alpn::WeftH2).then_some(from.address.port());
    let request = wire::write_request(to, source_port);
    let asking = context.tunnels.request(&key, dial, request);
    let opened = tokio::time::timeout(ANSWER_TIMEOUT, Box::pin(asking)).await;
    let opened = opened.map_err(|_| FlowError::ConnectTimeout { to })??;
    match opened.response.status() {
        StatusCode::OK => Ok(Connected::Tunnel(Box::new(opened))),
        status => Err(FlowError::RefusedByPeer {
            by: to,
            status,
            reason: Some(opened.response.headers())
                .filter(|_| matches!(alpn, Alpn::WeftH2))
                .and_then(wire::read_reason),
        }),
    }
}

/// Makes a tunnel: connects from the source pod's namespace, and lets nothing pass before the peer
/// has proven to be who it must be.
async fn dial(
    context: &Context,
    pod: &LocalPod,
    address: IpAddr,
    expected: &Identity,
    alpn: Alpn,
) -> Result<Dialed<TlsStream<TcpStream>>, TunnelError> {
    let changed = context.identities.changed();
    let (config, stream, turn) = reach_agent(context, pod, address, alpn).await?;
    let name = ServerName::IpAddress(address.into());
    let handshake = TlsConnector::from(config).connect(name, stream);
    let handshake = context.handshakes.in_turn(handshake);
    let io = tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake)
        .await
        .map_err(|_| TunnelError::HandshakeTimeout)?
        .map_err(TunnelError::Handshake)?;
    drop(turn);
    let session = io.get_ref().1;
    let chain = session.peer_certificates();
    check_identity(chain.unwrap_or_default(), expected)?;
    if session.alpn_protocol() != Some(alpn.as_bytes()) {
        return Err(TunnelError::Protocol(alpn_name(alpn)));
    }
    let watch = inbound::watch_over(context, pod, chain, changed);
    let turns = pod.turns();
    Ok(Dialed { io, watch, turns })
}

/// Connects to the agent's port when it is the pod's turn, which lasts until the handshake is over.
/// Nothing is known of who answers.
async fn reach_agent(
    context: &Context,
    pod: &LocalPod,
    address: IpAddr,
    alpn: Alpn,
) -> Result<(Arc<ClientConfig>, TcpStream, Dial), TunnelError> {
    let config = context
        .identities
        .client(&pod.identity, alpn)
        .await
        .map_err(|error| TunnelError::NoCertificate(error.to_string()))?;
    let turn = pod.usage.dial(address).await;
    let turn = turn.ok_or(TunnelError::TooMany)?;
    let to = SocketAddr::new(address, TUNNEL_PORT);
    let stream = socket::connect(context, pod, to)
        .await
        .map_err(tunnel_error)?;
    prepare(&stream).map_err(|source| TunnelError::Connect { to, source })?;
    Ok((config, stream, turn))
}

/// Whether a chain that TLS has verified is that of whom it must be.
fn check_identity(
    chain: &[CertificateDer<'static>],
    expected: &Identity,
) -> Result<(), TunnelError> {
    let found =
        peer_identity(chain).map_err(|error| TunnelError::PeerCertificate(error.to_string()))?;
    if found == *expected {
        return Ok(());
    }
    Err(TunnelError::IdentityMismatch {
        expected: expected.clone(),
        found,
    })
}

fn alpn_name(alpn: Alpn) -> &'static str {
    match alpn {
        Alpn::Weft => "weft/1",
        Alpn::WeftH2 => "weft-h2/1",
        Alpn::Hbone => "h2",
    }
}

fn tunnel_error(error: FlowError) -> TunnelError {
    match error {
        FlowError::ConnectTimeout { to } => TunnelError::ConnectTimeout { to },
        FlowError::Connect { to, source } => TunnelError::Connect { to, source },
        other => TunnelError::Socket(other.to_string()),
    }
}

/// Counts the flow as open, if it is not yet.
pub(super) fn count(context: &Context, pod: &LocalPod, record: &mut Record) {
    if !record.moved.is_metered() {
        let meter = context.telemetry.flow(labels(pod, record));
        record.moved = Moved::metered(vec![meter], &pod.usage);
    }
}

/// Copies until both sides closed. What it yields is as large as this way of copying needs it.
fn carry<'a>(
    context: &Context,
    pod: &'a LocalPod,
    client: FlowSocket,
    connected: Connected,
    record: &'a mut Record,
) -> BoxFuture<'a, Result<(), FlowError>> {
    count(context, pod, record);
    match connected {
        Connected::Socket(server) => {
            let moved = &record.moved;
            Box::pin(async move {
                let copying = pin!(join_sockets(client, server, moved));
                Ok(unless(pin!(drained(pod)), copying).await??)
            })
        }
        Connected::SameNode(admitted, tracked) => {
            let (server, inbound_meter, verdict, admission) = admitted.part();
            record.verdict = Some(verdict);
            record.moved.meter_too(inbound_meter);
            let moved = &record.moved;
            Box::pin(async move {
                let _tracked = tracked;
                let copying = pin!(join_sockets(client, server, moved));
                let end = pin!(async {
                    tokio::select! {
                        biased;
                        error = drained(pod) => error,
                        error = admission.ended() => error,
                    }
                });
                Ok(unless(end, copying).await??)
            })
        }
        Connected::Channel(asked) => Box::pin(asked.carry(client, pod, &record.moved)),
        Connected::Tunnel(opened) => {
            let Opened { halves, slot, .. } = *opened;
            let moved = &record.moved;
            Box::pin(async move {
                let _slot = slot;
                let copying = pin!(join_tunnel(client, Side::Client, halves, moved));
                Ok(unless(pin!(drained(pod)), copying).await??)
            })
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
                Some(Target::Invalid(_)) | None => Err(nowhere()),
            }
        }
    }
}

/// Ends when the pod's flows must. It is looked at before the copying, which fails at the same moment
/// if it goes through a tunnel.
pub(super) async fn drained(pod: &LocalPod) -> FlowError {
    pod.end_flows.cancelled().await;
    FlowError::Drained
}

pub(super) fn labels(pod: &LocalPod, record: &Record) -> FlowLabels {
    FlowLabels {
        direction: Direction::Outbound,
        pod: pod.labels.clone(),
        destination: record.destination.clone(),
        service: record.service.clone(),
        tls: match record.path {
            PathLabel::Tunnel => TlsLabel::Mutual,
            PathLabel::SameNode => TlsLabel::SameNode,
            PathLabel::Itself => TlsLabel::Loopback,
            PathLabel::Plaintext | PathLabel::Unknown => TlsLabel::None,
        },
        client: None,
        server: record.destination_identity.clone(),
        verdict: None,
    }
}

pub(super) fn remember_refused(context: &Context, pod: &LocalPod, original: SocketAddr) {
    let remembered = context
        .bpf
        .remember_refused(pod.cookie, original, REFUSED_FOR);
    if let Err(error) = remembered {
        tracing::warn!(pod = %pod.id, %error, "remembering a refused destination");
    }
}

/// How long connects to a destination where nothing listened are refused at once.
const REFUSED_FOR: Duration = Duration::from_secs(3);
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// For a tunnel, if one must be made, and for the other agent's connect to the application.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(8);

/// A flow that waits is what a node has most of. These sizes are a part of the memory that it takes, in
/// a test so that they grow on purpose only.
#[cfg(test)]
mod tests {
    use super::*;

    fn yielded<A, B, C, F>(_: impl FnOnce(A, B, C) -> F) -> usize {
        size_of::<F>()
    }

    fn yielded_by<A, B, C, D, F>(_: impl FnOnce(A, B, C, D) -> F) -> usize {
        size_of::<F>()
    }

    #[test]
    fn flows_are_small() {
        let sockets = |client, server, moved: &'static Moved| join_sockets(client, server, moved);
        let tunnel =
            |client, side, halves, moved: &'static Moved| join_tunnel(client, side, halves, moved);
        let channel =
            |asked: weft1::Asked, client, pod_and_moved: (&'static LocalPod, &'static Moved)| {
                asked.carry(client, pod_and_moved.0, pod_and_moved.1)
            };
        let sizes = [
            ("a flow", yielded(flow), 1152),
            ("copying between sockets", yielded(sockets), 448),
            ("copying into a stream", yielded_by(tunnel), 1400),
            ("copying into a channel", yielded(channel), 1400),
        ];
        for (what, size, most) in sizes {
            println!("{what}: {size} bytes");
            assert!(size <= most, "{what}: {size} bytes, not {most}");
        }
    }
}
