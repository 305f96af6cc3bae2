//! A tenth of what `cargo xtask scale` measures: whatever becomes of the pods of a cluster, all agents have what its
//! objects say in the end. How long anything takes is not looked at here.

use std::time::Duration;

use anyhow::{Result, ensure};
use weft_tests::command::Program;

/// The program compares; it fails if an agent lacks an endpoint, has one that is gone, or lost its stream.
#[test]
fn agents_have_what_a_large_cluster_has() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let program = Program::new(env!("CARGO_BIN_EXE_weft-scale"), None, None, folder.path())?;
    let finished = program.arg("--quick").output(DEADLINE)?;
    let table = finished.success()?;
    println!("{table}");
    ensure!(table.contains("`delay-p50`"), "no table: {table}");
    Ok(())
}

/// Some twenty seconds on an idle machine.
const DEADLINE: Duration = Duration::from_secs(300);
