//! The node agent's process.

use std::process::ExitCode;

fn main() -> ExitCode {
    weft_agent::main()
}
