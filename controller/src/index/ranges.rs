//! Which addresses are the cluster's: the ranges of pods and Services, the pods that have addresses elsewhere, and
//! the addresses that somebody says are a pod's before that pod is known to have them.
//!
//! An agent speaks in the clear to an address outside of the cluster. So what may be a pod's has to count as inside
//! for as long as there is no record of it. Where a CNI hands out addresses by itself, `spec.podCIDRs` of Nodes say
//! nothing about it. A range is not guessed from the addresses that are seen: in many clouds the next address is a
//! node's, a database's or the API server's, which would be refused, and policies for the cluster's own networks would let
//! them in. Pods elsewhere are told one by one, and it is reported that a range is missing.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use ipnet::IpNet;
use k8s_openapi::api::core::v1::Node;
use weft_core::{ClusterSettings, Counts, Name, ObjectName};
use weft_proto::Resource;

use super::Index;
use super::pods::PodRecord;
use crate::objects::{Fault, ServiceCidr};
use crate::problems::{Problem, Scope};
use crate::views::Audience;

/// What is kept of a node.
#[derive(Debug, Default)]
pub(super) struct NodeRecord {
    /// The ranges that its pods get addresses from.
    pub(super) ranges: Vec<IpNet>,
    /// Its zone, where it has one.
    pub(super) zone: Option<String>,
}

/// The cluster's addresses.
#[derive(Debug, Default)]
pub(super) struct Ranges {
    /// Those of Services, by flags and by ServiceCIDRs.
    services: BTreeSet<IpNet>,
    /// By the name of the ServiceCIDR.
    service_cidrs: HashMap<Name, Vec<IpNet>>,
    /// Those of pods.
    pods: Nets,
    /// Addresses of pods that are in none of them.
    elsewhere: BTreeMap<IpAddr, BTreeSet<ObjectName>>,
    /// The one of them that is reported: the same as long as it is one.
    shown: Option<(IpAddr, ObjectName)>,
    /// How many pods have their node's address.
    of_nodes: Counts<IpAddr>,
    /// What slices of a Service say to be pods' addresses, of pods that are not known to have them.
    awaited: HashMap<ObjectName, BTreeSet<IpAddr>>,
}

/// Ranges, many of them, asked whether they have an address.
#[derive(Debug, Default)]
struct Nets {
    counts: Counts<IpNet>,
    /// How many there are of each family and length: few.
    lengths: Counts<(bool, u8)>,
}

impl Ranges {
    /// Those of the flags.
    pub(super) fn new(pods: &[IpNet], services: &[IpNet]) -> Self {
        let mut ranges = Self {
            services: services.iter().copied().collect(),
            ..Self::default()
        };
        for range in pods {
            ranges.pods.add(*range);
        }
        ranges
    }

    /// Those of Services.
    pub(super) fn services(&self) -> &BTreeSet<IpNet> {
        &self.services
    }

    /// Whether there is such a ServiceCIDR.
    pub(super) fn has_service_cidr(&self, name: &Name) -> bool {
        self.service_cidrs.contains_key(name)
    }

    /// A pod appeared, changed or went. Returns whether agents are to be told.
    pub(super) fn pod_changed(
        &mut self,
        name: &ObjectName,
        before: Option<&PodRecord>,
        now: Option<&PodRecord>,
    ) -> bool {
        let of_node = |it: Option<&PodRecord>| match it {
            Some(pod) if pod.host_network && !pod.completed => pod.addresses.clone(),
            _ => vec![],
        };
        let (were_of_node, are_of_node) = (of_node(before), of_node(now));
        // Seldom; and such an address may be awaited no more, or again.
        let mut changed = were_of_node != are_of_node && !self.awaited.is_empty();
        for address in are_of_node {
            self.of_nodes.add(address);
        }
        for address in were_of_node {
            self.of_nodes.remove(&address);
        }
        let own = |it: Option<&PodRecord>| match it {
            Some(pod) if pod.is_workload() => pod.addresses.clone(),
            _ => vec![],
        };
        let (before, now) = (own(before), own(now));
        for address in before.iter().filter(|it| !now.contains(it)) {
            if let Some(pods) = self.elsewhere.get_mut(address) {
                pods.remove(name);
                if pods.is_empty() {
                    self.elsewhere.remove(address);
                    changed = true;
                }
            }
        }
        for address in now.iter().filter(|it| !before.contains(it)) {
            changed |= self.place(*address, name);
        }
        changed
    }

    /// What slices of a Service say to be addresses of pods that are not known to have them. Returns whether agents
    /// are to be told.
    pub(super) fn await_pods(&mut self, service: &ObjectName, addresses: BTreeSet<IpAddr>) -> bool {
        let before = match addresses.is_empty() {
            true => self.awaited.remove(service),
            false => self.awaited.insert(service.clone(), addresses.clone()),
        };
        before.unwrap_or_default() != addresses
    }

    fn place(&mut self, address: IpAddr, pod: &ObjectName) -> bool {
        if self.pods.contains(address) || self.is_of_services(address) {
            return false;
        }
        let pods = self.elsewhere.entry(address).or_default();
        pods.insert(pod.clone());
        pods.len() == 1
    }

    fn is_of_services(&self, address: IpAddr) -> bool {
        self.services.iter().any(|it| it.contains(&address))
    }

    /// A pod with an address in no range; the one that was shown before, if it is still one.
    fn shown(&mut self) -> Option<(IpAddr, ObjectName)> {
        let is_one = |(address, pod): &(IpAddr, ObjectName)| {
            let pods = self.elsewhere.get(address);
            pods.is_some_and(|it| it.contains(pod))
        };
        if !self.shown.as_ref().is_some_and(is_one) {
            let first = self.elsewhere.iter().next();
            self.shown = first.and_then(|(address, pods)| Some((*address, pods.first()?.clone())));
        }
        self.shown.clone()
    }

    /// Addresses of pods in no range, as ranges that hold nothing else.
    fn told_elsewhere(&self) -> Vec<IpNet> {
        let single: Vec<IpNet> = self.elsewhere.keys().map(|it| IpNet::from(*it)).collect();
        IpNet::aggregate(&single)
    }

    /// Addresses that may be a pod's which is not known yet, and are inside for no other reason. One that is a node's
    /// is known: its pods have no records.
    fn told_awaited(&self) -> BTreeSet<IpNet> {
        let all = self.awaited.values().flatten();
        let unknown = all.filter(|it| !self.pods.contains(**it) && self.of_nodes.of(it) == 0);
        unknown
            .map(|it| IpNet::from(*it))
            .take(MAX_SINGLE)
            .collect()
    }
}

impl Nets {
    fn add(&mut self, range: IpNet) {
        self.counts.add(range);
        self.lengths.add(kind(&range));
    }

    fn remove(&mut self, range: IpNet) {
        if self.counts.remove(&range) {
            self.lengths.remove(&kind(&range));
        }
    }

    fn contains(&self, address: IpAddr) -> bool {
        self.lengths.keys().any(|(is_v4, length)| {
            *is_v4 == address.is_ipv4()
                && IpNet::new(address, *length).is_ok_and(|it| self.counts.of(&it.trunc()) > 0)
        })
    }
}

fn kind(range: &IpNet) -> (bool, u8) {
    (range.addr().is_ipv4(), range.prefix_len())
}

impl Index {
    pub(super) fn set_node(&mut self, name: &Name, record: Option<NodeRecord>) {
        let zone = record.as_ref().and_then(|it| it.zone.clone());
        let ranges = record.as_ref().map(|it| it.ranges.clone());
        let before = match record {
            Some(record) => self.nodes.insert(name.clone(), record),
            None => self.nodes.remove(name),
        };
        let before = before.unwrap_or_default();
        self.ranges_of_node_changed(&before.ranges, &ranges.unwrap_or_default());
        if before.zone != zone {
            let there = self.pods.iter();
            let there = there.filter(|(_, it)| it.node.as_ref() == Some(name));
            let there = there.map(|(pod, _)| pod.clone());
            self.dirty.pods.extend(there);
        }
    }

    fn ranges_of_node_changed(&mut self, before: &[IpNet], now: &[IpNet]) {
        if before == now {
            return;
        }
        self.dirty.cluster = true;
        for range in now {
            self.ranges.pods.add(*range);
        }
        for range in before {
            self.ranges.pods.remove(*range);
        }
        let Ranges {
            pods, elsewhere, ..
        } = &mut self.ranges;
        elsewhere.retain(|address, _| !pods.contains(*address));
        // A node that goes takes its range along, seldom with pods in it.
        if before.iter().any(|it| !now.contains(it)) {
            for (name, pod) in self.pods.iter().filter(|(_, it)| it.is_workload()) {
                for address in &pod.addresses {
                    self.ranges.place(*address, name);
                }
            }
        }
    }

    pub(super) fn publish_cluster(&mut self) {
        let of_nodes = self.nodes.values().flat_map(|it| &it.ranges);
        let ranges = self.settings.pod_ranges.iter().chain(of_nodes).copied();
        let mut pod_ranges: BTreeSet<IpNet> = ranges.collect();
        let mut missing = vec![];
        if pod_ranges.is_empty() {
            let fault = Fault::new("--pod-range", "no pod range is known");
            let effect = "an address without a record counts as outside of the cluster";
            missing.push(Problem::of_file("flags", None, fault, effect));
        }
        if self.ranges.services.is_empty() {
            let fault = Fault::new("--service-range", "no service range is known");
            let effect = "a Service may claim any address, outside of the cluster too";
            missing.push(Problem::of_file("flags", None, fault, effect));
        }
        for service in &self.ranges.services {
            for pod in pod_ranges.iter().filter(|it| overlap(service, it)) {
                let reason = format!("{service} and the pod range {pod} overlap");
                let fault = Fault::new("--service-range", reason);
                let effect = "an address in both is no pod's";
                missing.push(Problem::of_file("flags", None, fault, effect));
            }
        }
        let elsewhere = self.ranges.told_elsewhere();
        if let Some((address, pod)) = self.ranges.shown() {
            let reason = format!(
                "pod {pod} has {address}, which is in no range: not in one of --pod-range, nor in spec.podCIDRs of a Node"
            );
            let fault = Fault::new("--pod-range", reason);
            let effect = match elsewhere.len() > MAX_SINGLE {
                true => {
                    "many pods have such addresses, of which agents are told some one by one; what no record has counts \
                    as outside of the cluster, and is spoken to in the clear"
                }
                false => {
                    "agents are told the addresses of such pods one by one; another, of a pod that is newer than what \
                    they know, counts as outside of the cluster, and is spoken to in the clear"
                }
            };
            missing.push(Problem::of_file("flags", None, fault, effect));
        }
        self.problems.replace(Scope::Settings, missing);
        pod_ranges.extend(elsewhere.into_iter().take(MAX_SINGLE));
        // What is only said to be a pod's must have a record, but is none of the networks that policies may let in:
        // who writes a slice could make any address one of them.
        let awaited = self.ranges.told_awaited();
        let service_ranges = self.ranges.services.iter().copied();
        let inside: BTreeSet<IpNet> = service_ranges.chain(awaited).collect();
        let settings = ClusterSettings {
            trust_domain: self.settings.trust_domain.clone(),
            pod_ranges: pod_ranges.into_iter().collect(),
            service_ranges: inside.into_iter().collect(),
            force_tunnels: self.settings.force_tunnels,
        };
        self.put(Audience::All, Resource::Cluster(settings));
    }

    /// Whether an address lies in the ranges of Services.
    pub(super) fn is_of_services(&self, address: IpAddr) -> bool {
        self.ranges.is_of_services(address)
    }

    /// Seldom, as when a cluster has too few addresses: everything with an address is looked at again.
    pub(super) fn set_service_cidr(&mut self, name: &Name, ranges: Option<Vec<IpNet>>) {
        let cidrs = &mut self.ranges.service_cidrs;
        match ranges {
            Some(ranges) => cidrs.insert(name.clone(), ranges),
            None => cidrs.remove(name),
        };
        let all = cidrs
            .values()
            .flatten()
            .chain(&self.settings.service_ranges);
        let services: BTreeSet<IpNet> = all.copied().collect();
        if services == self.ranges.services {
            return;
        }
        let pods = self.pods.iter().filter(|(_, it)| it.is_workload());
        let before: Vec<(ObjectName, Vec<IpAddr>)> = pods
            .map(|(name, it)| (name.clone(), self.usable(it).collect()))
            .collect();
        self.ranges.services = services;
        self.ranges.elsewhere.clear();
        for (name, before) in before {
            let Some(pod) = self.pods.get(&name) else {
                continue;
            };
            for address in &pod.addresses {
                self.ranges.place(*address, &name);
            }
            let now: Vec<IpAddr> = self.usable(pod).collect();
            self.pod_addresses.replace(&name, &before, &now);
        }
        self.dirty.cluster = true;
        self.dirty.pods.extend(self.pods.keys().cloned());
        self.dirty.services.extend(self.services.keys().cloned());
    }
}

/// The ranges of a ServiceCIDR.
pub(super) fn service_cidr(object: &ServiceCidr) -> Result<Vec<IpNet>, Fault> {
    let texts = object.spec.cidrs.iter().flatten().enumerate();
    let parsed = texts.map(|(index, text)| range(&format!("spec.cidrs[{index}]"), text));
    parsed.collect()
}

/// The ranges that a node's pods get addresses from.
pub(super) fn node_ranges(node: &Node) -> Result<Vec<IpNet>, Fault> {
    let spec = node.spec.as_ref();
    let mut texts = spec.and_then(|it| it.pod_cidrs.clone()).unwrap_or_default();
    if texts.is_empty() {
        texts.extend(spec.and_then(|it| it.pod_cidr.clone()));
    }
    let texts = texts.iter().enumerate();
    let parsed = texts.map(|(index, text)| range(&format!("spec.podCIDRs[{index}]"), text));
    parsed.collect()
}

fn range(field: &str, text: &str) -> Result<IpNet, Fault> {
    let parsed = text.parse::<IpNet>();
    parsed
        .map(|it| it.trunc())
        .map_err(|reason| Fault::new(field, reason))
}

pub(super) fn overlap(one: &IpNet, other: &IpNet) -> bool {
    one.contains(&other.network()) || other.contains(&one.network())
}

/// Ranges of one address, or some that happen to be neighbours, that agents are told: each is looked at for each
/// connection to an address without a record.
const MAX_SINGLE: usize = 1024;
