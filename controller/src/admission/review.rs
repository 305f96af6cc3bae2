//! An `AdmissionReview` and the answer to it: pure.

use std::sync::Arc;

use serde::Deserialize;
use serde_json::{Value, json};

use crate::index::{Index, Settings};
use crate::objects::routes::ParentRef;
use crate::objects::{Fault, ObjectKey, ObjectKind, decode};
use crate::problems::{Origin, Problems};
use crate::source::Event;
use crate::views::Views;

/// What is answered.
#[derive(Debug)]
pub struct Answer {
    uid: String,
    /// What is wrong with it; none: it is let through.
    fault: Option<Fault>,
    /// What of it will count as not written.
    warnings: Vec<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Review {
    api_version: String,
    kind: String,
    request: Option<Asked>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Asked {
    uid: String,
    #[serde(default)]
    operation: String,
    #[serde(default)]
    sub_resource: String,
    #[serde(default)]
    object: Value,
    #[serde(default)]
    old_object: Value,
}

const VERSION: &str = "admission.k8s.io/v1";
/// As long as those of the API server are.
const LONGEST_UID: usize = 128;
const MOST_WARNINGS: usize = 8;
/// Longer warnings are cut off by API servers.
const LONGEST_WARNING: usize = 256;

/// What is said to an `AdmissionReview`, as JSON.
///
/// # Errors
/// It is none of this version: nothing can be answered.
pub fn answer(body: &[u8], settings: &Settings) -> Result<Answer, &'static str> {
    let review: Review = serde_json::from_slice(body).map_err(|_| "not an AdmissionReview\n")?;
    if review.api_version != VERSION || review.kind != "AdmissionReview" {
        return Err("not an AdmissionReview of admission.k8s.io/v1\n");
    }
    let asked = review
        .request
        .ok_or("an AdmissionReview without a request\n")?;
    if asked.uid.is_empty() || asked.uid.len() > LONGEST_UID {
        return Err("a request without a usable uid\n");
    }
    let (fault, faults) = match judged(&asked, settings) {
        Ok(faults) => (None, faults),
        Err(fault) => (Some(fault), vec![]),
    };
    let warning = |it: &Fault| {
        let text = format!("{it}; it counts as not written");
        text.chars().take(LONGEST_WARNING).collect()
    };
    Ok(Answer {
        uid: asked.uid,
        fault,
        warnings: faults.iter().take(MOST_WARNINGS).map(warning).collect(),
    })
}

/// What of an object counts as not written, or why it cannot be used.
fn judged(asked: &Asked, settings: &Settings) -> Result<Vec<Fault>, Fault> {
    let is_change = matches!(asked.operation.as_str(), "CREATE" | "UPDATE");
    if !is_change || !asked.sub_resource.is_empty() || is_as_before(asked) {
        return Ok(vec![]);
    }
    let Some(kind) = kind_of(&asked.object) else {
        return Ok(vec![]);
    };
    if !is_looked_at(kind) || !concerns_the_mesh(kind, &asked.object) {
        return Ok(vec![]);
    }
    let mut object = asked.object.clone();
    name(&mut object);
    let Some(key) = decode::identify(&object)? else {
        return Ok(vec![]);
    };
    read(key, object, settings)
}

/// Reads an object as the index does, in a cluster where there is nothing else.
fn read(key: ObjectKey, object: Value, settings: &Settings) -> Result<Vec<Fault>, Fault> {
    let origin = Origin {
        place: "admission".into(),
        document: None,
    };
    match Event::read(key, Arc::new(object), origin) {
        Event::Upsert { key, object, .. } => {
            let (views, problems) = (Arc::new(Views::default()), Problems::default());
            Index::new(settings.clone(), views, problems).judge(&key, &object)
        }
        Event::Invalid { fault, .. } => Err(fault),
        Event::Delete { .. } => Ok(vec![]),
    }
}

/// An object that goes, or in which nothing changes that is read, is not held up by what was wrong with it all along.
fn is_as_before(asked: &Asked) -> bool {
    let metadata = |object: &Value, field: &str| object["metadata"][field].clone();
    if !metadata(&asked.object, "deletionTimestamp").is_null() {
        return true;
    }
    let (now, before) = (&asked.object, &asked.old_object);
    asked.operation == "UPDATE"
        && now["spec"] == before["spec"]
        && metadata(now, "annotations") == metadata(before, "annotations")
}

/// The kind of an object, if it is in a version that is read. In another one it may be as good: it is read in one that is
/// known.
fn kind_of(object: &Value) -> Option<ObjectKind> {
    let version = object["apiVersion"].as_str()?;
    let (group, version) = version.split_once('/').unwrap_or(("", version));
    let kind = ObjectKind::find(group, object["kind"].as_str()?);
    kind.filter(|it| it.versions().contains(&version))
}

/// Whatever the mesh alone gives a meaning to. The others are Kubernetes' own: it says itself what is wrong with them.
fn is_looked_at(kind: ObjectKind) -> bool {
    kind.policy_group().is_some()
        || matches!(kind, ObjectKind::Route(_) | ObjectKind::ServiceProfile)
}

/// Routes are the mesh's only at parents of its own; others are a gateway's, and may have what only that knows.
fn concerns_the_mesh(kind: ObjectKind, object: &Value) -> bool {
    if !matches!(kind, ObjectKind::Route(_)) {
        return true;
    }
    let parents = object.pointer("/spec/parentRefs").and_then(Value::as_array);
    let is_ours = |parent: &Value| {
        let text = |field: &str| parent[field].as_str().map(str::to_owned);
        let parent = ParentRef {
            group: text("group"),
            kind: text("kind"),
            ..ParentRef::default()
        };
        parent.is_service() || parent.is_server() || parent.is_egress_network()
    };
    parents.into_iter().flatten().any(is_ours)
}

/// One that is to be given a name has none yet.
fn name(object: &mut Value) {
    let metadata = &mut object["metadata"];
    if metadata["name"].is_null() && metadata["generateName"].is_string() {
        metadata["name"] = json!("generated");
    }
}

impl Answer {
    /// What it is, in one word.
    pub fn result(&self) -> &'static str {
        match self.fault {
            Some(_) => "denied",
            None => "allowed",
        }
    }

    /// As API servers read it.
    pub fn to_json(&self) -> Vec<u8> {
        let mut response = json!({"uid": self.uid, "allowed": self.fault.is_none()});
        if let Some(fault) = &self.fault {
            let message = format!("weft: {fault}");
            let message: String = message.chars().take(1024).collect();
            response["status"] = json!({"status": "Failure", "code": 422, "reason": "Invalid",
                "message": message});
        }
        if !self.warnings.is_empty() {
            response["warnings"] = json!(self.warnings);
        }
        let review =
            json!({"apiVersion": VERSION, "kind": "AdmissionReview", "response": response});
        review.to_string().into_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server(group: &str, port: &Value) -> Value {
        let version = if group == "policy.linkerd.io" {
            "v1beta3"
        } else {
            "v1alpha1"
        };
        json!({"apiVersion": format!("{group}/{version}"), "kind": "Server",
            "metadata": {"name": "web", "namespace": "shop", "uid": "u", "managedFields": []},
            "spec": {"podSelector": {"matchLabels": {"app": "web"}}, "port": port}})
    }

    /// A route to one parent, with this rule.
    fn route(parent: &Value, rule: &Value) -> Value {
        json!({"apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute",
            "metadata": {"name": "web", "namespace": "shop"},
            "spec": {"parentRefs": [parent], "rules": [rule]}})
    }

    fn review(request: &Value) -> Vec<u8> {
        let mut request = request.clone();
        request["uid"] = json!("705ab4f5-6393-11e8-b7cc-42010a800002");
        let review = json!({"apiVersion": VERSION, "kind": "AdmissionReview", "request": request});
        review.to_string().into_bytes()
    }

    /// What is answered to this: that it is let through, with warnings, or why not.
    fn answered(request: &Value) -> Result<Vec<String>, String> {
        let answer = answer(&review(request), &Settings::default()).expect("a review");
        let json: Value = serde_json::from_slice(&answer.to_json()).expect("JSON");
        let response = &json["response"];
        assert_eq!(json["apiVersion"], VERSION);
        assert_eq!(response["uid"], "705ab4f5-6393-11e8-b7cc-42010a800002");
        let texts = response["warnings"].as_array().into_iter().flatten();
        let texts = texts.map(|it| it.as_str().expect("a text").to_owned());
        match response["allowed"].as_bool().expect("said") {
            true => Ok(texts.collect()),
            false => Err(response["status"]["message"]
                .as_str()
                .expect("said")
                .to_owned()),
        }
    }

    fn created(object: &Value) -> Result<Vec<String>, String> {
        answered(
            &json!({"operation": "CREATE", "object": object, "oldObject": null, "dryRun": true}),
        )
    }

    #[test]
    fn what_cannot_be_used_is_refused_with_its_field() {
        let service = json!({"group": "", "kind": "Service", "name": "web", "port": 80});
        let bad_rule = json!({"timeouts": {"request": "soon"}});
        for (object, field) in [
            (server("policy.weft.dev", &json!(0)), "spec.port"),
            (server("policy.linkerd.io", &json!({"a": 1})), "spec.port"),
            (route(&service, &bad_rule), "spec.rules[0].timeouts.request"),
            (
                // The group that an API server fills in.
                route(
                    &json!({"group": "gateway.networking.k8s.io", "kind": "Service", "name": "web"}),
                    &bad_rule,
                ),
                "spec.rules[0].timeouts.request",
            ),
            (
                route(&json!({"kind": "Service", "name": "web"}), &bad_rule),
                "spec.rules[0].timeouts.request",
            ),
            (
                json!({"apiVersion": "policy.weft.dev/v1alpha1", "kind": "NetworkAuthentication",
                    "metadata": {"name": "a", "namespace": "shop"},
                    "spec": {"networks": [{"cidr": "10.0.0.0/99"}]}}),
                "spec.networks[0].cidr",
            ),
            (
                json!({"apiVersion": "policy.weft.dev/v1alpha1", "kind": "Server",
                    "metadata": {"name": "web", "namespace": "shop"},
                    "spec": {"podSelector": {}, "port": 80, "prot": 1}}),
                "prot",
            ),
        ] {
            let refused = created(&object).expect_err("refused");
            assert!(
                refused.starts_with("weft: ") && refused.contains(field),
                "{refused}"
            );
        }
    }

    /// Of what is not there, of what is none of the mesh's, and of what was bad all along.
    #[test]
    fn what_is_not_wrong_by_itself_is_let_through() {
        let service = json!({"group": "", "kind": "Service", "name": "none", "port": 80});
        let gateway = json!({"name": "entry"});
        let bad_rule = json!({"timeouts": {"request": "soon"}});
        let mut unnamed = server("policy.weft.dev", &json!(80));
        unnamed["metadata"] = json!({"generateName": "web-", "namespace": "shop"});
        for object in [
            server("policy.weft.dev", &json!(80)),
            server("example.com", &json!(0)),
            unnamed,
            route(
                &service,
                &json!({"backendRefs": [{"name": "nowhere", "port": 80}]}),
            ),
            route(&gateway, &bad_rule),
            json!({"apiVersion": "policy.weft.dev/v1alpha1", "kind": "AuthorizationPolicy",
                "metadata": {"name": "a", "namespace": "shop"},
                "spec": {"targetRef": {"group": "policy.weft.dev", "kind": "Server", "name": "none"},
                    "requiredAuthenticationRefs": [
                        {"group": "policy.weft.dev", "kind": "MeshTLSAuthentication", "name": "none"}]}}),
            json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": 7}, "spec": 7}),
            json!({"apiVersion": "policy.weft.dev/v1alpha1", "kind": "Unknown"}),
            json!(7),
            json!(null),
        ] {
            assert_eq!(created(&object), Ok(vec![]), "{object}");
        }
        let mut of_later = server("policy.weft.dev", &json!({"numbers": [80]}));
        of_later["apiVersion"] = json!("policy.weft.dev/v9");
        assert_eq!(created(&of_later), Ok(vec![]));
        let bad = server("policy.weft.dev", &json!(0));
        let ask = |operation: &str, object: &Value, old: &Value, sub: &str| {
            answered(
                &json!({"operation": operation, "object": object, "oldObject": old, "subResource": sub}),
            )
        };
        let good = server("policy.weft.dev", &json!(80));
        assert!(ask("UPDATE", &bad, &good, "").is_err());
        for (operation, sub) in [("DELETE", ""), ("CONNECT", ""), ("UPDATE", "status")] {
            assert!(
                ask(operation, &bad, &good, sub).is_ok(),
                "{operation} {sub}"
            );
        }
        let mut labelled = bad.clone();
        labelled["metadata"]["labels"] = json!({"a": "b"});
        assert!(ask("UPDATE", &labelled, &bad, "").is_ok());
        let mut going = bad.clone();
        going["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        assert!(ask("UPDATE", &going, &good, "").is_ok());
    }

    #[test]
    fn what_is_no_review_is_not_answered() {
        let deep = "[".repeat(100_000);
        for body in [
            "",
            "{}",
            "null",
            deep.as_str(),
            r#"{"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview"}"#,
            r#"{"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": {"uid": ""}}"#,
            r#"{"apiVersion": "admission.k8s.io/v1beta1", "kind": "AdmissionReview", "request": {"uid": "a"}}"#,
        ] {
            assert!(
                answer(body.as_bytes(), &Settings::default()).is_err(),
                "{body:.80}"
            );
        }
    }

    /// Whoever applies it has the API server ask about all kinds that are looked at, and about no others.
    #[test]
    fn the_configuration_names_what_is_looked_at() {
        let path = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../daemonset/components/webhook/webhook.yaml"
        );
        let text = std::fs::read_to_string(path).expect("read");
        let documents = decode::documents(&text).expect("YAML");
        let configuration = documents
            .iter()
            .find(|it| it["kind"] == "ValidatingWebhookConfiguration");
        let webhook = &configuration.expect("one")["webhooks"][0];
        let list = |of: &Value, field: &str| -> Vec<String> {
            let list = of[field].as_array().into_iter().flatten();
            list.map(|it| it.as_str().expect("a text").to_owned())
                .collect()
        };
        let mut named = vec![];
        for rule in webhook["rules"].as_array().expect("rules") {
            assert_eq!(list(rule, "operations"), ["CREATE", "UPDATE"]);
            for group in list(rule, "apiGroups") {
                let resources = list(rule, "resources").into_iter();
                named.extend(resources.map(|it| format!("{it}.{group}")));
            }
        }
        let kinds = ObjectKind::all().into_iter().filter(|it| is_looked_at(*it));
        let plural = |kind: ObjectKind| {
            let name = kind.as_str().to_lowercase();
            match name.strip_suffix('y') {
                Some(stem) => format!("{stem}ies.{}", kind.group()),
                None => format!("{name}s.{}", kind.group()),
            }
        };
        let mut expected: Vec<String> = kinds.map(plural).collect();
        named.sort();
        expected.sort();
        assert_eq!(named, expected);
    }
}
