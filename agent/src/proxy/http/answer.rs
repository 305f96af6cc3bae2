//! Answers to requests that no server answers: refused by policy, impossible to pass on, or not HTTP as
//! it should be.

use std::error::Error;

use std::time::Duration;

use http::header::{
    CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, HeaderName, HeaderValue, RETRY_AFTER,
};
use http::{HeaderMap, Response, StatusCode};

use super::body::ResponseBody;
use super::deadlines::Late;
use super::gate::Answer;
use super::head::{BadHead, is_grpc};
use super::upload::Watch;
use crate::proxy::error::FlowError;
use crate::proxy::tcp::Broken;
use crate::telemetry::{Refusal, exchange};

/// Why an exchange has no answer from its server.
#[derive(Debug, thiserror::Error)]
pub(in crate::proxy) enum ExchangeError {
    /// The request is not to be passed on.
    #[error("{0}")]
    Head(#[from] BadHead),
    /// The service has routes, and the request is none's.
    #[error("no rule of the service's routes matches the request")]
    NoRule,
    /// The rule's backend is none, or not known.
    #[error("the rule that matches the request has no backend that is known")]
    NoBackend,
    /// What the rule says of requests cannot be done to this one.
    #[error("a filter of the rule that matches the request cannot be applied to it")]
    Filter,
    /// The server cannot be reached.
    #[error("{0}")]
    Flow(#[from] FlowError),
    /// It took too long.
    #[error("{0}")]
    Late(#[from] Late),
    /// A filter of the Server's route has answered it.
    #[error("the request was answered by its route")]
    Answered(Answer),
    /// The Server takes no more of them for so long.
    #[error("the Server's limit of requests is reached")]
    Limited(Duration),
    /// Policy has changed while the server was waited for.
    #[error("policy no longer allows the request")]
    Revoked,
    /// The endpoint does not speak the version in which the request has a form, and has seen nothing of it.
    #[error("the application speaks another version of HTTP: {0}")]
    OtherVersion(&'static str),
    /// The client has broken off what it had to say.
    #[error("the request's body broke off: {0}")]
    BrokenOff(#[source] hyper::Error),
    /// The connection to the server failed before it answered.
    #[error("the server's connection failed: {0}")]
    Server(#[source] hyper::Error),
}

impl ExchangeError {
    /// Of a request that was sent, with this body.
    pub(super) fn of_sent(error: hyper::Error, upload: &Watch) -> Self {
        if error.is_user() || upload.is_broken() {
            Self::BrokenOff(error)
        } else {
            Self::Server(error)
        }
    }

    /// The status that HTTP has for it.
    pub(in crate::proxy) fn status(&self) -> StatusCode {
        match self {
            Self::Head(BadHead::ResponseCoding | BadHead::Switched) => StatusCode::BAD_GATEWAY,
            Self::Head(BadHead::ConnectUnseen) => StatusCode::METHOD_NOT_ALLOWED,
            Self::Head(_) | Self::BrokenOff(_) => StatusCode::BAD_REQUEST,
            Self::NoRule => StatusCode::NOT_FOUND,
            Self::NoBackend | Self::Filter => StatusCode::INTERNAL_SERVER_ERROR,
            Self::Answered(answer) => answer.status,
            Self::Revoked => StatusCode::FORBIDDEN,
            Self::Limited(_) => StatusCode::TOO_MANY_REQUESTS,
            Self::Server(_) | Self::OtherVersion(_) => StatusCode::BAD_GATEWAY,
            Self::Late(_) => StatusCode::GATEWAY_TIMEOUT,
            Self::Flow(error) => status_of_flow(error),
        }
    }

    /// The status that gRPC has for it.
    pub(super) fn grpc_code(&self) -> u32 {
        match self {
            Self::Late(_) => GRPC_DEADLINE_EXCEEDED,
            _ => grpc_code_of(self.status()),
        }
    }

    /// As metrics of exchanges name it.
    pub(super) fn label(&self) -> exchange::ExchangeError {
        match self {
            Self::Late(late) => late.label(),
            // It did not come to its end, and whether the client still hears of it is chance.
            Self::BrokenOff(_) => exchange::ExchangeError::Cancel,
            Self::Server(error) => broken(error),
            Self::Flow(error) => label_of_flow(error),
            Self::Head(_)
            | Self::NoRule
            | Self::NoBackend
            | Self::Filter
            | Self::OtherVersion(_)
            | Self::Answered(_)
            | Self::Revoked
            | Self::Limited(_) => exchange::ExchangeError::Unknown,
        }
    }

    /// A word for it, as in metrics.
    pub(super) fn reason(&self) -> &'static str {
        match self {
            Self::Head(BadHead::ResponseCoding | BadHead::Switched) => "server_failed",
            Self::Head(BadHead::ConnectUnseen) => "connect_not_allowed",
            Self::Head(_) | Self::BrokenOff(_) => BAD_REQUEST,
            Self::NoRule => "no_rule",
            Self::NoBackend => "no_backend",
            Self::Answered(_) => "answered",
            Self::Revoked => "denied",
            Self::Limited(_) => RATE_LIMITED,
            Self::Filter => "bad_filter",
            Self::Server(_) => "server_failed",
            Self::OtherVersion(reason) => reason,
            Self::Late(late) => late.reason(),
            Self::Flow(error) => reason_of_flow(error),
        }
    }

    /// The answer.
    pub(super) fn answer(&self, is_grpc: bool) -> Response<ResponseBody> {
        if let Self::Answered(answer) = self {
            return Response::from_parts((**answer).clone(), ResponseBody::empty());
        }
        let answer = Told {
            status: self.status(),
            grpc_code: self.grpc_code(),
            reason: self.reason(),
            label: self.label(),
            // Where one request was no good, nobody knows where the next one begins.
            closes: matches!(self, Self::Head(_)),
        };
        let mut response = answer.response(is_grpc);
        if let Self::Limited(wait) = self {
            let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
            let headers = response.headers_mut();
            headers.insert(RETRY_AFTER, HeaderValue::from(seconds.max(1)));
        }
        response
    }
}

/// What is said in a server's place.
#[derive(Clone, Copy, Debug)]
pub(in crate::proxy) struct Told {
    status: StatusCode,
    grpc_code: u32,
    reason: &'static str,
    label: exchange::ExchangeError,
    closes: bool,
}

impl Told {
    /// To every request of a client whose connection was refused.
    pub(super) fn to_refused(error: &FlowError) -> Self {
        let status = status_of_flow(error);
        Self {
            status,
            grpc_code: grpc_code_of(status),
            reason: reason_of_flow(error),
            label: label_of_flow(error),
            closes: true,
        }
    }

    /// As metrics of exchanges name it.
    pub(in crate::proxy) fn label(self) -> exchange::ExchangeError {
        self.label
    }

    /// A word for it, as in metrics.
    pub(in crate::proxy) fn reason(self) -> &'static str {
        self.reason
    }

    /// A caller of gRPC hears it as a status of gRPC (its HTTP/2 mapping, "Responses").
    pub(super) fn response(self, is_grpc: bool) -> Response<ResponseBody> {
        let mut response = Response::new(ResponseBody::empty());
        let headers = response.headers_mut();
        headers.insert(ERROR, HeaderValue::from_static(self.reason));
        if self.closes {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        if is_grpc {
            say_grpc(headers, self.grpc_code, self.reason);
        } else {
            *response.status_mut() = self.status;
        }
        response
    }
}

/// How an exchange broke: its stream, or its connection.
pub(super) fn broken(error: &hyper::Error) -> exchange::ExchangeError {
    let mut source = error.source();
    while let Some(error) = source {
        if let Some(error) = error.downcast_ref::<h2::Error>() {
            return broken_stream(error);
        }
        source = error.source();
    }
    exchange::ExchangeError::Io
}

fn broken_stream(error: &h2::Error) -> exchange::ExchangeError {
    match error.reason() {
        Some(h2::Reason::REFUSED_STREAM) => exchange::ExchangeError::Refused,
        Some(h2::Reason::ENHANCE_YOUR_CALM) => exchange::ExchangeError::EnhanceYourCalm,
        _ if error.is_go_away() => exchange::ExchangeError::GoAway,
        _ if error.is_reset() => exchange::ExchangeError::Reset,
        _ => exchange::ExchangeError::Io,
    }
}

/// What gRPC says where HTTP says this.
fn grpc_code_of(status: StatusCode) -> u32 {
    match status {
        StatusCode::BAD_REQUEST => GRPC_INTERNAL,
        StatusCode::FORBIDDEN => GRPC_PERMISSION_DENIED,
        StatusCode::NOT_FOUND => GRPC_UNIMPLEMENTED,
        StatusCode::TOO_MANY_REQUESTS => GRPC_RESOURCE_EXHAUSTED,
        _ => GRPC_UNAVAILABLE,
    }
}

fn status_of_flow(error: &FlowError) -> StatusCode {
    match error {
        error if is_denied(error) => StatusCode::FORBIDDEN,
        FlowError::ConnectTimeout { .. } => StatusCode::GATEWAY_TIMEOUT,
        // The server's port is declared to speak the other version.
        FlowError::NotHttp => StatusCode::HTTP_VERSION_NOT_SUPPORTED,
        FlowError::Connect { .. } | FlowError::Tunnel(_) | FlowError::RefusedByPeer { .. } => {
            StatusCode::BAD_GATEWAY
        }
        _ => StatusCode::SERVICE_UNAVAILABLE,
    }
}

fn label_of_flow(error: &FlowError) -> exchange::ExchangeError {
    match error {
        FlowError::NoEndpoint(..) => exchange::ExchangeError::FailFast,
        FlowError::TooManyFlows
        | FlowError::TooManyWaiting(..)
        | FlowError::TooManyExchanges
        | FlowError::NoDescriptors
        | FlowError::Broken(Broken::TooManyBytes) => exchange::ExchangeError::LoadShed,
        FlowError::NotHttp => exchange::ExchangeError::Unknown,
        error if is_denied(error) => exchange::ExchangeError::Unknown,
        _ => exchange::ExchangeError::Io,
    }
}

fn reason_of_flow(error: &FlowError) -> &'static str {
    error.refusal().map_or("reset", Refusal::as_str)
}

/// Makes it an answer to a call of gRPC that was not served.
pub(super) fn say_grpc(headers: &mut HeaderMap, code: u32, message: &'static str) {
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers.insert(GRPC_STATUS, code.into());
    headers.insert(GRPC_MESSAGE, HeaderValue::from_static(message));
}

/// Whether an answer may end before its time by trailers that say why: one to a call of gRPC, of a length that
/// nobody was told.
pub(super) fn may_end_early(headers: &HeaderMap) -> bool {
    is_grpc(headers) && !headers.contains_key(CONTENT_LENGTH)
}

/// How such an answer ends that takes too long.
pub(super) fn late_trailers(late: Late) -> HeaderMap {
    let error = ExchangeError::Late(late);
    let mut trailers = HeaderMap::new();
    trailers.insert(GRPC_STATUS, error.grpc_code().into());
    trailers.insert(GRPC_MESSAGE, HeaderValue::from_static(error.reason()));
    trailers.insert(ERROR, HeaderValue::from_static(error.reason()));
    trailers
}

/// Whether it is an agent's answer that is about the client: there is no room for its request, it speaks what
/// the server's port is not declared to, or its request is none.
pub(super) fn is_about_client(headers: &HeaderMap) -> bool {
    let reasons = [
        Refusal::TooManyExchanges.as_str(),
        Refusal::TooManyBytes.as_str(),
        Refusal::NotHttp.as_str(),
        BAD_REQUEST,
    ];
    reason_among(headers, &reasons).is_some()
}

/// Whether it is policy for which the mesh has refused: a call of gRPC hears so with the status 200.
pub(super) fn is_of_policy(headers: &HeaderMap) -> bool {
    let reasons = [
        Refusal::Denied.as_str(),
        Refusal::NetworkPolicy.as_str(),
        Refusal::EgressDenied.as_str(),
        Refusal::NetworkPolicyEgress.as_str(),
        RATE_LIMITED,
    ];
    reason_among(headers, &reasons).is_some()
}

/// Which version the endpoint speaks only, if it is for that that the mesh has answered in its place: it has
/// seen nothing of the request.
pub(super) fn other_version(headers: &HeaderMap) -> Option<&'static str> {
    reason_among(headers, &[ONLY_HTTP1, ONLY_HTTP2])
}

/// Why the mesh has answered in a server's place, if it is for one of these.
fn reason_among(headers: &HeaderMap, reasons: &[&'static str]) -> Option<&'static str> {
    let why = headers.get(ERROR)?;
    reasons.iter().copied().find(|it| why == it)
}

fn is_denied(error: &FlowError) -> bool {
    match error {
        FlowError::Denied(_)
        | FlowError::PolicyChanged(_)
        | FlowError::EgressDenied(_)
        | FlowError::EgressRevoked(_)
        | FlowError::NotLetOut(_)
        | FlowError::NoLongerLetOut(_) => true,
        FlowError::RefusedByPeer { status, .. } => *status == StatusCode::UNAUTHORIZED,
        _ => false,
    }
}

/// Why the mesh answered in a server's place (response).
pub(super) const ERROR: HeaderName = HeaderName::from_static("weft-error");
/// The application speaks that, in which a call of gRPC has no form.
pub(super) const ONLY_HTTP1: &str = "only_http1";
/// The application speaks that, in which CONNECT and upgrades have none.
pub(super) const ONLY_HTTP2: &str = "only_http2";
/// The Server takes no more for now.
const RATE_LIMITED: &str = "rate_limited";
/// What cannot be passed on.
pub(super) const BAD_REQUEST: &str = "bad_request";
/// The status of a call of gRPC.
pub(super) const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");
const GRPC_DEADLINE_EXCEEDED: u32 = 4;
const GRPC_PERMISSION_DENIED: u32 = 7;
const GRPC_RESOURCE_EXHAUSTED: u32 = 8;
const GRPC_UNIMPLEMENTED: u32 = 12;
const GRPC_INTERNAL: u32 = 13;
/// The server cannot be used.
pub(super) const GRPC_UNAVAILABLE: u32 = 14;

#[cfg(test)]
mod tests {
    use weft_core::{AccessPolicy, DenyReason, Verdict};

    use super::*;

    #[test]
    fn what_is_about_the_client_is_said_to_be() {
        for is_grpc in [false, true] {
            for error in [
                FlowError::TooManyExchanges.into(),
                FlowError::NotHttp.into(),
                ExchangeError::Head(BadHead::NoHost),
            ] {
                let answer = error.answer(is_grpc);
                assert!(is_about_client(answer.headers()));
            }
            let limited = ExchangeError::Limited(Duration::from_secs(1)).answer(is_grpc);
            assert!(is_of_policy(limited.headers()));
            let other = ExchangeError::from(FlowError::PodGone).answer(is_grpc);
            assert!(!is_of_policy(other.headers()));
            assert!(!is_about_client(other.headers()));
        }
    }

    #[test]
    fn calls_end_early_by_trailers_that_say_why() {
        for (kind, length, may) in [
            (Some("application/grpc+proto"), None, true),
            (Some("application/grpc"), Some("20"), false),
            (Some("text/plain"), None, false),
            (None, None, false),
        ] {
            let lines = [(CONTENT_TYPE, kind), (CONTENT_LENGTH, length)];
            let lines = lines.into_iter().filter_map(|(name, value)| {
                let value = value?;
                Some((name, HeaderValue::from_static(value)))
            });
            assert_eq!(may_end_early(&lines.collect()), may, "{kind:?} {length:?}");
        }
        let trailers = late_trailers(Late::Idle);
        let said = [GRPC_STATUS, GRPC_MESSAGE, ERROR].map(|it| trailers[it].clone());
        assert_eq!(said, ["4", "stream_idle", "stream_idle"]);
    }

    #[test]
    fn errors_become_answers() {
        let to = "10.1.2.3:80".parse().expect("valid");
        let denied = FlowError::Denied(Verdict::Deny {
            server: None,
            reason: DenyReason::Policy(AccessPolicy::Deny),
        });
        let by_peer = FlowError::RefusedByPeer {
            by: to,
            status: StatusCode::UNAUTHORIZED,
            reason: Some("denied".to_owned()),
        };
        let none = FlowError::NoEndpoint("shop/web".parse().expect("valid"), 80);
        let timeout = FlowError::ConnectTimeout { to };
        for (error, status, grpc, reason) in [
            (BadHead::NoHost.into(), 400, "13", "bad_request"),
            (BadHead::Switched.into(), 502, "14", "server_failed"),
            (denied.into(), 403, "7", "denied"),
            (by_peer.into(), 403, "7", "denied"),
            (none.into(), 503, "14", "no_endpoint"),
            (
                FlowError::EgressDenied("policy.weft.dev/shop/out".parse().expect("valid")).into(),
                403,
                "7",
                "egress_denied",
            ),
            (
                FlowError::NotLetOut(DenyReason::WorkloadPolicyUnknown).into(),
                403,
                "7",
                "network_policy_egress",
            ),
            (
                FlowError::TooManyExchanges.into(),
                503,
                "14",
                "too_many_exchanges",
            ),
            (
                FlowError::from(Broken::TooManyBytes).into(),
                503,
                "14",
                "too_many_bytes",
            ),
            (timeout.into(), 504, "14", "connect_timeout"),
            (Late::Request.into(), 504, "4", "request_timeout"),
            (Late::Client.into(), 504, "4", "request_timeout"),
            (Late::Response.into(), 504, "4", "response_timeout"),
            (Late::Backend.into(), 504, "4", "backend_timeout"),
            (Late::Idle.into(), 504, "4", "stream_idle"),
            (
                ExchangeError::Limited(Duration::from_millis(1500)),
                429,
                "8",
                "rate_limited",
            ),
            (FlowError::NotHttp.into(), 505, "14", "not_http"),
            (ExchangeError::NoRule, 404, "12", "no_rule"),
            (ExchangeError::NoBackend, 500, "14", "no_backend"),
            (ExchangeError::Filter, 500, "14", "bad_filter"),
        ] {
            let error: ExchangeError = error;
            let answer = error.answer(false);
            let waits = matches!(error, ExchangeError::Limited(_)).then_some("2");
            let retry = answer.headers().get(RETRY_AFTER);
            assert_eq!(retry.map(|it| it.to_str().expect("a text")), waits);
            assert_eq!(answer.status(), status, "{error}");
            assert_eq!(answer.headers()[ERROR], reason);
            let answer = error.answer(true);
            assert_eq!(answer.status(), 200);
            assert_eq!(answer.headers()[GRPC_STATUS], grpc, "{error}");
        }
    }
}
