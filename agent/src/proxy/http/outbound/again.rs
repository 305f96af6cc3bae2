//! Sending a request under terms: within a time, and again if what comes back is no answer yet.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::{Arc, PoisonError};
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use http::StatusCode;
use http_body_util::BodyExt;
use hyper::Request;
use hyper::body::{Body, Frame};
use tokio::time::{Instant, Sleep, sleep, sleep_until};
use weft_core::Name;
use weft_core::route::Retry;

use super::lead::Goal;
use super::send::{Sent, send, tries_at};
use super::terms::Terms;
use super::tried::{MOST_PAUSE, Tried};
use super::upstream::Upstream;
use super::{Ending, Facts, home};
use crate::balance::{BudgetOwner, SharedBudget};
use crate::proxy::error::FlowError;
use crate::proxy::http::answer::{ERROR, ExchangeError, GRPC_STATUS, is_of_policy};
use crate::proxy::http::answerer::check_rest;
use crate::proxy::http::body::{Held, RequestBody, ResponseBody, Used};
use crate::proxy::http::deadlines::{Deadlines, Late};
use crate::proxy::http::measure::{Kind, Timers, grpc_code};
use crate::proxy::http::replay::{MOST_REPLAYED_BYTES, Replay};
use crate::telemetry::exchange::RetryEvent;

/// How a try ended.
enum Outcome {
    Answered(Box<Sent>),
    Failed(ExchangeError),
    /// It was given up, as another one may follow at that time and this one takes long.
    GivenUp(Instant),
}

/// What decides on further tries.
struct Again<'a> {
    retry: &'a Retry,
    client: &'a Facts,
    goal: &'a Goal,
    tried: &'a Tried,
    budget: Option<SharedBudget>,
    /// How many there were.
    count: u16,
    /// When all of them must be over.
    end: Option<Instant>,
    timers: Option<&'a Timers>,
    replay: Arc<Replay>,
}

/// Sends a request without terms: once, but to another endpoint where one has no form for it.
pub(super) async fn send_once(
    client: &Arc<Facts>,
    goal: &Goal,
    kind: &Kind<'_>,
    request: Request<RequestBody>,
) -> Result<Sent, ExchangeError> {
    let room = room(goal, kind);
    if room == 0 {
        return send(client, goal, Some(kind), &Tried::ONCE, request).await;
    }
    let (head, body) = request.into_parts();
    let replay = Replay::new(body, room);
    let request = Request::from_parts(head, RequestBody::of_try(replay.attempt()));
    let sent = send(client, goal, Some(kind), &Tried::ONCE, request).await;
    replay.forget();
    sent
}

/// How much of a request's body is kept until it is answered, where nobody says that it is to be sent again: an
/// endpoint that speaks HTTP/1 has no form for a call of gRPC, and says so when some of it has left.
fn room(goal: &Goal, kind: &Kind<'_>) -> usize {
    match goal {
        Goal::Port(port) if kind.is_grpc && port.endpoints.load().len() > 1 => MOST_REPLAYED_BYTES,
        _ => 0,
    }
}

/// Sends a request under terms. `timers` count the retries.
pub(super) async fn send_under(
    client: &Arc<Facts>,
    goal: &Goal,
    kind: &Kind<'_>,
    terms: &Terms<'_>,
    timers: Option<&Timers>,
    request: Request<RequestBody>,
) -> Result<(Sent, Box<Held>), ExchangeError> {
    let (head, body) = request.into_parts();
    let Some(retry) = terms.retry.as_deref() else {
        let replay = Replay::new(body, room(goal, kind));
        let mut request = Request::from_parts(head, RequestBody::of_try(replay.attempt()));
        terms.tell_server(request.headers_mut(), true);
        let mut deadlines = begin(terms, &replay);
        let sending = Box::pin(send(client, goal, Some(kind), &Tried::ONCE, request));
        let outcome = one(sending, &mut deadlines, None).await;
        replay.forget();
        return match outcome {
            Outcome::Answered(sent) => Ok((*sent, held(deadlines, None))),
            Outcome::Failed(error) => Err(error),
            Outcome::GivenUp(_) => Err(Late::Request.into()),
        };
    };
    let replay = Replay::new(body, MOST_REPLAYED_BYTES);
    let tried = Tried::none();
    let mut again = Again::new(retry, (client, kind), (goal, &tried), timers, &replay);
    again.end = terms.end.map(|(end, _)| end);
    loop {
        let body = RequestBody::of_try(replay.attempt());
        let mut request = Request::from_parts(head.clone(), body);
        terms.tell_server(request.headers_mut(), again.count == 0);
        let mut deadlines = begin(terms, &replay);
        let sending = Box::pin(send(client, goal, Some(kind), &tried, request));
        let outcome = one(sending, &mut deadlines, Some(&mut again)).await;
        match &outcome {
            Outcome::Answered(_) => {}
            // If it was stopped: what has failed by itself is counted.
            Outcome::Failed(error) => kind.tries.take().answer(error, kind.is_grpc),
            Outcome::GivenUp(_) => kind.tries.take().fail(Late::Backend.label()),
        }
        let next = match outcome {
            Outcome::Answered(mut sent) => match again.look_at(&mut sent, kind.is_grpc).await {
                Ok((first, is_to_repeat)) => {
                    let next = is_to_repeat.then(|| again.take()).flatten();
                    let Some(next) = next else {
                        again.settle(!is_to_repeat);
                        replay.forget();
                        return Ok((*sent, held(deadlines, first)));
                    };
                    let_go(client, *sent, first);
                    next
                }
                Err(error) => again.after(client, error, kind.is_grpc)?,
            },
            Outcome::Failed(error) => again.after(client, error, kind.is_grpc)?,
            Outcome::GivenUp(next) => next,
        };
        sleep_until(next).await;
    }
}

fn begin(terms: &Terms<'_>, replay: &Arc<Replay>) -> Deadlines {
    let times = &terms.timeouts;
    Deadlines::new(replay, terms.of_try(), times.response, times.idle)
}

fn held(deadlines: Deadlines, first: Option<Frame<Bytes>>) -> Box<Held> {
    Box::new(Held {
        deadlines: Some(deadlines),
        first,
        is_told: false,
    })
}

/// One try, until there is a response's head.
async fn one(
    mut sending: Pin<Box<impl Future<Output = Result<Sent, ExchangeError>>>>,
    deadlines: &mut Deadlines,
    mut again: Option<&mut Again<'_>>,
) -> Outcome {
    let mut patience = again.as_ref().and_then(|it| it.patience());
    poll_fn(|context| {
        if let Poll::Ready(sent) = sending.as_mut().poll(context) {
            return Poll::Ready(match sent {
                Ok(sent) => Outcome::Answered(Box::new(sent)),
                Err(error) => Outcome::Failed(error),
            });
        }
        if let Poll::Ready(late) = deadlines.poll(context) {
            deadlines.cancel();
            return Poll::Ready(Outcome::Failed(late.into()));
        }
        if let Some(timer) = &mut patience
            && timer.as_mut().poll(context).is_ready()
        {
            patience = None;
            // If there is nothing better, what there is gets all the time that it needs.
            if let Some(next) = again.as_mut().and_then(|it| it.take()) {
                deadlines.cancel();
                return Poll::Ready(Outcome::GivenUp(next));
            }
        }
        Poll::Pending
    })
    .await
}

impl<'a> Again<'a> {
    fn new(
        retry: &'a Retry,
        (client, kind): (&'a Facts, &Kind<'_>),
        (goal, tried): (&'a Goal, &'a Tried),
        timers: Option<&'a Timers>,
        replay: &Arc<Replay>,
    ) -> Self {
        let now = std::time::Instant::now();
        let (pod, settings) = (&client.pod.retry_budgets, retry.budget);
        let owner = || owner(&client.pod.id.0.namespace, kind);
        let budget = match (kind.parent, kind.egress) {
            (Some(port), _) => Some(port.retries.of(pod, owner(), settings, now)),
            (None, Some(_)) => {
                let all = &client.context.egress_retries;
                Some(pod.of_egress(all, owner(), settings, now))
            }
            (None, None) => None,
        };
        if let Some(budget) = &budget {
            let mut budget = budget.lock().unwrap_or_else(PoisonError::into_inner);
            budget.deposit(now);
        }
        Self {
            retry,
            client,
            goal,
            tried,
            budget,
            count: 0,
            end: None,
            timers,
            replay: Arc::clone(replay),
        }
    }

    /// How long a try is waited for before another one is made, if one may be.
    fn patience(&self) -> Option<Pin<Box<Sleep>>> {
        let time = self.retry.try_timeout.filter(|_| self.has_more())?;
        Some(Box::pin(sleep(time)))
    }

    fn has_more(&self) -> bool {
        self.count < self.retry.limit && self.replay.is_whole()
    }

    /// Takes another try, if there is one, and says when it may begin. One that could only begin when the time is
    /// up is none: the client gets what there is.
    fn take(&mut self) -> Option<Instant> {
        if self.count >= self.retry.limit {
            self.count_event(RetryEvent::LimitExceeded);
            return None;
        }
        let wait = self
            .retry
            .backoff
            .wait(u32::from(self.count), rand::random());
        let now = Instant::now();
        let pause = self.pause(now).unwrap_or(now);
        if pause > now + MOST_PAUSE {
            return None;
        }
        let next = pause.max(now + wait);
        if self.end.is_some_and(|end| end <= next) || !self.replay.is_whole() {
            return None;
        }
        let is_allowed = self.budget.as_ref().is_some_and(|budget| {
            let mut budget = budget.lock().unwrap_or_else(PoisonError::into_inner);
            budget.withdraw(std::time::Instant::now())
        });
        if !is_allowed {
            self.count_event(RetryEvent::Overflow);
            return None;
        }
        if !self.replay.reserve() {
            return None;
        }
        self.count += 1;
        self.count_event(RetryEvent::Request);
        Some(next)
    }

    /// Until when those whom it could be sent to have asked to be left alone, if all of them have.
    fn pause(&self, now: Instant) -> Option<Instant> {
        match self.goal {
            Goal::Address(address) => self.tried.pause(std::iter::once(*address), now),
            Goal::Port(port) => {
                let tries = tries_at(self.client, port);
                self.tried.pause(tries.choosable_now(now.into()), now)
            }
        }
    }

    /// When the request may be sent again after a failure.
    fn after(
        &mut self,
        client: &Facts,
        error: ExchangeError,
        is_grpc: bool,
    ) -> Result<Instant, ExchangeError> {
        let is_for = self.is_for(&error, is_grpc);
        let Some(next) = is_for.then(|| self.take()).flatten() else {
            return Err(error);
        };
        tracing::debug!(pod = %client.pod.id, %error, "a request is sent again");
        Ok(next)
    }

    /// There will be no further try.
    fn settle(&self, is_good: bool) {
        if is_good && self.count > 0 {
            self.count_event(RetryEvent::Success);
        }
    }

    /// Whether a failure is to be tried again: as what it would be answered with, or as all failures of connections.
    fn is_for(&self, error: &ExchangeError, is_grpc: bool) -> bool {
        let may = match error {
            ExchangeError::Server(_) => true,
            ExchangeError::Late(late) => *late == Late::Backend,
            ExchangeError::Flow(error) => matches!(
                error,
                FlowError::Connect { .. }
                    | FlowError::ConnectTimeout { .. }
                    | FlowError::Tunnel(_)
                    | FlowError::RefusedByPeer { .. }
            ),
            _ => false,
        };
        let status = error.status();
        let code = error.grpc_code();
        let is_listed = match is_grpc {
            true => self.retry.is_for_code(code),
            false => self.retry.is_for_status(status.as_u16()),
        };
        // A denial is final, whoever says it.
        may && status != StatusCode::FORBIDDEN && (self.retry.on_failure || is_listed)
    }

    /// Whether a response is no answer yet; and the first part of its body, if that had to be looked at.
    async fn look_at(
        &self,
        sent: &mut Sent,
        is_grpc: bool,
    ) -> Result<(Option<Frame<Bytes>>, bool), ExchangeError> {
        let status = sent.response.status();
        let is_of_mesh = sent.response.headers().contains_key(ERROR);
        let is_refusal = matches!(
            status,
            StatusCode::FORBIDDEN | StatusCode::TOO_MANY_REQUESTS
        );
        if is_of_mesh && is_refusal || is_of_policy(sent.response.headers()) {
            // Policy's word is final.
            return Ok((None, false));
        }
        // A failure of the connection on the server's node is told by its agent.
        let is_failure = self.retry.on_failure
            && matches!(
                status,
                StatusCode::BAD_GATEWAY | StatusCode::GATEWAY_TIMEOUT
            )
            && is_of_mesh;
        if is_failure || self.retry.is_for_status(status.as_u16()) {
            return Ok((None, true));
        }
        if !is_grpc || self.retry.grpc.is_empty() || status != StatusCode::OK {
            return Ok((None, false));
        }
        let is_for = |code: Option<u32>| code.is_some_and(|it| self.retry.is_for_code(it));
        if sent.response.headers().contains_key(GRPC_STATUS) {
            let is = is_for(grpc_code(sent.response.headers()));
            return Ok((None, is));
        }
        if !self.has_more() {
            return Ok((None, false));
        }
        let first = peek(sent).await?;
        let trailers = first.as_ref().and_then(Frame::trailers_ref);
        let is = is_for(trailers.and_then(grpc_code));
        Ok((first, is))
    }

    fn count_event(&self, event: RetryEvent) {
        if let Some(timers) = self.timers {
            timers.retry(event);
        }
    }
}

/// Whose budget a request's retries are taken from.
fn owner(client: &Name, kind: &Kind<'_>) -> BudgetOwner {
    if let Some(matched) = kind.matched {
        let (route, rule) = (matched.route.clone(), matched.rule_index);
        return match kind.egress {
            Some(egress) => BudgetOwner::Egress(egress.network.name().clone(), route, rule),
            None => BudgetOwner::Rule(route, rule),
        };
    }
    let own = kind.parent.map(|it| &it.service.namespace);
    let profile = kind.table.and_then(|it| it.profile(client));
    match profile.filter(|it| Some(&it.namespace) != own) {
        Some(profile) => BudgetOwner::ClientsIn(profile.namespace.clone()),
        None => BudgetOwner::Port,
    }
}

/// The first part of a response's body, if it comes soon: a server that has failed says so at once, and the head
/// of one that has not must not wait.
async fn peek(sent: &mut Sent) -> Result<Option<Frame<Bytes>>, ExchangeError> {
    let (upstream, response) = (&mut sent.upstream, &mut sent.response);
    if response.body().is_end_stream() {
        return Ok(None);
    }
    let first = poll_fn(|context| {
        if let Upstream::Http1(connection) = upstream {
            connection.poll(context);
        }
        Pin::new(response.body_mut()).poll_frame(context)
    });
    match tokio::time::timeout(MOST_PEEK, first).await {
        Ok(Some(Ok(frame))) => Ok(Some(check_rest(frame))),
        Ok(Some(Err(error))) => Err(ExchangeError::of_sent(error, &sent.upload)),
        Ok(None) | Err(_) => Ok(None),
    }
}

/// Reads the rest of a response that nobody gets, if it is short, so that its connection can be used again.
fn let_go(client: &Arc<Facts>, sent: Sent, first: Option<Frame<Bytes>>) {
    drop(sent.upload);
    let (parts, incoming) = sent.response.into_parts();
    let mut ending = Ending::measured(Some(sent.timers), &parts);
    ending.hold(sent.in_flight, &parts);
    let used = match sent.upstream {
        Upstream::Http1(connection) => Some(Used {
            connection,
            home: home(client),
        }),
        Upstream::Http2 { stream, .. } => {
            ending._stream = Some(stream);
            None
        }
    };
    let held = first.map(|first| {
        Box::new(Held {
            deadlines: None,
            first: Some(first),
            is_told: false,
        })
    });
    let mut body = ResponseBody::of_held(incoming, used, ending, held);
    if body.is_end_stream() {
        return;
    }
    client.pod.spawn_flow(async move {
        let rest = async {
            let mut bytes = 0;
            while let Some(Ok(frame)) = body.frame().await {
                bytes += frame.data_ref().map_or(0, |it| it.bytes().len());
                if bytes > MOST_READ_BYTES {
                    break;
                }
            }
        };
        let _ = tokio::time::timeout(MOST_READ_TIME, rest).await;
    });
}

/// How long the first part of a body is waited for.
const MOST_PEEK: Duration = Duration::from_millis(50);
const MOST_READ_BYTES: usize = 64 * 1024;
const MOST_READ_TIME: Duration = Duration::from_secs(1);
