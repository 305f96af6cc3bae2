//! Policies of CNIs' own kinds: which meshed pods they select.
//!
//! Nobody but the CNI evaluates them, and of connections in the mesh it sees the tunnel's port and nothing more. So the
//! least is done that keeps it in place: what such a pod has with others of its node goes by tunnels too, past the CNI,
//! and it is said which policies are not what they seem.
//!
//! What cannot be read, or nobody knows, selects: a tunnel too many costs a little, one too few a policy.
//!
//! Which pods a policy selects is kept nowhere, as there may be thousands of either: of each pod whether any selects it,
//! and of each policy one pod, as long as there is one.

mod calico;
mod cilium;

use std::collections::{BTreeMap, BTreeSet, HashMap};

use weft_core::{Name, ObjectName};

use self::calico::Label;
use super::Index;
use super::network::NAME_LABEL;
use super::pods::{NamespaceRecord, PodRecord};
use super::selector::Selector;
use crate::objects::cni::{CniKind, CniPolicy};
use crate::objects::{Fault, ObjectKey, ObjectKind};
use crate::problems::Facet;

/// All of them.
#[derive(Debug, Default)]
pub(super) struct CniPolicies {
    /// By the namespace of those that have one.
    records: HashMap<Option<Name>, BTreeMap<ObjectKey, CniRecord>>,
    /// Of each that selects pods of the mesh, one of these;
    examples: HashMap<ObjectKey, ObjectName>,
    /// and the other way round.
    examples_at: HashMap<ObjectName, BTreeSet<ObjectKey>>,
}

/// Whom a policy selects, among the pods of its namespace if it has one.
#[derive(Clone, Debug)]
pub(super) enum CniRecord {
    /// All, as it cannot be read.
    Everybody,
    /// None: others look after it.
    Nobody,
    Cilium(Vec<Selector>),
    Calico(Box<calico::Selection>),
}

impl CniRecord {
    /// Reads a policy.
    ///
    /// # Errors
    /// It cannot be read whom it selects.
    fn read(key: &ObjectKey, kind: CniKind, policy: &CniPolicy) -> Result<Self, Fault> {
        let CniPolicy { spec, specs, .. } = policy;
        let is_namespaced = kind.is_namespaced();
        if kind.is_of_cilium() {
            return cilium::read(spec, specs, is_namespaced).map(Self::Cilium);
        }
        // Calico's API server shows policies of Kubernetes among its own, and lets nobody write one of such a name.
        if kind == CniKind::Calico && key.name.as_str().starts_with("knp.default.") {
            return Ok(Self::Nobody);
        }
        let selection = calico::Selection::read(spec, is_namespaced)?;
        Ok(Self::Calico(Box::new(selection)))
    }

    fn selects(&self, pod: &PodRecord, namespace: Option<&NamespaceRecord>) -> bool {
        let name = pod.id.0.namespace.as_str();
        let account = pod.service_account.as_str();
        let of_namespace = |key: &str| match key {
            NAME_LABEL => Some(name),
            _ => namespace?.labels.get(key).map(String::as_str),
        };
        let of_pod = |key: &str| pod.labels.get(key).map(String::as_str);
        let selection = match self {
            Self::Everybody => return true,
            Self::Nobody => return false,
            Self::Cilium(selectors) => {
                let selects = |it: &Selector| {
                    it.selects_with(|key| match key {
                        cilium::NAMESPACE => Some(name),
                        cilium::ACCOUNT => Some(account),
                        _ => match key.strip_prefix(cilium::OF_NAMESPACE) {
                            Some(key) => of_namespace(key),
                            None => of_pod(key),
                        },
                    })
                };
                return selectors.iter().any(selects);
            }
            Self::Calico(selection) => selection,
        };
        let of_namespace = |key: &str| match key {
            calico::NAME => Label::Is(Some(name)),
            _ => Label::Is(of_namespace(key)),
        };
        let of_account = |key: &str| match key {
            calico::NAME => Label::Is(Some(account)),
            // They are not read.
            _ => Label::Unknown,
        };
        let of_pod = |key: &str| match key {
            calico::NAMESPACE => Label::Is(Some(name)),
            calico::ACCOUNT => Label::Is(Some(account)),
            calico::ORCHESTRATOR => Label::Is(Some("k8s")),
            _ => {
                if let Some(key) = key.strip_prefix(calico::OF_NAMESPACE) {
                    of_namespace(key)
                } else if let Some(key) = key.strip_prefix(calico::OF_ACCOUNT) {
                    of_account(key)
                } else {
                    Label::Is(of_pod(key))
                }
            }
        };
        let may = |holds: Option<bool>| holds.unwrap_or(true);
        may(selection.pods.holds(&of_pod))
            && may(selection.namespaces.holds(&of_namespace))
            && may(selection.accounts.holds(&of_account))
    }
}

impl CniPolicies {
    pub(super) fn get(&self, key: &ObjectKey) -> Option<&CniRecord> {
        self.records.get(&key.namespace)?.get(key)
    }

    /// Those that may select pods of a namespace.
    fn of(&self, namespace: &Name) -> impl Iterator<Item = (&ObjectKey, &CniRecord)> {
        let of = |it: Option<Name>| self.records.get(&it).into_iter().flatten();
        of(Some(namespace.clone())).chain(of(None))
    }

    fn put(&mut self, key: &ObjectKey, record: Option<CniRecord>) -> Option<CniRecord> {
        let there = self.records.entry(key.namespace.clone()).or_default();
        let before = match record {
            Some(record) => there.insert(key.clone(), record),
            None => there.remove(key),
        };
        if there.is_empty() {
            self.records.remove(&key.namespace);
        }
        before
    }

    fn set_example(&mut self, key: &ObjectKey, pod: &ObjectName) {
        self.examples.insert(key.clone(), pod.clone());
        let at = self.examples_at.entry(pod.clone()).or_default();
        at.insert(key.clone());
    }

    fn forget_example(&mut self, key: &ObjectKey) {
        if let Some(pod) = self.examples.remove(key)
            && let Some(at) = self.examples_at.get_mut(&pod)
        {
            at.remove(key);
            if at.is_empty() {
                self.examples_at.remove(&pod);
            }
        }
    }

    /// The same policy of Calico's as another kind has it, if that is there: as its own API server shows it, or as it is kept.
    fn twin(&self, key: &ObjectKey, of: &CniRecord) -> Option<ObjectKey> {
        let ObjectKind::Cni(kind) = key.kind else {
            return None;
        };
        let kind = ObjectKind::Cni(kind.kept().or(kind.shown())?);
        let there = self.records.get(&key.namespace)?;
        let names = calico::names(&key.name, of).into_iter();
        let mut keys = names.map(|name| ObjectKey {
            kind,
            namespace: key.namespace.clone(),
            name,
        });
        keys.find(|it| there.contains_key(it))
    }

    /// A pod is an example no more. Of what?
    fn forget_pod(&mut self, pod: &ObjectName) -> BTreeSet<ObjectKey> {
        let policies = self.examples_at.remove(pod).unwrap_or_default();
        for policy in &policies {
            self.examples.remove(policy);
        }
        policies
    }
}

impl Index {
    /// Takes in a policy.
    ///
    /// # Errors
    /// It cannot be read whom it selects.
    pub(super) fn read_cni_policy(
        &mut self,
        key: &ObjectKey,
        kind: CniKind,
        policy: &CniPolicy,
    ) -> Result<Vec<Fault>, Fault> {
        let record = CniRecord::read(key, kind, policy)?;
        self.set_cni_policy(key, Some(record));
        Ok(vec![])
    }

    /// A policy cannot be read. What follows from that, as it is said.
    pub(super) fn refuse_cni_policy(&mut self, key: &ObjectKey) -> &'static str {
        // Whatever it said before: its CNI may be able to read it.
        self.set_cni_policy(key, Some(CniRecord::Everybody));
        "it counts as if it selected all that it may: what these have with others of their node goes by tunnels"
    }

    pub(super) fn delete_cni_policy(&mut self, key: &ObjectKey) {
        self.set_cni_policy(key, None);
    }

    fn set_cni_policy(&mut self, key: &ObjectKey, record: Option<CniRecord>) {
        let before = self.cni_policies.put(key, record);
        self.cni_policies.forget_example(key);
        let now = self.cni_policies.get(key);
        let is_affected = |pod: &PodRecord| {
            let namespace = self.namespaces.get(&pod.id.0.namespace);
            let selects = |it: Option<&CniRecord>| it.is_some_and(|it| it.selects(pod, namespace));
            selects(before.as_ref()) != selects(now)
        };
        let affected = self.pods_within(key).filter(|(_, it)| is_affected(it));
        let affected: Vec<ObjectName> = affected.map(|(name, _)| name.clone()).collect();
        let records = before.iter().chain(now);
        let twins = records.filter_map(|it| self.cni_policies.twin(key, it));
        let twins: Vec<ObjectKey> = twins.collect();
        self.dirty.pods.extend(affected);
        self.dirty.cni.extend(twins);
        self.dirty.cni.insert(key.clone());
    }

    /// The pods that a policy may be about.
    fn pods_within(&self, key: &ObjectKey) -> impl Iterator<Item = (&ObjectName, &PodRecord)> {
        let namespace = key.namespace.as_ref();
        let there = namespace.and_then(|it| self.pods_in.get(it));
        let there = there.into_iter().flatten();
        let there = there.filter_map(|name| Some((name, self.pods.get(name)?)));
        let all = namespace.is_none().then_some(&self.pods);
        there.chain(all.into_iter().flatten())
    }

    /// Whether a policy selects a pod.
    pub(super) fn is_selected_by_cni(&self, pod: &PodRecord) -> bool {
        let namespace = self.namespaces.get(&pod.id.0.namespace);
        let mut policies = self.cni_policies.of(&pod.id.0.namespace);
        policies.any(|(_, it)| it.selects(pod, namespace))
    }

    /// Notes whether a pod is one of the mesh that policies select.
    pub(super) fn note_held(&mut self, name: &ObjectName, is_held: bool) {
        let policies = self.cni_policies.forget_pod(name);
        self.dirty.cni.extend(policies);
        let Some(pod) = self.pods.get(name).filter(|_| is_held) else {
            return;
        };
        let namespace = self.namespaces.get(&name.namespace);
        let policies = self.cni_policies.of(&name.namespace);
        let without = policies.filter(|(key, _)| !self.cni_policies.examples.contains_key(key));
        let selecting = without.filter(|(_, it)| it.selects(pod, namespace));
        let selecting: Vec<ObjectKey> = selecting.map(|(key, _)| key.clone()).collect();
        for key in selecting {
            self.cni_policies.set_example(&key, name);
            self.dirty.cni.insert(key);
        }
    }

    /// Says what is to be said of policies, of which it changed.
    pub(super) fn report_cni_policies(&mut self) {
        let mut changed = std::mem::take(&mut self.dirty.cni);
        for policy in &changed {
            self.find_example(policy);
        }
        // Of one that is there twice it is said once.
        let policies = &self.cni_policies;
        let twins = changed.iter();
        let twins = twins.filter_map(|it| policies.twin(it, policies.get(it)?));
        let twins: Vec<ObjectKey> = twins.collect();
        changed.extend(twins);
        for policy in changed {
            self.report_cni(&policy);
        }
    }

    fn find_example(&mut self, key: &ObjectKey) {
        if !self.cni_policies.examples.contains_key(key)
            && let Some(pod) = self.held_by(key).cloned()
        {
            self.cni_policies.set_example(key, &pod);
        }
    }

    /// Says of a policy that it does not hold inside of the mesh, if it selects anybody there.
    fn report_cni(&self, key: &ObjectKey) {
        let policies = &self.cni_policies;
        // What stands for policies that are not known is no policy that somebody could write otherwise.
        let is_policy = key.kind.is_namespaced() == key.namespace.is_some();
        let selects = policies.examples.contains_key(key) && is_policy;
        let is_kept = matches!(key.kind, ObjectKind::Cni(kind) if kind.shown().is_some());
        let twin = policies.get(key).filter(|_| is_kept);
        let twin = twin.and_then(|it| policies.twin(key, it));
        let is_said = twin.is_some_and(|it| policies.examples.contains_key(&it));
        // Without the pods' names: they come and go, and it would be said anew each time.
        let reason = "it selects pods of the mesh: of what meshed pods have with each other the CNI sees port 15008 only, and \
                      what it says of the ports of applications is not enforced there";
        let faults = (selects && !is_said).then(|| Fault::new("spec", reason));
        let effect = "what these pods have with others of their node goes by tunnels too: write such rules as NetworkPolicies of \
                      networking.k8s.io, Servers or AuthorizationPolicies";
        self.report(key, Facet::Idle, faults.into_iter().collect(), effect);
    }

    /// A pod of the mesh that a policy selects.
    fn held_by(&self, key: &ObjectKey) -> Option<&ObjectName> {
        let record = self.cni_policies.get(key)?;
        let mut pods = self.pods_within(key);
        let found = pods.find(|(name, pod)| {
            let is_held = self.published.pods.get(*name).is_some_and(|it| it.is_held);
            is_held && record.selects(pod, self.namespaces.get(&name.namespace))
        });
        found.map(|(name, _)| name)
    }
}

/// Refuses a policy whose selectors are larger than anybody writes: they are asked about each pod anew, and everybody's
/// pods wait for that.
fn few_terms(count: usize) -> Result<(), Fault> {
    if count <= MOST_TERMS {
        return Ok(());
    }
    let reason = format!("more than {MOST_TERMS} terms and values in its selectors");
    Err(Fault::new("spec", reason))
}

/// Terms and values that the selectors of a policy may have.
const MOST_TERMS: usize = 256;
