//! Why a connection was refused or ended: the one list that metrics, logs and the wire share.

/// A reason; each is a label value of `weft_refused_total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// A connection reached the outbound listener without an original destination.
    RedirectMiss,
    /// A connection of the agent came back to the agent.
    Loop,
    /// The address is inside the cluster and nobody knows it.
    UnknownAddress,
    /// The pod has no address of the destination's family.
    NoSourceAddress,
    /// The service has no such port.
    UnknownServicePort,
    /// The service has no endpoint that is ready.
    NoEndpoint,
    /// Too many wait for an endpoint of the service.
    TooManyWaiting,
    /// Nothing listens at the destination.
    ConnectRefused,
    /// The destination did not answer in time.
    ConnectTimeout,
    /// The connection could not be made for another reason.
    ConnectFailed,
    /// There is no valid certificate for the workload.
    NoCertificate,
    /// The TLS handshake failed.
    HandshakeFailed,
    /// The TLS handshake took too long.
    HandshakeTimeout,
    /// The peer proved to be somebody else.
    IdentityMismatch,
    /// Inbound policy denies the client.
    Denied,
    /// NetworkPolicies do not let the client in.
    NetworkPolicy,
    /// NetworkPolicies do not let the client connect there.
    NetworkPolicyEgress,
    /// Policy changed and no longer allows it.
    PolicyChanged,
    /// An EgressNetwork keeps it from leaving the cluster.
    EgressDenied,
    /// The client does not speak what the server's port is declared to.
    NotHttp,
    /// A request in pieces of which the first looked like something else.
    HttpInPieces,
    /// The tunnel's peer asked for something that is not this connection's destination, or wrongly.
    BadRequest,
    /// The port belongs to the mesh itself.
    ReservedPort,
    /// The pod has too many flows.
    TooManyFlows,
    /// The pod, or its client, has too many exchanges of HTTP.
    TooManyExchanges,
    /// The process has no descriptors left for flows.
    NoDescriptors,
    /// The pod, its peer or the node has too many unfinished handshakes.
    TooManyHandshakes,
    /// The pod's or the node's flows keep too many bytes for receivers that have no room.
    TooManyBytes,
    /// The agent is shutting down and the flow was still open at the deadline.
    Drained,
    /// The pod is gone.
    PodGone,
    /// The kernel's state could not be read or written.
    Kernel,
}

impl Refusal {
    /// Whether a limit was reached. An operator must hear of that, but not of each flow.
    pub fn is_limit(self) -> bool {
        matches!(
            self,
            Self::TooManyFlows
                | Self::NoDescriptors
                | Self::TooManyHandshakes
                | Self::TooManyBytes
                | Self::TooManyWaiting
                | Self::TooManyExchanges
        )
    }

    /// As a label value.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::RedirectMiss => "redirect_miss",
            Self::Loop => "loop",
            Self::UnknownAddress => "unknown_address",
            Self::NoSourceAddress => "no_source_address",
            Self::UnknownServicePort => "unknown_service_port",
            Self::NoEndpoint => "no_endpoint",
            Self::TooManyWaiting => "too_many_waiting",
            Self::ConnectRefused => "connect_refused",
            Self::ConnectTimeout => "connect_timeout",
            Self::ConnectFailed => "connect_failed",
            Self::NoCertificate => "no_certificate",
            Self::HandshakeFailed => "handshake_failed",
            Self::HandshakeTimeout => "handshake_timeout",
            Self::IdentityMismatch => "identity_mismatch",
            Self::Denied => "denied",
            Self::NetworkPolicy => "network_policy",
            Self::NetworkPolicyEgress => "network_policy_egress",
            Self::PolicyChanged => "policy_changed",
            Self::EgressDenied => "egress_denied",
            Self::NotHttp => "not_http",
            Self::HttpInPieces => "http_in_pieces",
            Self::BadRequest => "bad_request",
            Self::ReservedPort => "reserved_port",
            Self::TooManyFlows => "too_many_flows",
            Self::TooManyExchanges => "too_many_exchanges",
            Self::NoDescriptors => "no_descriptors",
            Self::TooManyHandshakes => "too_many_handshakes",
            Self::TooManyBytes => "too_many_bytes",
            Self::Drained => "drained",
            Self::PodGone => "pod_gone",
            Self::Kernel => "kernel",
        }
    }
}
