//! One piece of the state that the controller hands out, in the domain's types.

use std::fmt;

use weft_core::{
    ClusterSettings, EgressNetwork, Endpoint, Name, NodePod, Server, Service, TrustBundle,
    Workload, WorkloadPolicy, route::RouteTable,
};

/// A resource: what is pushed, versioned, accepted or rejected as one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resource {
    /// The cluster's settings; there is one.
    Cluster(ClusterSettings),
    /// The roots of a trust domain.
    TrustBundle(TrustBundle),
    /// A workload of any node.
    Workload(Workload),
    /// A pod of the agent's own node.
    NodePod(NodePod),
    /// A service.
    Service(Service),
    /// An endpoint of a service.
    Endpoint(Endpoint),
    /// The policy of a workload of the agent's own node.
    WorkloadPolicy(WorkloadPolicy),
    /// A Server that a workload of the agent's own node is governed by.
    Server(Server),
    /// The routes of a port of a service.
    RouteTable(RouteTable),
    /// What may leave the cluster.
    EgressNetwork(EgressNetwork),
    /// A namespace that opts in, or that has pods which do so themselves.
    MeshNamespace(Name),
}

/// The kinds of [`Resource`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum Kind {
    Cluster,
    TrustBundle,
    Workload,
    NodePod,
    Service,
    Endpoint,
    WorkloadPolicy,
    Server,
    RouteTable,
    EgressNetwork,
    MeshNamespace,
}

/// Names a resource.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    /// Its kind.
    pub kind: Kind,
    /// Its name, unique within the kind.
    pub name: String,
}

impl Resource {
    /// The resource's name.
    pub fn key(&self) -> Key {
        let (kind, name) = match self {
            Self::Cluster(_) => (Kind::Cluster, "cluster".to_owned()),
            Self::TrustBundle(it) => (Kind::TrustBundle, it.trust_domain.to_string()),
            Self::Workload(it) => (Kind::Workload, it.id.to_string()),
            Self::NodePod(it) => (Kind::NodePod, it.id.to_string()),
            Self::Service(it) => (Kind::Service, it.name.to_string()),
            Self::Endpoint(it) => (Kind::Endpoint, it.name.to_string()),
            Self::WorkloadPolicy(it) => (Kind::WorkloadPolicy, it.workload.to_string()),
            Self::Server(it) => (Kind::Server, it.name.to_string()),
            Self::RouteTable(it) => (Kind::RouteTable, it.name().to_string()),
            Self::EgressNetwork(it) => (Kind::EgressNetwork, it.name().to_string()),
            Self::MeshNamespace(it) => (Kind::MeshNamespace, it.to_string()),
        };
        Key { kind, name }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Cluster => "cluster",
            Self::TrustBundle => "trust bundle",
            Self::Workload => "workload",
            Self::NodePod => "node pod",
            Self::Service => "service",
            Self::Endpoint => "endpoint",
            Self::WorkloadPolicy => "workload policy",
            Self::Server => "server",
            Self::RouteTable => "route table",
            Self::EgressNetwork => "egress network",
            Self::MeshNamespace => "mesh namespace",
        })
    }
}

impl fmt::Display for Key {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} {}", self.kind, self.name)
    }
}
