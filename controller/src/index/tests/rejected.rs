//! What agents reject is said of the objects that it is made of, and of no others.

use super::*;

const SHOP: &str = "
---
{apiVersion: v1, kind: Namespace, metadata: {name: shop, labels: {weft.dev/mesh: enabled}}}
---
{apiVersion: v1, kind: Pod, metadata: {name: web, namespace: shop, labels: {app: web}},
  spec: {nodeName: one, containers: [{name: c}]}, status: {podIPs: [{ip: 10.1.0.1}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: web, namespace: shop},
  spec: {clusterIP: 10.2.0.1, selector: {app: web}, ports: [{port: 80}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: api, namespace: shop},
  spec: {clusterIP: 10.2.0.2, selector: {app: web}, ports: [{port: 80}]}}
---
{apiVersion: policy.weft.dev/v1alpha1, kind: Server, metadata: {name: web, namespace: shop},
  spec: {podSelector: {matchLabels: {app: web}}, port: 80, proxyProtocol: HTTP/1}}
---
{apiVersion: policy.weft.dev/v1alpha1, kind: AuthorizationPolicy, metadata: {name: open, namespace: shop},
  spec: {targetRef: {group: policy.weft.dev, kind: Server, name: web},
    requiredAuthenticationRefs: [{kind: MeshTLSAuthentication, name: staff}, {kind: NetworkAuthentication, name: office}]}}
---
{apiVersion: policy.weft.dev/v1alpha1, kind: MeshTLSAuthentication, metadata: {name: staff, namespace: shop},
  spec: {identities: ['*']}}
---
{apiVersion: policy.weft.dev/v1alpha1, kind: NetworkAuthentication, metadata: {name: office, namespace: shop},
  spec: {networks: [{cidr: 10.0.0.0/8}]}}
---
{apiVersion: policy.weft.dev/v1alpha1, kind: MeshTLSAuthentication, metadata: {name: nobodys, namespace: shop},
  spec: {identities: ['*']}}
---
{apiVersion: policy.weft.dev/v1alpha1, kind: HTTPLocalRateLimitPolicy, metadata: {name: few, namespace: shop},
  spec: {targetRef: {kind: Server, name: web}, total: {requestsPerSecond: 5}}}
---
{apiVersion: policy.weft.dev/v1alpha1, kind: HTTPLocalRateLimitPolicy, metadata: {name: more, namespace: shop},
  spec: {targetRef: {kind: Server, name: web}, total: {requestsPerSecond: 9}}}
---
{apiVersion: policy.weft.dev/v1alpha1, kind: Server, metadata: {name: other, namespace: shop},
  spec: {podSelector: {matchLabels: {app: web}}, port: 81}}
---
{apiVersion: gateway.networking.k8s.io/v1, kind: HTTPRoute, metadata: {name: r, namespace: shop},
  spec: {parentRefs: [{group: '', kind: Service, name: web}, {group: '', kind: Service, name: api}],
    rules: [{backendRefs: [{name: web, port: 80}]}]}}
---
{apiVersion: policy.linkerd.io/v1beta3, kind: HTTPRoute, metadata: {name: in, namespace: shop},
  spec: {parentRefs: [{group: policy.weft.dev, kind: Server, name: web}], rules: [{}]}}
";

impl Cluster {
    fn rejects(&mut self, kind: Kind, name: &str, text: Option<&str>) {
        let key = Key {
            kind,
            name: name.to_owned(),
        };
        self.index.rejected(vec![(key, text.map(str::to_owned))]);
    }

    /// Of what it is said that agents reject it, as `kind name`, of routes with the parent.
    fn said(&self) -> Vec<String> {
        let statuses = self.index.statuses();
        let is_said = |conditions: &[Condition]| {
            let mut conditions = conditions.iter();
            let said = conditions.find(|it| it.kind == "Programmed" && it.reason == "Rejected");
            said.is_some_and(|it| !it.status && it.message.contains("strange"))
        };
        let mut said = vec![];
        for key in self.index.origins.keys() {
            let saying = statuses.of(key).now_or_never().expect("settled");
            let named = format!("{} {}", key.kind.as_str(), key.name);
            match saying.status.map(|it| it.content) {
                Some(Content::Conditions(it)) if is_said(&it) => said.push(named),
                Some(Content::Parents(parents)) => {
                    let parents = parents.iter().filter(|it| is_said(&it.conditions));
                    said.extend(parents.map(|it| format!("{named} {}", it.parent_ref.name)));
                }
                _ => {}
            }
        }
        said.sort();
        said
    }
}

#[test]
fn what_is_rejected_is_said_of_what_it_is_made_of() {
    const SERVER: &str = "policy.weft.dev/shop/web";
    let table: [(Kind, &str, &[&str]); 7] = [
        (Kind::RouteTable, "shop/api:80", &["HTTPRoute r api"]),
        (
            Kind::Server,
            SERVER,
            &[
                "AuthorizationPolicy open",
                "HTTPLocalRateLimitPolicy few",
                "HTTPRoute in web",
                "MeshTLSAuthentication staff",
                "NetworkAuthentication office",
                "Server web",
            ],
        ),
        (
            Kind::WorkloadPolicy,
            "shop/web",
            &["Server other", "Server web"],
        ),
        // Of nothing that has a status, of what is gone, and of what is no name.
        (Kind::Service, "shop/web", &[]),
        (Kind::Server, "policy.weft.dev/shop/gone", &[]),
        (Kind::RouteTable, "x", &[]),
        (Kind::Server, "", &[]),
    ];
    for (kind, name, expected) in table {
        let mut cluster = Cluster::of(SHOP);
        assert!(cluster.said().is_empty());
        cluster.rejects(kind, name, Some("strange"));
        assert_eq!(cluster.said(), expected, "{kind} {name}");
        cluster.rejects(kind, name, None);
        assert!(cluster.said().is_empty(), "{kind} {name}");
    }
}

#[test]
fn what_is_said_follows_the_objects() {
    const SERVER: &str = "policy.weft.dev/shop/web";
    let more = "{apiVersion: policy.weft.dev/v1alpha1, kind: AuthorizationPolicy, metadata: {name: more, namespace: shop},
      spec: {targetRef: {group: policy.weft.dev, kind: Server, name: web}, requiredAuthenticationRefs: []}}";
    let mut cluster = Cluster::of(SHOP);
    cluster.rejects(Kind::Server, SERVER, Some("strange"));
    let before = cluster.said();
    cluster.apply(more);
    let after = cluster.said();
    assert!(
        after.contains(&"AuthorizationPolicy more".to_owned()),
        "{after:?}"
    );
    assert_eq!(after.len(), before.len() + 1);
    cluster.delete(more);
    assert_eq!(cluster.said(), before);
    // Another object of the same name is none of it until somebody says so.
    cluster.delete(SHOP);
    cluster.rejects(Kind::Server, SERVER, None);
    cluster.apply(SHOP);
    assert!(cluster.said().is_empty());
}
