//! What those are told of exchanges who watch a pod.

use std::net::SocketAddr;
use std::sync::Arc;

use hyper::Request;
use weft_core::Identity;

use super::connection::Route;
use super::head;
use super::measure::Kind;
use crate::discovery::ServicePortEntry;
use crate::node::LocalPod;
use crate::proxy::Context;
use crate::proxy::tap::{tls, who};
use crate::telemetry::tap::{Asked, Begin, Glance, Protocol, Tapped, Who};
use crate::telemetry::{Direction, TlsLabel};

/// A request that has gone nowhere yet, if somebody watches the pod that makes it.
pub(super) fn begun<B>(
    context: &Context,
    pod: &LocalPod,
    request: &Request<B>,
    asked: impl FnOnce() -> Begin,
) -> Option<Box<Begin>> {
    let watched = context.telemetry.taps().of(&pod.labels)?;
    let is_wanted = watched.may_want(&Glance::of(Direction::Outbound, request));
    is_wanted.then(|| Box::new(asked()))
}

/// The same, as it is known before it is known where it goes: it is sent from an address, to where its client wanted to go.
pub(super) fn asked<B>(
    context: &Context,
    pod: &LocalPod,
    (from, original): (SocketAddr, SocketAddr),
    port: Option<&Arc<ServicePortEntry>>,
    request: &Request<B>,
) -> Begin {
    let server = match port {
        Some(_) => None,
        None => context.store.workload_at(original.ip()),
    };
    Begin {
        protocol: Protocol::of(request, head::is_grpc(request.headers())),
        direction: Direction::Outbound,
        source: Who::pod(&pod.labels, &pod.identity, Some(from)),
        destination: Who {
            address: Some(original),
            ..who(server.as_deref())
        },
        service: port.map(|it| (it.service.clone(), it.port)),
        tls: TlsLabel::Unconnected,
        asked: Some(Asked::of(request)),
        route: None,
    }
}

/// One that went nowhere.
pub(super) fn unsent(
    context: &Context,
    pod: &LocalPod,
    begun: Option<&Begin>,
) -> Option<Box<Tapped>> {
    let begun = begun?;
    let watched = context.telemetry.taps().of(&pod.labels)?;
    let asked = begun.asked.as_ref();
    let glance = Glance {
        direction: Direction::Outbound,
        asked: asked.map(|it| (it.method.as_str(), it.path.as_str())),
    };
    watched.begin(&glance, || begun.clone())
}

/// One that is sent to an endpoint.
pub(super) fn sent<B>(
    context: &Context,
    pod: &LocalPod,
    kind: &Kind<'_>,
    to: &Route,
    request: &Request<B>,
) -> Option<Box<Tapped>> {
    let watched = context.telemetry.taps().of(&pod.labels)?;
    watched.begin(&Glance::of(Direction::Outbound, request), || {
        let server = to.destination.as_ref();
        let known = server.and_then(|it| context.store.workload(it));
        let route = kind.matched.map(|_| kind.route());
        Begin {
            protocol: Protocol::of(request, kind.is_grpc),
            direction: Direction::Outbound,
            source: Who::pod(&pod.labels, &pod.identity, Some(kind.client)),
            destination: Who {
                address: Some(to.endpoint),
                workload: server.cloned(),
                identity: to.identity.clone(),
                ..who(known.as_deref())
            },
            service: kind.parent.map(|it| (it.service.clone(), it.port)),
            tls: tls(to.path),
            asked: Some(Asked::of(request)),
            route,
        }
    })
}

/// One that a pod of this node is asked, by a client at one of its ends that has proven to be this, and is secured so.
pub(super) fn received<B>(
    context: &Context,
    pod: &LocalPod,
    (client, server): (SocketAddr, SocketAddr),
    (identity, tls): (Option<&Identity>, TlsLabel),
    request: &Request<B>,
) -> Option<Box<Tapped>> {
    let watched = context.telemetry.taps().of(&pod.labels)?;
    watched.begin(&Glance::of(Direction::Inbound, request), || {
        let source = context.store.workload_at(client.ip());
        // A meshed workload would have proven who it is: its address alone says nothing.
        let source = source.filter(|it| it.identity() == identity);
        Begin {
            protocol: Protocol::of(request, head::is_grpc(request.headers())),
            direction: Direction::Inbound,
            source: Who {
                address: Some(client),
                identity: identity.cloned(),
                ..who(source.as_deref())
            },
            destination: Who::pod(&pod.labels, &pod.identity, Some(server)),
            service: None,
            tls,
            asked: Some(Asked::of(request)),
            route: None,
        }
    })
}
