//! The table and the JSON.

use serde_json::{Value, json};

/// All that was measured.
#[derive(Default)]
pub(crate) struct Report {
    rows: Vec<Row>,
    notes: Vec<String>,
}

struct Row {
    name: &'static str,
    value: f64,
    unit: &'static str,
}

impl Report {
    /// Adds a row.
    pub(crate) fn row(&mut self, name: &'static str, value: f64, unit: &'static str) {
        self.rows.push(Row { name, value, unit });
    }

    /// Adds a sentence for below the table.
    pub(crate) fn note(&mut self, text: String) {
        self.notes.push(text);
    }

    pub(crate) fn markdown(&self) -> String {
        let mut out = String::from("| row | value | unit |\n|---|---:|---|\n");
        for row in &self.rows {
            out += &format!("| `{}` | {} | {} |\n", row.name, shown(row.value), row.unit);
        }
        out.push('\n');
        for note in &self.notes {
            out += &format!("- {note}\n");
        }
        out
    }

    /// The rows for programs.
    pub(crate) fn json(&self) -> Value {
        let row = |it: &Row| json!({"name": it.name, "value": it.value, "unit": it.unit});
        json!({"rows": self.rows.iter().map(row).collect::<Vec<_>>(), "notes": self.notes})
    }
}

/// Three figures that count, or all before the point.
fn shown(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_that_count_are_shown() {
        for (value, text) in [
            (1234.5, "1234"),
            (12.34, "12.3"),
            (1.234, "1.23"),
            (0.1234, "0.123"),
        ] {
            assert_eq!(shown(value), text);
        }
    }
}
