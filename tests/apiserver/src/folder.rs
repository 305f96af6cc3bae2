//! A folder of manifests as the content of a store: what users apply, and kubelets say.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::Context;
use serde_json::Value;

use crate::{Store, slices};

/// A folder that is followed.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    files: BTreeMap<PathBuf, Known>,
}

#[derive(Debug)]
struct Known {
    stamp: (Option<SystemTime>, u64),
    objects: Vec<Value>,
}

/// How often it is looked at.
const LOOK: Duration = Duration::from_millis(50);

impl Folder {
    /// A folder.
    pub fn new(path: PathBuf) -> Self {
        Self {
            path,
            files: BTreeMap::new(),
        }
    }

    /// Brings the store up to what the files say now: YAML or JSON, written under hidden names and then
    /// renamed. Objects of kinds that are not served are left out.
    ///
    /// # Errors
    /// The folder or one of its files cannot be read.
    pub fn look(&mut self, store: &Store) -> anyhow::Result<()> {
        let mut files = std::mem::take(&mut self.files);
        let before: Vec<Value> = objects(&files);
        let mut found = BTreeMap::new();
        let mut written = BTreeSet::new();
        let entries = std::fs::read_dir(&self.path);
        for entry in entries.with_context(|| format!("reading {}", self.path.display()))? {
            let entry = entry?;
            let path = entry.path();
            let hidden = entry.file_name().to_string_lossy().starts_with('.');
            let extension = path.extension().and_then(|it| it.to_str());
            // Gone meanwhile: found out the next time.
            let Ok(metadata) = entry.metadata() else {
                continue;
            };
            if hidden || !matches!(extension, Some("yaml" | "yml" | "json")) {
                continue;
            }
            let stamp = (metadata.modified().ok(), metadata.len());
            let known = match files.remove(&path) {
                Some(known) if known.stamp == stamp => known,
                _ => {
                    written.insert(path.clone());
                    let objects = read(&path);
                    let objects = objects.with_context(|| format!("reading {}", path.display()))?;
                    Known { stamp, objects }
                }
            };
            found.insert(path, known);
        }
        self.files = found;
        for (path, known) in &self.files {
            for object in &known.objects {
                // What others have changed since stays changed until somebody writes the file anew.
                if written.contains(path) || !store.has(object) {
                    // Of a kind that is not served.
                    let _ = store.apply(object);
                }
            }
        }
        let now = objects(&self.files);
        for object in before {
            if !now.iter().any(|it| id(it) == id(&object)) {
                let _ = store.delete(&object);
            }
        }
        slices::reconcile(store)
    }

    /// Follows the folder for ever.
    pub async fn follow(mut self, store: &Store) {
        loop {
            if let Err(error) = self.look(store) {
                eprintln!("{error:#}");
            }
            tokio::time::sleep(LOOK).await;
        }
    }
}

fn objects(files: &BTreeMap<PathBuf, Known>) -> Vec<Value> {
    files.values().flat_map(|it| it.objects.clone()).collect()
}

fn id(object: &Value) -> [&Value; 4] {
    let metadata = &object["metadata"];
    let name = [&metadata["namespace"], &metadata["name"]];
    [&object["apiVersion"], &object["kind"], name[0], name[1]]
}

fn read(path: &Path) -> anyhow::Result<Vec<Value>> {
    let text = std::fs::read_to_string(path)?;
    let documents: Vec<Value> = serde_saphyr::from_multiple(&text)?;
    Ok(documents.into_iter().filter(|it| !it.is_null()).collect())
}
