//! Services and their endpoints.
//!
//! Endpoints are resources of their own, one per (service, address), so that one changed pod is
//! one small message and not the whole service again.

use std::fmt;
use std::net::IpAddr;

use serde::Serialize;

use crate::accrual::FailureAccrual;
use crate::names::{Name, ObjectName};
use crate::protocol::PortProtocol;

/// A Kubernetes Service, or what stands for one outside Kubernetes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Service {
    /// Its name.
    pub name: ObjectName,
    /// Its virtual addresses (`spec.clusterIPs`); none for a headless service.
    pub addresses: Vec<IpAddr>,
    /// Its TCP ports.
    pub ports: Vec<ServicePort>,
    /// Which of its endpoints clients inside of the cluster may use.
    pub internal_traffic: InternalTraffic,
    /// When an endpoint that fails is left out; none: never.
    pub failure_accrual: Option<FailureAccrual>,
}

/// `spec.internalTrafficPolicy` of a Service.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum InternalTraffic {
    /// Any endpoint.
    #[default]
    Cluster,
    /// Endpoints on the client's node only, even if there are none.
    Local,
}

/// A TCP port of a service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ServicePort {
    /// The port that clients use.
    pub number: u16,
    /// The port's name, where it has one.
    pub name: Option<Name>,
    /// `spec.ports[].appProtocol` as written.
    pub app_protocol: Option<String>,
    /// What it speaks, as far as somebody said: `appProtocol`, or what makes it an opaque port.
    pub protocol: PortProtocol,
}

/// Names an endpoint: a service and an address. One exists per address of each backing pod.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct EndpointName {
    /// The service.
    pub service: ObjectName,
    /// The backing address.
    pub address: IpAddr,
}

/// One backing address of a service that is ready to serve.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Endpoint {
    /// Service and address.
    pub name: EndpointName,
    /// Where each service port goes at this address.
    pub ports: Vec<EndpointPort>,
    /// Where it is, and whom it is meant for.
    pub place: EndpointPlace,
    /// How much it is meant to take.
    pub weight: Weight,
}

/// Where an endpoint is, and whom it is meant for. Nothing is said of most.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize)]
pub struct EndpointPlace {
    /// Its node; told only where it matters, for [`InternalTraffic::Local`].
    pub node: Option<Name>,
    /// Nodes whose clients should use it (`hints.forNodes` of an EndpointSlice).
    pub for_nodes: Vec<Name>,
    /// Zones whose clients should use it (`hints.forZones` of an EndpointSlice): values of the nodes'
    /// label `topology.kubernetes.io/zone`.
    pub for_zones: Vec<String>,
}

/// How much traffic an endpoint is meant to take: in percent of what one takes of which nothing is said.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct Weight(u16);

impl Weight {
    /// The most.
    pub const MAX: u16 = 10_000;

    /// From 1 to [`Weight::MAX`]; none: another number.
    pub fn new(percent: u16) -> Option<Self> {
        (1..=Self::MAX).contains(&percent).then_some(Self(percent))
    }

    /// In percent.
    pub fn percent(self) -> u16 {
        self.0
    }
}

impl Default for Weight {
    fn default() -> Self {
        Self(100)
    }
}

impl EndpointPlace {
    /// Whether nothing is said.
    pub fn is_empty(&self) -> bool {
        self.node.is_none() && self.for_nodes.is_empty() && self.for_zones.is_empty()
    }
}

/// Where a service port goes at one endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct EndpointPort {
    /// The service's port number.
    pub service_port: u16,
    /// The port of the application at the endpoint.
    pub target_port: u16,
}

/// `namespace/name@address`.
impl fmt::Display for EndpointName {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}@{}", self.service, self.address)
    }
}
