//! The policy in force on this node, as one immutable snapshot.
//!
//! A push may change several objects that only make sense together (a Server and the
//! authorizations that came with it, the settings that say what "cluster" means): a decision sees all
//! of a push or nothing of it.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use http::request::Parts;
use weft_core::{
    Client, ClusterSettings, DenyReason, EgressNetworks, NetworkRules, Passed, PortProtocol,
    RequestDenial, Server, ServerName, Verdict, Workload, WorkloadId, WorkloadPolicy,
};

use super::dump::{ShownEgress, ShownPolicies, ShownServer, ShownWorkloadPolicy};

/// What is asked about each request at a port: the Server that governs it, which has routes or a limit.
#[derive(Clone, Debug)]
pub struct RequestPolicy {
    cluster: Arc<ClusterSettings>,
    server: Arc<Server>,
}

impl RequestPolicy {
    /// The Server.
    pub fn server(&self) -> &Server {
        &self.server
    }

    /// Decides about a request; `is_grpc` is whether it is a call of gRPC.
    ///
    /// # Errors
    /// It is denied, or is no route's.
    pub fn authorize(
        &self,
        client: Client<'_>,
        head: &Parts,
        is_grpc: bool,
    ) -> Result<Passed<'_>, RequestDenial> {
        let client = canonical(client);
        weft_core::authorize_request(&self.cluster, &self.server, client, head, is_grpc)
    }
}

/// Puts what is known already in the place of the same.
fn share<'a>(
    rules: &mut Option<Arc<NetworkRules>>,
    known: impl Iterator<Item = &'a Option<Arc<NetworkRules>>>,
) {
    if let Some(rules) = rules
        && let Some(same) = known.flatten().find(|it| *it == rules)
    {
        *rules = Arc::clone(same);
    }
}

/// A v4-mapped address must not slip past the ranges of a policy.
fn canonical(client: Client<'_>) -> Client<'_> {
    Client {
        address: client.address.to_canonical(),
        identity: client.identity,
    }
}

/// Policies of the node's workloads, and what decisions over them need. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(super) struct Policies {
    /// Counts changes.
    pub(super) number: u64,
    pub(super) cluster: Option<Arc<ClusterSettings>>,
    pub(super) workloads: HashMap<WorkloadId, Arc<WorkloadPolicy>>,
    pub(super) servers: HashMap<ServerName, Arc<Server>>,
    /// What the pods may reach outside of the cluster.
    pub(super) egress: EgressNetworks,
}

impl Policies {
    /// Decides; `workload_at` finds the workload that has an address. What is not known denies.
    pub(super) fn authorize(
        &self,
        workload: &WorkloadId,
        port: u16,
        client: Client<'_>,
        workload_at: impl FnOnce(IpAddr) -> Option<Arc<Workload>>,
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
            workload_at,
            port,
            canonical(client),
        )
    }

    /// Puts a workload's policy in the place of the one before.
    pub(super) fn put_workload(&mut self, mut policy: WorkloadPolicy) {
        // Pods that the same NetworkPolicies select have the same rules, which can name thousands of pods.
        let known = || self.workloads.values();
        share(&mut policy.network, known().map(|it| &it.network));
        let known = known().map(|it| &it.network_egress);
        share(&mut policy.network_egress, known);
        let id = policy.workload.clone();
        self.workloads.insert(id, Arc::new(policy));
    }

    /// What is to be asked about each request at a port of a workload; none: nothing besides what is asked
    /// about its connection.
    pub(super) fn requests(&self, workload: &WorkloadId, port: u16) -> Option<RequestPolicy> {
        let policy = self.workloads.get(workload)?;
        let binding = policy.servers.iter().find(|it| it.port == port)?;
        let server = self.servers.get(&binding.server)?;
        if server.routes.is_none() && server.rate_limit.is_none() {
            return None;
        }
        Some(RequestPolicy {
            cluster: Arc::clone(self.cluster.as_ref()?),
            server: Arc::clone(server),
        })
    }

    /// What a Server says that a port of a workload speaks.
    pub(super) fn declared_protocol(
        &self,
        workload: &WorkloadId,
        port: u16,
    ) -> Option<PortProtocol> {
        let policy = self.workloads.get(workload)?;
        let binding = policy.servers.iter().find(|it| it.port == port)?;
        PortProtocol::from_server(self.servers.get(&binding.server)?.proxy_protocol)
    }

    /// For people.
    pub(super) fn dump(&self) -> ShownPolicies {
        let mut workloads: Vec<_> = self.workloads.values().cloned().collect();
        workloads.sort_by(|a, b| a.workload.cmp(&b.workload));
        let mut servers: Vec<_> = self.servers.values().cloned().collect();
        servers.sort_by(|a, b| a.name.cmp(&b.name));
        ShownPolicies {
            workloads: workloads.into_iter().map(ShownWorkloadPolicy).collect(),
            servers: servers.into_iter().map(ShownServer).collect(),
            egress_networks: self.egress.list().into_iter().map(ShownEgress).collect(),
        }
    }
}
