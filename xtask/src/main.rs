//! The repository's commands, run as `cargo xtask <command>`.
//!
//! Only the command line lives here. What a command does is in the module of its name; what a
//! machine must have for it is in [`setup`]. Every command sets up what it lacks, says what it
//! installs and why, and does not repeat it the second time.

mod bench;
mod bpf;
mod checks;
mod crds;
mod demo;
mod fuzz;
mod image;
mod lanes;
mod manifests;
mod process;
mod scale;
mod setup;
mod soak;
mod steps;
mod test;
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
#[command(bin_name = "cargo xtask", version)]
struct Cli {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Show Weft on this machine: two virtual nodes, real programs, and the evidence
    ///
    /// Installs the packages it needs, builds everything, then runs the demo. Needs root and a
    /// kernel of 5.15 or newer with cgroup v2. Exits with 0 only if all that was shown was true.
    Demo {
        /// Leave the nodes up at the end, and print commands to play with
        #[arg(long)]
        keep: bool,
        /// Further arguments for the demo program
        #[arg(last = true)]
        arguments: Vec<String>,
    },
    /// Run every check and every test, as continuous integration does
    ///
    /// In this order, stopping at the first failure: root and kernel, programs for the tests,
    /// format, kernel programs, clippy, docs, dependencies, unit tests, release build, custom resource
    /// definitions, the agent of another layout, end-to-end and adversarial tests, fuzzing. Installs what is missing. Needs root.
    Test {
        /// Run only the tests whose names contain this, and none of the other checks
        filter: Option<String>,
    },
    /// Measure what the mesh costs: the same loads with and without it, on two virtual nodes
    ///
    /// Installs the programs it needs, builds what is shipped, measures for about half an hour, and
    /// prints a table in Markdown. Needs root, and a machine that does nothing else meanwhile.
    /// docs/benchmarks.md says what the rows are.
    Bench(bench::Options),
    /// Measure how the mesh does in a large cluster: 1,000 Services, 20,000 pods, 200 agents, 200 changes a second
    ///
    /// Builds what is shipped, measures for two minutes, and prints a table in Markdown. Exits with 0 only if all agents
    /// had everything at the end, and nothing else. Needs root, and a machine that does nothing else meanwhile.
    /// docs/benchmarks.md says what the rows are.
    Scale(scale::Options),
    /// Run what must hold for long, and print a table of how it went
    ///
    /// An hour, all together. Needs root. Exits with 0 only if all held. CONTRIBUTING.md says what is
    /// looked at.
    Soak(soak::Options),
    /// Check format, lints and docs: the quick part of `test`
    Check,
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
    /// Build the agent that upgrades between two layouts of the kernel's maps are tested with
    ///
    /// target/debug/weft-agent-next-layout, which nobody ships; see CONTRIBUTING.md.
    BuildNextLayout,
    /// Write daemonset/crds and the component crds-linkerd from the controller's types
    Crds {
        /// Write nothing; fail if the files are not what would be written
        #[arg(long)]
        check: bool,
    },
    /// Write daemonset/weft.yaml, all manifests as one file, and the rules for the Prometheus Operator
    Manifests {
        /// Write nothing; fail if the file is not what would be written
        #[arg(long)]
        check: bool,
    },
    /// Build the image that a cluster runs, as an archive: needs no container engine
    ///
    /// An OCI image layout, for `ctr images import` and the like, with the statically linked programs and nothing else.
    Image(image::Options),
    /// Run the fuzz targets, each for a while
    ///
    /// Builds them with the address sanitizer, and all that they use with instrumentation, which takes
    /// some minutes the first time. Starts from fuzz/corpus. An input that fails is saved in
    /// fuzz/artifacts.
    Fuzz(fuzz::Options),
}

fn run(task: Task) -> anyhow::Result<()> {
    let workspace = Workspace::of_this_build();
    match task {
        Task::Demo { keep, arguments } => demo::run(&workspace, keep, &arguments),
        Task::Test { filter } => test::run(&workspace, filter.as_deref()),
        Task::Bench(options) => bench::run(&workspace, &options),
        Task::Scale(options) => scale::run(&workspace, &options),
        Task::Soak(options) => soak::run(&workspace, &options),
        Task::Check => checks::quick(&workspace),
        Task::BuildEbpf { debug_log } => bpf::build(&workspace, debug_log),
        Task::BuildNextLayout => bpf::build_next_layout(&workspace),
        Task::Crds { check } => crds::run(&workspace, check),
        Task::Manifests { check } => manifests::run(&workspace, check),
        Task::Image(options) => image::run(&workspace, &options),
        Task::Fuzz(options) => fuzz::run(&workspace, &options),
    }
}
