//! The data plane: what happens to a connection between its client and its server.
//!
//! A flow's life reads top to bottom, one type per stage, and no stage reaches back:
//!
//! | stage | type | where |
//! |---|---|---|
//! | accepted | [`outbound::Accepted`], [`inbound::Arrival`] | `outbound`, `inbound` |
//! | classified: what the destination is | [`outbound::Classified`] | `outbound` |
//! | decided: which way to an endpoint | [`outbound::Way`] | `outbound` |
//! | connected, policy applied | [`outbound::Connected`], [`inbound::Admitted`] | `outbound`, `inbound` |
//! | copied | [`tcp::Moved`] | `tcp` |
//! | accounted | [`record::Record`] | `record` |
//!
//! `outbound` serves clients on this node, `inbound` decides for servers on this node; between
//! nodes `tunnel` joins them, on one node the outbound half calls the inbound half directly.

mod descriptors;
pub mod egress;
mod ends;
mod error;
mod excess;
pub mod explain;
pub mod http;
pub mod inbound;
pub(crate) mod let_out;
pub(crate) mod limiters;
pub mod limits;
mod live;
mod live_requests;
pub mod outbound;
pub mod record;
mod seldom;
mod socket;
mod tap;
pub mod tcp;
pub mod tunnel;
pub mod usage;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;
use weft_core::PortProtocol;

use crate::balance::EgressBudgets;
use crate::balance::queue::QueueLimits;
use crate::bpf::Bpf;
use crate::config::TunnelProtocol;
use crate::discovery::{Discovery, Store};
use crate::identity::Identities;
use crate::node::{LocalPod, Pods};
use crate::telemetry::Telemetry;

use excess::Places;
use http::application::Spoken;
use http::first::Look;
use inbound::Admission;
use limits::Limits;
use live::LiveFlows;
use tunnel::claim::OpaqueBy;
use tunnel::client::Pool;
use tunnel::weft1;
use usage::{Handshakes, KeptBytes, Usage};

/// What flows need of the rest of the agent, and what they share.
pub struct Context {
    /// The kernel programs' maps.
    pub bpf: Arc<Bpf>,
    /// What is known of the cluster.
    pub store: Arc<Store>,
    /// Asks for what is not.
    pub discovery: Discovery,
    /// Certificates.
    pub identities: Arc<Identities>,
    /// Metrics.
    pub telemetry: Arc<Telemetry>,
    /// The pods enrolled on this node.
    pub pods: Arc<Pods>,
    /// Settings.
    pub config: ProxyConfig,
    tunnels: Arc<Pool>,
    channels: Arc<weft1::client::Pool>,
    live: Arc<LiveFlows>,
    handshakes: Arc<Handshakes>,
    kept: Arc<KeptBytes>,
    spoken: Spoken,
    /// Those of requests that leave the cluster; a Service's are with its port.
    egress_retries: EgressBudgets,
    /// Places of clients that are told why they were refused.
    refusals: Semaphore,
    /// The same of those whose connections were too many.
    excess: Places,
}

/// Who declares what a port speaks, as far as anybody does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum DeclaredBy {
    /// The client's pod, or its namespace.
    Client,
    /// The Service.
    Service,
    /// The server's pod, its namespace, or a Server that governs its port.
    Server,
    /// The number of the port.
    Number,
}

/// Settings of the data plane.
#[derive(Clone, Debug)]
pub struct ProxyConfig {
    /// How long flows may go on when their pod leaves the mesh or the agent stops.
    pub drain_deadline: Duration,
    /// How long a client may say nothing, or not enough, before its server is connected to and what it
    /// has said is passed on.
    pub detect_timeout: Duration,
    /// How long a client's connection of HTTP may be without an exchange; zero: for ever.
    pub http_idle_timeout: Duration,
    /// How much pods and peers may have at once.
    pub limits: Limits,
    /// What is spoken with other agents of the mesh.
    pub tunnel: TunnelProtocol,
    /// How connections of `weft/1` are kept.
    pub channels: weft1::client::Limits,
    /// How the tunnels to other nodes are kept.
    pub tunnels: tunnel::client::Limits,
    /// How long, and how many, may wait for an endpoint.
    pub queue: QueueLimits,
}

impl Context {
    /// Puts the parts together. Needs a runtime.
    pub fn start(
        bpf: Arc<Bpf>,
        store: Arc<Store>,
        discovery: Discovery,
        identities: Arc<Identities>,
        telemetry: Arc<Telemetry>,
        pods: Arc<Pods>,
        config: ProxyConfig,
    ) -> Arc<Self> {
        Arc::new(Self {
            bpf,
            store,
            discovery,
            identities,
            telemetry,
            pods,
            tunnels: Pool::new(config.tunnels.clone()),
            channels: weft1::client::Pool::new(config.channels.clone()),
            handshakes: Handshakes::new(&config.limits),
            kept: KeptBytes::new(config.limits.buffered_bytes),
            refusals: Semaphore::new(http::refusal::MOST_TOLD),
            excess: Places::new(excess::MOST_TOLD),
            config,
            live: LiveFlows::new(),
            spoken: Spoken::default(),
            egress_retries: EgressBudgets::default(),
        })
    }

    /// Ends live flows whenever policy no longer allows them. Without it the agent must not go on.
    pub fn end_flows_no_longer_allowed(&self) -> impl Future<Output = ()> + Send + use<> {
        let (store, pods) = (Arc::clone(&self.store), Arc::clone(&self.pods));
        live::end_flows_no_longer_allowed(Arc::downgrade(&self.live), store, pods)
    }

    /// What a pod that joins uses: nothing yet.
    pub fn new_usage(&self) -> Arc<Usage> {
        Usage::new(&self.config.limits, &self.kept)
    }

    /// What was declared of a port that a pod of this node connects to.
    fn declared(
        &self,
        pod: &LocalPod,
        classified: &outbound::Classified,
        to: SocketAddr,
    ) -> PortProtocol {
        self.declared_by(pod, classified, to).0
    }

    /// The same, and by whom.
    fn declared_by(
        &self,
        pod: &LocalPod,
        classified: &outbound::Classified,
        to: SocketAddr,
    ) -> (PortProtocol, DeclaredBy) {
        let (address, port) = (to.ip(), to.port());
        if self.store.is_outbound_opaque(&pod.id, port) {
            return (PortProtocol::Opaque, DeclaredBy::Client);
        }
        match classified {
            outbound::Classified::Service(port) => (port.protocol(), DeclaredBy::Service),
            outbound::Classified::Address => match self.pods.at(address) {
                Some(local) => {
                    let protocol = self.store.inbound_protocol(&local.id, port);
                    (protocol, DeclaredBy::Server)
                }
                None => match self.store.workload_at(address) {
                    Some(workload) => (workload.protocol_of(port), DeclaredBy::Server),
                    None => (PortProtocol::by_default(port), DeclaredBy::Number),
                },
            },
        }
    }

    /// What is declared of a port of a pod of this node, for a flow whose client's agent says that of a
    /// Service, or nothing.
    fn declared_here(
        &self,
        pod: &LocalPod,
        to: SocketAddr,
        claim: Option<&OpaqueBy>,
    ) -> PortProtocol {
        match claim {
            Some(OpaqueBy { service, port }) => {
                let by = (service, port.get());
                self.store.inbound_protocol_by(&pod.id, to, by)
            }
            None => self.store.inbound_protocol(&pod.id, to.port()),
        }
    }

    /// How to look at what arrives at a port.
    fn look(&self, declared: PortProtocol, admission: &Admission) -> Look<'_> {
        Look {
            declared,
            requests_only: admission.is_requests_only(),
            patience: self.config.detect_timeout,
            telemetry: Some(&self.telemetry),
        }
    }

    /// How many tunnels to other nodes are kept.
    pub fn tunnels(&self) -> usize {
        self.tunnels.connections() + self.channels.connections()
    }
}

impl Default for ProxyConfig {
    fn default() -> Self {
        Self {
            drain_deadline: Duration::from_secs(10),
            detect_timeout: Duration::from_secs(10),
            http_idle_timeout: Duration::from_secs(3600),
            limits: Limits::default(),
            tunnel: TunnelProtocol::Weft,
            channels: weft1::client::Limits::default(),
            tunnels: tunnel::client::Limits::default(),
            queue: QueueLimits::default(),
        }
    }
}
