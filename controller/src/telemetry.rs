//! The controller's metrics, in Prometheus' text format.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, SystemTime};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeLabelSet, EncodeLabelValue, EncodeMetric,
};
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::{Registry, Unit};
use weft_core::Name;

use crate::authority::Authority;
use crate::control::agents::Agents;
use crate::leader::Leadership;
use crate::problems::Problems;
use crate::progress::Progress;
use crate::statuses::Statuses;
use crate::views::Views;

/// What is counted while it happens.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    refused: Family<RefusedLabels, Counter>,
    authenticated: Family<ResultLabels, Counter>,
    signed: Family<SignedLabels, Counter>,
    rejected: Family<NodeLabels, Counter>,
    statuses: Family<ResultLabels, Counter>,
    told: Family<ResultLabels, Counter>,
    reviewed: Family<ResultLabels, Counter>,
    inspected: Family<ResultLabels, Counter>,
    tapped: Family<ResultLabels, Counter>,
    pushes: Counter,
    pushed: Counter,
    removed: Counter,
    source_failures: Family<SourceFailureLabels, Counter>,
    watches_lost: Family<LostLabels, Counter>,
    batches: Counter,
    events: Counter,
    applying: Counter<f64, AtomicU64>,
}

/// Why an agent was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Refused {
    /// The TLS handshake failed.
    Handshake,
    /// No token was presented.
    NoToken,
    /// The token is not known.
    WrongToken,
    /// The token is that of an agent on another node.
    OtherNode,
}

/// What became of a signing request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Signing {
    /// Signed.
    Signed,
    /// No such workload runs on the node.
    Denied,
    /// It is no proper request.
    Invalid,
    /// The authority cannot sign now.
    Failed,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RefusedLabels {
    reason: Refused,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResultLabels {
    result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SignedLabels {
    result: Signing,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct NodeLabels {
    node: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SourceFailureLabels {
    verb: &'static str,
    group: String,
    resource: String,
    code: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct LostLabels {
    group: String,
    resource: String,
    code: String,
}

impl Metrics {
    /// An agent was refused.
    pub fn refused(&self, reason: Refused) {
        self.refused.get_or_create(&RefusedLabels { reason }).inc();
    }

    /// It was decided about the token of a call.
    pub fn authenticated(&self, result: &'static str) {
        let labels = ResultLabels { result };
        self.authenticated.get_or_create(&labels).inc();
    }

    /// A signing request was decided.
    pub fn signed(&self, result: Signing) {
        self.signed.get_or_create(&SignedLabels { result }).inc();
    }

    /// An agent rejected resources.
    pub fn rejected(&self, node: &Name, count: usize) {
        let node = node.to_string();
        let counter = self.rejected.get_or_create(&NodeLabels { node });
        counter.inc_by(count as u64);
    }

    /// It was tried to write a status.
    pub fn status(&self, result: &'static str) {
        self.statuses.get_or_create(&ResultLabels { result }).inc();
    }

    /// It was tried to write an Event.
    pub fn event(&self, result: &'static str) {
        self.told.get_or_create(&ResultLabels { result }).inc();
    }

    /// The webhook was asked about an object.
    pub fn reviewed(&self, result: &'static str) {
        self.reviewed.get_or_create(&ResultLabels { result }).inc();
    }

    /// Somebody asked at the port for inspection.
    pub fn inspected(&self, result: &'static str) {
        self.inspected.get_or_create(&ResultLabels { result }).inc();
    }

    /// Somebody asked at the port for inspection to watch.
    pub fn tapped(&self, result: &'static str) {
        self.tapped.get_or_create(&ResultLabels { result }).inc();
    }

    /// A request to the API server for all objects of a resource of a group failed, with a status if it was answered.
    pub fn source_failed(
        &self,
        verb: &'static str,
        (group, resource): (&str, &str),
        status: Option<u16>,
    ) {
        let labels = SourceFailureLabels {
            verb,
            group: group.to_owned(),
            resource: resource.to_owned(),
            code: status.map(|it| it.to_string()).unwrap_or_default(),
        };
        self.source_failures.get_or_create(&labels).inc();
    }

    /// A watch of a resource of a group ended in a way that may have lost something, so that all is listed again; with
    /// the status that said so.
    pub fn watch_lost(&self, (group, resource): (&str, &str), status: Option<u16>) {
        let labels = LostLabels {
            group: group.to_owned(),
            resource: resource.to_owned(),
            code: status.map(|it| it.to_string()).unwrap_or_default(),
        };
        self.watches_lost.get_or_create(&labels).inc();
    }

    /// A push was sent.
    pub fn pushed(&self, changed: usize, removed: usize) {
        self.pushes.inc();
        self.pushed.inc_by(changed as u64);
        self.removed.inc_by(removed as u64);
    }

    /// The source's changes were taken in.
    pub fn applied(&self, events: usize, took: Duration) {
        self.batches.inc();
        self.events.inc_by(events as u64);
        self.applying.inc_by(took.as_secs_f64());
    }

    /// Everything that can be asked for.
    pub fn registry(&self, state: State) -> Registry {
        let mut registry = Registry::with_prefix("weft_controller");
        let all = &mut registry;
        let help = "Agents refused, by reason";
        all.register("refused", help, self.refused.clone());
        let help = "Tokens of agents' calls, by what was decided about them";
        all.register("agent_authentications", help, self.authenticated.clone());
        let help = "Signing requests, by result";
        all.register("signs", help, self.signed.clone());
        let help = "Resources that agents rejected";
        all.register("rejections", help, self.rejected.clone());
        let help = "Statuses that were to be written, by what became of it";
        all.register("statuses", help, self.statuses.clone());
        let help = "Events on objects that cannot be used, by what became of them";
        all.register("events", help, self.told.clone());
        let help = "Objects that the webhook was asked about, by what it said";
        all.register("reviews", help, self.reviewed.clone());
        let help = "Requests of people at the port for inspection, by what was decided about them";
        all.register("inspections", help, self.inspected.clone());
        let help = "Requests of people to watch pods, at the port for inspection, by what was decided about them";
        all.register("taps", help, self.tapped.clone());
        let help = "Pushes sent to agents";
        all.register("pushes", help, self.pushes.clone());
        let help = "Resources sent to agents";
        all.register("pushed_resources", help, self.pushed.clone());
        let help = "Removals of resources sent to agents";
        all.register("pushed_removals", help, self.removed.clone());
        let help = "Failed requests for objects to the API server";
        all.register("source_failures", help, self.source_failures.clone());
        let help = "Watches that may have lost something, so that all is listed again";
        all.register("source_watches_lost", help, self.watches_lost.clone());
        let help = "Batches of changes from the source";
        all.register("source_batches", help, self.batches.clone());
        let help = "Changed objects from the source";
        all.register("source_events", help, self.events.clone());
        let help = "Time spent on turning objects into the state of agents";
        all.register_with_unit("index", help, Unit::Seconds, self.applying.clone());
        all.register_collector(Box::new(state));
        registry
    }
}

/// What is looked up when it is asked for.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct State {
    pub views: Arc<Views>,
    pub agents: Arc<Agents>,
    pub progress: Progress,
    pub authority: Arc<Authority>,
    pub problems: Problems,
    pub statuses: Statuses,
    pub leadership: Leadership,
}

/// All metrics as text.
///
/// # Errors
/// A collector failed.
pub fn text(registry: &Registry) -> Result<String, fmt::Error> {
    let mut process = Registry::default();
    process.register_collector(Box::new(Process));
    let mut text = String::new();
    encode(&mut text, registry)?;
    // Each ends with a mark of its own.
    let end = "# EOF\n";
    text.truncate(text.len() - if text.ends_with(end) { end.len() } else { 0 });
    encode(&mut text, &process)?;
    Ok(text)
}

impl Collector for State {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let (all, nodes) = self.views.counts();
        let expires = self.authority.issuer_not_after().map_or(0, seconds);
        let runtime = tokio::runtime::Handle::try_current();
        let leads = self.leadership.leads();
        let waiting = if leads { self.statuses.waiting() } else { 0 };
        let tasks = runtime.map_or(0, |it| it.metrics().num_alive_tasks() as u64);
        for (name, help, value) in [
            ("agents", "Agents connected", self.agents.count() as u64),
            (
                "agents_ahead",
                "Agents that are told nothing, as they know of later changes than were heard here",
                self.progress.waiting() as u64,
            ),
            (
                "problems",
                "Present problems, listed at /problems",
                self.problems.count() as u64,
            ),
            (
                "complete",
                "Whether the source has told everything once",
                self.views.is_complete().into(),
            ),
            ("resources", "Resources for all agents", all as u64),
            (
                "node_resources",
                "Resources for single nodes' agents",
                nodes as u64,
            ),
            (
                "issuer_not_after_seconds",
                "When the issuer's certificate ends",
                expires,
            ),
            ("tasks", "Tasks of the runtime", tasks),
            (
                "leader",
                "Whether this controller leads, and writes statuses",
                leads.into(),
            ),
            (
                "statuses_waiting",
                "Objects on which something is to be said",
                waiting as u64,
            ),
        ] {
            let gauge = ConstGauge::new(value as f64);
            let metric = encoder.encode_descriptor(name, help, None, gauge.metric_type())?;
            gauge.encode(metric)?;
        }
        let counter = ConstCounter::new(self.statuses.lost_events());
        let help = "Events that were not told as too many objects waited";
        let kind = counter.metric_type();
        counter.encode(encoder.encode_descriptor("events_lost", help, None, kind)?)?;
        if let Some(silent) = self.progress.silent_for() {
            let name = "source_silent_seconds";
            let help = "Time since the API server last said something of objects";
            let gauge = ConstGauge::new(silent.as_secs_f64());
            let metric = encoder.encode_descriptor(name, help, None, gauge.metric_type())?;
            gauge.encode(metric)?;
        }
        Ok(())
    }
}

/// The process, as Prometheus' own libraries describe it.
#[derive(Debug)]
struct Process;

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        // Without /proc there is nothing to tell; that is no reason to fail.
        let Some(usage) = Usage::read() else {
            return Ok(());
        };
        let counter = ConstCounter::new(usage.cpu_seconds);
        let help = "Total user and system CPU time spent";
        let name = "process_cpu_seconds";
        counter.encode(encoder.encode_descriptor(name, help, None, counter.metric_type())?)?;
        for (name, help, value) in [
            (
                "process_resident_memory_bytes",
                "Resident memory size",
                usage.resident_bytes,
            ),
            (
                "process_virtual_memory_bytes",
                "Virtual memory size",
                usage.virtual_bytes,
            ),
            (
                "process_start_time_seconds",
                "Start of the process since 1970",
                usage.start_seconds,
            ),
            (
                "process_open_fds",
                "Number of open file descriptors",
                usage.open_descriptors,
            ),
            ("process_threads", "Number of threads", usage.threads),
        ] {
            let gauge = ConstGauge::new(value);
            gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)?;
        }
        Ok(())
    }
}

struct Usage {
    cpu_seconds: f64,
    resident_bytes: f64,
    virtual_bytes: f64,
    start_seconds: f64,
    open_descriptors: f64,
    threads: f64,
}

impl Usage {
    /// Reads `/proc/self` (proc_pid_stat(5); fields are counted from after the command's name).
    fn read() -> Option<Self> {
        let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
        let (_, fields) = stat.rsplit_once(") ")?;
        let fields: Vec<&str> = fields.split(' ').collect();
        let number = |index: usize| fields.get(index)?.parse::<f64>().ok();
        let per_second = sysconf(nix::unistd::SysconfVar::CLK_TCK)?;
        let page = sysconf(nix::unistd::SysconfVar::PAGE_SIZE)?;
        let boot = std::fs::read_to_string("/proc/stat").ok()?;
        let boot = boot.lines().find_map(|line| line.strip_prefix("btime "))?;
        let boot: f64 = boot.trim().parse().ok()?;
        Some(Self {
            cpu_seconds: (number(11)? + number(12)?) / per_second,
            threads: number(17)?,
            start_seconds: boot + number(19)? / per_second,
            virtual_bytes: number(20)?,
            resident_bytes: number(21)? * page,
            open_descriptors: std::fs::read_dir("/proc/self/fd").ok()?.count() as f64,
        })
    }
}

fn sysconf(variable: nix::unistd::SysconfVar) -> Option<f64> {
    let value = nix::unistd::sysconf(variable).ok()??;
    Some(value as f64)
}

fn seconds(moment: SystemTime) -> u64 {
    let since = moment.duration_since(SystemTime::UNIX_EPOCH);
    since.unwrap_or_default().as_secs()
}

impl EncodeLabelValue for Refused {
    fn encode(
        &self,
        encoder: &mut prometheus_client::encoding::LabelValueEncoder<'_>,
    ) -> Result<(), fmt::Error> {
        let text = match self {
            Self::Handshake => "handshake",
            Self::NoToken => "no_token",
            Self::WrongToken => "wrong_token",
            Self::OtherNode => "other_node",
        };
        EncodeLabelValue::encode(&text, encoder)
    }
}

impl EncodeLabelValue for Signing {
    fn encode(
        &self,
        encoder: &mut prometheus_client::encoding::LabelValueEncoder<'_>,
    ) -> Result<(), fmt::Error> {
        let text = match self {
            Self::Signed => "signed",
            Self::Denied => "denied",
            Self::Invalid => "invalid",
            Self::Failed => "failed",
        };
        EncodeLabelValue::encode(&text, encoder)
    }
}
