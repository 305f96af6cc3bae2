//! A Unix socket that only root can open.
//!
//! It is made in a private directory beside its place, gets its mode there, and is moved into place:
//! at no time can anybody else connect, and what an earlier process left is replaced in one step.

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::unistd::geteuid;
use tokio::net::{UnixListener, UnixStream};
use tracing::warn;

/// The socket. Its file goes when it is dropped, unless another process has replaced it by then.
#[derive(Debug)]
pub struct Socket {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the file.
    file: (u64, u64),
}

impl Socket {
    /// Makes it at this place, with the folders that lead there. A socket that is there is replaced.
    ///
    /// # Errors
    /// What is there is no socket, or the folder cannot be written.
    pub fn open(path: &Path) -> io::Result<Self> {
        match fs::symlink_metadata(path) {
            Ok(there) if !there.file_type().is_socket() => {
                let reason = format!("{} is there and is no socket", path.display());
                return Err(io::Error::new(io::ErrorKind::AlreadyExists, reason));
            }
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        let private = private_directory(path)?;
        let opened = Self::open_in(&private, path);
        if let Err(error) = fs::remove_dir_all(&private) {
            warn!(path = %private.display(), %error, "removing a temporary directory");
        }
        opened
    }

    fn open_in(private: &Path, path: &Path) -> io::Result<Self> {
        let temporary = private.join("s");
        let listener = UnixListener::bind(&temporary)?;
        fs::set_permissions(&temporary, Permissions::from_mode(0o600))?;
        let file = identify(&temporary)?;
        fs::rename(&temporary, path)?;
        Ok(Self {
            listener,
            path: path.to_owned(),
            file,
        })
    }

    /// The next connection of root, or of this process's own user where that is another.
    ///
    /// # Errors
    /// None can be accepted now.
    pub async fn accept(&self) -> io::Result<UnixStream> {
        loop {
            let (stream, _) = self.listener.accept().await?;
            let uid = stream.peer_cred()?.uid();
            if uid == 0 || uid == geteuid().as_raw() {
                return Ok(stream);
            }
            warn!(uid, "refused a connection to the admin socket: not root");
        }
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if identify(&self.path).is_ok_and(|file| file == self.file) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Makes a directory for root only, in the directory of `path`: a rename does not cross mounts.
fn private_directory(path: &Path) -> io::Result<PathBuf> {
    let parent = match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    fs::create_dir_all(parent)?;
    // Short: paths of sockets have 107 bytes at most.
    let name = format!(".weft-{:08x}", rand::random::<u32>());
    let private = parent.join(name);
    DirBuilder::new().mode(0o700).create(&private)?;
    Ok(private)
}

fn identify(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}
