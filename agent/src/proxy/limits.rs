//! How much one workload, one peer and the node may have at once, so that nobody can take what the
//! others need.
//!
//! Nothing is guessed: the defaults come from the limit of descriptors, from the memory and from the
//! CPUs that the process has, and are said at the start. What exceeds a limit is refused with a
//! reset and counted by reason (`docs/operations.md`).

use std::fmt;
use std::fs;
use std::path::Path;

use nix::sys::resource::{Resource, getrlimit};

use crate::node::threads_of;

/// The limits of the data plane.
#[derive(Clone, Debug, PartialEq)]
pub struct Limits {
    /// Flows of one pod in each direction.
    pub flows_per_pod: usize,
    /// Exchanges of HTTP that one pod may have open in each direction. Of those that arrive, one source has
    /// no more than are left for all others.
    pub exchanges_per_pod: usize,
    /// Bytes that the flows of one pod may keep in the agent because a receiver has no room. From
    /// half of it on each reads in small steps; none is ended for it.
    pub buffered_bytes_per_pod: usize,
    /// The same of all pods.
    pub buffered_bytes: usize,
    /// Unfinished handshakes of those that connect to one pod; a quarter as many with strangers.
    pub handshakes_per_pod: usize,
    /// The same from one workload's address, to whichever pods; a tenth as many from a stranger's, or
    /// of IPv6 from its /64. An agent ends its part of a handshake before the other, so that its 256
    /// connections of a pair may be unfinished here at once.
    pub handshakes_per_peer: usize,
    /// The same, of the whole node.
    pub handshakes: usize,
    /// Tunnels of one pod that may be in their handshake; others wait for their turn.
    pub dials_per_pod: usize,
    /// Threads of one pod that may compute handshakes at a time: never all of them, for the flows.
    pub handshake_turns: usize,
}

/// What the process has.
#[derive(Clone, Copy, Debug)]
pub struct Resources {
    /// The soft limit of descriptors.
    pub descriptors: u64,
    /// Memory in bytes: the least of the machine's, that of the control group, and what was given.
    pub memory_bytes: u64,
    /// CPUs.
    pub cpus: usize,
}

impl Limits {
    /// Those that fit what the process has.
    pub fn from_resources(resources: Resources) -> Self {
        let Resources {
            descriptors,
            memory_bytes,
            cpus,
        } = resources;
        let by_descriptors = descriptors * 2 / 5;
        let by_memory = memory_bytes / 4 / MEMORY_OF_FLOW;
        let handshakes = (descriptors / 8).clamp(64, 8192);
        let size = |number: u64| usize::try_from(number).unwrap_or(usize::MAX);
        Self {
            flows_per_pod: size(by_descriptors.min(by_memory)).max(FEWEST_FLOWS),
            exchanges_per_pod: size(by_memory).max(FEWEST_EXCHANGES),
            buffered_bytes_per_pod: size((memory_bytes / 16).clamp(32 * MIB, 1024 * MIB)),
            buffered_bytes: size((memory_bytes / 4).max(32 * MIB)),
            handshakes_per_pod: size(handshakes / 2).min(1024),
            handshakes_per_peer: size(handshakes / 4).min(320),
            handshakes: size(handshakes),
            dials_per_pod: 64,
            handshake_turns: threads_of(cpus).div_ceil(2),
        }
    }
}

impl Resources {
    /// Of this process. A container has a view of control groups of its own, in which its limit of memory cannot be
    /// found: so it is given.
    pub fn of_process(given_memory: Option<u64>) -> Self {
        let descriptors = getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, |(soft, _)| soft);
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        let known = [machine_memory(), cgroup_memory(), given_memory];
        let memory_bytes = known.into_iter().flatten().min().unwrap_or(4096 * MIB);
        Self {
            descriptors,
            memory_bytes,
            cpus,
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self::from_resources(Resources::of_process(None))
    }
}

impl fmt::Display for Limits {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "per pod {} flows and {} exchanges of HTTP in each direction, {} MiB kept for receivers without room, {} tunnels being made, \
             {} unfinished handshakes with it; of one peer {}, of the node {}",
            self.flows_per_pod,
            self.exchanges_per_pod,
            self.buffered_bytes_per_pod as u64 / MIB,
            self.dials_per_pod,
            self.handshakes_per_pod,
            self.handshakes_per_peer,
            self.handshakes,
        )
    }
}

fn machine_memory() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok();
    text.as_deref().and_then(|text| {
        let line = text.lines().find(|it| it.starts_with("MemTotal:"))?;
        let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
        Some(kib * 1024)
    })
}

/// The least limit of the process's control group (version 2) and those above it.
fn cgroup_memory() -> Option<u64> {
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let own = groups.lines().find_map(|it| it.strip_prefix("0::/"))?;
    let root = Path::new("/sys/fs/cgroup");
    let limits = Path::new(own).ancestors().filter_map(|group| {
        let limit = fs::read_to_string(root.join(group).join("memory.max")).ok()?;
        limit.trim().parse().ok()
    });
    limits.min()
}

const MIB: u64 = 1024 * 1024;
/// What a flow costs where both sides are sockets of the node: some 8 kB of the agent's, and those
/// sockets with a little in them.
const MEMORY_OF_FLOW: u64 = 64 * 1024;
const FEWEST_FLOWS: usize = 64;
/// What a few connections of HTTP/2 may have open.
const FEWEST_EXCHANGES: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    /// descriptors, MiB, CPUs → flows, exchanges, MiB kept, handshakes, turns
    #[test]
    fn limits_come_from_what_there_is() {
        for (descriptors, mib, cpus, flows, exchanges, kept, handshakes, turns) in [
            (20_000, 24_000, 2, 8_000, 96_000, 1024, 2500, 1),
            (1_048_576, 24_000, 8, 96_000, 96_000, 1024, 8192, 2),
            (250_000, 64_000, 64, 100_000, 256_000, 1024, 8192, 2),
            (1024, 512, 1, 409, 2048, 32, 128, 1),
            (20_000, 256, 4, 1024, 1024, 32, 2500, 2),
            (64, 64, 1, 64, 1024, 32, 64, 1),
        ] {
            let limits = Limits::from_resources(Resources {
                descriptors,
                memory_bytes: mib * MIB,
                cpus,
            });
            assert_eq!(limits.flows_per_pod, flows, "{limits}");
            assert_eq!(limits.exchanges_per_pod, exchanges, "{limits}");
            assert_eq!(limits.buffered_bytes_per_pod as u64, kept * MIB, "{limits}");
            assert_eq!(limits.handshakes, handshakes, "{limits}");
            assert_eq!(limits.handshake_turns, turns, "{limits}");
        }
    }

    #[test]
    fn this_process_has_something() {
        let resources = Resources::of_process(None);
        assert!(resources.memory_bytes > MIB && resources.cpus > 0 && resources.descriptors > 0);
    }

    /// A limit beyond what there is (without one, a kubelet gives what the node has) changes nothing.
    #[test]
    fn the_least_memory_counts() {
        let own = Resources::of_process(None).memory_bytes;
        for (given, expected) in [(MIB, MIB), (u64::MAX, own)] {
            assert_eq!(Resources::of_process(Some(given)).memory_bytes, expected);
        }
    }
}
