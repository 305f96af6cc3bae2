//! Whether a webhook is asked about a write, by its rules and selectors: pure, but for the labels of namespaces.

use serde_json::Value;

use super::Write;
use crate::store::Store;

/// The version of the written object that a webhook is asked about; none: it is not asked.
pub(super) fn version(store: &Store, webhook: &Value, write: Write<'_>) -> Option<String> {
    let namespace = write.of.namespace.as_deref().unwrap_or_default();
    let labels = match write.of.kind.kind.as_str() {
        "Namespace" => Some(labels_of(write.now)),
        _ if write.of.kind.namespaced => {
            let found = store.object("Namespace", "", namespace);
            Some(found.map(|it| labels_of(&it)).unwrap_or_default())
        }
        _ => None,
    };
    let in_namespace = labels.is_none_or(|it| selects(&webhook["namespaceSelector"], &it));
    let of_object = |it: &Value| selects(&webhook["objectSelector"], &labels_of(it));
    let is_selected = of_object(write.now) || write.before.is_some_and(of_object);
    let rules = || webhook["rules"].as_array().into_iter().flatten();
    let asked = |version: &str| rules().any(|it| matches(it, write, version));
    if !in_namespace || !is_selected {
        return None;
    }
    if asked(&write.of.version) {
        return Some(write.of.version.clone());
    }
    let exact = webhook["matchPolicy"] == "Exact";
    let mut others = write.of.kind.versions.iter().filter(|_| !exact);
    others.find(|it| asked(it)).cloned()
}

fn labels_of(object: &Value) -> Value {
    object["metadata"]["labels"].clone()
}

fn matches(rule: &Value, write: Write<'_>, version: &str) -> bool {
    let names = |field: &str, name: &str| {
        let mut list = rule[field].as_array().into_iter().flatten();
        list.any(|it| it == name || it == "*")
    };
    let operation = match write.before {
        Some(_) => "UPDATE",
        None => "CREATE",
    };
    let in_scope = match rule["scope"].as_str() {
        Some("Cluster") => !write.of.kind.namespaced,
        Some("Namespaced") => write.of.kind.namespaced,
        _ => true,
    };
    let subresource = write.subresource.unwrap_or_default();
    let resources = rule["resources"].as_array().into_iter().flatten();
    let mut resources = resources.filter_map(Value::as_str);
    let is_resource = resources.any(|it| {
        let (resource, part) = it.split_once('/').unwrap_or((it, ""));
        let is_part = part == "*" || part == subresource;
        (resource == "*" || resource == write.of.kind.plural) && is_part
    });
    in_scope
        && is_resource
        && names("operations", operation)
        && names("apiGroups", &write.of.kind.group)
        && names("apiVersions", version)
}

/// A selector of labels; none, and an empty one, selects everything.
fn selects(selector: &Value, labels: &Value) -> bool {
    let mut equal = selector["matchLabels"].as_object().into_iter().flatten();
    let mut others = selector["matchExpressions"]
        .as_array()
        .into_iter()
        .flatten();
    equal.all(|(key, value)| labels[key] == *value)
        && others.all(|it| {
            let value = it["key"].as_str().and_then(|key| labels.get(key));
            let mut values = it["values"].as_array().into_iter().flatten();
            match it["operator"].as_str() {
                Some("In") => value.is_some_and(|value| values.any(|it| it == value)),
                Some("NotIn") => value.is_none_or(|value| values.all(|it| it != value)),
                Some("Exists") => value.is_some(),
                Some("DoesNotExist") => value.is_none(),
                _ => false,
            }
        })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::answer::Collection;
    use crate::kinds::Kind;

    /// A webhook beside what it says by itself -> whether it is asked about a Server of v2, where there is v1, too.
    #[test]
    fn webhooks_are_asked_by_rules_and_selectors() {
        let store = Store::of_mesh();
        let namespace = json!({"apiVersion": "v1", "kind": "Namespace",
            "metadata": {"name": "shop", "labels": {"tier": "a"}}});
        store.apply(&namespace).expect("applied");
        let of = Collection {
            kind: Kind::custom("policy.weft.dev", &["v1", "v2"], "Server"),
            version: "v2".to_owned(),
            namespace: Some("shop".to_owned()),
            only: None,
            labels: vec![],
        };
        let now = json!({"metadata": {"labels": {"app": "web"}}});
        let rule = |field: &str, value: Value| {
            let mut rule = json!({"apiGroups": ["policy.weft.dev"], "apiVersions": ["*"],
                "operations": ["CREATE"], "resources": ["servers"]});
            rule[field] = value;
            json!({"rules": [rule]})
        };
        let good = |field: &str, value: Value| {
            let mut webhook = rule("scope", json!("*"));
            webhook[field] = value;
            webhook
        };
        let labels = |it: Value| json!({"matchLabels": it});
        let expression = |key: &str, operator: &str, values: Value| json!({"matchExpressions": [{"key": key, "operator": operator, "values": values}]});
        for (webhook, expected) in [
            (rule("scope", json!("Namespaced")), Some("v2")),
            (rule("scope", json!("Cluster")), None),
            (rule("operations", json!(["*"])), Some("v2")),
            (rule("operations", json!(["UPDATE", "DELETE"])), None),
            (rule("resources", json!(["*"])), Some("v2")),
            (rule("resources", json!(["*/*"])), Some("v2")),
            (rule("resources", json!(["servers/*"])), Some("v2")),
            (rule("resources", json!(["servers/status"])), None),
            (rule("apiGroups", json!([""])), None),
            (rule("apiVersions", json!(["v2"])), Some("v2")),
            (rule("apiVersions", json!(["v1"])), Some("v1")),
            (rule("apiVersions", json!(["v3"])), None),
            (json!({"rules": []}), None),
            (
                good("namespaceSelector", labels(json!({"tier": "a"}))),
                Some("v2"),
            ),
            (
                good("namespaceSelector", labels(json!({"tier": "b"}))),
                None,
            ),
            (
                good(
                    "namespaceSelector",
                    expression("tier", "NotIn", json!(["a"])),
                ),
                None,
            ),
            (
                good("namespaceSelector", expression("x", "NotIn", json!(["a"]))),
                Some("v2"),
            ),
            (
                good("objectSelector", expression("app", "In", json!(["web"]))),
                Some("v2"),
            ),
            (
                good(
                    "objectSelector",
                    expression("app", "DoesNotExist", json!([])),
                ),
                None,
            ),
            (
                good("objectSelector", expression("app", "Exists", json!([]))),
                Some("v2"),
            ),
        ] {
            let write = Write {
                of: &of,
                name: "web",
                subresource: None,
                before: None,
                now: &now,
            };
            let asked = version(&store, &webhook, write);
            assert_eq!(asked.as_deref(), expected, "{webhook}");
        }
        let mut exact = rule("apiVersions", json!(["v1"]));
        exact["matchPolicy"] = json!("Exact");
        let write = Write {
            of: &of,
            name: "web",
            subresource: None,
            before: None,
            now: &now,
        };
        assert_eq!(version(&store, &exact, write), None);
    }
}
