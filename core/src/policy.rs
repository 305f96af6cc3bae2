//! Inbound policy, and the decision over it.
//!
//! The controller evaluates selectors: it tells each agent which [`Server`] governs which port of
//! which workload ([`WorkloadPolicy`]) and what each Server allows. The agent evaluates clients,
//! with [`authorize`]. What is named but not known denies, on every level.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use ipnet::IpNet;
use serde::Serialize;

use crate::cluster::ClusterSettings;
use crate::identity::{Identity, TrustDomain};
use crate::names::{Name, ObjectName};
use crate::workload::WorkloadId;

/// Which policies hold for one workload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct WorkloadPolicy {
    /// The workload.
    pub workload: WorkloadId,
    /// What holds for a port that no Server selects.
    pub default: AccessPolicy,
    /// Which Server governs which port; at most one per port.
    pub servers: Vec<ServerBinding>,
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
    /// Denied.
    Deny {
        /// The Server that governs the port, if one does.
        server: Option<ServerName>,
        /// Why.
        reason: DenyReason,
    },
}

/// Why a client is denied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DenyReason {
    /// No authorization covers the client and this policy does not allow it.
    Policy(AccessPolicy),
    /// The workload's policy has not arrived yet.
    WorkloadPolicyUnknown,
    /// The Server that governs the port has not arrived yet.
    ServerUnknown,
}

/// Decides whether a client may connect to a port of a workload.
///
/// `policy` is the workload's, `server` finds a Server by name. Whatever is missing denies.
pub fn authorize<'a>(
    cluster: &ClusterSettings,
    policy: Option<&WorkloadPolicy>,
    server: impl FnOnce(&ServerName) -> Option<&'a Server>,
    port: u16,
    client: Client<'_>,
) -> Verdict {
    let Some(policy) = policy else {
        return Verdict::Deny {
            server: None,
            reason: DenyReason::WorkloadPolicyUnknown,
        };
    };
    let Some(binding) = policy.servers.iter().find(|binding| binding.port == port) else {
        return by_access_policy(cluster, policy.default, None, client);
    };
    let Some(server) = server(&binding.server) else {
        return Verdict::Deny {
            server: Some(binding.server.clone()),
            reason: DenyReason::ServerUnknown,
        };
    };
    match server.authorizations.iter().find(|it| it.covers(client)) {
        Some(authorization) => Verdict::Allow {
            server: Some(server.name.clone()),
            authorization: Some(authorization.name.clone()),
            policy: None,
        },
        None => by_access_policy(cluster, server.access_policy, Some(&server.name), client),
    }
}

fn by_access_policy(
    cluster: &ClusterSettings,
    policy: AccessPolicy,
    server: Option<&ServerName>,
    client: Client<'_>,
) -> Verdict {
    let in_cluster = cluster.is_pod_range(client.address);
    let allowed = match policy {
        AccessPolicy::AllUnauthenticated | AccessPolicy::Audit => true,
        AccessPolicy::AllAuthenticated => client.identity.is_some(),
        AccessPolicy::ClusterUnauthenticated => in_cluster,
        AccessPolicy::ClusterAuthenticated => in_cluster && client.identity.is_some(),
        AccessPolicy::Deny => false,
    };
    let server = server.cloned();
    if allowed {
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
    /// Whether the client may connect.
    pub fn is_allowed(&self) -> bool {
        matches!(self, Self::Allow { .. })
    }

    /// The Server that governs the port.
    pub fn server(&self) -> Option<&ServerName> {
        match self {
            Self::Allow { server, .. } | Self::Deny { server, .. } => server.as_ref(),
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
            Self::Deny { reason, .. } => reason.to_string(),
        }
    }
}

impl fmt::Display for DenyReason {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Policy(policy) => write!(formatter, "default:{policy}"),
            Self::WorkloadPolicyUnknown => formatter.write_str("workload policy not known yet"),
            Self::ServerUnknown => formatter.write_str("server not known yet"),
        }
    }
}

impl AccessPolicy {
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
mod tests {
    use super::*;

    fn identity(namespace: &str, account: &str) -> Identity {
        format!("spiffe://cluster.local/ns/{namespace}/sa/{account}")
            .parse()
            .expect("valid")
    }

    fn server_name() -> ServerName {
        ServerName {
            group: PolicyGroup::Linkerd,
            name: "production/payment-api".parse().expect("valid"),
        }
    }

    fn cluster() -> ClusterSettings {
        ClusterSettings {
            trust_domain: "cluster.local".parse().expect("valid"),
            pod_ranges: vec!["10.0.0.0/8".parse().expect("valid")],
            service_ranges: vec![],
            force_tunnels: false,
        }
    }

    fn policy(default: AccessPolicy) -> WorkloadPolicy {
        WorkloadPolicy {
            workload: "production/payment-0".parse().expect("valid"),
            default,
            servers: vec![ServerBinding {
                port: 8080,
                server: server_name(),
            }],
        }
    }

    fn server(access_policy: AccessPolicy, required: Vec<Vec<Authentication>>) -> Server {
        let authorization = |required| Authorization {
            name: AuthorizationName {
                group: PolicyGroup::Linkerd,
                name: "production/payment-access".parse().expect("valid"),
            },
            required,
        };
        Server {
            name: server_name(),
            access_policy,
            proxy_protocol: ProxyProtocol::Unknown,
            authorizations: required.into_iter().map(authorization).collect(),
        }
    }

    /// (access policy, client address, has identity) -> allowed
    #[test]
    fn access_policies() {
        use AccessPolicy::*;
        let inside: IpAddr = "10.1.2.3".parse().expect("valid");
        let outside: IpAddr = "192.0.2.1".parse().expect("valid");
        let who = identity("production", "order-service");
        for (access, [in_with, in_without, out_with, out_without]) in [
            (AllUnauthenticated, [true, true, true, true]),
            (AllAuthenticated, [true, false, true, false]),
            (ClusterUnauthenticated, [true, true, false, false]),
            (ClusterAuthenticated, [true, false, false, false]),
            (Deny, [false, false, false, false]),
            (Audit, [true, true, true, true]),
        ] {
            for (address, identity, expected) in [
                (inside, Some(&who), in_with),
                (inside, None, in_without),
                (outside, Some(&who), out_with),
                (outside, None, out_without),
            ] {
                let client = Client { address, identity };
                let as_default =
                    authorize(&cluster(), Some(&policy(access)), |_| None, 9090, client);
                assert_eq!(as_default.is_allowed(), expected, "{access} {client:?}");
                assert_eq!(as_default.is_audited(), access == Audit);
                let governed = server(access, vec![]);
                let of_server = authorize(
                    &cluster(),
                    Some(&policy(Deny)),
                    |_| Some(&governed),
                    8080,
                    client,
                );
                assert_eq!(of_server.is_allowed(), expected, "server {access}");
            }
        }
    }

    #[test]
    fn what_is_unknown_denies() {
        let who = identity("production", "order-service");
        let client = Client {
            address: "10.1.2.3".parse().expect("valid"),
            identity: Some(&who),
        };
        let open = policy(AccessPolicy::AllUnauthenticated);
        assert_eq!(
            authorize(&cluster(), None, |_| None, 8080, client),
            Verdict::Deny {
                server: None,
                reason: DenyReason::WorkloadPolicyUnknown
            }
        );
        assert_eq!(
            authorize(&cluster(), Some(&open), |_| None, 8080, client),
            Verdict::Deny {
                server: Some(server_name()),
                reason: DenyReason::ServerUnknown
            }
        );
        let names_unknown = server(
            AccessPolicy::Deny,
            vec![vec![Authentication::Unknown("x".to_owned())]],
        );
        let verdict = authorize(
            &cluster(),
            Some(&open),
            |_| Some(&names_unknown),
            8080,
            client,
        );
        assert!(!verdict.is_allowed());
    }

    #[test]
    fn authorizations_need_every_authentication() {
        let order = identity("production", "order-service");
        let other = identity("production", "other");
        let tls = Authentication::MeshTls(vec![IdentityMatch::Exact(order.clone())]);
        let net = Authentication::Networks(vec![NetworkMatch {
            cidr: "10.0.0.0/8".parse().expect("valid"),
            except: vec!["10.9.0.0/16".parse().expect("valid")],
        }]);
        let namespace = Authentication::MeshTls(vec![IdentityMatch::Namespace {
            trust_domain: "cluster.local".parse().expect("valid"),
            namespace: "production".parse().expect("valid"),
        }]);
        let any = Authentication::MeshTls(vec![IdentityMatch::Any]);
        let (tls, net) = (&tls, &net);
        for (required, address, who, expected) in [
            (vec![tls, net], "10.1.2.3", Some(&order), true),
            (vec![tls, net], "10.9.2.3", Some(&order), false),
            (vec![tls, net], "192.0.2.1", Some(&order), false),
            (vec![tls], "192.0.2.1", Some(&order), true),
            (vec![tls], "10.1.2.3", Some(&other), false),
            (vec![tls], "10.1.2.3", None, false),
            (vec![net], "10.1.2.3", None, true),
            (vec![&namespace], "10.1.2.3", Some(&other), true),
            (vec![&any], "10.1.2.3", Some(&other), true),
            (vec![&any], "10.1.2.3", None, false),
            (vec![], "192.0.2.1", None, true),
        ] {
            let server = server(
                AccessPolicy::Deny,
                vec![required.into_iter().cloned().collect()],
            );
            let client = Client {
                address: address.parse().expect("valid"),
                identity: who,
            };
            let verdict = authorize(
                &cluster(),
                Some(&policy(AccessPolicy::Deny)),
                |_| Some(&server),
                8080,
                client,
            );
            assert_eq!(verdict.is_allowed(), expected, "{address} {who:?}");
        }
    }
}
