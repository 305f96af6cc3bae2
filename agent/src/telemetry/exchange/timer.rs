//! The measuring of one exchange.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use http::StatusCode;
use weft_core::route::ResponseClasses;

use super::ExchangeSeries;
use super::counters::RetryEvent;
use super::outcome::{ExchangeError, GrpcStatus, Outcome, Status};
use crate::telemetry::tap::{End, Tapped};

/// An exchange that has begun. Nothing of it takes a lock.
///
/// What is dropped before its end was given up, and says so: after the response's head it counts by its
/// status, as with Linkerd; before, it is a failure without a status.
#[derive(Debug)]
pub struct ExchangeTimer {
    series: Arc<ExchangeSeries>,
    began: Instant,
    request_ended: Option<RequestEnd>,
    status: Option<Status>,
    in_headers: Option<GrpcStatus>,
    /// What a ServiceProfile says of the response.
    classes: Option<Arc<ResponseClasses>>,
    has_latency: bool,
    has_ended: bool,
    /// Somebody watches it.
    tapped: Option<Box<Tapped>>,
}

/// When the last of a request was sent.
#[derive(Clone, Debug)]
pub enum RequestEnd {
    /// Then: there is nothing behind its head, for one.
    At(Instant),
    /// Said by whoever reads its body.
    Told(Arc<OnceLock<Instant>>),
}

impl RequestEnd {
    /// How long ago; nothing if it is still on its way.
    fn elapsed_at(&self, now: Instant) -> Duration {
        let at = match self {
            Self::At(at) => Some(at),
            Self::Told(at) => at.get(),
        };
        at.map_or(Duration::ZERO, |at| now.saturating_duration_since(*at))
    }
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
            classes: None,
            has_latency: false,
            has_ended: false,
            tapped: None,
        }
    }

    /// The same, if this is what a ServiceProfile says of its response.
    pub fn under(mut self, classes: Option<Arc<ResponseClasses>>) -> Self {
        self.classes = classes;
        self
    }

    /// The same, if it is watched so.
    pub fn tapped(mut self, tapped: Option<Box<Tapped>>) -> Self {
        self.tapped = tapped;
        self
    }

    /// By whom it is watched.
    pub fn tapped_mut(&mut self) -> Option<&mut Tapped> {
        self.tapped.as_deref_mut()
    }

    /// What a ServiceProfile says of the response.
    pub fn classes(&self) -> Option<&ResponseClasses> {
        self.classes.as_deref()
    }

    /// When the request was sent to its end. What a backend's response takes is counted from there, as with
    /// Linkerd; if this is never said, from the beginning.
    pub fn request_ended(&mut self, end: RequestEnd) {
        self.request_ended = Some(end);
    }

    /// Something about sending its request again has happened.
    pub fn retry(&self, event: RetryEvent) {
        self.series.retry(event);
    }

    /// The response's head has come, and the `grpc-status` that was in it.
    pub fn respond(&mut self, status: StatusCode, in_headers: Option<GrpcStatus>) {
        self.status = Some(status.into());
        self.in_headers = in_headers;
        if let Some(tapped) = &mut self.tapped {
            tapped.head(status.as_u16());
        }
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

    /// It was answered here, and why. It counts as if a server had answered so.
    pub fn answer(
        mut self,
        status: StatusCode,
        in_headers: Option<GrpcStatus>,
        why: ExchangeError,
    ) {
        self.respond(status, in_headers);
        let now = Instant::now();
        self.first_byte_at(now);
        self.has_ended = true;
        let outcome = self.classified(status.into(), None).because(why);
        self.end_both(outcome, now);
    }

    /// It was ended here by trailers with this `grpc-status`, after a part of it had come, and why.
    pub fn end_early(mut self, in_trailers: Option<GrpcStatus>, why: ExchangeError) {
        self.has_ended = true;
        self.cut_at(in_trailers, why, Instant::now());
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
            (Ok(in_trailers), Some(status)) => self.classified(status, in_trailers),
            (Ok(_), None) => Outcome::of_error(None, ExchangeError::Unknown),
            (Err(error), status) => Outcome::of_error(status, error),
        };
        self.end_both(outcome, now);
    }

    fn drop_at(&mut self, now: Instant) {
        self.cut_at(None, ExchangeError::Cancel, now);
    }

    /// It ended before its time.
    fn cut_at(&mut self, in_trailers: Option<GrpcStatus>, why: ExchangeError, now: Instant) {
        self.first_byte_at(now);
        let outcome = match self.status {
            Some(status) => self.classified(status, in_trailers).because(why),
            None => Outcome::of_error(None, why),
        };
        self.end_both(outcome, now);
    }

    fn classified(&self, status: Status, in_trailers: Option<GrpcStatus>) -> Outcome {
        Outcome::of_response(status, self.in_headers, in_trailers, self.classes())
    }

    fn end_both(&mut self, outcome: Outcome, now: Instant) {
        if let Some(tapped) = self.tapped.take() {
            tapped.end(End {
                grpc: outcome.grpc().map(GrpcStatus::name),
                error: outcome.error().map(|it| it.as_str().to_owned()),
                ..End::default()
            });
        }
        self.series.end_exchange(outcome);
        let whole = now.saturating_duration_since(self.began);
        let since_request = self
            .request_ended
            .as_ref()
            .map_or(whole, |it| it.elapsed_at(now));
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
