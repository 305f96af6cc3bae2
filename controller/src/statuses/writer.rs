//! Writes statuses and Events, while this controller leads.
//!
//! Each object is read before it is written, and written only if it does not say what it should, in the version that
//! was read. What is about another version than the one that is there is not written: the source will tell of that one.
//! When a controller begins to lead, and from time to time, it looks through all objects, for what was missed while
//! nobody led or was changed by somebody else.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::events::v1::Event;
use k8s_openapi::jiff::Timestamp;
use kube::api::{ListParams, Patch, PatchParams, PostParams};
use kube::core::ApiResource;
use kube::{Api, Client};
use serde_json::{Value, json};
use tokio::time::{Instant, MissedTickBehavior, timeout};
use tokio_util::sync::CancellationToken;
use weft_core::PolicyGroup;

use super::queue::Queue;
use super::troubles::Troubles;
use super::{Next, Status, Statuses, Version, conditions, events, has_status};
use crate::leader::{Leadership, REQUEST_TIMEOUT};
use crate::objects::{ObjectKey, ObjectKind};
use crate::pause::{Pause, about};
use crate::problems::Problems;
use crate::source::kubernetes::{Document, Served, asked_pause_of, explain, served};
use crate::telemetry::Metrics;
use crate::views::Views;

/// Who writes.
pub struct Writer {
    /// The API server.
    pub client: Client,
    /// What is to be said.
    pub statuses: Statuses,
    /// Whether everything is known: before, nothing is said.
    pub views: Arc<Views>,
    /// Whether this controller may write.
    pub leadership: Leadership,
    /// Where it is told what fails.
    pub problems: Problems,
    /// Counts.
    pub metrics: Arc<Metrics>,
}

/// Why something is not written.
enum Failure {
    Refused(kube::Error),
    Silent(Duration),
    /// The object is there, and has no status that could be written.
    NoStatus(ObjectKind),
}

/// Objects per second, at most.
const PACE: Duration = Duration::from_millis(40);
/// How often all are looked through.
const LOOK_THROUGH: Duration = Duration::from_secs(600);
/// Objects per page.
const PAGE: u32 = 500;
/// How long it may take to ask which kinds there are: several requests.
const KINDS_TIMEOUT: Duration = Duration::from_secs(30);
/// How often an object is read and written in a row, while others write it at the same moment.
const TRIES: usize = 3;
const EVENTS: &str = "kubernetes: Events";

impl Writer {
    /// Writes until it is stopped.
    pub async fn run(mut self, stop: CancellationToken) {
        let writing = async {
            self.views.whole().await;
            loop {
                self.leadership.begins().await;
                self.statuses.begin();
                self.lead().await;
            }
        };
        tokio::select! { () = stop.cancelled() => {}, () = writing => {} }
    }

    /// Writes while this controller leads.
    async fn lead(&self) {
        let mut pace = tokio::time::interval(PACE);
        pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut pause = Queue::pause();
        let mut kinds = Served::new();
        let mut troubles = Troubles::new(self.problems.clone());
        while self.leadership.leads() {
            troubles.keep(|it| self.statuses.is_known(it));
            let next = tokio::select! {
                next = self.statuses.next() => next,
                () = self.leadership.ends() => break,
            };
            pace.tick().await;
            match next {
                Next::All => {
                    let outcome = self.look_through(&mut kinds).await;
                    self.statuses.looked(next_look(&outcome, &mut pause));
                    troubles.of_all(self.failure(outcome));
                }
                Next::One(object) => {
                    let outcome = self.object(&mut kinds, &object).await;
                    match &outcome {
                        Err(failure) if failure.is_passing() => {
                            self.statuses.failed(&object, failure.asked_pause());
                        }
                        _ => self.statuses.done(&object),
                    }
                    troubles.of(&object, self.failure(outcome));
                }
            }
        }
        self.statuses.ends();
        // Whoever leads next tells of its own.
        self.problems.of_place(EVENTS, None);
    }

    /// Finds those that do not say what they should. What fails for a kind says nothing of others; the first failure is
    /// told, or rather one that may pass.
    async fn look_through(&self, kinds: &mut Served) -> Result<(), Failure> {
        *kinds = self.kinds().await?;
        let mut outcome = Ok(());
        for (kind, resource) in kinds.iter().filter(|(kind, _)| has_status(**kind)) {
            match (self.look_through_kind(*kind, resource).await, &outcome) {
                // There are none any more.
                (Err(failure), _) if failure.code() == Some(404) => {}
                (Err(failure), Ok(())) => outcome = Err(failure),
                (Err(failure), Err(before)) if failure.is_passing() && !before.is_passing() => {
                    outcome = Err(failure);
                }
                _ => {}
            }
        }
        outcome
    }

    async fn look_through_kind(
        &self,
        kind: ObjectKind,
        resource: &ApiResource,
    ) -> Result<(), Failure> {
        let api: Api<Document> = Api::all_with(self.client.clone(), resource);
        let mut page = ListParams::default().limit(PAGE);
        while self.leadership.leads() {
            let list = asked(api.list(&page)).await?;
            for object in &list.items {
                self.look(kind, &object.value).await;
            }
            let token = list.metadata.continue_.filter(|it| !it.is_empty());
            let Some(token) = token else { break };
            page = page.continue_token(&token);
        }
        Ok(())
    }

    async fn kinds(&self) -> Result<Served, Failure> {
        within(KINDS_TIMEOUT, served(&self.client)).await
    }

    async fn look(&self, kind: ObjectKind, object: &Value) {
        let name = |field: &str| object["metadata"][field].as_str()?.parse().ok();
        // One without a name is a problem of the source's.
        let Some(name_of_object) = name("name") else {
            return;
        };
        let key = ObjectKey {
            kind,
            namespace: name("namespace"),
            name: name_of_object,
        };
        let status = self.statuses.of(&key).await.status;
        if status.is_some_and(|it| to_write(object, &it).is_some()) {
            self.statuses.again(&key);
        }
    }

    /// Says what is to be said on an object. Where somebody else wrote meanwhile, it is read again.
    async fn object(&self, kinds: &mut Served, key: &ObjectKey) -> Result<(), Failure> {
        for _ in 1..TRIES {
            match self.one(kinds, key).await {
                Err(failure) if failure.code() == Some(409) => self.metrics.status("conflict"),
                outcome => return outcome,
            }
        }
        self.one(kinds, key).await
    }

    async fn one(&self, kinds: &mut Served, key: &ObjectKey) -> Result<(), Failure> {
        let saying = self.statuses.of(key).await;
        if saying.status.is_none() && saying.unusable.is_none() {
            return Ok(());
        }
        if !kinds.contains_key(&key.kind) {
            *kinds = self.kinds().await?;
        }
        let Some(resource) = kinds.get(&key.kind) else {
            return Ok(());
        };
        let api: Api<Document> = match &key.namespace {
            Some(namespace) => {
                Api::namespaced_with(self.client.clone(), namespace.as_str(), resource)
            }
            None => Api::all_with(self.client.clone(), resource),
        };
        let Some(object) = asked(api.get_opt(key.name.as_str())).await? else {
            return Ok(());
        };
        let is_another = |it: &Status| !is_of_version(&object.value, it);
        if saying.status.as_ref().is_some_and(is_another) {
            return Ok(());
        }
        if let Some(reason) = &saying.unusable {
            self.event(key, resource, &object.value, reason).await?;
        }
        let Some(status) = saying.status else {
            return Ok(());
        };
        let Some(patch) = to_write(&object.value, &status) else {
            self.metrics.status("unchanged");
            return Ok(());
        };
        // Not when the answer took too long.
        if !self.leadership.leads() {
            return Ok(());
        }
        let (parameters, patch) = (PatchParams::default(), Patch::Merge(patch));
        match asked(api.patch_status(key.name.as_str(), &parameters, &patch)).await {
            Err(failure) if failure.code() == Some(404) => {
                let now = asked(api.get_opt(key.name.as_str())).await?;
                let uid = |it: &Document| it.value["metadata"]["uid"].clone();
                // It is gone, or another one, or was there all the time.
                match now.is_some_and(|it| uid(&it) == uid(&object)) {
                    true => Err(Failure::NoStatus(key.kind)),
                    false => Ok(()),
                }
            }
            outcome => {
                outcome?;
                self.metrics.status("written");
                Ok(())
            }
        }
    }

    async fn event(
        &self,
        key: &ObjectKey,
        resource: &ApiResource,
        object: &Value,
        reason: &str,
    ) -> Result<(), Failure> {
        let event = events::event(key, &resource.api_version, object, reason);
        let namespace = event.metadata.namespace.clone().unwrap_or_default();
        let api: Api<Event> = Api::namespaced(self.client.clone(), &namespace);
        if !self.leadership.leads() {
            return Ok(());
        }
        let parameters = PostParams::default();
        let result = match asked(api.create(&parameters, &event)).await {
            Ok(_) => "told",
            Err(failure) if failure.code() == Some(409) => "known",
            Err(failure) if failure.is_passing() => return Err(failure),
            Err(failure) => {
                let effect = "what is wrong with objects is on /problems only";
                let reason = format!("they cannot be written: {failure}");
                self.problems.of_place(EVENTS, Some((reason, effect)));
                self.metrics.event("refused");
                return Ok(());
            }
        };
        self.metrics.event(result);
        self.problems.of_place(EVENTS, None);
        Ok(())
    }

    /// What failed, counted, for people.
    fn failure(&self, outcome: Result<(), Failure>) -> Option<String> {
        let failure = outcome.err()?;
        self.metrics.status(match failure.code() {
            Some(409) => "conflict",
            _ if failure.is_passing() => "failed",
            _ => "refused",
        });
        Some(failure.to_string())
    }
}

impl Failure {
    fn code(&self) -> Option<u16> {
        match self {
            Self::Refused(kube::Error::Api(status)) => Some(status.code),
            _ => None,
        }
    }

    /// How long the server asks to wait.
    fn asked_pause(&self) -> Option<Duration> {
        match self {
            Self::Refused(error) => asked_pause_of(error),
            Self::Silent(_) | Self::NoStatus(_) => None,
        }
    }

    /// Whether it may succeed later, as it is.
    fn is_passing(&self) -> bool {
        match self.code() {
            Some(code) => matches!(code, 408 | 409 | 410 | 429 | 500..),
            None => !matches!(self, Self::NoStatus(_)),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(error) => formatter.write_str(&explain(error)),
            Self::Silent(patience) => {
                write!(formatter, "no answer within {} s", patience.as_secs())
            }
            Self::NoStatus(kind) => {
                let from = match kind.policy_group() {
                    Some(PolicyGroup::Weft) => "daemonset/crds",
                    _ => kind.group(),
                };
                let of = "the object is there, and its status is not found (404)";
                let cause = "the definition of its kind lacks `subresources.status`";
                write!(formatter, "{of}: {cause}? Apply that of {from}")
            }
        }
    }
}

impl fmt::Debug for Writer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Writer").finish_non_exhaustive()
    }
}

async fn asked<T>(request: impl Future<Output = Result<T, kube::Error>>) -> Result<T, Failure> {
    within(REQUEST_TIMEOUT, request).await
}

async fn within<T>(
    patience: Duration,
    request: impl Future<Output = Result<T, kube::Error>>,
) -> Result<T, Failure> {
    match timeout(patience, request).await {
        Ok(answer) => answer.map_err(Failure::Refused),
        Err(_) => Err(Failure::Silent(patience)),
    }
}

/// How long to wait until all are looked through again. What is refused is not for this time either.
fn next_look(outcome: &Result<(), Failure>, pause: &mut Pause) -> Duration {
    match outcome {
        Err(failure) if failure.is_passing() => {
            pause.after_asked(Instant::now(), failure.asked_pause())
        }
        _ => {
            pause.reset();
            about(LOOK_THROUGH)
        }
    }
}

/// The patch that lets an object's status say what it should; none: it does, or is of another version.
fn to_write(object: &Value, status: &Status) -> Option<Value> {
    if !is_of_version(object, status) {
        return None;
    }
    // As the API has times: whole seconds.
    let now = Timestamp::from_second(Timestamp::now().as_second());
    let now = now.unwrap_or_default().to_string();
    let changed = conditions::changed(&object["status"], status, &now)?;
    let version = &object["metadata"]["resourceVersion"];
    Some(json!({"metadata": {"resourceVersion": version}, "status": changed}))
}

/// Whether an object, as the API server shows it, is the one that a status is about, and of that version.
fn is_of_version(object: &Value, status: &Status) -> bool {
    Version::of(object) == status.version
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::statuses::Content;

    #[test]
    fn only_what_it_is_about_gets_a_status() {
        let object = |uid: &str, generation: i64| {
            json!({"metadata": {"uid": uid, "generation": generation, "resourceVersion": "7"},
                "status": {"parents": [{"controllerName": "weft.dev/controller"}]}})
        };
        let status = Status {
            version: Version::of(&object("one", 1)),
            content: Content::Parents(vec![]),
        };
        let expected = json!({"metadata": {"resourceVersion": "7"}, "status": {"parents": []}});
        assert_eq!(to_write(&object("one", 1), &status), Some(expected));
        assert_eq!(to_write(&object("one", 2), &status), None);
        // Made anew under its name, and counted from 1 again.
        assert_eq!(to_write(&object("another", 1), &status), None);
    }
}
