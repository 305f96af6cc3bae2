//! Where the routes of a service lead a request.

use std::net::SocketAddr;
use std::sync::Arc;

use http::{request, response};
use weft_core::route::{
    self, Filter, Matched, Place, RouteTable, Selected, SelectedFlow, apply_to_request, pick,
};

use super::{Facts, Target};
use crate::discovery::ServicePortEntry;
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

/// Where the routes of the service lead the request, which is changed as they say.
pub(super) fn lead<'a>(
    client: &Facts,
    table: Option<&'a RouteTable>,
    head: &mut request::Parts,
    found: &mut Option<Matched<'a>>,
) -> Result<Way<'a>, ExchangeError> {
    let port = match &client.target {
        Target::Address => {
            return Ok(Way::To(Led {
                goal: Goal::Address(client.original),
                filters: [&[], &[]],
            }));
        }
        Target::Service(port) => port,
    };
    let selected = table.map_or(Selected::Service, |it| {
        it.select(&client.pod.id.0.namespace, head)
    });
    let matched = match selected {
        Selected::Service => {
            // A TCPRoute is for all that is TCP.
            let flow = table.map_or(SelectedFlow::Service, |it| {
                it.select_flow(&client.pod.id.0.namespace, None)
            });
            let port = match flow {
                SelectedFlow::Service => of_profile(client, table, port)?,
                SelectedFlow::NotFound => return Err(ExchangeError::NoRule),
                SelectedFlow::Rule { rule, .. } => {
                    let backend = pick(&rule.backends, rand::random());
                    let backend = backend.ok_or(ExchangeError::NoBackend)?;
                    backend_port(client, &backend.target)?
                }
            };
            return Ok(Way::To(Led {
                goal: Goal::Port(port),
                filters: [&[], &[]],
            }));
        }
        Selected::NotFound => return Err(ExchangeError::NoRule),
        Selected::Rule(matched) => matched,
    };
    *found = Some(matched);
    let place = Place {
        prefix: matched.prefix,
        port: port.port,
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
        goal: Goal::Port(backend_port(client, &backend.target)?),
        filters: [of_rule, &backend.filters],
    }))
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
