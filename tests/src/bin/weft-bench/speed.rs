//! The rows that compare: each load without the mesh and with it, again and again.

use std::path::Path;
use std::time::Instant;

use anyhow::Result;
use weft_tests::usage::peak_bytes;

use crate::budget::Budget;
use crate::load::{self, Measured};
use crate::machine::forget_peak;
use crate::report::Report;
use crate::rows::{Load, Protocol, ROWS, Route, Selection};
use crate::stage::Stage;

/// Measures all rows of this kind that are asked for.
pub(crate) fn measure(selection: &Selection, budget: &Budget, report: &mut Report) {
    let loads: Vec<Load> = LOADS
        .into_iter()
        .filter(|load| selection.needs(*load))
        .collect();
    if loads.is_empty() {
        return;
    }
    budget.tell("two nodes, meshed pods and their twins outside of the mesh");
    if let Err(error) = repeat(selection, &loads, budget, report) {
        report.fail("the nodes", &error);
    }
}

fn repeat(
    selection: &Selection,
    loads: &[Load],
    budget: &Budget,
    report: &mut Report,
) -> Result<()> {
    let stage = Stage::set()?;
    let cgroup = stage.cgroup()?;
    for repetition in 0..budget.runs {
        let (start, repeats_before) = (Instant::now(), budget.spent());
        for route in selection.routes() {
            for load in loads {
                let meter = Comparison {
                    stage: &stage,
                    cgroup: &cgroup,
                    budget,
                    route,
                    load: *load,
                };
                let result = meter.run(repetition % 2 == 1, selection, report);
                if let Err(error) = result {
                    let what = format!("{} {load:?}", route.name());
                    budget.tell(&format!("{what} failed: {error:#}"));
                    report.fail(&what, &error);
                }
            }
        }
        let repeats = budget.spent().saturating_sub(repeats_before);
        let undisturbed = start.elapsed().saturating_sub(repeats);
        if repetition + 1 < budget.runs && !budget.allows(undisturbed) {
            budget.tell("no time for another repetition");
            report.note(format!(
                "{} of {} repetitions: the time was up.",
                repetition + 1,
                budget.runs
            ));
            break;
        }
    }
    Ok(())
}

/// One load on one route, both ways.
struct Comparison<'a> {
    stage: &'a Stage,
    cgroup: &'a Path,
    budget: &'a Budget,
    route: Route,
    load: Load,
}

impl Comparison<'_> {
    fn run(&self, mesh_first: bool, selection: &Selection, report: &mut Report) -> Result<()> {
        let (direct, (mesh, peak)) = if mesh_first {
            let mesh = self.mesh(report)?;
            (self.undisturbed(false, report)?, mesh)
        } else {
            (self.undisturbed(false, report)?, self.mesh(report)?)
        };
        let mut told = Vec::new();
        for ((name, direct), (_, mesh)) in direct.values.iter().zip(&mesh.values) {
            told.push(format!("{name} {direct:.3} -> {mesh:.3}"));
            if selection.has(name) {
                report.add(self.route, name, Some(*direct), *mesh);
            }
            if let Some(added) = added_row(name).filter(|added| selection.has(added)) {
                report.add(self.route, added, None, mesh - direct);
            }
        }
        if self.load == Load::Bulk(8) && selection.has("memory-bulk") {
            report.add(self.route, "memory-bulk", None, peak);
        }
        let line = format!("{:<9} {}", self.route.name(), told.join(", "));
        self.budget.tell(&line);
        Ok(())
    }

    /// The load through the mesh, and the most memory that an agent had, in MiB.
    fn mesh(&self, report: &mut Report) -> Result<(Measured, f64)> {
        let agents: Vec<u32> = self
            .stage
            .nodes(self.route)
            .iter()
            .filter_map(|node| node.agent_pid())
            .collect();
        for agent in &agents {
            forget_peak(*agent)?;
        }
        let measured = self.undisturbed(true, report)?;
        let mut peak = 0;
        for agent in &agents {
            peak = peak.max(peak_bytes(*agent)?);
        }
        Ok((measured, peak as f64 / MIB))
    }

    /// Runs the load; again while others disturb it, at most [`MOST_REPEATS`] times and while there
    /// is time to spare. Gives the run that was disturbed least.
    fn undisturbed(&self, meshed: bool, report: &mut Report) -> Result<Measured> {
        // What a tap costs is compared with the mesh without one.
        let is_tapped = self.load == Load::Tapped;
        let _tap = (is_tapped && meshed)
            .then(|| self.stage.tap())
            .transpose()?;
        let pair = self.stage.pair(self.route, meshed || is_tapped);
        let once = || load::run(self.load, pair, self.cgroup, self.budget);
        let start = Instant::now();
        let mut best = once()?;
        let took = start.elapsed();
        let mut repeats = 0;
        while best.usage.is_disturbed() && repeats < MOST_REPEATS && self.budget.spend(took) {
            repeats += 1;
            report.repeated();
            let again = once()?;
            if again.usage.disturbance() < best.usage.disturbance() {
                best = again;
            }
        }
        if best.usage.is_disturbed() {
            report.disturbed(best.usage.stolen, best.usage.foreign);
        }
        Ok(best)
    }
}

/// The row for what the mesh adds to this row's figure.
fn added_row(name: &str) -> Option<&'static str> {
    let load = name.strip_suffix("-p50")?;
    let mut names = ROWS.iter().map(|row| row.name);
    names.find(|name| name.strip_suffix("-added") == Some(load))
}

const LOADS: [Load; 20] = [
    Load::Bulk(1),
    Load::Bulk(4),
    Load::Bulk(8),
    Load::Requests(1),
    Load::Requests(32),
    Load::Latency,
    Load::Exchanges(Protocol::Http1, 1),
    Load::Exchanges(Protocol::Http1, 32),
    Load::ExchangeLatency(Protocol::Http1),
    Load::Exchanges(Protocol::Http2, 1),
    Load::Exchanges(Protocol::Http2, 32),
    Load::ExchangeLatency(Protocol::Http2),
    Load::Exchanges(Protocol::Grpc, 1),
    Load::Exchanges(Protocol::Grpc, 32),
    Load::ExchangeLatency(Protocol::Grpc),
    Load::Tapped,
    Load::Connections,
    Load::ExchangeConnections(Protocol::Http1),
    Load::ExchangeConnections(Protocol::Http2),
    Load::ExchangeConnections(Protocol::Grpc),
];
const MOST_REPEATS: u32 = 2;
pub(crate) const MIB: f64 = 1024.0 * 1024.0;
