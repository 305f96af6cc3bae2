//! Samples that parts of the agent give at a scrape, and their way into the registry.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeLabelSet, EncodeMetric, LabelSetEncoder, MetricEncoder, text,
};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

use super::labels::Rendered;

/// A part of the agent that is asked for its numbers at each scrape.
pub trait Source: fmt::Debug + Send + Sync + 'static {
    /// Adds the part's samples.
    fn collect(&self, samples: &mut Samples);
}

/// What a number is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It only grows; `_total` is appended to the name.
    Counter,
    /// It goes up and down.
    Gauge,
    /// Added by [`Samples::histogram`].
    Histogram,
}

/// A histogram as it is now.
#[derive(Clone, Debug, PartialEq)]
pub struct HistogramSample {
    /// Of all values.
    pub sum: f64,
    /// Upper bounds, the last infinite, and how many values are in each bucket alone.
    pub buckets: Vec<(f64, u64)>,
}

/// Samples by metric name.
#[derive(Debug, Default)]
pub struct Samples {
    metrics: BTreeMap<&'static str, Metric>,
    /// The only metrics that are taken in; none: all.
    only: Option<&'static [&'static str]>,
}

#[derive(Debug)]
struct Metric {
    kind: Kind,
    help: &'static str,
    values: Vec<(Rendered, Value)>,
}

#[derive(Debug)]
enum Value {
    Number(f64),
    Histogram(HistogramSample),
}

impl Samples {
    /// Those of some metrics alone.
    pub(super) fn only(names: &'static [&'static str]) -> Self {
        Self {
            metrics: BTreeMap::new(),
            only: Some(names),
        }
    }

    /// Adds one sample. A metric's kind and help are those of its first sample.
    pub fn add(
        &mut self,
        kind: Kind,
        name: &'static str,
        help: &'static str,
        labels: Vec<(&'static str, String)>,
        value: f64,
    ) {
        self.push(kind, name, help, labels, Value::Number(value));
    }

    /// Adds one histogram.
    pub fn histogram(
        &mut self,
        name: &'static str,
        help: &'static str,
        labels: Vec<(&'static str, String)>,
        sample: HistogramSample,
    ) {
        self.push(
            Kind::Histogram,
            name,
            help,
            labels,
            Value::Histogram(sample),
        );
    }

    fn push(
        &mut self,
        kind: Kind,
        name: &'static str,
        help: &'static str,
        labels: Rendered,
        value: Value,
    ) {
        if self.only.is_some_and(|it| !it.contains(&name)) {
            return;
        }
        let metric = self.metrics.entry(name).or_insert_with(|| Metric {
            kind,
            help,
            values: Vec::new(),
        });
        debug_assert_eq!(metric.kind, kind, "{name}");
        metric.values.push((labels, value));
    }

    /// Keeps those of which it is said so. Numbers may be changed: of a histogram they are those of its buckets, each alone, and
    /// then the sum.
    pub(super) fn retain(
        &mut self,
        mut keep: impl FnMut(&'static str, &Rendered, &mut [f64]) -> bool,
    ) {
        let mut numbers = vec![];
        for (name, metric) in &mut self.metrics {
            metric.values.retain_mut(|(labels, value)| {
                numbers.clear();
                value.read_into(&mut numbers);
                let is_kept = keep(name, labels, &mut numbers);
                value.write_from(&numbers);
                is_kept
            });
        }
    }

    /// The same, with room for all metrics.
    pub(super) fn all(self) -> Self {
        Self { only: None, ..self }
    }

    /// As OpenMetrics text.
    pub(super) fn encode(self) -> String {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(Collected(Mutex::new(self))));
        let mut buffer = String::new();
        // Writing to a String cannot fail.
        let _ = text::encode(&mut buffer, &registry);
        buffer
    }

    fn encode_to(self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        for (name, metric) in self.metrics {
            let kind = match metric.kind {
                Kind::Counter => MetricType::Counter,
                Kind::Gauge => MetricType::Gauge,
                Kind::Histogram => MetricType::Histogram,
            };
            let mut family = encoder.encode_descriptor(name, metric.help, None, kind)?;
            for (labels, value) in metric.values {
                let labels = LabelPairs(labels);
                let encoder = if labels.0.is_empty() {
                    family.encode_family(&NO_LABELS)?
                } else {
                    family.encode_family(&labels)?
                };
                match value {
                    Value::Number(value) => encode(metric.kind, value, encoder)?,
                    Value::Histogram(sample) => encode_histogram(&sample, encoder)?,
                }
            }
        }
        Ok(())
    }
}

impl Value {
    fn read_into(&self, numbers: &mut Vec<f64>) {
        match self {
            Self::Number(number) => numbers.push(*number),
            Self::Histogram(sample) => {
                numbers.extend(sample.buckets.iter().map(|(_, count)| *count as f64));
                numbers.push(sample.sum);
            }
        }
    }

    fn write_from(&mut self, numbers: &[f64]) {
        match (self, numbers) {
            (Self::Number(number), [now]) => *number = *now,
            (Self::Histogram(sample), [counts @ .., sum]) => {
                for ((_, count), now) in sample.buckets.iter_mut().zip(counts) {
                    *count = *now as u64;
                }
                sample.sum = *sum;
            }
            _ => {}
        }
    }
}

/// Hands samples to the registry, once.
#[derive(Debug)]
struct Collected(Mutex<Samples>);

impl Collector for Collected {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let mut samples = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut *samples).encode_to(&mut encoder)
    }
}

/// Hands a source's samples to the registry.
#[derive(Debug)]
pub(super) struct SourceCollector(pub(super) Arc<dyn Source>);

impl Collector for SourceCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let mut samples = Samples::default();
        self.0.collect(&mut samples);
        samples.encode_to(&mut encoder)
    }
}

fn encode_histogram(
    sample: &HistogramSample,
    mut encoder: MetricEncoder<'_>,
) -> Result<(), fmt::Error> {
    let count = sample.buckets.iter().map(|(_, count)| count).sum();
    encoder.encode_histogram::<LabelPairs>(sample.sum, count, &sample.buckets, None)
}

fn encode(kind: Kind, value: f64, encoder: MetricEncoder<'_>) -> Result<(), fmt::Error> {
    match kind {
        // Whole numbers are written as such: 7, not 7.0.
        Kind::Counter if value.fract() == 0.0 => ConstCounter::new(value as u64).encode(encoder),
        Kind::Counter => ConstCounter::new(value).encode(encoder),
        Kind::Gauge | Kind::Histogram if value.fract() == 0.0 => {
            ConstGauge::new(value as i64).encode(encoder)
        }
        Kind::Gauge | Kind::Histogram => ConstGauge::new(value).encode(encoder),
    }
}

struct LabelPairs(Rendered);

impl EncodeLabelSet for LabelPairs {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> Result<(), fmt::Error> {
        use prometheus_client::encoding::EncodeLabel;
        for (name, value) in &self.0 {
            (*name, value.as_str()).encode(encoder.encode_label())?;
        }
        Ok(())
    }
}

const NO_LABELS: [(&str, &str); 0] = [];
