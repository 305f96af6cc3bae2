//! What an answer says of how it came about: over which time, and whose part is missing or short.

use serde::Serialize;

use super::{Change, Partial, View};
use crate::output::shown;

/// Of an answer about a time.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Seen {
    /// How long that is.
    window_seconds: f64,
    /// Agents that do not answer: their part is missing.
    missing: Vec<Missing>,
    /// Agents that know a part only.
    partial: Vec<Partial>,
}

/// An agent that does not answer.
#[derive(Clone, Debug, Serialize)]
pub struct Missing {
    /// Its node.
    pub node: String,
    /// Why.
    pub reason: String,
}

impl Seen {
    /// Of what all agents said.
    pub fn of(view: &View, change: &Change) -> Self {
        Self {
            window_seconds: change.seconds,
            missing: view.missing.clone(),
            partial: change.partial.clone(),
        }
    }

    /// The same for people.
    pub fn notes(&self) -> Vec<String> {
        let partial = self.partial.iter().map(Partial::note);
        self.missing
            .iter()
            .map(Missing::note)
            .chain(partial)
            .collect()
    }
}

impl Missing {
    /// For people.
    pub fn note(&self) -> String {
        let (node, reason) = (shown(&self.node), shown(&self.reason));
        format!("what {node} has is missing: {reason}")
    }
}

impl Partial {
    fn note(&self) -> String {
        let (node, seconds) = (shown(&self.node), self.covered_seconds);
        match self.series_left_out {
            0 => format!("{node} knows the last {seconds:.0} s only: its agent began then"),
            count => format!(
                "{node} knows the last {seconds:.0} s, but not of {count} series: its agent has too many"
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whose_part_is_missing_or_short_is_said() {
        let partial = |series_left_out| Partial {
            node: "two".to_owned(),
            covered_seconds: 12.3,
            series_left_out,
        };
        let seen = Seen {
            window_seconds: 60.0,
            missing: vec![Missing {
                node: "one".to_owned(),
                reason: "no answer\u{1b}".to_owned(),
            }],
            partial: vec![partial(0), partial(9)],
        };
        assert_eq!(
            seen.notes(),
            [
                "what one has is missing: no answer\u{fffd}",
                "two knows the last 12 s only: its agent began then",
                "two knows the last 12 s, but not of 9 series: its agent has too many",
            ]
        );
    }
}
