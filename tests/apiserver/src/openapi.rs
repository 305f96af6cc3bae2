//! OpenAPI 3 as far as clients have to see of it what the server does: which kinds can be patched, and that it checks fields
//! itself (`fieldValidation`), so that they need not. Schemas are not in it.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use crate::Shared;
use crate::answer::{Failure, not_found};
use crate::kinds::Kind;

/// `/openapi/v3`: where the rest is.
pub(crate) fn index(shared: &Shared) -> Value {
    let versions = shared.store.kinds().into_iter().flat_map(|kind| {
        let versions = kind.versions.clone().into_iter();
        versions.map(move |it| root(&kind.group, &it))
    });
    let versions: BTreeSet<String> = versions.collect();
    let paths = versions.into_iter().map(|it| {
        let place = json!({"serverRelativeURL": format!("/openapi/v3/{it}")});
        (it, place)
    });
    json!({"paths": paths.collect::<Map<_, _>>()})
}

/// What is said of a version of a group.
pub(crate) fn of_version(shared: &Shared, group: &str, version: &str) -> Result<Value, Failure> {
    let kinds = shared.store.kinds().into_iter();
    let kinds = kinds.filter(|it| it.group == group && it.versions.iter().any(|it| it == version));
    let paths: Map<String, Value> = kinds.map(|it| patched(&it, version)).collect();
    match paths.is_empty() {
        true => Err(not_found()),
        false => Ok(
            json!({"openapi": "3.0.0", "info": {"title": "Kubernetes", "version": "tests"}, "paths": paths}),
        ),
    }
}

/// Where objects of a kind are patched.
fn patched(kind: &Kind, version: &str) -> (String, Value) {
    let root = root(&kind.group, version);
    let path = match kind.namespaced {
        true => format!("/{root}/namespaces/{{namespace}}/{}/{{name}}", kind.plural),
        false => format!("/{root}/{}/{{name}}", kind.plural),
    };
    let parameter = |name: &str| json!({"name": name, "in": "query", "schema": {"type": "string", "uniqueItems": true}});
    let parameters: Vec<Value> = ["dryRun", "fieldManager", "fieldValidation"]
        .map(parameter)
        .into();
    let of = json!({"group": kind.group, "version": version, "kind": kind.kind});
    let patch = json!({"x-kubernetes-action": "patch", "x-kubernetes-group-version-kind": of,
        "parameters": parameters, "responses": {"200": {"description": "OK"}}});
    (path, json!({"patch": patch}))
}

fn root(group: &str, version: &str) -> String {
    match group {
        "" => format!("api/{version}"),
        group => format!("apis/{group}/{version}"),
    }
}
