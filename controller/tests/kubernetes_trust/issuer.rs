//! The issuer in a Secret, and the roots in a ConfigMap: made, followed, restored, and never replaced by a guess.

use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use serde_json::{Value, json};
use tonic::Code;
use weft_apiserver::{Asked, Fault, Store};

use crate::stage::{Stage, object, token_of, wait_for};

pub(crate) const SECRET: &str = "weft-identity-issuer";
const ROOTS: &str = "weft-identity-roots";

/// A root that acts as issuer, or an issuer below another.
pub(crate) struct Made {
    pub(crate) certificate: String,
    key: KeyPair,
    params: CertificateParams,
}

impl Made {
    pub(crate) fn root(name: &str) -> Self {
        let (params, key) = (params(name), KeyPair::generate().expect("made"));
        let certificate = params.self_signed(&key).expect("signed").pem();
        Self {
            certificate,
            key,
            params,
        }
    }

    fn below(&self, name: &str) -> Self {
        let (params, key) = (params(name), KeyPair::generate().expect("made"));
        let issuer = Issuer::from_params(&self.params, &self.key);
        let certificate = params.signed_by(&key, &issuer).expect("signed").pem();
        Self {
            certificate,
            key,
            params,
        }
    }

    /// A Secret as cert-manager writes it.
    pub(crate) fn secret(&self, roots: &str) -> Value {
        secret(roots, &self.certificate, &self.key.serialize_pem())
    }
}

fn params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params
        .distinguished_name
        .push(rcgen::DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params
}

pub(crate) fn secret(roots: &str, certificate: &str, key: &str) -> Value {
    let [roots, certificate, key] = [roots, certificate, key].map(|it| STANDARD.encode(it));
    json!({"apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/tls",
        "metadata": {"name": SECRET, "namespace": "weft-system"},
        "data": {"ca.crt": roots, "tls.crt": certificate, "tls.key": key}})
}

fn named(kind: &str, name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": kind,
        "metadata": {"name": name, "namespace": "weft-system"}})
}

/// A part of the Secret as it is now.
fn part(store: &Store, name: &str) -> Option<String> {
    let secret = object(store, "Secret", SECRET)?;
    let bytes = STANDARD.decode(secret["data"][name].as_str()?).ok()?;
    String::from_utf8(bytes).ok()
}

async fn roots_are(stage: &Stage, roots: &str) {
    wait_for("the ConfigMap to say these roots", || {
        let map = object(&stage.store, "ConfigMap", ROOTS)?;
        let said = map["data"]["ca.crt"].as_str()?;
        (said.replace('\r', "") == roots.replace('\r', "")).then_some(())
    })
    .await;
}

#[tokio::test]
async fn an_issuer_is_made_where_there_is_none() {
    let stage = Stage::start().await;
    let secret = object(&stage.store, "Secret", SECRET).expect("made");
    assert_eq!(secret["type"], "kubernetes.io/tls");
    let [root, own, key] = ["ca.crt", "tls.crt", "tls.key"].map(|it| part(&stage.store, it));
    assert_eq!(root, own);
    assert!(key.is_some_and(|it| it.contains("PRIVATE KEY")));
    assert_eq!(stage.roots().await, root.expect("there"));
    let map = object(&stage.store, "ConfigMap", ROOTS).expect("made");
    assert!(!map.to_string().contains("PRIVATE"), "{map}");
    let token = token_of("agent-1", "one").signed();
    stage.sign(&token, "web").await.expect("signed");
    // Nothing is asked for that a right to these names does not cover.
    let requests = stage.server().requests().into_iter();
    let of_secrets: Vec<_> = requests.filter(|it| it.contains("/secrets")).collect();
    let good = |it: &String| {
        it.starts_with("POST /api/v1/namespaces/weft-system/secrets")
            || it.starts_with("/api/v1/namespaces/weft-system/secrets?")
                && it.contains("fieldSelector=metadata.name%3Dweft-identity-issuer")
    };
    assert!(of_secrets.iter().all(good), "{of_secrets:?}");
}

/// Two that start at once agree on one issuer.
#[tokio::test]
async fn of_two_that_make_one_both_have_the_same() {
    for _ in 0..5 {
        let stage = Stage::with(Store::of_mesh(), &[]).await;
        let (second, third) = tokio::join!(stage.another(&[]), stage.another(&[]));
        let token = token_of("agent-1", "one").signed();
        for controller in [&*stage, &second, &third] {
            controller.until("/ready", "ready\n").await;
            // Over TLS by the ConfigMap's roots, so they serve by the same issuer.
            let chain = controller.sign(&token, "web").await.expect("signed");
            assert_eq!(chain.len(), 1);
        }
        assert_eq!(Some(stage.roots().await), part(&stage.store, "ca.crt"));
    }
}

#[tokio::test]
async fn another_issuer_is_taken_over_and_a_bad_one_is_not() {
    let stage = Stage::start().await;
    let token = token_of("agent-1", "one").signed();
    let mut agent = stage.subscribe(&token, "one").await.expect("served");
    let old = part(&stage.store, "ca.crt").expect("made");
    let (root, stranger) = (Made::root("new"), Made::root("stranger"));
    let issuer = root.below("issuer");
    let key = issuer.key.serialize_pem();
    for (bad, named) in [
        (
            secret(
                &root.certificate,
                &issuer.certificate,
                &stranger.key.serialize_pem(),
            ),
            "tls.key",
        ),
        (
            secret(&stranger.certificate, &issuer.certificate, &key),
            "tls.crt",
        ),
        (secret("no PEM", &issuer.certificate, &key), "ca.crt"),
        (secret(&root.certificate, "", &key), "tls.crt"),
        (
            secret(&root.certificate, &issuer.certificate, "no key"),
            "tls.key",
        ),
        (
            json!({"apiVersion": "v1", "kind": "Secret", "data": {"tls.crt": "AAAA", "tls.key": "AAAA"},
                "metadata": {"name": SECRET, "namespace": "weft-system"}}),
            "ca.crt: missing",
        ),
    ] {
        stage.store.apply(&bad).expect("applied");
        stage.until("/problems", named).await;
        let problems = stage.get("/problems").await;
        assert!(
            problems.contains("Secret weft-system/weft-identity-issuer"),
            "{problems}"
        );
        assert!(problems.contains("before stay in force"), "{problems}");
        assert!(!problems.contains("PRIVATE KEY"), "{problems}");
        stage.sign(&token, "web").await.expect("still signed");
        assert_eq!(stage.roots().await, old);
    }
    // First the root, beside the old one; then the issuer.
    let both = old.clone() + &root.certificate;
    let first = secret(&both, &old, &part_before(&stage).await);
    stage.store.apply(&first).expect("applied");
    roots_are(&stage, &both).await;
    agent.pushed().await.expect("told the roots");
    stage.store.apply(&issuer.secret(&both)).expect("applied");
    let series = "weft_controller_problems";
    stage.until("/metrics", &format!("{series} 0")).await;
    let chain = || async { stage.sign(&token, "web").await.expect("signed").len() };
    let deadline = tokio::time::Instant::now() + crate::stage::DEADLINE;
    // With the issuer below the root.
    while chain().await != 2 {
        assert!(
            tokio::time::Instant::now() < deadline,
            "not signed by the new issuer"
        );
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    stage
        .store
        .apply(&issuer.secret(&root.certificate))
        .expect("applied");
    roots_are(&stage, &root.certificate).await;
    assert_eq!(chain().await, 2);
}

/// The key that the controller made: what was applied since did not come into force.
async fn part_before(stage: &Stage) -> String {
    stage.store.delete(&named("Secret", SECRET)).expect("there");
    // It is restored from what is in force.
    wait_for("the Secret to be restored", || {
        part(&stage.store, "tls.key")
    })
    .await
}

#[tokio::test]
async fn an_issuer_that_others_write_is_waited_for() {
    let stage = Stage::with(Store::of_mesh(), &["--wait-for-issuer"]).await;
    stage.until("/problems", "--wait-for-issuer").await;
    stage.until("/ready", "no issuer").await;
    let root = Made::root("of cert-manager");
    stage
        .store
        .apply(&root.secret(&root.certificate))
        .expect("applied");
    stage.until("/ready", "ready\n").await;
    let token = token_of("agent-1", "one").signed();
    stage.sign(&token, "web").await.expect("signed");
    // Nor is it written back when it goes.
    stage.store.delete(&named("Secret", SECRET)).expect("there");
    stage.until("/problems", "the Secret is not there").await;
    stage.sign(&token, "web").await.expect("still signed");
    assert!(object(&stage.store, "Secret", SECRET).is_none());
}

#[tokio::test]
async fn what_was_deleted_is_restored_as_it_was() {
    let stage = Stage::start().await;
    let (roots, key) = (stage.roots().await, part(&stage.store, "tls.key"));
    for kind in [named("Secret", SECRET), named("ConfigMap", ROOTS)] {
        stage.store.delete(&kind).expect("there");
    }
    wait_for("the Secret", || object(&stage.store, "Secret", SECRET)).await;
    assert_eq!(part(&stage.store, "tls.key"), key);
    assert_eq!(stage.roots().await, roots);
    // And what others write into the ConfigMap is not left there.
    let mut map = named("ConfigMap", ROOTS);
    map["data"] = json!({"ca.crt": Made::root("of somebody").certificate, "other": "stays"});
    stage.store.apply(&map).expect("applied");
    roots_are(&stage, &roots).await;
    let map = object(&stage.store, "ConfigMap", ROOTS).expect("there");
    assert_eq!(map["data"]["other"], "stays");
}

/// Whoever starts without the Secret, where agents have roots, must not make others.
#[tokio::test]
async fn a_lost_issuer_is_not_replaced_by_a_guess() {
    let store = Store::of_mesh();
    let mut map = named("ConfigMap", ROOTS);
    map["data"] = json!({"ca.crt": Made::root("lost").certificate});
    store.apply(&map).expect("applied");
    let stage = Stage::with(store, &[]).await;
    stage.until("/problems", "restore the Secret").await;
    assert!(object(&stage.store, "Secret", SECRET).is_none());
    stage.until("/ready", "no issuer").await;
    stage.store.delete(&map).expect("there");
    stage.until("/ready", "ready\n").await;
    assert!(object(&stage.store, "Secret", SECRET).is_some());
}

/// A missing right is told, with what is missing; an API server that is away changes nothing.
#[tokio::test]
async fn what_cannot_be_read_or_written_is_told() {
    let store = Store::of_mesh();
    let mut stage = Stage::with(store, &[]).await;
    stage.until("/ready", "ready\n").await;
    // Ready is who has an issuer; that agents have the roots comes after.
    stage.roots().await;
    stage.server().behave(|it| {
        it.refused.insert("secrets".to_owned(), 403);
        it.refused.insert("configmaps".to_owned(), 403);
    });
    stage.server().disconnect();
    stage
        .until("/problems", "Secret weft-system/weft-identity-issuer")
        .await;
    stage
        .until("/problems", "the roots cannot be written")
        .await;
    let second = stage.another(&[]).await;
    second.until("/problems", "nothing is signed").await;
    let token = token_of("agent-1", "one").signed();
    stage.sign(&token, "web").await.expect("signed");
    stage.stop_server().await;
    stage.sign(&token, "web").await.expect("signed");
    let unknown = token_of("agent-2", "two").signed();
    let refused = stage.sign(&unknown, "cart").await.expect_err("unknown");
    assert_eq!(refused.code(), Code::Unavailable);
    stage.start_server().await;
    second.until("/ready", "ready\n").await;
    second.sign(&token, "web").await.expect("signed");
    let same: Arc<Value> = object(&stage.store, "Secret", SECRET).expect("there");
    assert!(same["data"]["tls.key"].is_string());
}

/// Who asks again at once, as all controllers would, keeps a server down that is busy.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_asks_for_a_pause_is_not_asked_for_the_issuer() {
    let stage = Stage::start().await;
    let asked = Duration::from_secs(3);
    let fault = Fault::new("secrets", Asked::Watch, 429, 1).asking(asked.as_secs() as u32);
    stage.server().behave(|it| it.faults = vec![fault]);
    let before = stage.server().request_times().len();
    stage.server().disconnect();
    // One that does not wait is served at once, and has nothing to ask for after that.
    let has_waited = || {
        let times = stage.server().request_times().into_iter().skip(before);
        let times = times.filter(|(_, it)| it.contains("/secrets?"));
        let times: Vec<_> = times.map(|(at, _)| at).collect();
        let mut pauses = times.windows(2).map(|it| it[1] - it[0]);
        pauses.any(|it| it >= asked).then_some(())
    };
    wait_for("the Secret to be asked for after the pause", has_waited).await;
}
