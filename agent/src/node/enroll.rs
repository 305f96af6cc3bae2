//! Makes the pods that are enrolled those that are wanted.

use std::collections::{BTreeSet, HashMap};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::task::JoinSet;
use weft_core::{NodePod, Workload, WorkloadId};

use super::closed::{self, Closed};
use super::{EnrollError, LocalPod, listen, loopback};
use crate::bpf::{BpfError, ListenerRole, PodEntry, Standing};
use crate::identity::{CertificateState, CertificateStatus};
use crate::netns::Netns;
use crate::proxy::{self, Context};

/// The node's pods, as this agent has them.
pub(super) struct Node {
    pub(super) context: Arc<Context>,
    /// What this agent is to the kernel's state.
    pub(super) standing: Standing,
    /// Cookie of the agent's own namespace.
    host_cookie: Option<u64>,
    enrolled: HashMap<WorkloadId, Entry>,
    /// Whether older agents know that this one has all pods.
    settled: bool,
    /// Pods that are in the kernel's maps and that this agent does not serve.
    closed: Closed,
    /// Cookies of pods that are gone and could not be removed from the kernel's maps.
    not_unenrolled: BTreeSet<u64>,
    draining: JoinSet<()>,
}

/// Why a pod is let go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Leaving {
    /// It takes no part in the mesh any more, although it lives.
    OptedOut,
    /// It is not described any more. Its processes may live on.
    NotDescribed,
    /// Another pod, or another identity, in the same namespace.
    Replaced,
    /// Its namespace does not exist any more, or another has its name.
    NamespaceGone,
}

struct Entry {
    pod: Arc<LocalPod>,
    description: Arc<NodePod>,
    record: Arc<Workload>,
}

impl Node {
    pub(super) fn new(context: Arc<Context>) -> Self {
        Self {
            context,
            standing: Standing::default(),
            host_cookie: Netns::current().and_then(|netns| netns.cookie()).ok(),
            enrolled: HashMap::new(),
            settled: false,
            closed: Closed::default(),
            not_unenrolled: BTreeSet::new(),
            draining: JoinSet::new(),
        }
    }

    /// Takes note of what this agent is to the kernel's state, and shows it.
    pub(super) fn stand(&mut self, standing: Standing) {
        if standing != self.standing {
            tracing::info!(?standing, "which agent serves this node");
            self.standing = standing;
        }
        self.context.pods.stand(standing);
    }

    /// Whether there is a certificate for every pod.
    pub(super) fn is_prepared(&self) -> bool {
        let held = |it: &CertificateStatus| {
            matches!(
                it.state,
                CertificateState::Held | CertificateState::InDanger
            )
        };
        self.want_identities(&self.context.store.node_pods());
        self.context.identities.status().iter().all(held)
    }

    /// Lets the listeners close.
    pub(super) fn stop_accepting(&self) {
        for entry in self.enrolled.values() {
            entry.pod.stop_accepting.cancel();
        }
    }

    /// Lets the listeners close and the flows finish.
    pub(super) fn step_down(&mut self) {
        self.stop_accepting();
        let grace = self.context.config.drain_deadline;
        for entry in self.enrolled.values() {
            let pod = Arc::clone(&entry.pod);
            self.draining
                .spawn(async move { pod.finish_flows(grace).await });
        }
    }

    /// Waits until the flows of a pod that was let go have ended; false if there is none.
    pub(super) async fn drained_one(&mut self) -> bool {
        self.draining.join_next().await.is_some()
    }

    /// Makes what is enrolled what is wanted, as far as possible now and if that is up to this
    /// agent.
    pub(super) fn reconcile(&mut self) {
        // Asked first: what is complete by now is in what is read next.
        let complete = self.context.store.is_complete();
        let wanted = self.context.store.node_pods();
        self.unenroll_what_failed();
        self.remove_unwanted(&wanted);
        self.want_identities(&wanted);
        let mut waiting = Vec::new();
        for description in wanted {
            if let Err(error) = self.ensure(&description) {
                waiting.push((description.id.clone(), error));
            }
        }
        if complete && self.standing == Standing::Owner {
            self.remove_closed();
            self.settle(&waiting);
        }
        self.publish(waiting);
    }

    /// Lets go of pods that are no longer described, came back as somebody else, or whose
    /// namespace is gone.
    fn remove_unwanted(&mut self, wanted: &[Arc<NodePod>]) {
        let wanted: HashMap<_, _> = wanted.iter().map(|it| (&it.id, it)).collect();
        let mut gone = Vec::new();
        for (id, entry) in &self.enrolled {
            let leaving = match wanted.get(id) {
                _ if self.is_opted_out(&entry.pod) => Leaving::OptedOut,
                None => Leaving::NotDescribed,
                Some(description) if is_gone(description, &entry.pod) => Leaving::NamespaceGone,
                Some(description) if description.uid != entry.pod.uid => Leaving::Replaced,
                Some(_) if self.is_somebody_else(&entry.pod) => Leaving::Replaced,
                Some(_) => continue,
            };
            gone.push((id.clone(), leaving));
        }
        for (id, leaving) in gone {
            if let Some(entry) = self.enrolled.remove(&id) {
                tracing::info!(pod = %id, uid = entry.pod.uid, why = ?leaving, "pod leaves the mesh");
                self.release(entry, leaving);
            }
        }
    }

    /// Whether the pod's record names another identity than it is enrolled with. A record that is
    /// missing says nothing: as long as the pod is described it is not let go.
    fn is_somebody_else(&self, pod: &LocalPod) -> bool {
        let record = self.context.store.workload(&pod.id);
        let identity = record.as_ref().and_then(|it| it.identity());
        identity.is_some_and(|it| *it != pod.identity)
    }

    fn is_opted_out(&self, pod: &LocalPod) -> bool {
        let addresses = &pod.record.load().addresses;
        closed::is_opted_out(&self.context.store, Some(&pod.id), addresses)
    }

    /// Stops to serve a pod, and lets its flows finish if it still lives. It is refused from then on,
    /// unless it takes no part in the mesh.
    fn release(&mut self, entry: Entry, leaving: Leaving) {
        let pod = entry.pod;
        if leaving == Leaving::OptedOut {
            self.unenroll(pod.cookie);
        } else if self.standing == Standing::Owner {
            let path = entry.description.netns.as_deref();
            self.closed.close(&self.context.bpf, &pod, path);
        }
        pod.left.cancel();
        pod.stop_accepting.cancel();
        let grace = match leaving {
            Leaving::NamespaceGone => Duration::ZERO,
            Leaving::OptedOut | Leaving::NotDescribed | Leaving::Replaced => {
                self.context.config.drain_deadline
            }
        };
        let context = Arc::clone(&self.context);
        self.draining.spawn(async move {
            pod.finish_flows(grace).await;
            // Without flows this may run before it is taken out of the index.
            let current = context.pods.by_id(&pod.id);
            if current.is_none_or(|current| Arc::ptr_eq(&current, &pod)) {
                context.telemetry.forget_pod(&pod.id);
            }
            // The namespace may live on, outside of the mesh or as somebody else.
            let others = context.pods.all();
            let mut others = others.iter().filter(|it| !Arc::ptr_eq(it, &pod));
            let taken = others.any(|it| it.cookie == pod.cookie);
            if leaving == Leaving::OptedOut && !taken {
                // Harmless where it stays.
                let _ = loopback::remove_way_back(&pod.netns);
            }
        });
    }

    fn unenroll(&mut self, cookie: u64) {
        if self.standing != Standing::Owner {
            return;
        }
        if let Err(error) = self.context.bpf.unenroll(cookie) {
            tracing::error!(cookie, %error, "removing a pod from the kernel's maps; trying again");
            self.not_unenrolled.insert(cookie);
        }
    }

    fn unenroll_what_failed(&mut self) {
        for cookie in std::mem::take(&mut self.not_unenrolled) {
            if !self.enrolled.values().any(|it| it.pod.cookie == cookie) {
                self.unenroll(cookie);
            }
        }
    }

    /// Enrolls a pod, or brings an enrolled one up to date.
    fn ensure(&mut self, description: &Arc<NodePod>) -> Result<(), EnrollError> {
        let record = self.context.store.workload(&description.id);
        let owner = self.standing == Standing::Owner;
        let Some(entry) = self.enrolled.get_mut(&description.id) else {
            if !owner {
                return Err(BpfError::NotOwner.into());
            }
            let entry = self.enroll(description, record)?;
            self.enrolled.insert(description.id.clone(), entry);
            return Ok(());
        };
        let record = record.ok_or(EnrollError::NoRecord)?;
        if entry.description == *description && entry.record == record {
            return Ok(());
        }
        if owner {
            self.context.bpf.update(&PodEntry {
                cookie: entry.pod.cookie,
                addresses: record.addresses.clone(),
                probe_ports: description.probe_ports.clone(),
            })?;
        }
        if entry.record.addresses != record.addresses {
            add_way_back(&entry.pod.netns, &entry.pod.id);
        }
        entry.pod.record.store(Arc::clone(&record));
        entry.record = record;
        entry.description = Arc::clone(description);
        Ok(())
    }

    /// Enrolls a pod. If that is not possible as soon as its namespace is known, it is refused
    /// everything meanwhile.
    fn enroll(
        &self,
        description: &Arc<NodePod>,
        record: Option<Arc<Workload>>,
    ) -> Result<Entry, EnrollError> {
        if record.as_ref().is_some_and(|it| it.identity().is_none()) {
            return Err(EnrollError::NoRecord);
        }
        let path = description
            .netns
            .as_deref()
            .ok_or(EnrollError::NetnsUnknown)?;
        let (netns, cookie, inode) = open_netns(path)?;
        if self.host_cookie.is_none_or(|host| host == cookie) {
            return Err(EnrollError::HostNetns);
        }
        if let Some(other) = self.enrolled.values().find(|it| it.pod.cookie == cookie) {
            return Err(EnrollError::NetnsShared(other.pod.id.clone()));
        }
        let netns = Arc::new(netns);
        let addresses = record.as_ref().map(|it| it.addresses.clone());
        let entry = PodEntry {
            cookie,
            addresses: addresses.unwrap_or_default(),
            probe_ports: description.probe_ports.clone(),
        };
        let begun = record.ok_or(EnrollError::NoRecord).and_then(|record| {
            self.listen(description, record, (Arc::clone(&netns), inode), &entry)
        });
        begun.map_err(|error| {
            let refused = self.context.bpf.refuse(&entry, netns.as_fd());
            match refused {
                Ok(()) => EnrollError::Refused(Box::new(error)),
                Err(refusing) => {
                    let pod = &description.id;
                    tracing::error!(%pod, error = %refusing, "refusing a pod that cannot be enrolled");
                    error
                }
            }
        })
    }

    /// Opens listeners in a pod and lets the kernel and the proxy know of them.
    fn listen(
        &self,
        description: &Arc<NodePod>,
        record: Arc<Workload>,
        (netns, inode): (Arc<Netns>, u64),
        entry: &PodEntry,
    ) -> Result<Entry, EnrollError> {
        let identity = record.identity().ok_or(EnrollError::NoRecord)?.clone();
        let cookie = entry.cookie;
        add_way_back(&netns, &description.id);
        let [outbound, tunnel, plaintext] = listen::open(&netns).map_err(EnrollError::Listen)?;
        let listeners = [
            (ListenerRole::Outbound, outbound.as_fd()),
            (ListenerRole::Tunnel, tunnel.as_fd()),
            (ListenerRole::Plaintext, plaintext.as_fd()),
        ];
        let usage = self.context.new_usage();
        let place = (netns, inode);
        let pod = LocalPod::new(description, &record, identity, cookie, place, usage);
        let pod = Arc::new(pod);
        let bpf = &self.context.bpf;
        bpf.enroll(entry, pod.netns.as_fd(), listeners)?;
        self.serve(&pod, outbound, tunnel, plaintext)?;
        tracing::info!(pod = %pod.id, uid = pod.uid, identity = %pod.identity, cookie, "pod joins the mesh");
        Ok(Entry {
            pod,
            description: Arc::clone(description),
            record,
        })
    }

    /// Hands the listeners to the proxy.
    fn serve(
        &self,
        pod: &Arc<LocalPod>,
        outbound: std::net::TcpListener,
        tunnel: std::net::TcpListener,
        plaintext: std::net::TcpListener,
    ) -> Result<(), EnrollError> {
        let _lane = crate::lanes::enter();
        let outbound = TcpListener::from_std(outbound).map_err(EnrollError::Listen)?;
        let tunnel = TcpListener::from_std(tunnel).map_err(EnrollError::Listen)?;
        let plaintext = TcpListener::from_std(plaintext).map_err(EnrollError::Listen)?;
        let parts = || (Arc::clone(&self.context), Arc::clone(pod));
        let (context, it) = parts();
        pod.accepting
            .spawn(proxy::outbound::serve(context, it, outbound));
        let (context, it) = parts();
        pod.accepting
            .spawn(proxy::inbound::serve_tunnel(context, it, tunnel));
        let (context, it) = parts();
        pod.accepting
            .spawn(proxy::inbound::serve_plaintext(context, it, plaintext));
        Ok(())
    }

    /// Removes what is in the kernel's maps and need not be. Called when everything is known.
    fn remove_closed(&mut self) {
        let context = &self.context;
        let ours = self.enrolled.values().map(|it| it.pod.cookie).collect();
        if let Err(error) = self.closed.find(&context.bpf, &ours) {
            tracing::error!(%error, "listing the pods in the kernel's maps");
        }
        let removable = self
            .closed
            .take_removable(&context.bpf, &context.store, &ours);
        for cookie in removable {
            self.unenroll(cookie);
        }
    }

    /// Lets go of what earlier agents had in the kernel once nobody needs it any more.
    pub(super) fn retire_predecessors(&self) {
        if self.standing == Standing::Owner
            && let Err(error) = self.context.bpf.retire_predecessors()
        {
            tracing::error!(%error, "removing what an earlier agent left");
        }
    }

    /// Whether the kernel programs are attached where they should be. Attaches those again that are
    /// not.
    pub(super) fn check_hooks(&self) -> bool {
        let bpf = &self.context.bpf;
        let mut repaired = Vec::new();
        let mut check = || {
            repaired.extend(bpf.repair()?);
            for pod in self.enrolled.values().map(|it| &it.pod) {
                if bpf.repair_pod(pod.cookie, pod.netns.as_fd())? {
                    repaired.push(format!("sk_lookup of {}", pod.id));
                }
            }
            bpf.verify().map(drop)
        };
        let problem = match check() {
            Ok(()) => None,
            Err(BpfError::NotOwner) => return true,
            Err(error) => Some(format!("{:#}", anyhow::Error::from(error))),
        };
        if let Some(problem) = &problem
            && self.context.pods.hooks().problem.as_ref() != Some(problem)
        {
            tracing::error!(problem, "the kernel programs are not as they should be");
        }
        if !repaired.is_empty() {
            tracing::error!(?repaired, "kernel programs were detached by somebody else");
        }
        let whole = problem.is_none();
        self.context.pods.set_hooks(problem, repaired.len() as u64);
        whole
    }

    /// Lets an older agent close its listeners, once it has no pod that this one could not take.
    fn settle(&mut self, waiting: &[(WorkloadId, EnrollError)]) {
        let not_taken = |(_, error): &(_, EnrollError)| {
            let error = match error {
                EnrollError::Refused(error) => error,
                error => error,
            };
            matches!(error, EnrollError::Listen(_) | EnrollError::Bpf(_))
        };
        if self.settled || waiting.iter().any(not_taken) {
            return;
        }
        match self.context.bpf.settle() {
            Ok(()) => self.settled = true,
            Err(error) => tracing::error!(%error, "telling older agents that they may go"),
        }
    }

    /// Asks for the certificates of all described pods, so that they come while pods are enrolled,
    /// and gives up those of others.
    fn want_identities(&self, wanted: &[Arc<NodePod>]) {
        let records = wanted
            .iter()
            .filter_map(|it| self.context.store.workload(&it.id));
        let identities: BTreeSet<_> = records.filter_map(|it| it.identity().cloned()).collect();
        self.context.identities.want(&identities);
    }

    /// Makes the present state visible to the proxy and to readiness.
    fn publish(&self, waiting: Vec<(WorkloadId, EnrollError)>) {
        // Not worth a word for each pod: readiness says it once.
        let of_another = |it: &EnrollError| matches!(it, EnrollError::Bpf(BpfError::NotOwner));
        let waiting = waiting.into_iter().filter(|(_, it)| !of_another(it));
        let waiting = waiting.collect();
        let pods = self.enrolled.values().map(|it| Arc::clone(&it.pod));
        self.context.pods.publish(pods, waiting);
    }
}

fn is_gone(description: &NodePod, pod: &LocalPod) -> bool {
    let path = description.netns.as_deref();
    path.is_some_and(|path| closed::is_gone(path, pod.netns_inode))
}

/// Without it IPv6 connections work, but resets may be lost: no reason to keep the pod out.
fn add_way_back(netns: &Netns, pod: &WorkloadId) {
    if let Err(error) = loopback::add_way_back(netns) {
        tracing::warn!(%pod, %error, "adding the route to ::1 that answers without a socket need");
    }
}

fn open_netns(path: &Path) -> Result<(Netns, u64, u64), EnrollError> {
    let open = || {
        let netns = Netns::open(path)?;
        let cookie = netns.cookie()?;
        let inode = netns.inode()?;
        Ok((netns, cookie, inode))
    };
    open().map_err(|error| EnrollError::Netns {
        path: path.display().to_string(),
        error,
    })
}
