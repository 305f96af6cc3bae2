//! A container runtime's side of CNI: plugins run as libcni runs them, by environment variables and JSON, in the
//! network namespace of their node, one after the other as the node's configuration lists them.
//!
//! What counts is read anew for each pod, as runtimes do that watch their folder: the first file by name.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::cluster::{Node, pod_v4, pod_v6};
use crate::command::Process;
use crate::pod::Pod;

/// The runtime of a node.
#[derive(Debug)]
pub struct Runtime<'a> {
    node: &'a Node,
    dir: PathBuf,
}

/// What a plugin said instead of a result.
#[derive(Clone, Debug)]
pub struct Refused {
    /// Which one.
    pub plugin: String,
    /// The specification's code.
    pub code: u64,
    /// What failed.
    pub message: String,
    /// Why.
    pub details: String,
}

impl fmt::Display for Refused {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Refused {
            plugin,
            code,
            message,
            details,
        } = self;
        write!(formatter, "{plugin}: code {code}: {message}: {details}")
    }
}

impl std::error::Error for Refused {}

/// A sandbox of a pod.
#[derive(Debug)]
pub struct Sandbox {
    number: u32,
    /// How often it was begun anew: each time it has another ID, as of a kubelet.
    attempts: AtomicU32,
    pod: String,
    netns: PathBuf,
}

impl Sandbox {
    /// One of a pod; each has another ID.
    pub fn new(pod: &Pod, number: u32) -> Sandbox {
        let (namespace, name, uid) = (pod.namespace(), pod.name(), pod.uid());
        Sandbox {
            number,
            attempts: AtomicU32::new(0),
            pod: format!("K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={name};K8S_POD_UID={uid}"),
            netns: pod.netns().path(),
        }
    }

    /// Its ID.
    pub fn id(&self) -> String {
        let attempt = self.attempts.load(Ordering::Relaxed);
        format!("{:032x}{attempt:032x}", self.number)
    }

    fn args(&self) -> String {
        let (id, pod) = (self.id(), &self.pod);
        format!("IgnoreUnknown=1;{pod};K8S_POD_INFRA_CONTAINER_ID={id}")
    }
}

impl<'a> Runtime<'a> {
    /// With a configuration of a bridge, as a primary CNI writes it.
    pub fn new(node: &'a Node, cni_version: &str) -> Result<Runtime<'a>> {
        let runtime = Runtime {
            node,
            dir: node.dir().join("cni"),
        };
        for folder in [runtime.conf_dir(), runtime.bin_dir()] {
            std::fs::create_dir_all(folder)?;
        }
        for plugin in ["bridge", "host-local", "tuning"] {
            let place = runtime.bin_dir().join(plugin);
            std::os::unix::fs::symlink(Path::new("/usr/lib/cni").join(plugin), place)?;
        }
        runtime.write("10-bridge.conflist", &runtime.bridge(cni_version))?;
        Ok(runtime)
    }

    /// The node.
    pub fn node(&self) -> &'a Node {
        self.node
    }

    /// Where configurations are.
    pub fn conf_dir(&self) -> PathBuf {
        self.dir.join("net.d")
    }

    /// Where plugins are.
    pub fn bin_dir(&self) -> PathBuf {
        self.dir.join("bin")
    }

    /// The list of a primary CNI: a bridge, and another plugin.
    pub fn bridge(&self, cni_version: &str) -> Value {
        let index = self.node.index();
        let (v4, v6) = (pod_v4(index, 0), pod_v6(index, 0));
        let range = |subnet: String, from: IpAddr, to: IpAddr, gateway: IpAddr| json!([{"subnet": subnet, "rangeStart": from, "rangeEnd": to, "gateway": gateway}]);
        let ranges = [
            range(
                format!("{v4}/24"),
                pod_v4(index, 200).into(),
                pod_v4(index, 250).into(),
                pod_v4(index, 1).into(),
            ),
            range(
                format!("{v6}/64"),
                pod_v6(index, 200).into(),
                pod_v6(index, 250).into(),
                pod_v6(index, 1).into(),
            ),
        ];
        json!({"cniVersion": cni_version, "name": "pods", "plugins": [
            {"type": "bridge", "bridge": "br0", "ipam": {"type": "host-local", "ranges": ranges,
                "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}], "dataDir": self.dir.join("addresses")}},
            {"type": "tuning"},
        ]})
    }

    /// Writes a configuration, in one step.
    pub fn write(&self, name: &str, configuration: &Value) -> Result<()> {
        let temporary = self.dir.join("written");
        std::fs::write(&temporary, serde_json::to_string_pretty(configuration)?)?;
        std::fs::rename(temporary, self.conf_dir().join(name))?;
        Ok(())
    }

    /// The list that counts.
    pub fn list(&self) -> Result<Value> {
        let mut files: Vec<PathBuf> = std::fs::read_dir(self.conf_dir())?
            .map(|it| Ok(it?.path()))
            .collect::<Result<_>>()?;
        files.retain(|it| it.extension().is_some_and(|it| it == "conflist"));
        files.sort();
        let first = files.first().context("no configuration")?;
        let text = std::fs::read_to_string(first)?;
        serde_json::from_str(&text).with_context(|| format!("{}: {text}", first.display()))
    }

    /// The types of the plugins that count.
    pub fn plugins(&self) -> Result<Vec<String>> {
        let list = self.list()?;
        let plugins = list["plugins"].as_array().context("plugins")?;
        let types = plugins
            .iter()
            .map(|it| it["type"].as_str().map(str::to_owned));
        types.map(|it| it.context("a type")).collect()
    }

    /// Sets up a sandbox; gives what the last plugin printed. Where one fails, all are undone, as runtimes do.
    pub fn add(&self, sandbox: &Sandbox) -> Result<Value> {
        self.add_by(sandbox, |_| true)
    }

    /// The same by some of the plugins only, as if the list had been rewritten.
    pub fn add_by(&self, sandbox: &Sandbox, is_called: impl Fn(&str) -> bool) -> Result<Value> {
        let list = self.list()?;
        let mut result = Value::Null;
        let plugins = list["plugins"].as_array().context("plugins")?.iter();
        for plugin in plugins.filter(|it| it["type"].as_str().is_some_and(&is_called)) {
            match self.run("ADD", &list, plugin, sandbox, &result) {
                Ok(said) => result = said,
                Err(error) => {
                    self.del(sandbox)?;
                    sandbox.attempts.fetch_add(1, Ordering::Relaxed);
                    return Err(error);
                }
            }
        }
        Ok(result)
    }

    /// Sets up a sandbox, and lets the pod know its addresses.
    pub fn set_up(&self, pod: &mut Pod, sandbox: &Sandbox) -> Result<()> {
        let result = self.add(sandbox)?;
        let (v4, v6) = addresses(&result)?;
        pod.set_addresses(v4, v6);
        Ok(())
    }

    /// Expects that it cannot be set up.
    pub fn refused(&self, sandbox: &Sandbox) -> Result<Refused> {
        match self.add(sandbox) {
            Ok(result) => bail!("{} was set up: {result}", sandbox.id()),
            Err(error) => error.downcast::<Refused>(),
        }
    }

    /// Takes down a sandbox: the last plugin first.
    pub fn del(&self, sandbox: &Sandbox) -> Result<()> {
        let list = self.list()?;
        let plugins = list["plugins"].as_array().context("plugins")?;
        for plugin in plugins.iter().rev() {
            self.run("DEL", &list, plugin, sandbox, &Value::Null)?;
        }
        Ok(())
    }

    /// Asks one plugin whether a sandbox is as it should be.
    pub fn check(&self, plugin: &str, sandbox: &Sandbox, result: &Value) -> Result<()> {
        let list = self.list()?;
        let mut plugins = list["plugins"].as_array().context("plugins")?.iter();
        let plugin = plugins
            .find(|it| it["type"] == plugin)
            .context("no such plugin")?;
        self.run("CHECK", &list, plugin, sandbox, result).map(drop)
    }

    fn run(
        &self,
        command: &str,
        list: &Value,
        plugin: &Value,
        sandbox: &Sandbox,
        previous: &Value,
    ) -> Result<Value> {
        let kind = plugin["type"].as_str().context("a type")?;
        let mut configuration = plugin.clone();
        configuration["cniVersion"] = list["cniVersion"].clone();
        configuration["name"] = list["name"].clone();
        if !previous.is_null() {
            configuration["prevResult"] = previous.clone();
        }
        let program = self.bin_dir().join(kind);
        let mut process: Process = self
            .node
            .host_command(&program.display().to_string())?
            .env("CNI_COMMAND", command)
            .env("CNI_CONTAINERID", sandbox.id())
            .env("CNI_NETNS", &sandbox.netns)
            .env("CNI_IFNAME", "eth0")
            .env("CNI_ARGS", sandbox.args())
            .env("CNI_PATH", self.bin_dir())
            .with_stdin()
            .spawn()?;
        process.write_stdin(&configuration.to_string())?;
        process.close_stdin();
        let status = process.wait(PATIENCE)?;
        let said = process.stdout();
        if status.success() {
            return Ok(serde_json::from_str(&said).unwrap_or_default());
        }
        let error: Value = serde_json::from_str(&said)
            .with_context(|| format!("{kind} {command}: {said}{}", process.stderr()))?;
        ensure!(error["cniVersion"] == list["cniVersion"], "{error}");
        let text = |name: &str| error[name].as_str().unwrap_or_default().to_owned();
        Err(Refused {
            plugin: kind.to_owned(),
            code: error["code"].as_u64().context("a code")?,
            message: text("msg"),
            details: text("details"),
        }
        .into())
    }
}

/// The pod's addresses in a result.
pub fn addresses(result: &Value) -> Result<(Ipv4Addr, Ipv6Addr)> {
    let (mut v4, mut v6) = (None, None);
    for ip in result["ips"].as_array().context("ips")? {
        let address = ip["address"].as_str().context("address")?;
        let (address, _) = address.split_once('/').context("a prefix")?;
        match address.parse()? {
            IpAddr::V4(it) => v4 = Some(it),
            IpAddr::V6(it) => v6 = Some(it),
        }
    }
    Ok((
        v4.context("an IPv4 address")?,
        v6.context("an IPv6 address")?,
    ))
}

/// Far more than any plugin may take.
const PATIENCE: Duration = Duration::from_secs(90);
