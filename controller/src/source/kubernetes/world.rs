//! What the API server said, as changes for the index: pure, and the place where nothing may be lost.
//!
//! A watch that breaks in a way that may have lost something begins with a list anew. What a list finds and what
//! it does not find any more take effect together when it is complete, so that an address that went from one
//! object to another meanwhile is never seen with both; how that agrees with what a watch beside it says is
//! `known`'s. The first batch of all waits for the lists of all kinds.
//!
//! Watches of two kinds are not equally fast, or equally healthy. Whether a pod is meshed may be its namespace's to say:
//! no pod is told before its namespace, and no end of a namespace before those of its pods. A pod would be taken for one
//! outside of the mesh meanwhile, and be spoken to in the clear.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{BuildHasher, RandomState};

use weft_core::Name;

use super::document::Trimmed;
use super::known::Known;
use crate::objects::{Fault, ObjectKey, ObjectKind};
use crate::problems::{Origin, Problem};
use crate::progress::Reached;
use crate::source::{Batch, Change, Event, Written};

mod away;
#[cfg(test)]
mod tests;

pub(super) use away::shown_elsewhere;

/// What a watch says.
#[derive(Debug)]
pub(super) enum Told {
    /// It begins to list all objects.
    Began,
    /// An object of the list.
    Found(Trimmed),
    /// The list is complete.
    Complete {
        /// The version as of which it is, if that can be compared to others.
        version: Option<u64>,
        /// Whether there is a watch beside it. If not, it is all there is, and a watch begins after it.
        beside: bool,
    },
    /// An object was created or changed.
    Changed(Trimmed),
    /// An object is gone.
    Gone(Trimmed),
}

/// What is known of all kinds.
#[derive(Debug)]
pub(super) struct World {
    hashes: RandomState,
    origin: Origin,
    kinds: BTreeMap<ObjectKind, Known>,
    /// Changes that were not handed over yet: the last one of each object.
    pending: BTreeMap<ObjectKey, Change>,
    /// The namespaces that were handed over.
    namespaces: BTreeSet<Name>,
    started: bool,
    /// Kinds that cannot be read now, and are not waited for.
    away: BTreeSet<ObjectKind>,
    /// Whether a policy stands for some that cannot be read.
    stands_in: bool,
}

/// The place of everything that Kubernetes says, in problems.
pub(super) const PLACE: &str = "kubernetes";

impl World {
    /// Nothing is known yet.
    pub(super) fn new() -> Self {
        Self {
            hashes: RandomState::new(),
            origin: Origin {
                place: PLACE.into(),
                document: None,
            },
            kinds: BTreeMap::new(),
            pending: BTreeMap::new(),
            namespaces: BTreeSet::new(),
            started: false,
            away: BTreeSet::new(),
            stands_in: false,
        }
    }

    /// A kind is watched from now on. What is known of it stays until its list is complete.
    pub(super) fn watch(&mut self, kind: ObjectKind) {
        self.kinds.entry(kind).or_default().watch();
    }

    /// A kind is not served any more: its objects are gone.
    pub(super) fn forget(&mut self, kind: ObjectKind) {
        let known = self.kinds.remove(&kind).unwrap_or_default();
        for key in known.into_keys() {
            let change = Event::Delete { key: key.clone() }.into();
            self.pending.insert(key, change);
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
        let (hashes, origin) = (&self.hashes, &self.origin);
        let hash = |text: &str| hashes.hash_one(text);
        let change = |key: &ObjectKey, text: Box<str>| {
            Change::Written(Written {
                key: key.clone(),
                text,
                origin: origin.clone(),
            })
        };
        let follows = match told {
            Told::Began => {
                known.began();
                vec![]
            }
            Told::Complete { version, beside } => known.complete(version.filter(|_| beside)),
            Told::Found(Trimmed { key, text, .. }) => {
                let key = key.map_err(left_out)?;
                let named = key.clone();
                known.found(key, hash(&text), || change(&named, text));
                vec![]
            }
            Told::Changed(Trimmed { key, version, text }) => {
                let key = key.map_err(left_out)?;
                let named = key.clone();
                let changed = known.changed(key, version, hash(&text), || change(&named, text));
                changed.into_iter().collect()
            }
            Told::Gone(Trimmed { key, version, .. }) => {
                let key = key.map_err(left_out)?;
                known.gone(key, version).into_iter().collect()
            }
        };
        let follows = follows.into_iter().map(|it| (it.key().clone(), it));
        self.pending.extend(follows);
        Ok(())
    }

    /// The kinds that no list was complete of yet, and that are waited for.
    pub(super) fn unlisted(&self) -> Vec<ObjectKind> {
        let unlisted = self.kinds.iter().filter(|(_, it)| !it.is_listed());
        let unlisted = unlisted.map(|(kind, _)| *kind);
        unlisted.filter(|it| !self.away.contains(it)).collect()
    }

    /// Whether a list of a kind was ever complete.
    pub(super) fn is_listed(&self, kind: ObjectKind) -> bool {
        self.kinds.get(&kind).is_some_and(Known::is_listed)
    }

    /// Whether something was handed over.
    pub(super) fn is_started(&self) -> bool {
        self.started
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
        let mut changes = vec![];
        // Namespaces first: which pods are early depends on them.
        let (namespaces, others): (Vec<_>, Vec<_>) = pending
            .into_iter()
            .partition(|(key, _)| key.kind == ObjectKind::Namespace);
        for (key, change) in namespaces.into_iter().chain(others) {
            if self.is_early(&change) {
                self.pending.insert(key, change);
                continue;
            }
            if key.kind == ObjectKind::Namespace {
                match change.is_end() {
                    true => self.namespaces.remove(&key.name),
                    false => self.namespaces.insert(key.name),
                };
            }
            changes.push(change);
        }
        Batch {
            changes,
            reached: Reached::default(),
        }
    }

    /// Whether a change has to wait for one of another kind.
    fn is_early(&self, change: &Change) -> bool {
        let key = change.key();
        match (key.kind, change.is_end()) {
            (ObjectKind::Namespace, true) => {
                let pods = self.kinds.get(&ObjectKind::Pod);
                pods.is_some_and(|it| it.has_any_in(&key.name))
            }
            (ObjectKind::Pod, false) => {
                let mut namespace = key.namespace.iter();
                namespace.any(|it| !self.namespaces.contains(it))
            }
            _ => false,
        }
    }
}

fn left_out(fault: Fault) -> Box<Problem> {
    Box::new(Problem::of_file(
        PLACE,
        None,
        fault,
        "the object is left out",
    ))
}
