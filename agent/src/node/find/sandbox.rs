//! Pods whose sockets are not the node's: those in virtual machines (Kata Containers) and of a kernel in user space
//! (gVisor). Their network namespace is there and has an interface, but what their applications connect and accept is
//! unseen by the kernel programs, so they cannot be meshed.
//!
//! What is in such a pod's control group is a hypervisor and its helpers, or `runsc`, and nothing else. Any process may be
//! called so, and a pod that passed for one of these would be outside of the mesh. So it counts only if all of a pod's
//! processes are, and if besides the pod asks for a RuntimeClass, which its containers cannot, or the processes have the
//! node's root directory, as no container has. And one that looks so must be in no container that the pod's status names.

use super::process::Process;
use super::scan::Host;

/// What runs a pod's containers away from the node's kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sandbox {
    /// A virtual machine.
    Kata,
    /// A kernel in user space.
    Gvisor,
}

/// What a process, or all of a pod's, look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Looks {
    /// Like any.
    Plain,
    /// Like something that helps virtual machines, but is none.
    Helper,
    /// Like this.
    Sandboxed(Sandbox),
}

impl Looks {
    pub(super) fn of(process: &Process, comm: &str, host: &Host, class: Option<&str>) -> Self {
        let looks = Self::by_name(comm, || process.read("cmdline").unwrap_or_default());
        match looks {
            Self::Plain => Self::Plain,
            _ if class.is_some() || host.is_root_of(process) => looks,
            _ => Self::Plain,
        }
    }

    /// `comm` has 15 bytes at most.
    fn by_name(comm: &str, command_line: impl FnOnce() -> String) -> Self {
        let is = |names: &[&str]| names.iter().any(|it| comm.starts_with(it));
        if is(HYPERVISORS) {
            return Self::Sandboxed(Sandbox::Kata);
        }
        if is(HELPERS) {
            return Self::Helper;
        }
        // It executes itself by `/proc/self/exe`.
        if comm == "exe" || comm.starts_with("runsc") {
            let line = command_line();
            let program = line.split('\0').next().unwrap_or_default();
            let program = program.rsplit('/').next().unwrap_or_default();
            if program.starts_with("runsc") {
                return Self::Sandboxed(Sandbox::Gvisor);
            }
        }
        Self::Plain
    }

    /// What both look like together.
    pub(super) fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::Plain, _) | (_, Self::Plain) => Self::Plain,
            (Self::Helper, it) | (it, Self::Helper) => it,
            (it, other) if it == other => it,
            _ => Self::Plain,
        }
    }

    pub(super) fn sandbox(self) -> Option<Sandbox> {
        match self {
            Self::Sandboxed(sandbox) => Some(sandbox),
            Self::Plain | Self::Helper => None,
        }
    }
}

impl Sandbox {
    /// As people call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kata => "a virtual machine (Kata Containers)",
            Self::Gvisor => "gVisor",
        }
    }
}

/// Of Kata Containers, by the first bytes of what they are called.
const HYPERVISORS: &[&str] = &["qemu-", "cloud-hyperviso", "firecracker", "stratovirt"];
const HELPERS: &[&str] = &["virtiofsd", "containerd-shim", "jailer", "nydusd"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_processes_look_like() {
        use Looks::{Helper, Plain, Sandboxed};
        for (comm, command_line, expected) in [
            ("qemu-system-x86", "", Sandboxed(Sandbox::Kata)),
            ("cloud-hyperviso", "", Sandboxed(Sandbox::Kata)),
            ("firecracker", "", Sandboxed(Sandbox::Kata)),
            ("virtiofsd", "", Helper),
            (
                "exe",
                "runsc-sandbox\0--root=/x\0boot\0",
                Sandboxed(Sandbox::Gvisor),
            ),
            ("exe", "/usr/bin/runsc-gofer\0", Sandboxed(Sandbox::Gvisor)),
            (
                "runsc-sandbox",
                "runsc-sandbox\0",
                Sandboxed(Sandbox::Gvisor),
            ),
            ("exe", "/app/server\0", Plain),
            ("runsc", "sh\0", Plain),
            ("pause", "/pause\0", Plain),
            ("nginx", "", Plain),
            ("", "", Plain),
        ] {
            let looks = Looks::by_name(comm, || command_line.to_owned());
            assert_eq!(looks, expected, "{comm} {command_line:?}");
        }
    }

    /// One process that is not of it is enough: there are sockets of this kernel.
    #[test]
    fn all_of_a_pod_look_the_same_or_it_is_none() {
        use Looks::{Helper, Plain, Sandboxed};
        let (kata, gvisor) = (Sandboxed(Sandbox::Kata), Sandboxed(Sandbox::Gvisor));
        for (all, expected) in [
            (&[kata, Helper, kata][..], Some(Sandbox::Kata)),
            (&[Helper, kata], Some(Sandbox::Kata)),
            (&[gvisor, gvisor], Some(Sandbox::Gvisor)),
            (&[gvisor, Plain], None),
            (&[Plain, kata], None),
            (&[kata, gvisor], None),
            (&[Helper, Helper], None),
        ] {
            let together = all.iter().copied().reduce(Looks::and);
            assert_eq!(together.and_then(Looks::sandbox), expected, "{all:?}");
        }
    }
}
