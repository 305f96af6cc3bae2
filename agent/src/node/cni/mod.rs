//! The CNI plugin's side of the agent: a Unix socket for root, on which a runtime's plugin says that a pod is about to
//! start, and waits until the pod is in the mesh or is known not to belong there.
//!
//! The plugin hands over the pod's network namespace as a descriptor. From then on the pod is known by it
//! ([`Announced`]): whoever enrolls pods needs neither a process of it nor an address from the API server.

mod announced;
mod enrolling;
mod list;
mod request;

pub use announced::Announced;
pub use request::{Invalid, Request};

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use weft_admin::Socket;
use weft_cni::ask::Answer;

use crate::bpf::Standing;
use crate::discovery::Calls;
use crate::netns::Netns;
use crate::proxy::Context;
use crate::telemetry::{Kind, Samples, Source};
use enrolling::Enrolling;

/// Where the plugin finds what.
#[derive(Clone, Debug)]
pub struct CniConfig {
    /// The socket.
    pub socket: PathBuf,
    /// The list of namespaces.
    pub namespaces: PathBuf,
}

/// Serves the plugin, as long as this agent serves the node: an older one does until then.
pub async fn serve(
    config: CniConfig,
    context: Arc<Context>,
    calls: Arc<Calls>,
    stop: CancellationToken,
) {
    let counts = Arc::new(Counts::default());
    context.telemetry.add_source(Arc::clone(&counts) as _);
    let (store, pods) = (Arc::clone(&context.store), Arc::clone(&context.pods));
    let list = list::keep(store, Arc::clone(&pods), config.namespaces, stop.clone());
    let enrolling = Arc::new(Enrolling {
        host_cookie: Netns::current().and_then(|netns| netns.cookie()).ok(),
        context,
        calls,
    });
    let listening = async {
        let mut standing = pods.standings();
        // The sender lives as long as `pods`.
        let _ = standing.wait_for(|it| *it == Standing::Owner).await;
        let socket = loop {
            match Socket::open(&config.socket) {
                Ok(socket) => break socket,
                Err(error) => {
                    let path = config.socket.display();
                    tracing::error!(%path, %error, "listening for the CNI plugin; trying again");
                    tokio::time::sleep(OPEN_AGAIN).await;
                }
            }
        };
        tracing::info!(path = %config.socket.display(), "the CNI plugin may ask");
        accept(&socket, &enrolling, &counts, &stop).await;
    };
    tokio::select! {
        () = stop.cancelled() => {}
        ((), ()) = async { tokio::join!(list, listening) } => {}
    }
}

async fn accept(
    socket: &Socket,
    enrolling: &Arc<Enrolling>,
    counts: &Arc<Counts>,
    stop: &CancellationToken,
) {
    let mut open = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = socket.accept(), if open.len() < MAX_OPEN => accepted,
            Some(_) = open.join_next() => continue,
            () = stop.cancelled() => break,
        };
        match accepted {
            Ok(stream) => {
                let (enrolling, counts) = (Arc::clone(enrolling), Arc::clone(counts));
                open.spawn(serve_one(stream, enrolling, counts, stop.clone()));
            }
            Err(error) => {
                tracing::warn!(%error, "accepting the CNI plugin");
                tokio::time::sleep(ACCEPT_AGAIN).await;
            }
        }
    }
    // Each is told that this agent ends.
    while open.join_next().await.is_some() {}
}

async fn serve_one(
    mut stream: UnixStream,
    enrolling: Arc<Enrolling>,
    counts: Arc<Counts>,
    stop: CancellationToken,
) {
    let received = timeout(REQUEST_TIMEOUT, request::receive(&stream)).await;
    let received = received.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
    let (line, descriptor) = match received {
        Ok(received) => received,
        Err(error) => {
            tracing::debug!(%error, "reading a request of the CNI plugin");
            counts.count(Command::Unknown, Outcome::Invalid);
            return;
        }
    };
    let request = match Request::parse(&line) {
        Ok(request) => request,
        Err(error) => {
            tracing::warn!(%error, "refused a request of the CNI plugin");
            counts.count(Command::Unknown, Outcome::Invalid);
            let reason = format!(
                "the agent does not understand the plugin: {error}: are both of one version?"
            );
            // Of which pod it is, is not known here: the plugin knows it.
            answer(&mut stream, &Answer::Away { reason }).await;
            return;
        }
    };
    let command = Command::of(&request);
    let mut standing = enrolling.context.pods.standings();
    let is_superseded = |it: &Standing| matches!(it, Standing::Superseded { .. });
    let about = format!("{request:?}");
    let given = tokio::select! {
        given = answered(request, descriptor, &enrolling) => given,
        // Without an answer, so that the plugin asks the newer agent, whose socket that is by then or in a moment.
        _ = standing.wait_for(is_superseded) => {
            tracing::debug!(request = about, "left to the newer agent");
            return;
        }
        () = stop.cancelled() => Answer::Wait { reason: "the agent ends; another one starts".to_owned() },
    };
    match &given {
        Answer::Wait { reason } | Answer::Away { reason } => {
            tracing::warn!(request = about, reason, "a pod has to wait");
        }
        _ => tracing::debug!(request = about, answer = ?given, "answered the CNI plugin"),
    }
    counts.count(command, Outcome::of(&given));
    answer(&mut stream, &given).await;
}

async fn answered(
    request: Request,
    descriptor: Option<std::os::fd::OwnedFd>,
    enrolling: &Enrolling,
) -> Answer {
    match request {
        Request::Add(attachment) => enrolling.add(attachment, descriptor).await,
        Request::Check(asked) => enrolling.check(&asked).await,
        Request::Del(container) => {
            enrolling.announced().end(&container);
            Answer::Done
        }
        Request::Gc(network, containers) => {
            let containers = containers.into_iter().collect();
            enrolling.announced().keep(&network, &containers);
            Answer::Done
        }
    }
}

async fn answer(stream: &mut UnixStream, answer: &Answer) {
    // Texts only: nothing in it could fail.
    let mut line = serde_json::to_vec(answer).unwrap_or_default();
    line.push(b'\n');
    // The plugin may have given up.
    let _ = timeout(REQUEST_TIMEOUT, stream.write_all(&line)).await;
}

#[derive(Clone, Copy)]
enum Command {
    Add,
    Check,
    Del,
    Gc,
    Unknown,
}

#[derive(Clone, Copy)]
enum Outcome {
    Done,
    Enrolled,
    NotMeshed,
    Wait,
    Away,
    Invalid,
}

/// How often which request was answered how.
#[derive(Debug, Default)]
struct Counts([[AtomicU64; OUTCOMES.len()]; COMMANDS.len()]);

impl Command {
    fn of(request: &Request) -> Self {
        match request {
            Request::Add(_) => Self::Add,
            Request::Check(_) => Self::Check,
            Request::Del(_) => Self::Del,
            Request::Gc(..) => Self::Gc,
        }
    }
}

impl Outcome {
    fn of(answer: &Answer) -> Self {
        match answer {
            Answer::Done => Self::Done,
            Answer::Enrolled => Self::Enrolled,
            Answer::NotMeshed => Self::NotMeshed,
            Answer::Wait { .. } => Self::Wait,
            Answer::Away { .. } => Self::Away,
        }
    }
}

impl Counts {
    fn count(&self, command: Command, outcome: Outcome) {
        self.0[command as usize][outcome as usize].fetch_add(1, Ordering::Relaxed);
    }
}

impl Source for Counts {
    fn collect(&self, samples: &mut Samples) {
        let help = "Requests of the CNI plugin, by command and result";
        for (command, outcomes) in COMMANDS.iter().zip(&self.0) {
            for (result, count) in OUTCOMES.iter().zip(outcomes) {
                let count = count.load(Ordering::Relaxed);
                if count > 0 {
                    let labels = vec![
                        ("command", (*command).to_owned()),
                        ("result", (*result).to_owned()),
                    ];
                    let name = "weft_cni_requests";
                    samples.add(Kind::Counter, name, help, labels, count as f64);
                }
            }
        }
    }
}

/// As [`Command`] has them.
const COMMANDS: [&str; 5] = ["add", "check", "del", "gc", "unknown"];
/// As [`Outcome`] has them.
const OUTCOMES: [&str; 6] = ["done", "enrolled", "not_meshed", "wait", "away", "invalid"];
/// Pods that are being started at a time; more wait to be accepted.
const MAX_OPEN: usize = 512;
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
const OPEN_AGAIN: Duration = Duration::from_secs(1);
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);
