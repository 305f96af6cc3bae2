//! The toolchain of the kernel programs: a compiler that can build `core` for
//! `bpfel-unknown-none`, and a `bpf-linker` whose LLVM reads what that compiler writes.
//!
//! Two kinds of compilers are looked for: rustup's nightlies that have `rust-src`, and the system's
//! `/usr/bin/rustc` with its sources (Debian's `rustc-web` and `rust-web-src`). A stable compiler
//! will do: what it withholds is only its unstable flags, and `RUSTC_BOOTSTRAP` gives those.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use crate::{
    process,
    setup::debian::{self, Package},
    ui,
    workspace::{Workspace, cargo_program},
};

/// A compiler and a linker that fit together.
pub(crate) struct BpfToolchain {
    pub(crate) compiler: Compiler,
    pub(crate) linker: Linker,
}

impl BpfToolchain {
    /// Finds a toolchain, or sets one up.
    pub(crate) fn find_or_install(workspace: &Workspace) -> Result<Self> {
        if let Some(toolchain) = Self::find(workspace) {
            return Ok(toolchain);
        }
        let compiler = match compilers().into_iter().find(Compiler::can_get_linker) {
            Some(compiler) => compiler,
            None => install_compiler()?,
        };
        let linker = install_linker(workspace, compiler.llvm)?;
        Ok(Self { compiler, linker })
    }

    /// A cargo command that builds with this toolchain, in `folder`.
    pub(crate) fn cargo(&self, folder: &Path) -> Command {
        let mut cargo = Command::new(&self.compiler.cargo);
        process::own_toolchain(&mut cargo)
            .current_dir(folder)
            .env("RUSTC", &self.compiler.rustc)
            .env("RUSTC_BOOTSTRAP", "1");
        cargo
    }

    fn find(workspace: &Workspace) -> Option<Self> {
        let linkers = linkers(workspace);
        compilers().into_iter().find_map(|compiler| {
            let linker = linkers.iter().find(|linker| linker.reads(&compiler))?;
            Some(Self {
                linker: linker.clone(),
                compiler,
            })
        })
    }
}

/// A Rust compiler that has the source of `core`.
pub(crate) struct Compiler {
    pub(crate) rustc: PathBuf,
    /// The cargo to use with it. Debian has none for `rustc-web`; there it is the user's.
    cargo: PathBuf,
    /// As in `1.96.0`.
    pub(crate) version: String,
    /// The major version of its LLVM.
    llvm: u32,
}

impl Compiler {
    /// A compiler, if the file exists, runs, and has the source of `core` beside it.
    fn probe(rustc: PathBuf, cargo: PathBuf) -> Option<Self> {
        if !rustc.is_file() {
            return None;
        }
        let ask = |argument: &str, value: &str| {
            let mut command = Command::new(&rustc);
            process::own_toolchain(&mut command).args([argument, value]);
            process::output(&mut command).ok()
        };
        let sysroot = ask("--print", "sysroot")?;
        let core = Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core/Cargo.toml");
        let (version, llvm) = versions(&ask("--version", "--verbose")?)?;
        core.is_file().then_some(Self {
            rustc,
            cargo,
            version,
            llvm,
        })
    }

    /// Whether a linker for its LLVM can be built here: bpf-linker supports that LLVM, and its
    /// development files are there or among the packages.
    fn can_get_linker(&self) -> bool {
        LINKER_LLVMS.contains(&self.llvm)
            && (llvm_prefix(self.llvm).exists()
                || debian::is_debian() && debian::is_available(&format!("llvm-{}-dev", self.llvm)))
    }
}

/// A `bpf-linker` on this machine.
#[derive(Clone)]
pub(crate) struct Linker {
    pub(crate) path: PathBuf,
    /// The major version of its LLVM.
    llvm: u32,
}

impl Linker {
    /// A linker, if the file exists, runs, and says which LLVM it was built with. LLVM is a shared
    /// library of it, named in the file; of a linker with LLVM built in nothing can be known.
    fn probe(path: PathBuf) -> Option<Self> {
        let llvm = linked_llvm(&fs::read(&path).ok()?)?;
        let runs =
            process::succeeds(process::own_toolchain(&mut Command::new(&path)).arg("--version"));
        runs.then_some(Self { path, llvm })
    }

    /// LLVM reads the bitcode of older versions, not of newer ones.
    fn reads(&self, compiler: &Compiler) -> bool {
        self.llvm >= compiler.llvm
    }
}

/// Nightlies first: somebody who has one with `rust-src` has it for this.
fn compilers() -> Vec<Compiler> {
    let mut toolchains: Vec<PathBuf> = rustup_home()
        .and_then(|home| fs::read_dir(home.join("toolchains")).ok())
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("nightly"))
        .map(|entry| entry.path().join("bin"))
        .collect();
    toolchains.sort();
    let nightlies = toolchains
        .into_iter()
        .filter_map(|bin| Compiler::probe(bin.join("rustc"), bin.join("cargo")));
    let system = Compiler::probe(SYSTEM_RUSTC.into(), cargo_program().into());
    nightlies.chain(system).collect()
}

fn linkers(workspace: &Workspace) -> Vec<Linker> {
    let own = workspace.tools().join("bin/bpf-linker");
    std::iter::once(own)
        .chain(process::in_path("bpf-linker"))
        .filter_map(Linker::probe)
        .collect()
}

fn install_compiler() -> Result<Compiler> {
    if !debian::is_debian() {
        bail!(
            "no compiler for the kernel programs: install a nightly toolchain with its source \
             (`rustup toolchain install nightly --component rust-src`) and a bpf-linker \
             (`cargo install bpf-linker`)"
        );
    }
    if !debian::is_available(DEBIAN_COMPILER[0].name) {
        bail!(
            "no compiler for the kernel programs: this distribution has no package {}; install a \
             nightly toolchain with its source \
             (`rustup toolchain install nightly --component rust-src`)",
            DEBIAN_COMPILER[0].name
        );
    }
    debian::install_newest(&DEBIAN_COMPILER)?;
    Compiler::probe(SYSTEM_RUSTC.into(), cargo_program().into())
        .context("the installed compiler in /usr/bin does not run, or finds no source of `core`")
}

fn install_linker(workspace: &Workspace, llvm: u32) -> Result<Linker> {
    if debian::is_debian() {
        debian::install(linker_packages(llvm)?)?;
    }
    let root = workspace.tools();
    ui::note(&format!(
        "building bpf-linker {LINKER_VERSION} for LLVM {llvm} into {}: it links the kernel \
         programs (takes a minute or two, once)",
        root.display()
    ));
    let mut cargo = workspace.cargo();
    process::run(
        process::own_toolchain(&mut cargo)
            .args(["install", "bpf-linker", "--locked", "--force"])
            .args(["--version", LINKER_VERSION, "--no-default-features"])
            .args(["--features", &format!("llvm-{llvm}")])
            .arg("--root")
            .arg(&root)
            .env("LLVM_PREFIX", llvm_prefix(llvm)),
    )?;
    Linker::probe(root.join("bin/bpf-linker"))
        .context("the bpf-linker that was just built does not run")
}

fn linker_packages(llvm: u32) -> Result<&'static [Package]> {
    match llvm {
        21 => Ok(&LINKER_PACKAGES_21),
        22 => Ok(&LINKER_PACKAGES_22),
        23 => Ok(&LINKER_PACKAGES_23),
        _ => bail!("bpf-linker {LINKER_VERSION} cannot be built with LLVM {llvm}"),
    }
}

fn rustup_home() -> Option<PathBuf> {
    env::var_os("RUSTUP_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".rustup")))
}

fn llvm_prefix(llvm: u32) -> PathBuf {
    PathBuf::from(format!("/usr/lib/llvm-{llvm}"))
}

/// The compiler's version and the major version of its LLVM, from `rustc --version --verbose`.
fn versions(verbose: &str) -> Option<(String, u32)> {
    let field = |name: &str| {
        verbose
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
    };
    let llvm = field("LLVM version")?.split('.').next()?.parse().ok()?;
    Some((field("release")?.to_owned(), llvm))
}

/// The major version in the first `libLLVM.so.<major>` or `libLLVM-<major>.so` in a program.
fn linked_llvm(program: &[u8]) -> Option<u32> {
    let name = b"libLLVM";
    program
        .windows(name.len())
        .enumerate()
        .filter(|(_, window)| window == name)
        .find_map(|(start, _)| {
            let rest = &program[start + name.len()..];
            let rest = rest
                .strip_prefix(b".so.")
                .or_else(|| rest.strip_prefix(b"-"))?;
            let digits = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
            std::str::from_utf8(&rest[..digits]).ok()?.parse().ok()
        })
}

const SYSTEM_RUSTC: &str = "/usr/bin/rustc";
const LINKER_VERSION: &str = "^0.13";
/// The LLVM versions that bpf-linker of [`LINKER_VERSION`] supports.
const LINKER_LLVMS: [u32; 3] = [21, 22, 23];

const DEBIAN_COMPILER: [Package; 2] = [
    Package::new("rustc-web", "the Rust compiler for the kernel programs"),
    Package::new(
        "rust-web-src",
        "its source of `core`, built for the kernel's instruction set",
    ),
];

const LINKER_PACKAGES_21: [Package; 4] = linker_packages_of("llvm-21-dev", "libpolly-21-dev");
const LINKER_PACKAGES_22: [Package; 4] = linker_packages_of("llvm-22-dev", "libpolly-22-dev");
const LINKER_PACKAGES_23: [Package; 4] = linker_packages_of("llvm-23-dev", "libpolly-23-dev");

const fn linker_packages_of(llvm: &'static str, polly: &'static str) -> [Package; 4] {
    [
        Package::new(llvm, "LLVM, which bpf-linker is built on"),
        Package::new(polly, "a part of LLVM that bpf-linker links"),
        Package::new("libzstd-dev", "a library that LLVM links"),
        Package::new("g++", "the C++ library that LLVM links"),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_from_what_rustc_says() {
        let verbose = "rustc 1.96.0 (ac68faa20 2026-05-25) (built from a source tarball)\n\
            binary: rustc\nrelease: 1.96.0\nLLVM version: 22.1.8\n";
        assert_eq!(versions(verbose), Some(("1.96.0".to_owned(), 22)));
        assert_eq!(versions("release: 1.96.0\n"), None);
        assert_eq!(versions(""), None);
    }

    #[test]
    fn the_linkers_llvm_is_read_from_its_file() {
        for (program, llvm) in [
            (&b"\0libc.so.6\0libLLVM.so.22.1\0"[..], Some(22)),
            (b"\0libLLVM-21.so.1\0", Some(21)),
            (b"libLLVM is a library\0libLLVM.so.23.0\0", Some(23)),
            (b"libLLVM.so.", None),
            (b"nothing of the kind", None),
            (b"", None),
        ] {
            assert_eq!(linked_llvm(program), llvm, "{}", program.escape_ascii());
        }
    }
}
