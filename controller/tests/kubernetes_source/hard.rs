//! Pods and Services of the kinds that meshes get wrong: what agents are told of them, and for whom they may sign.

use std::collections::BTreeSet;

use weft_proto::Resource;

use crate::stage::{Fed, SHOP, Stage};

/// What is in the cluster, and what follows, beside [`SHOP`]: `e`ndpoints, `w`orkloads, pods that an agent has to
/// `t`ake, and service accounts that a node may have certificates `f`or.
const CASES: &[(&str, &str, &[&str])] = &[
    (
        "a StatefulSet's pods, by a headless Service",
        "
{apiVersion: v1, kind: Service, metadata: {name: db, namespace: shop},
 spec: {clusterIP: None, selector: {app: db}, ports: [{name: sql, port: 5432}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: a-0, namespace: shop, labels: {app: db},
  ownerReferences: [{apiVersion: apps/v1, kind: StatefulSet, name: a, uid: u, controller: true}]},
 spec: {nodeName: one, hostname: a-0, subdomain: db, serviceAccountName: a, containers: [{name: c}]},
 status: {phase: Running, podIPs: [{ip: 10.1.1.20}], conditions: [{type: Ready, status: 'True'}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: a-1, namespace: shop, labels: {app: db},
  ownerReferences: [{apiVersion: apps/v1, kind: StatefulSet, name: a, uid: u, controller: true}]},
 spec: {nodeName: two, hostname: a-1, subdomain: db, serviceAccountName: a, containers: [{name: c}]},
 status: {phase: Running, podIPs: [{ip: 10.1.2.20}], conditions: [{type: Ready, status: 'True'}]}}",
        &[
            "e shop/db 10.1.1.20:5432>5432",
            "e shop/db 10.1.2.20:5432>5432",
            "f shop/a on one",
            "f shop/a on two",
            "t shop/a-0 on one",
            "t shop/a-1 on two",
            "w shop/a-0 10.1.1.20 meshed, statefulset a",
            "w shop/a-1 10.1.2.20 meshed, statefulset a",
        ],
    ),
    (
        "an ExternalName, which selects nobody, whatever it says",
        "
{apiVersion: v1, kind: Service, metadata: {name: out, namespace: shop},
 spec: {type: ExternalName, externalName: example.com, selector: {app: a}, ports: [{port: 80}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: a, namespace: shop, labels: {app: a}},
 spec: {nodeName: one, serviceAccountName: a, containers: [{name: c}]},
 status: {phase: Running, podIPs: [{ip: 10.1.1.20}]}}",
        &[
            "f shop/a on one",
            "t shop/a on one",
            "w shop/a 10.1.1.20 meshed",
        ],
    ),
    (
        "a port by its name, which each pod has at another number, and one not",
        "
{apiVersion: v1, kind: Service, metadata: {name: named, namespace: shop},
 spec: {clusterIP: 10.2.0.9, selector: {app: a}, ports: [{name: http, port: 80, targetPort: http}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: a, namespace: shop, labels: {app: a}},
 spec: {nodeName: one, serviceAccountName: a, containers: [{name: c, ports: [{name: http, containerPort: 8080}]}]},
 status: {phase: Running, podIPs: [{ip: 10.1.1.20}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: b, namespace: shop, labels: {app: a}},
 spec: {nodeName: two, serviceAccountName: b,
  containers: [{name: other, ports: [{name: admin, containerPort: 1}]}, {name: c, ports: [{name: http, containerPort: 9090}]}]},
 status: {phase: Running, podIPs: [{ip: 10.1.2.20}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: c, namespace: shop, labels: {app: a}},
 spec: {nodeName: two, serviceAccountName: c, containers: [{name: c, ports: [{name: web, containerPort: 80}]}]},
 status: {phase: Running, podIPs: [{ip: 10.1.2.21}]}}",
        &[
            "e shop/named 10.1.1.20:80>8080",
            "e shop/named 10.1.2.20:80>9090",
            "f shop/a on one",
            "f shop/b on two",
            "f shop/c on two",
            "t shop/a on one",
            "t shop/b on two",
            "t shop/c on two",
            "w shop/a 10.1.1.20 meshed",
            "w shop/b 10.1.2.20 meshed",
            "w shop/c 10.1.2.21 meshed",
        ],
    ),
    (
        "a pod that is not ready, by a Service that does not care and one that does",
        "
{apiVersion: v1, kind: Service, metadata: {name: all, namespace: shop},
 spec: {clusterIP: 10.2.0.8, publishNotReadyAddresses: true, selector: {app: a}, ports: [{port: 80}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: some, namespace: shop},
 spec: {clusterIP: 10.2.0.9, selector: {app: a}, ports: [{port: 80}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: a, namespace: shop, labels: {app: a}},
 spec: {nodeName: one, serviceAccountName: a, containers: [{name: c}]},
 status: {phase: Running, podIPs: [{ip: 10.1.1.20}], conditions: [{type: Ready, status: 'False'}]}}",
        &[
            "e shop/all 10.1.1.20:80>80",
            "f shop/a on one",
            "t shop/a on one",
            "w shop/a 10.1.1.20 meshed",
        ],
    ),
    (
        "pods that terminate: of one Service all, of the other not",
        "
{apiVersion: v1, kind: Service, metadata: {name: last, namespace: shop},
 spec: {clusterIP: 10.2.0.8, selector: {app: a}, ports: [{port: 80}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: both, namespace: shop},
 spec: {clusterIP: 10.2.0.9, selector: {of: both}, ports: [{port: 80}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: a, namespace: shop, labels: {app: a, of: both},
  deletionTimestamp: '2026-01-01T00:00:00Z'},
 spec: {nodeName: one, serviceAccountName: a, containers: [{name: c}]},
 status: {phase: Running, podIPs: [{ip: 10.1.1.20}], conditions: [{type: Ready, status: 'True'}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: b, namespace: shop, labels: {of: both}},
 spec: {nodeName: two, serviceAccountName: b, containers: [{name: c}]},
 status: {phase: Running, podIPs: [{ip: 10.1.2.20}], conditions: [{type: Ready, status: 'True'}]}}",
        &[
            "e shop/both 10.1.2.20:80>80",
            "e shop/last 10.1.1.20:80>80",
            "f shop/a on one",
            "f shop/b on two",
            "t shop/a on one",
            "t shop/b on two",
            "w shop/a 10.1.1.20 meshed",
            "w shop/b 10.1.2.20 meshed",
        ],
    ),
    (
        "both families, by Services of both, and of one",
        "
{apiVersion: v1, kind: Service, metadata: {name: dual, namespace: shop},
 spec: {clusterIPs: [10.2.0.8, 'fd02::8'], ipFamilies: [IPv4, IPv6], selector: {app: a}, ports: [{port: 80}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: six, namespace: shop},
 spec: {clusterIPs: ['fd02::9'], ipFamilies: [IPv6], selector: {app: a}, ports: [{port: 80}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: a, namespace: shop, labels: {app: a}},
 spec: {nodeName: one, serviceAccountName: a, containers: [{name: c}]},
 status: {phase: Running, podIPs: [{ip: 10.1.1.20}, {ip: 'fd01:1::20'}]}}",
        &[
            "e shop/dual 10.1.1.20:80>80",
            "e shop/dual fd01:1::20:80>80",
            "e shop/six fd01:1::20:80>80",
            "f shop/a on one",
            "t shop/a on one",
            "w shop/a 10.1.1.20 fd01:1::20 meshed",
        ],
    ),
    (
        "several Services of one pod, at the same and at other ports",
        "
{apiVersion: v1, kind: Service, metadata: {name: x, namespace: shop},
 spec: {clusterIP: 10.2.0.7, selector: {app: a}, ports: [{port: 80, targetPort: 8080}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: y, namespace: shop},
 spec: {clusterIP: 10.2.0.8, selector: {app: a}, ports: [{port: 80, targetPort: 8080}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: z, namespace: shop},
 spec: {clusterIP: None, selector: {app: a}, ports: [{name: m, port: 9090}, {name: n, port: 9091, targetPort: 1}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: a, namespace: shop, labels: {app: a}},
 spec: {nodeName: one, serviceAccountName: a, containers: [{name: c}]},
 status: {phase: Running, podIPs: [{ip: 10.1.1.20}]}}",
        &[
            "e shop/x 10.1.1.20:80>8080",
            "e shop/y 10.1.1.20:80>8080",
            "e shop/z 10.1.1.20:9090>9090",
            "e shop/z 10.1.1.20:9091>1",
            "f shop/a on one",
            "t shop/a on one",
            "w shop/a 10.1.1.20 meshed",
        ],
    ),
    (
        // Whoever may use the node's network could else have certificates, or be taken for the node.
        "a pod of the host's network, which says that it is meshed",
        "
{apiVersion: v1, kind: Service, metadata: {name: host, namespace: shop},
 spec: {clusterIP: 10.2.0.9, selector: {app: a}, ports: [{port: 80}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: a, namespace: shop, labels: {app: a, weft.dev/mesh: enabled}},
 spec: {nodeName: one, hostNetwork: true, serviceAccountName: a, containers: [{name: c}]},
 status: {phase: Running, podIPs: [{ip: 192.0.2.1}]}}",
        &["e shop/host 192.0.2.1:80>80"],
    ),
    (
        "pods that have ended, one of whose addresses is another's now",
        "
{apiVersion: v1, kind: Service, metadata: {name: ended, namespace: shop},
 spec: {clusterIP: 10.2.0.9, publishNotReadyAddresses: true, selector: {app: a}, ports: [{port: 80}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: a, namespace: shop, labels: {app: a}},
 spec: {nodeName: one, serviceAccountName: a, containers: [{name: c}]},
 status: {phase: Succeeded, podIPs: [{ip: 10.1.1.20}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: b, namespace: shop, labels: {app: a}},
 spec: {nodeName: two, serviceAccountName: b, containers: [{name: c}]},
 status: {phase: Failed, podIPs: [{ip: 10.1.2.20}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: c, namespace: shop, labels: {app: c}},
 spec: {nodeName: one, serviceAccountName: c, containers: [{name: c}]},
 status: {phase: Running, podIPs: [{ip: 10.1.1.20}]}}",
        &[
            "f shop/c on one",
            "t shop/c on one",
            "w shop/c 10.1.1.20 meshed",
        ],
    ),
];

#[tokio::test(flavor = "multi_thread")]
async fn hard_pods() {
    let base = Stage::of(SHOP).await;
    base.controller.wait_complete().await;
    let base = told(&base.controller);
    for (what, further, expected) in CASES {
        let stage = Stage::of(&format!("{SHOP}\n---\n{further}")).await;
        stage.controller.wait_complete().await;
        let told = told(&stage.controller);
        let added: Vec<&str> = told.difference(&base).map(String::as_str).collect();
        assert_eq!(added, *expected, "{what}");
        assert!(base.is_subset(&told), "{what}: {told:?}");
        let problems = stage.controller.problems();
        assert!(problems.is_empty(), "{what}: {problems:?}");
    }
}

/// A StatefulSet's pod comes back under its name, elsewhere; its address, at another node, is somebody else's.
#[tokio::test(flavor = "multi_thread")]
async fn names_and_addresses_come_again() {
    let pod = |name: &str, node: &str, address: &str| {
        format!(
            "
{{apiVersion: v1, kind: Pod, metadata: {{name: {name}, namespace: shop, labels: {{app: a}}}},
 spec: {{nodeName: {node}, serviceAccountName: {name}, containers: [{{name: c}}]}},
 status: {{phase: Running, podIPs: [{{ip: {address}}}]}}}}"
        )
    };
    let service = "
---
{apiVersion: v1, kind: Service, metadata: {name: a, namespace: shop},
 spec: {clusterIP: None, selector: {app: a}, ports: [{port: 80}]}}";
    let stage = Stage::of(SHOP).await;
    stage.controller.wait_complete().await;
    let base = told(&stage.controller);
    let expect = |name: &str, node: &str, address: &str| {
        [
            format!("e shop/a {address}:80>80"),
            format!("f shop/{name} on {node}"),
            format!("t shop/{name} on {node}"),
            format!("w shop/{name} {address} meshed"),
        ]
    };
    let mut before = None;
    for (name, node, address) in [
        ("a", "one", "10.1.1.20"),
        // Under its name, elsewhere.
        ("a", "two", "10.1.2.20"),
        // Another one, at its address.
        ("b", "one", "10.1.2.20"),
    ] {
        if let Some(before) = before.replace(pod(name, node, address)) {
            stage.delete(&before);
        }
        stage.apply(&(pod(name, node, address) + service));
        stage.wait_same(name).await;
        let told = told(&stage.controller);
        let added: Vec<&String> = told.difference(&base).collect();
        assert_eq!(
            added,
            expect(name, node, address).iter().collect::<Vec<_>>()
        );
        let problems = stage.controller.problems();
        assert!(problems.is_empty(), "{problems:?}");
    }
}

/// What agents are told, as [`CASES`] has it.
fn told(controller: &Fed) -> BTreeSet<String> {
    let mut told = BTreeSet::new();
    for ((node, key), resource) in controller.world() {
        match resource {
            Resource::Endpoint(it) => {
                let (service, address) = (&it.name.service, it.name.address);
                told.extend(it.ports.iter().map(|port| {
                    let ports = format!("{}>{}", port.service_port, port.target_port);
                    format!("e {service} {address}:{ports}")
                }));
            }
            Resource::Workload(it) => {
                let addresses = it.addresses.iter().map(|it| format!(" {it}"));
                let addresses: String = addresses.collect();
                let meshed = match it.identity() {
                    Some(_) => "meshed",
                    None => "in the clear",
                };
                let owner = it.owner.map(|it| format!(", {} {}", it.kind, it.name));
                let owner = owner.unwrap_or_default();
                told.insert(format!("w {}{addresses} {meshed}{owner}", key.name));
            }
            Resource::NodePod(_) => {
                told.insert(format!("t {} on {node}", key.name));
            }
            _ => {}
        }
    }
    for account in ["shop/a", "shop/b", "shop/c", "shop/web"] {
        let nodes = ["one", "two"].into_iter();
        let nodes = nodes.filter(|it| controller.may_sign(it, account));
        told.extend(nodes.map(|it| format!("f {account} on {it}")));
    }
    told
}
