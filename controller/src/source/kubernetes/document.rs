//! An object as the API server tells it, read so that nothing in it can fail: what is wrong with it is found
//! when it is decoded, and is then a problem of that object and of no other. One object of an unexpected form
//! would otherwise be a list that cannot be read, for ever.

use std::borrow::Cow;

use kube::api::ObjectMeta;
use kube::core::{ApiResource, DynamicResourceScope, Resource};
use serde::{Deserialize, Deserializer};
use serde_json::Value;

/// An object.
#[derive(Clone, Debug)]
pub(crate) struct Document {
    /// What a watch needs of the metadata, where it is readable: name, namespace and version.
    metadata: Box<ObjectMeta>,
    /// All of it.
    pub(crate) value: Value,
}

impl Document {
    /// Its version, if that can be compared to others: larger is later, within a kind.
    pub(super) fn version(&self) -> Option<u64> {
        self.metadata.resource_version.as_deref()?.parse().ok()
    }
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
