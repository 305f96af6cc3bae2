//! Strategic merge patches, as `kubectl apply` sends them for built-in kinds: most lists of objects are merged by a key, and
//! directives say what a merge alone cannot.

use serde_json::{Map, Value};

/// Where in an object something is: its kind, and the fields that lead there; items of lists count for none.
#[derive(Clone, Copy)]
struct Place<'a> {
    kind: &'a str,
    fields: &'a [&'a str],
}

/// How a list is patched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Merge {
    /// By items that have the same value in this field.
    By(&'static str),
    /// By values that are the same.
    Values,
    /// As a whole.
    Replaced,
}

/// An object of a kind, patched.
///
/// # Errors
/// The patch says something that no strategic merge patch has.
pub(crate) fn merged(kind: &str, target: &Value, patch: &Value) -> Result<Value, String> {
    let place = Place { kind, fields: &[] };
    place.value(Some(target), patch)
}

impl Place<'_> {
    fn value(self, target: Option<&Value>, patch: &Value) -> Result<Value, String> {
        match patch {
            Value::Object(patch) => self.object(target, patch),
            Value::Array(patch) => self.list(target, patch),
            other => Ok(other.clone()),
        }
    }

    fn object(self, target: Option<&Value>, patch: &Map<String, Value>) -> Result<Value, String> {
        let mut now = target.and_then(Value::as_object).cloned();
        let mut now = now.take().unwrap_or_default();
        match patch.get(PATCH).map(|it| it.as_str().unwrap_or_default()) {
            None | Some("merge") => {}
            Some("replace") => now.clear(),
            Some("delete") => return Ok(Value::Object(Map::new())),
            Some(other) => return Err(format!("{}: {PATCH}: {other}", self.shown())),
        }
        if let Some(kept) = patch.get(RETAIN_KEYS).and_then(Value::as_array) {
            now.retain(|name, _| kept.iter().any(|it| it == name));
        }
        for (name, value) in patch {
            if let Some(list) = name.strip_prefix(DELETE_FROM) {
                let gone = value.as_array().map_or(&[][..], Vec::as_slice);
                if let Some(list) = now.get_mut(list).and_then(Value::as_array_mut) {
                    list.retain(|it| !gone.contains(it));
                }
            } else if name == PATCH || name == RETAIN_KEYS || name.starts_with(ELEMENT_ORDER) {
                // Done before, or below.
            } else if name.starts_with('$') {
                return Err(format!("{}: {name}", self.shown()));
            } else if value.is_null() {
                now.remove(name);
            } else {
                let fields = [self.fields, &[name]].concat();
                let below = Place {
                    kind: self.kind,
                    fields: &fields,
                };
                let value = below.value(now.get(name), value)?;
                now.insert(name.clone(), value);
            }
        }
        for (name, order) in patch {
            let list = name.strip_prefix(ELEMENT_ORDER);
            let list = list.and_then(|it| Some((it, now.get_mut(it)?.as_array_mut()?)));
            if let Some((name, list)) = list {
                let fields = [self.fields, &[name]].concat();
                let below = Place {
                    kind: self.kind,
                    fields: &fields,
                };
                below.order(list, order.as_array().map_or(&[], Vec::as_slice));
            }
        }
        Ok(Value::Object(now))
    }

    fn list(self, target: Option<&Value>, patch: &[Value]) -> Result<Value, String> {
        let merge = self.merge();
        let replaces = patch.iter().any(|it| it[PATCH] == "replace");
        let before = target.and_then(Value::as_array);
        let mut now = match before {
            Some(before) if merge != Merge::Replaced && !replaces => before.clone(),
            _ => vec![],
        };
        for item in patch {
            if item == &serde_json::json!({PATCH: "replace"}) {
                continue;
            }
            let Merge::By(key) = merge else {
                if merge == Merge::Replaced || !now.contains(item) {
                    now.push(self.value(None, item)?);
                }
                continue;
            };
            if item[key].is_null() {
                return Err(format!("{}: an item has no {key}", self.shown()));
            }
            let found = now.iter().position(|it| it[key] == item[key]);
            match (found, item[PATCH] == "delete") {
                (Some(index), true) => drop(now.remove(index)),
                (None, true) => {}
                (Some(index), false) => now[index] = self.value(Some(&now[index]), item)?,
                (None, false) => now.push(self.value(None, item)?),
            }
        }
        Ok(Value::Array(now))
    }

    /// Puts items into the order of others; those that are not among these come last.
    fn order(self, list: &mut [Value], order: &[Value]) {
        let place = |item: &Value| {
            let found = order.iter().position(|it| match self.merge() {
                Merge::By(key) => it[key] == item[key],
                Merge::Values | Merge::Replaced => it == item,
            });
            found.unwrap_or(usize::MAX)
        };
        list.sort_by_key(place);
    }

    /// As the types of `k8s.io/api` say it (`patchStrategy`, `patchMergeKey`), for the kinds that are served here.
    fn merge(self) -> Merge {
        let [.., parent, field] = ["", ""]
            .iter()
            .chain(self.fields)
            .copied()
            .collect::<Vec<_>>()[..]
        else {
            return Merge::Replaced;
        };
        match (self.kind, parent, field) {
            (_, "metadata", "finalizers") => Merge::Values,
            (_, "metadata", "ownerReferences") => Merge::By("uid"),
            (_, "status", "conditions") => Merge::By("type"),
            ("Service", "spec", "ports") => Merge::By("port"),
            ("ServiceAccount", "", "secrets" | "imagePullSecrets") => Merge::By("name"),
            ("ValidatingWebhookConfiguration", "", "webhooks") => Merge::By("name"),
            (_, "webhooks", "matchConditions") => Merge::By("name"),
            (_, "spec", "containers" | "initContainers" | "volumes" | "imagePullSecrets") => {
                Merge::By("name")
            }
            (_, "spec", "hostAliases") => Merge::By("ip"),
            (_, "spec", "topologySpreadConstraints") => Merge::By("topologyKey"),
            (_, "containers" | "initContainers", "env") => Merge::By("name"),
            (_, "containers" | "initContainers", "ports") => Merge::By("containerPort"),
            (_, "containers" | "initContainers", "volumeMounts") => Merge::By("mountPath"),
            (_, "containers" | "initContainers", "volumeDevices") => Merge::By("devicePath"),
            _ => Merge::Replaced,
        }
    }

    fn shown(self) -> String {
        match self.fields {
            [] => self.kind.to_owned(),
            fields => fields.join("."),
        }
    }
}

const PATCH: &str = "$patch";
const RETAIN_KEYS: &str = "$retainKeys";
const DELETE_FROM: &str = "$deleteFromPrimitiveList/";
const ELEMENT_ORDER: &str = "$setElementOrder/";

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn spec(kind: &str, target: Value, patch: Value) -> Result<Value, String> {
        let of = |spec| json!({"spec": spec});
        merged(kind, &of(target), &of(patch)).map(|it| it["spec"].clone())
    }

    /// target, patch → what it is then
    #[test]
    fn directives_and_keys_are_followed() {
        let cases = [
            (json!({"a": 1, "b": 2}), json!({"a": null}), json!({"b": 2})),
            (
                json!({"containers": [{"name": "a", "image": "1", "env": [{"name": "A", "value": "1"}]}, {"name": "b"}]}),
                json!({"containers": [{"name": "a", "image": "2", "env": [{"name": "A", "$patch": "delete"}]}]}),
                json!({"containers": [{"name": "a", "image": "2", "env": []}, {"name": "b"}]}),
            ),
            (
                json!({"containers": [{"name": "a"}, {"name": "b"}]}),
                json!({"$setElementOrder/containers": [{"name": "c"}, {"name": "b"}],
                    "containers": [{"name": "a", "$patch": "delete"}, {"name": "c", "image": null}]}),
                json!({"containers": [{"name": "c"}, {"name": "b"}]}),
            ),
            (
                json!({"volumes": [{"name": "a", "emptyDir": {}}]}),
                json!({"volumes": [{"name": "a", "$retainKeys": ["name", "hostPath"], "hostPath": {"path": "/"}}]}),
                json!({"volumes": [{"name": "a", "hostPath": {"path": "/"}}]}),
            ),
            // Without a key a list is one value.
            (
                json!({"tolerations": [{"key": "a"}, {"key": "b"}]}),
                json!({"tolerations": [{"key": "c"}]}),
                json!({"tolerations": [{"key": "c"}]}),
            ),
            (
                json!({"volumes": [{"name": "a"}]}),
                json!({"volumes": [{"name": "b"}, {"$patch": "replace"}]}),
                json!({"volumes": [{"name": "b"}]}),
            ),
            (
                json!({"strategy": {"type": "Recreate"}}),
                json!({"strategy": {"$patch": "replace", "type": "RollingUpdate"}}),
                json!({"strategy": {"type": "RollingUpdate"}}),
            ),
        ];
        for (target, patch, expected) in cases {
            let now = spec("Pod", target, patch.clone());
            assert_eq!(now, Ok(expected), "{patch}");
        }
        let ports = |of: Value| json!({"ports": of});
        let patch = ports(json!([{"port": 1, "name": "b"}]));
        let target = ports(json!([{"port": 1, "protocol": "TCP"}, {"port": 2}]));
        let merged = ports(json!([{"port": 1, "protocol": "TCP", "name": "b"}, {"port": 2}]));
        let by_port = spec("Service", target.clone(), patch.clone());
        assert_eq!(by_port, Ok(merged));
        let of_another = spec("Pod", target, patch.clone());
        assert_eq!(of_another, Ok(patch));
    }

    #[test]
    fn values_of_lists_are_added_and_taken_away() {
        let target = json!({"metadata": {"finalizers": ["a", "b"]}});
        let patch = json!({"metadata": {"$deleteFromPrimitiveList/finalizers": ["a"], "finalizers": ["b", "c"]}});
        let expected = json!({"metadata": {"finalizers": ["b", "c"]}});
        assert_eq!(merged("Pod", &target, &patch), Ok(expected));
    }

    #[test]
    fn what_is_no_patch_is_refused() {
        for patch in [
            json!({"$patch": "append"}),
            json!({"$append": []}),
            json!({"containers": [{"image": "1"}]}),
        ] {
            assert!(spec("Pod", json!({}), patch.clone()).is_err(), "{patch}");
        }
    }
}
