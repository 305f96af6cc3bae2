//! An object as the API server tells it, read so that nothing in it can fail: what is wrong with it is found
//! when it is decoded, and is then a problem of that object and of no other. One object of an unexpected form
//! would otherwise be a list that cannot be read, for ever.

use std::borrow::Cow;

use kube::api::ObjectMeta;
use kube::core::{ApiResource, DynamicResourceScope, Resource};
use serde::{Deserialize, Deserializer};
use serde_json::{Value, json};

use weft_core::Name;

use super::trim::trim;
use crate::objects::{Fault, ObjectKey, ObjectKind};

/// An object.
#[derive(Clone, Debug)]
pub(crate) struct Document {
    /// What a watch needs of the metadata, where it is readable: name, namespace and version.
    metadata: Box<ObjectMeta>,
    /// All of it.
    pub(crate) value: Value,
}

/// What of an object is looked at.
#[derive(Clone, Debug)]
pub(super) struct Trimmed {
    /// Its name, if it has one.
    pub(super) key: Result<ObjectKey, Fault>,
    /// Its version, if that can be compared to others.
    pub(super) version: Option<u64>,
    /// It, in JSON: what waits to be taken in may be a whole cluster, and takes least as text.
    pub(super) text: Box<str>,
}

/// How objects of a kind are taken in: what is not looked at is dropped before they wait for anybody.
#[derive(Clone, Debug)]
pub(super) struct Form {
    /// Their kind.
    pub(super) kind: ObjectKind,
    /// The version in which they are told.
    pub(super) api_version: String,
    /// Whether annotations say where the network namespaces of pods are.
    pub(super) believe_netns: bool,
}

impl Form {
    /// Leaves of an object what is looked at, with the kind and version that items of lists do not say.
    pub(super) fn take(&self, document: Document) -> Trimmed {
        let Document {
            metadata,
            mut value,
        } = document;
        if let Value::Object(fields) = &mut value {
            fields.insert("apiVersion".to_owned(), json!(self.api_version));
            fields.insert("kind".to_owned(), json!(self.kind.as_str()));
        }
        trim(self.kind, &mut value, self.believe_netns);
        let version = metadata.resource_version.as_deref();
        Trimmed {
            key: self.key_of(&value),
            version: version.and_then(comparable),
            text: value.to_string().into(),
        }
    }

    fn key_of(&self, value: &Value) -> Result<ObjectKey, Fault> {
        let kind = self.kind;
        let name = |field: &str| -> Result<Name, Fault> {
            let place = format!("{}: metadata.{field}", kind.as_str());
            let text = value.get("metadata").and_then(|it| it.get(field));
            match text.and_then(Value::as_str).map(str::parse) {
                Some(Ok(name)) => Ok(name),
                Some(Err(reason)) => Err(Fault::new(place, reason)),
                None => Err(Fault::new(place, "missing, or no text")),
            }
        };
        let namespace = kind.is_namespaced().then(|| name("namespace"));
        Ok(ObjectKey {
            kind,
            namespace: namespace.transpose()?,
            name: name("name")?,
        })
    }
}

/// A `resourceVersion` as a number: larger is later, within a kind.
pub(super) fn comparable(version: &str) -> Option<u64> {
    version.parse().ok()
}

impl From<Value> for Document {
    fn from(value: Value) -> Self {
        let text = |field: &str| {
            let text = value.get("metadata")?.get(field)?.as_str()?;
            Some(text.to_owned())
        };
        let metadata = ObjectMeta {
            name: text("name"),
            namespace: text("namespace"),
            resource_version: text("resourceVersion"),
            ..ObjectMeta::default()
        };
        Self {
            metadata: Box::new(metadata),
            value,
        }
    }
}

impl<'de> Deserialize<'de> for Document {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut value = Value::deserialize(deserializer)?;
        // Often half of an object, and of no use: not to be kept for a page of them.
        if let Some(Value::Object(metadata)) = value.get_mut("metadata") {
            metadata.remove("managedFields");
        }
        Ok(value.into())
    }
}

impl Resource for Document {
    type DynamicType = ApiResource;
    type Scope = DynamicResourceScope;

    fn kind(resource: &ApiResource) -> Cow<'_, str> {
        resource.kind.as_str().into()
    }

    fn group(resource: &ApiResource) -> Cow<'_, str> {
        resource.group.as_str().into()
    }

    fn version(resource: &ApiResource) -> Cow<'_, str> {
        resource.version.as_str().into()
    }

    fn api_version(resource: &ApiResource) -> Cow<'_, str> {
        resource.api_version.as_str().into()
    }

    fn plural(resource: &ApiResource) -> Cow<'_, str> {
        resource.plural.as_str().into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}
