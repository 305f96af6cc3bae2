//! The CNI plugin in a chain behind real ones, as a container runtime runs them: meshed pods are in the mesh before their
//! first process runs, whatever the agent and the controller do meanwhile, and nobody else has to wait for that.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use weft_tests::checks::figure;
use weft_tests::cluster::{Node, binary};
use weft_tests::cni::{Runtime, Sandbox};
use weft_tests::command::Process;
use weft_tests::manifests::{ServiceSpec, authorization, namespace, server};
use weft_tests::scenario::{eventually, expect_echo, expect_refusal};
use weft_tests::testapp::Server;
use weft_tests::{Checks, Cluster, ClusterOptions, DEADLINE, Pod, PodSpec, wait_for};

/// Node 0 has the plugin; on node 1 there are a server behind a Service, for `order` only, and an echo for all.
struct Stage<'a> {
    cluster: &'a Cluster,
    runtime: Runtime<'a>,
    installer: Process,
    server: Pod,
    service: [IpAddr; 2],
    echo: Server,
    _open: Server,
    folder: PathBuf,
}

#[test]
fn cni() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name).display().to_string();
    let args = [
        "--cni-socket",
        &path("cni.sock"),
        "--cni-namespaces",
        &path("lib/namespaces.json"),
    ];
    let cluster = Cluster::with(ClusterOptions {
        kubernetes: true,
        node_args: vec![(0, args.map(str::to_owned).into())],
        ..ClusterOptions::default()
    });
    let cluster = cluster.expect("a cluster");
    let mut stage = Stage::set(&cluster, folder.path()).expect("a stage");
    let mut checks = Checks::new("cni");
    let mut check = |name: &str, run: fn(&mut Stage<'_>) -> Result<()>| {
        checks.check(name, || run(&mut stage));
    };
    check(
        "the first connection of a pod is in the mesh",
        first_connection,
    );
    check(
        "what connects to a pod before its address is known is judged",
        first_inbound,
    );
    check(
        "pods outside of the mesh start, and are not touched",
        unmeshed,
    );
    check(
        "a pod that nobody has heard of waits until somebody has",
        unheard,
    );
    check("another sandbox of the same pod takes its place", replaced);
    check(
        "another sandbox that the plugin is not called for does so, too",
        replaced_without_a_call,
    );
    check(
        "a pod in a virtual machine is let go when that shows",
        in_a_virtual_machine,
    );
    check(
        "a pod's address that is another's is refused",
        address_taken,
    );
    check("without an agent, only namespaces of the mesh wait", away);
    check("an agent that stands still is no agent", slow);
    check(
        "an agent that ends while a pod waits is tried again",
        restarting,
    );
    check("pods that start during upgrades start", upgraded);
    check(
        "without a controller, only namespaces of the mesh wait",
        controller_away,
    );
    check("a configuration that is rewritten is repaired", rewritten);
    check("every version of the specification is spoken", versions);
    check("after an uninstall nothing of it is left", uninstalled);
    checks.finish();
}

impl<'a> Stage<'a> {
    fn set(cluster: &'a Cluster, folder: &Path) -> Result<Self> {
        let server_pod = cluster.add_pod(PodSpec::new("payment").on(1))?;
        let service = ServiceSpec::new("payment")
            .select("app", "payment")
            .port(80, 8080);
        let service = cluster.add_service(&service)?;
        cluster.apply(&server("default", "payment", "payment", 8080))?;
        cluster.apply(&authorization("default", "payment", "payment", &["order"]))?;
        let echo = Server::start(&server_pod, 8080, "echo", &[])?;
        let open = Server::start(&server_pod, 9090, "echo", &[])?;
        for (name, labels) in [
            ("elsewhere", json!({})),
            ("opted-in", json!({"weft.dev/mesh": "enabled"})),
        ] {
            cluster.apply(&namespace(name, &labels))?;
        }
        let runtime = Runtime::new(cluster.node(0), "1.0.0")?;
        let installer = installer(&runtime, folder, &["install"])?.spawn()?;
        let stage = Self {
            cluster,
            runtime,
            installer,
            server: server_pod,
            service,
            echo,
            _open: open,
            folder: folder.to_owned(),
        };
        eventually("the plugin to be installed", || {
            ensure!(stage.runtime.plugins()? == ["bridge", "tuning", "weft-cni"]);
            installer_status(&stage.runtime, folder)
        })?;
        eventually("the agent's list", || {
            let list = std::fs::read_to_string(folder.join("lib/namespaces.json"))?;
            let expected = r#"{"version":1,"namespaces":["default","opted-in"]}"#;
            ensure!(list.trim() == expected, "{list}");
            Ok(())
        })?;
        Ok(stage)
    }

    /// A pod that the kubelet has been told of, and so has everybody who watches.
    fn pod(&self, spec: PodSpec) -> Result<(Pod, Sandbox)> {
        pending(self.cluster, spec)
    }

    fn remove(&self, pod: Pod, sandbox: &Sandbox) -> Result<()> {
        self.runtime.del(sandbox)?;
        self.cluster.remove_pod(pod)
    }

    fn to_service(&self) -> [SocketAddr; 2] {
        self.service.map(|it| (it, 80).into())
    }

    /// How the agent's pod of that name stands.
    fn state(&self, pod: &Pod) -> Result<Option<Value>> {
        let dump = self.cluster.node(0).config_dump()?;
        let pods = dump["pods"].as_array().context("pods")?;
        Ok(pods.iter().find(|it| it["name"] == pod.name()).cloned())
    }

    fn requests(&self, command: &str, result: &str) -> Result<f64> {
        let metrics = self.cluster.node(0).metrics()?;
        let labels = [("command", command), ("result", result)];
        Ok(metrics.sum("weft_cni_requests_total", &labels))
    }
}

fn pending(cluster: &Cluster, spec: PodSpec) -> Result<(Pod, Sandbox)> {
    let pod = cluster.build_pod(spec.bare())?;
    cluster.apply(&pod.pending())?;
    let sandbox = next_sandbox(&pod);
    Ok((pod, sandbox))
}

fn next_sandbox(pod: &Pod) -> Sandbox {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    Sandbox::new(pod, NUMBER.fetch_add(1, Ordering::Relaxed))
}

fn installer(
    runtime: &Runtime<'_>,
    folder: &Path,
    args: &[&str],
) -> Result<weft_tests::command::Program> {
    let text = |path: &Path| path.display().to_string();
    let program = runtime.node().host_command(&text(&binary("weft-cni")?))?;
    let program = program.args(args);
    let program = match args.first() {
        Some(&"uninstall") => program,
        _ => program
            .args(["--socket", &text(&folder.join("cni.sock"))])
            .args(["--wait-seconds", "4"]),
    };
    Ok(program
        .args(["--conf-dir", &text(&runtime.conf_dir())])
        .args(["--bin-dir", &text(&runtime.bin_dir())])
        .args(["--namespaces", &text(&folder.join("lib/namespaces.json"))]))
}

fn installer_status(runtime: &Runtime<'_>, folder: &Path) -> Result<()> {
    installer(runtime, folder, &["status"])?.run().map(drop)
}

/// The pod's first process connects as soon as the runtime may start it; the API server has heard of no address yet. Its
/// identity is what the server's policy asks for.
fn first_connection(stage: &mut Stage<'_>) -> Result<()> {
    let (mut pod, sandbox) = stage.pod(PodSpec::new("order"))?;
    let wire = weft_tests::capture::Capture::start(
        stage.cluster.node(0).netns(),
        "eth0",
        stage.cluster.dir(),
    )?;
    stage.runtime.set_up(&mut pod, &sandbox)?;
    for target in stage.to_service() {
        expect_echo(&pod, target, "the-very-first")?;
    }
    let captured = wire.finish()?;
    ensure!(
        !captured.contains(b"the-very-first"),
        "it is on the wire in the clear"
    );
    let addresses: Vec<_> = pod
        .addresses()
        .into_iter()
        .chain(stage.server.addresses())
        .collect();
    captured.ensure_only_tunnels(&addresses)?;
    // Somebody else is not let in, so it was the identity.
    let (mut other, of_other) = stage.pod(PodSpec::new("other"))?;
    stage.runtime.set_up(&mut other, &of_other)?;
    expect_refusal(&other, stage.to_service()[0], "not-for-you")?;
    let enrolled = stage.state(&pod)?.context("it is not in the dump")?;
    let own = enrolled["addresses"].as_array().context("addresses")?;
    ensure!(own.len() == 2, "{enrolled}");
    stage
        .runtime
        .check("weft-cni", &sandbox, &json!({"cniVersion": "1.0.0"}))?;
    // Then the kubelet says where it is, and nothing is done anew.
    stage.cluster.apply(&pod.manifest())?;
    stage.cluster.node(1).wait_known("default", "order")?;
    expect_echo(&pod, stage.to_service()[0], "as-before")?;
    let now = stage.state(&pod)?.context("it is not in the dump")?;
    ensure!(
        now["netns_cookie"] == enrolled["netns_cookie"],
        "{enrolled} {now}"
    );
    ensure!(stage.requests("add", "enrolled")? >= 2.0);
    ensure!(!stage.echo.accepted()?.is_empty());
    // Taken down: nothing of it is kept, though the pod is still described.
    stage.runtime.del(&sandbox)?;
    eventually("the agent to let go of it", || {
        let state = stage.state(&pod)?.context("it is not in the dump")?;
        ensure!(state["state"] == "waiting", "{state}");
        Ok(())
    })?;
    stage.cluster.remove_pod(pod)?;
    stage.remove(other, &of_other)
}

/// A policy that lets nobody in holds from the first packet on, by the addresses that the plugins gave.
fn first_inbound(stage: &mut Stage<'_>) -> Result<()> {
    let deny = "config.linkerd.io/default-inbound-policy";
    let (mut pod, sandbox) = stage.pod(PodSpec::new("closed").annotation(deny, "deny"))?;
    let stranger = stage
        .cluster
        .add_pod(PodSpec::new("stranger").on(1).unmeshed())?;
    stage.runtime.set_up(&mut pod, &sandbox)?;
    let app = Server::start(&pod, 7000, "echo", &[])?;
    for target in pod.sockets(7000) {
        expect_refusal(&stranger, target, "let-me-in")?;
    }
    ensure!(app.accepted()?.is_empty(), "a stranger got in");
    // So it is reachable at all.
    let mut manifest = pod.manifest();
    manifest["metadata"]["annotations"] = json!({});
    stage.cluster.apply(&manifest)?;
    eventually("it to be open", || {
        expect_echo(&stranger, pod.sockets(7000)[0], "open").map(drop)
    })?;
    stage.cluster.remove_pod(stranger)?;
    stage.remove(pod, &sandbox)
}

fn unmeshed(stage: &mut Stage<'_>) -> Result<()> {
    for (name, namespace, label) in [
        ("plain", "elsewhere", None),
        ("left-out", "opted-in", Some("disabled")),
    ] {
        let mut spec = PodSpec::new(name).namespace(namespace).unmeshed();
        if let Some(label) = label {
            spec = spec.label("weft.dev/mesh", label);
        }
        let before = stage.requests("add", "not_meshed")?;
        let (mut pod, sandbox) = stage.pod(spec)?;
        stage.runtime.set_up(&mut pod, &sandbox)?;
        ensure!(stage.requests("add", "not_meshed")? > before, "{name}");
        ensure!(stage.state(&pod)?.is_none(), "{name} is enrolled");
        let open = stage.server.sockets(9090)[0];
        expect_echo(&pod, open, "plain")?;
        stage.remove(pod, &sandbox)?;
    }
    // The namespace says it for the pod.
    let (mut pod, sandbox) = stage.pod(
        PodSpec::new("by-namespace")
            .namespace("opted-in")
            .unmeshed(),
    )?;
    stage.runtime.set_up(&mut pod, &sandbox)?;
    let state = stage.state(&pod)?.context("it is not enrolled")?;
    ensure!(state["state"] == "enrolled", "{state}");
    stage.remove(pod, &sandbox)
}

/// The runtime may be faster than the controller's watch.
fn unheard(stage: &mut Stage<'_>) -> Result<()> {
    let mut pod = stage.cluster.build_pod(PodSpec::new("unheard").bare())?;
    let sandbox = next_sandbox(&pod);
    let began = Instant::now();
    let refused = stage.runtime.refused(&sandbox)?;
    ensure!(refused.code == 11, "{refused}");
    ensure!(
        refused.details.contains("has heard of this pod"),
        "{refused}"
    );
    ensure!(began.elapsed() < DEADLINE, "it took {:?}", began.elapsed());
    // One of the same name that was there before is not it.
    let mut predecessor = pod.pending();
    predecessor["metadata"]["uid"] = "00000000-0000-4000-8000-000000000000".into();
    predecessor["metadata"]["labels"]["weft.dev/mesh"] = "disabled".into();
    stage.cluster.apply(&predecessor)?;
    let (cluster, manifest) = (stage.cluster, pod.pending());
    let late = Duration::from_millis(1500);
    std::thread::scope(|scope| -> Result<()> {
        let announcing = scope.spawn(move || {
            std::thread::sleep(late);
            cluster.apply(&manifest)
        });
        let began = Instant::now();
        stage.runtime.set_up(&mut pod, &sandbox)?;
        ensure!(began.elapsed() >= late, "it was not waited for");
        announcing.join().map_err(|_| anyhow::anyhow!("panicked"))?
    })?;
    ensure!(
        stage
            .state(&pod)?
            .is_some_and(|it| it["state"] == "enrolled")
    );
    stage.remove(pod, &sandbox)
}

/// A sandbox that dies is made again, for the same pod, in another namespace.
fn replaced(stage: &mut Stage<'_>) -> Result<()> {
    let (mut pod, sandbox) = stage.pod(PodSpec::new("order"))?;
    stage.runtime.set_up(&mut pod, &sandbox)?;
    expect_echo(&pod, stage.to_service()[0], "first-life")?;
    let cookie = |stage: &Stage<'_>, pod: &Pod| -> Result<Value> {
        let state = stage.state(pod)?.context("it is not in the dump")?;
        Ok(state["netns_cookie"].clone())
    };
    let before = cookie(stage, &pod)?;
    pod.renew_netns()?;
    let second = next_sandbox(&pod);
    // The old one is taken down after the new one is there, and belongs to that no more.
    stage.runtime.set_up(&mut pod, &second)?;
    ensure!(cookie(stage, &pod)? != before);
    expect_echo(&pod, stage.to_service()[0], "second-life")?;
    stage.runtime.del(&sandbox)?;
    expect_echo(&pod, stage.to_service()[0], "still-there")?;
    stage.remove(pod, &second)
}

/// A list that was rewritten without the plugin, while a sandbox died: neither its end nor the next one is heard of.
fn replaced_without_a_call(stage: &mut Stage<'_>) -> Result<()> {
    let spec = PodSpec::new("order").layout(weft_tests::layout::Layout::Systemd);
    let (mut pod, sandbox) = stage.pod(spec)?;
    stage.runtime.set_up(&mut pod, &sandbox)?;
    let cookie = |stage: &Stage<'_>, pod: &Pod| -> Result<Value> {
        let state = stage.state(pod)?.context("it is not in the dump")?;
        ensure!(state["state"] == "enrolled", "{state}");
        Ok(state["netns_cookie"].clone())
    };
    let before = cookie(stage, &pod)?;
    // A process of the first one changes nothing.
    let app = Server::start(&pod, 7001, "echo", &[])?;
    std::thread::sleep(Duration::from_secs(3));
    ensure!(cookie(stage, &pod)? == before);
    drop(app);
    pod.renew_netns()?;
    let second = next_sandbox(&pod);
    let result = stage.runtime.add_by(&second, |it| it != "weft-cni")?;
    let (v4, v6) = weft_tests::cni::addresses(&result)?;
    pod.set_addresses(v4, v6);
    stage.cluster.apply(&pod.manifest())?;
    let _app = Server::start(&pod, 7001, "echo", &[])?;
    eventually("the new sandbox to be in the mesh", || {
        ensure!(cookie(stage, &pod)? != before);
        Ok(())
    })?;
    expect_echo(&pod, stage.to_service()[0], "found")?;
    stage.runtime.del(&sandbox)?;
    stage.remove(pod, &second)
}

/// Only its processes say it, and they come after the plugin.
fn in_a_virtual_machine(stage: &mut Stage<'_>) -> Result<()> {
    let spec = PodSpec::new("virtual").layout(weft_tests::layout::Layout::Crio);
    let mut pod = stage.cluster.build_pod(spec.bare())?;
    let sandbox = next_sandbox(&pod);
    let mut pending = pod.pending();
    pending["spec"]["runtimeClassName"] = "kata".into();
    stage.cluster.apply(&pending)?;
    stage.runtime.set_up(&mut pod, &sandbox)?;
    let state = stage.state(&pod)?.context("it is not in the dump")?;
    ensure!(state["state"] == "enrolled", "{state}");
    let hypervisor = stage.folder.join("qemu-system-x86_64");
    std::fs::copy("/bin/sleep", &hypervisor)?;
    let program = pod.command(&hypervisor.display().to_string())?;
    let _running = program.arg("infinity").spawn()?;
    eventually("it to be let go", || {
        let state = stage.state(&pod)?.context("it is not in the dump")?;
        ensure!(state["state"] == "waiting", "{state}");
        ensure!(state.to_string().contains("Kata"), "{state}");
        Ok(())
    })?;
    // As what the node's kernel does not see is, so is what it sees: left alone.
    expect_echo(&pod, stage.server.sockets(9090)[0], "in-the-clear")?;
    stage.remove(pod, &sandbox)
}

/// A pod cannot be given an address that a living pod is known by.
fn address_taken(stage: &mut Stage<'_>) -> Result<()> {
    let victim = stage.cluster.add_pod(PodSpec::new("victim").host(200))?;
    let taken = stage.runtime.bridge("1.0.0");
    let (mut pod, sandbox) = stage.pod(PodSpec::new("thief"))?;
    let mut only = taken.clone();
    for (range, address) in only["plugins"][0]["ipam"]["ranges"]
        .as_array_mut()
        .context("ranges")?
        .iter_mut()
        .zip(victim.addresses())
    {
        range[0]["rangeStart"] = address.to_string().into();
        range[0]["rangeEnd"] = address.to_string().into();
    }
    only["plugins"][0]["ipam"]["dataDir"] = json!(stage.cluster.dir().join("thief"));
    stage.runtime.write("10-bridge.conflist", &only)?;
    eventually("the plugin to be there again", || {
        ensure!(stage.runtime.plugins()?.contains(&"weft-cni".to_owned()));
        Ok(())
    })?;
    let refused = stage.runtime.refused(&sandbox)?;
    ensure!(
        refused.code == 11 && refused.details.contains("default/victim"),
        "{refused}"
    );
    stage.cluster.remove_pod(victim)?;
    stage.runtime.write("10-bridge.conflist", &taken)?;
    eventually("the plugin to be there again", || {
        ensure!(stage.runtime.plugins()?.contains(&"weft-cni".to_owned()));
        Ok(())
    })?;
    stage.runtime.set_up(&mut pod, &sandbox)?;
    stage.remove(pod, &sandbox)
}

fn away(stage: &mut Stage<'_>) -> Result<()> {
    let node = stage.cluster.node(0);
    let (mut pod, sandbox) = stage.pod(PodSpec::new("order"))?;
    node.kill_agent()?;
    only_the_mesh_waits(stage, &sandbox, "does not listen")?;
    start_agent(node)?;
    stage.runtime.set_up(&mut pod, &sandbox)?;
    expect_echo(&pod, stage.to_service()[0], "when-it-is-back")?;
    // In order, too.
    node.stop_agent()?;
    let (mut late, of_late) = stage.pod(PodSpec::new("order-late").service_account("order"))?;
    only_the_mesh_waits(stage, &of_late, "does not listen")?;
    // A pod that goes is not kept.
    stage.runtime.del(&sandbox)?;
    stage.cluster.remove_pod(pod)?;
    start_agent(node)?;
    stage.runtime.set_up(&mut late, &of_late)?;
    expect_echo(&late, stage.to_service()[0], "and-again")?;
    stage.remove(late, &of_late)
}

/// It is not ready: pods are described that were not set up yet.
fn start_agent(node: &Node) -> Result<()> {
    node.spawn_agent()?;
    wait_for("the agent to have a controller", DEADLINE * 2, || {
        let connected = node.metrics()?.sum("weft_control_connected", &[]);
        Ok((connected == 1.0).then_some(()))
    })
}

/// While nobody can say who is meshed.
fn only_the_mesh_waits(stage: &Stage<'_>, meshed: &Sandbox, why: &str) -> Result<()> {
    let refused = stage.runtime.refused(meshed)?;
    ensure!(
        refused.code == 11 && refused.plugin == "weft-cni",
        "{refused}"
    );
    ensure!(refused.details.contains(why), "{refused}");
    ensure!(
        refused
            .details
            .contains("namespace default may hold meshed pods"),
        "{refused}"
    );
    for namespace in ["elsewhere", "kube-system", "weft-system"] {
        let spec = PodSpec::new("plain").namespace(namespace).unmeshed();
        let pod = stage.cluster.build_pod(spec.bare())?;
        let sandbox = next_sandbox(&pod);
        let began = Instant::now();
        stage.runtime.add(&sandbox).context(namespace)?;
        ensure!(
            began.elapsed() < DEADLINE,
            "{namespace} took {:?}",
            began.elapsed()
        );
        stage.runtime.del(&sandbox)?;
        pod.delete()?;
    }
    Ok(())
}

fn slow(stage: &mut Stage<'_>) -> Result<()> {
    let node = stage.cluster.node(0);
    let (mut pod, sandbox) = stage.pod(PodSpec::new("order"))?;
    node.pause_agent()?;
    let refused = stage.runtime.refused(&sandbox);
    node.resume_agent()?;
    let refused = refused?;
    ensure!(
        refused.code == 11 && refused.details.contains("did not answer"),
        "{refused}"
    );
    stage.runtime.set_up(&mut pod, &sandbox)?;
    expect_echo(&pod, stage.to_service()[0], "after-a-pause")?;
    stage.remove(pod, &sandbox)
}

fn restarting(stage: &mut Stage<'_>) -> Result<()> {
    let node = stage.cluster.node(0);
    let mut pod = stage.cluster.build_pod(PodSpec::new("order").bare())?;
    let sandbox = next_sandbox(&pod);
    for in_order in [false, true] {
        let runtime = &stage.runtime;
        let refused = std::thread::scope(|scope| {
            let adding = scope.spawn(|| runtime.refused(&sandbox));
            let waited = wait_for("the plugin to ask", DEADLINE, || {
                Ok(node
                    .agent_log()
                    .contains("the CNI plugin may ask")
                    .then_some(()))
            });
            std::thread::sleep(Duration::from_millis(500));
            waited.and(match in_order {
                true => node.stop_agent(),
                false => node.kill_agent(),
            })?;
            adding.join().map_err(|_| anyhow::anyhow!("panicked"))?
        })?;
        ensure!(refused.code == 11, "{refused}");
        start_agent(node)?;
    }
    stage.cluster.apply(&pod.pending())?;
    stage.runtime.set_up(&mut pod, &sandbox)?;
    expect_echo(&pod, stage.to_service()[0], "after-restarts")?;
    stage.remove(pod, &sandbox)
}

/// One agent takes over from the other while pods are being started: no call of the plugin fails, and each pod is in the mesh.
/// The plugin is at the older one's when the newer one comes, or finds the socket in other hands.
/// Ends what goes on until this is true.
struct Ending<'a>(&'a AtomicBool);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn upgraded(stage: &mut Stage<'_>) -> Result<()> {
    let node = stage.cluster.node(0);
    let over = AtomicBool::new(false);
    let (cluster, runtime, service) = (stage.cluster, &stage.runtime, stage.to_service()[0]);
    let end = |pod, sandbox: &Sandbox| {
        runtime.del(sandbox)?;
        cluster.remove_pod(pod)
    };
    let started = std::thread::scope(|scope| -> Result<u32> {
        // Whatever ends this, a panic too: they are waited for.
        let ending = Ending(&over);
        let start = |name: String| {
            let over = &over;
            scope.spawn(move || -> Result<u32> {
                let mut started = 0;
                while !over.load(Ordering::Relaxed) {
                    let (mut pod, sandbox) =
                        pending(cluster, PodSpec::new(&name).service_account("order"))?;
                    runtime.set_up(&mut pod, &sandbox)?;
                    expect_echo(&pod, service, "during-an-upgrade")?;
                    end(pod, &sandbox)?;
                    started += 1;
                }
                Ok(started)
            })
        };
        let starting: Vec<_> = (0..3).map(|it| start(format!("order-{it}"))).collect();
        // One that nobody has heard of is asked about until after the takeover.
        let late = || -> Result<()> {
            let mut pod = cluster.build_pod(PodSpec::new("late").bare())?;
            let sandbox = next_sandbox(&pod);
            let manifest = pod.pending();
            std::thread::scope(|scope| {
                let setting_up = scope.spawn(|| runtime.set_up(&mut pod, &sandbox));
                let taken_over = node.take_over(false);
                cluster.apply(&manifest)?;
                setting_up
                    .join()
                    .map_err(|_| anyhow::anyhow!("panicked"))??;
                taken_over.map(drop)
            })?;
            end(pod, &sandbox)
        };
        let late = late();
        let upgrades = (0..4).try_for_each(|it| node.take_over(it % 2 == 1).map(drop));
        drop(ending);
        let mut all = 0;
        for each in starting {
            all += each.join().map_err(|_| anyhow::anyhow!("panicked"))??;
        }
        upgrades.and(late).map(|()| all)
    })?;
    figure("pods started during five upgrades, none refused", started);
    ensure!(started >= 6, "only {started}");
    node.wait_left()
}

fn controller_away(stage: &mut Stage<'_>) -> Result<()> {
    let controller = stage.cluster.controller()?;
    let (mut known, of_known) = stage.pod(PodSpec::new("order"))?;
    stage.runtime.set_up(&mut known, &of_known)?;
    controller.stop()?;
    let (mut pod, sandbox) = stage.pod(PodSpec::new("order-new").service_account("order"))?;
    only_the_mesh_waits(stage, &sandbox, "controller")?;
    // What the agent knows already needs no controller.
    known.renew_netns()?;
    let again = next_sandbox(&known);
    stage.runtime.set_up(&mut known, &again)?;
    expect_echo(&known, stage.to_service()[0], "without-a-controller")?;
    controller.start()?;
    wait_for("the pod to be let in", DEADLINE * 2, || {
        stage.runtime.set_up(&mut pod, &sandbox).map(Some)
    })?;
    expect_echo(&pod, stage.to_service()[0], "with-a-controller")?;
    stage.runtime.del(&of_known)?;
    stage.remove(known, &again)?;
    stage.remove(pod, &sandbox)
}

fn rewritten(stage: &mut Stage<'_>) -> Result<()> {
    let runtime = &stage.runtime;
    let repaired = |first: &str| {
        eventually("it to be repaired", || {
            let plugins = runtime.plugins()?;
            ensure!(plugins == [first, "tuning", "weft-cni"], "{plugins:?}");
            Ok(())
        })
    };
    runtime.write("10-bridge.conflist", &runtime.bridge("1.0.0"))?;
    repaired("bridge")?;
    runtime.write("00-first.conflist", &runtime.bridge("1.0.0"))?;
    repaired("bridge")?;
    std::fs::remove_file(runtime.conf_dir().join("00-first.conflist"))?;
    repaired("bridge")?;
    // A plugin's folder that is emptied.
    std::fs::remove_file(runtime.bin_dir().join("weft-cni"))?;
    eventually("the program to be there again", || {
        ensure!(runtime.bin_dir().join("weft-cni").exists());
        Ok(())
    })?;
    // An installer that ends leaves all as it is.
    stage.installer.stop(DEADLINE)?;
    repaired("bridge")
}

fn versions(stage: &mut Stage<'_>) -> Result<()> {
    let folder = stage.folder.clone();
    for version in ["0.3.1", "0.4.0", "1.0.0"] {
        let list = stage.runtime.bridge(version);
        stage.runtime.write("10-bridge.conflist", &list)?;
        installer(&stage.runtime, &folder, &["install", "--once"])?.run()?;
        let (mut pod, sandbox) = stage.pod(PodSpec::new("order"))?;
        let result = stage.runtime.add(&sandbox)?;
        ensure!(result["cniVersion"] == version, "{result}");
        let (v4, v6) = weft_tests::cni::addresses(&result)?;
        pod.set_addresses(v4, v6);
        expect_echo(&pod, stage.to_service()[0], version)?;
        stage.remove(pod, &sandbox)?;
    }
    Ok(())
}

fn uninstalled(stage: &mut Stage<'_>) -> Result<()> {
    let folder = stage.folder.clone();
    stage.cluster.node(0).stop_agent()?;
    for _ in 0..2 {
        installer(&stage.runtime, &folder, &["uninstall"])?.run()?;
    }
    ensure!(stage.runtime.plugins()? == ["bridge", "tuning"]);
    ensure!(!stage.runtime.bin_dir().join("weft-cni").exists());
    ensure!(!folder.join("lib/namespaces.json").exists());
    // Who was kept waiting starts.
    let pod = stage.cluster.build_pod(PodSpec::new("free").bare())?;
    let sandbox = next_sandbox(&pod);
    stage.runtime.add(&sandbox)?;
    stage.runtime.del(&sandbox)?;
    pod.delete()
}
