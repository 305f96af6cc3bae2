//! What the agent's parts look like from outside: readiness and dump, read from the parts.

use std::sync::Arc;

use serde_json::{Value, json};
use weft_core::NodePod;

use super::readiness::{Facts, Readiness, readiness};
use crate::discovery::{Discovery, Store};
use crate::identity::Identities;
use crate::node::{LocalPod, Pods};

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

    /// What is in force: `pods`, `workloads`, `services`, `policies`, `certificates`,
    /// `control_stream` and more. Never a key.
    pub fn dump(&self) -> Value {
        let mut dump = self.store.dump();
        let mut pods: Vec<Value> = self.pods.all().iter().map(|it| enrolled(it)).collect();
        pods.extend(self.waiting().iter().map(|(pod, reason)| {
            json!({
                "namespace": pod.id.0.namespace,
                "name": pod.id.0.name,
                "uid": pod.uid,
                "netns": pod.netns,
                "state": "waiting",
                "reason": reason,
            })
        }));
        pods.sort_by_key(|it| it["namespace"].to_string() + "/" + &it["name"].to_string());
        dump.insert("pods".to_owned(), Value::Array(pods));
        let certificates = json!(self.identities.status());
        dump.insert("certificates".to_owned(), certificates);
        let state = self.discovery.state().dump();
        dump.insert("control_stream".to_owned(), state);
        Value::Object(dump)
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

fn enrolled(pod: &LocalPod) -> Value {
    json!({
        "namespace": pod.id.0.namespace,
        "name": pod.id.0.name,
        "uid": pod.uid,
        "identity": pod.identity,
        "addresses": pod.record.load().addresses,
        "netns_cookie": pod.cookie,
        "state": "enrolled",
    })
}
