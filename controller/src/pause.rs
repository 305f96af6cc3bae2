//! How long to wait: longer and longer after failures, and never all at the same moment.

use std::time::Duration;

use tokio::time::Instant;

/// How long to wait after failures. A failure long after the one before it counts as the first.
#[derive(Debug)]
pub(crate) struct Pause {
    shortest: Duration,
    longest: Duration,
    failures: u32,
    last: Option<Instant>,
}

impl Pause {
    /// No failure yet. After the first it is half of the shortest at least, and never more than the longest.
    pub(crate) fn new(shortest: Duration, longest: Duration) -> Self {
        Self {
            shortest,
            longest,
            failures: 0,
            last: None,
        }
    }

    /// How long to wait after a failure at this moment.
    pub(crate) fn after(&mut self, now: Instant) -> Duration {
        if self.last.is_some_and(|last| now - last > self.quiet()) {
            self.failures = 0;
        }
        self.last = Some(now);
        let doubled = 2_u32.saturating_pow(self.failures.min(16));
        self.failures += 1;
        let whole = self.shortest.saturating_mul(doubled).min(self.longest);
        whole.mul_f64(0.5 + rand::random::<f64>() / 2.0)
    }

    /// It works: the next failure is the first.
    pub(crate) fn reset(&mut self) {
        self.failures = 0;
    }

    /// How long to wait after a failure, where somebody may have asked for longer: never less than that, and a little more, as others were asked
    /// for the same.
    pub(crate) fn after_asked(&mut self, now: Instant, asked: Option<Duration>) -> Duration {
        let own = self.after(now);
        let asked = asked.map(|it| it.mul_f64(1.0 + rand::random::<f64>() / 4.0));
        own.max(asked.unwrap_or_default())
    }

    /// After this long without failure there is none.
    pub(crate) fn quiet(&self) -> Duration {
        self.longest * 3
    }
}

/// A time that is up to a quarter shorter or longer, for what many do again and again.
pub(crate) fn about(time: Duration) -> Duration {
    time.mul_f64(0.75 + rand::random::<f64>() / 2.0)
}

/// Any time up to this one, for what many do once at the same moment.
pub(crate) fn within(time: Duration) -> Duration {
    time.mul_f64(rand::random())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_and_are_forgotten() {
        let mut pause = Pause::new(Duration::from_secs(1), Duration::from_secs(8));
        let mut now = Instant::now();
        for whole in [1, 2, 4, 8, 8, 8] {
            let whole = Duration::from_secs(whole);
            let waited = pause.after(now);
            assert!(
                waited >= whole / 2 && waited <= whole,
                "{waited:?} of {whole:?}"
            );
            now += waited;
        }
        pause.reset();
        assert!(pause.after(now) <= Duration::from_secs(1));
        assert!(pause.after(now) >= Duration::from_secs(1));
        now += Duration::from_secs(25);
        assert!(pause.after(now) <= Duration::from_secs(1));
    }

    #[test]
    fn who_asks_for_longer_is_heeded() {
        let mut pause = Pause::new(Duration::from_secs(1), Duration::from_secs(8));
        let asked = Duration::from_secs(20);
        let waited = pause.after_asked(Instant::now(), Some(asked));
        assert!(waited >= asked && waited <= asked * 5 / 4, "{waited:?}");
        let own = pause.after_asked(Instant::now(), Some(Duration::ZERO));
        assert!(own >= Duration::from_millis(500), "{own:?}");
    }
}
