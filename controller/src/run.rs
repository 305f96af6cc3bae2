//! `weft-controller run`: puts the parts together, and ends them in order.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context;
use kube::Client;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use weft_core::TrustBundle;
use weft_proto::Resource;

use crate::admin::Admin;
use crate::authority::{IssuerSecret, RootsConfigMap};
use crate::config::{Run, SourceChoice};
use crate::control;
use crate::control::agents::Agents;
use crate::control::authentication::pods::AgentPods;
use crate::control::tls::Serving;
use crate::index::{Index, Settings};
use crate::leader::{Candidate, Leadership};
use crate::problems::Problems;
use crate::source::directory::Directory;
use crate::source::kubernetes::Kubernetes;
use crate::source::{Batch, Source};
use crate::statuses::Statuses;
use crate::statuses::writer::Writer;
use crate::telemetry::{Metrics, State};
use crate::views::{Audience, Changes, Views};

mod parts;

/// How often the authority's files and the join tokens are looked at.
const LOOK: Duration = Duration::from_secs(1);
/// How long streams may take to end.
const DRAIN: Duration = Duration::from_secs(5);

/// A controller that is ready to serve: its ports are bound, its files were read.
#[derive(Debug)]
pub struct Controller {
    config: Run,
    listener: TcpListener,
    admin_listener: TcpListener,
    serving: Arc<Serving>,
    serving_until: SystemTime,
    server: control::Server,
    problems: Problems,
    source: AnySource,
    agent_pods: Arc<AgentPods>,
    identity: Option<(IssuerSecret, RootsConfigMap)>,
    candidate: Option<Candidate>,
    leadership: Leadership,
}

/// A source of either kind, ready to run.
#[derive(Debug)]
enum AnySource {
    Directory(Directory),
    Kubernetes(Box<Kubernetes>),
}

impl AnySource {
    /// The source, given a client where it is a cluster.
    fn of(
        config: &Run,
        client: Option<Client>,
        problems: Problems,
        metrics: &Arc<Metrics>,
    ) -> anyhow::Result<Self> {
        Ok(match &config.source {
            SourceChoice::Directory(path) => {
                Self::Directory(Directory::new(path.clone(), problems))
            }
            SourceChoice::Kubernetes => {
                let client = client.context("--source kubernetes")?;
                let believe = config.believe_netns_annotations;
                let source = Kubernetes::new(client, believe, problems);
                Self::Kubernetes(Box::new(source.counting(metrics.clone())))
            }
        })
    }

    fn start(
        self,
        batches: mpsc::Sender<Batch>,
        stop: CancellationToken,
    ) -> tokio::task::JoinHandle<anyhow::Result<()>> {
        match self {
            Self::Directory(source) => tokio::spawn(source.run(batches, stop)),
            Self::Kubernetes(source) => tokio::spawn(source.run(batches, stop)),
        }
    }
}

impl Controller {
    /// Reads the files and binds the ports.
    ///
    /// # Errors
    /// What is configured cannot be used, and why.
    pub async fn open(config: Run, stop: CancellationToken) -> anyhow::Result<Self> {
        config.check()?;
        let problems = Problems::default();
        let views = Arc::new(Views::default());
        let client = parts::client(&config).await?;
        let metrics = Arc::new(Metrics::default());
        let source = AnySource::of(&config, client.clone(), problems.clone(), &metrics)?;
        let agents_namespace = config.agent_service_account.namespace.clone();
        let agent_pods = Arc::new(AgentPods::new(agents_namespace));
        let identity = parts::identity(&config, client.as_ref());
        let authority = Arc::new(parts::authority(&config, identity.as_ref(), &problems)?);
        let identity = identity.map(|it| it.kept_for(&authority));
        let (candidate, leadership) = parts::leadership(&config, client.as_ref(), &problems);
        let authentication = parts::authentication(&config, client, &agent_pods, &problems)?;
        let listener = TcpListener::bind(config.listen).await;
        let listener = listener.with_context(|| format!("listening on {}", config.listen))?;
        let admin_listener = TcpListener::bind(config.admin).await;
        let admin_listener =
            admin_listener.with_context(|| format!("listening on {}", config.admin))?;
        let serving = Arc::new(Serving::default());
        let serving_until = match authority.has_issuer() {
            true => serving.renew(&authority, config.controller_name.as_str())?,
            false => SystemTime::now(),
        };
        let server = control::Server {
            views,
            authority,
            authentication: Arc::new(authentication),
            agents: Arc::new(Agents::new(problems.clone())),
            metrics,
            trust_domain: config.trust_domain.clone(),
            stop,
        };
        Ok(Self {
            config,
            listener,
            admin_listener,
            serving,
            serving_until,
            server,
            problems,
            source,
            agent_pods,
            identity,
            candidate,
            leadership,
        })
    }

    /// The address that agents connect to.
    ///
    /// # Errors
    /// The socket is gone.
    pub fn address(&self) -> std::io::Result<std::net::SocketAddr> {
        self.listener.local_addr()
    }

    /// The address of the administrative port.
    ///
    /// # Errors
    /// The socket is gone.
    pub fn admin_address(&self) -> std::io::Result<std::net::SocketAddr> {
        self.admin_listener.local_addr()
    }

    /// Serves until stopped.
    ///
    /// # Errors
    /// A part failed that nothing works without.
    pub async fn serve(self) -> anyhow::Result<()> {
        let stop = self.server.stop.clone();
        let tasks = TaskTracker::new();
        let settings = Settings {
            trust_domain: self.config.trust_domain.clone(),
            pod_ranges: self.config.pod_range.clone(),
            service_ranges: self.config.service_range.clone(),
            egress_namespace: self.config.egress_namespace.clone(),
            default_policy: self.config.default_policy,
            force_tunnels: self.config.force_tunnels,
            // Where there is Kubernetes, somebody writes EndpointSlices.
            slices_only: self.config.source == SourceChoice::Kubernetes,
        };
        let views = self.server.views.clone();
        let index = Index::new(settings, views.clone(), self.problems.clone());
        let admin = self.admin(index.statuses());
        tasks.spawn(admin.serve(self.admin_listener, stop.clone()));
        if let Some(candidate) = self.candidate {
            let writer = Writer {
                client: candidate.client(),
                statuses: index.statuses(),
                views: views.clone(),
                leadership: self.leadership,
                problems: self.problems.clone(),
                metrics: self.server.metrics.clone(),
            };
            tasks.spawn(writer.run(stop.clone()));
            tasks.spawn(candidate.run(views.clone(), stop.clone()));
        }
        let (sender, batches) = mpsc::channel(16);
        let mut reading = self.source.start(sender, stop.clone());
        let metrics = self.server.metrics.clone();
        let agent_pods = self.agent_pods;
        // Translation is work for a processor, not for the tasks that serve.
        let indexing = std::thread::Builder::new()
            .name("index".to_owned())
            .spawn(move || translate(index, batches, &views, &agent_pods, &metrics))?;
        let authority = self.server.authority.clone();
        if let Some((secret, roots)) = self.identity {
            tasks.spawn(secret.follow(stop.clone()));
            tasks.spawn(roots.keep(stop.clone()));
        }
        let told = authority.has_issuer().then(|| authority.trust_bundle());
        if let Some(bundle) = told.clone() {
            publish_trust(bundle, &self.server.views);
        }
        let (publishes, published) = oneshot::channel();
        let watching = look_after(self.server.clone(), told, publishes, stop.clone());
        tasks.spawn(watching);
        let (serving, name) = (self.serving.clone(), self.config.controller_name.clone());
        let (until, stopped) = (self.serving_until, stop.clone());
        tasks.spawn(async move {
            let keep = async {
                // Agents that find a certificate here find the roots, too.
                let _ = published.await;
                serving.keep(&authority, name.as_str(), until).await;
            };
            tokio::select! { () = stopped.cancelled() => {}, () = keep => {} }
        });
        let mut served = tokio::spawn(self.server.serve(self.listener, self.serving));
        let outcome = tokio::select! {
            outcome = &mut served => outcome.context("serving agents")?.context("serving agents"),
            outcome = &mut reading => match (outcome?, stop.is_cancelled()) {
                (Ok(()), false) => Err(anyhow::anyhow!("the source ended")),
                (outcome, _) => outcome.context("the source"),
            },
        };
        stop.cancel();
        tasks.close();
        let drained = async {
            tasks.wait().await;
            if !served.is_finished() {
                let _ = served.await;
            }
        };
        if tokio::time::timeout(DRAIN, drained).await.is_err() {
            tracing::warn!("some connections did not end in time");
        }
        if !reading.is_finished() {
            reading.abort();
        }
        // Its batches ended with the source.
        drop(indexing);
        outcome
    }

    fn admin(&self, statuses: Statuses) -> Admin {
        let state = State {
            views: self.server.views.clone(),
            agents: self.server.agents.clone(),
            authority: self.server.authority.clone(),
            problems: self.problems.clone(),
            statuses,
            leadership: self.leadership.clone(),
        };
        Admin {
            registry: self.server.metrics.registry(state.clone()),
            state,
            serving: self.serving.clone(),
        }
    }
}

/// Runs a controller until SIGTERM or SIGINT.
///
/// # Errors
/// It cannot start, or a part failed.
pub async fn run(config: Run) -> anyhow::Result<()> {
    let stop = CancellationToken::new();
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let controller = Controller::open(config, stop.clone()).await?;
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        listen = %controller.address()?,
        admin = %controller.admin_address()?,
        source = %controller.config.source,
        "the controller starts"
    );
    tokio::spawn(async move {
        tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
        tracing::info!("the controller ends");
        stop.cancel();
    });
    controller.serve().await
}

fn translate(
    mut index: Index,
    mut batches: mpsc::Receiver<Batch>,
    views: &Views,
    agent_pods: &AgentPods,
    metrics: &Arc<Metrics>,
) {
    while let Some(batch) = batches.blocking_recv() {
        let (started, events) = (Instant::now(), batch.events.len());
        agent_pods.hear(&batch);
        index.apply(batch);
        views.set_complete();
        let took = started.elapsed();
        metrics.applied(events, took);
        tracing::debug!(events, ?took, "took in changes");
    }
}

/// Reads the authority's files and the join tokens again when they change.
async fn look_after(
    server: control::Server,
    mut told: Option<TrustBundle>,
    publishes: oneshot::Sender<()>,
    stop: CancellationToken,
) {
    let mut changes = server.authority.changes();
    let mut publishes = Some(publishes);
    loop {
        // Changes without being written, too: when a root expires.
        let now = server.authority.trust_bundle();
        if told.as_ref() != Some(&now) && !now.roots.is_empty() {
            publish_trust(now.clone(), &server.views);
            told = Some(now);
        }
        if let Some(publishes) = publishes.take_if(|_| told.is_some()) {
            // Nobody waits when it ends.
            let _ = publishes.send(());
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(LOOK) => {}
            // The sender lives as long as the authority does.
            _ = changes.changed() => {}
        }
        let authority = server.authority.clone();
        let authentication = server.authentication.clone();
        let looked = tokio::task::spawn_blocking(move || {
            authority.reload();
            authentication.reload();
        });
        // A panic in there is logged by the runtime; the next look may succeed.
        let _ = looked.await;
    }
}

fn publish_trust(bundle: TrustBundle, views: &Views) {
    let resource = Resource::TrustBundle(bundle);
    let mut changes = Changes::new();
    changes.insert((Audience::All, resource.key()), Some(resource));
    if !views.apply(changes).is_empty() {
        tracing::error!("the roots are too many for agents, which keep those before");
    }
}
