//! The program `weft`: reads the command line, and hands over to the library.

use std::io::ErrorKind;
use std::process::ExitCode;

use clap::Parser;
use weft::command::Cli;
use weft::outcome::Outcome;

fn main() -> ExitCode {
    match weft::run(Cli::parse()) {
        Ok(outcome) => outcome.into(),
        // Who reads no further, as `head`, knows enough.
        Err(weft::Error::Output(error)) if error.kind() == ErrorKind::BrokenPipe => {
            Outcome::Unknown.into()
        }
        Err(error) => {
            eprintln!("weft: {error}");
            Outcome::Unknown.into()
        }
    }
}
