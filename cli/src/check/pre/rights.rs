//! What somebody needs who applies the manifests: for each object the verbs that `kubectl apply` uses, and for each role
//! what it gives, as the API server lets nobody hand out more than they have.

use std::collections::{BTreeMap, BTreeSet};

use futures::StreamExt;
use k8s_openapi::api::authorization::v1::{
    ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec,
};
use kube::api::PostParams;
use kube::{Api, Client};
use serde_json::Value;

use crate::controller::AT_ONCE;
use crate::controller::cluster::reason;

/// Something that may be done or not.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Access {
    pub(super) verb: String,
    /// The API group; empty for the core's.
    pub(super) group: String,
    /// The plural name, of a part of objects with that behind it: `servers/status`.
    pub(super) resource: String,
    /// None: in all namespaces, or in none.
    pub(super) namespace: Option<String>,
    pub(super) name: Option<String>,
}

/// What `kubectl apply` does.
const APPLIES: [&str; 3] = ["get", "create", "patch"];
const RBAC: &str = "rbac.authorization.k8s.io";

/// Asks the API server what is missing; none: everything may be done.
///
/// # Errors
/// It does not answer.
pub(super) async fn missing(client: &Client, objects: &[Value]) -> Result<Vec<String>, String> {
    let everything = Access {
        verb: "*".to_owned(),
        group: "*".to_owned(),
        resource: "*".to_owned(),
        namespace: None,
        name: None,
    };
    if allows(client, &everything).await? {
        return Ok(vec![]);
    }
    let asked = futures::stream::iter(needed(objects).into_iter().map(|it| async {
        let answer = allows(client, &it).await;
        answer.map(|allowed| allowed.then_some(it))
    }));
    let answers: Vec<_> = asked.buffered(AT_ONCE).collect().await;
    let allowed: Result<Vec<_>, String> = answers.into_iter().collect();
    let allowed: BTreeSet<Access> = allowed?.into_iter().flatten().collect();
    Ok(lacks(objects, &|it| allowed.contains(it)))
}

async fn allows(client: &Client, access: &Access) -> Result<bool, String> {
    let (resource, part) = match access.resource.split_once('/') {
        Some((resource, part)) => (resource, Some(part.to_owned())),
        None => (access.resource.as_str(), None),
    };
    let review = SelfSubjectAccessReview {
        spec: SelfSubjectAccessReviewSpec {
            resource_attributes: Some(ResourceAttributes {
                verb: Some(access.verb.clone()),
                group: Some(access.group.clone()),
                resource: Some(resource.to_owned()),
                subresource: part,
                namespace: access.namespace.clone(),
                name: access.name.clone(),
                ..ResourceAttributes::default()
            }),
            ..SelfSubjectAccessReviewSpec::default()
        },
        ..SelfSubjectAccessReview::default()
    };
    let reviews: Api<SelfSubjectAccessReview> = Api::all(client.clone());
    let answer = reviews.create(&PostParams::default(), &review).await;
    let answer = answer.map_err(|error| reason(&error))?;
    Ok(answer.status.is_some_and(|it| it.allowed))
}

/// All that may have to be asked.
fn needed(objects: &[Value]) -> BTreeSet<Access> {
    let mut all: BTreeSet<Access> = objects.iter().flat_map(to_apply).collect();
    for role in objects.iter().filter(|it| is_role(it)) {
        all.extend(given(role));
        all.extend(["escalate", "bind"].map(|verb| over(role, verb)));
    }
    all
}

/// What is missing, a line each.
pub(super) fn lacks(objects: &[Value], allowed: &impl Fn(&Access) -> bool) -> Vec<String> {
    let mut verbs: BTreeMap<String, BTreeSet<usize>> = BTreeMap::new();
    for access in objects.iter().flat_map(to_apply).filter(|it| !allowed(it)) {
        let place = APPLIES.iter().position(|verb| *verb == access.verb);
        verbs.entry(access.on()).or_default().extend(place);
    }
    let line = |(on, verbs): (String, BTreeSet<usize>)| {
        let verbs: Vec<_> = verbs.into_iter().map(|it| APPLIES[it]).collect();
        format!("you may not {} {on}", verbs.join(", "))
    };
    let mut lines: Vec<String> = verbs.into_iter().map(line).collect();
    for role in objects.iter().filter(|it| is_role(it)) {
        let beyond: Vec<Access> = given(role).into_iter().filter(|it| !allowed(it)).collect();
        let Some(first) = beyond.first() else {
            continue;
        };
        let which = format!("{} {}", text(role, "/kind"), text(role, "/metadata/name"));
        let more = match beyond.len() - 1 {
            0 => String::new(),
            more => format!(", and {more} more"),
        };
        let what = format!("{} {}{more}", first.verb, first.on());
        if !allowed(&over(role, "escalate")) {
            lines.push(format!(
                "the {which} gives what you may not do yourself ({what}): to make it takes the verb escalate"
            ));
        }
        let is_bound = objects.iter().any(|it| binds(it, role));
        if is_bound && !allowed(&over(role, "bind")) {
            lines.push(format!(
                "the {which} gives what you may not do yourself ({what}): to bind it takes the verb bind"
            ));
        }
    }
    lines
}

impl Access {
    /// On what, and where.
    fn on(&self) -> String {
        let mut text = self.resource.clone();
        if !self.group.is_empty() {
            text = format!("{text}.{}", self.group);
        }
        if let Some(namespace) = &self.namespace {
            text += &format!(" in the namespace {namespace}");
        }
        text
    }
}

/// What it takes to apply an object.
fn to_apply(object: &Value) -> Vec<Access> {
    let verbs = APPLIES.iter();
    let access = |verb: &&str| Access {
        verb: (*verb).to_owned(),
        group: group(object).to_owned(),
        resource: plural(text(object, "/kind")),
        namespace: namespace(object),
        name: None,
    };
    verbs.map(access).collect()
}

/// What a role gives.
fn given(role: &Value) -> Vec<Access> {
    let mut all = vec![];
    for rule in role["rules"].as_array().into_iter().flatten() {
        let of = |field: &str| {
            let texts = rule[field].as_array().into_iter().flatten();
            let texts = texts.filter_map(|it| it.as_str().map(str::to_owned));
            texts.collect::<Vec<_>>()
        };
        let names: Vec<Option<String>> = match of("resourceNames") {
            names if names.is_empty() => vec![None],
            names => names.into_iter().map(Some).collect(),
        };
        for group in of("apiGroups") {
            for resource in of("resources") {
                for verb in of("verbs") {
                    all.extend(names.iter().map(|name| Access {
                        verb: verb.clone(),
                        group: group.clone(),
                        resource: resource.clone(),
                        namespace: namespace(role),
                        name: name.clone(),
                    }));
                }
            }
        }
    }
    all
}

/// To hand out a role that gives more than one has.
fn over(role: &Value, verb: &str) -> Access {
    Access {
        verb: verb.to_owned(),
        group: RBAC.to_owned(),
        resource: plural(text(role, "/kind")),
        namespace: namespace(role),
        name: Some(text(role, "/metadata/name").to_owned()),
    }
}

fn is_role(object: &Value) -> bool {
    matches!(text(object, "/kind"), "Role" | "ClusterRole")
}

fn binds(binding: &Value, role: &Value) -> bool {
    text(binding, "/roleRef/kind") == text(role, "/kind")
        && text(binding, "/roleRef/name") == text(role, "/metadata/name")
        && (text(role, "/kind") == "ClusterRole" || namespace(binding) == namespace(role))
}

fn group(object: &Value) -> &str {
    let version = text(object, "/apiVersion");
    version.split_once('/').map_or("", |(group, _)| group)
}

fn namespace(object: &Value) -> Option<String> {
    let namespace = text(object, "/metadata/namespace");
    (!namespace.is_empty()).then(|| namespace.to_owned())
}

fn text<'a>(object: &'a Value, field: &str) -> &'a str {
    let text = object.pointer(field).and_then(Value::as_str);
    text.unwrap_or_default()
}

/// The name of a kind in paths, by the rule that all kinds in the manifests follow.
pub(super) fn plural(kind: &str) -> String {
    let name = kind.to_lowercase();
    match name.strip_suffix('y') {
        Some(stem) => format!("{stem}ies"),
        None => format!("{name}s"),
    }
}
