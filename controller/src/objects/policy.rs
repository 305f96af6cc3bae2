//! Weft's policy kinds (`policy.weft.dev/v1alpha1`), from which the custom resource definitions
//! are generated. The same specs read Linkerd's kinds (`policy.linkerd.io`).
//!
//! These types say what may be written; [`crate::index`] checks what it means. As far as an API server
//! can know that by a schema and by rules about one object (CEL), these say so, too: whoever applies an object that
//! cannot be used is told at once, with a webhook or without. Every list and text has a limit, since an API server
//! refuses rules that might take it long: it takes a sum over a list for endless, for one. What it cannot, and what takes
//! looking further, as at the object's own namespace, only the index and the webhook say.

// `kube` wants the same `type_` in several printer columns.
#![allow(clippy::duplicated_attributes)]

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::CustomResource;
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

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
    #[schemars(required, schema_with = "label_selector")]
    pub pod_selector: Option<LabelSelector>,
    /// Linkerd's machines outside Kubernetes. Read, so that such a Server is no error; it governs
    /// no pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(skip)]
    pub external_workload_selector: Option<LabelSelector>,
    /// A port of the pods: its number, or the name of a container port.
    #[schemars(schema_with = "port")]
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
#[schemars(extend("x-kubernetes-validations" = rules(&[
    (TARGET_KIND, "targetRef.kind: none of Server, Namespace, HTTPRoute and GRPCRoute"),
    (TARGET_GROUP, "targetRef.group: not the group of this kind"),
    (REQUIRED_GROUP, "requiredAuthenticationRefs: the group of an authentication is neither policy.weft.dev nor \
        policy.linkerd.io")
])))]
#[serde(rename_all = "camelCase")]
pub struct AuthorizationPolicySpec {
    /// What it opens: a Server, a Namespace for all Servers in it, or an HTTPRoute or GRPCRoute that
    /// has a Server as a parent.
    pub target_ref: Reference,
    /// All of these must be satisfied by a client; an empty list covers everybody.
    #[schemars(length(max = 64))]
    pub required_authentication_refs: Vec<Reference>,
}

/// Names another object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Reference {
    /// The API group. Absent: the core group for ServiceAccount and Namespace; for policy kinds
    /// the referring object's own, and the other one if only that has the object.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub group: Option<String>,
    /// The kind.
    #[schemars(length(max = 63))]
    pub kind: String,
    /// The name.
    #[schemars(length(max = 253), regex(pattern = NAME))]
    pub name: String,
    /// The namespace; the referring object's own unless set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253), regex(pattern = NAME_OR_NOTHING))]
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
#[schemars(extend("x-kubernetes-validations" = rules(&[
    ("self.targetRef.kind == 'Server'", "targetRef.kind: not a Server"),
    (SERVER_GROUP, "targetRef.group: neither policy.weft.dev nor policy.linkerd.io"),
    (LIMITED_CLIENTS, "overrides: clientRefs are ServiceAccounts")
])))]
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
    #[schemars(length(max = 64))]
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
    #[schemars(length(max = 256))]
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
#[schemars(extend("x-kubernetes-validations" = rules(&[
    (SOME_IDENTITIES, "identities or identityRefs are needed"),
    (FEW_IDENTITIES, "more than 2048 identities and identityRefs"),
    (IDENTITY_KINDS, "identityRefs: neither a ServiceAccount nor a Namespace")
])))]
#[serde(rename_all = "camelCase")]
pub struct MeshTlsAuthenticationSpec {
    /// `*` for everybody with an identity, or identities as
    /// `spiffe://<trust-domain>/ns/<namespace>/sa/<service-account>` or
    /// `<service-account>.<namespace>.serviceaccount.identity.linkerd.<trust-domain>`, in which the
    /// service account may be `*`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 2048), inner(length(max = 800), regex(pattern = IDENTITY)))]
    pub identities: Option<Vec<String>>,
    /// ServiceAccounts, or Namespaces for all service accounts in them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 2048))]
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
    #[schemars(length(min = 1, max = 2048))]
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
    #[schemars(length(min = 1, max = 1024))]
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
    #[schemars(length(max = 49), regex(pattern = NETWORK))]
    pub cidr: String,
    /// Networks or addresses within it that do not count.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 2048), inner(length(max = 49), regex(pattern = NETWORK)))]
    pub except: Option<Vec<String>>,
}

/// As [`weft_core::Name`].
const NAME: &str = "^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$";
const NAME_OR_NOTHING: &str = "^([a-z0-9]([a-z0-9.-]*[a-z0-9])?)?$";
/// The forms of an identity. A namespace has no dots, where a service account stands before it.
const IDENTITY: &str = "^(\\*|\
    spiffe://[a-z0-9._-]{1,255}/ns/[a-z0-9]([a-z0-9.-]*[a-z0-9])?/sa/[a-z0-9]([a-z0-9.-]*[a-z0-9])?|\
    (\\*|[a-z0-9]([a-z0-9.-]*[a-z0-9])?)\\.[a-z0-9]([a-z0-9-]*[a-z0-9])?\
    \\.serviceaccount\\.identity\\.linkerd\\.[a-z0-9._-]{1,255})$";
/// IPv4 exactly, IPv6 by its letters: the rest of its grammar would be a page.
const NETWORK: &str = "^((25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])\
    (\\.(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])){3}(/(3[0-2]|[0-2]?[0-9]))?|\
    [0-9a-fA-F]{0,4}:[0-9a-fA-F:.]+(/(12[0-8]|1[01][0-9]|0?[0-9]?[0-9]))?)$";

const TARGET_KIND: &str =
    "self.targetRef.kind in ['Server', 'Namespace', 'HTTPRoute', 'GRPCRoute']";
const TARGET_GROUP: &str = "!has(self.targetRef.group) || self.targetRef.group == '' || \
    self.targetRef.kind == 'Server' && self.targetRef.group in ['policy.weft.dev', 'policy.linkerd.io'] || \
    self.targetRef.kind == 'Namespace' && self.targetRef.group == 'core' || \
    self.targetRef.kind == 'HTTPRoute' && \
    self.targetRef.group in ['policy.linkerd.io', 'gateway.networking.k8s.io'] || \
    self.targetRef.kind == 'GRPCRoute' && self.targetRef.group == 'gateway.networking.k8s.io'";
const SERVER_GROUP: &str = "!has(self.targetRef.group) || \
    self.targetRef.group in ['', 'policy.weft.dev', 'policy.linkerd.io']";
const REQUIRED_GROUP: &str = "self.requiredAuthenticationRefs.all(it, \
    !(it.kind in ['MeshTLSAuthentication', 'NetworkAuthentication']) || \
    !has(it.group) || it.group in ['', 'policy.weft.dev', 'policy.linkerd.io'])";
const LIMITED_CLIENTS: &str = "!has(self.overrides) || self.overrides.all(it, it.clientRefs.all(client, \
    client.kind == 'ServiceAccount' && (!has(client.group) || client.group in ['', 'core'])))";
const IDENTITY_KINDS: &str = "!has(self.identityRefs) || self.identityRefs.all(it, \
    it.kind in ['ServiceAccount', 'Namespace'] && (!has(it.group) || it.group in ['', 'core']))";
const SOME_IDENTITIES: &str = "has(self.identities) && size(self.identities) > 0 || \
    has(self.identityRefs) && size(self.identityRefs) > 0";
const FEW_IDENTITIES: &str = "(has(self.identities) ? size(self.identities) : 0) + \
    (has(self.identityRefs) ? size(self.identityRefs) : 0) <= 2048";
const REQUIREMENT: &str = "self.operator in ['In', 'NotIn'] ? \
    has(self.values) && size(self.values) > 0 : !has(self.values) || size(self.values) == 0";

/// What an object must satisfy, and what is said of one that does not: as `x-kubernetes-validations` has it.
pub(super) fn rules(rules: &[(&str, &str)]) -> Value {
    let rules = rules.iter();
    rules
        .map(|(rule, message)| json!({"rule": rule, "message": message}))
        .collect()
}

/// Numbers of ports, and their names as Kubernetes has them (RFC 6335): a number in quotes is none.
fn port(_: &mut SchemaGenerator) -> Schema {
    schemars::json_schema!({
        "x-kubernetes-int-or-string": true,
        "minimum": 1,
        "maximum": 65535,
        "maxLength": 63,
        "pattern": "^[a-z0-9-]*[a-z][a-z0-9-]*$",
    })
}

/// Kubernetes' own schema, and what it says there in words.
pub(super) fn label_selector(generator: &mut SchemaGenerator) -> Schema {
    let mut schema = LabelSelector::json_schema(generator);
    if let Some(expressions) = schema.pointer_mut("/properties/matchExpressions") {
        expressions["maxItems"] = json!(256);
        let requirement = &mut expressions["items"];
        requirement["properties"]["key"]["minLength"] = json!(1);
        requirement["properties"]["key"]["maxLength"] = json!(317);
        requirement["properties"]["operator"]["enum"] =
            json!(["In", "NotIn", "Exists", "DoesNotExist"]);
        requirement["properties"]["values"]["maxItems"] = json!(1024);
        let values = "In and NotIn need values, Exists and DoesNotExist have none";
        requirement["x-kubernetes-validations"] = rules(&[(REQUIREMENT, values)]);
    }
    schema
}
