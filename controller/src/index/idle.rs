//! What is written on Services and has no effect there: nobody connects to one without an address of its own, and
//! whoever connects to its pods has terms of none.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use weft_core::ObjectName;

use super::publish_routes::no_parent;
use super::services::ServiceRecord;
use super::{Index, accrual, reliability};
use crate::objects::{Fault, ObjectKey, ObjectKind};
use crate::problems::Facet;

/// The annotations of a Service that say something of requests to it.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Annotated {
    /// How long they may take, and when they are sent again.
    terms: Vec<&'static str>,
    /// When its endpoints are left out. Routes may send requests there, too.
    accrual: Vec<&'static str>,
}

impl Annotated {
    /// Those that are there.
    pub(super) fn of(metadata: &ObjectMeta) -> Self {
        Self {
            terms: written(metadata, &reliability::ANNOTATIONS),
            accrual: written(metadata, &accrual::ANNOTATIONS),
        }
    }
}

impl Index {
    /// Says which annotations of a Service have no effect.
    pub(super) fn report_idle(&self, name: &ObjectName) {
        let service = self.services.get(name);
        let reason = service.and_then(no_parent);
        let mut faults = vec![];
        if let (Some(service), Some(reason)) = (service, reason) {
            let reason = format!("Service {name} {reason}");
            let fault = |it: &&str| Fault::new(format!("metadata.annotations[{it:?}]"), &reason);
            faults.extend(service.annotated.terms.iter().map(fault));
            if !self.is_balanced(service) {
                faults.extend(service.annotated.accrual.iter().map(fault));
            }
        }
        let key = ObjectKey {
            kind: ObjectKind::Service,
            namespace: Some(name.namespace.clone()),
            name: name.name.clone(),
        };
        self.report(&key, Facet::Idle, faults, "it has no effect");
    }

    /// Whether requests are sent to a Service by routes.
    fn is_balanced(&self, service: &ServiceRecord) -> bool {
        let name = &service.name;
        let is_named = self.routes.naming.contains_key(name);
        !service.external_name && (is_named || self.profiles.naming(name).next().is_some())
    }
}

fn written(metadata: &ObjectMeta, names: &[[&'static str; 2]]) -> Vec<&'static str> {
    let Some(annotations) = &metadata.annotations else {
        return vec![];
    };
    let names = names.as_flattened().iter().copied();
    names.filter(|it| annotations.contains_key(*it)).collect()
}
