//! A cluster's API server as a source: lists and watches of every kind that the [index](crate::index) reads and the
//! server serves, kept up with what is installed and removed.
//!
//! | part | concern |
//! |---|---|
//! | `connect` | where the API server is |
//! | `discovery` | what it serves, and in which version it is read |
//! | `watch` | one kind: list, watch, list beside it |
//! | `pages`, `page`, `changes` | a list, page by page, and what happens after it |
//! | `document`, `trim` | an object as it arrives, and what of it is looked at |
//! | `reached` | how far all of them have come |
//! | `world`, `known` | from what watches say to changes for the index: pure |
//!
//! Nothing here takes silence for an answer. What cannot be listed, discovered or read stays as it was, and a
//! controller that starts tells agents nothing until every kind that is served was listed once.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use kube::Client;
use kube::core::ApiResource;
use tokio::sync::{Notify, mpsc};
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{Batch, Source};
use crate::objects::{Fault, ObjectKind};
use crate::pause::{Pause, about};
use crate::problems::{Problem, Problems, Scope};
use crate::progress::Progress;
use crate::telemetry::Metrics;
use discovery::Found;
use document::Form;
use reached::Course;
use watch::{News, Report, Watch};
use world::{PLACE, Told, World, shown_elsewhere};

mod changes;
mod connect;
mod discovery;
mod document;
mod known;
mod page;
mod pages;
mod reached;
mod trim;
mod watch;
mod world;

pub use connect::{ConnectError, Connection};
pub(crate) use connect::{asked_pause_of, asked_pause_of_watch, explain, explain_watch};
pub(crate) use discovery::{Served, served};
pub(crate) use document::Document;

/// A cluster's API server.
pub struct Kubernetes {
    client: Client,
    problems: Problems,
    metrics: Arc<Metrics>,
    progress: Progress,
    believe_netns: bool,
    pace: Pace,
}

/// How fast things are done. Tests are in more of a hurry than clusters.
#[derive(Clone, Debug)]
pub struct Pace {
    /// How often it is looked what is served.
    pub look: Duration,
    /// A kind that is not served for this long is removed. An API server that starts may not serve it yet.
    pub removed: Duration,
    /// How long to wait for further changes after one.
    pub settle: Duration,
    /// How long to wait after a first failure.
    pub shortest_pause: Duration,
    /// How long to wait after many.
    pub longest_pause: Duration,
    /// How long the server can have it that nothing is asked, as it says by `Retry-After`.
    pub longest_asked_pause: Duration,
    /// Objects per page of a list.
    pub page: u32,
    /// How often everything is listed anew beside the watch, for what no watch can notice: a cluster that was restored
    /// from a backup.
    pub anew: Duration,
    /// After a time without the API server that is as long as this, everything is listed anew, too, within about as long
    /// again: nobody restores a cluster in less.
    pub outage: Duration,
    /// Where a connection breaks on which nothing came for as long as this, the server is asked for its version; from the
    /// end of it on everything is listed: the server marks where it is every minute, so the connection was dead for a while.
    pub silence: Range<Duration>,
    /// The least time between lists of a kind, where agents know of more than was heard.
    pub between_lists: Duration,
    /// How long the server lets a watch last. A connection that is dead without a sign is noticed after this.
    pub watch_seconds: u32,
}

const WATCH_SECONDS: u32 = 105;

impl Default for Pace {
    fn default() -> Self {
        Self {
            look: Duration::from_secs(15),
            removed: Duration::from_secs(60),
            settle: Duration::from_millis(20),
            shortest_pause: Duration::from_millis(800),
            longest_pause: Duration::from_secs(30),
            longest_asked_pause: connect::LONGEST_ASKED_PAUSE,
            page: 500,
            anew: Duration::from_secs(3600),
            outage: Duration::from_secs(5),
            silence: Duration::from_secs(5)..Duration::from_secs(75),
            between_lists: Duration::from_secs(10),
            watch_seconds: WATCH_SECONDS,
        }
    }
}

impl Pace {
    fn pause(&self) -> Pause {
        Pause::new(self.shortest_pause, self.longest_pause)
    }
}

impl Kubernetes {
    /// What an API server says. With `believe_netns`, annotations of pods say where their network namespaces are; that
    /// is for clusters in which nobody else may write pods.
    pub fn new(client: Client, believe_netns: bool, problems: Problems) -> Self {
        Self {
            client,
            problems,
            metrics: Arc::default(),
            progress: Progress::default(),
            believe_netns,
            pace: Pace::default(),
        }
    }

    /// Counts there what fails.
    pub fn counting(self, metrics: Arc<Metrics>) -> Self {
        Self { metrics, ..self }
    }

    /// Says there how far it has come.
    pub fn telling(self, progress: Progress) -> Self {
        Self { progress, ..self }
    }

    /// Does things at another pace.
    pub fn with_pace(self, pace: Pace) -> Self {
        Self { pace, ..self }
    }
}

impl fmt::Debug for Kubernetes {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = formatter.debug_struct("Kubernetes");
        shown.field("pace", &self.pace).finish_non_exhaustive()
    }
}

impl Source for Kubernetes {
    async fn run(
        self,
        batches: mpsc::Sender<Batch>,
        stop: CancellationToken,
    ) -> anyhow::Result<()> {
        let (reports, mut reported) = mpsc::channel(1024);
        let mut wanted = self.progress.wanted();
        let mut following = Following::new(self, reports);
        let mut settled: Option<Instant> = None;
        let mut pause = following.pace.pause();
        let mut looking = Box::pin(discovery_after(following.client.clone(), Duration::ZERO));
        // Whether it is looked early already: many kinds that are not served must not keep it from an end.
        let mut hurried = true;
        loop {
            let waits = following.waits();
            settled = waits.map(|wait| {
                let soon = Instant::now() + wait;
                settled.map_or(soon, |at| at.min(soon))
            });
            let is_settled = settled.is_some_and(|at| at <= Instant::now());
            tokio::select! {
                () = stop.cancelled() => return Ok(()),
                permit = batches.reserve(), if is_settled => match permit {
                    Ok(permit) => permit.send(following.batch()),
                    Err(_) => return Ok(()),
                },
                () = sleep_until(settled), if !is_settled => {}
                // The sender lives as long as the source.
                Ok(()) = wanted.changed() => following.list(&wanted.borrow_and_update()),
                Some(report) = reported.recv() => {
                    if following.hear(report) && !hurried {
                        hurried = true;
                        let soon = following.pace.shortest_pause;
                        looking = Box::pin(discovery_after(following.client.clone(), soon));
                    }
                }
                outcome = &mut looking => {
                    hurried = false;
                    let wait = match outcome {
                        Ok((began, found)) => {
                            following.follow(found);
                            following.reached.looked(began);
                            about(following.pace.look)
                        }
                        Err(error) => {
                            following.cannot_look(&error);
                            let asked = connect::asked_pause(&error);
                            let asked = asked.map(|it| it.min(following.pace.longest_asked_pause));
                            pause.after_asked(Instant::now(), asked)
                        }
                    };
                    looking = Box::pin(discovery_after(following.client.clone(), wait));
                }
            }
        }
    }
}

/// What is served, and since when that was asked.
async fn discovery_after(client: Client, wait: Duration) -> Result<(Instant, Found), kube::Error> {
    tokio::time::sleep(wait).await;
    let began = Instant::now();
    Ok((began, discovery::look(&client).await?))
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// How soon it is said that it was heard of something that is not looked at.
const FURTHER: Duration = Duration::from_millis(500);

/// The watches that run, and what they say.
struct Following {
    client: Client,
    problems: Problems,
    metrics: Arc<Metrics>,
    believe_netns: bool,
    pace: Pace,
    reports: mpsc::Sender<Report>,
    watches: BTreeMap<ObjectKind, Running>,
    number: u64,
    world: World,
    progress: Progress,
    reached: Course,
    /// Kinds without which nothing is begun, and that are not served.
    lacking: Vec<ObjectKind>,
    /// Kinds of which it is not clear whether they are served, and why.
    doubtful: BTreeMap<ObjectKind, String>,
    /// Kinds that cannot be listed or watched, and why.
    failing: BTreeMap<ObjectKind, String>,
    /// Whether it was ever found out what is served.
    looked: bool,
}

/// A watch that runs.
struct Running {
    number: u64,
    resource: ApiResource,
    task: AbortHandle,
    /// Has it list everything soon.
    sooner: Arc<Notify>,
    /// Since when the kind is not among what is served any more.
    absent: Option<Instant>,
    /// How often in a row it was asked for objects of the kind, and did not know it.
    unknown: u32,
}

/// A kind that is not among what is served is gone when the server did not know it so often, asked for its objects: one
/// answer may be that of a server that starts, or that is not as fresh as another.
const GONE: u32 = 2;

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

const KEPT: &str = "what it said before stays in force; a controller that starts waits";
const STOOD_FOR: &str = "its policies may select anybody: until they were read, what meshed pods have with others of their \
                         node goes by tunnels";

impl Following {
    fn new(source: Kubernetes, reports: mpsc::Sender<Report>) -> Self {
        Self {
            client: source.client,
            problems: source.problems,
            metrics: source.metrics,
            believe_netns: source.believe_netns,
            pace: source.pace,
            reports,
            watches: BTreeMap::new(),
            number: 0,
            world: World::new(),
            progress: source.progress,
            reached: Course::default(),
            lacking: vec![],
            doubtful: BTreeMap::new(),
            failing: BTreeMap::new(),
            looked: false,
        }
    }

    fn is_due(&self) -> bool {
        // What is told first is everything, but for what is not waited for.
        let mut doubtful = self.doubtful.keys();
        let is_clear =
            self.world.is_started() || doubtful.all(|it| shown_elsewhere().any(|one| one == *it));
        self.looked && is_clear && self.lacking.is_empty() && self.world.is_due()
    }

    /// How long to wait with what there is to be handed over; none: there is nothing.
    fn waits(&self) -> Option<Duration> {
        if self.is_due() {
            Some(self.pace.settle)
        } else {
            // Nothing that is looked at: but that it was heard of.
            let further = self.world.is_started() && self.reached.has_come_further();
            further.then_some(FURTHER)
        }
    }

    /// What is to be handed over.
    fn batch(&mut self) -> Batch {
        let mut batch = self.world.batch();
        batch.reached = self.reached.hands_over();
        batch
    }

    /// Lists kinds of which agents know more.
    fn list(&self, wanted: &BTreeMap<ObjectKind, Instant>) {
        for (kind, since) in wanted {
            if self.reached.is_listed_since(*kind, *since) {
                continue;
            }
            if let Some(running) = self.watches.get(kind) {
                running.sooner.notify_one();
            }
        }
    }

    /// Takes in what a watch says; whether it is to be looked what is served.
    fn hear(&mut self, report: Report) -> bool {
        let Report { kind, number, news } = report;
        // Of a watch that another took the place of.
        let running = self.watches.get_mut(&kind);
        let Some(running) = running.filter(|it| it.number == number) else {
            return false;
        };
        match &news {
            // Says nothing about the server yet.
            News::Told(Told::Began) | News::Answered | News::Failed(_) => {}
            News::Told(_) | News::Nothing(_) | News::Recovered => running.unknown = 0,
            News::Unserved(_) => running.unknown += 1,
        }
        if matches!(&news, News::Told(told) if !matches!(told, Told::Began)) {
            self.progress.hears();
        }
        match news {
            News::Answered => {
                self.progress.hears();
                false
            }
            News::Nothing(version) => {
                self.progress.hears();
                self.reached.bookmark(kind, version);
                false
            }
            News::Told(told) => {
                self.reached.hears(kind, &told);
                let names = Scope::Source(format!("{PLACE} names of {}", kind));
                let is_complete = matches!(told, Told::Complete { .. });
                let before = shown_elsewhere().map(|it| self.world.is_read_as_kept(it));
                let before: Vec<bool> = before.collect();
                if is_complete {
                    self.problems.replace(names.clone(), vec![]);
                }
                if let Err(problem) = self.world.take(kind, told) {
                    self.problems.replace(names, vec![*problem]);
                }
                let after = shown_elsewhere().map(|it| self.world.is_read_as_kept(it));
                if is_complete || !after.eq(before) {
                    self.note_away();
                }
                false
            }
            News::Failed(reason) => {
                self.failing.insert(kind, reason);
                self.note_away();
                self.report_watch(kind);
                false
            }
            News::Recovered => {
                self.failing.remove(&kind);
                self.note_away();
                self.report_watch(kind);
                false
            }
            News::Unserved(reason) => {
                self.failing.insert(kind, reason);
                self.note_away();
                self.report_watch(kind);
                true
            }
        }
    }

    /// Watches what is served, and no more what is not served any more for a while.
    fn follow(&mut self, Found { served, doubtful }: Found) {
        self.looked = true;
        self.doubtful = doubtful;
        let lacking = discovery::REQUIRED.into_iter();
        let is_lacking =
            |it: &ObjectKind| !served.contains_key(it) && !self.doubtful.contains_key(it);
        self.lacking = lacking.filter(is_lacking).collect();
        for (kind, resource) in &served {
            match self.watches.get_mut(kind) {
                Some(running) if running.resource == *resource => running.absent = None,
                _ => self.watch(*kind, resource.clone()),
            }
        }
        let now = Instant::now();
        let mut removed = vec![];
        for (kind, running) in &mut self.watches {
            if self.doubtful.contains_key(kind) {
                running.absent = None;
            } else if !served.contains_key(kind) {
                let since = *running.absent.get_or_insert(now);
                if now - since >= self.pace.removed && running.unknown >= GONE {
                    removed.push(*kind);
                }
            }
        }
        for kind in removed {
            tracing::info!(%kind, "a kind is not served any more");
            self.watches.remove(&kind);
            self.reached.forget(kind);
            self.world.forget(kind);
            self.failing.remove(&kind);
            self.report_watch(kind);
        }
        self.note_away();
        self.report_look();
    }

    /// What somebody else's API server shows is not waited for while that is away, or refuses it.
    fn note_away(&mut self) {
        let is_away = |it: &ObjectKind| {
            let cannot_be_read = self.doubtful.contains_key(it) || self.failing.contains_key(it);
            cannot_be_read && !self.world.is_listed(*it)
        };
        let away: BTreeSet<ObjectKind> = shown_elsewhere().filter(is_away).collect();
        away.iter().for_each(|it| self.reached.excuse(*it));
        self.world.away(away);
        if self.looked {
            self.report_look();
        }
        shown_elsewhere().for_each(|it| self.report_watch(it));
    }

    /// What holds while a kind cannot be read. None: nobody misses it.
    fn meanwhile(&self, kind: ObjectKind) -> Option<&'static str> {
        let is_waited_for = !shown_elsewhere().any(|it| it == kind);
        if is_waited_for || self.world.is_listed(kind) {
            return Some(KEPT);
        }
        (!self.world.is_read_as_kept(kind)).then_some(STOOD_FOR)
    }

    fn watch(&mut self, kind: ObjectKind, resource: ApiResource) {
        self.number += 1;
        tracing::info!(
            %kind,
            version = resource.version,
            "watches a kind"
        );
        self.world.watch(kind);
        self.reached.watch(kind);
        let sooner = Arc::new(Notify::new());
        // Of the watch before.
        self.failing.remove(&kind);
        self.report_watch(kind);
        let watch = Watch {
            client: self.client.clone(),
            form: Form {
                kind,
                api_version: resource.api_version.clone(),
                believe_netns: self.believe_netns,
            },
            resource: resource.clone(),
            number: self.number,
            pace: self.pace.clone(),
            metrics: self.metrics.clone(),
            reports: self.reports.clone(),
            sooner: sooner.clone(),
        };
        let running = Running {
            number: self.number,
            resource,
            task: tokio::spawn(watch.run()).abort_handle(),
            sooner,
            absent: None,
            unknown: 0,
        };
        self.watches.insert(kind, running);
    }

    fn cannot_look(&mut self, error: &kube::Error) {
        let reason = format!(
            "the API server cannot be asked what it serves: {}",
            connect::explain(error)
        );
        self.problems.of_place(PLACE, Some((reason, KEPT)));
    }

    fn report_look(&self) {
        let problem = |kind: &ObjectKind| {
            let reason = format!(
                "{} is not served in version {}: Weft needs Kubernetes 1.21 or later",
                kind,
                kind.versions().join(" or ")
            );
            Problem::of_file(PLACE, None, Fault::new("", reason), KEPT)
        };
        let doubt = |(kind, why): (&ObjectKind, &String)| {
            let reason = format!(
                "the API server says that there is a version of group {} in which {kind} may be, and cannot say what is in \
                 it: {why}: is it starting, an API server behind it (of an APIService) away, or one left over?",
                kind.group(),
            );
            let meanwhile = self.meanwhile(*kind)?;
            let fault = Fault::new("", reason);
            Some(Problem::of_file(PLACE, None, fault, meanwhile))
        };
        let lacking = self.lacking.iter().map(problem);
        let problems = lacking.chain(self.doubtful.iter().filter_map(doubt));
        let problems = problems.collect();
        self.problems
            .replace(Scope::Source(PLACE.to_owned()), problems);
    }

    /// Says why a kind cannot be listed or watched, if that is so, and somebody misses it.
    fn report_watch(&self, kind: ObjectKind) {
        let reason = self.failing.get(&kind);
        let problem = reason.zip(self.meanwhile(kind)).map(|(reason, effect)| {
            let fault = Fault::new("", format!("{kind}: {reason}"));
            Problem::of_file(PLACE, None, fault, effect)
        });
        let scope = Scope::Source(format!("{PLACE} {kind}"));
        self.problems.replace(scope, problem.into_iter().collect());
    }
}
