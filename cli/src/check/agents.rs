//! Checks of agents: whether each node has one, and how each is.

use std::collections::BTreeSet;

use super::facts::{AgentSaid, Facts};
use super::{Finding, State};
use crate::time::{now_ms, when};

/// What an agent knows may be this old before it is worth a look, in seconds.
const OLD: f64 = 60.0;
/// Certificates that end within this time were not renewed when they should have been, in milliseconds.
const OVERDUE_MS: u64 = 60_000;

/// All of them.
pub(super) fn findings(facts: &Facts) -> Vec<Finding> {
    if facts.said().next().is_none() {
        return vec![];
    }
    let mut findings = vec![connected(facts)];
    if facts.agents.is_empty() {
        return findings;
    }
    findings.push(answer(facts));
    if facts.answers().next().is_none() {
        return findings;
    }
    findings.push(version(facts));
    findings.push(kernel_programs(facts));
    findings.push(enrolled(facts));
    findings.push(control_stream(facts));
    findings.push(certificates(facts));
    findings.push(redirect_misses(facts));
    findings.push(healthy(facts));
    findings
}

fn connected(facts: &Facts) -> Finding {
    let connected = facts.said().flat_map(|it| &it.agents);
    let connected = connected.map(|it| it.node.as_str());
    let is_meant = |node: &&str| facts.nodes.is_empty() || facts.nodes.iter().any(|it| it == node);
    let connected: BTreeSet<&str> = connected.filter(is_meant).collect();
    let meshed = facts.said().flat_map(|it| &it.status.nodes);
    let meshed: BTreeSet<&str> = meshed.map(String::as_str).filter(is_meant).collect();
    // Who asks about a node says that it has one.
    let named = facts.nodes.iter().map(String::as_str);
    let wanted: BTreeSet<&str> = named.chain(meshed.iter().copied()).collect();
    let missing = wanted.difference(&connected).map(|node| {
        let has = match meshed.contains(node) {
            true => "has meshed pods and no agent",
            false => "has no agent",
        };
        format!("{node} {has}")
    });
    let mut missing: Vec<_> = missing.collect();
    if connected.is_empty() && missing.is_empty() {
        missing.push("no agent is connected at all".to_owned());
    }
    let good = || format!("{} nodes have an agent that is connected", connected.len());
    let bad = |count| format!("{count} nodes have no agent that is connected");
    Finding::of("agents-connected", State::Error, missing, good, bad)
}

fn answer(facts: &Facts) -> Finding {
    let silent = facts.agents.iter().filter_map(|it| {
        let reason = it.said.as_ref().err()?;
        Some(format!("{}: {reason}", it.status.node))
    });
    let good = || "all agents answer".to_owned();
    let bad = |count| format!("{count} of {} agents do not answer", facts.agents.len());
    Finding::of("agents-answer", State::Error, silent.collect(), good, bad)
}

fn version(facts: &Facts) -> Finding {
    let versions = facts.said().map(|it| it.status.version.as_str());
    let versions: BTreeSet<&str> = versions.collect();
    let others = facts.agents.iter().map(|it| &it.status);
    let others = others.filter(|it| !versions.contains(it.version.as_str()));
    let others = others.map(|it| format!("{}: {}", it.node, it.version));
    let good = || "agents are of the controller's version".to_owned();
    let bad = |count| format!("{count} agents are of another version than the controller");
    Finding::of(
        "agents-version",
        State::Warning,
        others.collect(),
        good,
        bad,
    )
}

fn kernel_programs(facts: &Facts) -> Finding {
    let mut wrong = vec![];
    let mut repaired = vec![];
    for (status, said) in facts.answers() {
        if let Some(problem) = &said.readiness.hooks {
            wrong.push(format!("{}: {problem}", status.node));
        }
        let times = sum(said, "weft_hooks_repaired_total");
        if times > 0.0 {
            repaired.push(format!(
                "{}: {times:.0} programs that somebody detached were attached again",
                status.node
            ));
        }
    }
    let of = "kernel-programs";
    if wrong.is_empty() && !repaired.is_empty() {
        let bad = |_| "somebody detaches kernel programs".to_owned();
        return Finding::of(of, State::Warning, repaired, String::new, bad);
    }
    let good = || "on every node each kernel program is attached exactly once".to_owned();
    let bad = |count| format!("on {count} nodes kernel programs are not as they should be");
    Finding::of(of, State::Error, wrong, good, bad)
}

fn enrolled(facts: &Facts) -> Finding {
    let mut waiting = BTreeSet::new();
    let mut enrolled = BTreeSet::new();
    for (status, said) in facts.answers() {
        for pod in said.pods.iter().filter(|it| facts.has(&it.namespace)) {
            let name = format!("{}/{}", pod.namespace, pod.name);
            match pod.identity {
                Some(_) => enrolled.insert(name),
                None => {
                    let reason = pod.reason.as_deref().unwrap_or("no reason is known yet");
                    waiting.insert((name, format!("on {}: {reason}", status.node)))
                }
            };
        }
    }
    // During an upgrade one of a node's two agents has it.
    waiting.retain(|(name, _)| !enrolled.contains(name));
    let waiting = waiting.into_iter();
    let waiting = waiting.map(|(name, reason)| format!("{name} {reason}"));
    let good = || format!("all {} meshed pods are enrolled", enrolled.len());
    let bad = |count| format!("{count} meshed pods are not enrolled");
    Finding::of("pods-enrolled", State::Error, waiting.collect(), good, bad)
}

fn control_stream(facts: &Facts) -> Finding {
    let old = facts.answers().filter_map(|(status, said)| {
        let readiness = &said.readiness;
        let node = &status.node;
        match readiness.knowledge_age_seconds {
            None => Some(format!("{node} has not been told everything yet")),
            Some(age) if age > OLD => Some(format!("what {node} knows is {age:.0} s old")),
            Some(_) if !readiness.connected => Some(format!("{node} has no control stream")),
            Some(_) => None,
        }
    });
    let good = || "what agents know is current".to_owned();
    let bad = |count| format!("{count} agents do not know what is current");
    Finding::of("control-stream", State::Warning, old.collect(), good, bad)
}

fn certificates(facts: &Facts) -> Finding {
    let mut first: Option<u64> = None;
    let mut overdue = vec![];
    for (status, said) in facts.answers() {
        let name = "identity_cert_expiration_timestamp_seconds";
        for (series, ends) in said.scrape.of(name) {
            let identity = series.label("identity").unwrap_or_default();
            if !facts.has(namespace_of(identity)) {
                continue;
            }
            // A certificate's end is far from where milliseconds are not exact any more.
            let ends = (ends * 1000.0) as u64;
            first = Some(first.map_or(ends, |it| it.min(ends)));
            if ends < now_ms() + OVERDUE_MS {
                overdue.push(format!("{}: {identity} ends {}", status.node, when(ends)));
            }
        }
    }
    let good = || match first {
        Some(ends) => format!("workloads have certificates; the first ends {}", when(ends)),
        None => "no workload needs a certificate yet".to_owned(),
    };
    let bad = |count| format!("{count} certificates of workloads are not renewed");
    Finding::of("workload-certificates", State::Error, overdue, good, bad)
}

/// That of a SPIFFE ID: `spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/SERVICE-ACCOUNT`.
fn namespace_of(identity: &str) -> &str {
    identity.split('/').nth(4).unwrap_or_default()
}

fn redirect_misses(facts: &Facts) -> Finding {
    let misses = facts.answers().filter_map(|(status, said)| {
        let series = said.scrape.of("weft_refused_total");
        let series = series.filter(|(it, _)| it.is("reason", "redirect_miss"));
        let of_pods = series.filter(|(it, _)| facts.has(it.label("namespace").unwrap_or_default()));
        let count: f64 = of_pods.map(|(_, count)| count).sum();
        (count > 0.0).then(|| format!("{}: {count:.0}", status.node))
    });
    let good = || "no connection reached an agent without where it was to go".to_owned();
    let bad = |count| {
        format!("on {count} nodes, connections reached the agent without where they were to go")
    };
    Finding::of(
        "redirect-misses",
        State::Warning,
        misses.collect(),
        good,
        bad,
    )
}

/// What no other check says: what agents themselves say keeps them from being ready, or will hurt.
fn healthy(facts: &Facts) -> Finding {
    let mut errors = vec![];
    let mut warnings = vec![];
    for (status, said) in facts.answers() {
        let node = &status.node;
        let of_node = |text: &String| format!("{node}: {text}");
        if !said.readiness.ready {
            errors.extend(said.readiness.reasons.iter().map(of_node));
        }
        warnings.extend(said.readiness.warnings.iter().map(of_node));
        let panics = sum(said, "weft_panics_total");
        if panics > 0.0 {
            warnings.push(format!(
                "{node}: {panics:.0} panics, each of which is a bug: its log has them"
            ));
        }
    }
    let of = "agents-healthy";
    if errors.is_empty() {
        let good = || "agents are ready, and warn of nothing".to_owned();
        let bad = |_| "agents are ready, and warn".to_owned();
        return Finding::of(of, State::Warning, warnings, good, bad);
    }
    errors.extend(warnings);
    let bad = |_| "agents are not ready".to_owned();
    Finding::of(of, State::Error, errors, String::new, bad)
}

fn sum(said: &AgentSaid, name: &str) -> f64 {
    said.scrape.of(name).map(|(_, value)| value).sum()
}
