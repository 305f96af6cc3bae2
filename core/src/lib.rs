//! The mesh's domain: identities, workloads, services, policies, and the decisions over them.
//!
//! Everything here is pure: no I/O, no async, no Kubernetes, no protobuf. Whoever has raw input
//! (a manifest, a message, a certificate) turns it into these types once, at its own edge; inside
//! there are no half-checked strings. Decisions are functions over these types, tested by tables.

mod accrual;
mod cluster;
mod counts;
mod egress;
mod identity;
mod names;
mod policy;
mod protocol;
pub mod route;
mod service;
mod workload;

pub use accrual::{FailureAccrual, SuccessRate};
pub use cluster::{ClusterSettings, TrustBundle};
pub use counts::Counts;
pub use egress::{
    EgressName, EgressNetwork, EgressNetworks, EgressRoute, EgressSettings, TrafficPolicy,
};
pub use identity::{Identity, IdentityError, TrustDomain};
pub use names::{Name, NameError, ObjectName, TUNNEL_PORT};
pub use policy::{
    AccessPolicy, Authentication, Authorization, AuthorizationName, Client, DenyReason,
    IdentityMatch, LimitScope, Limited, Limiter, NetworkMatch, NetworkPeers, NetworkPods,
    NetworkRule, NetworkRules, Passed, PolicyGroup, ProxyProtocol, RateLimit, RateOverride,
    RequestDenial, Server, ServerBinding, ServerName, UnknownAccessPolicy, Verdict, WorkloadPolicy,
    authorize, authorize_request, let_out,
};
pub use protocol::{ListedPort, NoPortList, PortProtocol, PortRanges};
pub use service::{
    Endpoint, EndpointName, EndpointPlace, EndpointPort, InternalTraffic, Service, ServicePort,
    Weight,
};
pub use workload::{
    ContainerId, ContainerIdError, Mesh, NodePod, Owner, PodRuntime, Tunnel, Workload, WorkloadId,
};
