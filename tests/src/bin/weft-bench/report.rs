//! Medians, the table and the JSON.

use serde_json::{Value, json};

use crate::rows::{ROWS, Route};

/// All that was measured.
#[derive(Default)]
pub(crate) struct Report {
    samples: Vec<Sample>,
    notes: Vec<String>,
    failures: Vec<String>,
    repeated: u32,
    disturbed: u32,
    worst_stolen: f64,
    worst_foreign: f64,
}

/// One repetition of one row.
struct Sample {
    route: Route,
    row: &'static str,
    direct: Option<f64>,
    mesh: f64,
}

/// A row of the table.
struct Line {
    route: Route,
    name: &'static str,
    unit: &'static str,
    direct: Option<f64>,
    mesh: f64,
    ratio: Option<f64>,
    runs: usize,
}

impl Report {
    /// Adds what a repetition gave for a row.
    pub(crate) fn add(&mut self, route: Route, row: &'static str, direct: Option<f64>, mesh: f64) {
        self.samples.push(Sample {
            route,
            row,
            direct,
            mesh,
        });
    }

    /// Adds a sentence for below the table.
    pub(crate) fn note(&mut self, text: String) {
        self.notes.push(text);
    }

    /// Something could not be measured.
    pub(crate) fn fail(&mut self, what: &str, error: &anyhow::Error) {
        self.failures.push(format!("{what}: {error:#}"));
    }

    /// A run was disturbed and is repeated.
    pub(crate) fn repeated(&mut self) {
        self.repeated += 1;
    }

    /// A run counts although it was disturbed.
    pub(crate) fn disturbed(&mut self, stolen: f64, foreign: f64) {
        self.disturbed += 1;
        self.worst_stolen = self.worst_stolen.max(stolen);
        self.worst_foreign = self.worst_foreign.max(foreign);
    }

    /// Whether nothing failed.
    pub(crate) fn is_complete(&self) -> bool {
        self.failures.is_empty()
    }

    /// The table, and what to know about it.
    pub(crate) fn markdown(&self) -> String {
        let mut out = String::from(
            "| path | row | direct | mesh | ratio | unit | runs |\n|---|---|---:|---:|---:|---|---:|\n",
        );
        for line in self.lines() {
            out += &format!(
                "| {} | {} | {} | {} | {} | {} | {} |\n",
                line.route.name(),
                line.name,
                shown(line.direct),
                shown(Some(line.mesh)),
                line.ratio.map_or("-".into(), |ratio| format!("{ratio:.2}")),
                line.unit,
                line.runs
            );
        }
        let mut notes = self.notes.clone();
        notes.push(format!(
            "Medians; the ratio is the median of the repetitions' own ratios. {} runs were repeated \
             because the machine was disturbed.",
            self.repeated
        ));
        if self.disturbed > 0 {
            notes.push(format!(
                "**{} runs count although they were disturbed** (up to {:.0} % of the CPU taken by \
                 the host, {:.0} % by other processes): repeat this on a quiet machine.",
                self.disturbed,
                self.worst_stolen * 100.0,
                self.worst_foreign * 100.0
            ));
        }
        notes.extend(self.failures.iter().map(|what| format!("FAILED: {what}")));
        out.push('\n');
        for note in notes {
            out += &format!("- {note}\n");
        }
        out
    }

    /// The rows for programs.
    pub(crate) fn json(&self) -> Value {
        let rows: Vec<Value> = self
            .lines()
            .iter()
            .map(|line| {
                json!({
                    "path": line.route.name(),
                    "name": line.name,
                    "direct": line.direct.map(rounded),
                    "mesh": rounded(line.mesh),
                    "ratio": line.ratio.map(rounded),
                    "unit": line.unit,
                    "runs": line.runs,
                })
            })
            .collect();
        json!({"rows": rows})
    }

    fn lines(&self) -> Vec<Line> {
        let mut lines = Vec::new();
        for route in Route::ALL {
            for row in ROWS {
                let samples: Vec<&Sample> = self
                    .samples
                    .iter()
                    .filter(|sample| sample.route == route && sample.row == row.name)
                    .collect();
                let values = |value: fn(&Sample) -> Option<f64>| {
                    median(samples.iter().filter_map(|sample| value(sample)).collect())
                };
                let Some(mesh) = values(|sample| Some(sample.mesh)) else {
                    continue;
                };
                lines.push(Line {
                    route,
                    name: row.name,
                    unit: row.unit,
                    direct: values(|sample| sample.direct),
                    mesh,
                    ratio: values(|sample| Some(sample.mesh / sample.direct?)),
                    runs: samples.len(),
                });
            }
        }
        lines
    }
}

/// The middle one, or the mean of the two in the middle.
pub(crate) fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        count if count % 2 == 1 => Some(values[middle]),
        _ => Some((values[middle - 1] + values[middle]) / 2.0),
    }
}

/// Three figures that count, or all before the point.
fn shown(value: Option<f64>) -> String {
    let Some(value) = value else {
        return "-".into();
    };
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

/// To six figures: what follows is noise.
fn rounded(value: f64) -> f64 {
    if value == 0.0 || !value.is_finite() {
        return 0.0;
    }
    let scale = 10_f64.powf(5.0 - value.abs().log10().floor());
    (value * scale).round() / scale
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(vec![]), None);
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), Some(2.5));
    }

    #[test]
    fn ratios_are_of_the_same_repetition() {
        let mut report = Report::default();
        report.add(Route::Across, "bulk-1", Some(10.0), 5.0);
        report.add(Route::Across, "bulk-1", Some(40.0), 10.0);
        report.add(Route::Across, "bulk-1", Some(20.0), 10.0);
        report.add(Route::Across, "memory-idle", None, 12.345_678_9);
        let json = report.json();
        assert_eq!(
            json["rows"][0],
            json!({"path": "across", "name": "bulk-1", "direct": 20.0, "mesh": 10.0, "ratio": 0.5,
                "unit": "Gbit/s", "runs": 3})
        );
        assert_eq!(json["rows"][1]["direct"], Value::Null);
        assert_eq!(json["rows"][1]["mesh"], json!(12.3457));
        assert!(
            report
                .markdown()
                .contains("| across | bulk-1 | 20.0 | 10.0 | 0.50 |")
        );
    }
}
