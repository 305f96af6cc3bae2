//! The label sets of series, and how they are written.
//!
//! Every value comes from the control plane or from an authenticated certificate, never from
//! bytes that a client chose, so the number of series is bounded by what exists in the cluster.

use weft_core::{DenyReason, EgressName, Identity, ObjectName, Owner, Verdict, WorkloadId};

/// Label names with their values, in the order in which they are written.
pub(super) type Rendered = Vec<(&'static str, String)>;

/// Which side of a flow this agent was asked by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// A meshed pod of this node connects.
    Outbound,
    /// Somebody connects to a meshed pod of this node.
    Inbound,
}

/// The two connections of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Peer {
    /// Towards the client.
    Source,
    /// Towards the server.
    Destination,
}

/// A pod of this node.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PodLabels {
    /// Its name.
    pub id: WorkloadId,
    /// What created it; its kind becomes the label's name, as in Linkerd (`deployment="web"`).
    pub owner: Option<Owner>,
}

/// How the connection between the two sides was secured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TlsLabel {
    /// Mutual TLS, both identities verified.
    Mutual,
    /// Both on this node: handed over in the process, identities attested by the kernel.
    SameNode,
    /// Plaintext: the other side is not part of the mesh.
    None,
    /// The pod connected to itself.
    Loopback,
    /// There is no connection.
    Unconnected,
}

/// The labels of a flow's series.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct FlowLabels {
    /// Which side this is.
    pub direction: Direction,
    /// The pod of this node that the flow belongs to.
    pub pod: PodLabels,
    /// The other workload of an outbound flow, where one is known.
    pub destination: Option<WorkloadId>,
    /// The service that was asked for.
    pub service: Option<ObjectName>,
    /// How it is secured.
    pub tls: TlsLabel,
    /// The client's identity (inbound).
    pub client: Option<Identity>,
    /// The server's identity (outbound).
    pub server: Option<Identity>,
    /// What policy said (inbound).
    pub verdict: Option<Verdict>,
}

/// The labels of a policy decision's series.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct AuthzLabels {
    /// The pod that was asked for.
    pub pod: PodLabels,
    target_port: u16,
    tls: TlsLabel,
    client: Option<Identity>,
    verdict: Verdict,
}

/// The labels of what an EgressNetwork keeps from leaving the cluster.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct EgressLabels {
    /// The client.
    pub pod: PodLabels,
    /// The network.
    pub network: EgressName,
}

impl EgressLabels {
    pub(super) fn render(&self) -> Rendered {
        let mut labels = vec![];
        self.pod.render(&mut labels);
        let EgressName { name, group } = &self.network;
        labels.push(("parent_group", group.as_str().to_owned()));
        labels.push(("parent_kind", "EgressNetwork".to_owned()));
        labels.push(("parent_namespace", name.namespace.to_string()));
        labels.push(("parent_name", name.name.to_string()));
        labels
    }
}

/// The labels of what NetworkPolicies do not let a pod connect to.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct NotLetOutLabels {
    /// The client.
    pub(super) pod: PodLabels,
    /// What decided.
    pub(super) reason: DenyReason,
}

impl NotLetOutLabels {
    pub(super) fn render(&self) -> Rendered {
        let mut labels = vec![];
        self.pod.render(&mut labels);
        labels.push(("authz_name", self.reason.to_string()));
        labels
    }
}

impl AuthzLabels {
    /// Labels a decision about `client` at `target_port` of `pod`.
    pub fn new(
        pod: PodLabels,
        target_port: u16,
        tls: TlsLabel,
        client: Option<Identity>,
        verdict: &Verdict,
    ) -> Self {
        Self {
            pod,
            // A port without a Server is whatever a client tried: one series for all of them.
            target_port: if verdict.server().is_some() {
                target_port
            } else {
                0
            },
            tls,
            client,
            verdict: verdict.clone(),
        }
    }

    /// The same about another verdict.
    pub fn with(&self, verdict: &Verdict) -> Self {
        Self {
            verdict: verdict.clone(),
            ..self.clone()
        }
    }

    pub(super) fn is_allowed(&self) -> bool {
        self.verdict.admits_requests()
    }

    pub(super) fn render(&self) -> Rendered {
        let mut labels = self.render_client();
        render_verdict(&self.verdict, &mut labels);
        labels
    }

    /// The labels of a decision about a request: as Linkerd has them, the route among them.
    pub(super) fn render_of_request(&self, route: impl FnOnce(&mut Rendered)) -> Rendered {
        let mut labels = self.render_of_server();
        route(&mut labels);
        let (group, kind) = match &self.verdict {
            Verdict::Allow {
                authorization: Some(name),
                ..
            } => (name.group.as_str(), "authorizationpolicy"),
            _ => ("", "default"),
        };
        labels.push(("authz_group", group.to_owned()));
        labels.push(("authz_kind", kind.to_owned()));
        labels.push(("authz_name", authz_name(&self.verdict)));
        labels
    }

    /// The labels of what happens to a request before anybody is asked about it.
    pub(super) fn render_of_server(&self) -> Rendered {
        let mut labels = self.render_client();
        if self.verdict.server().is_some() {
            render_server(&self.verdict, &mut labels);
            labels.push(("srv_port", self.target_port.to_string()));
        } else {
            let by = self.verdict.by();
            let name = by.strip_prefix("default:").unwrap_or(&by).to_owned();
            labels.push(("srv_group", String::new()));
            labels.push(("srv_kind", "default".to_owned()));
            labels.push(("srv_name", name));
        }
        labels
    }

    fn render_client(&self) -> Rendered {
        let mut labels = vec![("direction", "inbound".to_owned())];
        self.pod.render(&mut labels);
        if self.target_port != 0 {
            labels.push(("target_port", self.target_port.to_string()));
        }
        self.tls.render(&mut labels);
        render_identity("client_id", self.client.as_ref(), &mut labels);
        labels
    }
}

impl FlowLabels {
    pub(super) fn render(&self, peer: Peer) -> Rendered {
        let side = match peer {
            Peer::Source => "src",
            Peer::Destination => "dst",
        };
        let mut labels = vec![
            ("direction", self.direction.as_str().to_owned()),
            ("peer", side.to_owned()),
        ];
        self.pod.render(&mut labels);
        let namespace = self.service.as_ref().map(|name| &name.namespace);
        let namespace = namespace.or(self.destination.as_ref().map(|id| &id.0.namespace));
        if let Some(namespace) = namespace {
            labels.push(("dst_namespace", namespace.to_string()));
        }
        if let Some(service) = &self.service {
            labels.push(("dst_service", service.name.to_string()));
        }
        if let Some(destination) = &self.destination {
            labels.push(("dst_pod", destination.0.name.to_string()));
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

impl Direction {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Outbound => "outbound",
            Self::Inbound => "inbound",
        }
    }
}

impl PodLabels {
    pub(super) fn render(&self, labels: &mut Rendered) {
        labels.push(("namespace", self.id.0.namespace.to_string()));
        if let Some(owner) = &self.owner {
            labels.push((owner_label(owner), owner.name.to_string()));
        }
        labels.push(("pod", self.id.0.name.to_string()));
    }
}

impl TlsLabel {
    /// The values of `tls` and `no_tls_reason`; none: there is no connection.
    pub(crate) fn values(self) -> Option<(&'static str, Option<&'static str>)> {
        match self {
            Self::Mutual => Some(("true", None)),
            Self::SameNode => Some(("true", Some("same_node"))),
            Self::None => Some(("no_identity", Some("plaintext"))),
            Self::Loopback => Some(("loopback", Some("loopback"))),
            Self::Unconnected => None,
        }
    }

    pub(super) fn render(self, labels: &mut Rendered) {
        let Some((tls, no_tls_reason)) = self.values() else {
            return;
        };
        labels.push(("tls", tls.to_owned()));
        if let Some(reason) = no_tls_reason {
            labels.push(("no_tls_reason", reason.to_owned()));
        }
    }
}

/// The label's name for an owner; kinds that are not known share one, since a label's name must
/// not come from outside.
fn owner_label(owner: &Owner) -> &'static str {
    match owner.kind.as_str() {
        "deployment" => "deployment",
        "statefulset" => "statefulset",
        "daemonset" => "daemonset",
        "replicaset" => "replicaset",
        "job" => "k8s_job",
        "cronjob" => "cronjob",
        _ => "owner",
    }
}

/// The same of the workload at the other end.
pub(super) fn destination_owner_label(owner: &Owner) -> &'static str {
    match owner_label(owner) {
        "deployment" => "dst_deployment",
        "statefulset" => "dst_statefulset",
        "daemonset" => "dst_daemonset",
        "replicaset" => "dst_replicaset",
        "k8s_job" => "dst_k8s_job",
        "cronjob" => "dst_cronjob",
        _ => "dst_owner",
    }
}

pub(super) fn render_identity(
    name: &'static str,
    identity: Option<&Identity>,
    labels: &mut Rendered,
) {
    if let Some(identity) = identity {
        labels.push((name, identity.to_string()));
    }
}

pub(super) fn render_verdict(verdict: &Verdict, labels: &mut Rendered) {
    render_server(verdict, labels);
    labels.push(("authz_name", authz_name(verdict)));
}

fn render_server(verdict: &Verdict, labels: &mut Rendered) {
    if let Some(server) = verdict.server() {
        labels.push(("srv_group", server.group.as_str().to_owned()));
        labels.push(("srv_kind", "server".to_owned()));
        labels.push(("srv_name", server.name.name.to_string()));
    }
}

fn authz_name(verdict: &Verdict) -> String {
    match verdict {
        Verdict::Allow {
            authorization: Some(name),
            ..
        } => name.name.name.to_string(),
        _ => verdict.by(),
    }
}
