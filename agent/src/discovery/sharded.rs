//! A map that many read without a lock and one writes, split so that a change copies a small part.
//!
//! One immutable map behind an `ArcSwap` would do, were it not for 100,000 entries copied for each
//! changed pod. With 256 parts a change copies a few hundred.

use std::collections::HashMap;
use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hash};
use std::sync::Arc;

use arc_swap::ArcSwap;

/// The map. Readers see each part as it was before or after an [`Edit`].
#[derive(Debug)]
pub(super) struct Sharded<K, V> {
    hasher: RandomState,
    shards: Box<[ArcSwap<HashMap<K, V>>]>,
}

/// Changes that are not visible before [`Edit::publish`].
pub(super) struct Edit<'a, K, V> {
    map: &'a Sharded<K, V>,
    changed: HashMap<usize, HashMap<K, V>>,
}

impl<K: Hash + Eq + Clone, V: Clone> Sharded<K, V> {
    pub(super) fn new() -> Self {
        let shard = || ArcSwap::from_pointee(HashMap::new());
        Self {
            hasher: RandomState::new(),
            shards: (0..SHARDS).map(|_| shard()).collect(),
        }
    }

    pub(super) fn get(&self, key: &K) -> Option<V> {
        self.shards[self.shard_of(key)].load().get(key).cloned()
    }

    /// Begins changes. Two at a time would lose one's changes: the caller is the only writer.
    pub(super) fn edit(&self) -> Edit<'_, K, V> {
        Edit {
            map: self,
            changed: HashMap::new(),
        }
    }

    /// Everything, for dumps and tidying.
    pub(super) fn values(&self) -> Vec<V> {
        let shards = self.shards.iter().map(ArcSwap::load);
        shards
            .flat_map(|shard| shard.values().cloned().collect::<Vec<_>>())
            .collect()
    }

    fn shard_of(&self, key: &K) -> usize {
        // The remainder is below SHARDS.
        (self.hasher.hash_one(key) % SHARDS as u64) as usize
    }
}

impl<K: Hash + Eq + Clone, V: Clone> Edit<'_, K, V> {
    pub(super) fn get(&self, key: &K) -> Option<V> {
        match self.changed.get(&self.map.shard_of(key)) {
            Some(shard) => shard.get(key).cloned(),
            None => self.map.get(key),
        }
    }

    pub(super) fn insert(&mut self, key: K, value: V) {
        self.shard(&key).insert(key, value);
    }

    pub(super) fn remove(&mut self, key: &K) {
        self.shard(key).remove(key);
    }

    pub(super) fn publish(self) {
        for (index, mut shard) in self.changed {
            shard.shrink_to_fit();
            self.map.shards[index].store(Arc::new(shard));
        }
    }

    fn shard(&mut self, key: &K) -> &mut HashMap<K, V> {
        let index = self.map.shard_of(key);
        let map = self.map;
        self.changed
            .entry(index)
            .or_insert_with(|| HashMap::clone(&map.shards[index].load()))
    }
}

/// With 100,000 entries, a part holds about 400.
const SHARDS: usize = 256;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edits_are_seen_by_themselves_first_and_by_all_once_published() {
        let map = Sharded::new();
        let mut edit = map.edit();
        for key in 0..1000 {
            edit.insert(key, key * 2);
        }
        assert_eq!(edit.get(&7), Some(14));
        assert_eq!(map.get(&7), None);
        edit.publish();
        let mut edit = map.edit();
        edit.remove(&7);
        assert_eq!(edit.get(&7), None);
        assert_eq!(map.get(&7), Some(14));
        edit.publish();
        assert_eq!(map.get(&7), None);
        assert_eq!(map.values().len(), 999);
    }
}
