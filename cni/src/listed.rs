//! The namespaces that may hold meshed pods: a list that the agent keeps on disk, for when there is no agent.
//!
//! It outlives agents and restarts of the node. Where there is none, no agent of this node ever knew the cluster, or the
//! mesh was taken away from the node. A list that cannot be read counts as one of all namespaces.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, ErrorKind};
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::files;

/// The list.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listed {
    /// The version of its form.
    version: u32,
    /// The namespaces.
    pub namespaces: BTreeSet<String>,
}

/// A list that is there and cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {reason}")]
pub struct Unreadable {
    path: String,
    reason: String,
}

impl Listed {
    /// A list of these.
    pub fn of(namespaces: impl IntoIterator<Item = String>) -> Self {
        Self {
            version: VERSION,
            namespaces: namespaces.into_iter().collect(),
        }
    }

    /// Reads it. None: there is no list.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn read(path: &Path) -> Result<Option<Self>, Unreadable> {
        let unreadable = |reason: String| Unreadable {
            path: path.display().to_string(),
            reason,
        };
        let text = match fs::read(path) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(unreadable(error.to_string())),
        };
        let listed: Self =
            serde_json::from_slice(&text).map_err(|error| unreadable(error.to_string()))?;
        if listed.version != VERSION {
            let reason = format!("its form is {}, not {VERSION}", listed.version);
            return Err(unreadable(reason));
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
}
