//! What the controller may do by its manifests is what it does: nothing else is asked for in a run in which everything
//! happens that it has to do with an API server, and nothing is allowed that is not asked for.

use std::collections::BTreeSet;

use serde_json::{Value, json};
use weft_apiserver::{Kind, Right, Store};
use weft_controller::objects::{ObjectKind, decode};

use crate::inspection;
use crate::stage::{Stage, object, rights, token_of, wait_for};

/// Rights that nothing is asked for by, and why they are needed.
const UNSEEN: [(&str, &str); 7] = [
    ("get projectcalico.org/tiers", TIERS),
    ("get projectcalico.org/tier.networkpolicies", TIERS),
    ("list projectcalico.org/tier.networkpolicies", TIERS),
    ("watch projectcalico.org/tier.networkpolicies", TIERS),
    ("get projectcalico.org/tier.globalnetworkpolicies", TIERS),
    ("list projectcalico.org/tier.globalnetworkpolicies", TIERS),
    ("watch projectcalico.org/tier.globalnetworkpolicies", TIERS),
];
const TIERS: &str = "Calico's own API server looks for these rights when it is asked for policies";

/// A Service, a route of each kind to it, and what tells API servers of the webhook: these are written on.
const WRITTEN_ON: &str = "
{apiVersion: v1, kind: Service, metadata: {name: web, namespace: shop},
  spec: {clusterIPs: [10.2.0.1], ports: [{port: 80}]}}
---
{apiVersion: gateway.networking.k8s.io/v1, kind: HTTPRoute, metadata: {name: r, namespace: shop}, spec: SPEC}
---
{apiVersion: gateway.networking.k8s.io/v1, kind: GRPCRoute, metadata: {name: r, namespace: shop}, spec: SPEC}
---
{apiVersion: gateway.networking.k8s.io/v1alpha3, kind: TLSRoute, metadata: {name: r, namespace: shop}, spec: SPEC}
---
{apiVersion: gateway.networking.k8s.io/v1alpha2, kind: TCPRoute, metadata: {name: r, namespace: shop}, spec: SPEC}
---
{apiVersion: policy.linkerd.io/v1beta3, kind: HTTPRoute, metadata: {name: r, namespace: shop}, spec: SPEC}
---
{apiVersion: admissionregistration.k8s.io/v1, kind: ValidatingWebhookConfiguration, metadata: {name: weft-webhook},
  webhooks: [{name: validate.weft.dev, admissionReviewVersions: [v1], sideEffects: None,
    clientConfig: {service: {name: weft-webhook, namespace: weft-system}}}]}
";
const SPEC: &str = "{parentRefs: [{group: '', kind: Service, name: web, port: 80}],
  rules: [{backendRefs: [{name: web, port: 80}]}]}";

/// A kind that the index reads.
fn is_read(kind: &Kind) -> bool {
    ObjectKind::find(&kind.group, &kind.kind).is_some_and(|it| it != ObjectKind::ServiceAccount)
}

/// An object of a kind that cannot be read.
fn unreadable(kind: &Kind) -> Value {
    let mut object = json!({"apiVersion": kind.api_version(&kind.versions[0]), "kind": kind.kind,
        "metadata": {"name": "bad", "labels": 7, "annotations": 7}, "spec": 7, "addressType": 7, "endpoints": 7});
    if kind.namespaced {
        object["metadata"]["namespace"] = json!("shop");
    }
    object
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_allowed_is_what_is_asked_for() {
    let store = Store::of_mesh();
    let kinds = || {
        let kinds = Kind::all_built_in().into_iter();
        kinds
            .chain(Kind::all_of_meshes())
            .chain(Kind::all_of_cnis())
    };
    Kind::all_of_cnis()
        .into_iter()
        .for_each(|it| store.install(it));
    for kind in kinds().filter(is_read) {
        store
            .apply(&unreadable(&kind))
            .expect("of a kind that is served");
    }
    let written_on = WRITTEN_ON.replace("SPEC", SPEC);
    for document in decode::documents(&written_on).expect("YAML") {
        store.apply(&document).expect("of a kind that is served");
    }
    let further = ["--webhook", "127.0.0.1:0", "--inspect", "127.0.0.1:0"];
    let stage = Stage::with(store, &further).await;
    stage.until("/ready", "ready\n").await;
    stage.until("/metrics", "weft_controller_leader 1").await;
    let token = token_of("agent-1", "one").signed();
    stage.subscribe(&token, "one").await.expect("served");
    inspection::allow_viewers(&stage.store);
    let (status, answer) = inspection::get(&stage, "/status", &[&inspection::viewer()]).await;
    assert_eq!(status, 200, "{answer}");
    // What others change is written again.
    let roots = stage.roots().await;
    let mut map =
        Value::clone(&object(&stage.store, "ConfigMap", "weft-identity-roots").expect("made"));
    map["data"]["ca.crt"] = json!("");
    stage.store.apply(&map).expect("applied");
    wait_for("the roots again", || {
        let map = object(&stage.store, "ConfigMap", "weft-identity-roots")?;
        (map["data"]["ca.crt"] == roots).then_some(())
    })
    .await;
    let allowed = rights().all();
    let unseen: BTreeSet<&str> = UNSEEN.iter().map(|(right, _)| *right).collect();
    let lacks = || -> BTreeSet<String> {
        let accesses = stage.server().accesses();
        let asked: BTreeSet<Right> = accesses.iter().map(|it| it.right()).collect();
        let lacks = allowed.difference(&asked).map(ToString::to_string);
        lacks.filter(|it| !unseen.contains(it.as_str())).collect()
    };
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while !lacks().is_empty() && std::time::Instant::now() < deadline {
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    assert!(
        lacks().is_empty(),
        "allowed, and never asked for: {:#?}",
        lacks()
    );
    let refused = stage.server().accesses().into_iter();
    let refused: Vec<_> = refused.filter(|it| !rights().allow(it)).collect();
    assert!(
        refused.is_empty(),
        "asked for, and not allowed: {refused:#?}"
    );
}

/// A rule that names objects gives nothing of others, and no other rule does.
#[test]
fn what_is_allowed_of_named_objects_is_allowed_of_no_others() {
    let rights = rights();
    let named = rights.named();
    let has = |verb: &str, resource: &str| {
        let mut all = named.iter();
        all.any(|it| it.verb == verb && it.resource == resource)
    };
    for (verb, resource) in [
        ("list", "secrets"),
        ("update", "configmaps"),
        ("update", "leases"),
        ("patch", "validatingwebhookconfigurations"),
    ] {
        assert!(has(verb, resource), "{verb} {resource} names no object");
    }
    for access in named {
        assert!(rights.allow(&access), "{access:?}");
        for name in [Some("another".to_owned()), None] {
            let other = weft_apiserver::Access {
                name,
                ..access.clone()
            };
            assert!(!rights.allow(&other), "{other:?}");
        }
    }
}
