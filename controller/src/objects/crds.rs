//! The custom resource definitions, generated from the types that are parsed, as YAML.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use anyhow::Context;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, CustomResourceSubresourceStatus, CustomResourceSubresources,
    JSONSchemaProps, JSONSchemaPropsOrArray,
};
use kube::CustomResourceExt;
use serde_json::{Value, json};

use super::crds_of_linkerd;
use super::policy::{
    AuthorizationPolicy, EgressNetwork, HttpLocalRateLimitPolicy, MeshTlsAuthentication,
    NetworkAuthentication, Server,
};

/// The definitions of Weft's own kinds.
pub fn definitions() -> Vec<CustomResourceDefinition> {
    let definitions = [
        Server::crd(),
        AuthorizationPolicy::crd(),
        MeshTlsAuthentication::crd(),
        NetworkAuthentication::crd(),
        HttpLocalRateLimitPolicy::crd(),
        EgressNetwork::crd(),
    ];
    let definitions = definitions.into_iter();
    definitions
        .map(|it| with_status(without_nulls(it)))
        .collect()
}

/// The same with fields that may be left out, and not be null: an API server takes such a null for a field that is left
/// out, and rules about the others need not know of it.
pub(super) fn without_nulls(mut definition: CustomResourceDefinition) -> CustomResourceDefinition {
    let schemas = definition.spec.versions.iter_mut();
    let schemas = schemas.filter_map(|it| it.schema.as_mut()?.open_api_v3_schema.as_mut());
    schemas.for_each(never_null);
    definition
}

fn never_null(schema: &mut JSONSchemaProps) {
    schema.nullable = None;
    if let Some(values) = &mut schema.enum_ {
        values.retain(|it| !it.0.is_null());
    }
    let properties = schema.properties.iter_mut();
    properties
        .flat_map(BTreeMap::values_mut)
        .for_each(never_null);
    if let Some(JSONSchemaPropsOrArray::Schema(items)) = &mut schema.items {
        never_null(items);
    }
}

/// The same with a status, which is written and never read as a part of an object: whatever is in there, the object can
/// be used.
fn with_status(mut definition: CustomResourceDefinition) -> CustomResourceDefinition {
    for version in &mut definition.spec.versions {
        version.subresources = Some(CustomResourceSubresources {
            scale: None,
            status: Some(CustomResourceSubresourceStatus(json!({}))),
        });
        let schema = version.schema.as_mut();
        let schema = schema.and_then(|it| it.open_api_v3_schema.as_mut());
        if let Some(schema) = schema {
            let properties = schema.properties.get_or_insert_default();
            properties.insert("status".to_owned(), status());
        }
    }
    definition
}

/// Conditions, as all of Kubernetes has them.
fn status() -> JSONSchemaProps {
    let text = |description: &str| of_type("string", description);
    let number = JSONSchemaProps {
        format: Some("int64".to_owned()),
        ..of_type(
            "integer",
            "The generation of the object that this is about.",
        )
    };
    let time = JSONSchemaProps {
        format: Some("date-time".to_owned()),
        ..text("Since when it holds, or does not.")
    };
    let condition = JSONSchemaProps {
        properties: Some(BTreeMap::from([
            (
                "type".to_owned(),
                text("Accepted, Programmed or ResolvedRefs."),
            ),
            ("status".to_owned(), text("True, False or Unknown.")),
            ("reason".to_owned(), text("Why, in one word.")),
            ("message".to_owned(), text("Why, for people.")),
            ("observedGeneration".to_owned(), number),
            ("lastTransitionTime".to_owned(), time),
        ])),
        required: Some(vec!["type".to_owned(), "status".to_owned()]),
        ..of_type("object", "Whether something holds.")
    };
    let conditions = JSONSchemaProps {
        items: Some(JSONSchemaPropsOrArray::Schema(Box::new(condition))),
        x_kubernetes_list_type: Some("map".to_owned()),
        x_kubernetes_list_map_keys: Some(vec!["type".to_owned()]),
        ..of_type("array", "What the controller says about it.")
    };
    JSONSchemaProps {
        properties: Some(BTreeMap::from([("conditions".to_owned(), conditions)])),
        ..of_type("object", "Written by the controller.")
    }
}

fn of_type(name: &str, description: &str) -> JSONSchemaProps {
    JSONSchemaProps {
        type_: Some(name.to_owned()),
        description: Some(description.to_owned()),
        ..JSONSchemaProps::default()
    }
}

/// File name and content of each definition.
///
/// # Errors
/// A definition cannot be written as JSON, which would be a bug.
fn files(definitions: Vec<CustomResourceDefinition>) -> anyhow::Result<Vec<(String, String)>> {
    let file = |crd: CustomResourceDefinition| {
        let name = crd
            .metadata
            .name
            .clone()
            .context("a definition without a name")?;
        let mut value = serde_json::to_value(crd)?;
        if let Some(fields) = value.as_object_mut() {
            fields.remove("status");
        }
        let mut text = String::from("# Generated by `weft-controller crds`.\n");
        yaml(&mut text, &value, 0);
        Ok((format!("{name}.yaml"), text))
    };
    definitions.into_iter().map(file).collect()
}

/// Writes the definitions of Weft's kinds, or of Linkerd's, into a directory.
///
/// # Errors
/// It cannot be written to.
pub fn write(directory: &Path, of_linkerd: bool) -> anyhow::Result<()> {
    let definitions = match of_linkerd {
        true => crds_of_linkerd::definitions()?,
        false => definitions(),
    };
    std::fs::create_dir_all(directory)
        .with_context(|| format!("creating {}", directory.display()))?;
    for (name, text) in files(definitions)? {
        let path = directory.join(name);
        std::fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

/// Writes a value as YAML in block style. Texts are in double quotes as in JSON, which YAML
/// shares, unless they are plain words.
fn yaml(text: &mut String, value: &Value, depth: usize) {
    match value {
        Value::Object(fields) if !fields.is_empty() => {
            for (name, value) in fields {
                indent(text, depth);
                text.push_str(&scalar(name));
                text.push(':');
                nested(text, value, depth + 1);
            }
        }
        Value::Array(items) if !items.is_empty() => {
            for item in items {
                indent(text, depth);
                text.push('-');
                match item {
                    Value::Object(fields) if !fields.is_empty() => {
                        let mut block = String::new();
                        yaml(&mut block, item, depth + 1);
                        // The first field stands behind the dash.
                        text.push(' ');
                        text.push_str(block.trim_start());
                    }
                    _ => nested(text, item, depth + 1),
                }
            }
        }
        _ => {
            indent(text, depth);
            text.push_str(&inline(value));
            text.push('\n');
        }
    }
}

fn nested(text: &mut String, value: &Value, depth: usize) {
    let block = match value {
        Value::Object(fields) => !fields.is_empty(),
        Value::Array(items) => !items.is_empty(),
        _ => false,
    };
    if block {
        text.push('\n');
        yaml(text, value, depth);
    } else {
        // Writing to a String cannot fail.
        let _ = writeln!(text, " {}", inline(value));
    }
}

fn inline(value: &Value) -> String {
    match value {
        Value::String(text) => scalar(text),
        other => other.to_string(),
    }
}

fn scalar(text: &str) -> String {
    let word = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'/' | b'-' | b'_');
    let plain = text.bytes().all(word)
        && text.starts_with(|it: char| it.is_ascii_alphabetic())
        && !matches!(
            text.to_ascii_lowercase().as_str(),
            "true" | "false" | "null" | "yes" | "no" | "on" | "off" | "y" | "n"
        );
    if plain {
        text.to_owned()
    } else {
        Value::from(text).to_string()
    }
}

fn indent(text: &mut String, depth: usize) {
    for _ in 0..depth {
        text.push_str("  ");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objects::ObjectKind;

    /// Of both groups, with the folder that each is in.
    fn all() -> Vec<(&'static str, String, String)> {
        let linkerd = crds_of_linkerd::definitions().expect("definitions");
        let of = |folder, definitions| {
            let files = files(definitions).expect("written").into_iter();
            files.map(move |(name, text)| (folder, name, text))
        };
        let weft = of("crds", definitions());
        weft.chain(of("components/crds-linkerd", linkerd)).collect()
    }

    #[test]
    fn what_is_written_reads_back_the_same() {
        for (_, name, text) in all() {
            let read: Value = serde_saphyr::from_str(&text).expect(&name);
            let crd: CustomResourceDefinition =
                serde_json::from_value(read.clone()).expect("a definition");
            let again = serde_json::to_value(&crd).expect("written");
            assert_eq!(again["spec"], read["spec"], "{name}");
        }
    }

    /// The definitions that are installed are those of the types: `cargo xtask crds` writes them.
    #[test]
    fn the_committed_definitions_are_up_to_date() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../daemonset");
        for (folder, name, text) in all() {
            let committed = std::fs::read_to_string(root.join(folder).join(&name));
            assert!(
                committed.unwrap_or_default() == text,
                "daemonset/{folder}/{name} is out of date: run cargo xtask crds"
            );
        }
    }

    /// What is read of Linkerd's is served, and nothing else; one version is stored.
    #[test]
    fn versions_are_those_that_are_read() {
        for definition in crds_of_linkerd::definitions().expect("definitions") {
            let spec = &definition.spec;
            let kind = ObjectKind::find(&spec.group, &spec.names.kind).expect("a kind");
            let names: Vec<_> = spec.versions.iter().map(|it| it.name.as_str()).collect();
            assert_eq!(names, kind.versions(), "{kind}");
            let stored = spec.versions.iter().filter(|it| it.storage);
            assert_eq!(stored.count(), 1, "{kind}");
        }
    }
}
