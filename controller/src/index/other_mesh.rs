//! Pods that another mesh has: its proxy is one of their containers, or it redirects their connections inside of their
//! network namespace. With two of them in the way, each would take the other one for the application.

use k8s_openapi::api::core::v1::{Container, Pod};

/// Whether another mesh carries the pod's connections.
pub(super) fn has_other_mesh(pod: &Pod, containers: &[&Container]) -> bool {
    let annotations = pod.metadata.annotations.as_ref();
    let redirection = annotations.and_then(|it| it.get(AMBIENT_REDIRECTION));
    redirection.is_some_and(|it| it == "enabled")
        || containers
            .iter()
            .any(|it| PROXIES.contains(&it.name.as_str()))
}

/// Names that injectors give to the container of their proxy: of Linkerd and of Istio.
const PROXIES: [&str; 2] = ["linkerd-proxy", "istio-proxy"];
/// What Istio's node agent writes on pods whose connections it has redirected (ambient mode).
pub(crate) const AMBIENT_REDIRECTION: &str = "ambient.istio.io/redirection";
