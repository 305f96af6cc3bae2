//! A flow as a stream of bytes, for HTTP to be spoken on: a socket, a connection of `weft/1`, or a stream
//! of HTTP/2. It counts what passes, and at its end it is what the other side sees: closed in order
//! if HTTP closed it, else reset.

use std::fmt;
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes};
use futures::future::BoxFuture;
use h2::{Reason, RecvStream, SendStream};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::runtime::Handle;
use tokio_util::sync::DropGuard;

use super::Version;
use super::answerer::Answerer;
use super::application::{Application, Origin};
use super::interim::Outbox;
use super::lines::{Lines, Switching};
use super::serve::{MOST_HEADERS, MOST_RELAYED_HEADERS, Progress};
use super::unheard::{FarEnd, Half};
use crate::proxy::tcp::{FlowSocket, Moved, Side, TunnelHalves, failed};
use crate::proxy::tunnel::chunk::{Chunk, Queue};
use crate::proxy::tunnel::weft1;
use crate::proxy::tunnel::weft1::channel::Channel;
use crate::proxy::tunnel::weft1::stream::ChannelIo;

/// A flow's bytes.
#[derive(Debug)]
pub(in crate::proxy) struct Stream {
    kind: Kind,
    /// Who is at its other end, if that is who answers.
    answerer: Answerer,
    /// Taken from it already, to be read first.
    first: Bytes,
    /// Counted as coming from this side of the flow when read.
    meter: Option<(Arc<Moved>, Side)>,
    /// Nothing more is to be said.
    ended: bool,
    acknowledges: bool,
    /// All that was said was passed on.
    is_flushed: bool,
    /// Bytes that were read without anybody else having had a turn.
    in_a_row: usize,
    /// Looks at the lines of what is read.
    lines: Option<Lines>,
    /// Told of what is read.
    progress: Option<Arc<Progress>>,
    /// What is to be said beside what is written, and what of it has not left yet.
    outbox: Option<Outbox>,
    before: Bytes,
    /// Tells when it is gone.
    _guard: Option<DropGuard>,
}

#[derive(Debug)]
enum Kind {
    Socket(Arc<FlowSocket>),
    Application(Box<Application>),
    Channel(ChannelStream),
    Tunnel(Box<TunnelStream>),
}

/// Where a connection of `weft/1` is put when HTTP is done with it and both sides have ended in order; or
/// what its peer did wrong.
#[derive(Clone, Debug, Default)]
pub(in crate::proxy) struct Returned(Arc<Mutex<Left>>);

#[derive(Debug, Default)]
struct Left {
    /// This side has ended.
    io: Option<ChannelIo>,
    fault: Option<weft1::Error>,
}

impl Stream {
    /// On a socket.
    pub(in crate::proxy) fn socket(socket: FlowSocket) -> Self {
        Self::new(Kind::Socket(Arc::new(socket)))
    }

    /// On a socket to an application, for a client that speaks this version, whatever the application does.
    pub(super) fn application(server: FlowSocket, origin: Origin, version: Version) -> Self {
        let application = Application::new(server, origin, version);
        Self::new(Kind::Application(Box::new(application)))
    }

    /// On a connection of `weft/1`, for one flow; afterwards it is in `returned`, if it may have another.
    pub(in crate::proxy) fn channel(io: ChannelIo, returned: Returned) -> Self {
        Self::new(Kind::Channel(ChannelStream {
            io: Some(io),
            returned,
        }))
    }

    /// On a stream of HTTP/2 to an endpoint.
    pub(super) fn opened(halves: TunnelHalves, is_of_weft: bool) -> Self {
        let mut stream = Self::tunnel(halves);
        if is_of_weft {
            stream.answerer = Answerer::Agent;
        }
        stream
    }

    /// On a stream of HTTP/2.
    pub(in crate::proxy) fn tunnel(halves: TunnelHalves) -> Self {
        Self::new(Kind::Tunnel(Box::new(TunnelStream {
            send: halves.send,
            receive: halves.receive,
            received: halves.first,
            queue: Queue::default(),
            emptied: None,
        })))
    }

    fn new(kind: Kind) -> Self {
        let answerer = match &kind {
            Kind::Application(application) => application.answerer(),
            // Both ends of that are agents of Weft.
            Kind::Channel(_) => Answerer::Agent,
            Kind::Socket(_) | Kind::Tunnel(_) => Answerer::Application,
        };
        Self {
            kind,
            answerer,
            first: Bytes::new(),
            meter: None,
            ended: false,
            acknowledges: false,
            is_flushed: true,
            in_a_row: 0,
            lines: None,
            progress: None,
            outbox: None,
            before: Bytes::new(),
            _guard: None,
        }
    }

    /// One of which this was taken already. It is read from a stream of HTTP/2 as if it came from there, which
    /// gives its room back.
    pub(in crate::proxy) fn begun(mut self, first: Bytes) -> Self {
        match &mut self.kind {
            Kind::Tunnel(tunnel) => tunnel.received = first,
            Kind::Socket(_) | Kind::Channel(_) | Kind::Application(_) => self.first = first,
        }
        self
    }

    /// Who is at its other end, if that is who answers.
    pub(super) fn answerer(&self) -> Answerer {
        self.answerer.clone()
    }

    /// Ends when the connection has failed, whether anybody reads from it or not.
    pub(super) fn failure(&self) -> BoxFuture<'static, ()> {
        match &self.kind {
            Kind::Socket(socket) => {
                let socket = Arc::clone(socket);
                Box::pin(async move { socket.failed().await })
            }
            Kind::Channel(channel) => match channel.io.as_ref().and_then(ChannelIo::socket) {
                Some(socket) => Box::pin(async move { failed(&socket).await }),
                None => Box::pin(std::future::pending()),
            },
            // A reset is seen by whoever writes.
            Kind::Tunnel(_) | Kind::Application(_) => Box::pin(std::future::pending()),
        }
    }

    /// How many headers there may be in a head of HTTP/1 that is read from it.
    pub(super) fn most_headers(&self) -> usize {
        match &self.kind {
            Kind::Socket(_) => MOST_HEADERS,
            Kind::Application(_) | Kind::Channel(_) | Kind::Tunnel(_) => MOST_RELAYED_HEADERS,
        }
    }

    /// Its other end, if that is an application.
    pub(super) fn far_end(&self) -> FarEnd {
        let socket = match &self.kind {
            Kind::Socket(socket) => Some(socket),
            Kind::Application(application) => application.socket(),
            Kind::Channel(_) | Kind::Tunnel(_) => None,
        };
        FarEnd::new(socket, self.answerer())
    }

    /// Tells whether its other end has said all that it has to say, whether anybody reads from it or not; of one that
    /// does not come from another application, never.
    pub(super) fn half(&self) -> Half {
        match &self.kind {
            Kind::Socket(socket) => Half(Some(Arc::clone(socket))),
            Kind::Channel(_) | Kind::Tunnel(_) | Kind::Application(_) => Half(None),
        }
    }

    /// Acknowledges at once what is read. In HTTP/2 both sides say small things on the side, and a sender that
    /// holds back the next one until then (RFC 896) would wait for as long as acknowledgements are
    /// put off, 40 ms.
    pub(super) fn acknowledging(mut self) -> Self {
        self.acknowledges = true;
        self
    }

    /// Takes no lone LF for the end of a line in requests of HTTP/1.
    pub(super) fn strict(mut self) -> Self {
        self.lines = Some(Lines::default());
        self
    }

    /// Says what is in the outbox whenever all has left that was written.
    pub(super) fn saying_before(mut self, outbox: Outbox) -> Self {
        self.outbox = Some(outbox);
        self
    }

    /// Tells what is read.
    pub(super) fn watched(mut self, progress: Arc<Progress>) -> Self {
        self.progress = Some(progress);
        self
    }

    /// Drops the guard with it.
    pub(super) fn guarded(mut self, guard: DropGuard) -> Self {
        self._guard = Some(guard);
        self
    }

    /// Counts its bytes; those that are read from it come from `side`.
    pub(in crate::proxy) fn metered(mut self, moved: Arc<Moved>, side: Side) -> Self {
        self.meter = Some((moved, side));
        self
    }

    /// Says what is to be said before anything else is.
    fn poll_before(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.before.is_empty() {
            let slices = [IoSlice::new(&self.before)];
            let count = ready!(self.kind.poll_write(context, &slices))?;
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.before.advance(count);
            self.count(count, false);
            self.is_flushed = false;
        }
        Poll::Ready(Ok(()))
    }

    /// Once it is known that an application speaks the version, there is nothing between.
    fn settle(&mut self) {
        if let Kind::Application(application) = &self.kind
            && let Some(socket) = application.settled()
        {
            self.kind = Kind::Socket(socket);
        }
    }

    fn count(&self, bytes: usize, read: bool) {
        if let Some((moved, side)) = &self.meter {
            let from = if read { *side } else { side.other() };
            moved.way(from).add(bytes);
        }
    }
}

impl Kind {
    fn poll_write(
        &mut self,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self {
            Self::Socket(socket) => socket.poll_write_vectored(context, slices),
            Self::Application(application) => application.poll_write_vectored(context, slices),
            Self::Channel(ChannelStream { io: Some(io), .. }) => {
                Pin::new(io).poll_write_vectored(context, slices)
            }
            Self::Channel(_) => Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
            Self::Tunnel(tunnel) => {
                let first = slices.iter().find(|it| !it.is_empty());
                tunnel.poll_write(context, first.map_or(&[], |it| it))
            }
        }
    }
}

impl Returned {
    /// The connection, once the peer has ended its side too. What was said last would be lost with one that is
    /// dropped before.
    pub(in crate::proxy) async fn ended(&self) -> Option<Box<Channel>> {
        let mut io = self.left().io.take()?;
        let ending = async {
            let mut trash = [0; 1024];
            // A peer that is gone has ended too.
            while io.read(&mut trash).await.is_ok_and(|count| count > 0) {}
        };
        let _ = tokio::time::timeout(END_PATIENCE, ending).await;
        io.into_channel()
    }

    /// Whether there is something to wait for.
    pub(in crate::proxy) fn is_some(&self) -> bool {
        self.left().io.is_some()
    }

    /// What the peer did wrong, if it did.
    pub(in crate::proxy) fn fault(&self) -> Option<weft1::Error> {
        self.left().fault.take()
    }

    fn left(&self) -> MutexGuard<'_, Left> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.in_a_row >= MOST_IN_A_ROW {
            // Of what costs little to send, such as interim answers or digits, that is a lot of work, and
            // whoever is to take it has to be let to.
            self.in_a_row = 0;
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        let before = buffer.filled().len();
        let this = &mut *self;
        let read = match &mut this.kind {
            _ if !this.first.is_empty() => {
                let count = this.first.len().min(buffer.remaining());
                buffer.put_slice(&this.first[..count]);
                this.first.advance(count);
                if this.first.is_empty() {
                    // Its room is of no use any more.
                    this.first = Bytes::new();
                }
                Poll::Ready(Ok(()))
            }
            Kind::Application(application) => application.poll_read(context, buffer),
            Kind::Socket(socket) => socket.poll_read(context, buffer),
            Kind::Channel(channel) => match &mut channel.io {
                Some(io) => Pin::new(io).poll_read(context, buffer),
                None => Poll::Ready(Ok(())),
            },
            Kind::Tunnel(tunnel) => tunnel.poll_read(context, buffer),
        };
        let count = buffer.filled().len() - before;
        self.settle();
        self.in_a_row = if read.is_ready() {
            self.in_a_row + count
        } else {
            0
        };
        if count > 0 {
            if self.acknowledges
                && let Kind::Socket(socket) = &self.kind
            {
                socket.acknowledge();
            }
            self.count(count, true);
            let this = &mut *self;
            if let Some(lines) = &mut this.lines {
                let read = buffer.filled_mut().get_mut(before..).unwrap_or_default();
                let progress = this.progress.as_deref();
                lines.look(read, || {
                    progress.map_or(Switching::Open, Progress::switching)
                });
            }
            if let Some(progress) = &self.progress {
                progress.read.fetch_add(count as u64, Ordering::Relaxed);
            }
        }
        read
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(context, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_before(context))?;
        let count = ready!(self.kind.poll_write(context, slices))?;
        self.count(count, false);
        self.is_flushed = false;
        Poll::Ready(Ok(count))
    }

    fn is_write_vectored(&self) -> bool {
        !matches!(self.kind, Kind::Tunnel(_))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_before(context))?;
        if let Some(heads) = self.outbox.as_ref().and_then(Outbox::take) {
            self.before = heads.into();
            ready!(self.poll_before(context))?;
        }
        match &mut self.kind {
            Kind::Channel(ChannelStream { io: Some(io), .. }) => {
                ready!(Pin::new(io).poll_flush(context))?;
            }
            Kind::Application(application) => ready!(application.poll_flush(context))?,
            _ => {}
        }
        self.is_flushed = true;
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.ended {
            return Poll::Ready(Ok(()));
        }
        match &mut self.kind {
            Kind::Socket(socket) => socket.end()?,
            Kind::Application(application) => ready!(application.poll_end(context))?,
            Kind::Channel(ChannelStream { io: Some(io), .. }) => {
                ready!(Pin::new(io).poll_shutdown(context))?;
            }
            Kind::Channel(_) => {}
            Kind::Tunnel(tunnel) => ready!(tunnel.poll_end(context))?,
        }
        self.ended = true;
        Poll::Ready(Ok(()))
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // After an upgrade that was declined HTTP drops a connection instead of closing it.
        let is_over = self.progress.as_ref();
        let is_over = self.is_flushed && is_over.is_some_and(|it| it.is_over());
        match &mut self.kind {
            Kind::Socket(socket) => {
                if self.ended || is_over {
                    socket.close_in_order();
                }
            }
            Kind::Application(application) => {
                if self.ended
                    && let Some(socket) = application.socket()
                {
                    socket.close_in_order();
                }
            }
            // It knows itself.
            Kind::Channel(_) => {}
            // What is left to be received ends by itself.
            Kind::Tunnel(_) if self.ended => {}
            Kind::Tunnel(_) if is_over => {
                let gone = ChannelStream::gone();
                if let (Ok(runtime), Kind::Tunnel(mut tunnel)) = (
                    Handle::try_current(),
                    std::mem::replace(&mut self.kind, Kind::Channel(gone)),
                ) {
                    runtime.spawn(async move {
                        let ending = poll_fn(|context| tunnel.poll_end(context));
                        let _ = tokio::time::timeout(END_PATIENCE, ending).await;
                    });
                }
            }
            Kind::Tunnel(tunnel) => tunnel.send.send_reset(Reason::CANCEL),
        }
    }
}

#[derive(Debug)]
struct ChannelStream {
    io: Option<ChannelIo>,
    returned: Returned,
}

impl ChannelStream {
    /// Nothing is left of it.
    fn gone() -> Self {
        Self {
            io: None,
            returned: Returned::default(),
        }
    }
}

impl Drop for ChannelStream {
    fn drop(&mut self) {
        if let Some(mut io) = self.io.take() {
            let mut left = self.returned.left();
            left.fault = io.take_fault();
            if io.has_said_all() {
                left.io = Some(io);
            }
        }
    }
}

struct TunnelStream {
    send: SendStream<Chunk>,
    receive: RecvStream,
    received: Bytes,
    queue: Queue,
    /// Ends when all that was to be sent has been.
    emptied: Option<BoxFuture<'static, ()>>,
}

impl fmt::Debug for TunnelStream {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("TunnelStream")
    }
}

impl TunnelStream {
    /// Ends this side, and waits until all of it has left: HTTP/2 throws away what is queued when a stream
    /// is dropped.
    fn poll_end(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let emptied = match &mut self.emptied {
            Some(emptied) => emptied,
            None => {
                let end = self.queue.chunk(Bytes::new());
                self.send.send_data(end, true).map_err(tunnel_error)?;
                let queue = self.queue.clone();
                let emptied = Box::pin(async move { queue.empty().await });
                self.emptied.insert(emptied)
            }
        };
        emptied.as_mut().poll(context).map(Ok)
    }

    fn poll_read(
        &mut self,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        while self.received.is_empty() {
            match ready!(self.receive.poll_data(context)) {
                None => return Poll::Ready(Ok(())),
                Some(chunk) => self.received = chunk.map_err(tunnel_error)?,
            }
        }
        let count = self.received.len().min(buffer.remaining());
        buffer.put_slice(&self.received[..count]);
        self.received.advance(count);
        let room = self.receive.flow_control().release_capacity(count);
        Poll::Ready(room.map_err(tunnel_error))
    }

    fn poll_write(&mut self, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if bytes.is_empty() {
            return Poll::Ready(Ok(0));
        }
        if let Poll::Ready(reason) = self.send.poll_reset(context) {
            let reason = reason.map_err(tunnel_error)?;
            return Poll::Ready(Err(tunnel_error(reason.into())));
        }
        self.send.reserve_capacity(bytes.len().min(MOST_AT_ONCE));
        while self.send.capacity() == 0 {
            match ready!(self.send.poll_capacity(context)) {
                Some(room) => room.map_err(tunnel_error)?,
                None => return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
            };
        }
        let count = self.send.capacity().min(bytes.len());
        let chunk = self.queue.chunk(Bytes::copy_from_slice(&bytes[..count]));
        self.send.send_data(chunk, false).map_err(tunnel_error)?;
        Poll::Ready(Ok(count))
    }
}

fn tunnel_error(error: h2::Error) -> io::Error {
    if error.is_reset() {
        io::Error::new(io::ErrorKind::ConnectionReset, error)
    } else {
        io::Error::other(error)
    }
}

/// How long a peer may take to end its side of a flow: it does so when it looks at the connection, at
/// least once in a second.
const END_PATIENCE: Duration = Duration::from_secs(5);
/// Bytes that are read before others have their turn.
const MOST_IN_A_ROW: usize = 256 * 1024;
/// The most that is put into HTTP/2's queue in one piece.
const MOST_AT_ONCE: usize = 64 * 1024;
