//! A program in a terminal: what it shows there, and keys that are pressed.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::fd::AsFd;
use rustix::fs::{Mode, OFlags, open};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, tcgetattr};

use crate::wait::wait_for;

/// A program whose standard input, output and error are a terminal.
#[derive(Debug)]
pub struct InTerminal {
    child: Child,
    /// The other end of the terminal.
    ours: File,
    /// The program's end, to look at.
    theirs: File,
    shown: Arc<Mutex<Vec<u8>>>,
}

impl InTerminal {
    /// Starts it.
    pub fn start(command: &mut Command) -> Result<Self> {
        let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).context("a terminal")?;
        grantpt(&ours)?;
        unlockpt(&ours)?;
        let name = ptsname(&ours, vec![])?;
        let theirs = open(name, OFlags::RDWR | OFlags::NOCTTY, Mode::empty())?;
        let theirs = File::from(theirs);
        let child = command
            .env("TERM", "xterm")
            .env("NO_COLOR", "1")
            .stdin(Stdio::from(theirs.try_clone()?))
            .stdout(Stdio::from(theirs.try_clone()?))
            .stderr(Stdio::from(theirs.try_clone()?))
            .spawn()
            .with_context(|| format!("starting {command:?}"))?;
        let ours = File::from(ours);
        let shown = Arc::default();
        let (mut from, to) = (ours.try_clone()?, Arc::clone(&shown));
        std::thread::spawn(move || read_all(&mut from, &to));
        Ok(Self {
            child,
            ours,
            theirs,
            shown,
        })
    }

    /// Presses keys.
    pub fn press(&mut self, keys: &str) -> Result<()> {
        self.ours
            .write_all(keys.as_bytes())
            .context("pressing keys")
    }

    /// All that was shown until now.
    pub fn shown(&self) -> String {
        let shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&shown).into_owned()
    }

    /// Whether the terminal is as it is for a shell: it shows what is typed, and hands it over by lines.
    pub fn is_as_before(&self) -> Result<bool> {
        let modes = tcgetattr(self.theirs.as_fd())?.local_modes;
        Ok(modes.contains(LocalModes::ICANON | LocalModes::ECHO))
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for its end.
    pub fn ended(&mut self) -> Result<ExitStatus> {
        wait_for("the end of the program", Duration::from_secs(20), || {
            Ok(self.child.try_wait()?)
        })
    }
}

impl Drop for InTerminal {
    fn drop(&mut self) {
        // It has ended, unless a test has failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn read_all(from: &mut File, to: &Mutex<Vec<u8>>) {
    let mut buffer = [0; 4096];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return,
            Ok(length) => {
                let mut all = to.lock().unwrap_or_else(PoisonError::into_inner);
                all.extend_from_slice(&buffer[..length]);
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            // Nobody has the other end any more.
            Err(_) => return,
        }
    }
}
