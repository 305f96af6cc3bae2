//! `weft tap`: what goes on at some pods now, exchange by exchange and flow by flow.
//!
//! The agents that run the pods sample, each through the controller that it is connected to, until this command ends. What
//! they see are bytes from a network: they are shown without what would move a terminal's cursor, and neither headers nor
//! queries nor bodies are among them.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Write};
use std::time::Duration;

use clap::{Args, ValueEnum};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{Instant, sleep_until, timeout};

use crate::controller::{Reach, ReachError};
use crate::outcome::Outcome;
use crate::output::{colours, shown};
use crate::view::{Scope, ScopeArgs};

mod event;
mod follow;
mod har;
mod keys;
mod show;
pub mod top;

#[cfg(test)]
mod tests;

use event::{Event, Line};
use follow::{Follow, Heard};
use har::Har;
use keys::{Key, Keys};
use show::Shown;
use top::{Live, Pressed};

/// What `weft tap` is asked.
#[derive(Args, Debug)]
#[command(
    after_help = "It goes on until it is ended by ^C. Exit codes: 0 it was ended, 2 nobody can be asked."
)]
pub struct Tap {
    /// What is watched.
    #[command(flatten)]
    pub watch: Watch,
    /// How it is written.
    #[arg(short, long, default_value = "line")]
    pub output: Format,
}

/// What is watched, and how long.
#[derive(Args, Debug)]
pub struct Watch {
    /// The pods that are watched.
    #[command(flatten)]
    pub scope: ScopeArgs,
    /// Only what these servers are asked by the pods: `deploy/api`, `svc/api`, `pod/api-1`, `ns/shop`, …
    #[arg(long, value_name = "RESOURCE", value_parser = Scope::parse_end)]
    pub to: Option<Scope>,
    /// The namespace of --to, if it is another one.
    #[arg(long, value_name = "NAMESPACE", requires = "to")]
    pub to_namespace: Option<String>,
    /// Only what these clients ask the pods: `deploy/web`, `pod/web-1`, `ns/shop`, …
    #[arg(long, value_name = "RESOURCE", value_parser = Scope::parse, conflicts_with = "to")]
    pub from: Option<Scope>,
    /// The namespace of --from, if it is another one.
    #[arg(long, value_name = "NAMESPACE", requires = "from")]
    pub from_namespace: Option<String>,
    /// Only requests with this method.
    #[arg(long)]
    pub method: Option<String>,
    /// Only requests whose path begins so.
    #[arg(long, value_name = "PREFIX")]
    pub path: Option<String>,
    /// Only exchanges that are answered with this status: `503`, `5xx`. They are shown when the answer comes.
    #[arg(long, value_name = "STATUS")]
    pub status: Option<String>,
    /// Only where the other end has proven to be this: a SPIFFE ID, or NAMESPACE/SERVICE-ACCOUNT.
    #[arg(long, value_name = "ID")]
    pub identity: Option<String>,
    /// At most so many exchanges and flows in a second, of each agent: what is more is counted, and not shown.
    #[arg(long, value_name = "NUMBER", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub max_rps: u32,
    /// Ends after this time, as by ^C: `10s`, `5m`.
    #[arg(long = "for", value_name = "TIME", value_parser = crate::command::duration)]
    pub duration: Option<Duration>,
    /// In a cluster: the service account that you may ask a token of, and that may watch: looked for in the namespace that is
    /// watched, and then in the one that Weft is in.
    #[arg(
        long,
        value_name = "NAME",
        env = "WEFT_TAPPER",
        default_value = "weft-tap"
    )]
    pub tapper: String,
    /// Whom to ask.
    #[command(flatten)]
    pub reach: Reach,
}

/// How it is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// A line for each request, response and end.
    #[default]
    Line,
    /// The same, with pods, what created them, identities, Service and route.
    Wide,
    /// An object for each request, response and end, a line each.
    Json,
    /// An HTTP archive of all exchanges, whole when the command ends.
    Har,
}

/// Takes what is heard.
enum Writer {
    Shown(Box<Shown>),
    Json,
    Har(Box<Har>),
    Top(Box<Live>),
}

/// What was told about where the pods are, by each controller.
#[derive(Default)]
struct Scopes {
    of: BTreeMap<String, event::Pods>,
    said: String,
}

/// Controllers may come, and agents go to them.
const LOOK_AGAIN: Duration = Duration::from_secs(10);
/// How long there may be none.
const PATIENCE: Duration = Duration::from_secs(30);

/// Watches, and shows, until it is ended.
///
/// # Errors
/// Nobody can be asked, or nobody lets watch, and why.
pub async fn run(tap: &Tap) -> Result<Outcome, crate::Error> {
    let writer = Writer::begin(tap.output, &mut io::stdout().lock())?;
    until_ended(&tap.watch, writer, None).await
}

async fn until_ended(
    asked: &Watch,
    mut writer: Writer,
    mut keys: Option<Keys>,
) -> Result<Outcome, crate::Error> {
    let scope = asked.scope.settled(&asked.reach).await;
    let target = Target::of(&scope)?;
    let ended = watch(asked, &target, &mut writer, &mut keys).await;
    drop(keys);
    // What was heard until then is whole, whatever has ended it.
    writer.end(&mut io::stdout().lock())?;
    ended.map(|()| Outcome::Good)
}

async fn watch(
    tap: &Watch,
    target: &Target,
    writer: &mut Writer,
    keys: &mut Option<Keys>,
) -> Result<(), crate::Error> {
    let query = tap.query(target);
    let mut follow = Follow::new(&tap.reach, &query, (&target.namespace, &tap.tapper));
    let mut scopes = Scopes::default();
    let mut troubles = Troubles::default();
    let (mut lost, mut left_out) = (0_u64, 0_u64);
    let mut end = std::pin::pin!(ended(tap.duration));
    let mut look = tokio::time::interval(LOOK_AGAIN);
    let mut alone: Option<Instant> = None;
    let outcome = loop {
        let heard = tokio::select! {
            biased;
            () = &mut end => break Ok(()),
            _ = look.tick() => {
                let looked = tokio::select! {
                    biased;
                    () = &mut end => break Ok(()),
                    looked = timeout(PATIENCE, follow.look()) => looked,
                };
                match looked.unwrap_or_else(|_| Err(ReachError::Refused(SILENT.to_owned()))) {
                    Ok(()) => {}
                    Err(error) if !follow.was_ever_heard() => break Err(error),
                    // It is looked for again.
                    Err(error) => troubles.tell(&error),
                }
                continue;
            }
            heard = follow.next() => heard,
            key = next(keys) => match writer.key(&mut io::stdout().lock(), key)? {
                Pressed::Quit => break Ok(()),
                Pressed::Stay => continue,
            },
            () = until(alone) => {
                let nobody = "no controller has been there for a while".to_owned();
                break Err(ReachError::Refused(nobody));
            }
        };
        match heard {
            Heard::Line(from, line) => {
                alone = None;
                troubles.are_over();
                match line {
                    Line::Scope(pods) => scopes.tell(target, from, pods),
                    Line::Event(event) => writer.event(&mut io::stdout().lock(), &event)?,
                    Line::Lost(it) => {
                        lost = lost.saturating_add(it.dropped);
                        left_out = left_out.saturating_add(it.left_out);
                        tell_lost(it.dropped, it.left_out, tap.max_rps);
                    }
                    Line::Refused { node, reason } => {
                        note(&format!("‼ the agent of {node} is not watched: {reason}"));
                    }
                    Line::End { reason } => note(&format!("‼ {from}: {reason}")),
                    Line::Other => {}
                }
            }
            Heard::Ended(from, error) => {
                scopes.of.remove(&from);
                let is_final = !follow.was_ever_heard() || matches!(error, ReachError::Refused(_));
                if is_final && follow.is_alone() {
                    break Err(error);
                }
                troubles.tell(&error);
                if follow.is_alone() {
                    alone.get_or_insert_with(|| Instant::now() + PATIENCE);
                    look.reset_after(TRY_AGAIN);
                }
            }
        }
    };
    if lost > 0 || left_out > 0 {
        note(&format!(
            "in all: dropped {lost} events, left out {left_out} exchanges and flows"
        ));
    }
    Ok(outcome?)
}

/// What went wrong and is tried again: each is told once, until something is heard.
#[derive(Default)]
struct Troubles(BTreeSet<String>);

impl Troubles {
    fn tell(&mut self, error: &ReachError) {
        let text = error.to_string();
        if self.0.insert(text.clone()) {
            note(&format!("‼ {text}: it is tried again"));
        }
    }

    fn are_over(&mut self) {
        self.0.clear();
    }
}

const SILENT: &str = "the API server does not answer";
/// After a controller is gone.
const TRY_AGAIN: Duration = Duration::from_secs(2);

async fn until(moment: Option<Instant>) {
    match moment {
        Some(moment) => sleep_until(moment).await,
        None => std::future::pending().await,
    }
}

/// Waits for ^C or whatever else ends programs, or for the time to be up.
async fn ended(after: Option<Duration>) {
    let moment = after.map(|it| Instant::now() + it);
    tokio::select! {
        () = sent(SignalKind::interrupt()) => {}
        () = sent(SignalKind::terminate()) => {}
        () = sent(SignalKind::hangup()) => {}
        () = until(moment) => {}
    }
}

async fn sent(kind: SignalKind) {
    match signal(kind) {
        Ok(mut signal) => drop(signal.recv().await),
        // It ends the process then, as it does unless somebody listens.
        Err(_) => std::future::pending().await,
    }
}

async fn next(keys: &mut Option<Keys>) -> Key {
    match keys {
        Some(keys) => keys.next().await,
        None => std::future::pending().await,
    }
}

/// Says something beside what is shown.
fn note(text: &str) {
    eprintln!("{}", shown(text));
}

fn tell_lost(dropped: u64, left_out: u64, max_rps: u32) {
    if dropped > 0 {
        note(&format!(
            "‼ dropped {dropped} events: there was no room for them"
        ));
    }
    if left_out > 0 {
        note(&format!(
            "‼ left out {left_out} exchanges and flows: there were more than {max_rps} in a second (--max-rps)"
        ));
    }
}

/// What is watched, as controllers are asked for it.
struct Target {
    /// Empty: all.
    namespace: String,
    kind: &'static str,
    name: String,
}

impl Target {
    fn of(scope: &ScopeArgs) -> Result<Self, ReachError> {
        let own = match scope.all_namespaces {
            true => String::new(),
            false => scope.namespace.clone().unwrap_or_default(),
        };
        let (namespace, kind, name) = end(scope.resource.as_ref(), &own);
        if own.is_empty() && !name.is_empty() {
            let both = "what has a name is in one namespace: -n says which, without -A".to_owned();
            return Err(ReachError::Refused(both));
        }
        Ok(Self {
            namespace,
            kind,
            name,
        })
    }
}

/// A scope as controllers are asked for it: its namespace, kind and name.
fn end(scope: Option<&Scope>, namespace: &str) -> (String, &'static str, String) {
    let (kind, name) = scope.map_or(("", None), Scope::parts);
    let name = name.unwrap_or_default().to_owned();
    match kind {
        "namespace" => (name, "", String::new()),
        kind => (namespace.to_owned(), kind, name),
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.kind, self.name.as_str()) {
            ("", _) => formatter.write_str("the mesh")?,
            (kind, "") => write!(formatter, "any {kind}")?,
            (kind, name) => write!(formatter, "{kind}/{name}")?,
        }
        match self.namespace.as_str() {
            "" => formatter.write_str(" in all namespaces"),
            namespace => write!(formatter, " in {namespace}"),
        }
    }
}

impl Watch {
    fn query(&self, target: &Target) -> String {
        let mut query = form_urlencoded::Serializer::new(String::new());
        let mut add = |key: &str, value: &str| {
            if !value.is_empty() {
                query.append_pair(key, value);
            }
        };
        add("namespace", &target.namespace);
        add("kind", target.kind);
        add("name", &target.name);
        for (prefix, scope, namespace) in [
            ("to", &self.to, &self.to_namespace),
            ("from", &self.from, &self.from_namespace),
        ] {
            let Some(scope) = scope else { continue };
            let own = namespace.as_ref().unwrap_or(&target.namespace);
            let (namespace, kind, name) = end(Some(scope), own);
            add(&format!("{prefix}_namespace"), &namespace);
            add(&format!("{prefix}_kind"), kind);
            add(&format!("{prefix}_name"), &name);
        }
        for (key, value) in [
            ("method", &self.method),
            ("path", &self.path),
            ("status", &self.status),
            ("identity", &self.identity),
        ] {
            add(key, value.as_deref().unwrap_or_default());
        }
        add("max_rps", &self.max_rps.to_string());
        query.finish()
    }
}

impl Scopes {
    /// Says where the pods are, if that is news.
    fn tell(&mut self, target: &Target, from: String, pods: event::Pods) {
        self.of.insert(from, pods);
        let all = self.of.values();
        let count = all.clone().map(|it| it.pods).max().unwrap_or_default();
        let nodes = all
            .clone()
            .map(|it| it.nodes.len())
            .max()
            .unwrap_or_default();
        // An agent is connected to one of the controllers.
        let mut missing: Option<Vec<&String>> = None;
        for pods in all {
            missing = Some(match missing {
                None => pods.missing.iter().collect(),
                Some(mut missing) => {
                    missing.retain(|it| pods.missing.contains(*it));
                    missing
                }
            });
        }
        let missing = missing.unwrap_or_default();
        let mut said = match count {
            0 => format!("no meshed pod of {target} is there yet: those that come are watched"),
            count => format!("watching {count} pods of {target}, on {nodes} nodes"),
        };
        if !missing.is_empty() {
            let nodes: Vec<_> = missing.iter().map(|it| it.as_str()).collect();
            said += &format!(
                "; ‼ not those on {}: the agent there is not connected, or older than this command",
                nodes.join(", ")
            );
        }
        if said != self.said {
            note(&said);
            self.said = said;
        }
    }
}

impl Writer {
    fn begin(format: Format, to: &mut impl Write) -> io::Result<Self> {
        Ok(match format {
            Format::Line => Self::Shown(Box::new(Shown::new(false, colours()))),
            Format::Wide => Self::Shown(Box::new(Shown::new(true, colours()))),
            Format::Json => Self::Json,
            Format::Har => Self::Har(Box::new(Har::begin(to)?)),
        })
    }

    fn event(&mut self, to: &mut impl Write, event: &Event) -> io::Result<()> {
        match self {
            Self::Shown(shown) => shown.event(to, event)?,
            Self::Json => crate::output::json_line(to, event)?,
            Self::Har(har) => har.event(to, event)?,
            Self::Top(live) => live.event(to, event)?,
        }
        to.flush()
    }

    fn key(&mut self, to: &mut impl Write, key: Key) -> io::Result<Pressed> {
        match self {
            Self::Shown(_) | Self::Json | Self::Har(_) => Ok(Pressed::Stay),
            Self::Top(live) => live.key(to, key),
        }
    }

    fn end(&mut self, to: &mut impl Write) -> io::Result<()> {
        match self {
            Self::Shown(_) | Self::Json => Ok(()),
            Self::Har(har) => har.end(to),
            Self::Top(live) => live.end(to),
        }
    }
}
