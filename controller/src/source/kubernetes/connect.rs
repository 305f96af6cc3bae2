//! Finds the API server, and says what to do when that fails.

use std::path::PathBuf;
use std::time::Duration;

use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::runtime::watcher;
use kube::{Client, Config};

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
        Client::try_from(config).map_err(ConnectError::Client)
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
