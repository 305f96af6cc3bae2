//! EgressNetworks: what pods may reach outside of the cluster, and the decision over it.
//!
//! An address outside of the cluster belongs to at most one of the networks that hold for a client; that
//! network's routes say where a request or a flow goes, and its traffic policy what happens to the rest. An
//! address that belongs to none is reached as if there were no networks.

use std::collections::HashMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use serde::ser::SerializeStruct;
use serde::{Serialize, Serializer};

use crate::names::{Name, ObjectName};
use crate::policy::{NetworkMatch, PolicyGroup};
use crate::route::{HostMatch, Route, RouteTable, RouteTableName};

/// A set of addresses outside of the cluster, and what may go there.
#[derive(Clone, Debug)]
pub struct EgressNetwork {
    settings: EgressSettings,
    routes: Vec<EgressRoute>,
    /// The routes of each port that some route names.
    ports: HashMap<u16, Arc<RouteTable>>,
    /// Those of all other ports.
    other_ports: Option<Arc<RouteTable>>,
}

/// What an EgressNetwork says itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EgressSettings {
    /// Its name.
    pub name: EgressName,
    /// When it was created, in seconds since 1970, where that is known. Who is older comes first.
    pub created: Option<i64>,
    /// Whether it holds for the clients of all namespaces that have none of their own.
    pub is_global: bool,
    /// Its addresses. None at all: whatever is outside of the cluster.
    pub networks: Vec<NetworkMatch>,
    /// What holds for what no route is for.
    pub traffic_policy: TrafficPolicy,
}

/// Names an EgressNetwork; the same name may exist in both groups.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct EgressName {
    /// Namespace and name.
    #[serde(flatten)]
    pub name: ObjectName,
    /// The API group it was written in.
    pub group: PolicyGroup,
}

/// What happens to traffic that no route is for (`spec.trafficPolicy`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub enum TrafficPolicy {
    /// It goes where the client wanted to.
    Allow,
    /// It is refused.
    Deny,
}

/// One route of an EgressNetwork.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct EgressRoute {
    /// What it matches, and where that goes.
    #[serde(flatten)]
    pub route: Route,
    /// Of a route of requests, the hosts that it is for; none: all.
    pub hostnames: Vec<HostMatch>,
    /// The ports that it is for; none: all.
    pub ports: Vec<u16>,
}

/// All EgressNetworks that are known. Cheap to look up in, and for nothing if there are none.
#[derive(Clone, Debug, Default)]
pub struct EgressNetworks {
    by_namespace: HashMap<Name, Vec<Arc<EgressNetwork>>>,
    global: Vec<Arc<EgressNetwork>>,
}

impl EgressNetwork {
    /// Orders routes, for each port that one of them names.
    pub fn new(settings: EgressSettings, routes: Vec<EgressRoute>) -> Self {
        let name = &settings.name.name;
        let table = |port: u16| {
            let here = routes
                .iter()
                .filter(|it| it.ports.is_empty() || it.ports.contains(&port));
            let here: Vec<(Route, Vec<HostMatch>)> = here
                .map(|it| (it.route.clone(), it.hostnames.clone()))
                .collect();
            let service = name.clone();
            let name = RouteTableName { service, port };
            (!here.is_empty()).then(|| Arc::new(RouteTable::with_hosts(name, here)))
        };
        let mut ports: Vec<u16> = routes.iter().flat_map(|it| it.ports.clone()).collect();
        ports.sort_unstable();
        ports.dedup();
        let ports = ports.into_iter();
        Self {
            ports: ports.filter_map(|it| Some((it, table(it)?))).collect(),
            // No port is 0, so that no route names it.
            other_ports: table(0),
            routes,
            settings,
        }
    }

    /// What it says itself.
    pub fn settings(&self) -> &EgressSettings {
        &self.settings
    }

    /// Its name.
    pub fn name(&self) -> &EgressName {
        &self.settings.name
    }

    /// All routes, in the order in which they were given.
    pub fn routes(&self) -> &[EgressRoute] {
        &self.routes
    }

    /// The routes that hold for connections to a port; none: there are none.
    pub fn routes_at(&self, port: u16) -> Option<&Arc<RouteTable>> {
        self.ports.get(&port).or(self.other_ports.as_ref())
    }

    /// Whether traffic that no route is for may pass.
    pub fn allows_unrouted(&self) -> bool {
        self.settings.traffic_policy == TrafficPolicy::Allow
    }

    /// How many addresses the smallest of its networks has that an address lies in; none: it lies in none.
    fn size_around(&self, address: IpAddr) -> Option<u128> {
        let networks = &self.settings.networks;
        if networks.is_empty() {
            return Some(addresses(IpNet::from(address).max_prefix_len(), 0));
        }
        let around = networks.iter().filter(|it| it.contains(address));
        around.map(size).min()
    }
}

impl EgressNetworks {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.by_namespace.is_empty()
    }

    /// Whether there is one of that name.
    pub fn contains(&self, name: &EgressName) -> bool {
        let networks = self.by_namespace.get(&name.name.namespace);
        networks.is_some_and(|it| it.iter().any(|it| it.name() == name))
    }

    /// Takes in a network, in place of the one of its name.
    pub fn put(&mut self, network: EgressNetwork) {
        self.remove(network.name());
        let network = Arc::new(network);
        if network.settings.is_global {
            self.global.push(Arc::clone(&network));
        }
        let namespace = network.name().name.namespace.clone();
        self.by_namespace
            .entry(namespace)
            .or_default()
            .push(network);
    }

    /// Forgets a network.
    pub fn remove(&mut self, name: &EgressName) {
        self.global.retain(|it| it.name() != name);
        let namespace = &name.name.namespace;
        if let Some(networks) = self.by_namespace.get_mut(namespace) {
            networks.retain(|it| it.name() != name);
            if networks.is_empty() {
                self.by_namespace.remove(namespace);
            }
        }
    }

    /// The network that an address outside of the cluster belongs to, for clients in a namespace; none: it
    /// belongs to none.
    ///
    /// A namespace that has networks is ruled by these alone, others by the global ones. The smallest network
    /// around the address counts; of two of a size the older, then the first by name: as in Linkerd.
    pub fn find(&self, client: &Name, address: IpAddr) -> Option<&Arc<EgressNetwork>> {
        let candidates = self.by_namespace.get(client).unwrap_or(&self.global);
        let around = candidates
            .iter()
            .filter_map(|it| Some((it.size_around(address)?, it)));
        let precedence = |(size, it): &(u128, &Arc<EgressNetwork>)| {
            let EgressSettings { name, created, .. } = &it.settings;
            (*size, created.is_none(), *created, name.clone())
        };
        around.min_by_key(precedence).map(|(_, it)| it)
    }

    /// All of them, by name.
    pub fn list(&self) -> Vec<Arc<EgressNetwork>> {
        let mut all: Vec<_> = self.by_namespace.values().flatten().cloned().collect();
        all.sort_by(|one, other| one.name().cmp(other.name()));
        all
    }
}

/// How many addresses belong to a network: exceptions make it smaller.
fn size(network: &NetworkMatch) -> u128 {
    let of = |it: &IpNet| addresses(it.max_prefix_len(), it.prefix_len());
    let except = network.except.iter().map(of);
    except.fold(of(&network.cidr), u128::saturating_sub)
}

fn addresses(bits: u8, prefix: u8) -> u128 {
    1_u128
        .checked_shl(u32::from(bits.saturating_sub(prefix)))
        .unwrap_or(u128::MAX)
}

/// The rest follows from these.
impl PartialEq for EgressNetwork {
    fn eq(&self, other: &Self) -> bool {
        self.settings == other.settings && self.routes == other.routes
    }
}

impl Eq for EgressNetwork {}

/// `group/namespace/name`.
impl fmt::Display for EgressName {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}/{}", self.group.as_str(), self.name)
    }
}

/// Reads `group/namespace/name`.
impl std::str::FromStr for EgressName {
    type Err = crate::names::NameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let refused = || crate::names::NameError {
            text: text.chars().take(64).collect(),
        };
        let (group, name) = text.split_once('/').ok_or_else(refused)?;
        let groups = [PolicyGroup::Weft, PolicyGroup::Linkerd];
        let group = groups.into_iter().find(|it| it.as_str() == group);
        Ok(Self {
            name: name.parse()?,
            group: group.ok_or_else(refused)?,
        })
    }
}

impl Serialize for EgressNetwork {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let EgressSettings {
            name,
            created,
            is_global,
            networks,
            traffic_policy,
        } = &self.settings;
        let mut shown = serializer.serialize_struct("EgressNetwork", 8)?;
        shown.serialize_field("namespace", &name.name.namespace)?;
        shown.serialize_field("name", &name.name.name)?;
        shown.serialize_field("group", &name.group)?;
        shown.serialize_field("created", created)?;
        shown.serialize_field("is_global", is_global)?;
        shown.serialize_field("networks", networks)?;
        shown.serialize_field("traffic_policy", traffic_policy)?;
        shown.serialize_field("routes", &self.routes)?;
        shown.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::route::{Backend, FlowRule, RouteKind, RouteName, RouteRules, RouteType, Target};

    fn network(name: &str, created: i64, networks: &[(&str, &[&str])]) -> EgressNetwork {
        let net = |it: &str| it.parse().expect("a network");
        let name: EgressName = name.parse().expect("a name");
        let settings = EgressSettings {
            is_global: name.name.namespace.as_str() == "linkerd-egress",
            name,
            created: (created != 0).then_some(created),
            networks: networks
                .iter()
                .map(|(cidr, except)| NetworkMatch {
                    cidr: net(cidr),
                    except: except.iter().map(|it| net(it)).collect(),
                })
                .collect(),
            traffic_policy: TrafficPolicy::Deny,
        };
        EgressNetwork::new(settings, vec![])
    }

    fn all(networks: Vec<EgressNetwork>) -> EgressNetworks {
        let mut all = EgressNetworks::default();
        networks.into_iter().for_each(|it| all.put(it));
        all
    }

    fn found<'a>(all: &'a EgressNetworks, client: &str, address: &str) -> Option<&'a str> {
        let client = client.parse().expect("a namespace");
        let address = address.parse().expect("an address");
        all.find(&client, address)
            .map(|it| it.name().name.name.as_str())
    }

    /// (networks) -> network of 203.0.113.7 for a client in the namespace shop
    #[test]
    fn the_smallest_network_around_an_address_counts() {
        const W: &str = "policy.weft.dev";
        let any: &[(&str, &[&str])] = &[];
        let wide: &[(&str, &[&str])] = &[("203.0.0.0/16", &[])];
        let narrow: &[(&str, &[&str])] = &[("203.0.113.0/24", &[])];
        let excepted: &[(&str, &[&str])] = &[("203.0.113.0/24", &["203.0.113.7/32"])];
        let smaller: &[(&str, &[&str])] = &[("203.0.113.0/24", &["203.0.113.128/25"])];
        let both: &[(&str, &[&str])] = &[("0.0.0.0/0", &[]), ("203.0.113.7/32", &[])];
        let v6: &[(&str, &[&str])] = &[("::/0", &[])];
        for (networks, expected) in [
            (vec![("shop/a", 1, any)], Some("a")),
            (vec![("shop/a", 1, wide), ("shop/b", 2, narrow)], Some("b")),
            (vec![("shop/a", 1, any), ("shop/b", 2, wide)], Some("b")),
            (
                vec![("shop/a", 1, narrow), ("shop/b", 2, smaller)],
                Some("b"),
            ),
            (vec![("shop/a", 1, narrow), ("shop/b", 2, both)], Some("b")),
            // The older, then those whose age is not known, then by name.
            (
                vec![("shop/a", 2, narrow), ("shop/b", 1, narrow)],
                Some("b"),
            ),
            (
                vec![("shop/a", 0, narrow), ("shop/b", 1, narrow)],
                Some("b"),
            ),
            (
                vec![("shop/b", 0, narrow), ("shop/a", 0, narrow)],
                Some("a"),
            ),
            (vec![("shop/a", 1, excepted), ("shop/b", 2, any)], Some("b")),
            (vec![("shop/a", 1, excepted)], None),
            (vec![("shop/a", 1, v6)], None),
            (vec![("other/a", 1, any)], None),
            // Of all namespaces, but not of those that have their own, whatever is in these.
            (vec![("linkerd-egress/a", 1, any)], Some("a")),
            (
                vec![("linkerd-egress/a", 1, narrow), ("shop/b", 2, any)],
                Some("b"),
            ),
            (
                vec![("linkerd-egress/a", 1, any), ("shop/b", 2, excepted)],
                None,
            ),
        ] {
            let made = networks
                .iter()
                .map(|(name, created, nets)| network(&format!("{W}/{name}"), *created, nets));
            let all = all(made.collect());
            let found = found(&all, "shop", "203.0.113.7");
            assert_eq!(found, expected, "{networks:?}");
        }
    }

    #[test]
    fn networks_come_and_go() {
        let mut all = all(vec![
            network("policy.weft.dev/shop/a", 1, &[]),
            network("policy.linkerd.io/shop/a", 1, &[]),
            network("policy.linkerd.io/linkerd-egress/g", 1, &[]),
        ]);
        assert_eq!(all.list().len(), 3);
        all.put(network("policy.weft.dev/shop/a", 1, &[("10.0.0.0/8", &[])]));
        assert_eq!(all.list().len(), 3, "in place of the other");
        assert_eq!(found(&all, "shop", "fd00::1"), Some("a"));
        all.remove(&"policy.linkerd.io/shop/a".parse().expect("a name"));
        assert_eq!(found(&all, "shop", "fd00::1"), None);
        all.remove(&"policy.weft.dev/shop/a".parse().expect("a name"));
        assert_eq!(found(&all, "shop", "fd00::1"), Some("g"));
        all.remove(
            &"policy.linkerd.io/linkerd-egress/g"
                .parse()
                .expect("a name"),
        );
        assert!(all.is_empty() && all.global.is_empty());
        for bad in ["", "shop/a", "policy.example/shop/a", "policy.weft.dev/a"] {
            assert!(bad.parse::<EgressName>().is_err(), "{bad}");
        }
    }

    #[test]
    fn routes_are_for_their_ports() {
        let route = |name: &str, kind, ports: &[u16]| EgressRoute {
            route: Route {
                name: RouteName {
                    name: name.parse().expect("a name"),
                    kind,
                },
                created: None,
                rules: RouteRules::Flow(FlowRule {
                    name: None,
                    hostnames: vec![],
                    backends: vec![Backend {
                        weight: 1,
                        target: Target::Invalid(String::new()),
                        filters: vec![],
                    }],
                }),
            },
            hostnames: vec![],
            ports: ports.to_vec(),
        };
        let settings = network("policy.weft.dev/shop/a", 1, &[]).settings;
        let tls = route("shop/tls", RouteKind::Tls, &[443, 8443]);
        let tcp = route("shop/tcp", RouteKind::Tcp, &[]);
        let only_tls = EgressNetwork::new(settings.clone(), vec![tls.clone()]);
        let both = EgressNetwork::new(settings.clone(), vec![tls, tcp]);
        let client = "shop".parse().expect("a namespace");
        let at =
            |it: &EgressNetwork, port| it.routes_at(port).and_then(|it| it.route_type(&client));
        assert_eq!(at(&only_tls, 443), Some(RouteType::Tls));
        assert_eq!(at(&only_tls, 80), None);
        // The more specific type, as at Services.
        assert_eq!(at(&both, 8443), Some(RouteType::Tls));
        assert_eq!(at(&both, 80), Some(RouteType::Tcp));
        assert!(EgressNetwork::new(settings, vec![]).routes_at(80).is_none());
    }
}
