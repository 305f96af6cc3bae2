//! How long to wait before another try, as a pure function.

use std::time::Duration;

/// Doubles from `base` with every failure up to `max`, then takes away up to half by `jitter` (0 to
/// 1), so that the agents of a cluster do not come back in step. No failure: no wait.
pub fn delay(failures: u32, base: Duration, max: Duration, jitter: f64) -> Duration {
    let Some(doublings) = failures.checked_sub(1) else {
        return Duration::ZERO;
    };
    let factor = 1_u32.checked_shl(doublings).unwrap_or(u32::MAX);
    let full = base.saturating_mul(factor).min(max);
    full.mul_f64(1.0 - jitter.clamp(0.0, 1.0) / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_to_a_limit() {
        let (base, max) = (Duration::from_millis(200), Duration::from_secs(10));
        for (failures, jitter, expected_ms) in [
            (0, 0.0, 0),
            (1, 0.0, 200),
            (2, 0.0, 400),
            (3, 0.5, 600),
            (6, 0.0, 6400),
            (7, 0.0, 10_000),
            (7, 1.0, 5000),
            (40, 0.0, 10_000),
            (u32::MAX, 0.0, 10_000),
        ] {
            let expected = Duration::from_millis(expected_ms);
            assert_eq!(delay(failures, base, max, jitter), expected, "{failures}");
        }
    }
}
