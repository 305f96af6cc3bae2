//! Lets people watch exchanges and flows of this node's pods, through its controller.
//!
//! As with questions, the agent opens the stream, for as long as the control stream is open. What is sampled, and for how
//! long, is the controller's to say: when the stream ends, however it does, all sampling ends.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use prost::Message;
use tokio::sync::mpsc;
use tokio::time::{interval, sleep};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::AbortOnDropHandle;
use tonic::{Code, Status};
use tracing::{debug, info};
use weft_core::Name;
use weft_proto::v1::{self, tap_command::Command, tap_message::Message as Said};

use super::controller::Connection;
use crate::telemetry::Direction;
use crate::telemetry::exchange::RouteRef;
use crate::telemetry::tap::{Begin, Event, Named, Scope, Spec, Tapping, Taps, What, Who};

/// Who is watched.
pub(super) struct Tapped {
    pub(super) node: Name,
    pub(super) incarnation: u64,
    pub(super) taps: Arc<Taps>,
}

/// Samples until it is dropped.
pub(super) async fn serve(connection: Connection, tapped: Tapped) {
    loop {
        let Err(status) = session(connection.clone(), &tapped).await;
        let reason = status.message();
        debug!(reason, code = ?status.code(), "the controller's taps ended");
        if status.code() == Code::Unimplemented {
            // An older controller, by which nobody watches.
            return;
        }
        sleep(RETRY).await;
    }
}

async fn session(mut connection: Connection, tapped: &Tapped) -> Result<Infallible, Status> {
    let (sender, receiver) = mpsc::channel(MESSAGES_WAITING);
    let inspectable = v1::Inspectable {
        node: tapped.node.to_string(),
        incarnation: tapped.incarnation,
    };
    send(&sender, Said::Inspectable(inspectable)).await?;
    let request = connection.request(ReceiverStream::new(receiver));
    let mut commands = connection.client.tap(request).await?.into_inner();
    let mut running: HashMap<u64, AbortOnDropHandle<()>> = HashMap::new();
    while let Some(command) = commands.message().await? {
        match command.command {
            Some(Command::Start(start)) => {
                let tap = start.tap;
                // An older one of the same number ends first.
                running.remove(&tap);
                match tapped.taps.add(spec(start)) {
                    Ok(tapping) => {
                        let telling = tokio::spawn(tell(tap, tapping, sender.clone()));
                        running.insert(tap, AbortOnDropHandle::new(telling));
                    }
                    Err(error) => {
                        let reason = error.to_string();
                        send(&sender, Said::Ended(v1::TapEnded { tap, reason })).await?;
                    }
                }
            }
            Some(Command::Stop(tap)) => drop(running.remove(&tap)),
            None => {}
        }
        running.retain(|_, it| !it.is_finished());
        info!(
            open = running.len(),
            "taps of this node's pods have changed"
        );
    }
    Err(Status::cancelled("the controller ended the stream"))
}

/// Tells what is sampled until nobody hears it.
async fn tell(tap: u64, mut tapping: Tapping, sender: mpsc::Sender<v1::TapMessage>) {
    let mut events = Vec::with_capacity(EVENTS_PER_BATCH);
    let mut tick = interval(TELL_LOST);
    loop {
        tokio::select! {
            count = tapping.events(&mut events, EVENTS_PER_BATCH) => if count == 0 { return },
            _ = tick.tick() => {}
        }
        let mut batch = v1::TapBatch {
            tap,
            ..v1::TapBatch::default()
        };
        (batch.dropped, batch.left_out) = tapping.lost();
        let mut bytes = 0;
        for event in events.drain(..) {
            let event = written(event);
            bytes += event.encoded_len();
            if bytes > BYTES_PER_BATCH {
                let rest = v1::TapBatch {
                    tap,
                    ..v1::TapBatch::default()
                };
                let full = std::mem::replace(&mut batch, rest);
                bytes = event.encoded_len();
                if send(&sender, Said::Batch(full)).await.is_err() {
                    return;
                }
            }
            batch.events.push(event);
        }
        let is_empty = batch.events.is_empty() && batch.dropped + batch.left_out == 0;
        if !is_empty && send(&sender, Said::Batch(batch)).await.is_err() {
            return;
        }
    }
}

async fn send(sender: &mpsc::Sender<v1::TapMessage>, message: Said) -> Result<(), Status> {
    let message = v1::TapMessage {
        message: Some(message),
    };
    let sent = sender.send(message).await;
    sent.map_err(|_| Status::cancelled("the stream is closed"))
}

fn spec(start: v1::TapStart) -> Spec {
    let text = |it: String| (!it.is_empty()).then_some(it);
    let status = |it: u32| u16::try_from(it).unwrap_or(u16::MAX);
    Spec {
        target: scope(start.target.unwrap_or_default()),
        to: start.to.map(scope),
        from: start.from.map(scope),
        method: text(start.method),
        path_prefix: text(start.path_prefix),
        status: (start.status_last > 0)
            .then(|| status(start.status_first)..=status(start.status_last)),
        identity: text(start.identity),
        max_per_second: start.max_per_second,
    }
}

fn scope(scope: v1::TapScope) -> Scope {
    let text = |it: String| (!it.is_empty()).then_some(it);
    Scope {
        namespace: text(scope.namespace),
        kind: match scope.kind.as_str() {
            "" => Named::Any,
            "pod" => Named::Pod,
            "service" => Named::Service,
            _ => Named::Owner(scope.kind),
        },
        name: text(scope.name),
    }
}

fn written(event: Event) -> v1::TapEvent {
    use v1::tap_event::Event as Written;
    let at = event.at.duration_since(SystemTime::UNIX_EPOCH);
    let event_of = match event.what {
        What::Begin(begin) => Written::Begin(begun(&begin)),
        What::Head(status, latency) => Written::Head(v1::TapHead {
            status: status.into(),
            latency_us: microseconds(latency),
        }),
        What::End(end) => Written::End(v1::TapEnd {
            duration_us: microseconds(end.duration),
            request_bytes: end.request_bytes,
            response_bytes: end.response_bytes,
            grpc_status: end.grpc.unwrap_or_default().to_owned(),
            error: end.error.unwrap_or_default(),
        }),
    };
    v1::TapEvent {
        id: event.id,
        // A clock before 1970 is wrong, which 1970 is as well.
        at_us: microseconds(at.unwrap_or_default()),
        event: Some(event_of),
    }
}

fn begun(begin: &Begin) -> v1::TapBegin {
    let (tls, no_tls_reason) = begin.tls.values().unwrap_or_default();
    let asked = begin.asked.clone();
    let (method, authority, path) = asked
        .map(|it| (it.method, it.authority, it.path))
        .unwrap_or_default();
    let service = begin.service.as_ref();
    v1::TapBegin {
        protocol: begin.protocol.as_str().to_owned(),
        inbound: begin.direction == Direction::Inbound,
        source: Some(who(&begin.source)),
        destination: Some(who(&begin.destination)),
        service: service.map_or_else(String::new, |(name, port)| format!("{name}:{port}")),
        tls: tls.to_owned(),
        no_tls_reason: no_tls_reason.unwrap_or_default().to_owned(),
        method,
        authority,
        path,
        route: match &begin.route {
            Some(RouteRef::Resource { kind, name, .. }) => format!("{kind}/{name}"),
            Some(RouteRef::Default(_)) | None => String::new(),
        },
    }
}

fn who(who: &Who) -> v1::TapWho {
    let workload = who.workload.as_ref().map(|it| &it.0);
    let text = |it: Option<&Name>| it.map_or_else(String::new, Name::to_string);
    let owner = who.owner.as_ref();
    v1::TapWho {
        address: who.address.map_or_else(String::new, |it| it.to_string()),
        namespace: text(workload.map(|it| &it.namespace)),
        pod: text(workload.map(|it| &it.name)),
        owner_kind: text(owner.map(|it| &it.kind)),
        owner: text(owner.map(|it| &it.name)),
        identity: who
            .identity
            .as_ref()
            .map_or_else(String::new, |it| it.to_string()),
    }
}

fn microseconds(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// After a stream that ended while the control stream goes on.
const RETRY: Duration = Duration::from_secs(2);
/// What was lost is told at least so often.
const TELL_LOST: Duration = Duration::from_secs(1);
const EVENTS_PER_BATCH: usize = 64;
/// Half of what a controller reads at once.
const BYTES_PER_BATCH: usize = 32 * 1024;
/// Messages that wait for the connection.
const MESSAGES_WAITING: usize = 4;
