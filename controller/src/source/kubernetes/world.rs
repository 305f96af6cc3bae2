//! What the API server said, as changes for the index: pure, and the place where nothing may be lost.
//!
//! A watch that breaks in a way that may have lost something begins with a list anew. What a list finds and what
//! it does not find any more take effect together when it is complete, so that an address that went from one
//! object to another meanwhile is never seen with both. The first batch of all waits for the lists of all kinds.
//!
//! Watches of two kinds are not equally fast, or equally healthy. Whether a pod is meshed may be its namespace's to say:
//! no pod is told before its namespace, and no end of a namespace before those of its pods. A pod would be taken for one
//! outside of the mesh meanwhile, and be spoken to in the clear.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;

use serde_json::{Value, json};
use weft_core::Name;

use super::document::Document;
use super::trim::trim;
use crate::objects::{Fault, ObjectKey, ObjectKind};
use crate::problems::{Origin, Problem};
use crate::source::{Batch, Event};

/// What a watch says.
#[derive(Debug)]
pub(super) enum Told {
    /// It begins to list all objects.
    Began,
    /// An object of the list.
    Found(Document),
    /// The list is complete.
    Complete,
    /// An object was created or changed.
    Changed(Document),
    /// An object is gone.
    Gone(Document),
}

/// What is known of all kinds.
#[derive(Debug)]
pub(super) struct World {
    believe_netns: bool,
    hashes: RandomState,
    origin: Origin,
    kinds: BTreeMap<ObjectKind, Known>,
    /// Changes that were not handed over yet: the last one of each object.
    pending: BTreeMap<ObjectKey, Event>,
    /// The namespaces that were handed over.
    namespaces: BTreeSet<Name>,
    started: bool,
}

/// What is known of a kind.
#[derive(Debug, Default)]
struct Known {
    /// The version in which its objects are told.
    api_version: String,
    /// The objects, by a hash of what is looked at in them: it tells whether that changed, and needs no copy.
    objects: HashMap<ObjectKey, u64>,
    /// While it is listed: what was found so far.
    listing: Option<BTreeSet<ObjectKey>>,
    /// While it is listed: what follows from it.
    held: BTreeMap<ObjectKey, Event>,
    /// Whether a list was ever complete.
    listed: bool,
}

/// The place of everything that Kubernetes says, in problems.
pub(super) const PLACE: &str = "kubernetes";

impl World {
    /// Nothing is known yet.
    pub(super) fn new(believe_netns: bool) -> Self {
        Self {
            believe_netns,
            hashes: RandomState::new(),
            origin: Origin {
                place: PLACE.into(),
                document: None,
            },
            kinds: BTreeMap::new(),
            pending: BTreeMap::new(),
            namespaces: BTreeSet::new(),
            started: false,
        }
    }

    /// A kind is watched from now on, in this version. What is known of it stays until its list is complete.
    pub(super) fn watch(&mut self, kind: ObjectKind, api_version: &str) {
        let known = self.kinds.entry(kind).or_default();
        known.api_version = api_version.to_owned();
        known.listing = None;
    }

    /// A kind is not served any more: its objects are gone.
    pub(super) fn forget(&mut self, kind: ObjectKind) {
        let known = self.kinds.remove(&kind).unwrap_or_default();
        for key in known.objects.into_keys() {
            self.pending.insert(key.clone(), Event::Delete { key });
        }
    }

    /// Takes in what a watch of a kind says.
    ///
    /// # Errors
    /// An object that cannot even be named; it is left out.
    pub(super) fn take(&mut self, kind: ObjectKind, told: Told) -> Result<(), Box<Problem>> {
        let Some(known) = self.kinds.get_mut(&kind) else {
            return Ok(());
        };
        match told {
            Told::Began => known.listing = Some(BTreeSet::new()),
            Told::Complete => self.complete(kind),
            Told::Found(document) => {
                let key = self.key(kind, &document)?;
                let event = self.upsert(&key, document);
                if let Some(known) = self.kinds.get_mut(&kind) {
                    known.held.extend(event.map(|it| (key.clone(), it)));
                    known.listing.get_or_insert_default().insert(key);
                }
            }
            Told::Changed(document) => {
                let key = self.key(kind, &document)?;
                if let Some(event) = self.upsert(&key, document) {
                    self.pending.insert(key, event);
                }
            }
            Told::Gone(document) => {
                let key = self.key(kind, &document)?;
                if let Some(known) = self.kinds.get_mut(&kind) {
                    known.objects.remove(&key);
                }
                self.pending.insert(key.clone(), Event::Delete { key });
            }
        }
        Ok(())
    }

    /// The kinds that no list was complete of yet.
    pub(super) fn unlisted(&self) -> Vec<ObjectKind> {
        let unlisted = self.kinds.iter().filter(|(_, it)| !it.listed);
        unlisted.map(|(kind, _)| *kind).collect()
    }

    /// Whether there is something to hand over; the first time, that is everything or nothing.
    pub(super) fn is_due(&self) -> bool {
        match self.started {
            true => self.pending.values().any(|it| !self.is_early(it)),
            false => !self.kinds.is_empty() && self.unlisted().is_empty(),
        }
    }

    /// What changed since the last batch.
    pub(super) fn batch(&mut self) -> Batch {
        self.started = true;
        let pending = std::mem::take(&mut self.pending);
        let mut events = vec![];
        // Namespaces first: which pods are early depends on them.
        let (namespaces, others): (Vec<_>, Vec<_>) = pending
            .into_iter()
            .partition(|(key, _)| key.kind == ObjectKind::Namespace);
        for (key, event) in namespaces.into_iter().chain(others) {
            if self.is_early(&event) {
                self.pending.insert(key, event);
                continue;
            }
            if key.kind == ObjectKind::Namespace {
                match event {
                    Event::Delete { .. } => self.namespaces.remove(&key.name),
                    _ => self.namespaces.insert(key.name),
                };
            }
            events.push(event);
        }
        Batch { events }
    }

    /// Whether a change has to wait for one of another kind.
    fn is_early(&self, event: &Event) -> bool {
        let key = event.key();
        match (key.kind, event) {
            (ObjectKind::Namespace, Event::Delete { .. }) => {
                let pods = self.kinds.get(&ObjectKind::Pod);
                let mut pods = pods.into_iter().flat_map(|it| it.objects.keys());
                pods.any(|it| it.namespace.as_ref() == Some(&key.name))
            }
            (ObjectKind::Pod, Event::Upsert { .. } | Event::Invalid { .. }) => {
                let mut namespace = key.namespace.iter();
                namespace.any(|it| !self.namespaces.contains(it))
            }
            _ => false,
        }
    }

    fn complete(&mut self, kind: ObjectKind) {
        let Some(known) = self.kinds.get_mut(&kind) else {
            return;
        };
        let found = known.listing.take().unwrap_or_default();
        let gone = known.objects.keys().filter(|it| !found.contains(it));
        let gone: Vec<ObjectKey> = gone.cloned().collect();
        for key in gone {
            known.objects.remove(&key);
            known.held.insert(key.clone(), Event::Delete { key });
        }
        known.listed = true;
        self.pending.append(&mut known.held);
    }

    /// The change that an object is; none if nothing that is looked at is different.
    fn upsert(&mut self, key: &ObjectKey, document: Document) -> Option<Event> {
        let known = self.kinds.get_mut(&key.kind)?;
        let mut value = document.value;
        if let Value::Object(fields) = &mut value {
            // Items of lists do not say it.
            fields.insert("apiVersion".to_owned(), json!(known.api_version));
            fields.insert("kind".to_owned(), json!(key.kind.as_str()));
        }
        trim(key.kind, &mut value, self.believe_netns);
        let hash = self.hashes.hash_one(value.to_string());
        if known.objects.insert(key.clone(), hash) == Some(hash) {
            return None;
        }
        let (key, origin) = (key.clone(), self.origin.clone());
        Some(Event::read(key, Arc::new(value), origin))
    }

    fn key(&self, kind: ObjectKind, document: &Document) -> Result<ObjectKey, Box<Problem>> {
        let name = |field: &str| -> Result<Name, Box<Problem>> {
            let place = format!("metadata.{field}");
            let text = document.value.get("metadata").and_then(|it| it.get(field));
            let fault = match text.and_then(Value::as_str).map(str::parse) {
                Some(Ok(name)) => return Ok(name),
                Some(Err(reason)) => Fault::new(place, format!("{text:?}: {reason}")),
                None => Fault::new(place, "missing, or no text"),
            };
            let fault = Fault::new(format!("{}: {}", kind.as_str(), fault.field), fault.reason);
            let effect = "the object is left out";
            Err(Box::new(Problem::of_file(PLACE, None, fault, effect)))
        };
        Ok(ObjectKey {
            kind,
            namespace: kind
                .is_namespaced()
                .then(|| name("namespace"))
                .transpose()?,
            name: name("name")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POD: ObjectKind = ObjectKind::Pod;

    fn pod(name: &str, label: &str) -> Document {
        json!({"metadata": {"name": name, "namespace": "shop", "resourceVersion": "1",
            "labels": {"is": label}}, "status": {"hostIP": "10.0.0.1"}})
        .into()
    }

    /// What a batch says, as `+` upsert, `!` invalid, `-` delete.
    fn batch(world: &mut World) -> Vec<String> {
        let shown = |event: &Event| match event {
            Event::Upsert { key, .. } => format!("+{}", key.name),
            Event::Invalid { key, fault, .. } => format!("!{} {}", key.name, fault.field),
            Event::Delete { key } => format!("-{}", key.name),
        };
        world.batch().events.iter().map(shown).collect()
    }

    fn tell(world: &mut World, told: impl IntoIterator<Item = Told>) {
        for it in told {
            world.take(POD, it).expect("named");
        }
    }

    fn listed(pods: &[(&str, &str)]) -> Vec<Told> {
        let found = pods
            .iter()
            .map(|(name, label)| Told::Found(pod(name, label)));
        let all = [Told::Began].into_iter().chain(found);
        all.chain([Told::Complete]).collect()
    }

    fn namespace() -> Document {
        json!({"metadata": {"name": "shop"}}).into()
    }

    /// A world with these pods and their namespace, which was told already.
    fn world(pods: &[(&str, &str)]) -> World {
        let mut world = World::new(false);
        world.watch(ObjectKind::Namespace, "v1");
        for told in [Told::Began, Told::Found(namespace()), Told::Complete] {
            world
                .take(ObjectKind::Namespace, told)
                .expect("it has a name");
        }
        batch(&mut world);
        world.watch(POD, "v1");
        tell(&mut world, listed(pods));
        world
    }

    #[test]
    fn the_first_batch_waits_for_every_kind() {
        let mut world = World::new(false);
        assert!(!world.is_due());
        world.watch(POD, "v1");
        world.watch(ObjectKind::Namespace, "v1");
        tell(&mut world, listed(&[("a", "1")]));
        assert!(!world.is_due());
        assert_eq!(world.unlisted(), [ObjectKind::Namespace]);
        for told in [Told::Began, Told::Found(namespace()), Told::Complete] {
            world.take(ObjectKind::Namespace, told).expect("named");
        }
        assert!(world.is_due());
        assert_eq!(batch(&mut world), ["+shop", "+a"]);
        assert!(!world.is_due());
        // One that is installed later is waited for by nobody.
        world.watch(ObjectKind::ReferenceGrant, "v1");
        tell(&mut world, [Told::Changed(pod("a", "2"))]);
        assert!(world.is_due());
    }

    #[test]
    fn what_a_new_list_lacks_is_gone_when_it_is_complete() {
        let mut world = world(&[("a", "1"), ("b", "1"), ("c", "1")]);
        batch(&mut world);
        let mut list = listed(&[("a", "1"), ("b", "2"), ("d", "1")]);
        let complete = list.pop();
        tell(&mut world, list);
        assert!(!world.is_due(), "half of a list");
        tell(&mut world, complete);
        assert_eq!(batch(&mut world), ["+b", "-c", "+d"]);
    }

    /// Or else a pod of a meshed namespace would be none of the mesh for as long as the namespace is not known.
    #[test]
    fn a_namespace_is_told_before_its_pods_and_outlives_them() {
        let mut world = world(&[("a", "1")]);
        assert_eq!(batch(&mut world), ["+a"]);
        let space = ObjectKind::Namespace;
        let other = |name: &str| -> Document { json!({"metadata": {"name": name}}).into() };
        let moved = |space: &str| {
            let mut document = pod("b", "1");
            document.value["metadata"]["namespace"] = json!(space);
            document
        };
        tell(&mut world, [Told::Changed(moved("new"))]);
        assert!(!world.is_due(), "its namespace is not known");
        world
            .take(space, Told::Changed(other("new")))
            .expect("named");
        assert!(world.is_due());
        assert_eq!(batch(&mut world), ["+new", "+b"]);
        world.take(space, Told::Gone(other("new"))).expect("named");
        assert!(!world.is_due(), "one of its pods is still there");
        tell(&mut world, [Told::Gone(moved("new"))]);
        assert_eq!(batch(&mut world), ["-new", "-b"]);
        assert!(!world.is_due());
    }

    #[test]
    fn a_list_that_breaks_is_begun_anew() {
        let mut world = world(&[("a", "1"), ("b", "1")]);
        batch(&mut world);
        tell(&mut world, [Told::Began, Told::Found(pod("c", "1"))]);
        // What was found by the one that broke is gone before the next.
        tell(&mut world, listed(&[("b", "1")]));
        assert_eq!(batch(&mut world), ["-a", "-c"]);
    }

    #[test]
    fn what_is_not_looked_at_is_no_change() {
        let mut world = world(&[("a", "1")]);
        batch(&mut world);
        let mut same = pod("a", "1");
        same.value["status"]["hostIP"] = json!("10.0.0.2");
        same.value["metadata"]["resourceVersion"] = json!("2");
        tell(&mut world, [Told::Changed(same)]);
        assert!(!world.is_due());
        tell(&mut world, [Told::Gone(pod("a", "1"))]);
        assert_eq!(batch(&mut world), ["-a"]);
        tell(&mut world, [Told::Changed(pod("a", "1"))]);
        assert_eq!(batch(&mut world), ["+a"]);
    }

    #[test]
    fn the_last_of_several_changes_counts() {
        let mut world = world(&[("a", "1")]);
        batch(&mut world);
        tell(
            &mut world,
            [
                Told::Changed(pod("a", "2")),
                Told::Gone(pod("a", "2")),
                Told::Changed(pod("b", "1")),
                Told::Gone(pod("b", "1")),
                Told::Changed(pod("a", "3")),
            ],
        );
        assert_eq!(batch(&mut world), ["+a", "-b"]);
    }

    #[test]
    fn a_bad_object_concerns_no_other() {
        let mut world = world(&[("a", "1")]);
        batch(&mut world);
        let mut bad = pod("a", "1");
        bad.value["spec"] = json!({"containers": 7});
        tell(
            &mut world,
            [Told::Changed(bad), Told::Changed(pod("b", "1"))],
        );
        assert_eq!(batch(&mut world), ["!a spec.containers", "+b"]);
        for (document, field) in [
            (json!({}), "Pod: metadata.namespace"),
            (json!([7]), "Pod: metadata.namespace"),
            (
                json!({"metadata": {"namespace": "a", "name": "B c"}}),
                "Pod: metadata.name",
            ),
            (
                json!({"metadata": {"namespace": 7, "name": "a"}}),
                "Pod: metadata.namespace",
            ),
        ] {
            let told = Told::Changed(document.into());
            let problem = world.take(POD, told).expect_err("no name");
            assert_eq!(problem.field, field);
        }
        tell(&mut world, [Told::Changed(pod("c", "1"))]);
        assert_eq!(batch(&mut world), ["+c"]);
    }

    #[test]
    fn another_version_of_a_kind_is_the_same_objects() {
        let mut world = world(&[("a", "1"), ("b", "1")]);
        batch(&mut world);
        world.watch(POD, "v2");
        assert!(!world.is_due());
        tell(&mut world, listed(&[("b", "1")]));
        // Which cannot be read in it, here.
        assert_eq!(batch(&mut world), ["-a", "!b apiVersion"]);
        world.forget(POD);
        assert_eq!(batch(&mut world), ["-b"]);
    }
}
