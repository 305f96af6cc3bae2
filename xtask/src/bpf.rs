//! `build-ebpf`: the kernel programs of `ebpf/`, built for the kernel's instruction set and put
//! where the agent's build script embeds them from.

use std::{env, fs, path::Path};

use anyhow::{Context as _, Result};

use crate::{process, setup::bpf_toolchain::BpfToolchain, ui, workspace::Workspace};

/// Builds every object; installs the toolchain first if there is none.
pub(crate) fn build(workspace: &Workspace, debug_log: bool) -> Result<()> {
    let features: &[&str] = if debug_log {
        &["--features", DEBUG_LOG_FEATURE]
    } else {
        &[]
    };
    build_with(workspace, features, &workspace.bpf_objects())
}

/// Builds the agent with another layout of the kernel's maps, which upgrades are tested with, and with faults,
/// and the kernel programs that it embeds. A debug build: of the crates that it depends on, the tests need the
/// same.
pub(crate) fn build_next_layout(workspace: &Workspace) -> Result<()> {
    let objects = workspace.path("target/bpf-next-layout");
    build_with(workspace, &["--features", NEXT_LAYOUT_FEATURE], &objects)?;
    let mut cargo = workspace.cargo();
    cargo
        .args(["build", "--workspace", "--bin", NEXT_LAYOUT_AGENT])
        .args(["--features", "weft-agent/next-layout,weft-agent/faults"])
        .env_remove("WEFT_BPF_DIR");
    process::run(&mut cargo)
}

/// Builds every object, and fails on a compiler warning.
pub(crate) fn build_for_test(workspace: &Workspace) -> Result<()> {
    // By configuration rather than by a compiler flag, which would rebuild `core`.
    build_with(
        workspace,
        &["-Z", "warnings", "--config", "build.warnings=\"deny\""],
        &workspace.bpf_objects(),
    )
}

fn build_with(workspace: &Workspace, arguments: &[&str], objects: &Path) -> Result<()> {
    let toolchain = BpfToolchain::find_or_install(workspace)?;
    ui::note(&format!(
        "rustc {} ({}), {}",
        toolchain.compiler.version,
        toolchain.compiler.rustc.display(),
        toolchain.linker.path.display()
    ));
    let target = workspace.path("target/ebpf");
    let mut cargo = toolchain.cargo(&workspace.path("ebpf"));
    cargo
        .args(["build", "--release", "--bins"])
        .args(["-Z", "build-std=core", "--target", BPF_TARGET])
        .arg("--target-dir")
        .arg(&target)
        .env(
            "CARGO_ENCODED_RUSTFLAGS",
            rustflags(&toolchain.linker.path).join("\x1f"),
        )
        .args(arguments);
    process::run(&mut cargo).context("the kernel programs do not build")?;
    let built = target.join(BPF_TARGET).join("release");
    for program in OBJECTS {
        let object = objects.join(format!("{program}.o"));
        let state = if copy_if_changed(&built.join(program), &object)? {
            "written"
        } else {
            "unchanged"
        };
        ui::note(&format!("{} {state}", object.display()));
    }
    Ok(())
}

/// The object's debug information becomes its BTF, which the socket storage maps need.
fn rustflags(linker: &Path) -> Vec<String> {
    vec![
        format!("--cfg=bpf_target_arch=\"{}\"", env::consts::ARCH),
        "-Cdebuginfo=2".to_owned(),
        format!("-Clinker={}", linker.display()),
        "-Clink-arg=--btf".to_owned(),
    ]
}

/// Copies a file unless the target is the same already, so that what is built from it stays built.
/// Returns whether it wrote.
fn copy_if_changed(from: &Path, to: &Path) -> Result<bool> {
    let content = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
    if fs::read(to).is_ok_and(|present| present == content) {
        return Ok(false);
    }
    if let Some(folder) = to.parent() {
        fs::create_dir_all(folder)
            .with_context(|| format!("cannot create {}", folder.display()))?;
    }
    fs::write(to, content).with_context(|| format!("cannot write {}", to.display()))?;
    Ok(true)
}

const BPF_TARGET: &str = "bpfel-unknown-none";
/// The programs' binaries, one object each.
const OBJECTS: [&str; 2] = ["weft-cgroup", "weft-lookup"];
/// The feature of `ebpf/` that compiles the log statements in.
const DEBUG_LOG_FEATURE: &str = "debug-log";
/// The feature that changes the layouts, of `ebpf/` and of the agent, and the agent that it makes.
const NEXT_LAYOUT_FEATURE: &str = "next-layout";
const NEXT_LAYOUT_AGENT: &str = "weft-agent-next-layout";

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;

    #[test]
    fn an_unchanged_object_is_not_touched() {
        let folder = env::temp_dir().join(format!("weft-xtask-copy-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let (from, to) = (folder.join("from"), folder.join("below/to"));
        fs::write(&from, "one").unwrap();
        assert!(copy_if_changed(&from, &to).unwrap());
        let old = SystemTime::UNIX_EPOCH;
        fs::File::open(&to).unwrap().set_modified(old).unwrap();
        assert!(!copy_if_changed(&from, &to).unwrap());
        assert_eq!(to.metadata().unwrap().modified().unwrap(), old);
        fs::write(&from, "two").unwrap();
        assert!(copy_if_changed(&from, &to).unwrap());
        assert_eq!(fs::read(&to).unwrap(), b"two");
        fs::remove_dir_all(folder).unwrap();
    }
}
