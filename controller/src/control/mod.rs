//! The gRPC service that agents connect to: the stream of state, and signing.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};
use weft_core::{Identity, Name, ObjectName, TrustDomain};
use weft_proto::v1;
use weft_proto::v1::control_server::{Control, ControlServer};

use crate::authority::{Authority, SignError};
use crate::progress::Progress;
use crate::questions::Questions;
use crate::telemetry::{Metrics, Signing};
use crate::views::Views;
use agents::Agents;
use authentication::Authentication;
use gate::{Gate, Gated};
use inspect::Inspections;
use push::Outgoing;
use tap::Taps;
use tls::Serving;

pub mod agents;
pub mod authentication;
mod gate;
pub mod inspect;
mod push;
mod rejections;
mod strangers;
mod stream;
pub mod tap;
pub mod tls;
pub mod tokens;

/// What the service works with.
#[derive(Clone, Debug)]
pub struct Server {
    /// The state of agents.
    pub views: Arc<Views>,
    /// Signs certificates.
    pub authority: Arc<Authority>,
    /// Who may connect.
    pub authentication: Arc<Authentication>,
    /// Answers what is not published.
    pub questions: Questions,
    /// How far the source has come.
    pub progress: Progress,
    /// Who is connected.
    pub agents: Arc<Agents>,
    /// Who of them can be asked.
    pub inspections: Arc<Inspections>,
    /// Those who watch what goes on at pods.
    pub taps: Arc<Taps>,
    /// Counts.
    pub metrics: Arc<Metrics>,
    /// The trust domain of identities made here.
    pub trust_domain: TrustDomain,
    /// Ends it.
    pub stop: CancellationToken,
}

/// The node whose agent makes a call, the token that proved it, and where it comes from.
#[derive(Clone)]
struct Caller {
    node: Name,
    token: Vec<u8>,
    from: IpAddr,
}

/// A connection on which nothing is heard for this long is pinged,
const KEEPALIVE: Duration = Duration::from_secs(10);
/// and closed when there is no answer for this long.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Calls at the same time on one connection: a stream, and some signing.
const MAX_CALLS: u32 = 128;
/// How long a pod that nobody has heard of is waited for; then the agent asks again.
const UNHEARD: Duration = Duration::from_secs(2);
/// What an agent is told of taps that wait for the connection.
const TAP_COMMANDS: usize = 16;
/// A request for a signature is a key and a name, and a part of an answer has 32 KiB.
const MAX_SIGN_BYTES: usize = 64 * 1024;

impl Server {
    /// Serves agents until it is stopped.
    ///
    /// # Errors
    /// The listener cannot be served at all.
    pub async fn serve(self, listener: TcpListener, serving: Arc<Serving>) -> anyhow::Result<()> {
        let (sender, accepted) = mpsc::channel(64);
        let (metrics, stop) = (self.metrics.clone(), self.stop.clone());
        let accepting = tls::accept(listener, serving.config()?, metrics, sender, stop.clone());
        let accepting = tokio::spawn(accepting);
        let gate = Arc::new(Gate::new(self.authentication.clone(), self.metrics.clone()));
        let service = Arc::new(self);
        let gated = Gated {
            gate,
            stream: service.clone(),
            sign: ControlServer::from_arc(service).max_decoding_message_size(MAX_SIGN_BYTES),
        };
        let served = tonic::transport::Server::builder()
            .http2_keepalive_interval(Some(KEEPALIVE))
            .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
            .max_concurrent_streams(Some(MAX_CALLS))
            .add_service(gated)
            .serve_with_incoming_shutdown(ReceiverStream::new(accepted), stop.cancelled_owned())
            .await;
        accepting.abort();
        Ok(served?)
    }
}

#[tonic::async_trait]
impl Control for Server {
    type SubscribeStream = ReceiverStream<Result<v1::ControllerMessage, Status>>;

    /// The gate serves it by `Server::stream`, which has a codec of its own.
    async fn subscribe(
        &self,
        _: Request<Streaming<v1::AgentMessage>>,
    ) -> Result<Response<Self::SubscribeStream>, Status> {
        Err(Status::unimplemented("served by the gate"))
    }

    async fn sign(
        &self,
        request: Request<v1::SignRequest>,
    ) -> Result<Response<v1::SignResponse>, Status> {
        let caller = caller(&request)?;
        let request = request.into_inner();
        let signed = self.signed(&caller.node, &request);
        let (outcome, response) = match signed {
            Ok(chain) => (
                Signing::Signed,
                Ok(Response::new(v1::SignResponse { chain })),
            ),
            Err((outcome, status)) => {
                tracing::warn!(
                    node = %caller.node,
                    namespace = %request.namespace.escape_debug(),
                    service_account = %request.service_account.escape_debug(),
                    "not signed: {}",
                    status.message()
                );
                (outcome, Err(status))
            }
        };
        self.metrics.signed(outcome);
        response
    }

    type InspectStream = ReceiverStream<Result<v1::InspectQuestion, Status>>;

    async fn inspect(
        &self,
        request: Request<Streaming<v1::InspectAnswer>>,
    ) -> Result<Response<Self::InspectStream>, Status> {
        let caller = caller(&request)?;
        let context = inspect::Context {
            inspections: self.inspections.clone(),
            authentication: self.authentication.clone(),
            metrics: self.metrics.clone(),
            stop: self.stop.clone(),
        };
        let (sender, receiver) = mpsc::channel(1);
        let serving = inspect::serve(context, caller, request.into_inner(), sender);
        tokio::spawn(serving);
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    type TapStream = ReceiverStream<Result<v1::TapCommand, Status>>;

    async fn tap(
        &self,
        request: Request<Streaming<v1::TapMessage>>,
    ) -> Result<Response<Self::TapStream>, Status> {
        let caller = caller(&request)?;
        let context = tap::stream::Context {
            taps: self.taps.clone(),
            authentication: self.authentication.clone(),
            metrics: self.metrics.clone(),
            stop: self.stop.clone(),
        };
        let (sender, receiver) = mpsc::channel(TAP_COMMANDS);
        let serving = tap::stream::serve(context, caller, request.into_inner(), sender);
        tokio::spawn(serving);
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn describe_pod(
        &self,
        request: Request<v1::DescribePodRequest>,
    ) -> Result<Response<v1::DescribePodResponse>, Status> {
        let node = caller(&request)?.node;
        let v1::DescribePodRequest { name, uid } = request.into_inner();
        let name = name.unwrap_or_default();
        let pod = ObjectName::parse(&name.namespace, &name.name)
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        // Pods of other nodes are answered as those that nobody has heard of.
        let asked = self.questions.takes_part(&node, pod, uid);
        let standing = match tokio::time::timeout(UNHEARD, asked).await {
            Ok(Some(true)) => v1::PodStanding::Meshed,
            Ok(Some(false)) => v1::PodStanding::NotMeshed,
            Ok(None) | Err(_) => v1::PodStanding::Unknown,
        };
        let standing = standing.into();
        Ok(Response::new(v1::DescribePodResponse { standing }))
    }
}

impl Server {
    fn stream(
        &self,
        request: Request<Streaming<v1::AgentMessage>>,
    ) -> Result<Response<ReceiverStream<Result<Outgoing, Status>>>, Status> {
        let caller = caller(&request)?;
        let context = stream::Context {
            views: self.views.clone(),
            agents: self.agents.clone(),
            authentication: self.authentication.clone(),
            progress: self.progress.clone(),
            metrics: self.metrics.clone(),
            stop: self.stop.clone(),
        };
        // One message waits while one is sent: all else is found out when the agent is ready.
        let (sender, receiver) = mpsc::channel(1);
        let serving = stream::serve(context, caller, request.into_inner(), sender);
        tokio::spawn(serving);
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    fn signed(
        &self,
        node: &Name,
        request: &v1::SignRequest,
    ) -> Result<Vec<Vec<u8>>, (Signing, Status)> {
        let account = ObjectName::parse(&request.namespace, &request.service_account);
        let account = account.map_err(|error| {
            let status = Status::invalid_argument(error.to_string());
            (Signing::Invalid, status)
        })?;
        if !self.views.is_complete() {
            let status = Status::unavailable("the controller does not know the workloads yet");
            return Err((Signing::Failed, status));
        }
        if !self.views.runs(node, &account) {
            let reason = format!("no meshed workload of service account {account} runs on {node}");
            return Err((Signing::Denied, Status::permission_denied(reason)));
        }
        let identity = Identity {
            trust_domain: self.trust_domain.clone(),
            namespace: account.namespace,
            service_account: account.name,
        };
        let signed = self.authority.sign(&request.csr, &identity);
        let signed = signed.map_err(|error| match error {
            SignError::Request(_) => {
                let status = Status::invalid_argument(error.to_string());
                (Signing::Invalid, status)
            }
            SignError::NoIssuer | SignError::IssuerExpires | SignError::Signing(_) => {
                let status = Status::unavailable(error.to_string());
                (Signing::Failed, status)
            }
        })?;
        Ok(signed.chain.iter().map(|it| it.to_vec()).collect())
    }
}

/// Who calls. The gate lets nobody in without.
fn caller<T>(request: &Request<T>) -> Result<Caller, Status> {
    let caller = request.extensions().get::<Caller>().cloned();
    caller.ok_or_else(|| Status::unauthenticated("a bearer token is needed"))
}
