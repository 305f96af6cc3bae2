//! What is said of pods that are being started, and of namespaces that may hold meshed ones.

use super::*;

fn pod(labels: &str, spec: &str, status: &str) -> String {
    format!(
        "{{apiVersion: v1, kind: Pod, metadata: {{name: web, namespace: shop, uid: u1, labels: {{{labels}}}}},
           spec: {{nodeName: one, {spec} containers: [{{name: c}}]}}, status: {{{status}}}}}"
    )
}

fn namespace(labels: &str) -> String {
    format!("{{apiVersion: v1, kind: Namespace, metadata: {{name: shop, labels: {{{labels}}}}}}}")
}

impl Cluster {
    fn takes_part(&self, node: &str, uid: &str) -> Option<bool> {
        let (node, pod) = (
            node.parse().expect("valid"),
            "shop/web".parse().expect("valid"),
        );
        self.index.takes_part(&node, &pod, uid)
    }
}

const IN: &str = "weft.dev/mesh: enabled";
const OUT: &str = "weft.dev/mesh: disabled";

/// labels of the pod, of its namespace (none: not heard of yet), its spec, its status → whether it takes part
#[test]
fn who_takes_part() {
    for (labels, of_namespace, spec, status, expected) in [
        ("", Some(""), "", "", Some(false)),
        ("", Some(IN), "", "", Some(true)),
        ("", Some("weft.dev/mesh: mumble"), "", "", Some(true)),
        (IN, Some(""), "", "", Some(true)),
        (IN, Some(OUT), "", "", Some(true)),
        (OUT, Some(IN), "", "", Some(false)),
        // What its namespace says may be on its way.
        ("", None, "", "", None),
        (IN, None, "", "", Some(true)),
        (OUT, None, "", "", Some(false)),
        (IN, Some(IN), "hostNetwork: true,", "", Some(false)),
        (IN, Some(IN), "", "phase: Failed", None),
        ("", Some(""), "", "phase: Succeeded", None),
    ] {
        let mut cluster = Cluster::of(&pod(labels, spec, status));
        if let Some(labels) = of_namespace {
            cluster.apply(&namespace(labels));
        }
        let case = format!("{labels:?} {of_namespace:?} {spec} {status}");
        assert_eq!(cluster.takes_part("one", "u1"), expected, "{case}");
        // Neither an earlier pod of that name, nor one of another node.
        assert_eq!(cluster.takes_part("one", "u0"), None, "{case}");
        assert_eq!(cluster.takes_part("two", "u1"), None, "{case}");
    }
    assert_eq!(Cluster::new().takes_part("one", "u1"), None);
}

#[test]
fn namespaces_that_may_hold_meshed_pods_are_told() {
    let mut cluster = Cluster::new();
    let told = |cluster: &Cluster| cluster.names("one", Kind::MeshNamespace);
    cluster.apply(&namespace(""));
    cluster.apply(&pod("", "", ""));
    assert!(told(&cluster).is_empty());
    cluster.apply(&namespace(IN));
    assert_eq!(told(&cluster), ["shop"]);
    cluster.apply(&pod(IN, "", ""));
    cluster.apply(&namespace(""));
    assert_eq!(told(&cluster), ["shop"]);
    // Whether it says so once or often.
    cluster.apply(&pod(IN, "", "phase: Running"));
    cluster.apply(&pod(OUT, "", ""));
    assert!(told(&cluster).is_empty());
    cluster.apply(&pod(IN, "", ""));
    assert_eq!(told(&cluster), ["shop"]);
    cluster.delete(&pod(IN, "", ""));
    assert!(told(&cluster).is_empty());
    cluster.apply(&namespace(IN));
    cluster.delete(&namespace(IN));
    assert!(told(&cluster).is_empty());
}
