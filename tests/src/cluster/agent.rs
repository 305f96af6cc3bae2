//! The agent of a node: the shipped binary in the node's namespace and cgroup.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;

use super::controller::{grpc_address, lock, write_private};
use super::{ClusterOptions, Node, START_DEADLINE, kubelet};
use crate::command::{Process, Program};
use crate::http;
use crate::metrics::Metrics;
use crate::wait::{DEADLINE, wait_for};

mod deployed;

/// What a node remembers of its agent.
#[derive(Debug, Default)]
pub(super) struct AgentState {
    /// That agents are containers of the manifests, and how.
    deployed: Option<deployed::OnNode>,
    process: Option<Process>,
    /// Agents that were told to end when another took over.
    leaving: Vec<Process>,
    log_files: Vec<PathBuf>,
    args: Vec<String>,
    alternate_layouts: bool,
    separate_cgroups: bool,
    /// How many descriptors those that are started from now on may have.
    descriptors: Option<u64>,
    /// How many were started.
    started: usize,
    /// Whether the next one has the other layout.
    next_layout: bool,
}

impl Node {
    /// Says how the agent is started; what it knows the controller by is `trust_bundle`, or, where there is none, in the
    /// volume that its kubelet projects.
    pub(super) fn configure_agent(
        &self,
        trust_bundle: Option<&Path>,
        further_args: &[String],
        options: &ClusterOptions,
    ) -> Result<()> {
        let pods = match options.separate_cgroups {
            true => self.cgroup().child("pods")?,
            false => self.cgroup().clone(),
        };
        let text = |path: &Path| path.display().to_string();
        let mut args = vec!["run".to_owned()];
        let mut option = |name: &str, value: &str| args.extend([name.to_owned(), value.to_owned()]);
        option("--node", self.name());
        option("--instance", self.instance());
        option("--controller", &format!("https://{}", grpc_address()));
        option("--controller-name", "weft-controller");
        let projected = kubelet::volume(self.dir());
        let roots = projected.join(kubelet::ROOTS);
        option("--trust-bundle", &text(trust_bundle.unwrap_or(&roots)));
        let token = match trust_bundle {
            Some(_) => self.dir().join("join-token"),
            None => projected.join(kubelet::TOKEN),
        };
        option("--join-token-file", &text(&token));
        if !options.find_cgroups {
            option("--cgroup", &text(pods.path()));
            option("--kubelet-cgroup", &text(self.kubelet_cgroup().path()));
        }
        option("--admin", &ADMIN.to_string());
        option("--admin-socket", &text(&self.admin_socket()));
        args.extend_from_slice(further_args);
        let mut state = lock(&self.agent);
        state.args = args;
        state.alternate_layouts = options.alternate_layouts;
        state.separate_cgroups = options.separate_cgroups;
        Ok(())
    }

    /// Gives agents that are started from now on so many descriptors, for good; or as many as there are.
    pub fn limit_descriptors(&self, most: Option<u64>) {
        lock(&self.agent).descriptors = most;
    }

    /// Starts the agent and waits until it is ready.
    pub fn start_agent(&self) -> Result<()> {
        self.spawn_agent()?;
        self.wait_ready()
    }

    /// Starts the agent.
    pub fn spawn_agent(&self) -> Result<()> {
        ensure!(
            lock(&self.agent).process.is_none(),
            "the agent of {} is running",
            self.name()
        );
        let process = self.spawn_process()?;
        lock(&self.agent).process = Some(process);
        Ok(())
    }

    /// Starts another agent beside the one that runs; that one is told to end when the new one is
    /// ready, or `early`, as soon as that one answers at all. Gives the time until the new one was ready.
    pub fn take_over(&self, early: bool) -> Result<Duration> {
        let start = Instant::now();
        let new = self.spawn_process()?;
        let pid = new.pid();
        let old = lock(&self.agent).process.replace(new);
        let old = old.context("no agent is running")?;
        if early {
            self.wait_answer(pid, "to answer", |_| true)?;
            old.signal(Signal::SIGTERM)?;
        }
        self.wait_ready_process(pid)?;
        let took = start.elapsed();
        if !early {
            old.signal(Signal::SIGTERM)?;
        }
        lock(&self.agent).leaving.push(old);
        Ok(took)
    }

    /// Starts another agent beside the one that runs, and leaves both.
    pub fn spawn_beside(&self) -> Result<Beside> {
        self.spawn_process().map(Beside)
    }

    /// Lets the next agent have the layout of the one that was started last.
    pub fn repeat_layout(&self) {
        let mut state = lock(&self.agent);
        state.next_layout = !state.next_layout;
    }

    /// Waits until nothing is left in the kernel of agents that are gone: one layout's folder, and no
    /// hook at another agent's cgroup.
    pub fn wait_alone(&self) -> Result<()> {
        wait_for("one layout, and no hook of another agent", DEADLINE, || {
            let pins = self.pins()?;
            let names: Vec<_> = pins
                .iter()
                .filter_map(|it| it.file_name()?.to_str())
                .collect();
            let number = |name: &&&str| {
                let version = name.strip_prefix('v');
                version.is_some_and(|it| it.parse::<u32>().is_ok())
            };
            let layouts: Vec<_> = names.iter().filter(number).collect();
            let own = self.own_hook()?;
            let foreign = |name: &&&str| name.starts_with("weft_sock_ops-agent-") && ***name != own;
            let hooks: Vec<_> = names.iter().filter(foreign).collect();
            ensure!(
                layouts.len() == 1 && hooks.is_empty(),
                "of {}: layouts {layouts:?}, hooks of others {hooks:?}",
                self.name()
            );
            Ok(Some(()))
        })
    }

    /// The name of the pin of a hook at the agent's own cgroup.
    fn own_hook(&self) -> Result<String> {
        let pid = self.agent_pid().context("no agent is running")?;
        let cgroups = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
        let path = cgroups.lines().find_map(|line| line.strip_prefix("0::"));
        let name = Path::new(path.context("no cgroup")?).file_name();
        let base = self.agent_cgroup().path();
        let own = name.map(|it| base.join(it)).filter(|it| it.exists());
        let own = fs::metadata(own.as_deref().unwrap_or(base))?;
        Ok(format!("weft_sock_ops-agent-{}", own.ino()))
    }

    /// Starts another agent beside the one that runs, kills that one after a while, and waits
    /// until the new one is ready.
    pub fn replace_killing(&self, after: Duration) -> Result<()> {
        let new = self.spawn_process()?;
        let pid = new.pid();
        let old = lock(&self.agent).process.replace(new);
        std::thread::sleep(after);
        old.context("no agent is running")?.kill()?;
        self.wait_ready_process(pid)
    }

    /// What `/ready` answers on the Unix socket: that is the newest agent's.
    pub fn ready_on_socket(&self) -> Result<(u16, String)> {
        let reply = http::get_unix(&self.admin_socket(), "/ready")?;
        Ok((reply.status, reply.body))
    }

    /// Waits until the agent with this process id says that it is ready.
    pub fn wait_ready_process(&self, pid: u32) -> Result<()> {
        self.wait_answer(pid, "to be ready", |status| status == 200)
    }

    fn wait_answer(&self, pid: u32, what: &str, wanted: impl Fn(u16) -> bool) -> Result<()> {
        let what = format!("agent {pid} of {} {what}", self.name());
        wait_for(&what, START_DEADLINE, || {
            if let Some(process) = &mut lock(&self.agent).process {
                super::check_running(process)?;
            }
            let reply = http::get_unix(&self.admin_socket(), "/ready")?;
            let body: Value = serde_json::from_str(&reply.body)?;
            ensure!(
                wanted(reply.status) && body["pid"] == pid,
                "/ready says {body}"
            );
            Ok(Some(()))
        })
    }

    /// Waits until the agents that were told to end have drained and ended.
    pub fn wait_left(&self) -> Result<()> {
        let leaving = std::mem::take(&mut lock(&self.agent).leaving);
        for mut process in leaving {
            let status = process.wait(STOP_DEADLINE)?;
            ensure!(status.success(), "an older agent ended with {status}");
        }
        Ok(())
    }

    fn spawn_process(&self) -> Result<Process> {
        let mut state = lock(&self.agent);
        if state.deployed.is_some() {
            return self.spawn_container(&mut state);
        }
        write_private(&self.dir().join("join-token"), self.join_token())?;
        let name = match state.alternate_layouts && state.next_layout {
            true => "weft-agent-next-layout",
            false => "weft-agent",
        };
        let cgroup = match state.separate_cgroups {
            true => &self.agent_cgroup().child(&state.started.to_string())?,
            false => self.agent_cgroup(),
        };
        state.started += 1;
        state.next_layout = !state.next_layout;
        let binary = super::binary(name)?;
        let new =
            |program: &Path| Program::new(program, Some(self.netns()), Some(cgroup), self.dir());
        let program = match state.descriptors {
            Some(most) => new(Path::new("prlimit"))?
                .named(name)
                .arg(format!("--nofile={most}:{most}"))
                .arg(binary),
            None => new(&binary)?,
        };
        let process = program
            .args(&state.args)
            .env(
                "WEFT_LOG",
                std::env::var("WEFT_TEST_LOG").unwrap_or("info".into()),
            )
            .spawn()?;
        state.log_files.extend(process.logs().map(Path::to_owned));
        Ok(process)
    }

    /// Waits until `/ready` says so.
    pub fn wait_ready(&self) -> Result<()> {
        wait_for(
            &format!("the agent of {} to be ready", self.name()),
            START_DEADLINE,
            || {
                let running = match &mut lock(&self.agent).process {
                    Some(process) => super::check_running(process),
                    None => Err(anyhow::anyhow!("it was not started")),
                };
                if running.is_err() {
                    return Ok(Some(running));
                }
                let (status, body) = self.ready()?;
                ensure!(status == 200, "/ready says {status} {body}");
                Ok(Some(Ok(())))
            },
        )?
    }

    /// What `/ready` answers.
    pub fn ready(&self) -> Result<(u16, String)> {
        let reply = http::get(self.netns(), self.admin_address(), "/ready")?;
        Ok((reply.status, reply.body))
    }

    /// Ends the agent with SIGTERM and waits until it has drained.
    pub fn stop_agent(&self) -> Result<()> {
        let process = lock(&self.agent).process.take();
        let status = process
            .context("no agent is running")?
            .stop(STOP_DEADLINE)?;
        ensure!(status.success(), "the agent ended with {status}");
        Ok(())
    }

    /// Ends the agent with SIGKILL.
    pub fn kill_agent(&self) -> Result<()> {
        lock(&self.agent)
            .process
            .take()
            .context("no agent is running")?
            .kill()
    }

    /// Stops the agent's process without ending it, until [`Node::resume_agent`].
    pub fn pause_agent(&self) -> Result<()> {
        lock(&self.agent)
            .process
            .as_ref()
            .context("no agent is running")?
            .signal(Signal::SIGSTOP)
    }

    /// Lets a paused agent go on.
    pub fn resume_agent(&self) -> Result<()> {
        lock(&self.agent)
            .process
            .as_ref()
            .context("no agent is running")?
            .signal(Signal::SIGCONT)
    }

    /// Whether there is an agent.
    pub fn agent_is_running(&self) -> bool {
        lock(&self.agent)
            .process
            .as_mut()
            .is_some_and(Process::is_running)
    }

    /// The agent's process id.
    pub fn agent_pid(&self) -> Option<u32> {
        lock(&self.agent).process.as_ref().map(Process::pid)
    }

    /// The memory the agent holds, in bytes.
    pub fn agent_resident_bytes(&self) -> Result<u64> {
        lock(&self.agent)
            .process
            .as_ref()
            .context("no agent is running")?
            .resident_bytes()
    }

    /// What the node's agents have pinned: maps, links, and who they are.
    pub fn pins(&self) -> Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        for mount in crate::run::mounts("bpf")? {
            let mut folders = vec![mount.join("weft").join(self.instance())];
            while let Some(folder) = folders.pop() {
                for entry in fs::read_dir(folder).into_iter().flatten() {
                    let entry = entry?;
                    if entry.file_type()?.is_dir() {
                        folders.push(entry.path());
                    }
                    found.push(entry.path());
                }
            }
        }
        Ok(found)
    }

    /// Scrapes the agent's metrics, as a collector on the node would.
    pub fn metrics(&self) -> Result<Metrics> {
        Metrics::parse(&http::get(self.netns(), self.admin_address(), "/metrics")?.ok()?)
    }

    /// What the agent knows: `GET /config_dump` on its Unix socket.
    pub fn config_dump(&self) -> Result<Value> {
        let reply = http::get_unix(&self.admin_socket(), "/config_dump")?;
        Ok(serde_json::from_str(&reply.ok()?)?)
    }

    /// What the agent knows of a Service; none: nothing.
    pub fn known_service(&self, name: &str) -> Result<Option<Value>> {
        let dump = self.config_dump()?;
        let services = dump["services"].as_array().context("services")?;
        Ok(services.iter().find(|it| it["name"] == name).cloned())
    }

    /// The agent's Unix socket.
    pub fn admin_socket(&self) -> PathBuf {
        match lock(&self.agent).deployed {
            Some(_) => self.run_dir().join("agent.sock"),
            None => self.dir().join("admin.sock"),
        }
    }

    /// The address of the agent's metrics port, in the node's namespace.
    pub fn admin_address(&self) -> SocketAddr {
        match lock(&self.agent).deployed {
            Some(_) => deployed::ADMIN,
            None => ADMIN,
        }
    }

    /// All the agent logged, over all its starts.
    pub fn agent_log(&self) -> String {
        self.agent_log_files()
            .iter()
            .map(|file| fs::read_to_string(file).unwrap_or_default())
            .collect()
    }

    /// Waits until the agent handles the traffic of this pod of its node.
    pub fn wait_enrolled(&self, namespace: &str, pod: &str) -> Result<()> {
        let what = format!("{} to enroll {namespace}/{pod}", self.name());
        wait_for(&what, DEADLINE, || {
            Ok(self.is_enrolled(namespace, pod)?.then_some(()))
        })
    }

    /// Whether the agent handles the traffic of this pod of its node.
    pub fn is_enrolled(&self, namespace: &str, pod: &str) -> Result<bool> {
        let dump = self.config_dump()?;
        let pods = dump.get("pods").context("no pods in the dump")?;
        let entry = find_named(pods, namespace, pod);
        let state = entry.and_then(|it| it.get("state"));
        Ok(state.and_then(Value::as_str) == Some("enrolled"))
    }

    /// Waits until the agent knows this workload, anywhere in the cluster.
    pub fn wait_known(&self, namespace: &str, pod: &str) -> Result<()> {
        let what = format!("{} to know {namespace}/{pod}", self.name());
        wait_for(&what, DEADLINE, || {
            let dump = self.config_dump()?;
            let workloads = dump.get("workloads").context("no workloads in the dump")?;
            Ok(find_named(workloads, namespace, pod).map(drop))
        })
    }

    pub(super) fn agent_log_files(&self) -> Vec<PathBuf> {
        lock(&self.agent).log_files.clone()
    }
}

/// An agent beside that of the node.
#[derive(Debug)]
pub struct Beside(Process);

impl Beside {
    /// Ends it with SIGKILL.
    pub fn kill(mut self) -> Result<()> {
        self.0.kill()
    }
}

/// The entry of a list (or of a map's values) with this namespace and name.
pub(crate) fn find_named<'a>(list: &'a Value, namespace: &str, name: &str) -> Option<&'a Value> {
    let matches = |entry: &&Value| {
        entry.get("namespace").and_then(Value::as_str) == Some(namespace)
            && entry.get("name").and_then(Value::as_str) == Some(name)
    };
    match list {
        Value::Array(entries) => entries.iter().find(matches),
        Value::Object(entries) => entries.values().find(matches),
        _ => None,
    }
}

const ADMIN: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 15020);
const STOP_DEADLINE: Duration = Duration::from_secs(30);
