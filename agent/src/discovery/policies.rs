//! The policy in force on this node, as one immutable snapshot.
//!
//! A push may change several objects that only make sense together (a Server and the
//! authorizations that came with it, the settings that say what "cluster" means): a decision sees all
//! of a push or nothing of it.

use std::collections::HashMap;
use std::sync::Arc;

use serde_json::{Value, json};
use weft_core::{
    Client, ClusterSettings, DenyReason, Server, ServerName, Verdict, WorkloadId, WorkloadPolicy,
};

use super::store::named;

/// Policies of the node's workloads, and what decisions over them need. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(super) struct Policies {
    pub(super) cluster: Option<Arc<ClusterSettings>>,
    pub(super) workloads: HashMap<WorkloadId, Arc<WorkloadPolicy>>,
    pub(super) servers: HashMap<ServerName, Arc<Server>>,
}

impl Policies {
    /// Decides. What is not known denies.
    pub(super) fn authorize(
        &self,
        workload: &WorkloadId,
        port: u16,
        client: Client<'_>,
    ) -> Verdict {
        let Some(cluster) = &self.cluster else {
            return Verdict::Deny {
                server: None,
                reason: DenyReason::WorkloadPolicyUnknown,
            };
        };
        weft_core::authorize(
            cluster,
            self.workloads.get(workload).map(Arc::as_ref),
            |name| self.servers.get(name).map(Arc::as_ref),
            port,
            Client {
                // A v4-mapped address must not slip past the ranges of a policy.
                address: client.address.to_canonical(),
                identity: client.identity,
            },
        )
    }

    /// For people.
    pub(super) fn dump(&self) -> Value {
        let mut workloads: Vec<&WorkloadPolicy> =
            self.workloads.values().map(Arc::as_ref).collect();
        workloads.sort_by(|a, b| a.workload.cmp(&b.workload));
        let mut servers: Vec<&Server> = self.servers.values().map(Arc::as_ref).collect();
        servers.sort_by(|a, b| a.name.cmp(&b.name));
        let workload = |it: &&WorkloadPolicy| named(&it.workload.0, "workload", it);
        let server = |it: &&Server| {
            let mut shown = named(&it.name.name, "name", it);
            shown["group"] = json!(it.name.group);
            shown
        };
        json!({
            "workloads": workloads.iter().map(workload).collect::<Vec<_>>(),
            "servers": servers.iter().map(server).collect::<Vec<_>>(),
        })
    }
}
