//! Which time is asked about.

use std::time::Duration;

use crate::telemetry::LONGEST;

/// Reads `seconds=60`.
pub(super) fn window(query: &str) -> Result<Duration, String> {
    let mut window = None;
    for (key, value) in form_urlencoded::parse(query.as_bytes()) {
        if key != "seconds" {
            // What is ignored would be answered wrongly.
            return Err(format!("this agent does not know {key}"));
        }
        let seconds = value.parse().ok().map(Duration::from_secs);
        let seconds = seconds.filter(|it| !it.is_zero() && *it <= LONGEST);
        window = Some(seconds.ok_or_else(wrong)?);
    }
    window.ok_or_else(wrong)
}

fn wrong() -> String {
    let longest = LONGEST.as_secs();
    format!("seconds= has to be a number from 1 to {longest}: no more is remembered")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_of_whole_seconds_and_ends() {
        assert_eq!(window("seconds=60"), Ok(Duration::from_secs(60)));
        assert_eq!(window("seconds=600"), Ok(LONGEST));
        for bad in [
            "",
            "seconds=",
            "seconds=0",
            "seconds=601",
            "seconds=-1",
            "seconds=1.5",
            "seconds=99999999999999999999",
        ] {
            assert_eq!(window(bad), Err(wrong()), "{bad}");
        }
        let unknown = window("minutes=1").expect_err("unknown");
        assert_eq!(unknown, "this agent does not know minutes");
    }
}
