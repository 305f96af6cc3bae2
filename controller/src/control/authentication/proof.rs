//! What the API server's answer about a token proves. Everything must fit: whom the token is for, whose it is, and where
//! its pod runs.

use k8s_openapi::api::authentication::v1::TokenReviewStatus;
use weft_core::{Name, ObjectName};

use super::Refusal;
use super::pods::{AgentPods, Known};

/// What a token must say.
#[derive(Clone, Debug)]
pub struct Expected {
    /// Whom it is for.
    pub audience: String,
    /// The agents' service account.
    pub account: ObjectName,
}

/// What the API server vouches for: a token of an agent, bound to something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Proof {
    /// The node that it names.
    node: Option<Name>,
    /// Name and uid of the pod that it names.
    pod: Option<(String, String)>,
}

const POD_NAME: &str = "authentication.kubernetes.io/pod-name";
const POD_UID: &str = "authentication.kubernetes.io/pod-uid";
/// Since Kubernetes 1.30.
const NODE_NAME: &str = "authentication.kubernetes.io/node-name";

impl Expected {
    /// What an answer proves.
    pub(super) fn proof(&self, status: &TokenReviewStatus) -> Result<Proof, Refusal> {
        // What is beside an error is nothing to build on.
        if status.authenticated != Some(true)
            || status.error.as_ref().is_some_and(|it| !it.is_empty())
        {
            return Err(Refusal::NotAuthenticated);
        }
        // A server that knows no audiences names none: the token may be meant for anybody.
        let audiences = status.audiences.as_deref().unwrap_or_default();
        if !audiences.contains(&self.audience) {
            return Err(Refusal::Audience(self.audience.clone()));
        }
        let user = status.user.as_ref().ok_or(Refusal::Account)?;
        let (namespace, name) = (&self.account.namespace, &self.account.name);
        let account = format!("system:serviceaccount:{namespace}:{name}");
        if user.username.as_deref() != Some(account.as_str()) {
            return Err(Refusal::Account);
        }
        // One value each: of several, none is chosen.
        let extra = |key: &str| {
            let values = user.extra.as_ref().and_then(|it| it.get(key));
            match values.map(Vec::as_slice) {
                None | Some([]) => Ok(None),
                Some([value]) if !value.is_empty() => Ok(Some(value.clone())),
                Some(_) => Err(Refusal::Unbound),
            }
        };
        let node = extra(NODE_NAME)?.map(|it| it.parse());
        let node = node.transpose().map_err(|_| Refusal::Unbound)?;
        let pod = extra(POD_NAME)?.zip(extra(POD_UID)?);
        match node.is_none() && pod.is_none() {
            true => Err(Refusal::Unbound),
            false => Ok(Proof { node, pod }),
        }
    }
}

impl Proof {
    /// The node that it proves somebody to be on, by what is known of pods now.
    pub(super) fn node(&self, pods: &AgentPods) -> Result<Name, Refusal> {
        let known = match &self.pod {
            Some((name, uid)) => pods.find(name, uid),
            None => Known::Nothing,
        };
        match (known, &self.node) {
            // The API server knows both; the source will.
            (Known::Nothing, Some(node)) => Ok(node.clone()),
            (Known::Nothing, None) => Err(Refusal::UnknownPod),
            (Known::Replaced, _) => Err(Refusal::OtherPod),
            (Known::Gone, _) => Err(Refusal::PodGone),
            (Known::There(pod), _) if pod.ended => Err(Refusal::PodEnded),
            (Known::There(pod), claimed) => match (pod.node, claimed) {
                (Some(node), Some(claimed)) if node != *claimed => Err(Refusal::Disagrees),
                (Some(node), _) => Ok(node),
                (None, Some(claimed)) => Ok(claimed.clone()),
                (None, None) => Err(Refusal::UnknownPod),
            },
        }
    }
}

#[cfg(test)]
#[path = "proof_tests.rs"]
mod tests;
