//! `cargo xtask bench`: what the mesh costs, against the same applications without it.
//!
//! Two nodes of the harness with the shipped controller and agents; on them meshed pods, and twins
//! of these that are not meshed. Every load runs on both, one right after the other, so that the
//! ratio of a repetition compares like with like while the machine drifts. What is measured, and
//! why so, is in `docs/benchmarks.md`.
//!
//! The clients that no ordinary program could be are subcommands of this program itself, started
//! in the pods; see [`client`].

mod budget;
mod client;
mod fairness;
mod handshakes;
mod load;
mod machine;
mod memory;
mod report;
mod rows;
mod speed;
mod stage;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, Parser};
use weft_tests::run;

use budget::Budget;
use report::Report;
use rows::{Route, Selection, choose};

fn main() -> ExitCode {
    let result = match Command::parse() {
        Command::Run(options) => bench(&options),
        Command::Serve(serve) => serve.run().map(|()| true),
        Command::Latency(latency) => latency.run().map(|()| true),
        Command::Connections(connections) => connections.run().map(|()| true),
        Command::Each(each) => each.run().map(|()| true),
        Command::Hold(hold) => hold.run().map(|()| true),
        Command::Flood(flood) => flood.run().map(|()| true),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("weft-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[derive(Parser)]
#[command(
    name = "weft-bench",
    about = "What the mesh costs, measured on this machine"
)]
enum Command {
    /// Measure, and print the table
    Run(Options),
    /// Answer every byte with a byte
    #[command(hide = true)]
    Serve(client::Serve),
    /// Send requests at a fixed rate and measure how long each takes
    #[command(hide = true)]
    Latency(client::Latency),
    /// Open connections as fast as possible, a request on each
    #[command(hide = true)]
    Connections(client::Connections),
    /// Open one connection to each of many servers
    #[command(hide = true)]
    Each(client::Each),
    /// Open connections and keep them
    #[command(hide = true)]
    Hold(client::Hold),
    /// Take all that the mesh gives
    #[command(hide = true)]
    Flood(client::Flood),
}

/// What to measure.
#[derive(Args)]
struct Options {
    /// Short loads and two repetitions: below five minutes, and noisy
    #[arg(long)]
    quick: bool,
    /// Only these rows, or all whose names begin so: `bulk`, `latency-500`, `memory-idle`
    #[arg(long, value_name = "ROW", value_delimiter = ',')]
    only: Vec<String>,
    /// Only this path
    #[arg(long, value_enum)]
    path: Option<Route>,
    /// How many repetitions
    #[arg(long, value_name = "N")]
    runs: Option<u32>,
    /// Write the rows to this file too
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Whether everything that was asked for was measured.
fn bench(options: &Options) -> Result<bool> {
    let selection = choose(&options.only, options.path)?;
    run::clean_up_on_interrupt()?;
    run::cleanup_stale();
    let budget = Budget::start(options.quick, options.runs);
    let mut report = Report::default();
    measure(&selection, &budget, &mut report);
    println!("{}", report.markdown());
    if let Some(file) = &options.json {
        let text = serde_json::to_string_pretty(&report.json())?;
        std::fs::write(file, text + "\n").with_context(|| format!("writing {}", file.display()))?;
    }
    Ok(report.is_complete())
}

fn measure(selection: &Selection, budget: &Budget, report: &mut Report) {
    speed::measure(selection, budget, report);
    memory::measure(selection, budget, report);
    handshakes::measure(selection, budget, report);
    fairness::measure(selection, budget, report);
}
