//! Questions to the index that cannot wait for what it publishes: whether a pod takes part that is just being started.
//!
//! The index belongs to one thread. It answers between batches; of a pod that it has not heard of, it answers as soon
//! as it has. Whoever asks decides how long that is worth waiting for.

use tokio::sync::{mpsc, oneshot};
use weft_core::{Name, ObjectName};

use crate::index::Index;

/// Asks. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Questions(mpsc::Sender<Question>);

/// Whether this pod of this node takes part.
#[derive(Debug)]
pub struct Question {
    node: Name,
    pod: ObjectName,
    uid: String,
    answer: oneshot::Sender<bool>,
}

/// Questions without an answer yet.
#[derive(Debug, Default)]
pub struct Open(Vec<Question>);

impl Questions {
    /// And what the index's thread takes them from.
    pub fn new() -> (Self, mpsc::Receiver<Question>) {
        let (sender, receiver) = mpsc::channel(MAX_ON_THEIR_WAY);
        (Self(sender), receiver)
    }

    /// Waits until the index has heard of the pod. None: it has ended, or has too much to do.
    pub async fn takes_part(&self, node: &Name, pod: ObjectName, uid: String) -> Option<bool> {
        let (answer, answered) = oneshot::channel();
        let question = Question {
            node: node.clone(),
            pod,
            uid,
            answer,
        };
        self.0.send(question).await.ok()?;
        answered.await.ok()
    }
}

impl Open {
    /// Answers a question, or keeps it.
    pub fn ask(&mut self, question: Question, index: &Index) {
        if self.0.len() >= MAX_OPEN {
            self.0.retain(|it| !it.answer.is_closed());
        }
        // Dropped without an answer: whoever asked asks again.
        if let Some(question) = question.answered_by(index)
            && self.0.len() < MAX_OPEN
        {
            self.0.push(question);
        }
    }

    /// The index has heard of something.
    pub fn look(&mut self, index: &Index) {
        let questions = std::mem::take(&mut self.0).into_iter();
        let open = questions.filter(|it| !it.answer.is_closed());
        self.0 = open.filter_map(|it| it.answered_by(index)).collect();
    }
}

impl Question {
    /// Itself, if there is no answer yet.
    fn answered_by(self, index: &Index) -> Option<Self> {
        let Some(takes_part) = index.takes_part(&self.node, &self.pod, &self.uid) else {
            return Some(self);
        };
        // Whoever asked may have given up.
        let _ = self.answer.send(takes_part);
        None
    }
}

const MAX_ON_THEIR_WAY: usize = 256;
/// Pods that are being started at a time, in a cluster of thousands of nodes that all restart.
const MAX_OPEN: usize = 65_536;
