//! As much of a kubelet as containers need: it makes of a Pod object what a runtime is to be told, runs its init containers
//! and then its containers, and writes into the object's status what came of it.
//!
//! It knows what the pods of tests and of the mesh's own manifests use, and refuses what it does not know rather than to
//! leave it out.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::cri::proto;
use super::{CniFolders, Containerd, Executed, cgroup_of};
use crate::cluster::{Cluster, Node, Projected, project, token_of};
use crate::wait::wait_for;

/// A kubelet for a node, and its runtime.
#[derive(Debug)]
pub struct Kubelet<'a> {
    cluster: &'a Cluster,
    node: &'a Node,
    runtime: Containerd,
}

/// A pod in the runtime.
#[derive(Clone, Debug)]
pub struct Pod {
    object: Value,
    sandbox: String,
    containers: Vec<Container>,
}

/// A container of a pod.
#[derive(Clone, Debug)]
pub struct Container {
    /// What the pod calls it.
    pub name: String,
    /// What the runtime calls it.
    pub id: String,
}

impl Kubelet<'_> {
    /// Starts the node's runtime.
    pub fn start<'a>(
        cluster: &'a Cluster,
        node: &'a Node,
        cni: &CniFolders,
    ) -> Result<Kubelet<'a>> {
        let runtime = Containerd::start(node, cni)?;
        Ok(Kubelet {
            cluster,
            node,
            runtime,
        })
    }

    /// The node's runtime.
    pub fn runtime(&self) -> &Containerd {
        &self.runtime
    }

    /// Has a pod scheduled to the node, as the API server would tell: it has a UID, and waits to be made.
    pub fn schedule(&self, mut object: Value) -> Result<Value> {
        static COUNT: AtomicU32 = AtomicU32::new(1);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let process = std::process::id() & 0xff_ffff;
        object["metadata"]["uid"] =
            format!("0c0de000-0000-4000-8000-{process:06x}{count:06x}").into();
        object["spec"]["nodeName"] = self.node.name().into();
        object["status"] = json!({"phase": "Pending"});
        self.cluster.apply(&object)?;
        Ok(object)
    }

    /// Schedules a pod and makes it.
    pub fn run(&self, object: Value) -> Result<Pod> {
        let object = self.schedule(object)?;
        self.make(object)
    }

    /// Makes a pod that is scheduled: once. A kubelet would try again.
    pub fn make(&self, mut object: Value) -> Result<Pod> {
        let sandbox_config = self.sandbox_config(&object)?;
        let cri = self.runtime.cri();
        let sandbox = cri.run_sandbox(&sandbox_config)?;
        let made = self.make_containers(&mut object, &sandbox, &sandbox_config);
        if made.is_err() {
            // Of the error it is more of interest how it came to it.
            let _ = cri.remove_sandbox(&sandbox);
        }
        let containers = made?;
        Ok(Pod {
            object,
            sandbox,
            containers,
        })
    }

    /// Makes a pod anew whose sandbox is taken down: the same pod, in other namespaces and with another address.
    pub fn make_anew(&self, pod: &Pod) -> Result<Pod> {
        self.runtime.cri().remove_sandbox(&pod.sandbox)?;
        self.make(pod.object.clone())
    }

    fn make_containers(
        &self,
        object: &mut Value,
        sandbox: &str,
        sandbox_config: &proto::PodSandboxConfig,
    ) -> Result<Vec<Container>> {
        let cri = self.runtime.cri();
        let is_of_host = object["spec"]["hostNetwork"] == true;
        let addresses = match is_of_host {
            true => vec![self.node.v4().to_string()],
            false => cri.addresses(sandbox)?,
        };
        let first = addresses.first().context("the pod has no address")?;
        let ips: Vec<Value> = addresses.iter().map(|it| json!({"ip": it})).collect();
        object["status"] = json!({"phase": "Pending", "podIP": first, "podIPs": ips, "hostIP": self.node.v4().to_string()});
        let mut lists = BTreeMap::new();
        let mut all = vec![];
        for (list, statuses) in [
            ("initContainers", "initContainerStatuses"),
            ("containers", "containerStatuses"),
        ] {
            let containers: Vec<Value> = items(&object["spec"], list).cloned().collect();
            for container in &containers {
                let name = text(container, "name")?;
                let config = self.container_config(object, container)?;
                let id = cri.start(sandbox, config, sandbox_config)?;
                let known: &mut Vec<Value> = lists.entry(statuses).or_default();
                known.push(json!({"name": name, "containerID": format!("containerd://{id}")}));
                let name = name.to_owned();
                all.push(Container { name, id });
                object["status"][statuses] = lists[statuses].clone().into();
                self.cluster.apply(object)?;
                if let Some(ended) = all.last().filter(|_| list == "initContainers") {
                    let code = cri.wait(&ended.id, INIT_DEADLINE)?;
                    let said = self.log_of(object, &ended.name);
                    ensure!(code == 0, "{} ended with {code}: {said}", ended.name);
                }
            }
        }
        object["status"]["phase"] = "Running".into();
        object["status"]["conditions"] = json!([{"type": "Ready", "status": "True"}]);
        self.cluster.apply(object)?;
        Ok(all)
    }

    /// Ends a pod, as after it was deleted, and takes its object away.
    pub fn remove(&self, pod: &Pod) -> Result<()> {
        self.remove_patiently(pod, Duration::from_secs(2))
    }

    /// The same, with so much time for each container to end by itself.
    pub fn remove_patiently(&self, pod: &Pod, patience: Duration) -> Result<()> {
        let cri = self.runtime.cri();
        for container in &pod.containers {
            cri.stop(&container.id, patience)?;
        }
        cri.remove_sandbox(&pod.sandbox)?;
        self.cluster.remove(&pod.object)
    }

    /// Changes a pod's labels, as `kubectl label` does.
    pub fn label(&self, pod: &mut Pod, key: &str, value: &str) -> Result<()> {
        pod.object["metadata"]["labels"][key] = value.into();
        self.cluster.apply(&pod.object)
    }

    /// Runs a command in a container of a pod.
    pub fn execute(&self, pod: &Pod, container: &str, command: &[&str]) -> Result<Executed> {
        self.runtime.cri().execute(pod.id_of(container)?, command)
    }

    /// What a container of a pod printed, of either kind.
    pub fn log(&self, pod: &Pod, container: &str) -> String {
        self.log_of(&pod.object, container)
    }

    /// Whether a container of a pod runs.
    pub fn is_running(&self, pod: &Pod, container: &str) -> Result<bool> {
        let code = self.runtime.cri().exit_code(pod.id_of(container)?)?;
        Ok(code.is_none())
    }

    fn log_of(&self, object: &Value, container: &str) -> String {
        let file = self.dir(object).join(format!("{container}.log"));
        let log = fs::read_to_string(file).unwrap_or_default();
        // `<time> stdout F <line>`.
        let said = log.lines().map(|line| line.splitn(4, ' ').last());
        said.flatten()
            .fold(String::new(), |all, line| all + line + "\n")
    }

    /// What a path of the node's file system is on this machine, where all nodes have the same one: what the mesh and CNIs
    /// leave there is below the node's own folder.
    pub fn host_path(&self, path: &str) -> PathBuf {
        let is_own = |it: &&&str| Path::new(path).starts_with(it);
        match OF_THE_NODE.iter().find(is_own) {
            Some(_) => self
                .node
                .dir()
                .join("host")
                .join(path.trim_start_matches('/')),
            None => PathBuf::from(path),
        }
    }

    /// Makes a projected volume of tokens and ConfigMaps.
    fn project(&self, object: &Value, projected: &Value, volume: &Path) -> Result<()> {
        let controller = self.cluster.controller()?;
        let namespace = text(&object["metadata"], "namespace")?;
        let mut files = vec![];
        for source in items(projected, "sources") {
            let (token, map) = (&source["serviceAccountToken"], &source["configMap"]);
            if token.is_object() {
                let wanted = Projected {
                    audience: text(token, "audience")?.to_owned(),
                    seconds: token["expirationSeconds"].as_u64().unwrap_or(3600),
                };
                let token_of = token_of(controller, object, &wanted)?;
                files.push((text(token, "path")?.to_owned(), token_of));
            } else if map.is_object() {
                let name = text(map, "name")?;
                let path = format!("/api/v1/namespaces/{namespace}/configmaps/{name}");
                // A pod waits for what it mounts.
                let data = wait_for(&format!("the ConfigMap {name}"), INIT_DEADLINE, || {
                    Ok(Some(controller.ask_api_server(&path)?["data"].clone()))
                })?;
                for item in items(map, "items") {
                    let content = text(&data, text(item, "key")?)?.to_owned();
                    files.push((text(item, "path")?.to_owned(), content));
                }
            } else {
                bail!("a kubelet of the tests cannot project {source}");
            }
        }
        let files: Vec<_> = files
            .iter()
            .map(|(name, text)| (name.as_str(), text.as_str()))
            .collect();
        project(volume, &files)
    }

    fn dir(&self, object: &Value) -> PathBuf {
        let uid = object["metadata"]["uid"].as_str().unwrap_or_default();
        self.node.dir().join("pods").join(uid)
    }

    fn sandbox_config(&self, object: &Value) -> Result<proto::PodSandboxConfig> {
        let (metadata, spec) = (&object["metadata"], &object["spec"]);
        let namespace = text(metadata, "namespace")?;
        let (name, uid) = (text(metadata, "name")?, text(metadata, "uid")?);
        let dir = self.dir(object);
        fs::create_dir_all(&dir)?;
        // As kubelets with the cgroupfs driver lay them out, by the class of pods without limits.
        let parent = cgroup_of(self.node)?.join("kubepods/besteffort");
        let parent = parent.join(format!("pod{uid}"));
        let labels = [
            ("io.kubernetes.pod.name", name),
            ("io.kubernetes.pod.namespace", namespace),
            ("io.kubernetes.pod.uid", uid),
        ];
        let labels = labels.map(|(key, value)| (key.to_owned(), value.to_owned()));
        Ok(proto::PodSandboxConfig {
            metadata: Some(proto::PodSandboxMetadata {
                name: name.to_owned(),
                uid: uid.to_owned(),
                namespace: namespace.to_owned(),
                attempt: 0,
            }),
            hostname: match spec["hostNetwork"] == true {
                true => String::new(),
                false => name.to_owned(),
            },
            log_directory: dir.display().to_string(),
            labels: labels.into(),
            linux: Some(proto::LinuxPodSandboxConfig {
                cgroup_parent: parent.display().to_string(),
                security_context: Some(proto::LinuxSandboxSecurityContext {
                    namespace_options: Some(namespaces(spec)),
                    seccomp: Some(runtime_default()),
                }),
            }),
        })
    }

    fn container_config(
        &self,
        object: &Value,
        container: &Value,
    ) -> Result<proto::ContainerConfig> {
        only(container, &KNOWN_OF_CONTAINERS)?;
        let name = text(container, "name")?;
        let words = |field: &str| -> Vec<String> {
            let words = items(container, field).filter_map(Value::as_str);
            words.map(str::to_owned).collect()
        };
        let env = items(container, "env").map(|it| self.variable(object, container, it));
        let env: BTreeMap<String, String> = env.collect::<Result<_>>()?;
        // `$(NAME)` in arguments is a variable of the container.
        let expand = |word: String| {
            let replace = |word: String, (name, value): (&String, &String)| {
                word.replace(&format!("$({name})"), value)
            };
            env.iter().fold(word, replace)
        };
        let mounts = items(container, "volumeMounts").map(|it| self.mount(object, it));
        Ok(proto::ContainerConfig {
            metadata: Some(proto::ContainerMetadata {
                name: name.to_owned(),
                attempt: 0,
            }),
            image: Some(proto::ImageSpec {
                image: text(container, "image")?.to_owned(),
            }),
            command: words("command").into_iter().map(expand).collect(),
            args: words("args").into_iter().map(expand).collect(),
            mounts: mounts.collect::<Result<_>>()?,
            labels: [("io.kubernetes.container.name".to_owned(), name.to_owned())].into(),
            log_path: format!("{name}.log"),
            linux: Some(proto::LinuxContainerConfig {
                security_context: Some(security(&object["spec"], container)?),
            }),
            envs: env
                .into_iter()
                .map(|(key, value)| proto::KeyValue { key, value })
                .collect(),
        })
    }

    fn variable(
        &self,
        object: &Value,
        container: &Value,
        variable: &Value,
    ) -> Result<(String, String)> {
        let name = text(variable, "name")?.to_owned();
        if let Some(value) = variable["value"].as_str() {
            return Ok((name, value.to_owned()));
        }
        let of_resource = &variable["valueFrom"]["resourceFieldRef"];
        if of_resource["resource"] == "limits.memory" {
            return Ok((
                name,
                bytes(text(&container["resources"]["limits"], "memory")?)?,
            ));
        }
        let path = variable["valueFrom"]["fieldRef"]["fieldPath"].as_str();
        let value = match path.with_context(|| format!("the variable {name} has no value"))? {
            "metadata.name" => text(&object["metadata"], "name")?,
            "metadata.namespace" => text(&object["metadata"], "namespace")?,
            "metadata.uid" => text(&object["metadata"], "uid")?,
            "spec.nodeName" => self.node.name(),
            "status.hostIP" => text(&object["status"], "hostIP")?,
            "status.podIP" => text(&object["status"], "podIP")?,
            other => bail!("a kubelet of the tests does not know {other}"),
        };
        Ok((name, value.to_owned()))
    }

    fn mount(&self, object: &Value, mount: &Value) -> Result<proto::Mount> {
        let name = text(mount, "name")?;
        let mut volumes = items(&object["spec"], "volumes");
        let volume = volumes.find(|it| it["name"] == name);
        let volume = volume.with_context(|| format!("there is no volume {name}"))?;
        let own = self.dir(object).join("volumes").join(name);
        let host_path = if let Some(path) = volume["hostPath"]["path"].as_str() {
            let path = self.host_path(path);
            if volume["hostPath"]["type"] == "DirectoryOrCreate" {
                fs::create_dir_all(&path)?;
            }
            path
        } else if volume["emptyDir"].is_object() {
            fs::create_dir_all(&own)?;
            own
        } else if volume["projected"].is_object() {
            self.project(object, &volume["projected"], &own)?;
            own
        } else {
            bail!("a kubelet of the tests cannot make the volume {volume}");
        };
        let propagation = match mount["mountPropagation"].as_str() {
            None | Some("None") => proto::MountPropagation::PropagationPrivate,
            Some("HostToContainer") => proto::MountPropagation::PropagationHostToContainer,
            Some("Bidirectional") => proto::MountPropagation::PropagationBidirectional,
            Some(other) => bail!("there is no mountPropagation {other}"),
        };
        Ok(proto::Mount {
            container_path: text(mount, "mountPath")?.to_owned(),
            host_path: host_path.display().to_string(),
            readonly: mount["readOnly"] == true,
            propagation: propagation.into(),
        })
    }
}

impl Pod {
    /// Its object, with the status that the kubelet wrote.
    pub fn object(&self) -> &Value {
        &self.object
    }

    /// Its first address.
    pub fn address(&self) -> Result<std::net::IpAddr> {
        Ok(text(&self.object["status"], "podIP")?.parse()?)
    }

    /// Its sandbox, as the runtime calls it.
    pub fn sandbox(&self) -> &str {
        &self.sandbox
    }

    /// Its containers, those that have ended included.
    pub fn containers(&self) -> &[Container] {
        &self.containers
    }

    fn id_of(&self, container: &str) -> Result<&str> {
        let mut containers = self.containers.iter();
        let found = containers.find(|it| it.name == container);
        let found = found.with_context(|| format!("there is no container {container}"))?;
        Ok(&found.id)
    }
}

fn namespaces(spec: &Value) -> proto::NamespaceOption {
    let of = |field: &str, otherwise: proto::NamespaceMode| match spec[field] == true {
        true => proto::NamespaceMode::Node.into(),
        false => otherwise.into(),
    };
    proto::NamespaceOption {
        network: of("hostNetwork", proto::NamespaceMode::Pod),
        pid: of("hostPID", proto::NamespaceMode::Container),
        ipc: of("hostIPC", proto::NamespaceMode::Pod),
    }
}

/// What a container may do: as its own security context says, else that of its pod.
fn security(spec: &Value, container: &Value) -> Result<proto::LinuxContainerSecurityContext> {
    let (own, pods) = (&container["securityContext"], &spec["securityContext"]);
    only(own, &KNOWN_OF_SECURITY)?;
    only(pods, &KNOWN_OF_SECURITY)?;
    let said = |field: &str| match &own[field] {
        Value::Null => &pods[field],
        value => value,
    };
    let capabilities = |field: &str| -> Vec<String> {
        let list = items(&own["capabilities"], field).filter_map(Value::as_str);
        list.map(str::to_owned).collect()
    };
    let number = |field: &str| {
        said(field)
            .as_i64()
            .map(|value| proto::Int64Value { value })
    };
    let is_privileged = own["privileged"] == true;
    let hidden = |paths: &[&str]| match is_privileged {
        true => vec![],
        false => paths.iter().map(ToString::to_string).collect(),
    };
    let seccomp = match said("seccompProfile")["type"].as_str() {
        Some("RuntimeDefault") => runtime_default(),
        None | Some("Unconfined") => proto::SecurityProfile {
            profile_type: proto::security_profile::ProfileType::Unconfined.into(),
        },
        Some(other) => bail!("a kubelet of the tests has no seccomp profile {other}"),
    };
    Ok(proto::LinuxContainerSecurityContext {
        capabilities: Some(proto::Capability {
            add_capabilities: capabilities("add"),
            drop_capabilities: capabilities("drop"),
        }),
        privileged: is_privileged,
        namespace_options: Some(namespaces(spec)),
        run_as_user: number("runAsUser"),
        readonly_rootfs: own["readOnlyRootFilesystem"] == true,
        no_new_privs: own["allowPrivilegeEscalation"] == false,
        run_as_group: number("runAsGroup"),
        masked_paths: hidden(&MASKED),
        readonly_paths: hidden(&READ_ONLY),
        seccomp: Some(seccomp),
    })
}

/// An amount of memory in bytes, of those with a binary unit.
fn bytes(amount: &str) -> Result<String> {
    let (number, unit) = amount.split_at(amount.len().saturating_sub(2));
    let unit: u64 = match unit {
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        _ => bail!("a kubelet of the tests does not know how much {amount} is"),
    };
    let number: u64 = number.parse()?;
    Ok((number * unit).to_string())
}

fn runtime_default() -> proto::SecurityProfile {
    proto::SecurityProfile {
        profile_type: proto::security_profile::ProfileType::RuntimeDefault.into(),
    }
}

fn items<'a>(value: &'a Value, field: &str) -> std::slice::Iter<'a, Value> {
    value[field]
        .as_array()
        .map(Vec::as_slice)
        .unwrap_or_default()
        .iter()
}

fn text<'a>(value: &'a Value, field: &str) -> Result<&'a str> {
    let text = value[field].as_str();
    text.with_context(|| format!("there is no {field} in {value}"))
}

/// What is not known is not left out.
fn only(value: &Value, known: &[&str]) -> Result<()> {
    let fields = value.as_object().into_iter().flatten();
    let mut unknown = fields.filter(|(field, _)| !known.contains(&field.as_str()));
    match unknown.next() {
        None => Ok(()),
        Some((field, _)) => bail!("a kubelet of the tests does not know {field} of {value}"),
    }
}

/// Of these, probes, ports, resources and the rest of the last line are not acted on: tests look by themselves, and limits
/// need cgroups that this machine's version need not have.
const KNOWN_OF_CONTAINERS: [&str; 14] = [
    "name",
    "image",
    "command",
    "args",
    "env",
    "volumeMounts",
    "securityContext",
    "ports",
    "resources",
    "livenessProbe",
    "readinessProbe",
    "startupProbe",
    "imagePullPolicy",
    "terminationMessagePolicy",
];
const KNOWN_OF_SECURITY: [&str; 10] = [
    "allowPrivilegeEscalation",
    "capabilities",
    "privileged",
    "readOnlyRootFilesystem",
    "runAsGroup",
    "runAsNonRoot",
    "runAsUser",
    // Of this machine's kernel neither is a part.
    "seLinuxOptions",
    "seccompProfile",
    "appArmorProfile",
];
/// What a node has for itself of what pods mount from it.
const OF_THE_NODE: [&str; 5] = [
    "/etc/cni",
    "/opt/cni",
    "/run/weft",
    "/var/lib/weft",
    "/var/run/weft",
];
/// What kubelets have runtimes hide of `/proc` and `/sys`,
const MASKED: [&str; 9] = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/sys/firmware",
];
/// and what they have them let nobody write to.
const READ_ONLY: [&str; 6] = [
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
    "/proc/scsi",
];
const INIT_DEADLINE: Duration = Duration::from_secs(30);
