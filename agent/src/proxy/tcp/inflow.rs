//! The direction out of a tunnel: from its frames into an application's socket.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes, BytesMut};
use h2::RecvStream;
use tokio::io::AsyncWrite;
use tokio::net::tcp::WriteHalf;

use super::{Broken, Side, Way};
use crate::proxy::tunnel::STREAM_WINDOW_BYTES;
use crate::proxy::usage::Kept;

/// What comes out of a tunnel's stream and goes into a socket.
pub(super) struct Inflow {
    receive: RecvStream,
    /// Received, and not yet taken by the socket. Never more than the stream's window, as room is
    /// given back to the sender only for what the socket took.
    kept: BytesMut,
    last_was_small: bool,
    ended: bool,
    /// What is counted as kept while the socket has no room: the stream's window, as HTTP/2 may have
    /// received that much without it being seen here.
    counted: Kept,
}

impl Inflow {
    /// `first` was received already.
    pub(super) fn new(receive: RecvStream, first: Bytes, counted: Kept) -> Self {
        Self {
            receive,
            kept: first.into(),
            last_was_small: false,
            ended: false,
            counted,
        }
    }

    /// Passes on until the sender ended and everything is written.
    ///
    /// While the socket has no room, small frames are put together here instead of being left in
    /// HTTP/2's queue: there each costs many times its size, and too many of them end the whole
    /// connection.
    pub(super) fn poll(
        &mut self,
        write: &mut WriteHalf<'_>,
        side: Side,
        way: Way<'_>,
        context: &mut Context<'_>,
    ) -> Poll<Result<(), Broken>> {
        loop {
            if !self.kept.is_empty() {
                let count = self.write(None, write, side, way, context)?;
                self.kept.advance(count);
                if self.kept.is_empty() {
                    self.kept = BytesMut::new();
                    self.counted.set(0);
                } else if self.ended || !self.last_was_small {
                    return Poll::Pending;
                }
            }
            if self.ended {
                return Poll::Ready(Ok(()));
            }
            match ready!(self.receive.poll_data(context)) {
                None => self.ended = true,
                Some(Err(error)) => return Poll::Ready(Err(Broken::tunnel(side.other(), error))),
                Some(Ok(chunk)) => {
                    self.last_was_small = chunk.len() < SMALL_FRAME_BYTES;
                    let mut passed = 0;
                    if self.kept.is_empty() {
                        passed = self.write(Some(&chunk), write, side, way, context)?;
                    }
                    if passed < chunk.len() {
                        // A window was granted already: here nothing can be read more slowly.
                        if !self.counted.may_be(STREAM_WINDOW_BYTES as usize) {
                            return Poll::Ready(Err(Broken::TooManyBytes));
                        }
                        self.counted.set(STREAM_WINDOW_BYTES as usize);
                        self.kept.extend_from_slice(&chunk[passed..]);
                    }
                }
            }
        }
    }

    /// Writes a chunk, or what is kept, as far as the socket takes it at once, and gives as much
    /// room back to the sender.
    fn write(
        &mut self,
        chunk: Option<&[u8]>,
        write: &mut WriteHalf<'_>,
        side: Side,
        way: Way<'_>,
        context: &mut Context<'_>,
    ) -> Result<usize, Broken> {
        let bytes = chunk.unwrap_or(&self.kept);
        let mut passed = 0;
        while passed < bytes.len() {
            match Pin::new(&mut *write).poll_write(context, &bytes[passed..]) {
                Poll::Ready(Ok(count)) => passed += count,
                Poll::Ready(Err(error)) => return Err(Broken::socket(side, error)),
                Poll::Pending => break,
            }
        }
        way.add(passed);
        self.receive
            .flow_control()
            .release_capacity(passed)
            .map_err(|error| Broken::tunnel(side.other(), error))?;
        Ok(passed)
    }
}

/// Frames below this are worth copying when the socket has no room.
const SMALL_FRAME_BYTES: usize = 1024;
