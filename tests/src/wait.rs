//! Waiting for a condition with a deadline; the only way anything here waits.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Long enough for anything that works on a busy machine, short enough to notice what does not.
pub const DEADLINE: Duration = Duration::from_secs(15);

/// Calls `condition` until it gives a value, and fails after `deadline` with what it was waiting
/// for and the last reason why not.
///
/// An error of the condition means "not yet": the last one is part of the failure.
pub fn wait_for<T>(
    what: &str,
    deadline: Duration,
    mut condition: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let start = Instant::now();
    let mut pause = Duration::from_millis(2);
    loop {
        let reason = match condition() {
            Ok(Some(value)) => return Ok(value),
            Ok(None) => None,
            Err(error) => Some(error),
        };
        if start.elapsed() >= deadline {
            match reason {
                Some(error) => bail!("waited {deadline:?} for {what}: {error:#}"),
                None => bail!("waited {deadline:?} for {what}"),
            }
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

/// [`wait_for`] for a condition that is just true or not.
pub fn wait_until(
    what: &str,
    deadline: Duration,
    mut condition: impl FnMut() -> bool,
) -> Result<()> {
    wait_for(what, deadline, || Ok(condition().then_some(())))
}
