//! Deletions: of single objects, of what is in a namespace with it, and of all objects of a kind with its definition.

use std::sync::Arc;
use std::time::Duration;

use http::{Response, StatusCode};
use serde_json::{Value, json};

use crate::answer::{Body, Collection, Failure, json_body, no_object, shown};
use crate::store::Refused;
use crate::{Shared, definitions};

/// Deletes an object. A dry run says what would be said.
pub(crate) fn delete(
    shared: &Arc<Shared>,
    of: &Collection,
    name: &str,
    (options, dry_run): (&Value, bool),
) -> Result<Response<Body>, Failure> {
    let (kind, namespace) = (&of.kind, of.namespace.as_deref().unwrap_or_default());
    let missing = |_: Refused| no_object(of, name);
    let found = shared
        .store
        .current(kind, namespace, name)
        .map_err(missing)?;
    let wanted = &options["preconditions"]["uid"];
    if !wanted.is_null() && *wanted != found["metadata"]["uid"] {
        let message = format!("the UID in the precondition ({wanted}) does not match");
        return Err((StatusCode::CONFLICT, "Conflict", message));
    }
    if kind.group.is_empty() && kind.kind == "Namespace" {
        let mut ends = found.as_ref().clone();
        ends["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        ends["status"] = json!({"phase": TERMINATING});
        if !dry_run {
            let change = |_: &Value| Ok(ends.clone());
            let changed = shared.store.change(kind, namespace, name, change);
            changed.map_err(missing)?;
            tokio::spawn(end(shared.clone(), name.to_owned()));
        }
        return Ok(json_body(StatusCode::OK, &shown(of, &ends)));
    }
    if !dry_run {
        shared
            .store
            .delete(&shown(of, &found))
            .map_err(|_| no_object(of, name))?;
        if definitions::is_definition(kind) {
            definitions::forget(&shared.store, &found);
        }
    }
    let details = json!({"name": name, "group": kind.group, "kind": kind.plural, "uid": found["metadata"]["uid"]});
    let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details});
    Ok(json_body(StatusCode::OK, &status))
}

/// Whether something may be made in a namespace.
pub(crate) fn may_be_in(shared: &Shared, of: &Collection) -> Result<(), Failure> {
    let Some(namespace) = of.namespace.as_deref().filter(|_| of.kind.namespaced) else {
        return Ok(());
    };
    match shared.store.object("Namespace", "", namespace) {
        None => {
            let message = format!("namespaces {namespace:?} not found");
            Err((StatusCode::NOT_FOUND, "NotFound", message))
        }
        Some(found) if found["status"]["phase"] == TERMINATING => {
            let message = format!(
                "{} is forbidden: unable to create new content in namespace {} because it is being terminated",
                of.kind.plural, found["metadata"]["name"]
            );
            Err((StatusCode::FORBIDDEN, "Forbidden", message))
        }
        Some(_) => Ok(()),
    }
}

/// As the controller manager does it, a moment later: all that is in a namespace goes, then it.
async fn end(shared: Arc<Shared>, name: String) {
    tokio::time::sleep(ENDS_AFTER).await;
    shared.store.delete_all(|_, _, namespace| namespace == name);
    let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}});
    // It may have been deleted by a test meanwhile.
    let _ = shared.store.delete(&namespace);
}

const TERMINATING: &str = "Terminating";
const ENDS_AFTER: Duration = Duration::from_millis(500);
