//! Copying between an application's socket and a channel, as few system calls and copies as there can
//! be: bytes are read into the places that they have in TLS's records, sealed there, and written; and
//! opened where they were received, and written from there.
//!
//! A flow that waits holds no buffer. What could not be passed on at once is kept, at most
//! [`super::buffer::BUFFER_BYTES`] per direction, and nothing more is read.

use std::future::poll_fn;
use std::io::{self, IoSlice, Read, Write};
use std::ops::Range;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use socket2::SockRef;
use tokio::io::Interest;
use tokio::net::TcpStream;

use super::Error;
use super::buffer::RECORDS;
use super::channel::{Channel, Heard};
use super::frame::{END_FRAME, Event};
use crate::proxy::tcp::{
    Broken, FlowSocket, Moved, Side, TURNS, Way, end_unless_last, once, poll_failed, yield_now,
};
use crate::proxy::usage::Kept;

/// Copies until both sides closed; the channel can then take the next flow. `early` bytes of the
/// application have been sent already and are still in its socket.
///
/// # Errors
/// [`Broken`]; both sides have then been reset.
pub async fn join(
    socket: FlowSocket,
    side: Side,
    mut channel: Box<Channel>,
    moved: &Moved,
    early: usize,
) -> Result<Box<Channel>, Broken> {
    let result = match skip(socket.socket(), early) {
        Ok(()) => {
            let into_tunnel = moved.way(side);
            into_tunnel.add(early);
            let mut copying = Copying {
                socket: socket.socket(),
                side,
                channel: &mut channel,
                into_tunnel,
                from_tunnel: moved.way(side.other()),
                size: ReadSize::default(),
                read_ended: false,
                sent_all: false,
                peer_ended: false,
                received_all: false,
                places: Places::default(),
                kept: into_tunnel.kept(),
            };
            copying.run().await
        }
        Err(error) => Err(Broken::socket(side, error)),
    };
    match result {
        Ok(()) => {
            socket.close();
            Ok(channel)
        }
        Err(broken) => {
            // The application first: its peer is gone, whatever is still to be sent there.
            drop(socket);
            abort(channel).await;
            Err(broken)
        }
    }
}

/// Ends a connection in the middle of a flow: what was said before is sent, as far as the peer takes
/// it within a moment, and then nothing, which only a frame's end would make a good end.
pub async fn abort(mut channel: Box<Channel>) {
    let farewell = async {
        poll_fn(|context| channel.poll_flush(context)).await?;
        let socket = &*channel.socket;
        SockRef::from(socket)
            .shutdown(std::net::Shutdown::Write)
            .map_err(Error::Socket)?;
        let mut trash = vec![0; TRASH_BYTES];
        loop {
            let read = socket.async_io(Interest::READABLE, || {
                Read::read(&mut &*SockRef::from(socket), &mut trash)
            });
            if read.await.map_err(Error::Socket)? == 0 {
                return Ok::<(), Error>(());
            }
        }
    };
    let _ = tokio::time::timeout(RESET_DELAY, farewell).await;
    channel.reset();
}

struct Copying<'a> {
    socket: &'a TcpStream,
    side: Side,
    channel: &'a mut Channel,
    into_tunnel: Way<'a>,
    from_tunnel: Way<'a>,
    size: ReadSize,
    /// The application has closed.
    read_ended: bool,
    /// And the peer has been told.
    sent_all: bool,
    /// The peer has said that its application has closed.
    peer_ended: bool,
    /// And ours has been told.
    received_all: bool,
    /// What was heard and the application has not taken.
    places: Places,
    /// What the channel's buffers are counted as while this waits.
    kept: Kept,
}

impl Copying<'_> {
    async fn run(&mut self) -> Result<(), Broken> {
        let tunnel = Arc::clone(&self.channel.socket);
        // Made only where they are looked at: not in a flow that waits for either side.
        let mut socket_failed = None;
        let mut tunnel_failed = None;
        poll_fn(|context| {
            // From the tunnel first: what arrived before a reset is passed on before the reset is
            // seen. Turns of its own: one way that is always busy does not keep the other from going.
            if !self.received_all {
                let _ = self.poll_from_tunnel(&mut { TURNS }, context)?;
            }
            let _ = self.poll_into_tunnel(&mut { TURNS }, context)?;
            if self.sent_all && self.received_all {
                return Poll::Ready(Ok(()));
            }
            if self.received_all {
                self.poll_gone(context)?;
            }
            // A side that is not being read is watched for its end in another way.
            if (self.read_ended || self.channel.has_unsent())
                && poll_failed(&mut socket_failed, self.socket, context).is_ready()
            {
                return Poll::Ready(Err(Broken::Reset(self.side)));
            }
            if (self.peer_ended || !self.places.is_empty())
                && poll_failed(&mut tunnel_failed, &tunnel, context).is_ready()
            {
                return Poll::Ready(Err(Broken::Reset(self.side.other())));
            }
            self.kept.set(self.channel.buffered_bytes());
            Poll::Pending
        })
        .await
    }

    fn poll_into_tunnel(
        &mut self,
        turns: &mut usize,
        context: &mut Context<'_>,
    ) -> Poll<Result<(), Broken>> {
        loop {
            let mut waits = false;
            while !self.read_ended && !self.has_enough() {
                match self.socket.poll_read_ready(context) {
                    Poll::Pending => {
                        waits = true;
                        break;
                    }
                    Poll::Ready(ready) => {
                        ready.map_err(|error| Broken::socket(self.side, error))?;
                    }
                }
                self.read()?;
            }
            let flushed = self.channel.poll_flush(context);
            ready!(flushed).map_err(|error| self.broken(error))?;
            if self.read_ended {
                self.sent_all = true;
                return Poll::Ready(Ok(()));
            }
            if waits {
                return Poll::Pending;
            }
            ready!(yield_now(turns, context));
        }
    }

    /// Whether what was read must be sent first: all that is sent at once, or where the pod should
    /// keep little, a single record.
    fn has_enough(&self) -> bool {
        self.channel.is_full() || (self.into_tunnel.is_tight() && self.channel.has_unsent())
    }

    /// Reads what the application has sent into records.
    fn read(&mut self) -> Result<(), Broken> {
        if self.into_tunnel.is_tight() {
            self.size = ReadSize::default();
        }
        let (socket, records) = (self.socket, self.size.records);
        let mut wanted = 0;
        let read = self.channel.say_data(records, |places| {
            wanted = places.iter().map(|it| it.len()).sum();
            once(socket, Interest::READABLE, |mut socket| {
                let count = Read::read_vectored(&mut socket, places)?;
                #[cfg(feature = "faults")]
                crate::faults::read(places.first().map_or(&[], |it| &it[..count.min(it.len())]));
                Ok((count, count < wanted))
            })
        });
        let read = read.map_err(|error| self.broken(error))?;
        match read.map_err(|error| Broken::socket(self.side, error))? {
            None => {}
            Some(0) => {
                self.read_ended = true;
                let said = self.channel.say(&END_FRAME);
                said.map_err(|error| self.broken(error))?;
            }
            Some(count) => {
                self.into_tunnel.add(count);
                self.size.was_read(count, wanted);
            }
        }
        Ok(())
    }

    fn poll_from_tunnel(
        &mut self,
        turns: &mut usize,
        context: &mut Context<'_>,
    ) -> Poll<Result<(), Broken>> {
        loop {
            self.listen()?;
            if !self.places.is_empty() {
                match self.socket.poll_write_ready(context) {
                    Poll::Ready(ready) => {
                        ready.map_err(|error| Broken::socket(self.side, error))?;
                    }
                    Poll::Pending => {
                        if self.from_tunnel.is_tight() {
                            self.shrink();
                        }
                        return Poll::Pending;
                    }
                }
                self.write()?;
                continue;
            }
            if self.peer_ended {
                // After the last direction the socket is closed at once, which says so too.
                if !self.sent_all {
                    end_unless_last(self.socket, self.sent_all)
                        .map_err(|error| Broken::socket(self.side, error))?;
                }
                self.received_all = true;
                self.channel.shrink_inbox();
                return Poll::Ready(Ok(()));
            }
            ready!(yield_now(turns, context));
            let is_tight = self.from_tunnel.is_tight();
            match self.channel.poll_receive(is_tight, context) {
                Poll::Ready(received) => received.map_err(|error| self.broken(error))?,
                Poll::Pending => {
                    self.channel.shrink_inbox();
                    return Poll::Pending;
                }
            }
        }
    }

    /// After the peer's end, until our own: there is nothing more to hear but that the connection itself
    /// ends, by which an application is told to be gone that closed while ours was still sending. Whoever
    /// [aborts](abort) goes on taking bytes for a moment, which ours must not believe to be delivered.
    fn poll_gone(&mut self, context: &mut Context<'_>) -> Result<(), Broken> {
        while !self.channel.is_closed() {
            let heard = match self.channel.hear() {
                Ok(None) => match self.channel.poll_receive(true, context) {
                    Poll::Ready(received) => received,
                    Poll::Pending => {
                        self.channel.shrink_inbox();
                        return Ok(());
                    }
                },
                Ok(Some(Heard::Event(Event::Leaving))) => Ok(()),
                // The parser lets nothing else come here.
                Ok(Some(_)) => return Err(self.broken(Error::Closed)),
                Err(error) => Err(error),
            };
            match heard {
                // In order: [`Channel::is_closed`] from now on.
                Ok(()) | Err(Error::Closed) => {}
                Err(error) => return Err(self.broken(error)),
            }
        }
        Ok(())
    }

    /// Takes in what the peer has said, as far as there is place for it.
    fn listen(&mut self) -> Result<(), Broken> {
        while !self.peer_ended && !self.places.is_full() {
            let heard = self.channel.hear();
            match heard.map_err(|error| self.broken(error))? {
                None => return Ok(()),
                Some(Heard::Data(place)) => self.places.push(place, self.channel.bytes_mut()),
                Some(Heard::Event(Event::End)) => self.peer_ended = true,
                // Heeded when the flow is over: by then the connection says so itself.
                Some(Heard::Event(Event::Leaving)) => {}
                // The parser lets nothing else come here.
                Some(Heard::Event(_)) => return Err(self.broken(Error::Closed)),
            }
        }
        Ok(())
    }

    /// Keeps what the application has no room for in as little memory as it needs.
    fn shrink(&mut self) {
        if let Some(used) = self.places.range() {
            let first = used.start;
            if self.channel.shrink_inbox_to(used) {
                self.places.shift(first);
            }
        }
    }

    fn write(&mut self) -> Result<(), Broken> {
        let slices: [IoSlice<'_>; PLACES] = std::array::from_fn(|at| {
            IoSlice::new(match self.places.at(at) {
                Some(place) => self.channel.bytes(place.clone()),
                None => &[],
            })
        });
        let slices = &slices[..self.places.count()];
        let wanted: usize = slices.iter().map(|it| it.len()).sum();
        let written = once(self.socket, Interest::WRITABLE, |mut socket| {
            let count = match slices {
                [one] => Write::write(&mut socket, one)?,
                many => Write::write_vectored(&mut socket, many)?,
            };
            Ok((count, count < wanted))
        });
        let written = written.map_err(|error| Broken::socket(self.side, error))?;
        if let Some(count) = written {
            self.from_tunnel.add(count);
            self.places.advance(count);
        }
        Ok(())
    }

    fn broken(&self, error: Error) -> Broken {
        if error.is_gone() {
            Broken::Reset(self.side.other())
        } else {
            Broken::Weft(error)
        }
    }
}

/// Takes bytes out of a socket in which they are known to be.
fn skip(socket: &TcpStream, mut count: usize) -> io::Result<()> {
    let mut trash = [0; 4096];
    while count > 0 {
        let most = count.min(trash.len());
        match Read::read(&mut &*SockRef::from(socket), &mut trash[..most])? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            read => count -= read,
        }
    }
    Ok(())
}

/// Where in a channel's buffer the bytes are that go next.
struct Places {
    places: [Range<usize>; PLACES],
    first: usize,
    end: usize,
}

impl Default for Places {
    fn default() -> Self {
        Self {
            places: std::array::from_fn(|_| 0..0),
            first: 0,
            end: 0,
        }
    }
}

impl Places {
    fn count(&self) -> usize {
        self.end - self.first
    }

    fn is_empty(&self) -> bool {
        self.first == self.end
    }

    fn is_full(&self) -> bool {
        // Where all were written, the next one begins anew.
        self.end == PLACES && !self.is_empty()
    }

    /// Those that have not been written, from the first on. Behind them are old ones, which mean
    /// nothing any more.
    fn at(&self, number: usize) -> Option<&Range<usize>> {
        self.places[..self.end].get(self.first + number)
    }

    /// From the first to the last of them, as they lie in the buffer.
    fn range(&self) -> Option<Range<usize>> {
        match &self.places[self.first..self.end] {
            [first, .., last] => Some(first.start..last.end),
            [one] => Some(one.clone()),
            [] => None,
        }
    }

    /// The buffer now begins so much later.
    fn shift(&mut self, by: usize) {
        for place in &mut self.places[self.first..self.end] {
            *place = place.start - by..place.end - by;
        }
    }

    /// Short ones are moved behind the last, so that many of them make one.
    fn push(&mut self, place: Range<usize>, buffer: &mut [u8]) {
        if self.is_empty() {
            (self.first, self.end) = (0, 0);
        } else if place.len() < SHORT_BYTES
            && let Some(last) = self.places.get_mut(self.end - 1)
            && last.end <= place.start
        {
            let length = place.len();
            buffer.copy_within(place, last.end);
            last.end += length;
            return;
        }
        if let Some(free) = self.places.get_mut(self.end) {
            *free = place;
            self.end += 1;
        }
    }

    fn advance(&mut self, mut count: usize) {
        for place in &mut self.places[self.first..self.end] {
            let done = count.min(place.len());
            place.start += done;
            count -= done;
            if !Range::is_empty(place) {
                break;
            }
            self.first += 1;
        }
    }
}

/// How many records are read at once: more while reads fill them.
struct ReadSize {
    records: usize,
    poor_reads: u8,
}

impl Default for ReadSize {
    fn default() -> Self {
        Self {
            records: 1,
            poor_reads: 0,
        }
    }
}

impl ReadSize {
    fn was_read(&mut self, count: usize, wanted: usize) {
        if count == wanted {
            self.records = (self.records * 2).min(RECORDS);
            self.poor_reads = 0;
        } else if count < wanted / 4 {
            self.poor_reads += 1;
            if self.poor_reads == POOR_READS_TO_SHRINK {
                self.records = (self.records / 2).max(1);
                self.poor_reads = 0;
            }
        }
    }
}

const PLACES: usize = 16;
const SHORT_BYTES: usize = 1024;
const POOR_READS_TO_SHRINK: u8 = 4;
const TRASH_BYTES: usize = 64 * 1024;
/// How long an end may wait for the bytes that were sent before it.
const RESET_DELAY: Duration = Duration::from_secs(1);
