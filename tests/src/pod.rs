//! A pod: a network namespace on its node's bridge, a cgroup, and programs in both.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::cgroup::Cgroup;
use crate::cluster::{Node, pod_v4, pod_v6};
use crate::command::{Process, Program};
use crate::layout::{Laid, Layout};
use crate::netns::Netns;

/// What a pod shall be.
#[derive(Clone, Debug)]
pub struct PodSpec {
    name: String,
    namespace: String,
    service_account: String,
    node: usize,
    meshed: bool,
    host: Option<u8>,
    labels: Value,
    annotations: Value,
    deployment: Option<String>,
    containers: Value,
    node_name: Option<String>,
    layout: Option<Layout>,
    bare: bool,
}

impl PodSpec {
    /// A meshed pod on node 0 in the namespace `default`, with its name as service account and
    /// `app` label.
    pub fn new(name: &str) -> PodSpec {
        PodSpec {
            name: name.into(),
            namespace: "default".into(),
            service_account: name.into(),
            node: 0,
            meshed: true,
            host: None,
            labels: json!({"app": name}),
            annotations: json!({}),
            deployment: None,
            containers: json!([{"name": "app", "image": "none"}]),
            node_name: None,
            layout: None,
            bare: false,
        }
    }

    /// Has it laid out like this; its agent has to find it by its processes.
    pub fn layout(mut self, layout: Layout) -> PodSpec {
        self.layout = Some(layout);
        self
    }

    /// The same, unless it was said how already.
    pub(crate) fn laid_out(self) -> PodSpec {
        match self.layout {
            None if !self.bare => self.layout(Layout::Systemd),
            _ => self,
        }
    }

    /// Leaves its network to CNI plugins: see [`crate::cni`]. Its manifest says nothing of where it is.
    pub fn bare(mut self) -> PodSpec {
        self.bare = true;
        self
    }

    /// Has its manifest name another node than it is on: no agent will take it for its own.
    pub fn claimed_by(mut self, node_name: &str) -> PodSpec {
        self.node_name = Some(node_name.to_owned());
        self
    }

    /// Puts it on a node.
    pub fn on(mut self, node: usize) -> PodSpec {
        self.node = node;
        self
    }

    /// Puts it into a namespace.
    pub fn namespace(mut self, namespace: &str) -> PodSpec {
        namespace.clone_into(&mut self.namespace);
        self
    }

    /// Gives it a service account.
    pub fn service_account(mut self, name: &str) -> PodSpec {
        name.clone_into(&mut self.service_account);
        self
    }

    /// Adds or changes a label.
    pub fn label(mut self, key: &str, value: &str) -> PodSpec {
        self.labels[key] = value.into();
        self
    }

    /// Adds or changes an annotation.
    pub fn annotation(mut self, key: &str, value: &str) -> PodSpec {
        self.annotations[key] = value.into();
        self
    }

    /// Leaves it out of the mesh.
    pub fn unmeshed(mut self) -> PodSpec {
        self.meshed = false;
        self
    }

    /// Gives it the addresses with this host number (2 to 9 are never given by themselves).
    pub fn host(mut self, host: u8) -> PodSpec {
        self.host = Some(host);
        self
    }

    /// Makes it belong to a Deployment, by way of a ReplicaSet.
    pub fn deployment(mut self, name: &str) -> PodSpec {
        self.deployment = Some(name.to_owned());
        self
    }

    /// Adds a container port.
    pub fn port(mut self, name: &str, port: u16) -> PodSpec {
        let ports = &mut self.containers[0]["ports"];
        let port = json!({"name": name, "containerPort": port, "protocol": "TCP"});
        match ports.as_array_mut() {
            Some(ports) => ports.push(port),
            None => *ports = json!([port]),
        }
        self
    }

    /// Gives it a probe: `kind` is `livenessProbe`, `readinessProbe` or `startupProbe`, `probe` its
    /// handler, such as `{"httpGet": {"port": 8080}}`.
    pub fn probe(mut self, kind: &str, probe: Value) -> PodSpec {
        self.containers[0][kind] = probe;
        self
    }

    pub(crate) fn node_index(&self) -> usize {
        self.node
    }
}

/// A pod; its programs, namespace and cgroup go when it is dropped.
#[derive(Debug)]
pub struct Pod {
    spec: PodSpec,
    uid: String,
    node_name: String,
    v4: Ipv4Addr,
    v6: Ipv6Addr,
    /// Of its sandbox, where it has one.
    pause: Option<Process>,
    cgroup: PodCgroup,
    container: Cgroup,
    laid: Option<Laid>,
    netns: Netns,
    dir: PathBuf,
}

impl Pod {
    /// Makes the namespace, the link into the node's bridge, the addresses and the cgroup.
    pub(crate) fn build(spec: PodSpec, node: &Node, run: &str) -> Result<Pod> {
        let count = next_count();
        let netns = Netns::create(&format!("{run}-p{count}-{}", spec.name))?;
        let host = spec.host.unwrap_or_else(|| node.take_host());
        let (v4, v6) = (pod_v4(spec.node, host), pod_v6(spec.node, host));
        let port = format!("v{count}");
        if !spec.bare {
            connect_to_bridge(&netns, node, &port, v4, v6)?;
        }
        let uid = format!(
            "00000000-0000-4000-8000-{:06x}{count:06x}",
            std::process::id() & 0xff_ffff
        );
        let laid = spec.layout.map(|it| it.of(&uid));
        let pods = node.cgroup().child("pods")?;
        let (cgroup, container) = match &laid {
            None => {
                let name = format!("{}-{}-{count}", spec.namespace, spec.name);
                let cgroup = pods.child(&name)?;
                (cgroup.clone(), cgroup)
            }
            Some(laid) => {
                let container = pods.descendant(&laid.container)?;
                let of_pod = laid.pod.as_ref().map(|it| pods.descendant(it));
                (of_pod.unwrap_or_else(|| Ok(container.clone()))?, container)
            }
        };
        let cgroup = PodCgroup(cgroup);
        let dir = node
            .dir()
            .join(format!("{}-{}-{count}", spec.namespace, spec.name));
        std::fs::create_dir_all(&dir)?;
        let pause = start_pause(laid.as_ref(), &pods, &netns, &dir)?;
        let node_name = spec
            .node_name
            .clone()
            .unwrap_or_else(|| node.name().to_owned());
        Ok(Pod {
            spec,
            uid,
            node_name,
            v4,
            v6,
            pause,
            cgroup,
            container,
            laid,
            netns,
            dir,
        })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.spec.name
    }

    /// Its namespace in Kubernetes.
    pub fn namespace(&self) -> &str {
        &self.spec.namespace
    }

    /// Its service account.
    pub fn service_account(&self) -> &str {
        &self.spec.service_account
    }

    /// Its identity, if it is meshed.
    pub fn identity(&self) -> String {
        format!(
            "spiffe://cluster.local/ns/{}/sa/{}",
            self.spec.namespace, self.spec.service_account
        )
    }

    /// The number of its node.
    pub fn node_index(&self) -> usize {
        self.spec.node
    }

    /// Whether an agent shall take it: it is opted in, and its manifest tells the truth.
    pub fn is_enrolled(&self) -> bool {
        self.spec.meshed && self.spec.node_name.is_none()
    }

    /// Whether it is opted in.
    pub fn is_meshed(&self) -> bool {
        self.spec.meshed
    }

    /// Takes note of the addresses that somebody else gave it.
    pub fn set_addresses(&mut self, v4: Ipv4Addr, v6: Ipv6Addr) {
        (self.v4, self.v6) = (v4, v6);
    }

    /// Gives it another network namespace, as another sandbox has; the one from before goes, and its process.
    pub fn renew_netns(&mut self) -> Result<()> {
        drop(self.pause.take());
        let netns = Netns::create(&format!("{}r", self.netns.name()))?;
        drop(std::mem::replace(&mut self.netns, netns));
        Ok(())
    }

    /// Its IPv4 address.
    pub fn v4(&self) -> Ipv4Addr {
        self.v4
    }

    /// Its IPv6 address.
    pub fn v6(&self) -> Ipv6Addr {
        self.v6
    }

    /// Both addresses, IPv4 first.
    pub fn addresses(&self) -> [IpAddr; 2] {
        [self.v4.into(), self.v6.into()]
    }

    /// Both addresses with a port.
    pub fn sockets(&self, port: u16) -> [SocketAddr; 2] {
        self.addresses().map(|address| (address, port).into())
    }

    /// Its network namespace.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// The cgroup that its programs are in.
    pub fn cgroup(&self) -> &Cgroup {
        &self.container
    }

    /// Its UID.
    pub fn uid(&self) -> &str {
        &self.uid
    }

    /// The process of its sandbox, if it has one.
    pub fn pause(&mut self) -> Option<&mut Process> {
        self.pause.as_mut()
    }

    /// A folder for the files of its programs.
    pub fn dir(&self) -> &std::path::Path {
        &self.dir
    }

    /// A program in this pod.
    pub fn command(&self, program: &str) -> Result<Program> {
        Program::new(program, Some(&self.netns), Some(&self.container), &self.dir)
    }

    /// The Pod object.
    pub fn manifest(&self) -> Value {
        let spec = &self.spec;
        let mut labels = spec.labels.clone();
        if spec.meshed {
            labels["weft.dev/mesh"] = "enabled".into();
        }
        let mut annotations = spec.annotations.clone();
        let mut statuses = json!([]);
        match &self.laid {
            None if spec.bare => {}
            None => {
                let path = self.netns.path().display().to_string();
                annotations["weft.dev/netns"] = path.into();
            }
            Some(laid) => {
                let id = format!("{}://{}", laid.runtime, laid.id);
                statuses = json!([{"name": "app", "image": "none", "imageID": "", "ready": true,
                    "restartCount": 0, "containerID": id}]);
            }
        }
        let mut owners = json!([]);
        if let Some(deployment) = &spec.deployment {
            labels["pod-template-hash"] = TEMPLATE_HASH.into();
            owners = json!([{"apiVersion": "apps/v1", "kind": "ReplicaSet", "controller": true,
                "name": format!("{deployment}-{TEMPLATE_HASH}"), "uid": "0"}]);
        }
        json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": spec.name,
                "namespace": spec.namespace,
                "uid": self.uid,
                "labels": labels,
                "annotations": annotations,
                "ownerReferences": owners,
            },
            "spec": {
                "nodeName": self.node_name,
                "serviceAccountName": spec.service_account,
                "containers": spec.containers,
            },
            "status": {
                "phase": "Running",
                "podIP": self.v4.to_string(),
                "podIPs": [{"ip": self.v4.to_string()}, {"ip": self.v6.to_string()}],
                "conditions": [{"type": "Ready", "status": "True"}],
                "containerStatuses": statuses,
            },
        })
    }

    /// Gives it another sandbox, as a kubelet does when the first has died: its programs are ended, its namespace is
    /// another one, and UID and addresses stay.
    pub(crate) fn restart_sandbox(&mut self, node: &Node, run: &str) -> Result<()> {
        drop(self.pause.take());
        self.cgroup.0.remove()?;
        // As the network plugin does it, whoever still holds the namespace.
        self.netns.ip(&["link", "del", "eth0"])?;
        let count = next_count();
        self.netns = Netns::create(&format!("{run}-p{count}-{}", self.spec.name))?;
        connect_to_bridge(&self.netns, node, &format!("v{count}"), self.v4, self.v6)?;
        let pods = node.cgroup().child("pods")?;
        let laid = self.laid.as_ref().context("nobody would find it")?;
        self.container = pods.descendant(&laid.container)?;
        self.pause = start_pause(Some(laid), &pods, &self.netns, &self.dir)?;
        Ok(())
    }

    /// The Pod object before the kubelet has said anything of it.
    pub fn pending(&self) -> Value {
        let mut manifest = self.manifest();
        manifest["status"] = json!({"phase": "Pending"});
        manifest
    }

    /// Ends its programs and removes it; its manifest stays.
    pub fn delete(self) -> Result<()> {
        self.cgroup.0.remove()?;
        self.netns.delete()
    }
}

/// Names of links and namespaces are unique over the cluster; pods' names are not.
fn next_count() -> u32 {
    static COUNT: AtomicU32 = AtomicU32::new(1);
    COUNT.fetch_add(1, Ordering::Relaxed)
}

/// The process that keeps a sandbox, where there is one.
fn start_pause(
    laid: Option<&Laid>,
    pods: &Cgroup,
    netns: &Netns,
    dir: &Path,
) -> Result<Option<Process>> {
    let Some(path) = laid.and_then(|it| it.sandbox.as_ref()) else {
        return Ok(None);
    };
    let sandbox = pods.descendant(path)?;
    let pause = Program::new("sleep", Some(netns), Some(&sandbox), dir)?;
    Ok(Some(pause.arg("infinity").named("pause").spawn()?))
}

/// Kills what is in the cgroup when dropped, before the namespace's name goes.
#[derive(Debug)]
struct PodCgroup(Cgroup);

impl Drop for PodCgroup {
    fn drop(&mut self) {
        if let Err(error) = self.0.remove() {
            eprintln!("removing a pod's cgroup: {error:#}");
        }
    }
}

fn connect_to_bridge(
    netns: &Netns,
    node: &Node,
    port: &str,
    v4: Ipv4Addr,
    v6: Ipv6Addr,
) -> Result<()> {
    let peer = node.netns();
    netns.ip(&[
        "link",
        "add",
        "eth0",
        "type",
        "veth",
        "peer",
        "name",
        port,
        "netns",
        peer.name(),
    ])?;
    peer.ip(&["link", "set", port, "master", "br0", "up"])?;
    netns.ip(&["addr", "add", &format!("{v4}/24"), "dev", "eth0"])?;
    netns.ip(&["addr", "add", &format!("{v6}/64"), "dev", "eth0", "nodad"])?;
    // As CNI plugins do: the link's address follows from the IP address, so that neighbours need
    // not forget an earlier pod's.
    let [a, b, c, d] = v4.octets();
    let link = format!("0a:58:{a:02x}:{b:02x}:{c:02x}:{d:02x}");
    netns.ip(&["link", "set", "eth0", "address", &link, "up"])?;
    let gateway = (pod_v4(node.index(), 1), pod_v6(node.index(), 1));
    netns.ip(&["route", "add", "default", "via", &gateway.0.to_string()])?;
    netns.ip(&[
        "-6",
        "route",
        "add",
        "default",
        "via",
        &gateway.1.to_string(),
    ])?;
    Ok(())
}

/// The hash in the names of ReplicaSets.
const TEMPLATE_HASH: &str = "5d4f8c7b96";
