//! What is wrong with what the controller was given: objects it cannot use, files it cannot read,
//! agents that reject what they were sent. One list, for the log, the metrics and `/problems`.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::Serialize;
use weft_core::Name;
use weft_proto::Key;

use crate::objects::{Fault, ObjectKey};

/// All present problems, shared by the parts that find them, and what is worth knowing besides.
#[derive(Clone, Debug, Default)]
pub struct Problems {
    all: Arc<Mutex<BTreeMap<Scope, Vec<Problem>>>>,
    notices: Arc<Mutex<BTreeMap<Name, Notice>>>,
}

/// What is as it should be, and perhaps not as somebody thinks: pods of a namespace that opt in and are left to another mesh.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Notice {
    /// The namespace.
    pub namespace: String,
    /// How many pods it is about.
    pub pods: usize,
    /// Some of them.
    pub examples: Vec<String>,
    /// What is so.
    pub reason: String,
    /// What follows.
    pub effect: String,
}

/// A problem.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// Where the object comes from: a file's path, or the name of another source.
    pub file: Option<String>,
    /// Which document of the file, counted from 1; empty documents do not count.
    pub document: Option<usize>,
    /// The object.
    pub object: Option<String>,
    /// The offending field, as a path; empty: the whole.
    pub field: String,
    /// What is wrong.
    pub reason: String,
    /// What holds meanwhile.
    pub effect: String,
}

/// Who found problems. Whoever reports for a scope replaces what it reported for it before.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scope {
    /// The source could not read this place.
    Source(String),
    /// An object, in one respect.
    Object(ObjectKey, Facet),
    /// What was made of objects for agents.
    Resource(Key),
    /// The certificate authority's files.
    Authority,
    /// The roots that are not valid now.
    Roots,
    /// The file of join tokens.
    Tokens,
    /// The flags and what they lack.
    Settings,
    /// What an agent rejected.
    Agent(String),
}

/// In which respect an object has a problem.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Facet {
    /// It cannot be used as it is written.
    Content,
    /// A part of it is ignored.
    Part,
    /// What it is for is not there.
    Target,
    /// It names something else that is not there.
    Reference,
    /// It competes with another object.
    Conflict,
    /// It says something that has no effect on an object such as it.
    Idle,
    /// What is made of it is too large for agents.
    Size,
    /// Nobody uses it, so that agents are not told of it. Said on it, and no problem.
    Unused,
}

/// Where an object was found.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Origin {
    /// A file's path, or the name of another source.
    pub place: Arc<str>,
    /// Which document of a file, counted from 1.
    pub document: Option<usize>,
}

impl Problem {
    /// A problem of an object.
    pub fn of(
        key: &ObjectKey,
        origin: Option<&Origin>,
        fault: Fault,
        effect: impl Into<String>,
    ) -> Self {
        Self {
            file: origin.map(|it| it.place.to_string()),
            document: origin.and_then(|it| it.document),
            object: Some(key.to_string()),
            field: fault.field,
            reason: fault.reason,
            effect: effect.into(),
        }
    }

    /// A problem of a file.
    pub fn of_file(
        file: impl Into<String>,
        document: Option<usize>,
        fault: Fault,
        effect: impl Into<String>,
    ) -> Self {
        Self {
            file: Some(file.into()),
            document,
            object: None,
            field: fault.field,
            reason: fault.reason,
            effect: effect.into(),
        }
    }
}

/// In one line, for people.
impl fmt::Display for Problem {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(file) = &self.file {
            write!(formatter, "{file}")?;
            if let Some(number) = self.document {
                write!(formatter, " (document {number})")?;
            }
            formatter.write_str(": ")?;
        }
        if let Some(object) = &self.object {
            write!(formatter, "{object}: ")?;
        }
        if !self.field.is_empty() {
            write!(formatter, "{}: ", self.field)?;
        }
        write!(formatter, "{}: {}", self.reason, self.effect)
    }
}

impl Problems {
    /// Replaces what is known for a scope; none clears it. What is new is logged once.
    pub fn replace(&self, scope: Scope, problems: Vec<Problem>) {
        let mut all = self.locked();
        let before = if problems.is_empty() {
            all.remove(&scope)
        } else {
            all.insert(scope.clone(), problems.clone())
        };
        drop(all);
        let before = before.unwrap_or_default();
        for problem in problems.iter().filter(|it| !before.contains(it)) {
            tracing::warn!(
                file = problem.file,
                document = problem.document,
                object = problem.object,
                field = problem.field,
                effect = problem.effect,
                "{}",
                problem.reason
            );
        }
        if problems.is_empty() && !before.is_empty() {
            tracing::info!(?scope, "a problem is solved");
        }
    }

    /// Replaces what is wrong with a place that is read or written as a whole: a reason, and what holds meanwhile. None:
    /// nothing is.
    pub fn of_place(&self, place: &str, failure: Option<(String, &str)>) {
        let problem = failure
            .map(|(reason, effect)| Problem::of_file(place, None, Fault::new("", reason), effect));
        let scope = Scope::Source(place.to_owned());
        self.replace(scope, problem.into_iter().collect());
    }

    /// All present problems.
    pub fn list(&self) -> Vec<Problem> {
        self.locked().values().flatten().cloned().collect()
    }

    /// Replaces what is worth knowing of a namespace; none clears it. What is new is logged once.
    pub fn notice(&self, namespace: &Name, notice: Option<Notice>) {
        let mut notices = locked(&self.notices);
        let before = match notice.clone() {
            Some(notice) => notices.insert(namespace.clone(), notice),
            None => notices.remove(namespace),
        };
        drop(notices);
        if let (Some(notice), None) = (notice, before) {
            let (effect, pods) = (&notice.effect, notice.pods);
            tracing::info!(%namespace, pods, effect, "{}", notice.reason);
        }
    }

    /// All that is worth knowing.
    pub fn notices(&self) -> Vec<Notice> {
        locked(&self.notices).values().cloned().collect()
    }

    /// How many problems there are.
    pub fn count(&self) -> usize {
        self.locked().values().map(Vec::len).sum()
    }

    fn locked(&self) -> MutexGuard<'_, BTreeMap<Scope, Vec<Problem>>> {
        locked(&self.all)
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change is one insert or remove: a panic elsewhere leaves it whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
