//! Network namespaces: held by descriptor, and entered for a moment by the calling thread.

#![allow(unsafe_code)]

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::Path,
    process,
};

use nix::sched::{CloneFlags, setns};
use socket2::{Domain, Socket, Type};

/// A network namespace. It lives at least as long as this.
#[derive(Debug)]
pub struct Netns {
    file: File,
}

impl Netns {
    /// By a path such as `/proc/<pid>/ns/net` or `/run/netns/<name>`.
    pub fn open(path: &Path) -> io::Result<Self> {
        Ok(Self {
            file: File::open(path)?,
        })
    }

    /// The one the calling thread is in.
    pub fn current() -> io::Result<Self> {
        Self::open(Path::new("/proc/thread-self/ns/net"))
    }

    /// Its cookie: unique until the machine restarts, unlike the inode, which is used again.
    pub fn cookie(&self) -> io::Result<u64> {
        self.within(|| netns_cookie(Socket::new(Domain::UNIX, Type::DGRAM, None)?.as_fd()))?
    }

    /// Its inode, as in `ls -l /proc/<pid>/ns/net`.
    pub fn inode(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.ino())
    }

    /// Runs something short in this namespace: the thread goes in, calls, and comes back. Sockets
    /// that are made inside stay in the namespace. The closure must not block, as the thread may be
    /// one that serves others.
    ///
    /// Should the thread not come back, the process aborts: a thread that is in the wrong namespace
    /// must never serve.
    pub fn within<T>(&self, f: impl FnOnce() -> T) -> io::Result<T> {
        let home = Self::current()?;
        setns(&self.file, CloneFlags::CLONE_NEWNET)?;
        let way_back = WayBack(home);
        let result = f();
        drop(way_back);
        Ok(result)
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
struct WayBack(Netns);

impl Drop for WayBack {
    fn drop(&mut self) {
        if let Err(errno) = setns(&self.0.file, CloneFlags::CLONE_NEWNET) {
            tracing::error!(%errno, "a thread cannot leave a pod's network namespace: aborting");
            process::abort();
        }
    }
}

/// Not in the libc crate for all targets.
const SO_NETNS_COOKIE: libc::c_int = 71;

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
    }
}
