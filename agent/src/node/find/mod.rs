//! Finds the pods of this node: the network namespace of each, by the processes in its control group.
//!
//! Nobody says where a pod's namespace is: neither its object, which whoever may write pods can forge, nor the runtime,
//! each of which would have to be asked in another way. But the kubelet names the control group of a pod by its UID, and
//! the kernel says of each process in which control group and in which namespaces it is. `cgroup` reads the former,
//! `scan` chooses the process and says what is trusted, and why.
//!
//! A look at all processes costs some microseconds for each, so it is done only while a pod that is wanted is not found,
//! by a thread of its own, which rests after each for twenty times as long as it used a CPU, but never for more than two
//! seconds. Where a pod is stays known by a
//! descriptor of its process, and so does when that has ended: then the pod is looked for again, as it may have a new
//! sandbox.

mod cgroup;
mod nodes_cgroups;
mod process;
mod sandbox;
mod scan;

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};
use tokio::sync::watch;
use weft_core::NodePod;

pub use cgroup::{NodeRoot, NotUid, Placement, PodUid, placement};
pub use nodes_cgroups::{Cgroups, CgroupsError, cgroups};
pub use sandbox::Sandbox;
pub(crate) use scan::Place;
use scan::{Host, Wanted, scan};

use super::threads;

/// Why it cannot be said where a pod is.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotFound {
    /// It was not looked for yet.
    #[error("its processes are being looked for")]
    NotYet,
    /// It has none.
    #[error(
        "no process is in a control group {traces} (looked at {looked_at} processes in {proc}{})",
        few(*.looked_at)
    )]
    Nowhere {
        /// By what it was looked for.
        traces: String,
        /// How many processes there are.
        looked_at: usize,
        /// Where.
        proc: String,
    },
    /// All of them are in the host's network.
    #[error("all of its processes ({0}) are in the node's own network namespace")]
    HostNetwork(usize),
    /// Another pod seems to be there, too.
    #[error("its network namespace seems to be another pod's, too, and is neither's")]
    Shared,
    /// No sandbox is seen, and its processes are not together.
    #[error(
        "its processes are in {0} network namespaces, and none is of its sandbox for certain, so it cannot be told which is the pod's (where the runtime keeps no process for the sandbox: use the CNI plugin, or drop_infra_ctr = false of CRI-O)"
    )]
    Ambiguous(usize),
    /// Anybody may make such a namespace.
    #[error(
        "all of its processes ({0}) are in network namespaces of other users than the node's, and its object does not say hostUsers: false"
    )]
    OtherUsers(usize),
    /// The kernel does not let them be looked at.
    #[error("its processes cannot be looked at: {0} (CAP_SYS_PTRACE and CAP_SYS_ADMIN are needed)")]
    Denied(String),
    /// Its sockets are not the node's.
    #[error("it runs in {}, whose connections the node's kernel does not see: it cannot be meshed", .0.name())]
    Sandboxed(Sandbox),
    /// Processes cannot be listed.
    #[error("listing the processes in {proc}: {error}")]
    Proc {
        /// Where.
        proc: String,
        /// What the kernel said.
        error: String,
    },
}

/// What is known of where a pod is.
pub(crate) type Finding = Result<Arc<Place>, NotFound>;

/// Looks for pods. The thread ends with it.
#[derive(Debug)]
pub(crate) struct Finder {
    shared: Arc<Shared>,
    changes: watch::Receiver<u64>,
}

#[derive(Debug)]
struct Shared {
    proc: PathBuf,
    state: Mutex<State>,
    wake: Condvar,
}

#[derive(Debug, Default)]
struct State {
    wanted: Vec<Wanted>,
    findings: HashMap<String, Finding>,
    /// Something else is wanted since the last look.
    is_new: bool,
    is_over: bool,
}

impl Finder {
    /// Starts a thread that looks at the processes in this `/proc` as soon as something is wanted.
    pub(crate) fn start(proc: &Path) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            proc: proc.to_owned(),
            state: Mutex::default(),
            wake: Condvar::new(),
        });
        let (changed, changes) = watch::channel(0);
        let finder = Self {
            shared: Arc::clone(&shared),
            changes,
        };
        std::thread::Builder::new()
            .name("weft-find".to_owned())
            .spawn(move || {
                threads::come_as_any();
                shared.run(&changed);
            })?;
        Ok(finder)
    }

    /// These pods are to be found, and what is known of others is forgotten.
    pub(crate) fn want<'a>(&self, pods: impl Iterator<Item = &'a NodePod>) {
        let wanted: Vec<Wanted> = pods.map(Wanted::new).collect();
        let mut state = self.shared.state();
        if state.wanted == wanted {
            return;
        }
        let State {
            wanted: before,
            findings,
            ..
        } = &mut *state;
        // What was found out by other traces is found out again.
        findings.retain(|uid, _| {
            let now = wanted.iter().find(|it| it.uid == *uid);
            now.is_some() && now == before.iter().find(|it| it.uid == *uid)
        });
        state.is_new = wanted.iter().any(|it| !state.wanted.contains(it));
        state.wanted = wanted;
        self.shared.wake.notify_all();
    }

    /// A process that was found has ended, before the pod was enrolled: nobody waits to look again.
    pub(crate) fn look_again(&self) {
        self.shared.state().is_new = true;
        self.shared.wake.notify_all();
    }

    /// Where a pod is that is wanted.
    pub(crate) fn finding(&self, uid: &str) -> Finding {
        let state = self.shared.state();
        state
            .findings
            .get(uid)
            .cloned()
            .unwrap_or(Err(NotFound::NotYet))
    }

    /// Counts up whenever something was found, or is not found for another reason than before. It is closed if nothing
    /// is looked for any more.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changes.clone()
    }
}

impl Drop for Finder {
    fn drop(&mut self) {
        self.shared.state().is_over = true;
        self.shared.wake.notify_all();
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // Every change under the lock is complete in itself.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `changed` ends with the thread, whatever ends that.
    fn run(&self, changed: &watch::Sender<u64>) {
        let mut pause = SHORTEST_PAUSE;
        loop {
            let Some(missing) = self.next() else {
                return;
            };
            let began = cpu_time();
            let found = Host::look(&self.proc).and_then(|host| scan(&host, &missing));
            let took = cpu_time().saturating_sub(began);
            if self.note(&missing, found) {
                changed.send_modify(|it| *it += 1);
            }
            tracing::debug!(wanted = missing.len(), ?took, "looked for pods");
            if !self.rest(rest_after(took), pause) {
                return;
            }
            pause = match self.state().is_new {
                true => SHORTEST_PAUSE,
                false => (pause + pause / 2).min(LONGEST_PAUSE),
            };
        }
    }

    /// Waits until a pod is to be looked for. None: nobody wants to know any more.
    fn next(&self) -> Option<Vec<Wanted>> {
        let mut state = self.state();
        loop {
            if state.is_over {
                return None;
            }
            let missing = |it: &&Wanted| {
                let found = state.findings.get(&it.uid);
                !found.is_some_and(|it| it.as_ref().is_ok_and(|it| it.is_current()))
            };
            let missing: Vec<Wanted> = state.wanted.iter().filter(missing).cloned().collect();
            if !missing.is_empty() {
                state.is_new = false;
                return Some(missing);
            }
            // One that was found may be lost without anybody's word, before it is enrolled.
            let waited = match state.wanted.is_empty() {
                true => self.wake.wait(state).map_err(PoisonError::into_inner),
                false => {
                    let waited = self.wake.wait_timeout(state, LONGEST_PAUSE);
                    Ok(waited.unwrap_or_else(PoisonError::into_inner).0)
                }
            };
            state = waited.unwrap_or_else(|state| state);
        }
    }

    /// Whether something is new.
    fn note(&self, missing: &[Wanted], found: io::Result<Vec<Result<Place, NotFound>>>) -> bool {
        let found = found.unwrap_or_else(|error| {
            let failed = || match error.kind() {
                io::ErrorKind::PermissionDenied => NotFound::Denied(error.to_string()),
                _ => NotFound::Proc {
                    proc: self.proc.display().to_string(),
                    error: error.to_string(),
                },
            };
            missing.iter().map(|_| Err(failed())).collect()
        });
        let mut state = self.state();
        let mut has_changed = false;
        for (wanted, outcome) in missing.iter().zip(found) {
            // By now it may be wanted by other traces, or not at all.
            if !state.wanted.contains(wanted) {
                continue;
            }
            let finding = outcome.map(Arc::new);
            if let Ok(place) = &finding {
                let (uid, pid, by) = (&wanted.uid, place.pid(), place.trace);
                tracing::debug!(uid, pid, ?by, netns = place.inode, "a pod is found");
            }
            has_changed |= match (&finding, state.findings.get(&wanted.uid)) {
                (Err(now), Some(Err(before))) => !now.is_like(before),
                _ => true,
            };
            state.findings.insert(wanted.uid.clone(), finding);
        }
        has_changed
    }

    /// Rests for that long at least, and for the pause unless something new is wanted. False: it is over.
    fn rest(&self, least: Duration, pause: Duration) -> bool {
        let began = Instant::now();
        let mut state = self.state();
        loop {
            if state.is_over {
                return false;
            }
            let least = least.max(SHORTEST_PAUSE);
            let until = match state.is_new {
                true => least,
                false => least.max(pause),
            };
            let Some(left) = until.checked_sub(began.elapsed()) else {
                return true;
            };
            let waited = self.wake.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl NotFound {
    /// Whether it is the same but for what is counted.
    fn is_like(&self, other: &Self) -> bool {
        match (self, other) {
            (
                Self::Nowhere { traces, proc, .. },
                Self::Nowhere {
                    traces: others,
                    proc: where_else,
                    ..
                },
            ) => traces == others && proc == where_else,
            (Self::HostNetwork(_), Self::HostNetwork(_))
            | (Self::Ambiguous(_), Self::Ambiguous(_))
            | (Self::OtherUsers(_), Self::OtherUsers(_)) => true,
            _ => self == other,
        }
    }
}

/// What the calling thread has used of a CPU. How long it waited for one, as on a busy node, is not its doing.
fn cpu_time() -> Duration {
    let used = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID);
    used.map(Duration::from).unwrap_or_default()
}

fn rest_after(took: Duration) -> Duration {
    (took * REST).min(LONGEST_PAUSE)
}

/// On a node there are always more.
fn few(processes: usize) -> &'static str {
    match processes < FEW {
        true => ": does the agent see the node's, by hostPID?",
        false => "",
    }
}

const FEW: usize = 20;
/// How long is rested after a look, in times of what it used of a CPU: less than 5 percent.
const REST: u32 = 20;
/// Between two looks while something is not found, at first and at last.
const SHORTEST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_look_is_paid_for_by_what_it_used() {
        assert_eq!(
            rest_after(Duration::from_millis(10)),
            Duration::from_millis(200)
        );
        assert_eq!(rest_after(Duration::from_secs(3)), LONGEST_PAUSE);
        let (began, before) = (Instant::now(), cpu_time());
        std::thread::sleep(Duration::from_millis(300));
        let used = cpu_time().saturating_sub(before);
        assert!(used < Duration::from_millis(100), "{used:?}");
        // It is counted at all.
        while cpu_time().saturating_sub(before) < Duration::from_millis(20) {
            assert!(began.elapsed() < Duration::from_secs(30), "it stands");
        }
    }
}
