//! The cluster's addresses.

use super::*;

fn pod(name: &str, address: &str, spec: &str) -> String {
    format!(
        "---
{{apiVersion: v1, kind: Pod, metadata: {{name: {name}, namespace: shop}},
  spec: {{nodeName: one, {spec}}}, status: {{podIPs: [{{ip: '{address}'}}]}}}}
"
    )
}

fn node(name: &str, ranges: &str) -> String {
    format!(
        "---
{{apiVersion: v1, kind: Node, metadata: {{name: {name}}}, spec: {{podCIDRs: [{ranges}]}}}}
"
    )
}

fn ranges(cluster: &Cluster) -> Vec<String> {
    let settings = cluster.settings();
    settings
        .pod_ranges
        .iter()
        .map(ToString::to_string)
        .collect()
}

#[test]
fn ranges_of_nodes_count() {
    let mut cluster = Cluster::of(
        "{apiVersion: v1, kind: Node, metadata: {name: one},
          spec: {podCIDR: 10.3.0.0/24, podCIDRs: [10.3.0.0/24, 'fd00::/64']}}",
    );
    assert_eq!(
        ranges(&cluster),
        ["10.1.0.0/16", "10.3.0.0/24", "fd00::/64"]
    );
    cluster.delete(&node("one", ""));
    assert_eq!(ranges(&cluster), ["10.1.0.0/16"]);
}

/// As where a CNI hands out addresses by itself.
#[test]
fn a_pod_elsewhere_is_told_and_reported() {
    let mut cluster = Cluster::of(&(node("one", "10.3.0.0/24") + &pod("a", "10.1.0.1", "")));
    assert!(cluster.problems().is_empty());
    cluster.apply(&(pod("b", "192.168.7.2", "") + &pod("c", "192.168.7.3", "")));
    let reported = |pod: &str, address: &str| {
        [format!(
            "--pod-range: pod shop/{pod} has {address}, which is in no range: not in one of --pod-range, nor in \
             spec.podCIDRs of a Node"
        )]
    };
    let elsewhere = ["10.1.0.0/16", "10.3.0.0/24", "192.168.7.2/31"];
    assert_eq!(ranges(&cluster), elsewhere);
    assert_eq!(cluster.problems(), reported("b", "192.168.7.2"));
    // The same is shown as long as it is one: a problem that changes is another line in the log.
    cluster.apply(&pod("a0", "192.168.7.1", ""));
    assert_eq!(cluster.problems(), reported("b", "192.168.7.2"));
    cluster.delete(&(pod("b", "", "") + &pod("a0", "", "")));
    assert_eq!(ranges(&cluster)[2..], ["192.168.7.3/32"]);
    assert_eq!(cluster.problems(), reported("c", "192.168.7.3"));
    // A Node has its range after all, and takes it along.
    cluster.apply(&node("two", "192.168.7.0/24"));
    assert_eq!(ranges(&cluster)[2..], ["192.168.7.0/24"]);
    assert!(cluster.problems().is_empty());
    cluster.apply(&node("two", "192.168.8.0/24"));
    assert_eq!(ranges(&cluster)[2..], ["192.168.7.3/32", "192.168.8.0/24"]);
    cluster.delete(&pod("c", "", ""));
    assert!(cluster.problems().is_empty());
}

#[test]
fn some_addresses_are_no_pods_own() {
    for (spec, status) in [
        ("hostNetwork: true", ""),
        ("", "phase: Succeeded, "),
        ("nodeName: ''", ""),
    ] {
        let pod = pod("a", "192.168.7.2", spec);
        let pod = match spec {
            "nodeName: ''" => pod.replace("nodeName: one, ", ""),
            _ => pod.replace("podIPs", &format!("{status}podIPs")),
        };
        let cluster = Cluster::of(&pod);
        assert_eq!(ranges(&cluster), ["10.1.0.0/16"], "{pod}");
        let problems = cluster.problems();
        assert!(!problems.iter().any(|it| it.contains("--pod-range")));
    }
}

/// What slices say of a node's own address is known: its pods have no records.
#[test]
fn a_nodes_address_waits_for_no_pod() {
    let slice = "---
{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, addressType: IPv4,
  metadata: {name: web-1, namespace: shop, labels: {kubernetes.io/service-name: web}},
  endpoints: [{addresses: [192.0.2.1], targetRef: {kind: Pod, name: late}}], ports: [{port: 80}]}
";
    let agent = pod("agent", "192.0.2.1", "hostNetwork: true");
    let mut cluster = Cluster::of(slice);
    assert!(cluster.must_have_record("192.0.2.1"));
    cluster.apply(&agent);
    assert!(!cluster.must_have_record("192.0.2.1"));
    cluster.delete(&agent);
    assert!(cluster.must_have_record("192.0.2.1"));
}

fn cidr(name: &str, ranges: &str) -> String {
    format!(
        "---
{{apiVersion: networking.k8s.io/v1, kind: ServiceCIDR, metadata: {{name: {name}}}, spec: {{cidrs: [{ranges}]}}}}
"
    )
}

/// What the API server gives Services addresses from is theirs, beside what the flags say.
#[test]
fn ranges_of_service_cidrs_count() {
    let service = "---
{apiVersion: v1, kind: Service, metadata: {name: web, namespace: shop}, spec: {clusterIP: 10.9.0.1, ports: [{port: 80}]}}
";
    let mut cluster = Cluster::of(&(service.to_owned() + &pod("a", "10.1.0.9", "")));
    let services = |cluster: &Cluster| {
        let ranges = cluster.settings().service_ranges;
        ranges.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    let flags = ["10.2.0.0/16", "fd02::/112"];
    let outside = [
        "spec.clusterIPs: 10.9.0.1 lies outside of the ranges of Services: --service-range and ServiceCIDRs",
    ];
    assert_eq!(services(&cluster), flags);
    assert_eq!(cluster.problems(), outside);
    cluster.apply(&cidr("more", "10.9.0.0/24"));
    assert_eq!(
        services(&cluster),
        ["10.2.0.0/16", "10.9.0.0/24", "fd02::/112"]
    );
    assert!(cluster.problems().is_empty());
    // What a pod had is a Service's now.
    cluster.apply(&cidr("odd", "10.1.0.8/30"));
    let problems = cluster.problems();
    let of_pod = "status.podIPs: 10.1.0.9 lies in the range of Services".to_owned();
    assert!(problems.contains(&of_pod), "{problems:?}");
    assert!(cluster.workload("shop/a").is_none());
    cluster.delete(&cidr("odd", ""));
    assert!(cluster.workload("shop/a").is_some());
    // A mistake changes nothing.
    cluster.apply(&cidr("more", "10.9.0.0/24, nonsense"));
    assert!(cluster.problems()[0].starts_with("spec.cidrs[1]: "));
    assert_eq!(services(&cluster).len(), 3);
    cluster.delete(&cidr("more", ""));
    assert_eq!(services(&cluster), flags);
    assert_eq!(cluster.problems(), outside);
}
