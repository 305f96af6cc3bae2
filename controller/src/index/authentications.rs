//! Which AuthorizationPolicies name MeshTLSAuthentications and NetworkAuthentications: what is to be made anew when one
//! comes or goes, and which of them are nobody's. Agents are told of an authentication with the policies that name it,
//! as they are of these with what they are for: of one that is only named by policies for what is not there, not at all.

use std::collections::HashMap;

use weft_core::{AuthorizationName, ObjectName, PolicyGroup};

use super::Index;
use super::policies::{AuthorizationRecord, Required};
use super::publish_policies::own_or_other;
use crate::objects::{Fault, ObjectKey, ObjectKind};
use crate::problems::Facet;

impl Index {
    /// Keeps who names what, when a policy is another one.
    pub(super) fn names_authentications(
        &mut self,
        policy: &AuthorizationName,
        before: Option<&AuthorizationRecord>,
        now: Option<&AuthorizationRecord>,
    ) {
        let naming = &mut self.policies.naming;
        for name in before.into_iter().flat_map(named) {
            if let Some(policies) = naming.get_mut(name) {
                policies.remove(policy);
                if policies.is_empty() {
                    naming.remove(name);
                }
            }
            self.dirty.authentications.insert(name.clone());
        }
        for name in now.into_iter().flat_map(named) {
            let policies = naming.entry(name.clone()).or_default();
            policies.insert(policy.clone());
            self.dirty.authentications.insert(name.clone());
        }
    }

    /// An authentication of this name appeared, changed or went.
    pub(super) fn authentication_changed(&mut self, name: &ObjectName) {
        self.dirty.authentications.insert(name.clone());
        let naming = self.policies.naming.get(name);
        for policy in naming.cloned().unwrap_or_default() {
            let record = self.policies.authorizations.get(&policy);
            let target = record.map(|it| it.target.clone());
            if let Some(target) = target {
                self.dirty_servers(&policy.name.namespace, &target);
            }
            self.dirty.authorizations.insert(policy);
        }
    }

    /// Keeps whether what a policy is for is there.
    pub(super) fn note_target(&mut self, policy: &AuthorizationName, is_there: bool) {
        let policies = &mut self.policies;
        let is_change = match is_there {
            true => policies.without_target.remove(policy),
            false => policies.without_target.insert(policy.clone()),
        };
        let record = policies.authorizations.get(policy);
        for name in record.filter(|_| is_change).into_iter().flat_map(named) {
            self.dirty.authentications.insert(name.clone());
        }
    }

    /// Says of the authentications of a name whether a policy uses them. It is no problem if none does: one that is
    /// written first is not.
    pub(super) fn report_authentications(&self, name: &ObjectName) {
        let naming = self.policies.naming.get(name).into_iter().flatten();
        let (without, with): (Vec<_>, Vec<_>) =
            naming.partition(|it| self.policies.without_target.contains(*it));
        let (named, used) = (
            self.authentications_of(&without),
            self.authentications_of(&with),
        );
        for group in [PolicyGroup::Weft, PolicyGroup::Linkerd] {
            for kind in [
                ObjectKind::MeshTlsAuthentication(group),
                ObjectKind::NetworkAuthentication(group),
            ] {
                let object = key(kind, name);
                let reason = match named.contains(&object) {
                    true => "what the AuthorizationPolicies are for that name it is not there",
                    false => "no AuthorizationPolicy names it",
                };
                let faults = match used.contains(&object) {
                    true => vec![],
                    false => vec![Fault::new("", reason)],
                };
                let effect = "agents are told of it with the first one that does";
                self.statuses
                    .faults(&object, Facet::Unused, &faults, effect);
            }
        }
    }

    /// The authentications that policies mean.
    fn authentications_of(&self, policies: &[&AuthorizationName]) -> Vec<ObjectKey> {
        let policies = policies.iter();
        let records = policies.filter_map(|it| self.policies.authorizations.get(*it));
        let required = records.flat_map(|it| it.required.iter().map(|of| (it.name.group, of)));
        let meant = required.filter_map(|(own, it)| self.named_authentication(own, it));
        meant.collect()
    }

    /// The authentication that a policy means by what it names.
    pub(super) fn named_authentication(
        &self,
        own: PolicyGroup,
        required: &Required,
    ) -> Option<ObjectKey> {
        let policies = &self.policies;
        match required {
            Required::MeshTls(group, name) => {
                let (group, name) = meant(&policies.mesh_tls, own, *group, name);
                Some(key(ObjectKind::MeshTlsAuthentication(group), &name))
            }
            Required::Network(group, name) => {
                let (group, name) = meant(&policies.networks, own, *group, name);
                Some(key(ObjectKind::NetworkAuthentication(group), &name))
            }
            Required::Identity(_) | Required::Nothing(_) => None,
        }
    }
}

/// Of the authentications of a kind and a name the one that a policy of a group means: of the group that it names, or else
/// of its own, or of the other one if only that has it.
pub(super) fn meant<T>(
    all: &HashMap<(PolicyGroup, ObjectName), T>,
    own: PolicyGroup,
    group: Option<PolicyGroup>,
    name: &ObjectName,
) -> (PolicyGroup, ObjectName) {
    let has = |group| all.contains_key(&(group, name.clone()));
    (
        group.unwrap_or_else(|| own_or_other(own, has)),
        name.clone(),
    )
}

/// The authentications that a policy names.
fn named(policy: &AuthorizationRecord) -> impl Iterator<Item = &ObjectName> {
    policy.required.iter().filter_map(|it| match it {
        Required::MeshTls(_, name) | Required::Network(_, name) => Some(name),
        Required::Identity(_) | Required::Nothing(_) => None,
    })
}

fn key(kind: ObjectKind, name: &ObjectName) -> ObjectKey {
    ObjectKey {
        kind,
        namespace: Some(name.namespace.clone()),
        name: name.name.clone(),
    }
}
