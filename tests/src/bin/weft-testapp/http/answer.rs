//! What the server answers to each path.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderName, HeaderValue, TRAILER};
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Body, Frame, Incoming};
use serde_json::{Value, json};
use socket2::SockRef;

use super::SERVED_BY;
use crate::emit;
use crate::pattern::Pattern;

/// How requests are answered, until it is told otherwise.
pub(super) struct Answering {
    name: String,
    headers: Vec<(HeaderName, HeaderValue)>,
    quiet: bool,
    delay_ms: AtomicU64,
    status: AtomicU16,
    /// How many answers are still to be so.
    times: AtomicU64,
}

/// A connection that requests come by.
pub(super) struct Connection {
    peer: SocketAddr,
    local: Option<SocketAddr>,
    number: u64,
    /// A second descriptor of the socket, for as long as it may have to be reset.
    socket: Mutex<Option<OwnedFd>>,
}

/// Why a connection or a body breaks off.
type Broken = std::io::Error;
type AnyBody = UnsyncBoxBody<Bytes, Broken>;

impl Connection {
    pub(super) fn new(stream: &tokio::net::TcpStream, peer: SocketAddr, number: u64) -> Connection {
        Connection {
            peer: stream.peer_addr().unwrap_or(peer),
            local: stream.local_addr().ok(),
            number,
            socket: Mutex::new(stream.as_fd().try_clone_to_owned().ok()),
        }
    }

    /// Lets the end of the connection be a reset.
    fn reset_at_end(&self) {
        let socket = self.socket.lock().ok().and_then(|mut it| it.take());
        if let Some(socket) = socket {
            let _ = SockRef::from(&socket).set_linger(Some(Duration::ZERO));
        }
    }
}

impl Answering {
    pub(super) fn new(
        name: String,
        headers: Vec<(HeaderName, HeaderValue)>,
        delay_ms: u64,
        quiet: bool,
    ) -> Answering {
        Answering {
            name,
            headers,
            quiet,
            delay_ms: delay_ms.into(),
            status: 200.into(),
            times: u64::MAX.into(),
        }
    }

    pub(super) async fn answer(
        &self,
        request: Request<Incoming>,
        connection: &Connection,
    ) -> Result<Response<AnyBody>, Broken> {
        let seen = self.seen(&request, connection);
        if !self.quiet {
            let mut event = seen.clone();
            event["event"] = "request".into();
            emit(&event);
        }
        let path = request.uri().path().to_owned();
        let query = request.uri().query().unwrap_or_default().to_owned();
        let number = |name: &str, default: u64| parameter(&query, name).unwrap_or(default);
        let words: Vec<&str> = path.trim_matches('/').split('/').collect();
        let second = |default: u64| {
            words
                .get(1)
                .and_then(|it| it.parse().ok())
                .unwrap_or(default)
        };
        let mut response = match words.first().copied().unwrap_or_default() {
            "status" => {
                let status = u16::try_from(second(200)).unwrap_or(500);
                let mut response = self.say(request, seen).await?;
                *response.status_mut() = StatusCode::from_u16(status).map_err(Broken::other)?;
                response
            }
            "delay" => {
                pause(second(0)).await;
                self.say(request, seen).await?
            }
            "bytes" => bytes(second(0)),
            "echo" => echo(request),
            "stream" => stream(
                number("chunks", 3),
                number("interval", 100),
                number("bytes", 0),
            ),
            "trailers" => trailers(request).await?,
            "reset" => {
                connection.reset_at_end();
                return Err(Broken::other("a reset was asked for"));
            }
            "sink" => {
                pause(number("delay", 0)).await;
                self.say(request, seen).await?
            }
            "configure" => {
                self.delay_ms
                    .store(number("delay_ms", 0), Ordering::Relaxed);
                let status = u16::try_from(number("status", 200)).unwrap_or(500);
                self.status.store(status, Ordering::Relaxed);
                self.times
                    .store(number("times", u64::MAX), Ordering::Relaxed);
                self.say(request, seen).await?
            }
            _ => {
                let (delay_ms, status) = self.configured();
                pause(delay_ms).await;
                let mut response = self.say(request, seen).await?;
                *response.status_mut() = StatusCode::from_u16(status).map_err(Broken::other)?;
                response
            }
        };
        let name = HeaderValue::from_str(&self.name).map_err(Broken::other)?;
        response.headers_mut().insert(SERVED_BY, name);
        response.headers_mut().extend(self.headers.iter().cloned());
        Ok(response)
    }

    /// How this answer is to be.
    fn configured(&self) -> (u64, u16) {
        let left = self
            .times
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |it| match it {
                u64::MAX => Some(u64::MAX),
                left => left.checked_sub(1),
            });
        match left {
            Ok(_) => (
                self.delay_ms.load(Ordering::Relaxed),
                self.status.load(Ordering::Relaxed),
            ),
            Err(_) => (0, 200),
        }
    }

    fn seen(&self, request: &Request<Incoming>, connection: &Connection) -> Value {
        json!({
            "name": self.name,
            "method": request.method().as_str(),
            "path": request.uri().to_string(),
            "version": format!("{:?}", request.version()),
            "headers": headers(request.headers()),
            "peer": connection.peer.to_string(),
            "local": connection.local.map(|it| it.to_string()),
            "connection": connection.number,
        })
    }

    /// The usual answer: what was seen, once the body is there.
    async fn say(
        &self,
        request: Request<Incoming>,
        seen: Value,
    ) -> Result<Response<AnyBody>, Broken> {
        let mut seen = seen;
        let (length, intact, trailers) = read_all(request.into_body()).await?;
        seen["body_bytes"] = length.into();
        seen["body_is_pattern"] = intact.into();
        seen["trailers"] = headers(&trailers);
        let mut response = Response::new(full(format!("{seen}\n")));
        let kind = HeaderValue::from_static("application/json");
        response.headers_mut().insert(CONTENT_TYPE, kind);
        Ok(response)
    }
}

/// How long a body is, whether it is the pattern, and its trailers.
async fn read_all(mut body: Incoming) -> Result<(u64, bool, HeaderMap), Broken> {
    let pattern = Pattern::new();
    let (mut length, mut intact, mut trailers) = (0_u64, true, HeaderMap::new());
    while let Some(frame) = body.frame().await {
        match frame.map_err(Broken::other)?.into_data() {
            Ok(data) => {
                intact &= pattern.matches(length, &data);
                length += data.len() as u64;
            }
            Err(frame) => trailers.extend(frame.into_trailers().unwrap_or_default()),
        }
    }
    Ok((length, intact, trailers))
}

/// So many bytes of the pattern, with their length announced.
fn bytes(length: u64) -> Response<AnyBody> {
    let frames =
        futures::stream::unfold((Pattern::new(), 0_u64), move |(pattern, at)| async move {
            let rest = usize::try_from(length - at).unwrap_or(usize::MAX);
            let piece = Bytes::copy_from_slice(pattern.at(at, rest.min(PIECE)));
            let next = at + piece.len() as u64;
            (at < length).then(|| (Ok(Frame::data(piece)), (pattern, next)))
        });
    let body = StreamBody::new(frames).boxed_unsync();
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(http::header::CONTENT_LENGTH, length.into());
    response
}

/// The request's body, as it comes, and its trailers.
fn echo(request: Request<Incoming>) -> Response<AnyBody> {
    let kind = request.headers().get(CONTENT_TYPE).cloned();
    let length = request.body().size_hint().exact();
    let mut response = Response::new(request.into_body().map_err(Broken::other).boxed_unsync());
    let headers = response.headers_mut();
    if let Some(kind) = kind {
        headers.insert(CONTENT_TYPE, kind);
    }
    if let Some(length) = length {
        headers.insert(http::header::CONTENT_LENGTH, length.into());
    }
    response
}

/// Chunks with pauses between.
fn stream(chunks: u64, interval_ms: u64, bytes: u64) -> Response<AnyBody> {
    let frames = futures::stream::unfold(0, move |number| async move {
        if number == chunks {
            return None;
        }
        if number > 0 {
            pause(interval_ms).await;
        }
        let mut text = format!("chunk {number}\n").into_bytes();
        text.resize(text.len().max(usize::try_from(bytes).unwrap_or(0)), b'.');
        Some((Ok(Frame::data(text.into())), number + 1))
    });
    Response::new(StreamBody::new(frames).boxed_unsync())
}

/// An answer with a trailer that says how long the request's body was.
async fn trailers(request: Request<Incoming>) -> Result<Response<AnyBody>, Broken> {
    let (length, _, _) = read_all(request.into_body()).await?;
    let mut trailers = HeaderMap::new();
    trailers.insert("x-body-bytes", length.into());
    let frames = [
        Frame::data(Bytes::from_static(b"with trailers\n")),
        Frame::trailers(trailers),
    ];
    let frames = futures::stream::iter(frames.map(Ok));
    let mut response = Response::new(StreamBody::new(frames).boxed_unsync());
    let names = HeaderValue::from_static("x-body-bytes");
    response.headers_mut().insert(TRAILER, names);
    Ok(response)
}

fn full(text: String) -> AnyBody {
    Full::new(Bytes::from(text))
        .map_err(|never: Infallible| match never {})
        .boxed_unsync()
}

fn headers(map: &HeaderMap) -> Value {
    map.iter()
        .map(|(name, value)| json!([name.as_str(), String::from_utf8_lossy(value.as_bytes())]))
        .collect()
}

/// A number of the query.
fn parameter(query: &str, name: &str) -> Option<u64> {
    let pairs = query.split('&').filter_map(|pair| pair.split_once('='));
    let mut values = pairs.filter(|(key, _)| *key == name);
    values.next().and_then(|(_, value)| value.parse().ok())
}

async fn pause(ms: u64) {
    if ms > 0 {
        tokio::time::sleep(Duration::from_millis(ms)).await;
    }
}

const PIECE: usize = 64 * 1024;
