//! EgressNetworks: what is kept of them, which routes each has, and what agents are told.
//!
//! Each network is told as one, to all agents: an agent that has a pod must never be without what may
//! keep that pod from leaving the cluster. As with Services, everybody may attach routes to everybody's network, so
//! each namespace has its own share.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use prost::Message;
use serde_json::Value;
use weft_core::route::{HostMatch, RouteName, RouteType};
use weft_core::{
    EgressName, EgressNetwork, EgressRoute, EgressSettings, Name, NetworkMatch, ObjectName,
    PolicyGroup, TrafficPolicy,
};
use weft_proto::{Key, Kind, Resource, v1};

use super::pods::Created;
use super::publish_policies::own_or_other;
use super::publish_routes::{ALL_OTHERS_SHARE, OTHERS_SHARE, OWN_SHARE, Refusal, Share};
use super::routes::{EgressParent, Parent, RouteRecord};
use super::{Index, policies};
use crate::objects::Fault;
use crate::objects::policy as written;
use crate::views::Audience;

/// A network.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct EgressRecord {
    /// What agents are told of it, beside its routes.
    settings: EgressSettings,
    /// Whether it was never readable: nothing leaves by it, whatever routes say.
    pub(super) closed: bool,
}

/// What agents were told of a network.
#[derive(Debug, Default, PartialEq)]
pub(super) struct PublishedEgress {
    is_told: bool,
    /// Routes that are attached and not in force.
    refused: BTreeMap<RouteName, Refusal>,
}

/// A route, and the ports of the network that it is attached to; none: all.
struct Attached<'a> {
    record: &'a RouteRecord,
    ports: BTreeSet<u16>,
}

/// Networks of one object, with their exceptions.
const MAX_NETWORKS: usize = 1024;
/// Ports that routes of one network name: agents keep an order of its own for each.
const MAX_PORTS: usize = 64;

impl EgressRecord {
    /// Checks a network; `global` is the namespace of those that hold for all namespaces.
    ///
    /// # Errors
    /// The first field that cannot be used.
    pub(super) fn check(
        name: EgressName,
        created: Option<Created>,
        spec: &written::EgressNetworkSpec,
        global: &Name,
    ) -> Result<Self, Fault> {
        let networks = match &spec.networks {
            None => vec![],
            Some(written) => networks(written)?,
        };
        Ok(Self {
            settings: EgressSettings {
                is_global: name.name.namespace == *global,
                name,
                created: created.map(|it| it.0.as_second()),
                networks,
                traffic_policy: match spec.traffic_policy {
                    written::TrafficPolicy::Allow => TrafficPolicy::Allow,
                    written::TrafficPolicy::Deny => TrafficPolicy::Deny,
                },
            },
            closed: false,
        })
    }

    /// What a network that cannot be read, and never could, closes: its addresses, if they can be read by
    /// themselves, or all.
    pub(super) fn closed(
        name: EgressName,
        created: Option<Created>,
        spec: &Value,
        global: &Name,
    ) -> Self {
        let written = spec.get("networks").cloned();
        let written = written.and_then(|it| serde_json::from_value::<Vec<_>>(it).ok());
        let networks = written.and_then(|it| networks(&it).ok());
        Self {
            settings: EgressSettings {
                is_global: name.name.namespace == *global,
                name,
                created: created.map(|it| it.0.as_second()),
                networks: networks.unwrap_or_default(),
                traffic_policy: TrafficPolicy::Deny,
            },
            closed: true,
        }
    }
}

fn networks(written: &[written::Network]) -> Result<Vec<NetworkMatch>, Fault> {
    let networks = policies::check_networks(written)?;
    let count = networks.iter().map(|it| 1 + it.except.len()).sum();
    policies::few("spec.networks", count, MAX_NETWORKS)?;
    Ok(networks)
}

impl Index {
    pub(super) fn set_egress(&mut self, name: &EgressName, record: Option<EgressRecord>) {
        match record {
            Some(record) => self.policies.egress.insert(name.clone(), record),
            None => self.policies.egress.remove(name),
        };
        // The same name in the other group may have been meant by routes without a group.
        self.dirty_egress(&name.name);
        let attached = self.routes.of_egress.get(&name.name).into_iter().flatten();
        self.dirty.routes.extend(attached.cloned());
    }

    /// The networks of a name are to be made anew.
    pub(super) fn dirty_egress(&mut self, name: &ObjectName) {
        for group in [PolicyGroup::Weft, PolicyGroup::Linkerd] {
            let name = name.clone();
            self.dirty.egress.insert(EgressName { name, group });
        }
    }

    /// The network that a parent of a route means.
    pub(super) fn egress_of(&self, parent: &EgressParent) -> EgressName {
        let named = |group| EgressName {
            name: parent.network.clone(),
            group,
        };
        let has = |group| self.policies.egress.contains_key(&named(group));
        // Linkerd's are what such routes were made for.
        let group = parent.group;
        named(group.unwrap_or_else(|| own_or_other(PolicyGroup::Linkerd, has)))
    }

    /// Why a route is not in force at a network; none: it is.
    pub(super) fn missing_egress(
        &self,
        record: &RouteRecord,
        parent: &EgressParent,
    ) -> Option<Refusal> {
        let network = self.egress_of(parent);
        let known = self.policies.egress.get(&network);
        let no_match = |message| Refusal {
            reason: "NoMatchingParent",
            message,
        };
        match known {
            None => Some(no_match(format!("EgressNetwork {network} is not known"))),
            Some(it) if it.closed => {
                Some(no_match(format!("EgressNetwork {network} cannot be used")))
            }
            Some(_) => {
                let published = self.published.egress.get(&network)?;
                published.refused.get(&record.route.name).cloned()
            }
        }
    }

    /// Publishes a network.
    pub(super) fn publish_egress(&mut self, name: &EgressName) {
        let before = self.published.egress.remove(name).unwrap_or_default();
        let mut now = PublishedEgress::default();
        match self.policies.egress.get(name) {
            Some(record) => {
                let routes = match record.closed {
                    true => vec![],
                    false => self.egress_routes(name, &mut now.refused),
                };
                let network = EgressNetwork::new(record.settings.clone(), routes);
                now.is_told = true;
                self.put(Audience::All, Resource::EgressNetwork(network));
            }
            None if before.is_told => {
                let key = Key {
                    kind: Kind::EgressNetwork,
                    name: name.to_string(),
                };
                self.changes.insert((Audience::All, key), None);
            }
            None => {}
        }
        for (one, other) in [(&before, &now), (&now, &before)] {
            let refused = one.refused.iter();
            let changed = refused.filter(|(route, it)| other.refused.get(route) != Some(it));
            self.dirty
                .routes
                .extend(changed.map(|(route, _)| route.clone()));
        }
        if now.is_told {
            self.published.egress.insert(name.clone(), now);
        }
    }

    /// The routes that are in force at a network.
    fn egress_routes(
        &self,
        network: &EgressName,
        refused: &mut BTreeMap<RouteName, Refusal>,
    ) -> Vec<EgressRoute> {
        let namespace = &network.name.namespace;
        let attached = self.attached_to(network);
        let mut ports = HashSet::new();
        let mut taken: HashMap<&Name, Share> = HashMap::new();
        let mut taken_by_others = Share::default();
        let mut routes = vec![];
        for it in &attached {
            let name = &it.record.route.name;
            let mut refuse = |reason, message| {
                refused.insert(name.clone(), Refusal { reason, message });
            };
            if !is_ever_of_type(it, &attached) {
                let reason =
                    format!("the EgressNetwork {network} has routes of a more specific kind");
                refuse("Conflicted", reason);
                continue;
            }
            let route = self.egress_route(it, network);
            let cost = cost(&route);
            let own = name.name.namespace == *namespace;
            let share = taken.entry(&name.name.namespace).or_default();
            let most = if own { OWN_SHARE } else { OTHERS_SHARE };
            let fits_others = own || taken_by_others.with(cost).fits(ALL_OTHERS_SHARE);
            let new: HashSet<u16> = it.ports.iter().copied().collect();
            let too_many_ports = ports.union(&new).count() > MAX_PORTS;
            if !(share.with(cost).fits(most) && fits_others) || too_many_ports {
                let reason = format!(
                    "the routes of the EgressNetwork {network} take too much memory, have too many \
                     regular expressions, or name more than {MAX_PORTS} ports"
                );
                refuse("TooLarge", reason);
                continue;
            }
            ports.extend(new);
            *share = share.with(cost);
            if !own {
                taken_by_others = taken_by_others.with(cost);
            }
            routes.push(route);
        }
        routes
    }

    fn egress_route(&self, it: &Attached<'_>, network: &EgressName) -> EgressRoute {
        let resolve = |name: &ObjectName, port| self.resolve(it.record, name, port);
        let route = it.record.resolved(Parent::Egress(network), resolve);
        let of_requests = route.name.kind.route_type().is_of_requests();
        let hostnames: &[HostMatch] = match of_requests {
            true => &it.record.hostnames,
            false => &[],
        };
        EgressRoute {
            route,
            hostnames: hostnames.to_vec(),
            ports: it.ports.iter().copied().collect(),
        }
    }

    /// Routes of a network: those of its own namespace first, then the older ones.
    fn attached_to(&self, network: &EgressName) -> Vec<Attached<'_>> {
        let names = self.routes.of_egress.get(&network.name);
        let records = names.into_iter().flatten();
        let records = records.filter_map(|it| self.routes.records.get(it));
        let mut attached: Vec<Attached<'_>> = records
            .filter_map(|record| {
                let parents = record.egress.iter();
                let here = parents.filter(|it| self.egress_of(it) == *network);
                let ports: Vec<Option<u16>> = here.map(|it| it.port).collect();
                // One without a port is for all of them, whatever others say.
                let all = ports.contains(&None);
                let named = ports.iter().copied().flatten().filter(|_| !all);
                (!ports.is_empty()).then(|| Attached {
                    record,
                    ports: named.collect(),
                })
            })
            .collect();
        attached.sort_by_cached_key(|it| {
            let route = &it.record.route;
            let foreign = route.name.name.namespace != network.name.namespace;
            (
                foreign,
                route.created.is_none(),
                route.created,
                route.name.clone(),
            )
        });
        attached
    }
}

impl Attached<'_> {
    fn is_for(&self, port: Option<u16>) -> bool {
        self.ports.is_empty() || port.is_some_and(|it| self.ports.contains(&it))
    }

    fn route_type(&self) -> RouteType {
        self.record.route.name.kind.route_type()
    }
}

/// Whether there is a port at which no route of the same namespace is of a more specific type.
fn is_ever_of_type(it: &Attached<'_>, all: &[Attached<'_>]) -> bool {
    let namespace = &it.record.route.name.name.namespace;
    let same = || {
        let same = all.iter();
        same.filter(|it| it.record.route.name.name.namespace == *namespace)
    };
    let mut ports: BTreeSet<Option<u16>> = it.ports.iter().copied().map(Some).collect();
    if it.ports.is_empty() {
        ports = same().flat_map(|it| &it.ports).copied().map(Some).collect();
        // All others.
        ports.insert(None);
    }
    ports.into_iter().any(|port| {
        let mut here = same().filter(|it| it.is_for(port));
        here.all(|other| other.route_type() >= it.route_type())
    })
}

fn cost(route: &EgressRoute) -> Share {
    Share {
        bytes: v1::EgressRoute::from(route.clone()).encoded_len() + FIELD_BYTES,
        ..Share::of(&route.route)
    }
}

/// What a route takes as a part of its network, beside itself.
const FIELD_BYTES: usize = 8;
