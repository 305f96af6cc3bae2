//! Pods that another mesh has: its proxy is beside their own containers, or it redirects their connections inside of their
//! network namespace. With two of them in the way, each would take the other one for the application.

use k8s_openapi::api::core::v1::Pod;

use super::pods::serving_containers;

/// Whether another mesh carries the pod's connections. A proxy that is alone in a pod is an application like others: a gateway.
pub fn has_other_mesh(pod: &Pod) -> bool {
    let annotations = pod.metadata.annotations.as_ref();
    let redirection = annotations.and_then(|it| it.get(AMBIENT_REDIRECTION));
    let containers = serving_containers(pod);
    let is_proxy = |it: &str| PROXIES.contains(&it);
    let proxies = containers.iter().filter(|it| is_proxy(&it.name)).count();
    redirection.is_some_and(|it| it == "enabled") || (proxies > 0 && proxies < containers.len())
}

/// Names that injectors give to the container of their proxy: of Linkerd and of Istio.
const PROXIES: [&str; 2] = ["linkerd-proxy", "istio-proxy"];
/// What Istio's node agent writes on pods whose connections it has redirected (ambient mode).
pub(crate) const AMBIENT_REDIRECTION: &str = "ambient.istio.io/redirection";
