//! The gate before every call: who brings no good token gets no further, whatever it asks for.

use std::collections::HashMap;
use std::future::Future;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tonic::Status;
use tonic::body::Body;
use tonic::codegen::{Service, http};
use tonic::server::NamedService;
use weft_proto::v1::control_server::ControlServer;

use super::authentication::{Authentication, Refusal};
use super::strangers::Seat;
use super::{Caller, Server};
use crate::telemetry::{Metrics, Refused};

/// Lets in only agents.
#[derive(Debug)]
pub(super) struct Gate {
    authentication: Arc<Authentication>,
    metrics: Arc<Metrics>,
    /// When a refusal was last logged, by its label.
    said: Mutex<HashMap<&'static str, Instant>>,
}

/// The service behind its gate, with another limit of what is read for each call.
#[derive(Clone)]
pub(super) struct Gated {
    pub(super) gate: Arc<Gate>,
    pub(super) stream: ControlServer<Server>,
    pub(super) sign: ControlServer<Server>,
}

type Calling<F> = Pin<Box<dyn Future<Output = F> + Send>>;
type Inner = ControlServer<Server>;

/// Refusals of a kind are logged at most this often: they may come by the thousands.
const SAY_AGAIN: Duration = Duration::from_secs(10);

impl Gate {
    pub(super) fn new(authentication: Arc<Authentication>, metrics: Arc<Metrics>) -> Self {
        Self {
            authentication,
            metrics,
            said: Mutex::default(),
        }
    }

    /// Who makes a call.
    async fn caller(&self, token: Option<Vec<u8>>, seat: Option<&Seat>) -> Result<Caller, Status> {
        let Some(token) = token else {
            self.metrics.refused(Refused::NoToken);
            return Err(Status::unauthenticated("a bearer token is needed"));
        };
        // Every connection has one: see `tls::accept`.
        let seat = seat.ok_or_else(|| Status::internal("a connection without a place"))?;
        let node = match self.authentication.node_of(&token, seat.address).await {
            Ok(node) => node,
            Err(refusal) => return Err(self.refuse(&refusal, seat.address)),
        };
        self.metrics.authenticated("accepted");
        if seat.prove(&node).is_err() {
            return Err(Status::resource_exhausted("too many connections of a node"));
        }
        Ok(Caller {
            node,
            token,
            from: seat.address,
        })
    }

    fn refuse(&self, refusal: &Refusal, from: IpAddr) -> Status {
        self.metrics.authenticated(refusal.label());
        if !refusal.is_unclear() {
            self.metrics.refused(Refused::WrongToken);
        }
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        let last = said.get(refusal.label());
        if last.is_none_or(|it| it.elapsed() >= SAY_AGAIN) {
            said.insert(refusal.label(), Instant::now());
            tracing::warn!(%from, "an agent was refused: {refusal}");
        }
        refusal.status()
    }
}

impl Service<http::Request<Body>> for Gated {
    type Response = <Inner as Service<http::Request<Body>>>::Response;
    type Error = <Inner as Service<http::Request<Body>>>::Error;
    type Future = Calling<Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        // The service behind always is, as what tonic generates.
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: http::Request<Body>) -> Self::Future {
        let gate = self.gate.clone();
        let mut service = match request.uri().path().rsplit('/').next() {
            Some("Subscribe") => self.stream.clone(),
            _ => self.sign.clone(),
        };
        Box::pin(async move {
            let header = request.headers().get(http::header::AUTHORIZATION);
            let token = header.and_then(|it| it.as_bytes().strip_prefix(b"Bearer "));
            let token = token.map(<[u8]>::to_vec);
            let seat = request.extensions().get::<Arc<Seat>>().cloned();
            match gate.caller(token, seat.as_deref()).await {
                Ok(caller) => {
                    request.extensions_mut().insert(caller);
                    service.call(request).await
                }
                Err(status) => Ok(status.into_http()),
            }
        })
    }
}

impl NamedService for Gated {
    const NAME: &'static str = <Inner as NamedService>::NAME;
}
