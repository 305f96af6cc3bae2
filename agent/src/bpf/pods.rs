//! Enrolling pods: which entries a pod has in which maps, and in which order they come and go.
//! Nothing of a pod is redirected before all that handles it is there, and nothing is handled any
//! less before redirection stopped.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    net::IpAddr,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    os::unix::fs::MetadataExt,
};

use aya_obj::generated::bpf_attach_type::BPF_SK_LOOKUP;
use weft_ebpf_abi as abi;

use super::{Bpf, BpfError, ListenerRole, PodEntry, Tables, links, load};

impl Bpf {
    /// Meshes a pod: what arrives in its network namespace goes to the listeners, then its connects
    /// too. Repeating it with new listeners, as a new agent does for pods it finds, replaces those.
    /// The namespace of the agent itself is refused.
    pub fn enroll(
        &self,
        pod: &PodEntry,
        netns: BorrowedFd<'_>,
        listeners: [(ListenerRole, BorrowedFd<'_>); 3],
    ) -> Result<(), BpfError> {
        if pod.cookie == self.host_cookie {
            return Err(BpfError::HostNamespace);
        }
        let _change = self.ownership.change_own()?;
        let mut pods = self.pods();
        self.tables
            .pod_state
            .set_new(&pod.cookie, &abi::PodState::default())?;
        for (role, listener) in listeners {
            let socket = listener.as_raw_fd().unsigned_abs();
            self.tables
                .listeners
                .set(&listener_key(pod.cookie, role), &socket)?;
        }
        pods.write(&self.tables, pod)?;
        drop(pods);
        let mut legacy = self.legacy();
        let from_legacy = legacy.has(pod.cookie);
        if from_legacy {
            // What the other set's agent delivers, and the pod's connects to itself, must be published
            // for this set's lookup program before that is attached. If this set redirects the pod
            // already, it goes on.
            let aside = kernel_pod(pod, abi::Stance::Aside);
            self.tables.pods.set_new(&pod.cookie, &aside)?;
        }
        self.install_lookup(pod.cookie, netns)?;
        let serving = kernel_pod(pod, abi::Stance::Serving);
        self.tables.pods.set(&pod.cookie, &serving)?;
        if !from_legacy {
            Ok(())
        } else if self.ownership.has_predecessor()? {
            legacy.hand_over(pod.cookie)
        } else {
            legacy.done_with(pod.cookie)?;
            self.finish(&mut legacy)
        }
    }

    /// Puts a pod that is to be meshed, and cannot be enrolled, into the kernel's maps without
    /// listeners: it is refused everything. What is there already stays. All that can be done is
    /// done, whatever fails.
    pub fn refuse(&self, pod: &PodEntry, netns: BorrowedFd<'_>) -> Result<(), BpfError> {
        if pod.cookie == self.host_cookie {
            return Err(BpfError::HostNamespace);
        }
        let _change = self.ownership.change_own()?;
        let pin = self.links().join(links::lookup_pin(pod.cookie));
        let present = self.tables.pods.value(&pod.cookie);
        let attached = links::is_attached(&pin);
        if matches!((&present, &attached), (Ok(Some(_)), Ok(Some(true)))) {
            return Ok(());
        }
        // Without an entry of its own here a pod is refused as well.
        let state = self
            .tables
            .pod_state
            .set_new(&pod.cookie, &abi::PodState::default());
        let steered = self.install_lookup(pod.cookie, netns);
        let known = self.pods().write(&self.tables, pod);
        let serving = kernel_pod(pod, abi::Stance::Serving);
        let listed = self.tables.pods.set(&pod.cookie, &serving);
        listed.and(steered).and(known).and(state.map(drop))
    }

    /// Changes the addresses or probed ports of an enrolled pod.
    pub fn update(&self, pod: &PodEntry) -> Result<(), BpfError> {
        let _change = self.ownership.change_own()?;
        let mut pods = self.pods();
        pods.write(&self.tables, pod)?;
        if self.tables.pods.value(&pod.cookie)?.is_some() {
            let serving = kernel_pod(pod, abi::Stance::Serving);
            self.tables.pods.set(&pod.cookie, &serving)?;
        }
        Ok(())
    }

    /// Leaves a pod alone again. Connections that are open stay open.
    pub fn unenroll(&self, cookie: u64) -> Result<(), BpfError> {
        let _change = self.ownership.change_own()?;
        self.forget_pod(cookie)?;
        let mut legacy = self.legacy();
        legacy.done_with(cookie)?;
        self.finish(&mut legacy)
    }

    /// Takes the listeners and probe ports from a pod: all it connects, and all that is connected to
    /// it, is refused until it is enrolled again or unenrolled.
    pub fn close(&self, cookie: u64) -> Result<(), BpfError> {
        let _change = self.ownership.change_own()?;
        for role in ROLES {
            self.tables.listeners.remove(&listener_key(cookie, role))?;
        }
        self.pods().remove_probes(&self.tables, cookie)
    }

    /// Whether a pod's network namespace still is there.
    pub fn namespace(&self, cookie: u64) -> Result<Namespace, BpfError> {
        let pin = self.links().join(links::lookup_pin(cookie));
        let attached = match links::is_attached(&pin)? {
            Some(attached) => Some(attached),
            None => self.legacy().is_attached(cookie)?,
        };
        Ok(match attached {
            Some(true) => Namespace::Alive,
            Some(false) => Namespace::Gone,
            None => Namespace::Unknown,
        })
    }

    /// The addresses that a pod in the kernel has, whoever enrolled it.
    pub fn addresses(&self, cookie: u64) -> Vec<IpAddr> {
        let pods = self.pods();
        let entries = pods.entries.get(&cookie);
        let addresses = entries.into_iter().flat_map(|it| &it.addresses);
        let legacy = self.legacy();
        let earlier = legacy.addresses(cookie);
        addresses.chain(earlier).map(|it| (*it).into()).collect()
    }

    /// The cookies of all pods in the kernel, whoever enrolled them.
    pub fn enrolled(&self) -> Result<Vec<u64>, BpfError> {
        let mut cookies: BTreeSet<u64> = self.tables.pods.keys()?.into_iter().collect();
        cookies.extend(links::lookup_cookies(&self.links())?);
        cookies.extend(self.legacy().waiting());
        Ok(cookies.into_iter().collect())
    }

    /// Whether a pod is in the kernel, whoever put it there.
    pub fn is_enrolled(&self, cookie: u64) -> Result<bool, BpfError> {
        let is_listed = self.tables.pods.value(&cookie)?.is_some();
        let pin = self.links().join(links::lookup_pin(cookie));
        Ok(is_listed || links::is_attached(&pin)?.is_some() || self.legacy().has(cookie))
    }

    /// Removes what a pod has: redirection first, then the steering of what arrives, then what
    /// those used.
    pub(super) fn forget_pod(&self, cookie: u64) -> Result<(), BpfError> {
        let mut pods = self.pods();
        self.tables.pods.remove(&cookie)?;
        links::detach(&self.links().join(links::lookup_pin(cookie)))?;
        for role in ROLES {
            self.tables.listeners.remove(&listener_key(cookie, role))?;
        }
        pods.remove(&self.tables, cookie)?;
        for key in self.tables.pending.keys()? {
            if key.cookie == cookie {
                self.tables.pending.remove(&key)?;
            }
        }
        for key in self.tables.refused.keys()? {
            if key.cookie == cookie {
                self.tables.refused.remove(&key)?;
            }
        }
        self.tables.pod_state.remove(&cookie).map(drop)
    }

    pub(super) fn install_lookup(
        &self,
        cookie: u64,
        netns: BorrowedFd<'_>,
    ) -> Result<(), BpfError> {
        let name = links::lookup_pin(cookie);
        let inode = netns
            .try_clone_to_owned()
            .map(std::fs::File::from)
            .and_then(|file| file.metadata())
            .map_err(|source| BpfError::System {
                what: "reading a network namespace's inode",
                source,
            })?
            .ino();
        let loaded = self.lookups().load(cookie)?;
        let program = load::descriptor(&loaded, load::LOOKUP)?;
        let attach_type = load::attach_number(BPF_SK_LOOKUP);
        links::install(
            &self.links().join(&name),
            program.as_fd(),
            netns,
            inode,
            attach_type,
            &name,
        )
    }
}

/// Whether a pod's network namespace still is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Namespace {
    /// The lookup program is attached to it.
    Alive,
    /// The lookup program was attached to it, and no longer is.
    Gone,
    /// The lookup program never was attached.
    Unknown,
}

/// What the pods have in `OWN_ADDRESSES` and `PROBES`, so that a change is a difference.
#[derive(Debug, Default)]
pub(super) struct Pods {
    entries: HashMap<u64, Entries>,
}

#[derive(Debug, Default)]
struct Entries {
    addresses: HashSet<abi::Address>,
    probes: HashSet<abi::ProbeKey>,
}

impl Pods {
    /// What a previous agent left.
    pub(super) fn read(tables: &Tables) -> Result<Self, BpfError> {
        let mut pods = Self::default();
        for key in tables.own_addresses.keys()? {
            pods.entries
                .entry(key.cookie)
                .or_default()
                .addresses
                .insert(key.address);
        }
        for key in tables.probes.keys()? {
            if let Some(cookie) = tables.probes.value(&key)? {
                pods.entries.entry(cookie).or_default().probes.insert(key);
            }
        }
        Ok(pods)
    }

    fn write(&mut self, tables: &Tables, pod: &PodEntry) -> Result<(), BpfError> {
        let addresses: HashSet<abi::Address> =
            pod.addresses.iter().copied().map(Into::into).collect();
        let probes: HashSet<abi::ProbeKey> = addresses
            .iter()
            .flat_map(|address| {
                pod.probe_ports.iter().map(|port| abi::ProbeKey {
                    address: *address,
                    port: *port,
                    padding: 0,
                })
            })
            .collect();
        let present = self.entries.entry(pod.cookie).or_default();
        for gone in present.probes.difference(&probes) {
            remove_probe(tables, pod.cookie, gone)?;
        }
        for gone in present.addresses.difference(&addresses) {
            tables.own_addresses.remove(&abi::OwnAddressKey {
                cookie: pod.cookie,
                address: *gone,
            })?;
        }
        for address in &addresses {
            tables.own_addresses.set(
                &abi::OwnAddressKey {
                    cookie: pod.cookie,
                    address: *address,
                },
                &1,
            )?;
        }
        for probe in &probes {
            tables.probes.set(probe, &pod.cookie)?;
        }
        *present = Entries { addresses, probes };
        Ok(())
    }

    fn remove_probes(&mut self, tables: &Tables, cookie: u64) -> Result<(), BpfError> {
        if let Some(entries) = self.entries.get_mut(&cookie) {
            for probe in &entries.probes {
                remove_probe(tables, cookie, probe)?;
            }
            entries.probes.clear();
        }
        Ok(())
    }

    /// What cannot be removed stays known, so that it can be tried again.
    fn remove(&mut self, tables: &Tables, cookie: u64) -> Result<(), BpfError> {
        self.remove_probes(tables, cookie)?;
        if let Some(entries) = self.entries.get(&cookie) {
            for address in &entries.addresses {
                tables.own_addresses.remove(&abi::OwnAddressKey {
                    cookie,
                    address: *address,
                })?;
            }
        }
        self.entries.remove(&cookie);
        Ok(())
    }
}

/// Addresses get used again: the entry may be another pod's by now.
fn remove_probe(tables: &Tables, cookie: u64, probe: &abi::ProbeKey) -> Result<(), BpfError> {
    if tables.probes.value(probe)? == Some(cookie) {
        tables.probes.remove(probe)?;
    }
    Ok(())
}

fn kernel_pod(pod: &PodEntry, stance: abi::Stance) -> abi::Pod {
    let first = |wanted: fn(&&IpAddr) -> bool| {
        pod.addresses
            .iter()
            .find(wanted)
            .copied()
            .map(abi::Address::from)
            .unwrap_or_default()
    };
    abi::Pod {
        stance: stance as u32,
        spare: abi::SPARE,
        primary_v4: first(|address| address.is_ipv4()),
        primary_v6: first(|address| address.is_ipv6()),
    }
}

pub(super) fn listener_key(cookie: u64, role: ListenerRole) -> abi::ListenerKey {
    abi::ListenerKey {
        cookie,
        role: role as u32,
        padding: 0,
    }
}

pub(super) const ROLES: [ListenerRole; 3] = [
    ListenerRole::Outbound,
    ListenerRole::Tunnel,
    ListenerRole::Plaintext,
];
