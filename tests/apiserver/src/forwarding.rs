//! `portforward` of pods, as clients speak it over WebSockets (`v4.channel.k8s.io`): of each port two channels, one for
//! bytes and one for what went wrong, which begin with the port's number. A pod's loopback is the server's own.

use std::sync::Arc;

use bytes::Bytes;
use futures::{SinkExt, StreamExt};
use http::header::{
    CONNECTION, HeaderMap, HeaderValue, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY,
    SEC_WEBSOCKET_PROTOCOL, UPGRADE,
};
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::Role;

use crate::Shared;
use crate::answer::{Body, Failure, Query};

const PROTOCOL: &str = "v4.channel.k8s.io";
const DATA: u8 = 0;
const ERROR: u8 = 1;

/// The namespace and the pod whose port a path asks for.
pub(crate) fn asked_at(path: &str) -> Option<[&str; 2]> {
    let below = path.strip_prefix("/api/v1/namespaces/")?;
    let (namespace, rest) = below.split_once('/')?;
    let (pod, rest) = rest.strip_prefix("pods/")?.split_once('/')?;
    (rest == "portforward").then_some([namespace, pod])
}

/// Begins to forward.
pub(crate) fn answer(
    shared: &Arc<Shared>,
    [namespace, name]: [&str; 2],
    query: &Query,
    mut request: Request<Incoming>,
) -> Result<Response<Body>, Failure> {
    let bad = |message: &str| (StatusCode::BAD_REQUEST, "BadRequest", message.to_owned());
    let pod = shared.store.object("Pod", namespace, name);
    let pod = pod.ok_or_else(|| {
        let message = format!("pods {name:?} not found");
        (StatusCode::NOT_FOUND, "NotFound", message)
    })?;
    if pod["status"]["phase"] != "Running" {
        let phase = &pod["status"]["phase"];
        return Err(bad(&format!(
            "unable to forward port because pod is not running. Current status={phase}"
        )));
    }
    let port = query.get("ports").and_then(|it| it.parse().ok());
    let port = port.ok_or_else(|| bad("this server forwards to one port at a time"))?;
    let key = accepted(request.headers()).ok_or_else(|| bad("this is no WebSocket request"))?;
    let broken = shared.connections();
    let upgrade = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        let forwarding = async {
            let Ok(stream) = upgrade.await else { return };
            let stream = TokioIo::new(stream);
            let stream = WebSocketStream::from_raw_socket(stream, Role::Server, None).await;
            // Whoever is served sees what fails.
            let _ = forward(stream, port).await;
        };
        tokio::select! { () = broken.cancelled() => {}, () = forwarding => {} }
    });
    let empty = Empty::new().map_err(|never| match never {});
    let mut response = Response::new(empty.boxed_unsync());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert(SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(PROTOCOL));
    headers.insert(SEC_WEBSOCKET_ACCEPT, key);
    Ok(response)
}

/// What a request for a WebSocket of this protocol is accepted with.
fn accepted(headers: &HeaderMap) -> Option<HeaderValue> {
    let text = |name| headers.get(name).and_then(|it| it.to_str().ok());
    let upgrade = text(UPGRADE)?.eq_ignore_ascii_case("websocket");
    let mut protocols = text(SEC_WEBSOCKET_PROTOCOL)?.split(',');
    let is_known = protocols.any(|it| it.trim() == PROTOCOL);
    let key = derive_accept_key(headers.get(SEC_WEBSOCKET_KEY)?.as_bytes());
    HeaderValue::try_from(key)
        .ok()
        .filter(|_| upgrade && is_known)
}

type Ended = Result<(), Box<dyn std::error::Error + Send + Sync>>;

async fn forward<S>(mut client: WebSocketStream<S>, port: u16) -> Ended
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    for channel in [DATA, ERROR] {
        client.send(of(channel, &port.to_le_bytes())).await?;
    }
    let mut pod = match TcpStream::connect(("127.0.0.1", port)).await {
        Ok(pod) => pod,
        Err(error) => {
            let message = format!("error forwarding port {port} to pod: {error}");
            client.send(of(ERROR, message.as_bytes())).await?;
            return Ok(client.close(None).await?);
        }
    };
    let mut buffer = vec![0; 16 * 1024];
    loop {
        tokio::select! {
            read = pod.read(&mut buffer) => match read? {
                0 => return Ok(client.close(None).await?),
                read => client.send(of(DATA, &buffer[..read])).await?,
            },
            message = client.next() => match message {
                Some(Ok(Message::Binary(bytes))) if bytes.first() == Some(&DATA) => {
                    pod.write_all(&bytes[1..]).await?;
                }
                Some(Ok(Message::Close(_)) | Err(_)) | None => return Ok(()),
                Some(Ok(_)) => {}
            },
        }
    }
}

/// A message of a channel.
fn of(channel: u8, bytes: &[u8]) -> Message {
    let message = [&[channel], bytes].concat();
    Message::Binary(Bytes::from(message))
}
