//! The other end of a tunnel, and what is known of a flow that it asks for, whichever protocol it speaks.

use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;
use std::sync::atomic::{AtomicU16, Ordering};

use weft_core::Identity;

use super::Arrival;
use crate::node::LocalPod;
use crate::proxy::Context;
use crate::proxy::record::{PathLabel, Record};
use crate::proxy::tunnel::claim::OpaqueBy;
use crate::telemetry::{Direction, TlsLabel};

/// The other end of a tunnel.
pub(super) struct Peer {
    /// Where it connects from: the client's address.
    pub address: IpAddr,
    /// Who it proved to be.
    pub identity: Identity,
    /// The pod's address that it connected to.
    pub connected: IpAddr,
    /// Whether it is an agent of this mesh.
    pub ours: bool,
}

/// The record of a flow that comes from there.
pub(super) fn tunnel_record(context: &Context, pod: &LocalPod, peer: &Peer) -> Record {
    let mut record = Record::new(Direction::Inbound, &pod.id);
    record.path = PathLabel::Tunnel;
    record.source = context
        .store
        .workload_at(peer.address)
        .filter(|it| it.identity() == Some(&peer.identity))
        .map(|it| it.id.clone());
    record.source_identity = Some(peer.identity.clone());
    record.destination = Some(pod.id.clone());
    record.destination_identity = Some(pod.identity.clone());
    record
}

/// A flow that a tunnel's peer asks for: to a port of the pod, from a port that it may have told.
pub(super) fn tunnel_arrival<'a>(
    peer: &'a Peer,
    (port, source_port, opaque_by): (NonZeroU16, Option<NonZeroU16>, Option<OpaqueBy>),
    record: &mut Record,
) -> Arrival<'a> {
    let to = SocketAddr::new(peer.connected, port.get());
    let client = SocketAddr::new(
        peer.address,
        source_port.map_or_else(made_up_port, NonZeroU16::get),
    );
    record.client = Some(client);
    record.original = Some(to);
    record.endpoint = Some(to);
    Arrival {
        client,
        identity: Some(&peer.identity),
        to,
        tls: TlsLabel::Mutual,
        opaque_by,
    }
}

/// HBONE does not tell the client's port. Servers log it and some tell connections apart by it, so
/// each flow gets another one.
fn made_up_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    FIRST_MADE_UP_PORT + number % (u16::MAX - FIRST_MADE_UP_PORT)
}

const FIRST_MADE_UP_PORT: u16 = 32768;
