//! What is said about a policy, from what is wrong with it: pure.

use std::collections::BTreeMap;

use super::{Condition, ParentStatus, Rejection};
use crate::objects::{Fault, ObjectKind};
use crate::problems::Facet;

/// What is known about a policy.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct PolicyStatus(BTreeMap<Facet, Said>);

#[derive(Clone, Debug, PartialEq)]
struct Said {
    faults: String,
    effect: String,
}

impl PolicyStatus {
    /// Replaces what is wrong in one respect; whether that is a change.
    pub(super) fn set(&mut self, facet: Facet, faults: &[Fault], effect: &str) -> bool {
        let said = (!faults.is_empty()).then(|| Said {
            faults: listed(faults),
            effect: effect.to_owned(),
        });
        let before = match said.clone() {
            Some(said) => self.0.insert(facet, said),
            None => self.0.remove(&facet),
        };
        before != said
    }

    /// Whether nothing is wrong with it.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The conditions of a policy of this kind.
    pub(super) fn conditions(&self, kind: ObjectKind, rejected: &[Rejection]) -> Vec<Condition> {
        let wrong = |facet| self.wrong(facet);
        let invalid = wrong(Facet::Content);
        let unaccepted = [
            (Facet::Content, "Invalid"),
            (Facet::Target, "TargetNotFound"),
            (Facet::Conflict, "Conflicted"),
        ];
        let accepted = match self.first_of(&unaccepted) {
            Some((reason, message)) => not("Accepted", reason, &message),
            None => holds("Accepted", &wrong(Facet::Part).unwrap_or_default()),
        };
        // This version of it is what holds, or not.
        let programmed = match (&invalid, wrong(Facet::Size)) {
            (Some(_), _) => {
                let effect = &self.0[&Facet::Content].effect;
                not("Programmed", "Invalid", effect)
            }
            (None, Some(reason)) => not("Programmed", "TooLarge", &reason),
            (None, None) => match self.untold(kind) {
                Some((reason, message)) => not("Programmed", reason, &message),
                None => programmed_by(rejected.first()),
            },
        };
        let mut conditions = vec![accepted, programmed];
        if refers(kind) {
            let missing = [Facet::Target, Facet::Reference].into_iter();
            let missing: Vec<String> = missing.filter_map(wrong).collect();
            conditions.push(match missing.is_empty() {
                true => holds("ResolvedRefs", ""),
                false => not("ResolvedRefs", "RefNotFound", &missing.join("; ")),
            });
        }
        conditions
    }

    /// Why no agent is told of a policy that is part of what others are about, and of nothing now: the reason, in one
    /// word and for people.
    fn untold(&self, kind: ObjectKind) -> Option<(&'static str, String)> {
        let facets: &[_] = match kind {
            ObjectKind::AuthorizationPolicy(_) => &[(Facet::Target, "TargetNotFound")],
            ObjectKind::HttpLocalRateLimitPolicy(_) => &[
                (Facet::Target, "TargetNotFound"),
                (Facet::Conflict, "Conflicted"),
            ],
            ObjectKind::MeshTlsAuthentication(_) | ObjectKind::NetworkAuthentication(_) => {
                &[(Facet::Unused, "Unused")]
            }
            _ => &[],
        };
        self.first_of(facets)
    }

    /// Of some respects, each with a reason in one word, the first in which something is wrong: the reason, and for people.
    fn first_of(&self, facets: &[(Facet, &'static str)]) -> Option<(&'static str, String)> {
        let mut facets = facets.iter();
        facets.find_map(|(facet, reason)| Some((*reason, self.wrong(*facet)?)))
    }

    /// What is wrong in one respect, and what holds meanwhile, for people.
    fn wrong(&self, facet: Facet) -> Option<String> {
        let said = self.0.get(&facet)?;
        Some(format!("{}; {}", said.faults, said.effect))
    }
}

/// Whether it is followed where references of policies of a kind lead.
fn refers(kind: ObjectKind) -> bool {
    matches!(
        kind,
        ObjectKind::AuthorizationPolicy(_) | ObjectKind::HttpLocalRateLimitPolicy(_)
    )
}

/// A route at a parent, with whether this version of it is in force there.
pub(super) fn programmed(mut parent: ParentStatus, rejected: Option<&Rejection>) -> ParentStatus {
    let accepted = parent.conditions.iter().find(|it| it.kind == "Accepted");
    let programmed = match accepted {
        Some(it) if !it.status => not("Programmed", it.reason, &it.message),
        _ => programmed_by(rejected),
    };
    parent.conditions.push(programmed);
    parent
}

/// Whether what is made of it is in force where it was told.
fn programmed_by(rejected: Option<&Rejection>) -> Condition {
    match rejected {
        Some(it) => not(
            "Programmed",
            "Rejected",
            &format!("{}; {REJECTED}", it.text),
        ),
        None => holds("Programmed", ""),
    }
}

/// What holds meanwhile.
const REJECTED: &str = "these keep what they had before, and refuse where they had nothing";

/// Faults, and what holds meanwhile, for people.
pub(super) fn told(faults: &[Fault], effect: &str) -> String {
    format!("{}; {effect}", listed(faults))
}

fn listed(faults: &[Fault]) -> String {
    let shown = faults.iter().take(SHOWN_FAULTS).map(|fault| {
        let text = match fault.field.is_empty() {
            true => fault.reason.clone(),
            false => fault.to_string(),
        };
        text.chars().take(LONGEST_FAULT).collect::<String>()
    });
    let shown: Vec<String> = shown.collect();
    let more = match faults.len().saturating_sub(SHOWN_FAULTS) {
        0 => String::new(),
        more => format!("; and {more} more"),
    };
    format!("{}{more}", shown.join("; "))
}

fn holds(kind: &'static str, message: &str) -> Condition {
    Condition {
        kind,
        status: true,
        reason: kind,
        message: message.to_owned(),
    }
}

fn not(kind: &'static str, reason: &'static str, message: &str) -> Condition {
    Condition {
        kind,
        status: false,
        reason,
        message: message.to_owned(),
    }
}

/// A condition may say 32 KiB.
const SHOWN_FAULTS: usize = 8;
const LONGEST_FAULT: usize = 1024;

#[cfg(test)]
mod tests {
    use weft_core::PolicyGroup;

    use super::*;

    #[test]
    fn conditions_say_what_is_wrong_and_what_holds() {
        let authorization = ObjectKind::AuthorizationPolicy(PolicyGroup::Weft);
        let server = ObjectKind::Server(PolicyGroup::Weft);
        let limit = ObjectKind::HttpLocalRateLimitPolicy(PolicyGroup::Weft);
        let mesh_tls = ObjectKind::MeshTlsAuthentication(PolicyGroup::Weft);
        let network = ObjectKind::NetworkAuthentication(PolicyGroup::Weft);
        for (kind, wrong, expected) in [
            (server, None, "+Accepted +Programmed"),
            (
                server,
                Some(Facet::Content),
                "-Accepted=Invalid: spec.a: bad; kept -Programmed=Invalid: kept",
            ),
            (
                server,
                Some(Facet::Conflict),
                "-Accepted=Conflicted: spec.a: bad; kept +Programmed",
            ),
            (
                server,
                Some(Facet::Size),
                "+Accepted -Programmed=TooLarge: spec.a: bad; kept",
            ),
            (
                server,
                Some(Facet::Part),
                "+Accepted: spec.a: bad; kept +Programmed",
            ),
            (
                authorization,
                Some(Facet::Reference),
                "+Accepted +Programmed -ResolvedRefs=RefNotFound: spec.a: bad; kept",
            ),
            (
                authorization,
                Some(Facet::Target),
                "-Accepted=TargetNotFound: spec.a: bad; kept -Programmed=TargetNotFound: spec.a: bad; kept \
                 -ResolvedRefs=RefNotFound: spec.a: bad; kept",
            ),
            (authorization, None, "+Accepted +Programmed +ResolvedRefs"),
            (limit, None, "+Accepted +Programmed +ResolvedRefs"),
            (
                limit,
                Some(Facet::Target),
                "-Accepted=TargetNotFound: spec.a: bad; kept -Programmed=TargetNotFound: spec.a: bad; kept \
                 -ResolvedRefs=RefNotFound: spec.a: bad; kept",
            ),
            (
                limit,
                Some(Facet::Conflict),
                "-Accepted=Conflicted: spec.a: bad; kept -Programmed=Conflicted: spec.a: bad; kept +ResolvedRefs",
            ),
            (mesh_tls, None, "+Accepted +Programmed"),
            (
                mesh_tls,
                Some(Facet::Unused),
                "+Accepted -Programmed=Unused: spec.a: bad; kept",
            ),
            (
                network,
                Some(Facet::Unused),
                "+Accepted -Programmed=Unused: spec.a: bad; kept",
            ),
        ] {
            let mut policy = PolicyStatus::default();
            if let Some(facet) = wrong {
                assert!(policy.set(facet, &[Fault::new("spec.a", "bad")], "kept"));
                assert!(!policy.set(facet, &[Fault::new("spec.a", "bad")], "kept"));
            }
            let shown = |it: Condition| {
                let sign = if it.status { "+" } else { "-" };
                let reason = match it.reason == it.kind {
                    true => String::new(),
                    false => format!("={}", it.reason),
                };
                let message = match it.message.as_str() {
                    "" => String::new(),
                    message => format!(": {message}"),
                };
                format!("{sign}{}{reason}{message}", it.kind)
            };
            let conditions = policy.conditions(kind, &[]).into_iter().map(shown);
            let conditions: Vec<String> = conditions.collect();
            assert_eq!(conditions.join(" "), expected, "{kind:?} {wrong:?}");
        }
    }
}
