//! NetworkPolicies, and whom they let in.

use weft_core::{Client, NetworkPods};

use super::policies::{NAME, POD};
use super::*;

pub(super) fn policy(name: &str, spec: &str) -> String {
    format!(
        "---
{{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy,
  metadata: {{name: {name}, namespace: production}}, spec: {{{spec}}}}}
"
    )
}

/// Pods that may be let in: `a` in the same namespace, `b` in the namespace `shop`, which is labelled.
const PEERS: &str = "
---
{apiVersion: v1, kind: Namespace, metadata: {name: shop, labels: {team: shop}}}
---
{apiVersion: v1, kind: Pod, metadata: {name: a, namespace: production, labels: {app: a}},
  spec: {nodeName: two, containers: [{name: c}]}, status: {podIPs: [{ip: 10.1.0.11}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: b, namespace: shop, labels: {app: b}},
  spec: {nodeName: two, containers: [{name: c}]}, status: {podIPs: [{ip: 10.1.0.12}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: host, namespace: production, labels: {app: a}},
  spec: {nodeName: two, hostNetwork: true, containers: [{name: c}]}, status: {podIPs: [{ip: 10.1.0.13}]}}
";

impl Cluster {
    /// Which of a (10.1.0.11), b (10.1.0.12), the host's pod (10.1.0.13) and 192.0.2.1 may connect to a port.
    fn let_in(&self, port: u16) -> [bool; 4] {
        ["10.1.0.11", "10.1.0.12", "10.1.0.13", "192.0.2.1"].map(|it| self.lets_in(port, it, None))
    }

    /// Whether whoever has this address, and maybe an identity, may connect to a port.
    fn lets_in(&self, port: u16, address: &str, account: Option<&str>) -> bool {
        let identity = account.map(|it| {
            let identity = format!("spiffe://cluster.local/ns/production/sa/{it}");
            identity.parse().expect("an identity")
        });
        let client = Client {
            address: address.parse().expect("an address"),
            identity: identity.as_ref(),
        };
        let workload_at = |address| {
            let mut told = self.told("one").into_values();
            told.find_map(|it| match it {
                Resource::Workload(it) if it.addresses.contains(&address) => Some(Arc::new(it)),
                _ => None,
            })
        };
        let rules = self.policy(NAME).network;
        rules.is_none_or(|it| it.allow(port, client, workload_at))
    }
}

const ALL: [bool; 4] = [true; 4];
const NONE: [bool; 4] = [false; 4];

/// spec -> who may connect to port 8080 (named http), and to port 9090 (named admin)
#[test]
fn rules_let_in() {
    let select = "podSelector: {matchLabels: {app: payment}}";
    for (spec, http, admin) in [
        ("podSelector: {}".to_owned(), NONE, NONE),
        (
            "podSelector: {matchLabels: {app: other}}".to_owned(),
            ALL,
            ALL,
        ),
        (
            format!("{select}, policyTypes: [Egress], egress: [{{}}]"),
            ALL,
            ALL,
        ),
        (
            format!("{select}, policyTypes: [Ingress, Egress]"),
            NONE,
            NONE,
        ),
        (format!("{select}, ingress: [{{}}]"), ALL, ALL),
        (
            format!("{select}, ingress: [{{ports: [{{port: 8080}}]}}]"),
            ALL,
            NONE,
        ),
        (
            format!("{select}, ingress: [{{ports: [{{port: http}}]}}]"),
            ALL,
            NONE,
        ),
        (
            format!("{select}, ingress: [{{ports: [{{port: other}}]}}]"),
            NONE,
            NONE,
        ),
        (
            format!("{select}, ingress: [{{ports: [{{port: 8000, endPort: 9000}}]}}]"),
            ALL,
            NONE,
        ),
        (
            format!("{select}, ingress: [{{ports: [{{protocol: UDP, port: 8080}}]}}]"),
            NONE,
            NONE,
        ),
        (
            format!("{select}, ingress: [{{ports: [{{protocol: TCP}}]}}]"),
            ALL,
            ALL,
        ),
        (
            format!("{select}, ingress: [{{from: [{{podSelector: {{}}}}]}}]"),
            [true, false, false, false],
            [true, false, false, false],
        ),
        (
            format!(
                "{select}, ingress: [{{from: [{{namespaceSelector: {{}}}}], ports: [{{port: 9090}}]}}]"
            ),
            NONE,
            [true, true, false, false],
        ),
        (
            format!(
                "{select}, ingress: [{{from: [{{namespaceSelector: {{matchLabels: {{team: shop}}}}, podSelector: {{matchLabels: {{app: b}}}}}}]}}]"
            ),
            [false, true, false, false],
            [false, true, false, false],
        ),
        (
            format!(
                "{select}, ingress: [{{from: [{{namespaceSelector: {{matchLabels: {{kubernetes.io/metadata.name: shop}}}}}}]}}]"
            ),
            [false, true, false, false],
            [false, true, false, false],
        ),
        // Of any namespace, by labels; of one, and of another by another: the union.
        (
            format!(
                "{select}, ingress: [{{from: [{{namespaceSelector: {{}}, podSelector: {{matchExpressions: [{{key: app, operator: In, values: [a, z]}}]}}}}]}}]"
            ),
            [true, false, false, false],
            [true, false, false, false],
        ),
        (
            format!(
                "{select}, ingress: [{{from: [{{namespaceSelector: {{matchExpressions: [{{key: team, operator: DoesNotExist}}]}}}}]}}]"
            ),
            [true, false, false, false],
            [true, false, false, false],
        ),
        (
            format!(
                "{select}, ingress: [{{from: [{{podSelector: {{matchLabels: {{app: b}}}}}}]}}, {{from: [{{namespaceSelector: {{matchLabels: {{team: shop}}}}}}], ports: [{{port: http}}, {{port: 7000}}]}}]"
            ),
            [false, true, false, false],
            NONE,
        ),
        (
            format!(
                "{select}, ingress: [{{from: [{{podSelector: {{matchLabels: {{app: a}}}}}}, {{ipBlock: {{cidr: 192.0.2.0/24}}}}]}}]"
            ),
            [true, false, false, true],
            [true, false, false, true],
        ),
        (
            format!("{select}, ingress: [{{from: [], ports: []}}]"),
            ALL,
            ALL,
        ),
        (
            format!(
                "{select}, ingress: [{{ports: [{{protocol: UDP, port: 53}}, {{port: 9000, endPort: 9100}}]}}]"
            ),
            NONE,
            ALL,
        ),
        (format!("{select}, ingress: []"), NONE, NONE),
        (format!("{select}, policyTypes: []"), NONE, NONE),
        (format!("{select}, egress: [{{}}]"), NONE, NONE),
        (
            format!("{select}, policyTypes: [Egress], ingress: [{{ports: [{{port: 1}}]}}]"),
            ALL,
            ALL,
        ),
        (
            "podSelector: {matchExpressions: [{key: app, operator: NotIn, values: [payment]}]}"
                .to_owned(),
            ALL,
            ALL,
        ),
        ("ingress: []".to_owned(), NONE, NONE),
        (
            format!(
                "{select}, ingress: [{{from: [{{ipBlock: {{cidr: 0.0.0.0/0, except: [10.1.0.12/32]}}}}]}}]"
            ),
            [true, false, true, true],
            [true, false, true, true],
        ),
    ] {
        let cluster = Cluster::of(&[POD, PEERS, &policy("n", &spec)].concat());
        assert!(
            cluster.problems().is_empty(),
            "{spec}: {:?}",
            cluster.problems()
        );
        assert_eq!(cluster.let_in(8080), http, "{spec}");
        assert_eq!(cluster.let_in(9090), admin, "{spec}");
    }
}

#[test]
fn policies_add_up_and_follow_what_they_select() {
    let select = "podSelector: {matchLabels: {app: payment}}";
    let from = |it: &str| format!("{select}, ingress: [{{from: [{it}]}}]");
    let of_a = policy("a", &from("{podSelector: {matchLabels: {app: a}}}"));
    let of_shop = policy(
        "b",
        &from("{namespaceSelector: {matchLabels: {team: shop}}}"),
    );
    let mut cluster = Cluster::of(&[POD, PEERS].concat());
    assert_eq!(cluster.let_in(8080), ALL);
    cluster.apply(&of_a);
    assert_eq!(cluster.let_in(8080), [true, false, false, false]);
    cluster.apply(&of_shop);
    assert_eq!(cluster.let_in(8080), [true, true, false, false]);
    // Labels of pods and of namespaces.
    cluster.apply(
        &PEERS
            .replace("{app: a}", "{app: c}")
            .replace("team: shop", "team: other"),
    );
    assert_eq!(cluster.let_in(8080), NONE);
    cluster.apply(PEERS);
    assert_eq!(cluster.let_in(8080), [true, true, false, false]);
    let moved = PEERS.replace("10.1.0.11", "10.1.0.21");
    cluster.apply(&moved);
    assert_eq!(cluster.let_in(8080), [false, true, false, false]);
    cluster.delete(&of_shop);
    assert_eq!(cluster.let_in(8080), NONE);
    cluster.delete(&of_a);
    assert_eq!(cluster.let_in(8080), ALL);
}

#[test]
fn meshed_peers_must_prove_who_they_are() {
    let meshed = PEERS.replace(
        "labels: {app: a}}",
        "labels: {app: a, weft.dev/mesh: enabled}}",
    );
    let select = "podSelector: {}, ingress: [{from: [{podSelector: {matchLabels: {app: a}}}]}]";
    let cluster = Cluster::of(&[POD, &meshed, &policy("n", select)].concat());
    assert!(cluster.lets_in(8080, "10.1.0.11", Some("default")));
    assert!(!cluster.lets_in(8080, "10.1.0.11", Some("other")));
    assert!(!cluster.lets_in(8080, "10.1.0.11", None));
    assert!(!cluster.lets_in(8080, "10.1.0.14", Some("default")));
}

/// Whole namespaces are told as such: pods that come and go there change nothing.
#[test]
fn namespaces_are_told_as_namespaces() {
    let peers = "{namespaceSelector: {}}, {podSelector: {matchLabels: {app: a}}}";
    let spec = format!("podSelector: {{}}, ingress: [{{from: [{peers}]}}]");
    let mut cluster = Cluster::of(&[POD, PEERS, &policy("n", &spec)].concat());
    let told = |cluster: &Cluster| cluster.policy(NAME).network.expect("selected");
    let before = told(&cluster);
    let peers = before.rules[0].peers.as_ref().expect("peers");
    let all = |it: &NetworkPods| *it == NetworkPods::All;
    assert!(peers.pods().len() == 2 && peers.pods().values().all(all));
    let more = PEERS
        .replace("name: b,", "name: c,")
        .replace("10.1.0.12", "10.1.0.22");
    cluster.apply(&more);
    assert_eq!(told(&cluster), before);
    assert!(cluster.lets_in(8080, "10.1.0.22", None));
    // The first pod of a namespace that nobody has declared.
    let elsewhere = more.replace("namespace: shop", "namespace: elsewhere");
    cluster.apply(&elsewhere.replace("10.1.0.22", "10.1.0.32"));
    assert!(cluster.lets_in(8080, "10.1.0.32", None));
}

#[test]
fn what_is_too_much_for_agents_is_let_in_nowhere() {
    let pods: Vec<String> = (0..4000)
        .map(|index| {
            let name = format!("{}-{index}", "a".repeat(240));
            format!(
                "---
{{apiVersion: v1, kind: Pod, metadata: {{name: {name}, namespace: shop, labels: {{app: b}}}},
  spec: {{nodeName: two, containers: [{{name: c}}]}}}}
"
            )
        })
        .collect();
    let from = "from: [{namespaceSelector: {}, podSelector: {matchLabels: {app: b}}}]";
    let spec = format!("podSelector: {{}}, ingress: [{{{from}}}, {{ports: [{{port: 9090}}]}}]");
    let mut cluster = Cluster::of(&[POD, PEERS, &policy("n", &spec), &pods.concat()].concat());
    let problems = cluster.problems();
    assert_eq!(problems.len(), 1, "{problems:?}");
    assert!(problems[0].contains("production/n, of which ingress[0] does not fit"));
    assert_eq!(cluster.let_in(8080), NONE);
    assert_eq!(cluster.let_in(9090), ALL);
    cluster.delete(&pods[1000..].concat());
    assert!(cluster.problems().is_empty(), "{:?}", cluster.problems());
    assert_eq!(cluster.let_in(8080), [false, true, false, false]);
}

#[test]
fn what_cannot_be_read_closes() {
    let good = policy("n", "podSelector: {}, ingress: [{}]");
    for (bad, field) in [
        (
            "podSelector: {}, ingress: [{from: [{}]}]",
            "spec.ingress[0].from[0]",
        ),
        (
            "podSelector: {}, ingress: [{from: [{ipBlock: {cidr: nowhere}}]}]",
            "spec.ingress[0].from[0].ipBlock.cidr",
        ),
        (
            "podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, excpet: [10.1.0.0/16]}}]}]",
            "spec.ingress[0].from[0].ipBlock.excpet",
        ),
        (
            "podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [11.1.0.0/16]}}]}]",
            "spec.ingress[0].from[0].ipBlock.except[0]",
        ),
        (
            "podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.0.0.0/8]}}]}]",
            "spec.ingress[0].from[0].ipBlock.except[0]",
        ),
        (
            "podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8}, podSelector: {}}]}]",
            "spec.ingress[0].from[0]",
        ),
        (
            "podSelector: {}, ingress: [{from: [{podSelector: {matchExpressions: [{key: a, operator: In}]}}]}]",
            "spec.ingress[0].from[0].podSelector.matchExpressions[0].values",
        ),
        (
            "podSelector: {}, ingress: [{}, {ports: [{port: 80, endPort: 70}]}]",
            "spec.ingress[1].ports[0].endPort",
        ),
        (
            "podSelector: {}, ingress: [{ports: [{port: http, endPort: 70}]}]",
            "spec.ingress[0].ports[0].endPort",
        ),
        (
            "podSelector: {}, ingress: [{ports: [{port: 0}]}]",
            "spec.ingress[0].ports[0].port",
        ),
        (
            "podSelector: {}, ingress: [{ports: [{port: '80'}]}]",
            "spec.ingress[0].ports[0].port",
        ),
        (
            "podSelector: {}, ingress: [{ports: [{protocol: HTTP}]}]",
            "spec.ingress[0].ports[0].protocol",
        ),
        ("podSelector: {}, policyTypes: [Ingres]", "spec.policyTypes"),
        ("podSelector: 7, ingress: [{}]", "spec.podSelector"),
        ("podSelector: {}, ingres: [{}]", "spec.ingres"),
        (
            "podSelector: {matchExpressions: [{key: a, operator: Is, values: [b]}]}, ingress: [{}]",
            "spec.podSelector.matchExpressions[0].values",
        ),
    ] {
        let bad = policy("n", bad);
        let mut cluster = Cluster::of(&[POD, PEERS, &bad].concat());
        let problems = cluster.problems();
        assert_eq!(problems.len(), 1, "{bad}: {problems:?}");
        assert!(
            problems[0].starts_with(&format!("{field}: ")),
            "{problems:?}"
        );
        assert_eq!(cluster.let_in(8080), NONE, "{bad}");
        cluster.apply(&good);
        assert_eq!(cluster.let_in(8080), ALL, "{bad}");
        cluster.apply(&bad);
        assert_eq!(cluster.let_in(8080), ALL, "what was in force stays: {bad}");
        cluster.delete(&bad);
        assert!(cluster.problems().is_empty(), "{bad}");
        assert_eq!(cluster.let_in(8080), ALL, "{bad}");
    }
    // What cannot be read of egress is no reason to close ingress.
    for (bad, expected) in [
        (
            "podSelector: {}, policyTypes: [Egress], egress: [{too: 7}]",
            ALL,
        ),
        ("podSelector: {}, policyTypes: [Egress, 7]", NONE),
        (
            "podSelector: {matchLabels: {app: other}}, ingress: [{from: [{}]}]",
            ALL,
        ),
    ] {
        let cluster = Cluster::of(&[POD, PEERS, &policy("n", bad)].concat());
        assert_eq!(cluster.problems().len(), 1, "{bad}");
        assert_eq!(cluster.let_in(8080), expected, "{bad}");
    }
}
