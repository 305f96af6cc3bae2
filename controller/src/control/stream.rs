//! One agent's stream: everything it lacks, then what changes.
//!
//! What is still to be sent is a list of references to shared resources; while an agent is slow,
//! changes are not collected for it but found out by comparison when it is ready again.

use std::collections::{HashMap, HashSet, VecDeque};
use std::future::Future;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};
use weft_core::Name;
use weft_proto::convert::{address_bytes, address_from};
use weft_proto::v1::controller_message::Message as ToAgent;
use weft_proto::v1::{self, agent_message::Message as FromAgent};
use weft_proto::{Key, Kind, PROTOCOL_VERSION};

use super::Caller;
use super::agents::{Agents, Connected, MAX_REJECTIONS};
use super::authentication::Authentication;
use super::push::{Outgoing, Push};
use crate::objects::ObjectKind;
use crate::progress::{Position, Progress};
use crate::telemetry::{Metrics, Refused};
use crate::views::{Difference, Told, Views};

/// What a stream works with.
#[derive(Clone, Debug)]
pub(super) struct Context {
    pub(super) views: Arc<Views>,
    pub(super) agents: Arc<Agents>,
    pub(super) authentication: Arc<Authentication>,
    pub(super) progress: Progress,
    pub(super) metrics: Arc<Metrics>,
    pub(super) stop: CancellationToken,
}

/// An agent's messages.
pub(super) trait Inbound: Send {
    /// The next one; none: the agent is gone.
    fn next(&mut self) -> impl Future<Output = Result<Option<v1::AgentMessage>, Status>> + Send;
}

/// Where messages to the agent go.
pub(super) type Outbound = mpsc::Sender<Result<Outgoing, Status>>;

/// What is still to be sent.
#[derive(Default)]
struct Outbox {
    changed: VecDeque<Arc<Told>>,
    removed: Vec<Key>,
    /// Whether the next push that empties the box completes the state.
    completes: bool,
    /// Answers to wants, each after what was pending when it was asked.
    looked: VecDeque<IpAddr>,
    /// The same, to tell who asks again.
    asked: HashSet<IpAddr>,
    /// What the agent knows of at most, of controllers before,
    before: Position,
    /// what all of this goes up to,
    position: Position,
    /// and what was said of that.
    said: Position,
    /// How many answers to pushes came.
    answers: u64,
}

/// How long the agent may take to say hello.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// How long changes are collected before they are sent.
const COLLECT: Duration = Duration::from_millis(20);
/// A push holds about this many bytes, far below the limit of a message: when a controller starts, one for every agent is
/// on its way.
const PUSH_BYTES: usize = 256 * 1024;
/// Unanswered questions of an agent. More get no answer: the agent gives up, and refuses.
const MAX_WANTS: usize = 4096;
/// An agent answers each push once: so many more are none's.
const SPARE_ANSWERS: u64 = 16;
/// More kinds than there are.
const MAX_KINDS: usize = 128;
/// The longest name of a resource: two names and an address, with room.
const MAX_KEY_BYTES: usize = 1024;

/// Serves the stream until it ends, and tells the agent why.
pub(super) async fn serve(
    context: Context,
    caller: Caller,
    inbound: impl Inbound,
    outbound: Outbound,
) {
    let ended = run(&context, &caller, inbound, &outbound).await;
    let node = caller.node;
    let ended = match ended {
        Ok(()) => {
            tracing::info!(%node, "the agent's stream ended");
            return;
        }
        Err(status) => status,
    };
    tracing::info!(%node, reason = ended.message(), code = ?ended.code(), "ending the agent's stream");
    // Nobody to tell if this fails.
    let _ = tokio::time::timeout(HELLO_TIMEOUT, outbound.send(Err(ended))).await;
}

async fn run(
    context: &Context,
    caller: &Caller,
    mut inbound: impl Inbound,
    outbound: &Outbound,
) -> Result<(), Status> {
    let Caller { node, token, from } = caller;
    let lapsed = context.authentication.lapsed(token, node, *from);
    let mut lapsed = std::pin::pin!(lapsed);
    let hello = hello(&mut inbound).await?;
    if hello.node != node.as_str() {
        context.metrics.refused(Refused::OtherNode);
        return Err(Status::permission_denied("the token is another node's"));
    }
    let connected =
        context
            .agents
            .connect(node, hello.incarnation, shortened(&hello.agent_version));
    let shown = shown(&hello.position)?;
    let held = held(hello.held)?;
    tracing::info!(%node, held = held.len(), "an agent is connected");
    let mut changes = context.views.changes();
    let mut outbox = Outbox {
        before: complete(context, &connected, &mut changes, (&shown, outbound)).await?,
        completes: true,
        ..Outbox::default()
    };
    let difference = context.views.beyond(node, held);
    let mut moment = difference.upto;
    outbox.put(difference, context.progress.told());
    let mut pushes = 0;
    let mut collected = false;
    loop {
        if collected && !outbox.has_push() {
            collected = false;
            let difference = context.views.since(node, moment);
            let difference = difference.map_err(|it| Status::unavailable(it.to_string()))?;
            moment = difference.upto;
            outbox.put(difference, context.progress.told());
        }
        tokio::select! {
            biased;
            () = connected.replaced.cancelled() => {
                return Err(Status::aborted("the agent opened another stream"));
            }
            () = context.stop.cancelled() => {
                return Err(Status::unavailable("the controller ends"));
            }
            status = &mut lapsed => return Err(status),
            permit = outbound.reserve(), if !outbox.is_empty() => {
                // The agent is gone.
                let Ok(permit) = permit else { return Ok(()) };
                if let Some(message) = outbox.next(&mut pushes, &connected, &context.metrics) {
                    permit.send(Ok(message));
                }
            }
            message = inbound.next() => {
                let Some(message) = message? else { return Ok(()) };
                // What is known of an address is known after what is pending.
                collected |= received(context, node, &connected, &mut outbox, message)?;
                if outbox.answers > pushes + SPARE_ANSWERS {
                    return Err(Status::resource_exhausted("more answers than there were pushes"));
                }
            }
            changed = changed(&mut changes, moment), if !collected && outbox.is_empty() => {
                changed?;
                collected = true;
            }
        }
    }
}

/// Takes in a message. True: it asks about an address.
fn received(
    context: &Context,
    node: &Name,
    connected: &Connected,
    outbox: &mut Outbox,
    message: v1::AgentMessage,
) -> Result<bool, Status> {
    match message.message {
        Some(FromAgent::Answer(answer)) => {
            outbox.answers += 1;
            answered(context, node, connected, answer);
            Ok(false)
        }
        Some(FromAgent::Want(want)) => outbox.want(&want).map(|()| true),
        Some(FromAgent::Hello(_)) => Err(Status::invalid_argument("a second hello")),
        None => Err(Status::invalid_argument("an empty message")),
    }
}

/// Waits for a change after a moment, and then for what comes with it. May be dropped and called
/// again.
async fn changed(changes: &mut watch::Receiver<u64>, moment: u64) -> Result<(), Status> {
    let later = changes.wait_for(|last| *last > moment).await;
    later.map_err(|_| Status::unavailable("the controller ends"))?;
    tokio::time::sleep(COLLECT).await;
    Ok(())
}

/// Waits until the source has told everything once, and as much as the agent knows of: it must not take an empty state
/// for the truth, nor an old one for a new one. What of that the state has.
async fn complete(
    context: &Context,
    connected: &Connected,
    changes: &mut watch::Receiver<u64>,
    (position, outbound): (&Position, &Outbound),
) -> Result<Position, Status> {
    let whole = async {
        while !context.views.is_complete() {
            let changed = changes.changed().await;
            changed.map_err(|_| Status::unavailable("the controller ends"))?;
        }
        let shown = Instant::now();
        let kinds = match context.progress.soon(position, shown).await {
            Ok(kept) => return Ok(kept),
            Err(kinds) => kinds,
        };
        let kinds: Vec<_> = kinds.iter().map(ObjectKind::to_string).collect();
        tracing::warn!(
            node = %connected.node(),
            kinds = kinds.join(", "),
            "an agent knows of later changes than were heard here: it is told nothing yet"
        );
        let message = Some(ToAgent::Behind(v1::Behind { kinds }));
        // One that is gone is noticed below.
        let _ = outbound
            .send(Ok(Outgoing::Other(v1::ControllerMessage { message })))
            .await;
        Ok(context.progress.reaches(position, shown).await)
    };
    tokio::select! {
        () = connected.replaced.cancelled() => {
            Err(Status::aborted("the agent opened another stream"))
        }
        () = context.stop.cancelled() => Err(Status::unavailable("the controller ends")),
        // Nobody needs to wait for it.
        () = outbound.closed() => Err(Status::cancelled("the agent is gone")),
        whole = whole => whole,
    }
}

/// What an agent knows of, of kinds that are known here.
fn shown(position: &HashMap<String, u64>) -> Result<Position, Status> {
    if position.len() > MAX_KINDS {
        return Err(Status::invalid_argument("position: of too many kinds"));
    }
    let kinds = ObjectKind::all().into_iter();
    let shown = kinds.filter_map(|kind| Some((kind, *position.get(&kind.to_string())?)));
    Ok(shown.collect())
}

async fn hello(inbound: &mut impl Inbound) -> Result<v1::Hello, Status> {
    let first = tokio::time::timeout(HELLO_TIMEOUT, inbound.next());
    let first = first
        .await
        .map_err(|_| Status::deadline_exceeded("no hello"))??;
    let Some(FromAgent::Hello(hello)) = first.and_then(|it| it.message) else {
        return Err(Status::invalid_argument("the first message is no hello"));
    };
    if hello.protocol != PROTOCOL_VERSION {
        let reason = format!(
            "protocol version {} is not spoken here: {PROTOCOL_VERSION}",
            hello.protocol
        );
        return Err(Status::failed_precondition(reason));
    }
    Ok(hello)
}

fn held(list: Vec<v1::Held>) -> Result<HashMap<Key, u64>, Status> {
    let mut held = HashMap::with_capacity(list.len());
    for it in list {
        let key = it
            .key
            .ok_or_else(|| Status::invalid_argument("held.key: missing"))?;
        let key = key.try_into().map_err(|error: weft_proto::ConvertError| {
            Status::invalid_argument(error.to_string())
        })?;
        held.insert(key, it.version);
    }
    Ok(held)
}

fn answered(context: &Context, node: &Name, connected: &Connected, answer: v1::Answer) {
    let rejections = answer.rejected.into_iter().filter_map(|it| {
        let key = Key::try_from(it.key?).ok()?;
        // What it was sent before something newer, whose answer is to come, or what is not its business.
        let version = context.views.version(node, &key);
        if key.name.len() > MAX_KEY_BYTES || version != Some(it.version) {
            return None;
        }
        Some((key, shortened(&it.reason)))
    });
    let rejections: Vec<_> = rejections.take(MAX_REJECTIONS).collect();
    if rejections.is_empty() {
        return;
    }
    context.metrics.rejected(node, rejections.len());
    connected.rejects(rejections);
}

impl Outbox {
    fn is_empty(&self) -> bool {
        !self.has_push() && self.looked.is_empty()
    }

    fn has_push(&self) -> bool {
        !self.changed.is_empty() || !self.removed.is_empty() || self.completes
    }

    /// Takes in what is to be sent; nothing of it is later than this position.
    fn put(&mut self, difference: Difference, position: Position) {
        self.position = position;
        for (kind, version) in &self.before {
            let reached = self.position.entry(*kind).or_default();
            *reached = (*version).max(*reached);
        }
        let mut changed = difference.changed;
        // What others refer to comes first, wherever one push is not enough.
        changed.sort_by_key(|it| order(it.key.kind));
        self.changed.extend(changed);
        self.removed.extend(difference.removed);
    }

    fn want(&mut self, want: &v1::Want) -> Result<(), Status> {
        let address = address_from("want.address", &want.address);
        let address = address.map_err(|error| Status::invalid_argument(error.to_string()))?;
        if self.asked.len() < MAX_WANTS && self.asked.insert(address) {
            self.looked.push_back(address);
        }
        Ok(())
    }

    /// The next message.
    fn next(
        &mut self,
        pushes: &mut u64,
        connected: &Connected,
        metrics: &Metrics,
    ) -> Option<Outgoing> {
        if self.has_push() {
            *pushes += 1;
            return Some(Outgoing::Push(self.push(*pushes, connected, metrics)));
        }
        let address = self.looked.pop_front()?;
        self.asked.remove(&address);
        let looked = v1::Looked {
            address: address_bytes(address),
        };
        Some(Outgoing::Other(v1::ControllerMessage {
            message: Some(ToAgent::Looked(looked)),
        }))
    }

    fn push(&mut self, id: u64, connected: &Connected, metrics: &Metrics) -> Push {
        let mut changed = vec![];
        let mut rest = v1::Push {
            id,
            ..v1::Push::default()
        };
        let mut bytes = 0;
        while bytes < PUSH_BYTES
            && let Some(resource) = self.changed.pop_front()
        {
            bytes += resource.encoded.len();
            changed.push(resource);
        }
        connected.sends(changed.iter().map(|it| &it.key));
        // Removals follow everything that may take their place.
        let mut removed = vec![];
        while self.changed.is_empty()
            && bytes < PUSH_BYTES
            && let Some(key) = self.removed.pop()
        {
            bytes += key.name.len() + 16;
            removed.push(key);
        }
        connected.sends(&removed);
        rest.removed = removed.into_iter().map(Into::into).collect();
        for (kind, version) in &self.position {
            if self.said.get(kind) != Some(version) {
                rest.position.insert(kind.to_string(), *version);
                self.said.insert(*kind, *version);
            }
        }
        rest.complete = self.completes && self.changed.is_empty() && self.removed.is_empty();
        self.completes &= !rest.complete;
        metrics.pushed(changed.len(), rest.removed.len());
        Push { changed, rest }
    }
}

fn order(kind: Kind) -> u8 {
    match kind {
        Kind::Cluster | Kind::TrustBundle => 0,
        Kind::Server | Kind::EgressNetwork => 1,
        Kind::WorkloadPolicy => 2,
        Kind::Workload => 3,
        Kind::Service => 4,
        Kind::Endpoint => 5,
        Kind::RouteTable => 6,
        Kind::NodePod => 7,
        Kind::MeshNamespace => 8,
    }
}

impl Inbound for Streaming<v1::AgentMessage> {
    async fn next(&mut self) -> Result<Option<v1::AgentMessage>, Status> {
        self.message().await
    }
}

/// What an agent says, in bounds, and in one line that says what it seems to.
fn shortened(text: &str) -> String {
    let plain = |it: char| match it {
        '"' | '\'' | '\\' => it.to_string(),
        it => it.escape_debug().to_string(),
    };
    text.chars().take(512).map(plain).collect()
}

#[cfg(test)]
mod tests {
    use weft_core::Service;
    use weft_proto::{MAX_MESSAGE_BYTES, Resource};

    use super::*;
    use crate::problems::Problems;

    #[test]
    fn what_agents_say_is_one_line() {
        let said = shortened("a \"b\"\n\u{1b}[2J\u{202e}\u{9b}");
        assert_eq!(said, "a \"b\"\\n\\u{1b}[2J\\u{202e}\\u{9b}");
        assert_eq!(shortened(&"é".repeat(1000)).chars().count(), 512);
    }

    #[test]
    fn questions_are_bounded() {
        let mut outbox = Outbox::default();
        let want = |address: Vec<u8>| v1::Want { address };
        for bytes in [0, 5, 8 * 1024 * 1024] {
            let refused = outbox.want(&want(vec![7; bytes])).expect_err("no address");
            assert_eq!(refused.code(), tonic::Code::InvalidArgument);
        }
        for number in 0..2 * MAX_WANTS as u32 {
            for _ in 0..2 {
                let address = number.to_be_bytes().to_vec();
                outbox.want(&want(address)).expect("an address");
            }
        }
        assert_eq!(outbox.looked.len(), MAX_WANTS);
    }

    #[test]
    fn large_states_are_cut_into_pushes() {
        let service = |index: usize| {
            let name = format!("namespace-of-a-usual-length/service-{index}");
            let service = Service {
                name: name.parse().expect("valid"),
                addresses: vec!["10.2.0.1".parse().expect("valid")],
                ports: vec![],
                internal_traffic: Default::default(),
                failure_accrual: None,
            };
            let service = Resource::Service(service);
            Arc::new(Told::new(service.key(), &service.into()))
        };
        let gone = |index: usize| Key {
            kind: weft_proto::Kind::Workload,
            name: format!("namespace-of-a-usual-length/{index}"),
        };
        let mut outbox = Outbox {
            completes: true,
            ..Outbox::default()
        };
        let (changed, removed) = (40_000, 30_000);
        let difference = Difference {
            changed: (0..changed).map(service).collect(),
            removed: (0..removed).map(gone).collect(),
            upto: 1,
        };
        outbox.before = Position::from([(ObjectKind::Node, 9), (ObjectKind::Pod, 3)]);
        outbox.put(difference, Position::from([(ObjectKind::Pod, 7)]));
        outbox
            .want(&v1::Want {
                address: vec![10, 0, 0, 1],
            })
            .expect("an address");
        let agents = Arc::new(Agents::new(Problems::default()));
        let connected = agents.connect(&"one".parse().expect("valid"), 1, String::new());
        let (mut pushes, mut counted, mut looked) = (0, (0, 0), false);
        while let Some(message) = outbox.next(&mut pushes, &connected, &Metrics::default()) {
            use prost::Message;
            let message = message.read();
            assert!(message.encoded_len() < MAX_MESSAGE_BYTES / 4);
            match message.message.expect("not empty") {
                ToAgent::Push(push) => {
                    assert!(!looked, "looked comes after what is pending");
                    assert_eq!(push.id, pushes);
                    let said = |kind| push.position.get(kind).copied();
                    let first = (Some(7), Some(9));
                    let said = (said("Pod"), said("Node"));
                    assert_eq!(said, if pushes == 1 { first } else { (None, None) });
                    counted = (
                        counted.0 + push.changed.len(),
                        counted.1 + push.removed.len(),
                    );
                    assert_eq!(push.complete, counted == (changed, removed));
                    assert!(push.removed.is_empty() || counted.0 == changed);
                }
                ToAgent::Looked(_) => looked = true,
                ToAgent::Behind(_) => panic!("not said here"),
            }
        }
        assert!(pushes > 3 && looked && outbox.is_empty());
        assert_eq!(counted, (changed, removed));
    }
}
