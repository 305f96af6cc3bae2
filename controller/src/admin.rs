//! The administrative port: liveness, readiness, metrics, problems, routes. Plain HTTP, nothing that
//! changes anything, nothing secret.

use std::convert::Infallible;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::CONTENT_TYPE;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::registry::Registry;
use serde::Serialize;
use tokio::net::TcpListener;
use tokio::task::AbortHandle;
use tokio_util::sync::CancellationToken;

use crate::control::agents::AgentStatus;
use crate::control::tls::Serving;
use crate::problems::Problem;
use crate::statuses::RouteStatus;
use crate::telemetry::{self, State};

/// Connections at the same time.
const MAX_CONNECTIONS: usize = 64;
/// The same from one address.
const MAX_PER_ADDRESS: usize = 16;
/// A request has a path and little else.
const MAX_HEADER_BYTES: usize = 16 * 1024;
/// A request's header has to arrive within this time.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
/// And its answer has to be taken within this.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(30);

const TEXT: &str = "text/plain; charset=utf-8";

/// What is shown.
#[derive(Debug)]
pub struct Admin {
    /// The state to show.
    pub state: State,
    /// What agents are served with.
    pub serving: Arc<Serving>,
    /// The metrics.
    pub registry: Registry,
}

#[derive(Serialize)]
struct ProblemList {
    problems: Vec<Problem>,
    agents: Vec<AgentStatus>,
}

#[derive(Serialize)]
struct RouteList {
    routes: Vec<RouteStatus>,
}

impl Admin {
    /// Serves until it is stopped.
    pub async fn serve(self, listener: TcpListener, stop: CancellationToken) {
        let admin = Arc::new(self);
        let mut open = Open::default();
        loop {
            let (stream, from) = tokio::select! {
                () = stop.cancelled() => return,
                accepted = listener.accept() => match accepted {
                    Ok((stream, from)) => (stream, Some(from.ip().to_canonical())),
                    Err(error) => {
                        tracing::warn!(%error, "cannot accept on the administrative port");
                        tokio::time::sleep(Duration::from_millis(100)).await;
                        continue;
                    }
                },
            };
            let admin = admin.clone();
            open.make_room(from);
            let connection = tokio::spawn(async move {
                let answer = service_fn(|request| {
                    let response = admin.answer(&request);
                    async move { Ok::<_, Infallible>(response) }
                });
                let serving = hyper::server::conn::http1::Builder::new()
                    .timer(TokioTimer::new())
                    .header_read_timeout(HEADER_TIMEOUT)
                    .max_buf_size(MAX_HEADER_BYTES)
                    .keep_alive(false)
                    .serve_connection(TokioIo::new(stream), answer);
                match tokio::time::timeout(CONNECTION_TIMEOUT, serving).await {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => {
                        tracing::debug!(%error, "an administrative connection failed");
                    }
                    Err(_) => tracing::debug!("an administrative connection took too long"),
                }
            });
            open.0.push((from, connection.abort_handle()));
        }
    }

    /// What keeps agents from being served.
    fn lacks(&self) -> Option<&'static str> {
        if !self.state.views.is_complete() {
            Some("the source has not been read as a whole yet")
        } else if !self.state.authority.has_issuer() {
            Some("there is no issuer of certificates yet")
        } else if !self.serving.has_certificate() {
            Some("there is no certificate yet that agents would know this controller by")
        } else {
            None
        }
    }

    fn answer(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        if request.method() != Method::GET {
            let text = "only GET\n".to_owned();
            return respond(StatusCode::METHOD_NOT_ALLOWED, TEXT, text);
        }
        match request.uri().path() {
            "/live" => respond(StatusCode::OK, TEXT, "live\n".to_owned()),
            "/ready" => match self.lacks() {
                None => respond(StatusCode::OK, TEXT, "ready\n".to_owned()),
                Some(lacks) => {
                    let text = format!("{lacks}: see /problems\n");
                    respond(StatusCode::SERVICE_UNAVAILABLE, TEXT, text)
                }
            },
            "/metrics" => match telemetry::text(&self.registry) {
                Ok(text) => {
                    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
                    respond(StatusCode::OK, kind, text)
                }
                Err(error) => respond(StatusCode::INTERNAL_SERVER_ERROR, TEXT, error.to_string()),
            },
            "/problems" => {
                let list = ProblemList {
                    problems: self.state.problems.list(),
                    agents: self.state.agents.list(),
                };
                json(&list)
            }
            "/routes" => {
                let list = RouteList {
                    routes: self.state.statuses.list(),
                };
                json(&list)
            }
            _ => {
                let text = "/live, /ready, /metrics, /problems, /routes\n".to_owned();
                respond(StatusCode::NOT_FOUND, TEXT, text)
            }
        }
    }
}

/// Connections that are open, the oldest first.
#[derive(Debug, Default)]
struct Open(Vec<(Option<IpAddr>, AbortHandle)>);

impl Open {
    /// Makes room for one more: where an address has too many, its oldest goes, and where all have,
    /// the oldest of whom has most. So nobody who holds connections open keeps anybody else away.
    fn make_room(&mut self, from: Option<IpAddr>) {
        self.0.retain(|(_, connection)| !connection.is_finished());
        let count = |of: Option<IpAddr>| self.0.iter().filter(|(it, _)| *it == of).count();
        let crowded = if count(from) >= MAX_PER_ADDRESS {
            from
        } else if self.0.len() >= MAX_CONNECTIONS {
            let most = self.0.iter().map(|(it, _)| *it).max_by_key(|it| count(*it));
            most.flatten()
        } else {
            return;
        };
        if let Some(oldest) = self.0.iter().position(|(it, _)| *it == crowded) {
            self.0.remove(oldest).1.abort();
        }
    }
}

fn json(shown: &impl Serialize) -> Response<Full<Bytes>> {
    match serde_json::to_string_pretty(shown) {
        Ok(text) => respond(StatusCode::OK, "application/json", text + "\n"),
        Err(error) => respond(StatusCode::INTERNAL_SERVER_ERROR, TEXT, error.to_string()),
    }
}

fn respond(status: StatusCode, kind: &'static str, text: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(text));
    *response.status_mut() = status;
    let kind = hyper::header::HeaderValue::from_static(kind);
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}
