//! What connected agents reject, by resource rather than by agent: for what is said on the objects that a resource is made
//! of. Who tells it names a few nodes and says whether there are more, so that the same mistake at a thousand nodes is
//! told once, and not a thousand times.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use tokio::time::Instant;
use weft_core::Name;
use weft_proto::Key;

/// All of it.
#[derive(Debug, Default)]
pub(super) struct Rejections {
    resources: BTreeMap<Key, ByNode>,
    of_node: HashMap<Name, BTreeSet<Key>>,
    /// Of which it is not told yet that it changed.
    changed: BTreeSet<Key>,
    /// What was told of those that are rejected, and when.
    told: BTreeMap<Key, (String, Instant)>,
    /// Nodes of which something was left out as there was no room.
    waiting: BTreeSet<Name>,
}

#[derive(Debug, Default)]
struct ByNode {
    reasons: BTreeMap<Name, String>,
    /// The nodes that are named.
    named: Vec<Name>,
}

/// What changed: of a resource, who rejects it and why; none: nobody does.
pub(crate) type Changed = Vec<(Key, Option<String>)>;

/// Nodes that are named.
const MOST_NAMED: usize = 3;
/// Resources that are told of. Where more are rejected, the first ones say what is wrong.
const MOST_RESOURCES: usize = 1000;
/// The same of one node: whatever an agent says, there is room for what others say.
const MOST_OF_NODE: usize = 100;
/// Of a resource that is rejected now as before, another text is told no sooner than after this.
const SAME: Duration = Duration::from_secs(60);

impl Rejections {
    /// Takes in what agents of a node reject now, in place of what they did before. True: something is to be told.
    pub(super) fn set(&mut self, node: &Name, now: BTreeMap<&Key, &String>) -> bool {
        let before = self.of_node.remove(node).unwrap_or_default();
        for key in before.iter().filter(|it| !now.contains_key(it)) {
            let Some(by_node) = self.resources.get_mut(key) else {
                continue;
            };
            by_node.reasons.remove(node);
            if by_node.reasons.is_empty() {
                self.resources.remove(key);
            }
            self.changed.insert(key.clone());
        }
        let mut of_node = BTreeSet::new();
        self.waiting.remove(node);
        // What was told of stays, wherever it stands among the others.
        let (known, new): (Vec<_>, Vec<_>) =
            now.into_iter().partition(|(key, _)| before.contains(key));
        for (key, reason) in known.into_iter().chain(new) {
            if of_node.len() >= MOST_OF_NODE {
                break;
            }
            if !self.has_room() && !self.resources.contains_key(key) {
                self.waiting.insert(node.clone());
                continue;
            }
            let by_node = self.resources.entry(key.clone()).or_default();
            let said = by_node.reasons.insert(node.clone(), reason.clone());
            if said.as_ref() != Some(reason) {
                self.changed.insert(key.clone());
            }
            of_node.insert(key.clone());
        }
        if !of_node.is_empty() {
            self.of_node.insert(node.clone(), of_node);
        }
        !self.changed.is_empty()
    }

    fn has_room(&self) -> bool {
        self.resources.len() < MOST_RESOURCES
    }

    /// Nodes of which something was left out, once there is room for it.
    pub(super) fn now_in_turn(&self) -> Vec<Name> {
        match self.has_room() {
            true => self.waiting.iter().cloned().collect(),
            false => vec![],
        }
    }

    /// What changed since this was asked before, without what is not to be told yet.
    pub(super) fn take(&mut self, now: Instant) -> Changed {
        let mut changes = vec![];
        for key in std::mem::take(&mut self.changed) {
            let Some(text) = self.resources.get_mut(&key).map(ByNode::told) else {
                if self.told.remove(&key).is_some() {
                    changes.push((key, None));
                }
                continue;
            };
            match self.told.get(&key) {
                Some((before, _)) if *before == text => {}
                Some((_, when)) if now < *when + SAME => drop(self.changed.insert(key)),
                _ => {
                    self.told.insert(key.clone(), (text.clone(), now));
                    changes.push((key, Some(text)));
                }
            }
        }
        changes
    }

    /// When the first of those may be told that were not to be yet.
    pub(super) fn due(&self) -> Option<Instant> {
        let when = |key: &Key| self.told.get(key).map(|(_, when)| *when + SAME);
        self.changed.iter().filter_map(when).min()
    }
}

impl ByNode {
    /// Who rejects it, and why: what the first one of those who are named says.
    fn told(&mut self) -> String {
        let Self { reasons, named } = self;
        // Who was named stays, for it not to be said anew whenever somebody joins in.
        named.retain(|it| reasons.contains_key(it));
        for node in reasons.keys() {
            if named.len() < MOST_NAMED && !named.contains(node) {
                named.push(node.clone());
            }
        }
        let reason = named.first().and_then(|it| reasons.get(it));
        let nodes: Vec<&str> = named.iter().map(Name::as_str).collect();
        let more = match reasons.len() > named.len() {
            true => " and others",
            false => "",
        };
        let reason = reason.map_or("", String::as_str);
        format!(
            "rejected by the agents of {}{more}: {reason}",
            nodes.join(", ")
        )
    }
}

#[cfg(test)]
mod tests {
    use weft_proto::Kind;

    use super::*;

    fn key(number: usize) -> Key {
        Key {
            kind: Kind::Server,
            name: format!("policy.weft.dev/shop/s{number}"),
        }
    }

    fn set(rejections: &mut Rejections, node: &str, keys: &[usize]) -> bool {
        set_by(rejections, node, keys, "strange")
    }

    fn set_by(rejections: &mut Rejections, node: &str, keys: &[usize], reason: &str) -> bool {
        let keys: Vec<Key> = keys.iter().map(|it| key(*it)).collect();
        let reason = reason.to_owned();
        let now = keys.iter().map(|it| (it, &reason)).collect();
        rejections.set(&node.parse().expect("valid"), now)
    }

    fn told(rejections: &mut Rejections) -> Vec<Option<String>> {
        // Long after whatever was told before.
        let last = rejections.told.values().map(|(_, when)| *when).max();
        let now = last.map_or_else(Instant::now, |it| it + SAME);
        let changed = rejections.take(now).into_iter();
        changed.map(|(_, text)| text).collect()
    }

    #[test]
    fn the_same_mistake_is_told_once_of_many_nodes() {
        let mut rejections = Rejections::default();
        let by = |nodes: &str| Some(format!("rejected by the agents of {nodes}: strange"));
        assert!(set(&mut rejections, "d", &[1]));
        assert_eq!(told(&mut rejections), [by("d")]);
        assert!(!set(&mut rejections, "d", &[1]), "it is known");
        for node in ["c", "b"] {
            set(&mut rejections, node, &[1]);
        }
        assert_eq!(told(&mut rejections), [by("d, b, c")]);
        set(&mut rejections, "a", &[1]);
        assert_eq!(told(&mut rejections), [by("d, b, c and others")]);
        set(&mut rejections, "e", &[1]);
        assert_eq!(told(&mut rejections), [], "it is said already");
        set(&mut rejections, "b", &[2]);
        assert_eq!(told(&mut rejections), [by("d, c, a and others"), by("b")]);
        for node in ["a", "b", "c", "d", "e"] {
            set(&mut rejections, node, &[]);
        }
        assert_eq!(told(&mut rejections), [None, None]);
        assert!(rejections.resources.is_empty() && rejections.of_node.is_empty());
    }

    #[test]
    fn what_is_told_has_an_end() {
        let mut rejections = Rejections::default();
        let many: Vec<usize> = (0..2 * MOST_RESOURCES).collect();
        set(&mut rejections, "a", &many);
        assert_eq!(told(&mut rejections).len(), MOST_OF_NODE);
        // There is room for what others say, until there is none for anybody.
        let nodes: Vec<String> = (0..11).map(|it| format!("n{it:02}")).collect();
        for (index, node) in nodes.iter().enumerate() {
            let first = 10_000 + MOST_OF_NODE * index;
            let keys: Vec<usize> = (first..first + 2 * MOST_OF_NODE).collect();
            set(&mut rejections, node, &keys);
        }
        assert_eq!(told(&mut rejections).len(), MOST_RESOURCES - MOST_OF_NODE);
        assert!(rejections.now_in_turn().is_empty());
        set(&mut rejections, "a", &[]);
        assert_eq!(
            rejections.now_in_turn().last().map(Name::as_str),
            Some("n10")
        );
        set(&mut rejections, "n10", &[7]);
        assert_eq!(told(&mut rejections).len(), MOST_OF_NODE + 1);
        for node in &nodes {
            set(&mut rejections, node, &[]);
        }
        told(&mut rejections);
        assert!(rejections.resources.is_empty() && rejections.told.is_empty());
        assert!(rejections.waiting.is_empty());
    }

    #[test]
    fn who_says_something_else_all_the_time_is_told_once_a_minute() {
        let mut rejections = Rejections::default();
        let now = Instant::now();
        set_by(&mut rejections, "a", &[1], "one");
        assert_eq!(rejections.take(now).len(), 1);
        set_by(&mut rejections, "a", &[1], "two");
        assert_eq!(rejections.take(now + SAME / 2), []);
        assert_eq!(rejections.due(), Some(now + SAME));
        // What is rejected now, or no more, is told at once.
        set_by(&mut rejections, "a", &[1, 2], "three");
        assert_eq!(rejections.take(now + SAME / 2).len(), 1);
        let late = rejections.take(now + SAME);
        assert!(late[0].1.as_ref().is_some_and(|it| it.ends_with("three")));
        assert_eq!(rejections.due(), None);
        set_by(&mut rejections, "a", &[2], "three");
        assert_eq!(rejections.take(now + SAME), [(key(1), None)]);
    }
}
