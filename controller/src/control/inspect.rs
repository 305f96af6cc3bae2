//! Questions to agents, for people who ask the controller: each agent answers on a stream that it opened itself, so that
//! no port of it is open for that.
//!
//! An agent is believed about itself and nothing else. What it may make this process hold is bounded: the size of an
//! answer, the time that it takes, and how many are on their way at once.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};
use weft_core::Name;
use weft_proto::v1::{self, Page, inspect_answer::Message};

use super::Caller;
use super::authentication::Authentication;
use crate::telemetry::{Metrics, Refused};

/// The agents that can be asked.
#[derive(Debug)]
pub struct Inspections {
    state: Mutex<State>,
    at_once: Semaphore,
}

#[derive(Debug, Default)]
struct State {
    next: u64,
    /// Oldest first; never empty.
    agents: HashMap<Name, Vec<Agent>>,
}

/// An agent that can be asked.
#[derive(Debug)]
struct Agent {
    number: u64,
    incarnation: u64,
    questions: mpsc::Sender<Question>,
    replaced: CancellationToken,
}

#[derive(Debug)]
struct Question {
    page: Page,
    query: String,
    answer: oneshot::Sender<Result<Vec<u8>, AskError>>,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// Nobody is there.
    #[error(
        "no agent {incarnation:016x} of node {node} can be asked here: it is gone, connected to another controller, or \
         older than the question"
    )]
    Nobody {
        /// The node.
        node: Name,
        /// The process.
        incarnation: u64,
    },
    /// It took too long.
    #[error("the agent did not answer within {} s", PATIENCE.as_secs())]
    Slow,
    /// It said no.
    #[error("the agent refuses: {0}")]
    Refused(String),
    /// It said too much.
    #[error(
        "the agent's answer has more than {} MiB: ask the agent itself, on its node, at its admin socket",
        MAX_ANSWER_BYTES / 1024 / 1024
    )]
    TooLarge,
    /// It went away.
    #[error("the agent's stream ended before it had answered")]
    Gone,
}

/// What a stream works with.
#[derive(Clone, Debug)]
pub(super) struct Context {
    pub(super) inspections: Arc<Inspections>,
    pub(super) authentication: Arc<Authentication>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) stop: CancellationToken,
}

/// An agent's place among those that can be asked, as long as its stream is open.
struct Place {
    inspections: Arc<Inspections>,
    node: Name,
    number: u64,
    questions: mpsc::Receiver<Question>,
    replaced: CancellationToken,
}

/// How long an agent may take for an answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long an agent may take to say who it is.
const FIRST_WORD: Duration = Duration::from_secs(10);
/// An answer is held here as a whole.
const MAX_ANSWER_BYTES: usize = 32 * 1024 * 1024;
/// Answers that are on their way at the same time.
const AT_ONCE: usize = 8;
/// As of the streams of state.
const MAX_PER_NODE: usize = 4;

impl Default for Inspections {
    fn default() -> Self {
        Self {
            state: Mutex::default(),
            at_once: Semaphore::new(AT_ONCE),
        }
    }
}

impl Inspections {
    /// Asks an agent for a page, and of a page that is about something, for what the query says.
    ///
    /// # Errors
    /// There is no answer, and why.
    pub async fn ask(
        &self,
        node: &Name,
        incarnation: u64,
        (page, query): (Page, &str),
    ) -> Result<Vec<u8>, AskError> {
        // It is never closed.
        let _turn = self.at_once.acquire().await;
        let asked = async {
            let questions = self.questions(node, incarnation);
            let questions = questions.ok_or_else(|| AskError::Nobody {
                node: node.clone(),
                incarnation,
            })?;
            let (answer, answered) = oneshot::channel();
            let question = Question {
                page,
                query: query.to_owned(),
                answer,
            };
            questions.send(question).await.map_err(|_| AskError::Gone)?;
            answered.await.map_err(|_| AskError::Gone)?
        };
        timeout(PATIENCE, asked)
            .await
            .unwrap_or(Err(AskError::Slow))
    }

    fn questions(&self, node: &Name, incarnation: u64) -> Option<mpsc::Sender<Question>> {
        let state = self.locked();
        let mut agents = state.agents.get(node)?.iter();
        let agent = agents.find(|it| it.incarnation == incarnation)?;
        Some(agent.questions.clone())
    }

    /// Whether an agent can be asked.
    pub fn has(&self, node: &Name, incarnation: u64) -> bool {
        self.questions(node, incarnation).is_some()
    }

    /// Takes in a stream. An older one of the same process is told to end.
    fn enter(self: &Arc<Self>, node: &Name, incarnation: u64) -> Place {
        let (sender, questions) = mpsc::channel(1);
        let mut state = self.locked();
        state.next += 1;
        let (number, replaced) = (state.next, CancellationToken::new());
        let agents = state.agents.entry(node.clone()).or_default();
        for older in agents.extract_if(.., |it| it.incarnation == incarnation) {
            older.replaced.cancel();
        }
        if agents.len() >= MAX_PER_NODE {
            agents.remove(0).replaced.cancel();
        }
        agents.push(Agent {
            number,
            incarnation,
            questions: sender,
            replaced: replaced.clone(),
        });
        drop(state);
        Place {
            inspections: self.clone(),
            node: node.clone(),
            number,
            questions,
            replaced,
        }
    }

    fn locked(&self) -> MutexGuard<'_, State> {
        // Single inserts and removes only: a panic elsewhere leaves it whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = self.inspections.locked();
        if let Some(agents) = state.agents.get_mut(&self.node) {
            agents.retain(|it| it.number != self.number);
            if agents.is_empty() {
                state.agents.remove(&self.node);
            }
        }
    }
}

/// An agent's messages.
pub(super) trait Inbound: Send {
    /// The next one; none: the agent is gone.
    fn next(&mut self) -> impl Future<Output = Result<Option<v1::InspectAnswer>, Status>> + Send;
}

impl Inbound for Streaming<v1::InspectAnswer> {
    async fn next(&mut self) -> Result<Option<v1::InspectAnswer>, Status> {
        self.message().await
    }
}

/// Where questions to the agent go.
type Outbound = mpsc::Sender<Result<v1::InspectQuestion, Status>>;

/// Serves the stream until it ends, and tells the agent why.
pub(super) async fn serve(
    context: Context,
    caller: Caller,
    inbound: impl Inbound,
    outbound: Outbound,
) {
    if let Err(ended) = run(&context, &caller, inbound, &outbound).await {
        let (node, reason) = (caller.node, ended.message());
        tracing::debug!(%node, reason, code = ?ended.code(), "ending the agent's stream of answers");
        // Nobody to tell if this fails.
        let _ = timeout(FIRST_WORD, outbound.send(Err(ended))).await;
    }
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
    let first = timeout(FIRST_WORD, inbound.next()).await;
    let first = first.map_err(|_| Status::deadline_exceeded("nobody said who can be asked"))??;
    let Some(Message::Inspectable(agent)) = first.and_then(|it| it.message) else {
        return Err(Status::invalid_argument(
            "it does not begin with who can be asked",
        ));
    };
    if agent.node != node.as_str() {
        context.metrics.refused(Refused::OtherNode);
        return Err(Status::permission_denied("the token is another node's"));
    }
    let mut place = context.inspections.enter(node, agent.incarnation);
    let mut id = 0;
    loop {
        let question = tokio::select! {
            biased;
            () = place.replaced.cancelled() => {
                return Err(Status::aborted("the agent opened another stream"));
            }
            () = context.stop.cancelled() => {
                return Err(Status::unavailable("the controller ends"));
            }
            status = &mut lapsed => return Err(status),
            message = inbound.next() => return match message? {
                None => Ok(()),
                Some(_) => Err(Status::invalid_argument("an answer to no question")),
            },
            question = place.questions.recv() => question,
        };
        // The sender is among the agents as long as this place is.
        let Some(Question {
            page,
            query,
            answer,
        }) = question
        else {
            return Ok(());
        };
        if answer.is_closed() {
            continue;
        }
        id += 1;
        let question = v1::InspectQuestion {
            id,
            page: page.into(),
            query,
        };
        let asked = async {
            if outbound.send(Ok(question)).await.is_err() {
                return Err((AskError::Gone, Status::cancelled("the agent is gone")));
            }
            answer_to(id, &mut inbound).await
        };
        let slow = || {
            (
                AskError::Slow,
                Status::deadline_exceeded("no answer in time"),
            )
        };
        let answered = timeout(PATIENCE, asked).await;
        let answered = answered.unwrap_or_else(|_| Err(slow()));
        // Whoever asked may have gone. Where an answer broke off, the rest of it may still come: with the stream it ends.
        let (said, ended) = match answered {
            Ok(said) => (said, None),
            Err((error, status)) => (Err(error), Some(status)),
        };
        let _ = answer.send(said);
        if let Some(status) = ended {
            return Err(status);
        }
    }
}

/// An answer, or why the agent gives none; otherwise why the stream is of no use any more.
type Answered = Result<Result<Vec<u8>, AskError>, (AskError, Status)>;

async fn answer_to(id: u64, inbound: &mut impl Inbound) -> Answered {
    let mut content = vec![];
    loop {
        let message = inbound.next().await;
        let message = message.map_err(|status| (AskError::Gone, status))?;
        let Some(message) = message else {
            return Err((AskError::Gone, Status::cancelled("the agent is gone")));
        };
        let Some(Message::Part(part)) = message.message.filter(|it| is_part_of(id, it)) else {
            let status = Status::invalid_argument("not a part of the answer");
            return Err((AskError::Gone, status));
        };
        if content.len() + part.content.len() > MAX_ANSWER_BYTES {
            let status = Status::resource_exhausted("an answer is too large");
            return Err((AskError::TooLarge, status));
        }
        content.extend(part.content);
        if part.last {
            return Ok(match part.refused.is_empty() {
                true => Ok(content),
                false => Err(AskError::Refused(shortened(&part.refused))),
            });
        }
    }
}

fn is_part_of(id: u64, message: &Message) -> bool {
    matches!(message, Message::Part(part) if part.question == id)
}

fn shortened(text: &str) -> String {
    let shown = text.chars().take(512);
    shown.flat_map(char::escape_debug).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    struct Said(VecDeque<v1::InspectAnswer>);

    impl Inbound for Said {
        async fn next(&mut self) -> Result<Option<v1::InspectAnswer>, Status> {
            Ok(self.0.pop_front())
        }
    }

    fn part(question: u64, len: usize, last: bool, refused: &str) -> v1::InspectAnswer {
        v1::InspectAnswer {
            message: Some(Message::Part(v1::AnswerPart {
                question,
                content: vec![7; len],
                last,
                refused: refused.to_owned(),
            })),
        }
    }

    async fn answered(parts: impl IntoIterator<Item = v1::InspectAnswer>) -> Answered {
        answer_to(3, &mut Said(parts.into_iter().collect())).await
    }

    #[tokio::test]
    async fn answers_are_put_together_and_bounded() {
        let whole = answered([part(3, 5, false, ""), part(3, 6, true, "")]).await;
        assert_eq!(whole.expect("whole").expect("an answer"), [7; 11]);
        let refused = answered([part(3, 0, true, "no\u{1b}")])
            .await
            .expect("whole");
        let refused = refused.expect_err("refused").to_string();
        assert_eq!(refused, "the agent refuses: no\\u{1b}");
        let other = answered([part(4, 1, true, "")]).await;
        assert!(matches!(other, Err((AskError::Gone, _))));
        let broken = answered([part(3, 1, false, "")]).await;
        assert!(matches!(broken, Err((AskError::Gone, _))));
        let empty = answered([v1::InspectAnswer::default()]).await;
        assert!(matches!(empty, Err((AskError::Gone, _))));
        let flood = (0..).map(|_| part(3, 1024 * 1024, false, ""));
        let flood = answered(flood.take(64)).await;
        assert!(matches!(flood, Err((AskError::TooLarge, _))));
    }

    #[tokio::test]
    async fn a_node_has_few_agents_and_a_process_one_place() {
        let inspections = Arc::new(Inspections::default());
        let node: Name = "one".parse().expect("valid");
        let old = inspections.enter(&node, 1);
        let again = inspections.enter(&node, 1);
        assert!(old.replaced.is_cancelled() && !again.replaced.is_cancelled());
        drop(old);
        assert!(inspections.has(&node, 1));
        let more: Vec<_> = (2..=5).map(|it| inspections.enter(&node, it)).collect();
        assert!(again.replaced.is_cancelled() && !inspections.has(&node, 1));
        drop((again, more));
        assert!(inspections.locked().agents.is_empty());
        let asked = inspections.ask(&node, 1, (Page::Metrics, "")).await;
        assert!(matches!(asked, Err(AskError::Nobody { .. })));
    }
}
