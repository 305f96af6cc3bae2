//! How long responses take, as histograms of metrics tell it.

use std::collections::BTreeMap;

use super::Latencies;
use crate::metrics::{Series, quantile};

/// Counts by the upper end of their bucket, as bits: a number that is none orders, too.
#[derive(Debug, Default)]
pub(super) struct Buckets(BTreeMap<u64, f64>);

impl Buckets {
    /// Adds to the bucket that a series is of.
    pub(super) fn add(&mut self, series: &Series, by: f64) {
        let end = match series.label("le") {
            Some("+Inf") => Some(f64::INFINITY),
            Some(end) => end.parse().ok(),
            None => None,
        };
        if let Some(end) = end {
            *self.0.entry(f64::to_bits(end)).or_default() += by;
        }
    }

    /// As they are shown; the ends are in units of so many milliseconds.
    pub(super) fn latencies(&self, unit_ms: f64) -> Latencies {
        let buckets = self.0.iter();
        let buckets = buckets.map(|(end, count)| (f64::from_bits(*end), *count));
        let buckets: Vec<(f64, f64)> = buckets.collect();
        let ms = |part: f64| quantile(part, &buckets).map(|end| end * unit_ms);
        Latencies {
            p50: ms(0.5),
            p95: ms(0.95),
            p99: ms(0.99),
        }
    }
}
