//! Network namespaces: held by descriptor, and entered for a moment by the calling thread.

#![allow(unsafe_code)]

use std::{
    cell::Cell,
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::fs::{MetadataExt, OpenOptionsExt},
    },
    path::Path,
    process,
    sync::OnceLock,
};

use nix::{
    sched::{CloneFlags, setns},
    sys::statfs::{FsType, fstatfs},
};
use socket2::{Domain, Socket, Type};

/// A network namespace. It lives at least as long as this.
#[derive(Debug)]
pub struct Netns {
    file: File,
}

impl Netns {
    /// By a path such as `/proc/<pid>/ns/net` or `/run/netns/<name>`. Where something else is found,
    /// it fails and does not wait.
    pub fn open(path: &Path) -> io::Result<Self> {
        // Opened as a name only, nothing that is there is woken up.
        let name = File::options()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_CLOEXEC)
            .open(path)?;
        if fstatfs(&name)?.filesystem_type() != NSFS_MAGIC {
            let error = "it is no network namespace";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, error));
        }
        let file = File::options()
            .read(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC | libc::O_NOCTTY)
            .open(format!("/proc/thread-self/fd/{}", name.as_raw_fd()))?;
        Ok(Self { file })
    }

    /// By a descriptor that somebody else opened.
    pub fn received(descriptor: OwnedFd) -> io::Result<Self> {
        if fstatfs(&descriptor)?.filesystem_type() != NSFS_MAGIC {
            let error = "the descriptor is of no network namespace";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, error));
        }
        Ok(descriptor.into())
    }

    /// The one the calling thread is in.
    pub fn current() -> io::Result<Self> {
        // What is there needs no check.
        Ok(Self {
            file: File::open("/proc/thread-self/ns/net")?,
        })
    }

    /// Its cookie: unique until the machine restarts, unlike the inode, which is used again.
    pub fn cookie(&self) -> io::Result<u64> {
        self.within(|| netns_cookie(Socket::new(Domain::UNIX, Type::DGRAM, None)?.as_fd()))?
    }

    /// Its inode, as in `ls -l /proc/<pid>/ns/net`.
    pub fn inode(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.ino())
    }

    /// The inode of the user namespace that it belongs to (ioctl_ns(2)).
    pub fn owner(&self) -> io::Result<u64> {
        // SAFETY: it takes no argument, and gives a descriptor that is nobody's yet, or -1.
        let owner = unsafe {
            match libc::ioctl(self.file.as_raw_fd(), NS_GET_USERNS) {
                -1 => return Err(io::Error::last_os_error()),
                owner => File::from_raw_fd(owner),
            }
        };
        Ok(owner.metadata()?.ino())
    }

    /// Runs something short in this namespace: the thread goes in, calls, and comes back. Sockets
    /// that are made inside stay in the namespace. The closure must not block, as the thread may be
    /// one that serves others.
    ///
    /// Should the thread not come back, the process aborts: a thread that is in the wrong namespace
    /// must never serve.
    pub fn within<T>(&self, f: impl FnOnce() -> T) -> io::Result<T> {
        let nested = VISITING.get();
        let home = match HOME.get() {
            Some(home) if !nested => Home::Kept(home),
            _ => Home::Opened(Self::current()?),
        };
        let way_back = WayBack { home, nested };
        setns(&self.file, CloneFlags::CLONE_NEWNET)?;
        VISITING.set(true);
        let result = f();
        drop(way_back);
        Ok(result)
    }

    /// Says that all threads of the process belong into the namespace that the calling one is in,
    /// for good: it is kept open, instead of being opened at each visit elsewhere.
    pub fn stay_here() -> io::Result<()> {
        let here = Self::current()?;
        HOME.get_or_init(|| here);
        Ok(())
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl From<OwnedFd> for Netns {
    fn from(fd: OwnedFd) -> Self {
        Self { file: fd.into() }
    }
}

/// The cookie of the namespace a socket is in (`SO_NETNS_COOKIE`, Linux 5.14).
pub fn netns_cookie(socket: BorrowedFd<'_>) -> io::Result<u64> {
    let mut cookie = 0u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the option's value is eight bytes, which is what is handed in.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(cookie)
}

/// Takes the thread home when dropped.
struct WayBack {
    home: Home,
    nested: bool,
}

enum Home {
    Kept(&'static Netns),
    Opened(Netns),
}

impl Drop for WayBack {
    fn drop(&mut self) {
        let home = match &self.home {
            Home::Kept(home) => home,
            Home::Opened(home) => home,
        };
        if let Err(errno) = setns(&home.file, CloneFlags::CLONE_NEWNET) {
            tracing::error!(%errno, "a thread cannot leave a pod's network namespace: aborting");
            process::abort();
        }
        VISITING.set(self.nested);
    }
}

/// Where all threads belong, see [`Netns::stay_here`].
static HOME: OnceLock<Netns> = OnceLock::new();

thread_local! {
    /// Whether the thread is elsewhere: from a visit inside a visit it must not go home.
    static VISITING: Cell<bool> = const { Cell::new(false) };
}

/// Not in the libc crate for all targets.
const SO_NETNS_COOKIE: libc::c_int = 71;
/// `linux/nsfs.h`; not in the libc crate.
const NS_GET_USERNS: libc::Ioctl = 0xb701;
/// The file system of namespaces (`linux/magic.h`).
const NSFS_MAGIC: FsType = FsType(0x6e73_6673);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_current_namespace_has_one_cookie_and_inode() {
        let current = Netns::current().unwrap();
        let again = Netns::open(Path::new("/proc/self/ns/net")).unwrap();
        assert_eq!(current.inode().unwrap(), again.inode().unwrap());
        let socket = Socket::new(Domain::UNIX, Type::DGRAM, None).unwrap();
        assert_ne!(netns_cookie(socket.as_fd()).unwrap(), 0);
        let users = std::fs::metadata("/proc/self/ns/user").unwrap().ino();
        assert_eq!(current.owner().unwrap(), users);
    }

    /// Needs root, for network namespaces of its own.
    #[test]
    fn a_thread_comes_back_to_where_it_was() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let elsewhere = || {
            nix::sched::unshare(CloneFlags::CLONE_NEWNET).unwrap();
            Netns::current().unwrap()
        };
        let [one, other] = [(); 2].map(|()| std::thread::spawn(elsewhere).join().unwrap());
        let here = || Netns::current().unwrap().inode().unwrap();
        let home = here();
        // For all tests of this process: they come home from wherever they go.
        Netns::stay_here().unwrap();
        let inside = |netns: &Netns| netns.within(here).unwrap();
        assert_eq!(inside(&one), one.inode().unwrap());
        assert_eq!(here(), home);
        let nested = one.within(|| (inside(&other), here())).unwrap();
        assert_eq!(nested, (other.inode().unwrap(), one.inode().unwrap()));
        assert_eq!(here(), home);
        assert_eq!(inside(&other), other.inode().unwrap());
        assert_eq!(here(), home);
    }

    #[test]
    fn what_is_no_namespace_is_not_opened() {
        // A FIFO without a writer would keep who opens it waiting.
        let fifo = std::env::temp_dir().join(format!("weft-netns-{}", process::id()));
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        for path in [fifo.as_path(), Path::new("/dev/null"), Path::new("/proc")] {
            let error = Netns::open(path).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{path:?}");
        }
        std::fs::remove_file(fifo).unwrap();
    }
}
