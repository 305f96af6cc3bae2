//! Whether the agent is ready, as a pure function of what it has.
//!
//! Ready means: all types received once, all pods of the node enrolled, certificates held. An agent
//! whose controller is away, or whose certificates are late, still serves: that is a warning.

use std::time::Duration;

use serde::Serialize;

use crate::bpf::Standing;
use crate::identity::{CertificateState, CertificateStatus};

/// What readiness depends on.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// What this agent is to the node's pods.
    pub standing: Standing,
    /// What is wrong with the kernel programs.
    pub hooks: Option<String>,
    /// Everything was received once.
    pub complete: bool,
    /// A control stream is open.
    pub connected: bool,
    /// How old what is known is; `None` as long as nothing complete is.
    pub knowledge_age: Option<Duration>,
    /// Why the control stream ended last.
    pub last_error: Option<String>,
    /// Resources that are rejected now.
    pub rejected: usize,
    /// Pods of the node that are enrolled.
    pub enrolled: usize,
    /// Pods of the node that are not, with the reason where one is known.
    pub waiting: Vec<(String, Option<String>)>,
    /// Those that are not and for which nobody has to do anything here: they have not started, or cannot be meshed.
    pub set_aside: Vec<(String, Option<String>)>,
    /// The certificates of the node's pods.
    pub certificates: Vec<CertificateStatus>,
    /// The time, since 1970.
    pub now: Duration,
}

/// The answer of `/ready`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Readiness {
    /// The process that answers: during an upgrade there are two agents.
    pub pid: u32,
    /// Whether it is.
    pub ready: bool,
    /// Why it is not.
    pub reasons: Vec<String>,
    /// What will hurt if nobody looks.
    pub warnings: Vec<String>,
    /// Whether a control stream is open.
    pub connected: bool,
    /// How old what the agent knows is, in seconds: zero while a control stream keeps it current.
    pub knowledge_age_seconds: Option<f64>,
    /// Pods enrolled.
    pub pods: usize,
    /// Certificates held.
    pub certificates: usize,
    /// What is wrong with the kernel programs, which are looked at again and again; none: each is attached exactly once.
    pub hooks: Option<String>,
    /// The agent's clock, in milliseconds since 1970.
    pub now_ms: u64,
}

/// Decides.
pub fn readiness(facts: &Facts) -> Readiness {
    let mut reasons = Vec::new();
    let mut warnings = Vec::new();
    reasons.extend(facts.hooks.clone());
    let because = |error: &Option<String>| {
        error
            .as_ref()
            .map_or(String::new(), |error| format!(": {error}"))
    };
    match facts.standing {
        Standing::Owner => {}
        Standing::Starting => {
            reasons.push("it has not taken over the node's pods yet".to_owned());
        }
        Standing::Superseded { .. } => {
            reasons.push("a newer agent has taken over the node's pods".to_owned());
        }
    }
    if !facts.complete {
        let error = because(&facts.last_error);
        reasons.push(format!("not everything was received yet{error}"));
    } else if !facts.connected {
        let seconds = facts.knowledge_age.unwrap_or_default().as_secs();
        let error = because(&facts.last_error);
        warnings.push(format!(
            "no control stream: what is known is {seconds} s old{error}"
        ));
    }
    if facts.rejected > 0 {
        let rejected = facts.rejected;
        warnings.push(format!(
            "{rejected} resources were rejected; see config_dump"
        ));
    }
    for (pod, reason) in &facts.waiting {
        reasons.push(format!("pod {pod} is not enrolled{}", because(reason)));
    }
    for (pod, reason) in &facts.set_aside {
        warnings.push(format!("pod {pod} is not enrolled{}", because(reason)));
    }
    let mut held = 0;
    for certificate in &facts.certificates {
        let identity = &certificate.identity;
        let error = because(&certificate.last_error);
        match certificate.state {
            CertificateState::Held => held += 1,
            CertificateState::InDanger => {
                held += 1;
                warnings.push(format!("the certificate of {identity} is overdue{error}"));
            }
            CertificateState::Missing => {
                reasons.push(format!("{identity} has no certificate yet{error}"));
            }
            CertificateState::Expired => {
                reasons.push(format!("the certificate of {identity} has expired{error}"));
            }
        }
    }
    Readiness {
        pid: std::process::id(),
        ready: reasons.is_empty(),
        reasons,
        warnings,
        connected: facts.connected,
        knowledge_age_seconds: facts.knowledge_age.map(|it| it.as_secs_f64()),
        pods: facts.enrolled,
        certificates: held,
        hooks: facts.hooks.clone(),
        now_ms: u64::try_from(facts.now.as_millis()).unwrap_or(u64::MAX),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn certificate(state: CertificateState) -> CertificateStatus {
        CertificateStatus {
            identity: "spiffe://cluster.local/ns/shop/sa/web"
                .parse()
                .expect("valid"),
            serial: None,
            not_before: None,
            not_after: None,
            state,
            failures: 0,
            last_error: None,
        }
    }

    fn good() -> Facts {
        Facts {
            standing: Standing::Owner,
            complete: true,
            connected: true,
            knowledge_age: Some(Duration::ZERO),
            enrolled: 1,
            certificates: vec![certificate(CertificateState::Held)],
            ..Facts::default()
        }
    }

    #[test]
    fn what_is_missing_is_told() {
        let with = |change: fn(&mut Facts)| {
            let mut facts = good();
            change(&mut facts);
            let it = readiness(&facts);
            (it.ready, it.reasons.len(), it.warnings.len())
        };
        assert_eq!(with(|_| {}), (true, 0, 0));
        assert_eq!(with(|it| it.complete = false), (false, 1, 0));
        let broken = |it: &mut Facts| it.hooks = Some("weft_connect4 is not attached".to_owned());
        assert_eq!(with(broken), (false, 1, 0));
        assert_eq!(with(|it| it.standing = Standing::Starting), (false, 1, 0));
        assert_eq!(
            with(|it| it.standing = Standing::Superseded { settled: false }),
            (false, 1, 0)
        );
        assert_eq!(with(|it| it.connected = false), (true, 0, 1));
        assert_eq!(with(|it| it.rejected = 2), (true, 0, 1));
        let waiting = |it: &mut Facts| it.waiting = vec![("shop/web".to_owned(), None)];
        assert_eq!(with(waiting), (false, 1, 0));
        let starting = |it: &mut Facts| it.set_aside = vec![("shop/web".to_owned(), None)];
        assert_eq!(with(starting), (true, 0, 1));
        for (state, expected) in [
            (CertificateState::Held, (true, 0, 0)),
            (CertificateState::InDanger, (true, 0, 1)),
            (CertificateState::Missing, (false, 1, 0)),
            (CertificateState::Expired, (false, 1, 0)),
        ] {
            let mut facts = good();
            facts.certificates = vec![certificate(state)];
            let it = readiness(&facts);
            assert_eq!((it.ready, it.reasons.len(), it.warnings.len()), expected);
        }
        assert!(!readiness(&Facts::default()).ready);
    }
}
