//! What the index keeps of Services and EndpointSlices, and where a service goes at an address.

use std::net::IpAddr;

use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use weft_core::{EndpointPort, Name, ObjectName, PortProtocol, ServicePort};

use super::pods::PodRecord;
use super::ports::PortsChoice;
use super::selector::Labels;
use crate::objects::Fault;

/// A Service.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct ServiceRecord {
    /// Its name.
    pub(super) name: ObjectName,
    /// Its virtual addresses.
    pub(super) addresses: Vec<IpAddr>,
    /// Address families of its endpoints; empty: whatever the endpoints have.
    pub(super) families: Vec<Family>,
    /// Its TCP ports.
    pub(super) ports: Vec<PortRecord>,
    /// Which pods are behind it; none if somebody else says so by slices.
    pub(super) selector: Option<Labels>,
    /// Whether pods that are not ready count too.
    pub(super) publish_not_ready: bool,
    /// Whether it only stands for a DNS name.
    pub(super) external_name: bool,
    /// What it says about its ports.
    pub(super) ports_choice: PortsChoice,
}

/// An address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub(super) enum Family {
    V4,
    V6,
}

/// A port of a Service.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct PortRecord {
    /// The port that clients use.
    pub(super) number: u16,
    /// Its name, where it has one.
    pub(super) name: Option<Name>,
    /// What it says that it speaks.
    pub(super) app_protocol: Option<String>,
    /// The port at the pods.
    pub(super) target: Target,
}

/// A port of a pod, by number or by the name of a container's port.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub(super) enum Target {
    Number(u16),
    Named(String),
}

/// An EndpointSlice.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct SliceRecord {
    /// The service that it belongs to.
    pub(super) service: ObjectName,
    /// The addresses that are ready.
    pub(super) addresses: Vec<IpAddr>,
    /// Its TCP ports: the name of the service's port, and the number at the endpoints.
    pub(super) ports: Vec<(String, u16)>,
}

/// Ports of one service: each is repeated for each of its endpoints.
const MAX_PORTS: usize = 1024;

impl ServiceRecord {
    /// Checks a Service. Also returned: faults of parts that are ignored.
    ///
    /// # Errors
    /// The first field that cannot be used.
    pub(super) fn check(name: ObjectName, service: &Service) -> Result<(Self, Vec<Fault>), Fault> {
        let spec = service.spec.clone().unwrap_or_default();
        let mut listed = spec.cluster_ips.unwrap_or_default();
        if listed.is_empty() {
            listed.extend(spec.cluster_ip);
        }
        super::few("spec.clusterIPs", listed.len())?;
        let mut addresses = vec![];
        for (index, text) in listed.iter().enumerate() {
            if !text.is_empty() && text != "None" {
                addresses.push(super::address(&format!("spec.clusterIPs[{index}]"), text)?);
            }
        }
        let families = spec.ip_families.unwrap_or_default();
        let mut families: Vec<_> = families.iter().filter_map(|it| Family::named(it)).collect();
        if families.is_empty() {
            families = addresses.iter().map(|it| Family::of(*it)).collect();
        }
        let written = spec.ports.as_ref().map_or(0, Vec::len);
        if written > MAX_PORTS {
            let reason = format!("{written} ports, more than {MAX_PORTS}");
            return Err(Fault::new("spec.ports", reason));
        }
        let mut ports = vec![];
        for (index, written) in spec.ports.unwrap_or_default().iter().enumerate() {
            let field = format!("spec.ports[{index}]");
            if !matches!(written.protocol.as_deref(), None | Some("" | "TCP")) {
                continue;
            }
            let number = port(&format!("{field}.port"), written.port)?;
            let name = written.name.as_deref().filter(|it| !it.is_empty());
            ports.push(PortRecord {
                number,
                name: optional_name(&format!("{field}.name"), name)?,
                app_protocol: written.app_protocol.clone().filter(|it| !it.is_empty()),
                target: target(&format!("{field}.targetPort"), &written.target_port, number)?,
            });
        }
        let (ports_choice, faults) = PortsChoice::check(&service.metadata);
        let record = Self {
            name,
            addresses,
            families,
            ports,
            selector: spec.selector.filter(|it| !it.is_empty()),
            publish_not_ready: spec.publish_not_ready_addresses.unwrap_or(false),
            external_name: spec.type_.as_deref() == Some("ExternalName"),
            ports_choice,
        };
        Ok((record, faults))
    }

    /// Its ports as agents are told them, given what its namespace says about ports.
    pub(super) fn told_ports(&self, namespace: &PortsChoice) -> Vec<ServicePort> {
        let named = |name: &str| {
            let ports = self.ports.iter();
            let named = ports.filter(|it| it.name.as_ref().is_some_and(|it| it.as_str() == name));
            named.map(|it| it.number).collect()
        };
        let opaque = self.ports_choice.opaque_ports(namespace, named);
        let told = |it: &PortRecord| {
            let app_protocol = it.app_protocol.as_deref();
            ServicePort {
                number: it.number,
                name: it.name.clone(),
                app_protocol: it.app_protocol.clone(),
                protocol: PortProtocol::of_service_port(app_protocol, it.number, &opaque),
            }
        };
        self.ports.iter().map(told).collect()
    }

    /// Whether a pod with these labels is behind it.
    pub(super) fn selects(&self, labels: &Labels) -> bool {
        self.selector.as_ref().is_some_and(|selector| {
            selector
                .iter()
                .all(|(key, value)| labels.get(key) == Some(value))
        })
    }

    /// Where its ports go at a pod that it selects; empty if the pod is not to be used.
    pub(super) fn ports_at(&self, pod: &PodRecord) -> Vec<EndpointPort> {
        let usable = (pod.ready || self.publish_not_ready) && !pod.terminating && !pod.completed;
        if !usable || self.external_name {
            return vec![];
        }
        let at = |record: &PortRecord| {
            let target_port = match &record.target {
                Target::Number(number) => Some(*number),
                Target::Named(name) => pod.ports_named(name).next(),
            };
            target_port.map(|target_port| EndpointPort {
                service_port: record.number,
                target_port,
            })
        };
        self.ports.iter().filter_map(at).collect()
    }

    /// Where its ports go at the addresses of a slice.
    pub(super) fn ports_of(&self, slice: &SliceRecord) -> Vec<EndpointPort> {
        if self.external_name {
            return vec![];
        }
        let at = |record: &PortRecord| {
            let name = record.name.as_ref().map_or("", Name::as_str);
            let (_, target_port) = slice.ports.iter().find(|(it, _)| it == name)?;
            Some(EndpointPort {
                service_port: record.number,
                target_port: *target_port,
            })
        };
        self.ports.iter().filter_map(at).collect()
    }

    /// Whether its endpoints may have this address.
    pub(super) fn has_family_of(&self, address: IpAddr) -> bool {
        self.families.is_empty() || self.families.contains(&Family::of(address))
    }
}

impl SliceRecord {
    /// Checks an EndpointSlice. `Ok(None)`: it belongs to no service, or holds names only.
    ///
    /// # Errors
    /// The first field that cannot be used.
    pub(super) fn check(namespace: &Name, slice: &EndpointSlice) -> Result<Option<Self>, Fault> {
        const SERVICE: &str = "kubernetes.io/service-name";
        let labels = slice.metadata.labels.as_ref();
        let Some(service) = labels.and_then(|it| it.get(SERVICE)) else {
            return Ok(None);
        };
        if slice.address_type == "FQDN" {
            return Ok(None);
        }
        let service = ObjectName {
            namespace: namespace.clone(),
            name: service
                .parse()
                .map_err(|reason| Fault::new(format!("metadata.labels[{SERVICE:?}]"), reason))?,
        };
        let mut addresses = vec![];
        for (index, endpoint) in slice.endpoints.iter().enumerate() {
            let conditions = endpoint.conditions.as_ref();
            let ready = conditions.and_then(|it| it.ready).unwrap_or(true);
            let terminating = conditions.and_then(|it| it.terminating).unwrap_or(false);
            for text in &endpoint.addresses {
                let field = format!("endpoints[{index}].addresses");
                let address = super::address(&field, text)?;
                if ready && !terminating {
                    addresses.push(address);
                }
            }
        }
        let mut ports = vec![];
        for (index, written) in slice.ports.iter().flatten().enumerate() {
            let tcp = matches!(written.protocol.as_deref(), None | Some("" | "TCP"));
            if let (true, Some(number)) = (tcp, written.port) {
                let number = port(&format!("ports[{index}].port"), number)?;
                ports.push((written.name.clone().unwrap_or_default(), number));
            }
        }
        Ok(Some(Self {
            service,
            addresses,
            ports,
        }))
    }
}

impl Family {
    fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }

    fn named(name: &str) -> Option<Self> {
        match name {
            "IPv4" => Some(Self::V4),
            "IPv6" => Some(Self::V6),
            _ => None,
        }
    }
}

fn port(field: &str, number: i32) -> Result<u16, Fault> {
    match u16::try_from(number) {
        Ok(port) if port != 0 => Ok(port),
        _ => Err(Fault::new(
            field,
            format!("{number} is no port: 1 to 65535"),
        )),
    }
}

fn optional_name(field: &str, name: Option<&str>) -> Result<Option<Name>, Fault> {
    name.map(|it| it.parse().map_err(|reason| Fault::new(field, reason)))
        .transpose()
}

fn target(field: &str, written: &Option<IntOrString>, port_number: u16) -> Result<Target, Fault> {
    Ok(match written {
        None => Target::Number(port_number),
        // As the API server defaults it.
        Some(IntOrString::Int(0)) => Target::Number(port_number),
        Some(IntOrString::Int(number)) => Target::Number(port(field, *number)?),
        Some(IntOrString::String(text)) if text.is_empty() => Target::Number(port_number),
        Some(IntOrString::String(text)) => Target::Named(text.clone()),
    })
}
