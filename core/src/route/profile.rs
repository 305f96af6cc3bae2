//! What Linkerd's ServiceProfiles say of the requests to a port: not where they go by (but for a split of all of
//! them), only how long they may take, when they are sent again, and what counts as a failure.
//!
//! Its routes are conditions in an order, of which the first that is satisfied counts; so they are no rules, which
//! are ordered by how much they say.

use http::Method;
use http::request::Parts;
use serde::{Serialize, Serializer};

use super::{Backend, Pattern, Reliability};
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
    /// What holds for a request; none: nothing.
    pub fn reliability(&self, head: &Parts) -> Option<&Reliability> {
        let mut routes = self.routes.iter();
        let found = routes.find(|it| it.condition.is_match(head))?;
        Some(&found.reliability).filter(|it| it.is_any())
    }
}

impl Condition {
    /// Whether a request is meant.
    pub fn is_match(&self, head: &Parts) -> bool {
        match self {
            Self::Path(pattern) => pattern.is_match(head.uri.path().as_bytes()),
            Self::Method(method) => head.method == *method,
            Self::All(conditions) => conditions.iter().all(|it| it.is_match(head)),
            Self::Any(conditions) => conditions.iter().any(|it| it.is_match(head)),
            Self::Not(condition) => !condition.is_match(head),
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

#[cfg(test)]
mod tests {
    use super::*;

    fn head(method: &str, uri: &str) -> Parts {
        let request = http::Request::builder().method(method).uri(uri);
        request.body(()).expect("valid").into_parts().0
    }

    fn path(text: &str) -> Condition {
        Condition::Path(Pattern::new(text).expect("valid"))
    }

    #[test]
    fn conditions_are_trees() {
        let get = || Condition::Method(Method::GET);
        let not = |it| Condition::Not(Box::new(it));
        for (condition, meant, not_meant) in [
            (path("/a/.*"), ("GET", "/a/b?c"), ("GET", "/x/a/b")),
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
            let is = |(method, uri)| condition.is_match(&head(method, uri));
            assert!(is(meant) && !is(not_meant), "{condition:?}");
        }
    }

    #[test]
    fn the_first_route_counts() {
        let route = |name: &str, condition, heeds_headers| ProfileRoute {
            name: name.to_owned(),
            condition,
            reliability: Reliability {
                heeds_headers,
                ..Reliability::default()
            },
        };
        let profile = Profile {
            namespace: "shop".parse().expect("valid"),
            routes: vec![
                route("plain", path("/a"), false),
                route("all", path("/.*"), true),
            ],
            backends: vec![],
        };
        for (uri, is) in [("/a", false), ("/b", true)] {
            let found = profile.reliability(&head("GET", uri));
            assert_eq!(found.is_some(), is, "{uri}");
        }
    }
}
