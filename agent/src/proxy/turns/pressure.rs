//! Whether threads of this machine wait for a CPU: told by one that sleeps for a millisecond, again and
//! again, and looks how late it wakes.
//!
//! That is what an application feels that has just been sent something, whoever uses the CPUs. It is looked
//! at only while somebody asks; else the thread is parked.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{LazyLock, Mutex, PoisonError};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

/// The machine's.
pub(super) static PRESSURE: LazyLock<Pressure> = LazyLock::new(|| Pressure {
    start: Instant::now(),
    high_until_us: AtomicU64::new(0),
    asked_us: AtomicU64::new(0),
    is_parked: AtomicBool::new(false),
    thread: Mutex::new(None),
});

/// What is known of it.
pub(super) struct Pressure {
    start: Instant,
    high_until_us: AtomicU64,
    /// When somebody asked last.
    asked_us: AtomicU64,
    is_parked: AtomicBool,
    thread: Mutex<Option<Thread>>,
}

impl Pressure {
    /// How many times their share those may use that use much, since threads wait for CPUs or did a moment
    /// ago; none: as much as they like. For some time from now on somebody looks.
    pub(super) fn times_share(&'static self) -> Option<f64> {
        let now = self.now_us();
        let asked = self.asked_us.swap(now, Ordering::SeqCst);
        if asked == 0 || self.is_parked.load(Ordering::SeqCst) {
            self.wake();
        }
        times_share(now, self.high_until_us.load(Ordering::Relaxed))
    }

    fn now_us(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    fn wake(&'static self) {
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(thread) = &*thread {
            thread.unpark();
            return;
        }
        let started = thread::Builder::new()
            .name("weft-pressure".into())
            .stack_size(64 * 1024)
            .spawn(|| self.watch());
        match started {
            Ok(handle) => *thread = Some(handle.thread().clone()),
            Err(error) => tracing::warn!(%error, "nobody looks whether CPUs are short"),
        }
    }

    fn watch(&self) {
        let mut judge = Judge::default();
        loop {
            let before = self.now_us();
            if before.saturating_sub(self.asked_us.load(Ordering::SeqCst)) > ATTENTION_US {
                self.is_parked.store(true, Ordering::SeqCst);
                // Who asked after the look above has seen no parked thread: look again.
                if self
                    .now_us()
                    .saturating_sub(self.asked_us.load(Ordering::SeqCst))
                    > ATTENTION_US
                {
                    thread::park();
                }
                self.is_parked.store(false, Ordering::SeqCst);
                continue;
            }
            thread::sleep(NAP);
            let now = self.now_us();
            let late = (now - before).saturating_sub(NAP.as_micros() as u64);
            if let Some(until) = judge.wakes(now, late) {
                self.high_until_us.store(until, Ordering::Relaxed);
            }
        }
    }
}

/// Once while it is high, then more and more: what comes back with all its might is felt before it is seen.
fn times_share(now_us: u64, high_until_us: u64) -> Option<f64> {
    let Some(since) = now_us.checked_sub(high_until_us) else {
        return Some(1.0);
    };
    let steps = u32::try_from(since / STEP_US).unwrap_or(u32::MAX);
    (high_until_us > 0 && steps < STEPS).then(|| f64::from(2_u32.pow(steps)))
}

/// Decides from what its thread sees. Times are in microseconds.
#[derive(Debug, Default)]
struct Judge {
    /// One bit for each of the last times it woke: whether that was late.
    lately: u16,
    /// How long it holds, once it is high.
    hold: u64,
    high_until: u64,
}

impl Judge {
    /// The thread woke so late. Until when pressure is high, if that changes.
    fn wakes(&mut self, now: u64, late: u64) -> Option<u64> {
        self.lately = self.lately << 1 | u16::from(late > LATE_US);
        if self.lately.count_ones() < LATE_OFTEN || now < self.high_until {
            return None;
        }
        // What returns as soon as it may is held longer each time.
        let since = now - self.high_until;
        let returns = self.hold > 0 && since < self.hold.saturating_mul(2);
        self.hold = if returns {
            (self.hold * 2).min(LONGEST_HOLD_US)
        } else {
            SHORTEST_HOLD_US
        };
        self.lately = 0;
        self.high_until = now + self.hold;
        Some(self.high_until)
    }
}

const NAP: Duration = Duration::from_millis(1);
/// Timers of an idle machine are some 60 µs late.
const LATE_US: u64 = 300;
/// So many of 16 wakings: one may be chance.
const LATE_OFTEN: u32 = 2;
const SHORTEST_HOLD_US: u64 = 500_000;
const LONGEST_HOLD_US: u64 = 8_000_000;
/// How long it goes on looking when nobody asks.
const ATTENTION_US: u64 = 200_000;
/// The share doubles in that time, so often, once pressure is gone.
const STEP_US: u64 = 100_000;
const STEPS: u32 = 6;

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1000;

    #[test]
    fn one_late_waking_is_chance() {
        let mut judge = Judge::default();
        for time in 0..100 {
            let late = if time % 20 == 0 { 900 } else { 70 };
            assert_eq!(judge.wakes(time * MS, late), None, "at {time} ms");
        }
        assert_eq!(judge.wakes(101 * MS, 900), None);
        assert_eq!(judge.wakes(103 * MS, 900), Some(603 * MS));
    }

    #[test]
    fn what_returns_is_held_longer_and_not_for_ever() {
        let mut judge = Judge::default();
        let mut now = MS;
        let mut holds = Vec::new();
        for _ in 0..8 {
            // It is late whenever it is not held.
            assert_eq!(judge.wakes(now, 2000), None);
            now += 3 * MS;
            let until = judge.wakes(now, 2000).expect("late twice");
            holds.push((until - now) / MS);
            now = until + MS;
        }
        assert_eq!(holds, [500, 1000, 2000, 4000, 8000, 8000, 8000, 8000]);
        // It stayed away.
        now += 30_000 * MS;
        judge.wakes(now, 2000);
        let until = judge.wakes(now + MS, 2000);
        assert_eq!(until, Some(now + 501 * MS));
    }

    #[test]
    fn it_comes_back_step_by_step() {
        for (now, high_until, times) in [
            (MS, 0, None),
            (MS, 500 * MS, Some(1.0)),
            (500 * MS, 500 * MS, Some(1.0)),
            (599 * MS, 500 * MS, Some(1.0)),
            (600 * MS, 500 * MS, Some(2.0)),
            (1099 * MS, 500 * MS, Some(32.0)),
            (1100 * MS, 500 * MS, None),
            (u64::MAX, 500 * MS, None),
        ] {
            assert_eq!(
                times_share(now, high_until),
                times,
                "at {now} of {high_until}"
            );
        }
    }

    #[test]
    fn a_busy_machine_is_noticed_and_a_parked_thread_wakes() {
        for _ in 0..2 {
            let deadline = Instant::now() + Duration::from_secs(60);
            let is_over = std::sync::Arc::new(AtomicBool::new(false));
            let cpus = thread::available_parallelism().map_or(4, usize::from);
            let busy: Vec<_> = (0..cpus * 4)
                .map(|_| {
                    let is_over = std::sync::Arc::clone(&is_over);
                    thread::spawn(move || while !is_over.load(Ordering::Relaxed) {})
                })
                .collect();
            let mut noticed = false;
            while !noticed && Instant::now() < deadline {
                noticed = PRESSURE.times_share() == Some(1.0);
                thread::sleep(Duration::from_millis(1));
            }
            is_over.store(true, Ordering::Relaxed);
            for thread in busy {
                thread.join().expect("no panic");
            }
            assert!(noticed, "four busy threads for each CPU");
            while !PRESSURE.is_parked.load(Ordering::SeqCst) && Instant::now() < deadline {
                thread::sleep(Duration::from_millis(10));
            }
            assert!(PRESSURE.is_parked.load(Ordering::SeqCst), "nobody asks");
        }
    }
}
