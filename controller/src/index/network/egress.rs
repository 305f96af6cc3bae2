//! What NetworkPolicies let pods connect to.
//!
//! A port's name is one of the pod that is connected to: so each number that it has somewhere is told with the pods that
//! have it there. Within an `ipBlock` it is told with their addresses.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use weft_core::{
    Name, NetworkMatch, NetworkPeers, NetworkPods, NetworkRule, ObjectName, PortRanges,
};

use super::{NetworkPolicyRecord, PeerRecord, RuleRecord};
use crate::index::Index;
use crate::index::pods::PodRecord;

/// Where a pod is meant by a rule that has names of ports.
#[derive(Debug, PartialEq)]
struct Meant {
    /// The numbers that these names have there.
    ports: BTreeSet<u16>,
    /// At these addresses; none: at all of them.
    addresses: Option<Vec<IpAddr>>,
}

impl RuleRecord {
    fn has_port_names(&self) -> bool {
        self.port_names().next().is_some()
    }
}

impl Index {
    /// What each rule of a policy lets out of the pods that it selects.
    pub(super) fn rules_out<'a>(
        &self,
        name: &ObjectName,
        policy: &'a NetworkPolicyRecord,
    ) -> &'a [Vec<NetworkRule>] {
        policy.let_out.get_or_init(|| {
            let rules = policy.egress.iter().flatten();
            rules.map(|it| self.rule_out(name, it)).collect()
        })
    }

    /// Whether a rule of egress means a pod at other ports, or addresses, than before.
    pub(super) fn has_other_ports(
        &self,
        name: &ObjectName,
        policy: &NetworkPolicyRecord,
        before: Option<&PodRecord>,
        now: Option<&PodRecord>,
    ) -> bool {
        let rules = policy.egress.iter().flatten();
        let mut rules = rules.filter(|it| it.has_port_names());
        rules.any(|rule| {
            let meant = |pod: Option<&PodRecord>| self.at_port_names(name, rule, pod?);
            meant(before) != meant(now)
        })
    }

    fn rule_out(&self, policy: &ObjectName, rule: &RuleRecord) -> Vec<NetworkRule> {
        let peers = || {
            let peers = rule.peers.as_ref();
            peers.map(|it| self.told_peers(policy, it))
        };
        if rule.ports.is_none() {
            return vec![NetworkRule {
                ports: None,
                peers: peers(),
            }];
        }
        let numbers = PortRanges::new(rule.port_numbers());
        let by_number = (!numbers.is_empty()).then(|| NetworkRule {
            ports: Some(numbers),
            peers: peers(),
        });
        let mut rules: Vec<NetworkRule> = by_number.into_iter().collect();
        if rule.has_port_names() {
            rules.extend(self.rules_by_name(policy, rule));
        }
        rules
    }

    /// For each number that a name of a port has somewhere, a rule for those where it has it.
    fn rules_by_name(&self, policy: &ObjectName, rule: &RuleRecord) -> Vec<NetworkRule> {
        let mut networks: BTreeMap<u16, Vec<NetworkMatch>> = BTreeMap::new();
        let mut pods: BTreeMap<u16, BTreeMap<&Name, Vec<Name>>> = BTreeMap::new();
        for (namespace, members) in &self.pods_in {
            if !self.may_mean(policy, rule, namespace) {
                continue;
            }
            for pod in members.iter().filter_map(|it| self.pods.get(it)) {
                let Some(meant) = self.at_port_names(policy, rule, pod) else {
                    continue;
                };
                for port in meant.ports {
                    match &meant.addresses {
                        None => {
                            let pods = pods.entry(port).or_default().entry(namespace);
                            pods.or_default().push(pod.id.0.name.clone());
                        }
                        Some(addresses) => {
                            let host = addresses.iter().map(|it| NetworkMatch {
                                cidr: IpNet::from(*it),
                                except: vec![],
                            });
                            networks.entry(port).or_default().extend(host);
                        }
                    }
                }
            }
        }
        let ports: BTreeSet<u16> = networks.keys().chain(pods.keys()).copied().collect();
        let rule = |port| {
            let mut peers = NetworkPeers::networks(networks.remove(&port).unwrap_or_default());
            for (namespace, names) in pods.remove(&port).unwrap_or_default() {
                peers.add(namespace.clone(), NetworkPods::Named(names));
            }
            NetworkRule {
                ports: Some(PortRanges::new([(port, port)])),
                peers: Some(peers),
            }
        };
        ports.into_iter().map(rule).collect()
    }

    /// Whether a rule may mean pods of a namespace.
    fn may_mean(&self, policy: &ObjectName, rule: &RuleRecord, namespace: &Name) -> bool {
        rule.peers.as_ref().is_none_or(|peers| {
            peers.iter().any(|it| match it {
                PeerRecord::Block(_) => true,
                PeerRecord::Pods { namespaces, .. } => {
                    self.is_of(policy, namespaces.as_ref(), namespace)
                }
            })
        })
    }

    /// Where a rule that has names of ports means a pod. None: nowhere.
    fn at_port_names(
        &self,
        policy: &ObjectName,
        rule: &RuleRecord,
        pod: &PodRecord,
    ) -> Option<Meant> {
        // What has the addresses of its node counts as that, whose ports have no names.
        if !pod.is_workload() {
            return None;
        }
        let ports: BTreeSet<u16> = rule
            .port_names()
            .flat_map(|it| pod.ports_named(it))
            .collect();
        if ports.is_empty() {
            return None;
        }
        let is_peer = |peers: &Vec<PeerRecord>| {
            let mut peers = peers.iter();
            peers.any(|it| self.is_peer(policy, it, pod))
        };
        let peers = rule.peers.as_ref();
        if peers.is_none_or(is_peer) {
            return Some(Meant {
                ports,
                addresses: None,
            });
        }
        let is_within = |address: &IpAddr| {
            let mut peers = peers.into_iter().flatten();
            peers.any(|it| matches!(it, PeerRecord::Block(block) if block.contains(*address)))
        };
        let addresses = pod.addresses.iter().copied().filter(is_within);
        let addresses: Vec<IpAddr> = addresses.collect();
        (!addresses.is_empty()).then_some(Meant {
            ports,
            addresses: Some(addresses),
        })
    }
}
