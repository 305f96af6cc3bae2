//! Tables of routes, Services and grants, and of the tables of routes and statuses that follow.

use weft_core::route::{Filter, HttpMatch, PathMatch, RouteRules, RouteTable, Share, Target};
use weft_core::{PortProtocol, PortRanges};

use super::*;

const SERVICES: &str = "
{apiVersion: v1, kind: Service, metadata: {name: web, namespace: shop},
  spec: {clusterIP: 10.2.0.1, ports: [{name: http, port: 80}, {name: admin, port: 81}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: v2, namespace: shop},
  spec: {clusterIP: 10.2.0.2, ports: [{port: 80}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: far, namespace: other},
  spec: {clusterIP: 10.2.0.3, ports: [{port: 80}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: headless, namespace: shop},
  spec: {clusterIP: None, ports: [{port: 80}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: alias, namespace: shop},
  spec: {type: ExternalName, externalName: example.com, ports: [{port: 80}]}}
";

const WEB: &str = "{group: '', kind: Service, name: web}";

/// A manifest of a route in the namespace `shop`.
fn route(kind: &str, name: &str, parents: &str, spec: &str) -> String {
    let version = match kind {
        "policy.linkerd.io/HTTPRoute" => "policy.linkerd.io/v1beta3",
        "TLSRoute" | "TCPRoute" => "gateway.networking.k8s.io/v1alpha2",
        _ => "gateway.networking.k8s.io/v1",
    };
    let kind = kind.rsplit('/').next().unwrap_or_default();
    format!(
        "---
{{apiVersion: {version}, kind: {kind}, metadata: {{name: {name}, namespace: shop, generation: 3}},
  spec: {{parentRefs: [{parents}], {spec}}}}}
"
    )
}

fn rules(backends: &str) -> String {
    format!("rules: [{{backendRefs: [{backends}]}}]")
}

impl Cluster {
    pub(super) fn table(&self, name: &str) -> Option<RouteTable> {
        match self.resource(Kind::RouteTable, name)? {
            Resource::RouteTable(it) => Some(it),
            other => panic!("{other:?}"),
        }
    }

    /// Routes as `kind name: backend*weight, ...`, of their first rule.
    fn routes(&self, table: &str) -> Vec<String> {
        let table = self.table(table);
        let routes = table.iter().flat_map(|it| it.routes());
        let mut shown: Vec<String> = routes
            .map(|it| {
                let backends = match &it.rules {
                    RouteRules::Http(rules) => rules.first().map_or(&[][..], |it| &it.backends),
                    RouteRules::Flow(rule) => &rule.backends,
                };
                let backends = backends.iter().map(|it| match &it.target {
                    Target::Service { name, port } => format!("{name}:{port}*{}", it.weight),
                    Target::Egress(name) => format!("{name}*{}", it.weight),
                    Target::Invalid(_) => format!("invalid*{}", it.weight),
                });
                let backends: Vec<String> = backends.collect();
                let (kind, name) = (it.name.kind.as_str(), &it.name.name);
                format!("{kind} {name}: {}", backends.join(", "))
            })
            .collect();
        shown.sort();
        shown
    }

    /// Statuses as `name#parent: condition=reason, ...`.
    pub(super) fn statuses(&self) -> Vec<String> {
        let mut shown = vec![];
        for status in self.index.statuses().list() {
            for parent in status.parents {
                let conditions = parent.conditions.iter();
                let conditions = conditions.map(|it| {
                    let sign = if it.status { "" } else { "!" };
                    format!("{sign}{}={}", it.kind, it.reason)
                });
                let conditions: Vec<String> = conditions.collect();
                let (name, parent) = (&status.route.name.name, parent.parent_ref.name);
                shown.push(format!("{name}@{parent}: {}", conditions.join(", ")));
            }
        }
        shown
    }
}

/// (parents) -> (routes at port 80, at port 81, status)
#[test]
fn routes_attach_to_ports_of_services() {
    let own = ["HTTPRoute shop/r: shop/v2:80*1"];
    let none: [&str; 0] = [];
    for (parents, at_80, at_81, status) in [
        (WEB, &own[..], &own[..], "Accepted=Accepted"),
        (
            "{kind: Service, name: web}",
            &own,
            &own,
            "Accepted=Accepted",
        ),
        (
            "{group: core, kind: Service, name: web}",
            &own,
            &own,
            "Accepted=Accepted",
        ),
        (
            "{kind: Service, name: web, namespace: shop}",
            &own,
            &own,
            "Accepted=Accepted",
        ),
        (
            "{kind: Service, name: web, port: 80}",
            &own,
            &none,
            "Accepted=Accepted",
        ),
        (
            "{kind: Service, name: web, sectionName: admin}",
            &none,
            &own,
            "Accepted=Accepted",
        ),
        (
            "{kind: Service, name: web, port: 80, sectionName: admin}",
            &none,
            &none,
            "!Accepted=NoMatchingParent",
        ),
        (
            "{kind: Service, name: web, port: 82}",
            &none,
            &none,
            "!Accepted=NoMatchingParent",
        ),
        (
            "{kind: Service, name: absent}",
            &none,
            &none,
            "!Accepted=NoMatchingParent",
        ),
        (
            "{kind: Service, name: web, namespace: else}",
            &none,
            &none,
            "!Accepted=NoMatchingParent",
        ),
        (
            "{kind: Service, name: headless}",
            &none,
            &none,
            "!Accepted=NoMatchingParent",
        ),
        (
            "{kind: Service, name: alias}",
            &none,
            &none,
            "!Accepted=NoMatchingParent",
        ),
    ] {
        let route = route("HTTPRoute", "r", parents, &rules("{name: v2, port: 80}"));
        let cluster = Cluster::of(&(SERVICES.to_owned() + &route));
        assert_eq!(cluster.routes("shop/web:80"), at_80, "{parents}");
        assert_eq!(cluster.routes("shop/web:81"), at_81, "{parents}");
        let statuses = cluster.statuses();
        assert!(
            statuses[0].contains(&format!(": {status}, ")),
            "{parents}: {statuses:?}"
        );
        assert!(
            statuses[0].ends_with(" ResolvedRefs=ResolvedRefs"),
            "{statuses:?}"
        );
        assert_eq!(
            cluster.problems().is_empty(),
            !status.starts_with('!'),
            "{parents}"
        );
    }
}

#[test]
fn routes_of_gateways_are_no_concern_of_the_mesh() {
    for parents in [
        "{name: gateway}",
        "{group: example.com, kind: Mesh, name: m}",
        "",
    ] {
        let odd = "rules: [{matches: [{path: {type: Novel}}], newField: 1}]";
        let route = route("HTTPRoute", "r", parents, odd);
        let cluster = Cluster::of(&(SERVICES.to_owned() + &route));
        assert!(cluster.names("one", Kind::RouteTable).is_empty());
        assert!(cluster.statuses().is_empty());
        assert!(cluster.problems().is_empty(), "{:?}", cluster.problems());
    }
    let both = format!("{{name: gateway}}, {WEB}");
    let route = route("HTTPRoute", "r", &both, &rules("{name: v2, port: 80}"));
    let cluster = Cluster::of(&(SERVICES.to_owned() + &route));
    assert_eq!(
        cluster.statuses(),
        ["r@web: Accepted=Accepted, ResolvedRefs=ResolvedRefs"]
    );
}

/// (backend) -> (as agents are told, condition)
#[test]
fn references_are_followed() {
    for (backend, told, condition) in [
        (
            "{name: v2, port: 80}",
            "shop/v2:80*1",
            "ResolvedRefs=ResolvedRefs",
        ),
        (
            "{name: v2, port: 80, weight: 0}",
            "shop/v2:80*0",
            "ResolvedRefs=ResolvedRefs",
        ),
        (
            "{name: web, port: 81, weight: 7}",
            "shop/web:81*7",
            "ResolvedRefs=ResolvedRefs",
        ),
        (
            "{name: v2, port: 99}",
            "invalid*1",
            "!ResolvedRefs=BackendNotFound",
        ),
        (
            "{name: absent, port: 80, weight: 9}",
            "invalid*9",
            "!ResolvedRefs=BackendNotFound",
        ),
        (
            "{name: alias, port: 80}",
            "invalid*1",
            "!ResolvedRefs=BackendNotFound",
        ),
        (
            "{kind: ServiceImport, group: multicluster.x-k8s.io, name: v2}",
            "invalid*1",
            "!ResolvedRefs=InvalidKind",
        ),
        (
            "{name: far, namespace: other, port: 80}",
            "invalid*1",
            "!ResolvedRefs=RefNotPermitted",
        ),
        (
            "{name: absent, namespace: other, port: 80}",
            "invalid*1",
            "!ResolvedRefs=RefNotPermitted",
        ),
    ] {
        let route = route("HTTPRoute", "r", WEB, &rules(backend));
        let cluster = Cluster::of(&(SERVICES.to_owned() + &route));
        let expected = format!("HTTPRoute shop/r: {told}");
        assert_eq!(cluster.routes("shop/web:80"), [expected], "{backend}");
        let status = format!("r@web: Accepted=Accepted, {condition}");
        assert_eq!(cluster.statuses(), [status], "{backend}");
        assert_eq!(
            cluster.problems().is_empty(),
            !condition.starts_with('!'),
            "{backend}"
        );
    }
}

#[test]
fn grants_let_routes_refer_to_other_namespaces() {
    let far = rules("{name: far, namespace: other, port: 80}");
    let manifests = SERVICES.to_owned() + &route("HTTPRoute", "r", WEB, &far);
    let grant = |namespace: &str, from: &str, to: &str| {
        format!(
            "---
{{apiVersion: gateway.networking.k8s.io/v1beta1, kind: ReferenceGrant,
  metadata: {{name: g, namespace: {namespace}}}, spec: {{from: [{from}], to: [{to}]}}}}
"
        )
    };
    let from = "{group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: shop}";
    let to = "{group: '', kind: Service}";
    for (grant, permitted) in [
        (grant("other", from, to), true),
        (
            grant("other", from, "{group: '', kind: Service, name: far}"),
            true,
        ),
        (
            grant("other", from, "{group: '', kind: Service, name: near}"),
            false,
        ),
        (grant("other", from, "{group: '', kind: Secret}"), false),
        (grant("shop", from, to), false),
        (grant("other", &from.replace("shop", "else"), to), false),
        (
            grant("other", &from.replace("HTTPRoute", "GRPCRoute"), to),
            false,
        ),
        (
            grant(
                "other",
                &from.replace("gateway.networking.k8s.io", "policy.linkerd.io"),
                to,
            ),
            false,
        ),
    ] {
        let mut cluster = Cluster::of(&manifests);
        let without = cluster.routes("shop/web:80");
        assert_eq!(without, ["HTTPRoute shop/r: invalid*1"]);
        cluster.apply(&grant);
        let expected = if permitted {
            "other/far:80*1"
        } else {
            "invalid*1"
        };
        let expected = format!("HTTPRoute shop/r: {expected}");
        assert_eq!(cluster.routes("shop/web:80"), [expected], "{grant}");
        cluster.delete(&grant);
        assert_eq!(cluster.routes("shop/web:80"), without);
    }
}

/// A consumer's route may go back to what it is attached to: its requests would go there anyway.
#[test]
fn consumers_need_no_grant_for_their_parent() {
    let parent = "{kind: Service, name: far, namespace: other}";
    let backends = "{name: far, namespace: other, port: 80}, {name: v2, port: 80}";
    let consumer = route("HTTPRoute", "r", parent, &rules(backends));
    let cluster = Cluster::of(&(SERVICES.to_owned() + &consumer));
    let expected = ["HTTPRoute shop/r: other/far:80*1, shop/v2:80*1"];
    assert_eq!(cluster.routes("other/far:80"), expected);
    assert!(cluster.problems().is_empty());
}

#[test]
fn routes_follow_services_that_come_and_go() {
    let one = route("HTTPRoute", "r", WEB, &rules("{name: v2, port: 80}"));
    let mut cluster = Cluster::of(&one);
    assert!(cluster.routes("shop/web:80").is_empty());
    assert_eq!(
        cluster.statuses(),
        ["r@web: !Accepted=NoMatchingParent, !ResolvedRefs=BackendNotFound"]
    );
    cluster.apply(SERVICES);
    assert_eq!(
        cluster.routes("shop/web:80"),
        ["HTTPRoute shop/r: shop/v2:80*1"]
    );
    assert_eq!(
        cluster.statuses(),
        ["r@web: Accepted=Accepted, ResolvedRefs=ResolvedRefs"]
    );
    assert!(cluster.problems().is_empty());
    let v2 = "{apiVersion: v1, kind: Service, metadata: {name: v2, namespace: shop}}";
    cluster.delete(v2);
    assert_eq!(
        cluster.routes("shop/web:80"),
        ["HTTPRoute shop/r: invalid*1"]
    );
    cluster.apply(SERVICES);
    let web = "{apiVersion: v1, kind: Service, metadata: {name: web, namespace: shop},
        spec: {clusterIP: 10.2.0.1, ports: [{port: 8080}]}}";
    cluster.apply(web);
    assert_eq!(cluster.names("one", Kind::RouteTable), ["shop/web:8080"]);
    cluster.delete(&one);
    assert!(cluster.names("one", Kind::RouteTable).is_empty());
    assert!(cluster.statuses().is_empty());
    assert!(cluster.index.routes.of_parent.is_empty() && cluster.index.routes.naming.is_empty());
    assert!(cluster.index.published.tables.is_empty());
}

/// Of several kinds only the most specific is in force at a port, and the others say so.
#[test]
fn kinds_exclude_each_other() {
    let backend = rules("{name: v2, port: 80}");
    let http = route("HTTPRoute", "http", WEB, &backend);
    let grpc = route(
        "GRPCRoute",
        "grpc",
        "{kind: Service, name: web, port: 81}",
        &backend,
    );
    let tcp = route(
        "TCPRoute",
        "tcp",
        "{kind: Service, name: web, port: 80}",
        &backend,
    );
    let mut cluster = Cluster::of(&(SERVICES.to_owned() + &http + &grpc + &tcp));
    assert_eq!(
        cluster.routes("shop/web:80"),
        ["HTTPRoute shop/http: shop/v2:80*1"]
    );
    assert_eq!(
        cluster.routes("shop/web:81"),
        ["GRPCRoute shop/grpc: shop/v2:80*1"]
    );
    let status =
        |name: &str, accepted: &str| format!("{name}@web: {accepted}, ResolvedRefs=ResolvedRefs");
    assert_eq!(
        cluster.statuses(),
        [
            status("grpc", "Accepted=Accepted"),
            status("http", "Accepted=Accepted"),
            status("tcp", "!Accepted=Conflicted"),
        ]
    );
    cluster.delete(&http);
    assert_eq!(
        cluster.routes("shop/web:80"),
        ["TCPRoute shop/tcp: shop/v2:80*1"]
    );
    assert_eq!(
        cluster.statuses(),
        [
            status("grpc", "Accepted=Accepted"),
            status("tcp", "Accepted=Accepted")
        ]
    );
    assert!(cluster.problems().is_empty());
}

/// Without backends, Linkerd's routes go to their parent, and others nowhere.
#[test]
fn routes_without_backends() {
    for (kind, expected) in [
        (
            "policy.linkerd.io/HTTPRoute",
            "HTTPRoute shop/r: shop/web:80*1",
        ),
        ("HTTPRoute", "HTTPRoute shop/r: "),
        ("GRPCRoute", "GRPCRoute shop/r: "),
    ] {
        let route = route(kind, "r", WEB, "rules: [{}]");
        let cluster = Cluster::of(&(SERVICES.to_owned() + &route));
        assert_eq!(cluster.routes("shop/web:80"), [expected], "{kind}");
        let table = cluster.table("shop/web:80").expect("a table");
        match &table.routes()[0].rules {
            RouteRules::Http(rules) => assert_eq!(rules[0].matches, [HttpMatch::any()]),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn everything_that_may_be_written_is_read() {
    let http = "hostnames: [ignored.example.com],
rules:
- name: cart
  matches:
  - path: {type: Exact, value: /cart}
    method: GET
    headers: [{name: X-A, value: '1'}, {name: x-b, type: RegularExpression, value: 'v[0-9]'}]
    queryParams: [{name: q, value: '1'}, {name: r, type: RegularExpression, value: a+}]
  - path: {type: RegularExpression, value: '/v[0-9]+/.*'}
  filters:
  - type: RequestHeaderModifier
    requestHeaderModifier: {set: [{name: a, value: b}], add: [{name: c, value: d}], remove: [e]}
  - type: ResponseHeaderModifier
    responseHeaderModifier: {set: [{name: a, value: b}]}
  - type: RequestMirror
    requestMirror: {backendRef: {name: v2, port: 80}, percent: 10}
  - type: RequestMirror
    requestMirror: {backendRef: {name: absent, port: 80}, fraction: {numerator: 1, denominator: 3}}
  - type: URLRewrite
    urlRewrite: {hostname: new.example.com, path: {type: ReplaceFullPath, replaceFullPath: /x}}
  - type: ExtensionRef
    extensionRef: {group: example.com, kind: Magic, name: m}
  - type: CORS
    cors: {allowOrigins: ['*']}
  timeouts: {request: 10s}
  sessionPersistence: {sessionName: s}
  backendRefs:
  - name: v2
    port: 80
    weight: 3
    filters: [{type: RequestHeaderModifier, requestHeaderModifier: {remove: [a]}}]
- matches: [{path: {value: /old}}]
  filters:
  - type: RequestRedirect
    requestRedirect: {scheme: https, hostname: a.example.com, port: 8443, statusCode: 301,
      path: {type: ReplacePrefixMatch, replacePrefixMatch: /new}}";
    let manifest = format!(
        "
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: r, namespace: shop, creationTimestamp: '2026-01-01T00:00:00Z'}}
spec:
  parentRefs: [{WEB}]
  {}
",
        http.replace(",\nrules", "\nrules").replace('\n', "\n  ")
    );
    let cluster = Cluster::of(&(SERVICES.to_owned() + "---" + &manifest));
    let table = cluster.table("shop/web:80").expect("a table");
    let route = &table.routes()[0];
    assert_eq!(route.created, Some(1_767_225_600));
    let RouteRules::Http(rules) = &route.rules else {
        panic!("{route:?}");
    };
    assert_eq!(rules[0].name.as_ref().map(Name::as_str), Some("cart"));
    let matches = &rules[0].matches;
    assert_eq!(matches[0].path, PathMatch::Exact("/cart".to_owned()));
    assert_eq!((matches[0].headers.len(), matches[0].query.len()), (2, 2));
    assert!(matches!(matches[1].path, PathMatch::Regex(_)));
    let filters = &rules[0].filters;
    assert_eq!(filters.len(), 7);
    let mirrors = filters.iter().filter_map(|it| match it {
        Filter::Mirror(mirror) => {
            let is_there = matches!(mirror.target, Target::Service { .. });
            Some((is_there, mirror.share))
        }
        _ => None,
    });
    let share = |numerator, denominator| Share::new(numerator, denominator).expect("a part");
    assert_eq!(
        mirrors.collect::<Vec<_>>(),
        [(true, share(10, 100)), (false, share(1, 3))]
    );
    let invalid = filters.iter().filter(|it| matches!(it, Filter::Invalid(_)));
    assert_eq!(invalid.count(), 2);
    assert_eq!(rules[0].backends[0].filters.len(), 1);
    assert!(matches!(rules[1].filters[0], Filter::Redirect(_)));
    assert_eq!(
        cluster.problems(),
        [
            "spec.rules[0].sessionPersistence: not supported yet",
            "spec.rules[0].filters[6]: filters of type CORS are not supported",
            "spec.rules[0].filters[5].extensionRef: no extension is known",
            "spec.rules[0].filters[3].requestMirror.backendRef: Service shop/absent is not known",
        ]
    );
    assert_eq!(
        cluster.statuses(),
        ["r@web: Accepted=Accepted, !ResolvedRefs=InvalidKind, PartiallyInvalid=UnsupportedValue"]
    );
}

#[test]
fn grpc_tls_and_tcp_routes_are_read() {
    let grpc = "rules: [{matches: [{method: {service: a.B, method: C}}, {method: {service: a.B}},
        {method: {type: RegularExpression, method: 'Get.*'}, headers: [{name: x, value: y}]}],
        backendRefs: [{name: v2, port: 80}]}]";
    let cluster = Cluster::of(&(SERVICES.to_owned() + &route("GRPCRoute", "r", WEB, grpc)));
    let table = cluster.table("shop/web:80").expect("a table");
    let RouteRules::Http(rules) = &table.routes()[0].rules else {
        panic!("not for requests");
    };
    assert_eq!(
        rules[0].matches[0].path,
        PathMatch::Exact("/a.B/C".to_owned())
    );
    assert!(matches!(&rules[0].matches[1].path, PathMatch::Prefix(it) if it.as_str() == "/a.B"));
    assert!(matches!(rules[0].matches[2].path, PathMatch::Grpc { .. }));
    assert_eq!(rules[0].matches[2].headers.len(), 1);
    for (kind, spec, hostnames) in [
        (
            "TLSRoute",
            "hostnames: [a.example.com, '*.b.example.com'],",
            2,
        ),
        ("TCPRoute", "", 0),
    ] {
        let spec = format!("{spec} rules: [{{backendRefs: [{{name: v2, port: 80, weight: 5}}]}}]");
        let cluster = Cluster::of(&(SERVICES.to_owned() + &route(kind, "r", WEB, &spec)));
        let expected = format!("{kind} shop/r: shop/v2:80*5");
        assert_eq!(cluster.routes("shop/web:81"), [expected]);
        let table = cluster.table("shop/web:81").expect("a table");
        match &table.routes()[0].rules {
            RouteRules::Flow(rule) => assert_eq!(rule.hostnames.len(), hostnames),
            other => panic!("{other:?}"),
        }
    }
}

/// (kind, rules) -> the field that is refused; what was in force before stays.
#[test]
fn routes_that_cannot_be_used_change_nothing() {
    let matches = |it: &str| format!("[{{matches: [{it}]}}]");
    let filter = |it: &str| {
        format!("[{{filters: [{it}], matches: [{{path: {{type: Exact, value: /a}}}}]}}]")
    };
    let many = |it: &str, count: usize| format!("[{}]", vec![it; count].join(", "));
    for (kind, rules, field) in [
        (
            "HTTPRoute",
            matches("{path: {type: Suffix, value: /a}}"),
            "spec.rules[0].matches[0].path.type",
        ),
        (
            "HTTPRoute",
            matches("{paht: {value: /a}}"),
            "spec.rules[0].matches[0].paht",
        ),
        (
            "HTTPRoute",
            matches("{path: {value: a}}"),
            "spec.rules[0].matches[0].path.value",
        ),
        (
            "HTTPRoute",
            matches("{path: {value: /a//b}}"),
            "spec.rules[0].matches[0].path.value",
        ),
        (
            "HTTPRoute",
            matches("{path: {value: /a/../b}}"),
            "spec.rules[0].matches[0].path.value",
        ),
        (
            "HTTPRoute",
            matches("{path: {value: /a%2Fb}}"),
            "spec.rules[0].matches[0].path.value",
        ),
        (
            "HTTPRoute",
            matches("{path: {type: RegularExpression, value: '('}}"),
            "spec.rules[0].matches[0].path.value",
        ),
        (
            "HTTPRoute",
            matches("{method: 'G T'}"),
            "spec.rules[0].matches[0].method",
        ),
        (
            "HTTPRoute",
            matches("{headers: [{name: 'a b', value: c}]}"),
            "spec.rules[0].matches[0].headers[0].name",
        ),
        (
            "HTTPRoute",
            matches("{queryParams: [{name: '', value: c}]}"),
            "spec.rules[0].matches[0].queryParams[0].name",
        ),
        ("HTTPRoute", many("{}", 17), "spec.rules"),
        (
            "HTTPRoute",
            format!("[{{matches: {}}}]", many("{}", 65)),
            "spec.rules[0].matches",
        ),
        (
            "HTTPRoute",
            format!("[{{backendRefs: {}}}]", many("{name: a, port: 1}", 17)),
            "spec.rules[0].backendRefs",
        ),
        (
            "HTTPRoute",
            "[{backendRefs: [{name: v2}]}]".to_owned(),
            "spec.rules[0].backendRefs[0].port",
        ),
        (
            "HTTPRoute",
            "[{backendRefs: [{name: v2, port: 80, weight: -1}]}]".to_owned(),
            "spec.rules[0].backendRefs[0].weight",
        ),
        (
            "HTTPRoute",
            filter("{type: Magic}"),
            "spec.rules[0].filters[0].type",
        ),
        (
            "HTTPRoute",
            filter("{type: URLRewrite}"),
            "spec.rules[0].filters[0].urlRewrite",
        ),
        (
            "HTTPRoute",
            filter("{type: URLRewrite, urlRewrite: {}}, {type: URLRewrite, urlRewrite: {}}"),
            "spec.rules[0].filters[0]",
        ),
        (
            "HTTPRoute",
            filter(
                "{type: URLRewrite, urlRewrite: {}}, {type: RequestRedirect, requestRedirect: {}}",
            ),
            "spec.rules[0].filters",
        ),
        (
            "HTTPRoute",
            filter(
                "{type: URLRewrite, urlRewrite: {path: {type: ReplacePrefixMatch, replacePrefixMatch: /b}}}",
            ),
            "spec.rules[0].filters[0].urlRewrite.path.replacePrefixMatch",
        ),
        (
            "HTTPRoute",
            filter(
                "{type: URLRewrite, urlRewrite: {path: {type: ReplaceFullPath, replaceFullPath: '/b?c'}}}",
            ),
            "spec.rules[0].filters[0].urlRewrite.path.replaceFullPath",
        ),
        (
            "HTTPRoute",
            filter("{type: RequestRedirect, requestRedirect: {statusCode: 200}}"),
            "spec.rules[0].filters[0].requestRedirect.statusCode",
        ),
        (
            "HTTPRoute",
            filter(
                "{type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: content-length, value: '1'}]}}",
            ),
            "spec.rules[0].filters[0].requestHeaderModifier",
        ),
        (
            "HTTPRoute",
            filter(
                "{type: RequestMirror, requestMirror: {backendRef: {name: v2, port: 80}, percent: 101}}",
            ),
            "spec.rules[0].filters[0].requestMirror",
        ),
        (
            "GRPCRoute",
            matches("{method: {service: a/b}}"),
            "spec.rules[0].matches[0].method.service",
        ),
        (
            "GRPCRoute",
            matches("{method: {}}"),
            "spec.rules[0].matches[0].method",
        ),
        (
            "GRPCRoute",
            "[{filters: [{type: URLRewrite, urlRewrite: {}}]}]".to_owned(),
            "spec.rules[0].filters[0].type",
        ),
        ("TCPRoute", "[]".to_owned(), "spec.rules"),
        (
            "HTTPRoute",
            "[{timeouts: {request: 1d}}]".to_owned(),
            "spec.rules[0].timeouts.request",
        ),
        (
            "HTTPRoute",
            "[{timeouts: {request: 1s, backendRequest: 2s}}]".to_owned(),
            "spec.rules[0].timeouts.backendRequest",
        ),
        (
            "HTTPRoute",
            "[{retry: {codes: [500, 200]}}]".to_owned(),
            "spec.rules[0].retry.codes[1]",
        ),
        (
            "HTTPRoute",
            "[{retry: {attempts: -1}}]".to_owned(),
            "spec.rules[0].retry.attempts",
        ),
        (
            "HTTPRoute",
            "[{retry: {backoff: soon}}]".to_owned(),
            "spec.rules[0].retry.backoff",
        ),
    ] {
        let good = route(
            kind,
            "r",
            WEB,
            &super::routes::rules("{name: v2, port: 80}"),
        );
        let bad = route(kind, "r", WEB, &format!("rules: {rules}"))
            .replace("generation: 3", "generation: 4");
        let mut cluster = Cluster::of(&(SERVICES.to_owned() + &good));
        let told = cluster.told("one");
        assert!(cluster.problems().is_empty());
        cluster.apply(&bad);
        assert_eq!(cluster.told("one"), told, "{rules}");
        let problems = cluster.problems();
        assert!(
            problems[0].starts_with(&format!("{field}: ")),
            "{rules}: {problems:?}"
        );
        let statuses = cluster.statuses();
        assert_eq!(
            statuses,
            ["r@web: !Accepted=UnsupportedValue, ResolvedRefs=ResolvedRefs"]
        );
        let status = cluster.index.statuses().list();
        assert_eq!(status[0].observed_generation, Some(4), "{rules}");
        cluster.apply(&good);
        assert!(cluster.problems().is_empty());
        assert!(cluster.statuses()[0].contains(": Accepted=Accepted"));
        // Never readable: no routes.
        let cluster = Cluster::of(&(SERVICES.to_owned() + &bad));
        assert!(cluster.names("one", Kind::RouteTable).is_empty(), "{rules}");
    }
}

/// Strangers' routes share a table with the Service's own, and cannot push these out.
#[test]
fn each_namespace_has_its_share_of_a_table() {
    let header = |index: usize| {
        format!("{{name: x-{index}, type: RegularExpression, value: '[a-z]{{1,3}}'}}")
    };
    let headers: Vec<String> = (0..16).map(header).collect();
    let matches = vec![format!("{{headers: [{}]}}", headers.join(", ")); 4].join(", ");
    let rules = format!("rules: [{{matches: [{matches}], backendRefs: [{{name: v2, port: 80}}]}}]");
    let mut manifests = SERVICES.to_owned();
    for number in 0..9 {
        // 64 patterns each: all that others may have.
        let own = route("HTTPRoute", &format!("own-{number}"), WEB, &rules);
        manifests += &own;
        let parent = "{kind: Service, name: web, namespace: shop}";
        let foreign = route("HTTPRoute", &format!("foreign-{number}"), parent, &rules);
        let foreign = foreign.replace(
            "namespace: shop, gen",
            &format!("namespace: ns-{number}, gen"),
        );
        manifests += &foreign;
    }
    let second = route(
        "HTTPRoute",
        "second",
        "{kind: Service, name: web, namespace: shop}",
        &rules,
    );
    manifests += &second.replace("namespace: shop, gen", "namespace: ns-0, gen");
    let cluster = Cluster::of(&manifests);
    let table = cluster.table("shop/web:80").expect("a table");
    let count = |prefix: &str| {
        let names = table.routes().iter().map(|it| it.name.name.name.as_str());
        names.filter(|it| it.starts_with(prefix)).count()
    };
    assert_eq!((count("own"), count("foreign"), count("second")), (8, 8, 0));
    let too_large = cluster.statuses().into_iter();
    let too_large = too_large.filter(|it| it.contains("!Accepted=TooLarge"));
    assert_eq!(too_large.count(), 3);
}

/// A changed route is one changed table, and a changed pod is none.
#[test]
fn a_changed_route_touches_its_own_tables() {
    let mut text = String::new();
    for number in 0..50 {
        text += &format!(
            "---\n{{apiVersion: v1, kind: Service, metadata: {{name: s{number}, namespace: shop}},
                spec: {{clusterIP: 10.2.1.{number}, ports: [{{port: 80}}]}}}}\n"
        );
        let parent = format!("{{kind: Service, name: s{number}}}");
        let backends = rules(&format!("{{name: s{number}, port: 80}}"));
        text += &route("HTTPRoute", &format!("r{number}"), &parent, &backends);
    }
    let mut cluster = Cluster::of(&text);
    let node = "one".parse().expect("valid");
    let before = cluster.views.since(&node, 0).expect("remembered").upto;
    let changed = route(
        "HTTPRoute",
        "r7",
        "{kind: Service, name: s7}",
        &rules("{name: s8, port: 80}"),
    );
    for document in decode::documents(&changed).expect("YAML") {
        cluster.index.take(event(document));
    }
    assert_eq!(cluster.index.dirty.tables.len(), 1);
    assert_eq!(cluster.index.dirty.routes.len(), 1);
    cluster.index.publish();
    let difference = cluster.views.since(&node, before).expect("remembered");
    assert_eq!((difference.changed.len(), difference.removed.len()), (1, 0));
    // What routes do not look at is no change for them.
    let labelled = "{apiVersion: v1, kind: Service, metadata: {name: s7, namespace: shop},
        spec: {clusterIP: 10.2.1.7, selector: {a: b}, ports: [{port: 80}]}}";
    for document in decode::documents(labelled).expect("YAML") {
        cluster.index.take(event(document));
    }
    assert!(cluster.index.dirty.tables.is_empty());
    cluster.index.publish();
}

/// (what the namespace, and the Service, say) -> what the ports 80, 3306 and 8080 (`http`) speak
#[test]
fn ports_of_services_are_declared() {
    use PortProtocol::*;
    let opaque = |ports: &str| format!("config.linkerd.io/opaque-ports: '{ports}'");
    for (namespace, service, expected) in [
        (String::new(), String::new(), [Http2, Opaque, Detect]),
        (opaque("8080"), String::new(), [Http2, Detect, Opaque]),
        (opaque("8080"), opaque("3306,80"), [Http2, Opaque, Detect]),
        (String::new(), opaque("http,80"), [Http2, Detect, Opaque]),
        (String::new(), opaque(""), [Http2, Detect, Detect]),
        (String::new(), opaque("1-9000"), [Http2, Opaque, Opaque]),
        (
            opaque("8080"),
            format!("weft.dev/opaque-ports: '3306', {}", opaque("80")),
            [Http2, Opaque, Detect],
        ),
    ] {
        let manifests = format!(
            "
{{apiVersion: v1, kind: Namespace, metadata: {{name: shop, annotations: {{{namespace}}}}}}}
---
{{apiVersion: v1, kind: Service, metadata: {{name: web, namespace: shop, annotations: {{{service}}}}},
  spec: {{clusterIP: 10.2.0.1, ports: [{{name: a, port: 80, appProtocol: kubernetes.io/h2c}},
    {{name: b, port: 3306}}, {{name: http, port: 8080}}]}}}}
"
        );
        let cluster = Cluster::of(&manifests);
        let Some(Resource::Service(told)) = cluster.resource(Kind::Service, "shop/web") else {
            panic!("not told");
        };
        let protocols: Vec<_> = told.ports.iter().map(|it| it.protocol).collect();
        assert_eq!(protocols, expected, "{namespace} {service}");
    }
}

#[test]
fn ports_of_pods_are_declared() {
    let pod = |annotations: &str| {
        format!(
            "---
{{apiVersion: v1, kind: Pod, metadata: {{name: a, namespace: shop, labels: {{weft.dev/mesh: enabled}},
    annotations: {{{annotations}}}}},
  spec: {{nodeName: one, containers: [{{name: c, ports: [{{name: db, containerPort: 5000}}]}}]}},
  status: {{podIPs: [{{ip: 10.1.0.1}}]}}}}
"
        )
    };
    let namespace = "{apiVersion: v1, kind: Namespace, metadata: {name: shop, annotations:
        {config.linkerd.io/skip-inbound-ports: '7000', weft.dev/skip-outbound-ports: 9000-9001}}}\n";
    let default = PortRanges::opaque_by_default();
    let union = |ranges: &[(u16, u16)]| default.union(&PortRanges::new(ranges.iter().copied()));
    let set = |ranges: &[(u16, u16)]| PortRanges::new(ranges.iter().copied());
    for (manifests, inbound, outbound) in [
        (pod(""), default.clone(), set(&[])),
        (
            pod("weft.dev/opaque-ports: 'db, 80'"),
            set(&[(80, 80), (5000, 5000)]),
            set(&[]),
        ),
        (
            pod(
                "config.linkerd.io/skip-inbound-ports: '81', config.linkerd.io/skip-outbound-ports: '82'",
            ),
            union(&[(81, 81)]),
            set(&[(82, 82)]),
        ),
        (
            namespace.to_owned() + &pod(""),
            union(&[(7000, 7000)]),
            set(&[(9000, 9001)]),
        ),
        (
            namespace.to_owned()
                + &pod("weft.dev/skip-inbound-ports: '', weft.dev/skip-outbound-ports: ''"),
            default.clone(),
            set(&[]),
        ),
    ] {
        let cluster = Cluster::of(&manifests);
        let told = cluster.node_pod("shop/a").expect("told");
        assert_eq!(told.opaque_ports, inbound, "{manifests}");
        assert_eq!(told.opaque_outbound_ports, outbound, "{manifests}");
        // Others hear of it if it is not the default.
        let known = cluster.workload("shop/a").expect("told");
        let listed = Some(inbound).filter(|it| *it != default);
        assert_eq!(known.opaque_ports, listed, "{manifests}");
        assert!(cluster.problems().is_empty());
    }
    // What cannot be read leaves what was said before.
    let mut cluster = Cluster::of(&pod("weft.dev/opaque-ports: '80'"));
    cluster.apply(&pod("weft.dev/opaque-ports: '80;81'"));
    let told = cluster.node_pod("shop/a").expect("told");
    assert_eq!(told.opaque_ports, set(&[(80, 80)]));
    let problems = cluster.problems();
    assert!(problems[0].starts_with("metadata.annotations[\"weft.dev/opaque-ports\"]: "));
}

/// The example of the documentation.
#[test]
fn the_documented_route_is_in_force() {
    let page = include_str!("../../../../docs/http.md");
    let section = page.split("\n## Routes\n").nth(1).expect("a section");
    let example = section.split("```yaml\n").nth(1).expect("an example");
    let example = example.split("```").next().expect("its end");
    let service = |name: &str, address: u8| {
        format!(
            "---\n{{apiVersion: v1, kind: Service, metadata: {{name: {name}, namespace: production}},
               spec: {{clusterIP: 10.2.0.{address}, ports: [{{port: 80}}]}}}}\n"
        )
    };
    let services = service("payment", 1) + &service("payment-v1", 2) + &service("payment-v2", 3);
    let cluster = Cluster::of(&format!("{services}---\n{example}"));
    assert!(cluster.problems().is_empty(), "{:?}", cluster.problems());
    let table = cluster.table("production/payment:80").expect("a table");
    let client = "production".parse().expect("valid");
    for (canary, backends) in [("yes", 1), ("no", 2)] {
        let request = http::Request::builder().header("x-canary", canary);
        let (head, ()) = request.body(()).expect("a request").into_parts();
        match table.select(&client, &head) {
            weft_core::route::Selected::Rule(it) => assert_eq!(it.rule.backends.len(), backends),
            other => panic!("{other:?}"),
        }
    }
}
