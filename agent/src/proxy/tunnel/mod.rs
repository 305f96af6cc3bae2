//! The authenticated, encrypted connections between nodes. `docs/wire.md` says what is on the wire.
//!
//! Weft's agents speak [`weft1`] among themselves, where a flow has a connection for itself. All else is
//! HTTP/2 over mutual TLS, one stream per flow: [`client`] keeps the connections that a pod's flows leave by, [`server`] serves those that
//! arrive, [`wire`] has what both sides must agree on. TLS and sockets come from the caller, so
//! everything here runs over any stream of bytes.

pub mod chunk;
pub mod claim;
pub mod client;
pub mod server;
pub mod weft1;
pub mod wire;

use std::time::{Duration, SystemTime};

use h2::{Ping, PingPong};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// What ends a tunnel from outside of it.
pub struct Watch {
    /// The pod at this end is gone.
    pub pod_gone: CancellationToken,
    /// Trust roots or certificates changed.
    pub changed: watch::Receiver<u64>,
    /// Whether the peer's certificates are still vouched for.
    pub trusted: Box<dyn Fn() -> bool + Send + Sync>,
    /// When the first of the certificates ends that it was made with. What is open then goes on; no
    /// flow may begin.
    pub valid_until: SystemTime,
}

impl Watch {
    /// Counts the changes of trust roots and certificates.
    pub fn generation(&self) -> u64 {
        *self.changed.borrow()
    }

    /// Whether one of the certificates has ended.
    pub fn is_expired(&self) -> bool {
        SystemTime::now() >= self.valid_until
    }

    /// The same for the server, whose clock may be ahead of that of a client that knows its duty.
    pub fn is_long_expired(&self) -> bool {
        SystemTime::now() >= self.valid_until + CLOCKS_APART
    }

    /// Ends when the peer is no longer vouched for.
    pub async fn untrusted(&mut self) {
        loop {
            next_change(&mut self.changed).await;
            if !(self.trusted)() {
                return;
            }
        }
    }
}

/// How far a client's clock may be behind.
const CLOCKS_APART: Duration = Duration::from_secs(5);

/// Ends when roots or certificates changed; never, if nobody can change them any more.
async fn next_change(changes: &mut watch::Receiver<u64>) {
    if changes.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// Ends when the peer no longer answers.
async fn keepalive(pings: Option<PingPong>) {
    let Some(mut pings) = pings else {
        return std::future::pending().await;
    };
    loop {
        tokio::time::sleep(PING_INTERVAL).await;
        let pong = tokio::time::timeout(PING_TIMEOUT, pings.ping(Ping::opaque())).await;
        if !matches!(pong, Ok(Ok(_))) {
            return;
        }
    }
}

/// Room of one stream: what a sender may have on the way to an application that does not read.
pub const STREAM_WINDOW_BYTES: u32 = 256 * 1024;
/// Streams that a tunnel may have open.
const STREAMS: u32 = 128;
/// Room of all streams of a connection together: as much as all of them may fill and a little more,
/// so that streams whose readers have stopped, however many, cannot stop another.
const CONNECTION_WINDOW_BYTES: u32 = (STREAMS + 1) * STREAM_WINDOW_BYTES;
/// The most that HTTP/2 keeps of one stream before it is written.
const SEND_BUFFER_BYTES: usize = 256 * 1024;
/// Together with its nine bytes of header, what rustls takes at once and what fits into four records.
/// One byte more, and the rest of every frame is a record, a system call and a packet of its own.
pub const FRAME_BYTES: u32 = 64 * 1024 - 9;
const HEADER_BYTES: u32 = 8 * 1024;
/// Flows that were reset before they were looked at, of those that one turn of the peer brings.
const UNSEEN_RESETS: usize = 256;
/// Streams that frames may still arrive for after they were reset here.
const REMEMBERED_RESETS: usize = 1024;
/// Frames for streams that are forgotten, over a connection's whole life. A peer of good will gets
/// nowhere near it; one of bad will could otherwise fill the memory with answers it does not read.
const STRAY_FRAMES: usize = 16 * 1024;

const PING_INTERVAL: Duration = Duration::from_secs(20);
const PING_TIMEOUT: Duration = Duration::from_secs(20);
/// How long the start of HTTP/2 may take once TLS stands.
const START_TIMEOUT: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests;
