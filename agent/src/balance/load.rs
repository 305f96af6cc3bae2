//! What is known of an endpoint's speed, and how much it has to do now.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use weft_core::Weight;

use super::breaker::{Judgement, Standing, Ticket};
use super::health::Guard;

/// An endpoint of a service port, for as long as it backs the port.
#[derive(Debug)]
pub struct EndpointEntry {
    /// The address of the backing workload.
    pub address: IpAddr,
    /// The port of the application there.
    pub port: u16,
    /// What all pods of the node know of it.
    pub load: EndpointLoad,
    /// Keeps it from being chosen while it fails; none: nothing does.
    guard: Option<Box<Guard>>,
}

/// The load of an endpoint: a peak-sensitive moving average of its latency, and what it has not
/// answered yet.
///
/// A sample above the estimate replaces it at once; one below pulls it down by as much as time has
/// passed since the last. Without news the estimate is believed less and less: it goes towards zero
/// where nothing is outstanding, so that an endpoint that was slow is tried again, and towards
/// the 30 ms of an unknown one otherwise, so that one that only takes and never answers is not tried the
/// more.
#[derive(Debug)]
pub struct EndpointLoad {
    /// An [`Estimate`], packed: the two parts must change together.
    estimate: AtomicU64,
    outstanding: AtomicU32,
    weight: AtomicU32,
}

/// An exchange, or a connection, that an endpoint has to do with until this is dropped.
///
/// Dropped without an answer it was given up: that says that the latency is at least the time it
/// took.
#[derive(Debug)]
pub struct InFlight {
    endpoint: Arc<EndpointEntry>,
    /// When it began; none once its latency is recorded.
    began: Option<Instant>,
    /// None: its end was told, or nobody wants to know.
    ticket: Option<Ticket>,
}

/// A latency, and when it was last sampled.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Estimate {
    latency_ms: f32,
    /// Milliseconds since the process's epoch, wrapping.
    sampled: u32,
}

impl EndpointEntry {
    /// An endpoint of which nothing is known yet.
    pub fn new(address: IpAddr, port: u16) -> Arc<Self> {
        Arc::new(Self {
            address,
            port,
            load: EndpointLoad::new(Instant::now()),
            guard: None,
        })
    }

    /// The same, left out while it fails.
    pub fn guarded(address: IpAddr, port: u16, guard: Guard) -> Arc<Self> {
        Arc::new(Self {
            address,
            port,
            load: EndpointLoad::new(Instant::now()),
            guard: Some(Box::new(guard)),
        })
    }

    /// What keeps it from being chosen, if anything does.
    pub fn guard(&self) -> Option<&Guard> {
        self.guard.as_deref()
    }

    /// Whether it may be chosen.
    pub fn standing(&self, now: Instant) -> Standing {
        let guard = self.guard.as_ref();
        guard.map_or(Standing::Ready, |it| it.standing(now))
    }

    /// Where to connect to.
    pub fn to(&self) -> SocketAddr {
        SocketAddr::new(self.address, self.port)
    }

    /// Begins an exchange, or a connection, at this endpoint. None: it may not be chosen any more.
    pub fn begin(self: &Arc<Self>, now: Instant) -> Option<InFlight> {
        let ticket = match &self.guard {
            Some(guard) => Some(guard.begin(now)?),
            None => None,
        };
        self.load.begin();
        Some(InFlight {
            endpoint: Arc::clone(self),
            began: Some(Instant::now()),
            ticket,
        })
    }
}

impl EndpointLoad {
    /// Nothing is known; the weight is an ordinary one.
    pub fn new(now: Instant) -> Self {
        let estimate = Estimate {
            latency_ms: milliseconds(DEFAULT_LATENCY),
            sampled: stamp(now),
        };
        Self {
            estimate: AtomicU64::new(estimate.pack()),
            outstanding: AtomicU32::new(0),
            weight: AtomicU32::new(Weight::default().percent().into()),
        }
    }

    /// What one more exchange is expected to wait here: the latency, once for itself and for each exchange that is
    /// outstanding, of which one that is stronger has several at once.
    pub fn cost(&self, now: Instant) -> f32 {
        let outstanding = self.outstanding();
        let latency = self.load_estimate().at(stamp(now), outstanding);
        latency * (outstanding as f32 * ORDINARY_WEIGHT / self.weight() as f32 + 1.0)
    }

    /// The latency expected now.
    pub fn latency(&self, now: Instant) -> Duration {
        let latency = self.load_estimate().at(stamp(now), self.outstanding());
        Duration::from_secs_f32(latency / 1000.0)
    }

    /// Exchanges and connections that are not over.
    pub fn outstanding(&self) -> u32 {
        self.outstanding.load(Ordering::Relaxed)
    }

    /// How much of the traffic it is meant to take, in percent of what an ordinary one takes; above 0.
    pub fn weight(&self) -> u32 {
        self.weight.load(Ordering::Relaxed)
    }

    /// Changes the weight.
    pub fn set_weight(&self, weight: Weight) {
        let percent = u32::from(weight.percent());
        // Nearly always the same: all CPUs read it, so none should write it.
        if self.weight() != percent {
            self.weight.store(percent, Ordering::Relaxed);
        }
    }

    fn begin(&self) {
        self.outstanding.fetch_add(1, Ordering::Relaxed);
    }

    fn end(&self) {
        self.outstanding.fetch_sub(1, Ordering::Relaxed);
    }

    fn record(&self, latency: Duration, now: Instant) {
        let (latency_ms, now) = (milliseconds(latency), stamp(now));
        let next = |packed| Some(Estimate::unpack(packed).sample(latency_ms, now).pack());
        // Cannot fail: there is always a next.
        let _ = self
            .estimate
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, next);
    }

    /// It takes at least so long: news only if that is more than what is expected.
    fn record_at_least(&self, latency: Duration, now: Instant) {
        let expected = self.load_estimate().at(stamp(now), self.outstanding());
        if milliseconds(latency) > expected {
            self.record(latency, now);
        }
    }

    fn load_estimate(&self) -> Estimate {
        Estimate::unpack(self.estimate.load(Ordering::Relaxed))
    }
}

impl InFlight {
    /// The endpoint.
    pub fn endpoint(&self) -> &Arc<EndpointEntry> {
        &self.endpoint
    }

    /// The endpoint has answered: its latency is known. It has to do with the exchange all the same
    /// until that ends.
    pub fn first_byte(&mut self) {
        if let Some(began) = self.began.take() {
            let now = Instant::now();
            let latency = now.saturating_duration_since(began);
            self.endpoint.load.record(latency, now);
        }
    }

    /// How it ended, as far as the endpoint had a part in it; `retry_after` is for how long it asked to be left
    /// alone.
    pub fn judge(&mut self, judgement: Judgement, retry_after: Option<Duration>) {
        if let Some(ticket) = self.ticket.take()
            && let Some(guard) = &self.endpoint.guard
        {
            guard.end(ticket, judgement, retry_after, self.endpoint.address);
        }
    }

    /// The endpoint could not be reached. That may be known very fast, so it counts as slow:
    /// otherwise a dead endpoint would look like the best.
    pub fn failed(mut self) {
        self.judge(Judgement::Failure, None);
        if let Some(began) = self.began.take() {
            let now = Instant::now();
            let latency = now.saturating_duration_since(began).max(FAILED_LATENCY);
            self.endpoint.load.record(latency, now);
        }
    }

    /// It ended for a reason that says nothing of the endpoint.
    pub fn forget(mut self) {
        self.began = None;
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.judge(Judgement::Unknown, None);
        let load = &self.endpoint.load;
        if let Some(began) = self.began {
            let now = Instant::now();
            load.record_at_least(now.saturating_duration_since(began), now);
        }
        load.end();
    }
}

impl Estimate {
    /// With one more sample.
    fn sample(self, latency_ms: f32, now: u32) -> Self {
        // Samples may come a little out of order.
        let sampled = if is_later(now, self.sampled) {
            now
        } else {
            self.sampled
        };
        let latency_ms = if latency_ms >= self.latency_ms {
            latency_ms
        } else {
            self.blend(latency_ms, now)
        };
        Self {
            latency_ms,
            sampled,
        }
    }

    /// As far as it can be believed now, in milliseconds.
    fn at(self, now: u32, outstanding: u32) -> f32 {
        let towards = match outstanding {
            0 => 0.0,
            _ => milliseconds(DEFAULT_LATENCY),
        };
        self.blend(towards, now)
    }

    fn blend(self, towards_ms: f32, now: u32) -> f32 {
        let age = if is_later(now, self.sampled) {
            now.wrapping_sub(self.sampled)
        } else {
            0
        };
        let kept = (-(age as f32) / milliseconds(DECAY)).exp();
        self.latency_ms * kept + towards_ms * (1.0 - kept)
    }

    fn pack(self) -> u64 {
        u64::from(self.latency_ms.to_bits()) << 32 | u64::from(self.sampled)
    }

    fn unpack(packed: u64) -> Self {
        Self {
            latency_ms: f32::from_bits((packed >> 32) as u32),
            sampled: packed as u32,
        }
    }
}

/// Of two wrapping stamps less than 24 days apart. What nobody used for longer than that is believed
/// to be as it was, until the next sample.
fn is_later(now: u32, than: u32) -> bool {
    now.wrapping_sub(than) <= u32::MAX / 2
}

fn stamp(now: Instant) -> u32 {
    now.saturating_duration_since(*EPOCH).as_millis() as u32
}

fn milliseconds(duration: Duration) -> f32 {
    duration.as_secs_f32() * 1000.0
}

/// In percent.
const ORDINARY_WEIGHT: f32 = 100.0;

static EPOCH: LazyLock<Instant> = LazyLock::new(Instant::now);

/// What an endpoint is expected to take as long as nothing is known.
pub(super) const DEFAULT_LATENCY: Duration = Duration::from_millis(30);
/// In this time without news the estimate goes two thirds of its way.
const DECAY: Duration = Duration::from_secs(10);
/// What a failed attempt counts for, at least.
const FAILED_LATENCY: Duration = Duration::from_secs(1);

#[cfg(test)]
impl EndpointLoad {
    /// For simulations with a clock of their own.
    pub(super) fn simulate_begin(&self) {
        self.begin();
    }

    pub(super) fn simulate_answer(&self, latency: Duration, now: Instant) {
        self.record(latency, now);
        self.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(number: u64) -> Duration {
        Duration::from_millis(number)
    }

    fn close(load: &EndpointLoad, now: Instant, expected_ms: f32) {
        let found = load.latency(now).as_secs_f32() * 1000.0;
        let off = (found - expected_ms).abs();
        assert!(off < 0.02 * expected_ms.max(0.1), "{found} ms");
    }

    #[test]
    fn a_peak_is_taken_at_once_and_decays_with_time() {
        let t0 = Instant::now();
        let load = EndpointLoad::new(t0);
        close(&load, t0, 30.0);
        // After, latency, the estimate right after that.
        for (after, sample, expected) in [
            (ms(0), ms(100), 100.0),
            (ms(0), ms(1), 100.0),
            // 100 / e + 10 * (1 - 1 / e).
            (ms(10_000), ms(10), 43.1),
            // 43.1 / sqrt(e) + 10 * (1 - 1 / sqrt(e)).
            (ms(15_000), ms(10), 30.1),
            (ms(15_001), ms(31), 31.0),
            (ms(200_000), ms(4), 4.0),
        ] {
            load.record(sample, t0 + after);
            close(&load, t0 + after, expected);
        }
    }

    #[test]
    fn without_news_an_idle_endpoint_is_believed_to_be_fast_and_a_busy_one_to_be_average() {
        let t0 = Instant::now();
        for (sample, outstanding, after, expected) in [
            (ms(1000), 0, ms(10_000), 367.9),
            (ms(1000), 0, ms(100_000), 0.045),
            (ms(1000), 1, ms(10_000), 386.8),
            (ms(1000), 3, ms(120_000), 30.0),
            (ms(31), 1, ms(0), 31.0),
        ] {
            let load = EndpointLoad::new(t0);
            load.record(sample, t0);
            load.outstanding.store(outstanding, Ordering::Relaxed);
            close(&load, t0 + after, expected);
        }
    }

    #[test]
    fn cost_counts_what_is_outstanding_and_the_weight() {
        let t0 = Instant::now();
        let load = EndpointLoad::new(t0);
        load.record(ms(40), t0);
        assert_eq!(load.cost(t0), 40.0);
        load.begin();
        load.begin();
        assert_eq!(load.cost(t0), 120.0);
        load.set_weight(Weight::new(200).expect("valid"));
        assert_eq!(load.cost(t0), 80.0);
        load.set_weight(Weight::new(50).expect("valid"));
        assert_eq!(load.cost(t0), 200.0);
        load.end();
        assert_eq!(load.outstanding(), 1);
    }

    #[test]
    fn samples_out_of_order_and_wrapped_stamps_do_no_harm() {
        let estimate = Estimate {
            latency_ms: 50.0,
            sampled: 1000,
        };
        assert_eq!(estimate.sample(10.0, 900), estimate);
        let wrapped = Estimate {
            latency_ms: 50.0,
            sampled: u32::MAX - 4_999,
        };
        let after = wrapped.sample(10.0, 5_000);
        assert_eq!(after.sampled, 5_000);
        assert!((after.latency_ms - 24.7).abs() < 0.1, "{after:?}");
        assert_eq!(Estimate::unpack(after.pack()), after);
    }

    #[test]
    fn what_is_given_up_counts_only_if_it_took_longer_than_expected() {
        let t0 = Instant::now();
        let load = EndpointLoad::new(t0);
        load.record(ms(100), t0);
        load.record_at_least(ms(90), t0);
        close(&load, t0, 100.0);
        load.record_at_least(ms(250), t0);
        close(&load, t0, 250.0);
    }

    #[test]
    fn a_guard_records_one_latency_and_counts_as_outstanding_until_dropped() {
        let endpoint = EndpointEntry::new(IpAddr::from([10, 0, 0, 1]), 80);
        endpoint
            .load
            .record(Duration::from_micros(1), Instant::now());
        let begin = || endpoint.begin(Instant::now()).expect("nothing guards it");
        let mut answered = begin();
        let given_up = begin();
        assert_eq!(endpoint.load.outstanding(), 2);
        answered.first_byte();
        let known = endpoint.load.load_estimate();
        answered.first_byte();
        assert_eq!(endpoint.load.load_estimate(), known);
        assert_eq!(endpoint.load.outstanding(), 2);
        drop(answered);
        drop(given_up);
        assert_eq!(endpoint.load.outstanding(), 0);
        let known = endpoint.load.load_estimate();
        begin().forget();
        assert_eq!(endpoint.load.load_estimate(), known);
        begin().failed();
        assert_eq!(endpoint.load.outstanding(), 0);
        assert!(endpoint.load.latency(Instant::now()) > ms(900));
    }

    #[test]
    fn it_is_small() {
        assert_eq!(size_of::<EndpointLoad>(), 16);
        assert!(size_of::<EndpointEntry>() <= 48);
        assert!(size_of::<InFlight>() <= 32);
    }
}
