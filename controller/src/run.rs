//! `weft-controller run`: puts the parts together, and ends them in order.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context;
use kube::Client;
use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use weft_core::TrustBundle;
use weft_proto::Resource;

use crate::admin::Admin;
use crate::admin::visitors::Visitors;
use crate::admission::{CaBundle, Webhook};
use crate::authority::{IssuerSecret, RootsConfigMap};
use crate::config::{Run, SourceChoice};
use crate::control;
use crate::control::agents::Agents;
use crate::control::authentication::pods::AgentPods;
use crate::control::tap::Taps;
use crate::control::tls::Serving;
use crate::index::{Index, Settings};
use crate::leader::{Candidate, Leadership};
use crate::problems::Problems;
use crate::progress::Progress;
use crate::questions::{self, Question, Questions};
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
    webhook_listener: Option<TcpListener>,
    inspection: Option<(TcpListener, Visitors)>,
    serving: Arc<Serving>,
    serving_until: SystemTime,
    server: control::Server,
    problems: Problems,
    source: AnySource,
    asked: mpsc::Receiver<Question>,
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
        progress: &Progress,
    ) -> anyhow::Result<Self> {
        Ok(match &config.source {
            SourceChoice::Directory(path) => {
                Self::Directory(Directory::new(path.clone(), problems))
            }
            SourceChoice::Kubernetes => {
                let client = client.context("--source kubernetes")?;
                let believe = config.believe_netns_annotations;
                let source = Kubernetes::new(client, believe, problems);
                let source = source.counting(metrics.clone());
                Self::Kubernetes(Box::new(source.telling(progress.clone())))
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
        let progress = Progress::default();
        let source = AnySource::of(
            &config,
            client.clone(),
            problems.clone(),
            &metrics,
            &progress,
        )?;
        let agents_namespace = config.agent_service_account.namespace.clone();
        let agent_pods = Arc::new(AgentPods::new(agents_namespace));
        let identity = parts::identity(&config, client.as_ref());
        let authority = Arc::new(parts::authority(&config, identity.as_ref(), &problems)?);
        let identity = identity.map(|it| it.kept_for(&authority));
        let (candidate, leadership) = parts::leadership(&config, client.as_ref(), &problems);
        let inspection = match (config.inspect, client.clone()) {
            (Some(address), Some(client)) => {
                let visitors = Visitors::new(client, metrics.clone());
                Some((bound(address).await?, visitors))
            }
            _ => None,
        };
        let authentication = parts::authentication(&config, client, &agent_pods, &problems)?;
        let listener = bound(config.listen).await?;
        let admin_listener = bound(config.admin).await?;
        let webhook_listener = match config.webhook {
            Some(address) => Some(bound(address).await?),
            None => None,
        };
        let serving = Arc::new(Serving::default());
        let serving_until = match authority.has_issuer() {
            true => serving.renew(&authority, config.controller_name.as_str())?,
            false => SystemTime::now(),
        };
        let (questions, asked) = Questions::new();
        let taps = Arc::new(Taps::new(views.clone()));
        let server = control::Server {
            views,
            authority,
            authentication: Arc::new(authentication),
            questions,
            progress,
            agents: Arc::new(Agents::new(problems.clone())),
            inspections: Arc::default(),
            taps,
            metrics,
            trust_domain: config.trust_domain.clone(),
            stop,
        };
        Ok(Self {
            config,
            listener,
            admin_listener,
            webhook_listener,
            inspection,
            serving,
            serving_until,
            server,
            problems,
            source,
            asked,
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

    /// The address of the webhook, if there is one.
    pub fn webhook_address(&self) -> Option<std::net::SocketAddr> {
        self.webhook_listener.as_ref()?.local_addr().ok()
    }

    /// The address where people ask for inspection, if there is one.
    pub fn inspection_address(&self) -> Option<std::net::SocketAddr> {
        self.inspection.as_ref()?.0.local_addr().ok()
    }

    /// Serves until stopped.
    ///
    /// # Errors
    /// A part failed that nothing works without.
    pub async fn serve(mut self) -> anyhow::Result<()> {
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
        let index = Index::new(settings.clone(), views.clone(), self.problems.clone());
        let (inspection, visitors) = self.inspection.take().unzip();
        let admin = Arc::new(self.admin(index.statuses(), visitors));
        if let Some(listener) = inspection {
            tasks.spawn(admin.clone().serve_inspection(listener, stop.clone()));
        }
        if let Some(path) = &self.config.admin_socket {
            let shown = path.display();
            let socket = admin.clone().serve_socket(path, stop.clone());
            let socket =
                socket.with_context(|| format!("listening on {shown} (--admin-socket)"))?;
            tasks.spawn(socket);
        }
        if let Some(listener) = self.webhook_listener {
            let webhook = Webhook {
                serving: Arc::default(),
                settings,
                metrics: self.server.metrics.clone(),
            };
            let authority = self.server.authority.clone();
            let name = self.config.webhook_name.clone();
            tasks.spawn(webhook.run(listener, authority, name, stop.clone()));
            if let Some(candidate) = &self.candidate {
                let bundle = CaBundle {
                    client: candidate.client(),
                    configuration: self.config.webhook_configuration.clone(),
                    name: self.config.webhook_name.clone(),
                    authority: self.server.authority.clone(),
                    leadership: self.leadership.clone(),
                    problems: self.problems.clone(),
                };
                tasks.spawn(bundle.keep(stop.clone()));
            }
        }
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
        let progress = self.server.progress.clone();
        let (agents, runtime) = (self.server.agents.clone(), Handle::current());
        let asked = self.asked;
        // Translation is work for a processor, not for the tasks that serve.
        let indexing = std::thread::Builder::new()
            .name("index".to_owned())
            .spawn(move || {
                let heard = Heard {
                    views: &views,
                    agent_pods: &agent_pods,
                    agents: &agents,
                    progress: &progress,
                    metrics: &metrics,
                };
                runtime.block_on(translate(index, batches, asked, heard));
            })?;
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

    fn admin(&self, statuses: Statuses, visitors: Option<Visitors>) -> Admin {
        let state = State {
            views: self.server.views.clone(),
            agents: self.server.agents.clone(),
            progress: self.server.progress.clone(),
            authority: self.server.authority.clone(),
            problems: self.problems.clone(),
            statuses,
            leadership: self.leadership.clone(),
        };
        Admin {
            registry: self.server.metrics.registry(state.clone()),
            state,
            inspections: self.server.inspections.clone(),
            taps: self.server.taps.clone(),
            stop: self.server.stop.clone(),
            serving: self.serving.clone(),
            silent_after: self.config.silent_after,
            source: self.config.source.to_string(),
            visitors,
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

/// Who hears of changes, beside the index.
struct Heard<'a> {
    views: &'a Views,
    agent_pods: &'a AgentPods,
    agents: &'a Agents,
    progress: &'a Progress,
    metrics: &'a Arc<Metrics>,
}

/// Takes in changes, and answers questions in between.
async fn translate(
    mut index: Index,
    mut batches: mpsc::Receiver<Batch>,
    mut asked: mpsc::Receiver<Question>,
    heard: Heard<'_>,
) {
    let mut open = questions::Open::default();
    let mut rejections = Box::pin(heard.agents.rejections());
    loop {
        let batch = tokio::select! {
            // What is true comes before what is said of it, or asked.
            biased;
            batch = batches.recv() => batch,
            changed = &mut rejections => {
                rejections.set(heard.agents.rejections());
                index.rejected(changed);
                continue;
            }
            Some(question) = asked.recv() => {
                open.ask(question, &index);
                continue;
            }
        };
        let Some(batch) = batch else { return };
        take_in(&mut index, batch, &heard);
        open.look(&index);
    }
}

fn take_in(index: &mut Index, mut batch: Batch, heard: &Heard<'_>) {
    let Heard {
        views,
        agent_pods,
        progress,
        metrics,
        ..
    } = heard;
    let (started, events) = (Instant::now(), batch.changes.len());
    progress.begins(std::mem::take(&mut batch.reached));
    if events == 0 && views.is_complete() {
        // It was heard of something, and nothing follows from it.
        progress.ends();
        return;
    }
    agent_pods.hear(&batch);
    index.apply(batch);
    views.set_complete();
    progress.ends();
    let took = started.elapsed();
    metrics.applied(events, took);
    tracing::debug!(events, ?took, "took in changes");
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

/// Listens.
async fn bound(address: SocketAddr) -> anyhow::Result<TcpListener> {
    let listener = TcpListener::bind(address).await;
    listener.with_context(|| format!("listening on {address}"))
}

fn publish_trust(bundle: TrustBundle, views: &Views) {
    let resource = Resource::TrustBundle(bundle);
    let mut changes = Changes::new();
    changes.insert((Audience::All, resource.key()), Some(resource));
    if !views.apply(changes).is_empty() {
        tracing::error!("the roots are too many for agents, which keep those before");
    }
}
