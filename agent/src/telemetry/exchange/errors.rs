//! What the mesh answers in a server's place, by reason.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::super::labels::{Direction, PodLabels};
use super::super::samples::{Kind, Samples};
use super::PodSeries;
use super::chain::Chain;
use super::outcome::ExchangeError;

/// Where a pod's errors of one direction are counted: looked up once for a connection, and kept.
#[derive(Clone, Debug)]
pub struct HttpErrors {
    pod: Arc<PodSeries>,
    direction: Direction,
}

/// Errors of one direction, by what they are for Linkerd and by the word that the client is told.
#[derive(Debug, Default)]
pub(super) struct ErrorCounters(Chain<(ExchangeError, &'static str), AtomicU64>);

impl HttpErrors {
    pub(super) fn new(pod: Arc<PodSeries>, direction: Direction) -> Self {
        Self { pod, direction }
    }

    /// Counts a request that was answered here. `reason` is one of a fixed list.
    pub fn count(&self, error: ExchangeError, reason: &'static str) {
        let ErrorCounters(chain) = &self.pod.errors[self.direction as usize];
        match chain.find((error, reason), MOST_REASONS, AtomicU64::default) {
            Some(count) => count.fetch_add(1, Ordering::Relaxed),
            None => self.pod.overflowed.fetch_add(1, Ordering::Relaxed),
        };
    }
}

impl ErrorCounters {
    pub(super) fn collect(&self, direction: Direction, pod: &PodLabels, samples: &mut Samples) {
        let name = match direction {
            Direction::Outbound => "outbound_http_errors",
            Direction::Inbound => "inbound_http_errors",
        };
        for ((error, reason), count) in self.0.iter() {
            let mut labels = Vec::new();
            pod.render(&mut labels);
            labels.push(("error", error.as_kind().to_owned()));
            labels.push(("reason", reason.to_owned()));
            let help = "HTTP requests that the mesh answered in a server's place";
            let count = count.load(Ordering::Relaxed) as f64;
            samples.add(Kind::Counter, name, help, labels, count);
        }
    }
}

/// Above the number of reasons that there are.
const MOST_REASONS: usize = 64;
