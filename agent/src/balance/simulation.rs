//! The balancer in a simulated world: clients that send at a fixed rate, endpoints that answer after
//! as long as they take, a clock that only this moves.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::net::IpAddr;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use weft_core::Weight;

use super::{EndpointEntry, Tries};

struct World {
    endpoints: Arc<Vec<Arc<EndpointEntry>>>,
    /// What each takes for an exchange, in microseconds.
    takes_us: Vec<u64>,
    heaviest: Option<NonZeroU32>,
    random: SmallRng,
    epoch: Instant,
    now_us: u64,
    /// When an endpoint will answer, which one, and how long that took.
    answers: BinaryHeap<Reverse<(u64, usize, u64)>>,
}

impl World {
    fn new(takes_ms: &[u64]) -> Self {
        let endpoint = |number| EndpointEntry::new(IpAddr::from([10, 0, 0, number as u8]), 80);
        Self {
            endpoints: Arc::new((0..takes_ms.len()).map(endpoint).collect()),
            takes_us: takes_ms.iter().map(|it| it * 1000).collect(),
            heaviest: None,
            random: SmallRng::seed_from_u64(42),
            epoch: Instant::now(),
            now_us: 0,
            answers: BinaryHeap::new(),
        }
    }

    fn weigh(&mut self, weights: &[u16]) {
        for (endpoint, percent) in self.endpoints.iter().zip(weights) {
            let weight = Weight::new(*percent).expect("valid");
            endpoint.load.set_weight(weight);
        }
        let heaviest = weights.iter().copied().max().unwrap_or(0);
        self.heaviest = NonZeroU32::new(heaviest.into());
    }

    /// Sends so many exchanges per second for so long; returns the share that each endpoint got.
    fn run(&mut self, per_second: u64, seconds: u64) -> Vec<f64> {
        let mut counts = vec![0_u64; self.endpoints.len()];
        let total = per_second * seconds;
        for _ in 0..total {
            self.now_us += 1_000_000 / per_second;
            self.answer();
            let tries = Tries::new(Arc::clone(&self.endpoints), 0..counts.len());
            let mut tries = tries.weighted(self.heaviest);
            let random = &mut self.random;
            let now = self.epoch + Duration::from_micros(self.now_us);
            let chosen = tries.next(now, |limit| random.random_range(0..limit));
            let chosen = chosen.expect("there are endpoints");
            let place = self.endpoints.iter().position(|it| Arc::ptr_eq(it, chosen));
            let place = place.expect("one of them");
            chosen.load.simulate_begin();
            counts[place] += 1;
            // Within a fifth of what it takes.
            let takes = self.takes_us[place];
            let takes = self.random.random_range(takes * 9 / 10..=takes * 11 / 10);
            self.answers
                .push(Reverse((self.now_us + takes, place, takes)));
        }
        let share = |count| count as f64 / total as f64;
        counts.into_iter().map(share).collect()
    }

    fn answer(&mut self) {
        while let Some(Reverse((when, place, took))) = self.answers.peek().copied()
            && when <= self.now_us
        {
            self.answers.pop();
            let at = self.epoch + Duration::from_micros(when);
            let took = Duration::from_micros(took);
            self.endpoints[place].load.simulate_answer(took, at);
        }
    }
}

#[test]
fn equals_share_equally() {
    let mut world = World::new(&[5; 4]);
    world.run(500, 10);
    for share in world.run(500, 60) {
        assert!((0.22..0.28).contains(&share), "{share}");
    }
}

#[test]
fn a_slow_endpoint_loses_its_share_and_regains_it() {
    let mut world = World::new(&[5; 3]);
    world.run(300, 20);
    world.takes_us[1] = 500_000;
    world.run(300, 2);
    let slow = world.run(300, 60)[1];
    assert!(slow < 0.02, "{slow}");
    world.takes_us[1] = 5_000;
    world.run(300, 90);
    let regained = world.run(300, 30)[1];
    assert!((0.25..0.42).contains(&regained), "{regained}");
}

#[test]
fn an_endpoint_that_never_answers_is_left_with_few_exchanges() {
    let mut world = World::new(&[5; 3]);
    world.run(300, 20);
    world.takes_us[2] = 3_600_000_000;
    let stuck = world.run(300, 60)[2];
    assert!(stuck < 0.01, "{stuck}");
}

#[test]
fn a_new_endpoint_gets_its_share_without_a_rush() {
    let mut world = World::new(&[20; 4]);
    world.run(400, 30);
    let mut endpoints = world.endpoints.to_vec();
    // Older than this moment by as long as the world has run: nothing is left of its first estimate.
    endpoints[3] = EndpointEntry::new(endpoints[3].address, 80);
    world.endpoints = Arc::new(endpoints);
    world.answers.clear();
    for endpoint in world.endpoints.iter().take(3) {
        while endpoint.load.outstanding() > 0 {
            let now = world.epoch + Duration::from_micros(world.now_us);
            endpoint
                .load
                .simulate_answer(Duration::from_millis(20), now);
        }
    }
    let first_second = world.run(400, 1)[3];
    assert!((0.1..0.45).contains(&first_second), "{first_second}");
    let later = world.run(400, 30)[3];
    assert!((0.2..0.3).contains(&later), "{later}");
}

#[test]
fn weights_divide_the_load_of_connections_that_stay() {
    let mut world = World::new(&[600_000; 2]);
    world.weigh(&[300, 100]);
    let shares = world.run(20, 100);
    assert!((0.72..0.78).contains(&shares[0]), "{shares:?}");
}

/// Ten endpoints, equally fast: the shares are those of the weights while they have something to do. With little to do the
/// one that had nothing for longest looks fastest, so that the shares are closer to each other.
#[test]
fn weights_divide_exchanges() {
    let weights = [1000, 100, 100, 100, 100, 50, 50, 50, 50, 50];
    let sum: u16 = weights.iter().sum();
    for (per_second, tolerance) in [(4000, 0.15), (20_000, 0.1)] {
        let mut world = World::new(&[50; 10]);
        world.weigh(&weights);
        world.run(per_second, 5);
        let shares = world.run(per_second, 20);
        for (share, weight) in shares.iter().zip(weights) {
            let expected = f64::from(weight) / f64::from(sum);
            let off = (share / expected - 1.0).abs();
            assert!(off < tolerance, "{per_second} per second: {shares:?}");
        }
    }
    let mut world = World::new(&[5; 10]);
    world.weigh(&weights);
    let shares = world.run(20, 200);
    // Measured: 0.19, 0.11 to 0.12, 0.06 to 0.07.
    assert!(shares[0] > 1.4 * shares[1], "{shares:?}");
    assert!(shares[1] > 1.4 * shares[9], "{shares:?}");
}
