//! EndpointSlices of Services that have a selector, as the controller manager writes them.
//!
//! | as the real one | not |
//! |---|---|
//! | a slice per family and per set of port numbers; at least one, if an empty one | slices are not split at 100 addresses |
//! | `ready`, `serving`, `terminating`; `publishNotReadyAddresses` | without `ipFamilies` on a Service without an address: both families |
//! | pods of the host's network; none that are completed or without address | names end in a number, not in chance |
//! | `targetRef`, `nodeName`, `zone`, hints of `trafficDistribution` | no topology mode `Auto` |

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use serde_json::{Value, json};

use crate::Store;

/// Ports of a slice: name, number, protocol of the application.
type Ports = Vec<(String, u16, Option<String>)>;

/// Writes, changes and deletes slices until they say what Services and pods do.
///
/// # Errors
/// The store does not serve EndpointSlices.
pub fn reconcile(store: &Store) -> anyhow::Result<()> {
    let objects = store.objects();
    let of_kind = |kind: &str| {
        let found = objects.iter().filter(|it| it["kind"] == kind);
        found.cloned().collect::<Vec<Arc<Value>>>()
    };
    let (pods, nodes) = (of_kind("Pod"), of_kind("Node"));
    let mut wanted = BTreeMap::new();
    for service in of_kind("Service") {
        for slice in slices_of(&service, &pods, &nodes) {
            let name = |field: &str| slice["metadata"][field].to_string();
            wanted.insert((name("namespace"), name("name")), slice);
        }
    }
    for slice in of_kind("EndpointSlice") {
        let name = |field: &str| slice["metadata"][field].to_string();
        let managed = slice["metadata"]["labels"][MANAGED_BY] == MANAGER;
        if managed && !wanted.contains_key(&(name("namespace"), name("name"))) {
            store.delete(&slice)?;
        }
    }
    for slice in wanted.values() {
        store.apply(slice)?;
    }
    Ok(())
}

const MANAGED_BY: &str = "endpointslice.kubernetes.io/managed-by";
const MANAGER: &str = "endpointslice-controller.k8s.io";

fn slices_of(service: &Value, pods: &[Arc<Value>], nodes: &[Arc<Value>]) -> Vec<Value> {
    let spec = &service["spec"];
    let selector = spec["selector"].as_object().filter(|it| !it.is_empty());
    let (Some(selector), false) = (selector, spec["type"] == "ExternalName") else {
        return vec![];
    };
    let selected = pods.iter().filter(|pod| {
        let labels = &pod["metadata"]["labels"];
        pod["metadata"]["namespace"] == service["metadata"]["namespace"]
            && selector.iter().all(|(key, value)| labels[key] == *value)
            && !matches!(
                pod["status"]["phase"].as_str(),
                Some("Succeeded" | "Failed")
            )
    });
    let selected: Vec<&Arc<Value>> = selected.collect();
    let mut slices = vec![];
    for family in families(spec) {
        let mut groups: BTreeMap<Ports, Vec<Value>> = BTreeMap::new();
        for pod in &selected {
            let address = addresses(pod).find(|it| family_of(*it) == family);
            if let Some(address) = address {
                let endpoint = endpoint(service, pod, nodes, address);
                groups
                    .entry(ports_at(spec, pod))
                    .or_default()
                    .push(endpoint);
            }
        }
        if groups.is_empty() {
            groups.insert(vec![], vec![]);
        }
        for (number, (ports, endpoints)) in groups.into_iter().enumerate() {
            slices.push(slice(service, family, number, &ports, endpoints));
        }
    }
    slices
}

fn slice(
    service: &Value,
    family: &str,
    number: usize,
    ports: &Ports,
    endpoints: Vec<Value>,
) -> Value {
    let text = |field: &str| service["metadata"][field].as_str().unwrap_or_default();
    let port = |(name, number, speaks): &(String, u16, Option<String>)| json!({"name": name, "port": number, "protocol": "TCP", "appProtocol": speaks});
    let ports: Vec<Value> = ports.iter().map(port).collect();
    // Nothing is written as null.
    let list = |it: Vec<Value>| {
        if it.is_empty() {
            Value::Null
        } else {
            it.into()
        }
    };
    json!({
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": format!("{}-{}-{number}", text("name"), family.to_lowercase()),
            "namespace": text("namespace"),
            "labels": {"kubernetes.io/service-name": text("name"), MANAGED_BY: MANAGER},
            "ownerReferences": [{"apiVersion": "v1", "kind": "Service", "name": text("name"),
                "uid": text("uid"), "controller": true, "blockOwnerDeletion": true}],
        },
        "addressType": family,
        "endpoints": list(endpoints),
        "ports": list(ports),
    })
}

fn endpoint(service: &Value, pod: &Value, nodes: &[Arc<Value>], address: IpAddr) -> Value {
    let terminating = !pod["metadata"]["deletionTimestamp"].is_null();
    let published = service["spec"]["publishNotReadyAddresses"] == true;
    let serving = is_ready(pod) || published;
    let node = &pod["spec"]["nodeName"];
    let mut endpoint = json!({
        "addresses": [address.to_string()],
        "conditions": {"ready": published || (serving && !terminating), "serving": serving,
            "terminating": terminating},
        "nodeName": node,
        "targetRef": {"kind": "Pod", "name": pod["metadata"]["name"],
            "namespace": pod["metadata"]["namespace"], "uid": pod["metadata"]["uid"]},
    });
    let place = nodes.iter().find(|it| it["metadata"]["name"] == *node);
    let zone = place.map(|it| &it["metadata"]["labels"]["topology.kubernetes.io/zone"]);
    let zone = zone.filter(|it| it.is_string());
    if let Some(zone) = zone {
        endpoint["zone"] = zone.clone();
    }
    let (by_zone, by_node) = match service["spec"]["trafficDistribution"].as_str() {
        Some("PreferClose" | "PreferSameZone") => (true, false),
        Some("PreferSameNode") => (true, true),
        _ => (false, false),
    };
    if let (true, Some(zone)) = (by_zone, zone) {
        endpoint["hints"]["forZones"] = json!([{"name": zone}]);
    }
    if by_node {
        endpoint["hints"]["forNodes"] = json!([{"name": node}]);
    }
    endpoint
}

/// The Service's ports at a pod; those with a name that the pod does not have are left out.
fn ports_at(spec: &Value, pod: &Value) -> Ports {
    let ports = spec["ports"].as_array().into_iter().flatten();
    let tcp = ports.filter(|it| matches!(it["protocol"].as_str(), None | Some("TCP")));
    let at = |port: &Value| {
        let number = match &port["targetPort"] {
            Value::String(name) => named_port(pod, name)?,
            Value::Number(number) => number.as_u64()?,
            _ => port["port"].as_u64()?,
        };
        let name = port["name"].as_str().unwrap_or_default().to_owned();
        let speaks = port["appProtocol"].as_str().map(str::to_owned);
        Some((name, u16::try_from(number).ok()?, speaks))
    };
    tcp.filter_map(at).collect()
}

fn named_port(pod: &Value, name: &str) -> Option<u64> {
    let containers = pod["spec"]["containers"].as_array()?;
    let mut ports = containers
        .iter()
        .flat_map(|it| it["ports"].as_array().into_iter().flatten());
    ports.find(|it| it["name"] == name)?["containerPort"].as_u64()
}

fn is_ready(pod: &Value) -> bool {
    let conditions = pod["status"]["conditions"].as_array();
    match conditions.filter(|it| !it.is_empty()) {
        Some(conditions) => conditions
            .iter()
            .any(|it| it["type"] == "Ready" && it["status"] == "True"),
        // A kubelet always says; who writes a pod by hand says nothing of one that runs.
        None => matches!(pod["status"]["phase"].as_str(), None | Some("" | "Running")),
    }
}

fn families(spec: &Value) -> BTreeSet<&'static str> {
    let texts = |field: &str| {
        let listed = spec[field].as_array().into_iter().flatten();
        let texts = listed.filter_map(Value::as_str).map(str::to_owned);
        texts.collect::<Vec<_>>()
    };
    let said: BTreeSet<&str> = texts("ipFamilies")
        .iter()
        .map(|it| if it == "IPv6" { "IPv6" } else { "IPv4" })
        .collect();
    let mut addresses = texts("clusterIPs");
    addresses.extend(spec["clusterIP"].as_str().map(str::to_owned));
    let parsed = addresses.iter().filter_map(|it| it.parse().ok());
    let of_addresses: BTreeSet<&str> = parsed.map(family_of).collect();
    match (said.is_empty(), of_addresses.is_empty()) {
        (false, _) => said,
        (true, false) => of_addresses,
        (true, true) => ["IPv4", "IPv6"].into(),
    }
}

fn family_of(address: IpAddr) -> &'static str {
    match address {
        IpAddr::V4(_) => "IPv4",
        IpAddr::V6(_) => "IPv6",
    }
}

fn addresses(pod: &Value) -> impl Iterator<Item = IpAddr> {
    let listed = pod["status"]["podIPs"].as_array().into_iter().flatten();
    let listed = listed.filter_map(|it| it["ip"].as_str());
    let one = pod["status"]["podIP"].as_str();
    listed.chain(one).filter_map(|it| it.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(name: &str, fields: &Value) -> Value {
        let mut pod = json!({"apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "namespace": "shop", "labels": {"app": "web"}},
            "spec": {"nodeName": "one",
                "containers": [{"name": "c", "ports": [{"name": "web", "containerPort": 8080}]}]},
            "status": {"phase": "Running", "podIPs": [{"ip": "10.1.0.1"}, {"ip": "fd01::1"}],
                "conditions": [{"type": "Ready", "status": "True"}]}});
        for (pointer, value) in fields.as_object().into_iter().flatten() {
            let (above, field) = pointer.rsplit_once('/').expect("a pointer");
            pod.pointer_mut(above).expect("there")[field] = value.clone();
        }
        pod
    }

    fn service(fields: &Value) -> Value {
        let mut service = json!({"apiVersion": "v1", "kind": "Service",
            "metadata": {"name": "web", "namespace": "shop"},
            "spec": {"clusterIPs": ["10.2.0.1"], "selector": {"app": "web"},
                "ports": [{"name": "http", "port": 80, "targetPort": "web"}]}});
        for (field, value) in fields.as_object().into_iter().flatten() {
            service["spec"][field] = value.clone();
        }
        service
    }

    /// `address:port ready/serving/terminating`, one per endpoint and port; `empty` for a slice without.
    fn shown(store: &Store) -> Vec<String> {
        let mut lines = vec![];
        for slice in store
            .objects()
            .iter()
            .filter(|it| it["kind"] == "EndpointSlice")
        {
            let Some(endpoints) = slice["endpoints"].as_array() else {
                lines.push("empty".to_owned());
                continue;
            };
            for endpoint in endpoints {
                let is = |name: &str| endpoint["conditions"][name] == true;
                let ports = slice["ports"].as_array().into_iter().flatten();
                let ports: Vec<String> = ports.map(|it| it["port"].to_string()).collect();
                lines.push(format!(
                    "{}:{} {}/{}/{}",
                    endpoint["addresses"][0].as_str().unwrap_or_default(),
                    ports.join(","),
                    is("ready"),
                    is("serving"),
                    is("terminating")
                ));
            }
        }
        lines
    }

    #[test]
    fn slices_say_what_services_and_pods_do() {
        let none = json!({});
        for (what, of_service, of_pod, expected) in [
            (
                "a pod",
                json!({}),
                none.clone(),
                vec!["10.1.0.1:8080 true/true/false"],
            ),
            (
                "two families",
                json!({"ipFamilies": ["IPv4", "IPv6"]}),
                none.clone(),
                vec![
                    "10.1.0.1:8080 true/true/false",
                    "fd01::1:8080 true/true/false",
                ],
            ),
            (
                "not ready",
                json!({}),
                json!({"/status/conditions": [{"type": "Ready", "status": "False"}]}),
                vec!["10.1.0.1:8080 false/false/false"],
            ),
            (
                "not ready, and published all the same",
                json!({"publishNotReadyAddresses": true}),
                json!({"/status/conditions": [{"type": "Ready", "status": "False"}]}),
                vec!["10.1.0.1:8080 true/true/false"],
            ),
            (
                "terminating",
                json!({}),
                json!({"/metadata/deletionTimestamp": "2026-01-01T00:00:00Z"}),
                vec!["10.1.0.1:8080 false/true/true"],
            ),
            (
                "completed",
                json!({}),
                json!({"/status/phase": "Failed"}),
                vec!["empty"],
            ),
            (
                "without address",
                json!({}),
                json!({"/status/podIPs": []}),
                vec!["empty"],
            ),
            (
                "of other labels",
                json!({}),
                json!({"/metadata/labels": {"app": "other"}}),
                vec!["empty"],
            ),
            (
                "without the named port",
                json!({"ports": [{"port": 80, "targetPort": "other"}]}),
                none.clone(),
                vec!["10.1.0.1: true/true/false"],
            ),
            (
                "by number",
                json!({"ports": [{"port": 80}, {"name": "b", "port": 81, "targetPort": 9}]}),
                none.clone(),
                vec!["10.1.0.1:80,9 true/true/false"],
            ),
            (
                "without a selector",
                json!({"selector": {}}),
                none.clone(),
                vec![],
            ),
            (
                "of a name only",
                json!({"type": "ExternalName"}),
                none.clone(),
                vec![],
            ),
        ] {
            let store = Store::of_mesh();
            store.apply(&service(&of_service)).expect("applied");
            store.apply(&pod("a", &of_pod)).expect("applied");
            reconcile(&store).expect("reconciled");
            assert_eq!(shown(&store), expected, "{what}");
            let revision = store.revision();
            reconcile(&store).expect("reconciled");
            assert_eq!(store.revision(), revision, "{what}: nothing changes twice");
            store.delete(&service(&none)).expect("deleted");
            reconcile(&store).expect("reconciled");
            assert!(shown(&store).is_empty(), "{what}");
        }
    }
}
