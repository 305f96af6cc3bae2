//! One flow of a connection as a stream of bytes, for whoever reads and writes as on a socket.
//!
//! Copying does without it ([`super::copy`]): there the bytes stay where they were received.

use std::future::poll_fn;
use std::io::{self, IoSlice, IoSliceMut};
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use super::Error;
use super::channel::{Channel, Heard};
use super::frame::{END_FRAME, Event, MOST_DATA_BYTES};

/// A flow that was accepted. Its end on this side is a shutdown; dropped before both sides have ended,
/// the connection is reset.
#[derive(Debug)]
pub struct ChannelIo {
    /// None once it was taken out.
    channel: Option<Box<Channel>>,
    /// Data that was heard and is not read yet, in the channel's buffer.
    heard: Range<usize>,
    heard_end: bool,
    said_end: bool,
    /// What the peer did wrong.
    fault: Option<Error>,
}

/// What is left of a flow that was begun to be read.
#[derive(Debug)]
pub enum Parted {
    /// Both sides may say more.
    Open(Box<Channel>),
    /// The peer has said all.
    HalfClosed(ChannelIo),
}

impl ChannelIo {
    /// Takes a connection on which a flow has been accepted.
    pub fn new(channel: Box<Channel>) -> Self {
        Self {
            channel: Some(channel),
            heard: 0..0,
            heard_end: false,
            said_end: false,
            fault: None,
        }
    }

    /// The connection, if both sides have ended the flow: it can take the next one.
    pub fn into_channel(mut self) -> Option<Box<Channel>> {
        if self.heard_end && self.said_end {
            self.channel.take()
        } else {
            None
        }
    }

    /// Its socket, to be watched.
    pub fn socket(&self) -> Option<Arc<TcpStream>> {
        self.channel.as_ref().map(|it| Arc::clone(&it.socket))
    }

    /// What the peer did that ended the connection, if it was not for it to do.
    pub fn take_fault(&mut self) -> Option<Error> {
        self.fault.take()
    }

    fn failed(&mut self, error: Error) -> io::Error {
        match error {
            Error::Socket(error) => error,
            error if error.is_gone() => io::Error::new(io::ErrorKind::ConnectionReset, error),
            error => {
                let told = io::Error::other(error.to_string());
                self.fault.get_or_insert(error);
                told
            }
        }
    }

    /// Waits until there is something to read, or the peer has ended, with no place for it kept meanwhile.
    ///
    /// # Errors
    /// As of reading.
    pub async fn readable(&mut self) -> io::Result<()> {
        poll_fn(|context| self.poll_readable(context)).await
    }

    fn poll_readable(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let Some(channel) = &mut self.channel
            && channel.has_unsent()
            && let Poll::Ready(Err(error)) = channel.poll_flush(context)
        {
            return Poll::Ready(Err(self.failed(error)));
        }
        let heard = ready!(self.poll_hear(context));
        Poll::Ready(heard.map_err(|error| self.failed(error)))
    }

    /// For something else to go on with. What was heard must have been read.
    pub fn part(mut self) -> Parted {
        debug_assert!(self.heard.is_empty(), "bytes are left behind");
        match self.channel.take() {
            Some(channel) if !self.heard_end => Parted::Open(channel),
            channel => {
                self.channel = channel;
                Parted::HalfClosed(self)
            }
        }
    }

    #[cfg(test)]
    pub(super) fn buffered_bytes(&self) -> usize {
        self.channel.as_ref().map_or(0, |it| it.buffered_bytes())
    }

    /// Whether this side has ended.
    pub fn has_said_all(&self) -> bool {
        self.said_end
    }

    /// Hears the next data, if none is left. Ready when there is some, or the peer has ended.
    fn poll_hear(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Error>> {
        let Some(channel) = &mut self.channel else {
            return Poll::Ready(Err(Error::Closed));
        };
        while self.heard.is_empty() && !self.heard_end {
            match channel.hear()? {
                Some(Heard::Data(place)) => self.heard = place,
                Some(Heard::Event(Event::End)) => {
                    self.heard_end = true;
                    channel.shrink_inbox();
                }
                // Heeded when the flow is over: by then the connection says so itself.
                Some(Heard::Event(Event::Leaving)) => {}
                // The parser lets nothing else come here.
                Some(Heard::Event(_)) => return Poll::Ready(Err(Error::Closed)),
                None => match channel.poll_receive(false, context) {
                    Poll::Ready(received) => received?,
                    Poll::Pending => {
                        channel.shrink_inbox();
                        return Poll::Pending;
                    }
                },
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncRead for ChannelIo {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        ready!(this.poll_readable(context))?;
        let count = this.heard.len().min(buffer.remaining());
        if count == 0 {
            // Of an empty place nobody knows where it is by now.
            return Poll::Ready(Ok(()));
        }
        let place = this.heard.start..this.heard.start + count;
        this.heard.start += count;
        if let Some(channel) = &mut this.channel {
            buffer.put_slice(channel.bytes(place));
            // Who reads a request has it answered before it reads on.
            if this.heard.is_empty() && !channel.has_received() {
                channel.shrink_inbox();
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for ChannelIo {
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
        let this = &mut *self;
        let Some(channel) = &mut this.channel else {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        };
        let length: usize = slices.iter().map(|it| it.len()).sum();
        if length == 0 {
            return Poll::Ready(Ok(0));
        }
        if channel.is_full() {
            let flushed = ready!(channel.poll_flush(context));
            if let Err(error) = flushed {
                return Poll::Ready(Err(this.failed(error)));
            }
        }
        let records = length.div_ceil(MOST_DATA_BYTES);
        let said = channel.say_data(records, |places| Ok(Some(fill(places, slices))));
        match said {
            Ok(Ok(count)) => Poll::Ready(Ok(count.unwrap_or(0))),
            Ok(Err(error)) => Poll::Ready(Err(error)),
            Err(error) => Poll::Ready(Err(this.failed(error))),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Some(channel) = &mut self.channel else {
            return Poll::Ready(Ok(()));
        };
        let flushed = ready!(channel.poll_flush(context));
        Poll::Ready(flushed.map_err(|error| self.failed(error)))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let Some(channel) = &mut this.channel else {
            return Poll::Ready(Ok(()));
        };
        if !this.said_end {
            if let Err(error) = channel.say(&END_FRAME) {
                return Poll::Ready(Err(this.failed(error)));
            }
            this.said_end = true;
        }
        let flushed = ready!(channel.poll_flush(context));
        Poll::Ready(flushed.map_err(|error| this.failed(error)))
    }
}

impl Drop for ChannelIo {
    fn drop(&mut self) {
        match self.channel.take() {
            // A reset would take back what is still on its way.
            Some(channel) if self.said_end => channel.close(),
            Some(channel) => channel.reset(),
            None => {}
        }
    }
}

/// Fills places with bytes, as far as there are both. Says how many.
fn fill(places: &mut [IoSliceMut<'_>], slices: &[IoSlice<'_>]) -> usize {
    let mut filled = 0;
    let mut places = places.iter_mut();
    let mut place: &mut [u8] = &mut [];
    for slice in slices {
        let mut left: &[u8] = slice;
        while !left.is_empty() {
            if place.is_empty() {
                match places.next() {
                    Some(next) => place = next,
                    None => return filled,
                }
            }
            let count = place.len().min(left.len());
            let (room, rest) = std::mem::take(&mut place).split_at_mut(count);
            room.copy_from_slice(&left[..count]);
            place = rest;
            left = &left[count..];
            filled += count;
        }
    }
    filled
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_filled_without_gaps() {
        for (slices, filled) in [
            (&[&b"ab"[..], b"", b"cdefg"][..], 7),
            (&[b"abcdefgh", b"ijklmno"], 9),
            (&[b""], 0),
        ] {
            let mut rooms = [vec![0; 3], vec![0; 3], vec![0; 3]];
            let mut places: Vec<_> = rooms.iter_mut().map(|it| IoSliceMut::new(it)).collect();
            let given: Vec<_> = slices.iter().map(|it| IoSlice::new(it)).collect();
            assert_eq!(fill(&mut places, &given), filled);
            let all = slices.concat();
            assert_eq!(rooms.concat()[..filled], all[..filled]);
        }
    }
}
