//! NetworkPolicies of Kubernetes: what is kept of them, and what they let in at the pods that they select.
//!
//! Only ingress: what leaves a pod is looked at where it arrives, if that is in the mesh.
//!
//! Agents are told names of pods, and namespaces where all of their pods are meant: so most policies change when
//! namespaces do, and not whenever a pod comes or goes. Whom a policy means is found out once, not for each pod
//! that it selects.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, OnceLock};

use k8s_openapi::api::networking::v1::{
    IPBlock, NetworkPolicy, NetworkPolicyIngressRule, NetworkPolicyPeer, NetworkPolicyPort,
};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use serde_json::Value;
use weft_core::{
    Name, NetworkMatch, NetworkPods, NetworkRule, NetworkRules, NetworkSources, ObjectName,
    PortRanges,
};

use super::Index;
use super::pods::PodRecord;
use super::policies::{PortChoice, few, network, port_choice};
use super::selector::Selector;
use crate::objects::Fault;

/// All of them.
#[derive(Debug, Default)]
pub(super) struct NetworkPolicies(HashMap<Name, BTreeMap<ObjectName, NetworkPolicyRecord>>);

/// A policy.
#[derive(Clone, Debug)]
pub(super) struct NetworkPolicyRecord {
    selector: Selector,
    /// None: it is not about ingress.
    ingress: Option<Vec<RuleRecord>>,
    /// Whether it was never readable: it lets nobody in.
    pub(super) closed: bool,
    /// Whom each rule means, since that was asked first. None: anybody.
    meant: OnceLock<Vec<Option<NetworkSources>>>,
}

#[derive(Clone, Debug, PartialEq)]
struct RuleRecord {
    /// None: all ports.
    ports: Option<Vec<PortRecord>>,
    /// None: anybody.
    peers: Option<Vec<PeerRecord>>,
}

#[derive(Clone, Debug, PartialEq)]
enum PortRecord {
    All,
    Range(u16, u16),
    /// Of the selected pod.
    Named(String),
}

#[derive(Clone, Debug, PartialEq)]
enum PeerRecord {
    Block(NetworkMatch),
    Pods {
        /// Of which namespaces; none: the policy's own.
        namespaces: Option<Selector>,
        pods: Selector,
    },
}

/// What policies let in at a pod.
#[derive(Debug, Default)]
pub(super) struct LetIn {
    /// None: no policy selects it.
    pub(super) rules: Option<Arc<NetworkRules>>,
    /// What is too much to be told.
    pub(super) faults: Vec<Fault>,
}

impl NetworkPolicies {
    pub(super) fn get(&self, name: &ObjectName) -> Option<&NetworkPolicyRecord> {
        self.0.get(&name.namespace)?.get(name)
    }

    fn put(
        &mut self,
        name: &ObjectName,
        record: Option<NetworkPolicyRecord>,
    ) -> Option<NetworkPolicyRecord> {
        let Some(record) = record else {
            let there = self.0.get_mut(&name.namespace)?;
            let before = there.remove(name);
            if there.is_empty() {
                self.0.remove(&name.namespace);
            }
            return before;
        };
        let there = self.0.entry(name.namespace.clone()).or_default();
        there.insert(name.clone(), record)
    }

    /// Those that may select pods of a namespace.
    fn of(&self, namespace: &Name) -> impl Iterator<Item = (&ObjectName, &NetworkPolicyRecord)> {
        self.0.get(namespace).into_iter().flatten()
    }

    fn all(&self) -> impl Iterator<Item = (&ObjectName, &NetworkPolicyRecord)> {
        self.0.values().flatten()
    }
}

impl NetworkPolicyRecord {
    /// Checks a policy.
    ///
    /// # Errors
    /// The first field that cannot be used.
    pub(super) fn check(policy: &NetworkPolicy) -> Result<Self, Fault> {
        let spec = policy.spec.as_ref();
        let spec = spec.ok_or_else(|| Fault::new("spec", "missing"))?;
        let selector = spec.pod_selector.clone().unwrap_or_default();
        let types = spec.policy_types.as_deref().unwrap_or_default();
        if let Some(odd) = types.iter().find(|it| !TYPES.contains(&it.as_str())) {
            let shown: String = odd.chars().take(64).collect();
            let reason = format!("{shown:?} is neither Ingress nor Egress");
            return Err(Fault::new("spec.policyTypes", reason));
        }
        let written = spec.ingress.as_deref().unwrap_or_default();
        few("spec.ingress", written.len(), MAX_RULES)?;
        let rules = written.iter().enumerate();
        let rules = rules.map(|(index, it)| rule(&format!("spec.ingress[{index}]"), it));
        let rules = rules.collect::<Result<Vec<_>, Fault>>()?;
        Ok(Self {
            selector: Selector::check("spec.podSelector", &selector)?,
            ingress: is_about_ingress(types).then_some(rules),
            closed: false,
            meant: OnceLock::new(),
        })
    }

    /// What a policy that cannot be read, and never could, closes: the pods that it may have meant, unless it says
    /// that it is not about ingress.
    pub(super) fn closed(spec: &Value) -> Self {
        let selector = spec.get("podSelector").cloned();
        let selector = selector.and_then(|it| serde_json::from_value(it).ok());
        let selector = selector.and_then(|it| Selector::check("spec.podSelector", &it).ok());
        let types = spec.get("policyTypes").cloned();
        let types: Option<Vec<String>> = types.and_then(|it| serde_json::from_value(it).ok());
        let types = types.filter(|it| it.iter().all(|it| TYPES.contains(&it.as_str())));
        Self {
            selector: selector.unwrap_or_default(),
            ingress: is_about_ingress(&types.unwrap_or_default()).then(Vec::new),
            closed: true,
            meant: OnceLock::new(),
        }
    }

    fn peers(&self) -> impl Iterator<Item = &PeerRecord> {
        let rules = self.ingress.iter().flatten();
        rules.flat_map(|it| it.peers.iter().flatten())
    }
}

/// As Kubernetes has it: where nothing is written it is.
fn is_about_ingress(types: &[String]) -> bool {
    types.is_empty() || types.iter().any(|it| it == TYPES[0])
}

impl PeerRecord {
    /// Whether it means pods by what their namespace is called.
    fn is_by_namespace(&self) -> bool {
        let Self::Pods { namespaces, .. } = self else {
            return false;
        };
        namespaces.is_some()
    }

    /// Whether it means pods of some labels, not all of a namespace.
    fn is_by_labels(&self) -> bool {
        matches!(self, Self::Pods { pods, .. } if !pods.selects_all())
    }
}

impl Index {
    pub(super) fn set_network_policy(
        &mut self,
        name: &ObjectName,
        record: Option<NetworkPolicyRecord>,
    ) {
        let now = record.as_ref().map(|it| it.selector.clone());
        let before = self.network_policies.put(name, record);
        let selectors = before.map(|it| it.selector).into_iter().chain(now);
        for selector in selectors {
            self.dirty_selected(&name.namespace, &selector);
        }
    }

    /// A pod appeared, changed or went: some policies may mean it that did not, or the other way round.
    pub(super) fn network_peer_changed(&mut self, before: Option<&PodRecord>, pod: &ObjectName) {
        self.network_changed(|index, name, peer| {
            let is_meant =
                |pod: Option<&PodRecord>| pod.is_some_and(|it| index.is_peer(name, peer, it));
            peer.is_by_labels() && is_meant(before) != is_meant(index.pods.get(pod))
        });
    }

    /// There is another namespace with pods, or the labels of one are others.
    pub(super) fn network_namespace_changed(&mut self) {
        self.network_changed(|_, _, peer| peer.is_by_namespace());
    }

    /// Makes anew what follows from policies that have such a peer.
    fn network_changed(&mut self, is_affected: impl Fn(&Self, &ObjectName, &PeerRecord) -> bool) {
        let affected = self.network_policies.all().filter(|(name, policy)| {
            let mut peers = policy.peers();
            peers.any(|it| is_affected(self, name, it))
        });
        let affected: Vec<(ObjectName, NetworkPolicyRecord)> = affected
            .map(|(name, it)| (name.clone(), it.clone()))
            .collect();
        for (name, mut policy) in affected {
            policy.meant = OnceLock::new();
            self.set_network_policy(&name, Some(policy));
        }
    }

    /// What policies let in at a pod.
    pub(super) fn network_rules(&self, pod: &PodRecord) -> LetIn {
        let mut let_in = LetIn::default();
        let mut told = NetworkRules {
            policies: vec![],
            rules: vec![],
        };
        let mut room = MAX_BYTES;
        for (name, policy) in self.network_policies.of(&pod.id.0.namespace) {
            let Some(rules) = &policy.ingress else {
                continue;
            };
            if !policy.selector.selects(&pod.labels) {
                continue;
            }
            if told.policies.len() < MAX_NAMED {
                told.policies.push(name.clone());
            }
            for (index, (rule, sources)) in rules.iter().zip(self.meant(name, policy)).enumerate() {
                let Some(rule) = rule_at(rule, sources.as_ref(), pod) else {
                    continue;
                };
                match room.checked_sub(size(&rule)) {
                    Some(left) => {
                        room = left;
                        told.rules.push(rule);
                    }
                    None => {
                        let reason = format!(
                            "selected by NetworkPolicy {name}, of which ingress[{index}] does not fit into \
                             {MAX_BYTES} bytes for agents: too many pods, networks or ports"
                        );
                        let_in.faults.push(Fault::new("metadata.labels", reason));
                    }
                }
            }
        }
        let_in.rules = (!told.policies.is_empty()).then(|| Arc::new(told));
        let_in
    }

    /// Whom each rule of a policy means; none: anybody.
    fn meant<'a>(
        &self,
        name: &ObjectName,
        policy: &'a NetworkPolicyRecord,
    ) -> &'a [Option<NetworkSources>] {
        policy.meant.get_or_init(|| {
            let rules = policy.ingress.iter().flatten();
            let of_rule = |it: &RuleRecord| {
                let peers = it.peers.as_ref()?;
                Some(self.sources(name, peers))
            };
            rules.map(of_rule).collect()
        })
    }

    fn sources(&self, policy: &ObjectName, peers: &[PeerRecord]) -> NetworkSources {
        let networks = peers.iter().filter_map(|it| match it {
            PeerRecord::Block(block) => Some(block.clone()),
            PeerRecord::Pods { .. } => None,
        });
        let mut sources = NetworkSources::networks(networks.collect());
        for peer in peers {
            let PeerRecord::Pods { namespaces, pods } = peer else {
                continue;
            };
            for (namespace, members) in &self.pods_in {
                if !self.is_of(policy, namespaces.as_ref(), namespace) {
                    continue;
                }
                if pods.selects_all() {
                    sources.add(namespace.clone(), NetworkPods::All);
                    continue;
                }
                let members = members.iter().filter_map(|it| self.pods.get(it));
                let meant = members.filter(|pod| self.is_peer(policy, peer, pod));
                let names: Vec<Name> = meant.map(|it| it.id.0.name.clone()).collect();
                if !names.is_empty() {
                    sources.add(namespace.clone(), NetworkPods::Named(names));
                }
            }
        }
        sources
    }

    /// Whether a pod is meant. Those that have their node's addresses count as that node, and are not.
    fn is_peer(&self, policy: &ObjectName, peer: &PeerRecord, pod: &PodRecord) -> bool {
        let PeerRecord::Pods { namespaces, pods } = peer else {
            return false;
        };
        pod.is_workload()
            && pods.selects(&pod.labels)
            && self.is_of(policy, namespaces.as_ref(), &pod.id.0.namespace)
    }

    /// Whether pods of a namespace may be meant.
    fn is_of(&self, policy: &ObjectName, namespaces: Option<&Selector>, namespace: &Name) -> bool {
        let Some(selector) = namespaces else {
            return *namespace == policy.namespace;
        };
        let known = self.namespaces.get(namespace);
        selector.selects_with(|key| match key {
            // Kubernetes gives each namespace its name as a label.
            NAME_LABEL => Some(namespace.as_str()),
            _ => known?.labels.get(key).map(String::as_str),
        })
    }

    fn dirty_selected(&mut self, namespace: &Name, selector: &Selector) {
        let names = self.pods_in.get(namespace).into_iter().flatten();
        let selected = names.filter(|name| {
            let pod = self.pods.get(*name);
            pod.is_some_and(|it| selector.selects(&it.labels))
        });
        self.dirty.pods.extend(selected.cloned());
    }
}

/// A rule as it applies to a pod. None: it is for no port of it.
fn rule_at(
    rule: &RuleRecord,
    sources: Option<&NetworkSources>,
    pod: &PodRecord,
) -> Option<NetworkRule> {
    let ports = rule.ports.as_ref().map(|ports| {
        let mut ranges = vec![];
        for port in ports {
            match port {
                PortRecord::All => ranges.push((1, u16::MAX)),
                PortRecord::Range(first, last) => ranges.push((*first, *last)),
                PortRecord::Named(name) => ranges.extend(pod.ports_named(name).map(|it| (it, it))),
            }
        }
        PortRanges::new(ranges)
    });
    if ports.as_ref().is_some_and(PortRanges::is_empty) {
        return None;
    }
    Some(NetworkRule {
        ports,
        sources: sources.cloned(),
    })
}

/// How many bytes a rule takes for agents, about.
fn size(rule: &NetworkRule) -> usize {
    let ports = rule.ports.as_ref().map_or(0, |it| it.ranges().len());
    let Some(sources) = &rule.sources else {
        return 16 + 10 * ports;
    };
    let networks = sources.networks.iter();
    let networks: usize = networks.map(|it| 48 * (1 + it.except.len())).sum();
    let pods = sources.pods().iter().map(|(namespace, pods)| match pods {
        NetworkPods::All => 8 + namespace.as_str().len(),
        NetworkPods::Named(names) => {
            let names: usize = names.iter().map(|it| 4 + it.as_str().len()).sum();
            8 + namespace.as_str().len() + names
        }
    });
    16 + 10 * ports + networks + pods.sum::<usize>()
}

fn rule(field: &str, written: &NetworkPolicyIngressRule) -> Result<RuleRecord, Fault> {
    let ports = written.ports.as_deref().unwrap_or_default();
    let peers = written.from.as_deref().unwrap_or_default();
    few(&format!("{field}.ports"), ports.len(), MAX_PARTS)?;
    few(&format!("{field}.from"), peers.len(), MAX_PARTS)?;
    let mut read_ports = vec![];
    for (index, it) in ports.iter().enumerate() {
        read_ports.extend(port(&format!("{field}.ports[{index}]"), it)?);
    }
    let mut read_peers = vec![];
    for (index, it) in peers.iter().enumerate() {
        read_peers.push(peer(&format!("{field}.from[{index}]"), it)?);
    }
    Ok(RuleRecord {
        ports: (!ports.is_empty()).then_some(read_ports),
        peers: (!peers.is_empty()).then_some(read_peers),
    })
}

/// None: it is not of TCP.
fn port(field: &str, written: &NetworkPolicyPort) -> Result<Option<PortRecord>, Fault> {
    match written.protocol.as_deref() {
        None | Some("" | "TCP") => {}
        Some("UDP" | "SCTP") => return Ok(None),
        Some(_) => {
            let reason = "none of TCP, UDP and SCTP";
            return Err(Fault::new(format!("{field}.protocol"), reason));
        }
    }
    let number = |name: &str, number: i32| {
        let port = u16::try_from(number).ok().filter(|it| *it != 0);
        port.ok_or_else(|| Fault::new(format!("{field}.{name}"), "no port: 1 to 65535"))
    };
    Ok(Some(match (&written.port, written.end_port) {
        (None, None) => PortRecord::All,
        (Some(IntOrString::Int(first)), end) => {
            let first = number("port", *first)?;
            let last = end.map_or(Ok(first), |it| number("endPort", it))?;
            if last < first {
                let reason = "smaller than the port";
                return Err(Fault::new(format!("{field}.endPort"), reason));
            }
            PortRecord::Range(first, last)
        }
        (Some(name @ IntOrString::String(_)), None) => match port_choice(name) {
            Ok(PortChoice::Named(name)) => PortRecord::Named(name),
            Ok(_) => PortRecord::All,
            Err(fault) => return Err(Fault::new(format!("{field}.port"), fault.reason)),
        },
        (None | Some(IntOrString::String(_)), Some(_)) => {
            let reason = "needs a port that is a number";
            return Err(Fault::new(format!("{field}.endPort"), reason));
        }
    }))
}

fn peer(field: &str, written: &NetworkPolicyPeer) -> Result<PeerRecord, Fault> {
    let selector = |name: &str, it: &Option<_>| {
        let field = format!("{field}.{name}");
        let selector = it.as_ref().map(|it| Selector::check(&field, it));
        selector.transpose()
    };
    let namespaces = selector("namespaceSelector", &written.namespace_selector)?;
    let pods = selector("podSelector", &written.pod_selector)?;
    match (&written.ip_block, namespaces, pods) {
        (Some(block), None, None) => Ok(PeerRecord::Block(ip_block(field, block)?)),
        (None, None, None) => Err(Fault::new(field, "says nothing")),
        (None, namespaces, pods) => Ok(PeerRecord::Pods {
            namespaces,
            pods: pods.unwrap_or_default(),
        }),
        (Some(_), _, _) => {
            let reason = "ipBlock and selectors exclude each other";
            Err(Fault::new(field, reason))
        }
    }
}

fn ip_block(field: &str, block: &IPBlock) -> Result<NetworkMatch, Fault> {
    let written = block.except.as_deref().unwrap_or_default();
    few(&format!("{field}.ipBlock.except"), written.len(), MAX_PARTS)?;
    let cidr = network(&format!("{field}.ipBlock.cidr"), &block.cidr)?;
    let mut except = vec![];
    for (index, it) in written.iter().enumerate() {
        let field = format!("{field}.ipBlock.except[{index}]");
        let part = network(&field, it)?;
        if part == cidr || !cidr.contains(&part) {
            let reason = format!("{part} is no part of {cidr}");
            return Err(Fault::new(field, reason));
        }
        except.push(part);
    }
    Ok(NetworkMatch { cidr, except })
}

const TYPES: [&str; 2] = ["Ingress", "Egress"];
const NAME_LABEL: &str = "kubernetes.io/metadata.name";
const MAX_RULES: usize = 256;
/// Of each list in a rule.
const MAX_PARTS: usize = 256;
/// Policies of a pod that agents are told the names of.
const MAX_NAMED: usize = 16;
/// For all rules of a pod, within what one resource may take.
const MAX_BYTES: usize = 768 * 1024;
