//! What holds for the whole cluster.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::Serialize;

use crate::identity::TrustDomain;

/// Settings that the controller hands to every agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ClusterSettings {
    /// The trust domain of identities made here.
    pub trust_domain: TrustDomain,
    /// Ranges that pods get addresses from.
    pub pod_ranges: Vec<IpNet>,
    /// Ranges that Services get virtual addresses from; and single addresses that are said to be a pod's which is not
    /// known to have them. They must have a record, and are none of the cluster's networks to policies.
    pub service_ranges: Vec<IpNet>,
    /// Use tunnels between pods of one node too, instead of the handover in the process.
    pub force_tunnels: bool,
}

/// The roots that vouch for identities: DER certificates (X.509).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrustBundle {
    /// The trust domain they vouch for.
    pub trust_domain: TrustDomain,
    /// One DER certificate each.
    pub roots: Vec<Vec<u8>>,
}

impl ClusterSettings {
    /// Whether an address lies inside the cluster, so that it must have a record before anything
    /// is sent there.
    pub fn contains(&self, address: IpAddr) -> bool {
        self.is_pod_range(address) || self.service_ranges.iter().any(|net| net.contains(&address))
    }

    /// Whether an address lies in a pod range: what the policies call "the cluster's networks".
    pub fn is_pod_range(&self, address: IpAddr) -> bool {
        self.pod_ranges.iter().any(|net| net.contains(&address))
    }
}
