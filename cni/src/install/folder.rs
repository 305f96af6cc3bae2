//! A runtime's folder of configurations: which file counts, and what is done to it.
//!
//! Runtimes take the first file by name (containerd: only that one). A list gets the plugin at its end. A single
//! plugin's configuration `10-a.conf` is saved as `10-a.conf.weft-saved`, a name that runtimes do not read, and
//! `10-a.conf.conflist` takes its place in the order. All is done by renaming: a runtime that looks at any moment finds
//! a configuration. What the CNI of the cluster writes meanwhile is never written over.

use std::fs::{self, Metadata};
use std::io::{self, ErrorKind};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::lists::{self, Entry, Stamp, Unusable};
use crate::files;

/// The folder.
#[derive(Clone, Debug)]
pub struct Folder(PathBuf);

/// What was done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Done {
    /// Nothing: the plugin is in this file.
    Nothing(PathBuf),
    /// The plugin was put into this file.
    Put(PathBuf),
}

/// Why the plugin is not where it should be.
#[derive(Debug, thiserror::Error)]
pub enum Trouble {
    /// There is no configuration yet: the CNI of the cluster has not written one.
    #[error(
        "{0} has no configuration of a network that could be used; waiting for the cluster's CNI"
    )]
    Nothing(PathBuf),
    /// A file cannot be used, and was just written: it may be better in a moment. Or it is the one that counts, and has no
    /// chains.
    #[error("{path} cannot be used: {reason}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: Unusable,
    },
    /// Somebody else writes a file again and again.
    #[error("{0} is written again and again by somebody else")]
    Restless(PathBuf),
    /// The system refused something.
    #[error("{path}: {error}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What it says.
        error: io::Error,
    },
}

/// What a file is, by its name.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    List,
    Single,
}

impl Folder {
    /// This one.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Puts the plugin into the file that counts.
    ///
    /// # Errors
    /// Why that is not possible now.
    pub fn put(&self, entry: &Entry) -> Result<Done, Trouble> {
        for _ in 0..ATTEMPTS {
            if let Some(done) = self.try_to_put(entry)? {
                return Ok(done);
            }
        }
        Err(Trouble::Restless(self.0.clone()))
    }

    /// None: somebody else has written meanwhile.
    fn try_to_put(&self, entry: &Entry) -> Result<Option<Done>, Trouble> {
        for (path, form) in self.files()? {
            let Some((text, metadata)) = read(&path)? else {
                continue;
            };
            let put = match form {
                Form::List => put_into_list(&path, &text, &metadata, entry),
                Form::Single => put_after(&path, &text, &metadata, entry),
            };
            match put {
                // Runtimes pass over it, too. But somebody may be writing it just now.
                Err(Trouble::File { reason, .. }) if !reason.is_used() && !is_recent(&metadata) => {
                }
                put => return put,
            }
        }
        Err(Trouble::Nothing(self.0.clone()))
    }

    /// The file that counts, if the plugin is in it as it should be.
    ///
    /// # Errors
    /// Why that cannot be said, or cannot be.
    pub fn has(&self, entry: &Entry) -> Result<bool, Trouble> {
        for (path, form) in self.files()? {
            let Some((text, _)) = read(&path)? else {
                continue;
            };
            match form {
                Form::List => match entry.put_into(&text) {
                    Ok(changed) => return Ok(changed.is_none()),
                    Err(reason) if reason.is_used() => return Err(unusable(&path, reason)),
                    Err(_) => {}
                },
                Form::Single => match entry.after(&text) {
                    Ok(_) => return Ok(false),
                    Err(reason) if reason.is_used() => return Err(unusable(&path, reason)),
                    Err(_) => {}
                },
            }
        }
        Ok(false)
    }

    /// When the newest of the installers was run first that have put the plugin into a list here; none: it is in none.
    pub fn installed_at(&self) -> Option<Stamp> {
        let files = self.files().unwrap_or_default().into_iter();
        let lists = files.filter(|it| it.1 == Form::List);
        let texts = lists.filter_map(|(path, _)| read(&path).ok().flatten());
        texts
            .filter_map(|(text, _)| lists::installed_at(&text))
            .max()
    }

    /// Takes the plugin out of all files, also of those that do not count. What fails is left for the end.
    ///
    /// # Errors
    /// What could not be done.
    pub fn take_out(&self) -> Result<Vec<PathBuf>, Vec<Trouble>> {
        let mut changed = Vec::new();
        let mut troubles = Vec::new();
        let files = match self.files() {
            Ok(files) => files,
            Err(Trouble::Io { error, .. }) if error.kind() == ErrorKind::NotFound => {
                return Ok(changed);
            }
            Err(trouble) => return Err(vec![trouble]),
        };
        let lists = files.into_iter().filter(|it| it.1 == Form::List);
        for (path, _) in lists {
            match take_out_of(&path) {
                Ok(true) => changed.push(path),
                Ok(false) => {}
                Err(trouble) => troubles.push(trouble),
            }
        }
        match troubles.is_empty() {
            true => Ok(changed),
            false => Err(troubles),
        }
    }

    /// The files that runtimes read, in their order.
    fn files(&self) -> Result<Vec<(PathBuf, Form)>, Trouble> {
        let failed = |error| Trouble::Io {
            path: self.0.clone(),
            error,
        };
        let mut files = Vec::new();
        for entry in fs::read_dir(&self.0).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            let form = match path.extension().and_then(|it| it.to_str()) {
                Some("conflist") => Form::List,
                Some("conf" | "json") => Form::Single,
                _ => continue,
            };
            if !path.is_dir() {
                files.push((path, form));
            }
        }
        files.sort_by(|one, other| one.0.as_os_str().cmp(other.0.as_os_str()));
        Ok(files)
    }
}

fn put_into_list(
    path: &Path,
    text: &str,
    metadata: &Metadata,
    entry: &Entry,
) -> Result<Option<Done>, Trouble> {
    let put = entry
        .put_into(text)
        .map_err(|reason| unusable(path, reason))?;
    let Some(put) = put else {
        return Ok(Some(Done::Nothing(path.to_owned())));
    };
    let is_put = replace_if(path, text, &put, metadata)?;
    Ok(is_put.then(|| Done::Put(path.to_owned())))
}

fn put_after(
    path: &Path,
    text: &str,
    metadata: &Metadata,
    entry: &Entry,
) -> Result<Option<Done>, Trouble> {
    let list = entry.after(text).map_err(|reason| unusable(path, reason))?;
    let place = with_suffix(path, LIST_SUFFIX);
    replace(&place, &list, metadata)?;
    let saved = with_suffix(path, SAVED_SUFFIX);
    rename(path, &saved)?;
    // Whoever has written it since has written what counts.
    if read(&saved)?.is_some_and(|(it, _)| it != text) {
        files::put_back(&saved, path).map_err(|error| io_trouble(path, error))?;
        return Ok(None);
    }
    Ok(Some(Done::Put(place)))
}

/// Whether the plugin was in it.
fn take_out_of(path: &Path) -> Result<bool, Trouble> {
    for _ in 0..ATTEMPTS {
        if let Some(was_in) = try_to_take_out_of(path)? {
            return Ok(was_in);
        }
    }
    Err(Trouble::Restless(path.to_owned()))
}

/// None: somebody else has written it meanwhile.
fn try_to_take_out_of(path: &Path) -> Result<Option<bool>, Trouble> {
    let Some((text, metadata)) = read(path)? else {
        return Ok(Some(false));
    };
    let Ok(Some(out)) = lists::take_out(&text) else {
        // Of a file that nobody can read, no runtime runs anything.
        return Ok(Some(false));
    };
    if let Some(single) = single_of(path) {
        let saved = with_suffix(&single, SAVED_SUFFIX);
        if saved.exists() {
            if single.exists() {
                // Its owner has written another one since.
                remove(&saved)?;
            } else {
                rename(&saved, &single)?;
            }
            remove(path)?;
            return Ok(Some(true));
        }
    }
    let is_out = match out.is_empty() {
        true => remove(path).map(|()| true)?,
        false => replace_if(path, &text, &out, &metadata)?,
    };
    Ok(is_out.then_some(true))
}

/// The configuration that a list was made of.
fn single_of(list: &Path) -> Option<PathBuf> {
    let name = list.file_name()?.to_str()?.strip_suffix(LIST_SUFFIX)?;
    let is_single = name.ends_with(".conf") || name.ends_with(".json");
    is_single.then(|| list.with_file_name(name))
}

/// None: it is gone meanwhile.
fn read(path: &Path) -> Result<Option<(String, Metadata)>, Trouble> {
    let read = || -> io::Result<_> {
        let metadata = fs::metadata(path)?;
        if metadata.len() > MAX_BYTES {
            return Ok((String::new(), metadata));
        }
        // What is not in UTF-8 is no JSON either.
        let text = String::from_utf8(fs::read(path)?).unwrap_or_default();
        Ok((text, metadata))
    };
    match read() {
        Ok(read) => Ok(Some(read)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(io_trouble(path, error)),
    }
}

fn replace(path: &Path, text: &str, like: &Metadata) -> Result<(), Trouble> {
    let mode = like.permissions().mode() & 0o777;
    files::replace(path, text.as_bytes(), mode).map_err(|error| io_trouble(path, error))
}

/// False: it is not as it was read any more.
fn replace_if(path: &Path, before: &str, text: &str, like: &Metadata) -> Result<bool, Trouble> {
    let mode = like.permissions().mode() & 0o777;
    let replaced = files::replace_if(path, before.as_bytes(), text.as_bytes(), mode);
    replaced.map_err(|error| io_trouble(path, error))
}

fn rename(from: &Path, to: &Path) -> Result<(), Trouble> {
    let renamed = fs::rename(from, to).and_then(|()| files::sync_folder(to));
    renamed.map_err(|error| io_trouble(from, error))
}

fn remove(path: &Path) -> Result<(), Trouble> {
    fs::remove_file(path).map_err(|error| io_trouble(path, error))
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

fn is_recent(metadata: &Metadata) -> bool {
    let age = metadata
        .modified()
        .map(|it| SystemTime::now().duration_since(it));
    // One from the future is as good as new.
    !matches!(age, Ok(Ok(age)) if age > RECENT)
}

fn unusable(path: &Path, reason: Unusable) -> Trouble {
    Trouble::File {
        path: path.to_owned(),
        reason,
    }
}

fn io_trouble(path: &Path, error: io::Error) -> Trouble {
    Trouble::Io {
        path: path.to_owned(),
        error,
    }
}

const LIST_SUFFIX: &str = ".conflist";
const SAVED_SUFFIX: &str = ".weft-saved";
/// How often it is begun anew.
const ATTEMPTS: usize = 10;
/// How long somebody may take to write a file.
const RECENT: Duration = Duration::from_secs(5);
/// Far more than any configuration has.
const MAX_BYTES: u64 = 4 * 1024 * 1024;

#[cfg(test)]
#[path = "folder_tests.rs"]
mod tests;
