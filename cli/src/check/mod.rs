//! `weft check`: is it healthy, and if not, what is wrong and what helps.
//!
//! What is looked at is what the parts have: the controller's own state and clock, and of each agent its kernel programs,
//! pods, certificates and counters, asked for now. Each check is a line with one fact; what a finding means and what
//! helps is told in `docs/checks.md`, under a heading of the check's name. Before there is a mesh, `--pre` looks at the
//! cluster that is to have one: see `pre`.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use serde::Serialize;

use crate::controller::Reach;
use crate::outcome::Outcome;
use crate::output::{self, Tone, paint, shown};

mod agents;
mod control;
mod extensions;
mod facts;
mod pre;

use facts::Facts;

#[cfg(test)]
mod tests;

/// What `weft check` is asked.
#[derive(Args, Debug)]
pub struct Check {
    /// Before Weft is installed: whether the cluster that kubectl would use can have it, and whether you may install it.
    #[arg(
        long,
        conflicts_with_all = ["nodes", "proxy", "namespace", "fail_on_expiry"]
    )]
    pub pre: bool,
    /// Only the agents of this node; may be given several times.
    #[arg(long = "node", value_name = "NODE")]
    pub nodes: Vec<String>,
    /// Only agents and the pods that they serve: nothing of controllers, issuers and clocks.
    #[arg(long)]
    pub proxy: bool,
    /// Of pods, only those of this namespace.
    #[arg(short, long)]
    pub namespace: Option<String>,
    /// Looks again until nothing is wrong, for this long at most.
    #[arg(long, value_name = "TIME", value_parser = crate::command::duration)]
    pub wait: Option<Duration>,
    /// An issuer or root that ends within this time is an error: `30d`, `12h`.
    #[arg(long, value_name = "TIME", value_parser = crate::command::days)]
    pub fail_on_expiry: Option<Duration>,
    /// How the answer is written.
    #[arg(short, long, default_value = "table")]
    pub output: CheckFormat,
    /// Whom to ask.
    #[command(flatten)]
    pub reach: Reach,
}

/// Which form an answer has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum CheckFormat {
    /// For people.
    #[default]
    Table,
    /// For people, and only what is not as it should be.
    Short,
    /// For programs.
    Json,
}

/// How something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    /// As it should be.
    Ok,
    /// Worth a look.
    Warning,
    /// Not as it should be.
    Error,
}

/// What was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Finding {
    /// The check's name, which is its heading in `docs/checks.md`.
    check: &'static str,
    category: &'static str,
    state: State,
    /// One line.
    fact: String,
    /// What it is about, one by one.
    details: Vec<String>,
}

/// All of it.
#[derive(Debug, Serialize)]
struct Report {
    /// Whether nothing is an error.
    ok: bool,
    checks: Vec<Finding>,
}

/// All checks with their categories, in the order in which they are shown.
const CHECKS: [(&str, &str); 18] = [
    ("controller-reachable", "control plane"),
    ("controller-ready", "control plane"),
    ("controller-version", "control plane"),
    ("configuration-problems", "control plane"),
    ("other-meshes", "control plane"),
    ("issuer", "identity"),
    ("trust-roots", "identity"),
    ("clocks", "identity"),
    ("agents-connected", "agents"),
    ("agents-answer", "agents"),
    ("agents-version", "agents"),
    ("kernel-programs", "agents"),
    ("pods-enrolled", "agents"),
    ("control-stream", "agents"),
    ("workload-certificates", "agents"),
    ("redirect-misses", "agents"),
    ("agents-healthy", "agents"),
    ("extensions", "extensions"),
];

/// The same of `--pre`.
const BEFORE: [(&str, &str); 10] = [
    ("kubernetes-reachable", "kubernetes"),
    ("kubernetes-version", "kubernetes"),
    ("rights-to-install", "kubernetes"),
    ("weft-installed", "what is there"),
    ("definitions", "what is there"),
    ("another-mesh", "what is there"),
    ("cni", "what is there"),
    ("address-ranges", "what is there"),
    ("node-kernels", "nodes"),
    ("node-platforms", "nodes"),
];

const AGENTS: &str = "agents";
const REACHABLE: &str = "controller-reachable";

/// How long it is waited before it is looked again.
const AGAIN: Duration = Duration::from_secs(2);
/// Where findings are explained.
const EXPLAINED: &str = "docs/checks.md";
/// More details of one check are counted.
const MAX_DETAILS: usize = 10;

/// Looks, and says how it is.
///
/// # Errors
/// The answer cannot be written.
pub async fn run(check: &Check) -> Result<Outcome, crate::Error> {
    let began = Instant::now();
    let report = loop {
        let report = match check.pre {
            true => Report::of(pre::findings(&pre::Facts::gather(&check.reach).await)),
            false => Report::new(check, &Facts::gather(check).await),
        };
        let patience = check
            .wait
            .unwrap_or_default()
            .saturating_sub(began.elapsed());
        if report.ok || patience.is_zero() {
            break report;
        }
        waiting(&report);
        tokio::time::sleep(AGAIN.min(patience)).await;
    };
    if std::io::stderr().is_terminal() && check.wait.is_some() {
        eprint!("\r\x1b[K");
    }
    let mut out = std::io::stdout().lock();
    match check.output {
        CheckFormat::Json => output::json(&mut out, &report)?,
        CheckFormat::Table => report.write(&mut out, output::colours(), State::Ok)?,
        CheckFormat::Short => report.write(&mut out, output::colours(), State::Warning)?,
    }
    Ok(Outcome::of(report.ok))
}

/// Says what is waited for, where somebody looks.
fn waiting(report: &Report) {
    if !std::io::stderr().is_terminal() {
        return;
    }
    let mut wrong = report.checks.iter().filter(|it| it.state == State::Error);
    if let Some(first) = wrong.next() {
        let more = match wrong.count() {
            0 => String::new(),
            more => format!(" (and {more} more)"),
        };
        eprint!("\r\x1b[K… {}{more}", shown(&first.fact));
    }
}

impl Report {
    fn new(check: &Check, facts: &Facts) -> Self {
        let mut checks = control::findings(check, facts);
        checks.extend(agents::findings(facts));
        if check.proxy {
            // Without a controller that answers nothing else is known.
            checks.retain(|it| {
                it.category == AGENTS || it.state == State::Error && it.check == REACHABLE
            });
        } else {
            checks.push(extensions::finding(&facts.extensions));
        }
        Self::of(checks)
    }

    fn of(checks: Vec<Finding>) -> Self {
        Self {
            ok: checks.iter().all(|it| it.state != State::Error),
            checks,
        }
    }

    /// Writes what is at least this bad.
    fn write(&self, to: &mut impl Write, colours: bool, from: State) -> std::io::Result<()> {
        let mut category = "";
        for finding in self.checks.iter().filter(|it| it.state >= from) {
            if finding.category != category {
                let gap = if category.is_empty() { "" } else { "\n" };
                category = finding.category;
                writeln!(to, "{gap}{}", paint(category, Tone::Head, colours))?;
            }
            finding.write(to, colours)?;
        }
        let worst = self.checks.iter().map(|it| it.state).max();
        let (summary, tone) = match worst.unwrap_or(State::Ok) {
            State::Ok => ("all is well", Tone::Good),
            State::Warning => ("it works; some of it is worth a look", Tone::Warn),
            State::Error => ("something is wrong", Tone::Bad),
        };
        let gap = if category.is_empty() { "" } else { "\n" };
        writeln!(to, "{gap}{}", paint(summary, tone, colours))
    }
}

impl Finding {
    /// Of a check; its category is that of the list.
    fn new(check: &'static str, state: State, fact: impl Into<String>) -> Self {
        let mut all = CHECKS.iter().chain(&BEFORE);
        let category = all.find(|(name, _)| *name == check).map_or("", |it| it.1);
        Self {
            check,
            category,
            state,
            fact: fact.into(),
            details: vec![],
        }
    }

    /// As it should be if there is nothing to say, else so bad, with one line for each.
    fn of(
        check: &'static str,
        otherwise: State,
        details: Vec<String>,
        good: impl FnOnce() -> String,
        bad: impl FnOnce(usize) -> String,
    ) -> Self {
        match details.len() {
            0 => Self::new(check, State::Ok, good()),
            count => Self {
                details,
                ..Self::new(check, otherwise, bad(count))
            },
        }
    }

    fn write(&self, to: &mut impl Write, colours: bool) -> std::io::Result<()> {
        let (mark, tone) = match self.state {
            State::Ok => ("√", Tone::Good),
            State::Warning => ("‼", Tone::Warn),
            State::Error => ("×", Tone::Bad),
        };
        writeln!(to, "{} {}", paint(mark, tone, colours), shown(&self.fact))?;
        for detail in self.details.iter().take(MAX_DETAILS) {
            writeln!(to, "    {}", shown(detail))?;
        }
        if let Some(more) = self.details.len().checked_sub(MAX_DETAILS + 1) {
            writeln!(to, "    and {} more", more + 1)?;
        }
        if self.state != State::Ok {
            writeln!(to, "    see {EXPLAINED}#{}", self.check)?;
        }
        Ok(())
    }
}
