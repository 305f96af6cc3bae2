//! Files that others read while they are written: replaced in one step, or not at all.
//!
//! One that others write, too, is replaced by exchanging it for the new one: what comes out says whether it was what the
//! new one was made of. If it was not, it goes back.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

/// Replaces a file, or makes it. Whoever reads it sees the one or the other, also after a loss of power.
///
/// # Errors
/// What the system says; the file is as it was.
pub fn replace(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let temporary = beside(path);
    let written = write(&temporary, content, mode).and_then(|()| fs::rename(&temporary, path));
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written?;
    sync_folder(path)
}

/// Replaces a file if it still has this content; false: it has another by now, or is gone.
///
/// # Errors
/// What the system says.
pub fn replace_if(path: &Path, before: &[u8], content: &[u8], mode: u32) -> io::Result<bool> {
    let temporary = beside(path);
    let replaced =
        write(&temporary, content, mode).and_then(|()| swap(path, before, &temporary, content));
    // What came out, or what was not put in.
    let _ = fs::remove_file(&temporary);
    if matches!(replaced, Ok(true)) {
        sync_folder(path)?;
    }
    replaced
}

/// Renames a file to a name that nobody has; false: somebody has it.
///
/// # Errors
/// What the system says.
pub fn put_back(from: &Path, to: &Path) -> io::Result<bool> {
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        Ok(()) => sync_folder(to).map(|()| true),
        Err(Errno::EXIST) => Ok(false),
        // Not of all file systems.
        Err(Errno::INVAL | Errno::NOSYS) if to.exists() => Ok(false),
        Err(Errno::INVAL | Errno::NOSYS) => fs::rename(from, to).map(|()| true),
        Err(error) => Err(error.into()),
    }
}

/// Puts a file in the place of one with this content, which then is `temporary`.
fn swap(path: &Path, before: &[u8], temporary: &Path, content: &[u8]) -> io::Result<bool> {
    match exchange(temporary, path) {
        Ok(()) => {}
        Err(Errno::NOENT) => return Ok(false),
        // Not of all file systems: then the moment in between is short, but not none.
        Err(Errno::INVAL | Errno::NOSYS) => {
            if fs::read(path)? != before {
                return Ok(false);
            }
            return fs::rename(temporary, path).map(|()| true);
        }
        Err(error) => return Err(error.into()),
    }
    let mut out = fs::read(temporary)?;
    if out == before {
        return Ok(true);
    }
    // Until what comes out is what was put in: otherwise somebody has written again, and that is the newest.
    let mut put_in = content.to_owned();
    for _ in 0..MOST_EXCHANGES {
        match exchange(temporary, path) {
            Ok(()) => {}
            // Somebody has deleted it since.
            Err(Errno::NOENT) => return Ok(false),
            Err(error) => return Err(error.into()),
        }
        let came_out = fs::read(temporary)?;
        if came_out == put_in {
            return Ok(false);
        }
        put_in = std::mem::replace(&mut out, came_out);
    }
    Err(io::Error::other("somebody writes it all the time"))
}

fn exchange(one: &Path, other: &Path) -> Result<(), Errno> {
    renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE)
}

/// Makes a file's place in its folder last.
///
/// # Errors
/// What the system says.
pub fn sync_folder(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(folder) if folder != Path::new("") => File::open(folder)?.sync_all(),
        _ => Ok(()),
    }
}

fn write(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let mut options = OpenOptions::new();
    let mut file = options.write(true).create_new(true).mode(mode).open(path)?;
    file.write_all(content)?;
    // Whatever the mask of this process is.
    file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(mode))?;
    file.sync_all()
}

/// A name that nobody else uses, which no runtime takes for a configuration.
fn beside(path: &Path) -> PathBuf {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    path.with_file_name(format!(".{name}.weft-{}-{count}", std::process::id()))
}

const MOST_EXCHANGES: usize = 100;

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_file_is_replaced_and_nothing_else_is_left() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("a.conflist");
        for content in ["one", "two"] {
            replace(&path, content.as_bytes(), 0o640).expect("written");
            assert_eq!(fs::read_to_string(&path).expect("there"), content);
        }
        let mode = fs::metadata(&path).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o640);
        assert_eq!(fs::read_dir(folder.path()).expect("a folder").count(), 1);
        assert!(replace(&folder.path().join("none/a"), b"", 0o600).is_err());
    }

    #[test]
    fn what_somebody_else_wrote_meanwhile_stays() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("a.conflist");
        fs::write(&path, "read").expect("written");
        let replaced = replace_if(&path, b"read", b"ours", 0o640);
        assert!(replaced.expect("replaced"));
        assert_eq!(fs::read_to_string(&path).expect("there"), "ours");
        // Between the reading and the replacing.
        fs::write(&path, "theirs").expect("written");
        for before in [&b"read"[..], b"ours"] {
            assert!(!replace_if(&path, before, b"ours again", 0o640).expect("looked"));
            assert_eq!(fs::read_to_string(&path).expect("there"), "theirs");
        }
        fs::remove_file(&path).expect("removed");
        assert!(!replace_if(&path, b"theirs", b"ours", 0o640).expect("looked"));
        assert_eq!(fs::read_dir(folder.path()).expect("a folder").count(), 0);
    }

    /// Whatever of the two comes when.
    #[test]
    fn no_writing_of_another_is_lost() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("a.conflist");
        fs::write(&path, "0").expect("written");
        let is_over = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            let ours = scope.spawn(|| {
                while !is_over.load(Ordering::Relaxed) {
                    let read = fs::read(&path).expect("there");
                    let content = [&read[..], b"+"].concat();
                    if !read.ends_with(b"+") {
                        replace_if(&path, &read, &content, 0o640).expect("replaced");
                    }
                }
            });
            for number in 1..200 {
                replace(&path, number.to_string().as_bytes(), 0o640).expect("written");
                let until = std::time::Instant::now() + std::time::Duration::from_secs(20);
                let expected = format!("{number}+");
                while fs::read_to_string(&path).expect("there") != expected {
                    assert!(std::time::Instant::now() < until, "{number} is lost");
                    std::thread::yield_now();
                }
            }
            is_over.store(true, Ordering::Relaxed);
            ours.join().expect("replaced");
        });
    }
}
