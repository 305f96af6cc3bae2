//! Waiting for changes of folders, or for the end.

use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// Tells of changes, and of SIGTERM and SIGINT, which end nothing by themselves any more.
#[derive(Debug)]
pub(super) struct Watch {
    changes: Inotify,
    signals: SignalFd,
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Woken {
    /// Something may have changed.
    Changed,
    /// It is to end.
    Ends,
}

impl Watch {
    /// Catches the signals. To be called before there are other threads.
    ///
    /// # Errors
    /// What the system says.
    pub(super) fn new() -> io::Result<Self> {
        // As the first process of a container it would get neither otherwise.
        let signals = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT]);
        signals.thread_block()?;
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        Ok(Self {
            changes: Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?,
            signals: SignalFd::with_flags(&signals, flags)?,
        })
    }

    /// Looks at a folder from now on. To be said again whenever it may be another one by now.
    ///
    /// # Errors
    /// What the system says.
    pub(super) fn folder(&self, path: &Path) -> io::Result<()> {
        let flags = AddWatchFlags::IN_CLOSE_WRITE
            | AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_MOVE
            | AddWatchFlags::IN_DELETE_SELF
            | AddWatchFlags::IN_MOVE_SELF;
        self.changes.add_watch(path, flags)?;
        Ok(())
    }

    /// Waits, and then for a moment more: who writes one file writes others.
    ///
    /// # Errors
    /// What the system says.
    pub(super) fn wait(&self, most: Duration) -> io::Result<Woken> {
        if self.poll(most, true)? == Woken::Ends {
            return Ok(Woken::Ends);
        }
        let woken = self.poll(SETTLES, false)?;
        loop {
            match self.changes.read_events() {
                Ok(events) if events.is_empty() => break,
                Ok(_) => {}
                Err(Errno::EAGAIN) => break,
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(woken)
    }

    fn poll(&self, most: Duration, for_changes: bool) -> io::Result<Woken> {
        let signals = PollFd::new(self.signals.as_fd(), PollFlags::POLLIN);
        let changes = PollFd::new(self.changes.as_fd(), PollFlags::POLLIN);
        let mut both = [signals, changes];
        let watched = if for_changes {
            &mut both[..]
        } else {
            &mut both[..1]
        };
        let most = PollTimeout::try_from(most).unwrap_or(PollTimeout::MAX);
        match poll(watched, most) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        match self.signals.read_signal() {
            Ok(Some(_)) => Ok(Woken::Ends),
            Ok(None) | Err(Errno::EINTR) => Ok(Woken::Changed),
            Err(error) => Err(error.into()),
        }
    }
}

const SETTLES: Duration = Duration::from_millis(20);

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn a_change_wakes_and_silence_does_not() {
        let folder = tempfile::tempdir().expect("a folder");
        let watch = Watch::new().expect("watches");
        watch.folder(folder.path()).expect("watched");
        let long = Duration::from_secs(60);
        let before = Instant::now();
        std::fs::write(folder.path().join("a"), "x").expect("written");
        assert_eq!(watch.wait(long).expect("woken"), Woken::Changed);
        std::fs::rename(folder.path().join("a"), folder.path().join("b")).expect("renamed");
        assert_eq!(watch.wait(long).expect("woken"), Woken::Changed);
        assert!(before.elapsed() < long);
        let before = Instant::now();
        let short = Duration::from_millis(50);
        assert_eq!(watch.wait(short).expect("in time"), Woken::Changed);
        assert!(before.elapsed() >= short);
    }
}
