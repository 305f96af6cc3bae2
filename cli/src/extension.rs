//! Extensions: programs on PATH that are called `weft-NAME` are what `weft NAME` runs, for what this tool has no command of its
//! own for.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use clap::CommandFactory;

use crate::command::Cli;
use crate::outcome::Outcome;

/// A program that is one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extension {
    /// What it is called behind `weft-`.
    pub name: String,
    /// Where it is.
    pub path: PathBuf,
    /// What keeps it from being run by `weft NAME`.
    pub hidden_by: Option<Hider>,
}

/// What keeps an extension from being run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Hider {
    /// A command of this tool.
    Command,
    /// Another one of its name, in a folder that is earlier on PATH.
    Earlier(PathBuf),
}

/// Why an extension does not run.
#[derive(Debug, thiserror::Error)]
pub enum ExtensionError {
    /// There is none.
    #[error(
        "there is no command {0:?}, and no program weft-{0} on PATH that would be an extension: weft --help lists the commands"
    )]
    None(String),
    /// It cannot be started.
    #[error("{path} cannot be run: {reason}")]
    Start {
        /// Where it is.
        path: PathBuf,
        /// Why.
        reason: std::io::Error,
    },
}

const PREFIX: &str = "weft-";
/// Programs of Weft itself, which may be beside this one.
const OWN: [&str; 3] = ["agent", "cni", "controller"];

/// Runs one in the place of this process. Its name is the first of the words, the rest are its own.
///
/// # Errors
/// There is none of that name, or it cannot be started.
pub fn run(words: &[OsString]) -> Result<Outcome, ExtensionError> {
    let (name, rest) = match words {
        [name, rest @ ..] => (name.to_string_lossy().into_owned(), rest),
        [] => (String::new(), words),
    };
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = find(&path)
        .into_iter()
        .find(|it| it.name == name && it.hidden_by.is_none());
    let Some(Extension { path, .. }) = found else {
        return Err(ExtensionError::None(name));
    };
    // Does not return where all goes well.
    let reason = Command::new(&path).args(rest).exec();
    Err(ExtensionError::Start { path, reason })
}

/// All that are on PATH, by their names.
pub fn all() -> Vec<Extension> {
    find(&std::env::var_os("PATH").unwrap_or_default())
}

fn find(path: &OsStr) -> Vec<Extension> {
    let mut found = vec![];
    let mut first: BTreeMap<String, PathBuf> = BTreeMap::new();
    let command = Cli::command();
    for folder in std::env::split_paths(path) {
        for (name, path) in below(&folder) {
            let is_command = command.find_subcommand(&name).is_some() || name == "help";
            let earlier = first.get(&name).cloned();
            first.entry(name.clone()).or_insert_with(|| path.clone());
            // The same folder twice is one.
            if earlier.as_ref() == Some(&path) {
                continue;
            }
            let hidden_by = match is_command {
                true => Some(Hider::Command),
                false => earlier.map(Hider::Earlier),
            };
            found.push(Extension {
                name,
                path,
                hidden_by,
            });
        }
    }
    found.sort_by(|one, other| one.name.cmp(&other.name));
    found
}

/// Those of a folder; none of one that cannot be read, as shells do.
fn below(folder: &Path) -> Vec<(String, PathBuf)> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut found: Vec<_> = entries.filter_map(|it| named(&it.path())).collect();
    found.sort();
    found
}

fn named(path: &Path) -> Option<(String, PathBuf)> {
    let name = path.file_name()?.to_str()?.strip_prefix(PREFIX)?;
    let is_word = !name.is_empty()
        && name
            .chars()
            .all(|it| it.is_ascii_alphanumeric() || "-_".contains(it));
    if !is_word || OWN.contains(&name) {
        return None;
    }
    let metadata = std::fs::metadata(path).ok()?;
    let runs = metadata.is_file() && metadata.permissions().mode() & 0o111 != 0;
    runs.then(|| (name.to_owned(), path.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_on_path_are_found_once() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut path = vec![];
        for (place, programs) in [
            (
                "a",
                &[
                    ("weft-foo", 0o755),
                    ("weft-check", 0o755),
                    ("weft-agent", 0o755),
                ][..],
            ),
            (
                "b",
                &[
                    ("weft-foo", 0o755),
                    ("weft-bar_2", 0o700),
                    ("weft-text", 0o644),
                ],
            ),
            (
                "c",
                &[("weft-", 0o755), ("other", 0o755), ("weft-a b", 0o755)],
            ),
        ] {
            let place = folder.path().join(place);
            std::fs::create_dir(&place).expect("made");
            for (name, mode) in programs {
                let file = place.join(name);
                std::fs::write(&file, "").expect("written");
                let mode = std::fs::Permissions::from_mode(*mode);
                std::fs::set_permissions(&file, mode).expect("set");
            }
            path.push(place);
        }
        path.push(folder.path().join("a"));
        path.push(folder.path().join("not-there"));
        let joined = std::env::join_paths(&path).expect("a PATH");
        let found = find(&joined);
        let foo = folder.path().join("a/weft-foo");
        let shown = found
            .iter()
            .map(|it| (it.name.as_str(), it.hidden_by.clone()));
        let shown: Vec<_> = shown.collect();
        let expected = [
            ("bar_2", None),
            ("check", Some(Hider::Command)),
            ("foo", None),
            ("foo", Some(Hider::Earlier(foo.clone()))),
        ];
        assert_eq!(shown, expected);
        assert_eq!(found[2].path, foo);
    }
}
