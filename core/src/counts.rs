//! How many there are of each.

use std::collections::HashMap;
use std::hash::Hash;

/// Counts by key. What there is none of is not kept.
#[derive(Debug)]
pub struct Counts<K>(HashMap<K, usize>);

impl<K> Default for Counts<K> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<K: Hash + Eq> Counts<K> {
    /// One more.
    pub fn add(&mut self, key: K) {
        *self.0.entry(key).or_default() += 1;
    }

    /// One less. Returns whether there was one.
    pub fn remove(&mut self, key: &K) -> bool {
        let Some(count) = self.0.get_mut(key) else {
            return false;
        };
        *count -= 1;
        if *count == 0 {
            self.0.remove(key);
        }
        true
    }

    /// How many there are.
    pub fn of(&self, key: &K) -> usize {
        self.0.get(key).copied().unwrap_or_default()
    }

    /// Whether there is none of anything.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Those of which there are some.
    pub fn keys(&self) -> impl Iterator<Item = &K> {
        self.0.keys()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_there_is_none_of_is_not_kept() {
        let mut counts = Counts::default();
        counts.add("a");
        counts.add("a");
        assert_eq!((counts.of(&"a"), counts.of(&"b")), (2, 0));
        assert!(counts.remove(&"a") && counts.of(&"a") == 1);
        assert_eq!(counts.keys().collect::<Vec<_>>(), [&"a"]);
        assert!(counts.remove(&"a") && !counts.remove(&"a"));
        assert!(counts.is_empty());
    }
}
