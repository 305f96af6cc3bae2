//! What a process uses, as the kernel says it (proc_pid_status(5)).

use std::fs;

use anyhow::{Context, Result};

/// The memory that a process has now.
pub fn resident_bytes(pid: u32) -> Result<u64> {
    status_bytes(pid, "VmRSS:")
}

/// The most memory that a process has had.
pub fn peak_bytes(pid: u32) -> Result<u64> {
    status_bytes(pid, "VmHWM:")
}

fn status_bytes(pid: u32, field: &str) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let kib: u64 = status
        .lines()
        .find_map(|line| line.strip_prefix(field)?.trim().strip_suffix(" kB"))
        .with_context(|| format!("no {field} in the status of process {pid}"))?
        .parse()?;
    Ok(kib * 1024)
}

/// `USER_HZ`, which is 100 on every architecture that Weft runs on.
pub const TICKS_PER_SECOND: f64 = 100.0;
