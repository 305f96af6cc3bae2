//! What Linkerd's ServiceProfiles say of the requests to a port: not where they go by (but for a split of all of
//! them), only how long they may take, when they are sent again, and what counts as a failure.
//!
//! Its routes are conditions in an order, of which the first that is satisfied counts; so they are no rules, which
//! are ordered by how much they say.

use std::sync::Arc;

use http::Method;
use serde::{Serialize, Serializer};

use super::{Backend, BudgetSettings, Pattern, Reliability, StatusRange};
use crate::names::Name;

/// A ServiceProfile, as it holds for a port of its Service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Profile {
    /// The namespace that it is in: the Service's, and it holds for all clients that have none of their own; or
    /// another one, and it holds for the clients there.
    pub namespace: Name,
    /// Its routes, in order.
    pub routes: Vec<ProfileRoute>,
    /// Where requests go in place of the Service's own endpoints; none: to these.
    pub backends: Vec<Backend>,
    /// How many retries there may be, whether a route asks for them or a client does.
    pub budget: BudgetSettings,
}

/// A route of a ServiceProfile.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ProfileRoute {
    /// What it is called.
    pub name: String,
    /// Which requests are its.
    pub condition: Condition,
    /// What holds for them.
    pub reliability: Reliability,
    /// What counts as a failure; none: nothing is said of it. Shared with all that is being measured.
    #[serde(serialize_with = "shared")]
    pub classes: Option<Arc<ResponseClasses>>,
}

/// What counts as a failure of a server's, by the status of its answer. Of a status that is in neither list,
/// nothing is said.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ResponseClasses {
    /// These are.
    pub failures: Vec<StatusRange>,
    /// These are none, whatever the rest of the answer says.
    pub successes: Vec<StatusRange>,
}

/// Which requests are meant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Condition {
    /// Those whose whole path, without the query, is this.
    Path(Pattern),
    /// Those with this method.
    #[serde(serialize_with = "text")]
    Method(Method),
    /// Those that all of these mean.
    All(Vec<Condition>),
    /// Those that any of these means.
    Any(Vec<Condition>),
    /// Those that this does not mean.
    Not(Box<Condition>),
}

impl Profile {
    /// The route that a request with this path, without the query, is of.
    pub fn route(&self, method: &Method, path: &str) -> Option<&ProfileRoute> {
        let mut routes = self.routes.iter();
        routes.find(|it| it.condition.is_match(method, path))
    }
}

impl ResponseClasses {
    /// Whether an answer with this status is a success; none: that is not said.
    pub fn is_success(&self, status: u16) -> Option<bool> {
        let is_in = |ranges: &[StatusRange]| ranges.iter().any(|it| it.contains(status));
        let is_failure = is_in(&self.failures);
        (is_failure || is_in(&self.successes)).then_some(!is_failure)
    }
}

impl Condition {
    /// Whether a request is meant.
    pub fn is_match(&self, method: &Method, path: &str) -> bool {
        match self {
            Self::Path(pattern) => pattern.is_match(path.as_bytes()),
            Self::Method(wanted) => method == wanted,
            Self::All(conditions) => conditions.iter().all(|it| it.is_match(method, path)),
            Self::Any(conditions) => conditions.iter().any(|it| it.is_match(method, path)),
            Self::Not(condition) => !condition.is_match(method, path),
        }
    }

    /// How many regular expressions there are in it.
    pub fn patterns(&self) -> usize {
        match self {
            Self::Path(_) => 1,
            Self::Method(_) => 0,
            Self::All(conditions) | Self::Any(conditions) => {
                conditions.iter().map(Self::patterns).sum()
            }
            Self::Not(condition) => condition.patterns(),
        }
    }
}

fn text<S: Serializer>(method: &Method, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(method.as_str())
}

fn shared<S: Serializer>(
    classes: &Option<Arc<ResponseClasses>>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    classes.as_deref().serialize(serializer)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> Condition {
        Condition::Path(Pattern::new(text).expect("valid"))
    }

    #[test]
    fn conditions_are_trees() {
        let get = || Condition::Method(Method::GET);
        let not = |it| Condition::Not(Box::new(it));
        for (condition, meant, not_meant) in [
            (path("/a/.*"), ("GET", "/a/b"), ("GET", "/x/a/b")),
            (get(), ("GET", "/"), ("POST", "/")),
            (
                Condition::All(vec![get(), path("/a")]),
                ("GET", "/a"),
                ("POST", "/a"),
            ),
            (
                Condition::Any(vec![get(), path("/a")]),
                ("POST", "/a"),
                ("POST", "/b"),
            ),
            (not(get()), ("PUT", "/"), ("GET", "/")),
            (
                Condition::All(vec![not(path("/health")), Condition::Any(vec![get()])]),
                ("GET", "/healthy"),
                ("GET", "/health"),
            ),
        ] {
            let is = |(method, path): (&str, _)| {
                condition.is_match(&method.parse().expect("valid"), path)
            };
            assert!(is(meant) && !is(not_meant), "{condition:?}");
        }
    }

    #[test]
    fn the_first_route_counts() {
        let route = |name: &str, condition| ProfileRoute {
            name: name.to_owned(),
            condition,
            reliability: Reliability::default(),
            classes: None,
        };
        let profile = Profile {
            namespace: "shop".parse().expect("valid"),
            routes: vec![route("plain", path("/a")), route("all", path("/.*"))],
            backends: vec![],
            budget: BudgetSettings::DEFAULT,
        };
        for (path, name) in [("/a", Some("plain")), ("/b", Some("all")), ("*", None)] {
            let found = profile.route(&Method::GET, path);
            assert_eq!(found.map(|it| it.name.as_str()), name, "{path}");
        }
    }

    #[test]
    fn classes_say_nothing_of_the_statuses_that_they_do_not_list() {
        let list = |text| StatusRange::list(text).expect("valid");
        let classes = ResponseClasses {
            failures: list("404,500-502"),
            successes: list("200-299,501,503"),
        };
        for (status, is_success) in [
            (200, Some(true)),
            (301, None),
            (404, Some(false)),
            (500, Some(false)),
            (501, Some(false)),
            (503, Some(true)),
            (504, None),
            (999, None),
        ] {
            assert_eq!(classes.is_success(status), is_success, "{status}");
        }
    }
}
