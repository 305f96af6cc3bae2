use super::*;
use crate::policy::AccessPolicy;

fn name(text: &str) -> Name {
    text.parse().expect("valid")
}

fn ports(ranges: &[(u16, u16)]) -> Option<PortRanges> {
    Some(PortRanges::new(ranges.iter().copied()))
}

fn policy(rules: Option<Vec<NetworkRule>>) -> WorkloadPolicy {
    let rules = rules.map(|rules| NetworkRules {
        policies: vec!["shop/out".parse().expect("valid")],
        rules,
    });
    WorkloadPolicy {
        workload: "shop/web-0".parse().expect("valid"),
        // Both are about who comes in.
        default: AccessPolicy::Deny,
        servers: vec![],
        network: Some(Arc::new(NetworkRules {
            policies: vec!["shop/in".parse().expect("valid")],
            rules: vec![],
        })),
        network_egress: rules.map(Arc::new),
    }
}

/// Ports are those of the server, pods are known by the record that has the address, networks by the address alone.
#[test]
fn rules_let_out() {
    let mut peers = NetworkPeers::networks(vec![NetworkMatch {
        cidr: "10.9.0.0/16".parse().expect("valid"),
        except: vec!["10.9.1.0/24".parse().expect("valid")],
    }]);
    peers.add(name("shop"), NetworkPods::Named(vec![name("db")]));
    peers.add(name("billing"), NetworkPods::All);
    let policy = policy(Some(vec![
        NetworkRule {
            ports: ports(&[(8000, 8080), (5432, 5432)]),
            peers: Some(peers),
        },
        NetworkRule {
            ports: ports(&[(443, 443)]),
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
    ]));
    for (to, server, allowed) in [
        ("10.1.0.1:8080", Some("shop/db"), true),
        ("10.1.0.1:8000", Some("shop/db"), true),
        ("10.1.0.1:5432", Some("shop/db"), true),
        ("[fd00::1]:5432", Some("shop/db"), true),
        ("10.1.0.1:7999", Some("shop/db"), false),
        ("10.1.0.1:8080", Some("shop/other"), false),
        ("10.1.0.1:8080", Some("elsewhere/db"), false),
        ("10.1.0.1:8080", Some("billing/any"), true),
        ("10.1.0.1:8080", None, false),
        ("10.9.0.1:8080", None, true),
        ("10.9.0.1:8080", Some("elsewhere/db"), true),
        ("10.9.1.1:8080", None, false),
        ("10.9.0.1:80", None, false),
        ("192.0.2.1:443", None, true),
        ("10.1.0.1:443", Some("elsewhere/db"), true),
        ("192.0.2.1:80", None, false),
    ] {
        let server: Option<WorkloadId> = server.map(|it| it.parse().expect("valid"));
        let decided = let_out(
            Some(&policy),
            to.parse().expect("an address"),
            server.as_ref(),
        );
        assert_eq!(decided.is_ok(), allowed, "{to} {server:?}");
        if let Err(reason) = decided {
            assert_eq!(reason.to_string(), "networkpolicy:shop/out");
        }
    }
}

#[test]
fn who_is_not_selected_goes_anywhere_and_who_is_not_known_nowhere() {
    let to = "192.0.2.1:80".parse().expect("an address");
    assert_eq!(let_out(Some(&policy(None)), to, None), Ok(()));
    let selected = policy(Some(vec![]));
    assert!(let_out(Some(&selected), to, None).is_err());
    let unknown = let_out(None, to, None);
    assert_eq!(unknown, Err(DenyReason::WorkloadPolicyUnknown));
}
