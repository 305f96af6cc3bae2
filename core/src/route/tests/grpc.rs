//! Matches of GRPCRoutes: which of two comes first, and that a table finds what the specification says.

use super::*;

/// A match of a method's name, of which each part is written exactly or, behind `~`, as a regular expression.
fn of(service: &str, method: &str) -> HttpMatch {
    let text = |it: &str| match it.strip_prefix('~') {
        Some(pattern) => Some(TextMatch::Regex(Pattern::new(pattern).expect("a pattern"))),
        None => (!it.is_empty()).then(|| TextMatch::Exact(it.to_owned())),
    };
    HttpMatch {
        path: PathMatch::grpc(text(service), text(method)),
        ..HttpMatch::any()
    }
}

/// `GRPCRouteRule.matches` in the Gateway API: the most characters of a service, then of a method, then the most headers.
/// It leaves the place of regular expressions open; they come behind what is exact.
#[test]
fn precedence_of_matches_of_grpc() {
    let call = || head("POST", "/shop.Cart/Add", &[("x-a", "1"), ("x-b", "2")]);
    for (what, winner, loser) in [
        (
            "service and method before the service",
            of("shop.Cart", "Add"),
            of("shop.Cart", "").header("x-a", "1").header("x-b", "2"),
        ),
        (
            "the service before the method",
            of("shop.Cart", ""),
            of("", "Add").header("x-a", "1"),
        ),
        (
            "the method before nothing",
            of("", "Add"),
            of("", "").header("x-a", "1").header("x-b", "2"),
        ),
        (
            "more headers at the same method",
            of("shop.Cart", "Add").header("x-a", "1").header("x-b", "2"),
            of("shop.Cart", "Add").header("x-a", "1"),
        ),
        (
            "more headers at the same service",
            of("shop.Cart", "").header("x-a", "1"),
            of("shop.Cart", ""),
        ),
        (
            "more headers at any call",
            of("", "").header("x-a", "1"),
            of("", ""),
        ),
        (
            "of a header that occurs twice one counts",
            of("", "Add").header("x-a", "1").header("x-b", "2"),
            of("", "Add")
                .header("x-a", "1")
                .header("X-A", "9")
                .header("x-a", "8"),
        ),
        (
            "exact before a longer pattern of the method",
            of("shop.Cart", "Add"),
            of("shop.Cart", "~(Add|Remove|Clear)"),
        ),
        (
            "an exact service before a pattern of the method",
            of("shop.Cart", ""),
            of("shop.Cart", "~A.*").header("x-a", "1"),
        ),
        (
            "the longer pattern of a service, whatever the method",
            of("~shop[.].*", ""),
            of("~shop.*", "Add").header("x-a", "1"),
        ),
        (
            "then the longer one of the method",
            of("~shop.*", "~Ad[a-z]"),
            of("~shop.*", "~A.*").header("x-a", "1"),
        ),
        (
            "then headers",
            of("~shop.*", "~A.*").header("x-a", "1"),
            of("~shop.*", "~A.*"),
        ),
        (
            "a pattern before every call",
            of("~.*", ""),
            of("", "").header("x-a", "1"),
        ),
    ] {
        assert_wins(RouteKind::Grpc, &call(), what, [winner, loser]);
    }
}

fn any_call_match() -> impl Strategy<Value = HttpMatch> {
    let services = vec!["", "a.B", "a.BC", "~a[.].*", "~a[.]B", "~.*"];
    let service = prop::sample::select(services);
    let method = prop::sample::select(vec!["", "C", "CD", "~C.*", "~C", "~.*"]);
    let pairs = prop::collection::vec((prop::sample::select(vec!["a", "b"]), 0..2_u8), 0..3);
    (service, method, pairs).prop_map(|(service, method, headers)| {
        let mut matches = of(service, method);
        for (name, value) in headers {
            matches = matches.header(name, &value.to_string());
        }
        matches
    })
}

fn any_call() -> impl Strategy<Value = Parts> {
    let paths = vec!["/a.B/C", "/a.B/CD", "/a.BC/C", "/b/C", "/a.B/", "/a.B"];
    let pairs = prop::collection::vec((prop::sample::select(vec!["a", "b"]), 0..2_u8), 0..3);
    (prop::sample::select(paths), pairs).prop_map(|(path, pairs)| {
        let texts = pairs.iter().map(|(name, it)| (*name, it.to_string()));
        let texts: Vec<_> = texts.collect();
        let headers: Vec<_> = texts
            .iter()
            .map(|(name, it)| (*name, it.as_str()))
            .collect();
        head("POST", path, &headers)
    })
}

proptest! {
    #[test]
    fn select_of_calls_is_what_the_specification_says(
        routes in any_routes(RouteKind::Grpc, any_call_match()),
        request in any_call(),
    ) {
        let table = table(routes);
        prop_assert_eq!(selected(&table, "any", &request), by_naive(&table, &request));
    }
}
