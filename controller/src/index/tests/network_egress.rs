//! NetworkPolicies, and what they let pods connect to.

use std::net::SocketAddr;

use super::network::policy;
use super::policies::{NAME, POD};
use super::*;

/// Pods to connect to: `a` in the same namespace, `b` in the namespace `shop`, which is labelled. Both have a port
/// `main`, with other numbers; and one with the addresses of its node has one too.
const PEERS: &str = "
---
{apiVersion: v1, kind: Namespace, metadata: {name: shop, labels: {team: shop}}}
---
{apiVersion: v1, kind: Pod, metadata: {name: a, namespace: production, labels: {app: a}},
  spec: {nodeName: two, containers: [{name: c, ports: [{name: main, containerPort: 7000},
    {name: main-too, containerPort: 7002}, {name: main-udp, containerPort: 53, protocol: UDP}]}]},
  status: {podIPs: [{ip: 10.1.0.11}, {ip: 'fd00::11'}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: b, namespace: shop, labels: {app: b}},
  spec: {nodeName: two, containers: [{name: c, ports: [{name: main, containerPort: 7001}]}]},
  status: {podIPs: [{ip: 10.1.0.12}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: host, namespace: production, labels: {app: a}},
  spec: {nodeName: two, hostNetwork: true, containers: [{name: c, ports: [{name: main, containerPort: 7003}]}]},
  status: {podIPs: [{ip: 10.1.0.13}]}}
";

/// Where the pod may want to go.
const TARGETS: [&str; 8] = [
    "10.1.0.11:7000",
    "[fd00::11]:7000",
    "10.1.0.11:7001",
    "10.1.0.12:7000",
    "10.1.0.12:7001",
    "10.1.0.13:7003",
    "192.0.2.1:7000",
    "192.0.2.1:443",
];
const ALL: &[usize] = &[0, 1, 2, 3, 4, 5, 6, 7];
const NONE: &[usize] = &[];

impl Cluster {
    /// Problems but for the range of IPv6 addresses, which nobody has said.
    fn wrong(&self) -> Vec<String> {
        let problems = self.problems().into_iter();
        problems
            .filter(|it| !it.starts_with("--pod-range"))
            .collect()
    }

    /// Which of [`TARGETS`] the pod may connect to.
    fn let_out(&self) -> Vec<usize> {
        let told = self.told("one").into_values();
        let workloads = told.filter_map(|it| match it {
            Resource::Workload(it) => Some(it),
            _ => None,
        });
        let workloads: Vec<_> = workloads.collect();
        let policy = self.policy(NAME);
        let may = |target: &str| {
            let to: SocketAddr = target.parse().expect("an address");
            let mut servers = workloads.iter();
            let server = servers.find(|it| it.addresses.contains(&to.ip()));
            weft_core::let_out(Some(&policy), to, server.map(|it| &it.id)).is_ok()
        };
        let targets = TARGETS.iter().enumerate();
        targets
            .filter(|(_, it)| may(it))
            .map(|(index, _)| index)
            .collect()
    }
}

/// spec -> what the pod may connect to, and whether somebody may still connect to it
#[test]
fn rules_let_out() {
    let select = "podSelector: {matchLabels: {app: payment}}";
    let of_a = "podSelector: {matchLabels: {app: a}}";
    let of_shop = "namespaceSelector: {matchLabels: {team: shop}}";
    let to = |peers: &str| format!("{select}, policyTypes: [Egress], egress: [{{to: [{peers}]}}]");
    let at = |peers: &str, ports: &str| {
        format!("{select}, policyTypes: [Egress], egress: [{{to: [{peers}], ports: [{ports}]}}]")
    };
    let ports =
        |ports: &str| format!("{select}, policyTypes: [Egress], egress: [{{ports: [{ports}]}}]");
    let table: Vec<(String, &[usize], bool)> = vec![
        // Which types a policy has.
        (select.to_owned(), ALL, false),
        (format!("{select}, egress: []"), ALL, false),
        (format!("{select}, egress: [{{}}]"), ALL, false),
        (
            format!("{select}, policyTypes: [Ingress], egress: [{{ports: [{{port: 1}}]}}]"),
            ALL,
            false,
        ),
        (format!("{select}, policyTypes: [Egress]"), NONE, true),
        (
            format!("{select}, policyTypes: [Egress], egress: []"),
            NONE,
            true,
        ),
        (
            format!("{select}, policyTypes: [Egress], egress: [{{}}]"),
            ALL,
            true,
        ),
        (
            format!("{select}, policyTypes: [Ingress, Egress]"),
            NONE,
            false,
        ),
        (
            format!("{select}, egress: [{{ports: [{{port: 443}}]}}]"),
            &[7],
            false,
        ),
        (
            "podSelector: {matchLabels: {app: other}}, policyTypes: [Egress]".to_owned(),
            ALL,
            true,
        ),
        (
            "podSelector: {}, policyTypes: [Egress]".to_owned(),
            NONE,
            true,
        ),
        // Whom.
        (to("{podSelector: {}}"), &[0, 1, 2], true),
        (to(&format!("{{{of_a}}}")), &[0, 1, 2], true),
        (to("{podSelector: {matchLabels: {app: b}}}"), NONE, true),
        (to(&format!("{{{of_shop}}}")), &[3, 4], true),
        (to(&format!("{{{of_shop}, {of_a}}}")), NONE, true),
        (
            to(&format!("{{{of_shop}}}, {{{of_a}}}")),
            &[0, 1, 2, 3, 4],
            true,
        ),
        (to("{namespaceSelector: {}}"), &[0, 1, 2, 3, 4], true),
        (
            to("{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: shop}}}"),
            &[3, 4],
            true,
        ),
        (to("{ipBlock: {cidr: 192.0.2.0/24}}"), &[6, 7], true),
        (
            to("{ipBlock: {cidr: 10.1.0.0/16, except: [10.1.0.12/32]}}"),
            &[0, 2, 5],
            true,
        ),
        (to("{ipBlock: {cidr: 'fd00::/16'}}"), &[1], true),
        (to(""), ALL, true),
        // Which ports: those of the server.
        (ports("{port: 7000}"), &[0, 1, 3, 6], true),
        (ports("{port: 7001, endPort: 7003}"), &[2, 4, 5], true),
        (ports("{protocol: TCP}"), ALL, true),
        (ports("{protocol: UDP}"), NONE, true),
        (
            ports("{protocol: UDP, port: 7000}, {port: 443}"),
            &[7],
            true,
        ),
        (at(&format!("{{{of_a}}}"), "{port: 7001}"), &[2], true),
        // By name: whatever number it has there.
        (ports("{port: main}"), &[0, 1, 4], true),
        (ports("{port: main-udp}"), NONE, true),
        (ports("{port: nobody-has}"), NONE, true),
        (ports("{port: main}, {port: 443}"), &[0, 1, 4, 7], true),
        (at(&format!("{{{of_a}}}"), "{port: main}"), &[0, 1], true),
        (at(&format!("{{{of_shop}}}"), "{port: main}"), &[4], true),
        (
            at("{namespaceSelector: {}}", "{port: main}"),
            &[0, 1, 4],
            true,
        ),
        (
            at("{ipBlock: {cidr: 10.1.0.0/16}}", "{port: main}"),
            &[0, 4],
            true,
        ),
        (
            at(
                "{ipBlock: {cidr: 10.1.0.0/16, except: [10.1.0.11/32]}}",
                "{port: main}",
            ),
            &[4],
            true,
        ),
        (
            at(
                &format!("{{ipBlock: {{cidr: 192.0.2.0/24}}}}, {{{of_a}}}"),
                "{port: main}",
            ),
            &[0, 1],
            true,
        ),
    ];
    for (spec, expected, is_open) in table {
        let cluster = Cluster::of(&[POD, PEERS, &policy("n", &spec)].concat());
        let problems = cluster.wrong();
        assert!(problems.is_empty(), "{spec}: {problems:?}");
        assert_eq!(cluster.let_out(), expected, "{spec}");
        let closed = cluster.policy(NAME).network;
        assert_eq!(closed.is_none(), is_open, "{spec}");
    }
}

#[test]
fn policies_add_up_and_follow_whom_they_mean() {
    let to = |it: &str| format!("podSelector: {{}}, policyTypes: [Egress], egress: [{{{it}}}]");
    let of_a = policy(
        "a",
        &to("to: [{podSelector: {matchLabels: {app: a}}}], ports: [{port: main}]"),
    );
    let of_shop = policy(
        "b",
        &to("to: [{namespaceSelector: {matchLabels: {team: shop}}}]"),
    );
    let of_block = policy(
        "c",
        &to("to: [{ipBlock: {cidr: 10.1.0.0/16}}], ports: [{port: main-too}]"),
    );
    let mut cluster = Cluster::of(&[POD, PEERS].concat());
    assert_eq!(cluster.let_out(), ALL);
    cluster.apply(&of_a);
    assert_eq!(cluster.let_out(), [0, 1]);
    cluster.apply(&of_shop);
    assert_eq!(cluster.let_out(), [0, 1, 3, 4]);
    // Other numbers of ports, labels of pods and of namespaces.
    cluster.apply(&PEERS.replace("containerPort: 7000", "containerPort: 7001"));
    assert_eq!(cluster.let_out(), [2, 3, 4]);
    cluster.apply(
        &PEERS
            .replace("{app: a}", "{app: c}")
            .replace("team: shop", "team: other"),
    );
    assert_eq!(cluster.let_out(), NONE);
    cluster.apply(PEERS);
    assert_eq!(cluster.let_out(), [0, 1, 3, 4]);
    cluster.delete(&of_shop);
    cluster.delete(&of_a);
    assert_eq!(cluster.let_out(), ALL);
    // Of pods within a network, their addresses.
    cluster.apply(&of_block);
    assert_eq!(cluster.let_out(), NONE);
    let renamed = PEERS.replace(
        "name: main, containerPort: 7001",
        "name: main-too, containerPort: 7001",
    );
    cluster.apply(&renamed);
    assert_eq!(cluster.let_out(), [4]);
    cluster.apply(&renamed.replace("10.1.0.12", "10.2.0.12"));
    assert_eq!(cluster.let_out(), NONE);
    cluster.apply(&renamed);
    assert_eq!(cluster.let_out(), [4]);
}

#[test]
fn what_is_too_much_for_agents_is_let_out_nowhere() {
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
    let to = "to: [{namespaceSelector: {}, podSelector: {matchLabels: {app: b}}}]";
    let spec = format!(
        "podSelector: {{}}, policyTypes: [Egress], egress: [{{{to}}}, {{ports: [{{port: 443}}]}}]"
    );
    let cluster = Cluster::of(&[POD, PEERS, &policy("n", &spec), &pods.concat()].concat());
    let problems = cluster.wrong();
    assert_eq!(problems.len(), 1, "{problems:?}");
    assert!(problems[0].contains("production/n, of which egress[0] does not fit"));
    assert_eq!(cluster.let_out(), [7]);
}

/// spec -> what is wrong with it, whether it closes egress and ingress
#[test]
fn what_cannot_be_read_closes_what_it_may_be_about() {
    let good = policy(
        "n",
        "podSelector: {}, ingress: [{}], egress: [{}], policyTypes: [Ingress, Egress]",
    );
    for (bad, field, egress, ingress) in [
        ("egress: [{to: [{}]}]", "spec.egress[0].to[0]", true, true),
        (
            "policyTypes: [Egress], egress: [{to: [{ipBlock: {cidr: x}}]}]",
            "spec.egress[0].to[0].ipBlock.cidr",
            true,
            false,
        ),
        (
            "policyTypes: [Egress], egress: [{ports: [{port: 0}]}]",
            "spec.egress[0].ports[0].port",
            true,
            false,
        ),
        (
            "policyTypes: [Egress], egress: [{from: [{}]}]",
            "spec.egress[0].from",
            true,
            false,
        ),
        (
            "policyTypes: [Ingress], egress: [{to: [{}]}]",
            "spec.egress[0].to[0]",
            false,
            true,
        ),
        (
            "policyTypes: [Egress], ingress: [{from: [{}]}]",
            "spec.ingress[0].from[0]",
            true,
            false,
        ),
        (
            "ingress: [{from: [{}]}]",
            "spec.ingress[0].from[0]",
            false,
            true,
        ),
        (
            "ingress: [{from: [{}]}], egress: []",
            "spec.ingress[0].from[0]",
            false,
            true,
        ),
        ("egress: 7", "spec.egress", true, true),
        ("policyTypes: [Egres]", "spec.policyTypes", true, true),
        ("policyTypes: Egress", "spec.policyTypes", true, true),
    ] {
        let bad = policy("n", &format!("podSelector: {{}}, {bad}"));
        let mut cluster = Cluster::of(&[POD, PEERS, &bad].concat());
        let problems = cluster.wrong();
        assert_eq!(problems.len(), 1, "{bad}: {problems:?}");
        assert!(
            problems[0].starts_with(&format!("{field}: ")),
            "{problems:?}"
        );
        assert_eq!(cluster.let_out().is_empty(), egress, "{bad}");
        assert_eq!(cluster.policy(NAME).network.is_some(), ingress, "{bad}");
        cluster.apply(&good);
        assert_eq!(cluster.let_out(), ALL, "{bad}");
        cluster.apply(&bad);
        assert_eq!(cluster.let_out(), ALL, "what was in force stays: {bad}");
    }
}
