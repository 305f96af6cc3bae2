//! Addresses that manifests do not say.
//!
//! A repository has templates of pods and no addresses, but policies may name networks. A rule of a network tells apart
//! only who is in it from who is not, so that every address that may be is tried by one of each kind: where all give the
//! same answer, the address does not matter, and where they do not, there is no answer.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use weft_core::route::InboundRoutes;
use weft_core::{Authentication, Authorization, NetworkMatch, NetworkRules, Server};

/// Where an address is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// This is it.
    Known(IpAddr),
    /// Somewhere in these.
    Within(Vec<IpNet>),
    /// Nobody knows.
    Anywhere,
}

impl Place {
    /// One address of each kind that these networks tell apart.
    pub(super) fn kinds(&self, networks: &[IpNet]) -> Vec<IpAddr> {
        let (first, within): (Vec<IpAddr>, _) = match self {
            Self::Known(address) => return vec![*address],
            Self::Within(ranges) => (
                ranges.iter().map(IpNet::network).collect(),
                Some(ranges.as_slice()),
            ),
            Self::Anywhere => {
                let all = [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()];
                (all.to_vec(), None)
            }
        };
        // Networks are intervals: what is told apart begins where one begins, or behind one.
        let begin = networks.iter().map(IpNet::network);
        let behind = networks.iter().filter_map(|it| next(it.broadcast()));
        let is_possible =
            |it: &IpAddr| within.is_none_or(|ranges| ranges.iter().any(|range| range.contains(it)));
        let all: BTreeSet<IpAddr> = first.into_iter().chain(begin).chain(behind).collect();
        all.into_iter().filter(is_possible).collect()
    }
}

/// The address behind one; none: it is the last.
fn next(address: IpAddr) -> Option<IpAddr> {
    Some(match address {
        IpAddr::V4(it) => Ipv4Addr::from(u32::from(it).checked_add(1)?).into(),
        IpAddr::V6(it) => Ipv6Addr::from(u128::from(it).checked_add(1)?).into(),
    })
}

/// The networks that NetworkPolicies name.
pub(super) fn of_rules(rules: &NetworkRules) -> impl Iterator<Item = IpNet> + '_ {
    let peers = rules.rules.iter().filter_map(|it| it.peers.as_ref());
    peers.flat_map(|it| &it.networks).flat_map(of_match)
}

/// The networks that the policies of a Server name.
pub(super) fn of_server(server: &Server) -> impl Iterator<Item = IpNet> + '_ {
    let of_routes = server.routes.iter().flat_map(InboundRoutes::authorizations);
    let all = server.authorizations.iter().chain(of_routes);
    all.flat_map(of_authorization)
}

fn of_authorization(authorization: &Authorization) -> impl Iterator<Item = IpNet> + '_ {
    let networks = authorization.required.iter().filter_map(|it| match it {
        Authentication::Networks(networks) => Some(networks),
        Authentication::MeshTls(_) | Authentication::Unknown(_) => None,
    });
    networks.flatten().flat_map(of_match)
}

fn of_match(network: &NetworkMatch) -> impl Iterator<Item = IpNet> + '_ {
    std::iter::once(network.cidr).chain(network.except.iter().copied())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_address_is_tried() {
        let nets = |texts: &[&str]| -> Vec<IpNet> {
            texts.iter().map(|it| it.parse().expect("valid")).collect()
        };
        let shown = |place: &Place, networks: &[&str]| {
            let kinds = place.kinds(&nets(networks)).into_iter();
            kinds.map(|it| it.to_string()).collect::<Vec<_>>()
        };
        let networks = ["10.0.0.0/8", "10.1.0.0/16", "255.0.0.0/8"];
        assert_eq!(
            shown(&Place::Anywhere, &networks),
            [
                "0.0.0.0",
                "10.0.0.0",
                "10.1.0.0",
                "10.2.0.0",
                "11.0.0.0",
                "255.0.0.0",
                "::"
            ]
        );
        let within = Place::Within(nets(&["10.1.4.0/24"]));
        assert_eq!(shown(&within, &networks), ["10.1.4.0"]);
        assert_eq!(
            shown(&within, &["10.1.4.128/25", "0.0.0.0/0"]),
            ["10.1.4.0", "10.1.4.128"]
        );
        let known = Place::Known([10, 1, 1, 1].into());
        assert_eq!(shown(&known, &networks), ["10.1.1.1"]);
    }
}
