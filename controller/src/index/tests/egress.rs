//! EgressNetworks, and their routes.

use weft_core::EgressNetwork;
use weft_core::route::{RouteRules, Target};

use super::policies::{LINKERD, WEFT};
use super::*;

const OLD: &str = "2024-01-01T00:00:00Z";

fn network(group: &str, name: &str, spec: &str) -> String {
    let (namespace, name) = name.split_once('/').expect("a namespace");
    format!(
        "---
{{apiVersion: {group}/v1alpha1, kind: EgressNetwork,
  metadata: {{name: {name}, namespace: {namespace}, creationTimestamp: '{OLD}'}},
  spec: {{{spec}}}}}
"
    )
}

/// A route of the namespace `shop`, unless `name` says another.
fn route(kind: &str, name: &str, parents: &str, spec: &str) -> String {
    let (namespace, name) = name.split_once('/').unwrap_or(("shop", name));
    let version = match kind {
        "TLSRoute" | "TCPRoute" => "v1alpha2",
        _ => "v1",
    };
    format!(
        "---
{{apiVersion: gateway.networking.k8s.io/{version}, kind: {kind},
  metadata: {{name: {name}, namespace: {namespace}, generation: 3}},
  spec: {{parentRefs: [{parents}], {spec}}}}}
"
    )
}

const PROXY: &str = "---
{apiVersion: v1, kind: Service, metadata: {name: proxy, namespace: shop},
  spec: {clusterIP: 10.2.0.1, ports: [{port: 3128}]}}
";
const OUT: &str = "{group: policy.weft.dev, kind: EgressNetwork, name: out}";
const ANY: &str = "rules: [{}]";

impl Cluster {
    fn network(&self, name: &str) -> Option<EgressNetwork> {
        match self.resource(Kind::EgressNetwork, name)? {
            Resource::EgressNetwork(it) => Some(it),
            other => panic!("{other:?}"),
        }
    }

    /// The network as `Policy[ global][ networks]`.
    fn egress(&self, name: &str) -> Option<String> {
        let network = self.network(name)?;
        let it = network.settings();
        let mut shown = format!("{:?}", it.traffic_policy);
        if it.is_global {
            shown.push_str(" global");
        }
        for network in &it.networks {
            shown.push_str(&format!(" {}", network.cidr));
            for except in &network.except {
                shown.push_str(&format!("-{except}"));
            }
        }
        Some(shown)
    }

    /// Routes of `shop/out` as `name[ hosts][ ports]: backends of the first rule`.
    fn out_routes(&self) -> Vec<String> {
        let network = self.network("policy.weft.dev/shop/out").expect("is told");
        let mut shown = vec![];
        for it in network.routes() {
            let backends = match &it.route.rules {
                RouteRules::Http(rules) => rules.first().map_or(&[][..], |it| &it.backends),
                RouteRules::Flow(rule) => &rule.backends,
            };
            let target = |it: &Target| match it {
                Target::Service { name, port } => format!("{name}:{port}"),
                Target::Egress(name) => name.name.to_string(),
                Target::Invalid(_) => "invalid".to_owned(),
            };
            let backends: Vec<String> = backends.iter().map(|it| target(&it.target)).collect();
            let mut line = it.route.name.name.name.to_string();
            for host in &it.hostnames {
                line.push_str(&format!(" {host}"));
            }
            for port in &it.ports {
                line.push_str(&format!(" {port}"));
            }
            shown.push(format!("{line}: {}", backends.join(" ")));
        }
        shown
    }
}

/// (group, name, spec) -> (what agents are told, problems)
#[test]
fn networks_are_told_as_they_are_written() {
    let missing = "spec: missing field `trafficPolicy`";
    for (group, name, spec, told, problem) in [
        (WEFT, "shop/a", "trafficPolicy: Allow", "Allow", ""),
        (LINKERD, "shop/a", "trafficPolicy: Deny", "Deny", ""),
        (
            LINKERD,
            "linkerd-egress/a",
            "trafficPolicy: Deny",
            "Deny global",
            "",
        ),
        (
            WEFT,
            "shop/a",
            "trafficPolicy: Deny, networks: [{cidr: 203.0.113.0/24, except: [203.0.113.7]}, {cidr: '2001:db8::/32'}]",
            "Deny 203.0.113.0/24-203.0.113.7/32 2001:db8::/32",
            "",
        ),
        // What never could be read closes what it may mean.
        (WEFT, "shop/a", "networks: []", "Deny", missing),
        (
            WEFT,
            "linkerd-egress/a",
            "trafficPolicy: allow",
            "Deny global",
            "spec.trafficPolicy: unknown variant `allow`, expected `Allow` or `Deny`",
        ),
        (
            WEFT,
            "shop/a",
            "trafficPolicy: Allow, networks: []",
            "Deny",
            "spec.networks: empty",
        ),
        (
            WEFT,
            "shop/a",
            "trafficPolicy: Allow, networks: [{cidr: 203.0.113.0/33}]",
            "Deny",
            "spec.networks[0].cidr: \"203.0.113.0/33\" is neither a network nor an address",
        ),
        (
            WEFT,
            "shop/a",
            "trafficPolicy: Allow, networks: [{cidr: 203.0.113.0/24, exept: [203.0.113.7]}]",
            "Deny 203.0.113.0/24",
            "spec.networks[0].exept: unknown field",
        ),
        (
            WEFT,
            "shop/a",
            "trafficPolicy: Allow, networks: [{cidr: 203.0.113.0/24, except: [192.0.2.1]}]",
            "Deny",
            "spec.networks[0].except[0]: 192.0.2.1/32 lies outside of 203.0.113.0/24, so it excepts nobody",
        ),
    ] {
        let cluster = Cluster::of(&network(group, name, spec));
        let shown = cluster.egress(&format!("{group}/{name}"));
        assert_eq!(shown.as_deref(), Some(told), "{spec}");
        let problems = cluster.problems();
        assert_eq!(problems.join("; "), problem, "{spec}");
    }
}

#[test]
fn networks_change_and_go() {
    let name = "policy.weft.dev/shop/out";
    let mut cluster = Cluster::of(&network(WEFT, "shop/out", "trafficPolicy: Allow"));
    // What cannot be used changes nothing.
    cluster.apply(&network(WEFT, "shop/out", "trafficPolicy: Allowed"));
    assert_eq!(cluster.egress(name).as_deref(), Some("Allow"));
    assert_eq!(cluster.problems().len(), 1);
    let deny = network(WEFT, "shop/out", "trafficPolicy: Deny");
    cluster.apply(&deny);
    assert_eq!(cluster.egress(name).as_deref(), Some("Deny"));
    assert!(cluster.problems().is_empty(), "{:?}", cluster.problems());
    cluster.delete(&deny);
    assert_eq!(cluster.egress(name), None);
    // What closes is mended, or deleted.
    cluster.apply(&network(WEFT, "shop/out", "trafficPolicy: Allowed"));
    assert_eq!(cluster.egress(name).as_deref(), Some("Deny"));
    cluster.apply(&network(WEFT, "shop/out", "trafficPolicy: Allow"));
    assert_eq!(cluster.egress(name).as_deref(), Some("Allow"));
}

/// (kind, parents, spec) -> (the route as agents are told it, status)
#[test]
fn routes_attach_to_networks() {
    const GOOD: &str = "r@out: Accepted=Accepted, ResolvedRefs=ResolvedRefs";
    const INVALID: &str = "r@out: Accepted=Accepted, !ResolvedRefs=InvalidKind";
    const LOST: &str = "r@out: Accepted=Accepted, !ResolvedRefs=BackendNotFound";
    let to_out = format!("rules: [{{backendRefs: [{OUT}]}}]");
    let port = |it: &str| OUT.replace('}', &format!(", port: {it}}}"));
    let to_other = to_out.replace("out", "other");
    let of_host = format!("hostnames: [example.com, '*.example.com'], {ANY}");
    for (kind, parents, spec, told, status) in [
        ("HTTPRoute", OUT, ANY, "r: shop/out", GOOD),
        ("GRPCRoute", OUT, ANY, "r: shop/out", GOOD),
        ("TLSRoute", OUT, ANY, "r: shop/out", GOOD),
        ("TCPRoute", OUT, ANY, "r: shop/out", GOOD),
        ("TCPRoute", OUT, &to_out, "r: shop/out", GOOD),
        ("HTTPRoute", OUT, &to_out, "r: shop/out", GOOD),
        (
            "HTTPRoute",
            OUT,
            &of_host,
            "r example.com *.example.com: shop/out",
            GOOD,
        ),
        // Those of a TLSRoute stand in its rule.
        ("TLSRoute", OUT, &of_host, "r: shop/out", GOOD),
        ("HTTPRoute", &port("443"), ANY, "r 443: shop/out", GOOD),
        (
            "HTTPRoute",
            "{kind: EgressNetwork, name: out, namespace: shop}",
            ANY,
            "r: shop/out",
            GOOD,
        ),
        (
            "HTTPRoute",
            OUT,
            "rules: [{backendRefs: [{name: proxy, port: 3128}]}]",
            "r: shop/proxy:3128",
            GOOD,
        ),
        (
            "TCPRoute",
            OUT,
            "rules: [{backendRefs: [{name: gone, port: 3128}]}]",
            "r: invalid",
            LOST,
        ),
        ("TCPRoute", OUT, &to_other, "r: invalid", INVALID),
        (
            "HTTPRoute",
            OUT,
            "rules: [{backendRefs: [{kind: EgressNetwork, name: out}]}]",
            "r: invalid",
            INVALID,
        ),
    ] {
        let network = network(WEFT, "shop/out", "trafficPolicy: Deny");
        let route = route(kind, "r", parents, spec);
        let cluster = Cluster::of(&[PROXY, &network, &route].concat());
        assert_eq!(cluster.out_routes(), [told], "{kind} {parents} {spec}");
        assert_eq!(cluster.statuses(), [status], "{kind} {parents} {spec}");
    }
    for (parents, problem) in [
        (port("0"), "spec.parentRefs[0].port: no port: 1 to 65535"),
        (
            OUT.replace('}', ", sectionName: a}"),
            "spec.parentRefs[0].sectionName: an EgressNetwork has no sections",
        ),
    ] {
        let network = network(WEFT, "shop/out", "trafficPolicy: Deny");
        let cluster = Cluster::of(&[network, route("HTTPRoute", "r", &parents, ANY)].concat());
        assert_eq!(cluster.problems(), [problem]);
        assert!(cluster.out_routes().is_empty());
    }
}

#[test]
fn only_a_networks_own_routes_lead_to_it() {
    let service = "{group: '', kind: Service, name: proxy}";
    let to_out = format!("rules: [{{backendRefs: [{OUT}]}}]");
    let out = network(WEFT, "shop/out", "trafficPolicy: Deny");
    let both = format!("{OUT}, {service}");
    let cluster = Cluster::of(&[PROXY, &out, &route("HTTPRoute", "r", &both, &to_out)].concat());
    assert_eq!(cluster.out_routes(), ["r: shop/out"]);
    assert_eq!(
        cluster.statuses(),
        [
            "r@proxy: Accepted=Accepted, !ResolvedRefs=InvalidKind",
            "r@out: Accepted=Accepted, ResolvedRefs=ResolvedRefs",
        ]
    );
    // Nor are requests copied there.
    let mirror = format!(
        "rules: [{{filters: [{{type: RequestMirror, requestMirror: {{backendRef: {OUT}}}}}]}}]"
    );
    let cluster = Cluster::of(&[out, route("HTTPRoute", "r", OUT, &mirror)].concat());
    assert_eq!(
        cluster.statuses(),
        ["r@out: Accepted=Accepted, !ResolvedRefs=InvalidKind"]
    );
}

#[test]
fn routes_wait_for_their_network() {
    let r = route("HTTPRoute", "r", "{kind: EgressNetwork, name: out}", ANY);
    let mut cluster = Cluster::of(&r);
    let unknown = "r@out: !Accepted=NoMatchingParent, ResolvedRefs=ResolvedRefs";
    assert_eq!(cluster.statuses(), [unknown]);
    let of_linkerd = network(LINKERD, "shop/out", "trafficPolicy: Deny");
    cluster.apply(&of_linkerd);
    let accepted = "r@out: Accepted=Accepted, ResolvedRefs=ResolvedRefs";
    assert_eq!(cluster.statuses(), [accepted]);
    let name = "policy.linkerd.io/shop/out";
    let count = |it: &Cluster| it.network(name).map(|it| it.routes().len());
    assert_eq!(count(&cluster), Some(1));
    // The other group's is meant only if there is no one else.
    cluster.apply(&network(WEFT, "shop/out", "trafficPolicy: Deny"));
    assert!(cluster.out_routes().is_empty());
    cluster.delete(&of_linkerd);
    assert_eq!(cluster.out_routes(), ["r: shop/out"]);
    cluster.delete(&r);
    assert!(cluster.out_routes().is_empty() && cluster.statuses().is_empty());
    // One that cannot be used has no routes.
    let bad = network(WEFT, "shop/out", "trafficPolicy: None");
    let cluster = Cluster::of(&[bad, r].concat());
    assert!(cluster.out_routes().is_empty());
    assert_eq!(cluster.statuses(), [unknown]);
}

#[test]
fn the_most_specific_kind_is_in_force_at_a_port() {
    let out = network(WEFT, "shop/out", "trafficPolicy: Deny");
    let port = |it: &str| OUT.replace('}', &format!(", port: {it}}}"));
    let http = route("HTTPRoute", "http", &port("80"), ANY);
    let tls = route("TLSRoute", "tls", &port("443"), ANY);
    let tcp = route("TCPRoute", "tcp", OUT, ANY);
    let tcp_80 = route("TCPRoute", "tcp80", &port("80"), ANY);
    // That of another namespace competes with nobody here.
    let foreign = OUT.replace('}', ", namespace: shop}");
    let foreign = route("TCPRoute", "far/tcp", &foreign, ANY);
    let mut cluster = Cluster::of(&[out, http, tls, tcp, tcp_80, foreign].concat());
    let in_force = [
        "http 80: shop/out",
        "tcp: shop/out",
        "tls 443: shop/out",
        "tcp: shop/out",
    ];
    let mut routes = cluster.out_routes();
    routes.sort();
    let mut expected = in_force;
    expected.sort_unstable();
    assert_eq!(routes, expected);
    let conflicted = "tcp80@out: !Accepted=Conflicted, ResolvedRefs=ResolvedRefs";
    let statuses = cluster.statuses();
    assert!(statuses.iter().any(|it| it == conflicted), "{statuses:?}");
    let refused = statuses.iter().filter(|it| it.contains('!'));
    assert_eq!(refused.count(), 1, "{statuses:?}");
    // For all ports, so that nothing is left of the one that is.
    cluster.apply(&route("HTTPRoute", "all", OUT, ANY));
    let statuses = cluster.statuses();
    let refused = statuses.iter().filter(|it| it.contains("Conflicted"));
    assert_eq!(refused.count(), 3, "{statuses:?}");
}

#[test]
fn nobodys_routes_push_out_others() {
    let out = network(WEFT, "shop/out", "trafficPolicy: Deny");
    let mut manifests = vec![out];
    // 96 ports, 32 of each.
    for index in 0..3 {
        let ports = (0..32).map(|it| {
            let number = 1000 + index * 32 + it;
            OUT.replace('}', &format!(", port: {number}}}"))
        });
        let parents: Vec<String> = ports.collect();
        let name = format!("r{index}");
        manifests.push(route("HTTPRoute", &name, &parents.join(", "), ANY));
    }
    let cluster = Cluster::of(&manifests.concat());
    assert_eq!(cluster.out_routes().len(), 2);
    let statuses = cluster.statuses();
    let refused = statuses.iter().filter(|it| it.contains("TooLarge"));
    assert_eq!(refused.count(), 32, "one for each of its parents");
    // Headers of 4 KiB each: a namespace that is not the network's has 64 KiB.
    let long = "x".repeat(4000);
    let header = format!("{{name: a, value: {long}}}");
    let rule = format!("rules: [{{matches: [{{headers: [{header}]}}]}}]");
    let far = OUT.replace('}', ", namespace: shop}");
    let mut manifests = vec![network(WEFT, "shop/out", "trafficPolicy: Deny")];
    for index in 0..20 {
        manifests.push(route("HTTPRoute", &format!("far/r{index}"), &far, &rule));
    }
    manifests.push(route("HTTPRoute", "own", OUT, &rule));
    let cluster = Cluster::of(&manifests.concat());
    let routes = cluster.out_routes();
    assert!(routes.len() < 20, "{}", routes.len());
    assert!(routes.contains(&"own: shop/out".to_owned()));
}
