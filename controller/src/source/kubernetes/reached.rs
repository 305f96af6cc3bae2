//! How far the watches have come, kind by kind: for a controller that is behind another not to tell agents what is old.
//!
//! A version counts when what was heard with it can be handed over. So what a list finds counts when the list is
//! complete, as it takes effect then. What is not looked at counts, too: a change that another controller had to tell
//! may be none for this one, which has heard of it all the same.

use std::collections::{BTreeMap, BTreeSet};

use super::shown;
use super::watch::News;
use super::world::Told;
use crate::objects::ObjectKind;
use crate::progress::{Position, Progress};

/// How far they have come.
#[derive(Debug, Default)]
pub(super) struct Reached {
    progress: Progress,
    position: Position,
    /// Of lists that are not complete.
    listing: BTreeMap<ObjectKind, u64>,
    /// Up to where that was told.
    told: Position,
    /// Kinds of which nothing can be heard now.
    deaf: BTreeSet<ObjectKind>,
}

impl Reached {
    /// Tells it there.
    pub(super) fn new(progress: Progress) -> Self {
        Self {
            progress,
            ..Self::default()
        }
    }

    /// Takes in what a watch says, before it is done.
    pub(super) fn hears(&mut self, kind: ObjectKind, news: &News) {
        match news {
            // Says nothing about the server yet.
            News::Told(Told::Began) => {
                self.listing.remove(&kind);
                return;
            }
            News::Told(Told::Found(it)) => {
                let reached = self.listing.entry(kind).or_default();
                *reached = it.version().unwrap_or(0).max(*reached);
            }
            News::Told(Told::Complete) => {
                let version = self.listing.remove(&kind);
                self.comes_to(kind, version);
            }
            News::Told(Told::Changed(it) | Told::Gone(it)) => self.comes_to(kind, it.version()),
            News::Recovered | News::Failed(_) | News::Unserved => {}
        }
        match news {
            News::Failed(_) | News::Unserved => self.deaf.insert(kind),
            News::Told(_) | News::Recovered => self.deaf.remove(&kind),
        };
        self.progress.deaf(!self.deaf.is_empty());
    }

    /// A kind is not read any more.
    pub(super) fn forget(&mut self, kind: ObjectKind) {
        self.position.remove(&shown(kind));
        self.listing.remove(&kind);
        self.deaf.remove(&kind);
        self.progress.deaf(!self.deaf.is_empty());
    }

    /// Whether it has come further than was told, though nothing is to be handed over; not before something was.
    pub(super) fn has_come_further(&self) -> bool {
        !self.told.is_empty() && self.told != self.position
    }

    /// All that was heard is handed over next.
    pub(super) fn tells(&mut self) {
        self.told.clone_from(&self.position);
        self.progress.sends(self.position.clone());
    }

    fn comes_to(&mut self, kind: ObjectKind, version: Option<u64>) {
        if let Some(version) = version {
            let reached = self.position.entry(shown(kind)).or_default();
            *reached = version.max(*reached);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::document::Document;
    use super::*;

    fn pod(version: &str) -> Document {
        json!({"metadata": {"name": "a", "namespace": "b", "resourceVersion": version}}).into()
    }

    #[test]
    fn what_a_list_finds_counts_when_it_is_complete() {
        let mut reached = Reached::default();
        let mut hear = |news: &[News]| {
            for it in news {
                reached.hears(ObjectKind::Pod, it);
            }
            reached.position.get("Pod").copied()
        };
        let told = |told| News::Told(told);
        let found = |version| told(Told::Found(pod(version)));
        assert_eq!(hear(&[told(Told::Began), found("7"), found("3")]), None);
        assert_eq!(hear(&[told(Told::Complete)]), Some(7));
        assert_eq!(hear(&[told(Told::Changed(pod("9")))]), Some(9));
        // One that began anew.
        assert_eq!(hear(&[told(Told::Began), found("20")]), Some(9));
        assert_eq!(hear(&[told(Told::Began), found("12")]), Some(9));
        assert_eq!(hear(&[told(Told::Complete)]), Some(12));
        assert_eq!(hear(&[told(Told::Gone(pod("13")))]), Some(13));
        // Of a server that does not count.
        assert_eq!(hear(&[told(Told::Gone(pod("x")))]), Some(13));
        reached.forget(ObjectKind::Pod);
        assert_eq!(reached.position.len(), 0);
    }
}
