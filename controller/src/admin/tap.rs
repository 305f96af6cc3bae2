//! `/tap`: lines of JSON about what goes on at some pods, until whoever asked is gone, may not watch any more, or does not
//! read.
//!
//! Who may watch is decided apart from who may look into the mesh, and for what is watched: see [`super::visitors`]. Who
//! watched what, and how long, is in the log.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use hyper::StatusCode;
use hyper::body::{Body, Frame};
use tokio::sync::mpsc;
use tokio::time::{Instant, interval, sleep_until, timeout};
use tokio_util::sync::{CancellationToken, DropGuard};
use weft_admin::Lasting;
use weft_proto::v1;

use super::visitors::Watcher;
use super::{Admin, Reply, TEXT, respond};
use crate::control::tap::lines::Line;
use crate::control::tap::{Open, Scope};

/// What somebody wants to watch.
#[derive(Debug, Default)]
pub(super) struct Ask {
    pub(super) target: Scope,
    start: v1::TapStart,
}

/// Lines, as they come.
#[derive(Debug)]
pub(super) struct Lines {
    lines: mpsc::Receiver<Bytes>,
    /// Ends the tap.
    _gone: DropGuard,
}

/// What is read of a word that says what to watch.
const MOST_BYTES: usize = 1024;
const USUAL_PER_SECOND: u32 = 100;
const MOST_PER_SECOND: u32 = 10_000;
/// Kinds that can be watched, as their resources are called.
const KINDS: [(&str, &str); 7] = [
    ("pod", "pods"),
    ("deployment", "deployments"),
    ("statefulset", "statefulsets"),
    ("daemonset", "daemonsets"),
    ("replicaset", "replicasets"),
    ("job", "jobs"),
    ("cronjob", "cronjobs"),
];
/// Where pods are is looked at this often at most,
const LOOK: Duration = Duration::from_millis(500);
/// and told at least so often, so that each hop sees whether the next one is there.
const TELL: Duration = Duration::from_secs(5);
/// Whoever does not read for so long is not there.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often it is asked whether somebody may still watch.
const ASK_AGAIN: Duration = Duration::from_secs(60);
/// Nobody forgets one for longer.
const MOST_TIME: Duration = Duration::from_secs(60 * 60);

impl Ask {
    /// Reads a query; the error says what is wrong with it.
    pub(super) fn read(query: &str) -> Result<Self, String> {
        let mut ask = Self::default();
        ask.start.max_per_second = USUAL_PER_SECOND;
        let (mut to, mut from) = (Scope::default(), Scope::default());
        for (key, value) in form_urlencoded::parse(query.as_bytes()) {
            if value.len() > MOST_BYTES {
                return Err(format!("{key} is too long"));
            }
            let value = value.into_owned();
            match &*key {
                "namespace" => ask.target.namespace = value,
                "kind" => ask.target.kind = value,
                "name" => ask.target.name = value,
                "to_namespace" => to.namespace = value,
                "to_kind" => to.kind = value,
                "to_name" => to.name = value,
                "from_namespace" => from.namespace = value,
                "from_kind" => from.kind = value,
                "from_name" => from.name = value,
                "method" => ask.start.method = value,
                "path" => ask.start.path_prefix = value,
                "identity" => ask.start.identity = value,
                "status" => {
                    (ask.start.status_first, ask.start.status_last) = statuses(&value)?;
                }
                "max_rps" => {
                    let most = value.parse().ok();
                    let most = most.filter(|it| (1..=MOST_PER_SECOND).contains(it));
                    ask.start.max_per_second =
                        most.ok_or_else(|| format!("max_rps is 1 to {MOST_PER_SECOND}"))?;
                }
                _ => return Err(format!("{key:?} is nothing that can be asked for")),
            }
        }
        let Scope { kind, name, .. } = &ask.target;
        if kind.is_empty() && !name.is_empty() {
            return Err("a name has a kind".to_owned());
        }
        if !kind.is_empty() && resource(kind).is_none() {
            return Err(format!("{kind:?} cannot be watched"));
        }
        let some = |it: Scope| (it != Scope::default()).then(|| it.into());
        (ask.start.to, ask.start.from) = (some(to), some(from));
        Ok(ask)
    }

    /// What a right to watch it is about: a resource, and its name if it has one.
    pub(super) fn resource(&self) -> (&'static str, &str) {
        match resource(&self.target.kind) {
            Some(resource) => (resource, &self.target.name),
            None => ("namespaces", &self.target.namespace),
        }
    }
}

fn resource(kind: &str) -> Option<&'static str> {
    let known = KINDS.iter().find(|(it, _)| *it == kind);
    known.map(|(_, resource)| *resource)
}

/// `503`, or `5xx`.
fn statuses(text: &str) -> Result<(u32, u32), String> {
    let wrong = || format!("{text:?} is no status such as 503 or 5xx");
    if let Some(class) = text.strip_suffix("xx") {
        let class: u32 = class.parse().map_err(|_| wrong())?;
        return match class {
            1..=5 => Ok((class * 100, class * 100 + 99)),
            _ => Err(wrong()),
        };
    }
    match text.parse() {
        Ok(status @ 100..=999) => Ok((status, status)),
        _ => Err(wrong()),
    }
}

impl Admin {
    /// Opens a tap for somebody who may.
    pub(super) fn tap(self: &Arc<Self>, ask: Ask, watcher: Watcher, asked: &str) -> Reply {
        let (open, lines) = match self.taps.open(&watcher.name, ask.target, ask.start) {
            Ok(opened) => opened,
            Err(error) => {
                let text = format!("{error}\n");
                return respond(StatusCode::TOO_MANY_REQUESTS, TEXT, text);
            }
        };
        let (gone, ended) = (CancellationToken::new(), CancellationToken::new());
        let admin = self.clone();
        let (is_gone, has_ended) = (gone.clone(), ended.clone().drop_guard());
        let asked = asked.to_owned();
        tokio::spawn(async move {
            let began = Instant::now();
            let (user, credential) = (&watcher.name, &watcher.credential);
            tracing::info!(user, credential, asked, "somebody begins to watch");
            let counts = open.counts.clone();
            let why = tokio::select! {
                why = watch(&admin, &watcher, open) => why,
                () = is_gone.cancelled() => "whoever watched is gone".to_owned(),
            };
            let seconds = began.elapsed().as_secs();
            let events = counts.events.load(Ordering::Relaxed);
            tracing::info!(
                user,
                credential,
                asked,
                seconds,
                events,
                why,
                "somebody has watched"
            );
            drop(has_ended);
        });
        let lines = Lines {
            lines,
            _gone: gone.drop_guard(),
        };
        let mut reply = respond(StatusCode::OK, LINES, Bytes::new());
        reply.extensions_mut().insert(Lasting(ended));
        reply.map(|_| super::Content::Right(lines))
    }
}

const LINES: &str = "application/x-ndjson";

/// Keeps a tap where its pods are until it has to end; why.
async fn watch(admin: &Admin, watcher: &Watcher, mut open: Open) -> String {
    let end = Instant::now() + MOST_TIME;
    let (mut agents, mut changes) = (open.agents(), open.changes());
    let mut tell = interval(TELL);
    let mut ask = interval(ASK_AGAIN);
    // The first one is at once, and has just been answered.
    ask.tick().await;
    let why = loop {
        if let Some(line) = open.look() {
            tell.reset();
            if !said(&open, line).await {
                return "whoever watched does not read".to_owned();
            }
        }
        let news = async {
            tokio::select! {
                _ = agents.changed() => {}
                _ = changes.changed() => {}
            }
            tokio::time::sleep(LOOK).await;
        };
        tokio::select! {
            () = news => {}
            () = open.closed() => return "whoever watched is gone".to_owned(),
            _ = tell.tick() => if let Some(line) = open.again() && !said(&open, line).await {
                return "whoever watched does not read".to_owned();
            },
            _ = ask.tick() => if let Some(visitors) = &admin.visitors
                && let Err(refusal) = visitors.may_still_watch(watcher).await
            {
                break refusal.to_string();
            },
            () = sleep_until(end) => {
                break format!("nobody watches for more than {} minutes", MOST_TIME.as_secs() / 60);
            }
            () = admin.stop.cancelled() => break "the controller ends".to_owned(),
        }
    };
    let reason = why.clone();
    said(&open, Line::End { reason }.written()).await;
    why
}

async fn said(open: &Open, line: Bytes) -> bool {
    timeout(PATIENCE, open.say(line)).await == Ok(true)
}

impl Body for Lines {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let line = ready!(self.lines.poll_recv(context));
        Poll::Ready(line.map(|it| Ok(Frame::data(it))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_watched_is_read_from_a_query() {
        let ask = Ask::read(
            "namespace=shop&kind=deployment&name=web&to_kind=service&to_name=api&status=5xx&path=%2Fa%20b",
        );
        let ask = ask.expect("good");
        assert_eq!(ask.resource(), ("deployments", "web"));
        assert_eq!((ask.start.status_first, ask.start.status_last), (500, 599));
        assert_eq!(ask.start.path_prefix, "/a b");
        assert_eq!(ask.start.max_per_second, USUAL_PER_SECOND);
        let to = ask.start.to.expect("a server");
        assert_eq!((to.kind.as_str(), to.name.as_str()), ("service", "api"));
        assert_eq!(ask.start.from, None);
        let all = Ask::read("namespace=shop&max_rps=7&status=404").expect("good");
        assert_eq!(all.resource(), ("namespaces", "shop"));
        assert_eq!((all.start.status_first, all.start.status_last), (404, 404));
        assert_eq!(Ask::read("").expect("good").resource(), ("namespaces", ""));
        for bad in [
            "name=web",
            "kind=service",
            "kind=secrets",
            "status=9xx",
            "status=50",
            "status=x",
            "max_rps=0",
            "max_rps=10001",
            "max_rps=-1",
            "colour=red",
            &format!("path={}", "a".repeat(MOST_BYTES + 1)),
        ] {
            assert!(Ask::read(bad).is_err(), "{bad:?}");
        }
    }
}
