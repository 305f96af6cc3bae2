//! What the agent's parts look like from outside: readiness and dump, read from the parts.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;
use serde_json::{Value, json};
use weft_core::{Identity, NodePod, ObjectName, Owner};

use super::readiness::{Facts, Readiness, readiness};
use crate::bpf::Bpf;
use crate::discovery::{Discovery, Store, StoreDump};
use crate::identity::{CertificateStatus, Identities};
use crate::node::{Pods, Waiting};

/// The parts. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Views {
    /// What is known.
    pub store: Arc<Store>,
    /// Where it comes from.
    pub discovery: Discovery,
    /// Certificates.
    pub identities: Arc<Identities>,
    /// The enrolled pods.
    pub pods: Arc<Pods>,
    /// The kernel programs.
    pub bpf: Arc<Bpf>,
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
            waiting: named(&waiting, true),
            set_aside: named(&waiting, false),
            certificates: self.identities.status(),
            // A clock before 1970 is wrong, which 1970 is as well.
            now: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .unwrap_or_default(),
        })
    }

    /// What is in force, as JSON: `pods`, `workloads`, `services`, `policies`, `certificates`,
    /// `control_stream`, `connect_hooks` and more. Never a key.
    pub fn dump(&self) -> Vec<u8> {
        #[derive(Serialize)]
        struct Dump {
            pods: Vec<ShownPod>,
            certificates: Vec<CertificateStatus>,
            control_stream: Value,
            connect_hooks: Value,
            #[serde(flatten)]
            store: StoreDump,
        }
        let dump = Dump {
            pods: self.shown_pods(),
            certificates: self.identities.status(),
            control_stream: self.discovery.state().dump(),
            connect_hooks: self.connect_hooks(),
            store: self.store.dump(),
        };
        // Fails only for maps whose keys are no text; there are none.
        let mut bytes = serde_json::to_vec_pretty(&dump).unwrap_or_default();
        bytes.push(b'\n');
        bytes
    }

    /// The pods of the node, as `pods` of the dump has them, as JSON.
    pub fn pods(&self) -> Vec<u8> {
        // Fails only for maps whose keys are no text; there are none.
        serde_json::to_vec(&self.shown_pods()).unwrap_or_default()
    }

    /// The programs that see the pods' connects, in their order, or why that cannot be said.
    fn connect_hooks(&self) -> Value {
        match self.bpf.connect_hooks() {
            Ok(hooks) => json!(hooks),
            Err(error) => json!({ "error": format!("{:#}", anyhow::Error::from(error)) }),
        }
    }

    fn shown_pods(&self) -> Vec<ShownPod> {
        let enrolled = self.pods.all().into_iter().map(|pod| ShownPod {
            name: pod.id.0.clone(),
            uid: pod.uid.clone(),
            state: "enrolled",
            reason: None,
            identity: Some(pod.identity.clone()),
            owner: pod.record.load().owner.clone(),
            addresses: pod.record.load().addresses.clone(),
            netns_cookie: Some(pod.cookie),
            by_tunnels_only: pod.is_by_tunnels_only(),
        });
        let waiting = self.waiting().into_iter().map(|(pod, waiting)| ShownPod {
            name: pod.id.0.clone(),
            uid: pod.uid.clone(),
            state: "waiting",
            reason: waiting.map(|it| it.reason),
            identity: None,
            owner: self.store.workload(&pod.id).and_then(|it| it.owner.clone()),
            addresses: Vec::new(),
            netns_cookie: None,
            by_tunnels_only: pod.by_tunnels_only,
        });
        let mut pods: Vec<ShownPod> = enrolled.chain(waiting).collect();
        pods.sort_by(|a, b| a.name.cmp(&b.name));
        pods
    }

    /// Pods of the node that are not enrolled, with the reason where one is known.
    fn waiting(&self) -> Vec<(Arc<NodePod>, Option<Waiting>)> {
        let reasons = self.pods.waiting();
        let wanted = self.store.node_pods().into_iter();
        let missing = wanted.filter(|it| self.pods.by_id(&it.id).is_none());
        missing
            .map(|pod| {
                let waiting = reasons.iter().find(|it| it.pod == pod.id);
                (pod, waiting.cloned())
            })
            .collect()
    }
}

/// Those of which this is somebody's fault, or of which it is nobody's. Without a reason nobody knows.
fn named(
    waiting: &[(Arc<NodePod>, Option<Waiting>)],
    is_fault: bool,
) -> Vec<(String, Option<String>)> {
    let of = |why: &Option<Waiting>| why.as_ref().is_none_or(|it| it.is_fault);
    let waiting = waiting.iter().filter(|(_, why)| of(why) == is_fault);
    waiting
        .map(|(pod, why)| {
            let reason = why.as_ref().map(|it| it.reason.clone());
            (pod.id.to_string(), reason)
        })
        .collect()
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
    /// What created it, as metrics name it.
    owner: Option<Owner>,
    addresses: Vec<IpAddr>,
    netns_cookie: Option<u64>,
    /// Whether policies of the CNI's own kinds select it.
    by_tunnels_only: bool,
}
