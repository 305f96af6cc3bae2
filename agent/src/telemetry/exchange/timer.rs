//! The measuring of one exchange.

use std::sync::Arc;
use std::time::Instant;

use http::StatusCode;

use super::ExchangeSeries;
use super::outcome::{ExchangeError, GrpcStatus, Outcome, Status};

/// An exchange that has begun. Nothing of it takes a lock.
///
/// A response that is dropped before its end counts by its status, as with Linkerd, and for routes as
/// cancelled; an exchange dropped before there is a response is no response at all, and for routes
/// cancelled too.
#[derive(Debug)]
pub struct ExchangeTimer {
    series: Arc<ExchangeSeries>,
    began: Instant,
    request_ended: Option<Instant>,
    status: Option<Status>,
    in_headers: Option<GrpcStatus>,
    has_latency: bool,
    has_ended: bool,
}

impl ExchangeTimer {
    pub(super) fn begin_at(series: Arc<ExchangeSeries>, now: Instant) -> Self {
        series.begin_counting();
        Self {
            series,
            began: now,
            request_ended: None,
            status: None,
            in_headers: None,
            has_latency: false,
            has_ended: false,
        }
    }

    /// The request was sent to its end, then. What a backend's response takes is counted from here;
    /// if this is never said, from the beginning.
    pub fn request_ended(&mut self, at: Instant) {
        self.request_ended = Some(at);
    }

    /// The response's head has come, and the `grpc-status` that was in it.
    pub fn respond(&mut self, status: StatusCode, in_headers: Option<GrpcStatus>) {
        self.status = Some(status.into());
        self.in_headers = in_headers;
    }

    /// The first part of the response's body has come. This is what Linkerd measures as latency: the
    /// head may be sent long before there is an answer.
    pub fn first_byte(&mut self) {
        if !self.has_latency {
            self.first_byte_at(Instant::now());
        }
    }

    /// The response has come to its end, with the `grpc-status` that was in its trailers; or the
    /// exchange failed.
    pub fn end(mut self, ended: Result<Option<GrpcStatus>, ExchangeError>) {
        self.end_at(ended, Instant::now());
    }

    pub(super) fn first_byte_at(&mut self, now: Instant) {
        if let Some(status) = self.status
            && !self.has_latency
        {
            self.has_latency = true;
            let latency = now.saturating_duration_since(self.began);
            self.series.latency(status, latency);
        }
    }

    pub(super) fn end_at(
        &mut self,
        ended: Result<Option<GrpcStatus>, ExchangeError>,
        now: Instant,
    ) {
        self.first_byte_at(now);
        self.has_ended = true;
        let outcome = match (ended, self.status) {
            (Ok(in_trailers), Some(status)) => {
                Outcome::of_response(status, self.in_headers, in_trailers)
            }
            (Ok(_), None) => Outcome::of_error(None, ExchangeError::Unknown),
            (Err(error), status) => Outcome::of_error(status, error),
        };
        self.series.end_exchange(outcome);
        self.end_route(outcome, now);
    }

    fn drop_at(&mut self, now: Instant) {
        self.first_byte_at(now);
        if let Some(status) = self.status {
            let outcome = Outcome::of_response(status, self.in_headers, None);
            self.series.end_exchange(outcome);
        }
        let cancelled = Outcome::of_error(self.status, ExchangeError::Cancel);
        self.end_route(cancelled, now);
    }

    fn end_route(&self, outcome: Outcome, now: Instant) {
        let whole = now.saturating_duration_since(self.began);
        let since_request = now.saturating_duration_since(self.request_ended.unwrap_or(self.began));
        self.series.end_route(outcome, whole, since_request);
    }
}

impl Drop for ExchangeTimer {
    fn drop(&mut self) {
        if !self.has_ended {
            self.drop_at(Instant::now());
        }
    }
}
