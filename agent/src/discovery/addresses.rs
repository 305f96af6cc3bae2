//! Who has an address: an index in which the newest claim wins.
//!
//! Addresses are reused. News of the new owner may come before the news that the old one is gone,
//! and the late news must not take the address away from the new owner. Nor may an address get lost
//! when the newer of two claimants leaves: it falls back to the older claim.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

use super::sharded::{Edit, Sharded};

/// What has addresses.
pub(super) trait Claimant {
    /// Names it.
    type Id: Clone + Eq + Hash;

    fn id(&self) -> &Self::Id;

    fn addresses(&self) -> &[IpAddr];
}

/// The index, readable without a lock.
#[derive(Debug)]
pub(super) struct AddressIndex<V> {
    /// IPv4 addresses in their mapped form, which takes less room than either kind.
    owners: Sharded<Ipv6Addr, Arc<V>>,
}

/// Claims that lost against a newer one, oldest first; the writer's own. Nearly always empty.
pub(super) type Losers<V> = HashMap<IpAddr, Vec<Arc<V>>>;

/// Changes to an index, visible when published.
pub(super) struct Claims<'a, V: Claimant> {
    owners: Edit<'a, Ipv6Addr, Arc<V>>,
    losers: &'a mut Losers<V>,
}

impl<V: Claimant> AddressIndex<V> {
    pub(super) fn new() -> Self {
        Self {
            owners: Sharded::new(),
        }
    }

    pub(super) fn owner(&self, address: IpAddr) -> Option<Arc<V>> {
        self.owners.get(&mapped(address)).map(|(_, owner)| owner)
    }

    pub(super) fn edit<'a>(&'a self, losers: &'a mut Losers<V>) -> Claims<'a, V> {
        Claims {
            owners: self.owners.edit(),
            losers,
        }
    }
}

impl<V: Claimant> Claims<'_, V> {
    /// Takes back all claims of `old` and makes those of `new`, which has the same name.
    pub(super) fn replace(&mut self, old: Option<&Arc<V>>, new: Option<&Arc<V>>) {
        let kept = |address: &IpAddr| new.is_some_and(|it| it.addresses().contains(address));
        if let Some(old) = old {
            for address in old.addresses().iter().filter(|it| !kept(it)) {
                self.release(*address, old.id());
            }
        }
        if let Some(new) = new {
            // An address that it had and lost to a newer claim stays with that claim, unless the
            // address is claimed anew.
            let had = |address: &IpAddr| old.is_some_and(|it| it.addresses().contains(address));
            for address in new.addresses() {
                self.claim(*address, new, had(address));
            }
        }
    }

    pub(super) fn publish(self) {
        self.owners.publish();
    }

    fn owner(&self, address: IpAddr) -> Option<Arc<V>> {
        self.owners.get(&mapped(address)).map(|(_, owner)| owner)
    }

    fn claim(&mut self, address: IpAddr, new: &Arc<V>, had: bool) {
        let other = self.owner(address).filter(|it| it.id() != new.id());
        if let Some(other) = other {
            let losers = self.losers.entry(address).or_default();
            if had && let Some(lost) = losers.iter_mut().find(|it| it.id() == new.id()) {
                *lost = Arc::clone(new);
                return;
            }
            losers.retain(|it| it.id() != new.id());
            losers.push(other);
        }
        self.owners.insert(mapped(address), Arc::clone(new));
    }

    fn release(&mut self, address: IpAddr, id: &V::Id) {
        let mut fallback = None;
        let owns = self.owner(address).is_some_and(|it| it.id() == id);
        if let Some(losers) = self.losers.get_mut(&address) {
            losers.retain(|it| it.id() != id);
            if owns {
                fallback = losers.pop();
            }
            if losers.is_empty() {
                self.losers.remove(&address);
            }
        }
        match fallback {
            _ if !owns => {}
            Some(older) => self.owners.insert(mapped(address), older),
            None => self.owners.remove(&mapped(address)),
        }
    }
}

fn mapped(address: IpAddr) -> Ipv6Addr {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped(),
        IpAddr::V6(address) => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Pod(&'static str, Vec<IpAddr>);

    impl Claimant for Pod {
        type Id = &'static str;

        fn id(&self) -> &&'static str {
            &self.0
        }

        fn addresses(&self) -> &[IpAddr] {
            &self.1
        }
    }

    const A: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1));
    const B: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 2));

    fn pod(name: &'static str, addresses: &[IpAddr]) -> Arc<Pod> {
        Arc::new(Pod(name, addresses.to_vec()))
    }

    struct World(AddressIndex<Pod>, Losers<Pod>);

    impl World {
        fn replace(&mut self, old: Option<&Arc<Pod>>, new: Option<&Arc<Pod>>) {
            let mut claims = self.0.edit(&mut self.1);
            claims.replace(old, new);
            claims.publish();
        }

        fn owner(&self, address: IpAddr) -> Option<&'static str> {
            self.0.owner(address).map(|pod| pod.0)
        }
    }

    #[test]
    fn the_old_owner_that_goes_late_takes_nothing_along() {
        let mut world = World(AddressIndex::new(), Losers::new());
        let (old, new) = (pod("old", &[A]), pod("new", &[A]));
        world.replace(None, Some(&old));
        world.replace(None, Some(&new));
        assert_eq!(world.owner(A), Some("new"));
        world.replace(Some(&old), None);
        assert_eq!(world.owner(A), Some("new"));
        world.replace(Some(&new), None);
        assert_eq!(world.owner(A), None);
        assert!(world.1.is_empty());
    }

    #[test]
    fn two_that_swap_end_swapped_in_either_order() {
        for reverse in [false, true] {
            let mut world = World(AddressIndex::new(), Losers::new());
            let before = [pod("x", &[A]), pod("y", &[B])];
            let after = [pod("x", &[B]), pod("y", &[A])];
            world.replace(None, Some(&before[0]));
            world.replace(None, Some(&before[1]));
            let order = if reverse { [1, 0] } else { [0, 1] };
            for index in order {
                world.replace(Some(&before[index]), Some(&after[index]));
            }
            assert_eq!((world.owner(A), world.owner(B)), (Some("y"), Some("x")));
            assert!(world.1.is_empty());
        }
    }

    #[test]
    fn an_address_falls_back_to_the_older_claim() {
        let mut world = World(AddressIndex::new(), Losers::new());
        let (old, new) = (pod("old", &[A]), pod("new", &[A, B]));
        world.replace(None, Some(&old));
        world.replace(None, Some(&new));
        // The loser is told again, unchanged in this address: the newer claim stands.
        let again = pod("old", &[A]);
        world.replace(Some(&old), Some(&again));
        assert_eq!(world.owner(A), Some("new"));
        let moved = pod("new", &[B]);
        world.replace(Some(&new), Some(&moved));
        assert_eq!((world.owner(A), world.owner(B)), (Some("old"), Some("new")));
        assert!(world.1.is_empty());
    }
}
