//! Routes: where a request, or a flow, that was sent to a port of a Service, or out of the cluster, goes.
//!
//! A [`RouteTable`] holds the routes of one port of one Service or EgressNetwork, as the controller made them out of
//! Gateway API objects: references followed, what cannot be used replaced by what answers with an error.
//! The table orders them once, by the precedence that the Gateway API prescribes; to select for a request
//! is to go down that order to the first match, without allocation. What the selected rule does to a
//! request's head, and to the response's, are functions too ([`apply_to_request`], [`apply_to_response`]).

use std::fmt;

use serde::Serialize;

use crate::egress::EgressName;
use crate::names::{Name, NameError, ObjectName};

mod filters;
mod inbound;
mod matches;
mod passed_over;
mod profile;
mod reliability;
mod table;

pub use filters::{
    Filter, FilterError, HeaderEdit, Mirror, PathRewrite, Place, Redirect, RedirectScheme, Rewrite,
    Share, apply_to_request, apply_to_response, hostname,
};
pub(crate) use inbound::{Dots, RequestPath};
pub use inbound::{InboundMatch, InboundRoute, InboundRoutes, is_grpc};
pub use matches::{
    HeaderMatch, HttpMatch, MAX_PATTERN_BYTES, Miss, PathMatch, PathPrefix, Pattern, PatternError,
    QueryMatch, TextMatch,
};
pub use passed_over::{PassedOver, WhyNot};
pub use profile::{Condition, Profile, ProfileRoute, ResponseClasses};
pub use reliability::{
    Backoff, BudgetSettings, GrpcCodes, Reliability, ReliabilityError, Retry, StatusRange,
    Timeouts, annotated_duration, duration, grpc_timeout, write_grpc_timeout,
};
pub use table::{Matched, RouteTable, RouteTableName, Selected, SelectedFlow, Unrouted};

/// A route: rules in an order, of one object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Route {
    /// The object that it was written as.
    #[serde(flatten)]
    pub name: RouteName,
    /// When that was created, in seconds since 1970, where it is known. Who is older comes first.
    pub created: Option<i64>,
    /// What it says.
    pub rules: RouteRules,
}

/// Names a route.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct RouteName {
    /// Namespace and name.
    #[serde(flatten)]
    pub name: ObjectName,
    /// Its kind.
    pub kind: RouteKind,
}

/// The kinds of routes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub enum RouteKind {
    /// `GRPCRoute` of `gateway.networking.k8s.io`.
    #[serde(rename = "GRPCRoute")]
    Grpc,
    /// `HTTPRoute` of `gateway.networking.k8s.io`.
    #[serde(rename = "HTTPRoute")]
    Http,
    /// `HTTPRoute` of `policy.linkerd.io`.
    #[serde(rename = "HTTPRoute.policy.linkerd.io")]
    LinkerdHttp,
    /// `TLSRoute` of `gateway.networking.k8s.io`.
    #[serde(rename = "TLSRoute")]
    Tls,
    /// `TCPRoute` of `gateway.networking.k8s.io`.
    #[serde(rename = "TCPRoute")]
    Tcp,
}

/// What is routed. Of routes of different types for one port, only those of the most specific type are in
/// force (GEP-1426, "Route types").
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RouteType {
    /// gRPC calls: the most specific.
    Grpc,
    /// HTTP requests.
    Http,
    /// TLS connections by the server name that their client asks for.
    Tls,
    /// TCP connections.
    Tcp,
}

/// What a route says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum RouteRules {
    /// Of HTTPRoutes and GRPCRoutes.
    Http(Vec<Rule>),
    /// Of TLSRoutes and TCPRoutes.
    Flow(FlowRule),
}

/// A rule for HTTP requests.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Rule {
    /// Its name, where it has one.
    pub name: Option<Name>,
    /// A request that satisfies one of these is its. None at all: no request is.
    pub matches: Vec<HttpMatch>,
    /// What happens to its requests and their responses, in this order.
    pub filters: Vec<Filter>,
    /// Where they go.
    pub backends: Vec<Backend>,
    /// How long they may take, and when they are sent again; none: nothing is said.
    pub reliability: Option<Box<Reliability>>,
}

/// What a TLSRoute or a TCPRoute says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FlowRule {
    /// The rule's name, where it has one.
    pub name: Option<Name>,
    /// Of a TLSRoute, the server names that it is for; none: all.
    pub hostnames: Vec<HostMatch>,
    /// Where flows go.
    pub backends: Vec<Backend>,
}

/// A condition on the server name that a TLS client asks for. In lower case.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum HostMatch {
    /// This name.
    Exact(Name),
    /// All names that have at least one label more than this in front: `*.example.com`.
    Below(Name),
}

/// One of the places where a rule's requests go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Backend {
    /// How many of the sum of all weights go here.
    pub weight: u32,
    /// Where.
    pub target: Target,
    /// What happens to requests that go here, after what the rule does.
    pub filters: Vec<Filter>,
}

/// Where requests go.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    /// To the endpoints of a port of a Service; its own routes do not count there.
    Service {
        /// The Service.
        name: ObjectName,
        /// Its port.
        port: u16,
    },
    /// To where the client wanted to go. Only for routes of this very EgressNetwork.
    Egress(EgressName),
    /// Nowhere, for this reason: they are answered with 500 (gRPC: UNAVAILABLE), and flows are reset.
    Invalid(String),
}

/// Chooses a backend, each as often as its weight says. None: there is none, or none has a weight; that
/// is answered like [`Target::Invalid`].
///
/// `random` is a number out of all of its type.
pub fn pick(backends: &[Backend], random: u64) -> Option<&Backend> {
    let total: u64 = backends.iter().map(|it| u64::from(it.weight)).sum();
    // Scaled, not divided: no low bits are favoured. Below `total`, as `random` is below 2^64.
    let mut place = ((u128::from(random) * u128::from(total)) >> 64) as u64;
    backends.iter().find(|it| {
        let weight = u64::from(it.weight);
        let here = place < weight;
        place = place.saturating_sub(weight);
        here
    })
}

impl RouteName {
    /// The API group of its kind.
    pub fn group(&self) -> &'static str {
        self.kind.group()
    }
}

impl RouteKind {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Grpc,
        Self::Http,
        Self::LinkerdHttp,
        Self::Tls,
        Self::Tcp,
    ];

    /// The API group.
    pub fn group(self) -> &'static str {
        match self {
            Self::LinkerdHttp => "policy.linkerd.io",
            Self::Grpc | Self::Http | Self::Tls | Self::Tcp => "gateway.networking.k8s.io",
        }
    }

    /// The kind as in manifests.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Grpc => "GRPCRoute",
            Self::Http | Self::LinkerdHttp => "HTTPRoute",
            Self::Tls => "TLSRoute",
            Self::Tcp => "TCPRoute",
        }
    }

    /// What it routes.
    pub fn route_type(self) -> RouteType {
        match self {
            Self::Grpc => RouteType::Grpc,
            Self::Http | Self::LinkerdHttp => RouteType::Http,
            Self::Tls => RouteType::Tls,
            Self::Tcp => RouteType::Tcp,
        }
    }
}

/// `HTTP`.
impl fmt::Display for RouteType {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Grpc => "gRPC",
            Self::Http => "HTTP",
            Self::Tls => "TLS",
            Self::Tcp => "TCP",
        })
    }
}

impl RouteType {
    /// Whether it routes requests, not connections.
    pub fn is_of_requests(self) -> bool {
        matches!(self, Self::Grpc | Self::Http)
    }
}

/// `HTTPRoute.gateway.networking.k8s.io namespace/name`.
impl fmt::Display for RouteName {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kind, group) = (self.kind.as_str(), self.group());
        write!(formatter, "{kind}.{group} {}", self.name)
    }
}

impl HostMatch {
    /// Whether a server name, in whatever case, is meant.
    pub fn is_match(&self, host: &str) -> bool {
        match self {
            Self::Exact(name) => name.as_str().eq_ignore_ascii_case(host),
            Self::Below(name) => {
                let name = name.as_str();
                let Some(dot) = host.len().checked_sub(name.len() + 1).filter(|it| *it > 0) else {
                    return false;
                };
                // By bytes: nobody said that a server name is ASCII.
                let (_, end) = host.as_bytes().split_at(dot);
                end.first() == Some(&b'.') && end[1..].eq_ignore_ascii_case(name.as_bytes())
            }
        }
    }

    /// How specific it is: exact names first, then by length.
    fn rank(&self) -> (bool, usize) {
        match self {
            Self::Exact(name) => (true, name.as_str().len()),
            Self::Below(name) => (false, name.as_str().len()),
        }
    }
}

/// Reads `example.com` and `*.example.com`.
impl std::str::FromStr for HostMatch {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        Ok(match text.strip_prefix("*.") {
            Some(name) => Self::Below(name.parse()?),
            None => Self::Exact(text.parse()?),
        })
    }
}

/// `example.com`, `*.example.com`.
impl fmt::Display for HostMatch {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(name) => write!(formatter, "{name}"),
            Self::Below(name) => write!(formatter, "*.{name}"),
        }
    }
}

#[cfg(test)]
mod tests;
