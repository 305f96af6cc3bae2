//! From files to what an index takes in.
//!
//! Repositories hold Deployments, not pods: each template of pods stands for one pod here, with an address that nobody
//! has. What cannot be read is an error and not a warning: it may be what closes something.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io::{self, Read};
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Map, Value, json};
use weft_controller::objects::{Fault, ObjectKey, ObjectKind, decode};
use weft_controller::problems::{Origin, Problem};
use weft_controller::source::Event;
use weft_core::{Name, ObjectName, WorkloadId};

use super::PolicyTest;
use super::who::TargetKind;

/// What was read.
#[derive(Debug, Default)]
pub(super) struct Manifests {
    /// All objects, as the index takes them in.
    pub(super) events: Vec<Event>,
    /// Which pods stand for a workload.
    pub(super) pods_of: HashMap<(TargetKind, ObjectName), Vec<WorkloadId>>,
    /// Pods whose address was made up.
    pub(super) made_up: HashSet<WorkloadId>,
    /// The ports of a pod that have names.
    pub(super) ports: HashMap<WorkloadId, Vec<(String, u16)>>,
    /// Documents that define nothing that counts, though one may think so.
    pub(super) problems: Vec<Problem>,
}

/// Why manifests cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// A file or folder is not there, or not for us.
    #[error("cannot read {place}: {reason}")]
    Read {
        /// It.
        place: String,
        /// Why.
        reason: io::Error,
    },
    /// More than anybody writes.
    #[error("{place} has more than {MAX_BYTES} bytes")]
    TooLarge {
        /// What.
        place: String,
    },
    /// Not YAML.
    #[error(
        "{place}: {fault}: a template has to be rendered first (helm template … | weft policy test -f - …)"
    )]
    NotYaml {
        /// The file.
        place: String,
        /// Where.
        fault: Fault,
    },
    /// An object that an API server would not take either.
    #[error("{place}, document {document}: {fault}")]
    Object {
        /// The file.
        place: String,
        /// Which document, counted from 1.
        document: usize,
        /// What is wrong.
        fault: Fault,
    },
    /// An object is defined twice.
    #[error(
        "{object} is defined in {first} and in {second}: which one counts? Give one rendered set of manifests \
         (kustomize build … | weft policy test -f - …)"
    )]
    Twice {
        /// The object.
        object: String,
        /// Where it is first,
        first: String,
        /// and again.
        second: String,
    },
}

/// More is a mistake.
const MAX_BYTES: u64 = 64 * 1024 * 1024;
/// Files that stand beside manifests and are none.
const NOT_MANIFESTS: [&str; 5] = [
    "kustomization.yaml",
    "kustomization.yml",
    "Chart.yaml",
    "values.yaml",
    "Chart.lock",
];
/// The range that addresses of pods come from that have none: it is for benchmarks of networks (RFC 2544). They make
/// pods and Services find each other, and decide nothing.
pub(super) const POD_RANGE: &str = "198.18.0.0/15";
/// The node of all pods.
pub(super) const NODE: &str = "offline";

/// Reads all of them.
pub(super) fn read(paths: &[PathBuf], test: &PolicyTest) -> Result<Manifests, ManifestError> {
    let mut reading = Reading {
        test,
        manifests: Manifests::default(),
        places: HashMap::new(),
        objects: vec![],
        addresses: 0,
    };
    for path in paths {
        reading.path(path)?;
    }
    if test.assume_meshed {
        reading.mesh_namespaces();
    }
    reading.finish()
}

struct Reading<'a> {
    test: &'a PolicyTest,
    manifests: Manifests,
    /// Where each object is defined.
    places: HashMap<String, String>,
    objects: Vec<Found>,
    /// How many addresses were given to pods.
    addresses: u32,
}

/// An object of a kind that is ours.
struct Found {
    key: ObjectKey,
    document: Value,
    origin: Origin,
}

impl Reading<'_> {
    fn path(&mut self, path: &Path) -> Result<(), ManifestError> {
        if path == Path::new("-") {
            return self.text("standard input", io::stdin().lock());
        }
        let place = path.display().to_string();
        let failed = |reason| ManifestError::Read {
            place: place.clone(),
            reason,
        };
        if !fs::metadata(path).map_err(failed)?.is_dir() {
            let file = fs::File::open(path).map_err(failed)?;
            return self.text(&place, file);
        }
        let entries = fs::read_dir(path).map_err(failed)?;
        let entries: Result<Vec<_>, _> = entries.map(|it| it.map(|it| it.path())).collect();
        let mut entries = entries.map_err(failed)?;
        entries.sort();
        for entry in entries {
            let name = entry.file_name().unwrap_or_default().to_string_lossy();
            if name.starts_with('.') || NOT_MANIFESTS.contains(&name.as_ref()) {
                continue;
            }
            let extension = entry.extension().and_then(|it| it.to_str());
            let is_manifest = matches!(extension, Some("yaml" | "yml" | "json"));
            // A link to a folder may lead back to where it is.
            if is_manifest || (entry.is_dir() && !entry.is_symlink()) {
                self.path(&entry)?;
            }
        }
        Ok(())
    }

    fn text(&mut self, place: &str, from: impl Read) -> Result<(), ManifestError> {
        let mut text = String::new();
        let read = from.take(MAX_BYTES + 1).read_to_string(&mut text);
        let read = read.map_err(|reason| ManifestError::Read {
            place: place.to_owned(),
            reason,
        })?;
        if read as u64 > MAX_BYTES {
            let place = place.to_owned();
            return Err(ManifestError::TooLarge { place });
        }
        let documents = decode::documents(&text).map_err(|fault| ManifestError::NotYaml {
            place: place.to_owned(),
            fault,
        })?;
        for (index, document) in documents.into_iter().enumerate() {
            let origin = Origin {
                place: place.into(),
                document: Some(index + 1),
            };
            self.document(document, &origin)?;
        }
        Ok(())
    }

    fn document(&mut self, mut document: Value, origin: &Origin) -> Result<(), ManifestError> {
        let kind = text(&document, "/kind").unwrap_or_default().to_owned();
        let version = text(&document, "/apiVersion")
            .unwrap_or_default()
            .to_owned();
        if let Some(of) = kind.strip_suffix("List")
            && let Some(Value::Array(items)) = document.get_mut("items").map(Value::take)
        {
            for mut item in items {
                if let (Some(fields), false) = (item.as_object_mut(), of.is_empty()) {
                    // Those of a typed list do not repeat what they are.
                    fields.entry("kind").or_insert_with(|| of.into());
                    let version = || version.as_str().into();
                    fields.entry("apiVersion").or_insert_with(version);
                }
                self.document(item, origin)?;
            }
            return Ok(());
        }
        if let Some(template) = Template::of(&version, &kind) {
            return self.workload(template, &document, origin);
        }
        let failed = |fault| object_error(origin, fault);
        match decode::identify(&document).map_err(failed)? {
            None => {
                if let Some(fault) = decode::unsupported(&document) {
                    let problem = Problem::of_file(
                        &*origin.place,
                        origin.document,
                        fault,
                        "it has no effect",
                    );
                    self.manifests.problems.push(problem);
                }
                Ok(())
            }
            Some(key) if key.kind.is_namespaced() => {
                self.in_namespace(&mut document);
                let key = decode::identify(&document).map_err(failed)?.unwrap_or(key);
                self.found(key, document, origin)
            }
            Some(key) => self.found(key, document, origin),
        }
    }

    /// Says in which namespace an object is that does not say so itself, as `kubectl apply -n` does.
    fn in_namespace(&self, document: &mut Value) {
        if let Some(Value::Object(metadata)) = document.get_mut("metadata") {
            let namespace = metadata.entry("namespace").or_insert(Value::Null);
            if namespace.is_null() {
                *namespace = self.test.namespace.as_str().into();
            }
        }
    }

    fn found(
        &mut self,
        key: ObjectKey,
        mut document: Value,
        origin: &Origin,
    ) -> Result<(), ManifestError> {
        self.once(&key.to_string(), origin)?;
        if key.kind == ObjectKind::Pod {
            let namespace = key
                .namespace
                .clone()
                .unwrap_or_else(|| self.test.namespace.clone());
            let name = ObjectName {
                namespace,
                name: key.name.clone(),
            };
            self.pod(&mut document, TargetKind::Pod, name.clone(), &name);
        }
        self.objects.push(Found {
            key,
            document,
            origin: origin.clone(),
        });
        Ok(())
    }

    fn once(&mut self, object: &str, origin: &Origin) -> Result<(), ManifestError> {
        let place = shown(origin);
        match self.places.insert(object.to_owned(), place.clone()) {
            None => Ok(()),
            Some(first) => Err(ManifestError::Twice {
                object: object.to_owned(),
                first,
                second: place,
            }),
        }
    }

    /// Makes the pod that stands for those of a workload.
    fn workload(
        &mut self,
        template: Template,
        document: &Value,
        origin: &Origin,
    ) -> Result<(), ManifestError> {
        let failed = |field: &str, reason: &dyn ToString| {
            object_error(origin, Fault::new(field, reason.to_string()))
        };
        let named = |field: &str, otherwise: Option<&str>| -> Result<Name, ManifestError> {
            let pointer = format!("/metadata/{field}");
            let written = text(document, &pointer).or(otherwise).unwrap_or_default();
            let parsed = written.parse::<Name>();
            parsed.map_err(|error| failed(&format!("metadata.{field}"), &error))
        };
        let name = ObjectName {
            namespace: named("namespace", Some(self.test.namespace.as_str()))?,
            name: named("name", None)?,
        };
        let kind = template.kind.as_str();
        self.once(&format!("{kind} {name}"), origin)?;
        let pod = document.pointer(template.pointer);
        let pod = pod.and_then(Value::as_object);
        let pod =
            pod.ok_or_else(|| failed(template.field(), &"missing: it is the pods' template"))?;
        let mut pod = pod.clone();
        pod.insert("apiVersion".into(), "v1".into());
        pod.insert("kind".into(), "Pod".into());
        let metadata = pod.entry("metadata").or_insert_with(|| json!({}));
        let Some(metadata) = metadata.as_object_mut() else {
            return Err(failed(template.field(), &"metadata is no mapping"));
        };
        let pod_name = format!("{}-{kind}", name.name);
        metadata.insert("name".into(), pod_name.into());
        metadata.insert("namespace".into(), name.namespace.as_str().into());
        let owner = json!([{
            "apiVersion": "apps/v1", "kind": template.owner, "name": name.name.as_str(),
            "uid": "", "controller": true,
        }]);
        metadata.insert("ownerReferences".into(), owner);
        let mut pod = Value::Object(pod);
        let failed = |fault| object_error(origin, fault);
        // It is a pod: the kind was set above.
        let Some(key) = decode::identify(&pod).map_err(failed)? else {
            return Ok(());
        };
        let pod_name = ObjectName {
            namespace: name.namespace.clone(),
            name: key.name.clone(),
        };
        self.pod(&mut pod, template.kind, name, &pod_name);
        self.objects.push(Found {
            key,
            document: pod,
            origin: origin.clone(),
        });
        Ok(())
    }

    /// Makes a pod one that runs, and remembers whose it is.
    fn pod(&mut self, pod: &mut Value, kind: TargetKind, of: ObjectName, name: &ObjectName) {
        let id = WorkloadId(name.clone());
        let ports = ports_of(pod);
        self.manifests.ports.insert(id.clone(), ports);
        self.manifests
            .pods_of
            .entry((kind, of))
            .or_default()
            .push(id.clone());
        if let Some(spec) = pod.get_mut("spec").and_then(Value::as_object_mut) {
            spec.insert("nodeName".into(), NODE.into());
        }
        let status = pod
            .get("status")
            .and_then(|it| it.get("podIPs").or(it.get("podIP")));
        if status.is_none_or(Value::is_null)
            && let Some(pod) = pod.as_object_mut()
        {
            let address = self.address().to_string();
            self.manifests.made_up.insert(id);
            let status = json!({
                "phase": "Running",
                "podIP": address,
                "podIPs": [{"ip": address}],
                "conditions": [{"type": "Ready", "status": "True"}],
            });
            pod.insert("status".into(), status);
        }
    }

    fn address(&mut self) -> IpAddr {
        self.addresses += 1;
        // 131,000 pods fit; after those, addresses are of two pods and so nobody's.
        let offset = self.addresses % (1 << 17);
        let base = u32::from(Ipv4Addr::new(198, 18, 0, 0));
        Ipv4Addr::from(base + offset).into()
    }

    /// Makes all namespaces part of the mesh that say nothing about it.
    fn mesh_namespaces(&mut self) {
        let in_use = self
            .objects
            .iter()
            .filter_map(|it| it.key.namespace.clone());
        let mut missing: std::collections::BTreeSet<Name> = in_use.collect();
        for found in &mut self.objects {
            if found.key.kind != ObjectKind::Namespace {
                continue;
            }
            missing.remove(&found.key.name);
            let says = [
                "/metadata/labels/weft.dev~1mesh",
                "/metadata/annotations/linkerd.io~1inject",
            ];
            if says.iter().any(|it| found.document.pointer(it).is_some()) {
                continue;
            }
            if let Some(Value::Object(metadata)) = found.document.get_mut("metadata") {
                let labels = metadata.entry("labels").or_insert(Value::Null);
                if labels.is_null() {
                    *labels = Value::Object(Map::new());
                }
                if let Some(labels) = labels.as_object_mut() {
                    labels.insert("weft.dev/mesh".into(), "enabled".into());
                }
            }
        }
        for name in missing {
            let document = json!({
                "apiVersion": "v1", "kind": "Namespace",
                "metadata": {"name": name.as_str(), "labels": {"weft.dev/mesh": "enabled"}},
            });
            let origin = Origin {
                place: "--assume-meshed".into(),
                document: None,
            };
            self.objects.push(Found {
                key: ObjectKey {
                    kind: ObjectKind::Namespace,
                    namespace: None,
                    name,
                },
                document,
                origin,
            });
        }
    }

    fn finish(self) -> Result<Manifests, ManifestError> {
        let mut manifests = self.manifests;
        for Found {
            key,
            document,
            origin,
        } in self.objects
        {
            match Event::read(key, Arc::new(document), origin.clone()) {
                Event::Invalid { fault, .. } => return Err(object_error(&origin, fault)),
                event => manifests.events.push(event),
            }
        }
        // In this order an index takes them in most cheaply.
        manifests.events.sort_by_key(|it| it.key().kind);
        Ok(manifests)
    }
}

/// Where a kind of workload says what its pods are.
#[derive(Clone, Copy)]
struct Template {
    kind: TargetKind,
    /// The kind as owners are named.
    owner: &'static str,
    pointer: &'static str,
}

impl Template {
    fn of(api_version: &str, kind: &str) -> Option<Self> {
        let group = api_version.split_once('/').map_or("", |(group, _)| group);
        let (is, owner) = match (group, kind) {
            ("apps", "Deployment") => (TargetKind::Deployment, "Deployment"),
            ("apps", "StatefulSet") => (TargetKind::StatefulSet, "StatefulSet"),
            ("apps", "DaemonSet") => (TargetKind::DaemonSet, "DaemonSet"),
            ("apps", "ReplicaSet") => (TargetKind::ReplicaSet, "ReplicaSet"),
            ("batch", "Job") => (TargetKind::Job, "Job"),
            ("batch", "CronJob") => (TargetKind::CronJob, "CronJob"),
            _ => return None,
        };
        let pointer = match is {
            TargetKind::CronJob => "/spec/jobTemplate/spec/template",
            _ => "/spec/template",
        };
        Some(Self {
            kind: is,
            owner,
            pointer,
        })
    }

    fn field(self) -> &'static str {
        match self.kind {
            TargetKind::CronJob => "spec.jobTemplate.spec.template",
            _ => "spec.template",
        }
    }
}

fn ports_of(pod: &Value) -> Vec<(String, u16)> {
    let containers = |field: &str| {
        let list = pod.pointer(field).and_then(Value::as_array);
        list.into_iter().flatten()
    };
    let all = containers("/spec/containers").chain(containers("/spec/initContainers"));
    let ports = all.filter_map(|it| it.get("ports")?.as_array());
    let named = |port: &Value| {
        let number = port.get("containerPort")?.as_u64()?;
        let name = port.get("name")?.as_str()?;
        Some((name.to_owned(), u16::try_from(number).ok()?))
    };
    ports.flatten().filter_map(named).collect()
}

fn text<'a>(document: &'a Value, pointer: &str) -> Option<&'a str> {
    document.pointer(pointer).and_then(Value::as_str)
}

fn shown(origin: &Origin) -> String {
    match origin.document {
        Some(number) => format!("{} (document {number})", origin.place),
        None => origin.place.to_string(),
    }
}

fn object_error(origin: &Origin, fault: Fault) -> ManifestError {
    ManifestError::Object {
        place: origin.place.to_string(),
        document: origin.document.unwrap_or(1),
        fault,
    }
}
