//! Ends connections of clients on which nothing has been asked for long. A client that forgets one, or is gone without
//! a word, would keep it, and its place among the pod's connections, for ever.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::serve::Progress;
use crate::proxy::Context;
use crate::telemetry::{Direction, Telemetry};

/// How long a connection may be without an exchange, and where it is counted that it was ended for that.
#[derive(Clone, Copy)]
pub(super) struct Idle<'a> {
    /// Zero: for ever.
    pub(super) limit: Duration,
    pub(super) telemetry: &'a Telemetry,
    /// Of whose connections it is.
    pub(super) direction: Direction,
}

impl<'a> Idle<'a> {
    /// Of clients' connections, as the agent is told.
    pub(super) fn of(context: &'a Context, direction: Direction) -> Self {
        Self {
            limit: context.config.http_idle_timeout,
            telemetry: &context.telemetry,
            direction,
        }
    }

    /// Ends when there was no exchange for so long, or a little longer.
    pub(super) async fn ended(self, progress: &Progress) {
        if self.limit.is_zero() {
            return std::future::pending().await;
        }
        let mut quiet_since = Instant::now();
        let mut begun = 0;
        loop {
            sleep(self.limit / LOOKS).await;
            let so_far = progress.begun();
            if so_far != begun || !progress.is_between_exchanges() {
                (begun, quiet_since) = (so_far, Instant::now());
            } else if quiet_since.elapsed() >= self.limit {
                self.telemetry.idle_closed(self.direction);
                return;
            }
        }
    }
}

/// How often it is looked at within that time: no exchange has to tell when it was.
const LOOKS: u32 = 8;

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_millis(200);

    /// How long it took, if it took no more than a second.
    async fn ends(limit: Duration, progress: &Progress) -> Option<Duration> {
        let telemetry = Telemetry::new();
        let idle = Idle {
            limit,
            telemetry: &telemetry,
            direction: Direction::Outbound,
        };
        let start = Instant::now();
        let ended = tokio::time::timeout(Duration::from_secs(1), idle.ended(progress)).await;
        ended.is_ok().then(|| start.elapsed())
    }

    #[tokio::test]
    async fn only_who_is_idle() {
        let progress = Progress::default();
        let took = ends(LIMIT, &progress).await.expect("it was idle");
        assert!(took >= LIMIT, "{took:?}");
        assert_eq!(ends(Duration::ZERO, &progress).await, None);
        progress.begins();
        assert_eq!(ends(LIMIT, &progress).await, None, "an exchange is open");
        progress.answered();
        assert!(ends(LIMIT, &progress).await.is_some());
    }

    #[tokio::test]
    async fn an_exchange_in_between_begins_it_anew() {
        let progress = Progress::default();
        let exchange = async {
            sleep(LIMIT / 2).await;
            progress.begins();
            progress.answered();
        };
        let (took, ()) = tokio::join!(ends(LIMIT, &progress), exchange);
        let took = took.expect("it was idle");
        assert!(took >= LIMIT * 3 / 2, "{took:?}");
    }
}
