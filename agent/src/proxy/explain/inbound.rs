//! The end at which a connection would arrive.

use serde_json::json;
use weft_core::{Client, DenyReason, Verdict};

use super::{Asked, Explanation, Outcome, State};
use crate::bpf::PodInKernel;
use crate::proxy::{Context, http, inbound};

/// Explains what becomes of a client that comes to a pod of this node.
///
/// # Errors
/// The question lacks something.
pub(super) fn explain(context: &Context, asked: &Asked) -> Result<Explanation, String> {
    let id = asked.pod()?;
    let to = asked.to.parse();
    let to: std::net::SocketAddr = to.map_err(|_| format!("to={}: no ADDRESS:PORT", asked.to))?;
    let from = asked.from.ok_or("from= is missing")?;
    let mut told = Explanation::begin(context);
    let Some(pod) = context.pods.by_id(id) else {
        told.not_enrolled(context, id);
        return Ok(told);
    };
    told.enrolled(&pod);
    let good = "what arrives at the pod is steered to the agent: sk_lookup and listeners are there";
    if !told.kernel(context, &pod, PodInKernel::lacks_inbound, good) {
        return Ok(told.end(Outcome::Unknown));
    }
    if let Err(error) = inbound::may_arrive(&pod, to) {
        return Ok(told.refused("arrival", error.to_string()));
    }
    let declared = context.declared_here(&pod, to, asked.opaque_by.as_ref());
    let fact = match (declared, http::may_be(declared)) {
        (weft_core::PortProtocol::Detect, _) => {
            "nobody declares what the port speaks: its client's first bytes say it".to_owned()
        }
        (declared, true) => format!("the port is declared {declared}: requests are looked at"),
        (declared, false) => format!("the port is declared {declared}: it is not looked into"),
    };
    let step = told.step("protocol", State::Ok, fact);
    step.values(json!({ "declared": declared }));
    let client = Client {
        address: from,
        identity: asked.identity.as_ref(),
    };
    let verdict = inbound::decide(context, &pod, to, client);
    let networks = context.store.network_policies_in(id);
    Ok(told.policy(&verdict, &networks))
}

impl Explanation {
    fn policy(mut self, verdict: &Verdict, networks: &[weft_core::ObjectName]) -> Self {
        let by = verdict.by();
        let server = verdict.server().map(ToString::to_string);
        let at = match &server {
            Some(server) => format!("at the Server {server}"),
            None => "as no Server governs the port".to_owned(),
        };
        let (state, fact, outcome) = match verdict {
            _ if verdict.is_audited() => (
                State::Warning,
                format!("let in by audit, {at}: it is reported"),
                Outcome::Reaches,
            ),
            Verdict::Allow { .. } => (State::Ok, format!("let in by {by}, {at}"), Outcome::Reaches),
            Verdict::RequestsOnly { .. } => (
                State::Warning,
                format!(
                    "let in for requests that routes of the Server allow, and for nothing else, {at}"
                ),
                Outcome::Unknown,
            ),
            Verdict::Deny { .. } => (
                State::Error,
                format!("not let in: {by}, {at}"),
                Outcome::Refused,
            ),
        };
        let object = match verdict {
            Verdict::Allow {
                authorization: Some(name),
                ..
            } => format!("AuthorizationPolicy/{}", name.name),
            Verdict::Deny {
                reason: DenyReason::NetworkPolicy(name),
                ..
            } => format!("NetworkPolicy/{name}"),
            _ => match verdict.server() {
                Some(server) => format!("Server/{}", server.name),
                None => by.clone(),
            },
        };
        let selected = networks
            .iter()
            .map(|it| format!("NetworkPolicy {it} selects the pod"));
        let step = self.step("policy", state, fact).by(object);
        step.details = selected.collect();
        step.values(json!({
            "server": server,
            "by": by,
            "allowed": verdict.is_allowed(),
            "requests_only": verdict.requests_only(),
            "network_policies": networks,
        }));
        self.end(outcome)
    }
}
