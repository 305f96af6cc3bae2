//! Where things are: the workspace's folders, and the cargo that works in them.

use std::{
    env,
    ffi::OsString,
    path::{Path, PathBuf},
    process::Command,
};

/// The repository that this program was built in.
pub(crate) struct Workspace {
    root: PathBuf,
}

impl Workspace {
    /// The workspace whose `xtask/` folder this program was compiled from.
    pub(crate) fn of_this_build() -> Self {
        let xtask = Path::new(env!("CARGO_MANIFEST_DIR"));
        Self {
            root: xtask.parent().unwrap_or(xtask).to_path_buf(),
        }
    }

    /// A path inside the repository.
    pub(crate) fn path(&self, relative: &str) -> PathBuf {
        self.root.join(relative)
    }

    /// Tools that were installed for this repository alone.
    pub(crate) fn tools(&self) -> PathBuf {
        self.path("target/tools")
    }

    /// The kernel programs' objects, which the agent's build script embeds.
    pub(crate) fn bpf_objects(&self) -> PathBuf {
        self.path("target/bpf")
    }

    /// Where the programs of a release build are, which are [linked statically](Workspace::static_cargo).
    pub(crate) fn release_programs(&self) -> PathBuf {
        self.static_programs("release")
    }

    /// Where those of any other profile's folder are.
    pub(crate) fn static_programs(&self, folder: &str) -> PathBuf {
        self.cargo_target().join(STATIC_TARGET).join(folder)
    }

    /// Where cargo puts the programs of a debug build.
    pub(crate) fn debug_programs(&self) -> PathBuf {
        self.cargo_target().join("debug")
    }

    fn cargo_target(&self) -> PathBuf {
        env::var_os("CARGO_TARGET_DIR")
            .map_or_else(|| self.path("target"), |folder| self.root.join(folder))
    }

    /// A cargo command in the workspace's root, by the cargo that runs this program.
    pub(crate) fn cargo(&self) -> Command {
        let mut cargo = Command::new(cargo_program());
        cargo.current_dir(&self.root);
        if env::var_os("CI").is_some() {
            // A fresh clone is built once: what incremental compilation writes would never be read.
            cargo.env("CARGO_INCREMENTAL", "0");
        }
        cargo
    }

    /// A cargo command whose programs need no libraries at run time: what is shipped. With a target that is named,
    /// though it is this machine's, flags are not for what runs during the build, of which some must be libraries.
    pub(crate) fn static_cargo(&self, command: &str) -> Command {
        let flags = format!(r#"target.{STATIC_TARGET}.rustflags=["-Ctarget-feature=+crt-static"]"#);
        let mut cargo = self.cargo();
        cargo.args([command, "--target", STATIC_TARGET, "--config", &flags]);
        cargo
    }
}

/// glibc and not musl: its allocator and its copying are those that were measured, and since 2.34 it looks names up
/// without loading a library.
#[cfg(target_arch = "x86_64")]
const STATIC_TARGET: &str = "x86_64-unknown-linux-gnu";
#[cfg(target_arch = "aarch64")]
const STATIC_TARGET: &str = "aarch64-unknown-linux-gnu";

/// The cargo that started this program, or the one in `PATH`.
pub(crate) fn cargo_program() -> OsString {
    env::var_os("CARGO").unwrap_or_else(|| "cargo".into())
}
