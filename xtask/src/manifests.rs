//! `manifests`: renders `daemonset/` into one file, for those who apply a file rather than a folder; and makes an object of the
//! rules for Prometheus, for those who have its operator.
//!
//! The base is made of plain objects that nothing has to be patched in, so that rendering is putting files after one
//! another. What kustomize can do beyond that is for overlays, and for kustomize: a key that this does not know is an error.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde::Deserialize;

use crate::{ui, workspace::Workspace};

/// Writes the files, or checks that they are what would be written.
pub(crate) fn run(workspace: &Workspace, check_only: bool) -> Result<()> {
    for (path, fresh) in [
        (RENDERED, render(workspace)?),
        (RULES, render_rules(workspace)?),
    ] {
        write(&workspace.path(path), &fresh, check_only)?;
    }
    Ok(())
}

fn write(committed: &Path, fresh: &str, check_only: bool) -> Result<()> {
    if !check_only {
        fs::write(committed, fresh)
            .with_context(|| format!("cannot write {}", committed.display()))?;
        ui::note(&format!("written to {}", committed.display()));
        return Ok(());
    }
    let present = fs::read_to_string(committed).unwrap_or_default();
    ensure!(
        present == fresh,
        "{} is out of date (run `cargo xtask manifests`)",
        committed.display()
    );
    ui::note(&format!("{} is up to date", committed.display()));
    Ok(())
}

/// All objects of the root's kustomization, in its order: definitions and the namespace come before what needs them.
fn render(workspace: &Workspace) -> Result<String> {
    let root = workspace.path(ROOT);
    let mut text = HEADER.to_owned();
    for file in files(&root)? {
        let content =
            fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        let name = file.strip_prefix(&root).unwrap_or(&file);
        text += &format!("---\n# {}\n{}\n", name.display(), content.trim_end());
    }
    Ok(text)
}

/// The file of rules as a PrometheusRule: its comment says that it is written.
fn render_rules(workspace: &Workspace) -> Result<String> {
    let file = workspace.path(PLAIN_RULES);
    let text =
        fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
    let rules = text
        .find("groups:\n")
        .map(|at| &text[at..])
        .with_context(|| format!("{} has no groups", file.display()))?;
    let mut rendered = RULES_HEADER.to_owned();
    for line in rules.lines() {
        let indent = if line.is_empty() { "" } else { "  " };
        rendered += &format!("{indent}{line}\n");
    }
    Ok(rendered)
}

/// The files of a kustomization, its folders' included.
fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let file = folder.join(KUSTOMIZATION);
    let text =
        fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
    let plain: Plain = serde_saphyr::from_str(&text).with_context(|| {
        format!(
            "{} has more than resources: only kustomize can render it",
            file.display()
        )
    })?;
    let mut files = Vec::new();
    for resource in plain.resources {
        let path = folder.join(&resource);
        if path.is_dir() {
            files.extend(self::files(&path)?);
        } else if path.is_file() {
            files.push(path);
        } else {
            bail!("{} names {resource}, which is not there", file.display());
        }
    }
    Ok(files)
}

/// A kustomization that only says what belongs to it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Plain {
    #[serde(rename = "apiVersion")]
    _api_version: String,
    #[serde(rename = "kind")]
    _kind: String,
    resources: Vec<String>,
}

const ROOT: &str = "daemonset";
const KUSTOMIZATION: &str = "kustomization.yaml";
const RENDERED: &str = "daemonset/weft.yaml";
const RULES: &str = "daemonset/components/prometheus/rules.yaml";
const PLAIN_RULES: &str = "daemonset/components/prometheus/scrape-rules.yaml";
const RULES_HEADER: &str = "\
# Recording rules and alerts, for the Prometheus Operator. Written by `cargo xtask manifests` from scrape-rules.yaml.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: weft
  namespace: weft-system
  labels:
    app.kubernetes.io/part-of: weft
spec:
";
const HEADER: &str = "\
# All of Weft with one controller: `kubectl apply -f weft.yaml`. Written by `cargo xtask manifests` from the files that are
# named below.
";

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::process::Command;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use serde_json::Value;

    use super::*;
    use crate::process;

    fn workspace() -> Workspace {
        Workspace::of_this_build()
    }

    fn documents(text: &str) -> Vec<Value> {
        let mut documents = serde_saphyr::from_multiple(text).expect("YAML");
        documents.iter_mut().for_each(whole_numbers);
        documents
    }

    /// Generated schemas have bounds such as `1.0`, which kustomize writes as `1`.
    fn whole_numbers(value: &mut Value) {
        match value {
            Value::Array(items) => items.iter_mut().for_each(whole_numbers),
            Value::Object(fields) => fields.values_mut().for_each(whole_numbers),
            Value::Number(number) => {
                if let Some(whole) = number.as_f64().filter(|it| it.fract() == 0.0) {
                    *value = Value::from(whole as i64);
                }
            }
            _ => {}
        }
    }

    /// Of every object: kind, namespace, name.
    fn names(objects: &[Value]) -> BTreeSet<[String; 3]> {
        let text = |it: &Value, path: &str| {
            let text = it.pointer(path).and_then(Value::as_str);
            text.unwrap_or_default().to_owned()
        };
        let paths = ["/kind", "/metadata/namespace", "/metadata/name"];
        objects
            .iter()
            .map(|it| paths.map(|path| text(it, path)))
            .collect()
    }

    /// Every folder with a kustomization below one.
    fn kustomizations(folder: &Path, found: &mut Vec<PathBuf>) {
        if folder.join(KUSTOMIZATION).is_file() {
            found.push(folder.to_owned());
        }
        for entry in fs::read_dir(folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                kustomizations(&path, found);
            }
        }
    }

    #[test]
    fn the_rendered_file_is_current() {
        run(&workspace(), true).unwrap();
    }

    #[test]
    fn the_rendered_file_has_every_object_once() {
        let objects = documents(&render(&workspace()).unwrap());
        let names = names(&objects);
        assert_eq!(names.len(), objects.len());
        for (kind, name) in [
            ("Namespace", "weft-system"),
            ("Deployment", "weft-controller"),
            ("DaemonSet", "weft-agent"),
            ("CustomResourceDefinition", "servers.policy.weft.dev"),
        ] {
            let there = names.iter().any(|it| it[0] == kind && it[2] == name);
            assert!(there, "no {kind} {name}");
        }
    }

    /// Who pulls an image gets that of the version whose manifests these are.
    #[test]
    fn images_are_of_this_version() {
        let mut files = Vec::new();
        yaml_files(&workspace().path(ROOT), &mut files);
        let mut with_image = 0;
        for file in files {
            let text = fs::read_to_string(&file).unwrap();
            let images = text.lines().map(|it| it.trim().trim_start_matches("- "));
            let images: Vec<&str> = images.filter_map(|it| it.strip_prefix("image:")).collect();
            with_image += usize::from(!images.is_empty());
            for image in images {
                assert_eq!(image.trim(), crate::image::NAME, "{}", file.display());
            }
        }
        // The base's two, what they are rendered to, removal, and the component with the CNI plugin.
        assert!(with_image >= 5, "only {with_image} files name an image");
    }

    fn yaml_files(folder: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                yaml_files(&path, found);
            } else if path.extension().is_some_and(|it| it == "yaml") {
                found.push(path);
            }
        }
    }

    /// What a kustomization names is there and is YAML, and no file beside it is forgotten.
    #[test]
    fn kustomizations_name_files_that_are_there() {
        let mut folders = Vec::new();
        kustomizations(&workspace().path(ROOT), &mut folders);
        assert!(folders.len() >= 3, "{folders:?}");
        for folder in folders {
            let shown = folder.display();
            let text = fs::read_to_string(folder.join(KUSTOMIZATION)).unwrap();
            let read: Value = serde_saphyr::from_str(&text).expect("YAML");
            let mut named = BTreeSet::from([KUSTOMIZATION.to_owned()]);
            for list in ["resources", "components", "patches", "configMapGenerator"] {
                for entry in read[list].as_array().into_iter().flatten() {
                    let path = entry.as_str().or(entry["path"].as_str());
                    named.extend(path.map(str::to_owned));
                }
            }
            for name in &named {
                let path = folder.join(name);
                assert!(path.exists(), "{shown} names {name}, which is not there");
                if path.is_file() {
                    documents(&fs::read_to_string(&path).unwrap());
                }
            }
            for entry in fs::read_dir(&folder).unwrap() {
                let path = entry.unwrap().path();
                let name = path.file_name().unwrap().to_string_lossy().into_owned();
                let is_yaml = path.extension().is_some_and(|it| it == "yaml");
                let apart = name == "weft.yaml" || name.starts_with("scrape");
                assert!(
                    !is_yaml || apart || named.contains(&name),
                    "{shown} forgets {name}"
                );
            }
        }
    }

    /// What kustomize makes of a folder, where there is a kustomize.
    fn build(folder: &Path) -> Option<Vec<Value>> {
        let mut command = match process::in_path("kubectl") {
            Some(kubectl) => {
                let mut command = Command::new(kubectl);
                command.arg("kustomize");
                command
            }
            None => {
                let mut command = Command::new(process::in_path("kustomize")?);
                command.arg("build");
                command
            }
        };
        let output = process::output(command.arg(folder)).expect("it builds");
        Some(documents(&output))
    }

    /// The same of an overlay with a component.
    fn build_with(base: &Path, component: &Path) -> Option<Vec<Value>> {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("weft-overlay-{}-{number}", std::process::id());
        let overlay = std::env::temp_dir().join(name);
        fs::create_dir_all(&overlay).unwrap();
        let up = "../".repeat(overlay.components().count() - 1);
        let relative = |path: &Path| {
            let path = path.display().to_string();
            format!("{up}{}", path.trim_start_matches('/'))
        };
        let (base, component) = (relative(base), relative(component));
        let text = format!("resources: [{base}]\ncomponents: [{component}]\n");
        fs::write(overlay.join(KUSTOMIZATION), text).unwrap();
        let built = build(&overlay);
        fs::remove_dir_all(&overlay).unwrap();
        built
    }

    /// Where the API server knows no field for it, there is none, and all containers that had it have the annotation.
    #[test]
    fn before_1_30_profiles_are_annotations() {
        let root = workspace().path(ROOT);
        let component = root.join("components/before-1.30");
        let bases = [
            (root.clone(), ["agent", "prepare"]),
            (root.join("uninstall"), ["uninstall", "done"]),
        ];
        for (base, containers) in bases {
            let Some(built) = build_with(&base, &component) else {
                eprintln!("there is neither kubectl nor kustomize: nothing was built");
                return;
            };
            let mut sets = built.iter().filter(|it| it["kind"] == "DaemonSet");
            let template = &sets.next().expect("a DaemonSet")["spec"]["template"];
            let profile = template.pointer("/spec/securityContext/appArmorProfile");
            assert_eq!(profile, None, "{}", base.display());
            for container in containers {
                let key = format!("container.apparmor.security.beta.kubernetes.io/{container}");
                assert_eq!(template["metadata"]["annotations"][&key], "unconfined");
                let lists = ["initContainers", "containers"].map(|it| &template["spec"][it]);
                let mut all = lists.iter().filter_map(|it| it.as_array()).flatten();
                assert!(all.any(|it| it["name"] == container), "no {container}");
            }
        }
    }

    /// Where there is a kustomize: it makes the same of the root, and every component can be added to it.
    #[test]
    fn kustomize_builds_all_of_it() {
        let root = workspace().path(ROOT);
        let Some(built) = build(&root) else {
            eprintln!("there is neither kubectl nor kustomize: nothing was built");
            return;
        };
        let mut rendered = documents(&render(&workspace()).unwrap());
        let mut built = built;
        let key = |it: &Value| it["kind"].to_string() + &it["metadata"].to_string();
        rendered.sort_by_key(key);
        built.sort_by_key(key);
        assert_eq!(names(&built), names(&rendered));
        for (built, rendered) in built.iter().zip(&rendered) {
            let name = &built["metadata"]["name"];
            assert!(built == rendered, "{name}: kustomize reads something else");
        }
        let mut folders = Vec::new();
        kustomizations(&root.join("components"), &mut folders);
        for component in folders {
            let with = build_with(&root, &component).expect("it was there before");
            assert!(with != built, "{} changes nothing", component.display());
        }
    }
}
