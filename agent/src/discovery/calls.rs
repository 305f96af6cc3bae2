//! Single calls to a controller: that of the stream, if there are several, as it knows the pods that the agent knows.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::time::{Instant, timeout};
use tonic::{Code, Status};
use weft_core::WorkloadId;
use weft_proto::v1;

use super::controller::{Connection, Controller, ControllerError};

/// Calls controllers.
pub struct Calls {
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

/// What a controller says of a pod that is being started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PodStanding {
    /// It has not heard of it yet.
    Unknown,
    /// It takes no part in the mesh.
    NotMeshed,
    /// It does; its description comes by the stream.
    Meshed,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The controller cannot be reached.
    #[error("{0}")]
    Connect(Arc<ControllerError>),
    /// It answered with an error.
    #[error("the controller refuses: {} ({:?})", .0.message(), .0.code())]
    Refused(Status),
    /// It did not answer.
    #[error("the controller did not answer within {} s", .0.as_secs())]
    Silent(Duration),
}

impl CallError {
    /// Whether another controller may do what this one did not.
    fn is_no_answer(&self) -> bool {
        match self {
            Self::Refused(status) => status.code() == Code::Unavailable,
            Self::Silent(_) => true,
            Self::Connect(_) => false,
        }
    }
}

impl Calls {
    /// Connects when it is needed.
    pub fn new(controller: Arc<Controller>) -> Arc<Self> {
        Arc::new(Self {
            controller,
            connection: Mutex::default(),
        })
    }

    /// Has a certificate signed.
    ///
    /// # Errors
    /// There is none.
    pub async fn sign(&self, request: v1::SignRequest) -> Result<v1::SignResponse, CallError> {
        let mut connection = self.connection().await.map_err(CallError::Connect)?;
        let request = connection.request(request);
        let answer = timeout(SIGN_TIMEOUT, connection.client.sign(request)).await;
        let answer = answer.map_err(|_| CallError::Silent(SIGN_TIMEOUT));
        self.outcome(&connection, answer).await
    }

    /// Asks whether a pod of this node takes part in the mesh. The controller waits a moment for one that it has not
    /// heard of.
    ///
    /// # Errors
    /// There is no answer.
    pub async fn pod_standing(
        &self,
        pod: &WorkloadId,
        uid: &str,
    ) -> Result<PodStanding, CallError> {
        let mut connection = self.connection().await.map_err(CallError::Connect)?;
        let request = connection.request(v1::DescribePodRequest {
            name: Some(v1::ObjectName {
                namespace: pod.0.namespace.to_string(),
                name: pod.0.name.to_string(),
            }),
            uid: uid.to_owned(),
        });
        let answer = timeout(DESCRIBE_TIMEOUT, connection.client.describe_pod(request)).await;
        let answer = answer.map_err(|_| CallError::Silent(DESCRIBE_TIMEOUT));
        let answer = self.outcome(&connection, answer).await?;
        Ok(match answer.standing() {
            v1::PodStanding::Unknown => PodStanding::Unknown,
            v1::PodStanding::NotMeshed => PodStanding::NotMeshed,
            v1::PodStanding::Meshed => PodStanding::Meshed,
        })
    }

    /// The lock is held while connecting, so that a burst makes one connection, or fails as one.
    async fn connection(&self) -> Result<Connection, Arc<ControllerError>> {
        let began = Instant::now();
        let mut slot = self.connection.lock().await;
        match &*slot {
            Slot::Open(since, connection) if since.elapsed() < REUSE => {
                return Ok(Connection::clone(connection));
            }
            Slot::Failed(at, error) if *at > began => {
                return Err(Arc::clone(error));
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
                Err(error)
            }
        }
    }

    async fn outcome<T>(
        &self,
        connection: &Connection,
        answer: Result<Result<tonic::Response<T>, Status>, CallError>,
    ) -> Result<T, CallError> {
        let failed = match answer {
            Ok(Ok(response)) => return Ok(response.into_inner()),
            Ok(Err(status)) => CallError::Refused(status),
            Err(silent) => silent,
        };
        if failed.is_no_answer() {
            self.controller.failed(connection.address);
        }
        // The connection may be the reason, or the token that it was opened with.
        *self.connection.lock().await = Slot::Empty;
        Err(failed)
    }
}

const SIGN_TIMEOUT: Duration = Duration::from_secs(10);
/// The controller takes up to two seconds for a pod that it has not heard of.
const DESCRIBE_TIMEOUT: Duration = Duration::from_secs(5);
const REUSE: Duration = Duration::from_secs(30);
