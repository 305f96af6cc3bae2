use weft_core::{Authentication, Client, ProxyProtocol, Verdict, authorize};

use super::*;

/// The pair as people write it: references without a group.
const PAIR: &str = "
---
apiVersion: policy.linkerd.io/v1beta1
kind: Server
metadata: {name: payment-api, namespace: production}
spec:
  podSelector: {matchLabels: {app: payment}}
  port: 8080
  proxyProtocol: HTTP/2
---
apiVersion: policy.linkerd.io/v1alpha1
kind: AuthorizationPolicy
metadata: {name: payment-access, namespace: production}
spec:
  targetRef: {kind: Server, name: payment-api}
  requiredAuthenticationRefs:
  - {kind: ServiceAccount, name: order-service, namespace: production}
";

pub(super) const POD: &str = "
---
apiVersion: v1
kind: Pod
metadata:
  {name: payment-0, namespace: production, labels: {app: payment, weft.dev/mesh: enabled}}
spec:
  nodeName: one
  containers:
  - {name: c, ports: [{name: http, containerPort: 8080}, {name: admin, containerPort: 9090}]}
status: {podIPs: [{ip: 10.1.0.1}]}
";

pub(super) const NAME: &str = "production/payment-0";

impl Cluster {
    /// What the agent decides about a client at a port of the pod.
    fn verdict(&self, port: u16, client: Option<&str>, address: &str) -> Verdict {
        let told = self.told("one");
        let Some(Resource::Cluster(settings)) = self.resource(Kind::Cluster, "cluster") else {
            panic!("no settings");
        };
        let identity = client.map(|it| it.parse().expect("an identity"));
        let client = Client {
            address: address.parse().expect("an address"),
            identity: identity.as_ref(),
        };
        let servers: BTreeMap<_, _> = told
            .values()
            .filter_map(|it| match it {
                Resource::Server(it) => Some((&it.name, it)),
                _ => None,
            })
            .collect();
        let find = |name: &ServerName| servers.get(name).copied();
        authorize(
            &settings,
            Some(&self.policy(NAME)),
            find,
            |_| None,
            port,
            client,
        )
    }

    pub(super) fn allows(&self, port: u16, account: Option<&str>) -> bool {
        let identity = account.map(|it| {
            let (namespace, account) = it.split_once('/').expect("namespace/account");
            format!("spiffe://cluster.local/ns/{namespace}/sa/{account}")
        });
        self.verdict(port, identity.as_deref(), "10.1.0.9")
            .is_allowed()
    }
}

pub(super) fn server(group: &str, more: &str) -> String {
    format!(
        "---
{{apiVersion: {group}, kind: Server, metadata: {{name: payment-api, namespace: production}},
  spec: {{podSelector: {{matchLabels: {{app: payment}}}}, {more}}}}}
"
    )
}

pub(super) fn authorization(group: &str, target: &str, required: &str) -> String {
    format!(
        "---
{{apiVersion: {group}/v1alpha1, kind: AuthorizationPolicy,
  metadata: {{name: access, namespace: production}},
  spec: {{targetRef: {{{target}}}, requiredAuthenticationRefs: [{required}]}}}}
"
    )
}

pub(super) const LINKERD: &str = "policy.linkerd.io";
pub(super) const WEFT: &str = "policy.weft.dev";

#[test]
fn the_pair_works_as_written() {
    for pair in [
        PAIR.to_owned(),
        PAIR.replace("policy.linkerd.io/v1beta1", "policy.linkerd.io/v1beta3"),
        PAIR.replace("policy.linkerd.io/v1beta1", "policy.weft.dev/v1alpha1")
            .replace("policy.linkerd.io/v1alpha1", "policy.weft.dev/v1alpha1"),
    ] {
        let cluster = Cluster::of(&(POD.to_owned() + &pair));
        assert!(cluster.problems().is_empty(), "{:?}", cluster.problems());
        assert!(cluster.allows(8080, Some("production/order-service")));
        assert!(!cluster.allows(8080, Some("production/other")));
        assert!(!cluster.allows(8080, Some("elsewhere/order-service")));
        assert!(!cluster.allows(8080, None));
        assert!(cluster.allows(9090, None), "no Server selects this port");
        let verdict = cluster.verdict(
            8080,
            Some("spiffe://cluster.local/ns/production/sa/order-service"),
            "10.1.0.9",
        );
        assert_eq!(verdict.by(), "production/payment-access");
    }
    let cluster = Cluster::of(&(POD.to_owned() + PAIR));
    let server = cluster.server("policy.linkerd.io/production/payment-api");
    assert_eq!(server.expect("told").proxy_protocol, ProxyProtocol::Http2);
}

#[test]
fn servers_go_where_their_pods_are() {
    let elsewhere = POD.replace("nodeName: one", "nodeName: two");
    let mut cluster = Cluster::of(&(elsewhere + PAIR));
    assert!(cluster.names("one", Kind::Server).is_empty());
    assert_eq!(cluster.names("two", Kind::Server).len(), 1);
    cluster.apply(POD);
    assert_eq!(cluster.names("one", Kind::Server).len(), 1);
    assert!(cluster.names("two", Kind::Server).is_empty());
    cluster.apply(&POD.replace("app: payment", "app: else"));
    assert!(cluster.names("one", Kind::Server).is_empty());
    cluster.apply(POD);
    cluster.delete(POD);
    assert!(cluster.names("one", Kind::Server).is_empty());
    assert!(cluster.names("one", Kind::WorkloadPolicy).is_empty());
}

#[test]
fn servers_select_pods_and_ports() {
    let selecting = |selector: &str, port: &str| {
        server("policy.weft.dev/v1alpha1", &format!("port: {port}")).replace(
            "podSelector: {matchLabels: {app: payment}}",
            &format!("podSelector: {selector}"),
        )
    };
    let expression = "{matchExpressions: [{key: app, operator: In, values: [payment, order]}]}";
    for (selector, port, ports) in [
        ("{}", "8080", vec![8080]),
        ("{}", "http", vec![8080]),
        ("{}", "absent", vec![]),
        (expression, "admin", vec![9090]),
        (
            "{matchExpressions: [{key: app, operator: NotIn, values: [payment]}]}",
            "8080",
            vec![],
        ),
        ("{matchLabels: {app: order}}", "8080", vec![]),
    ] {
        let cluster = Cluster::of(&(POD.to_owned() + &selecting(selector, port)));
        let bound = cluster.policy(NAME).servers;
        let bound: Vec<_> = bound.iter().map(|it| it.port).collect();
        assert_eq!(bound, ports, "{selector} {port}");
        for port in ports {
            assert!(
                !cluster.allows(port, Some("production/order-service")),
                "closed by default"
            );
        }
    }
    let external = server("policy.linkerd.io/v1beta3", "port: 8080")
        .replace("podSelector", "externalWorkloadSelector");
    let cluster = Cluster::of(&(POD.to_owned() + &external));
    assert!(cluster.policy(NAME).servers.is_empty());
    assert!(cluster.problems().is_empty());
}

#[test]
fn the_oldest_server_has_the_port() {
    let named = |name: &str, created: &str| {
        server("policy.weft.dev/v1alpha1", "port: 8080")
            .replace("{name: payment-api,", &format!("{{name: {name}, {created}"))
    };
    let old = named("z-old", "creationTimestamp: '2026-01-01T00:00:00Z',");
    let new = named("a-new", "creationTimestamp: '2026-01-02T00:00:00Z',");
    let ageless = named("a-less", "");
    let mut cluster = Cluster::of(&(POD.to_owned() + &new + &old + &ageless));
    let bound = |cluster: &Cluster| cluster.policy(NAME).servers[0].server.name.name.to_string();
    assert_eq!(bound(&cluster), "z-old");
    let problems = cluster.problems();
    assert_eq!(problems.len(), 2, "{problems:?}");
    assert!(problems[0].contains("is governed by the older policy.weft.dev/production/z-old"));
    cluster.delete(&old);
    assert_eq!(bound(&cluster), "a-new");
    assert_eq!(cluster.problems().len(), 1);
    cluster.delete(&new);
    assert_eq!(bound(&cluster), "a-less");
    assert!(cluster.problems().is_empty());
}

#[test]
fn defaults_come_from_pod_namespace_or_flag() {
    let pod = |annotation: &str| {
        POD.replace(
            "{name: payment-0,",
            &format!("{{name: payment-0, {annotation}"),
        )
    };
    let namespace = |annotation: &str| {
        format!(
            "---\n{{apiVersion: v1, kind: Namespace, metadata: {{name: production, {annotation}}}}}\n"
        )
    };
    let linkerd = |policy: &str| {
        format!("annotations: {{config.linkerd.io/default-inbound-policy: {policy}}},")
    };
    let weft =
        |policy: &str| format!("annotations: {{weft.dev/default-inbound-policy: {policy}}},");
    use AccessPolicy::*;
    for (of_pod, of_namespace, expected) in [
        (String::new(), String::new(), AllUnauthenticated),
        (String::new(), linkerd("deny"), Deny),
        (String::new(), weft("audit"), Audit),
        (
            linkerd("all-authenticated"),
            linkerd("deny"),
            AllAuthenticated,
        ),
        (
            weft("cluster-authenticated"),
            weft("deny"),
            ClusterAuthenticated,
        ),
        (weft("nonsense"), String::new(), Deny),
        (String::new(), weft("nonsense"), Deny),
    ] {
        let cluster = Cluster::of(&(pod(&of_pod) + &namespace(&of_namespace)));
        let default = cluster.policy(NAME).default;
        assert_eq!(
            default, expected,
            "pod {of_pod:?}, namespace {of_namespace:?}"
        );
    }
    // What cannot be read leaves what was in force.
    let mut cluster = Cluster::of(&(pod("") + &namespace(&weft("audit"))));
    cluster.apply(&namespace(&weft("nonsense")));
    assert_eq!(cluster.policy(NAME).default, Audit);
    assert_eq!(cluster.problems().len(), 1);
    cluster.apply(&namespace(""));
    assert_eq!(cluster.policy(NAME).default, AllUnauthenticated);
    assert!(cluster.problems().is_empty());
}

#[test]
fn access_policies_are_taken_from_the_server() {
    for (access, allowed) in [
        ("all-unauthenticated", true),
        ("all-authenticated", false),
        ("deny", false),
    ] {
        let more = format!("port: 8080, accessPolicy: {access}");
        let cluster = Cluster::of(&(POD.to_owned() + &server("policy.linkerd.io/v1beta3", &more)));
        assert_eq!(cluster.allows(8080, None), allowed, "{access}");
    }
}

/// (group of the policy, target) -> whether it opens a Server that exists in both groups, by group
#[test]
fn targets_without_a_group_mean_the_policys_own() {
    let linkerd = server("policy.linkerd.io/v1beta1", "port: 8080");
    let weft = server("policy.weft.dev/v1alpha1", "port: 9090");
    let plain = "kind: Server, name: payment-api";
    let of_weft = "group: policy.weft.dev, kind: Server, name: payment-api";
    let of_linkerd = "group: policy.linkerd.io, kind: Server, name: payment-api";
    let of_namespace = "kind: Namespace, name: production";
    for (group, target, servers, opens) in [
        (LINKERD, plain, [true, true], [true, false]),
        (WEFT, plain, [true, true], [false, true]),
        (LINKERD, plain, [false, true], [false, true]),
        (WEFT, plain, [true, false], [true, false]),
        (LINKERD, of_weft, [true, true], [false, true]),
        (WEFT, of_linkerd, [true, true], [true, false]),
        (WEFT, of_linkerd, [false, true], [false, false]),
        (LINKERD, of_namespace, [true, true], [true, true]),
        (
            WEFT,
            "group: core, kind: Namespace, name: production",
            [true, true],
            [true, true],
        ),
        (
            LINKERD,
            "kind: Server, name: other",
            [true, true],
            [false, false],
        ),
        (
            LINKERD,
            "kind: Namespace, name: elsewhere",
            [true, true],
            [false, false],
        ),
        (
            LINKERD,
            "group: apps, kind: Server, name: payment-api",
            [true, true],
            [false, false],
        ),
        (
            LINKERD,
            "kind: Server, name: payment-api, namespace: elsewhere",
            [true, true],
            [false, false],
        ),
        (
            LINKERD,
            "group: policy.weft.dev, kind: HTTPRoute, name: r",
            [true, true],
            [false, false],
        ),
        (
            WEFT,
            "group: policy.linkerd.io, kind: GRPCRoute, name: r",
            [true, true],
            [false, false],
        ),
    ] {
        let mut cluster = Cluster::of(POD);
        cluster.apply(&authorization(
            group,
            target,
            "{kind: ServiceAccount, name: order}",
        ));
        for (present, server) in servers.into_iter().zip([&linkerd, &weft]) {
            if present {
                cluster.apply(server);
            }
        }
        for (port, (present, opens)) in [8080, 9090].into_iter().zip(servers.into_iter().zip(opens))
        {
            if present {
                let allowed = cluster.allows(port, Some("production/order"));
                assert_eq!(
                    allowed, opens,
                    "{group} {{{target}}} {servers:?} port {port}"
                );
                assert!(!cluster.allows(port, None));
            }
        }
        assert_eq!(
            cluster.problems().is_empty(),
            opens != [false, false],
            "{target}"
        );
    }
}

#[test]
fn references_are_followed_when_there_is_something() {
    let tls = |group: &str, spec: &str| {
        format!(
            "---\n{{apiVersion: {group}/v1alpha1, kind: MeshTLSAuthentication,
             metadata: {{name: a, namespace: production}}, spec: {spec}}}\n"
        )
    };
    let order = tls(
        LINKERD,
        "{identityRefs: [{kind: ServiceAccount, name: order}]}",
    );
    let base = POD.to_owned() + &server("policy.linkerd.io/v1beta1", "port: 8080");
    for (required, authentication, allowed, problems) in [
        ("{kind: MeshTLSAuthentication, name: a}", "", false, 1),
        (
            "{kind: MeshTLSAuthentication, name: a}",
            order.as_str(),
            true,
            0,
        ),
        (
            "{kind: MeshTLSAuthentication, name: a, group: policy.linkerd.io}",
            &order,
            true,
            0,
        ),
        (
            "{kind: MeshTLSAuthentication, name: a, group: policy.weft.dev}",
            &order,
            false,
            1,
        ),
        (
            "{kind: MeshTLSAuthentication, name: a, namespace: production}",
            &order,
            true,
            0,
        ),
        (
            "{kind: MeshTLSAuthentication, name: a, namespace: elsewhere}",
            &order,
            false,
            1,
        ),
        (
            "{kind: MeshTLSAuthentication, name: a}",
            &order.replace(LINKERD, WEFT),
            true,
            0,
        ),
        ("{kind: ServiceAccount, name: order}", "", true, 0),
        (
            "{kind: ServiceAccount, name: order, group: ''}",
            "",
            true,
            0,
        ),
        (
            "{kind: ServiceAccount, name: order, group: core}",
            "",
            true,
            0,
        ),
        (
            "{kind: ServiceAccount, name: order, group: apps}",
            "",
            false,
            1,
        ),
        (
            "{kind: ServiceAccount, name: order, namespace: elsewhere}",
            "",
            false,
            0,
        ),
        ("{kind: Namespace, name: production}", "", true, 0),
        ("{kind: Namespace, name: elsewhere}", "", false, 0),
        ("{kind: User, name: somebody}", "", false, 1),
        (
            "{kind: ServiceAccount, name: order}, {kind: User, name: somebody}",
            "",
            false,
            1,
        ),
        (
            "{kind: ServiceAccount, name: order}, {kind: ServiceAccount, name: other}",
            "",
            false,
            0,
        ),
        ("", "", true, 0),
    ] {
        let mut cluster = Cluster::of(&base);
        let target = "kind: Server, name: payment-api";
        cluster.apply(&authorization(LINKERD, target, required));
        if !authentication.is_empty() {
            // Later, as it happens.
            cluster.apply(authentication);
        }
        assert_eq!(
            cluster.allows(8080, Some("production/order")),
            allowed,
            "{required}"
        );
        assert_eq!(
            cluster.problems().len(),
            problems,
            "{required}: {:?}",
            cluster.problems()
        );
        if !authentication.is_empty() {
            cluster.delete(authentication);
            assert!(
                !cluster.allows(8080, Some("production/order")),
                "{required}"
            );
        }
    }
}

#[test]
fn what_is_not_known_is_named_to_the_agent() {
    let required = "{kind: MeshTLSAuthentication, name: later}";
    let target = "kind: Server, name: payment-api";
    let cluster = Cluster::of(
        &(POD.to_owned()
            + &server("policy.linkerd.io/v1beta1", "port: 8080")
            + &authorization(LINKERD, target, required)),
    );
    let server = cluster
        .server("policy.linkerd.io/production/payment-api")
        .expect("told");
    assert_eq!(
        server.authorizations[0].required,
        [Authentication::Unknown(
            "MeshTLSAuthentication production/later".to_owned()
        )]
    );
}

#[test]
fn identities_are_read_as_people_write_them() {
    let base = POD.to_owned()
        + &server("policy.weft.dev/v1alpha1", "port: 8080")
        + &authorization(
            WEFT,
            "kind: Server, name: payment-api",
            "{kind: MeshTLSAuthentication, name: a}",
        );
    let order = "production/order";
    for (identities, who, allowed) in [
        ("identities: ['*']", Some(order), true),
        ("identities: ['*']", None, false),
        (
            "identities: ['spiffe://cluster.local/ns/production/sa/order']",
            Some(order),
            true,
        ),
        (
            "identities: ['spiffe://cluster.local/ns/production/sa/order']",
            Some("production/x"),
            false,
        ),
        (
            "identities: ['spiffe://other/ns/production/sa/order']",
            Some(order),
            false,
        ),
        (
            "identities: ['order.production.serviceaccount.identity.linkerd.cluster.local']",
            Some(order),
            true,
        ),
        (
            "identities: ['order.production.serviceaccount.identity.linkerd.other']",
            Some(order),
            false,
        ),
        (
            "identities: ['*.production.serviceaccount.identity.linkerd.cluster.local']",
            Some(order),
            true,
        ),
        (
            "identities: ['*.production.serviceaccount.identity.linkerd.cluster.local']",
            Some("x/order"),
            false,
        ),
        (
            "identities: ['a.b.production.serviceaccount.identity.linkerd.cluster.local']",
            Some("production/a.b"),
            true,
        ),
        (
            "identityRefs: [{kind: ServiceAccount, name: order}]",
            Some(order),
            true,
        ),
        (
            "identityRefs: [{kind: ServiceAccount, name: order, namespace: x}]",
            Some("x/order"),
            true,
        ),
        (
            "identityRefs: [{kind: Namespace, name: x}]",
            Some("x/anybody"),
            true,
        ),
        (
            "identityRefs: [{kind: Namespace, name: x}]",
            Some(order),
            false,
        ),
    ] {
        let authentication = format!(
            "{{apiVersion: policy.weft.dev/v1alpha1, kind: MeshTLSAuthentication,
              metadata: {{name: a, namespace: production}}, spec: {{{identities}}}}}"
        );
        let mut cluster = Cluster::of(&base);
        cluster.apply(&authentication);
        assert_eq!(cluster.allows(8080, who), allowed, "{identities} {who:?}");
        assert!(cluster.problems().is_empty());
    }
}

#[test]
fn networks_are_read_as_people_write_them() {
    let base = POD.to_owned()
        + &server("policy.weft.dev/v1alpha1", "port: 8080")
        + &authorization(
            WEFT,
            "kind: Server, name: payment-api",
            "{kind: NetworkAuthentication, name: n}",
        );
    for (networks, address, allowed) in [
        ("[{cidr: 10.0.0.0/8}]", "10.1.0.9", true),
        ("[{cidr: 10.0.0.0/8}]", "192.0.2.1", false),
        (
            "[{cidr: 10.0.0.0/8, except: [10.1.0.0/16]}]",
            "10.1.0.9",
            false,
        ),
        (
            "[{cidr: 10.0.0.0/8, except: [10.1.0.9]}]",
            "10.1.0.9",
            false,
        ),
        ("[{cidr: 10.1.0.9}]", "10.1.0.9", true),
        ("[{cidr: 10.1.0.9}]", "10.1.0.8", false),
        ("[{cidr: 10.1.2.3/16}]", "10.1.0.9", true),
        ("[{cidr: 'fd00::/8'}]", "fd00::1", true),
        ("[{cidr: '::ffff:10.1.0.0/112'}]", "10.1.0.9", true),
        (
            "[{cidr: 10.0.0.0/8, except: ['::ffff:10.1.0.0/112']}]",
            "10.1.0.9",
            false,
        ),
        (
            "[{cidr: 10.0.0.0/8, except: ['::ffff:10.1.0.9']}]",
            "10.1.0.9",
            false,
        ),
        // Refused as a whole: what is excepted would not be.
        ("[{cidr: '::ffff:10.0.0.0/90'}]", "10.1.0.9", false),
        (
            "[{cidr: 10.0.0.0/8, except: ['fd00::/8']}]",
            "10.1.0.9",
            false,
        ),
        (
            "[{cidr: 10.0.0.0/8, except: [192.0.2.0/24]}]",
            "10.1.0.9",
            false,
        ),
        (
            "[{cidr: 192.0.2.0/24}, {cidr: 10.1.0.0/16}]",
            "10.1.0.9",
            true,
        ),
    ] {
        let mut cluster = Cluster::of(&base);
        cluster.apply(&format!(
            "{{apiVersion: policy.weft.dev/v1alpha1, kind: NetworkAuthentication,
              metadata: {{name: n, namespace: production}}, spec: {{networks: {networks}}}}}"
        ));
        let verdict = cluster.verdict(8080, None, address);
        assert_eq!(verdict.is_allowed(), allowed, "{networks} {address}");
    }
}
