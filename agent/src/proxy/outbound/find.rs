//! What a flow turns out to be: its client's first bytes say so, and a server is connected to meanwhile.

use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;

use tokio::sync::Notify;
use tokio::time::Instant;
use weft_core::route::RouteType;

use super::reach::{Patient, classify, reach};
use super::{Accepted, Caller, Classified, Connected, count, remember_refused};
use crate::balance::InFlight;
use crate::node::LocalPod;
use crate::proxy::error::FlowError;
use crate::proxy::http::detect::{self, Detected};
use crate::proxy::http::sniff::Sniffed;
use crate::proxy::record::Record;
use crate::proxy::tcp::{Broken, Side};
use crate::proxy::{Context, http};

/// What a flow turned out to be.
pub(super) enum Found {
    /// Bytes, for a server that has accepted.
    Opaque(Box<Reached>, Looked),
    /// HTTP, and what was connected meanwhile.
    Http(http::outbound::Client, Option<Box<Connected>>),
}

/// How it is known that a flow is bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Looked {
    /// It was declared.
    Not,
    /// By what the client had said when it was looked at.
    AtOnce,
    /// Something was waited for.
    Later,
}

/// A server that has accepted, and what the balancer counts as long as it is there.
pub(super) type Reached = (Connected, Option<InFlight>);

/// Finds out what the client speaks, and connects to a server, unless its exchanges will.
pub(super) async fn find(
    context: &Arc<Context>,
    pod: &Arc<LocalPod>,
    accepted: &Accepted,
    record: &mut Record,
) -> Result<Found, FlowError> {
    let generation = context.identities.generation();
    let classified = classify(context, pod, accepted.original).await?;
    let socket = accepted.socket.socket();
    let client = Patient {
        socket,
        waits: Notify::new(),
    };
    let opaque = Caller {
        address: accepted.client,
        said: Some(socket),
        is_left_alone: false,
        service: None,
    };
    let http = |version, connected| {
        let target = match &classified {
            Classified::Service(port) => http::outbound::Target::Service(Arc::clone(port)),
            Classified::Address => http::outbound::Target::Address,
        };
        let addresses = (accepted.client, accepted.original);
        let client =
            http::outbound::Client::new(context, pod, addresses, version, target, generation);
        Found::Http(client, connected)
    };
    if !is_looked_at(context, pod, accepted, &classified) {
        let from = Caller {
            is_left_alone: true,
            ..opaque
        };
        let to = (from, accepted.original, None);
        let reached = reach(context, pod, &classified, to, &client, record).await?;
        return Ok(Found::Opaque(Box::new(reached), Looked::Not));
    }
    let patience = context.config.detect_timeout;
    let client_failed = |error| Broken::socket(Side::Client, error);
    let mut seen = detect::at_once(socket).map_err(client_failed)?;
    let looked = match &seen {
        Some(_) => Looked::AtOnce,
        None => Looked::Later,
    };
    let mut detecting = pin!(detect::from_client(socket, patience, &context.telemetry));
    // Until then it is worth more to know what it is than to have connected.
    let waits_until = Instant::now() + patience;
    if seen.is_none() && has_names(pod, &classified) {
        // Where it goes depends on the name that it asks for, if it speaks TLS.
        let found = tokio::time::timeout_at(waits_until, detecting.as_mut()).await;
        seen = found.ok().transpose().map_err(client_failed)?;
    }
    if let Some(seen) = &seen {
        seen.count(&context.telemetry);
    }
    match seen.map(|it| it.protocol) {
        Some(Sniffed::Http(version)) => return Ok(http(version, None)),
        Some(other) => {
            let name = match &other {
                Sniffed::Tls { server_name } => server_name.as_deref(),
                _ => None,
            };
            let to = (opaque, accepted.original, name);
            let reached = reach(context, pod, &classified, to, &client, record).await?;
            return Ok(Found::Opaque(Box::new(reached), looked));
        }
        None => {}
    }
    // Nothing that it says may leave before it is known what that is.
    let from = Caller {
        said: None,
        ..opaque
    };
    let mut detected = None;
    if is_connected(pod, &classified, accepted.original) {
        // HTTP was spoken there before; if it is, no other connection is needed.
        let found = tokio::time::timeout_at(waits_until, detecting.as_mut()).await;
        detected = found.ok().transpose().map_err(client_failed)?;
        if let Some(seen) = &detected
            && let Sniffed::Http(version) = &seen.protocol
        {
            seen.count(&context.telemetry);
            return Ok(http(*version, None));
        }
    }
    let connected = {
        let to = (from, accepted.original, None);
        let mut reaching = pin!(reach(context, pod, &classified, to, &client, record));
        tokio::select! {
            biased;
            found = &mut detecting, if detected.is_none() => {
                let found = found.map_err(client_failed)?;
                if let Sniffed::Http(version) = &found.protocol {
                    tokio::select! {
                        biased;
                        connected = &mut reaching => {
                            detected = Some(found);
                            connected
                        }
                        // Its exchanges do so themselves.
                        () = client.waits.notified() => {
                            found.count(&context.telemetry);
                            return Ok(http(*version, None));
                        }
                    }
                } else {
                    detected = Some(found);
                    reaching.await
                }
            }
            connected = &mut reaching => connected,
        }
    };
    let (mut connected, in_flight) = match connected {
        Ok(connected) => connected,
        Err(error) => {
            // Whoever only looks whether somebody listens must not wait for what the client has to say. Where there
            // is no endpoint, that decides: clients of HTTP are told so, and not refused.
            if error.nothing_listens() && !record.more_endpoints && !error.is_no_endpoint() {
                remember_refused(context, pod, accepted.original);
            }
            let seen = seen_of_refused(detected, detecting, &error).await?;
            seen.iter().for_each(|it| it.count(&context.telemetry));
            return match seen.map(|it| it.protocol) {
                // Its exchanges will hear so themselves.
                Some(Sniffed::Http(version)) => Ok(http(version, None)),
                _ => Err(error),
            };
        }
    };
    count(context, pod, record);
    if detected.is_none() {
        detected = tokio::select! {
            biased;
            found = detecting => Some(found.map_err(client_failed)?),
            spoken = connected.speaks() => {
                spoken.map_err(|error| Broken::socket(Side::Server, error))?;
                None
            }
        };
    }
    let detected = detected.unwrap_or(Detected::SERVER_FIRST);
    detected.count(&context.telemetry);
    match detected.protocol {
        Sniffed::Http(version) => Ok(http(version, Some(Box::new(connected)))),
        _ => {
            let reached = Box::new((connected, in_flight));
            Ok(Found::Opaque(reached, Looked::Later))
        }
    }
}

/// What a client speaks that was refused: if it is to be told, it has a little more time to say so.
async fn seen_of_refused(
    seen: Option<Detected>,
    detecting: impl Future<Output = io::Result<Detected>>,
    error: &FlowError,
) -> Result<Option<Detected>, Broken> {
    if seen.is_some() || !error.is_told() {
        return Ok(seen);
    }
    let found = tokio::time::timeout(http::refusal::GRACE, detecting).await;
    let found = found.ok().transpose();
    found.map_err(|error| Broken::socket(Side::Client, error))
}

/// Whether the service's routes for flows of the pod look at the name that a TLS client asks for.
fn has_names(pod: &LocalPod, classified: &Classified) -> bool {
    let Classified::Service(port) = classified else {
        return false;
    };
    let routes = port.routes.load();
    let namespace = &pod.id.0.namespace;
    routes
        .as_ref()
        .is_some_and(|it| it.route_type(namespace) == Some(RouteType::Tls))
}

/// Whether the pod's exchanges keep a connection to an endpoint that this one could be led to.
fn is_connected(pod: &LocalPod, classified: &Classified, original: SocketAddr) -> bool {
    match classified {
        Classified::Address => pod.exchanges.has_any(std::iter::once(original)),
        Classified::Service(port) => {
            let endpoints = port.endpoints.load();
            let endpoints = endpoints.iter();
            pod.exchanges.has_any(endpoints.map(|it| it.to()))
        }
    }
}

/// Whether it is worth a look: it may be HTTP, or TLS that is routed.
fn is_looked_at(
    context: &Context,
    pod: &LocalPod,
    accepted: &Accepted,
    classified: &Classified,
) -> bool {
    // What stays in the pod is none of the mesh's business.
    if pod.has_address(accepted.original.ip()) {
        return false;
    }
    http::may_be(context.declared(pod, classified, accepted.original)) || has_names(pod, classified)
}

impl Connected {
    /// Ends when the server has said something that tells what it speaks.
    async fn speaks(&mut self) -> io::Result<()> {
        let server = match self {
            Self::Socket(server) => server,
            Self::SameNode(admitted, _) => &admitted.server,
            Self::Channel(asked) => {
                asked.speaks().await;
                return Ok(());
            }
            Self::Tunnel(opened) => {
                let halves = &mut opened.halves;
                if halves.first.is_empty()
                    && let Some(Ok(first)) = halves.receive.data().await
                {
                    halves.first = first;
                }
                if detect::is_for_client_to_say(&halves.first) {
                    std::future::pending::<()>().await;
                }
                return Ok(());
            }
        };
        detect::server_speaks(server).await.map(drop)
    }
}
