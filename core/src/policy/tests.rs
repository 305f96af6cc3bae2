use super::*;
use crate::protocol::PortRanges;
use crate::route::{
    HttpMatch, InboundRoute, PathMatch, PathPrefix, Route, RouteKind, RouteName, RouteRules, Rule,
};
use crate::workload::{Mesh, Tunnel};

/// Decides where no NetworkPolicy asks who has an address.
fn authorize<'a>(
    cluster: &ClusterSettings,
    policy: Option<&WorkloadPolicy>,
    server: impl FnOnce(&ServerName) -> Option<&'a Server>,
    port: u16,
    client: Client<'_>,
) -> Verdict {
    super::authorize(cluster, policy, server, |_| None, port, client)
}

fn identity(namespace: &str, account: &str) -> Identity {
    format!("spiffe://cluster.local/ns/{namespace}/sa/{account}")
        .parse()
        .expect("valid")
}

fn server_name() -> ServerName {
    ServerName {
        group: PolicyGroup::Linkerd,
        name: "production/payment-api".parse().expect("valid"),
    }
}

fn cluster() -> ClusterSettings {
    ClusterSettings {
        trust_domain: "cluster.local".parse().expect("valid"),
        pod_ranges: vec!["10.0.0.0/8".parse().expect("valid")],
        service_ranges: vec![],
        force_tunnels: false,
    }
}

fn policy(default: AccessPolicy) -> WorkloadPolicy {
    WorkloadPolicy {
        workload: "production/payment-0".parse().expect("valid"),
        default,
        servers: vec![ServerBinding {
            port: 8080,
            server: server_name(),
        }],
        network: None,
        network_egress: None,
    }
}

fn server(access_policy: AccessPolicy, required: Vec<Vec<Authentication>>) -> Server {
    let authorization = |required| Authorization {
        name: AuthorizationName {
            group: PolicyGroup::Linkerd,
            name: "production/payment-access".parse().expect("valid"),
        },
        required,
    };
    Server {
        name: server_name(),
        access_policy,
        proxy_protocol: ProxyProtocol::Unknown,
        authorizations: required.into_iter().map(authorization).collect(),
        routes: None,
        rate_limit: None,
    }
}

/// (access policy, client address, has identity) -> allowed
#[test]
fn access_policies() {
    use AccessPolicy::*;
    let inside: IpAddr = "10.1.2.3".parse().expect("valid");
    let outside: IpAddr = "192.0.2.1".parse().expect("valid");
    let who = identity("production", "order-service");
    for (access, [in_with, in_without, out_with, out_without]) in [
        (AllUnauthenticated, [true, true, true, true]),
        (AllAuthenticated, [true, false, true, false]),
        (ClusterUnauthenticated, [true, true, false, false]),
        (ClusterAuthenticated, [true, false, false, false]),
        (Deny, [false, false, false, false]),
        (Audit, [true, true, true, true]),
    ] {
        for (address, identity, expected) in [
            (inside, Some(&who), in_with),
            (inside, None, in_without),
            (outside, Some(&who), out_with),
            (outside, None, out_without),
        ] {
            let client = Client { address, identity };
            let as_default = authorize(&cluster(), Some(&policy(access)), |_| None, 9090, client);
            assert_eq!(as_default.is_allowed(), expected, "{access} {client:?}");
            assert_eq!(as_default.is_audited(), access == Audit);
            let governed = server(access, vec![]);
            let of_server = authorize(
                &cluster(),
                Some(&policy(Deny)),
                |_| Some(&governed),
                8080,
                client,
            );
            assert_eq!(of_server.is_allowed(), expected, "server {access}");
        }
    }
}

#[test]
fn what_is_unknown_denies() {
    let who = identity("production", "order-service");
    let client = Client {
        address: "10.1.2.3".parse().expect("valid"),
        identity: Some(&who),
    };
    let open = policy(AccessPolicy::AllUnauthenticated);
    assert_eq!(
        authorize(&cluster(), None, |_| None, 8080, client),
        Verdict::Deny {
            server: None,
            reason: DenyReason::WorkloadPolicyUnknown
        }
    );
    assert_eq!(
        authorize(&cluster(), Some(&open), |_| None, 8080, client),
        Verdict::Deny {
            server: Some(server_name()),
            reason: DenyReason::ServerUnknown
        }
    );
    let names_unknown = server(
        AccessPolicy::Deny,
        vec![vec![Authentication::Unknown("x".to_owned())]],
    );
    let verdict = authorize(
        &cluster(),
        Some(&open),
        |_| Some(&names_unknown),
        8080,
        client,
    );
    assert!(!verdict.is_allowed());
}

#[test]
fn authorizations_need_every_authentication() {
    let order = identity("production", "order-service");
    let other = identity("production", "other");
    let tls = Authentication::MeshTls(vec![IdentityMatch::Exact(order.clone())]);
    let net = Authentication::Networks(vec![NetworkMatch {
        cidr: "10.0.0.0/8".parse().expect("valid"),
        except: vec!["10.9.0.0/16".parse().expect("valid")],
    }]);
    let namespace = Authentication::MeshTls(vec![IdentityMatch::Namespace {
        trust_domain: "cluster.local".parse().expect("valid"),
        namespace: "production".parse().expect("valid"),
    }]);
    let any = Authentication::MeshTls(vec![IdentityMatch::Any]);
    let (tls, net) = (&tls, &net);
    for (required, address, who, expected) in [
        (vec![tls, net], "10.1.2.3", Some(&order), true),
        (vec![tls, net], "10.9.2.3", Some(&order), false),
        (vec![tls, net], "192.0.2.1", Some(&order), false),
        (vec![tls], "192.0.2.1", Some(&order), true),
        (vec![tls], "10.1.2.3", Some(&other), false),
        (vec![tls], "10.1.2.3", None, false),
        (vec![net], "10.1.2.3", None, true),
        (vec![&namespace], "10.1.2.3", Some(&other), true),
        (vec![&any], "10.1.2.3", Some(&other), true),
        (vec![&any], "10.1.2.3", None, false),
        (vec![], "192.0.2.1", None, true),
    ] {
        let server = server(
            AccessPolicy::Deny,
            vec![required.into_iter().cloned().collect()],
        );
        let client = Client {
            address: address.parse().expect("valid"),
            identity: who,
        };
        let verdict = authorize(
            &cluster(),
            Some(&policy(AccessPolicy::Deny)),
            |_| Some(&server),
            8080,
            client,
        );
        assert_eq!(verdict.is_allowed(), expected, "{address} {who:?}");
    }
}

/// A Server of which `friend` may do everything, with routes; each has a host (or none), a kind, a prefix of
/// paths and whom it is open to besides.
fn routed(routes: &[(&str, RouteKind, &str, &str)]) -> Server {
    let exactly = |account: &str| {
        let identity = identity("production", account);
        vec![Authentication::MeshTls(vec![IdentityMatch::Exact(
            identity,
        )])]
    };
    let route = |&(host, kind, prefix, account): &(&str, RouteKind, &str, &str)| InboundRoute {
        route: Route {
            name: RouteName {
                name: format!("production/r{}", prefix.replace('/', "-").to_lowercase())
                    .trim_end_matches('-')
                    .parse()
                    .expect("a name"),
                kind,
            },
            created: None,
            rules: RouteRules::Http(vec![Rule {
                name: None,
                matches: vec![HttpMatch {
                    path: PathMatch::Prefix(PathPrefix::new(prefix)),
                    ..HttpMatch::any()
                }],
                filters: vec![],
                backends: vec![],
                reliability: None,
            }]),
        },
        hostnames: match host {
            "" => vec![],
            host => vec![host.parse().expect("a host")],
        },
        authorizations: server(AccessPolicy::Deny, vec![exactly(account)]).authorizations,
    };
    Server {
        routes: Some(InboundRoutes::new(routes.iter().map(route).collect())),
        ..server(AccessPolicy::Deny, vec![exactly("friend")])
    }
}

/// What becomes of a request: 200 for allowed, or the status of the answer.
fn asked(server: &Server, account: Option<&str>, url: &str, is_grpc: bool) -> u16 {
    let identity = account.map(|it| identity("production", it));
    let client = Client {
        address: "10.1.2.3".parse().expect("valid"),
        identity: identity.as_ref(),
    };
    let request = http::Request::get(url).body(()).expect("a request");
    let (head, ()) = request.into_parts();
    match authorize_request(&cluster(), server, client, &head, is_grpc) {
        Ok(_) => 200,
        Err(RequestDenial::Denied { .. }) => 403,
        Err(RequestDenial::NotFound) => 404,
    }
}

#[test]
fn requests_are_decided_by_their_route() {
    use RouteKind::{Grpc, Http};
    let server = routed(&[
        ("", Http, "/public", "reader"),
        ("", Http, "/admin", "admin"),
        ("api.shop", Http, "/", "api"),
        ("", Grpc, "/shop.Cart", "reader"),
    ]);
    for (account, url, is_grpc, expected) in [
        ("reader", "http://web/public/1", false, 200),
        ("reader", "http://web/publicity", false, 404),
        ("reader", "http://web/admin", false, 403),
        ("admin", "http://web/admin/x?y", false, 200),
        ("admin", "http://web/public", false, 403),
        // The Server's own policy is for all routes, and for no request without one.
        ("friend", "http://web/admin", false, 200),
        ("friend", "http://web/elsewhere", false, 404),
        // The most specific host decides.
        ("api", "http://api.shop:8080/admin", false, 200),
        ("admin", "http://API.shop/admin", false, 403),
        ("api", "http://other.shop/", false, 404),
        // A GRPCRoute is for calls of gRPC only.
        ("reader", "http://web/shop.Cart/Add", true, 200),
        ("reader", "http://web/shop.Cart/Add", false, 404),
        ("reader", "http://web/public", true, 200),
        // However the server reads the path.
        ("reader", "http://web/public/../admin", false, 404),
        (
            "reader",
            "http://web/public/../admin/..;/public/x",
            false,
            404,
        ),
        ("api", "http://api.shop./admin", false, 200),
        ("admin", "http://api.shop./admin", false, 403),
        ("reader", "http://web/public/%2e%2e/admin", false, 404),
        ("reader", "http://web/public/..%2Fother", false, 404),
        ("reader", "http://web//admin", false, 403),
        ("reader", "http://web/public/a%20b", false, 200),
        ("admin", "http://web/%61dmin", false, 404),
    ] {
        let code = asked(&server, Some(account), url, is_grpc);
        assert_eq!(code, expected, "{account} {url}");
    }
    assert_eq!(asked(&server, None, "http://web/public", false), 403);
    let none = routed(&[]);
    assert_eq!(asked(&none, Some("friend"), "http://web/", false), 404);
    let without = server_without_routes();
    assert_eq!(asked(&without, Some("friend"), "http://web/x", false), 200);
    assert_eq!(asked(&without, Some("reader"), "http://web/x", false), 403);
}

/// (prefix of the GRPCRoute, method, path, header; what becomes of it): everybody may make any request, but only the
/// admin calls.
#[test]
fn what_may_be_taken_for_a_call_is_decided_as_one_too() {
    use RouteKind::{Grpc, Http};
    let web = ("content-type", "application/grpc-web+proto");
    let json = ("content-type", "application/json");
    let connect = ("connect-protocol-version", "1");
    for (prefix, method, path, header, expected) in [
        // The route names the service: whatever it is.
        ("/shop.Cart", "POST", "/shop.Cart/Add", web, 403),
        ("/shop.Cart", "POST", "/shop.Cart/Add", json, 403),
        ("/shop.Cart", "GET", "/shop.Cart/Add?connect=v1", json, 403),
        ("/shop.Cart", "POST", "/%73hop.Cart/Add", json, 403),
        ("/shop.Cart", "POST", "/shop.Other/Add", web, 200),
        ("/shop.Cart", "OPTIONS", "/shop.Cart/Add", json, 200),
        // It names none: what looks like a call.
        ("/", "POST", "/Cart/Add", web, 403),
        (
            "/",
            "POST",
            "/Cart/Add",
            ("content-type", "Application/Proto"),
            403,
        ),
        (
            "/",
            "POST",
            "/Cart/Add",
            ("content-type", "application/connect+json"),
            403,
        ),
        ("/", "POST", "/Cart/Add", connect, 403),
        ("/", "POST", "/shop.Cart/Add", json, 403),
        ("/", "POST", "/Cart/Add", json, 200),
        ("/", "GET", "/static/site.css", ("accept", "*/*"), 200),
        ("/", "GET", "/", ("accept", "*/*"), 200),
        ("/", "OPTIONS", "/shop.Cart/Add", json, 200),
    ] {
        let server = routed(&[("", Http, "/", "reader"), ("", Grpc, prefix, "admin")]);
        let account = identity("production", "reader");
        let client = Client {
            address: "10.1.2.3".parse().expect("valid"),
            identity: Some(&account),
        };
        let request = http::Request::builder().method(method).uri(path);
        let request = request.header(header.0, header.1).body(());
        let (head, ()) = request.expect("a request").into_parts();
        let code = match authorize_request(&cluster(), &server, client, &head, false) {
            Ok(passed) => {
                // It is the HTTPRoute's all the same.
                let rule = passed.rule.expect("a rule");
                assert_eq!(rule.route.kind, Http, "{path}");
                200
            }
            Err(RequestDenial::Denied { .. }) => 403,
            Err(RequestDenial::NotFound) => 404,
        };
        assert_eq!(code, expected, "{prefix} {method} {path} {header:?}");
    }
}

fn server_without_routes() -> Server {
    Server {
        routes: None,
        ..routed(&[])
    }
}

#[test]
fn routes_let_in_requests_and_nothing_else() {
    let server = routed(&[("", RouteKind::Http, "/public", "reader")]);
    let connects = |account: &str| {
        let identity = identity("production", account);
        let client = Client {
            address: "10.1.2.3".parse().expect("valid"),
            identity: Some(&identity),
        };
        let policy = policy(AccessPolicy::AllUnauthenticated);
        authorize(&cluster(), Some(&policy), |_| Some(&server), 8080, client)
    };
    let reader = connects("reader");
    assert!(
        reader.admits_requests() && !reader.is_allowed(),
        "{reader:?}"
    );
    assert!(!reader.without_requests().admits_requests());
    let friend = connects("friend");
    assert!(friend.is_allowed() && friend.without_requests().is_allowed());
    let stranger = connects("stranger");
    assert!(!stranger.admits_requests(), "{stranger:?}");
    assert_eq!(stranger.by(), "default:deny");
}

/// The access policy is for all routes too.
#[test]
fn an_access_policy_covers_what_routes_do_not() {
    let server = Server {
        access_policy: AccessPolicy::AllAuthenticated,
        ..routed(&[("", RouteKind::Http, "/public", "reader")])
    };
    assert_eq!(
        asked(&server, Some("other"), "http://web/public", false),
        200
    );
    assert_eq!(asked(&server, None, "http://web/public", false), 403);
    assert_eq!(asked(&server, Some("other"), "http://web/", false), 404);
}

/// A workload at an address: meshed as this service account of `shop`, or not.
fn workload(id: &str, address: &str, account: Option<&str>) -> Arc<Workload> {
    Arc::new(Workload {
        id: id.parse().expect("valid"),
        addresses: vec![address.parse().expect("valid")],
        node: "one".parse().expect("valid"),
        owner: None,
        mesh: match account {
            None => Mesh::Unmeshed,
            Some(account) => Mesh::Meshed {
                identity: identity("shop", account),
                tunnel: Tunnel::WeftH2,
            },
        },
        opaque_ports: None,
    })
}

#[test]
fn network_policies_are_asked_besides() {
    let name = |it: &str| -> Name { it.parse().expect("valid") };
    let mut peers = NetworkPeers::networks(vec![NetworkMatch {
        cidr: "10.9.0.0/16".parse().expect("valid"),
        except: vec!["10.9.1.0/24".parse().expect("valid")],
    }]);
    let named = NetworkPods::Named(vec![name("web"), name("plain")]);
    peers.add(name("shop"), named);
    peers.add(name("billing"), NetworkPods::All);
    let ports = |it: &[(u16, u16)]| Some(PortRanges::new(it.iter().copied()));
    let rules = NetworkRules {
        policies: vec!["production/only-these".parse().expect("valid")],
        rules: vec![
            NetworkRule {
                ports: ports(&[(8000, 8080), (9090, 9090)]),
                peers: Some(peers),
            },
            NetworkRule {
                ports: ports(&[(7000, 7000)]),
                peers: None,
            },
            NetworkRule {
                ports: None,
                peers: Some(NetworkPeers::default()),
            },
            NetworkRule {
                ports: ports(&[]),
                peers: None,
            },
        ],
    };
    let workloads = [
        workload("shop/web", "10.1.0.1", Some("web")),
        workload("shop/plain", "10.1.0.2", None),
        workload("shop/other", "10.1.0.3", Some("other")),
        workload("billing/any", "10.1.0.4", Some("any")),
        workload("elsewhere/web", "10.1.0.5", None),
        workload("shop/other", "10.9.0.2", Some("other")),
    ];
    let at = |address: IpAddr| {
        let mut workloads = workloads.iter();
        workloads.find(|it| it.addresses == [address]).cloned()
    };
    let policy = WorkloadPolicy {
        network: Some(Arc::new(rules)),
        ..policy(AccessPolicy::AllUnauthenticated)
    };
    let open = server(AccessPolicy::Deny, vec![vec![]]);
    for (port, client, account, allowed) in [
        // Meshed: by the record and the identity.
        (8080, "10.1.0.1", Some("web"), true),
        (8000, "10.1.0.1", Some("web"), true),
        (8080, "10.1.0.1", None, false),
        (8080, "10.1.0.1", Some("other"), false),
        (8080, "10.1.0.7", Some("web"), false),
        // Not meshed: by the record. Whoever is there has whatever identity.
        (8080, "10.1.0.2", None, true),
        (8080, "10.1.0.2", Some("web"), true),
        (8080, "10.1.0.3", Some("other"), false),
        (8080, "10.1.0.4", Some("any"), true),
        (8080, "10.1.0.5", None, false),
        // Networks: by the address.
        (8080, "10.9.0.1", None, true),
        (8080, "10.9.0.2", Some("other"), true),
        (8080, "10.9.0.2", None, true),
        (8080, "10.9.1.1", None, false),
        // Ports.
        (9090, "10.1.0.1", Some("web"), true),
        (9091, "10.1.0.1", Some("web"), false),
        (7000, "192.0.2.1", None, true),
        (7001, "192.0.2.1", None, false),
    ] {
        let identity = account.map(|it| identity("shop", it));
        let client = Client {
            address: client.parse().expect("an address"),
            identity: identity.as_ref(),
        };
        let verdict =
            super::authorize(&cluster(), Some(&policy), |_| Some(&open), at, port, client);
        assert_eq!(verdict.is_allowed(), allowed, "{port} {client:?}");
        if !allowed {
            assert_eq!(verdict.by(), "networkpolicy:production/only-these");
        }
    }
    // The mesh's own policy must allow it too.
    let nobody = Server {
        authorizations: vec![],
        ..open
    };
    let web = identity("shop", "web");
    let client = Client {
        address: "10.1.0.1".parse().expect("an address"),
        identity: Some(&web),
    };
    let verdict = super::authorize(
        &cluster(),
        Some(&policy),
        |_| Some(&nobody),
        at,
        8080,
        client,
    );
    assert_eq!(verdict.by(), "default:deny");
    // Audit is about the mesh's policy: who is not let in by this one stays outside.
    let audit = Server {
        access_policy: AccessPolicy::Audit,
        ..nobody
    };
    let client = Client {
        identity: None,
        ..client
    };
    let verdict = super::authorize(
        &cluster(),
        Some(&policy),
        |_| Some(&audit),
        at,
        8080,
        client,
    );
    assert_eq!(verdict.by(), "networkpolicy:production/only-these");
}

#[test]
fn pods_add_up() {
    let name = |it: &str| -> Name { it.parse().expect("valid") };
    let named = |it: &[&str]| NetworkPods::Named(it.iter().map(|it| name(it)).collect());
    for (parts, expected) in [
        (
            vec![named(&["b", "a"]), named(&["c", "a"])],
            named(&["a", "b", "c"]),
        ),
        (vec![named(&["a"]), NetworkPods::All], NetworkPods::All),
        (vec![NetworkPods::All, named(&["a"])], NetworkPods::All),
    ] {
        let mut peers = NetworkPeers::default();
        for part in parts {
            peers.add(name("shop"), part);
        }
        assert_eq!(peers.pods().get(&name("shop")), Some(&expected));
    }
}
