//! Moving bytes between an application's socket and what it is joined with: another socket, or a
//! stream of a tunnel.
//!
//! What the applications would see without a mesh they see here: half-close crosses as half-close,
//! a reset as a reset, and a reader that does not read stops its writer. Both directions of a flow
//! are one future in one task. An idle flow holds no buffer: bytes are read into a buffer of the
//! worker thread, and only what could not be passed on at once is kept, up to
//! [`LARGEST_READ_BYTES`] per direction.

mod inflow;
mod sockets;

use std::cell::RefCell;
use std::future::{Future, poll_fn};
use std::io;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use h2::{Reason, RecvStream, SendStream};
use socket2::SockRef;
use tokio::io::{AsyncRead, Interest, ReadBuf};
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};

use inflow::Inflow;
pub use sockets::join_sockets;

use super::tunnel::FRAME_BYTES;
use super::tunnel::chunk::{Chunk, Queue};
use super::tunnel::weft1;
use super::usage::{Kept, Usage};
use crate::telemetry::{FlowHandle, Peer};

/// A socket whose other side sees a reset unless the flow ended as it should.
///
/// The socket is told to reset on close from the beginning, so that even the death of this process
/// is no clean end: a truncated answer must not look complete.
#[derive(Debug)]
pub struct FlowSocket(TcpStream);

/// Bytes moved so far, in the flow's own counters and in the metrics that it belongs to.
#[derive(Debug, Default)]
pub struct Moved {
    sent: AtomicU64,
    received: AtomicU64,
    meters: Vec<FlowHandle>,
    /// Of the pod that answers for what is kept.
    usage: Option<Arc<Usage>>,
}

/// One direction of a flow's bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Way<'a> {
    moved: &'a Moved,
    from: Side,
}

/// One of the two sides of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The application that connected.
    Client,
    /// The application that was connected to, or the tunnel that leads there.
    Server,
}

/// Why a flow ended otherwise than by both sides closing.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    /// A side reset the connection.
    #[error("reset by the {0:?}")]
    Reset(Side),
    /// Reading or writing a socket failed.
    #[error("the {0:?}'s connection failed: {1}")]
    Socket(Side, #[source] io::Error),
    /// The tunnel failed.
    #[error("the tunnel failed: {0}")]
    Tunnel(#[source] h2::Error),
    /// The tunnel failed.
    #[error("the tunnel failed: {0}")]
    Weft(#[source] weft1::Error),
    /// A receiver has no room, and the pod or the node keeps as much as it may.
    #[error("too many bytes are kept for receivers that do not read")]
    TooManyBytes,
}

/// Both halves of a tunnel's stream.
#[derive(Debug)]
pub struct TunnelHalves {
    /// Towards the other agent.
    pub send: SendStream<Chunk>,
    /// From the other agent.
    pub receive: RecvStream,
    /// What was taken from there already, and not given back as room.
    pub first: Bytes,
}

/// Copies between an application's socket and a tunnel's stream until both sides closed.
/// `socket_side` says which of the two the socket is.
///
/// # Errors
/// [`Broken`]; both sides have then been reset.
pub async fn join_tunnel(
    mut socket: FlowSocket,
    socket_side: Side,
    tunnel: TunnelHalves,
    moved: &Moved,
) -> Result<(), Broken> {
    let TunnelHalves {
        mut send,
        receive,
        first,
    } = tunnel;
    let into_tunnel = moved.way(socket_side);
    let from_tunnel = moved.way(socket_side.other());
    let queue = Queue::default();
    let result = {
        let (read, write) = socket.0.split();
        let sent_all = AtomicBool::new(false);
        let received_all = AtomicBool::new(false);
        let outgoing = (&mut send, &queue);
        let up = pin!(socket_to_tunnel(
            read,
            socket_side,
            outgoing,
            into_tunnel,
            &sent_all
        ));
        let done = (&received_all, &sent_all);
        let down = pin!(tunnel_to_socket(
            (receive, first),
            write,
            socket_side,
            from_tunnel,
            done
        ));
        // From the tunnel first: what arrived before a reset is passed on before the reset is seen.
        until_both(down, &received_all, up, &sent_all).await
    };
    match &result {
        Ok(()) => socket.close(),
        Err(_) => {
            let sent = queue.empty();
            let _ = tokio::time::timeout(RESET_DELAY, sent).await;
            send.send_reset(Reason::CANCEL);
        }
    }
    result
}

impl FlowSocket {
    /// Takes a connected socket: sends small writes at once, notices a dead peer, resets unless
    /// closed.
    ///
    /// # Errors
    /// The socket does not take the options.
    pub fn new(socket: TcpStream) -> io::Result<Self> {
        prepare_flows(&socket)?;
        Ok(Self(socket))
    }

    /// The same for a connection that stays in the kernel: a peer cannot vanish from it without a
    /// word, so none is looked for.
    ///
    /// # Errors
    /// As of [`Self::new`].
    pub fn near(socket: TcpStream) -> io::Result<Self> {
        let options = SockRef::from(&socket);
        options.set_tcp_nodelay(true)?;
        options.set_linger(Some(Duration::ZERO))?;
        Ok(Self(socket))
    }

    /// Takes a connection of a listener that has the options already ([`prepare_flows`]), as what is
    /// accepted inherits them.
    pub fn accepted(socket: TcpStream) -> Self {
        Self(socket)
    }

    /// The same socket, of which is told again what there is to be read: who only looked at it, and waited for
    /// more, has been told already.
    ///
    /// # Errors
    /// The runtime does not take it.
    pub(super) fn anew(self) -> io::Result<Self> {
        TcpStream::from_std(self.0.into_std()?).map(Self)
    }

    /// Ends when the socket was reset, whatever is still to be read from it.
    pub async fn failed(&self) {
        failed(&self.0).await;
    }

    /// The socket.
    pub fn socket(&self) -> &TcpStream {
        &self.0
    }

    /// Reads.
    pub(super) fn poll_read(
        &self,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            ready!(self.0.poll_read_ready(context))?;
            let room = buffer.initialize_unfilled();
            let read = once(&self.0, Interest::READABLE, |mut socket| {
                let wanted = room.len();
                io::Read::read(&mut socket, room).map(|count| (count, count < wanted))
            })?;
            if let Some(count) = read {
                buffer.advance(count);
                return Poll::Ready(Ok(()));
            }
        }
    }

    /// Writes some buffers at once.
    pub(super) fn poll_write_vectored(
        &self,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.0.poll_write_ready(context))?;
            match self.0.try_write_vectored(slices) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                other => return Poll::Ready(other),
            }
        }
    }

    /// Writes all of it, before anything else is.
    pub(super) async fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        tokio::io::AsyncWriteExt::write_all(&mut self.0, bytes).await
    }

    /// Says that nothing more comes.
    pub(super) fn end(&self) -> io::Result<()> {
        end_of(&self.0)
    }

    /// Closes in order.
    pub(super) fn close(self) {
        self.close_in_order();
    }

    /// Tells the sender at once what has arrived, until something is sent.
    pub(super) fn acknowledge(&self) {
        // Without it the sender waits a little longer.
        let _ = SockRef::from(&self.0).set_tcp_quickack(true);
    }

    /// Whoever drops it now closes it in order.
    pub(super) fn close_in_order(&self) {
        // Failing leaves the reset on close; the bytes that are still queued would be lost, which
        // the peer then sees.
        let _ = SockRef::from(&self.0).set_linger(None);
    }
}

impl Moved {
    /// Counts in these metrics as well, and what is kept as the pod's.
    pub fn metered(meters: Vec<FlowHandle>, usage: &Arc<Usage>) -> Self {
        Self {
            meters,
            usage: Some(Arc::clone(usage)),
            ..Self::default()
        }
    }

    /// The bytes so far, of a flow that somebody else still holds.
    pub fn snapshot(&self) -> Self {
        Self {
            sent: self.sent().into(),
            received: self.received().into(),
            ..Self::default()
        }
    }

    /// Whether it counts in any metrics.
    pub fn is_metered(&self) -> bool {
        !self.meters.is_empty()
    }

    /// Counts in this metric too.
    pub fn meter_too(&mut self, meter: FlowHandle) {
        self.meters.push(meter);
    }

    /// Bytes from the client to the server.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Bytes from the server to the client.
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// The bytes that come from a side.
    pub(super) fn way(&self, from: Side) -> Way<'_> {
        Way { moved: self, from }
    }
}

impl Way<'_> {
    /// What this direction keeps: nothing yet.
    pub(super) fn kept(&self) -> Kept {
        Kept::new(self.moved.usage.as_ref())
    }

    /// Whether to read in small steps.
    pub(super) fn is_tight(&self) -> bool {
        self.moved.usage.as_ref().is_some_and(|it| it.is_tight())
    }

    /// Counts some.
    pub(super) fn add(&self, count: usize) {
        let count = count as u64;
        let (own, from, to) = match self.from {
            Side::Client => (&self.moved.sent, Peer::Source, Peer::Destination),
            Side::Server => (&self.moved.received, Peer::Destination, Peer::Source),
        };
        own.fetch_add(count, Ordering::Relaxed);
        for meter in &self.moved.meters {
            meter.peer(from).read(count);
            meter.peer(to).write(count);
        }
    }
}

impl Side {
    /// The other one.
    pub fn other(self) -> Self {
        match self {
            Self::Client => Self::Server,
            Self::Server => Self::Client,
        }
    }
}

impl Broken {
    pub(super) fn socket(side: Side, error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => Self::Reset(side),
            _ => Self::Socket(side, error),
        }
    }

    fn tunnel(side: Side, error: h2::Error) -> Self {
        if error.is_reset() {
            Self::Reset(side)
        } else {
            Self::Tunnel(error)
        }
    }
}

/// Lets a socket, or what a listener accepts, send small writes at once and notice a dead peer.
///
/// # Errors
/// The socket does not take the options.
pub fn prepare(socket: &impl AsFd) -> io::Result<()> {
    let options = SockRef::from(socket);
    options.set_tcp_nodelay(true)?;
    options.set_tcp_keepalive(&KEEPALIVE)
}

/// The same, and lets it reset unless closed: all that a [`FlowSocket`] must have.
///
/// # Errors
/// As of [`prepare`].
pub fn prepare_flows(socket: &impl AsFd) -> io::Result<()> {
    prepare(socket)?;
    SockRef::from(socket).set_linger(Some(Duration::ZERO))
}

/// Polls both directions in one task. A direction that is done goes on watching for resets, so it
/// is its flag that counts, not its end.
async fn until_both(
    mut one: Pin<&mut impl Future<Output = Result<(), Broken>>>,
    one_is_done: &AtomicBool,
    mut other: Pin<&mut impl Future<Output = Result<(), Broken>>>,
    other_is_done: &AtomicBool,
) -> Result<(), Broken> {
    let (mut one_ended, mut other_ended) = (false, false);
    poll_fn(|context| {
        if !one_ended && let Poll::Ready(result) = one.as_mut().poll(context) {
            one_ended = true;
            result?;
        }
        if !other_ended && let Poll::Ready(result) = other.as_mut().poll(context) {
            other_ended = true;
            result?;
        }
        if one_is_done.load(Ordering::Relaxed) && other_is_done.load(Ordering::Relaxed) {
            Poll::Ready(Ok(()))
        } else {
            Poll::Pending
        }
    })
    .await
}

async fn socket_to_tunnel(
    mut read: ReadHalf<'_>,
    side: Side,
    (send, queue): (&mut SendStream<Chunk>, &Queue),
    way: Way<'_>,
    done: &AtomicBool,
) -> Result<(), Broken> {
    let mut size = ReadSize::default();
    loop {
        poll_fn(|context| {
            if let Poll::Ready(broken) = poll_tunnel_reset(send, side.other(), context) {
                return Poll::Ready(Err(broken));
            }
            read.as_ref()
                .poll_read_ready(context)
                .map_err(|error| Broken::socket(side, error))
        })
        .await?;
        size.at_most(way);
        if way.is_tight() {
            queue.empty().await;
        } else {
            queue.has_room().await;
        }
        // Room is asked for only when there is something to send: a stream that holds room it does
        // not use takes it from the others of its connection.
        send.reserve_capacity(size.bytes());
        let room = match send.capacity() {
            0 => tokio::select! {
                biased;
                room = capacity(send) => room.map_err(|error| Broken::tunnel(side.other(), error))?,
                () = Box::pin(failed(read.as_ref())) => return Err(Broken::Reset(side)),
            },
            room => room,
        };
        match poll_fn(|context| Poll::Ready(read_chunk(&mut read, room, &mut size, context))).await
        {
            Poll::Pending => {}
            Poll::Ready(Err(error)) => return Err(Broken::socket(side, error)),
            Poll::Ready(Ok(chunk)) if chunk.is_empty() => break,
            Poll::Ready(Ok(chunk)) => {
                way.add(chunk.len());
                send.send_data(queue.chunk(chunk), false)
                    .map_err(|error| Broken::tunnel(side.other(), error))?;
            }
        }
        send.reserve_capacity(0);
    }
    send.send_data(Chunk::default(), true)
        .map_err(|error| Broken::tunnel(side.other(), error))?;
    done.store(true, Ordering::Relaxed);
    tokio::select! {
        () = Box::pin(failed(read.as_ref())) => Err(Broken::Reset(side)),
        broken = poll_fn(|context| poll_tunnel_reset(send, side.other(), context)) => Err(broken),
    }
}

/// Reads what is there, at most `room` bytes: small reads by way of the thread's buffer, so that a
/// message of a few bytes does not keep kilobytes until it is sent.
fn read_chunk(
    read: &mut ReadHalf<'_>,
    room: usize,
    size: &mut ReadSize,
    context: &mut Context<'_>,
) -> Poll<io::Result<Bytes>> {
    let most = room.min(size.bytes());
    let chunk = if most <= SMALL_READ_BYTES {
        SCRATCH.with_borrow_mut(|scratch| {
            let mut buffer = ReadBuf::new(&mut scratch[..most]);
            ready!(Pin::new(read).poll_read(context, &mut buffer))?;
            Poll::Ready(io::Result::Ok(Bytes::copy_from_slice(buffer.filled())))
        })
    } else {
        let mut chunk = BytesMut::zeroed(most);
        let mut buffer = ReadBuf::new(&mut chunk);
        ready!(Pin::new(read).poll_read(context, &mut buffer))?;
        let filled = buffer.filled().len();
        chunk.truncate(filled);
        Poll::Ready(Ok(chunk.freeze()))
    };
    let chunk = ready!(chunk)?;
    if most == size.bytes() {
        size.was_read(chunk.len());
    }
    Poll::Ready(Ok(chunk))
}

async fn tunnel_to_socket(
    (receive, first): (RecvStream, Bytes),
    mut write: WriteHalf<'_>,
    side: Side,
    way: Way<'_>,
    (done, other_done): (&AtomicBool, &AtomicBool),
) -> Result<(), Broken> {
    let mut inflow = Inflow::new(receive, first, way.kept());
    poll_fn(|context| inflow.poll(&mut write, side, way, context)).await?;
    end_unless_last(write.as_ref(), other_done.load(Ordering::Relaxed))
        .map_err(|error| Broken::socket(side, error))?;
    done.store(true, Ordering::Relaxed);
    Ok(())
}

/// Waits until the stream may send, and says how much.
async fn capacity(send: &mut SendStream<Chunk>) -> Result<usize, h2::Error> {
    loop {
        let room = send.capacity();
        if room > 0 {
            return Ok(room);
        }
        match poll_fn(|context| send.poll_capacity(context)).await {
            Some(Ok(_)) => {}
            Some(Err(error)) => return Err(error),
            None => return Err(Reason::CANCEL.into()),
        }
    }
}

fn poll_tunnel_reset(
    send: &mut SendStream<Chunk>,
    side: Side,
    context: &mut Context<'_>,
) -> Poll<Broken> {
    send.poll_reset(context).map(|result| match result {
        Ok(_) => Broken::Reset(side),
        Err(error) => Broken::tunnel(side, error),
    })
}

/// Ends when the socket has an error, which for a connection means that it was reset or timed out;
/// unlike reading, this does not depend on room for what is read.
pub(super) async fn failed(socket: &TcpStream) {
    loop {
        match socket.ready(Interest::ERROR).await {
            Ok(ready) if !ready.is_error() => {}
            Ok(_) | Err(_) => return,
        }
    }
}

/// Ends the direction into a socket. The one that ends last needs no word of its own: the socket is
/// closed at once, which says so too.
pub(super) fn end_unless_last(socket: &TcpStream, other_done: bool) -> io::Result<()> {
    if other_done {
        return Ok(());
    }
    end_of(socket)
}

/// A watch on a socket's failure, made when it is first needed.
pub(super) type Failure<'a> = Option<Pin<Box<dyn Future<Output = ()> + Send + 'a>>>;

/// Ready when the socket has an error: [`failed`].
pub(super) fn poll_failed<'a>(
    watch: &mut Failure<'a>,
    socket: &'a TcpStream,
    context: &mut Context<'_>,
) -> Poll<()> {
    let watch = watch.get_or_insert_with(|| Box::pin(failed(socket)));
    watch.as_mut().poll(context)
}

fn end_of(socket: &TcpStream) -> io::Result<()> {
    match SockRef::from(socket).shutdown(Shutdown::Write) {
        // The peer has reset already; reading says so too.
        Err(error) if error.kind() == io::ErrorKind::NotConnected => {
            Err(io::ErrorKind::ConnectionReset.into())
        }
        other => other,
    }
}

/// One read or write. `operation` says how many bytes and whether that was all the socket had or
/// took; then the next one waits for the socket instead of finding that out. None: it would block.
pub(super) fn once(
    stream: &TcpStream,
    interest: Interest,
    operation: impl FnOnce(&socket2::Socket) -> io::Result<(usize, bool)>,
) -> io::Result<Option<usize>> {
    let mut count = None;
    let result = stream.try_io(interest, || {
        let (moved, was_all) = operation(&SockRef::from(stream))?;
        count = Some(moved);
        if was_all && moved > 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(())
    });
    match result {
        Ok(()) => Ok(count),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(count),
        Err(error) => Err(error),
    }
}

/// Lets others have the thread after so many turns.
pub(super) fn yield_now(turns: &mut usize, context: &mut Context<'_>) -> Poll<()> {
    match turns.checked_sub(1) {
        Some(left) => {
            *turns = left;
            Poll::Ready(())
        }
        None => {
            context.waker().wake_by_ref();
            Poll::Pending
        }
    }
}

/// How much to read at once: grows while reads fill it, falls back when they do not.
#[derive(Debug)]
struct ReadSize {
    bytes: usize,
    poor_reads: u8,
}

impl Default for ReadSize {
    fn default() -> Self {
        Self {
            bytes: SMALLEST_READ_BYTES,
            poor_reads: 0,
        }
    }
}

impl ReadSize {
    fn bytes(&self) -> usize {
        self.bytes
    }

    /// Starts anew where the pod should keep little.
    fn at_most(&mut self, way: Way<'_>) {
        if self.bytes > SMALLEST_READ_BYTES && way.is_tight() {
            *self = Self::default();
        }
    }

    fn was_read(&mut self, count: usize) {
        if count == self.bytes {
            self.bytes = (self.bytes * 2).min(LARGEST_READ_BYTES);
            self.poor_reads = 0;
        } else if count < self.bytes / 4 {
            self.poor_reads += 1;
            if self.poor_reads == POOR_READS_TO_SHRINK {
                self.bytes = (self.bytes / 2).max(SMALLEST_READ_BYTES);
                self.poor_reads = 0;
            }
        } else {
            self.poor_reads = 0;
        }
    }
}

thread_local! {
    static SCRATCH: RefCell<Box<[u8]>> =
        RefCell::new(vec![0; LARGEST_READ_BYTES].into_boxed_slice());
}

/// The most that is read at once, and so the most that a direction keeps while its receiver has no
/// room.
pub const LARGEST_READ_BYTES: usize = 4 * FRAME_BYTES as usize;
/// Reads of a flow before others have the thread. Large ones take some 80 µs each.
pub(super) const TURNS: usize = 2;
const SMALLEST_READ_BYTES: usize = 4 * 1024;
const SMALL_READ_BYTES: usize = 8 * 1024;
const POOR_READS_TO_SHRINK: u8 = 4;
/// How long a reset may wait for the bytes that were sent before it.
const RESET_DELAY: Duration = Duration::from_secs(1);

/// A peer that vanished without a word is noticed after about two minutes.
const KEEPALIVE: socket2::TcpKeepalive = socket2::TcpKeepalive::new()
    .with_time(Duration::from_secs(60))
    .with_interval(Duration::from_secs(15))
    .with_retries(4);

#[cfg(test)]
pub(crate) mod tests;
