//! Controllers in a cluster: their pods, the way to them, and what is shown there, all by the API server and by what the
//! user may do.
//!
//! Nothing but the API server is connected to, and the user's own credentials are shown to nobody else: for the
//! controller, the API server is asked for a token of an account that may look into the mesh, and that is of use for nothing
//! else.

use std::fmt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use http::header::HeaderValue;
use k8s_openapi::api::authentication::v1::{TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{Namespace, Pod, ServiceAccount};
use kube::api::{ListParams, Patch, PatchParams, Portforwarder, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, Config};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Mutex;
use tokio::time::timeout;
use weft_controller::config::{INSPECTION_AUDIENCE, TAP_AUDIENCE};

use super::{Reach, USUAL_SOCKET};

/// A cluster that Weft is in.
pub struct Cluster {
    client: Client,
    /// Where its API server is, for people.
    server: String,
    weft_namespace: String,
    viewer: String,
    token: Mutex<Option<(Instant, HeaderValue)>>,
}

/// A port of a pod.
pub(super) struct Forwarded {
    forwarder: Portforwarder,
    pod: String,
}

/// Why a cluster cannot be asked.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// A kubeconfig cannot be used.
    #[error("the kubeconfig{of} cannot be used: {reason}")]
    Kubeconfig {
        /// Which one.
        of: String,
        /// What is wrong.
        reason: String,
    },
    /// Nothing says where the mesh is.
    #[error(
        "there is no socket of a controller at {USUAL_SOCKET}, and no cluster that kubectl would use: {0}: \
         --controller-socket or --kubeconfig say where the mesh is"
    )]
    Nowhere(String),
    /// A request failed.
    #[error("cannot {what} by {server}: {reason}")]
    Failed {
        /// What it was for.
        what: String,
        /// The API server.
        server: String,
        /// Why.
        reason: String,
    },
    /// Nobody's token lets watch.
    #[error(
        "there is no service account {namespace}/{account} that you may ask a token of, and {reason}: the Role weft-tap of \
         the manifests has what is needed (docs/cli.md)"
    )]
    NotToTap {
        /// What was to be watched.
        namespace: String,
        /// The account.
        account: String,
        /// Why another one does not help.
        reason: String,
    },
    /// There is no controller.
    #[error(
        "no controller runs in the namespace {namespace} of {server}: is Weft installed there, and is it that cluster? \
         --weft-namespace says where else it is"
    )]
    NoController {
        /// Where it was looked for.
        namespace: String,
        /// The API server.
        server: String,
    },
}

/// Where controllers serve on loopback, as the manifests say.
const PORT: u16 = 15016;
/// What pods of controllers are found by.
const LABEL: &str = "app.kubernetes.io/name=weft-controller";
/// How long a token is asked for: API servers give none for less.
const TOKEN_SECONDS: i64 = 600;
/// A token this old is not shown any more.
const TOKEN_AGE: Duration = Duration::from_secs(300);
/// How many objects are asked for at once.
const PAGE: u32 = 500;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// For what a kubelet says of a forward that failed.
const LAST_WORDS: Duration = Duration::from_secs(1);
const HINT: &str = "the Role weft-viewer of the manifests, in the namespace that Weft is in, has what it takes to look, \
    and weft-reach with weft-tap what it takes to watch (docs/cli.md): are they bound to you?";
const LABEL_HINT: &str = "to label needs get and patch of namespaces, or list and patch of pods";

impl Cluster {
    /// The one that is meant. Nothing is sent yet.
    pub(super) async fn connect(reach: &Reach) -> Result<Self, ClusterError> {
        let mut config = config(reach.kubeconfig.as_ref(), reach.context.as_ref()).await?;
        config.connect_timeout = Some(CONNECT_TIMEOUT);
        let server = config.cluster_url.to_string();
        let client = Client::try_from(config).map_err(|error| ClusterError::Kubeconfig {
            of: String::new(),
            reason: with_causes(&error),
        })?;
        Ok(Self {
            client,
            server,
            weft_namespace: reach.weft_namespace.clone(),
            viewer: reach.viewer.clone(),
            token: Mutex::default(),
        })
    }

    /// The namespace of the kubeconfig's context.
    pub(crate) fn namespace(&self) -> &str {
        self.client.default_namespace()
    }

    /// What requests are made with.
    pub(crate) fn client(&self) -> Client {
        self.client.clone()
    }

    /// Where the API server is, for people.
    pub(crate) fn server(&self) -> &str {
        &self.server
    }

    /// The namespace that Weft is in.
    pub(crate) fn weft_namespace(&self) -> &str {
        &self.weft_namespace
    }

    /// The pods that controllers run in, ready or not: those that are not can say why.
    pub(super) async fn controllers(&self) -> Result<Vec<String>, ClusterError> {
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &self.weft_namespace);
        let listed = pods.list(&ListParams::default().labels(LABEL)).await;
        let what = || format!("list pods in the namespace {}", self.weft_namespace);
        let listed = listed.map_err(|error| self.failed(what(), &error))?;
        let running = listed.items.into_iter().filter(runs);
        let mut names: Vec<String> = running.filter_map(|it| it.metadata.name).collect();
        names.sort();
        match names.is_empty() {
            false => Ok(names),
            true => Err(ClusterError::NoController {
                namespace: self.weft_namespace.clone(),
                server: self.server.clone(),
            }),
        }
    }

    /// What is shown to controllers.
    pub(super) async fn token(&self) -> Result<HeaderValue, ClusterError> {
        let mut token = self.token.lock().await;
        let usable = token.as_ref().filter(|(at, _)| at.elapsed() < TOKEN_AGE);
        if let Some((_, shown)) = usable {
            return Ok(shown.clone());
        }
        let at = Instant::now();
        let account = (self.weft_namespace.as_str(), self.viewer.as_str());
        let shown = self.ask_for_token(account, INSPECTION_AUDIENCE).await;
        let shown = shown.map_err(|(error, _)| error)?;
        *token = Some((at, shown.clone()));
        Ok(shown)
    }

    /// What is shown to controllers by who wants to watch: of an account in the namespace that is watched if there is one, or
    /// else in that which Weft is in.
    pub(super) async fn token_to_tap(
        &self,
        (namespace, account): (&str, &str),
    ) -> Result<HeaderValue, ClusterError> {
        let own = self.weft_namespace.as_str();
        let there = match namespace {
            "" => None,
            namespace => Some(self.ask_for_token((namespace, account), TAP_AUDIENCE).await),
        };
        match there {
            Some(Ok(shown)) => return Ok(shown),
            // There is none, or it is not theirs to use.
            Some(Err((_, 403 | 404))) | None => {}
            Some(Err((error, _))) => return Err(error),
        }
        let shown = self.ask_for_token((own, account), TAP_AUDIENCE).await;
        shown.map_err(|(error, code)| match code {
            403 | 404 if !namespace.is_empty() => ClusterError::NotToTap {
                namespace: namespace.to_owned(),
                account: account.to_owned(),
                reason: error.to_string(),
            },
            _ => error,
        })
    }

    /// A token for an audience. The error comes with its status of HTTP; 0: it has none.
    async fn ask_for_token(
        &self,
        (namespace, account): (&str, &str),
        audience: &str,
    ) -> Result<HeaderValue, (ClusterError, u16)> {
        let accounts: Api<ServiceAccount> = Api::namespaced(self.client.clone(), namespace);
        let request = TokenRequest {
            spec: TokenRequestSpec {
                audiences: vec![audience.to_owned()],
                expiration_seconds: Some(TOKEN_SECONDS),
                ..TokenRequestSpec::default()
            },
            ..TokenRequest::default()
        };
        let parameters = PostParams::default();
        let asked = accounts.create_token_request(account, &parameters, &request);
        let what = || format!("ask for a token of the service account {namespace}/{account}");
        let answered = asked.await.map_err(|error| {
            let code = match &error {
                kube::Error::Api(status) => status.code,
                _ => 0,
            };
            (self.failed(what(), &error), code)
        })?;
        let token = answered.status.map(|it| format!("Bearer {}", it.token));
        let header = token.and_then(|it| HeaderValue::try_from(it).ok());
        let none = || ClusterError::Failed {
            what: what(),
            server: self.server.clone(),
            reason: "the answer has no token".to_owned(),
        };
        let mut header = header.ok_or_else(|| (none(), 0))?;
        header.set_sensitive(true);
        Ok(header)
    }

    /// Forwards to the port of a controller's pod.
    pub(super) async fn forward(&self, pod: &str) -> Result<Forwarded, ClusterError> {
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &self.weft_namespace);
        let forwarder = pods.portforward(pod, &[PORT]).await;
        let what = || format!("forward a port to the pod {}/{pod}", self.weft_namespace);
        Ok(Forwarded {
            forwarder: forwarder.map_err(|error| self.failed(what(), &error))?,
            pod: pod.to_owned(),
        })
    }

    /// A namespace.
    pub(crate) async fn read_namespace(&self, name: &str) -> Result<Namespace, ClusterError> {
        let read = Api::<Namespace>::all(self.client.clone()).get(name).await;
        let what = || format!("read the namespace {name}");
        read.map_err(|error| self.failed_for(LABEL_HINT, what(), &error))
    }

    /// All pods of a namespace.
    pub(crate) async fn read_pods(&self, namespace: &str) -> Result<Vec<Pod>, ClusterError> {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
        let what = || format!("list pods in the namespace {namespace}");
        let mut page = ListParams::default().limit(PAGE);
        let mut pods = vec![];
        loop {
            let listed = api.list(&page).await;
            let listed = listed.map_err(|error| self.failed_for(LABEL_HINT, what(), &error))?;
            pods.extend(listed.items);
            match listed.metadata.continue_.filter(|it| !it.is_empty()) {
                Some(token) => page = page.continue_token(&token),
                None => return Ok(pods),
            }
        }
    }

    /// Changes a pod of a namespace, or without one a namespace, as the merge patch says (RFC 7386). False: it is gone.
    pub(crate) async fn patch(
        &self,
        namespace: Option<&str>,
        name: &str,
        patch: &serde_json::Value,
    ) -> Result<bool, ClusterError> {
        let parameters = PatchParams {
            field_manager: Some("weft".to_owned()),
            ..PatchParams::default()
        };
        let patch = Patch::Merge(patch);
        let (what, patched) = match namespace {
            Some(namespace) => {
                let api: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
                let patched = api.patch_metadata(name, &parameters, &patch).await;
                (format!("label the pod {namespace}/{name}"), patched.err())
            }
            None => {
                let api: Api<Namespace> = Api::all(self.client.clone());
                let patched = api.patch_metadata(name, &parameters, &patch).await;
                (format!("label the namespace {name}"), patched.err())
            }
        };
        match patched {
            None => Ok(true),
            Some(kube::Error::Api(status)) if status.code == 404 => Ok(false),
            Some(error) => Err(self.failed_for(LABEL_HINT, what, &error)),
        }
    }

    fn failed(&self, what: String, error: &kube::Error) -> ClusterError {
        self.failed_for(HINT, what, error)
    }

    fn failed_for(&self, hint: &str, what: String, error: &kube::Error) -> ClusterError {
        let said = match error {
            kube::Error::Api(status) => {
                let (code, message) = (status.code, status.message.trim());
                match code {
                    401 => format!("{message} (401): does kubectl work with this kubeconfig?"),
                    403 => format!("{message} (403): {hint}"),
                    _ => reason(error),
                }
            }
            error => reason(error),
        };
        ClusterError::Failed {
            what,
            server: self.server.clone(),
            reason: said,
        }
    }
}

impl fmt::Debug for Cluster {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = formatter.debug_struct("Cluster");
        shown.field("server", &self.server).finish_non_exhaustive()
    }
}

impl Forwarded {
    /// The bytes of the port.
    pub(super) fn stream(
        &mut self,
    ) -> Result<impl AsyncRead + AsyncWrite + Unpin + Send + use<>, ClusterError> {
        let stream = self.forwarder.take_stream(PORT);
        stream.ok_or_else(|| ClusterError::Failed {
            what: format!("forward a port to the pod {}", self.pod),
            server: "the API server".to_owned(),
            reason: "the stream is taken".to_owned(),
        })
    }

    /// Why there is no answer: what the kubelet says that went wrong, or, where the end of the stream came before its word,
    /// how the connection broke.
    pub(super) async fn failure(&mut self, broken: &str) -> String {
        let said = match self.forwarder.take_error(PORT) {
            Some(failure) => timeout(LAST_WORDS, failure).await.ok().flatten(),
            None => None,
        };
        let said = said.as_deref().map_or(broken, str::trim);
        format!("{said}: is it of a version that serves on port {PORT}, by WEFT_INSPECT?")
    }
}

impl Drop for Forwarded {
    fn drop(&mut self) {
        self.forwarder.abort();
    }
}

async fn config(
    kubeconfig: Option<&PathBuf>,
    context: Option<&String>,
) -> Result<Config, ClusterError> {
    let options = KubeConfigOptions {
        context: context.cloned(),
        ..KubeConfigOptions::default()
    };
    if let Some(path) = kubeconfig {
        let failed = |reason: kube::config::KubeconfigError| ClusterError::Kubeconfig {
            of: format!(" {}", path.display()),
            reason: with_causes(&reason),
        };
        let kubeconfig = Kubeconfig::read_from(path).map_err(failed)?;
        let config = Config::from_custom_kubeconfig(kubeconfig, &options).await;
        return config.map_err(failed);
    }
    if let Some(context) = context {
        let config = Config::from_kubeconfig(&options).await;
        return config.map_err(|reason| ClusterError::Kubeconfig {
            of: format!(" with the context {context}"),
            reason: with_causes(&reason),
        });
    }
    // As kubectl: the kubeconfig, or the cluster that this runs in.
    let config = Config::infer().await;
    config.map_err(|error| ClusterError::Nowhere(with_causes(&error)))
}

/// Whether somebody can be asked there.
fn runs(pod: &Pod) -> bool {
    let Some(status) = &pod.status else {
        return false;
    };
    let containers = status.container_statuses.iter().flatten();
    let mut states = containers.filter_map(|it| it.state.as_ref());
    pod.metadata.deletion_timestamp.is_none()
        && status.phase.as_deref() == Some("Running")
        && states.all(|it| it.running.is_some())
}

/// Why a request failed, without a hint what would help.
pub(crate) fn reason(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => format!("{} ({})", status.message.trim(), status.code),
        error => with_causes(error),
    }
}

/// A failure with what led to it, where that is not said already.
fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn only_pods_that_run_are_asked() {
        let pod = |metadata: Value, status: Value| {
            let pod = json!({"metadata": metadata, "status": status});
            runs(&serde_json::from_value(pod).expect("a pod"))
        };
        let running = json!({"phase": "Running", "containerStatuses": [
            {"name": "controller", "ready": false, "image": "", "imageID": "", "restartCount": 0, "state": {"running": {}}}]});
        let waiting = json!({"phase": "Running", "containerStatuses": [
            {"name": "controller", "ready": false, "image": "", "imageID": "", "restartCount": 7, "state": {"waiting": {}}}]});
        assert!(pod(json!({}), running.clone()));
        assert!(pod(json!({}), json!({"phase": "Running"})));
        assert!(!pod(
            json!({"deletionTimestamp": "2026-01-01T00:00:00Z"}),
            running
        ));
        assert!(!pod(json!({}), waiting));
        assert!(!pod(json!({}), json!({"phase": "Pending"})));
    }
}
