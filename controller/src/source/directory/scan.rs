//! What the files say now, compared with what they said before.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{File, Metadata};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use serde_json::Value;

use super::file::{self, Contents, Document};
use crate::objects::{Fault, ObjectKey};
use crate::problems::{Origin, Problem, Problems, Scope};
use crate::source::Event;

/// Remembers what the files said.
#[derive(Debug)]
pub(super) struct Scanner {
    root: PathBuf,
    problems: Problems,
    files: BTreeMap<PathBuf, Known>,
    in_force: HashMap<ObjectKey, Definition>,
    /// Since when something in force was not found.
    missing: HashMap<ObjectKey, Instant>,
}

/// What a scan found.
#[derive(Debug, Default)]
pub(super) struct Scan {
    /// Whether the directory could be read.
    pub(super) readable: bool,
    /// Whether a file is just being written, or something was not found: look again soon.
    pub(super) unsettled: bool,
    /// Whether every file was read at least once. What was never read may close something.
    pub(super) whole: bool,
    pub(super) events: Vec<Event>,
}

/// Identifies a file or directory, whatever its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct FileId {
    device: u64,
    inode: u64,
}

/// A file as it was read.
#[derive(Debug, Default)]
struct Known {
    stamp: Option<Stamp>,
    was_read: bool,
    documents: Vec<Document>,
    problems: Vec<Problem>,
}

/// Changes whenever a file's content may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    id: FileId,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

#[derive(Clone, Debug)]
struct Definition {
    origin: Origin,
    prefix: String,
    value: Arc<Value>,
}

/// Why a file was not read.
enum Unread {
    /// It is as it was.
    Unchanged,
    /// It is just being written.
    Unsettled,
    /// It cannot be.
    Fault(Option<Stamp>, Fault),
}

/// Larger files are refused: they are a mistake, or an attack on the memory.
const MAX_FILE_BYTES: u64 = 32 * 1024 * 1024;
/// A file that was written to less than this ago may be incomplete: reading it now could make
/// deletions of what is not written yet.
const QUIET: Duration = Duration::from_millis(40);
/// What was not found for this long is gone. A document may be on its way from one file to another.
const GONE: Duration = Duration::from_millis(100);
/// The same, while files are still being written.
const GONE_AT_LAST: Duration = Duration::from_secs(2);

impl Scanner {
    pub(super) fn new(root: PathBuf, problems: Problems) -> Self {
        Self {
            root,
            problems,
            files: BTreeMap::new(),
            in_force: HashMap::new(),
            missing: HashMap::new(),
        }
    }

    /// Reads what changed. Blocks.
    pub(super) fn scan(&mut self) -> Scan {
        let mut found = vec![];
        let listed = list(&self.root, &mut HashSet::new(), &mut found);
        let mut readable = listed.is_ok();
        let mut problems = vec![];
        if readable && found.is_empty() && !self.in_force.is_empty() {
            // Whoever means to delete everything leaves a file that says so.
            let fault = Fault::new("", "holds no file any more: is it mounted?");
            let root = self.root.display().to_string();
            problems.push(Problem::of_file(root, None, fault, KEPT));
            readable = false;
        }
        if let Err((path, reason)) = listed {
            let fault = Fault::new("", format!("cannot be read: {reason}"));
            let path = path.display().to_string();
            problems.push(Problem::of_file(path, None, fault, KEPT));
        }
        let scope = Scope::Source(self.root.display().to_string());
        self.problems.replace(scope, problems);
        if !readable {
            return Scan::default();
        }
        let mut scan = Scan {
            readable,
            ..Scan::default()
        };
        found.sort();
        let mut files = std::mem::take(&mut self.files);
        for path in found {
            let mut known = files.remove(&path).unwrap_or_default();
            match known.update(&path) {
                Ok(()) | Err(Unread::Unchanged) => {}
                Err(Unread::Unsettled) => scan.unsettled = true,
                Err(Unread::Fault(stamp, fault)) => {
                    known.stamp = stamp;
                    let path = path.display().to_string();
                    let effect = if known.was_read { KEPT } else { NEVER_READ };
                    known.problems = vec![Problem::of_file(path, None, fault, effect)];
                }
            }
            self.files.insert(path, known);
        }
        for gone in files.into_keys() {
            let scope = Scope::Source(gone.display().to_string());
            self.problems.replace(scope, vec![]);
        }
        scan.whole = self.files.values().all(|it| it.was_read);
        self.compare(&mut scan);
        scan
    }

    /// Events that lead from what was in force to what the files say now.
    fn compare(&mut self, scan: &mut Scan) {
        let mut now: HashMap<ObjectKey, Definition> = HashMap::new();
        for (path, known) in &self.files {
            let place: Arc<str> = path.display().to_string().into();
            let mut problems = known.problems.clone();
            for document in &known.documents {
                let definition = Definition {
                    origin: Origin {
                        place: place.clone(),
                        document: Some(document.number),
                    },
                    prefix: document.prefix.clone(),
                    value: document.value.clone(),
                };
                match now.get(&document.key) {
                    None => {
                        if !self.is_in_force(&document.key, &definition) {
                            scan.events.push(definition.event(&document.key));
                        }
                        now.insert(document.key.clone(), definition);
                    }
                    Some(first) => problems.push(duplicate(document, &definition, first)),
                }
            }
            self.problems
                .replace(Scope::Source(place.to_string()), problems);
        }
        let enough = if scan.unsettled { GONE_AT_LAST } else { GONE };
        self.missing.retain(|key, _| !now.contains_key(key));
        for (key, before) in self.in_force.drain() {
            if now.contains_key(&key) {
                continue;
            }
            let since = *self.missing.entry(key.clone()).or_insert_with(Instant::now);
            if since.elapsed() < enough {
                scan.unsettled = true;
                now.insert(key, before);
            } else {
                self.missing.remove(&key);
                scan.events.push(Event::Delete { key });
            }
        }
        self.in_force = now;
    }

    fn is_in_force(&self, key: &ObjectKey, definition: &Definition) -> bool {
        self.in_force.get(key).is_some_and(|before| {
            before.origin == definition.origin
                && (Arc::ptr_eq(&before.value, &definition.value)
                    || before.value == definition.value)
        })
    }
}

impl Definition {
    fn event(&self, key: &ObjectKey) -> Event {
        let (key, origin) = (key.clone(), self.origin.clone());
        let mut event = Event::read(key, self.value.clone(), origin);
        if let Event::Invalid { fault, .. } = &mut event {
            fault.field = format!("{}{}", self.prefix, fault.field);
        }
        event
    }
}

impl Known {
    /// Reads the file if it changed. What it said before stays in case of an error.
    fn update(&mut self, path: &Path) -> Result<(), Unread> {
        let (stamp, contents) = read_file(path, self.stamp)?;
        self.stamp = Some(stamp);
        self.was_read = true;
        let Contents {
            mut documents,
            mut unidentified,
            unsupported,
            foreign,
        } = contents;
        // Of a name that is missing now, under a kind or group that is not ours: a typing error.
        for (number, name) in foreign {
            let missing = |before: &&Document| {
                before.is_named(&name) && documents.iter().all(|it| it.key != before.key)
            };
            if let Some(before) = self.documents.iter().find(missing) {
                let reason = format!("is no {} any more, nor of another kind of ours", before.key);
                unidentified.push((number, Fault::new("kind", reason)));
            }
        }
        let place = path.display().to_string();
        let problem = |(number, fault)| Problem::of_file(place.clone(), Some(number), fault, KEPT);
        self.problems = unidentified.into_iter().map(problem).collect();
        if !self.problems.is_empty() {
            // One of these may be what is missing now: nothing counts as gone.
            let missing = |before: &Document| documents.iter().all(|it| it.key != before.key);
            let kept: Vec<_> = self.documents.drain(..).filter(|it| missing(it)).collect();
            documents.extend(kept);
        }
        let problem = |(number, fault)| {
            Problem::of_file(place.clone(), Some(number), fault, "it has no effect")
        };
        self.problems.extend(unsupported.into_iter().map(problem));
        self.documents = documents;
        Ok(())
    }
}

impl FileId {
    pub(super) fn of(path: &Path) -> std::io::Result<Self> {
        std::fs::metadata(path).map(|it| Self::in_metadata(&it))
    }

    fn in_metadata(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
        }
    }
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        Self {
            id: FileId::in_metadata(metadata),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

const KEPT: &str = "what it said before stays in force";
const NEVER_READ: &str = "it says nothing; a controller that starts waits until it can be read, \
    for it may close something";

fn read_file(path: &Path, known: Option<Stamp>) -> Result<(Stamp, Contents), Unread> {
    let unreadable = |reason: std::io::Error| {
        let fault = Fault::new("", format!("cannot be read: {reason}"));
        Unread::Fault(None, fault)
    };
    let metadata = std::fs::metadata(path).map_err(unreadable)?;
    let stamp = Stamp::of(&metadata);
    if known == Some(stamp) {
        return Err(Unread::Unchanged);
    }
    let refuse = |reason: String| Err(Unread::Fault(Some(stamp), Fault::new("", reason)));
    if !metadata.is_file() {
        return refuse("not a regular file".to_owned());
    }
    if stamp.size > MAX_FILE_BYTES {
        return refuse(format!("larger than {MAX_FILE_BYTES} bytes"));
    }
    let age = SystemTime::now().duration_since(metadata.modified().map_err(unreadable)?);
    if age.is_ok_and(|age| age < QUIET) {
        return Err(Unread::Unsettled);
    }
    let mut file = File::open(path).map_err(unreadable)?;
    let mut bytes = vec![];
    file.by_ref()
        .take(MAX_FILE_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(unreadable)?;
    let after = file.metadata().map_err(unreadable)?;
    if Stamp::of(&after) != stamp || bytes.len() as u64 != stamp.size {
        return Err(Unread::Unsettled);
    }
    match file::read(&bytes) {
        Ok(contents) => Ok((stamp, contents)),
        Err(fault) => Err(Unread::Fault(Some(stamp), fault)),
    }
}

/// Lists manifests below a folder. Names that begin with a dot are not for us: editors' files, and
/// the folders behind the links of a mounted ConfigMap.
fn list(
    folder: &Path,
    visited: &mut HashSet<FileId>,
    found: &mut Vec<PathBuf>,
) -> Result<(), (PathBuf, std::io::Error)> {
    let failed = |reason| (folder.to_owned(), reason);
    // A link may lead back to where it is.
    if !visited.insert(FileId::of(folder).map_err(failed)?) {
        return Ok(());
    }
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with('.') {
            continue;
        }
        let extension = path.extension().and_then(|it| it.to_str());
        if matches!(extension, Some("yaml" | "yml" | "json")) {
            found.push(path);
        } else if path.is_dir() {
            list(&path, visited, found)?;
        }
    }
    Ok(())
}

fn duplicate(document: &Document, definition: &Definition, first: &Definition) -> Problem {
    let Origin {
        place,
        document: at,
    } = &first.origin;
    let at = at.map_or(String::new(), |it| format!(", document {it},"));
    let field = format!("{}metadata.name", document.prefix);
    let fault = Fault::new(field, format!("{place}{at} defines the same object"));
    let effect = "the other definition counts";
    Problem::of(&document.key, Some(&definition.origin), fault, effect)
}
