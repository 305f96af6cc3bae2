use serde_json::{Value, json};

use super::super::Report;
use super::rights::{Access, lacks, plural};
use super::*;

fn object<T: serde::de::DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).expect("an object")
}

fn node(name: &str, kernel: &str, system: &str, architecture: &str) -> Node {
    object(
        json!({"metadata": {"name": name}, "spec": {"podCIDRs": ["10.244.0.0/24"]},
        "status": {"nodeInfo": {"kernelVersion": kernel, "operatingSystem": system, "architecture": architecture}}}),
    )
}

fn set(namespace: &str, name: &str, env: Value) -> DaemonSet {
    object(
        json!({"metadata": {"namespace": namespace, "name": name}, "spec": {"selector": {},
        "template": {"spec": {"containers": [{"name": "a", "env": env}]}}}}),
    )
}

/// A cluster in which nothing is in the way.
fn good() -> Kubernetes {
    let version = json!({"major": "1", "minor": "33+", "gitVersion": "v1.33.2-gke.1"});
    Kubernetes {
        server: "https://api.example.org/".to_owned(),
        version: object(version),
        namespace: "weft-system".to_owned(),
        lacks: Ok(vec![]),
        daemon_sets: Ok(vec![set("kube-system", "kindnet", json!([]))]),
        deployments: Ok(vec![]),
        cilium: Ok(None),
        definitions: Ok(vec!["httproutes.gateway.networking.k8s.io".to_owned()]),
        own_definitions: Ok(vec![]),
        nodes: Ok(vec![
            node("one", "6.1.0-13-amd64", "linux", "amd64"),
            node("two", "5.15.0", "linux", "arm64"),
        ]),
        has_service_ranges: Ok(true),
    }
}

fn report(change: impl FnOnce(&mut Kubernetes)) -> Report {
    let mut kubernetes = good();
    change(&mut kubernetes);
    let kubernetes = Ok(kubernetes);
    Report::of(findings(&Facts { kubernetes }))
}

fn definition(name: &str) -> CustomResourceDefinition {
    new_definitions()
        .remove(name)
        .expect("one of the manifests")
}

type Change = Box<dyn FnOnce(&mut Kubernetes)>;

const SERVERS: &str = "servers.policy.weft.dev";

#[test]
fn each_check_finds_what_it_is_for() {
    use State::{Error, Warning};
    let cilium = |data: Value| Ok(Some(object(json!({"data": data}))));
    let mut cases: Vec<(&str, State, &str, Change)> = vec![];
    let mut case = |check, state, part, change: Change| {
        cases.push((check, state, part, change));
    };
    for (minor, state, part) in [
        ("20", Error, "1.21 or later is needed"),
        ("21", Warning, "without one beside the other"),
        ("29", Warning, "the component before-1.30 is needed"),
        ("x", Warning, "it is not known what it can do"),
    ] {
        let change = move |it: &mut Kubernetes| it.version.minor = minor.to_owned();
        case("kubernetes-version", state, part, Box::new(change));
    }
    case(
        "rights-to-install",
        Error,
        "you may not create x",
        Box::new(|it| {
            it.lacks = Ok(vec!["you may not create x".to_owned()]);
        }),
    );
    case(
        "rights-to-install",
        Warning,
        "denied",
        Box::new(|it| it.lacks = Err("denied".to_owned())),
    );
    for (namespace, part) in [
        ("weft-system", "installed in weft-system already"),
        (
            "other",
            "installed in other already, and not in weft-system",
        ),
    ] {
        let change = move |it: &mut Kubernetes| {
            it.daemon_sets = Ok(vec![set(namespace, "weft-agent", json!([]))])
        };
        case("weft-installed", Warning, part, Box::new(change));
    }
    case(
        "definitions",
        Error,
        "servers.policy.weft.dev: objects are stored as v0",
        Box::new(|it| {
            let mut old = definition(SERVERS);
            old.status.get_or_insert_default().stored_versions = Some(vec!["v0".to_owned()]);
            it.own_definitions = Ok(vec![old]);
        }),
    );
    case(
        "definitions",
        Error,
        "it is Cluster, and Namespaced here",
        Box::new(|it| {
            let mut old = definition(SERVERS);
            old.spec.scope = "Cluster".to_owned();
            it.own_definitions = Ok(vec![old]);
        }),
    );
    case(
        "definitions",
        Warning,
        "v0 is served, and v1alpha1 here",
        Box::new(|it| {
            let mut old = definition(SERVERS);
            old.spec.versions[0].name = "v0".to_owned();
            it.own_definitions = Ok(vec![old]);
        }),
    );
    case(
        "definitions",
        Warning,
        "others.policy.weft.dev: this version does not know it",
        Box::new(|it| {
            let mut old = definition(SERVERS);
            old.metadata.name = Some("others.policy.weft.dev".to_owned());
            it.own_definitions = Ok(vec![old]);
        }),
    );
    for (labels, part) in [
        (json!({"app": "istiod"}), "Istio: Deployment mesh/control"),
        (
            json!({"linkerd.io/control-plane-component": "destination"}),
            "Linkerd: Deployment mesh/control",
        ),
    ] {
        case(
            "another-mesh",
            Warning,
            part,
            Box::new(move |it| {
                let metadata = json!({"namespace": "mesh", "name": "control", "labels": labels});
                it.deployments = Ok(vec![object(json!({"metadata": metadata}))]);
            }),
        );
    }
    case(
        "another-mesh",
        Warning,
        "Istio's ambient mode: DaemonSet istio-system/ztunnel",
        Box::new(|it| {
            it.daemon_sets = Ok(vec![set("istio-system", "ztunnel", json!([]))]);
        }),
    );
    case(
        "another-mesh",
        Warning,
        "Istio: 1 definitions",
        Box::new(|it| {
            it.definitions = Ok(vec!["gateways.networking.istio.io".to_owned()]);
        }),
    );
    for (data, part) in [
        (
            json!({"kube-proxy-replacement": "true", "cni-exclusive": "false"}),
            "connect (kube-proxy-replacement)",
        ),
        (
            json!({"bpf-lb-sock": "true", "cni-exclusive": "false"}),
            "connect (bpf-lb-sock)",
        ),
        (
            json!({"kube-proxy-replacement": "true", "bpf-lb-sock-hostns-only": "true"}),
            "cni.exclusive=false",
        ),
    ] {
        case(
            "cni",
            Warning,
            part,
            Box::new(move |it| it.cilium = cilium(data)),
        );
    }
    case(
        "address-ranges",
        Warning,
        "1 of 2 nodes have no podCIDRs",
        Box::new(|it| {
            it.nodes.as_mut().expect("nodes")[0].spec = None;
        }),
    );
    case(
        "address-ranges",
        Warning,
        "there are no ServiceCIDRs",
        Box::new(|it| it.has_service_ranges = Ok(false)),
    );
    case(
        "address-ranges",
        Warning,
        "Cilium hands out addresses of pods by itself: --pod-range 10.0.0.0/8",
        Box::new(move |it| {
            it.daemon_sets = Ok(vec![set("kube-system", "cilium", json!([]))]);
            it.cilium = cilium(
                json!({"ipam": "cluster-pool", "cluster-pool-ipv4-cidr": "10.0.0.0/8", "cni-exclusive": "false"}),
            );
        }),
    );
    case(
        "node-kernels",
        Error,
        "two: Linux 4.18.0-553.el8",
        Box::new(|it| {
            it.nodes.as_mut().expect("nodes")[1] = node("two", "4.18.0-553.el8", "linux", "amd64");
        }),
    );
    case(
        "node-kernels",
        Warning,
        "1 nodes do not say",
        Box::new(|it| {
            it.nodes.as_mut().expect("nodes")[1] = node("two", "", "linux", "amd64");
        }),
    );
    case(
        "node-platforms",
        Error,
        "two: there is no image for s390x",
        Box::new(|it| {
            it.nodes.as_mut().expect("nodes")[1] = node("two", "6.1.0", "linux", "s390x");
        }),
    );
    case(
        "node-platforms",
        Warning,
        "two: no agent runs there",
        Box::new(|it| {
            it.nodes.as_mut().expect("nodes")[1] =
                node("two", "10.0.20348.2113", "windows", "amd64");
        }),
    );
    case(
        "node-platforms",
        Warning,
        "two: no agent runs there",
        Box::new(|it| {
            let mut fargate = node("two", "4.14.0", "linux", "amd64");
            let (key, value) = WITHOUT_AGENT[0];
            fargate.metadata.labels = Some([(key.to_owned(), value.to_owned())].into());
            it.nodes.as_mut().expect("nodes")[1] = fargate;
        }),
    );
    for (check, state, part, change) in cases {
        let report = report(change);
        let mut bad = report.checks.iter().filter(|it| it.state != State::Ok);
        let found = bad
            .next()
            .unwrap_or_else(|| panic!("{check}, {part}: nothing is found"));
        assert_eq!((found.check, found.state), (check, state), "{part}");
        let text = format!("{}\n{}", found.fact, found.details.join("\n"));
        assert!(text.contains(part), "no {part:?} in {text}");
        assert_eq!(bad.next(), None, "{check}, {part}");
        assert_eq!(report.ok, state != Error);
    }
}

#[test]
fn what_cannot_be_seen_is_no_error() {
    let denied = || "denied (403)".to_owned();
    let report = report(|it| {
        it.lacks = Err(denied());
        it.daemon_sets = Err(denied());
        it.deployments = Err(denied());
        it.cilium = Err(denied());
        it.definitions = Err(denied());
        it.own_definitions = Err(denied());
        it.nodes = Err(denied());
        it.has_service_ranges = Err(denied());
    });
    assert!(report.ok);
    let unseen: Vec<_> = report
        .checks
        .iter()
        .filter(|it| it.state == State::Warning)
        .collect();
    assert_eq!(unseen.len(), super::super::BEFORE.len() - 2);
    assert!(unseen.iter().all(|it| it.details == ["denied (403)"]));
}

#[test]
fn settings_of_calico_are_those_of_its_daemon_set() {
    let calico = |env: Value| {
        let report =
            report(|it| it.daemon_sets = Ok(vec![set("calico-system", "calico-node", env)]));
        let mut found = report.checks.into_iter().filter(|it| it.check == "cni");
        found.next().expect("a finding")
    };
    assert_eq!(calico(json!([])).fact, "the CNI is Calico");
    let on = json!({"name": "FELIX_BPFENABLED", "value": "true"});
    assert_eq!(calico(json!([on])).state, State::Warning);
    let off = json!({"name": "FELIX_BPFCONNECTTIMELOADBALANCING", "value": "Disabled"});
    assert_eq!(calico(json!([on, off])).state, State::Ok);
}

#[test]
fn it_is_told_line_by_line() {
    let report = report(|it| {
        it.lacks = Ok(vec!["you may not create, patch namespaces".to_owned()]);
        it.nodes.as_mut().expect("nodes")[1] = node("two", "4.18.0", "linux", "amd64");
        it.cilium = Ok(Some(object(json!({"data": {"cni-exclusive": "true"}}))));
    });
    let mut text = vec![];
    report.write(&mut text, false, State::Ok).expect("a vector");
    assert_eq!(
        String::from_utf8(text).expect("text"),
        "\
kubernetes
√ the Kubernetes API answers at https://api.example.org/
√ Kubernetes is v1.33.2-gke.1
× you may not make all that weft install prints
    you may not create, patch namespaces
    see docs/checks.md#rights-to-install

what is there
√ Weft is not installed in weft-system yet
√ no definitions of Weft are there yet
√ no other mesh is there
‼ the CNI is kindnet, and settings of it may be in the way
    Cilium removes configurations of other CNI plugins (cni-exclusive): the component cni needs cni.exclusive=false
    see docs/checks.md#cni
√ the cluster says which addresses are its own

nodes
× 1 nodes do not have Linux 5.15 or later
    two: Linux 4.18.0
    see docs/checks.md#node-kernels
√ there is an image for all nodes

something is wrong
"
    );
    let json = serde_json::to_value(&report).expect("JSON");
    let kernels = json!({"check": "node-kernels", "category": "nodes", "state": "error",
        "fact": "1 nodes do not have Linux 5.15 or later", "details": ["two: Linux 4.18.0"]});
    assert_eq!((&json["ok"], &json["checks"][8]), (&json!(false), &kernels));
    let names: Vec<&str> = report.checks.iter().map(|it| it.check).collect();
    let expected: Vec<&str> = super::super::BEFORE.iter().map(|it| it.0).collect();
    assert_eq!(names, expected, "all checks are run, in their order");
}

#[test]
fn without_an_api_server_nothing_else_is_said() {
    let kubernetes = Err("connection refused".to_owned());
    let report = Report::of(findings(&Facts { kubernetes }));
    let found: Vec<_> = report
        .checks
        .iter()
        .map(|it| (it.check, it.state))
        .collect();
    assert_eq!(found, [("kubernetes-reachable", State::Error)]);
    assert!(!report.ok);
}

#[test]
fn what_this_version_brings_is_no_difference() {
    let report = report(|it| it.own_definitions = Ok(new_definitions().into_values().collect()));
    let fact = "6 definitions of Weft are there, as this version has them";
    assert_eq!(report.checks[4].fact, fact);
}

#[test]
fn rights_are_those_that_applying_the_manifests_takes() {
    let manifests = decode::documents(install::ALL).expect("YAML");
    let said = |allowed: &dyn Fn(&Access) -> bool| lacks(&manifests, &|it| allowed(it));
    assert_eq!(said(&|_| true), [""; 0]);
    let none = said(&|_| false);
    for line in [
        "you may not get, create, patch customresourcedefinitions.apiextensions.k8s.io",
        "you may not get, create, patch daemonsets.apps in the namespace weft-system",
        "you may not get, create, patch namespaces",
        "the ClusterRole weft-controller gives what you may not do yourself (get namespaces, and ",
        "the Role weft-reach gives what you may not do yourself (list pods in the namespace weft-system, and 2 more): to make it",
    ] {
        assert!(
            none.iter().any(|it| it.starts_with(line)),
            "no {line:?} in {none:#?}"
        );
    }
    // A role that is bound to nobody is made alone.
    let of_reach = none.iter().filter(|it| it.contains("the Role weft-reach "));
    assert_eq!(of_reach.count(), 1);
    let is_to_apply =
        |it: &Access| ["get", "create", "patch"].contains(&it.verb.as_str()) && it.name.is_none();
    let over_roles = said(&|it| is_to_apply(it) || it.verb == "escalate");
    assert!(
        !over_roles.is_empty()
            && over_roles
                .iter()
                .all(|it| it.ends_with("takes the verb bind")),
        "{over_roles:#?}"
    );
    let both = said(&|it| is_to_apply(it) || ["escalate", "bind"].contains(&it.verb.as_str()));
    assert_eq!(both, [""; 0]);
    // Whoever has what they give needs neither.
    let own = said(&|it| !["escalate", "bind"].contains(&it.verb.as_str()));
    assert_eq!(own, [""; 0]);
    let read_only = said(&|it| it.verb != "create" || it.resource != "services");
    assert_eq!(
        read_only,
        ["you may not create services in the namespace weft-system"]
    );
}

#[test]
fn paths_have_the_names_of_kinds() {
    for (kind, expected) in [
        ("NetworkPolicy", "networkpolicies"),
        ("CustomResourceDefinition", "customresourcedefinitions"),
        ("DaemonSet", "daemonsets"),
    ] {
        assert_eq!(plural(kind), expected);
    }
}
