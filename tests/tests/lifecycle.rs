//! Coming and going: agents killed and stopped, the controller away, pods whose addresses are used
//! again, and connections by the thousand.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use weft_tests::manifests::{authorization, server};
use weft_tests::metrics::wait_for_metric;
use weft_tests::scenario::{Watch, eventually, expect_echo, expect_refusal};
use weft_tests::testapp::{self, Hold, LOAD_TEXT, Load, Pulse, Server};
use weft_tests::{Checks, Cluster, ClusterOptions, Pod, PodSpec, run};

/// The pods that all checks share.
struct Pods {
    client: Pod,
    near: Pod,
    server: Pod,
    plain: Pod,
}

#[test]
fn lifecycle() {
    let cluster = Cluster::with(ClusterOptions {
        agent_args: ["--drain-deadline", "3s", "--max-flows-per-pod", "300"]
            .map(Into::into)
            .to_vec(),
        ..ClusterOptions::default()
    })
    .expect("a cluster");
    let add = |spec| cluster.add_pod(spec).expect("a pod");
    let pods = Pods {
        client: add(PodSpec::new("client").on(0)),
        near: add(PodSpec::new("near").on(0)),
        server: add(PodSpec::new("server").on(1)),
        plain: add(PodSpec::new("plain").on(0).unmeshed()),
    };
    let mut checks = Checks::new("lifecycle");
    let mut check = |name: &str, run: fn(&Cluster, &Pods) -> Result<()>| {
        checks.check(name, || run(&cluster, &pods));
    };
    check(
        "the client's agent is killed and comes back",
        client_agent_killed,
    );
    check(
        "the server's agent is killed and comes back",
        server_agent_killed,
    );
    check("agents are killed under load", killed_under_load);
    check("an agent that is stopped drains", stopped);
    check("the controller is away, and comes back", controller_away);
    check(
        "an agent starts while the controller is away",
        agent_starts_alone,
    );
    check(
        "an address is used again by another identity",
        address_reused,
    );
    check(
        "a pod whose namespace vanishes, and returns",
        namespace_vanishes,
    );
    check("a pod that runs before it is described", before_description);
    check(
        "a pod that others hear of before its node listens for it",
        heard_of_before_it_is_listened_for,
    );
    check(
        "a pod that leaves the mesh, and joins again",
        leaves_and_joins,
    );
    check(
        "a deleted pod that lives on is refused everything",
        deleted_but_alive,
    );
    check("metrics of a pod that is gone disappear", series_disappear);
    check(
        "churn past the number of ports, the client closing first",
        churn,
    );
    check("a pod that fills its share harms only itself", quota);
    check(
        "a pod with too many flows harms only itself",
        too_many_flows,
    );
    check("every hook has one program after all that", one_program);
    checks.finish();
    let name = cluster.name().to_owned();
    drop((pods, cluster));
    assert_eq!(
        run::remains(&name),
        Vec::<String>::new(),
        "nothing may be left"
    );
}

fn client_agent_killed(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let app = Server::start(&pods.server, 7400, "echo", &[])?;
    let near = Server::start(&pods.near, 7400, "echo", &[])?;
    let watch = Watch::start(cluster, &[&pods.client, &pods.server])?;
    let mut pulse = Pulse::start(&pods.client, pods.server.sockets(7400)[0])?;
    cluster.node(0).kill_agent()?;
    let end = pulse.wait_broken(Duration::from_secs(5))?;
    ensure!(end.outcome == "reset", "a flow of a killed agent: {end:?}");
    let accepted = (app.accepted()?.len(), near.accepted()?.len());
    for target in [pods.server.sockets(7400), pods.near.sockets(7400)].concat() {
        let args = [
            "--send",
            "no-agent-here",
            "--half-close",
            "--timeout-ms",
            "1500",
        ];
        let got = testapp::connect(&pods.client, target, &args)?;
        ensure!(
            got.outcome != "ok" && got.received == 0,
            "{target}: {got:?}"
        );
        // In: a pod without an agent is not reached in the clear either.
        let got = testapp::connect(&pods.plain, pods.near.sockets(7400)[0], &args)?;
        ensure!(
            got.outcome != "ok" && got.received == 0,
            "from plaintext: {got:?}"
        );
    }
    ensure!(
        accepted == (app.accepted()?.len(), near.accepted()?.len()),
        "an application was reached"
    );
    cluster.node(0).start_agent()?;
    for target in [pods.server.sockets(7400), pods.near.sockets(7400)].concat() {
        expect_echo(&pods.client, target, "agent-is-back")?;
    }
    expect_echo(&pods.plain, pods.near.sockets(7400)[0], "plaintext is back")?;
    watch
        .finish_encrypted(&["no-agent-here", "agent-is-back", LOAD_TEXT])
        .map(drop)
}

fn server_agent_killed(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let app = Server::start(&pods.server, 7401, "echo", &[])?;
    let watch = Watch::start(cluster, &[&pods.client, &pods.server])?;
    let mut pulse = Pulse::start(&pods.client, pods.server.sockets(7401)[0])?;
    cluster.node(1).kill_agent()?;
    let end = pulse.wait_broken(Duration::from_secs(5))?;
    ensure!(end.outcome == "reset", "{end:?}");
    let accepted = app.accepted()?.len();
    for target in pods.server.sockets(7401) {
        let args = [
            "--send",
            "no-agent-there",
            "--half-close",
            "--timeout-ms",
            "8000",
        ];
        let got = testapp::connect(&pods.client, target, &args)?;
        ensure!(got.outcome != "ok" && got.received == 0, "{got:?}");
        let got = testapp::connect(&pods.plain, target, &args)?;
        ensure!(
            got.outcome != "ok" && got.received == 0,
            "from plaintext: {got:?}"
        );
    }
    ensure!(
        app.accepted()?.len() == accepted,
        "the application was reached"
    );
    cluster.node(1).start_agent()?;
    eventually("flows to work again", || {
        for target in pods.server.sockets(7401) {
            expect_echo(&pods.client, target, "agent-is-back")?;
        }
        Ok(())
    })?;
    watch
        .finish_encrypted(&["agent-is-back", LOAD_TEXT])
        .map(drop)
}

fn killed_under_load(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let _app = Server::start(&pods.server, 7402, "echo", &["--quiet"])?;
    let target = pods.server.sockets(7402)[0];
    let watch = Watch::start(cluster, &[&pods.client, &pods.near, &pods.server])?;
    let args = ["--timeout-ms", "2000"];
    let loads = [
        Load::start(&pods.client, target, &args)?,
        Load::start(&pods.near, pods.server.sockets(7402)[1], &args)?,
    ];
    for node in [0, 1, 0] {
        cluster.node(node).kill_agent()?;
        cluster.node(node).start_agent()?;
        eventually("flows to work again", || {
            expect_echo(&pods.client, target, "x").map(drop)
        })?;
    }
    for load in loads {
        let counts = load.stop()?;
        ensure!(counts.of("ok") > 20, "{counts:?}");
        ensure!(
            counts.of("error") == 0 && counts.of("not_available") == 0,
            "{counts:?}"
        );
    }
    watch.finish_encrypted(&[LOAD_TEXT]).map(drop)
}

fn stopped(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let _app = Server::start(&pods.server, 7403, "echo", &[])?;
    let target = pods.server.sockets(7403)[0];
    let watch = Watch::start(cluster, &[&pods.client, &pods.server])?;
    let mut pulse = Pulse::start(&pods.client, target)?;
    let ended_before = std::thread::scope(|scope| -> Result<bool> {
        let stopping = scope.spawn(|| cluster.node(0).stop_agent());
        // Most of the three seconds the flow has.
        std::thread::sleep(Duration::from_millis(1500));
        let beating = pulse.is_beating();
        stopping
            .join()
            .unwrap_or_else(|_| Err(anyhow::anyhow!("panicked")))?;
        Ok(!beating)
    })?;
    ensure!(!ended_before, "the flow was not drained");
    pulse.wait_broken(Duration::from_secs(5))?;
    let got = testapp::connect(
        &pods.client,
        target,
        &["--send", "stopped", "--half-close", "--timeout-ms", "1500"],
    )?;
    ensure!(
        got.outcome != "ok" && got.received == 0,
        "without an agent: {got:?}"
    );
    cluster.node(0).start_agent()?;
    expect_echo(&pods.client, target, "started")?;
    watch
        .finish_encrypted(&["stopped", "started", LOAD_TEXT])
        .map(drop)
}

fn controller_away(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let _app = Server::start(&pods.server, 7404, "echo", &[])?;
    let target = pods.server.sockets(7404)[0];
    let guard = server("default", "away", "server", 7404);
    let rule = authorization("default", "away", "away", &["client"]);
    cluster.apply(&rule)?;
    cluster.apply(&guard)?;
    eventually("the policy to be in effect", || {
        expect_refusal(&pods.near, target, "x").map(drop)
    })?;
    let pulse = Pulse::start(&pods.client, target)?;
    cluster.controller()?.kill()?;
    for target in pods.server.sockets(7404) {
        expect_echo(&pods.client, target, "alone")?;
        expect_refusal(&pods.near, target, "alone")?;
    }
    let (status, body) = cluster.node(0).ready()?;
    ensure!(
        status == 200,
        "an agent without its controller is still ready: {status} {body}"
    );
    // What changes meanwhile takes effect afterwards.
    cluster.remove(&guard)?;
    cluster.controller()?.start()?;
    eventually("the change to take effect", || {
        expect_echo(&pods.near, target, "free").map(drop)
    })?;
    let end = pulse.stop()?;
    ensure!(end.outcome == "ok", "{end:?}");
    cluster.remove(&rule)
}

fn agent_starts_alone(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let app = Server::start(&pods.server, 7405, "echo", &[])?;
    let target = pods.server.sockets(7405)[0];
    let watch = Watch::start(cluster, &[&pods.client, &pods.server])?;
    cluster.controller()?.kill()?;
    cluster.node(0).kill_agent()?;
    cluster.node(0).spawn_agent()?;
    // It knows nothing, so nothing may pass, and it must not claim to be ready.
    let args = [
        "--send",
        "knows-nothing",
        "--half-close",
        "--timeout-ms",
        "2500",
    ];
    let got = testapp::connect(&pods.client, target, &args)?;
    ensure!(got.outcome != "ok" && got.received == 0, "{got:?}");
    let ready = cluster.node(0).ready();
    ensure!(!matches!(ready, Ok((200, _))), "it says that it is ready");
    ensure!(app.accepted()?.is_empty());
    cluster.controller()?.start()?;
    cluster.node(0).wait_ready()?;
    eventually("flows to work again", || {
        expect_echo(&pods.client, target, "knows-all").map(drop)
    })?;
    watch
        .finish_encrypted(&["knows-nothing", "knows-all"])
        .map(drop)
}

fn address_reused(cluster: &Cluster, pods: &Pods) -> Result<()> {
    for node in [1, 0] {
        let spec = |name: &str| PodSpec::new(name).on(node).host(5);
        for round in ["first", "second", "third"] {
            let pod = cluster.add_pod(spec(&format!("{round}-on-{node}")))?;
            let _app = Server::start(&pod, 7406, "echo", &[])?;
            let watch = Watch::start(cluster, &[&pods.client, &pod])?;
            for target in pod.sockets(7406) {
                eventually("the new pod to be reached", || {
                    expect_echo(&pods.client, target, round).map(drop)
                })?;
            }
            let identity = pod.identity();
            let labels = [("dst_pod", pod.name()), ("server_id", identity.as_str())];
            wait_for_metric(cluster.node(0), "tcp_open_total", &labels, 2.0)?;
            watch.finish(&[round])?;
            cluster.remove_pod(pod)?;
        }
    }
    Ok(())
}

fn namespace_vanishes(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let spec = || PodSpec::new("phoenix").on(1).host(6);
    let pod = cluster.add_pod(spec())?;
    let manifest = pod.manifest();
    let app = Server::start(&pod, 7407, "echo", &[])?;
    let target = pod.sockets(7407)[0];
    expect_echo(&pods.client, target, "alive")?;
    drop(app);
    pod.delete()?;
    let got = testapp::connect(
        &pods.client,
        target,
        &["--send", "gone?", "--half-close", "--timeout-ms", "10000"],
    )?;
    ensure!(got.outcome != "ok" && got.received == 0, "{got:?}");
    // The same name and address, another namespace and UID.
    let pod = cluster.build_pod(spec())?;
    cluster.announce(&pod)?;
    let _app = Server::start(&pod, 7407, "echo", &[])?;
    eventually("the pod to be back", || {
        expect_echo(&pods.client, target, "again").map(drop)
    })?;
    ensure!(pod.manifest()["metadata"]["uid"] != manifest["metadata"]["uid"]);
    cluster.remove_pod(pod)
}

fn before_description(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let pod = cluster.build_pod(PodSpec::new("early").on(1))?;
    let app = Server::start(&pod, 7408, "echo", &[])?;
    let watch = Watch::start(cluster, &[&pods.client, &pod])?;
    for target in pod.sockets(7408) {
        expect_refusal(&pods.client, target, "too-early")?;
    }
    ensure!(app.accepted()?.is_empty());
    cluster.announce(&pod)?;
    cluster.wait_enrolled(&pod)?;
    for target in pod.sockets(7408) {
        eventually("the pod to be reached", || {
            expect_echo(&pods.client, target, "in-time").map(drop)
        })?;
    }
    watch.finish_encrypted(&["too-early", "in-time"])?;
    cluster.remove_pod(pod)
}

/// Its own agent is the last to hear of it: it stands still for a moment. Nobody can be reached there otherwise meanwhile.
fn heard_of_before_it_is_listened_for(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let pod = cluster.build_pod(PodSpec::new("late").on(1))?;
    let app = Server::start(&pod, 7418, "echo", &[])?;
    let watch = Watch::start(cluster, &[&pods.client, &pod])?;
    let node = cluster.node(1);
    node.pause_agent()?;
    cluster.announce(&pod)?;
    cluster.node(0).wait_known(pod.namespace(), pod.name())?;
    let asked = std::thread::scope(|scope| {
        let resumed = scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(300));
            node.resume_agent()
        });
        let asked = expect_echo(&pods.client, pod.sockets(7418)[0], "to-a-newcomer");
        let resumed = resumed.join();
        resumed.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        asked
    });
    asked.context("the first connection to a pod that is new")?;
    cluster.wait_enrolled(&pod)?;
    ensure!(app.accepted()?.len() == 1, "it was asked more than once");
    watch.finish_encrypted(&["to-a-newcomer"])?;
    cluster.remove_pod(pod)
}

fn leaves_and_joins(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let pod = cluster.add_pod(PodSpec::new("undecided").on(1))?;
    let _app = Server::start(&pod, 7409, "echo", &[])?;
    let target = pod.sockets(7409)[0];
    let tunnels = [("dst_pod", "undecided"), ("tls", "true")];
    expect_echo(&pods.client, target, "meshed")?;
    wait_for_metric(cluster.node(0), "tcp_open_total", &tunnels, 1.0)?;
    let mut manifest = pod.manifest();
    manifest["metadata"]["labels"]["weft.dev/mesh"] = "disabled".into();
    cluster.apply(&manifest)?;
    eventually("the pod to be plain", || {
        expect_echo(&pods.client, target, "plain")?;
        let metrics = cluster.node(0).metrics()?;
        let plain = metrics.sum(
            "tcp_open_total",
            &[("dst_pod", "undecided"), ("tls", "no_identity")],
        );
        ensure!(
            plain > 0.0,
            "still by tunnel: {}",
            metrics.show("tcp_open_total")
        );
        Ok(())
    })?;
    manifest["metadata"]["labels"]["weft.dev/mesh"] = "enabled".into();
    let before = cluster.node(0).metrics()?.sum("tcp_open_total", &tunnels);
    cluster.apply(&manifest)?;
    eventually("the pod to be meshed again", || {
        expect_echo(&pods.client, target, "meshed")?;
        let now = cluster.node(0).metrics()?.sum("tcp_open_total", &tunnels);
        ensure!(now > before, "not by tunnel yet");
        Ok(())
    })?;
    cluster.remove_pod(pod)
}

/// Processes may outlive their pod's object. Only the cluster's word that the pod takes no part in
/// the mesh opens it.
fn deleted_but_alive(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let pod = cluster.add_pod(PodSpec::new("zombie").on(0))?;
    let app = Server::start(&pod, 7414, "echo", &[])?;
    let elsewhere = Server::start(&pods.plain, 7414, "echo", &[])?;
    let (to, from) = (pods.plain.sockets(7414)[0], pod.sockets(7414)[0]);
    eventually("the pod to be in the mesh", || {
        expect_echo(&pod, to, "meshed")?;
        expect_echo(&pods.plain, from, "meshed").map(drop)
    })?;
    let is_closed = || -> Result<()> {
        let args = ["--send", "alive", "--half-close", "--timeout-ms", "500"];
        for (source, target) in [(&pod, to), (&pods.plain, from)] {
            let got = testapp::connect(source, target, &args)?;
            ensure!(got.outcome != "ok" && got.received == 0, "{got:?}");
        }
        Ok(())
    };
    cluster.remove(&pod.manifest())?;
    eventually("the pod to be refused", is_closed)?;
    let accepted = (app.accepted()?.len(), elsewhere.accepted()?.len());
    // Longer than flows may drain, and than anything is looked at again.
    let end = std::time::Instant::now() + Duration::from_secs(5);
    while std::time::Instant::now() < end {
        is_closed()?;
    }
    cluster.node(0).kill_agent()?;
    cluster.node(0).start_agent()?;
    let end = std::time::Instant::now() + Duration::from_secs(3);
    while std::time::Instant::now() < end {
        is_closed()?;
    }
    ensure!(
        accepted == (app.accepted()?.len(), elsewhere.accepted()?.len()),
        "an application was reached"
    );
    let mut manifest = pod.manifest();
    manifest["metadata"]["labels"]["weft.dev/mesh"] = "disabled".into();
    cluster.apply(&manifest)?;
    eventually("the pod to be plain", || {
        expect_echo(&pod, to, "plain")?;
        expect_echo(&pods.plain, from, "plain").map(drop)
    })?;
    cluster.apply(&pod.manifest())?;
    cluster.wait_enrolled(&pod)?;
    expect_echo(&pod, to, "meshed")?;
    cluster.remove_pod(pod)?;
    eventually("nothing to be left of the pod", || {
        let metrics = cluster.node(0).metrics()?;
        let entries = metrics.sum("weft_map_entries", &[("map", "PODS")]);
        let enrolled = metrics.sum("weft_pods_enrolled", &[]);
        ensure!(entries == enrolled, "{entries} entries, {enrolled} pods");
        Ok(())
    })
}

fn series_disappear(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let pod = cluster.add_pod(PodSpec::new("short-lived").on(0))?;
    let _app = Server::start(&pods.server, 7410, "echo", &[])?;
    expect_echo(&pod, pods.server.sockets(7410)[0], "hello")?;
    wait_for_metric(
        cluster.node(0),
        "tcp_open_total",
        &[("pod", "short-lived")],
        1.0,
    )?;
    cluster.remove_pod(pod)?;
    eventually("the series to disappear", || {
        let metrics = cluster.node(0).metrics()?;
        let left = metrics.samples().iter().find(|sample| {
            sample
                .labels
                .get("pod")
                .is_some_and(|pod| pod == "short-lived")
        });
        ensure!(left.is_none(), "still there: {left:?}");
        Ok(())
    })
}

fn churn(_: &Cluster, pods: &Pods) -> Result<()> {
    // The ports of loopback connections are free again after a second, so as many a second as there
    // are ports is what there can be; a machine that does more needs more ports.
    let few_ports = |pod: &Pod| {
        pod.netns()
            .sysctl("ipv4/ip_local_port_range", "40000 45999")
    };
    let all_ports = |pod: &Pod| {
        pod.netns()
            .sysctl("ipv4/ip_local_port_range", "32768 60999")
    };
    let touched = [&pods.client, &pods.server, &pods.near];
    touched.iter().try_for_each(|pod| few_ports(pod))?;
    let churned = [pods.server.sockets(7411)[0], pods.near.sockets(7411)[1]].map(|target| {
        let server = if target.ip() == pods.near.addresses()[1] {
            &pods.near
        } else {
            &pods.server
        };
        let _app = Server::start(server, 7411, "echo", &["--quiet"])?;
        // More than twice as many as there are ports.
        let counts = testapp::churn(
            &pods.client,
            target,
            15_000,
            &["--client-first", "--parallel", "4"],
        )?;
        ensure!(counts.of("ok") == 15_000, "to {target}: {counts:?}");
        Ok(())
    });
    touched.iter().try_for_each(|pod| all_ports(pod))?;
    churned.into_iter().collect()
}

fn quota(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let greedy = cluster.add_pod(PodSpec::new("greedy").on(0))?;
    let _app = Server::start(&pods.server, 7412, "echo", &["--quiet"])?;
    let target = pods.server.sockets(7412)[0];
    // While the agent does not accept, connects of the greedy pod stay under way.
    cluster.node(0).pause_agent()?;
    let held = Hold::start(&greedy, target, 12_000, &["--at-once"]);
    let modest = Hold::start(&pods.client, target, 10, &["--at-once"]);
    cluster.node(0).resume_agent()?;
    let (held, modest) = (held?, modest?);
    ensure!(
        held.counts.of("denied") > 0,
        "the greedy pod was not stopped: {:?}",
        held.counts
    );
    ensure!(
        modest.counts.of("started") == 10,
        "another pod was harmed: {:?}",
        modest.counts
    );
    expect_echo(&pods.client, target, "as if nothing were")?;
    held.release()?;
    modest.release()?;
    eventually("the greedy pod to have its share again", || {
        expect_echo(&greedy, target, "x").map(drop)
    })?;
    let metrics = cluster.node(0).metrics()?;
    let of_quota = |label: &str| label.contains("quota");
    let counted = metrics.samples().iter().any(|sample| {
        sample.value > 0.0
            && (of_quota(&sample.name) || sample.labels.values().any(|value| of_quota(value)))
    });
    ensure!(counted, "the refusals are not in the metrics");
    cluster.remove_pod(greedy)
}

fn too_many_flows(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let greedy = cluster.add_pod(PodSpec::new("many-flows").on(0))?;
    let _app = Server::start(&pods.server, 7413, "echo", &["--quiet"])?;
    let target = pods.server.sockets(7413)[0];
    // The server's agent counts the same flows for its pod: only 300 there as well.
    let _other = Server::start(&pods.near, 7413, "echo", &["--quiet"])?;
    let held = Hold::start(&greedy, target, 400, &[])?;
    let labels = [("reason", "too_many_flows"), ("pod", "many-flows")];
    wait_for_metric(cluster.node(0), "weft_refused_total", &labels, 20.0)?;
    expect_echo(&pods.client, pods.near.sockets(7413)[0], "unharmed")?;
    held.release()?;
    eventually("the greedy pod to be let in again", || {
        expect_echo(&greedy, target, "x").map(drop)
    })?;
    cluster.remove_pod(greedy)
}

fn one_program(cluster: &Cluster, _: &Pods) -> Result<()> {
    for node in cluster.nodes() {
        ensure!(node.agent_is_running());
        let memory = node.agent_resident_bytes()?;
        ensure!(
            memory < 256 << 20,
            "the agent of {} holds {memory} bytes",
            node.name()
        );
        let log = node.agent_log();
        ensure!(
            !log.contains("panicked"),
            "the agent of {} panicked",
            node.name()
        );
        // What the last agent that started found attached, as the kernel told it.
        let report = log
            .lines()
            .rev()
            .find(|line| line.contains("kernel programs are in place"));
        let report = report.context("no agent told what is attached")?;
        for hook in HOOKS {
            let found = report.matches(&format!("\"{hook}\"")).count();
            ensure!(
                found == 1,
                "{hook} is attached {found} times at {}: {report}",
                node.name()
            );
        }
    }
    Ok(())
}

/// The hooks that every node has.
const HOOKS: [&str; 8] = [
    "weft_connect4",
    "weft_connect6",
    "weft_getpeername4",
    "weft_getpeername6",
    "weft_getsockname4",
    "weft_getsockname6",
    "weft_sock_ops",
    "weft_probe_sock_ops",
];
