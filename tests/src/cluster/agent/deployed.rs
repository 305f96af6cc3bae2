//! The agent as the container that the DaemonSet says, in place of a program with arguments of the harness's choice.
//!
//! This machine is several nodes, so what each of them has for itself is exchanged: `/run/weft`, the set of pins, and the
//! control group whose processes are pods. All else is as it is written in the manifests.

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};

use super::{AgentState, START_DEADLINE};
use crate::cluster::controller::lock;
use crate::cluster::{Node, binary, kubelet};
use crate::command::{Finished, Process, Program};
use crate::contain::Container;
use crate::deployed::{Deployed, Facts, Probe};
use crate::dns::NameServer;

/// The manifests, and what was made of them on this node.
#[derive(Debug)]
pub(super) struct OnNode {
    deployed: Arc<Deployed>,
    /// Of each agent that was started, by its process id.
    containers: Vec<(u32, Container)>,
    without: Vec<String>,
}

impl Node {
    /// Agents that are started from now on are containers of the manifests.
    pub(in crate::cluster) fn deploy(&self, deployed: Arc<Deployed>) {
        lock(&self.agent).deployed = Some(OnNode {
            deployed,
            containers: Vec::new(),
            without: Vec::new(),
        });
    }

    /// Withholds capabilities from agents that are started from now on.
    pub fn withhold(&self, capabilities: &[&str]) {
        if let Some(deployed) = &mut lock(&self.agent).deployed {
            deployed.without = capabilities.iter().map(|&it| it.to_owned()).collect();
        }
    }

    /// What the container of an agent is made of.
    pub fn container(&self, pid: u32) -> Result<Container> {
        let state = lock(&self.agent);
        let deployed = state.deployed.as_ref().context("it is not deployed")?;
        let mut containers = deployed.containers.iter();
        let found = containers.find(|(it, _)| *it == pid);
        Ok(found.context("no such agent")?.1.clone())
    }

    /// Asks an agent by a probe of its container, as the kubelet does.
    pub fn probe(&self, pid: u32, probe: &str) -> Result<Finished> {
        let container = self.container(pid)?;
        let command = {
            let state = lock(&self.agent);
            let deployed = state.deployed.as_ref().context("it is not deployed")?;
            let pod = deployed.deployed.pod("DaemonSet", "weft-agent")?;
            match Deployed::probe(pod, "agent", probe)? {
                Probe::Exec(command) => command,
                Probe::Http(..) => anyhow::bail!("it asks a port, which two agents share"),
            }
        };
        let container = Container {
            command,
            ..container
        };
        self.run_container(&container, "probe")
    }

    /// Removes the kernel programs of the node's agents, as the DaemonSet for that does.
    pub fn uninstall(&self) -> Result<()> {
        let deployed = {
            let state = lock(&self.agent);
            let of_node = state.deployed.as_ref().context("it is not deployed")?;
            Arc::clone(&of_node.deployed)
        };
        let pod = deployed.pod("DaemonSet", "weft-uninstall")?;
        let instance = ("WEFT_INSTANCE".into(), self.instance().to_owned());
        let facts = Facts {
            node: self.name().to_owned(),
            pod_dir: self.dir().join("uninstall-pod"),
            host_network: true,
            environment: BTreeMap::from([instance]),
            ..Facts::default()
        };
        fs::create_dir_all(&facts.pod_dir)?;
        let container = deployed.container(pod, "uninstall", &facts)?;
        self.run_container(&container, "uninstall")?
            .success()
            .map(drop)
    }

    /// Runs what comes before an agent, without some capabilities.
    pub fn prepare_without(&self, capabilities: &[&str]) -> Result<Finished> {
        let deployed = {
            let state = lock(&self.agent);
            let of_node = state.deployed.as_ref().context("it is not deployed")?;
            Arc::clone(&of_node.deployed)
        };
        let pod = deployed.pod("DaemonSet", "weft-agent")?;
        let facts = Facts {
            node: self.name().to_owned(),
            pod_dir: self.dir().join("prepare-pod"),
            resolv_conf: NameServer::resolv_conf(kubelet::NAMESPACE),
            host_network: true,
            host_pids: true,
            without: capabilities.iter().map(|&it| it.to_owned()).collect(),
            ..Facts::default()
        };
        fs::create_dir_all(&facts.pod_dir)?;
        let container = deployed.container(pod, "prepare", &facts)?;
        self.run_container(&container, "prepare")
    }

    /// What it has as `/run/weft`.
    pub(super) fn run_dir(&self) -> PathBuf {
        self.dir().join("run-weft")
    }

    pub(super) fn spawn_container(&self, state: &mut AgentState) -> Result<Process> {
        let number = state.started;
        state.started += 1;
        let of_node = state.deployed.as_mut().context("it is not deployed")?;
        let deployed = &of_node.deployed;
        let pod = deployed.pod("DaemonSet", "weft-agent")?;
        let text = |path: &Path| path.display().to_string();
        let log = std::env::var("WEFT_TEST_LOG").unwrap_or("info".into());
        let mut facts = Facts {
            node: self.name().to_owned(),
            pod_dir: self.dir().join(format!("agent-pod-{number}")),
            host_paths: BTreeMap::from([("/run/weft".into(), self.run_dir())]),
            projected: Some(kubelet::volume(self.dir())),
            service_account: None,
            resolv_conf: NameServer::resolv_conf(kubelet::NAMESPACE),
            host_network: true,
            host_pids: true,
            environment: BTreeMap::from([
                ("WEFT_INSTANCE".into(), self.instance().to_owned()),
                ("WEFT_CGROUP".into(), text(self.cgroup().path())),
                (
                    "WEFT_KUBELET_CGROUP".into(),
                    text(self.kubelet_cgroup().path()),
                ),
                ("WEFT_LOG".into(), log),
            ]),
            without: Vec::new(),
        };
        fs::create_dir_all(&facts.pod_dir)?;
        for container in pod["initContainers"].as_array().into_iter().flatten() {
            let name = container["name"].as_str().context("no name")?;
            let init = deployed.container(pod, name, &facts)?;
            self.run_container(&init, name)?.success()?;
        }
        facts.without.clone_from(&of_node.without);
        let container = deployed.container(pod, "agent", &facts)?;
        let process = self.contained(&container, "weft-agent")?.spawn()?;
        state.log_files.extend(process.logs().map(Path::to_owned));
        of_node.containers.push((process.pid(), container));
        Ok(process)
    }

    fn run_container(&self, container: &Container, name: &str) -> Result<Finished> {
        let program = self.contained(container, name)?;
        program.output(START_DEADLINE.max(PROBE_DEADLINE))
    }

    fn contained(&self, container: &Container, name: &str) -> Result<Program> {
        let file = container.root.with_extension("json");
        fs::write(&file, serde_json::to_string_pretty(container)?)?;
        let (netns, cgroup) = (Some(self.netns()), Some(self.agent_cgroup()));
        let program = Program::new(binary("weft-contain")?, netns, cgroup, self.dir())?;
        Ok(program.named(name).arg(file))
    }
}

/// Where the DaemonSet's agents are looked at.
pub(super) const ADMIN: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 9990);
const PROBE_DEADLINE: Duration = Duration::from_secs(10);
