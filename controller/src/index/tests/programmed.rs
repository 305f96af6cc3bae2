//! What is part of a Server is programmed when agents are told of it, and says why if they are not.

use super::*;

const SERVER: &str = "
---
{apiVersion: policy.weft.dev/v1alpha1, kind: Server, metadata: {name: web, namespace: shop},
  spec: {podSelector: {}, port: 80, proxyProtocol: HTTP/1}}
";

const OPEN: &str = "
---
{apiVersion: policy.weft.dev/v1alpha1, kind: AuthorizationPolicy, metadata: {name: open, namespace: shop},
  spec: {targetRef: {kind: Server, name: web},
    requiredAuthenticationRefs: [{kind: MeshTLSAuthentication, name: staff}, {kind: NetworkAuthentication, name: staff}]}}
";

const MESH_TLS: &str = "
---
{apiVersion: policy.weft.dev/v1alpha1, kind: MeshTLSAuthentication, metadata: {name: staff, namespace: shop},
  spec: {identities: ['*']}}
";

const NETWORK: &str = "
---
{apiVersion: policy.weft.dev/v1alpha1, kind: NetworkAuthentication, metadata: {name: staff, namespace: shop},
  spec: {networks: [{cidr: 10.0.0.0/8}]}}
";

impl Cluster {
    /// What is said of an object: of each condition the reason if it does not hold, after its type.
    fn conditions(&self, manifest: &str) -> String {
        let document = decode::documents(manifest).expect("YAML").remove(0);
        let key = decode::identify(&document).expect("valid").expect("ours");
        let saying = self.index.statuses().of(&key).now_or_never();
        let status = saying.expect("settled").status.expect("one");
        let Content::Conditions(conditions) = status.content else {
            panic!("a route");
        };
        let shown = conditions.iter().map(|it| match it.status {
            true => it.kind.to_owned(),
            false => format!("{}!{}", it.kind, it.reason),
        });
        shown.collect::<Vec<String>>().join(" ")
    }
}

#[test]
fn an_authentication_is_programmed_when_a_policy_names_it() {
    const UNUSED: &str = "Accepted Programmed!Unused";
    const USED: &str = "Accepted Programmed";
    let both = |cluster: &Cluster| [MESH_TLS, NETWORK].map(|it| cluster.conditions(it));
    let mut cluster = Cluster::of(&[MESH_TLS, NETWORK, SERVER].concat());
    assert_eq!(both(&cluster), [UNUSED; 2]);
    assert!(cluster.problems().is_empty(), "{:?}", cluster.problems());
    cluster.apply(OPEN);
    assert_eq!(both(&cluster), [USED; 2]);
    // One of them only, by another version of the policy.
    cluster.apply(&OPEN.replace(", {kind: NetworkAuthentication, name: staff}", ""));
    assert_eq!(both(&cluster), [USED, UNUSED]);
    cluster.apply(OPEN);
    cluster.delete(OPEN);
    assert_eq!(both(&cluster), [UNUSED; 2]);
    // Written after the policy that names it.
    cluster.delete(MESH_TLS);
    cluster.apply(OPEN);
    cluster.apply(MESH_TLS);
    assert_eq!(both(&cluster), [USED; 2]);
    // What the policy is for comes and goes.
    cluster.delete(SERVER);
    assert_eq!(both(&cluster), [UNUSED; 2]);
    cluster.apply(SERVER);
    assert_eq!(both(&cluster), [USED; 2]);
    // A policy that means that of its own group.
    let linkerd = |it: &str| it.replace("policy.weft.dev", "policy.linkerd.io");
    cluster.delete(OPEN);
    cluster.apply(&linkerd(OPEN));
    assert_eq!(both(&cluster), [USED; 2], "the other group has none");
    cluster.apply(&linkerd(MESH_TLS));
    assert_eq!(both(&cluster), [UNUSED, USED]);
    cluster.delete(&linkerd(MESH_TLS));
    assert_eq!(both(&cluster), [USED; 2]);
}

#[test]
fn a_policy_is_programmed_when_what_it_is_for_is_there() {
    const GOOD: &str = "Accepted Programmed ResolvedRefs";
    const LOST: &str = "Accepted!TargetNotFound Programmed!TargetNotFound ResolvedRefs!RefNotFound";
    const ROUTE: &str = "
---
{apiVersion: gateway.networking.k8s.io/v1, kind: HTTPRoute, metadata: {name: web, namespace: shop},
  spec: {parentRefs: [{group: policy.weft.dev, kind: Server, name: web}]}}
";
    let of_route = OPEN.replace(
        "{kind: Server, name: web}",
        "{group: gateway.networking.k8s.io, kind: HTTPRoute, name: web}",
    );
    let all = [MESH_TLS, NETWORK].concat();
    let mut cluster = Cluster::of(&[&all, OPEN].concat());
    assert_eq!(cluster.conditions(OPEN), LOST);
    assert_eq!(
        cluster.problems(),
        ["spec.targetRef: Server shop/web is not known"]
    );
    cluster.apply(SERVER);
    assert_eq!(cluster.conditions(OPEN), GOOD);
    assert!(cluster.problems().is_empty(), "{:?}", cluster.problems());
    // What it requires is another matter: it is in force, and opens nothing.
    cluster.delete(NETWORK);
    let open = "Accepted Programmed ResolvedRefs!RefNotFound";
    assert_eq!(cluster.conditions(OPEN), open);
    cluster.apply(NETWORK);
    cluster.apply(&of_route);
    assert_eq!(cluster.conditions(&of_route), LOST);
    cluster.apply(ROUTE);
    assert_eq!(cluster.conditions(&of_route), GOOD);
    cluster.apply(&ROUTE.replace(
        "group: policy.weft.dev, kind: Server",
        "group: '', kind: Service",
    ));
    assert_eq!(cluster.conditions(&of_route), LOST, "of no Server");
    let of_namespace = OPEN.replace("{kind: Server, name: web}", "{kind: Namespace, name: shop}");
    cluster.apply(&of_namespace);
    assert_eq!(cluster.conditions(&of_namespace), GOOD);
    cluster.delete(&of_namespace);
    cluster.delete(ROUTE);
    assert!(cluster.problems().is_empty(), "{:?}", cluster.problems());
}

#[test]
fn a_rate_limit_is_programmed_when_it_holds() {
    let limit = |name: &str, created: &str| {
        format!(
            "{{apiVersion: policy.weft.dev/v1alpha1, kind: HTTPLocalRateLimitPolicy,
               metadata: {{name: {name}, namespace: shop, creationTimestamp: '{created}'}},
               spec: {{targetRef: {{kind: Server, name: web}}, total: {{requestsPerSecond: 7}}}}}}"
        )
    };
    let older = limit("older", "2024-01-01T00:00:00Z");
    let newer = limit("newer", "2025-01-01T00:00:00Z");
    let mut cluster = Cluster::of(&newer);
    let missing = "Accepted!TargetNotFound Programmed!TargetNotFound ResolvedRefs!RefNotFound";
    assert_eq!(cluster.conditions(&newer), missing);
    cluster.apply(SERVER);
    let good = "Accepted Programmed ResolvedRefs";
    assert_eq!(cluster.conditions(&newer), good);
    cluster.apply(&older);
    let second = "Accepted!Conflicted Programmed!Conflicted ResolvedRefs";
    assert_eq!(cluster.conditions(&newer), second);
    assert_eq!(cluster.conditions(&older), good);
    cluster.delete(&older);
    assert_eq!(cluster.conditions(&newer), good);
}
