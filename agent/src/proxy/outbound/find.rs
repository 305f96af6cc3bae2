//! What a flow turns out to be: its client's first bytes say so, and a server is connected to meanwhile.

use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;

use tokio::sync::Notify;
use tokio::time::Instant;
use weft_core::route::RouteType;

use super::reach::{Patient, classify, reach};
use super::{Accepted, Caller, Classified, Connected, count, remember_refused};
use crate::balance::InFlight;
use crate::node::LocalPod;
use crate::proxy::egress;
use crate::proxy::error::FlowError;
use crate::proxy::http::Version;
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
    let finding = Finding {
        context,
        pod,
        accepted,
        classified: classify(context, pod, accepted.original).await?,
        client: Patient {
            socket: accepted.socket.socket(),
            waits: Notify::new(),
        },
        generation,
    };
    if !is_looked_at(context, pod, accepted, &finding.classified) {
        let from = Caller {
            is_left_alone: true,
            ..finding.opaque()
        };
        let reached = finding.reach(from, None, record).await?;
        return Ok(Found::Opaque(Box::new(reached), Looked::Not));
    }
    finding.look(record).await
}

/// A flow that is being found out about.
struct Finding<'a> {
    context: &'a Arc<Context>,
    pod: &'a Arc<LocalPod>,
    accepted: &'a Accepted,
    classified: Classified,
    client: Patient<'a>,
    /// Of trust roots and certificates, when it connected.
    generation: u64,
}

/// What came first: what the client speaks, or a server.
enum Meanwhile {
    /// Its exchanges connect themselves.
    Http(Version),
    /// A server was connected to, or not. What the client speaks is known, or still to be found out.
    Connected(Result<Reached, FlowError>, Option<Detected>),
}

impl<'a> Finding<'a> {
    /// Looks at what the client says first.
    async fn look(&self, record: &mut Record) -> Result<Found, FlowError> {
        let (context, socket) = (self.context, self.client.socket);
        let patience = context.config.detect_timeout;
        let mut seen = detect::at_once(socket).map_err(client_failed)?;
        let looked = match &seen {
            Some(_) => Looked::AtOnce,
            None => Looked::Later,
        };
        let mut detecting = pin!(detect::from_client(socket, patience, &context.telemetry));
        // Until then it is worth more to know what it is than to have connected.
        let waits_until = Instant::now() + patience;
        if seen.is_none() && self.must_be_known() {
            // Where it goes depends on the name that it asks for, if it speaks TLS, or whether it goes anywhere on
            // what it speaks.
            let found = tokio::time::timeout_at(waits_until, detecting.as_mut()).await;
            seen = found.ok().transpose().map_err(client_failed)?;
        }
        if let Some(seen) = seen {
            seen.count(&context.telemetry);
            return self.seen(seen.protocol, looked, record).await;
        }
        let mut detected = None;
        if is_connected(self.pod, &self.classified, self.accepted.original) {
            // HTTP was spoken there before; if it is, no other connection is needed.
            let found = tokio::time::timeout_at(waits_until, detecting.as_mut()).await;
            detected = found.ok().transpose().map_err(client_failed)?;
            if let Some(seen) = &detected
                && let Sniffed::Http(version) = &seen.protocol
            {
                seen.count(&context.telemetry);
                return Ok(self.http(*version, None));
            }
        }
        let meanwhile = self.meanwhile(detecting.as_mut(), detected, record).await?;
        match meanwhile {
            Meanwhile::Http(version) => Ok(self.http(version, None)),
            Meanwhile::Connected(Ok(reached), detected) => {
                count(context, self.pod, record);
                self.connected(reached, detecting, detected).await
            }
            Meanwhile::Connected(Err(error), detected) => {
                self.refused(error, detecting, detected, record).await
            }
        }
    }

    fn must_be_known(&self) -> bool {
        must_be_known(self.context, self.pod, self.accepted, &self.classified)
    }

    /// What the client speaks was seen before anything was connected to.
    async fn seen(
        &self,
        protocol: Sniffed,
        looked: Looked,
        record: &mut Record,
    ) -> Result<Found, FlowError> {
        let name = match &protocol {
            Sniffed::Http(version) => return Ok(self.http(*version, None)),
            Sniffed::Tls { server_name } => server_name.as_deref(),
            _ => None,
        };
        let reached = self.reach(self.opaque(), name, record).await?;
        Ok(Found::Opaque(Box::new(reached), looked))
    }

    /// Connects while the client is waited for.
    async fn meanwhile(
        &self,
        mut detecting: Pin<&mut impl Future<Output = io::Result<Detected>>>,
        mut detected: Option<Detected>,
        record: &mut Record,
    ) -> Result<Meanwhile, FlowError> {
        // Nothing that it says may leave before it is known what that is.
        let from = Caller {
            said: None,
            ..self.opaque()
        };
        let mut reaching = pin!(self.reach(from, None, record));
        let connected = tokio::select! {
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
                        () = self.client.waits.notified() => {
                            found.count(&self.context.telemetry);
                            return Ok(Meanwhile::Http(*version));
                        }
                    }
                } else {
                    detected = Some(found);
                    reaching.await
                }
            }
            connected = &mut reaching => connected,
        };
        Ok(Meanwhile::Connected(connected, detected))
    }

    /// A server is there: it may be the one that says what is spoken.
    async fn connected(
        &self,
        (mut connected, in_flight): Reached,
        detecting: Pin<&mut impl Future<Output = io::Result<Detected>>>,
        mut detected: Option<Detected>,
    ) -> Result<Found, FlowError> {
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
        detected.count(&self.context.telemetry);
        match detected.protocol {
            Sniffed::Http(version) => Ok(self.http(version, Some(Box::new(connected)))),
            _ => {
                let reached = Box::new((connected, in_flight));
                Ok(Found::Opaque(reached, Looked::Later))
            }
        }
    }

    /// No server is there.
    async fn refused(
        &self,
        error: FlowError,
        detecting: Pin<&mut impl Future<Output = io::Result<Detected>>>,
        detected: Option<Detected>,
        record: &Record,
    ) -> Result<Found, FlowError> {
        // Whoever only looks whether somebody listens must not wait for what the client has to say. Where there
        // is no endpoint, that decides: clients of HTTP are told so, and not refused.
        if error.nothing_listens() && !record.more_endpoints && !error.is_no_endpoint() {
            remember_refused(self.context, self.pod, self.accepted.original);
        }
        let seen = seen_of_refused(detected, detecting, &error).await?;
        seen.iter().for_each(|it| it.count(&self.context.telemetry));
        match seen.map(|it| it.protocol) {
            // Its exchanges will hear so themselves.
            Some(Sniffed::Http(version)) => Ok(self.http(version, None)),
            _ => Err(error),
        }
    }

    async fn reach(
        &self,
        from: Caller<'a>,
        name: Option<&str>,
        record: &mut Record,
    ) -> Result<Reached, FlowError> {
        let to = (from, self.accepted.original, name);
        reach(
            self.context,
            self.pod,
            &self.classified,
            to,
            &self.client,
            record,
        )
        .await
    }

    /// The client of a flow of bytes.
    fn opaque(&self) -> Caller<'a> {
        Caller {
            address: self.accepted.client,
            said: Some(self.client.socket),
            is_left_alone: false,
            service: None,
        }
    }

    fn http(&self, version: Version, connected: Option<Box<Connected>>) -> Found {
        let target = match &self.classified {
            Classified::Service(port) => http::outbound::Target::Service(Arc::clone(port)),
            Classified::Address => http::outbound::Target::Address,
        };
        let addresses = (self.accepted.client, self.accepted.original);
        let (context, pod) = (self.context, self.pod);
        let client =
            http::outbound::Client::new(context, pod, addresses, version, target, self.generation);
        Found::Http(client, connected)
    }
}

fn client_failed(error: io::Error) -> Broken {
    Broken::socket(Side::Client, error)
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
    found.map_err(client_failed)
}

/// Whether routes of the pod's flows look at what a client says: the name that one of TLS asks for, or, out of the
/// cluster, requests.
fn must_be_known(
    context: &Context,
    pod: &LocalPod,
    accepted: &Accepted,
    classified: &Classified,
) -> bool {
    let Classified::Service(port) = classified else {
        return egress::must_be_known(context, pod, accepted.original);
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

/// Whether it is worth a look: it may be HTTP, or is routed by what it says.
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
    http::may_be(context.declared(pod, classified, accepted.original))
        || must_be_known(context, pod, accepted, classified)
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
