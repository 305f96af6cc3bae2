//! Mounts what an agent in a container needs of its node, on the node: the BPF file system for the pins, and control
//! groups of version 2.
//!
//! What a container mounts is gone with it, and pins must outlive every agent: without them, pods would be in the clear
//! until the next one is there. So this enters the mount namespace of its parent, which is the container runtime's own
//! process: that is where the next container's paths of the host come from. `mountPropagation: Bidirectional` would do the
//! same, but takes a privileged container, and a node whose mounts are shared, which is so with systemd only.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns};

use super::error::BpfError;
use super::mounts::{bpffs, cgroup2_root_below};

/// Enters the node's mount namespace and mounts there what is missing; says what. For a process with one thread.
///
/// # Errors
/// It may not, or the node's processes cannot be seen from here.
pub fn prepare(pins: &Path) -> Result<(), BpfError> {
    let parent = std::os::unix::process::parent_id();
    if parent == 0 {
        return Err(BpfError::OwnProcessIds);
    }
    let namespace = PathBuf::from(format!("/proc/{parent}/ns/mnt"));
    let namespace = namespace.as_path();
    let entered = File::open(namespace)
        .and_then(|it| setns(it, CloneFlags::CLONE_NEWNS).map_err(io::Error::from));
    entered.map_err(failed("entering", namespace))?;
    let found = bpffs(Some(pins))?;
    eprintln!("kernel programs are kept in {}", found.display());
    let found = match cgroup2_root_below(&SEEN.map(Path::new)) {
        Ok(found) => found,
        Err(BpfError::NoCgroup2) => mount_cgroup2()?,
        Err(error) => return Err(error),
    };
    eprintln!("control groups of version 2 are at {}", found.display());
    Ok(())
}

/// Below a folder that the agent sees, and beside what others mount.
fn mount_cgroup2() -> Result<PathBuf, BpfError> {
    let at = Path::new(CGROUP2);
    let mut folder = fs::DirBuilder::new();
    folder.recursive(true).mode(0o700);
    folder.create(at).map_err(failed("creating", at))?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("cgroup2"), at, Some("cgroup2"), flags, None::<&str>)
        .map_err(|errno| failed("mounting control groups at", at)(errno.into()))?;
    Ok(at.into())
}

fn failed(what: &'static str, path: &Path) -> impl Fn(io::Error) -> BpfError {
    let path = path.to_owned();
    move |source| BpfError::File {
        what,
        path: path.clone(),
        source,
    }
}

/// What the agent's container has of the node. Where others have mounted it elsewhere, as Cilium does at
/// `/run/cilium/cgroupv2`, it would not be found.
const SEEN: [&str; 2] = ["/sys/fs/cgroup", "/run/weft"];
const CGROUP2: &str = "/run/weft/cgroup2";
