//! Events on objects that cannot be used: where `kubectl describe` shows them.
//!
//! An Event is named after what it says, so that nobody says the same of the same version of an object twice, neither
//! after a restart nor by another leader, for as long as the API server keeps it (an hour).

use aws_lc_rs::digest::{SHA256, digest};
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use serde_json::Value;

use super::CONTROLLER_NAME;
use crate::objects::ObjectKey;

/// Those of objects without a namespace are in
const NAMESPACE: &str = "default";
const REASON: &str = "Invalid";
const ACTION: &str = "Read";
/// The API server takes no longer note,
const LONGEST_NOTE: usize = 1024;
/// and no name of more than 253 bytes.
const LONGEST_NAME: usize = 200;

/// The Event that says of an object, as the API server shows it, why it cannot be used.
pub(super) fn event(key: &ObjectKey, api_version: &str, object: &Value, reason: &str) -> Event {
    let metadata = |field: &str| object["metadata"][field].as_str().map(str::to_owned);
    let note = shortened(reason, LONGEST_NOTE);
    let uid = metadata("uid").unwrap_or_default();
    let generation = &object["metadata"]["generation"];
    let said = format!("{uid} {generation} {REASON} {note}");
    let hash = digest(&SHA256, said.as_bytes());
    let hash: String = hash.as_ref()[..8]
        .iter()
        .map(|it| format!("{it:02x}"))
        .collect();
    let namespace = key.namespace.as_ref();
    let namespace = namespace.map_or_else(|| NAMESPACE.to_owned(), ToString::to_string);
    let name = shortened(key.name.as_str(), LONGEST_NAME);
    Event {
        metadata: ObjectMeta {
            name: Some(format!("{name}.{hash}")),
            namespace: Some(namespace),
            ..ObjectMeta::default()
        },
        event_time: Some(MicroTime(Timestamp::now())),
        type_: Some("Warning".to_owned()),
        reason: Some(REASON.to_owned()),
        action: Some(ACTION.to_owned()),
        note: Some(note),
        regarding: Some(ObjectReference {
            api_version: Some(api_version.to_owned()),
            kind: Some(key.kind.as_str().to_owned()),
            name: Some(key.name.to_string()),
            namespace: key.namespace.as_ref().map(ToString::to_string),
            uid: Some(uid),
            resource_version: metadata("resourceVersion"),
            ..ObjectReference::default()
        }),
        reporting_controller: Some(CONTROLLER_NAME.to_owned()),
        reporting_instance: Some(INSTANCE.to_owned()),
        ..Event::default()
    }
}

/// Whoever leads.
const INSTANCE: &str = "weft-controller";

/// The beginning of a text, of at most so many bytes, by whole characters.
fn shortened(text: &str, most: usize) -> String {
    let mut end = text.len().min(most);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    // A name must not end with a dot.
    text[..end].trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::objects::ObjectKind;

    fn of(name: &str, namespace: Option<&str>, generation: u32, reason: &str) -> Event {
        let key = ObjectKey {
            kind: ObjectKind::Service,
            namespace: namespace.map(|it| it.parse().expect("valid")),
            name: name.parse().expect("valid"),
        };
        let object = json!({"metadata": {"uid": "u", "generation": generation}});
        event(&key, "v1", &object, reason)
    }

    #[test]
    fn the_same_has_the_same_name() {
        let name = |event: Event| event.metadata.name.expect("named");
        let first = name(of("web", Some("shop"), 1, "bad"));
        assert!(first.starts_with("web."), "{first}");
        assert_eq!(first, name(of("web", Some("shop"), 1, "bad")));
        assert_ne!(first, name(of("web", Some("shop"), 1, "worse")));
        assert_ne!(first, name(of("web", Some("shop"), 2, "bad")));
    }

    #[test]
    fn events_are_as_the_server_takes_them() {
        let long = "ä".repeat(1000);
        let event = of("web", None, 1, &long);
        assert!(event.note.expect("said").len() <= LONGEST_NOTE);
        assert_eq!(event.metadata.namespace.as_deref(), Some(NAMESPACE));
        let regarding = event.regarding.expect("of something");
        assert_eq!(regarding.namespace, None);
        assert_eq!(regarding.uid.as_deref(), Some("u"));
        let event = of(&"a".repeat(253), Some("shop"), 1, "bad");
        assert!(event.metadata.name.expect("named").len() <= 253);
        assert_eq!(event.metadata.namespace.as_deref(), Some("shop"));
    }
}
