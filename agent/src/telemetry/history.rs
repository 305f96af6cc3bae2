//! What the last ten minutes brought, for who has no Prometheus: of each series that the `weft` command shows over a time,
//! by how much it grew between the last sixty samples.
//!
//! Samples are taken by a task of their own, of what is counted anyway: what carries traffic knows nothing of this. It is
//! bounded: of series beyond [`MAX_SERIES`] there is no history, which is counted and told, and a series that does not
//! move has no ring.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher, RandomState};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::labels::Rendered;
use super::samples::{Kind, Samples, Source};

/// How often a sample is to be taken.
pub const SAMPLE_EACH: Duration = Duration::from_secs(10);
/// How far back it goes.
pub const LONGEST: Duration = Duration::from_secs(600);

/// What grew, and when.
#[derive(Debug)]
pub(super) struct History(Mutex<Kept>);

#[derive(Debug)]
struct Kept {
    /// When samples were taken, the newest last. Before the first one it is when the agent began, with nothing counted.
    moments: VecDeque<Instant>,
    /// How many samples there were.
    taken: usize,
    rows: HashMap<Key, Row>,
    hashers: [RandomState; 2],
    room: Room,
    /// Whether the last sample had a row that there was no room for: one that is seen first may then be an old one.
    has_unseen: bool,
}

/// What is held, and what is not.
#[derive(Debug, Default)]
struct Room {
    rings: usize,
    left_out: usize,
}

/// A metric's name and its labels, hashed with two secrets: written out they would take more than the history does, and nobody
/// finds two that are the same.
type Key = [u64; 2];

/// A counter, or a histogram.
#[derive(Debug)]
struct Row {
    /// The sample that it was in last.
    seen: usize,
    /// Of a counter one, of a histogram its buckets and its sum.
    numbers: Box<[Number]>,
}

#[derive(Debug)]
struct Number {
    /// As of the last sample.
    last: f64,
    grown: Grown,
}

/// By how much a number grew until each sample. Single precision: whole numbers are exact up to 16 million, and bytes of ten
/// seconds may be more than 32 bits count.
#[derive(Debug)]
enum Grown {
    /// By nothing, in all of them.
    Not,
    /// Not a number: it was not known.
    By(Box<[f32; SAMPLES]>),
    /// There was no room for it.
    Unknown,
}

/// What is known of a time up to now.
#[derive(Debug, PartialEq)]
pub(super) struct Recent {
    /// How much time it really is: up to one sample more than was asked for, or less, if the agent is younger.
    pub(super) covered: Duration,
    /// Series of which nothing is known.
    pub(super) left_out: usize,
}

/// As many as it takes for [`LONGEST`].
const SAMPLES: usize = 60;
/// Counters and histograms that have a history, and of their numbers those that grew in the last ten minutes.
const MAX_SERIES: usize = 20_000;

impl History {
    pub(super) fn new(began: Instant) -> Self {
        Self(Mutex::new(Kept {
            moments: VecDeque::from([began]),
            taken: 0,
            rows: HashMap::new(),
            hashers: [RandomState::new(), RandomState::new()],
            room: Room::default(),
            has_unseen: false,
        }))
    }

    /// Takes in how things stand now.
    pub(super) fn sample(&self, samples: Samples, now: Instant) {
        self.locked().sample(samples, now);
    }

    /// Puts in the place of how things stand now by how much they grew in a time. What is not known is left out.
    pub(super) fn recent(&self, samples: &mut Samples, window: Duration, now: Instant) -> Recent {
        self.locked().recent(samples, window, now)
    }

    fn locked(&self) -> MutexGuard<'_, Kept> {
        // A panic in between leaves numbers that are at worst those of one sample.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Source for History {
    fn collect(&self, samples: &mut Samples) {
        let kept = self.locked();
        let mut gauge = |name, help, value: usize| {
            samples.add(Kind::Gauge, name, help, vec![], value as f64);
        };
        let help = "Series that grew in the last ten minutes, whose history is kept";
        gauge("weft_history_series", help, kept.room.rings);
        let help = "Series that have no history as there are too many";
        gauge("weft_history_left_out_series", help, kept.room.left_out);
    }
}

impl Kept {
    fn sample(&mut self, mut samples: Samples, now: Instant) {
        let slot = self.taken % SAMPLES;
        self.taken += 1;
        self.moments.push_back(now);
        if self.moments.len() > SAMPLES + 1 {
            self.moments.pop_front();
        }
        self.room.left_out = 0;
        let may_be_old = std::mem::take(&mut self.has_unseen);
        samples.retain(|name, labels, numbers| {
            let key = self.key(name, labels);
            let is_full = self.rows.len() >= MAX_SERIES;
            let row = match self.rows.entry(key) {
                Entry::Occupied(row) => row.into_mut(),
                Entry::Vacant(_) if is_full => {
                    self.room.left_out += numbers.len();
                    self.has_unseen = true;
                    return false;
                }
                Entry::Vacant(place) => place.insert(Row::new(numbers.len(), may_be_old)),
            };
            row.seen = self.taken;
            for (own, number) in row.numbers.iter_mut().zip(numbers) {
                own.sample(*number, slot, &mut self.room);
            }
            false
        });
        let (taken, room) = (self.taken, &mut self.room);
        self.rows.retain(|_, row| {
            let is_there = row.seen == taken;
            if !is_there {
                let rings = row.numbers.iter().filter(|it| it.grown.is_ring());
                room.rings -= rings.count();
            }
            is_there
        });
    }

    fn recent(&self, samples: &mut Samples, window: Duration, now: Instant) -> Recent {
        let ages = self
            .moments
            .iter()
            .map(|it| now.saturating_duration_since(*it));
        let ages: Vec<Duration> = ages.collect();
        let from = ages.iter().rposition(|it| *it >= window).unwrap_or(0);
        let slots = (from + 1..self.moments.len()).map(|it| {
            let before = self.moments.len() - it;
            (self.taken - before) % SAMPLES
        });
        let slots: Vec<usize> = slots.collect();
        let mut left_out = 0;
        samples.retain(|name, labels, numbers| {
            let is_known = match self.rows.get(&self.key(name, labels)) {
                Some(row) => row.recent(numbers, &slots),
                // It has begun since the last sample.
                None => !self.has_unseen,
            };
            if !is_known {
                left_out += numbers.len();
            }
            is_known
        });
        Recent {
            covered: ages[from],
            left_out,
        }
    }

    fn key(&self, name: &str, labels: &Rendered) -> Key {
        self.hashers
            .each_ref()
            .map(|it| it.hash_one((name, labels)))
    }
}

impl Row {
    fn new(numbers: usize, may_be_old: bool) -> Self {
        let number = || Number {
            last: 0.0,
            grown: match may_be_old {
                true => Grown::Unknown,
                false => Grown::Not,
            },
        };
        Self {
            seen: 0,
            numbers: (0..numbers).map(|_| number()).collect(),
        }
    }

    /// Puts in the place of numbers by how much they grew since those samples began; false: that is not known.
    fn recent(&self, numbers: &mut [f64], slots: &[usize]) -> bool {
        for (own, number) in self.numbers.iter().zip(numbers) {
            let known = match &own.grown {
                Grown::Not => 0.0,
                Grown::By(ring) => slots.iter().map(|it| f64::from(ring[*it])).sum(),
                Grown::Unknown => f64::NAN,
            };
            *number = known + own.grown_to(*number);
            if number.is_nan() {
                return false;
            }
        }
        true
    }
}

impl Number {
    fn sample(&mut self, number: f64, slot: usize, room: &mut Room) {
        let by = self.grown_to(number);
        self.last = number;
        if !self.grown.is_ring() && by > 0.0 {
            if room.rings < MAX_SERIES {
                let before = match self.grown {
                    Grown::Unknown => f32::NAN,
                    _ => 0.0,
                };
                self.grown = Grown::By(Box::new([before; SAMPLES]));
                room.rings += 1;
            } else {
                self.grown = Grown::Unknown;
            }
        }
        match &mut self.grown {
            Grown::By(ring) => {
                ring[slot] = by as f32;
                if ring.iter().all(|it| *it == 0.0) {
                    self.grown = Grown::Not;
                    room.rings -= 1;
                }
            }
            Grown::Unknown => room.left_out += 1,
            Grown::Not => {}
        }
    }

    /// By how much it has grown since the last sample. One that was forgotten and began anew began at nothing.
    fn grown_to(&self, number: f64) -> f64 {
        match number >= self.last {
            true => number - self.last,
            false => number,
        }
    }
}

impl Grown {
    fn is_ring(&self) -> bool {
        matches!(self, Self::By(_))
    }
}

#[cfg(test)]
#[path = "history_tests.rs"]
mod tests;
