//! NetworkPolicies of Kubernetes: what is kept of them, and what they let in at the pods that they select, and out of
//! them. How they are read is in `read`, what is different about egress in `egress`.
//!
//! Agents are told names of pods, and namespaces where all of their pods are meant: so most policies change when
//! namespaces do, and not whenever a pod comes or goes. Whom a policy means is found out once, not for each pod
//! that it selects.

mod egress;
mod read;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, OnceLock};

use weft_core::{
    Name, NetworkMatch, NetworkPeers, NetworkPods, NetworkRule, NetworkRules, ObjectName,
    PortRanges,
};

use super::Index;
use super::pods::PodRecord;
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
    /// None: it is not about egress.
    egress: Option<Vec<RuleRecord>>,
    /// Whether it was never readable: it lets nobody in, and nothing out.
    pub(super) closed: bool,
    /// Whom each rule of ingress means, since that was asked first. None: anybody.
    meant: OnceLock<Vec<Option<NetworkPeers>>>,
    /// What each rule of egress lets out, since that was asked first: the same at all pods.
    let_out: OnceLock<Vec<Vec<NetworkRule>>>,
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
    /// Of the server's pod: of ingress the selected one, of egress the one that is connected to.
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

/// What policies let in at a pod, and out of it.
#[derive(Debug)]
pub(super) struct LetThrough {
    /// None: no policy of ingress selects it.
    pub(super) ingress: Option<Arc<NetworkRules>>,
    /// None: no policy of egress selects it.
    pub(super) egress: Option<Arc<NetworkRules>>,
    /// What is too much to be told.
    pub(super) faults: Vec<Fault>,
}

/// One of the types of policies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    Ingress,
    Egress,
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
    /// None: it is not about that.
    fn rules(&self, of: Direction) -> Option<&[RuleRecord]> {
        match of {
            Direction::Ingress => self.ingress.as_deref(),
            Direction::Egress => self.egress.as_deref(),
        }
    }

    fn peers(&self) -> impl Iterator<Item = &PeerRecord> {
        let rules = self.ingress.iter().chain(&self.egress).flatten();
        rules.flat_map(|it| it.peers.iter().flatten())
    }
}

impl Direction {
    /// The field of a policy's `spec` that has the rules.
    fn field(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        }
    }
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
        self.network_changed(|index, name, policy| {
            let now = index.pods.get(pod);
            let is_affected = |peer: &PeerRecord| {
                let is_meant =
                    |pod: Option<&PodRecord>| pod.is_some_and(|it| index.is_peer(name, peer, it));
                peer.is_by_labels() && is_meant(before) != is_meant(now)
            };
            policy.peers().any(is_affected) || index.has_other_ports(name, policy, before, now)
        });
    }

    /// There is another namespace with pods, or the labels of one are others.
    pub(super) fn network_namespace_changed(&mut self) {
        self.network_changed(|_, _, policy| policy.peers().any(PeerRecord::is_by_namespace));
    }

    /// Makes anew what follows from policies that are affected.
    fn network_changed(
        &mut self,
        is_affected: impl Fn(&Self, &ObjectName, &NetworkPolicyRecord) -> bool,
    ) {
        let all = self.network_policies.all();
        let affected = all.filter(|(name, policy)| is_affected(self, name, policy));
        let affected: Vec<(ObjectName, NetworkPolicyRecord)> = affected
            .map(|(name, it)| (name.clone(), it.clone()))
            .collect();
        for (name, mut policy) in affected {
            policy.meant = OnceLock::new();
            policy.let_out = OnceLock::new();
            self.set_network_policy(&name, Some(policy));
        }
    }

    /// What policies let in at a pod, and out of it.
    pub(super) fn network_rules(&self, pod: &PodRecord) -> LetThrough {
        let (mut room, mut faults) = (MAX_BYTES, vec![]);
        let mut rules = |of| self.rules_for(pod, of, &mut room, &mut faults);
        let (ingress, egress) = (rules(Direction::Ingress), rules(Direction::Egress));
        LetThrough {
            ingress,
            egress,
            faults,
        }
    }

    /// The same of one direction; `room` is for so many bytes more.
    fn rules_for(
        &self,
        pod: &PodRecord,
        of: Direction,
        room: &mut usize,
        faults: &mut Vec<Fault>,
    ) -> Option<Arc<NetworkRules>> {
        let mut told = NetworkRules {
            policies: vec![],
            rules: vec![],
        };
        for (name, policy) in self.network_policies.of(&pod.id.0.namespace) {
            let Some(rules) = policy.rules(of) else {
                continue;
            };
            if !policy.selector.selects(&pod.labels) {
                continue;
            }
            if told.policies.len() < MAX_NAMED {
                told.policies.push(name.clone());
            }
            let rules: Vec<Vec<NetworkRule>> = match of {
                Direction::Ingress => {
                    let rules = rules.iter().zip(self.meant(name, policy));
                    let at_pod = rules.map(|(rule, peers)| rule_at(rule, peers.as_ref(), pod));
                    at_pod.map(|it| it.into_iter().collect()).collect()
                }
                Direction::Egress => self.rules_out(name, policy).to_vec(),
            };
            for (index, rules) in rules.into_iter().enumerate() {
                match room.checked_sub(rules.iter().map(size).sum()) {
                    Some(left) => {
                        *room = left;
                        told.rules.extend(rules);
                    }
                    None => {
                        let field = of.field();
                        let reason = format!(
                            "selected by NetworkPolicy {name}, of which {field}[{index}] does not fit into \
                             {MAX_BYTES} bytes for agents: too many pods, networks or ports"
                        );
                        faults.push(Fault::new("metadata.labels", reason));
                    }
                }
            }
        }
        (!told.policies.is_empty()).then(|| Arc::new(told))
    }

    /// Whom each rule of a policy means; none: anybody.
    fn meant<'a>(
        &self,
        name: &ObjectName,
        policy: &'a NetworkPolicyRecord,
    ) -> &'a [Option<NetworkPeers>] {
        policy.meant.get_or_init(|| {
            let rules = policy.ingress.iter().flatten();
            let of_rule = |it: &RuleRecord| {
                let peers = it.peers.as_ref()?;
                Some(self.told_peers(name, peers))
            };
            rules.map(of_rule).collect()
        })
    }

    /// Whom peers mean, as agents are told.
    fn told_peers(&self, policy: &ObjectName, peers: &[PeerRecord]) -> NetworkPeers {
        let networks = peers.iter().filter_map(|it| match it {
            PeerRecord::Block(block) => Some(block.clone()),
            PeerRecord::Pods { .. } => None,
        });
        let mut told = NetworkPeers::networks(networks.collect());
        for peer in peers {
            let PeerRecord::Pods { namespaces, pods } = peer else {
                continue;
            };
            for (namespace, members) in &self.pods_in {
                if !self.is_of(policy, namespaces.as_ref(), namespace) {
                    continue;
                }
                if pods.selects_all() {
                    told.add(namespace.clone(), NetworkPods::All);
                    continue;
                }
                let members = members.iter().filter_map(|it| self.pods.get(it));
                let meant = members.filter(|pod| self.is_peer(policy, peer, pod));
                let names: Vec<Name> = meant.map(|it| it.id.0.name.clone()).collect();
                if !names.is_empty() {
                    told.add(namespace.clone(), NetworkPods::Named(names));
                }
            }
        }
        told
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

impl RuleRecord {
    /// The ports that are given by name.
    fn port_names(&self) -> impl Iterator<Item = &str> {
        let ports = self.ports.iter().flatten();
        ports.filter_map(|it| match it {
            PortRecord::Named(name) => Some(name.as_str()),
            PortRecord::All | PortRecord::Range(..) => None,
        })
    }

    /// Those that are given by number, from one to another.
    fn port_numbers(&self) -> impl Iterator<Item = (u16, u16)> {
        let ports = self.ports.iter().flatten();
        ports.filter_map(|it| match it {
            PortRecord::All => Some((1, u16::MAX)),
            PortRecord::Range(first, last) => Some((*first, *last)),
            PortRecord::Named(_) => None,
        })
    }
}

/// A rule as it applies to a pod. None: it is for no port of it.
fn rule_at(
    rule: &RuleRecord,
    peers: Option<&NetworkPeers>,
    pod: &PodRecord,
) -> Option<NetworkRule> {
    let ports = rule.ports.is_some().then(|| {
        let named = rule.port_names().flat_map(|it| pod.ports_named(it));
        PortRanges::new(rule.port_numbers().chain(named.map(|it| (it, it))))
    });
    if ports.as_ref().is_some_and(PortRanges::is_empty) {
        return None;
    }
    Some(NetworkRule {
        ports,
        peers: peers.cloned(),
    })
}

/// How many bytes a rule takes for agents, about.
fn size(rule: &NetworkRule) -> usize {
    let ports = rule.ports.as_ref().map_or(0, |it| it.ranges().len());
    let Some(peers) = &rule.peers else {
        return 16 + 10 * ports;
    };
    let networks = peers.networks.iter();
    let networks: usize = networks.map(|it| 48 * (1 + it.except.len())).sum();
    let pods = peers.pods().iter().map(|(namespace, pods)| match pods {
        NetworkPods::All => 8 + namespace.as_str().len(),
        NetworkPods::Named(names) => {
            let names: usize = names.iter().map(|it| 4 + it.as_str().len()).sum();
            8 + namespace.as_str().len() + names
        }
    });
    16 + 10 * ports + networks + pods.sum::<usize>()
}

/// Kubernetes gives each namespace its name as a label.
pub(super) const NAME_LABEL: &str = "kubernetes.io/metadata.name";
/// Policies of a pod that agents are told the names of, of each direction.
const MAX_NAMED: usize = 16;
/// For all rules of a pod, within what one resource may take.
const MAX_BYTES: usize = 768 * 1024;
