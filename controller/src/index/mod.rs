//! From objects to the state of agents, incrementally: one changed object recomputes what depends
//! on it, and what comes out unchanged is not sent (see [`Views`]).
//!
//! The index knows no source. What cannot be used is reported, and what was in force stays; what
//! was never in force stays closed.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use serde::Deserialize;
use serde_json::{Value, json};
use weft_core::route::RouteName;
use weft_core::{
    AccessPolicy, AuthorizationName, Counts, EgressName, EndpointName, IdentityMatch, Name,
    NetworkMatch, ObjectName, PolicyGroup, ServerName, TrustDomain,
};
use weft_proto::{Key, Resource};

use crate::objects::{Fault, Object, ObjectKey, ObjectKind};
use crate::problems::{Facet, Origin, Problem, Problems, Scope};
use crate::source::{Batch, Event};
use crate::statuses::{Statuses, Version};
use crate::views::{Audience, Changes, Views};
use claims::Claims;
use cni::CniPolicies;
use egress::{EgressRecord, PublishedEgress};
use limits::{LimitRecord, Limits};
use network::{NetworkPolicies, NetworkPolicyRecord};
pub(crate) use pods::STATIC_POD_ANNOTATIONS;
use pods::{Created, NamespaceRecord, PodRecord};
use policies::{AuthorizationRecord, ServerRecord, Setting};
use profiles::{ProfileRecord, Profiles};
use publish_pods::Derived;
use ranges::{NodeRecord, Ranges};
use rejected::Rejected;
use routes::{GrantRecord, Refused, RouteRecord, Routes};
use services::{ServiceRecord, SliceRecord};
use too_large::TooLarge;

mod accrual;
mod claims;
mod cni;
mod egress;
mod idle;
mod limits;
mod members;
mod network;
mod pods;
mod policies;
mod ports;
mod profiles;
mod publish_inbound;
mod publish_pods;
mod publish_policies;
mod publish_profiles;
mod publish_routes;
mod publish_services;
mod publish_slices;
mod ranges;
mod rejected;
mod reliability;
mod route_rules;
mod routes;
mod selector;
mod services;
#[cfg(test)]
mod tests;
mod too_large;

/// What is said about the cluster by flags.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The trust domain of identities made here.
    pub trust_domain: TrustDomain,
    /// Ranges that pods get addresses from; those of Node objects are added.
    pub pod_ranges: Vec<IpNet>,
    /// Ranges that Services get virtual addresses from; those of ServiceCIDR objects are added.
    pub service_ranges: Vec<IpNet>,
    /// What holds for a port that no Server selects, unless namespace or pod say otherwise.
    pub default_policy: AccessPolicy,
    /// Use tunnels within a node too.
    pub force_tunnels: bool,
    /// Take a Service's endpoints from EndpointSlices only. Else, of a Service that has none, from the pods that it
    /// selects: where nobody writes slices.
    pub slices_only: bool,
    /// The namespace whose EgressNetworks hold for all namespaces that have none of their own.
    pub egress_namespace: Name,
}

/// The index: all objects, what was made of them, and what is to be made anew.
#[derive(Debug)]
pub struct Index {
    settings: Settings,
    views: Arc<Views>,
    problems: Problems,
    statuses: Statuses,
    origins: HashMap<ObjectKey, Origin>,
    namespaces: HashMap<Name, NamespaceRecord>,
    nodes: HashMap<Name, NodeRecord>,
    pods: HashMap<ObjectName, PodRecord>,
    pods_in: Members,
    /// Pods that opt in themselves, by namespace.
    opted_in: Counts<Name>,
    services: HashMap<ObjectName, ServiceRecord>,
    services_in: Members,
    slices: HashMap<ObjectName, SliceRecord>,
    slices_of: HashMap<ObjectName, BTreeSet<ObjectName>>,
    /// By pod: the slices that say to have an address of it.
    slices_naming: HashMap<ObjectName, BTreeSet<ObjectName>>,
    ranges: Ranges,
    policies: Policies,
    network_policies: NetworkPolicies,
    cni_policies: CniPolicies,
    routes: Routes,
    profiles: Profiles,
    pod_addresses: Claims,
    /// Of static pods, with their nodes.
    static_uids: Claims<(Name, String)>,
    service_addresses: Claims,
    published: Published,
    dirty: Dirty,
    changes: Changes,
}

/// Names by namespace.
type Members = HashMap<Name, BTreeSet<ObjectName>>;

/// The policy objects.
#[derive(Debug, Default)]
struct Policies {
    servers: HashMap<ServerName, ServerRecord>,
    servers_in: HashMap<Name, BTreeSet<ServerName>>,
    authorizations: HashMap<AuthorizationName, AuthorizationRecord>,
    authorizations_in: HashMap<Name, BTreeSet<AuthorizationName>>,
    mesh_tls: HashMap<(PolicyGroup, ObjectName), Vec<IdentityMatch>>,
    networks: HashMap<(PolicyGroup, ObjectName), Vec<NetworkMatch>>,
    limits: Limits,
    egress: HashMap<EgressName, EgressRecord>,
}

/// What was made of objects, to see what is to be taken back.
#[derive(Debug, Default)]
struct Published {
    pods: HashMap<ObjectName, publish_pods::PublishedPod>,
    /// Endpoints made of pods; host-network pods of one node may share an address.
    derived: HashMap<EndpointName, BTreeMap<ObjectName, Derived>>,
    /// Endpoints made of slices, by service.
    sliced: HashMap<ObjectName, BTreeSet<EndpointName>>,
    /// Number of pods that each Server governs, by node.
    server_nodes: HashMap<ServerName, BTreeMap<Name, usize>>,
    /// Ports that a Server would govern if another did not, by pod.
    overlaps: BTreeMap<ServerName, BTreeMap<(ObjectName, u16), ServerName>>,
    /// Tables of routes, by Service.
    tables: HashMap<ObjectName, publish_routes::PublishedTables>,
    /// EgressNetworks.
    egress: HashMap<EgressName, PublishedEgress>,
    /// What agents are not told as it is too large.
    too_large: TooLarge,
    /// What agents reject.
    rejected: Rejected,
}

/// What is to be made anew.
#[derive(Debug, Default)]
struct Dirty {
    pods: BTreeSet<ObjectName>,
    services: BTreeSet<ObjectName>,
    servers: BTreeSet<ServerName>,
    authorizations: BTreeSet<AuthorizationName>,
    overlaps: BTreeSet<ServerName>,
    limits: BTreeSet<AuthorizationName>,
    /// Services whose routes changed.
    tables: BTreeSet<ObjectName>,
    egress: BTreeSet<EgressName>,
    routes: BTreeSet<RouteName>,
    /// Policies of CNIs of which something else is to be said.
    cni: BTreeSet<ObjectKey>,
    cluster: bool,
}

impl Index {
    /// An index without objects.
    pub fn new(settings: Settings, views: Arc<Views>, problems: Problems) -> Self {
        let dirty = Dirty {
            cluster: true,
            ..Dirty::default()
        };
        Self {
            ranges: Ranges::new(&settings.pod_ranges, &settings.service_ranges),
            settings,
            views,
            problems,
            statuses: Statuses::default(),
            origins: HashMap::new(),
            namespaces: HashMap::new(),
            nodes: HashMap::new(),
            pods: HashMap::new(),
            pods_in: Members::new(),
            opted_in: Counts::default(),
            services: HashMap::new(),
            services_in: Members::new(),
            slices: HashMap::new(),
            slices_of: HashMap::new(),
            slices_naming: HashMap::new(),
            policies: Policies::default(),
            network_policies: NetworkPolicies::default(),
            cni_policies: CniPolicies::default(),
            routes: Routes::default(),
            profiles: Profiles::default(),
            pod_addresses: Claims::default(),
            static_uids: Claims::default(),
            service_addresses: Claims::default(),
            published: Published::default(),
            dirty,
            changes: Changes::new(),
        }
    }

    /// What is to be said on objects, kept up to date.
    pub fn statuses(&self) -> Statuses {
        self.statuses.clone()
    }

    /// Takes in changed objects, and publishes what follows from them, as one.
    pub fn apply(&mut self, batch: Batch) {
        self.statuses.unsettled();
        for event in batch.events {
            self.take(event);
        }
        self.publish();
        self.statuses.settled();
    }

    /// What of an object counts as not written, without anything that it refers to. For an index of nothing else, which
    /// is of no further use.
    ///
    /// # Errors
    /// What is wrong with it, if it cannot be used.
    pub fn judge(mut self, key: &ObjectKey, object: &Object) -> Result<Vec<Fault>, Fault> {
        self.upsert(key, object)
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Upsert {
                key,
                object,
                origin,
            } => {
                self.origins.insert(key.clone(), origin);
                let metadata = object.metadata();
                let version = Version {
                    uid: metadata.uid.clone(),
                    generation: metadata.generation,
                };
                self.statuses.seen(&key, version);
                match self.upsert(&key, &object) {
                    Ok(ignored) => {
                        self.report(&key, Facet::Content, vec![], "");
                        self.report(
                            &key,
                            Facet::Part,
                            ignored,
                            "it counts as not written; where that could open something, it denies",
                        );
                    }
                    Err(fault) => self.refuse(&key, fault, &document(&object)),
                }
            }
            Event::Invalid {
                key,
                fault,
                document,
                origin,
            } => {
                self.origins.insert(key.clone(), origin);
                self.statuses.seen(&key, Version::of(&document));
                self.refuse(&key, fault, &document);
            }
            Event::Delete { key } => {
                self.delete(&key);
                self.origins.remove(&key);
                for facet in [
                    Facet::Content,
                    Facet::Part,
                    Facet::Reference,
                    Facet::Conflict,
                    Facet::Idle,
                    Facet::Size,
                ] {
                    self.report(&key, facet, vec![], "");
                }
                self.statuses.gone(&key);
            }
        }
    }

    fn upsert(&mut self, key: &ObjectKey, object: &Object) -> Result<Vec<Fault>, Fault> {
        match object {
            Object::Namespace(namespace) => {
                let before = self.namespaces.get(&key.name);
                let (record, faults) = NamespaceRecord::check(&namespace.metadata, before);
                self.set_namespace(&key.name, Some(record));
                Ok(faults)
            }
            Object::Node(node) => {
                let record = NodeRecord {
                    ranges: ranges::node_ranges(node)?,
                    zone: node_zone(node),
                };
                self.set_node(&key.name, Some(record));
                Ok(vec![])
            }
            Object::ServiceCidr(cidr) => {
                let ranges = ranges::service_cidr(cidr)?;
                self.set_service_cidr(&key.name, Some(ranges));
                Ok(vec![])
            }
            Object::Pod(pod) => {
                let name = object_name(key);
                let (mut record, faults) = PodRecord::check(name.clone(), pod)?;
                if let Some(before) = self.pods.get(&name).filter(|it| it.uid == record.uid) {
                    record.complete_by(before);
                }
                self.set_pod(&name, Some(record));
                Ok(faults)
            }
            Object::Service(service) => {
                let name = object_name(key);
                let (mut record, faults) = ServiceRecord::check(name.clone(), service)?;
                if let Some(before) = self.services.get(&name) {
                    record.ports_choice.complete_by(&before.ports_choice);
                    record.accrual.complete_by(&before.accrual);
                    record.reliability.complete_by(&before.reliability);
                }
                self.set_service(&name, Some(record));
                Ok(faults)
            }
            Object::EndpointSlice(slice) => {
                let name = object_name(key);
                let record = SliceRecord::check(&name.namespace, slice)?;
                self.set_slice(&name, record);
                Ok(vec![])
            }
            Object::NetworkPolicy(policy) => {
                let record = NetworkPolicyRecord::check(policy)?;
                self.set_network_policy(&object_name(key), Some(record));
                Ok(vec![])
            }
            Object::Cni(kind, policy) => self.read_cni_policy(key, *kind, policy),
            // Identities follow from pods; a service account by itself changes nothing.
            Object::ServiceAccount(_) => Ok(vec![]),
            Object::Route(kind, route) => {
                let name = RouteName {
                    name: object_name(key),
                    kind: *kind,
                };
                let (record, faults) =
                    RouteRecord::check(name.clone(), &route.metadata, &route.spec)?;
                self.routes.refused.remove(&name);
                self.refused_changed(&name.name);
                self.set_route(&name, Some(record));
                Ok(faults)
            }
            Object::ReferenceGrant(grant) => {
                let record = GrantRecord::check(&grant.spec)?;
                self.set_grant(&object_name(key), Some(record));
                Ok(vec![])
            }
            Object::ServiceProfile(profile) => {
                let name = object_name(key);
                let (record, faults) = ProfileRecord::check(&name, &profile.spec)?;
                self.set_profile(&name, Some(record));
                Ok(faults)
            }
            policy => self.upsert_policy(key, policy),
        }
    }

    fn upsert_policy(&mut self, key: &ObjectKey, object: &Object) -> Result<Vec<Fault>, Fault> {
        let name = object_name(key);
        let trust_domain = self.settings.trust_domain.clone();
        let setting = Setting {
            namespace: &name.namespace,
            trust_domain: &trust_domain,
        };
        match object {
            Object::Server(group, server) => {
                let (group, created) = (*group, server.metadata.creation_timestamp.clone());
                let name = ServerName { group, name };
                let record = ServerRecord::check(name.clone(), created, &server.spec)?;
                self.set_server(&name, Some(record));
                Ok(vec![])
            }
            Object::AuthorizationPolicy(group, policy) => {
                let id = AuthorizationName {
                    group: *group,
                    name: name.clone(),
                };
                let record = AuthorizationRecord::check(id.clone(), &policy.spec, setting)?;
                let faults = record.faults();
                self.set_authorization(&id, Some(record));
                Ok(faults)
            }
            Object::MeshTlsAuthentication(group, authentication) => {
                let matches = policies::check_mesh_tls(&authentication.spec, setting)?;
                self.policies
                    .mesh_tls
                    .insert((*group, name.clone()), matches);
                self.authentication_changed(&name);
                Ok(vec![])
            }
            Object::NetworkAuthentication(group, authentication) => {
                let networks = policies::check_networks(&authentication.spec.networks)?;
                self.policies
                    .networks
                    .insert((*group, name.clone()), networks);
                self.authentication_changed(&name);
                Ok(vec![])
            }
            Object::HttpLocalRateLimitPolicy(group, policy) => {
                let id = AuthorizationName {
                    group: *group,
                    name: name.clone(),
                };
                let created = policy.metadata.creation_timestamp.clone();
                let record = LimitRecord::check(id.clone(), created, &policy.spec, setting)?;
                self.set_limit(&id, Some(record));
                Ok(vec![])
            }
            Object::EgressNetwork(group, network) => {
                let id = EgressName {
                    name: name.clone(),
                    group: *group,
                };
                let created = network.metadata.creation_timestamp.clone();
                let global = &self.settings.egress_namespace;
                let record = EgressRecord::check(id.clone(), created, &network.spec, global)?;
                self.set_egress(&id, Some(record));
                Ok(vec![])
            }
            // All others are handled by the caller.
            _ => Ok(vec![]),
        }
    }

    fn delete(&mut self, key: &ObjectKey) {
        match key.kind {
            ObjectKind::Namespace => self.set_namespace(&key.name, None),
            ObjectKind::Node => self.set_node(&key.name, None),
            ObjectKind::ServiceCidr => self.set_service_cidr(&key.name, None),
            ObjectKind::Pod => self.set_pod(&object_name(key), None),
            ObjectKind::Service => self.set_service(&object_name(key), None),
            ObjectKind::EndpointSlice => self.set_slice(&object_name(key), None),
            ObjectKind::ServiceAccount => {}
            ObjectKind::NetworkPolicy => self.set_network_policy(&object_name(key), None),
            ObjectKind::Server(group) => {
                let name = object_name(key);
                self.set_server(&ServerName { group, name }, None);
            }
            ObjectKind::AuthorizationPolicy(group) => {
                let name = object_name(key);
                self.set_authorization(&AuthorizationName { group, name }, None);
            }
            ObjectKind::HttpLocalRateLimitPolicy(group) => {
                let name = object_name(key);
                self.set_limit(&AuthorizationName { group, name }, None);
            }
            ObjectKind::EgressNetwork(group) => {
                let name = object_name(key);
                self.set_egress(&EgressName { name, group }, None);
            }
            ObjectKind::MeshTlsAuthentication(group) => {
                let name = object_name(key);
                self.policies.mesh_tls.remove(&(group, name.clone()));
                self.authentication_changed(&name);
            }
            ObjectKind::NetworkAuthentication(group) => {
                let name = object_name(key);
                self.policies.networks.remove(&(group, name.clone()));
                self.authentication_changed(&name);
            }
            ObjectKind::Route(kind) => {
                let name = object_name(key);
                let name = RouteName { name, kind };
                self.routes.refused.remove(&name);
                self.refused_changed(&name.name);
                self.set_route(&name, None);
            }
            ObjectKind::ReferenceGrant => self.set_grant(&object_name(key), None),
            ObjectKind::ServiceProfile => self.set_profile(&object_name(key), None),
            ObjectKind::Cni(_) => self.delete_cni_policy(key),
        }
    }

    /// An object exists and cannot be used: what was in force stays. Of what never was, as after a
    /// restart, that holds which closes: a Server and an EgressNetwork close what they may have meant, a
    /// namespace and a pod stay in the mesh.
    fn refuse(&mut self, key: &ObjectKey, fault: Fault, document: &Value) {
        let mut effect = if self.holds(key) {
            "what was in force before stays"
        } else {
            "it is ignored"
        };
        if let ObjectKind::Server(group) = key.kind {
            let name = ServerName {
                group,
                name: object_name(key),
            };
            let readable = self.policies.servers.get(&name);
            if readable.is_none_or(|it| it.closed) {
                effect = "it lets nobody in, at all ports that it may mean";
                let spec = document.get("spec").unwrap_or(&Value::Null);
                let record = ServerRecord::closed(name.clone(), None, spec);
                self.set_server(&name, Some(record));
            }
        }
        if let ObjectKind::EgressNetwork(group) = key.kind {
            let name = object_name(key);
            let name = EgressName { name, group };
            let readable = self.policies.egress.get(&name);
            if readable.is_none_or(|it| it.closed) {
                effect = "nothing leaves the cluster for the addresses that it may mean";
                let spec = document.get("spec").unwrap_or(&Value::Null);
                let global = &self.settings.egress_namespace;
                let created = document.pointer("/metadata/creationTimestamp");
                let created = created.and_then(|it| Created::deserialize(it).ok());
                let record = EgressRecord::closed(name.clone(), created, spec, global);
                self.set_egress(&name, Some(record));
            }
        }
        if let ObjectKind::Cni(_) = key.kind {
            effect = self.refuse_cni_policy(key);
        }
        if key.kind == ObjectKind::NetworkPolicy {
            let name = object_name(key);
            let readable = self.network_policies.get(&name);
            if readable.is_none_or(|it| it.closed) {
                effect = "it lets nobody through, at all pods that it may mean";
                let spec = document.get("spec").unwrap_or(&Value::Null);
                let record = NetworkPolicyRecord::closed(spec);
                self.set_network_policy(&name, Some(record));
            }
        }
        if let ObjectKind::Route(kind) = key.kind {
            let name = object_name(key);
            let name = RouteName { name, kind };
            let generation = document.pointer("/metadata/generation");
            let servers = publish_inbound::meant_servers(document);
            if !self.holds(key) && !servers.is_empty() {
                effect = "its Servers let in only what their own policies do, to other routes";
            }
            let refused = Refused {
                fault: fault.clone(),
                generation: generation.and_then(Value::as_i64),
                servers,
            };
            self.routes.refused.insert(name.clone(), refused);
            self.refused_changed(&name.name);
            self.dirty.routes.insert(name);
        }
        if key.kind == ObjectKind::Namespace && !self.holds(key) {
            effect = "what can be read of it holds; what cannot closes";
            let metadata = pods::readable_metadata(document);
            let (record, _) = NamespaceRecord::check(&metadata, None);
            self.set_namespace(&key.name, Some(record));
        }
        if key.kind == ObjectKind::Pod {
            let name = object_name(key);
            let readable = PodRecord::readable(name.clone(), document);
            let before = self.pods.get(&name);
            // Another pod of the same name is not described by what was in force.
            if let Some(record) =
                readable.filter(|it| before.is_none_or(|before| before.uid != it.uid))
            {
                effect = "what can be read of it holds; ports without a Server let nobody in";
                self.set_pod(&name, Some(record));
            }
        }
        self.report(key, Facet::Content, vec![fault], effect);
    }

    fn holds(&self, key: &ObjectKey) -> bool {
        match key.kind {
            ObjectKind::Namespace => self.namespaces.contains_key(&key.name),
            ObjectKind::Node => self.nodes.contains_key(&key.name),
            ObjectKind::ServiceCidr => self.ranges.has_service_cidr(&key.name),
            ObjectKind::Pod => self.pods.contains_key(&object_name(key)),
            ObjectKind::Service => self.services.contains_key(&object_name(key)),
            ObjectKind::EndpointSlice => self.slices.contains_key(&object_name(key)),
            ObjectKind::ServiceAccount => false,
            ObjectKind::NetworkPolicy => {
                let known = self.network_policies.get(&object_name(key));
                known.is_some()
            }
            ObjectKind::Server(group) => {
                let name = object_name(key);
                let servers = &self.policies.servers;
                servers.contains_key(&ServerName { group, name })
            }
            ObjectKind::AuthorizationPolicy(group) => {
                let name = object_name(key);
                let authorizations = &self.policies.authorizations;
                authorizations.contains_key(&AuthorizationName { group, name })
            }
            ObjectKind::HttpLocalRateLimitPolicy(group) => {
                let name = object_name(key);
                let limits = &self.policies.limits;
                limits.contains_key(&AuthorizationName { group, name })
            }
            ObjectKind::EgressNetwork(group) => {
                let name = object_name(key);
                self.policies
                    .egress
                    .contains_key(&EgressName { name, group })
            }
            ObjectKind::MeshTlsAuthentication(group) => {
                let name = (group, object_name(key));
                self.policies.mesh_tls.contains_key(&name)
            }
            ObjectKind::NetworkAuthentication(group) => {
                let name = (group, object_name(key));
                self.policies.networks.contains_key(&name)
            }
            ObjectKind::Route(kind) => {
                let name = object_name(key);
                self.routes.records.contains_key(&RouteName { name, kind })
            }
            ObjectKind::ReferenceGrant => {
                let name = object_name(key);
                let grants = self.routes.grants.get(&name.namespace);
                grants.is_some_and(|it| it.contains_key(&name.name))
            }
            ObjectKind::ServiceProfile => self.profiles.records.contains_key(&object_name(key)),
            ObjectKind::Cni(_) => self.cni_policies.get(key).is_some(),
        }
    }

    /// Makes anew what is dirty, and publishes it as one.
    fn publish(&mut self) {
        for pod in std::mem::take(&mut self.dirty.pods) {
            self.publish_pod(&pod);
        }
        for service in std::mem::take(&mut self.dirty.services) {
            self.publish_service(&service);
        }
        // After services, of which some await pods.
        if std::mem::take(&mut self.dirty.cluster) {
            self.publish_cluster();
        }
        for authorization in std::mem::take(&mut self.dirty.authorizations) {
            self.report_references(&authorization);
        }
        for limit in std::mem::take(&mut self.dirty.limits) {
            self.report_limit(&limit);
        }
        for service in std::mem::take(&mut self.dirty.tables) {
            self.publish_tables(&service);
        }
        for network in std::mem::take(&mut self.dirty.egress) {
            self.publish_egress(&network);
        }
        // After tables and networks, which say which routes are in force.
        for route in std::mem::take(&mut self.dirty.routes) {
            self.report_route(&route);
        }
        // Last: publishing pods tells which nodes need which Servers.
        for server in std::mem::take(&mut self.dirty.servers) {
            self.publish_server(&server);
        }
        for server in std::mem::take(&mut self.dirty.overlaps) {
            self.report_overlaps(&server);
        }
        self.report_cni_policies();
        let changes = std::mem::take(&mut self.changes);
        let published = &self.published;
        let told: Vec<Key> = match published.too_large.is_empty() && published.rejected.is_empty() {
            true => vec![],
            false => changes.keys().map(|(_, key)| key.clone()).collect(),
        };
        let too_large = self.views.apply(changes);
        self.rejected_were_told(&told);
        self.were_told(told);
        for (_, key) in too_large {
            self.too_large(key);
        }
        self.say_too_large();
    }

    fn set_namespace(&mut self, name: &Name, record: Option<NamespaceRecord>) {
        let before = match record.clone() {
            Some(record) => self.namespaces.insert(name.clone(), record),
            None => self.namespaces.remove(name),
        };
        let (before, now) = (before.unwrap_or_default(), record.unwrap_or_default());
        if before != now {
            let pods = self.pods_in.get(name).into_iter().flatten().cloned();
            self.dirty.pods.extend(pods);
        }
        if before.mesh != now.mesh {
            self.tell_namespace(name);
        }
        if before.labels != now.labels {
            self.network_namespace_changed();
        }
        if before.ports != now.ports {
            let services = self.services_in.get(name).into_iter().flatten().cloned();
            self.dirty.services.extend(services);
        }
    }

    fn put(&mut self, audience: Audience, resource: Resource) {
        let key = resource.key();
        self.changes.insert((audience, key), Some(resource));
    }

    fn report(&self, key: &ObjectKey, facet: Facet, faults: Vec<Fault>, effect: &str) {
        self.statuses.faults(key, facet, &faults, effect);
        let origin = self.origins.get(key);
        let problems = faults
            .into_iter()
            .map(|fault| Problem::of(key, origin, fault, effect))
            .collect();
        let scope = Scope::Object(key.clone(), facet);
        self.problems.replace(scope, problems);
    }
}

fn node_zone(node: &k8s_openapi::api::core::v1::Node) -> Option<String> {
    let labels = node.metadata.labels.as_ref()?;
    let zone = labels.get("topology.kubernetes.io/zone")?;
    Some(zone.clone()).filter(|it| !it.is_empty())
}

/// The name of an object of a kind that has a namespace.
fn object_name(key: &ObjectKey) -> ObjectName {
    ObjectName {
        // Decoding gives every namespaced kind a namespace; for others this is not called.
        namespace: key.namespace.clone().unwrap_or_else(|| key.name.clone()),
        name: key.name.clone(),
    }
}

/// An object as a document, of the kinds of which [`Index::refuse`] uses parts.
fn document(object: &Object) -> Value {
    let written = match object {
        Object::Server(_, server) => serde_json::to_value(server),
        Object::EgressNetwork(_, network) => serde_json::to_value(network),
        Object::Pod(pod) => serde_json::to_value(pod),
        Object::NetworkPolicy(policy) => serde_json::to_value(policy),
        Object::Route(_, route) => Ok(json!({
            "metadata": {"generation": route.metadata.generation},
            "spec": {"parentRefs": route.spec.parent_refs()},
        })),
        _ => return Value::Null,
    };
    written.unwrap_or_default()
}

/// An object with more addresses than this is a mistake, or an attack on everybody who must know
/// them: each family has one, and a few more where networks are attached.
const MAX_ADDRESSES: usize = 16;

/// Refuses more addresses than an object can sensibly have.
fn few(field: &str, count: usize) -> Result<(), Fault> {
    if count <= MAX_ADDRESSES {
        return Ok(());
    }
    let reason = format!("{count} addresses, more than {MAX_ADDRESSES}");
    Err(Fault::new(field, reason))
}

/// Reads an address that may be a workload's or a service's. Loopback and the like would redirect
/// what is not the mesh's.
fn address(field: &str, text: &str) -> Result<IpAddr, Fault> {
    let refuse = |reason: &str| {
        let shown: String = text.chars().take(64).collect();
        Err(Fault::new(field, format!("{shown:?} {reason}")))
    };
    let Ok(address) = text.parse::<IpAddr>() else {
        return refuse("is no IP address");
    };
    let address = address.to_canonical();
    let link_local = match address {
        IpAddr::V4(v4) => v4.is_link_local() || v4.is_broadcast(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    if address.is_loopback() || address.is_unspecified() || address.is_multicast() || link_local {
        return refuse(
            "can be no pod's or service's: loopback, unspecified, multicast, link-local",
        );
    }
    Ok(address)
}
