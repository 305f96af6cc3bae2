//! Taps: people watch exchanges and flows of some pods, by the agents that run these. Each agent is told on a stream that it
//! opened itself what it is to sample, and nothing is sampled any more when the stream or the tap ends.
//!
//! An agent is believed about its own pods and nothing else. Nobody waits for whoever watches: what there is no room for is
//! dropped, and counted.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::sync::{mpsc, watch};
use weft_core::{Name, Workload, WorkloadId};
use weft_proto::v1;

use crate::views::Views;

pub mod lines;
pub(super) mod stream;

use lines::Line;

/// Those who watch, and the agents that can sample.
#[derive(Debug)]
pub struct Taps {
    views: Arc<Views>,
    state: Mutex<State>,
    /// Other pods are watched, for agents.
    changed: watch::Sender<()>,
    /// Agents have come or gone, for those who watch.
    agents: watch::Sender<()>,
}

#[derive(Debug, Default)]
struct State {
    next: u64,
    taps: HashMap<u64, Tap>,
    /// Streams of each node.
    agents: HashMap<Name, usize>,
}

/// Somebody watches.
#[derive(Debug)]
struct Tap {
    /// Who watches.
    by: String,
    start: v1::TapStart,
    /// Where pods run that are watched.
    nodes: BTreeSet<Name>,
    lines: mpsc::Sender<Bytes>,
    counts: Arc<Counts>,
}

/// What whoever watches got, and what they did not.
#[derive(Debug, Default)]
pub struct Counts {
    /// Events that were passed on.
    pub events: AtomicU64,
    /// Events that there was no room for.
    pub dropped: AtomicU64,
}

/// A tap that is open until this is dropped.
#[derive(Debug)]
pub struct Open {
    taps: Arc<Taps>,
    id: u64,
    /// What there is no room for is dropped.
    lines: mpsc::Sender<Bytes>,
    /// What came of it.
    pub counts: Arc<Counts>,
    scope: Scope,
    /// What was found last.
    found: Option<Found>,
}

/// Some of the workloads; what is empty is any.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scope {
    /// In this namespace.
    pub namespace: String,
    /// Pods, or what has an owner of this kind.
    pub kind: String,
    /// Of that kind with this name.
    pub name: String,
}

/// Where pods are that somebody watches.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Found {
    pods: usize,
    nodes: BTreeSet<Name>,
    /// Of them those that have no agent here that can sample.
    missing: BTreeSet<Name>,
}

/// Too many watch already.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TooManyTaps {
    /// All together.
    #[error("{MOST_TAPS} taps are open at this controller already, and it serves no more")]
    Here,
    /// Of one account.
    #[error(
        "{MOST_OF_ONE} taps of this account are open at this controller already, and others have the rest"
    )]
    OfOne,
}

/// At the same time. Fewer than what an administrative endpoint serves, so that others are served, too.
const MOST_TAPS: usize = 16;
/// Of one account, so that nobody keeps all others from watching.
const MOST_OF_ONE: usize = 8;
/// Lines that wait to be read by whoever watches.
const LINES_WAITING: usize = 1024;

impl Scope {
    /// Whether a workload is among these.
    pub fn has(&self, id: &WorkloadId, workload: impl FnOnce() -> Option<Workload>) -> bool {
        let is = |wanted: &str, found: &Name| wanted.is_empty() || wanted == found.as_str();
        if !is(&self.namespace, &id.0.namespace) {
            return false;
        }
        match self.kind.as_str() {
            "" => true,
            "pod" => is(&self.name, &id.0.name),
            kind => workload()
                .and_then(|it| it.owner)
                .is_some_and(|it| it.kind.as_str() == kind && is(&self.name, &it.name)),
        }
    }
}

impl From<Scope> for v1::TapScope {
    fn from(scope: Scope) -> Self {
        let Scope {
            namespace,
            kind,
            name,
        } = scope;
        Self {
            namespace,
            kind,
            name,
        }
    }
}

impl Taps {
    /// None open.
    pub fn new(views: Arc<Views>) -> Self {
        Self {
            views,
            state: Mutex::default(),
            changed: watch::Sender::new(()),
            agents: watch::Sender::new(()),
        }
    }

    /// Opens one, for somebody by this name. Its lines come by the receiver.
    ///
    /// # Errors
    /// Too many are open.
    pub fn open(
        self: &Arc<Self>,
        by: &str,
        scope: Scope,
        mut start: v1::TapStart,
    ) -> Result<(Open, mpsc::Receiver<Bytes>), TooManyTaps> {
        let (lines, receiver) = mpsc::channel(LINES_WAITING);
        let counts = Arc::<Counts>::default();
        let mut state = self.locked();
        if state.taps.len() >= MOST_TAPS {
            return Err(TooManyTaps::Here);
        }
        if state.taps.values().filter(|it| it.by == by).count() >= MOST_OF_ONE {
            return Err(TooManyTaps::OfOne);
        }
        state.next += 1;
        let id = state.next;
        start.tap = id;
        start.target = Some(scope.clone().into());
        let tap = Tap {
            by: by.to_owned(),
            start,
            nodes: BTreeSet::new(),
            lines: lines.clone(),
            counts: Arc::clone(&counts),
        };
        state.taps.insert(id, tap);
        drop(state);
        let open = Open {
            taps: Arc::clone(self),
            id,
            lines,
            counts,
            scope,
            found: None,
        };
        Ok((open, receiver))
    }

    /// How many are open.
    pub fn count(&self) -> usize {
        self.locked().taps.len()
    }

    /// What a node's agent is to sample.
    fn of(&self, node: &Name) -> BTreeMap<u64, v1::TapStart> {
        let state = self.locked();
        let taps = state.taps.iter();
        let taps = taps.filter(|(_, it)| it.nodes.contains(node));
        taps.map(|(id, it)| (*id, it.start.clone())).collect()
    }

    /// Passes on what an agent has sampled.
    fn pass(&self, node: &Name, batch: v1::TapBatch) {
        let (lines, counts) = {
            let state = self.locked();
            let Some(tap) = state.taps.get(&batch.tap) else {
                // It has ended, which the agent has not heard yet.
                return;
            };
            (tap.lines.clone(), Arc::clone(&tap.counts))
        };
        let send = |line: Line<'_>| lines.try_send(line.written()).is_ok();
        let mut bad = 0;
        for event in batch.events {
            if lines.capacity() == 0 {
                counts.dropped.fetch_add(1, Ordering::Relaxed);
                continue;
            }
            let Some(line) = Line::event(node, event, |it| self.runs(node, it)) else {
                bad += 1;
                continue;
            };
            let counted = match send(line) {
                true => &counts.events,
                false => &counts.dropped,
            };
            counted.fetch_add(1, Ordering::Relaxed);
        }
        if bad > 0 {
            tracing::warn!(%node, events = bad, "an agent tells what cannot be, or is not its own");
        }
        let here = counts.dropped.swap(0, Ordering::Relaxed);
        let (dropped, left_out) = (batch.dropped.saturating_add(here), batch.left_out);
        let lost = Line::Lost {
            node,
            dropped,
            left_out,
        };
        if (dropped > 0 || left_out > 0) && !send(lost) {
            // Told with the next ones: what was left out is missing as well.
            let missing = dropped.saturating_add(left_out);
            counts.dropped.fetch_add(missing, Ordering::Relaxed);
        }
    }

    fn runs(&self, node: &Name, pod: &WorkloadId) -> bool {
        let workload = self.views.workload(pod);
        workload.is_some_and(|it| it.node == *node)
    }

    /// An agent does not sample.
    fn refuse(&self, node: &Name, ended: &v1::TapEnded) {
        let state = self.locked();
        if let Some(tap) = state.taps.get(&ended.tap) {
            let reason: String = ended.reason.chars().take(MOST_REASON).collect();
            let _ = tap.lines.try_send(Line::refused(node, reason).written());
        }
    }

    /// An agent can sample until this is dropped.
    fn enter(self: &Arc<Self>, node: &Name) -> Place {
        *self.locked().agents.entry(node.clone()).or_default() += 1;
        self.agents.send_replace(());
        Place {
            taps: Arc::clone(self),
            node: node.clone(),
        }
    }

    fn locked(&self) -> MutexGuard<'_, State> {
        // Single inserts and removes only: a panic elsewhere leaves it whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// More of what an agent says is not passed on.
const MOST_REASON: usize = 512;

/// An agent that can sample.
struct Place {
    taps: Arc<Taps>,
    node: Name,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = self.taps.locked();
        if let Some(count) = state.agents.get_mut(&self.node) {
            *count -= 1;
            if *count == 0 {
                state.agents.remove(&self.node);
            }
        }
        drop(state);
        self.taps.agents.send_replace(());
    }
}

impl Open {
    /// Says whenever agents come or go.
    pub fn agents(&self) -> watch::Receiver<()> {
        self.taps.agents.subscribe()
    }

    /// Says whenever pods come or go, and much else.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.taps.views.changes()
    }

    /// Looks where the pods are now, and lets their agents sample. Gives what is to be told about that, if it is new.
    pub fn look(&mut self) -> Option<Bytes> {
        let mut found = self.find();
        let mut state = self.taps.locked();
        let missing = found.nodes.iter();
        let missing = missing.filter(|it| !state.agents.contains_key(*it));
        found.missing = missing.cloned().collect();
        let tap = state.taps.get_mut(&self.id)?;
        let is_elsewhere = tap.nodes != found.nodes;
        tap.nodes.clone_from(&found.nodes);
        drop(state);
        if is_elsewhere {
            self.taps.changed.send_replace(());
        }
        if self.found.as_ref() == Some(&found) {
            return None;
        }
        self.found = Some(found);
        self.again()
    }

    /// What was told last about where the pods are.
    pub fn again(&self) -> Option<Bytes> {
        let found = self.found.as_ref()?;
        let line = Line::Scope {
            pods: found.pods,
            nodes: &found.nodes,
            missing: &found.missing,
        };
        Some(line.written())
    }

    fn find(&self) -> Found {
        let mut found = Found::default();
        let views = &self.taps.views;
        for node in views.nodes() {
            let pods = views.pods_of(&node).into_iter();
            let pods = pods.filter(|it| self.scope.has(it, || views.workload(it)));
            let pods = pods.count();
            if pods > 0 {
                found.pods += pods;
                found.nodes.insert(node);
            }
        }
        found
    }

    /// Waits until a line is on its way. False: nobody reads any more.
    pub async fn say(&self, line: Bytes) -> bool {
        self.lines.send(line).await.is_ok()
    }

    /// Waits until nobody reads any more.
    pub async fn closed(&self) {
        self.lines.closed().await;
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.taps.locked().taps.remove(&self.id);
        self.taps.changed.send_replace(());
    }
}

#[cfg(test)]
mod tests;
