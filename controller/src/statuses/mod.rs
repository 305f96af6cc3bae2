//! What is to be said on objects themselves: on routes the conditions of each of their parents, as the Gateway API has
//! them in `status.parents`; on Weft's policies conditions of their own; on whatever cannot be used, an Event. Computed
//! by the index, whatever the source; shown to people, and [written](writer) where there is a cluster.
//!
//! What changed waits in a `queue` that names objects and nothing else: what is written is what is true when it is
//! written, however often it changed meanwhile. When too many wait, all are looked through instead.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Serialize, Serializer};
use serde_json::Value;
use tokio::sync::Notify;
use tokio::time::{Duration, Instant, sleep_until};
use weft_core::route::RouteName;
use weft_core::{Name, ObjectName, PolicyGroup};

use crate::objects::routes::ParentRef;
use crate::objects::{Fault, ObjectKey, ObjectKind};
use crate::problems::Facet;
use policy::PolicyStatus;
use queue::Queue;

pub mod conditions;
mod events;
mod policy;
mod queue;
mod troubles;
pub mod writer;

/// The statuses of all objects.
#[derive(Clone, Debug, Default)]
pub struct Statuses(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    routes: BTreeMap<RouteName, RouteStatus>,
    policies: BTreeMap<ObjectKey, PolicyStatus>,
    /// Objects that a status may be written on, in the version that is known.
    known: BTreeMap<ObjectKey, Version>,
    /// Objects that cannot be used, and why.
    unusable: BTreeMap<ObjectKey, String>,
    /// What agents reject of objects.
    rejected: BTreeMap<ObjectKey, Vec<Rejection>>,
    queue: Queue,
    /// Whether somebody says what is to be said.
    leads: bool,
    /// Events that were not told as too many objects waited: nothing finds them again.
    lost_events: u64,
    /// Changes are being made that count as one.
    changing: bool,
}

/// What is to be said on an object.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Saying {
    /// Its status, where it is known and has one.
    pub(crate) status: Option<Status>,
    /// Why it cannot be used.
    pub(crate) unusable: Option<String>,
}

/// Which of the objects that had a name, one after the other, and in which version; as far as its source says so.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Version {
    /// Another one for each object.
    pub uid: Option<String>,
    /// Counted from 1 for each.
    pub generation: Option<i64>,
}

/// A status to be written.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Status {
    /// The version of the object that it is about.
    pub(crate) version: Version,
    pub(crate) content: Content,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Content {
    /// `status.parents`: the own entries.
    Parents(Vec<ParentStatus>),
    /// `status.conditions`: the own ones.
    Conditions(Vec<Condition>),
}

/// What to do next about statuses.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// This one's changed.
    One(ObjectKey),
    /// Look through all.
    All,
}

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
    /// `Accepted`, `ResolvedRefs`, `Programmed` or `PartiallyInvalid`.
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

/// That agents reject what is made of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Rejection {
    /// Of a route, at which of its parents.
    pub(crate) place: Option<Place>,
    /// What, who, and why.
    pub(crate) text: String,
}

/// A parent of routes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) kind: &'static str,
    pub(crate) name: ObjectName,
}

/// The name that the Gateway API wants controllers to have.
pub const CONTROLLER_NAME: &str = "weft.dev/controller";

/// Whether statuses are written on objects of a kind. What is of Linkerd's policy group is Linkerd's to say, except for
/// its routes, whose status has an entry for each controller.
pub(crate) fn has_status(kind: ObjectKind) -> bool {
    matches!(kind, ObjectKind::Route(_)) || kind.policy_group() == Some(PolicyGroup::Weft)
}

impl Statuses {
    /// What changes until [`Statuses::settled`] counts as one: an object is not said to be as it was, in a version that
    /// was not looked at yet.
    pub fn unsettled(&self) {
        self.locked().changing = true;
    }

    /// What was changed is whole.
    pub fn settled(&self) {
        self.locked().changing = false;
        self.0.changed.notify_one();
    }

    /// Replaces a route's status; none: it has none any more.
    pub fn replace(&self, route: &RouteName, status: Option<RouteStatus>) {
        self.change(&key(route), |state| {
            let before = match status.clone() {
                Some(status) => state.routes.insert(route.clone(), status),
                None => state.routes.remove(route),
            };
            before != status
        });
    }

    /// An object is there, in this version.
    pub fn seen(&self, key: &ObjectKey, version: Version) {
        if has_status(key.kind) {
            self.change(key, |state| {
                let before = state.known.insert(key.clone(), version.clone());
                before != Some(version)
            });
        }
    }

    /// What is wrong with an object in one respect, and what holds meanwhile.
    pub fn faults(&self, key: &ObjectKey, facet: Facet, faults: &[Fault], effect: &str) {
        let is_policy = key.kind.policy_group() == Some(PolicyGroup::Weft);
        let unusable = (facet == Facet::Content).then(|| match faults {
            [] => None,
            faults => Some(policy::told(faults, effect)),
        });
        if !is_policy && unusable.is_none() {
            return;
        }
        self.change(key, |state| {
            let mut changed = false;
            if let Some(unusable) = unusable {
                let before = match unusable.clone() {
                    Some(reason) => state.unusable.insert(key.clone(), reason),
                    None => state.unusable.remove(key),
                };
                changed |= before != unusable;
            }
            // One that is gone is said to be without fault once more.
            if is_policy && state.known.contains_key(key) {
                let policy = state.policies.entry(key.clone()).or_default();
                changed |= policy.set(facet, faults, effect);
                if policy.is_empty() {
                    state.policies.remove(key);
                }
            }
            changed
        });
    }

    /// What agents reject of an object now.
    pub(crate) fn rejected(&self, key: &ObjectKey, rejections: Vec<Rejection>) {
        if !has_status(key.kind) {
            return;
        }
        self.change(key, |state| {
            let is_known = state.known.contains_key(key);
            let before = match rejections.is_empty() || !is_known {
                true => state.rejected.remove(key),
                false => state.rejected.insert(key.clone(), rejections.clone()),
            };
            is_known && before.unwrap_or_default() != rejections
        });
    }

    /// An object is gone.
    pub fn gone(&self, key: &ObjectKey) {
        let mut state = self.locked();
        state.rejected.remove(key);
        state.known.remove(key);
        state.policies.remove(key);
        state.unusable.remove(key);
        state.queue.gone(key);
    }

    /// The statuses of routes, by name.
    pub fn list(&self) -> Vec<RouteStatus> {
        self.locked().routes.values().cloned().collect()
    }

    /// How many objects wait for what is to be said on them.
    pub fn waiting(&self) -> usize {
        self.locked().queue.len()
    }

    /// Whether there may be something to be said on an object.
    pub(crate) fn is_known(&self, object: &ObjectKey) -> bool {
        let state = self.locked();
        state.known.contains_key(object) || state.unusable.contains_key(object)
    }

    /// What is to be said on an object now.
    pub(crate) async fn of(&self, object: &ObjectKey) -> Saying {
        self.once(|state| {
            Some(Saying {
                status: state.status(object),
                unusable: state.unusable.get(object).cloned(),
            })
        })
        .await
    }

    /// Begins anew: what cannot be used waits, and all are to be looked through.
    pub(crate) fn begin(&self) {
        let state = &mut *self.locked();
        state.leads = true;
        let without = state.queue.begin(state.unusable.keys(), Instant::now());
        let lost = without.iter().filter(|it| !has_status(it.kind)).count();
        state.lost_events += lost as u64;
    }

    /// Nobody says anything any more.
    pub(crate) fn ends(&self) {
        self.locked().leads = false;
    }

    /// How many Events were not told, and will not be, as too many objects waited.
    pub fn lost_events(&self) -> u64 {
        self.locked().lost_events
    }

    /// This is not as it should be.
    pub(crate) fn again(&self, object: &ObjectKey) {
        self.change(object, |_| true);
    }

    /// This one failed in a way that may pass.
    pub(crate) fn failed(&self, object: &ObjectKey, asked: Option<Duration>) {
        let mut state = self.locked();
        let waits = state.queue.failed(object, asked, Instant::now());
        state.lose(object, waits);
    }

    /// This one did not fail, or in a way that does not pass.
    pub(crate) fn done(&self, object: &ObjectKey) {
        self.locked().queue.done(object);
    }

    /// All were looked through, or as far as that was possible; the next time is after this long.
    pub(crate) fn looked(&self, wait: Duration) {
        let now = Instant::now();
        self.locked().queue.looked(now + wait, now);
    }

    /// What to do next, as soon as there is something.
    pub(crate) async fn next(&self) -> Next {
        self.once(|state| state.queue.next(Instant::now())).await
    }

    /// Waits until the state is whole and has something. Only one may wait at a time.
    async fn once<T>(&self, take: impl Fn(&mut State) -> Option<T>) -> T {
        loop {
            let changed = self.0.changed.notified();
            let wakes = {
                let mut state = self.locked();
                let taken = (!state.changing).then(|| take(&mut state)).flatten();
                if let Some(taken) = taken {
                    return taken;
                }
                state.queue.wakes().filter(|_| !state.changing)
            };
            match wakes {
                Some(at) => tokio::select! { () = changed => {}, () = sleep_until(at) => {} },
                None => changed.await,
            }
        }
    }

    /// Changes the state; true: the object is to be written.
    fn change(&self, key: &ObjectKey, change: impl FnOnce(&mut State) -> bool) {
        let mut state = self.locked();
        if !change(&mut state) {
            return;
        }
        let waits = state.queue.push(key, Instant::now());
        state.lose(key, waits);
        drop(state);
        self.0.changed.notify_one();
    }

    fn locked(&self) -> MutexGuard<'_, State> {
        // Every change leaves it whole.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Version {
    /// That of an object, as the API has it.
    pub fn of(object: &Value) -> Self {
        let metadata = &object["metadata"];
        Self {
            uid: metadata["uid"].as_str().map(str::to_owned),
            generation: metadata["generation"].as_i64(),
        }
    }
}

impl State {
    /// Counts an Event that will not be told, as the object has no room to wait. A status is found again by looking
    /// through all, and the Event with it.
    fn lose(&mut self, object: &ObjectKey, waits: bool) {
        let is_lost = !waits && self.leads && !has_status(object.kind);
        if is_lost && self.unusable.contains_key(object) {
            self.lost_events += 1;
        }
    }

    fn status(&self, object: &ObjectKey) -> Option<Status> {
        let version = self.known.get(object)?.clone();
        let rejected = self.rejected.get(object).map_or(&[][..], Vec::as_slice);
        let content = match object.kind {
            ObjectKind::Route(kind) => {
                let name = RouteName {
                    name: ObjectName {
                        namespace: object.namespace.clone()?,
                        name: object.name.clone(),
                    },
                    kind,
                };
                let route = self.routes.get(&name);
                let parents = route.map_or_else(Vec::new, |it| it.parents.clone());
                let parents = parents.into_iter().map(|parent| {
                    let mut rejected = rejected.iter();
                    let here = rejected.find(|it| it.is_at(&parent.parent_ref, object));
                    policy::programmed(parent, here)
                });
                Content::Parents(parents.collect())
            }
            kind => {
                let policy = self.policies.get(object).cloned().unwrap_or_default();
                Content::Conditions(policy.conditions(kind, rejected))
            }
        };
        Some(Status { version, content })
    }
}

impl Rejection {
    /// Whether it is about what a route is at a parent, as that is written.
    fn is_at(&self, parent: &ParentRef, route: &ObjectKey) -> bool {
        let Some(Place { kind, name }) = &self.place else {
            return true;
        };
        let own = route.namespace.as_ref().map(Name::as_str);
        let is_kind = parent
            .kind
            .as_deref()
            .is_some_and(|it| it.eq_ignore_ascii_case(kind));
        let namespace = parent.namespace.as_deref().or(own);
        is_kind && namespace == Some(name.namespace.as_str()) && parent.name == name.name.as_str()
    }
}

fn key(route: &RouteName) -> ObjectKey {
    ObjectKey {
        kind: ObjectKind::Route(route.kind),
        namespace: Some(route.name.namespace.clone()),
        name: route.name.name.clone(),
    }
}

fn shown<S: Serializer>(route: &RouteName, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(route)
}

fn truth<S: Serializer>(status: &bool, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(if *status { "True" } else { "False" })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use futures::FutureExt;

    use super::queue::MOST_WAITING;
    use super::*;
    use crate::objects::decode;

    fn policy(name: &str) -> ObjectKey {
        ObjectKey {
            kind: ObjectKind::Server(PolicyGroup::Weft),
            namespace: Some("shop".parse().expect("valid")),
            name: name.parse().expect("valid"),
        }
    }

    fn version(generation: i64) -> Version {
        Version {
            uid: Some("one".to_owned()),
            generation: Some(generation),
        }
    }

    fn waiting(statuses: &Statuses) -> Vec<Next> {
        let mut next = vec![];
        while let Some(one) = statuses.next().now_or_never() {
            next.push(one);
        }
        next
    }

    #[tokio::test]
    async fn an_object_waits_once_however_often_it_changes() {
        let statuses = Statuses::default();
        let fault = [Fault::new("spec.port", "no port")];
        for generation in 1..10 {
            statuses.seen(&policy("a"), version(generation));
            statuses.faults(&policy("a"), Facet::Content, &fault, "it is ignored");
            statuses.faults(&policy("a"), Facet::Content, &[], "");
        }
        statuses.seen(&policy("b"), Version::default());
        let expected = [Next::One(policy("a")), Next::One(policy("b"))];
        assert_eq!(waiting(&statuses), expected);
        // What is the same again is no change.
        statuses.seen(&policy("a"), version(9));
        statuses.faults(&policy("a"), Facet::Content, &[], "");
        assert_eq!(waiting(&statuses), []);
        let status = statuses.of(&policy("a")).await.status.expect("known");
        assert_eq!(status.version, version(9));
        // Another object of the same name is one, in whatever version.
        let another = Version {
            uid: Some("another".to_owned()),
            ..version(9)
        };
        statuses.seen(&policy("a"), another.clone());
        assert_eq!(waiting(&statuses), [Next::One(policy("a"))]);
        let status = statuses.of(&policy("a")).await.status.expect("known");
        assert_eq!(status.version, another);
        statuses.gone(&policy("a"));
        assert_eq!(statuses.of(&policy("a")).await, Saying::default());
        // As the index does after an object is gone.
        for facet in [Facet::Reference, Facet::Conflict] {
            statuses.faults(&policy("a"), facet, &[], "");
        }
        assert_eq!(statuses.waiting(), 0);
        assert!(statuses.locked().policies.is_empty());
    }

    #[tokio::test]
    async fn nothing_is_said_of_what_is_half_changed() {
        let statuses = Statuses::default();
        statuses.unsettled();
        statuses.seen(&policy("a"), version(1));
        let early = statuses.next().now_or_never();
        assert_eq!((early, statuses.waiting()), (None, 1));
        assert_eq!(statuses.of(&policy("a")).now_or_never(), None);
        statuses.settled();
        assert_eq!(statuses.next().await, Next::One(policy("a")));
        assert!(statuses.of(&policy("a")).await.status.is_some());
    }

    /// Whoever may write a status by these rules may write it on all kinds that have one, and nothing else.
    #[test]
    fn the_cluster_role_lets_statuses_be_written() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../daemonset/base/rbac.yaml");
        let text = std::fs::read_to_string(path).expect("read");
        let documents = decode::documents(&text).expect("YAML");
        let role = documents.iter().find(|it| it["kind"] == "ClusterRole");
        let rules = role.expect("a role")["rules"].as_array().expect("a list");
        let list = |rule: &Value, field: &str| -> Vec<String> {
            let list = rule[field].as_array().into_iter().flatten();
            list.map(|it| it.as_str().unwrap_or_default().to_owned())
                .collect()
        };
        let mut allowed = BTreeSet::new();
        let reads = ["get", "list", "watch"];
        // Whatever is about a status, and whatever lets more be done than to read and to make.
        let is_meant = |rule: &&Value| {
            let resources = list(rule, "resources");
            let more = |it: &String| it != "create" && !reads.contains(&it.as_str());
            let status = |it: &String| it.contains('/') || it.contains('*');
            resources.iter().any(status) || list(rule, "verbs").iter().any(more)
        };
        for rule in rules.iter().filter(is_meant) {
            assert_eq!(list(rule, "verbs"), ["patch"], "{rule}");
            assert_eq!(rule.as_object().expect("a rule").len(), 3, "{rule}");
            for group in list(rule, "apiGroups") {
                let of_group = |it: String| format!("{group}/{it}");
                allowed.extend(list(rule, "resources").into_iter().map(of_group));
            }
        }
        let kinds = ObjectKind::all().into_iter().filter(|it| has_status(*it));
        let needed = kinds.map(|kind| {
            let name = kind.as_str().to_lowercase();
            let plural = match name.strip_suffix('y') {
                Some(stem) => format!("{stem}ies"),
                None => format!("{name}s"),
            };
            format!("{}/{plural}/status", kind.group())
        });
        assert_eq!(allowed, needed.collect());
    }

    #[tokio::test]
    async fn the_queue_has_an_end_and_nothing_is_lost() {
        let statuses = Statuses::default();
        for number in 0..2 * MOST_WAITING {
            statuses.seen(&policy(&format!("p{number}")), version(1));
        }
        assert_eq!(statuses.waiting(), MOST_WAITING);
        let next = waiting(&statuses);
        assert_eq!(next.len(), MOST_WAITING + 1);
        assert_eq!(next[MOST_WAITING], Next::All);
        statuses.looked(Duration::from_secs(600));
        assert_eq!(waiting(&statuses), []);
        statuses.begin();
        assert_eq!(waiting(&statuses), [Next::All]);
    }

    /// What has no status is not found again, as nobody writes down that an Event was told.
    #[tokio::test]
    async fn an_event_that_finds_no_room_is_counted() {
        let statuses = Statuses::default();
        let fault = [Fault::new("spec.port", "no port")];
        let fill = |number: usize| {
            let service = ObjectKey {
                kind: ObjectKind::Service,
                ..policy(&format!("s{number}"))
            };
            statuses.faults(&service, Facet::Content, &fault, "it is ignored");
        };
        (0..MOST_WAITING + 2).for_each(fill);
        assert_eq!(statuses.lost_events(), 0, "another controller leads");
        statuses.begin();
        assert_eq!(statuses.lost_events(), 2);
        (MOST_WAITING + 2..MOST_WAITING + 5).for_each(fill);
        assert_eq!(statuses.lost_events(), 5);
        // Its status is not as it should be: that is found.
        statuses.seen(&policy("a"), version(1));
        statuses.faults(&policy("a"), Facet::Content, &fault, "it is ignored");
        assert_eq!(statuses.lost_events(), 5);
        statuses.ends();
        fill(2 * MOST_WAITING);
        assert_eq!(statuses.lost_events(), 5);
    }

    #[tokio::test]
    async fn what_linkerd_says_on_its_objects_is_left_to_it() {
        let statuses = Statuses::default();
        let key = ObjectKey {
            kind: ObjectKind::Server(PolicyGroup::Linkerd),
            ..policy("a")
        };
        statuses.seen(&key, version(1));
        let fault = [Fault::new("spec.port", "no port")];
        statuses.faults(&key, Facet::Content, &fault, "it is ignored");
        let saying = statuses.of(&key).await;
        assert_eq!(saying.status, None);
        let expected = "spec.port: no port; it is ignored";
        assert_eq!(saying.unusable.as_deref(), Some(expected));
    }
}
