//! Cgroups of the version 2 hierarchy, wherever it is mounted.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::run::mounts;
use crate::wait::wait_until;

/// A cgroup; made with [`Cgroup::create`], removed with its run or by [`Cgroup::remove`].
#[derive(Clone, Debug)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Makes the cgroup and its parents.
    pub fn create(path: PathBuf) -> Result<Cgroup> {
        fs::create_dir_all(&path)
            .with_context(|| format!("making the cgroup {}", path.display()))?;
        Ok(Cgroup { path })
    }

    /// Makes a cgroup below this one.
    pub fn child(&self, name: &str) -> Result<Cgroup> {
        Cgroup::create(self.path.join(name))
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

    /// Opened for moving a process here.
    pub(crate) fn procs(&self) -> Result<File> {
        let path = self.path.join("cgroup.procs");
        File::options()
            .write(true)
            .open(&path)
            .with_context(|| format!("opening {}", path.display()))
    }
}

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
