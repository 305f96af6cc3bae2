//! `--set KEY=VALUE`: what of the manifests can be changed without an overlay. The keys are few on purpose: those that many
//! clusters need, each with values that are looked at before they are printed.

use std::fmt::Write as _;
use std::str::FromStr;
use std::time::Duration;

use weft_core::{AccessPolicy, TrustDomain};

/// A key with its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    key: &'static Key,
    value: String,
}

/// Something that can be set.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Key {
    pub(super) name: &'static str,
    /// For people.
    pub(super) what: &'static str,
    part: Part,
    place: Place,
    value: Form,
}

/// Whose container it is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    Controller,
    Agent,
}

/// What of the container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Variable(&'static str),
    /// Below `resources`: `requests` or `limits`, and of what.
    Resource(&'static str, &'static str),
}

/// What a value has to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Filter,
    TrustDomain,
    Policy,
    /// At least so many seconds.
    Time(u64),
    Quantity,
}

/// All keys.
pub(super) static KEYS: [Key; 11] = [
    Key {
        name: "agent.drainDeadline",
        what: "for how long an agent that ends lets flows finish: 30s",
        part: Part::Agent,
        place: Place::Variable(DRAIN_DEADLINE),
        value: Form::Time(1),
    },
    Key {
        name: "agent.logLevel",
        what: "what agents log: info, debug, weft_agent=debug,access=off, ...",
        part: Part::Agent,
        place: Place::Variable("WEFT_LOG"),
        value: Form::Filter,
    },
    Key {
        name: "agent.resources.limits.memory",
        what: "the most memory of an agent, which is told of it: 2Gi",
        part: Part::Agent,
        place: Place::Resource("limits", "memory"),
        value: Form::Quantity,
    },
    Key {
        name: "agent.resources.requests.cpu",
        what: "its weight beside the pods of the node: 500m",
        part: Part::Agent,
        place: Place::Resource("requests", "cpu"),
        value: Form::Quantity,
    },
    Key {
        name: "agent.resources.requests.memory",
        what: "what the scheduler keeps for it: 96Mi",
        part: Part::Agent,
        place: Place::Resource("requests", "memory"),
        value: Form::Quantity,
    },
    Key {
        name: "controller.leafLifetime",
        what: "the life of certificates of workloads: 24h",
        part: Part::Controller,
        place: Place::Variable("WEFT_LEAF_LIFETIME"),
        value: Form::Time(10),
    },
    Key {
        name: "controller.logLevel",
        what: "what controllers log: info, debug, weft_controller=debug, ...",
        part: Part::Controller,
        place: Place::Variable("WEFT_LOG_LEVEL"),
        value: Form::Filter,
    },
    Key {
        name: "controller.resources.limits.memory",
        what: "the most memory of a controller: 2Gi",
        part: Part::Controller,
        place: Place::Resource("limits", "memory"),
        value: Form::Quantity,
    },
    Key {
        name: "controller.resources.requests.memory",
        what: "what the scheduler keeps for it: 512Mi",
        part: Part::Controller,
        place: Place::Resource("requests", "memory"),
        value: Form::Quantity,
    },
    Key {
        name: "defaultPolicy",
        what: "what holds for ports that no Server selects: all-unauthenticated, cluster-authenticated, deny, ...",
        part: Part::Controller,
        place: Place::Variable("WEFT_DEFAULT_POLICY"),
        value: Form::Policy,
    },
    Key {
        name: "trustDomain",
        what: "the trust domain of identities: cluster.local",
        part: Part::Controller,
        place: Place::Variable("WEFT_TRUST_DOMAIN"),
        value: Form::TrustDomain,
    },
];

const DRAIN_DEADLINE: &str = "WEFT_DRAIN_DEADLINE";
/// How variables of a container are indented.
const INDENT: &str = "        ";
/// The line after which they stand.
const VARIABLES: &str = "        env:\n";
/// What an agent needs after it has waited for its successor and let flows finish, each for the deadline.
const GRACE_BEYOND: u64 = 15;
const GRACE: &str = "      terminationGracePeriodSeconds: ";

impl FromStr for Setting {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, value) = text
            .split_once('=')
            .ok_or("KEY=VALUE is needed, as in agent.logLevel=debug")?;
        let key = KEYS.iter().find(|it| it.name == name).ok_or_else(|| {
            let known: Vec<_> = KEYS.iter().map(|it| it.name).collect();
            format!("there is no key {name}; there are {}", known.join(", "))
        })?;
        let checked = key.value.check(value);
        checked.map_err(|reason| format!("{name}: {reason}"))?;
        Ok(Self {
            key,
            value: value.to_owned(),
        })
    }
}

impl Setting {
    pub(super) fn key(&self) -> &'static Key {
        self.key
    }

    /// A document with it, if it is that of its part.
    pub(super) fn apply(&self, document: String) -> String {
        if !self.key.part.is(&document) {
            return document;
        }
        match self.key.place {
            Place::Variable(name) => {
                let document = with_variable(&document, name, &self.value);
                match name {
                    DRAIN_DEADLINE => with_grace(&document, &self.value),
                    _ => document,
                }
            }
            Place::Resource(of, what) => with_resource(&document, of, what, &self.value),
        }
    }
}

impl Part {
    /// Whether a document is that which has its containers.
    pub(super) fn is(self, document: &str) -> bool {
        document.contains(match self {
            Self::Controller => "\nkind: Deployment\n",
            Self::Agent => "\nkind: DaemonSet\n",
        })
    }
}

impl Form {
    fn check(self, value: &str) -> Result<(), String> {
        match self {
            Self::Filter => {
                let allowed = |it: char| it.is_ascii_alphanumeric() || "_:=,.-[]{}/".contains(it);
                match !value.is_empty() && value.chars().all(allowed) {
                    true => Ok(()),
                    false => Err(
                        "a level or a filter is needed, such as debug or weft_agent=debug"
                            .to_owned(),
                    ),
                }
            }
            Self::TrustDomain => {
                let read = value.parse::<TrustDomain>();
                read.map(drop).map_err(|error| error.to_string())
            }
            Self::Policy => {
                let read = value.parse::<AccessPolicy>();
                read.map(drop).map_err(|error| error.to_string())
            }
            Self::Time(least) => match time(value) {
                Some(it) if it >= Duration::from_secs(least) => Ok(()),
                _ => Err(format!(
                    "a time of at least {least}s is needed, such as 90s, 5m or 24h"
                )),
            },
            Self::Quantity => match is_quantity(value) {
                true => Ok(()),
                false => Err(
                    "a quantity of Kubernetes is needed, such as 500m, 2, 128Mi or 1Gi".to_owned(),
                ),
            },
        }
    }
}

/// A time with one unit: agents and controllers read these.
fn time(text: &str) -> Option<Duration> {
    let unit = match text.chars().next_back()? {
        's' => 1,
        'm' => 60,
        'h' => 3600,
        _ => return None,
    };
    let number = &text[..text.len() - 1];
    let number = number
        .bytes()
        .all(|it| it.is_ascii_digit())
        .then_some(number)?;
    let number: u64 = number.parse().ok()?;
    Some(Duration::from_secs(number.checked_mul(unit)?))
}

fn is_quantity(text: &str) -> bool {
    let unit = text.trim_start_matches(|it: char| it.is_ascii_digit() || it == '.');
    let number = &text[..text.len() - unit.len()];
    let is_unit = matches!(
        unit,
        "" | "m" | "k" | "M" | "G" | "T" | "Ki" | "Mi" | "Gi" | "Ti"
    );
    let number = number.parse::<f64>().ok().filter(|it| *it > 0.0);
    is_unit && number.is_some()
}

/// A document whose first container that has variables has this one, in place of one of that name that it had.
pub(super) fn with_variable(document: &str, name: &str, value: &str) -> String {
    let head = format!("{INDENT}- name: {name}\n");
    let line = format!("{head}{INDENT}  value: \"{value}\"\n");
    let Some(at) = document.find(&head) else {
        return document.replacen(VARIABLES, &format!("{VARIABLES}{line}"), 1);
    };
    let after = &document[at + head.len()..];
    let end = after.find('\n').map_or(after.len(), |it| it + 1);
    format!("{}{line}{}", &document[..at], &after[end..])
}

/// The agent's pod with time enough for its end.
fn with_grace(document: &str, deadline: &str) -> String {
    let deadline = time(deadline).unwrap_or_default().as_secs();
    let seconds = deadline.saturating_mul(2).saturating_add(GRACE_BEYOND);
    with_value(document, GRACE, &seconds.to_string())
}

/// A document whose main container, which comes last, has this for a resource.
fn with_resource(document: &str, of: &str, what: &str, value: &str) -> String {
    let containers = document.find("\n      containers:\n").unwrap_or_default();
    let (before, after) = document.split_at(containers);
    let section = after.find(&format!("\n          {of}:\n"));
    let (between, after) = after.split_at(section.unwrap_or_default());
    let value = with_value(after, &format!("            {what}: "), value);
    format!("{before}{between}{value}")
}

/// A text whose first line that begins so has this behind it.
fn with_value(text: &str, begin: &str, value: &str) -> String {
    let Some(at) = text.find(&format!("\n{begin}")) else {
        return text.to_owned();
    };
    let value_at = at + 1 + begin.len();
    let end = text[value_at..]
        .find('\n')
        .map_or(text.len(), |it| value_at + it);
    format!("{}{value}{}", &text[..value_at], &text[end..])
}

/// The keys, for `--help`.
pub(super) fn help() -> String {
    let mut text = "Keys of --set:\n".to_owned();
    for key in &KEYS {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "  {:<38} {}", key.name, key.what);
    }
    text + "\nSee docs/install.md. Next: weft install | kubectl apply -f -"
}
