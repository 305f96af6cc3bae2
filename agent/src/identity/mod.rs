//! Who the pods of this node are towards others: keys, certificates and TLS configurations.
//!
//! A key is made in memory for each certificate and never leaves it: not to disk, not into a dump,
//! not into a log. TLS configurations are built once per identity and change (certificate or trust
//! bundle), never per connection.

mod certificate;
mod identities;
mod schedule;
mod signer;
mod tls;
mod verifier;

pub use certificate::{peer_identity, valid_until};
pub use identities::{CertificateStatus, Identities};
pub use schedule::CertificateState;
pub use signer::{ControllerSigner, SignError, Signer};
pub use verifier::check_roots;

use weft_core::Identity;

/// What a client speaks through a tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Alpn {
    /// `weft/1`, between Weft's agents: a flow with a connection for itself.
    Weft,
    /// `weft-h2/1`, between Weft's agents.
    WeftH2,
    /// `h2`: HBONE.
    Hbone,
}

impl Alpn {
    /// As TLS carries it (RFC 7301).
    pub fn as_bytes(self) -> &'static [u8] {
        match self {
            Self::Weft => b"weft/1",
            Self::WeftH2 => b"weft-h2/1",
            Self::Hbone => b"h2",
        }
    }
}

/// Why there is no identity, own or peer's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// No pod of this node has it.
    #[error("{0} is not an identity of this node's pods")]
    NotOurs(Identity),
    /// The first certificate has not come.
    #[error("{identity} has no certificate yet{}", because(.last_error.as_deref()))]
    NotYet {
        /// The identity.
        identity: Identity,
        /// Why the last try to get one failed.
        last_error: Option<String>,
    },
    /// The certificate was not renewed in time.
    #[error("the certificate of {identity} has expired{}", because(.last_error.as_deref()))]
    Expired {
        /// The identity.
        identity: Identity,
        /// Why the last try to renew it failed.
        last_error: Option<String>,
    },
    /// A peer presented nothing.
    #[error("no certificate was presented")]
    NoCertificate,
    /// A certificate that is no workload's, ours or a peer's.
    #[error("not a workload's certificate: {0}")]
    Certificate(String),
    /// Roots that cannot vouch for anybody.
    #[error("unusable trust bundle: {0}")]
    TrustBundle(String),
    /// A key cannot be made or used.
    #[error("key: {0}")]
    Key(String),
}

fn because(last_error: Option<&str>) -> String {
    last_error.map_or(String::new(), |error| format!("; last error: {error}"))
}

#[cfg(test)]
pub(crate) mod testing;
