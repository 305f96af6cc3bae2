//! `test`: everything that continuous integration runs, in the order in which it is cheapest to
//! fail, and stopping at the first failure.

use std::{fs, process::Command};

use anyhow::{Context as _, Result, bail};

use crate::{
    bpf, checks, crds, process,
    setup::{kernel, packages},
    steps::Steps,
    workspace::Workspace,
};

/// Runs all checks and all tests; with a filter, only the tests whose names contain it, and what
/// must be built for them.
pub(crate) fn run(workspace: &Workspace, filter: Option<&str>) -> Result<()> {
    let mut steps = Steps::start();
    steps.step("root and kernel", kernel::check)?;
    steps.step("programs for the tests", packages::ensure)?;
    if filter.is_none() {
        steps.step("format", || checks::format(workspace))?;
    }
    steps.step("kernel programs", || bpf::build_for_test(workspace))?;
    if filter.is_none() {
        steps.step("clippy", || checks::clippy(workspace))?;
        steps.step("docs", || checks::docs(workspace))?;
        steps.step_with_warning("dependencies", || checks::dependencies(workspace))?;
    }
    steps.step("unit tests", || unit(workspace, filter))?;
    if filter.is_none() {
        steps.step("custom resource definitions", || crds::run(workspace, true))?;
    }
    steps.step("release build", || release_build(workspace))?;
    steps.step("end-to-end tests", || end_to_end(workspace, filter))?;
    steps.finish();
    Ok(())
}

/// Builds the programs that Weft ships, which the demo and the end-to-end tests run.
pub(crate) fn release_build(workspace: &Workspace) -> Result<()> {
    process::run(workspace.cargo().args([
        "build",
        "--release",
        "-p",
        "weft-agent",
        "-p",
        "weft-controller",
    ]))
}

/// The tests that share nothing with each other: those of the pure crates, and the ones inside the
/// two that also have tests of the whole machine.
fn unit(workspace: &Workspace, filter: Option<&str>) -> Result<()> {
    let mut pure = test_command(workspace);
    pure.arg("--workspace");
    for package in WHOLE_MACHINE {
        pure.args(["--exclude", package]);
    }
    let mut inside = test_command(workspace);
    let mut docs = test_command(workspace);
    for command in [&mut inside, &mut docs] {
        for package in WHOLE_MACHINE {
            command.args(["-p", package]);
        }
    }
    inside.args(["--lib", "--bins"]);
    docs.arg("--doc");
    for command in [&mut pure, &mut inside, &mut docs] {
        process::run(command.args(filter))?;
    }
    Ok(())
}

/// The tests of the whole machine, one at a time: they share its kernel.
fn end_to_end(workspace: &Workspace, filter: Option<&str>) -> Result<()> {
    for package in WHOLE_MACHINE {
        if !has_integration_tests(workspace, package)? {
            bail!("{package} has no end-to-end tests, which cannot be right");
        }
        process::run(
            test_command(workspace)
                .args(["-p", package, "--test", "*"])
                .args(filter)
                .args(["--", "--test-threads=1"])
                .env("WEFT_BIN_DIR", workspace.release_programs()),
        )?;
    }
    Ok(())
}

fn has_integration_tests(workspace: &Workspace, package: &str) -> Result<bool> {
    let folder = workspace.path(&format!("{}/tests", package.trim_start_matches("weft-")));
    if !folder.exists() {
        return Ok(false);
    }
    let entries =
        fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))?;
    Ok(entries.flatten().any(|entry| {
        entry
            .path()
            .extension()
            .is_some_and(|extension| extension == "rs")
    }))
}

fn test_command(workspace: &Workspace) -> Command {
    let mut cargo = workspace.cargo();
    cargo.arg("test");
    cargo
}

/// The packages whose `tests/` need root and the machine to themselves.
const WHOLE_MACHINE: [&str; 2] = ["weft-agent", "weft-tests"];
