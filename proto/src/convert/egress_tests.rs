use weft_core::route::*;
use weft_core::*;

use super::{MAX_PORTS, closed_egress, v1};
use crate::Resource;

/// A network with a route of each kind.
fn network() -> EgressNetwork {
    let name: EgressName = "policy.weft.dev/shop/outside".parse().expect("valid");
    let backends = vec![
        Backend {
            weight: 1,
            target: Target::Egress(name.clone()),
            filters: vec![],
        },
        Backend {
            weight: 2,
            target: Target::Service {
                name: "shop/proxy".parse().expect("valid"),
                port: 3128,
            },
            filters: vec![],
        },
    ];
    let rule = Rule {
        name: None,
        matches: vec![HttpMatch::any()],
        filters: vec![],
        backends: backends.clone(),
        reliability: None,
    };
    let flow = FlowRule {
        name: None,
        hostnames: vec!["*.example.com".parse().expect("valid")],
        backends,
    };
    let routes = RouteKind::ALL.map(|kind| {
        let of_requests = kind.route_type().is_of_requests();
        let rules = match of_requests {
            true => RouteRules::Http(vec![rule.clone()]),
            false => RouteRules::Flow(flow.clone()),
        };
        let host = of_requests.then(|| "example.com".parse().expect("valid"));
        EgressRoute {
            route: Route {
                name: RouteName {
                    name: "shop/route".parse().expect("valid"),
                    kind,
                },
                created: Some(5),
                rules,
            },
            hostnames: host.into_iter().collect(),
            ports: vec![80, 443],
        }
    });
    let settings = EgressSettings {
        name,
        created: Some(7),
        is_global: true,
        networks: vec![NetworkMatch {
            cidr: "203.0.113.0/24".parse().expect("valid"),
            except: vec!["203.0.113.7/32".parse().expect("valid")],
        }],
        traffic_policy: TrafficPolicy::Deny,
    };
    EgressNetwork::new(settings, routes.into())
}

#[test]
fn networks_round_trip() {
    let bare = EgressSettings {
        created: None,
        is_global: false,
        networks: vec![],
        traffic_policy: TrafficPolicy::Allow,
        ..network().settings().clone()
    };
    for sample in [network(), EgressNetwork::new(bare, vec![])] {
        let sample = Resource::EgressNetwork(sample);
        let message = v1::Resource::from(sample.clone());
        assert_eq!(Resource::try_from(message), Ok(sample));
    }
}

/// (what is made of a good network) -> the field that is refused
#[test]
fn networks_that_cannot_be_used_are_refused() {
    type Change = fn(&mut v1::EgressNetwork);
    const OF_FLOWS: usize = 4;
    let changes: [(Change, &str); 11] = [
        (|it| it.name = None, "egress_network.name"),
        (
            |it| it.name.as_mut().expect("set").group = 9,
            "egress_name.group",
        ),
        (
            |it| it.name.as_mut().expect("set").name = None,
            "egress_name.name",
        ),
        // Nobody knows whether it was to allow or to deny.
        (|it| it.traffic_policy = 0, "egress_network.traffic_policy"),
        (|it| it.traffic_policy = 9, "egress_network.traffic_policy"),
        (
            |it| it.networks[0].cidr = "203.0.113.0/33".to_owned(),
            "network.cidr",
        ),
        (|it| it.routes[0].route = None, "egress_route.route"),
        (|it| it.routes[0].ports.push(0), "egress_route.ports"),
        (
            |it| it.routes[0].hostnames.push("a b".to_owned()),
            "egress_route.hostnames",
        ),
        (
            |it| it.routes[OF_FLOWS].hostnames.push("a".to_owned()),
            "egress_route.hostnames",
        ),
        (
            |it| it.routes[0].ports = (1..=MAX_PORTS as u32).collect(),
            "egress_network.routes.ports",
        ),
    ];
    for (change, field) in changes {
        let mut message = v1::EgressNetwork::from(network());
        change(&mut message);
        let closed = closed_egress(message.clone());
        let refused = EgressNetwork::try_from(message).expect_err(field);
        assert_eq!(refused.field, field);
        // What cannot be read opens nothing.
        assert_eq!(
            closed.is_some(),
            !field.starts_with("egress_name") && field != "egress_network.name"
        );
        if let Some(closed) = closed {
            assert!(!closed.allows_unrouted() && closed.routes().is_empty());
            assert_eq!(
                closed.settings().networks.is_empty(),
                field == "network.cidr"
            );
        }
    }
}
