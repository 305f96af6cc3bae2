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
    late: AtomicU64::new(0),
    asked_us: AtomicU64::new(0),
    is_parked: AtomicBool::new(false),
    thread: Mutex::new(None),
});

/// What is known of it.
pub(super) struct Pressure {
    start: Instant,
    high_until_us: AtomicU64,
    /// How often it was found to be high.
    late: AtomicU64,
    /// When somebody asked last.
    asked_us: AtomicU64,
    is_parked: AtomicBool,
    thread: Mutex<Option<Thread>>,
}

/// What there is to tell of it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Pressed {
    /// Threads wait for CPUs, or did a moment ago.
    pub(super) is_high: bool,
    /// How often they were found to, all in all.
    pub(super) late: u64,
}

impl Pressure {
    /// How it is. For some time from now on somebody looks.
    pub(super) fn look(&'static self) -> Pressed {
        let now = self.now_us();
        let asked = self.asked_us.swap(now, Ordering::SeqCst);
        if asked == 0 || self.is_parked.load(Ordering::SeqCst) {
            self.wake();
        }
        Pressed {
            is_high: now < self.high_until_us.load(Ordering::Relaxed),
            late: self.late.load(Ordering::Relaxed),
        }
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
            if judge.wakes(late) {
                self.high_until_us.store(now + HOLD_US, Ordering::Relaxed);
                self.late.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

/// Decides from what its thread sees.
#[derive(Debug, Default)]
struct Judge {
    /// One bit for each of the last times it woke: whether that was late.
    lately: u16,
}

impl Judge {
    /// The thread woke so many microseconds late. Whether that is once too often.
    fn wakes(&mut self, late_us: u64) -> bool {
        self.lately = self.lately << 1 | u16::from(late_us > LATE_US);
        let is_often = self.lately.count_ones() >= LATE_OFTEN;
        if is_often {
            self.lately = 0;
        }
        is_often
    }
}

const NAP: Duration = Duration::from_millis(1);
/// Timers of an idle machine are some 60 µs late.
const LATE_US: u64 = 300;
/// So many of 16 wakings: one may be chance.
const LATE_OFTEN: u32 = 2;
/// How long what was is said to be.
const HOLD_US: u64 = 500_000;
/// How long it goes on looking when nobody asks.
const ATTENTION_US: u64 = 200_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_late_waking_is_chance() {
        let mut judge = Judge::default();
        for time in 0..100 {
            let late = if time % 20 == 0 { 900 } else { 70 };
            assert!(!judge.wakes(late), "at {time} ms");
        }
        assert!(!judge.wakes(900) && !judge.wakes(70) && judge.wakes(900));
        // It begins anew.
        assert!(!judge.wakes(900) && judge.wakes(900));
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
                noticed = PRESSURE.look().is_high;
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
