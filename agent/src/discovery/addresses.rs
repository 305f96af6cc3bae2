//! Who has an address: whoever claims it alone.
//!
//! An address that several claim is nobody's until all but one give it up. It may be used again
//! before the news that the old owner is gone, or it may be a lie: to believe either claimant could
//! send to one what is meant for the other, and in the clear if that one is not meshed.

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

/// Whose an address is.
#[derive(Debug)]
pub(super) enum Owner<V> {
    /// Nobody claims it.
    Nobody,
    /// This one's.
    One(Arc<V>),
    /// Several claim it: nobody's.
    Contested,
}

/// The index, readable without a lock.
#[derive(Debug)]
pub(super) struct AddressIndex<V> {
    /// IPv4 addresses in their mapped form, which takes less room than either kind. None:
    /// contested.
    owners: Sharded<Ipv6Addr, Option<Arc<V>>>,
}

/// Who claims the contested addresses; the writer's own. Nearly always empty.
pub(super) type Contested<V> = HashMap<IpAddr, Vec<Arc<V>>>;

/// Changes to an index, visible when published.
pub(super) struct Claims<'a, V: Claimant> {
    owners: Edit<'a, Ipv6Addr, Option<Arc<V>>>,
    contested: &'a mut Contested<V>,
}

impl<V: Claimant> AddressIndex<V> {
    pub(super) fn new() -> Self {
        Self {
            owners: Sharded::new(),
        }
    }

    pub(super) fn owner(&self, address: IpAddr) -> Owner<V> {
        match self.owners.get(&mapped(address)) {
            None => Owner::Nobody,
            Some((_, Some(owner))) => Owner::One(owner),
            Some((_, None)) => Owner::Contested,
        }
    }

    pub(super) fn edit<'a>(&'a self, contested: &'a mut Contested<V>) -> Claims<'a, V> {
        Claims {
            owners: self.owners.edit(),
            contested,
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
            for address in new.addresses() {
                self.claim(*address, new);
            }
        }
    }

    pub(super) fn publish(self) {
        self.owners.publish();
    }

    fn claim(&mut self, address: IpAddr, new: &Arc<V>) {
        let key = mapped(address);
        match self.owners.get(&key).map(|(_, owner)| owner) {
            Some(Some(other)) if other.id() != new.id() => {
                self.contested.insert(address, vec![other, Arc::clone(new)]);
                self.owners.insert(key, None);
            }
            Some(None) => {
                let claimants = self.contested.entry(address).or_default();
                claimants.retain(|it| it.id() != new.id());
                claimants.push(Arc::clone(new));
            }
            _ => self.owners.insert(key, Some(Arc::clone(new))),
        }
    }

    fn release(&mut self, address: IpAddr, id: &V::Id) {
        let key = mapped(address);
        match self.owners.get(&key).map(|(_, owner)| owner) {
            Some(Some(owner)) if owner.id() == id => self.owners.remove(&key),
            Some(None) => {
                let claimants = self.contested.entry(address).or_default();
                claimants.retain(|it| it.id() != id);
                if let [only] = claimants.as_slice() {
                    self.owners.insert(key, Some(Arc::clone(only)));
                    self.contested.remove(&address);
                }
            }
            _ => {}
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

    struct World(AddressIndex<Pod>, Contested<Pod>);

    impl World {
        fn new() -> Self {
            Self(AddressIndex::new(), Contested::new())
        }

        fn replace(&mut self, old: Option<&Arc<Pod>>, new: Option<&Arc<Pod>>) {
            let mut claims = self.0.edit(&mut self.1);
            claims.replace(old, new);
            claims.publish();
        }

        fn owner(&self, address: IpAddr) -> &'static str {
            match self.0.owner(address) {
                Owner::Nobody => "nobody",
                Owner::One(pod) => pod.0,
                Owner::Contested => "contested",
            }
        }
    }

    #[test]
    fn the_old_owner_that_goes_late_takes_nothing_along() {
        let mut world = World::new();
        let (old, new) = (pod("old", &[A]), pod("new", &[A]));
        world.replace(None, Some(&old));
        world.replace(None, Some(&new));
        assert_eq!(world.owner(A), "contested");
        world.replace(Some(&old), None);
        assert_eq!(world.owner(A), "new");
        world.replace(Some(&new), None);
        assert_eq!(world.owner(A), "nobody");
        assert!(world.1.is_empty());
    }

    #[test]
    fn two_that_swap_end_swapped_in_either_order() {
        for reverse in [false, true] {
            let mut world = World::new();
            let before = [pod("x", &[A]), pod("y", &[B])];
            let after = [pod("x", &[B]), pod("y", &[A])];
            world.replace(None, Some(&before[0]));
            world.replace(None, Some(&before[1]));
            let order = if reverse { [1, 0] } else { [0, 1] };
            for index in order {
                world.replace(Some(&before[index]), Some(&after[index]));
            }
            assert_eq!((world.owner(A), world.owner(B)), ("y", "x"));
            assert!(world.1.is_empty());
        }
    }

    #[test]
    fn a_contested_address_is_nobodys_until_one_is_left() {
        let mut world = World::new();
        let (old, new, third) = (pod("old", &[A]), pod("new", &[A, B]), pod("third", &[A]));
        world.replace(None, Some(&old));
        world.replace(None, Some(&new));
        world.replace(None, Some(&third));
        // A claimant that is told again claims once all the same.
        let again = pod("old", &[A]);
        world.replace(Some(&old), Some(&again));
        assert_eq!((world.owner(A), world.owner(B)), ("contested", "new"));
        world.replace(Some(&third), None);
        assert_eq!(world.owner(A), "contested");
        let moved = pod("new", &[B]);
        world.replace(Some(&new), Some(&moved));
        assert_eq!((world.owner(A), world.owner(B)), ("old", "new"));
        assert!(world.1.is_empty());
    }
}
