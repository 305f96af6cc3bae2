//! What the agent's parts hold anyway, as metrics: asked at each scrape, counted nowhere twice.

use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use tokio::runtime::{Handle, RuntimeMetrics};

use crate::admin::Views;
use crate::balance::EndpointEntry;
use crate::balance::breaker::Standing;
use crate::bpf::Bpf;
use crate::discovery::{Balanced, Discovery, ServicePortEntry, Store};
use crate::identity::{CertificateState, Identities};
use crate::node::{Pods, WAITING_REASONS};
use crate::proxy::Context;
use crate::telemetry::exchange::{PortRef, balancer_labels};
use crate::telemetry::{Kind, Samples, Source, Telemetry};

/// Adds all of the agent's parts to its metrics.
pub fn add_all(telemetry: &Telemetry, context: &Arc<Context>) {
    let pods = Arc::clone(&context.pods);
    telemetry.add_source(Arc::new(Kernel {
        bpf: Arc::clone(&context.bpf),
        pods: Arc::clone(&pods),
    }));
    telemetry.add_source(Arc::new(Tasks {
        own: Handle::current().metrics(),
        pods: Arc::clone(&pods),
    }));
    telemetry.add_source(Arc::new(Enrolled(pods)));
    telemetry.add_source(Arc::new(Certificates(Arc::clone(&context.identities))));
    telemetry.add_source(Arc::new(ControlStream(context.discovery.clone())));
    telemetry.add_source(Arc::new(Balancers(Arc::clone(&context.store))));
}

/// Whether the agent is ready.
#[derive(Debug)]
pub struct Ready(pub Views);

impl Source for Ready {
    fn collect(&self, samples: &mut Samples) {
        let ready = f64::from(u8::from(self.0.readiness().ready));
        let help = "Whether the agent is ready: /ready says why not";
        samples.add(Kind::Gauge, "weft_ready", help, vec![], ready);
    }
}

#[derive(Debug)]
struct Kernel {
    bpf: Arc<Bpf>,
    pods: Arc<Pods>,
}

impl Source for Kernel {
    fn collect(&self, samples: &mut Samples) {
        if let Ok(counters) = self.bpf.counters() {
            for (reason, count) in counters {
                let labels = vec![("reason", reason.label().to_owned())];
                let help = "Connections that the kernel programs refused, by reason";
                samples.add(
                    Kind::Counter,
                    "weft_kernel_refused",
                    help,
                    labels,
                    count as f64,
                );
            }
        }
        if let Ok(maps) = self.bpf.occupancy() {
            for map in maps {
                let labels = || vec![("map", map.map.to_string())];
                let (entries, capacity) = (map.entries as f64, map.capacity as f64);
                let help = "Entries in a map of the kernel programs";
                samples.add(Kind::Gauge, "weft_map_entries", help, labels(), entries);
                let help = "Entries that a map of the kernel programs can hold";
                samples.add(Kind::Gauge, "weft_map_capacity", help, labels(), capacity);
            }
        }
        for pod in self.pods.all() {
            let Ok(Some(counters)) = self.bpf.pod_counters(pod.cookie) else {
                continue;
            };
            let labels = || {
                vec![
                    ("namespace", pod.id.0.namespace.to_string()),
                    ("pod", pod.id.0.name.to_string()),
                ]
            };
            let help = "Connections of a pod that the kernel programs sent to the proxy";
            let redirected = counters.redirected as f64;
            samples.add(
                Kind::Counter,
                "weft_pod_redirected",
                help,
                labels(),
                redirected,
            );
            let help = "Connections from or to a pod that are on their way to a listener";
            for (direction, pending) in [
                ("outbound", counters.pending_outbound),
                ("inbound", counters.pending_inbound),
            ] {
                let mut labels = labels();
                labels.push(("direction", direction.to_owned()));
                samples.add(
                    Kind::Gauge,
                    "weft_pod_pending",
                    help,
                    labels,
                    pending as f64,
                );
            }
            let help = "Connections of a pod refused because its quota was used up";
            let refused = counters.quota_refusals as f64;
            samples.add(
                Kind::Counter,
                "weft_pod_quota_refused",
                help,
                labels(),
                refused,
            );
        }
    }
}

/// Of all runtimes: the agent's own, and those of the pods.
#[derive(Debug)]
struct Tasks {
    own: RuntimeMetrics,
    pods: Arc<Pods>,
}

impl Source for Tasks {
    fn collect(&self, samples: &mut Samples) {
        let of_pods = self.pods.all();
        let of_pods = of_pods.iter().map(|it| it.threads.handle().metrics());
        let of_pods: usize = of_pods.map(|it| it.num_alive_tasks()).sum();
        let tasks = (self.own.num_alive_tasks() + of_pods) as f64;
        let help = "Tasks of the agent and of its pods";
        samples.add(Kind::Gauge, "weft_tasks", help, vec![], tasks);
    }
}

#[derive(Debug)]
struct Enrolled(Arc<Pods>);

impl Source for Enrolled {
    fn collect(&self, samples: &mut Samples) {
        let enrolled = self.0.all().len() as f64;
        let help = "Pods of this node that take part in the mesh";
        samples.add(Kind::Gauge, "weft_pods_enrolled", help, vec![], enrolled);
        let held = self
            .0
            .all()
            .iter()
            .filter(|it| it.is_by_tunnels_only())
            .count() as f64;
        let help = "Pods of this node that are in the mesh and that policies of the CNI's own kinds select: what they have \
                    with each other goes by tunnels";
        samples.add(Kind::Gauge, "weft_pods_by_tunnels_only", help, vec![], held);
        let repaired = self.0.hooks().repaired as f64;
        let help = "Kernel programs that were detached by somebody else and attached again";
        let name = "weft_hooks_repaired";
        samples.add(Kind::Counter, name, help, vec![], repaired);
        let ended = self.0.ended() as f64;
        let help = "Connections that pods had when they joined the mesh, and that were ended so that they come back through it";
        let name = "weft_opt_in_connections_ended";
        samples.add(Kind::Counter, name, help, vec![], ended);
        let waiting = self.0.waiting();
        let help = "Pods of this node that should take part and cannot yet, by reason; readiness names them";
        for reason in WAITING_REASONS {
            let number = waiting.iter().filter(|it| it.label == reason).count() as f64;
            let labels = vec![("reason", reason.to_owned())];
            samples.add(Kind::Gauge, "weft_pods_waiting", help, labels, number);
        }
        for pod in self.0.all() {
            let labels = || {
                vec![
                    ("namespace", pod.id.0.namespace.to_string()),
                    ("pod", pod.id.0.name.to_string()),
                ]
            };
            let kept = pod.usage.kept_bytes() as f64;
            let help = "Bytes that the pod's flows keep because a receiver has no room";
            let name = "weft_pod_buffered_bytes";
            samples.add(Kind::Gauge, name, help, labels(), kept);
            let forgotten = pod.retry_budgets.forgotten() as f64;
            let help = "Budgets of retries that were forgotten because the pod's requests go by too many rules";
            let name = "weft_pod_retry_budgets_evicted";
            samples.add(Kind::Counter, name, help, labels(), forgotten);
            let used = pod.threads.used().as_secs_f64();
            let help = "CPU time that the agent has used for the pod's flows";
            let name = "weft_pod_cpu_seconds";
            samples.add(Kind::Counter, name, help, labels(), used);
            let (inbound, outbound) = pod.usage.exchanges();
            for (direction, open) in [("inbound", inbound), ("outbound", outbound)] {
                let help = "HTTP requests of the pod without the end of their answer";
                let name = "weft_pod_open_exchanges";
                let mut labels = labels();
                labels.push(("direction", direction.to_owned()));
                samples.add(Kind::Gauge, name, help, labels, open as f64);
            }
        }
    }
}

#[derive(Debug)]
struct Certificates(Arc<Identities>);

impl Source for Certificates {
    fn collect(&self, samples: &mut Samples) {
        for status in self.0.status() {
            let labels = || vec![("identity", status.identity.to_string())];
            if let Some(not_after) = status.not_after {
                let help = "When the certificate of an identity expires (Unix time)";
                let name = "identity_cert_expiration_timestamp_seconds";
                samples.add(Kind::Gauge, name, help, labels(), unix_seconds(not_after));
            }
            let held = status.state != CertificateState::Missing
                && status.state != CertificateState::Expired;
            let help = "Whether there is a valid certificate for an identity of this node's pods";
            let held = f64::from(u8::from(held));
            samples.add(Kind::Gauge, "weft_certificate_held", help, labels(), held);
        }
    }
}

#[derive(Debug)]
struct ControlStream(Discovery);

impl Source for ControlStream {
    fn collect(&self, samples: &mut Samples) {
        let state = self.0.state();
        let mut add = |kind, name, help, value| samples.add(kind, name, help, vec![], value);
        let connected = f64::from(u8::from(state.connected));
        let help = "Whether the controller is connected";
        add(Kind::Gauge, "weft_control_connected", help, connected);
        if let Some(age) = state.knowledge_age() {
            let help = "Seconds since what the agent knows was last known to be current";
            add(
                Kind::Gauge,
                "weft_control_knowledge_age_seconds",
                help,
                age.as_secs_f64(),
            );
        }
        let pushes = state.pushes as f64;
        add(
            Kind::Counter,
            "weft_control_pushes",
            "Pushes received from controllers",
            pushes,
        );
        let rejections = state.rejections as f64;
        let help = "Resources that the agent could not use";
        add(
            Kind::Counter,
            "weft_control_rejected_resources",
            help,
            rejections,
        );
        let connects = state.connects as f64;
        add(
            Kind::Counter,
            "weft_control_connects",
            "Connections to controllers",
            connects,
        );
        let failures = state.failures as f64;
        let help = "Connections to controllers that failed or ended";
        add(Kind::Counter, "weft_control_failures", help, failures);
        let behind = state.behind as f64;
        let help = "Controllers that had not heard of all that the agent knows";
        add(Kind::Counter, "weft_control_behind", help, behind);
    }
}

#[derive(Debug)]
struct Balancers(Arc<Store>);

impl Source for Balancers {
    fn collect(&self, samples: &mut Samples) {
        let mut ports = self.0.used_ports();
        ports.sort_by(|a, b| (&a.service, a.port).cmp(&(&b.service, b.port)));
        let now = Instant::now();
        for (balanced, name) in [
            (Balanced::Exchanges, "outbound_http_balancer_endpoints"),
            (Balanced::Connections, "outbound_tcp_balancer_endpoints"),
        ] {
            for port in ports.iter().filter(|it| it.balances(balanced)) {
                let labels = balancer_labels(&PortRef::service(port.service.clone(), port.port));
                let (ready, pending) = standing(port, now);
                let help = "The number of endpoints currently in the balancer";
                for (state, number) in [("ready", ready), ("pending", pending)] {
                    let mut labels = labels.clone();
                    labels.insert(0, ("endpoint_state", state.to_owned()));
                    samples.add(Kind::Gauge, name, help, labels, number as f64);
                }
            }
        }
        for port in &ports {
            waiting(port, samples);
            left_out(port, now, samples);
        }
    }
}

/// How many endpoints may be chosen, and how many not.
fn standing(port: &ServicePortEntry, now: Instant) -> (usize, usize) {
    let endpoints = port.endpoints.load();
    let is_ready =
        |it: &&Arc<EndpointEntry>| matches!(it.standing(now), Standing::Ready | Standing::Resting);
    let ready = endpoints.iter().filter(is_ready).count();
    (ready, endpoints.len() - ready)
}

/// Of ports at which somebody ever had to wait.
fn waiting(port: &ServicePortEntry, samples: &mut Samples) {
    let queues = port.health.queues();
    if queues.is_empty() {
        return;
    }
    let labels = || balancer_labels(&PortRef::service(port.service.clone(), port.port));
    let waiting: usize = queues.iter().map(|it| it.waiting()).sum();
    let help = "Exchanges and connections that wait for an endpoint";
    let name = "weft_balancer_waiting";
    samples.add(Kind::Gauge, name, help, labels(), waiting as f64);
    let is_fail_fast = queues.iter().any(|it| it.is_fail_fast());
    let help = "Whether exchanges and connections that find no endpoint fail at once";
    let name = "weft_balancer_fail_fast";
    let value = f64::from(u8::from(is_fail_fast));
    samples.add(Kind::Gauge, name, help, labels(), value);
    let counts = queues.iter().map(|it| it.counts());
    let (falls, failed) = counts.fold((0, 0), |sum, it| (sum.0 + it.0, sum.1 + it.1));
    let help = "How often it came to fail-fast";
    let name = "weft_balancer_fail_fasts";
    samples.add(Kind::Counter, name, help, labels(), falls as f64);
    let help = "Exchanges and connections that failed for want of an endpoint";
    let name = "weft_balancer_unserved";
    samples.add(Kind::Counter, name, help, labels(), failed as f64);
}

/// Of ports at which endpoints that fail are left out.
fn left_out(port: &ServicePortEntry, now: Instant, samples: &mut Samples) {
    let endpoints = port.endpoints.load();
    if endpoints.iter().all(|it| it.guard().is_none()) {
        return;
    }
    let labels = || balancer_labels(&PortRef::service(port.service.clone(), port.port));
    let help = "How often an endpoint was left out because it failed";
    let name = "weft_balancer_ejections";
    let ejections = port.health.ejections() as f64;
    samples.add(Kind::Counter, name, help, labels(), ejections);
    let help = "Whether an endpoint is used (0), is left out because it failed (1), or is until its next request succeeds (2)";
    for endpoint in endpoints.iter().filter(|it| it.guard().is_some()) {
        let mut labels = labels();
        labels.push(("endpoint", endpoint.to().to_string()));
        let state = match endpoint.standing(now) {
            Standing::Ready | Standing::Resting => 0.0,
            Standing::Ejected => 1.0,
            Standing::Due => 2.0,
        };
        samples.add(Kind::Gauge, "weft_balancer_ejected", help, labels, state);
    }
}

fn unix_seconds(time: SystemTime) -> f64 {
    time.duration_since(UNIX_EPOCH)
        .map_or(0.0, |since| since.as_secs_f64())
}
