//! What happens to the objects of a kind from a version on. A watch that breaks goes on where it was; it ends where
//! something may have been lost, so that only a list helps.

use std::time::Duration;

use futures::StreamExt;
use futures::stream::{self, BoxStream};
use kube::api::{WatchEvent, WatchParams};
use kube::{Api, ResourceExt};
use tokio::time::Instant;

use super::Pace;
use super::connect::{asked_pause, no_version, no_word, status_of};
use super::document::{Document, comparable};
use crate::pause::Pause;

/// What comes of a watch.
#[derive(Debug)]
pub(super) enum Change {
    /// An object was created or changed.
    Changed(Document),
    /// An object is gone.
    Gone(Document),
    /// Nothing else happened up to this version.
    Nothing(Option<u64>),
    /// The server has begun to answer. Nothing came yet.
    Opened {
        /// How long it had said nothing before. That a watch ended as it should is something.
        after: Duration,
    },
    /// It failed, and goes on where it was.
    Failed(kube::Error),
    /// It ended, and does not know what happened since.
    Lost(kube::Error),
}

/// Watches from a version on. Ends with [`Change::Lost`].
pub(super) fn follow(api: Api<Document>, pace: &Pace, from: String) -> BoxStream<'static, Change> {
    let watch = Watch {
        api,
        seconds: pace.watch_seconds,
        longest_asked: pace.longest_asked_pause,
        pause: pace.pause(),
        shortest: pace.shortest_pause,
        wait: Duration::ZERO,
        from,
        heard: Instant::now(),
        open: None,
    };
    let changes = stream::unfold(Some(watch), |watch| async {
        let mut watch = watch?;
        let change = watch.next().await;
        let ends = matches!(change, Change::Lost(_));
        Some((change, (!ends).then_some(watch)))
    });
    changes.boxed()
}

struct Watch {
    api: Api<Document>,
    /// How long the server lets it last.
    seconds: u32,
    longest_asked: Duration,
    pause: Pause,
    shortest: Duration,
    wait: Duration,
    /// What happened until then is known.
    from: String,
    /// When the server said something last.
    heard: Instant,
    open: Option<Open>,
}

struct Open {
    events: BoxStream<'static, kube::Result<WatchEvent<Document>>>,
    since: Instant,
}

/// A connection on which nothing comes for this long after the server should have ended the watch is dead.
const OVERDUE: Duration = Duration::from_secs(5);
/// A watch that ends earlier by more than this does not end as it should.
const EARLY: Duration = Duration::from_secs(1);

impl Watch {
    async fn next(&mut self) -> Change {
        loop {
            tokio::time::sleep(std::mem::take(&mut self.wait)).await;
            let Some(open) = &mut self.open else {
                let parameters = WatchParams::default().timeout(self.seconds);
                match self.api.watch(&parameters, &self.from).await {
                    Ok(events) => {
                        self.open = Some(Open {
                            events: events.boxed(),
                            since: Instant::now(),
                        });
                        let after = self.heard.elapsed();
                        self.heard = Instant::now();
                        return Change::Opened { after };
                    }
                    Err(error) => return self.failed(error),
                }
            };
            let lasts = Duration::from_secs(self.seconds.into());
            match tokio::time::timeout(lasts + OVERDUE, open.events.next()).await {
                Ok(Some(Ok(event))) => return self.take(event),
                Ok(Some(Err(error))) => return self.failed(error),
                // It should have ended by itself by now. How long nobody was there is not known, nor what was done meanwhile,
                // as restoring the cluster from a backup.
                Err(_) => {
                    self.open = None;
                    return Change::Lost(no_word());
                }
                Ok(None) => {
                    if open.since.elapsed() + EARLY >= lasts {
                        self.heard = Instant::now();
                    }
                    // One that ends as soon as it begins must not be asked for at once.
                    if open.since.elapsed() < self.shortest {
                        self.wait = self.pause.after(Instant::now());
                    }
                    self.open = None;
                }
            }
        }
    }

    fn take(&mut self, event: WatchEvent<Document>) -> Change {
        self.heard = Instant::now();
        let version = match &event {
            WatchEvent::Added(it) | WatchEvent::Modified(it) | WatchEvent::Deleted(it) => {
                it.resource_version()
            }
            WatchEvent::Bookmark(it) => Some(it.metadata.resource_version.clone()),
            WatchEvent::Error(status) => {
                // The server could not say what happened.
                return Change::Lost(kube::Error::Api(status.clone()));
            }
        };
        let Some(version) = version.filter(|it| !it.is_empty()) else {
            return Change::Lost(no_version());
        };
        self.from = version;
        match event {
            WatchEvent::Deleted(object) => Change::Gone(object),
            WatchEvent::Added(object) | WatchEvent::Modified(object) => Change::Changed(object),
            _ => Change::Nothing(comparable(&self.from)),
        }
    }

    fn failed(&mut self, error: kube::Error) -> Change {
        self.open = None;
        // It does not know that far back; does not know the kind, which may come back as another one; or said something
        // that cannot be read, and would not say it again.
        let status = status_of(&error);
        if matches!(status, Some(404 | 410)) || matches!(error, kube::Error::SerdeError(_)) {
            return Change::Lost(error);
        }
        let asked = asked_pause(&error).map(|it| it.min(self.longest_asked));
        self.wait = self.pause.after_asked(Instant::now(), asked);
        Change::Failed(error)
    }
}
