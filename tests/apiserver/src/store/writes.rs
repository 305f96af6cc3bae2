//! Writes as clients of the API make them: against what they saw last.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::{Id, Store};
use crate::kinds::Kind;
use crate::locked;

/// Why a write is not done.
#[derive(Debug)]
pub(crate) enum Refused {
    /// There is no such object.
    Missing,
    /// The name is taken.
    Exists,
    /// The object is not as the writer saw it.
    Conflict,
    /// What is written is not allowed, and why.
    Invalid(String),
}

impl Store {
    /// Makes an object of this kind.
    pub(crate) fn create(
        &self,
        kind: &Kind,
        namespace: &str,
        mut object: Value,
    ) -> Result<Arc<Value>, Refused> {
        let mut state = locked(&self.state);
        let name = object.pointer("/metadata/name").and_then(Value::as_str);
        let name = name.ok_or_else(|| Refused::Invalid("metadata.name: required".to_owned()))?;
        let id = id(kind, namespace, name);
        if state.objects.contains_key(&id) {
            return Err(Refused::Exists);
        }
        let metadata = &mut object["metadata"];
        metadata["uid"] = json!(format!("made-as-{}", state.revision + 1));
        metadata["creationTimestamp"] = json!("2026-01-01T00:00:00Z");
        if kind.namespaced {
            metadata["namespace"] = json!(namespace);
        }
        if state.has_status(&id) {
            keep_status(&mut object, None);
        }
        let object = state.record("ADDED", id.clone(), object);
        state.objects.insert(id.clone(), object.clone());
        state.made(id);
        self.announce(state.revision);
        Ok(object)
    }

    /// An object of this kind.
    pub(crate) fn current(
        &self,
        kind: &Kind,
        namespace: &str,
        name: &str,
    ) -> Result<Arc<Value>, Refused> {
        let state = locked(&self.state);
        let found = state.objects.get(&id(kind, namespace, name)).cloned();
        found.ok_or(Refused::Missing)
    }

    /// Changes an object to what is made of it. What that says to have seen, as its `resourceVersion`, has to be the last.
    pub(crate) fn change(
        &self,
        kind: &Kind,
        namespace: &str,
        name: &str,
        change: impl FnOnce(&Value) -> Result<Value, Refused>,
    ) -> Result<Arc<Value>, Refused> {
        let mut state = locked(&self.state);
        let id = id(kind, namespace, name);
        let before = state.objects.get(&id).cloned().ok_or(Refused::Missing)?;
        let mut object = change(&before)?;
        for field in ["uid", "creationTimestamp", "name", "namespace"] {
            if let Some(value) = before["metadata"].get(field) {
                object["metadata"][field] = value.clone();
            }
        }
        let seen = object["metadata"]["resourceVersion"].clone();
        if !seen.is_null() && seen != before["metadata"]["resourceVersion"] {
            return Err(Refused::Conflict);
        }
        object["metadata"]["resourceVersion"] = before["metadata"]["resourceVersion"].clone();
        if *before == object {
            return Ok(before);
        }
        let object = state.record("MODIFIED", id.clone(), object);
        state.objects.insert(id.clone(), object.clone());
        state.made_changed(&id);
        self.announce(state.revision);
        Ok(object)
    }
}

/// What an object of a kind with a status is when it is applied: what is said about it is not the writer's to say, and
/// its generation counts the changes of the rest.
pub(crate) fn keep_status(object: &mut Value, before: Option<&Value>) {
    let Some(fields) = object.as_object_mut() else {
        return;
    };
    fields.remove("status");
    if let Some(status) = before.and_then(|it| it.get("status")) {
        fields.insert("status".to_owned(), status.clone());
    }
    let generation = match before {
        None => 1,
        Some(before) => {
            let last = before["metadata"]["generation"].as_i64().unwrap_or(1);
            last + i64::from(content(fields) != before.as_object().map_or(vec![], content))
        }
    };
    let metadata = fields.get_mut("metadata").and_then(Value::as_object_mut);
    if let Some(metadata) = metadata {
        metadata
            .entry("generation")
            .or_insert_with(|| json!(generation));
    }
}

/// What a generation counts the changes of.
fn content(fields: &Map<String, Value>) -> Vec<(&String, &Value)> {
    let others = ["apiVersion", "kind", "metadata", "status"];
    let all = fields.iter();
    all.filter(|(name, _)| !others.contains(&name.as_str()))
        .collect()
}

fn id(kind: &Kind, namespace: &str, name: &str) -> Id {
    let namespace = if kind.namespaced { namespace } else { "" };
    (
        kind.group.clone(),
        kind.kind.clone(),
        namespace.to_owned(),
        name.to_owned(),
    )
}
