//! What clients made, kept in a file: it outlives the program that served it, as etcd's objects do. What a folder says
//! needs none of this.

use std::collections::BTreeSet;
use std::path::PathBuf;

use anyhow::Context;
use serde_json::Value;

use super::{Id, State, Store};
use crate::locked;

/// The objects that clients made.
#[derive(Debug, Default)]
pub(super) struct Made {
    ids: BTreeSet<Id>,
    file: Option<PathBuf>,
}

impl Store {
    /// Takes up what an earlier store left in a file, and leaves there from now on what clients make.
    ///
    /// # Errors
    /// The file cannot be read, or holds something else.
    pub fn keep_in(&self, file: PathBuf) -> anyhow::Result<()> {
        let name = || file.display().to_string();
        let objects: Vec<Value> = match file.exists() {
            true => serde_json::from_slice(&std::fs::read(&file).with_context(name)?)
                .with_context(name)?,
            false => vec![],
        };
        for object in &objects {
            self.apply(object).with_context(name)?;
        }
        let mut state = locked(&self.state);
        for object in &objects {
            let id = state.identify(object)?;
            state.made.ids.insert(id);
        }
        state.made.file = Some(file);
        Ok(())
    }
}

impl State {
    /// A client made an object.
    pub(super) fn made(&mut self, id: Id) {
        self.made.ids.insert(id);
        self.keep();
    }

    /// A client changed an object.
    pub(super) fn made_changed(&mut self, id: &Id) {
        if self.made.ids.contains(id) {
            self.keep();
        }
    }

    /// It is there no more.
    pub(super) fn unmade(&mut self, id: &Id) {
        if self.made.ids.remove(id) {
            self.keep();
        }
    }

    fn keep(&self) {
        let Some(file) = &self.made.file else {
            return;
        };
        let of = |(id, object): (&Id, &std::sync::Arc<Value>)| {
            let mut object = object.as_ref().clone();
            let kinds = self.kinds.iter();
            let mut kinds = kinds.filter(|it| it.group == id.0 && it.kind == id.1);
            let kind = kinds.next()?;
            object["apiVersion"] = kind.api_version(kind.versions.first()?).into();
            object["kind"] = id.1.as_str().into();
            Some(object)
        };
        let made = self.objects.iter();
        let made = made.filter(|(id, _)| self.made.ids.contains(*id));
        let made: Vec<Value> = made.filter_map(of).collect();
        let temporary = file.with_extension("new");
        let written = std::fs::write(&temporary, Value::from(made).to_string());
        if let Err(error) = written.and_then(|()| std::fs::rename(&temporary, file)) {
            eprintln!("keeping {}: {error}", file.display());
        }
    }
}
