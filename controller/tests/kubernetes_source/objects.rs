//! Objects in, state of agents out: the same as a directory of the same objects gives.

use serde_json::json;
use weft_apiserver::{Options, Server, Tls};
use weft_controller::source::kubernetes::Connection;
use weft_proto::Resource;

use crate::stage::{Fed, SHOP, Stage, has, pod, stored};

/// What the world of a [`Stage`] is, beside [`SHOP`].
const CASES: &[(&str, &str)] = &[
    ("nothing else", ""),
    (
        "pods that are not ready, terminating, completed, of the host's network, without address or node",
        "
{apiVersion: v1, kind: Pod, metadata: {name: a, namespace: shop, labels: {app: web}},
 spec: {nodeName: one, containers: [{name: c, ports: [{name: web, containerPort: 1}]}]},
 status: {phase: Running, podIPs: [{ip: 10.1.1.20}], conditions: [{type: Ready, status: 'False'}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: b, namespace: shop, labels: {app: web},
  deletionTimestamp: '2026-01-01T00:00:00Z'},
 spec: {nodeName: one, containers: [{name: c, ports: [{name: web, containerPort: 1}]}]},
 status: {phase: Running, podIPs: [{ip: 10.1.1.21}], conditions: [{type: Ready, status: 'True'}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: c, namespace: shop, labels: {app: web}},
 spec: {nodeName: one, containers: [{name: c, ports: [{name: web, containerPort: 1}]}]},
 status: {phase: Succeeded, podIPs: [{ip: 10.1.1.22}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: d, namespace: shop, labels: {app: web}},
 spec: {nodeName: one, hostNetwork: true,
  containers: [{name: c, ports: [{name: web, containerPort: 1}]}]},
 status: {phase: Running, podIPs: [{ip: 192.0.2.1}], conditions: [{type: Ready, status: 'True'}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: e, namespace: shop, labels: {app: web}},
 spec: {nodeName: one, containers: [{name: c}]}, status: {phase: Pending}}
---
{apiVersion: v1, kind: Pod, metadata: {name: f, namespace: shop, labels: {app: web}},
 spec: {containers: [{name: c}]}, status: {phase: Pending}}",
    ),
    (
        "Services: of all pods, headless, of names, with numbers, of a zone, of names only",
        "
{apiVersion: v1, kind: Service, metadata: {name: all, namespace: shop},
 spec: {clusterIP: 10.2.0.2, publishNotReadyAddresses: true, selector: {app: web}, ports: [{port: 80, targetPort: 9}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: headless, namespace: shop},
 spec: {clusterIP: None, selector: {app: web}, ports: [{name: a, port: 80}, {name: b, port: 81, targetPort: web}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: zoned, namespace: shop},
 spec: {clusterIP: 10.2.0.3, trafficDistribution: PreferClose, internalTrafficPolicy: Local,
  selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: outside, namespace: shop},
 spec: {type: ExternalName, externalName: example.com, selector: {app: web}}}
---
{apiVersion: v1, kind: Service, metadata: {name: nobody, namespace: shop},
 spec: {clusterIP: 10.2.0.4, selector: {app: nobody}, ports: [{port: 80}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: late, namespace: shop, labels: {app: web}},
 spec: {nodeName: two, containers: [{name: c}]},
 status: {phase: Running, podIPs: [{ip: 10.1.2.20}], conditions: [{type: Ready, status: 'False'}]}}",
    ),
    (
        "policies and routes of all groups",
        "
{apiVersion: policy.weft.dev/v1alpha1, kind: AuthorizationPolicy, metadata: {name: a, namespace: shop},
 spec: {targetRef: {group: policy.weft.dev, kind: Server, name: web},
  requiredAuthenticationRefs: [{kind: ServiceAccount, name: web}, {group: policy.weft.dev, kind: MeshTLSAuthentication, name: m}]}}
---
{apiVersion: policy.weft.dev/v1alpha1, kind: MeshTLSAuthentication, metadata: {name: m, namespace: shop},
 spec: {identities: ['*']}}
---
{apiVersion: policy.linkerd.io/v1beta3, kind: Server, metadata: {name: l, namespace: shop},
 spec: {podSelector: {}, port: 9090}}
---
{apiVersion: policy.linkerd.io/v1alpha1, kind: NetworkAuthentication, metadata: {name: n, namespace: shop},
 spec: {networks: [{cidr: 10.0.0.0/8}]}}
---
{apiVersion: gateway.networking.k8s.io/v1, kind: HTTPRoute, metadata: {name: r, namespace: shop},
 spec: {parentRefs: [{group: '', kind: Service, name: web, port: 80}],
  rules: [{matches: [{path: {type: PathPrefix, value: /a}}], backendRefs: [{name: web, port: 80}]}]}}
---
{apiVersion: linkerd.io/v1alpha2, kind: ServiceProfile, metadata: {name: web.shop.svc.cluster.local, namespace: shop},
 spec: {routes: [{name: a, condition: {pathRegex: /b, method: GET}}]}}",
    ),
    (
        "NetworkPolicies, and the labels that they look at",
        "
{apiVersion: v1, kind: Namespace, metadata: {name: callers, labels: {team: callers}}}
---
{apiVersion: v1, kind: Pod, metadata: {name: caller, namespace: callers, labels: {app: caller}},
 spec: {nodeName: two, containers: [{name: c}]}, status: {phase: Running, podIPs: [{ip: 10.1.2.40}]}}
---
{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: n, namespace: shop},
 spec: {podSelector: {}, ingress: [
  {from: [{namespaceSelector: {matchLabels: {team: callers}}}], ports: [{port: web}]},
  {from: [{namespaceSelector: {}, podSelector: {matchLabels: {app: caller}}}, {ipBlock: {cidr: 10.0.0.0/8}}]}]}}",
    ),
    (
        "ranges of Services, and pods in no range",
        "
{apiVersion: networking.k8s.io/v1, kind: ServiceCIDR, metadata: {name: more}, spec: {cidrs: [10.9.0.0/24]}}
---
{apiVersion: v1, kind: Service, metadata: {name: far, namespace: shop},
 spec: {clusterIP: 10.9.0.1, selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: far, namespace: shop, labels: {app: web}},
 spec: {nodeName: two, containers: [{name: c}]}, status: {phase: Running, podIPs: [{ip: 192.168.1.1}]}}",
    ),
    (
        "objects that cannot be used",
        "
{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: typo, namespace: shop},
 spec: {podSelector: {}, ingres: []}}
---
{apiVersion: v1, kind: Pod, metadata: {name: bad, namespace: shop}, spec: {nodeName: one, containers: 7},
 status: {podIPs: [{ip: 10.1.1.30}]}}
---
{apiVersion: policy.weft.dev/v1alpha1, kind: Server, metadata: {name: typo, namespace: shop},
 spec: {podSelector: {}, prot: 80}}
---
{apiVersion: v1, kind: Namespace, metadata: {name: odd, labels: {weft.dev/mesh: perhaps}}}",
    ),
];

#[tokio::test(flavor = "multi_thread")]
async fn the_same_as_from_a_directory() {
    for (what, further) in CASES {
        let manifests = format!("{SHOP}\n---\n{further}");
        let stage = Stage::of(&manifests).await;
        stage.controller.wait_complete().await;
        stage.wait_same(what).await;
    }
}

/// Endpoints by EndpointSlices are those that a directory without them derives from pods.
#[tokio::test(flavor = "multi_thread")]
async fn slices_say_what_selectors_do() {
    for (what, further) in CASES {
        let stage = Stage::of(&format!("{SHOP}\n---\n{further}")).await;
        stage.controller.wait_complete().await;
        let folder = tempfile::tempdir().expect("made");
        let objects = stage.store.objects();
        let written = objects.iter().filter(|it| it["kind"] != "EndpointSlice");
        for (number, object) in written.enumerate() {
            let file = folder.path().join(format!("{number}.json"));
            std::fs::write(file, object.to_string()).expect("written");
        }
        let derived = Fed::by_directory(folder.path(), false);
        derived.wait_complete().await;
        let endpoints = |fed: &Fed| {
            let all = fed.world().into_values();
            let endpoints = all.filter(|it| matches!(it, Resource::Endpoint(_)));
            endpoints.collect::<Vec<_>>()
        };
        let (sliced, derived) = (endpoints(&stage.controller), endpoints(&derived));
        assert!(!sliced.is_empty());
        assert_eq!(sliced, derived, "{what}");
    }
}

/// Changes take effect, and what is not looked at is none.
#[tokio::test(flavor = "multi_thread")]
async fn changes_are_followed() {
    let stage = Stage::of(SHOP).await;
    stage.controller.wait_complete().await;
    let new = pod("new", "one", "10.1.1.50", "web");
    stage.apply(&new.to_string());
    stage.wait_same("a new pod").await;
    let mut unready = new.clone();
    unready["status"]["conditions"] = json!([{"type": "Ready", "status": "False"}]);
    stage.apply(&unready.to_string());
    stage.wait_same("a pod that is not ready").await;
    let endpoint = |world: &crate::stage::World| has(world, "shop/web 10.1.1.50");
    assert!(!endpoint(&stage.controller.world()));
    stage.delete(&new.to_string());
    stage.wait_same("a pod that is gone").await;
    // Its address, in another pod's hands.
    stage.apply(&pod("heir", "one", "10.1.1.50", "web").to_string());
    stage.wait_same("an address that is used again").await;
    assert!(stage.controller.problems().is_empty());
}

/// One object that cannot be read is reported, what it said before stays, and nothing else waits for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_bad_object_stalls_nothing() {
    let stage = Stage::of(SHOP).await;
    stage.controller.wait_complete().await;
    let before = stage.controller.world();
    stage.apply(
        "{apiVersion: policy.weft.dev/v1alpha1, kind: Server, metadata: {name: web, namespace: shop},
          spec: {podSelector: {matchLabels: {app: web}}, port: web, accesPolicy: deny}}",
    );
    let problem = "Server.policy.weft.dev shop/web spec.accesPolicy: unknown field";
    stage.controller.wait_problem(problem).await;
    assert_eq!(stage.controller.world(), before);
    stage.apply(
        "{apiVersion: policy.weft.dev/v1alpha1, kind: Server, metadata: {name: other, namespace: shop},
          spec: {podSelector: {}, port: 9000}}",
    );
    let told = |world: &crate::stage::World| {
        world
            .values()
            .any(|it| matches!(it, Resource::Server(it) if it.name.name.name.as_str() == "other"))
    };
    stage.controller.wait_told("the other Server", told).await;
    stage.apply(SHOP);
    stage.controller.wait_no_problem().await;
    stage.wait_same("all good").await;
}

/// Whoever may write a pod could have another pod's traffic by it.
#[tokio::test(flavor = "multi_thread")]
async fn a_pod_does_not_say_where_its_netns_is() {
    let any = std::net::SocketAddr::from(([127, 0, 0, 1], 0));
    let server = Server::start(stored(SHOP), any, Options::default()).await;
    let server = server.expect("started");
    let folder = tempfile::tempdir().expect("made");
    let file = folder.path().join("kubeconfig");
    std::fs::write(&file, server.kubeconfig()).expect("written");
    for believe in [false, true] {
        let fed = Fed::by_cluster(&file, believe).await;
        fed.wait_complete().await;
        let world = fed.world();
        let pods = world.values().filter_map(|it| match it {
            Resource::NodePod(pod) => Some(pod),
            _ => None,
        });
        let known: Vec<bool> = pods.map(|it| it.netns.is_some()).collect();
        assert_eq!(known.contains(&true), believe, "{known:?}");
    }
}

/// With a certificate and a token, as in a cluster; and without the right ones.
#[tokio::test(flavor = "multi_thread")]
async fn the_server_is_authenticated_and_so_are_we() {
    let options = Options {
        token: Some("the-right-one".to_owned()),
        tls: Some(Tls::new(&["127.0.0.1"]).expect("made")),
        ..Options::default()
    };
    let any = std::net::SocketAddr::from(([127, 0, 0, 1], 0));
    let server = Server::start(stored(SHOP), any, options)
        .await
        .expect("started");
    let folder = tempfile::tempdir().expect("made");
    let file = folder.path().join("kubeconfig");
    std::fs::write(&file, server.kubeconfig()).expect("written");
    let fed = Fed::by_kubeconfig(&file).await;
    fed.wait_complete().await;
    let other = Tls::new(&["127.0.0.1"]).expect("made");
    let stranger = Server::start(
        stored(""),
        any,
        Options {
            tls: Some(other),
            ..Options::default()
        },
    );
    let stranger = stranger.await.expect("started").kubeconfig();
    let of = |text: &str| serde_json::from_str::<serde_json::Value>(text).expect("JSON");
    let mut other_root = of(&server.kubeconfig());
    other_root["clusters"][0]["cluster"]["certificate-authority-data"] =
        of(&stranger)["clusters"][0]["cluster"]["certificate-authority-data"].clone();
    for (kubeconfig, problem) in [
        (
            server.kubeconfig().replace("the-right-one", "another"),
            "Unauthorized (401): is the token or certificate of this controller still valid?",
        ),
        (other_root.to_string(), "certificate"),
    ] {
        std::fs::write(&file, kubeconfig).expect("written");
        let fed = Fed::by_kubeconfig(&file).await;
        fed.wait_problem(problem).await;
        assert!(!fed.is_complete());
    }
}

#[tokio::test]
async fn what_says_where_the_server_is_may_be_wrong() {
    let folder = tempfile::tempdir().expect("made");
    let file = folder.path().join("kubeconfig");
    let good = "{apiVersion: v1, kind: Config, current-context: a,
        clusters: [{name: c, cluster: {server: 'http://127.0.0.1:1'}}], users: [],
        contexts: [{name: a, context: {cluster: c}}]}";
    for (written, context, expected) in [
        (None, None, "kubeconfig cannot be used: "),
        (Some("a: ["), None, "kubeconfig cannot be used: "),
        (
            Some("{apiVersion: v1, kind: Config}"),
            None,
            "kubeconfig cannot be used: ",
        ),
        (Some(good), Some("b"), "kubeconfig cannot be used: "),
        (Some(good), None, ""),
    ] {
        match written {
            None => drop(std::fs::remove_file(&file)),
            Some(text) => std::fs::write(&file, text).expect("written"),
        }
        let connection = Connection {
            kubeconfig: Some(file.clone()),
            context: context.map(str::to_owned),
        };
        let fault = connection.client().await.err().map(|it| it.to_string());
        let fault = fault.unwrap_or_default();
        assert!(fault.contains(expected), "{fault}");
        assert_eq!(fault.is_empty(), expected.is_empty(), "{fault}");
    }
}
