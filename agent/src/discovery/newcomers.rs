//! Addresses whose pods have only just become meshed: their own agent hears of it in the same moment as all others, and may
//! not listen for them yet. Who finds nobody there waits a little, instead of taking it for an answer.

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use weft_core::{Mesh, Workload};

/// Since when each of them is known. It is asked only after a connect has failed.
#[derive(Debug, Default)]
pub(super) struct Newcomers(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    since: HashMap<IpAddr, Instant>,
    /// The same, the oldest first; of one that was known before, also as it was then.
    order: VecDeque<(Instant, IpAddr)>,
}

impl Newcomers {
    /// A workload is another one now, or there was none.
    pub(super) fn changed(&self, before: Option<&Workload>, now: &Workload, at: Instant) {
        if now.mesh == Mesh::Unmeshed {
            return;
        }
        let is_new = |address: &&IpAddr| {
            before.is_none_or(|it| {
                it.mesh == Mesh::Unmeshed || it.node != now.node || !it.addresses.contains(address)
            })
        };
        let mut new = now.addresses.iter().filter(is_new).peekable();
        if new.peek().is_some() {
            let mut known = self.locked();
            known.forget(at);
            for address in new {
                known.since.insert(*address, at);
                known.order.push_back((at, *address));
            }
        }
    }

    /// Whether there is one at an address.
    pub(super) fn is_one(&self, address: IpAddr, at: Instant) -> bool {
        let known = self.locked();
        let since = known.since.get(&address);
        since.is_some_and(|it| at.saturating_duration_since(*it) < YOUTH)
    }

    fn locked(&self) -> MutexGuard<'_, Known> {
        // Every change is one of a map that is whole after it.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known {
    /// Those that are no longer new.
    fn forget(&mut self, at: Instant) {
        let is_old = |it: &mut (Instant, _)| at.saturating_duration_since(it.0) >= YOUTH;
        while let Some((since, address)) = self.order.pop_front_if(is_old) {
            if self.since.get(&address) == Some(&since) {
                self.since.remove(&address);
            }
        }
    }
}

/// How long an agent may take until it listens for a pod that it has heard of: to find its processes, and to attach to its
/// namespace. After that nobody is expected to listen soon.
const YOUTH: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use weft_proto::Resource;

    use super::*;
    use crate::discovery::testing;

    const ADDRESS: &str = "10.1.0.7";
    const OTHER: &str = "10.1.0.8";

    fn meshed_at(address: &str) -> Workload {
        match testing::workload("shop/web", &[address]) {
            Resource::Workload(workload) => workload,
            other => unreachable!("{other:?}"),
        }
    }

    /// before, now → whether the address is a newcomer's
    #[test]
    fn pods_are_new_when_they_become_meshed() {
        let meshed = || meshed_at(ADDRESS);
        let unmeshed = || Workload {
            mesh: Mesh::Unmeshed,
            ..meshed()
        };
        let elsewhere = Workload {
            node: "another".parse().expect("valid"),
            ..meshed()
        };
        let other = meshed_at(OTHER);
        let same = Workload {
            opaque_ports: Some(weft_core::PortRanges::default()),
            ..meshed()
        };
        for (before, now, expected) in [
            (None, meshed(), true),
            (None, unmeshed(), false),
            (Some(unmeshed()), meshed(), true),
            (Some(meshed()), unmeshed(), false),
            (Some(elsewhere), meshed(), true),
            (Some(other), meshed(), true),
            (Some(meshed()), same, false),
        ] {
            let newcomers = Newcomers::default();
            let at = Instant::now();
            newcomers.changed(before.as_ref(), &now, at);
            let is_one = |at| newcomers.is_one(ADDRESS.parse().expect("valid"), at);
            assert_eq!(is_one(at), expected, "{before:?} {now:?}");
            assert!(!is_one(at + YOUTH));
        }
    }

    #[test]
    fn what_is_no_longer_new_is_forgotten() {
        let newcomers = Newcomers::default();
        let at = Instant::now();
        newcomers.changed(None, &meshed_at(ADDRESS), at);
        let later = at + YOUTH;
        newcomers.changed(None, &meshed_at(OTHER), later);
        let known = newcomers.locked();
        assert_eq!((known.since.len(), known.order.len()), (1, 1));
    }
}
