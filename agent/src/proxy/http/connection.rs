//! A connection to a server, or to the agent in front of it, that speaks HTTP: made of a flow that was
//! accepted there.
//!
//! One of HTTP/1 is driven by whoever uses it. One of HTTP/2 is shared, and driven by a task of its
//! own.

use std::fmt;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use futures::future::BoxFuture;
use hyper::body::Incoming;
use hyper::client::conn::{TrySendError, http1, http2};
use hyper::{Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::task::unconstrained;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::task_tracker::TaskTrackerToken;
use weft_core::{Identity, Verdict, WorkloadId};

use super::answerer::Answerer;
use super::body::RequestBody;
use super::gate::Gate;
use super::measure::Known;
use super::serve::{FRAME_BYTES, MOST_HEAD_BYTES, SEND_BUFFER_BYTES};
use super::stream::{Returned, Stream};
use super::unheard::{FarEnd, Unheard, patience};
use super::upload::{Sends, dispatch};
use crate::discovery::Store;
use crate::node::LocalPod;
use crate::proxy::Context as Proxy;
use crate::proxy::ends::unless;
use crate::proxy::error::FlowError;
use crate::proxy::inbound::Admission;
use crate::proxy::let_out::{self, Leads};
use crate::proxy::outbound::drained;
use crate::proxy::record::{PathLabel, Record};
use crate::proxy::tcp::{Broken, Moved, Side};
use crate::proxy::tunnel::Watch;
use crate::proxy::tunnel::client::Slot;
use crate::proxy::tunnel::weft1::client::GiveBack;
use crate::proxy::usage::Party;
use crate::telemetry::Telemetry;

/// Where a connection leads. It serves exchanges that would be led the same way now, and no others.
#[derive(Debug)]
pub(in crate::proxy) struct Route {
    /// The endpoint.
    pub(in crate::proxy) endpoint: SocketAddr,
    /// How it is carried.
    pub(in crate::proxy) path: PathLabel,
    /// Who that is.
    pub(in crate::proxy) destination: Option<WorkloadId>,
    /// Who that has proven to be.
    pub(in crate::proxy) identity: Option<Identity>,
    /// The pod on this node: another one may have the same name and address later.
    pub(in crate::proxy) local: Option<Arc<LocalPod>>,
    /// Whose exchanges are counted there.
    pub(in crate::proxy) party: Option<Party>,
    /// What the policy of that pod said.
    pub(in crate::proxy) verdict: Option<Verdict>,
    /// Whom each request is asked of, on this node: elsewhere another agent does.
    pub(in crate::proxy) gate: Option<Gate>,
    /// Counts changes of trust roots and certificates: a tunnel from before is not used any more.
    pub(in crate::proxy) generation: u64,
}

/// A connection of HTTP/1, for one exchange at a time.
pub(super) struct Http1 {
    sender: Option<http1::SendRequest<RequestBody>>,
    driver: BoxFuture<'static, ()>,
    ended: bool,
    answerer: Answerer,
    far_end: FarEnd,
    /// Where it leads.
    pub(super) route: Arc<Route>,
    /// It has served an exchange: its server may have had enough of it.
    pub(super) is_reused: bool,
    /// Since when nobody uses it.
    pub(super) idle_since: Instant,
    /// For how long it may be used again, as its server has said.
    patience: Option<Duration>,
    /// What its exchanges are counted in.
    pub(super) known: Known,
}

/// A connection of HTTP/2.
#[derive(Clone)]
pub(super) struct Http2 {
    sender: http2::SendRequest<RequestBody>,
    answerer: Answerer,
    far_end: FarEnd,
    /// Where it leads.
    pub(super) route: Arc<Route>,
    open: Arc<Open>,
    /// What its exchanges are counted in.
    pub(super) known: Arc<Mutex<Known>>,
}

/// An exchange on a connection of HTTP/2: open until the last of those who have to do with it is done.
#[derive(Clone, Debug)]
pub(super) struct OpenStream {
    _place: Arc<Place>,
}

/// A place in a connection of HTTP/2.
#[derive(Debug)]
struct Place(Arc<Open>);

/// The exchanges on a connection of HTTP/2.
#[derive(Debug)]
struct Open {
    now: AtomicUsize,
    /// When the last of them ended.
    idle_since: Mutex<Instant>,
}

/// What a flow holds while HTTP is spoken on it. Accounted when dropped.
pub(super) struct Life {
    /// Whose task drives it.
    pub(super) pod: Arc<LocalPod>,
    telemetry: Arc<Telemetry>,
    store: Arc<Store>,
    record: Option<Box<Record>>,
    moved: Arc<Moved>,
    hold: Hold,
    ended: Option<FlowError>,
}

/// What keeps it going, by the way it is carried.
pub(super) enum Hold {
    /// A socket needs nothing more.
    Nothing,
    /// On this node: what the server's pod says, and its count of flows.
    SameNode {
        /// What may end it.
        admission: Admission,
        /// It counts.
        _counted: TaskTrackerToken,
    },
    /// A connection of `weft/1`, to be given back.
    Channel {
        /// Where it is when HTTP is done with it.
        returned: Returned,
        /// What may end it.
        watch: Box<Watch>,
        /// Takes it back.
        give_back: Option<GiveBack>,
    },
    /// A place in a connection of HTTP/2.
    Tunnel {
        /// The place.
        _slot: Slot,
    },
}

impl Route {
    /// Whether the pod at its end takes no new flows.
    pub(super) fn is_leaving(&self) -> bool {
        let local = self.local.as_ref();
        local.is_some_and(|it| it.left.is_cancelled() || it.stop_accepting.is_cancelled())
    }

    /// Whether exchanges that are led one way may use a connection of the other.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        let same_pod = match (&self.local, &other.local) {
            (Some(one), Some(other)) => Arc::ptr_eq(one, other) && !one.left.is_cancelled(),
            (None, None) => true,
            _ => false,
        };
        same_pod
            && self.endpoint == other.endpoint
            && self.path == other.path
            && self.destination == other.destination
            && self.identity == other.identity
            && (self.generation == other.generation || self.path != PathLabel::Tunnel)
    }
}

impl Http1 {
    /// Starts HTTP/1 on a flow.
    pub(super) async fn start(
        stream: Stream,
        life: Life,
        route: Arc<Route>,
    ) -> Result<Self, hyper::Error> {
        let gone = CancellationToken::new();
        let (answerer, far_end) = (stream.answerer(), stream.far_end());
        let most_headers = stream.most_headers();
        let stream = stream.metered(Arc::clone(&life.moved), Side::Server);
        let stream = stream.guarded(gone.clone().drop_guard());
        let (sender, connection) = http1::Builder::new()
            .max_buf_size(MOST_HEAD_BYTES)
            .max_header_size(MOST_HEAD_BYTES)
            .max_headers(most_headers)
            .handshake(TokioIo::new(stream))
            .await?;
        Ok(Self {
            sender: Some(sender),
            driver: Box::pin(async move {
                let connection = async move {
                    let ended = connection.with_upgrades().await;
                    // Of an upgrade, the rest.
                    gone.cancelled().await;
                    ended
                };
                life.drive(connection).await;
            }),
            ended: false,
            answerer,
            far_end,
            route,
            is_reused: false,
            idle_since: Instant::now(),
            patience: None,
            known: Known::default(),
        })
    }

    /// Sends a request and waits for the head of its answer. If it fails before anything of the
    /// request was sent, the error has it.
    pub(super) async fn send(
        &mut self,
        request: Request<RequestBody>,
    ) -> Result<Response<Incoming>, TrySendError<Request<RequestBody>>> {
        let Some(mut sender) = self.sender.take() else {
            unreachable!("a connection that is closed is not used");
        };
        let answered = {
            // It is the driver that makes it ready, and that runs here: to be woken by it would be a turn for nothing.
            // Nor may it be told to wait for one, of which nobody would wake it.
            let mut sending = pin!(unconstrained(sender.try_send_request(request)));
            poll_fn(|context| {
                self.poll(context);
                let mut unwoken = Context::from_waker(Waker::noop());
                sending.as_mut().poll(&mut unwoken)
            })
            .await
        };
        self.sender = Some(sender);
        let mut answer = answered?;
        self.answerer.check(answer.headers_mut());
        self.patience = patience(answer.headers());
        Ok(answer)
    }

    /// Moves its bytes.
    pub(super) fn poll(&mut self, context: &mut Context<'_>) {
        if !self.ended && self.driver.as_mut().poll(context).is_ready() {
            self.ended = true;
        }
    }

    /// Whether it can take an exchange now.
    pub(super) fn is_free(&mut self) -> bool {
        let is_fresh = self
            .patience
            .is_none_or(|it| self.idle_since.elapsed() < it);
        self.is_done() && is_fresh && self.is_quiet()
    }

    /// Whether the last exchange is over, and another one can follow as far as that says.
    pub(super) fn is_done(&mut self) -> bool {
        // Whoever used it last has been told of all that happened since; a look, without waiting.
        self.poll(&mut Context::from_waker(Waker::noop()));
        !self.ended && self.sender.as_ref().is_some_and(|it| it.is_ready())
    }

    /// Whether the server has done nothing to it meanwhile.
    fn is_quiet(&self) -> bool {
        match self.far_end.unheard() {
            Unheard::Nothing => true,
            // On a new one it may say first which version it speaks.
            Unheard::Said => !self.is_reused,
            Unheard::Ended => false,
        }
    }

    /// Ends it in order.
    pub(super) fn close(mut self) {
        self.sender = None;
        self.poll(&mut Context::from_waker(Waker::noop()));
        if !self.ended {
            tokio::spawn(async move {
                let ending = poll_fn(|context| {
                    self.poll(context);
                    if self.ended {
                        Poll::Ready(())
                    } else {
                        Poll::Pending
                    }
                });
                let _ = tokio::time::timeout(CLOSE_TIMEOUT, ending).await;
            });
        }
    }

    /// What moves its bytes until it is no longer HTTP, and ends when they must not be moved any more,
    /// or all have been.
    pub(super) fn into_driver(self) -> BoxFuture<'static, ()> {
        self.driver
    }
}

impl Http2 {
    /// Starts HTTP/2 on a flow. What it receives is a party's.
    pub(super) async fn start(
        stream: Stream,
        life: Life,
        route: Arc<Route>,
        party: &Party,
    ) -> Result<Self, hyper::Error> {
        let window = party.window();
        let (answerer, far_end) = (stream.answerer(), stream.far_end());
        let stream = stream.metered(Arc::clone(&life.moved), Side::Server);
        let stream = stream.acknowledging();
        let sends = Sends::default();
        let over = sends.over.clone();
        let (sender, connection) = http2::Builder::new(sends)
            .timer(TokioTimer::new())
            .initial_stream_window_size(window.stream_bytes)
            .initial_connection_window_size(window.connection_bytes)
            .max_frame_size(FRAME_BYTES)
            .max_header_list_size(MOST_HEAD_BYTES as u32)
            .max_send_buf_size(SEND_BUFFER_BYTES)
            .keep_alive_interval(KEEPALIVE)
            .keep_alive_timeout(KEEPALIVE)
            .handshake(TokioIo::new(stream))
            .await?;
        let pod = Arc::clone(&life.pod);
        pod.spawn_flow(async move {
            if !life.drive(dispatch(connection)).await {
                // It has tasks that would go on for as long as there are open streams.
                over.cancel();
            }
            drop(window);
        });
        Ok(Self {
            sender,
            answerer,
            far_end,
            route,
            open: Arc::default(),
            known: Arc::default(),
        })
    }

    /// Sends a request and waits for the head of its answer. If it fails before anything of the
    /// request was sent, the error has it.
    pub(super) async fn send(
        &mut self,
        request: Request<RequestBody>,
    ) -> Result<Response<Incoming>, TrySendError<Request<RequestBody>>> {
        let mut answer = self.sender.try_send_request(request).await?;
        self.answerer.check(answer.headers_mut());
        Ok(answer)
    }

    /// Whether the other is the same connection.
    pub(super) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.open, &other.open)
    }

    /// Whether it takes another exchange.
    pub(super) fn has_room(&self) -> bool {
        !self.sender.is_closed() && self.open.now.load(Ordering::Relaxed) < MOST_STREAMS
    }

    /// Whether it is of no use any more.
    pub(super) fn is_closed(&self) -> bool {
        self.sender.is_closed()
    }

    /// Whether it is of no use any more, as the kernel knows it.
    pub(super) fn has_ended(&self) -> bool {
        self.is_closed() || self.far_end.unheard() == Unheard::Ended
    }

    /// Whether nobody has used it for so long.
    pub(super) fn is_idle_for(&self, time: Duration) -> bool {
        let since = self.open.idle_since.lock();
        let since = *since.unwrap_or_else(PoisonError::into_inner);
        self.open.now.load(Ordering::Relaxed) == 0 && since.elapsed() >= time
    }

    /// Takes a place in it.
    pub(super) fn open(&self) -> OpenStream {
        self.open.now.fetch_add(1, Ordering::Relaxed);
        OpenStream {
            _place: Arc::new(Place(Arc::clone(&self.open))),
        }
    }
}

impl Default for Open {
    fn default() -> Self {
        Self {
            now: AtomicUsize::new(0),
            idle_since: Mutex::new(Instant::now()),
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let since = self.0.idle_since.lock();
        *since.unwrap_or_else(PoisonError::into_inner) = Instant::now();
        self.0.now.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Life {
    /// Of a flow that was accepted; `record` is written at its end.
    pub(super) fn new(
        proxy: &Proxy,
        pod: &Arc<LocalPod>,
        record: Box<Record>,
        moved: Moved,
        hold: Hold,
    ) -> Self {
        Self {
            pod: Arc::clone(pod),
            telemetry: Arc::clone(&proxy.telemetry),
            store: Arc::clone(&proxy.store),
            record: Some(record),
            moved: Arc::new(moved),
            hold,
            ended: None,
        }
    }

    /// Of a connection that belongs to a flow which is accounted elsewhere.
    pub(super) fn unaccounted(proxy: &Proxy, pod: &Arc<LocalPod>, hold: Hold) -> Self {
        Self {
            pod: Arc::clone(pod),
            telemetry: Arc::clone(&proxy.telemetry),
            store: Arc::clone(&proxy.store),
            record: None,
            moved: Arc::default(),
            hold,
            ended: None,
        }
    }

    /// Speaks HTTP until the connection ends, or has to. Says whether it has ended by itself.
    async fn drive(mut self, connection: impl Future<Output = Result<(), hyper::Error>>) -> bool {
        // Boxed, so that it is gone before this is.
        let mut connection = Box::pin(connection);
        let ended = {
            let (pod, store, record) = (&self.pod, &self.store, &self.record);
            let hold = &mut self.hold;
            let leaving = async {
                match record {
                    Some(record) => let_out::ended(store, pod, Leads::of(record)).await,
                    None => drained(pod).await,
                }
            };
            let end = pin!(hold.ended(leaving));
            unless(end, connection.as_mut()).await
        };
        match ended {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(%error, "a connection to a server ended"),
            Err(error) => self.ended = Some(error),
        }
        drop(connection);
        self.ended.is_none()
    }
}

impl Drop for Life {
    fn drop(&mut self) {
        if let Hold::Channel {
            returned,
            give_back,
            ..
        } = &mut self.hold
            && returned.is_some()
            && let Some(give_back) = give_back.take()
        {
            let returned = returned.clone();
            let nothing = Hold::Nothing;
            if let Hold::Channel { watch, .. } = std::mem::replace(&mut self.hold, nothing)
                && tokio::runtime::Handle::try_current().is_ok()
            {
                tokio::spawn(async move {
                    if let Some(channel) = returned.ended().await {
                        give_back.give(channel, *watch);
                    }
                });
            }
        }
        if let Some(mut record) = self.record.take() {
            let moved = std::mem::take(&mut self.moved);
            record.moved = Arc::try_unwrap(moved).unwrap_or_else(|moved| moved.snapshot());
            let result = self.ended.take().map_or(Ok(()), Err);
            record.finish(&self.telemetry, &self.store, &result);
        }
    }
}

impl Hold {
    /// Ends when the flow must: for its own reasons, or as it may not leave its pod any more.
    async fn ended(&mut self, leaving: impl Future<Output = FlowError>) -> FlowError {
        match self {
            Self::Nothing | Self::Tunnel { .. } => leaving.await,
            Self::SameNode { admission, .. } => tokio::select! {
                biased;
                error = leaving => error,
                error = admission.ended() => error,
            },
            Self::Channel { watch, .. } => tokio::select! {
                biased;
                error = leaving => error,
                () = watch.untrusted() => Broken::Reset(Side::Server).into(),
            },
        }
    }
}

impl fmt::Debug for Http1 {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Http1")
            .field("endpoint", &self.route.endpoint)
            .field("ended", &self.ended)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Http2 {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Http2")
            .field("endpoint", &self.route.endpoint)
            .field("open", &self.open)
            .finish_non_exhaustive()
    }
}

/// Connections that turn out to be closed, of those that were kept, before a request fails.
pub(super) const MOST_STALE: usize = 8;
/// Exchanges on one connection of HTTP/2 before another one is made: as many as most servers allow.
const MOST_STREAMS: usize = 100;
/// How long the other side may take to end a connection too.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);
const KEEPALIVE: Duration = Duration::from_secs(20);

#[cfg(test)]
pub(super) mod testing {
    use super::*;
    use crate::proxy::tcp::FlowSocket;

    /// A connection to an endpoint without the mesh that nobody drives. Of its other end the socket tells.
    pub(in crate::proxy::http) async fn http2(to: SocketAddr, socket: &Arc<FlowSocket>) -> Http2 {
        let (near, far) = tokio::io::duplex(1024);
        let builder = http2::Builder::new(Sends::default());
        let made = builder.handshake(TokioIo::new(near)).await;
        let (sender, connection) = made.expect("a connection");
        std::mem::forget((connection, far));
        Http2 {
            sender,
            answerer: Answerer::Application,
            far_end: FarEnd::new(Some(socket), Answerer::Application),
            route: Arc::new(Route {
                endpoint: to,
                path: PathLabel::Plaintext,
                destination: None,
                identity: None,
                local: None,
                party: None,
                verdict: None,
                gate: None,
                generation: 0,
            }),
            open: Arc::default(),
            known: Arc::default(),
        }
    }
}
