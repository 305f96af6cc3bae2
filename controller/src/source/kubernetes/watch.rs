//! One watch: the objects of one kind, for as long as it is served.
//!
//! Listing and watching is kube's: pages, bookmarks, resuming where a connection broke. What it goes on after and
//! might have lost something by, as an event that cannot be read, begins anew here.

use futures::StreamExt;
use kube::core::ApiResource;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::Pace;
use super::document::Document;
use super::world::Told;
use crate::objects::ObjectKind;
use crate::pause::{Pause, about};

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
    /// It fails, and tries on.
    Failed(String),
    /// The server does not know the kind.
    Unserved,
    /// It does not fail any more.
    Recovered,
}

/// A watch.
pub(super) struct Watch {
    pub(super) client: Client,
    pub(super) kind: ObjectKind,
    pub(super) resource: ApiResource,
    pub(super) number: u64,
    pub(super) pace: Pace,
    pub(super) reports: mpsc::Sender<Report>,
}

/// Nobody listens any more.
struct Unheard;

impl Watch {
    /// Watches until nobody listens.
    pub(super) async fn run(self) {
        let mut pause = self.pace.pause();
        loop {
            if self.once(&mut pause).await.is_err() {
                return;
            }
        }
    }

    /// Watches until it is better to begin anew.
    async fn once(&self, pause: &mut Pause) -> Result<(), Unheard> {
        let api: Api<Document> = Api::all_with(self.client.clone(), &self.resource);
        let config = watcher::Config::default()
            .page_size(self.pace.page)
            .timeout(self.pace.watch_seconds);
        let events = watcher(api, config);
        let mut events = std::pin::pin!(events);
        let mut failed = false;
        let mut listed = false;
        let anew = Instant::now() + about(self.pace.anew);
        loop {
            // An outage that ended without any change since is noticed by its failures staying out.
            let event = tokio::select! {
                event = events.next() => event,
                () = tokio::time::sleep(pause.quiet()), if failed => {
                    failed = false;
                    self.report(News::Recovered).await?;
                    continue;
                }
                () = tokio::time::sleep_until(anew), if listed => return Ok(()),
            };
            let told = match event {
                // Says nothing about the server yet.
                Some(Ok(Event::Init)) => Told::Began,
                Some(Ok(event)) => {
                    failed = false;
                    match event {
                        Event::Init => Told::Began,
                        Event::InitApply(object) => Told::Found(object),
                        Event::InitDone => {
                            listed = true;
                            Told::Complete
                        }
                        Event::Apply(object) => Told::Changed(object),
                        Event::Delete(object) => Told::Gone(object),
                    }
                }
                Some(Err(error)) => {
                    failed = true;
                    self.report(match is_unserved(&error) {
                        true => News::Unserved,
                        false => News::Failed(super::connect::explain_watch(&error)),
                    })
                    .await?;
                    tokio::time::sleep(pause.after(Instant::now())).await;
                    if may_have_lost(&error) {
                        return Ok(());
                    }
                    continue;
                }
                None => return Ok(()),
            };
            self.report(News::Told(told)).await?;
        }
    }

    async fn report(&self, news: News) -> Result<(), Unheard> {
        let report = Report {
            kind: self.kind,
            number: self.number,
            news,
        };
        self.reports.send(report).await.map_err(|_| Unheard)
    }
}

/// Whether a list is needed to be sure: kube itself makes one only after an event with code 410.
fn may_have_lost(error: &watcher::Error) -> bool {
    match error {
        // An event that cannot be read is skipped.
        watcher::Error::WatchFailed(error) => matches!(error, kube::Error::SerdeError(_)),
        // The server could not say what happened.
        watcher::Error::WatchError(_) => true,
        // It does not know that far back; from a server behind another, as a status.
        watcher::Error::WatchStartFailed(kube::Error::Api(status)) => status.code == 410,
        _ => false,
    }
}

fn is_unserved(error: &watcher::Error) -> bool {
    match error {
        watcher::Error::InitialListFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status)) => status.code == 404,
        _ => false,
    }
}
