//! A client's connection, request by request.

use std::convert::Infallible;
use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use hyper::body::Incoming;
use hyper::rt::Executor;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio_util::sync::CancellationToken;

use super::Version;
use super::body::ResponseBody;
use super::lines::Switching;
use super::stream::Stream;
use crate::node::LocalPod;
use crate::proxy::usage::{Party, Window};

/// Answers requests until the client leaves, or is to `leave`, as when the pod takes no new connections: then
/// the one that is open is the last. What it was upgraded to counts as it. What the connection receives is
/// a party's.
pub(super) async fn serve<S, F>(
    stream: Stream,
    version: Version,
    pod: &Arc<LocalPod>,
    (party, leave): (&Party, &CancellationToken),
    service: S,
) -> Result<(), hyper::Error>
where
    S: Fn(Request<Incoming>) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Response<ResponseBody>> + Send + 'static,
{
    let gone = CancellationToken::new();
    let progress = Arc::new(Progress::default());
    // A half-closed client still wants its answer; one that has reset the connection does not.
    let mut failed = stream.failure();
    let stream = match version {
        Version::Http1 => stream.strict(),
        Version::Http2 => stream.acknowledging(),
    };
    let stream = stream.guarded(gone.clone().drop_guard());
    let io = TokioIo::new(stream.watched(Arc::clone(&progress)));
    let counted = Arc::clone(&progress);
    let service = service_fn(move |request| {
        counted.exchanges.fetch_add(1, Ordering::Relaxed);
        #[cfg(feature = "faults")]
        let is_to_panic = crate::faults::asked_by(request.headers());
        let answering = service(request);
        let counted = Arc::clone(&counted);
        async move {
            #[cfg(feature = "faults")]
            crate::faults::strike(is_to_panic);
            let mut answer = answering.await;
            if answer.extensions_mut().remove::<Switched>().is_some() {
                counted.switched.store(true, Ordering::Relaxed);
            }
            answer.body_mut().tell_end(counted);
            Ok::<_, Infallible>(answer)
        }
    });
    let mut slow = pin!(progress.slow_head());
    let mut leaving = false;
    match version {
        Version::Http1 => {
            let connection = http1().serve_connection(io, service).with_upgrades();
            let mut connection = pin!(connection);
            loop {
                tokio::select! {
                    biased;
                    result = &mut connection => break result?,
                    () = &mut slow => return Ok(()),
                    () = &mut failed => return Ok(()),
                    () = leave.cancelled(), if !leaving => {
                        leaving = true;
                        connection.as_mut().graceful_shutdown();
                    }
                }
            }
        }
        Version::Http2 => {
            let tasks = Tasks(Arc::clone(pod));
            let window = party.window();
            let mut connection = pin!(http2(tasks, &window).serve_connection(io, service));
            loop {
                tokio::select! {
                    biased;
                    result = &mut connection => break result?,
                    () = &mut failed => return Ok(()),
                    () = leave.cancelled(), if !leaving => {
                        leaving = true;
                        connection.as_mut().graceful_shutdown();
                    }
                }
            }
        }
    }
    // Of an upgrade, the rest.
    gone.cancelled().await;
    Ok(())
}

/// What a client's connection has seen, to tell one that dribbles a head from one that waits.
#[derive(Debug, Default)]
pub(super) struct Progress {
    /// Bytes that were read.
    pub(super) read: AtomicU64,
    exchanges: AtomicU64,
    /// Those that have ended.
    answers: AtomicU64,
    /// What it carries now is not HTTP.
    switched: AtomicBool,
}

/// Marks the answer after which a connection carries something else.
#[derive(Clone, Copy, Debug)]
pub(super) struct Switched;

impl Progress {
    /// An exchange has ended.
    pub(super) fn answered(&self) {
        self.answers.fetch_add(1, Ordering::Relaxed);
    }

    /// Whether there were some, and none is open.
    pub(super) fn is_over(&self) -> bool {
        self.exchanges.load(Ordering::Relaxed) > 0
            && self.is_between_exchanges()
            && !self.switched.load(Ordering::Relaxed)
    }

    /// What has become of what the last exchange asked for.
    pub(super) fn switching(&self) -> Switching {
        if self.switched.load(Ordering::Relaxed) {
            Switching::Done
        } else if self.is_between_exchanges() {
            Switching::Declined
        } else {
            Switching::Open
        }
    }

    /// Whether no exchange is open.
    fn is_between_exchanges(&self) -> bool {
        self.exchanges.load(Ordering::Relaxed) == self.answers.load(Ordering::Relaxed)
    }

    /// Ends when a head has been on its way for too long: bytes came, and no exchange began or was open.
    async fn slow_head(&self) {
        let mut quiet_since: Option<(u64, u64)> = None;
        let mut began = false;
        loop {
            tokio::time::sleep(HEAD_TIMEOUT / 2).await;
            let read = self.read.load(Ordering::Relaxed);
            let exchanges = self.exchanges.load(Ordering::Relaxed);
            match quiet_since {
                _ if !self.is_between_exchanges() => (quiet_since, began) = (None, false),
                Some((before, same)) if same == exchanges => {
                    // Still on its way after another interval.
                    if began {
                        return;
                    }
                    began = read != before;
                }
                // What was read until now may be of what is over.
                _ => (quiet_since, began) = (Some((read, exchanges)), false),
            }
        }
    }
}

fn http1() -> http1::Builder {
    let mut builder = http1::Builder::new();
    builder
        // A client that has said all may still want the answer.
        .half_close(true)
        .auto_date_header(false)
        // It would also end connections that wait for the next request: see `Progress`.
        .header_read_timeout(None)
        .max_headers(MOST_HEADERS)
        .max_header_size(MOST_HEAD_BYTES)
        .max_buf_size(MOST_HEAD_BYTES);
    builder
}

fn http2(tasks: Tasks, window: &Window) -> http2::Builder<Tasks> {
    let mut builder = http2::Builder::new(tasks);
    builder
        .auto_date_header(false)
        .timer(TokioTimer::new())
        .initial_stream_window_size(window.stream_bytes)
        .initial_connection_window_size(window.connection_bytes)
        .max_frame_size(FRAME_BYTES)
        .max_concurrent_streams(MOST_STREAMS)
        .max_header_list_size(MOST_HEAD_BYTES as u32)
        .max_send_buf_size(SEND_BUFFER_BYTES)
        .max_pending_accept_reset_streams(UNSEEN_RESETS)
        .max_local_error_reset_streams(STRAY_FRAMES)
        .keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE);
    builder
}

/// The exchanges of HTTP/2 are tasks of the pod.
#[derive(Clone)]
pub(super) struct Tasks(pub(super) Arc<LocalPod>);

impl<F> Executor<F> for Tasks
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, exchange: F) {
        self.0.spawn_flow(exchange);
    }
}

/// How long a client may take to send a head, about. An idle connection may wait.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
/// A head of HTTP/1, and a list of header fields of HTTP/2.
pub(super) const MOST_HEAD_BYTES: usize = 64 * 1024;
pub(super) const MOST_HEADERS: usize = 128;
const MOST_STREAMS: u32 = 256;
/// What HTTP/2 keeps of one stream before it is written.
pub(super) const SEND_BUFFER_BYTES: usize = 64 * 1024;
/// With its head what fills a record of `weft/1`.
pub(super) const FRAME_BYTES: u32 = 16 * 1024;
/// Streams that were reset before they were looked at: more is an attack (CVE-2023-44487).
const UNSEEN_RESETS: usize = 64;
const STRAY_FRAMES: usize = 1024;
const KEEPALIVE: Duration = Duration::from_secs(30);
