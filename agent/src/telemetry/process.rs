//! Metrics of the process itself, under the names that every Prometheus client uses.

use std::fs;

use nix::sys::resource::{Resource, getrlimit};
use nix::unistd::{SysconfVar, sysconf};

use super::samples::{Kind, Samples, Source};

/// Reads `/proc/self` at each scrape.
#[derive(Debug)]
pub(super) struct Process {
    ticks_per_second: f64,
    page_bytes: f64,
}

impl Process {
    pub(super) fn new() -> Self {
        let value = |variable, fallback| match sysconf(variable) {
            Ok(Some(value)) => value as f64,
            _ => fallback,
        };
        Self {
            ticks_per_second: value(SysconfVar::CLK_TCK, 100.0),
            page_bytes: value(SysconfVar::PAGE_SIZE, 4096.0),
        }
    }
}

impl Source for Process {
    fn collect(&self, samples: &mut Samples) {
        let help = "Panics: each ended what it happened in, and is a bug";
        let panics = crate::panics::count() as f64;
        samples.add(Kind::Counter, "weft_panics", help, vec![], panics);
        let mut gauge = |name, help, value| samples.add(Kind::Gauge, name, help, vec![], value);
        if let Ok(entries) = fs::read_dir("/proc/self/fd") {
            gauge(
                "process_open_fds",
                "Open file descriptors",
                entries.count() as f64,
            );
        }
        if let Ok((soft, _)) = getrlimit(Resource::RLIMIT_NOFILE) {
            gauge(
                "process_max_fds",
                "Limit of open file descriptors",
                soft as f64,
            );
        }
        let Some(stat) = fs::read_to_string("/proc/self/stat").ok() else {
            return;
        };
        let Some(stat) = Stat::parse(&stat) else {
            return;
        };
        gauge("process_threads", "Threads", stat.threads);
        gauge(
            "process_virtual_memory_bytes",
            "Virtual memory",
            stat.virtual_bytes,
        );
        gauge(
            "process_resident_memory_bytes",
            "Resident memory",
            stat.resident_pages * self.page_bytes,
        );
        samples.add(
            Kind::Counter,
            "process_cpu_seconds",
            "User and system CPU time",
            vec![],
            stat.cpu_ticks / self.ticks_per_second,
        );
    }
}

/// The fields of `/proc/PID/stat` used here (proc(5)).
#[derive(Debug, PartialEq)]
struct Stat {
    cpu_ticks: f64,
    threads: f64,
    virtual_bytes: f64,
    resident_pages: f64,
}

impl Stat {
    fn parse(text: &str) -> Option<Self> {
        // The command's name is in parentheses and may hold anything, so fields count from the last one.
        let (_, rest) = text.rsplit_once(')')?;
        let fields: Vec<&str> = rest.split_whitespace().collect();
        // `rest` begins with field 3 of proc(5).
        let field = |number: usize| fields.get(number - 3)?.parse::<f64>().ok();
        Some(Self {
            cpu_ticks: field(14)? + field(15)?,
            threads: field(20)?,
            virtual_bytes: field(23)?,
            resident_pages: field(24)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_is_read_behind_any_command_name() {
        let text = "7 (a) b (c) S 1 7 7 0 -1 4194560 9 0 0 0 30 12 0 0 20 0 5 0 99 4096 17 1844 0";
        let stat = Stat::parse(text).expect("parses");
        assert_eq!(
            stat,
            Stat {
                cpu_ticks: 42.0,
                threads: 5.0,
                virtual_bytes: 4096.0,
                resident_pages: 17.0
            }
        );
        assert_eq!(Stat::parse("garbage"), None);
    }
}
