//! Services, assembled from what is pushed in parts: the service, and one endpoint per backing
//! address.

use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU32;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Instant;

use arc_swap::{ArcSwap, ArcSwapOption};
use weft_core::route::{RouteTable, RouteTableName};
use weft_core::{
    Endpoint, EndpointName, EndpointPlace, EndpointPort, Name, ObjectName, PortProtocol, Service,
    Weight,
};

use super::addresses::{AddressIndex, Claimant, Contested};
use super::dump::{ShownEndpoint, ShownPort, ShownRoutes, ShownService};
use super::sharded::Sharded;
use crate::balance::health::{Guard, Health};
use crate::balance::topology::{Here, reachable};
use crate::balance::{EndpointEntry, PortBudgets, Tries};

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
    /// What backs the port for clients of this node, ordered by address; may be empty. An endpoint's
    /// entry, and what is known of its load, stays the same for as long as it is there.
    pub endpoints: ArcSwap<Vec<Arc<EndpointEntry>>>,
    /// What backs it for clients of other nodes only; none: nothing.
    elsewhere: ArcSwapOption<Vec<SocketAddr>>,
    /// What the endpoints share.
    pub health: Arc<Health>,
    /// The weight of the strongest, in percent; 0: all are ordinary ones.
    heaviest: AtomicU32,
    balances: [AtomicBool; 2],
    /// How many of its requests may be sent again.
    pub retries: PortBudgets,
}

/// What is balanced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Balanced {
    /// Each connection.
    Connections,
    /// Each HTTP exchange.
    Exchanges,
}

impl ServicePortEntry {
    fn new(
        service: ObjectName,
        port: u16,
        protocol: PortProtocol,
        routes: Option<Arc<RouteTable>>,
        (endpoints, health): (Vec<Arc<EndpointEntry>>, Arc<Health>),
    ) -> Self {
        Self {
            service,
            port,
            protocol: ArcSwap::from_pointee(protocol),
            routes: ArcSwapOption::new(routes),
            endpoints: ArcSwap::from_pointee(endpoints),
            elsewhere: ArcSwapOption::empty(),
            health,
            heaviest: AtomicU32::new(0),
            balances: Default::default(),
            retries: PortBudgets::default(),
        }
    }

    /// What the port speaks, as far as somebody said.
    pub fn protocol(&self) -> PortProtocol {
        **self.protocol.load()
    }

    /// Whether an address backs it, for clients of whatever node.
    pub fn is_backed_by(&self, address: SocketAddr) -> bool {
        let here = self.endpoints.load();
        let elsewhere = self.elsewhere.load();
        let elsewhere = elsewhere.as_deref();
        here.iter().any(|it| it.to() == address)
            || elsewhere.is_some_and(|it| it.contains(&address))
    }

    /// Begins the tries of an exchange, or a connection, whose client used an address of the same
    /// family as `like`.
    pub fn tries(&self, balanced: Balanced, like: IpAddr) -> Tries {
        let flag = &self.balances[balanced as usize];
        // Nearly always set already: all CPUs read it, so none should write it.
        if !flag.load(Ordering::Relaxed) {
            flag.store(true, Ordering::Relaxed);
        }
        self.candidates(like)
    }

    /// The same for who only looks.
    pub fn candidates(&self, like: IpAddr) -> Tries {
        let endpoints = self.endpoints.load_full();
        let range = of_family(&endpoints, like);
        let heaviest = NonZeroU32::new(self.heaviest.load(Ordering::Relaxed));
        Tries::new(endpoints, range).weighted(heaviest)
    }

    /// Notes whether some endpoints are stronger than others.
    fn compare_weights(&self) {
        let endpoints = self.endpoints.load();
        let weights = || endpoints.iter().map(|it| it.load.weight());
        let are_equal = weights().min() == weights().max();
        let heaviest = weights().max().filter(|_| !are_equal);
        self.heaviest
            .store(heaviest.unwrap_or(0), Ordering::Relaxed);
    }

    /// Puts other endpoints in place of those that there are. Who waits for one goes on.
    fn replace_endpoints(&self, endpoints: Vec<Arc<EndpointEntry>>) {
        self.endpoints.store(Arc::new(endpoints));
        let endpoints = self.endpoints.load();
        for like in [IpAddr::from([0; 4]), IpAddr::from([0; 16])] {
            if let Some(queue) = self.health.known_queue(like)
                && !of_family(&endpoints, like).is_empty()
            {
                queue.open();
            }
        }
    }

    /// Whether a pod of this node ever used the port so.
    pub fn balances(&self, what: Balanced) -> bool {
        self.balances[what as usize].load(Ordering::Relaxed)
    }
}

/// Which of a port's endpoints (ordered by address) have the family of the address that the client
/// used, as the EndpointSlices of Kubernetes are kept by family too.
pub(super) fn of_family(endpoints: &[Arc<EndpointEntry>], like: IpAddr) -> Range<usize> {
    let first_v6 = endpoints.partition_point(|it| it.address.is_ipv4());
    if like.is_ipv4() {
        0..first_v6
    } else {
        first_v6..endpoints.len()
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
    here: Here,
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
    /// Shared, too; none: nothing is said.
    place: Option<Arc<EndpointPlace>>,
    weight: Weight,
    /// The version that it was pushed with.
    version: u64,
}

impl ServiceEntry {
    /// Its own addresses, or if it has none those of its endpoints, as a resolver gives them.
    pub(super) fn resolved(&self) -> Vec<IpAddr> {
        if !self.addresses.is_empty() {
            return self.addresses.clone();
        }
        let endpoints = self.ports.iter().map(|it| it.endpoints.load());
        let all: BTreeSet<IpAddr> = endpoints
            .flat_map(|it| it.iter().map(|it| it.address).collect::<Vec<_>>())
            .collect();
        all.into_iter().collect()
    }

    pub(super) fn port(&self, number: u16) -> Option<&Arc<ServicePortEntry>> {
        self.ports.iter().find(|entry| entry.port == number)
    }
}

impl ServiceEntry {
    /// Empties the ports that are not in the entry that takes this one's place: whoever still holds one
    /// must not go on with addresses that others may get.
    fn retire_ports(&self, next: Option<&Self>) {
        for port in &self.ports {
            let stays = next.and_then(|it| it.port(port.port));
            if !stays.is_some_and(|it| Arc::ptr_eq(it, port)) {
                port.endpoints.store(Arc::default());
                port.elsewhere.store(None);
                port.routes.store(None);
            }
        }
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
    /// No services yet, on this node.
    pub(super) fn on(node: Option<Name>) -> Self {
        Self {
            here: Here { node, zone: None },
            ..Self::default()
        }
    }

    /// The node's zone is this one now. Returns the services that have to be published anew.
    pub(super) fn set_zone(&mut self, zone: Option<String>) -> Vec<ObjectName> {
        if self.here.zone == zone {
            return vec![];
        }
        self.here.zone = zone;
        let hinted = self.parts.iter().filter(|(_, parts)| {
            let mut endpoints = parts.endpoints.iter();
            endpoints.any(|it| it.place.is_some())
        });
        hinted.map(|(name, _)| name.clone()).collect()
    }

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
            place: parts.share(endpoint.place),
            weight: endpoint.weight,
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
            let entry = parts.assemble(&self.here);
            claims.replace(parts.entry.as_ref(), entry.as_ref());
            match &entry {
                Some(entry) => names.insert(name.clone(), Arc::clone(entry)),
                None => names.remove(name),
            }
            if let Some(before) = &parts.entry {
                before.retire_ports(entry.as_deref());
            }
            parts.entry = entry;
            if parts.is_empty() {
                self.parts.remove(name);
            }
        }
        claims.publish();
        names.publish();
    }

    /// The service ports that a pod of this node has used.
    pub(super) fn used_ports(&self) -> Vec<Arc<ServicePortEntry>> {
        let entries = self.parts.values().filter_map(|it| it.entry.as_ref());
        let used = |it: &&Arc<ServicePortEntry>| {
            it.balances(Balanced::Connections) || it.balances(Balanced::Exchanges)
        };
        let ports = entries.flat_map(|it| it.ports.iter().filter(used).cloned());
        ports.collect()
    }

    /// For people.
    pub(super) fn dump(&self) -> Vec<ShownService> {
        let now = Instant::now();
        let port = |it: &Arc<ServicePortEntry>| {
            let queues = it.health.queues();
            let endpoints = it.endpoints.load();
            let endpoints = endpoints.iter().map(|it| ShownEndpoint::new(it, now));
            ShownPort {
                port: it.port,
                protocol: it.protocol(),
                routes: it.routes.load_full().map(ShownRoutes),
                waiting: queues.iter().map(|it| it.waiting()).sum(),
                fail_fast: queues.iter().any(|it| it.is_fail_fast()),
                endpoints: endpoints.collect(),
            }
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

    /// One allocation for what many endpoints of a service have: those of one zone, or of one node.
    fn share(&self, place: EndpointPlace) -> Option<Arc<EndpointPlace>> {
        if place.is_empty() {
            return None;
        }
        let recent = self.endpoints.iter().rev().take(MOST_COMPARED);
        let mut known = recent.filter_map(|it| it.place.as_ref());
        let same = known.find(|it| ***it == place).map(Arc::clone);
        Some(same.unwrap_or_else(|| Arc::new(place)))
    }

    fn assemble(&self, here: &Here) -> Option<Arc<ServiceEntry>> {
        let service = self.service.as_ref()?;
        let ports = service.ports.iter().map(|port| {
            let mut routes = self.routes.iter();
            let routes = routes.find(|it| it.name().port == port.number);
            let known = self.entry.as_ref().and_then(|it| it.port(port.number));
            let entry = match known {
                Some(entry) => {
                    let before = entry.endpoints.load();
                    let endpoints = self.endpoints(port.number, &before, here, &entry.health);
                    if !same(&before, &endpoints) {
                        entry.replace_endpoints(endpoints);
                    }
                    if entry.protocol() != port.protocol {
                        entry.protocol.store(Arc::new(port.protocol));
                    }
                    entry.routes.store(routes.cloned());
                    Arc::clone(entry)
                }
                None => {
                    let health = Arc::default();
                    let endpoints = self.endpoints(port.number, &[], here, &health);
                    let name = service.name.clone();
                    let routes = routes.cloned();
                    let backing = (endpoints, health);
                    let entry =
                        ServicePortEntry::new(name, port.number, port.protocol, routes, backing);
                    Arc::new(entry)
                }
            };
            entry.elsewhere.store(self.elsewhere(&entry));
            entry.compare_weights();
            entry
        });
        Some(Arc::new(ServiceEntry {
            name: service.name.clone(),
            addresses: service.addresses.clone(),
            ports: ports.collect(),
        }))
    }

    /// What backs a port for clients of this node; of what did before, the same entries.
    fn endpoints(
        &self,
        service_port: u16,
        before: &[Arc<EndpointEntry>],
        here: &Here,
        health: &Arc<Health>,
    ) -> Vec<Arc<EndpointEntry>> {
        let accrual = self.service.as_ref().and_then(|it| it.failure_accrual);
        let new = |address, port| match accrual {
            Some(settings) => EndpointEntry::guarded(address, port, Guard::new(settings, health)),
            None => EndpointEntry::new(address, port),
        };
        let mut before = before.iter().peekable();
        let candidates = self.candidates(service_port, here);
        let endpoints = candidates.into_iter().map(|(known, port)| {
            let address = known.address;
            // Both are ordered by address.
            while before.next_if(|it| it.address < address).is_some() {}
            let entry = before.next_if(|it| {
                let settings = it.guard().map(|it| *it.settings());
                it.address == address && it.port == port && settings == accrual
            });
            let entry = entry.map_or_else(|| new(address, port), Arc::clone);
            entry.load.set_weight(known.weight);
            entry
        });
        let mut endpoints: Vec<_> = endpoints.collect();
        endpoints.shrink_to_fit();
        endpoints
    }

    /// All that backs a port, with the port there, ordered by address.
    fn at_port(&self, service_port: u16) -> impl Iterator<Item = (&KnownEndpoint, u16)> {
        self.endpoints.iter().filter_map(move |known| {
            let mut ports = known.ports.iter();
            let port = ports.find(|it| it.service_port == service_port)?;
            Some((known, port.target_port))
        })
    }

    /// What backs a port beside what it has for clients of this node.
    fn elsewhere(&self, port: &ServicePortEntry) -> Option<Arc<Vec<SocketAddr>>> {
        let here = port.endpoints.load();
        let is_here = |it: &IpAddr| here.binary_search_by_key(it, |it| it.address).is_ok();
        let at_port = self.at_port(port.port);
        let elsewhere = at_port.filter(|(known, _)| !is_here(&known.address));
        let elsewhere = elsewhere.map(|(known, port)| SocketAddr::new(known.address, port));
        let elsewhere: Vec<_> = elsewhere.collect();
        (!elsewhere.is_empty()).then(|| Arc::new(elsewhere))
    }

    /// The endpoints that clients of this node may use, with the port there, ordered by address. Which
    /// those are is decided for each family by itself, as EndpointSlices are kept by family too.
    fn candidates<'a>(&'a self, service_port: u16, here: &Here) -> Vec<(&'a KnownEndpoint, u16)> {
        let policy = self.service.as_ref().map(|it| it.internal_traffic);
        let at_port = self.at_port(service_port);
        let (v4, v6): (Vec<_>, Vec<_>) = at_port.partition(|(known, _)| known.address.is_ipv4());
        let mut candidates = Vec::with_capacity(v4.len() + v6.len());
        for family in [v4, v6] {
            let place = |(known, _): &(&'a KnownEndpoint, u16)| known.place.as_deref();
            candidates.extend(reachable(family, here, policy.unwrap_or_default(), place));
        }
        candidates
    }
}

/// With so many of a service's endpoints a new one is compared, to share what they say.
const MOST_COMPARED: usize = 16;

fn same(before: &[Arc<EndpointEntry>], after: &[Arc<EndpointEntry>]) -> bool {
    before.len() == after.len() && before.iter().zip(after).all(|(a, b)| Arc::ptr_eq(a, b))
}
