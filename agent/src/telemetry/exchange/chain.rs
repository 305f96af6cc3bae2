//! A short list of counters by key that only grows: found without a lock, made when first needed.

use std::sync::OnceLock;

/// The list.
#[derive(Debug)]
pub(super) struct Chain<K, V>(OnceLock<Box<Link<K, V>>>);

#[derive(Debug)]
struct Link<K, V> {
    key: K,
    value: V,
    next: Chain<K, V>,
}

impl<K: Copy + Eq, V> Chain<K, V> {
    /// The value of a key; none if there are as many others as there may be.
    pub(super) fn find(&self, key: K, most: usize, make: impl Fn() -> V) -> Option<&V> {
        let mut chain = self;
        for _ in 0..most {
            let link = chain.0.get_or_init(|| {
                Box::new(Link {
                    key,
                    value: make(),
                    next: Chain::default(),
                })
            });
            if link.key == key {
                return Some(&link.value);
            }
            chain = &link.next;
        }
        None
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (K, &V)> {
        let mut chain = self;
        std::iter::from_fn(move || {
            let link = chain.0.get()?;
            chain = &link.next;
            Some((link.key, &link.value))
        })
    }
}

impl<K, V> Default for Chain<K, V> {
    fn default() -> Self {
        Self(OnceLock::new())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    #[test]
    fn keys_that_many_add_at_once_are_there_once_and_not_too_many() {
        let chain: Chain<u64, AtomicU64> = Chain::default();
        std::thread::scope(|scope| {
            for start in 0..4 {
                let chain = &chain;
                scope.spawn(move || {
                    for number in 0..10_000_u64 {
                        let key = (number + start) % 7;
                        let value = chain.find(key, 5, AtomicU64::default);
                        if let Some(value) = value {
                            value.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                });
            }
        });
        let mut keys: Vec<u64> = chain.iter().map(|(key, _)| key).collect();
        keys.sort_unstable();
        keys.dedup();
        assert_eq!((keys.len(), chain.iter().count()), (5, 5));
        for (key, count) in chain.iter() {
            let count = count.load(Ordering::Relaxed);
            assert!((5_712..=5_716).contains(&count), "{key}: {count}");
        }
    }
}
