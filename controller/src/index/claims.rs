//! Who an address belongs to where several objects claim it.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use weft_core::ObjectName;

use super::pods::Created;

/// Claims on addresses by objects of one kind.
#[derive(Debug)]
pub(super) struct Claims {
    prefer: Prefer,
    claimants: HashMap<IpAddr, BTreeMap<ObjectName, Option<Created>>>,
}

/// Whose claim counts. Where ages are unknown or equal the last name in order counts as the
/// newest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Prefer {
    /// That of the newest: pods, whose addresses are used again.
    Newest,
    /// That of the oldest: Services, of which a newer one must not take over clients.
    Oldest,
}

impl Claims {
    /// No claims yet.
    pub(super) fn new(prefer: Prefer) -> Self {
        Self {
            prefer,
            claimants: HashMap::new(),
        }
    }

    /// Replaces an object's claims. Returns all whose addresses this may have changed.
    pub(super) fn replace(
        &mut self,
        name: &ObjectName,
        before: &[IpAddr],
        now: &[IpAddr],
        created: Option<&Created>,
    ) -> BTreeSet<ObjectName> {
        let mut affected = BTreeSet::new();
        for address in before.iter().filter(|it| !now.contains(it)) {
            if let Some(claimants) = self.claimants.get_mut(address) {
                claimants.remove(name);
                affected.extend(claimants.keys().cloned());
                if claimants.is_empty() {
                    self.claimants.remove(address);
                }
            }
        }
        for address in now {
            let claimants = self.claimants.entry(*address).or_default();
            claimants.insert(name.clone(), created.cloned());
            affected.extend(claimants.keys().cloned());
        }
        affected
    }

    /// Whose the address is.
    pub(super) fn owner(&self, address: IpAddr) -> Option<&ObjectName> {
        let claimants = self.claimants.get(&address)?.iter();
        let by_age = |one: &(&ObjectName, &Option<Created>),
                      other: &(&ObjectName, &Option<Created>)|
         -> Ordering { (one.1, one.0).cmp(&(other.1, other.0)) };
        let owner = match self.prefer {
            Prefer::Newest => claimants.max_by(by_age),
            Prefer::Oldest => claimants.min_by(by_age),
        };
        owner.map(|(name, _)| name)
    }
}
