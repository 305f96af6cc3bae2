//! The end of a flow: its line in the access log, and the count of what was refused.

use std::net::SocketAddr;
use std::time::Instant;

use weft_core::{Identity, ObjectName, Verdict, WorkloadId};

use super::error::FlowError;
use super::live_requests::RequestEntry;
use super::tap::{self, TappedFlow};
use super::tcp::Moved;
use crate::discovery::Store;
use crate::telemetry::{Direction, Telemetry};

/// What is known of a flow, filled as its stages pass and written when it ends.
#[derive(Debug)]
pub struct Record {
    /// Which side of a flow this is.
    pub direction: Direction,
    /// The pod of this node that the flow is counted for.
    pub pod: WorkloadId,
    /// How it is, or was to be, carried.
    pub path: PathLabel,
    /// The client's address; its port is made up where the peer does not tell it.
    pub client: Option<SocketAddr>,
    /// The workload that connects.
    pub source: Option<WorkloadId>,
    /// Who that is, if proven.
    pub source_identity: Option<Identity>,
    /// Where the client wanted to go.
    pub original: Option<SocketAddr>,
    /// The service that this is.
    pub service: Option<ObjectName>,
    /// The host name that a TLS client hello has asked for (RFC 6066, section 3), in lower case, where it was looked
    /// at: of at most 253 bytes, as names of DNS are. The client's word.
    pub server_name: Option<Box<str>>,
    /// Where the flow went, or was last tried.
    pub endpoint: Option<SocketAddr>,
    /// The workload that is connected to.
    pub destination: Option<WorkloadId>,
    /// Who that is.
    pub destination_identity: Option<Identity>,
    /// What inbound policy said, if it was asked here.
    pub verdict: Option<Verdict>,
    /// The service has endpoints that were not tried: more than a flow tries, or some that are left out.
    pub more_endpoints: bool,
    /// That it leaves the cluster.
    pub(super) egress: Option<Box<RequestEntry>>,
    /// Bytes, once connected.
    pub moved: Moved,
    /// Others tell of what became of it, unless it failed.
    pub is_told_elsewhere: bool,
    /// Those who watch see its exchanges, and not the flow.
    pub(super) has_exchanges: bool,
    /// Somebody watches it.
    pub(super) tapped: Option<Box<TappedFlow>>,
    started: Instant,
}

/// How a flow is carried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PathLabel {
    /// Not decided.
    Unknown,
    /// Through a tunnel.
    Tunnel,
    /// Handed over in the process.
    SameNode,
    /// Without the mesh.
    Plaintext,
    /// To itself.
    Itself,
}

impl Record {
    /// Starts with the flow.
    pub fn new(direction: Direction, pod: &WorkloadId) -> Self {
        Self {
            direction,
            pod: pod.clone(),
            path: PathLabel::Unknown,
            client: None,
            source: None,
            source_identity: None,
            original: None,
            service: None,
            server_name: None,
            endpoint: None,
            destination: None,
            destination_identity: None,
            verdict: None,
            more_endpoints: false,
            egress: None,
            moved: Moved::default(),
            is_told_elsewhere: false,
            has_exchanges: false,
            tapped: None,
            started: Instant::now(),
        }
    }

    /// Forgets where it was tried to go: that was not its way.
    pub(super) fn forget_way(&mut self) {
        self.path = PathLabel::Unknown;
        self.endpoint = None;
        self.destination = None;
        self.destination_identity = None;
        self.more_endpoints = false;
        self.egress = None;
        // It was open there, and has been closed.
        self.moved = Moved::default();
    }

    /// Counts and logs the flow's end.
    pub fn finish(mut self, telemetry: &Telemetry, store: &Store, result: &Result<(), FlowError>) {
        if self.is_told_elsewhere && result.is_ok() {
            return;
        }
        let error = result.as_ref().err();
        let refusal = error.and_then(FlowError::refusal);
        if let Some(refusal) = refusal {
            telemetry.refusal(&self.pod, refusal);
        }
        if let Some(FlowError::Denied(verdict) | FlowError::PolicyChanged(verdict)) = error {
            self.verdict = Some(verdict.clone());
        }
        let verdict = match (&self.verdict, refusal) {
            (Some(Verdict::Deny { .. }), _) => "deny",
            (_, Some(_)) => "refuse",
            (Some(Verdict::Allow { .. } | Verdict::RequestsOnly { .. }), None) => "allow",
            (None, None) => "pass",
        };
        let reason = match (&self.verdict, refusal) {
            (Some(verdict @ Verdict::Deny { .. }), _) => Some(verdict.by()),
            (_, Some(refusal)) => Some(refusal.as_str().to_owned()),
            (Some(verdict), None) => Some(verdict.by()),
            (None, None) => None,
        };
        tap::ended(telemetry, store, &mut self, error);
        tracing::info!(
            target: "access",
            direction = direction(self.direction),
            path = self.path.as_str(),
            src = optional(&self.source),
            src_id = optional(&self.source_identity),
            dst = optional(&self.destination),
            dst_id = optional(&self.destination_identity),
            service = optional(&self.service),
            sni = optional(&self.server_name),
            client = optional(&self.client),
            original = optional(&self.original),
            endpoint = optional(&self.endpoint),
            sent_bytes = self.moved.sent(),
            received_bytes = self.moved.received(),
            duration_ms = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX),
            verdict,
            reason = optional(&reason),
            server = optional(&self.verdict.as_ref().and_then(Verdict::server)),
            error = optional(&error),
            "flow"
        );
    }
}

impl PathLabel {
    /// As logged.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unknown => "none",
            Self::Tunnel => "tunnel",
            Self::SameNode => "same_node",
            Self::Plaintext => "plaintext",
            Self::Itself => "itself",
        }
    }
}

fn direction(direction: Direction) -> &'static str {
    match direction {
        Direction::Outbound => "outbound",
        Direction::Inbound => "inbound",
    }
}

/// Absent fields are left out of the line.
fn optional<T: std::fmt::Display>(value: &Option<T>) -> Option<tracing::field::DisplayValue<&T>> {
    value.as_ref().map(tracing::field::display)
}
