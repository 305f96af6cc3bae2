//! One of several controllers leads, and it alone writes statuses and Events: what is to be said, once, and nothing of
//! what others say.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kube::Api;
use kube::api::{ApiResource, DynamicObject, GroupVersionKind, Patch, PatchParams};
use serde_json::{Value, json};
use weft_apiserver::Store;
use weft_controller::source::kubernetes::Connection;
use weft_proto::Kind;

use crate::stage::{DEADLINE, Running, Stage, object, token_of, wait_for};

const ROUTE: &str = "HTTPRoute";
const SERVER: &str = "Server";
const LIMIT: &str = "HTTPLocalRateLimitPolicy";
const MESH_TLS: &str = "MeshTLSAuthentication";
const NETWORK: &str = "NetworkAuthentication";

fn service() -> Value {
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": "shop"},
        "spec": {"clusterIPs": ["10.2.0.1"], "ports": [{"port": 80}]}})
}

/// A route of this name to a Service, as the API server keeps it.
fn route(name: &str, backend: &str) -> Value {
    json!({"apiVersion": "gateway.networking.k8s.io/v1", "kind": ROUTE,
    "metadata": {"name": name, "namespace": "shop"},
    "spec": {
        "parentRefs": [{"group": "", "kind": "Service", "name": "web", "port": 80}],
        "rules": [{"backendRefs": [{"name": backend, "port": 80}]}],
    }})
}

fn server(port: &Value) -> Value {
    json!({"apiVersion": "policy.weft.dev/v1alpha1", "kind": SERVER,
        "metadata": {"name": "web", "namespace": "shop"},
        "spec": {"podSelector": {}, "port": port}})
}

fn apply(store: &Store, object: &Value) {
    store.apply(object).expect("of a kind that is served");
}

/// An object of the shop.
fn of_shop(store: &Store, kind: &str, name: &str) -> Option<Arc<Value>> {
    let mut objects = store.objects().into_iter();
    objects.find(|it| {
        let metadata = &it["metadata"];
        it["kind"] == kind && metadata["name"] == name && metadata["namespace"] == "shop"
    })
}

/// A list of conditions as `type=status/generation`.
fn conditions(list: &Value) -> String {
    let list = list.as_array().into_iter().flatten();
    let shown = list.map(|it| {
        let text = |field: &str| it[field].as_str().unwrap_or("?").to_owned();
        let generation = &it["observedGeneration"];
        format!("{}={}/{generation}", text("type"), text("status"))
    });
    shown.collect::<Vec<String>>().join(" ")
}

/// Waits until a route says this of its first parent of ours.
async fn until_route(store: &Store, name: &str, says: &str) -> Arc<Value> {
    wait_for(&format!("{name} to say {says}"), || {
        let route = of_shop(store, ROUTE, name)?;
        let parents = route["status"]["parents"].as_array()?.iter();
        let mut ours = parents.filter(|it| it["controllerName"] == "weft.dev/controller");
        (conditions(&ours.next()?["conditions"]) == says).then(|| route.clone())
    })
    .await
}

async fn until_server(store: &Store, says: &str) -> Arc<Value> {
    until_policy(store, SERVER, "web", says).await
}

async fn until_policy(store: &Store, kind: &str, name: &str, says: &str) -> Arc<Value> {
    wait_for(&format!("the {kind} {name} to say {says}"), || {
        let policy = of_shop(store, kind, name)?;
        (conditions(&policy["status"]["conditions"]) == says).then(|| policy.clone())
    })
    .await
}

/// Waits until a page does not say this any more.
async fn until_without(controller: &Running, path: &str, says: &str) {
    let deadline = Instant::now() + DEADLINE;
    while controller.get(path).await.contains(says) {
        assert!(Instant::now() < deadline, "{path} still says {says}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn holder(store: &Store) -> Option<String> {
    let lease = object(store, "Lease", "weft-controller")?;
    let holder = lease["spec"]["holderIdentity"].as_str()?;
    (!holder.is_empty()).then(|| holder.to_owned())
}

/// How many requests there were that changed a status.
fn patches(stage: &Stage) -> usize {
    let requests = stage.server().requests().into_iter();
    requests.filter(|it| it.starts_with("PATCH")).count()
}

async fn leads(controller: &Running) -> bool {
    controller.get("/metrics").await.contains(LEADS)
}

/// Replaces the status of a route, as anybody may.
async fn say(stage: &Stage, name: &str, status: &Value) {
    let connection = Connection {
        kubeconfig: Some(stage.folder.path().join("kubeconfig")),
        context: None,
    };
    let client = connection.client().await.expect("a client");
    let kind = GroupVersionKind::gvk("gateway.networking.k8s.io", "v1", ROUTE);
    let kind = ApiResource::from_gvk(&kind);
    let routes: Api<DynamicObject> = Api::namespaced_with(client, "shop", &kind);
    let patch = Patch::Merge(json!({ "status": status }));
    let parameters = PatchParams::default();
    let patched = routes.patch_status(name, &parameters, &patch).await;
    patched.expect("written");
}

const LEADS: &str = "weft_controller_leader 1";

const GOOD: &str = "Accepted=True/1 ResolvedRefs=True/1 Programmed=True/1";
const LATER: &str = "Accepted=True/2 ResolvedRefs=False/2 Programmed=True/2";

#[tokio::test]
async fn what_is_to_be_said_is_said_once_and_beside_what_others_say() {
    let store = Store::of_mesh();
    apply(&store, &service());
    apply(&store, &route("web", "web"));
    let stage = Stage::with(store, &[]).await;
    let first = until_route(&stage.store, "web", GOOD).await;
    // Another controller says something about the same route.
    let mut other = first["status"]["parents"][0].clone();
    other["controllerName"] = json!("example.com/other");
    let foreign = json!({"parents": [other, first["status"]["parents"][0]]});
    say(&stage, "web", &foreign).await;
    // Somebody writes at the same moment, and the server has a bad moment.
    stage.server().behave(|it| {
        it.failed_writes
            .insert("httproutes".to_owned(), vec![500, 409]);
    });
    apply(&stage.store, &route("web", "nobody"));
    let second = until_route(&stage.store, "web", LATER).await;
    let parents = second["status"]["parents"].as_array().expect("a list");
    assert_eq!(parents.len(), 2);
    assert_eq!(parents[0], other, "what another says is left alone");
    let since = |route: &Value, parent: usize| {
        let conditions = &route["status"]["parents"][parent]["conditions"];
        conditions[0]["lastTransitionTime"].clone()
    };
    assert_eq!(
        since(&first, 0),
        since(&second, 1),
        "it was accepted before"
    );
    stage
        .until(
            "/metrics",
            "weft_controller_statuses_total{result=\"conflict\"} 1",
        )
        .await;
    // A route that is none of ours any more.
    let mut gone = route("web", "web");
    gone["spec"]["parentRefs"] = json!([{"name": "a-gateway"}]);
    apply(&stage.store, &gone);
    wait_for("the own entry to go", || {
        let route = of_shop(&stage.store, ROUTE, "web")?;
        (route["status"]["parents"] == json!([other])).then_some(())
    })
    .await;
}

/// Others write at the same moment, on several objects: each is read again, and none waits for another.
#[tokio::test]
async fn writes_of_others_delay_only_what_they_are_about() {
    let stage = Stage::start().await;
    apply(&stage.store, &service());
    let conflicts = vec![409; 6];
    stage.server().behave(|it| {
        it.failed_writes.insert("httproutes".to_owned(), conflicts);
    });
    let names = ["a", "b", "c", "d", "e"];
    for name in names {
        apply(&stage.store, &route(name, "web"));
    }
    for name in names {
        until_route(&stage.store, name, GOOD).await;
    }
    let counted = "weft_controller_statuses_total{result=\"conflict\"} 6";
    stage.until("/metrics", counted).await;
    // What could not be written is said of each object, and not any more when it is written.
    until_without(&stage, "/problems", "its status cannot be written").await;
}

/// A definition without the status subresource answers as if the object were gone.
#[tokio::test]
async fn an_object_whose_status_is_not_served_is_a_problem_of_its_own() {
    let stage = Stage::start().await;
    stage.server().behave(|it| {
        it.failed_writes.insert("servers".to_owned(), vec![404]);
    });
    apply(&stage.store, &server(&json!(80)));
    stage.until("/problems", "subresources.status").await;
    // The problem stays while others are written.
    apply(&stage.store, &service());
    apply(&stage.store, &route("web", "web"));
    until_route(&stage.store, "web", GOOD).await;
    stage.until("/problems", "daemonset/crds").await;
    apply(&stage.store, &server(&json!(81)));
    until_server(&stage.store, "Accepted=True/2 Programmed=True/2").await;
    until_without(&stage, "/problems", "subresources.status").await;
}

#[tokio::test]
async fn what_cannot_be_used_is_told_on_it_and_stops_nothing() {
    let stage = Stage::start().await;
    apply(&stage.store, &server(&json!(80)));
    until_server(&stage.store, "Accepted=True/1 Programmed=True/1").await;
    apply(&stage.store, &server(&json!("Not A Port")));
    let told = until_server(&stage.store, "Accepted=False/2 Programmed=False/2").await;
    let message = told["status"]["conditions"][0]["message"].as_str();
    let message = message.expect("a text");
    assert!(
        message.contains("spec.port") && message.contains("stays"),
        "{message}"
    );
    let event = wait_for("an Event", || {
        let objects = stage.store.objects();
        let mut objects = objects.into_iter();
        objects.find(|it| it["kind"] == "Event" && it["regarding"]["name"] == "web")
    })
    .await;
    assert_eq!(event["note"], message);
    assert_eq!(event["regarding"]["uid"], told["metadata"]["uid"]);
    // All others are heard as before.
    apply(&stage.store, &service());
    apply(&stage.store, &route("web", "web"));
    until_route(&stage.store, "web", GOOD).await;
    apply(&stage.store, &server(&json!(80)));
    until_server(&stage.store, "Accepted=True/3 Programmed=True/3").await;
}

#[tokio::test]
async fn another_controller_leads_when_the_first_is_gone() {
    let store = Store::of_mesh();
    apply(&store, &service());
    apply(&store, &route("web", "web"));
    let stage = Stage::with(store, &[]).await;
    until_route(&stage.store, "web", GOOD).await;
    let first = holder(&stage.store).expect("one leads");
    assert!(leads(&stage).await);
    let other = stage.another(&[]).await;
    other.until("/ready", "ready\n").await;
    // It agrees with what it sees, and never writes.
    assert!(!leads(&other).await);
    let before = patches(&stage);
    apply(&stage.store, &route("more", "web"));
    until_route(&stage.store, "more", GOOD).await;
    assert_eq!(patches(&stage), before + 1);
    // The first ends in order: nobody has to wait for the Lease's time.
    stage.stop.cancel();
    other.until("/metrics", LEADS).await;
    assert_ne!(holder(&stage.store), Some(first));
    apply(&stage.store, &route("web", "nobody"));
    until_route(&stage.store, "web", LATER).await;
    assert_eq!(
        patches(&stage),
        before + 2,
        "what is said already is not written"
    );
}

/// What an agent does not take is not in force there, whatever it was told.
#[tokio::test]
async fn what_agents_reject_is_told_on_it() {
    const NAME: &str = "policy.weft.dev/shop/web";
    let stage = Stage::start().await;
    apply(&stage.store, &server(&json!(80)));
    until_server(&stage.store, "Accepted=True/1 Programmed=True/1").await;
    let token = token_of("agent-1", "one").signed();
    let mut agent = stage.subscribe(&token, "one").await.expect("served");
    // One of an earlier version is none of this one.
    agent.rejects(Kind::Server, NAME, true, "it was odd").await;
    agent.rejects(Kind::Server, NAME, false, "it is odd").await;
    let told = until_server(&stage.store, "Accepted=True/1 Programmed=False/1").await;
    let condition = &told["status"]["conditions"][1];
    assert_eq!(condition["reason"], "Rejected");
    let message = condition["message"].as_str().expect("a text");
    assert!(
        message.contains("by the agents of one: it is odd"),
        "{message}"
    );
    // What follows it is taken.
    let mut other = server(&json!(80));
    other["spec"]["proxyProtocol"] = json!("HTTP/1");
    apply(&stage.store, &other);
    agent.told_of(Kind::Server, NAME).await;
    until_server(&stage.store, "Accepted=True/2 Programmed=True/2").await;
    agent
        .rejects(Kind::Server, NAME, false, "it is odder")
        .await;
    until_server(&stage.store, "Accepted=True/2 Programmed=False/2").await;
    drop(agent);
    until_server(&stage.store, "Accepted=True/2 Programmed=True/2").await;
}

/// Whatever is part of what agents are told of a Server says whether they are told of it, and follows what agents say.
#[tokio::test]
async fn what_a_server_is_made_of_is_programmed_with_it() {
    const PARTS: [(&str, &str); 3] = [
        (LIMIT, "Accepted=True/1 Programmed=P/1 ResolvedRefs=True/1"),
        (MESH_TLS, "Accepted=True/1 Programmed=P/1"),
        (NETWORK, "Accepted=True/1 Programmed=P/1"),
    ];
    let stage = Stage::start().await;
    let part = |kind: &str, spec: Value| {
        json!({"apiVersion": "policy.weft.dev/v1alpha1", "kind": kind,
            "metadata": {"name": "part", "namespace": "shop"}, "spec": spec})
    };
    let named = |kind: &str| json!({"kind": kind, "name": "part"});
    let target = json!({"kind": SERVER, "name": "web"});
    apply(&stage.store, &part(MESH_TLS, json!({"identities": ["*"]})));
    let networks = json!({"networks": [{"cidr": "10.0.0.0/8"}]});
    apply(&stage.store, &part(NETWORK, networks));
    for kind in [MESH_TLS, NETWORK] {
        let says = "Accepted=True/1 Programmed=False/1";
        let told = until_policy(&stage.store, kind, "part", says).await;
        assert_eq!(told["status"]["conditions"][1]["reason"], "Unused");
    }
    let limit = json!({"targetRef": target, "total": {"requestsPerSecond": 5}});
    apply(&stage.store, &part(LIMIT, limit));
    let missing = "Accepted=False/1 Programmed=False/1 ResolvedRefs=False/1";
    until_policy(&stage.store, LIMIT, "part", missing).await;
    apply(&stage.store, &server(&json!(80)));
    let required = [named(MESH_TLS), named(NETWORK)];
    let opens = json!({"targetRef": target, "requiredAuthenticationRefs": required});
    apply(&stage.store, &part("AuthorizationPolicy", opens));
    let all_say = async |programmed: &str| {
        let mut said = vec![];
        for (kind, says) in PARTS {
            let says = says.replace("=P/", &format!("={programmed}/"));
            said.push(until_policy(&stage.store, kind, "part", &says).await);
        }
        said
    };
    all_say("True").await;
    let token = token_of("agent-1", "one").signed();
    let agent = stage.subscribe(&token, "one").await.expect("served");
    let name = "policy.weft.dev/shop/web";
    agent.rejects(Kind::Server, name, false, "it is odd").await;
    for it in all_say("False").await {
        assert_eq!(it["status"]["conditions"][1]["reason"], "Rejected", "{it}");
    }
    drop(agent);
    all_say("True").await;
}

/// The source of one that may not read pods is never whole: it could say nothing on anything.
#[tokio::test]
async fn who_does_not_know_everything_does_not_lead() {
    let stage = Stage::start().await;
    stage.until("/metrics", LEADS).await;
    stage.stop.cancel();
    wait_for("the Lease to be let go", || {
        holder(&stage.store).is_none().then_some(())
    })
    .await;
    stage.server().behave(|it| {
        it.refused.insert("pods".to_owned(), 403);
    });
    let asked = || {
        let requests = stage.server().requests().into_iter();
        requests.filter(|it| it.contains("/leases")).count()
    };
    let before = asked();
    let other = stage.another(&[]).await;
    other.until("/problems", "pods").await;
    assert_eq!(asked(), before);
    stage.server().behave(|it| it.refused.clear());
    other.until("/metrics", LEADS).await;
}

/// Whoever is gone without a word is waited for, for as long as the Lease says.
#[tokio::test]
async fn a_lease_of_one_who_is_gone_is_taken() {
    let store = Store::of_mesh();
    apply(
        &store,
        &json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
            "metadata": {"name": "weft-controller", "namespace": "weft-system"},
            "spec": {"holderIdentity": "gone", "leaseDurationSeconds": 4, "leaseTransitions": 7}}),
    );
    let began = Instant::now();
    let stage = Stage::with(store, &[]).await;
    stage.until("/metrics", LEADS).await;
    assert!(began.elapsed() >= Duration::from_secs(4));
    let lease = object(&stage.store, "Lease", "weft-controller").expect("there");
    assert_eq!(lease["spec"]["leaseTransitions"], 8);
    assert_eq!(lease["spec"]["leaseDurationSeconds"], 15);
}

#[tokio::test]
async fn a_controller_without_the_right_to_lead_serves_all_the_same() {
    let stage = Stage::with(Store::of_mesh(), &[]).await;
    stage.until("/metrics", LEADS).await;
    stage.server().behave(|it| {
        it.refused.insert("leases".to_owned(), 403);
    });
    // It does not write any more before another could.
    stage.until("/metrics", "weft_controller_leader 0").await;
    stage
        .until("/problems", "Lease weft-system/weft-controller")
        .await;
    stage.until("/ready", "ready\n").await;
    stage.server().behave(|it| it.refused.clear());
    stage.until("/metrics", LEADS).await;
}
