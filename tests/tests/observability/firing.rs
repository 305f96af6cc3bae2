//! What each alert fires for, and that it does not where all is well: `promtool test rules`.

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{all_rules, promtool, rules_file};

/// An alert; series with their values in the notation of promtool, one a minute; and after how many minutes it fires.
type Case = (&'static str, &'static [(&'static str, &'static str)], u32);

const CASES: [Case; 16] = [
    (
        "WeftAgentDown",
        &[(r#"up{job="weft-system/weft-agent",node="one"}"#, "1x4 0x20")],
        11,
    ),
    (
        "WeftAgentNotReady",
        &[(r#"weft_ready{node="one"}"#, "0x20")],
        6,
    ),
    (
        "WeftPodsNotEnrolled",
        &[(
            r#"weft_pods_waiting{node="one",reason="not_found"}"#,
            "2x20",
        )],
        11,
    ),
    (
        "WeftAgentDisconnected",
        &[(r#"weft_control_connected{node="one"}"#, "0x20")],
        11,
    ),
    (
        "WeftHooksDetached",
        &[(r#"weft_hooks_repaired_total{node="one"}"#, "0x4 1x20")],
        6,
    ),
    (
        "WeftRedirectMisses",
        &[(
            r#"weft_refused_total{node="one",namespace="shop",pod="web-1",reason="redirect_miss"}"#,
            "0x4 3x20",
        )],
        6,
    ),
    (
        "WeftLimitReached",
        &[(
            r#"weft_refused_total{node="one",namespace="shop",pod="web-1",reason="too_many_flows"}"#,
            "0x4 3x20",
        )],
        6,
    ),
    (
        "WeftKernelMapFull",
        &[
            (r#"weft_map_entries{node="one",map="pending"}"#, "90x20"),
            (r#"weft_map_capacity{node="one",map="pending"}"#, "100x20"),
        ],
        6,
    ),
    (
        "WeftPanics",
        &[(r#"weft_panics_total{node="one"}"#, "0x4 1x20")],
        6,
    ),
    (
        "WeftCertificateExpiring",
        &[(
            r#"identity_cert_expiration_timestamp_seconds{node="one",identity="spiffe://td/ns/shop/sa/web"}"#,
            "14000x20",
        )],
        6,
    ),
    (
        "WeftCertificateMissing",
        &[(
            r#"weft_certificate_held{node="one",identity="spiffe://td/ns/shop/sa/web"}"#,
            "0x20",
        )],
        6,
    ),
    (
        "WeftIssuerExpiring",
        &[("weft_controller_issuer_not_after_seconds", "600000x20")],
        16,
    ),
    ("WeftControllerDown", &[], 6),
    (
        "WeftConfigurationProblems",
        &[("weft_controller_problems", "1x20")],
        16,
    ),
    (
        "WeftSuccessRateLow",
        &[
            (
                r#"response_total{namespace="shop",deployment="web",pod="web-1",direction="inbound",classification="success"}"#,
                "0+540x20",
            ),
            (
                r#"response_total{namespace="shop",deployment="web",pod="web-1",direction="inbound",classification="failure"}"#,
                "0+60x20",
            ),
            (
                r#"request_total{namespace="shop",deployment="web",pod="web-1",direction="inbound"}"#,
                "0+600x20",
            ),
        ],
        14,
    ),
    (
        "WeftTrafficDenied",
        &[
            (
                r#"inbound_tcp_authz_deny_total{namespace="shop",pod="web-1",srv_name="web",authz_name="default:deny"}"#,
                "0+60x20",
            ),
            (
                r#"tcp_open_total{namespace="shop",pod="web-1",direction="inbound"}"#,
                "0x20",
            ),
        ],
        14,
    ),
];

/// All that alerts look at, of a mesh in which all is well.
const WELL: [(&str, &str); 14] = [
    (r#"up{job="weft-agent",node="one"}"#, "1x30"),
    (r#"weft_ready{node="one"}"#, "1x30"),
    (
        r#"weft_pods_waiting{node="one",reason="not_started"}"#,
        "3x30",
    ),
    (r#"weft_control_connected{node="one"}"#, "1x30"),
    (r#"weft_hooks_repaired_total{node="one"}"#, "2x30"),
    (
        r#"weft_refused_total{node="one",namespace="shop",pod="web-1",reason="denied"}"#,
        "0+1x30",
    ),
    (r#"weft_map_entries{node="one",map="pending"}"#, "9x30"),
    (r#"weft_map_capacity{node="one",map="pending"}"#, "100x30"),
    (r#"weft_panics_total{node="one"}"#, "1x30"),
    (
        r#"identity_cert_expiration_timestamp_seconds{node="one",identity="a"}"#,
        "90000x30",
    ),
    (r#"weft_certificate_held{node="one",identity="a"}"#, "1x30"),
    ("weft_controller_issuer_not_after_seconds", "9000000x30"),
    ("weft_controller_problems", "0x30"),
    (
        r#"response_total{namespace="shop",deployment="web",pod="web-1",direction="inbound",classification="success"}"#,
        "0+600x30",
    ),
];
const CONTROLLER: (&str, &str) = ("weft_controller_complete", "1x30");

pub(super) fn each_alert() -> Result<()> {
    let rules = all_rules()?;
    let alerts = rules.iter().filter_map(|it| it["alert"].as_str());
    let alerts: BTreeSet<&str> = alerts.collect();
    let cases: BTreeSet<&str> = CASES.iter().map(|it| it.0).collect();
    ensure!(alerts == cases, "alerts {alerts:?}, cases {cases:?}");
    let input = |series: &[(&str, &str)]| -> Vec<Value> {
        let series = series.iter();
        series
            .map(|(series, values)| json!({"series": series, "values": values}))
            .collect()
    };
    // Which alerts fire then, and how many of each.
    let firing = |minutes: u32, expected: Value| {
        json!({
            "expr": r#"count by (alertname) (ALERTS{alertstate="firing"})"#,
            "eval_time": format!("{minutes}m"), "exp_samples": expected,
        })
    };
    let mut tests = vec![json!({
        "interval": "1m",
        "input_series": input(&[&WELL[..], &[CONTROLLER]].concat()),
        "promql_expr_test": [firing(25, json!([]))],
    })];
    for (name, series, minutes) in CASES {
        let controller: &[(&str, &str)] = match name {
            "WeftControllerDown" => &[],
            _ => &[CONTROLLER],
        };
        let fires = json!([{"labels": format!("{{alertname=\"{name}\"}}"), "value": 1}]);
        tests.push(json!({
            "name": name,
            "interval": "1m",
            "input_series": input(&[series, controller].concat()),
            "promql_expr_test": [firing(minutes, fires)],
        }));
    }
    let all = json!({"rule_files": [rules_file()], "evaluation_interval": "1m", "tests": tests});
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("alerts.yaml");
    fs::write(&file, serde_json::to_string_pretty(&all)?)?;
    let said = promtool(&["test", "rules", &file.display().to_string()]);
    said.map(drop)
        .context("an alert does not fire, or another one does")
}
