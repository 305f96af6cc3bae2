//! What somebody wants to see.

use std::ops::RangeInclusive;

use weft_core::{Identity, ObjectName, Owner, WorkloadId};

use super::{Begin, Direction, Glance};

/// What somebody wants to see: what all of this is true of.
#[derive(Clone, Debug)]
pub struct Spec {
    /// Of these pods.
    pub target: Scope,
    /// Of these servers they are clients.
    pub to: Option<Scope>,
    /// Of these clients they are servers.
    pub from: Option<Scope>,
    /// Requests with this method.
    pub method: Option<String>,
    /// Requests whose path begins so.
    pub path_prefix: Option<String>,
    /// Responses with these statuses.
    pub status: Option<RangeInclusive<u16>>,
    /// Who the other end is: a SPIFFE ID, or `namespace/service-account`.
    pub identity: Option<String>,
    /// At most so many exchanges and flows.
    pub max_per_second: u32,
}

/// Some of the workloads.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scope {
    /// In this namespace; none: in any.
    pub namespace: Option<String>,
    /// Of this kind.
    pub kind: Named,
    /// With this name; none: with any.
    pub name: Option<String>,
}

/// What a name is of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Named {
    /// Nothing is named.
    #[default]
    Any,
    /// Pods.
    Pod,
    /// What pods are asked by.
    Service,
    /// What created pods: `deployment`, …
    Owner(String),
}

/// What is known of one of the ends.
#[derive(Clone, Copy, Debug)]
pub struct WhoIs<'a> {
    pub(super) workload: Option<&'a WorkloadId>,
    pub(super) owner: Option<&'a Owner>,
    pub(super) service: Option<&'a ObjectName>,
}

impl Spec {
    /// Whether it may be wanted, by what is known of it without looking anything up. Of the target nothing is asked.
    pub(super) fn may_want(&self, glance: &Glance<'_>) -> bool {
        let is_outbound = glance.direction == Direction::Outbound;
        let (method, path) = glance.asked.unzip();
        (self.to.is_none() || is_outbound)
            && (self.from.is_none() || !is_outbound)
            && (self.status.is_none() || glance.asked.is_some())
            && self
                .method
                .as_deref()
                .is_none_or(|wanted| method.is_some_and(|it| it.eq_ignore_ascii_case(wanted)))
            && self
                .path_prefix
                .as_deref()
                .is_none_or(|wanted| path.is_some_and(|it| it.starts_with(wanted)))
    }

    /// Whether nothing more is to be asked about what may be wanted.
    pub(super) fn is_settled(&self) -> bool {
        self.to.is_none() && self.from.is_none() && self.identity.is_none()
    }

    /// Whether what may be wanted is, by who the two ends are.
    pub(super) fn wants(&self, begin: &Begin) -> bool {
        let is_outbound = begin.direction == Direction::Outbound;
        let server = WhoIs {
            service: begin.service.as_ref().map(|(name, _)| name),
            ..begin.destination.is()
        };
        let to = self.to.as_ref();
        let from = self.from.as_ref();
        let other = match is_outbound {
            true => &begin.destination,
            false => &begin.source,
        };
        to.is_none_or(|it| it.has(&server))
            && from.is_none_or(|it| it.has(&begin.source.is()))
            && self.identity.as_ref().is_none_or(|wanted| {
                let identity = other.identity.as_ref();
                identity.is_some_and(|it| is_called(it, wanted))
            })
    }

    /// Whether a response's status is wanted.
    pub(super) fn wants_status(&self, status: u16) -> bool {
        self.status.as_ref().is_none_or(|it| it.contains(&status))
    }
}

/// Whether it is that one, as a SPIFFE ID or by namespace and service account.
fn is_called(identity: &Identity, wanted: &str) -> bool {
    match wanted.split_once('/') {
        Some((namespace, account)) if !wanted.contains(':') => {
            identity.namespace.as_str() == namespace && identity.service_account.as_str() == account
        }
        _ => identity.to_string() == wanted,
    }
}

impl Scope {
    /// Whether it is among these.
    pub(super) fn has(&self, who: &WhoIs<'_>) -> bool {
        let pod = who.workload.map(|it| &it.0);
        let (namespace, name) = match &self.kind {
            Named::Service => match who.service {
                Some(service) => (Some(&service.namespace), Some(&service.name)),
                None => return false,
            },
            Named::Owner(kind) => match who.owner.filter(|it| it.kind.as_str() == kind) {
                Some(owner) => (pod.map(|it| &it.namespace), Some(&owner.name)),
                None => return false,
            },
            Named::Any | Named::Pod => {
                let of_service = who.service.filter(|_| self.kind == Named::Any);
                let known = pod.or(of_service);
                if known.is_none() {
                    return false;
                }
                (known.map(|it| &it.namespace), known.map(|it| &it.name))
            }
        };
        let is = |wanted: &Option<String>, found: Option<&weft_core::Name>| {
            let wanted = wanted.as_ref();
            wanted.is_none_or(|it| found.is_some_and(|found| found.as_str() == it))
        };
        is(&self.namespace, namespace) && is(&self.name, name)
    }
}

impl<'a> WhoIs<'a> {
    /// A pod.
    pub fn pod(id: &'a WorkloadId, owner: Option<&'a Owner>) -> Self {
        Self {
            workload: Some(id),
            owner,
            service: None,
        }
    }
}
