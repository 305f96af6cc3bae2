//! Connections that are more than a pod may have: those that speak HTTP are told so, and all others are reset.
//!
//! Only a few are told at a time, and each has little time to say what it speaks: who floods a pod's agent gets the
//! same for nearly all connections as if nobody were told. A place costs a descriptor, a task, and small buffers for a
//! few seconds at most; an answer costs less than a connection that is served, and the pod's own threads. These
//! places are not those of clients who are told that [policy denies them](super::http::refusal): a flood of
//! connections must not keep anybody from hearing that. Nor does one that arrives keep the pod's own from theirs.

use std::sync::Arc;

use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::error::FlowError;
use super::http::refusal::{self, Refused};
use super::inbound::refuse;
use super::outbound::Classified;
use super::tcp::FlowSocket;
use super::usage::{From, Party};
use super::{Context, http, socket};
use crate::discovery::Destination;
use crate::node::LocalPod;
use crate::telemetry::Direction;

/// How many connections may be told at a time, for each direction.
#[derive(Debug)]
pub(super) struct Places([Arc<Semaphore>; 2]);

/// A place among those who are told.
struct Place {
    _of_pod: OwnedSemaphorePermit,
    _of_node: OwnedSemaphorePermit,
}

/// Gives back a connection that was accepted and has no place: from the pod, or to it.
pub(super) fn turn_away(
    context: &Arc<Context>,
    pod: &Arc<LocalPod>,
    stream: TcpStream,
    direction: Direction,
) {
    let error = FlowError::TooManyFlows;
    let Some(place) = Place::take(&pod.usage.excess, &context.excess, direction) else {
        refuse(context, pod, stream, &error);
        return;
    };
    if let Some(refusal) = error.refusal() {
        context.telemetry.refusal(&pod.id, refusal);
    }
    tracing::debug!(pod = %pod.id, %error, "connection turned away");
    let (context, own) = (Arc::clone(context), Arc::clone(pod));
    pod.spawn_flow(async move {
        socket::bound_buffers(&own, &stream);
        // Dropped it is reset.
        let client = FlowSocket::accepted(stream);
        tell_in(&place, &context, &own, client, direction).await;
    });
}

/// The same of one that was let in before it was known that it has no place, and was counted.
pub(super) async fn tell(
    context: &Arc<Context>,
    pod: &Arc<LocalPod>,
    client: FlowSocket,
    direction: Direction,
) {
    if let Some(place) = Place::take(&pod.usage.excess, &context.excess, direction) {
        Box::pin(tell_in(&place, context, pod, client, direction)).await;
    }
}

impl Places {
    /// So many, all free.
    pub(super) fn new(count: usize) -> Self {
        Self([(); 2].map(|()| Arc::new(Semaphore::new(count))))
    }

    fn take(&self, direction: Direction) -> Option<OwnedSemaphorePermit> {
        let places = Arc::clone(&self.0[direction as usize]);
        places.try_acquire_owned().ok()
    }
}

impl Place {
    /// None: so many are being told that this one is not.
    fn take(of_pod: &Places, of_node: &Places, direction: Direction) -> Option<Self> {
        Some(Self {
            _of_pod: of_pod.take(direction)?,
            _of_node: of_node.take(direction)?,
        })
    }
}

async fn tell_in(
    _place: &Place,
    context: &Context,
    pod: &Arc<LocalPod>,
    client: FlowSocket,
    direction: Direction,
) {
    let may_be_http = match direction {
        Direction::Outbound => from_pod(context, pod, &client),
        Direction::Inbound => to_pod(context, pod, &client),
    };
    if !may_be_http.unwrap_or(false) {
        return;
    }
    let telling = async {
        let Some(begun) = refusal::begun(Refused::Socket(client)).await else {
            return;
        };
        let party = match direction {
            Direction::Outbound => Party::of_pod(&pod.usage),
            Direction::Inbound => Party::at_pod(&pod.usage, From::Strangers),
        };
        let errors = context.telemetry.http_errors(direction, &pod.labels);
        let why = (&FlowError::TooManyFlows, (party, direction));
        refusal::answer(context, pod, begun, why, move |told| {
            errors.count(told.label(), told.reason());
        })
        .await;
    };
    tokio::select! {
        () = telling => {}
        () = pod.end_flows.cancelled() => {}
    }
}

/// Whether what the pod wants to reach may speak HTTP, as far as is known already.
fn from_pod(context: &Context, pod: &LocalPod, client: &FlowSocket) -> Result<bool, FlowError> {
    let original = socket::original_destination(context, client.socket())?;
    let classified = match context.store.classify(original) {
        Destination::Service(port) => Classified::Service(port),
        Destination::Workload(_) | Destination::Outside => Classified::Address,
        Destination::ServiceWithoutPort(_) | Destination::Unknown => return Ok(false),
    };
    // What stays in the pod is none of the mesh's business.
    let is_elsewhere = !pod.has_address(original.ip());
    Ok(is_elsewhere && http::may_be(context.declared(pod, &classified, original)))
}

/// Whether the pod's port may speak HTTP.
fn to_pod(context: &Context, pod: &LocalPod, client: &FlowSocket) -> Result<bool, FlowError> {
    let to = socket::local_address(client.socket())?;
    if socket::is_redirected(context, client.socket())? || !pod.has_address(to.ip()) {
        return Ok(false);
    }
    Ok(http::may_be(
        context.store.inbound_protocol(&pod.id, to.port()),
    ))
}

/// Connections that are told at a time, of all pods of the node, in each direction; more are reset.
pub(super) const MOST_TOLD: usize = 64;
/// The same of one pod.
pub(super) const MOST_TOLD_PER_POD: usize = MOST_TOLD / 4;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_are_told_at_a_time_and_no_pod_takes_all_places() {
        let of_node = Places::new(MOST_TOLD);
        let pods = [(); 6].map(|()| Places::new(MOST_TOLD_PER_POD));
        let take = |of_pod: &Places, direction| -> Vec<Place> {
            let places = std::iter::from_fn(|| Place::take(of_pod, &of_node, direction));
            places.take(1000).collect()
        };
        let taken = pods.each_ref().map(|it| take(it, Direction::Inbound));
        assert_eq!(taken.each_ref().map(Vec::len), [16, 16, 16, 16, 0, 0]);
        // What arrives takes nothing from what leaves.
        assert_eq!(take(&pods[0], Direction::Outbound).len(), 16);
        drop(taken);
        // Who got none has kept nothing of its own either.
        assert_eq!(take(&pods[4], Direction::Inbound).len(), 16);
    }
}
