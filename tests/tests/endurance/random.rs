//! Random choices that can be repeated: the seed is printed, and taken from `WEFT_SEED`.

use std::time::{Duration, SystemTime};

/// Xorshift: good enough to pick moments with.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(test: &str) -> Random {
        let from_clock = || {
            let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
            now.map_or(1, |it| it.as_nanos() as u64 | 1)
        };
        let given = std::env::var("WEFT_SEED").ok();
        let seed = given
            .and_then(|it| it.parse().ok())
            .unwrap_or_else(from_clock);
        weft_tests::checks::report(&format!("{test}: WEFT_SEED={seed}"));
        Random(seed.max(1))
    }

    /// A number below `end`.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }

    /// A while.
    pub(crate) fn pause(&mut self, most: Duration) {
        let most = u64::try_from(most.as_micros()).unwrap_or(u64::MAX);
        std::thread::sleep(Duration::from_micros(self.below(most)));
    }

    /// Puts a list in any order.
    pub(crate) fn shuffle<T>(&mut self, list: &mut [T]) {
        for last in (1..list.len()).rev() {
            let other = self.below(last as u64 + 1) as usize;
            list.swap(last, other);
        }
    }
}
