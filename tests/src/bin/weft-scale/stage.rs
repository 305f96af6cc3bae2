//! Where everything runs: one network namespace, with the API server and the simulated agents as threads of this process,
//! and the controller and one real agent as they are shipped. Without the real one nothing of it needs root, or a namespace.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tempfile::TempDir;
use tokio::runtime::{Builder, Runtime};
use weft_apiserver::tokens::Token;
use weft_apiserver::{Options, Server, Store, Tls};
use weft_proto::CONTROLLER_NAME;
use weft_tests::cluster::{Node, binary};
use weft_tests::command::{Process, Program, tail};
use weft_tests::{Cluster, ClusterOptions, http, wait_for};

use crate::expected::real_node;
use crate::world::{SYSTEM, World};

/// All that runs.
pub(crate) struct Stage {
    // Fields are dropped in this order: who asks before who is asked.
    agent: Option<Process>,
    controller: Option<Process>,
    server: Server,
    /// The same for everybody, in plaintext.
    plain: Server,
    /// Runs the API server,
    _serving: Runtime,
    /// and the simulated agents.
    pub(crate) simulating: Runtime,
    cluster: Option<Cluster>,
    dir: TempDir,
}

impl Stage {
    /// Starts the API server.
    pub(crate) fn build(store: &Arc<Store>, with_agent: bool) -> Result<Stage> {
        let options = ClusterOptions {
            nodes: 1,
            mesh: false,
            ..ClusterOptions::default()
        };
        let cluster = match with_agent {
            true => Some(Cluster::with(options)?),
            false => None,
        };
        let runtime = |name: &str| -> Result<Runtime> {
            // Its thread belongs where it is made.
            let build = || {
                Builder::new_multi_thread()
                    .worker_threads(1)
                    .thread_name(name)
                    .enable_all()
                    .build()
            };
            match &cluster {
                Some(cluster) => Ok(cluster.node(0).netns().run(build)??),
                None => Ok(build()?),
            }
        };
        let (serving, simulating) = (runtime(SERVING)?, runtime(SIMULATING)?);
        let start = |options: Options| -> Result<Server> {
            let started = serving.spawn(Server::start(store.clone(), ANY_PORT, options));
            serving.block_on(started)?
        };
        let server = start(Options {
            token: Some("token-of-the-controller".to_owned()),
            tls: Some(Tls::new(&["127.0.0.1"])?),
            ..Options::default()
        })?;
        let plain = start(Options::default())?;
        let dir = tempfile::tempdir()?;
        std::fs::write(dir.path().join(KUBECONFIG), server.kubeconfig())?;
        Ok(Stage {
            agent: None,
            controller: None,
            server,
            plain,
            _serving: serving,
            simulating,
            cluster,
            dir,
        })
    }

    /// Where the API server answers everybody.
    pub(crate) fn plain(&self) -> SocketAddr {
        self.plain.address()
    }

    /// Starts the controller; gives its process id.
    pub(crate) fn start_controller(&mut self) -> Result<u32> {
        let program = binary("weft-controller")?.display().to_string();
        let kubeconfig = self.dir.path().join(KUBECONFIG).display().to_string();
        let program = match &self.cluster {
            Some(cluster) => cluster.node(0).host_command(&program)?,
            None => Program::new(&program, None, None, self.dir.path())?,
        };
        let process = program
            .args(["run", "--source", "kubernetes", "--kubeconfig", &kubeconfig])
            .args(["--namespace", SYSTEM])
            .args(["--listen", &CONTROLLER.to_string()])
            .args(["--admin", &CONTROLLER_ADMIN.to_string()])
            .args([
                "--pod-range",
                "10.244.0.0/16",
                "--service-range",
                "10.96.0.0/16",
            ])
            .spawn()?;
        let pid = process.pid();
        self.controller = Some(process);
        Ok(pid)
    }

    /// Waits until agents can connect.
    pub(crate) fn wait_controller(&mut self, within: Duration) -> Result<()> {
        let netns = self.cluster.as_ref().map(|it| it.node(0).netns());
        wait_for("the controller to be ready", within, || {
            let process = self.controller.as_mut().context("it was not started")?;
            if !process.is_running() {
                let said = tail(&process.stderr(), 20) + &tail(&process.stdout(), 20);
                return Ok(Some(Err(anyhow::anyhow!("it ended: {said}"))));
            }
            let reply = match netns {
                Some(netns) => http::get(netns, CONTROLLER_ADMIN, "/ready")?,
                None => http::get_here(CONTROLLER_ADMIN, "/ready")?,
            };
            ensure!(reply.status == 200, "/ready says {}", reply.body);
            Ok(Some(Ok(())))
        })?
    }

    /// What agents believe the controller by; it writes that for them.
    pub(crate) fn roots(&self, store: &Store) -> Result<String> {
        wait_for("the roots for agents", Duration::from_secs(10), || {
            let map = store.object("ConfigMap", SYSTEM, "weft-identity-roots");
            let roots = map.and_then(|it| Some(it["data"]["ca.crt"].as_str()?.to_owned()));
            Ok(roots)
        })
    }

    /// Starts the real agent; gives its process id.
    pub(crate) fn start_agent(&mut self, world: &World, roots: &str) -> Result<u32> {
        let of = real_node(world)?;
        let (pod, uid) = of.agent();
        let node = self.node()?;
        let file = |name: &str, text: &str| -> Result<String> {
            let path: PathBuf = node.dir().join(name);
            std::fs::write(&path, text)?;
            Ok(path.display().to_string())
        };
        let roots = file("roots.pem", roots)?;
        let token = file("token", &Token::of_agent(&pod, &uid, &of.name).signed())?;
        let shown = |path: &std::path::Path| path.display().to_string();
        let process = Program::new(
            binary("weft-agent")?,
            Some(node.netns()),
            Some(node.agent_cgroup()),
            node.dir(),
        )?
        .args(["run", "--node", &of.name, "--instance", node.instance()])
        .args(["--controller", &format!("https://{CONTROLLER}")])
        .args(["--controller-name", CONTROLLER_NAME])
        .args(["--trust-bundle", &roots, "--join-token-file", &token])
        .args(["--cgroup", &shown(node.cgroup().path())])
        .args(["--kubelet-cgroup", &shown(node.kubelet_cgroup().path())])
        .args(["--admin", "127.0.0.1:15020"])
        .args(["--admin-socket", &shown(&node.admin_socket())])
        .spawn()?;
        let pid = process.pid();
        self.agent = Some(process);
        Ok(pid)
    }

    /// What the real agent has.
    pub(crate) fn agent_dump(&self) -> Result<Value> {
        self.node()?.config_dump()
    }

    fn node(&self) -> Result<&Node> {
        let cluster = self.cluster.as_ref().context("there is no node")?;
        Ok(cluster.node(0))
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        // Both would complain for as long as the rest takes.
        self.agent.take();
        self.controller.take();
        self.server.disconnect();
    }
}

/// Where agents find the controller.
pub(crate) const CONTROLLER: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 15010);
const CONTROLLER_ADMIN: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 15014);
const ANY_PORT: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);
const KUBECONFIG: &str = "kubeconfig";
/// The threads of the API server,
pub(crate) const SERVING: &str = "apiserver";
/// and of the simulated agents.
pub(crate) const SIMULATING: &str = "simulated";
