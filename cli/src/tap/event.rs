//! What controllers tell, line by line.

use std::collections::{BTreeSet, HashMap};

use serde::{Deserialize, Serialize};

/// A line.
#[derive(Debug)]
pub(super) enum Line {
    Scope(Pods),
    Event(Box<Event>),
    Lost(Lost),
    Refused {
        node: String,
        reason: String,
    },
    End {
        reason: String,
    },
    /// What a newer controller tells beside that.
    Other,
}

/// A line as it is written: one of these.
#[derive(Debug, Deserialize)]
struct Written {
    scope: Option<Pods>,
    event: Option<Box<Event>>,
    lost: Option<Lost>,
    refused: Option<Refused>,
    end: Option<Refused>,
}

/// Where the pods are.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Pods {
    pub(super) pods: usize,
    pub(super) nodes: BTreeSet<String>,
    pub(super) missing: BTreeSet<String>,
}

/// What is not told.
#[derive(Debug, Deserialize)]
pub(super) struct Lost {
    pub(super) dropped: u64,
    pub(super) left_out: u64,
}

#[derive(Debug, Deserialize)]
struct Refused {
    #[serde(default)]
    node: String,
    reason: String,
}

/// Something happened to an exchange or a flow.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(super) struct Event {
    pub(super) node: String,
    pub(super) id: u64,
    pub(super) at_us: u64,
    #[serde(flatten)]
    pub(super) what: What,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum What {
    Begin(Box<Begin>),
    Head(Head),
    End(End),
}

/// A request, or a flow that opened.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(super) struct Begin {
    pub(super) protocol: String,
    pub(super) direction: String,
    pub(super) source: Who,
    pub(super) destination: Who,
    pub(super) service: Option<String>,
    pub(super) tls: Option<String>,
    pub(super) no_tls_reason: Option<String>,
    pub(super) method: Option<String>,
    pub(super) authority: Option<String>,
    pub(super) path: Option<String>,
    pub(super) route: Option<String>,
}

/// One of the two ends.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(super) struct Who {
    pub(super) address: Option<String>,
    pub(super) namespace: Option<String>,
    pub(super) pod: Option<String>,
    pub(super) owner: Option<String>,
    pub(super) identity: Option<String>,
}

#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
pub(super) struct Head {
    pub(super) status: u16,
    pub(super) latency_us: u64,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
pub(super) struct End {
    pub(super) duration_us: u64,
    pub(super) request_bytes: u64,
    pub(super) response_bytes: u64,
    pub(super) grpc_status: Option<String>,
    pub(super) error: Option<String>,
}

/// What has begun and not ended, with what became of it so far.
#[derive(Debug)]
pub(super) struct Running<T>(HashMap<(String, u64), T>);

/// As much as can be open: what has begun before is forgotten.
const MOST_RUNNING: usize = 100_000;

impl Line {
    /// Reads one. None: it is nothing.
    pub(super) fn read(line: &[u8]) -> Option<Self> {
        let written: Written = serde_json::from_slice(line).ok()?;
        Some(match written {
            Written {
                scope: Some(pods), ..
            } => Self::Scope(pods),
            Written {
                event: Some(event), ..
            } => Self::Event(event),
            Written {
                lost: Some(lost), ..
            } => Self::Lost(lost),
            Written {
                refused: Some(Refused { node, reason }),
                ..
            } => Self::Refused { node, reason },
            Written {
                end: Some(Refused { reason, .. }),
                ..
            } => Self::End { reason },
            _ => Self::Other,
        })
    }
}

impl<T> Default for Running<T> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<T> Running<T> {
    pub(super) fn begin(&mut self, event: &Event, what: T) {
        if self.0.len() >= MOST_RUNNING {
            self.0.clear();
        }
        self.0.insert((event.node.clone(), event.id), what);
    }

    pub(super) fn of(&mut self, event: &Event) -> Option<&mut T> {
        self.0.get_mut(&(event.node.clone(), event.id))
    }

    pub(super) fn end(&mut self, event: &Event) -> Option<T> {
        self.0.remove(&(event.node.clone(), event.id))
    }
}
