//! What the agent knows: written by the control stream's task, read by everybody without a lock.
//!
//! Each concern is published by itself: workloads and services as sharded maps, so that one changed
//! pod copies little; policy as one snapshot, so that a decision sees all of a push or nothing. What a
//! push takes away from a client is in force before what it makes reachable.

use std::borrow::Borrow;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::{self, Display};
use std::hash::{Hash, Hasher};
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use arc_swap::{ArcSwap, ArcSwapOption};
use tokio::sync::watch;
use weft_core::{
    Client, ClusterSettings, EgressName, EgressNetwork, EndpointName, Name, NodePod, ObjectName,
    PortProtocol, TrustBundle, TrustDomain, Verdict, Workload, WorkloadId,
};
use weft_proto::{Key, Kind, Resource};

use super::addresses::{AddressIndex, Claimant, Contested, Owner};
use super::dump::{ShownWorkload, StoreDump};
use super::interner::Interner;
use super::newcomers::Newcomers;
use super::policies::{Policies, RequestPolicy};
use super::services::{ServiceEntry, ServicePortEntry, Services, ServicesByName};
use super::sharded::Sharded;

/// The store. Shared by `Arc`.
pub struct Store {
    trust_bundle: ArcSwapOption<TrustBundle>,
    /// With the version that each was pushed with.
    workloads: Sharded<ByName, u64>,
    workload_addresses: AddressIndex<Workload>,
    newcomers: Newcomers,
    service_addresses: AddressIndex<ServiceEntry>,
    services: ServicesByName,
    pub(super) policies: ArcSwap<Policies>,
    node_pods: ArcSwap<NodePods>,
    /// Those that may hold meshed pods.
    mesh_namespaces: ArcSwap<BTreeSet<Name>>,
    complete: AtomicBool,
    generations: watch::Sender<Generations>,
    writer: Mutex<Writer>,
}

impl fmt::Debug for Store {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        // What it holds is for dumps.
        formatter.debug_struct("Store").finish_non_exhaustive()
    }
}

type NodePods = BTreeMap<WorkloadId, Arc<NodePod>>;

/// Where a connection is going.
#[derive(Clone, Debug)]
pub enum Destination {
    /// A port of a service.
    Service(Arc<ServicePortEntry>),
    /// A service's address, but no port of it: to be refused.
    ServiceWithoutPort(ObjectName),
    /// A workload's own address.
    Workload(Arc<Workload>),
    /// Outside of the cluster.
    Outside,
    /// It may be a workload's that is not known yet, or never will be anybody's (loopback,
    /// unspecified, multicast): to be asked for, then refused.
    Unknown,
}

/// Counters of changes, one per concern, so that whoever waits wakes only for theirs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Generations {
    /// The node's pods and their workloads.
    pub node_pods: u64,
    /// Policies, and the settings they depend on: live flows may no longer be allowed.
    pub policies: u64,
    /// The trust bundle and the cluster's settings.
    pub trust: u64,
    /// The namespaces that may hold meshed pods.
    pub mesh_namespaces: u64,
}

/// A workload that is its own key: hashed and compared by its name.
#[derive(Clone)]
struct ByName(Arc<Workload>);

/// What only the writer needs.
#[derive(Default)]
struct Writer {
    /// Versions of all but workloads and endpoints: those are many, and keep theirs themselves.
    versions: HashMap<Key, u64>,
    interner: Interner,
    contested: Contested<Workload>,
    services: Services,
    bundles: HashMap<TrustDomain, Arc<TrustBundle>>,
}

/// A push, sorted by concern. Removals are `None`.
#[derive(Default)]
struct Sorted {
    cluster: Option<Option<ClusterSettings>>,
    bundles: Vec<(TrustDomain, Option<TrustBundle>)>,
    workloads: Vec<(WorkloadId, Option<(Workload, u64)>)>,
    node_pods: Vec<(WorkloadId, Option<NodePod>)>,
    /// Whether each of these may hold meshed pods.
    mesh_namespaces: Vec<(Name, bool)>,
    policies: Vec<PolicyChange>,
    services: BTreeSet<ObjectName>,
}

enum PolicyChange {
    Put(Resource),
    RemoveEgress(EgressName),
    RemoveWorkload(WorkloadId),
    RemoveServer(String),
}

impl Store {
    /// An empty store: everything is unknown, so everything is refused.
    pub fn new() -> Arc<Self> {
        Self::made(None)
    }

    /// The same, on a node: some services tell clients of different nodes apart.
    pub fn on(node: Name) -> Arc<Self> {
        Self::made(Some(node))
    }

    fn made(node: Option<Name>) -> Arc<Self> {
        let writer = Writer {
            services: Services::on(node),
            ..Writer::default()
        };
        Arc::new(Self {
            trust_bundle: ArcSwapOption::empty(),
            workloads: Sharded::new(),
            workload_addresses: AddressIndex::new(),
            newcomers: Newcomers::default(),
            service_addresses: AddressIndex::new(),
            services: ServicesByName::new(),
            policies: ArcSwap::default(),
            node_pods: ArcSwap::default(),
            mesh_namespaces: ArcSwap::default(),
            complete: AtomicBool::new(false),
            generations: watch::Sender::default(),
            writer: Mutex::new(writer),
        })
    }

    /// The cluster's settings, once known.
    pub fn cluster(&self) -> Option<Arc<ClusterSettings>> {
        self.policies.load().cluster.clone()
    }

    /// The roots of the cluster's trust domain, once both are known.
    pub fn trust_bundle(&self) -> Option<Arc<TrustBundle>> {
        self.trust_bundle.load_full()
    }

    /// The workload that has an address, and is the only one to claim it.
    pub fn workload_at(&self, address: IpAddr) -> Option<Arc<Workload>> {
        match self.workload_addresses.owner(address) {
            Owner::One(workload) => Some(workload),
            Owner::Nobody | Owner::Contested => None,
        }
    }

    /// Whether several workloads claim an address.
    pub fn is_contested(&self, address: IpAddr) -> bool {
        matches!(self.workload_addresses.owner(address), Owner::Contested)
    }

    /// Whether the pod that has an address became meshed a moment ago: its agent may not listen for it yet.
    pub fn is_newcomer(&self, address: IpAddr) -> bool {
        self.newcomers.is_one(address, Instant::now())
    }

    /// A workload by name.
    pub fn workload(&self, id: &WorkloadId) -> Option<Arc<Workload>> {
        self.workloads.get(id).map(|(known, _)| known.0)
    }

    /// What a destination is. Its address is canonical: no IPv4-mapped IPv6.
    pub fn classify(&self, destination: SocketAddr) -> Destination {
        let address = destination.ip();
        if !is_reachable(address) {
            return Destination::Unknown;
        }
        let service = self.service_addresses.owner(address);
        match (service, self.workload_addresses.owner(address)) {
            (Owner::Nobody, Owner::Nobody) => {}
            (Owner::One(service), Owner::Nobody) => {
                return match service.port(destination.port()) {
                    Some(port) => Destination::Service(Arc::clone(port)),
                    None => Destination::ServiceWithoutPort(service.name.clone()),
                };
            }
            (Owner::Nobody, Owner::One(workload)) => return Destination::Workload(workload),
            // Claimed by more than one, wherever the address lies: nobody's.
            _ => return Destination::Unknown,
        }
        // Until everything was received once, nothing can be said to be outside: meshed machines
        // may have addresses outside of the ranges.
        match &self.policies.load().cluster {
            Some(cluster) if self.is_complete() && !cluster.contains(address) => {
                Destination::Outside
            }
            _ => Destination::Unknown,
        }
    }

    /// A port of a service, as routes name it. None: there is no such service or port.
    pub fn service_port(&self, name: &ObjectName, port: u16) -> Option<Arc<ServicePortEntry>> {
        let (_, service) = self.services.get(name)?;
        service.port(port).map(Arc::clone)
    }

    /// The addresses that a Service's name stands for. None: there is no such Service.
    pub fn resolve(&self, name: &ObjectName) -> Option<Vec<IpAddr>> {
        self.services.get(name).map(|(_, it)| it.resolved())
    }

    /// What a port of a workload of this node speaks, as far as somebody said: a Server first, then
    /// what lists opaque ports.
    pub fn inbound_protocol(&self, workload: &WorkloadId, port: u16) -> PortProtocol {
        let policies = self.policies.load();
        let declared = policies.declared_protocol(workload, port);
        declared.unwrap_or_else(|| match self.node_pods.load().get(workload) {
            Some(pod) => pod.opaque_ports.protocol_of(port),
            None => PortProtocol::by_default(port),
        })
    }

    /// The same for a flow whose client's agent has not looked into it because this port of that Service
    /// is opaque, as it says. A Service is believed of pods in its own namespace, and what is said of it is
    /// not: its declaration, and that the address backs it, are to be in the store.
    pub fn inbound_protocol_by(
        &self,
        workload: &WorkloadId,
        to: SocketAddr,
        (service, port): (&Name, u16),
    ) -> PortProtocol {
        let declared = self.inbound_protocol(workload, to.port());
        if declared != PortProtocol::Detect {
            return declared;
        }
        let name = ObjectName {
            namespace: workload.0.namespace.clone(),
            name: service.clone(),
        };
        let port = self.service_port(&name, port);
        match port.is_some_and(|it| it.protocol().is_opaque() && it.is_backed_by(to)) {
            true => PortProtocol::Opaque,
            false => declared,
        }
    }

    /// Whether connections of a workload of this node to this port, wherever it is, are not to be
    /// looked into.
    pub fn is_outbound_opaque(&self, workload: &WorkloadId, port: u16) -> bool {
        let pods = self.node_pods.load();
        let pod = pods.get(workload);
        pod.is_some_and(|it| it.opaque_outbound_ports.contains(port))
    }

    /// The NetworkPolicies that say what may connect to a pod of this node; none: no one does.
    pub fn network_policies_in(&self, workload: &WorkloadId) -> Vec<ObjectName> {
        let policies = self.policies.load();
        let rules = policies
            .workloads
            .get(workload)
            .and_then(|it| it.network.clone());
        rules.map(|it| it.policies.clone()).unwrap_or_default()
    }

    /// The service ports that a pod of this node has used.
    pub fn used_ports(&self) -> Vec<Arc<ServicePortEntry>> {
        self.writer().services.used_ports()
    }

    /// Decides whether a client may connect to a port of a workload of this node.
    pub fn authorize(&self, workload: &WorkloadId, port: u16, client: Client<'_>) -> Verdict {
        let workload_at = |address| self.workload_at(address);
        let policies = self.policies.load();
        policies.authorize(workload, port, client, workload_at)
    }

    /// Decides about a client's connection to a port of a workload of this node, and says what is to be
    /// asked about its requests besides; all as of one moment, with its number.
    pub fn authorize_requests(
        &self,
        workload: &WorkloadId,
        port: u16,
        client: Client<'_>,
    ) -> (u64, Verdict, Option<RequestPolicy>) {
        let policies = self.policies.load();
        let workload_at = |address| self.workload_at(address);
        let connection = policies.authorize(workload, port, client, workload_at);
        let requests = policies.requests(workload, port);
        (policies.number, connection, requests)
    }

    /// Counts changes of policy: what was decided at the same number would be decided again.
    pub fn policy_number(&self) -> u64 {
        self.policies.load().number
    }

    /// Whether there are EgressNetworks.
    pub fn has_egress(&self) -> bool {
        !self.policies.load().egress.is_empty()
    }

    /// Whether there is an EgressNetwork of that name.
    pub fn holds_egress(&self, name: &EgressName) -> bool {
        self.policies.load().egress.contains(name)
    }

    /// The EgressNetwork that a destination belongs to, for clients in a namespace; none: it belongs to none, or
    /// is not outside of the cluster.
    pub fn egress(&self, client: &Name, to: SocketAddr) -> Option<Arc<EgressNetwork>> {
        let policies = self.policies.load();
        if policies.egress.is_empty() {
            return None;
        }
        let is_outside = self.is_outside(to);
        let network = is_outside.then(|| policies.egress.find(client, to.ip()));
        network.flatten().cloned()
    }

    /// Whether a destination is outside of the cluster.
    pub fn is_outside(&self, to: SocketAddr) -> bool {
        matches!(self.classify(to), Destination::Outside)
    }

    /// The pods of this node, by name.
    pub fn node_pods(&self) -> Vec<Arc<NodePod>> {
        self.node_pods.load().values().cloned().collect()
    }

    /// The namespaces that opt in, and those with pods that do so themselves.
    pub fn mesh_namespaces(&self) -> Arc<BTreeSet<Name>> {
        self.mesh_namespaces.load_full()
    }

    /// Tells of changes.
    pub fn changes(&self) -> watch::Receiver<Generations> {
        self.generations.subscribe()
    }

    /// Whether everything was received once.
    pub fn is_complete(&self) -> bool {
        self.complete.load(Ordering::Acquire)
    }

    /// Everything was received.
    pub fn set_complete(&self) {
        if !self.complete.swap(true, Ordering::AcqRel) {
            // What a previous agent left can be told from what is wanted only now.
            self.generations.send_modify(|it| {
                it.node_pods += 1;
                it.mesh_namespaces += 1;
            });
        }
    }

    /// Applies changes whose versions nobody will ask for.
    pub fn apply(&self, changed: Vec<Resource>, removed: Vec<Key>) {
        let unversioned = changed.into_iter().map(|resource| (resource, 0));
        self.apply_push(unversioned.collect(), removed);
    }

    /// Applies a push: as one as far as policy is concerned, and policy before pods.
    pub fn apply_push(&self, changed: Vec<(Resource, u64)>, removed: Vec<Key>) {
        let mut guard = self.writer();
        let writer = &mut *guard;
        let sorted = Sorted::new(changed, removed, writer);
        let mut next = *self.generations.borrow();
        if sorted.cluster.is_some() || !sorted.policies.is_empty() {
            next.policies += 1;
            next.trust += u64::from(sorted.cluster.is_some());
            self.apply_policies(sorted.cluster, sorted.policies);
        }
        next.trust += u64::from(self.apply_bundles(sorted.bundles, &mut writer.bundles));
        let local = self.apply_workloads(sorted.workloads, writer);
        let (services, mut touched) = (&mut writer.services, sorted.services);
        let pods = !sorted.node_pods.is_empty();
        if pods {
            let node_pods = self.changed_node_pods(sorted.node_pods);
            touched.extend(services.set_zone(zone_of(&node_pods)));
            services.publish(touched.iter(), &self.service_addresses, &self.services);
            self.node_pods.store(Arc::new(node_pods));
        } else {
            services.publish(touched.iter(), &self.service_addresses, &self.services);
        }
        next.node_pods += u64::from(local || pods);
        next.mesh_namespaces += u64::from(self.apply_namespaces(sorted.mesh_namespaces));
        self.generations.send_if_modified(|current| {
            let changed = *current != next;
            *current = next;
            changed
        });
    }

    /// Every resource with its version, in no order.
    pub fn held(&self) -> Vec<(Key, u64)> {
        let writer = self.writer();
        let others = writer.versions.iter();
        let mut held: Vec<(Key, u64)> = others.map(|(key, it)| (key.clone(), *it)).collect();
        let key = |kind, name: &dyn Display| Key {
            kind,
            name: name.to_string(),
        };
        let workloads = self.workloads.entries().into_iter();
        held.extend(workloads.map(|(it, version)| (key(Kind::Workload, &it.0.id), version)));
        let endpoints = writer.services.endpoint_versions();
        held.extend(endpoints.map(|(name, version)| (key(Kind::Endpoint, &name), version)));
        held
    }

    /// Everything, for people: sections by name.
    pub fn dump(&self) -> StoreDump {
        let entries = self.workloads.entries().into_iter();
        let mut workloads: Vec<ShownWorkload> =
            entries.map(|(it, _)| ShownWorkload(it.0)).collect();
        workloads.sort_by(|a, b| a.0.id.cmp(&b.0.id));
        StoreDump {
            complete: self.is_complete(),
            cluster: self.cluster().as_deref().cloned(),
            trust_roots: self.trust_bundle().map(|it| it.roots.len()),
            workloads,
            services: self.writer().services.dump(),
            policies: self.policies.load().dump(),
        }
    }

    fn apply_policies(&self, cluster: Option<Option<ClusterSettings>>, changes: Vec<PolicyChange>) {
        let mut policies = Policies::clone(&self.policies.load());
        policies.number += 1;
        if let Some(cluster) = cluster {
            policies.cluster = cluster.map(Arc::new);
        }
        for change in changes {
            match change {
                PolicyChange::Put(Resource::WorkloadPolicy(policy)) => {
                    policies.put_workload(policy);
                }
                PolicyChange::Put(Resource::Server(server)) => {
                    let name = server.name.clone();
                    policies.servers.insert(name, Arc::new(server));
                }
                PolicyChange::Put(Resource::EgressNetwork(network)) => policies.egress.put(network),
                PolicyChange::Put(_) => {}
                PolicyChange::RemoveEgress(name) => policies.egress.remove(&name),
                PolicyChange::RemoveWorkload(id) => {
                    policies.workloads.remove(&id);
                }
                PolicyChange::RemoveServer(name) => {
                    policies.servers.retain(|it, _| it.to_string() != name);
                }
            }
        }
        self.policies.store(Arc::new(policies));
    }

    /// Returns whether the bundle in force is another one now.
    fn apply_bundles(
        &self,
        changes: Vec<(TrustDomain, Option<TrustBundle>)>,
        bundles: &mut HashMap<TrustDomain, Arc<TrustBundle>>,
    ) -> bool {
        for (domain, bundle) in changes {
            match bundle {
                Some(bundle) => bundles.insert(domain, Arc::new(bundle)),
                None => bundles.remove(&domain),
            };
        }
        let cluster = self.cluster();
        let current = cluster.and_then(|it| bundles.get(&it.trust_domain).cloned());
        if self.trust_bundle() == current {
            return false;
        }
        self.trust_bundle.store(current);
        true
    }

    /// Returns whether a pod of this node is among the changed ones.
    fn apply_workloads(
        &self,
        changes: Vec<(WorkloadId, Option<(Workload, u64)>)>,
        writer: &mut Writer,
    ) -> bool {
        let node_pods = self.node_pods.load();
        let local = changes.iter().any(|(id, _)| node_pods.contains_key(id));
        // What is told first has been there for longer, as far as is known.
        let (is_complete, now) = (self.is_complete(), Instant::now());
        let mut by_name = self.workloads.edit();
        let mut claims = self.workload_addresses.edit(&mut writer.contested);
        for (id, workload) in changes {
            let old = by_name.get(&id).map(|(known, _)| known.0);
            match workload {
                Some((mut workload, version)) => {
                    for address in &mut workload.addresses {
                        *address = address.to_canonical();
                    }
                    if is_complete {
                        self.newcomers.changed(old.as_deref(), &workload, now);
                    }
                    writer.interner.share(&mut workload);
                    let new = Arc::new(workload);
                    claims.replace(old.as_ref(), Some(&new));
                    by_name.insert(ByName(new), version);
                }
                None => {
                    claims.replace(old.as_ref(), None);
                    by_name.remove(&id);
                }
            }
        }
        by_name.publish();
        claims.publish();
        if writer.interner.is_untidy() {
            let all = self.workloads.entries();
            writer.interner.tidy(all.iter().map(|(it, _)| &*it.0));
        }
        local
    }

    /// Returns whether there are others now.
    fn apply_namespaces(&self, changes: Vec<(Name, bool)>) -> bool {
        if changes.is_empty() {
            return false;
        }
        let mut namespaces = BTreeSet::clone(&self.mesh_namespaces.load());
        for (name, may_hold) in changes {
            match may_hold {
                true => namespaces.insert(name),
                false => namespaces.remove(&name),
            };
        }
        self.mesh_namespaces.store(Arc::new(namespaces));
        true
    }

    fn changed_node_pods(&self, changes: Vec<(WorkloadId, Option<NodePod>)>) -> NodePods {
        let mut pods = BTreeMap::clone(&self.node_pods.load());
        for (id, pod) in changes {
            match pod {
                Some(pod) => pods.insert(id, Arc::new(pod)),
                None => pods.remove(&id),
            };
        }
        pods
    }

    fn writer(&self) -> MutexGuard<'_, Writer> {
        // A panic while applying leaves the parts that were published; the next push goes on.
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Sorted {
    /// Services go straight into their parts, as nothing of them is visible before it is published.
    fn new(changed: Vec<(Resource, u64)>, removed: Vec<Key>, writer: &mut Writer) -> Self {
        let mut sorted = Self::default();
        for key in removed {
            writer.versions.remove(&key);
            sorted.remove(key, &mut writer.services);
        }
        for (resource, version) in changed {
            if !matches!(resource, Resource::Workload(_) | Resource::Endpoint(_)) {
                writer.versions.insert(resource.key(), version);
            }
            sorted.put(resource, version, &mut writer.services);
        }
        sorted
    }

    fn put(&mut self, resource: Resource, version: u64, services: &mut Services) {
        match resource {
            Resource::Cluster(it) => self.cluster = Some(Some(it)),
            Resource::TrustBundle(it) => self.bundles.push((it.trust_domain.clone(), Some(it))),
            Resource::Workload(it) => {
                let id = it.id.clone();
                self.workloads.push((id, Some((it, version))));
            }
            Resource::NodePod(it) => self.node_pods.push((it.id.clone(), Some(it))),
            Resource::MeshNamespace(it) => self.mesh_namespaces.push((it, true)),
            Resource::Service(it) => {
                self.services.insert(services.put_service(it));
            }
            Resource::Endpoint(it) => {
                self.services.insert(services.put_endpoint(it, version));
            }
            Resource::RouteTable(it) => {
                self.services.insert(services.put_routes(it));
            }
            it @ (Resource::WorkloadPolicy(_)
            | Resource::Server(_)
            | Resource::EgressNetwork(_)) => {
                self.policies.push(PolicyChange::Put(it));
            }
        }
    }

    /// A name that cannot be one was never put, so there is nothing to remove.
    fn remove(&mut self, key: Key, services: &mut Services) {
        match key.kind {
            Kind::Cluster => self.cluster = Some(None),
            Kind::TrustBundle => {
                let domain = key.name.parse();
                self.bundles.extend(domain.ok().map(|it| (it, None)));
            }
            Kind::Workload => {
                let id = key.name.parse();
                self.workloads.extend(id.ok().map(|it| (it, None)));
            }
            Kind::NodePod => {
                let id = key.name.parse();
                self.node_pods.extend(id.ok().map(|it| (it, None)));
            }
            Kind::MeshNamespace => {
                let name = key.name.parse();
                self.mesh_namespaces.extend(name.ok().map(|it| (it, false)));
            }
            Kind::Service => {
                if let Ok(name) = key.name.parse() {
                    services.remove_service(&name);
                    self.services.insert(name);
                }
            }
            Kind::Endpoint => {
                if let Some(name) = endpoint_name(&key.name) {
                    services.remove_endpoint(&name.service, name.address);
                    self.services.insert(name.service);
                }
            }
            Kind::RouteTable => {
                if let Ok(name) = key.name.parse() {
                    services.remove_routes(&name);
                    self.services.insert(name.service);
                }
            }
            Kind::WorkloadPolicy => {
                let id = key.name.parse().ok().map(PolicyChange::RemoveWorkload);
                self.policies.extend(id);
            }
            Kind::Server => self.policies.push(PolicyChange::RemoveServer(key.name)),
            Kind::EgressNetwork => {
                let name = key.name.parse().ok().map(PolicyChange::RemoveEgress);
                self.policies.extend(name);
            }
        }
    }
}

impl Borrow<WorkloadId> for ByName {
    fn borrow(&self) -> &WorkloadId {
        &self.0.id
    }
}

impl Hash for ByName {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.id.hash(state);
    }
}

impl PartialEq for ByName {
    fn eq(&self, other: &Self) -> bool {
        self.0.id == other.0.id
    }
}

impl Eq for ByName {}

impl Claimant for Workload {
    type Id = WorkloadId;

    fn id(&self) -> &WorkloadId {
        &self.id
    }

    fn addresses(&self) -> &[IpAddr] {
        &self.addresses
    }
}

/// The node's zone, which each of its pods tells. While it changes they may differ.
fn zone_of(pods: &NodePods) -> Option<String> {
    pods.values().find_map(|it| it.zone.clone())
}

/// Reads `namespace/name@address`.
fn endpoint_name(text: &str) -> Option<EndpointName> {
    let (service, address) = text.rsplit_once('@')?;
    Some(EndpointName {
        service: service.parse().ok()?,
        address: address.parse().ok()?,
    })
}

/// Whether an address can be that of one other host.
pub(crate) fn is_reachable(address: IpAddr) -> bool {
    let broadcast = matches!(address, IpAddr::V4(it) if it.is_broadcast());
    !(address.is_loopback() || address.is_unspecified() || address.is_multicast() || broadcast)
}

#[cfg(test)]
#[path = "store_tests.rs"]
mod tests;
