//! A virtual cluster: nodes that are network namespaces, one underlay between them, and the
//! shipped controller and agents.
//!
//! ```text
//!   pod eth0 ── v<n> [node namespace: br0 ] eth0 ── n<i> [lan namespace: br0] ── eth0 controller
//! ```
//!
//! Every link lives in a namespace of the run, none in the machine's own, so addresses can be the
//! same in every run and deleting the namespaces deletes all. Pods reach each other by plain
//! routing, IPv4 and IPv6, as with any CNI without overlays.

mod agent;
mod controller;
mod kubelet;
mod node;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

pub use controller::{Controller, Replica, TRUST_DOMAIN};
pub use kubelet::{AgentPod, Projected};
pub(crate) use kubelet::{project, token_of};
pub use node::Node;

use crate::cgroup::{self, Cgroup};
use crate::command::{Process, tail};
use crate::deployed::Deployed;
use crate::dns::NameServer;
use crate::manifests::{self, Manifests, ServiceSpec};
use crate::netns::Netns;
use crate::pod::{Pod, PodSpec};
use crate::run::Run;

/// What a cluster is made of.
#[derive(Clone, Debug)]
pub struct ClusterOptions {
    /// How many nodes.
    pub nodes: u8,
    /// Whether there is a controller and agents.
    pub mesh: bool,
    /// Further arguments for the controller.
    pub controller_args: Vec<String>,
    /// Further arguments for every agent.
    pub agent_args: Vec<String>,
    /// Further arguments for the agents of single nodes, by their numbers.
    pub node_args: Vec<(usize, Vec<String>)>,
    /// Whether every second agent that a node starts has another layout of the kernel's maps.
    pub alternate_layouts: bool,
    /// Whether every agent has a cgroup of its own beside that of the pods, as a service of the host
    /// has, rather than one for all agents inside of the one that is intercepted.
    pub separate_cgroups: bool,
    /// Whether the CPUs are shared out between pods, and agents, as kubelets have it: else between all threads.
    pub cpu_shares: bool,
    /// Whether the controller reads the manifests from an API server, rather than from their directory; then it has its
    /// issuer there, too, and knows agents by tokens of their pods.
    pub kubernetes: bool,
    /// Whether controller and agents are the containers that the manifests say: with `kubernetes` only, and without
    /// further arguments.
    pub deployed: bool,
    /// Whether agents find the control groups of pods and kubelet by themselves, and there is a process called so. Those
    /// of pods are deeper in the hierarchy than on a node, so that they take its root.
    pub find_cgroups: bool,
}

impl Default for ClusterOptions {
    fn default() -> Self {
        ClusterOptions {
            nodes: 2,
            mesh: true,
            controller_args: vec![],
            agent_args: vec![],
            node_args: vec![],
            alternate_layouts: false,
            separate_cgroups: false,
            cpu_shares: false,
            kubernetes: false,
            deployed: false,
            find_cgroups: false,
        }
    }
}

/// A running cluster; removed when dropped.
#[derive(Debug)]
pub struct Cluster {
    // Fields are dropped in this order: processes and namespaces first, the run with what may be
    // left last.
    nodes: Vec<Node>,
    controller: Option<Controller>,
    manifests: Manifests,
    services: AtomicU16,
    /// Of a cluster whose mesh is deployed.
    names: Vec<NameServer>,
    ready_after: Duration,
    lan: Netns,
    /// Nobody says where pods are.
    finds_pods: bool,
    run: Run,
}

impl Cluster {
    /// Two nodes with controller and agents, ready.
    pub fn start() -> Result<Cluster> {
        Cluster::with(ClusterOptions::default())
    }

    /// Two nodes without a mesh.
    pub fn without_mesh() -> Result<Cluster> {
        Cluster::with(ClusterOptions {
            mesh: false,
            ..ClusterOptions::default()
        })
    }

    /// Builds the cluster and waits until its controller and agents are ready.
    pub fn with(options: ClusterOptions) -> Result<Cluster> {
        let run = Run::start()?;
        let manifests = Manifests::create(run.dir().join("manifests"))?;
        let lan = build_lan(run.name())?;
        let mut cluster = Cluster {
            nodes: Vec::new(),
            controller: None,
            manifests,
            services: AtomicU16::new(0),
            names: Vec::new(),
            ready_after: Duration::ZERO,
            lan,
            finds_pods: options.kubernetes,
            run,
        };
        let root = cgroup::run_root(cluster.run.name())?;
        let root = match options.cpu_shares {
            true => Cgroup::create_with_shares(root)?,
            false => Cgroup::create(root)?,
        };
        for index in 0..options.nodes {
            let node = Node::build(&cluster.run, &cluster.lan, &root, index, options.nodes)?;
            cluster.manifests.apply_object(&node.manifest())?;
            cluster.nodes.push(node);
        }
        cluster
            .manifests
            .apply_object(&manifests::namespace("default", &json!({})))?;
        if options.mesh {
            cluster.start_mesh(&root, &options)?;
        }
        Ok(cluster)
    }

    /// The name that all of it carries.
    pub fn name(&self) -> &str {
        self.run.name()
    }

    /// The folder with this cluster's files.
    pub fn dir(&self) -> &std::path::Path {
        self.run.dir()
    }

    /// A node by number, from 0.
    pub fn node(&self, index: usize) -> &Node {
        &self.nodes[index]
    }

    /// All nodes.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// How long it took from the API server's and the controller's start until all agents were ready.
    pub fn ready_after(&self) -> Duration {
        self.ready_after
    }

    /// The controller of a cluster with a mesh.
    pub fn controller(&self) -> Result<&Controller> {
        self.controller.as_ref().context("this cluster has no mesh")
    }

    /// The manifests the controller watches.
    pub fn manifests(&self) -> &Manifests {
        &self.manifests
    }

    /// Makes a pod and its manifest, and waits until the agent of its node has it if it is meshed.
    pub fn add_pod(&self, spec: PodSpec) -> Result<Pod> {
        let pod = self.build_pod(spec)?;
        self.announce(&pod)?;
        self.wait_enrolled(&pod)?;
        Ok(pod)
    }

    /// Makes a pod without telling anybody; [`Cluster::announce`] follows.
    pub fn build_pod(&self, spec: PodSpec) -> Result<Pod> {
        let node = self.nodes.get(spec.node_index()).context("no such node")?;
        let spec = match self.finds_pods {
            true => spec.laid_out(),
            false => spec,
        };
        Pod::build(spec, node, self.run.name())
    }

    /// Writes the pod's manifest, and those of its namespace and service account.
    pub fn announce(&self, pod: &Pod) -> Result<()> {
        let namespace = manifests::namespace(pod.namespace(), &json!({}));
        self.manifests.ensure_object(&namespace)?;
        self.manifests.ensure_object(&manifests::service_account(
            pod.namespace(),
            pod.service_account(),
        ))?;
        self.manifests.apply_object(&pod.manifest())
    }

    /// Waits until the agent of a meshed pod's node handles its traffic, and all other agents know
    /// it.
    pub fn wait_enrolled(&self, pod: &Pod) -> Result<()> {
        if self.controller.is_none() {
            return Ok(());
        }
        for node in self.nodes.iter().filter(|node| node.agent_is_running()) {
            if pod.is_enrolled() && node.index() == pod.node_index() {
                node.wait_enrolled(pod.namespace(), pod.name())?;
            }
            node.wait_known(pod.namespace(), pod.name())?;
        }
        Ok(())
    }

    /// Gives a pod that is found by its processes another sandbox.
    pub fn restart_sandbox(&self, pod: &mut Pod) -> Result<()> {
        let node = self.nodes.get(pod.node_index()).context("no such node")?;
        pod.restart_sandbox(node, self.run.name())
    }

    /// Takes the pod's manifest away and then the pod, as a kubelet's end of it looks.
    pub fn remove_pod(&self, pod: Pod) -> Result<()> {
        self.manifests.remove_object(&pod.manifest())?;
        pod.delete()
    }

    /// Lets the kubelet of a node make a pod for the node's agent, with the volume that it needs; one that was there
    /// stays, and is not the agent's any more.
    pub fn add_agent_pod(&self, node: &Node) -> Result<AgentPod> {
        let pod = node.renew_agent_pod();
        self.apply(&pod.manifest())?;
        self.project(node, &Projected::default())?;
        Ok(pod)
    }

    /// Lets the kubelet of a node exchange token and roots of the agent's pod.
    pub fn project(&self, node: &Node, wanted: &Projected) -> Result<()> {
        let token = node.agent_pod().token(self.controller()?, wanted)?;
        self.project_token(node, &token)
    }

    /// Puts any token, and the roots, where the agent of a node has its own.
    pub fn project_token(&self, node: &Node, token: &str) -> Result<()> {
        let roots = kubelet::roots(self.controller()?)?;
        let files = [(kubelet::TOKEN, token), (kubelet::ROOTS, &roots)];
        kubelet::project(&kubelet::volume(node.dir()), &files)
    }

    /// The roots that agents have mounted, where there is Kubernetes.
    pub fn mounted_roots(&self) -> Result<String> {
        kubelet::roots(self.controller()?)
    }

    /// Makes a Service with an IPv4 and an IPv6 address and gives both.
    pub fn add_service(&self, spec: &ServiceSpec) -> Result<[IpAddr; 2]> {
        let number = self.services.fetch_add(1, Ordering::Relaxed) + 10;
        ensure!(number < 250, "too many services");
        let addresses = [service_v4(number).into(), service_v6(number).into()];
        let namespace = manifests::namespace(spec.namespace_name(), &json!({}));
        self.manifests.ensure_object(&namespace)?;
        let texts: Vec<String> = addresses
            .iter()
            .map(|address: &IpAddr| address.to_string())
            .collect();
        self.manifests.apply_object(&spec.manifest(&texts))?;
        Ok(addresses)
    }

    /// Applies an object of any kind.
    pub fn apply(&self, object: &Value) -> Result<()> {
        self.manifests.apply_object(object)
    }

    /// Removes an object of any kind.
    pub fn remove(&self, object: &Value) -> Result<()> {
        self.manifests.remove_object(object)
    }

    /// The end of the logs of every part of the mesh.
    pub fn logs(&self, lines: usize) -> String {
        let controller = self.controller.iter().flat_map(Controller::log_files);
        let files: Vec<PathBuf> = controller
            .chain(self.nodes.iter().flat_map(Node::agent_log_files))
            .collect();
        let mut out = String::new();
        for file in files {
            let text = std::fs::read_to_string(&file).unwrap_or_default();
            if !text.trim().is_empty() {
                out += &format!("--- {}\n{}\n", file.display(), tail(&text, lines));
            }
        }
        out
    }

    fn start_mesh(&mut self, root: &Cgroup, options: &ClusterOptions) -> Result<()> {
        let tokens: Vec<(String, String)> = self
            .nodes
            .iter()
            .map(|node| (node.name().to_owned(), node.join_token().to_owned()))
            .collect();
        let controller = Controller::build(
            &self.run,
            &self.lan,
            root.child("controller")?,
            self.manifests.dir(),
            options.kubernetes,
            &tokens,
            &options.controller_args,
        )?;
        if options.kubernetes {
            let namespace = manifests::namespace(kubelet::NAMESPACE, &json!({}));
            self.manifests.apply_object(&namespace)?;
        }
        let mut controller = controller;
        let deployed = match options.deployed {
            true => Some(Arc::new(Deployed::read(self.run.dir())?)),
            false => None,
        };
        let begun = Instant::now();
        if let Some(deployed) = &deployed {
            controller.deploy(Arc::clone(deployed), self.run.dir());
            let name = "weft-controller.weft-system.svc.cluster.local";
            for node in &self.nodes {
                let addresses = vec![lan_v4(CONTROLLER_HOST)];
                let server = NameServer::start(node.netns(), name, addresses)?;
                self.names.push(server);
                node.deploy(Arc::clone(deployed));
            }
        }
        let started = controller.start();
        self.controller = Some(controller);
        started.map_err(|error| error.context(self.logs(40)))?;
        let ca = self.controller()?.ca_dir().join("ca.crt");
        let trust_bundle = (!options.kubernetes).then_some(ca.as_path());
        for node in &self.nodes {
            if options.kubernetes {
                self.add_agent_pod(node)?;
            }
            let mut args = options.agent_args.clone();
            let own = options.node_args.iter();
            let own = own.filter(|(index, _)| *index == node.index());
            args.extend(own.flat_map(|(_, args)| args.clone()));
            if options.find_cgroups {
                node.start_kubelet()?;
            }
            node.configure_agent(trust_bundle, &args, options)?;
            node.spawn_agent()?;
        }
        for node in &self.nodes {
            node.wait_ready()
                .map_err(|error| error.context(self.logs(40)))?;
        }
        self.ready_after = begun.elapsed();
        Ok(())
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.run.keep_files();
            eprintln!("{}", self.logs(60));
        }
    }
}

/// The namespace with the switch between the nodes and the controller.
fn build_lan(run: &str) -> Result<Netns> {
    let lan = Netns::create(&format!("{run}-lan"))?;
    let [a, b, c, d] = lan_v4(1).octets();
    let link = format!("0a:58:{a:02x}:{b:02x}:{c:02x}:{d:02x}");
    lan.ip(&["link", "add", "br0", "address", &link, "type", "bridge"])?;
    lan.ip(&["addr", "add", &format!("{}/24", lan_v4(1)), "dev", "br0"])?;
    lan.ip(&[
        "addr",
        "add",
        &format!("{}/64", lan_v6(1)),
        "dev",
        "br0",
        "nodad",
    ])?;
    lan.ip(&["link", "set", "br0", "up"])?;
    Ok(lan)
}

/// Connects a namespace to the underlay as `eth0` with host number `host`, and routes everything
/// else there.
fn join_lan(netns: &Netns, lan: &Netns, host: u8, port: &str) -> Result<()> {
    let veth = [
        "link",
        "add",
        "eth0",
        "type",
        "veth",
        "peer",
        "name",
        port,
        "netns",
        lan.name(),
    ];
    netns.ip(&veth)?;
    lan.ip(&["link", "set", port, "master", "br0", "up"])?;
    netns.ip(&[
        "addr",
        "add",
        &format!("{}/24", lan_v4(host)),
        "dev",
        "eth0",
    ])?;
    netns.ip(&[
        "addr",
        "add",
        &format!("{}/64", lan_v6(host)),
        "dev",
        "eth0",
        "nodad",
    ])?;
    netns.ip(&["link", "set", "eth0", "up"])?;
    netns.ip(&["route", "add", "default", "via", &lan_v4(1).to_string()])?;
    netns.ip(&[
        "-6",
        "route",
        "add",
        "default",
        "via",
        &lan_v6(1).to_string(),
    ])?;
    Ok(())
}

/// Waits for a process of the mesh, saying so when it ended instead.
fn check_running(process: &mut Process) -> Result<()> {
    ensure!(
        process.is_running(),
        "{} ended: {}{}",
        process.name(),
        tail(&process.stdout(), 20),
        tail(&process.stderr(), 20)
    );
    Ok(())
}

/// The binary of this name, built before: in `WEFT_BIN_DIR`, else where the workspace's builds are: as it is shipped,
/// release, debug.
pub fn binary(name: &str) -> Result<PathBuf> {
    let mut folders: Vec<PathBuf> = Vec::new();
    if let Some(folder) = std::env::var_os("WEFT_BIN_DIR") {
        folders.push(folder.into());
    }
    let workspace = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..");
    let target = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| workspace.join("target"), PathBuf::from);
    let shipped = format!("{}-unknown-linux-gnu/release", std::env::consts::ARCH);
    let built = [&shipped, "release", "debug"].map(|it| target.join(it));
    folders.extend(built);
    let found = folders
        .iter()
        .map(|folder| folder.join(name))
        .find(|path| path.is_file());
    found.with_context(|| {
        format!("no {name} in {folders:?}: run `cargo build`, or set WEFT_BIN_DIR to its folder")
    })
}

fn lan_v4(host: u8) -> Ipv4Addr {
    Ipv4Addr::new(172, 30, 0, host)
}

fn lan_v6(host: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0x172, 0x30, 0, 0, 0, 0, host.into())
}

/// An address of the pods of a node.
pub(crate) fn pod_v4(node: usize, host: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 244, u8::try_from(node).unwrap_or(u8::MAX), host)
}

/// An address of the pods of a node.
pub(crate) fn pod_v6(node: usize, host: u8) -> Ipv6Addr {
    let node = u16::try_from(node).unwrap_or(u16::MAX);
    Ipv6Addr::new(0xfd00, 0x10, 0x244, node, 0, 0, 0, host.into())
}

fn service_v4(number: u16) -> Ipv4Addr {
    Ipv4Addr::new(10, 96, 0, u8::try_from(number).unwrap_or(u8::MAX))
}

fn service_v6(number: u16) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, number)
}

/// All addresses of pods, as `--pod-range` says them.
pub const POD_RANGES: [&str; 2] = ["10.244.0.0/16", "fd00:10:244::/48"];
/// All addresses of Services, as `--service-range` says them.
pub const SERVICE_RANGES: [&str; 2] = ["10.96.0.0/16", "fd00:10:96::/112"];
/// How long a part of the mesh may take to be ready on a busy machine.
const START_DEADLINE: Duration = Duration::from_secs(30);
/// The controller's host number in the underlay; nodes follow from [`FIRST_NODE_HOST`].
const CONTROLLER_HOST: u8 = 2;
const FIRST_NODE_HOST: u8 = 10;
