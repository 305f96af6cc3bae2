//! The pods that are enrolled now, found by name or address without a lock.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use serde::Serialize;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use weft_core::{Identity, NodePod, Workload, WorkloadId};

use super::EnrollError;
use crate::bpf::Standing;
use crate::netns::Netns;
use crate::proxy::http::pool::Pool as Exchanges;
use crate::proxy::limiters::Limiters;
use crate::proxy::turns::Turns;
use crate::proxy::usage::Usage;
use crate::telemetry::PodLabels;

/// A meshed pod of this node while it is enrolled.
#[derive(Debug)]
pub struct LocalPod {
    /// Its name.
    pub id: WorkloadId,
    /// Tells it from another pod that had the same name.
    pub uid: String,
    /// Who it is.
    pub identity: Identity,
    /// Its record; addresses may change while it lives.
    pub record: ArcSwap<Workload>,
    /// The kernel's cookie of its network namespace.
    pub cookie: u64,
    /// Its network namespace.
    pub netns: Arc<Netns>,
    /// The namespace's inode number on nsfs.
    pub netns_inode: u64,
    /// How metrics name it.
    pub labels: PodLabels,
    /// Cancelled when it left the mesh: no flow to it is let in any more.
    pub left: CancellationToken,
    /// Cancelled when its listeners are to be closed.
    pub stop_accepting: CancellationToken,
    /// Cancelled when its flows are to be reset.
    pub end_flows: CancellationToken,
    /// What accepts at its listeners.
    pub accepting: TaskTracker,
    /// Its flows, in both directions.
    pub flows: TaskTracker,
    /// How they share the agent's threads with those of other pods.
    turns: Arc<Turns>,
    /// What it uses of its limits.
    pub usage: Arc<Usage>,
    /// The connections that its HTTP exchanges leave by.
    pub exchanges: Arc<Exchanges>,
    /// How many requests it takes.
    pub limiters: Limiters,
}

/// The enrolled pods and those that wait.
#[derive(Debug, Default)]
pub struct Pods {
    index: ArcSwap<Index>,
    standing: watch::Sender<Standing>,
    hooks: ArcSwap<Hooks>,
}

/// How the kernel programs are attached.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hooks {
    /// What is wrong with them, as they were looked at last.
    pub problem: Option<String>,
    /// How many this agent had to attach again.
    pub repaired: u64,
}

#[derive(Debug, Default)]
struct Index {
    by_id: HashMap<WorkloadId, Arc<LocalPod>>,
    by_address: HashMap<IpAddr, Arc<LocalPod>>,
    waiting: Vec<Waiting>,
}

/// A pod that is described but could not be enrolled yet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Waiting {
    /// Its name.
    pub pod: WorkloadId,
    /// Why.
    pub reason: String,
}

impl LocalPod {
    pub(super) fn new(
        description: &NodePod,
        record: &Arc<Workload>,
        identity: Identity,
        cookie: u64,
        (netns, netns_inode): (Arc<Netns>, u64),
        usage: Arc<Usage>,
    ) -> Self {
        Self {
            id: description.id.clone(),
            uid: description.uid.clone(),
            identity,
            record: ArcSwap::new(Arc::clone(record)),
            cookie,
            netns,
            netns_inode,
            labels: PodLabels {
                id: description.id.clone(),
                owner: record.owner.clone(),
            },
            left: CancellationToken::new(),
            stop_accepting: CancellationToken::new(),
            end_flows: CancellationToken::new(),
            accepting: TaskTracker::new(),
            flows: TaskTracker::new(),
            turns: Turns::new(description.id.clone(), usage.floods()),
            usage,
            exchanges: Arc::default(),
            limiters: Limiters::default(),
        }
    }

    /// Runs one of its flows.
    pub fn spawn_flow(&self, flow: impl Future<Output = ()> + Send + 'static) {
        self.flows.spawn(self.turns.pace(flow));
    }

    /// How its flows, and the tunnels that carry some, share the agent's threads.
    pub fn turns(&self) -> Arc<Turns> {
        Arc::clone(&self.turns)
    }

    /// Whether the address is one of the pod's own.
    pub fn has_address(&self, address: IpAddr) -> bool {
        self.record.load().addresses.contains(&address)
    }

    /// Waits for the flows that are open, for `grace` at most, then resets what is left.
    pub async fn finish_flows(&self, grace: Duration) {
        self.accepting.close();
        self.flows.close();
        let finished = async {
            // First what is in the queues becomes flows.
            self.accepting.wait().await;
            self.flows.wait().await;
        };
        if tokio::time::timeout(grace, finished).await.is_err() {
            self.end_flows.cancel();
            self.flows.wait().await;
        }
    }
}

impl Pods {
    /// The pod that has an address.
    pub fn at(&self, address: IpAddr) -> Option<Arc<LocalPod>> {
        self.index.load().by_address.get(&address).cloned()
    }

    /// The pod of a name.
    pub fn by_id(&self, id: &WorkloadId) -> Option<Arc<LocalPod>> {
        self.index.load().by_id.get(id).cloned()
    }

    /// All enrolled pods.
    pub fn all(&self) -> Vec<Arc<LocalPod>> {
        self.index.load().by_id.values().cloned().collect()
    }

    /// How many are enrolled.
    pub fn count(&self) -> usize {
        self.index.load().by_id.len()
    }

    /// The pods that could not be enrolled yet.
    pub fn waiting(&self) -> Vec<Waiting> {
        self.index.load().waiting.clone()
    }

    /// What this agent is to the node's pods.
    pub fn standing(&self) -> Standing {
        *self.standing.borrow()
    }

    /// How the kernel programs are attached.
    pub fn hooks(&self) -> Arc<Hooks> {
        self.hooks.load_full()
    }

    pub(crate) fn set_hooks(&self, problem: Option<String>, repaired: u64) {
        let repaired = self.hooks.load().repaired + repaired;
        self.hooks.store(Arc::new(Hooks { problem, repaired }));
    }

    /// Waits until a newer agent has all pods.
    pub async fn superseded(&self) {
        let superseded = |it: &Standing| matches!(it, Standing::Superseded { settled: true });
        // The sender lives as long as this.
        let _ = self.standing.subscribe().wait_for(superseded).await;
    }

    pub(super) fn stand(&self, standing: Standing) {
        self.standing.send_if_modified(|it| {
            let changed = *it != standing;
            *it = standing;
            changed
        });
    }

    pub(super) fn publish(
        &self,
        pods: impl Iterator<Item = Arc<LocalPod>>,
        waiting: Vec<(WorkloadId, EnrollError)>,
    ) {
        let mut index = Index::default();
        for (pod, error) in waiting {
            let reason = format!("{error}{}", error.exposure());
            index.waiting.push(Waiting { pod, reason });
        }
        for waiting in &index.waiting {
            if !self.index.load().waiting.contains(waiting) {
                tracing::warn!(pod = %waiting.pod, reason = waiting.reason, "pod cannot be enrolled yet");
            }
        }
        for pod in pods {
            for address in &pod.record.load().addresses {
                index.by_address.insert(*address, Arc::clone(&pod));
            }
            index.by_id.insert(pod.id.clone(), pod);
        }
        self.index.store(Arc::new(index));
    }
}
