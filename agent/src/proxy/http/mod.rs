//! HTTP in the data plane: flows whose bytes are requests become exchanges, one request and its
//! response each, that are routed, balanced, measured and answered one by one.
//!
//! | stage | where |
//! |---|---|
//! | which protocol is it | `sniff`; at the client's node `detect` and `firsts`, at the server's `first` |
//! | a client's connection, request by request; one that nobody uses | `serve`; `idle` |
//! | is the request's head fit to be passed on, and what of it belongs to this hop | `lines`, `head` |
//! | may the client make it | `gate` |
//! | to which endpoint | `outbound` |
//! | on which connection | `pool`, `unheard`, `connection`, `stream` |
//! | the application speaks another version | `application` |
//! | answers before the answer | `interim` |
//! | the bodies, and the end of the exchange | `body` |
//! | the end of a request's body before its time | `upload` |
//! | how long it may take | `deadlines` |
//! | what is sent more than once | `replay` |
//! | what is counted | `measure`, `host` |
//! | whose word an answer is | `answerer` |
//! | a request that no server answers; a client that was refused before | `answer`; `refusal` |
//! | what is HTTP no longer | `upgrade` |
//! | the server's side: policy, identity headers, the application | `inbound` |
//!
//! **How it travels.** Between nodes an exchange goes over a flow, of whichever protocol the tunnel is:
//! an HTTP connection of the version that the client spoke, from agent to agent, on which the exchanges of
//! all the client pod's connections to that endpoint follow each other (HTTP/1) or are mixed (HTTP/2).
//! Putting each into a stream of one HTTP/2 connection between the nodes instead would translate every
//! HTTP/1 exchange twice, and make all of them share a connection's lock and windows. On one
//! node the outbound half speaks to the application's socket itself.
//!
//! **One task.** A connection to a server is driven by whoever uses it: the future that serves the client's
//! connection polls it, so an exchange passes an agent without waking another task. Only HTTP/2, whose
//! connections are shared, has tasks of its own.

pub(super) mod answer;
mod answerer;
pub(super) mod application;
mod body;
pub(super) mod connection;
pub(super) mod deadlines;
pub(super) mod detect;
pub(super) mod first;
pub(crate) mod firsts;
pub(super) mod gate;
pub mod head;
mod host;
mod idle;
pub(super) mod inbound;
mod interim;
pub mod lines;
mod measure;
pub(super) mod outbound;
pub(crate) mod pool;
pub(super) mod refusal;
mod replay;
mod serve;
pub mod sniff;
mod stream;
mod tap;
mod unheard;
mod upgrade;
mod upload;

use weft_core::PortProtocol;

pub(super) use stream::{Returned, Stream};

/// The version that a connection speaks, on both of its sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Version {
    /// HTTP/1.0 or HTTP/1.1 (RFC 9112).
    Http1,
    /// HTTP/2 with prior knowledge (RFC 9113, section 3.3).
    Http2,
}

impl Version {
    fn other(self) -> Self {
        match self {
            Self::Http1 => Self::Http2,
            Self::Http2 => Self::Http1,
        }
    }
}

/// Whether a port with this declaration is to be looked at.
pub(super) fn may_be(declared: PortProtocol) -> bool {
    !declared.is_opaque()
}

/// Whether nothing but HTTP may pass a port that has this declaration.
pub(super) fn takes_nothing_else(declared: PortProtocol) -> bool {
    matches!(declared, PortProtocol::Http1 | PortProtocol::Http2)
}

/// Whether a server whose port has this declaration takes this version.
pub(super) fn is_taken(declared: PortProtocol, version: Version) -> bool {
    match declared {
        PortProtocol::Http1 => version == Version::Http1,
        PortProtocol::Http2 => version == Version::Http2,
        PortProtocol::Detect | PortProtocol::Opaque | PortProtocol::Tls => true,
    }
}
