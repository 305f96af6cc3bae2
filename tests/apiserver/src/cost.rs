//! What the rules of a definition may cost, as API servers estimate it before they take the definition: with the longest lists
//! and texts that its schema allows, for each place where a rule is evaluated (Kubernetes, "Validation rules", "Resource use by
//! validation functions"; the units are those of CEL's own estimate).
//!
//! An upper bound of theirs: where they know of two operands which one is shorter, this takes the longer, and a presence test
//! counts. Functions that it does not know it refuses to estimate.

use kube_cel::cel::Program;
use kube_cel::cel::common::ast::{CallExpr, ComprehensionExpr, Expr, IdedExpr, LiteralValue};
use serde_json::Value;

/// A rule, and what it may cost at all places together where it is evaluated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cost {
    /// The field that has the rule, and the rule.
    pub rule: String,
    /// In CEL's units.
    pub units: u64,
}

/// The most that a rule may cost, and
pub const MOST_OF_RULE: u64 = 10_000_000;
/// that all rules of a definition may.
pub const MOST_OF_DEFINITION: u64 = 100_000_000;

/// The costs of all rules in a schema.
///
/// # Errors
/// A rule cannot be read, or calls what is not known here.
pub fn of_rules(schema: &Value) -> anyhow::Result<Vec<Cost>> {
    let mut costs = vec![];
    add_rules(schema, "", 1, &mut costs)?;
    Ok(costs)
}

fn add_rules(schema: &Value, path: &str, places: u64, costs: &mut Vec<Cost>) -> anyhow::Result<()> {
    let rules = schema["x-kubernetes-validations"].as_array();
    for rule in rules.into_iter().flatten() {
        let rule = rule["rule"].as_str().unwrap_or_default();
        let program = Program::compile(rule);
        let program = program.map_err(|error| anyhow::anyhow!("{path}: {rule}: {error}"))?;
        let own = Shape::Of(schema);
        let known = vec![
            ("self".to_owned(), own.clone()),
            ("oldSelf".to_owned(), own),
        ];
        let (units, _) = Scope(known).cost(program.expression())?;
        costs.push(Cost {
            rule: format!("{path}: {rule}"),
            units: units.saturating_mul(places),
        });
    }
    let properties = schema["properties"].as_object().into_iter().flatten();
    for (name, below) in properties {
        add_rules(below, &format!("{path}.{name}"), places, costs)?;
    }
    for (field, most) in [
        ("items", "maxItems"),
        ("additionalProperties", "maxProperties"),
    ] {
        if let Some(below) = schema.get(field).filter(|it| it.is_object()) {
            let places = places.saturating_mul(limit(schema, most));
            add_rules(below, &format!("{path}[]"), places, costs)?;
        }
    }
    Ok(())
}

/// What is known of a value.
#[derive(Clone, Debug)]
enum Shape<'a> {
    /// Its schema.
    Of(&'a Value),
    /// A list or text of so many items or bytes, at most; items are of this shape.
    Long(u64, Option<Box<Shape<'a>>>),
    /// A number or a truth.
    Short,
}

/// Names, the innermost last.
struct Scope<'a>(Vec<(String, Shape<'a>)>);

impl<'a> Shape<'a> {
    /// How many items or bytes it has.
    fn length(&self) -> u64 {
        let schema = match self {
            Self::Long(length, _) => return *length,
            Self::Short => return 1,
            Self::Of(schema) => schema,
        };
        match schema["type"].as_str() {
            Some("array") => limit(schema, "maxItems"),
            Some("object") if schema.get("additionalProperties").is_some() => {
                limit(schema, "maxProperties")
            }
            Some("string") => match schema["enum"].as_array() {
                Some(values) => {
                    let lengths = values.iter().filter_map(Value::as_str).map(str::len);
                    lengths.max().unwrap_or(0) as u64
                }
                // Of letters; it is bytes that count.
                None => limit(schema, "maxLength")
                    .saturating_mul(4)
                    .min(REQUEST_BYTES),
            },
            Some("object") => REQUEST_BYTES,
            _ if schema["x-kubernetes-int-or-string"] == true => limit(schema, "maxLength")
                .saturating_mul(4)
                .min(REQUEST_BYTES),
            _ => 1,
        }
    }

    fn items(&self) -> Self {
        match self {
            Self::Of(schema) if schema["type"] == "array" => Self::Of(&schema["items"]),
            // The keys of a map.
            Self::Of(_) => Self::Long(REQUEST_BYTES, None),
            Self::Long(_, Some(items)) => (**items).clone(),
            Self::Long(_, None) | Self::Short => Self::Short,
        }
    }

    fn field(&self, name: &str) -> Self {
        match self {
            Self::Of(schema) => match schema["properties"].get(name) {
                Some(field) => Self::Of(field),
                None => Self::Of(&schema["additionalProperties"]),
            },
            Self::Long(..) | Self::Short => Self::Short,
        }
    }
}

impl<'a> Scope<'a> {
    fn cost(&mut self, of: &IdedExpr) -> anyhow::Result<(u64, Shape<'a>)> {
        Ok(match &of.expr {
            Expr::Literal(LiteralValue::String(text)) => {
                (0, Shape::Long(text.inner().len() as u64, None))
            }
            Expr::Literal(_) => (0, Shape::Short),
            Expr::Ident(name) => {
                let found = self.0.iter().rev().find(|(known, _)| known == name);
                (1, found.map_or(Shape::Short, |(_, shape)| shape.clone()))
            }
            Expr::Select(select) => {
                let (cost, operand) = self.cost(&select.operand)?;
                let shape = match select.test {
                    true => Shape::Short,
                    false => operand.field(&select.field),
                };
                (cost.saturating_add(1), shape)
            }
            Expr::List(list) => {
                let mut cost = LIST;
                let mut longest = Shape::Short;
                for element in &list.elements {
                    let (own, shape) = self.cost(element)?;
                    cost = cost.saturating_add(own);
                    if shape.length() > longest.length() {
                        longest = shape;
                    }
                }
                let length = list.elements.len() as u64;
                (cost, Shape::Long(length, Some(Box::new(longest))))
            }
            Expr::Call(call) => (self.call(call)?, Shape::Short),
            Expr::Comprehension(it) => (self.comprehension(it)?, Shape::Short),
            other => anyhow::bail!("what does {other:?} cost?"),
        })
    }

    fn call(&mut self, call: &CallExpr) -> anyhow::Result<u64> {
        let operands = call.target.as_deref().into_iter().chain(&call.args);
        let mut costs = vec![];
        let mut shapes = vec![];
        for operand in operands {
            let (cost, shape) = self.cost(operand)?;
            costs.push(cost);
            shapes.push(shape);
        }
        let all = costs.iter().fold(0_u64, |sum, it| sum.saturating_add(*it));
        let longest = shapes.iter().map(Shape::length).max().unwrap_or(1);
        Ok(match call.func_name.as_str() {
            "_&&_" | "_||_" | "!_" | "@not_strictly_false" | "_+_" | "_-_" | "size" => {
                all.saturating_add(1)
            }
            // Of both ways the dearer.
            "_?_:_" => costs[0].saturating_add(costs[1].max(costs[2])),
            "_==_" | "_!=_" | "_<_" | "_<=_" | "_>_" | "_>=_" => {
                all.saturating_add(traversed(longest))
            }
            "@in" | "_in_" => {
                let [item, list] = &shapes[..] else {
                    anyhow::bail!("in needs two operands");
                };
                let compared = traversed(item.length().max(list.items().length()));
                all.saturating_add(list.length().saturating_mul(compared))
            }
            "startsWith" | "endsWith" | "contains" => all.saturating_add(traversed(longest)),
            other => anyhow::bail!("what does {other} cost?"),
        })
    }

    fn comprehension(&mut self, of: &ComprehensionExpr) -> anyhow::Result<u64> {
        let (range_cost, range) = self.cost(&of.iter_range)?;
        let (init, _) = self.cost(&of.accu_init)?;
        self.0.push((of.iter_var.clone(), range.items()));
        self.0.push((of.accu_var.clone(), Shape::Short));
        let (condition, step) = (self.cost(&of.loop_cond)?.0, self.cost(&of.loop_step)?.0);
        self.0.truncate(self.0.len() - 2);
        let (result, _) = self.cost(&of.result)?;
        let turns = range.length();
        let turns = turns.saturating_mul(condition.saturating_add(step));
        let sums = [init, turns, result].into_iter();
        Ok(sums.fold(range_cost, u64::saturating_add))
    }
}

/// What it costs to look at a text once.
fn traversed(bytes: u64) -> u64 {
    bytes.div_ceil(10).max(1)
}

/// A limit of a schema; what has none is as long as a request may be.
fn limit(schema: &Value, name: &str) -> u64 {
    schema[name].as_u64().unwrap_or(REQUEST_BYTES)
}

/// To make a list.
const LIST: u64 = 10;
const REQUEST_BYTES: u64 = 3 * 1024 * 1024;

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn units(schema: &Value) -> u64 {
        let costs = of_rules(schema).expect("readable");
        costs.iter().map(|it| it.units).sum()
    }

    #[test]
    fn longer_lists_and_texts_cost_more() {
        let schema = |items: Value, length: Value| {
            let mut text = json!({"type": "string"});
            text["maxLength"] = length;
            let mut names = json!({"type": "array", "items": text});
            names["maxItems"] = items;
            json!({"type": "object", "properties": {"names": names},
                "x-kubernetes-validations": [{"rule": "self.names.all(it, it != 'a')"}]})
        };
        let of = |items: u64, length: u64| units(&schema(json!(items), json!(length)));
        let small = of(10, 10);
        assert!((50..100).contains(&small), "{small}");
        assert!((9..=10).contains(&(of(100, 10) / small)));
        assert!(of(10, 1000) > 30 * small);
        // Without a limit it is as much as a request has room for.
        assert!(units(&schema(Value::Null, json!(10))) > MOST_OF_RULE);
    }

    #[test]
    fn a_rule_counts_once_for_each_place() {
        let rule = json!([{"rule": "self.a == 'b'"}]);
        let item = json!({"type": "object", "x-kubernetes-validations": rule,
            "properties": {"a": {"type": "string", "maxLength": 10}}});
        let alone = units(&item);
        let list = json!({"type": "array", "maxItems": 7, "items": item});
        assert_eq!(units(&list), 7 * alone);
        let map = json!({"type": "object", "maxProperties": 3, "additionalProperties": list});
        assert_eq!(units(&map), 3 * 7 * alone);
    }

    #[test]
    fn what_is_not_known_is_not_estimated() {
        let rule = json!([{"rule": "self.a.matches('b')"}]);
        let schema = json!({"type": "object", "x-kubernetes-validations": rule});
        assert!(of_rules(&schema).is_err());
    }
}
