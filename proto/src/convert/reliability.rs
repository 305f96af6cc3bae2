//! How long requests may take, and when they are sent again.

use std::time::Duration;

use core::route::{Backoff, BudgetSettings, GrpcCodes, Reliability, Retry, StatusRange, Timeouts};
use weft_core as core;

use super::{ConvertError, Converted, error, required};
use crate::v1;

impl From<Reliability> for v1::Reliability {
    fn from(it: Reliability) -> Self {
        let Timeouts {
            request,
            response,
            backend_request,
            idle,
        } = it.timeouts;
        Self {
            request_timeout_ms: ms(request),
            response_timeout_ms: ms(response),
            backend_request_timeout_ms: ms(backend_request),
            idle_timeout_ms: ms(idle),
            retry: it.retry.map(Into::into),
            heeds_headers: it.heeds_headers,
        }
    }
}

impl TryFrom<v1::Reliability> for Reliability {
    type Error = ConvertError;

    fn try_from(message: v1::Reliability) -> Converted<Self> {
        let time = |part: &str, ms| time(&format!("reliability.{part}_timeout_ms"), ms);
        Ok(Self {
            timeouts: Timeouts {
                request: time("request", message.request_timeout_ms)?,
                response: time("response", message.response_timeout_ms)?,
                backend_request: time("backend_request", message.backend_request_timeout_ms)?,
                idle: time("idle", message.idle_timeout_ms)?,
            },
            retry: message.retry.map(TryInto::try_into).transpose()?,
            heeds_headers: message.heeds_headers,
        })
    }
}

impl From<Retry> for v1::Retry {
    fn from(it: Retry) -> Self {
        Self {
            http: it.http.into_iter().map(Into::into).collect(),
            grpc: it.grpc.iter().collect(),
            on_failure: it.on_failure,
            limit: it.limit.into(),
            try_timeout_ms: ms(it.try_timeout),
            backoff_least_ms: ms(Some(it.backoff.least)),
            backoff_most_ms: ms(Some(it.backoff.most)),
            budget: Some(it.budget.into()),
        }
    }
}

impl TryFrom<v1::Retry> for Retry {
    type Error = ConvertError;

    fn try_from(message: v1::Retry) -> Converted<Self> {
        let limit = u16::try_from(message.limit);
        let http = message.http.into_iter();
        let http = http.map(|it| status_range("retry.http", it));
        let needed = |field: &str, ms| Ok(time(field, ms)?.unwrap_or_default());
        Ok(Self {
            http: http.collect::<Converted<_>>()?,
            grpc: GrpcCodes::new(message.grpc),
            on_failure: message.on_failure,
            limit: limit.map_err(|reason| error("retry.limit", reason))?,
            try_timeout: time("retry.try_timeout_ms", message.try_timeout_ms)?,
            backoff: Backoff {
                least: needed("retry.backoff_least_ms", message.backoff_least_ms)?,
                most: needed("retry.backoff_most_ms", message.backoff_most_ms)?,
            },
            budget: budget("retry.budget", required("retry.budget", message.budget)?)?,
        })
    }
}

impl From<BudgetSettings> for v1::RetryBudget {
    fn from(it: BudgetSettings) -> Self {
        Self {
            ratio_thousandths: it.ratio_thousandths,
            per_second: it.per_second,
            ttl_ms: ms(Some(it.ttl)),
        }
    }
}

/// The budget in a field.
pub(super) fn budget(field: &str, message: v1::RetryBudget) -> Converted<BudgetSettings> {
    let field = format!("{field}.ttl_ms");
    let ttl = time(&field, message.ttl_ms)?;
    Ok(BudgetSettings {
        ratio_thousandths: message.ratio_thousandths,
        per_second: message.per_second,
        ttl: ttl.ok_or_else(|| error(&field, "missing"))?,
    })
}

impl From<StatusRange> for v1::StatusRange {
    fn from(it: StatusRange) -> Self {
        Self {
            first: it.first.into(),
            last: it.last.into(),
        }
    }
}

/// The range in a field.
pub(super) fn status_range(field: &str, message: v1::StatusRange) -> Converted<StatusRange> {
    let number = |it: u32| u16::try_from(it).unwrap_or(u16::MAX);
    StatusRange::new(number(message.first), number(message.last))
        .map_err(|reason| error(field, reason))
}

fn ms(time: Option<Duration>) -> u64 {
    let ms = time.unwrap_or_default().as_millis();
    u64::try_from(ms).unwrap_or(u64::MAX)
}

/// Zero is none. Nobody waits for a hundred years, and clocks must not overflow.
fn time(field: &str, ms: u64) -> Converted<Option<Duration>> {
    let time = Duration::from_millis(ms);
    if time > MOST {
        let reason = format!("{ms} ms are too long");
        return Err(error(field, reason));
    }
    Ok(Some(time).filter(|it| !it.is_zero()))
}

/// Four times the longest hour number that the Gateway API lets one write, and more.
const MOST: Duration = Duration::from_secs(100 * 365 * 24 * 3600);
