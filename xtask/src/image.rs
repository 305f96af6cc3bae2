//! `image`: one archive with everything that a cluster runs, made without a container engine and without a base image.
//!
//! The programs are linked statically, so the image holds them and nothing else: no shell, no libraries, nobody to log
//! in as. The archive is an OCI image layout, which `ctr images import`, `nerdctl load`, `k3s ctr images import` and
//! `kind load image-archive` take, and has Docker's list beside it for `docker load` and `podman load`. Nothing of the
//! machine or the time goes into it: the same programs make the same digest.

use std::{
    fs::{self, File},
    io::Write as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};
use clap::{Args, ValueEnum};
use flate2::{Compression, GzBuilder};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::{bpf, process, ui, workspace::Workspace};

/// What is to be made.
#[derive(Args)]
pub(crate) struct Options {
    /// How the programs are built
    #[arg(long, value_enum, default_value_t = Profile::Release)]
    profile: Profile,
    /// Where the archive goes [default: target/weft-image.tar]
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// The image's name and tag
    #[arg(long, value_name = "NAME:TAG", default_value = NAME)]
    name: String,
    /// Write the image's files into this folder, too: for builds by a Containerfile
    #[arg(long, value_name = "DIR")]
    files: Option<PathBuf>,
}

/// How programs are built.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Profile {
    /// As they are shipped.
    Release,
    /// Quickly.
    Dev,
}

/// Builds the programs, and the image of them.
pub(crate) fn run(workspace: &Workspace, options: &Options) -> Result<()> {
    bpf::build(workspace, false)?;
    build_programs(workspace, options.profile)?;
    let built = match options.profile {
        Profile::Release => workspace.release_programs(),
        Profile::Dev => workspace.static_programs("debug"),
    };
    let archive = workspace.path(ARCHIVE);
    let archive = options.output.as_ref().unwrap_or(&archive);
    let made = write(&built, &options.name, archive)?;
    if let Some(folder) = &options.files {
        fs::create_dir_all(folder)?;
        for (name, _) in programs(&built)? {
            fs::copy(built.join(&name), folder.join(&name))?;
        }
    }
    say(&made, archive, &options.name)
}

fn say(made: &Made, archive: &Path, name: &str) -> Result<()> {
    let mib = |bytes: u64| bytes as f64 / (1024.0 * 1024.0);
    for (program, size) in &made.programs {
        ui::note(&format!("{program:<18} {:6.1} MiB", mib(*size)));
    }
    let size = mib(fs::metadata(archive)?.len());
    let digest = &made.digest;
    ui::note(&format!(
        "{}: {size:.1} MiB, {name}, {digest}",
        archive.display()
    ));
    Ok(())
}

/// The image of the release build that is there.
pub(crate) fn write_built(workspace: &Workspace) -> Result<()> {
    let archive = workspace.path(ARCHIVE);
    let made = write(&workspace.release_programs(), NAME, &archive)?;
    say(&made, &archive, NAME)
}

/// The programs of the image alone, linked statically.
fn build_programs(workspace: &Workspace, profile: Profile) -> Result<()> {
    let mut cargo = workspace.static_cargo("build");
    cargo.args(["--workspace", "--exclude", "xtask"]);
    if profile == Profile::Release {
        cargo.arg("--release");
    }
    for name in PROGRAMS {
        cargo.args(["--bin", name]);
    }
    process::run(&mut cargo)
}

/// What was made.
pub(crate) struct Made {
    /// Of the image's manifest.
    pub(crate) digest: String,
    /// The programs, and how large they are.
    pub(crate) programs: Vec<(String, u64)>,
}

/// Writes the archive of an image of the programs in a folder.
pub(crate) fn write(built: &Path, name: &str, archive: &Path) -> Result<Made> {
    let mut programs = programs(built)?;
    let mut layer = tar::Builder::new(Vec::new());
    for (name, content) in &programs {
        append(&mut layer, name, 0o755, content)?;
    }
    let layer = layer.into_inner()?;
    let diff_id = digest(&layer);
    // No name, no time.
    let mut gzip = GzBuilder::new().write(Vec::new(), Compression::best());
    gzip.write_all(&layer)?;
    let layer = gzip.finish()?;
    let (arch, version) = (architecture()?, env!("CARGO_PKG_VERSION"));
    let labels = json!({
        "org.opencontainers.image.title": "weft",
        "org.opencontainers.image.description": "Weft's node agent, controller and CNI plugin",
        "org.opencontainers.image.version": version,
        "org.opencontainers.image.licenses": env!("CARGO_PKG_LICENSE"),
        "org.opencontainers.image.source": env!("CARGO_PKG_REPOSITORY"),
    });
    let config = json!({
        "architecture": arch,
        "os": "linux",
        // Nobody, unless a manifest says another. It says the command, too.
        "config": {"User": "65532:65532", "WorkingDir": "/", "Labels": labels},
        "rootfs": {"type": "layers", "diff_ids": [diff_id]},
        "history": [{"created_by": "cargo xtask image"}],
    });
    let config = serde_json::to_vec(&config)?;
    let manifest = serde_json::to_vec(&json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": descriptor("application/vnd.oci.image.config.v1+json", &config),
        "layers": [descriptor("application/vnd.oci.image.layer.v1.tar+gzip", &layer)],
        "annotations": labels,
    }))?;
    let tag = name.rsplit_once(':').map_or("latest", |(_, tag)| tag);
    let mut of_index = descriptor(MANIFEST, &manifest);
    of_index["platform"] = json!({"architecture": arch, "os": "linux"});
    of_index["annotations"] = json!({
        "io.containerd.image.name": name,
        "org.opencontainers.image.ref.name": tag,
    });
    let index = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [of_index],
    });
    let of_docker = json!([{
        "Config": blob(&config),
        "RepoTags": [name],
        "Layers": [blob(&layer)],
    }]);
    let made = digest(&manifest);
    if let Some(folder) = archive.parent() {
        fs::create_dir_all(folder)?;
    }
    let file = File::create(archive);
    let file = file.with_context(|| format!("cannot write {}", archive.display()))?;
    let mut tar = tar::Builder::new(file);
    let layout = br#"{"imageLayoutVersion":"1.0.0"}"#;
    append(&mut tar, "oci-layout", 0o644, layout)?;
    append(&mut tar, "index.json", 0o644, &serde_json::to_vec(&index)?)?;
    append(
        &mut tar,
        "manifest.json",
        0o644,
        &serde_json::to_vec(&of_docker)?,
    )?;
    for content in [&manifest, &config, &layer] {
        append(&mut tar, &blob(content), 0o644, content)?;
    }
    tar.into_inner()?.flush()?;
    let sizes = programs.drain(..).map(|(name, it)| (name, it.len() as u64));
    Ok(Made {
        digest: made,
        programs: sizes.collect(),
    })
}

/// The programs of the image that a folder has, each of which must need nothing else.
fn programs(built: &Path) -> Result<Vec<(String, Vec<u8>)>> {
    let read = |name: &str| -> Result<(String, Vec<u8>)> {
        let path = built.join(name);
        let content = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        ensure!(
            !has_interpreter(&content),
            "{} is linked dynamically: an image without libraries cannot run it",
            path.display()
        );
        Ok((name.to_owned(), content))
    };
    PROGRAMS.iter().map(|it| read(it)).collect()
}

/// Whether an ELF file of 64 bits and little endian asks for a dynamic linker, by a program header of type `PT_INTERP`
/// (elf(5)).
fn has_interpreter(file: &[u8]) -> bool {
    let number = |at: usize, length: usize| {
        let bytes = file.get(at..at + length)?;
        let value = bytes
            .iter()
            .rev()
            .fold(0u64, |it, byte| it << 8 | u64::from(*byte));
        usize::try_from(value).ok()
    };
    let headers = || Some((number(32, 8)?, number(54, 2)?, number(56, 2)?));
    let Some((start, size, count)) = headers().filter(|_| file.starts_with(b"\x7fELF")) else {
        return false;
    };
    (0..count).any(|it| number(start + it * size, 4) == Some(PT_INTERP))
}

fn append(
    tar: &mut tar::Builder<impl std::io::Write>,
    name: &str,
    mode: u32,
    content: &[u8],
) -> Result<()> {
    let mut header = tar::Header::new_ustar();
    header.set_size(content.len() as u64);
    header.set_mode(mode);
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    tar.append_data(&mut header, name, content)?;
    Ok(())
}

fn descriptor(media_type: &str, content: &[u8]) -> Value {
    json!({"mediaType": media_type, "digest": digest(content), "size": content.len()})
}

fn blob(content: &[u8]) -> String {
    format!("blobs/{}", digest(content).replace(':', "/"))
}

fn digest(content: &[u8]) -> String {
    let hash = Sha256::digest(content);
    let hex: String = hash.iter().map(|it| format!("{it:02x}")).collect();
    format!("sha256:{hex}")
}

/// Of this machine, as Go calls it.
fn architecture() -> Result<&'static str> {
    match std::env::consts::ARCH {
        "x86_64" => Ok("amd64"),
        "aarch64" => Ok("arm64"),
        other => anyhow::bail!("no images are made for {other}: amd64 and arm64 only"),
    }
}

/// The name and tag that the manifests have.
pub(crate) const NAME: &str = concat!("ghcr.io/weft-mesh/weft:v", env!("CARGO_PKG_VERSION"));
/// Where the archive is put.
pub(crate) const ARCHIVE: &str = "target/weft-image.tar";
/// What is in the image, in its root.
const PROGRAMS: [&str; 3] = ["weft-agent", "weft-cni", "weft-controller"];
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const PT_INTERP: usize = 3;

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::io::Read as _;

    use super::*;

    /// A folder that is removed with it.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            let name = format!("weft-xtask-image-{name}-{}", std::process::id());
            let folder = std::env::temp_dir().join(name);
            fs::create_dir_all(&folder).unwrap();
            Self(folder)
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn unpack(archive: &[u8]) -> BTreeMap<String, Vec<u8>> {
        let mut files = BTreeMap::new();
        for entry in tar::Archive::new(archive).entries().unwrap() {
            let mut entry = entry.unwrap();
            let mut content = Vec::new();
            entry.read_to_end(&mut content).unwrap();
            let name = entry.path().unwrap().display().to_string();
            files.insert(name, content);
        }
        files
    }

    /// From the index down to the programs, by digests alone, as a container runtime goes.
    #[test]
    fn the_archive_leads_to_the_programs() {
        let scratch = Scratch::new("walk");
        for name in PROGRAMS {
            fs::write(scratch.0.join(name), format!("content of {name}")).unwrap();
        }
        let archive = scratch.0.join("image.tar");
        let made = write(&scratch.0, "example.org:5000/weft:v9", &archive).unwrap();
        let files = unpack(&fs::read(&archive).unwrap());
        let read = |name: &str| -> Value { serde_json::from_slice(&files[name]).unwrap() };
        let follow = |it: &Value| {
            let (named, size) = (it["digest"].as_str().unwrap(), it["size"].as_u64().unwrap());
            let content = &files[&format!("blobs/{}", named.replace(':', "/"))];
            assert_eq!(
                (digest(content).as_str(), content.len() as u64),
                (named, size)
            );
            content.clone()
        };
        let parsed = |it: &Value| -> Value { serde_json::from_slice(&follow(it)).unwrap() };
        assert_eq!(read("oci-layout")["imageLayoutVersion"], "1.0.0");
        let of_index = &read("index.json")["manifests"][0];
        assert_eq!(of_index["digest"], *made.digest);
        assert_eq!(
            of_index["annotations"]["io.containerd.image.name"],
            "example.org:5000/weft:v9"
        );
        assert_eq!(
            of_index["annotations"]["org.opencontainers.image.ref.name"],
            "v9"
        );
        let manifest = parsed(of_index);
        let config = parsed(&manifest["config"]);
        assert_eq!(config["config"]["User"], "65532:65532");
        let mut layer = Vec::new();
        let zipped = follow(&manifest["layers"][0]);
        flate2::read::GzDecoder::new(&zipped[..])
            .read_to_end(&mut layer)
            .unwrap();
        assert_eq!(config["rootfs"]["diff_ids"], json!([digest(&layer)]));
        let inside = unpack(&layer);
        assert_eq!(inside.len(), PROGRAMS.len());
        for name in PROGRAMS {
            assert_eq!(inside[name], format!("content of {name}").as_bytes());
        }
        let docker = &read("manifest.json")[0];
        for blob in [&docker["Config"], &docker["Layers"][0]] {
            assert!(files.contains_key(blob.as_str().unwrap()), "{blob}");
        }
    }

    #[test]
    fn the_same_programs_make_the_same_archive() {
        let scratch = Scratch::new("same");
        let make = |name: &str| {
            for program in PROGRAMS {
                fs::write(scratch.0.join(program), program).unwrap();
            }
            let archive = scratch.0.join(name);
            write(&scratch.0, NAME, &archive).unwrap();
            fs::read(archive).unwrap()
        };
        assert_eq!(make("one.tar"), make("two.tar"));
    }

    /// This test is a program that needs a dynamic linker, or is not: its own mapping says so.
    #[test]
    fn a_dynamic_program_is_refused() {
        let own = fs::read("/proc/self/exe").unwrap();
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        assert_eq!(has_interpreter(&own), maps.contains("libc.so"));
        assert!(!has_interpreter(b"\x7fELF"));
        assert!(!has_interpreter(b""));
        let scratch = Scratch::new("dynamic");
        for name in PROGRAMS {
            fs::write(scratch.0.join(name), &own).unwrap();
        }
        let made = write(&scratch.0, NAME, &scratch.0.join("image.tar"));
        assert_eq!(made.is_err(), has_interpreter(&own));
    }
}
