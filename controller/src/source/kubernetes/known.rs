//! What is known of the objects of one kind: pure. What a list says is reconciled here with what the watch beside it
//! said meanwhile.
//!
//! A list is as of one version. What the watch said of later versions is newer; whatever else the list says counts, and
//! what it does not have, and was not made later, is gone. A watch may be behind the list: what it says of versions that
//! the list had counted in already is old, and would undo what is newer for a moment.

use std::collections::{HashMap, HashSet};

use crate::objects::ObjectKey;
use crate::source::Event;

/// What is known of a kind.
#[derive(Debug, Default)]
pub(super) struct Known {
    /// The objects, by a hash of what is looked at in them: it tells whether that changed, and needs no copy.
    objects: HashMap<ObjectKey, u64>,
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
    held: HashMap<ObjectKey, Event>,
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
    /// The objects.
    pub(super) fn keys(&self) -> impl Iterator<Item = &ObjectKey> {
        self.objects.keys()
    }

    /// The objects, when nothing is to be known of them any more.
    pub(super) fn into_keys(self) -> impl Iterator<Item = ObjectKey> {
        self.objects.into_keys()
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

    /// A list found an object; `event` is needed if nobody knew it so.
    pub(super) fn found(&mut self, key: ObjectKey, hash: u64, event: impl FnOnce() -> Event) {
        let listing = self.listing.get_or_insert_default();
        if self.objects.get(&key) != Some(&hash) {
            listing.held.insert(key.clone(), event());
        }
        listing.found.insert(key, hash);
    }

    /// The list is complete: what follows from it. `at` is the version as of which it is, if there is a watch beside it;
    /// without one, the list is all that there is.
    pub(super) fn complete(&mut self, at: Option<u64>) -> Vec<Event> {
        self.listed = true;
        let mut listing = self.listing.take().unwrap_or_default();
        let said_later = |key: &ObjectKey| {
            let said = at.zip(listing.since.get(key));
            said.is_some_and(|(at, version)| version.is_none_or(|it| it > at))
        };
        let mut events = vec![];
        let gone = self.objects.keys();
        let gone = gone.filter(|it| !listing.found.contains_key(*it) && !said_later(it));
        for key in gone.cloned().collect::<Vec<_>>() {
            self.objects.remove(&key);
            events.push(Event::Delete { key });
        }
        let mut except = HashSet::new();
        for (key, hash) in listing.found {
            if self.objects.get(&key) == Some(&hash) || said_later(&key) {
                continue;
            }
            match listing.held.remove(&key) {
                Some(event) => {
                    self.objects.insert(key, hash);
                    events.push(event);
                }
                // It was known so, and the watch, which is behind, said something older of it meanwhile. It will say the
                // rest, too.
                None => drop(except.insert(key)),
            }
        }
        self.counted = at.map(|upto| Counted { upto, except });
        events
    }

    /// The watch says that an object was created or changed: what follows, if anything does.
    pub(super) fn changed(
        &mut self,
        key: ObjectKey,
        version: Option<u64>,
        hash: u64,
        event: impl FnOnce() -> Event,
    ) -> Option<Event> {
        if self.was_counted(&key, version) {
            return None;
        }
        self.said(&key, version);
        (self.objects.insert(key, hash) != Some(hash)).then(event)
    }

    /// The watch says that an object is gone: what follows, if anything does.
    pub(super) fn gone(&mut self, key: ObjectKey, version: Option<u64>) -> Option<Event> {
        if self.was_counted(&key, version) {
            return None;
        }
        self.said(&key, version);
        self.objects.remove(&key);
        Some(Event::Delete { key })
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
