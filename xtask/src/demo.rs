//! `demo`: sets the machine up, builds Weft, and becomes the demo program.

use std::{os::unix::process::CommandExt as _, process::Command};

use anyhow::{Context as _, Result};

use crate::{
    bpf,
    setup::{kernel, packages},
    steps::Steps,
    test,
    workspace::Workspace,
};

/// Does not return where all goes well: the demo takes this process's place, so that Ctrl-C and any
/// other signal reach it, and its exit code is the command's.
pub(crate) fn run(workspace: &Workspace, keep: bool, arguments: &[String]) -> Result<()> {
    let mut steps = Steps::start();
    steps.step("root and kernel", kernel::check)?;
    steps.step("programs that the demo runs", packages::ensure)?;
    steps.step("kernel programs", || bpf::build(workspace, false))?;
    steps.step("agent, controller and the demo", || {
        test::release_build(workspace)
    })?;
    steps.finish();
    let programs = workspace.release_programs();
    let error = Command::new(programs.join(DEMO))
        .args(keep.then_some("--keep"))
        .args(arguments)
        .env("WEFT_BIN_DIR", &programs)
        .exec();
    Err(error).context("cannot start the demo program")
}

const DEMO: &str = "weft-demo";
