//! A node: its namespace, its bridge for pods, its cgroup subtree.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU8, Ordering};

use anyhow::Result;
use serde_json::{Value, json};

use super::agent::AgentState;
use super::controller::lock;
use super::kubelet::AgentPod;
use super::{FIRST_NODE_HOST, lan_v4, lan_v6, pod_v4, pod_v6};
use crate::cgroup::Cgroup;
use crate::command::{Process, Program};
use crate::netns::Netns;
use crate::pod::Pod;
use crate::run::Run;

/// A node of a cluster. What its agent can do is in [`Node`]'s second half, `agent.rs`.
#[derive(Debug)]
pub struct Node {
    // The agent first: its processes end before the namespace goes.
    pub(super) agent: Mutex<AgentState>,
    kubelet: Mutex<Option<Process>>,
    name: String,
    index: usize,
    instance: String,
    netns: Netns,
    cgroup: Cgroup,
    agent_cgroup: Cgroup,
    kubelet_cgroup: Cgroup,
    host_cgroup: Cgroup,
    dir: PathBuf,
    join_token: String,
    next_host: AtomicU8,
    agent_pod: Mutex<AgentPod>,
}

impl Node {
    pub(super) fn build(
        run: &Run,
        lan: &Netns,
        root: &Cgroup,
        index: u8,
        count: u8,
    ) -> Result<Node> {
        let name = format!("n{index}");
        let instance = format!("{}-{name}", run.name());
        let netns = Netns::create(&instance)?;
        super::join_lan(&netns, lan, FIRST_NODE_HOST + index, &name)?;
        add_bridge(&netns, index.into())?;
        for other in (0..count).filter(|other| *other != index) {
            add_route(&netns, other)?;
        }
        let cgroup = root.child(&name)?;
        let agent_cgroup = cgroup.child("agent")?;
        agent_cgroup.allow_real_time()?;
        let dir = run.dir().join(&name);
        std::fs::create_dir_all(&dir)?;
        let address = lan_v4(FIRST_NODE_HOST + index).to_string();
        Ok(Node {
            agent: Mutex::default(),
            kubelet: Mutex::default(),
            agent_pod: Mutex::new(AgentPod::new(&name, address)),
            name,
            index: index.into(),
            instance,
            netns,
            agent_cgroup,
            kubelet_cgroup: cgroup.child("kubelet")?,
            host_cgroup: cgroup.child("host")?,
            cgroup,
            dir,
            join_token: random_token()?,
            next_host: AtomicU8::new(10),
        })
    }

    /// Its name in manifests: `n0`, `n1`, ...
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its number, from 0.
    pub fn index(&self) -> usize {
        self.index
    }

    /// The name of its agent's set of pins.
    pub fn instance(&self) -> &str {
        &self.instance
    }

    /// Its namespace: the host's, as pods see it. Its `eth0` is the wire between nodes.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// The cgroup subtree that the agent's programs are attached to.
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// The agent's own cgroup.
    pub fn agent_cgroup(&self) -> &Cgroup {
        &self.agent_cgroup
    }

    /// The kubelet's cgroup.
    pub fn kubelet_cgroup(&self) -> &Cgroup {
        &self.kubelet_cgroup
    }

    /// Its address in the underlay.
    pub fn v4(&self) -> Ipv4Addr {
        lan_v4(self.host())
    }

    /// Its address in the underlay.
    pub fn v6(&self) -> Ipv6Addr {
        lan_v6(self.host())
    }

    /// The folder with this node's files.
    pub fn dir(&self) -> &std::path::Path {
        &self.dir
    }

    /// A program as the kubelet would run it: the node's namespace, the kubelet's cgroup.
    pub fn kubelet_command(&self, program: &str) -> Result<Program> {
        Program::new(
            program,
            Some(&self.netns),
            Some(&self.kubelet_cgroup),
            &self.dir,
        )
    }

    /// Starts a process that is called as the kubelet is, and does nothing.
    pub(super) fn start_kubelet(&self) -> Result<()> {
        let called = self.dir.join("kubelet");
        std::os::unix::fs::symlink("/bin/sleep", &called)?;
        let program = self.kubelet_command(&called.display().to_string())?;
        *lock(&self.kubelet) = Some(program.arg("infinity").spawn()?);
        Ok(())
    }

    /// A program of the node that is not the kubelet: a host-network process.
    pub fn host_command(&self, program: &str) -> Result<Program> {
        Program::new(
            program,
            Some(&self.netns),
            Some(&self.host_cgroup),
            &self.dir,
        )
    }

    /// A program in a pod's network, and in none of the node's control groups: connections of it are past the mesh.
    pub fn command_in(&self, pod: &Pod, program: &str) -> Result<Program> {
        Program::new(program, Some(pod.netns()), None, &self.dir)
    }

    /// The Node object.
    pub fn manifest(&self) -> Value {
        let ranges = [
            format!("{}/24", pod_v4(self.index, 0)),
            format!("{}/64", pod_v6(self.index, 0)),
        ];
        let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        json!({
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": self.name},
            "spec": {"podCIDR": ranges[0], "podCIDRs": ranges},
            "status": {"nodeInfo": {"kernelVersion": kernel.trim(), "operatingSystem": "linux",
                "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" }},
            "addresses": [
                {"type": "InternalIP", "address": self.v4().to_string()},
                {"type": "InternalIP", "address": self.v6().to_string()},
                {"type": "Hostname", "address": self.name},
            ]},
        })
    }

    /// What proves to the controller that an agent is this node's.
    pub fn join_token(&self) -> &str {
        &self.join_token
    }

    /// The pod that its agent runs in, where there is Kubernetes.
    pub fn agent_pod(&self) -> AgentPod {
        lock(&self.agent_pod).clone()
    }

    /// Another pod for its agent, as after an upgrade; gives it.
    pub(super) fn renew_agent_pod(&self) -> AgentPod {
        let pod = AgentPod::new(&self.name, self.v4().to_string());
        *lock(&self.agent_pod) = pod.clone();
        pod
    }

    /// The next free host number for a pod's addresses.
    pub(crate) fn take_host(&self) -> u8 {
        self.next_host.fetch_add(1, Ordering::Relaxed)
    }

    fn host(&self) -> u8 {
        FIRST_NODE_HOST + u8::try_from(self.index).unwrap_or(u8::MAX)
    }
}

/// The pods' bridge, with their gateway's addresses; the node forwards.
///
/// Its link address is set: a bridge without one takes the lowest of its ports', so that pods that
/// come and go would change the gateway's under the others.
fn add_bridge(netns: &Netns, node: usize) -> Result<()> {
    let [a, b, c, d] = pod_v4(node, 1).octets();
    let link = format!("0a:58:{a:02x}:{b:02x}:{c:02x}:{d:02x}");
    netns.ip(&["link", "add", "br0", "address", &link, "type", "bridge"])?;
    netns.ip(&[
        "addr",
        "add",
        &format!("{}/24", pod_v4(node, 1)),
        "dev",
        "br0",
    ])?;
    netns.ip(&[
        "addr",
        "add",
        &format!("{}/64", pod_v6(node, 1)),
        "dev",
        "br0",
        "nodad",
    ])?;
    netns.ip(&["link", "set", "br0", "up"])?;
    netns.sysctl("ipv4/ip_forward", "1")?;
    netns.sysctl("ipv6/conf/all/forwarding", "1")
}

/// The way to the pods of another node.
fn add_route(netns: &Netns, other: u8) -> Result<()> {
    let host = FIRST_NODE_HOST + other;
    let pods = format!("{}/24", pod_v4(other.into(), 0));
    netns.ip(&["route", "add", &pods, "via", &lan_v4(host).to_string()])?;
    let pods = format!("{}/64", pod_v6(other.into(), 0));
    netns.ip(&[
        "-6",
        "route",
        "add",
        &pods,
        "via",
        &lan_v6(host).to_string(),
    ])?;
    Ok(())
}

fn random_token() -> Result<String> {
    let mut bytes = [0_u8; 16];
    std::io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}
