//! Label selectors, checked once when their object arrives.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;

use crate::objects::Fault;

/// Labels of an object.
pub(super) type Labels = BTreeMap<String, String>;

/// A label selector: all of its requirements must hold. Without any it selects everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Selector(Vec<Requirement>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Requirement {
    In(String, Vec<String>),
    NotIn(String, Vec<String>),
    Exists(String),
    DoesNotExist(String),
}

impl Selector {
    /// Checks a selector as written.
    ///
    /// # Errors
    /// An expression that means nothing; `field` is the path of the selector.
    pub(super) fn check(field: &str, written: &LabelSelector) -> Result<Self, Fault> {
        let labels = written.match_labels.iter().flatten();
        let mut requirements: Vec<_> = labels
            .map(|(key, value)| Requirement::In(key.clone(), vec![value.clone()]))
            .collect();
        for (index, expression) in written.match_expressions.iter().flatten().enumerate() {
            let field = format!("{field}.matchExpressions[{index}]");
            let key = expression.key.clone();
            if key.is_empty() {
                return Err(Fault::new(format!("{field}.key"), "empty"));
            }
            let values = expression.values.clone().unwrap_or_default();
            let with_values = matches!(expression.operator.as_str(), "In" | "NotIn");
            if with_values == values.is_empty() {
                let reason = "In and NotIn need values, Exists and DoesNotExist have none";
                return Err(Fault::new(format!("{field}.values"), reason));
            }
            requirements.push(match expression.operator.as_str() {
                "In" => Requirement::In(key, values),
                "NotIn" => Requirement::NotIn(key, values),
                "Exists" => Requirement::Exists(key),
                "DoesNotExist" => Requirement::DoesNotExist(key),
                other => {
                    let reason = format!("{other:?} is none of In, NotIn, Exists and DoesNotExist");
                    return Err(Fault::new(format!("{field}.operator"), reason));
                }
            });
        }
        Ok(Self(requirements))
    }

    /// Whether labels are selected.
    pub(super) fn selects(&self, labels: &Labels) -> bool {
        self.selects_with(|key| labels.get(key).map(String::as_str))
    }

    /// The same, of whatever says which value a label has.
    pub(super) fn selects_with<'a>(&self, value: impl Fn(&str) -> Option<&'a str>) -> bool {
        let is_one = |values: &[String], it: &str| values.iter().any(|value| value == it);
        self.0.iter().all(|requirement| match requirement {
            Requirement::In(key, values) => value(key).is_some_and(|it| is_one(values, it)),
            Requirement::NotIn(key, values) => value(key).is_none_or(|it| !is_one(values, it)),
            Requirement::Exists(key) => value(key).is_some(),
            Requirement::DoesNotExist(key) => value(key).is_none(),
        })
    }

    /// How many values it asks for, and labels, of those without.
    pub(super) fn terms(&self) -> usize {
        let terms = self.0.iter().map(|it| match it {
            Requirement::In(_, values) | Requirement::NotIn(_, values) => values.len(),
            Requirement::Exists(_) | Requirement::DoesNotExist(_) => 1,
        });
        terms.sum()
    }

    /// Whether all labels are selected, and none, too.
    pub(super) fn selects_all(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn selectors_select() {
        let labels: Labels = [("app", "web"), ("tier", "front")]
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .into();
        for (written, expected) in [
            (json!({}), true),
            (json!({"matchLabels": {"app": "web"}}), true),
            (
                json!({"matchLabels": {"app": "web", "tier": "back"}}),
                false,
            ),
            (json!({"matchLabels": {"absent": "web"}}), false),
            (
                json!({"matchExpressions": [{"key": "app", "operator": "In", "values": ["api", "web"]}]}),
                true,
            ),
            (
                json!({"matchExpressions": [{"key": "app", "operator": "NotIn", "values": ["web"]}]}),
                false,
            ),
            (
                json!({"matchExpressions": [{"key": "absent", "operator": "NotIn", "values": ["web"]}]}),
                true,
            ),
            (
                json!({"matchExpressions": [{"key": "app", "operator": "Exists"}]}),
                true,
            ),
            (
                json!({"matchExpressions": [{"key": "app", "operator": "DoesNotExist"}]}),
                false,
            ),
            (
                json!({"matchExpressions": [{"key": "absent", "operator": "DoesNotExist"}]}),
                true,
            ),
            (
                json!({"matchLabels": {"app": "web"},
                    "matchExpressions": [{"key": "tier", "operator": "In", "values": ["back"]}]}),
                false,
            ),
        ] {
            let selector = Selector::check(
                "spec",
                &serde_json::from_value(written.clone()).expect("typed"),
            );
            assert_eq!(
                selector.expect("valid").selects(&labels),
                expected,
                "{written}"
            );
        }
    }

    #[test]
    fn meaningless_expressions_are_refused() {
        for (expression, field) in [
            (
                json!({"key": "a", "operator": "Is", "values": ["b"]}),
                "s.matchExpressions[0].values",
            ),
            (
                json!({"key": "a", "operator": "Is"}),
                "s.matchExpressions[0].operator",
            ),
            (
                json!({"key": "a", "operator": "In"}),
                "s.matchExpressions[0].values",
            ),
            (
                json!({"key": "a", "operator": "Exists", "values": ["b"]}),
                "s.matchExpressions[0].values",
            ),
            (
                json!({"key": "", "operator": "Exists"}),
                "s.matchExpressions[0].key",
            ),
        ] {
            let written = serde_json::from_value(json!({"matchExpressions": [expression]}));
            let fault = Selector::check("s", &written.expect("typed")).expect_err(field);
            assert_eq!(fault.field, field);
        }
    }
}
