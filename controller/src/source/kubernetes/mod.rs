//! A cluster's API server as a source: lists and watches of every kind that the [index](crate::index) reads and the
//! server serves, kept up with what is installed and removed.
//!
//! | part | concern |
//! |---|---|
//! | `connect` | where the API server is |
//! | `discovery` | what it serves, and in which version it is read |
//! | `watch` | one kind: list, watch, begin anew |
//! | `document`, `trim` | an object as it arrives, and what of it is looked at |
//! | `reached` | how far all of them have come |
//! | `world` | from what watches say to changes for the index: pure |
//!
//! Nothing here takes silence for an answer. What cannot be listed, discovered or read stays as it was, and a
//! controller that starts tells agents nothing until every kind that is served was listed once.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use kube::Client;
use kube::core::ApiResource;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{Batch, Source};
use crate::objects::{Fault, ObjectKind};
use crate::pause::{Pause, about};
use crate::problems::{Problem, Problems, Scope};
use crate::progress::Progress;
use reached::Reached;
use watch::{News, Report, Watch};
use world::{PLACE, Told, World};

mod connect;
mod discovery;
mod document;
mod reached;
mod trim;
mod watch;
mod world;

pub use connect::{ConnectError, Connection};
pub(crate) use connect::{explain, explain_watch};
pub(crate) use discovery::{Served, look as served};
pub(crate) use document::Document;

/// A cluster's API server.
pub struct Kubernetes {
    client: Client,
    problems: Problems,
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
    /// Objects per page of a list.
    pub page: u32,
    /// How often everything is listed anew, for what no watch can notice: a cluster that was restored from a backup.
    pub anew: Duration,
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
            page: 500,
            anew: Duration::from_secs(3600),
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
            progress: Progress::default(),
            believe_netns,
            pace: Pace::default(),
        }
    }

    /// Tells there how far it has come.
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
        let mut following = Following::new(self, reports);
        let mut ready: Option<Instant> = None;
        let mut pause = following.pace.pause();
        let mut looking = Box::pin(discovery_after(following.client.clone(), Duration::ZERO));
        // Whether it is looked early already: many kinds that are not served must not keep it from an end.
        let mut hurried = true;
        loop {
            ready = following.waits().map(|wait| {
                let soon = Instant::now() + wait;
                ready.map_or(soon, |at| at.min(soon))
            });
            let is_ready = ready.is_some_and(|at| at <= Instant::now());
            tokio::select! {
                () = stop.cancelled() => return Ok(()),
                permit = batches.reserve(), if is_ready => match permit {
                    Ok(permit) => permit.send(following.batch()),
                    Err(_) => return Ok(()),
                },
                () = sleep_until(ready), if !is_ready => {}
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
                        Ok(served) => {
                            following.follow(served);
                            about(following.pace.look)
                        }
                        Err(error) => {
                            following.cannot_look(&error);
                            pause.after(Instant::now())
                        }
                    };
                    looking = Box::pin(discovery_after(following.client.clone(), wait));
                }
            }
        }
    }
}

async fn discovery_after(client: Client, wait: Duration) -> Result<Served, kube::Error> {
    tokio::time::sleep(wait).await;
    discovery::look(&client).await
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// How soon it is told that it was heard of something that is not looked at.
const FURTHER: Duration = Duration::from_secs(1);

/// The watches that run, and what they say.
struct Following {
    client: Client,
    problems: Problems,
    reached: Reached,
    pace: Pace,
    reports: mpsc::Sender<Report>,
    watches: BTreeMap<ObjectKind, Running>,
    number: u64,
    world: World,
    /// Kinds without which nothing is begun, and that are not served.
    lacking: Vec<ObjectKind>,
    /// Whether it was ever found out what is served.
    looked: bool,
}

/// A watch that runs.
struct Running {
    number: u64,
    resource: ApiResource,
    task: AbortHandle,
    /// Since when the kind is not served any more.
    absent: Option<Instant>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

const KEPT: &str = "what it said before stays in force; a controller that starts waits";

impl Following {
    fn new(source: Kubernetes, reports: mpsc::Sender<Report>) -> Self {
        Self {
            client: source.client,
            problems: source.problems,
            reached: Reached::new(source.progress),
            pace: source.pace,
            reports,
            watches: BTreeMap::new(),
            number: 0,
            world: World::new(source.believe_netns),
            lacking: vec![],
            looked: false,
        }
    }

    /// How long to wait with what there is to be told; none: there is nothing.
    fn waits(&self) -> Option<Duration> {
        if self.is_due() {
            Some(self.pace.settle)
        } else {
            // Nothing that is looked at: but that it was heard of.
            self.reached.has_come_further().then_some(FURTHER)
        }
    }

    /// What is to be told.
    fn batch(&mut self) -> Batch {
        self.reached.tells();
        self.world.batch()
    }

    fn is_due(&self) -> bool {
        self.looked && self.lacking.is_empty() && self.world.is_due()
    }

    /// Takes in what a watch says; whether it is to be looked what is served.
    fn hear(&mut self, report: Report) -> bool {
        let Report { kind, number, news } = report;
        // Of a watch that another took the place of.
        if self.watches.get(&kind).is_none_or(|it| it.number != number) {
            return false;
        }
        self.reached.hears(kind, &news);
        match news {
            News::Told(told) => {
                let names = Scope::Source(format!("{PLACE} names of {}", shown(kind)));
                match &told {
                    // Says nothing about the server yet.
                    Told::Began => {}
                    Told::Complete => {
                        self.problem_of_watch(kind, None);
                        self.problems.replace(names.clone(), vec![]);
                    }
                    _ => self.problem_of_watch(kind, None),
                }
                if let Err(problem) = self.world.take(kind, told) {
                    self.problems.replace(names, vec![*problem]);
                }
                false
            }
            News::Failed(reason) => {
                self.problem_of_watch(kind, Some(reason));
                false
            }
            News::Recovered => {
                self.problem_of_watch(kind, None);
                false
            }
            News::Unserved => {
                let reason = "the API server does not know the kind (404)".to_owned();
                self.problem_of_watch(kind, Some(reason));
                true
            }
        }
    }

    /// Watches what is served, and no more what is not served any more for a while.
    fn follow(&mut self, served: Served) {
        self.looked = true;
        let lacking = discovery::REQUIRED.into_iter();
        self.lacking = lacking.filter(|it| !served.contains_key(it)).collect();
        self.report_look();
        for (kind, resource) in &served {
            match self.watches.get_mut(kind) {
                Some(running) if running.resource == *resource => running.absent = None,
                _ => self.watch(*kind, resource.clone()),
            }
        }
        let now = Instant::now();
        let mut removed = vec![];
        for (kind, running) in &mut self.watches {
            if !served.contains_key(kind) {
                let since = *running.absent.get_or_insert(now);
                if now - since >= self.pace.removed {
                    removed.push(*kind);
                }
            }
        }
        for kind in removed {
            tracing::info!(kind = shown(kind), "a kind is not served any more");
            self.watches.remove(&kind);
            self.reached.forget(kind);
            self.world.forget(kind);
            self.problem_of_watch(kind, None);
        }
    }

    fn watch(&mut self, kind: ObjectKind, resource: ApiResource) {
        self.number += 1;
        tracing::info!(
            kind = shown(kind),
            version = resource.version,
            "watches a kind"
        );
        self.world.watch(kind, &resource.api_version);
        let watch = Watch {
            client: self.client.clone(),
            kind,
            resource: resource.clone(),
            number: self.number,
            pace: self.pace.clone(),
            reports: self.reports.clone(),
        };
        let running = Running {
            number: self.number,
            resource,
            task: tokio::spawn(watch.run()).abort_handle(),
            absent: None,
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
                shown(*kind),
                kind.versions().join(" or ")
            );
            Problem::of_file(PLACE, None, Fault::new("", reason), KEPT)
        };
        let problems = self.lacking.iter().map(problem).collect();
        self.problems
            .replace(Scope::Source(PLACE.to_owned()), problems);
    }

    fn problem_of_watch(&self, kind: ObjectKind, reason: Option<String>) {
        let problem = |reason: String| {
            let reason = format!("{}: {reason}", shown(kind));
            Problem::of_file(PLACE, None, Fault::new("", reason), KEPT)
        };
        let scope = Scope::Source(format!("{PLACE} {}", shown(kind)));
        self.problems
            .replace(scope, reason.map(problem).into_iter().collect());
    }
}

/// A kind as an operator knows it: `HTTPRoute.policy.linkerd.io`.
fn shown(kind: ObjectKind) -> String {
    match kind.group() {
        "" => kind.as_str().to_owned(),
        group => format!("{}.{group}", kind.as_str()),
    }
}
