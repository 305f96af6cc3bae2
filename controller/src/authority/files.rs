//! The authority's folder: `ca.crt` (the roots, PEM, one or several), `issuer.crt` (the issuer's
//! certificate, followed by those between it and a root, if any) and `issuer.key`.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use weft_core::TrustDomain;

use super::issuer::IssuerError;
use super::material::{IN_FOLDER, Material};

const NAMES: [&str; 3] = [IN_FOLDER.key, IN_FOLDER.certificate, IN_FOLDER.roots];

/// A folder in which a root is made; there as long as that takes:
const MAKING: &str = ".making";
/// in this one of it,
const UNFINISHED: &str = "unfinished";
/// which gets this name when all three files are in it.
const MADE: &str = "made";

const MAX_FILE_BYTES: u64 = 1024 * 1024;

/// When and as what each file was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Stamps([(u64, u64, i64, i64); 3]);

impl Stamps {
    pub(super) fn of(folder: &Path) -> Result<Self, IssuerError> {
        let mut stamps = [(0, 0, 0, 0); 3];
        for (stamp, name) in stamps.iter_mut().zip(NAMES) {
            let path = folder.join(name);
            let it = std::fs::metadata(&path).map_err(|error| failed(&path, error))?;
            *stamp = (it.ino(), it.size(), it.mtime(), it.mtime_nsec());
        }
        Ok(Self(stamps))
    }
}

/// Makes a root that acts as issuer, if the folder holds nothing yet. True: it did.
///
/// It is made as a whole in a folder of its own, and what is complete there is moved; what an operator
/// has put here is never touched.
pub(super) fn make(folder: &Path, trust_domain: &TrustDomain) -> Result<bool, IssuerError> {
    let making = folder.join(MAKING);
    let made = making.join(MADE);
    let present = |name: &str| folder.join(name).exists();
    match NAMES.iter().filter(|name| present(name)).count() {
        0 => {}
        // Another folder's root, by now: an operator's came before it, or it is in its place.
        3 => return discard(&making).map(|()| false),
        // Some were moved when a controller died here: those that are missing are still there.
        _ if NAMES
            .iter()
            .all(|name| present(name) != made.join(name).exists()) =>
        {
            adopt(folder, &made)?;
            return discard(&making).map(|()| true);
        }
        _ => {
            let missing = NAMES.into_iter().find(|name| !present(name));
            // Never repaired by guessing: a new root would cut off everybody who has the old one.
            return Err(IssuerError::Content {
                file: missing.unwrap_or(IN_FOLDER.roots),
                reason: "missing, while others of the folder are there".to_owned(),
            });
        }
    }
    // Nobody has seen what a controller was making here when it died.
    discard(&making)?;
    let unfinished = making.join(UNFINISHED);
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&unfinished)
        .map_err(|error| failed(&unfinished, error))?;
    let new = Material::new(IN_FOLDER, trust_domain).map_err(|error| IssuerError::Content {
        file: IN_FOLDER.roots,
        reason: format!("cannot be made: {error}"),
    })?;
    write(&unfinished, IN_FOLDER.key, &new.key, 0o600)?;
    write(&unfinished, IN_FOLDER.certificate, &new.certificate, 0o600)?;
    write(&unfinished, IN_FOLDER.roots, &new.roots, 0o644)?;
    rename(&unfinished, &made)?;
    adopt(folder, &made)?;
    discard(&making).map(|()| true)
}

/// Moves what was made to where it belongs.
fn adopt(folder: &Path, made: &Path) -> Result<(), IssuerError> {
    for name in NAMES {
        if made.join(name).exists() {
            rename(&made.join(name), &folder.join(name))?;
        }
    }
    Ok(())
}

/// Renames, so that it stays so.
fn rename(from: &Path, to: &Path) -> Result<(), IssuerError> {
    let renamed = || -> io::Result<()> {
        std::fs::rename(from, to)?;
        match to.parent() {
            Some(folder) => File::open(folder)?.sync_all(),
            None => Ok(()),
        }
    };
    renamed().map_err(|error| failed(to, error))
}

/// Removes the folder in which a root was made. Nobody else's files are in it.
fn discard(making: &Path) -> Result<(), IssuerError> {
    let removed = match std::fs::symlink_metadata(making) {
        // As earlier versions marked an unfinished start.
        Ok(it) if it.is_file() => std::fs::remove_file(making),
        Ok(_) => std::fs::remove_dir_all(making),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed(making, error)),
        _ => Ok(()),
    }
}

/// Writes a file so that it is there as a whole or not at all, and never readable by others than
/// `mode` says, not even for a moment.
fn write(folder: &Path, name: &str, content: &[u8], mode: u32) -> Result<(), IssuerError> {
    let path = folder.join(name);
    let temporary = folder.join(format!(".{name}.new"));
    let written = || -> io::Result<()> {
        match std::fs::remove_file(&temporary) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(&temporary)?;
        file.write_all(content)?;
        file.sync_all()?;
        std::fs::rename(&temporary, &path)?;
        File::open(folder)?.sync_all()
    };
    written().map_err(|error| failed(&path, error))
}

/// Reads what a folder holds.
pub(super) fn read(folder: &Path) -> Result<Material, IssuerError> {
    let roots = read_file(folder, IN_FOLDER.roots)?;
    let certificate = read_file(folder, IN_FOLDER.certificate)?;
    warn_if_exposed(folder, IN_FOLDER.key);
    Ok(Material {
        names: IN_FOLDER,
        roots,
        certificate,
        key: read_file(folder, IN_FOLDER.key)?,
    })
}

fn read_file(folder: &Path, name: &str) -> Result<Vec<u8>, IssuerError> {
    let path = folder.join(name);
    let mut content = vec![];
    File::open(&path)
        .and_then(|it| it.take(MAX_FILE_BYTES).read_to_end(&mut content))
        .map_err(|error| failed(&path, error))?;
    Ok(content)
}

/// Says so when others than the owner may read a file. It is used all the same: a mounted Secret
/// looks like that, and is private by other means.
fn warn_if_exposed(folder: &Path, name: &str) {
    let path = folder.join(name);
    if std::fs::metadata(&path).is_ok_and(|it| it.mode() & 0o077 != 0) {
        tracing::warn!(file = %path.display(), "others than the owner may read the key");
    }
}

fn failed(path: &Path, error: io::Error) -> IssuerError {
    IssuerError::File {
        path: path.to_owned(),
        error,
    }
}
