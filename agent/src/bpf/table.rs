//! A kernel map by its pin, with the types of its keys and values. Not aya's maps: those want
//! exclusive access for writing, and the kernel needs none.

#![allow(unsafe_code)]

use std::{
    collections::HashSet,
    io,
    marker::PhantomData,
    mem::{size_of, zeroed},
    os::fd::{AsFd, OwnedFd},
    path::Path,
    slice,
};

use super::{error::BpfError, sys};

/// A map with fixed-size keys and values.
#[derive(Debug)]
pub(crate) struct Table<K, V> {
    name: &'static str,
    map: OwnedFd,
    info: sys::MapInfo,
    types: PhantomData<fn(K) -> V>,
}

impl<K: aya::Pod, V: aya::Pod> Table<K, V> {
    /// Opens the pin of that name and checks that its sizes are those of the types.
    pub(crate) fn open(folder: &Path, name: &'static str) -> Result<Self, BpfError> {
        let path = folder.join(name);
        let map = sys::open_pin(&path).map_err(|source| BpfError::Pin {
            path: path.clone(),
            source,
        })?;
        let info =
            sys::map_info(map.as_fd()).map_err(|source| BpfError::Map { map: name, source })?;
        // A per-CPU map's values are as many as there are CPUs; its size is that of one.
        if info.key_size as usize != size_of::<K>() || info.value_size as usize != size_of::<V>() {
            return Err(BpfError::Layout { path });
        }
        Ok(Self {
            name,
            map,
            info,
            types: PhantomData,
        })
    }

    /// The map's id in the kernel.
    pub(crate) fn id(&self) -> u32 {
        self.info.id
    }

    /// Its name.
    pub(crate) fn name(&self) -> &'static str {
        self.name
    }

    /// How many entries it can hold.
    pub(crate) fn capacity(&self) -> u32 {
        self.info.max_entries
    }

    /// Sets or replaces.
    pub(crate) fn set(&self, key: &K, value: &V) -> Result<(), BpfError> {
        self.named(sys::map_update(self.map.as_fd(), key, value, ANY))
    }

    /// Sets unless there is one; false if there was.
    pub(crate) fn set_new(&self, key: &K, value: &V) -> Result<bool, BpfError> {
        match sys::map_update(self.map.as_fd(), key, value, NO_EXIST) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
            Err(error) => self.named(Err(error)),
        }
    }

    /// The value of a key.
    pub(crate) fn value(&self, key: &K) -> Result<Option<V>, BpfError> {
        // SAFETY: `Pod`: any bits are a value.
        let mut value: V = unsafe { zeroed() };
        let found = self.named(sys::map_lookup(self.map.as_fd(), key, &mut value))?;
        Ok(found.then_some(value))
    }

    /// The values of a key of a per-CPU map of 8-byte values.
    pub(crate) fn values_per_cpu(&self, key: &K, cpus: usize) -> Result<Vec<u64>, BpfError> {
        let mut values = vec![0u64; cpus];
        self.named(sys::map_lookup(
            self.map.as_fd(),
            key,
            values.as_mut_slice(),
        ))?;
        Ok(values)
    }

    /// Removes; false if there was none.
    pub(crate) fn remove(&self, key: &K) -> Result<bool, BpfError> {
        self.named(sys::map_delete(self.map.as_fd(), key))
    }

    /// The keys of a hash map, each once. What changes meanwhile may be missing.
    pub(crate) fn keys(&self) -> Result<Vec<K>, BpfError> {
        let mut keys = Vec::new();
        let mut seen = HashSet::new();
        let mut previous = None;
        // The walk starts over when a key vanishes under it, in a map that changes all the time for
        // ever.
        for _ in 0..2 * u64::from(self.info.max_entries) {
            // SAFETY: `Pod`: any bits are a value.
            let mut next: K = unsafe { zeroed() };
            if !self.named(sys::map_next_key(
                self.map.as_fd(),
                previous.as_ref(),
                &mut next,
            ))? {
                break;
            }
            if seen.insert(Box::<[u8]>::from(bytes(&next))) {
                keys.push(next);
            }
            previous = Some(next);
        }
        Ok(keys)
    }

    /// How many entries there are.
    pub(crate) fn entries(&self) -> Result<usize, BpfError> {
        match sys::map_count(self.map.as_fd(), &self.info) {
            Ok(count) => Ok(count),
            // Not every kind of map, and not for buckets of thousands.
            Err(_) => Ok(self.keys()?.len()),
        }
    }

    fn named<T>(&self, result: io::Result<T>) -> Result<T, BpfError> {
        result.map_err(|source| BpfError::Map {
            map: self.name,
            source,
        })
    }
}

fn bytes<K: aya::Pod>(key: &K) -> &[u8] {
    // SAFETY: keys of maps have no padding but what their types name, so all bytes are set; the
    // result lives as long as the key.
    unsafe { slice::from_raw_parts((&raw const *key).cast(), size_of::<K>()) }
}

const ANY: u64 = 0;
const NO_EXIST: u64 = 1;
