//! The pins of an earlier version of the map layouts. They cannot be taken over, and must not be
//! removed before their pods are meshed by the new set: until then their programs, whose listeners
//! died with the earlier agent, refuse what the pods connect. So they go when the last of their
//! pods is enrolled anew or gone.

use std::{
    collections::BTreeSet,
    fs, io,
    os::fd::AsFd,
    path::{Path, PathBuf},
};

use super::{LINKS, MAPS, error::BpfError, links, sys};

/// What is left of earlier versions.
#[derive(Debug, Default)]
pub(super) struct Legacy {
    folders: Vec<PathBuf>,
    cookies: BTreeSet<u64>,
}

impl Legacy {
    /// Finds the folders of other versions and the pods they still hold.
    pub(super) fn find(pin_root: &Path, current: &Path) -> Result<Self, BpfError> {
        let mut legacy = Self::default();
        for folder in versions(pin_root)? {
            if folder == current {
                continue;
            }
            for cookie in links::lookup_cookies(&folder.join(LINKS))? {
                let pin = folder.join(LINKS).join(links::lookup_pin(cookie));
                if links::is_attached(&pin)? == Some(true) {
                    legacy.cookies.insert(cookie);
                }
            }
            legacy.folders.push(folder);
        }
        Ok(legacy)
    }

    /// The pods that are still to be enrolled anew, or to be unenrolled.
    pub(super) fn cookies(&self) -> impl Iterator<Item = u64> {
        self.cookies.iter().copied()
    }

    /// Whether a pod's lookup program still is attached; `None` if it has none here.
    pub(super) fn is_attached(&self, cookie: u64) -> Result<Option<bool>, BpfError> {
        for folder in &self.folders {
            let pin = folder.join(LINKS).join(links::lookup_pin(cookie));
            if let Some(attached) = links::is_attached(&pin)? {
                return Ok(Some(attached));
            }
        }
        Ok(None)
    }

    /// A pod is enrolled in the current version, or unenrolled. The earlier versions stop to
    /// redirect it, and then to steer what arrives.
    pub(super) fn done_with(&mut self, cookie: u64) -> Result<(), BpfError> {
        if self.cookies.contains(&cookie) {
            for folder in &self.folders {
                forget(folder, cookie)?;
                links::detach(&folder.join(LINKS).join(links::lookup_pin(cookie)))?;
            }
            self.cookies.remove(&cookie);
        }
        self.finish_if_empty()
    }

    /// Removes the earlier versions if no pod needs them any more.
    pub(super) fn finish_if_empty(&mut self) -> Result<(), BpfError> {
        if self.cookies.is_empty() {
            for folder in self.folders.drain(..) {
                remove(&folder)?;
            }
        }
        Ok(())
    }
}

/// Takes a pod out of a version's `PODS`, whose key has always been the cookie.
fn forget(folder: &Path, cookie: u64) -> Result<(), BpfError> {
    let pin = folder.join(MAPS).join("PODS");
    let failed = |source| BpfError::Pin {
        path: pin.clone(),
        source,
    };
    let pods = match sys::open_pin(&pin) {
        Ok(pods) => pods,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
    };
    let info = sys::map_info(pods.as_fd()).map_err(failed)?;
    if info.key_size as usize == size_of::<u64>() {
        sys::map_delete(pods.as_fd(), &cookie).map_err(failed)?;
    }
    Ok(())
}

/// The folders of all versions of an instance.
pub(super) fn versions(pin_root: &Path) -> Result<Vec<PathBuf>, BpfError> {
    let failed = |source| BpfError::File {
        what: "reading",
        path: pin_root.into(),
        source,
    };
    let entries = match fs::read_dir(pin_root) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    let mut folders = Vec::new();
    for entry in entries {
        let path = entry.map_err(failed)?.path();
        let version = path
            .file_name()
            .and_then(|name| name.to_str()?.strip_prefix('v'));
        if version.is_some_and(|version| version.parse::<u32>().is_ok()) {
            folders.push(path);
        }
    }
    Ok(folders)
}

/// Detaches all links of a version and removes its pins.
pub(super) fn remove(folder: &Path) -> Result<(), BpfError> {
    links::detach_all(&folder.join(LINKS))?;
    // A BPF file system has no recursive removal of its own, and holds pins and folders only.
    for inner in [folder.join(LINKS), folder.join(MAPS)] {
        remove_folder(&inner)?;
    }
    remove_folder(folder)
}

fn remove_folder(folder: &Path) -> Result<(), BpfError> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(BpfError::File {
            what: "removing",
            path: folder.into(),
            source: error,
        }),
        _ => Ok(()),
    }
}
