//! A process, held by its folder in `/proc` (proc(5)): what is asked by it is that process' own, and fails once it has
//! ended, whoever has its number then.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, open, openat};
use nix::sys::stat::{FileStat, Mode, fstatat};

use crate::netns::Netns;

/// A process.
#[derive(Debug)]
pub(super) struct Process {
    folder: OwnedFd,
    /// Its number in the PID namespace of that `/proc`.
    pub(super) pid: u32,
}

impl Process {
    /// The process that has a number now.
    pub(super) fn open(proc: &Path, pid: u32) -> io::Result<Self> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let folder = open(&proc.join(pid.to_string()), flags, Mode::empty())?;
        Ok(Self { folder, pid })
    }

    /// The beginning of one of its files.
    pub(super) fn read(&self, name: &str) -> io::Result<String> {
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        let file = File::from(openat(&self.folder, name, flags, Mode::empty())?);
        let mut bytes = Vec::new();
        file.take(LONGEST).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// What it is called, which it may choose.
    pub(super) fn comm(&self) -> io::Result<String> {
        Ok(self.read("comm")?.trim_end().to_owned())
    }

    /// When it was started, in clock ticks since the machine was.
    pub(super) fn started(&self) -> io::Result<u64> {
        started(&self.read("stat")?).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    /// Whether it is a thread of the kernel, which nobody else can make.
    pub(super) fn is_kernels(&self) -> io::Result<bool> {
        is_kernels(&self.read("stat")?).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    /// The inode of its network namespace.
    pub(super) fn netns_inode(&self) -> io::Result<u64> {
        self.in_a_thread(|at| Ok(self.look(at)?.st_ino))
    }

    /// Its network namespace.
    pub(super) fn netns(&self) -> io::Result<Netns> {
        self.in_a_thread(|at| Netns::open(&self.path(at)))
    }

    /// Looks at the network namespace of the first thread. If that has ended before the others, as it may, it is in none,
    /// and any of the others is looked at.
    fn in_a_thread<T>(&self, look: impl Fn(&str) -> io::Result<T>) -> io::Result<T> {
        match look("ns/net") {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {
                for thread in fs::read_dir(self.path("task"))? {
                    let name = thread?.file_name();
                    match look(&format!("task/{}/ns/net", name.to_string_lossy())) {
                        Err(error) if is_gone(&error) => {}
                        outcome => return outcome,
                    }
                }
                Err(error)
            }
            outcome => outcome,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        let folder = self.folder.as_raw_fd();
        format!("/proc/thread-self/fd/{folder}/{name}").into()
    }

    /// Its root directory, as device and inode.
    pub(super) fn root(&self) -> io::Result<(u64, u64)> {
        let root = self.look("root/.")?;
        Ok((root.st_dev, root.st_ino))
    }

    fn look(&self, name: &str) -> io::Result<FileStat> {
        Ok(fstatat(&self.folder, name, AtFlags::empty())?)
    }
}

/// Whether an error says that the process has ended.
pub(super) fn is_gone(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw);
    matches!(errno, Some(Errno::ENOENT | Errno::ESRCH))
}

/// The 22nd field of `stat`.
fn started(stat: &str) -> Option<u64> {
    field(stat, 22)?.parse().ok()
}

/// By the flags, the 9th field.
fn is_kernels(stat: &str) -> Option<bool> {
    let flags: u32 = field(stat, 9)?.parse().ok()?;
    Some(flags & PF_KTHREAD != 0)
}

/// A field of `stat` from the third one; the second is a name in parentheses, which may have any characters.
fn field(stat: &str, number: usize) -> Option<&str> {
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_ascii_whitespace().nth(number - 3)
}

/// `linux/sched.h`
const PF_KTHREAD: u32 = 0x0020_0000;
/// Paths of control groups are shorter than 4 KiB, and there are a dozen hierarchies of version 1.
const LONGEST: u64 = 64 * 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_do_not_hide_when_a_process_started() {
        let fields = (3..=30).map(|it| it.to_string()).collect::<Vec<_>>();
        let fields = fields.join(" ");
        for name in ["pause", "a b", ") 1 2", "((", ""] {
            assert_eq!(started(&format!("7 ({name}) {fields}\n")), Some(22));
        }
        assert_eq!(started("7 (x) S 1"), None);
        let own = Process::open(Path::new("/proc"), std::process::id()).expect("there");
        assert!(!own.is_kernels().expect("told"));
        let kernels = "2 (kthreadd) S 0 0 0 0 -1 2129984 0 0";
        assert_eq!(is_kernels(kernels), Some(true));
        assert_eq!(
            is_kernels("2 (2129984) S 0 0 0 0 -1 4194560 0"),
            Some(false)
        );
        assert_eq!(started(""), None);
    }

    #[test]
    fn a_process_is_where_its_threads_are() {
        let child = without_its_first_thread();
        let process = Process::open(Path::new("/proc"), child.as_raw() as u32).expect("there");
        let until = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while process.look("ns/net").is_ok() {
            assert!(std::time::Instant::now() < until, "it runs on");
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        let own = Netns::current().and_then(|it| it.inode()).expect("there");
        let found = process.netns_inode();
        let netns = process.netns().and_then(|it| it.inode());
        nix::sys::signal::kill(child, nix::sys::signal::SIGKILL).expect("ended");
        nix::sys::wait::waitpid(child, None).expect("ended");
        assert_eq!(found.expect("in a thread"), own);
        assert_eq!(netns.expect("opened"), own);
        assert!(is_gone(&process.netns_inode().expect_err("gone")));
    }

    /// Starts a process of two threads, of which the first ends.
    #[allow(unsafe_code)]
    fn without_its_first_thread() -> nix::unistd::Pid {
        // SAFETY: the child does nothing but start a thread that sleeps, and end.
        match unsafe { nix::unistd::fork() }.expect("forked") {
            nix::unistd::ForkResult::Parent { child } => child,
            nix::unistd::ForkResult::Child => {
                std::thread::spawn(|| {
                    std::thread::sleep(std::time::Duration::from_secs(60));
                    // SAFETY: the process ends, and none of what its parent has is touched.
                    unsafe { libc::_exit(1) }
                });
                // SAFETY: the thread ends where it is, and has nothing that others use.
                unsafe { libc::syscall(libc::SYS_exit, 0) };
                unreachable!("the thread has ended")
            }
        }
    }

    #[test]
    fn a_process_that_ended_is_not_its_successor() {
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .expect("started");
        let process = Process::open(Path::new("/proc"), child.id()).expect("there");
        assert!(!process.comm().expect("there").is_empty());
        assert!(process.started().expect("there") > 0);
        let own = Netns::current().and_then(|it| it.inode()).expect("there");
        assert_eq!(process.netns_inode().expect("there"), own);
        let netns = process.netns().and_then(|it| it.inode());
        assert_eq!(netns.expect("opened"), own);
        child.kill().expect("ended");
        child.wait().expect("ended");
        for error in [
            process.comm().err(),
            process.netns_inode().err(),
            process.netns().err(),
        ] {
            assert!(is_gone(&error.expect("gone")));
        }
    }
}
