//! One look at all processes for those of the pods that are to be found, and the choice among a pod's.
//!
//! **Which process' network namespace is the pod's.** All of a pod's containers share the one that its sandbox was made
//! with. A process of a container may have left it for one of its own, though, and would be glad if that were taken for
//! the pod's: it would be outside of the mesh. So of a pod's processes that one counts that
//!
//! 1. is in no container that the pod's status names: what is left is the sandbox, whose pause process runs nothing of
//!    the pod's;
//! 2. has run for the longest: the sandbox is there before all containers, and time cannot be forged;
//! 3. is called `pause`. Anybody may be called so, hence only among those that are otherwise equal.
//!
//! If others are in another network namespace, that process must be the sandbox's for certain: all of these are in
//! containers that the status names, and younger. Else nothing is chosen. That is so as long as the status names no
//! container, and for good where the runtime keeps no process for the sandbox (CRI-O, unless told otherwise). Whoever has `CAP_SYS_ADMIN` on the node is not bound by any of this, nor by anything else here.
//!
//! **What is never taken**: the host's network namespace; one that belongs to another user namespace than the agent's, as
//! all do that are made without privileges, unless the pod is to have one of its own (`hostUsers: false`); one that two pods seem to have, but for the one that is known
//! by its own UID; that of a process which is not
//! in the pod's control group any more once its namespace is open.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use weft_core::{ContainerId, NodePod};

use super::NotFound;
use super::cgroup::{NodeRoot, Placement, PodUid, placement};
use super::process::{Process, is_gone};
use super::sandbox::Looks;
use crate::netns::Netns;

/// A pod that is to be found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Wanted {
    /// Its UID, as its object has it.
    pub(super) uid: String,
    /// By which the kubelet may have called its control group: that of the object, and a static pod's.
    uids: Vec<PodUid>,
    containers: Vec<ContainerId>,
    class: Option<String>,
    own_users: bool,
}

/// Where a pod is: its network namespace, by a process in it.
#[derive(Debug)]
pub(crate) struct Place {
    process: Process,
    /// The namespace.
    pub(crate) netns: Arc<Netns>,
    /// Its inode.
    pub(crate) inode: u64,
    /// By what it is known of which pod the process is.
    pub(crate) trace: Trace,
}

/// What says of which pod a process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Trace {
    /// Its control group is called by the UID of the pod's object, which the API server gave.
    Uid,
    /// Or by that of a static pod, which an annotation of the object names.
    StaticUid,
    /// There is none of these, and the pod's status names the container.
    Container,
}

/// What is never a pod's, and what is the node's.
#[derive(Debug)]
pub(super) struct Host {
    proc: PathBuf,
    root: NodeRoot,
    netns: Vec<u64>,
    users: u64,
    directory: Option<(u64, u64)>,
}

impl Wanted {
    pub(super) fn new(pod: &NodePod) -> Self {
        let parsed = |text: &str| text.parse::<PodUid>().ok();
        let own = parsed(&pod.uid).filter(|it| !it.is_static());
        let of_static = pod.runtime.static_uid.as_deref().and_then(parsed);
        let of_static = of_static.filter(|it| it.is_static());
        Self {
            uid: pod.uid.clone(),
            uids: own.into_iter().chain(of_static).collect(),
            containers: pod.runtime.containers.clone(),
            class: pod.runtime.class.clone(),
            own_users: pod.runtime.own_users,
        }
    }

    /// What it is looked for by, as the end of a sentence.
    fn traces(&self) -> String {
        let uid = match self.uids.is_empty() {
            true => format!("({:?} is no UID that a kubelet has)", self.uid),
            false => format!("named pod{}", self.uid),
        };
        let containers = self.containers.iter().map(|it| &it.as_str()[..12]);
        let containers: Vec<&str> = containers.collect();
        match containers.is_empty() {
            true => uid,
            false => format!("{uid}, or of a container {}", containers.join(", ")),
        }
    }
}

impl Place {
    /// Whether the process still is there, and in that namespace.
    pub(crate) fn is_current(&self) -> bool {
        self.process
            .netns_inode()
            .is_ok_and(|inode| inode == self.inode)
    }

    /// When the process was started, in clock ticks since the machine was.
    pub(crate) fn started(&self) -> io::Result<u64> {
        self.process.started()
    }

    /// The number of the process.
    pub(crate) fn pid(&self) -> u32 {
        self.process.pid
    }
}

impl Trace {
    fn of(placement: &Placement) -> Self {
        match placement {
            Placement::Pod { uid, .. } if uid.is_static() => Self::StaticUid,
            Placement::Pod { .. } => Self::Uid,
            Placement::Container(_) => Self::Container,
        }
    }
}

impl Host {
    /// As it is now, by its `/proc`.
    pub(super) fn look(proc: &Path) -> io::Result<Self> {
        let own = Netns::current()?;
        // Without it the host's network namespace could be taken for a pod's.
        let look = || {
            let first = Process::open(proc, 1)?;
            let kernels = netns_of_kernel(proc);
            let netns = match first.netns_inode() {
                Err(error) => vec![kernels.map_err(|_| error)?],
                Ok(netns) => [netns].into_iter().chain(kernels).collect(),
            };
            let cgroup = first.read("cgroup")?;
            Ok((netns, cgroup, first.root().ok()))
        };
        let (mut netns, cgroup, directory) = look().map_err(of_process(1))?;
        netns.push(own.inode()?);
        Ok(Self {
            proc: proc.to_owned(),
            root: NodeRoot::of(&cgroup),
            netns,
            users: own.owner()?,
            directory,
        })
    }

    /// Whether a network namespace is the machine's, or this agent's.
    pub(super) fn has_netns(&self, inode: u64) -> bool {
        self.netns.contains(&inode)
    }

    /// Of which pod or container a process is.
    pub(super) fn placement(&self, cgroup: &str) -> Option<Placement> {
        placement(cgroup, &self.root)
    }

    /// The numbers of all processes.
    pub(super) fn pids(&self) -> io::Result<impl Iterator<Item = u32>> {
        let entries = fs::read_dir(&self.proc)?;
        Ok(entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()))
    }

    pub(super) fn proc(&self) -> &Path {
        &self.proc
    }

    pub(super) fn is_root_of(&self, process: &Process) -> bool {
        let directory = process.root().ok();
        directory.is_some() && directory == self.directory
    }
}

/// Looks for pods: where each is, or why that cannot be said, in the order of `wanted`.
pub(super) fn scan(host: &Host, wanted: &[Wanted]) -> io::Result<Vec<Result<Place, NotFound>>> {
    let mut index = Index::default();
    for (number, pod) in wanted.iter().enumerate() {
        for uid in &pod.uids {
            index.by_uid.entry(*uid).or_default().push(number);
        }
        for container in &pod.containers {
            index
                .by_container
                .entry(container)
                .or_default()
                .push(number);
        }
    }
    let mut surveys: Vec<Survey> = wanted.iter().map(|_| Survey::default()).collect();
    let mut owners = HashMap::new();
    let mut looked_at = 0;
    for pid in host.pids()? {
        looked_at += 1;
        let path = host.proc.join(pid.to_string()).join("cgroup");
        let cgroup = match fs::read(path) {
            Err(error) if is_gone(&error) => continue,
            // It may be a pod's, and then another were taken for its oldest.
            outcome => outcome.map_err(of_process(pid))?,
        };
        let cgroup = String::from_utf8_lossy(&cgroup);
        let Some(placement) = host.placement(&cgroup) else {
            continue;
        };
        for number in index.of(&placement) {
            let survey = &mut surveys[*number];
            survey.processes += 1;
            match examine(host, pid, &placement, &wanted[*number], &mut owners) {
                Ok(Some(seen)) => survey.add(seen, &wanted[*number]),
                Ok(None) => survey.of_host += 1,
                Err(error) if is_gone(&error) => survey.processes -= 1,
                Err(error) => survey.error = Some(of_process(pid)(error)),
            }
        }
    }
    let surveys = surveys.into_iter().zip(wanted);
    let found = surveys.map(|(survey, wanted)| survey.outcome(wanted, host, looked_at));
    Ok(alone(found.collect()))
}

#[derive(Default)]
struct Index<'a> {
    by_uid: HashMap<PodUid, Vec<usize>>,
    by_container: HashMap<&'a ContainerId, Vec<usize>>,
}

impl Index<'_> {
    /// The pods that a process may be of. A container's ID is looked at only where no UID is.
    fn of(&self, placement: &Placement) -> &[usize] {
        let found = match placement {
            Placement::Pod { uid, .. } => self.by_uid.get(uid),
            Placement::Container(container) => self.by_container.get(container),
        };
        found.map(Vec::as_slice).unwrap_or_default()
    }
}

/// A process of a pod.
struct Seen {
    process: Process,
    netns: Netns,
    inode: u64,
    rank: Rank,
    is_of_other_users: bool,
    looks: Looks,
    trace: Trace,
}

/// The least is chosen: see above.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Rank {
    is_of_container: bool,
    started: u64,
    is_not_pause: bool,
    pid: u32,
}

/// Looks at a process that seems to be a pod's. None: it is in the host's network.
fn examine(
    host: &Host,
    pid: u32,
    placement: &Placement,
    wanted: &Wanted,
    owners: &mut HashMap<u64, Option<u64>>,
) -> io::Result<Option<Seen>> {
    let process = Process::open(&host.proc, pid)?;
    let inode = process.netns_inode()?;
    if host.has_netns(inode) {
        return Ok(None);
    }
    let netns = process.netns()?;
    // It may have been another's number, and a process may be moved; and it may go elsewhere.
    let is_same = host.placement(&process.read("cgroup")?).as_ref() == Some(placement);
    let opened = netns.inode()?;
    if !is_same || opened != inode {
        return Err(io::Error::from_raw_os_error(libc::ESRCH));
    }
    let owner = *owners.entry(inode).or_insert_with(|| netns.owner().ok());
    let container = match placement {
        Placement::Pod { container, .. } => container.as_ref(),
        Placement::Container(container) => Some(container),
    };
    let comm = process.comm()?;
    let rank = Rank {
        is_of_container: container.is_some_and(|it| wanted.containers.contains(it)),
        started: process.started()?,
        is_not_pause: comm != PAUSE,
        pid,
    };
    Ok(Some(Seen {
        looks: Looks::of(&process, &comm, host, wanted.class.as_deref()),
        trace: Trace::of(placement),
        is_of_other_users: owner != Some(host.users),
        process,
        netns,
        inode,
        rank,
    }))
}

/// What was seen of a pod.
#[derive(Default)]
struct Survey {
    processes: usize,
    of_host: usize,
    of_other_users: usize,
    best: Option<Seen>,
    /// The network namespaces that may be its own. They are not held, as there may be many.
    namespaces: HashMap<u64, Inside>,
    looks: Option<Looks>,
    /// One of those that look like a sandbox is in no container that the status names.
    is_sandbox_apart: bool,
    error: Option<io::Error>,
}

/// Those in a network namespace.
struct Inside {
    /// When the first of them started.
    since: u64,
    /// All of them are of containers that the status names.
    are_of_containers: bool,
}

impl Survey {
    fn add(&mut self, seen: Seen, wanted: &Wanted) {
        self.looks = Some(match self.looks {
            None => seen.looks,
            Some(looks) => looks.and(seen.looks),
        });
        self.is_sandbox_apart |= seen.looks.sandbox().is_some() && !seen.rank.is_of_container;
        if seen.is_of_other_users && !wanted.own_users {
            self.of_other_users += 1;
            return;
        }
        let inside = self.namespaces.entry(seen.inode).or_insert(Inside {
            since: seen.rank.started,
            are_of_containers: true,
        });
        inside.since = inside.since.min(seen.rank.started);
        inside.are_of_containers &= seen.rank.is_of_container;
        if self.best.as_ref().is_none_or(|it| seen.rank < it.rank) {
            self.best = Some(seen);
        }
    }

    /// Whether a process is of the sandbox for certain, or all are where it is.
    fn is_certain(&self, seen: &Seen) -> bool {
        let mut others = self.namespaces.iter().filter(|it| *it.0 != seen.inode);
        others.all(|(_, it)| {
            !seen.rank.is_of_container && it.are_of_containers && seen.rank.started < it.since
        })
    }

    fn outcome(self, wanted: &Wanted, host: &Host, looked_at: usize) -> Result<Place, NotFound> {
        if let Some(error) = self.error {
            return Err(NotFound::Denied(error.to_string()));
        }
        // What is in a container of the pod's may look like anything.
        let sandbox = self.looks.and_then(Looks::sandbox);
        if let Some(sandbox) = sandbox.filter(|_| self.is_sandbox_apart) {
            return Err(NotFound::Sandboxed(sandbox));
        }
        if let Some(seen) = &self.best
            && !self.is_certain(seen)
        {
            return Err(NotFound::Ambiguous(self.namespaces.len()));
        }
        if let Some(seen) = self.best {
            return Ok(Place {
                process: seen.process,
                netns: Arc::new(seen.netns),
                inode: seen.inode,
                trace: seen.trace,
            });
        }
        if self.of_other_users > 0 {
            return Err(NotFound::OtherUsers(self.of_other_users));
        }
        if self.of_host > 0 {
            return Err(NotFound::HostNetwork(self.of_host));
        }
        Err(NotFound::Nowhere {
            traces: wanted.traces(),
            looked_at,
            proc: host.proc.display().to_string(),
        })
    }
}

/// A network namespace that two pods seem to have is neither's, unless just one is known by its own UID: nobody can write
/// that, but what makes for the other traces.
fn alone(mut found: Vec<Result<Place, NotFound>>) -> Vec<Result<Place, NotFound>> {
    let mut claims: HashMap<u64, (usize, usize)> = HashMap::new();
    for place in found.iter().flatten() {
        let (all, by_uid) = claims.entry(place.inode).or_default();
        *all += 1;
        *by_uid += usize::from(place.trace == Trace::Uid);
    }
    for outcome in &mut found {
        let is_shared = outcome.as_ref().is_ok_and(|it| {
            let (all, by_uid) = claims[&it.inode];
            all > 1 && !(by_uid == 1 && it.trace == Trace::Uid)
        });
        if is_shared {
            *outcome = Err(NotFound::Shared);
        }
    }
    found
}

/// That of the kernel's threads is the machine's first one. Where process 2 is none of these, the node is a container.
fn netns_of_kernel(proc: &Path) -> io::Result<u64> {
    let second = Process::open(proc, 2)?;
    match second.is_kernels()? {
        true => second.netns_inode(),
        false => Err(io::ErrorKind::NotFound.into()),
    }
}

/// Says which process an error is about.
fn of_process(pid: u32) -> impl FnOnce(io::Error) -> io::Error {
    move |error| io::Error::new(error.kind(), format!("process {pid}: {error}"))
}

/// The program that keeps a sandbox's namespaces.
const PAUSE: &str = "pause";

#[cfg(test)]
#[path = "scan_tests.rs"]
mod tests;
