//! What NetworkPolicies let pods of this node connect to.

use std::net::SocketAddr;
use std::sync::Arc;

use weft_core::{DenyReason, NetworkRules, WorkloadId};

use super::Store;

impl Store {
    /// Decides whether a pod of this node may connect to an endpoint; `server` is the workload that has its address, if
    /// one has.
    ///
    /// # Errors
    /// NetworkPolicies do not let it, or the pod's are not known yet.
    pub fn let_out(
        &self,
        pod: &WorkloadId,
        to: SocketAddr,
        server: Option<&WorkloadId>,
    ) -> Result<(), DenyReason> {
        let policies = self.policies.load();
        let policy = policies.workloads.get(pod);
        weft_core::let_out(policy.map(Arc::as_ref), to, server)
    }

    /// The rules for what a pod of this node may connect to; none: it may connect to anything.
    ///
    /// # Errors
    /// Nobody knows yet.
    pub fn rules_out(&self, pod: &WorkloadId) -> Result<Option<Arc<NetworkRules>>, DenyReason> {
        let policies = self.policies.load();
        let policy = policies.workloads.get(pod);
        let policy = policy.ok_or(DenyReason::WorkloadPolicyUnknown)?;
        Ok(policy.network_egress.clone())
    }
}
