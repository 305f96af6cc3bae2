//! What takes the place of policies that nobody can be asked for: those that Calico's own API server shows, while that is
//! away. The controller does not wait for it, nor takes its silence for an answer: where its policies are not to be had as
//! they are kept either, they may select everybody, and one that does stands in for them until all were read.

use std::collections::BTreeSet;

use kube::api::ObjectMeta;
use serde_json::{Value, json};

use super::World;
use crate::objects::cni::{CniKind, CniPolicy};
use crate::objects::{Object, ObjectKey, ObjectKind};
use crate::source::Event;

impl World {
    /// These kinds cannot be read now, were not read yet, and are waited for by nobody.
    pub(in crate::source::kubernetes) fn away(&mut self, away: BTreeSet<ObjectKind>) {
        self.away = away;
        // Once there is one, it stays until what it stands for was read.
        let is_awaited = |it: &ObjectKind| {
            let watched = self.kinds.get(it).filter(|_| self.stands_in);
            watched.is_some_and(|it| !it.is_listed())
        };
        let mut shown = shown_elsewhere();
        let is_needed = shown.any(|it| {
            let is_unknown = self.away.contains(&it) || is_awaited(&it);
            is_unknown && !self.is_read_as_kept(it)
        });
        if is_needed == self.stands_in {
            return;
        }
        self.stands_in = is_needed;
        let key = stand_in();
        let event = match is_needed {
            true => Event::Upsert {
                key: key.clone(),
                object: Box::new(Object::Cni(CniKind::Calico, Box::new(of_everybody()))),
                origin: self.origin.clone(),
            },
            false => Event::Delete { key: key.clone() },
        };
        self.pending.insert(key, event.into());
    }

    /// Whether the objects of a kind were read as they are kept. Where there are none, they may be kept elsewhere: Calico
    /// can have them in an etcd of its own, beside definitions that nobody uses.
    pub(in crate::source::kubernetes) fn is_read_as_kept(&self, kind: ObjectKind) -> bool {
        let ObjectKind::Cni(shown) = kind else {
            return false;
        };
        let kept = shown.kept().map(ObjectKind::Cni);
        let kept = kept.and_then(|it| self.kinds.get(&it));
        kept.is_some_and(|it| it.is_listed() && !it.is_empty())
    }
}

/// The kinds that an API server beside the cluster's own shows.
pub(in crate::source::kubernetes) fn shown_elsewhere() -> impl Iterator<Item = ObjectKind> {
    let kinds = CniKind::ALL.into_iter();
    kinds.filter(|it| it.kept().is_some()).map(ObjectKind::Cni)
}

/// What stands for policies that cannot be read: it is none of theirs, as it has no namespace.
fn stand_in() -> ObjectKey {
    ObjectKey {
        kind: ObjectKind::Cni(CniKind::Calico),
        namespace: None,
        name: "all".parse().expect("a name"),
    }
}

fn of_everybody() -> CniPolicy {
    CniPolicy {
        metadata: ObjectMeta::default(),
        spec: json!({}),
        specs: Value::Null,
    }
}
