//! The checks that read the code without running it: format, lints, docs, dependencies. `check`
//! runs the quick ones of them.

use std::process::Command;

use anyhow::{Context as _, Result};

use crate::{bpf, process, setup::cargo_tools::CargoTool, steps::Steps, workspace::Workspace};

/// `check`: what a change should pass before it is committed.
pub(crate) fn quick(workspace: &Workspace) -> Result<()> {
    let mut steps = Steps::start();
    steps.step("format", || format(workspace))?;
    // The agent embeds the objects, and so does not compile without them.
    steps.step("kernel programs", || bpf::build(workspace, false))?;
    steps.step("clippy", || clippy(workspace))?;
    steps.step("docs", || docs(workspace))?;
    steps.finish();
    Ok(())
}

/// The workspace and the kernel programs are formatted.
pub(crate) fn format(workspace: &Workspace) -> Result<()> {
    for graph in [
        ["--all"].as_slice(),
        &["--manifest-path", "ebpf/Cargo.toml"],
    ] {
        process::run(workspace.cargo().args(["fmt", "--check"]).args(graph))
            .context("not formatted as `cargo fmt` would (run it, in ebpf/ too)")?;
    }
    Ok(())
}

/// No lint has anything to say.
pub(crate) fn clippy(workspace: &Workspace) -> Result<()> {
    process::run(
        workspace
            .cargo()
            .args(["clippy", "--workspace", "--all-targets"])
            .args(["--", "-D", "warnings"]),
    )
}

/// The documentation builds, without a broken link.
pub(crate) fn docs(workspace: &Workspace) -> Result<()> {
    process::run(
        workspace
            .cargo()
            .args(["doc", "--workspace", "--no-deps"])
            .env("RUSTDOCFLAGS", "-D warnings"),
    )
}

/// The dependencies' licences, sources and advisories are as `deny.toml` wants them.
///
/// The advisories are a git repository. Where it cannot be fetched, everything else is checked and
/// the returned warning says what was not.
pub(crate) fn dependencies(workspace: &Workspace) -> Result<Option<String>> {
    let deny = CARGO_DENY.find_or_install(workspace)?;
    let deny = || {
        let mut command = Command::new(&deny);
        command.current_dir(workspace.path("."));
        command
    };
    let fetched = process::output(deny().args(["fetch", "db"]));
    let checks: &[&str] = match fetched {
        Ok(_) => &["all"],
        Err(_) => &["bans", "licenses", "sources"],
    };
    for manifest in ["Cargo.toml", "ebpf/Cargo.toml"] {
        process::run(
            deny()
                .args(["--config", "deny.toml", "--manifest-path", manifest])
                .args(["check", "--hide-inclusion-graph"])
                .args(fetched.is_ok().then_some("--disable-fetch"))
                .args(checks),
        )?;
    }
    Ok(fetched.err().map(|error| {
        let cause = error.to_string();
        let cause = cause.lines().last().unwrap_or_default().trim();
        format!(
            "ADVISORIES WERE NOT CHECKED: the database cannot be fetched ({cause}). Dependencies \
             with known vulnerabilities, and yanked ones, would not be noticed. Run this where \
             the database can be reached."
        )
    }))
}

const CARGO_DENY: CargoTool = CargoTool {
    name: "cargo-deny",
    version: "^0.20",
    reason: "it checks the dependencies' licences, sources and advisories",
};
