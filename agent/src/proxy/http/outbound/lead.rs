//! Where the routes of a service, or of an EgressNetwork, lead a request.

use std::net::SocketAddr;
use std::sync::Arc;

use http::{request, response};
use weft_core::EgressNetwork;
use weft_core::route::{
    self, Backend, BudgetSettings, Filter, Matched, Place, RouteTable, Selected, SelectedFlow,
    Unrouted, apply_to_request,
};

use super::Target;
use crate::discovery::ServicePortEntry;
use crate::node::LocalPod;
use crate::proxy::Context;
use crate::proxy::error::FlowError;
use crate::proxy::http::answer::ExchangeError;

/// Whose request it is, and what it wants to reach.
#[derive(Clone, Copy)]
pub(in crate::proxy) struct Going<'a> {
    pub(in crate::proxy) context: &'a Context,
    /// The client's pod.
    pub(in crate::proxy) pod: &'a LocalPod,
    /// Where it wanted to go.
    pub(in crate::proxy) original: SocketAddr,
    pub(in crate::proxy) target: &'a Target,
    /// Chooses one of a rule's backends.
    pub(in crate::proxy) choose: fn(&[Backend]) -> Option<&Backend>,
}

/// Where a request is led.
pub(in crate::proxy) struct Led<'a> {
    pub(in crate::proxy) goal: Goal,
    /// What happens to it and its response: what the rule says, then what the backend says.
    pub(in crate::proxy) filters: [&'a [Filter]; 2],
}

/// Who may serve it.
pub(in crate::proxy) enum Goal {
    /// Any endpoint of a service's port.
    Port(Arc<ServicePortEntry>),
    /// That address.
    Address(SocketAddr),
}

/// What became of it.
pub(in crate::proxy) enum Way<'a> {
    To(Led<'a>),
    /// It is answered here.
    Answered(response::Parts),
}

/// Where the routes of the service, or of the network by which the request leaves the cluster, lead the request,
/// which is changed as they say. Nothing is counted.
pub(in crate::proxy) fn lead<'a>(
    client: &Going<'_>,
    (table, egress): (Option<&'a RouteTable>, Option<&EgressNetwork>),
    head: &mut request::Parts,
    found: &mut Option<Matched<'a>>,
) -> Result<Way<'a>, ExchangeError> {
    let selected = table.map_or(Selected::Service, |it| {
        it.select(&client.pod.id.0.namespace, head)
    });
    let matched = match selected {
        Selected::Service => {
            // A TCPRoute is for all that is TCP.
            let flow = table.map_or(SelectedFlow::Service, |it| {
                it.select_flow(&client.pod.id.0.namespace, None)
            });
            let goal = match flow {
                SelectedFlow::Service => unrouted(client, table, egress)?,
                SelectedFlow::NotFound => return Err(ExchangeError::NoRule),
                SelectedFlow::Rule { rule, .. } => {
                    let backend = (client.choose)(&rule.backends);
                    let backend = backend.ok_or(ExchangeError::NoBackend)?;
                    goal(client, egress, &backend.target)?
                }
            };
            return Ok(Way::To(Led {
                goal,
                filters: [&[], &[]],
            }));
        }
        Selected::NotFound if egress.is_some() => {
            return Ok(Way::To(Led {
                goal: unrouted(client, None, egress)?,
                filters: [&[], &[]],
            }));
        }
        Selected::NotFound => return Err(ExchangeError::NoRule),
        Selected::Rule(matched) => matched,
    };
    *found = Some(matched);
    let place = Place {
        prefix: matched.prefix,
        port: client.original.port(),
    };
    let of_rule = matched.rule.filters.as_slice();
    if let Some(answer) = apply_to_request(of_rule, head, place) {
        return answered(answer);
    }
    let Some(backend) = (client.choose)(&matched.rule.backends) else {
        return Err(ExchangeError::NoBackend);
    };
    if let Some(answer) = apply_to_request(&backend.filters, head, place) {
        return answered(answer);
    }
    Ok(Way::To(Led {
        goal: goal(client, egress, &backend.target)?,
        filters: [of_rule, &backend.filters],
    }))
}

/// Where a request goes that no route is for.
fn unrouted(
    client: &Going<'_>,
    table: Option<&RouteTable>,
    egress: Option<&EgressNetwork>,
) -> Result<Goal, ExchangeError> {
    match (client.target, egress) {
        (Target::Service(port), _) => of_profile(client, table, port).map(Goal::Port),
        (Target::Address, Some(network)) if !network.allows_unrouted() => {
            Err(FlowError::EgressDenied(network.name().clone()).into())
        }
        (Target::Address, _) => Ok(Goal::Address(client.original)),
    }
}

/// Where a backend is. To where the client wanted to go leads only a route of the network that it wanted to go by.
fn goal(
    client: &Going<'_>,
    egress: Option<&EgressNetwork>,
    target: &route::Target,
) -> Result<Goal, ExchangeError> {
    match (target, egress) {
        (route::Target::Egress(name), Some(network)) if name == network.name() => {
            Ok(Goal::Address(client.original))
        }
        _ => backend_port(client.context, target).map(Goal::Port),
    }
}

/// Where a ServiceProfile sends what no route is for.
fn of_profile(
    client: &Going<'_>,
    table: Option<&RouteTable>,
    port: &Arc<ServicePortEntry>,
) -> Result<Arc<ServicePortEntry>, ExchangeError> {
    let profile = table.and_then(|it| it.profile(&client.pod.id.0.namespace));
    let Some(profile) = profile.filter(|it| !it.backends.is_empty()) else {
        return Ok(Arc::clone(port));
    };
    let backend = (client.choose)(&profile.backends);
    backend_port(
        client.context,
        &backend.ok_or(ExchangeError::NoBackend)?.target,
    )
}

/// What a filter answers: where to go instead, or that it cannot be applied.
fn answered<'a>(answer: response::Parts) -> Result<Way<'a>, ExchangeError> {
    if answer.status.is_server_error() {
        return Err(ExchangeError::Filter);
    }
    Ok(Way::Answered(answer))
}

pub(super) fn backend_port(
    context: &Context,
    target: &route::Target,
) -> Result<Arc<ServicePortEntry>, ExchangeError> {
    match target {
        route::Target::Service { name, port } => {
            let found = context.store.service_port(name, *port);
            found.ok_or(ExchangeError::NoBackend)
        }
        route::Target::Egress(_) | route::Target::Invalid(_) => Err(ExchangeError::NoBackend),
    }
}

/// What is said of a request beside where it goes: by the rule that it is, or, if it is none's, by its Service.
pub(in crate::proxy) fn said<'a>(
    client: &Going<'_>,
    table: Option<&'a RouteTable>,
    matched: Option<Matched<'a>>,
    head: &request::Parts,
) -> Unrouted<'a> {
    let nothing = Unrouted {
        reliability: None,
        budget: BudgetSettings::DEFAULT,
        classes: None,
    };
    match (matched, table) {
        (Some(matched), _) => Unrouted {
            reliability: matched.rule.reliability.as_deref(),
            ..nothing
        },
        (None, Some(table)) => {
            let namespace = &client.pod.id.0.namespace;
            table.unrouted_for(namespace, &head.method, head.uri.path())
        }
        (None, None) => nothing,
    }
}
