//! When certificates are renewed and in which order, as pure functions.

use std::time::{Duration, SystemTime};

use serde::Serialize;

use crate::discovery::backoff;

/// How well off an identity is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum CertificateState {
    /// No certificate has come yet.
    Missing,
    /// It has one.
    Held,
    /// It has one that should have been renewed a good while ago.
    InDanger,
    /// It has one that nobody believes any more.
    Expired,
}

/// What waits for a signature. Sorts by what comes first: an expiring certificate before a new one,
/// a new one that somebody waits for before others, then the one due longest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Turn {
    class: u8,
    due: SystemTime,
}

/// When to renew a certificate that came at `received`: between 50 and 60 percent of what was left of
/// its life then, by `jitter` (0 to 1). Counted from the receipt, as issuers date certificates back;
/// never at once, so that a signer of nearly expired ones is not asked without pause.
pub(super) fn renew_at(received: SystemTime, not_after: SystemTime, jitter: f64) -> SystemTime {
    let life = not_after.duration_since(received).unwrap_or_default();
    received
        + life
            .mul_f64(0.5 + 0.1 * jitter.clamp(0.0, 1.0))
            .max(RETRY_BASE)
}

/// How long to wait after failures in a row. With time left, a quarter of it at most, so that there
/// are always more tries before it is too late; without, seconds.
pub(super) fn retry_after(failures: u32, left: Option<Duration>, jitter: f64) -> Duration {
    let longest = left.map_or(RETRY_MISSING_MAX, |left| {
        (left / 4).clamp(RETRY_MISSING_MAX, RETRY_MAX)
    });
    backoff::delay(failures.max(1), RETRY_BASE, longest, jitter)
}

/// The state of a certificate that came at `received`.
pub(super) fn state(
    now: SystemTime,
    received: SystemTime,
    not_after: SystemTime,
) -> CertificateState {
    let Ok(left) = not_after.duration_since(now) else {
        return CertificateState::Expired;
    };
    let life = not_after.duration_since(received).unwrap_or_default();
    if left.is_zero() {
        CertificateState::Expired
    } else if left < life / 4 {
        CertificateState::InDanger
    } else {
        CertificateState::Held
    }
}

/// The turn of an identity that is due.
pub(super) fn turn(holds_one: bool, awaited: bool, due: SystemTime) -> Turn {
    let class = match (holds_one, awaited) {
        (true, _) => 0,
        (false, true) => 1,
        (false, false) => 2,
    };
    Turn { class, due }
}

const RETRY_BASE: Duration = Duration::from_millis(500);
const RETRY_MISSING_MAX: Duration = Duration::from_secs(10);
const RETRY_MAX: Duration = Duration::from_secs(300);

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    fn at(hours: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + HOUR * 1000 + HOUR * u32::try_from(hours).expect("small")
    }

    #[test]
    fn renewal_starts_at_half_of_life() {
        for (received, not_after, jitter, expected) in [
            (at(0), at(24), 0.0, at(12)),
            (at(0), at(20), 1.0, at(12)),
            (at(0), at(20), 0.5, at(11)),
            (at(4), at(24), 0.0, at(14)),
            (at(5), at(5), 0.0, at(5) + RETRY_BASE),
            (at(6), at(5), 0.7, at(6) + RETRY_BASE),
            (at(0), at(20), 9.0, at(12)),
        ] {
            let actual = renew_at(received, not_after, jitter);
            let off = actual
                .duration_since(expected)
                .unwrap_or_else(|it| it.duration());
            assert!(off < Duration::from_millis(1), "{actual:?} {expected:?}");
        }
    }

    #[test]
    fn retries_keep_ahead_of_the_end() {
        let secs = Duration::from_secs;
        for (failures, left, expected) in [
            (0, None, Duration::from_millis(500)),
            (1, None, Duration::from_millis(500)),
            (2, None, secs(1)),
            (20, None, secs(10)),
            (20, Some(12 * HOUR), secs(300)),
            (20, Some(secs(400)), secs(100)),
            (20, Some(secs(8)), secs(10)),
            (20, Some(secs(0)), secs(10)),
            (3, Some(12 * HOUR), secs(2)),
        ] {
            assert_eq!(retry_after(failures, left, 0.0), expected, "{failures}");
        }
        assert_eq!(retry_after(20, None, 1.0), secs(5));
    }

    #[test]
    fn danger_shows_long_before_the_end() {
        use CertificateState::*;
        for (now, expected) in [
            (at(0), Held),
            (at(12), Held),
            (at(18), Held),
            (at(19), InDanger),
            (at(23), InDanger),
            (at(24), Expired),
            (at(30), Expired),
        ] {
            assert_eq!(state(now, at(0), at(24)), expected, "{now:?}");
        }
    }

    #[test]
    fn what_expires_goes_first() {
        let mut turns = [
            turn(false, false, at(0)),
            turn(false, true, at(2)),
            turn(true, false, at(5)),
            turn(false, true, at(1)),
            turn(true, true, at(4)),
        ];
        turns.sort();
        let expected = [
            turn(true, true, at(4)),
            turn(true, false, at(5)),
            turn(false, true, at(1)),
            turn(false, true, at(2)),
            turn(false, false, at(0)),
        ];
        assert_eq!(turns, expected);
    }
}
