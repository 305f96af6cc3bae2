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

use super::{Next, Status, Statuses, conditions, events, has_status};
use crate::leader::Leadership;
use crate::objects::{ObjectKey, ObjectKind};
use crate::pause::{Pause, about};
use crate::problems::Problems;
use crate::source::kubernetes::{Document, Served, explain, served};
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
    Silent,
}

/// Objects per second, at most.
const PACE: Duration = Duration::from_millis(40);
/// How often all are looked through.
const LOOK_THROUGH: Duration = Duration::from_secs(600);
/// Objects per page.
const PAGE: u32 = 500;
/// How long a request may take: see [`crate::leader`].
const REQUEST_TIMEOUT: Duration = Duration::from_secs(4);
/// How often it is looked whether this controller still leads.
const LOOK: Duration = Duration::from_secs(1);
/// How long to wait after a failure; longer after each, up to
const SHORTEST_PAUSE: Duration = Duration::from_millis(500);
/// this.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
const PLACE: &str = "kubernetes: statuses";
const EVENTS: &str = "kubernetes: Events";

impl Writer {
    /// Writes until it is stopped.
    pub async fn run(mut self, stop: CancellationToken) {
        let writing = async {
            let mut changes = self.views.changes();
            while !self.views.is_complete() && changes.changed().await.is_ok() {}
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
        let mut pause = Pause::new(SHORTEST_PAUSE, LONGEST_PAUSE);
        let mut kinds = Served::new();
        let mut due = Instant::now() + about(LOOK_THROUGH);
        while self.leadership.leads() {
            let next = tokio::select! {
                next = self.statuses.next() => next,
                () = tokio::time::sleep_until(due) => Next::All,
                () = tokio::time::sleep(LOOK) => continue,
            };
            pace.tick().await;
            let done = match &next {
                Next::All => self.look_through(&mut kinds).await,
                Next::One(key) => self.one(&mut kinds, key).await,
            };
            match done {
                Ok(()) if next == Next::All => due = Instant::now() + about(LOOK_THROUGH),
                Ok(()) => {}
                Err(failure) => {
                    self.failed(&next, &failure);
                    if failure.is_passing() {
                        self.statuses.again(next);
                        tokio::time::sleep(pause.after(Instant::now())).await;
                    }
                }
            }
        }
    }

    /// Finds those that do not say what they should.
    async fn look_through(&self, kinds: &mut Served) -> Result<(), Failure> {
        *kinds = asked(served(&self.client)).await?;
        for (kind, resource) in kinds.iter().filter(|(kind, _)| has_status(**kind)) {
            let api: Api<Document> = Api::all_with(self.client.clone(), resource);
            let mut page = ListParams::default().limit(PAGE);
            loop {
                let list = asked(api.list(&page)).await?;
                for object in &list.items {
                    self.look(*kind, &object.value).await;
                }
                let token = list.metadata.continue_.filter(|it| !it.is_empty());
                let Some(token) = token else { break };
                page = page.continue_token(&token);
            }
        }
        Ok(())
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
            self.statuses.again(Next::One(key));
        }
    }

    /// Says what is to be said on an object.
    async fn one(&self, kinds: &mut Served, key: &ObjectKey) -> Result<(), Failure> {
        let saying = self.statuses.of(key).await;
        if saying.status.is_none() && saying.unusable.is_none() {
            return Ok(());
        }
        if !kinds.contains_key(&key.kind) {
            *kinds = asked(served(&self.client)).await?;
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
        asked(api.patch_status(key.name.as_str(), &parameters, &patch)).await?;
        self.metrics.status("written");
        self.problems.of_place(PLACE, None);
        Ok(())
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

    fn failed(&self, next: &Next, failure: &Failure) {
        let result = match failure.code() {
            // Somebody else wrote meanwhile: it is read again.
            Some(409) => "conflict",
            // It is gone.
            Some(404) => return,
            Some(_) if !failure.is_passing() => "refused",
            _ => "failed",
        };
        self.metrics.status(result);
        if result == "conflict" {
            return;
        }
        let of = match next {
            Next::One(key) => key.to_string(),
            Next::All => "all objects".to_owned(),
        };
        let effect = "what is said on objects is older";
        let reason = format!("the status of {of} cannot be written: {failure}");
        self.problems.of_place(PLACE, Some((reason, effect)));
    }
}

impl Failure {
    fn code(&self) -> Option<u16> {
        match self {
            Self::Refused(kube::Error::Api(status)) => Some(status.code),
            _ => None,
        }
    }

    /// Whether it may succeed later, as it is.
    fn is_passing(&self) -> bool {
        match self.code() {
            Some(code) => matches!(code, 408 | 409 | 410 | 429 | 500..),
            None => true,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(error) => formatter.write_str(&explain(error)),
            Self::Silent => {
                let seconds = REQUEST_TIMEOUT.as_secs();
                write!(formatter, "no answer within {seconds} s")
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
    match timeout(REQUEST_TIMEOUT, request).await {
        Ok(answer) => answer.map_err(Failure::Refused),
        Err(_) => Err(Failure::Silent),
    }
}

/// The patch that lets an object's status say what it should; none: it does, or is of another version.
fn to_write(object: &Value, status: &Status) -> Option<Value> {
    let metadata = &object["metadata"];
    if metadata["generation"].as_i64() != status.generation {
        return None;
    }
    // As the API has times: whole seconds.
    let now = Timestamp::from_second(Timestamp::now().as_second());
    let now = now.unwrap_or_default().to_string();
    let changed = conditions::changed(&object["status"], status, &now)?;
    let version = &metadata["resourceVersion"];
    Some(json!({"metadata": {"resourceVersion": version}, "status": changed}))
}
