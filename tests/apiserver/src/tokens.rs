//! Tokens of service accounts, as kubelets ask for them and project them into pods, and their review: JSON web tokens
//! with the claims of real ones, signed by a key that everybody knows.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_lc_rs::{digest, hmac};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use serde_json::{Value, json};

use crate::Shared;
use crate::answer::{Body, Failure, json_body, refusal};

/// What a token says.
#[derive(Clone, Debug)]
pub struct Token {
    /// The namespace of the service account, and of the pod.
    pub namespace: String,
    /// The service account.
    pub service_account: String,
    /// Whom it is for.
    pub audiences: Vec<String>,
    /// Name and uid of the pod that it is bound to.
    pub pod: Option<(String, String)>,
    /// The node that it is bound to, as servers since 1.30 say it.
    pub node: Option<String>,
    /// When it ends.
    pub expires: SystemTime,
}

const KEY: &[u8] = b"a key that everybody knows";
const POD_NAME: &str = "authentication.kubernetes.io/pod-name";
const POD_UID: &str = "authentication.kubernetes.io/pod-uid";
const NODE_NAME: &str = "authentication.kubernetes.io/node-name";
const CREDENTIAL: &str = "authentication.kubernetes.io/credential-id";

impl Token {
    /// The token of an agent's pod that is valid for an hour.
    pub fn of_agent(pod: &str, uid: &str, node: &str) -> Self {
        Self {
            namespace: "weft-system".to_owned(),
            service_account: "weft-agent".to_owned(),
            audiences: vec!["weft-controller".to_owned()],
            pod: Some((pod.to_owned(), uid.to_owned())),
            node: Some(node.to_owned()),
            expires: SystemTime::now() + Duration::from_secs(3600),
        }
    }

    /// As it is written into a file.
    pub fn signed(&self) -> String {
        let header = json!({"alg": "HS256", "kid": "tests"});
        let mut bound = json!({"namespace": self.namespace,
            "serviceaccount": {"name": self.service_account, "uid": "of-the-account"}});
        if let Some((name, uid)) = &self.pod {
            bound["pod"] = json!({"name": name, "uid": uid});
        }
        if let Some(node) = &self.node {
            bound["node"] = json!({"name": node, "uid": format!("of-{node}")});
        }
        let expires = seconds(self.expires);
        let claims = json!({"aud": self.audiences, "exp": expires, "iat": expires - 3600,
            "iss": "https://kubernetes.default.svc", "kubernetes.io": bound,
            "sub": self.user()});
        let [header, claims] = [header, claims].map(|it| encode(it.to_string().as_bytes()));
        let key = hmac::Key::new(hmac::HMAC_SHA256, KEY);
        let signed = format!("{header}.{claims}");
        let signature = hmac::sign(&key, signed.as_bytes());
        format!("{signed}.{}", encode(signature.as_ref()))
    }

    /// What it is called in logs.
    fn id(&self) -> String {
        let signed = self.signed();
        let digest = digest::digest(&digest::SHA256, signed.as_bytes());
        encode(&digest.as_ref()[..12])
    }

    fn user(&self) -> String {
        let (namespace, name) = (&self.namespace, &self.service_account);
        format!("system:serviceaccount:{namespace}:{name}")
    }

    fn read(text: &str) -> Option<Self> {
        let (signed, signature) = text.rsplit_once('.')?;
        let key = hmac::Key::new(hmac::HMAC_SHA256, KEY);
        hmac::verify(&key, signed.as_bytes(), &decode(signature)?).ok()?;
        let (_, claims) = signed.split_once('.')?;
        let claims: Value = serde_json::from_slice(&decode(claims)?).ok()?;
        let bound = &claims["kubernetes.io"];
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let pod = &bound["pod"];
        let audiences = claims["aud"].as_array()?.iter();
        Some(Self {
            namespace: text(&bound["namespace"])?,
            service_account: text(&bound["serviceaccount"]["name"])?,
            audiences: audiences.filter_map(text).collect(),
            pod: text(&pod["name"]).zip(text(&pod["uid"])),
            node: text(&bound["node"]["name"]),
            expires: UNIX_EPOCH + Duration::from_secs(claims["exp"].as_u64()?),
        })
    }
}

/// Where TokenReviews are posted to.
pub(crate) const REVIEWS: &str = "/apis/authentication.k8s.io/v1/tokenreviews";

/// The namespace and the service account whose tokens a path is asked for.
pub(crate) fn asked_at(path: &str) -> Option<[&str; 2]> {
    let below = path.strip_prefix("/api/v1/namespaces/")?;
    let (namespace, rest) = below.split_once('/')?;
    let (account, rest) = rest.strip_prefix("serviceaccounts/")?.split_once('/')?;
    (rest == "token").then_some([namespace, account])
}

/// Answers a TokenRequest, as kubelets make them for the pods of their node.
pub(crate) async fn request(
    shared: &Shared,
    [namespace, account]: [&str; 2],
    request: Request<Incoming>,
) -> Result<Response<Body>, Failure> {
    let mut asked = json_of(request).await?;
    let token = requested(shared, [namespace, account], &asked["spec"])?;
    asked["status"] = json!({"token": token.signed(),
        "expirationTimestamp": rfc3339(seconds(token.expires))});
    Ok(json_body(StatusCode::CREATED, &asked))
}

fn requested(
    shared: &Shared,
    [namespace, account]: [&str; 2],
    spec: &Value,
) -> Result<Token, Failure> {
    let of = &spec["boundObjectRef"];
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let audiences = spec["audiences"].as_array().into_iter().flatten();
    let audiences = audiences.map(text).collect();
    let lasts = spec["expirationSeconds"].as_u64().unwrap_or(3600);
    let expires = SystemTime::now() + Duration::from_secs(lasts);
    if of.is_null() {
        let there = shared.store.object("ServiceAccount", namespace, account);
        let missing = || {
            let message = format!("serviceaccounts {account:?} not found");
            (StatusCode::NOT_FOUND, "NotFound", message)
        };
        return there.ok_or_else(missing).map(|_| Token {
            namespace: namespace.to_owned(),
            service_account: account.to_owned(),
            audiences,
            pod: None,
            node: None,
            expires,
        });
    }
    let (name, uid) = (text(&of["name"]), text(&of["uid"]));
    let pod = shared.store.object("Pod", namespace, &name);
    let Some(pod) = pod.filter(|_| of["kind"] == "Pod") else {
        let message = format!("pods {name:?} not found");
        return Err((StatusCode::NOT_FOUND, "NotFound", message));
    };
    if pod["metadata"]["uid"] != uid.as_str() {
        let message = format!("the UID in the bound object reference ({uid}) does not match");
        return Err((StatusCode::CONFLICT, "Conflict", message));
    }
    if pod["spec"]["serviceAccountName"] != account {
        let message = format!("cannot bind token for serviceaccount {account:?} to pod {name:?}");
        return Err((StatusCode::BAD_REQUEST, "BadRequest", message));
    }
    Ok(Token {
        namespace: namespace.to_owned(),
        service_account: account.to_owned(),
        audiences,
        pod: Some((name, uid)),
        node: pod["spec"]["nodeName"].as_str().map(str::to_owned),
        expires,
    })
}

pub(crate) async fn json_of(request: Request<Incoming>) -> Result<Value, Failure> {
    let bytes = request.into_body().collect().await;
    let bytes = bytes.map_or_else(|_| Bytes::new(), |it| it.to_bytes());
    serde_json::from_slice(&bytes).map_err(|error| {
        let message = format!("the body is no JSON: {error}");
        (StatusCode::BAD_REQUEST, "BadRequest", message)
    })
}

/// Answers a TokenReview.
pub(crate) async fn answer(
    shared: &Shared,
    request: Request<Incoming>,
) -> Result<Response<Body>, Failure> {
    if let Some(code) = shared.behaviour().refused.get("tokenreviews").copied() {
        return Err(refusal(code, "tokenreviews", "authentication.k8s.io"));
    }
    let mut review = json_of(request).await?;
    review["status"] = match reviewed(shared, &review["spec"]) {
        Ok(status) => status,
        Err(error) => json!({"user": {}, "error": error}),
    };
    Ok(json_body(StatusCode::CREATED, &review))
}

fn reviewed(shared: &Shared, spec: &Value) -> Result<Value, String> {
    let token = spec["token"].as_str().and_then(Token::read);
    let token = token.ok_or("invalid bearer token")?;
    if token.expires <= SystemTime::now() {
        return Err("invalid bearer token, service account token has expired".to_owned());
    }
    let asked = spec["audiences"].as_array().into_iter().flatten();
    let mut audiences: Vec<&Value> = asked
        .filter(|asked| token.audiences.iter().any(|it| *asked == it))
        .collect();
    match shared.behaviour().ignores_audiences {
        true => audiences.clear(),
        false if audiences.is_empty() => {
            let message = "invalid bearer token, token audiences are invalid for the target";
            return Err(message.to_owned());
        }
        false => {}
    }
    let mut extra = json!({});
    if let Some((name, uid)) = &token.pod {
        let pod = shared.store.object("Pod", &token.namespace, name);
        if !pod.is_some_and(|it| it["metadata"]["uid"] == uid.as_str()) {
            return Err("invalid bearer token, pod has been deleted".to_owned());
        }
        extra[POD_NAME] = json!([name]);
        extra[POD_UID] = json!([uid]);
    }
    if let Some(node) = &token.node {
        extra[NODE_NAME] = json!([node]);
    }
    let id = format!("JTI={}", token.id());
    extra[CREDENTIAL] = json!([id]);
    Ok(json!({"authenticated": true, "audiences": audiences,
        "user": {"username": token.user(), "uid": "of-the-account", "extra": extra,
            "groups": ["system:serviceaccounts", "system:authenticated"]}}))
}

fn seconds(moment: SystemTime) -> u64 {
    let since = moment.duration_since(UNIX_EPOCH);
    since.unwrap_or_default().as_secs()
}

/// A moment as Kubernetes writes it (RFC 3339), by the Gregorian calendar.
fn rfc3339(seconds: u64) -> String {
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    // Years begin in March here, so that a leap day is the last of its year.
    let since = days + 719_468;
    let (era, day) = (since / 146_097, since % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let date = day - (153 * month + 2) / 5 + 1;
    let (month, next) = if month < 10 {
        (month + 3, 0)
    } else {
        (month - 9, 1)
    };
    let year = era * 400 + year + next;
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{date:02}T{hour:02}:{minute:02}:{second:02}Z")
}

fn encode(bytes: &[u8]) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

fn decode(text: &str) -> Option<Vec<u8>> {
    URL_SAFE_NO_PAD.decode(text).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_written_as_kubernetes_does() {
        for (seconds, expected) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (951_868_800, "2000-03-01T00:00:00Z"),
            (1_798_761_599, "2026-12-31T23:59:59Z"),
        ] {
            assert_eq!(rfc3339(seconds), expected);
        }
    }
}
