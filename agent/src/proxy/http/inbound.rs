//! The server's half of exchanges: who the client is, and the connection to the application.
//!
//! A flow has one connection to the application, made when it was admitted; of HTTP/1 another one is made
//! when the application has closed it between two exchanges. Policy watches over the flow, and so over
//! all of its exchanges.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use hyper::body::Incoming;
use hyper::{Request, Response};
use tokio_util::sync::CancellationToken;
use weft_core::route::apply_to_response;
use weft_core::{Identity, PortProtocol, Verdict};

use super::answer::ExchangeError;
use super::application::Origin;
use super::body::{RequestBody, ResponseBody, Used, heed_interim};
use super::connection::{Hold, Http1, Http2, Life, MOST_STALE, Route};
use super::gate::{Gate, Pass};
use super::host::ByHost;
use super::idle::Idle;
use super::measure::Timers;
use super::outbound::Ending;
use super::pool::Home;
use super::stream::Stream;
use super::{Version, head, is_taken, serve, tap, upgrade};
use crate::node::LocalPod;
use crate::proxy::Context;
use crate::proxy::error::FlowError;
use crate::proxy::record::PathLabel;
use crate::proxy::socket;
use crate::proxy::tcp::FlowSocket;
use crate::proxy::usage::{From, Party, Place};
use crate::telemetry::exchange::{ExchangeLabels, HttpErrors};
use crate::telemetry::{Direction, TlsLabel};

/// A flow that was admitted, as its exchanges need it.
pub(in crate::proxy) struct Admitted {
    /// The rest of the agent.
    pub(in crate::proxy) context: Arc<Context>,
    /// The server's pod.
    pub(in crate::proxy) pod: Arc<LocalPod>,
    /// The client's address, as the application sees it.
    pub(in crate::proxy) client: SocketAddr,
    /// Who that is, if proven.
    pub(in crate::proxy) identity: Option<Identity>,
    /// The application.
    pub(in crate::proxy) to: SocketAddr,
    /// How the client's side is secured.
    pub(in crate::proxy) tls: TlsLabel,
    /// What policy said.
    pub(in crate::proxy) verdict: Option<Verdict>,
    /// What is declared of the port.
    pub(in crate::proxy) declared: PortProtocol,
}

struct Facts {
    flow: Admitted,
    series: Mutex<ByHost>,
    gate: Gate,
    /// What is answered here.
    errors: HttpErrors,
    version: Version,
    route: Arc<Route>,
    /// Whose exchanges they are.
    party: Party,
    http1: Arc<Mutex<Option<Box<Http1>>>>,
    http2: tokio::sync::Mutex<Option<Http2>>,
    /// Ends what it was upgraded to.
    end: CancellationToken,
}

impl Admitted {
    /// Serves the flow's exchanges until it ends. `server` is its connection to the application.
    ///
    /// # Errors
    /// HTTP could not be started with the application.
    pub(in crate::proxy) async fn serve(
        self,
        stream: Stream,
        version: Version,
        server: FlowSocket,
    ) -> Result<(), FlowError> {
        let pod = Arc::clone(&self.pod);
        let end = CancellationToken::new();
        let _end = end.clone().drop_guard();
        let route = Arc::new(Route {
            endpoint: self.to,
            path: PathLabel::Itself,
            destination: None,
            identity: None,
            local: None,
            party: None,
            verdict: None,
            gate: None,
            generation: 0,
        });
        let series = ByHost::new(ExchangeLabels {
            target_port: Some(self.to.port()),
            tls: self.tls,
            client: self.identity.clone(),
            verdict: self.verdict.clone(),
            ..ExchangeLabels::new(Direction::Inbound, &pod.labels)
        });
        let from = (self.client.ip(), self.tls);
        let gate = Gate::new(
            Arc::clone(&pod),
            self.to.port(),
            from,
            self.identity.clone(),
            self.verdict.as_ref(),
        );
        let errors = self
            .context
            .telemetry
            .http_errors(Direction::Inbound, &pod.labels);
        let from = self.identity.clone();
        let from = from.map_or(From::Strangers, From::Workload);
        let party = Party::at_pod(&pod.usage, from);
        let facts = Arc::new(Facts {
            flow: self,
            series: Mutex::new(series),
            gate,
            errors,
            version,
            route,
            party: party.clone(),
            http1: Arc::default(),
            http2: tokio::sync::Mutex::default(),
            end,
        });
        // Who does not take the version is not spoken to.
        if is_taken(facts.flow.declared, version) {
            let started = facts.start(server).await;
            if let Err(error) = started {
                tracing::debug!(pod = %pod.id, %error, "HTTP with an application");
            }
        }
        let kept = Arc::clone(&facts.http1);
        let context = Arc::clone(&facts.flow.context);
        let idle = Idle::of(&context, Direction::Inbound);
        let ends = (&party, &pod.stop_accepting, idle);
        let served = serve::serve(stream, version, &pod, ends, move |request| {
            exchange(Arc::clone(&facts), request)
        });
        let served = served.await;
        let kept = kept.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(kept) = kept {
            kept.close();
        }
        if let Err(error) = served {
            tracing::debug!(pod = %pod.id, %error, "a client's connection ended");
        }
        Ok(())
    }
}

impl Facts {
    /// Speaks HTTP on a connection to the application, and keeps it for the next exchange.
    async fn start(&self, server: FlowSocket) -> Result<(), hyper::Error> {
        let stream = self.application(server);
        match self.version {
            Version::Http1 => {
                let connection = self.speak_http1(stream).await?;
                *self.place() = Some(connection);
            }
            Version::Http2 => {
                let connection = self.speak_http2(stream).await?;
                *self.http2.lock().await = Some(connection);
            }
        }
        Ok(())
    }

    async fn speak_http1(&self, server: Stream) -> Result<Box<Http1>, hyper::Error> {
        let started = Http1::start(server, self.life(), Arc::clone(&self.route));
        started.await.map(Box::new)
    }

    async fn speak_http2(&self, server: Stream) -> Result<Http2, hyper::Error> {
        let route = Arc::clone(&self.route);
        Http2::start(server, self.life(), route, &self.party).await
    }

    fn life(&self) -> Life {
        Life::unaccounted(&self.flow.context, &self.flow.pod, Hold::Nothing)
    }

    fn place(&self) -> std::sync::MutexGuard<'_, Option<Box<Http1>>> {
        self.http1.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins to measure an exchange.
    fn begin<B>(&self, request: &Request<B>) -> Timers {
        let (context, pod) = (&self.flow.context, &self.flow.pod);
        let timer = {
            let series = self.series.lock();
            let mut series = series.unwrap_or_else(PoisonError::into_inner);
            series.begin(context, pod, request)
        };
        let ends = (self.flow.client, self.flow.to);
        let client = (self.flow.identity.as_ref(), self.flow.tls);
        let tapped = tap::received(context, pod, ends, client, request);
        Timers::one(timer.tapped(tapped))
    }

    async fn connect(&self) -> Result<Stream, ExchangeError> {
        let Admitted {
            context,
            pod,
            client,
            to,
            ..
        } = &self.flow;
        let server = socket::deliver(context, pod, *to, *client).await?;
        Ok(self.application(server))
    }

    fn application(&self, server: FlowSocket) -> Stream {
        let origin = Origin {
            proxy: Arc::clone(&self.flow.context),
            pod: Arc::clone(&self.flow.pod),
            to: self.flow.to,
            client: Some(self.flow.client),
        };
        Stream::application(server, origin, self.version)
    }

    /// The connection to the application, or a new one.
    async fn http1(&self) -> Result<Box<Http1>, ExchangeError> {
        let kept = self.place().take();
        if let Some(mut kept) = kept {
            if kept.is_free() {
                return Ok(kept);
            }
            kept.close();
        }
        let started = self.speak_http1(self.connect().await?).await;
        started.map_err(ExchangeError::Server)
    }

    /// The connection to the application, or a new one, and whether it was there before.
    async fn http2(&self) -> Result<(Http2, bool), ExchangeError> {
        let mut kept = self.http2.lock().await;
        if let Some(kept) = kept.as_ref().filter(|it| !it.has_ended()) {
            return Ok((kept.clone(), true));
        }
        let started = self.speak_http2(self.connect().await?).await;
        let connection = started.map_err(ExchangeError::Server)?;
        *kept = Some(connection.clone());
        Ok((connection, false))
    }
}

async fn exchange(facts: Arc<Facts>, request: Request<Incoming>) -> Response<ResponseBody> {
    let is_grpc = head::is_grpc(request.headers());
    let mut timers = Some(facts.begin(&request));
    match try_exchange(&facts, request, &mut timers).await {
        Ok(response) => response,
        Err(ExchangeError::Answered(answer)) => {
            Ending::measured(timers, &answer).ended();
            Response::from_parts(*answer, ResponseBody::empty())
        }
        Err(error) => {
            if let Some(timers) = timers {
                timers.answer(&error, is_grpc);
            }
            facts.errors.count(error.label(), error.reason());
            let pod = &facts.flow.pod;
            if let ExchangeError::Flow(error) = &error
                && let Some(refusal) = error.refusal()
            {
                facts.flow.context.telemetry.refusal(&pod.id, refusal);
            }
            tracing::debug!(pod = %pod.id, %error, "an exchange failed");
            error.answer(is_grpc)
        }
    }
}

async fn try_exchange(
    facts: &Arc<Facts>,
    request: Request<Incoming>,
    timers: &mut Option<Timers>,
) -> Result<Response<ResponseBody>, ExchangeError> {
    let (mut parts, body) = request.into_parts();
    let purpose = head::accept(&mut parts)?;
    let context = &facts.flow.context;
    let pass = facts
        .gate
        .ask(context, facts.version, &mut parts, &facts.end)?;
    let place = facts.party.enter(&parts.headers)?;
    let mut body = RequestBody::of(body, &facts.party);
    body.count_in(timers.as_mut().and_then(Timers::request_bytes));
    let request = Request::from_parts(parts, body);
    match facts.version {
        Version::Http1 => exchange_http1(facts, (request, purpose), (place, pass), timers).await,
        Version::Http2 => exchange_http2(facts, request, (place, pass), timers).await,
    }
}

async fn exchange_http1(
    facts: &Arc<Facts>,
    (mut request, purpose): (Request<RequestBody>, head::Purpose),
    (place, pass): (Place, Pass),
    timers: &mut Option<Timers>,
) -> Result<Response<ResponseBody>, ExchangeError> {
    let method = request.method().clone();
    let upgrading = (purpose == head::Purpose::Upgrade).then(|| hyper::upgrade::on(&mut request));
    heed_interim(&mut request);
    let upload = request.body_mut().watch(pass.entry.as_ref(), None);
    let (connection, response) = loop {
        let mut connection = facts.http1().await?;
        let was_reused = connection.is_reused;
        let again = (was_reused && head::may_repeat(&request))
            .then(|| head::copy_of(&request, RequestBody::empty()));
        match pass.hold(connection.send(request)).await? {
            Ok(response) => break (connection, response),
            Err(mut error) => {
                let back = error.take_message().or(again);
                match back {
                    Some(back) if was_reused => request = back,
                    _ => return Err(ExchangeError::of_sent(error.into_error(), &upload)),
                }
            }
        }
    };
    let (mut parts, incoming) = response.into_parts();
    if let Some(upgrading) = upgrading
        && head::is_upgraded(&method, parts.status)
    {
        Ending::measured(timers.take(), &parts).ended();
        upload.leave();
        let driver = Some(connection.into_driver());
        let response = Response::from_parts(parts, incoming);
        let (pod, end) = (&facts.flow.pod, (facts.end.clone(), pass.entry));
        return Ok(upgrade::switch(pod, upgrading, response, driver, None, end));
    }
    head::check_response(&mut parts)?;
    head::strip_hop(&mut parts.headers, head::Purpose::Exchange);
    let used = Used {
        connection,
        home: Home::Place(Arc::clone(&facts.http1)),
    };
    // The client's own version is for its connection to know.
    parts.version = http::Version::HTTP_11;
    apply_to_response(&pass.filters, &mut parts);
    let ending = Ending::measured(timers.take(), &parts).holding(place);
    let body = ResponseBody::of(incoming, Some(used), ending);
    let body = body.watching(upload).under(pass.entry);
    Ok(Response::from_parts(parts, body.charged(&facts.party)))
}

async fn exchange_http2(
    facts: &Arc<Facts>,
    mut request: Request<RequestBody>,
    (place, pass): (Place, Pass),
    timers: &mut Option<Timers>,
) -> Result<Response<ResponseBody>, ExchangeError> {
    let upload = request.body_mut().watch(pass.entry.as_ref(), None);
    let mut tries = 0;
    let response = loop {
        tries += 1;
        let (mut connection, was_reused) = facts.http2().await?;
        let was_reused = was_reused && tries <= MOST_STALE;
        let again = (was_reused && head::may_repeat(&request))
            .then(|| head::copy_of(&request, RequestBody::empty()));
        match pass.hold(connection.send(request)).await? {
            Ok(response) => break response,
            // The application was closing the connection, as some do after so many requests.
            Err(mut error) => {
                let again = again.filter(|_| head::has_closed(error.error()));
                match error.take_message().or(again) {
                    Some(back) if was_reused => request = back,
                    _ => return Err(ExchangeError::of_sent(error.into_error(), &upload)),
                }
            }
        }
    };
    let (mut parts, incoming) = response.into_parts();
    apply_to_response(&pass.filters, &mut parts);
    let ending = Ending::measured(timers.take(), &parts).holding(place);
    let body = ResponseBody::of(incoming, None, ending);
    let body = body.watching(upload).under(pass.entry);
    Ok(Response::from_parts(parts, body.charged(&facts.party)))
}
