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
    /// By what else than its UID its processes are found.
    pub runtime: Box<PodRuntime>,
    /// Ports that the kubelet's probes may reach whatever policy says.
    pub probe_ports: Vec<u16>,
    /// Its own ports that are opaque, unless a Server says otherwise.
    pub opaque_ports: PortRanges,
    /// Ports, of whatever destination, to which its connections are opaque.
    pub opaque_outbound_ports: PortRanges,
    /// The zone of its node (label `topology.kubernetes.io/zone`), where it has one.
    pub zone: Option<String>,
    /// What it has with others of its node goes by tunnels too, past the CNI, which has policies of its own for it.
    pub by_tunnels_only: bool,
}

/// What the kubelet and the container runtime of a pod's node have of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PodRuntime {
    /// The UID by which the kubelet has it, where that is not the object's: that of a static pod.
    pub static_uid: Option<String>,
    /// Its containers, of all kinds, as far as they are known; its sandbox is none of them.
    pub containers: Vec<ContainerId>,
    /// The RuntimeClass that it asks for: a hint at what its containers run in.
    pub class: Option<String>,
    /// It has a user namespace of its own (`hostUsers: false`), to which its network namespace belongs.
    pub own_users: bool,
}

/// What a container runtime calls a container: 64 hexadecimal digits, with all runtimes of Kubernetes. Nothing else
/// is taken for one: it is looked for among names that containers may choose.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct ContainerId(Box<str>);

/// What was to be a container's ID is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a container's ID has 64 lower-case hexadecimal digits")]
pub struct ContainerIdError;

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

impl ContainerId {
    /// As it is written.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ContainerId {
    type Err = ContainerIdError;

    fn from_str(text: &str) -> Result<Self, ContainerIdError> {
        let is_digit = |it: u8| matches!(it, b'0'..=b'9' | b'a'..=b'f');
        match text.len() == CONTAINER_ID_LENGTH && text.bytes().all(is_digit) {
            true => Ok(Self(text.into())),
            false => Err(ContainerIdError),
        }
    }
}

impl fmt::Display for ContainerId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(formatter)
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

/// The bytes of a SHA-256, in hexadecimal.
const CONTAINER_ID_LENGTH: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_of_containers_have_one_form() {
        let good = "0123456789abcdef".repeat(4);
        assert_eq!(
            good.parse::<ContainerId>().map(|it| it.to_string()),
            Ok(good.clone())
        );
        for bad in [
            String::new(),
            good[1..].to_owned(),
            format!("{good}0"),
            good.to_uppercase(),
            good.replace('a', "g"),
            format!("/{}", &good[1..]),
        ] {
            assert_eq!(bad.parse::<ContainerId>(), Err(ContainerIdError), "{bad}");
        }
    }
}
