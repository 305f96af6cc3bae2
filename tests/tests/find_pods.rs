//! Pods of a cluster, found by their processes: nobody says where their network namespaces are. Control groups as each
//! runtime lays them out, pods that have not started, that get another sandbox, that pass for others, and that join the
//! mesh while they run.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use weft_tests::cluster::Node;
use weft_tests::command::Process;
use weft_tests::scenario::{REFUSED, Watch, eventually, expect_echo};
use weft_tests::testapp::{self, Connected, Load, Pulse, Server};
use weft_tests::{Checks, Cluster, ClusterOptions, DEADLINE, Layout, Pod, PodSpec};

/// The nodes: clients are on the first one, servers on the second. The agent of the third sees another `/proc`, and
/// ends no connections.
const SERVERS: usize = 1;
const ELSEWHERE: usize = 2;

struct Stage {
    cluster: Cluster,
    client: Pod,
    /// The `/proc` of the third node's agent.
    proc: PathBuf,
}

#[test]
fn find_pods() {
    let folder = tempfile::tempdir().expect("a folder");
    let proc = folder.path().join("proc");
    fs::create_dir(&proc).expect("a folder");
    // Of the host, as this process is.
    show(&proc, 1, std::process::id(), "0::/init.scope\n").expect("a process");
    let args = ["--proc", &proc.display().to_string()].map(str::to_owned);
    let keep = ["--end-connections-on-opt-in", "false"].map(str::to_owned);
    let cluster = Cluster::with(ClusterOptions {
        kubernetes: true,
        nodes: 3,
        node_args: vec![(ELSEWHERE, [args, keep].concat())],
        ..ClusterOptions::default()
    });
    let cluster = cluster.expect("a cluster");
    let client = cluster.add_pod(PodSpec::new("client")).expect("a pod");
    let stage = Stage {
        cluster,
        client,
        proc,
    };
    let mut checks = Checks::new("find_pods");
    let mut check = |name: &str, run: fn(&Stage) -> Result<()>| {
        checks.check(name, || run(&stage));
    };
    check("programs that see connects are told", hooks);
    check("pods are found however they are laid out", layouts);
    check("version 1, and both versions", older_layouts);
    check("a pod without processes is told of", not_found);
    check("a pod that has not started is waited for", not_started);
    check(
        "a pod that gets another sandbox is found again",
        new_sandbox,
    );
    check("an agent that takes over finds all pods before", taken_over);
    check("a pod that passes for another gets nothing by it", hostile);
    check("a namespace of its own gets a pod nowhere", out_of_its_own);
    check("connections from before are ended, once", opt_in);
    check("or kept, if that is asked for", kept);
    checks.finish();
}

/// Nobody says where the control groups are. The kubelet's is that of its process; other processes of the host are nobody.
#[test]
fn find_control_groups() {
    let cluster = Cluster::with(ClusterOptions {
        kubernetes: true,
        nodes: 1,
        find_cgroups: true,
        ..ClusterOptions::default()
    });
    let cluster = cluster.expect("a cluster");
    let probed = PodSpec::new("probed")
        .annotation("config.linkerd.io/default-inbound-policy", "deny")
        .probe("readinessProbe", json!({"tcpSocket": {"port": 8080}}));
    let pod = cluster.add_pod(probed).expect("a pod");
    let mut checks = Checks::new("find_control_groups");
    checks.check("the kubelet is known by its process", || {
        kubelet(&cluster, &pod)
    });
    checks.check("pods are intercepted from the root", || {
        let dump = cluster.node(0).config_dump()?;
        let hooks = dump["connect_hooks"].as_array().context("connect_hooks")?;
        let root = weft_tests::cgroup::hierarchy()?.display().to_string();
        let at_root = hooks.iter().filter(|it| it["cgroup"] == root);
        let own = at_root.flat_map(|it| it["programs"].as_array().into_iter().flatten());
        let own = own.filter(|it| it["is_own"] == true).count();
        ensure!(own == 2, "{hooks:?}");
        let server = cluster.add_pod(PodSpec::new("server"))?;
        let _app = Server::start(&server, 8080, "echo", &[])?;
        let redirected = || -> Result<f64> {
            let metrics = cluster.node(0).metrics()?;
            Ok(metrics.sum("weft_pod_redirected_total", &[("pod", "probed")]))
        };
        let before = redirected()?;
        expect_echo(&pod, server.sockets(8080)[0], "by-the-root")?;
        ensure!(redirected()? > before, "it was not redirected");
        Ok(())
    });
    checks.finish();
}

fn kubelet(cluster: &Cluster, pod: &Pod) -> Result<()> {
    let node = cluster.node(0);
    let app = testapp::path()?;
    let _server = Server::start(pod, 8080, "echo", &[])?;
    let by = |kubelet: bool| -> Result<Connected> {
        let app = app.display().to_string();
        let program = match kubelet {
            true => node.kubelet_command(&app)?,
            false => node.host_command(&app)?,
        };
        let args = ["--send", "probe", "--half-close"];
        testapp::connect_with(program, pod.sockets(8080)[0], &args)
    };
    eventually("probes to pass", || by(true)?.expect(&["ok"]).map(drop))?;
    by(false)?.expect(&REFUSED)?;
    let log = node.agent_log();
    ensure!(log.contains("the root serves"), "{log}");
    Ok(())
}

/// This agent's are at the pods' control group, for each family once.
fn hooks(stage: &Stage) -> Result<()> {
    let node = stage.cluster.node(SERVERS);
    let dump = node.config_dump()?;
    let hooks = dump["connect_hooks"].as_array().context("connect_hooks")?;
    for hook in ["connect4", "connect6"] {
        let at = |it: &&Value| {
            it["hook"] == hook && it["cgroup"] == node.cgroup().path().display().to_string()
        };
        let here = hooks.iter().find(at).context("none at the pods' group")?;
        let programs = here["programs"].as_array().context("programs")?;
        let own = programs.iter().filter(|it| it["is_own"] == true);
        let names: Vec<_> = own.map(|it| it["name"].as_str()).collect();
        ensure!(names == [Some(&*format!("weft_{hook}"))], "{hooks:?}");
    }
    Ok(())
}

/// Whatever the runtime, a flow of the pod is encrypted as soon as it is enrolled.
fn layouts(stage: &Stage) -> Result<()> {
    for layout in Layout::ALL {
        let name = format!("{layout:?}").to_lowercase();
        let spec = PodSpec::new(&name).on(SERVERS).layout(layout);
        let pod = if layout == Layout::Crio || layout == Layout::NoQos {
            // Found by its container: there is nothing else that runs, or nothing that its status names.
            let pod = stage.cluster.build_pod(spec)?;
            let running = keep_running(&pod)?;
            stage.cluster.announce(&pod)?;
            stage
                .cluster
                .wait_enrolled(&pod)
                .with_context(|| name.clone())?;
            drop(running);
            pod
        } else {
            stage.cluster.add_pod(spec).with_context(|| name.clone())?
        };
        encrypted(stage, &pod).with_context(|| name.clone())?;
        stage.cluster.remove_pod(pod)?;
    }
    Ok(())
}

/// The agent sees the processes as on a node with control groups of version 1, or of both.
fn older_layouts(stage: &Stage) -> Result<()> {
    for (name, text) in [
        (
            "v1",
            "11:memory:/kubepods/burstable/podUID/ID\n4:pids:/kubepods/burstable/podUID/ID\n1:name=systemd:/kubepods/burstable/podUID/ID\n",
        ),
        (
            "hybrid",
            "8:memory:/kubepods.slice/kubepods-podUNDERSCORED.slice/docker-ID.scope\n1:name=systemd:/kubepods.slice/kubepods-podUNDERSCORED.slice/docker-ID.scope\n0::/system.slice/docker.service\n",
        ),
    ] {
        let mut pod = stage
            .cluster
            .build_pod(PodSpec::new(name).on(ELSEWHERE).layout(Layout::Systemd))?;
        let text = text
            .replace("UNDERSCORED", &pod.uid().replace('-', "_"))
            .replace("UID", pod.uid())
            .replace("ID", &"f".repeat(64));
        stage.cluster.announce(&pod)?;
        eventually("the pod to be missed", || {
            waiting(stage.cluster.node(ELSEWHERE), "not_found", 1.0)
        })?;
        let pid = pod.pause().context("a sandbox")?.pid();
        show(&stage.proc, pid, pid, &text)?;
        stage
            .cluster
            .wait_enrolled(&pod)
            .with_context(|| name.to_owned())?;
        encrypted(stage, &pod).with_context(|| name.to_owned())?;
        stage.cluster.remove_pod(pod)?;
    }
    Ok(())
}

fn not_found(stage: &Stage) -> Result<()> {
    let node = stage.cluster.node(SERVERS);
    let pod = stage
        .cluster
        .build_pod(PodSpec::new("nowhere").on(SERVERS))?;
    let (uid, manifest) = (pod.uid().to_owned(), pod.manifest());
    pod.delete()?;
    stage.cluster.apply(&manifest)?;
    let sought = format!("no process is in a control group named pod{uid}");
    eventually("readiness to name the pod, and what is sought", || {
        let (status, body) = node.ready()?;
        let told = body.contains("default/nowhere") && body.contains(&sought);
        ensure!(status == 503 && told, "{status} {body}");
        Ok(())
    })?;
    waiting(node, "not_found", 1.0)?;
    stage.cluster.remove(&manifest)?;
    node.wait_ready()?;
    waiting(node, "not_found", 0.0)
}

/// It is known before it has an address, and harms nobody's readiness.
fn not_started(stage: &Stage) -> Result<()> {
    let node = stage.cluster.node(SERVERS);
    let pod = stage.cluster.build_pod(PodSpec::new("early").on(SERVERS))?;
    let mut early = pod.manifest();
    early["status"] = json!({"phase": "Pending"});
    let mut later = pod.manifest();
    let uid = "00000000-0000-4000-8000-fffffffffff0";
    for manifest in [&mut early, &mut later] {
        manifest["metadata"]["uid"] = uid.into();
    }
    stage.cluster.apply(&early)?;
    eventually("the pod to be waited for", || {
        waiting(node, "not_started", 1.0)?;
        let (status, body) = node.ready()?;
        ensure!(
            status == 200 && body.contains("it has not started yet"),
            "{status} {body}"
        );
        Ok(())
    })?;
    // Its sandbox is there: it is enrolled, still without an address.
    let mut sandboxed = pod.manifest();
    sandboxed["status"] = json!({"phase": "Pending"});
    stage.cluster.apply(&sandboxed)?;
    node.wait_enrolled("default", "early")?;
    stage.cluster.apply(&pod.manifest())?;
    stage.cluster.wait_enrolled(&pod)?;
    encrypted(stage, &pod)?;
    stage.cluster.remove_pod(pod)
}

/// The same UID, another network namespace.
fn new_sandbox(stage: &Stage) -> Result<()> {
    let node = stage.cluster.node(SERVERS);
    let mut pod = stage.cluster.add_pod(PodSpec::new("again").on(SERVERS))?;
    let cookie = |what: &str| -> Result<u64> {
        let dump = node.config_dump()?;
        let pods = dump["pods"].as_array().context("pods")?;
        let pod = pods.iter().find(|it| it["name"] == "again");
        let cookie = pod.and_then(|it| it["netns_cookie"].as_u64());
        cookie.with_context(|| what.to_owned())
    };
    let first = cookie("the first one")?;
    encrypted(stage, &pod)?;
    stage.cluster.restart_sandbox(&mut pod)?;
    eventually("the second sandbox", || {
        ensure!(cookie("the second one")? != first, "it still is the first");
        Ok(())
    })?;
    encrypted(stage, &pod)?;
    stage.cluster.remove_pod(pod)
}

/// Nobody's connection fails, and none is ended.
fn taken_over(stage: &Stage) -> Result<()> {
    let node = stage.cluster.node(SERVERS);
    let server = stage.cluster.add_pod(PodSpec::new("lasting").on(SERVERS))?;
    let _app = Server::start(&server, 8080, "echo", &["--quiet"])?;
    let loads = server
        .sockets(8080)
        .map(|to| Load::start(&stage.client, to, &["--timeout-ms", "20000"]));
    for early in [false, true] {
        node.take_over(early)?;
        node.wait_left()?;
    }
    for load in loads {
        let counts = load?.stop()?;
        ensure!(counts.of("ok") == counts.total(), "{counts:?}");
    }
    ensure!(ended(node)? == 0.0, "connections were ended");
    stage.cluster.remove_pod(server)
}

/// A pod whose control group is its own to divide calls a part like the one of another pod, and waits there.
fn hostile(stage: &Stage) -> Result<()> {
    let node = stage.cluster.node(SERVERS);
    let attacker = stage
        .cluster
        .add_pod(PodSpec::new("attacker").on(SERVERS))?;
    let victim = stage
        .cluster
        .build_pod(PodSpec::new("victim").on(SERVERS))?;
    let uid = victim.uid().replace('-', "_");
    let path = format!(
        "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{uid}.slice/cri-containerd-{}.scope",
        "a".repeat(64)
    );
    let inside = attacker.cgroup().descendant(&path)?;
    // As old as it gets, and called as a sandbox's.
    let trap = attacker
        .command("unshare")?
        .args(["--net", "sleep", "infinity"])
        .spawn()?;
    fs::write(inside.path().join("cgroup.procs"), trap.pid().to_string())?;
    let control = fs::read_to_string(format!("/proc/{}/cgroup", trap.pid()))?;
    ensure!(control.contains(&uid), "the trap is not laid: {control}");
    // There is nothing of the victim yet.
    let mut manifest = victim.manifest();
    let ghost = "00000000-0000-4000-8000-fffffffffff1";
    manifest["metadata"]["uid"] = ghost.into();
    let ghostly = path.replace(&uid, &ghost.replace('-', "_"));
    let ghostly = attacker.cgroup().descendant(&ghostly)?;
    fs::write(ghostly.path().join("cgroup.procs"), trap.pid().to_string())?;
    stage.cluster.apply(&manifest)?;
    eventually("nothing to be taken for the victim", || {
        waiting(node, "not_found", 1.0)
    })?;
    fs::write(inside.path().join("cgroup.procs"), trap.pid().to_string())?;
    let control = fs::read_to_string(format!("/proc/{}/cgroup", trap.pid()))?;
    ensure!(control.contains(&uid), "the trap is not laid: {control}");
    stage.cluster.announce(&victim)?;
    stage.cluster.wait_enrolled(&victim)?;
    encrypted(stage, &victim)?;
    drop(trap);
    encrypted(stage, &attacker)?;
    stage.cluster.remove_pod(victim)?;
    stage.cluster.remove_pod(attacker)
}

/// Where no process keeps the sandbox, the oldest container's counts, unless it went into a namespace that it made. If it
/// may make one as the host does, nobody's is taken.
fn out_of_its_own(stage: &Stage) -> Result<()> {
    let spec = PodSpec::new("escapist").on(SERVERS).layout(Layout::Crio);
    let pod = stage.cluster.build_pod(spec)?;
    let hiding = pod
        .command("unshare")?
        .args(["--user", "--net", "sleep", "infinity"])
        .spawn()?;
    eventually("it to hide", || {
        let comm = fs::read_to_string(format!("/proc/{}/comm", hiding.pid()))?;
        ensure!(comm.trim() == "sleep", "{comm}");
        Ok(())
    })?;
    let running = keep_running(&pod)?;
    let privileged = pod
        .command("unshare")?
        .args(["--net", "sleep", "infinity"])
        .spawn()?;
    eventually("it to hide better", || {
        let comm = fs::read_to_string(format!("/proc/{}/comm", privileged.pid()))?;
        ensure!(comm.trim() == "sleep", "{comm}");
        Ok(())
    })?;
    let node = stage.cluster.node(SERVERS);
    stage.cluster.announce(&pod)?;
    eventually("nothing to be taken", || waiting(node, "ambiguous", 1.0))?;
    ensure!(!node.is_enrolled("default", "escapist")?, "it is enrolled");
    drop(privileged);
    stage.cluster.wait_enrolled(&pod)?;
    encrypted(stage, &pod)?;
    drop((hiding, running));
    stage.cluster.remove_pod(pod)
}

/// A running pod is labelled, unlabelled and labelled again, under load.
fn opt_in(stage: &Stage) -> Result<()> {
    let cluster = &stage.cluster;
    let node = cluster.node(SERVERS);
    let server = cluster.add_pod(PodSpec::new("old-server").on(SERVERS).unmeshed())?;
    let client = cluster.add_pod(PodSpec::new("old-client").unmeshed())?;
    let _app = Server::start(&server, 8080, "echo", &[])?;
    let to: SocketAddr = server.sockets(8080)[0];
    let load = Load::start(&client, to, &[])?;
    let before = ended(node)?;
    for round in 1..=2_u8 {
        // Both ends are outside of the mesh.
        let mut pulses = server
            .sockets(8080)
            .into_iter()
            .map(|to| Pulse::start(&client, to))
            .collect::<Result<Vec<_>>>()?;
        let own = Pulse::start(&server, SocketAddr::new([127, 0, 0, 1].into(), 8080))?;
        let mut own = own;
        cluster.apply(&labelled(&server))?;
        cluster
            .node(SERVERS)
            .wait_enrolled("default", server.name())?;
        for pulse in &mut pulses {
            let end = pulse.wait_broken(DEADLINE)?;
            ensure!(end.outcome != "ok" && end.pulses > 0, "{end:?}");
        }
        ensure!(
            own.is_beating(),
            "a connection of the pod with itself ended"
        );
        let after = ended(node)?;
        ensure!(
            after >= before + 2.0 * f64::from(round),
            "round {round}: {before} to {after}"
        );
        // What comes now comes through the mesh, and is left alone.
        let mut new = Pulse::start(&client, to)?;
        std::thread::sleep(Duration::from_secs(3));
        ensure!(new.is_beating(), "it was ended again: {:?}", new.stop()?);
        ensure!(
            own.is_beating(),
            "a connection of the pod with itself ended"
        );
        ensure!(
            ended(node)? <= after + 1.0,
            "more were ended than there were"
        );
        if round == 2 {
            restarted(stage, &server, &client)?;
        }
        cluster.apply(&server.manifest())?;
        eventually("the pod to leave", || {
            let enrolled = node.is_enrolled("default", server.name())?;
            ensure!(!enrolled, "it is enrolled");
            Ok(())
        })?;
        own.stop()?;
    }
    let counts = load.stop()?;
    ensure!(counts.of("ok") > 0, "{counts:?}");
    cluster.remove_pod(server)?;
    cluster.remove_pod(client)
}

/// What an agent finds in the kernel's maps was in the mesh before: it ends nothing.
fn restarted(stage: &Stage, server: &Pod, client: &Pod) -> Result<()> {
    let node = stage.cluster.node(SERVERS);
    // It is past the mesh, so that it outlives the agent, and one that the pod had when it joined would be ended.
    let _app = Server::start(client, 9090, "echo", &[])?;
    let app = testapp::path()?.display().to_string();
    let mut past = Pulse::start_with(node.command_in(server, &app)?, client.sockets(9090)[0])?;
    node.kill_agent()?;
    ensure!(past.is_beating(), "it ended with the agent");
    node.start_agent()?;
    node.wait_enrolled("default", server.name())?;
    std::thread::sleep(Duration::from_secs(3));
    ensure!(past.is_beating(), "it was ended: {:?}", past.stop()?);
    let ended = ended(node)?;
    ensure!(
        ended == 0.0,
        "an agent that was started again ended {ended}"
    );
    past.stop()?;
    eventually("traffic", || {
        expect_echo(client, server.sockets(8080)[0], "again").map(drop)
    })
}

fn kept(stage: &Stage) -> Result<()> {
    let cluster = &stage.cluster;
    let node = cluster.node(ELSEWHERE);
    let mut server = cluster.add_pod(PodSpec::new("kept").on(ELSEWHERE).unmeshed())?;
    let client = cluster.add_pod(PodSpec::new("keeper").unmeshed())?;
    let _app = Server::start(&server, 8080, "echo", &[])?;
    let mut pulse = Pulse::start(&client, server.sockets(8080)[0])?;
    let text = format!("0::/kubepods/pod{}/{}\n", server.uid(), "f".repeat(64));
    let pid = server.pause().context("a sandbox")?.pid();
    show(&stage.proc, pid, pid, &text)?;
    cluster.apply(&labelled(&server))?;
    node.wait_enrolled("default", server.name())?;
    std::thread::sleep(Duration::from_secs(2));
    ensure!(pulse.is_beating(), "it was ended: {:?}", pulse.stop()?);
    ensure!(ended(node)? == 0.0);
    drop(pulse);
    cluster.remove_pod(server)?;
    cluster.remove_pod(client)
}

/// A flow to the pod goes by a tunnel.
fn encrypted(stage: &Stage, pod: &Pod) -> Result<()> {
    let _server = Server::start(pod, 8080, "echo", &[])?;
    for to in pod.sockets(8080) {
        // A connection between the nodes that is kept may be one to a sandbox that is gone.
        eventually("the pod to be reached", || {
            expect_echo(&stage.client, to, "early").map(drop)
        })?;
    }
    let watch = Watch::start(&stage.cluster, &[&stage.client, pod])?;
    for to in pod.sockets(8080) {
        expect_echo(&stage.client, to, "only-by-a-tunnel")?;
    }
    watch.finish_encrypted(&["only-by-a-tunnel"])?;
    Ok(())
}

/// A container that runs.
fn keep_running(pod: &Pod) -> Result<Process> {
    pod.command("sleep")?.arg("infinity").spawn()
}

/// Lets the third node's agent see a process, by a number, with this file of its control groups.
fn show(proc: &Path, number: u32, pid: u32, cgroup: &str) -> Result<()> {
    let folder = proc.join(number.to_string());
    let hidden = proc.join(format!(".{number}"));
    fs::create_dir(&hidden)?;
    for name in ["ns", "stat", "comm", "root", "cmdline"] {
        symlink(format!("/proc/{pid}/{name}"), hidden.join(name))?;
    }
    fs::write(hidden.join("cgroup"), cgroup)?;
    Ok(fs::rename(hidden, folder)?)
}

fn labelled(pod: &Pod) -> Value {
    let mut manifest = pod.manifest();
    manifest["metadata"]["labels"]["weft.dev/mesh"] = "enabled".into();
    manifest
}

/// How many connections an agent has ended.
fn ended(node: &Node) -> Result<f64> {
    let name = "weft_opt_in_connections_ended_total";
    Ok(node.metrics()?.sum(name, &[]))
}

fn waiting(node: &Node, reason: &str, expected: f64) -> Result<()> {
    let metrics = node.metrics()?;
    let number = metrics.sum("weft_pods_waiting", &[("reason", reason)]);
    ensure!(
        number == expected,
        "{number} wait because {reason}: {}",
        metrics.show("weft_pods_waiting")
    );
    Ok(())
}
