//! What is served, when it is, and what follows for agents while it is not.

use std::time::Duration;

use weft_apiserver::{Kind, Store};
use weft_controller::objects::{ObjectKind, decode};

use crate::stage::{PACE, SHOP, Stage, World, apply, has, stored, wait_for};

const SERVER_IS_TOLD: &str = "Server";

fn server_is_told(world: &World) -> bool {
    let servers = world.values();
    servers
        .filter(|it| matches!(it, weft_proto::Resource::Server(_)))
        .count()
        > 0
}

/// Agents would open what a policy closes that could not be read.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_told_before_everything_was_listed() {
    for (plural, code, problem) in [
        (
            "servers",
            403,
            "Server.policy.weft.dev: cannot list: servers is forbidden",
        ),
        ("pods", 403, "Pod: cannot list: pods is forbidden"),
        (
            "httproutes",
            500,
            "HTTPRoute.gateway.networking.k8s.io: cannot list: ",
        ),
    ] {
        let stage = Stage::with(stored(SHOP), |it| {
            it.refused.insert(plural.to_owned(), code);
        })
        .await;
        stage.controller.wait_problem(problem).await;
        assert!(!stage.controller.is_complete());
        stage.server().behave(|it| it.refused.clear());
        stage.controller.wait_complete().await;
        stage.wait_same(plural).await;
        stage.controller.wait_reached().await;
    }
}

/// A server that starts does not yet serve what definitions add.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_starts_is_waited_for() {
    let stage = Stage::with(stored(SHOP), |it| it.ready = false).await;
    let problem = "the API server cannot be asked what it serves: ";
    stage.controller.wait_problem(problem).await;
    assert!(!stage.controller.is_complete());
    let group = "policy.weft.dev".to_owned();
    stage.server().behave(|it| {
        it.undiscoverable.push(group);
        it.ready = true;
    });
    let asked = stage.server().requests().len();
    let more = || match stage.server().requests().len() > asked + 20 {
        true => Ok(()),
        false => Err("not asked again".to_owned()),
    };
    wait_for("further requests", more).await;
    assert!(!stage.controller.is_complete());
    stage.server().behave(|it| it.undiscoverable.clear());
    stage.controller.wait_complete().await;
    stage.wait_same("a ready server").await;
    stage.controller.wait_reached().await;
}

/// Where the server names what it does not know yet, a controller that took that for nothing would have nothing to close
/// ports by.
#[tokio::test(flavor = "multi_thread")]
async fn a_version_that_is_named_and_not_known_is_waited_for() {
    let group = || "policy.weft.dev".to_owned();
    let stage = Stage::with(stored(SHOP), |it| {
        it.named_only.insert(group());
    })
    .await;
    let problem =
        "there is a version of group policy.weft.dev in which Server.policy.weft.dev may be";
    stage.controller.wait_problem(problem).await;
    wait_looks(&stage).await;
    assert!(!stage.controller.is_complete());
    stage.server().behave(|it| it.named_only.clear());
    stage.controller.wait_complete().await;
    assert!(server_is_told(&stage.controller.world()));
    // Nor does it take anything away later.
    stage.server().behave(|it| {
        it.named_only.insert(group());
    });
    stage.controller.wait_problem(problem).await;
    wait_looks(&stage).await;
    assert!(server_is_told(&stage.controller.world()));
    stage.server().behave(|it| it.named_only.clear());
    stage.controller.wait_reached().await;
}

/// One that is not as fresh as others says nothing of a kind, whose objects are there.
#[tokio::test(flavor = "multi_thread")]
async fn a_kind_whose_objects_are_served_is_not_gone() {
    let stage = Stage::of(SHOP).await;
    stage.controller.wait_complete().await;
    let group = "policy.weft.dev".to_owned();
    stage.server().behave(|it| {
        it.hidden.insert(group);
    });
    wait_looks(&stage).await;
    assert!(server_is_told(&stage.controller.world()));
    stage.delete("{apiVersion: policy.weft.dev/v1alpha1, kind: Server, metadata: {name: web, namespace: shop}}");
    stage.wait_same("its objects are followed").await;
    stage.controller.wait_reached().await;
}

/// Waits until it was looked what is served more often than takes a kind away.
async fn wait_looks(stage: &Stage) {
    let since = tokio::time::Instant::now();
    let looks = || {
        let requests = stage.server().requests().into_iter();
        requests.filter(|it| it == "/apis?").count()
    };
    let before = looks();
    wait_for("looks", || {
        let enough = looks() > before + 20 && since.elapsed() > 3 * PACE.removed;
        enough.then_some(()).ok_or_else(|| looks().to_string())
    })
    .await;
}

/// An operator knows by it what to give, and to whom.
#[tokio::test(flavor = "multi_thread")]
async fn a_missing_right_is_named_once() {
    let stage = Stage::of(SHOP).await;
    stage.controller.wait_complete().await;
    let told = stage.controller.world();
    stage.server().behave(|it| {
        it.refused.insert("servers".to_owned(), 403);
    });
    stage.server().disconnect();
    for group in ["policy.weft.dev", "policy.linkerd.io"] {
        let right = format!(
            "the right to watch the resource servers of API group {group:?} in all namespaces"
        );
        stage.controller.wait_problem(&right).await;
        let problems = stage.controller.problems().into_iter();
        let about: Vec<_> = problems.filter(|it| it.contains(&right)).collect();
        assert_eq!(about.len(), 1, "{about:?}");
        assert!(
            about[0].contains("ClusterRole weft-controller"),
            "{about:?}"
        );
    }
    assert_eq!(stage.controller.world(), told);
    stage.server().behave(|it| it.refused.clear());
    stage.controller.wait_reached().await;
}

/// What is read is what may be read.
#[test]
fn the_role_has_a_rule_for_every_kind() {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../daemonset/base/rbac.yaml");
    let text = std::fs::read_to_string(file).expect("there");
    let documents = decode::documents(&text).expect("YAML");
    let roles = documents.iter();
    let mut roles = roles.filter(|it| it["kind"] == "ClusterRole");
    let role = roles.next().expect("a ClusterRole");
    let has = |list: &serde_json::Value, item: &str| {
        let mut items = list.as_array().into_iter().flatten();
        items.any(|it| it == item)
    };
    let kinds = Kind::all_built_in()
        .into_iter()
        .chain(Kind::all_of_meshes())
        .chain(Kind::all_of_cnis());
    let mut checked = 0;
    for kind in kinds.filter(|it| it.kind != "ServiceAccount") {
        if ObjectKind::find(&kind.group, &kind.kind).is_none() {
            continue;
        }
        checked += 1;
        let mut rules = role["rules"].as_array().into_iter().flatten();
        let may = rules.any(|rule| {
            has(&rule["apiGroups"], &kind.group)
                && has(&rule["resources"], &kind.plural)
                && ["list", "watch"].iter().all(|it| has(&rule["verbs"], it))
        });
        assert!(may, "{kind:?}");
    }
    assert!(checked > 26, "{checked}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_too_old_is_told_so() {
    let mut kinds = Kind::all_built_in();
    kinds.retain(|it| it.kind != "EndpointSlice");
    let stage = Stage::with(Store::new(kinds), |_| {}).await;
    let problem = "EndpointSlice.discovery.k8s.io is not served in version v1: Weft needs \
        Kubernetes 1.21 or later";
    stage.controller.wait_problem(problem).await;
    assert!(!stage.controller.is_complete());
    stage.store.install(Kind::built_in(
        "discovery.k8s.io",
        "v1",
        "EndpointSlice",
        true,
    ));
    stage.controller.wait_complete().await;
    stage.controller.wait_reached().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn kinds_come_and_go() {
    let store = Store::new(Kind::all_built_in());
    let objects = SHOP
        .split("---")
        .filter(|it| !it.contains("policy.weft.dev"));
    apply(&store, &objects.collect::<Vec<_>>().join("---"));
    let stage = Stage::with(store, |_| {}).await;
    stage.controller.wait_complete().await;
    assert!(has(&stage.controller.world(), "shop/web"));
    let server = Kind::custom("policy.weft.dev", &["v1alpha1"], "Server");
    stage.store.install(server.clone());
    stage.apply(SHOP);
    let told = server_is_told;
    stage.controller.wait_told(SERVER_IS_TOLD, told).await;
    // Not served for a moment, as by an API server that starts: a policy that did not hold then would be open.
    stage.store.uninstall("policy.weft.dev", "Server");
    stage.server().disconnect();
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(server_is_told(&stage.controller.world()));
    stage.store.install(server.clone());
    stage.wait_same("served again").await;
    // Removed for good; its objects are seen no more.
    stage.store.uninstall("policy.weft.dev", "Server");
    let gone = |world: &World| !server_is_told(world);
    stage.controller.wait_told("no Server", gone).await;
    stage.controller.wait_reached().await;
    stage.store.install(server);
    stage.controller.wait_told(SERVER_IS_TOLD, told).await;
}

/// What says how much a cluster's pods use is often somebody else's API server, and often away.
#[tokio::test(flavor = "multi_thread")]
async fn an_aggregated_api_that_is_away_holds_up_no_other() {
    const METRICS: &str = "metrics.k8s.io";
    let store = stored(SHOP);
    store.install(Kind::custom(METRICS, &["v1beta1"], "PodMetrics"));
    let stage = Stage::with(store, |it| it.undiscoverable.push(METRICS.to_owned())).await;
    stage.controller.wait_complete().await;
    stage.controller.wait_no_problem().await;
    // Nor does one of which something is read, once it was.
    const PROFILES: &str = "linkerd.io";
    stage
        .server()
        .behave(|it| it.undiscoverable.push(PROFILES.to_owned()));
    let problem =
        "there is a version of group linkerd.io in which ServiceProfile.linkerd.io may be";
    stage.controller.wait_problem(problem).await;
    let others = Kind::all_of_cnis().into_iter();
    others
        .filter(|it| it.group == KEPT)
        .for_each(|it| stage.store.install(it));
    stage.apply(&calico(KEPT, "v1"));
    stage.controller.wait_told("all by tunnels", is_held).await;
    stage.server().behave(|it| it.undiscoverable.clear());
    stage.controller.wait_reached().await;
}

fn is_held(world: &World) -> bool {
    let mut told = world.values();
    told.any(|it| matches!(it, weft_proto::Resource::NodePod(it) if it.by_tunnels_only))
}

fn is_free(world: &World) -> bool {
    !is_held(world)
}

const SHOWN: &str = "projectcalico.org";
const KEPT: &str = "crd.projectcalico.org";

/// Of Calico, as its own API server shows them, or as they are kept.
fn install_calico(store: &Store, group: &str) {
    let kinds = Kind::all_of_cnis().into_iter();
    kinds
        .filter(|it| it.group == group)
        .for_each(|it| store.install(it));
}

fn calico(group: &str, version: &str) -> String {
    format!(
        "{{apiVersion: {group}/{version}, kind: NetworkPolicy, metadata: {{name: n, namespace: shop}}, \
          spec: {{selector: all()}}}}"
    )
}

/// As they are kept, one of each kind, which select nobody.
const IDLE: &str = "
{apiVersion: crd.projectcalico.org/v1, kind: NetworkPolicy, metadata: {name: default.idle, namespace: shop},
  spec: {selector: has(nobody)}}
---
{apiVersion: crd.projectcalico.org/v1, kind: GlobalNetworkPolicy, metadata: {name: default.idle},
  spec: {selector: has(nobody)}}
";

const AWAY: &str = "there is a version of group projectcalico.org in which NetworkPolicy";

/// Which policies there are is not known then: they may select everybody. That is no reason to tell agents nothing.
#[tokio::test(flavor = "multi_thread")]
async fn an_api_server_of_calico_that_is_away_holds_up_nobody() {
    let store = stored(SHOP);
    install_calico(&store, SHOWN);
    let stage = Stage::with(store, |it| it.undiscoverable.push(SHOWN.to_owned())).await;
    stage.controller.wait_complete().await;
    stage.controller.wait_told("all by tunnels", is_held).await;
    stage.controller.wait_problem(AWAY).await;
    wait_looks(&stage).await;
    assert!(is_held(&stage.controller.world()));
    stage.server().behave(|it| it.undiscoverable.clear());
    stage.controller.wait_told("it has none", is_free).await;
    stage.controller.wait_no_problem().await;
    // What was read stays, and the rest is followed.
    let policy = calico(SHOWN, "v3");
    stage.apply(&policy);
    stage.controller.wait_told(&policy, is_held).await;
    stage
        .server()
        .behave(|it| it.undiscoverable.push(SHOWN.to_owned()));
    wait_looks(&stage).await;
    assert!(is_held(&stage.controller.world()));
    stage.delete(&policy);
    stage.controller.wait_told("it is deleted", is_free).await;
    stage.server().behave(|it| it.undiscoverable.clear());
    stage.controller.wait_reached().await;
}

/// It answers what it has, and not what is in it: as one without a right to its tiers.
#[tokio::test(flavor = "multi_thread")]
async fn an_api_server_of_calico_that_refuses_holds_up_nobody() {
    let store = stored(SHOP);
    install_calico(&store, SHOWN);
    let stage = Stage::with(store, |it| {
        it.refused.insert("globalnetworkpolicies".to_owned(), 403);
    })
    .await;
    stage.controller.wait_complete().await;
    stage.controller.wait_told("all by tunnels", is_held).await;
    let problem =
        "GlobalNetworkPolicy.projectcalico.org: cannot list: globalnetworkpolicies is forbidden";
    stage.controller.wait_problem(problem).await;
    stage.server().behave(|it| it.refused.clear());
    stage.controller.wait_told("it has none", is_free).await;
    stage.controller.wait_no_problem().await;
}

/// Who has the policies as they are kept does not need what shows them, and counts each once where both do.
#[tokio::test(flavor = "multi_thread")]
async fn what_calico_keeps_stands_for_what_it_shows() {
    let store = stored(SHOP);
    install_calico(&store, SHOWN);
    install_calico(&store, KEPT);
    apply(&store, IDLE);
    let stage = Stage::with(store, |it| it.undiscoverable.push(SHOWN.to_owned())).await;
    let told = |stage: &Stage| {
        let problems = stage.controller.problems().into_iter();
        problems.filter(|it| it.contains("15008")).count()
    };
    stage.controller.wait_complete().await;
    wait_looks(&stage).await;
    assert!(is_free(&stage.controller.world()));
    stage.controller.wait_no_problem().await;
    let kept = calico(KEPT, "v1").replace("name: n,", "name: default.n,");
    stage.apply(&kept);
    stage.controller.wait_told("kept", is_held).await;
    assert_eq!(told(&stage), 1, "{:?}", stage.controller.problems());
    // What was kept elsewhere before is not all there is.
    stage.delete(&kept);
    stage.controller.wait_told("left over", is_free).await;
    stage.apply(&calico(SHOWN, "v3"));
    stage.server().behave(|it| it.undiscoverable.clear());
    stage.controller.wait_told("shown", is_held).await;
    stage.apply(&kept);
    wait_looks(&stage).await;
    assert_eq!(told(&stage), 1, "{:?}", stage.controller.problems());
    // Without the definitions, what shows them is needed.
    stage
        .server()
        .behave(|it| it.undiscoverable.push(SHOWN.to_owned()));
    let policies = [calico(SHOWN, "v3"), kept].join("\n---\n");
    stage.delete(&policies);
    stage.controller.wait_told("deleted", is_free).await;
}

/// Definitions may be there, and policies kept elsewhere: only where there are some, they are all.
#[tokio::test(flavor = "multi_thread")]
async fn definitions_that_nobody_uses_stand_for_nothing() {
    let store = stored(SHOP);
    install_calico(&store, SHOWN);
    install_calico(&store, KEPT);
    // Its API server is there, and knows the token of nobody.
    let stage = Stage::with(store, |it| {
        it.undiscoverable.push(SHOWN.to_owned());
        it.undiscoverable_as = 401;
    })
    .await;
    stage.controller.wait_complete().await;
    stage.controller.wait_told("all by tunnels", is_held).await;
    stage.controller.wait_problem(AWAY).await;
    stage.apply(IDLE);
    stage.controller.wait_told("they are used", is_free).await;
    stage.controller.wait_no_problem().await;
    stage.delete(IDLE);
    stage.controller.wait_told("all again", is_held).await;
    stage.server().behave(|it| it.undiscoverable_as = 429);
    wait_looks(&stage).await;
    assert!(is_held(&stage.controller.world()));
    stage.server().behave(|it| it.undiscoverable.clear());
    stage.controller.wait_told("it has none", is_free).await;
}

/// Its policies may select everybody when neither can be read any more: of one that starts without.
#[tokio::test(flavor = "multi_thread")]
async fn what_calico_shows_is_needed_without_what_it_keeps() {
    let store = stored(SHOP);
    install_calico(&store, SHOWN);
    install_calico(&store, KEPT);
    apply(&store, IDLE);
    let stage = Stage::with(store, |it| it.undiscoverable.push(SHOWN.to_owned())).await;
    stage.controller.wait_complete().await;
    assert!(is_free(&stage.controller.world()));
    for kind in ["NetworkPolicy", "GlobalNetworkPolicy"] {
        stage.store.uninstall(KEPT, kind);
    }
    stage.server().disconnect();
    stage.controller.wait_told("all by tunnels", is_held).await;
    stage.controller.wait_problem(AWAY).await;
    // Its APIService is removed, too.
    for kind in ["NetworkPolicy", "GlobalNetworkPolicy"] {
        stage.store.uninstall(SHOWN, kind);
    }
    stage.controller.wait_told("no Calico", is_free).await;
    stage.controller.wait_no_problem().await;
}

/// Whom policies of CNIs select is found out wherever their definitions are.
#[tokio::test(flavor = "multi_thread")]
async fn policies_of_cnis_are_read_where_they_are_served() {
    let stage = Stage::of(SHOP).await;
    stage.controller.wait_complete().await;
    for kind in Kind::all_of_cnis() {
        let version = format!("{}/{}", kind.group, kind.versions[0]);
        let namespace = match kind.namespaced {
            true => ", namespace: shop",
            false => "",
        };
        let spec = match kind.group.as_str() {
            "cilium.io" => "specs: [{endpointSelector: {}, ingress: [{}]}]",
            _ => "spec: {selector: all(), ingress: [{action: Allow}]}",
        };
        let policy = format!(
            "{{apiVersion: {version}, kind: {}, metadata: {{name: n{namespace}}}, {spec}}}",
            kind.kind
        );
        assert!(!is_held(&stage.controller.world()), "{policy}");
        stage.store.install(kind);
        stage.apply(&policy);
        stage.controller.wait_told(&policy, is_held).await;
        stage.wait_same(&policy).await;
        stage.delete(&policy);
        stage
            .controller
            .wait_told("nobody is selected", is_free)
            .await;
    }
}

/// The newest version that can be read is read, whatever else is served.
#[tokio::test(flavor = "multi_thread")]
async fn versions_change() {
    const GATEWAY: &str = "gateway.networking.k8s.io";
    let store = stored(SHOP);
    let route = "
{apiVersion: gateway.networking.k8s.io/v1beta1, kind: HTTPRoute, metadata: {name: r, namespace: shop},
 spec: {parentRefs: [{group: '', kind: Service, name: web, port: 80}],
  rules: [{backendRefs: [{name: web, port: 80}]}]}}";
    store.install(Kind::custom(GATEWAY, &["v1beta1"], "HTTPRoute"));
    apply(&store, route);
    let stage = Stage::with(store, |_| {}).await;
    stage.controller.wait_complete().await;
    stage.wait_same("the older version").await;
    let told = stage.controller.world();
    for versions in [&["v2", "v1", "v1beta1"][..], &["v1"], &["v1beta1"]] {
        stage
            .store
            .install(Kind::custom(GATEWAY, versions, "HTTPRoute"));
        let newest = if versions.contains(&"v1") {
            "v1"
        } else {
            "v1beta1"
        };
        let path = format!("/apis/{GATEWAY}/{newest}/httproutes?");
        let before = stage.server().requests().len();
        let watched = || {
            let requests = stage.server().requests();
            let watched = requests[before..].iter().any(|it| it.starts_with(&path));
            watched.then_some(()).ok_or_else(|| format!("{requests:?}"))
        };
        wait_for(&path, watched).await;
        stage.wait_same(newest).await;
        assert_eq!(stage.controller.world(), told);
    }
    stage.controller.wait_reached().await;
}
