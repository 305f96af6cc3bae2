//! Cargo's subcommands that the checks use, installed for this repository alone.

use std::path::PathBuf;

use anyhow::Result;

use crate::{process, ui, workspace::Workspace};

/// A cargo subcommand, and why it is wanted.
pub(crate) struct CargoTool {
    pub(crate) name: &'static str,
    pub(crate) version: &'static str,
    pub(crate) reason: &'static str,
}

impl CargoTool {
    /// The program: the repository's own, else the user's, else one installed now.
    pub(crate) fn find_or_install(&self, workspace: &Workspace) -> Result<PathBuf> {
        let own = workspace.tools().join("bin").join(self.name);
        if own.is_file() {
            return Ok(own);
        }
        if let Some(users) = process::in_path(self.name) {
            return Ok(users);
        }
        ui::note(&format!(
            "building {} {} into {}: {} (takes a few minutes, once)",
            self.name,
            self.version,
            workspace.tools().display(),
            self.reason
        ));
        let mut cargo = workspace.cargo();
        process::run(
            process::own_toolchain(&mut cargo)
                .args(["install", self.name, "--locked", "--version", self.version])
                .arg("--root")
                .arg(workspace.tools()),
        )?;
        Ok(own)
    }
}
