//! The node agent: loads the kernel programs that redirect the sockets of opted-in pods, and is the
//! proxy that they are redirected to.
//!
//! A connection's life reads top to bottom through the modules: accepted in a pod's namespace
//! ([`node`]) → classified and decided ([`discovery`], [`proxy`]) → connected, through a tunnel with
//! the workload's own certificate ([`identity`]), in the process, or plainly → copied → accounted
//! ([`telemetry`]). No stage reaches back. [`run`] puts the parts together.

pub mod admin;
pub mod balance;
pub mod bpf;
pub mod config;
pub mod discovery;
#[cfg(feature = "faults")]
pub mod faults;
pub mod identity;
pub mod log;
pub mod netns;
pub mod node;
pub mod panics;
pub mod proxy;
pub mod run;
pub mod sources;
pub mod telemetry;

use std::process::ExitCode;

use clap::Parser;

/// The agent's process: reads the configuration, puts the parts together, waits for a signal, drains.
pub fn main() -> ExitCode {
    let done = match config::Cli::parse().command {
        config::Command::Run(config) => run::run(*config),
        config::Command::Uninstall(config) => run::uninstall(&config),
        config::Command::Prepare(config) => run::prepare(&config),
        config::Command::Ask(config) => run::ask(&config),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("weft-agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}
