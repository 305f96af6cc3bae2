//! What is written on Services that nobody connects to.

use super::*;

const ANNOTATIONS: &str = "timeout.linkerd.io/request: 1s, weft.dev/retry-http: 5xx, \
    weft.dev/request-headers: enabled";
const ACCRUAL: &str = "balancer.linkerd.io/failure-accrual: consecutive, \
    balancer.linkerd.io/failure-accrual-consecutive-max-failures: '3'";

fn service(annotations: &str, spec: &str) -> String {
    format!(
        "---
{{apiVersion: v1, kind: Service, metadata: {{name: pods, namespace: shop, annotations: {{{annotations}}}}},
  spec: {{{spec}, ports: [{{port: 80}}]}}}}
"
    )
}

/// Another Service, with a route to this one.
fn route() -> String {
    "---
{apiVersion: v1, kind: Service, metadata: {name: web, namespace: shop},
  spec: {clusterIP: 10.2.0.1, ports: [{port: 80}]}}
---
{apiVersion: gateway.networking.k8s.io/v1, kind: HTTPRoute, metadata: {name: r, namespace: shop},
  spec: {parentRefs: [{group: '', kind: Service, name: web}],
    rules: [{backendRefs: [{name: pods, port: 80}]}]}}
"
    .to_owned()
}

/// The same by a ServiceProfile.
fn split() -> String {
    "---
{apiVersion: v1, kind: Service, metadata: {name: web, namespace: shop},
  spec: {clusterIP: 10.2.0.1, ports: [{port: 80}]}}
---
{apiVersion: linkerd.io/v1alpha2, kind: ServiceProfile,
  metadata: {name: web.shop.svc.cluster.local, namespace: shop},
  spec: {dstOverrides: [{authority: 'pods.shop.svc.cluster.local:80', weight: 1}]}}
"
    .to_owned()
}

fn idle(cluster: &Cluster) -> Vec<String> {
    let problems = cluster.problems.list().into_iter();
    let idle = problems.filter(|it| it.effect == "it has no effect");
    idle.map(|it| {
        let field = it.field.trim_start_matches("metadata.annotations");
        format!("{field}: {}", it.reason)
    })
    .collect()
}

#[test]
fn terms_of_a_service_that_is_no_address_are_reported() {
    const HEADLESS: &str = "clusterIP: None";
    for (spec, reason) in [
        ("clusterIP: 10.2.0.7", None),
        (
            HEADLESS,
            Some("has no address of its own: its clients connect to its pods"),
        ),
        (
            "type: ExternalName, externalName: example.com",
            Some("only stands for a name of DNS"),
        ),
    ] {
        let mut cluster = Cluster::of(&service(ANNOTATIONS, spec));
        let names = [
            "timeout.linkerd.io/request",
            "weft.dev/retry-http",
            "weft.dev/request-headers",
        ];
        let said =
            names.map(|it| reason.map(|reason| format!("[{it:?}]: Service shop/pods {reason}")));
        let said: Vec<String> = said.into_iter().flatten().collect();
        assert_eq!(idle(&cluster), said, "{spec}");
        // A route to it has its own.
        cluster.apply(&route());
        assert_eq!(idle(&cluster), said, "{spec}");
        cluster.apply(&service("", spec));
        assert_eq!(idle(&cluster), [""; 0], "{spec}");
        cluster.apply(&service(ANNOTATIONS, HEADLESS));
        assert_eq!(idle(&cluster).len(), 3);
        cluster.delete(&service(ANNOTATIONS, HEADLESS));
        assert_eq!(idle(&cluster), [""; 0], "{spec}");
    }
}

/// Its endpoints are balanced by agents where something leads to it.
#[test]
fn accrual_has_an_effect_where_routes_lead() {
    let headless = service(ACCRUAL, "clusterIP: None");
    let external = service(ACCRUAL, "type: ExternalName, externalName: example.com");
    for leading in [route(), split()] {
        let mut cluster = Cluster::of(&headless);
        assert_eq!(idle(&cluster).len(), 2, "{:?}", idle(&cluster));
        cluster.apply(&leading);
        assert_eq!(idle(&cluster), [""; 0], "{leading}");
        cluster.delete(&leading);
        assert_eq!(idle(&cluster).len(), 2, "{leading}");
        // In whichever order they come.
        let mut cluster = Cluster::of(&(leading.clone() + &headless));
        assert_eq!(idle(&cluster), [""; 0], "{leading}");
        cluster.apply(&external);
        assert_eq!(idle(&cluster).len(), 2, "{leading}");
    }
}

#[test]
fn a_profile_of_a_service_that_is_no_address_is_reported() {
    let profile = "---
{apiVersion: linkerd.io/v1alpha2, kind: ServiceProfile,
  metadata: {name: pods.shop.svc.cluster.local, namespace: shop}, spec: {routes: []}}
";
    let mut cluster = Cluster::of(&(service("", "clusterIP: None") + profile));
    let said = [
        "metadata.name: Service shop/pods has no address of its own: its clients connect to its pods",
    ];
    assert_eq!(cluster.problems(), said);
    cluster.apply(&service("", "clusterIP: 10.2.0.7"));
    assert_eq!(cluster.problems(), [""; 0]);
}
