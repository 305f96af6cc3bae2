//! `weft enroll`, `weft unenroll`: put what runs into the mesh, and take it out.
//!
//! Both write the label `weft.dev/mesh` on a namespace or on pods, by the API server and with the user's own rights. Who takes part before
//! and after is decided by the controller's own index, which is given the objects as they are and as they will be.

use std::collections::BTreeMap;
use std::fmt;
use std::io::Write;
use std::str::FromStr;
use std::sync::Arc;

use clap::Args;
use k8s_openapi::api::core::v1::{Namespace, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::Serialize;
use serde_json::{Value, json};
use weft_controller::index::{Index, Settings, has_other_mesh, owners};
use weft_controller::objects::decode::identify;
use weft_controller::problems::{Origin, Problems};
use weft_controller::source::Event;
use weft_controller::views::Views;
use weft_core::{Name, NameError, ObjectName};

use crate::controller::{Reach, ReachError};
use crate::outcome::Outcome;
use crate::output::{self, Cell, Format, Table, Tone, shown};

/// What `weft enroll` and `weft unenroll` are asked.
#[derive(Args, Debug)]
pub struct Enroll {
    /// What: `ns/shop`, `deploy/web`, `sts/db`, `ds/log`, `rs/x`, `job/once`, `pod/web-0`.
    #[arg(value_name = "RESOURCE")]
    pub resource: Target,
    /// The namespace of a workload. If it is not given, that of the kubeconfig's context.
    #[arg(short, long)]
    pub namespace: Option<String>,
    /// Say what would change, and change nothing.
    #[arg(long)]
    pub dry_run: bool,
    /// How the answer is written.
    #[arg(short, long, default_value = "table")]
    pub output: Format,
    /// In which cluster.
    #[command(flatten)]
    pub reach: Reach,
}

/// Which way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Into the mesh.
    In,
    /// Out of it.
    Out,
}

/// What is put in or taken out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    kind: Kind,
    name: Name,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Namespace,
    Pod,
    /// Pods with an owner of this kind, as it is called in metadata.
    Owner(&'static str),
}

/// Something that cannot be put in or taken out.
#[derive(Debug, thiserror::Error)]
pub enum TargetError {
    /// It is none of these.
    #[error(
        "{0:?} is none of ns/NAME, deploy/NAME, sts/NAME, ds/NAME, rs/NAME, job/NAME, pod/NAME"
    )]
    Form(String),
    /// It has no name that an object could have.
    #[error("{0:?} is no name: {1}")]
    Name(String, String),
}

/// Why nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum EnrollError {
    /// There is no API server.
    #[error(
        "this mesh has its objects from a directory: set the label weft.dev/mesh (enabled or disabled) there, on the Namespace or the Pod"
    )]
    Directory,
    /// There is nothing of the name.
    #[error("no pod of {0} is in the namespace {1}")]
    Nobody(Target, String),
    /// An object is not as it can be.
    #[error("{0}")]
    Object(String),
}

/// The answer.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Labels that are written.
    changes: Vec<Change>,
    /// The pods that it is about.
    pods: Vec<PodChange>,
    /// Whether nothing was written.
    dry_run: bool,
    #[serde(skip)]
    way: WayShown,
}

/// A label.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Change {
    kind: &'static str,
    namespace: Option<String>,
    name: String,
    before: Option<String>,
    after: Option<String>,
    /// Why it was not written.
    error: Option<String>,
}

/// A pod, and whether it takes part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct PodChange {
    name: String,
    before: bool,
    after: bool,
    /// Why it does not become what was asked for.
    reason: Option<&'static str>,
}

#[derive(Clone, Copy, Debug)]
struct WayShown {
    way: Way,
    of_pods: bool,
}

const LABEL: &str = "weft.dev/mesh";
const INJECT: &str = "linkerd.io/inject";
const ENABLED: &str = "enabled";
const DISABLED: &str = "disabled";

impl FromStr for Target {
    type Err = TargetError;

    fn from_str(text: &str) -> Result<Self, TargetError> {
        let form = || TargetError::Form(text.to_owned());
        let (kind, name) = text.split_once('/').ok_or_else(form)?;
        let kind = match kind.to_ascii_lowercase().as_str() {
            "ns" | "namespace" | "namespaces" => Kind::Namespace,
            "po" | "pod" | "pods" => Kind::Pod,
            "deploy" | "deployment" | "deployments" => Kind::Owner("Deployment"),
            "sts" | "statefulset" | "statefulsets" => Kind::Owner("StatefulSet"),
            "ds" | "daemonset" | "daemonsets" => Kind::Owner("DaemonSet"),
            "rs" | "replicaset" | "replicasets" => Kind::Owner("ReplicaSet"),
            "job" | "jobs" => Kind::Owner("Job"),
            _ => return Err(form()),
        };
        let named = name.parse();
        let name = named
            .map_err(|error: NameError| TargetError::Name(name.to_owned(), error.to_string()))?;
        Ok(Self { kind, name })
    }
}

impl fmt::Display for Target {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            Kind::Namespace => "Namespace",
            Kind::Pod => "Pod",
            Kind::Owner(kind) => kind,
        };
        write!(formatter, "{kind}/{}", self.name)
    }
}

impl Target {
    fn covers(&self, pod: &ObjectMeta) -> bool {
        match self.kind {
            Kind::Namespace => true,
            Kind::Pod => pod.name.as_deref() == Some(self.name.as_str()),
            Kind::Owner(kind) => owners(pod).any(|it| it == (kind, self.name.as_str())),
        }
    }
}

/// Says what changes, and changes it.
///
/// # Errors
/// There is no cluster, or it refuses.
pub async fn run(enroll: &Enroll, way: Way) -> Result<Outcome, crate::Error> {
    let cluster = enroll.reach.in_cluster().await?;
    let cluster = cluster.ok_or(EnrollError::Directory)?;
    let name = match (enroll.resource.kind, &enroll.namespace) {
        (Kind::Namespace, _) => enroll.resource.name.to_string(),
        (_, Some(namespace)) => namespace.clone(),
        (_, None) => cluster.namespace().to_owned(),
    };
    let namespace = cluster
        .read_namespace(&name)
        .await
        .map_err(ReachError::from)?;
    let pods = cluster.read_pods(&name).await.map_err(ReachError::from)?;
    let mut report = Report::new(&enroll.resource, way, &namespace, &pods, enroll.dry_run)?;
    if !enroll.dry_run {
        for change in &mut report.changes {
            let patch = json!({"metadata": {"labels": {LABEL: change.after}}});
            let (space, name) = (change.namespace.as_deref(), &change.name);
            change.error = match cluster.patch(space, name, &patch).await {
                Ok(true) => None,
                Ok(false) => Some("it is gone".to_owned()),
                Err(error) => Some(error.to_string()),
            };
        }
    }
    let is_written = report.changes.iter().all(|it| it.error.is_none());
    output::show(enroll.output, &report, &[], |out, colours| {
        report.write(out, colours)
    })?;
    Ok(Outcome::of(
        is_written && report.pods.iter().all(|it| it.reason.is_none()),
    ))
}

impl Report {
    fn new(
        target: &Target,
        way: Way,
        namespace: &Namespace,
        pods: &[Pod],
        dry_run: bool,
    ) -> Result<Self, EnrollError> {
        let space = namespace.metadata.name.clone().unwrap_or_default();
        let covered: Vec<&Pod> = pods
            .iter()
            .filter(|it| target.covers(&it.metadata))
            .collect();
        let before = taking_part(namespace, &covered)?;
        let mut changes = vec![];
        let after = if target.kind == Kind::Namespace {
            let mut changed = namespace.clone();
            let label = match way {
                Way::In => Some(ENABLED),
                // The annotation would put it back.
                Way::Out if said(&namespace.metadata.annotations, INJECT).is_some() => {
                    Some(DISABLED)
                }
                Way::Out => None,
            };
            label_as(&mut changed.metadata, label);
            changes.extend(Change::between(
                "Namespace",
                &namespace.metadata,
                &changed.metadata,
            ));
            taking_part(&changed, &covered)?
        } else {
            if covered.is_empty() {
                return Err(EnrollError::Nobody(target.clone(), space));
            }
            let mut changed: Vec<Pod> = covered.iter().map(|&it| it.clone()).collect();
            // The label would put them in beside the other mesh, with two proxies in each other's way.
            let may_change = |it: &&mut Pod| way == Way::Out || !has_other_mesh(it);
            for pod in changed.iter_mut().filter(may_change) {
                label_as(&mut pod.metadata, (way == Way::In).then_some(ENABLED));
            }
            if way == Way::Out {
                // Those that their namespace, or an annotation, puts in all the same.
                let without = taking_part(namespace, &changed.iter().collect::<Vec<_>>())?;
                for pod in &mut changed {
                    if without.get(name_of(&pod.metadata)) == Some(&true) {
                        label_as(&mut pod.metadata, Some(DISABLED));
                    }
                }
            }
            let pairs = covered.iter().zip(&changed);
            let pairs =
                pairs.filter_map(|(old, new)| Change::between("Pod", &old.metadata, &new.metadata));
            changes.extend(pairs);
            taking_part(namespace, &changed.iter().collect::<Vec<_>>())?
        };
        let pods = covered.iter().map(|pod| {
            let name = name_of(&pod.metadata);
            let is_in = |them: &BTreeMap<String, bool>| them.get(name).copied().unwrap_or_default();
            let after = is_in(&after);
            PodChange {
                name: name.to_owned(),
                before: is_in(&before),
                after,
                reason: (after != (way == Way::In)).then(|| reason(pod, way)),
            }
        });
        Ok(Self {
            pods: pods.collect(),
            changes,
            dry_run,
            way: WayShown {
                way,
                of_pods: target.kind != Kind::Namespace,
            },
        })
    }

    fn write(&self, to: &mut impl Write, colours: bool) -> std::io::Result<()> {
        let mut table = Table::new([
            "LABEL OF",
            "NOW",
            if self.dry_run { "WOULD BE" } else { "IS" },
        ]);
        for change in &self.changes {
            let object = match &change.namespace {
                Some(namespace) => format!("{} {namespace}/{}", change.kind, change.name),
                None => format!("{} {}", change.kind, change.name),
            };
            let value = |it: &Option<String>| shown(it.as_deref().unwrap_or("-"));
            let cells = [object, value(&change.before), value(&change.after)];
            let error = change.error.iter();
            let error = error.map(|it| Cell::new(shown(it)).tone(Tone::Bad));
            table.row(cells.map(Cell::from).into_iter().chain(error));
        }
        match self.changes.is_empty() {
            true => writeln!(to, "labels are as they should be")?,
            false => table.write(to, colours)?,
        }
        let moved = self.pods.iter().filter(|it| it.before != it.after).count();
        let already = self
            .pods
            .iter()
            .filter(|it| it.before == it.after && it.reason.is_none());
        let (verb, state) = match (self.way.way, self.dry_run) {
            (Way::In, false) => ("join the mesh", "in it"),
            (Way::In, true) => ("would join the mesh", "in it"),
            (Way::Out, false) => ("leave the mesh", "out of it"),
            (Way::Out, true) => ("would leave the mesh", "out of it"),
        };
        writeln!(
            to,
            "\n{moved} of {} pods {verb}, {} are {state} already; nothing restarts",
            self.pods.len(),
            already.count()
        )?;
        if self.way.way == Way::In && moved > 0 {
            writeln!(
                to,
                "connections that they have are ended once, so that they come back through the mesh"
            )?;
        }
        if self.way.of_pods {
            writeln!(
                to,
                "pods that are made later are labelled by their template (spec.template.metadata.labels): put {LABEL} there, too"
            )?;
        }
        let others = self.pods.iter().filter_map(|it| Some((it, it.reason?)));
        let mut table = Table::default();
        for (pod, reason) in others {
            table.row([
                Cell::new("‼").tone(Tone::Warn),
                Cell::new(shown(&pod.name)),
                Cell::new(reason),
            ]);
        }
        table.write(to, colours)
    }
}

impl Change {
    fn between(kind: &'static str, old: &ObjectMeta, new: &ObjectMeta) -> Option<Self> {
        let label = |it: &ObjectMeta| said(&it.labels, LABEL).map(str::to_owned);
        let (before, after) = (label(old), label(new));
        (before != after).then(|| Self {
            kind,
            namespace: old.namespace.clone(),
            name: name_of(old).to_owned(),
            before,
            after,
            error: None,
        })
    }
}

fn said<'a>(values: &'a Option<BTreeMap<String, String>>, name: &str) -> Option<&'a str> {
    values.as_ref()?.get(name).map(String::as_str)
}

fn name_of(metadata: &ObjectMeta) -> &str {
    metadata.name.as_deref().unwrap_or_default()
}

fn label_as(metadata: &mut ObjectMeta, value: Option<&str>) {
    let labels = metadata.labels.get_or_insert_default();
    match value {
        Some(value) => labels.insert(LABEL.to_owned(), value.to_owned()),
        None => labels.remove(LABEL),
    };
}

/// Which of the pods take part in the mesh. Of those that have ended, or have no node yet, nothing is known.
fn taking_part(
    namespace: &Namespace,
    pods: &[&Pod],
) -> Result<BTreeMap<String, bool>, EnrollError> {
    let (settings, views) = (Settings::default(), Arc::new(Views::default()));
    let mut index = Index::new(settings, views, Problems::default());
    let mut events = vec![event(namespace, "Namespace")?];
    for pod in pods {
        events.push(event(pod, "Pod")?);
    }
    index.apply(events.into());
    let part = pods.iter().filter_map(|pod| {
        let metadata = &pod.metadata;
        let node: Name = pod.spec.as_ref()?.node_name.as_deref()?.parse().ok()?;
        let name = ObjectName {
            namespace: metadata.namespace.as_deref()?.parse().ok()?,
            name: metadata.name.as_deref()?.parse().ok()?,
        };
        let takes_part = index.takes_part(&node, &name, metadata.uid.as_deref()?)?;
        Some((name.name.to_string(), takes_part))
    });
    Ok(part.collect())
}

fn event(object: &impl Serialize, kind: &str) -> Result<Event, EnrollError> {
    let unusable =
        |reason: String| EnrollError::Object(format!("a {kind} cannot be read: {reason}"));
    let mut document = serde_json::to_value(object).map_err(|it| unusable(it.to_string()))?;
    if let Value::Object(fields) = &mut document {
        fields.insert("apiVersion".to_owned(), "v1".into());
        fields.insert("kind".to_owned(), kind.into());
    }
    let key = identify(&document).map_err(|it| unusable(it.to_string()))?;
    let key = key.ok_or_else(|| unusable("it is none".to_owned()))?;
    let origin = Origin {
        place: kind.to_owned().into(),
        document: None,
    };
    Ok(Event::read(key, Arc::new(document), origin))
}

/// Why a pod stays what it is.
fn reason(pod: &Pod, way: Way) -> &'static str {
    let spec = pod.spec.as_ref();
    let phase = pod.status.as_ref().and_then(|it| it.phase.as_deref());
    let says = |value| {
        said(&pod.metadata.labels, LABEL) == Some(value)
            || said(&pod.metadata.annotations, INJECT) == Some(value)
    };
    if way == Way::Out {
        return "it says itself that it takes part, by label or annotation";
    }
    if spec.is_some_and(|it| it.host_network == Some(true)) {
        "it has the node's network, which is never in the mesh"
    } else if says(DISABLED) {
        "it says itself that it does not take part, by label or annotation"
    } else if matches!(phase, Some("Succeeded" | "Failed")) {
        "it has ended"
    } else if has_other_mesh(pod) {
        "it has the proxy of another mesh, and joins when it is made anew without"
    } else if spec.is_none_or(|it| it.node_name.is_none()) {
        "it has no node yet: it joins when it has"
    } else {
        "its namespace says that it does not take part"
    }
}

#[cfg(test)]
mod tests;
