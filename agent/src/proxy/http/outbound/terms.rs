//! How long an exchange may take, and whether its request may be sent again: what the route or the Service says,
//! and what the client does.

use std::borrow::Cow;
use std::time::Duration;

use http::header::{EXPECT, HeaderName, HeaderValue};
use http::{HeaderMap, request};
use tokio::time::Instant;
use weft_core::route::{
    BudgetSettings, GrpcCodes, Reliability, Retry, StatusRange, Timeouts, annotated_duration,
    grpc_timeout, write_grpc_timeout,
};

use crate::proxy::http::deadlines::Late;
use crate::proxy::http::head::Purpose;

/// What holds for one exchange.
#[derive(Debug)]
pub(in crate::proxy) struct Terms<'a> {
    /// When all of it must be over.
    pub(in crate::proxy) end: Option<(Instant, Late)>,
    /// What holds for its parts.
    pub(in crate::proxy) timeouts: Timeouts,
    /// When its request is sent again.
    pub(in crate::proxy) retry: Option<Cow<'a, Retry>>,
    /// The client has said how long it waits, and is to be heard by the server.
    tells_server: bool,
}

impl<'a> Terms<'a> {
    /// Reads what the client says, and takes out what is said to the mesh alone. None: there are no terms. The budget is
    /// for retries that nobody but the client asks for.
    pub(in crate::proxy) fn of(
        (said, budget): (Option<&'a Reliability>, BudgetSettings),
        head: &mut request::Parts,
        is_grpc: bool,
        purpose: Purpose,
    ) -> Option<Self> {
        let of_client = match is_grpc {
            true => head.headers.get(GRPC_TIMEOUT),
            false => None,
        };
        if said.is_none() && of_client.is_none() {
            return None;
        }
        let now = Instant::now();
        let of_client = of_client.and_then(|it| grpc_timeout(it.to_str().ok()?));
        let mut timeouts = said.map(|it| it.timeouts).unwrap_or_default();
        let mut retry = said.and_then(|it| it.retry.as_ref()).map(Cow::Borrowed);
        if said.is_some_and(|it| it.heeds_headers) {
            heed(&mut timeouts, (&mut retry, budget), &mut head.headers);
        }
        if purpose == Purpose::Upgrade {
            // What it becomes takes as long as it does.
            timeouts.idle = None;
        }
        let of_route = timeouts.request.map(|it| (now + it, Late::Request));
        let tells_server = of_client.is_some();
        let of_client = of_client.map(|it| (now + it.min(MOST_PATIENCE), Late::Client));
        let ends = [of_route, of_client].into_iter().flatten();
        let may_repeat = purpose == Purpose::Exchange && !head.headers.contains_key(EXPECT);
        let terms = Self {
            end: ends.min_by_key(|(at, _)| *at),
            retry: retry.filter(|_| may_repeat),
            timeouts,
            tells_server,
        };
        terms.is_any().then_some(terms)
    }

    /// What bounds a try that begins now.
    pub(super) fn of_try(&self) -> Option<(Instant, Late)> {
        let of_try = self.timeouts.backend_request;
        let of_try = of_try.map(|it| (Instant::now() + it, Late::Backend));
        let both = [self.end, of_try].into_iter().flatten();
        both.min_by_key(|(at, _)| *at)
    }

    /// Tells the server how long the client waits still: never longer than it said itself.
    pub(super) fn tell_server(&self, headers: &mut HeaderMap, is_first: bool) {
        let Some((end, late)) = self.end.filter(|_| self.tells_server) else {
            return;
        };
        // What it said is as good.
        if is_first && late == Late::Client {
            return;
        }
        let left = write_grpc_timeout(end.saturating_duration_since(Instant::now()));
        if let Ok(value) = HeaderValue::try_from(left) {
            headers.insert(GRPC_TIMEOUT, value);
        }
    }

    fn is_any(&self) -> bool {
        self.end.is_some() || self.retry.is_some() || self.timeouts != Timeouts::default()
    }
}

/// Takes what the client says in place of what the route does, where it may. What cannot be read says nothing.
fn heed(
    timeouts: &mut Timeouts,
    (retry, budget): (&mut Option<Cow<'_, Retry>>, BudgetSettings),
    headers: &mut HeaderMap,
) {
    if let Some(request) = said(headers, TIMEOUT, annotated_duration) {
        timeouts.request = request;
    }
    if let Some(response) = said(headers, RESPONSE_TIMEOUT, annotated_duration) {
        timeouts.response = response;
    }
    let http = said(headers, RETRY_HTTP, StatusRange::list);
    let grpc = said(headers, RETRY_GRPC, GrpcCodes::list);
    let limit = said(headers, RETRY_LIMIT, |it| it.trim().parse());
    let try_timeout = said(headers, RETRY_TIMEOUT, annotated_duration);
    if http.is_none() && grpc.is_none() && limit.is_none() && try_timeout.is_none() {
        return;
    }
    let of_client = || Retry {
        budget,
        ..Retry::new()
    };
    let mut own = retry.take().map_or_else(of_client, Cow::into_owned);
    own.http = http.unwrap_or(own.http);
    own.grpc = grpc.unwrap_or(own.grpc);
    own.limit = limit.unwrap_or(own.limit);
    own.try_timeout = try_timeout.unwrap_or(own.try_timeout);
    *retry = (own.limit > 0).then_some(Cow::Owned(own));
}

/// Takes out a header that is said to the mesh, of whichever name, and reads it; Weft's own name comes first.
fn said<T, E>(
    headers: &mut HeaderMap,
    names: [HeaderName; 2],
    read: impl FnOnce(&str) -> Result<T, E>,
) -> Option<T> {
    let [own, linkerds] = names.map(|name| headers.remove(name));
    read(own.or(linkerds)?.to_str().ok()?).ok()
}

const GRPC_TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");
const TIMEOUT: [HeaderName; 2] = names("weft-timeout", "l5d-timeout");
const RESPONSE_TIMEOUT: [HeaderName; 2] = names("weft-response-timeout", "l5d-response-timeout");
const RETRY_HTTP: [HeaderName; 2] = names("weft-retry-http", "l5d-retry-http");
const RETRY_GRPC: [HeaderName; 2] = names("weft-retry-grpc", "l5d-retry-grpc");
const RETRY_LIMIT: [HeaderName; 2] = names("weft-retry-limit", "l5d-retry-limit");
const RETRY_TIMEOUT: [HeaderName; 2] = names("weft-retry-timeout", "l5d-retry-timeout");

const fn names(own: &'static str, linkerds: &'static str) -> [HeaderName; 2] {
    [
        HeaderName::from_static(own),
        HeaderName::from_static(linkerds),
    ]
}

/// A clock can be that far ahead; eight digits of hours are more than it may hold.
const MOST_PATIENCE: Duration = Duration::from_secs(365 * 24 * 3600);

#[cfg(test)]
mod tests {
    use hyper::Request;

    use super::*;

    const DEFAULT: BudgetSettings = BudgetSettings::DEFAULT;

    fn head(headers: &[(&str, &str)]) -> request::Parts {
        let mut request = Request::builder().uri("/");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(()).expect("valid").into_parts().0
    }

    fn seconds(it: u64) -> Option<Duration> {
        Some(Duration::from_secs(it))
    }

    /// (request timeout of the route, whether headers are heeded, headers) -> (seconds to the end, why; what
    /// headers are left)
    #[test]
    fn the_earlier_end_counts() {
        for (request, heeds, headers, end, left) in [
            (None, false, &[][..], None, 0),
            (seconds(5), false, &[], Some((5, Late::Request)), 0),
            (
                None,
                false,
                &[("grpc-timeout", "3S")],
                Some((3, Late::Client)),
                1,
            ),
            (
                seconds(5),
                false,
                &[("grpc-timeout", "3S")],
                Some((3, Late::Client)),
                1,
            ),
            (
                seconds(2),
                false,
                &[("grpc-timeout", "3S")],
                Some((2, Late::Request)),
                1,
            ),
            (None, false, &[("grpc-timeout", "soon")], None, 1),
            (
                seconds(5),
                true,
                &[("l5d-timeout", "7s")],
                Some((7, Late::Request)),
                0,
            ),
            (seconds(5), true, &[("l5d-timeout", "0s")], None, 0),
            (
                seconds(5),
                true,
                &[("l5d-timeout", "soon")],
                Some((5, Late::Request)),
                0,
            ),
            (
                seconds(5),
                false,
                &[("l5d-timeout", "7s")],
                Some((5, Late::Request)),
                1,
            ),
        ] {
            let said = Reliability {
                timeouts: Timeouts {
                    request,
                    ..Timeouts::default()
                },
                retry: None,
                heeds_headers: heeds,
            };
            let mut head = head(headers);
            let said = said.is_any().then_some(&said);
            let terms = Terms::of((said, DEFAULT), &mut head, true, Purpose::Exchange);
            let now = Instant::now();
            let found = terms.as_ref().and_then(|it| it.end).map(|(at, late)| {
                let until = at.saturating_duration_since(now) + Duration::from_millis(500);
                (until.as_secs(), late)
            });
            assert_eq!(found, end, "{request:?} {headers:?}");
            assert_eq!(head.headers.len(), left, "{headers:?}");
        }
    }

    /// (retries of the route, headers) -> (statuses, codes, limit, milliseconds of a try); what is said to the mesh
    /// never goes on.
    #[test]
    fn what_the_client_says_of_retries_comes_before_the_route() {
        let of_route = || Retry {
            http: StatusRange::list("500").expect("valid"),
            limit: 3,
            ..Retry::new()
        };
        let own = ("weft-retry-limit", "7");
        for (route, headers, expected) in [
            (None, &[][..], None),
            (Some(of_route()), &[], Some(("500-500", false, 3, None))),
            (
                None,
                &[("l5d-retry-http", "5xx")],
                Some(("500-599", false, 1, None)),
            ),
            (
                None,
                &[
                    ("l5d-retry-grpc", "unavailable"),
                    ("l5d-retry-timeout", "50ms"),
                ],
                Some(("", true, 1, Some(50))),
            ),
            (
                Some(of_route()),
                &[("l5d-retry-limit", "5"), own],
                Some(("500-500", false, 7, None)),
            ),
            (Some(of_route()), &[("l5d-retry-limit", "0")], None),
            (
                Some(of_route()),
                &[("l5d-retry-http", "7xx"), ("l5d-retry-limit", "many")],
                Some(("500-500", false, 3, None)),
            ),
            (
                Some(of_route()),
                &[("weft-retry-http", "503"), ("weft-retry-timeout", "1s")],
                Some(("503-503", false, 3, Some(1000))),
            ),
        ] {
            for heeds_headers in [true, false] {
                let said = Reliability {
                    retry: route.clone(),
                    heeds_headers,
                    ..Reliability::default()
                };
                let mut head = head(headers);
                let terms = Terms::of((Some(&said), DEFAULT), &mut head, false, Purpose::Exchange);
                let found = terms.and_then(|it| it.retry);
                if !heeds_headers {
                    assert_eq!(found.as_deref(), route.as_ref(), "{headers:?}");
                    assert_eq!(head.headers.len(), headers.len(), "{headers:?}");
                    continue;
                }
                assert!(head.headers.is_empty(), "{headers:?}");
                let shown = found.map(|it| {
                    let ranges = it.http.iter();
                    let ranges: Vec<_> = ranges
                        .map(|it| format!("{}-{}", it.first, it.last))
                        .collect();
                    let time = it.try_timeout.map(|it| it.as_millis());
                    (ranges.join(","), it.is_for_code(14), it.limit, time)
                });
                let expected = expected
                    .map(|(http, grpc, limit, time)| (str::to_owned(http), grpc, limit, time));
                assert_eq!(shown, expected, "{headers:?}");
            }
        }
    }

    /// (whether the route has retries) -> whose budget it is
    #[test]
    fn what_only_the_client_asks_for_has_the_budget_of_those() {
        let budget = |per_second| BudgetSettings {
            per_second,
            ..DEFAULT
        };
        let of_route = Retry {
            budget: budget(1),
            ..Retry::new()
        };
        for (retry, expected) in [(None, 2), (Some(of_route), 1)] {
            let said = Reliability {
                retry,
                heeds_headers: true,
                ..Reliability::default()
            };
            let mut head = head(&[("l5d-retry-http", "5xx")]);
            let said = (Some(&said), budget(2));
            let terms = Terms::of(said, &mut head, false, Purpose::Exchange);
            let found = terms.and_then(|it| it.retry).expect("a retry");
            assert_eq!(found.budget, budget(expected));
        }
    }

    #[test]
    fn what_has_no_terms_costs_nothing() {
        let nothing = Terms::of((None, DEFAULT), &mut head(&[]), true, Purpose::Exchange);
        assert!(nothing.is_none());
        // Not of gRPC.
        let timeout = [("grpc-timeout", "1S")];
        assert!(
            Terms::of(
                (None, DEFAULT),
                &mut head(&timeout),
                false,
                Purpose::Exchange
            )
            .is_none()
        );
    }

    #[test]
    fn what_cannot_be_repeated_is_not() {
        let said = Reliability {
            retry: Some(Retry::new()),
            ..Reliability::default()
        };
        for (headers, purpose, is) in [
            (&[][..], Purpose::Exchange, true),
            (&[("expect", "100-continue")], Purpose::Exchange, false),
            (&[], Purpose::Upgrade, false),
        ] {
            let terms = Terms::of((Some(&said), DEFAULT), &mut head(headers), false, purpose);
            assert_eq!(
                terms.is_some_and(|it| it.retry.is_some()),
                is,
                "{headers:?}"
            );
        }
    }

    #[test]
    fn the_server_is_told_what_is_left() {
        for (request, is_first, told) in [
            (None, true, Some("5S")),
            (None, false, None),
            (seconds(1), true, None),
        ] {
            let said = Reliability {
                timeouts: Timeouts {
                    request,
                    ..Timeouts::default()
                },
                ..Reliability::default()
            };
            let mut head = head(&[("grpc-timeout", "5S")]);
            let terms = Terms::of((Some(&said), DEFAULT), &mut head, true, Purpose::Exchange);
            terms
                .expect("terms")
                .tell_server(&mut head.headers, is_first);
            let text = head.headers[GRPC_TIMEOUT].to_str().expect("text");
            match told {
                Some(told) => assert_eq!(text, told),
                None => {
                    let left = grpc_timeout(text).expect("a time");
                    let most = request.unwrap_or(Duration::from_secs(5));
                    assert!(
                        left <= most && left + Duration::from_millis(500) > most,
                        "{text}"
                    );
                }
            }
        }
    }
}
