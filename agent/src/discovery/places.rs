//! At which of the controllers' addresses an agent tries next: pure.
//!
//! An agent has a stream to one of them. Those that did not fail lately come first, in an order that is another one for
//! each agent, so that agents are spread; those that did come last, the one whose failure is the longest ago first. A
//! *round* is over when all have failed in it: only then is it waited.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Duration;

use rand::seq::SliceRandom;
use tokio::time::Instant;

/// What is known of the addresses.
#[derive(Debug)]
pub(super) struct Places {
    known: Vec<SocketAddr>,
    failed: HashMap<SocketAddr, Instant>,
    round: Instant,
    in_use: Option<SocketAddr>,
}

impl Places {
    /// No address is known yet.
    pub(super) fn new(now: Instant) -> Self {
        Self {
            known: vec![],
            failed: HashMap::new(),
            round: now,
            in_use: None,
        }
    }

    /// These are the addresses now.
    pub(super) fn found(&mut self, mut addresses: Vec<SocketAddr>) {
        addresses.sort_unstable();
        addresses.dedup();
        self.failed.retain(|it, _| addresses.contains(it));
        self.known = addresses;
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.known.len()
    }

    /// The stream is at this address, or at none.
    pub(super) fn uses(&mut self, address: Option<SocketAddr>) {
        self.in_use = address;
    }

    /// Nothing comes of this address.
    pub(super) fn failed(&mut self, address: SocketAddr, now: Instant) {
        self.failed.insert(address, now);
    }

    /// From now on all count as not tried.
    pub(super) fn begin_round(&mut self, now: Instant) {
        self.round = now;
    }

    /// Whether there is one, beside this one, that did not fail in this round.
    pub(super) fn has_untried_but(&self, address: Option<SocketAddr>) -> bool {
        let tried = |it| {
            let failed = self.failed.get(it);
            Some(*it) == address || failed.is_some_and(|at| *at >= self.round)
        };
        !self.known.iter().all(tried)
    }

    /// All of them in the order in which they are to be tried, each with how long to wait for it.
    pub(super) fn order(&self, now: Instant) -> Vec<(SocketAddr, Duration)> {
        let mut order = self.known.clone();
        order.shuffle(&mut rand::rng());
        let lately = |it: &SocketAddr| {
            let failed = self.failed.get(it).copied();
            failed.filter(|at| now - *at < REMEMBER)
        };
        order.sort_by_key(|it| (lately(it), self.in_use != Some(*it)));
        let last = order.len().saturating_sub(1);
        let patience = |(index, it)| match index == last || lately(&it).is_some() {
            true => (it, LONGEST_PATIENCE),
            false => (it, PATIENCE),
        };
        order.into_iter().enumerate().map(patience).collect()
    }
}

/// How long one waits for an address, where there is another to be tried,
const PATIENCE: Duration = Duration::from_secs(1);
/// and for the last, or one that failed already, perhaps for want of time.
const LONGEST_PATIENCE: Duration = Duration::from_secs(5);
/// A controller that was started again long ago is as good as any.
const REMEMBER: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use super::*;

    fn address(number: u8) -> SocketAddr {
        ([10, 0, 0, number], 15010).into()
    }

    fn places(numbers: &[u8], now: Instant) -> Places {
        let mut places = Places::new(now);
        places.found(numbers.iter().copied().map(address).collect());
        places
    }

    fn order(places: &Places, now: Instant) -> Vec<SocketAddr> {
        places.order(now).into_iter().map(|(it, _)| it).collect()
    }

    #[test]
    fn those_that_failed_come_last_and_the_oldest_failure_first() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        for (failures, at, expected) in [
            (&[(1, 1)][..], 2, &[1][..]),
            (&[(1, 1), (2, 2)], 3, &[1, 2]),
            (&[(2, 1), (1, 2)], 3, &[2, 1]),
            (&[(1, 1), (2, 2), (1, 3)], 4, &[2, 1]),
            // Long ago is not lately.
            (&[(1, 1), (2, 50)], 70, &[2]),
        ] {
            let mut places = places(&[1, 2, 3], start);
            for (number, at) in failures {
                places.failed(address(*number), after(*at));
            }
            let order = order(&places, after(at));
            let expected: Vec<_> = expected.iter().copied().map(address).collect();
            assert_eq!(order.len(), 3);
            assert!(order.ends_with(&expected), "{failures:?}: {order:?}");
        }
    }

    #[test]
    fn agents_are_spread() {
        let now = Instant::now();
        let mut firsts = HashMap::new();
        for _ in 0..300 {
            let first = order(&places(&[1, 2, 3], now), now)[0];
            *firsts.entry(first).or_insert(0) += 1;
        }
        assert_eq!(firsts.len(), 3);
        assert!(firsts.values().all(|it| *it > 50), "{firsts:?}");
        // What signs is asked where the stream is.
        let mut places = places(&[1, 2, 3], now);
        places.uses(Some(address(2)));
        assert_eq!(order(&places, now)[0], address(2));
        places.failed(address(2), now);
        assert_eq!(order(&places, now)[2], address(2));
    }

    #[test]
    fn a_round_is_over_when_all_have_failed() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let mut places = places(&[1, 2], start);
        assert!(places.has_untried_but(None));
        places.failed(address(1), after(1));
        assert!(places.has_untried_but(None));
        assert!(!places.has_untried_but(Some(address(2))));
        places.failed(address(2), after(2));
        assert!(!places.has_untried_but(None));
        places.begin_round(after(3));
        assert!(places.has_untried_but(None));
        places.failed(address(1), after(4));
        places.failed(address(2), after(4));
        // One that is new.
        places.found(vec![address(1), address(2), address(3)]);
        assert!(places.has_untried_but(None));
        // And one that is no more is none to be tried.
        places.found(vec![address(1), address(2)]);
        assert!(!places.has_untried_but(None));
    }

    #[test]
    fn only_the_last_and_those_that_failed_are_waited_for_long() {
        let now = Instant::now();
        let mut places = places(&[1, 2, 3], now);
        let waits = |places: &Places| -> Vec<u64> {
            let order = places.order(now).into_iter();
            order.map(|(_, patience)| patience.as_secs()).collect()
        };
        assert_eq!(waits(&places), [1, 1, 5]);
        places.failed(address(1), now);
        places.failed(address(2), now);
        assert_eq!(waits(&places), [1, 5, 5]);
        places.found(vec![address(3)]);
        assert_eq!(waits(&places), [5]);
    }
}
