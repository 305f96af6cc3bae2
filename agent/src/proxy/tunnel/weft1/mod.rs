//! `weft/1`: flows between Weft's agents, each with a TLS connection of its own while it lasts.
//! `docs/wire.md` says what is on the wire.
//!
//! Flows share nothing: no window, no lock, no task. What HTTP/2 would give, cheap streams, the
//! [`client::Pool`] gives by keeping connections for the next flow of the same pair. [`frame`] and
//! [`record`] say what the bytes mean, [`channel`] moves them, [`copy`] joins an application's socket
//! with a channel, [`client`] and [`server`] are the two ends.

pub mod buffer;
pub mod channel;
pub mod client;
pub mod copy;
pub mod frame;
pub mod handshake;

pub mod record;
pub mod server;
pub mod stream;

use std::io;

use frame::BadFrame;
use record::BadRecord;

/// Why a connection can no longer be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Reading or writing failed.
    #[error("the connection failed: {0}")]
    Socket(#[source] io::Error),
    /// The peer is gone.
    #[error("the peer closed the connection")]
    Cut,
    /// The peer said in TLS that it sends nothing more.
    #[error("the peer ended TLS")]
    Closed,
    /// TLS is broken.
    #[error("{0}")]
    Record(#[from] BadRecord),
    /// The peer did what it must not.
    #[error("the peer broke the protocol: {0}")]
    Frame(#[from] BadFrame),
    /// The peer sends records with nothing in them.
    #[error("the peer broke the protocol: too many empty records")]
    Idling,
    /// The peer goes on with a flow that was refused.
    #[error("the peer broke the protocol: it goes on with a flow that was refused")]
    Unbidden,
    /// What must be said does not fit.
    #[error("more is to be sent than there is room for")]
    Overfull,
}

impl Error {
    /// Whether the peer, or the way to it, is gone; else one of the two sides has a fault.
    pub fn is_gone(&self) -> bool {
        matches!(self, Self::Socket(_) | Self::Cut | Self::Closed)
    }
}

#[cfg(test)]
mod tests;
