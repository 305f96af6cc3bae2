//! Tables of routes, requests, and which rule each is.

use http::request::Parts;
use http::{HeaderName, Method, Request};
use proptest::prelude::*;

use super::*;

mod filters;
mod grpc;
mod profiles;

pub(super) fn head(method: &str, uri: &str, headers: &[(&str, &str)]) -> Parts {
    let mut request = Request::builder().method(method).uri(uri);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.body(()).expect("a request").into_parts().0
}

fn name(text: &str) -> Name {
    text.parse().expect("a name")
}

fn exact(path: &str) -> HttpMatch {
    HttpMatch {
        path: PathMatch::Exact(path.to_owned()),
        ..HttpMatch::any()
    }
}

fn prefix(path: &str) -> HttpMatch {
    HttpMatch {
        path: PathMatch::Prefix(PathPrefix::new(path)),
        ..HttpMatch::any()
    }
}

fn regex(path: &str) -> HttpMatch {
    HttpMatch {
        path: PathMatch::Regex(Pattern::new(path).expect("a pattern")),
        ..HttpMatch::any()
    }
}

fn grpc(service: Option<&str>, method: Option<&str>) -> HttpMatch {
    let text = |it: &str| TextMatch::Exact(it.to_owned());
    HttpMatch {
        path: PathMatch::grpc(service.map(text), method.map(text)),
        ..HttpMatch::any()
    }
}

impl HttpMatch {
    fn method(mut self, method: Method) -> Self {
        self.method = Some(method);
        self
    }

    fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push(HeaderMatch {
            name: name.parse().expect("a header"),
            value: TextMatch::Exact(value.to_owned()),
        });
        self
    }

    fn query(mut self, name: &str, value: &str) -> Self {
        self.query.push(QueryMatch {
            name: name.to_owned(),
            value: TextMatch::Exact(value.to_owned()),
        });
        self
    }
}

fn rule(matches: Vec<HttpMatch>) -> Rule {
    Rule {
        name: None,
        matches,
        filters: vec![],
        backends: vec![],
        reliability: None,
    }
}

fn route(kind: RouteKind, name: &str, created: Option<i64>, rules: Vec<Vec<HttpMatch>>) -> Route {
    Route {
        name: RouteName {
            name: name.parse().expect("a name"),
            kind,
        },
        created,
        rules: RouteRules::Http(rules.into_iter().map(rule).collect()),
    }
}

fn http(name: &str, rules: Vec<Vec<HttpMatch>>) -> Route {
    route(RouteKind::Http, name, Some(0), rules)
}

fn flow(kind: RouteKind, name: &str, created: Option<i64>, hostnames: &[&str]) -> Route {
    let hostnames = hostnames.iter().map(|it| it.parse().expect("a host"));
    Route {
        name: RouteName {
            name: name.parse().expect("a name"),
            kind,
        },
        created,
        rules: RouteRules::Flow(FlowRule {
            name: None,
            hostnames: hostnames.collect(),
            backends: vec![],
        }),
    }
}

fn table(routes: Vec<Route>) -> RouteTable {
    RouteTable::new("shop/web:80".parse().expect("a name"), routes)
}

/// `name#rule`, `404`, or `service`.
fn selected(table: &RouteTable, client: &str, head: &Parts) -> String {
    match table.select(&name(client), head) {
        Selected::Service => "service".to_owned(),
        Selected::NotFound => "404".to_owned(),
        Selected::Rule(it) => format!("{}#{}", it.route.name.name, it.rule_index),
    }
}

fn of_flow(table: &RouteTable, client: &str, server_name: Option<&str>) -> String {
    match table.select_flow(&name(client), server_name) {
        SelectedFlow::Service => "service".to_owned(),
        SelectedFlow::NotFound => "reset".to_owned(),
        SelectedFlow::Rule { route, .. } => route.name.name.to_string(),
    }
}

/// Each pair is put into one route in both orders: the first always wins. A request that satisfies both.
#[test]
fn precedence_of_matches() {
    let get = || head("GET", "/shop/cart?a=1&b=2", &[("x-a", "1"), ("x-b", "2")]);
    for (what, winner, loser) in [
        (
            "exact before prefix",
            exact("/shop/cart"),
            prefix("/shop/cart"),
        ),
        (
            "exact before prefix with everything else",
            exact("/shop/cart"),
            prefix("/shop")
                .method(Method::GET)
                .header("x-a", "1")
                .query("a", "1"),
        ),
        (
            "exact before regex",
            exact("/shop/cart"),
            regex("/shop/.*").method(Method::GET),
        ),
        (
            "longer before shorter prefix",
            prefix("/shop/cart"),
            prefix("/shop"),
        ),
        (
            "longer prefix before a method",
            prefix("/shop/cart"),
            prefix("/shop").method(Method::GET),
        ),
        (
            "a slash at the end does not count",
            prefix("/shop").method(Method::GET),
            prefix("/shop/"),
        ),
        (
            "prefix before regex",
            prefix("/shop"),
            regex("/shop/[a-z]+.*"),
        ),
        (
            "regex before every path",
            regex("/.*"),
            prefix("/").method(Method::GET),
        ),
        (
            "longer before shorter regex",
            regex("/shop/.*"),
            regex("/.*"),
        ),
        (
            "method before headers",
            prefix("/shop").method(Method::GET),
            prefix("/shop").header("x-a", "1").header("x-b", "2"),
        ),
        (
            "more headers",
            prefix("/shop").header("x-a", "1").header("x-b", "2"),
            prefix("/shop")
                .header("x-a", "1")
                .query("a", "1")
                .query("b", "2"),
        ),
        (
            "of a header that occurs twice one counts",
            prefix("/shop").header("x-a", "1").header("x-b", "2"),
            prefix("/shop")
                .header("X-A", "1")
                .header("x-a", "9")
                .header("x-a", "8"),
        ),
        (
            "more parameters",
            prefix("/shop").query("a", "1").query("b", "2"),
            prefix("/shop").query("a", "1"),
        ),
        (
            "a parameter before none",
            prefix("/").query("a", "1"),
            prefix("/"),
        ),
        (
            "exact, then method, headers, parameters",
            exact("/shop/cart").method(Method::GET),
            exact("/shop/cart").header("x-a", "1").query("a", "1"),
        ),
    ] {
        assert_wins(RouteKind::Http, &get(), what, [winner, loser]);
    }
}

/// Whichever of the two comes first in a route, and however they are spread over routes: the first one wins.
fn assert_wins(kind: RouteKind, request: &Parts, what: &str, [winner, loser]: [HttpMatch; 2]) {
    let rules = |it: [&HttpMatch; 2]| it.map(|it| vec![it.clone()]).to_vec();
    let one = |it| table(vec![route(kind, "shop/r", Some(0), rules(it))]);
    let first = one([&winner, &loser]);
    assert_eq!(selected(&first, "any", request), "r#0", "{what}");
    let second = one([&loser, &winner]);
    assert_eq!(selected(&second, "any", request), "r#1", "{what}, reversed");
    // Age and name come later.
    let apart = table(vec![
        route(kind, "shop/a", Some(1), vec![vec![loser]]),
        route(kind, "shop/b", Some(2), vec![vec![winner]]),
    ]);
    let of_two = selected(&apart, "any", request);
    assert_eq!(of_two, "b#0", "{what}, in two routes");
}

#[test]
fn precedence_of_routes_with_equal_matches() {
    let at = |name: &str, created| route(RouteKind::Http, name, created, vec![vec![prefix("/")]]);
    let get = head("GET", "/", &[]);
    for (what, routes, expected) in [
        (
            "older",
            vec![at("shop/a", Some(2)), at("shop/b", Some(1))],
            "b#0",
        ),
        (
            "known age",
            vec![at("shop/a", None), at("shop/b", Some(1))],
            "b#0",
        ),
        (
            "name",
            vec![at("shop/b", Some(1)), at("shop/a", Some(1))],
            "a#0",
        ),
        (
            "name without age",
            vec![at("shop/b", None), at("shop/a", None)],
            "a#0",
        ),
        (
            "order of rules",
            vec![http("shop/a", vec![vec![prefix("/")], vec![prefix("/")]])],
            "a#0",
        ),
        (
            "kind, where even names are equal",
            vec![
                route(
                    RouteKind::LinkerdHttp,
                    "shop/a",
                    Some(1),
                    vec![vec![exact("/x")], vec![prefix("/")]],
                ),
                at("shop/a", Some(1)),
            ],
            "a#0",
        ),
    ] {
        assert_eq!(selected(&table(routes), "any", &get), expected, "{what}");
    }
}

/// (match, method, path, headers) -> whether
#[test]
fn matches() {
    let pattern = |it: &str| TextMatch::Regex(Pattern::new(it).expect("a pattern"));
    let header_regex = |value: &str| {
        let mut matches = HttpMatch::any();
        let name = HeaderName::from_static("x-a");
        let value = pattern(value);
        matches.headers.push(HeaderMatch { name, value });
        matches
    };
    let query_regex = |value: &str| {
        let mut matches = HttpMatch::any();
        let value = pattern(value);
        matches.query.push(QueryMatch {
            name: "a".to_owned(),
            value,
        });
        matches
    };
    let none: &[(&str, &str)] = &[];
    for (matches, method, uri, headers, expected) in [
        (exact("/a"), "GET", "/a", none, true),
        (exact("/a"), "GET", "/a?x=/b", none, true),
        (exact("/a"), "GET", "http://host/a", none, true),
        (exact("/a"), "GET", "/a/", none, false),
        (exact("/a"), "GET", "/A", none, false),
        (exact("/a"), "GET", "/%61", none, false),
        (prefix("/a"), "GET", "/a", none, true),
        (prefix("/a"), "GET", "/a/", none, true),
        (prefix("/a"), "GET", "/a/b", none, true),
        (prefix("/a/"), "GET", "/a", none, true),
        (prefix("/a/"), "GET", "/a/b", none, true),
        (prefix("/a"), "GET", "/ab", none, false),
        (prefix("/a"), "GET", "/", none, false),
        (prefix("/"), "GET", "/", none, true),
        (prefix("/"), "OPTIONS", "*", none, true),
        (prefix("/"), "CONNECT", "host:80", none, true),
        (regex("/v[0-9]+/.*"), "GET", "/v12/x", none, true),
        (regex("/v[0-9]+"), "GET", "/v1/x", none, false),
        (regex("v1"), "GET", "/v1", none, false),
        (regex("/a|/b"), "GET", "/b", none, true),
        (regex("/a|/b"), "GET", "/bc", none, false),
        (grpc(Some("a.B"), Some("C")), "POST", "/a.B/C", none, true),
        (grpc(Some("a.B"), Some("C")), "POST", "/a.B/D", none, false),
        (grpc(Some("a.B"), None), "POST", "/a.B/C", none, true),
        (grpc(Some("a.B"), None), "POST", "/a.BC/C", none, false),
        (grpc(None, Some("C")), "POST", "/a.B/C", none, true),
        (grpc(None, Some("C")), "POST", "/a.B/CD", none, false),
        (grpc(None, Some("C")), "POST", "/C", none, false),
        (grpc(None, None), "POST", "/a.B/C", none, true),
        (prefix("/").method(Method::GET), "POST", "/", none, false),
        (
            prefix("/").header("X-A", "1"),
            "GET",
            "/",
            &[("x-a", "1")],
            true,
        ),
        (
            prefix("/").header("x-a", "1"),
            "GET",
            "/",
            &[("x-a", "2"), ("x-a", "1")],
            true,
        ),
        (
            prefix("/").header("x-a", "1"),
            "GET",
            "/",
            &[("x-a", "11")],
            false,
        ),
        (prefix("/").header("x-a", "1"), "GET", "/", none, false),
        (header_regex("v[0-9]"), "GET", "/", &[("x-a", "v1")], true),
        (header_regex("v[0-9]"), "GET", "/", &[("x-a", "v11")], false),
        (prefix("/").query("a", "1"), "GET", "/?b=2&a=1", none, true),
        (prefix("/").query("a", "1"), "GET", "/?a=2&a=1", none, false),
        (prefix("/").query("a", ""), "GET", "/?a", none, true),
        (prefix("/").query("a", "x y"), "GET", "/?a=x+y", none, true),
        (
            prefix("/").query("a", "x y"),
            "GET",
            "/?%61=x%20y",
            none,
            true,
        ),
        (prefix("/").query("a", "%2"), "GET", "/?a=%2", none, true),
        (prefix("/").query("A", "1"), "GET", "/?a=1", none, false),
        (prefix("/").query("a", "1"), "GET", "/", none, false),
        (query_regex("x .*"), "GET", "/?a=x+y", none, true),
        (query_regex("x"), "GET", "/?a=xx", none, false),
    ] {
        let request = head(method, uri, headers);
        let shown = format!("{matches:?} {method} {uri} {headers:?}");
        assert_eq!(matches.is_match(&request), expected, "{shown}");
        let table = table(vec![http("shop/r", vec![vec![matches]])]);
        let by_table = selected(&table, "any", &request);
        assert_eq!(by_table, if expected { "r#0" } else { "404" }, "{shown}");
    }
}

#[test]
fn patterns_are_bounded() {
    for good in ["a", "", "(?i)a|b", "[^/]+", "(?x) a b"] {
        assert!(Pattern::new(good).is_ok(), "{good}");
    }
    let long = "a".repeat(1025);
    for bad in [
        "(",
        "a)|(b",
        "(?=a)",
        "\\1",
        "(?x)a#",
        "a{1000}{1000}",
        "\\pL{999}",
        &long,
    ] {
        assert!(Pattern::new(bad).is_err(), "{bad} was accepted");
    }
    let slow = Pattern::new("(a*)*b").expect("a pattern");
    assert!(!slow.is_match("a".repeat(100_000).as_bytes()));
}

#[test]
fn consumers_have_their_own_routes() {
    let table = table(vec![
        http("shop/producer", vec![vec![exact("/p")]]),
        http("consumer/one", vec![vec![exact("/c")]]),
        flow(RouteKind::Tcp, "opaque/tcp", None, &[]),
    ]);
    for (client, path, expected) in [
        ("shop", "/p", "producer#0"),
        ("other", "/p", "producer#0"),
        ("other", "/c", "404"),
        ("consumer", "/c", "one#0"),
        ("consumer", "/p", "404"),
        ("opaque", "/p", "service"),
    ] {
        let found = selected(&table, client, &head("GET", path, &[]));
        assert_eq!(found, expected, "{client} {path}");
    }
    let only_consumers = RouteTable::new(
        "shop/web:80".parse().expect("a name"),
        vec![http("consumer/one", vec![vec![exact("/c")]])],
    );
    let found = selected(&only_consumers, "other", &head("GET", "/c", &[]));
    assert_eq!(found, "service");
}

/// Of several types, the most specific is in force, and no other.
/// (request) -> route, of a table of which some are for hosts
#[test]
fn hosts_come_before_all_else() {
    let hosts = |it: &[&str]| it.iter().map(|it| it.parse().expect("a host")).collect();
    let of_hosts = |name, matches, of: &[&str]| (http(name, vec![vec![matches]]), hosts(of));
    let routes = vec![
        of_hosts("shop/any", exact("/a"), &[]),
        of_hosts("shop/below", prefix("/"), &["*.example.com"]),
        of_hosts("shop/deep", prefix("/"), &["*.a.example.com"]),
        of_hosts("shop/one", prefix("/a"), &["api.example.com", "x.test"]),
    ];
    let table = RouteTable::with_hosts("shop/out:0".parse().expect("a name"), routes);
    for (uri, host, expected) in [
        ("/a", "other.test", "any#0"),
        ("/b", "other.test", "404"),
        ("/a", "", "any#0"),
        ("/a", "x.test", "one#0"),
        ("/a", "X.Test.", "one#0"),
        ("/a", "x.test:8080", "one#0"),
        ("/b", "x.test", "404"),
        ("/a", "api.example.com", "one#0"),
        // The next best host has a rule for it.
        ("/b", "api.example.com", "below#0"),
        ("/a", "b.a.example.com", "deep#0"),
        ("/a", "example.com", "any#0"),
        ("http://x.test/a", "", "one#0"),
        // What a request is sent to counts, not what its header says.
        ("http://x.test/b", "b.example.com", "404"),
    ] {
        let headers = [("host", host)];
        let headers = if host.is_empty() { &[][..] } else { &headers };
        let head = head("GET", uri, headers);
        assert_eq!(selected(&table, "shop", &head), expected, "{uri} {host}");
    }
}

#[test]
fn one_type_of_routes_is_in_force() {
    let grpc = || {
        route(
            RouteKind::Grpc,
            "shop/grpc",
            None,
            vec![vec![grpc(Some("a.B"), None)]],
        )
    };
    let http = || http("shop/http", vec![vec![prefix("/")]]);
    let tls = || flow(RouteKind::Tls, "shop/tls", None, &[]);
    let tcp = || flow(RouteKind::Tcp, "shop/tcp", None, &[]);
    for (routes, path, by_request, by_flow) in [
        (vec![], "/a.B/C", "service", "service"),
        (
            vec![tcp(), tls(), http(), grpc()],
            "/a.B/C",
            "grpc#0",
            "service",
        ),
        (vec![http(), grpc()], "/other", "404", "service"),
        (vec![tcp(), tls(), http()], "/a.B/C", "http#0", "service"),
        (vec![tcp(), tls()], "/a.B/C", "service", "tls"),
        (vec![tcp()], "/a.B/C", "service", "tcp"),
    ] {
        let table = table(routes);
        assert_eq!(
            selected(&table, "any", &head("POST", path, &[])),
            by_request
        );
        assert_eq!(of_flow(&table, "any", Some("example.com")), by_flow);
    }
    let rules_are_missing = table(vec![super::tests::http("shop/r", vec![])]);
    assert_eq!(
        selected(&rules_are_missing, "any", &head("GET", "/", &[])),
        "404"
    );
}

#[test]
fn server_names() {
    let table = table(vec![
        flow(RouteKind::Tls, "shop/wide", Some(1), &["*.example.com"]),
        flow(
            RouteKind::Tls,
            "shop/narrow",
            Some(2),
            &["*.a.example.com", "b.example.com"],
        ),
        flow(RouteKind::Tls, "shop/exact", Some(3), &["x.a.example.com"]),
        flow(
            RouteKind::Tls,
            "shop/younger",
            Some(4),
            &["x.a.example.com"],
        ),
    ]);
    for (server_name, expected) in [
        (Some("x.a.example.com"), "exact"),
        (Some("X.A.Example.COM"), "exact"),
        (Some("y.a.example.com"), "narrow"),
        (Some("z.y.a.example.com"), "narrow"),
        (Some("a.example.com"), "wide"),
        (Some("b.example.com"), "narrow"),
        (Some("example.com"), "reset"),
        (Some(".example.com"), "reset"),
        (Some("xexample.com"), "reset"),
        (Some("ü.example.com"), "wide"),
        (Some(""), "reset"),
        (None, "service"),
    ] {
        assert_eq!(
            of_flow(&table, "any", server_name),
            expected,
            "{server_name:?}"
        );
    }
    let with_rest = super::tests::table(vec![
        flow(RouteKind::Tls, "shop/all", Some(1), &[]),
        flow(RouteKind::Tls, "shop/exact", Some(2), &["a.example.com"]),
    ]);
    assert_eq!(of_flow(&with_rest, "any", Some("a.example.com")), "exact");
    assert_eq!(of_flow(&with_rest, "any", Some("b.example.com")), "all");
}

#[test]
fn the_oldest_tcp_route_is_in_force() {
    let routes = vec![
        flow(RouteKind::Tcp, "shop/a", None, &[]),
        flow(RouteKind::Tcp, "shop/b", Some(2), &[]),
        flow(RouteKind::Tcp, "shop/c", Some(1), &[]),
    ];
    assert_eq!(of_flow(&table(routes), "any", Some("x.example.com")), "c");
}

#[test]
fn ordinals_number_all_rules() {
    let table = table(vec![
        http(
            "shop/a",
            vec![vec![exact("/0")], vec![exact("/1"), exact("/one")]],
        ),
        flow(RouteKind::Tcp, "other/t", None, &[]),
        http("consumer/b", vec![vec![exact("/3")]]),
    ]);
    assert_eq!(table.rules(), 4);
    for (client, path, expected) in [
        ("shop", "/0", 0),
        ("shop", "/1", 1),
        ("shop", "/one", 1),
        ("consumer", "/3", 3),
    ] {
        let request = head("GET", path, &[]);
        match table.select(&name(client), &request) {
            Selected::Rule(it) => assert_eq!(it.ordinal, expected),
            other => panic!("{other:?}"),
        }
    }
    match table.select_flow(&name("other"), None) {
        SelectedFlow::Rule { ordinal, .. } => assert_eq!(ordinal, 2),
        other => panic!("{other:?}"),
    }
}

fn backend(weight: u32, name: &str) -> Backend {
    Backend {
        weight,
        target: Target::Service {
            name: name.parse().expect("a name"),
            port: 80,
        },
        filters: vec![],
    }
}

#[test]
fn backends_are_picked_by_weight() {
    let list = [backend(1, "s/a"), backend(0, "s/b"), backend(3, "s/c")];
    let steps = 4000_u64;
    let mut counts = [0; 3];
    for step in 0..steps {
        let random = u64::MAX / steps * step;
        let picked = pick(&list, random).expect("one");
        let place = list
            .iter()
            .position(|it| it == picked)
            .expect("one of them");
        counts[place] += 1;
    }
    assert_eq!(counts[1], 0);
    assert!((999..=1001).contains(&counts[0]), "{counts:?}");
    assert_eq!(pick(&list, u64::MAX).map(|it| it.weight), Some(3));
    assert_eq!(pick(&[], 7), None);
    assert_eq!(pick(&[backend(0, "s/a")], u64::MAX), None);
    let heavy = [backend(u32::MAX, "s/a"), backend(u32::MAX, "s/b")];
    assert!(pick(&heavy, u64::MAX).is_some());
}

#[test]
fn names_round_trip() {
    for good in ["shop/web:80", "a/b.c:65535"] {
        let name: RouteTableName = good.parse().expect(good);
        assert_eq!(name.to_string(), good);
    }
    for bad in ["shop/web", "shop:80", "shop/web:x", "shop/web:65536", ""] {
        assert!(bad.parse::<RouteTableName>().is_err(), "{bad}");
    }
}

/// What the Gateway API says, in its own order, for all that matches: no order made beforehand.
fn naive(routes: &[Route], head: &Parts) -> Option<(usize, usize)> {
    let mut best: Option<(Vec<i64>, usize, usize)> = None;
    for (index, route) in routes.iter().enumerate() {
        let RouteRules::Http(rules) = &route.rules else {
            continue;
        };
        for (number, rule) in rules.iter().enumerate() {
            for (at, it) in rule
                .matches
                .iter()
                .enumerate()
                .filter(|(_, it)| it.is_match(head))
            {
                let distinct = |names: Vec<String>| {
                    names
                        .into_iter()
                        .collect::<std::collections::BTreeSet<_>>()
                        .len() as i64
                };
                let prefix_len = match &it.path {
                    PathMatch::Prefix(it) => it.as_str().len() as i64,
                    _ => 0,
                };
                let written = |it: &Option<TextMatch>| match it {
                    None => 0,
                    Some(TextMatch::Exact(it)) => it.len() as i64,
                    Some(TextMatch::Regex(it)) => it.as_str().len() as i64,
                };
                let (pattern_len, method_len) = match &it.path {
                    PathMatch::Regex(it) => (it.as_str().len() as i64, 0),
                    PathMatch::Grpc { service, method } => (written(service), written(method)),
                    _ => (0, 0),
                };
                let headers = it.headers.iter().map(|it| it.name.to_string()).collect();
                let query = it.query.iter().map(|it| it.name.clone()).collect();
                let score = vec![
                    i64::from(matches!(it.path, PathMatch::Exact(_))),
                    prefix_len,
                    pattern_len,
                    method_len,
                    i64::from(it.method.is_some()),
                    distinct(headers),
                    distinct(query),
                    i64::from(route.created.is_some()),
                    -route.created.unwrap_or_default(),
                    -routes
                        .iter()
                        .filter(|it| it.name < route.name)
                        .map(|_| 1)
                        .sum::<i64>(),
                    -(number as i64),
                    -(at as i64),
                ];
                if best.as_ref().is_none_or(|(other, ..)| score > *other) {
                    best = Some((score, index, number));
                }
            }
        }
    }
    best.map(|(_, index, number)| (index, number))
}

/// As [`selected`] has it.
fn by_naive(table: &RouteTable, request: &Parts) -> String {
    match naive(table.routes(), request) {
        _ if table.routes().is_empty() => "service".to_owned(),
        None => "404".to_owned(),
        Some((index, number)) => format!("{}#{number}", table.routes()[index].name.name.name),
    }
}

fn any_match() -> impl Strategy<Value = HttpMatch> {
    let path = prop_oneof![
        prop::sample::select(vec!["/", "/a", "/a/b", "/b"]).prop_map(exact),
        prop::sample::select(vec!["/", "/a", "/a/", "/a/b", "/b"]).prop_map(prefix),
        prop::sample::select(vec!["/.*", "/a.*", "/(a|b)/.*"]).prop_map(regex),
    ];
    let method = prop::option::of(prop::sample::select(vec![Method::GET, Method::POST]));
    let pairs = || prop::collection::vec((prop::sample::select(vec!["a", "b"]), 0..2_u8), 0..3);
    (path, method, pairs(), pairs()).prop_map(|(mut matches, method, headers, query)| {
        matches.method = method;
        for (name, value) in headers {
            matches = matches.header(name, &value.to_string());
        }
        for (name, value) in query {
            matches = matches.query(name, &value.to_string());
        }
        matches
    })
}

fn any_routes(
    kind: RouteKind,
    any_match: impl Strategy<Value = HttpMatch>,
) -> impl Strategy<Value = Vec<Route>> {
    let rules = prop::collection::vec(prop::collection::vec(any_match, 0..3), 0..3);
    let created = prop::option::of(0_i64..2);
    prop::collection::vec((created, rules), 0..4).prop_map(move |routes| {
        let routes = routes.into_iter().enumerate();
        let route = |(index, (created, rules))| {
            route(kind, &format!("shop/r{}", 9 - index), created, rules)
        };
        routes.map(route).collect()
    })
}

fn any_head() -> impl Strategy<Value = Parts> {
    let path = prop::sample::select(vec!["/", "/a", "/a/b", "/b", "/b/c", "/ab"]);
    let query = prop::sample::select(vec!["", "?a=0", "?a=1&b=0", "?b=1&a=0"]);
    let pairs = prop::collection::vec((prop::sample::select(vec!["a", "b"]), 0..2_u8), 0..3);
    let method = prop::sample::select(vec!["GET", "POST"]);
    (method, path, query, pairs).prop_map(|(method, path, query, pairs)| {
        let texts: Vec<_> = pairs
            .iter()
            .map(|(name, it)| (*name, it.to_string()))
            .collect();
        let headers: Vec<_> = texts
            .iter()
            .map(|(name, it)| (*name, it.as_str()))
            .collect();
        head(method, &format!("{path}{query}"), &headers)
    })
}

proptest! {
    #[test]
    fn select_is_what_the_specification_says(
        routes in any_routes(RouteKind::Http, any_match()),
        request in any_head(),
    ) {
        let table = table(routes);
        prop_assert_eq!(selected(&table, "any", &request), by_naive(&table, &request));
    }

    #[test]
    fn anything_is_matched_or_not(
        pattern in "\\PC{0,12}",
        prefix_text in "\\PC{0,12}",
        path in "/[!-~]{0,16}",
        server_name in "\\PC{0,16}",
    ) {
        let mut rules = vec![vec![prefix(&prefix_text), exact(&prefix_text)]];
        if let Ok(pattern) = Pattern::new(&pattern) {
            let mut matches = HttpMatch::any().query("q", "");
            matches.path = PathMatch::Regex(pattern);
            rules.push(vec![matches]);
        }
        let table = table(vec![http("shop/r", rules)]);
        if let Ok(request) = Request::builder().uri(&path).body(()) {
            let _ = selected(&table, "any", &request.into_parts().0);
        }
        let hosts = super::tests::table(vec![
            flow(RouteKind::Tls, "shop/t", None, &["*.example.com", "a.b"]),
        ]);
        let _ = of_flow(&hosts, "any", Some(&server_name));
    }
}

#[test]
fn each_rule_that_is_passed_over_says_why() {
    let canary = prefix("/shop").header("x-canary", "1");
    let table = table(vec![
        http(
            "shop/web",
            vec![
                vec![exact("/shop/cart")],
                vec![canary, prefix("/old").method(Method::POST)],
                vec![],
                vec![
                    prefix("/shop").query("a", "2"),
                    prefix("/shop").query("a", "3"),
                ],
                vec![prefix("/shop")],
                vec![HttpMatch::any()],
            ],
        ),
        flow(RouteKind::Tcp, "shop/all", None, &[]),
        http("order/web", vec![vec![HttpMatch::any()]]),
    ]);
    let request = head("GET", "/shop?a=1", &[("host", "web")]);
    let said = |client: &str| {
        let client = name(client);
        let said = table.passed_over(&client, &request);
        said.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    assert_eq!(selected(&table, "shop", &request), "web#4");
    assert_eq!(
        said("shop"),
        [
            "HTTPRoute shop/web, rule 1: it asks for path /shop/cart",
            "HTTPRoute shop/web, rule 2: it asks for header x-canary, or path /old/…",
            "HTTPRoute shop/web, rule 3: it matches nothing",
            "HTTPRoute shop/web, rule 4: it asks for query parameter a",
            "HTTPRoute shop/web, rule 6: it matches too, and comes later",
            "TCPRoute shop/all, rule 1: routes of HTTP are in force, which come first",
            "HTTPRoute order/web, rule 1: it holds for clients of other namespaces",
        ]
    );
    // The other way round for those who have their own.
    let said = said("order");
    let others = "it holds for clients of other namespaces";
    assert_eq!(said.len(), 7);
    assert!(said.iter().all(|it| it.ends_with(others)), "{said:?}");
}

#[test]
fn each_route_that_a_flow_passes_over_says_why() {
    let table = table(vec![
        flow(
            RouteKind::Tls,
            "shop/one",
            None,
            &["one.example", "*.one.example"],
        ),
        flow(RouteKind::Tls, "shop/all", None, &[]),
        flow(RouteKind::Tls, "shop/two", None, &["two.example"]),
    ]);
    let client = name("shop");
    let said = table.passed_over_by_flow(&client, Some("a.one.example"));
    let said: Vec<String> = said.iter().map(ToString::to_string).collect();
    assert_eq!(
        said,
        [
            "TLSRoute shop/all, rule 1: it matches too, and comes later",
            "TLSRoute shop/two, rule 1: it asks for another host",
        ]
    );
}
