//! The controller as the container that the Deployment says, in a pod with a service account.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use serde_json::Value;

use super::{Controller, lock};
use crate::cluster::{POD_RANGES, SERVICE_RANGES, binary, kubelet};
use crate::command::{Finished, Process, Program};
use crate::contain::Container;
use crate::deployed::{Deployed, Facts};
use crate::http;

/// The manifests, and where the pod's things are.
#[derive(Debug)]
pub(super) struct InPod {
    deployed: Arc<Deployed>,
    dir: PathBuf,
}

impl Controller {
    /// What is started from now on is the container of the manifests.
    pub(in crate::cluster) fn deploy(&mut self, deployed: Arc<Deployed>, dir: &Path) {
        let dir = dir.join("controller-pod");
        self.deployed = Some(InPod { deployed, dir });
    }

    /// What its container is made of.
    pub fn container(&self) -> Result<Container> {
        let in_pod = self.deployed.as_ref().context("it is not deployed")?;
        let pod = in_pod.deployed.pod("Deployment", "weft-controller")?;
        let log = std::env::var("WEFT_TEST_LOG").unwrap_or("info".into());
        let facts = Facts {
            node: "elsewhere".into(),
            pod_dir: in_pod.dir.clone(),
            service_account: Some(self.service_account(&in_pod.dir)?),
            environment: BTreeMap::from([
                // What kubelets set.
                ("KUBERNETES_SERVICE_HOST".into(), "127.0.0.1".into()),
                ("KUBERNETES_SERVICE_PORT".into(), "6443".into()),
                // What docs/install.md says to add.
                ("WEFT_POD_RANGES".into(), POD_RANGES.join(",")),
                ("WEFT_SERVICE_RANGES".into(), SERVICE_RANGES.join(",")),
                ("WEFT_LOG_LEVEL".into(), log),
            ]),
            ..Facts::default()
        };
        fs::create_dir_all(&facts.pod_dir)?;
        in_pod.deployed.container(pod, "controller", &facts)
    }

    /// Asks it as the kubelet does.
    pub fn probe(&self, probe: &str) -> Result<http::Reply> {
        let in_pod = self.deployed.as_ref().context("it is not deployed")?;
        let pod = in_pod.deployed.pod("Deployment", "weft-controller")?;
        match Deployed::probe(pod, "controller", probe)? {
            crate::deployed::Probe::Http(port, path) => {
                http::get(&self.netns, ([127, 0, 0, 1], port).into(), &path)
            }
            crate::deployed::Probe::Exec(_) => anyhow::bail!("it runs a command"),
        }
    }

    /// Runs another command in its container, to the end.
    pub fn run_in_container(&self, command: &[&str]) -> Result<Finished> {
        let command = command.iter().map(|&it| it.to_owned()).collect();
        let container = Container {
            command,
            ..self.container()?
        };
        self.contained(&container)?.output(crate::wait::DEADLINE)
    }

    pub(super) fn spawn_container(&self) -> Result<()> {
        let process: Process = self.contained(&self.container()?)?.spawn()?;
        lock(&self.log_files).extend(process.logs().map(Path::to_owned));
        *lock(&self.process) = Some(process);
        Ok(())
    }

    fn contained(&self, container: &Container) -> Result<Program> {
        let file = container.root.with_extension("json");
        fs::write(&file, serde_json::to_string_pretty(container)?)?;
        let (netns, cgroup) = (Some(&self.netns), Some(&self.cgroup));
        let program = Program::new(binary("weft-contain")?, netns, cgroup, &self.logs)?;
        Ok(program.named("weft-controller").arg(file))
    }

    /// The folder that kubelets mount: what the API server lets it in by.
    fn service_account(&self, dir: &Path) -> Result<PathBuf> {
        let server = self.api_server.as_ref().context("there is no API server")?;
        let text = fs::read_to_string(&server.kubeconfig)?;
        let config: Value = serde_json::from_str(&text)?;
        let text = |path: &str| {
            let found = config.pointer(path).and_then(Value::as_str);
            found.with_context(|| format!("no {path} in the kubeconfig"))
        };
        let folder = dir.join("service-account");
        fs::create_dir_all(&folder)?;
        let root = text("/clusters/0/cluster/certificate-authority-data")?;
        fs::write(folder.join("ca.crt"), from_base64(root)?)?;
        fs::write(folder.join("token"), text("/users/0/user/token")?)?;
        fs::write(folder.join("namespace"), kubelet::NAMESPACE)?;
        Ok(folder)
    }
}

/// Standard alphabet, padded (RFC 4648, section 4).
fn from_base64(text: &str) -> Result<Vec<u8>> {
    const ALPHABET: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut bytes = Vec::new();
    let (mut kept, mut bits) = (0u32, 0);
    for byte in text.trim_end_matches('=').bytes() {
        let value = ALPHABET.iter().position(|it| *it == byte);
        let value = value.context("no base64")?;
        kept = (kept << 6 | u32::try_from(value)?) & 0xffff;
        bits += 6;
        if bits >= 8 {
            bits -= 8;
            bytes.push((kept >> bits & 0xff) as u8);
        }
    }
    Ok(bytes)
}
