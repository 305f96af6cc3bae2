//! The repository's commands, run as `cargo xtask <command>`.
//!
//! Only the command line lives here. What a command does is in the module of its name; what a
//! machine must have for it is in [`setup`]. Every command sets up what it lacks, says what it
//! installs and why, and does not repeat it the second time.

mod bpf;
mod process;
mod setup;
mod ui;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::workspace::Workspace;

fn main() -> ExitCode {
    let command = Cli::parse().command;
    match run(command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            ui::failure(&error);
            ExitCode::FAILURE
        }
    }
}

/// Builds, tests and shows Weft; sets up the toolchain and the packages that this needs.
#[derive(Parser)]
#[command(bin_name = "cargo xtask", version, about)]
struct Cli {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Build the kernel programs into target/bpf
    ///
    /// Uses a rustup nightly that has rust-src, or Debian's rustc-web with rust-web-src, and a
    /// bpf-linker whose LLVM is as new as the compiler's. Installs what is missing: packages by
    /// apt-get (needs root), bpf-linker into target/tools.
    BuildEbpf {
        /// Compile the programs' log statements in, for debugging with aya-log
        #[arg(long)]
        debug_log: bool,
    },
}

fn run(task: Task) -> anyhow::Result<()> {
    let workspace = Workspace::of_this_build();
    match task {
        Task::BuildEbpf { debug_log } => bpf::build(&workspace, debug_log),
    }
}
