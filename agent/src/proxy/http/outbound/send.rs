//! Sending a request: to one endpoint after the other, as long as nothing of it has left.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use hyper::body::Incoming;
use hyper::{Request, Response};

use super::Facts;
use super::lead::Goal;
use super::upstream::{Upstream, refused, upstream};
use crate::balance::{self, InFlight, Tries};
use crate::discovery::{Balanced, ServicePortEntry};
use crate::proxy::error::FlowError;
use crate::proxy::http::answer::{self, ExchangeError};
use crate::proxy::http::body::{Repeat, RequestBody};
use crate::proxy::http::connection::MOST_STALE;
use crate::proxy::http::gate::Pass;
use crate::proxy::http::measure::{Kind, Timers};
use crate::proxy::http::upload::Watch;
use crate::proxy::http::{Version, head};
use crate::proxy::outbound::{self, Waiter};
use crate::proxy::usage::Place;

/// A try that failed. The request is there if nothing of it has left.
struct Failed {
    error: ExchangeError,
    request: Option<Request<RequestBody>>,
    /// It was tried on a connection that had been used before.
    was_reused: bool,
    /// What it was counted in, if a connection was there.
    timers: Timers,
}

/// The endpoints that a request was sent to before, where it is sent more than once.
#[derive(Debug)]
pub(super) struct Tried(Option<Mutex<Vec<SocketAddr>>>);

impl Tried {
    /// Of a request that is sent once.
    pub(super) const ONCE: Self = Self(None);

    /// None yet.
    pub(super) fn none() -> Self {
        Self(Some(Mutex::default()))
    }

    fn all(&self) -> Vec<SocketAddr> {
        let tried = self.0.as_ref();
        let all = tried.map(|it| it.lock().unwrap_or_else(PoisonError::into_inner).clone());
        all.unwrap_or_default()
    }

    fn push(&self, to: SocketAddr) {
        if let Some(tried) = &self.0 {
            let mut tried = tried.lock().unwrap_or_else(PoisonError::into_inner);
            // The last ones: no more can be left out.
            if tried.len() >= balance::MOST_TRIES {
                tried.remove(0);
            }
            tried.push(to);
        }
    }
}

/// Sends the request to one endpoint after the other, as long as nothing of it has left.
pub(super) async fn send(
    client: &Arc<Facts>,
    goal: &Goal,
    kind: Option<&Kind<'_>>,
    tried: &Tried,
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
    let like = client.original.ip();
    let mut waiter = Waiter::new(&client.context, &client.pod, port, like);
    let mut left_out = tried.all();
    loop {
        waiter.looks();
        let mut tries = port.tries(Balanced::Exchanges, like);
        let are_any = tries.candidates() > 0;
        for to in left_out.iter().rev() {
            tries.leave_out(*to);
        }
        let round = try_each(client, port, &mut tries, (kind, tried), request).await;
        let (last, back) = match round {
            Round::Done(sent) => {
                waiter.served();
                return sent;
            }
            Round::Again(last, back) => (last, back),
        };
        if !left_out.is_empty() && last.as_ref().is_none_or(may_try_another) {
            // Rather there again than nowhere.
            left_out.clear();
            request = back;
            continue;
        }
        // Nobody waits for a mirrored request.
        let waits = kind.is_some() && last.as_ref().is_none_or(is_nobody);
        let nobody = match last {
            Some(last) if !waits => Err(last),
            _ if !waits => Err(FlowError::NoEndpoint(port.service.clone(), port.port).into()),
            _ => waiter.found_nobody(are_any).await.map_err(Into::into),
        };
        if let Err(error) = nobody {
            if let ExchangeError::Flow(
                error @ (FlowError::NoEndpoint(..) | FlowError::TooManyWaiting(..)),
            ) = &error
            {
                refused(client, error);
            }
            return Err(error);
        }
        request = back;
    }
}

/// What became of a request that was tried at some endpoints.
enum Round {
    /// It is answered, or cannot be any more.
    Done(Result<Sent, ExchangeError>),
    /// It is there as it was, and why the last one did not take it; none: none may be chosen.
    Again(Option<ExchangeError>, Request<RequestBody>),
}

async fn try_each(
    client: &Arc<Facts>,
    port: &ServicePortEntry,
    tries: &mut Tries,
    (kind, tried): (Option<&Kind<'_>>, &Tried),
    mut request: Request<RequestBody>,
) -> Round {
    let only = tries.candidates() <= 1;
    let mut last = None;
    while let Some(mut in_flight) = tries.begin(Instant::now(), balance::random_below) {
        let endpoint = in_flight.endpoint().to();
        tried.push(endpoint);
        let to = (endpoint, Some((port, only)), kind);
        let failed = match send_until_fresh(client, to, request).await {
            Ok(mut sent) => {
                in_flight.first_byte();
                sent.in_flight = Some(in_flight);
                return Round::Done(Ok(sent));
            }
            Err(failed) => failed,
        };
        match &failed.error {
            ExchangeError::Flow(error) if !outbound::is_of_endpoint(error) => in_flight.forget(),
            ExchangeError::BrokenOff(_)
            | ExchangeError::OtherVersion(_)
            | ExchangeError::NoRule
            | ExchangeError::Answered(_)
            | ExchangeError::Revoked
            | ExchangeError::Limited(_) => {
                in_flight.forget();
            }
            _ => in_flight.failed(),
        }
        match failed.request {
            Some(back) if may_try_another(&failed.error) => {
                request = back;
                last = Some(failed.error);
            }
            _ => return Round::Done(Err(failed.error)),
        }
    }
    Round::Again(last, request)
}

/// Whether nobody is there yet, or any more.
fn is_nobody(error: &ExchangeError) -> bool {
    matches!(error, ExchangeError::Flow(error) if error.nothing_listens() || error.agent_is_away())
}

fn may_try_another(error: &ExchangeError) -> bool {
    match error {
        ExchangeError::Flow(error) => error.may_try_another(),
        ExchangeError::OtherVersion(_) => true,
        _ => false,
    }
}

/// A request of which an endpoint may have no form, to be sent to another one then.
struct Elsewhere {
    head: Request<()>,
    body: Repeat,
}

impl Elsewhere {
    /// None: every endpoint takes it, or it is not to be had again, or there is no other endpoint.
    fn of(request: &Request<RequestBody>, (_, of, kind): Endpoint<'_>) -> Option<Self> {
        let is_grpc = kind.is_some_and(|it| it.is_grpc);
        let has_form = !is_grpc && !head::is_upgrade(request);
        if has_form || of.is_none_or(|(_, is_only)| is_only) {
            return None;
        }
        Some(Self {
            head: head::copy_of(request, ()),
            body: request.body().repeat()?,
        })
    }

    fn request(self) -> Option<Request<RequestBody>> {
        let body = self.body.body()?;
        Some(self.head.map(|()| body))
    }
}

/// An endpoint; the port of a service that it is of, and whether it is the only one; how it is counted.
pub(super) type Endpoint<'a> = (
    SocketAddr,
    Option<(&'a ServicePortEntry, bool)>,
    Option<&'a Kind<'a>>,
);

/// A request that was answered.
pub(super) struct Sent {
    pub(super) upstream: Upstream,
    pub(super) in_flight: Option<InFlight>,
    pub(super) response: Response<Incoming>,
    pub(super) timers: Timers,
    /// What policy of the server's pod has to do with it, on one node.
    pub(super) pass: Pass,
    /// Stops the request's body.
    pub(super) upload: Watch,
    /// In the limits of the server's pod, where that is this agent's to count.
    pub(super) place: Option<Place>,
}

/// Sends the request to an endpoint: again if a connection that was used before turns out to be closed. Its
/// server may like another one.
async fn send_until_fresh(
    client: &Arc<Facts>,
    endpoint: Endpoint<'_>,
    mut request: Request<RequestBody>,
) -> Result<Sent, Failed> {
    let mut tries = 0;
    let mut counted = None;
    loop {
        tries += 1;
        match send_to(client, endpoint, request, counted).await {
            // No more than one exchange: the server has not seen it.
            Err(Failed {
                request: Some(back),
                was_reused: true,
                timers,
                ..
            }) if tries <= MOST_STALE => (request, counted) = (back, Some(timers)),
            Err(mut failed) => {
                let is_grpc = endpoint.2.is_some_and(|it| it.is_grpc);
                std::mem::take(&mut failed.timers).answer(&failed.error, is_grpc);
                return Err(failed);
            }
            sent => return sent,
        }
    }
}

async fn send_to(
    client: &Arc<Facts>,
    endpoint: Endpoint<'_>,
    mut request: Request<RequestBody>,
    counted: Option<Timers>,
) -> Result<Sent, Failed> {
    let mut upstream = match upstream(client, endpoint).await {
        Ok(upstream) => upstream,
        Err(error) => {
            return Err(Failed {
                error,
                request: Some(request),
                was_reused: false,
                timers: counted.unwrap_or_default(),
            });
        }
    };
    let was_reused = upstream.is_reused();
    let place = match enter(client, &upstream, &request) {
        Ok(place) => place,
        Err(error) => {
            upstream.let_go(client);
            return Err(Failed {
                error: error.into(),
                request: Some(request),
                was_reused: false,
                timers: counted.unwrap_or_default(),
            });
        }
    };
    let pass = match ask(client, &upstream, &mut request) {
        Ok(pass) => pass,
        Err(error) => {
            upstream.let_go(client);
            return Err(Failed {
                error,
                request: None,
                was_reused,
                timers: counted.unwrap_or_default(),
            });
        }
    };
    // Of a request that may be sent twice and has nothing behind its head, a copy is enough.
    let again = (was_reused && head::may_repeat(&request))
        .then(|| head::copy_of(&request, RequestBody::empty()));
    let elsewhere = Elsewhere::of(&request, endpoint);
    request = adapt(request, client.version);
    let mut timers = match (counted, endpoint.2) {
        (Some(counted), _) => counted,
        (None, Some(kind)) => upstream.measure(client, kind, &request),
        (None, None) => Timers::default(),
    };
    timers.request_ended(&request.body_mut().end());
    let upload = request
        .body_mut()
        .watch(pass.entry.as_ref(), upstream.stream());
    if let Some(kind) = endpoint.2 {
        kind.tries.begin(timers);
    }
    let sent = {
        let sending = async {
            match &mut upstream {
                Upstream::Http1(connection) => connection.send(request).await,
                Upstream::Http2 { connection, .. } => connection.send(request).await,
            }
        };
        pass.hold(sending).await
    };
    let timers = endpoint.2.map(|it| it.tries.take()).unwrap_or_default();
    let sent = match sent {
        Ok(sent) => sent,
        Err(error) => {
            return Err(Failed {
                error,
                request: None,
                was_reused,
                timers,
            });
        }
    };
    let other = sent.as_ref().ok().map(|it| it.headers());
    if let Some(reason) = other.and_then(answer::other_version) {
        let back = elsewhere.and_then(Elsewhere::request);
        return Err(Failed {
            request: back.map(|it| pass.undo(it)),
            was_reused: false,
            timers,
            error: ExchangeError::OtherVersion(reason),
        });
    }
    match sent {
        Ok(response) => Ok(Sent {
            upstream,
            in_flight: None,
            response,
            timers,
            pass,
            upload,
            place,
        }),
        Err(mut error) => {
            let is_http2 = matches!(upstream, Upstream::Http2 { .. });
            let again = again.filter(|_| !is_http2 || head::has_closed(error.error()));
            let back = error.take_message().or(again);
            Err(Failed {
                // It will be asked about again.
                request: back.map(|it| pass.undo(it)),
                was_reused,
                timers,
                error: ExchangeError::of_sent(error.into_error(), &upload),
            })
        }
    }
}

/// Asks the policy of the server's pod, if that is of this node.
fn ask(
    client: &Facts,
    upstream: &Upstream,
    request: &mut Request<RequestBody>,
) -> Result<Pass, ExchangeError> {
    let Some(gate) = &upstream.route().gate else {
        return Ok(Pass::default());
    };
    let placeholder = Request::new(RequestBody::empty());
    let (mut parts, body) = std::mem::replace(request, placeholder).into_parts();
    let asked = gate.ask(&client.context, client.version, &mut parts, &client.end);
    *request = Request::from_parts(parts, body);
    asked
}

/// A place in the limits of the server's pod, where that is this agent's to count.
fn enter(
    client: &Facts,
    upstream: &Upstream,
    request: &Request<RequestBody>,
) -> Result<Option<Place>, FlowError> {
    let route = upstream.route();
    let place = route.party.as_ref();
    let place = place.map(|it| it.enter(request.headers())).transpose();
    place.inspect_err(|error| {
        if let (Some(pod), Some(refusal)) = (&route.local, error.refusal()) {
            client.context.telemetry.refusal(&pod.id, refusal);
        }
    })
}

/// A version that the other side's connection can speak.
fn adapt(mut request: Request<RequestBody>, version: Version) -> Request<RequestBody> {
    if version == Version::Http2 {
        *request.version_mut() = http::Version::HTTP_2;
    }
    request
}
