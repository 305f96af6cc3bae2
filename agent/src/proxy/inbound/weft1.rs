//! Flows that arrive by `weft/1`.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::peer::{Peer, tunnel_arrival, tunnel_record};
use super::{Admitted, admit};
use crate::node::LocalPod;
use crate::proxy::ends::unless;
use crate::proxy::error::{FlowError, TunnelError};
use crate::proxy::http;
use crate::proxy::http::first::Client;
use crate::proxy::record::Record;
use crate::proxy::tcp::{Broken, FlowSocket, Moved, Side, failed};
use crate::proxy::tunnel::Watch;
use crate::proxy::tunnel::weft1::channel::Channel;
use crate::proxy::tunnel::weft1::frame::{Open, Refuse};
use crate::proxy::tunnel::weft1::stream::{ChannelIo, Parted};
use crate::proxy::tunnel::weft1::{copy, server};
use crate::proxy::{Context, seldom, tap};
use crate::telemetry::{Direction, Refusal, TlsLabel};

/// Serves one flow after the other, until the client leaves or the connection has to end.
pub(super) async fn serve(
    context: Arc<Context>,
    pod: Arc<LocalPod>,
    peer: Arc<Peer>,
    mut channel: Box<Channel>,
    mut watch: Watch,
) {
    let mut last_used = Instant::now();
    // Who has had no flow accepted does not keep its place for the next one.
    let mut patience = IDLE_BEFORE_FIRST;
    let mut idle_check = interval(IDLE_BEFORE_FIRST);
    idle_check.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let asked = tokio::select! {
            biased;
            asked = server::next(&mut channel) => asked,
            () = pod.stop_accepting.cancelled() => return server::leave(channel).await,
            () = watch.untrusted() => {
                tracing::info!(peer = %peer.identity, "a tunnel's peer is no longer vouched for");
                return;
            }
            () = pod.end_flows.cancelled() => return,
            _ = idle_check.tick() => {
                if last_used.elapsed() > patience || watch.is_expired() {
                    return server::leave(channel).await;
                }
                continue;
            }
        };
        let open = match asked {
            Ok(Some(open)) => open,
            Ok(None) => return,
            Err(error) => {
                context.telemetry.refusal(&pod.id, Refusal::BadRequest);
                seldom::tell!(pod = %pod.id, peer = %peer.identity, %error, "a tunnel failed");
                return;
            }
        };
        let flow = flow(&context, &pod, &peer, open, channel, &mut watch);
        let Some((back, accepted)) = Box::pin(flow).await else {
            return;
        };
        channel = back;
        if accepted {
            last_used = Instant::now();
            if patience != IDLE {
                patience = IDLE;
                idle_check = interval(IDLE_CHECK);
                idle_check.set_missed_tick_behavior(MissedTickBehavior::Delay);
            }
        }
    }
}

/// Serves a flow. Yields the connection if it can take another one, and whether this one was accepted.
async fn flow(
    context: &Arc<Context>,
    pod: &Arc<LocalPod>,
    peer: &Peer,
    open: Open,
    mut channel: Box<Channel>,
    watch: &mut Watch,
) -> Option<(Box<Channel>, bool)> {
    let mut record = tunnel_record(context, pod, peer);
    // Boxed: nothing of it is needed while bytes are copied.
    let entering = Box::pin(enter(context, pod, peer, open, &mut record));
    let admitted = tokio::select! {
        biased;
        () = std::future::ready(()), if watch.is_long_expired() => {
            let expired = "a certificate of the tunnel has expired".to_owned();
            Err(FlowError::Tunnel(Arc::new(TunnelError::NoCertificate(expired))))
        }
        admitted = entering => admitted,
        () = failed(channel.socket()) => Err(Broken::Reset(Side::Client).into()),
        () = watch.untrusted() => Err(Broken::Reset(Side::Client).into()),
        () = pod.end_flows.cancelled() => Err(FlowError::Drained),
    };
    let accepted = admitted.is_ok();
    let (result, channel) = match admitted {
        Ok(admitted) => {
            let parts = (context, pod, peer);
            Box::pin(carry(parts, admitted, channel, watch, &mut record)).await
        }
        // There is nobody left to be told.
        Err(error @ (FlowError::Broken(_) | FlowError::Drained)) => (Err(error), None),
        Err(error) => {
            let refuse = Refuse {
                status: error.status().as_u16(),
                reason: error.refusal().map_or("", Refusal::as_str).to_owned(),
            };
            let refused = server::refuse(&mut channel, &refuse).await;
            if let Err(error) = &refused
                && !error.is_gone()
            {
                context.telemetry.refusal(&pod.id, Refusal::BadRequest);
                seldom::tell!(pod = %pod.id, peer = %peer.identity, %error, "a tunnel failed");
            }
            (Err(error), refused.is_ok().then_some(channel))
        }
    };
    if let Err(FlowError::Broken(Broken::Weft(error))) = &result {
        context.telemetry.refusal(&pod.id, Refusal::BadRequest);
        seldom::tell!(pod = %pod.id, peer = %peer.identity, %error, "a tunnel failed");
    }
    record.finish(&context.telemetry, &context.store, &result);
    channel.map(|it| (it, accepted))
}

async fn enter(
    context: &Context,
    pod: &Arc<LocalPod>,
    peer: &Peer,
    open: Open,
    record: &mut Record,
) -> Result<Admitted, FlowError> {
    let asked = (open.port, open.source_port, open.opaque_by);
    let arrival = tunnel_arrival(peer, asked, record);
    admit(context, pod, arrival).await
}

async fn carry(
    (context, pod, peer): (&Arc<Context>, &Arc<LocalPod>, &Peer),
    admitted: Admitted,
    mut channel: Box<Channel>,
    watch: &mut Watch,
    record: &mut Record,
) -> (Result<(), FlowError>, Option<Box<Channel>>) {
    let declared = admitted.declared;
    let (mut server, meter, verdict, admission) = admitted.part();
    record.verdict = Some(verdict);
    record.moved = Moved::metered(vec![meter], admission.usage());
    if let Err(error) = server::accept(&mut channel) {
        return (Err(Broken::Weft(error).into()), None);
    }
    let end = pin!(async {
        tokio::select! {
            biased;
            error = admission.ended() => error,
            () = watch.untrusted() => Broken::Reset(Side::Client).into(),
        }
    });
    let to = record.original;
    let looks = to.filter(|_| http::may_be(declared));
    let (Some(to), Some(client)) = (looks, record.client) else {
        if let Err(denied) = admission.may_be_bytes(context) {
            return (Err(denied), None);
        }
        tap::opened(context, pod, Direction::Inbound, record);
        let copying = pin!(copy::join(server, Side::Server, channel, &record.moved, 0));
        return match unless(end, copying).await {
            Ok(Ok(channel)) => (Ok(()), Some(channel)),
            Ok(Err(broken)) => (Err(broken.into()), None),
            Err(ended) => (Err(ended), None),
        };
    };
    let verdict = record.verdict.clone();
    let moved = Arc::new(std::mem::take(&mut record.moved));
    let result = {
        let mut carrying = Box::pin(async {
            let mut io = ChannelIo::new(channel);
            let look = context.look(declared, &admission);
            let ends = (Client::Channel(&mut io), &mut server);
            let noted = (&*moved, &mut record.server_name);
            let looking = Box::pin(admission.look(context, look, ends, noted));
            if let Some((version, first)) = looking.await? {
                let flow = http::inbound::Admitted {
                    context: Arc::clone(context),
                    pod: Arc::clone(pod),
                    client,
                    identity: Some(peer.identity.clone()),
                    to,
                    tls: TlsLabel::Mutual,
                    verdict: verdict.clone(),
                    declared,
                };
                let returned = http::Returned::default();
                let stream = http::Stream::channel(io, returned.clone()).begun(first);
                let stream = stream.metered(Arc::clone(&moved), Side::Client);
                flow.serve(stream, version, server).await?;
                return match returned.fault() {
                    Some(fault) => Err(Broken::Weft(fault).into()),
                    None => Ok(returned.ended().await),
                };
            }
            admission.may_be_bytes(context)?;
            tap::opened(context, pod, Direction::Inbound, record);
            match io.part() {
                Parted::Open(channel) => {
                    let joined = copy::join(server, Side::Server, channel, &moved, 0).await?;
                    Ok(Some(joined))
                }
                Parted::HalfClosed(io) => Ok(last_words(io, server, &moved).await?),
            }
        });
        unless(end, carrying.as_mut()).await
    };
    record.moved = Arc::into_inner(moved).unwrap_or_default();
    match result {
        Ok(Ok(channel)) => (Ok(()), channel),
        Ok(Err(error)) => (Err(error), None),
        Err(ended) => (Err(ended), None),
    }
}

/// A client that has said all it had to say before it was known what it speaks: what is left is the answer.
async fn last_words(
    mut io: ChannelIo,
    server: FlowSocket,
    moved: &Moved,
) -> Result<Option<Box<Channel>>, Broken> {
    let server_failed = |error| Broken::socket(Side::Server, error);
    let client_failed = |error| Broken::socket(Side::Client, error);
    server.end().map_err(server_failed)?;
    let channel = io.socket();
    let mut has_left = pin!(async {
        match &channel {
            Some(socket) => failed(socket).await,
            None => std::future::pending().await,
        }
    });
    let mut bytes = vec![0; 16 * 1024];
    loop {
        let count = loop {
            tokio::select! {
                readable = server.socket().readable() => readable.map_err(server_failed)?,
                () = &mut has_left => return Err(Broken::Reset(Side::Client)),
            }
            match server.socket().try_read(&mut bytes) {
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                other => break other.map_err(server_failed)?,
            }
        };
        if count == 0 {
            break;
        }
        moved.way(Side::Server).add(count);
        io.write_all(&bytes[..count]).await.map_err(client_failed)?;
        io.flush().await.map_err(client_failed)?;
    }
    io.shutdown().await.map_err(client_failed)?;
    server.close();
    Ok(io.into_channel())
}

/// The client owns idle closing; this is for clients that do not.
const IDLE: Duration = Duration::from_secs(600);
const IDLE_CHECK: Duration = Duration::from_secs(60);
/// The same until a first flow has been accepted.
const IDLE_BEFORE_FIRST: Duration = Duration::from_secs(10);
