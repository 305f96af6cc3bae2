//! How far that goes which the agent was told, as controllers say it: versions of kinds of objects, which mean something to
//! controllers only. It is shown to the next one, so that it tells nothing that is older.

use std::collections::HashMap;

/// Up to which version of each kind something was told at most.
#[derive(Debug, Default)]
pub(super) struct Position {
    /// Of all that is held.
    held: HashMap<String, u64>,
    /// As the controller of this stream last said it.
    said: HashMap<String, u64>,
    /// Whether all that is held is what that controller says.
    whole: bool,
}

/// More kinds than there are. What is more, or has longer names, is none of a controller's.
const MAX_KINDS: usize = 128;
/// A kind with its API group, in bytes.
const MAX_NAME_BYTES: usize = 320;

impl Position {
    /// A stream begins: what is to be shown.
    pub(super) fn begin(&mut self) -> HashMap<String, u64> {
        self.said.clear();
        self.whole = false;
        self.held.clone()
    }

    /// A push goes so far, and, of kinds that are not named, as far as before. With one that is complete, everything is
    /// held.
    pub(super) fn told(&mut self, position: HashMap<String, u64>, complete: bool) {
        let is_named = !position.is_empty();
        for (kind, version) in position {
            let has_room = self.said.len() < MAX_KINDS || self.said.contains_key(&kind);
            if has_room && kind.len() <= MAX_NAME_BYTES {
                self.said.insert(kind, version);
            }
        }
        if complete {
            self.whole = true;
        } else if !is_named {
            return;
        }
        if self.whole {
            // Less than before, perhaps: then the cluster has gone back. Nothing at all, where nobody counts.
            self.held.clone_from(&self.said);
            return;
        }
        for (kind, version) in &self.said {
            let held = self.held.entry(kind.clone()).or_default();
            *held = (*version).max(*held);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(versions: &[(&str, u64)]) -> HashMap<String, u64> {
        let versions = versions.iter();
        versions
            .map(|(kind, it)| ((*kind).to_owned(), *it))
            .collect()
    }

    #[test]
    fn a_part_of_a_newer_state_counts_and_a_whole_one_alone() {
        let mut position = Position::default();
        for (said, complete, held) in [
            (
                &[("Pod", 7), ("Node", 3)][..],
                false,
                &[("Pod", 7), ("Node", 3)][..],
            ),
            (&[], true, &[("Pod", 7), ("Node", 3)]),
            (
                &[("Pod", 8), ("Node", 3)],
                false,
                &[("Pod", 8), ("Node", 3)],
            ),
            (&[], false, &[("Pod", 8), ("Node", 3)]),
        ] {
            position.told(of(said), complete);
            assert_eq!(position.held, of(held));
        }
        // Another controller: until it has told everything, a part of what is held is the first one's.
        assert_eq!(position.begin(), of(&[("Pod", 8), ("Node", 3)]));
        for (said, complete, held) in [
            (&[("Pod", 5)][..], false, &[("Pod", 8), ("Node", 3)][..]),
            (&[("Pod", 9)], false, &[("Pod", 9), ("Node", 3)]),
            (&[("Pod", 6)], true, &[("Pod", 6)]),
        ] {
            position.told(of(said), complete);
            assert_eq!(position.held, of(held));
        }
        // One that does not count.
        position.begin();
        position.told(of(&[]), false);
        assert_eq!(position.held, of(&[("Pod", 6)]));
        position.told(of(&[]), true);
        assert_eq!(position.held, of(&[]));
    }

    #[test]
    fn what_no_controller_says_is_not_kept() {
        let mut position = Position::default();
        position.told(of(&[("x".repeat(MAX_NAME_BYTES + 1).as_str(), 1)]), true);
        assert_eq!(position.held, of(&[]));
        for number in 0..2 * MAX_KINDS {
            position.told(of(&[(number.to_string().as_str(), 1)]), true);
        }
        assert_eq!(position.held.len(), MAX_KINDS);
        position.told(of(&[("0", 2)]), false);
        assert_eq!(position.held["0"], 2);
    }
}
