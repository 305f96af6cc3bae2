//! Cgroups of the version 2 hierarchy, wherever it is mounted, and how they share out the CPUs: by the same
//! hierarchy, or, where CPUs are left to version 1, by a group there for each of them.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::run::{mounts, mounts_with};
use crate::wait::wait_until;

/// A cgroup; made with [`Cgroup::create`], removed with its run or by [`Cgroup::remove`].
#[derive(Clone, Debug)]
pub struct Cgroup {
    path: PathBuf,
    cpu: Cpu,
}

/// Who gives a cgroup its share of the CPUs.
#[derive(Clone, Debug)]
enum Cpu {
    /// Nobody: its threads compete with all others.
    Threads,
    /// It does.
    Itself,
    /// This one of version 1.
    Beside(PathBuf),
}

impl Cgroup {
    /// Makes the cgroup and its parents.
    pub fn create(path: PathBuf) -> Result<Cgroup> {
        make(&path)?;
        let cpu = Cpu::Threads;
        Ok(Cgroup { path, cpu })
    }

    /// The same; the cgroups below it have shares of the CPUs, the same for each of those that are beside each other,
    /// as kubelets have it for pods. In version 1 all are beside each other.
    pub fn create_with_shares(path: PathBuf) -> Result<Cgroup> {
        make(&path)?;
        let cpu = if let Some(group) = beside(&path)? {
            make(&group)?;
            write(&group.join(REAL_TIME), 900_000).or_else(none_to_give)?;
            Cpu::Beside(group)
        } else {
            share_out(&hierarchy()?)?;
            Cpu::Itself
        };
        Ok(Cgroup { path, cpu })
    }

    /// Makes a cgroup below this one.
    pub fn child(&self, name: &str) -> Result<Cgroup> {
        let path = self.path.join(name);
        make(&path)?;
        let cpu = match &self.cpu {
            Cpu::Threads => Cpu::Threads,
            Cpu::Itself => {
                share_out(&self.path)?;
                Cpu::Itself
            }
            Cpu::Beside(_) => {
                let group = beside(&path)?.context("version 1 has no CPUs any more")?;
                make(&group)?;
                Cpu::Beside(group)
            }
        };
        Ok(Cgroup { path, cpu })
    }

    /// Makes a cgroup any number of levels below this one.
    pub fn descendant(&self, path: &str) -> Result<Cgroup> {
        path.split('/')
            .try_fold(self.clone(), |above, name| above.child(name))
    }

    /// Lets threads there be of a real-time policy. Two of a run may have this.
    pub fn allow_real_time(&self) -> Result<()> {
        match &self.cpu {
            Cpu::Beside(group) => write(&group.join(REAL_TIME), 450_000).or_else(none_to_give),
            // They may, or the kernel has no such groups in version 2.
            Cpu::Threads | Cpu::Itself => Ok(()),
        }
    }

    /// Its folder in the hierarchy.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The processes directly in it.
    pub fn pids(&self) -> Result<Vec<u32>> {
        let text = fs::read_to_string(self.path.join("cgroup.procs"))?;
        Ok(text.lines().filter_map(|line| line.parse().ok()).collect())
    }

    /// Kills what runs in it and below it, and removes it.
    pub fn remove(&self) -> Result<()> {
        remove_tree(&self.path)
    }

    /// Opened for moving a process here: all of them are to be written to.
    pub(crate) fn procs(&self) -> Result<Vec<File>> {
        let mut folders = vec![&self.path];
        if let Cpu::Beside(group) = &self.cpu {
            folders.push(group);
        }
        let open = |folder: &PathBuf| {
            let path = folder.join("cgroup.procs");
            let file = File::options().write(true).open(&path);
            file.with_context(|| format!("opening {}", path.display()))
        };
        folders.into_iter().map(open).collect()
    }
}

fn make(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("making the cgroup {}", folder.display()))
}

fn write(file: &Path, value: impl ToString) -> Result<()> {
    fs::write(file, value.to_string()).with_context(|| format!("writing {}", file.display()))
}

/// Kernels without `CONFIG_RT_GROUP_SCHED` give no group any, and let everybody be of a real-time policy.
fn none_to_give(error: anyhow::Error) -> Result<()> {
    let kind = error.downcast_ref::<io::Error>().map(io::Error::kind);
    match kind {
        Some(io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied) => Ok(()),
        _ => Err(error),
    }
}

/// Has the children of a cgroup share its CPUs.
fn share_out(parent: &Path) -> Result<()> {
    write(&parent.join("cgroup.subtree_control"), "+cpu")
}

/// The group of version 1 that shares out CPUs, where that version does, for one of version 2: that of a run, and
/// directly below it those of all others.
fn beside(path: &Path) -> Result<Option<PathBuf>> {
    let Some(root) = mounts_with("cgroup", "cpu")?.into_iter().next() else {
        return Ok(None);
    };
    let path = path.strip_prefix(hierarchy()?)?.to_string_lossy();
    let group = match path.split_once('/') {
        Some((run, rest)) => root.join(run).join(rest.replace('/', "-")),
        None => root.join(&*path),
    };
    Ok(Some(group))
}

/// In microseconds of each second, on each CPU.
const REAL_TIME: &str = "cpu.rt_runtime_us";

/// The root of the version 2 hierarchy: alone at `/sys/fs/cgroup`, or beside version 1.
pub fn hierarchy() -> Result<PathBuf> {
    mounts("cgroup2")?
        .into_iter()
        .next()
        .context("no cgroup version 2 hierarchy is mounted")
}

/// The cgroup that holds everything of a run.
pub fn run_root(run: &str) -> Result<PathBuf> {
    Ok(hierarchy()?.join(format!("{RUN_CGROUP}{run}")))
}

/// The runs that have a cgroup.
pub(crate) fn run_names() -> Vec<String> {
    let Ok(entries) = hierarchy().and_then(|root| Ok(fs::read_dir(root)?)) else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| {
            let name = entry.ok()?.file_name().into_string().ok()?;
            Some(name.strip_prefix(RUN_CGROUP)?.to_owned())
        })
        .collect()
}

/// Kills everything in a subtree and removes its cgroups, the innermost first.
pub(crate) fn remove_tree(path: &Path) -> Result<()> {
    if !path.exists() {
        return Ok(());
    }
    // Kernel 5.14 and newer: the whole subtree at once, nothing can fork away.
    fs::write(path.join("cgroup.kill"), "1")
        .with_context(|| format!("killing what runs in {}", path.display()))?;
    wait_until("the cgroup to be empty", Duration::from_secs(10), || {
        fs::read_to_string(path.join("cgroup.events"))
            .is_ok_and(|events| events.contains("populated 0"))
    })?;
    // Where version 1 is beside it, there is a group for the CPUs of each, and container runtimes make those of the same
    // names for all that it counts.
    let below = path.strip_prefix(hierarchy()?)?;
    let same = mounts("cgroup")?.into_iter().map(|root| root.join(below));
    let groups = beside(path)?.into_iter().chain(same);
    for group in groups.filter(|it| it.exists()) {
        remove_folders(&group)?;
    }
    remove_folders(path)
}

fn remove_folders(path: &Path) -> Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_folders(&entry.path())?;
        }
    }
    fs::remove_dir(path).with_context(|| format!("removing the cgroup {}", path.display()))
}

/// `weft-test-weft-<pid>-<n>` in the hierarchy's root.
const RUN_CGROUP: &str = "weft-test-";
