//! Where a connection goes in the end: which endpoint, by which way, and who must answer there.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use serde_json::json;

use super::outbound::MAX_SHOWN;
use super::{Explanation, Next, Outcome, State};
use crate::balance;
use crate::balance::breaker::Standing;
use crate::discovery::ServicePortEntry;
use crate::node::LocalPod;
use crate::proxy::error::FlowError;
use crate::proxy::outbound::{Way, client_address, decide};
use crate::proxy::{Context, let_out};

/// Endpoints are drawn so often to show how often each would be chosen.
const DRAWS: u32 = 200;

impl Explanation {
    /// Which endpoints there are, and which would be chosen: the one that is drawn most often.
    pub(super) fn endpoints(
        &mut self,
        context: &Context,
        pod: &Arc<LocalPod>,
        port: &ServicePortEntry,
        like: IpAddr,
    ) -> Option<SocketAddr> {
        let now = Instant::now();
        let tries = || {
            port.candidates(like)
                .without(let_out::forbidden(context, pod))
        };
        let mut drawn: HashMap<SocketAddr, u32> = HashMap::new();
        for _ in 0..DRAWS {
            if let Some(endpoint) = tries().next(now, balance::random_below) {
                *drawn.entry(endpoint.to()).or_default() += 1;
            }
        }
        let likeliest = drawn.iter().max_by_key(|(to, draws)| (**draws, **to));
        let likeliest = likeliest.map(|(to, _)| *to)?;
        let tries = tries();
        let standings = tries.standings(now);
        let ready = standings
            .iter()
            .filter(|(_, it)| *it == Standing::Ready)
            .count();
        let all = standings.len();
        let is_whole = ready == all;
        let fact = format!(
            "{} has {all} endpoints, {ready} of them ready; it goes to {likeliest}, most likely",
            port.service
        );
        let state = if is_whole { State::Ok } else { State::Warning };
        let mut details = vec![];
        let mut values = vec![];
        for (endpoint, standing) in standings.into_iter().take(MAX_SHOWN) {
            let to = endpoint.to();
            let share = drawn.get(&to).copied().unwrap_or_default() * 100 / DRAWS;
            let workload = context.store.workload_at(to.ip());
            let (load, latency) = (&endpoint.load, endpoint.load.latency(now));
            let standing = json!(standing).as_str().unwrap_or_default().to_owned();
            let who = match &workload {
                Some(it) => format!("{}, on {}", it.id, it.node),
                None => "nobody that is known".to_owned(),
            };
            details.push(format!(
                "{to} {who}: {standing}, weight {}, {:.1} ms, {} outstanding, chosen by {share} %",
                load.weight(),
                latency.as_secs_f64() * 1000.0,
                load.outstanding(),
            ));
            values.push(json!({
                "address": to.ip(), "port": to.port(), "standing": standing, "weight": load.weight(),
                "latency_ms": latency.as_secs_f64() * 1000.0, "outstanding": load.outstanding(),
                "share_percent": share, "pod": workload.as_ref().map(|it| &it.id),
                "node": workload.as_ref().map(|it| &it.node),
            }));
        }
        let step = self.step("endpoint", state, fact);
        step.details = details;
        step.by(format!("Service/{}", port.service)).values(json!({
            "service": port.service, "port": port.port, "count": all, "ready": ready,
            "likeliest": likeliest, "endpoints": values,
        }));
        Some(likeliest)
    }

    pub(super) async fn none_may_be_chosen(
        mut self,
        context: &Context,
        pod: &Arc<LocalPod>,
        port: &ServicePortEntry,
        like: IpAddr,
    ) -> Self {
        let tries = port
            .candidates(like)
            .without(let_out::forbidden(context, pod));
        if let Some(forbidden) = tries.all_forbidden() {
            return self.way(context, pod, forbidden, None).await;
        }
        let error = FlowError::NoEndpoint(port.service.clone(), port.port);
        self.step("endpoint", State::Error, error.to_string())
            .by(format!("Service/{}", port.service))
            .values(
                json!({ "service": port.service, "port": port.port, "count": tries.candidates() }),
            );
        self.end(Outcome::Refused)
    }

    /// Which way leads to the endpoint, and who must answer there.
    pub(super) async fn way(
        mut self,
        context: &Context,
        pod: &LocalPod,
        to: SocketAddr,
        opaque_by: Option<String>,
    ) -> Self {
        let way = match decide(context, pod, to).await {
            Ok(way) => way,
            Err(FlowError::NotLetOut(reason)) => {
                let object = reason
                    .to_string()
                    .replacen("networkpolicy:", "NetworkPolicy/", 1);
                let fact = FlowError::NotLetOut(reason).to_string();
                return self.refused("policy-out", fact).decided_by(object);
            }
            Err(error) => return self.refused("way", error.to_string()),
        };
        if let Ok(Some(rules)) = context.store.rules_out(&pod.id) {
            let names = rules.policies.iter();
            let names: Vec<_> = names.map(|it| format!("NetworkPolicy/{it}")).collect();
            let fact = "NetworkPolicies let the pod connect to it";
            self.step("policy-out", State::Ok, fact)
                .by(names.join(", "));
        }
        let peer = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 0);
        let from = match client_address(pod, peer, to.ip()) {
            Ok(from) => from.ip(),
            Err(error) => return self.refused("way", error.to_string()),
        };
        let (fact, values, next) = match &way {
            Way::Itself => (
                "to the pod itself, past the mesh".to_owned(),
                json!({ "way": "itself" }),
                None,
            ),
            Way::Plaintext(None) => (
                "in plaintext, as it leaves the cluster".to_owned(),
                json!({ "way": "plaintext" }),
                None,
            ),
            Way::Plaintext(Some(workload)) => {
                let fact = format!("in plaintext: {} is not in the mesh", workload.id);
                let step = self.step("way", State::Warning, fact);
                step.by(format!("Pod/{}", workload.id))
                    .values(json!({ "way": "plaintext" }));
                return self.end(Outcome::Reaches);
            }
            Way::SameNode(other) => {
                let fact = format!(
                    "within this node's agent, to {}: the kernel attests both ends",
                    other.identity
                );
                let values = json!({ "way": "same_node", "identity": other.identity });
                (fact, values, Some(Arc::clone(&other.record.load())))
            }
            Way::Tunnel {
                workload,
                identity,
                alpn,
            } => {
                let fact = format!(
                    "by a tunnel to {}, whose end must prove to be {identity}",
                    workload.node
                );
                let alpn = String::from_utf8_lossy(alpn.as_bytes()).into_owned();
                let values = json!({ "way": "tunnel", "identity": identity, "alpn": alpn });
                (fact, values, Some(Arc::clone(workload)))
            }
        };
        self.step("way", State::Ok, fact).values(values);
        let Some(server) = next else {
            return self.end(Outcome::Reaches);
        };
        self.next = Some(Next {
            node: server.node.clone(),
            pod: server.id.clone(),
            to,
            from,
            identity: Some(pod.identity.clone()),
            opaque_by,
            request: self.going_on.take(),
        });
        self.end(Outcome::Continues)
    }
}
