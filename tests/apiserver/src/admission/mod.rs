//! Admission: the validating webhooks that are registered (`admissionregistration.k8s.io/v1`), asked before something is
//! stored that a client writes. What tests and folders write is there already, and nobody is asked about it.

use futures::future::join_all;
use http::StatusCode;
use serde_json::{Value, json};

use crate::Shared;
use crate::answer::{Collection, Failure};
use crate::kinds::Kind;
use crate::store::Store;

mod calls;
mod rules;

/// Something that is to be written.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Write<'a> {
    /// Where.
    pub(crate) of: &'a Collection,
    pub(crate) name: &'a str,
    pub(crate) subresource: Option<&'a str>,
    /// The object as it is; none: it is made.
    pub(crate) before: Option<&'a Value>,
    /// The object as it is to be.
    pub(crate) now: &'a Value,
}

/// What is said of a write that is let through.
pub(crate) type Warnings = Vec<String>;

/// Asks all webhooks that a write is for, at the same time; the first one that refuses it answers.
pub(crate) async fn admit(shared: &Shared, write: Write<'_>) -> Result<Warnings, Failure> {
    if write.of.kind.group == GROUP {
        return Ok(vec![]);
    }
    let asked = webhooks(&shared.store).into_iter();
    let asked = asked.filter_map(|it| Some((rules::version(&shared.store, &it, write)?, it)));
    let answers = asked.map(|(version, webhook)| {
        let review = review(write, &version);
        async move {
            let answered = calls::ask(&shared.store, &webhook, &review).await;
            judged(&webhook, answered)
        }
    });
    let mut warnings = vec![];
    for answer in join_all(answers).await {
        warnings.extend(answer?);
    }
    Ok(warnings)
}

/// All webhooks, in the order in which they are asked: by the names of their configurations.
fn webhooks(store: &Store) -> Vec<Value> {
    let kind = Kind::built_in(GROUP, "v1", "ValidatingWebhookConfiguration", false);
    let page = store.list(&kind, None, usize::MAX, None);
    let configurations = page.map_or(vec![], |it| it.items);
    let webhooks = configurations
        .iter()
        .filter_map(|it| it["webhooks"].as_array());
    webhooks.flatten().cloned().collect()
}

/// What becomes of a write by what a webhook answered, or did not.
fn judged(webhook: &Value, answered: Result<Value, String>) -> Result<Warnings, Failure> {
    let name = webhook["name"].as_str().unwrap_or_default();
    let response = match answered {
        Ok(response) => response,
        Err(_) if webhook["failurePolicy"] == "Ignore" => return Ok(vec![]),
        Err(error) => {
            let message =
                format!("Internal error occurred: failed calling webhook {name:?}: {error}");
            return Err((StatusCode::INTERNAL_SERVER_ERROR, "InternalError", message));
        }
    };
    if response["allowed"] == true {
        let warnings = response["warnings"].as_array().into_iter().flatten();
        let texts = warnings.filter_map(|it| it.as_str().map(str::to_owned));
        return Ok(texts.collect());
    }
    let status = &response["status"];
    let text = |field: &str| status[field].as_str().filter(|it| !it.is_empty());
    let why = match text("message").or(text("reason")) {
        Some(why) => format!(": {why}"),
        None => " without explanation".to_owned(),
    };
    let code = status["code"]
        .as_u64()
        .and_then(|it| u16::try_from(it).ok());
    let code = code.and_then(|it| StatusCode::from_u16(it).ok());
    let code = code.filter(|it| it.as_u16() >= 400);
    let reasons = ["Invalid", "Forbidden", "BadRequest", "Conflict"].into_iter();
    let mut reasons = reasons.filter(|it| text("reason") == Some(*it));
    Err((
        code.unwrap_or(StatusCode::BAD_REQUEST),
        reasons.next().unwrap_or_default(),
        format!("admission webhook {name:?} denied the request{why}"),
    ))
}

/// What a webhook is asked, with objects in the version that its rules are for.
fn review(write: Write<'_>, version: &str) -> Value {
    let Write { of, name, .. } = write;
    let Collection {
        kind, namespace, ..
    } = of;
    let kind_of =
        |version: &str| json!({"group": kind.group, "version": version, "kind": kind.kind});
    let resource_of =
        |version: &str| json!({"group": kind.group, "version": version, "resource": kind.plural});
    let shown = |object: &Value| {
        let mut object = object.clone();
        object["kind"] = json!(kind.kind);
        object["apiVersion"] = json!(kind.api_version(version));
        object
    };
    let (operation, options) = match write.before {
        Some(_) => ("UPDATE", "UpdateOptions"),
        None => ("CREATE", "CreateOptions"),
    };
    let mut request = json!({
        "uid": calls::uid(),
        "kind": kind_of(version),
        "resource": resource_of(version),
        "requestKind": kind_of(&of.version),
        "requestResource": resource_of(&of.version),
        "name": name,
        "operation": operation,
        "userInfo": {"username": "kubernetes-admin", "groups": ["system:authenticated"]},
        "object": shown(write.now),
        "oldObject": write.before.map(shown),
        "dryRun": false,
        "options": {"kind": options, "apiVersion": "meta.k8s.io/v1"},
    });
    if let Some(namespace) = namespace {
        request["namespace"] = json!(namespace);
    }
    if let Some(subresource) = write.subresource {
        request["subResource"] = json!(subresource);
        request["requestSubResource"] = json!(subresource);
    }
    json!({"kind": "AdmissionReview", "apiVersion": calls::VERSION, "request": request})
}

/// Objects of this group are never asked about: otherwise a webhook could keep itself from being removed.
const GROUP: &str = "admissionregistration.k8s.io";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_says_what_the_webhook_says() {
        let webhook = json!({"name": "validate.example.com"});
        for (status, expected) in [
            (
                json!({"code": 422, "reason": "Invalid", "message": "spec.port: 0"}),
                (422, "Invalid", "denied the request: spec.port: 0"),
            ),
            (
                json!({"code": 200}),
                (400, "", "denied the request without explanation"),
            ),
            (
                json!({"reason": "Forbidden"}),
                (400, "Forbidden", "denied the request: Forbidden"),
            ),
            (
                Value::Null,
                (400, "", "denied the request without explanation"),
            ),
        ] {
            let response = json!({"allowed": false, "status": status});
            let (code, reason, message) = judged(&webhook, Ok(response)).expect_err("denied");
            let message = message.strip_prefix("admission webhook \"validate.example.com\" ");
            let message = message.expect("the name");
            assert_eq!((code.as_u16(), reason, message), expected, "{status}");
        }
    }

    #[test]
    fn one_that_cannot_be_asked_refuses_unless_it_is_ignored() {
        let answered = |policy: Value| {
            let webhook = json!({"name": "a.b.c", "failurePolicy": policy});
            judged(&webhook, Err("away".to_owned()))
        };
        assert_eq!(answered(json!("Ignore")), Ok(vec![]));
        for policy in [json!("Fail"), Value::Null] {
            let (code, _, message) = answered(policy).expect_err("refused");
            assert_eq!(code, StatusCode::INTERNAL_SERVER_ERROR);
            let expected = "Internal error occurred: failed calling webhook \"a.b.c\": away";
            assert_eq!(message, expected);
        }
    }
}
