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
    assert_eq!(keys, ["ends", "missing", "outcome", "pod", "to"]);
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
