//! What the endpoints of a service port share as long as the port is there: its queues, and how often one of them was
//! left out; and the guard of an endpoint, which puts its [`Breaker`] behind a lock and a clock.

use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use weft_core::FailureAccrual;

use super::breaker::{Breaker, Change, Judgement, Standing, Ticket};
use super::queue::Queue;

/// What the endpoints of a service port share.
#[derive(Debug, Default)]
pub struct Health {
    /// One for each family of addresses; none: nobody ever had to wait.
    queues: OnceLock<[Arc<Queue>; 2]>,
    ejections: AtomicU64,
}

/// Keeps an endpoint that fails from being chosen.
#[derive(Debug)]
pub struct Guard {
    settings: FailureAccrual,
    breaker: Mutex<Breaker>,
    /// It is closed, and nothing asks for a pause: what is nearly always so needs no lock.
    is_well: AtomicBool,
    health: Arc<Health>,
}

impl Health {
    /// The queue of clients that used an address of the same family as `like`.
    pub fn queue(&self, like: IpAddr) -> &Arc<Queue> {
        let queues = self.queues.get_or_init(Default::default);
        &queues[usize::from(like.is_ipv6())]
    }

    /// The same, if anybody ever had to wait.
    pub fn known_queue(&self, like: IpAddr) -> Option<&Arc<Queue>> {
        Some(&self.queues.get()?[usize::from(like.is_ipv6())])
    }

    /// The queues of both families, if anybody ever had to wait.
    pub fn queues(&self) -> &[Arc<Queue>] {
        self.queues.get().map_or(&[], |it| it.as_slice())
    }

    /// How often an endpoint was left out.
    pub fn ejections(&self) -> u64 {
        self.ejections.load(Ordering::Relaxed)
    }
}

impl Guard {
    /// Of an endpoint of which nothing bad is known.
    pub fn new(settings: FailureAccrual, health: &Arc<Health>) -> Self {
        Self {
            settings,
            breaker: Mutex::new(Breaker::new(settings)),
            is_well: AtomicBool::new(true),
            health: Arc::clone(health),
        }
    }

    /// What it goes by.
    pub fn settings(&self) -> &FailureAccrual {
        &self.settings
    }

    /// Whether the endpoint may be chosen.
    pub fn standing(&self, now: Instant) -> Standing {
        if self.is_well.load(Ordering::Relaxed) {
            return Standing::Ready;
        }
        self.breaker().standing(now)
    }

    /// Begins a request. None: it may not be chosen any more.
    pub(super) fn begin(&self, now: Instant) -> Option<Ticket> {
        self.breaker().begin(now)
    }

    /// A request has ended.
    pub(super) fn end(
        &self,
        ticket: Ticket,
        judgement: Judgement,
        retry_after: Option<Duration>,
        address: IpAddr,
    ) {
        let now = Instant::now();
        let mut breaker = self.breaker();
        let change = breaker.end(ticket, judgement, retry_after, now, rand::random());
        let is_well = breaker.standing(now) == Standing::Ready;
        self.is_well.store(is_well, Ordering::Relaxed);
        drop(breaker);
        match change {
            Some(Change::Ejected) => {
                self.health.ejections.fetch_add(1, Ordering::Relaxed);
                tracing::debug!(%address, "an endpoint is left out for a while: it fails");
            }
            Some(Change::Readmitted) => {
                tracing::debug!(%address, "an endpoint is used again");
                if let Some(queue) = self.health.known_queue(address) {
                    queue.open();
                }
            }
            None => {}
        }
    }

    fn breaker(&self) -> MutexGuard<'_, Breaker> {
        self.breaker.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
