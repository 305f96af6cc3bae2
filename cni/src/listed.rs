//! The namespaces that may hold meshed pods: a list that the agent keeps on disk, for when there is no agent.
//!
//! It outlives agents and restarts of the node. Where there is none, no agent of this node ever knew the cluster, or the
//! mesh was taken away from the node. A list that cannot be read counts as one of all namespaces.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, ErrorKind};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::files;

/// The list.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listed {
    /// The version of its form.
    version: u32,
    /// The namespaces.
    pub namespaces: BTreeSet<String>,
    /// Of these, the ones that do not hold meshed pods any more, and since when: seconds since 1970.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    left: BTreeMap<String, u64>,
}

/// A list that is there and cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {reason}")]
pub struct Unreadable {
    path: String,
    reason: String,
    /// It was read, and is no list.
    pub is_damaged: bool,
}

impl Listed {
    /// A list of these.
    pub fn of(namespaces: impl IntoIterator<Item = String>) -> Self {
        Self {
            version: VERSION,
            namespaces: namespaces.into_iter().collect(),
            left: BTreeMap::new(),
        }
    }

    /// The list after this one, when these namespaces may hold meshed pods: all others that were on it stay for a while.
    /// A pod that opts in itself, and is made anew now and then, is in none of them in between.
    #[must_use]
    pub fn next(
        &self,
        namespaces: impl IntoIterator<Item = String>,
        now: SystemTime,
        stay: Duration,
    ) -> Self {
        let mut next = Self::of(namespaces);
        let now = seconds(now);
        let gone = self.namespaces.difference(&next.namespaces);
        // That was later than now where a clock is wrong, as when a node starts, and may be right again soon.
        let since = |name: &String| self.left.get(name).copied().unwrap_or(now);
        let left = gone.map(|name| (since(name), name.clone()));
        let mut left: Vec<_> = left
            .filter(|(since, _)| now.saturating_sub(*since) < stay.as_secs())
            .collect();
        left.sort_unstable();
        let left = left.into_iter().rev().take(MAX_LEFT);
        next.left = left.map(|(since, name)| (name, since)).collect();
        next.namespaces.extend(next.left.keys().cloned());
        next
    }

    /// How many of them have left, and stay for a while.
    #[must_use]
    pub fn left(&self) -> usize {
        self.left.len()
    }

    /// How long the first of those that stay for a while still does.
    #[must_use]
    pub fn until_next(&self, now: SystemTime, stay: Duration) -> Option<Duration> {
        let first = self.left.values().min()?;
        let end = first.saturating_add(stay.as_secs());
        let left = Duration::from_secs(end.saturating_sub(seconds(now)));
        Some(left.min(stay))
    }

    /// Reads it. None: there is no list.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn read(path: &Path) -> Result<Option<Self>, Unreadable> {
        let unreadable = |reason: String, is_damaged| Unreadable {
            path: path.display().to_string(),
            reason,
            is_damaged,
        };
        let text = match fs::read(path) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(unreadable(error.to_string(), false)),
        };
        let listed: Self =
            serde_json::from_slice(&text).map_err(|error| unreadable(error.to_string(), true))?;
        if listed.version != VERSION {
            let reason = format!("its form is {}, not {VERSION}", listed.version);
            return Err(unreadable(reason, true));
        }
        Ok(Some(listed))
    }

    /// Writes it in one step.
    ///
    /// # Errors
    /// What the system says; the list is as it was.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        let mut text = serde_json::to_vec(self).map_err(io::Error::other)?;
        text.push(b'\n');
        files::replace(path, &text, 0o644)
    }
}

const VERSION: u32 = 1;
/// So many of those that left stay at most: the last ones.
const MAX_LEFT: usize = 4096;

fn seconds(at: SystemTime) -> u64 {
    at.duration_since(UNIX_EPOCH).map_or(0, |it| it.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("cni/namespaces.json");
        assert_eq!(Listed::read(&path).expect("no list"), None);
        let listed = Listed::of(["shop".to_owned(), "bank".to_owned()]);
        listed.write(&path).expect("written");
        assert_eq!(Listed::read(&path).expect("a list"), Some(listed));
        for bad in ["", "{}", "{\"version\":2,\"namespaces\":[]}", "[1]"] {
            fs::write(&path, bad).expect("written");
            assert!(Listed::read(&path).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn who_leaves_stays_for_a_while() {
        let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        let stay = Duration::from_secs(100);
        let names = |of: &Listed| of.namespaces.iter().cloned().collect::<Vec<_>>().join(" ");
        let both = Listed::of(["shop".to_owned(), "bank".to_owned()]);
        let shop = || ["shop".to_owned()];
        let left = both.next(shop(), at(1000), stay);
        assert_eq!(names(&left), "bank shop");
        assert_eq!(
            left.until_next(at(1030), stay),
            Some(Duration::from_secs(70))
        );
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("namespaces.json");
        left.write(&path).expect("written");
        let left = Listed::read(&path).expect("readable").expect("there");
        // now, of whom → who is on the list
        for (now, of, expected) in [
            (1000, shop().to_vec(), "bank shop"),
            (1099, shop().to_vec(), "bank shop"),
            (1100, shop().to_vec(), "shop"),
            (1099, vec![], "bank shop"),
            (1100, vec![], "shop"),
            (500, vec![], "bank shop"),
        ] {
            let next = left.next(of, at(now), stay);
            assert_eq!(names(&next), expected, "{now}");
            let waits = next.until_next(at(now), stay);
            assert!(waits.is_none_or(|it| !it.is_zero() && it <= stay), "{now}");
        }
        // A clock that is wrong for a moment makes nobody go early.
        let early = left.next(shop(), at(5), stay);
        assert_eq!(names(&early.next(shop(), at(1099), stay)), "bank shop");
        assert_eq!(names(&early.next(shop(), at(1100), stay)), "shop");
        let back = left.next(["bank".to_owned()], at(1099), stay);
        let gone = back.next([], at(1150), stay);
        assert_eq!(names(&gone), "bank shop", "it left anew");
        assert_eq!(names(&gone.next([], at(1199), stay)), "bank");
        let many = Listed::of((0..2 * MAX_LEFT).map(|it| it.to_string()));
        assert_eq!(many.next([], at(0), stay).namespaces.len(), MAX_LEFT);
    }
}
