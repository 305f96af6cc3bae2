//! One file: from bytes to documents that define objects.

use std::sync::Arc;

use serde_json::Value;

use crate::objects::{Fault, ObjectKey, decode};

/// A document that defines an object of a kind that is ours.
#[derive(Clone, Debug)]
pub(super) struct Document {
    pub(super) key: ObjectKey,
    /// Counted from 1; empty documents do not count.
    pub(super) number: usize,
    /// Where in the document the object is, for an item of a List: `items[3].`
    pub(super) prefix: String,
    pub(super) value: Arc<Value>,
}

/// What a file says.
#[derive(Debug, Default)]
pub(super) struct Contents {
    pub(super) documents: Vec<Document>,
    /// Documents that may define something, without saying what.
    pub(super) unidentified: Vec<(usize, Fault)>,
    /// Documents of kinds that a policy group has and this mesh does not.
    pub(super) unsupported: Vec<(usize, Fault)>,
    /// Documents of kinds that are not ours: namespace and name as written.
    pub(super) foreign: Vec<(usize, (String, String))>,
}

/// Reads a file's documents.
///
/// # Errors
/// The file as a whole is no YAML.
pub(super) fn read(bytes: &[u8]) -> Result<Contents, Fault> {
    let text = std::str::from_utf8(bytes).map_err(|reason| Fault::new("", reason))?;
    let mut contents = Contents::default();
    for (index, value) in decode::documents(text)?.into_iter().enumerate() {
        contents.take(index + 1, String::new(), value);
    }
    Ok(contents)
}

impl Document {
    /// Whether it has a namespace and name as written in another document.
    pub(super) fn is_named(&self, (namespace, name): &(String, String)) -> bool {
        let own = self.key.namespace.as_ref();
        self.key.name.as_str() == name && own.is_none_or(|it| it.as_str() == namespace)
    }
}

fn name_of(document: &Value) -> (String, String) {
    let text = |pointer| document.pointer(pointer).and_then(Value::as_str);
    let namespace = text("/metadata/namespace").unwrap_or("default");
    let name = text("/metadata/name").unwrap_or_default();
    (namespace.to_owned(), name.to_owned())
}

impl Contents {
    fn take(&mut self, number: usize, prefix: String, value: Value) {
        let text = |field: &str| value.get(field).and_then(Value::as_str);
        let list = text("kind").and_then(|kind| kind.strip_suffix("List"));
        if let (Some(item_kind), Some(Value::Array(_))) = (list, value.get("items")) {
            let (item_kind, version) =
                (item_kind.to_owned(), text("apiVersion").map(str::to_owned));
            self.take_items(number, &prefix, value, &item_kind, version);
            return;
        }
        match decode::identify(&value) {
            Ok(Some(key)) => self.documents.push(Document {
                key,
                number,
                prefix,
                value: Arc::new(value),
            }),
            Ok(None) => {
                let (kind, version) = (text("kind"), text("apiVersion"));
                tracing::debug!(document = number, kind, version, "a kind that is not ours");
                match decode::unsupported(&value) {
                    Some(fault) => self.unsupported.push((number, fault)),
                    None => self.foreign.push((number, name_of(&value))),
                }
            }
            Err(mut fault) => {
                fault.field = format!("{prefix}{}", fault.field);
                self.unidentified.push((number, fault));
            }
        }
    }

    /// Takes the items of a list. Those of a typed one (`PodList`) do not repeat their kind.
    fn take_items(
        &mut self,
        number: usize,
        prefix: &str,
        mut list: Value,
        item_kind: &str,
        version: Option<String>,
    ) {
        let Some(Value::Array(items)) = list.get_mut("items").map(Value::take) else {
            return;
        };
        for (index, mut item) in items.into_iter().enumerate() {
            if let (Some(fields), false) = (item.as_object_mut(), item_kind.is_empty()) {
                fields.entry("kind").or_insert_with(|| item_kind.into());
                if let Some(version) = &version {
                    let version = || version.as_str().into();
                    fields.entry("apiVersion").or_insert_with(version);
                }
            }
            self.take(number, format!("{prefix}items[{index}]."), item);
        }
    }
}
