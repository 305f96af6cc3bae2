//! Hands the compiled kernel programs to the agent, which embeds them.
//!
//! They come from `WEFT_BPF_DIR`, else from the workspace's `target/bpf`, where `cargo xtask
//! build-ebpf` puts them; those of the layout that upgrades are tested with are in `bpf-next-layout`. Where there are none, empty objects are embedded, so that checks and
//! documentation work without the kernel toolchain; an agent built like that says so and does not
//! start.

use std::{env, fs, io, path::PathBuf};

fn main() -> io::Result<()> {
    println!("cargo::rerun-if-env-changed=WEFT_BPF_DIR");
    println!("cargo::rerun-if-env-changed=CARGO_TARGET_DIR");
    let folder = objects();
    // Watched as a folder: a file that does not exist yet would make cargo run this each time.
    if env::var_os("WEFT_BPF_DIR").is_some() || fs::create_dir_all(&folder).is_ok() {
        println!("cargo::rerun-if-changed={}", folder.display());
    }
    let out = variable("OUT_DIR")?;
    for name in ["weft-cgroup.o", "weft-lookup.o"] {
        let object = match fs::read(folder.join(name)) {
            Ok(object) => object,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                println!(
                    "cargo::warning=no kernel program {} in {}: run `cargo xtask build-ebpf`",
                    name,
                    folder.display()
                );
                Vec::new()
            }
            Err(error) => return Err(error),
        };
        fs::write(out.join(name), object)?;
    }
    Ok(())
}

fn objects() -> PathBuf {
    if let Some(folder) = env::var_os("WEFT_BPF_DIR") {
        return folder.into();
    }
    // Set by cargo for the feature that says so.
    let name = match env::var_os("CARGO_FEATURE_NEXT_LAYOUT") {
        Some(_) => "bpf-next-layout",
        None => "bpf",
    };
    env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| PathBuf::from("../target"), PathBuf::from)
        .join(name)
}

fn variable(name: &str) -> io::Result<PathBuf> {
    env::var_os(name)
        .map(PathBuf::from)
        .ok_or_else(|| io::Error::other(format!("cargo did not set {name}")))
}
