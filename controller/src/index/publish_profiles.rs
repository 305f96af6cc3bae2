//! What ServiceProfiles are in the tables of routes of their Service, and what is to be said about them.

use prost::Message;
use weft_core::ObjectName;
use weft_core::route::{Profile, Route};
use weft_proto::v1;

use super::Index;
use super::profiles::ProfileRecord;
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
            self.dirty.tables.insert(record.service);
        }
    }

    /// The ServiceProfiles that are in force at a port with these routes.
    pub(super) fn profiles_at(&self, service: &ServiceRecord, routes: &[Route]) -> Vec<Profile> {
        let fitting = self.fitting_profiles(&service.name).into_iter();
        let in_force = fitting.filter(|(_, fits)| *fits).map(|(name, _)| name);
        let in_force = in_force.filter(|it| !has_routes(routes, it));
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
        namespace: &weft_core::Name,
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

    /// Says what is to be said about the ServiceProfiles of a Service, whose tables are published.
    pub(super) fn report_profiles(&self, service: &ObjectName) {
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
            if self.routes_beside(service, name) {
                let reason = format!("{service} has routes of this namespace, which come before");
                conflicts.push(Fault::new("metadata.name", reason));
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

    /// Whether a route of requests of the ServiceProfile's namespace is attached to a port of the Service.
    fn routes_beside(&self, service: &ObjectName, profile: &ObjectName) -> bool {
        let names = self.routes.of_parent.get(service).into_iter().flatten();
        let mut beside = names.filter(|it| it.name.namespace == profile.namespace);
        beside.any(|it| it.kind.route_type().is_of_requests())
    }
}

fn has_routes(routes: &[Route], profile: &ObjectName) -> bool {
    let mut beside = routes
        .iter()
        .filter(|it| it.name.name.namespace == profile.namespace);
    beside.any(|it| it.name.kind.route_type().is_of_requests())
}
