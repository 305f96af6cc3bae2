//! What a port speaks, as far as somebody declared it: `appProtocol`, a Server, annotations, or the
//! ports that are known for protocols in which the server speaks first.
//!
//! Declarations are read once, where objects are; what is left open ([`PortProtocol::Detect`]) is for
//! the data path to find out from the first bytes.

use std::fmt;

use serde::{Serialize, Serializer};

use crate::policy::ProxyProtocol;

/// What a port speaks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum PortProtocol {
    /// Nobody said: to be found out from the first bytes.
    #[default]
    Detect,
    /// Bytes that the mesh does not look into.
    Opaque,
    /// HTTP/1. Of a Service's port it excludes what is no HTTP, and no version of it: few who write `http` know
    /// that there is another one. A Server means what it says.
    Http1,
    /// HTTP/2 with prior knowledge, which includes gRPC. A Server that says so refuses anything else; a Service's
    /// port takes HTTP/1 too.
    Http2,
    /// TLS of the applications' own.
    Tls,
}

impl PortProtocol {
    /// What a Service's `appProtocol` declares; none: it is not known here, and counts as not written.
    /// Names are those of Kubernetes, of IANA's registry, and of Linkerd, in whatever case.
    pub fn from_app_protocol(text: &str) -> Option<Self> {
        Some(match text.to_ascii_lowercase().as_str() {
            "http" | "kubernetes.io/ws" => Self::Http1,
            "grpc" | "http2" | "kubernetes.io/h2c" => Self::Http2,
            "https" | "tls" | "kubernetes.io/wss" => Self::Tls,
            "linkerd.io/opaque" | "linkerd.io/tcp" => Self::Opaque,
            _ => return None,
        })
    }

    /// What a Server declares; none: it leaves it open.
    pub fn from_server(protocol: ProxyProtocol) -> Option<Self> {
        match protocol {
            ProxyProtocol::Unknown => None,
            ProxyProtocol::Opaque => Some(Self::Opaque),
            ProxyProtocol::Tls => Some(Self::Tls),
            ProxyProtocol::Http1 => Some(Self::Http1),
            ProxyProtocol::Http2 | ProxyProtocol::Grpc => Some(Self::Http2),
        }
    }

    /// What is known of a port of a service: what its `appProtocol` declares, else whether it is one of
    /// the opaque ports.
    pub fn of_service_port(app_protocol: Option<&str>, port: u16, opaque: &PortRanges) -> Self {
        app_protocol
            .and_then(Self::from_app_protocol)
            .unwrap_or_else(|| opaque.protocol_of(port))
    }

    /// What is known of a port where nobody says which are opaque: see [`PortRanges::opaque_by_default`].
    pub fn by_default(port: u16) -> Self {
        match DEFAULT_OPAQUE_PORTS.contains(&port) {
            true => Self::Opaque,
            false => Self::Detect,
        }
    }

    /// Whether it is not to be looked into.
    pub fn is_opaque(self) -> bool {
        matches!(self, Self::Opaque | Self::Tls)
    }

    /// As dumps and metrics name it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Detect => "detect",
            Self::Opaque => "opaque",
            Self::Http1 => "http1",
            Self::Http2 => "http2",
            Self::Tls => "tls",
        }
    }
}

impl fmt::Display for PortProtocol {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.as_str())
    }
}

/// A set of ports.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PortRanges {
    /// First and last of each range, in order, none touching the next.
    ranges: Box<[(u16, u16)]>,
}

impl PortRanges {
    /// The ports of these ranges (first and last); an empty range holds none.
    pub fn new(ranges: impl IntoIterator<Item = (u16, u16)>) -> Self {
        let ranges = ranges.into_iter().filter(|(first, last)| first <= last);
        let mut sorted: Vec<(u16, u16)> = ranges.collect();
        sorted.sort_unstable();
        let mut merged: Vec<(u16, u16)> = vec![];
        for (first, last) in sorted {
            match merged.last_mut() {
                Some((_, end)) if u32::from(first) <= u32::from(*end) + 1 => {
                    *end = last.max(*end);
                }
                _ => merged.push((first, last)),
            }
        }
        Self {
            ranges: merged.into(),
        }
    }

    /// Ports that are opaque where nobody says otherwise: SMTP (25, 587), MySQL (3306, 4444), PostgreSQL
    /// (5432), Redis (6379), Elasticsearch (9300), Memcached (11211). In most of them the server may
    /// speak first.
    pub fn opaque_by_default() -> Self {
        Self::new(DEFAULT_OPAQUE_PORTS.map(|port| (port, port)))
    }

    /// Whether a port is one of them.
    pub fn contains(&self, port: u16) -> bool {
        let place = self.ranges.partition_point(|(_, last)| *last < port);
        let range = self.ranges.get(place);
        range.is_some_and(|(first, _)| *first <= port)
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Their ranges, in order.
    pub fn ranges(&self) -> &[(u16, u16)] {
        &self.ranges
    }

    /// The ports of both.
    #[must_use]
    pub fn union(&self, other: &Self) -> Self {
        Self::new(self.ranges.iter().chain(&other.ranges).copied())
    }

    /// What is known of a port if these are the opaque ones.
    pub fn protocol_of(&self, port: u16) -> PortProtocol {
        if self.contains(port) {
            PortProtocol::Opaque
        } else {
            PortProtocol::Detect
        }
    }
}

/// Linkerd's list, and the one of the documentation.
const DEFAULT_OPAQUE_PORTS: [u16; 8] = [25, 587, 3306, 4444, 5432, 6379, 9300, 11211];

/// `25,587,4000-4010`.
impl fmt::Display for PortRanges {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (first, last)) in self.ranges.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            match first == last {
                true => write!(formatter, "{comma}{first}")?,
                false => write!(formatter, "{comma}{first}-{last}")?,
            }
        }
        Ok(())
    }
}

impl Serialize for PortRanges {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A port as annotations list them: a number, a range, or the name of a port of the annotated object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ListedPort {
    /// These.
    Range(u16, u16),
    /// Those of this name.
    Named(String),
}

/// A text that is no list of ports.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is neither a port, nor a range of ports, nor the name of one")]
pub struct NoPortList(String);

impl ListedPort {
    /// Reads a list as in `25,587,4000-4010,admin`; white space does not count.
    ///
    /// # Errors
    /// The first part that is none of these.
    pub fn list(text: &str) -> Result<Vec<Self>, NoPortList> {
        let parts = text.split(',').map(str::trim).filter(|it| !it.is_empty());
        parts.map(Self::one).collect()
    }

    fn one(text: &str) -> Result<Self, NoPortList> {
        let refused = || NoPortList(text.chars().take(64).collect());
        let port = |text: &str| text.trim().parse::<u16>().ok().filter(|it| *it != 0);
        if text.bytes().all(|it| it.is_ascii_digit()) {
            let port = port(text).ok_or_else(refused)?;
            return Ok(Self::Range(port, port));
        }
        let range = text.split_once('-');
        if let Some((first, last)) = range
            && let (Some(first), Some(last)) = (port(first), port(last))
        {
            return match first <= last {
                true => Ok(Self::Range(first, last)),
                false => Err(refused()),
            };
        }
        let word = |it: u8| it.is_ascii_lowercase() || it.is_ascii_digit() || it == b'-';
        let named = text.len() <= 63
            && text.bytes().all(word)
            && text.bytes().any(|it| it.is_ascii_lowercase());
        match named {
            true => Ok(Self::Named(text.to_owned())),
            false => Err(refused()),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn app_protocols() {
        use PortProtocol::*;
        for (text, expected) in [
            ("http", Some(Http1)),
            ("HTTP", Some(Http1)),
            ("kubernetes.io/ws", Some(Http1)),
            ("grpc", Some(Http2)),
            ("kubernetes.io/h2c", Some(Http2)),
            ("https", Some(Tls)),
            ("tls", Some(Tls)),
            ("linkerd.io/opaque", Some(Opaque)),
            ("linkerd.io/tcp", Some(Opaque)),
            ("example.com/mine", None),
            ("", None),
        ] {
            assert_eq!(PortProtocol::from_app_protocol(text), expected, "{text}");
        }
    }

    /// (appProtocol, port, opaque ports) -> protocol
    #[test]
    fn what_is_declared_comes_before_what_is_listed() {
        use PortProtocol::*;
        let default = PortRanges::opaque_by_default();
        let own = PortRanges::new([(80, 80)]);
        for (declared, port, opaque, expected) in [
            (None, 80, &default, Detect),
            (None, 3306, &default, Opaque),
            (None, 3306, &own, Detect),
            (None, 80, &own, Opaque),
            (Some("http"), 80, &own, Http1),
            (Some("http"), 3306, &default, Http1),
            (Some("linkerd.io/opaque"), 8080, &default, Opaque),
            (Some("who-knows"), 8080, &default, Detect),
            (Some("who-knows"), 3306, &default, Opaque),
        ] {
            let known = PortProtocol::of_service_port(declared, port, opaque);
            assert_eq!(known, expected, "{declared:?} {port} {opaque}");
        }
    }

    #[test]
    fn the_default_is_the_default_list() {
        let listed = PortRanges::opaque_by_default();
        for port in 0..=u16::MAX {
            let known = PortProtocol::by_default(port);
            assert_eq!(known, listed.protocol_of(port), "{port}");
        }
    }

    #[test]
    fn lists_of_ports() {
        use ListedPort::*;
        let named = |text: &str| Named(text.to_owned());
        for (text, expected) in [
            ("", Some(vec![])),
            ("25", Some(vec![Range(25, 25)])),
            (
                "25, 4000-4010 ,http",
                Some(vec![Range(25, 25), Range(4000, 4010), named("http")]),
            ),
            ("my-port", Some(vec![named("my-port")])),
            ("0", None),
            ("65536", None),
            ("10-5", None),
            ("25;26", None),
            ("Http", None),
            ("--", None),
        ] {
            assert_eq!(ListedPort::list(text).ok(), expected, "{text:?}");
        }
    }

    #[test]
    fn ranges_merge() {
        for (ranges, expected) in [
            (vec![], ""),
            (vec![(5, 4)], ""),
            (vec![(7, 9), (1, 3), (4, 5), (8, 12)], "1-5,7-12"),
            (vec![(1, 65535), (5, 6)], "1-65535"),
            (vec![(65535, 65535), (3, 3)], "3,65535"),
        ] {
            assert_eq!(PortRanges::new(ranges).to_string(), expected);
        }
    }

    proptest! {
        #[test]
        fn sets_hold_what_their_ranges_hold(
            ranges in proptest::collection::vec((0_u16..64, 0_u16..64), 0..8),
            port in 0_u16..70,
        ) {
            let held = ranges.iter().any(|(first, last)| (*first..=*last).contains(&port));
            prop_assert_eq!(PortRanges::new(ranges).contains(port), held);
        }
    }
}
