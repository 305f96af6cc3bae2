//! Flows that leave by `weft/1`.

use std::future::poll_fn;
use std::net::{IpAddr, SocketAddr};
use std::pin::pin;
use std::sync::Arc;
use std::task::{Poll, ready};
use std::time::Duration;

use http::StatusCode;
use rustls_pki_types::ServerName;
use std::num::NonZeroU16;

use super::Caller;
use super::tunnel::{ANSWER_TIMEOUT, HANDSHAKE_TIMEOUT, alpn_name, check_identity, reach_agent};
use crate::discovery::Store;
use crate::identity::Alpn;
use crate::node::LocalPod;
use crate::proxy::ends::unless;
use crate::proxy::error::{FlowError, TunnelError};
use crate::proxy::http::detect;
use crate::proxy::let_out::Leads;
use crate::proxy::record::Record;
use crate::proxy::tcp::{Broken, FlowSocket, Side};
use crate::proxy::tunnel::Watch;
use crate::proxy::tunnel::client::Key;
use crate::proxy::tunnel::weft1::channel::Channel;
use crate::proxy::tunnel::weft1::client::{Answer, Dialed, GiveBack, Taken};
use crate::proxy::tunnel::weft1::frame::{Open, Refuse};
use crate::proxy::tunnel::weft1::{copy, handshake, server};
use crate::proxy::{Context, inbound, let_out};

/// A flow that the server's application has accepted.
pub struct Asked {
    channel: Box<Channel>,
    watch: Watch,
    give_back: GiveBack,
    early: usize,
}

/// Asks the endpoint's agent for the flow. None: it must go another way.
pub(super) async fn ask(
    context: &Arc<Context>,
    pod: &Arc<LocalPod>,
    from: Caller<'_>,
    to: SocketAddr,
    key: &Key,
) -> Result<Option<Asked>, FlowError> {
    let Some(port) = NonZeroU16::new(to.port()) else {
        return Err(FlowError::ReservedPort(0));
    };
    let open = Open {
        port,
        source_port: NonZeroU16::new(from.address.port()),
        opaque_by: from.opaque_by(),
    };
    let mut failures = 0;
    loop {
        let taking = context.channels.take(key, dialer(context, pod, key));
        let taken = tokio::time::timeout(TAKE_TIMEOUT, taking).await;
        let mut lent = match taken.map_err(|_| FlowError::ConnectTimeout { to })?? {
            Taken::Lent(lent) => lent,
            Taken::Http => return Ok(None),
        };
        let asking = lent.ask(&open, from.said);
        let Ok(answer) = tokio::time::timeout(ANSWER_TIMEOUT, asking).await else {
            // What was sent may still arrive: the flow must not go to anybody else.
            return Err(FlowError::Broken(Broken::Reset(Side::Server)));
        };
        let (error, again) = match answer {
            Answer::Accepted { early } => {
                let (channel, watch, give_back) = lent.part();
                return Ok(Some(Asked {
                    channel,
                    watch,
                    give_back,
                    early,
                }));
            }
            Answer::Refused(refuse) if refuse.reason == server::LEAVING => {
                (refused(to, refuse), true)
            }
            Answer::Refused(refuse) => {
                let (channel, watch, give_back) = lent.part();
                give_back.give(channel, watch);
                (refused(to, refuse), false)
            }
            // Nobody knows what has become of the bytes.
            Answer::Lost { early, .. } if early > 0 => {
                return Err(FlowError::Broken(Broken::Reset(Side::Server)));
            }
            Answer::Lost { error, .. } => {
                let error = FlowError::Tunnel(Arc::new(TunnelError::Weft(error)));
                (error, lent.is_reused())
            }
        };
        failures += 1;
        if !again || failures > RETRIES {
            return Err(error);
        }
    }
}

impl Asked {
    /// Ends when the server has said something that tells what it speaks, or has ended. Says whether it has said
    /// anything.
    pub(super) async fn speaks(&mut self) -> bool {
        let said = poll_fn(|context| {
            let first = ready!(self.channel.poll_first(context));
            // What is wrong with it is seen by who reads it in earnest.
            let first = first.unwrap_or_default();
            Poll::Ready((detect::is_for_client_to_say(first), !first.is_empty()))
        });
        let (is_for_client, has_spoken) = said.await;
        if is_for_client {
            std::future::pending::<()>().await;
        }
        has_spoken
    }

    /// Parts the connection from what may end it and what takes it back. Nothing of the flow was
    /// sent yet.
    pub(in crate::proxy) fn part(self) -> (Box<Channel>, Watch, GiveBack) {
        (self.channel, self.watch, self.give_back)
    }

    /// Copies until both sides closed, and keeps the connection for the next flow.
    pub(super) async fn carry(
        self,
        client: FlowSocket,
        store: &Store,
        pod: &LocalPod,
        record: &Record,
    ) -> Result<(), FlowError> {
        let Self {
            channel,
            mut watch,
            give_back,
            early,
        } = self;
        let channel = {
            let end = pin!(async {
                tokio::select! {
                    () = watch.untrusted() => FlowError::from(Broken::Reset(Side::Server)),
                    error = let_out::ended(store, pod, Leads::of(record)) => error,
                }
            });
            let copying = copy::join(client, Side::Client, channel, &record.moved, early);
            let copying = pin!(copying);
            unless(end, copying).await??
        };
        give_back.give(channel, watch);
        Ok(())
    }
}

impl std::fmt::Debug for Asked {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Asked")
            .field("early", &self.early)
            .finish_non_exhaustive()
    }
}

fn refused(by: SocketAddr, refuse: Refuse) -> FlowError {
    FlowError::RefusedByPeer {
        by,
        status: StatusCode::from_u16(refuse.status).unwrap_or(StatusCode::SERVICE_UNAVAILABLE),
        reason: (!refuse.reason.is_empty()).then_some(refuse.reason),
    }
}

/// What makes a connection when the pool has none.
fn dialer(
    context: &Arc<Context>,
    pod: &Arc<LocalPod>,
    key: &Key,
) -> impl Fn() -> BoxedDial + Send + 'static {
    let (context, pod) = (Arc::clone(context), Arc::clone(pod));
    let (address, identity) = (key.destination, key.identity.clone());
    move || {
        let (context, pod, identity) = (Arc::clone(&context), Arc::clone(&pod), identity.clone());
        Box::pin(async move { dial(&context, &pod, address, &identity).await })
    }
}

type BoxedDial = futures::future::BoxFuture<'static, Result<Dialed, TunnelError>>;

/// Makes a connection: from the source pod's namespace, and lets nothing pass before the peer has
/// proven to be who it must be.
async fn dial(
    context: &Context,
    pod: &LocalPod,
    address: IpAddr,
    expected: &weft_core::Identity,
) -> Result<Dialed, TunnelError> {
    let changed = context.identities.changed();
    let generation = *changed.borrow();
    let (config, mut stream, turn) = reach_agent(context, pod, address, Alpn::Weft).await?;
    let name = ServerName::IpAddress(address.into());
    let shaking = handshake::connect(config, name, &mut stream);
    let shaking = pod.usage.handshake_in_turn(shaking);
    let greeted = tokio::time::timeout(HANDSHAKE_TIMEOUT, shaking)
        .await
        .map_err(|_| TunnelError::HandshakeTimeout)?
        .map_err(TunnelError::Handshake)?;
    drop(turn);
    check_identity(&greeted.chain, expected)?;
    match greeted.alpn.as_deref() {
        Some(alpn) if alpn == Alpn::Weft.as_bytes() => {}
        Some(alpn) if alpn == Alpn::WeftH2.as_bytes() => return Ok(Dialed::Otherwise),
        _ => return Err(TunnelError::Protocol(alpn_name(Alpn::Weft))),
    }
    let watch = inbound::watch_over(context, pod, Some(&greeted.chain), changed);
    let channel = Channel::new(stream, greeted, false).map_err(|source| TunnelError::Connect {
        to: SocketAddr::new(address, weft_core::TUNNEL_PORT),
        source,
    })?;
    Ok(Dialed::Channel {
        channel: Box::new(channel),
        watch,
        generation,
    })
}

/// How often a flow is asked for again when the connection it was asked on has gone away.
const RETRIES: usize = 3;
/// For making a connection, or for one that becomes free.
const TAKE_TIMEOUT: Duration = Duration::from_secs(8);
