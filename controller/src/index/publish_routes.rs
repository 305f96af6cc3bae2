//! What routes are in the state of agents: a table for each port of a Service that has any; and what is
//! to be said about the routes.
//!
//! Everybody may attach a route to everybody's Service, and agents are told all of them in one table. So
//! each namespace has its own share of a table, and nobody's routes can push out those of the Service's
//! own namespace.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use prost::Message;
use weft_core::route::{
    HttpMatch, Route, RouteName, RouteRules, RouteTable, RouteTableName, RouteType,
};
use weft_core::{EgressName, Name, ObjectName};
use weft_proto::{Key, Kind, Resource, v1};

use super::Index;
use super::reliability::ReliabilitySaid;
use super::routes::{
    GrantRecord, OTHER_NETWORK, Parent, ParentRecord, RouteRecord, ServerParent, Unresolved,
};
use super::services::ServiceRecord;
use crate::objects::{Fault, ObjectKey, ObjectKind};
use crate::problems::Facet;
use crate::statuses::{CONTROLLER_NAME, Condition, ParentStatus, RouteStatus};
use crate::views::Audience;

/// The tables of a Service that agents have.
#[derive(Debug, Default, PartialEq)]
pub(super) struct PublishedTables {
    ports: BTreeSet<u16>,
    /// Routes that are attached to a port and not in force there.
    refused: BTreeMap<(RouteName, u16), Refusal>,
}

/// Why a route is not in force at a parent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    /// In one word, as a condition has it.
    pub(super) reason: &'static str,
    /// For people.
    pub(super) message: String,
}

/// What routes may take of a table.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Share {
    pub(super) bytes: usize,
    pub(super) patterns: usize,
}

/// Of the Service's own namespace; of each other; of all others together. In all less than a resource may
/// take, and no more regular expressions than agents take.
pub(super) const OWN_SHARE: Share = Share {
    bytes: 512 * 1024,
    patterns: 512,
};
pub(super) const OTHERS_SHARE: Share = Share {
    bytes: 64 * 1024,
    patterns: 64,
};
pub(super) const ALL_OTHERS_SHARE: Share = Share {
    bytes: 384 * 1024,
    patterns: 512,
};

impl Index {
    pub(super) fn set_route(&mut self, name: &RouteName, record: Option<RouteRecord>) {
        let before = match record.clone() {
            Some(record) => self.routes.records.insert(name.clone(), record),
            None => self.routes.records.remove(name),
        };
        let parents = |it: &Option<RouteRecord>| {
            let record = it.as_ref();
            record.map(RouteRecord::parent_services).unwrap_or_default()
        };
        let named = |it: &Option<RouteRecord>| {
            let record = it.as_ref();
            record.map(RouteRecord::named_services).unwrap_or_default()
        };
        let (parents_before, parents) = (parents(&before), parents(&record));
        let (named_before, named) = (named(&before), named(&record));
        let networks = |it: &Option<RouteRecord>| {
            let record = it.as_ref();
            record.map(RouteRecord::parent_networks).unwrap_or_default()
        };
        let (networks_before, networks) = (networks(&before), networks(&record));
        relink(&mut self.routes.of_parent, name, &parents_before, &parents);
        relink(
            &mut self.routes.of_egress,
            name,
            &networks_before,
            &networks,
        );
        relink(&mut self.routes.naming, name, &named_before, &named);
        let naming_changed = named_before.symmetric_difference(&named);
        self.dirty.services.extend(naming_changed.cloned());
        self.servers_of_route_changed(name, before.as_ref(), record.as_ref());
        self.dirty.tables.extend(parents_before);
        self.dirty.tables.extend(parents);
        for network in networks_before.union(&networks) {
            self.dirty_egress(network);
        }
        self.dirty.routes.insert(name.clone());
    }

    pub(super) fn set_grant(&mut self, name: &ObjectName, record: Option<GrantRecord>) {
        let grants = self
            .routes
            .grants
            .entry(name.namespace.clone())
            .or_default();
        let before = match record.clone() {
            Some(record) => grants.insert(name.name.clone(), record),
            None => grants.remove(&name.name),
        };
        if grants.is_empty() {
            self.routes.grants.remove(&name.namespace);
        }
        if before == record {
            return;
        }
        let naming = self.routes.naming.iter();
        let into = naming.filter(|(service, _)| service.namespace == name.namespace);
        let routes = into.flat_map(|(_, routes)| routes);
        let foreign = routes.filter(|it| it.name.namespace != name.namespace);
        let foreign: BTreeSet<RouteName> = foreign.cloned().collect();
        self.dirty_routes(foreign);
    }

    /// What routes look at of a Service appeared, changed or went.
    pub(super) fn service_of_routes_changed(&mut self, name: &ObjectName) {
        self.dirty.tables.insert(name.clone());
        let attached = self.routes.of_parent.get(name).into_iter().flatten();
        self.dirty.routes.extend(attached.cloned());
        let naming = self.routes.naming.get(name).cloned();
        self.dirty_routes(naming.unwrap_or_default());
        let splitting = self.profiles.naming(name).cloned();
        self.dirty.tables.extend(splitting);
    }

    fn dirty_routes(&mut self, names: BTreeSet<RouteName>) {
        for name in names {
            if let Some(record) = self.routes.records.get(&name) {
                let networks = record.parent_networks();
                self.dirty.tables.extend(record.parent_services());
                networks.iter().for_each(|it| self.dirty_egress(it));
            }
            self.dirty.routes.insert(name);
        }
    }

    /// Publishes the tables of a Service.
    pub(super) fn publish_tables(&mut self, service: &ObjectName) {
        let before = self.published.tables.remove(service).unwrap_or_default();
        let mut now = PublishedTables::default();
        let tables = self.tables(service, &mut now.refused);
        self.report_profiles(service, &tables);
        for table in tables {
            now.ports.insert(table.name().port);
            self.put(Audience::All, Resource::RouteTable(table));
        }
        for port in before.ports.difference(&now.ports) {
            let name = RouteTableName {
                service: service.clone(),
                port: *port,
            };
            let key = Key {
                kind: Kind::RouteTable,
                name: name.to_string(),
            };
            self.changes.insert((Audience::All, key), None);
        }
        for (one, other) in [(&before, &now), (&now, &before)] {
            let refused = one.refused.iter();
            let changed = refused.filter(|(at, it)| other.refused.get(at) != Some(it));
            let changed = changed.map(|((route, _), _)| route.clone());
            self.dirty.routes.extend(changed);
        }
        if now != PublishedTables::default() {
            self.published.tables.insert(service.clone(), now);
        }
    }

    fn tables(
        &self,
        service: &ObjectName,
        refused: &mut BTreeMap<(RouteName, u16), Refusal>,
    ) -> Vec<RouteTable> {
        let record = self.services.get(service);
        let Some(record) = record.filter(|it| no_parent(it).is_none()) else {
            return vec![];
        };
        let names = self.routes.of_parent.get(service).into_iter().flatten();
        let attached = names.filter_map(|it| self.routes.records.get(it));
        let attached: Vec<(&RouteRecord, BTreeSet<u16>)> = attached
            .map(|route| (route, attached_ports(route, record)))
            .collect();
        let unrouted = ReliabilitySaid::default().over(&record.reliability);
        let mut tables = vec![];
        for port in record.ports.iter().map(|it| it.number) {
            let here = attached.iter().filter(|(_, ports)| ports.contains(&port));
            let name = RouteTableName {
                service: service.clone(),
                port,
            };
            let here = here.map(|(route, _)| *route).collect();
            let routes = self.routes_of(record, port, here, refused);
            let table = RouteTable::new(name, routes);
            let profiles = self.profiles_at(record, &table);
            if !table.routes().is_empty() || !profiles.is_empty() || unrouted.is_any() {
                let table = table.with_profiles(profiles);
                tables.push(table.with_unrouted(Some(unrouted.clone())));
            }
        }
        tables
    }

    /// The routes that are in force at a port, of those that are attached to it.
    fn routes_of(
        &self,
        parent: &ServiceRecord,
        port: u16,
        mut attached: Vec<&RouteRecord>,
        refused: &mut BTreeMap<(RouteName, u16), Refusal>,
    ) -> Vec<Route> {
        let service = &parent.name;
        let namespace = |it: &RouteRecord| it.route.name.name.namespace.clone();
        // The Service's own first, then the older ones.
        attached.sort_by_cached_key(|it| {
            let Route { name, created, .. } = &it.route;
            let foreign = name.name.namespace != service.namespace;
            (foreign, created.is_none(), *created, name.clone())
        });
        let mut types: HashMap<Name, RouteType> = HashMap::new();
        for it in &attached {
            let route_type = it.route.name.kind.route_type();
            let most = types.entry(namespace(it)).or_insert(route_type);
            *most = route_type.min(*most);
        }
        let mut taken: HashMap<Name, Share> = HashMap::new();
        let mut taken_by_others = Share::default();
        let mut routes = vec![];
        for it in attached {
            let name = &it.route.name;
            let mut refuse = |reason, message: String| {
                let refusal = Refusal { reason, message };
                refused.insert((name.clone(), port), refusal);
            };
            let most = types.get(&name.name.namespace);
            if most != Some(&name.kind.route_type()) {
                let reason = format!("port {port} of {service} has routes of a more specific kind");
                refuse("Conflicted", reason);
                continue;
            }
            let resolve = |name: &ObjectName, port| self.resolve(it, name, port);
            let route = it.resolved(Parent::Service(parent, port), resolve);
            let cost = Share::of(&route);
            let own = name.name.namespace == service.namespace;
            let taken = taken.entry(namespace(it)).or_default();
            let most = if own { OWN_SHARE } else { OTHERS_SHARE };
            let fits_others = own || taken_by_others.with(cost).fits(ALL_OTHERS_SHARE);
            if !(taken.with(cost).fits(most) && fits_others) {
                let reason = format!(
                    "the routes of a namespace at port {port} of {service} take too much memory, or have \
                     too many regular expressions"
                );
                refuse("TooLarge", reason);
                continue;
            }
            *taken = taken.with(cost);
            if !own {
                taken_by_others = taken_by_others.with(cost);
            }
            routes.push(route);
        }
        routes
    }

    /// Where a reference of a route leads.
    pub(super) fn resolve(
        &self,
        route: &RouteRecord,
        service: &ObjectName,
        port: u16,
    ) -> Result<(), (Unresolved, String)> {
        if !self.routes.permits(route, service) {
            let RouteName { name, kind } = &route.route.name;
            let reason = format!(
                "no ReferenceGrant in {} lets a {} of {} refer to Service {}",
                service.namespace,
                kind.as_str(),
                name.namespace,
                service.name
            );
            return Err((Unresolved::NotPermitted, reason));
        }
        let record = self.services.get(service).filter(|it| !it.external_name);
        let Some(record) = record else {
            let reason = format!("Service {service} is not known");
            return Err((Unresolved::NotFound, reason));
        };
        match record.ports.iter().any(|it| it.number == port) {
            true => Ok(()),
            false => {
                let reason = format!("Service {service} has no port {port}");
                Err((Unresolved::NotFound, reason))
            }
        }
    }

    /// Says what is to be said about a route.
    pub(super) fn report_route(&mut self, name: &RouteName) {
        let key = ObjectKey {
            kind: ObjectKind::Route(name.kind),
            namespace: Some(name.name.namespace.clone()),
            name: name.name.name.clone(),
        };
        let record = self.routes.records.get(name);
        let is_ours = |it: &&RouteRecord| {
            !(it.parents.is_empty() && it.servers.is_empty() && it.egress.is_empty())
        };
        let record = record.filter(is_ours);
        let mut unresolved = vec![];
        let mut unaccepted = vec![];
        let status = record.map(|record| {
            let services = record.parents.iter().map(|it| {
                let refusal = self.refusal(record, it);
                let unresolved = self.unresolved(record, None);
                (it.index, &it.written, refusal, unresolved)
            });
            let networks = record.egress.iter().map(|it| {
                let refusal = self.missing_egress(record, it);
                let unresolved = self.unresolved(record, Some(&self.egress_of(it)));
                (it.index, &it.written, refusal, unresolved)
            });
            // Where requests go is settled when they have arrived at a Server.
            let servers = record.servers.iter().map(|it| {
                let refusal = self.missing_server(record, it);
                (it.index, &it.written, refusal, vec![])
            });
            let mut parents = vec![];
            let all = services.chain(networks).chain(servers);
            for (index, written, refusal, of_parent) in all {
                if let Some(refusal) = &refusal {
                    let field = format!("spec.parentRefs[{index}]");
                    unaccepted.push(Fault::new(field, &refusal.message));
                }
                parents.push(ParentStatus {
                    parent_ref: written.clone(),
                    controller_name: CONTROLLER_NAME,
                    conditions: self.conditions(record, refusal, &of_parent),
                });
                for it in of_parent {
                    if !unresolved.contains(&it) {
                        unresolved.push(it);
                    }
                }
            }
            let refused = self.routes.refused.get(name);
            RouteStatus {
                route: name.clone(),
                observed_generation: refused.map_or(record.generation, |it| it.generation),
                parents,
            }
        });
        self.statuses.replace(name, status);
        let unresolved = unresolved.into_iter().map(|(_, fault)| fault).collect();
        let effect = "what would go there is answered with an error";
        self.report(&key, Facet::Reference, unresolved, effect);
        let effect = "the route has no effect there";
        self.report(&key, Facet::Conflict, unaccepted, effect);
    }

    fn conditions(
        &self,
        record: &RouteRecord,
        refusal: Option<Refusal>,
        unresolved: &[(Unresolved, Fault)],
    ) -> Vec<Condition> {
        let refused = self.routes.refused.get(&record.route.name);
        let refusal = refused.map_or(refusal, |it| {
            Some(Refusal {
                reason: "UnsupportedValue",
                message: format!("{}; what was in force before stays", it.fault),
            })
        });
        let accepted = match refusal {
            None => Condition {
                kind: "Accepted",
                status: true,
                reason: "Accepted",
                message: String::new(),
            },
            Some(Refusal { reason, message }) => Condition {
                kind: "Accepted",
                status: false,
                reason,
                message,
            },
        };
        let resolved = match unresolved.first() {
            None => Condition {
                kind: "ResolvedRefs",
                status: true,
                reason: "ResolvedRefs",
                message: String::new(),
            },
            Some((reason, _)) => Condition {
                kind: "ResolvedRefs",
                status: false,
                reason: reason.as_str(),
                message: listed(unresolved.iter().map(|(_, fault)| fault)),
            },
        };
        let mut conditions = vec![accepted, resolved];
        if !record.aside.unsupported.is_empty() {
            conditions.push(Condition {
                kind: "PartiallyInvalid",
                status: true,
                reason: "UnsupportedValue",
                message: listed(record.aside.unsupported.iter()),
            });
        }
        conditions
    }

    /// Why a route is not in force at a Server; none: it is.
    fn missing_server(&self, record: &RouteRecord, parent: &ServerParent) -> Option<Refusal> {
        let server = self.server_of(record, parent);
        (!self.policies.servers.contains_key(&server)).then(|| Refusal {
            reason: "NoMatchingParent",
            message: format!("Server {} is not known", server.name),
        })
    }

    /// Why a route is not in force at a parent; none: it is.
    fn refusal(&self, record: &RouteRecord, parent: &ParentRecord) -> Option<Refusal> {
        let no_match = |message: String| {
            Some(Refusal {
                reason: "NoMatchingParent",
                message,
            })
        };
        let name = &parent.service;
        let Some(service) = self.services.get(name) else {
            return no_match(format!("Service {name} is not known"));
        };
        if let Some(why) = no_parent(service) {
            return no_match(format!("Service {name} {why}"));
        }
        let ports = RouteRecord::ports_of(parent, service);
        if ports.is_empty() {
            return no_match(format!("Service {name} has no such port"));
        }
        let tables = self.published.tables.get(name)?;
        let at = |port| tables.refused.get(&(record.route.name.clone(), port));
        let mut refusals = ports.into_iter().map(at);
        // In force at one port of several counts.
        let first = refusals.next().flatten()?;
        refusals.all(|it| it.is_some()).then(|| first.clone())
    }

    /// References that lead nowhere, for a Service, or for this EgressNetwork, as the parent.
    fn unresolved(
        &self,
        record: &RouteRecord,
        parent: Option<&EgressName>,
    ) -> Vec<(Unresolved, Fault)> {
        let invalid = record.aside.invalid.iter();
        let invalid = invalid.map(|it| (Unresolved::InvalidKind, it.clone()));
        let references = record.aside.references.iter().filter_map(|it| {
            let (kind, reason) = self.resolve(record, &it.service, it.port).err()?;
            Some((kind, Fault::new(&it.field, reason)))
        });
        let others = record.aside.egress.iter();
        let others = others.filter(|(_, network)| parent != Some(network));
        let others = others.map(|(field, _)| {
            let fault = Fault::new(field, OTHER_NETWORK);
            (Unresolved::InvalidKind, fault)
        });
        let mut all: Vec<_> = references.chain(invalid).chain(others).collect();
        all.sort_by_key(|(kind, _)| *kind);
        all
    }
}

/// Why a Service can be no parent of routes: its clients never connect to it as such (GEP-1426, "Allowed
/// service types").
pub(super) fn no_parent(service: &ServiceRecord) -> Option<&'static str> {
    if service.external_name {
        Some("only stands for a name of DNS")
    } else if service.addresses.is_empty() {
        Some("has no address of its own: its clients connect to its pods")
    } else {
        None
    }
}

fn attached_ports(route: &RouteRecord, service: &ServiceRecord) -> BTreeSet<u16> {
    let parents = route.parents.iter();
    let here = parents.filter(|it| it.service == service.name);
    here.flat_map(|it| RouteRecord::ports_of(it, service))
        .collect()
}

pub(super) fn relink(
    index: &mut HashMap<ObjectName, BTreeSet<RouteName>>,
    route: &RouteName,
    before: &BTreeSet<ObjectName>,
    now: &BTreeSet<ObjectName>,
) {
    for service in before.difference(now) {
        if let Some(routes) = index.get_mut(service) {
            routes.remove(route);
            if routes.is_empty() {
                index.remove(service);
            }
        }
    }
    for service in now.difference(before) {
        let routes = index.entry(service.clone()).or_default();
        routes.insert(route.clone());
    }
}

fn listed<'a>(faults: impl ExactSizeIterator<Item = &'a Fault>) -> String {
    let more = faults.len().saturating_sub(SHOWN_FAULTS);
    let shown: Vec<String> = faults.take(SHOWN_FAULTS).map(ToString::to_string).collect();
    let shown = shown.join("; ");
    match more {
        0 => shown,
        more => format!("{shown}; and {more} more"),
    }
}

/// As many as fit into the message of a condition, which may have 32 KiB.
const SHOWN_FAULTS: usize = 8;

impl Share {
    pub(super) fn of(route: &Route) -> Self {
        let patterns = match &route.rules {
            RouteRules::Http(rules) => {
                let matches = rules.iter().flat_map(|it| &it.matches);
                matches.map(HttpMatch::patterns).sum()
            }
            RouteRules::Flow(_) => 0,
        };
        Self {
            bytes: v1::Route::from(route.clone()).encoded_len(),
            patterns,
        }
    }

    pub(super) fn with(self, other: Self) -> Self {
        Self {
            bytes: self.bytes + other.bytes,
            patterns: self.patterns + other.patterns,
        }
    }

    pub(super) fn fits(self, most: Self) -> bool {
        self.bytes <= most.bytes && self.patterns <= most.patterns
    }
}
