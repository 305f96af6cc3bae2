//! Who signs: a controller, in production; if there are several, that of the stream, which knows the pods that the
//! agent knows.

use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use rustls_pki_types::CertificateDer;
use tokio::sync::Mutex;
use tokio::time::{Instant, timeout};
use weft_core::Identity;
use weft_proto::v1::SignRequest;

use crate::discovery::{Connection, Controller, ControllerError};

/// Signs requests for the identities of this node's pods.
pub trait Signer: Send + Sync + 'static {
    /// Signs a PKCS #10 request in DER. The answer is the chain, leaf first, without the root.
    fn sign(
        &self,
        identity: Identity,
        request: Vec<u8>,
    ) -> BoxFuture<'_, Result<Vec<CertificateDer<'static>>, SignError>>;
}

/// Why nothing was signed.
#[derive(Debug, thiserror::Error)]
pub enum SignError {
    /// The controller cannot be reached.
    #[error("{0}")]
    Connect(Arc<ControllerError>),
    /// It answered with an error.
    #[error("the controller does not sign: {} ({:?})", .0.message(), .0.code())]
    Refused(tonic::Status),
    /// It did not answer.
    #[error("the controller did not answer within {} s", SIGN_TIMEOUT.as_secs())]
    Silent,
}

/// Signs by the controller's Sign call.
pub struct ControllerSigner {
    controller: Arc<Controller>,
    /// A connection serves a burst of calls (an agent's start), then is let go: hours pass until the
    /// next, and bundle and token may have been rotated by then.
    connection: Mutex<Slot>,
}

/// How the last try to connect went, and when.
#[derive(Default)]
enum Slot {
    #[default]
    Empty,
    Open(Instant, Box<Connection>),
    Failed(Instant, Arc<ControllerError>),
}

impl ControllerSigner {
    /// A signer that connects when it is needed.
    pub fn new(controller: Arc<Controller>) -> Self {
        Self {
            controller,
            connection: Mutex::default(),
        }
    }

    /// The lock is held while connecting, so that a burst makes one connection, or fails as one.
    async fn connection(&self) -> Result<Connection, SignError> {
        let began = Instant::now();
        let mut slot = self.connection.lock().await;
        match &*slot {
            Slot::Open(since, connection) if since.elapsed() < REUSE => {
                return Ok(Connection::clone(connection));
            }
            Slot::Failed(at, error) if *at > began => {
                return Err(SignError::Connect(Arc::clone(error)));
            }
            _ => {}
        }
        *slot = Slot::Empty;
        match self.controller.connect().await {
            Ok(connection) => {
                *slot = Slot::Open(Instant::now(), Box::new(connection.clone()));
                Ok(connection)
            }
            Err(error) => {
                let error = Arc::new(error);
                *slot = Slot::Failed(Instant::now(), Arc::clone(&error));
                Err(SignError::Connect(error))
            }
        }
    }

    async fn call(
        &self,
        identity: Identity,
        request: Vec<u8>,
    ) -> Result<Vec<CertificateDer<'static>>, SignError> {
        let mut connection = self.connection().await?;
        let request = connection.request(SignRequest {
            csr: request,
            namespace: identity.namespace.to_string(),
            service_account: identity.service_account.to_string(),
        });
        let answer = timeout(SIGN_TIMEOUT, connection.client.sign(request)).await;
        let failed = match answer {
            Ok(Ok(response)) => {
                let chain = response.into_inner().chain;
                return Ok(chain.into_iter().map(Into::into).collect());
            }
            Ok(Err(status)) => SignError::Refused(status),
            Err(_) => SignError::Silent,
        };
        if is_no_answer(&failed) {
            self.controller.failed(connection.address);
        }
        // The connection may be the reason, or the token that it was opened with.
        *self.connection.lock().await = Slot::Empty;
        Err(failed)
    }
}

/// Whether another controller may sign what this one did not.
fn is_no_answer(error: &SignError) -> bool {
    match error {
        SignError::Refused(status) => status.code() == tonic::Code::Unavailable,
        SignError::Silent => true,
        SignError::Connect(_) => false,
    }
}

impl Signer for ControllerSigner {
    fn sign(
        &self,
        identity: Identity,
        request: Vec<u8>,
    ) -> BoxFuture<'_, Result<Vec<CertificateDer<'static>>, SignError>> {
        Box::pin(self.call(identity, request))
    }
}

const SIGN_TIMEOUT: Duration = Duration::from_secs(10);
const REUSE: Duration = Duration::from_secs(30);
