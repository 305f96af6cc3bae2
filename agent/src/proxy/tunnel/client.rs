//! The connections that flows leave by, kept per pair of workloads and shared by the flows of that
//! pair.
//!
//! Nothing is locked while a connection is being made: whoever comes first starts a task that makes
//! it, everybody who needs one waits for that task. A connection takes a bounded number of flows;
//! beyond that the next one is made.

use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use h2::RecvStream;
use h2::client::{Connection, SendRequest};
use http::{Request, Response};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::Instant;
use weft_core::{Identity, WorkloadId};

use super::chunk::Chunk;
use super::{
    CONNECTION_WINDOW_BYTES, FRAME_BYTES, HEADER_BYTES, REMEMBERED_RESETS, SEND_BUFFER_BYTES,
    START_TIMEOUT, STRAY_FRAMES, STREAM_WINDOW_BYTES, Watch, keepalive, next_change,
};
use crate::identity::Alpn;
use crate::proxy::error::TunnelError;
use crate::proxy::tcp::TunnelHalves;

/// All tunnels of the node that lead elsewhere.
#[derive(Debug)]
pub struct Pool {
    pairs: Mutex<HashMap<Key, Pair>>,
    limits: Limits,
    next_id: AtomicU64,
}

/// What may share a tunnel: flows of one workload to one address of one identity.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// The workload that connects.
    pub source: WorkloadId,
    /// Tells it from an earlier pod of the same name.
    pub source_uid: Arc<str>,
    /// The address of the workload that is connected to.
    pub destination: IpAddr,
    /// Who that is.
    pub identity: Identity,
    /// What is spoken.
    pub alpn: Alpn,
}

/// Limits of each tunnel.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Flows at a time.
    pub streams: usize,
    /// Closed when unused for so long.
    pub idle: Duration,
    /// Takes no new flows when so old.
    pub age: Duration,
}

/// A TLS connection to a peer whose identity has been checked.
pub struct Dialed<I> {
    /// The connection.
    pub io: I,
    /// What ends it from outside.
    pub watch: Watch,
}

/// A flow's stream, answered with success.
#[derive(Debug)]
pub struct Opened {
    /// The answer.
    pub response: Response<()>,
    /// The stream.
    pub halves: TunnelHalves,
    /// Keeps the place in the connection taken.
    pub slot: Slot,
    /// Whether the peer is an agent of Weft.
    pub is_of_weft: bool,
}

/// A place for one flow in a tunnel.
pub struct Slot(Arc<Tunnel>);

#[derive(Default)]
struct Pair {
    open: Vec<Arc<Tunnel>>,
    making: Option<Making>,
}

/// Yields the number of the connection that was made.
type Making = Shared<BoxFuture<'static, Result<u64, Arc<TunnelError>>>>;

struct Tunnel {
    sender: SendRequest<Chunk>,
    usage: Arc<Usage>,
}

/// What the task that drives a connection knows of its flows. It must not hold the sender: the
/// connection closes by itself when the last one is dropped.
#[derive(Debug)]
struct Usage {
    id: u64,
    flows: AtomicUsize,
    /// See [`Watch::valid_until`].
    valid_until: SystemTime,
    born: Instant,
    last_used: Mutex<Instant>,
}

enum Claim {
    Taken(Slot),
    Wait(Making),
}

impl Pool {
    /// An empty pool.
    pub fn new(limits: Limits) -> Arc<Self> {
        Arc::new(Self {
            pairs: Mutex::default(),
            limits,
            next_id: AtomicU64::new(0),
        })
    }

    /// Sends a request on a tunnel of the pair, which `dial` makes if there is none with room, and
    /// waits for the head of its answer. The caller bounds the time.
    ///
    /// # Errors
    /// There is no tunnel, or it failed before it answered.
    pub async fn request<D, F, I>(
        self: &Arc<Self>,
        key: &Key,
        dial: D,
        request: Request<()>,
    ) -> Result<Opened, Arc<TunnelError>>
    where
        D: Fn() -> F,
        F: Future<Output = Result<Dialed<I>, TunnelError>> + Send + 'static,
        I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let mut failures = 0;
        loop {
            let slot = self.slot(key, &dial).await?;
            match slot.send(&request).await {
                Ok((response, send)) => {
                    let (head, receive) = response.into_parts();
                    return Ok(Opened {
                        response: Response::from_parts(head, ()),
                        halves: TunnelHalves {
                            send,
                            receive,
                            first: Bytes::new(),
                        },
                        slot,
                        is_of_weft: key.alpn == Alpn::WeftH2,
                    });
                }
                // The connection was going away while the request was sent. Nothing of the flow
                // has been sent with it, so another connection may take it.
                Err(error) if failures < RETRIES && !error.is_reset() => {
                    failures += 1;
                    self.retire(key, slot.0.usage.id);
                }
                Err(error) => return Err(Arc::new(error.into())),
            }
        }
    }

    /// How many connections are kept.
    pub fn connections(&self) -> usize {
        self.pairs().values().map(|pair| pair.open.len()).sum()
    }

    async fn slot<D, F, I>(self: &Arc<Self>, key: &Key, dial: &D) -> Result<Slot, Arc<TunnelError>>
    where
        D: Fn() -> F,
        F: Future<Output = Result<Dialed<I>, TunnelError>> + Send + 'static,
        I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let mut in_vain = 0;
        loop {
            let made = match self.claim(key, dial) {
                Claim::Taken(slot) => return Ok(slot),
                Claim::Wait(making) => making.await?,
            };
            // Others may take all its places; then the next connection is made. But a peer that
            // goes away at once is not asked for ever.
            if !self.has(key, made) {
                in_vain += 1;
                if in_vain > RETRIES {
                    return Err(Arc::new(TunnelError::Closed));
                }
            }
        }
    }

    fn has(&self, key: &Key, id: u64) -> bool {
        let pairs = self.pairs();
        let pair = pairs.get(key);
        pair.is_some_and(|pair| pair.open.iter().any(|tunnel| tunnel.usage.id == id))
    }

    fn claim<D, F, I>(self: &Arc<Self>, key: &Key, dial: &D) -> Claim
    where
        D: Fn() -> F,
        F: Future<Output = Result<Dialed<I>, TunnelError>> + Send + 'static,
        I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let mut pairs = self.pairs();
        let pair = pairs.entry(key.clone()).or_default();
        if let Some(slot) = pair.open.iter().find_map(|it| it.claim(&self.limits)) {
            return Claim::Taken(slot);
        }
        if let Some(making) = &pair.making {
            return Claim::Wait(making.clone());
        }
        // A task of its own: it goes on if the flow that started it gives up.
        let task = tokio::spawn(make(Arc::downgrade(self), key.clone(), dial()));
        let making = async move {
            task.await
                .unwrap_or_else(|_| Err(Arc::new(TunnelError::Closed)))
        }
        .boxed()
        .shared();
        pair.making = Some(making.clone());
        Claim::Wait(making)
    }

    /// Takes a connection out of the pool; it closes when its last flow ends.
    fn retire(&self, key: &Key, id: u64) {
        let mut pairs = self.pairs();
        if let Some(pair) = pairs.get_mut(key) {
            pair.open.retain(|tunnel| tunnel.usage.id != id);
            if pair.open.is_empty() && pair.making.is_none() {
                pairs.remove(key);
            }
        }
    }

    fn made(&self, key: &Key, tunnel: Option<Tunnel>) {
        let mut pairs = self.pairs();
        let pair = pairs.entry(key.clone()).or_default();
        pair.making = None;
        pair.open.extend(tunnel.map(Arc::new));
        if pair.open.is_empty() {
            pairs.remove(key);
        }
    }

    fn pairs(&self) -> MutexGuard<'_, HashMap<Key, Pair>> {
        // Every change under the lock is complete in itself.
        self.pairs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes a connection and puts it into the pool, or takes the note away that one is being made.
async fn make<F, I>(pool: Weak<Pool>, key: Key, dial: F) -> Result<u64, Arc<TunnelError>>
where
    F: Future<Output = Result<Dialed<I>, TunnelError>> + Send + 'static,
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut note = MakingNote {
        pool: &pool,
        key: &key,
        tunnel: None,
    };
    let Dialed { io, watch } = dial.await.map_err(Arc::new)?;
    let start = tokio::time::timeout(START_TIMEOUT, handshake(io)).await;
    let (sender, connection) = start
        .map_err(|_| Arc::new(TunnelError::HandshakeTimeout))?
        .map_err(|error| Arc::new(error.into()))?;
    let Some(strong) = pool.upgrade() else {
        return Err(Arc::new(TunnelError::Closed));
    };
    let usage = Arc::new(Usage {
        id: strong.next_id.fetch_add(1, Ordering::Relaxed),
        flows: AtomicUsize::new(0),
        valid_until: watch.valid_until,
        born: Instant::now(),
        last_used: Mutex::new(Instant::now()),
    });
    let limits = strong.limits.clone();
    drop(strong);
    let driver = drive(
        connection,
        watch,
        pool.clone(),
        key.clone(),
        Arc::clone(&usage),
        limits,
    );
    tokio::spawn(driver);
    let id = usage.id;
    note.tunnel = Some(Tunnel { sender, usage });
    Ok(id)
}

/// Settles the pair however making ends, a panic included.
struct MakingNote<'a> {
    pool: &'a Weak<Pool>,
    key: &'a Key,
    tunnel: Option<Tunnel>,
}

impl Drop for MakingNote<'_> {
    fn drop(&mut self) {
        if let Some(pool) = self.pool.upgrade() {
            pool.made(self.key, self.tunnel.take());
        }
    }
}

async fn handshake<I>(io: I) -> Result<(SendRequest<Chunk>, Connection<I, Chunk>), h2::Error>
where
    I: AsyncRead + AsyncWrite + Unpin,
{
    h2::client::Builder::new()
        .enable_push(false)
        .initial_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(FRAME_BYTES)
        .max_send_buffer_size(SEND_BUFFER_BYTES)
        .max_header_list_size(HEADER_BYTES)
        .max_concurrent_reset_streams(REMEMBERED_RESETS)
        .max_local_error_reset_streams(Some(STRAY_FRAMES))
        .handshake::<I, Chunk>(io)
        .await
}

/// Moves a connection's frames until it ends, by itself or because it has to.
async fn drive<I>(
    mut connection: Connection<I, Chunk>,
    watch: Watch,
    pool: Weak<Pool>,
    key: Key,
    usage: Arc<Usage>,
    limits: Limits,
) where
    I: AsyncRead + AsyncWrite + Unpin,
{
    let pings = connection.ping_pong();
    let retire = || {
        if let Some(pool) = pool.upgrade() {
            pool.retire(&key, usage.id);
        }
    };
    // Dropping the connection resets the flows that are still in it.
    let why = tokio::select! {
        biased;
        end = &mut connection => end.map_or_else(|error| error.to_string(), |()| "closed".into()),
        () = keepalive(pings) => "the peer does not answer".into(),
        why = upkeep(watch, &usage, &limits, retire) => why.into(),
    };
    retire();
    tracing::debug!(source = %key.source, destination = %key.destination, %why, "tunnel ended");
}

/// Retires the connection when it is old or unused or certificates changed; ends when it must not
/// go on.
async fn upkeep(
    mut watch: Watch,
    usage: &Usage,
    limits: &Limits,
    retire: impl Fn(),
) -> &'static str {
    let step = (limits.idle / 4).max(Duration::from_millis(100));
    loop {
        tokio::select! {
            () = watch.pod_gone.cancelled() => return "the pod is gone",
            () = next_change(&mut watch.changed) => {
                retire();
                if !(watch.trusted)() {
                    return "the peer is no longer vouched for";
                }
            }
            () = tokio::time::sleep(step) => {
                let expired = SystemTime::now() >= usage.valid_until;
                if expired || usage.born.elapsed() >= limits.age || usage.idle() >= limits.idle {
                    retire();
                }
            }
        }
    }
}

impl Tunnel {
    /// Called with the pool locked, so that no flow starts on a connection that was just found
    /// idle.
    fn claim(self: &Arc<Self>, limits: &Limits) -> Option<Slot> {
        let most = limits.streams.min(self.sender.current_max_send_streams());
        if SystemTime::now() >= self.usage.valid_until {
            return None;
        }
        if self.usage.flows.load(Ordering::Relaxed) >= most {
            return None;
        }
        self.usage.flows.fetch_add(1, Ordering::Relaxed);
        Some(Slot(Arc::clone(self)))
    }
}

impl Usage {
    fn idle(&self) -> Duration {
        if self.flows.load(Ordering::Relaxed) > 0 {
            return Duration::ZERO;
        }
        let last = self
            .last_used
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        last.elapsed()
    }
}

impl Slot {
    async fn send(
        &self,
        request: &Request<()>,
    ) -> Result<(Response<RecvStream>, h2::SendStream<Chunk>), h2::Error> {
        let mut sender = self.0.sender.clone().ready().await?;
        let (response, send) = sender.send_request(request.clone(), false)?;
        Ok((response.await?, send))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let usage = &self.0.usage;
        *usage
            .last_used
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Instant::now();
        usage.flows.fetch_sub(1, Ordering::Relaxed);
    }
}

impl fmt::Debug for Slot {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_tuple("Slot").field(&self.0.usage).finish()
    }
}

impl fmt::Debug for Pair {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Pair")
            .field("open", &self.open.len())
            .field("making", &self.making.is_some())
            .finish()
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            streams: 64.min(super::STREAMS as usize),
            idle: Duration::from_secs(90),
            age: Duration::from_secs(3600),
        }
    }
}

/// How often a request is sent again when the connection it was sent on goes away.
const RETRIES: usize = 2;
