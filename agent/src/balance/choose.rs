//! The order in which an exchange, or a connection, tries the endpoints of a service port.

use std::net::SocketAddr;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use super::load::EndpointEntry;

/// The tries of one exchange or connection: each endpoint at most once, and at most [`MOST_TRIES`].
/// Every one is chosen when it is needed, by what is known then.
#[derive(Debug)]
pub struct Tries {
    endpoints: Arc<Vec<Arc<EndpointEntry>>>,
    /// Which of them may be chosen.
    range: Range<usize>,
    /// The first `tried` are the places of those that were tried, in order of place.
    places: [usize; MOST_TRIES],
    tried: usize,
}

impl Tries {
    /// Begins the tries among a part of the endpoints.
    pub fn new(endpoints: Arc<Vec<Arc<EndpointEntry>>>, range: Range<usize>) -> Self {
        debug_assert!(range.start <= range.end && range.end <= endpoints.len());
        Self {
            endpoints,
            range,
            places: [0; MOST_TRIES],
            tried: 0,
        }
    }

    /// How many endpoints there are to choose from.
    pub fn candidates(&self) -> usize {
        self.range.len()
    }

    /// Leaves out an endpoint, if there is another one, and not too many were tried.
    pub fn leave_out(&mut self, to: SocketAddr) {
        let left = self.candidates() - self.tried;
        if left < 2 || self.tried + 1 == MOST_TRIES {
            return;
        }
        let mut places = self.range.clone();
        let found = places.find(|it| {
            let is_same = self.endpoints.get(*it).is_some_and(|it| it.to() == to);
            is_same && !self.places[..self.tried].contains(it)
        });
        if let Some(place) = found {
            self.remember(place);
        }
    }

    /// The next endpoint: the one of lower cost of two that are drawn among those not tried yet.
    /// `below` draws a number below the one that it is given, which is not 0.
    pub fn next(
        &mut self,
        now: Instant,
        mut below: impl FnMut(usize) -> usize,
    ) -> Option<&Arc<EndpointEntry>> {
        if self.tried == MOST_TRIES {
            return None;
        }
        let place = match self.candidates() - self.tried {
            0 => return None,
            1 => self.untried(0),
            left => {
                let first = below(left);
                // Any of the others, with the same probability.
                let second = (first + 1 + below(left - 1)) % left;
                let (first, second) = (self.untried(first), self.untried(second));
                let cost = |place: usize| self.endpoints[place].load.cost(now);
                if cost(second) < cost(first) {
                    second
                } else {
                    first
                }
            }
        };
        self.remember(place);
        self.endpoints.get(place)
    }

    /// The place of the endpoint with this number among those not tried.
    fn untried(&self, number: usize) -> usize {
        let mut place = self.range.start + number;
        for tried in &self.places[..self.tried] {
            place += usize::from(*tried <= place);
        }
        place
    }

    fn remember(&mut self, place: usize) {
        self.places[self.tried] = place;
        self.tried += 1;
        self.places[..self.tried].sort_unstable();
    }
}

/// Draws a number below a limit that is not 0.
pub fn random_below(limit: usize) -> usize {
    rand::random_range(0..limit)
}

/// One gives up after so many endpoints: a client waits meanwhile.
pub const MOST_TRIES: usize = 3;

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::net::IpAddr;
    use std::time::Duration;

    use rand::rngs::SmallRng;
    use rand::{RngExt, SeedableRng};

    use super::*;

    fn endpoints(latencies_ms: &[u64], now: Instant) -> Arc<Vec<Arc<EndpointEntry>>> {
        let made = latencies_ms.iter().enumerate().map(|(number, latency)| {
            let endpoint = EndpointEntry::new(IpAddr::from([10, 0, 0, number as u8]), 80);
            endpoint.load.simulate_begin();
            let latency = Duration::from_millis(*latency);
            // Long enough ago that nothing of the default is left.
            let before = now + Duration::from_secs(1000);
            endpoint.load.simulate_answer(latency, before);
            endpoint
        });
        Arc::new(made.collect())
    }

    fn later(now: Instant) -> Instant {
        now + Duration::from_secs(1000)
    }

    fn seeded() -> impl FnMut(usize) -> usize {
        let mut random = SmallRng::seed_from_u64(7);
        move |limit| random.random_range(0..limit)
    }

    /// Numbers of the endpoints in the order in which they are tried.
    fn order(tries: &mut Tries, now: Instant, below: &mut impl FnMut(usize) -> usize) -> Vec<u8> {
        let mut order = Vec::new();
        while let Some(endpoint) = tries.next(now, &mut *below) {
            let IpAddr::V4(address) = endpoint.address else {
                panic!("IPv4");
            };
            order.push(address.octets()[3]);
        }
        order
    }

    #[test]
    fn each_endpoint_is_tried_once_and_few_are() {
        let now = Instant::now();
        let mut below = seeded();
        for count in 0..8 {
            let all = endpoints(&vec![5; count], now);
            for _ in 0..200 {
                let mut tries = Tries::new(Arc::clone(&all), 0..count);
                assert_eq!(tries.candidates(), count);
                let order = order(&mut tries, later(now), &mut below);
                assert_eq!(order.len(), count.min(MOST_TRIES));
                let different: BTreeSet<u8> = order.iter().copied().collect();
                assert_eq!(different.len(), order.len(), "{order:?}");
            }
        }
    }

    #[test]
    fn only_those_in_the_range_are_tried() {
        let now = Instant::now();
        let mut below = seeded();
        let all = endpoints(&[1, 1, 90, 90, 90, 1], now);
        let mut met = BTreeSet::new();
        for _ in 0..100 {
            let mut tries = Tries::new(Arc::clone(&all), 2..5);
            met.extend(order(&mut tries, later(now), &mut below));
        }
        assert_eq!(met, BTreeSet::from([2, 3, 4]));
        assert!(order(&mut Tries::new(all, 3..3), now, &mut below).is_empty());
    }

    #[test]
    fn one_is_left_out_if_there_is_another() {
        let now = Instant::now();
        let mut below = seeded();
        for (count, left_out, order_has) in [
            (3, 1, 2),
            (2, 1, 1),
            (1, 1, 1),
            (4, 3, 1),
            (2, 2, 1),
            (5, 0, 3),
        ] {
            let all = endpoints(&vec![5; count], now);
            let mut tries = Tries::new(Arc::clone(&all), 0..count);
            for endpoint in &all[..left_out] {
                tries.leave_out(endpoint.to());
            }
            let order = order(&mut tries, later(now), &mut below);
            assert_eq!(order.len(), order_has, "{count} {left_out}");
            if left_out < count {
                assert!(!order.contains(&0) || left_out == 0, "{count} {left_out}");
            }
        }
    }

    #[test]
    fn of_two_the_one_that_costs_less_comes_first() {
        let now = Instant::now();
        let all = endpoints(&[50, 5, 20], now);
        // What is drawn; the order.
        for (draws, expected) in [
            ([0, 0, 0, 0], [1, 2, 0]),
            ([0, 1, 0, 0], [2, 1, 0]),
            ([1, 0, 1, 0], [1, 2, 0]),
            ([2, 0, 0, 0], [2, 1, 0]),
        ] {
            let mut drawn = draws.into_iter();
            let mut below = |limit| {
                let number = drawn.next().expect("few are drawn");
                assert!(number < limit);
                number
            };
            let mut tries = Tries::new(Arc::clone(&all), 0..3);
            assert_eq!(order(&mut tries, later(now), &mut below), expected);
        }
    }

    #[test]
    fn equals_get_equal_shares() {
        let now = Instant::now();
        let mut below = seeded();
        let all = endpoints(&[10; 10], now);
        let mut counts = [0_f64; 10];
        for _ in 0..10_000 {
            let mut tries = Tries::new(Arc::clone(&all), 0..10);
            let chosen = tries.next(later(now), &mut below).expect("ten");
            let place = all.iter().position(|it| Arc::ptr_eq(it, chosen));
            counts[place.expect("one of them")] += 1.0;
        }
        // Chi squared, nine degrees of freedom: above 27.9 once in a thousand seeds.
        let chi: f64 = counts.iter().map(|it| (it - 1000.0).powi(2) / 1000.0).sum();
        assert!(chi < 27.9, "{chi}: {counts:?}");
    }

    #[test]
    fn the_slowest_of_ten_is_never_taken_first_and_the_fastest_twice_as_often_as_on_average() {
        let now = Instant::now();
        let mut below = seeded();
        let latencies: Vec<u64> = (1..=10).collect();
        let all = endpoints(&latencies, now);
        let mut counts = [0_usize; 10];
        for _ in 0..10_000 {
            let mut tries = Tries::new(Arc::clone(&all), 0..10);
            let chosen = tries.next(later(now), &mut below).expect("ten");
            let place = all.iter().position(|it| Arc::ptr_eq(it, chosen));
            counts[place.expect("one of them")] += 1;
        }
        assert_eq!(counts[9], 0);
        assert!((1850..2150).contains(&counts[0]), "{counts:?}");
    }
}
