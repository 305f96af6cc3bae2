//! Services and their endpoints.
//!
//! Endpoints are resources of their own, one per (service, address), so that one changed pod is
//! one small message and not the whole service again.

use std::fmt;
use std::net::IpAddr;

use serde::Serialize;

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
