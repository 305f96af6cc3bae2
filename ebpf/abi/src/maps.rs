//! The keys and values. Every structure is `repr(C)` with explicit padding that is zero.
//!
//! What another layout's agent reads and writes while pods move from one set of programs to the other
//! is the same in every layout: see [`crate::SCHEMA`].

use crate::Address;

/// What fills a structure up to a multiple of eight bytes; zero. The size of it is what layouts
/// differ in when upgrades between two of them are tested.
#[cfg(not(feature = "next-layout"))]
pub type Spare = u32;
/// The same in a layout that is nobody's but the tests'.
#[cfg(feature = "next-layout")]
pub type Spare = [u32; 3];

/// The only value of [`Spare`].
#[cfg(not(feature = "next-layout"))]
pub const SPARE: Spare = 0;
/// The only value of [`Spare`].
#[cfg(feature = "next-layout")]
pub const SPARE: Spare = [0; 3];

/// Value of `PODS`, by network namespace cookie. A namespace that is not in there is untouched.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pod {
    /// A [`Stance`]. First in every layout.
    pub stance: u32,
    /// Zero.
    pub spare: Spare,
    /// Shown by `getsockname` of redirected IPv4 sockets; all zero: none.
    pub primary_v4: Address,
    /// Shown by `getsockname` of redirected IPv6 sockets; all zero: none.
    pub primary_v6: Address,
}

/// What a set of programs does for a pod.
#[repr(u32)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Stance {
    /// It redirects the pod's connects.
    #[default]
    Serving = 0,
    /// Programs of another layout redirect them, so this set leaves connects alone. It still publishes
    /// what goes to the pod itself: its own lookup program must let that pass too.
    Aside = 1,
}

/// Key of `OWN_ADDRESSES`, in every layout.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct OwnAddressKey {
    /// Network namespace cookie.
    pub cookie: u64,
    /// An address of the pod.
    pub address: Address,
}

/// Value of `POD_STATE`, by network namespace cookie: written by the kernel, read by the agent.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PodState {
    /// Entries in `PENDING` for connects of the pod (signed: see [`Direction`]).
    pub pending_outbound: i64,
    /// Entries in `PENDING` for connects to the pod.
    pub pending_inbound: i64,
    /// Refused because the pod's share of `PENDING` was used up.
    pub quota_refusals: u64,
    /// Connects that were redirected.
    pub redirected: u64,
}

/// Which share of a pod an entry of `PENDING` counts against. Two shares, so that a flood of
/// connects to a pod does not keep it from connecting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Connects of the pod's applications.
    Outbound,
    /// Connects to the pod's applications: the agent's deliveries and the kubelet's probes.
    Inbound,
}

/// What `FLOWS` knows about a socket.
#[repr(u16)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlowRole {
    /// Nothing (a socket that was redirected once and now connects to somewhere untouched).
    None = 0,
    /// A client's socket; the address is the destination it asked for.
    Redirected = 1,
    /// The agent's accepted socket; the address is the destination the client asked for.
    Accepted = 2,
    /// An application's accepted socket; the address is the real client's.
    Delivered = 3,
    /// The agent's own socket that delivers to an application; the address is the real client's.
    AgentDeliver = 5,
    /// A probing socket of the kubelet; `cookie` is the probed pod's.
    Probe = 6,
}

impl FlowRole {
    /// The role by its number in the map.
    pub const fn from_raw(raw: u16) -> Option<Self> {
        Some(match raw {
            0 => Self::None,
            1 => Self::Redirected,
            2 => Self::Accepted,
            3 => Self::Delivered,
            5 => Self::AgentDeliver,
            6 => Self::Probe,
            _ => return None,
        })
    }
}

/// Value of `FLOWS`, a socket storage map.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flow {
    /// Network namespace cookie under which a probe was published; else 0.
    pub cookie: u64,
    /// See [`FlowRole`].
    pub address: Address,
    /// Host byte order.
    pub port: u16,
    /// A [`FlowRole`].
    pub role: u16,
    /// Zero.
    pub spare: Spare,
}

/// Key of `PENDING`: a connection that is being opened, seen from the client.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TupleKey {
    /// Cookie of the network namespace where the SYN arrives.
    pub cookie: u64,
    /// Who connects.
    pub client: Address,
    /// To whom, as on the wire.
    pub server: Address,
    /// Host byte order.
    pub client_port: u16,
    /// Host byte order.
    pub server_port: u16,
    /// Zero.
    pub spare: Spare,
}

/// What a published tuple means.
#[repr(u16)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PendingKind {
    /// To the outbound listener; the address is the destination the client asked for.
    Redirect = 1,
    /// To the application; the address is the real client's.
    Deliver = 2,
    /// A pod's connect to itself: to the application.
    SelfConnect = 3,
    /// A probe of the kubelet: to the application.
    Probe = 4,
}

impl PendingKind {
    /// Which share it counts against, by the number in the map.
    #[inline(always)]
    pub const fn direction(raw: u16) -> Direction {
        if raw == Self::Redirect as u16 || raw == Self::SelfConnect as u16 {
            Direction::Outbound
        } else {
            Direction::Inbound
        }
    }
}

/// Value of `PENDING`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pending {
    /// Cookie of the connecting socket: only its owner clears an entry.
    pub owner: u64,
    /// See [`PendingKind`].
    pub address: Address,
    /// Host byte order.
    pub port: u16,
    /// A [`PendingKind`].
    pub kind: u16,
    /// Zero.
    pub spare: Spare,
}

/// Which of the agent's listeners in a pod.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ListenerRole {
    /// Takes the redirected connects of the pod's applications.
    Outbound = 0,
    /// Takes other agents' tunnels (port 15008).
    Tunnel = 1,
    /// Takes everything else that arrives at the pod.
    Plaintext = 2,
}

/// Key of `LISTENERS`, in every layout.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ListenerKey {
    /// Network namespace cookie.
    pub cookie: u64,
    /// A [`ListenerRole`].
    pub role: u32,
    /// Zero.
    pub padding: u32,
}

/// Key of `PROBES`: where a kubelet's probe goes. The value is the pod's network namespace cookie.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ProbeKey {
    /// The pod's address.
    pub address: Address,
    /// Host byte order.
    pub port: u16,
    /// Zero.
    pub padding: u16,
}

/// Key of `REFUSED`. The value is the time in nanoseconds of `CLOCK_MONOTONIC` until which a
/// connect is refused at once.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RefusedKey {
    /// Network namespace cookie.
    pub cookie: u64,
    /// The destination as the application asked for it.
    pub address: Address,
    /// Host byte order.
    pub port: u16,
    /// Zero.
    pub padding: [u16; 3],
}

/// Why the kernel programs refused, or what they missed. The index into `COUNTERS`.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// The pod's share of `PENDING` is used up.
    Quota = 0,
    /// The pod has no entry in `POD_STATE`.
    NoPodState = 1,
    /// The socket is bound to a device and could not be unbound.
    BoundDevice = 2,
    /// Something connected by MPTCP itself, or its socket could not be told where a subflow went.
    Mptcp = 3,
    /// The destination could not be kept with the socket.
    Storage = 4,
    /// The destination refused a moment ago.
    RecentlyRefused = 5,
    /// A tuple could not be published.
    Publish = 6,
    /// The agent has no listener in the pod (it is away).
    NoListener = 7,
    /// The listener could not be given the connection.
    Assign = 8,
    /// A SYN to the range of redirect targets that nobody published.
    UnpublishedTarget = 9,
    /// A SYN from a loopback address to the pod that nobody published.
    UnpublishedLoopback = 10,
    /// What was published could not be kept with the accepted socket.
    AcceptedStorage = 11,
}

impl Reason {
    /// All of them, by number.
    pub const ALL: [Self; 12] = [
        Self::Quota,
        Self::NoPodState,
        Self::BoundDevice,
        Self::Mptcp,
        Self::Storage,
        Self::RecentlyRefused,
        Self::Publish,
        Self::NoListener,
        Self::Assign,
        Self::UnpublishedTarget,
        Self::UnpublishedLoopback,
        Self::AcceptedStorage,
    ];

    /// A stable name for a metric's label.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Quota => "quota",
            Self::NoPodState => "no_pod_state",
            Self::BoundDevice => "bound_device",
            Self::Mptcp => "mptcp",
            Self::Storage => "storage",
            Self::RecentlyRefused => "recently_refused",
            Self::Publish => "publish",
            Self::NoListener => "no_listener",
            Self::Assign => "assign",
            Self::UnpublishedTarget => "unpublished_target",
            Self::UnpublishedLoopback => "unpublished_loopback",
            Self::AcceptedStorage => "accepted_storage",
        }
    }
}

#[cfg(feature = "user")]
#[expect(unsafe_code, reason = "`aya::Pod` is an unsafe trait")]
mod pod {
    use super::*;

    macro_rules! pods {
        ($($name:ty),+ $(,)?) => {
            // SAFETY: `repr(C)`, plain integers, no implicit padding (checked by `no_padding`).
            $(unsafe impl aya::Pod for $name {})+
        };
    }

    pods!(
        Address,
        Pod,
        OwnAddressKey,
        PodState,
        Flow,
        TupleKey,
        Pending,
        ListenerKey,
        ProbeKey,
        RefusedKey,
    );
}

#[cfg(test)]
mod tests {
    use core::mem::size_of;

    use super::*;

    #[test]
    fn no_padding() {
        let address = size_of::<Address>();
        assert_eq!(address, 16);
        let spare = size_of::<Spare>();
        assert_eq!(size_of::<Pod>(), 4 + spare + 2 * address);
        assert_eq!(size_of::<OwnAddressKey>(), 8 + address);
        assert_eq!(size_of::<PodState>(), 4 * 8);
        assert_eq!(size_of::<Flow>(), 8 + address + 2 + 2 + spare);
        assert_eq!(size_of::<TupleKey>(), 8 + 2 * address + 2 + 2 + spare);
        assert_eq!(size_of::<Pending>(), 8 + address + 2 + 2 + spare);
        assert_eq!(size_of::<ListenerKey>(), 8 + 4 + 4);
        assert_eq!(size_of::<ProbeKey>(), address + 2 + 2);
        assert_eq!(size_of::<RefusedKey>(), 8 + address + 2 + 6);
    }

    /// Whoever changes one of these sizes, or what is where, changes the number too.
    #[test]
    #[cfg(not(feature = "next-layout"))]
    fn sizes_are_those_of_the_schema() {
        let sizes = [
            size_of::<Pod>(),
            size_of::<OwnAddressKey>(),
            size_of::<PodState>(),
            size_of::<Flow>(),
            size_of::<TupleKey>(),
            size_of::<Pending>(),
            size_of::<ListenerKey>(),
            size_of::<ProbeKey>(),
            size_of::<RefusedKey>(),
        ];
        assert_eq!(
            (crate::SCHEMA, sizes),
            (1, [40, 24, 32, 32, 48, 32, 16, 20, 32])
        );
    }

    #[test]
    fn reasons_are_their_index_and_labels_differ() {
        for (index, reason) in Reason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, index);
            for other in &Reason::ALL[index + 1..] {
                assert_ne!(reason.label(), other.label());
            }
        }
    }

    #[test]
    fn roles_survive_the_map() {
        for raw in 0..=u16::from(u8::MAX) {
            if let Some(role) = FlowRole::from_raw(raw) {
                assert_eq!(role as u16, raw);
            }
        }
        assert_eq!(FlowRole::from_raw(7), None);
    }

    #[test]
    fn shares() {
        for (kind, direction) in [
            (PendingKind::Redirect, Direction::Outbound),
            (PendingKind::SelfConnect, Direction::Outbound),
            (PendingKind::Deliver, Direction::Inbound),
            (PendingKind::Probe, Direction::Inbound),
        ] {
            assert_eq!(PendingKind::direction(kind as u16), direction);
        }
    }
}
