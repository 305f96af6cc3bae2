//! Which fields of objects are looked at. All others are dropped as soon as an object arrives: they would take
//! memory, and a change of one of them, as a node's heartbeat, would be work for nothing.
//!
//! What has another form than expected is left as it is, so that whoever decodes it says what is wrong.

use serde_json::Value;

use crate::index::{AMBIENT_REDIRECTION, STATIC_POD_ANNOTATIONS};
use crate::objects::ObjectKind;

/// What is kept of a value.
#[derive(Debug)]
enum Keep {
    /// All of it.
    All,
    /// Of an object, these fields.
    Fields(&'static [(&'static str, Keep)]),
    /// Of a list, this of each item.
    Each(&'static Keep),
    /// Of annotations, those that a mesh may be told by, and those of static pods.
    Annotations,
}

use Keep::{All, Annotations, Each, Fields};

/// Drops what is not looked at.
///
/// `believe_netns`: whether the annotation that says where a pod's network namespace is may stay. Whoever may write
/// a pod could have the agent take another pod's traffic for its own by it.
pub(super) fn trim(kind: ObjectKind, object: &mut Value, believe_netns: bool) {
    keep(object, kept(kind));
    let annotations = object.pointer_mut("/metadata/annotations");
    if let (false, Some(Value::Object(annotations))) = (believe_netns, annotations) {
        annotations.remove(NETNS_ANNOTATION);
    }
}

const NETNS_ANNOTATION: &str = "weft.dev/netns";

fn kept(kind: ObjectKind) -> &'static Keep {
    match kind {
        ObjectKind::Node => &NODE,
        ObjectKind::Pod => &POD,
        ObjectKind::EndpointSlice => &SLICE,
        ObjectKind::Namespace | ObjectKind::ServiceAccount => &METADATA_ONLY,
        ObjectKind::Service
        | ObjectKind::ServiceCidr
        | ObjectKind::NetworkPolicy
        | ObjectKind::Server(_)
        | ObjectKind::AuthorizationPolicy(_)
        | ObjectKind::MeshTlsAuthentication(_)
        | ObjectKind::NetworkAuthentication(_)
        | ObjectKind::HttpLocalRateLimitPolicy(_)
        | ObjectKind::EgressNetwork(_)
        | ObjectKind::Route(_)
        | ObjectKind::ReferenceGrant
        | ObjectKind::ServiceProfile => &WITH_SPEC,
        ObjectKind::Cni(_) => &OF_CNI,
    }
}

static METADATA: &[(&str, Keep)] = &[
    ("name", All),
    ("namespace", All),
    ("uid", All),
    ("labels", All),
    ("annotations", Annotations),
    ("creationTimestamp", All),
    ("deletionTimestamp", All),
    ("generation", All),
    ("ownerReferences", All),
];

static METADATA_ONLY: Keep = Fields(&[
    ("apiVersion", All),
    ("kind", All),
    ("metadata", Fields(METADATA)),
]);

static WITH_SPEC: Keep = Fields(&[
    ("apiVersion", All),
    ("kind", All),
    ("metadata", Fields(METADATA)),
    ("spec", All),
]);

/// Rules are the CNI's, and long.
static OF_CNI: Keep = Fields(&[
    ("apiVersion", All),
    ("kind", All),
    ("metadata", Fields(METADATA)),
    ("spec", SELECTORS),
    ("specs", Each(&SELECTORS)),
]);

const SELECTORS: Keep = Fields(&[
    ("endpointSelector", All),
    ("nodeSelector", All),
    ("selector", All),
    ("namespaceSelector", All),
    ("serviceAccountSelector", All),
]);

static NODE: Keep = Fields(&[
    ("apiVersion", All),
    ("kind", All),
    (
        "metadata",
        Fields(&[("name", All), ("uid", All), ("labels", All)]),
    ),
    ("spec", Fields(&[("podCIDR", All), ("podCIDRs", All)])),
]);

static POD: Keep = Fields(&[
    ("apiVersion", All),
    ("kind", All),
    ("metadata", Fields(METADATA)),
    (
        "spec",
        Fields(&[
            ("nodeName", All),
            ("serviceAccountName", All),
            ("hostNetwork", All),
            ("hostUsers", All),
            ("runtimeClassName", All),
            ("containers", Each(&CONTAINER)),
            ("initContainers", Each(&CONTAINER)),
        ]),
    ),
    (
        "status",
        Fields(&[
            ("phase", All),
            ("podIP", All),
            ("podIPs", All),
            ("conditions", Each(&CONDITION)),
            ("containerStatuses", Each(&CONTAINER_STATUS)),
            ("initContainerStatuses", Each(&CONTAINER_STATUS)),
            ("ephemeralContainerStatuses", Each(&CONTAINER_STATUS)),
        ]),
    ),
]);

static CONTAINER: Keep = Fields(&[
    ("name", All),
    ("restartPolicy", All),
    ("ports", All),
    ("livenessProbe", PROBE),
    ("readinessProbe", PROBE),
    ("startupProbe", PROBE),
]);

const PROBE: Keep = Fields(&[("httpGet", All), ("tcpSocket", All), ("grpc", All)]);

/// Its name, as there is none without.
static CONTAINER_STATUS: Keep = Fields(&[("name", All), ("containerID", All)]);

static CONDITION: Keep = Fields(&[("type", All), ("status", All)]);

static SLICE: Keep = Fields(&[
    ("apiVersion", All),
    ("kind", All),
    ("metadata", Fields(METADATA)),
    ("addressType", All),
    ("endpoints", All),
    ("ports", All),
]);

fn keep(value: &mut Value, keeps: &Keep) {
    match (keeps, value) {
        (Fields(kept), Value::Object(fields)) => {
            fields.retain(|name, value| match kept.iter().find(|(it, _)| it == name) {
                Some((_, below)) => {
                    keep(value, below);
                    true
                }
                None => false,
            });
        }
        (Each(below), Value::Array(items)) => {
            for item in items {
                keep(item, below);
            }
        }
        (Annotations, Value::Object(fields)) => fields.retain(|name, _| may_speak_to_meshes(name)),
        _ => {}
    }
}

fn may_speak_to_meshes(annotation: &str) -> bool {
    let (prefix, _) = annotation.split_once('/').unwrap_or_default();
    let below = |domain: &str| {
        let before = prefix.strip_suffix(domain);
        before.is_some_and(|it| it.is_empty() || it.ends_with('.'))
    };
    below("weft.dev")
        || below("linkerd.io")
        || prefix == "service.kubernetes.io"
        || annotation == AMBIENT_REDIRECTION
        || STATIC_POD_ANNOTATIONS.contains(&annotation)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_looked_at_stays() {
        for (kind, object, expected) in [
            (
                ObjectKind::Pod,
                json!({"apiVersion": "v1", "kind": "Pod",
                    "metadata": {"name": "a", "resourceVersion": "7", "annotations":
                        {"weft.dev/netns": "/run/a", "weft.dev/mesh": "x", "config.linkerd.io/b": "c", "ambient.istio.io/redirection": "enabled",
                         "kubernetes.io/config.hash": "h", "kubernetes.io/config.source": "file",
                         "notweft.dev/a": "b", "cni.projectcalico.org/podIP": "10.0.0.1"}},
                    "spec": {"nodeName": "one", "volumes": [1], "runtimeClassName": "kata", "hostUsers": false,
                        "containers": [{"name": "c", "image": "x", "ports": [{"containerPort": 80}],
                            "readinessProbe": {"periodSeconds": 1, "tcpSocket": {"port": 80}}}]},
                    "status": {"phase": "Running", "hostIP": "10.0.0.2", "conditions":
                        [{"type": "Ready", "status": "True", "lastProbeTime": null}],
                        "containerStatuses": [{"name": "c", "containerID": "containerd://1", "restartCount": 7}]}}),
                json!({"apiVersion": "v1", "kind": "Pod",
                    "metadata": {"name": "a", "annotations":
                        {"weft.dev/mesh": "x", "config.linkerd.io/b": "c", "kubernetes.io/config.hash": "h",
                         "ambient.istio.io/redirection": "enabled"}},
                    "spec": {"nodeName": "one", "runtimeClassName": "kata", "hostUsers": false,
                        "containers": [{"name": "c", "ports": [{"containerPort": 80}],
                            "readinessProbe": {"tcpSocket": {"port": 80}}}]},
                    "status": {"phase": "Running",
                        "conditions": [{"type": "Ready", "status": "True"}],
                        "containerStatuses": [{"name": "c", "containerID": "containerd://1"}]}}),
            ),
            // Of another form than expected: whoever decodes it says so.
            (
                ObjectKind::Pod,
                json!({"metadata": 7, "spec": {"containers": {"name": "x"}}, "status": [1]}),
                json!({"metadata": 7, "spec": {"containers": {"name": "x"}}, "status": [1]}),
            ),
            (
                ObjectKind::Node,
                json!({"metadata": {"name": "one", "annotations": {"a": "b"}, "labels": {"c": "d"}},
                    "spec": {"podCIDR": "10.0.0.0/24", "taints": []}, "status": {"images": []}}),
                json!({"metadata": {"name": "one", "labels": {"c": "d"}},
                    "spec": {"podCIDR": "10.0.0.0/24"}}),
            ),
            (
                ObjectKind::Service,
                json!({"metadata": {"name": "a"}, "spec": {"any": 1}, "status": {}}),
                json!({"metadata": {"name": "a"}, "spec": {"any": 1}}),
            ),
        ] {
            let mut object = object;
            trim(kind, &mut object, false);
            assert_eq!(object, expected);
        }
    }

    #[test]
    fn the_netns_is_believed_where_that_is_said() {
        let pod = json!({"metadata": {"annotations": {"weft.dev/netns": "/run/a"}}});
        for (believed, expected) in [(true, json!("/run/a")), (false, Value::Null)] {
            let mut pod = pod.clone();
            trim(ObjectKind::Pod, &mut pod, believed);
            assert_eq!(pod["metadata"]["annotations"]["weft.dev/netns"], expected);
        }
    }
}
