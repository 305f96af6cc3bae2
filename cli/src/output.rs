//! How answers are written: aligned tables, colours where somebody looks, JSON.

use std::io::{self, IsTerminal, StdoutLock, Write};

use clap::ValueEnum;
use serde::Serialize;

/// Which form an answer has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people.
    #[default]
    Table,
    /// For programs.
    Json,
}

/// What a cell means, as a colour.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tone {
    /// Nothing in particular.
    #[default]
    Plain,
    /// A heading.
    Head,
    /// As it should be.
    Good,
    /// Worth a look.
    Warn,
    /// Not as it should be.
    Bad,
}

/// A text with a meaning.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cell {
    text: String,
    tone: Tone,
    right: bool,
}

/// A cell is cut behind so many letters: a long one would make all rows as long.
const MAX_WIDTH: usize = 200;

/// Rows whose columns are aligned.
#[derive(Clone, Debug, Default)]
pub struct Table {
    rows: Vec<Vec<Cell>>,
}

impl Cell {
    /// A text.
    pub fn new(text: impl Into<String>) -> Self {
        Self {
            text: text.into(),
            tone: Tone::Plain,
            right: false,
        }
    }

    /// The same with a meaning.
    pub fn tone(mut self, tone: Tone) -> Self {
        self.tone = tone;
        self
    }

    /// The same on the right of its column, as numbers are.
    pub fn right(mut self) -> Self {
        self.right = true;
        self
    }
}

impl From<&str> for Cell {
    fn from(text: &str) -> Self {
        Self::new(text)
    }
}

impl From<String> for Cell {
    fn from(text: String) -> Self {
        Self::new(text)
    }
}

impl Table {
    /// A table with headings.
    pub fn new<'a>(headings: impl IntoIterator<Item = &'a str>) -> Self {
        let heading = |it: &str| Cell::new(it).tone(Tone::Head);
        Self {
            rows: vec![headings.into_iter().map(heading).collect()],
        }
    }

    /// Adds a row.
    pub fn row(&mut self, cells: impl IntoIterator<Item = Cell>) {
        let cells = cells.into_iter().map(|mut cell| {
            if let Some((end, _)) = cell.text.char_indices().nth(MAX_WIDTH) {
                cell.text.truncate(end);
                cell.text.push('…');
            }
            cell
        });
        self.rows.push(cells.collect());
    }

    /// Writes it.
    ///
    /// # Errors
    /// Writing failed.
    pub fn write(&self, to: &mut impl Write, colours: bool) -> io::Result<()> {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or_default();
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            let widths = cells.map(|it| it.text.chars().count());
            widths.max().unwrap_or_default()
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        // A heading stands where its numbers do.
        let is_right = |column: usize| {
            let mut below = self.rows.iter().skip(1).filter_map(|row| row.get(column));
            below.any(|it| it.right)
        };
        for row in &self.rows {
            let mut line = String::new();
            for (column, cell) in row.iter().enumerate() {
                let pad = " ".repeat(widths[column] - cell.text.chars().count());
                let text = paint(&cell.text, cell.tone, colours);
                match (is_right(column), column + 1 == row.len()) {
                    (true, _) => line.extend([pad.as_str(), &text]),
                    (false, true) => line.push_str(&text),
                    (false, false) => line.extend([text.as_str(), &pad]),
                }
                if column + 1 < row.len() {
                    line.push_str("   ");
                }
            }
            writeln!(to, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

/// A text in the colour of its meaning.
pub fn paint(text: &str, tone: Tone, colours: bool) -> String {
    let code = match tone {
        Tone::Plain => return text.to_owned(),
        Tone::Head => "1",
        Tone::Good => "32",
        Tone::Warn => "33",
        Tone::Bad => "31",
    };
    match colours {
        true => format!("\x1b[{code}m{text}\x1b[0m"),
        false => text.to_owned(),
    }
}

/// Whether standard output is to have colours: where it is a terminal that knows them, and nobody asks for none
/// (`NO_COLOR`, see no-color.org).
pub fn colours() -> bool {
    let asked_for_none = std::env::var_os("NO_COLOR").is_some_and(|it| !it.is_empty());
    let is_dumb = std::env::var_os("TERM").is_some_and(|it| it == "dumb");
    io::stdout().is_terminal() && !asked_for_none && !is_dumb
}

/// Writes an answer to standard output in its form. For people, notes such as whose part is missing are said on standard error;
/// for programs the answer has them itself.
///
/// # Errors
/// Writing failed.
pub fn show(
    format: Format,
    answer: &impl Serialize,
    notes: &[String],
    write: impl FnOnce(&mut StdoutLock<'_>, bool) -> io::Result<()>,
) -> io::Result<()> {
    let mut out = io::stdout().lock();
    match format {
        Format::Json => json(&mut out, answer),
        Format::Table => {
            write(&mut out, colours())?;
            for note in notes {
                eprintln!("‼ {note}");
            }
            Ok(())
        }
    }
}

/// Writes JSON with a line's end. What would move a terminal's cursor is escaped: people look at JSON, too.
///
/// # Errors
/// Writing failed.
pub fn json(to: &mut impl Write, value: &impl Serialize) -> io::Result<()> {
    let mut text = escaped(&serde_json::to_string_pretty(value)?);
    text.push('\n');
    to.write_all(text.as_bytes())
}

/// The same in one line.
///
/// # Errors
/// Writing failed.
pub fn json_line(to: &mut impl Write, value: &impl Serialize) -> io::Result<()> {
    let mut text = escaped(&serde_json::to_string(value)?);
    text.push('\n');
    to.write_all(text.as_bytes())
}

/// JSON in which is escaped what would move a terminal's cursor.
pub fn escaped(plain: &str) -> String {
    let mut text = String::with_capacity(plain.len() + 1);
    for letter in plain.chars() {
        // It is part of a string: nothing else in JSON has one.
        match letter != '\n' && is_unseen(letter) {
            true => {
                let units = letter.encode_utf16(&mut [0; 2]).to_vec();
                text.extend(units.iter().map(|it| format!("\\u{it:04x}")));
            }
            false => text.push(letter),
        }
    }
    text
}

/// Whether it is no letter but does something: controls (C0, C1), what ends a line, and what formats (Unicode's category
/// Cf), which turns the direction of text around or is not seen at all.
fn is_unseen(letter: char) -> bool {
    letter.is_control()
        || matches!(letter,
            '\u{ad}' | '\u{600}'..='\u{605}' | '\u{61c}' | '\u{6dd}' | '\u{70f}'
            | '\u{890}' | '\u{891}' | '\u{8e2}' | '\u{180e}' | '\u{200b}'..='\u{200f}'
            | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}'
            | '\u{fff9}'..='\u{fffb}' | '\u{110bd}' | '\u{110cd}' | '\u{13430}'..='\u{1343f}'
            | '\u{1bca0}'..='\u{1bca3}' | '\u{1d173}'..='\u{1d17a}'
            | '\u{e0001}'..='\u{e007f}')
}

/// A number of bytes with the unit that fits.
pub fn bytes(number: f64) -> String {
    let mut number = number;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if number < 1024.0 {
            return match unit {
                "B" => format!("{number:.0} B"),
                unit => format!("{number:.1} {unit}"),
            };
        }
        number /= 1024.0;
    }
    format!("{number:.1} TiB")
}

/// A text from elsewhere, without what would move a terminal's cursor or change its colours.
pub fn shown(text: &str) -> String {
    let plain = |it: char| match is_unseen(it) {
        true => '\u{fffd}',
        false => it,
    };
    text.chars().map(plain).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(table: &Table, colours: bool) -> String {
        let mut bytes = vec![];
        table.write(&mut bytes, colours).expect("a vector");
        String::from_utf8(bytes).expect("text")
    }

    #[test]
    fn columns_are_aligned_whatever_their_colours() {
        let mut table = Table::new(["NAME", "RPS", "NOTE"]);
        table.row(["web".into(), Cell::new("1.0").right(), "".into()]);
        let bad = Cell::new("äh").tone(Tone::Bad);
        table.row(["payment".into(), Cell::new("1234.5").right(), bad]);
        let plain = written(&table, false);
        let expected = "NAME         RPS   NOTE\nweb          1.0\npayment   1234.5   äh\n";
        assert_eq!(plain, expected);
        let coloured = written(&table, true);
        assert!(coloured.contains("\x1b[31mäh\x1b[0m"), "{coloured:?}");
        let mut without = coloured;
        for code in ["\x1b[1m", "\x1b[31m", "\x1b[0m"] {
            without = without.replace(code, "");
        }
        assert_eq!(without, plain);
    }

    #[test]
    fn what_comes_from_elsewhere_cannot_move_the_cursor() {
        assert_eq!(shown("a\x1b[2Jb\n"), "a\u{fffd}[2Jb\u{fffd}");
        assert_eq!(shown("a\u{9b}2J\u{202e}b"), "a\u{fffd}2J\u{fffd}b");
        let mut text = vec![];
        let value = serde_json::json!({"a": "\u{9b}2J\u{202e}é\u{e0041}\u{1b}"});
        json(&mut text, &value).expect("a vector");
        let text = String::from_utf8(text).expect("text");
        assert_eq!(
            text,
            "{\n  \"a\": \"\\u009b2J\\u202eé\\udb40\\udc41\\u001b\"\n}\n"
        );
        let read: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!(read, value);
    }

    #[test]
    fn no_cell_makes_a_table_wide() {
        let mut table = Table::new(["A", "B"]);
        table.row(["é".repeat(100_000).into(), "b".into()]);
        let longest = written(&table, false);
        let longest = longest.lines().map(|it| it.chars().count()).max();
        assert_eq!(longest, Some(MAX_WIDTH + 1 + 3 + 1));
    }
}
