//! What several objects claim: addresses, and UIDs of static pods. Agents are told all claims on addresses, and take one
//! that has more than one for nobody's; here they are found to be reported.

use std::collections::{BTreeSet, HashMap};
use std::hash::Hash;
use std::net::IpAddr;

use weft_core::ObjectName;

/// Claims by objects of one kind.
#[derive(Debug)]
pub(super) struct Claims<T = IpAddr> {
    claimants: HashMap<T, BTreeSet<ObjectName>>,
}

impl<T> Default for Claims<T> {
    fn default() -> Self {
        Self {
            claimants: HashMap::new(),
        }
    }
}

impl<T: Clone + Eq + Hash> Claims<T> {
    /// Replaces an object's claims. Returns all whose conflicts this may have changed.
    pub(super) fn replace(
        &mut self,
        name: &ObjectName,
        before: &[T],
        now: &[T],
    ) -> BTreeSet<ObjectName> {
        let mut affected = BTreeSet::new();
        for address in before.iter().filter(|it| !now.contains(it)) {
            if let Some(claimants) = self.claimants.get_mut(address) {
                claimants.remove(name);
                affected.extend(some(claimants));
                if claimants.is_empty() {
                    self.claimants.remove(address);
                }
            }
        }
        for address in now.iter().filter(|it| !before.contains(it)) {
            let claimants = self.claimants.entry(address.clone()).or_default();
            affected.extend(some(claimants));
            claimants.insert(name.clone());
        }
        affected
    }

    /// Somebody else who claims it; of several, the first by name.
    pub(super) fn other(&self, address: &T, name: &ObjectName) -> Option<&ObjectName> {
        let claimants = self.claimants.get(address)?;
        claimants.iter().find(|it| *it != name)
    }
}

/// Those whose problems are told anew when another comes or goes. Not all, where a mistake or an
/// attack makes thousands: they are in conflict before and after.
fn some(claimants: &BTreeSet<ObjectName>) -> impl Iterator<Item = ObjectName> {
    claimants.iter().take(16).cloned()
}
