//! The node agent's process: reads the configuration, puts the parts together, waits for a signal,
//! drains. Everything else is in the library.

use std::process::ExitCode;

use clap::Parser;
use weft_agent::config::{Cli, Command};
use weft_agent::run;

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Run(config) => run::run(*config),
        Command::Uninstall(config) => run::uninstall(&config),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("weft-agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}
