//! Samples of live exchanges and flows, for people who watch.
//!
//! While nobody watches, an exchange costs one look at a number. While somebody does, what is sampled is put in a bounded
//! queue if there is room, and counted if there is none: traffic waits for nobody who watches. Neither headers nor queries
//! nor bodies are sampled, as they may have secrets.

mod event;
mod spec;
mod tapped;

pub use event::{Asked, Begin, End, Event, Glance, Protocol, What, Who};
pub use spec::{Named, Scope, Spec, WhoIs};
pub use tapped::Tapped;

use tapped::Candidate;

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use arc_swap::ArcSwap;
use tokio::sync::mpsc;

use super::labels::{Direction, PodLabels};
use super::samples::{Kind, Samples, Source};

/// Those who watch.
#[derive(Debug, Default)]
pub struct Taps {
    /// How many, for those who need not know more.
    count: AtomicUsize,
    taps: ArcSwap<Vec<Arc<Tap>>>,
    /// Held by who changes them.
    changing: Mutex<()>,
    next: AtomicU64,
}

/// Somebody who watches, until this is dropped.
#[derive(Debug)]
pub struct Tapping {
    taps: Arc<Taps>,
    tap: Arc<Tap>,
    events: mpsc::Receiver<Event>,
}

/// Those who watch a pod.
#[derive(Debug)]
pub struct Watched<'a> {
    taps: &'a Taps,
    by: Vec<Arc<Tap>>,
}

/// What somebody wants to see, and what there was no room for.
#[derive(Debug)]
struct Tap {
    spec: Spec,
    began: Instant,
    /// The second in which something was last sampled, and how often.
    window: AtomicU64,
    events: mpsc::Sender<Event>,
    dropped: AtomicU64,
    left_out: AtomicU64,
}

/// Too many watch already.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{MOST_TAPS} taps are open at this agent already, and it serves no more")]
pub struct TooManyTaps;

/// At the same time: as many as a controller has.
const MOST_TAPS: usize = 16;
/// Events that wait to be told, of each tap.
const MOST_WAITING: usize = 512;

impl Taps {
    /// Begins to sample.
    ///
    /// # Errors
    /// Too many watch already.
    pub fn add(self: &Arc<Self>, spec: Spec) -> Result<Tapping, TooManyTaps> {
        let (sender, events) = mpsc::channel(MOST_WAITING);
        let tap = Arc::new(Tap {
            spec,
            began: Instant::now(),
            window: AtomicU64::new(0),
            events: sender,
            dropped: AtomicU64::new(0),
            left_out: AtomicU64::new(0),
        });
        self.change(|taps| {
            if taps.len() >= MOST_TAPS {
                return Err(TooManyTaps);
            }
            taps.push(Arc::clone(&tap));
            Ok(())
        })?;
        let taps = Arc::clone(self);
        Ok(Tapping { taps, tap, events })
    }

    /// How many watch.
    pub fn count(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    /// Those who watch a pod; none: nobody does.
    pub fn of(&self, pod: &PodLabels) -> Option<Watched<'_>> {
        if self.count() == 0 {
            return None;
        }
        let who = WhoIs::pod(&pod.id, pod.owner.as_ref());
        let taps = self.taps.load();
        let by = taps.iter().filter(|it| it.spec.target.has(&who));
        let by: Vec<_> = by.cloned().collect();
        (!by.is_empty()).then_some(Watched { taps: self, by })
    }

    fn change<T>(&self, change: impl FnOnce(&mut Vec<Arc<Tap>>) -> T) -> T {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut taps = Vec::clone(&self.taps.load());
        let changed = change(&mut taps);
        self.count.store(taps.len(), Ordering::Relaxed);
        self.taps.store(Arc::new(taps));
        changed
    }
}

impl Source for Taps {
    fn collect(&self, samples: &mut Samples) {
        let help = "Taps that are open, by which people watch exchanges and flows";
        let count = self.count() as f64;
        samples.add(Kind::Gauge, "weft_taps_open", help, vec![], count);
    }
}

impl Watched<'_> {
    /// Whether somebody may want to see what is known so far.
    pub fn may_want(&self, glance: &Glance<'_>) -> bool {
        self.by.iter().any(|it| it.spec.may_want(glance))
    }

    /// Begins to sample an exchange or flow; none: nobody wants to see it, or nobody may see one more now. What is told of
    /// it is made only if somebody does and may.
    pub fn begin(self, glance: &Glance<'_>, begin: impl FnOnce() -> Begin) -> Option<Box<Tapped>> {
        let now = Instant::now();
        let by = self.by.into_iter();
        let by = by.filter(|it| it.spec.may_want(glance));
        let by: Vec<_> = by.filter_map(|it| Candidate::new(it, now)).collect();
        if by.is_empty() {
            return None;
        }
        let begin = begin();
        let by = by.into_iter();
        let by = by.filter_map(|it| it.decide(&begin, now)).collect();
        Tapped::begin(&self.taps.next, begin, by, now)
    }
}

impl Tapping {
    /// Waits for events, and moves some of them to the end of a list; says how many. 0: nothing comes any more.
    pub async fn events(&mut self, to: &mut Vec<Event>, most: usize) -> usize {
        self.events.recv_many(to, most).await
    }

    /// How many events were dropped, and how many exchanges and flows left out, since this was last asked.
    pub fn lost(&self) -> (u64, u64) {
        let take = |it: &AtomicU64| it.swap(0, Ordering::Relaxed);
        (take(&self.tap.dropped), take(&self.tap.left_out))
    }
}

impl Drop for Tapping {
    fn drop(&mut self) {
        self.taps
            .change(|taps| taps.retain(|it| !Arc::ptr_eq(it, &self.tap)));
    }
}

impl Tap {
    /// Whether one more may be sampled now.
    fn has_room(&self, now: Instant) -> bool {
        let second = now.saturating_duration_since(self.began).as_secs() + 1;
        let most = u64::from(self.spec.max_per_second);
        let counted = self
            .window
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |window| {
                match (window >> COUNT_BITS, window & COUNT) {
                    // One that is a moment behind counts with the others.
                    (last, count) if last >= second => (count < most).then_some(window + 1),
                    _ => (most > 0).then_some((second << COUNT_BITS) | 1),
                }
            });
        if counted.is_err() {
            self.left_out.fetch_add(1, Ordering::Relaxed);
        }
        counted.is_ok()
    }

    fn tell(&self, event: Event) {
        if self.events.try_send(event).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// The lower bits of a window are how many there were in its second.
const COUNT_BITS: u32 = 32;
const COUNT: u64 = (1 << COUNT_BITS) - 1;

#[cfg(test)]
mod tests;
