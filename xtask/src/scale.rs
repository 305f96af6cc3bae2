//! `scale`: builds what is shipped, and becomes the program that measures it in a large cluster.

use std::{os::unix::process::CommandExt as _, path::PathBuf, process::Command};

use anyhow::{Context as _, Result};
use clap::Args;

use crate::{
    bpf,
    setup::{kernel, packages},
    steps::Steps,
    test,
    workspace::Workspace,
};

/// What the program is asked for.
#[derive(Args)]
pub(crate) struct Options {
    /// A tenth of everything: half a minute
    #[arg(long)]
    quick: bool,
    /// Simulated agents only: needs no root, and no kernel programs
    #[arg(long)]
    no_agent: bool,
    /// Write the rows to this file too
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Does not return where all goes well: the program takes this process's place, so that any signal reaches it,
/// and its exit code is the command's.
pub(crate) fn run(workspace: &Workspace, options: &Options) -> Result<()> {
    let mut steps = Steps::start();
    if !options.no_agent {
        steps.step("root and kernel", kernel::check)?;
        steps.step("programs for virtual nodes", packages::ensure)?;
    }
    steps.step("kernel programs", || bpf::build(workspace, false))?;
    steps.step("agent, controller and the program that measures", || {
        test::release_build(workspace)
    })?;
    steps.finish();
    let programs = workspace.release_programs();
    let mut scale = Command::new(programs.join(SCALE));
    scale.env("WEFT_BIN_DIR", &programs);
    if options.quick {
        scale.arg("--quick");
    }
    if options.no_agent {
        scale.arg("--no-agent");
    }
    if let Some(file) = &options.json {
        scale.arg("--json").arg(file);
    }
    Err(scale.exec()).context("cannot start the program")
}

const SCALE: &str = "weft-scale";
