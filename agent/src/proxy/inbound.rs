//! The half of a flow that belongs to its server: policy, then a connection to the application in
//! its own namespace, which sees the real client.
//!
//! Flows arrive through tunnels, in plaintext, or from the outbound half on the same node; all pass
//! [`admit`]. Nothing else in the agent connects to an application on behalf of somebody else.

pub(super) mod here;
mod http2;
mod peer;
mod plaintext;
mod weft1;

use std::future::Future;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use rustls_pki_types::{CertificateDer, UnixTime};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use weft_core::{Client, Identity, PortProtocol, TUNNEL_PORT, Verdict};

use self::peer::Peer;
use super::ends::unless;
use super::error::{FlowError, TunnelError};
use super::http;
use super::http::first::{self, Begun, Look};
use super::live::LiveEntry;
use super::record::Record;
use super::tcp::{Broken, FlowSocket, Moved, Side};
use super::tunnel::claim::OpaqueBy;
use super::tunnel::server::Ends;
use super::tunnel::weft1::channel::Channel;
use super::tunnel::weft1::handshake;
use super::tunnel::{Watch, server};
use super::usage::{PeerPlace, Shares, Usage};
use super::{Context, descriptors, excess, seldom, socket};
use crate::config::TunnelProtocol;
use crate::identity::{Alpn, peer_identity, valid_until};
use crate::node::LocalPod;
use crate::telemetry::{AuthzLabels, Direction, FlowHandle, FlowLabels, Refusal, TlsLabel};

/// Stage one: a flow that wants to reach an application of a pod of this node.
#[derive(Debug)]
pub struct Arrival<'a> {
    /// The client, as the application shall see it.
    pub client: SocketAddr,
    /// Who that is, if proven by a certificate or, on this node, by the kernel.
    pub identity: Option<&'a Identity>,
    /// Where to.
    pub to: SocketAddr,
    /// How the client's side is secured.
    pub tls: TlsLabel,
    /// By which Service's declaration its agent has not looked into it, as that says.
    pub opaque_by: Option<OpaqueBy>,
}

/// Last stage before copying: allowed by policy, connected to the application.
#[derive(Debug)]
pub struct Admitted {
    /// The application.
    pub server: FlowSocket,
    /// What policy said.
    pub verdict: Verdict,
    /// The flow in the pod's metrics.
    pub meter: FlowHandle,
    /// What is declared of the port, as far as it holds for this flow.
    pub declared: PortProtocol,
    live: LiveEntry,
    labels: Box<AuthzLabels>,
    pod: Arc<LocalPod>,
}

/// Decides, and connects to the application if the client may.
///
/// # Errors
/// Denied, or the application cannot be reached.
pub async fn admit(
    context: &Context,
    pod: &Arc<LocalPod>,
    arrival: Arrival<'_>,
) -> Result<Admitted, FlowError> {
    let Arrival {
        client: from,
        identity,
        to,
        tls,
        opaque_by,
    } = arrival;
    may_arrive(pod, to)?;
    let client = Client {
        address: from.ip(),
        identity,
    };
    let most = context.config.limits.flows_per_pod;
    let live = context.live.enter(&pod.id, to.port(), client, most);
    let live = live.ok_or(FlowError::TooManyFlows)?;
    let verdict = decide(context, pod, to, client);
    let labels = AuthzLabels::new(
        pod.labels.clone(),
        to.port(),
        tls,
        identity.cloned(),
        &verdict,
    );
    if verdict.requests_only() {
        live.requests_only();
    }
    context.telemetry.authz(labels.clone(), &verdict);
    if !verdict.admits_requests() {
        return Err(FlowError::Denied(verdict));
    }
    if verdict.is_audited() {
        tracing::info!(
            target: "audit",
            pod = %pod.id, port = to.port(), client = %from,
            client_id = identity.map(tracing::field::display),
            "allowed by audit: no authorization covers the client"
        );
    }
    let server = socket::deliver(context, pod, to, from).await?;
    let declared = context.declared_here(pod, to, opaque_by.as_ref());
    if http::takes_nothing_else(declared) {
        live.is_http();
    }
    let meter = context.telemetry.flow(FlowLabels {
        direction: Direction::Inbound,
        pod: pod.labels.clone(),
        destination: None,
        service: None,
        tls,
        client: identity.cloned(),
        server: Some(pod.identity.clone()),
        verdict: Some(verdict.clone()),
    });
    Ok(Admitted {
        server,
        verdict,
        meter,
        declared,
        live,
        labels: Box::new(labels),
        pod: Arc::clone(pod),
    })
}

/// Whether anything may arrive there.
///
/// # Errors
/// It is no address of the pod, or not for clients, or the pod is gone.
pub(super) fn may_arrive(pod: &LocalPod, to: SocketAddr) -> Result<(), FlowError> {
    if !pod.has_address(to.ip()) {
        return Err(FlowError::RedirectMiss);
    }
    if to.port() == TUNNEL_PORT {
        return Err(FlowError::ReservedPort(to.port()));
    }
    if pod.left.is_cancelled() {
        return Err(FlowError::PodGone);
    }
    Ok(())
}

/// What policy says of a client at a port.
pub(super) fn decide(
    context: &Context,
    pod: &LocalPod,
    to: SocketAddr,
    client: Client<'_>,
) -> Verdict {
    let verdict = context.store.authorize(&pod.id, to.port(), client);
    // Where nobody looks for requests there are none.
    match http::may_be(context.store.inbound_protocol(&pod.id, to.port())) {
        true => verdict,
        false => verdict.without_requests(),
    }
}

/// What keeps watch over an admitted flow while it is being copied.
#[derive(Debug)]
pub struct Admission {
    live: LiveEntry,
    /// What is counted if it is no request; none: it may be anything.
    requests_only: Option<(Box<AuthzLabels>, Verdict)>,
    pod: Arc<LocalPod>,
}

impl Admitted {
    /// The server's pod.
    pub(super) fn pod(&self) -> &Arc<LocalPod> {
        &self.pod
    }

    /// Parts the application's socket and the metrics from what watches over the flow.
    pub fn part(self) -> (FlowSocket, FlowHandle, Verdict, Admission) {
        let Self {
            server,
            verdict,
            meter,
            live,
            labels,
            pod,
            declared: _,
        } = self;
        let is_refused = verdict.requests_only();
        let requests_only = is_refused.then(|| (labels, verdict.clone().without_requests()));
        let admission = Admission {
            live,
            requests_only,
            pod,
        };
        (server, meter, verdict, admission)
    }
}

impl Admission {
    /// What the server's pod uses.
    pub fn usage(&self) -> &Arc<Usage> {
        &self.pod.usage
    }

    /// Nothing but HTTP passes from now on.
    pub(super) fn is_http(&self) {
        self.live.is_http();
    }

    /// Whether policy allows requests and nothing else.
    pub(super) fn is_requests_only(&self) -> bool {
        self.requests_only.is_some()
    }

    /// Whether the flow is HTTP: see [`Look::at`].
    ///
    /// # Errors
    /// One of the two connections failed, or the flow is not what it must be: that is policy's word, where that
    /// lets requests in alone.
    async fn look(
        &self,
        context: &Context,
        look: Look<'_>,
        (client, server): (first::Client<'_>, &mut FlowSocket),
        noted: (&Moved, &mut Option<Box<str>>),
    ) -> Result<Option<Begun>, FlowError> {
        let looked = look.at(client, server, noted).await;
        if let Ok(Some(_)) = looked {
            self.is_http();
        }
        looked.map_err(|error| match error {
            FlowError::NotHttp => self.may_be_bytes(context).err().unwrap_or(error),
            error => error,
        })
    }

    /// Whether the flow may be something else than requests, now that it is known to be.
    ///
    /// # Errors
    /// Policy denies it, which is counted.
    pub fn may_be_bytes(&self, context: &Context) -> Result<(), FlowError> {
        let Some((labels, verdict)) = &self.requests_only else {
            return Ok(());
        };
        context.telemetry.authz(labels.with(verdict), verdict);
        Err(FlowError::Denied(verdict.clone()))
    }

    /// Copies as long as policy allows it and the pod is there.
    ///
    /// # Errors
    /// How the copying ended, or why it had to.
    pub async fn watch(
        &self,
        copying: Pin<&mut impl Future<Output = Result<(), Broken>>>,
    ) -> Result<(), FlowError> {
        // Looked at before the copying, which fails at the same moment if it goes through a tunnel.
        Ok(unless(pin!(self.ended()), copying).await??)
    }

    /// Ends when policy no longer allows the flow, or the pod leaves.
    pub async fn ended(&self) -> FlowError {
        tokio::select! {
            biased;
            () = self.pod.end_flows.cancelled() => FlowError::Drained,
            revoked = self.live.revoked() => revoked,
        }
    }
}

/// Serves what arrives at the pod outside of tunnels, until the pod's listeners close.
pub async fn serve_plaintext(context: Arc<Context>, pod: Arc<LocalPod>, listener: TcpListener) {
    // Half of what the pod may have: strangers cannot take the places of those who have proven who
    // they are.
    let room = Arc::new(Semaphore::new(
        context.config.limits.flows_per_pod.div_ceil(2),
    ));
    accept_each(&context, &pod, listener, |stream, from| {
        let Ok(place) = Arc::clone(&room).try_acquire_owned() else {
            excess::turn_away(&context, &pod, stream, Direction::Inbound);
            return;
        };
        let parts = (Arc::clone(&context), Arc::clone(&pod));
        // Made inside: what is taken into a block and awaited there has its room twice.
        pod.spawn_flow(async move {
            plaintext::flow(parts.0, parts.1, stream, from).await;
            drop(place);
        });
    })
    .await;
}

/// Serves the tunnels that arrive at the pod, until its listeners close.
pub async fn serve_tunnel(context: Arc<Context>, pod: Arc<LocalPod>, listener: TcpListener) {
    // Who has no meshed workload's address gets a share of its own: strangers who never finish a handshake
    // keep nobody else from one.
    let of_workloads = Arc::new(Semaphore::new(context.config.limits.handshakes_per_pod));
    let of_strangers = context.config.limits.handshakes_per_pod.div_ceil(4);
    let of_strangers = Arc::new(Semaphore::new(of_strangers));
    // No pod needs more tunnels than flows. Flows are counted one by one where they are admitted,
    // so that a peer is told, and not cut off, when they are too many.
    let tunnels = Arc::new(Semaphore::new(context.config.limits.flows_per_pod));
    // Nor has one peer use for as many: who holds a key and opens tunnels without end leaves room for
    // others.
    let shares = Arc::new(Shares::default());
    accept_each(&context, &pod, listener, |stream, from| {
        let Ok(open) = Arc::clone(&tunnels).try_acquire_owned() else {
            refuse(&context, &pod, stream, &FlowError::TooManyFlows);
            return;
        };
        let Some(share) = shares.enter(from.ip(), MOST_TUNNELS_PER_PEER) else {
            refuse(&context, &pod, stream, &FlowError::TooManyFlows);
            return;
        };
        let workload = context.store.workload_at(from.ip());
        let is_workload = workload.is_some_and(|it| it.identity().is_some());
        let handshakes = if is_workload {
            &of_workloads
        } else {
            &of_strangers
        };
        let permit = Arc::clone(handshakes).try_acquire_owned().ok();
        let place = permit.zip(context.handshakes.enter(from.ip(), is_workload));
        let Some(place) = place else {
            refuse(&context, &pod, stream, &FlowError::TooManyHandshakes);
            return;
        };
        let parts = (Arc::clone(&context), Arc::clone(&pod));
        pod.spawn_flow(async move {
            tunnel(parts.0, parts.1, (stream, from), place).await;
            drop((open, share));
        });
    })
    .await;
}

/// Accepts until the pod's listeners are to be closed; then takes what is already in the queue.
pub(super) async fn accept_each(
    context: &Context,
    pod: &LocalPod,
    listener: TcpListener,
    mut serve: impl FnMut(TcpStream, SocketAddr),
) {
    let mut admit = |accepted: std::io::Result<(TcpStream, SocketAddr)>| match accepted {
        Ok((stream, _))
            if descriptors::none_left_for_flows(&stream, pod.flows.len(), context.pods.count()) =>
        {
            refuse(context, pod, stream, &FlowError::NoDescriptors);
            true
        }
        Ok((stream, from)) => {
            serve(stream, socket::canonical(from));
            true
        }
        Err(error) => {
            context.telemetry.refusal(&pod.id, Refusal::NoDescriptors);
            tracing::debug!(pod = %pod.id, %error, "accepting a connection");
            false
        }
    };
    let mut turn = 0;
    loop {
        let accepted = tokio::select! {
            biased;
            () = pod.stop_accepting.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        if !admit(accepted) {
            // Most likely out of descriptors: flows must end before there is room again.
            tokio::time::sleep(ACCEPT_PAUSE).await;
        }
        // Each is a task to be run before others have their turn again.
        turn = (turn + 1) % ACCEPTS_PER_TURN;
        if turn == 0 {
            tokio::task::yield_now().await;
        }
    }
    // Straight from the kernel: the runtime may not have heard yet of what is in the queue.
    let Ok(listener) = listener.into_std() else {
        return;
    };
    loop {
        let accepted = listener.accept().and_then(|(stream, peer)| {
            stream.set_nonblocking(true)?;
            Ok((TcpStream::from_std(stream)?, peer))
        });
        match accepted {
            Err(error) if error.kind() == ErrorKind::WouldBlock => return,
            // That client gave up.
            Err(error) if error.kind() == ErrorKind::ConnectionAborted => {}
            accepted => {
                if !admit(accepted) {
                    return;
                }
            }
        }
    }
}

/// Resets a connection before anything is known of it, and counts why.
pub(super) fn refuse(context: &Context, pod: &LocalPod, stream: TcpStream, error: &FlowError) {
    socket::refuse(stream);
    if let Some(refusal) = error.refusal() {
        context.telemetry.refusal(&pod.id, refusal);
    }
    tracing::debug!(pod = %pod.id, %error, "connection refused");
}

/// Serves an admitted flow's exchanges, as long as policy allows it and the pod is there.
async fn serve_http(
    flow: http::inbound::Admitted,
    (stream, version): (http::Stream, http::Version),
    server: FlowSocket,
    admission: &Admission,
    record: &mut Record,
) -> Result<(), FlowError> {
    record.has_exchanges = true;
    let moved = Arc::new(std::mem::take(&mut record.moved));
    let stream = stream.metered(Arc::clone(&moved), Side::Client);
    let ended = {
        let mut serving = Box::pin(flow.serve(stream, version, server));
        unless(pin!(admission.ended()), serving.as_mut()).await
    };
    record.moved = Arc::into_inner(moved).unwrap_or_default();
    ended?
}

/// Authenticates a tunnel's peer, and serves its flows until it leaves.
async fn tunnel(
    context: Arc<Context>,
    pod: Arc<LocalPod>,
    stream: (TcpStream, SocketAddr),
    place: (OwnedSemaphorePermit, PeerPlace),
) {
    let changed = context.identities.changed();
    let accepted = tokio::select! {
        accepted = Box::pin(accept_tunnel_in_time(&context, &pod, stream)) => accepted,
        () = pod.end_flows.cancelled() => return,
    };
    drop(place);
    let (io, peer) = match accepted {
        Ok(AcceptedTunnel::Http(io, peer)) => (io, peer),
        Ok(AcceptedTunnel::Weft(channel, peer)) => {
            let watch = watch_over(&context, &pod, Some(channel.chain()), changed);
            return Box::pin(weft1::serve(context, pod, peer, channel, watch)).await;
        }
        Err(error) => {
            if let Some(refusal) = error.refusal() {
                context.telemetry.refusal(&pod.id, refusal);
            }
            seldom::tell!(pod = %pod.id, %error, "a tunnel was refused");
            return;
        }
    };
    let chain = io.get_ref().1.peer_certificates();
    let watch = watch_over(&context, &pod, chain, changed);
    let ends = Ends {
        stopping: &pod.stop_accepting,
        deadline: &pod.end_flows,
    };
    let served = server::serve(io, watch, ends, |request, respond| {
        let (head, receive) = request.into_parts();
        let flow = http2::tunnel_flow(
            Arc::clone(&context),
            Arc::clone(&pod),
            Arc::clone(&peer),
            (Box::new(head), receive),
            respond,
        );
        pod.spawn_flow(flow);
    });
    if let Err(error) = Box::pin(served).await {
        tracing::debug!(pod = %pod.id, peer = %peer.identity, %error, "a tunnel failed");
    }
}

/// What may end a tunnel to or from the pod. `changed` was subscribed to before the handshake, so
/// that no change of roots in its middle is missed.
pub(super) fn watch_over(
    context: &Context,
    pod: &LocalPod,
    peer: Option<&[CertificateDer<'static>]>,
    changed: watch::Receiver<u64>,
) -> Watch {
    let identities = Arc::clone(&context.identities);
    let chain: Vec<_> = peer.unwrap_or_default().to_vec();
    let at = UnixTime::now();
    // Own certificates are renewed long before they end: where that is read after the handshake and not
    // before, it is the same one or a later one, of which the pools are told.
    let own = identities.valid_until(&pod.identity);
    Watch {
        valid_until: own.min(valid_until(&chain)),
        pod_gone: pod.end_flows.clone(),
        changed,
        trusted: Box::new(move || identities.vouches(&chain, at)),
    }
}

/// A tunnel whose peer has been authenticated.
enum AcceptedTunnel {
    Http(Box<TlsStream<TcpStream>>, Arc<Peer>),
    Weft(Box<Channel>, Arc<Peer>),
}

/// One deadline for all: the hello, the certificate, and the handshake.
async fn accept_tunnel_in_time(
    context: &Context,
    pod: &LocalPod,
    stream: (TcpStream, SocketAddr),
) -> Result<AcceptedTunnel, FlowError> {
    let accepting = accept_tunnel(context, pod, stream);
    let accepted = tokio::time::timeout(HANDSHAKE_TIMEOUT, accepting).await;
    accepted.map_err(|_| FlowError::Tunnel(Arc::new(TunnelError::HandshakeTimeout)))?
}

async fn accept_tunnel(
    context: &Context,
    pod: &LocalPod,
    (stream, from): (TcpStream, SocketAddr),
) -> Result<AcceptedTunnel, FlowError> {
    let local = socket::local_address(&stream)?;
    if local.port() != TUNNEL_PORT || !pod.has_address(local.ip()) {
        socket::refuse(stream);
        return Err(FlowError::RedirectMiss);
    }
    let failed = |error| FlowError::Tunnel(Arc::new(error));
    // Where it is not asked for it is not accepted either, so that it can be turned off.
    if matches!(context.config.tunnel, TunnelProtocol::Weft) {
        let offers = handshake::offers(&stream, Alpn::Weft.as_bytes()).await;
        let offers = offers.map_err(|error| failed(TunnelError::Handshake(error)))?;
        if offers {
            let (channel, peer) = Box::pin(accept_weft(context, pod, stream, from, local)).await?;
            return Ok(AcceptedTunnel::Weft(channel, peer));
        }
    }
    let config = context
        .identities
        .server_when_ready(&pod.identity)
        .await
        .map_err(|error| failed(TunnelError::NoCertificate(error.to_string())))?;
    let handshake = TlsAcceptor::from(config).accept(stream);
    let io = pod.usage.handshake_in_turn(handshake).await;
    let io = io.map_err(|error| failed(TunnelError::Handshake(error)))?;
    let session = io.get_ref().1;
    let identity = peer_identity(session.peer_certificates().unwrap_or_default())
        .map_err(|error| failed(TunnelError::PeerCertificate(error.to_string())))?;
    let ours = match session.alpn_protocol() {
        Some(alpn) if alpn == Alpn::WeftH2.as_bytes() => true,
        Some(alpn) if alpn == Alpn::Hbone.as_bytes() => false,
        _ => return Err(failed(TunnelError::Protocol("weft-h2/1 or h2"))),
    };
    let peer = Arc::new(Peer {
        address: from.ip(),
        identity,
        connected: local.ip(),
        ours,
    });
    Ok(AcceptedTunnel::Http(Box::new(io), peer))
}

async fn accept_weft(
    context: &Context,
    pod: &LocalPod,
    mut stream: TcpStream,
    from: SocketAddr,
    local: SocketAddr,
) -> Result<(Box<Channel>, Arc<Peer>), FlowError> {
    let failed = |error| FlowError::Tunnel(Arc::new(error));
    let config = context
        .identities
        .weft_server_when_ready(&pod.identity)
        .await
        .map_err(|error| failed(TunnelError::NoCertificate(error.to_string())))?;
    let shaking = handshake::accept(config, &mut stream);
    let greeted = pod.usage.handshake_in_turn(shaking).await;
    let greeted = greeted.map_err(|error| failed(TunnelError::Handshake(error)))?;
    let identity = peer_identity(&greeted.chain)
        .map_err(|error| failed(TunnelError::PeerCertificate(error.to_string())))?;
    if greeted.alpn.as_deref() != Some(Alpn::Weft.as_bytes()) {
        return Err(failed(TunnelError::Protocol("weft/1")));
    }
    let channel = Channel::new(stream, greeted, true).map_err(|source| FlowError::Kernel {
        doing: "preparing a connection",
        source,
    })?;
    let peer = Peer {
        address: from.ip(),
        identity,
        connected: local.ip(),
        ours: true,
    };
    Ok((Box::new(channel), Arc::new(peer)))
}

/// Tunnels of one peer to one pod. An agent has up to 256 connections of a pair for one flow each, some for many,
/// and twice that while it is being replaced.
const MOST_TUNNELS_PER_PEER: usize = 1024;
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Connections that a pod's listener takes before others have their turn.
const ACCEPTS_PER_TURN: usize = 8;
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
