//! The pods that are enrolled now, found by name or address without a lock.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use arc_swap::ArcSwap;
use serde::Serialize;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use weft_core::{Identity, NodePod, Workload, WorkloadId};

use super::cni::Announced;
use super::{EnrollError, PodThreads};
use crate::balance::PodBudgets;
use crate::bpf::Standing;
use crate::netns::Netns;
use crate::proxy::http::firsts::ServersFirst;
use crate::proxy::http::pool::Pool as Exchanges;
use crate::proxy::let_out::Departed;
use crate::proxy::limiters::Limiters;
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
    /// Nothing is handed over to it or from it past the CNI; may change, too.
    by_tunnels_only: AtomicBool,
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
    /// Where its servers speak first.
    pub(crate) servers_first: ServersFirst,
    /// What its flows run on.
    pub threads: PodThreads,
    /// What it uses of its limits.
    pub usage: Arc<Usage>,
    /// The connections that its HTTP exchanges leave by.
    pub exchanges: Arc<Exchanges>,
    /// How many requests it takes.
    pub limiters: Limiters,
    /// What has left it for somewhere else.
    pub departed: Departed,
    /// How many of its requests may be sent again that leave the cluster.
    pub retry_budgets: PodBudgets,
}

/// The enrolled pods and those that wait.
#[derive(Debug, Default)]
pub struct Pods {
    index: ArcSwap<Index>,
    /// Those that may have flows: from before they accept the first until after the last.
    with_flows: Mutex<Vec<Weak<LocalPod>>>,
    standing: watch::Sender<Standing>,
    hooks: ArcSwap<Hooks>,
    ended: AtomicU64,
    announced: Announced,
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
    /// The same, as metrics name it.
    pub label: &'static str,
    /// Whether somebody has to do something about it.
    pub is_fault: bool,
}

impl LocalPod {
    pub(super) fn new(
        description: &NodePod,
        record: &Arc<Workload>,
        identity: Identity,
        cookie: u64,
        (netns, netns_inode): (Arc<Netns>, u64),
        usage: Arc<Usage>,
        threads: PodThreads,
    ) -> Self {
        let end_flows = CancellationToken::new();
        Self {
            id: description.id.clone(),
            uid: description.uid.clone(),
            identity,
            record: ArcSwap::new(Arc::clone(record)),
            by_tunnels_only: AtomicBool::new(description.by_tunnels_only),
            cookie,
            netns,
            netns_inode,
            labels: PodLabels {
                id: description.id.clone(),
                owner: record.owner.clone(),
            },
            left: CancellationToken::new(),
            stop_accepting: CancellationToken::new(),
            departed: Departed::new(&end_flows),
            end_flows,
            accepting: TaskTracker::new(),
            flows: TaskTracker::new(),
            servers_first: ServersFirst::default(),
            threads,
            usage,
            exchanges: Arc::default(),
            limiters: Limiters::default(),
            retry_budgets: PodBudgets::default(),
        }
    }

    /// Runs one of its flows.
    pub fn spawn_flow(&self, flow: impl Future<Output = ()> + Send + 'static) {
        self.flows.spawn_on(flow, self.threads.handle());
    }

    /// Whether what it has with others of this node goes by tunnels, past the CNI, which has policies of its own for it.
    pub fn is_by_tunnels_only(&self) -> bool {
        self.by_tunnels_only.load(Ordering::Relaxed)
    }

    pub(super) fn set_by_tunnels_only(&self, it: bool) {
        self.by_tunnels_only.store(it, Ordering::Relaxed);
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

#[cfg(test)]
impl LocalPod {
    /// A pod in the namespace of the test.
    pub(crate) fn sample(id: &str) -> Arc<Self> {
        use crate::discovery::testing;
        use crate::proxy::limits::Limits;
        use crate::proxy::usage::KeptBytes;
        use weft_proto::Resource;
        let (Resource::NodePod(description), Resource::Workload(record)) =
            (testing::node_pod(id), testing::workload(id, &[]))
        else {
            unreachable!("they are of these kinds")
        };
        let netns = Netns::current().expect("there is one");
        let identity = record.identity().expect("meshed").clone();
        let usage = Usage::new(&Limits::default(), &KeptBytes::new(0));
        let threads = PodThreads::start().expect("started");
        let place = (Arc::new(netns), 0);
        let record = Arc::new(record);
        Arc::new(Self::new(
            &description,
            &record,
            identity,
            0,
            place,
            usage,
            threads,
        ))
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

    /// All pods that may have flows: those that are being enrolled, and those that left and whose flows are being
    /// finished, too.
    pub(crate) fn with_flows(&self) -> Vec<Arc<LocalPod>> {
        self.flowing().iter().filter_map(Weak::upgrade).collect()
    }

    /// A pod is about to accept its first flow.
    pub(crate) fn begins(&self, pod: &Arc<LocalPod>) {
        let mut pods = self.flowing();
        pods.retain(|it| it.strong_count() > 0);
        pods.push(Arc::downgrade(pod));
    }

    fn flowing(&self) -> MutexGuard<'_, Vec<Weak<LocalPod>>> {
        // Every change under the lock is complete in itself.
        self.with_flows
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
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

    /// How many connections of pods that joined the mesh were ended.
    pub fn ended(&self) -> u64 {
        self.ended.load(Ordering::Relaxed)
    }

    pub(super) fn count_ended(&self, connections: usize) {
        self.ended.fetch_add(connections as u64, Ordering::Relaxed);
    }

    /// Tells of changes of [`Pods::standing`].
    pub(crate) fn standings(&self) -> watch::Receiver<Standing> {
        self.standing.subscribe()
    }

    /// Where pods are that are being started.
    pub fn announced(&self) -> &Announced {
        &self.announced
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

    /// For the same reason, whatever was counted in telling it.
    fn is_known_to_wait(&self, waiting: &Waiting) -> bool {
        let index = self.index.load();
        let mut known = index.waiting.iter();
        known.any(|it| it.pod == waiting.pod && it.label == waiting.label)
    }

    pub(super) fn publish(
        &self,
        pods: impl Iterator<Item = Arc<LocalPod>>,
        waiting: Vec<(WorkloadId, EnrollError)>,
    ) {
        let mut index = Index::default();
        for (pod, error) in waiting {
            let reason = format!("{error}{}", error.exposure());
            index.waiting.push(Waiting {
                pod,
                reason,
                label: error.label(),
                is_fault: error.is_fault(),
            });
        }
        for waiting in &index.waiting {
            let is_told = matches!(waiting.label, "not_started" | "looked_for");
            if !is_told && !self.is_known_to_wait(waiting) {
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
