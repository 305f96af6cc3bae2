//! What the index keeps of Services and EndpointSlices, and where a service goes at an address.

use std::net::IpAddr;

use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointSlice};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use weft_core::{
    EndpointPlace, EndpointPort, InternalTraffic, Name, ObjectName, PortProtocol, ServicePort,
};

use super::accrual::AccrualChoice;
use super::idle::Annotated;
use super::pods::PodRecord;
use super::ports::PortsChoice;
use super::reliability::ReliabilitySaid;
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
    /// Which endpoints clients inside of the cluster may use.
    pub(super) internal_traffic: InternalTraffic,
    /// Which endpoints clients should prefer.
    pub(super) distribution: Distribution,
    /// What it says about endpoints that fail.
    pub(super) accrual: AccrualChoice,
    /// What it says about how long requests may take, and of retries.
    pub(super) reliability: ReliabilitySaid,
    /// By which annotations it says these two.
    pub(super) annotated: Annotated,
}

/// Which endpoints clients should prefer, if slices do not say so: `spec.trafficDistribution`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Distribution {
    /// None.
    #[default]
    Even,
    /// Those in their zone.
    SameZone,
    /// Those on their node, then those in their zone.
    SameNode,
}

/// An address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
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
    /// Its addresses, those that do not serve too.
    pub(super) addresses: Vec<SliceAddress>,
    /// Its TCP ports: the name of the service's port, and the number at the endpoints.
    pub(super) ports: Vec<(String, u16)>,
}

/// An address of an EndpointSlice.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct SliceAddress {
    /// It.
    pub(super) address: IpAddr,
    /// Where it is, and whom it is meant for.
    pub(super) place: EndpointPlace,
    /// The pod that is said to have it, if one is.
    pub(super) pod: Option<PodReference>,
    /// Whether it serves.
    pub(super) condition: Condition,
}

/// Whether an address of a slice serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Condition {
    /// It does. So does one that is terminating and ready, as where addresses are published that are not ready.
    Ready,
    /// It is terminating and still serves: for when nobody else does.
    Leaving,
    /// It does not.
    Unready,
}

/// A pod as a slice names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PodReference {
    /// Its name.
    pub(super) name: ObjectName,
    /// Tells it apart from others of that name, where it is said.
    pub(super) uid: Option<String>,
}

/// In place of `spec.trafficDistribution`: zones are allocated then, by who writes EndpointSlices. The
/// second is its older name.
const TOPOLOGY_MODES: [&str; 2] = [
    "service.kubernetes.io/topology-mode",
    "service.kubernetes.io/topology-aware-hints",
];
/// An endpoint with more hints than this is a mistake.
const MAX_HINTS: usize = 64;
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
        super::addresses::few("spec.clusterIPs", listed.len())?;
        let mut addresses = vec![];
        for (index, text) in listed.iter().enumerate() {
            if !text.is_empty() && text != "None" {
                addresses.push(super::addresses::address(
                    &format!("spec.clusterIPs[{index}]"),
                    text,
                )?);
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
        let (ports_choice, mut faults) = PortsChoice::check(&service.metadata);
        let (accrual, faults_of_accrual) = AccrualChoice::check(&service.metadata);
        faults.extend(faults_of_accrual);
        let internal_traffic = match spec.internal_traffic_policy.as_deref() {
            None | Some("" | "Cluster") => InternalTraffic::Cluster,
            Some("Local") => InternalTraffic::Local,
            Some(other) => {
                let reason = format!("{:?} is neither Cluster nor Local", shown(other));
                faults.push(Fault::new("spec.internalTrafficPolicy", reason));
                InternalTraffic::Cluster
            }
        };
        let distribution = distribution(service, &mut faults);
        let (reliability, others) = ReliabilitySaid::of_service(&service.metadata);
        faults.extend(others);
        let record = Self {
            name,
            addresses,
            families,
            ports,
            selector: spec.selector.filter(|it| !it.is_empty()),
            publish_not_ready: spec.publish_not_ready_addresses.unwrap_or(false),
            external_name: spec.type_.as_deref() == Some("ExternalName"),
            ports_choice,
            internal_traffic,
            distribution,
            accrual,
            reliability,
            annotated: Annotated::of(&service.metadata),
        };
        Ok((record, faults))
    }

    /// What of an endpoint's place agents are to know.
    pub(super) fn told_place(&self, known: EndpointPlace) -> EndpointPlace {
        EndpointPlace {
            node: known
                .node
                .filter(|_| self.internal_traffic == InternalTraffic::Local),
            ..known
        }
    }

    /// The place of a pod on a node: with the hints that it would have in an EndpointSlice.
    pub(super) fn place_on(&self, node: &Name, zone: Option<&str>) -> EndpointPlace {
        let (by_node, by_zone) = match self.distribution {
            Distribution::Even => (false, false),
            Distribution::SameZone => (false, true),
            Distribution::SameNode => (true, true),
        };
        EndpointPlace {
            node: Some(node.clone()),
            for_nodes: by_node.then(|| node.clone()).into_iter().collect(),
            for_zones: zone
                .filter(|_| by_zone)
                .map(str::to_owned)
                .into_iter()
                .collect(),
        }
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
        let ready = (pod.ready && !pod.terminating) || self.publish_not_ready;
        if !ready || pod.completed || self.external_name {
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
            // As it is read where `serving` is newer than who writes slices.
            let serving = conditions.and_then(|it| it.serving).unwrap_or(ready);
            let place = slice_place(index, endpoint)?;
            let pod = target_pod(index, &service.namespace, endpoint)?;
            let condition = match (ready, terminating, serving) {
                (true, _, _) => Condition::Ready,
                (false, true, true) => Condition::Leaving,
                (false, _, _) => Condition::Unready,
            };
            for text in &endpoint.addresses {
                let field = format!("endpoints[{index}].addresses");
                let address = super::addresses::address(&field, text)?;
                addresses.push(SliceAddress {
                    address,
                    place: place.clone(),
                    pod: pod.clone(),
                    condition,
                });
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
    /// That of an address.
    pub(super) fn of(address: IpAddr) -> Self {
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

fn distribution(service: &Service, faults: &mut Vec<Fault>) -> Distribution {
    let annotations = service.metadata.annotations.as_ref();
    let mode = |name: &&str| annotations.and_then(|it| it.get(*name));
    let mode = TOPOLOGY_MODES.iter().find_map(mode);
    if mode.is_some_and(|it| matches!(it.as_str(), "Auto" | "auto")) {
        return Distribution::Even;
    }
    let spec = service.spec.as_ref();
    match spec.and_then(|it| it.traffic_distribution.as_deref()) {
        None | Some("") => Distribution::Even,
        Some("PreferClose" | "PreferSameZone") => Distribution::SameZone,
        Some("PreferSameNode") => Distribution::SameNode,
        Some(other) => {
            let reason = format!(
                "{:?} is none of PreferSameZone, PreferSameNode and PreferClose",
                shown(other)
            );
            faults.push(Fault::new("spec.trafficDistribution", reason));
            Distribution::Even
        }
    }
}

fn slice_place(index: usize, endpoint: &Endpoint) -> Result<EndpointPlace, Fault> {
    let hints = endpoint.hints.as_ref();
    let for_nodes = hints.and_then(|it| it.for_nodes.as_deref()).unwrap_or(&[]);
    let for_zones = hints.and_then(|it| it.for_zones.as_deref()).unwrap_or(&[]);
    if for_nodes.len().max(for_zones.len()) > MAX_HINTS {
        let reason = format!("more than {MAX_HINTS} of one kind");
        return Err(Fault::new(format!("endpoints[{index}].hints"), reason));
    }
    let node = |name: &str, field: &str| {
        name.parse()
            .map_err(|reason| Fault::new(format!("endpoints[{index}].{field}"), reason))
    };
    let own = endpoint.node_name.as_deref().filter(|it| !it.is_empty());
    Ok(EndpointPlace {
        node: own.map(|it| node(it, "nodeName")).transpose()?,
        for_nodes: for_nodes
            .iter()
            .map(|it| node(&it.name, "hints.forNodes"))
            .collect::<Result<_, _>>()?,
        for_zones: for_zones.iter().map(|it| it.name.clone()).collect(),
    })
}

/// The pod that an endpoint is said to be.
fn target_pod(
    index: usize,
    namespace: &Name,
    endpoint: &Endpoint,
) -> Result<Option<PodReference>, Fault> {
    let target = endpoint.target_ref.as_ref();
    let Some(target) = target.filter(|it| it.kind.as_deref() == Some("Pod")) else {
        return Ok(None);
    };
    let named = |field: &str, text: &str| {
        let field = format!("endpoints[{index}].targetRef.{field}");
        text.parse().map_err(|reason| Fault::new(field, reason))
    };
    let said = |text: &Option<String>| text.clone().filter(|it| !it.is_empty());
    Ok(Some(PodReference {
        name: ObjectName {
            namespace: match said(&target.namespace) {
                None => namespace.clone(),
                Some(text) => named("namespace", &text)?,
            },
            name: named("name", target.name.as_deref().unwrap_or_default())?,
        },
        uid: said(&target.uid),
    }))
}

fn shown(text: &str) -> String {
    text.chars().take(64).collect()
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
