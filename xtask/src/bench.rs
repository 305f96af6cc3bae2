//! `bench`: sets the machine up, builds what is shipped, and becomes the benchmark program.

use std::{os::unix::process::CommandExt as _, path::PathBuf, process::Command};

use anyhow::{Context as _, Result};
use clap::Args;

use crate::{
    bpf,
    setup::{kernel, packages},
    steps::Steps,
    test,
    workspace::Workspace,
};

/// What the benchmark program is asked for.
#[derive(Args)]
pub(crate) struct Options {
    /// Short loads and two repetitions: below five minutes, and noisy
    #[arg(long)]
    quick: bool,
    /// Only these rows, or all whose names begin so: `bulk`, `latency-500`, `memory-idle`
    #[arg(long, value_name = "ROW", value_delimiter = ',')]
    only: Vec<String>,
    /// Only this path: `across` or `same-node`
    #[arg(long)]
    path: Option<String>,
    /// How many repetitions
    #[arg(long, value_name = "N")]
    runs: Option<u32>,
    /// Write the rows to this file too
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Does not return where all goes well: the benchmark takes this process's place, so that any signal
/// reaches it, and its exit code is the command's.
pub(crate) fn run(workspace: &Workspace, options: &Options) -> Result<()> {
    let mut steps = Steps::start();
    steps.step("root and kernel", kernel::check)?;
    steps.step(
        "programs that the benchmark runs",
        packages::ensure_for_bench,
    )?;
    steps.step("kernel programs", || bpf::build(workspace, false))?;
    steps.step("agent, controller and the benchmark", || {
        test::release_build(workspace)
    })?;
    steps.finish();
    let programs = workspace.release_programs();
    let mut bench = Command::new(programs.join(BENCH));
    bench.arg("run").env("WEFT_BIN_DIR", &programs);
    if options.quick {
        bench.arg("--quick");
    }
    for row in &options.only {
        bench.args(["--only", row]);
    }
    if let Some(path) = &options.path {
        bench.args(["--path", path]);
    }
    if let Some(runs) = options.runs {
        bench.args(["--runs", &runs.to_string()]);
    }
    if let Some(file) = &options.json {
        bench.arg("--json").arg(file);
    }
    Err(bench.exec()).context("cannot start the benchmark program")
}

const BENCH: &str = "weft-bench";
