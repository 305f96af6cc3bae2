//! Samples that parts of the agent give at a scrape, and their way into the registry.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeLabelSet, EncodeMetric, LabelSetEncoder, MetricEncoder,
};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

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
pub struct Samples(BTreeMap<&'static str, Metric>);

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
        let metric = self.0.entry(name).or_insert_with(|| Metric {
            kind,
            help,
            values: Vec::new(),
        });
        debug_assert_eq!(metric.kind, kind, "{name}");
        metric.values.push((labels, value));
    }
}

/// Hands a source's samples to the registry.
#[derive(Debug)]
pub(super) struct SourceCollector(pub(super) Arc<dyn Source>);

impl Collector for SourceCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let mut samples = Samples::default();
        self.0.collect(&mut samples);
        for (name, metric) in samples.0 {
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
