//! Checks of controllers: whether they serve, what they make of their objects, and whom they vouch for.

use std::collections::BTreeSet;
use std::time::Duration;

use super::facts::Facts;
use super::{Check, Finding, State};
use crate::time::{now_ms, when};

/// Less of an issuer's or root's life than this is worth a look.
const SOON: Duration = Duration::from_secs(7 * 24 * 3600);
/// Certificates are valid from a minute before they are made: clocks that are further apart hurt. This is well before.
const MAX_SKEW_MS: i64 = 5_000;

/// All of them.
pub(super) fn findings(check: &Check, facts: &Facts) -> Vec<Finding> {
    let mut findings = vec![reachable(facts)];
    if facts.said().next().is_none() {
        // Of all else nothing is known.
        return findings;
    }
    findings.push(ready(facts));
    findings.push(version(facts));
    findings.push(problems(facts));
    findings.push(left_to_other_meshes(facts));
    findings.push(issuer(check, facts));
    findings.push(roots(check, facts));
    findings.push(clocks(facts));
    findings
}

fn reachable(facts: &Facts) -> Finding {
    let failed = facts.controllers.iter();
    let failed = failed.filter_map(|it| it.said.as_ref().err().cloned());
    let good = || {
        let all = facts.controllers.iter();
        let all = all.map(|it| it.place.clone());
        format!(
            "the controller answers at {}",
            all.collect::<Vec<_>>().join(", ")
        )
    };
    let bad = |count| {
        format!(
            "{count} of {} controllers do not answer",
            facts.controllers.len()
        )
    };
    let check = "controller-reachable";
    Finding::of(check, State::Error, failed.collect(), good, bad)
}

fn ready(facts: &Facts) -> Finding {
    let lacks = facts.said().filter_map(|it| it.status.lacks.clone());
    let good = || {
        let sources: BTreeSet<_> = facts.said().map(|it| it.status.source.as_str()).collect();
        let sources: Vec<_> = sources.into_iter().collect();
        format!(
            "the controller is ready, with objects of {}",
            sources.join(", ")
        )
    };
    let bad = |_| "the controller is not ready".to_owned();
    Finding::of("controller-ready", State::Error, lacks.collect(), good, bad)
}

fn version(facts: &Facts) -> Finding {
    let own = env!("CARGO_PKG_VERSION");
    let others = facts.said().map(|it| it.status.version.clone());
    let others: BTreeSet<_> = others.filter(|it| it != own).collect();
    let others = others
        .into_iter()
        .map(|it| format!("controller: {it}; weft: {own}"));
    let good = || format!("the controller is of this version, {own}");
    let bad = |_| "the controller is of another version than this tool".to_owned();
    Finding::of(
        "controller-version",
        State::Warning,
        others.collect(),
        good,
        bad,
    )
}

fn problems(facts: &Facts) -> Finding {
    let all = facts.said().flat_map(|it| &it.problems);
    // Several controllers find the same.
    let all: BTreeSet<String> = all.map(ToString::to_string).collect();
    let good = || "nothing is wrong with policies, routes and other objects".to_owned();
    let bad = |count| format!("{count} problems of policies, routes and other objects");
    let all = all.into_iter().collect();
    Finding::of("configuration-problems", State::Warning, all, good, bad)
}

fn left_to_other_meshes(facts: &Facts) -> Finding {
    let all = facts.said().flat_map(|it| &it.notices);
    let all: BTreeSet<String> = all.map(ToString::to_string).collect();
    let good = || "no pod that opts in is left to another mesh".to_owned();
    let bad = |count| format!("pods of {count} namespaces opt in and are left to another mesh");
    let all = all.into_iter().collect();
    Finding::of("other-meshes", State::Warning, all, good, bad)
}

fn issuer(check: &Check, facts: &Facts) -> Finding {
    let of = "issuer";
    let ends = facts.said().map(|it| it.status.issuer_not_after_ms);
    // The one that ends first; none has no issuer at all.
    let Some(ends) = ends.min().flatten() else {
        return Finding::new(of, State::Error, "there is no issuer: nothing is signed");
    };
    let state = by_life(check, ends);
    Finding::new(
        of,
        state,
        format!("the issuer's certificate ends {}", when(ends)),
    )
}

fn roots(check: &Check, facts: &Facts) -> Finding {
    let of = "trust-roots";
    if facts.said().any(|it| it.status.roots.is_empty()) {
        return Finding::new(of, State::Error, "no root is valid: nobody is believed");
    }
    let all: Vec<_> = facts.said().flat_map(|it| &it.status.roots).collect();
    let states = all.iter().map(|it| by_life(check, it.not_after_ms));
    let domains: BTreeSet<_> = facts
        .said()
        .map(|it| it.status.trust_domain.as_str())
        .collect();
    let domains: Vec<_> = domains.into_iter().collect();
    let fact = format!("roots of {} are valid", domains.join(", "));
    let details = all
        .iter()
        .map(|it| format!("{} ends {}", it.subject, when(it.not_after_ms)));
    let details: BTreeSet<String> = details.collect();
    match states.max().unwrap_or(State::Error) {
        State::Ok => Finding::new(of, State::Ok, fact),
        state => Finding {
            details: details.into_iter().collect(),
            ..Finding::new(of, state, "a root ends soon: add its successor before")
        },
    }
}

fn by_life(check: &Check, ends: u64) -> State {
    let left = Duration::from_millis(ends.saturating_sub(now_ms()));
    match (left, check.fail_on_expiry) {
        (left, _) if left.is_zero() => State::Error,
        (left, Some(least)) if left < least => State::Error,
        (left, _) if left < SOON => State::Warning,
        _ => State::Ok,
    }
}

fn clocks(facts: &Facts) -> Finding {
    let controllers = facts.controllers.iter();
    let controllers = controllers.filter_map(|it| {
        let said = it.said.as_ref().ok()?;
        Some((format!("the controller at {}", it.place), said.clock))
    });
    let agents = facts.answers();
    let agents = agents.map(|(status, said)| (format!("the agent of {}", status.node), said.clock));
    let off = controllers.chain(agents);
    let off = off.filter(|(_, clock)| clock.off_ms() > MAX_SKEW_MS);
    let off = off.map(|(who, clock)| {
        let seconds = clock.ahead_ms as f64 / 1000.0;
        format!("{who} is {seconds:+.1} s ahead of this machine")
    });
    let good = || format!("clocks are less than {} s apart", MAX_SKEW_MS / 1000);
    let bad = |count| format!("{count} clocks are more than {} s off", MAX_SKEW_MS / 1000);
    Finding::of("clocks", State::Error, off.collect(), good, bad)
}
