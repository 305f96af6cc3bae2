use super::*;

fn pod(name: &str, address: &str, more: &str) -> String {
    format!(
        "---
{{apiVersion: v1, kind: Pod, metadata: {{name: {name}, namespace: shop, labels: {{app: web}}}},
  spec: {{nodeName: one, containers: [{{name: c, ports: [{{name: http, containerPort: 8080}}]}}]}},
  status: {{podIPs: [{{ip: '{address}'}}], {more}}}}}
"
    )
}

fn service(spec: &str) -> String {
    format!(
        "---
{{apiVersion: v1, kind: Service, metadata: {{name: web, namespace: shop}},
  spec: {{selector: {{app: web}}, {spec}}}}}
"
    )
}

#[test]
fn endpoints_follow_readiness() {
    let ready = |status: &str| format!("conditions: [{{type: Ready, status: '{status}'}}]");
    for (status, publish, expected) in [
        (String::new(), false, true),
        ("phase: Running".to_owned(), false, true),
        ("phase: Pending".to_owned(), false, false),
        ("phase: Pending".to_owned(), true, true),
        (ready("True"), false, true),
        (ready("False"), false, false),
        (ready("Unknown"), false, false),
        (ready("False"), true, true),
        (
            "conditions: [{type: PodScheduled, status: 'True'}]".to_owned(),
            false,
            false,
        ),
        ("phase: Succeeded".to_owned(), true, false),
        ("phase: Failed".to_owned(), true, false),
    ] {
        let publishing = format!("publishNotReadyAddresses: {publish}, ports: [{{port: 80}}]");
        let cluster = Cluster::of(&(pod("a", "10.1.0.1", &status) + &service(&publishing)));
        let endpoints = cluster.endpoints();
        assert_eq!(!endpoints.is_empty(), expected, "{status} {publish}");
    }
    let leaving = pod("a", "10.1.0.1", "").replace(
        "namespace: shop",
        "namespace: shop, deletionTimestamp: '2026-01-01T00:00:00Z'",
    );
    let published = service("publishNotReadyAddresses: true, ports: [{port: 80}]");
    let cluster = Cluster::of(&(leaving.clone() + &published));
    assert_eq!(cluster.endpoints(), ["10.1.0.1:80>80"], "as slices have it");
    let cluster = Cluster::of(&(leaving + &service("ports: [{port: 80}]")));
    assert!(cluster.endpoints().is_empty());
    assert!(
        cluster.workload("shop/a").is_some(),
        "it is still reached by its address"
    );
}

#[test]
fn ports_go_where_they_are_said_to() {
    for (ports, expected) in [
        ("[{port: 80}]", vec!["10.1.0.1:80>80"]),
        ("[{port: 80, targetPort: 0}]", vec!["10.1.0.1:80>80"]),
        ("[{port: 80, targetPort: 8000}]", vec!["10.1.0.1:80>8000"]),
        ("[{port: 80, targetPort: http}]", vec!["10.1.0.1:80>8080"]),
        ("[{port: 80, targetPort: absent}]", vec![]),
        ("[{port: 53, protocol: UDP}]", vec![]),
        (
            "[{name: a, port: 80, targetPort: http}, {name: b, port: 81, targetPort: absent}, {name: c, port: 82}]",
            vec!["10.1.0.1:80>8080", "10.1.0.1:82>82"],
        ),
    ] {
        let cluster =
            Cluster::of(&(pod("a", "10.1.0.1", "") + &service(&format!("ports: {ports}"))));
        assert_eq!(cluster.endpoints(), expected, "{ports}");
    }
}

#[test]
fn services_say_what_clients_see() {
    let cluster = Cluster::of(&service(
        "clusterIPs: [10.2.0.1, 'fd02::1'], ports: [{name: http, port: 80, appProtocol: kubernetes.io/h2c},
         {name: dns, port: 53, protocol: UDP}]",
    ));
    let Some(Resource::Service(told)) = cluster.resource(Kind::Service, "shop/web") else {
        panic!("not told");
    };
    assert_eq!(told.addresses.len(), 2);
    assert_eq!(told.ports.len(), 1);
    assert_eq!(
        told.ports[0].app_protocol.as_deref(),
        Some("kubernetes.io/h2c")
    );
    for (spec, addresses) in [
        ("clusterIP: None, ports: [{port: 80}]", Some(0)),
        ("clusterIP: 10.2.0.1, ports: [{port: 80}]", Some(1)),
        ("type: ExternalName, externalName: example.com", None),
    ] {
        let cluster = Cluster::of(&service(spec));
        let told = match cluster.resource(Kind::Service, "shop/web") {
            Some(Resource::Service(it)) => Some(it.addresses.len()),
            _ => None,
        };
        assert_eq!(told, addresses, "{spec}");
    }
}

#[test]
fn invalid_services_stay_as_they_were() {
    let good = service("clusterIP: 10.2.0.1, ports: [{port: 80}]");
    let mut cluster = Cluster::of(&good);
    let told = cluster.told("one");
    for (bad, field) in [
        (good.replace("10.2.0.1", "127.0.0.1"), "spec.clusterIPs[0]"),
        (good.replace("port: 80", "port: 0"), "spec.ports[0].port"),
        (
            good.replace("port: 80", "port: 80, targetPort: 70000"),
            "spec.ports[0].targetPort",
        ),
        (
            good.replace("port: 80", "port: 80, name: A b"),
            "spec.ports[0].name",
        ),
    ] {
        cluster.apply(&bad);
        assert_eq!(cluster.told("one"), told);
        let problems = cluster.problems();
        assert!(
            problems[0].starts_with(&format!("{field}: ")),
            "{problems:?}"
        );
    }
}

/// A contested address is nobody's: agents are told of both claims. Age counts for nothing.
#[test]
fn an_address_of_two_services_is_reported() {
    let named = |name: &str| {
        service("clusterIP: 10.2.0.1, ports: [{port: 80}]")
            .replace("{name: web,", &format!("{{name: {name},"))
    };
    let with_address = |cluster: &Cluster| {
        let told = cluster.told("one").into_values().filter_map(|it| match it {
            Resource::Service(it) if !it.addresses.is_empty() => Some(it.name.to_string()),
            _ => None,
        });
        told.collect::<Vec<_>>()
    };
    let mut cluster = Cluster::of(&(named("a") + &named("b")));
    assert_eq!(with_address(&cluster), ["shop/a", "shop/b"]);
    assert_eq!(
        cluster.problems(),
        [
            "spec.clusterIPs: 10.2.0.1 is claimed by service shop/b too",
            "spec.clusterIPs: 10.2.0.1 is claimed by service shop/a too"
        ]
    );
    cluster.delete(&named("a"));
    assert_eq!(with_address(&cluster), ["shop/b"]);
    assert!(cluster.problems().is_empty());
}

#[test]
fn a_service_claims_addresses_of_services_only() {
    for address in ["10.1.0.1", "192.0.2.1", "2001:db8::1"] {
        let text = service(&format!(
            "clusterIPs: [10.2.0.1, '{address}'], ports: [{{port: 80}}]"
        ));
        let cluster = Cluster::of(&text);
        let told = cluster.told("one").into_values().find_map(|it| match it {
            Resource::Service(it) => Some(it.addresses),
            _ => None,
        });
        let expected: IpAddr = "10.2.0.1".parse().expect("valid");
        assert_eq!(told, Some(vec![expected]), "{address}");
        let reason = format!(
            "spec.clusterIPs: {address} lies outside of the ranges of Services: --service-range and ServiceCIDRs"
        );
        assert_eq!(cluster.problems(), [reason]);
    }
    let many: Vec<_> = (1..18).map(|it| format!("10.2.0.{it}")).collect();
    let many = service(&format!("clusterIPs: [{}]", many.join(", ")));
    let cluster = Cluster::of(&many);
    assert_eq!(
        cluster.problems(),
        ["spec.clusterIPs: 17 addresses, more than 16"]
    );
}

#[test]
fn endpoints_have_the_families_of_their_service() {
    let both =
        pod("a", "10.1.0.1", "").replace("{ip: '10.1.0.1'}", "{ip: 10.1.0.1}, {ip: 'fd01::1'}");
    for (spec, expected) in [
        ("clusterIP: 10.2.0.1", vec!["10.1.0.1:80>80"]),
        ("clusterIP: 'fd02::1'", vec!["fd01::1:80>80"]),
        (
            "clusterIPs: [10.2.0.1, 'fd02::1']",
            vec!["10.1.0.1:80>80", "fd01::1:80>80"],
        ),
        ("clusterIP: None", vec!["10.1.0.1:80>80", "fd01::1:80>80"]),
        (
            "clusterIP: None, ipFamilies: [IPv4]",
            vec!["10.1.0.1:80>80"],
        ),
    ] {
        let spec = format!("{spec}, ports: [{{port: 80}}]");
        let cluster = Cluster::of(&(both.clone() + &service(&spec)));
        assert_eq!(cluster.endpoints(), expected, "{spec}");
    }
}

#[test]
fn slices_replace_what_selectors_say() {
    let slice = "---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, namespace: shop, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
endpoints:
- {addresses: [10.1.0.7]}
- {addresses: [10.1.0.8], conditions: {ready: false}}
- {addresses: [10.1.0.9], conditions: {ready: false, serving: true, terminating: true}}
ports: [{name: http, port: 9090}, {name: other, port: 1}]
";
    let ports = "ports: [{name: http, port: 80, targetPort: http}, {name: admin, port: 81}]";
    let derived = ["10.1.0.1:80>8080", "10.1.0.1:81>81"];
    let mut cluster = Cluster::of(&(pod("a", "10.1.0.1", "") + &service(ports)));
    assert_eq!(cluster.endpoints(), derived);
    cluster.apply(slice);
    assert_eq!(cluster.endpoints(), ["10.1.0.7:80>9090"]);
    // The same address by both: what the slice says.
    cluster.apply(&slice.replace("10.1.0.7", "10.1.0.1"));
    assert_eq!(cluster.endpoints(), ["10.1.0.1:80>9090"]);
    // Of two slices, both count.
    let second = slice.replace("web-1", "web-2");
    cluster.apply(&second);
    assert_eq!(
        cluster.endpoints(),
        ["10.1.0.1:80>9090", "10.1.0.7:80>9090"]
    );
    cluster.apply(&second.replace("service-name: web", "service-name: else"));
    assert_eq!(cluster.endpoints(), ["10.1.0.1:80>9090"]);
    cluster.delete(slice);
    assert_eq!(cluster.endpoints(), derived);
}

#[test]
fn endpoints_go_with_pod_service_label_or_address() {
    let everything =
        pod("a", "10.1.0.1", "") + &pod("b", "10.1.0.2", "") + &service("ports: [{port: 80}]");
    let both = ["10.1.0.1:80>80", "10.1.0.2:80>80"];
    let mut cluster = Cluster::of(&everything);
    assert_eq!(cluster.endpoints(), both);
    cluster.delete(&pod("a", "10.1.0.1", ""));
    assert_eq!(cluster.endpoints(), both[1..]);
    cluster.apply(&everything);
    cluster.apply(&pod("a", "10.1.0.1", "").replace("app: web", "app: else"));
    assert_eq!(cluster.endpoints(), both[1..]);
    cluster.apply(&everything);
    cluster.apply(&pod("b", "10.1.0.3", ""));
    assert_eq!(cluster.endpoints(), ["10.1.0.1:80>80", "10.1.0.3:80>80"]);
    cluster.apply(
        &service("ports: [{port: 80}]").replace("selector: {app: web}", "selector: {app: x}"),
    );
    assert!(cluster.endpoints().is_empty());
    cluster.apply(&everything);
    cluster.delete(&service(""));
    assert!(cluster.endpoints().is_empty());
}

#[test]
fn pods_of_the_host_network_share_an_endpoint() {
    let host = |name: &str| {
        pod(name, "192.168.0.1", "").replace("nodeName: one", "nodeName: one, hostNetwork: true")
    };
    let mut cluster = Cluster::of(&(host("a") + &host("b") + &service("ports: [{port: 80}]")));
    assert_eq!(cluster.endpoints(), ["192.168.0.1:80>80"]);
    assert!(cluster.names("one", Kind::Workload).is_empty());
    cluster.delete(&host("a"));
    assert_eq!(cluster.endpoints(), ["192.168.0.1:80>80"]);
    cluster.delete(&host("b"));
    assert!(cluster.endpoints().is_empty());
}
