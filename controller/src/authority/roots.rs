//! The roots in a ConfigMap, which agents mount: by these they know the controller before they can be told anything.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::ConfigMap;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::PostParams;
use kube::{Api, Client};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use weft_core::ObjectName;

use super::Authority;
use super::material::IN_SECRET;
use crate::pause::{Pause, about};
use crate::source::kubernetes::{asked_pause_of, explain};

/// The ConfigMap.
pub struct RootsConfigMap {
    /// The API server.
    pub client: Client,
    /// Namespace and name.
    pub name: ObjectName,
    /// Whose roots it holds.
    pub authority: Arc<Authority>,
}

/// How often it is looked whether it still says what it should,
const LOOK: Duration = Duration::from_secs(5);
/// and, after a failure, how soon again,
const RETRY: Duration = Duration::from_secs(1);
/// or after many.
const LONGEST_RETRY: Duration = Duration::from_secs(20);

impl RootsConfigMap {
    /// Keeps it current until it is stopped.
    pub async fn keep(self, stop: CancellationToken) {
        let mut changes = self.authority.changes();
        let no_failure = || Pause::new(RETRY, LONGEST_RETRY);
        let mut pause = no_failure();
        let keeping = async {
            loop {
                changes.mark_unchanged();
                let wait = match self.write().await {
                    Ok(()) => {
                        pause = no_failure();
                        self.report(None);
                        about(LOOK)
                    }
                    Err(error) => {
                        // Another controller wrote at the same moment: what, is seen the next time.
                        if !matches!(&error, kube::Error::Api(status) if status.code == 409) {
                            self.report(Some(explain(&error)));
                        }
                        pause.after_asked(Instant::now(), asked_pause_of(&error))
                    }
                };
                tokio::select! {
                    () = tokio::time::sleep(wait) => {}
                    // The sender lives as long as the authority does.
                    _ = changes.changed() => {}
                }
            }
        };
        tokio::select! { () = stop.cancelled() => {}, () = keeping => {} }
    }

    /// Writes it, if it does not say what it should. Two controllers that do so at once are told apart by the API
    /// server; the one that comes later looks again.
    async fn write(&self) -> Result<(), kube::Error> {
        let Some(roots) = self.authority.roots_as_pem() else {
            return Ok(());
        };
        let name = self.name.name.as_str();
        let api: Api<ConfigMap> =
            Api::namespaced(self.client.clone(), self.name.namespace.as_str());
        let parameters = PostParams::default();
        match api.get_opt(name).await? {
            None => {
                let map = ConfigMap {
                    metadata: ObjectMeta {
                        name: Some(name.to_owned()),
                        namespace: Some(self.name.namespace.to_string()),
                        ..ObjectMeta::default()
                    },
                    data: Some(BTreeMap::from([(IN_SECRET.roots.to_owned(), roots)])),
                    ..ConfigMap::default()
                };
                api.create(&parameters, &map).await?;
            }
            Some(map) if said(&map) == Some(&roots) => return Ok(()),
            Some(mut map) => {
                let data = map.data.get_or_insert_default();
                data.insert(IN_SECRET.roots.to_owned(), roots);
                api.replace(name, &parameters, &map).await?;
            }
        }
        tracing::info!(config_map = %self.name, "wrote the roots");
        Ok(())
    }

    fn report(&self, failure: Option<String>) {
        let place = format!("kubernetes: ConfigMap {}", self.name);
        let effect = "agents that start believe what it said before";
        let failure = failure.map(|it| (format!("the roots cannot be written: {it}"), effect));
        self.authority.problems.of_place(&place, failure);
    }
}

impl fmt::Debug for RootsConfigMap {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = formatter.debug_struct("RootsConfigMap");
        shown.field("name", &self.name).finish_non_exhaustive()
    }
}

/// Whether agents may have roots by it.
pub(super) fn has_roots(map: &ConfigMap) -> bool {
    let mut certificates = said(map).into_iter().flat_map(|it| {
        let pem = it.as_bytes();
        CertificateDer::pem_slice_iter(pem)
    });
    certificates.any(|it| it.is_ok())
}

fn said(map: &ConfigMap) -> Option<&String> {
    map.data.as_ref()?.get(IN_SECRET.roots)
}
