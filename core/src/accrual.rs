//! When an endpoint that fails is left out for a while: the settings of Linkerd's failure accrual.

use std::time::Duration;

use serde::Serialize;

/// What makes an endpoint be left out, and for how long. Numbers are whole, so that settings can be
/// compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct FailureAccrual {
    /// So many failures without a success in between leave it out; 0: none do.
    pub max_failures: u32,
    /// So small a share of successes leaves it out, too.
    pub success_rate: Option<SuccessRate>,
    /// How long it is left out the first time; above 0.
    pub min_penalty: Duration,
    /// The most that this grows to, by doubling with each probe that fails; at least the former.
    pub max_penalty: Duration,
    /// How much longer than that it may be, by chance: thousandths of it.
    pub jitter_permille: u32,
}

/// The share of successes that an endpoint must have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct SuccessRate {
    /// Below so many thousandths it is left out.
    pub threshold_permille: u32,
    /// Looked at over so long a time, which ends now.
    pub window: Duration,
    /// Not before it has had so many requests in that time.
    pub min_requests: u32,
}

impl FailureAccrual {
    /// The largest jitter: a hundred times the penalty.
    pub const MAX_JITTER_PERMILLE: u32 = 100_000;
    /// The longest time that any of this may be.
    pub const MAX_DURATION: Duration = Duration::from_secs(24 * 60 * 60);

    /// What makes the settings useless, if anything does.
    pub fn fault(&self) -> Option<&'static str> {
        let rate = self.success_rate;
        let longest = self
            .max_penalty
            .max(rate.map_or(Duration::ZERO, |it| it.window));
        if self.min_penalty.is_zero() {
            Some("the least penalty is 0")
        } else if self.min_penalty > self.max_penalty {
            Some("the least penalty is above the largest one")
        } else if longest > Self::MAX_DURATION {
            Some("a time is longer than 24 h")
        } else if self.jitter_permille > Self::MAX_JITTER_PERMILLE {
            Some("the jitter ratio is above 100")
        } else if rate.is_some_and(|it| it.threshold_permille > 1000) {
            Some("the success rate is above 1")
        } else if rate.is_some_and(|it| it.window < SuccessRate::MIN_WINDOW) {
            Some("the window of the success rate is below 1 s")
        } else {
            None
        }
    }
}

impl SuccessRate {
    /// The shortest window.
    pub const MIN_WINDOW: Duration = Duration::from_secs(1);
}

/// Consecutive failures only, with Linkerd's numbers.
impl Default for FailureAccrual {
    fn default() -> Self {
        Self {
            max_failures: 7,
            success_rate: None,
            min_penalty: Duration::from_secs(1),
            max_penalty: Duration::from_secs(60),
            jitter_permille: 500,
        }
    }
}

/// Linkerd's numbers.
impl Default for SuccessRate {
    fn default() -> Self {
        Self {
            threshold_permille: 800,
            window: Duration::from_secs(10),
            min_requests: 5,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn useless_settings_have_a_fault() {
        let good = FailureAccrual {
            success_rate: Some(SuccessRate::default()),
            ..FailureAccrual::default()
        };
        assert_eq!(good.fault(), None);
        let with = |change: fn(&mut FailureAccrual)| {
            let mut changed = good;
            change(&mut changed);
            changed.fault()
        };
        let rate = |change: fn(&mut SuccessRate)| {
            let mut changed = SuccessRate::default();
            change(&mut changed);
            let success_rate = Some(changed);
            FailureAccrual {
                success_rate,
                ..good
            }
            .fault()
        };
        for fault in [
            with(|it| it.min_penalty = Duration::ZERO),
            with(|it| it.min_penalty = Duration::from_secs(61)),
            with(|it| it.max_penalty = Duration::MAX),
            with(|it| it.jitter_permille = 100_001),
            rate(|it| it.threshold_permille = 1001),
            rate(|it| it.window = Duration::from_millis(999)),
            rate(|it| it.window = Duration::MAX),
        ] {
            assert!(fault.is_some());
        }
    }
}
