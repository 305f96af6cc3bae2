//! What is told to whoever watches: a line of JSON each.

use std::collections::BTreeSet;

use bytes::Bytes;
use serde::Serialize;
use weft_core::{Name, ObjectName, WorkloadId};
use weft_proto::v1::{self, tap_event};

/// A line.
#[derive(Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Line<'a> {
    /// Where pods are that are watched; comes first, when it changes, and now and then.
    Scope {
        /// How many.
        pods: usize,
        /// Their nodes,
        nodes: &'a BTreeSet<Name>,
        /// and those of them that have no agent at this controller which can sample.
        missing: &'a BTreeSet<Name>,
    },
    /// Something happened.
    Event(Box<Event<'a>>),
    /// What is missing since the last such line.
    Lost {
        /// The agent's node.
        node: &'a Name,
        /// Events that there was no room for.
        dropped: u64,
        /// Exchanges and flows that were more than were asked for.
        left_out: u64,
    },
    /// An agent does not sample.
    Refused {
        /// Its node.
        node: &'a Name,
        /// Why.
        reason: String,
    },
    /// It ends, and why.
    End {
        /// Why.
        reason: String,
    },
}

/// Something happened to an exchange or a flow.
#[derive(Debug, Serialize)]
pub struct Event<'a> {
    node: &'a Name,
    id: u64,
    at_us: u64,
    #[serde(flatten)]
    what: What,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "snake_case")]
enum What {
    Begin(Box<Begin>),
    Head {
        status: u32,
        latency_us: u64,
    },
    End {
        duration_us: u64,
        request_bytes: u64,
        response_bytes: u64,
        grpc_status: Option<String>,
        error: Option<String>,
    },
}

#[derive(Debug, Serialize)]
struct Begin {
    protocol: String,
    direction: &'static str,
    source: Who,
    destination: Who,
    service: Option<String>,
    tls: Option<String>,
    no_tls_reason: Option<String>,
    method: Option<String>,
    authority: Option<String>,
    path: Option<String>,
    route: Option<String>,
}

#[derive(Debug, Serialize)]
struct Who {
    address: Option<String>,
    namespace: Option<String>,
    pod: Option<String>,
    /// As `deployment/web`.
    owner: Option<String>,
    identity: Option<String>,
}

impl<'a> Line<'a> {
    /// What an agent tells; none: it is about nothing, or about a pod that the agent does not run.
    pub(super) fn event(
        node: &'a Name,
        event: v1::TapEvent,
        runs: impl FnOnce(&WorkloadId) -> bool,
    ) -> Option<Self> {
        let what = match event.event? {
            tap_event::Event::Begin(begin) => {
                let own = match begin.inbound {
                    true => &begin.destination,
                    false => &begin.source,
                };
                let own = own.as_ref()?;
                let own = ObjectName::parse(&own.namespace, &own.pod).ok()?;
                if !runs(&WorkloadId(own)) {
                    return None;
                }
                What::Begin(Box::new(begin.into()))
            }
            tap_event::Event::Head(head) => What::Head {
                status: head.status,
                latency_us: head.latency_us,
            },
            tap_event::Event::End(end) => What::End {
                duration_us: end.duration_us,
                request_bytes: end.request_bytes,
                response_bytes: end.response_bytes,
                grpc_status: text(&end.grpc_status),
                error: text(&end.error),
            },
        };
        Some(Self::Event(Box::new(Event {
            node,
            id: event.id,
            at_us: event.at_us,
            what,
        })))
    }

    pub(super) fn refused(node: &'a Name, reason: String) -> Self {
        Self::Refused { node, reason }
    }

    /// As it is sent.
    pub fn written(&self) -> Bytes {
        // Fails only for maps whose keys are no text; there are none.
        let mut line = serde_json::to_vec(self).unwrap_or_default();
        line.push(b'\n');
        line.into()
    }
}

impl From<v1::TapBegin> for Begin {
    fn from(begin: v1::TapBegin) -> Self {
        Self {
            protocol: text(&begin.protocol).unwrap_or_default(),
            direction: match begin.inbound {
                true => "inbound",
                false => "outbound",
            },
            source: begin.source.unwrap_or_default().into(),
            destination: begin.destination.unwrap_or_default().into(),
            service: text(&begin.service),
            tls: text(&begin.tls),
            no_tls_reason: text(&begin.no_tls_reason),
            method: text(&begin.method),
            authority: text(&begin.authority),
            path: text(&begin.path),
            route: text(&begin.route),
        }
    }
}

impl From<v1::TapWho> for Who {
    fn from(who: v1::TapWho) -> Self {
        let kind = text(&who.owner_kind).unwrap_or_default();
        Self {
            address: text(&who.address),
            namespace: text(&who.namespace),
            pod: text(&who.pod),
            owner: text(&who.owner).map(|owner| format!("{kind}/{owner}")),
            identity: text(&who.identity),
        }
    }
}

/// What an agent says, if it says anything; of one that says more than agents do, the beginning.
fn text(text: &str) -> Option<String> {
    let text = &text[..text.floor_char_boundary(MOST_TEXT_BYTES)];
    (!text.is_empty()).then(|| text.to_owned())
}

/// As much as agents tell of a path, which is the longest of it.
const MOST_TEXT_BYTES: usize = 1024;
