//! Keys and values of the maps that the kernel programs and the agent share, and the pure decisions
//! both sides must take alike: what kind of address a destination is, and which loopback address
//! and port stand in for it.
//!
//! Everything here is `no_std`, has no implicit padding (the kernel hashes keys byte by byte) and
//! avoids indexing by variables, so that the same code passes the verifier and runs in host tests.
//! A change of any layout is a change of [`SCHEMA`].

#![no_std]

mod address;
mod maps;
mod target;

pub use address::Address;
pub use maps::{
    Direction, Flow, FlowRole, ListenerKey, ListenerRole, OwnAddressKey, Pending, PendingKind, Pod,
    PodState, ProbeKey, Reason, RefusedKey, SPARE, Spare, Stance, TupleKey,
};
pub use target::{REFUSING_V4, REFUSING_V6, Target, is_target, refusing, target};

/// Version of the layouts below. Pins live under a folder of this name, so that an agent never
/// reads maps of another layout.
///
/// An agent takes pods over from one with another layout, in either direction, so some things never
/// change: the names of the maps; the keys of `PODS`, `OWN_ADDRESSES` and `LISTENERS`; that a value of
/// `PODS` begins with a [`Stance`]; and `OWN_SOCKETS`, which all layouts share.
///
/// The layout that only tests have is far from all that will be shipped.
pub const SCHEMA: u32 = if cfg!(feature = "next-layout") {
    1000
} else {
    1
};

/// `IPPROTO_TCP`.
pub const PROTOCOL_TCP: u32 = 6;
/// `IPPROTO_MPTCP`.
pub const PROTOCOL_MPTCP: u32 = 262;
/// Port on a meshed pod's address where other agents' tunnels arrive.
pub const TUNNEL_PORT: u16 = 15008;
/// What stands for the namespace's cookie in the lookup program until the agent loads it for one: a
/// marker that is found in the object's bytes.
pub const NETNS_COOKIE_MARKER: u64 = 0x6e65_7473_0bad_c00c;
