//! The issuer in a Secret of the controller's own namespace: made there if nobody did, and followed by its name alone, so
//! that no right to read other Secrets is needed.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::PostParams;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use weft_core::ObjectName;

use super::material::{IN_SECRET, Material};
use super::roots::has_roots;
use super::{Authority, IssuerError};
use crate::pause::Pause;
use crate::source::kubernetes::{asked_pause_of, asked_pause_of_watch, explain, explain_watch};

/// The Secret.
pub struct IssuerSecret {
    /// The API server.
    pub client: Client,
    /// Namespace and name.
    pub name: ObjectName,
    /// The ConfigMap with the roots that agents have.
    pub roots: ObjectName,
    /// Whether it is made if it is not there.
    pub make: bool,
    /// Who gets what is in it.
    pub authority: Arc<Authority>,
}

/// It has to be listed anew, and not before this, if the server asks for that.
struct Anew(Option<Duration>);

/// It cannot be read or made: why, and how long the server asks to wait.
struct Failure(String, Option<Duration>);

const TLS: &str = "kubernetes.io/tls";
/// How long the server lets a watch last.
const WATCH_SECONDS: u32 = 105;
/// How long to wait after a failure; longer after each, up to
const SHORTEST_PAUSE: Duration = Duration::from_millis(500);
/// this.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// What a Secret is called in problems.
pub(crate) fn shown(name: &ObjectName) -> String {
    format!("kubernetes: Secret {name}")
}

impl IssuerSecret {
    /// Follows it until it is stopped.
    pub async fn follow(self, stop: CancellationToken) {
        let mut pause = Pause::new(SHORTEST_PAUSE, LONGEST_PAUSE);
        let following = async {
            loop {
                let Anew(asked) = self.once(pause.quiet()).await;
                let wait = pause.after_asked(Instant::now(), asked);
                tokio::time::sleep(wait).await;
            }
        };
        tokio::select! { () = stop.cancelled() => {}, () = following => {} }
    }

    /// Follows it until it is better to begin anew; a watch that has not failed for `quiet` works.
    async fn once(&self, quiet: Duration) -> Anew {
        let api: Api<Secret> = self.api(&self.name);
        let config = watcher::Config::default()
            .fields(&format!("metadata.name={}", self.name.name))
            .timeout(WATCH_SECONDS);
        let events = watcher(api, config);
        let mut events = std::pin::pin!(events);
        let mut found = false;
        let mut failed = true;
        loop {
            // An outage that ended without any change since is noticed by its failures staying out.
            let event = tokio::select! {
                event = events.next() => event,
                () = tokio::time::sleep(quiet), if failed => {
                    failed = false;
                    self.watches(None);
                    continue;
                }
            };
            match event {
                Some(Ok(event)) => {
                    if !matches!(event, Event::Init) {
                        failed = false;
                        self.watches(None);
                    }
                    match event {
                        Event::Init => found = false,
                        Event::InitApply(secret) | Event::Apply(secret) => {
                            found = true;
                            self.take(&secret);
                        }
                        Event::InitDone if found => {}
                        Event::InitDone | Event::Delete(_) => {
                            if let Err(Failure(reason, asked)) = self.absent().await {
                                self.authority.report(&reason);
                                return Anew(asked);
                            }
                        }
                    }
                }
                Some(Err(error)) => {
                    self.watches(Some(explain_watch(&error)));
                    return Anew(asked_pause_of_watch(&error));
                }
                None => return Anew(None),
            }
        }
    }

    fn take(&self, secret: &Secret) {
        match material(secret) {
            Ok(material) => {
                self.authority.bring(material);
            }
            Err(error) => self.authority.report(&error),
        }
    }

    /// It is not there. An error: it is to be looked at again.
    async fn absent(&self) -> Result<(), Failure> {
        if !self.make {
            let reason = "the Secret is not there, and is waited for (--wait-for-issuer)";
            self.authority.report(&reason);
            return Ok(());
        }
        // It was deleted: a new root would cut off everybody who has this one.
        if let Some(loaded) = self.authority.loaded.load_full() {
            return self.write(&loaded.material).await;
        }
        let roots: Api<ConfigMap> = self.api(&self.roots);
        let roots = roots.get_opt(self.roots.name.as_str()).await;
        let roots = roots.map_err(|error| {
            let reason = explain(&error);
            let reason = format!("ConfigMap {}: cannot be read: {reason}", self.roots);
            Failure(reason, asked_pause_of(&error))
        })?;
        // Never repaired by guessing: a new root would cut off everybody who has the old one.
        if roots.is_some_and(|it| has_roots(&it)) {
            let reason = format!(
                "the Secret is gone, and agents have the roots in ConfigMap {}: restore the Secret; or \
                 delete the ConfigMap too, to begin with a new root that nobody has yet",
                self.roots
            );
            return Err(Failure(reason, None));
        }
        let new = Material::new(IN_SECRET, &self.authority.trust_domain);
        let new = new.map_err(|error| Failure(format!("no root can be made: {error}"), None))?;
        self.write(&new).await
    }

    async fn write(&self, material: &Material) -> Result<(), Failure> {
        let bytes = |it: &[u8]| ByteString(it.to_vec());
        let secret = Secret {
            metadata: ObjectMeta {
                name: Some(self.name.name.to_string()),
                namespace: Some(self.name.namespace.to_string()),
                ..ObjectMeta::default()
            },
            type_: Some(TLS.to_owned()),
            data: Some(BTreeMap::from([
                (IN_SECRET.roots.to_owned(), bytes(&material.roots)),
                (
                    IN_SECRET.certificate.to_owned(),
                    bytes(&material.certificate),
                ),
                (IN_SECRET.key.to_owned(), bytes(&material.key)),
            ])),
            ..Secret::default()
        };
        let api: Api<Secret> = self.api(&self.name);
        match api.create(&PostParams::default(), &secret).await {
            Ok(_) => {
                tracing::info!(secret = %self.name, "wrote the issuer");
                Ok(())
            }
            // Somebody else was faster; the watch tells what is there.
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(()),
            Err(error) => {
                let reason = format!("the Secret cannot be made: {}", explain(&error));
                Err(Failure(reason, asked_pause_of(&error)))
            }
        }
    }

    fn watches(&self, failure: Option<String>) {
        let effect = match self.authority.has_issuer() {
            true => "the issuer and roots before stay in force",
            false => "nobody can connect, and nothing is signed, until it can be read",
        };
        let failure = failure.map(|it| (it, effect));
        self.authority
            .problems
            .of_place(&shown(&self.name), failure);
    }

    fn api<K>(&self, of: &ObjectName) -> Api<K>
    where
        K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope>,
        K::DynamicType: Default,
    {
        Api::namespaced(self.client.clone(), of.namespace.as_str())
    }
}

impl fmt::Debug for IssuerSecret {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = formatter.debug_struct("IssuerSecret");
        shown.field("name", &self.name).finish_non_exhaustive()
    }
}

fn material(secret: &Secret) -> Result<Material, IssuerError> {
    let part = |file: &'static str| {
        let data = secret.data.as_ref().and_then(|it| it.get(file));
        let missing = || IssuerError::Content {
            file,
            reason: "missing".to_owned(),
        };
        data.map(|it| it.0.clone()).ok_or_else(missing)
    };
    Ok(Material {
        names: IN_SECRET,
        roots: part(IN_SECRET.roots)?,
        certificate: part(IN_SECRET.certificate)?,
        key: part(IN_SECRET.key)?,
    })
}
