//! Flows through tunnels: asked for on one that is there, or on one that is made.

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ::http::StatusCode;
use rustls::ClientConfig;
use rustls_pki_types::{CertificateDer, ServerName};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use weft_core::{Identity, TUNNEL_PORT};

use super::{Caller, Connected, weft1};
use crate::identity::{Alpn, peer_identity};
use crate::node::LocalPod;
use crate::proxy::error::{FlowError, TunnelError};
use crate::proxy::tcp::prepare;
use crate::proxy::tunnel::client::{Dialed, Key};
use crate::proxy::tunnel::wire;
use crate::proxy::usage::Dial;
use crate::proxy::{Context, inbound, socket};

/// Asks the endpoint's agent for the flow, on a tunnel that is there or is made.
pub(super) async fn open_tunnel(
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
    let is_ours = matches!(alpn, Alpn::WeftH2);
    let source_port = is_ours.then_some(from.address.port());
    let opaque_by = from.opaque_by().filter(|_| is_ours);
    let request = wire::write_request(to, source_port, opaque_by.as_ref());
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
    let handshake = pod.usage.handshake_in_turn(handshake);
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
    Ok(Dialed { io, watch })
}

/// Connects to the agent's port when it is the pod's turn, which lasts until the handshake is over. Where the destination has only
/// just become meshed, it is tried again for a moment: there is no other way to it, and its agent has heard of it no sooner.
/// Nothing is known of who answers.
pub(super) async fn reach_agent(
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
    let to = SocketAddr::new(address, TUNNEL_PORT);
    let since = Instant::now();
    let mut pause = FIRST_PAUSE;
    let mut refused = None;
    let (stream, turn) = loop {
        let Some(turn) = pod.usage.dial(address).await else {
            return Err(refused.unwrap_or(TunnelError::TooMany));
        };
        let error = match socket::connect(context, pod, to).await {
            Ok(stream) => break (stream, turn),
            Err(error) => error,
        };
        let is_refused = matches!(&error, FlowError::Connect { source, .. }
            if source.kind() == ErrorKind::ConnectionRefused);
        let may_come =
            is_refused && since.elapsed() + pause < PATIENCE && context.store.is_newcomer(address);
        let error = tunnel_error(error);
        if !may_come {
            return Err(error);
        }
        refused = Some(error);
        // Others have their turn meanwhile.
        drop(turn);
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    };
    prepare(&stream).map_err(|source| TunnelError::Connect { to, source })?;
    Ok((config, stream, turn))
}

/// Whether a chain that TLS has verified is that of whom it must be.
pub(super) fn check_identity(
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

pub(super) fn alpn_name(alpn: Alpn) -> &'static str {
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

/// For the agent of a newcomer, of what a flow has for its tunnel.
const PATIENCE: Duration = Duration::from_secs(2);
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_millis(200);
pub(super) const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// For a tunnel, if one must be made, and for the other agent's connect to the application.
pub(super) const ANSWER_TIMEOUT: Duration = Duration::from_secs(8);
