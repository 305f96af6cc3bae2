//! A page of a list, read so that no more than one object of it is there as a whole: a page of large ones would take a
//! hundred times what is looked at in them.

use std::fmt;

use kube::core::ListMeta;
use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::document::{Document, Form, Trimmed};

/// A page.
#[derive(Debug)]
pub(super) struct Page {
    /// What it says of the list.
    pub(super) metadata: ListMeta,
    /// Its objects.
    pub(super) items: Vec<Trimmed>,
}

impl Page {
    /// Reads one in JSON, and takes in its objects.
    ///
    /// # Errors
    /// It is no list. Its objects may be whatever they are.
    pub(super) fn read(text: &str, form: &Form) -> Result<Self, serde_json::Error> {
        let mut json = serde_json::Deserializer::from_str(text);
        let page = Reading(form).deserialize(&mut json)?;
        json.end()?;
        Ok(page)
    }
}

struct Reading<'a>(&'a Form);

impl<'de> DeserializeSeed<'de> for Reading<'_> {
    type Value = Page;

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<Page, D::Error> {
        json.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Reading<'_> {
    type Value = Page;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a list of objects")
    }

    fn visit_map<M: MapAccess<'de>>(self, mut fields: M) -> Result<Page, M::Error> {
        let (mut metadata, mut items) = (ListMeta::default(), None);
        while let Some(name) = fields.next_key::<String>()? {
            match name.as_str() {
                "metadata" => metadata = fields.next_value()?,
                "items" => items = Some(fields.next_value_seed(Items(self.0))?),
                _ => drop(fields.next_value::<IgnoredAny>()?),
            }
        }
        // What does not even say that there are none is something else.
        let items = items.ok_or_else(|| M::Error::missing_field("items"))?;
        Ok(Page { metadata, items })
    }
}

/// The objects; `null` where there are none.
struct Items<'a>(&'a Form);

impl<'de> DeserializeSeed<'de> for Items<'_> {
    type Value = Vec<Trimmed>;

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<Self::Value, D::Error> {
        json.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Items<'_> {
    type Value = Vec<Trimmed>;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("objects")
    }

    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        Ok(vec![])
    }

    fn visit_seq<S: SeqAccess<'de>>(self, mut objects: S) -> Result<Self::Value, S::Error> {
        let mut items = vec![];
        while let Some(document) = objects.next_element::<Document>()? {
            items.push(self.0.take(document));
        }
        Ok(items)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objects::ObjectKind;

    #[test]
    fn a_list_is_read_whatever_its_objects_are() {
        let form = Form {
            kind: ObjectKind::Namespace,
            api_version: "v1".to_owned(),
            believe_netns: false,
        };
        let read = |text: &str| {
            let page = Page::read(text, &form).map_err(|it| it.to_string())?;
            let texts = page.items.into_iter().map(|it| it.text.into_string());
            let texts: Vec<String> = texts.collect();
            let (version, rest) = (page.metadata.resource_version, page.metadata.continue_);
            Ok::<_, String>((version, rest, texts.join(" ")))
        };
        let some = |text: &str| Some(text.to_owned());
        let list = r#"{"kind": "NamespaceList", "apiVersion": "v1", "metadata": {"resourceVersion": "7", "continue": "x"},
            "items": [{"metadata": {"name": "a", "managedFields": [1]}, "spec": {}}, 7, {"metadata": []}], "extra": {}}"#;
        let namespace = r#"{"apiVersion":"v1","kind":"Namespace","metadata":{"name":"a"}}"#;
        let strange = r#"{"apiVersion":"v1","kind":"Namespace","metadata":[]}"#;
        let expected = format!("{namespace} 7 {strange}");
        assert_eq!(read(list), Ok((some("7"), some("x"), expected)));
        for none in ["null", "[]"] {
            let empty = format!(r#"{{"items": {none}, "metadata": {{"resourceVersion": "7"}}}}"#);
            assert_eq!(read(&empty), Ok((some("7"), None, String::new())));
        }
        for bad in [
            "",
            "[]",
            "{}",
            r#"{"items": []} x"#,
            r#"{"items": 7}"#,
            r#"{"items": [{]}"#,
            r#"{"kind": "Status", "metadata": {"resourceVersion": "7"}}"#,
        ] {
            assert!(read(bad).is_err(), "{bad}");
        }
    }
}
