//! Routes as an agent is told them, and heads of requests as anybody may send them: whatever an agent
//! accepts it can select by, what it selects matches, and filters change a head or answer it.
//!
//! An input is the length of a table of routes (two bytes, the lower first), the table, and the head of a
//! request as HTTP/1 writes it. What is no table stands for one that has some of everything.
#![no_main]

use std::sync::LazyLock;

use http::request::Parts;
use http::{HeaderName, HeaderValue, Method, Request, Uri};
use libfuzzer_sys::fuzz_target;
use prost::Message;
use weft_core::Name;
use weft_core::route::{
    Filter, HeaderEdit, HeaderMatch, HttpMatch, PathMatch, PathPrefix, PathRewrite, Pattern, Place,
    QueryMatch, Rewrite, Route, RouteKind, RouteName, RouteRules, RouteTable, Rule, Selected,
    SelectedFlow, TextMatch, apply_to_request, apply_to_response, hostname, pick,
};
use weft_proto::v1;

static OF_EVERYTHING: LazyLock<RouteTable> = LazyLock::new(of_everything);

fuzz_target!(|bytes: &[u8]| {
    let Some(([low, high], rest)) = bytes.split_first_chunk() else {
        return;
    };
    let length = usize::from(u16::from_le_bytes([*low, *high]));
    let (table, head) = rest.split_at(length.min(rest.len()));
    let table = v1::RouteTable::decode(table).ok().filter(|_| length > 0);
    let table = table.and_then(|it| RouteTable::try_from(it).ok());
    if let Some(table) = &table {
        let again = RouteTable::try_from(v1::RouteTable::from(table.clone()));
        assert_eq!(again.as_ref(), Ok(table), "it does not survive being sent");
    }
    if let Some(head) = read(head) {
        check(table.as_ref().unwrap_or(&OF_EVERYTHING), &head);
    }
});

fn check(table: &RouteTable, head: &Parts) {
    let own = &table.name().service.namespace;
    let routes = table.routes().iter();
    let mut clients: Vec<Name> = routes.map(|it| it.name.name.namespace.clone()).collect();
    clients.push("nobody".parse().expect("a name"));
    clients.dedup();
    for client in &clients {
        let is_consumer = |it: &Route| it.name.name.namespace == *client;
        let scope = if table.routes().iter().any(is_consumer) {
            client
        } else {
            own
        };
        let in_force = table.routes().iter().filter(|it| {
            let route_type = Some(it.name.kind.route_type());
            it.name.name.namespace == *scope && route_type == table.route_type(client)
        });
        let rules = in_force.filter_map(|it| match &it.rules {
            RouteRules::Http(rules) => Some(rules),
            RouteRules::Flow(_) => None,
        });
        let mut matches = rules.flatten().flat_map(|it| &it.matches);
        let any = matches.any(|it| it.is_match(head));
        match table.select(client, head) {
            Selected::Rule(matched) => {
                assert!(matched.ordinal < table.rules());
                let mut matches = matched.rule.matches.iter();
                assert!(matches.any(|it| it.is_match(head)), "it does not match");
                let place = Place {
                    prefix: matched.prefix,
                    port: table.name().port,
                };
                apply(matched.rule, head, place);
            }
            Selected::NotFound => assert!(!any, "a match was missed"),
            Selected::Service => {
                let route_type = table.route_type(client);
                assert!(!route_type.is_some_and(|it| it.is_of_requests()));
            }
        }
        let host = head.headers.get("host").and_then(|it| it.to_str().ok());
        for server_name in [None, host] {
            let selected = table.select_flow(client, server_name);
            if let SelectedFlow::Rule { rule, ordinal, .. } = selected {
                assert!(ordinal < table.rules());
                let _ = pick(&rule.backends, u64::MAX);
            }
        }
    }
}

fn apply(rule: &Rule, head: &Parts, place: Place<'_>) {
    for random in [0, u64::MAX / 2, u64::MAX] {
        let mut changed = head.clone();
        let answer = apply_to_request(&rule.filters, &mut changed, place);
        let backend = pick(&rule.backends, random);
        if let (None, Some(backend)) = (&answer, backend) {
            assert!(backend.weight > 0);
            let _ = apply_to_request(&backend.filters, &mut changed, place);
        }
        let framing = |head: &Parts| head.headers.get("content-length").cloned();
        assert_eq!(
            framing(&changed),
            framing(head),
            "a route changed the framing"
        );
        let (mut response, ()) = http::Response::new(()).into_parts();
        apply_to_response(&rule.filters, &mut response);
    }
}

/// Reads a head: leniently, as it is not what is tested.
fn read(bytes: &[u8]) -> Option<Parts> {
    let mut lines = bytes.split(|it| *it == b'\n');
    let first = std::str::from_utf8(lines.next()?).ok()?;
    let mut words = first.split_ascii_whitespace();
    let mut request = Request::new(());
    *request.method_mut() = words.next()?.parse::<Method>().ok()?;
    *request.uri_mut() = words.next()?.parse::<Uri>().ok()?;
    for line in lines {
        let line = line.trim_ascii();
        let Some(colon) = line.iter().position(|it| *it == b':') else {
            continue;
        };
        let (name, value) = line.split_at(colon);
        let name = HeaderName::from_bytes(name);
        if let (Ok(name), Ok(value)) = (name, HeaderValue::from_bytes(value[1..].trim_ascii())) {
            request.headers_mut().append(name, value);
        }
    }
    Some(request.into_parts().0)
}

fn of_everything() -> RouteTable {
    let text = |it: &str| TextMatch::Exact(it.to_owned());
    let pattern = |it: &str| Pattern::new(it).expect("a pattern");
    let of_path = |path| HttpMatch {
        path,
        ..HttpMatch::any()
    };
    let demanding = HttpMatch {
        path: PathMatch::Prefix(PathPrefix::new("/shop")),
        method: Some(Method::GET),
        headers: vec![HeaderMatch {
            name: "x-a".parse().expect("a header"),
            value: TextMatch::Regex(pattern("(a|b)*c?")),
        }],
        query: vec![QueryMatch {
            name: "q r".to_owned(),
            value: TextMatch::Regex(pattern("[^x]*")),
        }],
    };
    let matches = [
        of_path(PathMatch::Exact("/shop/cart".to_owned())),
        of_path(PathMatch::Prefix(PathPrefix::new("/shop"))),
        demanding,
        of_path(PathMatch::Regex(pattern("(?i)/v[0-9]{1,3}/.*"))),
        of_path(PathMatch::grpc(None, Some(text("Get")))),
    ];
    let edit = HeaderEdit::new(
        vec![(
            "host".parse().expect("a header"),
            "h".parse().expect("a value"),
        )],
        vec![(
            "x-b".parse().expect("a header"),
            "v".parse().expect("a value"),
        )],
        vec!["x-a".parse().expect("a header")],
    );
    let filters = [
        Filter::RequestHeaders(edit.expect("allowed")),
        Filter::Rewrite(Rewrite {
            hostname: Some(hostname("new.example").expect("a host")),
            path: Some(PathRewrite::prefix("/x").expect("a path")),
        }),
    ];
    let rules = matches.into_iter().map(|it| Rule {
        name: None,
        matches: vec![it],
        filters: filters.to_vec(),
        backends: vec![],
        reliability: None,
    });
    let route = Route {
        name: RouteName {
            name: "shop/route".parse().expect("a name"),
            kind: RouteKind::Http,
        },
        created: None,
        rules: RouteRules::Http(rules.collect()),
    };
    RouteTable::new("shop/web:80".parse().expect("a name"), vec![route])
}
