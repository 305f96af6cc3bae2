//! ServiceProfiles, and what agents are told of them.

use std::time::Duration;

use weft_core::route::{Profile, Target};

use super::*;

const SERVICES: &str = "
{apiVersion: v1, kind: Service, metadata: {name: web, namespace: shop},
  spec: {clusterIP: 10.2.0.1, ports: [{port: 80}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: v2, namespace: shop},
  spec: {clusterIP: 10.2.0.2, ports: [{port: 80}]}}
";

fn profile(namespace: &str, spec: &str) -> String {
    format!(
        "---
{{apiVersion: linkerd.io/v1alpha2, kind: ServiceProfile,
  metadata: {{name: web.shop.svc.cluster.local, namespace: {namespace}}}, spec: {{{spec}}}}}
"
    )
}

fn route(rest: &str) -> String {
    format!("routes: [{{name: r, condition: {{pathRegex: '/a'}}, {rest}}}]")
}

impl Cluster {
    fn profiles(&self) -> Vec<Profile> {
        let table = self.table("shop/web:80");
        table.map(|it| it.profiles().to_vec()).unwrap_or_default()
    }
}

/// (a route) -> request timeout in ms; statuses and budget of retries
#[test]
fn routes_say_how_long_and_what_is_sent_again() {
    for (rest, timeout, retry) in [
        ("", None, None),
        ("timeout: 250ms", Some(250), None),
        ("timeout: 0s", None, None),
        ("isRetryable: false", None, None),
        ("isRetryable: true", None, Some("500-599")),
        (
            "isRetryable: true, responseClasses: [{condition: {status: {min: 500, max: 500}}, isFailure: false},
              {condition: {any: [{status: {min: 429, max: 429}}, {status: {min: 590}}]}, isFailure: true}]",
            None,
            Some("429,501-599"),
        ),
        (
            "isRetryable: true, responseClasses: [{condition: {not: {status: {max: 502}}}}]",
            None,
            Some("500-502"),
        ),
    ] {
        let cluster = Cluster::of(&(SERVICES.to_owned() + &profile("shop", &route(rest))));
        assert_eq!(cluster.problems(), [""; 0], "{rest}");
        let profiles = cluster.profiles();
        let said = &profiles[0].routes[0].reliability;
        assert_eq!(said.timeouts.request, timeout.map(Duration::from_millis), "{rest}");
        let statuses = said.retry.as_ref().map(|it| {
            let ranges: Vec<String> = it.http.iter().map(ToString::to_string).collect();
            ranges.join(",")
        });
        assert_eq!(statuses.as_deref(), retry, "{rest}");
    }
}

#[test]
fn the_budget_and_the_split_are_those_of_the_profile() {
    let spec = "retryBudget: {retryRatio: 0.5, minRetriesPerSecond: 3, ttl: 20s},
        dstOverrides: [{authority: 'web.shop.svc.cluster.local:80', weight: 900m},
          {authority: v2.shop.svc.cluster.local.:80, weight: '0.1'},
          {authority: absent.shop.svc.cluster.local:80, weight: 0}],"
        .to_owned()
        + &route("isRetryable: true");
    let cluster = Cluster::of(&(SERVICES.to_owned() + &profile("shop", &spec)));
    let profiles = cluster.profiles();
    let retry = profiles[0].routes[0]
        .reliability
        .retry
        .as_ref()
        .expect("a retry");
    assert_eq!(retry.budget.ratio_thousandths, 500);
    assert_eq!(
        (retry.budget.per_second, retry.budget.ttl),
        (3, Duration::from_secs(20))
    );
    let backends = profiles[0].backends.iter();
    let backends = backends.map(|it| (it.weight, matches!(it.target, Target::Service { .. })));
    let backends: Vec<_> = backends.collect();
    assert_eq!(backends, [(900, true), (100, true), (0, false)]);
    let problems = cluster.problems();
    assert!(
        problems[0].starts_with("spec.dstOverrides[2].authority: "),
        "{problems:?}"
    );
}

#[test]
fn routes_come_before_profiles() {
    let route_of = |namespace: &str| {
        format!(
            "---
{{apiVersion: gateway.networking.k8s.io/v1, kind: HTTPRoute, metadata: {{name: r, namespace: {namespace}}},
  spec: {{parentRefs: [{{group: '', kind: Service, name: web, namespace: shop}}],
    rules: [{{backendRefs: [{{name: web, namespace: shop, port: 80}}]}}]}}}}
"
        )
    };
    let of_both = profile("shop", &route("")) + &profile("far", &route(""));
    let mut cluster = Cluster::of(&(SERVICES.to_owned() + &of_both));
    let namespaces = |it: &Cluster| -> Vec<String> {
        it.profiles()
            .iter()
            .map(|it| it.namespace.to_string())
            .collect()
    };
    assert_eq!(namespaces(&cluster), ["far", "shop"]);
    cluster.apply(&route_of("shop"));
    assert_eq!(namespaces(&cluster), ["far"]);
    let problems = cluster.problems();
    assert!(problems[0].contains("which come before"), "{problems:?}");
    cluster.delete(&route_of("shop"));
    assert_eq!(namespaces(&cluster), ["far", "shop"]);
    assert!(cluster.problems().is_empty());
    cluster.delete(&of_both);
    assert!(cluster.table("shop/web:80").is_none());
}

#[test]
fn what_cannot_be_used_changes_nothing() {
    let good = profile("shop", &route("timeout: 1s"));
    for (spec, field) in [
        (route("timeout: soon"), "spec.routes[0].timeout"),
        (route("retries: 3"), "spec.routes[0].retries"),
        (
            "routes: [{name: r, condition: {}}]".to_owned(),
            "spec.routes[0].condition",
        ),
        (
            "routes: [{name: r, condition: {not: {pathRegex: '('}}}]".to_owned(),
            "spec.routes[0].condition.not.pathRegex",
        ),
        (
            "routes: [{name: r, condition: {method: 'G T'}}]".to_owned(),
            "spec.routes[0].condition.method",
        ),
        (
            route("responseClasses: [{condition: {status: {min: 600}}}]"),
            "spec.routes[0].responseClasses[0].condition.status",
        ),
        (
            "retryBudget: {retryRatio: -1, minRetriesPerSecond: 1, ttl: 10s}".to_owned(),
            "spec.retryBudget.retryRatio",
        ),
        (
            "retryBudget: {retryRatio: 1, minRetriesPerSecond: 1, ttl: 10m}".to_owned(),
            "spec.retryBudget.ttl",
        ),
        (
            "dstOverrides: [{authority: web, weight: 1}]".to_owned(),
            "spec.dstOverrides[0].authority",
        ),
        (
            "dstOverrides: [{authority: web.shop.svc, weight: much}]".to_owned(),
            "spec.dstOverrides[0].weight",
        ),
    ] {
        let mut cluster = Cluster::of(&(SERVICES.to_owned() + &good));
        let told = cluster.told("one");
        cluster.apply(&profile("shop", &spec));
        assert_eq!(cluster.told("one"), told, "{spec}");
        let problems = cluster.problems();
        assert!(
            problems[0].starts_with(&format!("{field}: ")),
            "{spec}: {problems:?}"
        );
    }
}
