//! Endpoints by EndpointSlices: who serves, and who waits for a pod.

use super::*;

fn service(spec: &str) -> String {
    format!(
        "---
{{apiVersion: v1, kind: Service, metadata: {{name: web, namespace: shop}},
  spec: {{selector: {{app: web}}, ports: [{{name: http, port: 80}}, {{name: admin, port: 81}}], {spec}}}}}
"
    )
}

/// A slice with ports as `name: number`.
fn slice(name: &str, ports: &[(&str, u16)], endpoints: &[&str]) -> String {
    let ports = ports.iter();
    let ports = ports.map(|(name, port)| format!("{{name: {name}, port: {port}}}"));
    format!(
        "---
{{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, addressType: IPv4,
  metadata: {{name: {name}, namespace: shop, labels: {{kubernetes.io/service-name: web}}}},
  endpoints: [{}], ports: [{}]}}
",
        endpoints.join(", "),
        ports.collect::<Vec<_>>().join(", "),
    )
}

const HTTP: &[(&str, u16)] = &[("http", 9090)];
const ADMIN: &[(&str, u16)] = &[("admin", 9091)];
const BOTH: &[(&str, u16)] = &[("http", 9090), ("admin", 9091)];

const STAYS: &str =
    "{addresses: [10.1.0.1], nodeName: one, conditions: {ready: true, serving: true}}";
const LEAVES: &str = "{addresses: [10.1.0.2], nodeName: two, \
    conditions: {ready: false, serving: true, terminating: true}}";
const FAILS: &str = "{addresses: [10.1.0.3], nodeName: one, \
    conditions: {ready: false, serving: false, terminating: true}}";
/// As it is written where addresses are published that are not ready.
const PUBLISHED: &str = "{addresses: [10.1.0.4], nodeName: one, \
    conditions: {ready: true, serving: false, terminating: true}}";
const LEAVES_TOO: &str = "{addresses: ['fd01::2'], nodeName: one, \
    conditions: {ready: false, serving: true, terminating: true}}";

/// As kube-proxy does: the last pod of a Service serves until it ends; for each port and family, and on each node where
/// clients use those of their own.
#[test]
fn who_is_terminating_serves_if_nobody_else_does() {
    let all = |endpoints: &[&str]| slice("web-1", HTTP, endpoints);
    for (spec, slices, expected) in [
        ("", all(&[STAYS, LEAVES, FAILS]), vec!["10.1.0.1:80>9090"]),
        ("", all(&[LEAVES, FAILS]), vec!["10.1.0.2:80>9090"]),
        ("", all(&[FAILS]), vec![]),
        ("", all(&[PUBLISHED]), vec!["10.1.0.4:80>9090"]),
        // Ready is ready, terminating or not.
        (
            "publishNotReadyAddresses: true",
            all(&[PUBLISHED, STAYS, LEAVES]),
            vec!["10.1.0.1:80>9090", "10.1.0.4:80>9090"],
        ),
        (
            "",
            all(&[STAYS, LEAVES]) + &slice("web-6", HTTP, &[LEAVES_TOO]),
            vec!["10.1.0.1:80>9090", "fd01::2:80>9090"],
        ),
        // Nobody else has the other port.
        (
            "",
            slice("web-1", HTTP, &[STAYS]) + &slice("web-2", BOTH, &[LEAVES]),
            vec!["10.1.0.1:80>9090", "10.1.0.2:81>9091"],
        ),
        // It is the last one of its node.
        (
            "internalTrafficPolicy: Local",
            all(&[STAYS, LEAVES]),
            vec!["10.1.0.1:80>9090", "10.1.0.2:80>9090"],
        ),
        (
            "internalTrafficPolicy: Local",
            all(&[STAYS, &LEAVES.replace("two", "one")]),
            vec!["10.1.0.1:80>9090"],
        ),
        // Of two slices, one may be older: who stays by one, stays.
        (
            "",
            all(&[&LEAVES.replace("0.2", "0.1")]) + &slice("web-2", HTTP, &[STAYS, LEAVES]),
            vec!["10.1.0.1:80>9090"],
        ),
        (
            "",
            slice("web-1", ADMIN, &[&LEAVES.replace("0.2", "0.1")])
                + &slice("web-2", HTTP, &[STAYS, LEAVES]),
            vec!["10.1.0.1:80>9090", "10.1.0.1:81>9091"],
        ),
    ] {
        let cluster = Cluster::of(&(service(spec) + &slices));
        assert_eq!(cluster.endpoints(), expected, "{spec} {slices}");
    }
}

fn pod(name: &str, uid: &str, spec: &str, addresses: &str) -> String {
    format!(
        "---
{{apiVersion: v1, kind: Pod, metadata: {{name: {name}, namespace: shop, uid: {uid}}},
  spec: {{nodeName: one, {spec}}}, status: {{podIPs: [{addresses}]}}}}
"
    )
}

fn endpoint_of(address: &str, reference: &str) -> String {
    format!("{{addresses: [{address}], targetRef: {{kind: Pod, {reference}}}}}")
}

/// An agent that knew the endpoint and not the workload would speak to it in the clear.
#[test]
fn an_endpoint_waits_for_its_pod() {
    let address = "{ip: 192.0.2.7}";
    let told = vec!["192.0.2.7:80>9090"];
    let web = pod("web-0", "u1", "", address);
    for (reference, pods, expected, reason) in [
        (
            "name: web-0",
            String::new(),
            vec![],
            "no pod shop/web-0 is known",
        ),
        ("name: web-0", web.clone(), told.clone(), ""),
        (
            "name: web-0, namespace: shop, uid: u1",
            web.clone(),
            told.clone(),
            "",
        ),
        (
            "name: web-0, uid: u2",
            web.clone(),
            vec![],
            "the pod shop/web-0 that is known is another one",
        ),
        (
            "name: web-0, namespace: other",
            web.clone(),
            vec![],
            "no pod other/web-0 is known",
        ),
        (
            "name: web-0",
            pod("web-0", "u1", "", ""),
            vec![],
            "pod shop/web-0 is not known to have it",
        ),
        (
            "name: web-0",
            web.replace("podIPs", "phase: Succeeded, podIPs"),
            vec![],
            "pod shop/web-0 is not known to have it",
        ),
        // No record is to be waited for.
        (
            "name: web-0",
            pod("web-0", "u1", "hostNetwork: true", ""),
            told.clone(),
            "",
        ),
    ] {
        let slice = slice("web-1", HTTP, &[&endpoint_of("192.0.2.7", reference)]);
        let base = service("") + &slice;
        let mut cluster = Cluster::of(&(base.clone() + &pods));
        assert_eq!(cluster.endpoints(), expected, "{reference} {pods}");
        let problems = cluster.problems();
        let found = problems
            .iter()
            .any(|it| it.contains(&format!("192.0.2.7: {reason}")));
        assert_eq!(found, !reason.is_empty(), "{problems:?}");
        assert_eq!(
            cluster.must_have_record("192.0.2.7"),
            !reason.is_empty() || !pods.contains("host")
        );
        // In the other order it is the same.
        let mut other = Cluster::of(&pods);
        other.apply(&base);
        assert_eq!(other.told("one"), cluster.told("one"), "{reference} {pods}");
        cluster.apply(&web);
        cluster.delete(&web);
        assert!(cluster.endpoints().is_empty());
        assert!(cluster.must_have_record("192.0.2.7"));
        cluster.delete(&slice);
        assert!(!cluster.must_have_record("192.0.2.7"));
        assert!(cluster.problems().is_empty());
    }
    let nameless = slice(
        "web-1",
        HTTP,
        &["{addresses: [10.1.0.1], targetRef: {kind: Pod}}"],
    );
    let cluster = Cluster::of(&(service("") + &nameless));
    assert!(cluster.endpoints().is_empty());
    assert!(cluster.problems()[0].starts_with("endpoints[0].targetRef.name: "));
}

/// It is the cluster's for agents, and no network that policies let in: anybody may write a slice.
#[test]
fn what_is_said_to_be_a_pods_is_none_of_the_clusters_networks() {
    let slice = slice("web-1", HTTP, &[&endpoint_of("192.0.2.7", "name: nobody")]);
    let cluster = Cluster::of(&slice);
    assert!(cluster.must_have_record("192.0.2.7"));
    let address = "192.0.2.7".parse().expect("valid");
    assert!(!cluster.settings().is_pod_range(address));
}
