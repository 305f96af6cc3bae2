//! How the protocols of connections were found out.

use std::sync::atomic::{AtomicU64, Ordering};

use super::samples::{Kind, Samples};

/// A connection's protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ProtocolLabel {
    /// HTTP/1.
    Http1,
    /// HTTP/2 with prior knowledge.
    Http2,
    /// TLS of the applications: opaque.
    Tls,
    /// Anything else.
    Opaque,
    /// Not known yet.
    Unknown,
}

/// How it is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DetectedBy {
    /// It is HTTP, as was declared for the port.
    Declared,
    /// By the client's first bytes.
    Detected,
    /// The server spoke first.
    ServerFirst,
    /// Neither side has said enough in time; what they say later is looked at.
    Timeout,
}

/// Counters of all connections.
#[derive(Debug, Default)]
pub(super) struct Detections([[AtomicU64; 4]; 5]);

impl Detections {
    pub(super) fn count(&self, protocol: ProtocolLabel, how: DetectedBy) {
        self.0[protocol as usize][how as usize].fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn collect(&self, samples: &mut Samples) {
        for (protocol, counts) in PROTOCOLS.iter().zip(&self.0) {
            for (how, count) in HOW.iter().zip(counts) {
                let count = count.load(Ordering::Relaxed);
                // What has not happened yet is there with 0, so that its first time is an increase.
                if count == 0 && !EXPECTED.contains(&(*protocol, *how)) {
                    continue;
                }
                let labels = vec![
                    ("protocol", (*protocol).to_owned()),
                    ("how", (*how).to_owned()),
                ];
                let help = "Connections whose protocol was found out, by protocol and how";
                let name = "weft_protocol_detections";
                samples.add(Kind::Counter, name, help, labels, count as f64);
            }
        }
    }
}

/// In the order of the variants.
const PROTOCOLS: [&str; 5] = ["http1", "http2", "tls", "opaque", "unknown"];
const HOW: [&str; 4] = ["declared", "detected", "server_first", "timeout"];
/// What happens to nearly every agent sooner or later.
const EXPECTED: [(&str, &str); 8] = [
    ("http1", "detected"),
    ("http2", "detected"),
    ("http1", "declared"),
    ("http2", "declared"),
    ("tls", "detected"),
    ("opaque", "detected"),
    ("opaque", "server_first"),
    ("unknown", "timeout"),
];
