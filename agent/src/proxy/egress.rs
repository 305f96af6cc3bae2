//! What EgressNetworks say about connections that leave the cluster.
//!
//! A flow is decided before it is connected, and again when it has been entered among those that a change of
//! policy may end: a change in between is not missed. Where there are no networks, a flow costs its entry.

use std::net::SocketAddr;
use std::sync::Arc;

use http::request::Parts;
use tokio_util::sync::CancellationToken;
use weft_core::route::{RouteType, Selected, SelectedFlow, Target, pick};
use weft_core::{EgressNetwork, Name};

use super::Context;
use super::error::FlowError;
use super::http::head;
use super::live_requests::{Live, RequestEntry};
use super::record::{PathLabel, Record};
use crate::discovery::{ServicePortEntry, Store};
use crate::node::LocalPod;
use crate::telemetry::EgressLabels;

/// Where a flow that leaves the cluster goes.
pub(super) enum Led {
    /// To where its client wanted to go.
    Original,
    /// To a port of a Service, as a route says.
    Service(Arc<ServicePortEntry>),
}

/// What a decision about something that leaves the cluster depends on, and how to end it.
#[derive(Debug)]
pub(super) struct LiveEgress {
    /// The client's namespace.
    pub(super) client: Name,
    /// Where it wanted to go.
    pub(super) to: SocketAddr,
    /// What it is.
    pub(super) what: What,
    /// Cancelled when it must end.
    pub(super) end: CancellationToken,
}

/// What leaves the cluster.
#[derive(Debug)]
pub(super) enum What {
    /// Bytes, or TLS with this server name.
    Flow(Option<Box<str>>),
    /// A request.
    Request(Box<Parts>),
    /// Requests that nobody asked about, as there were no networks.
    Requests,
}

impl LiveEgress {
    /// Whether it may go on.
    pub(super) fn is_allowed(&self, store: &Store) -> bool {
        let Some(network) = store.egress(&self.client, self.to) else {
            return true;
        };
        match &self.what {
            What::Flow(server_name) => allows_flow(
                &network,
                &self.client,
                self.to.port(),
                server_name.as_deref(),
            ),
            What::Request(head) => allows_request(&network, &self.client, self.to.port(), head),
            What::Requests => network.allows_unrouted(),
        }
    }
}

/// Whether a flow may go to where its client wanted to.
fn allows_flow(
    network: &EgressNetwork,
    client: &Name,
    port: u16,
    server_name: Option<&str>,
) -> bool {
    match select_flow(network, client, port, server_name) {
        SelectedFlow::Service | SelectedFlow::NotFound => network.allows_unrouted(),
        SelectedFlow::Rule { rule, .. } => rule.backends.iter().any(|it| {
            let leads_there = matches!(&it.target, Target::Egress(name) if name == network.name());
            leads_there && it.weight > 0
        }),
    }
}

/// Whether a request may be made: wherever a rule leads.
fn allows_request(network: &EgressNetwork, client: &Name, port: u16, head: &Parts) -> bool {
    let table = network.routes_at(port);
    match table.map_or(Selected::Service, |it| it.select(client, head)) {
        Selected::Rule(_) => true,
        Selected::NotFound => network.allows_unrouted(),
        Selected::Service => match select_flow(network, client, port, None) {
            SelectedFlow::Rule { .. } => true,
            SelectedFlow::Service | SelectedFlow::NotFound => network.allows_unrouted(),
        },
    }
}

fn select_flow<'a>(
    network: &'a EgressNetwork,
    client: &Name,
    port: u16,
    server_name: Option<&str>,
) -> SelectedFlow<'a> {
    let table = network.routes_at(port);
    table.map_or(SelectedFlow::Service, |it| {
        it.select_flow(client, server_name)
    })
}

/// Where a pod's flow goes that is not for a Service.
///
/// # Errors
/// Policy denies it, or its route leads nowhere.
pub(super) fn lead(
    context: &Context,
    pod: &LocalPod,
    to: SocketAddr,
    server_name: Option<&str>,
) -> Result<Led, FlowError> {
    let client = &pod.id.0.namespace;
    let Some(network) = context.store.egress(client, to) else {
        return Ok(Led::Original);
    };
    let nowhere = || FlowError::NoRoute(network.name().name.clone(), to.port());
    match select_flow(&network, client, to.port(), server_name) {
        SelectedFlow::Service | SelectedFlow::NotFound => match network.allows_unrouted() {
            true => Ok(Led::Original),
            false => Err(FlowError::EgressDenied(network.name().clone())),
        },
        SelectedFlow::Rule { rule, .. } => {
            match pick(&rule.backends, rand::random()).map(|it| &it.target) {
                Some(Target::Egress(name)) if name == network.name() => Ok(Led::Original),
                Some(Target::Service { name, port }) => {
                    let found = context.store.service_port(name, *port);
                    found.map(Led::Service).ok_or_else(nowhere)
                }
                Some(Target::Egress(_) | Target::Invalid(_)) | None => Err(nowhere()),
            }
        }
    }
}

/// Counts it where that is what ended a flow or a request. A flow that is denied while it is looked at may still
/// turn out to be requests, and these are denied one by one.
pub(super) fn count(context: &Context, pod: &LocalPod, error: &FlowError) {
    if let FlowError::EgressDenied(network) = error {
        context.telemetry.egress_denied(EgressLabels {
            pod: pod.labels.clone(),
            network: network.clone(),
        });
    }
}

/// Enters a flow that was connected, if it leaves the cluster, and decides about it again.
///
/// # Errors
/// Policy denies it by now.
pub(super) fn enter_flow(
    context: &Context,
    pod: &LocalPod,
    to: SocketAddr,
    server_name: Option<&str>,
    record: &mut Record,
) -> Result<(), FlowError> {
    if record.path != PathLabel::Plaintext || record.destination.is_some() {
        return Ok(());
    }
    let entry = context.live.requests.enter(Live::Egress(LiveEgress {
        client: pod.id.0.namespace.clone(),
        to,
        what: What::Flow(server_name.map(Into::into)),
        end: pod.end_flows.child_token(),
    }));
    record.egress = Some(Box::new(entry));
    let client = &pod.id.0.namespace;
    match context.store.egress(client, to) {
        Some(network) if !allows_flow(&network, client, to.port(), server_name) => {
            Err(FlowError::EgressDenied(network.name().clone()))
        }
        _ => Ok(()),
    }
}

/// Enters a request; `end` is that of its connection.
pub(super) fn enter_request(
    context: &Context,
    pod: &LocalPod,
    to: SocketAddr,
    parts: &Parts,
    end: &CancellationToken,
) -> RequestEntry {
    context.live.requests.enter(Live::Egress(LiveEgress {
        client: pod.id.0.namespace.clone(),
        to,
        what: What::Request(Box::new(head::line_and_headers(parts))),
        end: end.child_token(),
    }))
}

/// Enters a client's connection whose requests nobody asked about.
pub(super) fn enter_requests(
    context: &Context,
    pod: &LocalPod,
    to: SocketAddr,
    end: &CancellationToken,
) -> RequestEntry {
    context.live.requests.enter(Live::Egress(LiveEgress {
        client: pod.id.0.namespace.clone(),
        to,
        what: What::Requests,
        end: end.clone(),
    }))
}

/// Why something ended whose token was cancelled.
pub(super) fn ended(context: &Context, pod: &LocalPod, to: SocketAddr) -> FlowError {
    if pod.end_flows.is_cancelled() {
        return FlowError::Drained;
    }
    match context.store.egress(&pod.id.0.namespace, to) {
        Some(network) => FlowError::EgressRevoked(network.name().clone()),
        None => FlowError::Drained,
    }
}

/// Whether it must be known what a client says before it is decided where its flow goes: its server name, or
/// whether it is one of the requests that alone may pass.
pub(super) fn must_be_known(context: &Context, pod: &LocalPod, to: SocketAddr) -> bool {
    let client = &pod.id.0.namespace;
    let Some(network) = context.store.egress(client, to) else {
        return false;
    };
    let table = network.routes_at(to.port());
    match table.and_then(|it| it.route_type(client)) {
        Some(RouteType::Tls) => true,
        Some(RouteType::Grpc | RouteType::Http) => !network.allows_unrouted(),
        Some(RouteType::Tcp) | None => false,
    }
}

#[cfg(test)]
#[path = "egress_tests.rs"]
mod tests;
