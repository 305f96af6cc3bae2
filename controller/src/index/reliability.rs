//! What objects say about how long requests may take and when they are sent again: by annotations of Services and
//! routes, and by fields of the rules of HTTPRoutes.
//!
//! As Linkerd has it, what a route says of timeouts (or of retries) takes the place of all that the Service
//! says of them, and an annotation that of the field with the same meaning.

use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use weft_core::route::{
    Backoff, GrpcCodes, Reliability, Retry, StatusRange, Timeouts, annotated_duration, duration,
};

use crate::objects::Fault;
use crate::objects::routes as written;

/// What one object says.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct ReliabilitySaid {
    timeouts: Part<Timeouts>,
    retry: Part<Option<Retry>>,
    heeds_headers: Part<bool>,
}

/// Something that may be said.
#[derive(Clone, Debug, Default, PartialEq)]
enum Part<T> {
    /// It is not.
    #[default]
    Silent,
    /// It is.
    Said(T),
    /// It cannot be read: nothing, unless something better was said before.
    Unreadable,
}

/// The same of the annotations of a route, not yet put together with its rules.
#[derive(Clone, Debug, Default)]
pub(super) struct Annotated {
    request: Option<Option<Duration>>,
    response: Option<Option<Duration>>,
    idle: Option<Option<Duration>>,
    retry: Part<Option<Retry>>,
    heeds_headers: Part<bool>,
}

type Read<T> = Result<T, Fault>;

/// Of each annotation, the first one present counts.
const REQUEST: [&str; 2] = ["weft.dev/timeout-request", "timeout.linkerd.io/request"];
const RESPONSE: [&str; 2] = ["weft.dev/timeout-response", "timeout.linkerd.io/response"];
const IDLE: [&str; 2] = ["weft.dev/timeout-idle", "timeout.linkerd.io/idle"];
const RETRY_HTTP: [&str; 2] = ["weft.dev/retry-http", "retry.linkerd.io/http"];
const RETRY_GRPC: [&str; 2] = ["weft.dev/retry-grpc", "retry.linkerd.io/grpc"];
const RETRY_LIMIT: [&str; 2] = ["weft.dev/retry-limit", "retry.linkerd.io/limit"];
const RETRY_TIMEOUT: [&str; 2] = ["weft.dev/retry-timeout", "retry.linkerd.io/timeout"];
/// The second one is an older name.
const HEADERS: [&str; 2] = ["weft.dev/request-headers", "weft.dev/timeout-headers"];
/// All of them.
pub(super) const ANNOTATIONS: [[&str; 2]; 8] = [
    REQUEST,
    RESPONSE,
    IDLE,
    RETRY_HTTP,
    RETRY_GRPC,
    RETRY_LIMIT,
    RETRY_TIMEOUT,
    HEADERS,
];
/// Codes of one rule: there are no more.
const MAX_CODES: usize = 200;

impl ReliabilitySaid {
    /// What a Service's annotations say. Also returned: faults of what cannot be read, each of which makes all
    /// of its part unreadable.
    pub(super) fn of_service(metadata: &ObjectMeta) -> (Self, Vec<Fault>) {
        let mut faults = vec![];
        let timeouts = timeouts(metadata).map(|it| {
            it.map(|[request, response, idle]| {
                let set = |it: Option<Option<Duration>>| it.flatten();
                Timeouts {
                    request: set(request),
                    response: set(response),
                    backend_request: None,
                    idle: set(idle),
                }
            })
        });
        let said = Self {
            timeouts: Part::kept(timeouts, &mut faults),
            retry: Part::kept(retry(metadata), &mut faults),
            heeds_headers: Part::kept(heeds_headers(metadata), &mut faults),
        };
        (said, faults)
    }

    /// Takes what cannot be read now from what was known of the same object before.
    pub(super) fn complete_by(&mut self, before: &Self) {
        self.timeouts.complete_by(&before.timeouts);
        self.retry.complete_by(&before.retry);
        self.heeds_headers.complete_by(&before.heeds_headers);
    }

    /// What holds, given what the Service says.
    pub(super) fn over(&self, service: &Self) -> Reliability {
        Reliability {
            timeouts: self
                .timeouts
                .or(&service.timeouts)
                .copied()
                .unwrap_or_default(),
            retry: self.retry.or(&service.retry).cloned().flatten(),
            heeds_headers: self.heeds_headers.or(&service.heeds_headers) == Some(&true),
        }
    }
}

impl Annotated {
    /// What a route's annotations say.
    ///
    /// # Errors
    /// The first one that cannot be used.
    pub(super) fn of_route(metadata: &ObjectMeta) -> Read<Self> {
        let [request, response, idle] = timeouts(metadata)?.unwrap_or_default();
        Ok(Self {
            request,
            response,
            idle,
            retry: retry(metadata)?.map_or(Part::Silent, Part::Said),
            heeds_headers: heeds_headers(metadata)?.map_or(Part::Silent, Part::Said),
        })
    }

    /// What holds for a rule that says nothing itself.
    pub(super) fn of_rule(&self) -> ReliabilitySaid {
        self.with(None, None)
    }

    /// What holds for a rule of an HTTPRoute.
    ///
    /// # Errors
    /// The first field that cannot be used.
    pub(super) fn of_http_rule(
        &self,
        field: &str,
        timeouts: Option<&written::HttpTimeouts>,
        retry: Option<&written::HttpRetry>,
    ) -> Read<ReliabilitySaid> {
        let timeouts = timeouts.map(|it| timeouts_of_rule(&format!("{field}.timeouts"), it));
        let retry = retry.map(|it| retry_of_rule(&format!("{field}.retry"), it));
        Ok(self.with(timeouts.transpose()?, retry.transpose()?))
    }

    fn with(&self, timeouts: Option<Timeouts>, retry: Option<Retry>) -> ReliabilitySaid {
        let of_annotations = [self.request, self.response, self.idle];
        let is_said = timeouts.is_some() || of_annotations.iter().any(Option::is_some);
        let written = timeouts.unwrap_or_default();
        // None at all are none to be ready for.
        let retry = retry.map_or(Part::Silent, |it| Part::Said((it.limit > 0).then_some(it)));
        ReliabilitySaid {
            timeouts: match is_said {
                false => Part::Silent,
                true => Part::Said(Timeouts {
                    request: self.request.unwrap_or(written.request),
                    response: self.response.flatten(),
                    backend_request: written.backend_request,
                    idle: self.idle.flatten(),
                }),
            },
            retry: match self.retry {
                Part::Silent => retry,
                _ => self.retry.clone(),
            },
            heeds_headers: self.heeds_headers.clone(),
        }
    }
}

impl<T: Clone + PartialEq> Part<T> {
    fn kept(read: Read<Option<T>>, faults: &mut Vec<Fault>) -> Self {
        match read {
            Ok(None) => Self::Silent,
            Ok(Some(it)) => Self::Said(it),
            Err(fault) => {
                faults.push(fault);
                Self::Unreadable
            }
        }
    }

    fn complete_by(&mut self, before: &Self) {
        if *self == Self::Unreadable {
            *self = before.clone();
        }
    }

    fn or<'a>(&'a self, other: &'a Self) -> Option<&'a T> {
        match (self, other) {
            (Self::Said(it), _) | (_, Self::Said(it)) => Some(it),
            _ => None,
        }
    }
}

fn timeouts_of_rule(field: &str, written: &written::HttpTimeouts) -> Read<Timeouts> {
    let time = |name: &str, text: &Option<String>| {
        let time = text.as_deref().map(duration).transpose();
        let time = time.map_err(|reason| Fault::new(format!("{field}.{name}"), reason))?;
        Ok(time.flatten())
    };
    let timeouts = Timeouts {
        request: time("request", &written.request)?,
        backend_request: time("backendRequest", &written.backend_request)?,
        ..Timeouts::default()
    };
    match (timeouts.request, timeouts.backend_request) {
        (Some(all), Some(one)) if one > all => Err(Fault::new(
            format!("{field}.backendRequest"),
            "longer than timeouts.request, which covers it",
        )),
        _ => Ok(timeouts),
    }
}

fn retry_of_rule(field: &str, written: &written::HttpRetry) -> Read<Retry> {
    super::route_rules::few(&format!("{field}.codes"), written.codes.len(), MAX_CODES)?;
    let codes = written.codes.iter().enumerate();
    let codes = codes.map(|(index, code)| {
        let number = u16::try_from(*code).ok();
        let number = number.filter(|it| (400..600).contains(it));
        let range = number.map(|it| StatusRange {
            first: it,
            last: it,
        });
        let reason = format!("{code} is no status from 400 to 599");
        range.ok_or_else(|| Fault::new(format!("{field}.codes[{index}]"), reason))
    });
    let mut retry = Retry {
        http: codes.collect::<Read<_>>()?,
        on_failure: true,
        ..Retry::new()
    };
    if let Some(attempts) = written.attempts {
        let reason = format!("{attempts} is no number from 0 to 65535");
        let limit = u16::try_from(attempts);
        retry.limit = limit.map_err(|_| Fault::new(format!("{field}.attempts"), reason))?;
    }
    if let Some(text) = &written.backoff {
        let least = duration(text);
        let least = least.map_err(|reason| Fault::new(format!("{field}.backoff"), reason))?;
        retry.backoff = Backoff::from_least(least.unwrap_or_default());
    }
    Ok(retry)
}

/// Of the request, the response, and what is idle. None: nothing is said of any.
fn timeouts(metadata: &ObjectMeta) -> Read<Option<[Option<Option<Duration>>; 3]>> {
    let mut said = [None; 3];
    for (place, names) in said.iter_mut().zip([REQUEST, RESPONSE, IDLE]) {
        *place = read(metadata, names, annotated_duration)?;
    }
    Ok(said.iter().any(Option::is_some).then_some(said))
}

/// None: nothing is said.
fn retry(metadata: &ObjectMeta) -> Read<Option<Option<Retry>>> {
    let http = read(metadata, RETRY_HTTP, StatusRange::list)?;
    let grpc = read(metadata, RETRY_GRPC, GrpcCodes::list)?;
    let limit = read(metadata, RETRY_LIMIT, |text| text.trim().parse::<u16>())?;
    let try_timeout = read(metadata, RETRY_TIMEOUT, annotated_duration)?;
    if http.is_none() && grpc.is_none() && limit.is_none() && try_timeout.is_none() {
        return Ok(None);
    }
    // Without a status nothing is ever tried again.
    let is_any = http.is_some() || grpc.is_some();
    let mut retry = Retry {
        http: http.unwrap_or_default(),
        grpc: grpc.unwrap_or_default(),
        try_timeout: try_timeout.flatten(),
        ..Retry::new()
    };
    retry.limit = limit.unwrap_or(retry.limit);
    Ok(Some(Some(retry).filter(|it| is_any && it.limit > 0)))
}

fn heeds_headers(metadata: &ObjectMeta) -> Read<Option<bool>> {
    read(metadata, HEADERS, |text| match text {
        "enabled" => Ok(true),
        "disabled" => Ok(false),
        _ => Err("neither enabled nor disabled"),
    })
}

fn read<T, E: ToString>(
    metadata: &ObjectMeta,
    names: [&str; 2],
    read: impl FnOnce(&str) -> Result<T, E>,
) -> Read<Option<T>> {
    let annotations = metadata.annotations.as_ref();
    let written = names
        .iter()
        .find_map(|name| Some((name, annotations?.get(*name)?)));
    let Some((name, text)) = written else {
        return Ok(None);
    };
    let fault = |reason: E| Fault::new(format!("metadata.annotations[{name:?}]"), reason);
    read(text).map(Some).map_err(fault)
}
