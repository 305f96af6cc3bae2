//! Says what would become of a connection, step by step, and what decides each: what `weft explain` asks.
//!
//! Each step is taken by the function that takes it for connections; here it is only told of. Nothing is connected, nothing
//! is counted, and nothing that is told is secret. A question is about one end: who asks goes on at the other end's agent
//! with what this one says in `next`.

mod endpoint;
mod host;
mod inbound;
mod outbound;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use serde::Serialize;
use serde_json::{Value, json};
use weft_core::{Identity, Name, WorkloadId};

use super::Context;
use super::tunnel::claim::OpaqueBy;
use crate::bpf::PodInKernel;
use crate::node::LocalPod;

/// What an agent says of its end of a connection.
#[derive(Debug, Serialize)]
pub struct Explanation {
    /// In the order in which they are taken.
    steps: Vec<Step>,
    outcome: Outcome,
    /// Where it goes on: none: nowhere.
    next: Option<Next>,
}

/// A step.
#[derive(Debug, Serialize)]
struct Step {
    step: &'static str,
    state: State,
    /// One line.
    fact: String,
    /// What decides it, as `kind/namespace/name` or what it is called by; none: no object does.
    object: Option<String>,
    /// What it consists of, one by one.
    details: Vec<String>,
    /// The same for programs.
    values: Value,
}

/// How a step is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    /// As it should be.
    Ok,
    /// Worth a look.
    Warning,
    /// The connection ends here, or may.
    Error,
}

/// What becomes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Outcome {
    /// It reaches its destination, as far as the mesh has a say in it.
    Reaches,
    /// It is refused.
    Refused,
    /// The other end's agent decides.
    Continues,
    /// It cannot be said.
    Unknown,
}

/// What is to be asked at the other end.
#[derive(Debug, Serialize)]
struct Next {
    node: Name,
    pod: WorkloadId,
    to: SocketAddr,
    from: IpAddr,
    /// None: the client proves nothing.
    identity: Option<Identity>,
    /// By which Service's port, as `name:port`, the client's agent does not look into it.
    opaque_by: Option<String>,
}

/// A question.
#[derive(Debug, Default, PartialEq, Eq)]
struct Asked {
    is_inbound: bool,
    pod: Option<WorkloadId>,
    to: String,
    from: Option<IpAddr>,
    identity: Option<Identity>,
    opaque_by: Option<OpaqueBy>,
}

/// Answers a query, as JSON.
///
/// # Errors
/// It is no question.
pub async fn answer(context: &Arc<Context>, query: &str) -> Result<Vec<u8>, String> {
    let asked = Asked::read(query)?;
    let explained = match asked.is_inbound {
        true => inbound::explain(context, &asked)?,
        false => outbound::explain(context, &asked).await?,
    };
    serde_json::to_vec(&explained).map_err(|error| error.to_string())
}

impl Asked {
    fn read(query: &str) -> Result<Self, String> {
        let mut asked = Self::default();
        for (key, value) in form_urlencoded::parse(query.as_bytes()) {
            let bad = |error: &dyn std::fmt::Display| format!("{key}={value}: {error}");
            match &*key {
                "side" => match &*value {
                    "outbound" => asked.is_inbound = false,
                    "inbound" => asked.is_inbound = true,
                    _ => return Err(bad(&"inbound or outbound")),
                },
                "pod" => asked.pod = Some(value.parse().map_err(|it| bad(&it))?),
                "to" => asked.to = value.clone().into_owned(),
                "from" => asked.from = Some(value.parse().map_err(|it| bad(&it))?),
                "identity" => asked.identity = Some(value.parse().map_err(|it| bad(&it))?),
                "opaque_by" => asked.opaque_by = Some(value.parse().map_err(|it| bad(&it))?),
                // What is ignored would be answered wrongly.
                _ => return Err(format!("this agent does not know {key}")),
            }
        }
        Ok(asked)
    }

    fn pod(&self) -> Result<&WorkloadId, String> {
        self.pod
            .as_ref()
            .ok_or_else(|| "pod= is missing".to_owned())
    }
}

impl Explanation {
    /// Nothing is told yet but how much what is told is worth.
    fn begin(context: &Context) -> Self {
        let mut told = Self {
            steps: vec![],
            outcome: Outcome::Unknown,
            next: None,
        };
        told.knowledge(context);
        told
    }

    /// Adds a step, to which more can be said.
    fn step(&mut self, step: &'static str, state: State, fact: impl Into<String>) -> &mut Step {
        self.steps.push(Step {
            step,
            state,
            fact: fact.into(),
            object: None,
            details: vec![],
            values: json!({}),
        });
        let last = self.steps.len() - 1;
        &mut self.steps[last]
    }

    /// The end: a step at which the connection is refused.
    fn refused(mut self, step: &'static str, fact: impl Into<String>) -> Self {
        self.step(step, State::Error, fact);
        self.end(Outcome::Refused)
    }

    fn end(mut self, outcome: Outcome) -> Self {
        self.outcome = outcome;
        self
    }

    /// How fresh what this agent knows is.
    fn knowledge(&mut self, context: &Context) {
        let state = context.discovery.state();
        let ago = state.last_message.map(|it| it.elapsed().as_secs_f64());
        let age = state.knowledge_age();
        let (how, fact) = match age {
            None => (
                State::Error,
                "this agent has not been told everything yet".to_owned(),
            ),
            Some(age) if age.is_zero() => {
                (State::Ok, "what this agent knows is current".to_owned())
            }
            Some(age) => (
                State::Warning,
                format!(
                    "what this agent knows may be {:.0} s old: no controller keeps it current",
                    age.as_secs_f64()
                ),
            ),
        };
        let step = self.step("knowledge", how, fact);
        step.details
            .extend(state.last_error.clone().filter(|_| how != State::Ok));
        step.values = json!({
            "complete": state.complete,
            "current": state.current,
            "age_seconds": age.map(|it| it.as_secs_f64()),
            "last_message_seconds_ago": ago,
            "controller": state.controller,
            "pushes": state.pushes,
            "policy_changes": context.store.policy_number(),
        });
    }

    /// What the kernel has of a pod. Returns whether all of it is there.
    fn kernel(
        &mut self,
        context: &Context,
        pod: &LocalPod,
        lacks: impl FnOnce(&PodInKernel) -> Vec<String>,
        good: &str,
    ) -> bool {
        let seen = match context.bpf.seen(pod.cookie) {
            Ok(seen) => seen,
            Err(error) => {
                let error = anyhow::Error::from(error);
                let fact = format!("what the kernel has of the pod cannot be read: {error:#}");
                self.step("kernel", State::Warning, fact);
                return true;
            }
        };
        let lacks = lacks(&seen);
        let is_whole = lacks.is_empty();
        let (state, fact) = match (is_whole, seen.in_older_layout) {
            (true, _) => (State::Ok, good.to_owned()),
            (false, true) => (
                State::Warning,
                "programs of the agent that is being replaced have the pod still".to_owned(),
            ),
            (false, false) => (
                State::Error,
                // Refused where an entry or a listener is missing, past the mesh where a program is.
                "the kernel does not have all that the pod needs: connections are refused, or pass without the mesh"
                    .to_owned(),
            ),
        };
        let step = self.step("kernel", state, fact);
        step.details = lacks.iter().map(|it| format!("it lacks {it}")).collect();
        step.values = json!({ "seen": seen, "netns_cookie": pod.cookie, "lacks": lacks });
        state != State::Error
    }
}

impl Step {
    fn by(&mut self, object: impl Into<String>) -> &mut Self {
        self.object = Some(object.into());
        self
    }

    fn values(&mut self, values: Value) -> &mut Self {
        self.values = values;
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn questions_are_read_whole_or_not_at_all() {
        let asked = Asked::read(
            "side=inbound&pod=shop%2Fweb-1&to=10.1.0.3%3A80&from=10.1.0.2&identity=\
             spiffe%3A%2F%2Ftd%2Fns%2Fshop%2Fsa%2Forder&opaque_by=web%3A80",
        )
        .expect("a question");
        assert!(asked.is_inbound && asked.to == "10.1.0.3:80");
        assert_eq!(
            asked.pod().map(ToString::to_string),
            Ok("shop/web-1".to_owned())
        );
        let identity = asked.identity.expect("said").to_string();
        assert_eq!(identity, "spiffe://td/ns/shop/sa/order");
        assert_eq!(asked.opaque_by.expect("said").port.get(), 80);
        assert!(Asked::read("").expect("empty").pod().is_err());
        for bad in [
            "side=both",
            "pod=web",
            "from=here",
            "identity=me",
            "opaque_by=web",
            "opaque_by=web:0",
            "more=1",
        ] {
            assert!(Asked::read(bad).is_err(), "{bad}");
        }
    }
}
