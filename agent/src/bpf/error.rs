//! What can go wrong with the kernel programs.

use std::{io, path::PathBuf};

use aya::{EbpfError, programs::ProgramError};

/// An error of this module, with what the reader needs to act on it.
#[derive(Debug, thiserror::Error)]
pub enum BpfError {
    /// The agent was built without the kernel programs.
    #[error("kernel programs not built in: run `cargo xtask build-ebpf`")]
    NotBuilt,
    /// The kernel lacks what the programs need.
    #[error("this kernel lacks {}: Weft needs Linux 5.15 or later with these features", .missing.join(", "))]
    Unsupported {
        /// What is missing.
        missing: Vec<String>,
    },
    /// A file or folder outside of the BPF file system.
    #[error("{what} {}", .path.display())]
    File {
        /// What was attempted.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// No control group file system of version 2 is mounted.
    #[error(
        "no cgroup2 file system is mounted: the hooks need one (mount -t cgroup2 none /sys/fs/cgroup)"
    )]
    NoCgroup2,
    /// The processes of the node cannot be seen.
    #[error(
        "the process that started this one cannot be seen from here: a container that prepares a node needs hostPID"
    )]
    OwnProcessIds,
    /// A path that should be a BPF file system is not.
    #[error("{} is not on a BPF file system (mount -t bpf bpf /sys/fs/bpf)", .path.display())]
    NotBpffs {
        /// The path.
        path: PathBuf,
    },
    /// A pin could not be opened, made or removed.
    #[error("the pinned object {}", .path.display())]
    Pin {
        /// The pin.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// A pinned map has other key or value sizes than this agent's.
    #[error("the pinned map {} is of another version of Weft: remove it", .path.display())]
    Layout {
        /// The pin.
        path: PathBuf,
    },
    /// A map operation failed.
    #[error("the map {map}{}", hint(.source))]
    Map {
        /// The map's name.
        map: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The object could not be parsed, or its maps not be made.
    #[error("loading the kernel programs of {object}")]
    Load {
        /// Which object.
        object: &'static str,
        /// Why it failed.
        source: Box<EbpfError>,
    },
    /// The lookup program was built by something else than this source.
    #[error(
        "the lookup program has no place for the network namespace's cookie: run `cargo xtask build-ebpf`"
    )]
    Marker,
    /// The kernel did not take a program.
    #[error("loading the kernel program {program}")]
    Program {
        /// Which program.
        program: &'static str,
        /// Why it failed, with the verifier's log.
        source: Box<ProgramError>,
    },
    /// A program could not be attached, replaced or detached.
    #[error("attaching the kernel program {program}")]
    Attach {
        /// Which program.
        program: String,
        /// Why it failed.
        source: io::Error,
    },
    /// The host's own network namespace was to be meshed.
    #[error("the host's network namespace cannot be meshed")]
    HostNamespace,
    /// Another agent owns the instance's state in the kernel.
    #[error("another agent serves this node's pods")]
    NotOwner,
    /// Another agent is changing the kernel's state and does not come to an end.
    #[error(
        "another agent of this instance has been changing the kernel's state for too long: is its process stopped?"
    )]
    Busy,
    /// The hooks are not what they should be.
    #[error("the hooks are not as they should be: {}", .problems.join("; "))]
    Hooks {
        /// One sentence each.
        problems: Vec<String>,
    },
    /// Any other system call.
    #[error("{what}")]
    System {
        /// What was attempted.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

fn hint(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::E2BIG) => ": full",
        Some(libc::EPERM) => ": not permitted (CAP_BPF and CAP_NET_ADMIN are needed)",
        _ => "",
    }
}
