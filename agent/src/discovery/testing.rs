//! Samples for tests.

use weft_core::route::{HttpMatch, Route, RouteKind, RouteName, RouteRules, RouteTable, Rule};
use weft_core::{
    AccessPolicy, ClusterSettings, Endpoint, EndpointName, EndpointPlace, EndpointPort,
    InternalTraffic, Mesh, NodePod, PortProtocol, PortRanges, Service, ServicePort, Tunnel, Weight,
    Workload, WorkloadPolicy,
};
use weft_proto::Resource;

pub(crate) fn cluster() -> Resource {
    Resource::Cluster(ClusterSettings {
        trust_domain: "cluster.local".parse().expect("valid"),
        pod_ranges: vec!["10.1.0.0/16".parse().expect("valid"), net("fd00:1::/64")],
        service_ranges: vec![net("10.2.0.0/16")],
        force_tunnels: false,
    })
}

fn net(text: &str) -> ipnet::IpNet {
    text.parse().expect("valid")
}

pub(crate) fn workload(id: &str, addresses: &[&str]) -> Resource {
    Resource::Workload(Workload {
        id: id.parse().expect("valid"),
        addresses: addresses
            .iter()
            .map(|it| it.parse().expect("valid"))
            .collect(),
        node: "node-a".parse().expect("valid"),
        owner: None,
        mesh: Mesh::Meshed {
            identity: "spiffe://cluster.local/ns/shop/sa/web"
                .parse()
                .expect("valid"),
            tunnel: Tunnel::WeftH2,
        },
        opaque_ports: None,
    })
}

pub(crate) fn node_pod(id: &str) -> Resource {
    Resource::NodePod(NodePod {
        id: id.parse().expect("valid"),
        uid: "uid-1".to_owned(),
        netns: Some("/run/netns/x".into()),
        runtime: Box::default(),
        probe_ports: vec![],
        opaque_ports: PortRanges::opaque_by_default(),
        opaque_outbound_ports: PortRanges::default(),
        zone: None,
        by_tunnels_only: false,
    })
}

pub(crate) fn service(name: &str, address: &str, ports: &[u16]) -> Resource {
    let port = |number: &u16| ServicePort {
        number: *number,
        name: None,
        app_protocol: None,
        protocol: PortProtocol::Detect,
    };
    Resource::Service(Service {
        name: name.parse().expect("valid"),
        addresses: vec![address.parse().expect("valid")],
        ports: ports.iter().map(port).collect(),
        internal_traffic: InternalTraffic::default(),
        failure_accrual: None,
    })
}

pub(crate) fn endpoint(service: &str, address: &str, ports: &[(u16, u16)]) -> Resource {
    let port = |(service_port, target_port): &(u16, u16)| EndpointPort {
        service_port: *service_port,
        target_port: *target_port,
    };
    Resource::Endpoint(Endpoint {
        name: EndpointName {
            service: service.parse().expect("valid"),
            address: address.parse().expect("valid"),
        },
        ports: ports.iter().map(port).collect(),
        place: EndpointPlace::default(),
        weight: Weight::default(),
    })
}

/// Routes of one rule, by an HTTPRoute of this name for everything.
pub(crate) fn route_table(name: &str, route: &str) -> Resource {
    let rule = Rule {
        name: None,
        matches: vec![HttpMatch::any()],
        filters: vec![],
        backends: vec![],
        reliability: None,
    };
    let route = Route {
        name: RouteName {
            name: route.parse().expect("valid"),
            kind: RouteKind::Http,
        },
        created: None,
        rules: RouteRules::Http(vec![rule]),
    };
    let name = name.parse().expect("valid");
    Resource::RouteTable(RouteTable::new(name, vec![route]))
}

pub(crate) fn workload_policy(id: &str, default: AccessPolicy) -> Resource {
    Resource::WorkloadPolicy(WorkloadPolicy {
        workload: id.parse().expect("valid"),
        default,
        servers: vec![],
        network: None,
        network_egress: None,
    })
}
