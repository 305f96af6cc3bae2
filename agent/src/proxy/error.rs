//! Why a flow is refused or ended, and the one place where a reason becomes a metric label, an
//! HTTP status of the tunnel, or a decision to try elsewhere.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use http::StatusCode;
use weft_core::{DenyReason, EgressName, Identity, ObjectName, TUNNEL_PORT, Verdict};

use super::tcp::Broken;
use super::tunnel::weft1;
use super::tunnel::wire::BadRequest;
use crate::telemetry::Refusal;

/// Why a flow did not come about, or did not end by both sides closing.
#[derive(Debug, thiserror::Error)]
pub enum FlowError {
    /// A connection reached the outbound listener that the kernel programs did not send there.
    #[error("no original destination is known for the connection")]
    RedirectMiss,
    /// A connection that the agent itself made, or that the pod's own connect was redirected to.
    #[error("the connection came back to the agent that made it")]
    Loop,
    /// Inside the cluster, and nobody knows it.
    #[error("{0} is inside the cluster's ranges and no workload or service is known to have it")]
    UnknownAddress(IpAddr),
    /// The service does not have the port.
    #[error("the service {0} has no TCP port {1}")]
    UnknownServicePort(ObjectName, u16),
    /// Routes lead the flow nowhere.
    #[error("the routes of {0} for port {1} lead the flow nowhere that is known")]
    NoRoute(ObjectName, u16),
    /// Nothing backs the service.
    #[error("no endpoint of {0} is ready for port {1}")]
    NoEndpoint(ObjectName, u16),
    /// Nothing backs the service, and too many wait for it.
    #[error("too many wait for an endpoint of {0} for port {1}")]
    TooManyWaiting(ObjectName, u16),
    /// The pod has no address of the destination's family.
    #[error("the pod has no address to reach {0} from")]
    NoSourceAddress(IpAddr),
    /// A port of the mesh, which no application may reach.
    #[error("port {0} belongs to the mesh and cannot be asked for")]
    ReservedPort(u16),
    /// Connecting failed.
    #[error("connecting to {to} failed: {source}")]
    Connect {
        /// Where to.
        to: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Connecting took too long.
    #[error("connecting to {to} timed out{}", hint(*to))]
    ConnectTimeout {
        /// Where to.
        to: SocketAddr,
    },
    /// No tunnel to the destination could be made.
    #[error("{0}")]
    Tunnel(Arc<TunnelError>),
    /// The other agent answered with a refusal.
    #[error("{by}'s agent refused: {status}{}", because(.reason.as_deref()))]
    RefusedByPeer {
        /// The endpoint.
        by: SocketAddr,
        /// Its answer.
        status: StatusCode,
        /// The reason, if it gave one: a label of [`Refusal`].
        reason: Option<String>,
    },
    /// Policy denies the client.
    #[error("denied: {}", .0.by())]
    Denied(Verdict),
    /// It may not leave the cluster.
    #[error("the EgressNetwork {0} denies it")]
    EgressDenied(EgressName),
    /// It was allowed to leave the cluster and no longer is.
    #[error("policy changed: the EgressNetwork {0} denies it")]
    EgressRevoked(EgressName),
    /// NetworkPolicies do not let the pod connect there.
    #[error("not let out: {0}")]
    NotLetOut(DenyReason),
    /// They did, and no longer do.
    #[error("policy changed: not let out: {0}")]
    NoLongerLetOut(DenyReason),
    /// The server is declared to speak HTTP, and the client speaks something else, or another version.
    #[error("the client does not speak what the server's port is declared to")]
    NotHttp,
    /// What was passed on because it could become nothing that is looked at has become a request.
    #[error("the client began with something else than HTTP, and went on with it")]
    HttpInPieces,
    /// Policy allowed the client and no longer does.
    #[error("policy changed: {}", .0.by())]
    PolicyChanged(Verdict),
    /// The tunnel's peer asked wrongly.
    #[error("{0}")]
    BadRequest(#[from] BadRequest),
    /// The pod has as many flows as it may.
    #[error("the pod has too many flows")]
    TooManyFlows,
    /// The pod, or one who has exchanges with it, has as many as it may.
    #[error("there are too many open exchanges of HTTP")]
    TooManyExchanges,
    /// The last descriptors are not for flows, nor some before them for pods with many flows.
    #[error("the agent has no descriptors left for the pod's flows")]
    NoDescriptors,
    /// The pod, its peer or the node has as many unfinished handshakes as it may.
    #[error("there are too many unfinished handshakes")]
    TooManyHandshakes,
    /// The agent is leaving.
    #[error("the agent shut down while the flow was open")]
    Drained,
    /// The pod is gone.
    #[error("the pod is gone")]
    PodGone,
    /// The kernel's state could not be read or written, or a socket not be made.
    #[error("{doing}: {source}")]
    Kernel {
        /// What was tried.
        doing: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// Copying ended before both sides had closed.
    #[error(transparent)]
    Broken(#[from] Broken),
}

/// Why there is no tunnel.
#[derive(Debug, thiserror::Error)]
pub enum TunnelError {
    /// No certificate for the source.
    #[error("no certificate to connect with: {0}")]
    NoCertificate(String),
    /// The connection could not be made.
    #[error("connecting to {to} failed: {source}{}", hint(*to))]
    Connect {
        /// Where to.
        to: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The connection took too long to make.
    #[error("connecting to {to} timed out{}", hint(*to))]
    ConnectTimeout {
        /// Where to.
        to: SocketAddr,
    },
    /// No socket to connect with.
    #[error("{0}")]
    Socket(String),
    /// The source makes as many tunnels as it may.
    #[error("the pod is making too many tunnels at once")]
    TooMany,
    /// TLS failed.
    #[error("the TLS handshake failed: {0}")]
    Handshake(#[source] io::Error),
    /// TLS, or the start of HTTP/2, took too long.
    #[error("the handshake took too long")]
    HandshakeTimeout,
    /// The peer's certificate does not name a workload.
    #[error("the peer's certificate is not acceptable: {0}")]
    PeerCertificate(String),
    /// The peer is somebody else.
    #[error("the peer is {found}, not {expected}: is the address another workload's by now?")]
    IdentityMismatch {
        /// Who has the address according to the control plane.
        expected: Identity,
        /// Who answered.
        found: Identity,
    },
    /// The peer does not speak what it should.
    #[error("the peer did not agree to speak {0:?}")]
    Protocol(&'static str),
    /// HTTP/2 failed.
    #[error("HTTP/2 failed: {0}")]
    Http2(#[from] h2::Error),
    /// `weft/1` failed.
    #[error("{0}")]
    Weft(#[from] weft1::Error),
    /// The connection ended before a stream could be opened.
    #[error("the tunnel closed while a stream was being opened")]
    Closed,
}

impl FlowError {
    /// The metric label; none for what applications did to each other.
    pub fn refusal(&self) -> Option<Refusal> {
        Some(match self {
            Self::RedirectMiss => Refusal::RedirectMiss,
            Self::Loop => Refusal::Loop,
            Self::UnknownAddress(_) => Refusal::UnknownAddress,
            Self::UnknownServicePort(..) => Refusal::UnknownServicePort,
            Self::NoEndpoint(..) | Self::NoRoute(..) => Refusal::NoEndpoint,
            Self::TooManyWaiting(..) => Refusal::TooManyWaiting,
            Self::ReservedPort(_) => Refusal::ReservedPort,
            Self::Connect { source, .. } => connect_refusal(source),
            Self::ConnectTimeout { .. } => Refusal::ConnectTimeout,
            Self::Tunnel(error) => error.refusal(),
            Self::RefusedByPeer { status, reason, .. } if *status == StatusCode::UNAUTHORIZED => {
                match reason.as_deref() == Some(Refusal::NetworkPolicy.as_str()) {
                    true => Refusal::NetworkPolicy,
                    false => Refusal::Denied,
                }
            }
            Self::RefusedByPeer { .. } if self.nothing_listens() => Refusal::ConnectRefused,
            Self::RefusedByPeer { .. } => Refusal::ConnectFailed,
            Self::Denied(verdict) if verdict.is_by_network_policy() => Refusal::NetworkPolicy,
            Self::Denied(_) => Refusal::Denied,
            Self::PolicyChanged(_) | Self::EgressRevoked(_) | Self::NoLongerLetOut(_) => {
                Refusal::PolicyChanged
            }
            Self::EgressDenied(_) => Refusal::EgressDenied,
            Self::NotLetOut(_) => Refusal::NetworkPolicyEgress,
            Self::NotHttp => Refusal::NotHttp,
            Self::HttpInPieces => Refusal::HttpInPieces,
            Self::BadRequest(_) => Refusal::BadRequest,
            Self::NoSourceAddress(_) => Refusal::NoSourceAddress,
            Self::TooManyFlows => Refusal::TooManyFlows,
            Self::TooManyExchanges => Refusal::TooManyExchanges,
            Self::NoDescriptors => Refusal::NoDescriptors,
            Self::TooManyHandshakes => Refusal::TooManyHandshakes,
            Self::Drained => Refusal::Drained,
            Self::PodGone => Refusal::PodGone,
            Self::Kernel { .. } => Refusal::Kernel,
            Self::Broken(Broken::TooManyBytes) => Refusal::TooManyBytes,
            Self::Broken(_) => return None,
        })
    }

    /// The tunnel's answer (`docs/wire.md`).
    pub fn status(&self) -> StatusCode {
        match self {
            Self::BadRequest(error) => error.status(),
            Self::ReservedPort(_) | Self::Loop => StatusCode::BAD_REQUEST,
            Self::Denied(_) | Self::PolicyChanged(_) => StatusCode::UNAUTHORIZED,
            _ => StatusCode::SERVICE_UNAVAILABLE,
        }
    }

    /// Whether a client that speaks HTTP is to be told, and waited for until it does. Not where there is nobody
    /// to be told, nor where there is no room for those who wait.
    pub fn is_told(&self) -> bool {
        !matches!(
            self,
            Self::Broken(_)
                | Self::Drained
                | Self::PodGone
                | Self::NoDescriptors
                | Self::TooManyFlows
                | Self::TooManyExchanges
                | Self::RedirectMiss
                | Self::Loop
                | Self::Kernel { .. }
        )
    }

    /// Whether another endpoint of the same service may do better. A denial is final: to go on
    /// until somebody does not deny would make the weakest endpoint's policy that of all. What the client's own
    /// NetworkPolicies say of an endpoint is about that one alone.
    pub fn may_try_another(&self) -> bool {
        match self {
            Self::RefusedByPeer { status, .. } => *status == StatusCode::SERVICE_UNAVAILABLE,
            Self::Connect { .. }
            | Self::ConnectTimeout { .. }
            | Self::Tunnel(_)
            | Self::UnknownAddress(_)
            | Self::TooManyFlows
            | Self::TooManyExchanges
            | Self::NoSourceAddress(_)
            | Self::NoDescriptors
            | Self::NotLetOut(_)
            | Self::PodGone => true,
            _ => false,
        }
    }

    /// Whether no agent serves the destination now: it has not enrolled the pod yet, or is being replaced.
    pub fn agent_is_away(&self) -> bool {
        let Self::Tunnel(error) = self else {
            return false;
        };
        matches!(&**error, TunnelError::Connect { source, .. }
            if source.kind() == io::ErrorKind::ConnectionRefused)
    }

    /// Whether the destination itself said that nothing listens, or is nobody now: worth remembering for a moment,
    /// so that the next connect is refused at once.
    pub fn nothing_listens(&self) -> bool {
        match self {
            Self::Connect { source, .. } => source.kind() == io::ErrorKind::ConnectionRefused,
            Self::RefusedByPeer { reason, .. } => {
                reason.as_deref() == Some(Refusal::ConnectRefused.as_str())
            }
            Self::UnknownServicePort(..) | Self::NoEndpoint(..) => true,
            _ => false,
        }
    }

    /// Whether nobody serves the destination now.
    pub fn is_no_endpoint(&self) -> bool {
        matches!(self, Self::NoEndpoint(..))
    }
}

impl TunnelError {
    fn refusal(&self) -> Refusal {
        match self {
            Self::NoCertificate(_) => Refusal::NoCertificate,
            Self::Socket(_) => Refusal::Kernel,
            Self::TooMany => Refusal::TooManyHandshakes,
            // The tunnel's port, not the application's: never `ConnectRefused`.
            Self::Connect { .. } | Self::Http2(_) | Self::Weft(_) | Self::Closed => {
                Refusal::ConnectFailed
            }
            Self::ConnectTimeout { .. } => Refusal::ConnectTimeout,
            Self::Handshake(_) | Self::PeerCertificate(_) | Self::Protocol(_) => {
                Refusal::HandshakeFailed
            }
            Self::HandshakeTimeout => Refusal::HandshakeTimeout,
            Self::IdentityMismatch { .. } => Refusal::IdentityMismatch,
        }
    }

    /// The label of a failed handshake of somebody who connects to us.
    pub fn inbound_refusal(&self) -> Refusal {
        self.refusal()
    }
}

impl From<Arc<TunnelError>> for FlowError {
    fn from(error: Arc<TunnelError>) -> Self {
        Self::Tunnel(error)
    }
}

fn connect_refusal(error: &io::Error) -> Refusal {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => Refusal::ConnectRefused,
        io::ErrorKind::TimedOut => Refusal::ConnectTimeout,
        _ => Refusal::ConnectFailed,
    }
}

fn hint(to: SocketAddr) -> String {
    if to.port() == TUNNEL_PORT {
        format!(": is a NetworkPolicy blocking port {TUNNEL_PORT}?")
    } else {
        String::new()
    }
}

fn because(reason: Option<&str>) -> String {
    reason.map_or_else(String::new, |reason| format!(", {reason}"))
}

#[cfg(test)]
mod tests {
    use weft_core::AccessPolicy;

    use super::*;

    fn connect(kind: io::ErrorKind) -> FlowError {
        FlowError::Connect {
            to: "10.1.2.3:80".parse().expect("valid"),
            source: kind.into(),
        }
    }

    fn by_peer(status: StatusCode, reason: Option<&str>) -> FlowError {
        FlowError::RefusedByPeer {
            by: "10.1.2.3:80".parse().expect("valid"),
            status,
            reason: reason.map(str::to_owned),
        }
    }

    /// error → label, status, another endpoint, nothing listens
    #[test]
    fn errors_become_labels_and_answers() {
        let denied = FlowError::Denied(Verdict::Deny {
            server: None,
            reason: DenyReason::Policy(AccessPolicy::Deny),
        });
        let tunnel_refused = FlowError::Tunnel(Arc::new(TunnelError::Connect {
            to: "10.1.2.3:15008".parse().expect("valid"),
            source: io::ErrorKind::ConnectionRefused.into(),
        }));
        let unavailable = StatusCode::SERVICE_UNAVAILABLE;
        let unauthorized = StatusCode::UNAUTHORIZED;
        let bad = StatusCode::BAD_REQUEST;
        for (error, label, status, another, nothing) in [
            (
                connect(io::ErrorKind::ConnectionRefused),
                Refusal::ConnectRefused,
                unavailable,
                true,
                true,
            ),
            (
                connect(io::ErrorKind::TimedOut),
                Refusal::ConnectTimeout,
                unavailable,
                true,
                false,
            ),
            (
                connect(io::ErrorKind::HostUnreachable),
                Refusal::ConnectFailed,
                unavailable,
                true,
                false,
            ),
            // That nobody listens at the tunnel's port says nothing about the application's.
            (
                tunnel_refused,
                Refusal::ConnectFailed,
                unavailable,
                true,
                false,
            ),
            (
                by_peer(unavailable, Some("connect_refused")),
                Refusal::ConnectRefused,
                unavailable,
                true,
                true,
            ),
            (
                by_peer(unavailable, None),
                Refusal::ConnectFailed,
                unavailable,
                true,
                false,
            ),
            (
                by_peer(unauthorized, Some("denied")),
                Refusal::Denied,
                unavailable,
                false,
                false,
            ),
            (
                by_peer(unauthorized, Some("network_policy")),
                Refusal::NetworkPolicy,
                unavailable,
                false,
                false,
            ),
            (
                by_peer(bad, None),
                Refusal::ConnectFailed,
                unavailable,
                false,
                false,
            ),
            (denied, Refusal::Denied, unauthorized, false, false),
            (
                FlowError::Denied(Verdict::Deny {
                    server: None,
                    reason: DenyReason::NetworkPolicy("shop/n".parse().expect("valid")),
                }),
                Refusal::NetworkPolicy,
                unauthorized,
                false,
                false,
            ),
            (
                FlowError::NotLetOut(DenyReason::NetworkPolicy("shop/n".parse().expect("valid"))),
                Refusal::NetworkPolicyEgress,
                unavailable,
                true,
                false,
            ),
            (
                FlowError::NoLongerLetOut(DenyReason::WorkloadPolicyUnknown),
                Refusal::PolicyChanged,
                unavailable,
                false,
                false,
            ),
            (
                FlowError::BadRequest(BadRequest::Authority),
                Refusal::BadRequest,
                bad,
                false,
                false,
            ),
            (
                FlowError::NoEndpoint("shop/web".parse().expect("valid"), 80),
                Refusal::NoEndpoint,
                unavailable,
                false,
                true,
            ),
            (
                FlowError::TooManyWaiting("shop/web".parse().expect("valid"), 80),
                Refusal::TooManyWaiting,
                unavailable,
                false,
                false,
            ),
            (
                FlowError::ReservedPort(15008),
                Refusal::ReservedPort,
                bad,
                false,
                false,
            ),
            (
                FlowError::RedirectMiss,
                Refusal::RedirectMiss,
                unavailable,
                false,
                false,
            ),
        ] {
            let text = error.to_string();
            assert_eq!(error.refusal(), Some(label), "{text}");
            assert_eq!(error.status(), status, "{text}");
            assert_eq!(error.may_try_another(), another, "{text}");
            assert_eq!(error.nothing_listens(), nothing, "{text}");
            let away = matches!(error, FlowError::Tunnel(_));
            assert_eq!(error.agent_is_away(), away, "{text}");
        }
    }

    #[test]
    fn a_likely_cause_is_named() {
        let to = "10.1.2.3:15008".parse().expect("valid");
        let error = TunnelError::ConnectTimeout { to };
        assert_eq!(
            error.to_string(),
            "connecting to 10.1.2.3:15008 timed out: is a NetworkPolicy blocking port 15008?"
        );
    }
}
