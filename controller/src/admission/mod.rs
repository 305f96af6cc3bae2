//! What is wrong with an object, said before it is stored: the webhook that an API server asks (Kubernetes, "Dynamic
//! Admission Control", `admission.k8s.io/v1`). It reads objects as the [index](crate::index) does, so that what is let
//! through can be used. What an object refers to may come later and is no reason; neither is what is not the mesh's.
//!
//! Whoever reaches the port may ask: nothing is told but what is wrong with what was sent, nothing is changed, and all of
//! it is bounded.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Body, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use crate::authority::Authority;
use crate::control::tls::Serving;
use crate::index::Settings;
use crate::telemetry::Metrics;
pub use bundle::CaBundle;
pub use review::{Answer, answer};

mod bundle;
mod review;

/// The webhook.
#[derive(Debug)]
pub struct Webhook {
    /// Its certificate.
    pub serving: Arc<Serving>,
    /// How objects are read.
    pub settings: Settings,
    /// Counts.
    pub metrics: Arc<Metrics>,
}

/// Where reviews are sent to.
const PATH: &str = "/validate";
/// Two versions of an object, each as large as etcd takes it (1.5 MiB), and what is said of them.
const MOST_BYTES: usize = 4 * 1024 * 1024;
const TOO_LARGE: &str = "more than 4 MiB\n";
/// A request has to arrive within this time, its head and its body each.
const ARRIVAL_TIMEOUT: Duration = Duration::from_secs(5);
/// A handshake may take this long.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(3);
/// A connection may last for this long. API servers keep theirs open, and open others.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(600);
/// Connections at the same time. Each may hold a request's bytes.
const MOST_CONNECTIONS: usize = 64;
/// Objects that are looked at at the same time.
const MOST_LOOKS: usize = 2;

impl Webhook {
    /// Serves until it is stopped, with a certificate of the authority's for this name. While there is no issuer, nobody
    /// can connect.
    pub async fn run(
        self,
        listener: TcpListener,
        authority: Arc<Authority>,
        name: String,
        stop: CancellationToken,
    ) {
        let serving = self.serving.clone();
        let renewing = serving.keep(&authority, &name, SystemTime::now());
        tokio::select! {
            () = renewing => {}
            outcome = self.serve(listener, stop) => if let Err(error) = outcome {
                tracing::error!(%error, "the webhook cannot be served");
            }
        }
    }

    async fn serve(self, listener: TcpListener, stop: CancellationToken) -> anyhow::Result<()> {
        let mut config = rustls::ServerConfig::clone(&*self.serving.config()?);
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let webhook = Arc::new(self);
        let connections = Arc::new(Semaphore::new(MOST_CONNECTIONS));
        let looks = Arc::new(Semaphore::new(MOST_LOOKS));
        loop {
            let accepted = tokio::select! {
                () = stop.cancelled() => return Ok(()),
                accepted = listener.accept() => accepted,
            };
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept on the webhook's port");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            // Who finds no room is closed: whether that refuses the object is the configuration's to say.
            let Ok(room) = connections.clone().try_acquire_owned() else {
                webhook.metrics.reviewed("busy");
                continue;
            };
            let (acceptor, webhook) = (acceptor.clone(), webhook.clone());
            let (looks, stop) = (looks.clone(), stop.clone());
            tokio::spawn(async move {
                let serving = webhook.connection(acceptor, stream, looks);
                let serving = timeout(CONNECTION_TIMEOUT, serving);
                tokio::select! { () = stop.cancelled() => {}, _ = serving => {} }
                drop(room);
            });
        }
    }

    async fn connection(&self, acceptor: TlsAcceptor, stream: TcpStream, looks: Arc<Semaphore>) {
        let Ok(Ok(stream)) = timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)).await else {
            return;
        };
        let answer = service_fn(|request| {
            let looks = looks.clone();
            async move { Ok::<_, Infallible>(self.answer(request, looks).await) }
        });
        let serving = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(ARRIVAL_TIMEOUT)
            .serve_connection(TokioIo::new(stream), answer)
            .await;
        if let Err(error) = serving {
            tracing::debug!(%error, "a connection to the webhook failed");
        }
    }

    async fn answer(
        &self,
        request: Request<Incoming>,
        looks: Arc<Semaphore>,
    ) -> Response<Full<Bytes>> {
        if request.uri().path() != PATH {
            return text(StatusCode::NOT_FOUND, "POST /validate\n");
        }
        if request.method() != Method::POST {
            return text(StatusCode::METHOD_NOT_ALLOWED, "only POST\n");
        }
        if request.body().size_hint().lower() > MOST_BYTES as u64 {
            return text(StatusCode::PAYLOAD_TOO_LARGE, TOO_LARGE);
        }
        let body = Limited::new(request.into_body(), MOST_BYTES).collect();
        let body = match timeout(ARRIVAL_TIMEOUT, body).await {
            Ok(Ok(body)) => body.to_bytes(),
            Ok(Err(_)) => return text(StatusCode::PAYLOAD_TOO_LARGE, TOO_LARGE),
            Err(_) => return text(StatusCode::REQUEST_TIMEOUT, "it did not arrive in time\n"),
        };
        // Never closed. It is the look's own: one whose asker has gone away is made all the same.
        let turn = looks.acquire_owned().await;
        let settings = self.settings.clone();
        let look = move || {
            let _turn = turn;
            answer(&body, &settings)
        };
        let looked = tokio::task::spawn_blocking(look).await;
        match looked {
            Ok(Ok(answer)) => {
                self.metrics.reviewed(answer.result());
                let mut response = Response::new(Full::from(answer.to_json()));
                let kind = HeaderValue::from_static("application/json");
                response.headers_mut().insert(CONTENT_TYPE, kind);
                response
            }
            Ok(Err(reason)) => {
                self.metrics.reviewed("malformed");
                text(StatusCode::BAD_REQUEST, reason)
            }
            Err(_) => text(
                StatusCode::INTERNAL_SERVER_ERROR,
                "it could not be looked at\n",
            ),
        }
    }
}

fn text(status: StatusCode, text: &'static str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(text));
    *response.status_mut() = status;
    response
}
