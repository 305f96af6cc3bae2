//! Test suites side by side: most of an end-to-end test is waiting, so that a machine of two CPUs runs three of them in
//! little more than the time of the longest.
//!
//! Each suite is a process of its own, which runs its tests one after another. What it prints is kept until it has ended, so
//! that no two suites' lines are mixed. The first failure lets no further suite begin; those that have begun run to their end,
//! as a test that is stopped in the middle leaves namespaces behind.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, Read as _, Seek as _, Write as _},
    process::{Command, ExitStatus, Stdio},
    sync::{Mutex, MutexGuard, PoisonError},
    thread,
    time::Instant,
};

use anyhow::{Context as _, Result, bail};
use nix::fcntl::OFlag;

use crate::ui;

/// One of them: what it is called, and what runs it.
pub(crate) struct Suite {
    pub(crate) name: String,
    pub(crate) command: Command,
}

/// Runs all of them, as many as `lanes` at a time, in this order.
///
/// # Errors
/// The names of those that failed. What they printed is the last that was printed.
pub(crate) fn run(suites: Vec<Suite>, lanes: usize) -> Result<()> {
    let course = Mutex::new(Course {
        waiting: suites.into(),
        failed: Vec::new(),
    });
    thread::scope(|scope| {
        for _ in 0..lanes.max(1) {
            scope.spawn(|| lane(&course));
        }
    });
    let course = course.into_inner().unwrap_or_else(PoisonError::into_inner);
    let mut out = io::stdout().lock();
    for (_, output) in &course.failed {
        out.write_all(output)?;
    }
    let names = course.failed.iter().map(|(name, _)| name.as_str());
    let names: Vec<&str> = names.collect();
    if !names.is_empty() {
        bail!("{} failed", names.join(", "));
    }
    Ok(())
}

struct Course {
    waiting: VecDeque<Suite>,
    /// Those that failed, and what they printed.
    failed: Vec<(String, Vec<u8>)>,
}

fn lane(course: &Mutex<Course>) {
    while let Some(mut suite) = next(course) {
        ui::note(&format!("{} begins", suite.name));
        let started = Instant::now();
        let (succeeded, output) = match captured(&mut suite.command) {
            Ok((status, output)) => (status.success(), output),
            Err(error) => (false, format!("{error:#}\n").into_bytes()),
        };
        let took = format!("{:.1} s", started.elapsed().as_secs_f64());
        if succeeded {
            let mut out = io::stdout().lock();
            // Whoever reads it may have gone: the tests go on, and their outcome counts.
            let _ = writeln!(out, "\n    {} passed after {took}:", suite.name);
            let _ = out.write_all(&output);
        } else {
            ui::warning(&format!("{} failed after {took}", suite.name));
            locked(course).failed.push((suite.name, output));
        }
    }
}

fn next(course: &Mutex<Course>) -> Option<Suite> {
    let mut course = locked(course);
    match course.failed.is_empty() {
        true => course.waiting.pop_front(),
        false => None,
    }
}

fn locked(course: &Mutex<Course>) -> MutexGuard<'_, Course> {
    course.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs it, and returns all that it printed, on either stream, in that order.
fn captured(command: &mut Command) -> Result<(ExitStatus, Vec<u8>)> {
    let mut file = temporary().context("cannot make a file for a suite's output")?;
    let streams = (file.try_clone()?, file.try_clone()?);
    let status = command
        .stdin(Stdio::null())
        .stdout(streams.0)
        .stderr(streams.1)
        .status()
        .context("cannot run a suite")?;
    let mut output = Vec::new();
    file.rewind()?;
    file.read_to_end(&mut output)?;
    Ok((status, output))
}

/// A file without a name.
fn temporary() -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let mut options = File::options();
    options.read(true).write(true).append(true).mode(0o600);
    options
        .custom_flags(OFlag::O_TMPFILE.bits())
        .open(std::env::temp_dir())
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        path::{Path, PathBuf},
        sync::atomic::{AtomicU32, Ordering},
    };

    use super::*;

    fn folder() -> PathBuf {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("weft-xtask-lanes-{}-{count}", std::process::id());
        let folder = std::env::temp_dir().join(name);
        fs::create_dir_all(&folder).unwrap();
        folder
    }

    fn shell(name: &str, script: &str, folder: &Path) -> Suite {
        let mut command = Command::new("sh");
        command.args(["-c", script]).current_dir(folder);
        Suite {
            name: name.to_owned(),
            command,
        }
    }

    #[test]
    fn suites_run_side_by_side() {
        let folder = folder();
        // Each waits for the other: in one lane neither would end.
        let meet = |mine: &str, other: &str| {
            format!("touch {mine}; until [ -e {other} ]; do sleep 0.01; done")
        };
        let suites = vec![
            shell("a", &meet("a", "b"), &folder),
            shell("b", &meet("b", "a"), &folder),
            shell("c", "touch c", &folder),
        ];
        run(suites, 2).unwrap();
        assert!(folder.join("c").exists());
        fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn after_a_failure_no_other_begins() {
        let folder = folder();
        let suites = vec![
            shell("good", "true", &folder),
            shell("bad", "exit 1", &folder),
            shell("late", "touch late", &folder),
        ];
        let error = run(suites, 1).unwrap_err();
        assert_eq!(error.to_string(), "bad failed");
        assert!(!folder.join("late").exists());
        fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn both_streams_are_kept_in_order() {
        let folder = folder();
        let mut suite = shell("s", "echo 1; echo 2 >&2; echo 3", &folder);
        let (status, output) = captured(&mut suite.command).unwrap();
        assert!(status.success());
        assert_eq!(output, b"1\n2\n3\n");
        fs::remove_dir_all(&folder).unwrap();
    }
}
