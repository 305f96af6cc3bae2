//! What happened in a time up to now.

use serde::Serialize;

use super::{Known, View};
use crate::metrics::{Scrape, Series};

/// What an agent says of a time up to now.
#[derive(Clone, Debug, Default)]
pub struct Recent {
    /// By how much its metrics grew.
    grown: Scrape,
    /// How much time that is.
    covered_seconds: f64,
    /// Series of which it does not know.
    series_left_out: u64,
}

/// What happened in a time up to now.
#[derive(Clone, Debug, Default)]
pub struct Change {
    /// How much each series of a counter grew, in all agents.
    pub counters: Vec<Grown>,
    /// How long it took.
    pub seconds: f64,
    /// Agents that know a part of it only.
    pub partial: Vec<Partial>,
}

/// A series that may have grown.
#[derive(Clone, Debug)]
pub struct Grown {
    /// The series.
    pub series: Series,
    /// By how much.
    pub by: f64,
}

/// An agent that knows a part only of what happened.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Partial {
    /// Its node.
    pub node: String,
    /// How long it looks back: less than was asked for where it began since then.
    pub covered_seconds: f64,
    /// Counts that it has no history of, as it has too many.
    pub series_left_out: u64,
}

/// What agents call these.
const COVERED: &str = "weft_history_covered_seconds";
const LEFT_OUT: &str = "weft_history_left_out_series";

impl Recent {
    /// Reads an agent's answer, of which is believed what is of its own node's pods.
    pub(super) fn read(text: &str, wanted: &[&str], known: &Known) -> Self {
        let mut all = Scrape::read(text, |name| {
            wanted.contains(&name) || [COVERED, LEFT_OUT].contains(&name)
        });
        let mut own = |name: &str| {
            let series = Series {
                name: name.to_owned(),
                labels: Default::default(),
            };
            all.values.remove(&series).unwrap_or_default()
        };
        let (covered_seconds, series_left_out) = (own(COVERED), own(LEFT_OUT) as u64);
        Self {
            grown: known.scrape(all),
            covered_seconds,
            series_left_out,
        }
    }
}

impl Change {
    /// What all agents say of the last seconds. Each looks back somewhat more, and one that is younger than that less: what it counted
    /// is taken as going on so before.
    pub(super) fn recent(view: &View, asked_seconds: f64) -> Self {
        let recent = || view.said.iter().map(|it| (&it.node, &it.recent));
        let seconds = recent().map(|(_, it)| it.covered_seconds);
        let mut change = Self {
            seconds: seconds.fold(0.0, f64::max),
            ..Self::default()
        };
        for (node, it) in recent() {
            if it.covered_seconds < asked_seconds || it.series_left_out > 0 {
                change.partial.push(Partial {
                    node: node.clone(),
                    covered_seconds: it.covered_seconds,
                    series_left_out: it.series_left_out,
                });
            }
            if it.covered_seconds > 0.0 {
                let by = change.seconds / it.covered_seconds;
                let grown = it.grown.values.iter();
                change.counters.extend(grown.map(|(series, value)| Grown {
                    series: series.clone(),
                    by: value * by,
                }));
            }
        }
        change
    }

    /// How much something grew in a second.
    pub fn per_second(&self, grown: f64) -> f64 {
        match self.seconds > 0.0 {
            true => grown / self.seconds,
            false => 0.0,
        }
    }

    /// Series of a name.
    pub fn of<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Grown> {
        self.counters
            .iter()
            .filter(move |it| it.series.name == name)
    }
}

#[cfg(test)]
impl Change {
    /// What metrics say that began before so many seconds.
    pub fn grown(text: &str, seconds: f64) -> Self {
        let values = Scrape::read(text, |_| true).values.into_iter();
        Self {
            counters: values.map(|(series, by)| Grown { series, by }).collect(),
            seconds,
            partial: vec![],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::Said;

    fn said(node: &str, text: &str) -> Said {
        let wanted = ["a_total", "b_total"];
        Said {
            node: node.to_owned(),
            scrape: Scrape::default(),
            pods: vec![],
            recent: Recent::read(text, &wanted, &Known::default()),
        }
    }

    #[test]
    fn agents_that_look_back_less_far_weigh_as_much() {
        let view = View {
            said: vec![
                said(
                    "old",
                    "a_total 640\nb_total 64\nc_total 1\nweft_history_covered_seconds 64.0\nweft_history_left_out_series 0\n",
                ),
                said(
                    "new",
                    "a_total 50\nweft_history_covered_seconds 5\nweft_history_left_out_series 0\n",
                ),
                said(
                    "full",
                    "weft_history_covered_seconds 61\nweft_history_left_out_series 7\n",
                ),
                // Older than the question, or a liar.
                said("odd", "a_total 50\n"),
            ],
            missing: vec![],
        };
        let change = Change::recent(&view, 60.0);
        assert_eq!(change.seconds, 64.0);
        let sum = |name: &str| {
            change
                .of(name)
                .map(|it| change.per_second(it.by))
                .sum::<f64>()
        };
        assert_eq!(
            (sum("a_total"), sum("b_total"), sum("c_total")),
            (20.0, 1.0, 0.0)
        );
        let partial = |node: &str, covered_seconds: f64, series_left_out| Partial {
            node: node.to_owned(),
            covered_seconds,
            series_left_out,
        };
        let expected = [
            partial("new", 5.0, 0),
            partial("full", 61.0, 7),
            partial("odd", 0.0, 0),
        ];
        assert_eq!(change.partial, expected);
    }
}
