//! Where endpoints are, whom they are meant for, and how much they take.

use weft_core::{Endpoint, FailureAccrual, InternalTraffic, Service};

use super::*;

fn node(name: &str, zone: &str) -> String {
    let zone = match zone {
        "" => String::new(),
        zone => format!(", labels: {{topology.kubernetes.io/zone: {zone}}}"),
    };
    format!(
        "---
{{apiVersion: v1, kind: Node, metadata: {{name: {name}{zone}}}}}
"
    )
}

fn pod(name: &str, node: &str, address: &str, annotations: &str) -> String {
    format!(
        "---
{{apiVersion: v1, kind: Pod,
  metadata: {{name: {name}, namespace: shop, labels: {{app: web, weft.dev/mesh: enabled}},
    annotations: {{{annotations}}}}},
  spec: {{nodeName: {node}}}, status: {{podIPs: [{{ip: '{address}'}}]}}}}
"
    )
}

fn service(spec: &str) -> String {
    format!(
        "---
{{apiVersion: v1, kind: Service, metadata: {{name: web, namespace: shop}},
  spec: {{clusterIP: 10.2.0.1, selector: {{app: web}}, ports: [{{port: 80}}]{spec}}}}}
"
    )
}

fn slice(endpoints: &str) -> String {
    format!(
        "---
{{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, addressType: IPv4,
  metadata: {{name: web-1, namespace: shop, labels: {{kubernetes.io/service-name: web}}}},
  ports: [{{port: 8080}}], endpoints: [{endpoints}]}}
"
    )
}

fn two_pods() -> String {
    node("one", "east")
        + &node("two", "west")
        + &pod("a", "one", "10.1.0.1", "")
        + &pod("b", "two", "10.1.0.2", "")
}

fn endpoints(cluster: &Cluster) -> Vec<Endpoint> {
    let told = cluster.told("one").into_values();
    told.filter_map(|it| match it {
        Resource::Endpoint(it) => Some(it),
        _ => None,
    })
    .collect()
}

/// Node, nodes and zones that it is for.
fn places(cluster: &Cluster) -> Vec<String> {
    let shown = |it: Endpoint| {
        let node = it.place.node.map_or_else(String::new, |it| it.to_string());
        let nodes: Vec<String> = it.place.for_nodes.iter().map(ToString::to_string).collect();
        format!(
            "{node}|{}|{}",
            nodes.join(","),
            it.place.for_zones.join(",")
        )
    };
    endpoints(cluster).into_iter().map(shown).collect()
}

fn told_service(cluster: &Cluster) -> Service {
    match cluster.resource(Kind::Service, "shop/web") {
        Some(Resource::Service(it)) => it,
        other => panic!("{other:?}"),
    }
}

#[test]
fn pods_have_the_hints_that_they_would_have_in_slices() {
    for (spec, expected) in [
        ("", ["||", "||"]),
        (", trafficDistribution: PreferClose", ["||east", "||west"]),
        (
            ", trafficDistribution: PreferSameZone",
            ["||east", "||west"],
        ),
        (
            ", trafficDistribution: PreferSameNode",
            ["|one|east", "|two|west"],
        ),
        (", internalTrafficPolicy: Local", ["one||", "two||"]),
        (", internalTrafficPolicy: Cluster", ["||", "||"]),
    ] {
        let cluster = Cluster::of(&(two_pods() + &service(spec)));
        assert_eq!(places(&cluster), expected, "{spec}");
        let local = told_service(&cluster).internal_traffic == InternalTraffic::Local;
        assert_eq!(local, spec.contains("Local"));
    }
    let unknown = ", trafficDistribution: Nearby, internalTrafficPolicy: Nearby";
    let cluster = Cluster::of(&(two_pods() + &service(unknown)));
    assert_eq!(places(&cluster), ["||", "||"]);
    assert_eq!(cluster.problems().len(), 2, "{:?}", cluster.problems());
}

#[test]
fn zones_are_allocated_by_slices_where_the_mode_is_auto() {
    let service = service(", trafficDistribution: PreferClose").replace(
        "name: web, namespace: shop",
        "name: web, namespace: shop, annotations: {service.kubernetes.io/topology-mode: Auto}",
    );
    let mut cluster = Cluster::of(&(two_pods() + &service));
    assert_eq!(places(&cluster), ["||", "||"]);
    cluster.apply(&slice(
        "{addresses: [10.1.0.1], nodeName: one, hints: {forZones: [{name: west}]}},
         {addresses: [10.1.0.2], nodeName: two, hints: {forZones: [{name: east}]}}",
    ));
    assert_eq!(places(&cluster), ["||west", "||east"]);
}

#[test]
fn a_node_that_gets_a_zone_changes_its_pods_and_their_endpoints() {
    let manifests = two_pods() + &service(", trafficDistribution: PreferClose");
    let mut cluster = Cluster::of(&manifests);
    let zone = |cluster: &Cluster| cluster.node_pod("shop/a").expect("told").zone;
    assert_eq!(zone(&cluster).as_deref(), Some("east"));
    cluster.apply(&node("one", "north"));
    assert_eq!(zone(&cluster).as_deref(), Some("north"));
    assert_eq!(places(&cluster), ["||north", "||west"]);
    cluster.apply(&node("one", ""));
    assert_eq!(zone(&cluster), None);
    assert_eq!(places(&cluster), ["||", "||west"]);
    cluster.delete(&node("two", ""));
    assert_eq!(places(&cluster), ["||", "||"]);
}

#[test]
fn slices_say_where_endpoints_are() {
    let listed = "{addresses: [10.1.0.1], nodeName: one, zone: east,
        hints: {forZones: [{name: east}, {name: west}], forNodes: [{name: one}]}},
        {addresses: [10.1.0.2]}";
    let cluster = Cluster::of(&(two_pods() + &service("") + &slice(listed)));
    assert_eq!(places(&cluster), ["|one|east,west", "||"]);
    let local = service(", internalTrafficPolicy: Local");
    let cluster = Cluster::of(&(two_pods() + &local + &slice(listed)));
    assert_eq!(places(&cluster), ["one|one|east,west", "||"]);
}

#[test]
fn weights_are_what_pods_say() {
    let weighted = |weight: &str| {
        let annotation = format!("weft.dev/weight: '{weight}'");
        pod("a", "one", "10.1.0.1", &annotation)
    };
    let weights = |cluster: &Cluster| -> Vec<u16> {
        let endpoints = endpoints(cluster).into_iter();
        endpoints.map(|it| it.weight.percent()).collect()
    };
    let mut cluster = Cluster::of(&(two_pods() + &service("")));
    assert_eq!(weights(&cluster), [100, 100]);
    cluster.apply(&weighted("50"));
    assert_eq!(weights(&cluster), [50, 100]);
    for bad in ["0", "10001", "-1", "half"] {
        cluster.apply(&weighted(bad));
        assert_eq!(weights(&cluster), [100, 100], "{bad}");
        assert_eq!(cluster.problems().len(), 1, "{bad}");
    }
    cluster.apply(&weighted("10000"));
    // Of slices, too.
    cluster.apply(&slice(
        "{addresses: [10.1.0.1], targetRef: {kind: Pod, name: a}}, {addresses: [10.1.0.9]}",
    ));
    assert_eq!(weights(&cluster), [10_000, 100]);
    cluster.apply(&weighted("20"));
    assert_eq!(weights(&cluster), [20, 100]);
}

#[test]
fn failure_accrual_is_what_the_service_says() {
    let annotated = |annotations: &str| {
        let metadata = format!("name: web, namespace: shop, annotations: {{{annotations}}}");
        service("").replace("name: web, namespace: shop", &metadata)
    };
    let mut cluster = Cluster::of(&service(""));
    assert_eq!(told_service(&cluster).failure_accrual, None);
    cluster.apply(&annotated(
        "balancer.linkerd.io/failure-accrual: consecutive",
    ));
    let default = Some(FailureAccrual::default());
    assert_eq!(told_service(&cluster).failure_accrual, default);
    cluster.apply(&annotated("weft.dev/failure-accrual: perhaps"));
    assert_eq!(told_service(&cluster).failure_accrual, default);
    assert_eq!(cluster.problems().len(), 1);
}
