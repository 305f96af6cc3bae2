//! Puts the agent's parts together, and takes them apart in order.
//!
//! Start: the kernel programs first, so that whoever connects is refused rather than unprotected;
//! then the control stream, certificates and pods as they become known. Stop (SIGTERM, SIGINT):
//! listeners close, flows may finish until the deadline, what is left is reset. The programs stay
//! pinned: until the next agent is there, connections of meshed pods are refused.
//!
//! During an upgrade two agents run. Both answer on the admin port until the newer one has taken
//! over (`node`), then the older one leaves it and its listeners, and drains as if it were stopped.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::runtime::Handle;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use weft_core::WorkloadId;

use crate::admin::{self, Admin, Views};
use crate::balance::queue::QueueLimits;
use crate::bpf::{self, Bpf, BpfConfig, Standing};
use crate::config::{
    AskConfig, Config, KernelConfig, LimitsConfig, PrepareConfig, UninstallConfig,
};
use crate::discovery::{Calls, ControlStream, Controller, ControllerConfig, Store, StreamState};
use crate::identity::{ControllerSigner, Identities};
use crate::log::{self, LogControl};
use crate::netns::Netns;
use crate::node::cni::CniConfig;
use crate::node::{self, NodeConfig, Pods, find};
use crate::panics;
use crate::proxy::limits::{Limits, Resources};
use crate::proxy::{Context, ProxyConfig, explain};
use crate::sources;
use crate::telemetry::{Refusal, SAMPLE_EACH, Telemetry};

/// Runs the agent until a signal ends it.
///
/// # Errors
/// What keeps it from starting, with what to do about it.
pub fn run(config: Config) -> Result<()> {
    let log = log::init(&config.log_level, config.log_format)?;
    panics::watch();
    raise_descriptor_limit();
    // There are no other threads yet, and none ever leaves for long.
    Netns::stay_here().context("opening the network namespace")?;
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .on_thread_start(node::come_first)
        .build()
        .context("starting the runtime")?
        .block_on(Box::pin(serve(config, log)))
}

/// Removes an instance's kernel programs and maps.
///
/// # Errors
/// What could not be removed.
pub fn uninstall(config: &UninstallConfig) -> Result<()> {
    let pins = pin_root(&config.kernel)?;
    Bpf::uninstall(&pins).with_context(|| format!("removing {}", pins.display()))?;
    if config.stay {
        loop {
            std::thread::park();
        }
    }
    Ok(())
}

/// Mounts on the node what an agent needs there.
///
/// # Errors
/// What could not be mounted, and why.
pub fn prepare(config: &PrepareConfig) -> Result<()> {
    bpf::prepare(&config.bpffs).context("preparing the node")
}

/// Asks the agent that runs, and prints what it says.
///
/// # Errors
/// It says nothing, or no.
pub fn ask(config: &AskConfig) -> Result<()> {
    let socket = config.admin_socket.first();
    let socket = socket.context("--admin-socket is needed")?;
    let answer = admin::ask(socket, &config.path, config.put.as_deref())?;
    print!("{answer}");
    Ok(())
}

async fn serve(config: Config, log: LogControl) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("catching SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("catching SIGINT")?;
    let kernel = kernel(&config.kernel, &config.proc)?;
    let bpf = Bpf::open(&kernel).context("installing the kernel programs")?;
    let pods = Arc::new(Pods::default());
    match bpf.verify() {
        Ok(hooks) => {
            tracing::info!(pins = %kernel.pin_root.display(), ?hooks, "kernel programs are in place");
        }
        // To end would not mend it. What can be is mended as soon as this agent owns the hooks.
        Err(error) => {
            let problem = format!("{:#}", anyhow::Error::from(error));
            tracing::error!(problem, "the kernel programs are not as they should be");
            pods.set_hooks(Some(problem), 0);
        }
    }

    let store = Store::on(config.node.clone());
    let controller = Arc::new(Controller::new(ControllerConfig {
        urls: config
            .controller
            .addresses
            .iter()
            .map(ToString::to_string)
            .collect(),
        name: config.controller.name.clone(),
        trust_bundle: config.controller.trust_bundle.clone(),
        join_token: config.controller.join_token_file.clone(),
    })?);
    let node = config.node.clone();
    let (stream, discovery) = ControlStream::new(Arc::clone(&controller), Arc::clone(&store), node);
    let calls = Calls::new(controller);
    let signer = Arc::new(ControllerSigner::new(Arc::clone(&calls)));
    let identities = Identities::new(signer, Arc::clone(&store));
    let telemetry = Telemetry::new();
    let context = Context::start(
        Arc::new(bpf),
        store,
        discovery,
        Arc::clone(&identities),
        telemetry,
        pods,
        proxy_config(&config),
    );
    sources::add_all(&context.telemetry, &context);

    let stop_pods = CancellationToken::new();
    let stop = CancellationToken::new();
    let mut parts = JoinSet::new();
    let admin = serve_admin(&config, &context, log, &stop, &mut parts)?;
    let taps = Arc::clone(context.telemetry.taps());
    let stream = stream.answering(admin.answers()).tapped(taps);
    parts.spawn(stream.run(stop.clone()));
    parts.spawn(forget_series(Arc::clone(&context), stop.clone()));
    parts.spawn(remember(Arc::clone(&context.telemetry), stop.clone()));
    let (ending, stopped) = (context.end_flows_no_longer_allowed(), stop.clone());
    parts.spawn(async move {
        stopped.run_until_cancelled(ending).await;
    });
    parts.spawn(Arc::clone(&identities).run(stop.clone()));
    parts.spawn(renew_when_back(
        identities,
        context.discovery.state_changes(),
        stop.clone(),
    ));
    if let Some(cni) = cni(&config)? {
        parts.spawn(node::cni::serve(
            cni,
            Arc::clone(&context),
            calls,
            stop.clone(),
        ));
    }
    let node_config = NodeConfig {
        proc: config.proc.clone(),
        end_connections: config.end_connections_on_opt_in,
    };
    let enrolling = node::run(Arc::clone(&context), node_config, stop_pods.clone());
    let mut pods = tokio::spawn(enrolling);

    // A part that ended by itself panicked. The next process starts whole; until then new
    // connections are refused.
    tokio::select! {
        _ = terminate.recv() => tracing::info!("SIGTERM: draining"),
        _ = interrupt.recv() => tracing::info!("SIGINT: draining"),
        _ = &mut pods => anyhow::bail!("the part that enrolls pods ended by itself"),
        Some(_) = parts.join_next() => anyhow::bail!("a part of the agent ended by itself"),
    }
    stop_pods.cancel();
    pods.await
        .context("stopping the node's pods")?
        .context("looking for pods")?;
    let left: usize = context.pods.all().iter().map(|pod| pod.flows.len()).sum();
    drain(&context).await;
    let reset = context.telemetry.refusals(Refusal::Drained);
    stop.cancel();
    while let Some(ended) = parts.join_next().await {
        ended.context("stopping a part of the agent")?;
    }
    let next = match context.pods.standing() {
        Standing::Superseded { .. } => "a newer agent serves its pods",
        _ => "connections of its pods are refused until the next agent starts",
    };
    tracing::info!(left, reset, "drained; {next}");
    Ok(())
}

/// What the CNI plugin is served by, if it is. That its list cannot be kept shows at once.
fn cni(config: &Config) -> Result<Option<CniConfig>> {
    let Some(socket) = config.cni_socket.clone() else {
        return Ok(None);
    };
    let namespaces = config.cni_namespaces.clone();
    for (path, flag) in [(&socket, "--cni-socket"), (&namespaces, "--cni-namespaces")] {
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent)
                .with_context(|| format!("making {} ({flag})", parent.display()))?;
        }
    }
    Ok(Some(CniConfig { socket, namespaces }))
}

/// Lets go of the series of workloads elsewhere that are gone.
async fn forget_series(context: Arc<Context>, stop: CancellationToken) {
    let mut tick = tokio::time::interval(SERIES_CHECK);
    loop {
        tokio::select! {
            _ = tick.tick() => {}
            () = stop.cancelled() => return,
        }
        let store = &context.store;
        let exists = |id: &WorkloadId| store.workload(id).is_some();
        context.telemetry.forget_destinations(exists);
    }
}

/// Takes samples of what is counted, for those who ask what happened a while ago.
async fn remember(telemetry: Arc<Telemetry>, stop: CancellationToken) {
    let first = tokio::time::Instant::now() + SAMPLE_EACH;
    let mut tick = tokio::time::interval_at(first, SAMPLE_EACH);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = tick.tick() => {}
            () = stop.cancelled() => return,
        }
        let telemetry = Arc::clone(&telemetry);
        // It takes as long as a scrape: flows are served meanwhile. A panic is in the log, and the next sample has its part.
        let _ = tokio::task::spawn_blocking(move || telemetry.remember()).await;
    }
}

/// Renews at once what could not be renewed while the controller was away.
async fn renew_when_back(
    identities: Arc<Identities>,
    mut stream: watch::Receiver<StreamState>,
    stop: CancellationToken,
) {
    loop {
        let back = async {
            stream.wait_for(|it| !it.connected).await.is_ok()
                && stream.wait_for(|it| it.connected).await.is_ok()
        };
        tokio::select! {
            open = back => if !open { return },
            () = stop.cancelled() => return,
        }
        identities.retry_now();
    }
}

/// Opens the admin port and the admin socket.
fn serve_admin(
    config: &Config,
    context: &Arc<Context>,
    log: LogControl,
    stop: &CancellationToken,
    parts: &mut JoinSet<()>,
) -> Result<Arc<Admin>> {
    let views = Views {
        store: Arc::clone(&context.store),
        discovery: context.discovery.clone(),
        identities: Arc::clone(&context.identities),
        pods: Arc::clone(&context.pods),
        bpf: Arc::clone(&context.bpf),
    };
    let (telemetry, recent) = (
        Arc::clone(&context.telemetry),
        Arc::clone(&context.telemetry),
    );
    telemetry.add_source(Arc::new(sources::Ready(views.clone())));
    let (readiness, pods) = (views.clone(), views.clone());
    let (explained, runtime) = (Arc::clone(context), Handle::current());
    let filter = log.clone();
    let port = admin::Port::new(config.admin);
    let asked = Arc::clone(&port);
    let admin = Arc::new(Admin {
        metrics: Box::new(move || telemetry.encode()),
        recent: Box::new(move |window| recent.recent(window)),
        readiness: Box::new(move || {
            let mut readiness = readiness.readiness();
            readiness.warnings.extend(asked.problem());
            readiness
        }),
        dump: Box::new(move || views.dump()),
        pods: Box::new(move || pods.pods()),
        explain: Box::new(move |query| runtime.block_on(explain::answer(&explained, query))),
        log_level: Box::new(move || filter.filter()),
        set_log_level: Box::new(move |filter| log.set(filter).map_err(|it| format!("{it:#}"))),
    });
    for socket in &config.admin_socket {
        if let Some(parent) = socket.parent() {
            std::fs::create_dir_all(parent)
                .with_context(|| format!("making {} (--admin-socket)", parent.display()))?;
        }
        let on_socket = admin::serve_socket(Arc::clone(&admin), socket, stop.clone())
            .with_context(|| format!("listening on {} (--admin-socket)", socket.display()))?;
        parts.spawn(on_socket);
    }
    let (pods, stop) = (Arc::clone(&context.pods), stop.clone());
    let on_port = Arc::clone(&admin);
    parts.spawn(async move {
        tokio::select! {
            () = port.run(on_port, stop.clone()) => {}
            () = pods.superseded() => stop.cancelled().await,
        }
    });
    Ok(admin)
}

/// Lets the flows of all pods finish until the deadline, and resets the rest.
async fn drain(context: &Context) {
    let mut pods = JoinSet::new();
    for pod in context.pods.all() {
        let deadline = context.config.drain_deadline;
        pods.spawn(async move { pod.finish_flows(deadline).await });
    }
    while pods.join_next().await.is_some() {}
}

fn proxy_config(config: &Config) -> ProxyConfig {
    ProxyConfig {
        drain_deadline: config.drain_deadline,
        detect_timeout: config.detect_timeout,
        http_idle_timeout: config.http_idle_timeout,
        limits: limits(&config.limits),
        tunnel: config.tunnel,
        queue: QueueLimits {
            timeout: config.limits.fail_fast_after,
            per_port: config.limits.max_waiting_per_port,
            per_pod: config.limits.max_waiting_per_pod,
        },
        ..ProxyConfig::default()
    }
}

/// Those that are asked for, and for the rest what fits this process.
fn limits(config: &LimitsConfig) -> Limits {
    let resources = Resources::of_process(config.memory_limit);
    let fitting = Limits::from_resources(resources);
    let mib = config.max_buffered_mib_per_pod;
    let limits = Limits {
        flows_per_pod: config.max_flows_per_pod.unwrap_or(fitting.flows_per_pod),
        exchanges_per_pod: config
            .max_exchanges_per_pod
            .unwrap_or(fitting.exchanges_per_pod),
        buffered_bytes_per_pod: mib.map_or(fitting.buffered_bytes_per_pod, |it| {
            it.saturating_mul(1024 * 1024)
        }),
        handshakes_per_pod: config
            .max_handshakes_per_pod
            .unwrap_or(fitting.handshakes_per_pod),
        handshakes_per_peer: config
            .max_handshakes_per_peer
            .unwrap_or(fitting.handshakes_per_peer),
        handshakes: config.max_handshakes.unwrap_or(fitting.handshakes),
        dials_per_pod: config.max_dials_per_pod.unwrap_or(fitting.dials_per_pod),
        ..fitting
    };
    let Resources {
        descriptors,
        memory_bytes,
        cpus,
    } = resources;
    let memory_mib = memory_bytes / (1024 * 1024);
    tracing::info!(descriptors, memory_mib, cpus, "limits: {limits}");
    limits
}

fn kernel(config: &KernelConfig, proc: &Path) -> Result<BpfConfig> {
    let hierarchy = bpf::cgroup2_root()?;
    let (pods, kubelet) = (config.cgroup.as_deref(), config.kubelet_cgroup.as_deref());
    let found = find::cgroups(proc, &hierarchy, pods, kubelet)?;
    let kubelet = found.kubelet.as_ref().map(|it| it.display());
    tracing::info!(pods = %found.pods.display(), ?kubelet, "control groups");
    Ok(BpfConfig {
        pin_root: pin_root(config)?,
        cgroup: found.pods,
        kubelet_cgroup: found.kubelet,
        max_pending: config.max_pending,
        pending_quota: config.pending_quota,
        log: config.bpf_log,
    })
}

fn pin_root(config: &KernelConfig) -> Result<PathBuf> {
    let bpffs = bpf::bpffs(config.bpffs.as_deref()).context("finding the BPF file system")?;
    Ok(bpffs.join("weft").join(config.instance.as_str()))
}

/// Every flow needs at least two descriptors: takes all that the hard limit gives.
fn raise_descriptor_limit() {
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    {
        tracing::warn!(soft, hard, %error, "the limit of descriptors stays as it is");
    }
}

/// How often the series of workloads that are gone are looked for.
const SERIES_CHECK: Duration = Duration::from_secs(15);
