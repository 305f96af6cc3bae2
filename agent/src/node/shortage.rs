//! Whether CPUs are short: whether a thread of the agent that has something to do waits for one.
//!
//! A probe, a thread that does nothing else, is woken now and then and says how late it ran. It has the nice value that threads of pods
//! have while CPUs are not short, and is of the same control group, so that it waits as they would; it goes on while they come first, and so
//! it is seen, too, when they need not any more.
//!
//! To come first always would cost more than it gives: the kernel wakes a real-time thread where it ran last, and any other
//! beside who woke it, if that one waits for the answer. In a virtual machine, another CPU that is idle has to be
//! woken by its host (measured on one node, at 500 requests a second: 53 µs instead of 190 µs more than without a mesh in the median).

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

/// What is known of it.
pub(super) struct Shortage {
    probe: Arc<Probe>,
    thread: Thread,
    level: Level,
}

/// What the thread that is woken and who wakes it tell each other.
struct Probe {
    start: Instant,
    /// When it was woken, since the start, in nanoseconds; 0: it has run.
    woken: AtomicU64,
    /// How late it ran the last time, in nanoseconds.
    late: AtomicU64,
}

/// A leaky bucket of times that the probe was late: now and then it is so everywhere.
#[derive(Debug, Default)]
struct Level {
    filled: f64,
    is_short: bool,
}

impl Shortage {
    /// Starts the probe, which does `prepare` before anything else.
    ///
    /// # Errors
    /// The kernel makes no thread.
    pub(super) fn watch(prepare: impl FnOnce() + Send + 'static) -> io::Result<Self> {
        let probe = Arc::new(Probe {
            start: Instant::now(),
            woken: AtomicU64::new(0),
            late: AtomicU64::new(0),
        });
        let thread = thread::Builder::new()
            .name("weft-probe".into())
            .stack_size(64 * 1024)
            .spawn({
                let probe = Arc::clone(&probe);
                move || {
                    prepare();
                    probe.run();
                }
            })?;
        Ok(Self {
            probe,
            thread: thread.thread().clone(),
            level: Level::default(),
        })
    }

    /// Wakes the probe, and says what is known from the times before. To be asked every 20 ms or so.
    pub(super) fn look(&mut self) -> bool {
        let now = self.probe.now();
        let late = match self.probe.woken.load(Ordering::Acquire) {
            0 => self.probe.late.load(Ordering::Relaxed),
            woken => now.saturating_sub(woken),
        };
        self.level.look(Duration::from_nanos(late));
        if self.probe.woken.load(Ordering::Acquire) == 0 {
            self.probe.woken.store(now, Ordering::Release);
            self.thread.unpark();
        }
        self.level.is_short
    }
}

impl Probe {
    fn run(&self) -> ! {
        loop {
            thread::park();
            match self.woken.load(Ordering::Acquire) {
                0 => {}
                woken => {
                    let late = self.now().saturating_sub(woken);
                    self.late.store(late, Ordering::Relaxed);
                    self.woken.store(0, Ordering::Release);
                }
            }
        }
    }

    /// Never 0.
    fn now(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_nanos()).map_or(u64::MAX, |it| it.max(1))
    }
}

impl Level {
    fn look(&mut self, late: Duration) {
        self.filled = match late >= LATE {
            true => (self.filled + 1.0).min(MOST),
            false => (self.filled - FORGOTTEN).max(0.0),
        };
        self.is_short = self.filled >= if self.is_short { FORGOTTEN } else { ENOUGH };
    }
}

/// An idle CPU of a virtual machine is there in a tenth of it.
const LATE: Duration = Duration::from_millis(1);
/// How much of one time is forgotten at each look: if every fiftieth is late, CPUs stay short.
const FORGOTTEN: f64 = 0.02;
/// How many times say that they are short, and how many are remembered.
const ENOUGH: f64 = 2.0;
const MOST: f64 = 5.0;

#[cfg(test)]
mod tests {
    use super::*;

    /// How often the probe was late, then in time → whether CPUs are short
    #[test]
    fn cpus_are_short_when_the_probe_is_late_more_than_now_and_then() {
        for (rounds, expected) in [
            (&[(1, 0)][..], false),
            (&[(2, 0)], true),
            (&[(1, 40), (1, 0)], false),
            (&[(1, 10), (1, 10), (1, 0)], true),
            (&[(1, 100), (1, 100), (1, 100), (1, 0)], false),
            (&[(2, 90)], true),
            (&[(2, 101)], false),
            (&[(1000, 240)], true),
            (&[(1000, 251)], false),
            (&[(2, 40), (1, 40), (1, 40), (1, 40)], true),
        ] {
            let mut level = Level::default();
            for (late, in_time) in rounds {
                (0..*late).for_each(|_| level.look(LATE));
                (0..*in_time).for_each(|_| level.look(LATE / 10));
            }
            assert_eq!(level.is_short, expected, "{rounds:?}");
        }
    }

    /// One that is held up has not said yet how late it is.
    #[test]
    fn a_probe_that_does_not_run_is_late() {
        let (go_on, held_up) = std::sync::mpsc::channel::<()>();
        let hold_up = move || {
            let _ = held_up.recv();
        };
        let mut shortage = Shortage::watch(hold_up).expect("starts");
        let mut is_short = || {
            thread::sleep(2 * LATE);
            shortage.look()
        };
        let looks: Vec<_> = (0..4).map(|_| is_short()).collect();
        assert!(looks[3], "{looks:?}");
        drop(go_on);
    }
}
