//! The definitions of Linkerd's kinds that are read, for clusters in which Linkerd does not own them: those of policy
//! from the types that Weft's own come from, those of routes and profiles as their types read them.
//!
//! They are not Linkerd's own, which stay where Linkerd is: versions and fields that nothing reads are not in them.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt;
use schemars::generate::SchemaSettings;
use serde_json::{Map, Value, json};

use super::crds::without_nulls;
use super::policy::{
    AuthorizationPolicy, EgressNetwork, HttpLocalRateLimitPolicy, MeshTlsAuthentication,
    NetworkAuthentication, Server, label_selector, rules,
};
use super::{ObjectKind, PROFILE_GROUP};

/// The definitions.
///
/// # Errors
/// One of them is no definition, which would be a bug.
pub(super) fn definitions() -> serde_json::Result<Vec<CustomResourceDefinition>> {
    [
        of_policy(Server::crd(), &["srv"]),
        of_policy(AuthorizationPolicy::crd(), &["authzpolicy"]),
        of_policy(MeshTlsAuthentication::crd(), &["meshtlsauthn"]),
        of_policy(NetworkAuthentication::crd(), &["netauthn"]),
        of_policy(HttpLocalRateLimitPolicy::crd(), &[]),
        of_policy(EgressNetwork::crd(), &[]),
        of_shape(POLICY_GROUP, "HTTPRoute", &[], http_route()),
        of_shape(PROFILE_GROUP, "ServiceProfile", &["sp"], service_profile()),
    ]
    .into_iter()
    .collect()
}

const POLICY_GROUP: &str = "policy.linkerd.io";
/// Kinds of which Linkerd's controller, or this one, says something.
const WITH_STATUS: [&str; 3] = ["HTTPRoute", "HTTPLocalRateLimitPolicy", "EgressNetwork"];

/// A definition of Weft's, in Linkerd's group and of its versions.
fn of_policy(
    definition: CustomResourceDefinition,
    short_names: &[&str],
) -> serde_json::Result<CustomResourceDefinition> {
    let mut definition = without_nulls(definition);
    let spec = &mut definition.spec;
    definition.metadata.name = Some(format!("{}.{POLICY_GROUP}", spec.names.plural));
    spec.group = POLICY_GROUP.to_owned();
    spec.names.categories = None;
    spec.names.short_names = named(short_names);
    let kind = spec.names.kind.clone();
    let version = spec.versions.pop().unwrap_or_default();
    let mut definition = serde_json::to_value(definition)?;
    let mut version = serde_json::to_value(version)?;
    if kind == "Server" {
        of_machines(&mut version["schema"]["openAPIV3Schema"]["properties"]["spec"]);
    }
    definition["spec"]["versions"] = versions(&kind, POLICY_GROUP, &version);
    serde_json::from_value(definition)
}

/// Linkerd's Servers may be for machines outside of Kubernetes instead of pods.
fn of_machines(spec: &mut Value) {
    let mut generator = SchemaSettings::openapi3()
        .with(|it| it.inline_subschemas = true)
        .into_generator();
    let mut selector = label_selector(&mut generator).to_value();
    selector["description"] =
        json!("Machines outside of Kubernetes, in place of pods: such a Server governs no pod.");
    spec["properties"]["externalWorkloadSelector"] = selector;
    spec["required"] = json!(["port"]);
    spec["x-kubernetes-validations"] = rules(&[(
        "has(self.podSelector) != has(self.externalWorkloadSelector)",
        "exactly one of podSelector and externalWorkloadSelector is needed",
    )]);
}

/// A definition of a schema that is written here.
fn of_shape(
    group: &str,
    kind: &str,
    short_names: &[&str],
    spec: Value,
) -> serde_json::Result<CustomResourceDefinition> {
    let singular = kind.to_lowercase();
    let plural = format!("{singular}s");
    let age = json!({"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"});
    let schema = json!({"type": "object", "required": ["spec"], "properties": {"spec": spec}});
    let version = json!({
        "additionalPrinterColumns": [age],
        "schema": {"openAPIV3Schema": schema},
    });
    let mut names = json!({"kind": kind, "plural": plural, "singular": singular});
    if let Some(short_names) = named(short_names) {
        names["shortNames"] = json!(short_names);
    }
    serde_json::from_value(json!({
        "metadata": {"name": format!("{plural}.{group}")},
        "spec": {
            "group": group,
            "names": names,
            "scope": "Namespaced",
            "versions": versions(kind, group, &version),
        },
    }))
}

/// A version for each that is read; the newest is what is stored.
fn versions(kind: &str, group: &str, version: &Value) -> Value {
    let found = ObjectKind::find(group, kind);
    let names = found.map(ObjectKind::versions).unwrap_or_default();
    let versions = names.iter().enumerate().map(|(index, name)| {
        let mut version = version.clone();
        version["name"] = json!(name);
        version["served"] = json!(true);
        version["storage"] = json!(index == 0);
        if WITH_STATUS.contains(&kind) {
            version["subresources"] = json!({"status": {}});
            version["schema"]["openAPIV3Schema"]["properties"]["status"] = anything();
        }
        version
    });
    versions.collect()
}

fn named(short_names: &[&str]) -> Option<Vec<String>> {
    let names = short_names.iter().map(|&it| it.to_owned());
    (!short_names.is_empty()).then(|| names.collect())
}

/// As [`HttpRouteSpec`](super::routes::HttpRouteSpec).
fn http_route() -> Value {
    let reference = || {
        vec![
            ("group", text()),
            ("kind", text()),
            ("name", text()),
            ("namespace", text()),
            ("port", number(1, 65535)),
        ]
    };
    let named_match = || {
        let kind = one_of(&["Exact", "RegularExpression"]);
        let fields = [("type", kind), ("name", text()), ("value", text())];
        list(object(fields, &["name", "value"]))
    };
    let header = || {
        list(object(
            [("name", text()), ("value", text())],
            &["name", "value"],
        ))
    };
    let headers = || {
        let fields = [
            ("set", header()),
            ("add", header()),
            ("remove", list(text())),
        ];
        object(fields, &[])
    };
    let path = || {
        let kind = one_of(&["ReplaceFullPath", "ReplacePrefixMatch"]);
        let fields = [
            ("type", kind),
            ("replaceFullPath", text()),
            ("replacePrefixMatch", text()),
        ];
        object(fields, &["type"])
    };
    let fraction = object(
        [
            ("numerator", number(0, i32::MAX)),
            ("denominator", number(1, i32::MAX)),
        ],
        &["numerator"],
    );
    let mirror = [
        ("backendRef", object(reference(), &["name"])),
        ("percent", number(0, 100)),
        ("fraction", fraction),
    ];
    let redirect = [
        ("scheme", one_of(&["http", "https"])),
        ("hostname", text()),
        ("path", path()),
        ("port", number(1, 65535)),
        ("statusCode", number(100, 599)),
    ];
    let filter = object(
        [
            ("type", text()),
            ("requestHeaderModifier", headers()),
            ("responseHeaderModifier", headers()),
            ("requestMirror", object(mirror, &["backendRef"])),
            ("requestRedirect", object(redirect, &[])),
            (
                "urlRewrite",
                object([("hostname", text()), ("path", path())], &[]),
            ),
        ],
        &["type"],
    );
    let path_match = [
        (
            "type",
            one_of(&["Exact", "PathPrefix", "RegularExpression"]),
        ),
        ("value", text()),
    ];
    let http_match = [
        ("path", object(path_match, &[])),
        ("headers", named_match()),
        ("queryParams", named_match()),
        ("method", text()),
    ];
    let mut backend = reference();
    backend.extend([
        ("weight", number(0, 1_000_000)),
        ("filters", list(filter.clone())),
    ]);
    let mut parent = reference();
    parent.push(("sectionName", text()));
    let timeouts = [("request", text()), ("backendRequest", text())];
    let retry = [
        ("codes", list(number(400, 599))),
        ("attempts", number(0, i32::MAX)),
        ("backoff", text()),
    ];
    let rule = [
        ("name", text()),
        ("matches", list(object(http_match, &[]))),
        ("filters", list(filter)),
        ("backendRefs", list(object(backend, &["name"]))),
        ("timeouts", object(timeouts, &[])),
        ("retry", object(retry, &[])),
    ];
    let spec = [
        ("parentRefs", list(object(parent, &["name"]))),
        ("hostnames", list(text())),
        ("rules", list(object(rule, &[]))),
    ];
    object(spec, &[])
}

/// As [`ServiceProfileSpec`](super::profiles::ServiceProfileSpec). Conditions may be made of conditions, which a
/// schema cannot say: what is further down, the controller looks at.
fn service_profile() -> Value {
    let made_of = |mut fields: Vec<(&'static str, Value)>| {
        fields.extend([
            ("all", list(anything())),
            ("any", list(anything())),
            ("not", anything()),
        ]);
        object(fields, &[])
    };
    let status = object([("min", number(0, 999)), ("max", number(0, 999))], &[]);
    let class = [
        ("condition", made_of(vec![("status", status)])),
        ("isFailure", json!({"type": "boolean"})),
    ];
    let route = [
        ("name", text()),
        (
            "condition",
            made_of(vec![("method", text()), ("pathRegex", text())]),
        ),
        ("responseClasses", list(object(class, &["condition"]))),
        ("isRetryable", json!({"type": "boolean"})),
        ("timeout", text()),
    ];
    let budget = [
        ("retryRatio", json!({"type": "number"})),
        ("minRetriesPerSecond", number(0, i32::MAX)),
        ("ttl", text()),
    ];
    let number_or_text = json!({"x-kubernetes-int-or-string": true});
    let weighted = [("authority", text()), ("weight", number_or_text)];
    let spec = [
        ("routes", list(object(route, &["name", "condition"]))),
        (
            "retryBudget",
            object(budget, &["retryRatio", "minRetriesPerSecond", "ttl"]),
        ),
        (
            "dstOverrides",
            list(object(weighted, &["authority", "weight"])),
        ),
        ("opaquePorts", list(text())),
    ];
    object(spec, &[])
}

fn object(fields: impl IntoIterator<Item = (&'static str, Value)>, required: &[&str]) -> Value {
    let fields = fields.into_iter();
    let fields: Map<_, _> = fields.map(|(name, it)| (name.to_owned(), it)).collect();
    let mut object = json!({"type": "object", "properties": fields});
    if !required.is_empty() {
        object["required"] = json!(required);
    }
    object
}

fn list(items: Value) -> Value {
    json!({"type": "array", "items": items})
}

fn text() -> Value {
    json!({"type": "string"})
}

fn one_of(texts: &[&str]) -> Value {
    json!({"type": "string", "enum": texts})
}

fn number(least: i32, most: i32) -> Value {
    json!({"type": "integer", "minimum": least, "maximum": most})
}

fn anything() -> Value {
    json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true})
}
