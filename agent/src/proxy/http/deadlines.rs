//! How long an exchange may take: before its response's head is there, and while its body passes.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::time::{Instant, Sleep, sleep_until};

use super::replay::Replay;
use crate::telemetry::exchange::ExchangeError;

/// What was too slow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(in crate::proxy) enum Late {
    /// All tries together.
    #[error("the request took longer than it may")]
    Request,
    /// The same, by what the client says.
    #[error("the request took longer than its client waits")]
    Client,
    /// The response, from the end of the request on.
    #[error("the response took longer than it may")]
    Response,
    /// A try.
    #[error("the server took longer than it may")]
    Backend,
    /// Nothing moved.
    #[error("nothing of the exchange moved for too long")]
    Idle,
}

impl Late {
    /// A word for it, as in `weft-error`.
    pub(super) fn reason(self) -> &'static str {
        match self {
            Self::Request | Self::Client => "request_timeout",
            Self::Response => "response_timeout",
            Self::Backend => "backend_timeout",
            Self::Idle => "stream_idle",
        }
    }

    /// As metrics of exchanges name it.
    pub(super) fn label(self) -> ExchangeError {
        match self {
            Self::Request | Self::Client => ExchangeError::RequestTimeout,
            Self::Response | Self::Backend => ExchangeError::ResponseStreamTimeout,
            Self::Idle => ExchangeError::IdleTimeout,
        }
    }
}

/// The times by which parts of an exchange must have happened.
#[derive(Debug)]
pub(super) struct Deadlines {
    /// The earliest of those that are known from the beginning.
    fixed: Option<(Instant, Late)>,
    response: Option<Duration>,
    idle: Option<Duration>,
    request: Arc<Replay>,
    began: Instant,
    /// When a part of the response came last.
    moved: Instant,
    timer: Option<Pin<Box<Sleep>>>,
}

impl Deadlines {
    /// Of a try that begins now.
    pub(super) fn new(
        request: &Arc<Replay>,
        fixed: Option<(Instant, Late)>,
        response: Option<Duration>,
        idle: Option<Duration>,
    ) -> Self {
        let now = Instant::now();
        Self {
            fixed,
            response,
            idle,
            request: Arc::clone(request),
            began: now,
            moved: now,
            timer: None,
        }
    }

    /// A part of the response has come.
    pub(super) fn moved(&mut self) {
        if self.idle.is_some() {
            self.moved = Instant::now();
        }
    }

    /// Gives the exchange up.
    pub(super) fn cancel(&self) {
        self.request.cancel();
    }

    /// Ends when one of them has passed.
    pub(super) fn poll(&mut self, context: &mut Context<'_>) -> Poll<Late> {
        loop {
            let Some((at, late)) = self.next(context) else {
                return Poll::Pending;
            };
            if at <= Instant::now() {
                return Poll::Ready(late);
            }
            let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(at)));
            // One that ends too early is looked at again then: parts may come often.
            if timer.deadline() > at || timer.is_elapsed() {
                timer.as_mut().reset(at);
            }
            ready!(timer.as_mut().poll(context));
        }
    }

    fn next(&self, context: &Context<'_>) -> Option<(Instant, Late)> {
        let response = self.response.and_then(|time| {
            // What is sent again was there before this try began.
            let ended = self.request.ended(context)?;
            Some((ended.max(self.began) + time, Late::Response))
        });
        let idle = self.idle.map(|time| {
            let moved = self.moved.max(self.request.moved());
            (moved + time, Late::Idle)
        });
        let all = [self.fixed, response, idle];
        all.into_iter().flatten().min_by_key(|(at, _)| *at)
    }
}
