//! The last descriptors of the process, kept for what is not a flow.
//!
//! A flow takes two descriptors, and a flood of flows takes all there are. Without any left, no pod
//! could be enrolled, and a pod that is not enrolled is not protected. The kernel gives out the
//! lowest free number, so a socket whose number is high says by itself that few are left.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::resource::{Resource, getrlimit};

/// Whether a new connection of a pod with so many flows must be given back: later descriptors are
/// needed for its other side, and when few are left, those who have many must leave them to others.
pub(super) fn none_left_for_flows(socket: &impl AsRawFd, flows: usize, pods: usize) -> bool {
    let descriptor = socket.as_raw_fd();
    if reaches_into(descriptor, RESERVED_FOR_ALL, *LIMIT) {
        return true;
    }
    is_beyond_share(descriptor, flows, pods)
}

fn is_beyond_share(descriptor: RawFd, flows: usize, pods: usize) -> bool {
    let shared = *LIMIT / SHARED_PART;
    if !reaches_into(descriptor, shared, *LIMIT) {
        return false;
    }
    FEW_LEFT.store(true, Ordering::Relaxed);
    flows as u64 >= share(shared, pods)
}

/// Whether few have been left since this was asked last: who keeps some for later should close them.
pub(super) fn were_few_left() -> bool {
    FEW_LEFT.swap(false, Ordering::Relaxed)
}

/// How many there may be.
pub(super) fn limit() -> usize {
    usize::try_from(*LIMIT).unwrap_or(usize::MAX)
}

/// What each pod may have of the descriptors that are shared out, in flows.
fn share(shared: u64, pods: usize) -> u64 {
    let for_flows = shared.saturating_sub(RESERVED_FOR_ALL) / 2;
    for_flows / pods.max(1) as u64
}

/// The same for the socket that is a flow's other side.
pub(super) fn none_left(socket: &impl AsRawFd, flows: usize, pods: usize) -> bool {
    let descriptor = socket.as_raw_fd();
    reaches_into(descriptor, RESERVED_FOR_ALL / 2, *LIMIT)
        || is_beyond_share(descriptor, flows, pods)
}

fn reaches_into(descriptor: RawFd, reserve: u64, limit: u64) -> bool {
    u64::try_from(descriptor).is_ok_and(|number| number >= limit.saturating_sub(reserve))
}

static FEW_LEFT: AtomicBool = AtomicBool::new(false);
/// The limit is raised once, at the start, before any flow.
static LIMIT: LazyLock<u64> =
    LazyLock::new(|| getrlimit(Resource::RLIMIT_NOFILE).map_or(DEFAULT_LIMIT, |(soft, _)| soft));

const DEFAULT_LIMIT: u64 = 1024;
/// The last tenth is shared out: who has more than a pod's share of it gets none of it.
const SHARED_PART: u64 = 10;
/// Enough for 64 new pods, each with its listeners and what its threads wait at.
const RESERVED_FOR_ALL: u64 = 512;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_ones_are_reserved() {
        assert!(!reaches_into(487, 512, 1000));
        assert!(reaches_into(488, 512, 1000));
        assert!(!reaches_into(743, 256, 1000));
        assert!(reaches_into(744, 256, 1000));
        assert!(reaches_into(3, 512, 100));
    }

    #[test]
    fn what_is_shared_out_is_enough_for_all() {
        assert_eq!(share(4000, 10), 174);
        assert_eq!(share(4000, 1), 1744);
        assert_eq!(share(100, 5), 0);
    }
}
