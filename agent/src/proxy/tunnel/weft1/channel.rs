//! One connection: a socket, TLS's records on it, frames in them. Everything is polled; nothing here
//! waits or knows what a flow means.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures::FutureExt;
use rustls::pki_types::CertificateDer;
use socket2::{SockRef, TcpKeepalive};
use tokio::io::Interest;
use tokio::net::TcpStream;

use super::Error;
use super::buffer::{Buffer, RECORD_BYTES};
use super::frame::{self, Event, Parser, first_data};
use super::handshake::Greeted;
use super::record::{self, Opened, Records};
use crate::proxy::tcp::once;

/// A connection between two agents.
#[derive(Debug)]
pub struct Channel {
    pub(super) socket: Arc<TcpStream>,
    pub(super) chain: Vec<CertificateDer<'static>>,
    records: Records,
    parser: Parser,
    inbox: Inbox,
    outbox: Buffer,
    /// The peer has ended TLS: no flow goes this way any more.
    closed: bool,
}

/// What was received and is not done with. The bytes of the buffer are, in this order: what was
/// delivered, `text` of a record that was opened, and records that were not.
#[derive(Debug, Default)]
struct Inbox {
    buffer: Buffer,
    text: Range<usize>,
    empty_records: u8,
}

/// What a channel says: an event, whose data lies in the channel's buffer.
pub(super) enum Heard {
    Event(Event),
    Data(Range<usize>),
}

impl Channel {
    /// Takes a connection over from its handshake.
    ///
    /// # Errors
    /// The socket does not take its options.
    pub fn new(socket: TcpStream, greeted: Greeted, serves: bool) -> io::Result<Self> {
        let options = SockRef::from(&socket);
        options.set_tcp_nodelay(true)?;
        options.set_tcp_keepalive(&KEEPALIVE)?;
        options.set_tcp_user_timeout(Some(USER_TIMEOUT))?;
        let buffer = Buffer::holding(greeted.early);
        Ok(Self {
            socket: Arc::new(socket),
            chain: greeted.chain,
            records: greeted.records,
            parser: if serves {
                Parser::server()
            } else {
                Parser::client()
            },
            inbox: Inbox {
                buffer,
                ..Inbox::default()
            },
            outbox: Buffer::default(),
            closed: false,
        })
    }

    /// The connection's socket, to be watched.
    pub fn socket(&self) -> &TcpStream {
        &self.socket
    }

    /// What the peer presented in the handshake.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.chain
    }

    pub(super) fn parser(&mut self) -> &mut Parser {
        &mut self.parser
    }

    /// Whether nothing is on its way in either direction, as far as this side knows.
    pub(super) fn is_clean(&self) -> bool {
        !self.closed
            && self.outbox.is_empty()
            && self.inbox.text.is_empty()
            && self.inbox.buffer.is_empty()
            && self.parser.is_between_flows()
    }

    /// Whether the peer has ended TLS: it says nothing more.
    pub(super) fn is_closed(&self) -> bool {
        self.closed
    }

    /// Whether something was received that is still to be heard.
    pub fn has_received(&self) -> bool {
        !(self.inbox.text.is_empty() && self.inbox.buffer.is_empty())
    }

    /// The bytes of what was heard.
    pub(super) fn bytes(&self, place: Range<usize>) -> &[u8] {
        &self.inbox.buffer.all_ref()[place]
    }

    /// Like [`Self::bytes`], to move them.
    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        self.inbox.buffer.all()
    }

    /// The next event of what has been received; none if more must be received. Data that was
    /// heard stays where it is until [`Self::poll_receive`] or [`Self::shrink_inbox`].
    pub(super) fn hear(&mut self) -> Result<Option<Heard>, Error> {
        loop {
            if self.inbox.text.is_empty() && !self.open_record()? {
                return Ok(None);
            }
            let text = self.inbox.text.clone();
            let step = self
                .parser
                .read(&self.inbox.buffer.all_ref()[text.clone()])?;
            let end = text.start + step.consumed;
            self.inbox.text.start = end;
            match step.event {
                Some(Event::Data(count)) => return Ok(Some(Heard::Data(end - count..end))),
                Some(event) => return Ok(Some(Heard::Event(event))),
                None => {}
            }
        }
    }

    /// Waits for something that is to be heard, and shows the flow's first bytes of it. They are still to be heard.
    ///
    /// # Errors
    /// The connection failed, or what has come is no record.
    pub fn poll_first(&mut self, context: &mut Context<'_>) -> Poll<Result<&[u8], Error>> {
        while self.inbox.text.is_empty() && !self.open_record()? {
            ready!(self.poll_receive(true, context))?;
        }
        let text = self.inbox.text.clone();
        Poll::Ready(Ok(first_data(&self.inbox.buffer.all_ref()[text])))
    }

    /// Opens the next record, if it is there as a whole and it has text.
    fn open_record(&mut self) -> Result<bool, Error> {
        loop {
            let at = self.inbox.buffer.range().start;
            let Some(length) = record::length(self.inbox.buffer.filled())? else {
                return Ok(false);
            };
            if length > self.inbox.buffer.len() {
                return Ok(false);
            }
            let bytes = &mut self.inbox.buffer.all()[at..at + length];
            let opened = self.records.open(bytes)?;
            self.inbox.buffer.advance(length);
            match opened {
                Opened::Data(text) if text.is_empty() => {
                    self.inbox.empty_records += 1;
                    if self.inbox.empty_records > MOST_EMPTY_RECORDS {
                        return Err(Error::Idling);
                    }
                }
                Opened::Data(text) => {
                    self.inbox.empty_records = 0;
                    self.inbox.text = at + text.start..at + text.end;
                    return Ok(true);
                }
                Opened::Closed => {
                    self.closed = true;
                    return Err(Error::Closed);
                }
                Opened::KeyUpdate { requested } => {
                    if requested {
                        self.change_keys()?;
                    }
                }
            }
        }
    }

    /// Receives more, of little at most a record. What was heard before is gone.
    pub(super) fn poll_receive(
        &mut self,
        little: bool,
        context: &mut Context<'_>,
    ) -> Poll<Result<(), Error>> {
        debug_assert!(self.inbox.text.is_empty(), "text is left");
        loop {
            ready!(self.socket.poll_read_ready(context)).map_err(Error::Socket)?;
            let buffer = &mut self.inbox.buffer;
            buffer.enlarge();
            let most = match RECORD_BYTES.checked_sub(buffer.len()) {
                Some(most) if little && most > 0 => most,
                _ => usize::MAX,
            };
            let room = buffer.room();
            let most = most.min(room.len());
            let room = &mut room[..most];
            let read = once(&self.socket, Interest::READABLE, |mut socket| {
                let wanted = room.len();
                io::Read::read(&mut socket, room).map(|count| (count, count < wanted))
            });
            match read {
                Ok(Some(0)) => return Poll::Ready(Err(Error::Cut)),
                Ok(Some(count)) => {
                    self.inbox.buffer.filled_up(count);
                    return Poll::Ready(Ok(()));
                }
                Ok(None) => {}
                Err(error) => return Poll::Ready(Err(Error::Socket(error))),
            }
        }
    }

    /// Keeps what is left to be heard in little memory.
    pub(super) fn shrink_inbox(&mut self) {
        let inbox = &mut self.inbox;
        if inbox.text.is_empty() {
            inbox.buffer.shrink();
        } else {
            // Text lies in front of the records and is counted as done with.
            let range = inbox.buffer.range();
            let kept = [
                &inbox.buffer.all_ref()[inbox.text.clone()],
                &inbox.buffer.all_ref()[range],
            ];
            let (text, all) = (kept[0].len(), kept.concat());
            inbox.buffer = Buffer::holding(all);
            inbox.buffer.advance(text);
            inbox.text = 0..text;
        }
    }

    /// Keeps only what was delivered at `used` and what came after it, if that fits into little memory.
    /// Says whether everything lies so much further to the front now as `used` began.
    pub(super) fn shrink_inbox_to(&mut self, used: Range<usize>) -> bool {
        let first = used.start;
        let text = &mut self.inbox.text;
        let end = if Range::is_empty(text) {
            used.end
        } else {
            used.end.max(text.end)
        };
        let shrunk = self.inbox.buffer.shrink_to(first..end);
        if shrunk {
            *text = text.start.saturating_sub(first)..text.end.saturating_sub(first);
        }
        shrunk
    }

    /// Whether as much is waiting to be sent as should be sent at once.
    pub(super) fn is_full(&self) -> bool {
        self.outbox.len() + 2 * RECORD_BYTES > super::buffer::BUFFER_BYTES
    }

    /// Whether something is waiting to be sent.
    pub(super) fn has_unsent(&self) -> bool {
        !self.outbox.is_empty()
    }

    /// The memory of what waits in either direction.
    pub(super) fn buffered_bytes(&self) -> usize {
        self.inbox.buffer.all_ref().len() + self.outbox.all_ref().len()
    }

    /// Puts frames that are short into a record, to be sent.
    pub(super) fn say(&mut self, frames: &[u8]) -> Result<(), Error> {
        self.outbox.enlarge();
        let room = self.outbox.room();
        let place = room.get_mut(record::HEAD_BYTES..record::HEAD_BYTES + frames.len());
        place.ok_or(Error::Overfull)?.copy_from_slice(frames);
        let length = self.records.seal(room, frames.len())?;
        self.outbox.filled_up(length);
        self.renew_keys()
    }

    /// Puts data into records, to be sent: at most `records` of them, as `read` fills it into the
    /// places it is given. Says how many bytes, if any were there.
    pub(super) fn say_data(
        &mut self,
        records: usize,
        read: impl FnOnce(&mut [io::IoSliceMut<'_>]) -> io::Result<Option<usize>>,
    ) -> Result<io::Result<Option<usize>>, Error> {
        self.outbox.enlarge();
        let room = self.outbox.room();
        let mut places: [io::IoSliceMut<'_>; super::buffer::RECORDS] =
            std::array::from_fn(|_| io::IoSliceMut::new(&mut []));
        let mut count = 0;
        // Never so many that there is no room for what is said beside data: an end, or new keys.
        let for_data = room.len().saturating_sub(CONTROL_BYTES);
        for (place, chunk) in places
            .iter_mut()
            .take(records)
            .zip(room[..for_data].chunks_exact_mut(RECORD_BYTES))
        {
            let text = &mut chunk[TEXT_AT..TEXT_AT + frame::MOST_DATA_BYTES];
            *place = io::IoSliceMut::new(text);
            count += 1;
        }
        if count == 0 {
            return Err(Error::Overfull);
        }
        let read = match read(&mut places[..count]) {
            Ok(Some(read)) => read,
            other => return Ok(other),
        };
        let (mut sealed, mut left) = (0, read);
        while left > 0 {
            let length = left.min(frame::MOST_DATA_BYTES);
            let room = self.outbox.room();
            let room = room.get_mut(sealed..).ok_or(Error::Overfull)?;
            let head = room.get_mut(record::HEAD_BYTES..TEXT_AT);
            head.ok_or(Error::Overfull)?
                .copy_from_slice(&frame::data_head(length));
            sealed += self.records.seal(room, frame::HEAD_BYTES + length)?;
            left -= length;
        }
        self.outbox.filled_up(sealed);
        self.renew_keys()?;
        Ok(Ok(Some(read)))
    }

    fn renew_keys(&mut self) -> Result<(), Error> {
        if self.records.wants_new_keys() {
            self.change_keys()?;
        }
        Ok(())
    }

    fn change_keys(&mut self) -> Result<(), Error> {
        self.outbox.enlarge();
        let length = self.records.change_keys(self.outbox.room())?;
        self.outbox.filled_up(length);
        Ok(())
    }

    /// Sends what is waiting.
    pub(super) fn poll_flush(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Error>> {
        while !self.outbox.is_empty() {
            match self.socket.poll_write_ready(context) {
                Poll::Ready(ready) => ready.map_err(Error::Socket)?,
                Poll::Pending => {
                    self.outbox.shrink();
                    return Poll::Pending;
                }
            }
            let bytes = self.outbox.filled();
            let written = once(&self.socket, Interest::WRITABLE, |mut socket| {
                let count = io::Write::write(&mut socket, bytes)?;
                Ok((count, count < bytes.len()))
            });
            match written {
                Ok(Some(count)) => self.outbox.advance(count),
                Ok(None) => {}
                Err(error) => return Poll::Ready(Err(Error::Socket(error))),
            }
        }
        self.outbox.shrink();
        Poll::Ready(Ok(()))
    }

    /// Tells the peer that this side is done, as far as the socket takes it at once.
    pub(super) fn close(mut self) {
        self.outbox.enlarge();
        if let Ok(length) = self.records.close(self.outbox.room()) {
            self.outbox.filled_up(length);
            let _ = self.socket.try_write(self.outbox.filled());
        }
    }

    /// Ends the connection with a reset.
    pub(super) fn reset(self) {
        let _ = SockRef::from(&*self.socket).set_linger(Some(Duration::ZERO));
    }

    /// Whether the peer has sent something, or gone away. Costs no system call.
    pub(super) fn stirs(&self) -> bool {
        let ready = self.socket.ready(Interest::READABLE);
        ready.now_or_never().is_some()
    }
}

/// Where data lies in a record.
const TEXT_AT: usize = record::HEAD_BYTES + frame::HEAD_BYTES;
/// Room that data leaves: ten short records.
const CONTROL_BYTES: usize = 300;
/// TLS allows records without text, to hide how much is said. A peer of good will has no use for many.
const MOST_EMPTY_RECORDS: u8 = 32;
/// A peer that vanished without a word is noticed after 40 seconds: there are no other signs of life
/// on a connection that waits in the pool.
const KEEPALIVE: TcpKeepalive = TcpKeepalive::new()
    .with_time(Duration::from_secs(20))
    .with_interval(Duration::from_secs(5))
    .with_retries(4);
const USER_TIMEOUT: Duration = Duration::from_secs(40);
