//! What is to be done when a response has ended.

use std::time::Duration;

use http::header::RETRY_AFTER;
use http::{HeaderMap, StatusCode, response};
use weft_core::route::ResponseClasses;

use crate::balance::InFlight;
use crate::balance::breaker::Judgement;
use crate::proxy::http::answer;
use crate::proxy::http::connection::OpenStream;
use crate::proxy::http::deadlines::Late;
use crate::proxy::http::head::is_grpc;
use crate::proxy::http::measure::{Timers, grpc_status};
use crate::proxy::usage::Place;
use crate::telemetry::exchange::{self, GrpcStatus};

/// What is to be done when a response has ended.
#[derive(Debug)]
pub(in crate::proxy::http) struct Ending {
    /// Its place in a connection of HTTP/2.
    pub(super) _stream: Option<OpenStream>,
    /// The endpoint has to do with it.
    in_flight: Option<InFlight>,
    status: StatusCode,
    /// The server's agent refused it for what the client is or does, which says nothing of the endpoint: what one pod
    /// is refused there must not keep others away.
    is_about_client: bool,
    /// Its places in the limits of both pods.
    pub(super) _places: [Option<Place>; 2],
    timers: Timers,
    in_trailers: Option<GrpcStatus>,
}

impl Ending {
    /// Of an exchange that nothing is held for.
    pub(in crate::proxy::http) fn nothing() -> Self {
        Self {
            _stream: None,
            in_flight: None,
            status: StatusCode::OK,
            is_about_client: false,
            _places: [None, None],
            timers: Timers::default(),
            in_trailers: None,
        }
    }

    /// Of an exchange whose response's head has come.
    pub(in crate::proxy::http) fn measured(timers: Option<Timers>, head: &response::Parts) -> Self {
        let mut ending = Self::nothing();
        ending.status = head.status;
        if let Some(mut timers) = timers {
            timers.respond(head.status, &head.headers);
            ending.timers = timers;
        }
        ending
    }

    /// The endpoint has to do with it until then. What it makes of it is known by the head; of a call of gRPC only
    /// at the end, unless there is no body.
    pub(super) fn hold(&mut self, in_flight: Option<InFlight>, head: &response::Parts) {
        self.in_flight = in_flight;
        self.is_about_client = answer::is_about_client(&head.headers);
        let in_head = grpc_status(&head.headers);
        if in_head.is_some() || head.status.is_server_error() || !is_grpc(&head.headers) {
            let rest = retry_after(head.status, &head.headers);
            let judgement = judgement(head.status, in_head, None, self.timers.classes());
            self.judge(judgement, rest);
        }
    }

    fn judge(&mut self, judgement: Judgement, rest: Option<Duration>) {
        let judgement = match self.is_about_client {
            true => Judgement::Unknown,
            false => judgement,
        };
        if let Some(in_flight) = &mut self.in_flight {
            in_flight.judge(judgement, rest);
        }
    }

    /// The exchange has a place in a pod's limits until then.
    pub(in crate::proxy::http) fn holding(mut self, place: Place) -> Self {
        self._places[0] = Some(place);
        self
    }

    /// A part of the response's body has come, with so many bytes.
    pub(in crate::proxy::http) fn part(&mut self, bytes: usize) {
        self.timers.part(bytes);
    }

    /// The trailers have come.
    pub(in crate::proxy::http) fn trailers(&mut self, trailers: &HeaderMap) {
        self.in_trailers = grpc_status(trailers);
    }

    /// All of the response has come.
    pub(in crate::proxy::http) fn ended(mut self) {
        let classes = self.timers.classes();
        let judgement = judgement(self.status, None, self.in_trailers, classes);
        self.judge(judgement, None);
        self.timers.end(self.in_trailers);
    }

    /// It took too long; with the trailers that say so, if the client gets any.
    pub(in crate::proxy::http) fn late(self, late: Late, trailers: Option<&HeaderMap>) {
        match trailers {
            Some(trailers) => self.timers.late(late, trailers),
            None => self.timers.fail(late.label()),
        }
    }

    /// The client broke its request off, and so it failed.
    pub(in crate::proxy::http) fn broken_off(self) {
        self.timers.fail(exchange::ExchangeError::Cancel);
    }

    /// The server failed in the middle of it.
    pub(in crate::proxy::http) fn failed(mut self, error: &hyper::Error) {
        self.judge(Judgement::Failure, None);
        self.timers.fail(answer::broken(error));
    }
}

/// What an answer says of its endpoint: as it is classified for metrics, but that too many requests are no
/// failure of who says so.
fn judgement(
    status: StatusCode,
    in_headers: Option<GrpcStatus>,
    in_trailers: Option<GrpcStatus>,
    classes: Option<&ResponseClasses>,
) -> Judgement {
    let grpc = in_headers.or(in_trailers);
    if status == StatusCode::TOO_MANY_REQUESTS
        || grpc.is_some_and(GrpcStatus::is_resource_exhausted)
    {
        Judgement::Limited
    } else if exchange::is_success(status, in_headers, in_trailers, classes) {
        Judgement::Success
    } else {
        Judgement::Failure
    }
}

/// For how long the endpoint asks to be left alone (RFC 9110, section 10.2.3), if it says so in seconds: dates are of
/// clocks that nobody compared.
pub(super) fn retry_after(status: StatusCode, headers: &HeaderMap) -> Option<Duration> {
    let says_so = matches!(
        status,
        StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE
    );
    let value = headers.get(RETRY_AFTER).filter(|_| says_so)?;
    let seconds = value.to_str().ok()?.trim();
    // What is no number of that size is longer than what is heeded anyway, or nothing.
    let digits = !seconds.is_empty() && seconds.bytes().all(|it| it.is_ascii_digit());
    digits.then(|| Duration::from_secs(seconds.parse::<u32>().unwrap_or(u32::MAX).into()))
}

#[cfg(test)]
mod tests {
    use weft_core::route::StatusRange;

    use super::*;

    #[test]
    fn answers_are_judged_as_they_are_classified() {
        use Judgement::{Failure, Limited, Success};
        let list = |text| StatusRange::list(text).expect("valid");
        let said = ResponseClasses {
            failures: list("404,429"),
            successes: list("500"),
        };
        let said = Some(&said);
        for (status, headers, trailers, classes, expected) in [
            (200, None, None, None, Success),
            (404, None, None, None, Success),
            (500, None, None, None, Failure),
            (503, None, None, None, Failure),
            (429, None, None, None, Limited),
            (200, None, Some("0"), None, Success),
            (200, None, Some("5"), None, Success),
            (200, None, Some("14"), None, Failure),
            (200, Some("13"), None, None, Failure),
            (200, None, Some("8"), None, Limited),
            (404, None, None, said, Failure),
            (500, None, None, said, Success),
            (503, None, None, said, Failure),
            (429, None, None, said, Limited),
        ] {
            let parse = |it: Option<&str>| GrpcStatus::parse(it?.as_bytes());
            let status = StatusCode::from_u16(status).expect("valid");
            let found = judgement(status, parse(headers), parse(trailers), classes);
            assert_eq!(found, expected, "{status} {headers:?} {trailers:?}");
        }
    }

    #[test]
    fn a_pause_is_asked_for_in_seconds_by_who_has_too_much_to_do() {
        for (status, value, expected) in [
            (429, "5", Some(5)),
            (503, " 120 ", Some(120)),
            (503, "99999999999999999999", Some(u32::MAX.into())),
            (500, "5", None),
            (200, "5", None),
            (429, "-5", None),
            (429, "1.5", None),
            (429, "", None),
            (429, "Fri, 31 Dec 1999 23:59:59 GMT", None),
        ] {
            let status = StatusCode::from_u16(status).expect("valid");
            let value = value.parse().expect("valid");
            let headers = HeaderMap::from_iter([(RETRY_AFTER, value)]);
            let expected = expected.map(Duration::from_secs);
            assert_eq!(retry_after(status, &headers), expected, "{headers:?}");
        }
    }
}
