//! From an untyped document to an [`Object`]: strict for policy kinds, in which an unknown field
//! is a typing error that could open what somebody meant to close; lenient for Kubernetes' own
//! kinds, which gain fields with every version.

use k8s_openapi::api::networking::v1::NetworkPolicy;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use weft_core::Name;
use weft_core::route::RouteKind;

use super::cni::CniKind;
use super::policy::{
    AuthorizationPolicy, EgressNetwork, HttpLocalRateLimitPolicy, MeshTlsAuthentication,
    NetworkAuthentication, Server,
};
use super::profiles::ServiceProfile;
use super::routes::{self, ReferenceGrant, Route, RouteSpec, Written};
use super::{Fault, GATEWAY_GROUP, NETWORKING_GROUP, Object, ObjectKey, ObjectKind, ServiceCidr};

/// The documents of a YAML (or JSON) text; empty ones are left out.
///
/// # Errors
/// The text as a whole is no YAML, with the place where it stops being so.
pub fn documents(text: &str) -> Result<Vec<Value>, Fault> {
    let options = serde_saphyr::options! {
        // Room for some thousand pods in one file, as Kubernetes prints them, and not for what takes
        // everybody's memory; what aliases may multiply stays limited too.
        budget: serde_saphyr::budget! {
            max_documents: 1_000_000,
            max_events: 5_000_000,
            max_nodes: 2_500_000,
        },
        // As YAML 1.2 has it: a namespace may be called "no".
        strict_booleans: true,
    };
    serde_saphyr::from_multiple_with_options(text, options)
        .map_err(|reason| Fault::new("", format!("not YAML: {reason}")))
}

/// Which object a document defines.
///
/// # Errors
/// The document is not an object at all, or has no usable name, or its kind or group looks like a
/// typing error of one of ours. `Ok(None)`: a kind that is not ours.
pub fn identify(document: &Value) -> Result<Option<ObjectKey>, Fault> {
    if !document.is_object() {
        return Err(Fault::new("", "not an object: a mapping is needed"));
    }
    let text = |field: &str| match document.pointer(field) {
        Some(Value::String(text)) if !text.is_empty() => Ok(text.as_str()),
        Some(Value::Null) | None => Err(Fault::new(dotted(field), "missing")),
        Some(_) => Err(Fault::new(dotted(field), "not a text")),
    };
    let (api_version, kind) = (text("/apiVersion")?, text("/kind")?);
    let group = api_version.split_once('/').map_or("", |(group, _)| group);
    let Some(kind) = ObjectKind::find(group, kind) else {
        return match misspelt(group, kind) {
            Some(fault) => Err(fault),
            None => Ok(None),
        };
    };
    let name = |field: &str, text: &str| -> Result<Name, Fault> {
        text.parse()
            .map_err(|reason| Fault::new(dotted(field), reason))
    };
    let namespace = match document.pointer("/metadata/namespace") {
        _ if !kind.is_namespaced() => None,
        Some(Value::Null) | None => Some(name("/metadata/namespace", "default")?),
        Some(_) => Some(name("/metadata/namespace", text("/metadata/namespace")?)?),
    };
    Ok(Some(ObjectKey {
        kind,
        namespace,
        name: name("/metadata/name", text("/metadata/name")?)?,
    }))
}

/// Kinds of Linkerd's policy group that exist and mean nothing here.
const UNSUPPORTED: &[&str] = &["ServerAuthorization"];
/// Groups whose policies about the network a CNI enforces, and nobody where it sees only the mesh's tunnels; but for
/// those of which it is looked at whom they select.
const POLICY_OF_NETWORKS: [(&str, &[&str]); 3] = [
    ("crd.projectcalico.org", OF_CALICO),
    ("projectcalico.org", OF_CALICO),
    (
        "policy.networking.k8s.io",
        &[
            "AdminNetworkPolicy",
            "BaselineAdminNetworkPolicy",
            "ClusterNetworkPolicy",
        ],
    ),
];
const OF_CALICO: &[&str] = &["StagedNetworkPolicy"];

/// Says so of a document of a kind that its author may take for one with an effect.
pub fn unsupported(document: &Value) -> Option<Fault> {
    let text = |field: &str| document.get(field).and_then(Value::as_str).unwrap_or("");
    let group = text("apiVersion").split('/').next().unwrap_or("");
    let kind = text("kind");
    let is_one = ObjectKind::policy_group_named(group).is_some() && UNSUPPORTED.contains(&kind);
    let mut of_networks = POLICY_OF_NETWORKS.iter();
    if of_networks.any(|(other, kinds)| *other == group && kinds.contains(&kind)) {
        let reason =
            format!("{kind} of {group} is not supported, and no CNI sees inside of the mesh");
        return Some(Fault::new("kind", reason));
    }
    is_one.then(|| Fault::new("kind", format!("{kind} is not supported")))
}

/// What a typing error in kind or group makes of one of our objects. Not to notice would be to take
/// the object for deleted.
fn misspelt(group: &str, kind: &str) -> Option<Fault> {
    let shown = |text: &str| text.chars().take(64).collect::<String>();
    if ObjectKind::policy_group_named(group).is_some() {
        let fault = || {
            let reason = format!("{:?} is no kind of {group}", shown(kind));
            Fault::new("kind", reason)
        };
        return (!UNSUPPORTED.contains(&kind)).then(fault);
    }
    let ours = ObjectKind::POLICY_KINDS.iter();
    let policy = ours.clone().find(|it| it.eq_ignore_ascii_case(kind));
    // Others have kinds of these names too, as Istio's security.istio.io.
    let close = |it: &&str| distance(group, it) <= 3;
    let meant = ["policy.weft.dev", "policy.linkerd.io"];
    if policy.is_some() && (group.is_empty() || meant.iter().any(close)) {
        let reason = format!("{:?} is not the group of {kind}", shown(group));
        return Some(Fault::new("apiVersion", reason));
    }
    let gateway = ObjectKind::GATEWAY_KINDS.iter();
    let gateway = gateway.clone().find(|it| it.eq_ignore_ascii_case(kind));
    if let Some(meant) = gateway {
        if group == GATEWAY_GROUP {
            let reason = format!("{:?}: is {meant} meant?", shown(kind));
            return Some(Fault::new("kind", reason));
        }
        if group.is_empty() || distance(group, GATEWAY_GROUP) <= 3 {
            let reason = format!("{:?} is not the group of {kind}", shown(group));
            return Some(Fault::new("apiVersion", reason));
        }
    }
    if kind.eq_ignore_ascii_case("NetworkPolicy") {
        if group == NETWORKING_GROUP {
            let reason = format!("{:?}: is NetworkPolicy meant?", shown(kind));
            return Some(Fault::new("kind", reason));
        }
        if matches!(group, "" | "extensions") || distance(group, NETWORKING_GROUP) <= 3 {
            let reason = format!("{:?} is not the group of {kind}", shown(group));
            return Some(Fault::new("apiVersion", reason));
        }
    }
    let mut of_cnis = CniKind::ALL.into_iter();
    let is_close =
        |it: &CniKind| it.as_str().eq_ignore_ascii_case(kind) && distance(group, it.group()) <= 3;
    if let Some(meant) = of_cnis.find(is_close) {
        let (group, kind) = (shown(group), shown(kind));
        let (meant, of) = (meant.as_str(), meant.group());
        let reason = format!("{kind:?} in {group:?}: is {meant} of {of} meant?");
        return Some(Fault::new("kind", reason));
    }
    let others = ["Namespace", "Node", "Pod", "Service", "EndpointSlice"];
    let other = others.iter().find(|it| it.eq_ignore_ascii_case(kind))?;
    if !matches!(group, "" | "discovery.k8s.io") {
        return None;
    }
    let reason = format!("{kind:?} in {:?}: is {other} meant?", shown(group));
    Some(Fault::new("kind", reason))
}

/// How many letters must be exchanged, put in or left out to make one text of the other
/// (Levenshtein); far texts are far.
fn distance(one: &str, other: &str) -> usize {
    if one.len().abs_diff(other.len()) > 3 {
        return usize::MAX;
    }
    let mut row: Vec<usize> = (0..=other.len()).collect();
    for (index, letter) in one.bytes().enumerate() {
        let mut diagonal = index;
        let mut left = index + 1;
        let mut next = vec![left];
        for (above, expected) in row.iter().skip(1).zip(other.bytes()) {
            let changed = diagonal + usize::from(letter != expected);
            left = changed.min(above + 1).min(left + 1);
            next.push(left);
            diagonal = *above;
        }
        row = next;
    }
    row.last().copied().unwrap_or_default()
}

/// Reads a document as the object that [`identify`] found in it.
///
/// # Errors
/// The first field that cannot be read.
pub fn decode(key: &ObjectKey, document: &Value) -> Result<Object, Fault> {
    supported_version(key, document)?;
    Ok(match key.kind {
        ObjectKind::Namespace => Object::Namespace(lenient(document)?),
        ObjectKind::Node => Object::Node(Box::new(lenient(document)?)),
        ObjectKind::ServiceCidr => {
            let Written { metadata, spec } = lenient(document)?;
            Object::ServiceCidr(ServiceCidr { metadata, spec })
        }
        ObjectKind::Pod => Object::Pod(Box::new(lenient(document)?)),
        ObjectKind::Service => Object::Service(Box::new(lenient(document)?)),
        ObjectKind::EndpointSlice => Object::EndpointSlice(lenient(document)?),
        ObjectKind::ServiceAccount => Object::ServiceAccount(lenient(document)?),
        ObjectKind::NetworkPolicy => {
            let policy: NetworkPolicy = lenient(document)?;
            // What is not known may be an exception.
            if let Some(spec) = &policy.spec {
                known_fields(document, spec)?;
            }
            Object::NetworkPolicy(Box::new(policy))
        }
        ObjectKind::Server(group) => {
            let server: Server = lenient(document)?;
            known_fields(document, &server.spec)?;
            Object::Server(group, server)
        }
        ObjectKind::AuthorizationPolicy(group) => {
            let policy: AuthorizationPolicy = lenient(document)?;
            known_fields(document, &policy.spec)?;
            Object::AuthorizationPolicy(group, policy)
        }
        ObjectKind::MeshTlsAuthentication(group) => {
            let authentication: MeshTlsAuthentication = lenient(document)?;
            known_fields(document, &authentication.spec)?;
            Object::MeshTlsAuthentication(group, authentication)
        }
        ObjectKind::NetworkAuthentication(group) => {
            let authentication: NetworkAuthentication = lenient(document)?;
            known_fields(document, &authentication.spec)?;
            Object::NetworkAuthentication(group, authentication)
        }
        ObjectKind::HttpLocalRateLimitPolicy(group) => {
            let policy: HttpLocalRateLimitPolicy = lenient(document)?;
            known_fields(document, &policy.spec)?;
            Object::HttpLocalRateLimitPolicy(group, policy)
        }
        ObjectKind::EgressNetwork(group) => {
            let network: EgressNetwork = lenient(document)?;
            known_fields(document, &network.spec)?;
            Object::EgressNetwork(group, network)
        }
        ObjectKind::Route(kind) => Object::Route(kind, Box::new(route(kind, document)?)),
        ObjectKind::ReferenceGrant => {
            let Written { metadata, spec } = lenient(document)?;
            known_fields(document, &spec)?;
            Object::ReferenceGrant(ReferenceGrant { metadata, spec })
        }
        ObjectKind::ServiceProfile => {
            let document = without_nulls(document);
            let Written { metadata, spec } = lenient(&document)?;
            known_fields(&document, &spec)?;
            Object::ServiceProfile(Box::new(ServiceProfile { metadata, spec }))
        }
        ObjectKind::Cni(kind) => Object::Cni(kind, Box::new(lenient(document)?)),
    })
}

/// Reads a route. Strictly if it is for the mesh: a condition that is not understood would not be looked at,
/// and the route would be for more than was meant. Those of gateways are no concern of the mesh, and may
/// say what it does not know.
fn route(kind: RouteKind, document: &Value) -> Result<Route, Fault> {
    match kind {
        RouteKind::Http | RouteKind::LinkerdHttp => of_mesh(document, RouteSpec::Http),
        RouteKind::Grpc => of_mesh(document, RouteSpec::Grpc),
        RouteKind::Tls => of_mesh(document, RouteSpec::Tls),
        RouteKind::Tcp => of_mesh(document, RouteSpec::Tcp),
    }
}

fn of_mesh<S>(document: &Value, spec: impl Fn(S) -> RouteSpec) -> Result<Route, Fault>
where
    S: DeserializeOwned + Serialize + Default,
{
    let parents = document.pointer("/spec/parentRefs");
    let mut parents = parents.and_then(Value::as_array).into_iter().flatten();
    // One that cannot be read may be meant to be a Service, a Server or an EgressNetwork.
    let is_ours = parents.any(|it| {
        let parent = serde_json::from_value::<routes::ParentRef>(it.clone());
        parent.map_or(true, |it| {
            it.is_service() || it.is_server() || it.is_egress_network()
        })
    });
    if !is_ours {
        let Written { metadata, .. } = lenient::<Written<Value>>(document)?;
        let spec = spec(S::default());
        return Ok(Route { metadata, spec });
    }
    let document = without_nulls(document);
    let Written {
        metadata,
        spec: read,
    } = lenient(&document)?;
    known_fields(&document, &read)?;
    let spec = spec(read);
    Ok(Route { metadata, spec })
}

/// A document in which fields that say nothing are left out: as the API server does for lists, too.
fn without_nulls(value: &Value) -> Value {
    match value {
        Value::Object(fields) => {
            let said = fields.iter().filter(|(_, it)| !it.is_null());
            let said = said.map(|(name, it)| (name.clone(), without_nulls(it)));
            Value::Object(said.collect())
        }
        Value::Array(items) => items.iter().map(without_nulls).collect(),
        other => other.clone(),
    }
}

fn supported_version(key: &ObjectKey, document: &Value) -> Result<(), Fault> {
    let written = document.pointer("/apiVersion").and_then(Value::as_str);
    let version = written.and_then(|it| it.rsplit('/').next()).unwrap_or("");
    let supported = key.kind.versions();
    if supported.contains(&version) {
        Ok(())
    } else {
        let reason = format!("version {version:?} is not one of {}", supported.join(", "));
        Err(Fault::new("apiVersion", reason))
    }
}

fn lenient<T: DeserializeOwned>(document: &Value) -> Result<T, Fault> {
    serde_path_to_error::deserialize(document).map_err(|error| {
        let path = error.path().to_string();
        let field = if path == "." { String::new() } else { path };
        Fault::new(field, error.into_inner())
    })
}

/// Refuses fields of the spec that writing it back does not produce.
fn known_fields(document: &Value, spec: &impl Serialize) -> Result<(), Fault> {
    let Some(written) = document.get("spec") else {
        return Ok(());
    };
    let known =
        serde_json::to_value(spec).map_err(|reason| Fault::new("spec", reason.to_string()))?;
    match unknown_field("spec", written, &known) {
        None => Ok(()),
        Some(field) => Err(Fault::new(field, "unknown field")),
    }
}

fn unknown_field(path: &str, written: &Value, known: &Value) -> Option<String> {
    match (written, known) {
        (Value::Object(written), Value::Object(known)) => {
            written.iter().find_map(|(field, value)| {
                let path = format!("{path}.{field}");
                match known.get(field) {
                    Some(known) => unknown_field(&path, value, known),
                    // An explicit null or empty value says as much as an absent one.
                    None if is_empty(value) => None,
                    None => Some(path),
                }
            })
        }
        (Value::Array(written), Value::Array(known)) => written
            .iter()
            .zip(known)
            .enumerate()
            .find_map(|(index, (written, known))| {
                unknown_field(&format!("{path}[{index}]"), written, known)
            }),
        _ => None,
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    }
}

fn dotted(pointer: &str) -> String {
    pointer.trim_start_matches('/').replace('/', ".")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(document: Value) -> Result<Object, Fault> {
        let key = identify(&document)?.expect("one of our kinds");
        decode(&key, &document)
    }

    #[test]
    fn objects_are_identified() {
        for (document, expected) in [
            (
                json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}}),
                "Pod default/a",
            ),
            (
                json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "one", "namespace": "x"}}),
                "Node one",
            ),
            (
                json!({"apiVersion": "policy.linkerd.io/v1beta3", "kind": "Server",
                       "metadata": {"name": "a", "namespace": "shop"}}),
                "Server.policy.linkerd.io shop/a",
            ),
        ] {
            let key = identify(&document).expect("identified").expect("ours");
            assert_eq!(key.to_string(), expected);
        }
        let foreign =
            json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "a"}});
        assert_eq!(identify(&foreign), Ok(None));
        for (document, field) in [
            (json!([1]), ""),
            (json!({"kind": "Pod"}), "apiVersion"),
            (json!({"apiVersion": "v1"}), "kind"),
            (
                json!({"apiVersion": "v1", "kind": "Pod", "metadata": {}}),
                "metadata.name",
            ),
            (
                json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "A b"}}),
                "metadata.name",
            ),
            (
                json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a", "namespace": 7}}),
                "metadata.namespace",
            ),
        ] {
            assert_eq!(identify(&document).expect_err("refused").field, field);
        }
    }

    #[test]
    fn kinds_of_the_gateway_api_are_known() {
        let identified = |version: &str, kind: &str| {
            identify(&json!({"apiVersion": version, "kind": kind, "metadata": {"name": "a"}}))
        };
        for (version, kind, expected) in [
            (
                "gateway.networking.k8s.io/v1",
                "HTTPRoute",
                "HTTPRoute.gateway.networking.k8s.io default/a",
            ),
            (
                "policy.linkerd.io/v1beta3",
                "HTTPRoute",
                "HTTPRoute.policy.linkerd.io default/a",
            ),
            (
                "gateway.networking.k8s.io/v1beta1",
                "ReferenceGrant",
                "ReferenceGrant.gateway.networking.k8s.io default/a",
            ),
        ] {
            let key = identified(version, kind)
                .expect("identified")
                .expect("ours");
            assert_eq!(key.to_string(), expected);
        }
        for (version, kind) in [
            ("gateway.networking.k8s.io/v1", "Gateway"),
            ("gateway.networking.k8s.io/v1alpha2", "UDPRoute"),
            ("example.com/v1", "HTTPRoute"),
        ] {
            assert_eq!(identified(version, kind), Ok(None), "{version} {kind}");
        }
        for (version, kind, field) in [
            ("gateway.networking.k8s.io/v1", "HttpRoute", "kind"),
            ("gateway.networkng.k8s.io/v1", "HTTPRoute", "apiVersion"),
            ("v1", "GRPCRoute", "apiVersion"),
            ("policy.weft.dev/v1alpha1", "HTTPRoute", "kind"),
        ] {
            let fault = identified(version, kind).expect_err("refused");
            assert_eq!(fault.field, field, "{version} {kind}");
        }
        let future = json!({"apiVersion": "gateway.networking.k8s.io/v2", "kind": "HTTPRoute",
            "metadata": {"name": "a"}, "spec": {}});
        assert_eq!(read(future).expect_err("refused").field, "apiVersion");
    }

    /// As with lists that kubectl prints: what is there and null says nothing.
    #[test]
    fn nulls_in_routes_say_nothing() {
        let document = json!({"apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute",
            "metadata": {"name": "a"},
            "spec": {"parentRefs": [{"kind": "Service", "name": "a", "port": null}],
                "rules": [{"matches": null, "filters": null, "backendRefs": [null]}]}});
        let fault = read(document.clone()).expect_err("a backend that is none");
        assert_eq!(fault.field, "spec.rules[0].backendRefs[0]");
        let mut document = document;
        document["spec"]["rules"][0]["backendRefs"] = Value::Null;
        read(document).expect("accepted");
    }

    #[test]
    fn faults_name_the_field() {
        let server = |version: &str, spec: Value| {
            json!({"apiVersion": format!("policy.weft.dev/{version}"), "kind": "Server",
                   "metadata": {"name": "a"}, "spec": spec})
        };
        for (document, field) in [
            (
                server("v1alpha1", json!({"podSelector": {}, "port": [8080]})),
                "spec.port",
            ),
            (server("v1alpha1", json!({"podSelector": {}})), "spec"),
            (
                server(
                    "v1alpha1",
                    json!({"podSelector": {}, "port": 1, "accessPolicy": "none"}),
                ),
                "spec.accessPolicy",
            ),
            (
                server(
                    "v1alpha1",
                    json!({"podSelector": {}, "port": 1, "acessPolicy": "deny"}),
                ),
                "spec.acessPolicy",
            ),
            (
                server(
                    "v1alpha1",
                    json!({"podSelector": {"matchLables": {"a": "b"}}, "port": 1}),
                ),
                "spec.podSelector.matchLables",
            ),
            (
                server("v1beta1", json!({"podSelector": {}, "port": 1})),
                "apiVersion",
            ),
            (
                json!({"apiVersion": "policy.weft.dev/v1alpha1", "kind": "NetworkAuthentication",
                "metadata": {"name": "a"},
                "spec": {"networks": [{"cidr": "10.0.0.0/8", "excpet": ["10.1.0.0/16"]}]}}),
                "spec.networks[0].excpet",
            ),
            (
                json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"},
                "spec": {"containers": [{"name": "c", "ports": [{"containerPort": "x"}]}]}}),
                "spec.containers[0].ports[0].containerPort",
            ),
        ] {
            let fault = read(document).expect_err(field);
            assert_eq!(fault.field, field, "{fault}");
        }
    }

    #[test]
    fn the_width_of_a_text_is_bounded() {
        let text = format!("[{}]", "1,".repeat(2_600_000));
        assert!(documents(&text).is_err());
        let text = format!("[{}]", "1,".repeat(100_000));
        assert_eq!(documents(&text).map(|it| it.len()), Ok(1));
    }

    #[test]
    fn explicit_nothing_is_no_unknown_field() {
        let document = json!({"apiVersion": "policy.weft.dev/v1alpha1", "kind": "Server",
            "metadata": {"name": "a"},
            "spec": {"podSelector": {"matchLabels": {}, "matchExpressions": []}, "port": "http",
                     "accessPolicy": null}});
        read(document).expect("accepted");
    }
}
