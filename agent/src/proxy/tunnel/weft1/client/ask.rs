//! A flow that is asked for: the question, what the application has said meanwhile, and the answer.
//!
//! Early bytes are read without being taken from the application's socket, so that all of them can be
//! sent elsewhere if the answer is no.

use std::future::poll_fn;
use std::io;
use std::os::fd::AsRawFd;
use std::task::{Context, Poll};

use nix::sys::socket::{MsgFlags, recv};
use tokio::io::Interest;
use tokio::net::TcpStream;

use super::Lent;
use crate::proxy::tunnel::weft1::Error;
use crate::proxy::tunnel::weft1::channel::{Channel, Heard};
use crate::proxy::tunnel::weft1::frame::{END_FRAME, Event, Open, Refuse};

/// The server's answer.
#[derive(Debug)]
pub enum Answer {
    /// Its application has accepted. So many bytes of ours have been sent already, and are still in
    /// its socket.
    Accepted {
        /// How many.
        early: usize,
    },
    /// It has not.
    Refused(Refuse),
    /// There is none. Nobody knows what has become of the early bytes.
    Lost {
        /// Why.
        error: Error,
        /// Bytes that had been sent.
        early: usize,
    },
}

impl Lent {
    /// Asks for a flow, and sends what the application has already said, without waiting for an
    /// answer; those bytes stay in its socket too. Without a socket nothing is sent. The caller bounds
    /// the time.
    pub async fn ask(&mut self, open: &Open, socket: Option<&TcpStream>) -> Answer {
        let mut asking = Asking {
            early: 0,
            watches: true,
        };
        let channel = &mut *self.kept.channel;
        let leaving = &mut self.leaving;
        let started = asking.start(channel, open, socket);
        let answered = match started {
            Ok(()) => poll_fn(|context| asking.poll(channel, leaving, socket, context)).await,
            Err(error) => Err(error),
        };
        match answered {
            Ok(None) => Answer::Accepted {
                early: asking.early,
            },
            Ok(Some(refuse)) => Answer::Refused(refuse),
            Err(error) => Answer::Lost {
                error,
                early: asking.early,
            },
        }
    }
}

/// A flow between its question and the answer.
struct Asking {
    /// Bytes of the application that were sent.
    early: usize,
    /// Whether more may be.
    watches: bool,
}

impl Asking {
    fn start(
        &mut self,
        channel: &mut Channel,
        open: &Open,
        socket: Option<&TcpStream>,
    ) -> Result<(), Error> {
        channel.parser().asked();
        channel.say(&open.encode())?;
        match socket {
            // What is there goes along in the same write.
            Some(socket) => self.say_early(channel, socket).map(drop),
            None => Ok(()),
        }
    }

    fn poll(
        &mut self,
        channel: &mut Channel,
        leaving: &mut bool,
        socket: Option<&TcpStream>,
        context: &mut Context<'_>,
    ) -> Poll<Result<Option<Refuse>, Error>> {
        while self.watches
            && let Some(socket) = socket
            && socket.poll_read_ready(context).is_ready()
        {
            let before = self.early;
            let mut said = Ok(true);
            let _ = socket.try_io(Interest::READABLE, || {
                said = self.say_early(channel, socket);
                match said {
                    // It is readable as long as nobody takes the bytes: wait for the next ones.
                    Ok(false) => Err(io::ErrorKind::WouldBlock.into()),
                    _ => Ok(()),
                }
            });
            said?;
            if self.early == before {
                // It has closed, or failed, which is the caller's to see.
                self.watches = false;
            }
        }
        if let Poll::Ready(flushed) = channel.poll_flush(context) {
            flushed?;
        }
        loop {
            match channel.hear()? {
                Some(Heard::Event(Event::Accept)) => {
                    channel.shrink_inbox();
                    return Poll::Ready(Ok(None));
                }
                Some(Heard::Event(Event::Refuse(refuse))) => {
                    // Ends our direction too, so that the connection can take the next flow.
                    channel.say(&END_FRAME)?;
                    if let Poll::Ready(flushed) = channel.poll_flush(context) {
                        flushed?;
                    }
                    channel.shrink_inbox();
                    return Poll::Ready(Ok(Some(refuse)));
                }
                Some(Heard::Event(Event::Leaving)) => *leaving = true,
                Some(_) => return Poll::Ready(Err(Error::Closed)),
                None => match channel.poll_receive(false, context) {
                    Poll::Ready(received) => received?,
                    Poll::Pending => {
                        channel.shrink_inbox();
                        return Poll::Pending;
                    }
                },
            }
        }
    }

    /// Sends what the application has said beyond what has been sent. Says whether it may have said
    /// more.
    fn say_early(&mut self, channel: &mut Channel, socket: &TcpStream) -> Result<bool, Error> {
        let descriptor = socket.as_raw_fd();
        let sent = self.early;
        let mut filled = false;
        let said = channel.say_data(1, |places| {
            let Some(place) = places.first_mut() else {
                return Ok(None);
            };
            let room = place.len().min(MOST_EARLY_BYTES - sent);
            let new = if sent == 0 {
                recv(descriptor, &mut place[..room], MsgFlags::MSG_PEEK)?
            } else {
                let mut all = vec![0; sent + room];
                let seen = recv(descriptor, &mut all, MsgFlags::MSG_PEEK)?;
                let new = all.get(sent..seen).unwrap_or_default();
                place[..new.len()].copy_from_slice(new);
                new.len()
            };
            #[cfg(feature = "faults")]
            crate::faults::read(&place[..new]);
            filled = new == room;
            Ok((new > 0).then_some(new))
        })?;
        // An error of the socket is seen by who reads it in earnest.
        if let Ok(Some(count)) = said {
            self.early += count;
        }
        if self.early >= MOST_EARLY_BYTES || channel.is_full() {
            self.watches = false;
        }
        Ok(filled)
    }
}

/// The most that is sent of a flow before it is accepted.
pub const MOST_EARLY_BYTES: usize = 64 * 1024;
