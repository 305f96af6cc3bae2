//! From a request to its answer: discovery, objects, lists; watches are [`watching`]'s, and what changes
//! something [`writing`]'s.

use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::sync::Arc;

use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_TYPE};
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use serde_json::{Value, json};

use crate::kinds::Kind;
use crate::rights::Rights;
use crate::store::Page;
use crate::{Options, Shared, faults, forwarding, openapi, rights, tokens, watching, writing};

/// An answer's body: whole, or as it comes.
pub(crate) type Body = UnsyncBoxBody<Bytes, std::io::Error>;

/// A collection, as a path names it.
#[derive(Clone, Debug)]
pub(crate) struct Collection {
    pub(crate) kind: Kind,
    pub(crate) version: String,
    pub(crate) namespace: Option<String>,
    /// The name of the one object of it that is asked for by a selector.
    pub(crate) only: Option<String>,
    /// Labels that objects must have.
    pub(crate) labels: Vec<(String, String)>,
}

/// The parameters of a request.
pub(crate) type Query = HashMap<String, String>;

/// A failure, as the status and the reason of a `Status`, and its message.
pub(crate) type Failure = (StatusCode, &'static str, String);

pub(crate) async fn answer(
    shared: Arc<Shared>,
    request: Request<Incoming>,
) -> Result<Response<Body>, Infallible> {
    let uri = request.uri().clone();
    let (path, query) = (uri.path(), uri.query().unwrap_or_default());
    let reads = request.method() == Method::GET;
    shared.note(match reads {
        true => format!("{path}?{query}"),
        false => format!("{} {path}", request.method()),
    });
    if reads {
        faults::held(&shared, path, &parameters(query)).await;
    }
    let method = request.method();
    let query = parameters(query);
    let who = authenticated(&shared, request.headers());
    let allowed = who.clone().and_then(|rights| {
        // What everybody may ask.
        if path == rights::SELF_REVIEWS {
            return Ok(());
        }
        rights::check(&shared, rights.as_ref(), method, path, &query)?;
        match forwarding::asked_at(path) {
            // Newer servers look for this right, too.
            Some(_) => rights::check(&shared, rights.as_ref(), &Method::POST, path, &query),
            None => Ok(()),
        }
    });
    let answered = match (allowed, forwarding::asked_at(path)) {
        (Ok(()), Some(of)) => forwarding::answer(&shared, of, &query, request),
        (Ok(()), None) if reads => get(&shared, path, &query),
        (Ok(()), None) if path == tokens::REVIEWS => tokens::answer(&shared, request).await,
        (Ok(()), None) if path == rights::REVIEWS => rights::answer(&shared, request).await,
        (Ok(()), None) if path == rights::SELF_REVIEWS => {
            rights::answer_self(who.ok().flatten().as_ref(), request).await
        }
        (Ok(()), None) => match tokens::asked_at(path) {
            Some(of) => tokens::request(&shared, of, request).await,
            None => writing::write(&shared, path, &query, request).await,
        },
        (Err(failure), _) => Err(failure),
    };
    Ok(answered.unwrap_or_else(|(code, reason, message)| {
        json_body(code, &status(code.as_u16(), reason, &message))
    }))
}

/// A `Status`, as failures are told.
pub(crate) fn status(code: u16, reason: &str, message: &str) -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": message, "reason": reason, "code": code})
}

/// An object as a version shows it.
pub(crate) fn shown(collection: &Collection, object: &Value) -> Value {
    let mut object = object.clone();
    object["kind"] = json!(collection.kind.kind);
    object["apiVersion"] = json!(collection.kind.api_version(&collection.version));
    object
}

/// What whoever asks may do; none: everything.
fn authenticated(shared: &Shared, headers: &HeaderMap) -> Result<Option<Rights>, Failure> {
    let Options {
        token,
        rights,
        users,
        ..
    } = &shared.options;
    let said = headers.get(AUTHORIZATION).and_then(|it| it.to_str().ok());
    let said = said.and_then(|it| it.strip_prefix("Bearer "));
    if let Some(user) = said.and_then(|it| users.get(it)) {
        return Ok(Some(Rights::of_user(&shared.store.objects(), user)));
    }
    if token.is_none() || said == token.as_deref() {
        return Ok(rights.clone());
    }
    let message = "Unauthorized".to_owned();
    Err((StatusCode::UNAUTHORIZED, "Unauthorized", message))
}

fn get(shared: &Arc<Shared>, path: &str, query: &Query) -> Result<Response<Body>, Failure> {
    let parts: Vec<&str> = path.split('/').filter(|it| !it.is_empty()).collect();
    match parts.as_slice() {
        ["readyz" | "livez" | "healthz"] => Ok(health(shared)),
        ["version"] => Ok(json_body(
            StatusCode::OK,
            &json!({"major": "1", "minor": "33", "gitVersion": "v1.33.0+tests"}),
        )),
        ["api"] => Ok(json_body(
            StatusCode::OK,
            &json!({"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []}),
        )),
        ["apis"] => Ok(json_body(StatusCode::OK, &groups(shared))),
        ["openapi", "v3"] => Ok(json_body(StatusCode::OK, &openapi::index(shared))),
        ["openapi", "v3", "api", version] => {
            let said = openapi::of_version(shared, "", version)?;
            Ok(json_body(StatusCode::OK, &said))
        }
        ["openapi", "v3", "apis", group, version] => {
            let said = openapi::of_version(shared, group, version)?;
            Ok(json_body(StatusCode::OK, &said))
        }
        ["api", version] => resources(shared, "", version),
        ["apis", group, version] => resources(shared, group, version),
        ["apis", group] => {
            let groups = groups(shared);
            let mut groups = groups["groups"].as_array().into_iter().flatten();
            let found = groups.find(|it| it["name"] == *group);
            let found = found.ok_or_else(not_found)?;
            Ok(json_body(StatusCode::OK, found))
        }
        ["api", version, rest @ ..] => collection(shared, "", version, rest, query),
        ["apis", group, version, rest @ ..] => collection(shared, group, version, rest, query),
        _ => Err(not_found()),
    }
}

fn health(shared: &Shared) -> Response<Body> {
    let (code, text) = match shared.behaviour().ready {
        true => (StatusCode::OK, "ok"),
        false => (
            StatusCode::INTERNAL_SERVER_ERROR,
            "[-]poststarthook/crd-informer-synced failed: not finished\nreadyz check failed\n",
        ),
    };
    body(code, "text/plain; charset=utf-8", text.as_bytes().to_vec())
}

fn groups(shared: &Shared) -> Value {
    let mut groups: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let hidden = shared.behaviour().hidden.clone();
    for kind in shared.store.kinds() {
        if !kind.group.is_empty() && !hidden.contains(&kind.group) {
            let versions = groups.entry(kind.group).or_default();
            versions.extend(kind.versions);
            versions.sort();
            versions.dedup();
        }
    }
    let group = |(name, versions): (String, Vec<String>)| {
        let shown = |it: &String| json!({"groupVersion": format!("{name}/{it}"), "version": it});
        let versions: Vec<Value> = versions.iter().map(shown).collect();
        json!({"name": name, "versions": versions, "preferredVersion": versions.last()})
    };
    let groups: Vec<Value> = groups.into_iter().map(group).collect();
    json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups})
}

fn resources(shared: &Shared, group: &str, version: &str) -> Result<Response<Body>, Failure> {
    if shared
        .behaviour()
        .undiscoverable
        .iter()
        .any(|it| it == group)
    {
        let message = "the server is currently unable to handle the request".to_owned();
        let code = StatusCode::from_u16(shared.behaviour().undiscoverable_as);
        let code = code.unwrap_or(StatusCode::SERVICE_UNAVAILABLE);
        return Err((code, "ServiceUnavailable", message));
    }
    let is_unknown = {
        let behaviour = shared.behaviour();
        behaviour.named_only.contains(group) || behaviour.hidden.contains(group)
    };
    if is_unknown {
        return Err(not_found());
    }
    let mut resources = vec![];
    for kind in shared.store.kinds() {
        if kind.group == group && kind.versions.iter().any(|it| it == version) {
            resources.push(
                json!({"name": kind.plural, "singularName": kind.kind.to_lowercase(),
                "namespaced": kind.namespaced, "kind": kind.kind, "shortNames": kind.short_names,
                "verbs": ["delete", "get", "list", "patch", "create", "update", "watch"]}),
            );
            if kind.status {
                resources.push(
                    json!({"name": format!("{}/status", kind.plural), "singularName": "",
                    "namespaced": kind.namespaced, "kind": kind.kind, "verbs": ["get", "patch"]}),
                );
            }
        }
    }
    if resources.is_empty() {
        return Err(not_found());
    }
    let version = match group {
        "" => version.to_owned(),
        group => format!("{group}/{version}"),
    };
    let list = json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version,
        "resources": resources});
    Ok(json_body(StatusCode::OK, &list))
}

fn collection(
    shared: &Arc<Shared>,
    group: &str,
    version: &str,
    rest: &[&str],
    query: &Query,
) -> Result<Response<Body>, Failure> {
    let (namespace, plural, name) = match rest {
        ["namespaces", namespace, plural] => (Some(*namespace), *plural, None),
        ["namespaces", namespace, plural, name] => (Some(*namespace), *plural, Some(*name)),
        [plural] => (None, *plural, None),
        [plural, name] => (None, *plural, Some(*name)),
        _ => return Err(not_found()),
    };
    let failure = faults::answer(shared, plural, query);
    if let Some(failure) = failure.filter(|_| name.is_none()) {
        return Ok(failure);
    }
    let mut collection = Collection::find(shared, [group, version, plural], namespace)?;
    collection.only = selected(query)?;
    collection.labels = labels(query)?;
    // As for an account that has a right to single ones.
    if plural == "secrets" && collection.only.is_none() && name.is_none() {
        return Err(refusal(403, plural, group));
    }
    let watches = query.get("watch").map(String::as_str);
    match (name, matches!(watches, Some("true" | "1"))) {
        (Some(name), _) => one(shared, &collection, name),
        (None, true) => watching::watch(shared, collection, query),
        (None, false) => list(shared, &collection, query),
    }
}

impl Collection {
    /// What a path names, by its group, version and plural name.
    pub(crate) fn find(
        shared: &Shared,
        [group, version, plural]: [&str; 3],
        namespace: Option<&str>,
    ) -> Result<Self, Failure> {
        let mut kinds = shared.store.kinds().into_iter();
        let kind = kinds.find(|it| {
            it.group == group && it.plural == plural && it.versions.iter().any(|it| it == version)
        });
        let collection = Self {
            kind: kind.ok_or_else(not_found)?,
            version: version.to_owned(),
            namespace: namespace.map(str::to_owned),
            only: None,
            labels: vec![],
        };
        let refused = shared.behaviour().refused.get(plural).copied();
        match refused {
            Some(code) => Err(refusal(code, plural, group)),
            None => Ok(collection),
        }
    }

    /// Whether a selector lets this object through.
    pub(crate) fn contains(&self, object: &Value) -> bool {
        let metadata = &object["metadata"];
        let mut labels = self.labels.iter();
        self.only.as_deref().is_none_or(|it| metadata["name"] == it)
            && labels.all(|(key, value)| metadata["labels"][key] == value.as_str())
    }
}

/// The name of the one object that a selector asks for; no selector can say anything else here.
fn selected(query: &Query) -> Result<Option<String>, Failure> {
    let by_field = query.get("fieldSelector").map(String::as_str);
    let name = by_field.and_then(|it| it.strip_prefix("metadata.name="));
    if by_field.is_some() && name.is_none() {
        let message = "of fields this server selects by metadata.name only".to_owned();
        return Err((StatusCode::BAD_REQUEST, "BadRequest", message));
    }
    Ok(name.map(str::to_owned))
}

/// The labels that a selector asks for: this server knows equality only.
fn labels(query: &Query) -> Result<Vec<(String, String)>, Failure> {
    let selector = query.get("labelSelector").map_or("", String::as_str);
    let parts = selector.split(',').filter(|it| !it.is_empty());
    let label = |it: &str| {
        let (key, value) = it.split_once('=').filter(|(key, _)| !key.ends_with('!'))?;
        let value = value.strip_prefix('=').unwrap_or(value);
        Some((key.to_owned(), value.to_owned()))
    };
    let message = || "this server knows labels that are equal to something only".to_owned();
    let labels: Option<Vec<_>> = parts.map(label).collect();
    labels.ok_or_else(|| (StatusCode::BAD_REQUEST, "BadRequest", message()))
}

fn one(shared: &Shared, of: &Collection, name: &str) -> Result<Response<Body>, Failure> {
    let page = shared
        .store
        .list(&of.kind, of.namespace.as_deref(), usize::MAX, None);
    let items = page.map_or(vec![], |it| it.items);
    let found = items.iter().find(|it| it["metadata"]["name"] == name);
    let found = found.ok_or_else(|| no_object(of, name))?;
    Ok(json_body(StatusCode::OK, &shown(of, found)))
}

fn list(shared: &Shared, of: &Collection, query: &Query) -> Result<Response<Body>, Failure> {
    let limit = query.get("limit").and_then(|it| it.parse().ok());
    let limit = limit.filter(|it| *it > 0).unwrap_or(usize::MAX);
    let limit = limit.min(shared.behaviour().longest_page);
    let token = query.get("continue").map(String::as_str);
    let page = shared
        .store
        .list(&of.kind, of.namespace.as_deref(), limit, token);
    let Page {
        revision,
        items,
        rest,
    } = page.map_err(|_| {
        let message = "The provided continue parameter is too old to display a consistent list \
            result. You must start a new list without the continue parameter.";
        (StatusCode::GONE, "Expired", message.to_owned())
    })?;
    let item = |it: &Arc<Value>| {
        let mut item = shown(of, it);
        if let (false, Some(fields)) = (of.kind.custom, item.as_object_mut()) {
            fields.remove("kind");
            fields.remove("apiVersion");
        }
        item
    };
    let items = items.iter().filter(|it| of.contains(it));
    let items: Vec<Value> = items.map(item).collect();
    let mut metadata = json!({"resourceVersion": revision.to_string()});
    if let Some((token, left)) = rest {
        metadata["continue"] = json!(token);
        metadata["remainingItemCount"] = json!(left);
    }
    let list = json!({"kind": format!("{}List", of.kind.kind),
        "apiVersion": of.kind.api_version(&of.version), "metadata": metadata, "items": items});
    Ok(json_body(StatusCode::OK, &list))
}

pub(crate) fn refusal(code: u16, plural: &str, group: &str) -> Failure {
    let code = StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    match code {
        StatusCode::FORBIDDEN => {
            let message = format!(
                "{plural} is forbidden: User \"system:serviceaccount:weft:weft-controller\" cannot \
                 list resource \"{plural}\" in API group \"{group}\" at the cluster scope"
            );
            (code, "Forbidden", message)
        }
        StatusCode::GONE => (code, "Expired", "too old resource version".to_owned()),
        _ => (code, "InternalError", "refused by the test".to_owned()),
    }
}

pub(crate) fn no_object(of: &Collection, name: &str) -> Failure {
    let group = match of.kind.group.as_str() {
        "" => String::new(),
        group => format!(".{group}"),
    };
    let message = format!("{}{group} {name:?} not found", of.kind.plural);
    (StatusCode::NOT_FOUND, "NotFound", message)
}

pub(crate) fn not_found() -> Failure {
    let message = "the server could not find the requested resource".to_owned();
    (StatusCode::NOT_FOUND, "NotFound", message)
}

/// Decodes what clients write into queries here: letters, digits and few signs.
pub(crate) fn parameters(query: &str) -> Query {
    let pairs = query.split('&').filter(|it| !it.is_empty());
    let pair = |it: &str| {
        let (name, value) = it.split_once('=').unwrap_or((it, ""));
        let value = value.replace("%3D", "=").replace("%2F", "/");
        (name.to_owned(), value.replace("%2C", ","))
    };
    pairs.map(pair).collect()
}

pub(crate) fn json_body(code: StatusCode, value: &Value) -> Response<Body> {
    body(code, "application/json", value.to_string().into_bytes())
}

fn body(code: StatusCode, kind: &'static str, bytes: Vec<u8>) -> Response<Body> {
    let whole = Full::new(Bytes::from(bytes)).map_err(|never| match never {});
    respond(code, kind, whole.boxed_unsync())
}

pub(crate) fn respond(code: StatusCode, kind: &'static str, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = code;
    let kind = http::HeaderValue::from_static(kind);
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}
