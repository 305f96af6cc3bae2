//! The pods that agents run in, as the source tells them: on which node each is, and which are gone.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{PoisonError, RwLock};

use tokio::sync::watch;
use weft_core::Name;

use crate::objects::{Object, ObjectKind};
use crate::source::{Batch, Change, Event};

/// The pods of one namespace.
#[derive(Debug)]
pub struct AgentPods {
    namespace: Name,
    state: RwLock<State>,
    changed: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct State {
    pods: HashMap<String, AgentPod>,
    /// Those that were deleted or replaced last: the API server may believe their tokens for a moment longer.
    gone: HashSet<String>,
    /// The same, oldest first.
    gone_in_order: VecDeque<String>,
}

/// A pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct AgentPod {
    /// Tells it from others that had or get its name.
    pub(super) uid: String,
    /// The node that it was scheduled to.
    pub(super) node: Option<Name>,
    /// Whether it has succeeded or failed.
    pub(super) ended: bool,
}

/// What is known of a pod that a token names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Known {
    /// Nothing: it may be too new.
    Nothing,
    /// It is there.
    There(AgentPod),
    /// Another one has its name.
    Replaced,
    /// It was deleted.
    Gone,
}

/// How many deleted pods are remembered: more than there are nodes in most clusters, all of which may get a new agent.
const REMEMBERED: usize = 8192;

impl AgentPods {
    /// No pod yet.
    pub fn new(namespace: Name) -> Self {
        Self {
            namespace,
            state: RwLock::default(),
            changed: watch::Sender::new(0),
        }
    }

    /// Takes in what a batch says about them.
    pub fn hear(&self, batch: &Batch) {
        let mut changed = false;
        for change in &batch.changes {
            let key = change.key();
            if key.kind != ObjectKind::Pod || key.namespace.as_ref() != Some(&self.namespace) {
                continue;
            }
            let name = key.name.as_str();
            changed |= match change {
                Change::Read(event) => self.take(name, event),
                Change::Written(written) => self.take(name, &written.read()),
            };
        }
        if changed {
            self.changed.send_modify(|it| *it += 1);
        }
    }

    /// Changes whenever something is known that may end a token.
    pub(super) fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// What is known of a pod.
    pub(super) fn find(&self, name: &str, uid: &str) -> Known {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        if state.gone.contains(uid) {
            return Known::Gone;
        }
        match state.pods.get(name) {
            None => Known::Nothing,
            Some(pod) if pod.uid == uid => Known::There(pod.clone()),
            Some(_) => Known::Replaced,
        }
    }

    fn take(&self, name: &str, event: &Event) -> bool {
        let now = match event {
            Event::Upsert { object, .. } => match object.as_ref() {
                Object::Pod(pod) => Some(AgentPod::of(pod)),
                _ => return false,
            },
            Event::Delete { .. } => None,
            // It is still there; where it is does not change in the life of a pod.
            Event::Invalid { .. } => return false,
        };
        // Each change is whole: a panic elsewhere leaves it so.
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        let before = match &now {
            Some(pod) => state.pods.insert(name.to_owned(), pod.clone()),
            None => state.pods.remove(name),
        };
        let Some(before) = before.filter(|it| now.as_ref() != Some(it)) else {
            return false;
        };
        if now.is_none_or(|it| it.uid != before.uid) {
            state.forget(before.uid);
        }
        true
    }
}

impl State {
    fn forget(&mut self, uid: String) {
        if self.gone.insert(uid.clone()) {
            self.gone_in_order.push_back(uid);
        }
        while self.gone.len() > REMEMBERED
            && let Some(oldest) = self.gone_in_order.pop_front()
        {
            self.gone.remove(&oldest);
        }
    }
}

impl AgentPod {
    fn of(pod: &k8s_openapi::api::core::v1::Pod) -> Self {
        let node = pod.spec.as_ref().and_then(|it| it.node_name.as_deref());
        let phase = pod.status.as_ref().and_then(|it| it.phase.as_deref());
        Self {
            uid: pod.metadata.uid.clone().unwrap_or_default(),
            node: node.and_then(|it| it.parse().ok()),
            ended: matches!(phase, Some("Succeeded" | "Failed")),
        }
    }
}
