//! The control stream's client: keeps the store current for as long as the controller is there.
//!
//! It says what it holds, applies each push as one, answers what it could not use, and goes to another controller at
//! once when the stream ends; when all have failed it comes back with backoff. It never empties the store: only a
//! controller removes.

use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tonic::Status;
use tracing::{debug, info, warn};
use weft_core::{EgressNetwork, Name};
use weft_proto::convert::{address_bytes, address_from, closed_egress};
use weft_proto::v1::controller_message::Message;
use weft_proto::{Key, MAX_MESSAGE_BYTES, PROTOCOL_VERSION, Resource, v1};

use super::asks::{Asks, Discovery};
use super::backoff;
use super::controller::{Connection, Controller, ControllerError};
use super::inspect::{self, Answers, Inspected};
use super::position::Position;
use super::state::StreamState;
use super::store::{Destination, Store, is_reachable};
use super::tap::{self, Tapped};
use crate::telemetry::tap::Taps;

/// The client. [`ControlStream::run`] is its task.
pub struct ControlStream {
    controller: Arc<Controller>,
    store: Arc<Store>,
    node: Name,
    incarnation: u64,
    asks: Arc<Asks>,
    wants: mpsc::Receiver<IpAddr>,
    state: watch::Sender<StreamState>,
    unsaid: Unsaid,
    /// How far that goes which is held.
    position: Position,
    /// The controller that the stream is to.
    at: Option<SocketAddr>,
    /// What the controller is answered when people ask about this agent.
    answers: Option<Answers>,
    /// Those who watch.
    taps: Option<Arc<Taps>>,
}

/// What is held, but not said in the Hello of this stream as it would have been too large: gone
/// unless sent again before everything was.
#[derive(Default)]
struct Unsaid(HashSet<Key>);

/// A push, checked.
#[derive(Default)]
struct Checked {
    changed: Vec<(Resource, u64)>,
    /// Names of what is changed.
    accepted: Vec<Key>,
    removed: Vec<Key>,
    rejected: Vec<v1::Rejection>,
    /// What holds in place of those, where nothing is held.
    closed: Vec<EgressNetwork>,
}

#[derive(Debug, thiserror::Error)]
enum StreamError {
    #[error(transparent)]
    Connect(#[from] ControllerError),
    #[error("the control stream broke off: {} ({:?})", .0.message(), .0.code())]
    Broken(Status),
    #[error("the controller did not answer within {} s", SUBSCRIBE_TIMEOUT.as_secs())]
    Silent,
    #[error("the controller told nothing within {} s", .0.as_secs())]
    Mute(Duration),
    #[error(
        "the controller has not heard of all changes that this agent knows of, within {} s: {kinds}: can it reach the \
         API server?",
        .patience.as_secs()
    )]
    Behind { patience: Duration, kinds: String },
    #[error("the controller ended the stream")]
    Ended,
    #[error("applying a push failed: {0}")]
    Apply(tokio::task::JoinError),
}

impl StreamError {
    fn is_of_address(&self) -> bool {
        matches!(self, Self::Connect(error) if error.is_of_address())
    }
}

impl ControlStream {
    /// The client of a node's agent, and the handle that the data path asks with.
    pub fn new(
        controller: Arc<Controller>,
        store: Arc<Store>,
        node: Name,
    ) -> (ControlStream, Discovery) {
        let (asks, wants) = Asks::new();
        let (state, receiver) = watch::channel(StreamState::default());
        let discovery = Discovery::new(Arc::clone(&store), Arc::clone(&asks), receiver);
        let stream = Self {
            controller,
            store,
            node,
            incarnation: rand::random(),
            asks,
            wants,
            state,
            unsaid: Unsaid::default(),
            position: Position::default(),
            at: None,
            answers: None,
            taps: None,
        };
        (stream, discovery)
    }

    /// The same, with answers to what the controller is asked about this agent.
    pub fn answering(mut self, answers: Answers) -> Self {
        self.answers = Some(answers);
        self
    }

    /// The same, with samples for those who watch by the controller.
    pub fn tapped(mut self, taps: Arc<Taps>) -> Self {
        self.taps = Some(taps);
        self
    }

    /// Streams until stopped, whatever happens to the controller.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut failures = 0_u32;
        let mut last_error = String::new();
        loop {
            let began = Instant::now();
            let session = Box::pin(self.session());
            let error = tokio::select! {
                Err(error) = session => error,
                () = stop.cancelled() => return,
            };
            let worked = self.state.borrow().current && began.elapsed() >= STEADY;
            if worked {
                failures = 0;
                self.controller.begin_round();
            }
            let mut failed = error.is_of_address();
            if let Some(address) = self.at.take() {
                self.controller.uses(None);
                self.controller.failed(address);
                failed = true;
            }
            // Whoever has not failed yet is not waited for; what fails before anybody is asked fails again.
            let delay = if failed && self.controller.has_untried() {
                Duration::ZERO
            } else {
                failures = failures.saturating_add(1);
                backoff::delay(failures, RETRY_BASE, RETRY_MAX, rand::random())
            };
            let text = error.to_string();
            self.ended(&text, delay);
            if text == last_error {
                debug!(
                    error = text,
                    failures,
                    ?delay,
                    "control stream failed again"
                );
            } else {
                warn!(
                    error = text,
                    ?delay,
                    "control stream failed; keeping what is known"
                );
                last_error = text;
            }
            if delay > Duration::ZERO {
                tokio::select! {
                    () = sleep(delay) => self.controller.begin_round(),
                    () = stop.cancelled() => return,
                }
            }
        }
    }

    /// One stream, until it fails.
    async fn session(&mut self) -> Result<std::convert::Infallible, StreamError> {
        let mut connection = self.controller.connect().await?;
        self.at = Some(connection.address);
        let (sender, receiver) = mpsc::channel(SEND_QUEUE);
        let mut hello = self
            .unsaid
            .hello(&self.node, self.incarnation, self.store.held());
        hello.position = self.position.begin();
        send(&sender, v1::agent_message::Message::Hello(hello)).await?;
        let request = connection.request(ReceiverStream::new(receiver));
        let subscribed = timeout(SUBSCRIBE_TIMEOUT, connection.client.subscribe(request)).await;
        let response = subscribed.map_err(|_| StreamError::Silent)?;
        let mut messages = response.map_err(StreamError::Broken)?.into_inner();
        info!(controller = %connection.address, "control stream open");
        self.controller.uses(self.at);
        self.state.send_modify(|state| {
            state.connected = true;
            state.controller = self.at;
            state.connects += 1;
        });
        let _asked = (self.inspected(&connection), self.watched(&connection));
        // What piled up while nobody listened is old, or among these.
        while self.wants.try_recv().is_ok() {}
        for address in self.asks.outstanding() {
            send(&sender, want(address)).await?;
        }
        let patience = self.patience();
        let mute = patience.map(|it| Instant::now() + it);
        let (mut heard, mut behind) = (false, None);
        loop {
            tokio::select! {
                message = messages.message() => {
                    let message = message.map_err(StreamError::Broken)?;
                    let message = message.ok_or(StreamError::Ended)?;
                    if let Some(Message::Behind(it)) = message.message {
                        behind = Some(self.is_behind(&it));
                        continue;
                    }
                    heard = true;
                    self.receive(message, &sender).await?;
                }
                () = until(mute), if !heard => {
                    let patience = patience.unwrap_or_default();
                    return Err(match behind {
                        Some(kinds) => StreamError::Behind { patience, kinds },
                        None => StreamError::Mute(patience),
                    });
                }
                Some(address) = self.wants.recv() => if self.asks.is_outstanding(address) {
                    send(&sender, want(address)).await?;
                }
            }
        }
    }

    /// Lets the controller ask, until this is dropped.
    fn inspected(&self, connection: &Connection) -> Option<AbortOnDropHandle<()>> {
        let inspected = Inspected {
            node: self.node.clone(),
            incarnation: self.incarnation,
            answers: self.answers.clone()?,
        };
        let answering = inspect::answer(connection.clone(), inspected);
        Some(AbortOnDropHandle::new(tokio::spawn(answering)))
    }

    /// Lets people watch by the controller, until this is dropped.
    fn watched(&self, connection: &Connection) -> Option<AbortOnDropHandle<()>> {
        let tapped = Tapped {
            node: self.node.clone(),
            incarnation: self.incarnation,
            taps: self.taps.clone()?,
        };
        let serving = tap::serve(connection.clone(), tapped);
        Some(AbortOnDropHandle::new(tokio::spawn(serving)))
    }

    /// How long a controller may take to begin: one that cannot tell anything yet, or not now, is left for another.
    fn patience(&self) -> Option<Duration> {
        match (
            self.controller.has_several(),
            self.controller.has_untried_but(self.at),
        ) {
            (true, true) => Some(FIRST_PATIENCE),
            (true, false) => Some(LAST_PATIENCE),
            (false, _) => None,
        }
    }

    async fn receive(
        &mut self,
        message: v1::ControllerMessage,
        sender: &mpsc::Sender<v1::AgentMessage>,
    ) -> Result<(), StreamError> {
        let now = Instant::now();
        self.state
            .send_modify(|state| state.last_message = Some(now));
        match message.message {
            Some(Message::Push(push)) => self.push(push, sender).await,
            Some(Message::Looked(looked)) => {
                self.looked(&looked.address);
                Ok(())
            }
            // The first was taken before this; or it is a kind of message from the future.
            Some(Message::Behind(_)) | None => Ok(()),
        }
    }

    /// The controller tells nothing yet, as it is behind: in these kinds.
    fn is_behind(&self, message: &v1::Behind) -> String {
        let kinds = message.kinds.iter().take(MAX_KINDS_SHOWN);
        let kinds: Vec<_> = kinds.map(|it| it.escape_debug().to_string()).collect();
        let kinds = kinds.join(", ");
        warn!(
            kinds,
            "the controller has not heard yet of all changes that this agent knows of; keeping what is known"
        );
        self.state.send_modify(|state| state.behind += 1);
        kinds
    }

    async fn push(
        &mut self,
        mut push: v1::Push,
        sender: &mpsc::Sender<v1::AgentMessage>,
    ) -> Result<(), StreamError> {
        let (id, complete) = (push.id, push.complete);
        // Before it is applied: a part of it may be in force as soon as it begins to be.
        self.position
            .told(std::mem::take(&mut push.position), complete);
        let unsaid = self.unsaid.still(&push);
        let store = Arc::clone(&self.store);
        // Megabytes of first state would hold up a thread of the agent's own, which has other things to do.
        let work = tokio::task::spawn_blocking(move || {
            let mut checked = Checked::new(push);
            checked.removed.extend(unsaid);
            let removed = checked.removed.clone();
            for closed in std::mem::take(&mut checked.closed) {
                // Where there is none, everything would leave the cluster.
                if !store.holds_egress(closed.name()) {
                    checked
                        .changed
                        .push((Resource::EgressNetwork(closed), UNUSABLE));
                }
            }
            store.apply_push(std::mem::take(&mut checked.changed), removed);
            if complete {
                store.set_complete();
            }
            checked
        });
        let checked = work.await.map_err(StreamError::Apply)?;
        for rejection in &checked.rejected {
            let name = rejection.key.as_ref().map_or("", |key| &key.name);
            warn!(
                name,
                reason = rejection.reason,
                "rejected a resource; the last good one stays"
            );
        }
        debug!(
            id,
            complete,
            changed = checked.accepted.len(),
            removed = checked.removed.len(),
            "applied a push"
        );
        self.pushed(&checked, complete);
        let answer = v1::Answer {
            push: id,
            rejected: checked.rejected,
        };
        send(sender, v1::agent_message::Message::Answer(answer)).await
    }

    fn pushed(&self, checked: &Checked, complete: bool) {
        self.state.send_modify(|state| {
            state.pushes += 1;
            state.rejections += checked.rejected.len() as u64;
            if !state.rejected.is_empty() {
                for key in checked.accepted.iter().chain(&checked.removed) {
                    state.rejected.remove(&key.to_string());
                }
            }
            for rejection in &checked.rejected {
                if state.rejected.len() < MAX_REJECTED_SHOWN {
                    let key = rejected_key(rejection);
                    state.rejected.insert(key, rejection.reason.clone());
                }
            }
            state.current |= complete;
            state.complete |= complete;
        });
    }

    fn looked(&self, address: &[u8]) {
        let Ok(address) = address_from("looked.address", address) else {
            return;
        };
        let address = address.to_canonical();
        let destination = self.store.classify((address, 0).into());
        let found = !matches!(destination, Destination::Unknown);
        self.asks.looked(address, found);
    }

    fn ended(&self, error: &str, delay: Duration) {
        self.state.send_modify(|state| {
            if state.current {
                state.current_until = Some(Instant::now());
            }
            state.connected = false;
            state.current = false;
            state.controller = None;
            state.failures += 1;
            state.retry_delay = delay;
            state.last_error = Some(error.to_owned());
        });
    }
}

impl Unsaid {
    /// The Hello of a new stream.
    fn hello(&mut self, node: &Name, incarnation: u64, held: Vec<(Key, u64)>) -> v1::Hello {
        self.0.clear();
        let mut hello = v1::Hello {
            node: node.to_string(),
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            protocol: PROTOCOL_VERSION,
            held: Vec::with_capacity(held.len()),
            incarnation,
            ..v1::Hello::default()
        };
        let mut bytes = 0;
        for (key, version) in held {
            bytes += key.name.len() + HELD_OVERHEAD_BYTES;
            if bytes > MAX_HELD_BYTES {
                self.0.insert(key);
            } else {
                let key = Some(key.into());
                hello.held.push(v1::Held { key, version });
            }
        }
        hello
    }

    /// Takes out what a push speaks of. With the push that completes the state, the rest turns out
    /// to be gone.
    fn still(&mut self, push: &v1::Push) -> Vec<Key> {
        if self.0.is_empty() {
            return Vec::new();
        }
        for resource in &push.changed {
            if let Some(key) = resource.key.clone().and_then(|it| Key::try_from(it).ok()) {
                self.0.remove(&key);
            }
        }
        if push.complete {
            self.0.drain().collect()
        } else {
            Vec::new()
        }
    }
}

impl Checked {
    fn new(push: v1::Push) -> Self {
        let mut checked = Self::default();
        for resource in push.changed {
            checked.put(resource);
        }
        // A kind from the future cannot be held either.
        let removed = push.removed.into_iter().map(Key::try_from);
        checked.removed = removed.filter_map(Result::ok).collect();
        checked
    }

    fn put(&mut self, message: v1::Resource) {
        let (key, version) = (message.key.clone(), message.version);
        let egress = match &message.body {
            Some(v1::resource::Body::EgressNetwork(it)) => Some(it.clone()),
            _ => None,
        };
        let resource = Resource::try_from(message).map_err(|error| error.to_string());
        match resource.and_then(usable) {
            Ok(resource) => {
                self.accepted.push(resource.key());
                self.changed.push((resource, version));
            }
            Err(reason) => {
                self.closed.extend(egress.and_then(closed_egress));
                self.rejected.push(v1::Rejection {
                    key,
                    version,
                    reason,
                });
            }
        }
    }
}

/// What is well-formed and still cannot be used.
fn usable(resource: Resource) -> Result<Resource, String> {
    match &resource {
        Resource::TrustBundle(bundle) => {
            crate::identity::check_roots(bundle).map_err(|error| error.to_string())?;
        }
        Resource::Workload(workload) => {
            let mut addresses = workload.addresses.iter().map(|it| it.to_canonical());
            if let Some(address) = addresses.find(|it| !is_reachable(*it)) {
                return Err(format!("workload.addresses: {address} is no workload's"));
            }
        }
        Resource::NodePod(pod) => {
            if let Some(path) = pod.netns.as_ref().filter(|path| !path.is_absolute()) {
                return Err(format!("node_pod.netns: {path:?} is not absolute"));
            }
        }
        _ => {}
    }
    Ok(resource)
}

async fn send(
    sender: &mpsc::Sender<v1::AgentMessage>,
    message: v1::agent_message::Message,
) -> Result<(), StreamError> {
    let message = v1::AgentMessage {
        message: Some(message),
    };
    sender.send(message).await.map_err(|_| StreamError::Ended)
}

fn want(address: IpAddr) -> v1::agent_message::Message {
    v1::agent_message::Message::Want(v1::Want {
        address: address_bytes(address),
    })
}

fn rejected_key(rejection: &v1::Rejection) -> String {
    let Some(key) = &rejection.key else {
        return "a resource without a key".to_owned();
    };
    match Key::try_from(key.clone()) {
        Ok(key) => key.to_string(),
        Err(_) => format!("a resource of unknown kind, {}", key.name),
    }
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}

const RETRY_BASE: Duration = Duration::from_millis(200);
const RETRY_MAX: Duration = Duration::from_secs(5);
/// A stream that lived this long was no part of a row of failures.
const STEADY: Duration = Duration::from_secs(5);
/// How long a controller may take to tell something if there is another to be tried,
const FIRST_PATIENCE: Duration = Duration::from_secs(3);
/// and if all others have just failed.
const LAST_PATIENCE: Duration = Duration::from_secs(20);
const SUBSCRIBE_TIMEOUT: Duration = Duration::from_secs(10);
const SEND_QUEUE: usize = 256;
/// What a Hello spends on what is held, well below what a message may have.
const MAX_HELD_BYTES: usize = MAX_MESSAGE_BYTES / 4 * 3;
/// What an entry of the Hello takes beside the name, at most.
const HELD_OVERHEAD_BYTES: usize = 32;
/// No version that anything is pushed with: the controller sends it again.
const UNUSABLE: u64 = 0;
/// Kinds of objects that a controller is behind in, in logs.
const MAX_KINDS_SHOWN: usize = 5;
const MAX_REJECTED_SHOWN: usize = 1000;

#[cfg(test)]
#[path = "stream_tests.rs"]
mod tests;
