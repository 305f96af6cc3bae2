//! From objects to the state of agents, incrementally: one changed object recomputes what depends
//! on it, and what comes out unchanged is not sent (see [`Views`]).
//!
//! The index knows no source. What cannot be used is reported, and what was in force stays; what
//! was never in force stays closed.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use ipnet::IpNet;
use weft_core::route::RouteName;
use weft_core::{
    AccessPolicy, AuthorizationName, Counts, EgressName, EndpointName, IdentityMatch, Name,
    NetworkMatch, ObjectName, PolicyGroup, ServerName, TrustDomain,
};
use weft_proto::{Key, Resource};

use crate::objects::{Fault, Object, ObjectKey};
use crate::problems::{Facet, Origin, Problem, Problems, Scope};
use crate::source::{Batch, Event};
use crate::statuses::{Statuses, Version};
use crate::views::{Audience, Changes, Views};
use claims::Claims;
use cni::CniPolicies;
use egress::{EgressRecord, PublishedEgress};
use limits::Limits;
use network::NetworkPolicies;
pub(crate) use other_mesh::AMBIENT_REDIRECTION;
use other_mesh::OfOtherMeshes;
pub use other_mesh::has_other_mesh;
pub(crate) use pods::STATIC_POD_ANNOTATIONS;
pub use pods::owners;
use pods::{NamespaceRecord, PodRecord};
use policies::{AuthorizationRecord, ServerRecord};
use profiles::Profiles;
use publish_pods::Derived;
use ranges::{NodeRecord, Ranges};
use rejected::Rejected;
use routes::Routes;
use services::{ServiceRecord, SliceRecord};
use too_large::TooLarge;

mod accrual;
mod addresses;
mod authentications;
mod claims;
mod cni;
mod egress;
mod idle;
mod limits;
mod members;
mod network;
mod other_mesh;
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
mod refuse;
mod rejected;
mod reliability;
mod route_rules;
mod routes;
mod selector;
mod services;
mod take;
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

/// The trust domain, unless a flag says another one.
pub(crate) const TRUST_DOMAIN: &str = "cluster.local";
/// The namespace whose EgressNetworks hold for others, unless a flag says another one.
pub(crate) const EGRESS_NAMESPACE: &str = "linkerd-egress";

/// What holds where no flag says anything, and Services have the pods that they select.
impl Default for Settings {
    fn default() -> Self {
        Self {
            trust_domain: TRUST_DOMAIN.parse().expect("a name"),
            pod_ranges: vec![],
            service_ranges: vec![],
            default_policy: AccessPolicy::AllUnauthenticated,
            force_tunnels: false,
            slices_only: false,
            egress_namespace: EGRESS_NAMESPACE.parse().expect("a name"),
        }
    }
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
    of_other_meshes: OfOtherMeshes,
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

/// So many changes of a state that is no agent's yet are handed over at once.
const EARLY: usize = 4096;

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
    /// The policies that name authentications, there or not, by what they name.
    naming: HashMap<ObjectName, BTreeSet<AuthorizationName>>,
    /// The policies for what is not there.
    without_target: HashSet<AuthorizationName>,
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
    /// Authentications that others use now, or nobody does.
    authentications: BTreeSet<ObjectName>,
    overlaps: BTreeSet<ServerName>,
    limits: BTreeSet<AuthorizationName>,
    /// Services whose routes changed.
    tables: BTreeSet<ObjectName>,
    egress: BTreeSet<EgressName>,
    routes: BTreeSet<RouteName>,
    /// Policies of CNIs of which something else is to be said.
    cni: BTreeSet<ObjectKey>,
    /// Namespaces of which it is to be said which pods are left to another mesh.
    left: BTreeSet<Name>,
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
            of_other_meshes: OfOtherMeshes::default(),
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
        for change in batch.changes {
            self.take(change.read());
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
                    Err(fault) => self.refuse(&key, fault, &refuse::document(&object)),
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
                    Facet::Target,
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

    /// Makes anew what is dirty, and publishes it as one.
    fn publish(&mut self) {
        for pod in std::mem::take(&mut self.dirty.pods) {
            self.publish_pod(&pod);
            self.hand_over_early();
        }
        for service in std::mem::take(&mut self.dirty.services) {
            self.publish_service(&service);
            self.hand_over_early();
        }
        // After services, of which some await pods.
        if std::mem::take(&mut self.dirty.cluster) {
            self.publish_cluster();
        }
        for authorization in std::mem::take(&mut self.dirty.authorizations) {
            self.report_references(&authorization);
        }
        for authentication in std::mem::take(&mut self.dirty.authentications) {
            self.report_authentications(&authentication);
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
        for namespace in std::mem::take(&mut self.dirty.left) {
            self.report_left(&namespace);
        }
        self.report_cni_policies();
        self.hand_over();
        self.say_too_large();
    }

    /// Hands over a part of the first state, which is no agent's before it is whole: it would take as much again as what
    /// is made of it.
    fn hand_over_early(&mut self) {
        if self.changes.len() >= EARLY && !self.views.is_complete() {
            self.hand_over();
        }
    }

    fn hand_over(&mut self) {
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

/// The name of an object of a kind that has a namespace.
fn object_name(key: &ObjectKey) -> ObjectName {
    ObjectName {
        // Decoding gives every namespaced kind a namespace; for others this is not called.
        namespace: key.namespace.clone().unwrap_or_else(|| key.name.clone()),
        name: key.name.clone(),
    }
}
