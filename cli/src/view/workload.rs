//! What is shown as one: a Deployment with all of its pods, a pod, a namespace.

use std::fmt;

use clap::Args;

use super::{Owner, Pod};
use crate::controller::Reach;
use crate::metrics::Series;

/// What pods are shown as.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Workload {
    /// The namespace.
    pub namespace: String,
    /// `deployment`, `pod`, `namespace`, …
    pub kind: &'static str,
    /// The name.
    pub name: String,
}

/// The part of the mesh that is asked about.
#[derive(Args, Clone, Debug)]
pub struct ScopeArgs {
    /// What is shown: `deploy`, `deploy/web`, `sts`, `ds`, `job`, `pod`, `ns`; of everything that has an owner the
    /// owner, unless said.
    #[arg(value_name = "RESOURCE", value_parser = Scope::parse)]
    pub resource: Option<Scope>,
    /// The namespace. If it is not given: in a cluster that of the kubeconfig's context, or else `default`.
    #[arg(short, long)]
    pub namespace: Option<String>,
    /// All namespaces.
    #[arg(short = 'A', long, conflicts_with = "namespace")]
    pub all_namespaces: bool,
}

/// Kinds, and a name perhaps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scope {
    kind: &'static str,
    name: Option<String>,
}

/// Something that cannot be asked about.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is no kind that is measured: deploy, sts, ds, rs, job, cronjob, pod, ns")]
pub struct ScopeError(String);

/// Kinds of owners, with the labels that metrics have them under, and what they may be called.
const OWNERS: [(&str, &str, &[&str]); 6] = [
    ("deployment", "deployment", &["deploy", "deployments"]),
    ("statefulset", "statefulset", &["sts", "statefulsets"]),
    ("daemonset", "daemonset", &["ds", "daemonsets"]),
    ("replicaset", "replicaset", &["rs", "replicasets"]),
    ("job", "k8s_job", &["jobs"]),
    ("cronjob", "cronjob", &["cj", "cronjobs"]),
];
/// Owners of other kinds have this label.
const OTHER_OWNER: &str = "owner";
const POD: &str = "pod";
const NAMESPACE: &str = "namespace";
const SERVICE: &str = "service";

impl Scope {
    /// Reads a kind with a name perhaps, as kubectl has them.
    ///
    /// # Errors
    /// It is no kind that pods are shown as.
    pub fn parse(text: &str) -> Result<Self, ScopeError> {
        let (kind, name) = match text.split_once('/') {
            Some((kind, name)) if !name.is_empty() => (kind, Some(name.to_owned())),
            Some(_) => return Err(ScopeError(text.to_owned())),
            None => (text, None),
        };
        let kind = match kind.to_ascii_lowercase().as_str() {
            "po" | "pod" | "pods" => POD,
            "ns" | "namespace" | "namespaces" => NAMESPACE,
            kind => {
                let mut owners = OWNERS.iter();
                let known = owners.find(|(name, _, also)| *name == kind || also.contains(&kind));
                known.ok_or_else(|| ScopeError(text.to_owned()))?.0
            }
        };
        Ok(Self { kind, name })
    }

    /// The same, or a Service.
    ///
    /// # Errors
    /// It is neither.
    pub fn parse_end(text: &str) -> Result<Self, ScopeError> {
        match text.split_once('/') {
            Some(("svc" | "service" | "services", name)) if !name.is_empty() => Ok(Self {
                kind: SERVICE,
                name: Some(name.to_owned()),
            }),
            _ => Self::parse(text),
        }
    }

    /// The kind, and the name if there is one.
    pub fn parts(&self) -> (&'static str, Option<&str>) {
        (self.kind, self.name.as_deref())
    }
}

impl ScopeArgs {
    /// The same with a namespace, by where it is asked.
    pub async fn settled(&self, reach: &Reach) -> Self {
        let mut settled = self.clone();
        if settled.namespace.is_none() {
            settled.namespace = Some(reach.namespace().await);
        }
        settled
    }

    /// What a pod is shown as; none: it is not.
    fn shows(
        &self,
        namespace: &str,
        owner: Option<(&'static str, &str)>,
        pod: &str,
    ) -> Option<Workload> {
        let is_of_namespaces = self
            .resource
            .as_ref()
            .is_some_and(|it| it.kind == NAMESPACE);
        if !(self.all_namespaces
            || is_of_namespaces
            || self.namespace.as_deref() == Some(namespace))
        {
            return None;
        }
        let (kind, name) = match &self.resource {
            None => owner.unwrap_or((POD, pod)),
            Some(scope) if scope.kind == POD => (POD, pod),
            Some(scope) if scope.kind == NAMESPACE => (NAMESPACE, namespace),
            Some(scope) => owner.filter(|(kind, _)| *kind == scope.kind)?,
        };
        let asked = self.resource.as_ref().and_then(|it| it.name.as_deref());
        asked.is_none_or(|it| it == name).then(|| Workload {
            namespace: namespace.to_owned(),
            kind,
            name: name.to_owned(),
        })
    }

    /// What the pod is shown as that a series is of; none: it is not, or the series is of no pod.
    pub fn of_series(&self, series: &Series) -> Option<Workload> {
        let namespace = series.label("namespace")?;
        self.shows(namespace, owner_of(series), series.label("pod")?)
    }

    /// What a pod is shown as; none: it is not.
    pub fn of_pod(&self, pod: &Pod) -> Option<Workload> {
        let owner = pod.owner.as_ref().map(|owner| {
            let mut owners = OWNERS.iter();
            let known = owners.find(|(kind, ..)| *kind == owner.kind);
            (known.map_or(OTHER_OWNER, |it| it.0), owner.name.as_str())
        });
        self.shows(&pod.namespace, owner, &pod.name)
    }

    /// All namespaces, by owners.
    pub fn everything() -> Self {
        Self {
            resource: None,
            namespace: None,
            all_namespaces: true,
        }
    }
}

/// The labels that series have owners of pods under.
pub(super) fn owner_labels() -> impl Iterator<Item = &'static str> {
    OWNERS.iter().map(|it| it.1).chain([OTHER_OWNER])
}

/// Labels a series with the owner of its pod, as agents do.
pub(super) fn set_owner(series: &mut Series, owner: &Owner) {
    let mut owners = OWNERS.iter();
    let known = owners.find(|(kind, ..)| *kind == owner.kind);
    let label = known.map_or(OTHER_OWNER, |it| it.1);
    series.labels.insert(label.to_owned(), owner.name.clone());
}

fn owner_of(series: &Series) -> Option<(&'static str, &str)> {
    let mut owners = OWNERS.iter();
    let known = owners.find_map(|(kind, label, _)| Some((*kind, series.label(label)?)));
    known.or_else(|| Some((OTHER_OWNER, series.label(OTHER_OWNER)?)))
}

impl fmt::Display for Workload {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}/{}", self.kind, self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::Scrape;

    #[test]
    fn pods_are_shown_as_what_is_asked_for() {
        let line = "a{namespace=\"shop\",deployment=\"web\",pod=\"web-1\"} 1\n";
        let scrape = Scrape::read(line, |_| true);
        let series = scrape.values.keys().next().expect("one");
        let shown = |resource: Option<&str>, namespace: &str| {
            let scope = ScopeArgs {
                resource: resource.map(|it| Scope::parse(it).expect("valid")),
                namespace: Some(namespace.to_owned()),
                all_namespaces: namespace.is_empty(),
            };
            scope.of_series(series).map(|it| it.to_string())
        };
        for (resource, namespace, expected) in [
            (None, "shop", Some("deployment/web")),
            (None, "", Some("deployment/web")),
            (None, "other", None),
            (Some("deploy"), "shop", Some("deployment/web")),
            (Some("deploy/web"), "shop", Some("deployment/web")),
            (Some("deploy/api"), "shop", None),
            (Some("sts"), "shop", None),
            (Some("po"), "shop", Some("pod/web-1")),
            (Some("pod/web-1"), "shop", Some("pod/web-1")),
            (Some("ns"), "other", Some("namespace/shop")),
            (Some("ns/other"), "", None),
        ] {
            assert_eq!(
                shown(resource, namespace).as_deref(),
                expected,
                "{resource:?}"
            );
        }
        for bad in ["", "web", "svc", "deploy/"] {
            assert!(Scope::parse(bad).is_err(), "{bad:?} was accepted");
        }
    }
}
