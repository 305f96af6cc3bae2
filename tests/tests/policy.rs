//! Who may connect: Servers, authorizations, defaults, and changes of all of them.

use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::json;
use weft_tests::manifests::{authorization, server};
use weft_tests::metrics::wait_for_metric;
use weft_tests::scenario::{Watch, eventually, expect_echo, expect_refusal};
use weft_tests::testapp::{LOAD_TEXT, Load, Pulse, Server};
use weft_tests::{Checks, Cluster, Pod, PodSpec};

/// The pods that all checks share: callers on both nodes, and one that is not meshed.
struct Pods {
    order: Pod,
    other: Pod,
    near: Pod,
    plain: Pod,
    payment: Pod,
}

#[test]
fn policy() {
    let cluster = Cluster::start().expect("a cluster");
    let add = |spec: PodSpec| {
        cluster
            .add_pod(spec.namespace("production"))
            .expect("a pod")
    };
    let pods = Pods {
        order: add(PodSpec::new("order").service_account("order-service").on(0)),
        other: add(PodSpec::new("other").on(0)),
        near: add(PodSpec::new("near").service_account("order-service").on(1)),
        plain: add(PodSpec::new("plain").on(0).unmeshed()),
        payment: add(PodSpec::new("payment").on(1)),
    };
    let mut checks = Checks::new("policy");
    let mut check = |name: &str, run: fn(&Cluster, &Pods) -> Result<()>| {
        checks.check(name, || run(&cluster, &pods));
    };
    check(
        "the pair of policy.linkerd.io works as written",
        linkerd_pair,
    );
    check("a Server without an authorization denies", server_alone);
    check(
        "a policy that is named but unknown denies",
        unknown_reference,
    );
    check("networks authorize", networks);
    check("mesh identities authorize", mesh_identities);
    check(
        "a change ends live flows that it no longer allows",
        live_change,
    );
    check(
        "an invalid document leaves what was in force",
        invalid_document,
    );
    check("policy flips under load", flips);
    check("default policies", defaults);
    check("audit allows and reports", audit);
    checks.finish();
}

/// The pair as people have it in their repositories.
const PAIR: &str = "\
apiVersion: policy.linkerd.io/v1beta1
kind: Server
metadata: {name: payment-api, namespace: production}
spec:
  podSelector: {matchLabels: {app: payment}}
  port: 8080
  proxyProtocol: unknown
---
apiVersion: policy.linkerd.io/v1alpha1
kind: AuthorizationPolicy
metadata: {name: payment-access, namespace: production}
spec:
  targetRef: {kind: Server, name: payment-api}
  requiredAuthenticationRefs:
  - {kind: ServiceAccount, name: order-service, namespace: production}
";

fn linkerd_pair(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let app = Server::start(&pods.payment, 8080, "echo", &[])?;
    let _open = Server::start(&pods.payment, 8081, "echo", &[])?;
    expect_echo(&pods.other, pods.payment.sockets(8080)[0], "before")?;
    cluster.manifests().apply("pair", PAIR)?;
    eventually("the policy to be in effect", || {
        expect_refusal(&pods.other, pods.payment.sockets(8080)[0], "denied").map(drop)
    })?;
    let accepted = app.accepted()?.len();
    let watch = Watch::start(cluster, &[&pods.order, &pods.other, &pods.payment])?;
    for target in pods.payment.sockets(8080) {
        expect_echo(&pods.order, target, "an-order")?;
        expect_echo(&pods.near, target, "an-order-from-next-door")?;
        expect_refusal(&pods.other, target, "not-an-order")?;
        expect_refusal(&pods.plain, target, "no-identity")?;
    }
    for target in pods.payment.sockets(8081) {
        expect_echo(&pods.other, target, "another-port")?;
    }
    watch.finish_encrypted(&["an-order", "not-an-order", "another-port"])?;
    ensure!(
        app.accepted()?.len() == accepted + 4,
        "a denied client reached the application"
    );
    let node = cluster.node(1);
    let (order, other) = (pods.order.identity(), pods.other.identity());
    let server = [
        ("srv_name", "payment-api"),
        ("srv_group", "policy.linkerd.io"),
        ("pod", "payment"),
    ];
    let with = |more: &[(&'static str, &str)]| -> Vec<(String, String)> {
        let all = server
            .iter()
            .map(|(label, value)| (*label, *value))
            .chain(more.iter().copied());
        all.map(|(label, value)| (label.to_owned(), value.to_owned()))
            .collect()
    };
    for (name, labels, least) in [
        (
            "inbound_tcp_authz_allow_total",
            with(&[("authz_name", "payment-access"), ("client_id", &order)]),
            4.0,
        ),
        (
            "inbound_tcp_authz_deny_total",
            with(&[("client_id", &other)]),
            2.0,
        ),
        (
            "inbound_tcp_authz_deny_total",
            with(&[("tls", "no_identity")]),
            2.0,
        ),
    ] {
        let labels: Vec<(&str, &str)> = labels
            .iter()
            .map(|(label, value)| (label.as_str(), value.as_str()))
            .collect();
        wait_for_metric(node, name, &labels, least)?;
    }
    cluster.manifests().remove("pair")?;
    eventually("the policy to be gone", || {
        expect_echo(&pods.other, pods.payment.sockets(8080)[0], "after").map(drop)
    })
}

fn server_alone(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let _app = Server::start(&pods.payment, 8090, "echo", &[])?;
    let alone = server("production", "alone", "payment", 8090);
    let target = pods.payment.sockets(8090)[0];
    cluster.apply(&alone)?;
    eventually("the Server to deny", || {
        expect_refusal(&pods.order, target, "denied").map(drop)
    })?;
    expect_refusal(&pods.near, target, "denied")?;
    expect_refusal(&pods.plain, target, "denied")?;
    cluster.remove(&alone)?;
    eventually("the Server to be gone", || {
        expect_echo(&pods.order, target, "x").map(drop)
    })
}

fn unknown_reference(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let _app = Server::start(&pods.payment, 8091, "echo", &[])?;
    let target = pods.payment.sockets(8091)[0];
    let guard = server("production", "guarded", "payment", 8091);
    let reference =
        json!([{"group": "policy.weft.dev", "kind": "MeshTLSAuthentication", "name": "later"}]);
    let mut rule = authorization("production", "by-later", "guarded", &[]);
    rule["spec"]["requiredAuthenticationRefs"] = reference;
    cluster.apply(&guard)?;
    cluster.apply(&rule)?;
    eventually("the unknown reference to deny", || {
        expect_refusal(&pods.order, target, "x").map(drop)
    })?;
    let later = json!({
        "apiVersion": "policy.weft.dev/v1alpha1",
        "kind": "MeshTLSAuthentication",
        "metadata": {"name": "later", "namespace": "production"},
        "spec": {"identities": ["*"]},
    });
    cluster.apply(&later)?;
    eventually("the reference to be known", || {
        expect_echo(&pods.order, target, "known").map(drop)
    })?;
    expect_refusal(&pods.plain, target, "no identity")?;
    cluster.remove(&later)?;
    eventually("the reference to be unknown", || {
        expect_refusal(&pods.order, target, "x").map(drop)
    })?;
    cluster.remove(&rule)?;
    cluster.remove(&guard)
}

fn networks(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let _app = Server::start(&pods.payment, 8092, "echo", &[])?;
    let [v4, v6] = pods.payment.sockets(8092);
    let guard = server("production", "by-network", "payment", 8092);
    let networks = json!({
        "apiVersion": "policy.weft.dev/v1alpha1",
        "kind": "NetworkAuthentication",
        "metadata": {"name": "plain-only", "namespace": "production"},
        "spec": {"networks": [
            {"cidr": "10.244.0.0/16", "except": [format!("{}/32", pods.other.v4())]},
        ]},
    });
    let mut rule = authorization("production", "from-network", "by-network", &[]);
    rule["spec"]["requiredAuthenticationRefs"] = json!([{"group": "policy.weft.dev", "kind": "NetworkAuthentication", "name": "plain-only"}]);
    for object in [&guard, &networks, &rule] {
        cluster.apply(object)?;
    }
    eventually("the exception to be denied", || {
        expect_refusal(&pods.other, v4, "x").map(drop)
    })?;
    eventually("the network to be allowed", || {
        expect_echo(&pods.plain, v4, "x").map(drop)
    })?;
    expect_echo(&pods.order, v4, "meshed pods have addresses too")?;
    expect_echo(&pods.near, v4, "on the same node too")?;
    expect_refusal(&pods.plain, v6, "another family")?;
    for object in [&rule, &networks, &guard] {
        cluster.remove(object)?;
    }
    Ok(())
}

fn mesh_identities(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let _app = Server::start(&pods.payment, 8093, "echo", &[])?;
    let target = pods.payment.sockets(8093)[1];
    let guard = server("production", "by-identity", "payment", 8093);
    let mut identities = json!({
        "apiVersion": "policy.weft.dev/v1alpha1",
        "kind": "MeshTLSAuthentication",
        "metadata": {"name": "orders", "namespace": "production"},
        "spec": {"identityRefs": [{"kind": "ServiceAccount", "name": "order-service"}]},
    });
    let mut rule = authorization("production", "for-orders", "by-identity", &[]);
    rule["spec"]["requiredAuthenticationRefs"] =
        json!([{"group": "policy.weft.dev", "kind": "MeshTLSAuthentication", "name": "orders"}]);
    for object in [&guard, &identities, &rule] {
        cluster.apply(object)?;
    }
    eventually("the other to be denied", || {
        expect_refusal(&pods.other, target, "x").map(drop)
    })?;
    eventually("the order to be allowed", || {
        expect_echo(&pods.order, target, "x").map(drop)
    })?;
    identities["spec"] = json!({"identities": [pods.other.identity()]});
    cluster.apply(&identities)?;
    eventually("the roles to change", || {
        expect_refusal(&pods.order, target, "x").map(drop)
    })?;
    expect_echo(&pods.other, target, "now me")?;
    for object in [&rule, &identities, &guard] {
        cluster.remove(object)?;
    }
    Ok(())
}

fn live_change(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let _app = Server::start(&pods.payment, 8094, "echo", &[])?;
    let target = pods.payment.sockets(8094)[0];
    let mut flows = [
        ("far and allowed", Pulse::start(&pods.order, target)?, true),
        ("near and allowed", Pulse::start(&pods.near, target)?, true),
        ("far and denied", Pulse::start(&pods.other, target)?, false),
        (
            "without identity and denied",
            Pulse::start(&pods.plain, target)?,
            false,
        ),
    ];
    let guard = server("production", "live", "payment", 8094);
    let rule = authorization("production", "live", "live", &["order-service"]);
    // The rule first, so that there is no moment in which nobody may.
    cluster.apply(&rule)?;
    cluster.apply(&guard)?;
    for (name, flow, allowed) in &mut flows {
        if !*allowed {
            let end = flow.wait_broken(Duration::from_secs(8))?;
            ensure!(end.outcome == "reset", "{name}: {end:?}");
        }
    }
    for (name, flow, allowed) in flows {
        if allowed {
            let end = flow.stop()?;
            ensure!(end.outcome == "ok" && end.pulses > 1, "{name}: {end:?}");
        }
    }
    let labels = [("reason", "policy_changed"), ("pod", "payment")];
    wait_for_metric(cluster.node(1), "weft_refused_total", &labels, 2.0)?;
    cluster.remove(&guard)?;
    cluster.remove(&rule)
}

fn invalid_document(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let _app = Server::start(&pods.payment, 8095, "echo", &[])?;
    let target = pods.payment.sockets(8095)[0];
    let guard = server("production", "kept", "payment", 8095);
    let rule = authorization("production", "kept", "kept", &["order-service"]);
    cluster.apply(&rule)?;
    cluster.apply(&guard)?;
    eventually("the policy to be in effect", || {
        expect_refusal(&pods.other, target, "x").map(drop)
    })?;
    let mut broken = guard.clone();
    broken["spec"]["port"] = json!({"number": "eighty"});
    cluster.apply(&broken)?;
    eventually("the controller to report the document", || {
        let log = cluster.controller()?.log();
        let reported = log
            .lines()
            .any(|line| line.contains("server-production-kept") && line.contains("port"));
        ensure!(reported, "its log says nothing of the file and the field");
        Ok(())
    })?;
    expect_refusal(&pods.other, target, "still denied")?;
    expect_echo(&pods.order, target, "still allowed")?;
    // Not even YAML.
    cluster
        .manifests()
        .apply("server-production-kept", "kind: [Server\n  - {")?;
    expect_refusal(&pods.other, target, "still denied")?;
    cluster.remove(&guard)?;
    cluster.remove(&rule)?;
    eventually("the policy to be gone", || {
        expect_echo(&pods.other, target, "free").map(drop)
    })
}

fn flips(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let _app = Server::start(&pods.payment, 8096, "echo", &["--quiet"])?;
    let target = pods.payment.sockets(8096)[0];
    let guard = server("production", "flipping", "payment", 8096);
    let rule = authorization("production", "flipping", "flipping", &["order-service"]);
    cluster.apply(&rule)?;
    let watch = Watch::start(cluster, &[&pods.order, &pods.other, &pods.payment])?;
    let allowed = Load::start(&pods.order, target, &["--parallel", "2"])?;
    let denied = Load::start(&pods.other, target, &["--parallel", "2"])?;
    for _ in 0..5 {
        cluster.apply(&guard)?;
        eventually("the policy to deny", || {
            expect_refusal(&pods.other, target, "x").map(drop)
        })?;
        expect_echo(&pods.order, target, "allowed all the time")?;
        cluster.remove(&guard)?;
        eventually("the policy to allow", || {
            expect_echo(&pods.other, target, "x").map(drop)
        })?;
    }
    let (allowed, denied) = (allowed.stop()?, denied.stop()?);
    watch.finish_encrypted(&[LOAD_TEXT])?;
    ensure!(
        allowed.of("ok") == allowed.total(),
        "who was always allowed got {allowed:?}"
    );
    ensure!(
        denied.of("ok") > 0 && denied.of("reset") + denied.of("refused") > 0,
        "{denied:?}"
    );
    ensure!(denied.of("timeout") == 0, "{denied:?}");
    cluster.remove(&rule)
}

fn defaults(cluster: &Cluster, pods: &Pods) -> Result<()> {
    // What each lets in: another meshed pod, and one that is not.
    for (policy, meshed, unmeshed) in [
        ("deny", false, false),
        ("all-authenticated", true, false),
        ("cluster-authenticated", true, false),
        ("cluster-unauthenticated", true, true),
        ("all-unauthenticated", true, true),
    ] {
        let spec = PodSpec::new(&format!("by-{policy}"))
            .namespace("production")
            .on(1)
            .annotation("config.linkerd.io/default-inbound-policy", policy);
        let pod = cluster.add_pod(spec)?;
        let _app = Server::start(&pod, 8097, "echo", &[])?;
        for target in pod.sockets(8097) {
            for (from, allowed) in [
                (&pods.order, meshed),
                (&pods.near, meshed),
                (&pods.plain, unmeshed),
            ] {
                let how = format!("{} to {policy} at {target}", from.name());
                let result = if allowed {
                    expect_echo(from, target, "by default")
                } else {
                    expect_refusal(from, target, "by default")
                };
                result.map_err(|error| error.context(how))?;
            }
        }
        if !unmeshed {
            let name = format!("default:{policy}");
            let labels = [("pod", pod.name()), ("authz_name", name.as_str())];
            wait_for_metric(
                cluster.node(1),
                "inbound_tcp_authz_deny_total",
                &labels,
                2.0,
            )?;
        }
        cluster.remove_pod(pod)?;
    }
    Ok(())
}

fn audit(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let _app = Server::start(&pods.payment, 8098, "echo", &[])?;
    let target = pods.payment.sockets(8098)[0];
    let mut guard = server("production", "audited", "payment", 8098);
    guard["spec"]["accessPolicy"] = "audit".into();
    cluster.apply(&guard)?;
    let labels = [("srv_name", "audited"), ("pod", "payment")];
    eventually("the audit to be counted", || {
        expect_echo(&pods.other, target, "watched")?;
        let metrics = cluster.node(1).metrics()?;
        let counted = metrics.sum("inbound_tcp_authz_allow_total", &labels);
        ensure!(counted >= 1.0, "{}", metrics.show("authz"));
        Ok(())
    })?;
    cluster.remove(&guard)
}
