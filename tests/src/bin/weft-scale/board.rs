//! When changes were made, for those who hear of them: the clock of all delays.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use crate::wire::Short;

/// The changes so far.
#[derive(Debug, Default)]
pub(crate) struct Board {
    last: RwLock<HashMap<Short, Change>>,
    made: Mutex<Vec<Instant>>,
}

/// The last change of an endpoint.
#[derive(Clone, Copy, Debug)]
struct Change {
    number: usize,
    at: Instant,
    present: bool,
}

/// Who heard of which changes, and how late.
#[derive(Debug, Default)]
pub(crate) struct Heard {
    delays: HashMap<usize, Duration>,
}

impl Board {
    /// A change is made now.
    pub(crate) fn post(&self, endpoint: Short, present: bool) {
        let mut last = self.last.write().unwrap_or_else(PoisonError::into_inner);
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        let (number, at) = (made.len(), Instant::now());
        made.push(at);
        let change = Change {
            number,
            at,
            present,
        };
        last.insert(endpoint, change);
    }

    /// How long ago a change was made, by its number; none: it was not made yet.
    pub(crate) fn since(&self, number: usize) -> Option<Duration> {
        let made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        made.get(number).map(Instant::elapsed)
    }

    /// Somebody was told of an endpoint: that it is there, or that it is gone.
    pub(crate) fn hear(&self, heard: &mut Heard, endpoint: Short, present: bool) {
        let changes = self.last.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(change) = changes.get(&endpoint).filter(|it| it.present == present) {
            let delay = change.at.elapsed();
            heard.delays.entry(change.number).or_insert(delay);
        }
    }
}

impl Heard {
    pub(crate) fn delays(&self) -> impl Iterator<Item = Duration> {
        self.delays.values().copied()
    }
}
