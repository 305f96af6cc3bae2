//! Reads the text format of Prometheus and OpenMetrics, as far as agents write it.
//!
//! What agents say comes from other machines: a line that cannot be read is left out and counted, and nothing is
//! believed about sizes but what is there.

use std::collections::BTreeMap;

/// One series: a name and its labels.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Series {
    /// The name, with its suffix (`_total`, `_bucket`).
    pub name: String,
    /// The labels.
    pub labels: BTreeMap<String, String>,
}

/// One scrape.
#[derive(Clone, Debug, Default)]
pub struct Scrape {
    /// Values of series.
    pub values: BTreeMap<Series, f64>,
    /// Lines that could not be read.
    pub unread: usize,
}

/// An agent has far fewer of those that are wanted.
const MAX_SERIES: usize = 100_000;

impl Series {
    /// A label's value.
    pub fn label(&self, name: &str) -> Option<&str> {
        self.labels.get(name).map(String::as_str)
    }

    /// Whether a label has this value.
    pub fn is(&self, label: &str, value: &str) -> bool {
        self.label(label) == Some(value)
    }
}

impl Scrape {
    /// Reads the series whose names are wanted.
    pub fn read(text: &str, wanted: impl Fn(&str) -> bool) -> Self {
        let mut scrape = Self::default();
        let lines = text.lines().map(str::trim);
        for line in lines.filter(|it| !it.is_empty() && !it.starts_with('#')) {
            let end = line.find(['{', ' ']).unwrap_or(line.len());
            let (name, rest) = line.split_at(end);
            if !wanted(name) {
                continue;
            }
            match sample(name, rest) {
                Some(_) if scrape.values.len() >= MAX_SERIES => scrape.unread += 1,
                Some((series, value)) => {
                    scrape.values.insert(series, value);
                }
                None => scrape.unread += 1,
            }
        }
        scrape
    }

    /// Series of a name, with their values.
    pub fn of<'a>(&'a self, name: &'a str) -> impl Iterator<Item = (&'a Series, f64)> {
        let from = Series {
            name: name.to_owned(),
            labels: BTreeMap::new(),
        };
        let from = self.values.range(from..);
        let named = from.take_while(move |(series, _)| series.name == name);
        named.map(|(series, value)| (series, *value))
    }
}

/// What follows a name: labels in braces, a value, perhaps a time or an exemplar.
fn sample(name: &str, rest: &str) -> Option<(Series, f64)> {
    let (labels, rest) = match rest.strip_prefix('{') {
        Some(rest) => labels(rest)?,
        None => (BTreeMap::new(), rest),
    };
    let value = rest.split_ascii_whitespace().next()?;
    let value: f64 = match value {
        "+Inf" => f64::INFINITY,
        "-Inf" => f64::NEG_INFINITY,
        value => value.parse().ok()?,
    };
    let name = name.to_owned();
    Some((Series { name, labels }, value))
}

/// Labels up to the closing brace, and what follows it.
fn labels(mut rest: &str) -> Option<(BTreeMap<String, String>, &str)> {
    let mut labels = BTreeMap::new();
    loop {
        rest = rest.trim_start_matches([',', ' ']);
        if let Some(rest) = rest.strip_prefix('}') {
            return Some((labels, rest));
        }
        let (name, after) = rest.split_once("=\"")?;
        let (value, after) = quoted(after)?;
        labels.insert(name.trim().to_owned(), value);
        rest = after;
    }
}

/// A text up to its closing quote, and what follows that.
fn quoted(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut letters = text.char_indices();
    while let Some((at, letter)) = letters.next() {
        match letter {
            '"' => return Some((value, &text[at + 1..])),
            '\\' => match letters.next()?.1 {
                'n' => value.push('\n'),
                other => value.push(other),
            },
            letter => value.push(letter),
        }
    }
    None
}

/// The value below which a part of what a histogram counted lies: `buckets` are the upper ends and how many are at or
/// below each. As `histogram_quantile` of Prometheus does, it takes what is in a bucket as spread evenly. None: nothing
/// was counted.
pub fn quantile(part: f64, buckets: &[(f64, f64)]) -> Option<f64> {
    let mut buckets = buckets.to_vec();
    buckets.retain(|(end, count)| !end.is_nan() && count.is_finite());
    buckets.sort_by(|one, other| one.0.total_cmp(&other.0));
    let all = buckets.last()?.1;
    if all <= 0.0 {
        return None;
    }
    let rank = part * all;
    let (mut start, mut below) = (0.0, 0.0);
    for (end, count) in buckets {
        if count >= rank {
            return Some(match (end.is_finite(), count > below) {
                (true, true) => start + (end - start) * (rank - below) / (count - below),
                (true, false) => end,
                // Above the last end that there is, nothing is known.
                (false, _) => start,
            });
        }
        (start, below) = (end, count);
    }
    Some(start)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn series_are_read_with_their_labels() {
        let text = concat!(
            "# TYPE a counter\n",
            "a_total{pod=\"x\",of=\"q\\\"u\\\\o\\nte\"} 3.0\n",
            "a_total{} 4 1700000000\n",
            "b 7 # {trace=\"1\"} 2\n",
            "c{le=\"+Inf\"} +Inf\n",
            "broken{a=\"x 1\n",
            "unwanted 1\n",
            "# EOF\n",
        );
        let scrape = Scrape::read(text, |it| it != "unwanted");
        let values: Vec<_> = scrape.values.iter().collect();
        assert_eq!((values.len(), scrape.unread), (4, 1));
        let all: Vec<f64> = scrape.of("a_total").map(|(_, value)| value).collect();
        assert_eq!(all, [4.0, 3.0]);
        let (labelled, _) = scrape.of("a_total").nth(1).expect("two");
        assert!(labelled.is("pod", "x") && labelled.is("of", "q\"u\\o\nte"));
        assert_eq!(scrape.of("c").next().expect("one").1, f64::INFINITY);
        assert_eq!(scrape.of("b").count(), 1);
    }

    #[test]
    fn quantiles_are_those_of_prometheus() {
        let buckets = [(10.0, 50.0), (20.0, 90.0), (f64::INFINITY, 100.0)];
        assert_eq!(quantile(0.5, &buckets), Some(10.0));
        assert_eq!(quantile(0.25, &buckets), Some(5.0));
        assert_eq!(quantile(0.7, &buckets), Some(15.0));
        assert_eq!(quantile(0.99, &buckets), Some(20.0));
        assert_eq!(quantile(0.5, &[]), None);
        assert_eq!(quantile(0.5, &[(1.0, 0.0), (f64::INFINITY, 0.0)]), None);
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_counted(text in "([a-z_]{1,4}(\\{[a-z=\"\\\\,]{0,12}\\}?)? [0-9a-zA-Z.+-]{0,4}\n?){0,6}") {
            let scrape = Scrape::read(&text, |_| true);
            prop_assert!(scrape.values.len() + scrape.unread <= text.lines().count());
        }

        #[test]
        fn what_is_written_is_read(value in "[^\r]{0,20}") {
            let escaped = value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
            // Other ends of lines are none of the format.
            prop_assume!(!escaped.contains(['\u{b}', '\u{c}', '\u{85}', '\u{2028}', '\u{2029}']));
            let scrape = Scrape::read(&format!("a{{x=\"{escaped}\"}} 1"), |_| true);
            let (series, _) = scrape.of("a").next().expect("one");
            prop_assert_eq!(series.label("x"), Some(value.as_str()));
        }
    }
}
