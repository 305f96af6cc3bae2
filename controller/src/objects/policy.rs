//! Weft's policy kinds (`policy.weft.dev/v1alpha1`), from which the custom resource definitions
//! are generated. The same specs read Linkerd's kinds (`policy.linkerd.io`).
//!
//! These types say what may be written; [`crate::index`] checks what it means.

// `kube` wants the same `type_` in several printer columns.
#![allow(clippy::duplicated_attributes)]

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A Server: a port of some pods, and who may connect to it. Without an authorization, nobody may.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "policy.weft.dev",
    version = "v1alpha1",
    kind = "Server",
    doc = "A port of some pods, and who may connect to it. Without an authorization, nobody may.",
    namespaced,
    category = "weft",
    shortname = "wsrv",
    derive = "PartialEq",
    printcolumn(json_path = ".spec.port", name = "Port", type_ = "string"),
    printcolumn(json_path = ".spec.proxyProtocol", name = "Protocol", type_ = "string"),
    printcolumn(
        json_path = ".spec.accessPolicy",
        name = "Access Policy",
        type_ = "string"
    ),
    printcolumn(
        json_path = ".metadata.creationTimestamp",
        name = "Age",
        type_ = "date"
    )
)]
#[serde(rename_all = "camelCase")]
pub struct ServerSpec {
    /// The pods of the Server's namespace that it governs; an empty selector means all of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(required)]
    pub pod_selector: Option<LabelSelector>,
    /// Linkerd's machines outside Kubernetes. Read, so that such a Server is no error; it governs
    /// no pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(skip)]
    pub external_workload_selector: Option<LabelSelector>,
    /// A port of the pods: its number, or the name of a container port.
    pub port: IntOrString,
    /// What clients speak on the port; detected when unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proxy_protocol: Option<ProxyProtocol>,
    /// What holds for clients that no AuthorizationPolicy covers; `deny` unless set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub access_policy: Option<AccessPolicy>,
}

/// What a port speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[allow(missing_docs)]
pub enum ProxyProtocol {
    #[serde(rename = "unknown")]
    Unknown,
    #[serde(rename = "HTTP/1")]
    Http1,
    #[serde(rename = "HTTP/2")]
    Http2,
    #[serde(rename = "gRPC")]
    Grpc,
    #[serde(rename = "opaque")]
    Opaque,
    #[serde(rename = "TLS")]
    Tls,
}

/// Who may connect where no AuthorizationPolicy says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)]
pub enum AccessPolicy {
    AllUnauthenticated,
    AllAuthenticated,
    ClusterUnauthenticated,
    ClusterAuthenticated,
    Deny,
    Audit,
}

/// An AuthorizationPolicy: allows those who satisfy every required authentication to connect to
/// its target.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "policy.weft.dev",
    version = "v1alpha1",
    kind = "AuthorizationPolicy",
    doc = "Allows those who satisfy every required authentication to connect to its target.",
    plural = "authorizationpolicies",
    namespaced,
    category = "weft",
    shortname = "wauthz",
    derive = "PartialEq",
    printcolumn(
        json_path = ".spec.targetRef.kind",
        name = "Target Kind",
        type_ = "string"
    ),
    printcolumn(json_path = ".spec.targetRef.name", name = "Target", type_ = "string"),
    printcolumn(
        json_path = ".metadata.creationTimestamp",
        name = "Age",
        type_ = "date"
    )
)]
#[serde(rename_all = "camelCase")]
pub struct AuthorizationPolicySpec {
    /// What it opens: a Server, a Namespace for all Servers in it, or an HTTPRoute or GRPCRoute that
    /// has a Server as a parent.
    pub target_ref: Reference,
    /// All of these must be satisfied by a client; an empty list covers everybody.
    pub required_authentication_refs: Vec<Reference>,
}

/// Names another object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Reference {
    /// The API group. Absent: the core group for ServiceAccount and Namespace; for policy kinds
    /// the referring object's own, and the other one if only that has the object.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// The kind.
    pub kind: String,
    /// The name.
    pub name: String,
    /// The namespace; the referring object's own unless set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
}

/// An HTTPLocalRateLimitPolicy: how many requests a Server takes.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "policy.weft.dev",
    version = "v1alpha1",
    kind = "HTTPLocalRateLimitPolicy",
    doc = "How many HTTP requests each pod of a Server takes.",
    root = "HttpLocalRateLimitPolicy",
    plural = "httplocalratelimitpolicies",
    singular = "httplocalratelimitpolicy",
    namespaced,
    category = "weft",
    shortname = "wlimit",
    derive = "PartialEq",
    printcolumn(json_path = ".spec.targetRef.name", name = "Server", type_ = "string"),
    printcolumn(
        json_path = ".spec.total.requestsPerSecond",
        name = "Total",
        type_ = "integer"
    ),
    printcolumn(
        json_path = ".metadata.creationTimestamp",
        name = "Age",
        type_ = "date"
    )
)]
#[serde(rename_all = "camelCase")]
pub struct HttpLocalRateLimitPolicySpec {
    /// The Server, of the policy's namespace.
    pub target_ref: Reference,
    /// The rate of all clients together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total: Option<Rate>,
    /// The rate of each identity; clients without one share one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity: Option<Rate>,
    /// Rates in place of the latter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overrides: Option<Vec<RateOverride>>,
}

/// A rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Rate {
    /// Requests per second; as many may come at once.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub requests_per_second: i64,
}

/// A rate of some clients.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RateOverride {
    /// Requests per second, of these clients together.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub requests_per_second: i64,
    /// ServiceAccounts.
    pub client_refs: Vec<Reference>,
}

/// A MeshTLSAuthentication: satisfied by clients that proved to have one of these identities.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "policy.weft.dev",
    version = "v1alpha1",
    kind = "MeshTLSAuthentication",
    doc = "Satisfied by clients that proved to have one of these identities.",
    root = "MeshTlsAuthentication",
    plural = "meshtlsauthentications",
    singular = "meshtlsauthentication",
    namespaced,
    category = "weft",
    shortname = "wmtls",
    derive = "PartialEq",
    printcolumn(json_path = ".spec.identities", name = "Identities", type_ = "string"),
    printcolumn(
        json_path = ".metadata.creationTimestamp",
        name = "Age",
        type_ = "date"
    )
)]
#[serde(rename_all = "camelCase")]
pub struct MeshTlsAuthenticationSpec {
    /// `*` for everybody with an identity, or identities as
    /// `spiffe://<trust-domain>/ns/<namespace>/sa/<service-account>` or
    /// `<service-account>.<namespace>.serviceaccount.identity.linkerd.<trust-domain>`, in which the
    /// service account may be `*`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identities: Option<Vec<String>>,
    /// ServiceAccounts, or Namespaces for all service accounts in them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity_refs: Option<Vec<Reference>>,
}

/// A NetworkAuthentication: satisfied by clients that connect from one of these networks.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "policy.weft.dev",
    version = "v1alpha1",
    kind = "NetworkAuthentication",
    doc = "Satisfied by clients that connect from one of these networks.",
    plural = "networkauthentications",
    singular = "networkauthentication",
    namespaced,
    category = "weft",
    shortname = "wnet",
    derive = "PartialEq",
    printcolumn(
        json_path = ".spec.networks[*].cidr",
        name = "Networks",
        type_ = "string"
    ),
    printcolumn(
        json_path = ".metadata.creationTimestamp",
        name = "Age",
        type_ = "date"
    )
)]
#[serde(rename_all = "camelCase")]
pub struct NetworkAuthenticationSpec {
    /// The networks.
    #[schemars(length(min = 1))]
    pub networks: Vec<Network>,
}

/// An EgressNetwork: addresses outside of the cluster, and what pods of its namespace may send there.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "policy.weft.dev",
    version = "v1alpha1",
    kind = "EgressNetwork",
    doc = "Addresses outside of the cluster, and what pods of its namespace may send there.",
    plural = "egressnetworks",
    singular = "egressnetwork",
    namespaced,
    category = "weft",
    shortname = "wegress",
    derive = "PartialEq",
    printcolumn(
        json_path = ".spec.trafficPolicy",
        name = "Traffic Policy",
        type_ = "string"
    ),
    printcolumn(
        json_path = ".metadata.creationTimestamp",
        name = "Age",
        type_ = "date"
    )
)]
#[serde(rename_all = "camelCase")]
pub struct EgressNetworkSpec {
    /// Its addresses; absent: all that are outside of the cluster.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1))]
    pub networks: Option<Vec<Network>>,
    /// What holds for traffic that no route is for.
    pub traffic_policy: TrafficPolicy,
}

/// What happens to traffic that no route is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[allow(missing_docs)]
pub enum TrafficPolicy {
    Allow,
    Deny,
}

/// A network and exceptions within it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Network {
    /// A network in CIDR notation, or one address.
    pub cidr: String,
    /// Networks or addresses within it that do not count.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub except: Option<Vec<String>>,
}
