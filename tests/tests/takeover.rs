//! Upgrades: a new agent starts beside the old one, takes the node over in place, and nobody's
//! connection fails.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;
use weft_tests::checks::figure;
use weft_tests::scenario::{Watch, eventually, expect_echo, expect_refusal};
use weft_tests::testapp::{self, LOAD_TEXT, Load, Pulse, Server};
use weft_tests::{Checks, Cluster, ClusterOptions, Pod, PodSpec, run};

/// The pods that all checks share.
struct Pods {
    client: Pod,
    near: Pod,
    server: Pod,
    plain: Pod,
}

#[test]
fn takeover() {
    let all = [
        TEN,
        FLOWS,
        POD_CHURN,
        NEWCOMER_KILLED,
        OLDER_KILLED,
        IGNORANT,
    ];
    run_checks("takeover", ClusterOptions::default(), &all);
}

/// Every upgrade is one to another layout of the kernel's maps: there, and back, and there again.
#[test]
fn takeover_between_layouts() {
    let options = ClusterOptions {
        alternate_layouts: true,
        ..ClusterOptions::default()
    };
    let most = [
        TEN,
        FLOWS,
        POD_CHURN,
        NEWCOMER_KILLED,
        OLDER_KILLED,
        IGNORANT,
        OPTED_OUT,
    ];
    run_checks("takeover between layouts", options, &most);
}

/// Agents that run as services of the host: each in a cgroup of its own, apart from the pods.
#[test]
fn takeover_in_separate_cgroups() {
    let options = ClusterOptions {
        separate_cgroups: true,
        ..ClusterOptions::default()
    };
    run_checks(
        "takeover in separate cgroups",
        options,
        &[TEN, OLDER_KILLED],
    );
}

fn run_checks(test: &str, options: ClusterOptions, wanted: &[Check]) {
    let deadline = format!("{}s", DRAIN.as_secs());
    let cluster = Cluster::with(ClusterOptions {
        agent_args: ["--drain-deadline", &deadline].map(Into::into).to_vec(),
        ..options
    })
    .expect("a cluster");
    let add = |spec| cluster.add_pod(spec).expect("a pod");
    let probe = json!({"tcpSocket": {"port": 7500}});
    let near = PodSpec::new("near").on(0).probe("livenessProbe", probe);
    let pods = Pods {
        client: add(PodSpec::new("client").on(0)),
        near: add(near),
        server: add(PodSpec::new("server").on(1)),
        plain: add(PodSpec::new("plain").on(0).unmeshed()),
    };
    let mut checks = Checks::new(test);
    for (name, run) in wanted {
        checks.check(name, || run(&cluster, &pods));
    }
    checks.finish();
    let name = cluster.name().to_owned();
    drop((pods, cluster));
    assert_eq!(
        run::remains(&name),
        Vec::<String>::new(),
        "nothing may be left"
    );
}

type Check = (&'static str, fn(&Cluster, &Pods) -> Result<()>);

const TEN: Check = ("ten upgrades in a row under load", ten_in_a_row);
const FLOWS: Check = ("short flows finish, long ones are reset and counted", flows);
const POD_CHURN: Check = ("pods come and go while two agents run", pods_come_and_go);
const NEWCOMER_KILLED: Check = (
    "the newcomer is killed before and after it took over",
    newcomer_killed,
);
const OLDER_KILLED: Check = ("the older agent is killed meanwhile", older_killed);
const IGNORANT: Check = (
    "a newcomer that knows nothing leaves all as it is",
    knows_nothing,
);
const OPTED_OUT: Check = (
    "a pod that is opted out while no agent runs is let go by another layout",
    opted_out_meanwhile,
);

fn ten_in_a_row(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let _app = Server::start(&pods.server, 7500, "echo", &["--quiet"])?;
    let _near = Server::start(&pods.near, 7500, "echo", &["--quiet"])?;
    let watch = Watch::start(cluster, &[&pods.client, &pods.near, &pods.server])?;
    let args = ["--timeout-ms", "8000"];
    let app = testapp::path()?.display().to_string();
    let (across, same) = (pods.server.sockets(7500), pods.near.sockets(7500));
    let loads = [
        ("across", Load::start(&pods.client, across[0], &args)?),
        ("across, too", Load::start(&pods.near, across[0], &args)?),
        ("on one node", Load::start(&pods.client, same[0], &args)?),
        ("from plaintext", Load::start(&pods.plain, same[0], &args)?),
        (
            "plaintext across",
            Load::start(&pods.plain, across[0], &args)?,
        ),
        ("to itself", Load::start(&pods.near, same[0], &args)?),
        (
            "the kubelet's probes",
            Load::spawn(cluster.node(0).kubelet_command(&app)?, same[0], &args)?,
        ),
    ];
    let mut times = Vec::new();
    for round in 0..10 {
        // Whoever does the upgrade may wait for the new agent, or not.
        let early = round % 2 == 1;
        times.push(cluster.node(0).take_over(early)?.as_millis());
        if round % 2 == 0 {
            cluster.node(1).take_over(!early)?;
        }
    }
    for node in cluster.nodes() {
        node.wait_left()?;
    }
    let mut total = 0;
    for (which, load) in loads {
        let counts = load.stop()?;
        ensure!(counts.of("ok") > 100, "{which}: {counts:?}");
        ensure!(counts.of("ok") == counts.total(), "{which}: {counts:?}");
        total += counts.total();
    }
    figure("flows meanwhile, none failed", total);
    figure(
        "upgrades in a row under load: ms until ready",
        format!("{times:?}"),
    );
    watch.finish_encrypted(&[]).map(drop)?;
    one_program(cluster)
}

fn flows(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let _app = Server::start(&pods.server, 7501, "echo", &["--quiet"])?;
    let _near = Server::start(&pods.near, 7501, "echo", &["--quiet"])?;
    let targets = [pods.server.sockets(7501)[0], pods.near.sockets(7501)[1]];
    for node in [0, 1] {
        let start = |target: &std::net::SocketAddr| Pulse::start(&pods.client, *target);
        let short: Vec<Pulse> = targets.iter().map(start).collect::<Result<_>>()?;
        let mut long: Vec<Pulse> = targets.iter().map(start).collect::<Result<_>>()?;
        cluster.node(node).take_over(false)?;
        let superseded = Instant::now();
        // Most of what they have.
        std::thread::sleep(DRAIN / 2);
        for pulse in short {
            let end = pulse.stop()?;
            ensure!(end.outcome == "ok", "a short flow: {end:?}");
        }
        let affected = match node {
            0 => &mut long[..],
            // The flow on node 0 does not concern the other one.
            _ => &mut long[..1],
        };
        for pulse in affected {
            let end = pulse.wait_broken(2 * DRAIN)?;
            ensure!(end.outcome == "reset", "a long flow: {end:?}");
            ensure!(superseded.elapsed() >= DRAIN / 2);
        }
        cluster.node(node).wait_left()?;
        let log = cluster.node(node).agent_log();
        let drained = log.lines().rev().find(|line| line.contains("drained; "));
        let drained = drained.context("the older agent did not say that it drained")?;
        // The flow on one node is one, not two.
        let expected = if node == 0 { "reset=2" } else { "reset=1" };
        ensure!(drained.contains(expected), "{expected}: {drained}");
    }
    one_program(cluster)
}

fn pods_come_and_go(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let node = cluster.node(0);
    let _app = Server::start(&pods.server, 7502, "echo", &["--quiet"])?;
    let leaver = cluster.add_pod(PodSpec::new("leaver").on(0))?;
    let pulse = Pulse::start(&pods.client, pods.server.sockets(7502)[0])?;
    let comer = cluster.build_pod(PodSpec::new("comer").on(0))?;
    // Described while the newcomer starts: whichever agent enrolls it, it ends up with the new one.
    cluster.announce(&comer)?;
    node.take_over(false)?;
    // The older one still drains.
    cluster.remove_pod(leaver)?;
    cluster.wait_enrolled(&comer)?;
    let later = cluster.add_pod(PodSpec::new("later").on(0))?;
    for pod in [&comer, &later] {
        let _app = Server::start(pod, 7502, "echo", &["--quiet"])?;
        expect_echo(pod, pods.server.sockets(7502)[0], "from a new pod")?;
        expect_echo(&pods.client, pod.sockets(7502)[0], "to a new pod")?;
    }
    drop(pulse);
    node.wait_left()?;
    for pod in [&comer, &later] {
        expect_echo(pod, pods.server.sockets(7502)[0], "after that")?;
    }
    cluster.remove_pod(comer)?;
    cluster.remove_pod(later)?;
    one_program(cluster)
}

fn newcomer_killed(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let node = cluster.node(0);
    let _app = Server::start(&pods.server, 7503, "echo", &["--quiet"])?;
    let target = pods.server.sockets(7503)[0];
    let watch = Watch::start(cluster, &[&pods.client, &pods.server])?;
    // At moments from its start to well after it took over.
    let delays = [5, 50, 150, 300, 600, 1200].into_iter();
    // Between layouts, what it began is taken up by an agent of the older one's layout, or of its own.
    for (delay_ms, repeat) in delays.flat_map(|it| [(it, false), (it, true)]) {
        let new = node.spawn_beside()?;
        std::thread::sleep(Duration::from_millis(delay_ms));
        new.kill()?;
        if repeat {
            node.repeat_layout();
        }
        // Served by nobody or by somebody, but never in the clear.
        let args = ["--send", LOAD_TEXT, "--half-close", "--timeout-ms", "1500"];
        let _ = testapp::connect(&pods.client, target, &args)?;
        node.take_over(false)?;
        expect_echo(&pods.client, target, LOAD_TEXT)?;
        node.wait_left()?;
        node.wait_alone()?;
    }
    watch.finish_encrypted(&[LOAD_TEXT]).map(drop)?;
    one_program(cluster)
}

fn older_killed(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let node = cluster.node(0);
    let _app = Server::start(&pods.server, 7504, "echo", &["--quiet"])?;
    let target = pods.server.sockets(7504)[0];
    let watch = Watch::start(cluster, &[&pods.client, &pods.server])?;
    for delay_ms in [5, 100, 400, 1000] {
        node.replace_killing(Duration::from_millis(delay_ms))?;
        eventually("flows to work", || {
            expect_echo(&pods.client, target, LOAD_TEXT).map(drop)
        })?;
    }
    watch.finish_encrypted(&[LOAD_TEXT]).map(drop)?;
    one_program(cluster)
}

fn knows_nothing(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let node = cluster.node(0);
    let _app = Server::start(&pods.server, 7505, "echo", &["--quiet"])?;
    let target = pods.server.sockets(7505)[0];
    cluster.controller()?.kill()?;
    let load = Load::start(&pods.client, target, &["--timeout-ms", "8000"])?;
    let new = node.spawn_beside()?;
    std::thread::sleep(Duration::from_secs(3));
    let (status, body) = node.ready_on_socket()?;
    ensure!(
        status == 503 && body.contains("not taken over"),
        "an agent that knows nothing: {status} {body}"
    );
    expect_echo(&pods.client, target, "served by the older one")?;
    new.kill()?;
    // Of another layout, it had hooks of its own.
    node.wait_alone()?;
    expect_echo(&pods.client, target, "served by the older one")?;
    cluster.controller()?.start()?;
    let counts = load.stop()?;
    ensure!(counts.of("ok") == counts.total(), "{counts:?}");
    node.take_over(false)?;
    node.wait_left()?;
    one_program(cluster)
}

fn opted_out_meanwhile(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let node = cluster.node(0);
    let _app = Server::start(&pods.plain, 7506, "echo", &["--quiet"])?;
    let target = pods.plain.sockets(7506)[0];
    let leaver = cluster.add_pod(PodSpec::new("leaver").on(0))?;
    node.kill_agent()?;
    expect_refusal(&leaver, target, "while no agent runs")?;
    let mut manifest = leaver.manifest();
    manifest["metadata"]["labels"]["weft.dev/mesh"] = "disabled".into();
    cluster.apply(&manifest)?;
    node.start_agent()?;
    eventually("the pod to be let go", || {
        let said = expect_echo(&leaver, target, "out of the mesh")?;
        let seen = said.local.context("no address")?;
        ensure!(seen.ip() == leaver.v4(), "{seen}");
        Ok(())
    })?;
    cluster.remove_pod(leaver)?;
    one_program(cluster)
}

/// Every hook has one program: what the last agent that started found, as the kernel told it. And what
/// others had is gone.
fn one_program(cluster: &Cluster) -> Result<()> {
    for node in cluster.nodes() {
        node.wait_alone()?;
        let log = node.agent_log();
        ensure!(!log.contains("panicked"), "an agent panicked");
        let report = log
            .lines()
            .rev()
            .find(|line| line.contains("kernel programs are in place"));
        let report = report.context("no agent told what is attached")?;
        for hook in ["weft_connect4", "weft_connect6", "weft_sock_ops"] {
            let found = report.matches(&format!("\"{hook}\"")).count();
            ensure!(found == 1, "{hook} is attached {found} times: {report}");
        }
    }
    Ok(())
}

/// How long flows may go on after another agent took over.
const DRAIN: Duration = Duration::from_secs(4);
