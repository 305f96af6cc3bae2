//! Workloads: pods, or machines outside Kubernetes.

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;

use serde::Serialize;

use crate::identity::Identity;
use crate::names::{Name, NameError, ObjectName};
use crate::protocol::{PortProtocol, PortRanges};

/// Names a workload within the cluster: `<namespace>/<name>`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct WorkloadId(pub ObjectName);

/// What every agent may know of a workload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Workload {
    /// Its name.
    pub id: WorkloadId,
    /// Its addresses (a host-network pod has none here). One that another workload or a service claims
    /// too is nobody's.
    pub addresses: Vec<IpAddr>,
    /// The node it runs on.
    pub node: Name,
    /// What created it, for metrics.
    pub owner: Option<Owner>,
    /// Whether it takes part in the mesh, and as whom.
    pub mesh: Mesh,
    /// Its ports that are opaque as far as it and its namespace say; none: those that are by default.
    pub opaque_ports: Option<PortRanges>,
}

/// Whether a workload takes part in the mesh.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Mesh {
    /// It does not: it is reached in plaintext.
    Unmeshed,
    /// It does: it is reached through a tunnel only, and must prove to be this identity.
    Meshed {
        /// Who it is.
        identity: Identity,
        /// What its node's proxy speaks.
        tunnel: Tunnel,
    },
}

/// What is spoken to a workload's tunnel port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Tunnel {
    /// `weft-h2/1`, between agents of this mesh.
    WeftH2,
    /// `h2`, HBONE as Istio's ambient node proxy speaks it.
    Hbone,
}

/// The controller of a workload, as metrics name it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct Owner {
    /// The kind in lower case as a label name: `deployment`, `statefulset`, `daemonset`, `job`, ...
    pub kind: Name,
    /// Its name.
    pub name: Name,
}

/// What only the agent of the workload's own node is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NodePod {
    /// The workload.
    pub id: WorkloadId,
    /// Tells apart two pods that had the same name one after the other (the pod's UID).
    pub uid: String,
    /// Path of the pod's network namespace on the node, where the source knows it.
    pub netns: Option<PathBuf>,
    /// Ports that the kubelet's probes may reach whatever policy says.
    pub probe_ports: Vec<u16>,
    /// Its own ports that are opaque, unless a Server says otherwise.
    pub opaque_ports: PortRanges,
    /// Ports, of whatever destination, to which its connections are opaque.
    pub opaque_outbound_ports: PortRanges,
    /// The zone of its node (label `topology.kubernetes.io/zone`), where it has one.
    pub zone: Option<String>,
}

impl Workload {
    /// What one of its ports speaks, for those who are not on its node: there a Server may say more.
    pub fn protocol_of(&self, port: u16) -> PortProtocol {
        match &self.opaque_ports {
            Some(ports) => ports.protocol_of(port),
            None => PortProtocol::by_default(port),
        }
    }

    /// The identity, if meshed.
    pub fn identity(&self) -> Option<&Identity> {
        match &self.mesh {
            Mesh::Meshed { identity, .. } => Some(identity),
            Mesh::Unmeshed => None,
        }
    }
}

impl fmt::Display for WorkloadId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(formatter)
    }
}

impl FromStr for WorkloadId {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        text.parse().map(Self)
    }
}
