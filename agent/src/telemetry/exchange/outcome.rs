//! How an exchange ended, and whether that is a success, as Linkerd classifies it.

use http::StatusCode;
use weft_core::route::ResponseClasses;

use super::super::labels::Rendered;

/// A `grpc-status`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GrpcStatus(u8);

/// Why an exchange did not end by itself; a label value, Linkerd's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ExchangeError {
    /// Nothing was ready to take it.
    FailFast,
    /// A limit was reached.
    LoadShed,
    /// It took longer than the route allows.
    RequestTimeout,
    /// The response's head took too long.
    ResponseHeadersTimeout,
    /// The response's body took too long.
    ResponseStreamTimeout,
    /// Nothing moved for too long.
    IdleTimeout,
    /// The client gave it up.
    Cancel,
    /// The server did not take it: it may be sent again.
    Refused,
    /// The server says that the client asks for too much.
    EnhanceYourCalm,
    /// The stream was reset.
    Reset,
    /// The connection is being closed.
    GoAway,
    /// The connection broke.
    Io,
    /// Something else.
    Unknown,
}

/// A status code; from outside of 100 to 599, and what a series has no room for, as `other`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Status {
    Code(u16),
    Other,
}

/// How an exchange ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Outcome {
    /// Of the response, if there was one.
    pub(super) status: Option<Status>,
    pub(super) class: Class,
}

/// How an exchange ended, but for its status code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Class {
    is_success: bool,
    /// That of the headers or the trailers.
    grpc: Option<GrpcStatus>,
    error: Option<ExchangeError>,
}

impl GrpcStatus {
    /// Reads the header or trailer; none if it is not a number.
    pub fn parse(value: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(value).ok()?;
        let number: u32 = text.parse().ok()?;
        let known = u8::try_from(number).ok().filter(|it| *it < OTHER_GRPC);
        Some(Self(known.unwrap_or(OTHER_GRPC)))
    }

    /// Of a status that the proxy itself answers.
    pub fn of(code: tonic::Code) -> Self {
        // They are 0 to 16.
        Self(code as u8)
    }

    /// Whether it was asked for too much.
    pub fn is_resource_exhausted(self) -> bool {
        self.0 == 8
    }

    fn is_success(self) -> bool {
        // Unknown, DeadlineExceeded, Internal, Unavailable, DataLoss, and what nobody knows.
        !matches!(self.0, 2 | 4 | 13 | 14 | 15 | OTHER_GRPC)
    }

    fn number(self) -> String {
        match self.0 {
            OTHER_GRPC => OTHER.to_owned(),
            number => number.to_string(),
        }
    }

    pub(super) fn name(self) -> &'static str {
        GRPC_NAMES.get(usize::from(self.0)).unwrap_or(&"UNKNOWN")
    }
}

/// Whether a response that came to its end is a success; `classes` are what a ServiceProfile says of it.
pub fn is_success(
    status: StatusCode,
    in_headers: Option<GrpcStatus>,
    in_trailers: Option<GrpcStatus>,
    classes: Option<&ResponseClasses>,
) -> bool {
    let outcome = Outcome::of_response(status.into(), in_headers, in_trailers, classes);
    outcome.class.is_success
}

impl ExchangeError {
    /// As a label value.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::FailFast => "FAIL_FAST",
            Self::LoadShed => "LOAD_SHED",
            Self::RequestTimeout => "REQUEST_TIMEOUT",
            Self::ResponseHeadersTimeout => "RESPONSE_HEADERS_TIMEOUT",
            Self::ResponseStreamTimeout => "RESPONSE_STREAM_TIMEOUT",
            Self::IdleTimeout => "IDLE_TIMEOUT",
            Self::Cancel => "CANCEL",
            Self::Refused => "REFUSED",
            Self::EnhanceYourCalm => "ENHANCE_YOUR_CALM",
            Self::Reset => "RESET",
            Self::GoAway => "GO_AWAY",
            Self::Io => "IO",
            Self::Unknown => "UNKNOWN",
        }
    }

    /// The kind of error that it is for Linkerd's metrics of errors.
    pub(super) fn as_kind(self) -> &'static str {
        match self {
            Self::FailFast => "failfast",
            Self::LoadShed => "loadshed",
            Self::RequestTimeout
            | Self::ResponseHeadersTimeout
            | Self::ResponseStreamTimeout
            | Self::IdleTimeout => "response timeout",
            Self::Refused | Self::EnhanceYourCalm | Self::Reset | Self::GoAway | Self::Io => "i/o",
            Self::Cancel | Self::Unknown => "unexpected",
        }
    }
}

impl From<StatusCode> for Status {
    fn from(status: StatusCode) -> Self {
        match status.as_u16() {
            code @ 100..=599 => Self::Code(code),
            _ => Self::Other,
        }
    }
}

impl Status {
    /// What these say of it.
    fn class(self, classes: &ResponseClasses) -> Option<bool> {
        match self {
            Self::Code(code) => classes.is_success(code),
            Self::Other => None,
        }
    }

    fn is_server_error(self) -> bool {
        matches!(self, Self::Code(500..=599))
    }

    pub(super) fn render(self, name: &'static str, labels: &mut Rendered) {
        let value = match self {
            Self::Code(code) => code.to_string(),
            Self::Other => OTHER.to_owned(),
        };
        labels.push((name, value));
    }
}

impl Outcome {
    /// Of a response that came to its end. A status in the headers is final; a server's error is one
    /// whatever its trailers say. What a ServiceProfile says of the status comes before all of these.
    pub(super) fn of_response(
        status: Status,
        in_headers: Option<GrpcStatus>,
        in_trailers: Option<GrpcStatus>,
        classes: Option<&ResponseClasses>,
    ) -> Self {
        let (grpc, is_success) = match (in_headers, in_trailers) {
            (Some(grpc), _) => (Some(grpc), grpc.is_success()),
            (None, _) if status.is_server_error() => (None, false),
            (None, Some(grpc)) => (Some(grpc), grpc.is_success()),
            (None, None) => (None, true),
        };
        let said = classes.and_then(|it| status.class(it));
        let is_success = said.unwrap_or(is_success);
        Self {
            status: Some(status),
            class: Class {
                is_success,
                grpc,
                error: None,
            },
        }
    }

    /// Of an exchange that failed, before or within the response.
    pub(super) fn of_error(status: Option<Status>, error: ExchangeError) -> Self {
        Self {
            status,
            class: Class {
                is_success: false,
                grpc: None,
                error: Some(error),
            },
        }
    }

    /// The same, and why it was not the server's, or not all of it.
    pub(super) fn because(mut self, error: ExchangeError) -> Self {
        self.class.error = Some(error);
        self
    }

    /// The status of gRPC, if there was one.
    pub(super) fn grpc(self) -> Option<GrpcStatus> {
        self.class.grpc
    }

    /// Why it did not end by itself.
    pub(super) fn error(self) -> Option<ExchangeError> {
        self.class.error
    }

    /// The labels of a route's statuses.
    pub(super) fn render_of_route(self, is_grpc: bool, labels: &mut Rendered) {
        if is_grpc {
            let grpc = self.class.grpc.map_or("UNKNOWN", GrpcStatus::name);
            labels.push(("grpc_status", grpc.to_owned()));
        } else if let Some(status) = self.status {
            status.render("http_status", labels);
        }
        self.class.render_error(labels);
    }

    /// The same of outcomes that a series has no room for.
    pub(super) fn render_other(is_grpc: bool) -> Rendered {
        let name = if is_grpc {
            "grpc_status"
        } else {
            "http_status"
        };
        vec![(name, OTHER.to_owned())]
    }
}

impl Class {
    /// The labels of `response_total` but for the status code.
    pub(super) fn render(self, labels: &mut Rendered) {
        let classification = if self.is_success {
            "success"
        } else {
            "failure"
        };
        labels.push(("classification", classification.to_owned()));
        if let Some(grpc) = self.grpc {
            labels.push(("grpc_status", grpc.number()));
        }
        self.render_error(labels);
    }

    fn render_error(self, labels: &mut Rendered) {
        if let Some(error) = self.error {
            labels.push(("error", error.as_str().to_owned()));
        }
    }
}

const OTHER: &str = "other";
/// One above the last that is defined.
const OTHER_GRPC: u8 = 17;
const GRPC_NAMES: [&str; OTHER_GRPC as usize] = [
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
];

#[cfg(test)]
mod tests {
    use weft_core::route::StatusRange;

    use super::*;

    #[test]
    fn responses_are_classified_as_linkerd_does() {
        // HTTP status, in the headers, in the trailers; whether it is a success, what is shown.
        for (status, headers, trailers, success, shown) in [
            (200, None, None, true, None),
            (101, None, None, true, None),
            (404, None, None, true, None),
            (499, None, None, true, None),
            (500, None, None, false, None),
            (503, None, Some("0"), false, None),
            (999, None, None, true, None),
            (200, None, Some("0"), true, Some("0")),
            (200, None, Some("1"), true, Some("1")),
            (200, None, Some("2"), false, Some("2")),
            (200, None, Some("4"), false, Some("4")),
            (200, None, Some("5"), true, Some("5")),
            (200, None, Some("8"), true, Some("8")),
            (200, None, Some("12"), true, Some("12")),
            (200, None, Some("13"), false, Some("13")),
            (200, None, Some("14"), false, Some("14")),
            (200, None, Some("15"), false, Some("15")),
            (200, None, Some("16"), true, Some("16")),
            (200, None, Some("17"), false, Some("other")),
            (200, None, Some("4294967295"), false, Some("other")),
            (200, None, Some("-1"), true, None),
            (200, None, Some("ok"), true, None),
            (200, Some("14"), Some("0"), false, Some("14")),
            (500, Some("0"), None, true, Some("0")),
        ] {
            let parse = |it: Option<&str>| GrpcStatus::parse(it?.as_bytes());
            let status = StatusCode::from_u16(status).expect("valid").into();
            let outcome = Outcome::of_response(status, parse(headers), parse(trailers), None);
            let row = (status, headers, trailers);
            assert_eq!(outcome.class.is_success, success, "{row:?}");
            let grpc = outcome.class.grpc.map(GrpcStatus::number);
            assert_eq!(grpc.as_deref(), shown, "{row:?}");
        }
    }

    #[test]
    fn what_a_profile_says_of_a_status_comes_first() {
        let list = |text| StatusRange::list(text).expect("valid");
        let failures = ResponseClasses {
            failures: list("404,201"),
            successes: list("500,202"),
        };
        // HTTP status, in the headers, in the trailers; whether it is a success.
        for (status, headers, trailers, success) in [
            (404, None, None, false),
            (403, None, None, true),
            (500, None, None, true),
            (503, None, None, false),
            (201, Some("0"), None, false),
            (201, None, Some("0"), false),
            (202, Some("14"), None, true),
            (202, None, Some("14"), true),
            (200, None, Some("14"), false),
            (500, None, Some("13"), true),
            (999, None, None, true),
        ] {
            let parse = |it: Option<&str>| GrpcStatus::parse(it?.as_bytes());
            let code = StatusCode::from_u16(status).expect("valid");
            let is = is_success(code, parse(headers), parse(trailers), Some(&failures));
            assert_eq!(is, success, "{status} {headers:?} {trailers:?}");
        }
    }

    #[test]
    fn codes_have_their_names() {
        for code in 0..=16 {
            let code = tonic::Code::from_i32(code);
            let name = GrpcStatus::of(code).name();
            let plain: String = name.split('_').collect();
            let debug = format!("{code:?}").to_ascii_uppercase();
            assert_eq!(plain, debug);
        }
    }
}
