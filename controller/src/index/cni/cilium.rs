//! Whom policies of Cilium select: endpoint selectors, whose labels say where they come from (`pkg/policy/api` and
//! `pkg/k8s/apis/cilium.io/utils`).

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use serde_json::Value;

use super::few_terms;
use crate::index::selector::Selector;
use crate::objects::Fault;

/// What Cilium gives pods besides their own labels: their namespace,
pub(super) const NAMESPACE: &str = "io.kubernetes.pod.namespace";
/// their service account,
pub(super) const ACCOUNT: &str = "io.cilium.k8s.policy.serviceaccount";
/// and with this before them, their namespace's labels.
pub(super) const OF_NAMESPACE: &str = "io.cilium.k8s.namespace.labels.";

/// Reads whom a policy selects: pods that any one selects.
///
/// # Errors
/// One of them cannot be read.
pub(super) fn read(
    spec: &Value,
    specs: &Value,
    is_namespaced: bool,
) -> Result<Vec<Selector>, Fault> {
    let mut all = vec![];
    if !spec.is_null() {
        all.push(("spec".to_owned(), spec));
    }
    match specs {
        Value::Null => {}
        Value::Array(specs) => {
            let specs = specs.iter().enumerate();
            all.extend(specs.map(|(index, it)| (format!("specs[{index}]"), it)));
        }
        _ => return Err(Fault::new("specs", "no list")),
    }
    if all.is_empty() {
        return Err(Fault::new("spec", "missing"));
    }
    let mut selectors = vec![];
    let mut terms = 0;
    for (field, spec) in all {
        // Of nodes: they are no pods.
        if spec.get("nodeSelector").is_some_and(|it| !it.is_null()) {
            continue;
        }
        let field = format!("{field}.endpointSelector");
        match spec.get("endpointSelector") {
            None | Some(Value::Null) => return Err(Fault::new(field, "missing")),
            Some(written) => {
                let selector = endpoint_selector(&field, written, is_namespaced)?;
                terms += selector.terms().max(1);
                few_terms(terms)?;
                selectors.push(selector);
            }
        }
    }
    Ok(selectors)
}

/// Without what it says of labels that nobody here knows: it may select whom they are for.
fn endpoint_selector(field: &str, written: &Value, is_namespaced: bool) -> Result<Selector, Fault> {
    let selector = serde_json::from_value::<LabelSelector>(written.clone());
    let mut selector = selector.map_err(|reason| Fault::new(field, reason))?;
    let labels = selector.match_labels.take().unwrap_or_default();
    let labels = labels.into_iter();
    let labels: BTreeMap<String, String> = labels
        .filter_map(|(key, value)| Some((known(&key)?.to_owned(), value)))
        // A policy that has a namespace is for that one, whatever it asks for.
        .filter(|(key, _)| !(is_namespaced && key == NAMESPACE))
        .collect();
    selector.match_labels = Some(labels);
    let mut expressions = selector.match_expressions.take().unwrap_or_default();
    expressions.retain_mut(|it| match known(&it.key).map(str::to_owned) {
        Some(key) => {
            it.key = key;
            true
        }
        None => false,
    });
    selector.match_expressions = Some(expressions);
    Selector::check(field, &selector)
}

/// A label without its source, if that is Kubernetes, or any. None: nobody here knows whether a pod has it.
fn known(label: &str) -> Option<&str> {
    let label = match label.split_once(':') {
        None if label.starts_with('$') || label.starts_with("reserved.") => return None,
        None => label,
        Some(("k8s" | "any", label)) => label,
        Some(_) => return None,
    };
    let is_told = label == NAMESPACE || label == ACCOUNT || label.starts_with(OF_NAMESPACE);
    // Cilium's own, as that of its cluster.
    let is_own = label.starts_with("io.cilium.") || label.starts_with("io.kubernetes.");
    (is_told || !is_own).then_some(label)
}
