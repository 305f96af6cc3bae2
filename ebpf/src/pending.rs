//! `PENDING` and the pods' shares of it.

use core::arch::asm;

use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST};
use weft_ebpf_abi::{Direction, Pending, PendingKind, PodState, Reason, TupleKey};

use crate::maps::{PENDING, PENDING_QUOTA, POD_STATE, count};

/// Whether the pod may open one more connection. Not a reservation: as many as are opened at the
/// very same moment may pass, and are then caught by [`publish`].
#[inline(always)]
pub fn has_room(cookie: u64, direction: Direction) -> bool {
    let Some(state) = POD_STATE.get_ptr_mut(cookie) else {
        count(Reason::NoPodState);
        return false;
    };
    room(state, direction)
}

/// Publishes a tuple, so that the lookup program of the namespace where the SYN arrives knows it.
/// On failure the SYN is refused there.
#[inline(always)]
pub fn publish(key: &TupleKey, value: &Pending) {
    let Some(state) = POD_STATE.get_ptr_mut(key.cookie) else {
        count(Reason::NoPodState);
        return;
    };
    let direction = PendingKind::direction(value.kind);
    if !room(state, direction) {
        return;
    }
    // Counted before it is there: whoever takes it out may be faster than the next line.
    add(counter(state, direction), 1);
    if PENDING.insert(key, value, BPF_NOEXIST.into()).is_ok() {
        return;
    }
    add(counter(state, direction), -1);
    // A left-over of the same tuple, if it is one, is overwritten: the tuple is ours now.
    if PENDING.get_ptr(key).is_some() && PENDING.insert(key, value, BPF_ANY.into()).is_ok() {
        return;
    }
    count(Reason::Publish);
}

/// Takes a tuple out. True for exactly one of those who try.
#[inline(always)]
pub fn remove(key: &TupleKey, kind: u16) -> bool {
    if PENDING.remove(key).is_err() {
        return false;
    }
    if let Some(state) = POD_STATE.get_ptr_mut(key.cookie) {
        add(counter(state, PendingKind::direction(kind)), -1);
    }
    true
}

/// Adds atomically. The target has no compare-and-swap in Rust's eyes, so there is no `AtomicI64`.
#[inline(always)]
pub fn add(counter: *mut i64, delta: i64) {
    // SAFETY: callers pass a counter in a map's value, which the verifier has seen checked.
    unsafe {
        asm!(
            "lock *(u64 *)({counter} + 0) += {delta}",
            counter = in(reg) counter,
            delta = in(reg) delta,
        );
    }
}

#[inline(always)]
fn room(state: *mut PodState, direction: Direction) -> bool {
    // SAFETY: from a lookup; a stale number does no harm.
    if unsafe { counter(state, direction).read_volatile() } < PENDING_QUOTA.load() {
        return true;
    }
    // SAFETY: as above.
    add(unsafe { (&raw mut (*state).quota_refusals).cast() }, 1);
    count(Reason::Quota);
    false
}

#[inline(always)]
fn counter(state: *mut PodState, direction: Direction) -> *mut i64 {
    // SAFETY: from a lookup.
    unsafe {
        match direction {
            Direction::Outbound => &raw mut (*state).pending_outbound,
            Direction::Inbound => &raw mut (*state).pending_inbound,
        }
    }
}
