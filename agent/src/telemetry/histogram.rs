//! Histograms of durations that many record and nobody locks.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::samples::HistogramSample;

/// Upper bounds of buckets, and the unit that they and the sum are in.
#[derive(Debug)]
pub(super) struct Bounds {
    per_second: f64,
    upper: &'static [f64],
}

/// Durations, by bucket.
#[derive(Debug)]
pub(super) struct Histogram {
    bounds: &'static Bounds,
    /// One more than there are bounds: the last is for what is above all of them.
    buckets: Box<[AtomicU64]>,
    sum_ns: AtomicU64,
}

impl Histogram {
    pub(super) fn new(bounds: &'static Bounds) -> Self {
        Self {
            bounds,
            buckets: (0..=bounds.upper.len())
                .map(|_| AtomicU64::new(0))
                .collect(),
            sum_ns: AtomicU64::new(0),
        }
    }

    pub(super) fn record(&self, duration: Duration) {
        let value = duration.as_secs_f64() * self.bounds.per_second;
        // A bucket holds what is equal to its bound too.
        let bucket = self.bounds.upper.partition_point(|upper| *upper < value);
        self.buckets[bucket].fetch_add(1, Ordering::Relaxed);
        let nanoseconds = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        self.sum_ns.fetch_add(nanoseconds, Ordering::Relaxed);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.buckets
            .iter()
            .all(|it| it.load(Ordering::Relaxed) == 0)
    }

    pub(super) fn sample(&self) -> HistogramSample {
        let upper = self.bounds.upper.iter().copied();
        let upper = upper.chain([f64::INFINITY]);
        let counts = self.buckets.iter().map(|it| it.load(Ordering::Relaxed));
        let seconds = Duration::from_nanos(self.sum_ns.load(Ordering::Relaxed)).as_secs_f64();
        HistogramSample {
            sum: seconds * self.bounds.per_second,
            buckets: upper.zip(counts).collect(),
        }
    }
}

/// Linkerd's bounds of `response_latency_ms`.
pub(super) static LATENCY_MS: Bounds = Bounds {
    per_second: 1000.0,
    upper: &[
        1.0, 2.0, 3.0, 4.0, 5.0, 10.0, 20.0, 30.0, 40.0, 50.0, 100.0, 200.0, 300.0, 400.0, 500.0,
        1_000.0, 2_000.0, 3_000.0, 4_000.0, 5_000.0, 10_000.0, 20_000.0, 30_000.0, 40_000.0,
        50_000.0,
    ],
};

/// Linkerd's bounds of what a route's requests take.
pub(super) static ROUTE_SECONDS: Bounds = Bounds {
    per_second: 1.0,
    upper: &[0.05, 0.5, 1.0, 10.0],
};

/// Linkerd's bounds of what the responses of a route's backends take.
pub(super) static BACKEND_SECONDS: Bounds = Bounds {
    per_second: 1.0,
    upper: &[0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 10.0],
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_fall_into_the_bucket_whose_bound_they_do_not_exceed() {
        let histogram = Histogram::new(&ROUTE_SECONDS);
        assert!(histogram.is_empty());
        for ms in [0, 50, 51, 500, 1_000, 10_000, 10_001, 86_400_000] {
            histogram.record(Duration::from_millis(ms));
        }
        assert!(!histogram.is_empty());
        let sample = histogram.sample();
        let counts = [(0.05, 2), (0.5, 2), (1.0, 1), (10.0, 1), (f64::INFINITY, 2)];
        assert_eq!(sample.buckets, counts);
        assert!((sample.sum - 86_421.602).abs() < 1e-6, "{}", sample.sum);
    }

    #[test]
    fn bounds_ascend() {
        for bounds in [&LATENCY_MS, &ROUTE_SECONDS, &BACKEND_SECONDS] {
            assert!(bounds.upper.is_sorted(), "{bounds:?}");
        }
        assert_eq!(LATENCY_MS.upper.len(), 25);
    }
}
