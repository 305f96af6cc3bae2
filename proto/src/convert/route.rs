//! Routes: what they match, and where they go.

use core::route::{
    Backend, FlowRule, HeaderMatch, HostMatch, HttpMatch, PathMatch, PathPrefix, Pattern,
    QueryMatch, Route, RouteKind, RouteName, RouteRules, RouteTable, RouteTableName, Rule, Target,
    TextMatch,
};
use weft_core as core;

use super::{ConvertError, Converted, all, error, non_empty, object_name, parsed, port, required};
use crate::v1;

/// Regular expressions of one table: each takes memory, in the agents of all nodes.
pub(super) const MAX_PATTERNS: usize = 1024;

impl From<RouteTable> for v1::RouteTable {
    fn from(table: RouteTable) -> Self {
        let RouteTableName { service, port } = table.name().clone();
        Self {
            service: Some(service.into()),
            port: port.into(),
            unrouted: table.unrouted().cloned().map(Into::into),
            profiles: table.profiles().iter().cloned().map(Into::into).collect(),
            routes: table.routes().iter().cloned().map(Into::into).collect(),
        }
    }
}

impl TryFrom<v1::RouteTable> for RouteTable {
    type Error = ConvertError;

    fn try_from(message: v1::RouteTable) -> Converted<Self> {
        let name = RouteTableName {
            service: object_name("route_table.service", message.service)?,
            port: port("route_table.port", message.port)?,
        };
        few_patterns("route_table.routes", message.routes.iter())?;
        super::profile::few_patterns(&message.profiles)?;
        let unrouted = message.unrouted.map(TryInto::try_into).transpose()?;
        let profiles = all(message.profiles)?;
        let table = Self::new(name, all(message.routes)?).with_unrouted(unrouted);
        Ok(table.with_profiles(profiles))
    }
}

/// Refuses more regular expressions than an agent should keep, before any is compiled.
pub(super) fn few_patterns<'a>(
    field: &str,
    routes: impl Iterator<Item = &'a v1::Route>,
) -> Converted<()> {
    let patterns: usize = routes.map(patterns).sum();
    if patterns <= MAX_PATTERNS {
        return Ok(());
    }
    let reason = format!("{patterns} regular expressions, more than {MAX_PATTERNS}");
    Err(error(field, reason))
}

fn patterns(route: &v1::Route) -> usize {
    let is_pattern = |it: &Option<v1::TextMatch>| {
        let kind = it.as_ref().and_then(|it| it.kind.as_ref());
        usize::from(matches!(kind, Some(v1::text_match::Kind::Regex(_))))
    };
    let of_match = |it: &v1::HttpMatch| {
        use v1::http_match::Path;
        let path = match &it.path {
            Some(Path::Regex(_)) => 1,
            Some(Path::Grpc(grpc)) => is_pattern(&grpc.service) + is_pattern(&grpc.method),
            Some(Path::Exact(_) | Path::Prefix(_)) | None => 0,
        };
        let named = it.headers.iter().chain(&it.query);
        path + named.map(|it| is_pattern(&it.value)).sum::<usize>()
    };
    let matches = route.http_rules.iter().flat_map(|it| &it.matches);
    matches.map(of_match).sum()
}

impl From<Route> for v1::Route {
    fn from(route: Route) -> Self {
        let (http_rules, flow_rule) = match route.rules {
            RouteRules::Http(rules) => (rules.into_iter().map(Into::into).collect(), None),
            RouteRules::Flow(rule) => (vec![], Some(rule.into())),
        };
        Self {
            kind: v1::RouteKind::from(route.name.kind).into(),
            name: Some(route.name.name.into()),
            created: route.created,
            http_rules,
            flow_rule,
        }
    }
}

impl TryFrom<v1::Route> for Route {
    type Error = ConvertError;

    fn try_from(message: v1::Route) -> Converted<Self> {
        let kind = kind(message.kind)?;
        let rules = match (kind.route_type().is_of_requests(), message.flow_rule) {
            (true, None) => RouteRules::Http(all(message.http_rules)?),
            (false, Some(rule)) if message.http_rules.is_empty() => {
                RouteRules::Flow(rule.try_into()?)
            }
            (true, Some(_)) | (false, _) => {
                let reason = format!("not the rules of a {}", kind.as_str());
                return Err(error("route.rules", reason));
            }
        };
        Ok(Self {
            name: RouteName {
                name: object_name("route.name", message.name)?,
                kind,
            },
            created: message.created,
            rules,
        })
    }
}

impl From<RouteKind> for v1::RouteKind {
    fn from(kind: RouteKind) -> Self {
        match kind {
            RouteKind::Grpc => Self::Grpc,
            RouteKind::Http => Self::Http,
            RouteKind::LinkerdHttp => Self::LinkerdHttp,
            RouteKind::Tls => Self::Tls,
            RouteKind::Tcp => Self::Tcp,
        }
    }
}

fn kind(message: i32) -> Converted<RouteKind> {
    match v1::RouteKind::try_from(message) {
        Ok(v1::RouteKind::Grpc) => Ok(RouteKind::Grpc),
        Ok(v1::RouteKind::Http) => Ok(RouteKind::Http),
        Ok(v1::RouteKind::LinkerdHttp) => Ok(RouteKind::LinkerdHttp),
        Ok(v1::RouteKind::Tls) => Ok(RouteKind::Tls),
        Ok(v1::RouteKind::Tcp) => Ok(RouteKind::Tcp),
        Ok(v1::RouteKind::Unspecified) | Err(_) => {
            Err(error("route.kind", format!("unknown kind {message}")))
        }
    }
}

impl From<Rule> for v1::HttpRule {
    fn from(rule: Rule) -> Self {
        Self {
            name: rule.name.map(|it| it.to_string()).unwrap_or_default(),
            matches: rule.matches.into_iter().map(Into::into).collect(),
            filters: rule.filters.into_iter().map(Into::into).collect(),
            backends: rule.backends.into_iter().map(Into::into).collect(),
            reliability: rule.reliability.map(|it| (*it).into()),
        }
    }
}

impl TryFrom<v1::HttpRule> for Rule {
    type Error = ConvertError;

    fn try_from(message: v1::HttpRule) -> Converted<Self> {
        Ok(Self {
            name: rule_name(message.name)?,
            matches: all(message.matches)?,
            filters: all(message.filters)?,
            backends: all(message.backends)?,
            reliability: match message.reliability {
                Some(it) => Some(Box::new(it.try_into()?)),
                None => None,
            },
        })
    }
}

impl From<FlowRule> for v1::FlowRule {
    fn from(rule: FlowRule) -> Self {
        Self {
            name: rule.name.map(|it| it.to_string()).unwrap_or_default(),
            hostnames: rule.hostnames.iter().map(ToString::to_string).collect(),
            backends: rule.backends.into_iter().map(Into::into).collect(),
        }
    }
}

impl TryFrom<v1::FlowRule> for FlowRule {
    type Error = ConvertError;

    fn try_from(message: v1::FlowRule) -> Converted<Self> {
        let hostnames = message.hostnames.iter();
        let hostnames = hostnames.map(|it| parsed("flow_rule.hostnames", it));
        Ok(Self {
            name: rule_name(message.name)?,
            hostnames: hostnames.collect::<Converted<Vec<HostMatch>>>()?,
            backends: all(message.backends)?,
        })
    }
}

fn rule_name(text: String) -> Converted<Option<core::Name>> {
    let name = non_empty(text).map(|it| parsed("rule.name", &it));
    name.transpose()
}

impl From<HttpMatch> for v1::HttpMatch {
    fn from(matches: HttpMatch) -> Self {
        use v1::http_match::Path;
        let path = match matches.path {
            PathMatch::Exact(path) => Path::Exact(path),
            // Every path's is written as it is in manifests.
            PathMatch::Prefix(prefix) if prefix.is_any() => Path::Prefix("/".to_owned()),
            PathMatch::Prefix(prefix) => Path::Prefix(prefix.as_str().to_owned()),
            PathMatch::Regex(pattern) => Path::Regex(pattern.as_str().to_owned()),
            PathMatch::Grpc { service, method } => Path::Grpc(v1::GrpcPath {
                service: service.map(Into::into),
                method: method.map(Into::into),
            }),
        };
        let headers = matches.headers.into_iter().map(|it| v1::NamedMatch {
            name: it.name.to_string(),
            value: Some(it.value.into()),
        });
        let query = matches.query.into_iter().map(|it| v1::NamedMatch {
            name: it.name,
            value: Some(it.value.into()),
        });
        Self {
            path: Some(path),
            method: matches.method.map(|it| it.to_string()).unwrap_or_default(),
            headers: headers.collect(),
            query: query.collect(),
        }
    }
}

impl TryFrom<v1::HttpMatch> for HttpMatch {
    type Error = ConvertError;

    fn try_from(message: v1::HttpMatch) -> Converted<Self> {
        use v1::http_match::Path;
        let path = match required("http_match.path", message.path)? {
            Path::Exact(path) => PathMatch::Exact(path),
            Path::Prefix(prefix) => PathMatch::Prefix(PathPrefix::new(&prefix)),
            Path::Regex(text) => PathMatch::Regex(pattern("http_match.path", &text)?),
            Path::Grpc(it) => PathMatch::grpc(
                it.service.map(TextMatch::try_from).transpose()?,
                it.method.map(TextMatch::try_from).transpose()?,
            ),
        };
        let method = non_empty(message.method).map(|it| parsed("http_match.method", &it));
        let headers = message.headers.into_iter().map(|it| {
            Ok(HeaderMatch {
                name: parsed("http_match.headers.name", &it.name)?,
                value: required("http_match.headers.value", it.value)?.try_into()?,
            })
        });
        let query = message.query.into_iter().map(|it| {
            Ok(QueryMatch {
                name: it.name,
                value: required("http_match.query.value", it.value)?.try_into()?,
            })
        });
        Ok(Self {
            path,
            method: method.transpose()?,
            headers: headers.collect::<Converted<_>>()?,
            query: query.collect::<Converted<_>>()?,
        })
    }
}

impl From<TextMatch> for v1::TextMatch {
    fn from(text: TextMatch) -> Self {
        use v1::text_match::Kind;
        let kind = match text {
            TextMatch::Exact(text) => Kind::Exact(text),
            TextMatch::Regex(pattern) => Kind::Regex(pattern.as_str().to_owned()),
        };
        Self { kind: Some(kind) }
    }
}

impl TryFrom<v1::TextMatch> for TextMatch {
    type Error = ConvertError;

    fn try_from(message: v1::TextMatch) -> Converted<Self> {
        use v1::text_match::Kind;
        Ok(match required("text_match.kind", message.kind)? {
            Kind::Exact(text) => Self::Exact(text),
            Kind::Regex(text) => Self::Regex(pattern("text_match.regex", &text)?),
        })
    }
}

fn pattern(field: &str, text: &str) -> Converted<Pattern> {
    Pattern::new(text).map_err(|reason| error(field, reason))
}

impl From<Backend> for v1::Backend {
    fn from(backend: Backend) -> Self {
        Self {
            weight: backend.weight,
            target: Some(backend.target.into()),
            filters: backend.filters.into_iter().map(Into::into).collect(),
        }
    }
}

impl TryFrom<v1::Backend> for Backend {
    type Error = ConvertError;

    fn try_from(message: v1::Backend) -> Converted<Self> {
        Ok(Self {
            weight: message.weight,
            target: required("backend.target", message.target)?.try_into()?,
            filters: all(message.filters)?,
        })
    }
}

impl From<Target> for v1::Target {
    fn from(target: Target) -> Self {
        use v1::target::Kind;
        let kind = match target {
            Target::Service { name, port } => Kind::Service(v1::TargetService {
                name: Some(name.into()),
                port: port.into(),
            }),
            Target::Egress(name) => Kind::Egress(name.into()),
            Target::Invalid(reason) => Kind::Invalid(reason),
        };
        Self { kind: Some(kind) }
    }
}

impl TryFrom<v1::Target> for Target {
    type Error = ConvertError;

    fn try_from(message: v1::Target) -> Converted<Self> {
        use v1::target::Kind;
        Ok(match required("target.kind", message.kind)? {
            Kind::Service(service) => Self::Service {
                name: object_name("target.service.name", service.name)?,
                port: port("target.service.port", service.port)?,
            },
            Kind::Egress(name) => Self::Egress(name.try_into()?),
            Kind::Invalid(reason) => Self::Invalid(reason),
        })
    }
}
