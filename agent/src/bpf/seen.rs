//! What the kernel has of one pod: read from the maps that its programs read, and from the links that they are attached
//! by. What the agent believes to have put there is no answer to what is there.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;

use serde::Serialize;
use weft_ebpf_abi as abi;

use super::pods::{ROLES, listener_key};
use super::{Bpf, BpfError, ListenerRole, links, refused_key, sys};

/// What the kernel has of a pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PodInKernel {
    /// What `PODS` says: whether this set of programs redirects its connects. None: it is not in there.
    pub redirects: Option<bool>,
    /// Whether it has an entry in `POD_STATE`, without which its connects are refused.
    pub has_state: bool,
    /// What `OWN_ADDRESSES` has of it.
    pub addresses: Vec<IpAddr>,
    /// Which listeners `LISTENERS` has of it: `outbound`, `tunnel`, `plaintext`.
    pub listeners: Vec<&'static str>,
    /// Whether what arrives in its network namespace is steered: `sk_lookup` is attached there. None: it never was.
    pub steered: Option<bool>,
    /// The hooks at control groups, which are for all pods of the node.
    pub hooks: Vec<HookInKernel>,
    /// Whether programs of another layout, of an agent that is being replaced, have it still.
    pub in_older_layout: bool,
}

/// A hook at a control group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct HookInKernel {
    /// The name of its pin.
    pub hook: String,
    /// The program's id in the kernel; none: nothing is attached.
    pub program: Option<u32>,
}

impl PodInKernel {
    /// What is missing for its connects to be redirected; empty: nothing is.
    pub fn lacks_outbound(&self) -> Vec<String> {
        let mut lacks = self.lacks(&["outbound"]);
        if self.redirects != Some(true) {
            lacks.push("an entry in PODS that says that it is redirected".to_owned());
        }
        let hooks = self.hooks.iter().filter(|it| it.program.is_none());
        lacks.extend(hooks.map(|it| format!("a program at {}", it.hook)));
        lacks
    }

    /// What is missing for what arrives at it to be steered; empty: nothing is.
    pub fn lacks_inbound(&self) -> Vec<String> {
        let mut lacks = self.lacks(&["tunnel", "plaintext"]);
        if self.steered != Some(true) {
            lacks.push("sk_lookup in its network namespace".to_owned());
        }
        lacks
    }

    fn lacks(&self, listeners: &[&str]) -> Vec<String> {
        let mut lacks = vec![];
        if !self.has_state {
            lacks.push("an entry in POD_STATE".to_owned());
        }
        let missing = listeners.iter().filter(|it| !self.listeners.contains(it));
        lacks.extend(missing.map(|it| format!("the {it} listener")));
        lacks
    }
}

impl Bpf {
    /// Reads what the kernel has of a pod.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn seen(&self, cookie: u64) -> Result<PodInKernel, BpfError> {
        let pod = self.tables.pods.value(&cookie)?;
        let addresses = self.tables.own_addresses.keys()?.into_iter();
        let addresses = addresses.filter(|it| it.cookie == cookie);
        let mut addresses: Vec<IpAddr> = addresses.map(|it| it.address.into()).collect();
        addresses.sort_unstable();
        // Sockets cannot be read from there, and need not be: whether there are some is what counts.
        let keys = self.tables.listeners.keys()?;
        let has = |role: &ListenerRole| keys.contains(&listener_key(cookie, *role));
        let listeners = ROLES.iter().filter(|it| has(it)).map(|it| role_name(*it));
        let mut hooks = Vec::new();
        for hook in &self.hooks {
            let link = links::open(&self.links().join(&hook.pin))?;
            let info = link.map(|it| sys::link_info(it.as_fd())).transpose();
            let info = info.map_err(|source| BpfError::System {
                what: "reading a link",
                source,
            })?;
            hooks.push(HookInKernel {
                hook: hook.pin.clone(),
                program: info.filter(|it| it.target != 0).map(|it| it.program),
            });
        }
        Ok(PodInKernel {
            redirects: pod.map(|it| it.stance == abi::Stance::Serving as u32),
            has_state: self.tables.pod_state.value(&cookie)?.is_some(),
            addresses,
            listeners: listeners.collect(),
            steered: links::is_attached(&self.links().join(links::lookup_pin(cookie)))?,
            hooks,
            in_older_layout: self.legacy().has(cookie),
        })
    }

    /// Whether connects of a pod to a destination are refused at once, as nothing listened there a moment ago.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn is_refused(&self, cookie: u64, destination: SocketAddr) -> Result<bool, BpfError> {
        let until = self
            .tables
            .refused
            .value(&refused_key(cookie, destination))?;
        Ok(until.is_some_and(|it| u128::from(it) > sys::monotonic().as_nanos()))
    }
}

fn role_name(role: ListenerRole) -> &'static str {
    match role {
        ListenerRole::Outbound => "outbound",
        ListenerRole::Tunnel => "tunnel",
        ListenerRole::Plaintext => "plaintext",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_pod_lacks_is_named() {
        let whole = PodInKernel {
            redirects: Some(true),
            has_state: true,
            addresses: vec![],
            listeners: ROLES.map(role_name).to_vec(),
            steered: Some(true),
            hooks: vec![HookInKernel {
                hook: "connect4".to_owned(),
                program: Some(7),
            }],
            in_older_layout: false,
        };
        assert!(whole.lacks_outbound().is_empty() && whole.lacks_inbound().is_empty());
        let mut bare = whole.clone();
        bare.hooks[0].program = None;
        bare.redirects = Some(false);
        let listed = "an entry in PODS that says that it is redirected";
        assert_eq!(bare.lacks_outbound(), [listed, "a program at connect4"]);
        assert!(bare.lacks_inbound().is_empty());
        let mut deaf = whole;
        deaf.listeners = vec!["outbound"];
        deaf.steered = Some(false);
        deaf.has_state = false;
        let state = "an entry in POD_STATE";
        assert_eq!(deaf.lacks_outbound(), [state]);
        let inbound = [
            state,
            "the tunnel listener",
            "the plaintext listener",
            "sk_lookup in its network namespace",
        ];
        assert_eq!(deaf.lacks_inbound(), inbound);
    }
}
