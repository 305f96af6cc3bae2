//! The command line: the one place where flags and environment variables are read.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use ipnet::IpNet;
use weft_core::{AccessPolicy, Name, ObjectName, TrustDomain};

use crate::index;

/// Weft's controller: tells agents what describes the cluster, and signs their certificates.
#[derive(Debug, Parser)]
#[command(name = "weft-controller", version, propagate_version = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What the program does.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve agents.
    Run(Box<Run>),
    /// Write the custom resource definitions of the policy kinds.
    Crds(Crds),
}

/// Flags of `run`.
#[derive(Clone, Debug, Args)]
pub struct Run {
    /// What describes the cluster: a directory of manifests, read again whenever they change; or
    /// `kubernetes`, for a cluster's API server (a directory of that name is `./kubernetes`).
    #[arg(long, value_name = "DIR|kubernetes", env = "WEFT_SOURCE")]
    pub source: SourceChoice,
    /// With `--source kubernetes`: a kubeconfig that says where the API server is. If it is not given, that is the
    /// cluster that this runs in, or else what kubectl would use.
    #[arg(long, value_name = "FILE", env = "WEFT_KUBECONFIG")]
    pub kubeconfig: Option<PathBuf>,
    /// With `--source kubernetes`: the context in the kubeconfig, in place of its current one.
    #[arg(long, value_name = "NAME", env = "WEFT_KUBE_CONTEXT")]
    pub kube_context: Option<String>,
    /// With `--source kubernetes`: believe the annotation `weft.dev/netns` of pods. Only for clusters in which nobody
    /// may write pods who may not see all traffic: a pod could take another's for its own.
    #[arg(long, env = "WEFT_BELIEVE_NETNS_ANNOTATIONS")]
    pub believe_netns_annotations: bool,
    /// Directory of the certificate authority: ca.crt, issuer.crt, issuer.key. Made on first start. With
    /// `--source kubernetes` it may be left out: a Secret takes its place.
    #[arg(long, value_name = "DIR", env = "WEFT_CA")]
    pub ca: Option<PathBuf>,
    /// With `--source kubernetes`: this controller's namespace, which the Lease of the leader, the Secret of the issuer
    /// and the ConfigMap of roots are in. If it is not given, that of the service account of this pod, or of the context in the kubeconfig.
    #[arg(long, value_name = "NAMESPACE", env = "WEFT_NAMESPACE")]
    pub namespace: Option<Name>,
    /// With `--source kubernetes`: the Lease by which one of several controllers leads. That one writes statuses.
    #[arg(
        long,
        value_name = "NAME",
        env = "WEFT_LEASE",
        default_value = "weft-controller"
    )]
    pub lease: Name,
    /// Without `--ca`: the Secret of the issuer (type kubernetes.io/tls: tls.crt, tls.key, ca.crt).
    #[arg(
        long,
        value_name = "NAME",
        env = "WEFT_IDENTITY_SECRET",
        default_value = "weft-identity-issuer"
    )]
    pub identity_secret: Name,
    /// Without `--ca`: the ConfigMap to write the roots to, for agents to mount (ca.crt).
    #[arg(
        long,
        value_name = "NAME",
        env = "WEFT_IDENTITY_ROOTS",
        default_value = "weft-identity-roots"
    )]
    pub identity_roots: Name,
    /// Without `--ca`: do not make the Secret of the issuer if it is not there, but wait until somebody else, as
    /// cert-manager, has written it.
    #[arg(long, env = "WEFT_WAIT_FOR_ISSUER")]
    pub wait_for_issuer: bool,
    /// With `--source kubernetes`: not ready any more when nothing was heard of objects for this long, as in 5m; at least
    /// 10s. The API server says something of each kind every minute or two, whether it changes or not.
    #[arg(
        long,
        value_name = "TIME",
        env = "WEFT_SILENT_AFTER",
        default_value = "5m",
        value_parser = lifetime
    )]
    pub silent_after: Duration,
    /// How agents prove which node they are on: by join tokens, or by tokens of their service account that the API
    /// server reviews. If it is not given: as the source is, by join tokens with a directory.
    #[arg(long, value_name = "WAY", env = "WEFT_AGENT_AUTH")]
    pub agent_auth: Option<AgentAuth>,
    /// With join tokens: a file of lines `node-name token`; read again whenever it changes.
    #[arg(long, value_name = "FILE", env = "WEFT_JOIN_TOKENS")]
    pub join_tokens: Option<PathBuf>,
    /// With tokens of service accounts: the audience that they must be for.
    #[arg(
        long,
        value_name = "AUDIENCE",
        env = "WEFT_TOKEN_AUDIENCE",
        default_value = "weft-controller"
    )]
    pub token_audience: String,
    /// With tokens of service accounts: that of the agents.
    #[arg(
        long,
        value_name = "NAMESPACE/NAME",
        env = "WEFT_AGENT_SERVICE_ACCOUNT",
        default_value = "weft-system/weft-agent"
    )]
    pub agent_service_account: ObjectName,
    /// Where agents connect to (gRPC over TLS 1.3).
    #[arg(long, value_name = "ADDR:PORT", env = "WEFT_LISTEN")]
    pub listen: SocketAddr,
    /// Where /live, /ready, /metrics and /problems are served (HTTP).
    #[arg(long, value_name = "ADDR:PORT", env = "WEFT_ADMIN")]
    pub admin: SocketAddr,
    /// A Unix socket that only root can open, for the command `weft`: what the administrative port has, and what agents
    /// say of themselves. If it is not given, there is none.
    #[arg(long, value_name = "PATH", env = "WEFT_ADMIN_SOCKET")]
    pub admin_socket: Option<PathBuf>,
    /// With `--source kubernetes`: a loopback address where the command `weft`, by a port-forward, asks for the same as at
    /// the Unix socket; each request must show a token that the API server reviews, and whose owner may `get
    /// inspections.policy.weft.dev`. If it is not given, there is none.
    #[arg(long, value_name = "ADDR:PORT", env = "WEFT_INSPECT")]
    pub inspect: Option<SocketAddr>,
    /// Where objects are looked at before they are stored (HTTPS, `POST /validate`), for a
    /// ValidatingWebhookConfiguration. If it is not given, nowhere.
    #[arg(long, value_name = "ADDR:PORT", env = "WEFT_WEBHOOK")]
    pub webhook: Option<SocketAddr>,
    /// The name in the certificate of the webhook: that of the Service that API servers call it by, with its
    /// namespace and `svc`.
    #[arg(
        long,
        value_name = "NAME",
        env = "WEFT_WEBHOOK_NAME",
        default_value = "weft-webhook.weft-system.svc"
    )]
    pub webhook_name: String,
    /// The ValidatingWebhookConfiguration that tells API servers of the webhook. The controller that leads keeps in it, as
    /// `caBundle`, the roots that they know the webhook by.
    #[arg(
        long,
        value_name = "NAME",
        env = "WEFT_WEBHOOK_CONFIGURATION",
        default_value = "weft-webhook"
    )]
    pub webhook_configuration: String,
    /// The name in the certificate that agents see.
    #[arg(
        long,
        value_name = "NAME",
        env = "WEFT_CONTROLLER_NAME",
        default_value = weft_proto::CONTROLLER_NAME
    )]
    pub controller_name: Name,
    /// The trust domain of the identities made here.
    #[arg(
        long,
        value_name = "DOMAIN",
        env = "WEFT_TRUST_DOMAIN",
        default_value = index::TRUST_DOMAIN
    )]
    pub trust_domain: TrustDomain,
    /// A range that pods get addresses from (repeatable); `spec.podCIDRs` of Nodes are added. To be given where a CNI
    /// hands out addresses by itself, as Calico, Cilium and those of clouds do.
    #[arg(
        long,
        value_name = "CIDR",
        env = "WEFT_POD_RANGES",
        value_delimiter = ','
    )]
    pub pod_range: Vec<IpNet>,
    /// A range that Services get virtual addresses from (repeatable); `spec.cidrs` of ServiceCIDRs are added.
    #[arg(
        long,
        value_name = "CIDR",
        env = "WEFT_SERVICE_RANGES",
        value_delimiter = ','
    )]
    pub service_range: Vec<IpNet>,
    /// What holds for a port that no Server selects, unless the pod or its namespace says
    /// otherwise: all-unauthenticated, all-authenticated, cluster-unauthenticated,
    /// cluster-authenticated, deny or audit.
    #[arg(
        long,
        value_name = "POLICY",
        env = "WEFT_DEFAULT_POLICY",
        default_value = "all-unauthenticated"
    )]
    pub default_policy: AccessPolicy,
    /// Life of the certificates signed here, as in 24h, 90m or 300s; at least 10s.
    #[arg(
        long,
        value_name = "TIME",
        env = "WEFT_LEAF_LIFETIME",
        default_value = "24h",
        value_parser = lifetime
    )]
    pub leaf_lifetime: Duration,
    /// Use tunnels between pods of one node too, instead of handing flows over in the process.
    #[arg(long, env = "WEFT_FORCE_TUNNELS")]
    pub force_tunnels: bool,
    /// The namespace whose EgressNetworks hold for the pods of all namespaces that have none of their own.
    #[arg(
        long,
        value_name = "NAMESPACE",
        env = "WEFT_EGRESS_NAMESPACE",
        default_value = index::EGRESS_NAMESPACE
    )]
    pub egress_namespace: Name,
    /// Form of the log.
    #[arg(
        long,
        value_name = "FORMAT",
        env = "WEFT_LOG_FORMAT",
        default_value = "text"
    )]
    pub log_format: LogFormat,
    /// What is logged: error, warn, info, debug, trace, or a filter like weft_controller=debug.
    #[arg(
        long,
        value_name = "FILTER",
        env = "WEFT_LOG_LEVEL",
        default_value = "info"
    )]
    pub log_level: String,
}

/// What the tokens are for by which people ask at `--inspect`: they are of no use anywhere else.
pub const INSPECTION_AUDIENCE: &str = "weft-inspection";
/// The same for those by which people watch pods.
pub const TAP_AUDIENCE: &str = "weft-tap";

/// What describes the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceChoice {
    /// A directory of manifests.
    Directory(PathBuf),
    /// The API server of a cluster.
    Kubernetes,
}

impl FromStr for SourceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "" => Err("a directory or `kubernetes` is needed".to_owned()),
            "kubernetes" => Ok(Self::Kubernetes),
            path => Ok(Self::Directory(path.into())),
        }
    }
}

/// As it is written.
impl fmt::Display for SourceChoice {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Directory(path) => write!(formatter, "{}", path.display()),
            Self::Kubernetes => formatter.write_str("kubernetes"),
        }
    }
}

/// How agents prove which node they are on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum AgentAuth {
    /// By tokens in a file.
    JoinTokens,
    /// By tokens of their service account, which the API server reviews.
    Kubernetes,
}

impl Run {
    /// How agents prove which node they are on.
    pub fn agent_auth(&self) -> AgentAuth {
        let by_source = match self.source {
            SourceChoice::Directory(_) => AgentAuth::JoinTokens,
            SourceChoice::Kubernetes => AgentAuth::Kubernetes,
        };
        self.agent_auth.unwrap_or(by_source)
    }

    /// Refuses flags that do not go together: that say something about another source than the one that is read, or
    /// about another way to know agents.
    ///
    /// # Errors
    /// The first of them.
    pub fn check(&self) -> anyhow::Result<()> {
        let of_kubernetes = [
            ("--kubeconfig", self.kubeconfig.is_some()),
            ("--kube-context", self.kube_context.is_some()),
            (
                "--believe-netns-annotations",
                self.believe_netns_annotations,
            ),
            ("--namespace", self.namespace.is_some()),
            ("--inspect", self.inspect.is_some()),
            ("--wait-for-issuer", self.wait_for_issuer),
            (
                "--agent-auth kubernetes",
                self.agent_auth == Some(AgentAuth::Kubernetes),
            ),
        ];
        if self.source != SourceChoice::Kubernetes {
            for (flag, given) in of_kubernetes {
                anyhow::ensure!(
                    !given,
                    "{flag} is for --source kubernetes, and the source is the directory {}",
                    self.source
                );
            }
        }
        match (&self.source, &self.ca) {
            (SourceChoice::Directory(_), None) => {
                anyhow::bail!("--ca is needed: without an issuer nobody has an identity")
            }
            (_, Some(_)) => anyhow::ensure!(
                !self.wait_for_issuer,
                "--wait-for-issuer is for the issuer in a Secret, and --ca is given"
            ),
            _ => {}
        }
        match (self.agent_auth(), &self.join_tokens) {
            (AgentAuth::JoinTokens, None) => {
                anyhow::bail!("--join-tokens is needed: nobody could connect")
            }
            (AgentAuth::Kubernetes, Some(_)) => anyhow::bail!(
                "--join-tokens is for --agent-auth join-tokens: with --source kubernetes, agents \
                 are known by tokens of their service account unless it is said so"
            ),
            _ => {}
        }
        anyhow::ensure!(!self.token_audience.is_empty(), "--token-audience is empty");
        if let Some(address) = self.inspect {
            anyhow::ensure!(
                address.ip().to_canonical().is_loopback(),
                "--inspect {address} is no loopback address: tokens come there in plaintext, out of a port-forward"
            );
            anyhow::ensure!(
                self.token_audience != INSPECTION_AUDIENCE,
                "--token-audience {INSPECTION_AUDIENCE} is that of people's tokens: agents need another"
            );
        }
        Ok(())
    }
}

/// Flags of `crds`.
#[derive(Debug, Args)]
pub struct Crds {
    /// Directory to write to: one file per kind.
    #[arg(long, value_name = "DIR")]
    pub dir: PathBuf,
    /// Those of policy.linkerd.io and linkerd.io, for clusters where Linkerd is not, in place of Weft's own.
    #[arg(long)]
    pub of_linkerd: bool,
}

/// Form of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// For programs: one JSON object per line.
    Json,
}

const SHORTEST_LIFETIME: Duration = Duration::from_secs(10);

fn lifetime(text: &str) -> Result<Duration, String> {
    let form = || format!("{text:?} is no time: a number with s, m, h or d is needed");
    let at = text.len() - text.chars().next_back().map_or(0, char::len_utf8);
    let (number, unit) = text.split_at(at);
    let factor = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 24 * 3600,
        _ => return Err(form()),
    };
    let number: u32 = number.parse().map_err(|_| form())?;
    let lifetime = Duration::from_secs(u64::from(number) * factor);
    if lifetime < SHORTEST_LIFETIME {
        return Err(format!("{text:?} is too short: 10s at least"));
    }
    Ok(lifetime)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn flags_that_do_not_go_together_are_refused() {
        const TOKENS: [&str; 2] = ["--join-tokens", "t"];
        for (further, refused) in [
            (&["--source", "kubernetes", "--kubeconfig", "a"][..], None),
            (
                &["--source", "kubernetes", "--believe-netns-annotations"],
                None,
            ),
            (
                &["--source", "kubernetes", "--agent-auth", "kubernetes"],
                None,
            ),
            (
                &["--source", "kubernetes", TOKENS[0], TOKENS[1]],
                Some("--join-tokens is for"),
            ),
            (
                &["--source", "kubernetes", "--agent-auth", "join-tokens"],
                Some("--join-tokens is needed"),
            ),
            (&["--source", "./kubernetes", TOKENS[0], TOKENS[1]], None),
            (
                &["--source", "./kubernetes"],
                Some("--join-tokens is needed"),
            ),
            (
                &["--source", "./kubernetes", "--kubeconfig", "a"],
                Some("--kubeconfig is for"),
            ),
            (
                &["--source", "a", "--believe-netns-annotations"],
                Some("--believe-netns-annotations is for"),
            ),
            (
                &["--source", "a", "--kube-context", "b"],
                Some("--kube-context is for"),
            ),
            (
                &["--source", "a", "--agent-auth", "kubernetes"],
                Some("--agent-auth kubernetes is for"),
            ),
            (
                &["--source", "a", "--namespace", "b"],
                Some("--namespace is for"),
            ),
            (
                &["--source", "kubernetes", "--wait-for-issuer"],
                Some("--wait-for-issuer is for the issuer in a Secret"),
            ),
            (
                &["--source", "a", "--inspect", "127.0.0.1:3"],
                Some("--inspect is for --source kubernetes"),
            ),
            (
                &["--source", "kubernetes", "--inspect", "127.0.0.1:3"],
                None,
            ),
            (&["--source", "kubernetes", "--inspect", "[::1]:3"], None),
            (
                &["--source", "kubernetes", "--inspect", "0.0.0.0:3"],
                Some("--inspect 0.0.0.0:3 is no loopback address"),
            ),
            (
                &["--source", "kubernetes", "--inspect", "10.1.2.3:3"],
                Some("--inspect 10.1.2.3:3 is no loopback address"),
            ),
        ] {
            expect_check(["--ca", "ca"].iter().chain(further), refused);
        }
    }

    #[test]
    fn only_a_cluster_needs_no_folder_of_an_issuer() {
        for (further, refused) in [
            (&["--source", "kubernetes"][..], None),
            (&["--source", "kubernetes", "--wait-for-issuer"], None),
            (
                &["--source", "a", "--join-tokens", "t"],
                Some("--ca is needed"),
            ),
        ] {
            expect_check(further.iter(), refused);
        }
    }

    /// Checks flags that are refused with a text that begins like this, or not at all.
    fn expect_check<'a>(further: impl Iterator<Item = &'a &'a str>, refused: Option<&str>) {
        let mut arguments = vec!["weft-controller", "run"];
        arguments.extend(["--listen", "127.0.0.1:1", "--admin", "127.0.0.1:2"]);
        arguments.extend(further);
        let cli = Cli::try_parse_from(&arguments).expect("parsed");
        let Command::Run(run) = cli.command else {
            panic!("another command");
        };
        let fault = run.check().err().map(|it| it.to_string());
        match refused {
            None => assert_eq!(fault, None, "{arguments:?}"),
            Some(text) => assert!(
                fault.is_some_and(|it| it.starts_with(text)),
                "{arguments:?}"
            ),
        }
    }

    #[test]
    fn lifetimes_are_read() {
        for (text, expected) in [
            ("24h", Some(24 * 3600)),
            ("120s", Some(120)),
            ("2m", Some(120)),
            ("1d", Some(24 * 3600)),
            ("9s", None),
            ("24", None),
            ("h", None),
            ("", None),
            ("-1h", None),
            ("1ü", None),
        ] {
            let read = lifetime(text).ok().map(|it| it.as_secs());
            assert_eq!(read, expected, "{text:?}");
        }
    }
}
