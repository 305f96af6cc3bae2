//! An exchange or a flow that somebody watches.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Instant, SystemTime};

use super::{Begin, End, Event, Tap, What};

/// An exchange or a flow that somebody watches. Who begins to watch later does not see it.
#[derive(Debug)]
pub struct Tapped {
    id: u64,
    began: Instant,
    began_at: SystemTime,
    begin: Arc<Begin>,
    by: Vec<Watcher>,
    head: Option<Instant>,
    request_bytes: Arc<AtomicU64>,
    response_bytes: u64,
}

/// Who may watch it.
#[derive(Debug)]
pub(super) struct Candidate {
    tap: Arc<Tap>,
    /// It has its place among those of this second.
    has_room: bool,
}

/// Who watches it.
#[derive(Debug)]
pub(super) struct Watcher {
    tap: Arc<Tap>,
    /// The beginning was told: that of what is chosen by its status waits until it has one.
    is_told: bool,
}

impl Candidate {
    /// Of a tap that may want it. None: there is no room for one more, which is all that was left to ask.
    pub(super) fn new(tap: Arc<Tap>, now: Instant) -> Option<Self> {
        let is_decided = tap.spec.is_settled() && tap.spec.status.is_none();
        let has_room = is_decided && tap.has_room(now);
        (has_room || !is_decided).then_some(Self { tap, has_room })
    }

    /// None: it is not wanted, or there is no room.
    pub(super) fn decide(self, begin: &Begin, now: Instant) -> Option<Watcher> {
        let Self { tap, has_room } = self;
        if !has_room && !tap.spec.wants(begin) {
            return None;
        }
        let waits = tap.spec.status.is_some();
        let is_told = has_room || (!waits && tap.has_room(now));
        (waits || is_told).then_some(Watcher { tap, is_told })
    }
}

impl Tapped {
    /// None: nobody sees it.
    pub(super) fn begin(
        next: &AtomicU64,
        begin: Begin,
        by: Vec<Watcher>,
        began: Instant,
    ) -> Option<Box<Self>> {
        if by.is_empty() {
            return None;
        }
        let tapped = Self {
            id: next.fetch_add(1, Ordering::Relaxed),
            began,
            began_at: SystemTime::now(),
            begin: Arc::new(begin),
            by,
            head: None,
            request_bytes: Arc::default(),
            response_bytes: 0,
        };
        for watcher in tapped.by.iter().filter(|it| it.is_told) {
            watcher.tap.tell(tapped.beginning());
        }
        Some(Box::new(tapped))
    }

    /// Where bytes of the request's body are counted.
    pub fn request_bytes(&self) -> &Arc<AtomicU64> {
        &self.request_bytes
    }

    /// They are counted there.
    pub fn count_request_in(&mut self, bytes: &Arc<AtomicU64>) {
        self.request_bytes = Arc::clone(bytes);
    }

    /// So many bytes of the response's body have come.
    pub fn responds(&mut self, bytes: usize) {
        self.response_bytes += bytes as u64;
    }

    /// The head of the response has come.
    pub fn head(&mut self, status: u16) {
        let now = Instant::now();
        self.head = Some(now);
        let beginning = self.beginning();
        let what = What::Head(status, now.saturating_duration_since(self.began));
        let event = Event {
            id: self.id,
            at: SystemTime::now(),
            what,
        };
        self.by.retain_mut(|it| {
            if !it.tap.spec.wants_status(status) {
                return false;
            }
            if !it.is_told {
                if !it.tap.has_room(now) {
                    return false;
                }
                it.is_told = true;
                it.tap.tell(beginning.clone());
            }
            it.tap.tell(event.clone());
            true
        });
    }

    /// It has ended. How long it took, and what has passed, is known here.
    pub fn end(self, end: End) {
        let since = self.head.unwrap_or(self.began);
        let end = End {
            duration: Instant::now().saturating_duration_since(since),
            request_bytes: end.request_bytes + self.request_bytes.load(Ordering::Relaxed),
            response_bytes: end.response_bytes + self.response_bytes,
            ..end
        };
        let event = Event {
            id: self.id,
            at: SystemTime::now(),
            what: What::End(end),
        };
        for watcher in self.by.iter().filter(|it| it.is_told) {
            watcher.tap.tell(event.clone());
        }
    }

    fn beginning(&self) -> Event {
        Event {
            id: self.id,
            at: self.began_at,
            what: What::Begin(Arc::clone(&self.begin)),
        }
    }
}
