//! Pods that another mesh has: its proxy is beside their own containers, or it redirects their connections inside of their
//! network namespace. With two of them in the way, each would take the other one for the application. So they are left to it,
//! which is said where somebody looks for them: they opt in, and are not there.

use std::collections::{BTreeSet, HashMap};

use k8s_openapi::api::core::v1::Pod;
use weft_core::{Name, ObjectName};

use super::Index;
use super::members::opts_in;
use super::pods::{MeshChoice, PodRecord, serving_containers};
use crate::problems::Notice;

/// Whether another mesh carries the pod's connections. A proxy that is alone in a pod is an application like others: a gateway.
pub fn has_other_mesh(pod: &Pod) -> bool {
    let annotations = pod.metadata.annotations.as_ref();
    let redirection = annotations.and_then(|it| it.get(AMBIENT_REDIRECTION));
    let containers = serving_containers(pod);
    let is_proxy = |it: &str| PROXIES.contains(&it);
    let proxies = containers.iter().filter(|it| is_proxy(&it.name)).count();
    redirection.is_some_and(|it| it == "enabled") || (proxies > 0 && proxies < containers.len())
}

/// All of them that would take part otherwise, or may, by namespace.
#[derive(Debug, Default)]
pub(super) struct OfOtherMeshes(HashMap<Name, Left>);

/// Those of a namespace.
#[derive(Debug, Default)]
struct Left {
    /// They opt in themselves.
    by_themselves: BTreeSet<Name>,
    /// Their namespace may.
    by_namespace: BTreeSet<Name>,
}

impl Left {
    fn of(&mut self, choice: &MeshChoice) -> Option<&mut BTreeSet<Name>> {
        match choice {
            MeshChoice::Enabled | MeshChoice::Unreadable => Some(&mut self.by_themselves),
            MeshChoice::Silent => Some(&mut self.by_namespace),
            MeshChoice::Disabled => None,
        }
    }
}

impl Index {
    /// A pod was another one, or none, before.
    pub(super) fn left_changed(&mut self, name: &ObjectName, before: Option<&PodRecord>) {
        let before = before.and_then(PodRecord::left_to_other_mesh).cloned();
        let now = self.pods.get(name);
        let now = now.and_then(PodRecord::left_to_other_mesh).cloned();
        if before == now {
            return;
        }
        let left = self.of_other_meshes.0.entry(name.namespace.clone());
        let left = left.or_default();
        if let Some(set) = before.and_then(|it| left.of(&it)) {
            set.remove(&name.name);
        }
        if let Some(set) = now.and_then(|it| left.of(&it)) {
            set.insert(name.name.clone());
        }
        if left.by_themselves.is_empty() && left.by_namespace.is_empty() {
            self.of_other_meshes.0.remove(&name.namespace);
        }
        self.dirty.left.insert(name.namespace.clone());
    }

    /// Says which pods of a namespace are left to another mesh.
    pub(super) fn report_left(&self, namespace: &Name) {
        let record = self.namespaces.get(namespace);
        let opted_in = record.is_some_and(|it| opts_in(&it.mesh));
        let left = self.of_other_meshes.0.get(namespace);
        let of_namespace = left.filter(|_| opted_in).map(|it| &it.by_namespace);
        let sets = left.map(|it| &it.by_themselves).into_iter();
        let sets: Vec<_> = sets.chain(of_namespace).collect();
        let pods = sets.iter().map(|it| it.len()).sum();
        let names = sets.into_iter().flatten();
        let notice = (pods > 0).then(|| Notice {
            namespace: namespace.to_string(),
            pods,
            examples: names.take(EXAMPLES).map(Name::to_string).collect(),
            reason: "they opt in, and have the proxy of another mesh".to_owned(),
            effect: "they are left to that, until they are made anew without".to_owned(),
        });
        self.problems.notice(namespace, notice);
    }
}

/// Names that injectors give to the container of their proxy: of Linkerd and of Istio.
const PROXIES: [&str; 2] = ["linkerd-proxy", "istio-proxy"];
/// What Istio's node agent writes on pods whose connections it has redirected (ambient mode).
pub(crate) const AMBIENT_REDIRECTION: &str = "ambient.istio.io/redirection";
/// So many pods are named.
const EXAMPLES: usize = 3;
