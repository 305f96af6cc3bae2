//! What the NetworkPolicies of Kubernetes let in at a workload's ports, and what they let it connect to. Besides the
//! mesh's own policy: both must allow a client.
//!
//! Rules name pods, not addresses: who a client is, is known by the record of the workload that has its address,
//! and, where that workload is meshed, by its identity too. So what has a pod's address and not its certificate is
//! not that pod. Networks are compared with the address alone, as Kubernetes does.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use serde::Serialize;

use super::{Client, DenyReason, NetworkMatch, WorkloadPolicy};
use crate::names::{Name, ObjectName};
use crate::protocol::PortRanges;
use crate::workload::{Workload, WorkloadId};

/// The rules for one workload, of one direction. It has at least one policy of that, so what no rule allows is denied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NetworkRules {
    /// The NetworkPolicies that select the workload: the first ones by name, at least one.
    pub policies: Vec<ObjectName>,
    /// Ingress: each lets some clients in. Egress: each lets the workload connect to some servers.
    pub rules: Vec<NetworkRule>,
}

/// Some ports, which are those of the server in either direction, and who may be at the other end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NetworkRule {
    /// Which; none: all ports.
    pub ports: Option<PortRanges>,
    /// Who may be at the other end; none: anybody.
    pub peers: Option<NetworkPeers>,
}

/// Who may be at the other end.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct NetworkPeers {
    /// Whoever has an address in these.
    pub networks: Vec<NetworkMatch>,
    /// Pods, by namespace.
    pods: BTreeMap<Name, NetworkPods>,
}

/// Some pods of a namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum NetworkPods {
    /// All of them.
    All,
    /// Those of these names, in order.
    Named(Vec<Name>),
}

impl NetworkRules {
    /// Whether a client may connect to this port. `workload_at` finds the workload that has an address.
    pub fn allow(
        &self,
        port: u16,
        client: Client<'_>,
        workload_at: impl FnOnce(IpAddr) -> Option<Arc<Workload>>,
    ) -> bool {
        let meant = || self.rules.iter().filter(|it| it.is_for(port));
        if meant().any(|it| it.admits_address(client.address)) {
            return true;
        }
        let names_pods = |it: &NetworkRule| it.peers.as_ref().is_some_and(|it| it.name_pods());
        if !meant().any(names_pods) {
            return false;
        }
        let workload = workload_at(client.address).filter(|it| is_proven(it, client));
        workload.is_some_and(|it| meant().any(|rule| rule.admits_pod(&it.id)))
    }

    /// Whether the workload may connect to an address and port; `server` is the workload that has the address, if one
    /// has.
    pub fn let_out(&self, to: SocketAddr, server: Option<&WorkloadId>) -> bool {
        let mut meant = self.rules.iter().filter(|it| it.is_for(to.port()));
        meant.any(|it| it.admits_address(to.ip()) || server.is_some_and(|pod| it.admits_pod(pod)))
    }

    /// Why is denied what no rule allows.
    pub(super) fn denial(&self) -> DenyReason {
        match self.policies.first() {
            Some(name) => DenyReason::NetworkPolicy(name.clone()),
            None => DenyReason::WorkloadPolicyUnknown,
        }
    }
}

/// Decides whether a workload may connect to an address and port, which is an endpoint's, not that of a Service.
/// `policy` is the workload's, `server` the workload that has the address, if one has. What is missing denies.
///
/// # Errors
/// NetworkPolicies do not let it out, or nobody knows whether they do.
pub fn let_out(
    policy: Option<&WorkloadPolicy>,
    to: SocketAddr,
    server: Option<&WorkloadId>,
) -> Result<(), DenyReason> {
    let policy = policy.ok_or(DenyReason::WorkloadPolicyUnknown)?;
    match &policy.network_egress {
        Some(rules) if !rules.let_out(to, server) => Err(rules.denial()),
        _ => Ok(()),
    }
}

/// Whether a client that has a workload's address is that workload.
fn is_proven(workload: &Workload, client: Client<'_>) -> bool {
    let identity = workload.identity();
    identity.is_none_or(|it| client.identity == Some(it))
}

impl NetworkRule {
    fn is_for(&self, port: u16) -> bool {
        self.ports.as_ref().is_none_or(|it| it.contains(port))
    }

    fn admits_address(&self, address: IpAddr) -> bool {
        self.peers.as_ref().is_none_or(|it| {
            let mut networks = it.networks.iter();
            networks.any(|it| it.contains(address))
        })
    }

    fn admits_pod(&self, pod: &WorkloadId) -> bool {
        let peers = self.peers.as_ref();
        peers.is_some_and(|it| match it.pods.get(&pod.0.namespace) {
            None => false,
            Some(NetworkPods::All) => true,
            Some(NetworkPods::Named(names)) => names.binary_search(&pod.0.name).is_ok(),
        })
    }
}

impl NetworkPeers {
    /// Whoever has an address in these networks.
    pub fn networks(networks: Vec<NetworkMatch>) -> Self {
        Self {
            networks,
            pods: BTreeMap::new(),
        }
    }

    /// Pods, by namespace.
    pub fn pods(&self) -> &BTreeMap<Name, NetworkPods> {
        &self.pods
    }

    /// Adds pods of a namespace to those that it has already.
    pub fn add(&mut self, namespace: Name, pods: NetworkPods) {
        let all = self.pods.entry(namespace);
        let all = all.or_insert_with(|| NetworkPods::Named(vec![]));
        match (&mut *all, pods) {
            (NetworkPods::All, _) => {}
            (it, NetworkPods::All) => *it = NetworkPods::All,
            (NetworkPods::Named(names), NetworkPods::Named(more)) => {
                names.extend(more);
                names.sort_unstable();
                names.dedup();
            }
        }
    }

    fn name_pods(&self) -> bool {
        !self.pods.is_empty()
    }
}

#[cfg(test)]
#[path = "network_tests.rs"]
mod tests;
