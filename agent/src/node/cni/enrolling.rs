//! Makes sure that a pod is in the mesh before its first container runs, if it belongs there.
//!
//! "Not meshed" must be known of exactly this pod, by its UID, from a controller: that nothing is known of a pod means
//! nothing. Whatever does not become clear in time is tried again by the kubelet, with a new sandbox; unless the pod's
//! namespace is not known to hold meshed pods: then the plugin's configuration says what becomes of the pod, as while
//! there is no agent. A controller that does not hear of pods must not stop all of a cluster.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep, sleep_until, timeout_at};
use tonic::Code;
use weft_cni::ask::Answer;
use weft_core::{Name, NodePod, WorkloadId};

use super::Announced;
use super::announced::{Sandbox, ticks};
use super::request::{Asked, Attachment};
use crate::bpf::Standing;
use crate::discovery::{CallError, Calls, PodStanding};
use crate::identity::CertificateState;
use crate::netns::Netns;
use crate::proxy::Context;

/// What it takes.
pub(super) struct Enrolling {
    pub(super) context: Arc<Context>,
    pub(super) calls: Arc<Calls>,
    /// Cookie of the agent's own namespace.
    pub(super) host_cookie: Option<u64>,
}

/// What is known of a pod.
enum Known {
    Meshed(Arc<NodePod>),
    NotMeshed,
}

impl Enrolling {
    /// Enrolls a pod that is meshed.
    pub(super) async fn add(&self, attachment: Attachment, netns: Option<OwnedFd>) -> Answer {
        let until = Instant::now() + attachment.wait;
        let sandbox = match self.sandbox(&attachment, netns) {
            Ok(sandbox) => sandbox,
            Err(reason) => return Answer::Wait { reason },
        };
        let arriving = match self.announced().arrives(&sandbox) {
            Ok(arriving) => arriving,
            Err(error) => return waits(&error.to_string()),
        };
        tokio::select! {
            answer = self.enroll(&attachment, sandbox, until) => answer,
            error = arriving.taken_down() => waits(&error.to_string()),
        }
    }

    async fn enroll(&self, attachment: &Attachment, sandbox: Sandbox, until: Instant) -> Answer {
        let known = self.known(&attachment.asked, until).await;
        let described = match known {
            Ok(Known::Meshed(pod)) => pod,
            Ok(Known::NotMeshed) => return Answer::NotMeshed,
            Err(answer) => return answer,
        };
        if let Err(reason) = self
            .addresses_free(&described, &sandbox.addresses, until)
            .await
        {
            return Answer::Wait { reason };
        }
        let cookie = sandbox.cookie;
        if let Err(error) = self.announced().put(sandbox) {
            return waits(&error.to_string());
        }
        match self.enrolled(&described, cookie, until).await {
            Ok(()) => {
                self.certified(&described, until).await;
                Answer::Enrolled
            }
            Err(reason) => Answer::Wait { reason },
        }
    }

    /// Whether a pod is where it should be.
    pub(super) async fn check(&self, asked: &Asked) -> Answer {
        let until = Instant::now() + CHECK_WAIT;
        match self.known(asked, until).await {
            Ok(Known::NotMeshed) => Answer::NotMeshed,
            Ok(Known::Meshed(pod)) => match self.is_enrolled(&pod, None) {
                true => Answer::Enrolled,
                false => Answer::Wait {
                    reason: self.why_not(&pod),
                },
            },
            Err(answer) => answer,
        }
    }

    pub(super) fn announced(&self) -> &Announced {
        self.context.pods.announced()
    }

    fn sandbox(&self, attachment: &Attachment, netns: Option<OwnedFd>) -> Result<Sandbox, String> {
        let netns = netns.ok_or("no descriptor of the network namespace came with the request")?;
        let netns = Netns::received(netns).map_err(|error| error.to_string())?;
        let read = |what: &str, number: std::io::Result<u64>| {
            number.map_err(|error| format!("reading the {what} of its network namespace: {error}"))
        };
        let cookie = read("cookie", netns.cookie())?;
        if self.host_cookie.is_none_or(|host| host == cookie) {
            return Err("its network namespace is the node's own".to_owned());
        }
        Ok(Sandbox {
            pod: attachment.asked.pod.clone(),
            uid: attachment.asked.uid.clone(),
            container: attachment.container.clone(),
            network: attachment.network.clone(),
            inode: read("inode", netns.inode())?,
            netns: Arc::new(netns),
            cookie,
            addresses: attachment.addresses.clone(),
            since: std::time::Instant::now(),
            ticks: ticks().map_err(|error| format!("reading the clock: {error}"))?,
        })
    }

    /// Finds out whether a pod is meshed; if it is, it is described.
    async fn known(&self, asked: &Asked, until: Instant) -> Result<Known, Answer> {
        let known = self.asked_for(asked, until).await;
        known.map_err(|it| kept(it, asked, &self.context.store.mesh_namespaces()))
    }

    async fn asked_for(&self, asked: &Asked, until: Instant) -> Result<Known, Answer> {
        let began = Instant::now();
        let mut changes = self.context.store.changes();
        let mut unclear = away("no controller has answered yet");
        loop {
            changes.borrow_and_update();
            if let Some(pod) = self.described(asked) {
                return Ok(Known::Meshed(pod));
            }
            let standing = self.calls.pod_standing(&asked.pod, &asked.uid);
            match timeout_at(until, standing).await {
                Ok(Ok(PodStanding::NotMeshed)) => {
                    // The stream may have come further than the answer.
                    return Ok(self
                        .described(asked)
                        .map_or(Known::NotMeshed, Known::Meshed));
                }
                Ok(Ok(PodStanding::Unknown)) => unclear = away(UNHEARD),
                Ok(Ok(PodStanding::Meshed)) => {
                    unclear = waits("its description has not come yet");
                }
                Ok(Err(error)) => {
                    unclear = away(&error.to_string());
                    // For a moment it may be this agent that has just started.
                    let is_away = is_away(&error) || !self.is_connected();
                    if is_away && began.elapsed() >= AWAY_AFTER {
                        return Err(unclear);
                    }
                }
                Err(_) if self.is_connected() => return Err(unclear),
                Err(_) => return Err(away("the agent is not connected to a controller")),
            }
            tokio::select! {
                () = sleep_until(until) => return Err(unclear),
                _ = changes.changed() => {}
                () = sleep(ASK_AGAIN) => {}
            }
        }
    }

    fn is_connected(&self) -> bool {
        self.context.discovery.state().connected
    }

    fn described(&self, asked: &Asked) -> Option<Arc<NodePod>> {
        let pods = self.context.store.node_pods();
        pods.into_iter().find(|it| {
            let is_uid = it.uid == asked.uid || it.runtime.static_uid.as_ref() == Some(&asked.uid);
            is_uid && it.id == asked.pod
        })
    }

    /// Waits until nobody else has the addresses. A predecessor's may be known for a moment longer than it lives.
    async fn addresses_free(
        &self,
        pod: &NodePod,
        addresses: &[IpAddr],
        until: Instant,
    ) -> Result<(), String> {
        let taken = || addresses.iter().find_map(|it| self.taken(pod, *it));
        while let Some(reason) = taken() {
            if Instant::now() >= until {
                return Err(reason);
            }
            sleep(LOOK).await;
        }
        Ok(())
    }

    /// Who else has an address of a pod.
    fn taken(&self, pod: &NodePod, address: IpAddr) -> Option<String> {
        let store = &self.context.store;
        if store.is_contested(address) {
            return Some(format!("its address {address} is that of several pods"));
        }
        let known = store.workload_at(address).map(|it| it.id.clone());
        let local = self.context.pods.at(address).map(|it| it.id.clone());
        let mut others = known.into_iter().chain(local).filter(|it| *it != pod.id);
        let other = others.find(|it| !self.is_stale(it, address))?;
        Some(format!("its address {address} is that of pod {other}"))
    }

    /// Whether a pod of this node had an address in a sandbox before the one that it has.
    fn is_stale(&self, pod: &WorkloadId, address: IpAddr) -> bool {
        let pods = self.context.store.node_pods();
        let described = pods.iter().find(|it| it.id == *pod);
        described.is_some_and(|it| self.announced().is_without(it, address))
    }

    /// Waits until a pod is enrolled in a namespace.
    async fn enrolled(&self, pod: &NodePod, cookie: u64, until: Instant) -> Result<(), String> {
        while !self.is_enrolled(pod, Some(cookie)) {
            if Instant::now() >= until {
                return Err(self.why_not(pod));
            }
            sleep(LOOK).await;
        }
        Ok(())
    }

    fn is_enrolled(&self, pod: &NodePod, cookie: Option<u64>) -> bool {
        let local = self.context.pods.by_id(&pod.id);
        local.is_some_and(|it| it.uid == pod.uid && cookie.is_none_or(|cookie| it.cookie == cookie))
    }

    fn why_not(&self, pod: &NodePod) -> String {
        if self.context.pods.standing() != Standing::Owner {
            return "another agent is taking over this node".to_owned();
        }
        let waiting = self.context.pods.waiting();
        let reason = waiting.into_iter().find(|it| it.pod == pod.id);
        reason.map_or_else(|| "it is not enrolled yet".to_owned(), |it| it.reason)
    }

    /// Waits for the pod's certificate, not for long: without it its connections are refused, not open.
    async fn certified(&self, pod: &NodePod, until: Instant) {
        let until = until.min(Instant::now() + CERTIFICATE_WAIT);
        let Some(local) = self.context.pods.by_id(&pod.id) else {
            return;
        };
        let is_held = || {
            let status = self.context.identities.status();
            let own = status.iter().find(|it| it.identity == local.identity);
            own.is_some_and(|it| {
                matches!(
                    it.state,
                    CertificateState::Held | CertificateState::InDanger
                )
            })
        };
        while !is_held() {
            if Instant::now() >= until {
                tracing::warn!(pod = %pod.id, "starts without a certificate: its connections are refused until there is one");
                return;
            }
            sleep(LOOK).await;
        }
    }
}

fn waits(reason: &str) -> Answer {
    Answer::Wait {
        reason: reason.to_owned(),
    }
}

fn away(reason: &str) -> Answer {
    Answer::Away {
        reason: reason.to_owned(),
    }
}

/// Whether there is no controller that could be asked, for longer than a moment.
fn is_away(error: &CallError) -> bool {
    match error {
        CallError::Connect(_) => true,
        // One that is older than this agent.
        CallError::Refused(status) => status.code() == Code::Unimplemented,
        CallError::Silent(_) => false,
    }
}

/// What is answered if nothing was found out. The plugin's list may be behind what is known here: who is known to be in a
/// namespace of the mesh waits in any case.
fn kept(answer: Answer, asked: &Asked, namespaces: &BTreeSet<Name>) -> Answer {
    match answer {
        Answer::Away { reason } if namespaces.contains(&asked.pod.0.namespace) => {
            let namespace = &asked.pod.0.namespace;
            let reason = format!("{reason}; namespace {namespace} may hold meshed pods");
            Answer::Wait { reason }
        }
        answer => answer,
    }
}

/// How often it is looked at what other parts of the agent make known, while a pod waits.
const LOOK: Duration = Duration::from_millis(5);
const ASK_AGAIN: Duration = Duration::from_millis(200);
/// How long a controller may be away before it is.
const AWAY_AFTER: Duration = Duration::from_secs(3);
const UNHEARD: &str =
    "no controller has heard of this pod yet: is its watch of the API server behind?";
const CHECK_WAIT: Duration = Duration::from_secs(5);
const CERTIFICATE_WAIT: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use tonic::Status;

    use super::*;

    #[test]
    fn who_is_in_a_namespace_of_the_mesh_waits() {
        let asked = Asked {
            pod: "shop/web".parse().expect("valid"),
            uid: "u1".into(),
        };
        let names = |names: &[&str]| {
            let names = names.iter().map(|it| it.parse().expect("valid"));
            names.collect::<BTreeSet<Name>>()
        };
        let kept = |answer, list: &[&str]| kept(answer, &asked, &names(list));
        assert!(matches!(
            kept(away("why"), &["bank", "shop"]),
            Answer::Wait { reason } if reason.contains("why")
        ));
        assert_eq!(kept(away("why"), &["bank"]), away("why"));
        assert_eq!(kept(waits("why"), &["bank"]), waits("why"));
    }

    #[test]
    fn a_controller_that_knows_no_such_question_is_none() {
        let refused = |status| CallError::Refused(status);
        assert!(is_away(&refused(Status::unimplemented("what?"))));
        assert!(!is_away(&refused(Status::internal("oops"))));
        assert!(!is_away(&CallError::Silent(CHECK_WAIT)));
    }
}
