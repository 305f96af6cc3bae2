//! What the agent's parts look like from outside: readiness and dump, read from the parts.

use std::net::IpAddr;
use std::sync::Arc;

use serde::Serialize;
use serde_json::Value;
use weft_core::{Identity, NodePod, ObjectName};

use super::readiness::{Facts, Readiness, readiness};
use crate::discovery::{Discovery, Store, StoreDump};
use crate::identity::{CertificateStatus, Identities};
use crate::node::Pods;

/// The parts. Cheap to clone.
#[derive(Clone)]
pub struct Views {
    /// What is known.
    pub store: Arc<Store>,
    /// Where it comes from.
    pub discovery: Discovery,
    /// Certificates.
    pub identities: Arc<Identities>,
    /// The enrolled pods.
    pub pods: Arc<Pods>,
}

impl Views {
    /// Whether the agent is ready.
    pub fn readiness(&self) -> Readiness {
        let state = self.discovery.state();
        let waiting = self.waiting();
        readiness(&Facts {
            standing: self.pods.standing(),
            hooks: self.pods.hooks().problem.clone(),
            complete: self.store.is_complete(),
            connected: state.connected,
            knowledge_age: state.knowledge_age(),
            rejected: state.rejected.len(),
            last_error: state.last_error,
            enrolled: self.pods.all().len(),
            waiting: waiting
                .into_iter()
                .map(|(pod, reason)| (pod.id.to_string(), reason))
                .collect(),
            certificates: self.identities.status(),
        })
    }

    /// What is in force, as JSON: `pods`, `workloads`, `services`, `policies`, `certificates`,
    /// `control_stream` and more. Never a key.
    pub fn dump(&self) -> Vec<u8> {
        #[derive(Serialize)]
        struct Dump {
            pods: Vec<ShownPod>,
            certificates: Vec<CertificateStatus>,
            control_stream: Value,
            #[serde(flatten)]
            store: StoreDump,
        }
        let dump = Dump {
            pods: self.shown_pods(),
            certificates: self.identities.status(),
            control_stream: self.discovery.state().dump(),
            store: self.store.dump(),
        };
        // Fails only for maps whose keys are no text; there are none.
        let mut bytes = serde_json::to_vec_pretty(&dump).unwrap_or_default();
        bytes.push(b'\n');
        bytes
    }

    fn shown_pods(&self) -> Vec<ShownPod> {
        let enrolled = self.pods.all().into_iter().map(|pod| ShownPod {
            name: pod.id.0.clone(),
            uid: pod.uid.clone(),
            state: "enrolled",
            reason: None,
            identity: Some(pod.identity.clone()),
            addresses: pod.record.load().addresses.clone(),
            netns_cookie: Some(pod.cookie),
        });
        let waiting = self.waiting().into_iter().map(|(pod, reason)| ShownPod {
            name: pod.id.0.clone(),
            uid: pod.uid.clone(),
            state: "waiting",
            reason,
            identity: None,
            addresses: Vec::new(),
            netns_cookie: None,
        });
        let mut pods: Vec<ShownPod> = enrolled.chain(waiting).collect();
        pods.sort_by(|a, b| a.name.cmp(&b.name));
        pods
    }

    /// Pods of the node that are not enrolled, with the reason where one is known.
    fn waiting(&self) -> Vec<(Arc<NodePod>, Option<String>)> {
        let reasons = self.pods.waiting();
        let wanted = self.store.node_pods().into_iter();
        let missing = wanted.filter(|it| self.pods.by_id(&it.id).is_none());
        missing
            .map(|pod| {
                let waiting = reasons.iter().find(|it| it.pod == pod.id);
                let reason = waiting.map(|it| it.reason.clone());
                (pod, reason)
            })
            .collect()
    }
}

#[derive(Serialize)]
struct ShownPod {
    #[serde(flatten)]
    name: ObjectName,
    uid: String,
    /// `enrolled`, or `waiting` with a reason.
    state: &'static str,
    reason: Option<String>,
    identity: Option<Identity>,
    addresses: Vec<IpAddr>,
    netns_cookie: Option<u64>,
}
