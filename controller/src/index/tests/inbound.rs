//! Routes of Servers, and what agents are told to decide by.

use super::policies::{LINKERD, NAME, POD, WEFT, authorization, server};
use super::*;

/// A route in the namespace `production`, for requests below a path.
fn route(version: &str, kind: &str, name: &str, parents: &str, more: &str) -> String {
    format!(
        "---
{{apiVersion: {version}, kind: {kind}, metadata: {{name: {name}, namespace: production}},
  spec: {{parentRefs: [{parents}], {more}}}}}
"
    )
}

const GATEWAY: &str = "gateway.networking.k8s.io/v1";
const LINKERD_ROUTE: &str = "policy.linkerd.io/v1beta3";
const PUBLIC: &str = "rules: [{matches: [{path: {value: /public}}]}]";
const PARENT: &str = "{kind: Server, group: policy.linkerd.io, name: payment-api}";

impl Cluster {
    /// What becomes of a request of an account to port 8080 of the pod: 200, 403 or 404; or 0, if it may not
    /// even connect.
    fn asks(&self, account: &str, path: &str) -> u16 {
        let told = self.told("one");
        let Some(Resource::Cluster(settings)) = self.resource(Kind::Cluster, "cluster") else {
            panic!("no settings");
        };
        let identity = format!("spiffe://cluster.local/ns/production/sa/{account}");
        let identity = identity.parse().expect("an identity");
        let client = weft_core::Client {
            address: "10.1.0.9".parse().expect("an address"),
            identity: Some(&identity),
        };
        let policy = self.policy(NAME);
        let binding = policy.servers.iter().find(|it| it.port == 8080);
        let name = &binding.expect("a Server").server;
        let servers = told.values().filter_map(|it| match it {
            Resource::Server(it) => Some(it),
            _ => None,
        });
        let server = servers.into_iter().find(|it| it.name == *name);
        let verdict =
            weft_core::authorize(&settings, Some(&policy), |_| server, |_| None, 8080, client);
        if !verdict.admits_requests() {
            return 0;
        }
        let uri = format!("http://payment{path}");
        let (head, ()) = http::Request::get(uri)
            .body(())
            .expect("valid")
            .into_parts();
        let server = server.expect("it admits");
        match weft_core::authorize_request(&settings, server, client, &head, false) {
            Ok(_) => 200,
            Err(weft_core::RequestDenial::Denied { .. }) => 403,
            Err(weft_core::RequestDenial::NotFound) => 404,
        }
    }
}

fn linkerd_server() -> String {
    server(&format!("{LINKERD}/v1beta3"), "port: 8080")
}

fn for_route(target: &str) -> String {
    authorization(LINKERD, target, "{kind: ServiceAccount, name: order}")
}

/// (version and kind of the route, its parent, the policy's target) -> whether it opens /public
#[test]
fn policies_open_routes() {
    for (version, kind, parent, target, opens) in [
        (
            GATEWAY,
            "HTTPRoute",
            PARENT,
            "group: gateway.networking.k8s.io, kind: HTTPRoute, name: r",
            true,
        ),
        (
            GATEWAY,
            "HTTPRoute",
            PARENT,
            "kind: HTTPRoute, name: r",
            true,
        ),
        (
            LINKERD_ROUTE,
            "HTTPRoute",
            PARENT,
            "group: policy.linkerd.io, kind: HTTPRoute, name: r",
            true,
        ),
        (
            LINKERD_ROUTE,
            "HTTPRoute",
            PARENT,
            "kind: HTTPRoute, name: r",
            true,
        ),
        (
            LINKERD_ROUTE,
            "HTTPRoute",
            "{kind: Server, name: payment-api}",
            "kind: HTTPRoute, name: r",
            true,
        ),
        // Of another kind, group or name.
        (
            LINKERD_ROUTE,
            "HTTPRoute",
            PARENT,
            "group: gateway.networking.k8s.io, kind: HTTPRoute, name: r",
            false,
        ),
        (
            GATEWAY,
            "HTTPRoute",
            PARENT,
            "kind: GRPCRoute, name: r",
            false,
        ),
        (
            GATEWAY,
            "HTTPRoute",
            PARENT,
            "kind: HTTPRoute, name: other",
            false,
        ),
        (
            GATEWAY,
            "HTTPRoute",
            PARENT,
            "group: policy.weft.dev, kind: HTTPRoute, name: r",
            false,
        ),
    ] {
        let route = route(version, kind, "r", parent, PUBLIC);
        let manifests = [POD, &linkerd_server(), &route, &for_route(target)].concat();
        let cluster = Cluster::of(&manifests);
        let expected = if opens { 200 } else { 0 };
        assert_eq!(
            cluster.asks("order", "/public/x"),
            expected,
            "{version} {target}"
        );
        assert_eq!(cluster.asks("other", "/public/x"), 0, "{version} {target}");
        if opens {
            assert_eq!(cluster.asks("order", "/private"), 404, "{version} {target}");
        }
    }
}

#[test]
fn policies_of_the_server_are_for_all_routes() {
    let route = route(GATEWAY, "HTTPRoute", "r", PARENT, PUBLIC);
    for target in [
        "kind: Server, name: payment-api",
        "kind: Namespace, name: production",
    ] {
        let cluster = Cluster::of(&[POD, &linkerd_server(), &route, &for_route(target)].concat());
        assert!(cluster.problems().is_empty(), "{:?}", cluster.problems());
        assert_eq!(cluster.asks("order", "/public"), 200, "{target}");
        assert_eq!(cluster.asks("order", "/private"), 404, "{target}");
    }
}

#[test]
fn routes_and_policies_come_and_go() {
    let route = route(GATEWAY, "HTTPRoute", "r", PARENT, PUBLIC);
    let policy = for_route("kind: HTTPRoute, name: r");
    let mut cluster = Cluster::of(&[POD, &linkerd_server()].concat());
    assert_eq!(cluster.asks("order", "/public"), 0);
    cluster.apply(&policy);
    assert_eq!(cluster.asks("order", "/public"), 0);
    assert_eq!(cluster.problems(), ["spec.targetRef: no route r is known"]);
    cluster.apply(&route);
    assert!(cluster.problems().is_empty(), "{:?}", cluster.problems());
    assert_eq!(cluster.asks("order", "/public"), 200);
    cluster.delete(&route);
    assert_eq!(cluster.asks("order", "/public"), 0);
    cluster.apply(&route);
    cluster.delete(&policy);
    assert_eq!(cluster.asks("order", "/public"), 0);
    let other = server(&format!("{WEFT}/v1alpha1"), "port: 9090");
    cluster.apply(&[other, policy].concat());
    assert_eq!(
        cluster.asks("order", "/public"),
        200,
        "the group is written"
    );
    cluster.delete(&linkerd_server());
    assert!(
        cluster
            .problems()
            .iter()
            .any(|it| it.contains("is not known"))
    );
}

/// A route that was never valid may have kept others from what it was for.
#[test]
fn a_route_that_cannot_be_used_opens_nothing() {
    let good = route(GATEWAY, "HTTPRoute", "r", PARENT, "rules: [{}]");
    let policy = for_route("kind: HTTPRoute, name: r");
    let own = authorization(
        LINKERD,
        "kind: Server, name: payment-api",
        "{kind: ServiceAccount, name: friend}",
    );
    let own = own.replace("name: access", "name: own");
    let all = [POD, &linkerd_server(), &good, &policy, &own].concat();
    for bad in [
        "rules: [{matches: [{path: {value: no-slash}}]}]",
        "rules: [{mathces: [1]}]",
        "hostnames: ['a b'], rules: [{}]",
    ] {
        let mut cluster = Cluster::of(&all);
        assert_eq!(cluster.asks("order", "/admin"), 200);
        let bad = route(GATEWAY, "HTTPRoute", "bad", PARENT, bad);
        cluster.apply(&bad);
        assert_eq!(cluster.asks("order", "/admin"), 0, "{bad}");
        assert_eq!(cluster.asks("friend", "/admin"), 200, "{bad}");
        cluster.delete(&bad);
        assert_eq!(cluster.asks("order", "/admin"), 200, "{bad}");
    }
    let without = [POD, &linkerd_server(), &own].concat();
    let mut cluster = Cluster::of(&without);
    assert_eq!(cluster.asks("friend", "/admin"), 200);
    let nameless = "{kind: Server, name: A b}";
    cluster.apply(&route(GATEWAY, "HTTPRoute", "bad", nameless, "rules: [{}]"));
    assert_eq!(cluster.asks("friend", "/admin"), 404);
    // One that was valid before stays in force.
    let mut cluster = Cluster::of(&all);
    cluster.apply(&route(
        GATEWAY,
        "HTTPRoute",
        "r",
        PARENT,
        "rules: [{mathces: [1]}]",
    ));
    assert_eq!(cluster.asks("order", "/admin"), 200);
}

/// (parent of a route, its rules) -> what is reported
#[test]
fn parents_are_checked() {
    for (kind, parent, rules, expected) in [
        (
            "TCPRoute",
            PARENT,
            "rules: [{}]",
            "spec.parentRefs[0].kind: a Server can be no parent of a TCPRoute",
        ),
        (
            "HTTPRoute",
            "{kind: Server, name: payment-api, namespace: elsewhere}",
            "rules: [{}]",
            "spec.parentRefs[0].namespace: a route is for Servers of its own namespace only",
        ),
        (
            "HTTPRoute",
            "{kind: Server, name: payment-api, port: 1}",
            "rules: [{}]",
            "spec.parentRefs[0].port: a Server has one port",
        ),
        (
            "HTTPRoute",
            "{kind: Server, name: gone}",
            "rules: [{}]",
            "spec.parentRefs[0]: Server production/gone is not known",
        ),
        (
            "HTTPRoute",
            PARENT,
            "rules: [{filters: [{type: RequestMirror, requestMirror: {backendRef: {name: a, port: 80}}}]}]",
            "spec.rules[0].filters: requests that have arrived at a Server are not mirrored",
        ),
    ] {
        let route = route(GATEWAY, kind, "r", parent, rules);
        let cluster = Cluster::of(&[POD, &linkerd_server(), &route].concat());
        let problems = cluster.problems();
        assert!(problems.iter().any(|it| it == expected), "{problems:?}");
    }
}
