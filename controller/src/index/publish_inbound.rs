//! Routes of Servers: which a Server has, and who may make their requests.
//!
//! A route that cannot be used, and never could, may have been meant to keep requests from others. While
//! there is one, no policy for a route of that Server opens anything, and a Server that would have no
//! other route lets no request in.

use std::collections::BTreeSet;

use serde_json::Value;
use weft_core::route::{HttpMatch, InboundRoute, InboundRoutes, RouteName, RouteRules};
use weft_core::{Name, ObjectName, PolicyGroup, ServerName};

use super::Index;
use super::policies::{AuthorizationRecord, ServerRecord, Target};
use super::publish_policies::own_or_other;
use super::publish_routes::relink;
use super::routes::{MeantServer, RouteRecord, ServerParent};
use crate::objects::Fault;

impl Index {
    /// The routes that a Server has; none: it has none.
    pub(super) fn inbound_routes(&self, server: &ServerRecord) -> Option<InboundRoutes> {
        if server.closed {
            return None;
        }
        let is_meant = self.is_meant_by_refused(&server.name);
        let attached = self.attached(&server.name).map(|record| {
            let name = &record.route.name;
            let opening = self.opening_route(name).filter(|_| !is_meant);
            InboundRoute {
                route: record.inbound(),
                hostnames: record.hostnames.clone(),
                authorizations: opening.map(|it| self.authorization(it)).collect(),
            }
        });
        let routes: Vec<InboundRoute> = attached.collect();
        (is_meant || !routes.is_empty()).then(|| InboundRoutes::new(routes))
    }

    /// The policies for routes of a Server, each as often as it will be told.
    pub(super) fn opening_routes<'a>(
        &'a self,
        server: &'a ServerRecord,
    ) -> impl Iterator<Item = &'a AuthorizationRecord> {
        let attached = self.attached(&server.name);
        attached.flat_map(|it| self.opening_route(&it.route.name))
    }

    /// The Server that a parent of a route means.
    pub(super) fn server_of(&self, record: &RouteRecord, parent: &ServerParent) -> ServerName {
        let name = ObjectName {
            namespace: record.route.name.name.namespace.clone(),
            name: parent.name.clone(),
        };
        let has = |group| {
            let name = name.clone();
            let servers = &self.policies.servers;
            servers.contains_key(&ServerName { group, name })
        };
        // Linkerd's are what routes with Servers as parents were made for.
        let group = parent.group;
        let group = group.unwrap_or_else(|| own_or_other(PolicyGroup::Linkerd, has));
        ServerName { group, name }
    }

    /// What follows for Servers from a route that appeared, changed or went.
    pub(super) fn servers_of_route_changed(
        &mut self,
        name: &RouteName,
        before: Option<&RouteRecord>,
        now: Option<&RouteRecord>,
    ) {
        let servers = |it: Option<&RouteRecord>| {
            let servers = it.map(RouteRecord::parent_servers);
            servers.unwrap_or_default()
        };
        let (before, now) = (servers(before), servers(now));
        relink(&mut self.routes.of_server, name, &before, &now);
        for server in before.into_iter().chain(now) {
            self.dirty_named_servers(&server);
        }
        self.dirty_references(&name.name.namespace);
    }

    /// The Servers of routes of this name are to be made anew.
    pub(super) fn dirty_servers_of_routes(&mut self, name: &ObjectName) {
        let routes = weft_core::route::RouteKind::ALL.map(|kind| {
            let name = name.clone();
            self.routes.records.get(&RouteName { name, kind })
        });
        let routes = routes.into_iter().flatten();
        let servers: BTreeSet<ObjectName> = routes.flat_map(RouteRecord::parent_servers).collect();
        for server in servers {
            self.dirty_named_servers(&server);
        }
    }

    /// A route of this name cannot be used, or can again.
    pub(super) fn refused_changed(&mut self, name: &ObjectName) {
        let servers = self.policies.servers_in.get(&name.namespace);
        let servers = servers.into_iter().flatten().cloned();
        self.dirty.servers.extend(servers);
    }

    /// A route that a policy is for and that is not there.
    pub(super) fn missing_route(&self, policy: &AuthorizationRecord) -> Option<Fault> {
        let Target::Route(_, name) = &policy.target else {
            return None;
        };
        let record = self.routes.records.get(&self.route_of(policy)?);
        let reason = match record {
            None => format!("no route {name} is known"),
            Some(record) if record.servers.is_empty() => {
                format!("the route {name} has no Server as a parent")
            }
            Some(_) => return None,
        };
        Some(Fault::new("spec.targetRef", reason))
    }

    fn dirty_named_servers(&mut self, name: &ObjectName) {
        for group in [PolicyGroup::Weft, PolicyGroup::Linkerd] {
            let name = name.clone();
            self.dirty.servers.insert(ServerName { group, name });
        }
    }

    fn attached(&self, server: &ServerName) -> impl Iterator<Item = &RouteRecord> {
        let names = self.routes.of_server.get(&server.name);
        let records = names.into_iter().flatten();
        let records = records.filter_map(|it| self.routes.records.get(it));
        records.filter(move |record| {
            let mut parents = record.servers.iter();
            parents.any(|it| self.server_of(record, it) == *server)
        })
    }

    fn opening_route<'a>(
        &'a self,
        route: &'a RouteName,
    ) -> impl Iterator<Item = &'a AuthorizationRecord> {
        let names = self.policies.authorizations_in.get(&route.name.namespace);
        let policies = names.into_iter().flatten();
        let policies = policies.filter_map(|it| self.policies.authorizations.get(it));
        policies.filter(move |it| self.route_of(it).as_ref() == Some(route))
    }

    /// The route that a policy is for, if it is for one.
    fn route_of(&self, policy: &AuthorizationRecord) -> Option<RouteName> {
        let Target::Route(kinds, name) = &policy.target else {
            return None;
        };
        let named = |kind| RouteName {
            name: ObjectName {
                namespace: policy.name.name.namespace.clone(),
                name: name.clone(),
            },
            kind,
        };
        let mut all = kinds.iter().map(|kind| named(*kind));
        let found = all.find(|it| self.routes.records.contains_key(it));
        found.or_else(|| kinds.first().map(|kind| named(*kind)))
    }

    fn is_meant_by_refused(&self, server: &ServerName) -> bool {
        let mut refused = self.routes.refused.iter();
        refused.any(|(route, refused)| {
            let own = route.name.namespace == server.name.namespace;
            let named = MeantServer::Named(server.name.name.clone());
            let meant = [MeantServer::Any, named];
            let is_meant = meant.iter().any(|it| refused.servers.contains(it));
            own && is_meant && !self.routes.records.contains_key(route)
        })
    }
}

/// The Servers that a route which cannot be used says to be for.
pub(super) fn meant_servers(route: &Value) -> BTreeSet<MeantServer> {
    let parents = route.pointer("/spec/parentRefs").and_then(Value::as_array);
    let text = |it: &Value, field: &str| it.get(field).and_then(Value::as_str).map(str::to_owned);
    let servers = parents.into_iter().flatten().filter(|it| {
        let kind = text(it, "kind").unwrap_or_default();
        kind.eq_ignore_ascii_case("Server")
    });
    let meant = servers.map(|it| {
        let name = text(it, "name").and_then(|it| it.parse::<Name>().ok());
        name.map_or(MeantServer::Any, MeantServer::Named)
    });
    meant.collect()
}

/// How many regular expressions there are in routes.
pub(super) fn patterns(routes: &InboundRoutes) -> usize {
    let of_route = |it: InboundRoute| match &it.route.rules {
        RouteRules::Http(rules) => {
            let matches = rules.iter().flat_map(|it| &it.matches);
            matches.map(HttpMatch::patterns).sum()
        }
        RouteRules::Flow(_) => 0,
    };
    routes.routes().map(of_route).sum()
}
