//! The controller: a namespace of its own on the underlay, and the shipped binary in it.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

use super::{CONTROLLER_HOST, POD_RANGES, SERVICE_RANGES, START_DEADLINE, kubelet};
use crate::cgroup::Cgroup;
use crate::command::{Process, Program};
use crate::http;
use crate::metrics::Metrics;
use crate::netns::Netns;
use crate::run::Run;
use crate::wait::wait_for;

mod deployed;
mod replica;

pub use replica::Replica;

/// The controller of a cluster.
#[derive(Debug)]
pub struct Controller {
    process: Mutex<Option<Process>>,
    /// The API server that it reads from, in place of the directory.
    api_server: Option<ApiServer>,
    log_files: Mutex<Vec<PathBuf>>,
    netns: Netns,
    cgroup: Cgroup,
    logs: PathBuf,
    ca_dir: PathBuf,
    admin_socket: PathBuf,
    args: Vec<String>,
    /// What it is a container of, if it is one.
    deployed: Option<deployed::InPod>,
}

impl Controller {
    pub(super) fn build(
        run: &Run,
        lan: &Netns,
        cgroup: Cgroup,
        source: &Path,
        kubernetes: bool,
        tokens: &[(String, String)],
        further_args: &[String],
    ) -> Result<Controller> {
        let netns = Netns::create(&format!("{}-ctl", run.name()))?;
        super::join_lan(&netns, lan, CONTROLLER_HOST, "ctl")?;
        let ca_dir = run.dir().join("ca");
        let text = |path: &Path| path.display().to_string();
        let mut args = vec!["run".to_owned()];
        let mut option = |name: &str, value: &str| args.extend([name.to_owned(), value.to_owned()]);
        let api_server = kubernetes.then(|| ApiServer::new(source, run.dir()));
        match &api_server {
            None => {
                let tokens_file = run.dir().join("join-tokens");
                let lines = tokens.iter();
                let lines: String = lines
                    .map(|(node, token)| format!("{node} {token}\n"))
                    .collect();
                write_private(&tokens_file, &lines)?;
                option("--source", &text(source));
                option("--ca", &text(&ca_dir));
                option("--join-tokens", &text(&tokens_file));
            }
            // The issuer is a Secret, and agents are known by tokens of their pods.
            Some(server) => {
                option("--source", "kubernetes");
                option("--kubeconfig", &text(&server.kubeconfig));
                option("--namespace", kubelet::NAMESPACE);
            }
        }
        option("--listen", &grpc_address().to_string());
        option("--admin", &ADMIN.to_string());
        let admin_socket = run.dir().join("controller.sock");
        option("--admin-socket", &text(&admin_socket));
        option("--trust-domain", TRUST_DOMAIN);
        POD_RANGES
            .iter()
            .for_each(|range| option("--pod-range", range));
        SERVICE_RANGES
            .iter()
            .for_each(|range| option("--service-range", range));
        args.extend_from_slice(further_args);
        let logs = run.dir().join("logs");
        Ok(Controller {
            process: Mutex::new(None),
            api_server,
            log_files: Mutex::default(),
            netns,
            cgroup,
            logs,
            ca_dir,
            admin_socket,
            args,
            deployed: None,
        })
    }

    /// The controller's Unix socket.
    pub fn admin_socket(&self) -> &Path {
        &self.admin_socket
    }

    /// Starts the binary and waits until agents can connect.
    pub fn start(&self) -> Result<()> {
        if self.api_server.as_ref().is_some_and(|it| !it.is_running()) {
            self.start_api_server()?;
        }
        self.spawn()?;
        self.wait_ready()
    }

    /// Starts the binary.
    pub fn spawn(&self) -> Result<()> {
        if self.deployed.is_some() {
            return self.spawn_container();
        }
        let program = super::binary("weft-controller")?;
        let process = Program::new(program, Some(&self.netns), Some(&self.cgroup), &self.logs)?
            .args(&self.args)
            .env(
                "WEFT_LOG",
                std::env::var("WEFT_TEST_LOG").unwrap_or("info".into()),
            )
            .spawn()?;
        lock(&self.log_files).extend(process.logs().map(Path::to_owned));
        *lock(&self.process) = Some(process);
        Ok(())
    }

    /// Waits until agents can connect.
    pub fn wait_ready(&self) -> Result<()> {
        wait_for("the controller to be ready", START_DEADLINE, || {
            let running = match &mut *lock(&self.process) {
                Some(process) => super::check_running(process),
                None => Err(anyhow::anyhow!("it was not started")),
            };
            if running.is_err() {
                return Ok(Some(running));
            }
            let reply = http::get(&self.netns, ADMIN, "/ready")?;
            anyhow::ensure!(
                reply.status == 200,
                "/ready says {} {}",
                reply.status,
                reply.body
            );
            Ok(Some(Ok(())))
        })?
    }

    /// Starts the API server of a cluster that has one, and waits until it serves.
    pub fn start_api_server(&self) -> Result<()> {
        let server = self.api_server.as_ref().context("there is no API server")?;
        let program = super::binary("weft-apiserver")?;
        let users = server.users.iter().map(|(name, file)| {
            let user = format!("{name}={}", file.display());
            ["--user".to_owned(), user]
        });
        let mut process = Program::new(program, Some(&self.netns), Some(&self.cgroup), &self.logs)?
            .args(users.flatten())
            .args(["--folder", &server.folder.display().to_string()])
            .args(["--kubeconfig", &server.kubeconfig.display().to_string()])
            .args(["--listen", API_SERVER])
            .args(["--plain", &kubelet::PLAIN.to_string()])
            .args(["--kept", &server.kept.display().to_string()])
            .spawn()?;
        lock(&self.log_files).extend(process.logs().map(Path::to_owned));
        process.wait_for_line("listening on", START_DEADLINE)?;
        *lock(&server.process) = Some(process);
        Ok(())
    }

    /// Ends the API server with SIGKILL.
    pub fn kill_api_server(&self) -> Result<()> {
        let server = self.api_server.as_ref().context("there is no API server")?;
        let process = lock(&server.process).take();
        process.context("the API server is not running")?.kill()
    }

    /// The kubeconfig of one of the users of the API server, who may do what roles among the manifests say.
    pub fn kubeconfig_of(&self, user: &str) -> Result<&Path> {
        let server = self.api_server.as_ref().context("there is no API server")?;
        let found = server.users.iter().find(|(name, _)| name == user);
        let (_, file) = found.with_context(|| format!("no user {user}"))?;
        Ok(file)
    }

    /// What the API server has at a path.
    pub fn ask_api_server(&self, path: &str) -> Result<Value> {
        let reply = http::get(&self.netns, kubelet::PLAIN, path)?;
        Ok(serde_json::from_str(&reply.ok()?)?)
    }

    /// What is wrong, as it tells.
    pub fn problems(&self) -> Result<String> {
        http::get(&self.netns, ADMIN, "/problems")?.ok()
    }

    /// Ends it with SIGTERM.
    pub fn stop(&self) -> Result<()> {
        let process = lock(&self.process).take();
        process
            .context("the controller is not running")?
            .stop(STOP_DEADLINE)
            .map(drop)
    }

    /// Ends it with SIGKILL.
    pub fn kill(&self) -> Result<()> {
        let process = lock(&self.process).take();
        process.context("the controller is not running")?.kill()
    }

    /// Its process id, if it runs.
    pub fn pid(&self) -> Option<u32> {
        lock(&self.process).as_ref().map(Process::pid)
    }

    /// Where the certificate authority's files are, unless it has them in a Secret.
    pub fn ca_dir(&self) -> &Path {
        &self.ca_dir
    }

    /// Scrapes its metrics.
    pub fn metrics(&self) -> Result<Metrics> {
        Metrics::parse(&http::get(&self.netns, ADMIN, "/metrics")?.ok()?)
    }

    /// All it logged, over all its starts.
    pub fn log(&self) -> String {
        self.log_files()
            .iter()
            .map(|file| fs::read_to_string(file).unwrap_or_default())
            .collect()
    }

    /// Where agents connect to.
    pub fn address(&self) -> SocketAddr {
        grpc_address()
    }

    /// Where it tells about itself, in its namespace.
    pub fn admin_address(&self) -> SocketAddr {
        ADMIN
    }

    /// The namespace it runs in.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    pub(super) fn log_files(&self) -> Vec<PathBuf> {
        lock(&self.log_files).clone()
    }
}

/// An API server over the manifests, in the controller's namespace.
#[derive(Debug)]
struct ApiServer {
    process: Mutex<Option<Process>>,
    folder: PathBuf,
    kubeconfig: PathBuf,
    /// What outlives it, beside the folder.
    kept: PathBuf,
    /// Users with their kubeconfigs.
    users: Vec<(String, PathBuf)>,
}

impl ApiServer {
    fn new(folder: &Path, dir: &Path) -> ApiServer {
        ApiServer {
            process: Mutex::new(None),
            folder: folder.to_owned(),
            kubeconfig: dir.join("kubeconfig"),
            kept: dir.join("kept-by-the-api-server.json"),
            users: USERS
                .map(|it| (it.to_owned(), dir.join(format!("{it}.kubeconfig"))))
                .to_vec(),
        }
    }

    fn is_running(&self) -> bool {
        lock(&self.process).is_some()
    }
}

/// What agents connect to.
pub(super) fn grpc_address() -> SocketAddr {
    (super::lan_v4(CONTROLLER_HOST), 15010).into()
}

/// Writes a file that only its owner can read.
pub(super) fn write_private(path: &Path, text: &str) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::write(path, text)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    Ok(())
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// People whom the API server knows.
const USERS: [&str; 4] = ["viewer", "forwarder", "labeller", "installer"];
/// The trust domain of all test clusters.
pub const TRUST_DOMAIN: &str = "cluster.local";
const ADMIN: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 15014);
const API_SERVER: &str = "127.0.0.1:6443";
const STOP_DEADLINE: Duration = Duration::from_secs(15);
