//! The pins of another version of the map layouts: an earlier one's, or a later one's when an upgrade
//! is taken back. The maps cannot be taken over, so pods move from one set of programs to the other,
//! one by one, while both sets are attached.
//!
//! **Without an older agent** the other set's programs refuse what the pods connect, for its listeners
//! are gone. So it stays until the last of its pods is enrolled anew or gone.
//!
//! **Beside an older agent** connections go on through the other set: those that its agent has accepted
//! and not yet connected or delivered, and all that are open (the names that applications see of
//! their peers). So a pod that moves is put *aside* there: its connects are left to the new set, and
//! what passes the new set's lookup program passes the old one's. The set goes when that agent has
//! gone.
//!
//! What is read and written here is the same in every layout ([`abi::SCHEMA`]).

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    mem::offset_of,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use weft_ebpf_abi as abi;

use super::{
    LINKS, ListenerRole, MAPS, error::BpfError, links, pods::listener_key, sys, table::Table,
};

/// What is left of other versions.
#[derive(Debug, Default)]
pub(super) struct Legacy {
    folders: Vec<PathBuf>,
    /// The pods that are still to be enrolled anew, or to be unenrolled.
    waiting: BTreeSet<u64>,
    /// The pods that this version has by now, and that are aside in the other.
    moved: BTreeSet<u64>,
    addresses: BTreeMap<u64, Vec<abi::Address>>,
}

impl Legacy {
    /// Finds the folders of other versions and the pods they still hold.
    pub(super) fn find(pin_root: &Path, current: &Path) -> Result<Self, BpfError> {
        let mut legacy = Self::default();
        for folder in versions(pin_root)? {
            if folder == current {
                continue;
            }
            legacy.waiting.extend(pods(&folder)?);
            for cookie in links::lookup_cookies(&folder.join(LINKS))? {
                let pin = folder.join(LINKS).join(links::lookup_pin(cookie));
                if links::is_attached(&pin)? == Some(true) {
                    legacy.waiting.insert(cookie);
                }
            }
            legacy.read_addresses(&folder)?;
            legacy.folders.push(folder);
        }
        Ok(legacy)
    }

    /// Whether nothing is left.
    pub(super) fn is_empty(&self) -> bool {
        self.folders.is_empty()
    }

    /// The pods that are still to be enrolled anew, or to be unenrolled.
    pub(super) fn waiting(&self) -> impl Iterator<Item = u64> {
        self.waiting.iter().copied()
    }

    /// Whether another version still has something of the pod.
    pub(super) fn has(&self, cookie: u64) -> bool {
        self.waiting.contains(&cookie) || self.moved.contains(&cookie)
    }

    /// The addresses that the pod has there.
    pub(super) fn addresses(&self, cookie: u64) -> &[abi::Address] {
        self.addresses.get(&cookie).map_or(&[], Vec::as_slice)
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

    /// A pod is enrolled in the current version, and an agent of another one has connections of it.
    pub(super) fn hand_over(&mut self, cookie: u64) -> Result<(), BpfError> {
        for folder in &self.folders {
            put_aside(folder, cookie)?;
        }
        self.waiting.remove(&cookie);
        self.moved.insert(cookie);
        Ok(())
    }

    /// A pod is enrolled in the current version and no other agent has connections of it, or it is
    /// unenrolled. The other versions stop to redirect it, and then to steer what arrives; where they
    /// no longer redirect it, they must not stop to publish for their lookup program before that is
    /// gone.
    pub(super) fn done_with(&mut self, cookie: u64) -> Result<(), BpfError> {
        if self.has(cookie) {
            let aside = self.moved.contains(&cookie);
            for folder in &self.folders {
                let lookup = folder.join(LINKS).join(links::lookup_pin(cookie));
                if aside {
                    links::detach(&lookup)?;
                }
                forget(folder, cookie)?;
                links::detach(&lookup)?;
            }
            self.waiting.remove(&cookie);
            self.moved.remove(&cookie);
        }
        Ok(())
    }

    /// No agent of another version is left: so nothing of the pods that moved is needed there.
    pub(super) fn retire(&mut self) -> Result<(), BpfError> {
        while let Some(cookie) = self.moved.first().copied() {
            self.done_with(cookie)?;
        }
        self.finish_if_empty()
    }

    /// Takes in the folders of other versions that came later and hold no pod: those of agents that
    /// died before they took over.
    pub(super) fn add_unused(&mut self, folders: Vec<PathBuf>) -> Result<(), BpfError> {
        for folder in folders {
            if pods(&folder)?.is_empty() && links::lookup_cookies(&folder.join(LINKS))?.is_empty() {
                self.folders.push(folder);
            }
        }
        Ok(())
    }

    /// The folders of other versions that came later.
    pub(super) fn unknown(
        &self,
        pin_root: &Path,
        current: &Path,
    ) -> Result<Vec<PathBuf>, BpfError> {
        let mut folders = versions(pin_root)?;
        folders.retain(|it| it != current && !self.folders.contains(it));
        Ok(folders)
    }

    /// Removes the other versions if no pod needs them any more. Not while another agent runs, which
    /// may be one of theirs.
    pub(super) fn finish_if_empty(&mut self) -> Result<(), BpfError> {
        if self.waiting.is_empty() && self.moved.is_empty() {
            while let Some(folder) = self.folders.last() {
                remove(folder)?;
                self.folders.pop();
            }
            self.addresses.clear();
        }
        Ok(())
    }

    fn read_addresses(&mut self, folder: &Path) -> Result<(), BpfError> {
        let maps = folder.join(MAPS);
        if !maps.join("OWN_ADDRESSES").exists() {
            return Ok(());
        }
        let table: Table<abi::OwnAddressKey, u8> = Table::open(&maps, "OWN_ADDRESSES")?;
        for key in table.keys()? {
            self.addresses
                .entry(key.cookie)
                .or_default()
                .push(key.address);
        }
        Ok(())
    }
}

/// Lets the connects of a pod to the programs of the current version, and what arrives from elsewhere
/// to its listeners. The listener for connects stays as long as its agent: a connect that was
/// redirected a moment ago is still on its way there.
fn put_aside(folder: &Path, cookie: u64) -> Result<(), BpfError> {
    let Some(pods) = Raw::open(folder, "PODS", size_of::<u64>())? else {
        return Ok(());
    };
    let mut value = vec![0u8; pods.info.value_size as usize];
    let found = sys::map_lookup(pods.map.as_fd(), &cookie, value.as_mut_slice());
    if pods.failed(found)? {
        let at = offset_of!(abi::Pod, stance);
        let aside = (abi::Stance::Aside as u32).to_ne_bytes();
        if let Some(stance) = value.get_mut(at..at + aside.len()) {
            stance.copy_from_slice(&aside);
        }
        let set = sys::map_update(pods.map.as_fd(), &cookie, value.as_slice(), 0);
        pods.failed(set)?;
    }
    let Some(listeners) = Raw::open(folder, "LISTENERS", size_of::<abi::ListenerKey>())? else {
        return Ok(());
    };
    for role in [ListenerRole::Tunnel, ListenerRole::Plaintext] {
        let removed = sys::map_delete(listeners.map.as_fd(), &listener_key(cookie, role));
        listeners.failed(removed)?;
    }
    Ok(())
}

/// The pods that a version redirects or refuses. One without a lookup program is among them: it could
/// not be attached, or somebody took it away.
fn pods(folder: &Path) -> Result<Vec<u64>, BpfError> {
    match Raw::open(folder, "PODS", size_of::<u64>())? {
        Some(pods) => pods.cookies(),
        None => Ok(Vec::new()),
    }
}

/// Takes a pod out of a version's `PODS`.
fn forget(folder: &Path, cookie: u64) -> Result<(), BpfError> {
    match Raw::open(folder, "PODS", size_of::<u64>())? {
        Some(pods) => {
            let removed = sys::map_delete(pods.map.as_fd(), &cookie);
            pods.failed(removed).map(drop)
        }
        None => Ok(()),
    }
}

/// A map whose keys are known, and whose values are not.
struct Raw {
    map: OwnedFd,
    info: sys::MapInfo,
    pin: PathBuf,
}

impl Raw {
    /// `None` if it is not there, as in a version that was not installed completely.
    fn open(folder: &Path, name: &str, key_size: usize) -> Result<Option<Self>, BpfError> {
        let pin = folder.join(MAPS).join(name);
        let map = match sys::open_pin(&pin) {
            Ok(map) => map,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(BpfError::Pin { path: pin, source }),
        };
        let info = match sys::map_info(map.as_fd()) {
            Ok(info) => info,
            Err(source) => return Err(BpfError::Pin { path: pin, source }),
        };
        if info.key_size as usize != key_size {
            return Err(BpfError::Layout { path: pin });
        }
        Ok(Some(Self { map, info, pin }))
    }

    /// The keys of a map whose keys are cookies. Nobody takes any out meanwhile.
    fn cookies(&self) -> Result<Vec<u64>, BpfError> {
        let mut cookies = Vec::new();
        let mut next = 0u64;
        for _ in 0..self.info.max_entries {
            let found = sys::map_next_key(self.map.as_fd(), cookies.last(), &mut next);
            if !self.failed(found)? {
                break;
            }
            cookies.push(next);
        }
        Ok(cookies)
    }

    fn failed<T>(&self, result: io::Result<T>) -> Result<T, BpfError> {
        result.map_err(|source| BpfError::Pin {
            path: self.pin.clone(),
            source,
        })
    }
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

/// Removes a folder with all that is in it; nothing if there is none.
pub(super) fn remove_folder(folder: &Path) -> Result<(), BpfError> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(BpfError::File {
            what: "removing",
            path: folder.into(),
            source: error,
        }),
        _ => Ok(()),
    }
}
