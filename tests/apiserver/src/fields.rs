//! Whether what a client writes has the fields of its kind: those of built-in kinds as Kubernetes' own types have them (by
//! `k8s-openapi`, which is made of its schemas), those of custom ones as their definition says.

use http::StatusCode;
use k8s_openapi::api::admissionregistration::v1::ValidatingWebhookConfiguration;
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{
    ConfigMap, Namespace, Node, Pod, ResourceQuota, Secret, Service, ServiceAccount,
};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding, Role, RoleBinding};
use k8s_openapi::api::scheduling::v1::PriorityClass;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::answer::{Collection, Failure, Query};
use crate::definitions;
use crate::store::Store;

/// What is to be done about fields that nobody knows (`fieldValidation`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unknown {
    /// Nothing: they go.
    Ignored,
    /// They go, and a warning says so.
    Warned,
    /// What has them is refused.
    Refused,
}

/// What a schema makes of an object.
#[derive(Debug, Default)]
struct Read {
    /// Fields that it does not know.
    unknown: Vec<String>,
    /// What else is wrong.
    faults: Vec<String>,
}

impl Unknown {
    /// As a request asks for it.
    pub(crate) fn asked(query: &Query) -> Result<Self, Failure> {
        match query.get("fieldValidation").map_or("", String::as_str) {
            "Strict" => Ok(Self::Refused),
            "" | "Warn" => Ok(Self::Warned),
            "Ignore" => Ok(Self::Ignored),
            other => {
                let message = format!("fieldValidation: Unsupported value: {other:?}");
                Err((StatusCode::BAD_REQUEST, "BadRequest", message))
            }
        }
    }
}

/// An object as it may be kept, and what is said of it.
///
/// # Errors
/// It may not be kept.
pub(crate) fn checked(
    store: &Store,
    of: &Collection,
    (now, before): (Value, Option<&Value>),
    unknown: Unknown,
) -> Result<(Value, Vec<String>), Failure> {
    let kind = &of.kind;
    let mut kept = now;
    kept["apiVersion"] = kind.api_version(&of.version).into();
    kept["kind"] = kind.kind.as_str().into();
    let name = kept["metadata"]["name"].as_str().unwrap_or_default();
    let invalid = |faults: Vec<String>| {
        let message = format!(
            "{}.{} {name:?} is invalid: {}",
            kind.kind,
            kind.group,
            faults.join(", ")
        );
        (StatusCode::UNPROCESSABLE_ENTITY, "Invalid", message)
    };
    let not_read = |what: &str| {
        let (version, kind) = (&of.version, &kind.kind);
        let message =
            format!("{kind} in version {version:?} cannot be handled as a {kind}: {what}");
        (StatusCode::BAD_REQUEST, "BadRequest", message)
    };
    let mut read = Read::default();
    let mut pruned = None;
    if let Some(schema) = definitions::schema(store, of) {
        let schema = schema.map_err(|error| invalid(vec![error.to_string()]))?;
        let known = schema.pruned(&kept);
        compare(&kept, &known, "", &mut read);
        // Nothing of a custom object is there that was not said.
        read.faults = schema.faults(&known, before);
        pruned = Some(known);
    } else if let Some(known) = built_in(&kind.group, &kind.kind, &kept) {
        let known = known.map_err(|error| not_read(&error))?;
        compare(&kept, &known, "", &mut read);
    }
    if !read.unknown.is_empty() && unknown == Unknown::Refused {
        let all = read.unknown.iter();
        let all: Vec<_> = all.map(|it| format!("unknown field {it:?}")).collect();
        return Err(not_read(&format!(
            "strict decoding error: {}",
            all.join(", ")
        )));
    }
    if !read.faults.is_empty() {
        return Err(invalid(read.faults));
    }
    match pruned {
        Some(known) => kept = known,
        None => read.unknown.iter().for_each(|it| take_out(&mut kept, it)),
    }
    let warnings = match unknown {
        Unknown::Warned => read.unknown.iter(),
        Unknown::Ignored | Unknown::Refused => [].iter(),
    };
    let warnings = warnings.map(|it| format!("unknown field {it:?}"));
    Ok((kept, warnings.collect()))
}

/// An object of a built-in kind as its type has it; none: of this kind nothing is known.
fn built_in(group: &str, kind: &str, object: &Value) -> Option<Result<Value, String>> {
    let read = match (group, kind) {
        ("", "ConfigMap") => typed::<ConfigMap>,
        ("", "Namespace") => typed::<Namespace>,
        ("", "Node") => typed::<Node>,
        ("", "Pod") => typed::<Pod>,
        ("", "ResourceQuota") => typed::<ResourceQuota>,
        ("", "Secret") => typed::<Secret>,
        ("", "Service") => typed::<Service>,
        ("", "ServiceAccount") => typed::<ServiceAccount>,
        ("admissionregistration.k8s.io", "ValidatingWebhookConfiguration") => {
            typed::<ValidatingWebhookConfiguration>
        }
        ("apiextensions.k8s.io", "CustomResourceDefinition") => typed::<CustomResourceDefinition>,
        ("apps", "DaemonSet") => typed::<DaemonSet>,
        ("apps", "Deployment") => typed::<Deployment>,
        ("coordination.k8s.io", "Lease") => typed::<Lease>,
        ("discovery.k8s.io", "EndpointSlice") => typed::<EndpointSlice>,
        ("networking.k8s.io", "NetworkPolicy") => typed::<NetworkPolicy>,
        ("policy", "PodDisruptionBudget") => typed::<PodDisruptionBudget>,
        ("rbac.authorization.k8s.io", "ClusterRole") => typed::<ClusterRole>,
        ("rbac.authorization.k8s.io", "ClusterRoleBinding") => typed::<ClusterRoleBinding>,
        ("rbac.authorization.k8s.io", "Role") => typed::<Role>,
        ("rbac.authorization.k8s.io", "RoleBinding") => typed::<RoleBinding>,
        ("scheduling.k8s.io", "PriorityClass") => typed::<PriorityClass>,
        _ => return None,
    };
    Some(read(object))
}

fn typed<T: DeserializeOwned + Serialize>(object: &Value) -> Result<Value, String> {
    let read = T::deserialize(object).map_err(|error| error.to_string())?;
    serde_json::to_value(read).map_err(|error| error.to_string())
}

/// What of an object is not in what was read of it, and what that has besides, as it needs it.
fn compare(said: &Value, known: &Value, path: &str, read: &mut Read) {
    let below = |name: &str| match path {
        "" => name.to_owned(),
        path => format!("{path}.{name}"),
    };
    match (said, known) {
        (Value::Object(said), Value::Object(known)) => {
            for (name, value) in said.iter().filter(|(_, it)| !it.is_null()) {
                match known.get(name) {
                    Some(known) => compare(value, known, &below(name), read),
                    None => read.unknown.push(below(name)),
                }
            }
            let missing = known.keys().filter(|it| !said.contains_key(*it));
            let missing = missing.filter(|it| *it != "metadata");
            let missing = missing.map(|it| format!("{}: Required value", below(it)));
            read.faults.extend(missing);
        }
        (Value::Array(said), Value::Array(known)) => {
            for (index, (said, known)) in said.iter().zip(known).enumerate() {
                compare(said, known, &format!("{path}[{index}]"), read);
            }
        }
        _ => {}
    }
}

/// Takes a field out, by a path of [`compare`].
fn take_out(object: &mut Value, path: &str) {
    let mut at = object;
    // Names with dots are keys of maps, which know all of them.
    let mut parts = path.split('.').peekable();
    while let Some(part) = parts.next() {
        let (name, index) = match part.split_once('[') {
            Some((name, index)) => (name, index.trim_end_matches(']').parse::<usize>().ok()),
            None => (part, None),
        };
        if parts.peek().is_none() {
            if let Some(fields) = at.as_object_mut() {
                fields.remove(name);
            }
            return;
        }
        let next = at.get_mut(name);
        let next = match index {
            Some(index) => next.and_then(|it| it.get_mut(index)),
            None => next,
        };
        match next {
            Some(next) => at = next,
            None => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::kinds::Kind;

    fn checked_set(spec: Value, unknown: Unknown) -> Result<(Value, Vec<String>), Failure> {
        let of = Collection {
            kind: Kind::built_in("apps", "v1", "DaemonSet", true),
            version: "v1".to_owned(),
            namespace: None,
            only: None,
            labels: vec![],
        };
        let store = Store::new(Kind::all_built_in());
        let object = json!({"metadata": {"name": "a", "labels": {"a.b/c": "d"}}, "spec": spec});
        let (kept, warnings) = checked(&store, &of, (object, None), unknown)?;
        Ok((kept["spec"].clone(), warnings))
    }

    fn spec(container: Value) -> Value {
        json!({"selector": {"matchLabels": {"a.b/c": "d"}}, "template": {"spec": {"containers": [container]}}})
    }

    #[test]
    fn unknown_fields_are_refused_or_go() {
        let written = spec(json!({"name": "a", "imagge": "b", "env": [{"name": "A"}]}));
        let (code, _, message) =
            checked_set(written.clone(), Unknown::Refused).expect_err("refused");
        assert_eq!(code, StatusCode::BAD_REQUEST);
        let said = "unknown field \"spec.template.spec.containers[0].imagge\"";
        assert!(message.ends_with(said), "{message}");
        let (kept, warnings) = checked_set(written.clone(), Unknown::Warned).expect("kept");
        assert_eq!(kept, spec(json!({"name": "a", "env": [{"name": "A"}]})));
        assert_eq!(warnings, [said]);
        let (_, warnings) = checked_set(written, Unknown::Ignored).expect("kept");
        assert!(warnings.is_empty());
    }

    #[test]
    fn what_lacks_something_or_is_of_another_type_is_refused() {
        for (written, said) in [
            (
                json!({"template": {"spec": {"containers": []}}}),
                "spec.selector: Required value",
            ),
            (
                spec(json!({"image": "a"})),
                "spec.template.spec.containers[0].name: Required value",
            ),
            (
                spec(json!({"name": 1})),
                "invalid type: integer `1`, expected a string",
            ),
        ] {
            let (_, _, message) = checked_set(written, Unknown::Refused).expect_err(said);
            assert!(message.contains(said), "{message}");
        }
        let good = spec(json!({"name": "a", "livenessProbe": {"httpGet": {"port": "http"}}}));
        let (kept, warnings) = checked_set(good.clone(), Unknown::Refused).expect("kept");
        assert_eq!((kept, warnings), (good, vec![]));
    }
}
