//! The order in which an exchange, or a connection, tries the endpoints of a service port.

use std::fmt;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use super::breaker::Standing;
use super::load::{EndpointEntry, InFlight};

/// Which endpoints must not be chosen, whatever is known of them.
pub struct Forbidden(Box<dyn Fn(SocketAddr) -> bool + Send + Sync>);

impl Forbidden {
    /// Those of which it says so.
    pub fn new(is_one: impl Fn(SocketAddr) -> bool + Send + Sync + 'static) -> Self {
        Self(Box::new(is_one))
    }
}

impl fmt::Debug for Forbidden {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Forbidden").finish_non_exhaustive()
    }
}

/// The tries of one exchange or connection: each endpoint at most once, and at most three.
/// Every one is chosen when it is needed, by what is known then.
#[derive(Debug)]
pub struct Tries {
    endpoints: Arc<Vec<Arc<EndpointEntry>>>,
    /// Which of them there are to choose from.
    range: Range<usize>,
    /// Those of them that are not left out, in order; none: nobody is.
    among: Option<Vec<usize>>,
    /// The weight of the strongest, in percent; none: all are ordinary ones.
    heaviest: Option<NonZeroU32>,
    forbidden: Option<Forbidden>,
    /// The first `tried` are those that were tried, in order, as numbers among those that are not left out.
    numbers: [usize; MOST_TRIES],
    tried: usize,
}

impl Tries {
    /// Begins the tries among a part of the endpoints.
    pub fn new(endpoints: Arc<Vec<Arc<EndpointEntry>>>, range: Range<usize>) -> Self {
        debug_assert!(range.start <= range.end && range.end <= endpoints.len());
        Self {
            endpoints,
            range,
            among: None,
            heaviest: None,
            forbidden: None,
            numbers: [0; MOST_TRIES],
            tried: 0,
        }
    }

    /// The same, where some endpoints are stronger than others: the strongest has this weight, in percent.
    pub fn weighted(self, heaviest: Option<NonZeroU32>) -> Self {
        Self { heaviest, ..self }
    }

    /// The same, without those that must not be chosen; none: all may be.
    pub fn without(self, forbidden: Option<Forbidden>) -> Self {
        Self { forbidden, ..self }
    }

    /// One of the endpoints, if there are any and none may be chosen.
    pub fn all_forbidden(&self) -> Option<SocketAddr> {
        let mut places = self.range.clone();
        let first = self.endpoints.get(self.range.start);
        let all = !places.is_empty() && places.all(|it| self.is_forbidden(&self.endpoints[it]));
        first.filter(|_| all).map(|it| it.to())
    }

    /// The endpoints that there are to choose from, and how each stands now; one that must not be chosen is as good as
    /// ejected.
    pub fn standings(&self, now: Instant) -> Vec<(&Arc<EndpointEntry>, Standing)> {
        let all = self.range.clone().map(|place| &self.endpoints[place]);
        all.map(|it| (it, self.standing(it, now))).collect()
    }

    /// How many endpoints there are to choose from, with those that are left out or must not be chosen.
    pub fn candidates(&self) -> usize {
        self.range.len()
    }

    /// Whether there are endpoints that were not tried: because there are too many, or because they are left out.
    pub fn has_more(&self) -> bool {
        self.tried < self.candidates()
    }

    /// The same tries, before the first of them, without these endpoints. There may be none left.
    pub fn leaving_out(mut self, is_left_out: impl Fn(SocketAddr) -> bool) -> Self {
        debug_assert_eq!(self.tried, 0, "numbers are of those that are not left out");
        let stays = |place: &usize| !is_left_out(self.endpoints[*place].to());
        self.among = Some(self.range.clone().filter(stays).collect());
        self
    }

    /// Those that may be chosen now, or as soon as somebody tries them again.
    pub fn choosable_now(&self, now: Instant) -> impl Iterator<Item = SocketAddr> {
        let all = self.range.clone().map(|place| &self.endpoints[place]);
        let may = all.filter(move |it| self.standing(it, now) != Standing::Ejected);
        may.map(|it| it.to())
    }

    /// Begins at the next endpoint that may be chosen.
    pub fn begin(
        &mut self,
        now: Instant,
        mut below: impl FnMut(usize) -> usize,
    ) -> Option<InFlight> {
        loop {
            // Of those that try whether an endpoint is well again, one is the first.
            if let Some(begun) = self.next(now, &mut below)?.begin(now) {
                return Some(begun);
            }
        }
    }

    /// The next endpoint: the one of lower cost of two that are drawn among those not tried yet that
    /// may be chosen. `below` draws a number below the one that it is given, which is not 0.
    pub fn next(
        &mut self,
        now: Instant,
        mut below: impl FnMut(usize) -> usize,
    ) -> Option<&Arc<EndpointEntry>> {
        if self.tried == MOST_TRIES {
            return None;
        }
        let left = self.among.as_ref().map_or(self.range.len(), Vec::len) - self.tried;
        let (first, second) = self.draw_two(left, |it| self.untried(it), &mut below)?;
        let number = if self.is_ready(first, now) && self.is_ready(second, now) {
            self.better(first, second, now)
        } else {
            // To draw again until both are would give the same; this ends.
            let numbers = self.choosable(left, now);
            let (first, second) = self.draw_two(numbers.len(), |it| numbers[it], &mut below)?;
            self.better(first, second, now)
        };
        self.remember(number);
        Some(self.endpoint(number))
    }

    /// Two different ones of so many, in any order; of one, that one twice.
    fn draw_two(
        &self,
        limit: usize,
        number: impl Fn(usize) -> usize,
        mut below: impl FnMut(usize) -> usize,
    ) -> Option<(usize, usize)> {
        if limit < 2 {
            return (limit == 1).then(|| (number(0), number(0)));
        }
        let first = self.draw(limit, &number, &mut below);
        // Any of the others.
        let other = |drawn: usize| number((first + 1 + drawn) % limit);
        let second = self.draw(limit - 1, other, &mut below);
        Some((number(first), other(second)))
    }

    /// One of so many. The stronger an endpoint is, the more often it is drawn: drawn as often as the others, the
    /// strongest of ten would have a fifth of all, at most.
    fn draw(
        &self,
        limit: usize,
        number: impl Fn(usize) -> usize,
        mut below: impl FnMut(usize) -> usize,
    ) -> usize {
        let mut drawn = below(limit);
        let Some(heaviest) = self.heaviest else {
            return drawn;
        };
        for _ in 0..MOST_DRAWS {
            let weight = self.endpoint(number(drawn)).load.weight();
            if below(heaviest.get() as usize) < weight as usize {
                break;
            }
            drawn = below(limit);
        }
        drawn
    }

    fn is_ready(&self, number: usize, now: Instant) -> bool {
        self.standing(self.endpoint(number), now) == Standing::Ready
    }

    fn is_forbidden(&self, endpoint: &EndpointEntry) -> bool {
        let forbidden = self.forbidden.as_ref();
        forbidden.is_some_and(|it| it.0(endpoint.to()))
    }

    fn standing(&self, endpoint: &EndpointEntry, now: Instant) -> Standing {
        match self.is_forbidden(endpoint) {
            true => Standing::Ejected,
            false => endpoint.standing(now),
        }
    }

    /// The numbers of those that may be chosen; if there are none, of those that asked for a pause.
    fn choosable(&self, left: usize, now: Instant) -> Vec<usize> {
        let mut resting = Vec::new();
        let mut choosable = Vec::new();
        for number in (0..left).map(|it| self.untried(it)) {
            match self.standing(self.endpoint(number), now) {
                Standing::Ready | Standing::Due => choosable.push(number),
                Standing::Resting => resting.push(number),
                Standing::Ejected => {}
            }
        }
        if choosable.is_empty() {
            resting
        } else {
            choosable
        }
    }

    /// Of two, the one that costs less; one that has to be tried first, so that it is.
    fn better(&self, first: usize, second: usize, now: Instant) -> usize {
        let cost = |number: usize| {
            let endpoint = self.endpoint(number);
            match endpoint.standing(now) {
                Standing::Due => 0.0,
                _ => endpoint.load.cost(now),
            }
        };
        if cost(second) < cost(first) {
            second
        } else {
            first
        }
    }

    /// The number of this one of those that were not tried, among all that are not left out.
    fn untried(&self, untried: usize) -> usize {
        let mut number = untried;
        for tried in &self.numbers[..self.tried] {
            number += usize::from(*tried <= number);
        }
        number
    }

    fn endpoint(&self, number: usize) -> &Arc<EndpointEntry> {
        let place = match &self.among {
            Some(among) => among[number],
            None => self.range.start + number,
        };
        &self.endpoints[place]
    }

    fn remember(&mut self, number: usize) {
        self.numbers[self.tried] = number;
        self.tried += 1;
        self.numbers[..self.tried].sort_unstable();
    }
}

/// Where one is so much stronger than the others that this is not enough, it has a little less than its share.
const MOST_DRAWS: usize = 64;

/// Draws a number below a limit that is not 0.
pub fn random_below(limit: usize) -> usize {
    rand::random_range(0..limit)
}

/// One gives up after so many endpoints: a client waits meanwhile.
const MOST_TRIES: usize = 3;

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::net::IpAddr;
    use std::time::Duration;

    use rand::rngs::SmallRng;
    use rand::{RngExt, SeedableRng};

    use weft_core::FailureAccrual;

    use super::*;
    use crate::balance::breaker::Judgement;
    use crate::balance::health::Guard;

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
    fn those_that_are_forbidden_are_never_tried_and_all_others_are() {
        let now = Instant::now();
        let mut below = seeded();
        let all = endpoints(&[1; 8], now);
        let without = |allowed: &'static [u8]| {
            let is_allowed = |to: SocketAddr| {
                allowed
                    .iter()
                    .any(|it| to.ip() == IpAddr::from([10, 0, 0, *it]))
            };
            let forbidden = Forbidden::new(move |to| !is_allowed(to));
            Tries::new(Arc::clone(&all), 0..8).without(Some(forbidden))
        };
        for _ in 0..100 {
            for allowed in [&[5][..], &[0, 7], &[1, 2, 3]] {
                let mut tries = without(allowed);
                assert_eq!(tries.all_forbidden(), None);
                let mut order = order(&mut tries, later(now), &mut below);
                order.sort_unstable();
                assert_eq!(order, allowed);
            }
        }
        let mut none = without(&[]);
        assert!(order(&mut none, later(now), &mut below).is_empty());
        assert_eq!(none.all_forbidden(), Some(all[0].to()));
        let nobody = Tries::new(Arc::default(), 0..0).without(Some(Forbidden::new(|_| true)));
        assert_eq!(nobody.all_forbidden(), None);
    }

    #[test]
    fn those_that_are_forbidden_are_not_tried_either_where_others_are_left_out() {
        let now = Instant::now();
        let mut below = seeded();
        let all = endpoints(&[1; 6], now);
        // Who is left out; who is tried of the four that are not forbidden.
        let cases: [(&[usize], &[u8]); 4] = [
            (&[], &[0, 1, 2, 3]),
            (&[0, 1], &[2, 3]),
            (&[0, 1, 2, 3], &[]),
            (&[3, 4, 5], &[0, 1, 2]),
        ];
        for (left_out, expected) in cases {
            let out: Vec<_> = left_out.iter().map(|it| all[*it].to()).collect();
            let mut met = BTreeSet::new();
            for _ in 0..200 {
                let forbidden = [all[4].to(), all[5].to()];
                let forbidden = Forbidden::new(move |to| forbidden.contains(&to));
                let tries = Tries::new(Arc::clone(&all), 0..6).without(Some(forbidden));
                let mut tries = tries.leaving_out(|it| out.contains(&it));
                // There are others than those that are left out.
                assert_eq!(tries.all_forbidden(), None);
                let now_or_soon = tries.choosable_now(now);
                assert!(now_or_soon.eq(all[..4].iter().map(|it| it.to())));
                met.extend(order(&mut tries, later(now), &mut below));
            }
            assert!(met.iter().eq(expected), "{left_out:?}: {met:?}");
        }
    }

    #[test]
    fn those_that_are_left_out_are_never_tried_however_many_they_are() {
        let now = Instant::now();
        let mut below = seeded();
        for (count, left_out) in [(3, 1), (2, 1), (1, 1), (4, 3), (2, 2), (9, 6), (5, 0)] {
            let all = endpoints(&vec![5; count], now);
            for _ in 0..200 {
                let out: Vec<_> = all[..left_out].iter().map(|it| it.to()).collect();
                let tries = Tries::new(Arc::clone(&all), 0..count);
                let mut tries = tries.leaving_out(|it| out.contains(&it));
                assert_eq!(tries.candidates(), count);
                let order = order(&mut tries, later(now), &mut below);
                let rest = count - left_out;
                assert_eq!(order.len(), rest.min(MOST_TRIES), "{count} {left_out}");
                assert!(order.iter().all(|it| usize::from(*it) >= left_out));
                assert_eq!(tries.has_more(), count > order.len(), "{count} {left_out}");
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

    fn guarded(count: u8) -> Arc<Vec<Arc<EndpointEntry>>> {
        let settings = FailureAccrual {
            max_failures: 1,
            jitter_permille: 0,
            ..FailureAccrual::default()
        };
        let health = Arc::default();
        let made = (0..count).map(|number| {
            let guard = Guard::new(settings, &health);
            EndpointEntry::guarded(IpAddr::from([10, 0, 0, number]), 80, guard)
        });
        Arc::new(made.collect())
    }

    fn judge(endpoint: &Arc<EndpointEntry>, judgement: Judgement, retry_after: Option<Duration>) {
        let mut begun = endpoint.begin(Instant::now()).expect("it may be chosen");
        begun.judge(judgement, retry_after);
    }

    /// How often each is chosen first.
    fn chosen(all: &Arc<Vec<Arc<EndpointEntry>>>, now: Instant) -> Vec<f64> {
        let mut below = seeded();
        let mut counts = vec![0.0; all.len()];
        for _ in 0..10_000 {
            let mut tries = Tries::new(Arc::clone(all), 0..all.len());
            if let Some(chosen) = tries.next(now, &mut below) {
                let place = all.iter().position(|it| Arc::ptr_eq(it, chosen));
                counts[place.expect("one of them")] += 1.0;
            }
        }
        counts
    }

    #[test]
    fn those_that_are_left_out_are_not_chosen_and_others_share_equally() {
        let all = guarded(10);
        for number in [2, 3, 7] {
            judge(&all[number], Judgement::Failure, None);
        }
        let counts = chosen(&all, Instant::now());
        let expected = 10_000.0 / 7.0;
        let mut chi = 0.0;
        for (number, count) in counts.iter().enumerate() {
            if [2, 3, 7].contains(&number) {
                assert_eq!(*count, 0.0, "{counts:?}");
            } else {
                chi += (count - expected).powi(2) / expected;
            }
        }
        // Six degrees of freedom: above 22.5 once in a thousand seeds.
        assert!(chi < 22.5, "{chi}: {counts:?}");
    }

    #[test]
    fn those_that_are_left_out_were_not_tried() {
        let mut below = seeded();
        // How many there are, how many of them are left out, whether some were not tried in the end.
        for (count, left_out, has_more) in [
            (1, 0, false),
            (3, 0, false),
            (4, 0, true),
            (3, 1, true),
            (3, 3, true),
            (0, 0, false),
        ] {
            let all = guarded(count);
            for endpoint in &all[..left_out] {
                judge(endpoint, Judgement::Failure, None);
            }
            let mut tries = Tries::new(Arc::clone(&all), 0..all.len());
            while tries.begin(Instant::now(), &mut below).is_some() {}
            assert_eq!(tries.has_more(), has_more, "{count} {left_out}");
        }
    }

    #[test]
    fn if_all_are_left_out_nobody_is_chosen_and_who_asked_for_a_pause_is() {
        let all = guarded(3);
        let now = Instant::now();
        let minute = Some(Duration::from_secs(60));
        judge(&all[1], Judgement::Success, minute);
        judge(&all[2], Judgement::Success, minute);
        assert_eq!(chosen(&all, now)[1..], [0.0, 0.0]);
        judge(&all[0], Judgement::Failure, None);
        let counts = chosen(&all, now);
        assert!(counts[0] == 0.0 && counts[1] + counts[2] == 10_000.0);
        for number in [1, 2] {
            judge(&all[number], Judgement::Failure, None);
        }
        assert_eq!(chosen(&all, now), [0.0, 0.0, 0.0]);
    }

    #[test]
    fn one_request_tries_an_endpoint_again_and_others_go_elsewhere() {
        let all = guarded(2);
        judge(&all[0], Judgement::Failure, None);
        let due = Instant::now() + Duration::from_secs(2);
        let mut below = seeded();
        let mut begin = || Tries::new(Arc::clone(&all), 0..2).begin(due, &mut below);
        let probe = begin().expect("one is due");
        assert!(Arc::ptr_eq(probe.endpoint(), &all[0]));
        let others: Vec<InFlight> = (0..20).filter_map(|_| begin()).collect();
        assert_eq!(others.len(), 20);
        assert!(others.iter().all(|it| Arc::ptr_eq(it.endpoint(), &all[1])));
        // It gave up: the next one tries.
        drop(probe);
        let probe = begin().expect("one is due");
        assert!(Arc::ptr_eq(probe.endpoint(), &all[0]));
    }
}
