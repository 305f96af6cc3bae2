//! The state that agents are to have, and what changed since any moment.
//!
//! Every change gets the next number. Whoever streams to an agent remembers one number, and asks
//! for what changed after it: however slow it is, what waits for it is never more than the state
//! itself, and an object that changed ten times meanwhile is sent once.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use bytes::Bytes;
use prost::Message;
use tokio::sync::watch;
use weft_core::{Name, ObjectName, Workload, WorkloadId};
use weft_proto::{Key, Kind, Resource, v1};

/// The state for all agents. Written by the index, read by streams.
#[derive(Debug)]
pub struct Views {
    state: RwLock<State>,
    changed: watch::Sender<u64>,
}

/// Which agents a resource is for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Audience {
    /// All of them.
    All,
    /// That of this node.
    Node(Name),
}

/// Changes of the state: whose, and of what; none: it is gone.
pub type Changes = BTreeMap<(Audience, Key), Option<Resource>>;

/// What an agent lacks.
#[derive(Debug, Default)]
pub struct Difference {
    /// Resources that are new or different.
    pub changed: Vec<Arc<Told>>,
    /// Resources that are gone.
    pub removed: Vec<Key>,
    /// Up to where this goes.
    pub upto: u64,
}

/// A resource as agents are told it: encoded once, however many they are.
#[derive(Debug)]
pub struct Told {
    /// Its name.
    pub key: Key,
    /// The hash of its content.
    pub version: u64,
    /// It, as a `Resource` of the protocol.
    pub encoded: Bytes,
}

/// The moment asked about is too long ago: what is gone since is not known any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("too far behind: removals since are not remembered any more")]
pub struct TooFarBehind;

#[derive(Debug, Default)]
struct State {
    /// The number of the last change.
    last: u64,
    /// Whether the source has told everything once.
    complete: bool,
    all: Layer,
    nodes: HashMap<Name, Layer>,
    /// Per node, the service accounts of its meshed pods, by number of pods.
    accounts: HashMap<Name, HashMap<ObjectName, usize>>,
}

#[derive(Debug, Default)]
struct Layer {
    entries: HashMap<Key, Entry>,
    /// Entries by the number of their last change.
    log: BTreeMap<u64, Key>,
    /// Numbers of the entries that stand for something gone, a part of `log`.
    gone: BTreeMap<u64, ()>,
    /// What was gone at this number or before is forgotten.
    forgotten: u64,
}

#[derive(Debug)]
struct Entry {
    number: u64,
    resource: Option<Arc<Told>>,
}

/// A resource may take this many bytes: far less than a message, so that no object of anybody can
/// end the streams of others.
pub const MAX_RESOURCE_BYTES: usize = 1024 * 1024;
/// How many removals are remembered for streams that are behind; who is further behind is compared with
/// what it holds. For each node far fewer: there are many nodes, and pods come and go on each for ever.
const REMEMBERED_REMOVALS: usize = 16_384;
const REMEMBERED_REMOVALS_OF_NODE: usize = 1_024;

impl Default for Views {
    fn default() -> Self {
        Self {
            state: RwLock::default(),
            changed: watch::Sender::new(0),
        }
    }
}

impl Views {
    /// Applies changes as one. What is no change disappears here; what is too large for a message
    /// is returned, and what was there before stays.
    pub fn apply(&self, changes: Changes) -> Vec<(Audience, Key)> {
        let mut too_large = vec![];
        let mut state = self.write();
        for ((audience, key), resource) in changes {
            let State {
                last, all, nodes, ..
            } = &mut *state;
            let resource = resource.map(v1::Resource::from);
            if resource.as_ref().is_some_and(is_too_large) {
                too_large.push((audience, key));
                continue;
            }
            let (layer, remembered) = match audience {
                Audience::All => (all, REMEMBERED_REMOVALS),
                Audience::Node(node) => {
                    (nodes.entry(node).or_default(), REMEMBERED_REMOVALS_OF_NODE)
                }
            };
            layer.put(last, key, resource);
            layer.forget(remembered);
        }
        let last = state.last;
        drop(state);
        self.announce(last);
        too_large
    }

    /// Says that the source has told everything once: from now on agents may be served.
    pub fn set_complete(&self) {
        let mut state = self.write();
        if state.complete {
            return;
        }
        state.complete = true;
        // Counts as a change, to wake those who wait for it.
        state.last += 1;
        let last = state.last;
        drop(state);
        self.announce(last);
    }

    /// Whether the state is complete.
    pub fn is_complete(&self) -> bool {
        self.read().complete
    }

    /// Waits until it is.
    pub async fn whole(&self) {
        let mut changes = self.changes();
        while !self.is_complete() && changes.changed().await.is_ok() {}
    }

    /// The number of the last change; changes whenever there is something to ask for.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// What changed for a node's agent after a moment.
    ///
    /// # Errors
    /// The moment is too long ago; compare with what the agent holds instead.
    pub fn since(&self, node: &Name, moment: u64) -> Result<Difference, TooFarBehind> {
        let state = self.read();
        let mut difference = Difference {
            upto: state.last,
            ..Difference::default()
        };
        for layer in state.layers(node) {
            if moment < layer.forgotten {
                return Err(TooFarBehind);
            }
            for key in layer.log.range(moment + 1..).map(|(_, key)| key) {
                match layer.entries.get(key).and_then(|it| it.resource.as_ref()) {
                    Some(resource) => difference.changed.push(resource.clone()),
                    None => difference.removed.push(key.clone()),
                }
            }
        }
        Ok(difference)
    }

    /// What an agent lacks that holds these versions.
    pub fn beyond(&self, node: &Name, held: HashMap<Key, u64>) -> Difference {
        let state = self.read();
        let mut held = held;
        let mut changed = vec![];
        for layer in state.layers(node) {
            for (key, entry) in &layer.entries {
                let Some(resource) = &entry.resource else {
                    continue;
                };
                if held.remove(key) != Some(resource.version) {
                    changed.push(resource.clone());
                }
            }
        }
        Difference {
            changed,
            removed: held.into_keys().collect(),
            upto: state.last,
        }
    }

    /// The version of a resource that a node's agent is to have, if it is to have one.
    pub fn version(&self, node: &Name, key: &Key) -> Option<u64> {
        let state = self.read();
        let mut layers = state.layers(node);
        layers.find_map(|it| Some(it.entries.get(key)?.resource.as_ref()?.version))
    }

    /// Counts pods of a service account on a node; certificates are signed while there are any.
    pub fn count_account(&self, node: &Name, account: &ObjectName, difference: isize) {
        let mut state = self.write();
        let accounts = state.accounts.entry(node.clone()).or_default();
        let count = accounts.entry(account.clone()).or_default();
        *count = count.saturating_add_signed(difference);
        if *count == 0 {
            accounts.remove(account);
        }
        if accounts.is_empty() {
            state.accounts.remove(node);
        }
    }

    /// Whether a meshed pod of a service account runs on a node.
    pub fn runs(&self, node: &Name, account: &ObjectName) -> bool {
        let state = self.read();
        let accounts = state.accounts.get(node);
        accounts.is_some_and(|it| it.contains_key(account))
    }

    /// The nodes that meshed pods run on.
    pub fn nodes(&self) -> BTreeSet<Name> {
        self.read().accounts.keys().cloned().collect()
    }

    /// The meshed pods of a node.
    pub fn pods_of(&self, node: &Name) -> Vec<WorkloadId> {
        let state = self.read();
        let layer = state.nodes.get(node);
        let entries = layer.into_iter().flat_map(|it| &it.entries);
        let pods = entries.filter(|(key, it)| key.kind == Kind::NodePod && it.resource.is_some());
        pods.filter_map(|(key, _)| key.name.parse().ok()).collect()
    }

    /// A workload, as all agents are told of it.
    pub fn workload(&self, id: &WorkloadId) -> Option<Workload> {
        let key = Key {
            kind: Kind::Workload,
            name: id.to_string(),
        };
        let told = {
            let state = self.read();
            state.all.entries.get(&key)?.resource.clone()?
        };
        match Resource::try_from(told.message().ok()?).ok()? {
            Resource::Workload(workload) => Some(workload),
            _ => None,
        }
    }

    /// How many resources there are per kind of audience: for all, and for single nodes.
    pub fn counts(&self) -> (usize, usize) {
        let state = self.read();
        let nodes = state.nodes.values().map(Layer::present).sum();
        (state.all.present(), nodes)
    }

    fn announce(&self, last: u64) {
        self.changed.send_if_modified(|seen| {
            let newer = *seen < last;
            *seen = (*seen).max(last);
            newer
        });
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        // A panic within `apply` could leave a batch half-applied, each entry whole: still the
        // best knowledge there is, and the next batch continues from it.
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Told {
    pub(crate) fn new(key: Key, message: &v1::Resource) -> Self {
        Self {
            key,
            version: message.version,
            encoded: message.encode_to_vec().into(),
        }
    }

    /// The message, for who looks into it.
    ///
    /// # Errors
    /// Never: it was one.
    pub fn message(&self) -> Result<v1::Resource, prost::DecodeError> {
        v1::Resource::decode(self.encoded.clone())
    }
}

impl State {
    fn layers(&self, node: &Name) -> impl Iterator<Item = &Layer> {
        std::iter::once(&self.all).chain(self.nodes.get(node))
    }
}

impl Layer {
    fn put(&mut self, last: &mut u64, key: Key, resource: Option<v1::Resource>) {
        let version = resource.as_ref().map(|it| it.version);
        let before = self.entries.get(&key);
        let version_before = before.and_then(|it| it.resource.as_ref().map(|it| it.version));
        if version == version_before {
            return;
        }
        if let Some(before) = before {
            self.log.remove(&before.number);
            self.gone.remove(&before.number);
        }
        *last += 1;
        if resource.is_none() {
            self.gone.insert(*last, ());
        }
        self.log.insert(*last, key.clone());
        let number = *last;
        let resource = resource.map(|it| Arc::new(Told::new(key.clone(), &it)));
        self.entries.insert(key, Entry { number, resource });
    }

    /// Forgets all removals but the latest.
    fn forget(&mut self, remembered: usize) {
        while self.gone.len() > remembered {
            let Some((number, ())) = self.gone.pop_first() else {
                return;
            };
            self.forgotten = number;
            if let Some(key) = self.log.remove(&number) {
                self.entries.remove(&key);
            }
        }
    }

    fn present(&self) -> usize {
        self.entries.len() - self.gone.len()
    }
}

fn is_too_large(resource: &v1::Resource) -> bool {
    resource.encoded_len() > MAX_RESOURCE_BYTES
}

#[cfg(test)]
mod tests {
    use weft_core::{Service, WorkloadPolicy};
    use weft_proto::Kind;

    use super::*;

    fn service(name: &str, address: &str) -> (Audience, Resource) {
        let service = Service {
            name: name.parse().expect("valid"),
            addresses: vec![address.parse().expect("valid")],
            ports: vec![],
            internal_traffic: Default::default(),
            failure_accrual: None,
        };
        (Audience::All, Resource::Service(service))
    }

    fn policy(node: &Name, workload: &str) -> (Audience, Resource) {
        let policy = WorkloadPolicy {
            workload: workload.parse().expect("valid"),
            default: weft_core::AccessPolicy::Deny,
            servers: vec![],
            network: None,
            network_egress: None,
        };
        (
            Audience::Node(node.clone()),
            Resource::WorkloadPolicy(policy),
        )
    }

    fn put(views: &Views, resources: impl IntoIterator<Item = (Audience, Resource)>) {
        let put =
            |(audience, resource): (_, Resource)| ((audience, resource.key()), Some(resource));
        views.apply(resources.into_iter().map(put).collect());
    }

    fn remove(views: &Views, name: &str) {
        let key = Key {
            kind: Kind::Service,
            name: name.to_owned(),
        };
        views.apply([((Audience::All, key), None)].into());
    }

    /// Names of what changed and of what is gone.
    fn named(difference: &Difference) -> (Vec<&str>, Vec<&str>) {
        let changed = difference.changed.iter().map(|it| it.key.name.as_str());
        let removed = difference.removed.iter().map(|it| it.name.as_str());
        (changed.collect(), removed.collect())
    }

    #[test]
    fn differences_hold_what_changed_once() {
        let views = Views::default();
        let (one, two): (Name, Name) =
            ("one".parse().expect("valid"), "two".parse().expect("valid"));
        put(
            &views,
            [
                service("a/a", "10.0.0.1"),
                service("a/b", "10.0.0.2"),
                policy(&one, "a/p"),
            ],
        );
        let all = views.since(&one, 0).expect("remembered");
        assert_eq!(named(&all), (vec!["a/a", "a/b", "a/p"], vec![]));
        let others = views.since(&two, 0).expect("remembered");
        assert_eq!(named(&others), (vec!["a/a", "a/b"], vec![]));

        // No change, many changes of one, and one that comes and goes.
        put(&views, [service("a/b", "10.0.0.2")]);
        assert_eq!(
            views.since(&one, all.upto).expect("remembered").upto,
            all.upto
        );
        for index in 1..10 {
            put(&views, [service("a/a", &format!("10.0.1.{index}"))]);
        }
        put(&views, [service("a/c", "10.0.0.3")]);
        remove(&views, "a/c");
        remove(&views, "a/unknown");
        let later = views.since(&one, all.upto).expect("remembered");
        assert_eq!(named(&later), (vec!["a/a"], vec!["a/c"]));
        assert_eq!(views.counts(), (2, 1));

        let held = all.changed.iter().map(|it| (it.key.clone(), it.version));
        let beyond = views.beyond(&one, held.collect());
        assert_eq!(named(&beyond), (vec!["a/a"], vec![]));
    }

    #[test]
    fn who_is_too_far_behind_is_told_so() {
        let views = Views::default();
        let node = "one".parse().expect("valid");
        put(&views, [service("a/stays", "10.0.0.1")]);
        let moment = views.since(&node, 0).expect("remembered").upto;
        let names: Vec<_> = (0..REMEMBERED_REMOVALS + 1)
            .map(|it| format!("a/{it}"))
            .collect();
        put(&views, names.iter().map(|name| service(name, "10.0.0.2")));
        for name in &names {
            remove(&views, name);
        }
        assert_eq!(
            views.since(&node, moment).expect_err("forgotten"),
            TooFarBehind
        );
        let beyond = views.beyond(&node, HashMap::new());
        assert_eq!(named(&beyond), (vec!["a/stays"], vec![]));
        let state = views.read();
        assert!(state.all.log.len() <= REMEMBERED_REMOVALS + 1);
        assert_eq!(state.all.log.len(), state.all.entries.len());
    }
}
