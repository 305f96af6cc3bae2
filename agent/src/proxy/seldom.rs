//! Lines of the log that anybody can cause: one in ten seconds from each place in the code, with the
//! number of those that it stands for. All of them are there at the level of debugging.

use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// What one place in the code has said.
#[derive(Debug)]
pub(super) struct Seldom {
    /// Milliseconds after [`START`] from which on it may speak again.
    next_ms: AtomicU64,
    untold: AtomicU64,
}

impl Seldom {
    /// Nothing yet.
    pub(super) const fn new() -> Self {
        Self {
            next_ms: AtomicU64::new(0),
            untold: AtomicU64::new(0),
        }
    }

    /// Whether to speak now, and of how many.
    pub(super) fn now(&self) -> Option<u64> {
        self.at(START.elapsed())
    }

    fn at(&self, time: Duration) -> Option<u64> {
        self.untold.fetch_add(1, Ordering::Relaxed);
        let now = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let next = self.next_ms.load(Ordering::Relaxed);
        let mine = now >= next
            && self
                .next_ms
                .compare_exchange(next, now + PAUSE_MS, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok();
        mine.then(|| self.untold.swap(0, Ordering::Relaxed))
    }
}

/// Says something at the level of information, seldom.
macro_rules! tell {
    ($($what:tt)*) => {{
        static SELDOM: $crate::proxy::seldom::Seldom = $crate::proxy::seldom::Seldom::new();
        match SELDOM.now() {
            Some(times) => tracing::info!(times, $($what)*),
            None => tracing::debug!($($what)*),
        }
    }};
}
pub(super) use tell;

static START: LazyLock<Instant> = LazyLock::new(Instant::now);
const PAUSE_MS: u64 = 10_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_speaks_once_in_ten_seconds() {
        let seldom = Seldom::new();
        let at = |seconds| seldom.at(Duration::from_secs(seconds));
        assert_eq!(at(3), Some(1));
        assert_eq!([at(3), at(4), at(12)], [None; 3]);
        assert_eq!(at(13), Some(4));
        assert_eq!(at(22), None);
    }
}
