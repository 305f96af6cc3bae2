//! How NetworkPolicies are read, those too that cannot be.

use std::sync::OnceLock;

use k8s_openapi::api::networking::v1::{
    IPBlock, NetworkPolicy, NetworkPolicyPeer, NetworkPolicyPort,
};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use serde_json::Value;
use weft_core::NetworkMatch;

use super::{Direction, NetworkPolicyRecord, PeerRecord, PortRecord, RuleRecord};
use crate::index::policies::{PortChoice, few, network, port_choice};
use crate::index::selector::Selector;
use crate::objects::Fault;

impl NetworkPolicyRecord {
    /// Checks a policy.
    ///
    /// # Errors
    /// The first field that cannot be used.
    pub(in crate::index) fn check(policy: &NetworkPolicy) -> Result<Self, Fault> {
        let spec = policy.spec.as_ref();
        let spec = spec.ok_or_else(|| Fault::new("spec", "missing"))?;
        let selector = spec.pod_selector.clone().unwrap_or_default();
        let types = spec.policy_types.as_deref().unwrap_or_default();
        if let Some(odd) = types.iter().find(|it| !TYPES.contains(&it.as_str())) {
            let shown: String = odd.chars().take(64).collect();
            let reason = format!("{shown:?} is neither Ingress nor Egress");
            return Err(Fault::new("spec.policyTypes", reason));
        }
        let ingress = spec.ingress.as_deref().unwrap_or_default();
        let ingress = ingress.iter().map(|it| (&it.ports, ("from", &it.from)));
        let ingress = rules("spec.ingress", ingress.collect())?;
        let egress = spec.egress.as_deref().unwrap_or_default();
        let egress = egress.iter().map(|it| (&it.ports, ("to", &it.to)));
        let egress = rules("spec.egress", egress.collect())?;
        let has_egress = !egress.is_empty();
        Ok(Self {
            selector: Selector::check("spec.podSelector", &selector)?,
            ingress: is_about(types, Direction::Ingress, has_egress).then_some(ingress),
            egress: is_about(types, Direction::Egress, has_egress).then_some(egress),
            closed: false,
            meant: OnceLock::new(),
            let_out: OnceLock::new(),
        })
    }

    /// What a policy that cannot be read, and never could, closes: the pods that it may have meant, in the directions
    /// that it may be about.
    pub(in crate::index) fn closed(spec: &Value) -> Self {
        let selector = spec.get("podSelector").cloned();
        let selector = selector.and_then(|it| serde_json::from_value(it).ok());
        let selector = selector.and_then(|it| Selector::check("spec.podSelector", &it).ok());
        let types = match spec.get("policyTypes") {
            None | Some(Value::Null) => Some(vec![]),
            Some(written) => serde_json::from_value::<Vec<String>>(written.clone()).ok(),
        };
        let types = types.filter(|it| it.iter().all(|it| TYPES.contains(&it.as_str())));
        let has_egress = spec.get("egress").is_some_and(|it| match it {
            Value::Null => false,
            Value::Array(rules) => !rules.is_empty(),
            _ => true,
        });
        let closed = |of| {
            let may_be = |it: &Vec<String>| is_about(it, of, has_egress);
            types.as_ref().is_none_or(may_be).then(Vec::new)
        };
        Self {
            selector: selector.unwrap_or_default(),
            ingress: closed(Direction::Ingress),
            egress: closed(Direction::Egress),
            closed: true,
            meant: OnceLock::new(),
            let_out: OnceLock::new(),
        }
    }
}

/// As Kubernetes has it (`SetDefaults_NetworkPolicy`): where no type is written it is about ingress, and about egress if
/// there are rules of that.
fn is_about(types: &[String], of: Direction, has_egress: bool) -> bool {
    let [ingress, egress] = TYPES;
    match of {
        Direction::Ingress => types.is_empty() || types.iter().any(|it| it == ingress),
        Direction::Egress if types.is_empty() => has_egress,
        Direction::Egress => types.iter().any(|it| it == egress),
    }
}

/// A rule: its ports, and under which name its peers stand, and which these are.
type Written<'a> = (
    &'a Option<Vec<NetworkPolicyPort>>,
    (&'static str, &'a Option<Vec<NetworkPolicyPeer>>),
);

fn rules(field: &str, written: Vec<Written<'_>>) -> Result<Vec<RuleRecord>, Fault> {
    few(field, written.len(), MAX_RULES)?;
    let rules = written.into_iter().enumerate();
    let rules = rules.map(|(index, it)| rule(&format!("{field}[{index}]"), it));
    rules.collect()
}

fn rule(field: &str, (ports, (of_peers, peers)): Written<'_>) -> Result<RuleRecord, Fault> {
    let ports = ports.as_deref().unwrap_or_default();
    let peers = peers.as_deref().unwrap_or_default();
    few(&format!("{field}.ports"), ports.len(), MAX_PARTS)?;
    few(&format!("{field}.{of_peers}"), peers.len(), MAX_PARTS)?;
    let mut read_ports = vec![];
    for (index, it) in ports.iter().enumerate() {
        read_ports.extend(port(&format!("{field}.ports[{index}]"), it)?);
    }
    let mut read_peers = vec![];
    for (index, it) in peers.iter().enumerate() {
        read_peers.push(peer(&format!("{field}.{of_peers}[{index}]"), it)?);
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

/// `policyTypes`: ingress, egress.
const TYPES: [&str; 2] = ["Ingress", "Egress"];
const MAX_RULES: usize = 256;
/// Of each list in a rule.
const MAX_PARTS: usize = 256;
