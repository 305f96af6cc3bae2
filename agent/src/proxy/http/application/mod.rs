//! A connection to an application, for HTTP of the version that its client speaks, whichever the application
//! speaks itself.
//!
//! Which one that is shows in the first bytes that it says, and nothing is lost until then. In HTTP/2 both sides
//! begin with their settings: of the client's nothing more leaves before the application's have come. What
//! is said in HTTP/1 is kept until the answer begins, as far as it is short: an application of HTTP/2 takes none of
//! it for a request. If it speaks the other version only, a `bridge` takes its place, hears all that
//! was said, and speaks with the application for whoever is at this end. What is known already is in `spoken`,
//! and what becomes of heads in `translate`.

mod bridge;
mod spoken;
mod translate;

use std::fmt;
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use nix::sys::socket::{MsgFlags, recv};
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};
use tokio::time::{Sleep, sleep};

pub(crate) use self::spoken::Spoken;
use self::spoken::{Heard, Key, hear};
use super::Version;
use super::answerer::Answerer;
use crate::node::LocalPod;
use crate::proxy::error::FlowError;
use crate::proxy::tcp::FlowSocket;
use crate::proxy::{Context as Proxy, socket};

/// Where an application is, and how it is connected to.
pub(super) struct Origin {
    /// The rest of the agent.
    pub(super) proxy: Arc<Proxy>,
    /// In whose namespace connections to it begin.
    pub(super) pod: Arc<LocalPod>,
    /// Its address.
    pub(super) to: SocketAddr,
    /// The client's address, as an application in that pod shall see it; none: it is elsewhere.
    pub(super) client: Option<SocketAddr>,
}

/// A connection to an application.
pub(super) struct Application {
    origin: Arc<Origin>,
    version: Version,
    io: Io,
    /// Whether somebody translates.
    is_translated: Arc<AtomicBool>,
    /// As long as the application has said nothing.
    trial: Option<Trial>,
}

enum Io {
    Server(Arc<FlowSocket>),
    Bridge(DuplexStream),
}

#[derive(Default)]
struct Trial {
    /// It spoke the version before: nothing is kept or held back.
    is_known: bool,
    /// All that was said to the application.
    said: Vec<u8>,
    /// How long more is held back.
    patience: Option<Pin<Box<Sleep>>>,
    /// Who has more to say.
    writer: Option<Waker>,
}

impl Origin {
    /// Another connection.
    async fn connect(&self) -> Result<FlowSocket, FlowError> {
        let Self {
            proxy,
            pod,
            to,
            client,
        } = self;
        match client {
            Some(client) => socket::deliver(proxy, pod, *to, *client).await,
            None => {
                let server = socket::connect(proxy, pod, *to).await?;
                let server = FlowSocket::new(server);
                server.map_err(|source| FlowError::Connect { to: *to, source })
            }
        }
    }

    fn key(&self) -> Key {
        (self.to, self.client.map(|_| self.pod.cookie))
    }
}

impl Application {
    /// On a connection that was made, for a client that speaks `version`.
    pub(super) fn new(server: FlowSocket, origin: Origin, version: Version) -> Self {
        let (origin, server) = (Arc::new(origin), Arc::new(server));
        let speaks = origin.proxy.spoken.speaks(origin.key(), version);
        let io = match speaks {
            Some(false) => {
                let (near, far) = tokio::io::duplex(BRIDGE_BYTES);
                bridge::start(&origin, version, far, Some(server));
                Io::Bridge(near)
            }
            Some(true) | None => Io::Server(server),
        };
        Self {
            origin,
            version,
            is_translated: Arc::new(matches!(io, Io::Bridge(_)).into()),
            io,
            trial: (speaks != Some(false)).then(|| Trial {
                is_known: speaks.is_some(),
                ..Trial::default()
            }),
        }
    }

    /// Who answers.
    pub(super) fn answerer(&self) -> Answerer {
        Answerer::Translated(Arc::clone(&self.is_translated))
    }

    /// The connection, if it is one to the application itself, and nothing is to be found out any more.
    pub(super) fn settled(&self) -> Option<Arc<FlowSocket>> {
        match &self.io {
            Io::Server(server) if self.trial.is_none() => Some(Arc::clone(server)),
            _ => None,
        }
    }

    /// The connection to the application itself, if it is one.
    pub(super) fn socket(&self) -> Option<&Arc<FlowSocket>> {
        match &self.io {
            Io::Server(server) => Some(server),
            Io::Bridge(_) => None,
        }
    }

    /// Takes the first bytes. Says whether they are for whoever is at this end.
    fn hear(&mut self, first: &[u8]) -> bool {
        let heard = match first.is_empty() {
            // It has left without a word. Of HTTP/2 it was asked nothing yet; whether it is HTTP/1 that it wants,
            // shows.
            true if self.version == Version::Http2 => Heard::SpeaksOther,
            true => Heard::Nothing,
            false => hear(self.version, first),
        };
        let Some(trial) = self.trial.take() else {
            return true;
        };
        let origin = &self.origin;
        let spoken = &origin.proxy.spoken;
        match heard {
            Heard::SpeaksOther if trial.is_known => {
                spoken.forget(origin.key());
                return true;
            }
            Heard::SpeaksOther => {
                if !first.is_empty() {
                    spoken.remember(origin.key(), self.version, false);
                }
                tracing::debug!(to = %origin.to, version = ?self.version, "does not speak it");
                self.io = Io::Bridge(bridged(origin, self.version, &trial.said));
                self.is_translated.store(true, Ordering::Release);
            }
            Heard::Speaks if !trial.is_known => {
                spoken.remember(origin.key(), self.version, true);
            }
            Heard::Speaks | Heard::Nothing => {}
        }
        if let Some(writer) = trial.writer {
            writer.wake();
        }
        heard != Heard::SpeaksOther
    }

    /// How much may be said now; none: more when the application has said something.
    fn poll_room(&mut self, context: &mut Context<'_>) -> Poll<usize> {
        let Some(trial) = self.trial.as_mut().filter(|it| !it.is_known) else {
            return Poll::Ready(usize::MAX);
        };
        let room = trial.room(self.version);
        if room > 0 {
            return Poll::Ready(room);
        }
        let most = match self.version {
            Version::Http1 => HTTP1_PATIENCE,
            Version::Http2 => HTTP2_PATIENCE,
        };
        let patience = trial.patience.get_or_insert_with(|| Box::pin(sleep(most)));
        if patience.as_mut().poll(context).is_pending() {
            trial.writer = Some(context.waker().clone());
            return Poll::Pending;
        }
        self.trial = None;
        Poll::Ready(usize::MAX)
    }

    /// Reads.
    pub(super) fn poll_read(
        &mut self,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = match &mut self.io {
            Io::Server(server) => ready!(server.poll_read(context, buffer)),
            Io::Bridge(near) => return Pin::new(near).poll_read(context, buffer),
        };
        if self.trial.is_none() || self.hear(&buffer.filled()[before..]) {
            return Poll::Ready(read);
        }
        buffer.set_filled(before);
        self.poll_read(context, buffer)
    }

    /// Writes some of these.
    pub(super) fn poll_write_vectored(
        &mut self,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let room = ready!(self.poll_room(context));
        let first = slices.iter().find(|it| !it.is_empty());
        let first = first.map_or(&[][..], |it| it);
        match (&mut self.io, &mut self.trial) {
            (Io::Bridge(near), _) => Pin::new(near).poll_write(context, first),
            (Io::Server(server), Some(trial)) if !trial.is_known => {
                let first = &first[..first.len().min(room)];
                let written = ready!(server.poll_write_vectored(context, &[IoSlice::new(first)]));
                match written {
                    Ok(count) => {
                        trial.said.extend_from_slice(&first[..count]);
                        Poll::Ready(Ok(count))
                    }
                    Err(error)
                        if self.version == Version::Http1
                            && !has_said_other(server, self.version) =>
                    {
                        Poll::Ready(Err(error))
                    }
                    Err(_) => {
                        // What it said, or that it left, is there for who reads next; this is of the same.
                        trial.said.extend_from_slice(first);
                        Poll::Ready(Ok(first.len()))
                    }
                }
            }
            (Io::Server(server), _) => server.poll_write_vectored(context, slices),
        }
    }

    /// Has all of it sent.
    pub(super) fn poll_flush(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.io {
            Io::Server(_) => Poll::Ready(Ok(())),
            Io::Bridge(near) => Pin::new(near).poll_flush(context),
        }
    }

    /// Says that nothing more comes.
    pub(super) fn poll_end(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.io {
            Io::Server(server) => Poll::Ready(server.end()),
            Io::Bridge(near) => Pin::new(near).poll_shutdown(context),
        }
    }
}

impl Trial {
    /// How much more may be said before the application has said anything.
    fn room(&self, version: Version) -> usize {
        let most = match version {
            Version::Http1 => MOST_KEPT_BYTES,
            Version::Http2 => match self
                .said
                .get(PREFACE_BYTES..PREFACE_BYTES + FRAME_HEAD_BYTES)
            {
                None => PREFACE_BYTES + FRAME_HEAD_BYTES,
                Some(head) => {
                    let length = usize::from(head[1]) << 8 | usize::from(head[2]);
                    PREFACE_BYTES + FRAME_HEAD_BYTES + length
                }
            },
        };
        most.saturating_sub(self.said.len())
    }
}

/// Whether the server has said that it speaks the other version, though it takes nothing any more.
fn has_said_other(server: &FlowSocket, version: Version) -> bool {
    let mut first = [0; PEEKED_BYTES];
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    let peeked = recv(server.socket().as_raw_fd(), &mut first, flags);
    let count = peeked.unwrap_or(0);
    count > 0 && hear(version, &first[..count]) == Heard::SpeaksOther
}

/// A bridge that has heard this.
fn bridged(origin: &Arc<Origin>, version: Version, said: &[u8]) -> DuplexStream {
    let (mut near, far) = tokio::io::duplex(BRIDGE_BYTES);
    let mut context = Context::from_waker(Waker::noop());
    // It is empty, and has room for more than is ever kept.
    let written = Pin::new(&mut near).poll_write(&mut context, said);
    debug_assert!(matches!(written, Poll::Ready(Ok(count)) if count == said.len()));
    bridge::start(origin, version, far, None);
    near
}

impl fmt::Debug for Application {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Application")
            .field("to", &self.origin.to)
            .field("version", &self.version)
            .field("is_bridged", &self.socket().is_none())
            .finish_non_exhaustive()
    }
}

/// What is said in HTTP/1 before the application has said anything, and is kept.
const MOST_KEPT_BYTES: usize = 64 * 1024;
/// How long more than that waits for an application that says nothing: one of HTTP/2 would have begun.
const HTTP1_PATIENCE: Duration = Duration::from_millis(200);
/// How long a client of HTTP/2 waits for the application's settings; usually they are its first words.
const HTTP2_PATIENCE: Duration = Duration::from_secs(1);
const PREFACE_BYTES: usize = 24;
const FRAME_HEAD_BYTES: usize = 9;
const PEEKED_BYTES: usize = 16;
/// What is on its way to a bridge, and back.
const BRIDGE_BYTES: usize = 2 * MOST_KEPT_BYTES;
