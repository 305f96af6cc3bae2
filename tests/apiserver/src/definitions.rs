//! CustomResourceDefinitions that clients write: the kinds that they make, and what they say of objects.

use serde_json::{Value, json};

use crate::answer::Collection;
use crate::cost;
use crate::kinds::Kind;
use crate::schema::Schema;
use crate::store::{Refused, Store};
use crate::structural;

/// Whether a kind is that of definitions.
pub(crate) fn is_definition(kind: &Kind) -> bool {
    kind.group == GROUP && kind.kind == DEFINITION
}

/// What the definition of a collection's kind says of its objects; none: there is no definition.
pub(crate) fn schema(store: &Store, of: &Collection) -> Option<anyhow::Result<Schema>> {
    let name = format!("{}.{}", of.kind.plural, of.kind.group);
    let definition = of.kind.custom.then(|| store.object(DEFINITION, "", &name));
    let definition = definition.flatten()?;
    Some(Schema::of(&definition, &of.version))
}

/// Why a definition makes no kind; none: it makes this one.
pub(crate) fn made(definition: &Value) -> Result<Kind, String> {
    let (spec, names) = (&definition["spec"], &definition["spec"]["names"]);
    let text = |of: &Value| of.as_str().unwrap_or_default().to_owned();
    let texts = |of: &Value| of.as_array().into_iter().flatten().map(text).collect();
    let (group, plural) = (text(&spec["group"]), text(&names["plural"]));
    if definition["metadata"]["name"] != format!("{plural}.{group}") {
        return Err("metadata.name: must be spec.names.plural+\".\"+spec.group".to_owned());
    }
    let versions = || spec["versions"].as_array().into_iter().flatten();
    if versions().filter(|it| it["storage"] == true).count() != 1 {
        return Err("spec.versions: exactly one is stored".to_owned());
    }
    let mut all = 0_u64;
    for version in versions() {
        let name = text(&version["name"]);
        let said = |what: String| format!("spec.versions, {name}: {what}");
        Schema::of(definition, &name).map_err(|error| said(format!("{error:#}")))?;
        let schema = &version["schema"]["openAPIV3Schema"];
        if let [first, ..] = &structural::faults(schema)[..] {
            return Err(said(first.clone()));
        }
        let costs = cost::of_rules(schema);
        for it in costs.map_err(|error| said(format!("{error:#}")))? {
            if it.units > cost::MOST_OF_RULE {
                return Err(said(format!("{}: may cost {}", it.rule, it.units)));
            }
            all = all.saturating_add(it.units);
        }
    }
    if all > cost::MOST_OF_DEFINITION {
        return Err(format!("spec.versions: all rules together may cost {all}"));
    }
    let served = versions().filter(|it| it["served"] == true);
    Ok(Kind {
        versions: served.map(|it| text(&it["name"])).collect(),
        plural,
        short_names: texts(&names["shortNames"]),
        namespaced: spec["scope"] == "Namespaced",
        status: versions().any(|it| it["subresources"]["status"].is_object()),
        ..Kind::custom(&group, &[], &text(&names["kind"]))
    })
}

/// Serves the kind of a definition that was written, and says so on it.
pub(crate) fn establish(store: &Store, name: &str) -> Result<(), Refused> {
    let of = Kind::built_in(GROUP, "v1", DEFINITION, false);
    let definition = store.current(&of, "", name)?;
    let kind = made(&definition).map_err(Refused::Invalid)?;
    let stored = definition["spec"]["versions"].as_array();
    let mut stored = stored
        .into_iter()
        .flatten()
        .filter(|it| it["storage"] == true);
    let stored = stored.next().map(|it| it["name"].clone());
    store.install(kind);
    let condition = |of: &str, reason: &str| {
        json!({"type": of, "status": "True", "reason": reason, "message": "",
        "lastTransitionTime": "2026-01-01T00:00:00Z"})
    };
    let status = json!({
        "acceptedNames": definition["spec"]["names"],
        "conditions": [condition("NamesAccepted", "NoConflicts"), condition("Established", "InitialNamesAccepted")],
        "storedVersions": [stored],
    });
    let change = |before: &Value| {
        let mut now = before.clone();
        now["status"] = status;
        Ok(now)
    };
    store.change(&of, "", name, change).map(drop)
}

/// Serves the kind of a definition no more; its objects are gone with it.
pub(crate) fn forget(store: &Store, definition: &Value) {
    if let Ok(kind) = made(definition) {
        store.delete_all(|group, name, _| group == kind.group && name == kind.kind);
        store.uninstall(&kind.group, &kind.kind);
    }
}

const GROUP: &str = "apiextensions.k8s.io";
const DEFINITION: &str = "CustomResourceDefinition";

#[cfg(test)]
mod tests {
    use super::*;

    fn definition() -> Value {
        let schema = json!({"type": "object", "properties": {"spec": {"type": "object"}}});
        let version = |name: &str, storage: bool| {
            json!({"name": name, "served": true, "storage": storage,
            "subresources": {"status": {}}, "schema": {"openAPIV3Schema": schema}})
        };
        json!({"apiVersion": "apiextensions.k8s.io/v1", "kind": DEFINITION, "metadata": {"name": "geese.farm.example"},
            "spec": {"group": "farm.example", "scope": "Cluster", "versions": [version("v1", true), version("v1beta1", false)],
                "names": {"plural": "geese", "kind": "Goose", "shortNames": ["gs"]}}})
    }

    #[test]
    fn a_definition_makes_a_kind_that_goes_with_it() {
        let store = Store::new(Kind::all_built_in());
        store.apply(&definition()).expect("served");
        establish(&store, "geese.farm.example").expect("a kind");
        let has = || store.kinds().into_iter().find(|it| it.kind == "Goose");
        let kind = has().expect("installed");
        assert_eq!(kind.plural, "geese");
        assert_eq!(kind.short_names, ["gs"]);
        assert_eq!(kind.versions, ["v1", "v1beta1"]);
        assert!(kind.custom && kind.status && !kind.namespaced);
        let written = store.object(DEFINITION, "", "geese.farm.example");
        let written = written.expect("there");
        assert_eq!(written["status"]["storedVersions"], json!(["v1"]));
        let goose =
            json!({"apiVersion": "farm.example/v1", "kind": "Goose", "metadata": {"name": "a"}});
        store.apply(&goose).expect("served");
        forget(&store, &written);
        assert!(has().is_none());
        assert_eq!(store.objects().len(), 1);
    }

    #[test]
    fn what_makes_no_kind_says_why() {
        let dear = json!({"type": "object", "properties": {"a": {"type": "array", "items": {"type": "string"}}},
            "x-kubernetes-validations": [{"rule": "self.a.all(it, it != '')"}]});
        for (change, said) in [
            (
                ("/metadata/name", json!("goose.farm.example")),
                "metadata.name",
            ),
            (("/spec/versions/1/storage", json!(true)), "exactly one"),
            (
                (
                    "/spec/versions/0/schema/openAPIV3Schema",
                    json!({"type": "object", "x-kubernetes-validations": [{"rule": "self."}]}),
                ),
                "spec.versions, v1",
            ),
            (
                ("/spec/versions/0/schema/openAPIV3Schema", dear),
                "may cost",
            ),
        ] {
            let mut written = definition();
            *written.pointer_mut(change.0).expect("there") = change.1;
            let error = made(&written).expect_err(said);
            assert!(error.contains(said), "{error}");
        }
    }
}
