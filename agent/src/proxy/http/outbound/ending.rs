//! What is to be done when a response has ended.

use http::{HeaderMap, response};

use crate::balance::InFlight;
use crate::proxy::http::answer;
use crate::proxy::http::connection::OpenStream;
use crate::proxy::http::deadlines::Late;
use crate::proxy::http::measure::{Timers, grpc_status};
use crate::telemetry::exchange::GrpcStatus;

/// What is to be done when a response has ended.
#[derive(Debug)]
pub(in crate::proxy::http) struct Ending {
    /// Its place in a connection of HTTP/2.
    pub(super) _stream: Option<OpenStream>,
    /// The endpoint has to do with it.
    pub(super) _in_flight: Option<InFlight>,
    timers: Timers,
    in_trailers: Option<GrpcStatus>,
}

impl Ending {
    /// Of an exchange that nothing is held for.
    pub(in crate::proxy::http) fn nothing() -> Self {
        Self {
            _stream: None,
            _in_flight: None,
            timers: Timers::default(),
            in_trailers: None,
        }
    }

    /// Of an exchange whose response's head has come.
    pub(in crate::proxy::http) fn measured(timers: Option<Timers>, head: &response::Parts) -> Self {
        let mut ending = Self::nothing();
        if let Some(mut timers) = timers {
            timers.respond(head.status, &head.headers);
            ending.timers = timers;
        }
        ending
    }

    /// A part of the response's body has come.
    pub(in crate::proxy::http) fn part(&mut self) {
        self.timers.first_byte();
    }

    /// The trailers have come.
    pub(in crate::proxy::http) fn trailers(&mut self, trailers: &HeaderMap) {
        self.in_trailers = grpc_status(trailers);
    }

    /// All of the response has come.
    pub(in crate::proxy::http) fn ended(self) {
        self.timers.end(self.in_trailers);
    }

    /// It took too long.
    pub(in crate::proxy::http) fn late(self, late: Late) {
        self.timers.fail(late.label());
    }

    /// The server failed in the middle of it.
    pub(in crate::proxy::http) fn failed(self, error: &hyper::Error) {
        self.timers.fail(answer::broken(error));
    }
}
