//! The agent's configuration: flags and environment variables, read here and nowhere else.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};
use weft_core::Name;

/// The node agent of the Weft service mesh.
#[derive(Debug, Parser)]
#[command(name = "weft-agent", version, about)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What the agent can be asked to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve this node until SIGTERM or SIGINT, then drain.
    Run(Box<Config>),
    /// Detach and remove the kernel programs and maps of an instance. Pods of the node are
    /// connected directly from then on, so do this when the node leaves the mesh only.
    Uninstall(UninstallConfig),
    /// Mount on the node what is not mounted there: the BPF file system and control groups of version 2. For a
    /// container with the node's process ids, before the one that runs the agent.
    Prepare(PrepareConfig),
    /// Ask the agent by its Unix socket, and print its answer; fails if that is not 200.
    Ask(AskConfig),
}

/// What to remove.
#[derive(Debug, Args)]
pub struct UninstallConfig {
    /// Whose programs, and where they are.
    #[command(flatten)]
    pub kernel: KernelConfig,

    /// Stay afterwards, until a signal: for a DaemonSet, whose containers must not end.
    #[arg(long)]
    pub stay: bool,
}

/// What to mount.
#[derive(Debug, Args)]
pub struct PrepareConfig {
    /// Where the BPF file system is to be.
    #[arg(long, env = "WEFT_BPFFS", default_value = "/sys/fs/bpf")]
    pub bpffs: PathBuf,
}

/// What to ask.
#[derive(Debug, Args)]
pub struct AskConfig {
    /// The socket of the agent; of several between commas, the first.
    #[arg(
        long,
        env = "WEFT_ADMIN_SOCKET",
        default_value = "/run/weft/agent.sock",
        value_delimiter = ','
    )]
    pub admin_socket: Vec<PathBuf>,

    /// Write this, in place of reading: a log filter, to /log_level.
    #[arg(long, value_name = "TEXT")]
    pub put: Option<String>,

    /// /live, /ready, /metrics, /config_dump or /log_level.
    pub path: String,
}

/// How to run.
#[derive(Debug, Args)]
pub struct Config {
    /// Name of this node, as in the manifests.
    #[arg(long, env = "WEFT_NODE")]
    pub node: Name,

    /// Where the kernel programs go.
    #[command(flatten)]
    pub kernel: KernelConfig,

    /// How to reach and trust the controller.
    #[command(flatten)]
    pub controller: ControllerConfig,

    /// The host's `/proc`, in which the processes of pods are looked for. In a container it is that if the pod has
    /// `hostPID`.
    #[arg(long, env = "WEFT_PROC", default_value = "/proc")]
    pub proc: PathBuf,

    /// Whether the TCP connections that a pod has when it joins the mesh are ended, once, so that they come back through
    /// it. Else they stay in the clear until they end.
    #[arg(long, env = "WEFT_END_CONNECTIONS_ON_OPT_IN", default_value_t = true, action = ArgAction::Set)]
    pub end_connections_on_opt_in: bool,

    /// Address and port of `/metrics`, `/live` and `/ready`. Pods can reach it if they can reach
    /// the address: it tells no secret and changes nothing.
    #[arg(long, env = "WEFT_ADMIN", default_value = "127.0.0.1:9990")]
    pub admin: SocketAddr,

    /// Unix socket of dumps and the log level (repeatable); only root can open it. Where two agents are given the same
    /// one, it is that of the agent that was started last.
    #[arg(
        long,
        env = "WEFT_ADMIN_SOCKET",
        default_value = "/run/weft/agent.sock",
        value_delimiter = ','
    )]
    pub admin_socket: Vec<PathBuf>,

    /// Unix socket on which the CNI plugin says which pods are about to start; only root can open it. Without it nobody
    /// listens, and pods are enrolled as they appear.
    #[arg(long, env = "WEFT_CNI_SOCKET")]
    pub cni_socket: Option<PathBuf>,

    /// File that the CNI plugin reads while there is no agent: the namespaces that may hold meshed pods. Written only
    /// where there is a `--cni-socket`; it is to outlive restarts of the node.
    #[arg(long, env = "WEFT_CNI_NAMESPACES", default_value = weft_cni::call::LISTED)]
    pub cni_namespaces: PathBuf,

    /// How long flows may go on after SIGTERM, or after their pod left the mesh; then they are
    /// reset.
    #[arg(long, env = "WEFT_DRAIN_DEADLINE", default_value = "10s", value_parser = duration)]
    pub drain_deadline: Duration,

    /// How long a client may say nothing before its server is connected to, where that waits for it, and
    /// how long an application's first line may be on its way before it is passed on as it is.
    #[arg(long, env = "WEFT_DETECT_TIMEOUT", default_value = "10s", value_parser = duration)]
    pub detect_timeout: Duration,

    /// How long a client's connection of HTTP may be without a request before it is closed in order; 0s: it
    /// never is.
    #[arg(long, env = "WEFT_HTTP_IDLE_TIMEOUT", default_value = "1h", value_parser = duration)]
    pub http_idle_timeout: Duration,

    /// How much pods and peers may have at once.
    #[command(flatten)]
    pub limits: LimitsConfig,

    /// How flows go to and come from other nodes' agents of the mesh. With `weft-h2` this agent neither
    /// asks for `weft/1` nor accepts it; agents that differ find what both speak.
    #[arg(long, env = "WEFT_TUNNEL", value_enum, default_value_t = TunnelProtocol::Weft)]
    pub tunnel: TunnelProtocol,

    /// How log lines are written.
    #[arg(long, env = "WEFT_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,

    /// What is logged, as a tracing filter: `info`, `weft_agent=debug,access=off`, ...
    #[arg(long, env = "WEFT_LOG", default_value = "info")]
    pub log_level: String,
}

/// Where the kernel programs go.
#[derive(Debug, Args)]
pub struct KernelConfig {
    /// Tells apart agents on one kernel: each instance has its own pinned programs and maps.
    #[arg(long, env = "WEFT_INSTANCE", default_value = "default")]
    pub instance: Name,

    /// The cgroup (version 2) whose processes are intercepted: that of all pods. Found, on a node of Kubernetes, if not
    /// given.
    #[arg(long, env = "WEFT_CGROUP")]
    pub cgroup: Option<PathBuf>,

    /// The kubelet's cgroup (version 2): its connections to probe ports pass. Found by its process if not given; without
    /// it, probes are treated as anybody's connections.
    #[arg(long, env = "WEFT_KUBELET_CGROUP")]
    pub kubelet_cgroup: Option<PathBuf>,

    /// A mounted BPF file system; found from the mount table, or mounted, if not given.
    #[arg(long, env = "WEFT_BPFFS")]
    pub bpffs: Option<PathBuf>,

    /// Connections of the whole node that may be on their way to a listener at once.
    #[arg(long, env = "WEFT_MAX_PENDING", default_value_t = 131_072)]
    pub max_pending: u32,

    /// The same, of one pod; more are refused.
    #[arg(long, env = "WEFT_PENDING_QUOTA", default_value_t = 4096)]
    pub pending_quota: u32,

    /// Let the kernel programs write debugging messages to the log.
    #[arg(long, env = "WEFT_BPF_LOG")]
    pub bpf_log: bool,
}

/// How to reach and trust the controller.
#[derive(Debug, Args)]
pub struct ControllerConfig {
    /// Where a controller is: `https://HOST:PORT` (repeatable). All addresses that a name has are used: with that of a
    /// headless Service, all controllers.
    #[arg(
        long = "controller",
        value_name = "URL",
        env = "WEFT_CONTROLLER",
        value_delimiter = ',',
        required = true
    )]
    pub addresses: Vec<http::Uri>,

    /// The name that controllers' certificates must have.
    #[arg(long = "controller-name", env = "WEFT_CONTROLLER_NAME", default_value = weft_proto::CONTROLLER_NAME)]
    pub name: String,

    /// PEM file of the roots that vouch for the controller; read at every connect.
    #[arg(long, env = "WEFT_TRUST_BUNDLE")]
    pub trust_bundle: PathBuf,

    /// File with this node's join token, or in a cluster the projected token of the agent's service account; read at
    /// every connect.
    #[arg(long, env = "WEFT_JOIN_TOKEN_FILE")]
    pub join_token_file: PathBuf,
}

/// How much pods and peers may have at once; what is not given comes from the limit of descriptors,
/// the memory and the CPUs, and is in the log at the start.
#[derive(Clone, Debug, Args)]
pub struct LimitsConfig {
    /// Bytes of memory that this agent may use, if that is less than the machine has and than its control group says: a
    /// container does not see the limit of its own.
    #[arg(long, env = "WEFT_MEMORY_LIMIT", value_parser = clap::value_parser!(u64).range(1..))]
    pub memory_limit: Option<u64>,

    /// Most flows that one pod may have open in each direction; more are refused. Of those that
    /// arrive, half may come in plaintext. By default two fifths of the descriptors, so that one pod's
    /// flows leave some to others even if each takes two, and at most one for each 64 KiB of a quarter of the memory.
    #[arg(long, env = "WEFT_MAX_FLOWS_PER_POD")]
    pub max_flows_per_pod: Option<usize>,

    /// Most HTTP requests that one pod may have open in each direction; more are answered with 503. Of
    /// those that arrive, one identity may have as many as are left for all others, and so may all that
    /// come in plaintext. By default one for each 64 KiB of a quarter of the memory, at least 1024.
    #[arg(long, env = "WEFT_MAX_EXCHANGES_PER_POD")]
    pub max_exchanges_per_pod: Option<usize>,

    /// Most MiB that one pod's flows should keep in the agent because a receiver has no room. From half of
    /// it on each flow reads in small steps; one in HTTP/2 that cannot is reset, and beyond it new HTTP requests
    /// are answered with 503. By default a sixteenth of the memory, from 32 to 1024.
    #[arg(long, env = "WEFT_MAX_BUFFERED_MIB_PER_POD")]
    pub max_buffered_mib_per_pod: Option<usize>,

    /// Most unfinished handshakes with those who connect to one pod, a quarter of them with addresses
    /// of no workload; more are refused. By default half of the node's, at most 1024.
    #[arg(long, env = "WEFT_MAX_HANDSHAKES_PER_POD")]
    pub max_handshakes_per_pod: Option<usize>,

    /// The same from one workload's address, to whichever pods of the node, and a tenth as many from an
    /// address of no workload. By default a quarter of the node's, at most 320.
    #[arg(long, env = "WEFT_MAX_HANDSHAKES_PER_PEER")]
    pub max_handshakes_per_peer: Option<usize>,

    /// The same, of the whole node. By default an eighth of the descriptors, from 64 to 8192.
    #[arg(long, env = "WEFT_MAX_HANDSHAKES")]
    pub max_handshakes: Option<usize>,

    /// Tunnels that one pod may be making at a time, a sixteenth of them to one address; others wait
    /// for up to 5 s, then are refused. [default: 64]
    #[arg(long, env = "WEFT_MAX_DIALS_PER_POD")]
    pub max_dials_per_pod: Option<usize>,

    /// How long requests and connections wait for an endpoint of their service port, counted from the first that
    /// found none; then all fail, and new ones fail at once until one is ready. With 0s nobody waits.
    #[arg(long, env = "WEFT_FAIL_FAST_AFTER", default_value = "3s", value_parser = duration)]
    pub fail_fast_after: Duration,

    /// Requests and connections that may wait so at one service port; more fail at once.
    #[arg(long, env = "WEFT_MAX_WAITING_PER_PORT", default_value_t = 10_000)]
    pub max_waiting_per_port: usize,

    /// The same, of one pod at all ports.
    #[arg(long, env = "WEFT_MAX_WAITING_PER_POD", default_value_t = 2048)]
    pub max_waiting_per_pod: usize,
}

/// What an agent speaks with other agents of the mesh.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TunnelProtocol {
    /// `weft/1`: a connection for each flow while it lasts, kept for the next one. `weft-h2/1` with
    /// agents that do not speak it, and for the flows of a pair of workloads that has very many.
    Weft,
    /// `weft-h2/1` only: many flows share an HTTP/2 connection.
    WeftH2,
}

/// The form of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Reads `10s`, `500ms`, `2m`, `1h`.
fn duration(text: &str) -> Result<Duration, String> {
    let digits = text
        .find(|it: char| !it.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: u64 = number
        .parse()
        .map_err(|_| format!("{text:?} is no duration: write 10s, 500ms, 2m or 1h"))?;
    match unit {
        "ms" => Ok(Duration::from_millis(number)),
        "s" => Ok(Duration::from_secs(number)),
        "m" => Ok(Duration::from_secs(number.saturating_mul(60))),
        "h" => Ok(Duration::from_secs(number.saturating_mul(3600))),
        _ => Err(format!("{text:?} needs a unit: ms, s, m or h")),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    /// What the documentation says of waiting for an endpoint.
    #[test]
    fn defaults_of_waiting() {
        #[derive(Parser)]
        struct Only {
            #[command(flatten)]
            limits: LimitsConfig,
        }
        let limits = |args: &[&str]| {
            let args = [&["agent"], args].concat();
            Only::try_parse_from(args).map(|it| it.limits)
        };
        let of = |it: LimitsConfig| {
            let most = (it.max_waiting_per_port, it.max_waiting_per_pod);
            (it.fail_fast_after, most)
        };
        let by_default = limits(&[]).map(of);
        let expected = (Duration::from_secs(3), (10_000, 2048));
        assert_eq!(by_default.ok(), Some(expected));
        let given = limits(&["--fail-fast-after", "0s", "--max-waiting-per-pod", "4"]);
        let expected = (Duration::ZERO, (10_000, 4));
        assert_eq!(given.map(of).ok(), Some(expected));
        assert!(limits(&["--fail-fast-after", "3"]).is_err());
    }

    #[test]
    fn durations() {
        assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(duration("10s"), Ok(Duration::from_secs(10)));
        assert_eq!(duration("2m"), Ok(Duration::from_secs(120)));
        for bad in ["", "10", "s", "-1s", "1d", "1.5s"] {
            assert!(duration(bad).is_err(), "{bad:?} was accepted");
        }
    }
}
