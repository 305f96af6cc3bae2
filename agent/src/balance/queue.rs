//! Where exchanges and connections wait while a service port has no endpoint that is ready: a bounded
//! queue, and a gate that says whether waiting is worth it.
//!
//! The first that finds nobody starts the clock. Whoever comes until it has run out waits, and all of them go on as
//! soon as an endpoint is there. When it has run out all of them fail, and from then on whoever comes
//! fails at once, until an endpoint is there: a client that hears so soon can do something else, and what nobody
//! serves must not pile up. [`Gate`] decides that and is pure: the clock is handed in.
//!
//! The gate never keeps anybody from trying: it is asked after no endpoint was found.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, Semaphore};

/// How long, and how many, may wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueLimits {
    /// From the first that waits until all fail; zero: nobody waits.
    pub timeout: Duration,
    /// At one service port, in each family of addresses, of all pods of the node.
    pub per_port: usize,
    /// Of one pod, everywhere.
    pub per_pod: usize,
}

/// The queue of a service port, for one family of addresses.
#[derive(Debug, Default)]
pub struct Queue {
    gate: Mutex<Gate>,
    /// The gate is not open: what is nearly never so needs no lock.
    is_shut: AtomicBool,
    /// Counts how often an endpoint appeared.
    opened: AtomicU64,
    opening: Notify,
    waiting: AtomicUsize,
    /// How often the gate fell shut.
    fail_fasts: AtomicU64,
    /// Exchanges and connections that failed here.
    failed: AtomicU64,
    looking: Looking,
}

/// One of those who wait looks around from time to time, for all of them.
#[derive(Debug)]
struct Looking(Semaphore);

/// Whether to wait.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Gate {
    /// As far as is known, there are endpoints.
    #[default]
    Open,
    /// There were none: the time until which it is waited.
    Waiting {
        /// When all fail.
        until: Instant,
    },
    /// It was waited for long enough.
    FailFast {
        /// When somebody last found nobody.
        last: Instant,
    },
}

/// What somebody who found nobody should do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Advice {
    /// Wait until then.
    Wait(Instant),
    /// Fail now, as all do.
    Fail,
}

/// What became of waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waited {
    /// It is worth another look.
    Again,
    /// Nobody was there in time.
    Failed,
    /// Too many wait.
    Full,
}

/// A place in a queue, for as long as one waits, over several looks.
#[derive(Debug)]
pub struct Place {
    queue: Arc<Queue>,
    of_pod: Arc<AtomicUsize>,
    /// However often endpoints appear of which none takes anything.
    longest: Instant,
    /// How often an endpoint had appeared when it was last looked.
    seen: u64,
    looks: u32,
}

impl Gate {
    /// Somebody found nobody.
    pub fn found_nobody(&mut self, now: Instant, timeout: Duration) -> Advice {
        match *self {
            Self::Waiting { until } if now < until => Advice::Wait(until),
            Self::Waiting { .. } => {
                *self = Self::FailFast { last: now };
                Advice::Fail
            }
            Self::FailFast { last } if now.saturating_duration_since(last) < MEMORY => {
                *self = Self::FailFast { last: now };
                Advice::Fail
            }
            Self::Open | Self::FailFast { .. } if timeout.is_zero() => {
                *self = Self::FailFast { last: now };
                Advice::Fail
            }
            // What was so long ago says nothing of now.
            Self::Open | Self::FailFast { .. } => {
                let until = now + timeout;
                *self = Self::Waiting { until };
                Advice::Wait(until)
            }
        }
    }

    /// Somebody waited until the time was up.
    pub fn gave_up(&mut self, now: Instant) {
        if matches!(self, Self::Waiting { until } if *until <= now) {
            *self = Self::FailFast { last: now };
        }
    }
}

impl Queue {
    /// How often an endpoint appeared: to be asked before one looks for one.
    pub fn opened(&self) -> u64 {
        self.opened.load(Ordering::Acquire)
    }

    /// An endpoint has appeared, or is ready again: all who wait look again.
    pub fn open(&self) {
        let mut gate = self.gate();
        *gate = Gate::Open;
        self.is_shut.store(false, Ordering::Relaxed);
        drop(gate);
        self.opened.fetch_add(1, Ordering::AcqRel);
        self.opening.notify_waiters();
    }

    /// Somebody was served.
    pub fn served(&self) {
        if self.is_shut.load(Ordering::Relaxed) {
            self.open();
        }
    }

    /// How many wait now.
    pub fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }

    /// Whether whoever comes and finds nobody fails at once.
    pub fn is_fail_fast(&self) -> bool {
        matches!(*self.gate(), Gate::FailFast { .. })
    }

    /// How often the gate fell shut, and how many failed here.
    pub fn counts(&self) -> (u64, u64) {
        (
            self.fail_fasts.load(Ordering::Relaxed),
            self.failed.load(Ordering::Relaxed),
        )
    }

    /// Takes a place, after one has found nobody; `seen` is what [`Queue::opened`] said before.
    ///
    /// # Errors
    /// One has to fail: why.
    pub fn enter(
        self: &Arc<Self>,
        of_pod: &Arc<AtomicUsize>,
        limits: QueueLimits,
        seen: u64,
    ) -> Result<Place, Waited> {
        if self.ask(limits.timeout) == Advice::Fail {
            return Err(self.fail(Waited::Failed));
        }
        let place = Place {
            queue: Arc::clone(self),
            of_pod: Arc::clone(of_pod),
            longest: Instant::now() + limits.timeout,
            seen,
            looks: 0,
        };
        let here = self.waiting.fetch_add(1, Ordering::Relaxed);
        let of_pod = of_pod.fetch_add(1, Ordering::Relaxed);
        if here >= limits.per_port || of_pod >= limits.per_pod {
            // The place counts until it is dropped.
            return Err(self.fail(Waited::Full));
        }
        Ok(place)
    }

    fn ask(&self, timeout: Duration) -> Advice {
        let mut gate = self.gate();
        let before = *gate;
        let advice = gate.found_nobody(Instant::now(), timeout);
        self.is_shut.store(true, Ordering::Relaxed);
        self.count_fall(before, *gate);
        advice
    }

    fn gave_up(&self) {
        let mut gate = self.gate();
        let before = *gate;
        gate.gave_up(Instant::now());
        self.count_fall(before, *gate);
    }

    fn count_fall(&self, before: Gate, now: Gate) {
        let is_shut = |gate| matches!(gate, Gate::FailFast { .. });
        if is_shut(now) && !is_shut(before) {
            self.fail_fasts.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn fail(&self, why: Waited) -> Waited {
        self.failed.fetch_add(1, Ordering::Relaxed);
        why
    }

    fn gate(&self) -> MutexGuard<'_, Gate> {
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    /// Waits for an endpoint to appear. If endpoints are there and none takes anything, one of those who
    /// wait looks again from time to time (`looks_around`).
    pub async fn wait(&mut self, timeout: Duration, looks_around: bool) -> Waited {
        let queue = &self.queue;
        let opening = queue.opening.notified();
        let mut opening = std::pin::pin!(opening);
        opening.as_mut().enable();
        let opened = queue.opened();
        if opened != self.seen && Instant::now() < self.longest {
            self.seen = opened;
            return Waited::Again;
        }
        let Advice::Wait(until) = queue.ask(timeout) else {
            return queue.fail(Waited::Failed);
        };
        let until = until.min(self.longest);
        let looks = self.looks;
        let look = async {
            // The others wait until it has found something, or has left.
            match (looks_around, queue.looking.0.acquire().await) {
                (true, Ok(_turn)) => tokio::time::sleep(pause(looks)).await,
                _ => std::future::pending().await,
            }
        };
        tokio::select! {
            () = opening => {
                self.seen = queue.opened();
                Waited::Again
            }
            () = look => {
                self.looks += 1;
                Waited::Again
            }
            () = tokio::time::sleep_until(until.into()) => {
                queue.gave_up();
                queue.fail(Waited::Failed)
            }
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.queue.waiting.fetch_sub(1, Ordering::Relaxed);
        self.of_pod.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Default for Looking {
    fn default() -> Self {
        Self(Semaphore::new(1))
    }
}

impl Default for QueueLimits {
    fn default() -> Self {
        Self {
            timeout: Duration::from_secs(3),
            per_port: 10_000,
            per_pod: 2048,
        }
    }
}

fn pause(looks: u32) -> Duration {
    FIRST_LOOK.saturating_mul(1 << looks.min(10)).min(LAST_LOOK)
}

/// What nobody asked about for so long is forgotten.
const MEMORY: Duration = Duration::from_secs(10);
/// The first pause before one looks around; doubled until the last.
const FIRST_LOOK: Duration = Duration::from_millis(50);
const LAST_LOOK: Duration = Duration::from_millis(500);

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(number: u64) -> Duration {
        Duration::from_secs(number)
    }

    #[test]
    fn the_gate_waits_once_and_then_fails_at_once() {
        let t0 = Instant::now();
        let mut gate = Gate::Open;
        let first = Advice::Wait(t0 + seconds(3));
        // After so many seconds somebody finds nobody.
        for (after, advice) in [
            (0, first),
            (2, first),
            (3, Advice::Fail),
            (4, Advice::Fail),
            (13, Advice::Fail),
            // Nobody came for long.
            (23, Advice::Wait(t0 + seconds(26))),
        ] {
            let found = gate.found_nobody(t0 + seconds(after), seconds(3));
            assert_eq!(found, advice, "after {after} s");
        }
        gate = Gate::Open;
        assert_eq!(gate.found_nobody(t0, Duration::ZERO), Advice::Fail);
    }

    #[test]
    fn only_who_waited_to_the_end_shuts_the_gate() {
        let t0 = Instant::now();
        let mut gate = Gate::Open;
        gate.found_nobody(t0, seconds(3));
        gate.gave_up(t0 + seconds(2));
        assert!(matches!(gate, Gate::Waiting { .. }));
        gate.gave_up(t0 + seconds(3));
        assert!(matches!(gate, Gate::FailFast { .. }));
        gate = Gate::Open;
        gate.gave_up(t0 + seconds(4));
        assert_eq!(gate, Gate::Open);
    }

    fn limits(per_port: usize, per_pod: usize) -> QueueLimits {
        QueueLimits {
            timeout: seconds(3),
            per_port,
            per_pod,
        }
    }

    #[tokio::test]
    async fn who_waits_goes_on_when_an_endpoint_appears() {
        let queue = Arc::new(Queue::default());
        let pod = Arc::new(AtomicUsize::new(0));
        let seen = queue.opened();
        let mut place = queue.enter(&pod, limits(9, 9), seen).expect("room");
        assert_eq!((queue.waiting(), pod.load(Ordering::Relaxed)), (1, 1));
        let opener = async {
            tokio::time::sleep(Duration::from_millis(100)).await;
            queue.open();
        };
        let (waited, ()) = tokio::join!(place.wait(seconds(3), false), opener);
        assert_eq!(waited, Waited::Again);
        drop(place);
        assert_eq!((queue.waiting(), pod.load(Ordering::Relaxed)), (0, 0));
        // One that appeared between the look and the waiting is not missed.
        let mut place = queue.enter(&pod, limits(9, 9), seen).expect("room");
        assert_eq!(place.wait(seconds(3), false).await, Waited::Again);
    }

    #[tokio::test]
    async fn who_waits_in_vain_fails_and_others_fail_at_once() {
        let queue = Arc::new(Queue::default());
        let pod = Arc::new(AtomicUsize::new(0));
        let limits = QueueLimits {
            timeout: Duration::from_millis(50),
            ..limits(9, 9)
        };
        let mut place = queue.enter(&pod, limits, 0).expect("room");
        assert_eq!(place.wait(limits.timeout, false).await, Waited::Failed);
        assert!(queue.is_fail_fast());
        assert_eq!(queue.enter(&pod, limits, 0).err(), Some(Waited::Failed));
        assert_eq!(queue.counts(), (1, 2));
        queue.served();
        assert!(!queue.is_fail_fast());
        assert!(queue.enter(&pod, limits, queue.opened()).is_ok());
    }

    #[tokio::test]
    async fn endpoints_that_come_and_go_prolong_nothing() {
        let queue = Arc::new(Queue::default());
        let pod = Arc::new(AtomicUsize::new(0));
        let limits = QueueLimits {
            timeout: Duration::from_millis(60),
            ..limits(9, 9)
        };
        let start = Instant::now();
        let mut place = queue.enter(&pod, limits, 0).expect("room");
        loop {
            queue.open();
            match place.wait(limits.timeout, false).await {
                Waited::Again => tokio::time::sleep(Duration::from_millis(10)).await,
                other => {
                    assert_eq!(other, Waited::Failed);
                    break;
                }
            }
        }
        assert!(start.elapsed() < seconds(10));
    }

    #[tokio::test]
    async fn places_are_limited_by_port_and_by_pod() {
        let queue = Arc::new(Queue::default());
        let other = Arc::new(Queue::default());
        let pods = [0; 2].map(|_| Arc::new(AtomicUsize::new(0)));
        let limits = limits(2, 2);
        let _first = queue.enter(&pods[0], limits, 0).expect("room");
        let _second = other.enter(&pods[0], limits, 0).expect("room");
        assert_eq!(queue.enter(&pods[0], limits, 0).err(), Some(Waited::Full));
        let _third = queue.enter(&pods[1], limits, 0).expect("room");
        assert_eq!(queue.enter(&pods[1], limits, 0).err(), Some(Waited::Full));
        assert_eq!((queue.waiting(), other.waiting()), (2, 1));
    }

    #[tokio::test]
    async fn one_at_a_time_looks_around() {
        let queue = Arc::new(Queue::default());
        let pod = Arc::new(AtomicUsize::new(0));
        let mut places = [0; 2].map(|_| queue.enter(&pod, limits(9, 9), 0).expect("room"));
        let [one, other] = &mut places;
        tokio::select! {
            biased;
            waited = one.wait(seconds(3), true) => assert_eq!(waited, Waited::Again),
            _ = other.wait(seconds(3), true) => panic!("it was not its turn"),
        }
        assert_eq!((one.looks, other.looks), (1, 0));
    }
}
