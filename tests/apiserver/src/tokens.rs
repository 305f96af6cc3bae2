//! Tokens of service accounts, as kubelets ask for them and project them into pods, and their review: JSON web tokens
//! with the claims of real ones, signed by a key that everybody knows.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_lc_rs::hmac;
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
    asked["status"] = json!({"token": token.signed()});
    Ok(json_body(StatusCode::CREATED, &asked))
}

fn requested(
    shared: &Shared,
    [namespace, account]: [&str; 2],
    spec: &Value,
) -> Result<Token, Failure> {
    let of = &spec["boundObjectRef"];
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
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
    let audiences = spec["audiences"].as_array().into_iter().flatten();
    let lasts = spec["expirationSeconds"].as_u64().unwrap_or(3600);
    Ok(Token {
        namespace: namespace.to_owned(),
        service_account: account.to_owned(),
        audiences: audiences.map(text).collect(),
        pod: Some((name, uid)),
        node: pod["spec"]["nodeName"].as_str().map(str::to_owned),
        expires: SystemTime::now() + Duration::from_secs(lasts),
    })
}

async fn json_of(request: Request<Incoming>) -> Result<Value, Failure> {
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
    Ok(json!({"authenticated": true, "audiences": audiences,
        "user": {"username": token.user(), "uid": "of-the-account", "extra": extra,
            "groups": ["system:serviceaccounts", "system:authenticated"]}}))
}

fn seconds(moment: SystemTime) -> u64 {
    let since = moment.duration_since(UNIX_EPOCH);
    since.unwrap_or_default().as_secs()
}

fn encode(bytes: &[u8]) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

fn decode(text: &str) -> Option<Vec<u8>> {
    URL_SAFE_NO_PAD.decode(text).ok()
}
