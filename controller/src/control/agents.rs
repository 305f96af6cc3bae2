//! The agents that are connected, and what they reject. A node has two for a while when its agent is
//! upgraded.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::Serialize;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use weft_core::Name;
use weft_proto::Key;

use super::rejections::{Changed, Rejections};
use crate::problems::{Problem, Problems, Scope};

/// The connected agents, by node.
#[derive(Debug, Default)]
pub struct Agents {
    state: Mutex<State>,
    problems: Problems,
    /// What is rejected changed.
    rejected: Notify,
}

#[derive(Debug, Default)]
struct State {
    next: u64,
    /// Oldest first; never empty.
    streams: HashMap<Name, Vec<Stream>>,
    rejections: Rejections,
}

#[derive(Debug)]
struct Stream {
    number: u64,
    incarnation: u64,
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
    /// Cancelled when the agent opens another stream, or the node has too many.
    pub replaced: CancellationToken,
}

/// A connected agent, for people.
#[derive(Debug, Serialize)]
pub struct AgentStatus {
    /// Its node.
    pub node: Name,
    /// Tells its processes apart: a node has two for a while when its agent is upgraded.
    pub incarnation: String,
    /// Its version.
    pub version: String,
    /// How many resources it rejects.
    pub rejected: usize,
}

/// An agent that rejects more than this is told apart by its count only.
pub(super) const MAX_REJECTIONS: usize = 1000;
/// How long to wait for what others say to the same: agents answer what they are sent within it.
const COLLECT: Duration = Duration::from_secs(1);
/// Processes of one node that may be connected: one that drains, one that serves, one that starts,
/// and one to spare. Beyond that, the oldest has to go.
const MAX_PER_NODE: usize = 4;

impl Agents {
    /// No agent yet.
    pub fn new(problems: Problems) -> Self {
        Self {
            state: Mutex::default(),
            problems,
            rejected: Notify::new(),
        }
    }

    /// Takes in a new stream of a node's agent. An older one of the same process is told to end.
    pub fn connect(self: &Arc<Self>, node: &Name, incarnation: u64, version: String) -> Connected {
        let mut state = self.locked();
        state.next += 1;
        let (number, replaced) = (state.next, CancellationToken::new());
        let stream = Stream {
            number,
            incarnation,
            replaced: replaced.clone(),
            version,
            rejected: BTreeMap::new(),
        };
        let streams = state.streams.entry(node.clone()).or_default();
        for older in streams.extract_if(.., |it| it.incarnation == incarnation) {
            older.replaced.cancel();
        }
        if streams.len() >= MAX_PER_NODE {
            streams.remove(0).replaced.cancel();
        }
        streams.push(stream);
        self.report(node, state);
        Connected {
            agents: self.clone(),
            node: node.clone(),
            number,
            replaced,
        }
    }

    /// How many are connected.
    pub fn count(&self) -> usize {
        self.locked().streams.values().map(Vec::len).sum()
    }

    /// All connected agents.
    pub fn list(&self) -> Vec<AgentStatus> {
        let state = self.locked();
        let streams = state.streams.iter();
        let streams = streams.flat_map(|(node, streams)| streams.iter().map(move |it| (node, it)));
        let status = |(node, stream): (&Name, &Stream)| AgentStatus {
            node: node.clone(),
            incarnation: format!("{:016x}", stream.incarnation),
            version: stream.version.clone(),
            rejected: stream.rejected.len(),
        };
        let mut list: Vec<_> = streams.map(status).collect();
        list.sort_by(|one, other| one.node.cmp(&other.node));
        list
    }

    /// Waits until agents reject something else than before; and then for what comes with it. May be dropped and called
    /// again, but what it waited for then counts as told.
    pub(crate) async fn rejections(&self) -> Changed {
        loop {
            let due = self.locked().rejections.due();
            let due = async {
                match due {
                    Some(due) => tokio::time::sleep_until(due).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! { () = self.rejected.notified() => {}, () = due => {} }
            tokio::time::sleep(COLLECT).await;
            let changed = self.locked().rejections.take(Instant::now());
            if !changed.is_empty() {
                return changed;
            }
        }
    }

    /// Says what agents of a node reject now.
    fn report(&self, node: &Name, mut state: MutexGuard<'_, State>) {
        let problems = state.problems_of(node);
        let is_new = state.take_rejections(node);
        drop(state);
        if is_new {
            self.rejected.notify_one();
        }
        self.problems
            .replace(Scope::Agent(node.to_string()), problems);
    }

    fn locked(&self) -> MutexGuard<'_, State> {
        // Single inserts and removes only: a panic elsewhere leaves it whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn stream(&mut self, node: &Name, number: u64) -> Option<&mut Stream> {
        let mut streams = self.streams.get_mut(node)?.iter_mut();
        streams.find(|it| it.number == number)
    }

    /// What agents of a node reject: two of them mostly the same.
    fn rejected_at<'a>(
        streams: &'a HashMap<Name, Vec<Stream>>,
        node: &Name,
    ) -> BTreeMap<&'a Key, &'a String> {
        let streams = streams.get(node).into_iter().flatten();
        streams.flat_map(|it| &it.rejected).collect()
    }

    fn take_rejections(&mut self, node: &Name) -> bool {
        let rejected = Self::rejected_at(&self.streams, node);
        let mut is_new = self.rejections.set(node, rejected);
        // What this one does not reject any more may have left room.
        for node in self.rejections.now_in_turn() {
            let rejected = Self::rejected_at(&self.streams, &node);
            is_new |= self.rejections.set(&node, rejected);
        }
        is_new
    }

    fn problems_of(&self, node: &Name) -> Vec<Problem> {
        let rejected = Self::rejected_at(&self.streams, node);
        let problem = |(key, reason): (&Key, &String)| Problem {
            file: None,
            document: None,
            object: Some(key.to_string()),
            field: String::new(),
            reason: format!("rejected by the agent of {node}: {reason}"),
            effect: "that agent keeps what it had before".to_owned(),
        };
        rejected.into_iter().map(problem).collect()
    }
}

impl Connected {
    /// The node that the agent is of.
    pub fn node(&self) -> &Name {
        &self.node
    }

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
        let mut state = self.agents.locked();
        let stream = state.stream(&self.node, self.number);
        stream.is_none_or(|it| it.rejected.is_empty())
    }

    fn change(&self, change: impl FnOnce(&mut BTreeMap<Key, String>)) {
        let mut state = self.agents.locked();
        let Some(stream) = state.stream(&self.node, self.number) else {
            return;
        };
        change(&mut stream.rejected);
        self.agents.report(&self.node, state);
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        let mut state = self.agents.locked();
        let Some(streams) = state.streams.get_mut(&self.node) else {
            return;
        };
        let before = streams.len();
        streams.retain(|it| it.number != self.number);
        if streams.len() == before {
            return;
        }
        if streams.is_empty() {
            state.streams.remove(&self.node);
        }
        self.agents.report(&self.node, state);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_may_have_two_agents_but_a_process_one_stream() {
        let agents = Arc::new(Agents::new(Problems::default()));
        let node: Name = "one".parse().expect("valid");
        let connect = |incarnation| agents.connect(&node, incarnation, String::new());
        let old = connect(1);
        let new = connect(2);
        assert!(!old.replaced.is_cancelled() && !new.replaced.is_cancelled());
        assert_eq!(agents.count(), 2);
        let again = connect(1);
        assert!(old.replaced.is_cancelled() && !new.replaced.is_cancelled());
        drop(old);
        assert_eq!(agents.count(), 2);
        let more = [3, 4].map(connect);
        assert!(!new.replaced.is_cancelled());
        let last = connect(5);
        // The oldest had to go.
        assert!(new.replaced.is_cancelled() && !again.replaced.is_cancelled());
        drop((new, again, more, last));
        assert_eq!((agents.count(), agents.list().len()), (0, 0));
    }

    #[test]
    fn what_either_agent_rejects_is_a_problem() {
        let problems = Problems::default();
        let agents = Arc::new(Agents::new(problems.clone()));
        let node: Name = "one".parse().expect("valid");
        let [old, new] = [1, 2].map(|it| agents.connect(&node, it, String::new()));
        let key = |name: &str| Key {
            kind: weft_proto::Kind::Workload,
            name: name.to_owned(),
        };
        old.rejects([(key("a/a"), "bad".to_owned())]);
        new.rejects([
            (key("a/a"), "bad".to_owned()),
            (key("a/b"), "bad".to_owned()),
        ]);
        assert_eq!(problems.list().len(), 2);
        drop(new);
        assert_eq!(problems.list().len(), 1);
        drop(old);
        assert_eq!(problems.list().len(), 0);
    }
}
