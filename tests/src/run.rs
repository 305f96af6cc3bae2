//! One run: the name that all it creates carries, and the removal of everything with that name.
//!
//! Removal goes by name, not by what the process remembers, so the same function serves an orderly
//! end, a panic, Ctrl-C, and the next run that finds a killed one's remains.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};

use anyhow::{Context, Result, bail, ensure};

use crate::cgroup;

/// The first word of every name: `weft-<pid>-<n>`.
pub const PREFIX: &str = "weft";

/// A run's name and its folder of temporary files; dropping it removes all of its remains.
#[derive(Debug)]
pub struct Run {
    name: String,
    dir: PathBuf,
    keep: bool,
    _one_at_a_time: MutexGuard<'static, ()>,
}

impl Run {
    /// Starts a run; removes what dead ones left. Within a process runs take turns: clusters are
    /// heavy, and tests measure time.
    pub fn start() -> Result<Run> {
        ensure!(
            nix::unistd::geteuid().is_root(),
            "network namespaces and cgroups need root: run this as root"
        );
        static TURN: Mutex<()> = Mutex::new(());
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        cleanup_stale();
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "{PREFIX}-{}-{}",
            std::process::id(),
            COUNT.fetch_add(1, Ordering::Relaxed)
        );
        let dir = runs_dir().join(&name);
        fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
        live().insert(name.clone());
        Ok(Run {
            name,
            dir,
            keep: false,
            _one_at_a_time: turn,
        })
    }

    /// `weft-<pid>-<n>`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The folder for this run's files: logs, manifests, keys, captures.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Leaves the files in place at the end, for reading them after a failure.
    pub fn keep_files(&mut self) {
        self.keep = true;
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        live().remove(&self.name);
        let keep = self.keep || std::env::var_os("WEFT_KEEP_FILES").is_some();
        if let Err(error) = remove(&self.name, keep) {
            eprintln!("cleaning up after {}: {error:#}", self.name);
        }
        if keep {
            // Under a name that the next run does not take for stale.
            let kept = runs_dir().join(format!("kept-{}", self.name));
            let moved = fs::rename(&self.dir, &kept);
            let at = if moved.is_ok() { &kept } else { &self.dir };
            eprintln!("the files of this run are in {}", at.display());
        }
    }
}

/// Removes everything that a run of this name may have left: processes, namespaces (and with them
/// every link), cgroups, pins, and unless `keep_files` its folder.
pub fn remove(name: &str, keep_files: bool) -> Result<()> {
    let mut failures = Vec::new();
    if let Err(error) = cgroup::remove_tree(&cgroup::run_root(name)?) {
        failures.push(error);
    }
    for netns in netns_names() {
        if belongs(&netns, name) {
            let deleted = Command::new("ip").args(["netns", "del", &netns]).output()?;
            if !deleted.status.success() {
                failures.push(anyhow::anyhow!("deleting the namespace {netns}"));
            }
        }
    }
    remove_pins(name);
    if !keep_files {
        let dir = runs_dir().join(name);
        if dir.exists() {
            fs::remove_dir_all(&dir).with_context(|| format!("removing {}", dir.display()))?;
        }
    }
    match failures.into_iter().next() {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

/// Removes what runs of processes that are gone have left.
pub fn cleanup_stale() {
    let mut names = BTreeSet::new();
    names.extend(netns_names());
    names.extend(cgroup::run_names());
    names.extend(children(&runs_dir()));
    for mount in pin_dirs() {
        names.extend(children(&mount));
    }
    let stale: BTreeSet<String> = names
        .iter()
        .filter_map(|name| run_of(name))
        .filter(|run| !is_alive(run))
        .collect();
    for run in stale {
        if let Err(error) = remove(&run, false) {
            eprintln!("cleaning up after the dead run {run}: {error:#}");
        }
    }
}

/// From now on SIGINT and SIGTERM remove all live runs of this process before it exits with 130.
pub fn clean_up_on_interrupt() -> Result<()> {
    static ONCE: Once = Once::new();
    let mut started = Ok(());
    ONCE.call_once(|| started = spawn_interrupt_thread());
    started
}

/// The namespaces, cgroups and pins of this run that still exist: empty after a good end.
pub fn remains(name: &str) -> Vec<String> {
    let mut found: Vec<String> = netns_names()
        .into_iter()
        .filter(|netns| belongs(netns, name))
        .collect();
    found.extend(
        cgroup::run_names()
            .into_iter()
            .filter(|cgroup| cgroup == name),
    );
    for mount in pin_dirs() {
        found.extend(
            children(&mount)
                .into_iter()
                .filter(|pin| belongs(pin, name)),
        );
    }
    found
}

fn spawn_interrupt_thread() -> Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let (mut interrupt, mut terminate) = {
        let _entered = runtime.enter();
        (
            signal(SignalKind::interrupt())?,
            signal(SignalKind::terminate())?,
        )
    };
    std::thread::Builder::new()
        .name("interrupt".into())
        .spawn(move || {
            runtime.block_on(async {
                tokio::select! { _ = interrupt.recv() => {} _ = terminate.recv() => {} }
            });
            eprintln!("\ninterrupted: cleaning up");
            // The lock is kept until the end: nothing new may start meanwhile.
            for run in live().iter() {
                if let Err(error) = remove(run, false) {
                    eprintln!("cleaning up after {run}: {error:#}");
                }
            }
            std::process::exit(130);
        })?;
    Ok(())
}

/// The run that a name of a namespace, cgroup, folder or pin set belongs to.
fn run_of(name: &str) -> Option<String> {
    let mut words = name.split('-');
    let (prefix, pid, count) = (words.next()?, words.next()?, words.next()?);
    pid.parse::<u32>().ok()?;
    count.parse::<u32>().ok()?;
    (prefix == PREFIX).then(|| format!("{prefix}-{pid}-{count}"))
}

fn belongs(name: &str, run: &str) -> bool {
    run_of(name).as_deref() == Some(run)
}

/// Whether the process that made this run exists. Its own runs count by the list of live ones, so
/// that a recycled process id does not protect an old run for ever.
fn is_alive(run: &str) -> bool {
    match run
        .split('-')
        .nth(1)
        .and_then(|pid| pid.parse::<u32>().ok())
    {
        Some(pid) if pid == std::process::id() => live().contains(run),
        Some(pid) => Path::new("/proc").join(pid.to_string()).exists(),
        None => false,
    }
}

fn live() -> MutexGuard<'static, BTreeSet<String>> {
    static LIVE: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    LIVE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn runs_dir() -> PathBuf {
    std::env::temp_dir().join("weft-runs")
}

fn netns_names() -> Vec<String> {
    children(Path::new("/run/netns"))
}

/// Where agents pin: `weft/` in every mounted BPF file system, a folder per instance.
fn pin_dirs() -> Vec<PathBuf> {
    mounts("bpf")
        .map(|mounts| mounts.iter().map(|at| at.join("weft")).collect())
        .unwrap_or_default()
}

fn remove_pins(run: &str) {
    for dir in pin_dirs() {
        for instance in children(&dir).into_iter().filter(|pin| belongs(pin, run)) {
            // Best effort: a missing pin is a removed one.
            let _ = fs::remove_dir_all(dir.join(instance));
        }
    }
}

/// The mount points of a file system type, from the kernel's table.
pub(crate) fn mounts(fstype: &str) -> Result<Vec<PathBuf>> {
    mounts_with(fstype, "rw")
}

/// Those that have this option.
pub(crate) fn mounts_with(fstype: &str, option: &str) -> Result<Vec<PathBuf>> {
    let table = fs::read_to_string("/proc/self/mounts")?;
    let mut found = Vec::new();
    for line in table.lines() {
        let mut fields = line.split(' ');
        let (Some(_), Some(at), Some(kind), Some(options)) =
            (fields.next(), fields.next(), fields.next(), fields.next())
        else {
            bail!("/proc/self/mounts has a line without four fields: {line}");
        };
        if kind == fstype && options.split(',').any(|it| it == option) {
            found.push(PathBuf::from(at));
        }
    }
    Ok(found)
}

fn children(dir: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(dir) else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_belong_to_runs() {
        assert_eq!(run_of("weft-12-3-pod-a").as_deref(), Some("weft-12-3"));
        assert_eq!(run_of("weft-12-3").as_deref(), Some("weft-12-3"));
        assert_eq!(run_of("weft-x-3"), None);
        assert_eq!(run_of("other-12-3"), None);
        assert!(belongs("weft-12-3-n1", "weft-12-3"));
        assert!(!belongs("weft-12-30-n1", "weft-12-3"));
    }
}
