//! Which threads of the agent come before others (sched(7)).
//!
//! Those that come first are of `SCHED_RR`, and run as soon as they have something to do. A nice value is not enough: it
//! counts among the threads of one control group only, as containers are, and the group has to wait for its turn when a
//! flood has used up its share of the CPUs, whichever of its threads it was (measured with a group for each pod and
//! agent, beside 64 bulk transfers: 16 to 58 ms in the 99th percentile by nice values, 2 ms by `SCHED_RR`).
//!
//! Where the kernel gives the group no real-time (`CONFIG_RT_GROUP_SCHED`, or a system that has none to give), they have a
//! nice value. Threads that are made by one that comes first do not inherit it.

#![allow(unsafe_code)]

use std::io;
use std::mem::{size_of, zeroed};

use nix::unistd::{Pid, gettid};

/// Before whom a thread comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rank {
    /// All others: it decides about them.
    Watch,
    /// Whoever has none: it uses little, though it may use a burst.
    First,
    /// Others by its weight: the rest of the agent, which may have much to do at once; and whoever uses little, while
    /// CPUs are not short.
    Own,
    /// Nobody.
    Plain,
}

/// How the kernel runs a thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scheduling {
    /// `SCHED_RR`, with this priority.
    RealTime(u32),
    /// `SCHED_OTHER`, with this nice value.
    Shared(i32),
}

/// What this process may do for its threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Right {
    Nothing,
    Nice,
    RealTime,
}

/// How threads of each rank are run.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ranks {
    right: Right,
    /// The nice value that this process was started with.
    base: i32,
}

impl Ranks {
    /// Tries what this process may do, on the thread that asks, and says what it may not.
    pub(super) fn find() -> Self {
        let base = rustix::process::getpriority_process(None).unwrap_or(0);
        let plain = Scheduling::Shared(base);
        let may = |scheduling| {
            let tried = set(gettid(), scheduling);
            tried.and_then(|()| set(gettid(), plain))
        };
        // With the highest that anybody has: threads must not come before the one that takes this away from them.
        let real_time = may(Scheduling::RealTime(WATCH));
        let right = match (may(Scheduling::Shared(base - STEP)), real_time) {
            (Ok(()), Ok(())) => Right::RealTime,
            (Ok(()), Err(error)) => {
                tracing::info!(
                    %error,
                    "threads come first by their nice value: where CPUs are short, who uses little waits with the agent's whole control group"
                );
                Right::Nice
            }
            (Err(_), _) => {
                tracing::warn!(
                    "threads cannot have a priority (CAP_SYS_NICE is missing): where CPUs are short, who uses little waits with all others"
                );
                Right::Nothing
            }
        };
        Self { right, base }
    }

    /// Whether any thread comes first by more than its nice value.
    pub(super) fn come_first(self) -> bool {
        self.right == Right::RealTime
    }

    pub(super) fn scheduling(self, rank: Rank) -> Scheduling {
        match (self.right, rank) {
            (Right::Nothing, _) | (_, Rank::Plain) => Scheduling::Shared(self.base),
            (Right::RealTime, Rank::Watch) => Scheduling::RealTime(WATCH),
            (Right::RealTime, Rank::First) => Scheduling::RealTime(FIRST),
            (_, Rank::Watch | Rank::First | Rank::Own) => Scheduling::Shared(self.base - STEP),
        }
    }

    /// Gives a thread of this process its rank. One that has just ended needs none.
    pub(super) fn give(self, thread: Pid, rank: Rank) {
        if let Err(error) = set(thread, self.scheduling(rank)) {
            tracing::debug!(%error, ?rank, "setting a thread's priority");
        }
    }
}

/// # Errors
/// The process may not, or there is no such thread.
fn set(thread: Pid, scheduling: Scheduling) -> io::Result<()> {
    // SAFETY: a structure of integers, for all of which 0 is a value.
    let mut attributes: libc::sched_attr = unsafe { zeroed() };
    attributes.size = u32::try_from(size_of::<libc::sched_attr>()).unwrap_or_default();
    attributes.sched_flags = u64::from(libc::SCHED_FLAG_RESET_ON_FORK.unsigned_abs());
    let policy = match scheduling {
        Scheduling::RealTime(priority) => {
            attributes.sched_priority = priority;
            libc::SCHED_RR
        }
        Scheduling::Shared(nice) => {
            attributes.sched_nice = nice;
            libc::SCHED_OTHER
        }
    };
    attributes.sched_policy = policy.unsigned_abs();
    // SAFETY: the kernel reads as many bytes as the structure says that it has (Linux 3.14).
    let done = unsafe {
        libc::syscall(
            libc::SYS_sched_setattr,
            thread.as_raw(),
            &raw const attributes,
            0,
        )
    };
    match done {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Ten steps of the nice value are a weight of nine times as much.
const STEP: i32 = 10;
/// Real-time priorities: the higher comes first.
const FIRST: u32 = 1;
const WATCH: u32 = 2;

#[cfg(test)]
mod tests {
    use super::*;

    /// right → watch, first, own, plain; of a process that was started with the nice value 3
    #[test]
    fn ranks_are_what_the_process_may_have() {
        use Scheduling::{RealTime, Shared};
        for (right, expected) in [
            (Right::Nothing, [Shared(3); 4]),
            (Right::Nice, [Shared(-7), Shared(-7), Shared(-7), Shared(3)]),
            (
                Right::RealTime,
                [RealTime(2), RealTime(1), Shared(-7), Shared(3)],
            ),
        ] {
            let ranks = Ranks { right, base: 3 };
            let all = [Rank::Watch, Rank::First, Rank::Own, Rank::Plain];
            assert_eq!(all.map(|it| ranks.scheduling(it)), expected, "{right:?}");
        }
    }
}
