//! How the control stream is doing, for readiness, metrics and dumps.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::Instant;

/// A snapshot of the control stream's state.
#[derive(Clone, Debug, Default)]
pub struct StreamState {
    /// A stream is open and the controller answered on it.
    pub connected: bool,
    /// The controller that it is to.
    pub controller: Option<SocketAddr>,
    /// When the last message arrived.
    pub last_message: Option<Instant>,
    /// Everything was received once, on this stream or an earlier one.
    pub complete: bool,
    /// The stream that is open has delivered all differences: what is known is current.
    pub current: bool,
    /// When what is known was last known to be current; moves only while it is not.
    pub(super) current_until: Option<Instant>,
    /// Pushes received since the start.
    pub pushes: u64,
    /// Resources rejected since the start.
    pub rejections: u64,
    /// Resources whose newest version is rejected now, with the reason; at most 1000.
    pub rejected: BTreeMap<String, String>,
    /// Streams that were opened since the start.
    pub connects: u64,
    /// Tries to connect, and streams, that failed since the start.
    pub failures: u64,
    /// Controllers that told nothing at first as they had not heard of all that is known here, since the start.
    pub behind: u64,
    /// How long was waited after the last of these.
    pub retry_delay: Duration,
    /// Why the last stream or try ended.
    pub last_error: Option<String>,
}

impl StreamState {
    /// How old the agent's knowledge is: zero while a stream keeps it current, `None` while nothing
    /// complete was ever received.
    pub fn knowledge_age(&self) -> Option<Duration> {
        if !self.complete {
            None
        } else if self.current {
            Some(Duration::ZERO)
        } else {
            Some(self.current_until?.elapsed())
        }
    }

    /// For people.
    pub fn dump(&self) -> Value {
        let seconds = |duration: Option<Duration>| duration.map(|it| it.as_secs_f64());
        json!({
            "connected": self.connected,
            "controller": self.controller,
            "complete": self.complete,
            "current": self.current,
            "knowledge_age_seconds": seconds(self.knowledge_age()),
            "last_message_seconds_ago": seconds(self.last_message.map(|it| it.elapsed())),
            "pushes": self.pushes,
            "rejections": self.rejections,
            "rejected": self.rejected,
            "connects": self.connects,
            "failures": self.failures,
            "behind": self.behind,
            "retry_delay_seconds": self.retry_delay.as_secs_f64(),
            "last_error": self.last_error,
        })
    }
}
