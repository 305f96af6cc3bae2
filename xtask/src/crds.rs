//! `crds`: the custom resource definitions in `daemonset/crds` and in the component `crds-linkerd`, which the controller
//! derives from the types that it parses.

use std::{
    collections::BTreeMap,
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use crate::{process, ui, workspace::Workspace};

/// Writes the definitions, or checks those in the repository, by a controller built now.
pub(crate) fn run(workspace: &Workspace, check_only: bool) -> Result<()> {
    process::run(
        workspace
            .cargo()
            .args(["build", "--workspace", "--bin", CONTROLLER]),
    )?;
    let controller = workspace.debug_programs().join(CONTROLLER);
    if check_only {
        return check(workspace, &controller);
    }
    for (committed, flags) in COMMITTED {
        let committed = workspace.path(committed);
        fs::create_dir_all(&committed)
            .with_context(|| format!("cannot create {}", committed.display()))?;
        generate(&controller, &committed, flags)?;
        ui::note(&format!("written to {}", committed.display()));
    }
    Ok(())
}

/// Fails if the definitions in the repository are not what `controller` writes.
pub(crate) fn check(workspace: &Workspace, controller: &Path) -> Result<()> {
    for (committed, flags) in COMMITTED {
        let committed = workspace.path(committed);
        let fresh = Scratch::new()?;
        generate(controller, &fresh.0, flags)?;
        let differences = differences(&manifests(&committed)?, &manifests(&fresh.0)?);
        if !differences.is_empty() {
            bail!(
                "{} is out of date (run `cargo xtask crds`):\n{}",
                committed.display(),
                differences.join("\n")
            );
        }
        ui::note(&format!("{} is up to date", committed.display()));
    }
    Ok(())
}

fn generate(controller: &Path, folder: &Path, flags: &[&str]) -> Result<()> {
    let mut command = Command::new(controller);
    process::run(command.args(["crds", "--dir"]).arg(folder).args(flags))
}

/// The YAML files of a folder by name; none if there is no such folder.
fn manifests(folder: &Path) -> Result<BTreeMap<String, String>> {
    if !folder.exists() {
        return Ok(BTreeMap::new());
    }
    let mut manifests = BTreeMap::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        // kustomize's list of the files is written by hand.
        if path
            .extension()
            .is_some_and(|extension| extension == "yaml")
            && name != "kustomization.yaml"
        {
            manifests.insert(name.into_owned(), fs::read_to_string(&path)?);
        }
    }
    Ok(manifests)
}

fn differences(
    committed: &BTreeMap<String, String>,
    fresh: &BTreeMap<String, String>,
) -> Vec<String> {
    let missing = fresh
        .keys()
        .filter(|name| !committed.contains_key(*name))
        .map(|name| format!("  - {name} is missing"));
    let stale = committed
        .iter()
        .filter_map(|(name, text)| match fresh.get(name) {
            None => Some(format!("  - {name} is of no type any more")),
            Some(fresh) if fresh != text => Some(format!("  - {name} differs")),
            Some(_) => None,
        });
    missing.chain(stale).collect()
}

/// The controller's program.
pub(crate) const CONTROLLER: &str = "weft-controller";
/// Where definitions are, and how the controller is told to write them.
const COMMITTED: [(&str, &[&str]); 2] = [
    ("daemonset/crds", &[]),
    ("daemonset/components/crds-linkerd", &["--of-linkerd"]),
];

/// A folder that is removed when it goes out of scope.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Result<Self> {
        let folder = env::temp_dir().join(format!("weft-xtask-crds-{}", std::process::id()));
        fs::create_dir_all(&folder)
            .with_context(|| format!("cannot create {}", folder.display()))?;
        Ok(Self(folder))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // A temporary folder that stays harms nobody.
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifests(files: &[(&str, &str)]) -> BTreeMap<String, String> {
        files
            .iter()
            .map(|(name, text)| ((*name).to_owned(), (*text).to_owned()))
            .collect()
    }

    #[test]
    fn differences_name_each_file() {
        let committed = manifests(&[("same.yaml", "1"), ("old.yaml", "1"), ("changed.yaml", "1")]);
        let fresh = manifests(&[("same.yaml", "1"), ("new.yaml", "1"), ("changed.yaml", "2")]);
        assert_eq!(
            differences(&committed, &fresh),
            [
                "  - new.yaml is missing",
                "  - changed.yaml differs",
                "  - old.yaml is of no type any more"
            ]
        );
        assert!(differences(&fresh, &fresh).is_empty());
    }
}
