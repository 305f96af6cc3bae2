//! A list of all objects of a kind, page by page. A page that fails is asked for again, and those before it are kept; only
//! where the server does not know the list any more it begins anew.
//!
//! kube's own watcher begins anew after any failure, so that a long list never ends where each of its pages fails now
//! and then; and it cannot list while it watches.

use std::time::Duration;

use futures::StreamExt;
use futures::stream::{self, BoxStream};
use kube::Client;
use kube::api::ListParams;
use kube::core::Request;
use tokio::time::Instant;

use super::Pace;
use super::connect::{asked_pause, no_version, status_of};
use super::document::{Form, Trimmed};
use super::page::Page;
use crate::pause::Pause;

/// What comes of a list.
#[derive(Debug)]
pub(super) enum Step {
    /// It begins, perhaps anew: what it found before does not count.
    Began,
    /// Objects of it.
    Page(Vec<Trimmed>),
    /// A page failed, and is asked for again.
    Failed(kube::Error),
    /// There is no more; what it says was so at this version.
    Complete(String),
}

/// Where objects are listed, and how they are taken in.
#[derive(Clone)]
pub(super) struct Collection {
    pub(super) client: Client,
    /// The path that they are at.
    pub(super) path: String,
    pub(super) form: Form,
}

/// Lists all there is, beginning after a while. Ends with [`Step::Complete`].
pub(super) fn list(of: Collection, pace: &Pace, wait: Duration) -> BoxStream<'static, Step> {
    let list = List {
        of,
        limit: Some(pace.page),
        longest_asked: pace.longest_asked_pause,
        pause: pace.pause(),
        wait,
        began: false,
        rest: None,
        version: None,
        forgotten: 0,
    };
    let steps = stream::unfold(Some(list), |list| async {
        let mut list = list?;
        let step = list.next().await;
        let ends = matches!(step, Step::Complete(_));
        Some((step, (!ends).then_some(list)))
    });
    steps.boxed()
}

struct List {
    of: Collection,
    limit: Option<u32>,
    longest_asked: Duration,
    pause: Pause,
    wait: Duration,
    began: bool,
    /// How to ask for the next page.
    rest: Option<String>,
    /// As of when all of its pages are; known from the first one on.
    version: Option<String>,
    /// How often the server had forgotten it before it was complete.
    forgotten: u32,
}

/// After so often, the list is asked for as one page: too large a cluster, or too slow a server, for pages.
const WITHOUT_PAGES: u32 = 3;

impl List {
    async fn next(&mut self) -> Step {
        loop {
            tokio::time::sleep(std::mem::take(&mut self.wait)).await;
            if !self.began {
                self.began = true;
                return Step::Began;
            }
            if let (Some(version), None) = (&self.version, &self.rest) {
                return Step::Complete(version.clone());
            }
            match self.page().await {
                Ok(objects) => {
                    self.pause.reset();
                    return Step::Page(objects);
                }
                Err(error) if self.rest.is_some() && is_forgotten(&error) => {
                    self.forgotten += 1;
                    if self.forgotten >= WITHOUT_PAGES {
                        self.limit = None;
                    }
                    (self.rest, self.version, self.began) = (None, None, false);
                    self.wait = self.pause.after(Instant::now());
                }
                Err(error) => {
                    let asked = asked_pause(&error).map(|it| it.min(self.longest_asked));
                    self.wait = self.pause.after_asked(Instant::now(), asked);
                    return Step::Failed(error);
                }
            }
        }
    }

    async fn page(&mut self) -> Result<Vec<Trimmed>, kube::Error> {
        let page = self.of.page(self.limit, self.rest.clone()).await?;
        let said = |it: Option<String>| it.filter(|it| !it.is_empty());
        let version = said(page.metadata.resource_version);
        if self.version.is_none() {
            self.version = Some(version.ok_or_else(no_version)?);
        }
        self.rest = said(page.metadata.continue_);
        Ok(page.items)
    }
}

impl Collection {
    /// The version as of which a list is that is made now.
    ///
    /// # Errors
    /// None can be made.
    pub(super) async fn version(self) -> Result<String, kube::Error> {
        let page = self.page(Some(1), None).await?;
        let version = page.metadata.resource_version;
        version.filter(|it| !it.is_empty()).ok_or_else(no_version)
    }

    async fn page(&self, limit: Option<u32>, rest: Option<String>) -> Result<Page, kube::Error> {
        let parameters = ListParams {
            limit,
            continue_token: rest,
            ..ListParams::default()
        };
        let request = Request::new(self.path.as_str()).list(&parameters);
        let request = request.map_err(kube::Error::BuildRequest)?;
        let text = self.client.request_text(request).await?;
        Page::read(&text, &self.form).map_err(kube::Error::SerdeError)
    }
}

/// Whether the server does not know the list any more that a page is asked of.
fn is_forgotten(error: &kube::Error) -> bool {
    matches!(status_of(error), Some(400 | 410))
}
