//! Pods in real containers, made by containerd and runc, with their network by CNI plugins: what a user of a cluster has,
//! but for the kubelet, of which the harness plays as much as is needed.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use weft_tests::capture::{Capture, TUNNEL_PORT};
use weft_tests::cluster::{Node, binary};
use weft_tests::command::Program;
use weft_tests::containers::{CniFolders, Image, Kubelet, Pod};
use weft_tests::deployed::Deployed;
use weft_tests::scenario::eventually;
use weft_tests::{Checks, Cluster, ClusterOptions};

/// A kubelet for each node, and what containers of applications are made of.
struct Stage<'a> {
    cluster: &'a Cluster,
    kubelets: Vec<Kubelet<'a>>,
    cni: Vec<CniFolders>,
    shell: Image,
    folder: PathBuf,
}

/// The list of plugins of a node.
const CNI_LIST: &str = "10-pods.conflist";
const CNI_SOCKET: &str = "cni.sock";
const CNI_NAMESPACES: &str = "lib/namespaces.json";

#[test]
fn containers() {
    // What the CNI plugin and the agent of node 0 meet by.
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name).display().to_string();
    let args = [
        "--cni-socket",
        &path(CNI_SOCKET),
        "--cni-namespaces",
        &path(CNI_NAMESPACES),
    ];
    let cluster = Cluster::with(ClusterOptions {
        kubernetes: true,
        node_args: vec![(0, args.map(str::to_owned).into())],
        ..ClusterOptions::default()
    });
    let cluster = cluster.expect("a cluster");
    let stage = Stage::start(&cluster, folder.path()).expect("runtimes");
    let mut checks = Checks::new("containers");
    let mut check = |name: &str, run: fn(&Stage<'_>) -> Result<()>| {
        checks.check(name, || run(&stage));
    };
    check("outside of the mesh nothing is changed", outside);
    check(
        "pods are found by their processes, and talk encrypted",
        found,
    );
    check("a pod whose sandbox is made anew is found again", anew);
    check(
        "a running pod joins the mesh, leaves it, and joins again",
        labelled,
    );
    check(
        "with the CNI plugin, the first connection is in the mesh",
        first,
    );
    check(
        "the installer of the manifests installs the plugin, and their removal takes it away",
        installed,
    );
    check(
        "the agent's own pod is as its manifest says, and takes over",
        deployed,
    );
    checks.finish();
}

impl<'a> Stage<'a> {
    fn start(cluster: &'a Cluster, folder: &Path) -> Result<Stage<'a>> {
        let shell = Image::shell(cluster.dir())?;
        let cni: Vec<CniFolders> = cluster.nodes().iter().map(cni).collect::<Result<_>>()?;
        let start = |(node, cni): (&'a Node, &CniFolders)| {
            let kubelet = Kubelet::start(cluster, node, cni)?;
            kubelet.runtime().import(&shell)?;
            Ok(kubelet)
        };
        let kubelets = cluster.nodes().iter().zip(&cni).map(start);
        Ok(Stage {
            cluster,
            kubelets: kubelets.collect::<Result<_>>()?,
            cni,
            shell,
            folder: folder.to_owned(),
        })
    }

    /// A pod of the shell's image: `script` is what it does.
    fn pod(&self, name: &str, is_meshed: bool, script: &str) -> Value {
        let mesh = if is_meshed { "enabled" } else { "disabled" };
        // The machine's own programs and their libraries, for curl.
        let folder = |(name, path): (&str, &str)| {
            let volume = json!({"name": name, "hostPath": {"path": path}});
            (
                volume,
                json!({"name": name, "mountPath": path, "readOnly": true}),
            )
        };
        let folders = [("usr", "/usr"), ("lib", "/lib"), ("lib64", "/lib64")];
        let (volumes, mounts): (Vec<_>, Vec<_>) = folders.into_iter().map(folder).unzip();
        json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": "default",
                "labels": {"app": name, "weft.dev/mesh": mesh}},
            "spec": {
                "serviceAccountName": name,
                "containers": [{"name": "app", "image": self.shell.name(),
                    "command": ["/bin/sh", "-c", script], "volumeMounts": mounts}],
                "volumes": volumes,
            },
        })
    }

    /// Runs a server on node 1 that says `word`.
    fn server(&self, name: &str, is_meshed: bool, word: &str) -> Result<Pod> {
        let script =
            format!("mkdir /www && echo {word} > /www/index.html && exec httpd -f -p 8080 -h /www");
        self.kubelets[1].run(self.pod(name, is_meshed, &script))
    }

    /// Runs a client on node 0 that waits for what it is to ask.
    fn client(&self, name: &str, is_meshed: bool) -> Result<Pod> {
        self.kubelets[0].run(self.pod(name, is_meshed, "exec sleep 1000000"))
    }

    fn remove(&self, client: &Pod, server: &Pod) -> Result<()> {
        self.kubelets[0].remove(client)?;
        self.kubelets[1].remove(server)
    }

    /// What a client gets from a server.
    fn get(&self, client: &Pod, server: IpAddr) -> Result<String> {
        let url = format!("http://{server}:8080/");
        let command = ["wget", "-q", "-T", "10", "-O", "-", &url];
        let done = self.kubelets[0].execute(client, "app", &command)?;
        ensure!(
            done.code == 0,
            "wget ended with {}: {}",
            done.code,
            done.stderr
        );
        Ok(done.stdout.trim().to_owned())
    }

    /// The wire between the nodes while `work` goes on: what was asked and answered, and how many bytes of it were
    /// encrypted by the mesh.
    fn watched(&self, work: impl FnOnce() -> Result<()>) -> Result<Wire> {
        let node = self.cluster.node(0);
        let capture = Capture::start(node.netns(), "eth0", self.cluster.dir())?;
        work()?;
        let captured = capture.finish()?;
        Ok(Wire {
            in_the_clear: captured.contains(b"GET / HTTP"),
            encrypted: captured.tls(TUNNEL_PORT).application_data > 0,
        })
    }

    /// Asks a server, which is to answer this, and that to be seen on the wire.
    fn ask(&self, client: &Pod, server: IpAddr, (word, expected): (&str, Wire)) -> Result<()> {
        let wire = self.watched(|| {
            ensure!(self.get(client, server)? == word);
            Ok(())
        })?;
        ensure!(wire == expected, "{wire:?}");
        Ok(())
    }

    /// Asks until it is so: a server may not listen yet, or the first answer come by the way of before.
    fn wait_answer(&self, client: &Pod, server: IpAddr, expected: (&str, Wire)) -> Result<()> {
        eventually("the answer, and the wire as it should be", || {
            self.ask(client, server, expected)
        })
    }

    fn enrolled(&self, node: usize, pod: &str) -> Result<()> {
        self.cluster.node(node).wait_enrolled("default", pod)
    }
}

/// What was seen on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Wire {
    in_the_clear: bool,
    encrypted: bool,
}

const MESH: Wire = Wire {
    in_the_clear: false,
    encrypted: true,
};
const NO_MESH: Wire = Wire {
    in_the_clear: true,
    encrypted: false,
};

fn outside(stage: &Stage<'_>) -> Result<()> {
    let (client, server) = (
        stage.client("plain", false)?,
        stage.server("bare", false, "bare")?,
    );
    // The server may not listen yet.
    stage.wait_answer(&client, server.address()?, ("bare", NO_MESH))?;
    stage.remove(&client, &server)
}

fn found(stage: &Stage<'_>) -> Result<()> {
    let (client, server) = (
        stage.client("order", true)?,
        stage.server("payment", true, "paid")?,
    );
    stage.enrolled(0, "order")?;
    stage.enrolled(1, "payment")?;
    stage.cluster.node(0).wait_known("default", "payment")?;
    // The server may not listen yet, nor have its certificate.
    stage.wait_answer(&client, server.address()?, ("paid", MESH))?;
    stage.remove(&client, &server)
}

/// As after a node's restart, or when a sandbox died: the same pod, in another network namespace, with another address.
fn anew(stage: &Stage<'_>) -> Result<()> {
    let mut client = stage.client("order", true)?;
    let server = stage.server("payment", true, "again")?;
    stage.enrolled(0, "order")?;
    stage.enrolled(1, "payment")?;
    for _ in 0..2 {
        let before = client.address()?;
        client = stage.kubelets[0].make_anew(&client)?;
        ensure!(client.address()? != before, "it has the address of before");
        // Of the sandbox that is gone it is still said that the pod is enrolled, until the agent has looked.
        stage.wait_answer(&client, server.address()?, ("again", MESH))?;
    }
    stage.remove(&client, &server)
}

fn labelled(stage: &Stage<'_>) -> Result<()> {
    let mut client = stage.client("late", false)?;
    let mut server = stage.server("later", false, "late")?;
    let address = server.address()?;
    for (mesh, expected) in [("enabled", MESH), ("disabled", NO_MESH), ("enabled", MESH)] {
        stage.kubelets[0].label(&mut client, "weft.dev/mesh", mesh)?;
        stage.kubelets[1].label(&mut server, "weft.dev/mesh", mesh)?;
        // Between the two there may be moments without an answer, and the first may come by the way of before.
        stage.wait_answer(&client, address, ("late", expected))?;
    }
    stage.remove(&client, &server)
}

/// An init container asks before anything else of its pod runs, and before the API server knows where the pod is.
fn first(stage: &Stage<'_>) -> Result<()> {
    let server = stage.server("payment", true, "paid")?;
    stage.enrolled(1, "payment")?;
    stage.cluster.node(0).wait_known("default", "payment")?;
    let installer = |command: &str| -> Result<Program> {
        let node = stage.cluster.node(0);
        let text = |path: &Path| path.display().to_string();
        let program = node.host_command(&text(&binary("weft-cni")?))?;
        Ok(program
            .arg(command)
            .args(["--conf-dir", &text(&stage.cni[0].configurations)])
            .args(["--bin-dir", &text(&stage.cni[0].plugins)])
            .args(["--namespaces", &text(&stage.folder.join(CNI_NAMESPACES))]))
    };
    let socket = stage.folder.join(CNI_SOCKET).display().to_string();
    let _installer = installer("install")?.args(["--socket", &socket]).spawn()?;
    eventually("the plugin to be installed", || {
        let list = cni_list(stage)?;
        ensure!(list.contains("weft-cni"), "{list}");
        Ok(())
    })?;
    for _ in 0..3 {
        first_connection(stage, &server)?;
    }
    drop(_installer);
    installer("uninstall")?.run()?;
    stage.kubelets[1].remove(&server)
}

/// An init container of a new pod on node 0 asks a server before anything else of its pod runs.
fn first_connection(stage: &Stage<'_>, server: &Pod) -> Result<()> {
    let mut pod = stage.pod("early", true, "exec sleep 1000000");
    let mut init = pod["spec"]["containers"][0].clone();
    init["name"] = "init".into();
    let url = format!("http://{}:8080/", server.address()?);
    init["command"] = json!(["/usr/bin/curl", "-sS", "-m", "10", url]);
    pod["spec"]["initContainers"] = json!([init]);
    let wire = stage.watched(|| {
        let client = stage.kubelets[0].run(pod)?;
        let said = stage.kubelets[0].log(&client, "init");
        ensure!(said == "paid\n", "{said}");
        stage.kubelets[0].remove(&client)
    })?;
    ensure!(wire == MESH, "{wire:?}");
    Ok(())
}

fn cni_list(stage: &Stage<'_>) -> Result<String> {
    let list = stage.cni[0].configurations.join(CNI_LIST);
    fs::read_to_string(&list).with_context(|| list.display().to_string())
}

/// The container that the component `cni` adds to the agent's pod, and the one that removal has for it: of the image, with
/// their rights and mounts.
fn installed(stage: &Stage<'_>) -> Result<()> {
    let manifests = Deployed::read(stage.cluster.dir())?;
    let kubelet = &stage.kubelets[0];
    let agent = manifests.pod("DaemonSet", "weft-agent")?;
    let component = Deployed::component("cni/agent.yaml")?;
    let installer = only_cni(stage, agent, &component["spec"]["template"]["spec"])?;
    let name = installer["containers"][0]["image"].as_str();
    let image = Image::of(manifests.archive(), name.context("no image")?);
    kubelet.runtime().import(&image)?;
    let server = stage.server("payment", true, "paid")?;
    stage.enrolled(1, "payment")?;
    stage.cluster.node(0).wait_known("default", "payment")?;
    let before = cni_list(stage)?;
    ensure!(!before.contains("weft-cni"), "{before}");
    let probe = installer["containers"][0]["readinessProbe"]["exec"]["command"].clone();
    let probe: Vec<String> = serde_json::from_value(probe)?;
    let probe: Vec<&str> = probe.iter().map(String::as_str).collect();
    let pod = kubelet.run(of_the_mesh("weft-cni-of-containers", &installer))?;
    eventually("the installer to be ready", || {
        let said = kubelet.execute(&pod, "cni", &probe)?;
        ensure!(said.code == 0, "{said:?} {}", kubelet.log(&pod, "cni"));
        Ok(())
    })?;
    let list = cni_list(stage)?;
    ensure!(list.contains("weft-cni"), "{list}");
    first_connection(stage, &server)?;
    // The plugin outlives who installed it.
    kubelet.remove_patiently(&pod, Duration::from_secs(10))?;
    first_connection(stage, &server)?;
    let removal = manifests.pod("DaemonSet", "weft-uninstall")?;
    let mut removal = only_cni(stage, removal, removal)?;
    removal["initContainers"] = removal["containers"].take();
    removal["containers"] = json!([]);
    let pod = kubelet.run(of_the_mesh("weft-uninstall-of-containers", &removal))?;
    let list = cni_list(stage)?;
    ensure!(!list.contains("weft-cni"), "{list}");
    for file in [
        stage.cni[0].plugins.join("weft-cni"),
        stage.folder.join(CNI_NAMESPACES),
    ] {
        ensure!(!file.exists(), "{} is still there", file.display());
    }
    kubelet.remove(&pod)?;
    stage.kubelets[1].remove(&server)
}

/// A pod of the mesh's manifests with the container and the volumes for the CNI plugin alone. The agent of node 0 runs
/// beside it, and has its socket and its list in a folder of the test.
fn only_cni(stage: &Stage<'_>, pod: &Value, with: &Value) -> Result<Value> {
    let named = |list: &str| {
        let containers = with[list].as_array().into_iter().flatten();
        containers.filter(|it| it["name"] == "cni")
    };
    let container = named("containers").chain(named("initContainers")).next();
    let mut container = container.context("no container cni")?.clone();
    let path = |name: &str| stage.folder.join(name).display().to_string();
    let is_removal = container["command"][1] == "uninstall";
    for variable in container["env"].as_array_mut().into_iter().flatten() {
        match variable["name"].as_str() {
            Some("WEFT_CNI_SOCKET") => variable["value"] = path(CNI_SOCKET).into(),
            // Where it is mounted, of the one; where the node has it, of the other.
            Some("WEFT_CNI_NAMESPACES") if !is_removal => {
                variable["value"] = path(CNI_NAMESPACES).into();
            }
            _ => {}
        }
    }
    let mut volumes = with["volumes"].clone();
    for volume in volumes.as_array_mut().into_iter().flatten() {
        if volume["name"] == "cni-list" {
            let list = stage.folder.join(CNI_NAMESPACES);
            let folder = list.parent().context("no folder")?;
            volume["hostPath"]["path"] = folder.display().to_string().into();
        }
    }
    let mut pod = pod.clone();
    pod["containers"] = json!([container]);
    pod["initContainers"] = json!([]);
    pod["volumes"] = volumes;
    Ok(pod)
}

fn of_the_mesh(name: &str, spec: &Value) -> Value {
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "weft-system"}, "spec": spec})
}

/// The image is imported, and its agent runs in a container with the rights, mounts and system calls that the DaemonSet gives
/// it: first beside the agent that node 1 has, then beside another one of its own, as in a rolling update.
fn deployed(stage: &Stage<'_>) -> Result<()> {
    let manifests = Deployed::read(stage.cluster.dir())?;
    let (node, kubelet) = (stage.cluster.node(1), &stage.kubelets[1]);
    let spec = manifests.pod("DaemonSet", "weft-agent")?;
    let name = spec["containers"][0]["image"]
        .as_str()
        .context("no image")?;
    kubelet
        .runtime()
        .import(&Image::of(manifests.archive(), name))?;
    let (client, server) = (
        stage.client("order", true)?,
        stage.server("payment", true, "paid")?,
    );
    stage.enrolled(0, "order")?;
    stage.enrolled(1, "payment")?;
    let ask = || stage.ask(&client, server.address()?, ("paid", MESH));
    eventually("an answer by the mesh", ask)?;
    let agent = |number: u32| -> Result<Pod> {
        let pod = kubelet.run(agent_pod(stage, spec, number)?)?;
        let probe = &spec["containers"][0]["readinessProbe"]["exec"]["command"];
        let probe = probe.as_array().context("no probe")?.iter();
        let probe: Vec<&str> = probe.filter_map(Value::as_str).collect();
        eventually("the new agent to be ready", || {
            let said = kubelet.execute(&pod, "agent", &probe)?;
            let log = kubelet.log(&pod, "agent");
            ensure!(said.code == 0, "{said:?} {log}");
            Ok(())
        })?;
        Ok(pod)
    };
    let one = agent(1)?;
    ask()?;
    node.stop_agent()?;
    ask()?;
    let two = agent(2)?;
    kubelet.remove_patiently(&one, PATIENCE)?;
    ask()?;
    node.start_agent()?;
    kubelet.remove_patiently(&two, PATIENCE)?;
    ask()?;
    stage.remove(&client, &server)
}

/// A pod of the DaemonSet on node 1. This machine is several nodes, so what tells their agents apart in the kernel is said
/// besides; and it has no name server.
fn agent_pod(stage: &Stage<'_>, spec: &Value, number: u32) -> Result<Value> {
    let node = stage.cluster.node(1);
    let mut spec = spec.clone();
    let env = spec["containers"][0]["env"].as_array_mut();
    let env = env.context("no variables")?;
    let controller = stage.cluster.controller()?.address();
    let text = |path: &Path| path.display().to_string();
    for (name, value) in [
        ("WEFT_CONTROLLER", format!("https://{controller}")),
        ("WEFT_INSTANCE", node.instance().to_owned()),
        ("WEFT_CGROUP", text(node.cgroup().path())),
        ("WEFT_KUBELET_CGROUP", text(node.kubelet_cgroup().path())),
    ] {
        env.retain(|it| it["name"] != name);
        env.push(json!({"name": name, "value": value}));
    }
    Ok(json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": format!("weft-agent-of-containers-{number}"), "namespace": "weft-system"},
        "spec": spec,
    }))
}

/// Longer than the agent waits for a successor and for flows.
const PATIENCE: Duration = Duration::from_secs(75);

/// The bridge of the node, where pods that mount the node's folders find it, with addresses that no other pod of it has.
fn cni(node: &Node) -> Result<CniFolders> {
    let folders = CniFolders {
        configurations: node.dir().join("host/etc/cni/net.d"),
        plugins: node.dir().join("host/opt/cni/bin"),
    };
    for folder in [&folders.configurations, &folders.plugins] {
        fs::create_dir_all(folder)?;
    }
    for plugin in ["bridge", "host-local", "loopback", "portmap"] {
        let from = PathBuf::from("/usr/lib/cni").join(plugin);
        fs::copy(&from, folders.plugins.join(plugin))
            .with_context(|| format!("{}", from.display()))?;
    }
    let manifest = node.manifest();
    let range = manifest["spec"]["podCIDR"].as_str().context("no range")?;
    let (network, _) = range.rsplit_once(".0/").context("not a /24")?;
    let list = json!({
        "cniVersion": "1.0.0",
        "name": "pods",
        "plugins": [{
            "type": "bridge",
            "bridge": "br0",
            "ipam": {
                "type": "host-local",
                "dataDir": node.dir().join("cni/addresses"),
                "ranges": [[{"subnet": range, "gateway": format!("{network}.1"),
                    "rangeStart": format!("{network}.128"), "rangeEnd": format!("{network}.254")}]],
                "routes": [{"dst": "0.0.0.0/0"}],
            },
        }],
    });
    fs::write(
        folders.configurations.join(CNI_LIST),
        serde_json::to_vec_pretty(&list)?,
    )?;
    ensure!(folders.plugins.join("bridge").exists());
    Ok(folders)
}
