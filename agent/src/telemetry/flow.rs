//! The counters of one set of flow labels, and the handle that a flow holds on them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::labels::{FlowLabels, Peer};
use super::samples::{Kind, Samples};

/// A flow that is counted as open until this is dropped.
#[derive(Debug)]
pub struct FlowHandle(Arc<FlowCounters>);

/// The bytes of one of a flow's two connections, as the proxy sees them.
#[derive(Debug, Default)]
pub struct PeerCounters {
    read_bytes: AtomicU64,
    write_bytes: AtomicU64,
}

/// Counters that all flows with the same labels share.
#[derive(Debug, Default)]
pub(super) struct FlowCounters {
    opened: AtomicU64,
    closed: AtomicU64,
    source: PeerCounters,
    destination: PeerCounters,
}

impl FlowHandle {
    pub(super) fn open(counters: Arc<FlowCounters>) -> Self {
        counters.opened.fetch_add(1, Ordering::Relaxed);
        Self(counters)
    }

    /// The counters of one side.
    pub fn peer(&self, peer: Peer) -> &PeerCounters {
        match peer {
            Peer::Source => &self.0.source,
            Peer::Destination => &self.0.destination,
        }
    }
}

impl Drop for FlowHandle {
    fn drop(&mut self) {
        self.0.closed.fetch_add(1, Ordering::Relaxed);
    }
}

impl PeerCounters {
    /// Counts bytes that the proxy read from this peer.
    pub fn read(&self, bytes: u64) {
        self.read_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Counts bytes that the proxy wrote to this peer.
    pub fn write(&self, bytes: u64) {
        self.write_bytes.fetch_add(bytes, Ordering::Relaxed);
    }
}

impl FlowCounters {
    pub(super) fn collect(&self, labels: &FlowLabels, samples: &mut Samples) {
        let closed = self.closed.load(Ordering::Relaxed);
        // Read after `closed`, so that the difference is never negative.
        let opened = self.opened.load(Ordering::Relaxed);
        for (peer, bytes) in [
            (Peer::Source, &self.source),
            (Peer::Destination, &self.destination),
        ] {
            let labels = labels.render(peer);
            let mut add = |kind, name, help, value: u64| {
                samples.add(kind, name, help, labels.clone(), value as f64);
            };
            add(Kind::Counter, "tcp_open", "Connections opened", opened);
            add(Kind::Counter, "tcp_close", "Connections closed", closed);
            let open = opened.saturating_sub(closed);
            add(
                Kind::Gauge,
                "tcp_open_connections",
                "Connections open now",
                open,
            );
            let read = bytes.read_bytes.load(Ordering::Relaxed);
            add(
                Kind::Counter,
                "tcp_read_bytes",
                "Bytes read from peers",
                read,
            );
            let written = bytes.write_bytes.load(Ordering::Relaxed);
            add(
                Kind::Counter,
                "tcp_write_bytes",
                "Bytes written to peers",
                written,
            );
        }
    }
}
