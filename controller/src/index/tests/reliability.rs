//! Tables of what is said about timeouts and retries, and of what agents are told of it.

use std::time::Duration;

use weft_core::route::{Reliability, RouteRules};

use super::*;

fn service(annotations: &str) -> String {
    format!(
        "---
{{apiVersion: v1, kind: Service, metadata: {{name: web, namespace: shop, annotations: {{{annotations}}}}},
  spec: {{clusterIP: 10.2.0.1, ports: [{{port: 80}}]}}}}
"
    )
}

fn route(annotations: &str, rule: &str) -> String {
    route_of("HTTPRoute", annotations, rule)
}

fn route_of(kind: &str, annotations: &str, rule: &str) -> String {
    format!(
        "---
{{apiVersion: gateway.networking.k8s.io/v1, kind: {kind},
  metadata: {{name: r, namespace: shop, generation: 1, annotations: {{{annotations}}}}},
  spec: {{parentRefs: [{{group: '', kind: Service, name: web}}],
    rules: [{{{rule} backendRefs: [{{name: web, port: 80}}]}}]}}}}
"
    )
}

fn of_rule(cluster: &Cluster) -> Reliability {
    let table = cluster.table("shop/web:80").expect("a table");
    match &table.routes()[0].rules {
        RouteRules::Http(rules) => rules[0].reliability.as_deref().cloned().unwrap_or_default(),
        RouteRules::Flow(_) => panic!("not for requests"),
    }
}

/// `request response backend idle`, in milliseconds; `retries statuses codes timeout`, where there are any.
fn shown(it: &Reliability) -> String {
    let ms = |it: Option<Duration>| it.map_or("-".to_owned(), |it| it.as_millis().to_string());
    let times = it.timeouts;
    let mut shown = vec![
        ms(times.request),
        ms(times.response),
        ms(times.backend_request),
        ms(times.idle),
    ];
    if let Some(retry) = &it.retry {
        let ranges: Vec<String> = retry.http.iter().map(ToString::to_string).collect();
        let codes: Vec<String> = retry.grpc.iter().map(|it| it.to_string()).collect();
        shown.push(format!("*{}", retry.limit));
        shown.push(format!("[{}]", ranges.join(",")));
        shown.push(format!("[{}]", codes.join(",")));
        shown.push(ms(retry.try_timeout));
    }
    if it.heeds_headers {
        shown.push("headers".to_owned());
    }
    shown.join(" ")
}

/// (annotations of a Service) -> what holds without routes
#[test]
fn services_say_what_holds_for_all_of_their_requests() {
    for (annotations, is) in [
        ("timeout.linkerd.io/request: 2s", Some("2000 - - -")),
        (
            "timeout.linkerd.io/request: 2s, weft.dev/timeout-request: 1s, timeout.linkerd.io/response: 500ms,
             weft.dev/timeout-idle: 1m",
            Some("1000 500 - 60000"),
        ),
        ("timeout.linkerd.io/request: 0s", None),
        ("retry.linkerd.io/http: 5xx", Some("- - - - *1 [500-599] [] -")),
        (
            "weft.dev/retry-http: 'gateway-error,429', retry.linkerd.io/grpc: unavailable,
             retry.linkerd.io/limit: '3', retry.linkerd.io/timeout: 200ms",
            Some("- - - - *3 [502-504,429] [14] 200"),
        ),
        (
            "weft.dev/retry-grpc: 'internal,unavailable', weft.dev/retry-limit: '2', weft.dev/retry-timeout: 1s",
            Some("- - - - *2 [] [13,14] 1000"),
        ),
        // Weft's names come first.
        (
            "weft.dev/retry-http: '503', retry.linkerd.io/http: 5xx, weft.dev/retry-grpc: internal,
             retry.linkerd.io/grpc: unavailable, weft.dev/retry-limit: '2', retry.linkerd.io/limit: '3',
             weft.dev/retry-timeout: 1s, retry.linkerd.io/timeout: 2s",
            Some("- - - - *2 [503] [13] 1000"),
        ),
        (
            "weft.dev/timeout-response: 1s, timeout.linkerd.io/response: 2s, weft.dev/timeout-idle: 3s,
             timeout.linkerd.io/idle: 4s",
            Some("- 1000 - 3000"),
        ),
        ("retry.linkerd.io/limit: '3'", None),
        ("retry.linkerd.io/http: 5xx, retry.linkerd.io/limit: '0'", None),
        ("weft.dev/request-headers: enabled", Some("- - - - headers")),
        ("weft.dev/timeout-headers: enabled", Some("- - - - headers")),
        ("weft.dev/timeout-headers: disabled", None),
    ] {
        let cluster = Cluster::of(&service(annotations));
        assert!(cluster.problems().is_empty(), "{annotations}");
        let table = cluster.table("shop/web:80");
        let told = table.as_ref().and_then(|it| it.unrouted()).map(shown);
        assert_eq!(told.as_deref(), is, "{annotations}");
    }
}

/// (annotations of the Service, of the route, fields of the rule) -> what holds for the rule
#[test]
fn routes_take_the_place_of_services() {
    let of_service =
        "timeout.linkerd.io/request: 9s, timeout.linkerd.io/idle: 8s, retry.linkerd.io/http: 5xx";
    for (of_route, rule, is) in [
        ("", "", "9000 - - 8000 *1 [500-599] [] -"),
        (
            "timeout.linkerd.io/response: 1s",
            "",
            "- 1000 - - *1 [500-599] [] -",
        ),
        (
            "",
            "timeouts: {request: 2s, backendRequest: 1s},",
            "2000 - 1000 - *1 [500-599] [] -",
        ),
        (
            "timeout.linkerd.io/request: 3s",
            "timeouts: {request: 2s, backendRequest: 1s},",
            "3000 - 1000 - *1 [500-599] [] -",
        ),
        (
            "timeout.linkerd.io/request: 0s",
            "timeouts: {request: 2s},",
            "- - - - *1 [500-599] [] -",
        ),
        (
            "",
            "timeouts: {request: 0s, backendRequest: 1s},",
            "- - 1000 - *1 [500-599] [] -",
        ),
        (
            "",
            "retry: {codes: [503, 429], attempts: 4},",
            "9000 - - 8000 *4 [503,429] [] -",
        ),
        (
            "retry.linkerd.io/grpc: internal",
            "retry: {codes: [503]},",
            "9000 - - 8000 *1 [] [13] -",
        ),
        ("retry.linkerd.io/limit: '0'", "", "9000 - - 8000"),
        (
            "timeout.linkerd.io/idle: 1s",
            "",
            "- - - 1000 *1 [500-599] [] -",
        ),
        (
            "weft.dev/timeout-idle: 1s, timeout.linkerd.io/idle: 2s, weft.dev/timeout-response: 3s",
            "timeouts: {request: 4s},",
            "4000 3000 - 1000 *1 [500-599] [] -",
        ),
        (
            "retry.linkerd.io/http: '503', retry.linkerd.io/timeout: 200ms",
            "",
            "9000 - - 8000 *1 [503] [] 200",
        ),
        (
            "weft.dev/retry-http: '503', retry.linkerd.io/http: '502', weft.dev/retry-grpc: internal,
             weft.dev/retry-limit: '2', weft.dev/retry-timeout: 300ms",
            "",
            "9000 - - 8000 *2 [503] [13] 300",
        ),
        (
            "weft.dev/timeout-headers: enabled",
            "",
            "9000 - - 8000 *1 [500-599] [] - headers",
        ),
    ] {
        let cluster = Cluster::of(&(service(of_service) + &route(of_route, rule)));
        assert_eq!(cluster.problems(), [""; 0], "{of_route} {rule}");
        assert_eq!(shown(&of_rule(&cluster)), is, "{of_route} {rule}");
    }
}

/// The same of a GRPCRoute, whose rules have no fields for it.
#[test]
fn routes_of_calls_take_the_place_of_services() {
    let of_service = "timeout.linkerd.io/request: 9s, timeout.linkerd.io/idle: 8s, retry.linkerd.io/grpc: internal";
    for (of_route, is) in [
        ("", "9000 - - 8000 *1 [] [13] -"),
        (
            "timeout.linkerd.io/request: 1s, timeout.linkerd.io/response: 2s",
            "1000 2000 - - *1 [] [13] -",
        ),
        (
            "weft.dev/timeout-request: 1s, timeout.linkerd.io/request: 2s, timeout.linkerd.io/idle: 3s",
            "1000 - - 3000 *1 [] [13] -",
        ),
        ("timeout.linkerd.io/request: 0s", "- - - - *1 [] [13] -"),
        (
            "retry.linkerd.io/grpc: 'unavailable,cancelled', retry.linkerd.io/limit: '3',
             retry.linkerd.io/timeout: 200ms",
            "9000 - - 8000 *3 [] [1,14] 200",
        ),
        (
            "weft.dev/retry-grpc: unavailable, retry.linkerd.io/grpc: cancelled, weft.dev/retry-limit: '2',
             weft.dev/retry-timeout: 300ms",
            "9000 - - 8000 *2 [] [14] 300",
        ),
        ("weft.dev/retry-limit: '0'", "9000 - - 8000"),
        (
            "weft.dev/request-headers: enabled",
            "9000 - - 8000 *1 [] [13] - headers",
        ),
    ] {
        let route = route_of("GRPCRoute", of_route, "");
        let cluster = Cluster::of(&(service(of_service) + &route));
        assert_eq!(cluster.problems(), [""; 0], "{of_route}");
        assert_eq!(shown(&of_rule(&cluster)), is, "{of_route}");
    }
}

#[test]
fn a_rule_may_say_how_long_to_wait_between_tries() {
    let cluster = Cluster::of(&(service("") + &route("", "retry: {backoff: 100ms},")));
    let retry = of_rule(&cluster).retry.expect("a retry");
    assert!(retry.on_failure);
    assert_eq!(retry.backoff.least, Duration::from_millis(100));
    assert_eq!(retry.backoff.most, Duration::from_secs(1));
}

#[test]
fn annotations_that_cannot_be_read_change_nothing() {
    for (annotation, field) in [
        ("weft.dev/timeout-request: soon", "weft.dev/timeout-request"),
        ("timeout.linkerd.io/idle: '5'", "timeout.linkerd.io/idle"),
        ("retry.linkerd.io/http: 7xx", "retry.linkerd.io/http"),
        ("retry.linkerd.io/grpc: ok", "retry.linkerd.io/grpc"),
        ("retry.linkerd.io/limit: many", "retry.linkerd.io/limit"),
        ("weft.dev/retry-http: 7xx", "weft.dev/retry-http"),
        ("weft.dev/retry-grpc: ok", "weft.dev/retry-grpc"),
        ("weft.dev/retry-timeout: soon", "weft.dev/retry-timeout"),
        (
            "weft.dev/timeout-headers: 'yes'",
            "weft.dev/timeout-headers",
        ),
    ] {
        let good = "timeout.linkerd.io/request: 1s, retry.linkerd.io/http: '503', weft.dev/timeout-headers: enabled";
        let mut cluster = Cluster::of(&(service(good) + &route("", "")));
        let told = cluster.told("one");
        cluster.apply(&service(&format!(
            "{annotation}, {}",
            without(good, annotation)
        )));
        assert_eq!(cluster.told("one"), told, "{annotation}");
        let problems = cluster.problems();
        let expected = format!("metadata.annotations[{field:?}]: ");
        assert!(
            problems[0].starts_with(&expected),
            "{annotation}: {problems:?}"
        );

        let mut cluster = Cluster::of(&(service("") + &route(good, "")));
        let told = cluster.told("one");
        cluster.apply(&route(annotation, ""));
        assert_eq!(cluster.told("one"), told, "{annotation}");
        assert!(cluster.problems()[0].starts_with(&expected), "{annotation}");
        let statuses = cluster.statuses();
        assert!(
            statuses[0].contains("!Accepted=UnsupportedValue"),
            "{statuses:?}"
        );
    }
}

/// Annotations without those of the same name as another one.
fn without(annotations: &str, other: &str) -> String {
    let name = other.split(':').next().unwrap_or_default();
    let kept = annotations.split(", ").filter(|it| !it.starts_with(name));
    kept.collect::<Vec<_>>().join(", ")
}
