//! A map that many read without a lock and one writes, split so that a change copies a small part.
//!
//! One immutable map behind an `ArcSwap` would do, were it not for 100,000 entries copied for each
//! changed pod. With 256 parts a change copies a few hundred.

use std::borrow::Borrow;
use std::collections::HashMap;
use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hash};
use std::sync::Arc;

use arc_swap::ArcSwap;

/// The map. Hashes and equality of borrowed keys must agree, as for any map. Readers see each part as it was before or after an [`Edit`].
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

    /// The key as it was put, and its value.
    pub(super) fn get<Q: Hash + Eq>(&self, key: &Q) -> Option<(K, V)>
    where
        K: Borrow<Q>,
    {
        let shard = self.shards[self.shard_of(key)].load();
        cloned(shard.get_key_value(key))
    }

    /// Begins changes. Two at a time would lose one's changes: the caller is the only writer.
    pub(super) fn edit(&self) -> Edit<'_, K, V> {
        Edit {
            map: self,
            changed: HashMap::new(),
        }
    }

    /// Everything, for dumps and tidying.
    pub(super) fn entries(&self) -> Vec<(K, V)> {
        let mut entries = Vec::new();
        for shard in &self.shards {
            let shard = shard.load();
            entries.extend(
                shard
                    .iter()
                    .map(|(key, value)| (key.clone(), value.clone())),
            );
        }
        entries
    }

    fn shard_of<Q: Hash>(&self, key: &Q) -> usize {
        // The remainder is below SHARDS.
        (self.hasher.hash_one(key) % SHARDS as u64) as usize
    }
}

impl<K: Hash + Eq + Clone, V: Clone> Edit<'_, K, V> {
    pub(super) fn get<Q: Hash + Eq>(&self, key: &Q) -> Option<(K, V)>
    where
        K: Borrow<Q>,
    {
        match self.changed.get(&self.map.shard_of(key)) {
            Some(shard) => cloned(shard.get_key_value(key)),
            None => self.map.get(key),
        }
    }

    /// Replaces the key too, where an equal one is there: it may carry more than what it is compared
    /// by.
    pub(super) fn insert(&mut self, key: K, value: V) {
        let shard = self.shard(&key);
        shard.remove(&key);
        shard.insert(key, value);
    }

    pub(super) fn remove<Q: Hash + Eq>(&mut self, key: &Q)
    where
        K: Borrow<Q>,
    {
        self.shard(key).remove(key);
    }

    pub(super) fn publish(self) {
        for (index, mut shard) in self.changed {
            shard.shrink_to_fit();
            self.map.shards[index].store(Arc::new(shard));
        }
    }

    fn shard<Q: Hash>(&mut self, key: &Q) -> &mut HashMap<K, V> {
        let index = self.map.shard_of(key);
        let map = self.map;
        self.changed
            .entry(index)
            .or_insert_with(|| HashMap::clone(&map.shards[index].load()))
    }
}

fn cloned<K: Clone, V: Clone>(entry: Option<(&K, &V)>) -> Option<(K, V)> {
    entry.map(|(key, value)| (key.clone(), value.clone()))
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
        assert_eq!(edit.get(&7), Some((7, 14)));
        assert_eq!(map.get(&7), None);
        edit.publish();
        let mut edit = map.edit();
        edit.remove(&7);
        assert_eq!(edit.get(&7), None);
        assert_eq!(map.get(&7), Some((7, 14)));
        edit.publish();
        assert_eq!(map.get(&7), None);
        assert_eq!(map.entries().len(), 999);
    }
}
