//! How far the watches have come, kind by kind: for a controller that is behind another not to tell agents what is old.
//!
//! What a list finds counts when the list is complete, as it takes effect then. What is not looked at counts, too: a
//! change that another controller had to tell may be none for this one, which has heard of it all the same. A bookmark
//! says that nothing is missing, and nothing that could be told: it would only have agents wait for other controllers,
//! to which theirs come at other times.

use std::collections::BTreeMap;

use tokio::time::Instant;

use super::world::Told;
use crate::objects::ObjectKind;
use crate::progress::{OfKind, Reached};

/// How far they have come.
#[derive(Debug, Default)]
pub(super) struct Course {
    reached: Reached,
    /// Lists that are being made, and since when.
    listing: BTreeMap<ObjectKind, Instant>,
    /// As it was handed over.
    handed: Option<Reached>,
}

impl Course {
    /// A kind is read, in whatever version: what was heard of it stays.
    pub(super) fn watch(&mut self, kind: ObjectKind) {
        self.reached.kinds.entry(kind).or_default();
        self.listing.remove(&kind);
    }

    /// A kind is not read any more.
    pub(super) fn forget(&mut self, kind: ObjectKind) {
        self.reached.kinds.remove(&kind);
        self.listing.remove(&kind);
    }

    /// A kind cannot be read now, and is not waited for: agents that know of more are not kept waiting for it either.
    pub(super) fn excuse(&mut self, kind: ObjectKind) {
        self.reached.kinds.remove(&kind);
    }

    /// It was found out what is served, beginning at this moment.
    pub(super) fn looked(&mut self, began: Instant) {
        self.reached.looked = Some(began);
    }

    /// Nothing else happened up to a version.
    pub(super) fn bookmark(&mut self, kind: ObjectKind, version: u64) {
        if let Some(of) = self.reached.kinds.get_mut(&kind) {
            of.heard = of.heard.max(Some(version));
        }
    }

    /// Takes in what a watch says.
    pub(super) fn hears(&mut self, kind: ObjectKind, told: &Told) {
        if matches!(told, Told::Complete { .. }) {
            // Of one that was not waited for, too.
            self.reached.kinds.entry(kind).or_default();
        }
        let Some(of) = self.reached.kinds.get_mut(&kind) else {
            return;
        };
        match told {
            Told::Began => {
                self.listing.insert(kind, Instant::now());
            }
            Told::Found(_) => {}
            Told::Complete { version, beside } => {
                let listed = self.listing.remove(&kind);
                let until = |so_far: Option<u64>| match beside {
                    true => so_far.max(*version),
                    // It is all there is: perhaps of a cluster that has gone back.
                    false => *version,
                };
                *of = OfKind {
                    told: until(of.told),
                    heard: until(of.heard),
                    listed,
                };
            }
            Told::Changed(it) | Told::Gone(it) => {
                of.told = of.told.max(it.version);
                of.heard = of.heard.max(it.version);
            }
        }
    }

    /// Whether a list of a kind is complete that was begun after a moment.
    pub(super) fn is_listed_since(&self, kind: ObjectKind, moment: Instant) -> bool {
        let of = self.reached.kinds.get(&kind);
        of.and_then(|it| it.listed).is_some_and(|it| it > moment)
    }

    /// Whether it has come further than what was handed over, though nothing else is to be; not before something was.
    pub(super) fn has_come_further(&self) -> bool {
        let handed = self.handed.as_ref();
        handed.is_some_and(|it| *it != self.reached)
    }

    /// All that was heard is handed over now: how far that is.
    pub(super) fn hands_over(&mut self) -> Reached {
        self.reached.counts = true;
        self.handed = Some(self.reached.clone());
        self.reached.clone()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::document::{Form, Trimmed};
    use super::*;

    const POD: ObjectKind = ObjectKind::Pod;

    fn pod(version: &str) -> Trimmed {
        let form = Form {
            kind: POD,
            api_version: "v1".to_owned(),
            believe_netns: false,
        };
        form.take(
            json!({"metadata": {"name": "a", "namespace": "b", "resourceVersion": version}}).into(),
        )
    }

    fn complete(version: u64, beside: bool) -> Told {
        let version = Some(version);
        Told::Complete { version, beside }
    }

    #[test]
    fn what_was_told_and_heard_is_known_of_each_kind() {
        let mut course = Course::default();
        course.hears(POD, &Told::Changed(pod("3")));
        assert!(course.reached.kinds.is_empty(), "of no watch");
        course.watch(POD);
        let mut hear = |told: &[Told]| {
            for it in told {
                course.hears(POD, it);
            }
            let of = course.reached.kinds[&POD];
            (of.told, of.heard)
        };
        let found = |version| Told::Found(pod(version));
        assert_eq!(hear(&[Told::Began, found("7"), found("3")]), (None, None));
        assert_eq!(hear(&[complete(8, false)]), (Some(8), Some(8)));
        assert_eq!(hear(&[Told::Changed(pod("9"))]), (Some(9), Some(9)));
        // A list beside the watch may be older than what that says, and counts when it is complete.
        let list = [Told::Began, found("2"), Told::Gone(pod("13"))];
        assert_eq!(hear(&list), (Some(13), Some(13)));
        assert_eq!(hear(&[complete(12, true)]), (Some(13), Some(13)));
        assert_eq!(
            hear(&[Told::Began, complete(14, true)]),
            (Some(14), Some(14))
        );
        // Of a server that does not count so.
        assert_eq!(hear(&[Told::Gone(pod("x"))]), (Some(14), Some(14)));
        // The cluster has gone back.
        assert_eq!(hear(&[Told::Began, complete(5, false)]), (Some(5), Some(5)));
        course.bookmark(POD, 20);
        let of = course.reached.kinds[&POD];
        assert_eq!((of.told, of.heard), (Some(5), Some(20)));
        course.forget(POD);
        assert!(course.reached.kinds.is_empty());
    }

    #[test]
    fn a_kind_that_is_not_waited_for_counts_when_it_was_read() {
        let mut course = Course::default();
        course.watch(POD);
        course.hears(POD, &Told::Began);
        course.excuse(POD);
        course.hears(POD, &Told::Found(pod("7")));
        assert!(course.reached.kinds.is_empty());
        course.hears(POD, &complete(8, false));
        let of = course.reached.kinds[&POD];
        assert_eq!(of.heard, Some(8));
        assert!(of.listed.is_some());
    }

    #[test]
    fn a_list_is_of_when_it_began() {
        let mut course = Course::default();
        course.watch(POD);
        course.hears(POD, &Told::Began);
        let between = Instant::now();
        course.hears(POD, &complete(8, false));
        let listed = course.reached.kinds[&POD].listed.expect("one was");
        assert!(listed <= between);
        assert!(!course.has_come_further(), "nothing was handed over");
        assert!(course.hands_over().counts && !course.has_come_further());
        course.bookmark(POD, 9);
        assert!(course.has_come_further());
    }
}
