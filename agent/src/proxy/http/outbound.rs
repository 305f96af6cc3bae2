//! The client's half of exchanges: which endpoint, on which connection, and again elsewhere if the request
//! has not left.

use std::net::SocketAddr;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderMap, request, response};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::{Request, Response};
use weft_core::route::{
    self, Filter, Matched, Mirror, Place, RouteTable, Selected, SelectedFlow, apply_to_request,
    apply_to_response, pick,
};

use super::Version;
use super::answer::ExchangeError;
use super::body::{RequestBody, ResponseBody, Used, heed_expectation};
use super::connection::{Hold, Http1, Http2, Life, OpenStream, Route};
use super::measure::{Kind, Known, Timers, grpc_status};
use super::pool::Home;
use super::stream::{Returned, Stream};
use super::{head, serve, upgrade};
use crate::balance::{self, InFlight};
use crate::discovery::{Balanced, ServicePortEntry};
use crate::node::LocalPod;
use crate::proxy::Context;
use crate::proxy::ends::unless;
use crate::proxy::error::FlowError;
use crate::proxy::outbound::{self, Caller, Connected};
use crate::proxy::record::{PathLabel, Record};
use crate::proxy::tcp::FlowSocket;
use crate::proxy::tunnel::weft1::stream::ChannelIo;
use crate::telemetry::exchange::{self, GrpcStatus};

/// A client's connection, as its exchanges need it.
#[derive(Clone)]
pub(in crate::proxy) struct Client(Arc<Facts>);

struct Facts {
    context: Arc<Context>,
    pod: Arc<LocalPod>,
    /// The application's address, as others see it.
    address: SocketAddr,
    /// Where it wanted to go.
    original: SocketAddr,
    version: Version,
    target: Target,
    /// Of trust roots and certificates, when it connected.
    generation: u64,
    /// What its exchanges are counted in, rule by rule.
    known: Mutex<Option<Known>>,
    /// Ends what its connection was upgraded to.
    end: tokio_util::sync::CancellationToken,
}

/// What a client wants to reach.
#[derive(Clone, Debug)]
pub(in crate::proxy) enum Target {
    /// Any endpoint of a service's port.
    Service(Arc<ServicePortEntry>),
    /// That address.
    Address,
}

/// A connection to a server, ready for an exchange.
enum Upstream {
    Http1(Box<Http1>),
    Http2 {
        connection: Http2,
        stream: OpenStream,
        is_reused: bool,
    },
}

/// A try that failed. The request is there if nothing of it has left.
struct Failed {
    error: ExchangeError,
    request: Option<Request<RequestBody>>,
    /// It was tried on a connection that had been used before.
    was_reused: bool,
}

/// What is to be done when a response has ended.
#[derive(Debug)]
pub(super) struct Ending {
    /// Its place in a connection of HTTP/2.
    _stream: Option<OpenStream>,
    /// The endpoint has to do with it.
    _in_flight: Option<InFlight>,
    timers: Timers,
    in_trailers: Option<GrpcStatus>,
}

/// Where a request is led.
struct Led<'a> {
    goal: Goal,
    /// What happens to it and its response: what the rule says, then what the backend says.
    filters: [&'a [Filter]; 2],
}

/// Who may serve it.
enum Goal {
    /// Any endpoint of a service's port.
    Port(Arc<ServicePortEntry>),
    /// That address.
    Address(SocketAddr),
}

/// What became of it.
enum Way<'a> {
    To(Led<'a>),
    /// It is answered here.
    Answered(response::Parts),
}

impl Client {
    /// Of a connection that speaks HTTP.
    pub(in crate::proxy) fn new(
        context: &Arc<Context>,
        pod: &Arc<LocalPod>,
        (address, original): (SocketAddr, SocketAddr),
        version: Version,
        target: Target,
        generation: u64,
    ) -> Self {
        Self(Arc::new(Facts {
            context: Arc::clone(context),
            pod: Arc::clone(pod),
            address,
            original,
            version,
            target,
            generation,
            known: Mutex::default(),
            end: pod.end_flows.child_token(),
        }))
    }

    /// Keeps a connection that was made before it was known what the client speaks.
    pub(in crate::proxy) async fn keep(&self, connected: Connected, record: Box<Record>) {
        let made = start(&self.0, connected, record, self.0.generation).await;
        match made {
            Ok(Upstream::Http1(connection)) => {
                let used = Used {
                    home: home(&self.0),
                    connection,
                };
                used.give_back();
            }
            // Shared already.
            Ok(Upstream::Http2 { .. }) => {}
            Err(error) => tracing::debug!(%error, "a connection was made in vain"),
        }
    }

    /// Serves the client's connection until it ends.
    ///
    /// # Errors
    /// The pod's flows had to end.
    pub(in crate::proxy) async fn serve(self, socket: FlowSocket) -> Result<(), FlowError> {
        let (pod, version) = (Arc::clone(&self.0.pod), self.0.version);
        let end = self.0.end.clone();
        let _end = end.drop_guard();
        let serving = pin!(serve::serve(
            Stream::socket(socket),
            version,
            &pod,
            move |request| exchange(Arc::clone(&self.0), request)
        ));
        let ended = unless(pin!(outbound::drained(&pod)), serving).await?;
        if let Err(error) = ended {
            tracing::debug!(pod = %pod.id, %error, "a client's connection ended");
        }
        Ok(())
    }
}

/// One exchange.
async fn exchange(client: Arc<Facts>, request: Request<Incoming>) -> Response<ResponseBody> {
    let is_grpc = head::is_grpc(request.headers());
    let mut timers = None;
    match try_exchange(&client, request, is_grpc, &mut timers).await {
        Ok(response) => response,
        Err(error) => {
            if let Some(timers) = timers {
                timers.answer(&error, is_grpc);
            }
            tracing::debug!(pod = %client.pod.id, %error, "an exchange failed");
            error.answer(is_grpc)
        }
    }
}

async fn try_exchange(
    client: &Arc<Facts>,
    request: Request<Incoming>,
    is_grpc: bool,
    timers: &mut Option<Timers>,
) -> Result<Response<ResponseBody>, ExchangeError> {
    let (mut parts, body) = request.into_parts();
    let purpose = head::accept(&mut parts)?;
    // Held as long as anything of it is used: what is changed meanwhile holds for the next exchange.
    let table = match &client.target {
        Target::Service(port) => port.routes.load_full(),
        Target::Address => None,
    };
    let mut kind = Kind {
        parent: client.target.port(),
        table: table.as_ref(),
        matched: None,
        backend: None,
        is_grpc,
    };
    let way = lead(client, table.as_deref(), &mut parts, &mut kind.matched);
    *timers = Some(kind.of_rule(&client.context, &client.pod, &mut client.known()));
    let led = match way? {
        Way::To(led) => led,
        Way::Answered(parts) => {
            Ending::measured(timers.take(), &parts).ended();
            return Ok(Response::from_parts(parts, ResponseBody::empty()));
        }
    };
    if let Goal::Port(port) = &led.goal {
        kind.backend = Some(port);
    }
    let mut body = RequestBody::of(body);
    for filter in led.filters.iter().copied().flatten() {
        if let Filter::Mirror(to) = filter
            && to.share.includes(rand::random())
        {
            mirror(client, to, &parts, &mut body);
        }
    }
    let method = parts.method.clone();
    let mut request = Request::from_parts(parts, body);
    let upgrading = (purpose == head::Purpose::Upgrade).then(|| hyper::upgrade::on(&mut request));
    heed_expectation(&mut request);
    let sending = Box::pin(send(client, &led.goal, Some(&kind), request));
    let Sent {
        upstream,
        in_flight,
        response,
        timers: of_try,
    } = sending.await?;
    let timers = timers.take().map(|it| of_try.and(it));
    let (mut parts, incoming) = response.into_parts();
    if let Some(upgrading) = upgrading
        && head::is_upgraded(&method, parts.status)
    {
        Ending::measured(timers, &parts).ended();
        let driver = match upstream {
            Upstream::Http1(http1) => Some(http1.into_driver()),
            Upstream::Http2 { .. } => None,
        };
        let response = Response::from_parts(parts, incoming);
        let end = client.end.clone();
        return Ok(upgrade::switch(
            &client.pod,
            upgrading,
            response,
            driver,
            end,
        ));
    }
    if client.version == Version::Http1 {
        // The client's own version is for its connection to know.
        parts.version = http::Version::HTTP_11;
    }
    head::check_response(&mut parts.headers)?;
    let mut ending = Ending::measured(timers, &parts);
    ending._in_flight = in_flight;
    head::strip_hop(&mut parts.headers, head::Purpose::Exchange);
    for filters in led.filters {
        apply_to_response(filters, &mut parts);
    }
    let body = match upstream {
        Upstream::Http1(connection) => {
            let used = Used {
                connection,
                home: home(client),
            };
            ResponseBody::of(incoming, Some(used), ending)
        }
        Upstream::Http2 { stream, .. } => {
            ending._stream = Some(stream);
            ResponseBody::of(incoming, None, ending)
        }
    };
    Ok(Response::from_parts(parts, body))
}

/// Where the routes of the service lead the request, which is changed as they say.
fn lead<'a>(
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
                SelectedFlow::Service => Arc::clone(port),
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
        return Ok(Way::Answered(answer));
    }
    let Some(backend) = pick(&matched.rule.backends, rand::random()) else {
        return Err(ExchangeError::NoBackend);
    };
    if let Some(answer) = apply_to_request(&backend.filters, head, place) {
        return Ok(Way::Answered(answer));
    }
    Ok(Way::To(Led {
        goal: Goal::Port(backend_port(client, &backend.target)?),
        filters: [of_rule, &backend.filters],
    }))
}

fn backend_port(
    client: &Facts,
    target: &route::Target,
) -> Result<Arc<ServicePortEntry>, ExchangeError> {
    match target {
        route::Target::Service { name, port } => {
            let found = client.context.store.service_port(name, *port);
            found.ok_or(ExchangeError::NoBackend)
        }
        route::Target::Invalid(_) => Err(ExchangeError::NoBackend),
    }
}

/// Sends the request to another backend too, in a task of its own. Its body is what passes by: who does not
/// keep up loses the rest.
fn mirror(client: &Arc<Facts>, to: &Mirror, head: &request::Parts, body: &mut RequestBody) {
    let Ok(port) = backend_port(client, &to.target) else {
        return;
    };
    // Those that cannot be had are left out: nobody waits for a mirror.
    let Some(place) = client.pod.exchanges.mirror() else {
        return;
    };
    let mut request = Request::new(body.copied());
    *request.method_mut() = head.method.clone();
    *request.uri_mut() = head.uri.clone();
    *request.version_mut() = head.version;
    *request.headers_mut() = head.headers.clone();
    let client = Arc::clone(client);
    let pod = Arc::clone(&client.pod);
    let ended = pod.end_flows.clone();
    pod.spawn_flow(async move {
        let _place = place;
        let sending = async {
            let goal = Goal::Port(port);
            let sent = Box::pin(send(&client, &goal, None, request)).await?;
            let used = match sent.upstream {
                Upstream::Http1(connection) => Some(Used {
                    connection,
                    home: home(&client),
                }),
                Upstream::Http2 { .. } => None,
            };
            let mut answer = ResponseBody::of(sent.response.into_body(), used, Ending::nothing());
            while let Some(Ok(_)) = answer.frame().await {}
            Ok::<(), ExchangeError>(())
        };
        let sending = tokio::time::timeout(MIRROR_TIMEOUT, sending);
        let sent = tokio::select! {
            sent = sending => sent,
            () = ended.cancelled() => return,
        };
        match sent {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(%error, "a mirrored request failed"),
            Err(_) => tracing::debug!("a mirrored request took too long"),
        }
    });
}

/// Sends the request to one endpoint after the other, as long as nothing of it has left.
async fn send(
    client: &Arc<Facts>,
    goal: &Goal,
    kind: Option<&Kind<'_>>,
    mut request: Request<RequestBody>,
) -> Result<Sent, ExchangeError> {
    let port = match goal {
        Goal::Port(port) => port,
        Goal::Address(address) => {
            let to = (*address, None, kind);
            let sent = send_until_fresh(client, to, request).await;
            return sent.map_err(|failed| failed.error);
        }
    };
    let mut tries = port.tries(Balanced::Exchanges, client.original.ip());
    let only = tries.candidates() <= 1;
    let mut last = None;
    while let Some(endpoint) = tries.next(Instant::now(), balance::random_below) {
        let mut in_flight = endpoint.begin();
        let to = (endpoint.to(), Some((&**port, only)), kind);
        let failed = match send_until_fresh(client, to, request).await {
            Ok(mut sent) => {
                in_flight.first_byte();
                sent.in_flight = Some(in_flight);
                return Ok(sent);
            }
            Err(failed) => failed,
        };
        match &failed.error {
            ExchangeError::Flow(error) if !outbound::is_of_endpoint(error) => in_flight.forget(),
            _ => in_flight.failed(),
        }
        match failed.request {
            Some(back) if may_try_another(&failed.error) => {
                request = back;
                last = Some(failed.error);
            }
            _ => return Err(failed.error),
        }
    }
    Err(last.unwrap_or_else(|| {
        let error = FlowError::NoEndpoint(port.service.clone(), port.port);
        refused(client, &error);
        error.into()
    }))
}

fn may_try_another(error: &ExchangeError) -> bool {
    matches!(error, ExchangeError::Flow(error) if error.may_try_another())
}

/// An endpoint; the port of a service that it is of, and whether it is the only one; how it is counted.
type Endpoint<'a> = (
    SocketAddr,
    Option<(&'a ServicePortEntry, bool)>,
    Option<&'a Kind<'a>>,
);

/// A request that was answered.
struct Sent {
    upstream: Upstream,
    in_flight: Option<InFlight>,
    response: Response<Incoming>,
    timers: Timers,
}

/// Sends the request to an endpoint: again if a connection that was used before turns out to be closed. Its
/// server may like another one.
async fn send_until_fresh(
    client: &Arc<Facts>,
    endpoint: Endpoint<'_>,
    mut request: Request<RequestBody>,
) -> Result<Sent, Failed> {
    let mut tries = 0;
    loop {
        tries += 1;
        match send_to(client, endpoint, request).await {
            Err(Failed {
                request: Some(back),
                was_reused: true,
                ..
            }) if tries <= MOST_STALE => request = back,
            other => return other,
        }
    }
}

async fn send_to(
    client: &Arc<Facts>,
    endpoint: Endpoint<'_>,
    mut request: Request<RequestBody>,
) -> Result<Sent, Failed> {
    let mut upstream = match upstream(client, endpoint).await {
        Ok(upstream) => upstream,
        Err(error) => {
            return Err(Failed {
                error,
                request: Some(request),
                was_reused: false,
            });
        }
    };
    let was_reused = upstream.is_reused();
    // Of a request that may be sent twice and has nothing behind its head, a copy is enough.
    let again = (was_reused && head::may_repeat(&request)).then(|| head::copy_of(&request));
    request = adapt(request, client.version);
    if upstream.route().path == PathLabel::SameNode {
        // Here is nobody else to do it.
        head::set_client(request.headers_mut(), Some(&client.pod.identity));
    }
    let timers = match endpoint.2 {
        Some(kind) => upstream.measure(client, kind),
        None => Timers::default(),
    };
    let sent = match &mut upstream {
        Upstream::Http1(connection) => connection.send(request).await,
        Upstream::Http2 { connection, .. } => connection.send(request).await,
    };
    match sent {
        Ok(response) => Ok(Sent {
            upstream,
            in_flight: None,
            response,
            timers,
        }),
        Err(mut error) => {
            timers.fail(exchange::ExchangeError::Io);
            let back = error.take_message();
            Err(Failed {
                request: back.or(again),
                was_reused,
                error: ExchangeError::Server(error.into_error()),
            })
        }
    }
}

/// A version that the other side's connection can speak.
fn adapt(mut request: Request<RequestBody>, version: Version) -> Request<RequestBody> {
    if version == Version::Http2 {
        *request.version_mut() = http::Version::HTTP_2;
    }
    request
}

/// A connection to the endpoint: one that is there, or a new one.
async fn upstream(
    client: &Arc<Facts>,
    (endpoint, of, _): Endpoint<'_>,
) -> Result<Upstream, ExchangeError> {
    let Facts {
        context,
        pod,
        version,
        ..
    } = &**client;
    let way = outbound::decide(context, pod, endpoint).await;
    let way = way.inspect_err(|error| refused(client, error))?;
    let route = outbound::route(context, &way, endpoint);
    match version {
        Version::Http1 => {
            if let Some(connection) = pod.exchanges.take_http1(&route) {
                return Ok(Upstream::Http1(connection));
            }
        }
        Version::Http2 => {
            if let Some(connection) = pod.exchanges.take_http2(&route) {
                let stream = connection.open();
                return Ok(Upstream::Http2 {
                    connection,
                    stream,
                    is_reused: true,
                });
            }
        }
    }
    let mut record = Box::new(outbound::new_record(pod));
    record.client = Some(client.address);
    record.original = Some(client.original);
    record.service = of.map(|(port, _)| port.service.clone());
    let from = Caller {
        address: client.address,
        said: None,
    };
    let connecting = Box::pin(outbound::connect(context, pod, from, endpoint, &mut record));
    let connected = match connecting.await {
        Ok(connected) => connected,
        Err(error) => {
            // Of a service only if there is no other endpoint: that may be listening.
            if error.nothing_listens() && of.is_none_or(|(_, is_only)| is_only) {
                outbound::remember_refused(context, pod, client.original);
            }
            let result = Err(error);
            record.finish(&context.telemetry, &result);
            return Err(result.err().unwrap_or(FlowError::PodGone).into());
        }
    };
    start(client, connected, record, route.generation).await
}

/// Counts what never became a flow.
fn refused(client: &Facts, error: &FlowError) {
    if let Some(refusal) = error.refusal() {
        client.context.telemetry.refusal(&client.pod.id, refusal);
    }
}

/// Speaks HTTP on a flow that was accepted.
async fn start(
    client: &Arc<Facts>,
    connected: Connected,
    mut record: Box<Record>,
    generation: u64,
) -> Result<Upstream, ExchangeError> {
    let Facts { context, pod, .. } = &**client;
    let mut route = route_of(pod, &record, &connected, generation);
    outbound::count(context, pod, &mut record);
    let mut moved = std::mem::take(&mut record.moved);
    let (stream, hold) = match connected {
        Connected::Socket(server) => (Stream::socket(server), Hold::Nothing),
        Connected::SameNode(admitted, tracked) => {
            let (server, inbound_meter, verdict, admission) = admitted.part();
            record.verdict = Some(verdict);
            moved.meter_too(inbound_meter);
            let hold = Hold::SameNode {
                admission,
                _counted: tracked,
            };
            (Stream::socket(server), hold)
        }
        Connected::Channel(asked) => {
            let (channel, watch, give_back) = asked.part();
            let returned = Returned::default();
            let hold = Hold::Channel {
                returned: returned.clone(),
                watch: Box::new(watch),
                give_back: Some(give_back),
            };
            let io = ChannelIo::new(channel);
            (Stream::channel(io, Bytes::new(), returned), hold)
        }
        Connected::Tunnel(opened) => {
            let hold = Hold::Tunnel { _slot: opened.slot };
            (Stream::tunnel(opened.halves), hold)
        }
    };
    route.verdict.clone_from(&record.verdict);
    let route = Arc::new(route);
    let life = Life::new(context, pod, record, moved, hold);
    match client.version {
        Version::Http1 => {
            let started = Http1::start(stream, life, route).await;
            let connection = started.map_err(ExchangeError::Server)?;
            Ok(Upstream::Http1(Box::new(connection)))
        }
        Version::Http2 => {
            let started = Http2::start(stream, life, route).await;
            let connection = started.map_err(ExchangeError::Server)?;
            let connection = pod.exchanges.share(connection, &pod.stop_accepting);
            let stream = connection.open();
            Ok(Upstream::Http2 {
                connection,
                stream,
                is_reused: false,
            })
        }
    }
}

/// Where a connection that was just made leads.
fn route_of(pod: &LocalPod, record: &Record, connected: &Connected, generation: u64) -> Route {
    let own = record.destination.as_ref() == Some(&pod.id);
    Route {
        endpoint: record
            .endpoint
            .unwrap_or(SocketAddr::from(([0, 0, 0, 0], 0))),
        path: record.path,
        destination: record.destination.clone().filter(|_| !own),
        identity: record.destination_identity.clone(),
        local: match connected {
            Connected::SameNode(admitted, _) => Some(Arc::clone(admitted.pod())),
            _ => None,
        },
        verdict: None,
        // From before it was made: a change in its middle makes it one that is not used again.
        generation,
    }
}

fn home(client: &Facts) -> Home {
    let pod = &client.pod;
    Home::Pool(Arc::clone(&pod.exchanges), pod.stop_accepting.clone())
}

impl Facts {
    fn known(&self) -> MutexGuard<'_, Option<Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Target {
    fn port(&self) -> Option<&Arc<ServicePortEntry>> {
        match self {
            Self::Service(port) => Some(port),
            Self::Address => None,
        }
    }
}

impl Upstream {
    fn route(&self) -> &Route {
        match self {
            Self::Http1(connection) => &connection.route,
            Self::Http2 { connection, .. } => &connection.route,
        }
    }

    /// Begins to measure an exchange.
    fn measure(&mut self, client: &Facts, kind: &Kind<'_>) -> Timers {
        let (context, pod) = (&client.context, &client.pod);
        match self {
            Self::Http1(connection) => {
                let connection = &mut **connection;
                kind.of_connection(context, pod, &connection.route, &mut connection.known)
            }
            Self::Http2 { connection, .. } => {
                let known = connection.known.lock();
                let mut known = known.unwrap_or_else(PoisonError::into_inner);
                kind.of_connection(context, pod, &connection.route, &mut known)
            }
        }
    }

    fn is_reused(&self) -> bool {
        match self {
            Self::Http1(connection) => connection.is_reused,
            Self::Http2 { is_reused, .. } => *is_reused,
        }
    }
}

impl Ending {
    /// Of an exchange that nothing is held for.
    pub(super) fn nothing() -> Self {
        Self {
            _stream: None,
            _in_flight: None,
            timers: Timers::default(),
            in_trailers: None,
        }
    }

    /// Of an exchange whose response's head has come.
    pub(super) fn measured(timers: Option<Timers>, head: &response::Parts) -> Self {
        let mut ending = Self::nothing();
        if let Some(mut timers) = timers {
            timers.respond(head.status, &head.headers);
            ending.timers = timers;
        }
        ending
    }

    /// A part of the response's body has come.
    pub(super) fn part(&mut self) {
        self.timers.first_byte();
    }

    /// The trailers have come.
    pub(super) fn trailers(&mut self, trailers: &HeaderMap) {
        self.in_trailers = grpc_status(trailers);
    }

    /// All of the response has come.
    pub(super) fn ended(self) {
        self.timers.end(self.in_trailers);
    }

    /// The server failed in the middle of it.
    pub(super) fn failed(self) {
        self.timers.fail(exchange::ExchangeError::Io);
    }
}

/// Connections that turn out to be closed, of those that were kept, before the request fails.
const MOST_STALE: usize = 8;
/// How long a mirrored request may take: nobody waits for it.
const MIRROR_TIMEOUT: Duration = Duration::from_secs(30);
