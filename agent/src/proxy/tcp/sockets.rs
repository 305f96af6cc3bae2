//! Copying between two sockets: both directions are one state, polled in one go.

use std::future::poll_fn;
use std::io::{Read, Write};
use std::task::{Context, Poll, ready};

use tokio::io::Interest;
use tokio::net::TcpStream;

use super::{
    Broken, Failure, FlowSocket, Moved, ReadSize, SCRATCH, Side, TURNS, Way, end_unless_last, once,
    poll_failed, yield_now,
};
use crate::proxy::usage::Kept;

/// Copies between two sockets until both sides closed.
///
/// # Errors
/// [`Broken`]; both sides have then been reset.
pub async fn join_sockets(
    client: FlowSocket,
    server: FlowSocket,
    moved: &Moved,
) -> Result<(), Broken> {
    let result = {
        let mut up = Direction::new(&client, &server, Side::Client, moved);
        let mut down = Direction::new(&server, &client, Side::Server, moved);
        poll_fn(|context| {
            // Turns of its own: one way that is always busy does not keep the other from going.
            up.poll(down.done, &mut { TURNS }, context)?;
            down.poll(up.done, &mut { TURNS }, context)?;
            if up.done && down.done {
                Poll::Ready(Ok(()))
            } else {
                Poll::Pending
            }
        })
        .await
    };
    if result.is_ok() {
        client.close();
        server.close();
    }
    result
}

struct Direction<'a> {
    from: &'a TcpStream,
    to: &'a TcpStream,
    side: Side,
    way: Way<'a>,
    size: ReadSize,
    /// Bytes that the receiver had no room for. Nothing is read before it has taken them.
    kept: Vec<u8>,
    /// So many of them it has taken.
    taken: usize,
    /// What they count as.
    counted: Kept,
    /// The sender has closed, and the receiver has been told.
    done: bool,
    /// Ends when the sender has failed. Made when nothing is read from it, which would say so too.
    failed: Failure<'a>,
}

impl<'a> Direction<'a> {
    fn new(from: &'a FlowSocket, to: &'a FlowSocket, side: Side, moved: &'a Moved) -> Self {
        Self {
            from: from.socket(),
            to: to.socket(),
            side,
            way: moved.way(side),
            size: ReadSize::default(),
            kept: Vec::new(),
            taken: 0,
            counted: moved.way(side).kept(),
            done: false,
            failed: None,
        }
    }

    /// Copies as far as it goes.
    fn poll(
        &mut self,
        other_done: bool,
        turns: &mut usize,
        context: &mut Context<'_>,
    ) -> Result<(), Broken> {
        if !self.done
            && let Poll::Ready(copied) = self.poll_copy(turns, context)
        {
            copied?;
            end_unless_last(self.to, other_done).map_err(|error| self.broken_receiver(error))?;
            self.done = true;
        }
        if !self.done && self.kept.is_empty() {
            self.failed = None;
            return Ok(());
        }
        match poll_failed(&mut self.failed, self.from, context) {
            Poll::Ready(()) => Err(Broken::Reset(self.side)),
            Poll::Pending => Ok(()),
        }
    }

    /// Ready when the sender has closed and the receiver has everything.
    fn poll_copy(
        &mut self,
        turns: &mut usize,
        context: &mut Context<'_>,
    ) -> Poll<Result<(), Broken>> {
        loop {
            ready!(self.poll_pass_kept(context))?;
            if let Poll::Ready(ready) = self.from.poll_read_ready(context) {
                ready.map_err(|error| Broken::socket(self.side, error))?;
            } else {
                return Poll::Pending;
            }
            ready!(yield_now(turns, context));
            if self.pass_on()? == Some(0) {
                return Poll::Ready(Ok(()));
            }
        }
    }

    /// Reads once, and writes as much of it as the receiver takes at once. Says how many bytes were
    /// read.
    fn pass_on(&mut self) -> Result<Option<usize>, Broken> {
        SCRATCH.with_borrow_mut(|scratch| {
            self.size.at_most(self.way);
            let room = &mut scratch[..self.size.bytes()];
            let read = once(self.from, Interest::READABLE, |mut socket| {
                let count = Read::read(&mut socket, room)?;
                Ok((count, count < room.len()))
            });
            let read = read.map_err(|error| Broken::socket(self.side, error))?;
            let Some(count) = read.filter(|count| *count > 0) else {
                return Ok(read);
            };
            self.size.was_read(count);
            #[cfg(feature = "faults")]
            crate::faults::read(&scratch[..count]);
            let mut passed = 0;
            while passed < count {
                match self.write(&scratch[passed..count])? {
                    Some(written) => passed += written,
                    None => {
                        self.counted.set(count - passed);
                        self.kept = scratch[passed..count].to_vec();
                        self.taken = 0;
                        break;
                    }
                }
            }
            Ok(Some(count))
        })
    }

    fn poll_pass_kept(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        while !self.kept.is_empty() {
            let writable = ready!(self.to.poll_write_ready(context));
            writable.map_err(|error| self.broken_receiver(error))?;
            if let Some(count) = self.write(&self.kept[self.taken..])? {
                self.taken += count;
                if self.taken == self.kept.len() {
                    self.kept = Vec::new();
                    self.counted.set(0);
                }
            }
        }
        Poll::Ready(Ok(()))
    }

    /// None: there is no room.
    fn write(&self, bytes: &[u8]) -> Result<Option<usize>, Broken> {
        let written = once(self.to, Interest::WRITABLE, |mut socket| {
            let count = Write::write(&mut socket, bytes)?;
            Ok((count, count < bytes.len()))
        });
        let written = written.map_err(|error| self.broken_receiver(error))?;
        self.way.add(written.unwrap_or(0));
        Ok(written)
    }

    fn broken_receiver(&self, error: std::io::Error) -> Broken {
        Broken::socket(self.side.other(), error)
    }
}
