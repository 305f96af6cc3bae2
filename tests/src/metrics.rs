//! Prometheus text, read and searched by name and some of its labels.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::cluster::Node;
use crate::wait::wait_for;

/// One scrape.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    samples: Vec<Sample>,
}

/// One line of a scrape.
#[derive(Clone, Debug)]
pub struct Sample {
    /// The metric's name.
    pub name: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its value.
    pub value: f64,
}

impl Metrics {
    /// Reads the text format of Prometheus and OpenMetrics.
    pub fn parse(text: &str) -> Result<Metrics> {
        let lines = text
            .lines()
            .filter(|line| !line.is_empty() && !line.starts_with('#'));
        let samples = lines
            .map(|line| parse_sample(line).with_context(|| format!("reading the metric {line}")))
            .collect::<Result<_>>()?;
        Ok(Metrics { samples })
    }

    /// The samples with this name and at least these labels.
    pub fn find<'a>(
        &'a self,
        name: &'a str,
        labels: &'a [(&str, &str)],
    ) -> impl Iterator<Item = &'a Sample> {
        self.samples
            .iter()
            .filter(move |sample| sample.name == name && sample.has(labels))
    }

    /// The sum over all samples with this name and at least these labels; 0 without any.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.find(name, labels).map(|sample| sample.value).sum()
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.samples.len()
    }

    /// Whether any sample has this label value, under any name.
    pub fn mentions(&self, label: &str, value: &str) -> bool {
        self.samples
            .iter()
            .any(|sample| sample.has(&[(label, value)]))
    }

    /// All samples.
    pub fn samples(&self) -> &[Sample] {
        &self.samples
    }

    /// The lines whose name contains this text, for messages.
    pub fn show(&self, name_part: &str) -> String {
        let shown = self
            .samples
            .iter()
            .filter(|sample| sample.name.contains(name_part));
        shown.map(|sample| format!("{sample:?}\n")).collect()
    }
}

impl Sample {
    fn has(&self, labels: &[(&str, &str)]) -> bool {
        labels
            .iter()
            .all(|(label, value)| self.labels.get(*label).is_some_and(|found| found == value))
    }
}

/// Scrapes a node until the sum is at least `least`, and gives it.
pub fn wait_for_metric(
    node: &Node,
    name: &str,
    labels: &[(&str, &str)],
    least: f64,
) -> Result<f64> {
    let what = format!("{name}{labels:?} of {} to reach {least}", node.name());
    wait_for(&what, Duration::from_secs(5), || {
        let metrics = node.metrics()?;
        let sum = metrics.sum(name, labels);
        if sum < least {
            bail!("it is {sum}; there are\n{}", metrics.show(name));
        }
        Ok(Some(sum))
    })
}

fn parse_sample(line: &str) -> Result<Sample> {
    let (name, labels, value) = match line.split_once('{') {
        Some((name, rest)) => {
            let (labels, rest) = parse_labels(rest)?;
            (name, labels, rest)
        }
        None => {
            let (name, rest) = line.split_once(' ').context("no value")?;
            (name, BTreeMap::new(), rest)
        }
    };
    let value = value
        .split_whitespace()
        .next()
        .context("no value")?
        .parse()?;
    Ok(Sample {
        name: name.to_owned(),
        labels,
        value,
    })
}

/// Everything after the brace: the labels, and what follows the closing brace.
fn parse_labels(mut rest: &str) -> Result<(BTreeMap<String, String>, &str)> {
    let mut labels = BTreeMap::new();
    loop {
        rest = rest.trim_start_matches([',', ' ']);
        if let Some(end) = rest.strip_prefix('}') {
            return Ok((labels, end));
        }
        let (label, value) = rest.split_once("=\"").context("a label without a value")?;
        let (value, after) = unquote(value)?;
        labels.insert(label.to_owned(), value);
        rest = after;
    }
}

fn unquote(text: &str) -> Result<(String, &str)> {
    let mut value = String::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Ok((value, &text[at + 1..])),
            '\\' => match chars.next() {
                Some((_, 'n')) => value.push('\n'),
                Some((_, other)) => value.push(other),
                None => bail!("an escape at the end"),
            },
            other => value.push(other),
        }
    }
    bail!("a quote that does not end")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_labels_and_sums() {
        let text =
            "# TYPE a counter\na_total{x=\"1\",y=\"q\\\"}\"} 2\na_total{x=\"2\"} 3.5\nb 7\n# EOF\n";
        let metrics = Metrics::parse(text).expect("parses");
        assert_eq!(metrics.sum("a_total", &[]), 5.5);
        assert_eq!(metrics.sum("a_total", &[("x", "1"), ("y", "q\"}")]), 2.0);
        assert_eq!(metrics.sum("b", &[]), 7.0);
        assert!(metrics.mentions("x", "2") && !metrics.mentions("x", "3"));
    }
}
