//! Why a request, or a flow, is not another rule's: for people who ask. What decides is [`RouteTable::select`], and here it
//! is asked of each rule by itself.

use std::fmt;

use http::request::Parts;

use super::inbound::{InboundRoutes, RequestPath};
use super::matches::Miss;
use super::table::{RouteTable, Selected, SelectedFlow};
use super::{HostMatch, Route, RouteName, RouteRules, RouteType};
use crate::names::Name;

/// A rule that is not the request's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PassedOver<'a> {
    /// Its route.
    pub route: &'a RouteName,
    /// Which rule of the route it is, counted from 0.
    pub rule_index: usize,
    /// The rule's name, where it has one.
    pub rule: Option<&'a Name>,
    /// Why.
    pub why: WhyNot<'a>,
}

/// Why a rule is not the request's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WhyNot<'a> {
    /// It holds for clients of another namespace, or for those alone whose namespace has no routes of its own.
    OtherClients,
    /// Routes of this type are in force, which is more specific.
    LessSpecific(RouteType),
    /// It is for calls of gRPC.
    NotACall,
    /// It has no matches.
    NoMatches,
    /// What each of its matches asks for first that the request has not; each once.
    Missed(Vec<Miss<'a>>),
    /// It would be, and another one comes before it.
    Later,
}

impl RouteTable {
    /// The rules that are not those of a request of a client in this namespace, in the order in which routes were given.
    pub fn passed_over<'a>(&'a self, client: &'a Name, head: &Parts) -> Vec<PassedOver<'a>> {
        let own = match self.select(client, head) {
            Selected::Rule(matched) => Some(matched.ordinal),
            Selected::Service | Selected::NotFound => None,
        };
        let scope = self.scope(client);
        self.others(client, own, |ordinal| {
            let entries = scope.entries.iter();
            let entries = entries.filter(|it| it.entry.ordinal == ordinal);
            why_not(entries.map(|it| match self.is_of_host(it, head) {
                true => self.http_match(it).miss(head),
                false => Some(Miss::Host),
            }))
        })
    }

    /// The same of a flow, with the server name that it asks for, if it is TLS.
    pub fn passed_over_by_flow<'a>(
        &'a self,
        client: &'a Name,
        server_name: Option<&str>,
    ) -> Vec<PassedOver<'a>> {
        let own = match self.select_flow(client, server_name) {
            SelectedFlow::Rule { ordinal, .. } => Some(ordinal),
            SelectedFlow::Service | SelectedFlow::NotFound => None,
        };
        let scope = self.scope(client);
        self.others(client, own, |ordinal| {
            let flows = scope.flows.iter().filter(|it| it.ordinal == ordinal);
            why_not(flows.map(|it| {
                let of_other = |it: &HostMatch| server_name.is_none_or(|asked| !it.is_match(asked));
                self.host(it).is_some_and(of_other).then_some(Miss::Host)
            }))
        })
    }

    fn others<'a>(
        &'a self,
        client: &'a Name,
        own: Option<usize>,
        why: impl Fn(usize) -> WhyNot<'a>,
    ) -> Vec<PassedOver<'a>> {
        let (of, in_force) = (self.namespace_in_force(client), self.route_type(client));
        let why = |route: &Route, ordinal: usize| match in_force {
            _ if route.name.name.namespace != *of => WhyNot::OtherClients,
            Some(more) if more != route.name.kind.route_type() => WhyNot::LessSpecific(more),
            _ => why(ordinal),
        };
        but_for(own, self.routes().iter(), why)
    }
}

impl InboundRoutes {
    /// The rules that are not those of a request whose path is taken as it was sent, in the order in which routes were
    /// given.
    pub fn passed_over(&self, head: &Parts, is_grpc: bool) -> Vec<PassedOver<'_>> {
        let path = RequestPath::Sent(head.uri.path());
        let own = self.select(head, &path, is_grpc).map(|it| it.ordinal);
        let of_requests = |it: &&Route| matches!(it.rules, RouteRules::Http(_));
        but_for(
            own,
            self.own().iter().filter(of_requests),
            |route, ordinal| match route.name.kind.route_type() {
                RouteType::Grpc if !is_grpc => WhyNot::NotACall,
                _ => why_not(self.misses(ordinal, head)),
            },
        )
    }
}

/// All rules but one.
fn but_for<'a>(
    own: Option<usize>,
    routes: impl Iterator<Item = &'a Route>,
    why: impl Fn(&Route, usize) -> WhyNot<'a>,
) -> Vec<PassedOver<'a>> {
    let rules = routes.flat_map(|route| {
        let names = names(route).into_iter().enumerate();
        names.map(move |(index, name)| (route, index, name))
    });
    let others = rules
        .enumerate()
        .filter(|(ordinal, _)| own != Some(*ordinal));
    let others = others.map(|(ordinal, (route, rule_index, rule))| PassedOver {
        route: &route.name,
        rule_index,
        rule,
        why: why(route, ordinal),
    });
    others.collect()
}

/// The names of its rules.
fn names(route: &Route) -> Vec<Option<&Name>> {
    match &route.rules {
        RouteRules::Http(rules) => rules.iter().map(|it| it.name.as_ref()).collect(),
        RouteRules::Flow(rule) => vec![rule.name.as_ref()],
    }
}

/// Of a rule, by what each of its matches misses.
fn why_not<'a>(misses: impl Iterator<Item = Option<Miss<'a>>>) -> WhyNot<'a> {
    let mut missed = vec![];
    for miss in misses {
        match miss {
            None => return WhyNot::Later,
            Some(miss) if missed.contains(&miss) => {}
            Some(miss) => missed.push(miss),
        }
    }
    match missed.is_empty() {
        true => WhyNot::NoMatches,
        false => WhyNot::Missed(missed),
    }
}

/// `HTTPRoute shop/web, rule 2: it asks for path /cart`.
impl fmt::Display for PassedOver<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kind, name) = (self.route.kind.as_str(), &self.route.name);
        write!(formatter, "{kind} {name}, rule {}", self.rule_index + 1)?;
        if let Some(rule) = self.rule {
            write!(formatter, " ({rule})")?;
        }
        write!(formatter, ": {}", self.why)
    }
}

impl fmt::Display for WhyNot<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OtherClients => formatter.write_str("it holds for clients of other namespaces"),
            Self::LessSpecific(more) => {
                write!(formatter, "routes of {more} are in force, which come first")
            }
            Self::NotACall => formatter.write_str("it is for calls of gRPC"),
            Self::NoMatches => formatter.write_str("it matches nothing"),
            Self::Later => formatter.write_str("it matches too, and comes later"),
            Self::Missed(missed) => {
                formatter.write_str("it asks for ")?;
                for (number, miss) in missed.iter().enumerate() {
                    let between = if number == 0 { "" } else { ", or " };
                    write!(formatter, "{between}{miss}")?;
                }
                Ok(())
            }
        }
    }
}
