//! The webhook as a user of a cluster sees it: somebody writes, the API server asks the controllers by what the component
//! `webhook` says, and what cannot be used is refused with the reason.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use kube::Api;
use kube::api::{ApiResource, DynamicObject, GroupVersionKind, Patch, PatchParams, PostParams};
use kube::core::Status;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::time::timeout;
use weft_apiserver::{Options, Server, Store, Tls};
use weft_controller::objects::decode;
use weft_controller::source::kubernetes::Connection;

use crate::issuer::{Made, SECRET, secret};
use crate::stage::{DEADLINE, Stage, object, wait_for};
use crate::webhook::{NAME, connected_by};

const CONFIGURATION: &str = "ValidatingWebhookConfiguration";
const WEBHOOK: [&str; 2] = ["--webhook", "127.0.0.1:0"];

/// What the component says, with this failure policy in place of its own.
fn component(failure_policy: Option<&str>) -> Vec<Value> {
    let file = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../daemonset/components/webhook/webhook.yaml"
    );
    let text = std::fs::read_to_string(file).expect("there");
    let mut documents = decode::documents(&text).expect("YAML");
    for it in &mut documents {
        if let (Some(policy), true) = (failure_policy, it["kind"] == CONFIGURATION) {
            it["webhooks"][0]["failurePolicy"] = json!(policy);
        }
    }
    documents
}

/// A cluster with the component, and a controller that serves its webhook.
async fn with_component(failure_policy: Option<&str>) -> Stage {
    let store = Store::of_mesh();
    for document in component(failure_policy) {
        store.apply(&document).expect("of a kind that is served");
    }
    let stage = Stage::with(store, &WEBHOOK).await;
    endpoints(&stage.store, stage.webhook);
    stage
}

/// The EndpointSlice of the Service: the controllers that are ready.
fn endpoints(store: &Store, webhook: Option<SocketAddr>) {
    let port = webhook.map_or(15013, |it| it.port());
    let endpoints =
        webhook.map(|it| json!({"addresses": [it.ip()], "conditions": {"ready": true}}));
    let endpoints: Vec<Value> = endpoints.into_iter().collect();
    let slice = json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {"name": "weft-webhook-1", "namespace": "weft-system",
            "labels": {"kubernetes.io/service-name": "weft-webhook"}},
        "addressType": "IPv4", "endpoints": endpoints,
        "ports": [{"name": "https", "port": port, "protocol": "TCP"}]});
    store.apply(&slice).expect("applied");
}

/// Somebody who may write Servers, at an API server of the same cluster.
struct Writer {
    servers: Api<DynamicObject>,
    _server: Server,
}

impl Writer {
    async fn of(stage: &Stage) -> Self {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let server = Server::start(stage.store.clone(), any, Options::default()).await;
        let server = server.expect("started");
        let kubeconfig = stage.folder.path().join("writer");
        std::fs::write(&kubeconfig, server.kubeconfig()).expect("written");
        let connection = Connection {
            kubeconfig: Some(kubeconfig),
            context: None,
        };
        let client = connection.client().await.expect("a client");
        let kind = GroupVersionKind::gvk("policy.weft.dev", "v1alpha1", "Server");
        let kind = ApiResource::from_gvk(&kind);
        Self {
            servers: Api::namespaced_with(client, "shop", &kind),
            _server: server,
        }
    }

    /// Makes a Server for a port; an error: what whoever writes is told.
    async fn create(&self, name: &str, port: u16) -> Result<(), Box<Status>> {
        let server = json!({"apiVersion": "policy.weft.dev/v1alpha1", "kind": "Server",
            "metadata": {"name": name, "namespace": "shop"},
            "spec": {"podSelector": {}, "port": port}});
        let server = serde_json::from_value(server).expect("an object");
        let created = self.servers.create(&PostParams::default(), &server).await;
        told(created.map(drop))
    }

    async fn change(&self, name: &str, patch: Value) -> Result<(), Box<Status>> {
        let parameters = PatchParams::default();
        let patch = Patch::Merge(patch);
        told(
            self.servers
                .patch(name, &parameters, &patch)
                .await
                .map(drop),
        )
    }

    async fn to_port(&self, name: &str, port: u16) -> Result<(), Box<Status>> {
        self.change(name, json!({"spec": {"port": port}})).await
    }
}

fn told(written: Result<(), kube::Error>) -> Result<(), Box<Status>> {
    match written {
        Ok(()) => Ok(()),
        Err(kube::Error::Api(status)) => Err(status),
        Err(error) => panic!("the API server does not answer: {error}"),
    }
}

/// The port of a Server of the shop, as it is stored.
fn port(store: &Store, name: &str) -> Option<u64> {
    store.object("Server", "shop", name)?["spec"]["port"].as_u64()
}

/// What API servers know the webhook by.
fn bundle(store: &Store) -> Option<String> {
    let configuration = store.object(CONFIGURATION, "", "weft-webhook")?;
    let bundle = configuration["webhooks"][0]["clientConfig"]["caBundle"].clone();
    String::from_utf8(STANDARD.decode(bundle.as_str()?).ok()?).ok()
}

/// Waits until API servers can ask: the leader has written by what, and there is a certificate.
async fn asked(stage: &Stage) {
    let roots = wait_for("the roots", || bundle(&stage.store)).await;
    let waiting = async {
        while handshake(stage, &roots).await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(DEADLINE, waiting).await.expect("in time");
}

async fn handshake(stage: &Stage, roots: &str) -> std::io::Result<()> {
    connected_by(stage, roots, NAME).await.map(drop)
}

const DENIED: &str = "admission webhook \"validate.weft.dev\" denied the request: weft: spec.port: 0 is no port: 1 to 65535";
const UNASKED: &str = "Internal error occurred: failed calling webhook \"validate.weft.dev\": failed to call webhook: Post \
     \"https://weft-webhook.weft-system.svc:443/validate?timeout=2s\": ";

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_used_is_refused_and_not_stored() {
    let stage = with_component(None).await;
    asked(&stage).await;
    let writer = Writer::of(&stage).await;
    let denied = writer.create("web", 0).await.expect_err("denied");
    assert_eq!(denied.message, DENIED);
    assert_eq!((denied.code, denied.reason.as_str()), (422, "Invalid"));
    assert_eq!(port(&stage.store, "web"), None);
    writer.create("web", 80).await.expect("good");
    let denied = writer.to_port("web", 0).await.expect_err("denied");
    assert_eq!(denied.message, DENIED);
    assert_eq!(port(&stage.store, "web"), Some(80));
    writer.to_port("web", 81).await.expect("good");
    // What is stored is what agents are told of, and nobody was asked about its status.
    let is_programmed = || {
        let server = stage.store.object("Server", "shop", "web")?;
        let conditions = server["status"]["conditions"].as_array()?.clone();
        let mut ours = conditions.iter().filter(|it| it["type"] == "Programmed");
        ours.next().filter(|it| it["status"] == "True").map(drop)
    };
    wait_for("the Server to be programmed", is_programmed).await;
    // A change that the controller's writing of the status gets between is asked about again.
    for (result, counts) in [("allowed", 2..=5), ("denied", 2..=5), ("malformed", 0..=0)] {
        let series = format!(r#"weft_controller_reviews_total{{result="{result}"}}"#);
        let counted = stage.counted(&series).await;
        assert!(counts.contains(&counted), "{result}: {counted}");
    }
    // What was bad before somebody asked can be labelled, and mended.
    let bad = json!({"apiVersion": "policy.weft.dev/v1alpha1", "kind": "Server",
        "metadata": {"name": "bad", "namespace": "shop"}, "spec": {"podSelector": {}, "port": 0}});
    stage.store.apply(&bad).expect("applied");
    let labels = json!({"metadata": {"labels": {"a": "b"}}});
    writer.change("bad", labels).await.expect("let through");
    writer.to_port("bad", 82).await.expect("good");
}

/// The issuer is exchanged, as docs/controller.md says, and with it the certificate of the webhook; nobody who writes is
/// refused for it, though whoever could not ask would be.
#[tokio::test(flavor = "multi_thread")]
async fn its_certificate_is_exchanged_and_nobody_notices() {
    let stage = with_component(Some("Fail")).await;
    asked(&stage).await;
    let writer = Writer::of(&stage).await;
    writer.create("web", 80).await.expect("good");
    let stop = AtomicBool::new(false);
    let writing = async {
        let mut count = 0;
        while !stop.load(Ordering::Relaxed) {
            let good = writer.to_port("web", 80 + count % 2).await;
            good.expect("good, whatever certificate there is");
            let denied = writer.to_port("web", 0).await.expect_err("denied");
            assert_eq!(denied.message, DENIED);
            count += 1;
        }
        count
    };
    let exchanging = async {
        let series = r#"weft_controller_reviews_total{result="denied"}"#;
        let denied = async |so_often: u64| {
            while stage.counted(series).await < so_often {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        denied(1).await;
        let old = wait_for("the roots", || bundle(&stage.store)).await;
        let own = object(&stage.store, "Secret", SECRET).expect("made");
        let part = |name: &str| {
            let bytes = STANDARD.decode(own["data"][name].as_str().expect("there"));
            String::from_utf8(bytes.expect("base64")).expect("a text")
        };
        let new = Made::root("new");
        let both = format!("{}{}", part("ca.crt"), new.certificate);
        let known = |roots: &str| {
            let roots = roots.replace('\r', "");
            let said = bundle(&stage.store)?.replace('\r', "");
            (said == roots).then_some(())
        };
        // First the root, beside the old one; then the issuer; at last the old root goes.
        let first = secret(&both, &part("tls.crt"), &part("tls.key"));
        stage.store.apply(&first).expect("applied");
        wait_for("both roots to be known", || known(&both)).await;
        assert!(handshake(&stage, &old).await.is_ok());
        stage.store.apply(&new.secret(&both)).expect("applied");
        while handshake(&stage, &new.certificate).await.is_err() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let last = new.secret(&new.certificate);
        stage.store.apply(&last).expect("applied");
        wait_for("one root to be known", || known(&new.certificate)).await;
        // Once more, by what is new alone.
        denied(stage.counted(series).await + 2).await;
        stop.store(true, Ordering::Relaxed);
    };
    let both = async { tokio::join!(writing, exchanging) };
    let (count, ()) = timeout(DEADLINE, both).await.expect("in time");
    assert!(count > 2, "{count}");
}

#[tokio::test(flavor = "multi_thread")]
async fn while_no_controller_answers_objects_are_stored_unseen() {
    let stage = with_component(None).await;
    asked(&stage).await;
    let writer = Writer::of(&stage).await;
    writer.create("seen", 0).await.expect_err("denied");
    stage.stop.cancel();
    let away = async {
        while handshake(&stage, &stage.roots().await).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(DEADLINE, away).await.expect("in time");
    writer.create("refused", 0).await.expect("stored");
    endpoints(&stage.store, None);
    writer.create("unready", 0).await.expect("stored");
    // One that takes a call and says nothing holds each write up for as long as it may.
    let silent = TcpListener::bind("127.0.0.1:0").await.expect("bound");
    endpoints(&stage.store, Some(silent.local_addr().expect("bound")));
    let began = Instant::now();
    writer.create("silent", 0).await.expect("stored");
    let took = began.elapsed();
    assert!(
        took >= Duration::from_secs(2) && took < DEADLINE,
        "{took:?}"
    );
    // Whoever is there next says so on them.
    let next = stage.another(&WEBHOOK).await;
    endpoints(&stage.store, next.webhook);
    for name in ["refused", "unready", "silent"] {
        wait_for("it to be said", || {
            let server = stage.store.object("Server", "shop", name)?;
            let accepted = server["status"]["conditions"][0].clone();
            (accepted["reason"] == "Invalid").then_some(())
        })
        .await;
    }
    let denied = async {
        let mut count = 0;
        let annotated = |it: i32| json!({"metadata": {"annotations": {"count": it.to_string()}}});
        while writer.change("refused", annotated(count)).await.is_ok() {
            count += 1;
        }
    };
    timeout(DEADLINE, denied).await.expect("in time");
}

/// With `Fail`, that a controller answers is needed for each change of policy; but not in the controllers' own namespace,
/// where it is left out as docs/controller.md says.
#[tokio::test(flavor = "multi_thread")]
async fn with_fail_nothing_is_stored_unseen() {
    let stage = with_component(Some("Fail")).await;
    asked(&stage).await;
    let writer = Writer::of(&stage).await;
    writer.create("web", 80).await.expect("good");
    let second = stage.another(&WEBHOOK).await;
    second.until("/ready", "ready\n").await;
    stage.stop.cancel();
    endpoints(&stage.store, None);
    let refused = writer.to_port("web", 81).await.expect_err("nobody asked");
    let expected = format!("{UNASKED}no endpoints available for service \"weft-webhook\"");
    assert_eq!(refused.message, expected);
    assert_eq!(
        (refused.code, refused.reason.as_str()),
        (500, "InternalError")
    );
    assert_eq!(port(&stage.store, "web"), Some(80));
    // A certificate that is not the mesh's is none.
    let options = Options {
        tls: Some(Tls::new(&[NAME]).expect("made")),
        ..Options::default()
    };
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    let stranger = Server::start(Store::of_mesh(), any, options).await;
    let stranger = stranger.expect("started");
    endpoints(&stage.store, Some(stranger.address()));
    let refused = writer.to_port("web", 81).await.expect_err("a stranger");
    assert!(
        refused.message.starts_with(&format!("{UNASKED}tls: ")),
        "{}",
        refused.message
    );
    // The other controller is there all along.
    endpoints(&stage.store, second.webhook);
    writer.to_port("web", 81).await.expect("good");
    let denied = writer.to_port("web", 0).await.expect_err("denied");
    assert_eq!(denied.message, DENIED);
    endpoints(&stage.store, None);
    let mut configuration = component(Some("Fail")).pop().expect("there");
    configuration["webhooks"][0]["namespaceSelector"] = json!({"matchExpressions": [
        {"key": "kubernetes.io/metadata.name", "operator": "NotIn", "values": ["shop"]}]});
    stage.store.apply(&configuration).expect("applied");
    let named = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop",
        "labels": {"weft.dev/mesh": "enabled", "kubernetes.io/metadata.name": "shop"}}});
    stage.store.apply(&named).expect("applied");
    writer.to_port("web", 82).await.expect("not asked about");
}
