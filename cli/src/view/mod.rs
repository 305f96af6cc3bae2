//! What all agents say at one moment, and what happened in a time up to it.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::controller::{Agent, Reach, ReachError, each};
use crate::metrics::{Scrape, Series};

mod believed;
mod change;
mod prometheus;
mod seen;
mod window;
mod workload;

pub use believed::Known;
pub use change::{Change, Grown, Partial, Recent};
pub use prometheus::{PrometheusError, PrometheusUrl};
pub use seen::{Missing, Seen};
pub use window::{TooLong, Window};
pub use workload::{Scope, ScopeArgs, ScopeError, Workload};

use window::Source;

/// What an agent says at one moment.
#[derive(Clone, Debug)]
pub struct Said {
    /// Its node.
    pub node: String,
    /// Its metrics as they are.
    pub scrape: Scrape,
    /// By how much others grew.
    pub recent: Recent,
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

/// What is asked of agents.
#[derive(Clone, Copy, Debug)]
struct Wanted<'a> {
    /// As they are now.
    now: &'a [&'a str],
    /// By how much these grew in the last seconds.
    grown: Option<(&'a [&'a str], u64)>,
}

impl View {
    /// Asks all agents for these metrics as they are now, and for their pods.
    ///
    /// # Errors
    /// A controller cannot be asked, or no agent answers.
    pub async fn take(reach: &Reach, now: &[&str]) -> Result<Self, ReachError> {
        Self::ask(reach, Wanted { now, grown: None }).await
    }

    /// The same, and what happened to counters in a time up to now: as agents remember it, or a Prometheus.
    ///
    /// # Errors
    /// As of [`View::take`], or nobody remembers that.
    pub async fn watch(
        reach: &Reach,
        now: &[&str],
        counters: &[&str],
        window: &Window,
    ) -> Result<(Self, Change), ReachError> {
        match window.source()? {
            Source::Prometheus(url) => {
                let change = prometheus::change(url, counters, window.window).await?;
                Ok((Self::take(reach, now).await?, change))
            }
            Source::Agents(seconds) => {
                let grown = Some((counters, seconds));
                let view = Self::ask(reach, Wanted { now, grown }).await?;
                let change = Change::recent(&view, seconds as f64);
                Ok((view, change))
            }
        }
    }

    async fn ask(reach: &Reach, wanted: Wanted<'_>) -> Result<Self, ReachError> {
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

async fn said(agent: &Agent, wanted: Wanted<'_>) -> Result<Said, ReachError> {
    let mut scrape = Scrape::default();
    if !wanted.now.is_empty() {
        let metrics = agent.page("metrics").await?;
        let text = String::from_utf8_lossy(&metrics);
        scrape = Scrape::read(&text, |name| wanted.now.contains(&name));
    }
    let grown = match wanted.grown {
        Some((_, seconds)) => agent.page(&format!("recent?seconds={seconds}")).await?,
        None => Default::default(),
    };
    let pods = agent.json("pods").await?;
    let known = Known::of(agent).await?;
    let recent = wanted.grown.map(|(names, _)| {
        let text = String::from_utf8_lossy(&grown);
        Recent::read(&text, names, &known)
    });
    Ok(Said {
        node: agent.status.node.clone(),
        scrape: known.scrape(scrape),
        recent: recent.unwrap_or_default(),
        pods: known.pods(pods),
    })
}
