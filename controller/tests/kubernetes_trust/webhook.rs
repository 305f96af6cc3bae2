//! The webhook as an API server calls it: over TLS, by the name of its Service and the roots in the ConfigMap, with
//! `AdmissionReview`s.

use std::sync::Arc;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rustls::pki_types::ServerName;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use weft_apiserver::Store;
use weft_controller::objects::decode;

use crate::stage::{DEADLINE, Stage, object, wait_for};

pub(crate) const NAME: &str = "weft-webhook.weft-system.svc";

/// Sends a request as it is, and takes what is answered until the connection ends; an error: it failed.
async fn sent(stage: &Stage, name: &str, request: &[u8]) -> std::io::Result<String> {
    sent_by(stage, &stage.roots().await, name, request).await
}

/// The same, where the webhook is known by these roots.
async fn sent_by(stage: &Stage, pem: &str, name: &str, request: &[u8]) -> std::io::Result<String> {
    let mut stream = connected_by(stage, pem, name).await?;
    stream.write_all(request).await?;
    let mut answer = vec![];
    // Ended by the server, perhaps without a word.
    let _ = stream.read_to_end(&mut answer).await;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

pub(crate) async fn connected_by(
    stage: &Stage,
    pem: &str,
    name: &str,
) -> std::io::Result<TlsStream<TcpStream>> {
    let mut roots = RootCertStore::empty();
    let certificates = rustls::pki_types::CertificateDer::pem_slice_iter(pem.as_bytes());
    roots.add_parsable_certificates(certificates.map(|it| it.expect("PEM")));
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("good")
        .with_root_certificates(roots)
        .with_no_client_auth();
    let address = stage.webhook.expect("there is one");
    let stream = TcpStream::connect(address).await?;
    let name = ServerName::try_from(name.to_owned()).expect("a name");
    let connector = TlsConnector::from(Arc::new(config));
    connector.connect(name, stream).await
}

fn post(body: &str) -> Vec<u8> {
    let length = body.len();
    format!(
        "POST /validate?timeout=5s HTTP/1.1\r\nHost: {NAME}\r\nContent-Type: application/json\r\n\
         Content-Length: {length}\r\nConnection: close\r\n\r\n{body}"
    )
    .into_bytes()
}

async fn asked(stage: &Stage, request: &[u8]) -> String {
    let sent = timeout(DEADLINE, sent(stage, NAME, request)).await;
    sent.expect("in time").expect("connected")
}

fn review(port: &Value) -> String {
    let object = json!({"apiVersion": "policy.weft.dev/v1alpha1", "kind": "Server",
        "metadata": {"name": "web", "namespace": "shop"},
        "spec": {"podSelector": {}, "port": port}});
    let kind = json!({"group": "policy.weft.dev", "version": "v1alpha1", "kind": "Server"});
    json!({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": {
        "uid": "705ab4f5-6393-11e8-b7cc-42010a800002", "kind": kind, "operation": "CREATE",
        "name": "web", "namespace": "shop", "userInfo": {"username": "somebody"},
        "object": object, "oldObject": null, "dryRun": false, "options": {}}})
    .to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_api_server_is_told_what_cannot_be_used() {
    let stage = Stage::with(Store::of_mesh(), &["--webhook", "127.0.0.1:0"]).await;
    stage.until("/ready", "ready\n").await;
    // Its certificate is made when there is an issuer.
    let connected = async {
        while sent(&stage, NAME, b"GET / HTTP/1.0\r\n\r\n").await.is_err() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(DEADLINE, connected).await.expect("in time");
    let good = asked(&stage, &post(&review(&json!(80)))).await;
    assert!(
        good.starts_with("HTTP/1.1 200 ") && good.contains(r#""allowed":true"#),
        "{good}"
    );
    let bad = asked(&stage, &post(&review(&json!(0)))).await;
    assert!(
        bad.starts_with("HTTP/1.1 200 ") && bad.contains(r#""allowed":false"#),
        "{bad}"
    );
    assert!(bad.contains("spec.port"), "{bad}");
    for (request, status) in [
        (post("{}"), "400"),
        (b"POST /validate HTTP/1.1\r\nHost: x\r\nContent-Length: 5000000\r\nConnection: close\r\n\r\n".to_vec(), "413"),
        (b"GET /validate HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".to_vec(), "405"),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".to_vec(), "404"),
        // A body that does not come.
        (b"POST /validate HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\nConnection: close\r\n\r\n".to_vec(), "408"),
    ] {
        let answer = asked(&stage, &request).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{status}: {answer}");
    }
    for (result, count) in [("allowed", 1), ("denied", 1), ("malformed", 1)] {
        let series = format!(r#"weft_controller_reviews_total{{result="{result}"}}"#);
        assert_eq!(stage.counted(&series).await, count, "{result}");
    }
    // Nobody else's name.
    let other = sent(&stage, "weft-controller", &post(&review(&json!(80)))).await;
    assert!(other.is_err(), "{other:?}");
}

/// Somebody who goes away in the middle of it leaves nothing behind: neither room that others lack, nor anything that
/// waits. Whoever waited for a request that does not come would do so for five seconds.
#[tokio::test(flavor = "multi_thread")]
async fn who_hangs_up_leaves_nothing_behind() {
    const ROOM: usize = 64;
    const SOON: Duration = Duration::from_secs(4);
    let stage = Stage::with(Store::of_mesh(), &WEBHOOK).await;
    stage.until("/metrics", "weft_controller_leader 1").await;
    let whole = post(&review(&json!(80)));
    timeout(DEADLINE, answered(&stage)).await.expect("in time");
    let roots = stage.roots().await;
    let head = whole.len() - review(&json!(80)).len();
    // Before anything, within the head, within the body, and after all of it, without the answer.
    for bytes in [0, head / 2, head + 9, whole.len()] {
        // Some come and go.
        let tasks = stage.counted("weft_controller_tasks ").await + 5;
        let mut held = vec![];
        for _ in 0..ROOM {
            let connected = connected_by(&stage, &roots, NAME).await;
            let mut stream = connected.expect("there is room");
            stream.write_all(&whole[..bytes]).await.expect("taken");
            stream.flush().await.expect("taken");
            held.push(stream);
        }
        let began = Instant::now();
        drop(held);
        timeout(DEADLINE, answered(&stage)).await.expect("in time");
        let all_gone = async {
            while stage.counted("weft_controller_tasks ").await > tasks {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        timeout(DEADLINE, all_gone).await.expect("in time");
        let took = began.elapsed();
        assert!(took < SOON, "after {bytes} bytes: {took:?}");
    }
}

/// There is no more room than there is, and it is there again when somebody leaves.
#[tokio::test(flavor = "multi_thread")]
async fn connections_have_a_bound() {
    const BUSY: &str = r#"weft_controller_reviews_total{result="busy"}"#;
    let stage = Stage::with(Store::of_mesh(), &WEBHOOK).await;
    timeout(DEADLINE, answered(&stage)).await.expect("in time");
    // Whoever does not even begin a handshake takes room, too, for three seconds.
    let address = stage.webhook.expect("there is one");
    let mut held = vec![];
    let full = async {
        while stage.counted(BUSY).await == 0 {
            for _ in 0..16 {
                held.push(TcpStream::connect(address).await.expect("connected"));
            }
        }
    };
    timeout(DEADLINE, full).await.expect("in time");
    assert!(held.len() > 64, "{}", held.len());
    drop(held);
    timeout(DEADLINE, answered(&stage)).await.expect("in time");
}

/// Asks until it answers.
async fn answered(stage: &Stage) {
    let whole = post(&review(&json!(80)));
    while !matches!(sent(stage, NAME, &whole).await, Ok(it) if it.contains("allowed")) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// The configuration of the component, as it is applied; what is not the controller's to change, too.
fn configuration() -> Value {
    let file = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../daemonset/components/webhook/webhook.yaml"
    );
    let text = std::fs::read_to_string(file).expect("there");
    let documents = decode::documents(&text).expect("YAML").into_iter();
    let mut found = documents.filter(|it| it["kind"] == CONFIGURATION);
    let mut configuration = found.next().expect("there is one");
    let mut other = configuration["webhooks"][0].clone();
    other["name"] = json!("other.example.com");
    other["clientConfig"] =
        json!({"service": {"name": "other", "namespace": "other"}, "caBundle": "b3RoZXI="});
    let webhooks = configuration["webhooks"].as_array_mut();
    webhooks.expect("a list").insert(0, other);
    configuration
}

const CONFIGURATION: &str = "ValidatingWebhookConfiguration";
const WEBHOOK: [&str; 2] = ["--webhook", "127.0.0.1:0"];

fn configured(store: &Store) -> Option<Arc<Value>> {
    let mut objects = store.objects().into_iter();
    objects.find(|it| it["kind"] == CONFIGURATION)
}

/// What API servers know the webhook by.
fn bundle(store: &Store) -> Option<String> {
    let bundle = configured(store)?["webhooks"][1]["clientConfig"]["caBundle"].clone();
    String::from_utf8(STANDARD.decode(bundle.as_str()?).ok()?).ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn api_servers_know_it_by_the_roots_of_the_mesh() {
    let store = Store::of_mesh();
    store.apply(&configuration()).expect("applied");
    let stage = Stage::with(store, &WEBHOOK).await;
    let second = stage.another(&WEBHOOK).await;
    let written = wait_for("the roots", || bundle(&stage.store)).await;
    assert_eq!(written, stage.roots().await);
    // It is what the certificate is verified by.
    let answer = async {
        loop {
            let request = post(&review(&json!(0)));
            match sent_by(&stage, &written, NAME, &request).await {
                Ok(answer) if !answer.is_empty() => return answer,
                _ => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    };
    let answer = timeout(DEADLINE, answer).await.expect("in time");
    assert!(answer.contains(r#""allowed":false"#), "{answer}");
    // Nothing else was changed, and by one of both only.
    let mut expected = configuration();
    expected["webhooks"][1]["clientConfig"]["caBundle"] = json!(STANDARD.encode(&written));
    let now = configured(&stage.store).expect("there");
    assert_eq!(now["webhooks"], expected["webhooks"]);
    let patches = |stage: &Stage| {
        let requests = stage.server().requests().into_iter();
        requests
            .filter(|it| it.starts_with("PATCH") && it.contains("webhookconfigurations"))
            .count()
    };
    assert_eq!(patches(&stage), 1);
    // A root that is added to the Secret is known at once, by whoever leads.
    let mut root = rcgen::CertificateParams::default();
    let key = rcgen::KeyPair::generate().expect("made");
    root.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let root = root.self_signed(&key).expect("signed").pem();
    let secret = object(&stage.store, "Secret", "weft-identity-issuer").expect("made");
    let mut secret = Value::clone(&secret);
    secret["data"]["ca.crt"] = json!(STANDARD.encode(format!("{written}{root}")));
    stage.store.apply(&secret).expect("applied");
    let both = wait_for("both roots", || {
        bundle(&stage.store).filter(|it| it.matches("BEGIN CERTIFICATE").count() == 2)
    })
    .await;
    assert!(both.starts_with(&written), "{both}");
    drop(second);
}

/// What it may not write is a problem that says what to do, and is written when it may.
#[tokio::test(flavor = "multi_thread")]
async fn what_api_servers_do_not_know_it_by_is_told() {
    let stage = Stage::with(Store::of_mesh(), &WEBHOOK).await;
    stage.server().behave(|it| {
        let plural = "validatingwebhookconfigurations".to_owned();
        it.refused.insert(plural, 403);
    });
    stage.store.apply(&configuration()).expect("applied");
    stage
        .until("/problems", "they are in daemonset/components/webhook")
        .await;
    assert_eq!(bundle(&stage.store), None);
    stage.server().behave(|it| it.refused.clear());
    wait_for("the roots", || bundle(&stage.store)).await;
}
