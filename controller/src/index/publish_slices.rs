//! From EndpointSlices to the endpoints of a Service: who is told, and who has to wait for a pod to be known.
//!
//! A slice may be told before the pod that it names, or after another pod of that name took its place. An agent that
//! knows an endpoint and no workload at its address would speak to it in the clear, if the address is in no
//! range. So an endpoint waits for its pod, and its address counts as the cluster's meanwhile.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::IpAddr;

use weft_core::{Endpoint, EndpointName, EndpointPort, Name, ObjectName, Weight};

use super::Index;
use super::services::{Condition, Family, PodReference, ServiceRecord, SliceAddress, SliceRecord};
use crate::objects::{Fault, ObjectKey, ObjectKind};
use crate::problems::Facet;

/// An endpoint while it is put together from slices.
struct Listed {
    endpoint: Endpoint,
    /// Where ports go, and whether that is only for when no other endpoint has the port.
    ports: Vec<(EndpointPort, bool)>,
}

/// Who competes at a port: endpoints of one family, and of one node where clients use those of their own only.
type Rivals = (Family, Option<Name>, u16);

impl Index {
    /// Keeps up which slices name which pods.
    pub(super) fn pods_named(
        &mut self,
        slice: &ObjectName,
        before: Option<&SliceRecord>,
        now: Option<&SliceRecord>,
    ) {
        for pod in before.into_iter().flat_map(named) {
            if let Some(slices) = self.slices_naming.get_mut(&pod.name) {
                slices.remove(slice);
                if slices.is_empty() {
                    self.slices_naming.remove(&pod.name);
                }
            }
        }
        for pod in now.into_iter().flat_map(named) {
            let slices = self.slices_naming.entry(pod.name.clone()).or_default();
            slices.insert(slice.clone());
        }
    }

    /// The endpoints of a Service that agents are told. As kube-proxy does, port by port: who is terminating is there
    /// for when nobody else is, so that the last pod of a Service serves until it ends.
    pub(super) fn endpoints_of_slices(&self, service: &ServiceRecord) -> Vec<Endpoint> {
        let mut all: Vec<Listed> = vec![];
        let mut known: HashMap<IpAddr, usize> = HashMap::new();
        for slice in self.slices_of_service(&service.name) {
            let ports = service.ports_of(slice);
            let serve = slice
                .addresses
                .iter()
                .filter(|it| self.awaits(it).is_none());
            for address in serve {
                let leaving = match address.condition {
                    Condition::Ready => false,
                    Condition::Leaving => true,
                    Condition::Unready => continue,
                };
                let at = *known.entry(address.address).or_insert_with(|| {
                    all.push(self.listed(service, address));
                    all.len() - 1
                });
                if let Some(listed) = all.get_mut(at) {
                    listed.add(&ports, leaving);
                }
            }
        }
        let staying: HashSet<Rivals> = all.iter().flat_map(Listed::staying).collect();
        let told = all.into_iter().map(|it| it.told(&staying));
        told.filter(|it| !it.ports.is_empty()).collect()
    }

    /// Says which addresses of a Service's slices have to wait for their pods, and counts them as the cluster's.
    pub(super) fn await_pods_of(&mut self, service: &ObjectName) {
        let mut awaited = BTreeSet::new();
        for name in self.slices_of.get(service).cloned().unwrap_or_default() {
            let mut faults = vec![];
            let slice = self.slices.get(&name);
            for address in slice.into_iter().flat_map(|it| &it.addresses) {
                let Some(reason) = self.awaits(address) else {
                    continue;
                };
                awaited.insert(address.address);
                if faults.len() < MAX_TOLD {
                    let reason = format!("{}: {reason}", address.address);
                    faults.push(Fault::new("endpoints.targetRef", reason));
                }
            }
            let key = ObjectKey {
                kind: ObjectKind::EndpointSlice,
                namespace: Some(name.namespace),
                name: name.name,
            };
            let effect = "it is none of the Service's endpoints, and refused if nobody else has it, until the pod is known";
            self.report(&key, Facet::Reference, faults, effect);
        }
        self.dirty.cluster |= self.ranges.await_pods(service, awaited);
    }

    /// Why an address has to wait: it is said to be a pod's that is not known to have it.
    fn awaits(&self, address: &SliceAddress) -> Option<String> {
        let PodReference { name, uid } = address.pod.as_ref()?;
        let Some(pod) = self.pods.get(name) else {
            return Some(format!("no pod {name} is known"));
        };
        // A pod from a directory may say none.
        let is_another = |uid: &String| *uid != pod.uid && !pod.uid.starts_with("name:");
        if uid.as_ref().is_some_and(is_another) {
            return Some(format!("the pod {name} that is known is another one"));
        }
        let mut own = self.usable(pod);
        if pod.host_network || (pod.is_workload() && own.any(|it| it == address.address)) {
            return None;
        }
        Some(format!("pod {name} is not known to have it"))
    }

    fn listed(&self, service: &ServiceRecord, address: &SliceAddress) -> Listed {
        Listed {
            endpoint: Endpoint {
                name: EndpointName {
                    service: service.name.clone(),
                    address: address.address,
                },
                ports: vec![],
                place: service.told_place(address.place.clone()),
                weight: self.weight_of(&service.name, address.pod.as_ref()),
            },
            ports: vec![],
        }
    }

    /// A pod of another namespace is not the Service's to speak for.
    fn weight_of(&self, service: &ObjectName, pod: Option<&PodReference>) -> Weight {
        let own = pod.filter(|it| it.name.namespace == service.namespace);
        let pod = own.and_then(|it| self.pods.get(&it.name));
        pod.map(|it| it.weight).unwrap_or_default()
    }

    fn slices_of_service(&self, service: &ObjectName) -> impl Iterator<Item = &SliceRecord> {
        let names = self.slices_of.get(service).into_iter().flatten();
        names.filter_map(|it| self.slices.get(it))
    }
}

impl Listed {
    /// Of two slices one may be older: who stays at a port by one, stays.
    fn add(&mut self, ports: &[EndpointPort], leaving: bool) {
        for port in ports {
            let mut known = self.ports.iter_mut();
            match known.find(|(it, _)| it.service_port == port.service_port) {
                Some(before) if before.1 && !leaving => *before = (*port, leaving),
                Some(_) => {}
                None => self.ports.push((*port, leaving)),
            }
        }
    }

    fn staying(&self) -> impl Iterator<Item = Rivals> {
        let staying = self.ports.iter().filter(|(_, leaving)| !leaving);
        staying.map(|(port, _)| self.rivals(port))
    }

    fn rivals(&self, port: &EndpointPort) -> Rivals {
        let node = self.endpoint.place.node.clone();
        (
            Family::of(self.endpoint.name.address),
            node,
            port.service_port,
        )
    }

    fn told(self, staying: &HashSet<Rivals>) -> Endpoint {
        let ports = self.ports.iter();
        let used =
            ports.filter(|(port, leaving)| !leaving || !staying.contains(&self.rivals(port)));
        let mut ports: Vec<EndpointPort> = used.map(|(port, _)| *port).collect();
        ports.sort_by_key(|it| it.service_port);
        Endpoint {
            ports,
            ..self.endpoint
        }
    }
}

fn named(slice: &SliceRecord) -> impl Iterator<Item = &PodReference> {
    slice.addresses.iter().filter_map(|it| it.pod.as_ref())
}

/// Addresses of one slice that are reported to wait.
const MAX_TOLD: usize = 16;
