use std::fs;
use std::path::Path;

use clap::Parser;

use super::*;
use crate::command::{Cli, Command, PolicyCommand};

/// A shop as a repository has it: no pod, no address, no status.
const SHOP: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {weft.dev/mesh: enabled}}
---
apiVersion: v1
kind: Namespace
metadata: {name: old}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: order, namespace: shop}
spec:
  selector: {matchLabels: {app: order}}
  template:
    metadata: {labels: {app: order}}
    spec:
      serviceAccountName: order
      containers: [{name: main, image: order}]
---
apiVersion: batch/v1
kind: CronJob
metadata: {name: report, namespace: shop}
spec:
  schedule: "0 0 * * *"
  jobTemplate:
    spec:
      template:
        spec:
          serviceAccountName: report
          restartPolicy: Never
          containers: [{name: main, image: report}]
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: legacy, namespace: old}
spec:
  template:
    metadata: {labels: {app: legacy}}
    spec: {containers: [{name: main, image: legacy}]}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: payment, namespace: shop}
spec:
  selector: {matchLabels: {app: payment}}
  template:
    metadata: {labels: {app: payment}}
    spec:
      serviceAccountName: payment
      containers:
      - {name: main, image: payment, ports: [{name: http, containerPort: 8080}, {name: admin, containerPort: 9090}]}
---
apiVersion: v1
kind: Service
metadata: {name: payment, namespace: shop}
spec:
  selector: {app: payment}
  ports: [{name: web, port: 80, targetPort: http}]
---
apiVersion: policy.linkerd.io/v1beta1
kind: Server
metadata: {name: payment-api, namespace: shop}
spec:
  podSelector: {matchLabels: {app: payment}}
  port: http
  proxyProtocol: HTTP/1
---
apiVersion: policy.linkerd.io/v1alpha1
kind: AuthorizationPolicy
metadata: {name: payment-access, namespace: shop}
spec:
  targetRef: {group: policy.linkerd.io, kind: Server, name: payment-api}
  requiredAuthenticationRefs:
  - {kind: ServiceAccount, name: order, namespace: shop}
---
apiVersion: policy.linkerd.io/v1beta1
kind: Server
metadata: {name: payment-admin, namespace: shop}
spec:
  podSelector: {matchLabels: {app: payment}}
  port: admin
  proxyProtocol: HTTP/1
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: read, namespace: shop}
spec:
  parentRefs: [{group: policy.linkerd.io, kind: Server, name: payment-admin}]
  rules:
  - matches: [{method: GET, path: {type: PathPrefix, value: /state}}]
---
apiVersion: policy.linkerd.io/v1alpha1
kind: AuthorizationPolicy
metadata: {name: readers, namespace: shop}
spec:
  targetRef: {group: gateway.networking.k8s.io, kind: HTTPRoute, name: read}
  requiredAuthenticationRefs:
  - {kind: ServiceAccount, name: report, namespace: shop}
"#;

fn parsed(arguments: &[&str]) -> PolicyTest {
    let all = ["weft", "policy", "test"].iter().chain(arguments);
    match Cli::try_parse_from(all).expect("a command line").command {
        Command::Policy(PolicyCommand::Test(test)) => test,
        other => panic!("{other:?}"),
    }
}

fn asked(folder: &Path, arguments: &[&str]) -> Result<Report, PolicyError> {
    let folder = folder.display().to_string();
    let all: Vec<&str> = ["-f", &folder, "-n", "shop"]
        .into_iter()
        .chain(arguments.iter().copied())
        .collect();
    report(&parsed(&all))
}

fn shop(more: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    fs::write(folder.path().join("shop.yaml"), SHOP).expect("written");
    fs::write(folder.path().join("more.yaml"), more).expect("written");
    folder
}

fn answer(folder: &Path, arguments: &[&str]) -> Decision {
    let report = asked(folder, arguments).expect("an answer");
    report.results.into_iter().next().expect("one").decision
}

#[test]
fn templates_of_pods_are_clients_and_servers() {
    let folder = shop("");
    for (from, to, port, expected, by) in [
        (
            "deploy/order",
            "deploy/payment",
            "8080",
            Word::Allow,
            "shop/payment-access",
        ),
        (
            "deploy/order",
            "deploy/payment",
            "http",
            Word::Allow,
            "shop/payment-access",
        ),
        (
            "deploy/order",
            "svc/payment",
            "80",
            Word::Allow,
            "shop/payment-access",
        ),
        (
            "deploy/order",
            "svc/payment",
            "web",
            Word::Allow,
            "shop/payment-access",
        ),
        (
            "sa/order",
            "svc/payment",
            "80",
            Word::Allow,
            "shop/payment-access",
        ),
        (
            "spiffe://cluster.local/ns/shop/sa/order",
            "svc/payment",
            "80",
            Word::Allow,
            "shop/payment-access",
        ),
        (
            "spiffe://elsewhere/ns/shop/sa/order",
            "svc/payment",
            "80",
            Word::Deny,
            "default:deny",
        ),
        (
            "cronjob/report",
            "svc/payment",
            "80",
            Word::Deny,
            "default:deny",
        ),
        (
            "old/deploy/legacy",
            "svc/payment",
            "80",
            Word::Deny,
            "default:deny",
        ),
        (
            "10.1.1.1",
            "deploy/payment",
            "8080",
            Word::Deny,
            "default:deny",
        ),
        (
            "10.1.1.1",
            "deploy/payment",
            "7777",
            Word::Allow,
            "default:all-unauthenticated",
        ),
    ] {
        let decision = answer(folder.path(), &["--from", from, "--to", to, "--port", port]);
        assert_eq!(
            (decision.word, decision.by.as_str()),
            (expected, by),
            "{from} → {to}:{port}"
        );
    }
}

#[test]
fn requests_are_decided_by_the_routes_of_the_server() {
    let folder = shop("");
    let request = |from: &str, method: &str, path: &str| {
        let port = ["--to", "deploy/payment", "--port", "admin"];
        let of = ["--from", from, "--method", method, "--path", path];
        answer(folder.path(), &[&port[..], &of].concat())
    };
    let read = request("cronjob/report", "GET", "/state/today");
    assert_eq!(
        (read.word, read.by.as_str()),
        (
            Word::Allow,
            "shop/readers (route HTTPRoute.gateway.networking.k8s.io shop/read)"
        )
    );
    assert_eq!(
        request("cronjob/report", "DELETE", "/state/today").word,
        Word::Deny
    );
    assert_eq!(
        request("deploy/order", "GET", "/state/today").word,
        Word::Deny
    );
    // As a connection, nothing but requests is let through.
    let port = ["--to", "deploy/payment", "--port", "admin"];
    let connection = answer(
        folder.path(),
        &[&["--from", "cronjob/report"], &port[..]].concat(),
    );
    assert_eq!(connection.word, Word::Deny);
    assert!(
        connection.notes[0].contains("--method"),
        "{:?}",
        connection.notes
    );
}

#[test]
fn what_is_not_in_the_mesh_is_told() {
    let folder = shop("");
    let question = [
        "--from",
        "deploy/order",
        "--to",
        "old/deploy/legacy",
        "--port",
        "80",
    ];
    let decision = answer(folder.path(), &question);
    assert_eq!(decision.word, Word::Allow);
    assert!(
        decision.notes[0].contains("--assume-meshed"),
        "{:?}",
        decision.notes
    );
    let closed = ["--default-policy", "deny", "--assume-meshed"];
    let decision = answer(folder.path(), &[&question[..], &closed].concat());
    assert_eq!(
        (decision.word, decision.by.as_str()),
        (Word::Deny, "default:deny")
    );
    // Without being part of the mesh, the default is nobody's.
    let decision = answer(folder.path(), &[&question[..], &closed[..2]].concat());
    assert_eq!(decision.word, Word::Allow);
}

#[test]
fn network_policies_count_at_both_ends() {
    let folder = shop(
        r#"
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: order-out, namespace: shop}
spec:
  podSelector: {matchLabels: {app: order}}
  policyTypes: [Egress]
  egress: [{to: [{podSelector: {matchLabels: {app: nobody}}}]}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: legacy-in, namespace: old}
spec:
  podSelector: {}
  policyTypes: [Ingress]
  ingress: [{from: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: shop}}, podSelector: {matchLabels: {app: payment}}}]}]
"#,
    );
    let out = answer(
        folder.path(),
        &[
            "--from",
            "deploy/order",
            "--to",
            "svc/payment",
            "--port",
            "80",
        ],
    );
    assert_eq!(out.word, Word::Deny);
    assert!(
        out.by.contains("networkpolicy:shop/order-out"),
        "{}",
        out.by
    );
    let into = |from: &str| {
        let question = [
            "--from",
            from,
            "--to",
            "old/deploy/legacy",
            "--port",
            "80",
            "--assume-meshed",
        ];
        answer(folder.path(), &question)
    };
    let payment = into("deploy/payment");
    assert_eq!(payment.word, Word::Allow, "{payment:?}");
    let report = into("cronjob/report");
    assert_eq!(
        (report.word, report.by.as_str()),
        (Word::Deny, "networkpolicy:old/legacy-in")
    );
}

#[test]
fn many_questions_are_asked_at_once() {
    let folder = shop("");
    let cases = tempfile::tempdir().expect("a folder");
    let file = cases.path().join("cases.yaml");
    let write = |text: &str| fs::write(&file, text).expect("written");
    write(
        "- {name: orders are charged, from: deploy/order, to: svc/payment, port: 80, expect: allow}\n\
         - {from: 10.1.1.1, to: svc/payment, port: web, method: GET, expect: allow}\n",
    );
    let file = file.display().to_string();
    let report = asked(folder.path(), &["--cases", &file]).expect("answers");
    assert!(!report.ok);
    let oks: Vec<_> = report
        .results
        .iter()
        .map(|it| (it.name.as_str(), it.ok))
        .collect();
    assert_eq!(
        oks,
        [
            ("orders are charged", true),
            ("10.1.1.1 → svc/payment:web GET /", false)
        ]
    );
    let mut text = vec![];
    report.write(&mut text, false).expect("a vector");
    let text = String::from_utf8(text).expect("text");
    assert_eq!(
        text,
        "    QUESTION                           ANSWER                 DECIDED BY\n\
         √   orders are charged                 allow                  shop/payment-access\n\
         ×   10.1.1.1 → svc/payment:web GET /   deny, expected allow   default:deny\n"
    );
    let json = serde_json::to_value(&report).expect("JSON");
    assert_eq!(json["results"][1]["answer"], "deny");
    assert_eq!(json["results"][1]["expected"], "allow");
    assert_eq!(
        json["results"][0]["identity"],
        "spiffe://cluster.local/ns/shop/sa/order"
    );
    for bad in [
        "[]",
        "x: 1",
        "- {from: a}",
        "- {from: deploy/order, to: svc/payment, port: 80, expect: allow, metod: GET}",
    ] {
        write(bad);
        let refused = asked(folder.path(), &["--cases", &file]);
        assert!(matches!(refused, Err(PolicyError::Cases(_))), "{bad}");
    }
}

#[test]
fn what_cannot_be_trusted_is_no_answer() {
    let question = [
        "--from",
        "deploy/order",
        "--to",
        "svc/payment",
        "--port",
        "80",
    ];
    let refused = |more: &str, arguments: &[&str]| {
        let folder = shop(more);
        let refused = asked(folder.path(), arguments).expect_err("no answer");
        refused.to_string()
    };
    let twice = "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n";
    assert!(refused(twice, &question).contains("which one counts"));
    let template = "{{ if .Values.x }}\nkind: {{ .x }}\n";
    assert!(refused(template, &question).contains("helm template"));
    let typo = "apiVersion: policy.linkerd.io/v1beta1\nkind: Servr\nmetadata: {name: a}\n";
    assert!(refused(typo, &question).contains("no kind of"));
    let field = "apiVersion: policy.linkerd.io/v1beta1\nkind: Server\nmetadata: {name: a, namespace: shop}\n\
        spec: {podSelektor: {matchLabels: {a: b}}, podSelector: {}, port: 1}\n";
    assert!(refused(field, &question).contains("podSelektor"));
    let unknown = [
        "--from",
        "deploy/nobody",
        "--to",
        "svc/payment",
        "--port",
        "80",
    ];
    assert!(refused("", &unknown).contains("have no shop/deployment/nobody"));
    let port = [
        "--from",
        "deploy/order",
        "--to",
        "svc/payment",
        "--port",
        "81",
    ];
    assert!(refused("", &port).contains("it has 80"));
}

#[test]
fn strict_refuses_what_has_problems() {
    let idle = "apiVersion: policy.linkerd.io/v1alpha1\nkind: ServerAuthorization\nmetadata: {name: a, namespace: shop}\n";
    let folder = shop(idle);
    let question = [
        "--from",
        "deploy/order",
        "--to",
        "svc/payment",
        "--port",
        "80",
    ];
    let report = asked(folder.path(), &question).expect("an answer");
    assert!(report.ok && report.problems.len() == 1, "{report:?}");
    let report = asked(folder.path(), &[&question[..], &["--strict"]].concat()).expect("an answer");
    assert!(!report.ok);
}

/// Two Deployments behind a Service, of which one lets nobody in: whatever is expected, both have to be so.
#[test]
fn all_pods_behind_a_service_have_to_answer_as_expected() {
    let folder = shop(
        r#"
apiVersion: apps/v1
kind: Deployment
metadata: {name: open, namespace: shop}
spec:
  template:
    metadata: {labels: {tier: both}}
    spec: {containers: [{name: main, image: a}]}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: shut, namespace: shop}
spec:
  template:
    metadata: {labels: {tier: both, version: shut}}
    spec: {containers: [{name: main, image: b}]}
---
apiVersion: v1
kind: Service
metadata: {name: both, namespace: shop}
spec: {selector: {tier: both}, ports: [{port: 80, targetPort: 8080}]}
---
apiVersion: policy.linkerd.io/v1beta1
kind: Server
metadata: {name: shut, namespace: shop}
spec: {podSelector: {matchLabels: {version: shut}}, port: 8080}
"#,
    );
    let question = ["--from", "deploy/order", "--to", "svc/both", "--port", "80"];
    for (expected, shown) in [("allow", Word::Deny), ("deny", Word::Allow)] {
        let report = asked(
            folder.path(),
            &[&question[..], &["--expect", expected]].concat(),
        );
        let report = report.expect("an answer");
        assert!(!report.ok, "{expected}: {report:?}");
        let decision = &report.results[0].decision;
        assert_eq!(decision.word, shown, "{decision:?}");
        assert_eq!(decision.notes, ["1 of 2 pods would let it through"]);
    }
}

#[test]
fn an_address_that_nobody_said_decides_nothing() {
    let folder = shop(
        r#"
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: payment-in, namespace: shop}
spec:
  podSelector: {matchLabels: {app: payment}}
  ingress:
  - ports: [{port: 7001}]
    from: [{ipBlock: {cidr: 10.0.0.0/8}}]
  - ports: [{port: 7002}]
    from: [{ipBlock: {cidr: 0.0.0.0/0, except: [10.0.0.0/8]}}]
  - ports: [{port: 7003}]
    from: [{ipBlock: {cidr: 198.18.0.0/15}}]
  - ports: [{port: 7004}]
    from: [{podSelector: {}}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: report-out, namespace: shop}
spec:
  podSelector: {matchLabels: {app: order}}
  policyTypes: [Egress]
  egress:
  - ports: [{port: 7001}, {port: 7002}, {port: 7003}, {port: 7004}]
  - ports: [{port: 8080}]
    to: [{ipBlock: {cidr: 10.0.0.0/8}}]
"#,
    );
    let ask = |port: &str, more: &[&str]| {
        let question = [
            "--from",
            "deploy/order",
            "--to",
            "deploy/payment",
            "--port",
            port,
        ];
        asked(folder.path(), &[&question[..], more].concat())
    };
    let word = |port: &str, more: &[&str]| {
        let report = ask(port, more).expect("an answer");
        report.results[0].decision.word
    };
    let unknown = |port: &str, more: &[&str]| {
        let refused = ask(port, more).expect_err("no answer").to_string();
        assert!(refused.contains("it depends on addresses"), "{refused}");
        refused
    };
    for port in ["7001", "7002", "7003"] {
        assert!(unknown(port, &[]).contains("--address"));
    }
    assert_eq!(word("7004", &[]), Word::Allow);
    assert_eq!(word("7001", &["--pod-range", "10.42.0.0/16"]), Word::Allow);
    assert_eq!(word("7002", &["--pod-range", "10.42.0.0/16"]), Word::Deny);
    assert_eq!(word("7001", &["--address", "10.1.1.1"]), Word::Allow);
    assert_eq!(word("7001", &["--address", "11.1.1.1"]), Word::Deny);
    unknown("7001", &["--pod-range", "0.0.0.0/0"]);
    // Where the destination is counts on the way out.
    assert!(unknown("8080", &[]).contains("--to-address"));
    let denied = ask("8080", &["--to-address", "11.1.1.1"]).expect("an answer");
    let by = &denied.results[0].decision.by;
    assert!(by.contains("shop/report-out"), "{by}");
}

#[test]
fn the_clusters_networks_are_not_guessed() {
    let folder = shop("");
    let ask = |from: &str, more: &[&str]| {
        let question = ["--from", from, "--to", "deploy/payment", "--port", "7777"];
        let policy = ["--default-policy", "cluster-unauthenticated"];
        asked(folder.path(), &[&question[..], &policy, more].concat())
    };
    let word = |from: &str, more: &[&str]| {
        let report = ask(from, more).expect("an answer");
        report.results[0].decision.word
    };
    for from in ["deploy/order", "10.1.1.1"] {
        let refused = ask(from, &[]).expect_err("no answer").to_string();
        assert!(refused.contains("--pod-range"), "{refused}");
    }
    let range = ["--pod-range", "10.42.0.0/16"];
    assert_eq!(word("deploy/order", &range), Word::Allow);
    assert_eq!(word("10.42.1.1", &range), Word::Allow);
    assert_eq!(word("10.1.1.1", &range), Word::Deny);
    // Somebody with an identity may be anywhere.
    ask("sa/order", &range).expect_err("no answer");
}

#[test]
fn requests_are_decided_as_agents_see_them() {
    let routes = |opaque: &str| {
        format!(
            r#"
apiVersion: apps/v1
kind: Deployment
metadata: {{name: web, namespace: shop}}
spec:
  template:
    metadata: {{labels: {{app: web}}{opaque}}}
    spec: {{containers: [{{name: main, image: web}}]}}
---
apiVersion: policy.linkerd.io/v1beta1
kind: Server
metadata: {{name: web, namespace: shop}}
spec: {{podSelector: {{matchLabels: {{app: web}}}}, port: 8080}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: web, namespace: shop}}
spec:
  parentRefs: [{{group: policy.linkerd.io, kind: Server, name: web}}]
  hostnames: [web.example.org]
---
apiVersion: policy.linkerd.io/v1alpha1
kind: AuthorizationPolicy
metadata: {{name: web, namespace: shop}}
spec:
  targetRef: {{group: gateway.networking.k8s.io, kind: HTTPRoute, name: web}}
  requiredAuthenticationRefs: [{{kind: ServiceAccount, name: order}}]
"#
        )
    };
    let question = [
        "--from",
        "deploy/order",
        "--to",
        "deploy/web",
        "--port",
        "8080",
        "--path",
        "/",
    ];
    let folder = shop(&routes(""));
    let ask = |more: &[&str]| asked(folder.path(), &[&question[..], more].concat());
    let word = |more: &[&str]| ask(more).expect("an answer").results[0].decision.word;
    let refused = |more: &[&str]| ask(more).expect_err("no answer").to_string();
    assert!(refused(&[]).contains("--host"));
    assert_eq!(word(&["--host", "web.example.org"]), Word::Allow);
    assert_eq!(word(&["--host", "elsewhere.example.org"]), Word::Deny);
    for header in ["l5d-client-id: admin", "Weft_Client_Id: admin", "host: web"] {
        assert!(refused(&["--header", header]).contains("the header"));
    }
    let opaque = shop(&routes(
        r#", annotations: {config.linkerd.io/opaque-ports: "8080"}"#,
    ));
    let host = ["--host", "web.example.org"];
    let decision = answer(opaque.path(), &[&question[..], &host].concat());
    assert_eq!(decision.word, Word::Deny, "{decision:?}");
    assert!(decision.notes[0].contains("does not look into"));
}
