//! The routes of a Server: which requests arrive there at all, and who may make them.
//!
//! They are routes as those of a Service are, with the same order of precedence, and differ in what
//! they are for: they lead nowhere, routes of HTTP and of gRPC hold side by side, and their hostnames count
//! (a hostname that is ignored would make a route be for more requests than its author meant).

use std::borrow::Cow;
use std::cmp::Reverse;

use http::header::CONTENT_TYPE;
use http::request::Parts;
use http::{HeaderMap, HeaderName, Method};
use serde::{Serialize, Serializer};

use super::filters::host_of;
use super::matches::{HttpMatch, Miss, PathMatch, PathPrefix};
use super::table::{Entry, HostEntry, for_hosts, http_match, key, rules};
use super::{HostMatch, Route, RouteName, RouteRules, RouteType, Rule};
use crate::policy::Authorization;

/// The routes of one Server, ordered. None at all: no request is any route's.
#[derive(Clone, Debug)]
pub struct InboundRoutes {
    /// What was given, with its routes apart, as the order is made from these.
    given: Vec<Given>,
    routes: Vec<Route>,
    entries: Vec<HostEntry>,
}

/// One route of a Server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct InboundRoute {
    /// What it matches, and what happens to its requests. Backends do not count.
    #[serde(flatten)]
    pub route: Route,
    /// The hosts that it is for; none: all.
    pub hostnames: Vec<HostMatch>,
    /// Each allows the clients that it covers to make the route's requests, besides those whom the
    /// Server's allow.
    pub authorizations: Vec<Authorization>,
}

/// The rule that a request is.
#[derive(Clone, Copy, Debug)]
pub struct InboundMatch<'a> {
    /// The route.
    pub route: &'a RouteName,
    /// The rule.
    pub rule: &'a Rule,
    /// Which rule of all of the Server's it is.
    pub ordinal: usize,
    /// The prefix that the path was matched by, without a slash at its end; none: by something else.
    pub prefix: Option<&'a str>,
    /// Who may make the route's requests.
    pub authorizations: &'a [Authorization],
}

#[derive(Clone, Debug)]
struct Given {
    hostnames: Vec<HostMatch>,
    authorizations: Vec<Authorization>,
}

impl InboundRoutes {
    /// Orders routes. Those of connections are kept, and are no request's.
    pub fn new(routes: Vec<InboundRoute>) -> Self {
        let mut it = Self {
            given: vec![],
            routes: vec![],
            entries: vec![],
        };
        let mut ordinal = 0;
        for InboundRoute {
            mut route,
            hostnames,
            authorizations,
        } in routes
        {
            if let RouteRules::Http(rules) = &mut route.rules {
                let matches = rules.iter_mut().flat_map(|it| &mut it.matches);
                matches.for_each(HttpMatch::normalize);
            }
            it.enter(&route, hostnames.len(), &mut ordinal);
            it.routes.push(route);
            it.given.push(Given {
                hostnames,
                authorizations,
            });
        }
        let (given, routes) = (&it.given, &it.routes);
        it.entries.sort_by_cached_key(|it| {
            let host = host(given, it).map(HostMatch::rank);
            (Reverse(host), key(routes, &it.entry))
        });
        it
    }

    /// All routes, in the order in which they were given.
    pub fn routes(&self) -> impl ExactSizeIterator<Item = InboundRoute> + '_ {
        let routes = self.routes.iter().zip(&self.given);
        routes.map(|(route, given)| InboundRoute {
            route: route.clone(),
            hostnames: given.hostnames.clone(),
            authorizations: given.authorizations.clone(),
        })
    }

    /// Who may make some of the requests.
    pub fn authorizations(&self) -> impl Iterator<Item = &Authorization> {
        self.given.iter().flat_map(|it| &it.authorizations)
    }

    /// The rule that a request with this path is; None: no route is for it. Only calls of gRPC are those of
    /// a GRPCRoute.
    pub(crate) fn select(
        &self,
        head: &Parts,
        path: &RequestPath<'_>,
        is_grpc: bool,
    ) -> Option<InboundMatch<'_>> {
        self.first(head, path, |it| {
            is_grpc || it.name.kind.route_type() != RouteType::Grpc
        })
    }

    /// The rule of a GRPCRoute that a request is which is no call of gRPC, but which a server of gRPC may take for one:
    /// one of gRPC-Web or Connect. None: it is none's. A rule that names a service or a method knows by that what is
    /// a call; of others the request has to look like one.
    pub(crate) fn select_call(
        &self,
        head: &Parts,
        path: &RequestPath<'_>,
    ) -> Option<InboundMatch<'_>> {
        if head.method == Method::OPTIONS {
            return None;
        }
        let found = self.first(head, path, |it| {
            it.name.kind.route_type() == RouteType::Grpc
        })?;
        let names_any = found.rule.matches.iter().any(|it| !it.path.is_any());
        (names_any || may_be_call(head, path)).then_some(found)
    }

    /// The first rule that a request with this path is, of routes of a kind.
    fn first(
        &self,
        head: &Parts,
        path: &RequestPath<'_>,
        is_of_kind: impl Fn(&Route) -> bool,
    ) -> Option<InboundMatch<'_>> {
        let asked = asked_host(head);
        let found = self.entries.iter().find(|it| {
            let route = &self.routes[it.entry.route];
            let of_host = self.is_of_host(it, asked);
            let matches = http_match(&self.routes, &it.entry);
            is_of_kind(route)
                && of_host
                && path.satisfies(&matches.path)
                && matches.is_match_but_for_path(head)
        })?;
        let route = &self.routes[found.entry.route];
        let rule = rules(route).get(found.entry.rule)?;
        Some(InboundMatch {
            route: &route.name,
            rule,
            ordinal: found.entry.ordinal,
            prefix: match &rule.matches.get(found.entry.at)?.path {
                PathMatch::Prefix(prefix) => Some(prefix.as_str()),
                PathMatch::Exact(_) | PathMatch::Regex(_) | PathMatch::Grpc { .. } => None,
            },
            authorizations: &self.given[found.entry.route].authorizations,
        })
    }

    fn is_of_host(&self, entry: &HostEntry, asked: Option<&str>) -> bool {
        host(&self.given, entry).is_none_or(|it| asked.is_some_and(|asked| it.is_match(asked)))
    }

    /// What each match of a rule asks for first that a request has not; none: it has all.
    pub(super) fn misses<'a>(
        &'a self,
        ordinal: usize,
        head: &Parts,
    ) -> impl Iterator<Item = Option<Miss<'a>>> {
        let asked = asked_host(head);
        let entries = self.entries.iter();
        let entries = entries.filter(move |it| it.entry.ordinal == ordinal);
        entries.map(move |it| match self.is_of_host(it, asked) {
            true => http_match(&self.routes, &it.entry).miss(head),
            false => Some(Miss::Host),
        })
    }

    /// The routes without what they are for, in the order in which they were given.
    pub(super) fn own(&self) -> &[Route] {
        &self.routes
    }

    /// Whether some rule asks what a header is.
    pub fn asks_for_header(&self, name: &HeaderName) -> bool {
        let rules = self.routes.iter().flat_map(rules);
        let matches = rules.flat_map(|it| &it.matches);
        matches
            .flat_map(|it| &it.headers)
            .any(|it| it.name == *name)
    }

    fn enter(&mut self, route: &Route, hostnames: usize, ordinal: &mut usize) {
        for (number, rule) in rules(route).iter().enumerate() {
            for at in 0..rule.matches.len() {
                let entry = Entry {
                    route: self.routes.len(),
                    rule: number,
                    at,
                    ordinal: *ordinal,
                };
                self.entries.extend(for_hosts(entry, hostnames));
            }
            *ordinal += 1;
        }
    }
}

/// Servers take the dot at a name's end for nothing.
fn asked_host(head: &Parts) -> Option<&str> {
    host_of(head).map(|it| it.strip_suffix('.').unwrap_or(it))
}

fn host<'a>(given: &'a [Given], entry: &HostEntry) -> Option<&'a HostMatch> {
    given[entry.entry.route].hostnames.get(entry.host?)
}

/// Whether a request, or an answer, is of a call of gRPC.
pub fn is_grpc(headers: &HeaderMap) -> bool {
    let mut kinds = headers.get_all(CONTENT_TYPE).iter();
    kinds.any(|it| {
        let (start, rest) = it
            .as_bytes()
            .split_at_checked(GRPC.len())
            .unwrap_or_default();
        start.eq_ignore_ascii_case(GRPC) && matches!(rest, [] | [b'+' | b';', ..])
    })
}

/// Media types are compared without regard to case (RFC 9110, section 8.3.1).
const GRPC: &[u8] = b"application/grpc";

/// Whether a request that is no call of gRPC looks like one to a server that speaks gRPC-Web or Connect too: by its media
/// type, by what Connect says in its stead, or because its path is a method of a service in a package.
fn may_be_call(head: &Parts, path: &RequestPath<'_>) -> bool {
    let kinds = head.headers.get_all(CONTENT_TYPE).iter();
    let mut kinds = kinds.map(|it| it.as_bytes());
    let is_kind = kinds.any(|it| {
        CALLS.iter().any(|kind| {
            let start = it.get(..kind.len());
            start.is_some_and(|it| it.eq_ignore_ascii_case(kind))
        })
    });
    let is_connect = head.headers.contains_key("connect-protocol-version");
    let mut segments = path.text().trim_start_matches('/').split('/');
    let service = segments.next().unwrap_or_default();
    let is_method = segments.next().is_some_and(|it| !it.is_empty()) && segments.next().is_none();
    is_kind || is_connect || (is_method && service.contains('.'))
}

/// How media types of calls begin that are not of gRPC itself: of gRPC-Web, and of Connect.
const CALLS: [&[u8]; 3] = [
    b"application/grpc",
    b"application/connect",
    b"application/proto",
];

/// A path of a request, in one of the two ways in which a server may read it.
#[derive(Clone, Debug)]
pub(crate) enum RequestPath<'a> {
    /// As it was sent.
    Sent(&'a str),
    /// As a generous server may take it: see [`RequestPath::read`].
    Read(String),
}

impl<'a> RequestPath<'a> {
    /// What a server that undoes escapes, parameters and empty segments makes of a path; None: what
    /// was sent. Routes must allow both, as nobody knows which one the server behind them goes by: else
    /// `/%61dmin`, or `//admin`, would be a way around a route for `/admin`.
    ///
    /// # Errors
    /// It has segments of dots, which clients resolve before they ask (RFC 3986, section 5.2.4). What is left of the
    /// path without them depends on what a server undoes before.
    pub(crate) fn read(path: &'a str) -> Result<Option<Self>, Dots> {
        let read = read(path)?;
        Ok((read != path).then(|| Self::Read(read.into_owned())))
    }

    fn text(&self) -> &str {
        match self {
            Self::Sent(path) => path,
            Self::Read(path) => path,
        }
    }

    fn satisfies(&self, wanted: &PathMatch) -> bool {
        match (self, wanted) {
            (Self::Sent(path), wanted) => wanted.is_match(path),
            // What is written in the route is read in the same way.
            (Self::Read(path), PathMatch::Exact(exact)) => {
                read(exact).is_ok_and(|it| it == path.as_str())
            }
            (Self::Read(path), PathMatch::Prefix(prefix)) => {
                let prefix = read(prefix.as_str()).map(|it| PathPrefix::new(&it));
                prefix.is_ok_and(|it| it.rest_of(path).is_some())
            }
            (Self::Read(path), wanted) => wanted.is_match(path),
        }
    }
}

/// A path has segments of dots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Dots;

fn read(path: &str) -> Result<Cow<'_, str>, Dots> {
    let is_odd = |byte: u8| matches!(byte, b'%' | b';' | b'\\');
    let plain = !path.bytes().any(is_odd) && !path.contains("//") && !path.contains("/.");
    if plain {
        return Ok(path.into());
    }
    let bytes: Vec<u8> = unescaped(path).collect();
    let text = String::from_utf8_lossy(&bytes).replace('\\', "/");
    let mut segments: Vec<&str> = vec![];
    for segment in text.split('/') {
        match name_of(segment) {
            "" => {}
            "." | ".." => return Err(Dots),
            name => segments.push(name),
        }
    }
    let mut read = format!("/{}", segments.join("/"));
    if text
        .rsplit('/')
        .next()
        .is_some_and(|it| name_of(it).is_empty())
        && read.len() > 1
    {
        read.push('/');
    }
    Ok(read.into())
}

/// A segment without its parameters.
fn name_of(segment: &str) -> &str {
    segment.split_once(';').map_or(segment, |(name, _)| name)
}

/// An incomplete escape stands for itself.
fn unescaped(path: &str) -> impl Iterator<Item = u8> {
    let mut rest = path.as_bytes();
    std::iter::from_fn(move || {
        let digit = |byte: u8| char::from(byte).to_digit(16).map(|it| it as u8);
        let (first, after) = rest.split_first()?;
        rest = after;
        if let (b'%', [high, low, after @ ..]) = (*first, after)
            && let (Some(high), Some(low)) = (digit(*high), digit(*low))
        {
            rest = after;
            return Some(high << 4 | low);
        }
        Some(*first)
    })
}

/// The rest follows from these.
impl PartialEq for InboundRoutes {
    fn eq(&self, other: &Self) -> bool {
        self.routes().eq(other.routes())
    }
}

impl Eq for InboundRoutes {}

impl Serialize for InboundRoutes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.routes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_read_as_generous_servers_do() {
        for (sent, expected) in [
            ("/", "/"),
            ("/a/b", "/a/b"),
            ("/%61dmin", "/admin"),
            ("/a%2Fb", "/a/b"),
            ("//admin", "/admin"),
            ("/admin;x=1/y", "/admin/y"),
            ("/admin/;x", "/admin/"),
            ("/a/...", "/a/..."),
            ("/a/.b", "/a/.b"),
            ("/a//", "/a/"),
            ("/a%", "/a%"),
            ("/a%4", "/a%4"),
            ("/%zz", "/%zz"),
            ("*", "*"),
            ("", ""),
        ] {
            assert_eq!(read(sent).as_deref(), Ok(expected), "{sent}");
        }
        for sent in [
            "/public/../admin",
            "/public/%2e%2e/admin",
            "/public/..%5cadmin",
            "/public/../admin/..;/public/x",
            "/public/../admin//../public/x",
            "/public/.%2E/admin",
            "/./admin",
            "/admin/.",
            "/admin/x/..",
            "/admin/..;x=1",
        ] {
            assert_eq!(read(sent), Err(Dots), "{sent}");
        }
    }
}
