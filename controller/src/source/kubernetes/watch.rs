//! One watch: the objects of one kind, for as long as it is served.
//!
//! It begins with a list, and goes on with what happens after it. From time to time, and soon after an outage, everything
//! is listed again, beside the watch, which goes on meanwhile: that finds what the watch did not say, and that a cluster
//! was restored from a backup. Where a connection only breaks that was silent for a while, the server is first asked for its
//! version, and a list is made if that says too little. Where a watch may have lost something, it begins again with a list.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::{self, BoxStream};
use kube::core::ApiResource;
use kube::{Api, Client};
use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;

use super::Pace;
use super::changes::{self, Change};
use super::connect::{asked_pause, explain_of, status_of};
use super::document::{Document, Form, comparable};
use super::pages::{self, Collection, Step};
use super::world::Told;
use crate::objects::ObjectKind;
use crate::pause::{Pause, about, within};
use crate::telemetry::Metrics;

/// What comes of a watch.
#[derive(Debug)]
pub(super) struct Report {
    /// The kind that it is of.
    pub(super) kind: ObjectKind,
    /// The number of the watch, which tells it from earlier ones of the same kind.
    pub(super) number: u64,
    /// What it says.
    pub(super) news: News,
}

/// What a watch says.
#[derive(Debug)]
pub(super) enum News {
    /// Of objects.
    Told(Told),
    /// Nothing else happened up to a version.
    Nothing(u64),
    /// The server answers, and nothing came yet.
    Answered,
    /// It fails, and tries on.
    Failed(String),
    /// The server does not know the kind.
    Unserved(String),
    /// It does not fail any more.
    Recovered,
}

/// A watch.
pub(super) struct Watch {
    pub(super) client: Client,
    pub(super) form: Form,
    pub(super) resource: ApiResource,
    pub(super) number: u64,
    pub(super) pace: Pace,
    pub(super) metrics: Arc<Metrics>,
    pub(super) reports: mpsc::Sender<Report>,
    /// Says when it is to be listed soon.
    pub(super) sooner: Arc<Notify>,
}

/// Nobody listens any more.
struct Unheard;

/// What goes on at the moment.
struct Course {
    /// The list that is being made.
    list: Option<BoxStream<'static, Step>>,
    /// What happens since a list.
    changes: Option<BoxStream<'static, Change>>,
    /// The version up to which that is known.
    seen: Option<u64>,
    /// The same, when the list began.
    seen_before: Option<u64>,
    /// The version that the cluster has, where that is asked for, beside what was seen then.
    asked: Option<BoxStream<'static, (Option<u64>, kube::Result<String>)>>,
    /// When everything is listed again.
    anew: Instant,
    /// When the last list began.
    began: Instant,
    /// How long to wait before a list, where a watch ended that it helps.
    pause: Pause,
    /// Why the list fails,
    list_fails: Option<String>,
    /// and the watch, and since when.
    watch_fails: Option<(String, Instant)>,
    /// Since when it cannot be watched.
    away: Option<Instant>,
    /// Since when there is a watch from a list on.
    followed: Instant,
    /// How often in a row it soon said nothing but that the server does not know that far back.
    expired: u32,
}

impl Watch {
    /// Watches until nobody listens.
    pub(super) async fn run(self) {
        let mut course = Course {
            list: None,
            changes: None,
            seen: None,
            seen_before: None,
            asked: None,
            anew: Instant::now(),
            began: Instant::now(),
            pause: self.pace.pause(),
            list_fails: None,
            watch_fails: None,
            away: None,
            followed: Instant::now(),
            expired: 0,
        };
        while self.step(&mut course).await.is_ok() {}
    }

    async fn step(&self, course: &mut Course) -> Result<(), Unheard> {
        // An outage that ended without any change since is noticed by its failures staying out.
        let well = course.watch_fails.as_ref().map(|(_, since)| *since);
        // While there is none, it does not stay out.
        let well = well.filter(|_| course.changes.is_some());
        let well = well.map(|it| it + course.pause.quiet());
        tokio::select! {
            step = next(&mut course.list) => self.of_list(course, step).await,
            change = next(&mut course.changes) => self.of_watch(course, change).await,
            (seen, version) = next(&mut course.asked) => {
                self.of_version(course, seen, version);
                Ok(())
            }
            () = super::sleep_until(well) => self.watch_is_well(course).await,
            () = tokio::time::sleep_until(course.anew), if course.list.is_none() => {
                course.list = Some(self.list(Duration::ZERO));
                Ok(())
            }
            () = self.sooner.notified(), if course.list.is_none() => {
                course.anew = course.anew.min(course.began + self.pace.between_lists);
                Ok(())
            }
        }
    }

    fn api(&self) -> Api<Document> {
        Api::all_with(self.client.clone(), &self.resource)
    }

    fn collection(&self) -> Collection {
        Collection {
            client: self.client.clone(),
            path: self.api().resource_url().to_owned(),
            form: self.form.clone(),
        }
    }

    fn list(&self, wait: Duration) -> BoxStream<'static, Step> {
        pages::list(self.collection(), &self.pace, wait)
    }

    async fn of_list(&self, course: &mut Course, step: Step) -> Result<(), Unheard> {
        match step {
            Step::Began => {
                course.seen_before = course.seen;
                course.began = Instant::now();
                self.tell(Told::Began).await
            }
            Step::Failed(error) => {
                let reason = self.failed("list", &error);
                course.list_fails = Some(reason.clone());
                self.report(news_of(&error, reason)).await
            }
            Step::Page(objects) => {
                for object in objects {
                    self.tell(Told::Found(object)).await?;
                }
                Ok(())
            }
            Step::Complete(version) => self.of_whole_list(course, version).await,
        }
    }

    async fn of_whole_list(&self, course: &mut Course, version: String) -> Result<(), Unheard> {
        let at = comparable(&version);
        course.list = None;
        if course.list_fails.take().is_some() {
            self.report_health(course).await?;
        }
        course.anew = Instant::now() + about(self.pace.anew);
        let whole = |beside| Told::Complete {
            version: at,
            beside,
        };
        if course.changes.is_none() {
            course.seen = at;
            let changes = changes::follow(self.api(), &self.pace, version);
            course.changes = Some(changes);
            course.followed = Instant::now();
            if let Some((_, since)) = &mut course.watch_fails {
                *since = course.followed;
            }
            return self.tell(whole(false)).await;
        }
        if at.is_some() && course.seen_before.is_some() && at >= course.seen_before {
            return self.tell(whole(true)).await;
        }
        let seen = course.seen_before;
        self.begin_anew(course, &version, seen);
        Ok(())
    }

    /// The cluster counts from an earlier version on, as one that was restored from a backup: nothing that the watch has
    /// said, or goes on from, is of this history.
    fn begin_anew(&self, course: &mut Course, version: &str, seen: Option<u64>) {
        tracing::warn!(
            kind = %self.form.kind,
            version,
            seen,
            "the API server counts from an earlier version on: all is listed anew"
        );
        self.begin_with_list(course);
    }

    fn begin_with_list(&self, course: &mut Course) {
        (course.changes, course.asked) = (None, None);
        course.list = Some(self.list(course.pause.after(Instant::now())));
    }

    /// Asks for the version that the cluster has, at a moment that is not that of all kinds: an earlier one than what was
    /// seen is that of a cluster that was restored from a backup meanwhile. One that was restored and has caught up since
    /// is not told by it from one that was there all the time; a list would find it, and be made of everything whenever a
    /// load balancer forgets connections.
    fn ask_version(&self, course: &mut Course) {
        let (seen, of) = (course.seen, self.collection());
        let wait = within(self.pace.shortest_pause);
        let asked = stream::once(async move {
            tokio::time::sleep(wait).await;
            (seen, of.version().await)
        });
        course.asked = Some(asked.boxed());
    }

    fn of_version(&self, course: &mut Course, seen: Option<u64>, version: kube::Result<String>) {
        course.asked = None;
        let asked = match version {
            Ok(version) => match is_earlier(&version, seen) {
                Some(true) => return self.begin_anew(course, &version, seen),
                Some(false) => return,
                None => None,
            },
            Err(error) => {
                let reason = self.failed("list", &error);
                tracing::debug!(kind = %self.form.kind, reason, "the version is not known: a list will tell");
                asked_pause(&error).map(|it| it.min(self.pace.longest_asked_pause))
            }
        };
        let wait = course.pause.after_asked(Instant::now(), asked);
        self.list_within(course, wait.max(about(self.pace.outage)));
    }

    fn list_soon(&self, course: &mut Course) {
        self.list_within(course, about(self.pace.outage));
    }

    fn list_within(&self, course: &mut Course, wait: Duration) {
        course.anew = course.anew.min(Instant::now() + wait);
    }

    async fn of_watch(&self, course: &mut Course, change: Change) -> Result<(), Unheard> {
        let told = match change {
            Change::Failed(error) => {
                course.expired = 0;
                course.away.get_or_insert_with(Instant::now);
                let reason = self.failed("watch", &error);
                course.watch_fails = Some((reason.clone(), Instant::now()));
                return self.report(news_of(&error, reason)).await;
            }
            Change::Lost(error) => {
                course.away = None;
                // A list that is being made may have begun before.
                self.begin_with_list(course);
                let of = (self.resource.group.as_str(), self.resource.plural.as_str());
                self.metrics.watch_lost(of, status_of(&error));
                if status_of(&error) == Some(410) {
                    return self.of_expired(course, &error).await;
                }
                course.expired = 0;
                // The list that follows says whether it is well.
                let reason = self.failed("watch", &error);
                course.list_fails = Some(reason.clone());
                return self.report(news_of(&error, reason)).await;
            }
            Change::Opened { after } => {
                let away = course.away.take().map(|it| it.elapsed());
                match Doubt::after(&self.pace, away, after) {
                    Doubt::Nothing => {}
                    Doubt::Version => self.ask_version(course),
                    Doubt::List => self.list_soon(course),
                }
                return self.report(News::Answered).await;
            }
            Change::Nothing(version) => {
                course.seen = version.or(course.seen);
                self.watch_is_well(course).await?;
                let Some(version) = version else {
                    return Ok(());
                };
                return self.report(News::Nothing(version)).await;
            }
            Change::Changed(object) => {
                let object = self.form.take(object);
                course.seen = object.version;
                Told::Changed(object)
            }
            Change::Gone(object) => {
                let object = self.form.take(object);
                course.seen = object.version;
                Told::Gone(object)
            }
        };
        self.watch_is_well(course).await?;
        self.tell(told).await
    }

    /// The server does not know that far back: as it is after a while without changes, but not of a list just made.
    async fn of_expired(&self, course: &mut Course, error: &kube::Error) -> Result<(), Unheard> {
        if course.followed.elapsed() > course.pause.quiet() {
            course.expired = 0;
        }
        course.expired += 1;
        if course.expired < EXPIRED_IN_A_ROW {
            return Ok(());
        }
        let failed = self.failed("watch", error);
        let reason = format!(
            "{failed}: said {} times in a row, of lists just made. Until a watch lasts, changes are heard of by lists only, \
             and late: does the API server keep too little history for the changes of this kind, or is one of several behind?",
            course.expired
        );
        course.watch_fails = Some((reason.clone(), Instant::now()));
        self.report(News::Failed(reason)).await
    }

    async fn watch_is_well(&self, course: &mut Course) -> Result<(), Unheard> {
        course.expired = 0;
        match course.watch_fails.take() {
            Some(_) => self.report_health(course).await,
            None => Ok(()),
        }
    }

    /// Says how it is where something does not fail any more.
    fn report_health(
        &self,
        course: &Course,
    ) -> impl Future<Output = Result<(), Unheard>> + use<'_> {
        let watch = course.watch_fails.as_ref().map(|(reason, _)| reason);
        let fails = course.list_fails.as_ref().or(watch);
        let news = fails.map_or(News::Recovered, |it| News::Failed(it.clone()));
        self.report(news)
    }

    fn failed(&self, verb: &'static str, error: &kube::Error) -> String {
        let (of, status) = (&self.resource, status_of(error));
        let metrics = &self.metrics;
        metrics.source_failed(verb, (&of.group, &of.plural), status);
        format!("cannot {verb}: {}", explain_of(error, verb, of))
    }

    async fn tell(&self, told: Told) -> Result<(), Unheard> {
        self.report(News::Told(told)).await
    }

    async fn report(&self, news: News) -> Result<(), Unheard> {
        let report = Report {
            kind: self.form.kind,
            number: self.number,
            news,
        };
        self.reports.send(report).await.map_err(|_| Unheard)
    }
}

/// What helps where the cluster may have been restored from a backup while nobody watched, and count from an earlier version
/// on: the watch would say nothing until that is later than what was seen, and not all of it then.
#[derive(Debug, PartialEq)]
enum Doubt {
    Nothing,
    Version,
    List,
}

impl Doubt {
    /// After a time without the server, if there was one, and a time for which it had said nothing.
    fn after(pace: &Pace, away: Option<Duration>, silent: Duration) -> Self {
        let is_outage = away.is_some_and(|it| it >= pace.outage);
        if is_outage || silent >= pace.silence.end {
            return Self::List;
        }
        match silent >= pace.silence.start {
            true => Self::Version,
            false => Self::Nothing,
        }
    }
}

/// Whether a version is earlier than what was seen, where that can be said.
fn is_earlier(version: &str, seen: Option<u64>) -> Option<bool> {
    Some(comparable(version)? < seen?)
}

/// Once is as it should be, twice may be chance.
const EXPIRED_IN_A_ROW: u32 = 3;

fn news_of(error: &kube::Error, reason: String) -> News {
    match status_of(error) {
        Some(404) => News::Unserved(reason),
        _ => News::Failed(reason),
    }
}

/// The next item, where there is something that has one. May be dropped and called again.
async fn next<T>(of: &mut Option<BoxStream<'static, T>>) -> T {
    let next = match of {
        Some(stream) => stream.next().await,
        None => None,
    };
    match next {
        Some(next) => next,
        None => std::future::pending().await,
    }
}
