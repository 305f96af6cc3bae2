//! The whole mesh with a controller that reads from an API server, has its issuer there, and knows agents by the tokens of
//! their pods: what a user of Kubernetes sees, and what somebody gets who has a token that is not for that.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use weft_tests::cluster::{Node, Projected};
use weft_tests::manifests::{ServiceSpec, authorization, server};
use weft_tests::scenario::{Watch, eventually, expect_echo, expect_refusal};
use weft_tests::testapp::Server;
use weft_tests::{Checks, Cluster, ClusterOptions, DEADLINE, Pod, PodSpec, wait_for};

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
        // The last one has no pods: what its agent is refused harms nobody.
        nodes: 3,
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
    check("nobody has a join token, nor an issuer of its own", trust);
    check("a Service's pods are reached, encrypted", reached);
    check("a pod that is not ready is not used", readiness);
    check("policy holds, and changes", policy);
    check("an API server that is away changes nothing", away);
    check("a controller that is replaced changes nothing", restarted);
    check("tokens are exchanged while agents run", renewed);
    check("a token that is not this agent's is refused", refused);
    check(
        "an agent whose pod is deleted is let out, and traffic goes on",
        deleted,
    );
    check("all of it comes back in every order", every_order);
    checks.finish();
}

/// The issuer is what the controller made in the cluster, and agents were let in by tokens of their pods.
fn trust(cluster: &Cluster, _: &Pods) -> Result<()> {
    let controller = cluster.controller()?;
    ensure!(!controller.ca_dir().exists(), "there is an issuer in files");
    ensure!(cluster.mounted_roots()?.contains("BEGIN CERTIFICATE"));
    let accepted = authentications(cluster, "accepted")?;
    ensure!(accepted >= 3.0, "{accepted} calls were accepted");
    let problems = controller.problems()?;
    ensure!(problems.contains("\"problems\": []"), "{problems}");
    Ok(())
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

/// Agents read their token anew for each connection: the one that they were started with is of no use any more.
fn renewed(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let _servers = both(pods)?;
    let nodes = &cluster.nodes()[..2];
    let controller = cluster.controller()?;
    let reconnect = |projected: &Projected| -> Result<()> {
        controller.stop()?;
        nodes
            .iter()
            .try_for_each(|it| cluster.project(it, projected))?;
        controller.start()?;
        nodes.iter().try_for_each(|it| connected(it, DEADLINE * 2))
    };
    let short = Projected {
        seconds: 20,
        ..Projected::default()
    };
    reconnect(&short)?;
    let ended = Instant::now() + Duration::from_secs(short.seconds);
    wait_for("the end of their tokens", DEADLINE * 2, || {
        Ok((Instant::now() > ended).then_some(()))
    })?;
    reconnect(&Projected::default())?;
    expect_echo(&pods.order, to(pods, 0), "with-new-tokens").map(drop)
}

/// Agents that start with a token of another audience, of another node's agent, or of a pod that is gone.
fn refused(cluster: &Cluster, _: &Pods) -> Result<()> {
    let (controller, node) = (cluster.controller()?, cluster.node(2));
    let elsewhere = Projected {
        audience: "https://kubernetes.default.svc".into(),
        ..Projected::default()
    };
    let own = node.agent_pod();
    let of_another_audience = own.token(controller, &elsewhere)?;
    let of_another_node = cluster.node(0).agent_pod();
    let of_another_node = of_another_node.token(controller, &Projected::default())?;
    let of_a_pod_that_is_gone = own.token(controller, &Projected::default())?;
    cluster.remove(&own.manifest())?;
    const AUTHENTICATIONS: &str = "weft_controller_agent_authentications_total";
    for (what, token, counted) in [
        (
            "another audience",
            of_another_audience,
            (AUTHENTICATIONS, ("result", "not_authenticated")),
        ),
        (
            "another node",
            of_another_node,
            ("weft_controller_refused_total", ("reason", "other_node")),
        ),
        (
            "a pod that is gone",
            of_a_pod_that_is_gone,
            (AUTHENTICATIONS, ("result", "pod_gone")),
        ),
    ] {
        node.kill_agent()?;
        cluster.project_token(node, &token)?;
        let (name, label) = counted;
        // Of a pod that was just deleted, either the API server or the controller says so first.
        let all = |cluster: &Cluster| -> Result<f64> {
            let metrics = cluster.controller()?.metrics()?;
            let gone = label.1 == "pod_gone";
            let either = metrics.sum(AUTHENTICATIONS, &[("result", "not_authenticated")]);
            Ok(metrics.sum(name, &[label]) + if gone { either } else { 0.0 })
        };
        let before = all(cluster)?;
        node.spawn_agent()?;
        wait_for(&format!("{what} to be counted"), DEADLINE, || {
            Ok((all(cluster)? > before).then_some(()))
        })?;
        let (status, body) = node.ready()?;
        ensure!(status == 503, "{what}: /ready says {status} {body}");
        let dump = node.config_dump()?;
        let told = dump["workloads"]
            .as_array()
            .is_some_and(|it| !it.is_empty());
        ensure!(!told, "{what}: it was told of the cluster: {dump}");
    }
    cluster.add_agent_pod(node)?;
    node.wait_ready()
}

/// Its stream ends and it cannot come back; the pods of its node go on with what it knows, until its successor is there.
fn deleted(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let _servers = both(pods)?;
    let node = cluster.node(0);
    cluster.remove(&node.agent_pod().manifest())?;
    wait_for("the agent to be let out", DEADLINE, || {
        let connected = node.metrics()?.sum("weft_control_connected", &[]);
        Ok((connected == 0.0).then_some(()))
    })?;
    expect_echo(&pods.order, to(pods, 0), "without-a-controller")?;
    cluster.add_agent_pod(node)?;
    connected(node, DEADLINE * 2)?;
    expect_echo(&pods.order, to(pods, 0), "with-a-successor").map(drop)
}

/// Whatever starts first waits for what it needs; the issuer and the roots are those from before.
fn every_order(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let _servers = both(pods)?;
    let roots = cluster.mounted_roots()?;
    let controller = cluster.controller()?;
    let start: [(&str, &dyn Fn() -> Result<()>); 3] = [
        ("API server", &|| controller.start_api_server()),
        ("controller", &|| controller.spawn()),
        ("agents", &|| {
            cluster.nodes().iter().try_for_each(Node::spawn_agent)
        }),
    ];
    for order in [
        [0, 1, 2],
        [0, 2, 1],
        [1, 0, 2],
        [1, 2, 0],
        [2, 0, 1],
        [2, 1, 0],
    ] {
        let names = order.map(|it| start[it].0).join(", ");
        cluster.nodes().iter().try_for_each(Node::kill_agent)?;
        controller.kill()?;
        controller.kill_api_server()?;
        for part in order {
            start[part].1().with_context(|| names.clone())?;
        }
        controller.wait_ready().with_context(|| names.clone())?;
        for node in cluster.nodes() {
            node.wait_ready().with_context(|| names.clone())?;
        }
        eventually("traffic", || {
            expect_echo(&pods.order, to(pods, 0), &names).map(drop)
        })?;
        ensure!(cluster.mounted_roots()? == roots, "{names}: other roots");
    }
    Ok(())
}

/// How many calls of agents had this result.
fn authentications(cluster: &Cluster, result: &str) -> Result<f64> {
    let metrics = cluster.controller()?.metrics()?;
    let name = "weft_controller_agent_authentications_total";
    Ok(metrics.sum(name, &[("result", result)]))
}

fn connected(node: &Node, within: Duration) -> Result<()> {
    wait_for(&format!("{} to be connected", node.name()), within, || {
        let connected = node.metrics()?.sum("weft_control_connected", &[]);
        Ok((connected == 1.0).then_some(()))
    })
}
