//! Moments as they are shown.

use std::time::{SystemTime, UNIX_EPOCH};

/// This machine's clock, in milliseconds since 1970.
pub fn now_ms() -> u64 {
    // A clock before 1970 is wrong, which 1970 is as well.
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    u64::try_from(since.unwrap_or_default().as_millis()).unwrap_or(u64::MAX)
}

/// How far a moment is from now: `in 3 hours`, `5 minutes ago`.
pub fn when(moment_ms: u64) -> String {
    let now = now_ms();
    match moment_ms.checked_sub(now) {
        Some(left) => format!("in {}", span(left)),
        None => format!("{} ago", span(now - moment_ms)),
    }
}

fn span(ms: u64) -> String {
    let minutes = ms / 60_000;
    match minutes {
        1 => "1 minute".to_owned(),
        0..=119 => format!("{minutes} minutes"),
        120..=2879 => format!("{} hours", minutes / 60),
        _ => format!("{} days", minutes / 60 / 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_shown_in_the_unit_that_fits() {
        let minute = 60_000;
        for (ms, expected) in [
            (0, "0 minutes"),
            (minute, "1 minute"),
            (119 * minute, "119 minutes"),
            (120 * minute, "2 hours"),
            (48 * 60 * minute, "2 days"),
        ] {
            assert_eq!(span(ms), expected);
        }
        assert_eq!(when(0).split_once(' ').map(|it| it.1), Some("days ago"));
    }
}
