//! Services, assembled from what is pushed in parts: the service, and one endpoint per backing
//! address.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use arc_swap::{ArcSwap, ArcSwapOption};
use serde::Serialize;
use weft_core::route::{RouteTable, RouteTableName};
use weft_core::{Endpoint, EndpointName, EndpointPort, ObjectName, PortProtocol, Service};

use super::addresses::{AddressIndex, Claimant, Contested};
use super::dump::{ShownPort, ShownRoutes, ShownService};
use super::sharded::Sharded;

/// A port of a service and what is behind it. There is one for as long as the service has the port,
/// so that the state of balancing can live in it.
#[derive(Debug)]
pub struct ServicePortEntry {
    /// The service.
    pub service: ObjectName,
    /// The port that clients use.
    pub port: u16,
    /// What it speaks; it may change.
    protocol: ArcSwap<PortProtocol>,
    /// Its routes; none: it has none. To be loaded for each exchange.
    pub routes: ArcSwapOption<RouteTable>,
    /// What backs the port now, ordered by address; may be empty.
    pub endpoints: ArcSwap<Vec<EndpointTarget>>,
    /// Where round robin goes on.
    pub next: AtomicUsize,
}

/// Where a service port goes at one endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct EndpointTarget {
    /// The address of the backing workload.
    pub address: IpAddr,
    /// The port of the application there.
    pub port: u16,
}

impl ServicePortEntry {
    /// What the port speaks, as far as somebody said.
    pub fn protocol(&self) -> PortProtocol {
        **self.protocol.load()
    }
}

impl EndpointTarget {
    /// Those of a port's targets (ordered by address) that have the family of the address that the
    /// client used, as the EndpointSlices of Kubernetes are kept by family too.
    pub fn of_family(targets: &[Self], like: IpAddr) -> &[Self] {
        let (v4, v6) = targets.split_at(targets.partition_point(|it| it.address.is_ipv4()));
        if like.is_ipv4() { v4 } else { v6 }
    }
}

/// A service as it is found by its virtual address.
#[derive(Debug)]
pub(super) struct ServiceEntry {
    pub(super) name: ObjectName,
    addresses: Vec<IpAddr>,
    ports: Vec<Arc<ServicePortEntry>>,
}

/// Services as backends of routes find them.
pub(super) type ServicesByName = Sharded<ObjectName, Arc<ServiceEntry>>;

/// The writer's side of all services.
#[derive(Default)]
pub(super) struct Services {
    parts: HashMap<ObjectName, Parts>,
    contested: Contested<ServiceEntry>,
}

/// What was pushed of one service. Endpoints may come before the service itself.
#[derive(Default)]
struct Parts {
    service: Option<Service>,
    /// Ordered by address.
    endpoints: Vec<KnownEndpoint>,
    /// One per port at most; few services have any.
    routes: Vec<Arc<RouteTable>>,
    entry: Option<Arc<ServiceEntry>>,
}

struct KnownEndpoint {
    address: IpAddr,
    /// Shared between the endpoints of a service: nearly all have the same.
    ports: Arc<[EndpointPort]>,
    /// The version that it was pushed with.
    version: u64,
}

impl ServiceEntry {
    pub(super) fn port(&self, number: u16) -> Option<&Arc<ServicePortEntry>> {
        self.ports.iter().find(|entry| entry.port == number)
    }
}

impl Claimant for ServiceEntry {
    type Id = ObjectName;

    fn id(&self) -> &ObjectName {
        &self.name
    }

    fn addresses(&self) -> &[IpAddr] {
        &self.addresses
    }
}

impl Services {
    pub(super) fn put_service(&mut self, mut service: Service) -> ObjectName {
        for address in &mut service.addresses {
            *address = address.to_canonical();
        }
        let name = service.name.clone();
        self.parts.entry(name.clone()).or_default().service = Some(service);
        name
    }

    pub(super) fn remove_service(&mut self, name: &ObjectName) {
        if let Some(parts) = self.parts.get_mut(name) {
            parts.service = None;
        }
    }

    pub(super) fn put_endpoint(&mut self, endpoint: Endpoint, version: u64) -> ObjectName {
        let name = endpoint.name;
        let parts = self.parts.entry(name.service.clone()).or_default();
        let ports = match parts
            .endpoints
            .first()
            .filter(|it| *it.ports == *endpoint.ports)
        {
            Some(first) => Arc::clone(&first.ports),
            None => endpoint.ports.into(),
        };
        let address = name.address.to_canonical();
        let known = KnownEndpoint {
            address,
            ports,
            version,
        };
        match parts.place(address) {
            Ok(place) => parts.endpoints[place] = known,
            Err(place) => parts.endpoints.insert(place, known),
        }
        name.service
    }

    /// All endpoints with their versions.
    pub(super) fn endpoint_versions(&self) -> impl Iterator<Item = (EndpointName, u64)> {
        self.parts.iter().flat_map(|(service, parts)| {
            parts.endpoints.iter().map(|known| {
                let (service, address) = (service.clone(), known.address);
                (EndpointName { service, address }, known.version)
            })
        })
    }

    pub(super) fn remove_endpoint(&mut self, service: &ObjectName, address: IpAddr) {
        if let Some(parts) = self.parts.get_mut(service)
            && let Ok(place) = parts.place(address.to_canonical())
        {
            parts.endpoints.remove(place);
        }
    }

    pub(super) fn put_routes(&mut self, table: RouteTable) -> ObjectName {
        let RouteTableName { service, port } = table.name().clone();
        let parts = self.parts.entry(service.clone()).or_default();
        parts.routes.retain(|it| it.name().port != port);
        parts.routes.push(Arc::new(table));
        service
    }

    pub(super) fn remove_routes(&mut self, name: &RouteTableName) {
        if let Some(parts) = self.parts.get_mut(&name.service) {
            parts.routes.retain(|it| it.name() != name);
        }
    }

    /// Publishes what these services are now.
    pub(super) fn publish<'a>(
        &mut self,
        touched: impl Iterator<Item = &'a ObjectName>,
        index: &AddressIndex<ServiceEntry>,
        by_name: &ServicesByName,
    ) {
        let mut claims = index.edit(&mut self.contested);
        let mut names = by_name.edit();
        for name in touched {
            let Some(parts) = self.parts.get_mut(name) else {
                continue;
            };
            let entry = parts.assemble();
            claims.replace(parts.entry.as_ref(), entry.as_ref());
            match &entry {
                Some(entry) => names.insert(name.clone(), Arc::clone(entry)),
                None => names.remove(name),
            }
            parts.entry = entry;
            if parts.is_empty() {
                self.parts.remove(name);
            }
        }
        claims.publish();
        names.publish();
    }

    /// For people.
    pub(super) fn dump(&self) -> Vec<ShownService> {
        let port = |it: &Arc<ServicePortEntry>| ShownPort {
            port: it.port,
            protocol: it.protocol(),
            routes: it.routes.load_full().map(ShownRoutes),
            endpoints: it.endpoints.load().to_vec(),
        };
        let entries = self.parts.values().filter_map(|it| it.entry.as_ref());
        let mut all: Vec<ShownService> = entries
            .map(|entry| ShownService {
                name: entry.name.clone(),
                addresses: entry.addresses.clone(),
                ports: entry.ports.iter().map(port).collect(),
            })
            .collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }
}

impl Parts {
    /// Where an address is, or belongs.
    fn place(&self, address: IpAddr) -> Result<usize, usize> {
        self.endpoints
            .binary_search_by_key(&address, |it| it.address)
    }

    fn is_empty(&self) -> bool {
        self.service.is_none() && self.endpoints.is_empty() && self.routes.is_empty()
    }

    fn assemble(&self) -> Option<Arc<ServiceEntry>> {
        let service = self.service.as_ref()?;
        let ports = service.ports.iter().map(|port| {
            let targets = self.targets(port.number);
            let mut routes = self.routes.iter();
            let routes = routes.find(|it| it.name().port == port.number);
            let known = self.entry.as_ref().and_then(|it| it.port(port.number));
            match known {
                Some(entry) => {
                    if **entry.endpoints.load() != targets {
                        entry.endpoints.store(Arc::new(targets));
                    }
                    if entry.protocol() != port.protocol {
                        entry.protocol.store(Arc::new(port.protocol));
                    }
                    entry.routes.store(routes.cloned());
                    Arc::clone(entry)
                }
                None => Arc::new(ServicePortEntry {
                    service: service.name.clone(),
                    port: port.number,
                    protocol: ArcSwap::from_pointee(port.protocol),
                    routes: ArcSwapOption::new(routes.cloned()),
                    endpoints: ArcSwap::from_pointee(targets),
                    next: AtomicUsize::new(0),
                }),
            }
        });
        Some(Arc::new(ServiceEntry {
            name: service.name.clone(),
            addresses: service.addresses.clone(),
            ports: ports.collect(),
        }))
    }

    fn targets(&self, service_port: u16) -> Vec<EndpointTarget> {
        let targets = self.endpoints.iter().filter_map(|known| {
            let port = known
                .ports
                .iter()
                .find(|it| it.service_port == service_port)?;
            Some(EndpointTarget {
                address: known.address,
                port: port.target_port,
            })
        });
        targets.collect()
    }
}
