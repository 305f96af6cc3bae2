//! `fuzz`: runs the targets of `fuzz/`, each for a while, under the address sanitizer.
//!
//! The sanitizer's flag is unstable; a stable compiler has it too, and `RUSTC_BOOTSTRAP` lets it be
//! used, so that no second toolchain is needed.

use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::{process, setup::cargo_tools::CargoTool, ui, workspace::Workspace};

/// Runs one target, or all of them, for `seconds` each. A crash is an error, and cargo-fuzz prints
/// where its input was saved.
pub(crate) fn run(workspace: &Workspace, target: Option<&str>, seconds: u32) -> Result<()> {
    if !workspace.path("fuzz/Cargo.toml").is_file() {
        bail!("there are no fuzz targets: `fuzz/` does not exist");
    }
    let tool = CARGO_FUZZ.find_or_install(workspace)?;
    let fuzz = |action: &str| {
        let mut command = Command::new(&tool);
        command
            .current_dir(workspace.path("."))
            .args(["fuzz", action, "--fuzz-dir", "fuzz"])
            .env("RUSTC_BOOTSTRAP", "1");
        command
    };
    let known = process::output(&mut fuzz("list"))?;
    let targets: Vec<&str> = known
        .lines()
        .filter(|name| target.is_none_or(|wanted| wanted == *name))
        .collect();
    if targets.is_empty() {
        bail!(
            "no such fuzz target; there are: {}",
            known.replace('\n', " ")
        );
    }
    for name in targets {
        ui::headline(&format!("fuzzing {name} for {seconds} s"));
        process::run(
            fuzz("run")
                .arg("--target-dir")
                .arg(workspace.path("target/fuzz"))
                .args([name, "--", &format!("-max_total_time={seconds}")]),
        )
        .with_context(|| format!("{name} failed: the input is in fuzz/artifacts/{name}"))?;
    }
    Ok(())
}

const CARGO_FUZZ: CargoTool = CargoTool {
    name: "cargo-fuzz",
    version: "^0.13",
    reason: "it builds and runs the fuzz targets",
};
