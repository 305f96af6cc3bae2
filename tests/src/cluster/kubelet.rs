//! What a kubelet does for the agent of its node where there is Kubernetes: the agent's pod, and the volume that is
//! projected into it, with a token of its service account and the roots. Files are exchanged as kubelets do it, all
//! at once by a link.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::controller::write_private;
use super::{Controller, START_DEADLINE};
use crate::http;
use crate::wait::wait_for;

/// The pod of an agent.
#[derive(Clone, Debug)]
pub struct AgentPod {
    name: String,
    uid: String,
    node: String,
    address: String,
}

/// What the token that a kubelet projects is like.
#[derive(Clone, Debug)]
pub struct Projected {
    /// Whom it is for.
    pub audience: String,
    /// How long it lasts.
    pub seconds: u64,
}

impl Default for Projected {
    fn default() -> Projected {
        Projected {
            audience: "weft-controller".into(),
            seconds: 3600,
        }
    }
}

impl AgentPod {
    /// Another one each time, as a DaemonSet makes them.
    pub(super) fn new(node: &str, address: String) -> AgentPod {
        static COUNT: AtomicU32 = AtomicU32::new(1);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        AgentPod {
            name: format!("weft-agent-{node}-{count}"),
            uid: format!("00000000-0000-4000-9000-{count:012x}"),
            node: node.to_owned(),
            address,
        }
    }

    /// The Pod object.
    pub fn manifest(&self) -> Value {
        json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": self.name, "namespace": NAMESPACE, "uid": self.uid},
            "spec": {"nodeName": self.node, "serviceAccountName": ACCOUNT, "hostNetwork": true,
                "containers": [{"name": "agent", "image": "none"}]},
            "status": {"phase": "Running", "podIP": self.address, "podIPs": [{"ip": self.address}],
                "conditions": [{"type": "Ready", "status": "True"}]},
        })
    }

    /// A token of it, as the API server gives it to kubelets.
    pub fn token(&self, controller: &Controller, wanted: &Projected) -> Result<String> {
        token_of(controller, &self.manifest(), wanted)
    }
}

/// A token of a pod's service account that is bound to the pod, as the API server gives it to kubelets.
pub(crate) fn token_of(controller: &Controller, pod: &Value, wanted: &Projected) -> Result<String> {
    let (metadata, account) = (&pod["metadata"], &pod["spec"]["serviceAccountName"]);
    let text = |value: &'_ Value| value.as_str().map(str::to_owned);
    let (namespace, name) = (text(&metadata["namespace"]), text(&metadata["name"]));
    let namespace = namespace.context("the pod has no namespace")?;
    let name = name.context("the pod has no name")?;
    let account = text(account).context("the pod has no service account")?;
    let path = format!("/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token");
    let asked = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {
        "audiences": [wanted.audience], "expirationSeconds": wanted.seconds,
        "boundObjectRef": {"apiVersion": "v1", "kind": "Pod", "name": name, "uid": metadata["uid"]}}});
    // Until the API server knows the pod.
    wait_for(&format!("a token of {name}"), START_DEADLINE, || {
        let reply = http::post(controller.netns(), PLAIN, &path, &asked.to_string())?;
        if reply.status != 201 {
            bail!("status {}: {}", reply.status, reply.body);
        }
        let answer: Value = serde_json::from_str(&reply.body)?;
        let token = answer["status"]["token"].as_str();
        Ok(Some(token.context("no token")?.to_owned()))
    })
}

/// The roots that the controller keeps for agents; waited for, as pods wait for what they mount.
pub(super) fn roots(controller: &Controller) -> Result<String> {
    let path = format!("/api/v1/namespaces/{NAMESPACE}/configmaps/weft-identity-roots");
    wait_for("the roots for agents", START_DEADLINE, || {
        let reply = http::get(controller.netns(), PLAIN, &path)?;
        let map: Value = serde_json::from_str(&reply.ok()?)?;
        Ok(map["data"]["ca.crt"].as_str().map(str::to_owned))
    })
}

/// Exchanges what is in a projected volume.
pub(crate) fn project(volume: &Path, files: &[(&str, &str)]) -> Result<()> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let version = format!("..{}", COUNT.fetch_add(1, Ordering::Relaxed));
    let folder = volume.join(&version);
    fs::create_dir_all(&folder)?;
    for (name, text) in files {
        write_private(&folder.join(name), text)?;
        let link = volume.join(name);
        if link.symlink_metadata().is_err() {
            symlink(Path::new(DATA).join(name), link)?;
        }
    }
    let before = fs::read_link(volume.join(DATA)).ok();
    let next = volume.join("..data_tmp");
    symlink(&version, &next)?;
    fs::rename(&next, volume.join(DATA)).context("exchanging a projected volume")?;
    if let Some(before) = before {
        fs::remove_dir_all(volume.join(before))?;
    }
    Ok(())
}

/// Where the volume of a node's agent is.
pub(super) fn volume(dir: &Path) -> PathBuf {
    dir.join("identity")
}

/// The namespace of controller and agents.
pub(super) const NAMESPACE: &str = "weft-system";
/// The file with the token in the volume,
pub(super) const TOKEN: &str = "token";
/// and that with the roots.
pub(super) const ROOTS: &str = "ca.crt";
const ACCOUNT: &str = "weft-agent";
const DATA: &str = "..data";
/// Where the API server answers kubelets, in the controller's namespace.
pub(super) const PLAIN: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 8001);
