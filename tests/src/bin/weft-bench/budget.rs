//! How long the loads are, how often they are repeated, and when it is enough.

use std::cell::Cell;
use std::time::{Duration, Instant};

/// The time that a run may take.
pub(crate) struct Budget {
    started: Instant,
    /// How often every load is repeated, if the time allows.
    pub(crate) runs: u32,
    /// How long a bulk transfer takes, in whole seconds as iperf3 wants them.
    pub(crate) bulk_seconds: u32,
    /// How long requests are sent, in whole seconds as wrk wants them.
    pub(crate) request_seconds: u32,
    /// How long requests are sent at a fixed rate.
    pub(crate) latency_seconds: u32,
    /// How many clients open tunnels to every server for one figure.
    pub(crate) handshake_clients: usize,
    /// Until when another repetition may end.
    speed: Duration,
    /// What is left for running disturbed loads again.
    spare: Cell<Duration>,
    repeats: Cell<Duration>,
}

impl Budget {
    pub(crate) fn start(quick: bool, runs: Option<u32>) -> Budget {
        let started = Instant::now();
        if quick {
            Budget {
                started,
                runs: runs.unwrap_or(2).max(1),
                bulk_seconds: 2,
                request_seconds: 1,
                latency_seconds: 2,
                handshake_clients: 2,
                speed: Duration::from_secs(150),
                spare: Cell::new(Duration::from_secs(25)),
                repeats: Cell::default(),
            }
        } else {
            Budget {
                started,
                runs: runs.unwrap_or(5).max(1),
                bulk_seconds: 5,
                request_seconds: 4,
                latency_seconds: 8,
                handshake_clients: 4,
                speed: Duration::from_secs(17 * 60),
                spare: Cell::new(Duration::from_secs(4 * 60)),
                repeats: Cell::default(),
            }
        }
    }

    /// How long it has been going on.
    pub(crate) fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// Whether another repetition that takes so long fits into what throughput and latency may
    /// take; memory and handshakes follow and are short.
    pub(crate) fn allows(&self, repetition: Duration) -> bool {
        self.elapsed() + repetition <= self.speed
    }

    /// How long disturbed loads have been running again.
    pub(crate) fn spent(&self) -> Duration {
        self.repeats.get()
    }

    /// Whether a disturbed load that takes so long may run again; takes the time for it if so.
    pub(crate) fn spend(&self, again: Duration) -> bool {
        let left = self.spare.get().checked_sub(again);
        if let Some(left) = left {
            self.spare.set(left);
            self.repeats.set(self.repeats.get() + again);
        }
        left.is_some()
    }

    /// Says how it goes, with the time so far.
    pub(crate) fn tell(&self, line: &str) {
        eprintln!("[{:>5.1} s] {line}", self.elapsed().as_secs_f64());
    }
}
