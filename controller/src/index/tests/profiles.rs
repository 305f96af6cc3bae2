//! ServiceProfiles, and what agents are told of them.

use std::time::Duration;

use weft_core::route::{Profile, StatusRange, Target};

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

/// (a route) -> request timeout in ms; statuses of retries; those that count as failures, and as none
#[test]
fn routes_say_how_long_and_what_is_sent_again() {
    for (rest, timeout, retry, classes) in [
        ("", None, None, None),
        ("timeout: 250ms", Some(250), None, None),
        ("timeout: 0s", None, None, None),
        ("isRetryable: false", None, None, None),
        ("isRetryable: true", None, Some("500-599"), None),
        (
            "isRetryable: true, responseClasses: [{condition: {status: {min: 500, max: 500}}, isFailure: false},
              {condition: {any: [{status: {min: 429, max: 429}}, {status: {min: 590}}]}, isFailure: true}]",
            None,
            Some("429,501-599"),
            Some(("429,590-599", "500")),
        ),
        (
            "isRetryable: true, responseClasses: [{condition: {not: {status: {max: 502}}}}]",
            None,
            Some("500-502"),
            Some(("", "503-599")),
        ),
        (
            "responseClasses: [{condition: {all: [{status: {min: 404}}, {status: {max: 499}}]}, isFailure: true},
              {condition: {status: {}}}]",
            None,
            None,
            Some(("404-499", "100-403,500-599")),
        ),
    ] {
        let cluster = Cluster::of(&(SERVICES.to_owned() + &profile("shop", &route(rest))));
        assert_eq!(cluster.problems(), [""; 0], "{rest}");
        let profiles = cluster.profiles();
        let route = &profiles[0].routes[0];
        let said = &route.reliability;
        assert_eq!(said.timeouts.request, timeout.map(Duration::from_millis), "{rest}");
        let retried = said.retry.as_ref().map(|it| shown(&it.http));
        assert_eq!(retried.as_deref(), retry, "{rest}");
        let found = route.classes.as_deref();
        let found = found.map(|it| (shown(&it.failures), shown(&it.successes)));
        let found = found.as_ref().map(|(failures, rest)| (failures.as_str(), rest.as_str()));
        assert_eq!(found, classes, "{rest}");
    }
}

fn shown(ranges: &[StatusRange]) -> String {
    let ranges: Vec<String> = ranges.iter().map(ToString::to_string).collect();
    ranges.join(",")
}

/// (classes) -> whether a call of gRPC that has failed is sent again
#[test]
fn what_is_good_by_its_status_is_not_sent_again() {
    for (classes, is_sent_again) in [
        ("", true),
        ("{condition: {status: {min: 500}}, isFailure: true}", true),
        (
            "{condition: {status: {min: 200, max: 299}}, isFailure: false}",
            false,
        ),
        (
            "{condition: {status: {min: 200, max: 299}}, isFailure: true}",
            true,
        ),
    ] {
        let route = route(&format!("isRetryable: true, responseClasses: [{classes}]"));
        let cluster = Cluster::of(&(SERVICES.to_owned() + &profile("shop", &route)));
        let profiles = cluster.profiles();
        let retry = profiles[0].routes[0]
            .reliability
            .retry
            .as_ref()
            .expect("a retry");
        assert_eq!(retry.is_for_code(14), is_sent_again, "{classes}");
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
    assert_eq!(
        profiles[0].budget, retry.budget,
        "also of what clients ask for"
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

/// A route of a kind in a namespace, for clients of `shop/web`.
fn route_in(kind: &str, namespace: &str) -> String {
    let version = match kind {
        "HTTPRoute" => "v1",
        _ => "v1alpha2",
    };
    format!(
        "---
{{apiVersion: gateway.networking.k8s.io/{version}, kind: {kind}, metadata: {{name: r, namespace: {namespace}}},
  spec: {{parentRefs: [{{group: '', kind: Service, name: web, namespace: shop}}],
    rules: [{{backendRefs: [{{name: web, namespace: shop, port: 80}}]}}]}}}}
"
    )
}

/// (routes) -> the ServiceProfiles that are in force, and what is said of the others
#[test]
fn routes_come_before_profiles() {
    const OWN: &str =
        "metadata.name: shop/web has routes of this namespace at port 80, which come before";
    const PRODUCERS: &str =
        "metadata.name: shop/web has routes of its own namespace at port 80, which come before";
    let of_both = profile("shop", &route("")) + &profile("far", &route(""));
    let mut cluster = Cluster::of(&(SERVICES.to_owned() + &of_both));
    let check = |it: &Cluster, in_force: &[&str], said: &[&str]| {
        let profiles = it.profiles();
        let namespaces: Vec<_> = profiles.iter().map(|it| it.namespace.as_str()).collect();
        assert_eq!(namespaces, in_force);
        let mut problems = it.problems();
        // What a route of another namespace may name is another matter.
        problems.retain(|it| it.starts_with("metadata.name"));
        problems.sort();
        assert_eq!(problems, said);
    };
    let both = ["far", "shop"];
    check(&cluster, &both, &[]);
    for (routes, in_force, said) in [
        // Those of the Service's own namespace hold for clients of all others too,
        (vec![("HTTPRoute", "shop")], &[][..], &[PRODUCERS, OWN][..]),
        (vec![("HTTPRoute", "far")], &["shop"], &[OWN]),
        (
            vec![("HTTPRoute", "shop"), ("HTTPRoute", "far")],
            &[],
            &[OWN, OWN],
        ),
        // if these have none; those of flows say nothing of requests.
        (vec![("TCPRoute", "shop")], &both, &[]),
        (
            vec![("HTTPRoute", "shop"), ("TCPRoute", "far")],
            &["far"],
            &[OWN],
        ),
    ] {
        let all: String = routes.iter().map(|(kind, it)| route_in(kind, it)).collect();
        cluster.apply(&all);
        check(&cluster, in_force, said);
        cluster.delete(&all);
        check(&cluster, &both, &[]);
    }
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
