//! What the machine did during a load: the CPU time of all processes of the run, and what others
//! took away meanwhile.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use weft_tests::usage::TICKS_PER_SECOND;

/// A measurement under way.
pub(crate) struct Watch {
    cgroup: PathBuf,
    ours_us: u64,
    machine: Ticks,
}

/// What happened between start and end.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Usage {
    /// CPU time of everything in the run's cgroup: applications, agents, controller.
    pub(crate) cpu_seconds: f64,
    /// The part of the machine's time that its host took.
    pub(crate) stolen: f64,
    /// The part of the machine's time that processes outside of the run took.
    pub(crate) foreign: f64,
}

impl Watch {
    /// Starts it; `cgroup` holds everything that the run consists of.
    pub(crate) fn start(cgroup: &Path) -> Result<Watch> {
        Ok(Watch {
            cgroup: cgroup.to_owned(),
            ours_us: cgroup_us(cgroup)?,
            machine: Ticks::now()?,
        })
    }

    /// Ends it.
    pub(crate) fn finish(self) -> Result<Usage> {
        let ours_us = cgroup_us(&self.cgroup)?.saturating_sub(self.ours_us);
        let cpu_seconds = ours_us as f64 / 1e6;
        let machine = Ticks::now()?.since(&self.machine);
        let total = (machine.total as f64).max(1.0);
        let ours = cpu_seconds * TICKS_PER_SECOND;
        Ok(Usage {
            cpu_seconds,
            stolen: machine.stolen as f64 / total,
            foreign: ((machine.processes as f64 - ours) / total).max(0.0),
        })
    }
}

impl Usage {
    /// Whether others took so much that the figures say little.
    pub(crate) fn is_disturbed(&self) -> bool {
        self.stolen > MOST_STOLEN || self.foreign > MOST_FOREIGN
    }

    /// How much others took.
    pub(crate) fn disturbance(&self) -> f64 {
        self.stolen + self.foreign
    }
}

/// The first line of `/proc/stat`.
#[derive(Clone, Copy)]
struct Ticks {
    total: u64,
    processes: u64,
    stolen: u64,
}

impl Ticks {
    fn now() -> Result<Ticks> {
        let text = fs::read_to_string("/proc/stat")?;
        Ticks::parse(&text).context("/proc/stat does not begin with the time of all CPUs")
    }

    /// user, nice, system, idle, iowait, irq, softirq, steal; what follows is part of user.
    fn parse(text: &str) -> Option<Ticks> {
        let fields = text.lines().next()?.strip_prefix("cpu ")?;
        let fields: Vec<u64> = fields
            .split_whitespace()
            .map_while(|field| field.parse().ok())
            .collect();
        Some(Ticks {
            total: fields.get(..8)?.iter().sum(),
            processes: fields.get(..3)?.iter().sum(),
            stolen: *fields.get(7)?,
        })
    }

    fn since(&self, earlier: &Ticks) -> Ticks {
        Ticks {
            total: self.total.saturating_sub(earlier.total),
            processes: self.processes.saturating_sub(earlier.processes),
            stolen: self.stolen.saturating_sub(earlier.stolen),
        }
    }
}

/// The CPU time of a cgroup and all below it.
fn cgroup_us(cgroup: &Path) -> Result<u64> {
    let file = cgroup.join("cpu.stat");
    let text = fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
    text.lines()
        .find_map(|line| line.strip_prefix("usage_usec "))
        .and_then(|value| value.trim().parse().ok())
        .with_context(|| format!("no usage_usec in {}", file.display()))
}

/// Forgets the most memory that a process has had, so that [`weft_tests::usage::peak_bytes`] counts from now.
pub(crate) fn forget_peak(pid: u32) -> Result<()> {
    fs::write(format!("/proc/{pid}/clear_refs"), "5")
        .with_context(|| format!("resetting the peak of process {pid}"))
}

const MOST_STOLEN: f64 = 0.02;
/// More than a short program now and then, which no machine is without.
const MOST_FOREIGN: f64 = 0.08;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_time_of_all_cpus() {
        let text = "cpu  10 1 5 100 3 0 2 7 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n";
        let ticks = Ticks::parse(text).expect("parses");
        assert_eq!((ticks.total, ticks.processes, ticks.stolen), (128, 16, 7));
        assert!(Ticks::parse("cpu  1 2 3\n").is_none());
    }
}
