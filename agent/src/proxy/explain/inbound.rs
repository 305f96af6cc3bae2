//! The end at which a connection would arrive.

use ::http::HeaderName;
use serde_json::json;
use weft_core::route::RouteName;
use weft_core::{Client, DenyReason, ObjectName, RateLimit, RequestDenial, Verdict};

use super::asked::{Asked, Request};
use super::outbound::MAX_SHOWN;
use super::request::{filter, object};
use super::{Explanation, Outcome, State};
use crate::bpf::PodInKernel;
use crate::discovery::RequestPolicy;
use crate::node::LocalPod;
use crate::proxy::http::answer::ExchangeError;
use crate::proxy::http::{gate, head};
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
    let networks = context.store.network_policies_in(id);
    match &asked.request {
        Some(request) if http::may_be(declared) => {
            let (_, connection, requests) =
                context.store.authorize_requests(&pod.id, to.port(), client);
            Ok(match requests.filter(|_| connection.admits_requests()) {
                Some(policy) => {
                    told.request_in(&pod, &policy, (client, &networks), (asked, request))
                }
                None => told.policy(&connection, &networks),
            })
        }
        _ => {
            let verdict = inbound::decide(context, &pod, to, client);
            Ok(told.policy(&verdict, &networks))
        }
    }
}

impl Explanation {
    /// What the Server says of a request of a client whose connection it lets in.
    fn request_in(
        mut self,
        pod: &LocalPod,
        policy: &RequestPolicy,
        (client, networks): (Client<'_>, &[ObjectName]),
        (asked, request): (&Asked, &Request),
    ) -> Self {
        let server = policy.server();
        let mut head = request.head(&asked.to);
        let told = client.identity.and_then(head::client_id);
        head::set_client(&mut head.headers, told.as_ref());
        let is_grpc = head::is_grpc(&head.headers);
        let routes = server.routes.as_ref();
        let asks = |it: &&HeaderName| routes.is_some_and(|routes| routes.asks_for_header(it));
        if let Some(name) = request.hidden.iter().find(asks) {
            let fact = format!(
                "routes of the Server ask what {name} is, which a filter has written at the client's side, and which is not told"
            );
            self.step("route", State::Warning, fact)
                .by(format!("Server/{}", server.name));
            return self.end(Outcome::Unknown);
        }
        let passed_over = routes.map(|it| it.passed_over(&head, is_grpc));
        let passed_over = passed_over.into_iter().flatten().take(MAX_SHOWN);
        let passed_over: Vec<String> = passed_over.map(|it| format!("not {it}")).collect();
        let passed = match policy.authorize(client, &head, is_grpc) {
            Ok(passed) => passed,
            Err(RequestDenial::NotFound) => {
                let fact = "no route of the Server is for it: 404";
                let step = self.step("route", State::Error, fact);
                step.details = passed_over;
                step.by(format!("Server/{}", server.name));
                return self.end(Outcome::Refused);
            }
            Err(RequestDenial::Denied { route, verdict }) => {
                if let Some(route) = &route {
                    self.route_in(request, route, passed_over);
                }
                return self.policy(&verdict, networks);
            }
        };
        if let Some(rule) = &passed.rule {
            self.route_in(request, rule.route, passed_over);
        }
        let verdict = passed.verdict(server);
        self = self.policy(&verdict, networks);
        if let Some(limit) = &server.rate_limit {
            let looked = pod.limiters.of(&server.name, limit).look(client.identity);
            let refusal = looked.err();
            let (state, fact) = match &refusal {
                None => (State::Ok, "it is within the Server's limit now".to_owned()),
                Some(above) => (
                    State::Error,
                    format!(
                        "it is above the Server's limit ({}) now: 429, and there is room in {:.3} s",
                        above.scope.as_str(),
                        above.retry_after.as_secs_f64()
                    ),
                ),
            };
            let step = self.step("limit", state, fact);
            step.details = rates(limit);
            step.by(format!("HTTPLocalRateLimitPolicy/{}", limit.name.name))
                .values(json!({ "limit": limit, "above": refusal.map(|it| it.scope.as_str()) }));
            if state == State::Error {
                return self.end(Outcome::Refused);
            }
        }
        let Some(rule) = passed.rule.filter(|it| !it.rule.filters.is_empty()) else {
            return self;
        };
        let answered = gate::filter(&rule, &mut head).err();
        let fact = match &answered {
            None => format!("{} filters are applied", rule.rule.filters.len()),
            Some(error) => format!(
                "its client is answered here with {}",
                error.status().as_u16()
            ),
        };
        let step = self.step("filters", State::Ok, fact);
        step.details = rule.rule.filters.iter().map(filter).collect();
        step.values(json!({ "filters": rule.rule.filters }));
        match answered {
            None => self,
            Some(ExchangeError::Answered(_)) => self.end(Outcome::Answered),
            Some(_) => self.end(Outcome::Refused),
        }
    }

    fn route_in(&mut self, request: &Request, route: &RouteName, passed_over: Vec<String>) {
        let fact = format!("{request} is the {} {}'s", route.kind.as_str(), route.name);
        let step = self.step("route", State::Ok, fact).by(object(route));
        step.details = passed_over;
        step.values(json!({ "route": route }));
    }

    fn policy(mut self, verdict: &Verdict, networks: &[ObjectName]) -> Self {
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

/// What a limit allows.
fn rates(limit: &RateLimit) -> Vec<String> {
    let total = limit
        .total
        .map(|it| format!("{it} per second of all clients"));
    let each = limit
        .identity
        .map(|it| format!("{it} per second of each identity"));
    let others = limit.overrides.iter().map(|it| {
        let clients: Vec<String> = it.clients.iter().map(ToString::to_string).collect();
        format!(
            "{} per second of {}",
            it.requests_per_second,
            clients.join(", ")
        )
    });
    total.into_iter().chain(each).chain(others).collect()
}
