use clap::Parser;
use serde_json::json;

use super::facts::{AgentFacts, AgentSaid, Clock, Controller, Said, ShownNotice};
use super::*;
use crate::command::{Cli, Command};
use crate::controller::AgentStatus;
use crate::extension::{Extension, Hider};
use crate::metrics::Scrape;
use crate::time::now_ms;

const DAY: u64 = 24 * 3600 * 1000;

fn check(arguments: &[&str]) -> Check {
    let all = ["weft", "check"].iter().chain(arguments);
    match Cli::try_parse_from(all).expect("a command line").command {
        Command::Check(check) => check,
        other => panic!("{other:?}"),
    }
}

fn agent(node: &str) -> AgentStatus {
    let status = json!({
        "node": node, "incarnation": "ff", "version": env!("CARGO_PKG_VERSION"), "rejected": 0, "inspectable": true,
    });
    serde_json::from_value(status).expect("an agent")
}

const STILL: Clock = Clock {
    ahead_ms: 20,
    give_or_take_ms: 30,
};

/// A mesh in which all is well.
fn good() -> Facts {
    let now = now_ms();
    let status = json!({
        "version": env!("CARGO_PKG_VERSION"), "now_ms": now, "source": "/manifests", "lacks": null,
        "trust_domain": "cluster.local", "issuer_not_after_ms": now + 300 * DAY + 1000,
        "roots": [{"subject": "CN=root", "not_after_ms": now + 3000 * DAY + 1000}], "nodes": ["one"],
    });
    let readiness = json!({
        "ready": true, "reasons": [], "warnings": [], "connected": true, "knowledge_age_seconds": 0.0,
        "hooks": null, "now_ms": now,
    });
    let pods = json!([
        {"namespace": "shop", "name": "web", "state": "enrolled", "identity": "spiffe://cluster.local/ns/shop/sa/web"},
    ]);
    let ends = (now + DAY) / 1000;
    let metrics = format!(
        "weft_refused_total{{namespace=\"shop\",pod=\"web\",reason=\"denied\"}} 7\n\
         weft_panics_total 0\n\
         identity_cert_expiration_timestamp_seconds{{identity=\"spiffe://cluster.local/ns/shop/sa/web\"}} {ends}\n"
    );
    Facts {
        nodes: vec![],
        namespace: None,
        extensions: vec![],
        controllers: vec![Controller {
            place: "/run/weft/controller.sock".to_owned(),
            said: Ok(Said {
                status: serde_json::from_value(status).expect("a status"),
                problems: vec![],
                notices: vec![],
                agents: vec![agent("one")],
                clock: STILL,
            }),
        }],
        agents: vec![AgentFacts {
            status: agent("one"),
            said: Ok(AgentSaid {
                readiness: serde_json::from_value(readiness).expect("readiness"),
                pods: serde_json::from_value(pods).expect("pods"),
                scrape: Scrape::read(&metrics, |_| true),
                clock: STILL,
            }),
        }],
    }
}

fn control(facts: &mut Facts) -> &mut Said {
    facts.controllers[0].said.as_mut().expect("it answers")
}

fn said(facts: &mut Facts) -> &mut AgentSaid {
    facts.agents[0].said.as_mut().expect("it answers")
}

/// What is not as it should be once something is changed.
fn found(arguments: &[&str], change: impl FnOnce(&mut Facts)) -> Vec<(&'static str, State)> {
    let mut facts = good();
    change(&mut facts);
    let report = Report::new(&check(arguments), &facts);
    let bad = report.checks.iter().filter(|it| it.state != State::Ok);
    let bad: Vec<_> = bad.map(|it| (it.check, it.state)).collect();
    assert_eq!(
        report.ok,
        bad.iter().all(|(_, state)| *state != State::Error)
    );
    bad
}

#[test]
fn each_check_finds_what_it_is_for() {
    use State::{Error, Warning};
    let one = |change: fn(&mut Facts)| found(&[], change);
    assert_eq!(one(|_| {}), []);
    for (expected, change) in [
        (
            ("controller-ready", Error),
            (|it| control(it).status.lacks = Some("no".to_owned())) as fn(&mut Facts),
        ),
        (("controller-version", Warning), |it| {
            control(it).status.version = "9.9.9".to_owned();
            it.agents[0].status.version = "9.9.9".to_owned();
        }),
        (("configuration-problems", Warning), |it| {
            let problem = json!({"file": "a.yaml", "document": 1, "object": "Server shop/a", "field": "spec", "reason": "bad", "effect": "denies"});
            control(it).problems = vec![serde_json::from_value(problem).expect("a problem")];
        }),
        (("other-meshes", Warning), |it| {
            let notice = json!({"namespace": "shop", "pods": 4, "examples": ["a", "b"], "reason": "proxy", "effect": "left"});
            let notice: ShownNotice = serde_json::from_value(notice).expect("a notice");
            assert_eq!(notice.to_string(), "shop: 4 (a, b, ...): proxy: left");
            control(it).notices = vec![notice];
        }),
        (("issuer", Error), |it| {
            control(it).status.issuer_not_after_ms = None
        }),
        (("issuer", Error), |it| {
            control(it).status.issuer_not_after_ms = Some(1)
        }),
        (("issuer", Warning), |it| {
            control(it).status.issuer_not_after_ms = Some(now_ms() + 2 * DAY);
        }),
        (("trust-roots", Error), |it| {
            control(it).status.roots.clear()
        }),
        (("trust-roots", Warning), |it| {
            control(it).status.roots[0].not_after_ms = now_ms() + 2 * DAY;
        }),
        (("clocks", Error), |it| said(it).clock.ahead_ms = -7_000),
        (("clocks", Error), |it| control(it).clock.ahead_ms = 7_000),
        (("agents-connected", Error), |it| {
            control(it).status.nodes.insert("two".to_owned());
        }),
        (("agents-answer", Error), |it| {
            it.agents[0].said = Err("slow".to_owned())
        }),
        (("agents-version", Warning), |it| {
            it.agents[0].status.version = "9.9.9".to_owned()
        }),
        (("kernel-programs", Error), |it| {
            said(it).readiness.hooks = Some("twice".to_owned())
        }),
        (("kernel-programs", Warning), |it| {
            said(it).scrape = Scrape::read("weft_hooks_repaired_total 2\n", |_| true);
        }),
        (("pods-enrolled", Error), |it| {
            said(it).pods[0].identity = None
        }),
        (("control-stream", Warning), |it| {
            said(it).readiness.connected = false
        }),
        (("control-stream", Warning), |it| {
            said(it).readiness.knowledge_age_seconds = Some(90.0)
        }),
        (("control-stream", Warning), |it| {
            said(it).readiness.knowledge_age_seconds = None
        }),
        (("workload-certificates", Error), |it| {
            let metrics = "identity_cert_expiration_timestamp_seconds{identity=\"x\"} 5\n";
            said(it).scrape = Scrape::read(metrics, |_| true);
        }),
        (("redirect-misses", Warning), |it| {
            let metrics = "weft_refused_total{reason=\"redirect_miss\"} 2\n";
            said(it).scrape = Scrape::read(metrics, |_| true);
        }),
        (("agents-healthy", Error), |it| {
            said(it).readiness.ready = false;
            said(it).readiness.reasons = vec!["because".to_owned()];
        }),
        (("agents-healthy", Warning), |it| {
            said(it).readiness.warnings = vec!["soon".to_owned()]
        }),
        (("agents-healthy", Warning), |it| {
            said(it).scrape = Scrape::read("weft_panics_total 1\n", |_| true);
        }),
    ] {
        assert_eq!(one(change), [expected]);
    }
    let expiry = found(&["--fail-on-expiry", "400d"], |_| {});
    assert_eq!(expiry, [("issuer", Error)]);
}

#[test]
fn without_a_controller_nothing_else_is_said() {
    let found = found(&[], |it| {
        it.controllers[0].said = Err("nobody".to_owned());
        it.agents.clear();
    });
    assert_eq!(found, [("controller-reachable", State::Error)]);
}

#[test]
fn every_check_has_a_heading_with_cause_and_cure() {
    let page = include_str!("../../../docs/checks.md");
    let headings = page.lines().filter_map(|it| it.strip_prefix("### "));
    let headings: Vec<&str> = headings.collect();
    let all: Vec<&str> = CHECKS.iter().chain(&BEFORE).map(|it| it.0).collect();
    assert_eq!(
        headings, all,
        "docs/checks.md has a heading for each check, in their order"
    );
    let names: Vec<&str> = CHECKS.iter().map(|(name, _)| *name).collect();
    let report = Report::new(&check(&[]), &good());
    let run: Vec<&str> = report.checks.iter().map(|it| it.check).collect();
    assert_eq!(run, names, "all checks are run, in their order");
}

#[test]
fn it_is_told_line_by_line() {
    let mut facts = good();
    said(&mut facts).readiness.hooks = Some("weft_connect4 is attached twice".to_owned());
    control(&mut facts).clock.ahead_ms = 61_000;
    let report = Report::new(&check(&[]), &facts);
    let text = |from: State| {
        let mut text = vec![];
        report.write(&mut text, false, from).expect("a vector");
        String::from_utf8(text).expect("text")
    };
    assert_eq!(
        text(State::Warning),
        "\
identity
× 1 clocks are more than 5 s off
    the controller at /run/weft/controller.sock is +61.0 s ahead of this machine
    see docs/checks.md#clocks

agents
× on 1 nodes kernel programs are not as they should be
    one: weft_connect4 is attached twice
    see docs/checks.md#kernel-programs

something is wrong
"
    );
    let all = text(State::Ok);
    for line in [
        "control plane\n√ the controller answers at /run/weft/controller.sock\n",
        "√ the issuer's certificate ends in 300 days\n",
        "√ all 1 meshed pods are enrolled\n",
    ] {
        assert!(all.contains(line), "no {line:?} in {all}");
    }
    let json = serde_json::to_value(&report).expect("JSON");
    assert_eq!(json["ok"], false);
    assert_eq!(json["checks"][0]["check"], "controller-reachable");
    assert_eq!(json["checks"][7]["state"], "error");
}

#[test]
fn of_other_namespaces_pods_nothing_is_asked() {
    let of = |namespace: &str, arguments: &[&str]| {
        found(arguments, |facts| {
            facts.namespace = Some(namespace.to_owned());
            said(facts).pods[0].identity = None;
            let metrics = "identity_cert_expiration_timestamp_seconds{identity=\"spiffe://td/ns/shop/sa/web\"} 5\n\
                weft_refused_total{namespace=\"shop\",reason=\"redirect_miss\"} 2\n";
            said(facts).scrape = Scrape::read(metrics, |_| true);
            control(facts).status.roots.clear();
        })
    };
    let of_control = ("trust-roots", State::Error);
    let of_pods = [
        ("pods-enrolled", State::Error),
        ("workload-certificates", State::Error),
        ("redirect-misses", State::Warning),
    ];
    assert_eq!(of("shop", &[]), [&[of_control][..], &of_pods].concat());
    assert_eq!(of("other", &[]), [of_control]);
    // Nor of controllers, if it is about what serves pods.
    assert_eq!(of("shop", &["--proxy"]), of_pods);
    assert_eq!(of("other", &["--proxy"]), []);
}

#[test]
fn without_a_controller_nobody_serves_pods() {
    let found = found(&["--proxy"], |it| {
        it.controllers[0].said = Err("nobody".to_owned());
        it.agents.clear();
    });
    assert_eq!(found, [("controller-reachable", State::Error)]);
}

#[test]
fn extensions_are_listed() {
    let facts = |hidden_by| Facts {
        extensions: vec![Extension {
            name: "foo".to_owned(),
            path: "/bin/weft-foo".into(),
            hidden_by,
        }],
        ..good()
    };
    let finding = |hidden_by| {
        let report = Report::new(&check(&[]), &facts(hidden_by));
        report
            .checks
            .into_iter()
            .find(|it| it.check == "extensions")
    };
    let listed = finding(None).expect("a check");
    assert_eq!(listed.fact, "extensions are on PATH: foo");
    let hidden = finding(Some(Hider::Command)).expect("a check");
    assert_eq!(hidden.state, State::Warning);
    assert_eq!(
        hidden.details,
        ["/bin/weft-foo: weft foo is a command of its own"]
    );
}

#[test]
fn a_node_that_is_asked_about_needs_an_agent() {
    let of = |nodes: &[&str], change: fn(&mut Facts)| {
        found(&[], |facts| {
            facts.nodes = nodes.iter().map(|it| (*it).to_owned()).collect();
            facts
                .agents
                .retain(|it| facts.nodes.contains(&it.status.node));
            change(facts);
        })
    };
    assert_eq!(of(&["one"], |_| {}), []);
    let missing = [("agents-connected", State::Error)];
    assert_eq!(of(&["two"], |_| {}), missing);
    assert_eq!(of(&["one", "two"], |_| {}), missing);
    // What other nodes lack is not asked.
    let other = |facts: &mut Facts| control(facts).status.nodes.extend(["three".to_owned()]);
    assert_eq!(of(&["one"], other), []);
}
