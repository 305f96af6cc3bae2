//! From what an object's status says and what is to be said to what is written: pure.
//!
//! Of a route's status only the entries under the own name are the own ones; of a policy's, the conditions of the own
//! types. All else stays as it is. What says the same already is not written: neither a restart nor another leader
//! changes anything, and a time of transition is that of the transition.

use serde_json::{Value, json};

use super::{CONTROLLER_NAME, Condition, Content, ParentStatus, Status};

/// A route's status may have so many entries.
const MOST_PARENTS: usize = 32;

/// The status that is to be written in place of this one at this moment (RFC 3339); none: it says what it should.
pub(crate) fn changed(before: &Value, wanted: &Status, now: &str) -> Option<Value> {
    let generation = wanted.version.generation;
    match &wanted.content {
        Content::Parents(parents) => {
            let before = list(before, "parents");
            let after = parents_after(before, parents, generation, now);
            (after != before).then(|| json!({ "parents": after }))
        }
        Content::Conditions(conditions) => {
            let before = list(before, "conditions");
            let is_ours = |it: &&Value| conditions.iter().any(|own| it["type"] == own.kind);
            let others = before.iter().filter(|it| !is_ours(it)).cloned();
            let mut after: Vec<Value> = others.collect();
            after.extend(conditions_after(before, conditions, generation, now));
            (!same(before, &after)).then(|| json!({ "conditions": after }))
        }
    }
}

fn list<'a>(status: &'a Value, field: &str) -> &'a [Value] {
    let list = status.get(field).and_then(Value::as_array);
    list.map_or(&[], Vec::as_slice)
}

/// Whether two lists have the same members, in whatever order.
fn same(one: &[Value], other: &[Value]) -> bool {
    one.len() == other.len() && one.iter().all(|it| other.contains(it))
}

fn parents_after(
    before: &[Value],
    wanted: &[ParentStatus],
    generation: Option<i64>,
    now: &str,
) -> Vec<Value> {
    let mut wanted: Vec<(Value, &ParentStatus)> =
        wanted.iter().map(|it| (json!(it.parent_ref), it)).collect();
    let mut after = vec![];
    for entry in before {
        if entry["controllerName"] != CONTROLLER_NAME {
            after.push(entry.clone());
            continue;
        }
        let found = wanted
            .iter()
            .position(|(parent, _)| entry["parentRef"] == *parent);
        if let Some(found) = found {
            let (parent, wanted) = wanted.remove(found);
            let conditions = list(entry, "conditions");
            let conditions = conditions_after(conditions, &wanted.conditions, generation, now);
            after.push(entry_of(&parent, &conditions));
        }
    }
    for (parent, wanted) in wanted {
        if after.len() < MOST_PARENTS {
            let conditions = conditions_after(&[], &wanted.conditions, generation, now);
            after.push(entry_of(&parent, &conditions));
        }
    }
    after
}

fn entry_of(parent: &Value, conditions: &[Value]) -> Value {
    json!({"parentRef": parent, "controllerName": CONTROLLER_NAME, "conditions": conditions})
}

fn conditions_after(
    before: &[Value],
    wanted: &[Condition],
    generation: Option<i64>,
    now: &str,
) -> Vec<Value> {
    let condition = |wanted: &Condition| {
        let mut condition = json!(wanted);
        if let Some(generation) = generation {
            condition["observedGeneration"] = json!(generation);
        }
        let since = before
            .iter()
            .find(|it| it["type"] == wanted.kind && it["status"] == condition["status"]);
        let since = since.and_then(|it| it["lastTransitionTime"].as_str());
        condition["lastTransitionTime"] = json!(since.unwrap_or(now));
        condition
    };
    wanted.iter().map(condition).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objects::routes::ParentRef;
    use crate::statuses::Version;

    const EARLIER: &str = "2026-01-01T00:00:00Z";
    const NOW: &str = "2026-02-02T00:00:00Z";

    fn accepted(status: bool) -> Condition {
        Condition {
            kind: "Accepted",
            status,
            reason: "Why",
            message: String::new(),
        }
    }

    fn parent(name: &str, status: bool) -> ParentStatus {
        ParentStatus {
            parent_ref: ParentRef {
                name: name.to_owned(),
                ..ParentRef::default()
            },
            controller_name: CONTROLLER_NAME,
            conditions: vec![accepted(status)],
        }
    }

    fn status(content: Content) -> Status {
        Status {
            version: Version {
                uid: Some("one".to_owned()),
                generation: Some(2),
            },
            content,
        }
    }

    fn written(status: &str, generation: i64, at: &str) -> Value {
        json!({"type": "Accepted", "status": status, "reason": "Why", "message": "",
            "observedGeneration": generation, "lastTransitionTime": at})
    }

    fn entry(name: &str, controller: &str, condition: &Value) -> Value {
        json!({"parentRef": {"name": name}, "controllerName": controller,
            "conditions": [condition]})
    }

    #[test]
    fn only_own_entries_of_routes_change() {
        let ours = |name, condition: &Value| entry(name, CONTROLLER_NAME, condition);
        let foreign = entry("web", "example.com/other", &written("False", 1, EARLIER));
        let good = written("True", 2, EARLIER);
        let new = written("True", 2, NOW);
        let parents = |parents: &[Value]| json!({ "parents": parents });
        for (before, wanted, expected) in [
            (json!(null), vec![], None),
            (parents(std::slice::from_ref(&foreign)), vec![], None),
            (
                json!(null),
                vec![parent("web", true)],
                Some(parents(&[ours("web", &new)])),
            ),
            // It is said already.
            (
                parents(&[foreign.clone(), ours("web", &good)]),
                vec![parent("web", true)],
                None,
            ),
            // Of an older version: the time of transition stays.
            (
                parents(&[ours("web", &written("True", 1, EARLIER)), foreign.clone()]),
                vec![parent("web", true)],
                Some(parents(&[ours("web", &good), foreign.clone()])),
            ),
            // It is not so any more.
            (
                parents(&[ours("web", &good), foreign.clone()]),
                vec![parent("web", false)],
                Some(parents(&[
                    ours("web", &written("False", 2, NOW)),
                    foreign.clone(),
                ])),
            ),
            // Another parent.
            (
                parents(&[ours("web", &good), foreign.clone()]),
                vec![parent("cart", true)],
                Some(parents(&[foreign.clone(), ours("cart", &new)])),
            ),
            // No parent of ours any more.
            (
                parents(&[ours("web", &good), foreign.clone()]),
                vec![],
                Some(parents(&[foreign])),
            ),
            // What is no status at all.
            (
                json!({"parents": "none"}),
                vec![parent("web", true)],
                Some(parents(&[ours("web", &new)])),
            ),
        ] {
            let changed = changed(&before, &status(Content::Parents(wanted)), NOW);
            assert_eq!(changed, expected, "{before}");
        }
    }

    #[test]
    fn only_own_conditions_of_policies_change() {
        let foreign = json!({"type": "Audited", "status": "True"});
        let good = written("True", 2, EARLIER);
        let conditions = |conditions: &[&Value]| json!({ "conditions": conditions });
        let new = written("True", 2, NOW);
        for (before, expected) in [
            (json!({}), Some(conditions(&[&new]))),
            (conditions(&[&good, &foreign]), None),
            (conditions(&[&foreign]), Some(conditions(&[&foreign, &new]))),
            (
                conditions(&[&written("False", 2, EARLIER), &foreign]),
                Some(conditions(&[&foreign, &new])),
            ),
            (
                conditions(&[&written("True", 1, EARLIER)]),
                Some(conditions(&[&good])),
            ),
        ] {
            let wanted = status(Content::Conditions(vec![accepted(true)]));
            assert_eq!(changed(&before, &wanted, NOW), expected, "{before}");
        }
    }

    #[test]
    fn a_route_has_no_more_entries_than_it_may() {
        let names = (0..40).map(|it| parent(&format!("p{it}"), true));
        let wanted = status(Content::Parents(names.collect()));
        let after = changed(&json!(null), &wanted, NOW).expect("changed");
        assert_eq!(list(&after, "parents").len(), MOST_PARENTS);
        assert_eq!(changed(&after, &wanted, NOW), None);
    }
}
