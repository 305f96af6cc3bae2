//! The agents that are connected, and what they reject.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::Serialize;
use tokio_util::sync::CancellationToken;
use weft_core::Name;
use weft_proto::Key;

use crate::problems::{Problem, Problems, Scope};

/// The connected agents, by node.
#[derive(Debug, Default)]
pub struct Agents {
    state: Mutex<State>,
    problems: Problems,
}

#[derive(Debug, Default)]
struct State {
    next: u64,
    streams: HashMap<Name, Stream>,
}

#[derive(Debug)]
struct Stream {
    number: u64,
    replaced: CancellationToken,
    version: String,
    rejected: BTreeMap<Key, String>,
}

/// An agent's stream, as long as it is open.
#[derive(Debug)]
pub struct Connected {
    agents: Arc<Agents>,
    node: Name,
    number: u64,
    /// Cancelled when the agent opens another stream.
    pub replaced: CancellationToken,
}

/// A connected agent, for people.
#[derive(Debug, Serialize)]
pub struct AgentStatus {
    /// Its node.
    pub node: Name,
    /// Its version.
    pub version: String,
    /// How many resources it rejects.
    pub rejected: usize,
}

/// An agent that rejects more than this is told apart by its count only.
const MAX_REJECTIONS: usize = 1000;

impl Agents {
    /// No agent yet.
    pub fn new(problems: Problems) -> Self {
        Self {
            state: Mutex::default(),
            problems,
        }
    }

    /// Takes in a new stream of a node's agent. An older one is told to end.
    pub fn connect(self: &Arc<Self>, node: &Name, version: String) -> Connected {
        let mut state = self.locked();
        state.next += 1;
        let (number, replaced) = (state.next, CancellationToken::new());
        let stream = Stream {
            number,
            replaced: replaced.clone(),
            version,
            rejected: BTreeMap::new(),
        };
        if let Some(older) = state.streams.insert(node.clone(), stream) {
            older.replaced.cancel();
        }
        drop(state);
        self.report(node, vec![]);
        Connected {
            agents: self.clone(),
            node: node.clone(),
            number,
            replaced,
        }
    }

    /// How many are connected.
    pub fn count(&self) -> usize {
        self.locked().streams.len()
    }

    /// All connected agents.
    pub fn list(&self) -> Vec<AgentStatus> {
        let state = self.locked();
        let status = |(node, stream): (&Name, &Stream)| AgentStatus {
            node: node.clone(),
            version: stream.version.clone(),
            rejected: stream.rejected.len(),
        };
        let mut list: Vec<_> = state.streams.iter().map(status).collect();
        list.sort_by(|one, other| one.node.cmp(&other.node));
        list
    }

    fn report(&self, node: &Name, problems: Vec<Problem>) {
        self.problems
            .replace(Scope::Agent(node.to_string()), problems);
    }

    fn locked(&self) -> MutexGuard<'_, State> {
        // Single inserts and removes only: a panic elsewhere leaves it whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Connected {
    /// Remembers what the agent rejects.
    pub fn rejects(&self, rejections: impl IntoIterator<Item = (Key, String)>) {
        self.change(|rejected| {
            for (key, reason) in rejections {
                if rejected.len() < MAX_REJECTIONS || rejected.contains_key(&key) {
                    rejected.insert(key, reason);
                }
            }
        });
    }

    /// Forgets rejections of what is sent anew.
    pub fn sends<'a>(&self, keys: impl IntoIterator<Item = &'a Key>) {
        if self.rejects_nothing() {
            return;
        }
        self.change(|rejected| {
            for key in keys {
                rejected.remove(key);
            }
        });
    }

    fn rejects_nothing(&self) -> bool {
        let state = self.agents.locked();
        let stream = state.streams.get(&self.node);
        stream.is_none_or(|it| it.rejected.is_empty())
    }

    fn change(&self, change: impl FnOnce(&mut BTreeMap<Key, String>)) {
        let mut state = self.agents.locked();
        let Some(stream) = state.streams.get_mut(&self.node) else {
            return;
        };
        if stream.number != self.number {
            return;
        }
        change(&mut stream.rejected);
        let problems = stream.rejected.iter().map(|(key, reason)| Problem {
            file: None,
            document: None,
            object: Some(key.to_string()),
            field: String::new(),
            reason: format!("rejected by the agent of {}: {reason}", self.node),
            effect: "that agent keeps what it had before".to_owned(),
        });
        let problems = problems.collect();
        drop(state);
        self.agents.report(&self.node, problems);
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        let mut state = self.agents.locked();
        let own = |it: &Stream| it.number == self.number;
        if state.streams.get(&self.node).is_some_and(own) {
            state.streams.remove(&self.node);
            drop(state);
            self.agents.report(&self.node, vec![]);
        }
    }
}
