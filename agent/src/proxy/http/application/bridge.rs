//! Speaks with an application of the other version: to who connects it is a server of theirs, to the
//! application a client of its own. Both sides are whole: each message is read to its frames and
//! written anew, so that what is no good in one version never becomes something else in the other.
//!
//! It is for one connection of a client's side. To an application of HTTP/1 it keeps connections of its own, one
//! for each exchange that is open; to one of HTTP/2 one.
//!
//! Two things have no form in the other version, and are answered here: calls of gRPC in HTTP/1, and what makes
//! something else of a connection of HTTP/1.

use std::convert::Infallible;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::header::UPGRADE;
use http::{HeaderValue, Method};
use http_body_util::{Either, Empty};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::client::conn::{http1 as client1, http2 as client2};
use hyper::server::conn::{http1 as server1, http2 as server2};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::DuplexStream;
use tokio_util::sync::CancellationToken;

use super::translate::{request_to_http1, request_to_http2, response_to_http1, response_to_http2};
use super::{Origin, Version};
use crate::node::LocalPod;
use crate::proxy::error::FlowError;
use crate::proxy::http::answer;
use crate::proxy::http::answerer::Answerer;
use crate::proxy::http::head::{self, BadHead};
use crate::proxy::http::serve::{
    MOST_HEAD_BYTES, MOST_HEADERS, MOST_RELAYED_HEADERS, SEND_BUFFER_BYTES, Tasks,
};
use crate::proxy::http::stream::Stream;
use crate::proxy::tcp::FlowSocket;
use crate::proxy::usage::{Party, Window};

/// Serves what comes from `far`, which speaks `version`, until that ends. `first` is a connection to the
/// application that may be used.
pub(super) fn start(
    origin: &Arc<Origin>,
    version: Version,
    far: DuplexStream,
    first: Option<Arc<FlowSocket>>,
) {
    let pod = Arc::clone(&origin.pod);
    let bridge = Arc::new(Bridge {
        origin: Arc::clone(origin),
        first: Mutex::new(first),
        http1: Mutex::default(),
        http2: tokio::sync::Mutex::default(),
        over: CancellationToken::new(),
    });
    let over = bridge.over.clone();
    let served = Arc::clone(&pod);
    pod.spawn_flow(async move {
        let io = TokioIo::new(far);
        let service = service_fn(move |request| {
            let bridge = Arc::clone(&bridge);
            async move { Ok::<_, Infallible>(bridge.exchange(request, version).await) }
        });
        let ended = match version {
            Version::Http1 => {
                let mut connection = pin!(http1().serve_connection(io, service));
                tokio::select! {
                    ended = &mut connection => ended,
                    () = over.cancelled() => {
                        connection.as_mut().graceful_shutdown();
                        connection.await
                    }
                }
            }
            Version::Http2 => {
                let window = Party::of_pod(&served.usage).window();
                let mut connection = pin!(http2(served, &window).serve_connection(io, service));
                tokio::select! {
                    ended = &mut connection => ended,
                    () = over.cancelled() => {
                        connection.as_mut().graceful_shutdown();
                        connection.await
                    }
                }
            }
        };
        if let Err(error) = ended {
            tracing::debug!(%error, "a connection that is translated ended");
        }
    });
}

struct Bridge {
    origin: Arc<Origin>,
    first: Mutex<Option<Arc<FlowSocket>>>,
    /// Those to an application of HTTP/1 that wait for the next exchange.
    http1: Mutex<Vec<client1::SendRequest<Sent>>>,
    /// The one to an application of HTTP/2.
    http2: tokio::sync::Mutex<Option<client2::SendRequest<Sent>>>,
    /// What it was made for may be so no more: whoever is at this end shall connect anew.
    over: CancellationToken,
}

/// A request's body.
type Sent = Either<Incoming, Empty<Bytes>>;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("{0}")]
    Head(#[from] BadHead),
    #[error("{0}")]
    Flow(#[from] FlowError),
    #[error("the application's connection failed: {0}")]
    Server(#[from] hyper::Error),
    #[error("the application speaks HTTP/1 only")]
    OnlyHttp1,
    #[error("the application speaks HTTP/2 only")]
    OnlyHttp2,
}

impl Bridge {
    async fn exchange(
        self: Arc<Self>,
        request: Request<Incoming>,
        version: Version,
    ) -> Response<Passed> {
        let is_grpc = head::is_grpc(request.headers());
        let answered = match version {
            Version::Http1 => self.through_http2(request).await,
            Version::Http2 if is_grpc => {
                // Where that was a mistake, the next call shall not meet it.
                self.doubt();
                Err(Failure::OnlyHttp1)
            }
            Version::Http2 => self.through_http1(request).await,
        };
        answered.unwrap_or_else(|failure| {
            tracing::debug!(to = %self.origin.to, error = %failure, "an exchange failed");
            failure.answer(is_grpc)
        })
    }

    /// Sends a request of HTTP/2 to an application of HTTP/1.
    async fn through_http1(
        self: &Arc<Self>,
        request: Request<Incoming>,
    ) -> Result<Response<Passed>, Failure> {
        let (mut parts, body) = request.into_parts();
        request_to_http1(&mut parts, !body.is_end_stream())?;
        let mut request = Request::from_parts(parts, sent(body));
        loop {
            let (mut sender, was_used) = self.http1().await?;
            let again = (was_used && head::may_repeat(&request))
                .then(|| head::copy_of(&request, Either::Right(Empty::new())));
            let mut error = match sender.try_send_request(request).await {
                Ok(response) => {
                    if !was_used {
                        self.remember(Version::Http1);
                    }
                    let (mut parts, incoming) = response.into_parts();
                    response_to_http2(&mut parts)?;
                    Answerer::Application.check(&mut parts.headers);
                    let kept = Some((Arc::clone(self), sender));
                    return Ok(Response::from_parts(parts, Passed::new(incoming, kept)));
                }
                Err(error) => error,
            };
            match error.take_message().or(again) {
                Some(back) if was_used => request = back,
                _ => {
                    self.doubt();
                    return Err(error.into_error().into());
                }
            }
        }
    }

    /// Sends a request of HTTP/1 to an application of HTTP/2.
    async fn through_http2(
        self: &Arc<Self>,
        request: Request<Incoming>,
    ) -> Result<Response<Passed>, Failure> {
        let (mut parts, body) = request.into_parts();
        if parts.method == Method::CONNECT || parts.headers.contains_key(UPGRADE) {
            return Err(Failure::OnlyHttp2);
        }
        request_to_http2(&mut parts, self.origin.to)?;
        let mut request = Request::from_parts(parts, sent(body));
        loop {
            let (mut sender, was_used) = self.http2().await?;
            let mut error = match sender.try_send_request(request).await {
                Ok(response) => {
                    if !was_used {
                        self.remember(Version::Http2);
                    }
                    let (mut parts, incoming) = response.into_parts();
                    response_to_http1(&mut parts);
                    Answerer::Application.check(&mut parts.headers);
                    return Ok(Response::from_parts(parts, Passed::new(incoming, None)));
                }
                Err(error) => error,
            };
            match error.take_message() {
                Some(back) if was_used => request = back,
                _ => {
                    self.doubt();
                    return Err(error.into_error().into());
                }
            }
        }
    }

    /// A connection of HTTP/1, and whether it has served before.
    async fn http1(&self) -> Result<(client1::SendRequest<Sent>, bool), Failure> {
        {
            let mut kept = self.kept();
            kept.retain(|it| !it.is_closed());
            let free = kept.iter().position(client1::SendRequest::is_ready);
            if let Some(free) = free {
                return Ok((kept.swap_remove(free), true));
            }
        }
        let io = TokioIo::new(self.server().await?);
        let (sender, connection) = client1::Builder::new()
            .max_buf_size(MOST_HEAD_BYTES)
            .max_header_size(MOST_HEAD_BYTES)
            .max_headers(MOST_HEADERS)
            .handshake(io)
            .await?;
        self.origin.pod.spawn_flow(async move {
            let _ = connection.await;
        });
        Ok((sender, false))
    }

    /// The connection of HTTP/2, and whether it was there before.
    async fn http2(&self) -> Result<(client2::SendRequest<Sent>, bool), Failure> {
        let mut kept = self.http2.lock().await;
        if let Some(kept) = kept.as_ref().filter(|it| !it.is_closed()) {
            return Ok((kept.clone(), true));
        }
        let io = TokioIo::new(self.server().await?.acknowledging());
        let tasks = Tasks(Arc::clone(&self.origin.pod));
        let window = Party::of_pod(&self.origin.pod.usage).window();
        let (sender, connection) = client2::Builder::new(tasks)
            .timer(TokioTimer::new())
            .initial_stream_window_size(window.stream_bytes)
            .initial_connection_window_size(window.connection_bytes)
            .max_send_buf_size(SEND_BUFFER_BYTES)
            .max_header_list_size(MOST_HEAD_BYTES as u32)
            .handshake(io)
            .await?;
        self.origin.pod.spawn_flow(async move {
            let _ = connection.await;
            drop(window);
        });
        *kept = Some(sender.clone());
        Ok((sender, false))
    }

    /// It has answered in this version, and was not of the other one before.
    fn remember(&self, version: Version) {
        let (spoken, key) = (&self.origin.proxy.spoken, self.origin.key());
        spoken.remember(key, version, true);
        spoken.remember(key, version.other(), false);
    }

    /// The application may speak something else by now.
    fn doubt(&self) {
        self.origin.proxy.spoken.forget(self.origin.key());
        self.over.cancel();
    }

    async fn server(&self) -> Result<Stream, FlowError> {
        let first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        let first = { first }.take();
        if let Some(first) = first.and_then(Arc::into_inner) {
            return Ok(Stream::socket(first));
        }
        self.origin.connect().await.map(Stream::socket)
    }

    fn kept(&self) -> MutexGuard<'_, Vec<client1::SendRequest<Sent>>> {
        self.http1.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn sent(body: Incoming) -> Sent {
    if body.is_end_stream() {
        Either::Right(Empty::new())
    } else {
        Either::Left(body)
    }
}

impl Failure {
    fn reason(&self) -> &'static str {
        match self {
            Self::Head(BadHead::ResponseCoding | BadHead::Switched) => "server_failed",
            Self::Head(_) => answer::BAD_REQUEST,
            Self::Server(error) if error.is_user() => answer::BAD_REQUEST,
            Self::Server(_) => "server_failed",
            Self::Flow(error) => error.refusal().map_or("reset", |it| it.as_str()),
            Self::OnlyHttp1 => answer::ONLY_HTTP1,
            Self::OnlyHttp2 => answer::ONLY_HTTP2,
        }
    }

    fn answer(&self, is_grpc: bool) -> Response<Passed> {
        let reason = self.reason();
        let mut response = Response::new(Passed::nothing());
        let headers = response.headers_mut();
        headers.insert(answer::ERROR, HeaderValue::from_static(reason));
        if is_grpc {
            answer::say_grpc(headers, answer::GRPC_UNAVAILABLE, reason);
        } else {
            *response.status_mut() = match reason {
                answer::BAD_REQUEST => StatusCode::BAD_REQUEST,
                _ => StatusCode::BAD_GATEWAY,
            };
        }
        response
    }
}

/// What an application answers; its connection of HTTP/1 is free when it has ended.
struct Passed {
    incoming: Option<Incoming>,
    kept: Option<(Arc<Bridge>, client1::SendRequest<Sent>)>,
}

impl Passed {
    fn nothing() -> Self {
        Self {
            incoming: None,
            kept: None,
        }
    }

    fn new(incoming: Incoming, kept: Option<(Arc<Bridge>, client1::SendRequest<Sent>)>) -> Self {
        Self {
            incoming: Some(incoming),
            kept,
        }
    }

    fn give_back(&mut self) {
        if let Some((bridge, sender)) = self.kept.take() {
            let mut kept = bridge.kept();
            if kept.len() < MOST_KEPT {
                kept.push(sender);
            }
        }
    }
}

impl Body for Passed {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let Some(incoming) = &mut self.incoming else {
            return Poll::Ready(None);
        };
        let frame = ready!(Pin::new(incoming).poll_frame(context));
        if frame.is_none() {
            self.give_back();
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.incoming.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        let nothing = || SizeHint::with_exact(0);
        self.incoming.as_ref().map_or_else(nothing, Body::size_hint)
    }
}

impl Drop for Passed {
    fn drop(&mut self) {
        // Nobody asks for the end of what has a length.
        if self.is_end_stream() {
            self.give_back();
        }
    }
}

/// Connections of HTTP/1 that wait for the next request, of a client's connection.
const MOST_KEPT: usize = 8;

fn http1() -> server1::Builder {
    let mut builder = server1::Builder::new();
    builder
        .half_close(true)
        .auto_date_header(false)
        .header_read_timeout(None)
        .max_headers(MOST_RELAYED_HEADERS)
        .max_header_size(MOST_HEAD_BYTES)
        .max_buf_size(MOST_HEAD_BYTES);
    builder
}

fn http2(pod: Arc<LocalPod>, window: &Window) -> server2::Builder<Tasks> {
    let mut builder = server2::Builder::new(Tasks(pod));
    builder
        .auto_date_header(false)
        .timer(TokioTimer::new())
        .initial_stream_window_size(window.stream_bytes)
        .initial_connection_window_size(window.connection_bytes)
        .max_send_buf_size(SEND_BUFFER_BYTES)
        .max_concurrent_streams(MOST_STREAMS)
        .max_header_list_size(MOST_HEAD_BYTES as u32);
    builder
}

/// As many as a client's side opens; each takes a connection of HTTP/1.
const MOST_STREAMS: u32 = 128;
