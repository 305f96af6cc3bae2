//! When an endpoint that fails is left out, and how it comes back: the state of one endpoint.
//!
//! ```text
//!            too many failures                penalty over, one request tries
//!   closed ────────────────────▶ ejected ──────────────────────────────▶ probing
//!     ▲                            ▲                                         │ │
//!     │                            └──────── it fails: twice the penalty ────┘ │
//!     └───────────────────────────────────── it succeeds ─────────────────────┘
//! ```
//!
//! Too many are so many in a row, or such a share of all within a window. A `Retry-After` lets an endpoint
//! *rest*: others are preferred until then, and if there are none it is used all the same.
//!
//! Whose request the one that tries is, is chance, and a client may break it off or never end it. Neither may keep the
//! endpoint away from others: who breaks it off leaves its place to the next at once, and who takes long is followed
//! by another one soon, though by not many, as it may be the server that does not answer.
//!
//! Pure: the clock and chance are handed in. What a success is, is for the caller to say. Requests that began before
//! the state changed have no say any more: of those in flight when an endpoint is ejected, the last to fail would
//! prolong its penalty, and one that succeeds late would take it back unseen.

use std::num::NonZeroU32;
use std::time::{Duration, Instant};

use serde::Serialize;
use weft_core::{FailureAccrual, SuccessRate};

/// The state of one endpoint.
#[derive(Debug)]
pub struct Breaker {
    settings: FailureAccrual,
    state: State,
    /// In a row.
    failures: u32,
    window: Window,
    /// Others are preferred until then.
    rests_until: Option<Instant>,
    /// Counts changes of the state.
    epoch: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Closed,
    Ejected {
        until: Instant,
        /// Without chance.
        penalty: Duration,
    },
    Probing {
        since: Instant,
        /// The one that the probe follows.
        penalty: Duration,
        /// How long until another one tries.
        patience: Duration,
    },
}

/// Whether an endpoint may be chosen now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Standing {
    /// It may.
    Ready,
    /// If there is no other: it asked for a pause.
    Resting,
    /// By one that tries whether it is well again.
    Due,
    /// It may not.
    Ejected,
}

/// Lets a request's end be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket(NonZeroU32);

/// How a request ended, as far as its endpoint had a part in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Judgement {
    /// Well.
    Success,
    /// Not well.
    Failure,
    /// It was asked for too much: no failure in a row, but none of the share that succeeded.
    Limited,
    /// Nobody knows: the client gave up, say.
    Unknown,
}

/// What became of an endpoint by the end of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// It is left out from now on.
    Ejected,
    /// It was left out, and is not any more.
    Readmitted,
}

/// Requests and failures of the last while, in parts of it.
#[derive(Debug, Default)]
struct Window {
    parts: [Part; PARTS],
    /// The part of now, counted from the beginning.
    newest: u64,
    began: Option<Instant>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Part {
    requests: u32,
    failures: u32,
}

impl Breaker {
    /// Of an endpoint of which nothing bad is known.
    pub fn new(settings: FailureAccrual) -> Self {
        Self {
            settings,
            state: State::Closed,
            failures: 0,
            window: Window::default(),
            rests_until: None,
            epoch: 0,
        }
    }

    /// Whether it may be chosen.
    pub fn standing(&self, now: Instant) -> Standing {
        match self.state {
            State::Closed if self.rests_until.is_some_and(|until| now < until) => Standing::Resting,
            State::Closed => Standing::Ready,
            State::Ejected { until, .. } if now < until => Standing::Ejected,
            State::Ejected { .. } => Standing::Due,
            // Who takes so long may be waiting for something that never comes.
            State::Probing {
                since, patience, ..
            } if now < since + patience => Standing::Ejected,
            State::Probing { .. } => Standing::Due,
        }
    }

    /// Begins a request. None: another one was faster to try whether it is well.
    pub fn begin(&mut self, now: Instant) -> Option<Ticket> {
        match self.standing(now) {
            Standing::Ready | Standing::Resting => {}
            Standing::Ejected => return None,
            Standing::Due => {
                let (penalty, patience) = match self.state {
                    State::Closed => return None,
                    State::Ejected { penalty, .. } => (penalty, LEAST_PATIENCE),
                    State::Probing {
                        penalty, patience, ..
                    } => (penalty, (patience * 2).min(MOST_PATIENCE)),
                };
                self.enter(State::Probing {
                    since: now,
                    penalty,
                    patience,
                });
            }
        }
        Some(self.ticket())
    }

    /// A request has ended; `retry_after` is how long the endpoint asked to be left alone. `chance` is from 0
    /// to 1.
    pub fn end(
        &mut self,
        ticket: Ticket,
        judgement: Judgement,
        retry_after: Option<Duration>,
        now: Instant,
        chance: f64,
    ) -> Option<Change> {
        if ticket != self.ticket() {
            return None;
        }
        let rests = retry_after.map(|it| now + it.min(self.settings.max_penalty));
        match self.state {
            State::Closed => {
                self.rests_until = self.rests_until.max(rests);
                if !self.is_too_much(judgement, now) {
                    return None;
                }
                self.eject(self.settings.min_penalty, rests, now, chance);
                Some(Change::Ejected)
            }
            State::Probing { penalty, .. } => match judgement {
                Judgement::Success => {
                    self.rests_until = rests;
                    self.enter(State::Closed);
                    Some(Change::Readmitted)
                }
                Judgement::Failure | Judgement::Limited => {
                    let penalty = penalty.saturating_mul(2).min(self.settings.max_penalty);
                    self.eject(penalty, rests, now, chance);
                    None
                }
                // Another one may try at once, and for the same penalty.
                Judgement::Unknown => {
                    self.enter(State::Ejected {
                        until: now,
                        penalty,
                    });
                    None
                }
            },
            // No ticket is of this state.
            State::Ejected { .. } => None,
        }
    }

    fn is_too_much(&mut self, judgement: Judgement, now: Instant) -> bool {
        let (in_a_row, of_share) = match judgement {
            Judgement::Unknown => return false,
            Judgement::Success => (0, false),
            Judgement::Failure => (self.failures.saturating_add(1), true),
            Judgement::Limited => (self.failures, true),
        };
        self.failures = in_a_row;
        let too_many = self.settings.max_failures > 0 && in_a_row >= self.settings.max_failures;
        let too_large = self.settings.success_rate.is_some_and(|rate| {
            self.window.count(now, rate.window, of_share);
            of_share && self.window.is_below(rate)
        });
        too_many || too_large
    }

    fn eject(&mut self, penalty: Duration, rests: Option<Instant>, now: Instant, chance: f64) {
        let jitter = f64::from(self.settings.jitter_permille) / 1000.0;
        let longer = penalty.mul_f64(1.0 + chance.clamp(0.0, 1.0) * jitter);
        let until = now + longer.min(self.settings.max_penalty);
        self.rests_until = None;
        self.enter(State::Ejected {
            until: rests.map_or(until, |it| until.max(it)),
            penalty,
        });
    }

    fn enter(&mut self, state: State) {
        self.state = state;
        self.epoch = self.epoch.wrapping_add(1);
        self.failures = 0;
        self.window = Window::default();
    }

    fn ticket(&self) -> Ticket {
        Ticket(NonZeroU32::MIN.saturating_add(self.epoch))
    }
}

impl Window {
    fn count(&mut self, now: Instant, window: Duration, is_failure: bool) {
        let began = *self.began.get_or_insert(now);
        let elapsed = now.saturating_duration_since(began);
        let part = window.as_nanos() / PARTS as u128;
        // The window is at least a second.
        let number = u64::try_from(elapsed.as_nanos() / part.max(1)).unwrap_or(u64::MAX);
        // Those between are of a time in which nothing came.
        let passed = number.saturating_sub(self.newest).min(PARTS as u64);
        for past in 0..passed {
            self.parts[Self::place(number - past)] = Part::default();
        }
        self.newest = self.newest.max(number);
        let part = &mut self.parts[Self::place(self.newest)];
        part.requests = part.requests.saturating_add(1);
        part.failures = part.failures.saturating_add(u32::from(is_failure));
    }

    fn is_below(&self, rate: SuccessRate) -> bool {
        let sum = |of: fn(&Part) -> u32| self.parts.iter().map(|it| u64::from(of(it))).sum::<u64>();
        let (requests, failures) = (sum(|it| it.requests), sum(|it| it.failures));
        let successes = requests.saturating_sub(failures);
        requests >= u64::from(rate.min_requests)
            && successes * 1000 < requests * u64::from(rate.threshold_permille)
    }

    fn place(number: u64) -> usize {
        (number % PARTS as u64) as usize
    }
}

/// Parts of a window: it is a tenth shorter, at most, than it is said to be.
const PARTS: usize = 10;
/// How long the one that tries may take until another one does; twice as long each time, so that a server that never
/// answers has few who wait for it.
const LEAST_PATIENCE: Duration = Duration::from_secs(1);
const MOST_PATIENCE: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::Judgement::{Failure, Limited, Success, Unknown};
    use super::*;

    fn ms(number: u64) -> Duration {
        Duration::from_millis(number)
    }

    fn settings() -> FailureAccrual {
        FailureAccrual {
            max_failures: 3,
            ..FailureAccrual::default()
        }
    }

    /// One request that ends at once.
    fn run(breaker: &mut Breaker, judgement: Judgement, now: Instant) -> Option<Change> {
        let ticket = breaker.begin(now).expect("it may be chosen");
        breaker.end(ticket, judgement, None, now, 0.0)
    }

    fn ejected(now: Instant) -> Breaker {
        let mut breaker = Breaker::new(settings());
        for _ in 0..2 {
            assert_eq!(run(&mut breaker, Failure, now), None);
        }
        assert_eq!(run(&mut breaker, Failure, now), Some(Change::Ejected));
        breaker
    }

    #[test]
    fn so_many_failures_in_a_row_eject() {
        let now = Instant::now();
        for (judgements, is_ejected) in [
            (vec![Failure, Failure], false),
            (vec![Failure, Failure, Failure], true),
            (vec![Failure, Failure, Success, Failure, Failure], false),
            (vec![Failure, Unknown, Failure, Limited, Failure], true),
            (vec![Limited; 20], false),
            (vec![Unknown; 20], false),
        ] {
            let mut breaker = Breaker::new(settings());
            for judgement in &judgements {
                run(&mut breaker, *judgement, now);
            }
            let found = breaker.standing(now) == Standing::Ejected;
            assert_eq!(found, is_ejected, "{judgements:?}");
        }
    }

    #[test]
    fn the_penalty_doubles_up_to_the_largest_and_ends_with_a_success() {
        let mut now = Instant::now();
        let mut breaker = ejected(now);
        for penalty in [1, 2, 4, 8, 16, 32, 60, 60] {
            let penalty = ms(penalty * 1000);
            assert_eq!(breaker.standing(now + penalty - ms(1)), Standing::Ejected);
            now += penalty;
            assert_eq!(breaker.standing(now), Standing::Due);
            assert_eq!(run(&mut breaker, Failure, now), None);
        }
        now += ms(60_000);
        assert_eq!(run(&mut breaker, Success, now), Some(Change::Readmitted));
        assert_eq!(breaker.standing(now), Standing::Ready);
        // It begins anew: with the number of failures, and with the penalty.
        for _ in 0..2 {
            assert_eq!(run(&mut breaker, Failure, now), None);
        }
        assert_eq!(run(&mut breaker, Failure, now), Some(Change::Ejected));
        assert_eq!(breaker.standing(now + ms(1000)), Standing::Due);
    }

    #[test]
    fn one_at_a_time_tries() {
        let now = Instant::now();
        let mut breaker = ejected(now);
        let later = now + ms(1000);
        let probe = breaker.begin(later).expect("it is due");
        assert_eq!(breaker.standing(later), Standing::Ejected);
        assert_eq!(breaker.begin(later), None);
        let change = breaker.end(probe, Success, None, later, 0.0);
        assert_eq!(change, Some(Change::Readmitted));
    }

    #[test]
    fn who_breaks_it_off_leaves_its_place_to_the_next_at_once() {
        let now = Instant::now();
        let mut breaker = ejected(now);
        let later = now + ms(1000);
        for _ in 0..100 {
            let probe = breaker.begin(later).expect("it is due");
            assert_eq!(breaker.end(probe, Unknown, None, later, 0.0), None);
        }
        // The penalty is still what it was.
        assert_eq!(run(&mut breaker, Failure, later), None);
        assert_eq!(breaker.standing(later + ms(1999)), Standing::Ejected);
        let later = later + ms(2000);
        let change = run(&mut breaker, Success, later);
        assert_eq!(change, Some(Change::Readmitted));
    }

    #[test]
    fn who_takes_long_is_followed_by_few() {
        let mut now = Instant::now();
        let mut breaker = ejected(now);
        now += ms(1000);
        let mut held = vec![breaker.begin(now).expect("it is due")];
        for seconds in [1, 2, 4, 8, 16, 30, 30] {
            let patience = ms(seconds * 1000);
            assert_eq!(breaker.begin(now + patience - ms(1)), None, "{seconds}");
            now += patience;
            held.push(breaker.begin(now).expect("it is due again"));
        }
        // Of all of these only the last one has a say.
        let last = held.pop().expect("there is one");
        for ticket in held {
            assert_eq!(breaker.end(ticket, Failure, None, now, 0.0), None);
        }
        let change = breaker.end(last, Success, None, now, 0.0);
        assert_eq!(change, Some(Change::Readmitted));
        assert_eq!(breaker.standing(now), Standing::Ready);
    }

    #[test]
    fn what_began_before_has_no_say() {
        let now = Instant::now();
        let mut breaker = Breaker::new(settings());
        let old: Vec<Ticket> = (0..5).filter_map(|_| breaker.begin(now)).collect();
        for _ in 0..3 {
            run(&mut breaker, Failure, now);
        }
        for (ticket, judgement) in old
            .into_iter()
            .zip([Failure, Success, Failure, Success, Failure])
        {
            assert_eq!(breaker.end(ticket, judgement, None, now, 0.0), None);
        }
        assert_eq!(breaker.standing(now + ms(999)), Standing::Ejected);
        assert_eq!(breaker.standing(now + ms(1000)), Standing::Due);
    }

    #[test]
    fn chance_prolongs_a_penalty_by_up_to_its_share() {
        let now = Instant::now();
        for (chance, until) in [(0.0, 1000), (0.5, 1250), (1.0, 1500), (7.0, 1500)] {
            let mut breaker = Breaker::new(settings());
            for _ in 0..3 {
                let ticket = breaker.begin(now).expect("it may be chosen");
                breaker.end(ticket, Failure, None, now, chance);
            }
            assert_eq!(breaker.standing(now + ms(until - 1)), Standing::Ejected);
            assert_eq!(breaker.standing(now + ms(until)), Standing::Due, "{chance}");
        }
    }

    #[test]
    fn no_chance_prolongs_the_largest_penalty() {
        let now = Instant::now();
        let largest = FailureAccrual {
            min_penalty: settings().max_penalty,
            ..settings()
        };
        let mut breaker = Breaker::new(largest);
        for _ in 0..3 {
            let ticket = breaker.begin(now).expect("it may be chosen");
            breaker.end(ticket, Failure, None, now, 1.0);
        }
        let until = now + largest.max_penalty;
        assert_eq!(breaker.standing(until - ms(1)), Standing::Ejected);
        assert_eq!(breaker.standing(until), Standing::Due);
    }

    #[test]
    fn a_share_of_failures_within_a_window_ejects() {
        let rate = FailureAccrual {
            max_failures: 0,
            success_rate: Some(SuccessRate::default()),
            ..settings()
        };
        // Milliseconds, judgement; whether it is ejected after the last.
        let few: Vec<_> = (0..4).map(|it| (it, Failure)).collect();
        let five: Vec<_> = (0..5).map(|it| (it, Failure)).collect();
        let limited: Vec<_> = (0..5).map(|it| (it, Limited)).collect();
        // Four of five is not below.
        let mixed = |failing: u64| -> Vec<_> {
            let judge = |it| if it % 10 < failing { Failure } else { Success };
            // The failures last, so that there are enough requests before.
            (0..100).rev().map(|it| (100 - it, judge(it))).collect()
        };
        let spread: Vec<_> = (0..8).map(|it| (it * 3000, Failure)).collect();
        for (requests, is_ejected) in [
            (few, false),
            (five, true),
            (limited, true),
            (mixed(2), false),
            (mixed(3), true),
            (spread, false),
        ] {
            let t0 = Instant::now();
            let mut breaker = Breaker::new(rate);
            let mut was_ejected = false;
            for (after, judgement) in &requests {
                let now = t0 + ms(*after);
                was_ejected |= breaker.standing(now) == Standing::Ejected;
                if let Some(ticket) = breaker.begin(now) {
                    let change = breaker.end(ticket, *judgement, None, now, 0.0);
                    was_ejected |= change == Some(Change::Ejected);
                }
            }
            assert_eq!(was_ejected, is_ejected, "{requests:?}");
        }
    }

    #[test]
    fn a_pause_that_is_asked_for_is_bounded_and_no_ejection() {
        let now = Instant::now();
        for (asked, rests) in [(ms(5000), ms(5000)), (ms(3_600_000), ms(60_000))] {
            let mut breaker = Breaker::new(settings());
            let ticket = breaker.begin(now).expect("it may be chosen");
            assert_eq!(breaker.end(ticket, Limited, Some(asked), now, 0.0), None);
            assert_eq!(breaker.standing(now + rests - ms(1)), Standing::Resting);
            assert_eq!(breaker.standing(now + rests), Standing::Ready);
            assert!(breaker.begin(now).is_some(), "if there is no other");
        }
        // With a penalty the later of both counts.
        let mut breaker = Breaker::new(settings());
        for _ in 0..3 {
            let ticket = breaker.begin(now).expect("it may be chosen");
            breaker.end(ticket, Failure, Some(ms(4000)), now, 0.0);
        }
        assert_eq!(breaker.standing(now + ms(3999)), Standing::Ejected);
        assert_eq!(breaker.standing(now + ms(4000)), Standing::Due);
    }

    proptest! {
        /// Whatever comes: an endpoint always becomes due again within its penalty and what chance adds, or
        /// when the one that tries has had its time.
        #[test]
        fn it_is_never_left_out_for_ever(
            events in proptest::collection::vec((0..4_u8, 0..20_000_u64, 0.0..1.0_f64), 1..200),
        ) {
            let all = FailureAccrual { success_rate: Some(SuccessRate::default()), ..settings() };
            let mut breaker = Breaker::new(all);
            let mut now = Instant::now();
            let mut held = Vec::new();
            for (kind, after, chance) in events {
                now += ms(after);
                held.extend(breaker.begin(now));
                let judgement = [Success, Failure, Limited, Unknown][usize::from(kind)];
                if after % 3 != 0
                    && let Some(ticket) = held.pop()
                {
                    breaker.end(ticket, judgement, Some(ms(after)), now, chance);
                }
                let longest = all.max_penalty.max(MOST_PATIENCE);
                prop_assert_ne!(breaker.standing(now + longest), Standing::Ejected);
            }
        }
    }
}
