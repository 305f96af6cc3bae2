use std::sync::Arc;
use std::time::Duration;

use std::num::NonZeroU32;

use proptest::prelude::*;
use weft_core::route::*;
use weft_core::*;

use super::route::MAX_PATTERNS;
use super::*;

fn network_rules() -> NetworkRules {
    let name = |it: &str| -> Name { it.parse().expect("valid") };
    let mut peers = NetworkPeers::networks(vec![NetworkMatch {
        cidr: "10.0.0.0/8".parse().expect("valid"),
        except: vec!["10.1.0.0/16".parse().expect("valid")],
    }]);
    let named = NetworkPods::Named(vec![name("b"), name("a"), name("b")]);
    peers.add(name("shop"), named);
    peers.add(name("billing"), NetworkPods::All);
    peers.add(name("nowhere"), NetworkPods::Named(vec![]));
    let rule = |ports, peers| NetworkRule { ports, peers };
    NetworkRules {
        policies: vec!["shop/only-these".parse().expect("valid")],
        rules: vec![
            rule(Some(PortRanges::new([(80, 90), (443, 443)])), Some(peers)),
            rule(None, None),
            rule(Some(PortRanges::default()), Some(NetworkPeers::default())),
        ],
    }
}

#[test]
fn network_rules_that_say_nothing_let_nobody_in() {
    let rule = NetworkRule::try_from(v1::NetworkRule::default()).expect("accepted");
    assert_eq!(rule.ports, Some(PortRanges::default()));
    assert_eq!(rule.peers, Some(NetworkPeers::default()));
    let range = v1::PortRange { first: 1, last: 2 };
    let pods = |all, names: &[&str]| v1::NetworkPods {
        namespace: "shop".to_owned(),
        all,
        names: names.iter().map(|it| (*it).to_owned()).collect(),
    };
    let of = |pods| v1::NetworkRule {
        peers: Some(v1::NetworkPeers {
            pods: vec![pods],
            ..Default::default()
        }),
        ..Default::default()
    };
    for (bad, field) in [
        (
            v1::NetworkRule {
                all_ports: true,
                ports: vec![range],
                ..Default::default()
            },
            "network_rule.ports",
        ),
        (
            v1::NetworkRule {
                ports: vec![v1::PortRange { first: 2, last: 1 }],
                ..Default::default()
            },
            "network_rule.ports",
        ),
        (
            v1::NetworkRule {
                anybody: true,
                peers: Some(v1::NetworkPeers::default()),
                ..Default::default()
            },
            "network_rule.peers",
        ),
        (of(pods(true, &["a"])), "network_pods.names"),
        (of(pods(false, &["A"])), "network_pods.names"),
        (of(v1::NetworkPods::default()), "network_pods.namespace"),
    ] {
        let refused = NetworkRule::try_from(bad).expect_err(field);
        assert_eq!(refused.field, field);
    }
    let rules = v1::NetworkRules::default();
    let refused = NetworkRules::try_from(rules).expect_err("no policy");
    assert_eq!(refused.field, "network_rules.policies");
}

fn samples() -> Vec<Resource> {
    let identity: Identity = "spiffe://cluster.local/ns/shop/sa/web"
        .parse()
        .expect("valid");
    let server_name = ServerName {
        group: PolicyGroup::Weft,
        name: "shop/web".parse().expect("valid"),
    };
    let workload = |mesh, owner, opaque_ports| {
        Resource::Workload(Workload {
            id: "shop/web-0".parse().expect("valid"),
            addresses: vec![
                "10.1.0.2".parse().expect("valid"),
                "fd00::2".parse().expect("valid"),
            ],
            node: "node-a".parse().expect("valid"),
            owner,
            mesh,
            opaque_ports,
        })
    };
    let meshed = |tunnel| Mesh::Meshed {
        identity: identity.clone(),
        tunnel,
    };
    let owner = Owner {
        kind: "deployment".parse().expect("valid"),
        name: "web".parse().expect("valid"),
    };
    let mut samples = vec![
        Resource::Cluster(ClusterSettings {
            trust_domain: "cluster.local".parse().expect("valid"),
            pod_ranges: vec!["10.0.0.0/8".parse().expect("valid")],
            service_ranges: vec!["fd01::/112".parse().expect("valid")],
            force_tunnels: true,
        }),
        Resource::TrustBundle(TrustBundle {
            trust_domain: "cluster.local".parse().expect("valid"),
            roots: vec![vec![1, 2, 3]],
        }),
        workload(Mesh::Unmeshed, None, None),
        workload(
            meshed(Tunnel::WeftH2),
            Some(owner),
            Some(PortRanges::new([(80, 81)])),
        ),
        workload(meshed(Tunnel::Hbone), None, Some(PortRanges::default())),
        Resource::MeshNamespace("shop".parse().expect("valid")),
        Resource::NodePod(NodePod {
            id: "shop/web-0".parse().expect("valid"),
            uid: "1234".to_owned(),
            netns: Some("/run/netns/x".into()),
            runtime: Box::new(PodRuntime {
                static_uid: Some("5678".to_owned()),
                containers: vec!["ab".repeat(32).parse().expect("valid")],
                class: Some("kata".to_owned()),
                own_users: true,
            }),
            probe_ports: vec![8080],
            opaque_ports: PortRanges::opaque_by_default(),
            opaque_outbound_ports: PortRanges::new([(1, 2), (65535, 65535)]),
            zone: Some("east-1A".to_owned()),
            by_tunnels_only: true,
        }),
        Resource::Service(Service {
            name: "shop/web".parse().expect("valid"),
            addresses: vec!["10.96.0.1".parse().expect("valid")],
            ports: vec![ServicePort {
                number: 80,
                name: Some("http".parse().expect("valid")),
                app_protocol: Some("kubernetes.io/h2c".to_owned()),
                protocol: PortProtocol::Http2,
            }],
            internal_traffic: InternalTraffic::Local,
            failure_accrual: Some(FailureAccrual {
                success_rate: Some(SuccessRate::default()),
                ..FailureAccrual::default()
            }),
        }),
        Resource::Endpoint(Endpoint {
            name: EndpointName {
                service: "shop/web".parse().expect("valid"),
                address: "10.1.0.2".parse().expect("valid"),
            },
            ports: vec![EndpointPort {
                service_port: 80,
                target_port: 8080,
            }],
            place: EndpointPlace {
                node: Some("node-a".parse().expect("valid")),
                for_nodes: vec!["node-b".parse().expect("valid")],
                for_zones: vec!["east-1A".to_owned(), "west_2".to_owned()],
            },
            weight: Weight::new(50).expect("valid"),
        }),
        Resource::WorkloadPolicy(WorkloadPolicy {
            workload: "shop/web-0".parse().expect("valid"),
            default: AccessPolicy::ClusterAuthenticated,
            servers: vec![ServerBinding {
                port: 8080,
                server: server_name.clone(),
            }],
            network: Some(network_rules().into()),
            network_egress: Some(network_rules().into()),
        }),
    ];
    let server = Server {
        name: server_name,
        access_policy: AccessPolicy::Deny,
        proxy_protocol: ProxyProtocol::Http2,
        authorizations: vec![Authorization {
            name: AuthorizationName {
                group: PolicyGroup::Linkerd,
                name: "shop/allow".parse().expect("valid"),
            },
            required: vec![
                Authentication::MeshTls(vec![
                    IdentityMatch::Any,
                    IdentityMatch::Exact(identity.clone()),
                    IdentityMatch::Namespace {
                        trust_domain: identity.trust_domain.clone(),
                        namespace: identity.namespace.clone(),
                    },
                ]),
                Authentication::Networks(vec![NetworkMatch {
                    cidr: "10.0.0.0/8".parse().expect("valid"),
                    except: vec!["10.1.0.0/16".parse().expect("valid")],
                }]),
                Authentication::Unknown("MeshTLSAuthentication shop/x".to_owned()),
            ],
        }],
        routes: None,
        rate_limit: Some(RateLimit {
            name: AuthorizationName {
                group: PolicyGroup::Weft,
                name: "shop/limit".parse().expect("valid"),
            },
            total: None,
            identity: NonZeroU32::new(5),
            overrides: vec![RateOverride {
                requests_per_second: NonZeroU32::MIN,
                clients: vec![identity.clone()],
            }],
        }),
    };
    let routed = Server {
        name: ServerName {
            group: PolicyGroup::Linkerd,
            ..server.name.clone()
        },
        routes: Some(InboundRoutes::new(vec![InboundRoute {
            route: route_table().routes()[1].clone(),
            hostnames: vec!["*.example.com".parse().expect("valid")],
            authorizations: server.authorizations.clone(),
        }])),
        ..server.clone()
    };
    samples.push(Resource::Server(server));
    samples.push(Resource::Server(routed));
    samples.push(Resource::RouteTable(route_table()));
    samples
}

/// Each kind of everything that a table may hold.
fn route_table() -> RouteTable {
    let text = |it: &str| TextMatch::Exact(it.to_owned());
    let pattern = |it: &str| Pattern::new(it).expect("a pattern");
    let target = || Target::Service {
        name: "shop/web-v2".parse().expect("valid"),
        port: 8080,
    };
    let edit = || {
        let header = |name: &str| (name.parse().expect("valid"), "v".parse().expect("valid"));
        let removed = vec!["x-removed".parse().expect("valid")];
        HeaderEdit::new(vec![header("x-set")], vec![header("x-added")], removed).expect("allowed")
    };
    let matches = |path| HttpMatch {
        path,
        ..HttpMatch::any()
    };
    let full = HttpMatch {
        path: PathMatch::Exact("/cart".to_owned()),
        method: Some("GET".parse().expect("valid")),
        headers: vec![HeaderMatch {
            name: "x-a".parse().expect("valid"),
            value: TextMatch::Regex(pattern("a+")),
        }],
        query: vec![QueryMatch {
            name: "ü".to_owned(),
            value: text("1"),
        }],
    };
    let filters = vec![
        Filter::RequestHeaders(edit()),
        Filter::ResponseHeaders(edit()),
        Filter::Redirect(Redirect {
            scheme: Some(RedirectScheme::Https),
            hostname: Some(hostname("example.com").expect("valid")),
            path: Some(PathRewrite::full("/x").expect("valid")),
            port: Some(8443),
            status: Redirect::status(308).expect("valid"),
        }),
        Filter::Rewrite(Rewrite {
            hostname: None,
            path: Some(PathRewrite::prefix("").expect("valid")),
        }),
        Filter::Mirror(Mirror {
            target: target(),
            share: Share::new(1, 3).expect("valid"),
        }),
        Filter::Invalid("not known".to_owned()),
    ];
    let backends = vec![
        Backend {
            weight: 90,
            target: target(),
            filters: filters.clone(),
        },
        Backend {
            weight: 10,
            target: Target::Invalid("no such Service".to_owned()),
            filters: vec![],
        },
    ];
    let rule = Rule {
        name: Some("cart".parse().expect("valid")),
        matches: vec![
            full,
            matches(PathMatch::Prefix(PathPrefix::new("/a/"))),
            matches(PathMatch::Regex(pattern("/a.*"))),
            matches(PathMatch::grpc(None, Some(text("Get")))),
            HttpMatch::any(),
        ],
        filters,
        backends: backends.clone(),
        reliability: Some(Box::new(reliability())),
    };
    let flow = FlowRule {
        name: None,
        hostnames: ["a.example.com", "*.example.com"]
            .map(|it| it.parse().expect("valid"))
            .into(),
        backends,
    };
    let route = |kind: RouteKind, rules| Route {
        name: RouteName {
            name: "shop/route".parse().expect("valid"),
            kind,
        },
        created: kind.route_type().is_of_requests().then_some(-5),
        rules,
    };
    let routes = RouteKind::ALL.map(|kind| match kind.route_type().is_of_requests() {
        true => route(kind, RouteRules::Http(vec![rule.clone()])),
        false => route(kind, RouteRules::Flow(flow.clone())),
    });
    RouteTable::new("shop/web:80".parse().expect("valid"), routes.into())
        .with_unrouted(Some(reliability()))
        .with_profiles(vec![profile()])
}

fn profile() -> Profile {
    let path = Condition::Path(Pattern::new("/a.*").expect("valid"));
    let method = || Condition::Method("GET".parse().expect("valid"));
    Profile {
        namespace: "shop".parse().expect("valid"),
        routes: vec![ProfileRoute {
            name: "GET /a".to_owned(),
            condition: Condition::All(vec![
                path,
                Condition::Any(vec![method()]),
                Condition::Not(Box::new(method())),
            ]),
            reliability: reliability(),
            classes: Some(Arc::new(ResponseClasses {
                failures: StatusRange::list("404,500").expect("valid"),
                successes: StatusRange::list("501-503").expect("valid"),
            })),
        }],
        backends: vec![],
        budget: BudgetSettings {
            ratio_thousandths: 7,
            ..BudgetSettings::DEFAULT
        },
    }
}

fn reliability() -> Reliability {
    let second = Duration::from_secs(1);
    Reliability {
        timeouts: Timeouts {
            request: Some(second),
            response: Some(2 * second),
            backend_request: None,
            idle: Some(4 * second),
        },
        retry: Some(Retry {
            http: StatusRange::list("5xx,429").expect("valid"),
            grpc: GrpcCodes::list("unavailable,internal").expect("valid"),
            on_failure: true,
            limit: 3,
            try_timeout: Some(5 * second),
            ..Retry::new()
        }),
        heeds_headers: true,
    }
}

/// (what is made of a good table) -> the field that is refused
#[test]
fn tables_that_cannot_be_used_are_refused() {
    use v1::filter::Kind as Filter;
    type Change = fn(&mut v1::RouteTable);
    fn rule(table: &mut v1::RouteTable) -> &mut v1::HttpRule {
        &mut table.routes[0].http_rules[0]
    }
    fn filter(table: &mut v1::RouteTable, at: usize) -> &mut Filter {
        rule(table).filters[at].kind.as_mut().expect("there is one")
    }
    fn retry(table: &mut v1::RouteTable) -> &mut v1::Retry {
        let unrouted = table.unrouted.as_mut().expect("there is one");
        unrouted.retry.as_mut().expect("there is one")
    }
    fn condition(table: &mut v1::RouteTable) -> &mut Option<v1::Condition> {
        &mut table.profiles[0].routes[0].condition
    }
    fn classes(table: &mut v1::RouteTable) -> &mut v1::ResponseClasses {
        let route = &mut table.profiles[0].routes[0];
        route.classes.as_mut().expect("there are some")
    }
    let changes: [(Change, &str); 25] = [
        (|it| it.profiles[0].namespace.clear(), "profile.namespace"),
        (
            |it| classes(it).failures[0].first = 0,
            "profile.classes.failures",
        ),
        (
            |it| classes(it).successes[0].last = 600,
            "profile.classes.successes",
        ),
        (|it| *condition(it) = None, "profile.condition"),
        (
            |it| *condition(it) = Some(v1::Condition { kind: None }),
            "condition.kind",
        ),
        (
            |it| {
                let kind = v1::condition::Kind::Path("(".to_owned());
                *condition(it) = Some(v1::Condition { kind: Some(kind) });
            },
            "condition.path",
        ),
        (|it| retry(it).limit = 65_536, "retry.limit"),
        (|it| retry(it).http[0].last = 600, "retry.http"),
        (|it| retry(it).budget = None, "retry.budget"),
        (
            |it| retry(it).try_timeout_ms = u64::MAX,
            "retry.try_timeout_ms",
        ),
        (
            |it| it.unrouted.as_mut().expect("there is one").idle_timeout_ms = u64::MAX,
            "reliability.idle_timeout_ms",
        ),
        (|it| it.port = 0, "route_table.port"),
        (|it| it.routes[0].kind = 77, "route.kind"),
        (
            |it| it.routes[0].kind = v1::RouteKind::Tcp.into(),
            "route.rules",
        ),
        (|it| it.routes[4].flow_rule = None, "route.rules"),
        (|it| rule(it).name = "A b".to_owned(), "rule.name"),
        (|it| rule(it).matches[0].path = None, "http_match.path"),
        (
            |it| rule(it).matches[0].method = "G T".to_owned(),
            "http_match.method",
        ),
        (
            |it| rule(it).matches[0].headers[0].name = "x y".to_owned(),
            "http_match.headers.name",
        ),
        (
            |it| rule(it).matches[2].path = Some(v1::http_match::Path::Regex("(".to_owned())),
            "http_match.path",
        ),
        (
            |it| {
                let many = rule(it).matches[2].clone();
                rule(it).matches = vec![many; MAX_PATTERNS];
            },
            "route_table.routes",
        ),
        (
            |it| {
                if let Filter::RequestHeaders(edit) = filter(it, 0) {
                    edit.set[0].name = "content-length".to_owned();
                }
            },
            "header_edit",
        ),
        (
            |it| {
                if let Filter::Redirect(redirect) = filter(it, 2) {
                    redirect.status = 200;
                }
            },
            "redirect.status",
        ),
        (
            |it| {
                if let Filter::Mirror(mirror) = filter(it, 4) {
                    mirror.denominator = 0;
                }
            },
            "mirror.share",
        ),
        (|it| rule(it).backends[0].target = None, "backend.target"),
    ];
    for (change, field) in changes {
        let mut message = v1::RouteTable::from(route_table());
        change(&mut message);
        let refused = RouteTable::try_from(message).expect_err(field);
        assert_eq!(refused.field, field);
    }
}

fn routed_server() -> v1::Server {
    let servers = samples().into_iter().filter_map(|it| match it {
        Resource::Server(server) if server.routes.is_some() => Some(server),
        _ => None,
    });
    servers.last().expect("there is one").into()
}

/// An agent from before routes reads the fields that it knows.
#[test]
fn agents_without_routes_let_nobody_in_where_there_are_any() {
    let old = v1::Server {
        routed: None,
        ..routed_server()
    };
    let read = Server::try_from(old).expect("it knows all of this");
    assert_eq!(read.access_policy, AccessPolicy::Deny);
    assert!(read.authorizations.is_empty());
}

/// (what is made of a good Server) -> the field that is refused
#[test]
fn servers_that_cannot_be_used_are_refused() {
    type Change = fn(&mut v1::Server);
    fn route(server: &mut v1::Server) -> &mut v1::InboundRoute {
        &mut server.routed.as_mut().expect("it has routes").routes[0]
    }
    fn limit(server: &mut v1::Server) -> &mut v1::RateLimit {
        server.rate_limit.as_mut().expect("it has one")
    }
    let changes: [(Change, &str); 9] = [
        (|it| limit(it).group = 0, "rate_limit.group"),
        (
            |it| limit(it).overrides[0].per_second = 0,
            "rate_limit.overrides.per_second",
        ),
        (
            |it| limit(it).overrides[0].identities[0].clear(),
            "rate_limit.overrides.identities",
        ),
        (
            |it| it.access_policy = v1::AccessPolicy::AllAuthenticated.into(),
            "server.routed",
        ),
        (
            |it| it.authorizations = route(it).authorizations.clone(),
            "server.routed",
        ),
        (
            |it| it.routed.as_mut().expect("set").access_policy = 77,
            "server.routed.access_policy",
        ),
        (|it| route(it).route = None, "inbound_route.route"),
        (
            |it| {
                let tcp = route_table().routes()[4].clone();
                route(it).route = Some(tcp.into());
            },
            "inbound_route.route",
        ),
        (
            |it| route(it).hostnames.push("a b".to_owned()),
            "inbound_route.hostnames",
        ),
    ];
    for (change, field) in changes {
        let mut message = routed_server();
        change(&mut message);
        let refused = Server::try_from(message).expect_err(field);
        assert_eq!(refused.field, field);
    }
}

#[test]
fn every_kind_round_trips() {
    for sample in samples() {
        let message = v1::Resource::from(sample.clone());
        let bytes = message.encode_to_vec();
        let decoded = v1::Resource::decode(bytes.as_slice()).expect("decodes");
        assert_eq!(Resource::try_from(decoded), Ok(sample));
    }
}

#[test]
fn versions_follow_content() {
    let versions: Vec<u64> = samples()
        .into_iter()
        .map(|it| v1::Resource::from(it).version)
        .collect();
    let again: Vec<u64> = samples()
        .into_iter()
        .map(|it| v1::Resource::from(it).version)
        .collect();
    assert_eq!(versions, again);
    let distinct: std::collections::HashSet<u64> = versions.iter().copied().collect();
    assert_eq!(distinct.len(), versions.len());
}

#[test]
fn a_key_that_names_something_else_is_refused() {
    let mut message = v1::Resource::from(samples().remove(2));
    message.key.as_mut().expect("has one").name = "shop/other".to_owned();
    let refused = Resource::try_from(message).expect_err("must be refused");
    assert_eq!(refused.field, "key");
}

#[test]
fn an_authentication_of_an_unknown_kind_is_refused() {
    let message = v1::Authentication { kind: None };
    assert!(Authentication::try_from(message).is_err());
}

proptest! {
    #[test]
    fn any_bytes_decode_or_fail(bytes in proptest::collection::vec(any::<u8>(), 0..256)) {
        if let Ok(message) = v1::Resource::decode(bytes.as_slice()) {
            let _ = Resource::try_from(message);
        }
    }
}
