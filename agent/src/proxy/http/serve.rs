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
use super::idle::Idle;
use super::interim::Outbox;
use super::lines::Switching;
use super::stream::Stream;
use crate::node::LocalPod;
use crate::proxy::usage::{Party, Window};

/// Answers requests until the client leaves, or has been idle for long, or is to `leave`, as when the pod takes no new
/// connections: then the one that is open is the last. What it was upgraded to counts as it. What the connection receives
/// is a party's.
pub(super) async fn serve<S, F>(
    stream: Stream,
    version: Version,
    pod: &Arc<LocalPod>,
    (party, leave, idle): (&Party, &CancellationToken, Idle<'_>),
    service: S,
) -> Result<(), hyper::Error>
where
    S: Fn(Request<Incoming>) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Response<ResponseBody>> + Send + 'static,
{
    let gone = CancellationToken::new();
    let progress = Arc::new(Progress::default());
    // A half-closed client still wants its answer; one that has reset the connection does not. Which of the two one is
    // that has closed its socket, nothing says before it is sent something.
    let mut failed = stream.failure();
    let half = stream.half();
    let most_headers = stream.most_headers();
    let outbox = (version == Version::Http1).then(Outbox::default);
    let stream = match &outbox {
        Some(outbox) => stream.strict().saying_before(outbox.clone()),
        None => stream.acknowledging(),
    };
    let stream = stream.guarded(gone.clone().drop_guard());
    let io = TokioIo::new(stream.watched(Arc::clone(&progress)));
    let counted = Arc::clone(&progress);
    let service = service_fn(move |mut request: Request<Incoming>| {
        counted.begins();
        // In HTTP/1.0 there are none.
        let outbox = outbox.as_ref();
        let outbox = outbox.filter(|_| request.version() == http::Version::HTTP_11);
        let interim = outbox.map(Outbox::begin);
        if let Some(interim) = &interim {
            request.extensions_mut().insert(interim.clone());
        }
        #[cfg(feature = "faults")]
        let is_to_panic = crate::faults::asked_by(request.headers());
        // Some kilobytes that would be moved from hand to hand.
        let answering = Box::pin(service(request));
        let counted = Arc::clone(&counted);
        async move {
            #[cfg(feature = "faults")]
            crate::faults::strike(is_to_panic);
            let mut answer = answering.await;
            if let Some(interim) = interim {
                interim.over().await;
            }
            counted.heads.fetch_add(1, Ordering::Relaxed);
            if answer.extensions_mut().remove::<Switched>().is_some() {
                counted.switched.store(true, Ordering::Relaxed);
            }
            answer.body_mut().tell_end(counted);
            Ok::<_, Infallible>(answer)
        }
    });
    let mut slow = pin!(progress.slow(|| half.has_ended()));
    let mut idle = pin!(idle.ended(&progress));
    let mut leaving = false;
    match version {
        Version::Http1 => {
            let connection = http1(most_headers)
                .serve_connection(io, service)
                .with_upgrades();
            let mut connection = pin!(connection);
            loop {
                tokio::select! {
                    biased;
                    result = &mut connection => break result?,
                    () = &mut slow => return Ok(()),
                    () = &mut failed => return Ok(()),
                    () = leave.cancelled(), if !leaving => leaving = true,
                    () = &mut idle, if !leaving => leaving = true,
                }
                connection.as_mut().graceful_shutdown();
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
                    () = leave.cancelled(), if !leaving => leaving = true,
                    () = &mut idle, if !leaving => leaving = true,
                }
                connection.as_mut().graceful_shutdown();
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
    /// Those whose answer has begun.
    heads: AtomicU64,
    /// Those that have ended.
    answers: AtomicU64,
    /// What it carries now is not HTTP.
    switched: AtomicBool,
}

/// Marks the answer after which a connection carries something else.
#[derive(Clone, Copy, Debug)]
pub(super) struct Switched;

impl Progress {
    /// An exchange begins.
    pub(super) fn begins(&self) {
        self.exchanges.fetch_add(1, Ordering::Relaxed);
    }

    /// How many have begun.
    pub(super) fn begun(&self) -> u64 {
        self.exchanges.load(Ordering::Relaxed)
    }

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
    pub(super) fn is_between_exchanges(&self) -> bool {
        self.exchanges.load(Ordering::Relaxed) == self.answers.load(Ordering::Relaxed)
    }

    /// Whether an exchange is open whose answer has not begun.
    fn is_awaited(&self) -> bool {
        self.exchanges.load(Ordering::Relaxed) > self.heads.load(Ordering::Relaxed)
    }

    /// Ends when the client is too slow, or not there any more, as far as anybody can tell; it is looked at now and then.
    async fn slow(&self, has_ended: impl Fn() -> bool) {
        let (mut head, mut left) = (SlowHead::first(), Left::default());
        loop {
            tokio::time::sleep(LOOK).await;
            let exchanges = self.exchanges.load(Ordering::Relaxed);
            let read = self.read.load(Ordering::Relaxed);
            let is_between = self.is_between_exchanges();
            if head.look(exchanges, read, is_between)
                || left.look(exchanges, self.is_awaited() && has_ended())
            {
                return;
            }
        }
    }
}

/// A head that has been on its way for too long: bytes came, and no exchange began or was open.
#[derive(Debug, Default)]
struct SlowHead {
    quiet_since: Option<(u64, u64)>,
    began: bool,
}

impl SlowHead {
    /// At first nothing is over, and whatever was read is of a head.
    fn first() -> Self {
        Self {
            quiet_since: Some((0, 0)),
            began: false,
        }
    }

    /// Whether there is one, looked at every [`LOOK`].
    fn look(&mut self, exchanges: u64, read: u64, is_between: bool) -> bool {
        match self.quiet_since {
            _ if !is_between => *self = Self::default(),
            Some((before, same)) if same == exchanges => {
                // Still on its way after another interval.
                if self.began {
                    return true;
                }
                self.began = read != before;
            }
            // What was read until now may be of what is over.
            _ => {
                *self = Self {
                    quiet_since: Some((read, exchanges)),
                    began: false,
                };
            }
        }
        false
    }
}

/// A client that has ended its side and has waited for an answer for too long since: it may have gone without it.
#[derive(Debug, Default)]
struct Left {
    /// Which exchange was waited for, and how often in a row.
    seen: Option<(u64, u32)>,
}

impl Left {
    /// Whether it is one, looked at every [`LOOK`]; `waits`: it has ended its side, and waits for the answer of the
    /// last one of so many exchanges.
    fn look(&mut self, exchanges: u64, waits: bool) -> bool {
        let before = match self.seen {
            Some((same, times)) if same == exchanges => times,
            _ => 0,
        };
        self.seen = waits.then_some((exchanges, before + 1));
        waits && before + 1 > LOOKS_OF_LEFT
    }
}

fn http1(most_headers: usize) -> http1::Builder {
    let mut builder = http1::Builder::new();
    builder
        // A client that has said all may still want the answer.
        .half_close(true)
        .auto_date_header(false)
        // It would also end connections that wait for the next request: see `Progress`.
        .header_read_timeout(None)
        .max_headers(most_headers)
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
/// How often clients are looked at.
const LOOK: Duration = Duration::from_secs(HEAD_TIMEOUT.as_secs() / 2);
/// So many times in a row one that has ended its side may be waiting for an answer to begin: for 30 s, and up to 45.
const LOOKS_OF_LEFT: u32 = 2;
/// A head of HTTP/1, and a list of header fields of HTTP/2.
pub(super) const MOST_HEAD_BYTES: usize = 64 * 1024;
/// In a head of HTTP/1 that an application has written.
pub(super) const MOST_HEADERS: usize = 96;
/// In one that an agent may have added something to. For more, hyper's parser would get memory with each head.
pub(super) const MOST_RELAYED_HEADERS: usize = 100;
const MOST_STREAMS: u32 = 256;
/// What HTTP/2 keeps of one stream before it is written.
pub(super) const SEND_BUFFER_BYTES: usize = 64 * 1024;
/// With its head what fills a record of `weft/1`.
pub(super) const FRAME_BYTES: u32 = 16 * 1024;
/// Streams that were reset before they were looked at: more is an attack (CVE-2023-44487).
const UNSEEN_RESETS: usize = 64;
const STRAY_FRAMES: usize = 1024;
const KEEPALIVE: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_has_ended_is_waited_for_twice_with_each_exchange() {
        let mut left = Left::default();
        for (exchanges, waits, is_left) in [
            (1, true, false),
            (1, true, false),
            // It was answered, and had sent another request before it ended.
            (2, true, false),
            (2, true, false),
            (2, false, false),
            (2, true, false),
            (2, true, false),
            (2, true, true),
        ] {
            assert_eq!(left.look(exchanges, waits), is_left, "{left:?}");
        }
    }

    #[test]
    fn a_head_that_is_on_its_way_for_two_intervals_is_slow() {
        let mut head = SlowHead::first();
        // Exchanges, bytes that were read, whether none is open; whether it is slow.
        for (exchanges, read, is_between, is_slow) in [
            (0, 0, true, false),
            // An idle connection may wait.
            (0, 0, true, false),
            (0, 5, true, false),
            (1, 90, false, false),
            (1, 90, true, false),
            (1, 95, true, false),
            (1, 95, true, true),
        ] {
            let found = head.look(exchanges, read, is_between);
            assert_eq!(found, is_slow, "{exchanges} {read} {head:?}");
        }
        // The first one, of which nothing has come since.
        let mut head = SlowHead::first();
        assert!(!head.look(0, 5, true));
        assert!(head.look(0, 5, true));
    }
}
