//! `cargo xtask scale`: how the mesh does in a large cluster.
//!
//! Objects of a cluster with many pods in the tests' API server, the shipped controller that reads them, and for each
//! node an agent: simulated ones, which do all that an agent does on the control stream and nothing else, and a real one.
//! Then pods come, go and change for a while. What is measured, and what of it is the test's own, is in
//! `docs/benchmarks.md`. That agents have everything at the end, and nothing else, is checked in every run.

mod agents;
mod board;
mod churn;
mod cpu;
mod expected;
mod measure;
mod objects;
mod report;
mod stage;
mod watcher;
mod wire;
mod world;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use weft_tests::run;

use world::Size;

fn main() -> ExitCode {
    match scale(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("weft-scale: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// How the mesh does in a large cluster, measured on this machine.
#[derive(Parser)]
#[command(name = "weft-scale")]
struct Options {
    /// A tenth of everything
    #[arg(long)]
    quick: bool,
    /// Simulated agents only: needs no root, and no kernel programs
    #[arg(long)]
    no_agent: bool,
    /// Write the rows to this file too
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

fn scale(options: &Options) -> Result<()> {
    if !options.no_agent {
        run::clean_up_on_interrupt()?;
        run::cleanup_stale();
    }
    let size = match options.quick {
        true => Size::TENTH,
        false => Size::WHOLE,
    };
    let report = measure::measure(size, !options.no_agent)?;
    println!("{}", report.markdown());
    if let Some(file) = &options.json {
        let text = serde_json::to_string_pretty(&report.json())?;
        std::fs::write(file, text + "\n").with_context(|| format!("writing {}", file.display()))?;
    }
    Ok(())
}
