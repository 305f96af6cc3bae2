//! What is to be said on routes themselves: the conditions of each of their parents, as the Gateway API
//! has them in `status.parents`. Computed by the index, whatever the source; shown to people now, and
//! there to be written by a source that can.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Serialize, Serializer};
use weft_core::route::RouteName;

use crate::objects::routes::ParentRef;

/// The statuses of all routes that have a Service as a parent.
#[derive(Clone, Debug, Default)]
pub struct RouteStatuses(Arc<Mutex<BTreeMap<RouteName, RouteStatus>>>);

/// The status of a route.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RouteStatus {
    /// The route.
    #[serde(serialize_with = "shown")]
    pub route: RouteName,
    /// The version of the object that this is about, where its source counts them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// One for each parent that is a Service.
    pub parents: Vec<ParentStatus>,
}

/// What a route is at one of its parents.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ParentStatus {
    /// The parent, as it is written.
    pub parent_ref: ParentRef,
    /// Who says so.
    pub controller_name: &'static str,
    /// What is said.
    pub conditions: Vec<Condition>,
}

/// A condition.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Condition {
    /// `Accepted`, `ResolvedRefs` or `PartiallyInvalid`.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// Whether it holds.
    #[serde(serialize_with = "truth")]
    pub status: bool,
    /// Why, in one word.
    pub reason: &'static str,
    /// Why, for people.
    pub message: String,
}

/// The name that the Gateway API wants controllers to have.
pub const CONTROLLER_NAME: &str = "weft.dev/controller";

impl RouteStatuses {
    /// Replaces a route's status; none: it has none any more.
    pub fn replace(&self, route: &RouteName, status: Option<RouteStatus>) {
        let mut all = self.locked();
        match status {
            Some(status) => all.insert(route.clone(), status),
            None => all.remove(route),
        };
    }

    /// All of them, by name.
    pub fn list(&self) -> Vec<RouteStatus> {
        self.locked().values().cloned().collect()
    }

    fn locked(&self) -> MutexGuard<'_, BTreeMap<RouteName, RouteStatus>> {
        // Every change is one insert or remove: a panic elsewhere leaves it whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn shown<S: Serializer>(route: &RouteName, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(route)
}

fn truth<S: Serializer>(status: &bool, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(if *status { "True" } else { "False" })
}
