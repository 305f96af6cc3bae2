//! What agents would be told of these manifests.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;
use weft_controller::index::{Index, Settings};
use weft_controller::problems::{Problem, Problems};
use weft_controller::views::Views;
use weft_core::{
    ClusterSettings, Endpoint, Identity, NodePod, ObjectName, PortProtocol, Server, ServerName,
    Service, TrustDomain, Workload, WorkloadId, WorkloadPolicy,
};
use weft_proto::Resource;

use super::PolicyTest;
use super::addresses::Place;
use super::manifests::{Manifests, NODE, POD_RANGE};
use super::who::{Target, TargetKind, WhoError};

/// The state of the agent that has all pods on its node.
#[derive(Debug)]
pub(super) struct World {
    cluster: ClusterSettings,
    /// Whether it is known which networks are the cluster's.
    has_ranges: bool,
    pub(super) trust_domain: TrustDomain,
    workloads: HashMap<WorkloadId, Arc<Workload>>,
    by_address: HashMap<IpAddr, Arc<Workload>>,
    made_up: HashSet<WorkloadId>,
    node_pods: HashMap<WorkloadId, NodePod>,
    policies: HashMap<WorkloadId, WorkloadPolicy>,
    servers: HashMap<ServerName, Server>,
    services: HashMap<ObjectName, Service>,
    endpoints: Vec<Endpoint>,
    pods_of: HashMap<(TargetKind, ObjectName), Vec<WorkloadId>>,
    ports: HashMap<WorkloadId, Vec<(String, u16)>>,
    problems: Vec<Problem>,
}

/// A pod and its port that a connection would go to.
#[derive(Clone, Debug)]
pub(super) struct Destination {
    pub(super) workload: Arc<Workload>,
    pub(super) port: u16,
    /// Whether the Service by which it is connected to says that its port is not to be looked into.
    is_opaque: bool,
}

impl World {
    /// What follows from manifests.
    pub(super) fn new(manifests: Manifests, test: &PolicyTest) -> Self {
        let made_up: Option<IpNet> = POD_RANGE.parse().ok();
        let settings = Settings {
            trust_domain: test.trust_domain.clone(),
            pod_ranges: test.pod_ranges.iter().copied().chain(made_up).collect(),
            default_policy: test.default_policy,
            ..Settings::default()
        };
        let mut world = Self::empty(&settings, manifests.pods_of, manifests.ports);
        world.made_up = manifests.made_up;
        world.has_ranges = !test.pod_ranges.is_empty();
        let (views, problems) = (Arc::new(Views::default()), Problems::default());
        let mut index = Index::new(settings, views.clone(), problems.clone());
        index.apply(manifests.events.into());
        let told = views.beyond(&NODE.parse().expect("a name"), HashMap::new());
        for told in &told.changed {
            // What the index makes is what agents accept.
            let resource = told
                .message()
                .ok()
                .and_then(|it| Resource::try_from(it).ok());
            if let Some(resource) = resource {
                world.take(resource);
            }
        }
        let ranges = &mut world.cluster.pod_ranges;
        ranges.retain(|it| !made_up.is_some_and(|range| range.contains(it)));
        world.problems = manifests.problems;
        // What is wrong with flags of a controller is not about manifests: it has none here.
        let of_objects = |it: &Problem| it.object.is_some();
        world
            .problems
            .extend(problems.list().into_iter().filter(of_objects));
        world
    }

    fn empty(
        settings: &Settings,
        pods_of: HashMap<(TargetKind, ObjectName), Vec<WorkloadId>>,
        ports: HashMap<WorkloadId, Vec<(String, u16)>>,
    ) -> Self {
        Self {
            cluster: ClusterSettings {
                trust_domain: settings.trust_domain.clone(),
                pod_ranges: settings.pod_ranges.clone(),
                service_ranges: vec![],
                force_tunnels: false,
            },
            trust_domain: settings.trust_domain.clone(),
            workloads: HashMap::new(),
            has_ranges: false,
            by_address: HashMap::new(),
            made_up: HashSet::new(),
            node_pods: HashMap::new(),
            policies: HashMap::new(),
            servers: HashMap::new(),
            services: HashMap::new(),
            endpoints: vec![],
            pods_of,
            ports,
            problems: vec![],
        }
    }

    fn take(&mut self, resource: Resource) {
        match resource {
            Resource::Cluster(cluster) => self.cluster = cluster,
            Resource::Workload(workload) => {
                let workload = Arc::new(workload);
                for address in &workload.addresses {
                    self.by_address.insert(*address, workload.clone());
                }
                self.workloads.insert(workload.id.clone(), workload);
            }
            Resource::WorkloadPolicy(policy) => {
                self.policies.insert(policy.workload.clone(), policy);
            }
            Resource::Server(server) => {
                self.servers.insert(server.name.clone(), server);
            }
            Resource::Service(service) => {
                self.services.insert(service.name.clone(), service);
            }
            Resource::Endpoint(endpoint) => self.endpoints.push(endpoint),
            Resource::NodePod(pod) => {
                self.node_pods.insert(pod.id.clone(), pod);
            }
            Resource::TrustBundle(_)
            | Resource::RouteTable(_)
            | Resource::EgressNetwork(_)
            | Resource::MeshNamespace(_) => {}
        }
    }

    pub(super) fn problems(&self) -> Vec<Problem> {
        self.problems.clone()
    }

    pub(super) fn policy(&self, of: &WorkloadId) -> Option<&WorkloadPolicy> {
        self.policies.get(of)
    }

    pub(super) fn server(&self, name: &ServerName) -> Option<&Server> {
        self.servers.get(name)
    }

    /// The pod whose address this is, as manifests say.
    pub(super) fn workload_at(&self, address: IpAddr) -> Option<Arc<Workload>> {
        let workload = self.by_address.get(&address)?;
        (!self.made_up.contains(&workload.id)).then(|| workload.clone())
    }

    /// Where a pod's address is.
    pub(super) fn place(&self, of: &Workload) -> Place {
        match of.addresses.first() {
            Some(address) if !self.made_up.contains(&of.id) => Place::Known(*address),
            _ if self.has_ranges => Place::Within(self.cluster.pod_ranges.clone()),
            _ => Place::Anywhere,
        }
    }

    /// The cluster's networks: where nobody says, at least and at most.
    pub(super) fn clusters(&self) -> Vec<ClusterSettings> {
        let mut all = vec![self.cluster.clone()];
        if !self.has_ranges {
            let everything = ["0.0.0.0/0", "::/0"].into_iter();
            all.push(ClusterSettings {
                pod_ranges: everything.filter_map(|it| it.parse().ok()).collect(),
                ..self.cluster.clone()
            });
        }
        all
    }

    /// What a port speaks, as far as somebody said, in the order in which agents believe it; `is_meshed` is whether the
    /// client is, whose agent says if it has not looked into a connection.
    pub(super) fn protocol(&self, to: &Destination, is_meshed: bool) -> PortProtocol {
        let policy = self.policy(&to.workload.id);
        let binding = policy.and_then(|it| it.servers.iter().find(|it| it.port == to.port));
        let server = binding.and_then(|it| self.server(&it.server));
        let declared = server.and_then(|it| PortProtocol::from_server(it.proxy_protocol));
        let declared = declared.unwrap_or_else(|| match self.node_pods.get(&to.workload.id) {
            Some(pod) => pod.opaque_ports.protocol_of(to.port),
            None => PortProtocol::by_default(to.port),
        });
        match declared {
            PortProtocol::Detect if is_meshed && to.is_opaque => PortProtocol::Opaque,
            declared => declared,
        }
    }

    /// One of the pods of a workload: all are alike to policy.
    pub(super) fn client(&self, target: &Target) -> Result<Arc<Workload>, WhoError> {
        let pods = self.pods(target)?;
        // As everywhere: what is not there is not known.
        pods.first()
            .cloned()
            .ok_or_else(|| WhoError::Unknown(target.to_string()))
    }

    fn pods(&self, target: &Target) -> Result<Vec<Arc<Workload>>, WhoError> {
        let ids = self.pods_of.get(&(target.kind, target.name.clone()));
        let ids = ids.ok_or_else(|| WhoError::Unknown(target.to_string()))?;
        let workloads = ids.iter().filter_map(|it| self.workloads.get(it).cloned());
        Ok(workloads.collect())
    }

    /// Where a connection to a workload or Service may go.
    pub(super) fn destinations(
        &self,
        target: &Target,
        port: &str,
    ) -> Result<Vec<Destination>, WhoError> {
        if target.kind == TargetKind::Service {
            return self.behind(target, port);
        }
        let of_pod = |workload: Arc<Workload>| {
            let named = self.ports.get(&workload.id);
            let named = named.map(Vec::as_slice).unwrap_or_default();
            let number = port.parse().ok().filter(|it| *it != 0);
            let by_name = || named.iter().find(|(name, _)| name == port);
            let number = number.or_else(|| by_name().map(|(_, number)| *number));
            let names = named.iter().map(|(name, _)| name.clone()).collect();
            match number {
                Some(port) => Ok(Destination {
                    workload,
                    port,
                    is_opaque: false,
                }),
                None => Err(no_port(target, port, names)),
            }
        };
        self.pods(target)?.into_iter().map(of_pod).collect()
    }

    fn behind(&self, target: &Target, port: &str) -> Result<Vec<Destination>, WhoError> {
        let service = self.services.get(&target.name);
        let service = service.ok_or_else(|| WhoError::Unknown(target.to_string()))?;
        let is_meant = |it: &&weft_core::ServicePort| {
            it.number.to_string() == port || it.name.as_ref().is_some_and(|it| it.as_str() == port)
        };
        let Some(port) = service.ports.iter().find(is_meant) else {
            let numbers = service.ports.iter().map(|it| it.number.to_string());
            return Err(no_port(target, port, numbers.collect()));
        };
        let endpoints = self.endpoints.iter();
        let endpoints = endpoints.filter(|it| it.name.service == service.name);
        let destinations = endpoints.filter_map(|endpoint| {
            let mut ports = endpoint.ports.iter();
            let to = ports.find(|it| it.service_port == port.number)?;
            let to = SocketAddr::new(endpoint.name.address, to.target_port);
            let workload = self.by_address.get(&to.ip())?.clone();
            // Of pods in other namespaces a Service is not believed.
            let is_own = workload.id.0.namespace == service.name.namespace;
            Some(Destination {
                workload,
                port: to.port(),
                is_opaque: is_own && port.protocol.is_opaque(),
            })
        });
        let mut destinations: Vec<_> = destinations.collect();
        if destinations.is_empty() {
            return Err(WhoError::NoEndpoint(target.to_string()));
        }
        destinations.sort_by(|one, other| one.workload.id.cmp(&other.workload.id));
        Ok(destinations)
    }

    /// Whether an identity is one of a pod of the manifests.
    pub(super) fn has_identity(&self, identity: &Identity) -> bool {
        let mut workloads = self.workloads.values();
        workloads.any(|it| it.identity() == Some(identity))
    }
}

fn no_port(target: &Target, port: &str, has: Vec<String>) -> WhoError {
    let has = match has.is_empty() {
        true => String::new(),
        false => format!(": it has {}", has.join(", ")),
    };
    WhoError::Port {
        of: target.to_string(),
        port: port.to_owned(),
        has,
    }
}
