//! Weft as its manifests say: the image's programs in containers with the commands, variables, mounts, users and
//! capabilities of `daemonset/weft.yaml`, and nothing else. What is not written there is not there.

use std::fs;
use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use weft_tests::checks::figure;
use weft_tests::contain::{Container, capability_bits};
use weft_tests::scenario::{Watch, eventually, expect_echo, expect_refusal};
use weft_tests::testapp::{Pulse, Server};
use weft_tests::{Checks, Cluster, ClusterOptions, Pod, PodSpec};

struct Pods {
    client: Pod,
    server: Pod,
}

impl Pods {
    fn target(&self) -> SocketAddr {
        self.server.sockets(7000)[0]
    }
}

#[test]
fn deployed() {
    let options = ClusterOptions {
        kubernetes: true,
        deployed: true,
        ..ClusterOptions::default()
    };
    let cluster = Cluster::with(options).expect("a cluster");
    let took = cluster.ready_after().as_secs_f64();
    figure("ready after seconds", format!("{took:.1}"));
    let add = |spec: PodSpec| cluster.add_pod(spec).expect("a pod");
    let pods = Pods {
        client: add(PodSpec::new("client").on(0)),
        server: add(PodSpec::new("server").on(1)),
    };
    let _echo = Server::start(&pods.server, 7000, "echo", &[]).expect("an echo server");
    let mut checks = Checks::new("deployed");
    let mut check = |name: &str, run: fn(&Cluster, &Pods) -> Result<()>| {
        checks.check(name, || run(&cluster, &pods));
    };
    check("processes have the rights that are written down", rights);
    check("the agent knows its limit of memory", limit_of_memory);
    check("probes say what they are to say", probes);
    check("pods of different nodes talk, encrypted", encrypted);
    check("a rolling update refuses nobody", rolling_update);
    check(
        "agents killed and back: refused, never in the clear",
        killed,
    );
    check("each capability of the agent is needed", needed);
    check(
        "each capability of what comes before it is needed",
        needed_before,
    );
    check("removed, nothing is left, and pods talk", removed);
    checks.finish();
}

fn rights(cluster: &Cluster, _: &Pods) -> Result<()> {
    let agent = cluster.node(0).agent_pid().context("no agent")?;
    expect_rights(agent, &cluster.node(0).container(agent)?)?;
    let controller = cluster.controller()?;
    let container = controller.container()?;
    ensure!(container.capabilities.is_empty() && container.user != 0);
    expect_rights(controller.pid().context("no controller")?, &container)
}

/// What the kernel says of a process, beside what its container is to be.
fn expect_rights(pid: u32, container: &Container) -> Result<()> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let field = |name: &str| {
        let line = status.lines().find_map(|it| it.strip_prefix(name));
        line.unwrap_or_default().trim().to_owned()
    };
    let all = format!("{:016x}", capability_bits(&container.capabilities)?);
    ensure!(field("CapBnd:") == all, "bounding: {}", field("CapBnd:"));
    ensure!(field("CapEff:") == all, "effective: {}", field("CapEff:"));
    ensure!(field("CapInh:") == format!("{:016x}", 0), "inheritable");
    let user = container.user.to_string();
    ensure!(field("Uid:").split_whitespace().all(|it| it == user));
    ensure!(container.no_new_privileges && field("NoNewPrivs:") == "1");
    ensure!(container.default_seccomp && field("Seccomp:") == "2");
    let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo"))?;
    let root = mounts.lines().find(|it| it.split(' ').nth(4) == Some("/"));
    let options = root
        .and_then(|it| it.split(' ').nth(5))
        .context("no root")?;
    ensure!(container.read_only_root && options.split(',').any(|it| it == "ro"));
    Ok(())
}

/// It is the container's, not what the machine has.
fn limit_of_memory(cluster: &Cluster, _: &Pods) -> Result<()> {
    let log = cluster.node(0).agent_log();
    let line = log.lines().find(|it| it.contains("memory_mib"));
    let line = line.context("it says nothing of memory")?;
    ensure!(line.contains("\"memory_mib\":1024"), "{line}");
    Ok(())
}

fn probes(cluster: &Cluster, _: &Pods) -> Result<()> {
    let controller = cluster.controller()?;
    for probe in ["startupProbe", "livenessProbe", "readinessProbe"] {
        for node in cluster.nodes() {
            let pid = node.agent_pid().context("no agent")?;
            node.probe(pid, probe)?
                .success()
                .context(probe.to_owned())?;
        }
        let reply = controller.probe(probe)?;
        ensure!(reply.status == 200, "{probe}: {}", reply.body);
    }
    Ok(())
}

fn encrypted(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let watch = Watch::start(cluster, &[&pods.client, &pods.server])?;
    expect_echo(&pods.client, pods.target(), "between-nodes")?;
    watch.finish_encrypted(&["between-nodes"])?;
    Ok(())
}

/// As the DaemonSet's controller does it: another pod beside, and the old one is told to end once that one is ready.
/// Meanwhile probes of each ask their own agent.
fn rolling_update(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let mut pulse = Pulse::start(&pods.client, pods.target())?;
    for node in cluster.nodes() {
        let old = node.agent_pid().context("no agent")?;
        node.take_over(false)?;
        let new = node.agent_pid().context("no agent")?;
        ensure!(old != new, "it is the same agent");
        node.probe(new, "readinessProbe")?.success()?;
        for number in 0..20 {
            expect_echo(&pods.client, pods.target(), &format!("during-{number}"))?;
        }
    }
    ensure!(
        pulse.is_beating(),
        "a connection broke before the drain deadline"
    );
    ensure!(pulse.stop()?.outcome == "ok", "a connection broke");
    cluster.nodes().iter().try_for_each(|it| it.wait_left())?;
    expect_echo(&pods.client, pods.target(), "after-the-update").map(drop)
}

fn killed(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let watch = Watch::start(cluster, &[&pods.client, &pods.server])?;
    let node = cluster.node(0);
    node.kill_agent()?;
    expect_refusal(&pods.client, pods.target(), "without-an-agent")?;
    node.start_agent()?;
    eventually("the agent to serve again", || {
        expect_echo(&pods.client, pods.target(), "back-again").map(drop)
    })?;
    watch.finish_encrypted(&["back-again"])?;
    Ok(())
}

/// Without it the agent does not start, or says what it cannot do.
fn needed(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let node = cluster.node(0);
    let pid = node.agent_pid().context("no agent")?;
    let mut given = node.container(pid)?.capabilities;
    // What a pod that has taken all ports does is tried elsewhere: `hostile_pod: the agent's ports, taken before`.
    let mut tried = vec!["NET_BIND_SERVICE".to_owned()];
    for (capability, says) in [
        ("SYS_ADMIN", "Operation not permitted"),
        ("NET_ADMIN", "Operation not permitted"),
        ("SYS_NICE", "CAP_SYS_NICE is missing"),
        ("SYS_PTRACE", "CAP_SYS_PTRACE"),
    ] {
        node.withhold(&[capability]);
        node.stop_agent()?;
        let before = node.agent_log().len();
        node.spawn_agent()?;
        eventually(&format!("the agent without {capability} to say so"), || {
            let log = node.agent_log();
            let log = log.get(before..).unwrap_or_default();
            ensure!(log.contains(says), "{log}");
            Ok(())
        })?;
        node.withhold(&[]);
        // It may have ended by itself.
        let _ = node.kill_agent();
        node.start_agent()?;
        tried.push(capability.to_owned());
    }
    eventually("the agent with all of them to serve", || {
        expect_echo(&pods.client, pods.target(), "with-all").map(drop)
    })?;
    given.sort();
    tried.sort();
    ensure!(given == tried, "it has {given:?}; tried were {tried:?}");
    Ok(())
}

/// The same of `prepare`, which has nothing to mount here but looks whether it has.
fn needed_before(cluster: &Cluster, _: &Pods) -> Result<()> {
    let node = cluster.node(0);
    node.prepare_without(&[])?.success()?;
    for capability in ["SYS_ADMIN", "SYS_CHROOT", "SYS_PTRACE"] {
        let finished = node.prepare_without(&[capability])?;
        ensure!(finished.success().is_err(), "it does without {capability}");
    }
    Ok(())
}

/// As docs/uninstall.md says, of pods that have not even left the mesh.
fn removed(cluster: &Cluster, pods: &Pods) -> Result<()> {
    for node in cluster.nodes() {
        node.stop_agent()?;
    }
    expect_refusal(&pods.client, pods.target(), "agents-only")?;
    for node in cluster.nodes() {
        node.uninstall()?;
        let left = node.pins()?;
        ensure!(left.is_empty(), "{left:?}");
    }
    expect_echo(&pods.client, pods.target(), "without-a-mesh").map(drop)
}
