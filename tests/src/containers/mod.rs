//! Real containers: a container runtime (containerd, with runc) for a node, and as much of a kubelet as it takes to have
//! pods in it.
//!
//! Pods of a [`crate::Cluster`] are namespaces and control groups that the harness made. Those here are made by what makes
//! them in clusters: processes are in the control groups that the runtime puts them into, network namespaces are those of
//! sandboxes and are set up by CNI plugins, images are unpacked and are the containers' whole file system, and capabilities and
//! system calls are bounded as their security contexts say. The runtime runs in the network namespace of its node, with
//! mounts of its own, and all that it starts is in the run's control group: it goes with the run.

mod cri;
mod image;
mod kubelet;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::cgroup;
use crate::cluster::Node;
use crate::command::{Process, Program};
use crate::wait::wait_for;

pub use cri::{Cri, Executed};
pub use image::Image;
pub use kubelet::{Container, Kubelet, Pod};

/// A container runtime that serves one node.
#[derive(Debug)]
pub struct Containerd {
    process: Process,
    cri: Cri,
    dir: PathBuf,
}

/// Where a runtime finds its CNI plugins.
#[derive(Clone, Debug)]
pub struct CniFolders {
    /// The lists of plugins: `/etc/cni/net.d` on nodes.
    pub configurations: PathBuf,
    /// The plugins: `/opt/cni/bin` on nodes.
    pub plugins: PathBuf,
}

impl Containerd {
    /// Starts it, with an image for sandboxes, and waits until it serves.
    pub fn start(node: &Node, cni: &CniFolders) -> Result<Containerd> {
        let dir = node.dir().join("containerd");
        fs::create_dir_all(&dir)?;
        let socket = dir.join("containerd.sock");
        let config = dir.join("config.toml");
        fs::write(&config, configuration(&dir, &socket, cni))?;
        let group = node.cgroup().child("runtime")?;
        // What it mounts is nobody else's, and ends with it; so do the sockets of its shims.
        let script = "mkdir -p /run/containerd && mount -t tmpfs tmpfs /run/containerd && exec containerd --config \"$0\"";
        let process = Program::new("unshare", Some(node.netns()), Some(&group), &dir)?
            .named("containerd")
            .args(["--mount", "--propagation", "private", "sh", "-c", script])
            .arg(&config)
            .spawn()?;
        let cri = Cri::at(&socket)?;
        let mut runtime = Containerd { process, cri, dir };
        wait_for("containerd to serve", START_DEADLINE, || {
            if !runtime.process.is_running() {
                return Ok(Some(Err(anyhow::anyhow!(
                    "containerd ended: {}",
                    runtime.log()
                ))));
            }
            runtime.ctr(&["version"])?;
            Ok(Some(Ok(())))
        })??;
        runtime.import(&Image::pause(&runtime.dir)?)?;
        Ok(runtime)
    }

    /// What kubelets say to it.
    pub fn cri(&self) -> &Cri {
        &self.cri
    }

    /// Unpacks an archive with an image, as `ctr images import` on a node does it.
    pub fn import(&self, image: &Image) -> Result<()> {
        let archive = image.archive().to_string_lossy();
        self.ctr(&["images", "import", &archive]).map(drop)
    }

    /// The names of the images that it has.
    pub fn images(&self) -> Result<Vec<String>> {
        let list = self.ctr(&["images", "list", "--quiet"])?;
        Ok(list.lines().map(str::to_owned).collect())
    }

    /// All it logged.
    pub fn log(&self) -> String {
        self.process.stderr()
    }

    fn ctr(&self, args: &[&str]) -> Result<String> {
        Program::new("ctr", None, None, &self.dir)?
            .args(["--namespace", "k8s.io", "--address"])
            .arg(self.dir.join("containerd.sock"))
            .args(args)
            .output(IMPORT_DEADLINE)?
            .success()
    }
}

fn configuration(dir: &Path, socket: &Path, cni: &CniFolders) -> String {
    let text = |path: &Path| format!("{:?}", path.display().to_string());
    format!(
        r#"version = 2
root = {root}
state = {state}
[grpc]
  address = {socket}
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  # What is less than its own needs a capability that a machine need not give.
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = {plugins}
    conf_dir = {configurations}
"#,
        root = text(&dir.join("root")),
        state = text(&dir.join("state")),
        socket = text(socket),
        pause = image::PAUSE,
        plugins = text(&cni.plugins),
        configurations = text(&cni.configurations),
    )
}

/// The control group of a node in the form that runtimes take: from the hierarchy's root on.
fn cgroup_of(node: &Node) -> Result<PathBuf> {
    let below = node.cgroup().path().strip_prefix(cgroup::hierarchy()?);
    let below = below.context("the node's control group is in another hierarchy")?;
    Ok(Path::new("/").join(below))
}

const START_DEADLINE: Duration = Duration::from_secs(30);
/// Images of debug builds are large.
const IMPORT_DEADLINE: Duration = Duration::from_secs(120);
