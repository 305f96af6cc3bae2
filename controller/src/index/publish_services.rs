//! What Services and EndpointSlices are in the state of agents: services, and one endpoint per
//! backing address.

use std::collections::BTreeSet;
use std::net::IpAddr;

use weft_core::{Endpoint, EndpointName, EndpointPort, Name, ObjectName, Service};
use weft_proto::{Key, Kind, Resource};

use super::Index;
use super::publish_pods::Derived;
use super::reliability::ReliabilitySaid;
use super::services::{ServiceRecord, SliceRecord};
use crate::objects::{Fault, ObjectKey, ObjectKind};
use crate::problems::Facet;
use crate::views::Audience;

impl Index {
    pub(super) fn set_service(&mut self, name: &ObjectName, record: Option<ServiceRecord>) {
        let before = self.services.get(name);
        let of_routes_before = before.map(of_routes);
        self.dirty_pods_behind(name, before.cloned().as_ref());
        let addresses = |it: Option<&ServiceRecord>| it.map_or(vec![], |it| it.addresses.clone());
        let (before, now) = (addresses(before_of(self, name)), addresses(record.as_ref()));
        let affected = self.service_addresses.replace(name, &before, &now);
        self.dirty.services.extend(affected);
        self.dirty.services.insert(name.clone());
        self.dirty_pods_behind(name, record.as_ref());
        let members = self.services_in.entry(name.namespace.clone()).or_default();
        match record {
            Some(record) => {
                members.insert(name.clone());
                self.services.insert(name.clone(), record);
            }
            None => {
                members.remove(name);
                self.services.remove(name);
            }
        }
        if of_routes_before != self.services.get(name).map(of_routes) {
            self.service_of_routes_changed(name);
        }
    }

    pub(super) fn set_slice(&mut self, name: &ObjectName, record: Option<SliceRecord>) {
        let before = match record.clone() {
            Some(record) => self.slices.insert(name.clone(), record),
            None => self.slices.remove(name),
        };
        self.pods_named(name, before.as_ref(), record.as_ref());
        let service_before = before.map(|it| it.service);
        let service_now = record.map(|it| it.service);
        if service_before != service_now
            && let Some(service) = &service_before
            && let Some(slices) = self.slices_of.get_mut(service)
        {
            slices.remove(name);
            if slices.is_empty() {
                self.slices_of.remove(service);
                self.pods_behind_service_changed(service);
            }
        }
        if let Some(service) = &service_now {
            let slices = self.slices_of.entry(service.clone()).or_default();
            let first = slices.is_empty();
            slices.insert(name.clone());
            if first {
                self.pods_behind_service_changed(service);
            }
        }
        self.dirty.services.extend(service_before);
        self.dirty.services.extend(service_now);
    }

    pub(super) fn publish_service(&mut self, name: &ObjectName) {
        let mut endpoints = BTreeSet::new();
        let (addresses, faults) = self.service_addresses_of(name);
        let service = self.services.get(name).filter(|it| !it.external_name);
        let of_namespace = self.ports_of_namespace(&name.namespace);
        let resource = service.map(|it| Service {
            name: name.clone(),
            addresses,
            ports: it.told_ports(of_namespace),
            internal_traffic: it.internal_traffic,
            failure_accrual: it.accrual.settings,
        });
        let sliced = service.map(|it| self.endpoints_of_slices(it));
        self.await_pods_of(name);
        self.changes.insert(
            (
                Audience::All,
                Key {
                    kind: Kind::Service,
                    name: name.to_string(),
                },
            ),
            resource.map(Resource::Service),
        );
        for endpoint in sliced.into_iter().flatten() {
            endpoints.insert(endpoint.name.clone());
            self.put(Audience::All, Resource::Endpoint(endpoint));
        }
        let key = ObjectKey {
            kind: ObjectKind::Service,
            namespace: Some(name.namespace.clone()),
            name: name.name.clone(),
        };
        self.report(
            &key,
            Facet::Conflict,
            faults,
            "nobody is reached at that address as this service",
        );
        self.report_idle(name);
        let before = self.published.sliced.remove(name).unwrap_or_default();
        for endpoint in before.difference(&endpoints) {
            self.publish_derived(endpoint);
        }
        if !endpoints.is_empty() {
            self.published.sliced.insert(name.clone(), endpoints);
        }
    }

    /// Says where a service goes at an address because of a pod; none: nowhere any more.
    pub(super) fn derive_endpoint(
        &mut self,
        endpoint: EndpointName,
        pod: &ObjectName,
        derived_from: Option<Derived>,
    ) {
        let derived = &mut self.published.derived;
        match derived_from {
            Some(of_pod) => {
                let pods = derived.entry(endpoint.clone()).or_default();
                pods.insert(pod.clone(), of_pod);
            }
            None => {
                if let Some(pods) = derived.get_mut(&endpoint) {
                    pods.remove(pod);
                    if pods.is_empty() {
                        derived.remove(&endpoint);
                    }
                }
            }
        }
        self.publish_derived(&endpoint);
        // Where there are slices, they count: what they say is published after this.
        if self.slices_of.contains_key(&endpoint.service) {
            self.dirty.services.insert(endpoint.service);
        }
    }

    fn publish_derived(&mut self, name: &EndpointName) {
        let pods = self.published.derived.get(name);
        let mut ports: Vec<EndpointPort> = vec![];
        for port in pods
            .into_iter()
            .flat_map(|it| it.values().flat_map(|it| &it.ports))
        {
            if !ports.iter().any(|it| it.service_port == port.service_port) {
                ports.push(*port);
            }
        }
        ports.sort_by_key(|it| it.service_port);
        // Pods that share an address are on one node.
        let first = pods.and_then(|it| it.values().next());
        let endpoint = Endpoint {
            name: name.clone(),
            ports,
            place: first.map(|it| it.place.clone()).unwrap_or_default(),
            weight: first.map(|it| it.weight).unwrap_or_default(),
        };
        self.changes.insert(
            (
                Audience::All,
                Key {
                    kind: Kind::Endpoint,
                    name: name.to_string(),
                },
            ),
            (!endpoint.ports.is_empty()).then_some(Resource::Endpoint(endpoint)),
        );
    }

    fn service_addresses_of(&self, name: &ObjectName) -> (Vec<IpAddr>, Vec<Fault>) {
        let mut own = vec![];
        let mut faults = vec![];
        let service = self.services.get(name);
        for address in service.into_iter().flat_map(|it| &it.addresses) {
            let reason = match self.service_addresses.other(address, name) {
                _ if !self.may_be_a_services(*address) => {
                    format!(
                        "{address} lies outside of the ranges of Services: --service-range and ServiceCIDRs"
                    )
                }
                other => {
                    own.push(*address);
                    match other {
                        Some(other) => format!("{address} is claimed by service {other} too"),
                        None => continue,
                    }
                }
            };
            faults.push(Fault::new("spec.clusterIPs", reason));
        }
        (own, faults)
    }

    /// Where the ranges are known, a Service elsewhere would take over traffic that is not its own.
    fn may_be_a_services(&self, address: IpAddr) -> bool {
        self.ranges.services().is_empty() || self.is_of_services(address)
    }

    fn pods_behind_service_changed(&mut self, service: &ObjectName) {
        let record = self.services.get(service).cloned();
        self.dirty_pods_behind(service, record.as_ref());
    }

    fn dirty_pods_behind(&mut self, name: &ObjectName, record: Option<&ServiceRecord>) {
        let Some(record) = record else {
            return;
        };
        let names = self.pods_in.get(&name.namespace).into_iter().flatten();
        let behind = names.filter(|name| {
            let pod = self.pods.get(*name);
            pod.is_some_and(|it| record.selects(&it.labels))
        });
        self.dirty.pods.extend(behind.cloned());
    }
}

/// What routes look at of a Service.
fn of_routes(service: &ServiceRecord) -> OfRoutes {
    let ports = service.ports.iter();
    let ports = ports.map(|it| (it.number, it.name.clone()));
    (
        service.external_name,
        service.addresses.is_empty(),
        ports.collect(),
        service.reliability.clone(),
    )
}

type OfRoutes = (bool, bool, Vec<(u16, Option<Name>)>, ReliabilitySaid);

fn before_of<'a>(index: &'a Index, name: &ObjectName) -> Option<&'a ServiceRecord> {
    index.services.get(name)
}
