//! The file systems the kernel programs need: bpf for the pins, cgroup2 for the hooks. Where they
//! are is read from the mount table; systems that still use control groups of version 1 mount
//! version 2 elsewhere.

use std::{
    fs::{self, File},
    os::fd::AsFd,
    path::{Path, PathBuf},
};

use nix::{
    fcntl::{Flock, FlockArg},
    mount::{MsFlags, mount},
    sched::{CloneFlags, setns},
};

use super::error::BpfError;

/// The BPF file system to pin into: `path` if given, else one that is mounted; mounted by us (at
/// `path`, else at `/sys/fs/bpf`) where there is none.
pub fn bpffs(path: Option<&Path>) -> Result<PathBuf, BpfError> {
    if let Some(found) = find_bpffs(path)? {
        return Ok(found);
    }
    let at = path.unwrap_or(Path::new(BPFFS));
    fs::create_dir_all(at).map_err(|source| BpfError::File {
        what: "creating",
        path: at.into(),
        source,
    })?;
    // Two that mount at the same time would hide each other's pins. The lock is on the folder
    // below.
    let folder = File::open(at).map_err(|source| BpfError::File {
        what: "opening",
        path: at.into(),
        source,
    })?;
    let _lock =
        Flock::lock(folder, FlockArg::LockExclusive).map_err(|(_, errno)| BpfError::File {
            what: "locking",
            path: at.into(),
            source: errno.into(),
        })?;
    if let Some(found) = find_bpffs(path)? {
        return Ok(found);
    }
    mount(
        Some("bpf"),
        at,
        Some("bpf"),
        MsFlags::empty(),
        Some("mode=0700"),
    )
    .map_err(|errno| BpfError::File {
        what: "mounting a BPF file system at",
        path: at.into(),
        source: errno.into(),
    })?;
    Ok(at.into())
}

/// Where the control group file system of version 2 is mounted.
pub fn cgroup2_root() -> Result<PathBuf, BpfError> {
    find_cgroup2(mounts()?, &[Path::new("/")]).ok_or(BpfError::NoCgroup2)
}

/// The same, if it is at or below one of some folders.
pub(crate) fn cgroup2_root_below(folders: &[&Path]) -> Result<PathBuf, BpfError> {
    find_cgroup2(mounts()?, folders).ok_or(BpfError::NoCgroup2)
}

fn find_cgroup2(mounts: Vec<Mount>, folders: &[&Path]) -> Option<PathBuf> {
    mounts
        .into_iter()
        .filter(|mount| mount.kind == "cgroup2")
        .filter(|mount| folders.iter().any(|it| mount.point.starts_with(it)))
        // One of the whole hierarchy rather than a part of it that is bound somewhere.
        .min_by_key(|mount| (wholeness(&mount.root), mount.point.as_os_str().len()))
        .map(|mount| mount.point)
}

/// How much of the hierarchy a mount has, the most first. From inside of a namespace of control groups the whole is so
/// many levels up, and what that namespace has is `/`.
fn wholeness(root: &str) -> (usize, bool) {
    let parts = root.split('/').filter(|it| !it.is_empty());
    let is_above = parts.clone().all(|it| it == "..");
    let levels_up = parts.filter(|it| *it == "..").count();
    let levels_up = if is_above { levels_up } else { 0 };
    (usize::MAX - levels_up, !is_above)
}

/// The control group of this process as a path under [`cgroup2_root`]; the root where it cannot be
/// seen from here.
pub(crate) fn own_cgroup() -> Result<PathBuf, BpfError> {
    let root = cgroup2_root()?;
    // A container's view begins at its own group. The node's first process has the node's view.
    let of_node = std::thread::spawn(|| {
        let namespace = File::open("/proc/1/ns/cgroup").ok()?;
        setns(namespace, CloneFlags::CLONE_NEWCGROUP).ok()?;
        fs::read_to_string("/proc/thread-self/cgroup").ok()
    });
    if let Ok(Some(text)) = of_node.join() {
        let group = path_in(&root, &text);
        if has_this_process(&group) {
            return Ok(group);
        }
    }
    let path = PathBuf::from("/proc/self/cgroup");
    let text = fs::read_to_string(&path).map_err(|source| BpfError::File {
        what: "reading",
        path,
        source,
    })?;
    Ok(path_in(&root, &text))
}

/// The group that a process's list names, or the root if that is not below it.
fn path_in(root: &Path, groups: &str) -> PathBuf {
    let own = groups.lines().find_map(|line| line.strip_prefix("0::/"));
    let own = own.unwrap_or_default();
    let full = root.join(own);
    let is_below = !own.split('/').any(|part| part == "..") && full.is_dir();
    if is_below { full } else { root.to_owned() }
}

/// By the kernel's word: a path may mean something else in another view.
fn has_this_process(group: &Path) -> bool {
    let own = std::process::id().to_string();
    fs::read_to_string(group.join("cgroup.procs"))
        .is_ok_and(|processes| processes.lines().any(|it| it == own))
}

/// Whether a path is on a BPF file system.
pub(crate) fn is_bpffs(path: &Path) -> bool {
    File::open(path)
        .ok()
        .and_then(|file| nix::sys::statfs::fstatfs(file.as_fd()).ok())
        .is_some_and(|found| found.filesystem_type() == nix::sys::statfs::BPF_FS_MAGIC)
}

fn find_bpffs(path: Option<&Path>) -> Result<Option<PathBuf>, BpfError> {
    if let Some(path) = path {
        return Ok(is_bpffs(path).then(|| path.into()));
    }
    Ok(mounts()?
        .into_iter()
        .filter(|mount| mount.kind == "bpf" && is_bpffs(&mount.point))
        .min_by_key(|mount| {
            (
                mount.point != Path::new(BPFFS),
                mount.point.as_os_str().len(),
            )
        })
        .map(|mount| mount.point))
}

fn mounts() -> Result<Vec<Mount>, BpfError> {
    let path = PathBuf::from("/proc/self/mountinfo");
    let text = fs::read_to_string(&path).map_err(|source| BpfError::File {
        what: "reading",
        path,
        source,
    })?;
    Ok(text.lines().filter_map(parse).collect())
}

/// One line of `/proc/self/mountinfo` (proc(5)): the fields before ` - ` vary in number, the type
/// comes after.
fn parse(line: &str) -> Option<Mount> {
    let (before, after) = line.split_once(" - ")?;
    let mut fields = before.split(' ').skip(3);
    let root = unescape(fields.next()?);
    let point = unescape(fields.next()?);
    let kind = after.split(' ').next()?.to_owned();
    Some(Mount {
        root,
        point: point.into(),
        kind,
    })
}

/// The table writes space, tab, newline and backslash as octal.
fn unescape(field: &str) -> String {
    ["\\040", "\\011", "\\012", "\\134"]
        .iter()
        .zip([" ", "\t", "\n", "\\"])
        .fold(field.to_owned(), |text, (escaped, plain)| {
            text.replace(escaped, plain)
        })
}

#[derive(Debug, PartialEq, Eq)]
struct Mount {
    root: String,
    point: PathBuf,
    kind: String,
}

const BPFFS: &str = "/sys/fs/bpf";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_mount_table() {
        let table = [
            (
                "36 35 0:31 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw",
                Some(("/", "/sys/fs/cgroup/unified", "cgroup2")),
            ),
            (
                "40 1 0:31 /system.slice /mnt/a\\040b rw shared:1 master:2 - bpf bpf rw,mode=700",
                Some(("/system.slice", "/mnt/a b", "bpf")),
            ),
            ("36 35 0:31 / /sys/fs/cgroup", None),
            ("", None),
        ];
        for (line, expected) in table {
            let found = parse(line);
            let expected = expected.map(|(root, point, kind)| Mount {
                root: root.to_owned(),
                point: point.into(),
                kind: kind.to_owned(),
            });
            assert_eq!(found, expected, "{line}");
        }
    }

    #[test]
    fn the_whole_hierarchy_comes_first() {
        let mut roots = ["/a", "/", "/../b", "/../..", "/.."];
        roots.sort_by_key(|it| wholeness(it));
        assert_eq!(roots, ["/../..", "/..", "/", "/a", "/../b"]);
    }

    /// Cilium mounts it where an agent's container does not look.
    #[test]
    fn mounts_elsewhere_do_not_count() {
        let mount = |point: &str, kind: &str| Mount {
            root: "/".into(),
            point: point.into(),
            kind: kind.into(),
        };
        let seen = [Path::new("/sys/fs/cgroup"), Path::new("/run/weft")];
        let cilium = || mount("/run/cilium/cgroupv2", "cgroup2");
        for (mounts, expected) in [
            (vec![cilium()], None),
            (vec![cilium(), mount("/sys/fs/cgroup", "tmpfs")], None),
            (vec![mount("/run/weft-other/cgroup2", "cgroup2")], None),
            (
                vec![cilium(), mount("/run/weft/cgroup2", "cgroup2")],
                Some("/run/weft/cgroup2"),
            ),
            (
                vec![mount("/sys/fs/cgroup/unified", "cgroup2"), cilium()],
                Some("/sys/fs/cgroup/unified"),
            ),
        ] {
            let found = find_cgroup2(mounts, &seen);
            assert_eq!(found.as_deref(), expected.map(Path::new));
        }
    }

    #[test]
    fn this_process_is_in_its_own_group() {
        let own = own_cgroup().unwrap();
        assert!(has_this_process(&own), "{}", own.display());
    }

    #[test]
    fn an_ordinary_folder_is_no_bpffs() {
        assert!(!is_bpffs(Path::new("/")));
        assert!(!is_bpffs(Path::new("/nonexistent")));
    }
}
