//! How many retries there may be, so that a server that fails gets a little more than its requests and no multiple
//! of them.
//!
//! Each request lets a part of a retry be made within a time; beside that there is a rate that does not depend
//! on requests. What is not used in time is gone: a long quiet time is no reason for a burst. Pure: time is
//! handed in.

use std::time::{Duration, Instant};

use weft_core::route::BudgetSettings;

/// The retries that the requests of a route, or of a service, may have now.
#[derive(Debug)]
pub struct RetryBudget {
    settings: BudgetSettings,
    /// What requests let be made, in thousandths of a retry, by when they came: the newest first.
    deposits: [u64; SLOTS],
    /// When the newest of them begins.
    newest: Instant,
    /// What the rate lets be made: a second's worth at most.
    reserve: u64,
    filled: Instant,
}

impl RetryBudget {
    /// One that nothing was taken from yet.
    pub fn new(settings: BudgetSettings, now: Instant) -> Self {
        Self {
            deposits: [0; SLOTS],
            newest: now,
            reserve: u64::from(settings.per_second) * RETRY,
            filled: now,
            settings,
        }
    }

    /// The same without a second's worth of the rate: that comes with time.
    pub fn empty(settings: BudgetSettings, now: Instant) -> Self {
        Self {
            reserve: 0,
            ..Self::new(settings, now)
        }
    }

    /// A request has come.
    pub fn deposit(&mut self, now: Instant) {
        self.advance(now);
        self.deposits[0] += u64::from(self.settings.ratio_thousandths);
    }

    /// Takes a retry, if there is one.
    pub fn withdraw(&mut self, now: Instant) -> bool {
        self.advance(now);
        let of_requests: u64 = self.deposits.iter().sum();
        if of_requests + self.reserve < RETRY {
            return false;
        }
        let mut wanted = RETRY;
        // The oldest first: it is what is gone next.
        for deposit in self.deposits.iter_mut().rev() {
            let taken = wanted.min(*deposit);
            *deposit -= taken;
            wanted -= taken;
        }
        self.reserve -= wanted;
        true
    }

    fn advance(&mut self, now: Instant) {
        let slot = (self.settings.ttl / SLOTS as u32).max(Duration::from_millis(1));
        let passed = now.saturating_duration_since(self.newest);
        let slots = passed.as_nanos() / slot.as_nanos();
        if slots >= SLOTS as u128 {
            self.deposits = [0; SLOTS];
            self.newest = now;
        } else if slots > 0 {
            // Below the number of slots.
            let slots = slots as usize;
            self.deposits.rotate_right(slots);
            self.deposits[..slots].fill(0);
            self.newest += slot * slots as u32;
        }
        let most = u64::from(self.settings.per_second) * RETRY;
        let since = now.saturating_duration_since(self.filled);
        let since_ms = u64::try_from(since.as_millis()).unwrap_or(u64::MAX);
        // Thousandths per millisecond are retries per second.
        let more = since_ms.saturating_mul(u64::from(self.settings.per_second));
        if since_ms > 0 {
            self.reserve = self.reserve.saturating_add(more).min(most);
            // What is left of the millisecond counts for the next time.
            self.filled = match since_ms {
                u64::MAX => now,
                ms => self.filled + Duration::from_millis(ms),
            };
        }
    }
}

/// A retry, in thousandths.
const RETRY: u64 = 1000;
/// The parts of the time in which requests count.
const SLOTS: usize = 10;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn settings(ratio_thousandths: u32, per_second: u32) -> BudgetSettings {
        BudgetSettings {
            ratio_thousandths,
            per_second,
            ttl: Duration::from_secs(10),
        }
    }

    fn ms(number: u64) -> Duration {
        Duration::from_millis(number)
    }

    fn all(budget: &mut RetryBudget, now: Instant) -> usize {
        std::iter::from_fn(|| budget.withdraw(now).then_some(())).count()
    }

    /// (ratio, rate, requests at once, when retries are made) -> how many
    #[test]
    fn retries_follow_requests_for_a_while() {
        for (ratio, rate, requests, after, retries) in [
            (200, 0, 0, ms(0), 0),
            (200, 0, 4, ms(0), 0),
            (200, 0, 5, ms(0), 1),
            (200, 0, 100, ms(0), 20),
            (200, 0, 100, ms(8999), 20),
            (200, 0, 100, ms(10_000), 0),
            (200, 0, 100, ms(3_600_000), 0),
            (200, 10, 0, ms(0), 10),
            (200, 10, 100, ms(0), 30),
            (0, 10, 100, ms(100_000), 10),
            (1000, 0, 7, ms(1), 7),
        ] {
            let start = Instant::now();
            let mut budget = RetryBudget::new(settings(ratio, rate), start);
            for _ in 0..requests {
                budget.deposit(start);
            }
            let name = format!("{ratio} {rate} {requests} {after:?}");
            assert_eq!(all(&mut budget, start + after), retries, "{name}");
        }
    }

    #[test]
    fn the_rate_fills_up_with_time_and_no_further_than_a_second() {
        let start = Instant::now();
        let mut budget = RetryBudget::new(settings(0, 10), start);
        assert_eq!(all(&mut budget, start), 10);
        for (after, retries) in [(99, 0), (100, 1), (350, 2), (400, 1), (5000, 10), (5001, 0)] {
            assert_eq!(all(&mut budget, start + ms(after)), retries, "{after}");
        }
    }

    #[test]
    fn a_clock_that_stands_still_or_goes_back_gives_nothing() {
        let start = Instant::now() + ms(60_000);
        let mut budget = RetryBudget::new(settings(0, 10), start);
        assert_eq!(all(&mut budget, start), 10);
        assert_eq!(all(&mut budget, start - ms(30_000)), 0);
    }

    proptest! {
        /// Whatever happens when: never more than the ratio of all requests, and the rate with a second more.
        #[test]
        fn no_outage_is_amplified(
            steps in prop::collection::vec((0_u64..400, 0_usize..30, 0_usize..30), 0..200)
        ) {
            let start = Instant::now();
            let mut budget = RetryBudget::new(BudgetSettings::DEFAULT, start);
            let (mut now, mut requests, mut retries) = (start, 0.0, 0.0);
            for (wait, asked, tried) in steps {
                now += ms(wait);
                for _ in 0..asked {
                    budget.deposit(now);
                    requests += 1.0;
                }
                for _ in 0..tried {
                    retries += f64::from(u8::from(budget.withdraw(now)));
                }
                let seconds = (now - start).as_secs_f64();
                prop_assert!(retries <= 0.2 * requests + 10.0 * (seconds + 1.0) + 1e-6);
            }
        }
    }
}
