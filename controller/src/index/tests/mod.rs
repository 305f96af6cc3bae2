//! Tables of objects and of what agents are told because of them.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use futures::FutureExt;
use serde_json::Value;
use weft_core::{ClusterSettings, Mesh, NodePod, Server, Workload, WorkloadPolicy};
use weft_proto::{Key, Kind};

use super::*;
use crate::objects::decode;
use crate::statuses::{Condition, Content};
use crate::views::Told;

mod cni;
mod egress;
mod idle;
mod inbound;
mod incremental;
mod invalid;
mod limits;
mod members;
mod network;
mod network_egress;
mod policies;
mod profiles;
mod programmed;
mod ranges;
mod rejected;
mod reliability;
mod routes;
mod services;
mod slices;
mod topology;
mod workloads;

/// An index, fed with manifests.
pub(super) struct Cluster {
    index: Index,
    views: Arc<Views>,
    problems: Problems,
}

impl Cluster {
    pub(super) fn new() -> Self {
        let settings = Settings {
            pod_ranges: vec!["10.1.0.0/16".parse().expect("valid")],
            service_ranges: ["10.2.0.0/16", "fd02::/112"]
                .map(|it| it.parse().expect("valid"))
                .into(),
            ..Settings::default()
        };
        let (views, problems) = (Arc::new(Views::default()), Problems::default());
        let mut index = Index::new(settings, views.clone(), problems.clone());
        index.apply(Batch::default());
        Self {
            index,
            views,
            problems,
        }
    }

    pub(super) fn of(manifests: &str) -> Self {
        let mut cluster = Self::new();
        cluster.apply(manifests);
        cluster
    }

    /// Takes in manifests as one batch.
    pub(super) fn apply(&mut self, manifests: &str) {
        let documents = decode::documents(manifests).expect("YAML");
        let events: Vec<_> = documents.into_iter().map(event).collect();
        self.index.apply(events.into());
    }

    pub(super) fn delete(&mut self, manifests: &str) {
        let documents = decode::documents(manifests).expect("YAML");
        let key = |it: &Value| decode::identify(it).expect("valid").expect("ours");
        let events = documents.iter().map(|it| Event::Delete { key: key(it) });
        let events: Vec<_> = events.collect();
        self.index.apply(events.into());
    }

    /// Everything that the agent of a node is told.
    pub(super) fn told(&self, node: &str) -> BTreeMap<Key, Resource> {
        let node = node.parse().expect("valid");
        let difference = self.views.beyond(&node, HashMap::new());
        let resource = |it: &Arc<Told>| {
            let resource = it.message().expect("encoded");
            let resource = Resource::try_from(resource).expect("agents accept it");
            (resource.key(), resource)
        };
        difference.changed.iter().map(resource).collect()
    }

    pub(super) fn names(&self, node: &str, kind: Kind) -> Vec<String> {
        let told = self.told(node).into_keys();
        told.filter(|it| it.kind == kind)
            .map(|it| it.name)
            .collect()
    }

    fn resource(&self, kind: Kind, name: &str) -> Option<Resource> {
        let name = name.to_owned();
        self.told("one").remove(&Key { kind, name })
    }

    pub(super) fn workload(&self, name: &str) -> Option<Workload> {
        match self.resource(Kind::Workload, name)? {
            Resource::Workload(it) => Some(it),
            other => panic!("{other:?}"),
        }
    }

    pub(super) fn is_meshed(&self, name: &str) -> bool {
        let workload = self.workload(name).expect("a workload");
        matches!(workload.mesh, Mesh::Meshed { .. })
    }

    pub(super) fn node_pod(&self, name: &str) -> Option<NodePod> {
        match self.resource(Kind::NodePod, name)? {
            Resource::NodePod(it) => Some(it),
            other => panic!("{other:?}"),
        }
    }

    pub(super) fn policy(&self, name: &str) -> WorkloadPolicy {
        match self.resource(Kind::WorkloadPolicy, name) {
            Some(Resource::WorkloadPolicy(it)) => it,
            other => panic!("{other:?}"),
        }
    }

    pub(super) fn server(&self, name: &str) -> Option<Server> {
        match self.resource(Kind::Server, name)? {
            Resource::Server(it) => Some(it),
            other => panic!("{other:?}"),
        }
    }

    /// What agents are told of the cluster.
    pub(super) fn settings(&self) -> ClusterSettings {
        match self.resource(Kind::Cluster, "cluster") {
            Some(Resource::Cluster(it)) => it,
            other => panic!("{other:?}"),
        }
    }

    /// Whether agents refuse an address as long as no workload has it.
    pub(super) fn must_have_record(&self, address: &str) -> bool {
        self.settings().contains(address.parse().expect("valid"))
    }

    /// Endpoints as `address:service port>target port`.
    pub(super) fn endpoints(&self) -> Vec<String> {
        let mut endpoints = vec![];
        for resource in self.told("one").into_values() {
            if let Resource::Endpoint(endpoint) = resource {
                let ports = endpoint.ports.iter();
                endpoints.extend(ports.map(|port| {
                    let address = endpoint.name.address;
                    format!("{address}:{}>{}", port.service_port, port.target_port)
                }));
            }
        }
        endpoints
    }

    /// Of how many policies it is said that agents are not told of them as they are.
    pub(super) fn not_programmed(&self) -> usize {
        let statuses = self.index.statuses();
        let conditions = |key| {
            let status = statuses.of(key).now_or_never()?.status?;
            match status.content {
                Content::Conditions(conditions) => Some(conditions),
                Content::Parents(_) => None,
            }
        };
        let is_not =
            |it: &Condition| !it.status && (it.kind, it.reason) == ("Programmed", "TooLarge");
        let known = self.index.origins.keys();
        let said = known.filter_map(conditions);
        said.filter(|it| it.iter().any(is_not)).count()
    }

    /// Of each namespace with pods that are left to another mesh: how many, and some of them.
    pub(super) fn left_to_other_meshes(&self) -> Vec<(String, usize, Vec<String>)> {
        let notices = self.problems.notices().into_iter();
        notices
            .map(|it| (it.namespace, it.pods, it.examples))
            .collect()
    }

    /// Problems as `field: reason`.
    pub(super) fn problems(&self) -> Vec<String> {
        let problems = self.problems.list().into_iter();
        problems
            .map(|it| format!("{}: {}", it.field, it.reason))
            .collect()
    }
}

pub(super) fn event(document: Value) -> Event {
    let key = decode::identify(&document).expect("valid").expect("ours");
    let origin = Origin {
        place: "test".into(),
        document: None,
    };
    Event::read(key, document.into(), origin)
}
