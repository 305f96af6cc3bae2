//! What the custom resource definitions let pass, beside what the index makes of it: an API server alone already refuses
//! what cannot be used, and nothing that can. The rules are evaluated, not read.

use std::path::Path;

use serde_json::{Value, json};
use weft_apiserver::{Schema, cost, structural};
use weft_controller::index::{Index, Settings};
use weft_controller::objects::decode;
use weft_controller::problems::Problems;
use weft_controller::views::Views;

const WEFT: &str = "policy.weft.dev/v1alpha1";

/// (kind, spec) -> what the API server says of it; nothing: it takes it, and so does the index.
#[test]
fn api_servers_refuse_what_the_index_does() {
    let account = json!({"kind": "ServiceAccount", "name": "web"});
    let on = |reference: Value| json!({"targetRef": reference, "requiredAuthenticationRefs": []});
    let by = |reference: Value| json!({"targetRef": {"kind": "Server", "name": "web"}, "requiredAuthenticationRefs": [reference]});
    let server = |port: Value| json!({"podSelector": {}, "port": port});
    let selecting = |requirement: Value| json!({"podSelector": {"matchExpressions": [requirement]}, "port": 80});
    let limit = |reference: Value, client: &Value| json!({"targetRef": reference, "total": {"requestsPerSecond": 1}, "overrides": [{"requestsPerSecond": 1, "clientRefs": [client]}]});
    let of_server = json!({"kind": "Server", "name": "web"});
    let many = |count: usize, item: Value| json!(vec![item; count]);
    let identities = |texts: &[&str]| json!({"identities": texts});
    let network =
        |cidr: &str, except: &[&str]| json!({"networks": [{"cidr": cidr, "except": except}]});
    let excepting = |networks: usize, except: usize| json!({"networks": many(networks, json!({"cidr": "10.0.0.0/8", "except": many(except, json!("10.1.0.0/16"))}))});
    let egress = |mut networks: Value| {
        networks["trafficPolicy"] = json!("Deny");
        networks
    };
    let (few, none) = ("more than 2048", "");
    let target_kind = "targetRef.kind: none of Server, Namespace";
    let target_group = "targetRef.group: not the group";
    let identity_kind = "neither a ServiceAccount nor a Namespace";
    let values = "In and NotIn need values";
    let client = "clientRefs are ServiceAccounts";
    let cases = [
        ("Server", server(json!(1)), none),
        ("Server", server(json!(65535)), none),
        ("Server", server(json!("http-2")), none),
        ("Server", server(json!(0)), "spec.port"),
        ("Server", server(json!(65536)), "spec.port"),
        ("Server", server(json!("8080")), "spec.port"),
        ("Server", server(json!("HTTP")), "spec.port"),
        ("Server", server(json!("a".repeat(64))), "spec.port"),
        ("Server", server(json!(null)), "port: Required value"),
        ("Server", json!({"port": 80}), "podSelector: Required value"),
        (
            "Server",
            json!({"podSelector": {}, "port": 80, "accessPolicy": null, "proxyProtocol": null}),
            none,
        ),
        (
            "Server",
            json!({"podSelector": {}, "port": 80, "accessPolicy": "none"}),
            "spec.accessPolicy",
        ),
        (
            "Server",
            selecting(json!({"key": "a", "operator": "In", "values": ["b"]})),
            none,
        ),
        (
            "Server",
            selecting(json!({"key": "a", "operator": "Exists"})),
            none,
        ),
        (
            "Server",
            selecting(json!({"key": "a", "operator": "DoesNotExist", "values": []})),
            none,
        ),
        (
            "Server",
            selecting(json!({"key": "a", "operator": "In"})),
            values,
        ),
        (
            "Server",
            selecting(json!({"key": "a", "operator": "NotIn", "values": []})),
            values,
        ),
        (
            "Server",
            selecting(json!({"key": "a", "operator": "Exists", "values": ["b"]})),
            values,
        ),
        (
            "Server",
            selecting(json!({"key": "a", "operator": "Is", "values": ["b"]})),
            "operator: Unsupported",
        ),
        (
            "Server",
            selecting(json!({"key": "", "operator": "Exists"})),
            "key: Invalid value",
        ),
        ("AuthorizationPolicy", on(of_server.clone()), none),
        (
            "AuthorizationPolicy",
            on(json!({"kind": "Server", "name": "web", "group": ""})),
            none,
        ),
        (
            "AuthorizationPolicy",
            on(
                json!({"kind": "Server", "name": "web", "group": "policy.linkerd.io", "namespace": ""}),
            ),
            none,
        ),
        (
            "AuthorizationPolicy",
            on(json!({"kind": "Namespace", "name": "shop"})),
            none,
        ),
        (
            "AuthorizationPolicy",
            on(json!({"kind": "Namespace", "name": "shop", "group": "core"})),
            none,
        ),
        (
            "AuthorizationPolicy",
            on(json!({"kind": "HTTPRoute", "name": "a", "group": "policy.linkerd.io"})),
            none,
        ),
        (
            "AuthorizationPolicy",
            on(json!({"kind": "HTTPRoute", "name": "a", "group": "gateway.networking.k8s.io"})),
            none,
        ),
        (
            "AuthorizationPolicy",
            on(json!({"kind": "GRPCRoute", "name": "a"})),
            none,
        ),
        (
            "AuthorizationPolicy",
            on(json!({"kind": "Pod", "name": "web"})),
            target_kind,
        ),
        (
            "AuthorizationPolicy",
            on(json!({"kind": "Server", "name": "web", "group": "policy.weft.io"})),
            target_group,
        ),
        (
            "AuthorizationPolicy",
            on(json!({"kind": "Namespace", "name": "shop", "group": "apps"})),
            target_group,
        ),
        (
            "AuthorizationPolicy",
            on(json!({"kind": "HTTPRoute", "name": "a", "group": "policy.weft.dev"})),
            target_group,
        ),
        (
            "AuthorizationPolicy",
            on(json!({"kind": "GRPCRoute", "name": "a", "group": "policy.linkerd.io"})),
            target_group,
        ),
        (
            "AuthorizationPolicy",
            on(json!({"kind": "Server", "name": "Web"})),
            "spec.targetRef.name",
        ),
        ("AuthorizationPolicy", by(account.clone()), none),
        (
            "AuthorizationPolicy",
            by(json!({"kind": "MeshTLSAuthentication", "name": "a", "namespace": "other"})),
            none,
        ),
        (
            "AuthorizationPolicy",
            by(json!({"kind": "NetworkAuthentication", "name": "a", "group": "policy.linkerd.io"})),
            none,
        ),
        // Nobody satisfies it, which the controller warns of.
        (
            "AuthorizationPolicy",
            by(json!({"kind": "Group", "name": "a", "group": "example.com"})),
            none,
        ),
        (
            "AuthorizationPolicy",
            by(json!({"kind": "MeshTLSAuthentication", "name": "a", "group": "example.com"})),
            "requiredAuthenticationRefs: the group",
        ),
        (
            "AuthorizationPolicy",
            by(json!({"kind": "ServiceAccount", "name": "a b"})),
            "requiredAuthenticationRefs[0].name",
        ),
        (
            "AuthorizationPolicy",
            json!({"targetRef": of_server, "requiredAuthenticationRefs": many(64, account.clone())}),
            none,
        ),
        (
            "AuthorizationPolicy",
            json!({"targetRef": of_server, "requiredAuthenticationRefs": many(65, account.clone())}),
            "maxItems 64",
        ),
        (
            "HTTPLocalRateLimitPolicy",
            limit(of_server.clone(), &account),
            none,
        ),
        (
            "HTTPLocalRateLimitPolicy",
            json!({"targetRef": of_server}),
            none,
        ),
        (
            "HTTPLocalRateLimitPolicy",
            limit(json!({"kind": "Namespace", "name": "shop"}), &account),
            "targetRef.kind: not a Server",
        ),
        (
            "HTTPLocalRateLimitPolicy",
            limit(
                json!({"kind": "Server", "name": "a", "group": "core"}),
                &account,
            ),
            "targetRef.group",
        ),
        (
            "HTTPLocalRateLimitPolicy",
            limit(
                of_server.clone(),
                &json!({"kind": "Namespace", "name": "a"}),
            ),
            client,
        ),
        (
            "HTTPLocalRateLimitPolicy",
            limit(
                of_server.clone(),
                &json!({"kind": "ServiceAccount", "name": "a", "group": "apps"}),
            ),
            client,
        ),
        (
            "HTTPLocalRateLimitPolicy",
            json!({"targetRef": of_server, "total": {"requestsPerSecond": 0}}),
            "spec.total.requestsPerSecond",
        ),
        (
            "HTTPLocalRateLimitPolicy",
            json!({"targetRef": of_server, "overrides": many(65, json!({"requestsPerSecond": 1, "clientRefs": []}))}),
            "maxItems 64",
        ),
        (
            "HTTPLocalRateLimitPolicy",
            json!({"targetRef": of_server, "overrides": [{"requestsPerSecond": 1, "clientRefs": many(257, account.clone())}]}),
            "maxItems 256",
        ),
        ("MeshTLSAuthentication", identities(&["*"]), none),
        (
            "MeshTLSAuthentication",
            identities(&[
                "spiffe://cluster.local/ns/shop/sa/web.a",
                "*.shop.serviceaccount.identity.linkerd.cluster.local",
                "a.b.shop.serviceaccount.identity.linkerd.cluster.local",
            ]),
            none,
        ),
        (
            "MeshTLSAuthentication",
            json!({"identityRefs": [account, {"kind": "Namespace", "name": "a", "group": "core"}]}),
            none,
        ),
        (
            "MeshTLSAuthentication",
            json!({}),
            "identities or identityRefs are needed",
        ),
        (
            "MeshTLSAuthentication",
            json!({"identities": [], "identityRefs": []}),
            "identities or identityRefs are needed",
        ),
        (
            "MeshTLSAuthentication",
            json!({"identities": null}),
            "identities or identityRefs are needed",
        ),
        (
            "MeshTLSAuthentication",
            json!({"identityRefs": [{"kind": "Pod", "name": "a"}]}),
            identity_kind,
        ),
        (
            "MeshTLSAuthentication",
            json!({"identityRefs": [{"kind": "ServiceAccount", "name": "a", "group": "apps"}]}),
            identity_kind,
        ),
        (
            "MeshTLSAuthentication",
            identities(&["spiffe://x"]),
            "spec.identities[0]",
        ),
        (
            "MeshTLSAuthentication",
            identities(&["*.local"]),
            "spec.identities[0]",
        ),
        (
            "MeshTLSAuthentication",
            identities(&["*", "shop.serviceaccount.identity.linkerd.cluster.local"]),
            "spec.identities[1]",
        ),
        (
            "MeshTLSAuthentication",
            json!({"identities": many(1024, json!("*")), "identityRefs": many(1024, account.clone())}),
            none,
        ),
        (
            "MeshTLSAuthentication",
            json!({"identities": many(1025, json!("*")), "identityRefs": many(1024, account.clone())}),
            few,
        ),
        (
            "MeshTLSAuthentication",
            json!({"identities": many(2049, json!("*"))}),
            "maxItems 2048",
        ),
        (
            "NetworkAuthentication",
            network("10.0.0.0/8", &["10.0.0.0/16", "10.1.2.3"]),
            none,
        ),
        (
            "NetworkAuthentication",
            network("::/0", &["2001:DB8::1", "fe80::/10"]),
            none,
        ),
        (
            "NetworkAuthentication",
            network("::ffff:1.2.3.4/120", &[]),
            none,
        ),
        (
            "NetworkAuthentication",
            json!({"networks": []}),
            "minItems 1",
        ),
        (
            "NetworkAuthentication",
            network("10.0.0.0/33", &[]),
            "networks[0].cidr",
        ),
        (
            "NetworkAuthentication",
            network("10.0.0.256", &[]),
            "networks[0].cidr",
        ),
        (
            "NetworkAuthentication",
            network("10.0.0.0/8", &["10.1"]),
            "networks[0].except[0]",
        ),
        (
            "NetworkAuthentication",
            network("::/129", &[]),
            "networks[0].cidr",
        ),
        (
            "NetworkAuthentication",
            network("host", &[]),
            "networks[0].cidr",
        ),
        ("NetworkAuthentication", excepting(1, 2047), none),
        ("EgressNetwork", json!({"trafficPolicy": "Allow"}), none),
        ("EgressNetwork", egress(excepting(2, 511)), none),
        (
            "EgressNetwork",
            egress(json!({"networks": []})),
            "minItems 1",
        ),
        (
            "EgressNetwork",
            egress(network("10.0.0.0/x", &[])),
            "networks[0].cidr",
        ),
        (
            "EgressNetwork",
            json!({"trafficPolicy": "Ask"}),
            "spec.trafficPolicy",
        ),
    ];
    for (kind, spec, said) in cases {
        let object = object(WEFT, kind, &spec);
        let shown = format!("{kind} {spec:.400}");
        let faults = refusals(&object);
        let judged = judged(&object);
        if said == none {
            assert!(faults.is_empty(), "{shown}: {faults:?}");
            assert!(judged.is_ok(), "{shown}: {judged:?}");
        } else {
            let all = faults.join("\n");
            assert!(all.contains(said), "{shown}: {said} in {faults:?}");
            assert!(judged.is_err(), "{shown}: the index takes it");
        }
    }
}

/// What only the index knows: where the object itself is, what a text means, and how much several lists are together.
#[test]
fn some_is_left_to_the_index() {
    for (kind, spec) in [
        (
            "AuthorizationPolicy",
            json!({"targetRef": {"kind": "Server", "name": "web", "namespace": "other"}, "requiredAuthenticationRefs": []}),
        ),
        (
            "AuthorizationPolicy",
            json!({"targetRef": {"kind": "Namespace", "name": "other"}, "requiredAuthenticationRefs": []}),
        ),
        (
            "NetworkAuthentication",
            json!({"networks": [{"cidr": "10.0.0.0/8", "except": ["192.168.0.0/16"]}]}),
        ),
        (
            "NetworkAuthentication",
            json!({"networks": [{"cidr": "1::2::3"}]}),
        ),
        (
            "NetworkAuthentication",
            json!({"networks": [{"cidr": "10.0.0.0/8", "except": vec!["10.1.0.0/16"; 2048]}]}),
        ),
    ] {
        let object = object(WEFT, kind, &spec);
        assert!(refusals(&object).is_empty(), "{spec}");
        assert!(judged(&object).is_err(), "{spec}");
    }
}

/// Linkerd's Servers are for pods or for machines.
#[test]
fn servers_of_linkerd_select_either() {
    for (spec, is_taken) in [
        (json!({"podSelector": {}, "port": 80}), true),
        (
            json!({"externalWorkloadSelector": {}, "port": "http"}),
            true,
        ),
        (
            json!({"podSelector": {}, "externalWorkloadSelector": {}, "port": 80}),
            false,
        ),
        (json!({"port": 80}), false),
        (json!({"podSelector": {}, "port": 0}), false),
    ] {
        for version in ["v1beta1", "v1beta3"] {
            let object = object(&format!("policy.linkerd.io/{version}"), "Server", &spec);
            let faults = refusals(&object);
            assert_eq!(faults.is_empty(), is_taken, "{spec}: {faults:?}");
            assert_eq!(judged(&object).is_ok(), is_taken, "{spec}");
        }
    }
}

/// No field that is read goes.
#[test]
fn routes_and_profiles_of_linkerd_stay_whole() {
    let header = json!([{"name": "a", "value": "b"}]);
    let headers = json!({"set": header, "add": header, "remove": ["c"]});
    let path = json!({"type": "ReplacePrefixMatch", "replacePrefixMatch": "/"});
    let filters = json!([
        {"type": "RequestHeaderModifier", "requestHeaderModifier": headers},
        {"type": "ResponseHeaderModifier", "responseHeaderModifier": headers},
        {"type": "RequestMirror", "requestMirror": {"backendRef": {"name": "a", "port": 80}, "percent": 5}},
        {"type": "URLRewrite", "urlRewrite": {"hostname": "a.example", "path": path}},
        {"type": "RequestRedirect", "requestRedirect": {"scheme": "https", "hostname": "a.example", "path": path, "port": 443, "statusCode": 301}},
    ]);
    let matches = json!([{
        "path": {"type": "PathPrefix", "value": "/"}, "method": "GET",
        "headers": [{"type": "Exact", "name": "a", "value": "b"}],
        "queryParams": [{"type": "RegularExpression", "name": "a", "value": "b"}],
    }]);
    let backend = json!({"group": "", "kind": "Service", "name": "a", "namespace": "shop", "port": 80, "weight": 1});
    let route = json!({
        "parentRefs": [{"group": "core", "kind": "Service", "name": "a", "namespace": "shop", "port": 80, "sectionName": "x"}],
        "hostnames": ["a.example"],
        "rules": [{"name": "a", "matches": matches, "filters": filters, "backendRefs": [backend],
            "timeouts": {"request": "1s", "backendRequest": "1s"},
            "retry": {"codes": [503], "attempts": 2, "backoff": "100ms"}}],
    });
    let condition = json!({"any": [{"not": {"method": "GET"}}, {"all": [{"pathRegex": "/a"}]}]});
    let failures = json!({"condition": {"status": {"min": 500, "max": 599}}, "isFailure": true});
    let profile = json!({
        "routes": [{"name": "a", "condition": condition, "responseClasses": [failures], "isRetryable": true, "timeout": "1s"}],
        "retryBudget": {"retryRatio": 0.2, "minRetriesPerSecond": 10, "ttl": "10s"},
        "dstOverrides": [{"authority": "a.shop.svc.cluster.local:80", "weight": "500m"}],
        "opaquePorts": ["25"],
    });
    for (version, kind, spec) in [
        ("policy.linkerd.io/v1beta3", "HTTPRoute", route),
        ("linkerd.io/v1alpha2", "ServiceProfile", profile),
    ] {
        let object = object(version, kind, &spec);
        let schema = schema_of(&object);
        assert_eq!(schema.pruned(&object), object);
        assert_eq!(schema.faults(&object, None), Vec::<String>::new());
        let key = decode::identify(&object).expect("an object").expect("ours");
        decode::decode(&key, &object).expect("it is read");
    }
}

/// Every example in the documentation.
#[test]
fn examples_are_accepted() {
    let mut seen = 0;
    for text in [
        include_str!("../../README.md"),
        include_str!("../../docs/policy.md"),
        include_str!("../../docs/http.md"),
        include_str!("../../docs/controller.md"),
        include_str!("../../docs/cli.md"),
        include_str!("../../docs/install.md"),
        include_str!("../../docs/getting-started.md"),
        include_str!("../../docs/tasks.md"),
    ] {
        let blocks = text.split("```yaml\n").skip(1);
        let blocks = blocks.filter_map(|it| it.split("```").next());
        for object in blocks.flat_map(|it| decode::documents(it).expect("YAML")) {
            let version = object["apiVersion"].as_str().unwrap_or_default();
            let group = version.split('/').next().unwrap_or_default();
            if ["policy.weft.dev", "policy.linkerd.io", "linkerd.io"].contains(&group) {
                let faults = refusals(&object);
                assert!(faults.is_empty(), "{object}: {faults:?}");
                assert_eq!(schema_of(&object).pruned(&object), object);
                seen += 1;
            }
        }
    }
    assert!(seen >= 12, "only {seen}");
}

/// An API server refuses a definition with a rule that may take it long: it takes the longest lists and texts that a
/// schema allows, and what has no limit for as large as a request (Kubernetes, "CRD validation cost"). So everything has one.
#[test]
fn what_rules_look_at_has_limits() {
    let has_rules = |it: &Value| it.to_string().contains("x-kubernetes-validations");
    for definition in definitions().into_iter().filter(has_rules) {
        for version in definition["spec"]["versions"].as_array().expect("versions") {
            let schema = &version["schema"]["openAPIV3Schema"];
            let mut unlimited = vec![];
            without_limits(schema, "", &mut unlimited);
            let name = &definition["metadata"]["name"];
            assert!(unlimited.is_empty(), "{name}: {unlimited:?}");
            // Of what these give, API servers do not know how long it is.
            let text = schema.to_string();
            assert!(
                !text.contains(".map(") && !text.contains(".filter("),
                "{name}"
            );
        }
    }
}

/// An API server takes no other ones.
#[test]
fn schemas_are_structural() {
    for definition in definitions() {
        let name = &definition["metadata"]["name"];
        for version in definition["spec"]["versions"].as_array().expect("versions") {
            let faults = structural::faults(&version["schema"]["openAPIV3Schema"]);
            assert!(faults.is_empty(), "{name}: {faults:?}");
        }
    }
}

/// The same in numbers: a rule may cost an API server as much as it lets it, and leaves room for more of them.
#[test]
fn no_rule_may_cost_much() {
    for definition in definitions() {
        let name = &definition["metadata"]["name"];
        let mut all = 0;
        for version in definition["spec"]["versions"].as_array().expect("versions") {
            let schema = &version["schema"]["openAPIV3Schema"];
            for of in cost::of_rules(schema).expect("rules that are known") {
                assert!(of.units <= cost::MOST_OF_RULE / 2, "{name}: {of:?}");
                all += of.units;
            }
        }
        assert!(all <= cost::MOST_OF_DEFINITION / 4, "{name}: {all}");
    }
}

/// Lists below a rule, and texts that one of them compares, that have no limit.
fn without_limits(schema: &Value, path: &str, found: &mut Vec<String>) {
    let below = |name: &str| format!("{path}.{name}");
    let is_limited = match schema["type"].as_str() {
        Some("array") => schema["maxItems"].is_u64(),
        Some("string") => schema["maxLength"].is_u64() || schema["enum"].is_array(),
        _ => true,
    };
    // No rule looks at the status, and none at labels.
    let is_looked_at = path.starts_with(".spec") && !path.contains(".matchLabels");
    let of_selector = path.contains(".matchExpressions") && schema["type"] == "string";
    if is_looked_at && !is_limited && !of_selector {
        found.push(path.to_owned());
    }
    for (name, property) in schema["properties"].as_object().into_iter().flatten() {
        without_limits(property, &below(name), found);
    }
    if let Some(items) = schema.get("items") {
        without_limits(items, &below("items"), found);
    }
}

/// As they are committed: Weft's, and Linkerd's.
fn definitions() -> Vec<Value> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../daemonset");
    let mut definitions = vec![];
    for folder in ["crds", "components/crds-linkerd"] {
        for entry in std::fs::read_dir(root.join(folder)).expect("a folder") {
            let text = std::fs::read_to_string(entry.expect("an entry").path()).expect("a text");
            definitions.extend(decode::documents(&text).expect("YAML"));
        }
    }
    definitions.retain(|it| it["kind"] == "CustomResourceDefinition");
    assert_eq!(definitions.len(), 6 + 8);
    definitions
}

fn schema_of(object: &Value) -> Schema {
    let version = object["apiVersion"].as_str().expect("a version");
    let (group, version) = version.split_once('/').expect("a group");
    let mut definitions = definitions().into_iter();
    let definition = definitions
        .find(|it| it["spec"]["group"] == group && it["spec"]["names"]["kind"] == object["kind"]);
    Schema::of(&definition.expect("one of our kinds"), version).expect("a schema")
}

/// What an API server with the definitions says of an object.
fn refusals(object: &Value) -> Vec<String> {
    let schema = schema_of(object);
    schema.faults(&schema.pruned(object), None)
}

/// What the index says of it.
fn judged(object: &Value) -> Result<(), String> {
    let settings = Settings::default();
    let key = decode::identify(object).expect("an object").expect("ours");
    let read = decode::decode(&key, object).map_err(|it| it.to_string())?;
    let index = Index::new(settings, Views::default().into(), Problems::default());
    let judged = index.judge(&key, &read);
    judged.map(drop).map_err(|it| it.to_string())
}

fn object(version: &str, kind: &str, spec: &Value) -> Value {
    json!({"apiVersion": version, "kind": kind, "metadata": {"name": "a", "namespace": "shop"}, "spec": spec})
}
