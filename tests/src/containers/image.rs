//! Images of programs of this machine, in archives of the OCI image layout (image specification 1.0), which runtimes
//! import.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

/// An archive with an image.
#[derive(Clone, Debug)]
pub struct Image {
    name: String,
    archive: PathBuf,
}

impl Image {
    /// One that is there already, and what it is called in it.
    pub fn of(archive: &Path, name: &str) -> Image {
        Image {
            name: name.to_owned(),
            archive: archive.to_owned(),
        }
    }

    /// What it is called.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where it is.
    pub fn archive(&self) -> &Path {
        &self.archive
    }

    /// An image for sandboxes: its only program waits.
    pub fn pause(dir: &Path) -> Result<Image> {
        let links = ["sleep"];
        Image::of_busybox(dir, PAUSE, &links, &["/bin/sleep", "2147483647"])
    }

    /// An image with a shell and the usual tools, all of them one program without libraries, and empty folders for mounts
    /// from the node.
    pub fn shell(dir: &Path) -> Result<Image> {
        let links = [
            "sh", "sleep", "cat", "httpd", "nc", "mkdir", "echo", "ls", "true",
        ];
        Image::of_busybox(dir, SHELL, &links, &["/bin/sleep", "2147483647"])
    }

    fn of_busybox(dir: &Path, name: &str, links: &[&str], command: &[&str]) -> Result<Image> {
        let dir = dir.join(name.replace(['/', ':'], "-"));
        let bin = dir.join("root/bin");
        fs::create_dir_all(&bin)?;
        fs::copy(BUSYBOX, bin.join("busybox"))
            .with_context(|| format!("{BUSYBOX} is not there"))?;
        for link in links {
            std::os::unix::fs::symlink("busybox", bin.join(link))?;
        }
        let layer = dir.join("layer.tar");
        tar(&dir.join("root"), &layer, &["."])?;
        let archive = dir.join("image.tar");
        archive_of(&dir, &layer, name, command, &archive)?;
        Ok(Image::of(&archive, name))
    }
}

/// Puts a layer into an archive of the OCI image layout.
fn archive_of(
    dir: &Path,
    layer: &Path,
    name: &str,
    command: &[&str],
    archive: &Path,
) -> Result<()> {
    let layout = dir.join("layout");
    let blobs = layout.join("blobs/sha256");
    fs::create_dir_all(&blobs)?;
    let keep = |content: &[u8]| -> Result<Value> {
        let new = dir.join("blob");
        fs::write(&new, content)?;
        let digest = sha256(&new)?;
        fs::rename(&new, blobs.join(&digest))?;
        Ok(json!({"digest": format!("sha256:{digest}"), "size": content.len()}))
    };
    let typed = |mut descriptor: Value, kind: &str| {
        descriptor["mediaType"] = format!("application/vnd.oci.image.{kind}").into();
        descriptor
    };
    let layer = keep(&fs::read(layer)?)?;
    let config = json!({
        "architecture": "amd64",
        "os": "linux",
        "config": {"Cmd": command, "Env": ["PATH=/bin:/usr/sbin:/usr/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]},
    });
    let config = keep(&serde_json::to_vec(&config)?)?;
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": typed(config, "config.v1+json"),
        "layers": [typed(layer, "layer.v1.tar")],
    });
    let manifest = keep(&serde_json::to_vec(&manifest)?)?;
    let mut manifest = typed(manifest, "manifest.v1+json");
    manifest["annotations"] = json!({"io.containerd.image.name": name});
    let index = json!({"schemaVersion": 2, "manifests": [manifest]});
    fs::write(layout.join("index.json"), serde_json::to_vec(&index)?)?;
    fs::write(
        layout.join("oci-layout"),
        r#"{"imageLayoutVersion": "1.0.0"}"#,
    )?;
    tar(&layout, archive, &["oci-layout", "index.json", "blobs"])
}

fn tar(folder: &Path, archive: &Path, what: &[&str]) -> Result<()> {
    let mut command = Command::new("tar");
    command.arg("--create").arg("--file").arg(archive);
    command.args(["--owner=0", "--group=0", "--directory"]);
    let output = command.arg(folder).args(what).output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "tar: {}", said.trim());
    Ok(())
}

fn sha256(file: &Path) -> Result<String> {
    let output = Command::new("sha256sum").arg(file).output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    let digest = said.split(' ').next().unwrap_or_default();
    ensure!(digest.len() == 64, "sha256sum says {said:?}");
    Ok(digest.to_owned())
}

/// What sandboxes run.
pub(super) const PAUSE: &str = "weft.test/pause:1";
const SHELL: &str = "weft.test/shell:1";
/// Of the package `busybox-static`.
const BUSYBOX: &str = "/bin/busybox";
