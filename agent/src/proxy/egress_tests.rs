use weft_core::route::{
    Backend, FlowRule, HttpMatch, PathMatch, PathPrefix, Route, RouteKind, RouteName, RouteRules,
    Rule,
};
use weft_core::{ClusterSettings, EgressName, EgressRoute, EgressSettings, TrafficPolicy};
use weft_proto::{Key, Kind, Resource};

use super::super::live_requests::LiveRequests;
use super::*;

const OUTSIDE: &str = "203.0.113.7";

fn name() -> EgressName {
    "policy.weft.dev/shop/out".parse().expect("valid")
}

fn at(port: u16) -> SocketAddr {
    SocketAddr::new(OUTSIDE.parse().expect("valid"), port)
}

fn client() -> Name {
    "shop".parse().expect("valid")
}

fn network(traffic_policy: TrafficPolicy, routes: Vec<EgressRoute>) -> EgressNetwork {
    let settings = EgressSettings {
        name: name(),
        created: None,
        is_global: false,
        networks: vec![],
        traffic_policy,
    };
    EgressNetwork::new(settings, routes)
}

/// A route for port 80, to the network itself, or to a Service.
fn route(kind: RouteKind, is_to_network: bool) -> EgressRoute {
    let target = match is_to_network {
        true => Target::Egress(name()),
        false => Target::Service {
            name: "shop/proxy".parse().expect("valid"),
            port: 3128,
        },
    };
    let backends = vec![Backend {
        weight: 1,
        target,
        filters: vec![],
    }];
    let rules = match kind.route_type().is_of_requests() {
        true => RouteRules::Http(vec![Rule {
            name: None,
            matches: vec![HttpMatch {
                path: PathMatch::Prefix(PathPrefix::new("/open")),
                ..HttpMatch::any()
            }],
            filters: vec![],
            backends,
            reliability: None,
        }]),
        false => RouteRules::Flow(FlowRule {
            name: None,
            hostnames: match kind {
                RouteKind::Tls => vec!["example.com".parse().expect("valid")],
                _ => vec![],
            },
            backends,
        }),
    };
    EgressRoute {
        route: Route {
            name: RouteName {
                name: "shop/route".parse().expect("valid"),
                kind,
            },
            created: None,
            rules,
        },
        hostnames: vec![],
        ports: vec![80],
    }
}

fn head(path: &str) -> Parts {
    let request = http::Request::get(path).body(()).expect("valid");
    request.into_parts().0
}

/// (kind of route, to the network) -> bytes; TLS of the name, of another; requests that match, that do not; all at
/// port 80 of a network that denies
#[test]
fn what_is_no_routes_falls_under_the_policy() {
    for (kind, is_to_network, allowed) in [
        (None, true, [false, false, false, false, false]),
        (Some(RouteKind::Tcp), true, [true, true, true, true, true]),
        // What goes to where the client wanted to is not what the route says.
        (
            Some(RouteKind::Tcp),
            false,
            [false, false, false, true, true],
        ),
        (
            Some(RouteKind::Tls),
            true,
            [false, true, false, false, false],
        ),
        (
            Some(RouteKind::Http),
            true,
            [false, false, false, true, false],
        ),
        (
            Some(RouteKind::Http),
            false,
            [false, false, false, true, false],
        ),
        (
            Some(RouteKind::Grpc),
            true,
            [false, false, false, true, false],
        ),
    ] {
        let routes: Vec<EgressRoute> = kind
            .map(|it| route(it, is_to_network))
            .into_iter()
            .collect();
        let at_port = |policy, port| {
            let network = network(policy, routes.clone());
            let flow = |name| allows_flow(&network, &client(), port, name);
            let request = |path| allows_request(&network, &client(), port, &head(path));
            [
                flow(None),
                flow(Some("example.com")),
                flow(Some("other.example.com")),
                request("/open/x"),
                request("/closed"),
            ]
        };
        assert_eq!(at_port(TrafficPolicy::Deny, 80), allowed, "{kind:?}");
        // Of other ports it says nothing.
        assert_eq!(at_port(TrafficPolicy::Deny, 81), [false; 5], "{kind:?}");
        assert_eq!(at_port(TrafficPolicy::Allow, 81), [true; 5], "{kind:?}");
    }
}

fn store() -> std::sync::Arc<Store> {
    let store = Store::new();
    let cluster = ClusterSettings {
        trust_domain: "cluster.local".parse().expect("valid"),
        pod_ranges: vec!["10.1.0.0/16".parse().expect("valid")],
        service_ranges: vec!["10.2.0.0/16".parse().expect("valid")],
        force_tunnels: false,
    };
    store.apply(vec![Resource::Cluster(cluster)], vec![]);
    store.set_complete();
    store
}

#[test]
fn networks_are_found_for_what_is_outside() {
    let store = store();
    let found = |to: &str| {
        let to = to.parse().expect("valid");
        store.egress(&client(), to).is_some()
    };
    assert!(!store.has_egress() && !found("203.0.113.7:80"));
    let denying = network(TrafficPolicy::Deny, vec![]);
    store.apply(vec![Resource::EgressNetwork(denying)], vec![]);
    assert!(store.has_egress() && found("203.0.113.7:80") && found("[2001:db8::1]:80"));
    for inside in ["10.1.0.9:80", "10.2.0.9:80", "127.0.0.1:80"] {
        assert!(!found(inside), "{inside}");
    }
    let other = "staging".parse().expect("valid");
    assert!(store.egress(&other, at(80)).is_none());
    let dump = serde_json::to_value(store.dump()).expect("written");
    let shown = dump.pointer("/policies/egress_networks/0/traffic_policy");
    assert_eq!(shown, Some(&serde_json::json!("Deny")));
    for gone in ["no name", "policy.weft.dev/shop/out"] {
        let key = Key {
            kind: Kind::EgressNetwork,
            name: gone.to_owned(),
        };
        store.apply(vec![], vec![key]);
    }
    assert!(!store.has_egress());
}

#[test]
fn what_is_no_longer_allowed_ends() {
    let store = store();
    let live = Arc::new(LiveRequests::default());
    let enter = |what| {
        live.enter(Live::Egress(LiveEgress {
            client: client(),
            to: at(80),
            what,
            end: CancellationToken::new(),
        }))
    };
    let entries = [
        enter(What::Flow(None)),
        enter(What::Flow(Some("example.com".into()))),
        enter(What::Request(Box::new(head("/open")))),
        enter(What::Request(Box::new(head("/closed")))),
        enter(What::Requests),
    ];
    let ended = || entries.each_ref().map(|it| it.end().is_cancelled());
    let change = |policy, routes| {
        let network = network(policy, routes);
        store.apply(vec![Resource::EgressNetwork(network)], vec![]);
        live.recheck(&store);
    };
    live.recheck(&store);
    change(TrafficPolicy::Allow, vec![]);
    assert_eq!(ended(), [false; 5]);
    change(TrafficPolicy::Deny, vec![route(RouteKind::Tcp, true)]);
    // Nobody knows which requests those were.
    assert_eq!(ended(), [false, false, false, false, true]);
    change(TrafficPolicy::Deny, vec![route(RouteKind::Http, true)]);
    assert_eq!(ended(), [true, true, false, true, true]);
    change(TrafficPolicy::Deny, vec![]);
    assert_eq!(ended(), [true; 5]);
}
