//! The kernel programs: loaded, pinned and attached once per node, found again by the next agent,
//! and told which network namespaces are meshed.
//!
//! Everything the kernel knows is in pinned maps, so that it goes on without the agent; [`Bpf`] is
//! a way to them. What is not here: opening listeners in pods (`node`), and what is done with
//! connections (`proxy`). `docs/interception.md` tells how the programs work together.

mod error;
mod legacy;
mod links;
mod load;
mod log;
mod mounts;
mod order;
mod ownership;
mod pods;
mod prepare;
mod repair;
mod seen;
mod sys;
mod table;
mod verify;

use std::{
    collections::BTreeSet,
    fs,
    net::{IpAddr, SocketAddr},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::fs::DirBuilderExt,
    },
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use weft_ebpf_abi as abi;

pub use self::{
    error::BpfError,
    mounts::{bpffs, cgroup2_root},
    order::{ConnectHook, ConnectProgram},
    ownership::Standing,
    pods::Namespace,
    prepare::prepare,
    seen::{HookInKernel, PodInKernel},
    verify::{AttachedHook, HookReport},
};
use self::{
    legacy::Legacy, links::Hook, load::Lookups, ownership::Ownership, pods::Pods, table::Table,
};
use crate::netns::Netns;
pub use abi::{ListenerRole, Reason};

/// Where the hooks go and how much a pod may use.
#[derive(Clone, Debug)]
pub struct BpfConfig {
    /// Folder on a BPF file system for this instance's pins, `<bpffs>/weft/<instance>`.
    pub pin_root: PathBuf,
    /// The control group (version 2) of the pods, or one above.
    pub cgroup: PathBuf,
    /// The control group of the kubelet, whose probes of the pods pass.
    pub kubelet_cgroup: Option<PathBuf>,
    /// Connections on the node that may be in the middle of opening. Maps that are pinned keep
    /// their size.
    pub max_pending: u32,
    /// The same per pod and direction.
    pub pending_quota: u32,
    /// Whether the programs log what they decide. Needs programs built with their `debug-log`
    /// feature.
    pub log: bool,
}

/// The kernel programs of an instance. Dropping it changes nothing in the kernel.
#[derive(Debug)]
pub struct Bpf {
    pin_root: PathBuf,
    folder: PathBuf,
    ownership: Ownership,
    hooks: Vec<Hook>,
    host_cookie: u64,
    constants: load::Constants,
    lookups: Mutex<Lookups>,
    tables: Tables,
    pods: Mutex<Pods>,
    legacy: Mutex<Legacy>,
}

/// What a pod is to the kernel programs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodEntry {
    /// Cookie of its network namespace.
    pub cookie: u64,
    /// Its addresses, the primary one of each family first.
    pub addresses: Vec<IpAddr>,
    /// The TCP ports that the kubelet probes.
    pub probe_ports: Vec<u16>,
}

/// What the kernel knows of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// A client's socket that was redirected.
    Redirected {
        /// Where the client wanted to go.
        original: SocketAddr,
    },
    /// A connection that the outbound listener accepted.
    Accepted {
        /// Where the client wanted to go.
        original: SocketAddr,
    },
    /// A connection that an application accepted from the agent.
    Delivered {
        /// What the application sees as its peer.
        client: SocketAddr,
    },
    /// The agent's own socket towards an application.
    AgentDeliver {
        /// What the application will see as its peer.
        client: SocketAddr,
    },
}

/// Counters of a pod.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PodCounters {
    /// Its connects that are in the middle of opening.
    pub pending_outbound: u64,
    /// Connects to it that are in the middle of opening.
    pub pending_inbound: u64,
    /// Refused because it had too many of those.
    pub quota_refusals: u64,
    /// Connects that were redirected to the agent.
    pub redirected: u64,
}

/// How full a map is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapOccupancy {
    /// Its name.
    pub map: &'static str,
    /// Entries in use.
    pub entries: usize,
    /// Entries it can hold.
    pub capacity: u32,
}

impl Bpf {
    /// Installs the programs, or takes over those of a previous agent: its maps are used as they
    /// are, its programs are replaced in place. Links to network namespaces that are gone are
    /// removed. The pods stay those of the previous agent, which may still run, until
    /// [`Bpf::claim`].
    pub fn open(config: &BpfConfig) -> Result<Self, BpfError> {
        let features = load::probe()?;
        let folder = config.pin_root.join(format!("v{}", abi::SCHEMA));
        // The owner may be about to remove the pins of this very layout, as an earlier one's; not once
        // it sees that somebody comes who uses them.
        make_folder(&config.pin_root)?;
        let ownership = Ownership::join(&config.pin_root)?;
        let change = ownership.change()?;
        for path in [folder.join(MAPS), folder.join(LINKS)] {
            make_folder(&path)?;
        }
        make_folder(&config.pin_root.join(SHARED))?;
        let host_cookie = Netns::current()
            .and_then(|netns| netns.cookie())
            .map_err(|source| BpfError::System {
                what: "reading the cookie of the own network namespace",
                source,
            })?;
        let constants = load::Constants {
            host_netns_cookie: host_cookie,
            pending_quota: config.pending_quota.into(),
            max_pending: config.max_pending,
            has_mptcp: features.mptcp,
            log: config.log,
        };
        let maps = folder.join(MAPS);
        let own_sockets = config.pin_root.join(SHARED).join(load::OWN_SOCKETS);
        let mut programs = load::cgroup_programs(&maps, &own_sockets, &constants)?;
        if config.log {
            log::start(&mut programs)?;
        }
        let bpf = Self {
            hooks: links::hooks(&config.cgroup, config.kubelet_cgroup.as_deref())?,
            host_cookie,
            constants,
            lookups: Mutex::new(Lookups::new(&maps, config.log)?),
            tables: Tables::open(&maps, &config.pin_root.join(SHARED))?,
            pods: Mutex::default(),
            legacy: Mutex::default(),
            pin_root: config.pin_root.clone(),
            folder,
            ownership,
        };
        *bpf.pods() = Pods::read(&bpf.tables)?;
        bpf.refresh_lookups()?;
        for hook in &bpf.hooks {
            let program = load::descriptor(&programs, hook.program)?;
            hook.install(&bpf.links(), program.as_fd())?;
        }
        bpf.remove_hooks_no_longer_wanted()?;
        // Last, as such a link may have been the one that worked.
        links::detach_unfinished(&bpf.links())?;
        drop(change);
        Ok(bpf)
    }

    /// Takes over: from now on this agent enrolls pods and lets go of them, and older ones no
    /// longer may. Repeating it changes nothing.
    ///
    /// # Errors
    /// A newer agent has taken over, or the kernel's state cannot be read.
    pub fn claim(&self) -> Result<(), BpfError> {
        let change = self.ownership.change()?;
        self.ownership.claim(&change)?;
        // The previous agent may have changed them until now.
        *self.pods() = Pods::read(&self.tables)?;
        *self.legacy() = Legacy::find(&self.pin_root, &self.folder)?;
        self.refuse_abandoned()?;
        self.retire(&change)
    }

    /// Removes what is left of other agents, of this layout or another, once nothing of it is used any
    /// more: no older agent runs that has connections through it, and no newer one that may need it.
    /// Newer ones that died before they took over leave something as well.
    pub fn retire_predecessors(&self) -> Result<(), BpfError> {
        let none_known = self.legacy().is_empty();
        if none_known && self.others_hooks()?.is_empty() && self.unknown()?.is_empty() {
            return Ok(());
        }
        let change = self.ownership.change_own()?;
        self.retire(&change)
    }

    fn retire(&self, _: &ownership::Change) -> Result<(), BpfError> {
        if self.is_accompanied()? {
            return Ok(());
        }
        for pin in self.others_hooks()? {
            links::detach(&self.links().join(pin))?;
        }
        let unknown = self.unknown()?;
        let mut legacy = self.legacy();
        legacy.add_unused(unknown)?;
        legacy.retire()
    }

    /// Removes other layouts whose last pod has gone.
    fn finish(&self, legacy: &mut Legacy) -> Result<(), BpfError> {
        if legacy.is_empty() || self.is_accompanied()? {
            return Ok(());
        }
        legacy.finish_if_empty()
    }

    /// Whether another agent runs. One that comes now waits until nobody changes anything.
    fn is_accompanied(&self) -> Result<bool, BpfError> {
        Ok(self.ownership.has_predecessor()? || self.ownership.has_successor()?)
    }

    /// Layouts that came after this agent took over.
    fn unknown(&self) -> Result<Vec<PathBuf>, BpfError> {
        self.legacy().unknown(&self.pin_root, &self.folder)
    }

    /// Lets older agents know that all pods are this one's now, so that they may close their
    /// listeners.
    pub fn settle(&self) -> Result<(), BpfError> {
        let change = self.ownership.change_own()?;
        self.ownership.settle(&change)
    }

    /// What this agent is to the kernel's state.
    pub fn standing(&self) -> Result<Standing, BpfError> {
        self.ownership.standing()
    }

    /// Whether an older agent of the instance runs.
    pub fn has_predecessor(&self) -> Result<bool, BpfError> {
        self.ownership.has_predecessor()
    }

    /// Whether a newer agent of the instance runs.
    pub fn has_successor(&self) -> Result<bool, BpfError> {
        self.ownership.has_successor()
    }

    /// What is known of a socket; `None` for one that arrived from outside, or that Weft has
    /// nothing to do with.
    pub fn flow(&self, socket: BorrowedFd<'_>) -> Result<Option<Flow>, BpfError> {
        let Some(raw) = self.tables.flows.value(&socket.as_raw_fd())? else {
            return Ok(None);
        };
        let address = SocketAddr::new(raw.address.into(), raw.port);
        Ok(match abi::FlowRole::from_raw(raw.role) {
            Some(abi::FlowRole::Redirected) => Some(Flow::Redirected { original: address }),
            Some(abi::FlowRole::Accepted) => Some(Flow::Accepted { original: address }),
            Some(abi::FlowRole::Delivered) => Some(Flow::Delivered { client: address }),
            Some(abi::FlowRole::AgentDeliver) => Some(Flow::AgentDeliver { client: address }),
            Some(abi::FlowRole::None | abi::FlowRole::Probe) | None => None,
        })
    }

    /// Marks a socket of the agent, before its connect, to be left alone.
    pub fn mark_outbound(&self, socket: BorrowedFd<'_>) -> Result<(), BpfError> {
        self.tables.own_sockets.set(&socket.as_raw_fd(), &OWN)
    }

    /// Marks a socket of the agent, before its connect, as a delivery to an application, which sees
    /// `client` as its peer.
    pub fn mark_deliver(&self, socket: BorrowedFd<'_>, client: SocketAddr) -> Result<(), BpfError> {
        let flow = abi::Flow {
            cookie: 0,
            address: client.ip().into(),
            port: client.port(),
            role: abi::FlowRole::AgentDeliver as u16,
            spare: abi::SPARE,
        };
        self.tables.flows.set(&socket.as_raw_fd(), &flow)
    }

    /// Lets the pod's connects to a destination be refused at once for a while.
    pub fn remember_refused(
        &self,
        cookie: u64,
        destination: SocketAddr,
        keep: Duration,
    ) -> Result<(), BpfError> {
        let until = u64::try_from((sys::monotonic() + keep).as_nanos()).unwrap_or(u64::MAX);
        self.tables
            .refused
            .set(&refused_key(cookie, destination), &until)
    }

    /// Takes that back.
    pub fn forget_refused(&self, cookie: u64, destination: SocketAddr) -> Result<(), BpfError> {
        self.tables
            .refused
            .remove(&refused_key(cookie, destination))
            .map(drop)
    }

    /// Refusals and misses of the programs since they were first installed, by reason.
    pub fn counters(&self) -> Result<Vec<(Reason, u64)>, BpfError> {
        let cpus = aya::util::nr_cpus().map_err(|(_, source)| BpfError::System {
            what: "counting the possible CPUs",
            source,
        })?;
        Reason::ALL
            .into_iter()
            .map(|reason| {
                let values = self
                    .tables
                    .counters
                    .values_per_cpu(&(reason as u32), cpus)?;
                Ok((reason, values.iter().sum()))
            })
            .collect()
    }

    /// Counters of a pod; `None` if it is not enrolled.
    pub fn pod_counters(&self, cookie: u64) -> Result<Option<PodCounters>, BpfError> {
        let state = self.tables.pod_state.value(&cookie)?;
        Ok(state.map(|state| PodCounters {
            // Entries that outlive an enrollment can bring the count of the next one below zero.
            pending_outbound: u64::try_from(state.pending_outbound).unwrap_or(0),
            pending_inbound: u64::try_from(state.pending_inbound).unwrap_or(0),
            quota_refusals: state.quota_refusals,
            redirected: state.redirected,
        }))
    }

    /// How full the maps are. Walks most of them.
    pub fn occupancy(&self) -> Result<Vec<MapOccupancy>, BpfError> {
        let tables = &self.tables;
        Ok(vec![
            occupied(&tables.pods)?,
            occupied(&tables.own_addresses)?,
            occupied(&tables.pending)?,
            occupied(&tables.listeners)?,
            occupied(&tables.probes)?,
            occupied(&tables.refused)?,
        ])
    }

    /// Checks that every hook has exactly one program of this instance. Pods whose network namespace
    /// is gone have none.
    pub fn verify(&self) -> Result<HookReport, BpfError> {
        // A link that is being made is not pinned yet.
        let _change = self.ownership.change()?;
        let cookies: BTreeSet<u64> = links::lookup_cookies(&self.links())?.into_iter().collect();
        let unsteered: Vec<String> = self
            .tables
            .pods
            .keys()?
            .into_iter()
            .filter(|cookie| !cookies.contains(cookie))
            .map(|cookie| format!("the pod {cookie:x} has no sk_lookup link"))
            .collect();
        if !unsteered.is_empty() {
            return Err(BpfError::Hooks {
                problems: unsteered,
            });
        }
        let maps = [self.tables.flows.id(), self.tables.pending.id()];
        verify::verify(&self.links(), &self.hooks, &cookies, &maps)
    }

    /// Removes everything this instance has in the kernel: its pods are no longer meshed.
    pub fn remove_all(&self) -> Result<(), BpfError> {
        Self::uninstall(&self.pin_root)
    }

    /// Removes everything of the instance with that pin root from the kernel, whichever version
    /// installed it.
    pub fn uninstall(pin_root: &Path) -> Result<(), BpfError> {
        for folder in legacy::versions(pin_root)? {
            legacy::remove(&folder)?;
        }
        legacy::remove_folder(&pin_root.join(SHARED))?;
        ownership::remove_all(pin_root)?;
        match fs::remove_dir(pin_root) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(BpfError::File {
                what: "removing",
                path: pin_root.into(),
                source: error,
            }),
            _ => Ok(()),
        }
    }

    /// Puts this agent's lookup program into the namespaces that a previous one left, and drops
    /// what is left of namespaces that are gone.
    fn refresh_lookups(&self) -> Result<(), BpfError> {
        for cookie in links::lookup_cookies(&self.links())? {
            let pin = self.links().join(links::lookup_pin(cookie));
            let Some(link) = links::open(&pin)? else {
                continue;
            };
            let failed = |source| BpfError::Attach {
                program: links::lookup_pin(cookie),
                source,
            };
            if sys::link_info(link.as_fd()).map_err(failed)?.target == 0 {
                drop(link);
                self.forget_pod(cookie)?;
                continue;
            }
            let loaded = self.lookups().load(cookie)?;
            let program = load::descriptor(&loaded, load::LOOKUP)?;
            sys::link_update(link.as_fd(), program.as_fd()).map_err(failed)?;
        }
        Ok(())
    }

    /// Pods that are aside here and that no other layout steers, whatever became of it: nobody would
    /// redirect them.
    fn refuse_abandoned(&self) -> Result<(), BpfError> {
        let legacy = self.legacy();
        for cookie in self.tables.pods.keys()? {
            if let Some(mut pod) = self.tables.pods.value(&cookie)?
                && pod.stance != abi::Stance::Serving as u32
                && !legacy.has(cookie)
            {
                pod.stance = abi::Stance::Serving as u32;
                self.tables.pods.set(&cookie, &pod)?;
            }
        }
        Ok(())
    }

    /// A previous agent may have had a kubelet to look at.
    fn remove_hooks_no_longer_wanted(&self) -> Result<(), BpfError> {
        if self.hooks.iter().any(|it| it.pin == load::PROBE_SOCK_OPS) {
            return Ok(());
        }
        links::detach(&self.links().join(load::PROBE_SOCK_OPS))
    }

    /// The pins of the hooks at other agents' cgroups.
    fn others_hooks(&self) -> Result<Vec<String>, BpfError> {
        let mut pins = links::agents_pins(&self.links())?;
        pins.retain(|pin| !self.hooks.iter().any(|hook| hook.pin == *pin));
        Ok(pins)
    }

    fn lookups(&self) -> MutexGuard<'_, Lookups> {
        self.lookups.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn links(&self) -> PathBuf {
        self.folder.join(LINKS)
    }

    fn pods(&self) -> MutexGuard<'_, Pods> {
        // What it guards is a copy of what the maps hold; a panic elsewhere does not spoil it.
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn legacy(&self) -> MutexGuard<'_, Legacy> {
        self.legacy.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The pinned maps.
#[derive(Debug)]
struct Tables {
    pods: Table<u64, abi::Pod>,
    own_addresses: Table<abi::OwnAddressKey, u8>,
    pod_state: Table<u64, abi::PodState>,
    flows: Table<i32, abi::Flow>,
    pending: Table<abi::TupleKey, abi::Pending>,
    listeners: Table<abi::ListenerKey, u32>,
    probes: Table<abi::ProbeKey, u64>,
    refused: Table<abi::RefusedKey, u64>,
    counters: Table<u32, u64>,
    own_sockets: Table<i32, u32>,
}

impl Tables {
    fn open(folder: &Path, shared: &Path) -> Result<Self, BpfError> {
        Ok(Self {
            pods: Table::open(folder, "PODS")?,
            own_addresses: Table::open(folder, "OWN_ADDRESSES")?,
            pod_state: Table::open(folder, "POD_STATE")?,
            flows: Table::open(folder, "FLOWS")?,
            pending: Table::open(folder, "PENDING")?,
            listeners: Table::open(folder, "LISTENERS")?,
            probes: Table::open(folder, "PROBES")?,
            refused: Table::open(folder, "REFUSED")?,
            counters: Table::open(folder, "COUNTERS")?,
            own_sockets: Table::open(shared, load::OWN_SOCKETS)?,
        })
    }
}

fn make_folder(path: &Path) -> Result<(), BpfError> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|source| BpfError::File {
            what: "creating",
            path: path.into(),
            source,
        })?;
    if !mounts::is_bpffs(path) {
        let _ = fs::remove_dir(path);
        return Err(BpfError::NotBpffs { path: path.into() });
    }
    Ok(())
}

fn refused_key(cookie: u64, destination: SocketAddr) -> abi::RefusedKey {
    abi::RefusedKey {
        cookie,
        address: destination.ip().into(),
        port: destination.port(),
        padding: [0; 3],
    }
}

fn occupied<K: aya::Pod, V: aya::Pod>(table: &Table<K, V>) -> Result<MapOccupancy, BpfError> {
    Ok(MapOccupancy {
        map: table.name(),
        entries: table.entries()?,
        capacity: table.capacity(),
    })
}

const MAPS: &str = "maps";
const LINKS: &str = "links";
/// What all layouts share.
const SHARED: &str = "shared";
/// The mark of an agent's socket: that there is one is what counts.
const OWN: u32 = 1;
