//! The demo's claims, each with the evidence that a user could look at.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use weft_tests::apps::{Redis, curl};
use weft_tests::capture::Capture;
use weft_tests::metrics::wait_for_metric;
use weft_tests::{DEADLINE, wait_for};

use crate::observed;
use crate::split::split;
use crate::stage::Stage;
use crate::stock;

/// Takes lines of evidence.
pub(crate) type Tell<'a> = &'a mut dyn FnMut(&str);

/// One claim.
pub(crate) struct Act {
    /// What is claimed.
    pub(crate) claim: &'static str,
    /// Shows it, or fails with what was not true.
    pub(crate) play: fn(&mut Stage, Tell<'_>) -> Result<()>,
}

/// All claims in their order.
pub(crate) const ACTS: &[Act] = &[
    Act {
        claim: "One command says whether all of it is healthy",
        play: observed::healthy,
    },
    Act {
        claim: "A call between nodes is encrypted and both sides prove who they are",
        play: across_nodes,
    },
    Act {
        claim: "The server sees the real client's address",
        play: client_address,
    },
    Act {
        claim: "Policy lets the one caller in and keeps the other out",
        play: policy,
    },
    Act {
        claim: "One command says what decides about a call, before it is made",
        play: observed::explained,
    },
    Act {
        claim: "A call on one node is authenticated and touches no interface",
        play: same_node,
    },
    Act {
        claim: "A change of policy ends the connections that it no longer allows",
        play: live_policy,
    },
    Act {
        claim: "A split sends each request where the weights say, and follows them live; none fails",
        play: split,
    },
    Act {
        claim: "A retry hides the failures of one pod of two",
        play: stock::retried,
    },
    Act {
        claim: "A pod that fails is left out, and taken back when it is well",
        play: stock::left_out,
    },
    Act {
        claim: "Policy lets a caller read what it must not delete",
        play: stock::requests,
    },
    Act {
        claim: "A killed agent means refused connections, never plaintext; the next one takes over",
        play: killed_agent,
    },
    Act {
        claim: "Commands show how workloads do, who talks to whom and as whom, and what goes on now",
        play: observed::seen,
    },
    Act {
        claim: "All of it was measured, under the names that Linkerd's dashboards know",
        play: metrics,
    },
];

fn across_nodes(stage: &mut Stage, tell: Tell<'_>) -> Result<()> {
    let capture = stage.capture(0)?;
    let answer = curl(&stage.order, stage.payment_service, "")?;
    let captured = capture.finish()?;
    ensure!(answer.status == 200, "curl got {answer:?}");
    let text = answer.body.trim();
    tell(&format!(
        "order$ curl http://{}/  ->  {} {text:?}",
        stage.payment_service, answer.status
    ));
    captured.ensure_without(text)?;
    captured.ensure_without("GET / HTTP/1.1")?;
    let addresses: [IpAddr; 2] = [stage.order.v4().into(), stage.payment.v4().into()];
    captured.ensure_only_tunnels(&addresses)?;
    let tls = captured.tls(15008);
    ensure!(tls.application_data > 0, "no TLS records between the nodes");
    tell(&format!(
        "on the wire between them: {} packets to or from port 15008, {} TLS records with {} bytes, \
         neither the request nor the answer in the clear",
        captured.to_or_from_port(15008).count(),
        tls.application_data,
        tls.application_bytes
    ));
    let server = stage.payment.identity();
    let client = stage.order.identity();
    let outbound = [
        ("direction", "outbound"),
        ("tls", "true"),
        ("server_id", &*server),
    ];
    let inbound = [
        ("direction", "inbound"),
        ("tls", "true"),
        ("client_id", &*client),
    ];
    wait_for_metric(stage.cluster.node(0), "tcp_open_total", &outbound, 1.0)?;
    wait_for_metric(stage.cluster.node(1), "tcp_open_total", &inbound, 1.0)?;
    tell(&format!("the agent of node 0 verified   {server}"));
    tell(&format!("the agent of node 1 verified   {client}"));
    Ok(())
}

fn client_address(stage: &mut Stage, tell: Tell<'_>) -> Result<()> {
    curl(&stage.order, stage.payment_service, "who-am-i")?;
    let line = stage.nginx.wait_for_request("who-am-i")?;
    tell(&format!(
        "nginx's own access log: {} asked for {}",
        line.client, line.path
    ));
    tell(&format!(
        "the pod order has the address {}",
        stage.order.v4()
    ));
    ensure!(
        line.client.ip() == IpAddr::from(stage.order.v4()),
        "nginx saw {}",
        line.client
    );
    Ok(())
}

fn policy(stage: &mut Stage, tell: Tell<'_>) -> Result<()> {
    let before = curl(&stage.intruder, stage.payment_service, "")?;
    tell(&format!("before: intruder$ curl  ->  {}", before.status));
    ensure!(
        before.status == 200,
        "without a policy everybody may: {before:?}"
    );
    stage
        .cluster
        .manifests()
        .apply("payment-policy", PAYMENT_POLICY)?;
    tell("applied a Server and an AuthorizationPolicy that lets in order-service only");
    wait_for("the intruder to be denied", DEADLINE, || {
        let denied = curl(&stage.intruder, stage.payment_service, "")?;
        Ok((denied.status == 403).then_some(denied))
    })
    .map(|denied| tell(&format!("after:  intruder$ curl  ->  {}", denied.status)))?;
    let allowed = curl(&stage.order, stage.payment_service, "")?;
    tell(&format!(
        "after:  order$    curl  ->  {} {:?}",
        allowed.status,
        allowed.body.trim()
    ));
    ensure!(allowed.status == 200, "order was not allowed: {allowed:?}");
    let intruder = stage.intruder.identity();
    let denied = [("srv_name", "payment-api"), ("client_id", &*intruder)];
    let count = wait_for_metric(
        stage.cluster.node(1),
        "inbound_tcp_authz_deny_total",
        &denied,
        1.0,
    )?;
    tell(&format!(
        "node 1 counted {count} denials of {intruder} by the Server payment-api"
    ));
    Ok(())
}

fn same_node(stage: &mut Stage, tell: Tell<'_>) -> Result<()> {
    let (address, port) = stage.redis();
    // Both ends of the path: the client pod's interface and the node's.
    let own = Capture::start(stage.cache.netns(), "eth0", stage.cache.dir())?;
    let node = stage.capture(0)?;
    let reply = Redis::command(&stage.order, address, port, &["PING"])?;
    let (own, node) = (own.finish()?, node.finish()?);
    ensure!(reply.stdout.trim() == "PONG", "redis-cli got {reply:?}");
    tell(&format!(
        "order$ redis-cli -h {address} PING  ->  {}",
        reply.stdout.trim()
    ));
    let seen = own.tcp_packets().count()
        + node
            .streams()
            .iter()
            .filter(|stream| stream.contains(b"PING"))
            .count();
    ensure!(seen == 0, "{seen} TCP packets were seen on interfaces");
    tell("0 TCP packets on the interface of the pod cache, nothing of it on the node's");
    let client = stage.order.identity();
    let labels = [
        ("direction", "inbound"),
        ("pod", "cache"),
        ("client_id", &*client),
        ("no_tls_reason", "same_node"),
    ];
    wait_for_metric(stage.cluster.node(0), "tcp_open_total", &labels, 1.0)?;
    tell(&format!(
        "the agent attributes it to {client}, attested by the kernel"
    ));
    Ok(())
}

fn live_policy(stage: &mut Stage, tell: Tell<'_>) -> Result<()> {
    let service = stage.payment_service;
    let client = stage.order.identity();
    let labels = [
        ("direction", "inbound"),
        ("pod", "payment"),
        ("client_id", &*client),
    ];
    let node = stage.cluster.node(1);
    let before = node.metrics()?.sum("tcp_open_total", &labels);
    let mut held = stage
        .order
        .command("nc")?
        .args([service.ip().to_string(), service.port().to_string()])
        .with_stdin()
        .spawn()?;
    // A byte that no HTTP begins with: it has a connection to the server for itself, beside the one that is kept
    // for the requests of before.
    held.write_stdin("-")?;
    wait_for_metric(node, "tcp_open_total", &labels, before + 1.0)?;
    ensure!(held.is_running(), "nc ended by itself: {}", held.stderr());
    tell(&format!(
        "order$ nc {service} holds a connection to payment"
    ));
    let for_somebody_else = PAYMENT_POLICY.replace("order-service", "audit-service");
    stage
        .cluster
        .manifests()
        .apply("payment-policy", &for_somebody_else)?;
    let start = Instant::now();
    tell("changed the AuthorizationPolicy: order-service is out, audit-service is in");
    held.wait(DEADLINE)?;
    tell(&format!(
        "nc ended, cut off, {} ms after the change",
        start.elapsed().as_millis()
    ));
    let denied = curl(&stage.order, stage.payment_service, "")?;
    ensure!(denied.status == 403, "order is still let in: {denied:?}");
    tell(&format!("order$ curl  ->  {}", denied.status));
    stage
        .cluster
        .manifests()
        .apply("payment-policy", PAYMENT_POLICY)?;
    wait_for("order to be allowed again", DEADLINE, || {
        let answer = curl(&stage.order, stage.payment_service, "")?;
        Ok((answer.status == 200).then_some(()))
    })?;
    tell("changed it back: order$ curl  ->  200");
    Ok(())
}

fn killed_agent(stage: &mut Stage, tell: Tell<'_>) -> Result<()> {
    let capture = stage.capture(0)?;
    let node = stage.cluster.node(0);
    node.kill_agent()?;
    tell("SIGKILL to the agent of node 0");
    let start = Instant::now();
    let mut tries = 0;
    while start.elapsed() < Duration::from_millis(500) || tries < 3 {
        let answer = curl(&stage.order, stage.payment_service, "while-dead")?;
        ensure!(
            answer.status == 0,
            "a call got through without an agent: {answer:?}"
        );
        tries += 1;
        if tries >= 3 {
            tell(&format!(
                "{tries} calls without an agent: {}",
                answer.error.trim()
            ));
            break;
        }
    }
    let start = Instant::now();
    node.start_agent()?;
    let answer = wait_for("a call through the new agent", DEADLINE, || {
        let answer = curl(&stage.order, stage.payment_service, "")?;
        Ok((answer.status == 200).then_some(answer))
    })?;
    tell(&format!(
        "a new agent took the pinned programs over; order$ curl -> {} again {} ms after its start",
        answer.status,
        start.elapsed().as_millis()
    ));
    let captured = capture.finish()?;
    captured.ensure_without("while-dead")?;
    let addresses: [IpAddr; 2] = [stage.order.v4().into(), stage.payment.v4().into()];
    captured.ensure_only_tunnels(&addresses)?;
    tell("nothing of it went over the wire in the clear");
    Ok(())
}

fn metrics(stage: &mut Stage, tell: Tell<'_>) -> Result<()> {
    for (index, wanted) in [
        (0, &["tcp_open_total", "tcp_read_bytes_total"][..]),
        (
            1,
            &[
                "inbound_tcp_authz_allow_total",
                "inbound_tcp_authz_deny_total",
            ][..],
        ),
    ] {
        let metrics = stage.cluster.node(index).metrics()?;
        for name in wanted {
            let mut samples: Vec<_> = metrics.find(name, &[("namespace", "production")]).collect();
            ensure!(!samples.is_empty(), "node {index} has no {name}");
            samples.sort_by(|a, b| b.value.total_cmp(&a.value));
            for sample in samples.into_iter().take(2) {
                let labels: Vec<String> = sample
                    .labels
                    .iter()
                    .map(|(label, value)| format!("{label}=\"{value}\""))
                    .collect();
                tell(&format!(
                    "node {index}: {name}{{{}}} {}",
                    labels.join(","),
                    sample.value
                ));
            }
        }
    }
    Ok(())
}

/// The pair of the README and of `docs/policy.md`.
const PAYMENT_POLICY: &str = "\
apiVersion: policy.linkerd.io/v1beta1
kind: Server
metadata: {name: payment-api, namespace: production}
spec:
  podSelector: {matchLabels: {app: payment}}
  port: 8080
  proxyProtocol: HTTP/1
---
apiVersion: policy.linkerd.io/v1alpha1
kind: AuthorizationPolicy
metadata: {name: payment-access, namespace: production}
spec:
  targetRef: {kind: Server, name: payment-api}
  requiredAuthenticationRefs:
  - {kind: ServiceAccount, name: order-service, namespace: production}
";
