//! Says what would become of a connection, or of a request, step by step, and what decides each: what `weft explain` asks.
//!
//! Each step is taken by the function that takes it for connections; here it is only told of. Nothing is connected, nothing
//! is counted, and nothing that is told is secret. A question is about one end: who asks goes on at the other end's agent
//! with what this one says in `next`.

mod asked;
mod endpoint;
mod host;
mod inbound;
mod outbound;
mod request;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use serde::Serialize;
use serde_json::{Value, json};
use weft_core::{Identity, Name, WorkloadId};

use self::asked::{Asked, Request};
use super::Context;
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
    /// The request as it goes on, if it is asked about one that is looked at.
    #[serde(skip)]
    going_on: Option<Request>,
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
    /// The mesh answers the request itself, as a route says.
    Answered,
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
    /// The request, as routes have changed it.
    request: Option<Request>,
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

impl Explanation {
    /// Nothing is told yet but how much what is told is worth.
    fn begin(context: &Context) -> Self {
        let mut told = Self {
            steps: vec![],
            outcome: Outcome::Unknown,
            next: None,
            going_on: None,
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
