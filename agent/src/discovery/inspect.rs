//! Lets people look into the agent through its controller: metrics, readiness, what is in force.
//!
//! The agent opens the stream, on the connection of the control stream and for as long as that one is open: nobody can
//! ask who is not the controller that the agent believes, and no port is open for it. Answers are computed when somebody
//! asks, one at a time, beside the tasks that serve flows.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::sleep;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status};
use tracing::debug;
use weft_core::Name;
use weft_proto::v1::{self, Page};

use super::controller::Connection;

/// Computes what a page says, of one that is about something with what the query asks, or says why it cannot; none: there
/// is no such page.
pub type Answers = Arc<dyn Fn(Page, &str) -> Option<Result<Vec<u8>, String>> + Send + Sync>;

/// Who is asked.
pub(super) struct Inspected {
    pub(super) node: Name,
    pub(super) incarnation: u64,
    pub(super) answers: Answers,
}

/// Answers until it is dropped.
pub(super) async fn answer(connection: Connection, inspected: Inspected) {
    loop {
        let Err(status) = session(connection.clone(), &inspected).await;
        let reason = status.message();
        debug!(reason, code = ?status.code(), "the controller's questions ended");
        if status.code() == Code::Unimplemented {
            // An older controller, which asks nothing.
            return;
        }
        sleep(RETRY).await;
    }
}

async fn session(mut connection: Connection, inspected: &Inspected) -> Result<Infallible, Status> {
    let (sender, receiver) = mpsc::channel(PARTS_WAITING);
    let inspectable = v1::Inspectable {
        node: inspected.node.to_string(),
        incarnation: inspected.incarnation,
    };
    let inspectable = v1::inspect_answer::Message::Inspectable(inspectable);
    send(&sender, inspectable).await?;
    let request = connection.request(ReceiverStream::new(receiver));
    let mut questions = connection.client.inspect(request).await?.into_inner();
    while let Some(question) = questions.message().await? {
        let asked = (question.page, question.query);
        let content = content(asked, &inspected.answers).await;
        tell(&sender, question.id, content).await?;
    }
    Err(Status::cancelled("the controller ended the stream"))
}

/// What a page says, or why nothing.
async fn content((page, query): (i32, String), answers: &Answers) -> Result<Vec<u8>, String> {
    let unknown = || format!("this agent has no page {page}");
    let known = Page::try_from(page).map_err(|_| unknown())?;
    let answers = Arc::clone(answers);
    // It may take long: flows are served meanwhile.
    let computed = tokio::task::spawn_blocking(move || answers(known, &query)).await;
    computed
        .map_err(|_| "computing it panicked: the agent's log has more".to_owned())?
        .ok_or_else(unknown)?
}

async fn tell(
    sender: &mpsc::Sender<v1::InspectAnswer>,
    question: u64,
    content: Result<Vec<u8>, String>,
) -> Result<(), Status> {
    let (content, refused) = match content {
        Ok(content) => (content, String::new()),
        Err(refused) => (vec![], refused),
    };
    let mut parts = content.chunks(PART_BYTES).peekable();
    loop {
        let part = parts.next().unwrap_or_default().to_vec();
        let last = parts.peek().is_none();
        let part = v1::AnswerPart {
            question,
            content: part,
            last,
            refused: refused.clone(),
        };
        send(sender, v1::inspect_answer::Message::Part(part)).await?;
        if last {
            return Ok(());
        }
    }
}

async fn send(
    sender: &mpsc::Sender<v1::InspectAnswer>,
    message: v1::inspect_answer::Message,
) -> Result<(), Status> {
    let message = v1::InspectAnswer {
        message: Some(message),
    };
    let sent = sender.send(message).await;
    sent.map_err(|_| Status::cancelled("the stream is closed"))
}

/// After a stream that ended while the control stream goes on.
const RETRY: Duration = Duration::from_secs(2);
/// What the protocol allows a part to have.
const PART_BYTES: usize = 32 * 1024;
/// Parts that wait for the connection.
const PARTS_WAITING: usize = 4;

#[cfg(test)]
mod tests {
    use super::*;

    /// What a controller gets for a page.
    async fn told(page: i32) -> (Vec<u8>, String, usize) {
        let answers: Answers = Arc::new(|page, query| match page {
            Page::Metrics => Some(Ok(vec![7; 3 * PART_BYTES + 1])),
            Page::State => Some(Ok(vec![8; 2 * PART_BYTES])),
            Page::Readiness => Some(Ok(vec![])),
            Page::Explain => Some(Err(format!("not {query}"))),
            Page::Pods | Page::Recent | Page::Unspecified => None,
        });
        let (sender, mut receiver) = mpsc::channel(1);
        let telling = tokio::spawn(async move {
            let content = content((page, "pod=a".to_owned()), &answers).await;
            tell(&sender, 5, content).await
        });
        let (mut all, mut count) = (vec![], 0);
        while let Some(answer) = receiver.recv().await {
            let Some(v1::inspect_answer::Message::Part(part)) = answer.message else {
                panic!("no part");
            };
            count += 1;
            assert_eq!(part.question, 5);
            assert!(part.content.len() <= PART_BYTES);
            all.extend(part.content);
            if part.last {
                telling.await.expect("no panic").expect("told");
                return (all, part.refused, count);
            }
            assert_eq!(part.refused, "");
        }
        panic!("no last part");
    }

    #[tokio::test]
    async fn answers_come_in_parts_of_which_one_is_the_last() {
        let whole = |byte: u8, len: usize, count| (vec![byte; len], String::new(), count);
        let large = 3 * PART_BYTES + 1;
        assert_eq!(told(Page::Metrics.into()).await, whole(7, large, 4));
        assert_eq!(told(Page::State.into()).await, whole(8, 2 * PART_BYTES, 2));
        assert_eq!(told(Page::Readiness.into()).await, whole(0, 0, 1));
    }

    #[tokio::test]
    async fn what_there_is_not_is_refused() {
        let (_, refused, _) = told(Page::Explain.into()).await;
        assert_eq!(refused, "not pod=a");
        for page in [0, 99, -1] {
            let (content, refused, count) = told(page).await;
            assert!(content.is_empty() && count == 1);
            assert_eq!(refused, format!("this agent has no page {page}"));
        }
    }
}
