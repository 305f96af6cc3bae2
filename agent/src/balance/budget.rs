//! How many retries there may be, so that a server that fails gets a little more than its requests and no multiple
//! of them.
//!
//! Each request lets a part of a retry be made within a time; beside that there is a rate that does not depend
//! on requests. What is not used in time is gone: a long quiet time is no reason for a burst. Pure: time is
//! handed in.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use weft_core::route::{BudgetSettings, RouteName};
use weft_core::{EgressName, Name};

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

    /// What it was made for.
    pub fn settings(&self) -> BudgetSettings {
        self.settings
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

/// The budgets of a service's port: of each rule of its routes, and of requests that none is for. Or of all that
/// leaves the cluster: of each rule of each network. All pods of the node share them.
#[derive(Debug, Default)]
pub struct RetryBudgets(Mutex<Vec<(BudgetOwner, Arc<Mutex<RetryBudget>>)>>);

/// Whose a budget is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BudgetOwner {
    /// A rule's: its route, and which one of it.
    Rule(RouteName, usize),
    /// The same of a route by which requests leave the cluster.
    Egress(EgressName, RouteName, usize),
    /// The port's, for requests that no rule is for.
    Port,
    /// The same of clients in a namespace, which has terms of its own.
    ClientsIn(Name),
}

impl RetryBudgets {
    /// Somebody's. It begins anew when its settings change.
    pub fn of(
        &self,
        owner: BudgetOwner,
        settings: BudgetSettings,
        now: Instant,
    ) -> Arc<Mutex<RetryBudget>> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = all.iter().position(|(it, _)| *it == owner) {
            let (_, budget) = &all[at];
            let known = budget.lock().unwrap_or_else(PoisonError::into_inner);
            if known.settings() == settings {
                drop(known);
                return Arc::clone(budget);
            }
            drop(known);
            all.swap_remove(at);
        }
        if all.len() >= MOST_BUDGETS {
            // Of routes that are gone, most likely: they were there first.
            all.remove(0);
        }
        let budget = Arc::new(Mutex::new(RetryBudget::new(settings, now)));
        all.push((owner, Arc::clone(&budget)));
        budget
    }
}

/// Of one port, or of all networks: more rules than that are rare, and their budgets begin anew more often.
const MOST_BUDGETS: usize = 256;
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

    #[test]
    fn each_rule_has_its_own_budget() {
        let now = Instant::now();
        let budgets = RetryBudgets::default();
        let name = RouteName {
            name: "shop/r".parse().expect("valid"),
            kind: weft_core::route::RouteKind::Http,
        };
        let of = |owner, settings| budgets.of(owner, settings, now);
        let rule = |at| BudgetOwner::Rule(name.clone(), at);
        let first = of(rule(0), settings(200, 10));
        assert!(Arc::ptr_eq(&first, &of(rule(0), settings(200, 10))));
        for owner in [
            rule(1),
            BudgetOwner::Port,
            BudgetOwner::ClientsIn("shop".parse().expect("valid")),
        ] {
            assert!(!Arc::ptr_eq(&first, &of(owner, settings(200, 10))));
        }
        assert!(!Arc::ptr_eq(&first, &of(rule(0), settings(100, 10))));
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
