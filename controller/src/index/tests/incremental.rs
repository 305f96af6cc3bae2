//! Whatever the order of changes: what agents are told is what a new index would tell them.

use proptest::prelude::*;
use serde_json::json;

use super::*;

/// A change of one of few objects, so that they meet often.
#[derive(Clone, Debug)]
enum Step {
    Put(Value),
    Delete(Value),
}

fn names() -> impl Strategy<Value = &'static str> {
    prop::sample::select(vec!["a", "b"])
}

fn groups() -> impl Strategy<Value = &'static str> {
    prop::sample::select(vec!["policy.weft.dev", "policy.linkerd.io"])
}

fn pods() -> impl Strategy<Value = Value> {
    let shape = (
        names(),
        1..4u8,
        0..3u8,
        names(),
        prop::bool::ANY,
        prop::bool::ANY,
        0..6u8,
    );
    shape.prop_map(|(name, address, node, app, meshed, ready, odd)| {
        let mut labels = json!({"app": app});
        if meshed {
            labels["weft.dev/mesh"] = "enabled".into();
        }
        json!({"apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "namespace": "shop", "labels": labels},
            "spec": {"nodeName": format!("node-{node}"), "serviceAccountName": app,
                     "hostNetwork": odd == 1,
                     "containers": [{"name": "c", "ports": [{"name": "http", "containerPort": 8080}]}]},
            "status": {"podIPs": [{"ip": format!("10.1.0.{address}")}],
                       "phase": if odd == 2 { "Succeeded" } else { "Running" },
                       "conditions": [{"type": "Ready", "status": if ready { "True" } else { "False" }}]}})
    })
}

fn services() -> impl Strategy<Value = Value> {
    (names(), 1..3u8, names(), 80..82u16).prop_map(|(name, address, app, port)| {
        json!({"apiVersion": "v1", "kind": "Service",
            "metadata": {"name": name, "namespace": "shop"},
            "spec": {"clusterIP": format!("10.2.0.{address}"), "selector": {"app": app},
                     "ports": [{"name": "http", "port": port, "targetPort": "http"}]}})
    })
}

fn routes() -> impl Strategy<Value = Value> {
    let kinds = prop::sample::select(vec!["HTTPRoute", "GRPCRoute", "TCPRoute"]);
    let namespaces = || prop::sample::select(vec!["shop", "other"]);
    (names(), kinds, namespaces(), names(), names(), namespaces()).prop_map(
        |(name, kind, namespace, parent, backend, of_backend)| {
            let version = if kind == "TCPRoute" { "v1alpha2" } else { "v1" };
            let mut parents = vec![json!({"kind": "Service", "name": parent, "namespace": "shop"})];
            if kind != "TCPRoute" && namespace == "shop" && backend != parent {
                parents.push(json!({"kind": "Server", "name": backend}));
            }
            json!({"apiVersion": format!("gateway.networking.k8s.io/{version}"), "kind": kind,
            "metadata": {"name": name, "namespace": namespace},
            "spec": {"parentRefs": parents,
                "rules": [{"backendRefs":
                    [{"name": backend, "namespace": of_backend, "port": 80}]}]}})
        },
    )
}

fn grants() -> impl Strategy<Value = Value> {
    (names(), names()).prop_map(|(name, service)| {
        json!({"apiVersion": "gateway.networking.k8s.io/v1beta1", "kind": "ReferenceGrant",
            "metadata": {"name": name, "namespace": "shop"},
            "spec": {"from": [{"group": "gateway.networking.k8s.io", "kind": "HTTPRoute",
                               "namespace": "other"}],
                     "to": [{"group": "", "kind": "Service", "name": service}]}})
    })
}

fn slices() -> impl Strategy<Value = Value> {
    (names(), names(), 1..4u8).prop_map(|(name, service, address)| {
        json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": name, "namespace": "shop",
                         "labels": {"kubernetes.io/service-name": service}},
            "endpoints": [{"addresses": [format!("10.1.0.{address}")]}],
            "ports": [{"name": "http", "port": 9090}]})
    })
}

fn servers() -> impl Strategy<Value = Value> {
    (names(), groups(), names(), prop::bool::ANY).prop_map(|(name, group, app, named)| {
        let version = if group == "policy.weft.dev" {
            "v1alpha1"
        } else {
            "v1beta3"
        };
        let port = if named { json!("http") } else { json!(8080) };
        json!({"apiVersion": format!("{group}/{version}"), "kind": "Server",
            "metadata": {"name": name, "namespace": "shop"},
            "spec": {"podSelector": {"matchLabels": {"app": app}}, "port": port}})
    })
}

fn authorizations() -> impl Strategy<Value = Value> {
    (names(), groups(), names(), names(), 0..6u8).prop_map(
        |(name, group, target, required, kind)| {
            let target = match kind {
                4 => json!({"kind": "HTTPRoute", "name": target}),
                5 => json!({"kind": "GRPCRoute", "name": target}),
                0 => json!({"kind": "Namespace", "name": "shop"}),
                1 => json!({"kind": "Server", "name": target, "group": "policy.linkerd.io"}),
                _ => json!({"kind": "Server", "name": target}),
            };
            json!({"apiVersion": format!("{group}/v1alpha1"), "kind": "AuthorizationPolicy",
            "metadata": {"name": name, "namespace": "shop"},
            "spec": {"targetRef": target, "requiredAuthenticationRefs":
                [{"kind": "MeshTLSAuthentication", "name": required}]}})
        },
    )
}

fn authentications() -> impl Strategy<Value = Value> {
    (names(), groups(), names()).prop_map(|(name, group, account)| {
        json!({"apiVersion": format!("{group}/v1alpha1"), "kind": "MeshTLSAuthentication",
            "metadata": {"name": name, "namespace": "shop"},
            "spec": {"identityRefs": [{"kind": "ServiceAccount", "name": account}]}})
    })
}

fn namespaces() -> impl Strategy<Value = Value> {
    (prop::bool::ANY, prop::bool::ANY).prop_map(|(meshed, denies)| {
        json!({"apiVersion": "v1", "kind": "Namespace",
            "metadata": {"name": "shop",
                "labels": {"weft.dev/mesh": if meshed { "enabled" } else { "disabled" }},
                "annotations": {"weft.dev/default-inbound-policy": if denies { "deny" } else { "audit" }}}})
    })
}

fn steps() -> impl Strategy<Value = Vec<Vec<Step>>> {
    let object = prop_oneof![
        4 => pods(),
        2 => services(),
        2 => slices(),
        3 => servers(),
        3 => authorizations(),
        2 => authentications(),
        1 => namespaces(),
        3 => routes(),
        1 => grants(),
    ];
    let step = (object, 0..3u8).prop_map(|(object, kind)| match kind {
        0 => Step::Delete(object),
        _ => Step::Put(object),
    });
    prop::collection::vec(prop::collection::vec(step, 1..5), 1..40)
}

fn key(object: &Value) -> ObjectKey {
    decode::identify(object).expect("valid").expect("ours")
}

const NODES: [&str; 3] = ["node-0", "node-1", "node-2"];

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

    #[test]
    fn changes_lead_where_a_new_index_starts(batches in steps()) {
        let mut cluster = Cluster::new();
        let mut present: BTreeMap<ObjectKey, Value> = BTreeMap::new();
        // An agent that follows by differences only.
        let mut followed: BTreeMap<Key, u64> = BTreeMap::new();
        let node: Name = "node-1".parse().expect("valid");
        let mut moment = 0;
        for batch in batches {
            let mut events = BTreeMap::new();
            for step in batch {
                match step {
                    Step::Put(object) => {
                        present.insert(key(&object), object.clone());
                        events.insert(key(&object), event(object));
                    }
                    Step::Delete(object) => {
                        let key = key(&object);
                        present.remove(&key);
                        events.insert(key.clone(), Event::Delete { key });
                    }
                }
            }
            cluster.index.apply(events.into_values().collect::<Vec<_>>().into());
            let difference = cluster.views.since(&node, moment).expect("remembered");
            moment = difference.upto;
            for resource in &difference.changed {
                followed.insert(resource.key.clone(), resource.version);
            }
            for key in &difference.removed {
                followed.remove(key);
            }
            let mut fresh = Cluster::new();
            let events: Vec<_> = present.values().cloned().map(event).collect();
            fresh.index.apply(events.into());
            for node in NODES {
                prop_assert_eq!(cluster.told(node), fresh.told(node));
                let node = node.parse().expect("valid");
                for account in ["a", "b"] {
                    let account = ObjectName::parse("shop", account).expect("valid");
                    prop_assert_eq!(
                        cluster.views.runs(&node, &account), fresh.views.runs(&node, &account)
                    );
                }
            }
            prop_assert_eq!(cluster.problems(), fresh.problems());
            let statuses = |it: &Cluster| it.index.statuses().list();
            prop_assert_eq!(statuses(&cluster), statuses(&fresh));
            let beyond = fresh.views.beyond(&node, HashMap::new());
            let expected: BTreeMap<Key, u64> =
                beyond.changed.iter().map(|it| (it.key.clone(), it.version)).collect();
            prop_assert_eq!(&followed, &expected);
        }
    }
}

/// One changed pod is one small difference, however many there are.
#[test]
fn one_changed_pod_is_a_small_difference() {
    let mut cluster = Cluster::new();
    let pod = |index: usize, app: &str| {
        json!({"apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": format!("pod-{index}"), "namespace": "shop",
                         "labels": {"app": app, "weft.dev/mesh": "enabled"}},
            "spec": {"nodeName": "node-1", "containers": [{"name": "c"}]},
            "status": {"podIPs": [{"ip": format!("10.1.{}.{}", index / 250, index % 250 + 1)}]}})
    };
    let service = json!({"apiVersion": "v1", "kind": "Service",
        "metadata": {"name": "web", "namespace": "shop"},
        "spec": {"clusterIP": "10.2.0.1", "selector": {"app": "web"}, "ports": [{"port": 80}]}});
    let mut events: Vec<Event> = (0..1000).map(|index| event(pod(index, "web"))).collect();
    events.push(event(service));
    cluster.index.apply(events.into());
    let node = "node-1".parse().expect("valid");
    let moment = cluster.views.since(&node, 0).expect("remembered").upto;

    // The same again is nothing at all.
    let events = vec![event(pod(7, "web"))];
    cluster.index.apply(events.into());
    assert_eq!(
        cluster.views.since(&node, moment).expect("remembered").upto,
        moment
    );

    let events = vec![event(pod(7, "api"))];
    cluster.index.apply(events.into());
    let difference = cluster.views.since(&node, moment).expect("remembered");
    assert_eq!((difference.changed.len(), difference.removed.len()), (0, 1));
}

/// Not a test of what, but of how fast: `cargo test --release -- --ignored many_pods --nocapture`.
#[test]
#[ignore = "a measurement"]
fn many_pods() {
    let mut cluster = Cluster::new();
    let pod = |index: usize, ready: bool| {
        let app = format!("app-{}", index % 200);
        json!({"apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": format!("pod-{index}"), "namespace": "shop",
                         "labels": {"app": app, "weft.dev/mesh": "enabled"}},
            "spec": {"nodeName": format!("node-{}", index % 100), "containers": [{"name": "c"}]},
            "status": {"podIPs": [{"ip": format!("10.1.{}.{}", index / 250, index % 250 + 1)}],
                       "conditions": [{"type": "Ready", "status": if ready { "True" } else { "False" }}]}})
    };
    let mut events: Vec<Event> = (0..20_000).map(|index| event(pod(index, true))).collect();
    for app in 0..200 {
        events.push(event(json!({"apiVersion": "v1", "kind": "Service",
            "metadata": {"name": format!("app-{app}"), "namespace": "shop"},
            "spec": {"clusterIP": format!("10.2.0.{}", app + 1),
                     "selector": {"app": format!("app-{app}")}, "ports": [{"port": 80}]}})));
        events.push(event(
            json!({"apiVersion": "policy.weft.dev/v1alpha1", "kind": "Server",
            "metadata": {"name": format!("app-{app}"), "namespace": "shop"},
            "spec": {"podSelector": {"matchLabels": {"app": format!("app-{app}")}}, "port": 80}}),
        ));
    }
    let started = std::time::Instant::now();
    cluster.index.apply(events.into());
    println!(
        "20,000 pods, 200 services and servers: {:?}",
        started.elapsed()
    );
    let changes: Vec<_> = (0..1000)
        .map(|index| event(pod(index * 7, false)))
        .collect();
    let started = std::time::Instant::now();
    for change in changes {
        cluster.index.apply(vec![change].into());
    }
    println!("a changed pod: {:?}", started.elapsed() / 1000);
}

/// A policy that changes costs what it opens, not all of its namespace.
#[test]
fn a_changed_policy_is_cheap_among_many() {
    const COUNT: usize = 300;
    let policy = |number: usize, account: &str| {
        format!(
            "---\n{{apiVersion: policy.weft.dev/v1alpha1, kind: AuthorizationPolicy,
               metadata: {{name: p{number}, namespace: a}},
               spec: {{targetRef: {{kind: Server, name: s{number}}},
                 requiredAuthenticationRefs: [{{kind: ServiceAccount, name: {account}}}]}}}}\n"
        )
    };
    let mut text = String::from(
        "{apiVersion: v1, kind: Pod, metadata: {name: p, namespace: a,
          labels: {weft.dev/mesh: enabled}}, spec: {nodeName: one},
          status: {podIPs: [{ip: 10.1.0.1}]}}\n",
    );
    for number in 1..=COUNT {
        text += &format!(
            "---\n{{apiVersion: policy.weft.dev/v1alpha1, kind: Server,
               metadata: {{name: s{number}, namespace: a}},
               spec: {{podSelector: {{}}, port: {number}}}}}\n"
        );
        text += &policy(number, "one");
    }
    let mut cluster = Cluster::of(&text);
    cluster.index.dirty.servers.clear();
    let documents = decode::documents(&policy(7, "two")).expect("YAML");
    for document in documents {
        cluster.index.take(event(document));
    }
    assert_eq!(
        cluster.index.dirty.servers.len(),
        2,
        "its name in both groups"
    );
    cluster.index.publish();
    let server = cluster.server("policy.weft.dev/a/s7").expect("there");
    assert!(format!("{server:?}").contains("two"));
}
