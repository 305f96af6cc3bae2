//! `weft top`: the requests of some pods, counted by who asks whom for what, as they go by.
//!
//! It is what `weft tap` shows, added up: the same agents sample, with the same rights, and no more of them.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use serde::Serialize;

use super::event::{Begin, End, Event, Head, Running, What, Who};
use super::keys::{Key as Pressable, Keys};
use super::{Watch, Writer};
use crate::outcome::Outcome;
use crate::output::{self, Cell, Table, Tone, colours, shown};
use crate::stat::traffic::is_grpc_failure;

/// What `weft top` is asked.
#[derive(Args, Debug)]
#[command(
    after_help = "It goes on until it is ended by ^C, or by q in a terminal, where keys say what comes first. Exit codes: 0 it was ended, 2 nobody can be asked."
)]
pub struct Top {
    /// What is watched.
    #[command(flatten)]
    pub watch: Watch,
    /// What comes first.
    #[arg(long, default_value = "count")]
    pub sort: Sort,
    /// How many rows are shown.
    #[arg(long, value_name = "NUMBER", default_value_t = 20)]
    pub rows: usize,
    /// How it is written: the table is drawn anew each second in a terminal, and else once, at the end, as JSON is.
    #[arg(short, long, default_value = "table")]
    pub output: output::Format,
}

/// What comes first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Sort {
    /// What is asked most often.
    #[default]
    Count,
    /// What failed most often.
    Failures,
    /// Of what the fastest took longest.
    Best,
    /// What has taken longest.
    Worst,
    /// What took longest last.
    Last,
    /// The part that succeeds, the smallest first.
    Success,
    /// By client, server, method and path.
    Name,
}

/// What is done when a key was pressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pressed {
    Stay,
    Quit,
}

/// Requests that are counted together.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
struct Key {
    client: String,
    server: String,
    method: String,
    path: String,
}

/// What was counted.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
struct Counted {
    count: u64,
    /// Those that have ended, and of them those that did not fail.
    ended: u64,
    successes: u64,
    /// From the request to the head of the response; none: there was none yet.
    best_us: Option<u64>,
    worst_us: Option<u64>,
    last_us: Option<u64>,
}

#[derive(Debug, Serialize)]
struct Row<'a> {
    #[serde(flatten)]
    key: &'a Key,
    #[serde(flatten)]
    counted: &'a Counted,
}

#[derive(Debug, Serialize)]
struct Report<'a> {
    rows: Vec<Row<'a>>,
}

/// The table while it grows.
pub(super) struct Live {
    sort: Sort,
    most: usize,
    format: output::Format,
    /// Whether the other end comes first.
    is_reversed: bool,
    /// Whether it is drawn anew, over what was drawn before.
    is_drawn: bool,
    has_keys: bool,
    drawn: Option<Instant>,
    screen: Option<Screen>,
    rows: BTreeMap<Key, Counted>,
    running: Running<(Key, Option<u16>)>,
}

/// A screen of its own, as editors have it; dropped, what was there before is back.
struct Screen;

/// What there are more of is counted together: paths are what clients write.
const MOST_ROWS: usize = 2000;
const OTHERS: &str = "(others)";
const EACH: Duration = Duration::from_secs(1);
/// To a screen of its own without a cursor, and back.
const SCREEN: &str = "\x1b[?1049h\x1b[?25l";
const BACK: &str = "\x1b[?25h\x1b[?1049l";
const CLEAR: &str = "\x1b[H\x1b[J";
/// The keys.
const SORTS: [(char, Sort); 7] = [
    ('c', Sort::Count),
    ('f', Sort::Failures),
    ('b', Sort::Best),
    ('w', Sort::Worst),
    ('l', Sort::Last),
    ('s', Sort::Success),
    ('n', Sort::Name),
];
const HELP: &str = "first by: c count, f failures, b best, w worst, l last, s success, n name; ↑↓ the other way; q quit";

/// Watches, and shows, until it is ended.
///
/// # Errors
/// Nobody can be asked, or nobody lets watch, and why.
pub async fn run(top: &Top) -> Result<Outcome, crate::Error> {
    let is_drawn = top.output == output::Format::Table && io::stdout().is_terminal();
    let keys = is_drawn.then(Keys::listen).flatten();
    let live = Live {
        is_drawn,
        has_keys: keys.is_some(),
        ..Live::new(top.sort, top.rows, top.output)
    };
    super::until_ended(&top.watch, Writer::Top(Box::new(live)), keys).await
}

impl Live {
    fn new(sort: Sort, most: usize, format: output::Format) -> Self {
        Self {
            sort,
            most,
            format,
            is_reversed: false,
            is_drawn: false,
            has_keys: false,
            drawn: None,
            screen: None,
            rows: BTreeMap::new(),
            running: Running::default(),
        }
    }

    pub(super) fn event(&mut self, to: &mut impl Write, event: &Event) -> io::Result<()> {
        self.count(event);
        if !self.is_drawn || self.drawn.is_some_and(|it| it.elapsed() < EACH) {
            return Ok(());
        }
        self.draw(to)
    }

    /// Does what a key says.
    pub(super) fn key(&mut self, to: &mut impl Write, key: Pressable) -> io::Result<Pressed> {
        match key {
            Pressable::Letter('q') => return Ok(Pressed::Quit),
            Pressable::Letter(letter) => {
                let Some((_, sort)) = SORTS.iter().find(|(key, _)| *key == letter) else {
                    return Ok(Pressed::Stay);
                };
                self.sort = *sort;
                self.is_reversed = false;
            }
            Pressable::Arrow => self.is_reversed = !self.is_reversed,
        }
        self.draw(to)?;
        Ok(Pressed::Stay)
    }

    fn draw(&mut self, to: &mut impl Write) -> io::Result<()> {
        if self.screen.is_none() {
            to.write_all(SCREEN.as_bytes())?;
            self.screen = Some(Screen);
        }
        to.write_all(CLEAR.as_bytes())?;
        self.drawn = Some(Instant::now());
        self.table().write(to, colours())?;
        if self.has_keys {
            writeln!(to, "\n{HELP}")?;
        }
        to.flush()
    }

    /// What is left behind is the whole table.
    pub(super) fn end(&mut self, to: &mut impl Write) -> io::Result<()> {
        drop(self.screen.take());
        match self.format {
            output::Format::Table => self.table().write(to, colours()),
            output::Format::Json => {
                let rows = self.sorted().into_iter();
                let rows = rows.map(|(key, counted)| Row { key, counted });
                let rows = rows.collect();
                output::json(to, &Report { rows })
            }
        }
    }

    fn count(&mut self, event: &Event) {
        match &event.what {
            What::Begin(begin) => {
                let key = self.room(Key::of(begin));
                self.rows.entry(key.clone()).or_default().count += 1;
                self.running.begin(event, (key, None));
            }
            What::Head(Head { status, latency_us }) => {
                let Some((key, its)) = self.running.of(event) else {
                    return;
                };
                *its = Some(*status);
                if let Some(counted) = self.rows.get_mut(key) {
                    counted.took(*latency_us);
                }
            }
            What::End(end) => {
                let Some((key, status)) = self.running.end(event) else {
                    return;
                };
                if let Some(counted) = self.rows.get_mut(&key) {
                    counted.ended += 1;
                    counted.successes += u64::from(is_success(status, end));
                }
            }
        }
    }

    /// The same, or that of all others if there are too many.
    fn room(&self, key: Key) -> Key {
        if self.rows.len() < MOST_ROWS || self.rows.contains_key(&key) {
            return key;
        }
        Key {
            client: OTHERS.to_owned(),
            server: String::new(),
            method: String::new(),
            path: String::new(),
        }
    }

    fn sorted(&self) -> Vec<(&Key, &Counted)> {
        let mut rows: Vec<_> = self.rows.iter().collect();
        let failures = |it: &Counted| it.ended - it.successes;
        let success = |it: &Counted| match it.ended {
            // It says nothing of that: it comes last.
            0 => f64::INFINITY,
            ended => it.successes as f64 / ended as f64,
        };
        rows.sort_by(|(_, one), (_, other)| match self.sort {
            Sort::Count => other.count.cmp(&one.count),
            Sort::Failures => failures(other).cmp(&failures(one)),
            Sort::Best => other.best_us.cmp(&one.best_us),
            Sort::Worst => other.worst_us.cmp(&one.worst_us),
            Sort::Last => other.last_us.cmp(&one.last_us),
            Sort::Success => success(one).total_cmp(&success(other)),
            Sort::Name => std::cmp::Ordering::Equal,
        });
        if self.is_reversed {
            rows.reverse();
        }
        rows
    }

    fn table(&self) -> Table {
        let mut table = Table::new([
            "CLIENT", "SERVER", "METHOD", "PATH", "COUNT", "BEST", "WORST", "LAST", "SUCCESS",
        ]);
        for (key, counted) in self.sorted().into_iter().take(self.most) {
            let Key {
                client,
                server,
                method,
                path,
            } = key;
            let number = |text: String| Cell::new(text).right();
            let ms = |us: Option<u64>| {
                number(us.map_or("-".to_owned(), |it| format!("{:.1}ms", it as f64 / 1000.0)))
            };
            let success = match counted.ended {
                0 => number("-".to_owned()),
                ended => {
                    let rate = counted.successes as f64 / ended as f64;
                    number(format!("{:.2}%", rate * 100.0)).tone(match rate {
                        rate if rate >= 0.999 => Tone::Good,
                        rate if rate >= 0.95 => Tone::Warn,
                        _ => Tone::Bad,
                    })
                }
            };
            table.row([
                shown(client).into(),
                shown(server).into(),
                shown(method).into(),
                shown(path).into(),
                number(counted.count.to_string()),
                ms(counted.best_us),
                ms(counted.worst_us),
                ms(counted.last_us),
                success,
            ]);
        }
        table
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // A terminal that is gone needs nothing any more.
        let _ = io::stdout().write_all(BACK.as_bytes());
    }
}

impl Key {
    fn of(begin: &Begin) -> Self {
        let text = |it: &Option<String>| it.clone().unwrap_or_default();
        Self {
            client: name(&begin.source),
            server: match (&begin.service, &begin.destination.pod) {
                (Some(service), None) => service.clone(),
                _ => name(&begin.destination),
            },
            method: begin
                .method
                .clone()
                .unwrap_or_else(|| begin.protocol.clone()),
            path: text(&begin.path),
        }
    }
}

/// A workload by what created it, else by itself; an address of which nothing is known without its port, which is another
/// one each time.
fn name(who: &Who) -> String {
    let namespace = who.namespace.as_deref().unwrap_or_default();
    match (&who.owner, &who.pod, &who.address) {
        (Some(owner), ..) => format!("{namespace}/{owner}"),
        (None, Some(pod), _) => format!("{namespace}/pod/{pod}"),
        (None, None, Some(address)) => match address.rsplit_once(':') {
            Some((address, _)) => address.to_owned(),
            None => address.clone(),
        },
        (None, None, None) => "-".to_owned(),
    }
}

impl Counted {
    fn took(&mut self, us: u64) {
        self.best_us = Some(self.best_us.map_or(us, |it| it.min(us)));
        self.worst_us = Some(self.worst_us.map_or(us, |it| it.max(us)));
        self.last_us = Some(us);
    }
}

fn is_success(status: Option<u16>, end: &End) -> bool {
    let grpc = end.grpc_status.as_deref();
    end.error.is_none()
        && status.is_none_or(|it| it < 500)
        && grpc.is_none_or(|it| !is_grpc_failure(it))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn begin(id: u64, path: &str) -> Value {
        json!({"node": "one", "id": id, "at_us": 1, "begin": {
            "protocol": "HTTP/1", "direction": "inbound",
            "source": {"address": "10.1.0.2:4321", "namespace": "shop", "pod": "order-1", "owner": "deployment/order"},
            "destination": {"address": "10.1.0.3:80", "namespace": "shop", "pod": "web-1"},
            "method": "GET", "authority": "web", "path": path}})
    }

    fn head(id: u64, status: u16, latency_us: u64) -> Value {
        json!({"node": "one", "id": id, "at_us": 2, "head": {"status": status, "latency_us": latency_us}})
    }

    fn end(id: u64, error: Option<&str>) -> Value {
        json!({"node": "one", "id": id, "at_us": 3, "end": {
            "duration_us": 1, "request_bytes": 0, "response_bytes": 0, "error": error}})
    }

    fn written(sort: Sort, format: output::Format, events: Vec<Value>) -> String {
        let mut live = Live::new(sort, 2, format);
        let mut text = vec![];
        for event in events {
            let event = serde_json::from_value(event).expect("an event");
            live.event(&mut text, &event).expect("a vector");
        }
        assert!(text.is_empty(), "nothing is drawn where nobody looks");
        live.end(&mut text).expect("a vector");
        String::from_utf8(text).expect("text")
    }

    fn events() -> Vec<Value> {
        vec![
            begin(1, "/a"),
            head(1, 200, 1000),
            end(1, None),
            begin(2, "/a"),
            head(2, 200, 3000),
            end(2, Some("RESET")),
            begin(3, "/b\u{1b}[2J"),
            head(3, 503, 9000),
            end(3, None),
            begin(4, "/c"),
            // Of what began before nothing is known.
            head(9, 200, 5),
            end(9, None),
        ]
    }

    #[test]
    fn requests_are_added_up_and_sorted() {
        assert_eq!(
            written(Sort::Count, output::Format::Table, events()),
            "\
CLIENT                  SERVER           METHOD   PATH     COUNT    BEST   WORST    LAST   SUCCESS
shop/deployment/order   shop/pod/web-1   GET      /a           2   1.0ms   3.0ms   3.0ms    50.00%
shop/deployment/order   shop/pod/web-1   GET      /b\u{fffd}[2J       1   9.0ms   9.0ms   9.0ms     0.00%
"
        );
        let worst = written(Sort::Worst, output::Format::Table, events());
        assert!(
            worst.lines().nth(1).is_some_and(|it| it.contains("/b")),
            "{worst}"
        );
        let all = written(Sort::Name, output::Format::Json, events());
        let all: Value = serde_json::from_str(&all).expect("JSON");
        assert_eq!(all["rows"][0]["path"], "/a");
        assert_eq!(all["rows"][0]["ended"], 2);
        assert_eq!(all["rows"][2]["best_us"], Value::Null);
    }

    #[test]
    fn keys_change_what_comes_first() {
        let mut live = Live {
            has_keys: true,
            ..Live::new(Sort::Count, 20, output::Format::Table)
        };
        let mut nowhere = vec![];
        for event in events() {
            let event = serde_json::from_value(event).expect("an event");
            live.event(&mut nowhere, &event).expect("a vector");
        }
        let first = |live: &mut Live, key| {
            let mut text = vec![];
            let pressed = live.key(&mut text, key).expect("a vector");
            assert_eq!(pressed, Pressed::Stay);
            // What is on the screen is not the test's.
            if let Some(screen) = live.screen.take() {
                std::mem::forget(screen);
            }
            let text = String::from_utf8(text).expect("text");
            assert!(text.ends_with(&format!("\n{HELP}\n")), "{text}");
            let row = text.lines().nth(1).expect("a row").to_owned();
            row.split_whitespace().nth(3).map(str::to_owned)
        };
        let b = "/b\u{fffd}[2J";
        for (key, expected) in [
            (Pressable::Letter('f'), "/a"),
            (Pressable::Letter('c'), "/a"),
            (Pressable::Letter('b'), b),
            (Pressable::Letter('w'), b),
            (Pressable::Letter('l'), b),
            (Pressable::Letter('s'), b),
            (Pressable::Letter('n'), "/a"),
            (Pressable::Arrow, "/c"),
            (Pressable::Arrow, "/a"),
        ] {
            assert_eq!(first(&mut live, key).as_deref(), Some(expected), "{key:?}");
        }
        let quit = live.key(&mut nowhere, Pressable::Letter('q'));
        assert_eq!(quit.expect("a vector"), Pressed::Quit);
        let unknown = live.key(&mut nowhere, Pressable::Letter('x'));
        assert_eq!(unknown.expect("a vector"), Pressed::Stay);
        assert!(nowhere.is_empty());
    }

    #[test]
    fn what_clients_make_up_has_an_end() {
        let mut live = Live::new(Sort::Count, 20, output::Format::Table);
        for id in 0..MOST_ROWS as u64 + 50 {
            let event = serde_json::from_value(begin(id, &format!("/{id}"))).expect("an event");
            live.count(&event);
        }
        assert_eq!(live.rows.len(), MOST_ROWS + 1);
        let others = live.sorted()[0];
        assert_eq!((others.0.client.as_str(), others.1.count), (OTHERS, 50));
    }
}
