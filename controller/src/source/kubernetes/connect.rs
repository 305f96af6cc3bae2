//! Finds the API server, and says what to do when that fails.

use std::path::PathBuf;
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use http::{Response, StatusCode};
use http_body_util::{BodyExt, Full};
use kube::client::{ClientBuilder, DynBody};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::core::response::StatusDetails;
use kube::core::{ApiResource, Status};
use kube::runtime::watcher;
use kube::{Client, Config};
use tower::BoxError;
use tower::util::AndThenLayer;

/// Where the API server is.
#[derive(Clone, Debug, Default)]
pub struct Connection {
    /// A kubeconfig. None: the service account of the pod that this runs in, or, outside of a cluster, what kubectl
    /// would use.
    pub kubeconfig: Option<PathBuf>,
    /// The context in it. None: its current one.
    pub context: Option<String>,
}

/// Why the API server cannot be found.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// A kubeconfig cannot be used.
    #[error("the kubeconfig{of} cannot be used: {reason}{hint}")]
    Kubeconfig {
        /// Which one.
        of: String,
        /// What is wrong with it.
        reason: kube::config::KubeconfigError,
        /// What to do.
        hint: &'static str,
    },
    /// The service account cannot be used.
    #[error(
        "this looks like a pod of a cluster, whose service account cannot be used: {0}: is \
         automountServiceAccountToken off? --kubeconfig says otherwise where the API server is"
    )]
    InCluster(kube::config::InClusterError),
    /// No client can be made of it.
    #[error("no client can be made of what says where the API server is: {0}")]
    Client(kube::Error),
}

/// An answer has to begin within this time, and to go on within it: longer than a quiet watch lasts.
const READ_TIMEOUT: Duration = Duration::from_secs(super::WATCH_SECONDS as u64 + 15);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

impl Connection {
    /// A client for it. Nothing is sent yet.
    ///
    /// # Errors
    /// It is not said where the API server is, or not as it should be.
    pub async fn client(&self) -> Result<Client, ConnectError> {
        let mut config = self.config().await?;
        config.connect_timeout = Some(CONNECT_TIMEOUT);
        config.read_timeout = Some(READ_TIMEOUT);
        config.reset_reader_on_write = true;
        // Whoever asks here waits and asks again; in one place, and never at the same moment as others.
        config.default_retry = false;
        let builder = ClientBuilder::try_from(config).map_err(ConnectError::Client)?;
        Ok(builder.with_layer(&AndThenLayer::new(pausing)).build())
    }

    async fn config(&self) -> Result<Config, ConnectError> {
        let options = KubeConfigOptions {
            context: self.context.clone(),
            ..KubeConfigOptions::default()
        };
        if let Some(path) = &self.kubeconfig {
            let failed = |reason| ConnectError::Kubeconfig {
                of: format!(" {}", path.display()),
                reason,
                hint: "",
            };
            let kubeconfig = Kubeconfig::read_from(path).map_err(failed)?;
            let config = Config::from_custom_kubeconfig(kubeconfig, &options).await;
            return config.map_err(failed);
        }
        if self.context.is_none() && std::env::var_os("KUBERNETES_SERVICE_HOST").is_some() {
            return Config::incluster().map_err(ConnectError::InCluster);
        }
        let config = Config::from_kubeconfig(&options).await;
        config.map_err(|reason| ConnectError::Kubeconfig {
            of: String::new(),
            reason,
            hint: ": outside of a cluster, say by --kubeconfig where the API server is",
        })
    }
}

type Answer = Response<Box<DynBody>>;

fn pausing(answer: Answer) -> BoxFuture<'static, Result<Answer, BoxError>> {
    with_pause(answer).boxed()
}

/// Puts the pause that an answer asks for by a header (RFC 9110, section 10.2.3) into the status in its body, where
/// clients find it. Often that is plain text: the server has not even looked at the request.
async fn with_pause(answer: Answer) -> Result<Answer, BoxError> {
    let code = answer.status();
    let asks = matches!(
        code,
        StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE
    );
    let header = answer.headers().get(http::header::RETRY_AFTER);
    let seconds = header.and_then(|it| it.to_str().ok()?.trim().parse().ok());
    let Some(seconds) = seconds.filter(|_| asks) else {
        return Ok(answer);
    };
    let (head, mut body) = answer.into_parts();
    // Whatever the reason is, it is a failure that asks for a pause.
    let mut text = vec![];
    while let Some(Ok(frame)) = body.frame().await
        && text.len() < LONGEST_REASON
    {
        text.extend_from_slice(frame.data_ref().map_or(&[], |it| it));
    }
    let mut status: Status = serde_json::from_slice(&text).unwrap_or_else(|_| {
        let message = String::from_utf8_lossy(&text);
        Status::failure(message.trim(), "TooManyRequests").with_code(code.as_u16())
    });
    let details = status.details.get_or_insert_with(|| StatusDetails {
        name: String::new(),
        group: String::new(),
        kind: String::new(),
        uid: String::new(),
        causes: vec![],
        retry_after_seconds: 0,
    });
    details.retry_after_seconds = seconds;
    let body = Full::from(serde_json::to_vec(&status)?).map_err(|never| match never {});
    Ok(Response::from_parts(head, Box::new(body)))
}

pub(super) const LONGEST_ASKED_PAUSE: Duration = Duration::from_secs(60);
/// What an answer may say at most that asks for a pause.
const LONGEST_REASON: usize = 64 * 1024;

/// The pause that the server asks for.
pub(super) fn asked_pause(error: &kube::Error) -> Option<Duration> {
    let kube::Error::Api(status) = error else {
        return None;
    };
    let seconds = status.details.as_ref()?.retry_after_seconds;
    (seconds > 0).then(|| Duration::from_secs(seconds.into()))
}

/// The same, as long as whoever waits for it and nothing else lets a server have it.
pub(crate) fn asked_pause_of(error: &kube::Error) -> Option<Duration> {
    asked_pause(error).map(|it| it.min(LONGEST_ASKED_PAUSE))
}

/// The same, of a watch.
pub(crate) fn asked_pause_of_watch(error: &watcher::Error) -> Option<Duration> {
    match error {
        watcher::Error::InitialListFailed(error)
        | watcher::Error::WatchStartFailed(error)
        | watcher::Error::WatchFailed(error) => asked_pause_of(error),
        watcher::Error::WatchError(_) | watcher::Error::NoResourceVersion => None,
    }
}

/// The status of an answer that is a failure.
pub(super) fn status_of(error: &kube::Error) -> Option<u16> {
    match error {
        kube::Error::Api(status) => Some(status.code),
        _ => None,
    }
}

/// An answer without the version that every list and event has.
pub(super) fn no_version() -> kube::Error {
    let message = "the server told no resourceVersion";
    kube::Error::Api(Box::new(Status::failure(message, "")))
}

pub(super) fn no_word() -> kube::Error {
    let message = "the server said nothing for longer than a watch lasts";
    kube::Error::Api(Box::new(Status::failure(message, "")))
}

/// What a failed request for objects of a kind means, and what to do.
pub(super) fn explain_of(error: &kube::Error, verb: &str, of: &ApiResource) -> String {
    match error {
        kube::Error::Api(status) if status.code == 403 => format!(
            "{} (403): this controller needs the right to {verb} the resource {} of API group {:?} in all \
             namespaces: it is in the ClusterRole weft-controller (daemonset/base/rbac.yaml): is that up to date, and \
             bound to this controller's service account?",
            status.message.trim(),
            of.plural,
            of.group,
        ),
        _ => explain(error),
    }
}

/// What a failed watch means, and what to do.
pub(crate) fn explain_watch(error: &watcher::Error) -> String {
    match error {
        watcher::Error::InitialListFailed(error) => format!("cannot list: {}", explain(error)),
        watcher::Error::WatchStartFailed(error) => format!("cannot watch: {}", explain(error)),
        watcher::Error::WatchFailed(error) => format!("the watch broke: {}", explain(error)),
        watcher::Error::WatchError(status) => format!("the watch failed: {}", status.message),
        watcher::Error::NoResourceVersion => "the server told no resourceVersion".to_owned(),
    }
}

/// What a failed request means, and what to do.
pub(crate) fn explain(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) if status.code == 401 => format!(
            "{} (401): is the token or certificate of this controller still valid?",
            status.message
        ),
        kube::Error::Api(status) if status.code == 403 => format!(
            "{} (403): is Weft's ClusterRole bound to this controller's service account?",
            status.message
        ),
        kube::Error::Api(status) => format!("{} ({})", status.message.trim(), status.code),
        kube::Error::HyperError(_) | kube::Error::Service(_) => {
            format!(
                "{}: is the API server's address right, and reachable from here?",
                causes(error)
            )
        }
        other => causes(other),
    }
}

/// An error with what it came from: the outermost alone says little.
fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}
