//! Whom policies of Calico select: its selector expressions (`libcalico-go/lib/selector`).
//!
//! What a label's value is may be unknown, as those of service accounts are. Then an expression may hold, and its policy
//! is taken to select.

use std::collections::BTreeSet;

use serde_json::Value;
use weft_core::Name;

use super::{CniRecord, few_terms};
use crate::objects::Fault;

/// Whom a policy selects: pods for which all of these hold.
#[derive(Clone, Debug, PartialEq)]
pub(in crate::index) struct Selection {
    /// Over the labels of pods.
    pub(super) pods: Expression,
    /// Over those of namespaces.
    pub(super) namespaces: Expression,
    /// Over those of service accounts.
    pub(super) accounts: Expression,
    /// The tier that it is in.
    tier: String,
}

/// A selector expression.
#[derive(Clone, Debug, PartialEq)]
pub(in crate::index) enum Expression {
    All,
    /// What belongs to no namespace.
    Global,
    Has(String),
    In(String, Vec<String>),
    NotIn(String, Vec<String>),
    Contains(String, String),
    StartsWith(String, String),
    EndsWith(String, String),
    Not(Box<Expression>),
    And(Vec<Expression>),
    Or(Vec<Expression>),
}

/// A label of something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Label<'a> {
    /// It has the label, with this value; none: it does not.
    Is(Option<&'a str>),
    /// Nobody knows.
    Unknown,
}

/// What Calico gives pods besides their own labels, as labels: their namespace,
pub(super) const NAMESPACE: &str = "projectcalico.org/namespace";
/// their service account,
pub(super) const ACCOUNT: &str = "projectcalico.org/serviceaccount";
/// and `k8s`;
pub(super) const ORCHESTRATOR: &str = "projectcalico.org/orchestrator";
/// and with these before them, the labels of their namespace
pub(super) const OF_NAMESPACE: &str = "pcns.";
/// and of their service account.
pub(super) const OF_ACCOUNT: &str = "pcsa.";
/// What it gives those two: their name.
pub(super) const NAME: &str = "projectcalico.org/name";

impl Selection {
    /// Reads `spec`.
    ///
    /// # Errors
    /// A selector cannot be read.
    pub(super) fn read(spec: &Value, is_namespaced: bool) -> Result<Self, Fault> {
        if !spec.is_object() {
            return Err(Fault::new("spec", "missing, or no object"));
        }
        let of = |name: &str| {
            let read = match spec.get(name) {
                None | Some(Value::Null) => Ok(Expression::All),
                Some(Value::String(text)) => Expression::parse(text),
                Some(_) => Err("not a text".to_owned()),
            };
            read.map_err(|reason| Fault::new(format!("spec.{name}"), reason))
        };
        let read = Self {
            pods: of("selector")?,
            namespaces: match is_namespaced {
                // It has none.
                true => Expression::All,
                false => of("namespaceSelector")?,
            },
            accounts: of("serviceAccountSelector")?,
            tier: match spec.get("tier").and_then(Value::as_str) {
                None | Some("") => DEFAULT_TIER.to_owned(),
                Some(tier) => tier.to_owned(),
            },
        };
        let parts = [&read.pods, &read.namespaces, &read.accounts];
        let asking = parts.into_iter().filter(|it| **it != Expression::All);
        few_terms(asking.map(Expression::terms).sum())?;
        Ok(read)
    }
}

/// The tier of policies that say none.
const DEFAULT_TIER: &str = "default";

/// What the same policy may be called where it is kept, or shown, of one that is shown, or kept: with its tier before its
/// name or without.
pub(super) fn names(name: &Name, of: &CniRecord) -> BTreeSet<Name> {
    let tier = match of {
        CniRecord::Calico(selection) => &selection.tier,
        _ => DEFAULT_TIER,
    };
    let tier = format!("{tier}.");
    let without = name.as_str().strip_prefix(&tier).map(str::to_owned);
    let with = format!("{tier}{name}");
    let others = [Some(with), without].into_iter().flatten();
    // What would be too long is nobody's name.
    let others = others.filter_map(|it| it.parse().ok());
    others.chain([name.clone()]).collect()
}

impl Expression {
    /// Reads an expression; an empty one is for all.
    ///
    /// # Errors
    /// It is none, and where it stops being one.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let mut rest = Rest { text, depth: 0 };
        rest.skip();
        if rest.text.is_empty() {
            return Ok(Self::All);
        }
        let read = rest.either()?;
        match rest.text.is_empty() {
            true => Ok(read),
            false => Err(rest.expected("an operator")),
        }
    }

    /// How many values it asks for, and terms without.
    fn terms(&self) -> usize {
        match self {
            Self::In(_, values) | Self::NotIn(_, values) => values.len().max(1),
            Self::Not(inner) => inner.terms(),
            Self::And(parts) | Self::Or(parts) => parts.iter().map(Self::terms).sum(),
            _ => 1,
        }
    }

    /// Whether it holds. None: nobody knows.
    pub(super) fn holds<'a>(&self, label: &impl Fn(&str) -> Label<'a>) -> Option<bool> {
        let with = |name: &str, holds: &dyn Fn(Option<&str>) -> bool| match label(name) {
            Label::Is(value) => Some(holds(value)),
            Label::Unknown => None,
        };
        let is_one =
            |it: Option<&str>, of: &[String]| it.is_some_and(|it| of.iter().any(|one| one == it));
        match self {
            Self::All => Some(true),
            Self::Global => Some(false),
            Self::Has(name) => with(name, &|it| it.is_some()),
            Self::In(name, values) => with(name, &|it| is_one(it, values)),
            Self::NotIn(name, values) => with(name, &|it| !is_one(it, values)),
            Self::Contains(name, part) => with(name, &|it| it.is_some_and(|it| it.contains(part))),
            Self::StartsWith(name, part) => {
                with(name, &|it| it.is_some_and(|it| it.starts_with(part)))
            }
            Self::EndsWith(name, part) => with(name, &|it| it.is_some_and(|it| it.ends_with(part))),
            Self::Not(inner) => inner.holds(label).map(|it| !it),
            Self::And(parts) => decided(parts.iter().map(|it| it.holds(label)), false),
            Self::Or(parts) => decided(parts.iter().map(|it| it.holds(label)), true),
        }
    }
}

/// What one part decides alone, if any does; else the opposite, if all are known.
fn decided(parts: impl Iterator<Item = Option<bool>>, alone: bool) -> Option<bool> {
    let mut all = Some(!alone);
    for part in parts {
        match part {
            Some(it) if it == alone => return Some(alone),
            Some(_) => {}
            None => all = None,
        }
    }
    all
}

/// What is still to be read, without space before it.
struct Rest<'a> {
    text: &'a str,
    depth: usize,
}

impl<'a> Rest<'a> {
    fn either(&mut self) -> Result<Expression, String> {
        let mut parts = vec![self.both()?];
        while self.take("||") {
            parts.push(self.both()?);
        }
        Ok(one_or(parts, Expression::Or))
    }

    fn both(&mut self) -> Result<Expression, String> {
        let mut parts = vec![self.operand()?];
        while self.take("&&") {
            parts.push(self.operand()?);
        }
        Ok(one_or(parts, Expression::And))
    }

    fn operand(&mut self) -> Result<Expression, String> {
        let mut is_negated = false;
        while self.take("!") {
            is_negated = !is_negated;
        }
        let operand = if self.take("(") {
            self.depth += 1;
            if self.depth > MOST_DEPTH {
                return Err(format!("more than {MOST_DEPTH} parentheses in each other"));
            }
            let inner = self.either()?;
            self.depth -= 1;
            self.need(")")?;
            inner
        } else {
            self.term()?
        };
        Ok(match is_negated {
            true => Expression::Not(Box::new(operand)),
            false => operand,
        })
    }

    fn term(&mut self) -> Result<Expression, String> {
        let name = self.label()?;
        if let ("all" | "global" | "has", true) = (name, self.take("(")) {
            let term = match name {
                "all" => Expression::All,
                "global" => Expression::Global,
                _ => Expression::Has(self.label()?.to_owned()),
            };
            self.need(")")?;
            return Ok(term);
        }
        let name = name.to_owned();
        if self.take("==") {
            return Ok(Expression::In(name, vec![self.string()?]));
        }
        if self.take("!=") {
            return Ok(Expression::NotIn(name, vec![self.string()?]));
        }
        match self.word() {
            "in" => Ok(Expression::In(name, self.set()?)),
            "notin" => Ok(Expression::NotIn(name, self.set()?)),
            "not" if self.word() == "in" => Ok(Expression::NotIn(name, self.set()?)),
            "contains" => Ok(Expression::Contains(name, self.string()?)),
            "startswith" => Ok(Expression::StartsWith(name, self.string()?)),
            "starts" if self.word() == "with" => Ok(Expression::StartsWith(name, self.string()?)),
            "endswith" => Ok(Expression::EndsWith(name, self.string()?)),
            "ends" if self.word() == "with" => Ok(Expression::EndsWith(name, self.string()?)),
            _ => Err(self.expected("an operator")),
        }
    }

    fn label(&mut self) -> Result<&'a str, String> {
        let is_of_label = |it: char| it.is_ascii_alphanumeric() || "_./-".contains(it);
        let label = self.while_is(is_of_label);
        match label.is_empty() {
            true => Err(self.expected("a label")),
            false => Ok(label),
        }
    }

    fn word(&mut self) -> &'a str {
        self.while_is(|it| it.is_ascii_lowercase())
    }

    fn string(&mut self) -> Result<String, String> {
        let quote = self.text.chars().next().filter(|it| "'\"".contains(*it));
        let inner = quote.and_then(|quote| self.text[1..].split_once(quote));
        let Some((value, rest)) = inner else {
            return Err(self.expected("a text in quotes"));
        };
        self.text = rest;
        self.skip();
        Ok(value.to_owned())
    }

    fn set(&mut self) -> Result<Vec<String>, String> {
        self.need("{")?;
        let mut values = vec![];
        while !self.take("}") {
            if !values.is_empty() {
                self.need(",")?;
            }
            values.push(self.string()?);
        }
        Ok(values)
    }

    fn while_is(&mut self, is_one: impl Fn(char) -> bool) -> &'a str {
        let end = self.text.find(|it| !is_one(it)).unwrap_or(self.text.len());
        let (word, rest) = self.text.split_at(end);
        self.text = rest;
        self.skip();
        word
    }

    fn take(&mut self, token: &str) -> bool {
        let Some(rest) = self.text.strip_prefix(token) else {
            return false;
        };
        self.text = rest;
        self.skip();
        true
    }

    fn need(&mut self, token: &str) -> Result<(), String> {
        match self.take(token) {
            true => Ok(()),
            false => Err(self.expected(token)),
        }
    }

    fn skip(&mut self) {
        self.text = self.text.trim_start();
    }

    fn expected(&self, what: &str) -> String {
        let here: String = self.text.chars().take(32).collect();
        format!("no selector: {what} is needed before {here:?}")
    }
}

fn one_or(mut parts: Vec<Expression>, many: impl Fn(Vec<Expression>) -> Expression) -> Expression {
    match (parts.pop(), parts.is_empty()) {
        (Some(only), true) => only,
        (last, _) => {
            parts.extend(last);
            many(parts)
        }
    }
}

/// Nobody writes more, and each takes its part of the stack.
const MOST_DEPTH: usize = 32;

#[cfg(test)]
mod tests {
    use super::*;

    /// Labels `app=web`, `tier=front-end` and `example.com/a_b=`; of `unknown` nothing is known.
    fn label(name: &str) -> Label<'static> {
        match name {
            "app" => Label::Is(Some("web")),
            "tier" => Label::Is(Some("front-end")),
            "example.com/a_b" => Label::Is(Some("")),
            "unknown" => Label::Unknown,
            _ => Label::Is(None),
        }
    }

    #[test]
    fn expressions_hold() {
        for (text, expected) in [
            ("", Some(true)),
            ("  ", Some(true)),
            ("all()", Some(true)),
            ("all( )", Some(true)),
            ("!all()", Some(false)),
            ("global()", Some(false)),
            ("has(app)", Some(true)),
            ("has( example.com/a_b )", Some(true)),
            ("has(other)", Some(false)),
            ("!has(other)", Some(true)),
            ("app == 'web'", Some(true)),
            ("app==\"web\"", Some(true)),
            ("app == 'api'", Some(false)),
            ("app != 'api'", Some(true)),
            ("other != 'api'", Some(true)),
            ("other == ''", Some(false)),
            ("example.com/a_b == ''", Some(true)),
            ("app in {'api', 'web'}", Some(true)),
            ("app in {'api'}", Some(false)),
            ("app in {}", Some(false)),
            ("app not in {'api'}", Some(true)),
            ("app not  in { \"web\" , 'x' }", Some(false)),
            ("other not in {'api'}", Some(true)),
            ("app notin {'web'}", Some(false)),
            ("tier contains 't-e'", Some(true)),
            ("tier contains 'back'", Some(false)),
            ("other contains ''", Some(false)),
            ("tier starts with 'front'", Some(true)),
            ("tier starts  with 'end'", Some(false)),
            ("tier ends with 'end'", Some(true)),
            ("tier endswith 'front'", Some(false)),
            ("app == 'web' && tier == 'back'", Some(false)),
            ("app == 'web' || tier == 'back'", Some(true)),
            ("app == 'api' && has(tier) || has(app)", Some(true)),
            ("app == 'api' && (has(tier) || has(app))", Some(false)),
            ("!(app == 'web' && has(tier))", Some(false)),
            ("!!has(app)", Some(true)),
            ("! has(other)&&!(has(x))", Some(true)),
            ("has == 'x'", Some(false)),
            ("all == 'x'", Some(false)),
            ("in == 'x'", Some(false)),
            // What is not known decides nothing by itself.
            ("has(unknown)", None),
            ("!has(unknown)", None),
            ("unknown == 'x' || has(app)", Some(true)),
            ("unknown == 'x' || has(other)", None),
            ("unknown == 'x' && has(other)", Some(false)),
            ("unknown == 'x' && has(app)", None),
        ] {
            let read = Expression::parse(text).expect(text);
            assert_eq!(read.holds(&label), expected, "{text}");
        }
    }

    #[test]
    fn what_is_none_is_refused() {
        let deep = format!("{}has(a){}", "(".repeat(100_000), ")".repeat(100_000));
        for text in [
            "app",
            "app =",
            "app == web",
            "app == 'web",
            "== 'web'",
            "app in 'web'",
            "app in {'web'",
            "app in {'a' 'b'}",
            "app not 'web'",
            "app starts 'web'",
            "has()",
            "has(app",
            "(has(app)",
            "has(app))",
            "has(app) has(tier)",
            "has(app) &&",
            "|| has(app)",
            "has(app) & has(tier)",
            "app ~ 'web'",
            "ä == 'x'",
            "all(",
            &deep,
        ] {
            assert!(Expression::parse(text).is_err(), "{text:.40}");
        }
    }
}
