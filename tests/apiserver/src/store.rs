//! The objects, and what happened to them: the part of etcd and of its cache.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail};
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::kinds::Kind;
use crate::locked;

mod kept;
mod writes;

pub(crate) use writes::{Refused, keep_status};

/// Objects of any kinds, with a history.
#[derive(Debug)]
pub struct Store {
    state: Mutex<State>,
    changed: watch::Sender<u64>,
}

/// Something that happened to an object.
#[derive(Clone, Debug)]
pub(crate) struct Change {
    /// When: the object's `resourceVersion` after it.
    pub(crate) revision: u64,
    /// What: `ADDED`, `MODIFIED` or `DELETED`.
    pub(crate) what: &'static str,
    /// To which object.
    pub(crate) id: Id,
    /// The object after it, or, of a deletion, at last.
    pub(crate) object: Arc<Value>,
}

/// Names an object: group, kind, namespace, name.
pub(crate) type Id = (String, String, String, String);

#[derive(Debug, Default)]
struct State {
    kinds: Vec<Kind>,
    revision: u64,
    objects: BTreeMap<Id, Arc<Value>>,
    history: Vec<Change>,
    /// What happened at this revision or before is forgotten.
    compacted: u64,
    /// The rest of lists of which a page was given, by their token.
    rests: HashMap<String, (u64, Vec<Arc<Value>>)>,
    /// How many of those there ever were: no two have one token.
    pages: u64,
    /// What clients made, and where it is kept.
    made: kept::Made,
}

/// A page of a list.
#[derive(Debug)]
pub(crate) struct Page {
    pub(crate) revision: u64,
    pub(crate) items: Vec<Arc<Value>>,
    /// How to ask for the next one, and how much is left.
    pub(crate) rest: Option<(String, usize)>,
}

/// What was asked for is forgotten.
#[derive(Debug)]
pub(crate) struct Expired;

impl Store {
    /// A store for objects of these kinds.
    pub fn new(kinds: Vec<Kind>) -> Arc<Self> {
        // Later than all of an earlier store, as if what happened until now were forgotten: a program that is started
        // again does not know it, and a cluster never counts backwards.
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        let revision = since.map_or(1, |it| {
            it.as_secs() * 1_000_000 + u64::from(it.subsec_micros())
        });
        let state = State {
            kinds,
            revision,
            compacted: revision,
            ..State::default()
        };
        Arc::new(Self {
            state: Mutex::new(state),
            changed: watch::Sender::new(0),
        })
    }

    /// A store for everything that a mesh looks at.
    pub fn of_mesh() -> Arc<Self> {
        let mut kinds = Kind::all_built_in();
        kinds.extend(Kind::all_of_meshes());
        Self::new(kinds)
    }

    /// The kinds that are served now.
    pub fn kinds(&self) -> Vec<Kind> {
        locked(&self.state).kinds.clone()
    }

    /// Installs a kind, or other versions of it. Objects that it had are still there.
    pub fn install(&self, kind: Kind) {
        let mut state = locked(&self.state);
        state
            .kinds
            .retain(|it| (&it.group, &it.kind) != (&kind.group, &kind.kind));
        state.kinds.push(kind);
    }

    /// Does not serve a kind any more; its objects stay, unseen. Whoever removes a definition
    /// deletes them first.
    pub fn uninstall(&self, group: &str, kind: &str) {
        let mut state = locked(&self.state);
        state
            .kinds
            .retain(|it| it.group != group || it.kind != kind);
    }

    /// Whether there is an object of this kind and name.
    pub fn has(&self, object: &Value) -> bool {
        let state = locked(&self.state);
        let id = state.identify(object);
        id.is_ok_and(|it| state.objects.contains_key(&it))
    }

    /// Creates or replaces an object; one that is equal changes nothing. What is said about it at `/status` stays, if its
    /// kind has that.
    ///
    /// # Errors
    /// It has no kind that is served, or no name.
    pub fn apply(&self, object: &Value) -> anyhow::Result<()> {
        let mut state = locked(&self.state);
        let id = state.identify(object)?;
        let before = state.objects.get(&id).cloned();
        let mut object = object.clone();
        let fields = object.get_mut("metadata").and_then(Value::as_object_mut);
        let metadata = fields.context("no metadata")?;
        let kept = |field: &str| before.as_ref().map(|it| it["metadata"][field].clone());
        if !id.2.is_empty() {
            metadata.insert("namespace".to_owned(), json!(id.2));
        }
        // Another one whenever the object is made anew.
        let made = state.revision + 1;
        let uid = || json!(format!("made-as-{made}"));
        metadata
            .entry("uid")
            .or_insert_with(|| kept("uid").unwrap_or_else(uid));
        metadata
            .entry("creationTimestamp")
            .or_insert_with(|| kept("creationTimestamp").unwrap_or(json!("2026-01-01T00:00:00Z")));
        metadata.insert(
            "resourceVersion".to_owned(),
            kept("resourceVersion").unwrap_or_default(),
        );
        if state.has_status(&id) {
            writes::keep_status(&mut object, before.as_deref());
        }
        if before.as_deref() == Some(&object) {
            return Ok(());
        }
        let what = if before.is_some() {
            "MODIFIED"
        } else {
            "ADDED"
        };
        let object = state.record(what, id.clone(), object);
        state.objects.insert(id, object);
        self.announce(state.revision);
        Ok(())
    }

    /// Deletes an object, named by another or the same with at least kind and name.
    ///
    /// # Errors
    /// There is none.
    pub fn delete(&self, object: &Value) -> anyhow::Result<()> {
        let mut state = locked(&self.state);
        let id = state.identify(object)?;
        let last = state.objects.remove(&id);
        let last = last.with_context(|| format!("there is no {id:?}"))?;
        state.record("DELETED", id.clone(), last.as_ref().clone());
        state.unmade(&id);
        self.announce(state.revision);
        Ok(())
    }

    /// Deletes all objects of which this is so, by group, kind and namespace.
    pub(crate) fn delete_all(&self, is_one: impl Fn(&str, &str, &str) -> bool) {
        let mut state = locked(&self.state);
        let ids = state.objects.keys();
        let ids: Vec<Id> = ids
            .filter(|(group, kind, namespace, _)| is_one(group, kind, namespace))
            .cloned()
            .collect();
        for id in ids {
            if let Some(last) = state.objects.remove(&id) {
                state.record("DELETED", id.clone(), last.as_ref().clone());
                state.unmade(&id);
            }
        }
        self.announce(state.revision);
    }

    /// All objects.
    pub fn objects(&self) -> Vec<Arc<Value>> {
        locked(&self.state).objects.values().cloned().collect()
    }

    /// An object, by the name of its kind, its namespace if it has one, and its name.
    pub fn object(&self, kind: &str, namespace: &str, name: &str) -> Option<Arc<Value>> {
        let state = locked(&self.state);
        let kinds = state.kinds.iter().filter(|it| it.kind == kind);
        let mut found = kinds.filter_map(|it| {
            let namespace = if it.namespaced { namespace } else { "" };
            let [group, kind, namespace, name] =
                [it.group.as_str(), kind, namespace, name].map(str::to_owned);
            state.objects.get(&(group, kind, namespace, name))
        });
        found.next().cloned()
    }

    /// Forgets what happened until now, as etcd does every few minutes.
    pub fn compact(&self) {
        let mut state = locked(&self.state);
        state.compacted = state.revision;
        state.history.clear();
        state.rests.clear();
    }

    /// What is there after a restore from a backup that is made now: the objects, the count of revisions, and nothing of
    /// what happened before.
    pub fn backup(&self) -> Arc<Self> {
        let state = locked(&self.state);
        let state = State {
            kinds: state.kinds.clone(),
            revision: state.revision,
            objects: state.objects.clone(),
            compacted: state.revision,
            ..State::default()
        };
        Arc::new(Self {
            state: Mutex::new(state),
            changed: watch::Sender::new(0),
        })
    }

    /// The last revision.
    pub fn revision(&self) -> u64 {
        locked(&self.state).revision
    }

    /// Tells when there are new changes.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// The objects of a kind, in one namespace or all, as pages.
    pub(crate) fn list(
        &self,
        kind: &Kind,
        namespace: Option<&str>,
        limit: usize,
        token: Option<&str>,
    ) -> Result<Page, Expired> {
        let mut state = locked(&self.state);
        let (revision, mut items) = match token {
            // It may be asked for again.
            Some(token) => state.rests.get(token).cloned().ok_or(Expired)?,
            None => {
                let in_any = |(id, _): &(&Id, _)| namespace.is_none_or(|it| id.2 == it);
                let of_kind = state.of_kind(&kind.group, &kind.kind).filter(in_any);
                let items = of_kind.map(|(_, it)| it.clone()).collect();
                (state.revision, items)
            }
        };
        let mut rest = None;
        if items.len() > limit {
            let left = items.split_off(limit);
            state.pages += 1;
            let token = format!("page-{}", state.pages);
            rest = Some((token.clone(), left.len()));
            state.rests.insert(token, (revision, left));
        }
        Ok(Page {
            revision,
            items,
            rest,
        })
    }

    /// What happened to objects of a kind after a revision, and up to where that is.
    pub(crate) fn since(
        &self,
        kind: &Kind,
        namespace: Option<&str>,
        revision: u64,
    ) -> Result<(u64, Vec<Change>), Expired> {
        let state = locked(&self.state);
        if revision < state.compacted {
            return Err(Expired);
        }
        // Every watch asks after every change, however much there was before.
        let begin = state.history.partition_point(|it| it.revision <= revision);
        let after = state.history.iter().skip(begin);
        let of_kind = after.filter(|it| is_of(&it.id, kind, namespace));
        Ok((state.revision, of_kind.cloned().collect()))
    }

    fn announce(&self, revision: u64) {
        self.changed.send_replace(revision);
    }
}

impl State {
    fn identify(&self, object: &Value) -> anyhow::Result<Id> {
        let text = |pointer| object.pointer(pointer).and_then(Value::as_str);
        let version = text("/apiVersion").context("no apiVersion")?;
        let group = version.split_once('/').map_or("", |(group, _)| group);
        let name = text("/kind").context("no kind")?;
        let kind = self
            .kinds
            .iter()
            .find(|it| it.group == group && it.kind == name);
        let Some(kind) = kind else {
            bail!("{name} of {group:?} is not served");
        };
        let namespace = text("/metadata/namespace").unwrap_or("default");
        let namespace = if kind.namespaced { namespace } else { "" };
        Ok((
            group.to_owned(),
            name.to_owned(),
            namespace.to_owned(),
            text("/metadata/name").context("no name")?.to_owned(),
        ))
    }

    fn of_kind(&self, group: &str, kind: &str) -> impl Iterator<Item = (&Id, &Arc<Value>)> {
        let first = (
            group.to_owned(),
            kind.to_owned(),
            String::new(),
            String::new(),
        );
        let from = self.objects.range(first..);
        from.take_while(move |((of_group, of_kind, ..), _)| of_group == group && of_kind == kind)
    }

    fn has_status(&self, (group, name, ..): &Id) -> bool {
        let mut kinds = self.kinds.iter();
        kinds.any(|it| it.status && it.group == *group && it.kind == *name)
    }

    fn record(&mut self, what: &'static str, id: Id, mut object: Value) -> Arc<Value> {
        self.revision += 1;
        object["metadata"]["resourceVersion"] = json!(self.revision.to_string());
        let object = Arc::new(object);
        self.history.push(Change {
            revision: self.revision,
            what,
            id,
            object: object.clone(),
        });
        object
    }
}

fn is_of((group, name, of, _): &Id, kind: &Kind, namespace: Option<&str>) -> bool {
    *group == kind.group && *name == kind.kind && namespace.is_none_or(|it| of == it)
}
