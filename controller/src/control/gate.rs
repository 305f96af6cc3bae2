//! The gate before every call: who brings no good token gets no further, whatever it asks for.

use std::collections::HashMap;
use std::future::{Future, Ready, ready};
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio_stream::wrappers::ReceiverStream;
use tonic::body::Body;
use tonic::codegen::{Service, http};
use tonic::server::{Grpc, NamedService, StreamingService};
use tonic::{Request, Response, Status, Streaming};
use weft_proto::v1::control_server::ControlServer;
use weft_proto::{MAX_MESSAGE_BYTES, v1};

use super::authentication::{Authentication, Refusal};
use super::push::{Outgoing, StreamCodec};
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
    pub(super) stream: Arc<Server>,
    pub(super) sign: ControlServer<Server>,
}

/// The call that opens the stream,
const SUBSCRIBE: &str = "/weft.control.v1.Control/Subscribe";

/// and it, for tonic.
struct Subscribe(Arc<Server>);

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
        let subscribes = request.uri().path() == SUBSCRIBE;
        let (stream, mut sign) = (self.stream.clone(), self.sign.clone());
        Box::pin(async move {
            let header = request.headers().get(http::header::AUTHORIZATION);
            let token = header.and_then(|it| it.as_bytes().strip_prefix(b"Bearer "));
            let token = token.map(<[u8]>::to_vec);
            let seat = request.extensions().get::<Arc<Seat>>().cloned();
            match gate.caller(token, seat.as_deref()).await {
                Ok(caller) => {
                    request.extensions_mut().insert(caller);
                    if subscribes {
                        return Ok(subscribe(stream, request).await);
                    }
                    sign.call(request).await
                }
                Err(status) => Ok(status.into_http()),
            }
        })
    }
}

/// As the code does that is generated for a service, with the stream's own codec.
async fn subscribe(server: Arc<Server>, request: http::Request<Body>) -> http::Response<Body> {
    let limit = Some(MAX_MESSAGE_BYTES);
    let mut grpc = Grpc::new(StreamCodec).apply_max_message_size_config(limit, limit);
    grpc.streaming(Subscribe(server), request).await
}

impl StreamingService<v1::AgentMessage> for Subscribe {
    type Response = Outgoing;
    type ResponseStream = ReceiverStream<Result<Outgoing, Status>>;
    type Future = Ready<Result<Response<Self::ResponseStream>, Status>>;

    fn call(&mut self, request: Request<Streaming<v1::AgentMessage>>) -> Self::Future {
        ready(self.0.stream(request))
    }
}

impl NamedService for Gated {
    const NAME: &'static str = <Inner as NamedService>::NAME;
}
