//! The one place with `unsafe`: what a child does between fork and exec.
#![allow(unsafe_code)]

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::sched::{CloneFlags, setns};
use nix::sys::prctl;
use nix::sys::signal::Signal;

/// Makes `command` start in this network namespace and cgroup, and die with the thread that
/// starts it, so that a killed test leaves no processes.
///
/// `ip netns exec` is not used: it puts a new `/sys` into place, and with it away goes the cgroup
/// hierarchy that the agent needs.
pub(crate) fn place_child(command: &mut Command, netns: Option<File>, cgroup_procs: Vec<File>) {
    let enter = move || {
        prctl::set_pdeathsig(Signal::SIGKILL)?;
        for procs in &cgroup_procs {
            // "0" is the writer itself.
            nix::unistd::write(procs, b"0")?;
        }
        if let Some(netns) = &netns {
            setns(netns, CloneFlags::CLONE_NEWNET)?;
        }
        Ok(())
    };
    // SAFETY: the closure runs in the forked child of a threaded process and makes some system
    // calls on descriptors that it owns; it takes no lock and allocates nothing (an errno becomes
    // an `io::Error` without allocating).
    unsafe {
        command.pre_exec(enter);
    }
}
