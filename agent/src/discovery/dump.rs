//! What the store holds, for people, written as it is read: 100,000 workloads as one JSON tree would
//! take many times what they take in the store.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use serde::{Serialize, Serializer};
use weft_core::route::{InboundRoutes, RouteTable};
use weft_core::{
    AccessPolicy, Authorization, ClusterSettings, EgressNetwork, Mesh, Name, NetworkRules,
    ObjectName, Owner, PolicyGroup, PortProtocol, PortRanges, ProxyProtocol, RateLimit, Server,
    ServerBinding, Workload, WorkloadPolicy,
};

use crate::balance::EndpointEntry;
use crate::balance::breaker::Standing;

/// Sections by name. Objects have namespace and name in front, so that they are found alike.
#[derive(Serialize)]
pub struct StoreDump {
    pub(super) complete: bool,
    pub(super) cluster: Option<ClusterSettings>,
    pub(super) trust_roots: Option<usize>,
    pub(super) workloads: Vec<ShownWorkload>,
    pub(super) services: Vec<ShownService>,
    pub(super) policies: ShownPolicies,
}

pub(super) struct ShownWorkload(pub(super) Arc<Workload>);

#[derive(Serialize)]
pub(super) struct ShownService {
    #[serde(flatten)]
    pub(super) name: ObjectName,
    pub(super) addresses: Vec<IpAddr>,
    pub(super) ports: Vec<ShownPort>,
}

#[derive(Serialize)]
pub(super) struct ShownPort {
    pub(super) port: u16,
    pub(super) protocol: PortProtocol,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) routes: Option<ShownRoutes>,
    /// Exchanges and connections that wait for an endpoint.
    pub(super) waiting: usize,
    /// Whether those that find none fail at once.
    pub(super) fail_fast: bool,
    pub(super) endpoints: Vec<ShownEndpoint>,
}

/// An endpoint, and what the balancer knows of it.
#[derive(Serialize)]
pub(super) struct ShownEndpoint {
    address: IpAddr,
    port: u16,
    /// The latency expected now.
    latency_ms: f32,
    outstanding: u32,
    weight: u32,
    /// Whether it is left out because it fails; not shown where nothing would be.
    #[serde(skip_serializing_if = "Option::is_none")]
    standing: Option<Standing>,
}

pub(super) struct ShownRoutes(pub(super) Arc<RouteTable>);

#[derive(Serialize)]
pub(super) struct ShownPolicies {
    pub(super) workloads: Vec<ShownWorkloadPolicy>,
    pub(super) servers: Vec<ShownServer>,
    pub(super) egress_networks: Vec<ShownEgress>,
}

pub(super) struct ShownWorkloadPolicy(pub(super) Arc<WorkloadPolicy>);

pub(super) struct ShownServer(pub(super) Arc<Server>);

pub(super) struct ShownEgress(pub(super) Arc<EgressNetwork>);

impl ShownEndpoint {
    pub(super) fn new(endpoint: &EndpointEntry, now: Instant) -> Self {
        let load = &endpoint.load;
        Self {
            address: endpoint.address,
            port: endpoint.port,
            latency_ms: load.latency(now).as_secs_f32() * 1000.0,
            outstanding: load.outstanding(),
            weight: load.weight(),
            standing: endpoint.guard().map(|it| it.standing(now)),
        }
    }
}

impl Serialize for ShownWorkload {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Shown<'a> {
            #[serde(flatten)]
            name: &'a ObjectName,
            addresses: &'a [IpAddr],
            node: &'a Name,
            owner: &'a Option<Owner>,
            mesh: &'a Mesh,
            /// Absent: those that are by default.
            #[serde(skip_serializing_if = "Option::is_none")]
            opaque_ports: &'a Option<PortRanges>,
        }
        let Workload {
            id,
            addresses,
            node,
            owner,
            mesh,
            opaque_ports,
        } = &*self.0;
        let shown = Shown {
            name: &id.0,
            addresses,
            node,
            owner,
            mesh,
            opaque_ports,
        };
        shown.serialize(serializer)
    }
}

/// Service and port stand around it.
impl Serialize for ShownRoutes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.routes().serialize(serializer)
    }
}

impl Serialize for ShownWorkloadPolicy {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Shown<'a> {
            #[serde(flatten)]
            name: &'a ObjectName,
            default: AccessPolicy,
            servers: &'a [ServerBinding],
            #[serde(skip_serializing_if = "Option::is_none")]
            network: Option<&'a NetworkRules>,
            #[serde(skip_serializing_if = "Option::is_none")]
            network_egress: Option<&'a NetworkRules>,
        }
        let WorkloadPolicy {
            workload,
            default,
            servers,
            network,
            network_egress,
        } = &*self.0;
        let shown = Shown {
            name: &workload.0,
            default: *default,
            servers,
            network: network.as_deref(),
            network_egress: network_egress.as_deref(),
        };
        shown.serialize(serializer)
    }
}

impl Serialize for ShownEgress {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(serializer)
    }
}

impl Serialize for ShownServer {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Shown<'a> {
            group: PolicyGroup,
            #[serde(flatten)]
            name: &'a ObjectName,
            access_policy: AccessPolicy,
            proxy_protocol: ProxyProtocol,
            authorizations: &'a [Authorization],
            #[serde(skip_serializing_if = "Option::is_none")]
            routes: Option<&'a InboundRoutes>,
            #[serde(skip_serializing_if = "Option::is_none")]
            rate_limit: Option<&'a RateLimit>,
        }
        let Server {
            name,
            access_policy,
            proxy_protocol,
            authorizations,
            routes,
            rate_limit,
        } = &*self.0;
        let shown = Shown {
            group: name.group,
            name: &name.name,
            access_policy: *access_policy,
            proxy_protocol: *proxy_protocol,
            authorizations,
            routes: routes.as_ref(),
            rate_limit: rate_limit.as_ref(),
        };
        shown.serialize(serializer)
    }
}
