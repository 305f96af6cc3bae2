//! `weft check --pre`: whether a cluster can have the mesh, and whether who asks may install it. All of it is read from the API
//! server, by the user's own rights: what these do not let see is worth a look, and no error.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use weft_controller::objects::decode;

use super::{Finding, State};
use crate::install;

mod cni;
mod facts;
mod rights;

pub(super) use facts::Facts;
use facts::{Found, Kubernetes};

#[cfg(test)]
mod tests;

/// Earlier ones do not serve what the manifests and the controller ask for: EndpointSlices of `discovery.k8s.io/v1`.
const OLDEST: (u32, u32) = (1, 21);
/// Earlier ones replace agents without one beside the other.
const WITH_SURGE: (u32, u32) = (1, 22);
/// Earlier ones do not know all fields of the manifests.
const WITH_ALL_FIELDS: (u32, u32) = (1, 30);
/// What interception needs of Linux.
const OLDEST_KERNEL: (u32, u32) = (5, 15);
/// What there is an image for.
const ARCHITECTURES: [&str; 2] = ["amd64", "arm64"];
/// Nodes without a kernel of their own get no agent, by these labels.
const WITHOUT_AGENT: [(&str, &str); 2] = [
    ("eks.amazonaws.com/compute-type", "fargate"),
    ("type", "virtual-kubelet"),
];

/// All of them; without an API server the first alone.
pub(super) fn findings(facts: &Facts) -> Vec<Finding> {
    let it = match &facts.kubernetes {
        Ok(kubernetes) => kubernetes,
        Err(reason) => {
            let fact = "the Kubernetes API does not answer";
            let finding = Finding::new("kubernetes-reachable", State::Error, fact);
            return vec![Finding {
                details: vec![reason.clone()],
                ..finding
            }];
        }
    };
    let answers = format!("the Kubernetes API answers at {}", it.server);
    vec![
        Finding::new("kubernetes-reachable", State::Ok, answers),
        version(it),
        lacks(it),
        installed(it),
        definitions(it),
        meshes(it),
        cni::finding(it),
        ranges(it),
        kernels(it),
        platforms(it),
    ]
}

/// What could not be looked at.
fn unseen(check: &'static str, what: &str, reason: &str) -> Finding {
    Finding {
        details: vec![reason.to_owned()],
        ..Finding::new(check, State::Warning, format!("{what} cannot be looked at"))
    }
}

fn version(it: &Kubernetes) -> Finding {
    let check = "kubernetes-version";
    let shown = &it.version.git_version;
    // Some providers write 33+.
    let number = |text: &str| text.trim_end_matches('+').parse::<u32>().ok();
    let version = number(&it.version.major).zip(number(&it.version.minor));
    let told = |state, fact: String| Finding::new(check, state, fact);
    let Some(version) = version else {
        return told(
            State::Warning,
            format!("of Kubernetes {shown} it is not known what it can do"),
        );
    };
    let (state, details) = match version {
        it if it < OLDEST => (State::Error, "1.21 or later is needed"),
        it if it < WITH_SURGE => (
            State::Warning,
            "the component before-1.30 is needed, and a patch: updates replace agents without one beside the other",
        ),
        it if it < WITH_ALL_FIELDS => (State::Warning, "the component before-1.30 is needed"),
        _ => return told(State::Ok, format!("Kubernetes is {shown}")),
    };
    let mut finding = told(state, format!("Kubernetes is {shown}, before 1.30"));
    finding.details.push(details.to_owned());
    finding
}

fn lacks(it: &Kubernetes) -> Finding {
    let check = "rights-to-install";
    let lacks = match &it.lacks {
        Ok(lacks) => lacks.clone(),
        Err(reason) => return unseen(check, "what you may do", reason),
    };
    let good = || "you may make all that weft install prints".to_owned();
    let bad = |_| "you may not make all that weft install prints".to_owned();
    Finding::of(check, State::Error, lacks, good, bad)
}

fn installed(it: &Kubernetes) -> Finding {
    let check = "weft-installed";
    let sets = match &it.daemon_sets {
        Ok(sets) => sets,
        Err(reason) => return unseen(check, "DaemonSets", reason),
    };
    let agents = sets.iter().filter(|it| name(&it.metadata) == "weft-agent");
    let places: Vec<&str> = agents.map(|it| namespace(&it.metadata)).collect();
    let (fact, detail) = match places.first() {
        None => {
            let fact = format!("Weft is not installed in {} yet", it.namespace);
            return Finding::new(check, State::Ok, fact);
        }
        Some(place) if *place == it.namespace => (
            format!("Weft is installed in {place} already"),
            "what is asked here is for before that: weft check says how it is".to_owned(),
        ),
        Some(place) => (
            format!(
                "Weft is installed in {place} already, and not in {}",
                it.namespace
            ),
            "two meshes of one kind in a cluster take each other's pods".to_owned(),
        ),
    };
    let mut finding = Finding::new(check, State::Warning, fact);
    finding.details.push(detail);
    finding
}

/// Definitions that are there: kubectl is refused to take away a version that objects are stored in.
fn definitions(it: &Kubernetes) -> Finding {
    let check = "definitions";
    let found = match &it.own_definitions {
        Ok(found) => found,
        Err(reason) => return unseen(check, "custom resource definitions", reason),
    };
    let new = new_definitions();
    let mut details = vec![];
    let mut state = State::Ok;
    for definition in found {
        let said = difference(definition, &new);
        state = said.iter().map(|it| it.0).fold(state, State::max);
        details.extend(said.into_iter().map(|it| it.1));
    }
    let fact = match (state, found.len()) {
        (State::Ok, 0) => "no definitions of Weft are there yet".to_owned(),
        (State::Ok, count) => {
            format!("{count} definitions of Weft are there, as this version has them")
        }
        (State::Warning, _) => "definitions of another version of Weft are there".to_owned(),
        (State::Error, _) => {
            "definitions of Weft are there that this version's cannot replace".to_owned()
        }
    };
    Finding {
        details,
        ..Finding::new(check, state, fact)
    }
}

/// Those in the manifests, by name.
fn new_definitions() -> BTreeMap<String, CustomResourceDefinition> {
    let documents = decode::documents(install::ALL).unwrap_or_default();
    let definitions = documents
        .into_iter()
        .filter(|it| it["kind"] == "CustomResourceDefinition");
    let read = definitions.filter_map(|it| serde_json::from_value(it).ok());
    read.map(|it: CustomResourceDefinition| (name(&it.metadata).to_owned(), it))
        .collect()
}

fn difference(
    there: &CustomResourceDefinition,
    new: &BTreeMap<String, CustomResourceDefinition>,
) -> Vec<(State, String)> {
    let name = name(&there.metadata);
    let Some(new) = new.get(name) else {
        let line = format!("{name}: this version does not know it");
        return vec![(State::Warning, line)];
    };
    let served = |it: &CustomResourceDefinition| -> BTreeSet<String> {
        let versions = it.spec.versions.iter().filter(|it| it.served);
        versions.map(|it| it.name.clone()).collect()
    };
    let known: BTreeSet<&str> = new
        .spec
        .versions
        .iter()
        .map(|it| it.name.as_str())
        .collect();
    let stored = there.status.as_ref();
    let stored = stored.and_then(|it| it.stored_versions.as_ref());
    let mut said = vec![];
    for version in stored.into_iter().flatten() {
        if !known.contains(version.as_str()) {
            let line = format!(
                "{name}: objects are stored as {version}, which this version does not have"
            );
            said.push((State::Error, line));
        }
    }
    if there.spec.scope != new.spec.scope {
        let line = format!(
            "{name}: it is {}, and {} here",
            there.spec.scope, new.spec.scope
        );
        said.push((State::Error, line));
    }
    let (before, after) = (served(there), served(new));
    if said.is_empty() && before != after {
        let list = |it: BTreeSet<String>| it.into_iter().collect::<Vec<_>>().join(", ");
        let line = format!(
            "{name}: {} is served, and {} here",
            list(before),
            list(after)
        );
        said.push((State::Warning, line));
    }
    said
}

/// Other meshes, which Weft may be beside: they have their own pods.
fn meshes(it: &Kubernetes) -> Finding {
    let check = "another-mesh";
    let (sets, deployments) = match (&it.daemon_sets, &it.deployments) {
        (Ok(sets), Ok(deployments)) => (sets, deployments),
        (Err(reason), _) => return unseen(check, "DaemonSets", reason),
        (_, Err(reason)) => return unseen(check, "Deployments", reason),
    };
    let mut details = vec![];
    for deployment in deployments {
        let mesh = match label(&deployment.metadata, "app") {
            Some("istiod") => "Istio",
            _ => "Linkerd",
        };
        details.push(format!(
            "{mesh}: Deployment {}",
            place(&deployment.metadata)
        ));
    }
    for set in sets {
        let mesh = match name(&set.metadata) {
            "ztunnel" => "Istio's ambient mode",
            "istio-cni-node" => "Istio's CNI plugin",
            "linkerd-cni" => "Linkerd's CNI plugin",
            _ => continue,
        };
        details.push(format!("{mesh}: DaemonSet {}", place(&set.metadata)));
    }
    if details.is_empty() {
        details.extend(left_definitions(&it.definitions));
    }
    let good = || "no other mesh is there".to_owned();
    let bad = |_| "another mesh is there; pods that it has are left to it".to_owned();
    Finding::of(check, State::Warning, details, good, bad)
}

/// Definitions of meshes of which nothing else is seen.
fn left_definitions(definitions: &Found<Vec<String>>) -> Vec<String> {
    let names = definitions.as_deref().unwrap_or_default();
    let of = |group: &str| names.iter().filter(|it| it.ends_with(group)).count();
    // Those of policy.linkerd.io and linkerd.io are Weft's to bring, too: weft install --crds-linkerd.
    match of(".istio.io") {
        0 => vec![],
        count => vec![format!("Istio: {count} definitions")],
    }
}

/// Which addresses are the cluster's: agents speak in the clear to others.
fn ranges(it: &Kubernetes) -> Finding {
    let check = "address-ranges";
    let nodes = match &it.nodes {
        Ok(nodes) => nodes,
        Err(reason) => return unseen(check, "nodes", reason),
    };
    let mut details = vec![];
    let without = nodes.iter().filter(|it| {
        let spec = it.spec.as_ref();
        spec.is_none_or(|it| it.pod_cidrs.as_deref().unwrap_or_default().is_empty())
    });
    let without = without.count();
    if without > 0 {
        details.push(format!(
            "{without} of {} nodes have no podCIDRs: give the ranges of pods by --pod-range",
            nodes.len()
        ));
    }
    details.extend(cni::own_ranges(it));
    match &it.has_service_ranges {
        Ok(true) => {}
        Ok(false) => details.push(
            "there are no ServiceCIDRs: give the range of Services by --service-range".to_owned(),
        ),
        Err(reason) => details.push(format!("ServiceCIDRs cannot be looked at: {reason}")),
    }
    let good = || "the cluster says which addresses are its own".to_owned();
    let bad = |_| "weft install has to be told which addresses are the cluster's".to_owned();
    Finding::of(check, State::Warning, details, good, bad)
}

fn kernels(it: &Kubernetes) -> Finding {
    let check = "node-kernels";
    let nodes = match &it.nodes {
        Ok(nodes) => nodes,
        Err(reason) => return unseen(check, "nodes", reason),
    };
    let (mut old, mut silent, mut good) = (vec![], vec![], 0);
    for node in nodes.iter().filter(|it| gets_agent(it)) {
        let (name, kernel) = (name(&node.metadata), info(node).kernel);
        match kernel_version(kernel) {
            Some(version) if version >= OLDEST_KERNEL => good += 1,
            Some(_) => old.push(format!("{name}: Linux {kernel}")),
            None => silent.push(format!("{name}: {kernel:?}")),
        }
    }
    let otherwise = match old.is_empty() {
        true => State::Warning,
        false => State::Error,
    };
    let has_old = !old.is_empty();
    old.extend(silent);
    let fact = || format!("{good} nodes have Linux 5.15 or later");
    let bad = |count| match has_old {
        true => format!("{count} nodes do not have Linux 5.15 or later"),
        false => format!("{count} nodes do not say which kernel they have"),
    };
    Finding::of(check, otherwise, old, fact, bad)
}

fn platforms(it: &Kubernetes) -> Finding {
    let check = "node-platforms";
    let nodes = match &it.nodes {
        Ok(nodes) => nodes,
        Err(reason) => return unseen(check, "nodes", reason),
    };
    let (mut without_image, mut without_agent) = (vec![], vec![]);
    for node in nodes {
        let (name, info) = (name(&node.metadata), info(node));
        if info.system == "windows" || is_virtual(node) {
            without_agent.push(format!(
                "{name}: no agent runs there, and its pods are outside of the mesh"
            ));
        } else if !info.architecture.is_empty() && !ARCHITECTURES.contains(&info.architecture) {
            without_image.push(format!(
                "{name}: there is no image for {}",
                info.architecture
            ));
        }
    }
    let otherwise = match without_image.is_empty() {
        true => State::Warning,
        false => State::Error,
    };
    let details = [without_image, without_agent].concat();
    let good = || "there is an image for all nodes".to_owned();
    let bad = |count| format!("{count} nodes cannot have an agent");
    Finding::of(check, otherwise, details, good, bad)
}

/// What a node says of itself.
struct Info<'a> {
    kernel: &'a str,
    system: &'a str,
    architecture: &'a str,
}

fn info(node: &Node) -> Info<'_> {
    let info = node.status.as_ref().and_then(|it| it.node_info.as_ref());
    Info {
        kernel: info.map_or("", |it| &it.kernel_version),
        system: info.map_or("", |it| &it.operating_system),
        architecture: info.map_or("", |it| &it.architecture),
    }
}

fn gets_agent(node: &Node) -> bool {
    info(node).system != "windows" && !is_virtual(node)
}

fn is_virtual(node: &Node) -> bool {
    let mut labels = WITHOUT_AGENT.iter();
    labels.any(|(key, value)| label(&node.metadata, key) == Some(value))
}

/// The first two numbers: `6.1.0-13-amd64`.
fn kernel_version(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.split(|it: char| !it.is_ascii_digit());
    let mut number = || numbers.next()?.parse().ok();
    Some((number()?, number()?))
}

fn name(metadata: &ObjectMeta) -> &str {
    metadata.name.as_deref().unwrap_or_default()
}

fn namespace(metadata: &ObjectMeta) -> &str {
    metadata.namespace.as_deref().unwrap_or_default()
}

fn place(metadata: &ObjectMeta) -> String {
    format!("{}/{}", namespace(metadata), name(metadata))
}

fn label<'a>(metadata: &'a ObjectMeta, key: &str) -> Option<&'a str> {
    let labels = metadata.labels.as_ref()?;
    labels.get(key).map(String::as_str)
}

/// What a container of a DaemonSet has in a variable.
fn variable<'a>(set: &'a DaemonSet, name: &str) -> Option<&'a str> {
    let pod = set.spec.as_ref()?.template.spec.as_ref()?;
    let variables = pod.containers.iter().flat_map(|it| it.env.iter().flatten());
    let mut named = variables.filter(|it| it.name == name);
    named.next()?.value.as_deref()
}
