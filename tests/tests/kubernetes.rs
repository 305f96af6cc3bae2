//! The whole mesh with a controller that reads from an API server: what a user of Kubernetes sees.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use weft_tests::manifests::{ServiceSpec, authorization, server};
use weft_tests::scenario::{Watch, eventually, expect_echo, expect_refusal};
use weft_tests::testapp::Server;
use weft_tests::{Checks, Cluster, ClusterOptions, Pod, PodSpec};

/// A client on one node, two servers behind a Service on the other.
struct Pods {
    order: Pod,
    payment: Pod,
    spare: Pod,
    service: [IpAddr; 2],
}

#[test]
fn kubernetes() {
    let cluster = Cluster::with(ClusterOptions {
        kubernetes: true,
        ..ClusterOptions::default()
    });
    let cluster = cluster.expect("a cluster");
    let add = |spec: PodSpec| cluster.add_pod(spec.label("tier", "back")).expect("a pod");
    let pods = Pods {
        order: cluster.add_pod(PodSpec::new("order").on(0)).expect("a pod"),
        payment: add(PodSpec::new("payment").on(1)),
        spare: add(PodSpec::new("spare").on(1)),
        service: {
            let spec = ServiceSpec::new("payment").select("tier", "back");
            cluster
                .add_service(&spec.port(80, 8080))
                .expect("a service")
        },
    };
    let mut checks = Checks::new("kubernetes");
    let mut check = |name: &str, run: fn(&Cluster, &Pods) -> Result<()>| {
        checks.check(name, || run(&cluster, &pods));
    };
    check("a Service's pods are reached, encrypted", reached);
    check("a pod that is not ready is not used", readiness);
    check("policy holds, and changes", policy);
    check("an API server that is away changes nothing", away);
    check("a controller that is replaced changes nothing", restarted);
    checks.finish();
}

fn reached(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let _servers = both(pods)?;
    eventually("endpoints", || {
        expect_echo(&pods.order, to(pods, 0), "early").map(drop)
    })?;
    let watch = Watch::start(cluster, &[&pods.order, &pods.payment, &pods.spare])?;
    for address in 0..2 {
        expect_echo(&pods.order, to(pods, address), "by-the-service")?;
    }
    watch.finish_encrypted(&["by-the-service"])?;
    Ok(())
}

/// Both pods answer; only the one may be asked that says that it is ready.
fn readiness(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let (payment, spare) = both(pods)?;
    for (ready, unready, asked, not_asked) in [
        (&pods.spare, &pods.payment, &spare, &payment),
        (&pods.payment, &pods.spare, &payment, &spare),
    ] {
        cluster.apply(&ready.manifest())?;
        cluster.apply(&not_ready(unready))?;
        eventually("only the pod that is ready", || {
            let before = (asked.accepted()?.len(), not_asked.accepted()?.len());
            for _ in 0..8 {
                expect_echo(&pods.order, to(pods, 0), "to-who-is-ready")?;
            }
            let now = (asked.accepted()?.len(), not_asked.accepted()?.len());
            ensure!(now == (before.0 + 8, before.1), "{before:?} to {now:?}");
            Ok(())
        })?;
    }
    cluster.apply(&pods.spare.manifest())
}

fn policy(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let _servers = both(pods)?;
    let (server, open) = (
        server("default", "payment", "payment", 8080),
        authorization("default", "payment", "payment", &["order"]),
    );
    cluster.apply(&server)?;
    let direct = pods.payment.sockets(8080)[0];
    eventually("the Server to close", || {
        expect_refusal(&pods.order, direct, "closed").map(drop)
    })?;
    cluster.apply(&open)?;
    eventually("the authorization to open", || {
        expect_echo(&pods.order, direct, "open").map(drop)
    })?;
    // A mistake changes nothing, and is told.
    let mut mistake = server.clone();
    mistake["spec"]["prot"] = json!(1);
    cluster.apply(&mistake)?;
    eventually("the mistake to be told", || {
        let problems = cluster.controller()?.problems()?;
        let told = problems.contains("spec.prot");
        ensure!(told, "{problems}");
        Ok(())
    })?;
    expect_echo(&pods.order, direct, "as-before")?;
    cluster.remove(&open)?;
    eventually("it to close again", || {
        expect_refusal(&pods.order, direct, "closed-again").map(drop)
    })?;
    cluster.remove(&mistake)?;
    eventually("it to be open without a Server", || {
        expect_echo(&pods.order, direct, "open-again").map(drop)
    })
}

/// What is there goes on; what changes meanwhile is found when the server is back.
fn away(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let _servers = both(pods)?;
    let controller = cluster.controller()?;
    controller.kill_api_server()?;
    eventually("the outage to be told", || {
        let problems = controller.problems()?;
        let told = problems.contains("is the API server's address right");
        ensure!(told, "{problems}");
        Ok(())
    })?;
    expect_echo(&pods.order, to(pods, 0), "meanwhile")?;
    let closed = server("default", "closed", "payment", 8080);
    cluster.apply(&closed)?;
    expect_echo(&pods.order, pods.payment.sockets(8080)[0], "nobody-read-it")?;
    controller.start_api_server()?;
    // A watch that failed for long waits for half a minute.
    weft_tests::wait_for("the Server to be found", weft_tests::DEADLINE * 2, || {
        expect_refusal(&pods.order, pods.payment.sockets(8080)[0], "found").map(Some)
    })?;
    cluster.remove(&closed)?;
    eventually("it to be open again", || {
        expect_echo(&pods.order, pods.payment.sockets(8080)[0], "open").map(drop)
    })
}

/// Agents keep what they have, and are told what is new by the next one.
fn restarted(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let _servers = both(pods)?;
    let controller = cluster.controller()?;
    controller.stop()?;
    controller.start()?;
    expect_echo(&pods.order, to(pods, 0), "after-a-restart")?;
    let late = cluster.add_pod(PodSpec::new("late").on(0))?;
    eventually("a new pod to be served", || {
        expect_echo(&late, to(pods, 0), "from-a-new-pod").map(drop)
    })?;
    cluster.remove_pod(late)
}

fn both(pods: &Pods) -> Result<(Server, Server)> {
    let start = |pod| Server::start(pod, 8080, "echo", &[]).context("an echo server");
    Ok((start(&pods.payment)?, start(&pods.spare)?))
}

fn to(pods: &Pods, address: usize) -> SocketAddr {
    (pods.service[address], 80).into()
}

fn not_ready(pod: &Pod) -> Value {
    let mut manifest = pod.manifest();
    manifest["status"]["conditions"] = json!([{"type": "Ready", "status": "False"}]);
    manifest
}
