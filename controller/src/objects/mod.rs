//! The objects that describe a cluster, as typed Kubernetes objects, whatever source they come
//! from.

use std::fmt;

use k8s_openapi::api::core::v1::{Namespace, Node, Pod, Service, ServiceAccount};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::{NetworkPolicy, ServiceCIDRSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::{Serialize, Serializer};
use weft_core::route::RouteKind;
use weft_core::{Name, PolicyGroup};

use cni::{CniKind, CniPolicy};
use policy::{
    AuthorizationPolicy, EgressNetwork, HttpLocalRateLimitPolicy, MeshTlsAuthentication,
    NetworkAuthentication, Server,
};
use profiles::ServiceProfile;
use routes::{ReferenceGrant, Route};

pub mod cni;
pub mod crds;
mod crds_of_linkerd;
pub mod decode;
pub mod policy;
pub mod profiles;
pub mod routes;

/// An object of a kind that the controller understands.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub enum Object {
    Namespace(Namespace),
    Node(Box<Node>),
    ServiceCidr(ServiceCidr),
    Pod(Box<Pod>),
    Service(Box<Service>),
    EndpointSlice(EndpointSlice),
    ServiceAccount(ServiceAccount),
    NetworkPolicy(Box<NetworkPolicy>),
    Server(PolicyGroup, Server),
    AuthorizationPolicy(PolicyGroup, AuthorizationPolicy),
    MeshTlsAuthentication(PolicyGroup, MeshTlsAuthentication),
    NetworkAuthentication(PolicyGroup, NetworkAuthentication),
    HttpLocalRateLimitPolicy(PolicyGroup, HttpLocalRateLimitPolicy),
    EgressNetwork(PolicyGroup, EgressNetwork),
    Route(RouteKind, Box<Route>),
    ReferenceGrant(ReferenceGrant),
    ServiceProfile(Box<ServiceProfile>),
    Cni(CniKind, Box<CniPolicy>),
}

/// Makes [`ObjectKind`] and the list of its values of one list: a kind that is in the one and not in the other would
/// never be read.
macro_rules! object_kinds {
    (plain { $($plain:ident,)+ } of_policy_groups { $($policy:ident,)+ }) => {
        /// The kinds of [`Object`]. Versions of one kind are the same kind.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[allow(missing_docs)]
        pub enum ObjectKind {
            $($plain,)+
            $($policy(PolicyGroup),)+
            Route(RouteKind),
            Cni(CniKind),
        }

        impl ObjectKind {
            /// All of them.
            pub fn all() -> Vec<Self> {
                let mut kinds = vec![$(Self::$plain,)+];
                for group in [PolicyGroup::Weft, PolicyGroup::Linkerd] {
                    kinds.extend([$(Self::$policy(group),)+]);
                }
                kinds.extend(RouteKind::ALL.map(Self::Route));
                kinds.extend(CniKind::ALL.map(Self::Cni));
                kinds
            }
        }
    };
}

// In this order the changes of a batch take effect: cheapest if what many depend on comes first.
object_kinds! {
    plain {
        Namespace,
        Node,
        ServiceCidr,
        Pod,
        Service,
        EndpointSlice,
        ServiceAccount,
        NetworkPolicy,
        ReferenceGrant,
        ServiceProfile,
    }
    of_policy_groups {
        Server,
        AuthorizationPolicy,
        MeshTlsAuthentication,
        NetworkAuthentication,
        HttpLocalRateLimitPolicy,
        EgressNetwork,
    }
}

/// A range that Services get virtual addresses from, of any version.
#[derive(Clone, Debug, PartialEq)]
pub struct ServiceCidr {
    /// Its metadata.
    pub metadata: ObjectMeta,
    /// What it says.
    pub spec: ServiceCIDRSpec,
}

/// Names an object.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectKey {
    /// Its kind.
    pub kind: ObjectKind,
    /// Its namespace; none if the kind has none.
    pub namespace: Option<Name>,
    /// Its name.
    pub name: Name,
}

/// What is wrong with an object, and where in it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {reason}")]
pub struct Fault {
    /// The field as a path: `spec.ports[0].port`.
    pub field: String,
    /// What is wrong with it.
    pub reason: String,
}

impl Fault {
    /// A fault of a field.
    pub fn new(field: impl Into<String>, reason: impl ToString) -> Self {
        Self {
            field: field.into(),
            reason: reason.to_string(),
        }
    }
}

impl Object {
    /// The object's metadata.
    pub fn metadata(&self) -> &ObjectMeta {
        match self {
            Self::Namespace(it) => &it.metadata,
            Self::Node(it) => &it.metadata,
            Self::ServiceCidr(it) => &it.metadata,
            Self::Pod(it) => &it.metadata,
            Self::Service(it) => &it.metadata,
            Self::EndpointSlice(it) => &it.metadata,
            Self::ServiceAccount(it) => &it.metadata,
            Self::NetworkPolicy(it) => &it.metadata,
            Self::Server(_, it) => &it.metadata,
            Self::AuthorizationPolicy(_, it) => &it.metadata,
            Self::MeshTlsAuthentication(_, it) => &it.metadata,
            Self::NetworkAuthentication(_, it) => &it.metadata,
            Self::HttpLocalRateLimitPolicy(_, it) => &it.metadata,
            Self::EgressNetwork(_, it) => &it.metadata,
            Self::Route(_, it) => &it.metadata,
            Self::ReferenceGrant(it) => &it.metadata,
            Self::ServiceProfile(it) => &it.metadata,
            Self::Cni(_, it) => &it.metadata,
        }
    }
}

impl ObjectKind {
    /// The kind of an API group and kind as written in a manifest. None: not one of ours.
    pub fn find(group: &str, kind: &str) -> Option<Self> {
        let policy = Self::policy_group_named(group);
        match (group, kind, policy) {
            ("", "Namespace", _) => Some(Self::Namespace),
            ("", "Node", _) => Some(Self::Node),
            ("", "Pod", _) => Some(Self::Pod),
            ("", "Service", _) => Some(Self::Service),
            ("", "ServiceAccount", _) => Some(Self::ServiceAccount),
            (NETWORKING_GROUP, "ServiceCIDR", _) => Some(Self::ServiceCidr),
            (NETWORKING_GROUP, "NetworkPolicy", _) => Some(Self::NetworkPolicy),
            ("discovery.k8s.io", "EndpointSlice", _) => Some(Self::EndpointSlice),
            (_, "Server", Some(group)) => Some(Self::Server(group)),
            (_, "AuthorizationPolicy", Some(group)) => Some(Self::AuthorizationPolicy(group)),
            (_, "MeshTLSAuthentication", Some(group)) => Some(Self::MeshTlsAuthentication(group)),
            (_, "NetworkAuthentication", Some(group)) => Some(Self::NetworkAuthentication(group)),
            (_, "HTTPLocalRateLimitPolicy", Some(group)) => {
                Some(Self::HttpLocalRateLimitPolicy(group))
            }
            (_, "EgressNetwork", Some(group)) => Some(Self::EgressNetwork(group)),
            (GATEWAY_GROUP, "ReferenceGrant", _) => Some(Self::ReferenceGrant),
            (PROFILE_GROUP, "ServiceProfile", _) => Some(Self::ServiceProfile),
            _ => {
                let mut routes = RouteKind::ALL.into_iter();
                let route = routes.find(|it| it.group() == group && it.as_str() == kind);
                let mut of_cnis = CniKind::ALL.into_iter();
                let of_cni = of_cnis.find(|it| it.group() == group && it.as_str() == kind);
                route.map(Self::Route).or(of_cni.map(Self::Cni))
            }
        }
    }

    /// The kinds of the policy groups.
    pub const POLICY_KINDS: [&str; 6] = [
        "Server",
        "AuthorizationPolicy",
        "MeshTLSAuthentication",
        "NetworkAuthentication",
        "HTTPLocalRateLimitPolicy",
        "EgressNetwork",
    ];

    /// The kinds of the Gateway API that are understood.
    pub const GATEWAY_KINDS: [&str; 5] = [
        "HTTPRoute",
        "GRPCRoute",
        "TLSRoute",
        "TCPRoute",
        "ReferenceGrant",
    ];

    /// The policy group of an API group.
    pub fn policy_group_named(group: &str) -> Option<PolicyGroup> {
        match group {
            "policy.weft.dev" => Some(PolicyGroup::Weft),
            "policy.linkerd.io" => Some(PolicyGroup::Linkerd),
            _ => None,
        }
    }

    /// Whether objects of this kind belong to a namespace.
    pub fn is_namespaced(self) -> bool {
        match self {
            Self::Namespace | Self::Node | Self::ServiceCidr => false,
            Self::Cni(kind) => kind.is_namespaced(),
            _ => true,
        }
    }

    /// The kind's name as in manifests.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Namespace => "Namespace",
            Self::Node => "Node",
            Self::ServiceCidr => "ServiceCIDR",
            Self::Pod => "Pod",
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::ServiceAccount => "ServiceAccount",
            Self::NetworkPolicy => "NetworkPolicy",
            Self::Server(_) => "Server",
            Self::AuthorizationPolicy(_) => "AuthorizationPolicy",
            Self::MeshTlsAuthentication(_) => "MeshTLSAuthentication",
            Self::NetworkAuthentication(_) => "NetworkAuthentication",
            Self::HttpLocalRateLimitPolicy(_) => "HTTPLocalRateLimitPolicy",
            Self::EgressNetwork(_) => "EgressNetwork",
            Self::Route(kind) => kind.as_str(),
            Self::ReferenceGrant => "ReferenceGrant",
            Self::ServiceProfile => "ServiceProfile",
            Self::Cni(kind) => kind.as_str(),
        }
    }

    /// Its API group; empty: the core's.
    pub fn group(self) -> &'static str {
        match self {
            Self::Namespace | Self::Node | Self::Pod | Self::Service | Self::ServiceAccount => "",
            Self::EndpointSlice => "discovery.k8s.io",
            Self::NetworkPolicy | Self::ServiceCidr => NETWORKING_GROUP,
            Self::Route(kind) => kind.group(),
            Self::ReferenceGrant => GATEWAY_GROUP,
            Self::ServiceProfile => PROFILE_GROUP,
            Self::Cni(kind) => kind.group(),
            Self::Server(group)
            | Self::AuthorizationPolicy(group)
            | Self::MeshTlsAuthentication(group)
            | Self::NetworkAuthentication(group)
            | Self::HttpLocalRateLimitPolicy(group)
            | Self::EgressNetwork(group) => group.as_str(),
        }
    }

    /// The versions of its API group in which it can be read, newest first.
    pub fn versions(self) -> &'static [&'static str] {
        match self {
            Self::Server(PolicyGroup::Linkerd) => &["v1beta3", "v1beta2", "v1beta1"],
            Self::Route(RouteKind::Http) => &["v1", "v1beta1"],
            Self::Route(RouteKind::Grpc) => &["v1", "v1alpha2"],
            Self::Route(RouteKind::LinkerdHttp) => &["v1beta3", "v1beta2", "v1beta1"],
            Self::Route(RouteKind::Tls) => &["v1", "v1alpha3", "v1alpha2"],
            Self::Route(RouteKind::Tcp) => &["v1", "v1alpha2"],
            Self::ReferenceGrant => &["v1", "v1beta1", "v1alpha2"],
            Self::ServiceProfile => &["v1alpha2"],
            Self::ServiceCidr => &["v1", "v1beta1"],
            Self::Cni(kind) => kind.versions(),
            kind if kind.policy_group().is_some() => &["v1alpha1"],
            _ => &["v1"],
        }
    }

    /// The policy group, for policy kinds.
    pub fn policy_group(self) -> Option<PolicyGroup> {
        match self {
            Self::Server(group)
            | Self::AuthorizationPolicy(group)
            | Self::MeshTlsAuthentication(group)
            | Self::NetworkAuthentication(group)
            | Self::HttpLocalRateLimitPolicy(group)
            | Self::EgressNetwork(group) => Some(group),
            _ => None,
        }
    }
}

/// The API group of the Gateway API.
pub const GATEWAY_GROUP: &str = "gateway.networking.k8s.io";
/// The API group of NetworkPolicies and ServiceCIDRs.
pub const NETWORKING_GROUP: &str = "networking.k8s.io";
/// The API group of ServiceProfiles.
pub const PROFILE_GROUP: &str = "linkerd.io";

/// As an operator knows it: `HTTPRoute.policy.linkerd.io`, `Node`.
impl fmt::Display for ObjectKind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.as_str())?;
        match self.group() {
            "" => Ok(()),
            group => write!(formatter, ".{group}"),
        }
    }
}

/// `Server.policy.weft.dev shop/web`, `Node one`.
impl fmt::Display for ObjectKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.kind.as_str())?;
        let group = match self.kind {
            ObjectKind::Route(kind) => Some(kind.group()),
            ObjectKind::ReferenceGrant => Some(GATEWAY_GROUP),
            ObjectKind::ServiceProfile => Some(PROFILE_GROUP),
            ObjectKind::Cni(kind) => Some(kind.group()),
            kind => kind.policy_group().map(PolicyGroup::as_str),
        };
        if let Some(group) = group {
            write!(formatter, ".{group}")?;
        }
        match &self.namespace {
            Some(namespace) => write!(formatter, " {namespace}/{}", self.name),
            None => write!(formatter, " {}", self.name),
        }
    }
}

impl Serialize for ObjectKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}
