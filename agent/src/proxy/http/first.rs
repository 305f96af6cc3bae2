//! What a flow that has arrived at its server's node begins with. Whoever looks here decides whether the
//! client can tell the application who it is, so at a port that nobody declared opaque no request passes
//! unseen, however long its client waits and however it cuts its first line.
//!
//! Nobody waits for it: the application has accepted, and what it says first ends the question. What is not
//! worth waiting for, or has been waited for long enough, is passed on while it is looked at; if it
//! becomes a request after all, the flow is reset.

use std::io;
use std::pin::pin;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::AsyncReadExt;
use tokio::time::Instant;
use weft_core::PortProtocol;

use super::Version;
use super::detect::{self, Detected};
use super::sniff::{MOST_BYTES, Sniffed, blank, sniff};
use crate::proxy::error::FlowError;
use crate::proxy::tcp::{Broken, FlowSocket, Moved, Side, TunnelHalves};
use crate::proxy::tunnel::weft1::frame::MOST_DATA_BYTES;
use crate::proxy::tunnel::weft1::stream::ChannelIo;
use crate::telemetry::{DetectedBy, ProtocolLabel, Telemetry};

/// The client's side of a flow, by the way it comes.
pub(in crate::proxy) enum Client<'a> {
    /// On this node, or outside of the mesh.
    Socket(&'a FlowSocket),
    /// By `weft/1`.
    Channel(&'a mut ChannelIo),
    /// In a stream of HTTP/2.
    Tunnel(&'a mut TunnelHalves),
}

/// How to look.
#[derive(Clone, Copy)]
pub(in crate::proxy) struct Look<'a> {
    /// What is declared of the port; not opaque.
    pub(in crate::proxy) declared: PortProtocol,
    /// Policy allows requests and nothing else.
    pub(in crate::proxy) requests_only: bool,
    /// How long a client may take.
    pub(in crate::proxy) patience: Duration,
    /// Where it is counted, unless it was counted on this node already.
    pub(in crate::proxy) telemetry: Option<&'a Telemetry>,
}

/// HTTP, with what was taken of it.
pub(in crate::proxy) type Begun = (Version, Bytes);

/// What a client begins with that nobody else waits for; nothing if that is no HTTP.
///
/// # Errors
/// Its connection failed.
pub(super) async fn begun(mut client: Client<'_>) -> Result<Option<Begun>, Broken> {
    let mut first = BytesMut::new();
    loop {
        let count = client.take(&mut first).await?;
        match sniff(&first) {
            Sniffed::Http(version) => return Ok(Some((version, first.freeze()))),
            Sniffed::More if count > 0 && first.len() < MOST_BYTES => {}
            _ => return Ok(None),
        }
    }
}

impl Look<'_> {
    /// Whether the flow is HTTP. If not, all that was taken from the client has been passed on. If it is TLS,
    /// `server_name` becomes the name that its client asks for.
    ///
    /// # Errors
    /// One of the two connections failed, or the flow is not what it must be.
    pub(in crate::proxy) async fn at(
        self,
        mut client: Client<'_>,
        server: &mut FlowSocket,
        (moved, server_name): (&Moved, &mut Option<Box<str>>),
    ) -> Result<Option<Begun>, FlowError> {
        let mut taken = Taken::default();
        let found = self.wait(&mut client, server, &mut taken, moved).await?;
        self.count(&found);
        if let Some(name) = found.protocol.server_name() {
            *server_name = Some(name.into());
        }
        let Sniffed::Http(version) = found.protocol else {
            if self.is_http() && !taken.bytes.is_empty() {
                return Err(FlowError::NotHttp);
            }
            taken.pass(&mut client, server, moved).await?;
            return Ok(None);
        };
        if taken.has_passed {
            return Err(FlowError::HttpInPieces);
        }
        Ok(Some((version, taken.bytes.freeze())))
    }

    async fn wait(
        self,
        client: &mut Client<'_>,
        server: &mut FlowSocket,
        taken: &mut Taken,
        moved: &Moved,
    ) -> Result<Detected, FlowError> {
        let mut deadline = pin!(tokio::time::sleep(self.patience));
        let mut is_late = false;
        loop {
            let count = tokio::select! {
                biased;
                count = client.take(&mut taken.bytes) => count?,
                spoken = detect::server_speaks(server) => {
                    let failed = |error| Broken::socket(Side::Server, error);
                    let spoken = spoken.map_err(failed)?;
                    if self.is_http() {
                        if spoken > 0 || !taken.bytes.is_empty() {
                            return Err(FlowError::NotHttp);
                        }
                        // It has ended. So has its client: nothing may reach the server any more.
                        server.end().map_err(failed)?;
                    }
                    return Ok(Detected::SERVER_FIRST);
                }
                () = &mut deadline, if !is_late => {
                    if let Some(telemetry) = self.telemetry {
                        telemetry.detection(ProtocolLabel::Unknown, DetectedBy::Timeout);
                    }
                    is_late = true;
                    if !self.is_http() {
                        taken.pass(client, server, moved).await?;
                    } else if !taken.bytes.is_empty() {
                        return Err(FlowError::NotHttp);
                    }
                    continue;
                }
            };
            if is_late && !taken.has_passed {
                // It has begun at last, and has as long for the rest.
                deadline.as_mut().reset(Instant::now() + self.patience);
                is_late = false;
            }
            let looked_at = match self.is_http() {
                true => taken.bytes.len(),
                // Servers skip empty lines before a request, some without end.
                false => taken.bytes.len() - blank(&taken.bytes),
            };
            let is_all = count == 0 || looked_at >= MOST_BYTES;
            match sniff(&taken.bytes) {
                Sniffed::More | Sniffed::Doubtful | Sniffed::Strange if is_all => {
                    return Ok(Detected::seen(Sniffed::Opaque));
                }
                Sniffed::Strange if self.is_http() => return Err(FlowError::NotHttp),
                Sniffed::Doubtful if self.is_http() => {}
                Sniffed::More if !taken.has_passed => {}
                Sniffed::More | Sniffed::Doubtful | Sniffed::Strange => {
                    taken.pass(client, server, moved).await?;
                }
                protocol => return Ok(Detected::seen(protocol)),
            }
        }
    }

    /// Whether nothing but HTTP is to pass.
    fn is_http(self) -> bool {
        self.requests_only || super::takes_nothing_else(self.declared)
    }

    fn count(self, found: &Detected) {
        if let Some(telemetry) = self.telemetry {
            found.count(self.declared, telemetry);
        }
    }
}

/// First bytes.
#[derive(Default)]
struct Taken {
    /// Without empty lines that were passed on.
    bytes: BytesMut,
    /// So many of them the server has been sent.
    passed: usize,
    /// It has been sent something.
    has_passed: bool,
}

impl Taken {
    /// Sends the server what it has not been sent yet. It fits into a socket that nothing else was written to.
    async fn pass(
        &mut self,
        client: &mut Client<'_>,
        server: &mut FlowSocket,
        moved: &Moved,
    ) -> Result<(), Broken> {
        let rest = &self.bytes[self.passed..];
        if rest.is_empty() {
            return Ok(());
        }
        let written = server.write_all(rest).await;
        written.map_err(|error| Broken::socket(Side::Server, error))?;
        moved.way(Side::Client).add(rest.len());
        client.release(rest.len())?;
        // What may be waited with for long takes no more room than it needs.
        self.bytes = BytesMut::from(&self.bytes[blank(&self.bytes)..]);
        self.passed = self.bytes.len();
        self.has_passed = true;
        Ok(())
    }
}

impl Client<'_> {
    /// Takes what comes next; nothing if the client has ended.
    async fn take(&mut self, into: &mut BytesMut) -> Result<usize, Broken> {
        let failed = |error| Broken::socket(Side::Client, error);
        match self {
            Self::Socket(socket) => loop {
                socket.socket().readable().await.map_err(failed)?;
                into.reserve(READ_BYTES);
                match socket.socket().try_read_buf(into) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    other => return other.map_err(failed),
                }
            },
            Self::Channel(io) => {
                let read = async {
                    io.readable().await?;
                    // A whole frame: what would be left of it could not be copied by somebody else.
                    into.reserve(MOST_DATA_BYTES);
                    io.read_buf(into).await
                };
                let read = read.await;
                read.map_err(|error| match io.take_fault() {
                    Some(fault) => Broken::Weft(fault),
                    None => failed(error),
                })
            }
            Self::Tunnel(halves) => loop {
                match halves.receive.data().await {
                    Some(Ok(more)) if more.is_empty() => {}
                    Some(Ok(more)) => {
                        into.extend_from_slice(&more);
                        return Ok(more.len());
                    }
                    // What is wrong with it is seen by who reads it in earnest.
                    Some(Err(_)) | None => return Ok(0),
                }
            },
        }
    }

    /// Gives back the room of bytes that were passed on; that of those of HTTP is given back by who reads them.
    fn release(&mut self, count: usize) -> Result<(), Broken> {
        match self {
            Self::Tunnel(halves) => {
                let room = halves.receive.flow_control().release_capacity(count);
                room.map_err(Broken::Tunnel)
            }
            Self::Socket(_) | Self::Channel(_) => Ok(()),
        }
    }
}

/// What is read at once from a socket.
const READ_BYTES: usize = 4096;

#[cfg(test)]
#[path = "first_tests.rs"]
mod tests;
