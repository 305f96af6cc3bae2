//! Sending a request: to one endpoint after the other, as long as nothing of it has left.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use hyper::body::Incoming;
use hyper::{Request, Response};

use super::Facts;
use super::ending::retry_after;
use super::lead::Goal;
use super::tried::{MOST_PAUSE, Tried};
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
use crate::proxy::let_out::{self, Leads};
use crate::proxy::outbound::{self, Waiter};
use crate::proxy::usage::Place;

/// A try that failed.
struct Failed {
    error: ExchangeError,
    /// If it may be sent again.
    request: Option<Request<RequestBody>>,
    /// Some of it has left: it may be sent there again, as a copy, and nowhere else.
    has_left: bool,
    /// It was tried on a connection that had been used before.
    was_reused: bool,
    /// What it was counted in, if a connection was there.
    timers: Timers,
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
            tried.push(*address);
            let to = (*address, None, kind);
            let sent = send_until_fresh(client, to, request).await;
            let sent = sent.map_err(|failed| failed.error)?;
            heed_pause(tried, *address, &sent);
            return Ok(sent);
        }
    };
    let like = client.original.ip();
    let mut waiter = Waiter::new(&client.context, &client.pod, port, like);
    let before = tried.so_far();
    let mut among = before.first();
    loop {
        waiter.looks();
        let mut tries = before.among(tries_at(client, port), among, Instant::now().into());
        let are_any = tries.candidates() > 0;
        let round = try_each(client, port, &mut tries, (kind, tried), request).await;
        let (last, back) = match round {
            Round::Done(sent) => {
                waiter.served();
                return sent;
            }
            Round::Again(last, back) => (last, back),
        };
        if let Some(wider) = among.wider()
            && last.as_ref().is_none_or(may_try_another)
        {
            // Rather there again than nowhere.
            among = wider;
            request = back;
            continue;
        }
        let now = Instant::now();
        if let Some(until) = tried.pause(tries.choosable_now(now), now.into()) {
            // Others were there when it was decided to send it again.
            if until.into_std().saturating_duration_since(now) > MOST_PAUSE {
                return Err(FlowError::NoEndpoint(port.service.clone(), port.port).into());
            }
            tokio::time::sleep_until(until).await;
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

/// The tries at a port of a service, without the endpoints that the pod may not connect to.
pub(super) fn tries_at(client: &Facts, port: &ServicePortEntry) -> Tries {
    let tries = port.tries(Balanced::Exchanges, client.original.ip());
    tries.without(let_out::forbidden(&client.context, &client.pod))
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
                heed_pause(tried, endpoint, &sent);
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
        match failed.for_another() {
            (Some(back), error) => {
                request = back;
                last = Some(error);
            }
            (None, error) => return Round::Done(Err(error)),
        }
    }
    if last.is_none() {
        let why = outbound::why_none(&client.context, &client.pod, tries).await;
        last = why.map(|error| {
            refused(client, &error);
            error.into()
        });
    }
    Round::Again(last, request)
}

/// Remembers for how long an endpoint asks to be left alone.
fn heed_pause(tried: &Tried, endpoint: SocketAddr, sent: &Sent) {
    let response = &sent.response;
    if let Some(pause) = retry_after(response.status(), response.headers()) {
        tried.rests(endpoint, tokio::time::Instant::now() + pause);
    }
}

/// Whether nobody is there yet, or any more.
fn is_nobody(error: &ExchangeError) -> bool {
    matches!(error, ExchangeError::Flow(error) if error.nothing_listens() || error.agent_is_away())
}

/// Whether a request that is still there may go to another endpoint.
fn may_try_another(error: &ExchangeError) -> bool {
    match error {
        ExchangeError::Flow(error) => error.may_try_another(),
        ExchangeError::OtherVersion(_) => true,
        // If it is there, nothing of it has left.
        ExchangeError::Server(_) => true,
        _ => false,
    }
}

impl Failed {
    /// The request, if it may go to another endpoint, and what is wrong with this one.
    fn for_another(self) -> (Option<Request<RequestBody>>, ExchangeError) {
        let may_go = !self.has_left && may_try_another(&self.error);
        (self.request.filter(|_| may_go), self.error)
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
            // Its server closed it while it waited, most likely.
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
                has_left: false,
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
                has_left: false,
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
                has_left: false,
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
    request.body_mut().count_in(timers.request_bytes());
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
                has_left: true,
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
            // No application has had it.
            has_left: false,
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
            let unsent = error.take_message();
            let has_left = unsent.is_none();
            let back = unsent.or(again);
            let (store, pod) = (&client.context.store, &client.pod);
            let revoked = || Leads::of_route(upstream.route()).revoked(store, pod);
            let revoked = back
                .is_none()
                .then(revoked)
                .flatten()
                .map(ExchangeError::from);
            Err(Failed {
                // It will be asked about again.
                request: back.map(|it| pass.undo(it)),
                has_left,
                was_reused,
                timers,
                error: revoked
                    .unwrap_or_else(|| ExchangeError::of_sent(error.into_error(), &upload)),
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

#[cfg(test)]
mod tests {
    use hyper::Method;
    use hyper::client::conn::http1;
    use hyper_util::rt::TokioIo;
    use tokio::io::AsyncReadExt;

    use super::*;

    /// (whether the server reads anything before it closes) -> whether the request is there for another endpoint
    #[tokio::test]
    async fn only_what_no_server_may_have_taken_goes_to_another() {
        for (reads, is_there) in [(false, true), (true, false)] {
            let (near, far) = tokio::io::duplex(1024);
            let far = reads.then_some(far);
            let server = async move {
                if let Some(mut far) = far {
                    far.read_u8().await.expect("a head");
                }
            };
            let made = http1::handshake(TokioIo::new(near)).await;
            let (mut sender, connection) = made.expect("a connection");
            let mut request = Request::new(RequestBody::empty());
            *request.method_mut() = Method::POST;
            let sending = sender.try_send_request(request);
            let (sent, _, ()) = tokio::join!(sending, connection, server);
            let mut error = sent.expect_err("closed");
            let unsent = error.take_message();
            assert_eq!(unsent.is_some(), is_there, "{reads}");
            // A copy of what has left changes nothing.
            let failed = Failed {
                has_left: unsent.is_none(),
                request: unsent.or_else(|| Some(Request::new(RequestBody::empty()))),
                error: ExchangeError::Server(error.into_error()),
                was_reused: true,
                timers: Timers::default(),
            };
            assert_eq!(failed.for_another().0.is_some(), is_there, "{reads}");
        }
    }
}
