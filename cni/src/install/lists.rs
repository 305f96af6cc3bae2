//! Lists of plugins, as text: this one is put in and taken out, and all else stays as it is written, to the letter.

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;
use serde_json::{Value, json};

use crate::call::{CniVersion, Settings};

/// Why a file is of no use to a runtime, or not to this plugin.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct Unusable {
    text: String,
    is_used: bool,
}

/// A list with this plugin in it, if that is another one than before.
pub type Changed = Option<String>;

/// The plugin's entry in lists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    text: String,
    by: By,
}

/// Whose an entry is. During an upgrade there are two installers for a while, and the later one is right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    /// That of an installer that was first run then.
    Installer(Stamp),
    /// Anybody's will do.
    Anybody,
}

/// When an installer was run first, in milliseconds since 1970: of two the greater one is the newer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Stamp(pub u64);

/// An object whose fields stay in order, and as they are written.
struct Object(Vec<(String, Box<RawValue>)>);

#[derive(Deserialize)]
struct Typed {
    #[serde(rename = "type", default)]
    kind: String,
}

impl Unusable {
    fn new(text: String) -> Self {
        Self {
            text,
            is_used: false,
        }
    }

    /// Whether runtimes use the file all the same: it only has no chains.
    pub fn is_used(&self) -> bool {
        self.is_used
    }
}

impl Entry {
    /// With these settings, by an installer that was run first at that time.
    pub fn new(settings: &Settings, stamp: Stamp) -> Self {
        let Stamp(at) = stamp;
        Self {
            text: json!({"type": TYPE, "weft": settings, INSTALLED_AT: at}).to_string(),
            by: By::Installer(stamp),
        }
    }

    /// The same, for those who only want to know whether there is one: whose it is does not matter.
    #[must_use]
    pub fn of_anybody(self) -> Self {
        Self {
            by: By::Anybody,
            ..self
        }
    }

    /// Whether one that is in a list may stay: it is this one, or that of a newer installer.
    fn lets_stay(&self, other: &str) -> bool {
        match self.by {
            By::Anybody => true,
            By::Installer(stamp) => stamp_of(other) > stamp || same(other, &self.text),
        }
    }

    /// Puts the plugin at the end of a list. None: it is there already, as it should be.
    ///
    /// # Errors
    /// It is no list, or one of a version without chains.
    pub fn put_into(&self, text: &str) -> Result<Changed, Unusable> {
        let list = Object::parse(text)?;
        let plugins = list.plugins()?;
        list.check_version()?;
        let (own, others): (Vec<_>, Vec<_>) = plugins.into_iter().partition(|it| it.is_own);
        if others.is_empty() {
            return Err(Unusable::new("it has no plugin".to_owned()));
        }
        if let [only] = &own[..]
            && only.index > 0
            && self.lets_stay(only.raw.get())
        {
            return Ok(None);
        }
        let texts = others.iter().map(|it| it.raw.get());
        Ok(Some(list.with_plugins(texts.chain([self.text.as_str()]))))
    }

    /// Makes a list of a single plugin's configuration and this plugin.
    ///
    /// # Errors
    /// It is no configuration, or one of a version without chains.
    pub fn after(&self, text: &str) -> Result<String, Unusable> {
        let config = Object::parse(text)?;
        let typed: Typed =
            serde_json::from_str(text).map_err(|error| Unusable::new(error.to_string()))?;
        if typed.kind.is_empty() {
            return Err(Unusable::new("it names no type of plugin".to_owned()));
        }
        config.check_version()?;
        if typed.kind == TYPE {
            return Err(Unusable::new("it has no other plugin".to_owned()));
        }
        let fields = config.0.iter();
        let fields = fields.filter(|(name, _)| matches!(name.as_str(), "cniVersion" | "name"));
        let mut list: Vec<_> = fields.cloned().collect();
        list.push(("plugins".to_owned(), RawValue::NULL.to_owned()));
        Ok(Object(list).with_plugins([text.trim(), self.text.as_str()].into_iter()))
    }
}

/// When the installer was run first that put the plugin into a list; none: it is not there.
pub fn installed_at(text: &str) -> Option<Stamp> {
    let plugins = Object::parse(text).and_then(|it| it.plugins()).ok()?;
    let own = plugins.iter().filter(|it| it.is_own);
    own.map(|it| stamp_of(it.raw.get())).max()
}

/// Takes the plugin out of a list. None: it is not there. An empty text: nothing else was in it.
///
/// # Errors
/// It is no list.
pub fn take_out(text: &str) -> Result<Changed, Unusable> {
    let list = Object::parse(text)?;
    let plugins = list.plugins()?;
    let others: Vec<_> = plugins.iter().filter(|it| !it.is_own).collect();
    if others.len() == plugins.len() {
        return Ok(None);
    }
    if others.is_empty() {
        return Ok(Some(String::new()));
    }
    Ok(Some(
        list.with_plugins(others.iter().map(|it| it.raw.get())),
    ))
}

struct Plugin {
    index: usize,
    is_own: bool,
    raw: Box<RawValue>,
}

impl Object {
    fn parse(text: &str) -> Result<Self, Unusable> {
        serde_json::from_str(text).map_err(|error| Unusable::new(error.to_string()))
    }

    fn field(&self, name: &str) -> Option<&RawValue> {
        // Of two of the same name runtimes take the last.
        let mut fields = self.0.iter().rev();
        fields.find(|it| it.0 == name).map(|it| &*it.1)
    }

    fn check_version(&self) -> Result<(), Unusable> {
        let written = self.field("cniVersion").map(RawValue::get);
        let version: String = written
            .and_then(|it| serde_json::from_str(it).ok())
            .unwrap_or_default();
        match CniVersion::parse(&version) {
            Ok(_) => Ok(()),
            Err(failure) => Err(Unusable {
                text: failure.to_string(),
                is_used: true,
            }),
        }
    }

    fn plugins(&self) -> Result<Vec<Plugin>, Unusable> {
        let raw = self.field("plugins");
        let raw = raw.ok_or_else(|| Unusable::new("it has no plugins".to_owned()))?;
        let plugins: Vec<Box<RawValue>> = serde_json::from_str(raw.get())
            .map_err(|error| Unusable::new(format!("plugins: {error}")))?;
        let typed = |(index, raw): (usize, Box<RawValue>)| {
            let typed: Typed = serde_json::from_str(raw.get())
                .map_err(|error| Unusable::new(format!("plugins[{index}]: {error}")))?;
            let is_own = typed.kind == TYPE;
            Ok(Plugin { index, is_own, raw })
        };
        plugins.into_iter().enumerate().map(typed).collect()
    }

    fn with_plugins<'a>(&self, plugins: impl Iterator<Item = &'a str>) -> String {
        let mut plugins = Some(
            plugins
                .map(|it| format!("\n    {it}"))
                .collect::<Vec<_>>()
                .join(","),
        );
        let mut lines = Vec::new();
        for (name, value) in &self.0 {
            // A text is always written.
            let name_text = Value::from(name.as_str()).to_string();
            if name != "plugins" {
                lines.push(format!("  {name_text}: {value}"));
            } else if let Some(plugins) = plugins.take() {
                lines.push(format!("  {name_text}: [{plugins}\n  ]"));
            }
        }
        format!("{{\n{}\n}}\n", lines.join(",\n"))
    }
}

impl<'de> Deserialize<'de> for Object {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;

        impl<'de> Visitor<'de> for Fields {
            type Value = Object;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Object, A::Error> {
                let mut fields = Vec::new();
                while let Some(field) = map.next_entry()? {
                    fields.push(field);
                }
                Ok(Object(fields))
            }
        }

        deserializer.deserialize_map(Fields)
    }
}

/// The stamp of an entry. One of a version that had none is the oldest.
fn stamp_of(entry: &str) -> Stamp {
    let entry: Option<Value> = serde_json::from_str(entry).ok();
    let stamp = entry.and_then(|it| it[INSTALLED_AT].as_u64());
    stamp.map(Stamp).unwrap_or_default()
}

/// Whether two texts say the same.
fn same(one: &str, other: &str) -> bool {
    let value = |text: &str| serde_json::from_str::<Value>(text).ok();
    value(one) == value(other)
}

/// The name of the plugin: that of its program.
pub const TYPE: &str = "weft-cni";
/// The field of the entry that is for installers. The plugin does not look at it.
const INSTALLED_AT: &str = "weftInstalledAtMs";

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn entry() -> Entry {
        Entry::new(&Settings::default(), Stamp(7))
    }

    fn types(text: &str) -> Vec<String> {
        let list: Value = serde_json::from_str(text).expect("JSON");
        let plugins = list["plugins"].as_array().expect("plugins");
        let types = plugins
            .iter()
            .map(|it| it["type"].as_str().expect("a type"));
        types.map(str::to_owned).collect()
    }

    const LIST: &str = r#"{
  "name": "k8s-pod-network", "cniVersion": "0.3.1",
  "plugins": [
    {"type": "calico",  "mtu": 0, "precise": 12345678901234567890.10, "b": 1, "a": 2},
    {"type": "portmap", "snat": true, "capabilities": {"portMappings": true}}
  ],
  "x": [ ]
}"#;

    #[test]
    fn a_list_gets_the_plugin_at_its_end_and_loses_nothing() {
        let put = entry().put_into(LIST).expect("a list").expect("changed");
        assert_eq!(types(&put), ["calico", "portmap", "weft-cni"]);
        for kept in [
            r#"{"type": "calico",  "mtu": 0, "precise": 12345678901234567890.10, "b": 1, "a": 2}"#,
            r#""x": [ ]"#,
        ] {
            assert!(put.contains(kept), "{put}");
        }
        assert_eq!(entry().put_into(&put), Ok(None));
        let out = take_out(&put).expect("a list").expect("changed");
        let value = |text: &str| serde_json::from_str::<Value>(text).expect("JSON");
        assert_eq!(value(&out), value(LIST));
        assert_eq!(take_out(&out), Ok(None));
    }

    #[test]
    fn what_was_put_in_otherwise_is_put_right() {
        let put = entry().put_into(LIST).expect("a list").expect("changed");
        let settings = Settings {
            wait_seconds: 3,
            ..Settings::default()
        };
        let other = Entry::new(&settings, Stamp(7))
            .put_into(&put)
            .expect("a list")
            .expect("changed");
        assert_eq!(types(&other), ["calico", "portmap", "weft-cni"]);
        assert!(other.contains("\"waitSeconds\":3"));
        assert_eq!(entry().of_anybody().put_into(&other), Ok(None));
        let missing = entry().of_anybody().put_into(LIST);
        assert_eq!(missing, entry().put_into(LIST));
        let first = r#"{"cniVersion":"1.0.0","plugins":[{"type":"weft-cni"},{"type":"a"},{"type":"weft-cni"}]}"#;
        let put = entry().put_into(first).expect("a list").expect("changed");
        assert_eq!(types(&put), ["a", "weft-cni"]);
        // Another that was added behind it may stay there.
        let behind = put.replace("\n  ]", ",{\"type\":\"b\"}\n  ]");
        assert_eq!(types(&behind), ["a", "weft-cni", "b"]);
        assert_eq!(entry().put_into(&behind), Ok(None));
    }

    #[test]
    fn of_two_installers_the_newer_one_is_right() {
        let settings = |wait_seconds| Settings {
            wait_seconds,
            ..Settings::default()
        };
        let (older, newer) = (
            Entry::new(&settings(3), Stamp(1)),
            Entry::new(&settings(4), Stamp(2)),
        );
        let put = |entry: &Entry, text: &str| entry.put_into(text).expect("a list");
        assert_eq!(installed_at(LIST), None);
        let by_older = put(&older, LIST).expect("changed");
        assert_eq!(installed_at(&by_older), Some(Stamp(1)));
        let by_newer = put(&newer, &by_older).expect("changed");
        assert_eq!(installed_at(&by_newer), Some(Stamp(2)));
        assert!(by_newer.contains("\"waitSeconds\":4"), "{by_newer}");
        assert_eq!(put(&older, &by_newer), None);
        // One without a stamp is of an older version.
        let unstamped = by_newer.replace("weftInstalledAtMs", "other");
        assert_eq!(installed_at(&unstamped), Some(Stamp(0)));
        assert!(put(&older, &unstamped).is_some());
    }

    #[test]
    fn a_single_configuration_becomes_a_list() {
        let single = r#"{"cniVersion": "1.0.0", "name": "bridge", "type": "bridge", "ipam": {"type": "host-local"}}"#;
        let list = entry().after(single).expect("a configuration");
        assert_eq!(types(&list), ["bridge", "weft-cni"]);
        assert!(list.contains(single));
        let value: Value = serde_json::from_str(&list).expect("JSON");
        assert_eq!(
            (&value["cniVersion"], &value["name"]),
            (&json!("1.0.0"), &json!("bridge"))
        );
        assert_eq!(entry().put_into(&list), Ok(None));
    }

    #[test]
    fn what_cannot_be_used_is_left_alone() {
        let only = r#"{"cniVersion":"1.0.0","plugins":[{"type":"weft-cni"}]}"#;
        for bad in [
            "",
            "[]",
            "{\"cniVersion\":\"1.0.0\"}",
            "{\"cniVersion\":\"1.0.0\",\"plugins\":[]}",
            "{\"cniVersion\":\"1.0.0\",\"plugins\":[1]}",
            "{\"cniVersion\":\"0.2.0\",\"plugins\":[{\"type\":\"a\"}]}",
            "{\"plugins\":[{\"type\":\"a\"}]}",
            &LIST[..LIST.len() - 1],
            only,
        ] {
            assert!(entry().put_into(bad).is_err(), "{bad:?}");
        }
        assert_eq!(take_out(only), Ok(Some(String::new())));
        for bad in [
            "",
            "{}",
            "{\"cniVersion\":\"1.0.0\"}",
            "{\"cniVersion\":\"0.1.0\",\"type\":\"a\"}",
            "{\"cniVersion\":\"1.0.0\",\"type\":\"weft-cni\"}",
        ] {
            assert!(entry().after(bad).is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn any_list_is_put_back_as_it_was(fields in proptest::collection::vec(("[a-z\"\\\\é]{1,6}", "[ -~]{0,9}"), 0..5)) {
            let mut list: serde_json::Map<String, Value> =
                fields.into_iter().map(|(name, value)| (name, value.into())).collect();
            list.insert("cniVersion".into(), "1.0.0".into());
            list.insert("plugins".into(), json!([{"type": "a"}]));
            let text = Value::from(list.clone()).to_string();
            let put = entry().put_into(&text).expect("a list").expect("changed");
            let out = take_out(&put).expect("a list").expect("changed");
            let out: Value = serde_json::from_str(&out).expect("JSON");
            prop_assert_eq!(out, Value::from(list));
        }
    }
}
