//! Where the routes of a service, or of an EgressNetwork, lead a request.

use std::net::SocketAddr;
use std::sync::Arc;

use http::{request, response};
use weft_core::EgressNetwork;
use weft_core::route::{
    self, Filter, Matched, Place, RouteTable, Selected, SelectedFlow, apply_to_request, pick,
};

use super::{Facts, Target, refused};
use crate::discovery::ServicePortEntry;
use crate::proxy::error::FlowError;
use crate::proxy::http::answer::ExchangeError;

/// Where a request is led.
pub(super) struct Led<'a> {
    pub(super) goal: Goal,
    /// What happens to it and its response: what the rule says, then what the backend says.
    pub(super) filters: [&'a [Filter]; 2],
}

/// Who may serve it.
pub(super) enum Goal {
    /// Any endpoint of a service's port.
    Port(Arc<ServicePortEntry>),
    /// That address.
    Address(SocketAddr),
}

/// What became of it.
pub(super) enum Way<'a> {
    To(Led<'a>),
    /// It is answered here.
    Answered(response::Parts),
}

/// Where the routes of the service, or of the network by which the request leaves the cluster, lead the request,
/// which is changed as they say.
pub(super) fn lead<'a>(
    client: &Facts,
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
                    let backend = pick(&rule.backends, rand::random());
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
    let Some(backend) = pick(&matched.rule.backends, rand::random()) else {
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
    client: &Facts,
    table: Option<&RouteTable>,
    egress: Option<&EgressNetwork>,
) -> Result<Goal, ExchangeError> {
    match (&client.target, egress) {
        (Target::Service(port), _) => of_profile(client, table, port).map(Goal::Port),
        (Target::Address, Some(network)) if !network.allows_unrouted() => {
            let error = FlowError::EgressDenied(network.name().clone());
            refused(client, &error);
            Err(error.into())
        }
        (Target::Address, _) => Ok(Goal::Address(client.original)),
    }
}

/// Where a backend is. To where the client wanted to go leads only a route of the network that it wanted to go by.
fn goal(
    client: &Facts,
    egress: Option<&EgressNetwork>,
    target: &route::Target,
) -> Result<Goal, ExchangeError> {
    match (target, egress) {
        (route::Target::Egress(name), Some(network)) if name == network.name() => {
            Ok(Goal::Address(client.original))
        }
        _ => backend_port(client, target).map(Goal::Port),
    }
}

/// Where a ServiceProfile sends what no route is for.
fn of_profile(
    client: &Facts,
    table: Option<&RouteTable>,
    port: &Arc<ServicePortEntry>,
) -> Result<Arc<ServicePortEntry>, ExchangeError> {
    let profile = table.and_then(|it| it.profile(&client.pod.id.0.namespace));
    let Some(profile) = profile.filter(|it| !it.backends.is_empty()) else {
        return Ok(Arc::clone(port));
    };
    let backend = pick(&profile.backends, rand::random());
    backend_port(client, &backend.ok_or(ExchangeError::NoBackend)?.target)
}

/// What a filter answers: where to go instead, or that it cannot be applied.
fn answered<'a>(answer: response::Parts) -> Result<Way<'a>, ExchangeError> {
    if answer.status.is_server_error() {
        return Err(ExchangeError::Filter);
    }
    Ok(Way::Answered(answer))
}

pub(super) fn backend_port(
    client: &Facts,
    target: &route::Target,
) -> Result<Arc<ServicePortEntry>, ExchangeError> {
    match target {
        route::Target::Service { name, port } => {
            let found = client.context.store.service_port(name, *port);
            found.ok_or(ExchangeError::NoBackend)
        }
        route::Target::Egress(_) | route::Target::Invalid(_) => Err(ExchangeError::NoBackend),
    }
}
