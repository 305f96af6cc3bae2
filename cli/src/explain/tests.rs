//! What agents say, and how it is shown.

use clap::Parser;

use super::*;
use crate::command::{Cli, Command};

const OUTBOUND: &str = r#"{"steps": [
{"step": "knowledge", "state": "ok", "fact": "what this agent knows is current", "object": null, "details": [], "values": {"current": true}},
{"step": "pod", "state": "ok", "fact": "shop/order is in the mesh, as spiffe://td/ns/shop/sa/order", "object": "Pod/shop/order", "details": [], "values": {}},
{"step": "endpoint", "state": "warning", "fact": "shop/web has 2 endpoints, 1 of them ready\u001b[2J", "object": "Service/shop/web",
 "details": ["10.1.0.3:8080 shop/web-1, on two: ready", "10.1.0.4:8080 shop/web-2, on two: ejected"], "values": {}}
], "outcome": "continues", "next": {"node": "two", "pod": {"namespace": "shop", "name": "web-1"}, "to": "10.1.0.3:8080",
 "from": "10.1.0.2", "identity": "spiffe://td/ns/shop/sa/order", "opaque_by": null}}"#;

const INBOUND: &str = r#"{"steps": [
{"step": "pod", "state": "ok", "fact": "shop/web-1 is in the mesh", "object": "Pod/shop/web-1", "details": [], "values": {}},
{"step": "policy", "state": "error", "fact": "not let in: default:deny", "object": "Server/shop/web", "details": [], "values": {"allowed": false}}
], "outcome": "refused", "next": null}"#;

fn read(text: &str) -> Explanation {
    serde_json::from_str(text).expect("an explanation")
}

/// A report, and whom it would ask next.
fn begun() -> (Report, Option<Next>) {
    let mut report = Report {
        pod: "shop/order".to_owned(),
        to: "web:80".to_owned(),
        request: None,
        outcome: Said::Unknown,
        missing: None,
        ends: vec![],
    };
    let (node, pod) = ("one".to_owned(), "shop/order".to_owned());
    let next = report.take("outbound", node, pod, read(OUTBOUND));
    (report, next)
}

fn whole() -> Report {
    let (mut report, next) = begun();
    let next = next.expect("it goes on");
    assert_eq!(next.from, "10.1.0.2");
    let more = report.take(
        "inbound",
        "two".to_owned(),
        "shop/web-1".to_owned(),
        read(INBOUND),
    );
    assert!(more.is_none());
    report
}

fn table(report: &Report) -> String {
    let mut text = vec![];
    report.write(&mut text, false).expect("a vector");
    String::from_utf8(text).expect("text")
}

#[test]
fn each_step_is_a_line_with_what_decides_it() {
    let report = whole();
    assert_eq!(report.outcome(), Outcome::Bad);
    assert_eq!(
        table(&report),
        "\
shop/order, one
√ knowledge: what this agent knows is current
√ pod: shop/order is in the mesh, as spiffe://td/ns/shop/sa/order [Pod/shop/order]
‼ endpoint: shop/web has 2 endpoints, 1 of them ready\u{fffd}[2J [Service/shop/web]
    10.1.0.3:8080 shop/web-1, on two: ready
    10.1.0.4:8080 shop/web-2, on two: ejected

shop/web-1, two
√ pod: shop/web-1 is in the mesh [Pod/shop/web-1]
× policy: not let in: default:deny [Server/shop/web]

shop/order cannot connect to web:80
"
    );
}

#[test]
fn programs_get_the_same() {
    let mut text = vec![];
    output::json(&mut text, &whole()).expect("a vector");
    let read: Value = serde_json::from_slice(&text).expect("JSON");
    assert_eq!(read["outcome"], "refused");
    let expected: Value = serde_json::json!({
        "side": "inbound", "node": "two", "pod": "shop/web-1",
        "steps": [
            {"step": "pod", "state": "ok", "fact": "shop/web-1 is in the mesh", "object": "Pod/shop/web-1",
             "details": [], "values": {}},
            {"step": "policy", "state": "error", "fact": "not let in: default:deny", "object": "Server/shop/web",
             "details": [], "values": {"allowed": false}},
        ],
    });
    assert_eq!(read["ends"][1], expected);
    let keys = read.as_object().expect("an object").keys();
    let mut keys: Vec<_> = keys.map(String::as_str).collect();
    keys.sort_unstable();
    assert_eq!(keys, ["ends", "missing", "outcome", "pod", "request", "to"]);
}

#[test]
fn without_the_other_end_nothing_is_sure() {
    let (mut report, _) = begun();
    report.missing = Some("no agent of two".to_owned());
    assert_eq!(report.outcome(), Outcome::Unknown);
    let table = table(&report);
    let end = "\n‼ the other end is missing: no agent of two\n\nit cannot be said whether shop/order may connect to web:80\n";
    assert!(table.ends_with(end), "{table}");
}

#[test]
fn pods_are_named_as_kubectl_has_them() {
    for (text, namespace, name) in [
        ("shop/order", "shop", "order"),
        ("order", "default", "order"),
        ("pod/order", "default", "order"),
        ("po/order", "default", "order"),
    ] {
        let read = pod(text, "default").expect("a pod");
        assert_eq!(read, (namespace, name), "{text}");
    }
    for bad in ["", "/", "shop/", "/order", "a/b/c"] {
        assert!(pod(bad, "default").is_err(), "{bad:?}");
    }
    let read = Cli::try_parse_from(["weft", "explain", "pod/a", "-n", "shop", "b:80"]);
    let Command::Explain(asked) = read.expect("a command line").command else {
        panic!("another command");
    };
    assert_eq!(
        (asked.to.as_str(), asked.namespace.as_deref()),
        ("b:80", Some("shop"))
    );
}

/// The question that a command line is.
fn asked(arguments: &[&str]) -> Explain {
    let all = ["weft", "explain", "shop/order", "web:80"];
    let all = all.iter().chain(arguments);
    match Cli::try_parse_from(all).expect("a command").command {
        Command::Explain(explain) => explain,
        _ => panic!("another command"),
    }
}

#[test]
fn a_request_is_what_is_said_of_it() {
    assert!(Request::of(&asked(&[])).is_none());
    assert!(Request::of(&asked(&["--sni", "web.example"])).is_none());
    for (arguments, expected) in [
        (&["--method", "PUT"][..], ("PUT", "/", &[][..])),
        (&["--path", "/a?b=1"], ("GET", "/a?b=1", &[])),
        (
            &["-H", "x-a: 1", "-H", "x-a:2"],
            ("GET", "/", &["x-a: 1", "x-a:2"]),
        ),
        (
            &["--grpc", "--path", "/shop.Orders/List"],
            (
                "POST",
                "/shop.Orders/List",
                &["content-type: application/grpc"],
            ),
        ),
    ] {
        let request = Request::of(&asked(arguments)).expect("a request");
        let (method, path, headers) = expected;
        assert_eq!(
            (request.method.as_str(), request.path.as_str()),
            (method, path)
        );
        assert_eq!(request.headers, headers);
    }
    let both = ["weft", "explain", "a/b", "c:1", "--sni", "x", "--path", "/"];
    assert!(Cli::try_parse_from(both).is_err());
}

const REQUEST_OUT: &str = r#"{"steps": [
{"step": "pod", "state": "ok", "fact": "shop/order is in the mesh", "object": "Pod/shop/order", "details": [], "values": {}},
{"step": "route", "state": "ok", "fact": "GET /cart is rule 2 of the HTTPRoute shop/web", "object": "HTTPRoute/shop/web",
 "details": ["weight 9, 90 %: Service shop/web:80, 2 of 2 endpoints ready",
 "not HTTPRoute shop/web, rule 1: it asks for header x-canary"], "values": {"rule": 2}},
{"step": "terms", "state": "ok", "fact": "it may take 5 s, and is sent once", "object": "HTTPRoute/shop/web",
 "details": ["all of it may take 5 s"], "values": {}}
], "outcome": "OUTCOME", "next": null}"#;

#[test]
fn a_request_is_told_with_its_rule_and_terms() {
    for (outcome, code, summary) in [
        (
            "reaches",
            Outcome::Good,
            "shop/order may ask web:80 for GET /cart",
        ),
        (
            "answered",
            Outcome::Good,
            "shop/order may ask web:80 for GET /cart, and the mesh answers it",
        ),
        (
            "refused",
            Outcome::Bad,
            "shop/order cannot ask web:80 for GET /cart",
        ),
    ] {
        let mut report = Report {
            pod: "shop/order".to_owned(),
            to: "web:80".to_owned(),
            request: Request::of(&asked(&["--path", "/cart"])),
            outcome: Said::Unknown,
            missing: None,
            ends: vec![],
        };
        let explained = read(&REQUEST_OUT.replace("OUTCOME", outcome));
        let (node, pod) = ("one".to_owned(), "shop/order".to_owned());
        assert!(report.take("outbound", node, pod, explained).is_none());
        assert_eq!(report.outcome(), code);
        assert_eq!(
            table(&report),
            format!(
                "\
shop/order, one
√ pod: shop/order is in the mesh [Pod/shop/order]
√ route: GET /cart is rule 2 of the HTTPRoute shop/web [HTTPRoute/shop/web]
    weight 9, 90 %: Service shop/web:80, 2 of 2 endpoints ready
    not HTTPRoute shop/web, rule 1: it asks for header x-canary
√ terms: it may take 5 s, and is sent once [HTTPRoute/shop/web]
    all of it may take 5 s

{summary}
"
            )
        );
    }
}
