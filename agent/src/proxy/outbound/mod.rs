//! The half of a flow that belongs to its client: what did it want to reach, which way leads there,
//! and who must answer.
//!
//! Nothing is taken from the client before a server has accepted, so a flow can be tried at another
//! endpoint without losing a byte. What is HTTP goes on in `http::outbound`. Whatever is not known is refused:
//! plaintext leaves only for what a record says is not meshed, or for what lies outside of the cluster.

mod find;
mod reach;
mod tunnel;
mod wait;
mod weft1;

use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::task::task_tracker::TaskTrackerToken;
use weft_core::{Identity, Workload};

pub(super) use self::find::must_be_known;
use self::find::{Found, Looked, find};
pub(super) use self::reach::{classify, connect, decide, is_of_endpoint, route, why_none};
pub(super) use self::wait::Waiter;
use super::ends::unless;
use super::error::FlowError;
use super::inbound::{self, Admitted, accept_each};
use super::let_out::Leads;
use super::record::{PathLabel, Record};
use super::tcp::{Broken, FlowSocket, Moved, Side, join_sockets, join_tunnel};
use super::tunnel::claim::OpaqueBy;
use super::tunnel::client::Opened;
use super::{Context, egress, excess, http, let_out, socket, tap};
use crate::balance::breaker::Judgement;
use crate::discovery::ServicePortEntry;
use crate::identity::Alpn;
use crate::node::LocalPod;
use crate::telemetry::{Direction, FlowLabels, TlsLabel};

/// Stage one: a connection of a pod's application.
#[derive(Debug)]
pub struct Accepted {
    /// The application's side.
    pub socket: FlowSocket,
    /// The application's address, as others see it.
    pub client: SocketAddr,
    /// Where it wanted to go.
    pub original: SocketAddr,
}

/// Who connects to a server.
#[derive(Clone, Copy, Debug)]
pub(super) struct Caller<'a> {
    /// The application's address, as others see it.
    pub(super) address: SocketAddr,
    /// Its socket, if what it has said already may be sent before the server has accepted.
    pub(super) said: Option<&'a TcpStream>,
    /// It is not looked into, as the service that it goes to may say.
    pub(super) is_left_alone: bool,
    /// The service whose endpoint is connected to.
    pub(super) service: Option<&'a ServicePortEntry>,
}

impl Caller<'_> {
    /// By whose declaration it is not looked into, for the server's agent to see for itself.
    fn opaque_by(&self) -> Option<OpaqueBy> {
        let port = self.service.filter(|_| self.is_left_alone)?;
        let claim = OpaqueBy {
            service: port.service.name.clone(),
            port: NonZeroU16::new(port.port)?,
        };
        port.protocol().is_opaque().then_some(claim)
    }
}

/// Stage two: what the destination is.
#[derive(Clone, Debug)]
pub enum Classified {
    /// A port of a service: any of its endpoints will do.
    Service(Arc<ServicePortEntry>),
    /// That address and port.
    Address,
}

/// Stage three: the way to one endpoint.
#[derive(Debug)]
pub enum Way {
    /// To the client's own pod, as if there were no mesh.
    Itself,
    /// To a meshed pod of this node.
    SameNode(Arc<LocalPod>),
    /// To a meshed workload elsewhere, which must prove to be who its record says.
    Tunnel {
        /// The record.
        workload: Arc<Workload>,
        /// Who must answer.
        identity: Identity,
        /// What is spoken there.
        alpn: Alpn,
    },
    /// To what is not part of the mesh.
    Plaintext(Option<Arc<Workload>>),
}

/// Stage four: a server has accepted.
#[derive(Debug)]
pub enum Connected {
    /// On a socket.
    Socket(FlowSocket),
    /// On this node, with the inbound half's consent. The flow's task is the client pod's; by the
    /// token it counts among the server pod's flows too, and its removal waits for it.
    SameNode(Box<Admitted>, TaskTrackerToken),
    /// Through a tunnel.
    Tunnel(Box<Opened>),
    /// Through a tunnel of its own.
    Channel(Box<weft1::Asked>),
}

/// Serves the connections of the pod's applications, until its listeners close.
pub async fn serve(context: Arc<Context>, pod: Arc<LocalPod>, listener: TcpListener) {
    let room = Arc::new(Semaphore::new(context.config.limits.flows_per_pod));
    accept_each(&context, &pod, listener, |stream, peer| {
        let Ok(place) = Arc::clone(&room).try_acquire_owned() else {
            excess::turn_away(&context, &pod, stream, Direction::Outbound);
            return;
        };
        let parts = (Arc::clone(&context), Arc::clone(&pod));
        // Made inside: what is taken into a block and awaited there has its room twice.
        pod.spawn_flow(async move {
            flow(parts.0, parts.1, (stream, peer)).await;
            drop(place);
        });
    })
    .await;
}

async fn flow(context: Arc<Context>, pod: Arc<LocalPod>, stream: (TcpStream, SocketAddr)) {
    let mut record = new_record(&pod);
    let result = run(&context, &pod, stream, &mut record).await;
    if let Err(error) = &result {
        egress::count(&context, &pod, error);
        let_out::count(&context, &pod, error);
    }
    record.finish(&context.telemetry, &context.store, &result);
}

async fn run(
    context: &Arc<Context>,
    pod: &Arc<LocalPod>,
    stream: (TcpStream, SocketAddr),
    record: &mut Record,
) -> Result<(), FlowError> {
    let accepted = accept(context, pod, stream)?;
    record.client = Some(accepted.client);
    record.original = Some(accepted.original);
    // Boxed: nothing of it is needed while bytes are copied.
    let finding = Box::pin(find(context, pod, &accepted, record));
    let found = tokio::select! {
        // First: it knows of a client that leaves whether that was refused before.
        biased;
        found = finding => found,
        () = accepted.socket.failed() => return Err(Broken::Reset(Side::Client).into()),
        () = pod.end_flows.cancelled() => return Err(FlowError::Drained),
    };
    let found = found.inspect_err(|error| {
        // Of a service only if every endpoint was asked: others may be listening.
        if error.nothing_listens() && !record.more_endpoints {
            remember_refused(context, pod, accepted.original);
        }
    })?;
    match found {
        Found::Opaque(reached, looked) => {
            let (connected, mut in_flight) = *reached;
            if let Some(in_flight) = &mut in_flight {
                in_flight.judge(Judgement::Success, None);
            }
            let connected = (connected, looked != Looked::Not);
            let mut socket = accepted.socket;
            if looked == Looked::Later {
                let anew = socket.anew();
                socket = anew.map_err(|error| Broken::socket(Side::Client, error))?;
            }
            carry(context, pod, socket, connected, record).await
        }
        Found::Http(client, connected) => {
            if let Some(connected) = connected {
                keep(&client, pod, *connected, record).await;
            }
            record.is_told_elsewhere = true;
            record.has_exchanges = true;
            Box::pin(client.serve(accepted.socket)).await
        }
    }
}

/// Has a connection that was made meanwhile kept for the client's exchanges; it is told of with the record
/// so far.
fn keep<'a>(
    client: &'a http::outbound::Client,
    pod: &LocalPod,
    connected: Connected,
    record: &mut Record,
) -> BoxFuture<'a, ()> {
    let own = Box::new(std::mem::replace(record, new_record(pod)));
    Box::pin(client.keep(connected, own))
}

fn accept(
    context: &Context,
    pod: &LocalPod,
    (stream, peer): (TcpStream, SocketAddr),
) -> Result<Accepted, FlowError> {
    socket::bound_buffers(pod, &stream);
    let socket = FlowSocket::accepted(stream);
    let original = socket::original_destination(context, socket.socket())?;
    Ok(Accepted {
        client: client_address(pod, peer, original.ip())?,
        original,
        socket,
    })
}

/// A redirected connection comes from a loopback address; others know the client by its pod's. A pod
/// without an address of the destination's family has no business there, and must not appear as
/// the loopback, which applications trust.
pub(super) fn client_address(
    pod: &LocalPod,
    peer: SocketAddr,
    to: IpAddr,
) -> Result<SocketAddr, FlowError> {
    if pod.has_address(peer.ip()) {
        return Ok(peer);
    }
    let record = pod.record.load();
    let mut own = record.addresses.iter();
    let own = own.find(|it| it.is_ipv4() == to.is_ipv4());
    let own = own.ok_or(FlowError::NoSourceAddress(to))?;
    Ok(SocketAddr::new(*own, peer.port()))
}

/// A record of a flow of the pod.
pub(super) fn new_record(pod: &LocalPod) -> Record {
    let mut record = Record::new(Direction::Outbound, &pod.id);
    record.source = Some(pod.id.clone());
    record.source_identity = Some(pod.identity.clone());
    record
}

/// Counts the flow as open, if it is not yet.
pub(super) fn count(context: &Context, pod: &LocalPod, record: &mut Record) {
    if !record.moved.is_metered() {
        let meter = context.telemetry.flow(labels(pod, record));
        record.moved = Moved::metered(vec![meter], &pod.usage);
    }
}

/// Copies until both sides closed. What it yields is as large as this way of copying needs it. It is said
/// whether what is spoken was counted.
fn carry<'a>(
    context: &'a Arc<Context>,
    pod: &'a LocalPod,
    client: FlowSocket,
    (connected, is_counted): (Connected, bool),
    record: &'a mut Record,
) -> BoxFuture<'a, Result<(), FlowError>> {
    count(context, pod, record);
    tap::opened(context, pod, Direction::Outbound, record);
    match connected {
        Connected::Socket(server) if record.egress.is_some() => {
            let record = &*record;
            Box::pin(async move {
                let copying = pin!(join_sockets(client, server, &record.moved));
                Ok(unless(pin!(kept_inside(context, pod, record)), copying).await??)
            })
        }
        Connected::Socket(server) => {
            let record = &*record;
            Box::pin(async move {
                let ended = let_out::ended(&context.store, pod, Leads::of(record));
                let copying = pin!(join_sockets(client, server, &record.moved));
                Ok(unless(pin!(ended), copying).await??)
            })
        }
        Connected::SameNode(admitted, tracked) => {
            let arrived = (*admitted, is_counted);
            Box::pin(async move {
                let _tracked = tracked;
                inbound::here::carry(context, pod, client, arrived, record).await
            })
        }
        Connected::Channel(asked) => Box::pin(asked.carry(client, &context.store, pod, record)),
        Connected::Tunnel(opened) => {
            let Opened { halves, slot, .. } = *opened;
            let record = &*record;
            Box::pin(async move {
                let _slot = slot;
                let ended = let_out::ended(&context.store, pod, Leads::of(record));
                let copying = pin!(join_tunnel(client, Side::Client, halves, &record.moved));
                Ok(unless(pin!(ended), copying).await??)
            })
        }
    }
}

/// Ends when the pod's flows must. It is looked at before the copying, which fails at the same moment
/// if it goes through a tunnel.
pub(super) async fn drained(pod: &LocalPod) -> FlowError {
    pod.end_flows.cancelled().await;
    FlowError::Drained
}

/// Ends when a flow may not leave the cluster any more, or the pod's flows must end.
async fn kept_inside(context: &Context, pod: &LocalPod, record: &Record) -> FlowError {
    match (&record.egress, record.original) {
        (Some(entry), Some(to)) => tokio::select! {
            biased;
            () = entry.end().cancelled() => egress::ended(context, pod, to),
            error = let_out::ended(&context.store, pod, Leads::of(record)) => error,
        },
        _ => drained(pod).await,
    }
}

pub(super) fn labels(pod: &LocalPod, record: &Record) -> FlowLabels {
    FlowLabels {
        direction: Direction::Outbound,
        pod: pod.labels.clone(),
        destination: record.destination.clone(),
        service: record.service.clone(),
        tls: match record.path {
            PathLabel::Tunnel => TlsLabel::Mutual,
            PathLabel::SameNode => TlsLabel::SameNode,
            PathLabel::Itself => TlsLabel::Loopback,
            PathLabel::Plaintext | PathLabel::Unknown => TlsLabel::None,
        },
        client: None,
        server: record.destination_identity.clone(),
        verdict: None,
    }
}

pub(super) fn remember_refused(context: &Context, pod: &LocalPod, original: SocketAddr) {
    let remembered = context
        .bpf
        .remember_refused(pod.cookie, original, REFUSED_FOR);
    if let Err(error) = remembered {
        tracing::warn!(pod = %pod.id, %error, "remembering a refused destination");
    }
}

/// How long connects to a destination where nothing listened are refused at once.
const REFUSED_FOR: Duration = Duration::from_secs(3);

/// A flow that waits is what a node has most of. These sizes are a part of the memory that it takes, in
/// a test so that they grow on purpose only.
#[cfg(test)]
mod tests {
    use super::*;
    use crate::discovery::Store;

    fn yielded<A, B, C, F>(_: impl FnOnce(A, B, C) -> F) -> usize {
        size_of::<F>()
    }

    fn yielded_by<A, B, C, D, F>(_: impl FnOnce(A, B, C, D) -> F) -> usize {
        size_of::<F>()
    }

    #[test]
    fn flows_are_small() {
        let sockets = |client, server, moved: &'static Moved| join_sockets(client, server, moved);
        let tunnel =
            |client, side, halves, moved: &'static Moved| join_tunnel(client, side, halves, moved);
        type Of = (&'static Store, &'static LocalPod, &'static Record);
        let channel = |asked: weft1::Asked, client, (store, pod, record): Of| {
            asked.carry(client, store, pod, record)
        };
        let sizes = [
            ("a flow", yielded(flow), 1184),
            ("copying between sockets", yielded(sockets), 448),
            ("copying into a stream", yielded_by(tunnel), 1400),
            ("copying into a channel", yielded(channel), 1480),
        ];
        for (what, size, most) in sizes {
            println!("{what}: {size} bytes");
            assert!(size <= most, "{what}: {size} bytes, not {most}");
        }
    }
}
