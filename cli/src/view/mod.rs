//! What all agents say at one moment, and what happened between two.

use std::collections::BTreeMap;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::controller::{Agent, Reach, ReachError, each};
use crate::metrics::{Scrape, Series};

mod believed;
mod remembered;
mod workload;

pub use believed::Known;
pub use remembered::{PrometheusError, PrometheusUrl, Window};
pub use workload::{Scope, ScopeArgs, ScopeError, Workload};

/// What an agent says at one moment.
#[derive(Clone, Debug)]
pub struct Said {
    /// Its node.
    pub node: String,
    /// Tells its processes apart.
    pub incarnation: String,
    /// When.
    pub at: Instant,
    /// Its metrics.
    pub scrape: Scrape,
    /// The pods of its node.
    pub pods: Vec<Pod>,
}

/// A pod of an agent's node.
#[derive(Clone, Debug, Deserialize)]
pub struct Pod {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// `enrolled` or `waiting`.
    pub state: String,
    /// Why it is not enrolled yet, where that is known.
    #[serde(default)]
    pub reason: Option<String>,
    /// Who it is, once it is enrolled.
    pub identity: Option<String>,
    /// What created it.
    pub owner: Option<Owner>,
}

/// A pod's owner as agents write it.
#[derive(Clone, Debug, Deserialize)]
pub struct Owner {
    /// Its kind in lower case.
    pub kind: String,
    /// Its name.
    pub name: String,
}

/// What all agents say at one moment.
#[derive(Clone, Debug, Default)]
pub struct View {
    /// Of each agent that answers.
    pub said: Vec<Said>,
    /// Agents that do not, and why.
    pub missing: Vec<Missing>,
}

/// An agent that does not answer.
#[derive(Clone, Debug, Serialize)]
pub struct Missing {
    /// Its node.
    pub node: String,
    /// Why.
    pub reason: String,
}

/// What happened between two moments.
#[derive(Clone, Debug, Default)]
pub struct Change {
    /// How much each series of a counter grew, in all agents.
    pub counters: Vec<Grown>,
    /// How long it took.
    pub seconds: f64,
}

/// A series that may have grown.
#[derive(Clone, Debug)]
pub struct Grown {
    /// The series.
    pub series: Series,
    /// By how much.
    pub by: f64,
}

impl View {
    /// Asks all agents for these metrics, and for their pods.
    ///
    /// # Errors
    /// A controller cannot be asked, or no agent answers.
    pub async fn take(reach: &Reach, wanted: &[&str]) -> Result<Self, ReachError> {
        let agents = reach.agents().await?;
        let asked = each(&agents, |agent| async move {
            let said = said(&agent, wanted).await;
            said.map_err(|error| Missing {
                node: agent.status.node.clone(),
                reason: error.to_string(),
            })
        });
        let mut view = Self::default();
        for said in asked.await {
            match said {
                Ok(said) => view.said.push(said),
                Err(missing) => view.missing.push(missing),
            }
        }
        match (view.said.is_empty(), view.missing.first()) {
            (true, Some(first)) => Err(ReachError::NoAnswers(first.reason.clone())),
            _ => Ok(view),
        }
    }

    /// Asks twice, and returns what happened meanwhile; or once, where a Prometheus knows what happened before.
    ///
    /// # Errors
    /// As of [`View::take`].
    pub async fn watch(
        reach: &Reach,
        wanted: &[&str],
        window: &Window,
    ) -> Result<(Self, Change), ReachError> {
        if let Some(url) = &window.prometheus_url {
            let change = remembered::change(url, wanted, window.window).await?;
            return Ok((Self::take(reach, wanted).await?, change));
        }
        let before = Self::take(reach, wanted).await?;
        tokio::time::sleep(window.window).await;
        let mut now = Self::take(reach, wanted).await?;
        let change = Change::between(&before, &now);
        now.missing.extend(before.missing);
        now.missing.sort_by(|one, other| one.node.cmp(&other.node));
        now.missing.dedup_by(|one, other| one.node == other.node);
        Ok((now, change))
    }

    /// The pods of all nodes, each once: during an upgrade two agents have the same.
    pub fn pods(&self) -> BTreeMap<(String, String), Pod> {
        let mut pods = BTreeMap::new();
        for pod in self.said.iter().flat_map(|it| &it.pods) {
            let key = (pod.namespace.clone(), pod.name.clone());
            // The one that has it enrolled knows more.
            let known: &mut Pod = pods.entry(key).or_insert_with(|| pod.clone());
            if known.identity.is_none() {
                *known = pod.clone();
            }
        }
        pods
    }

    /// Series of a name, of all agents.
    pub fn of<'a>(&'a self, name: &'a str) -> impl Iterator<Item = (&'a Series, f64)> {
        self.said.iter().flat_map(move |it| it.scrape.of(name))
    }
}

async fn said(agent: &Agent, wanted: &[&str]) -> Result<Said, ReachError> {
    let metrics = agent.page("metrics").await?;
    let at = Instant::now();
    let text = String::from_utf8_lossy(&metrics);
    let scrape = Scrape::read(&text, |name| wanted.contains(&name));
    let pods = agent.json("pods").await?;
    let known = Known::of(agent).await?;
    Ok(Said {
        node: agent.status.node.clone(),
        incarnation: agent.status.incarnation.clone(),
        at,
        scrape: known.scrape(scrape),
        pods: known.pods(pods),
    })
}

impl Change {
    /// What happened between two views. Of an agent that was not there before nothing is known: it may have begun long
    /// ago, elsewhere.
    pub fn between(before: &View, now: &View) -> Self {
        let mut change = Self::default();
        let mut times = vec![];
        for said in &now.said {
            let mut others = before.said.iter();
            let is_same = |it: &&Said| it.node == said.node && it.incarnation == said.incarnation;
            let Some(old) = others.find(is_same) else {
                continue;
            };
            times.push(said.at.duration_since(old.at).as_secs_f64());
            for (series, value) in &said.scrape.values {
                let old = old.scrape.values.get(series).copied();
                change.counters.push(Grown {
                    series: series.clone(),
                    // A series that was forgotten and began anew began at nothing.
                    by: match old {
                        Some(old) if old <= *value => value - old,
                        _ => *value,
                    },
                });
            }
        }
        change.seconds = times.iter().sum::<f64>() / times.len().max(1) as f64;
        change
    }

    /// How much something grew in a second.
    pub fn per_second(&self, grown: f64) -> f64 {
        match self.seconds > 0.0 {
            true => grown / self.seconds,
            false => 0.0,
        }
    }

    /// Series of a name.
    pub fn of<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Grown> {
        self.counters
            .iter()
            .filter(move |it| it.series.name == name)
    }
}
