//! Workloads and the pods of a node.

use weft_core as core;

use super::{
    ConvertError, Converted, address_bytes, addresses, error, non_empty, object_name, parsed, port,
};
use crate::v1;

impl From<core::Workload> for v1::Workload {
    fn from(workload: core::Workload) -> Self {
        let (owner_kind, owner_name) = match workload.owner {
            Some(owner) => (owner.kind.to_string(), owner.name.to_string()),
            None => Default::default(),
        };
        let meshed = match workload.mesh {
            core::Mesh::Unmeshed => None,
            core::Mesh::Meshed { identity, tunnel } => Some(v1::Meshed {
                identity: identity.to_string(),
                tunnel: match tunnel {
                    core::Tunnel::WeftH2 => v1::Tunnel::WeftH2,
                    core::Tunnel::Hbone => v1::Tunnel::Hbone,
                }
                .into(),
            }),
        };
        Self {
            name: Some(workload.id.0.into()),
            addresses: workload.addresses.into_iter().map(address_bytes).collect(),
            node: workload.node.to_string(),
            owner_kind,
            owner_name,
            meshed,
            opaque_ports: workload.opaque_ports.map(|it| v1::OpaquePorts {
                ranges: port_ranges(&it),
            }),
        }
    }
}

impl TryFrom<v1::Workload> for core::Workload {
    type Error = ConvertError;

    fn try_from(message: v1::Workload) -> Converted<Self> {
        let owner = match non_empty(message.owner_name) {
            None => None,
            Some(name) => Some(core::Owner {
                kind: parsed("workload.owner_kind", &message.owner_kind)?,
                name: parsed("workload.owner_name", &name)?,
            }),
        };
        let mesh = match message.meshed {
            None => core::Mesh::Unmeshed,
            Some(meshed) => meshed.try_into()?,
        };
        let opaque_ports = message.opaque_ports;
        let opaque_ports = opaque_ports.map(|it| ports_of("workload.opaque_ports", it.ranges));
        Ok(Self {
            id: core::WorkloadId(object_name("workload.name", message.name)?),
            addresses: addresses("workload.addresses", &message.addresses)?,
            node: parsed("workload.node", &message.node)?,
            owner,
            mesh,
            opaque_ports: opaque_ports.transpose()?,
        })
    }
}

impl TryFrom<v1::Meshed> for core::Mesh {
    type Error = ConvertError;

    fn try_from(message: v1::Meshed) -> Converted<Self> {
        let tunnel = match message.tunnel() {
            v1::Tunnel::WeftH2 => core::Tunnel::WeftH2,
            v1::Tunnel::Hbone => core::Tunnel::Hbone,
            v1::Tunnel::Unspecified => {
                let reason = format!("unknown tunnel {}", message.tunnel);
                return Err(error("workload.meshed.tunnel", reason));
            }
        };
        Ok(Self::Meshed {
            identity: parsed("workload.meshed.identity", &message.identity)?,
            tunnel,
        })
    }
}

impl From<core::NodePod> for v1::NodePod {
    fn from(pod: core::NodePod) -> Self {
        let netns = pod.netns.map(|path| path.to_string_lossy().into_owned());
        let containers = pod.runtime.containers.iter();
        Self {
            name: Some(pod.id.0.into()),
            uid: pod.uid,
            netns: netns.unwrap_or_default(),
            probe_ports: pod.probe_ports.into_iter().map(u32::from).collect(),
            opaque_ports: port_ranges(&pod.opaque_ports),
            opaque_outbound_ports: port_ranges(&pod.opaque_outbound_ports),
            zone: pod.zone.unwrap_or_default(),
            by_tunnels_only: pod.by_tunnels_only,
            static_uid: pod.runtime.static_uid.unwrap_or_default(),
            containers: containers.map(ToString::to_string).collect(),
            runtime_class: pod.runtime.class.unwrap_or_default(),
            own_users: pod.runtime.own_users,
        }
    }
}

impl TryFrom<v1::NodePod> for core::NodePod {
    type Error = ConvertError;

    fn try_from(message: v1::NodePod) -> Converted<Self> {
        let probe_ports = message.probe_ports.into_iter();
        let outbound = message.opaque_outbound_ports;
        let containers = message.containers.iter();
        Ok(Self {
            id: core::WorkloadId(object_name("node_pod.name", message.name)?),
            uid: non_empty(message.uid).ok_or_else(|| error("node_pod.uid", "missing"))?,
            netns: non_empty(message.netns).map(Into::into),
            probe_ports: probe_ports
                .map(|number| port("node_pod.probe_ports", number))
                .collect::<Converted<_>>()?,
            opaque_ports: ports_of("node_pod.opaque_ports", message.opaque_ports)?,
            opaque_outbound_ports: ports_of("node_pod.opaque_outbound_ports", outbound)?,
            zone: non_empty(message.zone),
            by_tunnels_only: message.by_tunnels_only,
            runtime: Box::new(core::PodRuntime {
                static_uid: non_empty(message.static_uid),
                containers: containers
                    .map(|it| parsed("node_pod.containers", it))
                    .collect::<Converted<_>>()?,
                class: non_empty(message.runtime_class),
                own_users: message.own_users,
            }),
        })
    }
}

pub(super) fn port_ranges(ports: &core::PortRanges) -> Vec<v1::PortRange> {
    let range = |(first, last): &(u16, u16)| v1::PortRange {
        first: (*first).into(),
        last: (*last).into(),
    };
    ports.ranges().iter().map(range).collect()
}

pub(super) fn ports_of(field: &str, list: Vec<v1::PortRange>) -> Converted<core::PortRanges> {
    let mut ranges = Vec::with_capacity(list.len());
    for range in list {
        let (first, last) = (port(field, range.first)?, port(field, range.last)?);
        if first > last {
            return Err(error(field, format!("{first}-{last} is no range")));
        }
        ranges.push((first, last));
    }
    Ok(core::PortRanges::new(ranges))
}
