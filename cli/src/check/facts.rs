//! What is asked of controllers and agents for the checks.

use std::collections::BTreeSet;

use serde::Deserialize;

use super::Check;
use crate::controller::{self, Agent, AgentStatus, Place, ReachError, each};
use crate::extension::{self, Extension};
use crate::metrics::Scrape;
use crate::time::now_ms;
use crate::view::{Known, Pod};

/// All of it.
#[derive(Debug, Default)]
pub(super) struct Facts {
    /// The nodes that are asked about; none: all.
    pub(super) nodes: Vec<String>,
    /// The namespace of the pods that are asked about; none: all.
    pub(super) namespace: Option<String>,
    pub(super) extensions: Vec<Extension>,
    pub(super) controllers: Vec<Controller>,
    pub(super) agents: Vec<AgentFacts>,
}

/// A controller.
#[derive(Debug)]
pub(super) struct Controller {
    /// Where it is.
    pub(super) place: String,
    /// What it says, or why nothing.
    pub(super) said: Result<Said, String>,
}

/// What a controller says.
#[derive(Debug)]
pub(super) struct Said {
    pub(super) status: Status,
    pub(super) problems: Vec<ShownProblem>,
    pub(super) notices: Vec<ShownNotice>,
    pub(super) agents: Vec<AgentStatus>,
    /// How far its clock is ahead of this one, and how sure that is, in milliseconds.
    pub(super) clock: Clock,
}

/// How far a clock is ahead of this machine's, in milliseconds, give or take.
#[derive(Clone, Copy, Debug)]
pub(super) struct Clock {
    pub(super) ahead_ms: i64,
    pub(super) give_or_take_ms: i64,
}

/// `/status` of a controller.
#[derive(Debug, Deserialize)]
pub(super) struct Status {
    pub(super) version: String,
    pub(super) now_ms: u64,
    pub(super) source: String,
    pub(super) lacks: Option<String>,
    pub(super) trust_domain: String,
    pub(super) issuer_not_after_ms: Option<u64>,
    pub(super) roots: Vec<Root>,
    pub(super) nodes: BTreeSet<String>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Root {
    pub(super) subject: String,
    pub(super) not_after_ms: u64,
}

#[derive(Debug, Deserialize)]
struct ProblemList {
    problems: Vec<ShownProblem>,
    /// Older controllers have none.
    #[serde(default)]
    notices: Vec<ShownNotice>,
}

#[derive(Debug, Deserialize)]
struct AgentList {
    agents: Vec<AgentStatus>,
}

/// A problem as a controller shows it.
#[derive(Debug, Deserialize)]
pub(super) struct ShownProblem {
    pub(super) file: Option<String>,
    pub(super) document: Option<usize>,
    pub(super) object: Option<String>,
    pub(super) field: String,
    pub(super) reason: String,
    pub(super) effect: String,
}

/// What a controller says of pods that are left to another mesh.
#[derive(Debug, Deserialize)]
pub(super) struct ShownNotice {
    pub(super) namespace: String,
    pub(super) pods: usize,
    pub(super) examples: Vec<String>,
    pub(super) reason: String,
    pub(super) effect: String,
}

/// An agent.
#[derive(Debug)]
pub(super) struct AgentFacts {
    pub(super) status: AgentStatus,
    /// What it says, or why nothing.
    pub(super) said: Result<AgentSaid, String>,
}

/// What an agent says.
#[derive(Debug)]
pub(super) struct AgentSaid {
    pub(super) readiness: Readiness,
    pub(super) pods: Vec<Pod>,
    pub(super) scrape: Scrape,
    pub(super) clock: Clock,
}

/// `/ready` of an agent.
#[derive(Debug, Deserialize)]
pub(super) struct Readiness {
    pub(super) ready: bool,
    pub(super) reasons: Vec<String>,
    pub(super) warnings: Vec<String>,
    pub(super) connected: bool,
    pub(super) knowledge_age_seconds: Option<f64>,
    pub(super) hooks: Option<String>,
    pub(super) now_ms: u64,
}

/// The metrics that are looked at.
const METRICS: [&str; 4] = [
    "weft_refused_total",
    "weft_hooks_repaired_total",
    "weft_panics_total",
    "identity_cert_expiration_timestamp_seconds",
];

impl Facts {
    /// Asks for all of it.
    pub(super) async fn gather(check: &Check) -> Self {
        let mut facts = Self {
            nodes: check.nodes.clone(),
            namespace: check.namespace.clone(),
            extensions: extension::all(),
            ..Self::default()
        };
        let mut agents: Vec<Agent> = vec![];
        let places = check.reach.places().await.unwrap_or_else(|error| {
            facts.controllers.push(Controller {
                place: "nowhere".to_owned(),
                said: Err(error.to_string()),
            });
            vec![]
        });
        for place in &places {
            let said = said(place).await;
            if let Ok(said) = &said {
                agents.extend(said.agents.iter().map(|status| Agent {
                    place: place.clone(),
                    status: status.clone(),
                }));
            }
            facts.controllers.push(Controller {
                place: place.to_string(),
                said: said.map_err(|it| it.to_string()),
            });
        }
        agents.retain(|it| check.nodes.is_empty() || check.nodes.contains(&it.status.node));
        let key = |it: &Agent| (it.status.node.clone(), it.status.incarnation.clone());
        agents.sort_by_key(key);
        agents.dedup_by_key(|it| key(it));
        let asked = each(&agents, |agent| async move {
            AgentFacts {
                said: of_agent(&agent).await.map_err(|it| it.to_string()),
                status: agent.status,
            }
        });
        facts.agents = asked.await;
        facts
    }

    /// Whether a pod's namespace is asked about.
    pub(super) fn has(&self, namespace: &str) -> bool {
        self.namespace.as_deref().is_none_or(|it| it == namespace)
    }

    /// What those controllers say that answer.
    pub(super) fn said(&self) -> impl Iterator<Item = &Said> {
        self.controllers
            .iter()
            .filter_map(|it| it.said.as_ref().ok())
    }

    /// Agents that answer, with what they say.
    pub(super) fn answers(&self) -> impl Iterator<Item = (&AgentStatus, &AgentSaid)> {
        let agents = self.agents.iter();
        agents.filter_map(|it| Some((&it.status, it.said.as_ref().ok()?)))
    }
}

async fn said(place: &Place) -> Result<Said, ReachError> {
    let before = now_ms();
    let status: Status = controller::json(place, "/status").await?;
    let clock = Clock::between(before, status.now_ms, now_ms());
    let problems: ProblemList = controller::json(place, "/problems").await?;
    let agents: AgentList = controller::json(place, "/agents").await?;
    Ok(Said {
        status,
        problems: problems.problems,
        notices: problems.notices,
        agents: agents.agents,
        clock,
    })
}

async fn of_agent(agent: &Agent) -> Result<AgentSaid, ReachError> {
    let before = now_ms();
    let readiness: Readiness = agent.json("ready").await?;
    let clock = Clock::between(before, readiness.now_ms, now_ms());
    let metrics = agent.page("metrics").await?;
    let metrics = String::from_utf8_lossy(&metrics);
    let scrape = Scrape::read(&metrics, |it| METRICS.contains(&it));
    let pods = agent.json("pods").await?;
    let known = Known::of(agent).await?;
    Ok(AgentSaid {
        readiness,
        pods: known.pods(pods),
        scrape: known.scrape(scrape),
        clock,
    })
}

impl Clock {
    /// What another clock showed between two moments of this one.
    pub(super) fn between(before: u64, other: u64, after: u64) -> Self {
        let signed = |it: u64| i64::try_from(it).unwrap_or(i64::MAX);
        let took = signed(after).saturating_sub(signed(before)).max(0);
        let middle = signed(before).saturating_add(took / 2);
        Self {
            ahead_ms: signed(other).saturating_sub(middle),
            give_or_take_ms: took / 2,
        }
    }

    /// How far it is off at least.
    pub(super) fn off_ms(self) -> i64 {
        let off = self.ahead_ms.saturating_abs();
        off.saturating_sub(self.give_or_take_ms).max(0)
    }
}

impl std::fmt::Display for ShownNotice {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            namespace,
            pods,
            examples,
            reason,
            effect,
        } = self;
        let dots = match examples.len() < *pods {
            true => ", ...",
            false => "",
        };
        let examples = examples.join(", ");
        write!(
            formatter,
            "{namespace}: {pods} ({examples}{dots}): {reason}: {effect}"
        )
    }
}

impl std::fmt::Display for ShownProblem {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if let Some(file) = &self.file {
            write!(formatter, "{file}")?;
            if let Some(number) = self.document {
                write!(formatter, " (document {number})")?;
            }
            formatter.write_str(": ")?;
        }
        if let Some(object) = &self.object {
            write!(formatter, "{object}: ")?;
        }
        if !self.field.is_empty() {
            write!(formatter, "{}: ", self.field)?;
        }
        write!(formatter, "{}: {}", self.reason, self.effect)
    }
}
