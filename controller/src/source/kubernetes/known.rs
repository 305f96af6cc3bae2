//! What is known of the objects of one kind: pure. What a list says is reconciled here with what the watch beside it
//! said meanwhile.
//!
//! A list is as of one version. What the watch said of later versions is newer; whatever else the list says counts, and
//! what it does not have, and was not made later, is gone. A watch may be behind the list: what it says of versions that
//! the list had counted in already is old, and would undo what is newer for a moment.

use std::collections::{HashMap, HashSet};

use weft_core::Name;

use crate::objects::ObjectKey;
use crate::source::{Change, Event};

/// What is known of a kind.
#[derive(Debug, Default)]
pub(super) struct Known {
    /// The objects, by a hash of what is looked at in them: it tells whether that changed, and needs no copy.
    objects: HashMap<ObjectKey, u64>,
    /// How many of them there are in each namespace that has any.
    counts: HashMap<Name, usize>,
    /// While it is listed.
    listing: Option<Listing>,
    /// What the last list has counted in.
    counted: Option<Counted>,
    /// Whether a list was ever complete.
    listed: bool,
}

#[derive(Debug, Default)]
struct Listing {
    /// What was found so far.
    found: HashMap<ObjectKey, u64>,
    /// What follows from it.
    held: HashMap<ObjectKey, Change>,
    /// Of which objects the watch said something since it began, and of which version that was.
    since: HashMap<ObjectKey, Option<u64>>,
}

#[derive(Debug)]
struct Counted {
    /// Everything up to here,
    upto: u64,
    /// except of these objects.
    except: HashSet<ObjectKey>,
}

impl Known {
    /// Whether there are any in a namespace.
    pub(super) fn has_any_in(&self, namespace: &Name) -> bool {
        self.counts.contains_key(namespace)
    }

    /// The objects, when nothing is to be known of them any more.
    pub(super) fn into_keys(self) -> impl Iterator<Item = ObjectKey> {
        self.objects.into_keys()
    }

    /// Whether there are none.
    pub(super) fn is_empty(&self) -> bool {
        self.objects.is_empty()
    }

    /// Whether a list was ever complete.
    pub(super) fn is_listed(&self) -> bool {
        self.listed
    }

    /// Another watch begins. What is known stays until its list is complete.
    pub(super) fn watch(&mut self) {
        (self.listing, self.counted) = (None, None);
    }

    /// A list begins, perhaps anew.
    pub(super) fn began(&mut self) {
        self.listing = Some(Listing::default());
    }

    /// A list found an object; `change` is needed if nobody knew it so.
    pub(super) fn found(&mut self, key: ObjectKey, hash: u64, change: impl FnOnce() -> Change) {
        let listing = self.listing.get_or_insert_default();
        if self.objects.get(&key) != Some(&hash) {
            listing.held.insert(key.clone(), change());
        }
        listing.found.insert(key, hash);
    }

    /// The list is complete: what follows from it. `at` is the version as of which it is, if there is a watch beside it;
    /// without one, the list is all that there is.
    pub(super) fn complete(&mut self, at: Option<u64>) -> Vec<Change> {
        self.listed = true;
        let mut listing = self.listing.take().unwrap_or_default();
        let said_later = |key: &ObjectKey| {
            let said = at.zip(listing.since.get(key));
            said.is_some_and(|(at, version)| version.is_none_or(|it| it > at))
        };
        let mut changes = vec![];
        let gone = self.objects.keys();
        let gone = gone.filter(|it| !listing.found.contains_key(*it) && !said_later(it));
        for key in gone.cloned().collect::<Vec<_>>() {
            self.remove(&key);
            changes.push(Event::Delete { key }.into());
        }
        let mut except = HashSet::new();
        for (key, hash) in listing.found {
            if self.objects.get(&key) == Some(&hash) || said_later(&key) {
                continue;
            }
            match listing.held.remove(&key) {
                Some(change) => {
                    self.insert(key, hash);
                    changes.push(change);
                }
                // It was known so, and the watch, which is behind, said something older of it meanwhile. It will say the
                // rest, too.
                None => drop(except.insert(key)),
            }
        }
        self.counted = at.map(|upto| Counted { upto, except });
        changes
    }

    /// The watch says that an object was created or changed: what follows, if anything does.
    pub(super) fn changed(
        &mut self,
        key: ObjectKey,
        version: Option<u64>,
        hash: u64,
        change: impl FnOnce() -> Change,
    ) -> Option<Change> {
        if self.was_counted(&key, version) {
            return None;
        }
        self.said(&key, version);
        (self.insert(key, hash) != Some(hash)).then(change)
    }

    /// The watch says that an object is gone: what follows, if anything does.
    pub(super) fn gone(&mut self, key: ObjectKey, version: Option<u64>) -> Option<Change> {
        if self.was_counted(&key, version) {
            return None;
        }
        self.said(&key, version);
        self.remove(&key);
        Some(Event::Delete { key }.into())
    }

    fn insert(&mut self, key: ObjectKey, hash: u64) -> Option<u64> {
        let namespace = key.namespace.clone();
        let before = self.objects.insert(key, hash);
        if let Some(namespace) = namespace.filter(|_| before.is_none()) {
            *self.counts.entry(namespace).or_default() += 1;
        }
        before
    }

    fn remove(&mut self, key: &ObjectKey) {
        if self.objects.remove(key).is_none() {
            return;
        }
        let Some(namespace) = &key.namespace else {
            return;
        };
        if let Some(count) = self.counts.get_mut(namespace) {
            *count -= 1;
            if *count == 0 {
                self.counts.remove(namespace);
            }
        }
    }

    fn said(&mut self, key: &ObjectKey, version: Option<u64>) {
        if let Some(listing) = &mut self.listing {
            listing.since.insert(key.clone(), version);
        }
    }

    /// Whether the last list had counted this in already.
    fn was_counted(&mut self, key: &ObjectKey, version: Option<u64>) -> bool {
        let (Some(counted), Some(version)) = (&self.counted, version) else {
            return false;
        };
        if version > counted.upto {
            // Watches tell things in their order: nothing older follows.
            self.counted = None;
            return false;
        }
        !counted.except.contains(key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objects::ObjectKind;

    fn pod(namespace: &str, name: &str) -> ObjectKey {
        ObjectKey {
            kind: ObjectKind::Pod,
            namespace: Some(namespace.parse().expect("valid")),
            name: name.parse().expect("valid"),
        }
    }

    /// Which namespaces have any is counted, not looked for: while one ends it is asked with each of its pods.
    #[test]
    fn namespaces_have_what_was_said_of_them() {
        let mut known = Known::default();
        let change = |key: &ObjectKey| Change::from(Event::Delete { key: key.clone() });
        let (a, b, other) = (pod("shop", "a"), pod("shop", "b"), pod("till", "a"));
        let has = |known: &Known| {
            ["shop", "till"].map(|it| known.has_any_in(&it.parse().expect("valid")))
        };
        for key in [&a, &a, &other] {
            known.changed(key.clone(), None, 1, || change(key));
        }
        assert_eq!(has(&known), [true, true]);
        known.gone(other.clone(), None);
        known.gone(other.clone(), None);
        assert_eq!(has(&known), [true, false]);
        // What a list finds and what it lacks.
        known.began();
        known.found(b.clone(), 1, || change(&b));
        known.found(other.clone(), 1, || change(&other));
        assert_eq!(has(&known), [true, false]);
        known.complete(None);
        assert_eq!(has(&known), [true, true]);
        known.gone(b, None);
        assert_eq!(has(&known), [false, true]);
    }
}
