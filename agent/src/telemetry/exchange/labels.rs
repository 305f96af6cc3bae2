//! The label sets of exchanges.
//!
//! Nothing in them is what a client or a server wrote: an authority is one that the mesh knows, a path is
//! never one.

use weft_core::{Identity, ObjectName, Owner, Verdict, WorkloadId};

use super::super::labels::{
    Direction, PodLabels, Rendered, TlsLabel, destination_owner_label, render_identity,
    render_verdict,
};
use super::authority::AuthorityLabel;

/// The labels of the exchanges of a pod with one endpoint (outbound), or with one kind of client
/// (inbound).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ExchangeLabels {
    /// Which side this is.
    pub direction: Direction,
    /// The pod of this node that the exchanges belong to.
    pub pod: PodLabels,
    /// Whom the client asked for, where the mesh knows the host.
    pub authority: Option<AuthorityLabel>,
    /// The service that was asked for (outbound).
    pub service: Option<ObjectName>,
    /// The other workload, where one is known (outbound).
    pub destination: Option<DestinationLabels>,
    /// The application's port (inbound).
    pub target_port: Option<u16>,
    /// How it is secured.
    pub tls: TlsLabel,
    /// The client's identity (inbound).
    pub client: Option<Identity>,
    /// The server's identity (outbound).
    pub server: Option<Identity>,
    /// What policy said (inbound).
    pub verdict: Option<Verdict>,
    /// The route's backend that the endpoint belongs to (outbound): it is counted along.
    pub backend: Option<BackendLabels>,
}

/// The workload at the other end.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct DestinationLabels {
    /// Its name.
    pub id: WorkloadId,
    /// What created it.
    pub owner: Option<Owner>,
}

/// The labels of the exchanges of a pod on one route.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RouteLabels {
    /// The pod whose exchanges they are.
    pub pod: PodLabels,
    /// What the route is attached to.
    pub parent: PortRef,
    /// The route.
    pub route: RouteRef,
}

/// The labels of a route's exchanges with one of its backends.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct BackendLabels {
    /// What the route is attached to.
    pub parent: PortRef,
    /// The route.
    pub route: RouteRef,
    /// The backend.
    pub backend: PortRef,
}

/// A parent or a backend: an object, and one of its ports.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PortRef {
    /// Its API group; `core` for a Service.
    pub group: &'static str,
    /// Its kind.
    pub kind: &'static str,
    /// Its name.
    pub name: ObjectName,
    /// The port.
    pub port: u16,
}

/// A route.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum RouteRef {
    /// That of a parent without any, as Linkerd names it: `default` (inbound), `http` or `grpc`; of an
    /// EgressNetwork `http-egress-deny` and the like.
    Default(&'static str),
    /// A resource.
    Resource {
        /// Its API group.
        group: &'static str,
        /// `HTTPRoute` or `GRPCRoute`.
        kind: &'static str,
        /// Its name.
        name: ObjectName,
    },
}

impl PortRef {
    /// A port of a Service.
    pub fn service(name: ObjectName, port: u16) -> Self {
        Self {
            group: "core",
            kind: "Service",
            name,
            port,
        }
    }
}

impl RouteRef {
    /// Whether its exchanges are gRPC calls by declaration.
    pub(super) fn is_grpc(&self) -> bool {
        match self {
            Self::Default(name) => name.starts_with("grpc"),
            Self::Resource { kind, .. } => *kind == "GRPCRoute",
        }
    }

    pub(super) fn render(&self, labels: &mut Rendered) {
        let (group, kind, namespace, name) = match self {
            Self::Default(name) => ("", "default", String::new(), (*name).to_owned()),
            Self::Resource { group, kind, name } => {
                let ObjectName { namespace, name } = name;
                (*group, *kind, namespace.to_string(), name.to_string())
            }
        };
        labels.push(("route_group", group.to_owned()));
        labels.push(("route_kind", kind.to_owned()));
        labels.push(("route_namespace", namespace));
        labels.push(("route_name", name));
    }
}

impl ExchangeLabels {
    /// Those of a pod, without any others.
    pub fn new(direction: Direction, pod: &PodLabels) -> Self {
        Self {
            direction,
            pod: pod.clone(),
            authority: None,
            service: None,
            destination: None,
            target_port: None,
            tls: TlsLabel::None,
            client: None,
            server: None,
            verdict: None,
            backend: None,
        }
    }

    pub(super) fn render(&self) -> Rendered {
        let mut labels = vec![("direction", self.direction.as_str().to_owned())];
        if let Some(authority) = &self.authority {
            labels.push(("authority", authority.render()));
        }
        self.pod.render(&mut labels);
        let of_destination = self.destination.as_ref().map(|it| &it.id.0.namespace);
        let of_service = self.service.as_ref().map(|it| &it.namespace);
        if let Some(namespace) = of_service.or(of_destination) {
            labels.push(("dst_namespace", namespace.to_string()));
        }
        if let Some(service) = &self.service {
            labels.push(("dst_service", service.name.to_string()));
        }
        if let Some(destination) = &self.destination {
            if let Some(owner) = &destination.owner {
                labels.push((destination_owner_label(owner), owner.name.to_string()));
            }
            labels.push(("dst_pod", destination.id.0.name.to_string()));
        }
        if let Some(port) = self.target_port {
            labels.push(("target_port", port.to_string()));
        }
        self.tls.render(&mut labels);
        render_identity("client_id", self.client.as_ref(), &mut labels);
        render_identity("server_id", self.server.as_ref(), &mut labels);
        if let Some(verdict) = &self.verdict {
            render_verdict(verdict, &mut labels);
        }
        labels
    }
}

impl RouteLabels {
    pub(super) fn render(&self) -> Rendered {
        let mut labels = Vec::new();
        self.pod.render(&mut labels);
        render_port(&self.parent, &PARENT, &mut labels);
        self.route.render(&mut labels);
        labels
    }
}

impl BackendLabels {
    pub(super) fn render(&self, pod: &PodLabels) -> Rendered {
        let mut labels = Vec::new();
        pod.render(&mut labels);
        render_port(&self.parent, &PARENT, &mut labels);
        self.route.render(&mut labels);
        render_port(&self.backend, &BACKEND, &mut labels);
        labels
    }
}

/// The gauge of a service's own balancer: parent and backend are the same.
pub(crate) fn balancer_labels(port: &PortRef) -> Vec<(&'static str, String)> {
    let mut labels = vec![];
    render_port(port, &PARENT, &mut labels);
    render_port(port, &BACKEND, &mut labels);
    labels
}

fn render_port(port: &PortRef, names: &[&'static str; 6], labels: &mut Rendered) {
    let ObjectName { namespace, name } = &port.name;
    let values = [
        port.group.to_owned(),
        port.kind.to_owned(),
        namespace.to_string(),
        name.to_string(),
        port.port.to_string(),
        String::new(),
    ];
    labels.extend(names.iter().copied().zip(values));
}

const PARENT: [&str; 6] = [
    "parent_group",
    "parent_kind",
    "parent_namespace",
    "parent_name",
    "parent_port",
    "parent_section_name",
];
const BACKEND: [&str; 6] = [
    "backend_group",
    "backend_kind",
    "backend_namespace",
    "backend_name",
    "backend_port",
    "backend_section_name",
];
