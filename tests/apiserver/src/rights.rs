//! What may be done: roles and bindings as manifests write them (`rbac.authorization.k8s.io/v1`), and what requests ask
//! for: those of an account that a test names, and of users, by what is in the store. Of groups, aggregated roles and
//! wildcards nothing is known: a role that has one gives nothing by it. SubjectAccessReviews are answered by the same, and
//! those that somebody asks for themselves.

use std::borrow::Borrow;
use std::collections::BTreeSet;
use std::fmt;

use http::{Method, Request, Response, StatusCode};
use hyper::body::Incoming;
use serde_json::{Value, json};

use crate::Shared;
use crate::answer::{Body, Failure, Query, json_body, refusal};
use crate::tokens::json_of;

/// What a request asks for, as roles have it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Access {
    /// `get`, `list`, `watch`, `create`, `update`, `patch` or `delete`; of roles also `bind` and `escalate`.
    pub verb: &'static str,
    /// The API group; empty for the core's.
    pub group: String,
    /// The plural name, of a part of objects with that behind it: `servers/status`.
    pub resource: String,
    /// None: in all namespaces, or in none.
    pub namespace: Option<String>,
    /// The name of the object; of lists and watches, of the only one that they select.
    pub name: Option<String>,
}

/// What somebody may do.
#[derive(Clone, Debug, Default)]
pub struct Rights {
    user: String,
    rules: Vec<Rule>,
}

/// A rule of a role, where that is bound.
#[derive(Clone, Debug)]
struct Rule {
    /// None: everywhere.
    namespace: Option<String>,
    groups: BTreeSet<String>,
    resources: BTreeSet<String>,
    verbs: BTreeSet<String>,
    /// None: of whatever name.
    names: BTreeSet<String>,
}

/// A right: what a rule gives, taken apart.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Right {
    /// What may be done.
    pub verb: String,
    /// In which API group.
    pub group: String,
    /// To what.
    pub resource: String,
}

impl Rights {
    /// Those of a service account, by these manifests.
    pub fn of(manifests: &[Value], namespace: &str, account: &str) -> Self {
        let user = format!("system:serviceaccount:{namespace}:{account}");
        Self::of_user(manifests, &user)
    }

    /// Those of a user by name, which a service account has too, by these manifests.
    pub(crate) fn of_user(manifests: &[impl Borrow<Value>], user: &str) -> Self {
        let is_it = |it: &Value| match it["kind"].as_str() {
            Some("ServiceAccount") => {
                let [namespace, name] = ["namespace", "name"].map(|key| it[key].as_str());
                let named = namespace.zip(name);
                named.is_some_and(|(namespace, name)| {
                    user == format!("system:serviceaccount:{namespace}:{name}")
                })
            }
            Some("User") => it["name"] == user,
            _ => false,
        };
        let mut rules = vec![];
        for binding in manifests.iter().map(Borrow::borrow) {
            let mut subjects = binding["subjects"].as_array().into_iter().flatten();
            if !subjects.any(is_it) {
                continue;
            }
            let bound_in = match binding["kind"].as_str() {
                Some("ClusterRoleBinding") => None,
                Some("RoleBinding") => text(&binding["metadata"]["namespace"]),
                _ => continue,
            };
            let mut roles = manifests.iter().map(Borrow::borrow);
            let role = roles.find(|it| {
                let of_cluster = it["kind"] == "ClusterRole";
                it["kind"] == binding["roleRef"]["kind"]
                    && it["metadata"]["name"] == binding["roleRef"]["name"]
                    && (of_cluster || text(&it["metadata"]["namespace"]) == bound_in)
            });
            let found = role.and_then(|it| it["rules"].as_array());
            rules.extend(found.into_iter().flatten().map(|rule| Rule {
                namespace: bound_in.clone(),
                groups: texts(&rule["apiGroups"]),
                resources: texts(&rule["resources"]),
                verbs: texts(&rule["verbs"]),
                names: texts(&rule["resourceNames"]),
            }));
        }
        Self {
            user: user.to_owned(),
            rules,
        }
    }

    /// Whether something may be done.
    pub fn allow(&self, access: &Access) -> bool {
        self.rules.iter().any(|it| it.allows(access))
    }

    /// Refuses what may not be done.
    pub(crate) fn check(&self, access: Access) -> Result<(), Failure> {
        if self.allow(&access) {
            return Ok(());
        }
        let named = access.name.map(|it| format!(" {it:?}")).unwrap_or_default();
        let scope = match &access.namespace {
            Some(namespace) => format!("in the namespace {namespace:?}"),
            None => "at the cluster scope".to_owned(),
        };
        let message = format!(
            "{}{named} is forbidden: User {:?} cannot {} resource {:?} in API group {:?} {scope}",
            access.resource, self.user, access.verb, access.resource, access.group
        );
        Err((StatusCode::FORBIDDEN, "Forbidden", message))
    }

    /// What may be done to objects of some names only.
    pub fn named(&self) -> Vec<Access> {
        let mut all = vec![];
        for rule in &self.rules {
            for (group, resource) in pairs(&rule.groups, &rule.resources) {
                for (verb, name) in pairs(&rule.verbs, &rule.names) {
                    all.extend(VERBS.iter().filter(|it| **it == verb).map(|verb| Access {
                        verb,
                        group: group.clone(),
                        resource: resource.clone(),
                        namespace: rule.namespace.clone(),
                        name: Some(name.clone()),
                    }));
                }
            }
        }
        all
    }

    /// All that may be done, wherever and to whatever name.
    pub fn all(&self) -> BTreeSet<Right> {
        let mut all = BTreeSet::new();
        for rule in &self.rules {
            for group in &rule.groups {
                for resource in &rule.resources {
                    all.extend(rule.verbs.iter().map(|verb| Right {
                        verb: verb.clone(),
                        group: group.clone(),
                        resource: resource.clone(),
                    }));
                }
            }
        }
        all
    }
}

impl Rule {
    fn allows(&self, access: &Access) -> bool {
        let is_there = match &self.namespace {
            None => true,
            there => *there == access.namespace,
        };
        let name = access.name.as_ref();
        let is_named = self.names.is_empty() || name.is_some_and(|it| self.names.contains(it));
        is_there
            && is_named
            && self.groups.contains(&access.group)
            && self.resources.contains(&access.resource)
            && self.verbs.contains(access.verb)
    }
}

impl Access {
    /// What a request asks for; none: nothing that roles are about.
    pub(crate) fn of(method: &Method, path: &str, query: &Query) -> Option<Self> {
        let parts: Vec<&str> = path.split('/').filter(|it| !it.is_empty()).collect();
        let (group, rest) = match parts.as_slice() {
            ["api", _, rest @ ..] => ("", rest),
            ["apis", group, _, rest @ ..] => (*group, rest),
            _ => return None,
        };
        let (namespace, rest) = match rest {
            ["namespaces", namespace, rest @ ..] if !rest.is_empty() => (Some(*namespace), rest),
            rest => (None, rest),
        };
        let (plural, rest) = rest.split_first()?;
        let selected = query.get("fieldSelector");
        let selected = selected.and_then(|it| it.strip_prefix("metadata.name="));
        let watches = query.get("watch").map(String::as_str);
        let named = rest.first().copied();
        Some(Self {
            verb: match *method {
                Method::POST => "create",
                Method::PUT => "update",
                Method::PATCH => "patch",
                Method::DELETE => "delete",
                _ if named.is_some() => "get",
                _ if matches!(watches, Some("true" | "1")) => "watch",
                _ => "list",
            },
            group: group.to_owned(),
            resource: match rest.get(1) {
                Some(part) => format!("{plural}/{part}"),
                None => (*plural).to_owned(),
            },
            namespace: namespace.map(str::to_owned),
            name: named.or(selected).map(str::to_owned),
        })
    }

    /// The right that it takes.
    pub fn right(&self) -> Right {
        Right {
            verb: self.verb.to_owned(),
            group: self.group.clone(),
            resource: self.resource.clone(),
        }
    }
}

/// Where SubjectAccessReviews are posted to.
pub(crate) const REVIEWS: &str = "/apis/authorization.k8s.io/v1/subjectaccessreviews";

/// Answers a SubjectAccessReview.
pub(crate) async fn answer(
    shared: &Shared,
    request: Request<Incoming>,
) -> Result<Response<Body>, Failure> {
    let refused = shared
        .behaviour()
        .refused
        .get("subjectaccessreviews")
        .copied();
    if let Some(code) = refused {
        return Err(refusal(
            code,
            "subjectaccessreviews",
            "authorization.k8s.io",
        ));
    }
    let mut review = json_of(request).await?;
    let user = review["spec"]["user"].as_str().unwrap_or_default();
    let rights = Rights::of_user(&shared.store.objects(), user);
    let allowed = asked(&review).is_some_and(|it| rights.allow(&it));
    review["status"] = json!({"allowed": allowed});
    Ok(json_body(StatusCode::CREATED, &review))
}

/// Where SelfSubjectAccessReviews are posted to.
pub(crate) const SELF_REVIEWS: &str = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews";

/// Answers a SelfSubjectAccessReview of somebody with these rights; none: they may do everything.
pub(crate) async fn answer_self(
    rights: Option<&Rights>,
    request: Request<Incoming>,
) -> Result<Response<Body>, Failure> {
    let mut review = json_of(request).await?;
    let allowed = rights.is_none_or(|it| asked(&review).is_some_and(|access| it.allow(&access)));
    review["status"] = json!({"allowed": allowed});
    Ok(json_body(StatusCode::CREATED, &review))
}

/// What a review asks about; none: a verb that nobody may use here.
fn asked(review: &Value) -> Option<Access> {
    let of = &review["spec"]["resourceAttributes"];
    let some = |name: &str| text(&of[name]).filter(|it| !it.is_empty());
    let plural = some("resource").unwrap_or_default();
    let verb = VERBS.iter().find(|it| of["verb"] == **it)?;
    Some(Access {
        verb,
        group: some("group").unwrap_or_default(),
        resource: match some("subresource") {
            Some(part) => format!("{plural}/{part}"),
            None => plural,
        },
        namespace: some("namespace"),
        name: some("name"),
    })
}

/// Notes what a request asks for, and refuses what may not be done.
pub(crate) fn check(
    shared: &Shared,
    rights: Option<&Rights>,
    method: &Method,
    path: &str,
    query: &Query,
) -> Result<(), Failure> {
    let Some(access) = Access::of(method, path, query) else {
        return Ok(());
    };
    shared.asks(access.clone());
    rights.map_or(Ok(()), |it| it.check(access))
}

impl fmt::Display for Right {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            verb,
            group,
            resource,
        } = self;
        write!(formatter, "{verb} {group}/{resource}")
    }
}

const VERBS: [&str; 9] = [
    "get", "list", "watch", "create", "update", "patch", "delete", "bind", "escalate",
];

fn pairs<'a>(
    ones: &'a BTreeSet<String>,
    others: &'a BTreeSet<String>,
) -> impl Iterator<Item = (&'a String, &'a String)> {
    let of = |one| others.iter().map(move |other| (one, other));
    ones.iter().flat_map(of)
}

fn text(value: &Value) -> Option<String> {
    value.as_str().map(str::to_owned)
}

fn texts(list: &Value) -> BTreeSet<String> {
    list.as_array()
        .into_iter()
        .flatten()
        .filter_map(text)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn access(request: &str) -> Option<Access> {
        let (method, rest) = request.split_once(' ').expect("a method");
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let method = method.parse().expect("one");
        Access::of(&method, path, &crate::answer::parameters(query))
    }

    #[test]
    fn requests_ask_for_what_roles_have() {
        for (request, expected) in [
            ("GET /api/v1/pods?limit=500", "list /pods - -"),
            ("GET /api/v1/pods?watch=true", "watch /pods - -"),
            ("GET /api/v1/namespaces", "list /namespaces - -"),
            ("GET /api/v1/namespaces/shop", "get /namespaces - shop"),
            ("GET /api/v1/namespaces/shop/pods/web", "get /pods shop web"),
            (
                "GET /api/v1/namespaces/weft/secrets?fieldSelector=metadata.name%3Dissuer&watch=1",
                "watch /secrets weft issuer",
            ),
            (
                "PATCH /apis/policy.weft.dev/v1alpha1/namespaces/shop/servers/web/status",
                "patch policy.weft.dev/servers/status shop web",
            ),
            (
                "POST /apis/events.k8s.io/v1/namespaces/shop/events",
                "create events.k8s.io/events shop -",
            ),
            (
                "PUT /apis/coordination.k8s.io/v1/namespaces/weft/leases/a",
                "update coordination.k8s.io/leases weft a",
            ),
        ] {
            let access = access(request).expect("of an object");
            let or = |it: Option<String>| it.unwrap_or_else(|| "-".to_owned());
            let shown = format!(
                "{} {} {}",
                access.right(),
                or(access.namespace),
                or(access.name)
            );
            assert_eq!(shown, expected, "{request}");
        }
        for request in [
            "GET /apis",
            "GET /apis/apps/v1",
            "GET /readyz",
            "GET /api/v1",
        ] {
            assert_eq!(access(request), None, "{request}");
        }
    }

    #[test]
    fn roles_give_what_they_say_where_they_are_bound() {
        let role = |kind: &str, namespace: &Value, rules: &Value| json!({"kind": kind, "metadata": {"name": "r", "namespace": namespace}, "rules": rules});
        let bound = |kind: &str, namespace: &Value, account: &str| {
            json!({"kind": format!("{kind}Binding"), "metadata": {"name": "b", "namespace": namespace},
                "roleRef": {"kind": kind, "name": "r"},
                "subjects": [{"kind": "ServiceAccount", "namespace": "weft", "name": account}]})
        };
        let everywhere =
            json!([{"apiGroups": [""], "resources": ["pods"], "verbs": ["list", "get"]}]);
        let here = json!([{"apiGroups": [""], "resources": ["secrets"], "resourceNames": ["issuer"],
            "verbs": ["get", "list"]}]);
        let (none, own) = (Value::Null, json!("weft"));
        let manifests = [
            role("ClusterRole", &none, &everywhere),
            bound("ClusterRole", &none, "controller"),
            role("Role", &own, &here),
            bound("Role", &own, "controller"),
            bound("Role", &own, "other"),
        ];
        let rights = Rights::of(&manifests, "weft", "controller");
        assert_eq!(rights.all().len(), 4);
        let named = rights.named();
        let names = named.iter().map(|it| (it.verb, it.name.as_deref()));
        assert!(names.eq([("get", Some("issuer")), ("list", Some("issuer"))]));
        let agent = Rights::of(&manifests, "weft", "other");
        for (request, may, other_may) in [
            ("GET /api/v1/pods", true, false),
            ("GET /api/v1/namespaces/shop/pods/a", true, false),
            ("GET /api/v1/pods?watch=true", false, false),
            ("GET /apis/apps/v1/pods", false, false),
            ("GET /api/v1/namespaces/weft/secrets/issuer", true, true),
            ("GET /api/v1/namespaces/weft/secrets/another", false, false),
            ("GET /api/v1/namespaces/shop/secrets/issuer", false, false),
            ("GET /api/v1/namespaces/weft/secrets", false, false),
            (
                "GET /api/v1/secrets?fieldSelector=metadata.name%3Dissuer",
                false,
                false,
            ),
            (
                "GET /api/v1/namespaces/weft/secrets?fieldSelector=metadata.name%3Dissuer",
                true,
                true,
            ),
        ] {
            let access = access(request).expect("of objects");
            assert_eq!(rights.allow(&access), may, "{request}");
            assert_eq!(agent.allow(&access), other_may, "{request}");
        }
    }
}
