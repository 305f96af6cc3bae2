//! By what API servers know the webhook: the mesh's roots as the `caBundle` of its ValidatingWebhookConfiguration, kept
//! there by the controller that leads. Without them every call fails, and most of all when roots are exchanged.
//!
//! Nothing else of the object is written, and of its webhooks only those that are called by this one's name. Whatever else
//! it says, as which objects are asked about, is whose it is.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::ByteString;
use k8s_openapi::api::admissionregistration::v1::{
    ValidatingWebhook, ValidatingWebhookConfiguration,
};
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use serde_json::{Value, json};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use crate::authority::Authority;
use crate::leader::{Leadership, REQUEST_TIMEOUT};
use crate::pause::{Pause, about};
use crate::problems::Problems;
use crate::source::kubernetes::{asked_pause_of, explain};

/// Who keeps it.
pub struct CaBundle {
    /// The API server.
    pub client: Client,
    /// The ValidatingWebhookConfiguration.
    pub configuration: String,
    /// The name that the webhook is called by.
    pub name: String,
    /// Whose roots they are.
    pub authority: Arc<Authority>,
    /// Whether it is this controller's to write them.
    pub leadership: Leadership,
    /// Where it is said that they cannot be.
    pub problems: Problems,
}

/// Why it cannot be kept.
enum Failure {
    Refused(kube::Error),
    Silent,
    /// What was written was somebody else's when it was looked at next.
    Overwritten,
}

/// How often it is looked whether it still says what it should,
const LOOK: Duration = Duration::from_secs(10);
/// and, after a failure, how soon again,
const RETRY: Duration = Duration::from_secs(1);
/// or after many.
const LONGEST_RETRY: Duration = Duration::from_secs(60);

impl CaBundle {
    /// Keeps it current for as long as this controller leads, until it is stopped.
    pub async fn keep(mut self, stop: CancellationToken) {
        let keeping = async {
            loop {
                self.leadership.begins().await;
                tokio::select! { () = self.leadership.ends() => {}, () = self.lead() => {} }
                // Whoever leads now says what fails there.
                self.report(None);
            }
        };
        stop.run_until_cancelled(keeping).await;
    }

    async fn lead(&self) {
        let mut changes = self.authority.changes();
        let no_failure = || Pause::new(RETRY, LONGEST_RETRY);
        let mut pause = no_failure();
        let mut before = Before::default();
        loop {
            changes.mark_unchanged();
            let written = timeout(REQUEST_TIMEOUT, self.write()).await;
            let written = written.map_or(Err(Failure::Silent), |it| it.map_err(Failure::Refused));
            let written = written.and_then(|roots| before.wrote(roots));
            let wait = match &written {
                Ok(()) => {
                    pause = no_failure();
                    self.report(None);
                    about(LOOK)
                }
                // Somebody else wrote at the same moment: what, is seen the next time.
                Err(Failure::Refused(kube::Error::Api(status))) if status.code == 409 => {
                    pause.after(Instant::now())
                }
                Err(failure) => {
                    self.report(Some(failure));
                    let asked = match failure {
                        Failure::Refused(error) => asked_pause_of(error),
                        Failure::Silent | Failure::Overwritten => None,
                    };
                    let wait = pause.after_asked(Instant::now(), asked);
                    match failure {
                        // No sooner than it would be looked at anyway.
                        Failure::Overwritten => wait.max(about(LOOK)),
                        Failure::Refused(_) | Failure::Silent => wait,
                    }
                }
            };
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                // The sender lives as long as the authority does.
                _ = changes.changed() => {}
            }
        }
    }

    /// Writes it, if it does not say what it should, and nobody wrote since that was seen. Who has no configuration asks for
    /// no webhook. What was written; none: nothing was to be.
    async fn write(&self) -> Result<Option<String>, kube::Error> {
        let Some(roots) = self.authority.roots_as_pem() else {
            return Ok(None);
        };
        let api: Api<ValidatingWebhookConfiguration> = Api::all(self.client.clone());
        let Some(configuration) = api.get_opt(&self.configuration).await? else {
            return Ok(None);
        };
        let Some(patch) = patch(&configuration, &self.name, &roots) else {
            return Ok(None);
        };
        let parameters = PatchParams::default();
        let patch = Patch::Strategic(patch);
        api.patch(&self.configuration, &parameters, &patch).await?;
        tracing::info!(
            configuration = self.configuration,
            "wrote the roots that API servers know the webhook by"
        );
        Ok(Some(roots))
    }

    fn report(&self, failure: Option<&Failure>) {
        let of = &self.configuration;
        let place = format!("kubernetes: ValidatingWebhookConfiguration {of}");
        let effect = "API servers know the webhook by what it said before, or not at all: whether objects are refused or stored \
                      then is its failurePolicy's to say";
        let reason = |failure: &Failure| {
            match failure {
            Failure::Refused(kube::Error::Api(status)) if status.code == 403 => format!(
                "{} (403): this controller needs the rights to get and patch validatingwebhookconfigurations of the \
                 name {of:?}: they are in daemonset/components/webhook",
                status.message.trim()
            ),
            Failure::Refused(error) => explain(error),
            Failure::Silent => format!("no answer within {} s", REQUEST_TIMEOUT.as_secs()),
            Failure::Overwritten => "somebody else writes another one whenever it was written: another controller of this \
                                     mesh or of another one, or what applies manifests again and again (let it ignore \
                                     webhooks[].clientConfig.caBundle)"
                .to_owned(),
        }
        };
        let failure = failure.map(|it| {
            (
                format!("its caBundle cannot be kept: {}", reason(it)),
                effect,
            )
        });
        self.problems.of_place(&place, failure);
    }
}

/// What was written when it was looked at last.
#[derive(Debug, Default)]
struct Before(Option<String>);

impl Before {
    /// Takes in what was written now, if it had to be.
    ///
    /// # Errors
    /// The same was written before, and did not stay.
    fn wrote(&mut self, roots: Option<String>) -> Result<(), Failure> {
        let is_again = roots.is_some() && self.0 == roots;
        self.0 = roots;
        match is_again {
            true => Err(Failure::Overwritten),
            false => Ok(()),
        }
    }
}

impl std::fmt::Debug for CaBundle {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut shown = formatter.debug_struct("CaBundle");
        shown
            .field("configuration", &self.configuration)
            .finish_non_exhaustive()
    }
}

/// What is to be changed, by a strategic merge: webhooks are told apart by their names. None: nothing.
fn patch(of: &ValidatingWebhookConfiguration, name: &str, roots: &str) -> Option<Value> {
    let webhooks = of.webhooks.iter().flatten();
    let ours = webhooks.filter(|it| called(it).as_deref() == Some(name));
    let lacks = |it: &&ValidatingWebhook| {
        let said = it.client_config.ca_bundle.as_ref();
        said.is_none_or(|it| it.0 != roots.as_bytes())
    };
    let roots = ByteString(roots.as_bytes().to_vec());
    let changed =
        |it: &ValidatingWebhook| json!({"name": it.name, "clientConfig": {"caBundle": roots}});
    let changed: Vec<Value> = ours.filter(lacks).map(changed).collect();
    let version = &of.metadata.resource_version;
    (!changed.is_empty())
        .then(|| json!({"metadata": {"resourceVersion": version}, "webhooks": changed}))
}

/// The name that API servers call a webhook by, as they expect it in its certificate.
fn called(webhook: &ValidatingWebhook) -> Option<String> {
    let config = &webhook.client_config;
    match (&config.service, &config.url) {
        (Some(service), _) => Some(format!("{}.{}.svc", service.name, service.namespace)),
        (None, Some(url)) => {
            let uri: hyper::Uri = url.parse().ok()?;
            uri.host().map(str::to_owned)
        }
        (None, None) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAME: &str = "weft-webhook.weft-system.svc";

    fn service(name: &str, namespace: &str) -> Value {
        json!({"service": {"name": name, "namespace": namespace}})
    }

    #[test]
    fn who_writes_the_same_again_and_again_is_not_alone() {
        let mut before = Before::default();
        let mut is_good = |roots: Option<&str>| before.wrote(roots.map(str::to_owned)).is_ok();
        assert!(is_good(Some("a")));
        assert!(!is_good(Some("a")) && !is_good(Some("a")));
        assert!(is_good(Some("b")), "other roots are to be written");
        assert!(!is_good(Some("b")));
        assert!(is_good(None), "it stayed");
        assert!(is_good(Some("b")));
    }

    /// How a webhook is called, and what it knows it by -> what is written.
    #[test]
    fn what_is_called_by_this_name_gets_the_roots() {
        let ours = || service("weft-webhook", "weft-system");
        // "roots" and "older", in base64.
        let knows = |mut of: Value, bundle: &str| {
            of["caBundle"] = json!(bundle);
            of
        };
        for (config, is_written) in [
            (ours(), true),
            (knows(ours(), "b2xkZXI="), true),
            (knows(ours(), "cm9vdHM="), false),
            (service("weft-webhook", "other"), false),
            (service("other", "weft-system"), false),
            (
                json!({"url": format!("https://{NAME}:15013/validate")}),
                true,
            ),
            (json!({"url": "https://example.com/validate"}), false),
            (json!({}), false),
        ] {
            let webhook = |name: &str, config: &Value| {
                json!({"name": name, "clientConfig": config, "sideEffects": "None",
                    "admissionReviewVersions": ["v1"]})
            };
            let other = service("stranger", "weft-system");
            let webhooks = [webhook("a", &other), webhook("b", &config)];
            let configuration = json!({"metadata": {"name": "weft-webhook", "resourceVersion": "7"},
                "webhooks": webhooks});
            let configuration = serde_json::from_value(configuration).expect("one");
            let expected = json!({"metadata": {"resourceVersion": "7"},
                "webhooks": [{"name": "b", "clientConfig": {"caBundle": "cm9vdHM="}}]});
            let written = patch(&configuration, NAME, "roots");
            assert_eq!(written, is_written.then_some(expected), "{config}");
        }
    }
}
