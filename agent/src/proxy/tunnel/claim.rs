//! What a client's agent says of a flow that it does not look into: by which Service's declaration.
//!
//! It is a claim, and whoever has a workload's key can make it. The server's agent finds the declaration in its
//! own records, or looks.

use std::fmt;
use std::num::NonZeroU16;
use std::str::FromStr;

use weft_core::Name;

use super::wire::parse_port;

/// A port of a Service in the server's namespace, which the client's agent knows to be declared opaque.
/// As text `name:port`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpaqueBy {
    /// The Service's name.
    pub service: Name,
    /// Its port.
    pub port: NonZeroU16,
}

/// Why a text is no [`OpaqueBy`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("that is not a Service's name and a port")]
pub struct BadClaim;

impl OpaqueBy {
    /// Reads what was sent. What cannot be read claims nothing: the flow is looked into.
    pub fn read(bytes: &[u8]) -> Option<Self> {
        std::str::from_utf8(bytes).ok()?.parse().ok()
    }
}

impl FromStr for OpaqueBy {
    type Err = BadClaim;

    fn from_str(text: &str) -> Result<Self, BadClaim> {
        let (service, port) = text.rsplit_once(':').ok_or(BadClaim)?;
        Ok(Self {
            service: service.parse().map_err(|_| BadClaim)?,
            port: parse_port(port).ok_or(BadClaim)?,
        })
    }
}

impl fmt::Display for OpaqueBy {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}:{}", self.service, self.port)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        for text in ["web:80", "web-0.x:65535"] {
            let claim = OpaqueBy::read(text.as_bytes()).expect(text);
            assert_eq!(claim.to_string(), text);
        }
        for text in [
            "", ":", "web", "web:", ":80", "web:0", "web:080", "Web:80", "a/b:80",
        ] {
            assert_eq!(text.parse::<OpaqueBy>(), Err(BadClaim), "{text:?}");
        }
        assert_eq!(OpaqueBy::read(b"\xff:80"), None);
    }
}
