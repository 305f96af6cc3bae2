//! What agents are not told as it is too large: said of the objects that make it so.

use std::collections::{BTreeMap, BTreeSet};

use weft_core::EgressName;
use weft_proto::{Key, Kind};

use super::Index;
use crate::objects::{Fault, ObjectKey, ObjectKind};
use crate::problems::{Facet, Problem, Scope};
use crate::views::MAX_RESOURCE_BYTES;

/// All of it.
#[derive(Debug, Default)]
pub(super) struct TooLarge {
    /// With the objects that it is made of.
    resources: BTreeMap<Key, BTreeSet<ObjectKey>>,
    /// What was said of objects.
    said: BTreeMap<ObjectKey, Vec<Fault>>,
}

impl TooLarge {
    pub(super) fn is_empty(&self) -> bool {
        self.resources.is_empty()
    }
}

const EFFECT: &str = "agents keep what they had before, and refuse where they had nothing";

impl Index {
    /// Agents are not told this.
    pub(super) fn too_large(&mut self, key: Key) {
        let problem = Problem {
            file: None,
            document: None,
            object: Some(key.to_string()),
            field: String::new(),
            reason: reason(),
            effect: EFFECT.to_owned(),
        };
        self.problems
            .replace(Scope::Resource(key.clone()), vec![problem]);
        let objects = self.parts_of(&key);
        self.published.too_large.resources.insert(key, objects);
    }

    /// Agents were told these, as far as they are not among those that are too large.
    pub(super) fn were_told(&mut self, keys: Vec<Key>) {
        for key in keys {
            if self.published.too_large.resources.remove(&key).is_some() {
                self.problems.replace(Scope::Resource(key), vec![]);
            }
        }
    }

    /// Says it of the objects: no version of them is in force that is not told.
    pub(super) fn say_too_large(&mut self) {
        let TooLarge { resources, said } = &self.published.too_large;
        if resources.is_empty() && said.is_empty() {
            return;
        }
        let mut now = BTreeMap::<ObjectKey, Vec<Fault>>::new();
        for (key, objects) in resources {
            for object in objects {
                let fault = Fault::new("", format!("{key} {}", reason()));
                now.entry(object.clone()).or_default().push(fault);
            }
        }
        for object in said.keys().filter(|it| !now.contains_key(it)) {
            self.statuses.faults(object, Facet::Size, &[], "");
        }
        for (object, faults) in &now {
            self.statuses.faults(object, Facet::Size, faults, EFFECT);
        }
        self.published.too_large.said = now;
    }

    /// The objects that a resource is made of, as far as they have a status.
    pub(super) fn parts_of(&self, key: &Key) -> BTreeSet<ObjectKey> {
        match key.kind {
            Kind::Server => {
                let mut servers = self.policies.servers.values();
                let server = servers.find(|it| it.name.to_string() == key.name);
                let Some(server) = server else {
                    return BTreeSet::new();
                };
                let own = ObjectKey {
                    kind: ObjectKind::Server(server.name.group),
                    namespace: Some(server.name.name.namespace.clone()),
                    name: server.name.name.name.clone(),
                };
                let mut parts = BTreeSet::from([own]);
                for policy in self.opening(server).chain(self.opening_routes(server)) {
                    parts.insert(ObjectKey {
                        kind: ObjectKind::AuthorizationPolicy(policy.name.group),
                        namespace: Some(policy.name.name.namespace.clone()),
                        name: policy.name.name.name.clone(),
                    });
                    let required = policy.required.iter();
                    parts.extend(
                        required.filter_map(|it| self.named_authentication(policy.name.group, it)),
                    );
                }
                parts.extend(self.rate_limit(&server.name).map(|it| ObjectKey {
                    kind: ObjectKind::HttpLocalRateLimitPolicy(it.name.group),
                    namespace: Some(it.name.name.namespace.clone()),
                    name: it.name.name.name.clone(),
                }));
                parts
            }
            Kind::EgressNetwork => {
                let mut networks = self.policies.egress.keys();
                let network = networks.find(|it: &&EgressName| it.to_string() == key.name);
                let network = network.map(|it| ObjectKey {
                    kind: ObjectKind::EgressNetwork(it.group),
                    namespace: Some(it.name.namespace.clone()),
                    name: it.name.name.clone(),
                });
                network.into_iter().collect()
            }
            _ => BTreeSet::new(),
        }
    }
}

fn reason() -> String {
    format!(
        "takes more than {MAX_RESOURCE_BYTES} bytes for agents: too many authorizations, identities, networks or ports"
    )
}
