//! The client's half of exchanges: which endpoint, on which connection, and again elsewhere if the request
//! has not left.

mod again;
mod ending;
pub(in crate::proxy) mod lead;
mod mirror;
mod send;
pub(in crate::proxy) mod terms;
mod tried;
mod upstream;

use std::net::SocketAddr;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use http::request::Parts;
use hyper::body::Incoming;
use hyper::{Method, Request, Response};
use weft_core::EgressNetwork;
use weft_core::route::{Filter, RouteTable, apply_to_response, pick};

use self::again::{send_once, send_under};
pub(super) use self::ending::Ending;
use self::lead::{Goal, Going, Way, lead, said};
use self::mirror::mirror;
use self::send::Sent;
use self::terms::Terms;
use self::upstream::{Upstream, refused, start};
use super::Version;
use super::answer::{self, ExchangeError};
use super::body::{RequestBody, ResponseBody, Used, heed_interim};
use super::gate::hold;
use super::head::{self, BadHead};
use super::idle::Idle;
use super::measure::{Egress, Kind, Known, Timers, Tries, without_endpoint};
use super::pool::Home;
use super::stream::Stream;
use super::{serve, tap, upgrade};
use crate::balance::breaker::Judgement;
use crate::discovery::ServicePortEntry;
use crate::node::LocalPod;
use crate::proxy::Context;
use crate::proxy::egress;
use crate::proxy::ends::unless;
use crate::proxy::error::FlowError;
use crate::proxy::live_requests::RequestEntry;
use crate::proxy::outbound::Connected;
use crate::proxy::record::Record;
use crate::proxy::tcp::FlowSocket;
use crate::proxy::usage::Party;
use crate::telemetry::Direction;
use crate::telemetry::exchange::{ExchangeSeries, HttpErrors};
use crate::telemetry::tap::Begin;

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
    /// Whose exchanges they are.
    party: Party,
    /// What its exchanges are counted in, rule by rule.
    known: Mutex<Known>,
    /// The same of those that no endpoint is found for, once there was one.
    without_endpoint: OnceLock<Arc<ExchangeSeries>>,
    /// What is answered here.
    errors: HttpErrors,
    /// Ends it, and what its connection was upgraded to.
    end: tokio_util::sync::CancellationToken,
    /// That requests left the cluster which nobody asked about.
    unasked: OnceLock<RequestEntry>,
}

/// What a client wants to reach.
#[derive(Clone, Debug)]
pub(in crate::proxy) enum Target {
    /// Any endpoint of a service's port.
    Service(Arc<ServicePortEntry>),
    /// That address.
    Address,
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
            party: Party::of_pod(&pod.usage),
            known: Mutex::default(),
            without_endpoint: OnceLock::new(),
            errors: context
                .telemetry
                .http_errors(Direction::Outbound, &pod.labels),
            end: pod.end_flows.child_token(),
            unasked: OnceLock::new(),
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
        let party = self.0.party.clone();
        let end = self.0.end.clone();
        let _end = end.clone().drop_guard();
        let (context, original) = (Arc::clone(&self.0.context), self.0.original);
        let ending = pin!(async {
            end.cancelled().await;
            egress::ended(&context, &pod, original)
        });
        let idle = Idle::of(&context, Direction::Outbound);
        let serving = pin!(serve::serve(
            Stream::socket(socket),
            version,
            &pod,
            (&party, &pod.stop_accepting, idle),
            move |request| exchange(Arc::clone(&self.0), request)
        ));
        let ended = unless(ending, serving).await?;
        if let Err(error) = ended {
            tracing::debug!(pod = %pod.id, %error, "a client's connection ended");
        }
        Ok(())
    }
}

/// An exchange that is to be counted, if no try of it was.
struct Whole<'a> {
    client: &'a Facts,
    tries: Tries,
    /// Its beginning, for those who watch the pod.
    begun: Option<Box<Begin>>,
}

impl Whole<'_> {
    /// Counts it, if it was not; without an endpoint.
    fn count(&self) -> Timers {
        if self.tries.count() {
            let timer = self.client.without_endpoint().begin();
            let begun = self.begun.as_deref();
            Timers::one(timer.tapped(tap::unsent(&self.client.context, &self.client.pod, begun)))
        } else {
            Timers::default()
        }
    }
}

impl Drop for Whole<'_> {
    /// The client gave it up before it came to an endpoint.
    fn drop(&mut self) {
        drop(self.count());
    }
}

/// One exchange.
async fn exchange(client: Arc<Facts>, request: Request<Incoming>) -> Response<ResponseBody> {
    let is_grpc = head::is_grpc(request.headers());
    let whole = Whole {
        client: &client,
        tries: Tries::default(),
        begun: tap::begun(&client.context, &client.pod, &request, || {
            let ends = (client.address, client.original);
            tap::asked(
                &client.context,
                &client.pod,
                ends,
                client.target.port(),
                &request,
            )
        }),
    };
    let mut timers = None;
    match try_exchange(&client, request, (is_grpc, &whole), &mut timers).await {
        Ok(response) => response,
        Err(ExchangeError::Answered(answer)) => {
            Ending::measured(timers, &answer).ended();
            Response::from_parts(*answer, ResponseBody::empty())
        }
        Err(error) => {
            // It may have been stopped in a try.
            whole.tries.take().answer(&error, is_grpc);
            whole.count().answer(&error, is_grpc);
            if let Some(timers) = timers {
                timers.answer(&error, is_grpc);
            }
            client.errors.count(error.label(), error.reason());
            tracing::debug!(pod = %client.pod.id, %error, "an exchange failed");
            error.answer(is_grpc)
        }
    }
}

async fn try_exchange(
    client: &Arc<Facts>,
    request: Request<Incoming>,
    (is_grpc, whole): (bool, &Whole<'_>),
    timers: &mut Option<Timers>,
) -> Result<Response<ResponseBody>, ExchangeError> {
    let (mut parts, body) = request.into_parts();
    let purpose = head::accept(&mut parts)?;
    let place = client.party.enter(&parts.headers);
    let place = place.inspect_err(|error| refused(client, error))?;
    let (network, leaving) = client.leave(&parts);
    let network = network.as_ref();
    // Held as long as anything of it is used: what is changed meanwhile holds for the next exchange.
    let table = client.target.routes(network, client.original);
    if parts.method == Method::CONNECT
        && let Some(table) = table.as_deref().filter(|_| network.is_some())
        && let Some(of) = table.route_type(&client.pod.id.0.namespace)
        && of.is_of_requests()
    {
        return Err(BadHead::ConnectUnseen.into());
    }
    let mut kind = Kind {
        parent: client.target.port(),
        egress: network.map(|network| Egress {
            network,
            port: client.original.port(),
        }),
        table: table.as_ref(),
        matched: None,
        backend: None,
        is_grpc,
        client: client.address,
        classes: None,
        tries: &whole.tries,
    };
    let routes = (table.as_deref(), network.map(|it| &**it));
    let going = Going {
        context: &client.context,
        pod: &client.pod,
        original: client.original,
        target: &client.target,
        choose: |it| pick(it, rand::random()),
    };
    let way = lead(&going, routes, &mut parts, &mut kind.matched);
    if let Err(ExchangeError::Flow(error)) = &way {
        refused(client, error);
    }
    *timers = Some(kind.of_rule(&client.context, &client.pod, &mut client.known()));
    let led = match way? {
        Way::To(led) => led,
        Way::Answered(parts) => {
            let timers = timers.take().map(|it| whole.count().and(it));
            Ending::measured(timers, &parts).ended();
            return Ok(Response::from_parts(parts, ResponseBody::empty()));
        }
    };
    if let Goal::Port(port) = &led.goal {
        kind.backend = Some(port);
    }
    let said = said(&going, table.as_deref(), kind.matched, &parts);
    kind.classes = said.classes.cloned();
    let said = (said.reliability, said.budget);
    let terms = Terms::of(said, &mut parts, is_grpc, purpose).map(Box::new);
    let mut body = RequestBody::of(body, &client.party);
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
    heed_interim(&mut request);
    let sending = async {
        Ok::<_, ExchangeError>(match &terms {
            None => {
                let sending = send_once(client, &led.goal, &kind, request);
                (Box::pin(sending).await?, None)
            }
            Some(terms) => {
                let timers = timers.as_ref();
                let sending = send_under(client, &led.goal, &kind, terms, timers, request);
                let (sent, held) = Box::pin(sending).await?;
                (sent, Some(held))
            }
        })
    };
    let (sent, mut held) = hold(leaving.as_ref(), sending).await??;
    let Sent {
        upstream,
        mut in_flight,
        response,
        timers: of_try,
        mut pass,
        upload,
        place: of_server,
    } = sent;
    if pass.entry.is_none() {
        pass.entry = leaving.map(Arc::new);
    }
    *timers = timers.take().map(|it| of_try.and(it));
    let (mut parts, incoming) = response.into_parts();
    if let Some(upgrading) = upgrading
        && head::is_upgraded(&method, parts.status)
    {
        Ending::measured(timers.take(), &parts).ended();
        upload.leave();
        if let Some(in_flight) = &mut in_flight {
            in_flight.judge(Judgement::Success, None);
        }
        let driver = match upstream {
            Upstream::Http1(http1) => Some(http1.into_driver()),
            Upstream::Http2 { .. } => None,
        };
        let response = Response::from_parts(parts, incoming);
        let end = (client.end.clone(), pass.entry);
        return Ok(upgrade::switch(
            &client.pod,
            upgrading,
            response,
            driver,
            in_flight,
            end,
        ));
    }
    if client.version == Version::Http1 {
        // The client's own version is for its connection to know.
        parts.version = http::Version::HTTP_11;
    }
    head::check_response(&mut parts)?;
    let mut ending = Ending::measured(timers.take(), &parts);
    ending.hold(in_flight, &parts);
    ending._places = [Some(place), of_server];
    head::strip_hop(&mut parts.headers, head::Purpose::Exchange);
    apply_to_response(&pass.filters, &mut parts);
    for filters in led.filters {
        apply_to_response(filters, &mut parts);
    }
    if let Some(held) = &mut held {
        // HTTP/1 has no form for it where the client did not ask for trailers.
        held.is_told = client.version == Version::Http2 && answer::may_end_early(&parts.headers);
    }
    let body = match upstream {
        Upstream::Http1(connection) => {
            let used = Used {
                connection,
                home: home(client),
            };
            ResponseBody::of_held(incoming, Some(used), ending, held)
        }
        Upstream::Http2 { stream, .. } => {
            ending._stream = Some(stream);
            ResponseBody::of_held(incoming, None, ending, held)
        }
    };
    let body = body.watching(upload).under(pass.entry);
    let body = body.charged(&client.party);
    Ok(Response::from_parts(parts, body))
}

fn home(client: &Facts) -> Home {
    let pod = &client.pod;
    Home::Pool(Arc::clone(&pod.exchanges), pod.stop_accepting.clone())
}

impl Facts {
    /// The EgressNetwork by which a request leaves the cluster, if one is for it; and the request's entry, where such
    /// networks are known.
    fn leave(&self, head: &Parts) -> (Option<Arc<EgressNetwork>>, Option<RequestEntry>) {
        if matches!(self.target, Target::Service(_)) {
            return (None, None);
        }
        let (context, pod) = (&*self.context, &*self.pod);
        if !context.store.has_egress() {
            self.unasked
                .get_or_init(|| egress::enter_requests(context, pod, self.original, &self.end));
            // Only now: a change in between must not be missed.
            if !context.store.has_egress() {
                return (None, None);
            }
        }
        if !context.store.is_outside(self.original) {
            return (None, None);
        }
        let entry = egress::enter_request(context, pod, self.original, head, &self.end);
        let network = context.store.egress(&pod.id.0.namespace, self.original);
        (network, Some(entry))
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn without_endpoint(&self) -> &Arc<ExchangeSeries> {
        self.without_endpoint.get_or_init(|| {
            let parent = self.target.port();
            without_endpoint(&self.context, &self.pod, parent, self.original)
        })
    }
}

impl Target {
    fn port(&self) -> Option<&Arc<ServicePortEntry>> {
        match self {
            Self::Service(port) => Some(port),
            Self::Address => None,
        }
    }

    /// The routes of what it is; of an address, those of the EgressNetwork by which requests leave the cluster.
    pub(in crate::proxy) fn routes(
        &self,
        network: Option<&Arc<EgressNetwork>>,
        original: SocketAddr,
    ) -> Option<Arc<RouteTable>> {
        match (self, network) {
            (Self::Service(port), _) => port.routes.load_full(),
            (Self::Address, Some(network)) => network.routes_at(original.port()).cloned(),
            (Self::Address, None) => None,
        }
    }
}
