//! One call of the plugin: what the runtime says by environment variables and on standard input (CNI specification 1.1,
//! "Parameters" and "Network configuration").

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::Read;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::failure::{Code, Failure};

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// A pod's network has been set up.
    Add,
    /// It is taken down.
    Del,
    /// Is it as it should be?
    Check,
    /// Whatever is not listed is gone.
    Gc,
    /// Can pods be added?
    Status,
    /// Which versions are spoken?
    Version,
}

/// A version of the specification.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct CniVersion(u8, u8, u8);

/// A call, checked.
#[derive(Debug)]
pub struct Call {
    /// What is to be done.
    pub command: Command,
    /// How.
    pub config: Config,
    /// The container, for all commands that are about one.
    pub container: String,
    /// Its network namespace, where it is still there.
    pub netns: Option<PathBuf>,
    /// The interface in it.
    pub interface: String,
    /// The pod, if the runtime is one of Kubernetes.
    pub pod: Option<PodName>,
}

/// A pod, as runtimes of Kubernetes name it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodName {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its UID. Runtimes say it since containerd 1.6 and CRI-O 1.22.
    pub uid: Option<String>,
}

/// What is configured for the plugin.
#[derive(Debug)]
pub struct Config {
    /// The version of what comes in and goes out.
    pub version: CniVersion,
    /// The name of the network.
    pub name: String,
    /// What the plugins before this one did.
    pub previous: Option<Box<RawValue>>,
    /// Containers that are still there, of a GC.
    pub valid: Vec<String>,
    /// What only this plugin is told.
    pub own: Settings,
}

/// What only this plugin is told: the field `weft` of its configuration, as the installer writes it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, serde::Serialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Settings {
    /// Where the agent listens.
    pub socket: PathBuf,
    /// Where the agent leaves its list of namespaces.
    pub listed: PathBuf,
    /// Namespaces whose pods never wait for the agent.
    pub exempt: Vec<String>,
    /// What becomes of the others while there is no agent, or while it has no controller.
    pub when_away: WhenAway,
    /// How many seconds a pod waits for the agent before the runtime is told to try again.
    pub wait_seconds: u64,
}

/// What becomes of pods while there is no agent.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, serde::Serialize, clap::ValueEnum,
)]
#[serde(rename_all = "kebab-case")]
pub enum WhenAway {
    /// Those of namespaces that may hold meshed pods wait; all others start.
    #[default]
    Listed,
    /// All wait.
    RefuseAll,
}

#[derive(Deserialize)]
struct Written {
    #[serde(rename = "cniVersion", default)]
    version: Option<String>,
    #[serde(default)]
    name: String,
    #[serde(rename = "prevResult", default)]
    previous: Option<Box<RawValue>>,
    #[serde(rename = "cni.dev/valid-attachments", default)]
    valid: Vec<Attachment>,
    #[serde(rename = "weft", default)]
    own: Settings,
}

#[derive(Deserialize)]
struct Attachment {
    #[serde(rename = "containerID")]
    container: String,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            socket: SOCKET.into(),
            listed: LISTED.into(),
            exempt: EXEMPT.map(str::to_owned).into(),
            when_away: WhenAway::default(),
            wait_seconds: WAIT_SECONDS,
        }
    }
}

impl Settings {
    /// How long a pod waits.
    pub fn wait(&self) -> Duration {
        Duration::from_secs(self.wait_seconds.clamp(1, MAX_WAIT_SECONDS))
    }
}

impl Command {
    /// Reads `CNI_COMMAND`.
    ///
    /// # Errors
    /// There is no such command.
    pub fn parse(text: &str) -> Result<Self, Failure> {
        match text {
            "ADD" => Ok(Self::Add),
            "DEL" => Ok(Self::Del),
            "CHECK" => Ok(Self::Check),
            "GC" => Ok(Self::Gc),
            "STATUS" => Ok(Self::Status),
            "VERSION" => Ok(Self::Version),
            other => {
                let message = format!("CNI_COMMAND: {:?} is no command", shortened(other));
                Err(Failure::new(Code::InvalidEnvironment, message))
            }
        }
    }

    /// Since which version there is such a command.
    fn since(self) -> CniVersion {
        match self {
            Self::Add | Self::Del | Self::Version => VERSIONS[0].1,
            Self::Check => CniVersion(0, 4, 0),
            Self::Gc | Self::Status => CniVersion(1, 1, 0),
        }
    }
}

impl CniVersion {
    /// As it is written.
    pub fn as_str(self) -> &'static str {
        let known = VERSIONS.iter().find(|it| it.1 == self);
        known.map_or(NEWEST, |it| it.0)
    }

    /// Reads one that is supported.
    ///
    /// # Errors
    /// It is not.
    pub fn parse(text: &str) -> Result<Self, Failure> {
        let known = VERSIONS.iter().find(|it| it.0 == text);
        known.map(|it| it.1).ok_or_else(|| {
            let supported: Vec<_> = VERSIONS.iter().map(|it| it.0).collect();
            let message = format!("cniVersion {:?} is not supported", shortened(text));
            let details = format!("supported: {}", supported.join(", "));
            Failure::new(Code::IncompatibleVersion, message).because(details)
        })
    }

    /// Whether addresses in results say which family they are of.
    pub fn names_families(self) -> bool {
        self < Self(1, 0, 0)
    }
}

impl Call {
    /// Checks what a runtime said.
    ///
    /// # Errors
    /// Something is missing, or cannot be read.
    pub fn read(
        command: Command,
        variable: impl Fn(&str) -> Option<OsString>,
        input: &[u8],
    ) -> Result<Self, Failure> {
        let config = Config::parse(input)?;
        if config.version < command.since() {
            let version = config.version.as_str();
            let message = format!("cniVersion {version} has no command {command:?}");
            return Err(Failure::new(Code::IncompatibleVersion, message));
        }
        let text = |name: &str| match variable(name) {
            None => Ok(String::new()),
            Some(value) => value.into_string().map_err(|_| {
                Failure::new(Code::InvalidEnvironment, format!("{name}: not in UTF-8"))
            }),
        };
        let call = Self {
            command,
            config,
            container: text("CNI_CONTAINERID")?,
            netns: variable("CNI_NETNS")
                .filter(|it| !it.is_empty())
                .map(PathBuf::from),
            interface: text("CNI_IFNAME")?,
            pod: pod(&text("CNI_ARGS")?)?,
        };
        call.check()?;
        Ok(call)
    }

    fn check(&self) -> Result<(), Failure> {
        let of_container = matches!(self.command, Command::Add | Command::Del | Command::Check);
        let needs_netns = matches!(self.command, Command::Add | Command::Check);
        for (is_missing, name) in [
            (of_container && self.container.is_empty(), "CNI_CONTAINERID"),
            (of_container && self.interface.is_empty(), "CNI_IFNAME"),
            (needs_netns && self.netns.is_none(), "CNI_NETNS"),
        ] {
            if is_missing {
                let message = format!("{name} is missing");
                return Err(Failure::new(Code::InvalidEnvironment, message));
            }
        }
        if !is_container(&self.container) {
            let shown = shortened(&self.container);
            let message = format!("CNI_CONTAINERID: {shown:?} is no container's ID");
            return Err(Failure::new(Code::InvalidEnvironment, message));
        }
        if self.command == Command::Add && self.config.previous.is_none() {
            let message = "no prevResult: weft-cni must come after another plugin in a list";
            return Err(Failure::new(Code::InvalidConfiguration, message)
                .because("install it by `weft-cni install`"));
        }
        Ok(())
    }
}

impl Config {
    /// Reads a configuration.
    ///
    /// # Errors
    /// It is no JSON, or of no version that is supported.
    pub fn parse(input: &[u8]) -> Result<Self, Failure> {
        let written: Written = serde_json::from_slice(input).map_err(|error| {
            let code = match error.classify() {
                serde_json::error::Category::Data => Code::InvalidConfiguration,
                _ => Code::Decoding,
            };
            Failure::new(code, "reading the network configuration").because(error.to_string())
        })?;
        // A list could be read as an object without its names.
        if !input.trim_ascii_start().starts_with(b"{") {
            let message = "the network configuration is no object";
            return Err(Failure::new(Code::InvalidConfiguration, message));
        }
        // Without a version it is that of 2016, which has no chains.
        let version = CniVersion::parse(written.version.as_deref().unwrap_or("0.1.0"))?;
        let is_null = |it: &RawValue| it.get() == "null";
        Ok(Self {
            version,
            name: written.name,
            previous: written.previous.filter(|it| !is_null(it)),
            valid: written.valid.into_iter().map(|it| it.container).collect(),
            own: written.own,
        })
    }

    /// The version to answer in, of whatever was given.
    pub fn version_of(input: &[u8]) -> String {
        #[derive(Deserialize)]
        struct Only {
            #[serde(rename = "cniVersion")]
            version: String,
        }
        let only: Option<Only> = serde_json::from_slice(input).ok();
        only.map_or_else(|| NEWEST.to_owned(), |it| shortened(&it.version))
    }
}

/// Reads standard input.
///
/// # Errors
/// It fails, or there is too much.
pub fn read_input(input: impl Read) -> Result<Vec<u8>, Failure> {
    let mut bytes = Vec::new();
    let read = input.take(MAX_INPUT_BYTES + 1).read_to_end(&mut bytes);
    read.map_err(|error| {
        Failure::new(Code::Io, "reading the network configuration").because(error.to_string())
    })?;
    if bytes.len() as u64 > MAX_INPUT_BYTES {
        let message = format!("the network configuration has more than {MAX_INPUT_BYTES} bytes");
        return Err(Failure::new(Code::InvalidConfiguration, message));
    }
    Ok(bytes)
}

/// The pod in `CNI_ARGS`: `NAME=value;...`. None: it is for no pod.
fn pod(args: &str) -> Result<Option<PodName>, Failure> {
    let mut named = BTreeMap::new();
    for pair in args.split(';').filter(|it| !it.is_empty()) {
        let Some((name, value)) = pair.split_once('=') else {
            let message = format!("CNI_ARGS: {:?} has no value", shortened(pair));
            return Err(Failure::new(Code::InvalidEnvironment, message));
        };
        named.insert(name, value);
    }
    let value = |name: &str| named.get(name).filter(|it| !it.is_empty()).copied();
    let (Some(namespace), Some(name)) = (value("K8S_POD_NAMESPACE"), value("K8S_POD_NAME")) else {
        return Ok(None);
    };
    let uid = value("K8S_POD_UID");
    for (key, value) in [
        ("NAMESPACE", Some(namespace)),
        ("NAME", Some(name)),
        ("UID", uid),
    ] {
        if value.is_some_and(|it| it.len() > MAX_NAME_BYTES) {
            let message = format!("CNI_ARGS: K8S_POD_{key} is too long");
            return Err(Failure::new(Code::InvalidEnvironment, message));
        }
    }
    Ok(Some(PodName {
        namespace: namespace.to_owned(),
        name: name.to_owned(),
        uid: uid.map(str::to_owned),
    }))
}

/// What the specification allows; or nothing, where no container is needed.
fn is_container(text: &str) -> bool {
    let is_first = |it: char| it.is_ascii_alphanumeric();
    let is_other = |it: char| it.is_ascii_alphanumeric() || matches!(it, '_' | '.' | '-');
    let mut letters = text.chars();
    text.len() <= MAX_NAME_BYTES && letters.next().is_none_or(is_first) && letters.all(is_other)
}

fn shortened(text: &str) -> String {
    text.chars().take(64).collect()
}

/// The versions that are supported: those in which plugins are chained by what the one before did.
pub const VERSIONS: [(&str, CniVersion); 5] = [
    ("0.3.0", CniVersion(0, 3, 0)),
    ("0.3.1", CniVersion(0, 3, 1)),
    ("0.4.0", CniVersion(0, 4, 0)),
    ("1.0.0", CniVersion(1, 0, 0)),
    (NEWEST, CniVersion(1, 1, 0)),
];
/// The newest of them.
pub const NEWEST: &str = "1.1.0";

/// Where the agent listens, and
pub const SOCKET: &str = "/run/weft/cni.sock";
/// where it leaves its list, unless something else is said.
pub const LISTED: &str = "/var/lib/weft/cni/namespaces.json";
/// What must start for there to be an agent that knows something: the cluster's own parts, and the mesh's.
pub const EXEMPT: [&str; 2] = ["kube-system", "weft-system"];
const WAIT_SECONDS: u64 = 10;
/// Runtimes have patience for two minutes.
const MAX_WAIT_SECONDS: u64 = 60;

/// What the plugins before said may be long where there are many interfaces; this is far more.
const MAX_INPUT_BYTES: u64 = 1024 * 1024;
const MAX_NAME_BYTES: usize = 253;

#[cfg(test)]
#[path = "call_tests.rs"]
mod tests;
