//! The CNI: which one it is, by its DaemonSet, and whether it is set up so that both work, by what is there to be read.

use std::collections::BTreeMap;

use super::facts::Kubernetes;
use super::{Finding, State, name, unseen, variable};

/// DaemonSets of CNIs, and whether these hand out addresses of pods by themselves.
const KNOWN: [(&str, &str, bool); 14] = [
    ("cilium", "Cilium", true),
    ("anetd", "GKE Dataplane V2", false),
    ("calico-node", "Calico", true),
    ("canal", "Canal", false),
    ("kube-flannel-ds", "Flannel", false),
    ("kube-flannel", "Flannel", false),
    ("aws-node", "the Amazon VPC CNI", true),
    ("azure-cns", "Azure CNI", true),
    ("kindnet", "kindnet", false),
    ("antrea-agent", "Antrea", false),
    ("weave-net", "Weave Net", true),
    ("kube-router", "kube-router", false),
    ("ovnkube-node", "OVN-Kubernetes", true),
    ("kube-ovn-cni", "Kube-OVN", true),
];

pub(super) fn finding(it: &Kubernetes) -> Finding {
    let check = "cni";
    let sets = match &it.daemon_sets {
        Ok(sets) => sets,
        Err(reason) => return unseen(check, "DaemonSets", reason),
    };
    let cilium = match &it.cilium {
        Ok(map) => map.as_ref().and_then(|it| it.data.as_ref()),
        Err(reason) => return unseen(check, "the ConfigMap kube-system/cilium-config", reason),
    };
    let mut details = cilium.map(of_cilium).unwrap_or_default();
    for set in sets.iter().filter(|it| name(&it.metadata) == "calico-node") {
        let is_on =
            |name: &str| variable(set, name).is_some_and(|it| it.eq_ignore_ascii_case("true"));
        let balances = variable(set, "FELIX_BPFCONNECTTIMELOADBALANCING");
        if is_on("FELIX_BPFENABLED") && balances != Some("Disabled") {
            details.push(
                "Calico exchanges addresses of Services when applications connect (FELIX_BPFENABLED): where pods have no \
                 control group of their own, FELIX_BPFCONNECTTIMELOADBALANCING=Disabled is needed"
                    .to_owned(),
            );
        }
    }
    let found = found(it);
    let names = || found.iter().map(|it| it.1).collect::<Vec<_>>().join(", ");
    let good = || match found.is_empty() {
        true => "no CNI is known by its DaemonSet".to_owned(),
        false => format!("the CNI is {}", names()),
    };
    let bad = |_| match found.is_empty() {
        true => "settings of the CNI may be in the way".to_owned(),
        false => format!(
            "the CNI is {}, and settings of it may be in the way",
            names()
        ),
    };
    Finding::of(check, State::Warning, details, good, bad)
}

/// What there is to say of ranges that the CNI has by itself.
pub(super) fn own_ranges(it: &Kubernetes) -> Vec<String> {
    let cilium = it.cilium.as_ref().ok().and_then(Option::as_ref);
    let cilium = cilium.and_then(|it| it.data.as_ref());
    let own = found(it).into_iter().filter(|it| it.2);
    let line = |(_, cni, _): &(&str, &str, bool)| {
        let pools = cilium.filter(|_| *cni == "Cilium").map(pools);
        match pools {
            // It takes those of the nodes.
            Some(None) => None,
            Some(Some(pools)) if !pools.is_empty() => Some(format!(
                "{cni} hands out addresses of pods by itself: --pod-range {}",
                pools.join(" --pod-range ")
            )),
            _ => Some(format!(
                "{cni} may hand out addresses of pods by itself: give their ranges by --pod-range"
            )),
        }
    };
    own.filter_map(|it| line(&it)).collect()
}

fn found(it: &Kubernetes) -> Vec<(&'static str, &'static str, bool)> {
    let sets = it.daemon_sets.as_deref().unwrap_or_default();
    let is_there = |known: &str| sets.iter().any(|it| name(&it.metadata) == known);
    KNOWN.into_iter().filter(|it| is_there(it.0)).collect()
}

fn of_cilium(data: &BTreeMap<String, String>) -> Vec<String> {
    let value = |key: &str| data.get(key).map_or("", String::as_str);
    let mut details = vec![];
    // "strict" and "partial" are of versions before 1.14.
    let replaces = matches!(value("kube-proxy-replacement"), "true" | "strict");
    let balances = replaces || value("bpf-lb-sock") == "true";
    if balances && value("bpf-lb-sock-hostns-only") != "true" {
        let by = match replaces {
            true => "kube-proxy-replacement",
            false => "bpf-lb-sock",
        };
        details.push(format!(
            "Cilium exchanges addresses of Services when applications connect ({by}): where pods have no control group of \
             their own, socketLB.hostNamespaceOnly=true is needed"
        ));
    }
    // As its agent has it without being told.
    if value("cni-exclusive") != "false" {
        details.push(
            "Cilium removes configurations of other CNI plugins (cni-exclusive): the component cni needs cni.exclusive=false"
                .to_owned(),
        );
    }
    details
}

/// The pools of Cilium; none: it takes the ranges of nodes.
fn pools(data: &BTreeMap<String, String>) -> Option<Vec<String>> {
    let value = |key: &str| data.get(key).map_or("", String::as_str);
    if value("ipam") == "kubernetes" {
        return None;
    }
    let pools = ["cluster-pool-ipv4-cidr", "cluster-pool-ipv6-cidr"].map(value);
    let pools = pools.iter().flat_map(|it| it.split([' ', ',']));
    let pools = pools.filter(|it| !it.is_empty());
    Some(pools.map(str::to_owned).collect())
}
