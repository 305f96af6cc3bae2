//! `weft stat`: success rate, requests, latencies and connections of workloads, over the last while.
//!
//! The numbers are those of the agents' metrics, of which agents remember ten minutes: Prometheus is not needed. Where there is
//! one, it knows what happened before.

use std::collections::BTreeMap;
use std::io::Write;

use clap::{Args, ValueEnum};
use serde::Serialize;

use self::buckets::Buckets;
use self::traffic::Routed;
use crate::controller::{Reach, ReachError};
use crate::outcome::Outcome;
use crate::output::{self, Cell, Format, Table, Tone, shown};
use crate::view::{Change, ScopeArgs, Seen, View, Window, Workload};

mod buckets;
pub mod inbound;
pub mod outbound;
pub mod routes;
pub mod traffic;

#[cfg(test)]
mod tests;

/// What `weft stat` is asked.
#[derive(Args, Debug)]
pub struct Stat {
    /// Of what.
    #[command(flatten)]
    pub scope: ScopeArgs,
    /// Whose side: what is asked of the workloads, or what they ask of others.
    #[arg(long, default_value = "inbound")]
    pub direction: Direction,
    /// Over which time.
    #[command(flatten)]
    pub window: Window,
    /// How the answer is written.
    #[arg(short, long, default_value = "table")]
    pub output: Format,
    /// Whom to ask.
    #[command(flatten)]
    pub reach: Reach,
}

/// Whose side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// What is asked of a workload.
    Inbound,
    /// What it asks of others.
    Outbound,
}

/// The answer.
#[derive(Debug, Serialize)]
pub struct Report {
    direction: Direction,
    #[serde(flatten)]
    seen: Seen,
    rows: Vec<Row>,
}

/// A workload.
#[derive(Debug, Default, PartialEq, Serialize)]
struct Row {
    namespace: String,
    kind: &'static str,
    name: String,
    /// Pods that take part, and all that should.
    pods_meshed: usize,
    pods: usize,
    /// None: there was no response.
    success_rate: Option<f64>,
    requests_per_second: f64,
    latency_ms: Latencies,
    /// Of what it asks of others by routes; of what is asked of it none is known: it is its clients that send again and give up.
    timeouts_per_second: Option<f64>,
    retries_per_second: Option<f64>,
    tcp_connections: f64,
    tcp_read_bytes_per_second: f64,
    tcp_write_bytes_per_second: f64,
}

/// How long responses take; none: there was none.
#[derive(Debug, Default, PartialEq, Serialize)]
pub struct Latencies {
    p50: Option<f64>,
    p95: Option<f64>,
    p99: Option<f64>,
}

/// What was counted of a workload.
#[derive(Default)]
struct Counted {
    pods_meshed: usize,
    pods: usize,
    responses: f64,
    successes: f64,
    buckets: Buckets,
    routed: Option<Routed>,
    connections: f64,
    read_bytes: f64,
    written_bytes: f64,
}

const RESPONSES: &str = "response_total";
const LATENCIES: &str = "response_latency_ms_bucket";
const CONNECTIONS: &str = "tcp_open_connections";
const READ: &str = "tcp_read_bytes_total";
const WRITTEN: &str = "tcp_write_bytes_total";

/// Finds out and shows.
///
/// # Errors
/// Nobody can be asked, and why.
pub async fn run(stat: &Stat) -> Result<Outcome, crate::Error> {
    let report = report(stat).await?;
    output::show(
        stat.output,
        &report,
        &report.seen.notes(),
        |out, colours| report.write(out, colours),
    )?;
    Ok(Outcome::Good)
}

async fn report(stat: &Stat) -> Result<Report, ReachError> {
    let mut counters = vec![RESPONSES, LATENCIES, READ, WRITTEN];
    if stat.direction == Direction::Outbound {
        counters.extend(traffic::WHOLE);
    }
    let watched = View::watch(&stat.reach, &[CONNECTIONS], &counters, &stat.window);
    let (view, change) = watched.await?;
    let scope = stat.scope.settled(&stat.reach).await;
    Ok(Report::new(&view, &change, &scope, stat.direction))
}

impl Report {
    fn new(view: &View, change: &Change, scope: &ScopeArgs, direction: Direction) -> Self {
        let mut all: BTreeMap<Workload, Counted> = BTreeMap::new();
        for pod in view.pods().values() {
            if let Some(workload) = scope.of_pod(pod) {
                let counted = all.entry(workload).or_default();
                counted.pods += 1;
                counted.pods_meshed += usize::from(pod.identity.is_some());
            }
        }
        count(&mut all, view, change, scope, direction);
        if direction == Direction::Outbound {
            let mut routed = traffic::count(change, |series, _, _| scope.of_series(series));
            for (workload, counted) in &mut all {
                counted.routed = Some(routed.remove(workload).unwrap_or_default());
            }
        }
        let rows = all
            .into_iter()
            .map(|(workload, counted)| counted.row(workload, change));
        Self {
            direction,
            seen: Seen::of(view, change),
            rows: rows.collect(),
        }
    }

    fn write(&self, to: &mut impl Write, colours: bool) -> std::io::Result<()> {
        if self.rows.is_empty() {
            return writeln!(
                to,
                "no meshed pod is there: -A shows those of all namespaces"
            );
        }
        let routed = match self.direction {
            Direction::Inbound => &[][..],
            Direction::Outbound => &["TIMEOUTS/S", "RETRIES/S"],
        };
        let before = [
            "NAMESPACE",
            "NAME",
            "MESHED",
            "SUCCESS",
            "RPS",
            "P50",
            "P95",
            "P99",
        ];
        let after = ["TCP", "READ/S", "WRITTEN/S"];
        let mut table = Table::new([&before, routed, &after].concat());
        for row in &self.rows {
            table.row(row.cells());
        }
        table.write(to, colours)
    }
}

fn count(
    all: &mut BTreeMap<Workload, Counted>,
    view: &View,
    change: &Change,
    scope: &ScopeArgs,
    direction: Direction,
) {
    let (direction, peer) = match direction {
        Direction::Inbound => ("inbound", "src"),
        Direction::Outbound => ("outbound", "dst"),
    };
    for grown in &change.counters {
        let series = &grown.series;
        if !series.is("direction", direction) {
            continue;
        }
        let Some(workload) = scope.of_series(series) else {
            continue;
        };
        // A flow has two ends: the one towards the other workload is what is shown.
        let is_of_peer = series.is("peer", peer);
        let counted = all.entry(workload).or_default();
        match series.name.as_str() {
            RESPONSES => {
                counted.responses += grown.by;
                if !series.is("classification", "failure") {
                    counted.successes += grown.by;
                }
            }
            LATENCIES => counted.buckets.add(series, grown.by),
            READ if is_of_peer => counted.read_bytes += grown.by,
            WRITTEN if is_of_peer => counted.written_bytes += grown.by,
            _ => {}
        }
    }
    for (series, open) in view.of(CONNECTIONS) {
        if series.is("direction", direction)
            && series.is("peer", peer)
            && let Some(workload) = scope.of_series(series)
        {
            all.entry(workload).or_default().connections += open;
        }
    }
}

impl Counted {
    fn row(self, workload: Workload, change: &Change) -> Row {
        let routed = self.routed.as_ref();
        Row {
            namespace: workload.namespace,
            kind: workload.kind,
            name: workload.name,
            pods_meshed: self.pods_meshed,
            pods: self.pods,
            success_rate: (self.responses > 0.0).then(|| self.successes / self.responses),
            requests_per_second: change.per_second(self.responses),
            latency_ms: self.buckets.latencies(1.0),
            timeouts_per_second: routed.map(|it| it.whole.numbers(change).timeouts_per_second),
            retries_per_second: routed.map(|it| change.per_second(it.retries)),
            tcp_connections: self.connections,
            tcp_read_bytes_per_second: change.per_second(self.read_bytes),
            tcp_write_bytes_per_second: change.per_second(self.written_bytes),
        }
    }
}

impl Row {
    fn cells(&self) -> Vec<Cell> {
        let number = |text: String| Cell::new(text).right();
        let meshed = format!("{}/{}", self.pods_meshed, self.pods);
        let meshed = number(meshed).tone(match self.pods_meshed == self.pods {
            true => Tone::Plain,
            false => Tone::Warn,
        });
        let mut cells = vec![
            shown(&self.namespace).into(),
            shown(&format!("{}/{}", self.kind, self.name)).into(),
            meshed,
            success_cell(self.success_rate),
            rate_cell(self.requests_per_second),
            latency_cell(self.latency_ms.p50),
            latency_cell(self.latency_ms.p95),
            latency_cell(self.latency_ms.p99),
        ];
        cells.extend(self.timeouts_per_second.map(unwanted_cell));
        cells.extend(self.retries_per_second.map(rate_cell));
        cells.extend([
            number(format!("{:.0}", self.tcp_connections)),
            number(output::bytes(self.tcp_read_bytes_per_second)),
            number(output::bytes(self.tcp_write_bytes_per_second)),
        ]);
        cells
    }
}

fn success_cell(rate: Option<f64>) -> Cell {
    let Some(rate) = rate else {
        return Cell::new("-").right();
    };
    let cell = Cell::new(format!("{:.2}%", rate * 100.0)).right();
    cell.tone(match rate {
        rate if rate >= 0.999 => Tone::Good,
        rate if rate >= 0.95 => Tone::Warn,
        _ => Tone::Bad,
    })
}

fn latency_cell(ms: Option<f64>) -> Cell {
    Cell::new(ms.map_or("-".to_owned(), |it| format!("{it:.1}ms"))).right()
}

/// How often something was that there should be none of.
fn unwanted_cell(per_second: f64) -> Cell {
    match per_second > 0.0 {
        true => rate_cell(per_second).tone(Tone::Warn),
        false => rate_cell(per_second),
    }
}

fn rate_cell(per_second: f64) -> Cell {
    Cell::new(format!("{per_second:.1}")).right()
}
