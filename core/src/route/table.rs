//! The routes of one port of a Service, ordered, and the decision over them.
//!
//! Hostnames of HTTPRoutes and GRPCRoutes count for EgressNetworks as parents, whose clients mean many hosts. For
//! Services they are ignored (GEP-1426, "hostnames field").

use std::cmp::Reverse;
use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use http::Method;
use http::request::Parts;
use serde::ser::SerializeStruct;
use serde::{Serialize, Serializer};

use super::filters::host_of;
use super::matches::{HttpMatch, PathMatch, TextMatch};
use super::{
    BudgetSettings, FlowRule, HostMatch, Profile, Reliability, ResponseClasses, Route, RouteName,
    RouteRules, RouteType, Rule, Timeouts,
};
use crate::names::{Name, ObjectName};

/// The routes of one port of a Service.
///
/// Routes of the Service's own namespace (producer routes) hold for all clients; those of another
/// (consumer routes) for clients of that namespace only, and for these in place of the producer's
/// (GEP-1426, "Namespace boundaries" and "Multiple routes for a Service").
#[derive(Clone, Debug)]
pub struct RouteTable {
    name: RouteTableName,
    routes: Vec<Route>,
    /// The hosts that each route is for; as many as routes, or none at all: all are for all.
    hosts: Vec<Vec<HostMatch>>,
    producer: Scope,
    consumers: HashMap<Name, Scope>,
    rules: usize,
    unrouted: Option<Box<Reliability>>,
    /// At most one of a namespace.
    profiles: Vec<Profile>,
}

/// Names a table: one exists per port of a Service that has routes.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RouteTableName {
    /// The Service.
    pub service: ObjectName,
    /// The port that clients use.
    pub port: u16,
}

/// What is said about a request that no rule is for.
#[derive(Clone, Copy, Debug)]
pub struct Unrouted<'a> {
    /// How long it may take, and when it is sent again.
    pub reliability: Option<&'a Reliability>,
    /// How many retries there may be, if its client asks for some and nobody else does.
    pub budget: BudgetSettings,
    /// What counts as a failure.
    pub classes: Option<&'a Arc<ResponseClasses>>,
}

/// What is said about a request.
#[derive(Clone, Copy, Debug)]
pub enum Selected<'a> {
    /// There are no routes for it: it goes to the Service itself.
    Service,
    /// This rule's.
    Rule(Matched<'a>),
    /// There are routes, and it is none's: answered with 404 (gRPC: UNIMPLEMENTED).
    NotFound,
}

/// The rule that a request is.
#[derive(Clone, Copy, Debug)]
pub struct Matched<'a> {
    /// The route.
    pub route: &'a RouteName,
    /// The rule.
    pub rule: &'a Rule,
    /// Which rule of the route it is, counted from 0.
    pub rule_index: usize,
    /// Which rule of the table it is: below [`RouteTable::rules`], for what is kept per rule beside it.
    pub ordinal: usize,
    /// The prefix that the path was matched by, without a slash at its end; none: by something else.
    pub prefix: Option<&'a str>,
}

/// What is said about a flow.
#[derive(Clone, Copy, Debug)]
pub enum SelectedFlow<'a> {
    /// There are no routes for it: it goes to the Service itself.
    Service,
    /// This rule's.
    Rule {
        /// The route.
        route: &'a RouteName,
        /// The rule.
        rule: &'a FlowRule,
        /// Which rule of the table it is.
        ordinal: usize,
    },
    /// There are routes, and it is none's: to be reset.
    NotFound,
}

/// The routes that hold for some clients: all of one type.
#[derive(Clone, Debug, Default)]
pub(super) struct Scope {
    route_type: Option<RouteType>,
    /// Matches of HTTP rules. Those of exact paths first, by path, then in order of precedence; all in that order
    /// where hosts count.
    pub(super) entries: Vec<HostEntry>,
    /// How many are of exact paths, and found by them.
    exact: usize,
    /// Conditions of TLSRoutes in order of precedence; of TCPRoutes the one that is in force.
    pub(super) flows: Vec<FlowEntry>,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    pub(super) route: usize,
    pub(super) rule: usize,
    pub(super) at: usize,
    pub(super) ordinal: usize,
}

/// A match of a route that is for a host.
#[derive(Clone, Copy, Debug)]
pub(super) struct HostEntry {
    pub(super) entry: Entry,
    /// Which of the route's hostnames; none: it has none.
    pub(super) host: Option<usize>,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct FlowEntry {
    route: usize,
    /// Which of its hostnames; none: all names, or no TLSRoute.
    host: Option<usize>,
    pub(super) ordinal: usize,
}

impl RouteTable {
    /// Orders routes. Those that lose against a more specific type, or have nothing for their type, are
    /// kept and never selected.
    pub fn new(name: RouteTableName, routes: Vec<Route>) -> Self {
        Self::ordered(name, routes, vec![])
    }

    /// Orders routes of which each is for some hosts; for none: for all. The most specific host comes before all
    /// else that orders routes of requests.
    pub fn with_hosts(name: RouteTableName, routes: Vec<(Route, Vec<HostMatch>)>) -> Self {
        let (routes, hosts): (Vec<_>, Vec<_>) = routes.into_iter().unzip();
        let any = hosts.iter().any(|it: &Vec<HostMatch>| !it.is_empty());
        Self::ordered(name, routes, if any { hosts } else { vec![] })
    }

    fn ordered(name: RouteTableName, mut routes: Vec<Route>, hosts: Vec<Vec<HostMatch>>) -> Self {
        for route in &mut routes {
            if let RouteRules::Http(rules) = &mut route.rules {
                let matches = rules.iter_mut().flat_map(|it| &mut it.matches);
                matches.for_each(HttpMatch::normalize);
            }
        }
        let rules_of = |it: &Route| match &it.rules {
            RouteRules::Http(rules) => rules.len(),
            RouteRules::Flow(_) => 1,
        };
        let mut first_ordinals = vec![];
        let mut rules = 0;
        for route in &routes {
            first_ordinals.push(rules);
            rules += rules_of(route);
        }
        let mut by_namespace: HashMap<&Name, Vec<usize>> = HashMap::new();
        for (index, route) in routes.iter().enumerate() {
            let namespace = by_namespace.entry(&route.name.name.namespace).or_default();
            namespace.push(index);
        }
        let scope = |indexes: Vec<usize>| Scope::new((&routes, &hosts), indexes, &first_ordinals);
        let own = by_namespace.remove(&name.service.namespace);
        let producer = scope(own.unwrap_or_default());
        let consumers = by_namespace.into_iter();
        let consumers = consumers.map(|(namespace, it)| (namespace.clone(), scope(it)));
        Self {
            consumers: consumers.collect(),
            producer,
            name,
            rules,
            routes,
            hosts,
            unrouted: None,
            profiles: vec![],
        }
    }

    /// With what holds for requests that no rule is for, where that is said.
    pub fn with_unrouted(mut self, unrouted: Option<Reliability>) -> Self {
        self.unrouted = unrouted.filter(Reliability::is_any).map(Box::new);
        self.with_headers_heeded()
    }

    /// With ServiceProfiles.
    pub fn with_profiles(mut self, profiles: Vec<Profile>) -> Self {
        self.profiles = profiles;
        self.with_headers_heeded()
    }

    /// Whether clients may say terms in headers is for the Service to say: a ServiceProfile says other things.
    fn with_headers_heeded(mut self) -> Self {
        if self.heeds_headers() {
            let routes = self.profiles.iter_mut().flat_map(|it| &mut it.routes);
            routes.for_each(|it| it.reliability.heeds_headers = true);
        }
        self
    }

    fn heeds_headers(&self) -> bool {
        self.unrouted.as_ref().is_some_and(|it| it.heeds_headers)
    }

    /// All ServiceProfiles, in the order in which they were given.
    pub fn profiles(&self) -> &[Profile] {
        &self.profiles
    }

    /// The ServiceProfile that holds for clients in a namespace, where no routes of requests do: their own, or that
    /// of the Service's namespace.
    pub fn profile(&self, client: &Name) -> Option<&Profile> {
        let of = |namespace: &Name| self.profiles.iter().find(|it| it.namespace == *namespace);
        of(client).or_else(|| of(&self.name.service.namespace))
    }

    /// What is said of a request of a client in a namespace that no rule is for, as it has no routes of requests. Its
    /// path is without the query.
    pub fn unrouted_for(&self, client: &Name, method: &Method, path: &str) -> Unrouted<'_> {
        let Some(profile) = self.profile(client) else {
            return Unrouted {
                reliability: self.unrouted(),
                budget: BudgetSettings::DEFAULT,
                classes: None,
            };
        };
        let route = profile.route(method, path);
        let said = route.map(|it| &it.reliability).filter(|it| it.is_any());
        Unrouted {
            reliability: said.or_else(|| self.heeds_headers().then_some(&HEADERS_ALONE)),
            budget: profile.budget,
            classes: route.and_then(|it| it.classes.as_ref()),
        }
    }

    /// What the Service says of requests that no rule is for.
    pub fn unrouted(&self) -> Option<&Reliability> {
        self.unrouted.as_deref()
    }

    /// Whose routes they are.
    pub fn name(&self) -> &RouteTableName {
        &self.name
    }

    /// All routes, in the order in which they were given.
    pub fn routes(&self) -> &[Route] {
        &self.routes
    }

    /// How many rules there are in all of them.
    pub fn rules(&self) -> usize {
        self.rules
    }

    /// The rule that a request is, of a client in this namespace.
    pub fn select(&self, client: &Name, head: &Parts) -> Selected<'_> {
        let scope = self.scope(client);
        if !scope.route_type.is_some_and(RouteType::is_of_requests) {
            return Selected::Service;
        }
        let path = head.uri.path();
        let (exact, others) = scope.entries.split_at(scope.exact);
        let start = exact.partition_point(|it| self.exact_path(it) < path);
        let same_path = exact[start..].iter();
        let mut same_path = same_path.take_while(|it| self.exact_path(it) == path);
        let is_of_host = |it: &HostEntry| self.hosts.is_empty() || self.is_of_host(it, head);
        let found = same_path
            .find(|it| self.http_match(it).is_match_but_for_path(head))
            .or_else(|| {
                let mut others = others.iter();
                others.find(|it| is_of_host(it) && self.http_match(it).is_match(head))
            });
        found
            .and_then(|it| self.matched(&it.entry))
            .map_or(Selected::NotFound, Selected::Rule)
    }

    /// The rule that a flow is, of a client in this namespace; with the server name that it asks for, if it
    /// is TLS. For flows that are not looked into, and for HTTP connections where [`RouteTable::select`]
    /// says [`Selected::Service`].
    pub fn select_flow(&self, client: &Name, server_name: Option<&str>) -> SelectedFlow<'_> {
        let scope = self.scope(client);
        let found = match (scope.route_type, server_name) {
            // A TLSRoute says nothing about what is no TLS, or hides its name.
            (None | Some(RouteType::Grpc | RouteType::Http), _) | (Some(RouteType::Tls), None) => {
                return SelectedFlow::Service;
            }
            (Some(RouteType::Tcp), _) => scope.flows.first(),
            (Some(RouteType::Tls), Some(server_name)) => scope.flows.iter().find(|it| {
                let host = self.host(it);
                host.is_none_or(|it| it.is_match(server_name))
            }),
        };
        let Some(entry) = found else {
            return SelectedFlow::NotFound;
        };
        match self.routes.get(entry.route) {
            Some(Route {
                name,
                rules: RouteRules::Flow(rule),
                ..
            }) => SelectedFlow::Rule {
                route: name,
                rule,
                ordinal: entry.ordinal,
            },
            _ => SelectedFlow::NotFound,
        }
    }

    /// The type of routes that is in force for clients of a namespace; none: no routes are.
    pub fn route_type(&self, client: &Name) -> Option<RouteType> {
        self.scope(client).route_type
    }

    /// The namespace whose routes hold for clients of a namespace.
    pub(super) fn namespace_in_force<'a>(&'a self, client: &'a Name) -> &'a Name {
        match self.consumers.contains_key(client) {
            true => client,
            false => &self.name.service.namespace,
        }
    }

    pub(super) fn scope(&self, client: &Name) -> &Scope {
        // Most tables have no consumer routes, and then nothing is hashed.
        let consumer = match self.consumers.is_empty() {
            true => None,
            false => self.consumers.get(client),
        };
        consumer.unwrap_or(&self.producer)
    }

    fn matched(&self, entry: &Entry) -> Option<Matched<'_>> {
        let route = &self.routes[entry.route];
        let rule = rules(route).get(entry.rule)?;
        Some(Matched {
            route: &route.name,
            rule,
            rule_index: entry.rule,
            ordinal: entry.ordinal,
            prefix: match &rule.matches.get(entry.at)?.path {
                PathMatch::Prefix(prefix) => Some(prefix.as_str()),
                PathMatch::Exact(_) | PathMatch::Regex(_) | PathMatch::Grpc { .. } => None,
            },
        })
    }

    pub(super) fn is_of_host(&self, entry: &HostEntry, head: &Parts) -> bool {
        // Servers take the dot at a name's end for nothing.
        let asked = host_of(head).map(|it| it.strip_suffix('.').unwrap_or(it));
        host_of_entry(&self.hosts, entry)
            .is_none_or(|it| asked.is_some_and(|asked| it.is_match(asked)))
    }

    pub(super) fn http_match(&self, entry: &HostEntry) -> &HttpMatch {
        http_match(&self.routes, &entry.entry)
    }

    fn exact_path(&self, entry: &HostEntry) -> &str {
        exact_path(self.http_match(entry))
    }

    pub(super) fn host(&self, entry: &FlowEntry) -> Option<&HostMatch> {
        host(&self.routes, entry)
    }
}

/// What clients say, and nothing beside that.
static HEADERS_ALONE: Reliability = Reliability {
    timeouts: Timeouts {
        request: None,
        response: None,
        backend_request: None,
        idle: None,
    },
    retry: None,
    heeds_headers: true,
};

impl Scope {
    fn new(
        (routes, hosts): (&[Route], &[Vec<HostMatch>]),
        indexes: Vec<usize>,
        first_ordinals: &[usize],
    ) -> Self {
        let types = indexes.iter().map(|it| routes[*it].name.kind.route_type());
        let Some(route_type) = types.min() else {
            return Self::default();
        };
        let mut scope = Self {
            route_type: Some(route_type),
            ..Self::default()
        };
        let in_force = |it: &usize| routes[*it].name.kind.route_type() == route_type;
        for route in indexes.into_iter().filter(in_force) {
            let hosts = hosts.get(route).map_or(0, Vec::len);
            scope.add((route, hosts), &routes[route], first_ordinals[route]);
        }
        scope.entries.sort_by_cached_key(|it| {
            let host = host_of_entry(hosts, it).map(HostMatch::rank);
            (Reverse(host), key(routes, &it.entry))
        });
        if hosts.is_empty() {
            let path = |it: &HostEntry| &http_match(routes, &it.entry).path;
            let is_exact = |it: &HostEntry| matches!(path(it), PathMatch::Exact(_));
            scope.exact = scope.entries.partition_point(is_exact);
        }
        scope
            .flows
            .sort_by_cached_key(|it| (Reverse(host_rank(routes, it)), age(&routes[it.route])));
        scope
    }

    fn add(&mut self, (index, hosts): (usize, usize), route: &Route, first_ordinal: usize) {
        if let RouteRules::Flow(rule) = &route.rules {
            let mut hosts: Vec<Option<usize>> = (0..rule.hostnames.len()).map(Some).collect();
            if hosts.is_empty() {
                hosts.push(None);
            }
            self.flows.extend(hosts.into_iter().map(|host| FlowEntry {
                route: index,
                host,
                ordinal: first_ordinal,
            }));
        }
        for (number, rule) in rules(route).iter().enumerate() {
            for at in 0..rule.matches.len() {
                let entry = Entry {
                    route: index,
                    rule: number,
                    at,
                    ordinal: first_ordinal + number,
                };
                self.entries.extend(for_hosts(entry, hosts));
            }
        }
    }
}

/// A match for each of so many hosts of its route; of none: for all.
pub(super) fn for_hosts(entry: Entry, hosts: usize) -> impl Iterator<Item = HostEntry> {
    let all = (hosts == 0).then_some(None);
    let each = (0..hosts).map(Some);
    all.into_iter()
        .chain(each)
        .map(move |host| HostEntry { entry, host })
}

/// What orders matches: what is smaller comes first.
///
/// The order is that of `HTTPRouteRule.matches` in the Gateway API: exact paths, longer prefixes, a
/// method, more headers, more parameters, older routes, names, the order of rules. It leaves the place of
/// regular expressions open. Here they stand between all prefixes that say something and `/`, which says
/// nothing and would otherwise hide them behind every fallback; among themselves the longer as written
/// comes first. So it is with paths of gRPC of which not all is exact, by the length of the service, then
/// of the method, as `GRPCRouteRule.matches` has it.
///
/// Exact paths are ordered by text, to be found; two different ones never match the same request.
pub(super) fn key<'a>(
    routes: &'a [Route],
    entry: &Entry,
) -> (Path<'a>, Conditions, Age<'a>, usize, usize) {
    let it = http_match(routes, entry);
    let path = match &it.path {
        PathMatch::Exact(path) => Path::Exact(path),
        PathMatch::Prefix(prefix) if prefix.is_any() => Path::Any,
        PathMatch::Prefix(prefix) => Path::Prefix(Reverse(prefix.as_str().len())),
        PathMatch::Regex(pattern) => Path::Pattern(Reverse((pattern.as_str().len(), 0))),
        PathMatch::Grpc { service, method } => {
            let len = |it: &Option<TextMatch>| it.as_ref().map_or(0, TextMatch::written_len);
            Path::Pattern(Reverse((len(service), len(method))))
        }
    };
    let conditions = Reverse((it.method.is_some(), it.headers.len(), it.query.len()));
    (
        path,
        conditions,
        age(&routes[entry.route]),
        entry.rule,
        entry.at,
    )
}

#[derive(PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Path<'a> {
    Exact(&'a str),
    Prefix(Reverse<usize>),
    Pattern(Reverse<(usize, usize)>),
    Any,
}

/// Whether there is a method; how many headers, and how many parameters.
pub(super) type Conditions = Reverse<(bool, usize, usize)>;

/// Whose age is not known comes last; then by name. Within a scope all are of one namespace, so that the
/// order of names is that of `namespace/name`.
pub(super) type Age<'a> = (bool, Option<i64>, &'a RouteName);

fn age(route: &Route) -> Age<'_> {
    (route.created.is_none(), route.created, &route.name)
}

pub(super) fn rules(route: &Route) -> &[Rule] {
    match &route.rules {
        RouteRules::Http(rules) => rules,
        RouteRules::Flow(_) => &[],
    }
}

/// Entries are made from the routes that they point into, and neither changes.
pub(super) fn http_match<'a>(routes: &'a [Route], entry: &Entry) -> &'a HttpMatch {
    &rules(&routes[entry.route])[entry.rule].matches[entry.at]
}

fn exact_path(it: &HttpMatch) -> &str {
    match &it.path {
        PathMatch::Exact(path) => path,
        PathMatch::Prefix(_) | PathMatch::Regex(_) | PathMatch::Grpc { .. } => "",
    }
}

fn host_of_entry<'a>(hosts: &'a [Vec<HostMatch>], entry: &HostEntry) -> Option<&'a HostMatch> {
    hosts.get(entry.entry.route)?.get(entry.host?)
}

fn host<'a>(routes: &'a [Route], entry: &FlowEntry) -> Option<&'a HostMatch> {
    match &routes[entry.route].rules {
        RouteRules::Flow(rule) => rule.hostnames.get(entry.host?),
        RouteRules::Http(_) => None,
    }
}

fn host_rank(routes: &[Route], entry: &FlowEntry) -> Option<(bool, usize)> {
    host(routes, entry).map(HostMatch::rank)
}

/// The rest follows from these.
impl PartialEq for RouteTable {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
            && self.routes == other.routes
            && self.hosts == other.hosts
            && self.unrouted == other.unrouted
            && self.profiles == other.profiles
    }
}

impl Eq for RouteTable {}

/// `namespace/service:port`.
impl fmt::Display for RouteTableName {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}:{}", self.service, self.port)
    }
}

/// Reads `namespace/service:port`. Ports are written without zeros in front.
impl std::str::FromStr for RouteTableName {
    type Err = crate::names::NameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let refused = || crate::names::NameError {
            text: text.chars().take(64).collect(),
        };
        let (service, port) = text.rsplit_once(':').ok_or_else(refused)?;
        Ok(Self {
            service: service.parse()?,
            port: port.parse().map_err(|_| refused())?,
        })
    }
}

impl Serialize for RouteTable {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut shown = serializer.serialize_struct("RouteTable", 5)?;
        shown.serialize_field("service", &self.name.service)?;
        shown.serialize_field("port", &self.name.port)?;
        shown.serialize_field("routes", &self.routes)?;
        shown.serialize_field("unrouted", &self.unrouted)?;
        shown.serialize_field("profiles", &self.profiles)?;
        shown.end()
    }
}
