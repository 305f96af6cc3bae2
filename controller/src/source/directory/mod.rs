//! A directory of manifests as a source: YAML or JSON files with any number of documents each,
//! watched, in effect a moment after they are written.
//!
//! Whatever cannot be read keeps what it said before: a file in the middle of being written, a
//! directory that is not mounted, a document with a typing error. Only a document that is
//! recognisably gone is a deletion.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use notify::{RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::{Batch, Event, Source};
use crate::objects::{Fault, ObjectKey};
use crate::problems::{Problem, Problems, Scope};
use scan::Scanner;

mod file;
mod scan;

/// A directory of manifests.
#[derive(Debug)]
pub struct Directory {
    root: PathBuf,
    problems: Problems,
}

/// How long to wait for further changes after one.
const SETTLE: Duration = Duration::from_millis(50);
/// How often to look without being told: for changes that notifications miss, like those of the
/// target of a symbolic link, or on a network file system.
const RESCAN: Duration = Duration::from_secs(2);

impl Directory {
    /// The manifests below a directory.
    pub fn new(root: PathBuf, problems: Problems) -> Self {
        Self { root, problems }
    }
}

impl Source for Directory {
    async fn run(
        self,
        batches: mpsc::Sender<Batch>,
        stop: CancellationToken,
    ) -> anyhow::Result<()> {
        let (notices, mut noticed) = mpsc::channel(1);
        let mut watch = Watch::new(self.root.clone(), notices, self.problems.clone());
        let mut scanner = Scanner::new(self.root, self.problems);
        let mut first = true;
        let mut pending = Pending::default();
        loop {
            watch.renew();
            // Before the scan, so that what changes during it is noticed after it.
            while noticed.try_recv().is_ok() {}
            let (returned, scan) = tokio::task::spawn_blocking(move || {
                let scan = scanner.scan();
                (scanner, scan)
            })
            .await?;
            scanner = returned;
            pending.add(scan.events);
            let wait = if scan.unsettled { SETTLE } else { RESCAN };
            // The first batch is everything, or else agents would open what is not there yet.
            let due = match first {
                true => scan.readable && scan.whole,
                false => !pending.is_empty(),
            };
            if due {
                first = false;
                let batch = pending.take();
                tokio::select! {
                    () = stop.cancelled() => return Ok(()),
                    sent = batches.send(batch) => if sent.is_err() { return Ok(()) },
                }
            }
            tokio::select! {
                () = stop.cancelled() => return Ok(()),
                () = tokio::time::sleep(wait) => {}
                _ = noticed.recv() => tokio::time::sleep(SETTLE).await,
            }
        }
    }
}

/// Changes that were not handed over yet: the last one of each object.
#[derive(Default)]
struct Pending(BTreeMap<ObjectKey, Event>);

impl Pending {
    fn add(&mut self, events: Vec<Event>) {
        let named = events.into_iter().map(|it| (it.key().clone(), it));
        self.0.extend(named);
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn take(&mut self) -> Batch {
        let events = std::mem::take(&mut self.0).into_values();
        events.collect::<Vec<_>>().into()
    }
}

/// Notifications of changes below the root, renewed when the root becomes another directory.
struct Watch {
    root: PathBuf,
    notices: mpsc::Sender<()>,
    problems: Problems,
    watcher: Option<(RecommendedWatcher, scan::FileId)>,
}

impl Watch {
    fn new(root: PathBuf, notices: mpsc::Sender<()>, problems: Problems) -> Self {
        Self {
            root,
            notices,
            problems,
            watcher: None,
        }
    }

    fn renew(&mut self) {
        let now = scan::FileId::of(&self.root).ok();
        if self.watcher.as_ref().map(|(_, id)| *id) == now {
            return;
        }
        self.watcher = None;
        let Some(id) = now else {
            // The scan reports that the directory cannot be read.
            return;
        };
        let mut problems = vec![];
        match self.watch() {
            Ok(watcher) => self.watcher = Some((watcher, id)),
            Err(reason) => {
                let fault = Fault::new("", format!("cannot be watched: {reason}"));
                let effect = format!("changes are found every {} s", RESCAN.as_secs());
                let root = self.root.display().to_string();
                problems.push(Problem::of_file(root, None, fault, effect));
            }
        }
        let scope = Scope::Source(format!("watch of {}", self.root.display()));
        self.problems.replace(scope, problems);
    }

    fn watch(&self) -> notify::Result<RecommendedWatcher> {
        let notices = self.notices.clone();
        let mut watcher = notify::recommended_watcher(move |event: notify::Result<_>| {
            let reading = |it: &notify::Event| matches!(it.kind, notify::EventKind::Access(_));
            if !event.as_ref().is_ok_and(reading) {
                // Full: somebody is being told already.
                let _ = notices.try_send(());
            }
        })?;
        watcher.watch(&self.root, RecursiveMode::Recursive)?;
        Ok(watcher)
    }
}

#[cfg(test)]
mod tests;
