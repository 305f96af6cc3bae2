//! What a custom resource definition says about objects of its kind: fields that it does not know go, and what its
//! schema or its rules (CEL, by kube-rs' own evaluator) refuse is refused.

use anyhow::Context;
use kube_cel::{CompiledSchema, Validator};
use regex::Regex;
use serde_json::{Map, Value};

/// The schema of one version of a definition.
#[derive(Debug)]
pub struct Schema {
    written: Value,
    rules: CompiledSchema,
}

impl Schema {
    /// That of a version.
    ///
    /// # Errors
    /// There is none, or a rule of it cannot be read.
    pub fn of(definition: &Value, version: &str) -> anyhow::Result<Self> {
        let versions = definition["spec"]["versions"].as_array();
        let mut versions = versions.into_iter().flatten();
        let found = versions.find(|it| it["name"] == version);
        let found = found.with_context(|| format!("there is no version {version}"))?;
        let written = found["schema"]["openAPIV3Schema"].clone();
        let rules = kube_cel::compile_schema(&written);
        let unreadable = unreadable(&rules);
        anyhow::ensure!(unreadable.is_empty(), "{}", unreadable.join("; "));
        Ok(Self { written, rules })
    }

    /// An object as it is kept: without fields that the schema does not know, and without nulls that it does not allow.
    #[must_use]
    pub fn pruned(&self, object: &Value) -> Value {
        let mut kept = pruned(&self.written, object);
        for field in ["apiVersion", "kind", "metadata"] {
            if let Some(value) = object.get(field) {
                kept[field] = value.clone();
            }
        }
        kept
    }

    /// Why an object is refused, in place of another or anew; empty: it is not.
    #[must_use]
    pub fn faults(&self, object: &Value, before: Option<&Value>) -> Vec<String> {
        let mut faults = vec![];
        check(&self.written, object, "", &mut faults);
        // Rules may rely on the schema.
        if faults.is_empty()
            && let Err(errors) = Validator::new().validate_compiled(&self.rules, object, before)
        {
            let errors = errors.as_slice().iter();
            faults.extend(
                errors.map(|it| format!("{}: Invalid value: {}", it.field_path, it.message)),
            );
        }
        faults
    }
}

/// Rules that are none.
fn unreadable(schema: &CompiledSchema) -> Vec<String> {
    let below = schema.properties.values();
    let below = below.chain(schema.items.as_deref());
    let below = below.chain(schema.additional_properties.as_deref());
    let own = schema.compilation_errors();
    let own = own.into_iter().map(ToString::to_string);
    own.chain(below.flat_map(unreadable)).collect()
}

fn pruned(schema: &Value, value: &Value) -> Value {
    if schema["x-kubernetes-preserve-unknown-fields"] == true {
        return value.clone();
    }
    match value {
        Value::Object(fields) => {
            let known = |name: &str| match schema["properties"].get(name) {
                Some(known) => Some(known),
                None => schema
                    .get("additionalProperties")
                    .filter(|it| **it != Value::Bool(false)),
            };
            let kept = fields.iter().filter_map(|(name, value)| {
                let known = known(name)?;
                let is_said = !value.is_null() || known["nullable"] == true;
                is_said.then(|| (name.clone(), pruned(known, value)))
            });
            Value::Object(kept.collect::<Map<_, _>>())
        }
        Value::Array(items) => items
            .iter()
            .map(|it| pruned(&schema["items"], it))
            .collect(),
        other => other.clone(),
    }
}

/// As far as the definitions of these tests say something.
fn check(schema: &Value, value: &Value, path: &str, faults: &mut Vec<String>) {
    if value.is_null() && schema["nullable"] == true {
        return;
    }
    let is_number_or_text = schema["x-kubernetes-int-or-string"] == true;
    let is_of_type = match schema["type"].as_str() {
        _ if is_number_or_text => value.is_i64() || value.is_u64() || value.is_string(),
        Some("object") => value.is_object(),
        Some("array") => value.is_array(),
        Some("string") => value.is_string(),
        Some("integer") => value.is_i64() || value.is_u64(),
        Some("number") => value.is_number(),
        Some("boolean") => value.is_boolean(),
        _ => true,
    };
    let mut fault = |what: String| faults.push(format!("{path}: {what}"));
    if !is_of_type {
        return fault(format!("Invalid value: must be of type {}", schema["type"]));
    }
    if let Some(allowed) = schema["enum"].as_array().filter(|it| !it.contains(value)) {
        fault(format!(
            "Unsupported value: {value}: supported values: {allowed:?}"
        ));
    }
    let limit = |name: &str| schema[name].as_f64();
    let mut within = |size: Option<f64>, least: &str, most: &str| {
        let Some(size) = size else { return };
        if limit(least).is_some_and(|it| size < it) || limit(most).is_some_and(|it| size > it) {
            let bounds = format!("{least} {}, {most} {}", schema[least], schema[most]);
            fault(format!("Invalid value: not within {bounds}"));
        }
    };
    let length = |it: usize| f64::from(u32::try_from(it).unwrap_or(u32::MAX));
    within(value.as_f64(), "minimum", "maximum");
    within(
        value.as_str().map(|it| length(it.chars().count())),
        "minLength",
        "maxLength",
    );
    within(
        value.as_array().map(|it| length(it.len())),
        "minItems",
        "maxItems",
    );
    within(
        value.as_object().map(|it| length(it.len())),
        "minProperties",
        "maxProperties",
    );
    if let (Some(text), Some(pattern)) = (value.as_str(), schema["pattern"].as_str()) {
        let matches = Regex::new(pattern).is_ok_and(|it| it.is_match(text));
        if !matches {
            fault(format!("Invalid value: {text:?}: should match '{pattern}'"));
        }
    }
    for name in schema["required"].as_array().into_iter().flatten() {
        let name = name.as_str().unwrap_or_default();
        if value.get(name).is_none() {
            fault(format!("{name}: Required value"));
        }
    }
    let below = |name: &str| match path {
        "" => name.to_owned(),
        path => format!("{path}.{name}"),
    };
    for (name, value) in value.as_object().into_iter().flatten() {
        let known = schema["properties"].get(name);
        let known = known.or(schema.get("additionalProperties"));
        if let Some(known) = known {
            check(known, value, &below(name), faults);
        }
    }
    for (index, value) in value.as_array().into_iter().flatten().enumerate() {
        check(&schema["items"], value, &format!("{path}[{index}]"), faults);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn schema() -> Schema {
        let rule = json!([{"rule": "self.least <= self.most", "message": "least is more than most"},
            {"rule": "self.most >= oldSelf.most", "message": "most never falls"}]);
        let spec = json!({"type": "object", "required": ["most"], "x-kubernetes-validations": rule, "properties": {
            "least": {"type": "integer", "minimum": 1},
            "most": {"type": "integer"},
            "port": {"x-kubernetes-int-or-string": true, "maximum": 10, "pattern": "^[a-z]+$"},
            "names": {"type": "array", "maxItems": 2, "items": {"type": "string", "enum": ["a", "b"]}},
        }});
        let written = json!({"type": "object", "properties": {"spec": spec}});
        let version = json!({"name": "v1", "schema": {"openAPIV3Schema": written}});
        let definition = json!({"spec": {"versions": [version]}});
        Schema::of(&definition, "v1").expect("a schema")
    }

    #[test]
    fn what_is_not_known_goes() {
        let object = json!({"kind": "A", "metadata": {"name": "a"}, "other": 1,
            "spec": {"most": 1, "least": null, "names": ["a"], "mots": 2}});
        let kept =
            json!({"kind": "A", "metadata": {"name": "a"}, "spec": {"most": 1, "names": ["a"]}});
        assert_eq!(schema().pruned(&object), kept);
    }

    #[test]
    fn schemas_and_rules_refuse() {
        let schema = schema();
        for (spec, said) in [
            (
                json!({"least": 1, "most": 2, "port": 10, "names": ["a"]}),
                None,
            ),
            (json!({"least": 1, "most": 2, "port": "http"}), None),
            (json!({"least": 1}), Some("spec: most: Required value")),
            (
                json!({"least": 0, "most": 1}),
                Some("spec.least: Invalid value: not within"),
            ),
            (
                json!({"least": "1", "most": 1}),
                Some("spec.least: Invalid value: must be of"),
            ),
            (
                json!({"least": 1, "most": 2, "port": 11}),
                Some("spec.port: Invalid value"),
            ),
            (
                json!({"least": 1, "most": 2, "port": "11"}),
                Some("should match '^[a-z]+$'"),
            ),
            (
                json!({"least": 1, "most": 2, "names": ["c"]}),
                Some("spec.names[0]: Unsupported"),
            ),
            (
                json!({"least": 1, "most": 2, "names": ["a", "b", "a"]}),
                Some("maxItems 2"),
            ),
            (
                json!({"least": 2, "most": 1}),
                Some("spec: Invalid value: least is more than most"),
            ),
        ] {
            let faults = schema.faults(&json!({"spec": spec}), None);
            match said {
                None => assert!(faults.is_empty(), "{spec}: {faults:?}"),
                Some(said) => assert!(faults.join("\n").contains(said), "{spec}: {faults:?}"),
            }
        }
        let [less, more] = [1, 2].map(|it| json!({"spec": {"least": 1, "most": it}}));
        assert!(schema.faults(&more, Some(&less)).is_empty());
        let faults = schema.faults(&less, Some(&more));
        assert!(faults.join("\n").contains("most never falls"), "{faults:?}");
    }

    #[test]
    fn rules_that_are_none_are_told() {
        let written = json!({"type": "object", "x-kubernetes-validations": [{"rule": "self."}]});
        let version = json!({"name": "v1", "schema": {"openAPIV3Schema": written}});
        let definition = json!({"spec": {"versions": [version]}});
        assert!(Schema::of(&definition, "v1").is_err());
        assert!(Schema::of(&definition, "v2").is_err());
    }
}
