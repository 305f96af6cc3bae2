//! What NetworkPolicies let the node's pods connect to: asked about the endpoint that was chosen, whichever way leads
//! there, as they speak of pods and of their ports and not of Services.
//!
//! It is asked each time that a way to an endpoint is decided, and by what goes on there whenever the rules of its pod
//! have changed: nobody keeps a list of that. What a pod has with itself is never asked about.

use std::net::SocketAddr;
use std::sync::Arc;

use arc_swap::{ArcSwap, ArcSwapOption};
use tokio_util::sync::CancellationToken;
use weft_core::{DenyReason, NetworkRules, WorkloadId};

use super::Context;
use super::error::FlowError;
use super::http::connection::Route;
use super::record::{PathLabel, Record};
use crate::balance::Forbidden;
use crate::discovery::Store;
use crate::node::{LocalPod, Pods};

/// Wakes what has left a pod when the rules for that change.
#[derive(Debug)]
pub struct Departed {
    /// As they were told last.
    rules: ArcSwapOption<NetworkRules>,
    /// Cancelled when they change, or all must end.
    round: ArcSwap<CancellationToken>,
    end: CancellationToken,
}

impl Departed {
    /// Of a pod whose flows all end with this.
    pub fn new(end: &CancellationToken) -> Self {
        Self {
            rules: ArcSwapOption::empty(),
            round: ArcSwap::from_pointee(end.child_token()),
            end: end.clone(),
        }
    }

    fn tell(&self, rules: Option<Arc<NetworkRules>>) {
        if *self.rules.load() != rules {
            self.rules.store(rules);
            let next = Arc::new(self.end.child_token());
            self.round.swap(next).cancel();
        }
    }
}

/// Has all that left pods asked about anew whose rules have changed.
pub(crate) fn tell(pods: &Pods, store: &Store) {
    for pod in pods.with_flows() {
        // A pod without a policy is about to leave the mesh, or has left: what it has goes on as long as it may then.
        if let Ok(rules) = store.rules_out(&pod.id) {
            pod.departed.tell(rules);
        }
    }
}

/// Whether a pod may connect to an endpoint; `server` is the workload that has its address, if one has.
///
/// # Errors
/// It may not.
pub(super) fn ask(
    context: &Context,
    pod: &LocalPod,
    to: SocketAddr,
    server: Option<&WorkloadId>,
) -> Result<(), FlowError> {
    let asked = context.store.let_out(&pod.id, to, server);
    asked.map_err(FlowError::NotLetOut)
}

/// Which endpoints a pod may not connect to. None: none.
pub(super) fn forbidden(context: &Context, pod: &Arc<LocalPod>) -> Option<Forbidden> {
    // Where nobody knows, that is said when one is chosen.
    let rules = context.store.rules_out(&pod.id).ok()??;
    let (store, pod) = (Arc::clone(&context.store), Arc::clone(pod));
    Some(Forbidden::new(move |to| {
        let server = || store.workload_at(to.ip());
        !pod.has_address(to.ip()) && !rules.let_out(to, server().as_ref().map(|it| &it.id))
    }))
}

/// Where something that has left a pod leads to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Leads<'a> {
    /// The endpoint; none: nowhere that is asked about.
    pub(super) to: Option<SocketAddr>,
    /// The workload that has its address, if one has.
    pub(super) server: Option<&'a WorkloadId>,
}

impl<'a> Leads<'a> {
    /// Where a flow leads to.
    pub(super) fn of(record: &'a Record) -> Self {
        Self {
            to: record.endpoint.filter(|_| record.path != PathLabel::Itself),
            server: record.destination.as_ref(),
        }
    }

    /// Where a connection leads to on which requests are sent.
    pub(super) fn of_route(route: &'a Route) -> Self {
        let to = Some(route.endpoint);
        Self {
            to: to.filter(|_| route.path != PathLabel::Itself),
            server: route.destination.as_ref(),
        }
    }

    /// Why it may not go on there any more; none: it may, or nobody knows.
    pub(super) fn revoked(self, store: &Store, pod: &LocalPod) -> Option<FlowError> {
        match store.let_out(&pod.id, self.to?, self.server) {
            Ok(()) | Err(DenyReason::WorkloadPolicyUnknown) => None,
            Err(reason) => Some(FlowError::NoLongerLetOut(reason)),
        }
    }
}

/// Ends when the pod's flows must, or this one may not go on where it leads to.
pub(super) async fn ended(store: &Store, pod: &LocalPod, leads: Leads<'_>) -> FlowError {
    let departed = &pod.departed;
    loop {
        // One wait for both: of what waits there is most.
        let round = CancellationToken::clone(&departed.round.load());
        if let Some(error) = leads.revoked(store, pod) {
            return error;
        }
        round.cancelled().await;
        if departed.end.is_cancelled() {
            return FlowError::Drained;
        }
    }
}

/// Counts it where that is what ended a flow or a request.
pub(super) fn count(context: &Context, pod: &LocalPod, error: &FlowError) {
    if let FlowError::NotLetOut(reason) = error {
        context.telemetry.not_let_out(&pod.labels, reason);
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use futures::poll;
    use weft_core::{AccessPolicy, WorkloadPolicy};
    use weft_proto::Resource;

    use super::*;

    const POD: &str = "shop/web";

    fn policy(is_open: bool) -> Resource {
        let nothing = NetworkRules {
            policies: vec!["shop/nothing".parse().expect("valid")],
            rules: vec![],
        };
        Resource::WorkloadPolicy(WorkloadPolicy {
            workload: POD.parse().expect("valid"),
            default: AccessPolicy::AllUnauthenticated,
            servers: vec![],
            network: None,
            network_egress: (!is_open).then(|| Arc::new(nothing)),
        })
    }

    /// As one is that accepts and is about to be enrolled, or has left and is being drained.
    #[tokio::test]
    async fn pods_that_are_not_enrolled_are_told_of_changes() {
        let (store, pods) = (Store::new(), Pods::default());
        store.apply(vec![policy(true)], vec![]);
        let pod = LocalPod::sample(POD);
        pods.begins(&pod);
        assert!(pods.all().is_empty());
        let leads = Leads {
            to: Some("10.1.0.9:80".parse().expect("valid")),
            server: None,
        };
        let mut ended = pin!(ended(&store, &pod, leads));
        assert!(poll!(ended.as_mut()).is_pending());
        tell(&pods, &store);
        assert!(poll!(ended.as_mut()).is_pending());
        store.apply(vec![policy(false)], vec![]);
        tell(&pods, &store);
        let error = poll!(ended.as_mut());
        let is_over = matches!(error, std::task::Poll::Ready(FlowError::NoLongerLetOut(_)));
        assert!(is_over, "{error:?}");
    }

    #[tokio::test]
    async fn pods_without_flows_are_forgotten() {
        let pods = Pods::default();
        let pod = LocalPod::sample(POD);
        pods.begins(&pod);
        assert_eq!(pods.with_flows().len(), 1);
        drop(pod);
        assert!(pods.with_flows().is_empty());
    }
}
