//! The node agent with another layout of the kernel's maps. Nobody ships it: the tests upgrade from the
//! agent to this one, and back, and have this one panic.

use std::process::ExitCode;

fn main() -> ExitCode {
    weft_agent::main()
}
