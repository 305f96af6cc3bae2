//! How the tool reaches the mesh: through controllers, which agents are connected to.
//!
//! Without Kubernetes that is the Unix socket of a controller on this machine, which only root can open. In a cluster it is
//! a port-forward to each controller's pod, with what the user may do there: see [`cluster`]. With several controllers,
//! each agent is connected to one of them: all are asked.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use futures::StreamExt;
use http::header::{AUTHORIZATION, HeaderValue};
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::{Bytes, Incoming};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixStream;
use tokio::sync::OnceCell;
use tokio::time::timeout;

pub mod cluster;

use crate::view::{PrometheusError, TooLong};
use cluster::{Cluster, ClusterError, Forwarded};

/// Where the controllers are.
#[derive(Args, Clone, Debug)]
pub struct Reach {
    /// The Unix socket of the controller (its --admin-socket); of several controllers each, again and again. If it is not
    /// given: /run/weft/controller.sock where there is one, or else the cluster that kubectl would use. Where --kubeconfig or
    /// --context are given, it is that cluster.
    #[arg(
        long = "controller-socket",
        value_name = "PATH",
        env = "WEFT_CONTROLLER_SOCKET",
        value_delimiter = ','
    )]
    pub sockets: Vec<PathBuf>,
    /// The kubeconfig that says which cluster, and who you are there. If it is not given, what kubectl would use: KUBECONFIG,
    /// or ~/.kube/config.
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// The context in the kubeconfig, in place of its current one.
    #[arg(long, value_name = "NAME")]
    pub context: Option<String>,
    /// In a cluster: the namespace that Weft is in.
    #[arg(
        long,
        value_name = "NAMESPACE",
        env = "WEFT_NAMESPACE",
        default_value = "weft-system"
    )]
    pub weft_namespace: String,
    /// In a cluster: the service account in that namespace that you may ask a token of, and that may look into the mesh.
    #[arg(
        long,
        value_name = "NAME",
        env = "WEFT_VIEWER",
        default_value = "weft-viewer"
    )]
    pub viewer: String,
    #[arg(skip)]
    cluster: Arc<OnceCell<Arc<Cluster>>>,
}

/// Where a controller is.
#[derive(Clone, Debug)]
pub enum Place {
    /// At a Unix socket.
    Socket(PathBuf),
    /// In a pod.
    Pod(Arc<Cluster>, String),
}

/// An agent, and the controller that it is connected to.
#[derive(Clone, Debug)]
pub struct Agent {
    /// Where the controller is.
    pub place: Place,
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
    /// The cluster cannot be asked.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    /// It broke off.
    #[error("the controller at {place} does not answer {path}: {reason}")]
    Broken {
        /// Where it is.
        place: String,
        /// What was asked.
        path: String,
        /// Why.
        reason: String,
    },
    /// It said no.
    #[error("{0}")]
    Refused(String),
    /// What happened before is not known.
    #[error(transparent)]
    Prometheus(#[from] PrometheusError),
    /// That far back nobody remembers.
    #[error(transparent)]
    TooLong(#[from] TooLong),
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
/// A controller that tells line by line says something more often.
const SILENCE: Duration = Duration::from_secs(20);
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
        let places = self.places().await?;
        for place in &places {
            let list: List = json(place, "/agents").await?;
            let all = list.agents.into_iter();
            agents.extend(all.map(|status| Agent {
                place: place.clone(),
                status,
            }));
        }
        agents.sort_by(|one, other| key(one).cmp(&key(other)));
        // One that goes from one controller to another may be at both.
        agents.dedup_by(|one, other| key(one) == key(other));
        if agents.is_empty() {
            let places = places.iter().map(Place::to_string);
            return Err(ReachError::NoAgents(places.collect::<Vec<_>>().join(", ")));
        }
        Ok(agents)
    }

    /// Where controllers are now.
    ///
    /// # Errors
    /// That cannot be found out.
    pub async fn places(&self) -> Result<Vec<Place>, ReachError> {
        let Some(sockets) = self.at_sockets() else {
            let cluster = self.cluster().await?;
            let pods = cluster.controllers().await?.into_iter();
            return Ok(pods.map(|it| Place::Pod(cluster.clone(), it)).collect());
        };
        Ok(sockets.into_iter().map(Place::Socket).collect())
    }

    /// The namespace that is meant where none is said: in a cluster, that of the kubeconfig's context.
    pub async fn namespace(&self) -> String {
        match self.at_sockets() {
            // What keeps the cluster from being found is said when it is asked.
            None => self.cluster().await.map(|it| it.namespace().to_owned()),
            Some(_) => Ok("default".to_owned()),
        }
        .unwrap_or_else(|_| "default".to_owned())
    }

    /// The cluster that the mesh is in; none: it has its objects from a directory.
    ///
    /// # Errors
    /// The cluster cannot be asked.
    pub async fn in_cluster(&self) -> Result<Option<&Arc<Cluster>>, ReachError> {
        match self.at_sockets() {
            Some(_) => Ok(None),
            None => Ok(Some(self.cluster().await?)),
        }
    }

    /// The sockets of controllers; none: they are in a cluster.
    fn at_sockets(&self) -> Option<Vec<PathBuf>> {
        if self.kubeconfig.is_some() || self.context.is_some() {
            return None;
        }
        if !self.sockets.is_empty() {
            return Some(self.sockets.clone());
        }
        let usual = Path::new(USUAL_SOCKET);
        usual.exists().then(|| vec![usual.to_owned()])
    }

    /// The cluster that kubectl would use, or that is named.
    pub(crate) async fn cluster(&self) -> Result<&Arc<Cluster>, ClusterError> {
        let connected = self.cluster.get_or_try_init(|| async {
            let connected = Cluster::connect(self).await;
            connected.map(Arc::new)
        });
        connected.await
    }
}

/// Where a controller has its socket, unless it is said otherwise.
pub(crate) const USUAL_SOCKET: &str = "/run/weft/controller.sock";

impl fmt::Display for Place {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Socket(socket) => socket.display().fmt(formatter),
            Self::Pod(cluster, pod) => write!(formatter, "pod {}/{pod}", cluster.weft_namespace()),
        }
    }
}

fn key(agent: &Agent) -> (&str, &str) {
    (&agent.status.node, &agent.status.incarnation)
}

impl Agent {
    /// A page of the agent: `metrics`, `recent?seconds=60`, `ready`, `pods` or `config_dump`.
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
        let answer = get(&self.place, &path).await;
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
        read(&self.place, page, &bytes)
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
pub async fn json<T: DeserializeOwned>(place: &Place, path: &str) -> Result<T, ReachError> {
    let bytes = get(place, path).await?;
    read(place, path, &bytes)
}

fn read<T: DeserializeOwned>(place: &Place, path: &str, bytes: &[u8]) -> Result<T, ReachError> {
    serde_json::from_slice(bytes).map_err(|error| ReachError::Broken {
        place: place.to_string(),
        path: path.to_owned(),
        reason: format!("{error}: is it of another version?"),
    })
}

/// What is at a path.
///
/// # Errors
/// There is no answer, or no good one.
pub async fn get(place: &Place, path: &str) -> Result<Bytes, ReachError> {
    let broken = |reason: String| ReachError::Broken {
        place: place.to_string(),
        path: path.to_owned(),
        reason,
    };
    let answered = timeout(PATIENCE, asked(place, path)).await;
    let answered = answered.map_err(|_| broken(format!("no answer in {} s", PATIENCE.as_secs())));
    let (status, bytes) = answered??.map_err(broken)?;
    if status != StatusCode::OK {
        return Err(refused(path, status, &bytes));
    }
    Ok(bytes)
}

/// What a controller says that says no.
fn refused(path: &str, status: StatusCode, bytes: &[u8]) -> ReachError {
    let reason = String::from_utf8_lossy(bytes);
    let reason: String = reason.trim().chars().take(1000).collect();
    ReachError::Refused(match reason.is_empty() {
        true => format!("the controller answers {path} with {status}"),
        false => reason,
    })
}

/// What was answered, or how the connection broke.
pub(crate) type Answered = Result<(StatusCode, Bytes), String>;

async fn asked(place: &Place, path: &str) -> Result<Answered, ReachError> {
    match place {
        Place::Socket(socket) => {
            let connected = UnixStream::connect(socket).await;
            let stream = connected.map_err(|reason| ReachError::Connect {
                socket: socket.to_owned(),
                reason,
            })?;
            Ok(exchange(stream, path, None).await)
        }
        Place::Pod(cluster, pod) => {
            let token = cluster.token().await?;
            let mut forwarded = cluster.forward(pod).await?;
            let exchanged = exchange(forwarded.stream()?, path, Some(token)).await;
            // What went wrong in the pod says more than how the connection broke.
            Ok(match exchanged {
                Ok(answered) => Ok(answered),
                Err(broken) => Err(forwarded.failure(&broken).await),
            })
        }
    }
}

/// An answer that comes line by line, as long as this is held.
pub struct Tail {
    body: Incoming,
    /// Bytes of a line that has not ended.
    rest: Vec<u8>,
    /// Lines that have come, the next one last.
    lines: Vec<Vec<u8>>,
    broken: (String, String),
    _connection: AbortOnDrop,
    _forwarded: Option<Forwarded>,
}

/// Ends a task with it.
struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Tail {
    /// Asks for what is at a path; in a cluster as an account that may watch a namespace.
    ///
    /// # Errors
    /// There is no answer, or no good one.
    pub async fn open(
        place: &Place,
        path: &str,
        account: (&str, &str),
    ) -> Result<Self, ReachError> {
        let broken = (place.to_string(), path.to_owned());
        let opened = async {
            match place {
                Place::Socket(socket) => {
                    let connected = UnixStream::connect(socket).await;
                    let stream = connected.map_err(|reason| ReachError::Connect {
                        socket: socket.to_owned(),
                        reason,
                    })?;
                    Ok((begin(stream, path, None).await, None))
                }
                Place::Pod(cluster, pod) => {
                    let token = cluster.token_to_tap(account).await?;
                    let mut forwarded = cluster.forward(pod).await?;
                    let begun = begin(forwarded.stream()?, path, Some(token)).await;
                    match begun {
                        Ok(begun) => Ok((Ok(begun), Some(forwarded))),
                        Err(error) => Ok((Err(forwarded.failure(&error).await), None)),
                    }
                }
            }
        };
        let opened: Result<Result<_, ReachError>, _> = timeout(PATIENCE, opened).await;
        let slow = |_| broken_off(&broken, format!("no answer in {} s", PATIENCE.as_secs()));
        let (begun, forwarded) = opened.map_err(slow)??;
        let (response, connection) = begun.map_err(|reason| broken_off(&broken, reason))?;
        let status = response.status();
        let mut body = response.into_body();
        if status != StatusCode::OK {
            let bytes = Limited::new(&mut body, MAX_ANSWER_BYTES).collect();
            let bytes = timeout(PATIENCE, bytes).await.ok().and_then(Result::ok);
            let bytes = bytes.map(|it| it.to_bytes()).unwrap_or_default();
            return Err(refused(path, status, &bytes));
        }
        Ok(Self {
            body,
            rest: vec![],
            lines: vec![],
            broken,
            _connection: connection,
            _forwarded: forwarded,
        })
    }

    /// The next line, without its end. None: there is none any more.
    ///
    /// # Errors
    /// It broke off.
    pub async fn line(&mut self) -> Result<Option<Vec<u8>>, ReachError> {
        loop {
            if let Some(line) = self.lines.pop() {
                return Ok(Some(line));
            }
            let frame = timeout(SILENCE, self.body.frame()).await;
            let silent = |_| broken_off(&self.broken, "it has fallen silent".to_owned());
            let Some(frame) = frame.map_err(silent)? else {
                return Ok(None);
            };
            let frame = frame.map_err(|error| broken_off(&self.broken, error.to_string()))?;
            let Ok(data) = frame.into_data() else {
                continue;
            };
            if self.rest.len() + data.len() > MAX_ANSWER_BYTES {
                return Err(broken_off(&self.broken, "a line has no end".to_owned()));
            }
            self.rest.extend_from_slice(&data);
            let Some(end) = self.rest.iter().rposition(|it| *it == b'\n') else {
                continue;
            };
            let rest = self.rest.split_off(end + 1);
            let whole = std::mem::replace(&mut self.rest, rest);
            let lines = whole.split(|it| *it == b'\n').filter(|it| !it.is_empty());
            self.lines = lines.map(<[u8]>::to_vec).collect();
            self.lines.reverse();
        }
    }
}

fn broken_off((place, path): &(String, String), reason: String) -> ReachError {
    ReachError::Broken {
        place: place.clone(),
        path: path.clone(),
        reason,
    }
}

/// An answer that has begun, or how the connection broke.
type Begun = Result<(Response<Incoming>, AbortOnDrop), String>;

async fn begin<S>(stream: S, path: &str, token: Option<HeaderValue>) -> Begun
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let text = |error: hyper::Error| error.to_string();
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(text)?;
    let driven = AbortOnDrop(tokio::spawn(async move {
        // Whoever waits for an answer hears of it.
        let _ = connection.await;
    }));
    let response = sender.send_request(request(path, token)?).await;
    Ok((response.map_err(text)?, driven))
}

fn request(path: &str, token: Option<HeaderValue>) -> Result<Request<Empty<Bytes>>, String> {
    let mut request = Request::builder()
        .uri(path)
        .header("host", "weft-controller")
        .body(Empty::<Bytes>::new())
        .map_err(|error| error.to_string())?;
    if let Some(token) = token {
        request.headers_mut().insert(AUTHORIZATION, token);
    }
    Ok(request)
}

async fn exchange<S>(stream: S, path: &str, token: Option<HeaderValue>) -> Answered
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    send(stream, request(path, token)?).await
}

/// Sends a request on a connection of its own.
pub(crate) async fn send<S>(stream: S, request: Request<Empty<Bytes>>) -> Answered
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let text = |error: hyper::Error| error.to_string();
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(text)?;
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
