//! What agents reject, said of the objects that it is made of: these are not in force everywhere, whatever was told.

use std::collections::BTreeMap;

use weft_core::route::{RouteName, RouteTableName};
use weft_core::{EgressName, ObjectName, WorkloadId};
use weft_proto::{Key, Kind};

use super::Index;
use crate::objects::{ObjectKey, ObjectKind};
use crate::statuses::{Place, Rejection};

/// All of it.
#[derive(Debug, Default)]
pub(super) struct Rejected {
    resources: BTreeMap<Key, OfResource>,
    /// What was said of objects.
    said: BTreeMap<ObjectKey, Vec<Rejection>>,
}

#[derive(Debug)]
struct OfResource {
    /// Who rejects it, and why.
    text: String,
    /// The objects that it is made of; routes with the parent that makes them a part of it.
    objects: BTreeMap<ObjectKey, Option<Place>>,
}

impl Rejected {
    pub(super) fn is_empty(&self) -> bool {
        self.resources.is_empty()
    }
}

impl Index {
    /// Takes in what agents reject, of resources of which that changed: who does, and why; none: nobody does.
    pub fn rejected(&mut self, changed: Vec<(Key, Option<String>)>) {
        for (key, text) in changed {
            let Some(text) = text else {
                self.published.rejected.resources.remove(&key);
                continue;
            };
            let objects = self.objects_of(&key);
            let of = OfResource { text, objects };
            self.published.rejected.resources.insert(key, of);
        }
        self.statuses.unsettled();
        self.say_rejected();
        self.statuses.settled();
    }

    /// These were told anew, of perhaps other objects. Whether agents still reject them, they say.
    pub(super) fn rejected_were_told(&mut self, keys: &[Key]) {
        let mut changed = false;
        for key in keys {
            if self.published.rejected.resources.contains_key(key) {
                let objects = self.objects_of(key);
                if let Some(of) = self.published.rejected.resources.get_mut(key) {
                    of.objects = objects;
                    changed = true;
                }
            }
        }
        if changed {
            self.say_rejected();
        }
    }

    fn say_rejected(&mut self) {
        let Rejected { resources, said } = &self.published.rejected;
        let mut now = BTreeMap::<ObjectKey, Vec<Rejection>>::new();
        for (key, of) in resources {
            for (object, place) in &of.objects {
                let rejection = Rejection {
                    place: place.clone(),
                    text: format!("{key}: {}", of.text),
                };
                now.entry(object.clone()).or_default().push(rejection);
            }
        }
        for object in said.keys().filter(|it| !now.contains_key(it)) {
            self.statuses.rejected(object, vec![]);
        }
        for (object, rejections) in &now {
            self.statuses.rejected(object, rejections.clone());
        }
        self.published.rejected.said = now;
    }

    /// The objects that a resource is made of, as far as they have a status.
    fn objects_of(&self, key: &Key) -> BTreeMap<ObjectKey, Option<Place>> {
        let own = self.parts_of(key).into_iter().map(|it| (it, None));
        let mut objects: BTreeMap<ObjectKey, Option<Place>> = own.collect();
        let routes = &self.routes;
        let (kind, name, attached) = match key.kind {
            Kind::RouteTable => {
                let Ok(table) = key.name.parse::<RouteTableName>() else {
                    return objects;
                };
                let attached = routes.of_parent.get(&table.service);
                ("Service", table.service, attached)
            }
            Kind::EgressNetwork => {
                let Ok(network) = key.name.parse::<EgressName>() else {
                    return objects;
                };
                let attached = routes.of_egress.get(&network.name);
                ("EgressNetwork", network.name, attached)
            }
            Kind::Server => {
                // After its group.
                let name = key.name.split_once('/').map(|(_, name)| name);
                let Some(Ok(name)) = name.map(str::parse::<ObjectName>) else {
                    return objects;
                };
                let attached = routes.of_server.get(&name);
                ("Server", name, attached)
            }
            Kind::WorkloadPolicy => {
                let Ok(WorkloadId(pod)) = key.name.parse() else {
                    return objects;
                };
                let servers = self.published.pods.get(&pod).into_iter();
                let servers = servers.flat_map(|it| it.servers());
                objects.extend(servers.map(|it| {
                    let server = ObjectKey {
                        kind: ObjectKind::Server(it.group),
                        namespace: Some(it.name.namespace.clone()),
                        name: it.name.name.clone(),
                    };
                    (server, None)
                }));
                return objects;
            }
            _ => return objects,
        };
        let place = Place { kind, name };
        let attached = attached.into_iter().flatten();
        objects.extend(attached.map(|route| (key_of(route), Some(place.clone()))));
        objects
    }
}

fn key_of(route: &RouteName) -> ObjectKey {
    ObjectKey {
        kind: ObjectKind::Route(route.kind),
        namespace: Some(route.name.namespace.clone()),
        name: route.name.name.clone(),
    }
}
