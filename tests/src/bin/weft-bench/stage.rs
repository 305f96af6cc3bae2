//! Two nodes, pods in the mesh, and their twins outside of it.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use weft_tests::cgroup;
use weft_tests::cluster::{Node, binary};
use weft_tests::command::{Process, Program};
use weft_tests::netns::Netns;
use weft_tests::{Cluster, ClusterOptions, Pod, PodSpec};

use crate::rows::{Protocol, Route};

/// Where the loads run.
pub(crate) struct Stage {
    // Programs and pods end before the cluster they live in.
    direct: Trio,
    mesh: Trio,
    pub(crate) cluster: Cluster,
}

/// A client on node 0, a server next to it and one on node 1.
struct Trio {
    near: Server,
    far: Server,
    client: Pod,
}

/// A pod with nginx, an echo server and a gRPC server.
struct Server {
    _nginx: Process,
    _echo: Process,
    _grpc: Process,
    pod: Pod,
}

/// A client and a server for it.
#[derive(Clone, Copy)]
pub(crate) struct Pair<'a> {
    pub(crate) client: &'a Pod,
    pub(crate) server: &'a Pod,
}

impl Stage {
    /// Builds all of it; applications that serve are running.
    pub(crate) fn set() -> Result<Stage> {
        let cluster = start_cluster()?;
        Ok(Stage {
            direct: Trio::start(&cluster, "direct", PodSpec::unmeshed)?,
            mesh: Trio::start(&cluster, "meshed", |spec| spec)?,
            cluster,
        })
    }

    /// The pods of a route, meshed or not.
    pub(crate) fn pair(&self, route: Route, meshed: bool) -> Pair<'_> {
        let trio = if meshed { &self.mesh } else { &self.direct };
        let server = match route {
            Route::Across => &trio.far,
            Route::SameNode => &trio.near,
        };
        Pair {
            client: &trio.client,
            server: &server.pod,
        }
    }

    /// The nodes whose agents a route goes by.
    pub(crate) fn nodes(&self, route: Route) -> &[Node] {
        match route {
            Route::Across => self.cluster.nodes(),
            Route::SameNode => &self.cluster.nodes()[..1],
        }
    }

    /// Somebody watches all pods, as far as the tool lets them, until this is dropped.
    pub(crate) fn tap(&self) -> Result<Process> {
        let weft = binary("weft")?.display().to_string();
        let socket = self.cluster.controller()?.admin_socket();
        let tap = self.cluster.nodes()[0].host_command(&weft)?;
        let tap = tap.args(["tap", "-A", "-o", "json", "--max-rps", "10000"]);
        let mut tap = tap
            .env("WEFT_CONTROLLER_SOCKET", socket.display().to_string())
            .spawn()?;
        tap.wait_for_line("watching", PATIENCE)?;
        Ok(tap)
    }

    /// The cgroup with every process of this stage.
    pub(crate) fn cgroup(&self) -> Result<PathBuf> {
        cgroup::run_root(self.cluster.name())
    }
}

impl Trio {
    fn start(cluster: &Cluster, name: &str, also: fn(PodSpec) -> PodSpec) -> Result<Trio> {
        let pod = |role: &str, node: usize| {
            let spec = also(PodSpec::new(&format!("{name}-{role}")).on(node));
            add_pods(cluster, [spec])?.pop().context("a pod")
        };
        Ok(Trio {
            client: pod("client", 0)?,
            near: Server::start(pod("near", 0)?)?,
            far: Server::start(pod("far", 1)?)?,
        })
    }
}

impl Server {
    fn start(pod: Pod) -> Result<Server> {
        Ok(Server {
            _nginx: start_nginx(&pod)?,
            _echo: start_echo(&pod)?,
            _grpc: start_grpc(&pod)?,
            pod,
        })
    }
}

/// Two nodes with ready agents.
pub(crate) fn start_cluster() -> Result<Cluster> {
    start_cluster_with(ClusterOptions::default())
}

/// The same with options.
pub(crate) fn start_cluster_with(options: ClusterOptions) -> Result<Cluster> {
    let cluster = Cluster::with(options)?;
    for node in cluster.nodes() {
        settle_network(node.netns())?;
    }
    Ok(cluster)
}

/// Adds pods and waits until the agents know them all.
pub(crate) fn add_pods(
    cluster: &Cluster,
    specs: impl IntoIterator<Item = PodSpec>,
) -> Result<Vec<Pod>> {
    let mut pods = Vec::new();
    for spec in specs {
        // What the rows without a protocol in their name measure is a mesh that looks at no bytes.
        let spec = spec.annotation("weft.dev/opaque-ports", OPAQUE_PORTS);
        let pod = cluster.build_pod(spec)?;
        // Before the agent opens its listeners: sockets inherit what holds at their making.
        settle_network(pod.netns())?;
        cluster.announce(&pod)?;
        pods.push(pod);
    }
    for pod in &pods {
        cluster
            .wait_enrolled(pod)
            .map_err(|error| error.context(cluster.logs(20)))?;
    }
    Ok(pods)
}

/// This program in a pod.
pub(crate) fn own_command(pod: &Pod, subcommand: &str) -> Result<Program> {
    let program = std::env::current_exe()?;
    let program = pod.command(&program.display().to_string())?;
    Ok(program.named(subcommand).arg(subcommand))
}

/// The server that answers each byte with a byte, in a pod.
pub(crate) fn start_echo(pod: &Pod) -> Result<Process> {
    let listen = format!("0.0.0.0:{ECHO_PORT}");
    let mut process = own_command(pod, "serve")?
        .args(["--listen", &listen])
        .spawn()?;
    process.wait_listening(ECHO_PORT)?;
    Ok(process)
}

/// The server of unary calls, in a pod: the tests' own.
fn start_grpc(pod: &Pod) -> Result<Process> {
    let port = exchange_port(Protocol::Grpc);
    let mut process = weft_tests::testapp::command(pod)?
        .args(["grpc", "serve", "--listen", &format!("0.0.0.0:{port}")])
        .spawn()?;
    process.wait_listening(port)?;
    Ok(process)
}

/// nginx with one worker, 32 bytes for an answer, and nothing else to do.
pub(crate) fn start_nginx(pod: &Pod) -> Result<Process> {
    let dir = pod.dir().join("bench-nginx");
    fs::create_dir_all(&dir)?;
    let config = dir.join("nginx.conf");
    fs::write(&config, NGINX.replace("DIR", &dir.display().to_string()))?;
    let mut process = pod
        .command("nginx")?
        .args(["-p", &dir.display().to_string()])
        .args(["-c", &config.display().to_string()])
        .args(["-e", &dir.join("error.log").display().to_string()])
        .spawn()?;
    process.wait_listening(HTTP_PORT)?;
    Ok(process)
}

/// The same congestion control and buffers everywhere: a machine's own namespace may have been
/// given others than a new namespace begins with. A namespace may choose only among those that the
/// machine allows everybody; Reno, which behaves the same on a link that loses nothing, is always
/// among them.
fn settle_network(netns: &Netns) -> Result<()> {
    let allowed = fs::read_to_string("/proc/sys/net/ipv4/tcp_allowed_congestion_control")?;
    let has_cubic = allowed.split_whitespace().any(|name| name == "cubic");
    let control = if has_cubic { "cubic" } else { "reno" };
    netns.sysctl("ipv4/tcp_congestion_control", control)?;
    netns.sysctl("ipv4/tcp_rmem", "4096 131072 6291456")?;
    netns.sysctl("ipv4/tcp_wmem", "4096 16384 4194304")
}

/// Where nginx listens for what is opaque to the mesh.
pub(crate) const HTTP_PORT: u16 = 8080;
/// Where servers listen whose protocol the mesh may find out.
pub(crate) const fn exchange_port(protocol: Protocol) -> u16 {
    match protocol {
        Protocol::Http1 => 8081,
        Protocol::Http2 => 8082,
        Protocol::Grpc => 8083,
    }
}

/// Where the echo server listens.
pub(crate) const ECHO_PORT: u16 = 9000;
/// Where iperf3 listens.
pub(crate) const IPERF_PORT: u16 = 5201;
/// [`HTTP_PORT`], [`ECHO_PORT`] and [`IPERF_PORT`].
const OPAQUE_PORTS: &str = "8080,9000,5201";
/// How much longer than its load a program may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(15);

const NGINX: &str = "\
daemon off;
user root;
master_process off;
pid DIR/nginx.pid;
worker_rlimit_nofile 16384;
events { worker_connections 8192; }
http {
  access_log off;
  client_body_temp_path DIR/body;
  proxy_temp_path DIR/proxy;
  fastcgi_temp_path DIR/fastcgi;
  uwsgi_temp_path DIR/uwsgi;
  scgi_temp_path DIR/scgi;
  default_type text/plain;
  keepalive_requests 1000000000;
  keepalive_timeout 1h;
  server {
    listen 0.0.0.0:8080 backlog=4096;
    listen 0.0.0.0:8081 backlog=4096;
    listen 0.0.0.0:8082 http2 backlog=4096;
    location / { return 200 \"0123456789abcdef0123456789abcdef\"; }
  }
}
";
