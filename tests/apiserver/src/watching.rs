//! A watch: changes as they happen, one per line, until it ends in one of the ways in which watches do.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Response, StatusCode};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;

use crate::answer::{Body, Collection, Query, respond, shown, status};
use crate::{Cut, Shared};

/// A watch that is served.
struct Watch {
    shared: Arc<Shared>,
    of: Collection,
    bookmarks: bool,
    lines: mpsc::Sender<io::Result<Frame<Bytes>>>,
}

/// The watch has ended, or its client is gone.
struct Ended;

pub(crate) fn watch(
    shared: &Arc<Shared>,
    of: Collection,
    query: &Query,
) -> Result<Response<Body>, (StatusCode, &'static str, String)> {
    let said = query.get("resourceVersion").map_or("", String::as_str);
    let from: u64 = match said {
        "" => 0,
        text => text.parse().map_err(|_| {
            let message = format!("invalid resource version {text:?}");
            (StatusCode::BAD_REQUEST, "BadRequest", message)
        })?,
    };
    let (longest, refuses) = {
        let behaviour = shared.behaviour();
        (behaviour.longest_watch, behaviour.expired_is_refused)
    };
    let namespace = of.namespace.as_deref();
    if refuses && from > 0 && shared.store.since(&of.kind, namespace, from).is_err() {
        let message = format!("too old resource version: {from}");
        return Err((StatusCode::GONE, "Expired", message));
    }
    let asked = query.get("timeoutSeconds").and_then(|it| it.parse().ok());
    let time = asked.map_or(longest, |it| longest.min(Duration::from_secs(it)));
    let (lines, received) = mpsc::channel(16);
    let watch = Watch {
        shared: shared.clone(),
        of,
        bookmarks: query.get("allowWatchBookmarks").map(String::as_str) == Some("true"),
        lines,
    };
    tokio::spawn(async move {
        // Either way its client sees the end.
        let _ = watch.serve(from, time).await;
    });
    let body = StreamBody::new(ReceiverStream::new(received));
    Ok(respond(
        StatusCode::OK,
        "application/json",
        body.boxed_unsync(),
    ))
}

impl Watch {
    async fn serve(&self, from: u64, time: Duration) -> Result<(), Ended> {
        let end = Instant::now() + time;
        let mut changed = self.shared.store.changes();
        let mut from = match from {
            0 => self.all().await?,
            from => from,
        };
        loop {
            changed.mark_unchanged();
            let namespace = self.of.namespace.as_deref();
            let since = self.shared.store.since(&self.of.kind, namespace, from);
            let Ok((upto, changes)) = since else {
                let message = format!("too old resource version: {from}");
                let gone = status(410, "Expired", &message);
                return self.send("ERROR", &gone).await;
            };
            for change in changes.iter().filter(|it| self.of.contains(&it.object)) {
                if self.swallows() {
                    continue;
                }
                self.send(change.what, &shown(&self.of, &change.object))
                    .await?;
            }
            // Of a version that is yet to come nothing is said before that.
            let is_ahead = from > upto;
            from = from.max(upto);
            let pause = self.shared.behaviour().bookmark_every;
            tokio::select! {
                () = self.lines.closed() => return Err(Ended),
                outcome = changed.changed() => if outcome.is_err() { return Ok(()) },
                () = tokio::time::sleep_until(end) => return match is_ahead {
                    true => Ok(()),
                    false => self.bookmark(from).await,
                },
                () = tokio::time::sleep(pause), if !is_ahead => self.bookmark(from).await?,
            }
        }
    }

    /// All that is there, as if it had just been made.
    async fn all(&self) -> Result<u64, Ended> {
        let (kind, namespace) = (&self.of.kind, self.of.namespace.as_deref());
        let page = self.shared.store.list(kind, namespace, usize::MAX, None);
        let page = page.map_err(|_| Ended)?;
        for object in page.items.iter().filter(|it| self.of.contains(it)) {
            self.send("ADDED", &shown(&self.of, object)).await?;
        }
        Ok(page.revision)
    }

    async fn bookmark(&self, revision: u64) -> Result<(), Ended> {
        if !self.bookmarks {
            return Ok(());
        }
        let empty = json!({"metadata": {"resourceVersion": revision.to_string()}});
        self.send("BOOKMARK", &shown(&self.of, &empty)).await
    }

    async fn send(&self, what: &str, object: &Value) -> Result<(), Ended> {
        // As the real one orders them.
        let line = format!("{{\"type\":{},\"object\":{object}}}\n", json!(what));
        let half = Bytes::copy_from_slice(&line.as_bytes()[..line.len() / 2]);
        let broken = || io::Error::other("broken by the test");
        match self.cut() {
            None => self.put(Ok(Frame::data(line.into()))).await,
            Some(Cut::End) => {
                self.put(Ok(Frame::data(half))).await?;
                Err(Ended)
            }
            Some(Cut::Break) => {
                self.put(Ok(Frame::data(half))).await?;
                // So that the half is on its way before the connection breaks.
                tokio::task::yield_now().await;
                self.put(Err(broken())).await?;
                Err(Ended)
            }
            Some(Cut::BreakBefore) => {
                self.put(Err(broken())).await?;
                Err(Ended)
            }
        }
    }

    fn swallows(&self) -> bool {
        let mut behaviour = self.shared.behaviour();
        let left = behaviour.swallowed.get_mut(&self.of.kind.plural);
        let left = left.filter(|it| **it > 0);
        left.map(|it| *it -= 1).is_some()
    }

    fn cut(&self) -> Option<Cut> {
        let mut behaviour = self.shared.behaviour();
        behaviour.cuts.get_mut(&self.of.kind.plural)?.pop()
    }

    async fn put(&self, frame: io::Result<Frame<Bytes>>) -> Result<(), Ended> {
        self.lines.send(frame).await.map_err(|_| Ended)
    }
}
