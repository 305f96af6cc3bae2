//! Policies.

use std::num::NonZeroU32;
use std::sync::Arc;

use core::route::{InboundRoute, InboundRoutes, Route};
use weft_core as core;

use super::route::few_patterns;
use super::{ConvertError, Converted, all, error, object_name, parsed, port, ranges, required};
use crate::v1;

impl From<core::WorkloadPolicy> for v1::WorkloadPolicy {
    fn from(policy: core::WorkloadPolicy) -> Self {
        let binding = |it: core::ServerBinding| v1::ServerBinding {
            port: it.port.into(),
            server: Some(it.server.into()),
        };
        Self {
            workload: Some(policy.workload.0.into()),
            default: v1::AccessPolicy::from(policy.default).into(),
            servers: policy.servers.into_iter().map(binding).collect(),
            network: policy.network.as_deref().cloned().map(Into::into),
            network_egress: policy.network_egress.as_deref().cloned().map(Into::into),
        }
    }
}

impl TryFrom<v1::WorkloadPolicy> for core::WorkloadPolicy {
    type Error = ConvertError;

    fn try_from(message: v1::WorkloadPolicy) -> Converted<Self> {
        Ok(Self {
            default: access_policy("workload_policy.default", message.default())?,
            workload: core::WorkloadId(object_name("workload_policy.workload", message.workload)?),
            servers: all(message.servers)?,
            network: network_rules(message.network)?,
            network_egress: network_rules(message.network_egress)?,
        })
    }
}

fn network_rules(message: Option<v1::NetworkRules>) -> Converted<Option<Arc<core::NetworkRules>>> {
    let rules = message.map(core::NetworkRules::try_from).transpose()?;
    Ok(rules.map(Arc::new))
}

impl TryFrom<v1::ServerBinding> for core::ServerBinding {
    type Error = ConvertError;

    fn try_from(message: v1::ServerBinding) -> Converted<Self> {
        Ok(Self {
            port: port("workload_policy.servers.port", message.port)?,
            server: required("workload_policy.servers.server", message.server)?.try_into()?,
        })
    }
}

impl From<core::PolicyGroup> for v1::PolicyGroup {
    fn from(group: core::PolicyGroup) -> Self {
        match group {
            core::PolicyGroup::Weft => Self::Weft,
            core::PolicyGroup::Linkerd => Self::Linkerd,
        }
    }
}

pub(super) fn group(field: &str, message: v1::PolicyGroup) -> Converted<core::PolicyGroup> {
    match message {
        v1::PolicyGroup::Weft => Ok(core::PolicyGroup::Weft),
        v1::PolicyGroup::Linkerd => Ok(core::PolicyGroup::Linkerd),
        v1::PolicyGroup::Unspecified => Err(error(field, "unknown policy group")),
    }
}

impl From<core::ServerName> for v1::ServerName {
    fn from(name: core::ServerName) -> Self {
        Self {
            group: v1::PolicyGroup::from(name.group).into(),
            name: Some(name.name.into()),
        }
    }
}

impl TryFrom<v1::ServerName> for core::ServerName {
    type Error = ConvertError;

    fn try_from(message: v1::ServerName) -> Converted<Self> {
        Ok(Self {
            group: group("server.group", message.group())?,
            name: object_name("server.name", message.name)?,
        })
    }
}

impl From<core::Server> for v1::Server {
    fn from(server: core::Server) -> Self {
        let protocol = match server.proxy_protocol {
            core::ProxyProtocol::Unknown => v1::ProxyProtocol::Unknown,
            core::ProxyProtocol::Opaque => v1::ProxyProtocol::Opaque,
            core::ProxyProtocol::Tls => v1::ProxyProtocol::Tls,
            core::ProxyProtocol::Http1 => v1::ProxyProtocol::Http1,
            core::ProxyProtocol::Http2 => v1::ProxyProtocol::Http2,
            core::ProxyProtocol::Grpc => v1::ProxyProtocol::Grpc,
        };
        let access_policy = v1::AccessPolicy::from(server.access_policy).into();
        let authorizations = server.authorizations.into_iter().map(Into::into).collect();
        let (access_policy, authorizations, routed) = match server.routes {
            None => (access_policy, authorizations, None),
            // Who does not know of routes lets nobody in.
            Some(routes) => (
                v1::AccessPolicy::Deny.into(),
                vec![],
                Some(v1::RoutedAccess {
                    access_policy,
                    authorizations,
                    routes: routes.routes().map(Into::into).collect(),
                }),
            ),
        };
        Self {
            name: Some(server.name.into()),
            access_policy,
            proxy_protocol: protocol.into(),
            authorizations,
            routed,
            rate_limit: server.rate_limit.map(Into::into),
        }
    }
}

impl TryFrom<v1::Server> for core::Server {
    type Error = ConvertError;

    fn try_from(message: v1::Server) -> Converted<Self> {
        let proxy_protocol = match v1::ProxyProtocol::try_from(message.proxy_protocol) {
            Ok(v1::ProxyProtocol::Unknown) => core::ProxyProtocol::Unknown,
            Ok(v1::ProxyProtocol::Opaque) => core::ProxyProtocol::Opaque,
            Ok(v1::ProxyProtocol::Tls) => core::ProxyProtocol::Tls,
            Ok(v1::ProxyProtocol::Http1) => core::ProxyProtocol::Http1,
            Ok(v1::ProxyProtocol::Http2) => core::ProxyProtocol::Http2,
            Ok(v1::ProxyProtocol::Grpc) => core::ProxyProtocol::Grpc,
            Err(reason) => return Err(error("server.proxy_protocol", reason)),
        };
        let access = access_policy("server.access_policy", message.access_policy())?;
        let (access_policy, authorizations, routes) = match message.routed {
            None => (access, message.authorizations, None),
            Some(routed) => {
                if access != core::AccessPolicy::Deny || !message.authorizations.is_empty() {
                    let reason = "agents that do not know of routes would let clients in";
                    return Err(error("server.routed", reason));
                }
                let field = "server.routed.access_policy";
                (
                    access_policy(field, routed.access_policy())?,
                    routed.authorizations,
                    Some(inbound_routes(routed.routes)?),
                )
            }
        };
        Ok(Self {
            access_policy,
            name: required("server.name", message.name)?.try_into()?,
            proxy_protocol,
            authorizations: all(authorizations)?,
            routes,
            rate_limit: message.rate_limit.map(TryInto::try_into).transpose()?,
        })
    }
}

impl From<core::RateLimit> for v1::RateLimit {
    fn from(limit: core::RateLimit) -> Self {
        let rate = |it: Option<NonZeroU32>| it.map_or(0, NonZeroU32::get);
        let overrides = limit.overrides.into_iter().map(|it| v1::RateOverride {
            per_second: it.requests_per_second.get(),
            identities: it.clients.iter().map(ToString::to_string).collect(),
        });
        Self {
            group: v1::PolicyGroup::from(limit.name.group).into(),
            name: Some(limit.name.name.into()),
            total_per_second: rate(limit.total),
            identity_per_second: rate(limit.identity),
            overrides: overrides.collect(),
        }
    }
}

impl TryFrom<v1::RateLimit> for core::RateLimit {
    type Error = ConvertError;

    fn try_from(message: v1::RateLimit) -> Converted<Self> {
        let overrides = message.overrides.iter().map(|it| {
            let rate = NonZeroU32::new(it.per_second);
            let identities = it.identities.iter();
            let identities = identities.map(|it| parsed("rate_limit.overrides.identities", it));
            Ok(core::RateOverride {
                requests_per_second: required("rate_limit.overrides.per_second", rate)?,
                clients: identities.collect::<Converted<_>>()?,
            })
        });
        Ok(Self {
            overrides: overrides.collect::<Converted<_>>()?,
            name: core::AuthorizationName {
                group: group("rate_limit.group", message.group())?,
                name: object_name("rate_limit.name", message.name)?,
            },
            total: NonZeroU32::new(message.total_per_second),
            identity: NonZeroU32::new(message.identity_per_second),
        })
    }
}

impl From<InboundRoute> for v1::InboundRoute {
    fn from(it: InboundRoute) -> Self {
        Self {
            route: Some(it.route.into()),
            hostnames: it.hostnames.iter().map(ToString::to_string).collect(),
            authorizations: it.authorizations.into_iter().map(Into::into).collect(),
        }
    }
}

fn inbound_routes(messages: Vec<v1::InboundRoute>) -> Converted<InboundRoutes> {
    few_patterns(
        "server.routed.routes",
        messages.iter().filter_map(|it| it.route.as_ref()),
    )?;
    Ok(InboundRoutes::new(all(messages)?))
}

impl TryFrom<v1::InboundRoute> for InboundRoute {
    type Error = ConvertError;

    fn try_from(message: v1::InboundRoute) -> Converted<Self> {
        let route: Route = required("inbound_route.route", message.route)?.try_into()?;
        if !route.name.kind.route_type().is_of_requests() {
            let reason = format!("a {} has no requests", route.name.kind.as_str());
            return Err(error("inbound_route.route", reason));
        }
        let hostnames = message.hostnames.iter();
        let hostnames = hostnames.map(|it| parsed("inbound_route.hostnames", it));
        Ok(Self {
            route,
            hostnames: hostnames.collect::<Converted<_>>()?,
            authorizations: all(message.authorizations)?,
        })
    }
}

impl From<core::AccessPolicy> for v1::AccessPolicy {
    fn from(policy: core::AccessPolicy) -> Self {
        match policy {
            core::AccessPolicy::AllUnauthenticated => Self::AllUnauthenticated,
            core::AccessPolicy::AllAuthenticated => Self::AllAuthenticated,
            core::AccessPolicy::ClusterUnauthenticated => Self::ClusterUnauthenticated,
            core::AccessPolicy::ClusterAuthenticated => Self::ClusterAuthenticated,
            core::AccessPolicy::Deny => Self::Deny,
            core::AccessPolicy::Audit => Self::Audit,
        }
    }
}

fn access_policy(field: &str, message: v1::AccessPolicy) -> Converted<core::AccessPolicy> {
    match message {
        v1::AccessPolicy::AllUnauthenticated => Ok(core::AccessPolicy::AllUnauthenticated),
        v1::AccessPolicy::AllAuthenticated => Ok(core::AccessPolicy::AllAuthenticated),
        v1::AccessPolicy::ClusterUnauthenticated => Ok(core::AccessPolicy::ClusterUnauthenticated),
        v1::AccessPolicy::ClusterAuthenticated => Ok(core::AccessPolicy::ClusterAuthenticated),
        v1::AccessPolicy::Deny => Ok(core::AccessPolicy::Deny),
        v1::AccessPolicy::Audit => Ok(core::AccessPolicy::Audit),
        v1::AccessPolicy::Unspecified => Err(error(field, "unknown access policy")),
    }
}

impl From<core::Authorization> for v1::Authorization {
    fn from(authorization: core::Authorization) -> Self {
        Self {
            group: v1::PolicyGroup::from(authorization.name.group).into(),
            name: Some(authorization.name.name.into()),
            required: authorization.required.into_iter().map(Into::into).collect(),
        }
    }
}

impl TryFrom<v1::Authorization> for core::Authorization {
    type Error = ConvertError;

    fn try_from(message: v1::Authorization) -> Converted<Self> {
        Ok(Self {
            name: core::AuthorizationName {
                group: group("authorization.group", message.group())?,
                name: object_name("authorization.name", message.name)?,
            },
            required: all(message.required)?,
        })
    }
}

impl From<core::Authentication> for v1::Authentication {
    fn from(authentication: core::Authentication) -> Self {
        use v1::authentication::Kind;
        let kind = match authentication {
            core::Authentication::MeshTls(matches) => Kind::MeshTls(v1::MeshTls {
                identities: matches.into_iter().map(Into::into).collect(),
            }),
            core::Authentication::Networks(networks) => Kind::Networks(v1::Networks {
                networks: networks.into_iter().map(Into::into).collect(),
            }),
            core::Authentication::Unknown(what) => Kind::Unknown(what),
        };
        Self { kind: Some(kind) }
    }
}

impl TryFrom<v1::Authentication> for core::Authentication {
    type Error = ConvertError;

    /// A kind from the future is an error, not a pass.
    fn try_from(message: v1::Authentication) -> Converted<Self> {
        use v1::authentication::Kind;
        Ok(match required("authentication.kind", message.kind)? {
            Kind::MeshTls(tls) => Self::MeshTls(all(tls.identities)?),
            Kind::Networks(it) => Self::Networks(all(it.networks)?),
            Kind::Unknown(what) => Self::Unknown(what),
        })
    }
}

impl From<core::IdentityMatch> for v1::IdentityMatch {
    fn from(matches: core::IdentityMatch) -> Self {
        use v1::identity_match::Kind;
        let kind = match matches {
            core::IdentityMatch::Any => Kind::Any(true),
            core::IdentityMatch::Exact(identity) => Kind::Exact(identity.to_string()),
            core::IdentityMatch::Namespace {
                trust_domain,
                namespace,
            } => Kind::Namespace(v1::NamespaceIdentities {
                trust_domain: trust_domain.to_string(),
                namespace: namespace.to_string(),
            }),
        };
        Self { kind: Some(kind) }
    }
}

impl TryFrom<v1::IdentityMatch> for core::IdentityMatch {
    type Error = ConvertError;

    fn try_from(message: v1::IdentityMatch) -> Converted<Self> {
        use v1::identity_match::Kind;
        Ok(match required("identity_match.kind", message.kind)? {
            Kind::Any(true) => Self::Any,
            Kind::Any(false) => return Err(error("identity_match.any", "must be true")),
            Kind::Exact(text) => Self::Exact(parsed("identity_match.exact", &text)?),
            Kind::Namespace(it) => Self::Namespace {
                trust_domain: parsed("identity_match.trust_domain", &it.trust_domain)?,
                namespace: parsed("identity_match.namespace", &it.namespace)?,
            },
        })
    }
}

impl From<core::NetworkMatch> for v1::Network {
    fn from(network: core::NetworkMatch) -> Self {
        Self {
            cidr: network.cidr.to_string(),
            except: network.except.iter().map(ToString::to_string).collect(),
        }
    }
}

impl TryFrom<v1::Network> for core::NetworkMatch {
    type Error = ConvertError;

    fn try_from(message: v1::Network) -> Converted<Self> {
        Ok(Self {
            cidr: parsed("network.cidr", &message.cidr)?,
            except: ranges("network.except", &message.except)?,
        })
    }
}
