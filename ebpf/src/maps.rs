//! The maps, all pinned by the agent under their names, and the constants it sets before loading.

use aya_ebpf::{
    Global,
    bindings::BPF_F_NO_PREALLOC,
    btf_maps::{HashMap, LruHashMap, PerCpuArray, SkStorage, SockHash},
    macros::btf_map,
};
use weft_ebpf_abi::{
    Flow, ListenerKey, NETNS_COOKIE_MARKER, OwnAddressKey, Pending, Pod, PodState, ProbeKey,
    Reason, RefusedKey, TupleKey,
};

/// Meshed network namespaces, by cookie.
#[btf_map]
pub static PODS: HashMap<u64, Pod, 4096, NO_PREALLOC> = HashMap::new();

/// The pods' own addresses.
#[btf_map]
pub static OWN_ADDRESSES: HashMap<OwnAddressKey, u8, 16384, NO_PREALLOC> = HashMap::new();

/// Quotas and counters per pod, by cookie.
#[btf_map]
pub static POD_STATE: HashMap<u64, PodState, 4096, NO_PREALLOC> = HashMap::new();

/// What a socket is to Weft.
#[btf_map]
pub static FLOWS: SkStorage<Flow> = SkStorage::new();

/// The sockets of agents of all layouts: those that connect, in a pod's namespace, to elsewhere. Pinned
/// beside the layouts: what one agent marks, the programs of another leave alone too.
#[btf_map]
pub static OWN_SOCKETS: SkStorage<u32> = SkStorage::new();

/// Connections being opened: from just before the SYN until the accepted socket is established.
#[btf_map]
pub static PENDING: HashMap<TupleKey, Pending, 65536, NO_PREALLOC> = HashMap::new();

/// The agent's listeners in the pods.
#[btf_map]
pub static LISTENERS: SockHash<ListenerKey, 12288> = SockHash::new();

/// Where kubelet probes go; the value is the pod's cookie.
#[btf_map]
pub static PROBES: HashMap<ProbeKey, u64, 16384, NO_PREALLOC> = HashMap::new();

/// Destinations that just refused; the value is until when.
#[btf_map]
pub static REFUSED: LruHashMap<RefusedKey, u64, 16384> = LruHashMap::new();

/// Refusals and misses by [`Reason`].
#[btf_map]
pub static COUNTERS: PerCpuArray<u64, { Reason::ALL.len() }> = PerCpuArray::new();

/// The agent's own network namespace, from which the kubelet probes.
#[unsafe(no_mangle)]
pub static HOST_NETNS_COOKIE: Global<u64> = Global::new(0);

/// The network namespace a lookup program serves, in the place of the marker.
#[unsafe(no_mangle)]
pub static NETNS_COOKIE: Global<u64> = Global::new(NETNS_COOKIE_MARKER);

/// How many entries of `PENDING` a pod may have in each direction.
#[unsafe(no_mangle)]
pub static PENDING_QUOTA: Global<i64> = Global::new(1024);

/// Whether the kernel leads from an MPTCP subflow to its connection (Linux 6.0). If not,
/// `getpeername` shows the loopback there.
#[unsafe(no_mangle)]
pub static HAS_MPTCP: Global<u8> = Global::new(0);

/// Counts a refusal or a miss.
#[inline(always)]
pub fn count(reason: Reason) {
    if let Some(counter) = COUNTERS.get_ptr_mut(reason as u32) {
        // SAFETY: this CPU's slot; the kernel does not migrate a running program, and a lost count
        // when an interrupt runs another program here is acceptable.
        unsafe { *counter = (*counter).wrapping_add(1) };
    }
}

const NO_PREALLOC: usize = BPF_F_NO_PREALLOC as usize;
