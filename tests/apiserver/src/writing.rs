//! Requests that write: objects, and what is said about them at their `/status`.

use std::sync::Arc;

use bytes::Bytes;
use http::header::{CONTENT_TYPE, WARNING};
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use serde_json::Value;

use crate::admission::{self, Warnings};
use crate::answer::{
    Body, Collection, Failure, Query, json_body, no_object, not_found, refusal, shown,
};
use crate::fields::{self, Unknown};
use crate::store::{Refused, keep_status};
use crate::{Shared, definitions, deleting, strategic};

/// A write, as a path names it.
struct Target<'a> {
    of: Collection,
    name: Option<&'a str>,
    subresource: Option<&'a str>,
}

/// What is to be written.
struct Asked {
    is_merge: bool,
    is_strategic: bool,
    said: Value,
    unknown: Unknown,
    /// Nothing is to be kept.
    dry_run: bool,
}

/// What was written, with what is said of it.
type Written = (StatusCode, Arc<Value>, Warnings);

/// Answers a request that writes.
pub(crate) async fn write(
    shared: &Arc<Shared>,
    path: &str,
    query: &Query,
    request: Request<Incoming>,
) -> Result<Response<Body>, Failure> {
    let target = target(shared, path)?;
    let method = request.method().clone();
    let kind = request.headers().get(CONTENT_TYPE);
    let kind = kind.and_then(|it| it.to_str().ok()).unwrap_or_default();
    let kind = kind.to_owned();
    let bytes = request.into_body().collect().await;
    let bytes = bytes.map_or_else(|_| Bytes::new(), |it| it.to_bytes());
    let bytes = match (&method, bytes.is_empty()) {
        (&Method::DELETE, true) => Bytes::from_static(b"{}"),
        _ => bytes,
    };
    let said: Value = serde_json::from_slice(&bytes).map_err(|error| {
        let message = format!("the body is no JSON: {error}");
        (StatusCode::BAD_REQUEST, "BadRequest", message)
    })?;
    let plural = target.of.kind.plural.clone();
    let failing = {
        let mut behaviour = shared.behaviour();
        behaviour.failed_writes.get_mut(&plural).and_then(Vec::pop)
    };
    if let Some(code) = failing {
        return Err(refusal(code, &plural, &target.of.kind.group));
    }
    let asked = Asked {
        is_merge: kind.starts_with("application/merge-patch+json"),
        is_strategic: kind.starts_with("application/strategic-merge-patch+json"),
        said,
        unknown: Unknown::asked(query)?,
        dry_run: query.get("dryRun").is_some_and(|it| it == "All"),
    };
    let (code, written, warnings) = match (&method, target.name, target.subresource) {
        (&Method::POST, None, None) => create(shared, &target, asked).await?,
        (&Method::DELETE, Some(name), None) => {
            return deleting::delete(shared, &target.of, name, (&asked.said, asked.dry_run));
        }
        (&Method::PUT | &Method::PATCH, Some(name), _) => {
            change(shared, &target, name, &method, &asked).await?
        }
        // As if the object did not exist, says the real one.
        (_, Some(name), Some(_)) => return Err(no_object(&target.of, name)),
        _ => return Err(not_allowed()),
    };
    let mut response = json_body(code, &shown(&target.of, &written));
    for warning in warnings {
        let text = warning.replace(['\\', '"'], "'");
        if let Ok(value) = HeaderValue::from_str(&format!("299 - \"{text}\"")) {
            response.headers_mut().append(WARNING, value);
        }
    }
    Ok(response)
}

/// Makes an object, if nobody objects.
async fn create(shared: &Shared, target: &Target<'_>, asked: Asked) -> Result<Written, Failure> {
    let (kind, namespace) = (&target.of.kind, target.namespace());
    let failed = |refused| failure(target, refused);
    deleting::may_be_in(shared, &target.of)?;
    check(&kind.kind, namespace, &asked.said, None).map_err(failed)?;
    let read = (asked.said, None);
    let (said, mut warnings) = fields::checked(&shared.store, &target.of, read, asked.unknown)?;
    let name = said["metadata"]["name"].as_str().unwrap_or_default();
    if definitions::is_definition(kind) {
        definitions::made(&said).map_err(|it| failed(Refused::Invalid(it)))?;
    }
    let write = admission::Write {
        of: &target.of,
        name,
        subresource: None,
        before: None,
        now: &said,
    };
    warnings.extend(admission::admit(shared, write).await?);
    let name = name.to_owned();
    let mut said = said;
    counted_anew(&mut said);
    if asked.dry_run {
        return match shared.store.current(kind, namespace, &name) {
            Ok(_) => Err(failed(Refused::Exists)),
            Err(_) => Ok((StatusCode::CREATED, Arc::new(said), warnings)),
        };
    }
    let made = shared.store.create(kind, namespace, said).map_err(failed)?;
    if definitions::is_definition(kind) {
        definitions::establish(&shared.store, &name).map_err(failed)?;
    }
    Ok((StatusCode::CREATED, made, warnings))
}

/// Changes an object, if nobody objects to what it is to be; as often as somebody else changes it meanwhile.
async fn change(
    shared: &Shared,
    target: &Target<'_>,
    name: &str,
    method: &Method,
    asked: &Asked,
) -> Result<Written, Failure> {
    let (kind, namespace) = (&target.of.kind, target.namespace());
    let failed = |refused| failure(target, refused);
    loop {
        let before = shared
            .store
            .current(kind, namespace, name)
            .map_err(failed)?;
        let now = changed(target, method, asked, &before)?;
        let version = |of: &Value| of["metadata"]["resourceVersion"].clone();
        if !version(&now).is_null() && version(&now) != version(&before) {
            return Err(failed(Refused::Conflict));
        }
        let read = (now, Some(&*before));
        let (now, mut warnings) = fields::checked(&shared.store, &target.of, read, asked.unknown)?;
        let is_definition = definitions::is_definition(kind);
        if is_definition {
            definitions::made(&now).map_err(|it| failed(Refused::Invalid(it)))?;
        }
        let write = admission::Write {
            of: &target.of,
            name,
            subresource: target.subresource,
            before: Some(&before),
            now: &now,
        };
        warnings.extend(admission::admit(shared, write).await?);
        if asked.dry_run {
            return Ok((StatusCode::OK, Arc::new(now), warnings));
        }
        let mut is_other = false;
        let written = shared.store.change(kind, namespace, name, |current| {
            is_other = version(current) != version(&before);
            match is_other {
                true => Err(Refused::Conflict),
                false => Ok(now),
            }
        });
        if !is_other {
            let written = written.map_err(failed)?;
            if is_definition && written["spec"] != before["spec"] {
                definitions::establish(&shared.store, name).map_err(failed)?;
            }
            return Ok((StatusCode::OK, written, warnings));
        }
    }
}

/// What an object is to be.
fn changed(
    target: &Target<'_>,
    method: &Method,
    asked: &Asked,
    before: &Value,
) -> Result<Value, Failure> {
    let (kind, said) = (&target.of.kind, &asked.said);
    let failed = |refused| failure(target, refused);
    let mut now = match (method, target.subresource) {
        (&Method::PUT, None) => {
            let unseen = said.pointer("/metadata/resourceVersion").is_none();
            if (kind.kind == "Lease" || kind.custom) && unseen {
                let reason = "metadata.resourceVersion: must be specified for an update";
                return Err(failed(Refused::Invalid(reason.to_owned())));
            }
            said.clone()
        }
        (&Method::PATCH, None) if asked.is_merge => merged(before, said),
        (&Method::PATCH, None) if asked.is_strategic && !kind.custom => {
            let merged = strategic::merged(&kind.kind, before, said);
            merged.map_err(|it| failed(Refused::Invalid(it)))?
        }
        (&Method::PATCH, Some("status")) if kind.status && asked.is_merge => {
            return Ok(with_status(before, said));
        }
        (&Method::PATCH, None) => return Err(unknown_patch()),
        (&Method::PATCH, Some("status")) if kind.status => return Err(unknown_patch()),
        _ => return Err(no_object(&target.of, target.name.unwrap_or_default())),
    };
    check(&kind.kind, target.namespace(), &now, Some(before)).map_err(failed)?;
    if kind.status {
        counted_anew(&mut now);
        keep_status(&mut now, Some(before));
    }
    Ok(now)
}

/// Takes away what the server counts, whatever somebody says.
fn counted_anew(object: &mut Value) {
    let metadata = object.get_mut("metadata");
    if let Some(metadata) = metadata.and_then(Value::as_object_mut) {
        metadata.remove("generation");
    }
}

fn unknown_patch() -> Failure {
    let message =
        "only merge patches are understood, and strategic ones of built-in kinds".to_owned();
    let code = StatusCode::UNSUPPORTED_MEDIA_TYPE;
    (code, "UnsupportedMediaType", message)
}

fn not_allowed() -> Failure {
    let message = "the server does not allow this method on the requested resource";
    let code = StatusCode::METHOD_NOT_ALLOWED;
    (code, "MethodNotAllowed", message.to_owned())
}

impl Target<'_> {
    fn namespace(&self) -> &str {
        self.of.namespace.as_deref().unwrap_or_default()
    }
}

fn target<'a>(shared: &Shared, path: &'a str) -> Result<Target<'a>, Failure> {
    let parts: Vec<&str> = path.split('/').filter(|it| !it.is_empty()).collect();
    let (group, version, rest) = match parts.as_slice() {
        ["api", version, rest @ ..] => ("", *version, rest),
        ["apis", group, version, rest @ ..] => (*group, *version, rest),
        _ => return Err(not_found()),
    };
    let (namespace, rest) = match rest {
        ["namespaces", namespace, rest @ ..] if !rest.is_empty() => (Some(*namespace), rest),
        rest => (None, rest),
    };
    let (plural, rest) = rest.split_first().ok_or_else(not_found)?;
    Ok(Target {
        of: Collection::find(shared, [group, version, plural], namespace)?,
        name: rest.first().copied(),
        subresource: rest.get(1).copied(),
    })
}

fn failure(target: &Target<'_>, refused: Refused) -> Failure {
    let plural = &target.of.kind.plural;
    let name = target.name.unwrap_or_default();
    match refused {
        Refused::Missing => no_object(&target.of, name),
        Refused::Exists => {
            let message = format!("{plural} already exists");
            (StatusCode::CONFLICT, "AlreadyExists", message)
        }
        Refused::Conflict => {
            let message = format!(
                "Operation cannot be fulfilled on {plural} {name:?}: the object has been modified; please apply your \
                 changes to the latest version and try again"
            );
            (StatusCode::CONFLICT, "Conflict", message)
        }
        Refused::Invalid(reason) => {
            let message = format!("{plural} {name:?} is invalid: {reason}");
            (StatusCode::UNPROCESSABLE_ENTITY, "Invalid", message)
        }
    }
}

/// An object with another status, and nothing else; what the patch says to have seen, too.
fn with_status(before: &Value, patch: &Value) -> Value {
    let mut after = before.clone();
    let patched = merged(before, patch);
    match patched.get("status") {
        Some(status) => after["status"] = status.clone(),
        None => {
            after.as_object_mut().map(|it| it.remove("status"));
        }
    }
    after["metadata"]["resourceVersion"] = patched["metadata"]["resourceVersion"].clone();
    after
}

/// A JSON merge patch (RFC 7386), applied.
fn merged(target: &Value, patch: &Value) -> Value {
    let Value::Object(patch) = patch else {
        return patch.clone();
    };
    let mut result = target.as_object().cloned().unwrap_or_default();
    for (name, value) in patch {
        if value.is_null() {
            result.remove(name);
        } else {
            let below = result.get(name).unwrap_or(&Value::Null);
            let merged = merged(below, value);
            result.insert(name.clone(), merged);
        }
    }
    Value::Object(result)
}

/// What the API server does not let pass of Events.
fn check(
    kind: &str,
    namespace: &str,
    object: &Value,
    before: Option<&Value>,
) -> Result<(), Refused> {
    if kind != "Event" {
        return Ok(());
    }
    let text = |field: &str| object[field].as_str().unwrap_or_default();
    let invalid = |reason: &str| Err(Refused::Invalid(reason.to_owned()));
    for (field, most) in [
        ("reportingController", 128),
        ("reportingInstance", 128),
        ("action", 128),
        ("reason", 128),
        ("eventTime", 64),
    ] {
        if text(field).is_empty() || text(field).len() > most {
            return invalid(&format!("{field}: required, and not too long"));
        }
    }
    if text("note").len() > 1024 {
        return invalid("note: can have at most 1024 characters");
    }
    if !matches!(text("type"), "Normal" | "Warning") {
        return invalid("type: Normal or Warning");
    }
    let regarded = object["regarding"]["namespace"].as_str();
    if regarded.unwrap_or("default") != namespace {
        return invalid("regarding.namespace: does not match the event's namespace");
    }
    let series = &object["series"];
    if !series.is_null()
        && (series["count"].as_i64().unwrap_or(0) < 2 || series["lastObservedTime"].is_null())
    {
        return invalid("series.count: should be at least 2");
    }
    let fixed = ["action", "reason", "note", "type", "regarding", "eventTime"];
    let mut changed = fixed
        .iter()
        .filter(|it| before.is_some_and(|before| before[**it] != object[**it]));
    match changed.next() {
        Some(field) => invalid(&format!("{field}: field is immutable")),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn patches_are_merged() {
        for (target, patch, expected) in [
            (json!({"a": "b"}), json!({"a": "c"}), json!({"a": "c"})),
            (json!({"a": "b"}), json!({"a": null}), json!({})),
            (json!({"a": [1]}), json!({"a": [2]}), json!({"a": [2]})),
            (
                json!({"a": {"b": 1, "c": 2}}),
                json!({"a": {"b": null, "d": 3}}),
                json!({"a": {"c": 2, "d": 3}}),
            ),
            (Value::Null, json!({"a": {"b": null}}), json!({"a": {}})),
        ] {
            assert_eq!(merged(&target, &patch), expected, "{target} {patch}");
        }
    }

    #[test]
    fn a_status_is_all_that_a_patch_of_it_changes() {
        let before =
            json!({"metadata": {"resourceVersion": "1", "generation": 3}, "spec": {"a": 1}});
        let patch =
            json!({"metadata": {"labels": {"a": "b"}}, "spec": {"a": 2}, "status": {"c": 1}});
        let after = with_status(&before, &patch);
        let expected = json!({"metadata": {"resourceVersion": "1", "generation": 3}, "spec": {"a": 1},
            "status": {"c": 1}});
        assert_eq!(after, expected);
    }
}
