//! Whether a schema is structural, as API servers ask it of every definition (Kubernetes, "Specifying a structural schema"): else
//! they could not tell which fields an object has.

use serde_json::Value;

/// Why a schema is not structural; empty: it is.
#[must_use]
pub fn faults(schema: &Value) -> Vec<String> {
    let mut faults = vec![];
    look_at(schema, "", &mut faults);
    if let Some(metadata) = schema["properties"].get("metadata") {
        let fields = metadata["properties"].as_object();
        let mut names = fields.into_iter().flat_map(|it| it.keys());
        if names.any(|it| !matches!(it.as_str(), "name" | "generateName")) {
            faults.push("metadata: only name and generateName can be restricted".to_owned());
        }
    }
    faults
}

fn look_at(schema: &Value, path: &str, faults: &mut Vec<String>) {
    let is = |name: &str| schema[name] == true;
    let shown = if path.is_empty() { "the root" } else { path };
    let mut fault = |what: &str| faults.push(format!("{shown}: {what}"));
    let is_of_any = is("x-kubernetes-int-or-string") || is("x-kubernetes-preserve-unknown-fields");
    match schema["type"].as_str() {
        None | Some("") if !is_of_any || path.is_empty() => fault("it has no type"),
        Some(_) if is("x-kubernetes-int-or-string") => fault("it has a type, and is of two"),
        _ => {}
    }
    for name in FORBIDDEN {
        if schema.get(name).is_some() {
            fault(&format!("{name} is forbidden"));
        }
    }
    if is("uniqueItems") {
        fault("uniqueItems is forbidden");
    }
    let additional = schema.get("additionalProperties");
    if additional.is_some() && schema.get("properties").is_some() {
        fault("it has both properties and additionalProperties");
    }
    if additional == Some(&Value::Bool(false)) {
        fault("additionalProperties must not be false");
    }
    if schema["type"] == "array" && !schema["items"].is_object() {
        fault("it has no items");
    }
    for (junctor, part) in junctors(schema) {
        let below = format!("{path}.{junctor}");
        let is_number_or_text = is("x-kubernetes-int-or-string");
        look_at_part(part, schema, &below, is_number_or_text, faults);
    }
    let properties = schema["properties"].as_object().into_iter().flatten();
    for (name, property) in properties {
        look_at(property, &format!("{path}.{name}"), faults);
    }
    let items = [schema.get("items"), additional];
    for below in items.into_iter().flatten().filter(|it| it.is_object()) {
        look_at(below, &format!("{path}[]"), faults);
    }
}

/// A part of a junctor: it restricts what is said beside it, and says nothing new.
fn look_at_part(
    part: &Value,
    beside: &Value,
    path: &str,
    is_number_or_text: bool,
    faults: &mut Vec<String>,
) {
    for name in NOT_IN_JUNCTORS {
        let is_one_of_two = name == "type" && is_number_or_text;
        if part.get(name).is_some() && !is_one_of_two {
            faults.push(format!("{path}: {name} is forbidden in it"));
        }
    }
    for (name, property) in part["properties"].as_object().into_iter().flatten() {
        let below = format!("{path}.{name}");
        match beside["properties"].get(name) {
            Some(beside) => look_at_part(property, beside, &below, false, faults),
            None => faults.push(format!("{below}: it is not said outside of it")),
        }
    }
    if let Some(items) = part.get("items") {
        let below = format!("{path}[]");
        match beside.get("items") {
            Some(beside) => look_at_part(items, beside, &below, false, faults),
            None => faults.push(format!("{below}: it is not said outside of it")),
        }
    }
    for (junctor, part) in junctors(part) {
        let below = format!("{path}.{junctor}");
        look_at_part(part, beside, &below, is_number_or_text, faults);
    }
}

/// What a schema says by logic: each part with where it is.
fn junctors(schema: &Value) -> impl Iterator<Item = (String, &Value)> {
    let lists = ["allOf", "anyOf", "oneOf"].into_iter().flat_map(|name| {
        let parts = schema[name].as_array().into_iter().flatten();
        let parts = parts.enumerate();
        parts.map(move |(index, part)| (format!("{name}[{index}]"), part))
    });
    let not = schema.get("not").map(|it| ("not".to_owned(), it));
    lists.chain(not)
}

const FORBIDDEN: [&str; 10] = [
    "$ref",
    "definitions",
    "dependencies",
    "deprecated",
    "discriminator",
    "id",
    "patternProperties",
    "readOnly",
    "writeOnly",
    "xml",
];
const NOT_IN_JUNCTORS: [&str; 5] = [
    "additionalProperties",
    "default",
    "description",
    "nullable",
    "type",
];

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_structural_passes() {
        let schema = json!({"type": "object", "properties": {
            "metadata": {"type": "object", "properties": {"name": {"type": "string"}}},
            "spec": {"type": "object", "required": ["port"], "anyOf": [{"required": ["a"]}, {"properties": {"a": {"minLength": 1}}}],
                "properties": {
                    "a": {"type": "string"},
                    "port": {"x-kubernetes-int-or-string": true, "anyOf": [{"type": "integer"}, {"type": "string"}]},
                    "labels": {"type": "object", "additionalProperties": {"type": "string"}},
                    "raw": {"x-kubernetes-preserve-unknown-fields": true},
                    "list": {"type": "array", "items": {"type": "string"}},
                }},
        }});
        assert_eq!(faults(&schema), [""; 0]);
    }

    #[test]
    fn what_is_not_says_why() {
        let spec = |spec: Value| json!({"type": "object", "properties": {"spec": spec}});
        let metadata = json!({"type": "object", "properties": {"metadata": {"type": "object", "properties": {"labels": {"type": "object"}}}}});
        for (schema, said) in [
            (json!({}), "the root: it has no type"),
            (spec(json!({})), ".spec: it has no type"),
            (spec(json!({"type": "array"})), ".spec: it has no items"),
            (
                spec(json!({"type": "array", "items": {}})),
                ".spec[]: it has no type",
            ),
            (
                spec(json!({"type": "object", "additionalProperties": {}})),
                ".spec[]: it has no type",
            ),
            (
                spec(json!({"type": "object", "additionalProperties": false})),
                ".spec: additionalProperties must not be false",
            ),
            (
                spec(
                    json!({"type": "object", "properties": {}, "additionalProperties": {"type": "string"}}),
                ),
                ".spec: it has both properties and additionalProperties",
            ),
            (
                spec(json!({"type": "object", "$ref": "a"})),
                ".spec: $ref is forbidden",
            ),
            (
                spec(json!({"type": "array", "items": {"type": "string"}, "uniqueItems": true})),
                ".spec: uniqueItems is forbidden",
            ),
            (
                spec(json!({"type": "object", "oneOf": [{"properties": {"a": {}}}]})),
                ".spec.oneOf[0].a: it is not said outside of it",
            ),
            (
                spec(json!({"type": "object", "not": {"type": "string"}})),
                ".spec.not: type is forbidden in it",
            ),
            (
                metadata,
                "metadata: only name and generateName can be restricted",
            ),
        ] {
            assert_eq!(faults(&schema), [said], "{schema}");
        }
    }
}
