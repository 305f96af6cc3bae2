//! What a flow turns out to be: its client's first bytes say so, and a server is connected to meanwhile.

use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use weft_core::route::RouteType;

use super::reach::{Patient, classify, reach};
use super::{Accepted, Caller, Classified, Connected, count};
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
    Opaque(Box<Reached>),
    /// HTTP, and what was connected meanwhile.
    Http(http::outbound::Client, Option<Box<Connected>>),
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
        let to = (opaque, accepted.original, None);
        let reached = reach(context, pod, &classified, to, &client, record).await?;
        return Ok(Found::Opaque(Box::new(reached)));
    }
    let client_failed = |error| Broken::socket(Side::Client, error);
    let mut seen = detect::at_once(socket).map_err(client_failed)?;
    if seen.is_none() && has_names(pod, &classified) {
        // Where it goes depends on the name that it asks for, if it speaks TLS.
        let found = detect::from_client(socket).await;
        seen = Some(found.map_err(client_failed)?);
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
            return Ok(Found::Opaque(Box::new(reached)));
        }
        None => {}
    }
    // Nothing that it says may leave before it is known what that is.
    let from = Caller {
        said: None,
        ..opaque
    };
    let mut detecting = pin!(detect::from_client(socket));
    let mut detected = None;
    if is_connected(pod, &classified, accepted.original) {
        // HTTP was spoken there before; if it is, no other connection is needed.
        detected = Some(detecting.as_mut().await.map_err(client_failed)?);
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
    if let (Err(FlowError::NoEndpoint(..)), None) = (&connected, &detected)
        && let Ok(found) = tokio::time::timeout(SPEAK_PATIENCE, detecting.as_mut()).await
    {
        // Who speaks HTTP can be told why.
        detected = Some(found.map_err(client_failed)?);
    }
    if let (Err(_), Some(Sniffed::Http(version))) =
        (&connected, detected.as_ref().map(|it| &it.protocol))
    {
        // Its exchanges will hear so themselves.
        return Ok(http(*version, None));
    }
    let (mut connected, in_flight) = connected?;
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
        _ => Ok(Found::Opaque(Box::new((connected, in_flight)))),
    }
}

/// How long a client that nobody serves may take to say that it speaks HTTP.
const SPEAK_PATIENCE: Duration = Duration::from_millis(250);

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
    /// Ends when the server has said something.
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
                return Ok(());
            }
        };
        detect::server_speaks(server).await
    }
}
