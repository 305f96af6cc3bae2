//! The program: the plugin where a runtime calls it, which says so by `CNI_COMMAND`; else what installs it.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;
use weft_cni::install::{self, Cli};
use weft_cni::plugin::{self, Host};

fn main() -> ExitCode {
    if std::env::var_os("CNI_COMMAND").is_some() {
        let variable = |name: &str| std::env::var_os(name);
        return plugin::run(variable, std::io::stdin(), std::io::stdout(), &Host);
    }
    match install::run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("weft-cni: {error}");
            ExitCode::FAILURE
        }
    }
}
