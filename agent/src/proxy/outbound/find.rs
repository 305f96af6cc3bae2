//! What a flow turns out to be: its client's first bytes say so, and a server is connected to meanwhile.

use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;
use weft_core::PortProtocol;
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
use crate::proxy::tcp::{Broken, FlowSocket, Side};
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
    let finding = Finding {
        context,
        pod,
        accepted,
        declared: context.declared(pod, &classified, accepted.original),
        classified,
        client: Patient {
            socket: accepted.socket.socket(),
            waits: Notify::new(),
        },
        generation,
    };
    if !finding.is_looked_at() {
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
    /// What is declared of the port.
    declared: PortProtocol,
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

/// Who was the first to say something.
enum First {
    Client(Detected),
    /// It has said something, or has ended.
    Server(Box<Reached>, bool),
    /// The client may yet; no server was there.
    Nobody,
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
        let servers = &self.pod.servers_first;
        let server_was_first = seen.is_none() && servers.has(self.accepted.original);
        if seen.is_none() && self.must_be_known() {
            // Where it goes depends on the name that it asks for, if it speaks TLS, or whether it goes anywhere on
            // what it speaks.
            let until = Instant::now() + patience;
            if server_was_first {
                // Who has a name says so at once.
                let said = tokio::time::timeout(HEAD_START.min(patience), detecting.as_mut()).await;
                seen = said.ok().transpose().map_err(client_failed)?;
            }
            if server_was_first && seen.is_none() {
                match self.race(detecting.as_mut(), record).await? {
                    First::Client(said) => seen = Some(said),
                    First::Server(reached, has_spoken) => {
                        return Ok(self.server_first(reached, has_spoken));
                    }
                    First::Nobody => {}
                }
            }
            if seen.is_none() {
                let found = tokio::time::timeout_at(until, detecting.as_mut()).await;
                seen = found.ok().transpose().map_err(client_failed)?;
            }
        }
        if let Some(seen) = seen {
            self.count(&seen);
            return self.seen(seen.protocol, looked, record).await;
        }
        let mut detected = None;
        if !server_was_first && is_connected(self.pod, &self.classified, self.accepted.original) {
            // HTTP was spoken there before; if it is, no other connection is needed. Most clients speak at once.
            let found = tokio::time::timeout(HEAD_START.min(patience), detecting.as_mut()).await;
            detected = found.ok().transpose().map_err(client_failed)?;
            if let Some(seen) = &detected
                && let Sniffed::Http(version) = &seen.protocol
            {
                self.count(seen);
                return Ok(self.http(*version, None));
            }
        }
        let meanwhile = self.meanwhile(detecting.as_mut(), detected, record).await?;
        match meanwhile {
            Meanwhile::Http(version) => Ok(self.http(version, None)),
            Meanwhile::Connected(Ok(reached), detected) => {
                count(context, self.pod, record);
                self.connected(reached, detecting, detected, record).await
            }
            Meanwhile::Connected(Err(error), detected) => {
                self.refused(error, detecting, detected, record).await
            }
        }
    }

    /// Whether it is worth a look: it may be HTTP, or is routed by what it says.
    fn is_looked_at(&self) -> bool {
        // What stays in the pod is none of the mesh's business.
        let stays = self.pod.has_address(self.accepted.original.ip());
        !stays && (http::may_be(self.declared) || self.must_be_known())
    }

    fn must_be_known(&self) -> bool {
        let original = self.accepted.original;
        must_be_known(self.context, self.pod, &self.classified, original)
    }

    /// Where what a client says decides on its way, and those before it waited for their server: connects as for one that
    /// says nothing, for no more than to hear the server. What the client says first is all that counts then.
    async fn race(
        &self,
        mut detecting: Pin<&mut impl Future<Output = io::Result<Detected>>>,
        record: &mut Record,
    ) -> Result<First, FlowError> {
        let from = Caller {
            said: None,
            ..self.opaque()
        };
        let connecting = async {
            let (mut connected, in_flight) = self.reach(from, None, record).await?;
            let spoken = connected.speaks().await;
            let spoken = spoken.map_err(|error| Broken::socket(Side::Server, error))?;
            Ok::<_, FlowError>(((connected, in_flight), spoken))
        };
        let first = tokio::select! {
            biased;
            found = &mut detecting => First::Client(found.map_err(client_failed)?),
            // One that says nothing may not go there, or there is nobody: others may.
            reached = connecting => reached.map_or(First::Nobody, |(reached, has_spoken)| {
                First::Server(Box::new(reached), has_spoken)
            }),
        };
        if !matches!(first, First::Server(..)) {
            record.forget_way();
        }
        Ok(first)
    }

    /// The server has spoken before the client, or has ended, which says nothing about the next one.
    fn server_first(&self, reached: Box<Reached>, has_spoken: bool) -> Found {
        let found = Detected::SERVER_FIRST;
        if has_spoken {
            self.count(&found);
        } else {
            found.count(self.declared, &self.context.telemetry);
        }
        Found::Opaque(reached, Looked::Later)
    }

    /// Whether the port of the Service is declared to be HTTP's.
    fn is_http(&self) -> bool {
        matches!(self.classified, Classified::Service(_))
            && http::takes_nothing_else(self.declared)
            // A route that is in force there says otherwise.
            && !self.must_be_known()
    }

    /// Whether what is no HTTP may pass. Who has said nothing at all may: who only looks whether somebody listens is
    /// to see it.
    fn may_be_bytes(&self, protocol: &Sniffed) -> Result<(), FlowError> {
        let is_other = !matches!(protocol, Sniffed::Http(_));
        if is_other && self.is_http() {
            let is_silent = detect::is_silent(self.client.socket).map_err(client_failed)?;
            return is_silent.then_some(()).ok_or(FlowError::NotHttp);
        }
        Ok(())
    }

    /// Counts what was found out, and remembers who was the first to speak.
    fn count(&self, found: &Detected) {
        found.count(self.declared, &self.context.telemetry);
        let servers = &self.pod.servers_first;
        servers.remember(self.accepted.original, found.is_server_first());
    }

    /// What the client speaks was seen before anything was connected to.
    async fn seen(
        &self,
        protocol: Sniffed,
        looked: Looked,
        record: &mut Record,
    ) -> Result<Found, FlowError> {
        if let Sniffed::Http(version) = protocol {
            return Ok(self.http(version, None));
        }
        note_name(&protocol, record);
        self.may_be_bytes(&protocol)?;
        let name = protocol.server_name();
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
                            self.count(&found);
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
        record: &mut Record,
    ) -> Result<Found, FlowError> {
        let mut has_spoken = true;
        if detected.is_none() {
            detected = tokio::select! {
                biased;
                found = detecting => Some(found.map_err(client_failed)?),
                spoken = connected.speaks() => {
                    let spoken = spoken.map_err(|error| Broken::socket(Side::Server, error))?;
                    // One that has only ended has said nothing that is no HTTP.
                    if spoken && self.is_http() {
                        return Err(FlowError::NotHttp);
                    }
                    has_spoken = spoken;
                    None
                }
            };
        }
        let Some(detected) = detected else {
            return Ok(self.server_first(Box::new((connected, in_flight)), has_spoken));
        };
        self.count(&detected);
        note_name(&detected.protocol, record);
        self.may_be_bytes(&detected.protocol)?;
        match detected.protocol {
            Sniffed::Http(version) => Ok(self.http(version, Some(Box::new(connected)))),
            // It was late, and what it says decides all the same.
            protocol @ Sniffed::Tls { .. } if self.must_be_known() => {
                drop((connected, in_flight));
                record.forget_way();
                self.seen(protocol, Looked::Later, record).await
            }
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
        record: &mut Record,
    ) -> Result<Found, FlowError> {
        // Whoever only looks whether somebody listens must not wait for what the client has to say. Where there
        // is no endpoint, that decides: clients of HTTP are told so, and not refused.
        if error.nothing_listens() && !record.more_endpoints && !error.is_no_endpoint() {
            remember_refused(self.context, self.pod, self.accepted.original);
        }
        let seen = seen_of_refused(detected, detecting, &self.accepted.socket, &error).await;
        seen.iter().for_each(|it| self.count(it));
        let seen = seen.map(|it| it.protocol);
        seen.iter().for_each(|it| note_name(it, record));
        match seen {
            // Its exchanges will hear so themselves.
            Some(Sniffed::Http(version)) => Ok(self.http(version, None)),
            // It was late, and where it goes depends on what it says.
            Some(protocol @ Sniffed::Tls { .. }) if self.must_be_known() => {
                record.forget_way();
                self.seen(protocol, Looked::Later, record).await
            }
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

/// Keeps the name that a client hello asks for.
fn note_name(said: &Sniffed, record: &mut Record) {
    if let Some(name) = said.server_name() {
        record.server_name = Some(name.into());
    }
}

fn client_failed(error: io::Error) -> Broken {
    Broken::socket(Side::Client, error)
}

/// What a client speaks that was refused: if it is to be told, it has a little more time to say so. One that breaks off
/// meanwhile was refused all the same, and says nothing.
async fn seen_of_refused(
    seen: Option<Detected>,
    detecting: impl Future<Output = io::Result<Detected>>,
    client: &FlowSocket,
    error: &FlowError,
) -> Option<Detected> {
    if seen.is_some() || !error.is_told() {
        return seen;
    }
    tokio::select! {
        biased;
        found = tokio::time::timeout(http::refusal::GRACE, detecting) => found.ok()?.ok(),
        () = client.failed() => None,
    }
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

impl Connected {
    /// Ends when the server has said something that tells what it speaks, or has ended. Says whether it has said
    /// anything.
    async fn speaks(&mut self) -> io::Result<bool> {
        let server = match self {
            Self::Socket(server) => server,
            Self::SameNode(admitted, _) => &admitted.server,
            Self::Channel(asked) => {
                return Ok(asked.speaks().await);
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
                return Ok(!halves.first.is_empty());
            }
        };
        detect::server_speaks(server).await.map(|count| count > 0)
    }
}

/// How long a client may take to speak before its server is connected to, where a connection of HTTP may be used that is
/// there already, or what it says decides on its way. One that waits for its server hardly notices.
const HEAD_START: Duration = Duration::from_millis(20);

/// Whether routes of a pod's flows look at what a client says: the name that one of TLS asks for, or, out of the cluster,
/// requests.
pub(in crate::proxy) fn must_be_known(
    context: &Context,
    pod: &LocalPod,
    classified: &Classified,
    to: SocketAddr,
) -> bool {
    let Classified::Service(port) = classified else {
        return egress::must_be_known(context, pod, to);
    };
    let routes = port.routes.load();
    let namespace = &pod.id.0.namespace;
    routes
        .as_ref()
        .is_some_and(|it| it.route_type(namespace) == Some(RouteType::Tls))
}
