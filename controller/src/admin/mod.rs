//! What an operator sees of the controller: liveness, readiness, metrics, problems and routes on a port; on a Unix
//! socket that only root can open, the same, and what agents say of themselves. In a cluster nobody has that socket: the
//! same is on a loopback port of the pod, for [`visitors`] who prove that they may see it.
//!
//! Plain HTTP, nothing that changes anything, nothing secret. The port may be reachable for pods, so it tells nothing
//! of agents but that they are there.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{Either, Full};
use hyper::body::Incoming;
use hyper::header::CONTENT_TYPE;
use hyper::{Method, Request, Response, StatusCode};
use prometheus_client::registry::Registry;
use serde::Serialize;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use weft_admin::{Accept, Limits, Loopback, Socket};

use crate::control::agents::AgentStatus;
use crate::control::inspect::Inspections;
use crate::control::tap::Taps;
use crate::control::tls::Serving;
use crate::problems::{Notice, Problem};
use crate::statuses::RouteStatus;
use crate::telemetry::{self, State};

mod inside;
mod tap;
pub mod visitors;

use tap::{Ask, Lines};
use visitors::{Visitors, Watcher};

const TEXT: &str = "text/plain; charset=utf-8";
const JSON: &str = "application/json";
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What is shown.
#[derive(Debug)]
pub struct Admin {
    /// The state to show.
    pub state: State,
    /// The agents that can be asked.
    pub inspections: Arc<Inspections>,
    /// Those who watch what goes on at pods.
    pub taps: Arc<Taps>,
    /// What agents are served with.
    pub serving: Arc<Serving>,
    /// The metrics.
    pub registry: Registry,
    /// Not ready when nothing was heard of the API server for this long.
    pub silent_after: Duration,
    /// Where objects come from, for people.
    pub source: String,
    /// Who decides about those who ask at the loopback port; none: there is no such port.
    pub visitors: Option<Visitors>,
    /// Ends it.
    pub stop: CancellationToken,
}

/// Where a request came in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Surface {
    /// The port.
    Port,
    /// The Unix socket.
    Socket,
    /// The loopback port of the pod.
    Inspection,
}

/// What is answered: at once, or as it comes.
type Content = Either<Full<Bytes>, Lines>;
type Reply = Response<Content>;

const LIMITS: Limits = Limits {
    connections: 64,
    per_address: 16,
};

#[derive(Serialize)]
struct ProblemList {
    problems: Vec<Problem>,
    notices: Vec<Notice>,
    agents: Vec<AgentStatus>,
}

#[derive(Serialize)]
struct RouteList {
    routes: Vec<RouteStatus>,
}

impl Admin {
    /// Serves what the port shows until it is stopped.
    pub async fn serve(self: Arc<Self>, listener: TcpListener, stop: CancellationToken) {
        self.serve_surface(listener, Surface::Port, stop).await;
    }

    /// Serves what the socket shows until it is stopped, then removes the socket. One that an earlier controller left
    /// there is replaced.
    ///
    /// # Errors
    /// What is there is no socket, or the folder cannot be written.
    pub fn serve_socket(
        self: Arc<Self>,
        path: &Path,
        stop: CancellationToken,
    ) -> std::io::Result<impl Future<Output = ()> + Send + use<>> {
        let socket = Socket::open(path)?;
        Ok(self.serve_surface(socket, Surface::Socket, stop))
    }

    /// Serves on a loopback port what the socket shows, to whom the API server lets see it, until it is stopped.
    pub async fn serve_inspection(self: Arc<Self>, listener: TcpListener, stop: CancellationToken) {
        let listener = Loopback(listener);
        self.serve_surface(listener, Surface::Inspection, stop)
            .await;
    }

    async fn serve_surface(
        self: Arc<Self>,
        listener: impl Accept,
        surface: Surface,
        stop: CancellationToken,
    ) {
        let answer = move |request| {
            let admin = Arc::clone(&self);
            async move { admin.answer(surface, &request).await }
        };
        weft_admin::serve(listener, LIMITS, answer, stop).await;
    }

    /// What keeps agents from being served.
    fn lacks(&self) -> Option<&'static str> {
        if !self.state.views.is_complete() {
            Some("the source has not been read as a whole yet")
        } else if !self.state.authority.has_issuer() {
            Some("there is no issuer of certificates yet")
        } else if !self.serving.has_certificate() {
            Some("there is no certificate yet that agents would know this controller by")
        } else if self.state.progress.silent_for() >= Some(self.silent_after) {
            Some("nothing was heard of the API server for long: can it be reached?")
        } else {
            None
        }
    }

    async fn answer(self: &Arc<Self>, surface: Surface, request: &Request<Incoming>) -> Reply {
        if surface != Surface::Port && request.uri().path() == "/tap" {
            return self.tapped(surface, request).await;
        }
        if surface == Surface::Inspection
            && let Err(refusal) = self.admit(request).await
        {
            return visitors::refused(&refusal);
        }
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
                Ok(text) => respond(StatusCode::OK, OPEN_METRICS, text),
                Err(error) => respond(StatusCode::INTERNAL_SERVER_ERROR, TEXT, error.to_string()),
            },
            "/problems" => {
                let list = ProblemList {
                    problems: self.state.problems.list(),
                    notices: self.state.problems.notices(),
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
            path if surface != Surface::Port => {
                let query = request.uri().query().unwrap_or_default();
                self.inside(path, query).await
            }
            _ => {
                let text = "/live, /ready, /metrics, /problems, /routes\n".to_owned();
                respond(StatusCode::NOT_FOUND, TEXT, text)
            }
        }
    }
}

impl Admin {
    async fn tapped(self: &Arc<Self>, surface: Surface, request: &Request<Incoming>) -> Reply {
        if request.method() != Method::GET {
            let text = "only GET\n".to_owned();
            return respond(StatusCode::METHOD_NOT_ALLOWED, TEXT, text);
        }
        let query = request.uri().query().unwrap_or_default();
        let ask = match Ask::read(query) {
            Ok(ask) => ask,
            Err(wrong) => return respond(StatusCode::BAD_REQUEST, TEXT, wrong + "\n"),
        };
        let watcher = match (surface, &self.visitors) {
            (Surface::Inspection, Some(visitors)) => visitors.admit_watcher(request, &ask).await,
            (Surface::Inspection, None) => Err(visitors::Refusal::Nobody),
            (Surface::Socket | Surface::Port, _) => Ok(Watcher::root()),
        };
        match watcher {
            Ok(watcher) => self.tap(ask, watcher, query),
            Err(refusal) => visitors::refused(&refusal),
        }
    }

    async fn admit(&self, request: &Request<Incoming>) -> Result<(), visitors::Refusal> {
        match &self.visitors {
            Some(visitors) => visitors.admit(request).await,
            None => Err(visitors::Refusal::Nobody),
        }
    }
}

fn json(shown: &impl Serialize) -> Reply {
    match serde_json::to_string_pretty(shown) {
        Ok(text) => respond(StatusCode::OK, JSON, text + "\n"),
        Err(error) => respond(StatusCode::INTERNAL_SERVER_ERROR, TEXT, error.to_string()),
    }
}

fn respond(status: StatusCode, kind: &'static str, content: impl Into<Bytes>) -> Reply {
    let mut response = Response::new(Content::Left(Full::new(content.into())));
    *response.status_mut() = status;
    let kind = hyper::header::HeaderValue::from_static(kind);
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}
