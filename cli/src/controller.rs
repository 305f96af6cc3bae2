//! How the tool reaches the mesh: through controllers, which agents are connected to.
//!
//! Without Kubernetes that is the Unix socket of a controller on this machine, which only root can open. With several
//! controllers, each agent is connected to one of them: all are asked.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use futures::StreamExt;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use tokio::time::timeout;

/// Where the controllers are.
#[derive(Args, Clone, Debug)]
pub struct Reach {
    /// The Unix socket of the controller (its --admin-socket); of several controllers each, again and again.
    #[arg(
        long = "controller-socket",
        value_name = "PATH",
        env = "WEFT_CONTROLLER_SOCKET",
        value_delimiter = ',',
        default_value = "/run/weft/controller.sock"
    )]
    pub sockets: Vec<PathBuf>,
}

/// An agent, and the controller that it is connected to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Agent {
    /// The controller's socket.
    pub socket: PathBuf,
    /// What the controller says of it.
    pub status: AgentStatus,
}

/// What a controller says of an agent.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
pub struct AgentStatus {
    /// Its node.
    pub node: String,
    /// Tells its processes apart.
    pub incarnation: String,
    /// Its version.
    pub version: String,
    /// How many resources it rejects.
    pub rejected: usize,
    /// Whether it can be asked.
    pub inspectable: bool,
}

/// Why something was not found out.
#[derive(Debug, thiserror::Error)]
pub enum ReachError {
    /// There is no controller.
    #[error(
        "cannot connect to the controller at {socket}: {reason}: does it run here with --admin-socket, and is this root? \
         --controller-socket says where else it is"
    )]
    Connect {
        /// Its socket.
        socket: PathBuf,
        /// Why.
        reason: std::io::Error,
    },
    /// It broke off.
    #[error("the controller at {socket} does not answer {path}: {reason}")]
    Broken {
        /// Its socket.
        socket: PathBuf,
        /// What was asked.
        path: String,
        /// Why.
        reason: String,
    },
    /// It said no.
    #[error("{0}")]
    Refused(String),
    /// An agent that cannot be asked.
    #[error(
        "the agent of {node} cannot be asked: it is older than the controller, or has only just connected"
    )]
    Silent {
        /// Its node.
        node: String,
    },
    /// Nobody to ask.
    #[error("no agent is connected to {0}: do agents run, with --controller pointing there?")]
    NoAgents(String),
    /// Not one agent answers.
    #[error("no agent answers: {0}")]
    NoAnswers(String),
}

/// How long one answer may take: more than the controller waits for an agent.
const PATIENCE: Duration = Duration::from_secs(20);
/// More than a controller passes on.
const MAX_ANSWER_BYTES: usize = 64 * 1024 * 1024;
/// Answers on their way at the same time.
pub const AT_ONCE: usize = 8;

impl Reach {
    /// All agents that are connected, of one node after the other.
    ///
    /// # Errors
    /// A controller cannot be asked: without it, something would be missing.
    pub async fn agents(&self) -> Result<Vec<Agent>, ReachError> {
        #[derive(Deserialize)]
        struct List {
            agents: Vec<AgentStatus>,
        }
        let mut agents = vec![];
        for socket in &self.sockets {
            let list: List = json(socket, "/agents").await?;
            let all = list.agents.into_iter();
            agents.extend(all.map(|status| Agent {
                socket: socket.clone(),
                status,
            }));
        }
        agents.sort_by(|one, other| key(one).cmp(&key(other)));
        // One that goes from one controller to another may be at both.
        agents.dedup_by(|one, other| key(one) == key(other));
        if agents.is_empty() {
            let sockets = self.sockets.iter().map(|it| it.display().to_string());
            return Err(ReachError::NoAgents(sockets.collect::<Vec<_>>().join(", ")));
        }
        Ok(agents)
    }
}

fn key(agent: &Agent) -> (&str, &str) {
    (&agent.status.node, &agent.status.incarnation)
}

impl Agent {
    /// A page of the agent: `metrics`, `ready`, `pods` or `config_dump`.
    ///
    /// # Errors
    /// It does not answer.
    pub async fn page(&self, page: &str) -> Result<Bytes, ReachError> {
        let AgentStatus {
            node, incarnation, ..
        } = &self.status;
        if !self.status.inspectable {
            return Err(ReachError::Silent { node: node.clone() });
        }
        let path = format!("/agents/{node}/{incarnation}/{page}");
        let answer = get(&self.socket, &path).await;
        answer.map_err(|error| match error {
            ReachError::Refused(reason) => ReachError::Refused(format!("{node}: {reason}")),
            other => other,
        })
    }

    /// A page that is JSON.
    ///
    /// # Errors
    /// It does not answer, or with something else.
    pub async fn json<T: DeserializeOwned>(&self, page: &str) -> Result<T, ReachError> {
        let bytes = self.page(page).await?;
        read(&self.socket, page, &bytes)
    }
}

/// Asks all agents at once, some at a time, and keeps their order.
pub async fn each<T, F>(agents: &[Agent], ask: impl Fn(Agent) -> F) -> Vec<T>
where
    F: Future<Output = T>,
{
    let asked = futures::stream::iter(agents.iter().cloned().map(ask));
    asked.buffered(AT_ONCE).collect().await
}

/// An answer that is JSON.
///
/// # Errors
/// There is none, or it is something else.
pub async fn json<T: DeserializeOwned>(socket: &Path, path: &str) -> Result<T, ReachError> {
    let bytes = get(socket, path).await?;
    read(socket, path, &bytes)
}

fn read<T: DeserializeOwned>(socket: &Path, path: &str, bytes: &[u8]) -> Result<T, ReachError> {
    serde_json::from_slice(bytes).map_err(|error| ReachError::Broken {
        socket: socket.to_owned(),
        path: path.to_owned(),
        reason: format!("{error}: is it of another version?"),
    })
}

/// What is at a path.
///
/// # Errors
/// There is no answer, or no good one.
pub async fn get(socket: &Path, path: &str) -> Result<Bytes, ReachError> {
    let connected = UnixStream::connect(socket).await;
    let stream = connected.map_err(|reason| ReachError::Connect {
        socket: socket.to_owned(),
        reason,
    })?;
    let broken = |reason: String| ReachError::Broken {
        socket: socket.to_owned(),
        path: path.to_owned(),
        reason,
    };
    let answered = timeout(PATIENCE, exchange(stream, path)).await;
    let answered = answered.map_err(|_| broken(format!("no answer in {} s", PATIENCE.as_secs())));
    let (status, bytes) = answered?.map_err(broken)?;
    if status != StatusCode::OK {
        let reason = String::from_utf8_lossy(&bytes);
        let reason: String = reason.trim().chars().take(1000).collect();
        return Err(ReachError::Refused(match reason.is_empty() {
            true => format!("the controller answers {path} with {status}"),
            false => reason,
        }));
    }
    Ok(bytes)
}

async fn exchange(stream: UnixStream, path: &str) -> Result<(StatusCode, Bytes), String> {
    let text = |error: hyper::Error| error.to_string();
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(text)?;
    let request = Request::builder()
        .uri(path)
        .header("host", "weft-controller")
        .body(Empty::<Bytes>::new())
        .map_err(|error| error.to_string())?;
    let exchange = async {
        let response = sender.send_request(request).await.map_err(text)?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_ANSWER_BYTES).collect();
        let body = body.await.map_err(|error| error.to_string())?;
        Ok((status, body.to_bytes()))
    };
    let mut exchange = std::pin::pin!(exchange);
    tokio::select! {
        answered = &mut exchange => answered,
        ended = connection => {
            ended.map_err(text)?;
            // All that came is buffered.
            exchange.await
        }
    }
}
