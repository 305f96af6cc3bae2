//! Which addresses several objects claim. Agents are told all claims, and take an address that has
//! more than one for nobody's; here they are found to be reported.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

use weft_core::ObjectName;

/// Claims on addresses by objects of one kind.
#[derive(Debug, Default)]
pub(super) struct Claims {
    claimants: HashMap<IpAddr, BTreeSet<ObjectName>>,
}

impl Claims {
    /// Replaces an object's claims. Returns all whose conflicts this may have changed.
    pub(super) fn replace(
        &mut self,
        name: &ObjectName,
        before: &[IpAddr],
        now: &[IpAddr],
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
            let claimants = self.claimants.entry(*address).or_default();
            affected.extend(some(claimants));
            claimants.insert(name.clone());
        }
        affected
    }

    /// Somebody else who claims the address; of several, the first by name.
    pub(super) fn other(&self, address: IpAddr, name: &ObjectName) -> Option<&ObjectName> {
        let claimants = self.claimants.get(&address)?;
        claimants.iter().find(|it| *it != name)
    }
}

/// Those whose problems are told anew when another comes or goes. Not all, where a mistake or an
/// attack makes thousands: they are in conflict before and after.
fn some(claimants: &BTreeSet<ObjectName>) -> impl Iterator<Item = ObjectName> {
    claimants.iter().take(16).cloned()
}
