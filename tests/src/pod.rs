//! A pod: a network namespace on its node's bridge, a cgroup, and programs in both.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::Result;
use serde_json::{Value, json};

use crate::cgroup::Cgroup;
use crate::cluster::{Node, pod_v4, pod_v6};
use crate::command::Program;
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
        }
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
    cgroup: PodCgroup,
    netns: Netns,
    dir: PathBuf,
}

impl Pod {
    /// Makes the namespace, the link into the node's bridge, the addresses and the cgroup.
    pub(crate) fn build(spec: PodSpec, node: &Node, run: &str) -> Result<Pod> {
        static COUNT: AtomicU32 = AtomicU32::new(1);
        // Names of links and namespaces are unique over the cluster; pods' names are not.
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let netns = Netns::create(&format!("{run}-p{count}-{}", spec.name))?;
        let host = spec.host.unwrap_or_else(|| node.take_host());
        let (v4, v6) = (pod_v4(spec.node, host), pod_v6(spec.node, host));
        let port = format!("v{count}");
        connect_to_bridge(&netns, node, &port, v4, v6)?;
        let pods = node.cgroup().child("pods")?;
        let cgroup = PodCgroup(pods.child(&format!("{}-{}-{count}", spec.namespace, spec.name))?);
        let dir = node
            .dir()
            .join(format!("{}-{}-{count}", spec.namespace, spec.name));
        std::fs::create_dir_all(&dir)?;
        let uid = format!(
            "00000000-0000-4000-8000-{:06x}{count:06x}",
            std::process::id() & 0xff_ffff
        );
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
            cgroup,
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

    /// Its cgroup.
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup.0
    }

    /// A folder for the files of its programs.
    pub fn dir(&self) -> &std::path::Path {
        &self.dir
    }

    /// A program in this pod.
    pub fn command(&self, program: &str) -> Result<Program> {
        Program::new(program, Some(&self.netns), Some(&self.cgroup.0), &self.dir)
    }

    /// The Pod object.
    pub fn manifest(&self) -> Value {
        let spec = &self.spec;
        let mut labels = spec.labels.clone();
        if spec.meshed {
            labels["weft.dev/mesh"] = "enabled".into();
        }
        let mut annotations = spec.annotations.clone();
        annotations["weft.dev/netns"] = self.netns.path().display().to_string().into();
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
            },
        })
    }

    /// Ends its programs and removes it; its manifest stays.
    pub fn delete(self) -> Result<()> {
        self.cgroup.0.remove()?;
        self.netns.delete()
    }
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
