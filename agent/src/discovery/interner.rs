//! Shares equal names between records: 100,000 workloads have few namespaces, nodes and owners.

use std::collections::HashSet;
use std::hash::Hash;

use weft_core::{Identity, Mesh, Name, TrustDomain, Workload};

/// Names met so far.
#[derive(Debug, Default)]
pub(super) struct Interner {
    names: HashSet<Name>,
    trust_domains: HashSet<TrustDomain>,
    /// How many names were in use when last tidied.
    in_use: usize,
}

impl Interner {
    /// Replaces the workload's names by shared ones. Its own name is its own.
    pub(super) fn share(&mut self, workload: &mut Workload) {
        share(&mut self.names, &mut workload.id.0.namespace);
        share(&mut self.names, &mut workload.node);
        if let Some(owner) = &mut workload.owner {
            share(&mut self.names, &mut owner.kind);
            share(&mut self.names, &mut owner.name);
        }
        if let Mesh::Meshed { identity, .. } = &mut workload.mesh {
            let Identity {
                trust_domain,
                namespace,
                service_account,
            } = identity;
            share(&mut self.trust_domains, trust_domain);
            share(&mut self.names, namespace);
            share(&mut self.names, service_account);
        }
        workload.addresses.shrink_to_fit();
    }

    /// Whether so many names came since it was last tidied that some are surely of the past.
    pub(super) fn is_untidy(&self) -> bool {
        self.names.len() > 2 * self.in_use + 4096
    }

    /// Forgets all names but those of these workloads.
    pub(super) fn tidy<'a>(&mut self, workloads: impl Iterator<Item = &'a Workload>) {
        *self = Self::default();
        for workload in workloads {
            self.share(&mut workload.clone());
        }
        self.in_use = self.names.len();
    }
}

fn share<T: Clone + Eq + Hash>(known: &mut HashSet<T>, value: &mut T) {
    match known.get(value) {
        Some(shared) => *value = shared.clone(),
        None => {
            known.insert(value.clone());
        }
    }
}
