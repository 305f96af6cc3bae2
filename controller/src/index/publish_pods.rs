//! What a pod is in the state of agents: a workload for all, endpoints of services, and for its
//! own node's agent the pod with the policies that govern it.

use std::collections::BTreeSet;
use std::net::IpAddr;

use weft_core::{
    AccessPolicy, EndpointName, EndpointPlace, EndpointPort, Identity, Mesh, Name, NodePod,
    ObjectName, PodRuntime, PortRanges, ServerBinding, ServerName, Tunnel, Weight, Workload,
    WorkloadId, WorkloadPolicy,
};
use weft_proto::{Key, Kind, Resource};

use super::Index;
use super::pods::{MeshChoice, PodRecord};
use super::policies::PortChoice;
use super::ports::{self, PortsChoice};
use crate::objects::{Fault, ObjectKey, ObjectKind};
use crate::problems::Facet;
use crate::views::Audience;

/// What was published of a pod.
#[derive(Debug, Default)]
pub(super) struct PublishedPod {
    is_workload: bool,
    local: Option<Local>,
    endpoints: BTreeSet<EndpointName>,
    overlaps: Vec<(ServerName, u16)>,
    /// Whether it is in the mesh and policies of CNIs select it.
    pub(super) is_held: bool,
}

impl PublishedPod {
    /// The Servers that govern it.
    pub(super) fn servers(&self) -> impl Iterator<Item = &ServerName> {
        self.local.iter().flat_map(|it| &it.servers)
    }
}

/// What a pod makes of an endpoint.
#[derive(Clone, Debug)]
pub(super) struct Derived {
    /// Where the service's ports go.
    pub(super) ports: Vec<EndpointPort>,
    /// Where it is, and whom it is meant for.
    pub(super) place: EndpointPlace,
    /// How much it is meant to take.
    pub(super) weight: Weight,
}

/// What was published to the agent of the pod's node.
#[derive(Debug, PartialEq)]
struct Local {
    node: Name,
    account: ObjectName,
    servers: BTreeSet<ServerName>,
}

/// Which Servers govern a pod.
struct Governed {
    policy: WorkloadPolicy,
    /// The Server that has to stand back, the port, and the one that governs it.
    overlaps: Vec<(ServerName, u16, ServerName)>,
    /// What agents are not told of NetworkPolicies.
    faults: Vec<Fault>,
}

impl Index {
    pub(super) fn set_pod(&mut self, name: &ObjectName, record: Option<PodRecord>) {
        let claimed = |record: Option<&PodRecord>| match record {
            Some(record) if record.is_workload() => self.usable(record).collect(),
            _ => vec![],
        };
        let before = claimed(self.pods.get(name));
        let now = claimed(record.as_ref());
        let affected = self.pod_addresses.replace(name, &before, &now);
        self.dirty.pods.extend(affected);
        let static_uid = |record: Option<&PodRecord>| record.and_then(PodRecord::static_uid);
        let before: Vec<_> = static_uid(self.pods.get(name)).into_iter().collect();
        let now: Vec<_> = static_uid(record.as_ref()).into_iter().collect();
        let affected = self.static_uids.replace(name, &before, &now);
        self.dirty.pods.extend(affected);
        self.dirty.pods.insert(name.clone());
        if !backs_the_same(self.pods.get(name), record.as_ref()) {
            let naming = self.slices_naming.get(name).into_iter().flatten();
            let slices = naming.filter_map(|it| self.slices.get(it));
            self.dirty
                .services
                .extend(slices.map(|it| it.service.clone()));
        }
        let pod = self.pods.get(name);
        self.dirty.cluster |= self.ranges.pod_changed(name, pod, record.as_ref());
        let is_first = !self.pods_in.contains_key(&name.namespace);
        let members = self.pods_in.entry(name.namespace.clone()).or_default();
        let before = match record {
            Some(record) => {
                members.insert(name.clone());
                self.pods.insert(name.clone(), record)
            }
            None => {
                members.remove(name);
                self.pods.remove(name)
            }
        };
        let now = self.pods.get(name).map(|it| it.mesh.clone());
        self.count_opted_in(name, (before.as_ref().map(|it| &it.mesh), now.as_ref()));
        self.left_changed(name, before.as_ref());
        self.network_peer_changed(before.as_ref(), name);
        if is_first {
            self.network_namespace_changed();
        }
    }

    pub(super) fn publish_pod(&mut self, name: &ObjectName) {
        let before = self.published.pods.remove(name).unwrap_or_default();
        let Some(pod) = self.pods.get(name) else {
            self.retract(name, before, PublishedPod::default());
            return;
        };
        let (addresses, faults) = self.addresses_of(name, pod);
        let endpoints = self.endpoints_at(pod, &addresses);
        let workload = self.workload(pod, &addresses);
        let local = workload.as_ref().and_then(|it| self.local(pod, it));
        let mut now = PublishedPod {
            is_workload: workload.is_some(),
            is_held: local.is_some() && self.is_selected_by_cni(pod),
            ..PublishedPod::default()
        };
        let node_pod = self.node_pod(pod, now.is_held);
        self.report(
            &pod_key(name),
            Facet::Conflict,
            faults,
            "nobody is reached at that address",
        );
        if let Some(workload) = workload {
            self.put(Audience::All, Resource::Workload(workload));
        }
        let mut untold = vec![];
        if let Some((local, mut governed)) = local {
            untold = std::mem::take(&mut governed.faults);
            let audience = Audience::Node(local.node.clone());
            self.put(audience.clone(), Resource::NodePod(node_pod));
            self.put(audience, Resource::WorkloadPolicy(governed.policy));
            for (loser, port, winner) in governed.overlaps {
                let overlaps = self.published.overlaps.entry(loser.clone()).or_default();
                overlaps.insert((name.clone(), port), winner);
                self.dirty.overlaps.insert(loser.clone());
                now.overlaps.push((loser, port));
            }
            now.local = Some(local);
        }
        self.report(
            &pod_key(name),
            Facet::Reference,
            untold,
            "the rule lets nobody through",
        );
        for (endpoint, derived) in endpoints {
            now.endpoints.insert(endpoint.clone());
            self.derive_endpoint(endpoint, name, Some(derived));
        }
        self.retract(name, before, now);
    }

    /// Takes back what was published before and is not now, and remembers the latter.
    fn retract(&mut self, name: &ObjectName, before: PublishedPod, now: PublishedPod) {
        let text = name.to_string();
        let key = |kind| Key {
            kind,
            name: text.clone(),
        };
        if before.is_workload && !now.is_workload {
            self.changes
                .insert((Audience::All, key(Kind::Workload)), None);
        }
        let node_before = before.local.as_ref().map(|it| &it.node);
        let node_now = now.local.as_ref().map(|it| &it.node);
        if let Some(node) = node_before.filter(|_| node_before != node_now) {
            for kind in [Kind::NodePod, Kind::WorkloadPolicy] {
                self.changes
                    .insert((Audience::Node(node.clone()), key(kind)), None);
            }
        }
        if before.local != now.local {
            // First the new, so that what both have does not go away in between.
            self.count(now.local.as_ref(), 1);
            self.count(before.local.as_ref(), -1);
        }
        for endpoint in before.endpoints.difference(&now.endpoints) {
            self.derive_endpoint(endpoint.clone(), name, None);
        }
        for (server, port) in &before.overlaps {
            if !now.overlaps.contains(&(server.clone(), *port))
                && let Some(overlaps) = self.published.overlaps.get_mut(server)
            {
                overlaps.remove(&(name.clone(), *port));
                self.dirty.overlaps.insert(server.clone());
            }
        }
        self.note_held(name, now.is_held);
        if self.pods.contains_key(name) {
            self.published.pods.insert(name.clone(), now);
        }
    }

    fn count(&mut self, local: Option<&Local>, difference: isize) {
        let Some(local) = local else {
            return;
        };
        self.views
            .count_account(&local.node, &local.account, difference);
        for server in &local.servers {
            self.count_server(server, &local.node, difference);
        }
    }

    /// The addresses at which the pod is reached, and what is wrong with others.
    fn addresses_of(&self, name: &ObjectName, pod: &PodRecord) -> (Vec<IpAddr>, Vec<Fault>) {
        if pod.completed {
            return (vec![], vec![]);
        }
        if pod.host_network {
            return (pod.addresses.clone(), vec![]);
        }
        let mut faults = vec![];
        if pod.node.is_none() && !pod.addresses.is_empty() {
            let reason = "missing: a pod with an address runs on a node";
            faults.push(Fault::new("spec.nodeName", reason));
        }
        for address in &pod.addresses {
            if self.is_of_services(*address) {
                let reason = format!("{address} lies in the range of Services");
                faults.push(Fault::new("status.podIPs", reason));
            } else if let Some(other) = self.pod_addresses.other(address, name) {
                let reason = format!("{address} is claimed by pod {other} too");
                faults.push(Fault::new("status.podIPs", reason));
            }
        }
        (self.usable(pod).collect(), faults)
    }

    /// The addresses that a pod may have.
    pub(super) fn usable<'a>(&'a self, pod: &'a PodRecord) -> impl Iterator<Item = IpAddr> + 'a {
        let addresses = pod.addresses.iter().copied();
        addresses.filter(|it| !self.is_of_services(*it))
    }

    fn workload(&self, pod: &PodRecord, addresses: &[IpAddr]) -> Option<Workload> {
        let node = pod.node.clone()?;
        if !pod.is_workload() {
            return None;
        }
        let silent = MeshChoice::Silent;
        let namespace = self.namespaces.get(&pod.id.0.namespace);
        let mesh = match pod.is_meshed(namespace.map_or(&silent, |it| &it.mesh)) {
            false => Mesh::Unmeshed,
            true => Mesh::Meshed {
                identity: Identity {
                    trust_domain: self.settings.trust_domain.clone(),
                    namespace: pod.id.0.namespace.clone(),
                    service_account: pod.service_account.clone(),
                },
                tunnel: Tunnel::WeftH2,
            },
        };
        // A meshed pod is governed as soon as it has a node: it is enrolled before it has an address.
        if addresses.is_empty() && mesh == Mesh::Unmeshed {
            return None;
        }
        Some(Workload {
            id: pod.id.clone(),
            addresses: addresses.to_vec(),
            node,
            owner: pod.owner.clone(),
            mesh,
            // Most have no others than all have, and there are many.
            opaque_ports: Some(self.opaque_ports(pod))
                .filter(|it| *it != PortRanges::opaque_by_default()),
        })
    }

    fn opaque_ports(&self, pod: &PodRecord) -> PortRanges {
        let named = |name: &str| pod.ports_named(name).collect();
        let namespace = self.ports_of_namespace(&pod.id.0.namespace);
        pod.ports_choice.inbound_ports(namespace, named)
    }

    /// What a namespace says of the ports in it.
    pub(super) fn ports_of_namespace(&self, namespace: &Name) -> &PortsChoice {
        let namespace = self.namespaces.get(namespace);
        namespace.map_or(&ports::SILENT, |it| &it.ports)
    }

    fn node_pod(&self, pod: &PodRecord, by_tunnels_only: bool) -> NodePod {
        let namespace = self.ports_of_namespace(&pod.id.0.namespace);
        NodePod {
            id: pod.id.clone(),
            uid: pod.uid.clone(),
            netns: pod.netns.clone(),
            runtime: self.runtime(pod),
            probe_ports: pod.probe_ports.clone(),
            opaque_ports: self.opaque_ports(pod),
            opaque_outbound_ports: pod.ports_choice.outbound_ports(namespace),
            zone: self.zone_of(pod.node.as_ref()).map(str::to_owned),
            by_tunnels_only,
        }
    }

    /// How the node has the pod. Of several that say to be the same static pod, meshed or not, none is: anybody can say so.
    fn runtime(&self, pod: &PodRecord) -> Box<PodRuntime> {
        let mut runtime = pod.runtime.clone();
        let other = |it| self.static_uids.other(&it, &pod.id.0);
        if let Some(other) = pod.static_uid().and_then(other) {
            tracing::warn!(pod = %pod.id, %other, "two pods of a node have the annotations of one static pod: neither is believed");
            runtime.static_uid = None;
        }
        runtime
    }

    /// The zone of a node, where it has one.
    fn zone_of(&self, node: Option<&Name>) -> Option<&str> {
        self.nodes.get(node?)?.zone.as_deref()
    }

    fn local(&self, pod: &PodRecord, workload: &Workload) -> Option<(Local, Governed)> {
        workload.identity()?;
        let governed = self.governed(pod);
        let servers = governed.policy.servers.iter();
        let local = Local {
            node: workload.node.clone(),
            account: ObjectName {
                namespace: pod.id.0.namespace.clone(),
                name: pod.service_account.clone(),
            },
            servers: servers.map(|it| it.server.clone()).collect(),
        };
        Some((local, governed))
    }

    fn governed(&self, pod: &PodRecord) -> Governed {
        let namespace = &pod.id.0.namespace;
        let of_namespace = self.namespaces.get(namespace);
        let mut default = pod
            .default
            .policy()
            .or_else(|| of_namespace.and_then(|it| it.default.policy()))
            .unwrap_or(self.settings.default_policy);
        let names = self.policies.servers_in.get(namespace);
        let mut servers: Vec<_> = names
            .into_iter()
            .flatten()
            .filter_map(|name| self.policies.servers.get(name))
            .filter(|server| server.selects(pod))
            .collect();
        servers.sort_by(|one, other| one.precedence().cmp(&other.precedence()));
        let mut bindings: Vec<ServerBinding> = vec![];
        let mut overlaps = vec![];
        for server in servers {
            let ports: BTreeSet<u16> = match &server.port {
                PortChoice::Number(port) => [*port].into(),
                PortChoice::Named(name) => pod.ports_named(name).collect(),
                PortChoice::Any => {
                    default = AccessPolicy::Deny;
                    BTreeSet::new()
                }
            };
            for port in ports {
                match bindings.iter().find(|it| it.port == port) {
                    None => bindings.push(ServerBinding {
                        port,
                        server: server.name.clone(),
                    }),
                    Some(binding) => {
                        overlaps.push((server.name.clone(), port, binding.server.clone()));
                    }
                }
            }
        }
        bindings.sort_by_key(|it| it.port);
        let let_through = self.network_rules(pod);
        let policy = WorkloadPolicy {
            workload: WorkloadId(pod.id.0.clone()),
            default,
            servers: bindings,
            network: let_through.ingress,
            network_egress: let_through.egress,
        };
        Governed {
            policy,
            overlaps,
            faults: let_through.faults,
        }
    }

    fn endpoints_at(&self, pod: &PodRecord, addresses: &[IpAddr]) -> Vec<(EndpointName, Derived)> {
        let mut endpoints = vec![];
        if self.settings.slices_only {
            return endpoints;
        }
        let names = self.services_in.get(&pod.id.0.namespace);
        for name in names.into_iter().flatten() {
            let Some(service) = self.services.get(name) else {
                continue;
            };
            if self.slices_of.contains_key(name) || !service.selects(&pod.labels) {
                continue;
            }
            let ports = service.ports_at(pod);
            if ports.is_empty() {
                continue;
            }
            let place = pod.node.as_ref().map(|node| {
                let place = service.place_on(node, self.zone_of(Some(node)));
                service.told_place(place)
            });
            let derived = Derived {
                ports,
                place: place.unwrap_or_default(),
                weight: pod.weight,
            };
            for address in addresses.iter().filter(|it| service.has_family_of(**it)) {
                let name = EndpointName {
                    service: service.name.clone(),
                    address: *address,
                };
                endpoints.push((name, derived.clone()));
            }
        }
        endpoints
    }
}

/// Whether slices may say the same of two records of a pod.
fn backs_the_same(before: Option<&PodRecord>, now: Option<&PodRecord>) -> bool {
    let (Some(before), Some(now)) = (before, now) else {
        return before.is_none() && now.is_none();
    };
    before.uid == now.uid
        && before.weight == now.weight
        && before.addresses == now.addresses
        && before.is_workload() == now.is_workload()
        && before.host_network == now.host_network
}

fn pod_key(name: &ObjectName) -> ObjectKey {
    ObjectKey {
        kind: ObjectKind::Pod,
        namespace: Some(name.namespace.clone()),
        name: name.name.clone(),
    }
}
