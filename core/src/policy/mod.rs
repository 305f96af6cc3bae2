//! Inbound policy, and the decision over it.
//!
//! The controller evaluates selectors: it tells each agent which [`Server`] governs which port of
//! which workload ([`WorkloadPolicy`]) and what each Server allows. The agent evaluates clients,
//! with [`authorize`]. What is named but not known denies, on every level.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;
use std::sync::Arc;

use ipnet::IpNet;
use serde::Serialize;

use crate::cluster::ClusterSettings;
use crate::identity::{Identity, TrustDomain};
use crate::names::{Name, ObjectName};
use crate::route::InboundRoutes;
use crate::workload::{Workload, WorkloadId};

mod limit;
mod network;
mod requests;

pub use limit::{LimitScope, Limited, Limiter, RateLimit, RateOverride};
pub use network::{NetworkPeers, NetworkPods, NetworkRule, NetworkRules, let_out};
pub use requests::{Passed, RequestDenial, authorize_request};

/// Which policies hold for one workload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkloadPolicy {
    /// The workload.
    pub workload: WorkloadId,
    /// What holds for a port that no Server selects.
    pub default: AccessPolicy,
    /// Which Server governs which port; at most one per port.
    pub servers: Vec<ServerBinding>,
    /// What NetworkPolicies let in; none: no one selects the workload. Shared, as pods that the same policies
    /// select have the same.
    pub network: Option<Arc<NetworkRules>>,
    /// What NetworkPolicies let the workload connect to; none: no one of the type `Egress` selects it. Shared as well.
    pub network_egress: Option<Arc<NetworkRules>>,
}

/// A port of a workload and the Server that governs it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ServerBinding {
    /// The application's port.
    pub port: u16,
    /// The Server's name.
    pub server: ServerName,
}

/// Names a Server; the same name may exist in both groups.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct ServerName {
    /// The API group it was written in.
    pub group: PolicyGroup,
    /// Namespace and name.
    pub name: ObjectName,
}

/// The API group that a policy object was written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub enum PolicyGroup {
    /// `policy.weft.dev`
    #[serde(rename = "policy.weft.dev")]
    Weft,
    /// `policy.linkerd.io`
    #[serde(rename = "policy.linkerd.io")]
    Linkerd,
}

/// A Server: a port of some workloads, and who may connect to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Server {
    /// Its name.
    pub name: ServerName,
    /// What holds for clients that no authorization covers (`spec.accessPolicy`; `deny` unless
    /// written).
    pub access_policy: AccessPolicy,
    /// `spec.proxyProtocol`.
    pub proxy_protocol: ProxyProtocol,
    /// Each allows the clients that it covers.
    pub authorizations: Vec<Authorization>,
    /// Routes of the requests that arrive at the port. None: there are none, and all requests are allowed
    /// that the client's connection is.
    pub routes: Option<InboundRoutes>,
    /// How many requests it takes; none: as many as come.
    pub rate_limit: Option<RateLimit>,
}

/// What may connect where nothing more specific is said (`config.linkerd.io/default-inbound-policy`,
/// `Server.spec.accessPolicy`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum AccessPolicy {
    /// Anybody.
    #[default]
    AllUnauthenticated,
    /// Anybody with an identity.
    AllAuthenticated,
    /// Anybody from the cluster's networks.
    ClusterUnauthenticated,
    /// Anybody with an identity, from the cluster's networks.
    ClusterAuthenticated,
    /// Nobody.
    Deny,
    /// Anybody, and each that no authorization covers is reported.
    Audit,
}

/// What a Server says its port speaks (`spec.proxyProtocol`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ProxyProtocol {
    /// `unknown`: detected.
    #[default]
    Unknown,
    /// `opaque`
    Opaque,
    /// `TLS`
    Tls,
    /// `HTTP/1`
    Http1,
    /// `HTTP/2`
    Http2,
    /// `gRPC`
    Grpc,
}

/// An AuthorizationPolicy, as it applies to one Server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Authorization {
    /// Its name, for metrics and logs.
    pub name: AuthorizationName,
    /// The client must satisfy every one. None at all: everybody is covered, as in Linkerd.
    pub required: Vec<Authentication>,
}

/// Names what decided.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct AuthorizationName {
    /// The API group.
    pub group: PolicyGroup,
    /// Namespace and name of the AuthorizationPolicy.
    pub name: ObjectName,
}

/// What a client must be, or where it must come from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Authentication {
    /// It has one of these identities (MeshTLSAuthentication, ServiceAccount, Namespace).
    MeshTls(Vec<IdentityMatch>),
    /// It comes from one of these networks (NetworkAuthentication).
    Networks(Vec<NetworkMatch>),
    /// The policy names something that is not known: nobody satisfies it.
    Unknown(String),
}

/// A set of identities.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum IdentityMatch {
    /// `*`: whoever has a valid identity.
    Any,
    /// Exactly this one.
    Exact(Identity),
    /// Every service account of a namespace.
    Namespace {
        /// The trust domain.
        trust_domain: TrustDomain,
        /// The namespace.
        namespace: Name,
    },
}

/// A range of addresses without some parts of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NetworkMatch {
    /// The range.
    pub cidr: IpNet,
    /// Parts that do not belong to it.
    pub except: Vec<IpNet>,
}

/// A client, as far as the mesh could prove it.
#[derive(Clone, Copy, Debug)]
pub struct Client<'a> {
    /// The address it connects from.
    pub address: IpAddr,
    /// The identity that its certificate, or the kernel on the same node, attests.
    pub identity: Option<&'a Identity>,
}

/// The decision about one client at one port.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// Allowed.
    Allow {
        /// The Server that governs the port, if one does.
        server: Option<ServerName>,
        /// The authorization that covers the client; none: the default or the access policy.
        authorization: Option<AuthorizationName>,
        /// The default or access policy that was looked at when no authorization covered.
        policy: Option<AccessPolicy>,
    },
    /// The Server lets the client in for requests of some of its routes, and for nothing else: each
    /// request is to be decided by [`authorize_request`], and what is no request is denied.
    RequestsOnly {
        /// The Server.
        server: ServerName,
        /// Its access policy, which does not allow the client.
        policy: AccessPolicy,
    },
    /// Denied.
    Deny {
        /// The Server that governs the port, if one does.
        server: Option<ServerName>,
        /// Why.
        reason: DenyReason,
    },
}

/// Why a client is denied.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum DenyReason {
    /// No authorization covers the client and this policy does not allow it.
    Policy(AccessPolicy),
    /// No rule of the NetworkPolicies that select the workload, of which this is one, lets the client in, or the
    /// workload out.
    NetworkPolicy(ObjectName),
    /// The workload's policy has not arrived yet.
    WorkloadPolicyUnknown,
    /// The Server that governs the port has not arrived yet.
    ServerUnknown,
}

/// Decides whether a client may connect to a port of a workload.
///
/// `policy` is the workload's, `server` finds a Server by name, `workload_at` the workload that has an address.
/// Whatever is missing denies. Where the Server has routes, this is not the last word about requests: see
/// [`authorize_request`].
pub fn authorize<'a>(
    cluster: &ClusterSettings,
    policy: Option<&WorkloadPolicy>,
    server: impl FnOnce(&ServerName) -> Option<&'a Server>,
    workload_at: impl FnOnce(IpAddr) -> Option<Arc<Workload>>,
    port: u16,
    client: Client<'_>,
) -> Verdict {
    let Some(policy) = policy else {
        return Verdict::Deny {
            server: None,
            reason: DenyReason::WorkloadPolicyUnknown,
        };
    };
    let binding = policy.servers.iter().find(|binding| binding.port == port);
    let network = policy.network.as_ref();
    if let Some(network) = network.filter(|it| !it.allow(port, client, workload_at)) {
        return Verdict::Deny {
            server: binding.map(|it| it.server.clone()),
            reason: network.denial(),
        };
    }
    let Some(binding) = binding else {
        return by_access_policy(cluster, policy.default, None, client);
    };
    let Some(server) = server(&binding.server) else {
        return Verdict::Deny {
            server: Some(binding.server.clone()),
            reason: DenyReason::ServerUnknown,
        };
    };
    if let Some(authorization) = server.authorizations.iter().find(|it| it.covers(client)) {
        return Verdict::Allow {
            server: Some(server.name.clone()),
            authorization: Some(authorization.name.clone()),
            policy: None,
        };
    }
    let verdict = by_access_policy(cluster, server.access_policy, Some(&server.name), client);
    let mut of_routes = server.routes.iter().flat_map(InboundRoutes::authorizations);
    if !verdict.is_allowed() && of_routes.any(|it| it.covers(client)) {
        return Verdict::RequestsOnly {
            server: server.name.clone(),
            policy: server.access_policy,
        };
    }
    verdict
}

fn by_access_policy(
    cluster: &ClusterSettings,
    policy: AccessPolicy,
    server: Option<&ServerName>,
    client: Client<'_>,
) -> Verdict {
    let server = server.cloned();
    if policy.allows(cluster, client) {
        Verdict::Allow {
            server,
            authorization: None,
            policy: Some(policy),
        }
    } else {
        Verdict::Deny {
            server,
            reason: DenyReason::Policy(policy),
        }
    }
}

impl Authorization {
    /// Whether the client satisfies everything required.
    pub fn covers(&self, client: Client<'_>) -> bool {
        self.required.iter().all(|it| it.holds(client))
    }
}

impl Authentication {
    /// Whether the client satisfies it.
    pub fn holds(&self, client: Client<'_>) -> bool {
        match self {
            Self::MeshTls(matches) => client
                .identity
                .is_some_and(|identity| matches.iter().any(|it| it.contains(identity))),
            Self::Networks(networks) => networks.iter().any(|it| it.contains(client.address)),
            Self::Unknown(_) => false,
        }
    }
}

impl IdentityMatch {
    /// Whether the identity belongs to the set.
    pub fn contains(&self, identity: &Identity) -> bool {
        match self {
            Self::Any => true,
            Self::Exact(exact) => exact == identity,
            Self::Namespace {
                trust_domain,
                namespace,
            } => *trust_domain == identity.trust_domain && *namespace == identity.namespace,
        }
    }
}

impl NetworkMatch {
    /// Whether the address belongs to the range and to none of the exceptions.
    pub fn contains(&self, address: IpAddr) -> bool {
        self.cidr.contains(&address) && !self.except.iter().any(|net| net.contains(&address))
    }
}

impl Verdict {
    /// Whether the client may connect, and say what it likes.
    pub fn is_allowed(&self) -> bool {
        matches!(self, Self::Allow { .. })
    }

    /// Whether the client may connect if it makes requests.
    pub fn admits_requests(&self) -> bool {
        matches!(self, Self::Allow { .. } | Self::RequestsOnly { .. })
    }

    /// Whether it admits requests and nothing else.
    pub fn requests_only(&self) -> bool {
        matches!(self, Self::RequestsOnly { .. })
    }

    /// The same for what is no request: it is not for routes to allow that.
    pub fn without_requests(self) -> Self {
        match self {
            Self::RequestsOnly { server, policy } => Self::Deny {
                server: Some(server),
                reason: DenyReason::Policy(policy),
            },
            other => other,
        }
    }

    /// The Server that governs the port.
    pub fn server(&self) -> Option<&ServerName> {
        match self {
            Self::Allow { server, .. } | Self::Deny { server, .. } => server.as_ref(),
            Self::RequestsOnly { server, .. } => Some(server),
        }
    }

    /// Whether it was allowed only because of `audit`, and should be reported.
    pub fn is_audited(&self) -> bool {
        matches!(
            self,
            Self::Allow {
                authorization: None,
                policy: Some(AccessPolicy::Audit),
                ..
            }
        )
    }

    /// Whether NetworkPolicies do not let the client in.
    pub fn is_by_network_policy(&self) -> bool {
        let Self::Deny { reason, .. } = self else {
            return false;
        };
        matches!(reason, DenyReason::NetworkPolicy(_))
    }

    /// What decided, for people: an authorization's name, `default:<policy>`, or why it is denied.
    pub fn by(&self) -> String {
        match self {
            Self::Allow {
                authorization: Some(name),
                ..
            } => name.name.to_string(),
            Self::Allow {
                policy: Some(policy),
                ..
            } => format!("default:{policy}"),
            Self::Allow { .. } => "default".to_owned(),
            Self::RequestsOnly { .. } => "routes".to_owned(),
            Self::Deny { reason, .. } => reason.to_string(),
        }
    }
}

impl fmt::Display for DenyReason {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Policy(policy) => write!(formatter, "default:{policy}"),
            Self::NetworkPolicy(name) => write!(formatter, "networkpolicy:{name}"),
            Self::WorkloadPolicyUnknown => formatter.write_str("workload policy not known yet"),
            Self::ServerUnknown => formatter.write_str("server not known yet"),
        }
    }
}

impl AccessPolicy {
    /// Whether it allows the client.
    fn allows(self, cluster: &ClusterSettings, client: Client<'_>) -> bool {
        let in_cluster = cluster.is_pod_range(client.address);
        match self {
            Self::AllUnauthenticated | Self::Audit => true,
            Self::AllAuthenticated => client.identity.is_some(),
            Self::ClusterUnauthenticated => in_cluster,
            Self::ClusterAuthenticated => in_cluster && client.identity.is_some(),
            Self::Deny => false,
        }
    }

    /// As written in manifests and annotations.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::AllUnauthenticated => "all-unauthenticated",
            Self::AllAuthenticated => "all-authenticated",
            Self::ClusterUnauthenticated => "cluster-unauthenticated",
            Self::ClusterAuthenticated => "cluster-authenticated",
            Self::Deny => "deny",
            Self::Audit => "audit",
        }
    }

    const ALL: [Self; 6] = [
        Self::AllUnauthenticated,
        Self::AllAuthenticated,
        Self::ClusterUnauthenticated,
        Self::ClusterAuthenticated,
        Self::Deny,
        Self::Audit,
    ];
}

impl fmt::Display for AccessPolicy {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.as_str())
    }
}

/// A text that is no [`AccessPolicy`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not an access policy: all-unauthenticated, all-authenticated, \
     cluster-unauthenticated, cluster-authenticated, deny or audit"
)]
pub struct UnknownAccessPolicy(String);

impl FromStr for AccessPolicy {
    type Err = UnknownAccessPolicy;

    fn from_str(text: &str) -> Result<Self, UnknownAccessPolicy> {
        Self::ALL
            .into_iter()
            .find(|policy| policy.as_str() == text)
            .ok_or_else(|| UnknownAccessPolicy(text.chars().take(64).collect()))
    }
}

impl PolicyGroup {
    /// The API group's name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Weft => "policy.weft.dev",
            Self::Linkerd => "policy.linkerd.io",
        }
    }
}

/// `group/namespace/name`.
impl fmt::Display for ServerName {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}/{}", self.group.as_str(), self.name)
    }
}

/// `group/namespace/name`.
impl fmt::Display for AuthorizationName {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}/{}", self.group.as_str(), self.name)
    }
}

#[cfg(test)]
mod tests;
