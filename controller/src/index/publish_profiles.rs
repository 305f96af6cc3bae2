//! What ServiceProfiles are in the tables of routes of their Service, and what is to be said about them.

use prost::Message;
use weft_core::route::{Profile, RouteTable, RouteType};
use weft_core::{Name, ObjectName};
use weft_proto::v1;

use super::Index;
use super::profiles::ProfileRecord;
use super::publish_routes::no_parent;
use super::services::ServiceRecord;
use crate::objects::{Fault, ObjectKey, ObjectKind};
use crate::problems::Facet;

/// What the ServiceProfile of the Service's own namespace may take of a table, and those of all others together;
/// with routes it is less than a resource may take.
const OWN_BYTES: usize = 64 * 1024;
const OTHERS_BYTES: usize = 32 * 1024;
/// Regular expressions of one, and of all others together.
const OWN_PATTERNS: usize = 128;
const OTHERS_PATTERNS: usize = 64;

impl Index {
    pub(super) fn set_profile(&mut self, name: &ObjectName, record: Option<ProfileRecord>) {
        let before = self.profiles.set(name, record.clone());
        for record in [before, record].into_iter().flatten() {
            let targets = record.targets().map(|(_, service, _)| service.clone());
            self.dirty.services.extend(targets);
            self.dirty.tables.insert(record.service);
        }
    }

    /// The ServiceProfiles that are in force at a port with these routes.
    pub(super) fn profiles_at(&self, service: &ServiceRecord, routes: &RouteTable) -> Vec<Profile> {
        let fitting = self.fitting_profiles(&service.name).into_iter();
        let in_force = fitting.filter(|(_, fits)| *fits).map(|(name, _)| name);
        let in_force = in_force.filter(|it| !routes_come_before(routes, &it.namespace));
        let records = in_force.filter_map(|it| self.profiles.records.get(it));
        let resolved = records.map(|record| {
            let namespace = &record.profile.namespace;
            record.resolved(|name, port| self.resolve_of_profile(namespace, service, name, port))
        });
        resolved.collect()
    }

    /// All ServiceProfiles of a Service, and whether there is room for each.
    fn fitting_profiles(&self, service: &ObjectName) -> Vec<(&ObjectName, bool)> {
        let names = self.profiles.of_service.get(service).into_iter().flatten();
        let (mut bytes, mut patterns) = (0, 0);
        let mut all = vec![];
        for name in names {
            let Some(record) = self.profiles.records.get(name) else {
                continue;
            };
            let conditions = record
                .profile
                .routes
                .iter()
                .map(|it| it.condition.patterns());
            let cost = (
                v1::Profile::from(record.profile.clone()).encoded_len(),
                conditions.sum::<usize>(),
            );
            let fits = if name.namespace == service.namespace {
                cost.0 <= OWN_BYTES && cost.1 <= OWN_PATTERNS
            } else {
                bytes + cost.0 <= OTHERS_BYTES && patterns + cost.1 <= OTHERS_PATTERNS
            };
            if fits && name.namespace != service.namespace {
                (bytes, patterns) = (bytes + cost.0, patterns + cost.1);
            }
            all.push((name, fits));
        }
        all
    }

    /// Whether a ServiceProfile of a namespace may send requests to a port: of a Service there, or of the one
    /// that it is for.
    fn resolve_of_profile(
        &self,
        namespace: &Name,
        parent: &ServiceRecord,
        name: &ObjectName,
        port: u16,
    ) -> Result<(), String> {
        if name.namespace != *namespace && *name != parent.name {
            return Err(format!("{name} is not of the ServiceProfile's namespace"));
        }
        let record = self.services.get(name).filter(|it| !it.external_name);
        let ports = record.map(|it| it.ports.as_slice()).unwrap_or_default();
        match ports.iter().any(|it| it.number == port) {
            true => Ok(()),
            false => Err(format!("there is no Service {name} with a port {port}")),
        }
    }

    /// Says what is to be said about the ServiceProfiles of a Service with these tables.
    pub(super) fn report_profiles(&self, service: &ObjectName, tables: &[RouteTable]) {
        let record = self.services.get(service);
        for (name, fits) in self.fitting_profiles(service) {
            let Some(profile) = self.profiles.records.get(name) else {
                continue;
            };
            let key = ObjectKey {
                kind: ObjectKind::ServiceProfile,
                namespace: Some(name.namespace.clone()),
                name: name.name.clone(),
            };
            let mut unresolved = vec![];
            match record {
                None => {
                    let reason = format!("Service {service} is not known");
                    unresolved.push(Fault::new("metadata.name", reason));
                }
                Some(record) => unresolved.extend(self.unresolved_of_profile(record, profile)),
            }
            let effect = "what would go there is answered with an error";
            self.report(&key, Facet::Reference, unresolved, effect);
            let mut conflicts = vec![];
            if !fits {
                let reason = "it takes too much memory, or has too many regular expressions";
                conflicts.push(Fault::new("spec", reason));
            }
            if let Some(reason) = record.and_then(no_parent) {
                let reason = format!("Service {service} {reason}");
                conflicts.push(Fault::new("metadata.name", reason));
            }
            for (whose, is_own) in [("this namespace", true), ("its own namespace", false)] {
                let before = tables.iter().filter(|it| {
                    routes_come_before(it, &name.namespace)
                        && has_routes(it, &name.namespace) == is_own
                });
                let ports: Vec<u16> = before.map(|it| it.name().port).collect();
                if let Some(ports) = ports_told(&ports) {
                    let reason =
                        format!("{service} has routes of {whose} at {ports}, which come before");
                    conflicts.push(Fault::new("metadata.name", reason));
                }
            }
            self.report(&key, Facet::Conflict, conflicts, "it has no effect there");
        }
    }

    fn unresolved_of_profile(&self, service: &ServiceRecord, record: &ProfileRecord) -> Vec<Fault> {
        let namespace = &record.profile.namespace;
        let targets = record.targets();
        let faults = targets.filter_map(|(index, name, port)| {
            let resolved = self.resolve_of_profile(namespace, service, name, port);
            let field = format!("spec.dstOverrides[{index}].authority");
            resolved.err().map(|reason| Fault::new(field, reason))
        });
        faults.collect()
    }
}

/// Whether routes decide about the requests of clients in a namespace: their own, or those of the Service's
/// namespace. No ServiceProfile there has a say then.
fn routes_come_before(table: &RouteTable, namespace: &Name) -> bool {
    let in_force = table.route_type(namespace);
    in_force.is_some_and(RouteType::is_of_requests)
}

fn has_routes(table: &RouteTable, namespace: &Name) -> bool {
    let mut routes = table.routes().iter();
    routes.any(|it| it.name.name.namespace == *namespace)
}

/// Ports for people, a few of them; none: there are none.
fn ports_told(ports: &[u16]) -> Option<String> {
    let shown: Vec<String> = ports.iter().take(SHOWN_PORTS).map(u16::to_string).collect();
    let shown = shown.join(", ");
    match ports.len() {
        0 => None,
        1 => Some(format!("port {shown}")),
        count if count <= SHOWN_PORTS => Some(format!("ports {shown}")),
        count => Some(format!("ports {shown} and {} more", count - SHOWN_PORTS)),
    }
}

const SHOWN_PORTS: usize = 8;
