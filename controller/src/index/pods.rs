//! What the index keeps of pods and namespaces: checked, and no more than the mesh needs.

use std::net::IpAddr;
use std::path::PathBuf;

use k8s_openapi::api::core::v1::{Container, Pod, PodIP, PodSpec, PodStatus, Probe};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use serde_json::Value;
use weft_core::{
    AccessPolicy, ContainerId, Name, ObjectName, Owner, PodRuntime, Weight, WorkloadId,
};

use super::other_mesh::has_other_mesh;
use super::ports::PortsChoice;
use super::selector::Labels;
use crate::objects::Fault;

/// A pod.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct PodRecord {
    /// Its name.
    pub(super) id: WorkloadId,
    /// Tells it apart from an earlier pod of the same name.
    pub(super) uid: String,
    /// Its labels.
    pub(super) labels: Labels,
    /// Its node, once it has one.
    pub(super) node: Option<Name>,
    /// The name of its service account.
    pub(super) service_account: Name,
    /// Its addresses.
    pub(super) addresses: Vec<IpAddr>,
    /// Whether it uses its node's network namespace.
    pub(super) host_network: bool,
    /// Whether it is succeeded or failed: it has no addresses any more.
    pub(super) completed: bool,
    /// Whether it is being deleted.
    pub(super) terminating: bool,
    /// Whether it is ready to serve.
    pub(super) ready: bool,
    /// What it says itself about taking part in the mesh.
    pub(super) mesh: MeshChoice,
    /// What it would say if it were not left to another mesh.
    pub(super) left: Option<MeshChoice>,
    /// The default policy that it asks for.
    pub(super) default: DefaultChoice,
    /// What created it.
    pub(super) owner: Option<Owner>,
    /// Its named TCP ports.
    pub(super) ports: Vec<(String, u16)>,
    /// Ports that the kubelet probes.
    pub(super) probe_ports: Vec<u16>,
    /// The path of its network namespace on the node, where the source knows it.
    pub(super) netns: Option<PathBuf>,
    /// By what else than its UID its processes are found.
    pub(super) runtime: Box<PodRuntime>,
    /// What it says about ports.
    pub(super) ports_choice: PortsChoice,
    /// How much it is meant to take as an endpoint.
    pub(super) weight: Weight,
}

/// What the index keeps of a namespace.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct NamespaceRecord {
    /// What it says about its pods taking part in the mesh.
    pub(super) mesh: MeshChoice,
    /// The default policy of its pods.
    pub(super) default: DefaultChoice,
    /// What it says about ports of its pods and Services.
    pub(super) ports: PortsChoice,
    /// Its labels.
    pub(super) labels: Labels,
}

/// When an object was created; comparable, nothing else.
pub(super) type Created = k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

/// What an object says about taking part in the mesh.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum MeshChoice {
    /// Nothing.
    #[default]
    Silent,
    /// It takes part.
    Enabled,
    /// It does not.
    Disabled,
    /// Something else: it takes part, unless it said something better before.
    Unreadable,
}

/// What an object says about the policy of ports that no Server selects.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum DefaultChoice {
    /// Nothing.
    #[default]
    Silent,
    /// This.
    Policy(AccessPolicy),
    /// Something that is no policy: denied, unless it said something better before.
    Unreadable,
}

impl MeshChoice {
    /// This choice; the one before it if this one cannot be read.
    fn or_before(self, before: Option<&Self>) -> Self {
        match self {
            Self::Unreadable => before.cloned().unwrap_or(self),
            _ => self,
        }
    }
}

impl NamespaceRecord {
    /// Reads a namespace. Also returned: faults of parts that cannot be read; what they said
    /// before stays.
    pub(super) fn check(metadata: &ObjectMeta, before: Option<&Self>) -> (Self, Vec<Fault>) {
        let (mesh, default, mut faults) = choices(metadata);
        let (mut ports, faults_of_ports) = PortsChoice::check(metadata);
        faults.extend(faults_of_ports);
        if let Some(before) = before {
            ports.complete_by(&before.ports);
        }
        let record = Self {
            mesh: mesh.or_before(before.map(|it| &it.mesh)),
            default: default.or_before(before.map(|it| it.default)),
            ports,
            labels: metadata.labels.clone().unwrap_or_default(),
        };
        (record, faults)
    }
}

impl DefaultChoice {
    /// This choice; the one before it if this one cannot be read.
    pub(super) fn or_before(self, before: Option<Self>) -> Self {
        match self {
            Self::Unreadable => before.unwrap_or(self),
            _ => self,
        }
    }

    /// The policy, if anything is said.
    pub(super) fn policy(self) -> Option<AccessPolicy> {
        match self {
            Self::Silent => None,
            Self::Policy(policy) => Some(policy),
            Self::Unreadable => Some(AccessPolicy::Deny),
        }
    }
}

/// The label that opts a namespace or pod in or out.
pub(super) const MESH_LABEL: &str = "weft.dev/mesh";
/// Linkerd's annotation for the same.
pub(super) const INJECT_ANNOTATION: &str = "linkerd.io/inject";
/// Where the network namespace of a pod is, for sources other than Kubernetes.
pub(super) const NETNS_ANNOTATION: &str = "weft.dev/netns";
/// What a kubelet writes on the object that it makes of a static pod: twice the UID that the pod has for it.
pub(crate) const STATIC_POD_ANNOTATIONS: [&str; 2] =
    ["kubernetes.io/config.hash", "kubernetes.io/config.mirror"];
/// An MD5, in hexadecimal.
const STATIC_UID_LENGTH: usize = 32;
/// More than any pod has; those beyond are not needed to find it.
const MOST_CONTAINERS: usize = 128;
/// How much traffic a pod is meant to take as an endpoint, in percent of what others take.
pub(super) const WEIGHT_ANNOTATION: &str = "weft.dev/weight";
/// The default policy of a namespace or pod; the first one present counts.
pub(super) const DEFAULT_POLICY_ANNOTATIONS: [&str; 2] = [
    "weft.dev/default-inbound-policy",
    "config.linkerd.io/default-inbound-policy",
];

/// The metadata that can be read in a document of which something cannot. Values that are no texts
/// are taken as they are written: they say something, if nothing that is understood.
pub(super) fn readable_metadata(document: &Value) -> ObjectMeta {
    let metadata = |field: &str| document.get("metadata").and_then(|it| it.get(field));
    let text = |value: &Value| match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let texts = |field: &str, ours: &[&str]| match metadata(field) {
        None | Some(Value::Null) => None,
        Some(Value::Object(fields)) => {
            let fields = fields.iter();
            Some(fields.map(|(name, it)| (name.clone(), text(it))).collect())
        }
        // It may have said any of these.
        Some(_) => Some(
            ours.iter()
                .map(|it| ((*it).to_owned(), "?".to_owned()))
                .collect(),
        ),
    };
    ObjectMeta {
        uid: metadata("uid").filter(|it| !it.is_null()).map(text),
        labels: texts("labels", &[MESH_LABEL]),
        annotations: texts("annotations", &DEFAULT_POLICY_ANNOTATIONS),
        ..ObjectMeta::default()
    }
}

/// What labels and annotations say, with what in them cannot be read.
pub(super) fn choices(metadata: &ObjectMeta) -> (MeshChoice, DefaultChoice, Vec<Fault>) {
    let mut faults = vec![];
    let label = text(&metadata.labels, MESH_LABEL);
    let inject = text(&metadata.annotations, INJECT_ANNOTATION);
    let said = [
        (label, "metadata.labels", MESH_LABEL),
        (inject, "metadata.annotations", INJECT_ANNOTATION),
    ];
    let mut mesh = MeshChoice::Silent;
    let mut unreadable = false;
    for (value, place, name) in said {
        match value {
            None => {}
            Some("disabled") => mesh = MeshChoice::Disabled,
            Some("enabled") if mesh == MeshChoice::Silent => mesh = MeshChoice::Enabled,
            // Linkerd's mode for ingress controllers, which needs nothing special here.
            Some("ingress") if name == INJECT_ANNOTATION && mesh == MeshChoice::Silent => {
                mesh = MeshChoice::Enabled;
            }
            Some("enabled") => {}
            Some("ingress") if name == INJECT_ANNOTATION => {}
            Some(other) => {
                unreadable = true;
                let shown: String = other.chars().take(64).collect();
                let reason = format!("{shown:?} is neither enabled nor disabled");
                faults.push(Fault::new(format!("{place}[{name:?}]"), reason));
            }
        }
    }
    // Whatever else was meant, "disabled" wins.
    if unreadable && mesh != MeshChoice::Disabled {
        mesh = MeshChoice::Unreadable;
    }
    let mut default = DefaultChoice::Silent;
    let written = DEFAULT_POLICY_ANNOTATIONS
        .iter()
        .find_map(|name| text(&metadata.annotations, name).map(|value| (name, value)));
    if let Some((name, value)) = written {
        default = match value.parse() {
            Ok(policy) => DefaultChoice::Policy(policy),
            Err(reason) => {
                let field = format!("metadata.annotations[{name:?}]");
                faults.push(Fault::new(field, reason));
                DefaultChoice::Unreadable
            }
        };
    }
    (mesh, default, faults)
}

impl PodRecord {
    /// Checks a pod. Also returned: faults of parts that are ignored.
    ///
    /// # Errors
    /// The pod cannot be used at all.
    pub(super) fn check(name: ObjectName, pod: &Pod) -> Result<(Self, Vec<Fault>), Fault> {
        let metadata = &pod.metadata;
        let (mut mesh, default, mut faults) = choices(metadata);
        let (ports_choice, faults_of_ports) = PortsChoice::check(metadata);
        faults.extend(faults_of_ports);
        let spec = pod.spec.as_ref();
        let status = pod.status.as_ref();
        let node = spec.and_then(|it| it.node_name.as_deref());
        let account = spec.and_then(|it| it.service_account_name.as_deref());
        let account = account.filter(|it| !it.is_empty()).unwrap_or("default");
        let phase = status.and_then(|it| it.phase.as_deref());
        let labels = metadata.labels.clone().unwrap_or_default();
        let containers = serving_containers(pod);
        // Whoever wants both says so on the pod itself.
        let is_left = text(&metadata.labels, MESH_LABEL).is_none() && has_other_mesh(pod);
        let left = is_left.then(|| std::mem::replace(&mut mesh, MeshChoice::Disabled));
        let weight = weight(metadata, &mut faults);
        let class = spec.and_then(|it| it.runtime_class_name.clone());
        let record = Self {
            uid: match metadata.uid.as_deref() {
                Some(uid) if !uid.is_empty() => uid.to_owned(),
                _ => format!("name:{name}"),
            },
            node: match node.filter(|it| !it.is_empty()) {
                None => None,
                Some(node) => Some(
                    node.parse()
                        .map_err(|reason| Fault::new("spec.nodeName", reason))?,
                ),
            },
            service_account: account
                .parse()
                .map_err(|reason| Fault::new("spec.serviceAccountName", reason))?,
            addresses: addresses(pod)?,
            host_network: spec.and_then(|it| it.host_network).unwrap_or(false),
            completed: matches!(phase, Some("Succeeded" | "Failed")),
            terminating: metadata.deletion_timestamp.is_some(),
            ready: is_ready(pod),
            mesh,
            left,
            default,
            owner: owner(metadata),
            labels,
            ports: named_ports(&containers),
            probe_ports: probe_ports(&containers),
            netns: netns(metadata)?,
            runtime: Box::new(PodRuntime {
                static_uid: static_uid(metadata, node).map(str::to_owned),
                containers: status.map_or_else(Vec::new, |it| containers_of(it, &mut faults)),
                class: class.filter(|it| !it.is_empty()),
                own_users: spec.and_then(|it| it.host_users) == Some(false),
            }),
            ports_choice,
            weight,
            id: WorkloadId(name),
        };
        Ok((record, faults))
    }

    /// What holds of a pod that cannot be read and never could be, or was another one: it takes part
    /// in the mesh if it may, serves nobody, and lets nobody in at ports that no Server names by
    /// number. None: it cannot be said where it runs or as whom.
    pub(super) fn readable(name: ObjectName, document: &Value) -> Option<Self> {
        let text = |pointer: &str| match document.pointer(pointer) {
            None | Some(Value::Null) => Some(None),
            Some(Value::String(text)) => Some(Some(text.clone())),
            Some(_) => None,
        };
        let listed = document.pointer("/status/podIPs").and_then(Value::as_array);
        let ips = listed.into_iter().flatten().filter_map(|it| it.get("ip"));
        let ips = ips.filter_map(Value::as_str);
        let usable = ips.filter(|it| super::addresses::address("", it).is_ok());
        let usable = usable.take(super::addresses::MAX_ADDRESSES);
        let pod = Pod {
            metadata: readable_metadata(document),
            spec: Some(PodSpec {
                node_name: text("/spec/nodeName")?,
                service_account_name: text("/spec/serviceAccountName")?,
                host_network: document
                    .pointer("/spec/hostNetwork")
                    .and_then(Value::as_bool),
                ..PodSpec::default()
            }),
            status: Some(PodStatus {
                phase: text("/status/phase").flatten(),
                pod_ips: Some(usable.map(|ip| PodIP { ip: ip.to_owned() }).collect()),
                ..PodStatus::default()
            }),
        };
        let (record, _) = Self::check(name, &pod).ok()?;
        Some(Self {
            default: DefaultChoice::Unreadable,
            ready: false,
            ..record
        })
    }

    /// Takes from what was known of the same pod before what cannot be read, or is missing, now.
    pub(super) fn complete_by(&mut self, before: &Self) {
        self.mesh = self.mesh.clone().or_before(Some(&before.mesh));
        self.default = self.default.or_before(Some(before.default));
        self.ports_choice.complete_by(&before.ports_choice);
        // A pod that runs has the addresses it had.
        if self.addresses.is_empty() {
            self.addresses.clone_from(&before.addresses);
        }
        if self.runtime.containers.is_empty() {
            let before = &before.runtime.containers;
            self.runtime.containers.clone_from(before);
        }
    }

    /// Whether it is a workload: something that runs in a network namespace of its own.
    pub(super) fn is_workload(&self) -> bool {
        !self.host_network && !self.completed && self.node.is_some()
    }

    /// What it would say about taking part, of a workload that is left to another mesh.
    pub(super) fn left_to_other_mesh(&self) -> Option<&MeshChoice> {
        self.left.as_ref().filter(|_| self.is_workload())
    }

    /// Its node, and the UID of the static pod there that it says to be as long as it runs.
    pub(super) fn static_uid(&self) -> Option<(Name, String)> {
        let uid = self.runtime.static_uid.clone();
        uid.filter(|_| !self.completed)
            .and_then(|uid| Some((self.node.clone()?, uid)))
    }

    /// Whether it takes part in the mesh, given what its namespace says.
    pub(super) fn is_meshed(&self, namespace: &MeshChoice) -> bool {
        match self.mesh {
            MeshChoice::Disabled => false,
            MeshChoice::Enabled | MeshChoice::Unreadable => true,
            MeshChoice::Silent => {
                matches!(namespace, MeshChoice::Enabled | MeshChoice::Unreadable)
            }
        }
    }

    /// The numbers of its TCP ports of a name.
    pub(super) fn ports_named<'a>(&'a self, name: &'a str) -> impl Iterator<Item = u16> + 'a {
        let named = self.ports.iter().filter(move |(it, _)| it == name);
        named.map(|(_, number)| *number)
    }
}

fn text<'a>(map: &'a Option<Labels>, name: &str) -> Option<&'a str> {
    map.as_ref()?.get(name).map(String::as_str)
}

fn netns(metadata: &ObjectMeta) -> Result<Option<PathBuf>, Fault> {
    match text(&metadata.annotations, NETNS_ANNOTATION) {
        None => Ok(None),
        Some(path) if path.starts_with('/') => Ok(Some(path.into())),
        Some(_) => Err(Fault::new(
            format!("metadata.annotations[{NETNS_ANNOTATION:?}]"),
            "not an absolute path",
        )),
    }
}

/// The UID of a static pod. Its object has another one: it is a copy that the kubelet made, and says so by annotations.
/// Anybody may write these, so they must be a kubelet's in all they say, and no other pod of the node may have them. The
/// digits may be those of another pod's UID: agents tell the two apart, as a static pod's has no dashes.
fn static_uid<'a>(metadata: &'a ObjectMeta, node: Option<&str>) -> Option<&'a str> {
    let [hash, mirror] = STATIC_POD_ANNOTATIONS.map(|it| text(&metadata.annotations, it));
    let references = metadata.owner_references.as_deref().unwrap_or_default();
    let is_of_node = references.iter().any(|it| {
        it.controller == Some(true) && it.kind == "Node" && Some(it.name.as_str()) == node
    });
    let is_hash = |it: &&str| {
        let is_digit = |it: u8| matches!(it, b'0'..=b'9' | b'a'..=b'f');
        it.len() == STATIC_UID_LENGTH && it.bytes().all(is_digit)
    };
    hash.filter(is_hash)
        .filter(|_| is_of_node && mirror == hash)
}

/// The containers that a status names, as `<runtime>://<id>`. One that has not been made has none yet.
fn containers_of(status: &PodStatus, faults: &mut Vec<Fault>) -> Vec<ContainerId> {
    let lists = [
        ("containerStatuses", &status.container_statuses),
        ("initContainerStatuses", &status.init_container_statuses),
        (
            "ephemeralContainerStatuses",
            &status.ephemeral_container_statuses,
        ),
    ];
    let mut containers = vec![];
    for (list, statuses) in lists {
        for (index, status) in statuses.iter().flatten().enumerate() {
            let written = status.container_id.as_deref().unwrap_or_default();
            if written.is_empty() || containers.len() == MOST_CONTAINERS {
                continue;
            }
            match container_id(written) {
                Some(id) if containers.contains(&id) => {}
                Some(id) => containers.push(id),
                None => {
                    let shown: String = written.chars().take(96).collect();
                    let reason = format!("{shown:?} is no <runtime>:// with 64 hexadecimal digits");
                    let field = format!("status.{list}[{index}].containerID");
                    faults.push(Fault::new(field, reason));
                }
            }
        }
    }
    containers
}

fn container_id(written: &str) -> Option<ContainerId> {
    let (runtime, id) = written.split_once("://")?;
    let is_word = |it: u8| matches!(it, b'a'..=b'z' | b'0'..=b'9' | b'-');
    if runtime.is_empty() || !runtime.bytes().all(is_word) {
        return None;
    }
    id.parse().ok()
}

fn weight(metadata: &ObjectMeta, faults: &mut Vec<Fault>) -> Weight {
    let Some(written) = text(&metadata.annotations, WEIGHT_ANNOTATION) else {
        return Weight::default();
    };
    let percent = written.trim().parse().ok();
    percent.and_then(Weight::new).unwrap_or_else(|| {
        let shown: String = written.chars().take(64).collect();
        let reason = format!("{shown:?} is no number from 1 to {}", Weight::MAX);
        let field = format!("metadata.annotations[{WEIGHT_ANNOTATION:?}]");
        faults.push(Fault::new(field, reason));
        Weight::default()
    })
}

fn addresses(pod: &Pod) -> Result<Vec<IpAddr>, Fault> {
    let Some(status) = &pod.status else {
        return Ok(vec![]);
    };
    let listed = status.pod_ips.iter().flatten().enumerate();
    let mut texts: Vec<(String, &str)> = listed
        .map(|(index, it)| (format!("status.podIPs[{index}].ip"), it.ip.as_str()))
        .collect();
    if texts.is_empty() {
        let one = status.pod_ip.as_deref().filter(|it| !it.is_empty());
        texts.extend(one.map(|it| ("status.podIP".to_owned(), it)));
    }
    super::addresses::few("status.podIPs", texts.len())?;
    let mut addresses = vec![];
    for (field, text) in texts {
        let address = super::addresses::address(&field, text)?;
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    Ok(addresses)
}

/// A pod without any conditions was written by hand: it is ready when it runs.
fn is_ready(pod: &Pod) -> bool {
    let Some(status) = &pod.status else {
        return true;
    };
    let conditions = status.conditions.as_deref().unwrap_or_default();
    match conditions.iter().find(|it| it.type_ == "Ready") {
        Some(condition) => condition.status == "True",
        None if conditions.is_empty() => {
            matches!(status.phase.as_deref(), None | Some("" | "Running"))
        }
        None => false,
    }
}

/// The owner as metrics name it.
fn owner(metadata: &ObjectMeta) -> Option<Owner> {
    let (kind, name) = owners(metadata).last()?;
    Some(Owner {
        kind: kind.to_lowercase().parse().ok()?,
        name: name.parse().ok()?,
    })
}

/// Who owns a pod, by kind and name: what its metadata say, and whoever made that. A ReplicaSet made by a Deployment is called
/// after it, followed by the hash that its pods are labelled with; a Job made by a CronJob, by the minute that it was due.
pub fn owners(metadata: &ObjectMeta) -> impl Iterator<Item = (&str, &str)> {
    let mut references = metadata.owner_references.iter().flatten();
    let reference = references.find(|it| it.controller == Some(true));
    let made_by = reference.and_then(|it| match it.kind.as_str() {
        "ReplicaSet" => {
            let hash = text(&metadata.labels, "pod-template-hash")?;
            let deployment = it.name.strip_suffix(hash)?.strip_suffix('-')?;
            Some(("Deployment", deployment))
        }
        "Job" => {
            let created = metadata.creation_timestamp.as_ref()?;
            Some(("CronJob", cron_job(&it.name, created)?))
        }
        _ => None,
    });
    let reference = reference.map(|it| (it.kind.as_str(), it.name.as_str()));
    reference.into_iter().chain(made_by)
}

/// The CronJob that made a Job, of which a pod was made at this moment. Since Kubernetes 1.21 its Jobs are called after it and
/// the minute that they were due, counted from 1970: other numbers, as dates, are far from that.
fn cron_job<'a>(job: &'a str, created: &Created) -> Option<&'a str> {
    const LONGEST_MINUTES: i64 = 30 * 24 * 60;
    let (name, due) = job.rsplit_once('-')?;
    let due: i64 = due.parse().ok()?;
    let late = created.0.as_second() / 60 - due;
    // Clocks of two machines may differ.
    (-5..=LONGEST_MINUTES).contains(&late).then_some(name)
}

/// Containers that run as long as the pod does: the usual ones, and init containers that are
/// always restarted (sidecars).
pub(super) fn serving_containers(pod: &Pod) -> Vec<&Container> {
    let Some(spec) = &pod.spec else {
        return vec![];
    };
    let sidecars = spec.init_containers.iter().flatten();
    let sidecars = sidecars.filter(|it| it.restart_policy.as_deref() == Some("Always"));
    sidecars.chain(&spec.containers).collect()
}

fn named_ports(containers: &[&Container]) -> Vec<(String, u16)> {
    let ports = containers.iter().flat_map(|it| it.ports.iter().flatten());
    let mut named = vec![];
    for port in ports {
        let tcp = matches!(port.protocol.as_deref(), None | Some("" | "TCP"));
        let number = u16::try_from(port.container_port)
            .ok()
            .filter(|it| *it != 0);
        if let (true, Some(name), Some(number)) = (tcp, &port.name, number) {
            let entry = (name.clone(), number);
            if !named.contains(&entry) {
                named.push(entry);
            }
        }
    }
    named
}

fn probe_ports(containers: &[&Container]) -> Vec<u16> {
    let mut ports = vec![];
    for container in containers {
        let probes = [
            &container.liveness_probe,
            &container.readiness_probe,
            &container.startup_probe,
        ];
        let named = named_ports(&[container]);
        for probe in probes.into_iter().flatten() {
            ports.extend(probed(probe, &named));
        }
    }
    ports.sort_unstable();
    ports.dedup();
    ports
}

/// The port that a probe connects to in the pod. A probe of another host does not enter the pod.
fn probed(probe: &Probe, named: &[(String, u16)]) -> Option<u16> {
    let number = |port: &IntOrString| match port {
        IntOrString::Int(number) => u16::try_from(*number).ok(),
        IntOrString::String(text) => match named.iter().find(|(name, _)| name == text) {
            Some((_, number)) => Some(*number),
            None => text.parse().ok(),
        },
    };
    let own = |host: &Option<String>| host.as_deref().is_none_or(str::is_empty);
    let port = if let Some(action) = probe.http_get.as_ref().filter(|it| own(&it.host)) {
        number(&action.port)
    } else if let Some(action) = probe.tcp_socket.as_ref().filter(|it| own(&it.host)) {
        number(&action.port)
    } else {
        let action = probe.grpc.as_ref()?;
        u16::try_from(action.port).ok()
    };
    port.filter(|it| *it != 0)
}
