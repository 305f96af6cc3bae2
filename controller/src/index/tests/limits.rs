//! HTTPLocalRateLimitPolicies.

use super::policies::{LINKERD, POD, WEFT, server};
use super::*;

fn limit(group: &str, name: &str, created: &str, spec: &str) -> String {
    format!(
        "---
{{apiVersion: {group}/v1alpha1, kind: HTTPLocalRateLimitPolicy,
  metadata: {{name: {name}, namespace: production, creationTimestamp: '{created}'}},
  spec: {{targetRef: {{kind: Server, name: payment-api}}, {spec}}}}}
"
    )
}

const OLD: &str = "2024-01-01T00:00:00Z";
const NEW: &str = "2025-01-01T00:00:00Z";

impl Cluster {
    /// The limit of the Server as `name: total/identity/overrides`.
    fn limit(&self) -> Option<String> {
        let server = self.server("policy.linkerd.io/production/payment-api")?;
        let limit = server.rate_limit?;
        let rate = |it: Option<std::num::NonZeroU32>| it.map_or(0, |it| it.get());
        let overrides = limit.overrides.iter().map(|it| {
            let clients: Vec<String> = it.clients.iter().map(ToString::to_string).collect();
            format!("{}:{}", it.requests_per_second, clients.join("+"))
        });
        let overrides: Vec<String> = overrides.collect();
        let (total, identity) = (rate(limit.total), rate(limit.identity));
        let name = &limit.name.name.name;
        Some(format!(
            "{name}: {total}/{identity}/{}",
            overrides.join(",")
        ))
    }
}

fn linkerd_server() -> String {
    server(&format!("{LINKERD}/v1beta3"), "port: 8080")
}

#[test]
fn the_oldest_policy_holds() {
    let mut cluster = Cluster::of(&[POD, &linkerd_server()].concat());
    assert_eq!(cluster.limit(), None);
    let new = limit(LINKERD, "new", NEW, "total: {requestsPerSecond: 7}");
    cluster.apply(&new);
    assert_eq!(cluster.limit().as_deref(), Some("new: 7/0/"));
    let spec = "identity: {requestsPerSecond: 5},
      overrides: [{requestsPerSecond: 9, clientRefs: [{kind: ServiceAccount, name: order}]}]";
    let old = limit(WEFT, "old", OLD, spec);
    cluster.apply(&old);
    let expected = "old: 0/5/9:spiffe://cluster.local/ns/production/sa/order";
    assert_eq!(cluster.limit().as_deref(), Some(expected));
    let reported = "spec.targetRef: Server production/payment-api has the older policy.weft.dev/production/old";
    assert_eq!(cluster.problems(), [reported]);
    cluster.delete(&old);
    assert_eq!(cluster.limit().as_deref(), Some("new: 7/0/"));
    assert!(cluster.problems().is_empty(), "{:?}", cluster.problems());
    cluster.delete(&new);
    assert_eq!(cluster.limit(), None);
}

#[test]
fn policies_wait_for_their_server() {
    let policy = limit(WEFT, "a", NEW, "total: {requestsPerSecond: 7}");
    let mut cluster = Cluster::of(&[POD, &policy].concat());
    let unknown = "spec.targetRef: Server production/payment-api is not known";
    assert_eq!(cluster.problems(), [unknown]);
    cluster.apply(&linkerd_server());
    assert!(cluster.problems().is_empty(), "{:?}", cluster.problems());
    assert_eq!(cluster.limit().as_deref(), Some("a: 7/0/"));
    // What cannot be used changes nothing.
    for bad in [
        "total: {requestsPerSecond: 0}",
        "total: {requestsPerSecond: 1000001}",
        "total: {requestPerSecond: 7}",
        "identity: {requestsPerSecond: -1}",
        "overrides: [{requestsPerSecond: 9, clientRefs: [{kind: Pod, name: order}]}]",
    ] {
        cluster.apply(&limit(WEFT, "a", NEW, bad));
        assert_eq!(cluster.problems().len(), 1, "{bad}");
        assert_eq!(cluster.limit().as_deref(), Some("a: 7/0/"), "{bad}");
    }
}
