//! NetworkPolicies, as they apply to one workload.

use weft_core as core;

use super::workload::{port_ranges, ports_of};
use super::{ConvertError, Converted, all, error, parsed};
use crate::v1;

impl From<core::NetworkRules> for v1::NetworkRules {
    fn from(rules: core::NetworkRules) -> Self {
        Self {
            policies: rules.policies.into_iter().map(Into::into).collect(),
            rules: rules.rules.into_iter().map(Into::into).collect(),
        }
    }
}

impl TryFrom<v1::NetworkRules> for core::NetworkRules {
    type Error = ConvertError;

    fn try_from(message: v1::NetworkRules) -> Converted<Self> {
        if message.policies.is_empty() {
            return Err(error("network_rules.policies", "missing"));
        }
        Ok(Self {
            policies: all(message.policies)?,
            rules: all(message.rules)?,
        })
    }
}

impl From<core::NetworkRule> for v1::NetworkRule {
    fn from(rule: core::NetworkRule) -> Self {
        Self {
            all_ports: rule.ports.is_none(),
            ports: rule.ports.iter().flat_map(port_ranges).collect(),
            anybody: rule.peers.is_none(),
            peers: rule.peers.map(Into::into),
        }
    }
}

impl TryFrom<v1::NetworkRule> for core::NetworkRule {
    type Error = ConvertError;

    fn try_from(message: v1::NetworkRule) -> Converted<Self> {
        let ports = ports_of("network_rule.ports", message.ports)?;
        if message.all_ports && !ports.is_empty() {
            return Err(error("network_rule.ports", "all ports, and some"));
        }
        if message.anybody && message.peers.is_some() {
            return Err(error("network_rule.peers", "anybody, and some"));
        }
        let peers = message.peers.unwrap_or_default();
        Ok(Self {
            ports: (!message.all_ports).then_some(ports),
            peers: match message.anybody {
                true => None,
                false => Some(peers.try_into()?),
            },
        })
    }
}

impl From<core::NetworkPeers> for v1::NetworkPeers {
    fn from(peers: core::NetworkPeers) -> Self {
        let pods = peers.pods().iter().map(|(namespace, pods)| {
            let names = match pods {
                core::NetworkPods::All => &[][..],
                core::NetworkPods::Named(names) => names,
            };
            v1::NetworkPods {
                namespace: namespace.to_string(),
                all: *pods == core::NetworkPods::All,
                names: names.iter().map(ToString::to_string).collect(),
            }
        });
        Self {
            pods: pods.collect(),
            networks: peers.networks.into_iter().map(Into::into).collect(),
        }
    }
}

impl TryFrom<v1::NetworkPeers> for core::NetworkPeers {
    type Error = ConvertError;

    fn try_from(message: v1::NetworkPeers) -> Converted<Self> {
        let mut peers = Self::networks(all(message.networks)?);
        for pods in message.pods {
            let namespace = parsed("network_pods.namespace", &pods.namespace)?;
            let names = pods.names.iter();
            let names = names.map(|it| parsed("network_pods.names", it));
            let names = names.collect::<Converted<Vec<_>>>()?;
            let pods = match (pods.all, names.is_empty()) {
                (true, true) => core::NetworkPods::All,
                (false, _) => core::NetworkPods::Named(names),
                (true, false) => return Err(error("network_pods.names", "all pods, and some")),
            };
            peers.add(namespace, pods);
        }
        Ok(peers)
    }
}
