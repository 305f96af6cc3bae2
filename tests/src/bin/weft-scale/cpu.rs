//! The CPU time that processes use.

use std::fs;

use anyhow::{Context, Result};
use weft_tests::usage::TICKS_PER_SECOND;

/// A process, or threads of this one.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Who {
    Process(u32),
    /// Those of this name.
    Threads(&'static str),
}

/// CPU time so far, in seconds.
pub(crate) fn cpu_seconds(who: Who) -> Result<f64> {
    let ticks = match who {
        Who::Process(pid) => ticks(&fs::read_to_string(format!("/proc/{pid}/stat"))?),
        Who::Threads(name) => {
            let mut sum = 0;
            for task in fs::read_dir("/proc/self/task")? {
                // A thread may end meanwhile.
                let stat = fs::read_to_string(task?.path().join("stat")).unwrap_or_default();
                if stat.contains(&format!("({name})")) {
                    sum += ticks(&stat).unwrap_or_default();
                }
            }
            Some(sum)
        }
    };
    Ok(ticks.context("no times in the process's stat")? as f64 / TICKS_PER_SECOND)
}

/// User and system time: the 14th and 15th field, counted from behind the name, which may have spaces.
fn ticks(stat: &str) -> Option<u64> {
    let (_, fields) = stat.rsplit_once(") ")?;
    let times = fields.split_whitespace().skip(11).take(2);
    times.map(|it| it.parse::<u64>().ok()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_found_behind_any_name() {
        let stat = "7 (a b) c) S 1 7 7 0 -1 4194560 100 0 0 0 31 11 0 0 20 0 1 0 5 1 1 1";
        assert_eq!(ticks(stat), Some(42));
        assert_eq!(ticks("7 (a"), None);
    }
}
